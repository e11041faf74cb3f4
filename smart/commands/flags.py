"""Flags that several commands share, and how the text of a flag is read."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch

from smart import readers
from smart.named_attacks import check_attack
from smart.settings import ALL, DATA, MODEL, TRAINING, Setting
from smart.text import show
from smart_kernels.backends import BACKENDS
from smart_kernels.paths import PATHS, resolve

CHECKPOINT = "a file that smart train wrote, such as runs/train/best.safetensors"
ATTACKS = (
    "clean; fgsm; pgdN with N steps, pgdN-cw, -dlr or -kl with another loss; squareN with N queries, a black box; "
    "autoattack, or apgd-ce, apgd-t, fab-t of it"
)
DTYPES = ("float32", "bfloat16", "float16")
_METAVARS = {readers.whole: "N", readers.positive: "N", readers.number: "X", readers.radius: "X", readers.share: "X"}


def data(parser: argparse.ArgumentParser) -> None:
    section = parser.add_argument_group(
        "data", "by default the data that the checkpoint's run folder names, split alike"
    )
    for name, setting in DATA.items():
        add_setting(section, name, setting, shown_default=False)


def config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE", help="YAML file with settings by the names below; a flag beats it")


def settings(parser: argparse.ArgumentParser, left_out: Collection[str] = ()) -> None:
    """A flag for every setting of a training but those ``left_out``."""
    for title, group in (("data", DATA), ("model", MODEL), ("training", TRAINING)):
        section = parser.add_argument_group(title)
        for name, setting in group.items():
            if name not in left_out:
                add_setting(section, name, setting)


def attacks(parser: argparse._ActionsContainer, *default: str) -> None:
    shown = " ".join(default)
    parser.add_argument(
        "--attacks", nargs="+", type=checked(attack), default=list(default), help=f"{ATTACKS} (default: {shown})"
    )


def example_shape(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--example-shape",
        nargs=4,
        type=checked(readers.positive),
        metavar=("N", "C", "H", "W"),
        help="random images of this shape instead of data",
    )


def batch(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--batch", type=checked(readers.positive), default=16, help="images of data to measure on (default: 16)"
    )


def paths(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--paths", nargs="+", choices=PATHS, default=list(PATHS), help="(default: clean adv)")


def lambdas(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--lambdas", nargs="+", type=checked(dial), default=[], help="positions of the dial, 0 clean to 1 adv"
    )


def radius(parser: argparse._ActionsContainer) -> None:
    eps(parser)
    parser.add_argument("--step", type=checked(readers.number), help="PGD step (default: eps / 4)")


def eps(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--eps",
        type=checked(readers.radius),
        help="L-infinity radius on images in [0, 1] (default: that of the training)",
    )


def number(parser: argparse._ActionsContainer, name: str, default: int | None, text: str) -> None:
    """A flag for an integer of at least 1."""
    shown = "" if default is None else f" (default: {default})"
    parser.add_argument(name, type=checked(readers.positive), default=default, help=text + shown)


def one_attack(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--attack", type=checked(attack), default="pgd20", help=f"{ATTACKS} (default: pgd20)")


def effort(parser: argparse._ActionsContainer, limit: int | None = None) -> None:
    """How long attacks try, on how many images, from which seed."""
    number(parser, "--restarts", 1, "of PGD")
    number(parser, "--limit", limit, "use only the first so many test images")
    seed(parser)


def outputs(parser: argparse._ActionsContainer, **texts: str) -> None:
    """Flags for files to write: csv, json, markdown, plot; ``texts`` say what each gets."""
    for name, text in texts.items():
        drawn = ", a .png; needs matplotlib" if name == "plot" else ""
        parser.add_argument(f"--{name}", metavar="FILE", help=text + drawn)


def seed(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--seed", type=checked(readers.whole), default=0, help="of the attacks (default: 0)")


def backend(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--backend",
        choices=("auto", *BACKENDS),
        default="auto",
        help="auto takes the fastest for each layer (default: auto)",
    )


def dtype(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=DTYPES, help="of weights and inputs (default: the network's, float32)")


def device(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "--device", type=checked(_read_device), default=default, help="auto, cpu, cuda, cuda:1 (default: %(default)s)"
    )


def progress(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--no-progress", dest="progress", action="store_false", help="show no progress bar")


def add_setting(
    section: argparse._ActionsContainer, name: str, setting: Setting, note: str = "", shown_default: bool = True
) -> None:
    """A flag that is absent from the parsed arguments unless given, so that it can beat a file."""
    text = setting.help + note
    if shown_default and setting.default is not None:
        text += f" (default: {show(setting.default)})"
    options: dict[str, Any] = {"type": checked(setting.read), "metavar": _METAVARS.get(setting.read, name.upper())}
    if isinstance(setting.default, bool):
        options = {"action": argparse.BooleanOptionalAction}
    section.add_argument(
        f"--{name.replace('_', '-')}", help=text.replace("%", "%%"), default=argparse.SUPPRESS, **options
    )


def given(args: argparse.Namespace, group: Mapping[str, Setting] = ALL) -> dict[str, Any]:
    """The settings of ``group`` that flags named."""
    return {name: value for name, value in vars(args).items() if name in group}


def checked(read: Callable[[str], Any]) -> Callable[[str], Any]:
    """``read`` as argparse wants it, so that its own words reach the user."""

    def read_flag(text: str) -> Any:
        try:
            return read(text)
        except (ValueError, TypeError, ImportError) as error:
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


def attack(text: str) -> str:
    """The name of an attack, once it is known to be one."""
    check_attack(text)
    return text


def dial(text: str) -> float:
    """A lambda in [0, 1]."""
    value = readers.number(text)
    resolve(value)
    return value
