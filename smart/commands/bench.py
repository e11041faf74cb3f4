"""`smart bench`: latency of a swapped network beside dense ones."""

from __future__ import annotations

import argparse
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

import smart
import smart_kernels
from smart import bench, bench_tables, plots, readers, results
from smart.checkpoint import load_checkpoint
from smart.commands import flags
from smart.commands.shared import accepted, check_outputs, data_for, say_written
from smart.layers import SmartNet
from smart.models import list_models
from smart.peers import ALL as ALL_PEERS
from smart.peers import PEERS, select
from smart.progress import hidden
from smart.settings import MODEL, Settings, UsageError
from smart_kernels.files import write_text


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "network",
        nargs="?",
        help=f"a checkpoint, or the name of a model to make with random weights: {', '.join(list_models())}",
    )
    parser.add_argument(
        "--suite",
        metavar="NAME",
        help="instead of one network a suite of the source checkout, such as cpu: runs python -m benchmarks.run with "
        "--peers, --threads, --budget, --json, --markdown and --plot as given here",
    )
    for name in ("density", "pattern", "overlap"):
        flags.add_setting(parser, name, MODEL[name], "; for a model by name")
    parser.add_argument(
        "--image-shape",
        nargs=3,
        type=flags.checked(readers.positive),
        metavar=("C", "H", "W"),
        help="of random images (default: 3 32 32 for a model by name, the training data's for a checkpoint)",
    )
    parser.add_argument(
        "--batches", nargs="+", type=flags.checked(readers.positive), default=[1, 16], help="(default: 1 16)"
    )
    flags.paths(parser)
    parser.add_argument(
        "--peers",
        nargs="+",
        choices=(ALL_PEERS, *PEERS),
        metavar="PEER",
        help=f"dense ones to run against: {', '.join(PEERS)}, or all that are installed "
        "(default: eager; those of a suite)",
    )
    parser.add_argument("--threads", type=flags.checked(readers.positive), help="(default: torch's own choice)")
    parser.add_argument(
        "--budget",
        type=flags.checked(readers.number),
        metavar="SECONDS",
        help="for each batch size, both paths and all peers together (default: 2; that of a suite)",
    )
    flags.backend(parser)
    flags.dtype(parser)
    flags.outputs(
        parser,
        json="write the rows with machine, versions and commit",
        markdown="write them as a table",
        plot="draw them as bars",
    )
    flags.progress(parser)
    flags.device(parser, "cpu")


def run(args: argparse.Namespace) -> None:
    check_outputs(args)
    if (args.network is None) == (args.suite is None):
        raise UsageError("name a network to measure, or a suite with --suite, not both")
    if args.suite is not None:
        return _run_suite(args)
    args.peers = args.peers or ["eager"]
    args.budget = 2.0 if args.budget is None else args.budget
    peers = _peers(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    model, shape = _network(args)
    generator = torch.Generator().manual_seed(0)
    example = accepted(model, torch.rand(max(args.batches), *shape, generator=generator).to(args.device))
    if args.dtype:
        model, example = (each.to(getattr(torch, args.dtype)) for each in (model, example))
    sparse = smart_kernels.swap(model, example, args.backend)
    name = model.spec["name"]
    progress = partial(tqdm, desc="bench", unit="batch", disable=hidden(args.progress))
    rows = bench.benchmark(model, sparse, example, args.batches, args.paths, peers, args.budget, name, progress)
    print(f"{name} on {'x'.join(map(str, shape))} images, {torch.get_num_threads()} threads, {args.device}; ms a batch")
    print(bench_tables.table(rows))
    content = results.results(rows, args.command_line)
    if args.json:
        results.write(content, args.json)
    if args.markdown:
        write_text(args.markdown, bench_tables.markdown(content) + "\n")
    if args.plot:
        plots.plot_benchmark(args.plot, content)
    say_written(args.json, args.markdown, args.plot)


def _run_suite(args: argparse.Namespace) -> None:
    """Runs a suite of the checkout that this package lies in, whose benchmarks import this package."""
    root = Path(smart.__file__).resolve().parent.parent
    if not (root / "benchmarks" / "run.py").exists():
        raise UsageError("--suite runs benchmarks/ of the source checkout, which is not here: name a network instead")
    passed_on = ("suite", "peers", "threads", "budget", "json", "markdown", "plot", "progress")
    parser = argparse.ArgumentParser()
    add_flags(parser)
    defaults = vars(parser.parse_args([]))
    if bad := [key for key, value in defaults.items() if key not in passed_on and getattr(args, key) != value]:
        raise UsageError(f"a suite has cases of its own: --{bad[0].replace('_', '-')} does not go with --suite")
    command = [sys.executable, "-m", "benchmarks.run", "--suite", args.suite]
    files = {"--out": args.json, "--markdown": args.markdown, "--plot": args.plot}
    options = {"--threads": args.threads, "--budget": args.budget}
    options |= {flag: file and Path(file).resolve() for flag, file in files.items()}
    for flag, value in options.items():
        command += [] if value is None else [flag, str(value)]
    command += ["--peers", *args.peers] if args.peers else []
    if code := subprocess.run(command, cwd=root).returncode:
        raise SystemExit(code)


def _peers(args: argparse.Namespace) -> list[str]:
    """The dense peers to run against; says which were left out."""
    try:
        names, note = select(args.peers, args.device.type, getattr(torch, args.dtype or "float32"))
    except ValueError as error:
        raise UsageError(str(error)) from error
    if note:
        print(note, file=sys.stderr)
    return names


def _network(args: argparse.Namespace) -> tuple[SmartNet, tuple[int, int, int]]:
    """The network to measure, and the shape (C, H, W) of its images."""
    given = flags.given(args, MODEL)
    shape = tuple(args.image_shape) if args.image_shape else None
    if args.network in list_models():
        shape = shape or (3, 32, 32)
        chosen = Settings.resolve({**given, "model": args.network})
        return chosen.create_model(10, shape[0]).to(args.device).eval(), shape
    if given:
        raise UsageError(f"--{min(given)} is for a model by name: the checkpoint {args.network} has its own")
    if not Path(args.network).exists():
        raise FileNotFoundError(
            f"there is no checkpoint {args.network}, nor a model of that name: models are {', '.join(list_models())}"
        )
    model, _ = load_checkpoint(args.network, args.device)
    if shape is None:
        shape = data_for(argparse.Namespace(checkpoint=args.network), model, "--image-shape").image_shape
    return model, shape
