"""What every packed weight can do, whatever its format."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn


class PackedWeight(nn.Module, ABC):
    """One weight (K, C/groups, R, S) and the masks of one or two paths over it, laid out for some kernel.

    It is a module only so that its buffers move, copy and save with the network it belongs to.

    Attributes:
        format: the name ``pack(format=...)`` takes.
        kernels_on: the only type of device that has kernels for it; None if all have some.
        kernel_dtypes: the only types of weights that these kernels take; None if all.
        shape: (K, C/groups, R, S).
        paths: names of the paths, in the order of the masks given.
        disabled: whether corrupt data was loaded into it, in formats whose kernels could not bear that.
    """

    format: ClassVar[str]
    kernels_on: ClassVar[str | None] = None
    kernel_dtypes: ClassVar[tuple[torch.dtype, ...] | None] = None
    disabled: bool = False

    def __init__(self, shape: tuple[int, ...], paths: tuple[str, ...]) -> None:
        super().__init__()
        self.shape = shape
        self.paths = paths
        self.register_load_state_dict_post_hook(_validate_loaded)

    @classmethod
    def of(cls, weight: Tensor, masks: Mapping[str, Tensor], groups: int = 1) -> PackedWeight:
        """Packs the weight of a convolution of so many groups, which most formats need not know.

        Raises:
            ValueError, TypeError: it cannot be packed.
        """
        return cls(weight, masks)

    @classmethod
    def has_kernels(cls, device: torch.device, dtype: torch.dtype, groups: int = 1) -> bool:
        """Whether kernels read this format there, for convolutions of so many groups with weights of this type."""
        return cls.kernels_on in (None, device.type) and (cls.kernel_dtypes is None or dtype in cls.kernel_dtypes)

    @abstractmethod
    def dense(self, path: str | float) -> Tensor:
        """The weight of a path, (K, C/groups, R, S): exactly ``weight * mask``, every zero positive.

        A lambda strictly between 0 and 1 gives ``weight * ((1 - lambda) * first mask + lambda * second mask)``.
        """

    @abstractmethod
    def mask(self, path: str) -> Tensor:
        """The bool mask (K, C/groups, R, S) of a path, as given."""

    @abstractmethod
    def validate(self) -> None:
        """Raises ValueError unless every index lies in range, so that no kernel can read out of bounds."""

    def unpack(self) -> tuple[Tensor, dict[str, Tensor]]:
        """A weight (K, C/groups, R, S) and the masks from which the same packed weight is made."""
        masks = {path: self.mask(path) for path in self.paths}
        weight = self.dense(self.paths[0])
        if len(masks) > 1:
            weight = torch.where(masks[self.paths[0]], weight, self.dense(self.paths[-1]))
        return weight, masks

    def check_state(self, state: Mapping[str, Tensor]) -> None:
        """Raises ValueError unless these buffers, by name, could take the place of its own."""
        for name, tensor in state.items():
            if tensor.shape != self._buffers[name].shape:
                raise ValueError(
                    f"{name} has shape {tuple(tensor.shape)}, not {tuple(self._buffers[name].shape)}: it is of other "
                    "masks; swap the network that has them, or use smart_kernels.save and load"
                )
        trial = copy.copy(self)
        trial._buffers = {**self._buffers, **state}
        trial.validate()

    def disable(self) -> None:
        """Makes the weight refuse to run, after corrupt data was loaded into it."""

    @property
    def nbytes(self) -> int:
        """Bytes held in memory for all paths together."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers())

    def nonzeros(self, path: str) -> int:
        """Weights that the path's mask keeps."""
        return int(self.mask(path).sum())

    def density(self, path: str) -> float:
        """The share of weights that the path's mask keeps."""
        return self.nonzeros(path) / torch.Size(self.shape).numel()

    def extra_repr(self) -> str:
        return f"shape={tuple(self.shape)}, paths={self.paths}, bytes={self.nbytes}"


def _validate_loaded(packed: PackedWeight, incompatible_keys: object) -> None:
    try:
        packed.validate()
    except ValueError:
        packed.disable()  # the corrupt data is in place already: whoever catches the error must not run on it
        raise


def check_masked_weight(weight: Tensor, masks: Mapping[str, Tensor]) -> None:
    """Raises ValueError or TypeError unless ``weight`` and ``masks`` can be packed."""
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight is a {type(weight).__name__}: a tensor (K, C/groups, R, S) is needed")
    if weight.is_meta or weight.layout != torch.strided:
        raise TypeError(f"weight is a {weight.layout} tensor on {weight.device}: a strided one with values is needed")
    if not isinstance(masks, Mapping) or not all(isinstance(mask, Tensor) for mask in masks.values()):
        given = type(masks).__name__ if not isinstance(masks, Mapping) else "dict of other things than tensors"
        raise TypeError(f"masks is a {given}: a dict is needed, the name of each path -> its bool mask")
    if weight.dim() != 4 or weight.numel() == 0:
        raise ValueError(f"weight has shape {tuple(weight.shape)}: (K, C/groups, R, S) is needed, none of them 0")
    if not weight.is_floating_point():
        raise TypeError(f"weight has dtype {weight.dtype}: a floating-point dtype is needed")
    if not 1 <= len(masks) <= 2:
        raise ValueError(f"{len(masks)} masks were given: one or two paths can be packed")
    for name, mask in masks.items():
        if mask.dtype != torch.bool:
            raise TypeError(f"mask {name!r} has dtype {mask.dtype}: bool is needed, for instance `mask.bool()`")
        if mask.shape != weight.shape:
            raise ValueError(
                f"mask {name!r} has shape {tuple(mask.shape)}: the weight's {tuple(weight.shape)} is needed"
            )
        if not torch.isfinite(weight[mask]).all():
            raise ValueError(f"the weight holds NaN or infinity where mask {name!r} keeps it: mend it before packing")
