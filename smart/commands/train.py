"""`smart train`: train a network, by SMART or by a method to compare it with."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

import torch

from smart import settings, text
from smart.commands import flags
from smart.commands.shared import Stopped, check_folder, say_written
from smart.costs import nonzeros
from smart.data import ImageData
from smart.launch import joined
from smart.layers import SmartNet
from smart.settings import Settings
from smart.share import Share
from smart.train import train


def add_flags(parser: argparse.ArgumentParser) -> None:
    flags.config(parser)
    parser.add_argument("--out", default="runs/train", help="run folder (default: %(default)s)")
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--resume", action="store_true", help="go on with the run in --out, with its own settings")
    start.add_argument("--overwrite", action="store_true", help="start anew if --out already holds a run")
    parser.add_argument(
        "--tensorboard", action="store_true", help="write the log for TensorBoard, too, into --out; needs tensorboard"
    )
    flags.progress(parser)
    flags.device(parser, "auto")
    flags.settings(parser)


def run(args: argparse.Namespace) -> None:
    out = Path(args.out)
    with joined(args.device) as device:
        chosen = _train_settings(args, out)
        check_folder(out)
        data = chosen.load_data()
        again = f"smart train --resume --out {shlex.quote(str(out))}"
        train_into(out, chosen, data, device, args, args.resume, again)


def train_into(
    out: Path,
    chosen: Settings,
    data: ImageData,
    device: torch.device,
    args: argparse.Namespace,
    resume: bool,
    again: str,
) -> None:
    """Trains in a run folder; of several processes only the one that leads writes and prints.

    Args:
        args: the flags that are no settings: overwrite, progress, tensorboard, and the command line.
        again: the command that goes on with it, if it is stopped.
    """
    leads = Share.current().leads
    model = chosen.create_model_for(data, device)
    # The settings must lie in the folder of a run from its first step on, and must not change those of another run.
    started = (out / "config.json").exists()
    if leads and (not started or args.overwrite):
        chosen.write(out)
    if leads:
        print(f"{data.name}: {_count(data)}; {chosen.model['model']} by {model.method}, {_alive(model)}")
    keep = resume, args.progress, args.overwrite, args.tensorboard
    try:
        result = train(model, data, chosen.config, out, *keep, command=args.command_line)
    except KeyboardInterrupt as error:
        raise Stopped(f"stopped; {out} keeps every finished epoch, go on with: {again}") from error
    if not leads:
        return
    best = result.best
    print(
        f"best epoch {best['epoch']} of {len(result.history)}, on the validation images: clean path "
        f"{100 * best['val_clean']:.1f} %, adv path under PGD-{chosen.config.val_attack_steps} "
        f"{100 * best['val_adv']:.1f} %"
    )
    say_written(result.best_path, result.last_path, result.log_path, out / settings.FILE_NAME)


def _train_settings(args: argparse.Namespace, out: Path) -> Settings:
    """The settings of the run: flags, before the file, before the defaults; a resumed run's file is its own."""
    file = args.config
    if args.resume and file is None and (out / settings.FILE_NAME).is_file():
        file = out / settings.FILE_NAME
    from_file = settings.read_file(file) if file is not None else {}
    Settings.resolve(from_file, f"{file}: ")
    return Settings.resolve({**from_file, **flags.given(args)})


def _count(data: ImageData) -> str:
    return ", ".join(f"{len(getattr(data, split)[0])} {split}" for split in ("train", "val", "test")) + " images"


def _alive(model: SmartNet) -> str:
    counts = nonzeros(model)
    parts = ", ".join(f"{key} {counts[key] / counts['dense']:.3f}" for key in ("clean", "adv", "union"))
    return f"{text.short(counts['dense'])} convolution weights, of which live: {parts}"
