"""`smart export`: write a swapped network as a program that runs without its code."""

from __future__ import annotations

import argparse
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

import smart_kernels
from smart import settings, text
from smart.checkpoint import load_checkpoint
from smart.commands import flags
from smart.commands.shared import check_file, example_images, random_images, say_errors, say_written
from smart.settings import Settings, UsageError
from smart_kernels.export import FORMATS
from smart_kernels.io import FORMAT as SWAPPED
from smart_kernels.model import SparseModel
from smart_kernels.paths import PATHS
from smart_kernels.paths import Path as ExpertPath


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help=f"{flags.CHECKPOINT}, or one that smart swap wrote")
    parser.add_argument("--out", required=True, metavar="FILE", help="the program, .pt2 or .onnx")
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="pt2",
        help="pt2, a torch.export program; aoti, the same compiled for this machine; onnx, dense (default: pt2)",
    )
    parser.add_argument(
        "--path",
        type=flags.checked(_program_path),
        default="both",
        help="clean, adv, a lambda in [0, 1]; one of these for each stage of the network, as in adv,clean,clean; or "
        "both: chosen at each call by a second input (default: both)",
    )
    parser.add_argument(
        "--fixed-batch", action="store_true", help="the program takes batches of the example's size only"
    )
    flags.data(parser)
    flags.example_shape(parser)
    flags.batch(parser)
    flags.backend(parser)
    flags.device(parser, "cpu")


def run(args: argparse.Namespace) -> None:
    if args.format == "onnx" and args.path == "both":
        raise UsageError("an ONNX file holds one path: give --path clean, adv or a lambda")
    check_file(args.out)
    sparse, example = _swapped(args)
    path = None if args.path == "both" else args.path
    errors = smart_kernels.export(sparse, example, args.out, path, args.format, not args.fixed_batch)
    batch = len(example) if args.fixed_batch else "N"
    sizes = ", ".join(map(str, (batch, *example.shape[1:])))
    given = f"images ({sizes}), {str(example.dtype).removeprefix('torch.')} on {example.device.type}"
    shown = ",".join(map(str, path)) if isinstance(path, tuple) else args.path
    print(f"format {args.format}; path {shown}; {given}")
    print(f"weights in memory: {text.size(sparse.total_bytes)}; file: {text.size(Path(args.out).stat().st_size)}")
    say_errors(errors, example)
    say_written(args.out)


def _swapped(args: argparse.Namespace) -> tuple[SparseModel, Tensor]:
    """The network that a checkpoint is swapped into, or that a file holds already; and images for it."""
    if not _is_swapped(args.checkpoint):
        model, _ = load_checkpoint(args.checkpoint, args.device)
        example = example_images(args, model, args.batch)
        sparse = smart_kernels.swap(model, example, args.backend)
        smart_kernels.verify(model, sparse, example)
        return sparse, example
    if args.backend != "auto":
        raise UsageError(f"--backend is for a checkpoint: {args.checkpoint} is swapped already")
    sparse = smart_kernels.load(args.checkpoint, args.device)
    if args.example_shape:
        return sparse, random_images(args.example_shape).to(args.device)
    given = flags.given(args, settings.DATA)
    if not given:
        raise UsageError(f"{args.checkpoint} does not say which images it is for: give --example-shape or --data")
    return sparse, Settings.resolve(given).load_data().floats("test", args.batch).to(args.device)


def _is_swapped(file: str) -> bool:
    try:
        with safe_open(file, "pt") as opened:
            return (opened.metadata() or {}).get("format") == SWAPPED
    except (SafetensorError, OSError):
        return False  # load_checkpoint will say what is wrong with it


def _program_path(text: str) -> ExpertPath:
    if text == "both":
        return text
    each = tuple(one if one in PATHS else flags.dial(one) for one in text.split(","))
    return each if len(each) > 1 else each[0]
