"""What commands share: the data that arguments mean, and checks before and words after the work."""

from __future__ import annotations

import tempfile
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smart import plots, settings
from smart.commands import flags
from smart.data import ImageData
from smart.layers import SmartNet
from smart.settings import Settings, UsageError

DEFAULT_EPS = 8 / 255


class Stopped(Exception):
    """Ctrl-C came; the message says how to go on."""


def data_for(args: Namespace, model: SmartNet, instead: str = "--data") -> ImageData:
    """The data that flags name, or that the settings beside the checkpoint name: split as it was for training."""
    given = flags.given(args, settings.DATA)
    beside = Path(args.checkpoint).parent / settings.FILE_NAME
    from_run = settings.read_file(beside) if beside.is_file() else {}
    if "data" not in given and not from_run:
        raise UsageError(f"there is no {beside} to say which data {args.checkpoint} was trained on: give {instead}")
    if "data" in given and given["data"] != from_run.get("data"):
        from_run = {}
    data = Settings.resolve({**from_run, **given}, f"{beside}: ").load_data()
    classes = model.spec["num_classes"]
    if data.num_classes > classes or data.image_shape[0] != model.in_channels:
        raise ValueError(
            f"{data.name} has {data.num_classes} classes and images of {data.image_shape[0]} channels: "
            f"{args.checkpoint} is for {classes} classes and {model.in_channels} channels"
        )
    return data


def example_images(args: Namespace, model: SmartNet, count: int) -> Tensor:
    """Test images (N, C, H, W), at most ``count``; random ones if a shape was given."""
    if args.example_shape:
        images = random_images(args.example_shape)
    else:
        images = data_for(args, model, "--data or --example-shape").floats("test", count)
    return accepted(model, images.to(args.device))


def random_images(shape: Sequence[int]) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


def accepted(model: SmartNet, images: Tensor) -> Tensor:
    """``images``, once the model itself has accepted them: its words are the clearest."""
    with torch.no_grad():
        model(images[:1])
    return images


def attack_eps(args: Namespace, metadata: Mapping[str, Any]) -> float:
    """The attacks' radius: the flag's, or that of the training."""
    return args.eps if args.eps is not None else metadata.get("config", {}).get("eps", DEFAULT_EPS)


def check_folder(folder: Path) -> None:
    """Raises OSError unless files can be put into the folder, which is made if it is missing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"cannot write into {folder} ({error.strerror}): give a folder that you may write to") from error


def check_file(file: str | Path | None) -> None:
    """Raises OSError unless a file of that name can be written."""
    if file is None:
        return
    if Path(file).is_dir():
        raise IsADirectoryError(f"{file} is a folder: give the name of a file to write")
    check_folder(Path(file).parent)


def check_outputs(args: Namespace) -> None:
    """Raises OSError or UsageError unless the files of :func:`smart.commands.flags.outputs` can be written."""
    for name in ("csv", "json", "markdown", "plot"):
        check_file(getattr(args, name, None))
    check_plot(getattr(args, "plot", None))


def check_plot(file: str | None) -> None:
    """Raises UsageError unless a picture can be drawn into a file of that name."""
    if file is None:
        return
    if why := plots.missing():
        raise UsageError(f"--plot draws nothing: {why}")
    if Path(file).suffix.lower() != ".png":
        raise UsageError(f"--plot is {file!r}: pictures are .png files, give such a name")


def say_errors(errors: dict[str, float], x: Tensor) -> None:
    listing = ", ".join(f"{path} {error:.1e}" for path, error in errors.items())
    print(f"largest relative error on {len(x)} images: {listing}")


def say_written(*files: Any) -> None:
    if written := [str(file) for file in files if file]:
        print(f"written: {', '.join(written)}")
