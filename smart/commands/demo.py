"""`smart demo`: train, swap, verify and measure a small network on real images, in a few minutes."""

from __future__ import annotations

import argparse
from pathlib import Path

from smart import readers
from smart.commands import flags
from smart.commands.shared import Stopped, check_folder
from smart.demo import run_demo
from smart.masks import DEFAULT_DENSITY, check_density


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", default="runs/demo", help="folder of the results (default: %(default)s)")
    parser.add_argument("--epochs", type=flags.checked(readers.positive), help="(default: as many as train well)")
    parser.add_argument(
        "--seed", type=flags.checked(readers.whole), default=0, help="of everything random (default: 0)"
    )
    parser.add_argument(
        "--density",
        type=flags.checked(readers.density),
        default=check_density(DEFAULT_DENSITY),
        help=f"part of the weights each path keeps, in (0, 1]; D or CLEAN,ADV (default: {DEFAULT_DENSITY})",
    )
    flags.progress(parser)


def run(args: argparse.Namespace) -> None:
    out = Path(args.out)
    check_folder(out)
    try:
        run_demo(out, args.epochs, args.seed, args.density, args.progress)
    except KeyboardInterrupt as error:
        raise Stopped("stopped; finished epochs are kept, the same command goes on after them") from error
