"""The commands of `smart`: each reads its arguments, calls the library, prints, and says where files went."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import tempfile
import traceback
from argparse import Namespace
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

import smart_kernels
from smart import bench, bench_tables, plots, results, settings, text
from smart.checkpoint import load_checkpoint
from smart.data import ImageData
from smart.demo import run_demo
from smart.evaluate import evaluate
from smart.info import describe
from smart.layers import SmartNet
from smart.masks import nonzeros
from smart.models import list_models
from smart.options import build_parser, given_settings, show
from smart.peers import select
from smart.rewire import check_pattern
from smart.settings import Settings, UsageError
from smart.train import train
from smart.verify import verify_robustness
from smart_kernels.files import write_text
from smart_kernels.io import FORMAT as SWAPPED
from smart_kernels.model import SparseModel
from smart_kernels.report import format_table

DEFAULT_EPS = 8 / 255
# What a user can cause. Anything else is a defect of ours, and keeps its traceback.
USER_ERRORS = (ValueError, TypeError, OSError, RuntimeError, ImportError, smart_kernels.VerificationError)


class Stopped(Exception):
    """Ctrl-C came; the message says how to go on."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code: 0 done, 1 failed, 2 wrong usage, 130 stopped by Ctrl-C."""
    args = build_parser().parse_args(argv)
    args.command_line = shlex.join(["smart", *(sys.argv[1:] if argv is None else argv)])
    try:
        COMMANDS[args.command](args)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader, such as `head`, has enough; nothing is left to be written when Python exits.
        sys.stdout = None
    except UsageError as error:
        return _fail(args, error, 2)
    except USER_ERRORS as error:
        return _fail(args, error, 1)
    except (Stopped, KeyboardInterrupt) as error:
        print(f"\nsmart: {str(error) or 'stopped'}", file=sys.stderr)
        return 130
    return 0


def _fail(args: Namespace, error: Exception, code: int) -> int:
    if args.traceback:
        traceback.print_exc()
    print(f"smart: error: {_sentence(error)}", file=sys.stderr)
    return code


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def train_command(args: Namespace) -> None:
    """smart train"""
    out = Path(args.out)
    chosen = _train_settings(args, out)
    _check_folder(out)
    data = chosen.load_data()
    model = chosen.create_model_for(data, args.device)
    go_on = f"smart train --resume --out {shlex.quote(str(out))}"
    # The settings must lie in the folder of a run from its first step on, and must not change those of another run.
    started = (out / "config.json").exists()
    if not started or args.overwrite:
        chosen.write(out)
    print(f"{data.name}: {_count(data)}; {chosen.model['model']}, {_alive(model)}")
    try:
        result = train(model, data, chosen.config, out, args.resume, args.progress, args.overwrite)
    except KeyboardInterrupt as error:
        raise Stopped(f"stopped; {out} keeps every finished epoch, go on with: {go_on}") from error
    best = result.best
    print(
        f"best epoch {best['epoch']} of {len(result.history)}, on the validation images: clean path "
        f"{100 * best['val_clean']:.1f} %, adv path under PGD-{chosen.config.val_attack_steps} "
        f"{100 * best['val_adv']:.1f} %"
    )
    _say_written(result.best_path, result.last_path, result.log_path, out / settings.FILE_NAME)


def _train_settings(args: Namespace, out: Path) -> Settings:
    """The settings of the run: flags, before the file, before the defaults; a resumed run's file is its own."""
    file = args.config
    if args.resume and file is None and (out / settings.FILE_NAME).is_file():
        file = out / settings.FILE_NAME
    from_file = settings.read_file(file) if file is not None else {}
    Settings.resolve(from_file, f"{file}: ")
    chosen = Settings.resolve({**from_file, **given_settings(args)})
    try:
        check_pattern(chosen.model["pattern"], chosen.config.regrow)
    except ValueError as error:
        raise UsageError(str(error)) from error
    return chosen


def eval_command(args: Namespace) -> None:
    """smart eval"""
    for file in (args.csv, args.json):
        _check_file(file)
    model, metadata = load_checkpoint(args.checkpoint, args.device)
    data = _data_for(args, model)
    images, labels = (tensor[: args.limit] for tensor in data.test)
    eps = _eps(args, metadata)
    table = evaluate(
        model,
        (images, labels),
        args.attacks,
        args.paths,
        args.lambdas,
        eps,
        args.step,
        args.restarts,
        seed=args.seed,
        transfer=args.transfer,
        progress=args.progress,
    )
    used = table.settings
    print(
        f"{data.name}, {used['n_examples']} test images; L-infinity eps {show(eps)}, PGD step {show(used['step'])}, "
        f"restarts {used['restarts']}, seed {used['seed']}"
    )
    print(text.accuracy_table(table))
    for attack, matrix in table.transfer.items():
        print(f"\n{text.attack_name(attack)}: made against (line), shown to (column)")
        lines = [[text.path_name(name), *(f"{100 * a:.1f} %" for a in row.values())] for name, row in matrix.items()]
        print(text.align([["", *map(text.path_name, matrix)], *lines]))
    if args.csv:
        table.write_csv(args.csv)
    if args.json:
        content = {"checkpoint": args.checkpoint, "data": data.name, **used, "accuracy": table}
        content |= {"transfer": table.transfer} if table.transfer else {}
        write_text(args.json, json.dumps(content, indent=2) + "\n")
    _say_written(args.csv, args.json)


def swap_command(args: Namespace) -> None:
    """smart swap"""
    if not (args.out or args.dry_run):
        raise UsageError("give --out FILE for the swapped network, or --dry-run to see the plan only")
    _check_file(args.out)
    _check_file(args.timings)
    model, _ = load_checkpoint(args.checkpoint, args.device)
    example = _example(args, model, args.batch)
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
    _say_errors(errors, example)
    _say_written(args.out)


def export_command(args: Namespace) -> None:
    """smart export"""
    if args.format == "onnx" and args.path == "both":
        raise UsageError("an ONNX file holds one path: give --path clean, adv or a lambda")
    _check_file(args.out)
    sparse, example = _swapped(args)
    path = None if args.path == "both" else args.path
    errors = smart_kernels.export(sparse, example, args.out, path, args.format, not args.fixed_batch)
    batch = len(example) if args.fixed_batch else "N"
    sizes = ", ".join(map(str, (batch, *example.shape[1:])))
    given = f"images ({sizes}), {str(example.dtype).removeprefix('torch.')} on {example.device.type}"
    print(f"format {args.format}; path {args.path}; {given}")
    print(f"weights in memory: {text.size(sparse.total_bytes)}; file: {text.size(Path(args.out).stat().st_size)}")
    _say_errors(errors, example)
    _say_written(args.out)


def _swapped(args: Namespace) -> tuple[SparseModel, Tensor]:
    """The network that a checkpoint is swapped into, or that a file holds already; and images for it."""
    if not _is_swapped(args.checkpoint):
        model, _ = load_checkpoint(args.checkpoint, args.device)
        example = _example(args, model, args.batch)
        sparse = smart_kernels.swap(model, example, args.backend)
        smart_kernels.verify(model, sparse, example)
        return sparse, example
    if args.backend != "auto":
        raise UsageError(f"--backend is for a checkpoint: {args.checkpoint} is swapped already")
    sparse = smart_kernels.load(args.checkpoint, args.device)
    if args.example_shape:
        return sparse, _random_images(args.example_shape).to(args.device)
    flags = given_settings(args, settings.DATA)
    if not flags:
        raise UsageError(f"{args.checkpoint} does not say which images it is for: give --example-shape or --data")
    return sparse, Settings.resolve(flags).load_data().test[0][: args.batch].to(args.device)


def _is_swapped(file: str) -> bool:
    try:
        with safe_open(file, "pt") as opened:
            return (opened.metadata() or {}).get("format") == SWAPPED
    except (SafetensorError, OSError):
        return False  # load_checkpoint will say what is wrong with it


def verify_command(args: Namespace) -> None:
    """smart verify"""
    _check_file(args.json)
    model, metadata = load_checkpoint(args.checkpoint, args.device)
    sparse = smart_kernels.load(args.sparse, args.device)
    if args.example_shape:
        images, labels, name = _example(args, model, args.limit), None, "random images"
    else:
        data = _data_for(args, model, "--data or --example-shape")
        (images, labels), name = (tensor[: args.limit] for tensor in data.test), data.name
        _accepted(model, images[:1].to(args.device))
    attacked = args.attack and labels is not None
    found = verify_robustness(
        model,
        sparse,
        images,
        labels,
        _eps(args, metadata),
        args.step,
        args.steps if attacked else 0,
        args.queries if attacked else 0,
        seed=args.seed,
        tolerance=args.tolerance,
        strict=False,
        progress=partial(tqdm, desc="verify", unit="batch", disable=not args.progress),
    )
    _say_errors(found.errors, images)
    used = found.settings
    if attacked:
        print(f"{name}; L-infinity eps {show(used['eps'])}, PGD step {show(used['step'])}, seed {used['seed']}")
    elif args.attack:
        print("no attack was run: random images have no labels")
    print(found.table())
    if args.json:
        content = {"checkpoint": args.checkpoint, "sparse": args.sparse, "data": name, **found.as_dict()}
        write_text(args.json, json.dumps(content, indent=2) + "\n")
    _say_written(args.json)
    found.check()


def _run_suite(args: Namespace) -> None:
    """Runs a suite of the checkout this file lies in; its benchmarks import this package, not the other way round."""
    root = Path(__file__).resolve().parent.parent
    if not (root / "benchmarks" / "run.py").exists():
        raise UsageError("--suite runs benchmarks/ of the source checkout, which is not here: name a network instead")
    passed_on = ("suite", "peers", "threads", "budget", "json", "markdown", "plot", "traceback", "progress")
    defaults = vars(build_parser().parse_args(["bench", "--suite", args.suite]))
    if bad := [key for key, value in defaults.items() if key not in passed_on and getattr(args, key) != value]:
        raise UsageError(f"a suite has cases of its own: --{bad[0].replace('_', '-')} does not go with --suite")
    command = [sys.executable, "-m", "benchmarks.run", "--suite", args.suite]
    files = {"--out": args.json, "--markdown": args.markdown, "--plot": args.plot}
    flags = {"--threads": args.threads, "--budget": args.budget}
    flags |= {flag: file and Path(file).resolve() for flag, file in files.items()}
    for flag, value in flags.items():
        command += [] if value is None else [flag, str(value)]
    command += ["--peers", *args.peers] if args.peers else []
    if code := subprocess.run(command, cwd=root).returncode:
        raise SystemExit(code)


def bench_command(args: Namespace) -> None:
    """smart bench"""
    for file in (args.json, args.markdown, args.plot):
        _check_file(file)
    if args.plot and (why := plots.missing()):
        raise UsageError(f"--plot draws nothing: {why}")
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
    example = _accepted(model, torch.rand(max(args.batches), *shape, generator=generator).to(args.device))
    sparse = smart_kernels.swap(model, example, args.backend)
    name = model.spec["name"]
    progress = partial(tqdm, desc="bench", unit="batch", disable=not args.progress)
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
    _say_written(args.json, args.markdown, args.plot)


def _peers(args: Namespace) -> list[str]:
    """The dense peers to run against; says which were left out."""
    try:
        names, note = select(args.peers, args.device.type)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if note:
        print(note, file=sys.stderr)
    return names


def _network(args: Namespace) -> tuple[SmartNet, tuple[int, int, int]]:
    """The network to measure, and the shape (C, H, W) of its images."""
    flags = given_settings(args, settings.MODEL)
    shape = tuple(args.image_shape) if args.image_shape else None
    if args.network in list_models():
        shape = shape or (3, 32, 32)
        chosen = Settings.resolve({**flags, "model": args.network})
        return chosen.create_model(10, shape[0]).to(args.device).eval(), shape
    if flags:
        raise UsageError(f"--{min(flags)} is for a model by name: the checkpoint {args.network} has its own")
    if not Path(args.network).exists():
        raise FileNotFoundError(
            f"there is no checkpoint {args.network}, nor a model of that name: models are {', '.join(list_models())}"
        )
    model, _ = load_checkpoint(args.network, args.device)
    if shape is None:
        shape = _data_for(Namespace(checkpoint=args.network), model, "--image-shape").image_shape
    return model, shape


def info_command(args: Namespace) -> None:
    """smart info"""
    print(describe())


def demo_command(args: Namespace) -> None:
    """smart demo"""
    out = Path(args.out)
    _check_folder(out)
    try:
        run_demo(out, args.epochs, args.seed, args.density, args.progress)
    except KeyboardInterrupt as error:
        raise Stopped("stopped; finished epochs are kept, the same command goes on after them") from error


COMMANDS = {
    "train": train_command,
    "eval": eval_command,
    "swap": swap_command,
    "export": export_command,
    "verify": verify_command,
    "bench": bench_command,
    "info": info_command,
    "demo": demo_command,
}


# ---- what commands share ----


def _data_for(args: Namespace, model: SmartNet, instead: str = "--data") -> ImageData:
    """The data that flags name, or that the settings beside the checkpoint name: split as it was for training."""
    flags = given_settings(args, settings.DATA)
    beside = Path(args.checkpoint).parent / settings.FILE_NAME
    from_run = settings.read_file(beside) if beside.is_file() else {}
    if "data" not in flags and not from_run:
        raise UsageError(f"there is no {beside} to say which data {args.checkpoint} was trained on: give {instead}")
    if "data" in flags and flags["data"] != from_run.get("data"):
        from_run = {}
    data = Settings.resolve({**from_run, **flags}, f"{beside}: ").load_data()
    classes = model.spec["num_classes"]
    if data.num_classes > classes or data.image_shape[0] != model.in_channels:
        raise ValueError(
            f"{data.name} has {data.num_classes} classes and images of {data.image_shape[0]} channels: "
            f"{args.checkpoint} is for {classes} classes and {model.in_channels} channels"
        )
    return data


def _example(args: Namespace, model: SmartNet, count: int) -> Tensor:
    """Test images (N, C, H, W), at most ``count``; random ones if a shape was given."""
    if args.example_shape:
        images = _random_images(args.example_shape)
    else:
        images = _data_for(args, model, "--data or --example-shape").test[0][:count]
    return _accepted(model, images.to(args.device))


def _random_images(shape: Sequence[int]) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


def _accepted(model: SmartNet, images: Tensor) -> Tensor:
    """``images``, once the model itself has accepted them: its words are the clearest."""
    with torch.no_grad():
        model(images[:1])
    return images


def _eps(args: Namespace, metadata: Mapping[str, Any]) -> float:
    """The attacks' radius: the flag's, or that of the training."""
    return args.eps if args.eps is not None else metadata.get("config", {}).get("eps", DEFAULT_EPS)


def _check_folder(folder: Path) -> None:
    """Raises OSError unless files can be put into the folder, which is made if it is missing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"cannot write into {folder} ({error.strerror}): give a folder that you may write to") from error


def _check_file(file: str | None) -> None:
    if file is None:
        return
    if Path(file).is_dir():
        raise IsADirectoryError(f"{file} is a folder: give the name of a file to write")
    _check_folder(Path(file).parent)


def _count(data: ImageData) -> str:
    return ", ".join(f"{len(getattr(data, split)[0])} {split}" for split in ("train", "val", "test")) + " images"


def _alive(model: SmartNet) -> str:
    counts = nonzeros(model)
    parts = ", ".join(f"{key} {counts[key] / counts['dense']:.3f}" for key in ("clean", "adv", "union"))
    return f"{text.short(counts['dense'])} convolution weights, of which live: {parts}"


def _say_errors(errors: dict[str, float], x: Tensor) -> None:
    listing = ", ".join(f"{path} {error:.1e}" for path, error in errors.items())
    print(f"largest relative error on {len(x)} images: {listing}")


def _say_written(*files: Any) -> None:
    if written := [str(file) for file in files if file]:
        print(f"written: {', '.join(written)}")
