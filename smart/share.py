"""Several processes that train one network, each on its share of every batch, and what they must agree on.

Process r of n trains on the images r, r + n, r + 2n, ... of each batch. What is random is drawn for the whole batch by
every process, which then takes its share: so n processes train on the images, starts of attacks and lambdas that one
would. Gradients are averaged after the backward pass, in one message: an attacked image takes many passes for each
exchange of gradients, so hiding the one behind the other would gain little.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Share:
    """One of ``size`` processes, the one of number ``rank``."""

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> Share:
        """This process's, in torch's default process group; the whole where there is none."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    @property
    def leads(self) -> bool:
        """Whether it is the one that writes and shows."""
        return self.rank == 0

    def take(self, whole: Tensor) -> Tensor:
        """Its rows of those of a whole batch (N, ...)."""
        return whole[self.rank :: self.size]

    def draw(self, sample: Callable[[int], Tensor], count: int) -> Tensor:
        """Its ``count`` rows of a sample that all processes draw alike; ``sample`` takes the number of rows."""
        return self.take(sample(count * self.size))

    def check_batch(self, batch_size: int) -> None:
        """Raises ValueError unless each process gets as many images, an even number of them."""
        if self.size > 1 and batch_size % (2 * self.size):
            raise ValueError(
                f"batches have {batch_size} images and there are {self.size} processes: give a batch_size that is a "
                f"multiple of {2 * self.size}, so that each trains on as many, half of them clean and half attacked"
            )

    def average(self, tensors: Iterable[Tensor]) -> None:
        """Replaces tensors of one dtype by their means over the processes: by the same numbers on each."""
        tensors = list(tensors)
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(flat)
        flat /= self.size
        for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(mean.view(tensor.shape))

    def lead(self, work: Callable[[], _Result]) -> _Result:
        """Lets the first process work, and gives its result to all; an error is raised on all, too."""
        if self.size == 1:
            return work()
        outcome: list[Any] = [None, None]
        if self.leads:
            try:
                outcome[0] = work()
            except Exception as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def check_same(self, what: str, tensors: Sequence[Tensor], text: str = "") -> None:
        """Raises RuntimeError where ``what``, these tensors and this text, is not the same on all processes."""
        if self.size == 1:
            return
        digest = hashlib.sha256(text.encode())
        for tensor in tensors:
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        found: list[str | None] = [None] * self.size
        dist.all_gather_object(found, digest.hexdigest())
        if odd := [rank for rank, each in enumerate(found) if each != found[0]]:
            raise RuntimeError(
                f"{what} is not the same on all {self.size} processes, process {odd[0]} differs from process 0: start "
                "all with the same settings, data and model, on devices of one kind"
            )


WHOLE = Share()
