"""The words of rewiring: methods, schedules, and whether layers trade density. A new one is a line here."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from smart_kernels.patterns import NM, VNM, Channel, Pattern


@dataclass(frozen=True)
class Method:
    """How masks learn.

    Attributes:
        moves: whether they do.
        remembers: whether a running mean of gradients ranks what may regrow, or the last step's gradient alone.
        redistributes: whether layers trade density, unless told otherwise.
    """

    moves: bool = True
    remembers: bool = True
    redistributes: bool = True


METHODS: dict[str, Method] = {
    # Dettmers and Zettlemoyer, arXiv 1907.04840.
    "sparse_momentum": Method(),
    # Evci et al., arXiv 1911.11134.
    "rigl": Method(remembers=False, redistributes=False),
    "static": Method(moves=False, remembers=False, redistributes=False),
}

# What is left of the prune rate when a part, in [0, 1], of the time for rewiring is over.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": lambda progress: 1 - progress,
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    "constant": lambda progress: 1.0,
}

REDISTRIBUTE = ("auto", "momentum", "none")


def trades(pattern: Pattern) -> bool:
    """Whether layers can trade density under a pattern: N:M, V:N:M and channels keep each layer's."""
    return not isinstance(pattern, (NM, VNM, Channel))


def check_method(method: str, redistribute: str, pattern: Pattern) -> bool:
    """Returns whether layers trade density.

    Raises:
        ValueError: an unknown word, or words that contradict one another or the pattern.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method of rewiring {method!r}: accepted are {', '.join(METHODS)}")
    if redistribute not in REDISTRIBUTE:
        raise ValueError(f"redistribute is {redistribute!r}: accepted are {', '.join(REDISTRIBUTE)}")
    if redistribute == "momentum" and not METHODS[method].remembers:
        raise ValueError(
            f"redistribute is 'momentum' and rewire {method!r}, which keeps no momentum: take 'auto' or 'none', or "
            "rewire by 'sparse_momentum'"
        )
    if redistribute == "momentum" and not trades(pattern):
        raise ValueError(
            f"redistribute is 'momentum' and the pattern {pattern}, under which every layer keeps its density: take "
            "'auto' or 'none'"
        )
    return METHODS[method].redistributes and redistribute != "none" and trades(pattern)
