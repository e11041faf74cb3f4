"""A lambda for each image of a batch, which is what OAT trains by."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from smart.share import WHOLE, Share

# That OAT is trained at.
LAMBDAS = (0.0, 0.1, 0.2, 0.3, 0.4, 1.0)


@dataclass(frozen=True, eq=False)
class Lambdas:
    """A lambda for each image of a batch: a path that networks with FiLM layers take, and that OAT trains by.

    Attributes:
        values: (N,), float in [0, 1]; the images at 0 come first.
        clean: how many are at 0, known without asking the device.
    """

    values: Tensor
    clean: int

    def attacked(self) -> Lambdas:
        """Those above 0."""
        return Lambdas(self.values[self.clean :], 0)

    def checked(self, x: Tensor) -> Lambdas:
        """Raises ValueError unless there is one for each image of ``x``."""
        if self.values.shape != x.shape[:1]:
            raise ValueError(f"path holds {len(self.values)} lambdas: give one for each of the {len(x)} images")
        return self


def draw_lambdas(
    count: int, generator: torch.Generator, device: torch.device | str = "cpu", share: Share = WHOLE
) -> Lambdas:
    """A lambda for each image, as OAT's published code draws them: a sixth, rounded up, at 0; the others evenly from
    the rest of ``LAMBDAS``.

    Args:
        share: the whole batch, or the process's part of it that the images are; in each a sixth is at 0.
    """
    clean = -(-count // len(LAMBDAS))
    drawn = share.draw(lambda n: torch.randint(1, len(LAMBDAS), (n,), generator=generator), count - clean)
    values = torch.cat([torch.zeros(clean), torch.tensor(LAMBDAS)[drawn]])
    return Lambdas(values.to(device), clean)
