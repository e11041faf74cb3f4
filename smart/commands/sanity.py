"""`smart sanity`: check whether a checkpoint's robustness can be believed."""

from __future__ import annotations

import argparse
import json
from functools import partial

from tqdm import tqdm

from smart import text
from smart.checkpoint import load_checkpoint
from smart.commands import flags
from smart.commands.shared import attack_eps, check_file, data_for, say_written
from smart.progress import hidden
from smart.sanity import sanity_checks
from smart_kernels.files import write_text


class ChecksFailed(RuntimeError):
    """Checks ran, and did not pass."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help=flags.CHECKPOINT)
    flags.data(parser)
    flags.paths(parser)
    flags.lambdas(parser)
    flags.eps(parser)
    flags.number(parser, "--steps", 20, "of PGD; five times as many are tried too")
    flags.number(parser, "--queries", 200, "of the Square Attack, a black box")
    flags.effort(parser, 256)
    flags.outputs(parser, json="write the checks and the settings")
    flags.progress(parser)
    flags.device(parser, "auto")


def run(args: argparse.Namespace) -> None:
    check_file(args.json)
    model, metadata = load_checkpoint(args.checkpoint, args.device)
    data = data_for(args, model)
    images, labels = (tensor[: args.limit] for tensor in data.test)
    report = sanity_checks(
        model,
        (images, labels),
        attack_eps(args, metadata),
        args.paths,
        args.lambdas,
        args.steps,
        args.queries,
        args.restarts,
        seed=args.seed,
        progress=partial(tqdm, desc="sanity", unit="part", disable=hidden(args.progress)),
    )
    used = report.settings
    print(
        f"{data.name}, {used['n_examples']} test images; L-infinity eps {text.show(used['eps'])}, seed {used['seed']}"
    )
    print(report.table())
    if args.json:
        content = {"checkpoint": args.checkpoint, "data": data.name, **report.as_dict()}
        write_text(args.json, json.dumps(content, indent=2) + "\n")
    say_written(args.json)
    if failed := report.failed():
        raise ChecksFailed(
            f"{len(failed)} of {len(report.checks)} checks failed: do not trust the robustness of {args.checkpoint} "
            f"before you know why, first: {failed[0].name} (path {failed[0].path})"
        )
