"""Fair timing: candidates take turns in one loop, so that whatever else the machine does hits them alike."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

import torch

Name = TypeVar("Name", bound=Hashable)


def interleave(
    candidates: Mapping[Name, Callable[[], object]], budget_s: float, min_rounds: int = 5, max_rounds: int = 200
) -> dict[Name, list[float]]:
    """Times each candidate once a round, in a new random order each round, after two rounds of warm-up.

    Args:
        candidates: name -> call to time; on CUDA devices each call is followed by a synchronisation.
        budget_s: seconds after which no further round starts, once ``min_rounds`` are done.

    Returns:
        name -> seconds of each round.
    """
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    seconds: dict[Name, list[float]] = {name: [] for name in candidates}
    for _ in range(2):
        for call in candidates.values():
            call()
    synchronize()
    shuffle = random.Random(0)
    begin = time.perf_counter()
    for done in range(max_rounds):
        if done >= min_rounds and time.perf_counter() - begin > budget_s:
            break
        # What ran before leaves its data in the caches: no candidate may always follow the same other one.
        for name, call in shuffle.sample(list(candidates.items()), len(candidates)):
            start = time.perf_counter()
            call()
            synchronize()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def percentile(samples: list[float], percent: float) -> float:
    """The sample below which ``percent`` of them lie, interpolated."""
    return float(torch.quantile(torch.tensor(samples, dtype=torch.float64), percent / 100))
