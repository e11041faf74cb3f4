"""cuDNN's convolutions that add bias and residual and rectify in one kernel, for dense weights on NVIDIA GPUs.

The operators are torch's own, ``aten::cudnn_convolution_relu`` and ``aten::cudnn_convolution_add_relu``, which its
compiler of frozen graphs uses. They know neither a scale nor a convolution without ReLU, have no gradient, and check no
shapes: what they do not fit runs as before, on ``torch.nn.functional.conv2d`` and what follows it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from smart_kernels.backends.base import Run, Verdict
from smart_kernels.geometry import Geometry

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def is_on_gpu(weight: Tensor) -> bool:
    """Whether a convolution of this weight is to be laid out for tensor cores, as it is bound.

    While a graph is traced it is not: its compiler fuses what follows, and no values are known.
    """
    return weight.is_cuda and not torch.compiler.is_compiling()


def available() -> Verdict:
    """Whether this torch has cuDNN and sees a GPU for it."""
    if torch.version.cuda is None or not torch.cuda.is_available():
        return Verdict(False, "cuDNN needs an NVIDIA GPU, and this torch sees none")
    if not torch.backends.cudnn.enabled or not torch.backends.cudnn.is_available():
        return Verdict(False, "cuDNN is missing, or was turned off by torch.backends.cudnn.enabled")
    return Verdict(True)


def applies(weight: Tensor, geometry: Geometry, relu: bool, second: bool) -> Verdict:
    """Whether cuDNN fuses what follows a convolution.

    Args:
        weight: (K, C/groups, R, S), its scale folded in.
        second: whether there is a second result.
    """
    if not is_on_gpu(weight):
        return Verdict(False, f"cuDNN runs on NVIDIA GPUs, not on {weight.device.type}")
    if not (verdict := available()):
        return verdict
    if weight.dtype not in DTYPES:
        name = str(weight.dtype).removeprefix("torch.")
        return Verdict(False, f"cuDNN's fused convolutions compute in float16, bfloat16 and float32, not in {name}")
    if not relu:
        return Verdict(False, "cuDNN's fused convolutions end with a ReLU")
    if second:
        return Verdict(False, "cuDNN's fused convolutions have one result")
    if geometry.groups > 1:
        return Verdict(False, f"cuDNN's fused convolutions are of one group, not of {geometry.groups}")
    top, bottom, left, right = geometry.padding
    if (top, left) != (bottom, right):
        return Verdict(False, f"cuDNN pads both sides alike, not by {geometry.padding}")
    return Verdict(True)


def bind(weight: Tensor, geometry: Geometry, bias: Tensor | None, plain: Run) -> Run:
    """relu(conv2d(x, weight) + bias + residual) in one kernel.

    Args:
        weight: (K, C, R, S), as :func:`applies` accepts it; in channels_last the whole call is.
        bias: (K,).
        plain: computes the same; it runs where gradients are followed, and for good if cuDNN has no kernel that fits.
    """
    # Without a bias the operators fill one with zeros at every call.
    bias = weight.new_zeros(geometry.weight_shape[0]) if bias is None else bias
    stride, dilation = list(geometry.stride), list(geometry.dilation)
    padding = [geometry.padding[0], geometry.padding[2]]
    fits: bool | None = None  # not yet known

    def run(x: Tensor, residual: Tensor | None) -> Tensor:
        nonlocal fits
        if fits is False or (x.requires_grad and torch.is_grad_enabled()):
            return plain(x, residual)
        _check(x, weight, geometry, residual)
        try:
            if residual is None:
                y = torch.ops.aten.cudnn_convolution_relu.default(x, weight, bias, stride, padding, dilation, 1)
            else:
                y = torch.ops.aten.cudnn_convolution_add_relu.default(
                    x, weight, residual, 1.0, bias, stride, padding, dilation, 1
                )
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            if fits:  # an error of another kind
                raise
            fits = False
            return plain(x, residual)
        fits = True
        return y

    return run


def _check(x: Tensor, weight: Tensor, geometry: Geometry, residual: Tensor | None) -> None:
    shape = geometry.output_shape(x.shape)
    if x.dtype != weight.dtype or x.device != weight.device:
        raise TypeError(f"input is {x.dtype} on {x.device}: {weight.dtype} on {weight.device} is needed, as the weight")
    if residual is not None and (tuple(residual.shape) != shape or residual.dtype != x.dtype):
        raise ValueError(f"residual is {residual.dtype} {tuple(residual.shape)}: {x.dtype} {shape} is needed")
