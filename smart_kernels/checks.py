"""Checks of data that came out of a file: anything may be in there, and nothing may be believed."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any


def record(value: object, keys: Sequence[str], what: str) -> tuple[Any, ...]:
    """The values of a dict in the order of ``keys``.

    Raises:
        ValueError: it is no dict, or has other keys.
    """
    if not isinstance(value, dict):
        raise ValueError(f"{what} is a {type(value).__name__}: an object with {', '.join(keys)} is needed")
    if value.keys() != set(keys):
        raise ValueError(f"{what} has the keys {sorted(map(str, value))}: {sorted(keys)} are needed")
    return tuple(value[key] for key in keys)


def integers(value: object, count: int, low: int, high: int, what: str) -> tuple[int, ...]:
    """A list of so many integers, as a tuple.

    Raises:
        ValueError: it is none, or one of them is not within ``low`` and ``high``.
    """
    if not isinstance(value, list) or len(value) != count or not all(fits(each, int) for each in value):
        raise ValueError(f"{what} is {shown(value)}: a list of {count} integers is needed")
    if not all(low <= each <= high for each in value):
        raise ValueError(f"{what} is {shown(value)}: each must lie within {low} and {high}")
    return tuple(value)


def typed(value: object, hint: Any, what: str) -> Any:
    """The value itself.

    Raises:
        ValueError: it is not of the type.
    """
    if not fits(value, hint):
        raise ValueError(f"{what} is {shown(value)}: {getattr(hint, '__name__', hint)} is needed")
    return value


def fits(value: object, hint: Any) -> bool:
    """Whether a value is of a type: int, float, str, bool, None, lists and dicts of those, unions of all."""
    origin, parameters = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, each) for each in parameters)
    if origin is dict:
        return isinstance(value, Mapping) and all(
            fits(k, parameters[0]) and fits(v, parameters[1]) for k, v in value.items()
        )
    if origin is list:
        return isinstance(value, list) and all(fits(each, parameters[0]) for each in value)
    if hint is float:
        return type(value) in (int, float)
    return value is None if hint in (None, type(None)) else type(value) is hint


def shown(value: object) -> str:
    """A value in an error message, which a hostile file must not fill with megabytes."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."
