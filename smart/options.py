"""The command line of `smart`: its commands, their flags and defaults."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any, NoReturn

import torch

from smart import settings
from smart.evaluate import attack_steps
from smart.models import list_models
from smart.peers import ALL as ALL_PEERS
from smart.peers import PEERS
from smart.settings import ALL, DATA, MODEL, TRAINING, Setting
from smart.version import __version__
from smart_kernels.backends import BACKENDS
from smart_kernels.export import FORMATS
from smart_kernels.paths import PATHS, resolve

DTYPES = ("float32", "bfloat16", "float16")
CHECKPOINT_HELP = "a file that smart train wrote, such as runs/train/best.safetensors"
_METAVARS = {settings.whole: "N", settings.positive: "N", settings.number: "X", settings.share: "X"}
SHAPE_HELP = "random images of this shape instead of data"


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, instead of after a page of flags."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"smart: error: {message} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    """The parser of `smart`; the parsed ``command`` is the name of the command."""
    parser = Parser(
        prog="smart",
        description="Trains networks with two expert paths, clean and adversarial, and skips their zeros at inference.",
        epilog="Exit codes: 0 done, 1 failed, 2 wrong usage, 130 stopped by Ctrl-C.",
    )
    parser.add_argument("--version", action="version", version=f"smart {__version__}")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--traceback", action="store_true", help="on an error, show where in the code it arose")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add, name, summary in (
        (_train, "train", "train a two-path network"),
        (_eval, "eval", "accuracy of a checkpoint's paths, clean and attacked"),
        (_swap, "swap", "turn a checkpoint into a network that skips its zeros"),
        (_export, "export", "write a swapped network as a program that runs without its code"),
        (_verify, "verify", "compare a swapped network with its checkpoint, clean and attacked"),
        (_bench, "bench", "latency of a swapped network beside dense ones"),
        (_info, "info", "versions, this machine, and which backends load"),
        (_demo, "demo", "train, swap, verify and measure a small network on real images, in a few minutes"),
    ):
        description = f"{summary[0].upper()}{summary[1:]}."
        add(commands.add_parser(name, help=summary, description=description, parents=[common]))
    return parser


def _train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE", help="YAML file with settings by the names below; a flag beats it")
    parser.add_argument("--out", default="runs/train", help="run folder (default: %(default)s)")
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--resume", action="store_true", help="go on with the run in --out, with its own settings")
    start.add_argument("--overwrite", action="store_true", help="start anew if --out already holds a run")
    _progress(parser)
    _device(parser, "auto")
    for title, group in (("data", DATA), ("model", MODEL), ("training", TRAINING)):
        section = parser.add_argument_group(title)
        for name, setting in group.items():
            _add_setting(section, name, setting)


def _eval(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help=CHECKPOINT_HELP)
    _data(parser)
    parser.add_argument(
        "--attacks",
        nargs="+",
        type=_checked(_attack),
        default=["clean", "fgsm", "pgd20"],
        help="clean, fgsm, pgdN with N steps, squareN with N queries, a black box (default: clean fgsm pgd20)",
    )
    _paths(parser)
    parser.add_argument(
        "--lambdas", nargs="+", type=_checked(_lambda), default=[], help="positions of the dial, 0 clean to 1 adv"
    )
    _radius(parser)
    parser.add_argument("--restarts", type=_checked(settings.positive), default=1, help="of PGD (default: 1)")
    parser.add_argument(
        "--transfer", action="store_true", help="also show each configuration the images made against the others"
    )
    parser.add_argument("--limit", type=_checked(settings.positive), help="use only the first so many test images")
    parser.add_argument("--seed", type=_checked(settings.whole), default=0, help="of the attacks (default: 0)")
    parser.add_argument("--csv", metavar="FILE", help="write one row a number")
    parser.add_argument("--json", metavar="FILE", help="write the table and the settings")
    _progress(parser)
    _device(parser, "auto")


def _swap(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help=CHECKPOINT_HELP)
    parser.add_argument("--out", metavar="FILE", help="the swapped network, .safetensors; needed without --dry-run")
    parser.add_argument("--dry-run", action="store_true", help="show what would run where, and write nothing")
    parser.add_argument("--strict", action="store_true", help="fail if a layer with zeros would have to run densely")
    parser.add_argument(
        "--no-measure", action="store_true", help="choose backends by estimate instead of timing layers"
    )
    parser.add_argument("--timings", metavar="FILE", help="keep measured times in this file, and use those it has")
    _data(parser)
    _example_shape(parser)
    _batch(parser)
    _backend(parser)
    parser.add_argument("--dtype", choices=DTYPES, help="of weights and inputs (default: the checkpoint's)")
    _device(parser, "cpu")


def _export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help=f"{CHECKPOINT_HELP}, or one that smart swap wrote")
    parser.add_argument("--out", required=True, metavar="FILE", help="the program, .pt2 or .onnx")
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="pt2",
        help="pt2, a torch.export program; aoti, the same compiled for this machine; onnx, dense (default: pt2)",
    )
    parser.add_argument(
        "--path",
        type=_checked(_program_path),
        default="both",
        help="clean, adv, a lambda in [0, 1], or both: chosen at each call by a second input (default: both)",
    )
    parser.add_argument(
        "--fixed-batch", action="store_true", help="the program takes batches of the example's size only"
    )
    _data(parser)
    _example_shape(parser)
    _batch(parser)
    _backend(parser)
    _device(parser, "cpu")


def _verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help=CHECKPOINT_HELP)
    parser.add_argument("sparse", help="a file that smart swap wrote")
    _data(parser)
    _example_shape(parser)
    parser.add_argument(
        "--limit", type=_checked(settings.positive), default=256, help="test images to compare on (default: 256)"
    )
    parser.add_argument(
        "--tolerance",
        type=_checked(settings.number),
        help="largest relative error accepted (default: by dtype, 1e-4 for float32)",
    )
    attacks = parser.add_argument_group("attacks", "on labelled images; both networks must hold up alike")
    _radius(attacks)
    attacks.add_argument(
        "--steps",
        type=_checked(settings.positive),
        default=20,
        help="of PGD, through the checkpoint's gradients (default: 20)",
    )
    attacks.add_argument(
        "--queries",
        type=_checked(settings.whole),
        default=100,
        help="of the Square Attack on the swapped network itself; 0 leaves it out (default: 100)",
    )
    attacks.add_argument("--no-attacks", dest="attack", action="store_false", help="logits and predictions only")
    attacks.add_argument("--seed", type=_checked(settings.whole), default=0, help="of the attacks (default: 0)")
    parser.add_argument("--json", metavar="FILE", help="write the table and the settings")
    _progress(parser)
    _device(parser, "cpu")


def _bench(parser: argparse.ArgumentParser) -> None:
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
        _add_setting(parser, name, MODEL[name], "; for a model by name")
    parser.add_argument(
        "--image-shape",
        nargs=3,
        type=_checked(settings.positive),
        metavar=("C", "H", "W"),
        help="of random images (default: 3 32 32 for a model by name, the training data's for a checkpoint)",
    )
    parser.add_argument(
        "--batches", nargs="+", type=_checked(settings.positive), default=[1, 16], help="(default: 1 16)"
    )
    _paths(parser)
    parser.add_argument(
        "--peers",
        nargs="+",
        choices=(ALL_PEERS, *PEERS),
        metavar="PEER",
        help=f"dense ones to run against: {', '.join(PEERS)}, or all that are installed "
        "(default: eager; those of a suite)",
    )
    parser.add_argument("--threads", type=_checked(settings.positive), help="(default: torch's own choice)")
    parser.add_argument(
        "--budget",
        type=_checked(settings.number),
        metavar="SECONDS",
        help="for each batch size, both paths and all peers together (default: 2; that of a suite)",
    )
    _backend(parser)
    parser.add_argument("--json", metavar="FILE", help="write the rows with machine, versions and commit")
    parser.add_argument("--markdown", metavar="FILE", help="write them as a table")
    parser.add_argument("--plot", metavar="FILE", help="draw them as bars, a .png; needs matplotlib")
    _progress(parser)
    _device(parser, "cpu")


def _info(parser: argparse.ArgumentParser) -> None:
    """No flags of its own."""


def _demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", default="runs/demo", help="folder of the results (default: %(default)s)")
    parser.add_argument("--epochs", type=_checked(settings.positive), help="(default: as many as train well)")
    parser.add_argument("--seed", type=_checked(settings.whole), default=0, help="of everything random (default: 0)")
    parser.add_argument(
        "--density",
        type=_checked(settings.density),
        default=settings.density(MODEL["density"].default),
        help=f"{MODEL['density'].help} (default: {MODEL['density'].default})",
    )
    _progress(parser)


# ---- flags that several commands share ----


def _data(parser: argparse.ArgumentParser) -> None:
    section = parser.add_argument_group(
        "data", "by default the data that the checkpoint's run folder names, split alike"
    )
    for name, setting in DATA.items():
        _add_setting(section, name, setting, shown_default=False)


def _example_shape(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--example-shape", nargs=4, type=_checked(settings.positive), metavar=("N", "C", "H", "W"), help=SHAPE_HELP
    )


def _batch(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--batch", type=_checked(settings.positive), default=16, help="images of data to measure on (default: 16)"
    )


def _paths(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--paths", nargs="+", choices=PATHS, default=list(PATHS), help="(default: clean adv)")


def _radius(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--eps",
        type=_checked(settings.number),
        help="L-infinity radius on images in [0, 1] (default: that of the training)",
    )
    parser.add_argument("--step", type=_checked(settings.number), help="PGD step (default: eps / 4)")


def _backend(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--backend",
        choices=("auto", *BACKENDS),
        default="auto",
        help="auto takes the fastest for each layer (default: auto)",
    )


def _device(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "--device", type=_checked(_read_device), default=default, help="auto, cpu, cuda, cuda:1 (default: %(default)s)"
    )


def _progress(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--no-progress", dest="progress", action="store_false", help="show no progress bar")


def _add_setting(
    section: argparse._ActionsContainer, name: str, setting: Setting, note: str = "", shown_default: bool = True
) -> None:
    """A flag that is absent from the parsed arguments unless given, so that it can beat a file."""
    text = setting.help + note
    if shown_default and setting.default is not None:
        text += f" (default: {show(setting.default)})"
    options: dict[str, Any] = {"type": _checked(setting.read), "metavar": _METAVARS.get(setting.read, name.upper())}
    if isinstance(setting.default, bool):
        options = {"action": argparse.BooleanOptionalAction}
    section.add_argument(
        f"--{name.replace('_', '-')}", help=text.replace("%", "%%"), default=argparse.SUPPRESS, **options
    )


def given_settings(args: argparse.Namespace, group: Mapping[str, Setting] = ALL) -> dict[str, Any]:
    """The settings of ``group`` that flags named."""
    return {name: value for name, value in vars(args).items() if name in group}


def show(value: Any) -> str:
    """A value as one would type it: 8/255, not 0.031372549."""
    if not isinstance(value, float):
        return str(value).lower() if isinstance(value, bool) else str(value)
    levels = Fraction(value * 255).limit_denominator(1000)
    # Attack radii are customarily given in grey levels; 0.2, 51 of them, is hardly meant so.
    if levels.denominator == 1 and 0 < levels.numerator <= 16:
        return f"{levels.numerator}/255"
    return f"{value:g}"


def _checked(read: Callable[[str], Any]) -> Callable[[str], Any]:
    """``read`` as argparse wants it, so that its own words reach the user."""

    def read_flag(text: str) -> Any:
        try:
            return read(text)
        except (ValueError, TypeError) as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return read_flag


def _read_device(text: str) -> torch.device:
    found = torch.cuda.device_count()
    if text == "auto":
        return torch.device("cuda" if found else "cpu")
    try:
        device = torch.device(text)
    except RuntimeError as error:
        raise ValueError(f"unknown device {text!r}: accepted are auto, cpu, cuda, and cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device {text!r} is not supported: accepted are auto, cpu, cuda, and cuda:N")
    if device.type == "cuda" and (device.index or 0) >= found:
        raise ValueError(f"device {text!r} is not here: torch {torch.__version__} sees {found} GPUs, take cpu")
    return device


def _attack(text: str) -> str:
    attack_steps(text)
    return text


def _lambda(text: str) -> float:
    value = settings.number(text)
    resolve(value)
    return value


def _program_path(text: str) -> str | float:
    return text if text in ("both", *PATHS) else _lambda(text)
