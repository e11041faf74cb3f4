"""What masks a network is to have: every choice one word, checked as far as it can be before the network is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from smart.allocation import check_allocation
from smart.layer_policy import read_layers
from smart.masks import check_density, check_overlap
from smart_kernels import patterns
from smart_kernels.patterns import Pattern


@dataclass(frozen=True)
class MaskPlan:
    """The choices, as :func:`smart.convert` explains them."""

    density: dict[str, float]
    pattern: Pattern
    overlap: str | float
    allocation: str
    masked_layers: str | list[str]
    dedicated_layers: str | list[str]

    @classmethod
    def read(
        cls,
        density: float | Mapping[str, float] | None = None,
        pattern: str = "unstructured",
        overlap: str | float = "independent",
        allocation: str = "uniform",
        masked_layers: str | Sequence[str] = "all",
        dedicated_layers: str | Sequence[str] = "all",
    ) -> MaskPlan:
        """The plan of these choices.

        Raises:
            ValueError: an unknown word, or words that contradict one another.
            TypeError: a layer policy of another type.
        """
        parsed = patterns.parse(pattern)
        densities = check_density(density, parsed)
        checked = check_overlap(overlap, densities, parsed)
        check_allocation(allocation, parsed)
        masked, dedicated = (
            policy if isinstance(policy, str) else list(read_layers(policy, what))
            for policy, what in ((masked_layers, "masked_layers"), (dedicated_layers, "dedicated_layers"))
        )
        read_layers(masked, "masked_layers")
        read_layers(dedicated, "dedicated_layers")
        if masked == "none":
            raise ValueError("masked_layers is 'none': then there is nothing to learn, give 'all' or names of layers")
        if dedicated != "all":
            if checked == "shared":
                raise ValueError(
                    f"dedicated_layers is {dedicated!r} and overlap is 'shared': then no layer has a mask for "
                    "each path, choose another overlap, or leave dedicated_layers out"
                )
            if densities["clean"] != densities["adv"]:
                raise ValueError(
                    f"dedicated_layers is {dedicated!r} at densities {densities['clean']} and {densities['adv']}: the "
                    "other layers have one mask for both paths, so give one density"
                )
        return cls(densities, parsed, checked, allocation, masked, dedicated)

    def settings(self) -> dict[str, Any]:
        """Plain values, which :meth:`read` takes."""
        return {**vars(self), "pattern": str(self.pattern)}
