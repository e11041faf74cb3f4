"""``swap``: from a network with masks, or with zeros, to one that skips them."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin

from smart_kernels import fusion
from smart_kernels.graph_builder import GraphBuilder
from smart_kernels.model import SparseModel
from smart_kernels.module_builder import ModuleBuilder
from smart_kernels.planner import AUTO, Planner
from smart_kernels.protocol import has_zeros, is_conv, is_linear, paths_of
from smart_kernels.report import Report
from smart_kernels.settle import private_copy, settle, unwrapped
from smart_kernels.timings import SHARED, Timings
from smart_kernels.verify import VerificationError, run_original, verify


@overload
def swap(
    model: nn.Module,
    example: Tensor,
    backend: str = ...,
    dtype: torch.dtype | None = ...,
    *,
    dry_run: Literal[False] = ...,
    strict: bool = ...,
    measure: bool = ...,
    timings: Timings = ...,
) -> SparseModel: ...


@overload
def swap(
    model: nn.Module,
    example: Tensor,
    backend: str = ...,
    dtype: torch.dtype | None = ...,
    *,
    dry_run: Literal[True],
    strict: bool = ...,
    measure: bool = ...,
    timings: Timings = ...,
) -> Report: ...


def swap(
    model: nn.Module,
    example: Tensor,
    backend: str = AUTO,
    dtype: torch.dtype | None = None,
    *,
    dry_run: bool = False,
    strict: bool = False,
    measure: bool = True,
    timings: Timings = SHARED,
) -> SparseModel | Report:
    """Returns a new network for inference that skips the zeros of ``model``; ``model`` itself is untouched.

    Layers with ``.masks`` (as smart's) carry one mask a path; in a plain convolution or fully connected layer each zero
    weight counts as dropped, so networks pruned by other tools work too. Batch norms are folded, with the statistics
    they have now; pruning, parametrizations and weight norm become plain weights.

    Args:
        model: any network of one image batch (N, C, H, W); if it takes ``path=``, its paths are kept.
        example: a typical input, for shapes and for measuring; later inputs may differ in batch and size.
        backend: ``"auto"`` takes the fastest for each layer, dense included; a name takes that one where it can run.
        dtype: of weights and inputs of the new network; by default the model's own.
        dry_run: plan only, and return the report.
        strict: no layer with zeros may run densely, even where dense is faster; an error if one has to.
        measure: whether layers are timed to choose among backends; if not, estimates decide.
        timings: measured times to look up and add to; by default those of this process. ``Timings("times.json")``
            keeps them for later ones.

    Returns:
        The swapped network, or with ``dry_run`` the report of what it would be.

    Raises:
        TypeError, ValueError: ``model`` or ``example`` is not of the kind described, they do not fit each other, or
            there is nothing to swap.
        DenseFallbackError: with ``strict``, a layer with zeros has to run densely; it is a ValueError.
    """
    _check(model, example, dtype)
    planner = Planner(backend, strict, measure, timings)
    original = private_copy(unwrapped(model)).eval().requires_grad_(False)
    settle(original)
    _check_layers(original)
    if dtype is not None:
        original, example = original.to(dtype), example.to(dtype)
    _check_example(original, example)
    sparse = _build(original, example, planner)
    sparse.channels = example.shape[1]
    sparse.choose_way(example, planner)
    if sparse.runs_compact:
        verify(original, sparse, example)
    timings.save()
    return sparse.report() if dry_run else sparse


def _build(original: nn.Module, example: Tensor, planner: Planner) -> SparseModel:
    try:
        traced = fusion.capture(original, example)
    except Exception as error:
        reason = f"the network could not be captured as a graph ({type(error).__name__}: {error})".splitlines()[0]
    else:
        sparse = GraphBuilder(original, planner, traced).build()
        try:
            verify(original, sparse, example)
            return sparse
        except VerificationError as error:
            # A network may depend on the path, or on more than its layers, in ways that one path's graph cannot show.
            reason = f"captured as a graph it computed something else: {error}"
        except Exception as error:
            reason = f"captured as a graph it failed ({type(error).__name__}: {error})".splitlines()[0]

    def is_right(sparse: SparseModel) -> bool:
        try:
            verify(original, sparse, example)
        except Exception:
            return False
        return True

    return ModuleBuilder(private_copy(original), planner).build(example, reason, is_right)


def _check(model: nn.Module, example: Tensor, dtype: torch.dtype | None) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}: a torch.nn.Module is needed")
    if not isinstance(example, Tensor) or example.dim() != 4 or not example.is_floating_point():
        given = f"a {example.dtype} tensor {tuple(example.shape)}" if isinstance(example, Tensor) else type(example)
        raise TypeError(f"example is {given}: a float image batch (N, C, H, W) is needed")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype is {dtype!r}: a floating-point torch.dtype is needed, as torch.bfloat16, or None")
    if isinstance(model, SparseModel):
        raise TypeError("model is swapped already: sparse.replan(example) plans it for another input or machine")
    if isinstance(model, torch.jit.ScriptModule) or _is_exported(model):
        raise TypeError("model is a program that torch.jit or torch.export made: swap the network it was made from")
    if any(isinstance(tensor, UninitializedTensorMixin) for tensor in (*model.parameters(), *model.buffers())):
        raise ValueError("the model holds lazy layers that never ran: run it once, and train it, before it is swapped")
    if any(tensor.device.type == "meta" for tensor in (*model.parameters(), *model.buffers())):
        raise ValueError("the model's weights are on the meta device, so they have no values: load them first")
    if example.is_meta or not bool(example.isfinite().all()):
        held = "is on the meta device, so it has no values" if example.is_meta else "holds NaN or infinity"
        raise ValueError(
            f"example {held}: outputs could not be compared; give a typical input, or torch.rand of its shape"
        )


def _is_exported(model: nn.Module) -> bool:
    # What torch.export makes refuses eval(), which it says by an attribute of its own in place of the method.
    return "eval" in vars(model)


def _check_layers(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if why := getattr(module, "unswappable", None):
            raise ValueError(f"{name} cannot be swapped: {why}")
    paths = paths_of(model)
    if any(is_conv(m) or (is_linear(m) and has_zeros(m, paths)) for m in model.modules()):
        return
    if any("quantized" in type(m).__module__ for m in model.modules()):
        raise ValueError("the model's layers are quantized: swap the floating-point network it was made from")
    raise ValueError(
        "the model has no convolution that could be swapped, nn.Conv2d or a module with `.masks`, "
        "nor a fully connected layer with zeros"
    )


def _check_example(model: nn.Module, example: Tensor) -> None:
    try:
        with torch.no_grad():
            run_original(model, example, paths_of(model)[0])
    except Exception as error:
        given = f"{tuple(example.shape)}, {str(example.dtype).removeprefix('torch.')} on {example.device}"
        raise ValueError(f"the model does not accept the example, {given}: {type(error).__name__}: {error}") from error
