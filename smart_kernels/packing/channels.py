"""The channel format: output and input channels that are dropped whole are cut off; what is left is dense."""

from __future__ import annotations

import torch
from torch import Tensor

from smart_kernels.packing.per_path import PerPathWeight


def kept_channels(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Output channels (K_p,) and input channels (C_p,) that a mask (K, C, R, S) does not drop whole."""
    kept_out = torch.nonzero(mask.flatten(1).any(dim=1)).flatten()
    kept_in = torch.nonzero(mask.transpose(0, 1).flatten(1).any(dim=1)).flatten()
    return kept_out, kept_in


class ChannelWeight(PerPathWeight):
    """For each path the weight (K_p, C_p, R, S) of the channels it keeps, and which they are.

    Paths whose masks agree share them.
    """

    format = "channel"

    def _register(self, name: str, weight: Tensor, mask: Tensor) -> None:
        kept_out, kept_in = kept_channels(mask)
        self._register_weight(name, weight[kept_out[:, None], kept_in], mask[kept_out[:, None], kept_in])
        self.register_buffer(f"out_{name}", kept_out)
        self.register_buffer(f"in_{name}", kept_in)

    def kept(self, path: str | float) -> tuple[Tensor, Tensor, Tensor]:
        """A path's dense weight (K_p, C_p, R, S), its output channels (K_p,) and input channels (C_p,).

        A lambda strictly between 0 and 1 keeps the channels of both paths.
        """
        if isinstance(path, str):
            name = self._owner(path)
            return tuple(getattr(self, f"{kind}_{name}") for kind in ("weight", "out", "in"))
        mixed, parts = self.dense(path), [self.kept(name) for name in (self.paths[0], self.paths[-1])]
        kept_out, kept_in = (torch.cat([part[i] for part in parts]).unique() for i in (1, 2))
        return mixed[kept_out[:, None], kept_in], kept_out, kept_in

    def _dense(self, name: str) -> Tensor:
        weight, kept_out, kept_in = self.kept(name)
        dense = weight.new_zeros(self.shape)
        dense[kept_out[:, None], kept_in] = weight
        return dense

    def mask(self, path: str) -> Tensor:
        weight, kept_out, kept_in = self.kept(path)
        mask = torch.zeros(self.shape, dtype=torch.bool, device=weight.device)
        mask[kept_out[:, None], kept_in] = self._mask(self._owner(path))
        return mask

    def validate(self) -> None:
        for name in self.owners:
            weight, kept_out, kept_in = self.kept(name)
            for kept, channels in ((kept_out, self.shape[0]), (kept_in, self.shape[1])):
                if not _ascends(kept, channels):
                    raise ValueError(
                        f"kept channels must ascend within 0..{channels - 1}: the packed weight is corrupt"
                    )
            shape = (len(kept_out), len(kept_in), *self.shape[2:])
            if tuple(weight.shape) != shape:
                raise ValueError(f"the kept weight has shape {tuple(weight.shape)}: {shape} is needed")
            part = getattr(self, f"mask_{name}")
            if part is not None and (part.shape != weight.shape or part.dtype != torch.bool):
                raise ValueError(f"the kept mask has shape {tuple(part.shape)}: bool {shape} is needed")

    def disable(self) -> None:
        # An index that no channel has: every way of using it fails.
        for name, buffer in self.named_buffers():
            if name.startswith(("out_", "in_")):
                buffer.fill_(torch.iinfo(buffer.dtype).max)


def _ascends(kept: Tensor, channels: int) -> bool:
    if kept.dim() != 1 or kept.dtype != torch.long:
        return False
    inside = not kept.numel() or (int(kept[0]) >= 0 and int(kept[-1]) < channels)
    return inside and bool((kept.diff() > 0).all())
