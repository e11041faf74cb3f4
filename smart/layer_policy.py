"""Which layers of a network are meant: by one word, or by their names."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence

LAYER_WORDS = ("all", "none", "last_stages")
LAST = 2  # stages that "last_stages" means, as in the precursor of the method


def select_layers(
    policy: str | Sequence[str], stages: Mapping[str, int], stage_count: int, what: str = "layers"
) -> set[str]:
    """The layers that a policy means.

    Args:
        policy: ``"all"``, ``"none"``, ``"last_stages"`` (the last two), a name, a regular expression that matches whole
            names, or several of them.
        stages: the stage of each layer by name.
        stage_count: how many stages the network has, 0 if none.
        what: is chosen, for messages.

    Raises:
        ValueError: last stages of a network without two, an expression that is none or matches no layer.
    """
    chosen: set[str] = set()
    for word in read_layers(policy, what):
        if word == "all":
            chosen |= stages.keys()
        elif word == "last_stages":
            if stage_count < LAST:
                raise ValueError(
                    f"{what} is 'last_stages': this network has {stage_count} stages, give names of layers, or convert "
                    "it with stages=[...]"
                )
            chosen |= {name for name, stage in stages.items() if stage >= stage_count - LAST}
        elif word != "none":
            chosen |= _matching(word, stages, what)
    return chosen


def read_layers(policy: str | Sequence[str], what: str = "layers") -> list[str]:
    """The words of a policy, checked as far as they can be without a network.

    Raises:
        ValueError: no word, or one that is no regular expression.
        TypeError: neither text nor several.
    """
    words = [policy] if isinstance(policy, str) else policy
    if not isinstance(words, Sequence) or not all(isinstance(word, str) for word in words):
        raise TypeError(f"{what} is {policy!r}: give one of {', '.join(LAYER_WORDS)}, or names of layers")
    if not words or not all(words):
        raise ValueError(f"{what} is {policy!r}: give one of {', '.join(LAYER_WORDS)}, or names of layers")
    for word in words:
        try:
            re.compile(word)
        except re.error as error:
            raise ValueError(f"{what} is {word!r}, no regular expression: {error}") from error
    return list(words)


def _matching(word: str, names: Mapping[str, int], what: str) -> set[str]:
    matches = {name for name in names if re.fullmatch(word, name)}
    if not matches:
        close = difflib.get_close_matches(word, [*names, *LAYER_WORDS], n=1) or list(names)[:1]
        raise ValueError(
            f"{what} is {word!r}, which matches no layer that could be chosen: give {', '.join(LAYER_WORDS)}, or a "
            f"regular expression for whole names such as {close[0]!r}"
        )
    return matches
