"""What both ways of building a swapped network share: planning layers, and the rows that tell of it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from smart_kernels import patterns
from smart_kernels.modules import SparseConv2d, SparseLinear
from smart_kernels.planner import Choice, DenseFallbackError, Planner
from smart_kernels.protocol import (
    as_conv_weight,
    geometry_of,
    has_zeros,
    is_conv,
    is_hooked,
    is_linear,
    masks_of,
    paths_of,
    stage_of,
    stages_of,
)
from smart_kernels.report import Row

ORIGINAL = "original"  # the backend, in rows of layers that were left as they were


class Builder:
    """Builds one network out of a private copy of the original, in eval mode and with settled weights."""

    def __init__(self, model: nn.Module, planner: Planner) -> None:
        self.model = model
        self.planner = planner
        self.paths = paths_of(model)
        self.stages = stages_of(model)
        self.rows: list[Row] = []
        self._choices: dict[nn.Module, Choice] = {}
        self._refused: dict[str, list[str]] = {}  # what strict planning has against layers -> which they are

    def replace(
        self,
        name: str,
        module: nn.Module,
        input_shape: torch.Size | None,
        scale: Mapping[str, Tensor] | None = None,
        bias: Mapping[str, Tensor] | None = None,
        relu: bool = False,
    ) -> SparseConv2d:
        """Makes the layer that takes the place of a convolution or fully connected layer, and its row.

        Args:
            name: of this use of the layer.
            input_shape: of what the original is given.
            scale, bias: (K,) of each path, of the whole epilogue: the layer's own bias is not added.
        """
        pad = None
        if getattr(module, "padding_mode", "zeros") != "zeros":
            pad = (tuple(module._reversed_padding_repeated_twice), module.padding_mode)
        cls = SparseLinear if is_linear(module) else SparseConv2d
        geometry, weight = geometry_of(module), as_conv_weight(module.weight.detach())
        masks = {path: as_conv_weight(mask) for path, mask in masks_of(module, self.paths).items()}
        shape = None if input_shape is None else cls.kernel_shape(input_shape, pad)
        first_use = module not in self._choices
        if first_use:
            self._choices[module] = self._choose(weight, masks, geometry, shape, name)
        choice = self._choices[module]
        self.rows.append(
            Row(
                name=name,
                pattern=str(patterns.describe(list(masks.values()))),
                weights=weight.numel(),
                density={path: choice.packed.density(path) for path in masks},
                backend=choice.backend,
                why=choice.why if first_use else f"{choice.why}; its weight is in memory already",
                bytes=choice.packed.nbytes if first_use else 0,
                dense_us=choice.dense_us,
                sparse_us=choice.sparse_us,
            )
        )
        layer = cls(choice.packed, geometry, choice.backend, scale, bias, relu, pad, input_shape=shape)
        layer.stage = stage_of(module)
        return layer

    def _choose(self, weight: Tensor, masks: Mapping[str, Tensor], *where: object) -> Choice:
        try:
            return self.planner.choose(weight, masks, *where)
        except DenseFallbackError as error:
            # Goes on, so that all refusals are told at once.
            name = where[-1]
            self._refuse(name, str(error).removeprefix(f"{name}: "))
            return Planner(measure=False).choose(weight, masks, *where)

    def own_bias(self, module: nn.Module) -> dict[str, Tensor] | None:
        """The layer's bias as an epilogue has it."""
        return None if module.bias is None else dict.fromkeys(self.paths, module.bias)

    def is_replaceable(self, name: str, module: nn.Module) -> bool:
        """Whether a layer can be replaced; if it holds zeros and cannot, its row says why.

        Fully connected layers without zeros are not worth it: they stay what they are, without a row.
        """
        why = None
        if is_conv(module) or (is_linear(module) and has_zeros(module, self.paths)):
            if not is_hooked(module):
                return True
            why = "it has forward hooks, which a fused kernel would skip"
        elif "quantized" in type(module).__module__:
            why = "it is quantized"
        elif isinstance(module, nn.modules.conv._ConvNd) and has_zeros(module, self.paths):
            kind = type(module).__name__ + (f" of {module.weight.dtype}" if module.weight.is_complex() else "")
            why = f"there are kernels for nn.Conv2d and nn.Linear as torch has them, not for this {kind}"
        weight = getattr(module, "weight", None)
        if why is not None and weight is not None and not any(row.name == name for row in self.rows):
            self.leave(name, module, why)
        return False

    def leave(self, name: str, module: nn.Module, why: str) -> None:
        """Writes the row of a layer that stays as it is."""
        weight = module.weight if isinstance(module.weight, Tensor) else module.weight()
        masks = masks_of(module, self.paths) if isinstance(module.weight, Tensor) else {}
        density = {path: float(mask.float().mean()) for path, mask in masks.items()} or dict.fromkeys(self.paths, 1.0)
        pattern = "unstructured" if min(density.values()) < 1 else "dense"
        if is_conv(module) or is_linear(module):
            pattern = str(patterns.describe([as_conv_weight(mask) for mask in masks.values()]))
        nbytes = weight.numel() * weight.element_size()
        self.rows.append(Row(name, pattern, weight.numel(), density, ORIGINAL, f"left as it was: {why}", nbytes))
        if min(density.values()) < 1:
            self._refuse(name, why)

    def _refuse(self, name: str, why: str) -> None:
        self._refused.setdefault(why, []).append(name)

    def check_refusals(self) -> None:
        """Raises DenseFallbackError if planning is strict and a layer with zeros would run densely."""
        if self.planner.strict and self._refused:
            reasons = (f"{', '.join(names)}: {why}" for why, names in self._refused.items())
            raise DenseFallbackError(
                f"strict=True, but these layers would run densely (drop strict, or change them): {'; '.join(reasons)}"
            )
