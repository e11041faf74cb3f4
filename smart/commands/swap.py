"""`smart swap`: turn a checkpoint into a network that skips its zeros."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import smart_kernels
from smart import text
from smart.checkpoint import load_checkpoint
from smart.commands import flags
from smart.commands.shared import check_file, example_images, say_errors, say_written
from smart.settings import UsageError
from smart_kernels.report import format_table


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help=flags.CHECKPOINT)
    parser.add_argument("--out", metavar="FILE", help="the swapped network, .safetensors; needed without --dry-run")
    parser.add_argument("--dry-run", action="store_true", help="show what would run where, and write nothing")
    parser.add_argument("--strict", action="store_true", help="fail if a layer with zeros would have to run densely")
    parser.add_argument(
        "--no-measure", action="store_true", help="choose backends by estimate instead of timing layers"
    )
    parser.add_argument("--timings", metavar="FILE", help="keep measured times in this file, and use those it has")
    flags.data(parser)
    flags.example_shape(parser)
    flags.batch(parser)
    flags.backend(parser)
    flags.dtype(parser)
    flags.device(parser, "cpu")


def run(args: argparse.Namespace) -> None:
    if not (args.out or args.dry_run):
        raise UsageError("give --out FILE for the swapped network, or --dry-run to see the plan only")
    check_file(args.out)
    check_file(args.timings)
    model, _ = load_checkpoint(args.checkpoint, args.device)
    example = example_images(args, model, args.batch)
    dtype = getattr(torch, args.dtype) if args.dtype else None
    options = {"strict": args.strict, "measure": not args.no_measure, "timings": smart_kernels.Timings(args.timings)}
    if args.dry_run:
        print(smart_kernels.swap(model, example, args.backend, dtype, dry_run=True, **options))
        return
    sparse = smart_kernels.swap(model, example, args.backend, dtype, **options)
    errors = smart_kernels.verify(model, sparse, example)
    smart_kernels.save(sparse, args.out)
    print(format_table(sparse.report()))
    dense = sum(row["weights"] for row in sparse.report()) * next(model.parameters()).element_size()
    print(
        f"\nconvolution weights: {text.size(sparse.weight_bytes)} for all paths, {text.size(dense)} in one dense copy; "
        f"file: {text.size(Path(args.out).stat().st_size)}"
    )
    say_errors(errors, example)
    say_written(args.out)
