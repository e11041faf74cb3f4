"""Everything `smart train` can be told, by a flag or in a YAML file: one name, one reader, one help text each."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from smart.allocation import ALLOCATIONS
from smart.config import DIAL, LR_SCHEDULES, REWIRE_UNITS, TrainConfig
from smart.data import ImageData, load_data
from smart.datasets import DATASETS
from smart.layer_policy import LAYER_WORDS
from smart.layers import SmartNet
from smart.mask_plan import MaskPlan
from smart.masks import DEFAULT_DENSITY, OVERLAPS
from smart.methods import METHODS, check_dial, find_method, read_plan
from smart.models import create_model, list_models
from smart.numerics import AMP
from smart.readers import (
    density,
    folder,
    layers,
    method_name,
    model_name,
    number,
    overlap,
    pattern,
    positive,
    share,
    source,
    whole,
    yes_or_no,
)
from smart.rewire import METHODS as REWIRE
from smart.rewire import REDISTRIBUTE, SCHEDULES, check_method
from smart_kernels.files import write_text
from smart_kernels.patterns import SPELLINGS

FILE_NAME = "settings.yaml"


class UsageError(Exception):
    """What was asked for cannot be meant: an unknown setting, or a value outside its range."""


@dataclass(frozen=True)
class Setting:
    """How one setting is read and explained; ``choices`` are shown in --help, the reader refuses others."""

    read: Callable[[Any], Any]
    help: str
    default: Any = None


DATA: dict[str, Setting] = {
    "data": Setting(
        source, f"{', '.join(DATASETS)}; a folder with images in train/<class>/; or an .npz file", "digits"
    ),
    "data_root": Setting(folder, "folder that holds the published files of those data sets", "data"),
    "val_fraction": Setting(share, "part of the training images held out to choose the best epoch", 0.1),
    "test_fraction": Setting(
        share, "part of the training images held out to test on, if the data has no test split", 0.2
    ),
    "split_seed": Setting(whole, "seed of the splits that are drawn", 0),
    "image_size": Setting(positive, "resize the images of a folder to this side"),
}
MODEL: dict[str, Setting] = {
    "method": Setting(method_name, f"how to train, see docs/methods.md: {', '.join(METHODS)}", "smart"),
    "model": Setting(model_name, f"network: {', '.join(list_models())}", "tiny"),
    "density": Setting(
        density,
        "part of the masked layers' weights each path keeps, in (0, 1]; D or CLEAN,ADV "
        f"(default: {DEFAULT_DENSITY}; for N:M what it says)",
    ),
    "pattern": Setting(
        pattern,
        f"of the masks: {SPELLINGS}",
        "unstructured",
    ),
    "overlap": Setting(
        overlap, f"of the two masks, kept in training: {', '.join(OVERLAPS)} (or free), or a fraction", "independent"
    ),
    "allocation": Setting(str, f"how density is divided among layers: {', '.join(ALLOCATIONS)}", "uniform"),
    "masked_layers": Setting(
        layers, "layers that have masks: all, last_stages (the last two), or a regular expression for names", "all"
    ),
    "dedicated_layers": Setting(
        layers, f"those with a mask for each path, not one for both: {', '.join(LAYER_WORDS)}, or an expression", "all"
    ),
    "strict": Setting(
        yes_or_no, "fail where a layer's channels do not divide by the pattern, instead of warning", False
    ),
    "dropout": Setting(number, "between the convolutions of a wide ResNet's blocks", 0.0),
}
_PLAIN = ", ".join(name for name, each in DATASETS.items() if "flip" in each.training)
_TRAINING_HELP = {
    "epochs": "passes over the training images",
    "batch_size": "images a step",
    "lr": "learning rate of SGD",
    "momentum": "of SGD",
    "weight_decay": "of SGD",
    "lr_schedule": f"over the run: {', '.join(LR_SCHEDULES)}",
    "eps": "L-infinity radius of the attack in training, on images in [0, 1]",
    "attack_step": "step size of that attack",
    "attack_steps": "steps of that attack (PGD)",
    "val_attack_steps": "PGD steps of the check on the validation images after each epoch",
    "prune_rate": "part of a path's live weights pruned and regrown at the first rewiring",
    "prune_schedule": f"how that rate falls: {', '.join(SCHEDULES)}",
    "rewire": f"how masks learn: {', '.join(REWIRE)}",
    "redistribute": f"whether layers trade density, 'none' holds multiplications: {', '.join(REDISTRIBUTE)}",
    "rewire_every": "epochs, or steps, between rewirings",
    "rewire_unit": f"of that: {', '.join(REWIRE_UNITS)}",
    "rewire_until": "part of training after which masks stay",
    "dial": f"train the two paths alone, or every other step at a sampled lambda: {', '.join(DIAL)}",
    "trades_beta": "of the method trades: what the distance to attacked images weighs",
    "crop_padding": f"augmentation: shift images by up to so many pixels; none unless given for {_PLAIN}",
    "flip": f"augmentation: mirror every other image; not unless given for {_PLAIN}",
    "amp": f"precision of attacks and steps: {', '.join(AMP)}",
    "channels_last": "keep weights and images in memory with the channels last",
    "deterministic": "only operations that give the same numbers each time; can be slower on a GPU",
    "seed": "of the weights, the masks and everything random in training",
}
_READERS: dict[str, Callable[[Any], Any]] = {"int": whole, "float": number, "str": str, "bool": bool}
TRAINING: dict[str, Setting] = {
    each.name: Setting(_READERS[str(each.type)], _TRAINING_HELP[each.name], each.default)
    for each in dataclasses.fields(TrainConfig)
}
_PLAN = [each.name for each in dataclasses.fields(MaskPlan)]
ALL: dict[str, Setting] = {**DATA, **MODEL, **TRAINING}


@dataclass(frozen=True)
class Settings:
    """The resolved settings of a run: the values of ``DATA`` and ``MODEL`` by name, and the training config."""

    data: dict[str, Any]
    model: dict[str, Any]
    config: TrainConfig = field(default_factory=TrainConfig)

    @classmethod
    def resolve(cls, given: Mapping[str, Any], source: str = "") -> Settings:
        """Reads every value of ``given``, and takes the default of every setting that it leaves out.

        Args:
            source: where the values come from, for messages.

        Raises:
            UsageError: an unknown key, or a value that is not accepted.
        """
        for key in given:
            if key not in ALL:
                close = difflib.get_close_matches(str(key), ALL, n=1, cutoff=0.5)
                hint = f"did you mean {close[0]!r}?" if close else "smart train --help lists them"
                raise UsageError(f"{source}unknown setting {key!r}: {hint}")
        try:
            parts = [
                {key: _read(key, given.get(key, each.default)) for key, each in group.items()}
                for group in (DATA, MODEL)
            ]
            method = parts[1]["method"]
            plan = read_plan(method, {key: value for key, value in parts[1].items() if key in _PLAN})
            parts[1] |= plan.settings()
            named = DATASETS.get(parts[0]["data"])
            suited = named.training if named else {}
            config = TrainConfig.from_dict({**suited, **{key: each for key, each in given.items() if key in TRAINING}})
            check_method(config.rewire, config.redistribute, plan.pattern)
            check_dial(method, config.dial)
        except (ValueError, TypeError) as error:
            raise UsageError(f"{source}{error}") from error
        return cls(*parts, config)

    def write(self, folder: Path) -> Path:
        """Writes ``settings.yaml``, which ``--config`` takes."""
        file = folder / FILE_NAME
        write_text(file, yaml.safe_dump({**self.data, **self.model, **self.config.to_dict()}, sort_keys=False))
        return file

    def load_data(self) -> ImageData:
        """The data, split."""
        options = {key: value for key, value in self.data.items() if key not in ("data", "split_seed")}
        return load_data(self.data["data"], seed=self.data["split_seed"], **options)

    def create_model(self, num_classes: int, in_channels: int, **options: Any) -> SmartNet:
        """The network for such images.

        Raises:
            UsageError: settings that no network can be built with.
        """
        named = {key: value for key, value in self.model.items() if key != "model"}
        try:
            return create_model(
                self.model["model"], num_classes, in_channels, seed=self.config.seed, **named, **options
            )
        except ValueError as error:
            raise UsageError(str(error)) from error

    def create_model_for(self, data: ImageData, device: torch.device | str = "cpu") -> SmartNet:
        """The network for this data, which it normalises itself."""
        return self.create_model(data.num_classes, data.image_shape[0], mean=data.mean, std=data.std).to(device)


def for_method(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings ``given`` for some method as they are for another: without the choices that it does not have."""
    method = find_method(name)
    without = {"overlap"} if method.one_mask else set() if method.masks else set(_PLAN)
    if not method.dial:
        without.add("dial")
    return {**{key: value for key, value in given.items() if key not in without}, "method": name}


def read_file(file: str | Path) -> dict[str, Any]:
    """The settings in a YAML file, unread and unchecked.

    Raises:
        OSError: it cannot be opened.
        UsageError: it is not a YAML mapping.
    """
    try:
        content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{file} is not YAML: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UsageError(f"{file} holds a {type(content).__name__}: give one setting a line, such as 'epochs: 30'")
    return {str(key).replace("-", "_"): value for key, value in content.items()}


def _read(key: str, value: Any) -> Any:
    # A setting whose default is "not given" may also be given so, as null.
    if value is None and ALL[key].default is None:
        return None
    try:
        return ALL[key].read(value)
    except ValueError as error:
        message = str(error)
        raise ValueError(message if key in message else f"{key}: {message}") from error
