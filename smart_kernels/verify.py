"""Whether a swapped network still computes what the original does."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from smart_kernels import paths
from smart_kernels.model import SparseModel
from smart_kernels.settle import unwrapped

# Relative to the largest logit. Sums of some thousand products in another order, some dozen layers deep.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 3e-2, torch.bfloat16: 2e-1}


class VerificationError(AssertionError):
    """The swapped network's outputs differ from the original's by more than rounding explains."""


def verify(model: nn.Module, sparse: SparseModel, x: Tensor, tolerance: float | None = None) -> dict[str, float]:
    """Compares a swapped network with its original on a batch, path by path.

    Args:
        model: the original; run in eval mode, and left in the mode it was in.
        sparse: what :func:`smart_kernels.swap` made of it.
        x: (N, C, H, W); each network gets it in its own dtype.
        tolerance: the largest relative error accepted; by default that of the coarser of both networks' dtypes.

    Returns:
        path -> max |difference| / max |output|.

    Raises:
        TypeError: ``sparse`` is no swapped network.
        VerificationError: a path's error is above the tolerance, or not a number.
    """
    if not hasattr(sparse, "paths"):  # what is wrapped around a swapped network may be compared too
        check_swapped(sparse)
    model = unwrapped(model)
    dtype, original_dtype = _dtype(sparse), _dtype(model)
    if tolerance is None:
        tolerance = max(TOLERANCE.get(each, TOLERANCE[torch.float32]) for each in (dtype, original_dtype))
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            errors = {
                path: relative_error(sparse(x.to(dtype), path=path), run_original(model, x.to(original_dtype), path))
                for path in sparse.paths
            }
    finally:
        for module, mode in training.items():
            module.training = mode
    wrong = {path: error for path, error in errors.items() if not error <= tolerance}
    if wrong:
        listing = ", ".join(f"{path}: {error:.2e}" for path, error in wrong.items())
        raise VerificationError(
            f"the swapped network differs from the original by {listing}, where {tolerance:.0e} is accepted: "
            "see sparse.report() for the backends used, and please report it"
        )
    return errors


def check_swapped(sparse: object) -> None:
    """Raises TypeError unless it is a swapped network."""
    if not isinstance(sparse, SparseModel):
        raise TypeError(
            f"a {type(sparse).__name__} was given: a swapped network is needed, from smart_kernels.swap or load"
        )


def relative_error(actual: Any, expected: Any) -> float:
    """max |actual - expected| / max |expected|, the largest over all tensors of both outputs.

    Outputs are tensors, or tuples and dicts of them. Where both hold the same infinity or both NaN they agree; where
    only one does, the error is infinite. So it is if shapes or structures differ.
    """
    ours, structure = tree_flatten(actual)
    theirs, expected_structure = tree_flatten(expected)
    if structure != expected_structure:
        return math.inf
    return max((_leaf_error(a, b) for a, b in zip(ours, theirs, strict=True)), default=0.0)


def _leaf_error(actual: Any, expected: Any) -> float:
    if not isinstance(actual, Tensor) or not isinstance(expected, Tensor):
        return 0.0 if type(actual) is type(expected) and actual == expected else math.inf
    if actual.shape != expected.shape:
        return math.inf
    actual, expected = actual.double(), expected.double()
    differs = (actual != expected) & ~(actual.isnan() & expected.isnan())
    if not bool(differs.any()):
        return 0.0
    difference = (actual - expected)[differs].abs().max()
    if not bool(difference.isfinite()):
        return math.inf
    finite = expected[expected.isfinite()].abs()
    scale = float(finite.max()) if finite.numel() else 0.0
    return float(difference) / max(scale, torch.finfo(torch.float64).tiny)


def _dtype(module: nn.Module) -> torch.dtype:
    tensors = (*module.parameters(), *module.buffers())
    return next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), torch.float32)


def run_original(model: nn.Module, x: Tensor, path: str | float) -> Any:
    """Calls a network that may or may not know of paths."""
    if "path" in inspect.signature(model.forward).parameters:
        return model(x, path=path)
    with paths.running(path):
        return model(x)
