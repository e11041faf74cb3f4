"""`smart methods`: one network trained by several methods, each tested alike, and all set beside each other."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch.distributed as dist

from smart import settings
from smart.cards import card_path, make_card, write_card
from smart.checkpoint import load_checkpoint
from smart.commands import compare, flags
from smart.commands.shared import check_file, check_folder, check_outputs
from smart.commands.train import train_into
from smart.data import ImageData
from smart.evaluate import evaluate
from smart.methods import METHODS
from smart.runs import RunFolder
from smart.settings import Settings, UsageError


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("methods", nargs="+", choices=METHODS, metavar="METHOD", help=f"any of {', '.join(METHODS)}")
    flags.config(parser)
    parser.add_argument(
        "--out", default="runs/methods", help="folder to put each method's run folder in (default: %(default)s)"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="start anew instead of going on with the runs that --out holds"
    )
    flags.attacks(parser, "clean", "pgd20", "pgd20-cw")
    flags.number(parser, "--restarts", 1, "of PGD")
    flags.number(parser, "--limit", None, "test on only the first so many test images")
    flags.outputs(parser, csv="write one row a method", markdown="write the table", plot="draw the trade-offs")
    flags.progress(parser)
    flags.device(parser, "auto")
    flags.settings(parser, left_out=["method"])


def run(args: argparse.Namespace) -> None:
    if dist.is_available() and dist.is_torchelastic_launched():
        raise UsageError("smart methods is one process: under torchrun, start smart train for each method")
    check_outputs(args)
    from_file = settings.read_file(args.config) if args.config is not None else {}
    given = {**from_file, **flags.given(args)}
    # All that can be wrong is said before the first of them is trained for hours.
    chosen = {name: Settings.resolve(settings.for_method(name, given)) for name in dict.fromkeys(args.methods)}
    folders = {name: RunFolder(Path(args.out) / name) for name in chosen}
    for folder in folders.values():
        check_folder(folder.path)
        check_file(card_path(folder.best))
    data = next(iter(chosen.values())).load_data()
    args.tensorboard = False
    for name, folder in folders.items():
        begun = folder.config.exists() and not args.overwrite
        train_into(folder.path, chosen[name], data, args.device, args, begun, args.command_line)
        _test(folder.best, data, chosen[name].config.eps, args)
    args.runs = [folder.path for folder in folders.values()]
    compare.run(args)


def _test(checkpoint: Path, data: ImageData, eps: float, args: argparse.Namespace) -> None:
    """Attacks the best epoch, and writes its card."""
    model, metadata = load_checkpoint(checkpoint, args.device)
    images, labels = (tensor[: args.limit] for tensor in data.test)
    table = evaluate(
        model, (images, labels), args.attacks, eps=eps, restarts=args.restarts, transfer=True, progress=args.progress
    )
    measured = data.name, images, labels
    write_card(make_card(checkpoint, model, metadata, measured, table, args.command_line), checkpoint)
