"""What every peer makes of a network: a call that runs it, in the fastest of the ways the peer has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from smart_kernels.timing import interleave, percentile

Call = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Ready:
    """A network made ready to run.

    Attributes:
        call: (N, C, H, W) of the example's shape -> the output, which may be overwritten by the next call.
        mode: how it runs, where there was a choice.
    """

    call: Call
    mode: str = ""


def fastest(choices: Mapping[str, Call], example: Tensor, budget_s: float = 0.5) -> Ready:
    """Of several ways to run one network, that with the smallest median of a short measurement in turns.

    Args:
        choices: mode -> call.
        budget_s: seconds for all of them; each runs at least four times, two of them untimed.
    """
    with torch.inference_mode():
        seconds = interleave(
            {mode: partial(call, example) for mode, call in choices.items()}, budget_s, min_rounds=2, max_rounds=50
        )
    mode = min(seconds, key=lambda mode: percentile(seconds[mode], 50))
    return Ready(choices[mode], mode)
