"""`smart verify`: compare a swapped network with its checkpoint, clean and attacked."""

from __future__ import annotations

import argparse
import json
from functools import partial

from tqdm import tqdm

import smart_kernels
from smart import readers, text
from smart.checkpoint import load_checkpoint
from smart.commands import flags
from smart.commands.shared import (
    accepted,
    attack_eps,
    check_file,
    data_for,
    example_images,
    say_errors,
    say_written,
)
from smart.progress import hidden
from smart.verify import verify_robustness
from smart_kernels.files import write_text


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help=flags.CHECKPOINT)
    parser.add_argument("sparse", help="a file that smart swap wrote")
    flags.data(parser)
    flags.example_shape(parser)
    flags.number(parser, "--limit", 256, "test images to compare on")
    parser.add_argument(
        "--tolerance",
        type=flags.checked(readers.number),
        help="largest relative error accepted (default: by dtype, 1e-4 for float32)",
    )
    attacks = parser.add_argument_group("attacks", "on labelled images; both networks must hold up alike")
    flags.radius(attacks)
    flags.number(attacks, "--steps", 20, "of PGD, through the checkpoint's gradients")
    attacks.add_argument(
        "--queries",
        type=flags.checked(readers.whole),
        default=100,
        help="of the Square Attack on the swapped network itself; 0 leaves it out (default: 100)",
    )
    attacks.add_argument("--no-attacks", dest="attack", action="store_false", help="logits and predictions only")
    flags.seed(attacks)
    parser.add_argument("--json", metavar="FILE", help="write the table and the settings")
    flags.progress(parser)
    flags.device(parser, "cpu")


def run(args: argparse.Namespace) -> None:
    check_file(args.json)
    model, metadata = load_checkpoint(args.checkpoint, args.device)
    sparse = smart_kernels.load(args.sparse, args.device)
    if args.example_shape:
        images, labels, name = example_images(args, model, args.limit), None, "random images"
    else:
        data = data_for(args, model, "--data or --example-shape")
        images, labels, name = data.floats("test", args.limit), data.test[1][: args.limit], data.name
        accepted(model, images[:1].to(args.device))
    attacked = args.attack and labels is not None
    found = verify_robustness(
        model,
        sparse,
        images,
        labels,
        attack_eps(args, metadata),
        args.step,
        args.steps if attacked else 0,
        args.queries if attacked else 0,
        seed=args.seed,
        tolerance=args.tolerance,
        strict=False,
        progress=partial(tqdm, desc="verify", unit="batch", disable=hidden(args.progress)),
    )
    say_errors(found.errors, images)
    used = found.settings
    if attacked:
        print(
            f"{name}; L-infinity eps {text.show(used['eps'])}, PGD step {text.show(used['step'])}, seed {used['seed']}"
        )
    elif args.attack:
        print("no attack was run: random images have no labels")
    print(found.table())
    if args.json:
        content = {"checkpoint": args.checkpoint, "sparse": args.sparse, "data": name, **found.as_dict()}
        write_text(args.json, json.dumps(content, indent=2) + "\n")
    say_written(args.json)
    found.check()
