"""Readers of settings, from the text of a flag or the value of a YAML key; what they refuse is a ValueError."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

from smart.attacks import check_eps
from smart.datasets import DATASETS
from smart.layer_policy import read_layers
from smart.masks import OVERLAPS, check_density
from smart.methods import find_method
from smart.models import list_models
from smart_kernels import patterns


def number(value: Any) -> float:
    """A float, also from a fraction such as ``"8/255"``."""
    try:
        return float(Fraction(value) if isinstance(value, str) else value)
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise ValueError(f"{value!r} is not a number: give one such as 0.1, 5e-4 or 8/255") from error


def radius(value: Any) -> float:
    """An attack's radius, a part of the [0, 1] range."""
    check_eps(number(value))
    return number(value)


def whole(value: Any) -> int:
    """An integer."""
    try:
        if isinstance(value, (bool, float)):
            raise TypeError
        return int(value)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{value!r} is not an integer: give one such as 3") from error


def source(value: Any) -> str:
    """Where data comes from; a path is made absolute, so that it also holds when read back from elsewhere."""
    return value if value in DATASETS else folder(value)


def folder(value: Any) -> str:
    """A path, made absolute."""
    return str(Path(str(value)).expanduser().absolute())


def positive(value: Any) -> int:
    """An integer of at least 1."""
    if whole(value) < 1:
        raise ValueError(f"{value!r} is below 1: give an integer of at least 1")
    return whole(value)


def share(value: Any) -> float:
    """A number in (0, 1)."""
    if not 0 < number(value) < 1:
        raise ValueError(f"{value!r} is outside (0, 1): give a part of the whole, such as 0.1")
    return number(value)


def density(value: Any) -> dict[str, float]:
    """The density of each path: ``"0.2"`` for both, or ``"0.3,0.1"`` for clean and adversarial."""
    if not isinstance(value, str):
        return check_density(value)
    parts = [number(part) for part in value.split(",")]
    if len(parts) > 2:
        raise ValueError(f"density is {value!r}: give one number, or two as in 0.3,0.1 for the clean and the adv path")
    return check_density({"clean": parts[0], "adv": parts[-1]})


def overlap(value: Any) -> str | float:
    """A way for masks to overlap by name, or a fraction; whether the densities allow it is checked with them."""
    if isinstance(value, str) and value not in ("free", *OVERLAPS):
        try:
            return number(value)
        except ValueError as error:
            raise ValueError(
                f"unknown overlap {value!r}: accepted are {', '.join(OVERLAPS)}, or a fraction in [0, 1]"
            ) from error
    return value


def layers(value: Any) -> str | list[str]:
    """A layer policy: a word or an expression, or a list of them."""
    words = read_layers(value)
    return value if isinstance(value, str) else words


def yes_or_no(value: Any) -> bool:
    """A bool."""
    if not isinstance(value, bool):
        raise ValueError(f"{value!r} is neither true nor false: give one of these")
    return value


def pattern(value: Any) -> str:
    """A sparsity pattern's spelling."""
    return str(patterns.parse(str(value)))


def method_name(value: Any) -> str:
    """A method of :mod:`smart.methods`."""
    find_method(value)
    return value


def model_name(value: Any) -> str:
    """A network of :func:`smart.list_models`."""
    if value not in list_models():
        raise ValueError(f"unknown model {value!r}: accepted are {', '.join(list_models())}")
    return value
