"""The hyper-parameters of a training run."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from smart.numerics import AMP
from smart.rewire import METHODS, REDISTRIBUTE, SCHEDULES, check_method
from smart_kernels.patterns import Unstructured

LR_SCHEDULES = ("cosine", "constant")
DIAL = ("ends", "sampled")
REWIRE_UNITS = ("epochs", "steps")


@dataclass(frozen=True)
class TrainConfig:
    """Everything that, with the model and the data, determines a run. The defaults are the published CIFAR-10 recipe.

    Attributes:
        epochs: passes over the training images.
        batch_size: images a step; how many of them are attacked is the method's choice.
        lr, momentum, weight_decay: of SGD.
        lr_schedule: ``"cosine"`` to zero over the run, step by step; or ``"constant"``.
        eps, attack_step, attack_steps: of the PGD attack in training; radius and step in units of the [0, 1] range.
        val_attack_steps: PGD steps of the check on the validation split after each epoch.
        rewire, redistribute, prune_rate, prune_schedule, rewire_until: how masks learn; ``method``, ``redistribute``,
            ``prune_rate``, ``schedule`` and ``until`` of :class:`smart.Rewirer`.
        rewire_every, rewire_unit: the time between two rewirings, in ``"epochs"`` (at their starts) or ``"steps"``.
        dial: ``"ends"``: each step trains the two paths by :func:`smart.smart_loss`; ``"sampled"``: every other step
            trains, by :func:`smart.dial_loss`, the dial at one lambda drawn evenly from (0, 1), at the same cost. In a
            run's log the losses and accuracies are then means over both kinds of steps.
        trades_beta: of the method ``"trades"``: what the distance to the attacked images weighs.
        crop_padding, flip: augmentation, see :func:`smart.data.batches`.
        amp: ``"bf16"``: attacks, steps and the check on the validation split run in bfloat16 where autocast does so;
            weights, gradients, rewiring and the optimizer stay in float32. ``"off"``: all is float32.
        channels_last: weights and images lie in memory with the channels last, which tensor cores like.
        deterministic: only operations that give the same numbers each time, see :func:`smart.numerics.deterministic`.
        seed: of everything random in training; the model has its own.

    Raises:
        ValueError: a value outside its range.
        TypeError: a value of another type.
    """

    epochs: int = 200
    batch_size: int = 128
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    lr_schedule: str = "cosine"
    eps: float = 8 / 255
    attack_step: float = 2 / 255
    attack_steps: int = 7
    val_attack_steps: int = 10
    prune_rate: float = 0.5
    prune_schedule: str = "linear"
    rewire: str = "sparse_momentum"
    redistribute: str = "auto"
    rewire_every: int = 1
    rewire_unit: str = "epochs"
    rewire_until: float = 1.0
    dial: str = "ends"
    trades_beta: float = 6.0
    crop_padding: int = 4
    flip: bool = True
    amp: str = "off"
    channels_last: bool = False
    deterministic: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            accepted = {"int": int, "float": (int, float), "str": str, "bool": bool}[str(field.type)]
            if not isinstance(value, accepted) or (isinstance(value, bool) and field.type != "bool"):
                raise TypeError(f"{field.name} is {value!r}: give a value of type {field.type}")
            if field.name in _RANGES and not _RANGES[field.name][0] <= value <= _RANGES[field.name][1]:
                low, high = _RANGES[field.name]
                raise ValueError(
                    f"{field.name} is {value}: it must lie between {low:g} and {high:g}{_hint(field.name, value)}"
                )
            if field.name in _CHOICES and value not in _CHOICES[field.name]:
                raise ValueError(f"{field.name} is {value!r}: accepted are {', '.join(_CHOICES[field.name])}")
        check_method(self.rewire, self.redistribute, Unstructured())

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON or YAML."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """The config of ``values``; keys left out keep their defaults.

        Numbers may be written as text, ``"8/255"`` or ``"5e-4"`` (which YAML reads as text).

        Raises:
            ValueError: an unknown key, or a value outside its range.
            TypeError: a value of another type.
        """
        types = {field.name: str(field.type) for field in dataclasses.fields(cls)}
        for key in values:
            if key not in types:
                close = difflib.get_close_matches(str(key), types, n=1, cutoff=0.5)
                hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(types)}"
                raise ValueError(f"unknown setting {key!r} of training: {hint}")
        return cls(**{key: _number(key, value) if types[key] == "float" else value for key, value in values.items()})


_RANGES: dict[str, tuple[float, float]] = {
    "epochs": (1, 1_000_000),
    # Batch norm needs two images in each half.
    "batch_size": (4, 1_000_000),
    "lr": (1e-12, 1e3),
    "momentum": (0, 0.9999),
    "weight_decay": (0, 1),
    "eps": (0, 1),
    "attack_step": (1e-12, 1),
    "attack_steps": (1, 10_000),
    "val_attack_steps": (1, 10_000),
    "prune_rate": (0, 0.99),
    "rewire_every": (1, 1_000_000_000),
    "rewire_until": (1e-12, 1),
    "trades_beta": (0, 1_000),
    "crop_padding": (0, 1_000),
    "seed": (0, 2**63 - 1),
}
_CHOICES: dict[str, Collection[str]] = {
    "lr_schedule": LR_SCHEDULES,
    "prune_schedule": SCHEDULES,
    "rewire": METHODS,
    "redistribute": REDISTRIBUTE,
    "rewire_unit": REWIRE_UNITS,
    "dial": DIAL,
    "amp": AMP,
}


def _hint(name: str, value: float) -> str:
    """What was probably meant by a radius in grey levels."""
    grey = name in ("eps", "attack_step") and 1 < value <= 255
    return f", a part of the [0, 1] range of pixels; did you mean {value:g}/255?" if grey else ""


def _number(key: str, value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return float(Fraction(value))
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{key} is {value!r}: give a number, such as 0.1, 5e-4 or 8/255") from error
