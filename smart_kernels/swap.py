"""``swap``: from a network with masks, or with zeros, to one that skips them."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import prune

from smart_kernels import fusion, patterns
from smart_kernels.geometry import Geometry
from smart_kernels.model import SparseModel
from smart_kernels.modules import PathAffine, SparseConv2d
from smart_kernels.paths import PATHS
from smart_kernels.planner import Choice, Planner
from smart_kernels.report import Row
from smart_kernels.verify import VerificationError, verify


def swap(model: nn.Module, example: Tensor, backend: str = "auto", dtype: torch.dtype | None = None) -> SparseModel:
    """Returns a new network for inference that skips the zeros of ``model``; ``model`` itself is untouched.

    Convolutions with ``.masks`` (as smart's) carry one mask a path; a plain convolution counts each zero weight as
    dropped, so networks pruned by other tools work too. Batch norms are folded, with the statistics they have now.

    Args:
        model: any network of one image batch (N, C, H, W); if it takes ``path=``, its paths are kept.
        example: a typical input, for shapes and for measuring; later inputs may differ in batch and size.
        backend: ``"auto"`` takes the fastest for each layer, dense included; a name takes that one where it can run.
        dtype: of weights and inputs of the new network; by default the model's own.

    Raises:
        TypeError, ValueError: ``model`` or ``example`` is not of the kind described, or ``model`` has no convolution.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}: a torch.nn.Module is needed")
    if not isinstance(example, Tensor) or example.dim() != 4 or not example.is_floating_point():
        given = (
            f"a {example.dtype} tensor {tuple(example.shape)}" if isinstance(example, Tensor) else repr(type(example))
        )
        raise TypeError(f"example is {given}: a float image batch (N, C, H, W) is needed")
    if not any(fusion.is_conv(module) for module in model.modules()):
        raise ValueError("the model has no convolution that could be swapped: nn.Conv2d, or a module with `.masks`")

    model = _private_copy(model).eval().requires_grad_(False)
    _settle_pruning(model)
    if dtype is not None:
        model, example = model.to(dtype), example.to(dtype)
    builder = _Builder(model, Planner(backend))
    try:
        traced = fusion.capture(model, example)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        return builder.module_by_module(example, f"the network could not be captured as a graph ({reason})")
    sparse = builder.graph(traced)
    try:
        verify(model, sparse, example)
    except VerificationError as error:
        # A network may depend on the path, or on more than its layers, in ways that a graph of one path cannot show.
        reason = f"captured as a graph it computed something else: {error}"
        return _Builder(model, Planner(backend)).module_by_module(example, reason)
    return sparse


class _Builder:
    """Builds the swapped network out of a private copy of the original."""

    def __init__(self, model: nn.Module, planner: Planner) -> None:
        self.model = model
        self.planner = planner
        self.paths = _paths_of(model)
        self.rows: list[Row] = []

    def graph(self, traced: fx.GraphModule) -> SparseModel:
        """Fuses the captured graph's chains, and drops what does nothing at inference.

        Dead code stays: it may write in place into what others read.
        """
        path = next(node for node in traced.graph.nodes if node.op == "placeholder" and node.target == fusion.PATH)
        modules = dict(traced.named_modules())
        for node in list(traced.graph.nodes):
            if fusion.is_inert(modules, node):
                node.replace_all_uses_with(node.args[0])
                traced.graph.erase_node(node)
        taken: set[str] = set()
        for node in list(traced.graph.nodes):
            if node.op != "call_module" or node.target not in modules:
                continue
            if fusion.is_conv(modules[node.target]) and self._swappable(node.target, modules[node.target]):
                self._fuse_conv(traced, modules, fusion.find_chain(traced, node), path, taken)
        for node in list(traced.graph.nodes):
            if node.op == "call_module" and node.target in modules and fusion.is_norm(modules[node.target]):
                self._replace_norm(traced, modules, node, path, taken)
        traced.delete_all_unused_submodules()
        traced.recompile()
        # A fresh GraphModule takes along only what the graph uses, under flat names.
        return SparseModel(fx.GraphModule(traced, traced.graph), self.paths, self.rows, takes_path=True)

    def module_by_module(self, example: Tensor, reason: str) -> SparseModel:
        """Replaces convolutions in place where no graph could be had; norms stay as they are."""
        takes_path = fusion.PATH in inspect.signature(self.model.forward).parameters
        shapes = _input_shapes(self.model, example)
        swapped: dict[nn.Module, SparseConv2d] = {}
        for name, module in list(self.model.named_modules(remove_duplicate=False)):
            if not fusion.is_conv(module) or not name or not self._swappable(name, module):
                continue
            if module not in swapped:
                bias = None if module.bias is None else dict.fromkeys(self.paths, module.bias)
                swapped[module] = _sparse_conv(module, self._plan(name, module, shapes.get(module)), None, bias)
            parent, _, attribute = name.rpartition(".")
            setattr(self.model.get_submodule(parent), attribute, swapped[module])
        return SparseModel(self.model, self.paths, self.rows, takes_path, uncaptured=reason)

    def _fuse_conv(
        self,
        traced: fx.GraphModule,
        modules: Mapping[str, nn.Module],
        chain: fusion.Chain,
        path: fx.Node,
        taken: set[str],
    ) -> None:
        conv = modules[chain.conv.target]
        scale, bias = None, None
        if conv.bias is not None:
            bias = dict.fromkeys(self.paths, conv.bias)
        if chain.norm is not None:
            scale, shift = fusion.norm_affine(modules[chain.norm.target], self.paths)
            bias = shift if bias is None else {p: shift[p] + bias[p] * scale[p] for p in self.paths}

        shape = chain.conv.args[0].meta["shape"]
        choice = self._plan(chain.conv.target, conv, shape)
        name = _fresh(chain.conv.target, taken)
        traced.add_submodule(name, _sparse_conv(conv, choice, scale, bias, chain.relu))
        with traced.graph.inserting_before(chain.last):
            arguments = (chain.conv.args[0], path) + ((chain.residual,) if chain.residual is not None else ())
            fused = traced.graph.call_module(name, arguments)
        fused.meta = dict(chain.last.meta)
        chain.last.replace_all_uses_with(fused)
        for node in reversed(chain.nodes):
            traced.graph.erase_node(node)

    def _replace_norm(
        self,
        traced: fx.GraphModule,
        modules: Mapping[str, nn.Module],
        node: fx.Node,
        path: fx.Node,
        taken: set[str],
    ) -> None:
        users = list(node.users)
        relu = len(users) == 1 and fusion.is_relu(modules, users[0])
        name = _fresh(node.target, taken)
        traced.add_submodule(name, PathAffine(*fusion.norm_affine(modules[node.target], self.paths), relu=relu))
        last = users[0] if relu else node
        # In the norm's own place: later, its input may have been written into.
        with traced.graph.inserting_before(node):
            affine = traced.graph.call_module(name, (node.args[0], path))
        last.replace_all_uses_with(affine)
        traced.graph.erase_node(last)
        if relu:
            traced.graph.erase_node(node)

    def _swappable(self, name: str, conv: nn.Module) -> bool:
        """False, with a row that says so, for a convolution whose hooks a fused kernel would skip."""
        if not (conv._forward_hooks or conv._forward_pre_hooks):
            return True
        masks = _masks_of(conv, self.paths)
        density = {path: float(mask.float().mean()) for path, mask in masks.items()}
        nbytes = conv.weight.numel() * conv.weight.element_size()
        why = "left as it was: it has forward hooks, which a fused kernel would skip"
        pattern = str(patterns.describe(list(masks.values())))
        self.rows.append(Row(name, pattern, conv.weight.numel(), density, "original", why, nbytes))
        return False

    def _plan(self, name: str, conv: nn.Module, input_shape: torch.Size | None) -> Choice:
        """Chooses the backend of one convolution and writes its row of the report."""
        masks = _masks_of(conv, self.paths)
        geometry = Geometry.of_module(conv)
        if input_shape is not None and conv.padding_mode != "zeros":
            left, right, top, bottom = conv._reversed_padding_repeated_twice
            n, c, h, w = input_shape
            input_shape = torch.Size((n, c, h + top + bottom, w + left + right))
        choice = self.planner.choose(conv.weight.detach(), masks, geometry, input_shape)
        self.rows.append(
            Row(
                name=name,
                pattern=str(patterns.describe(list(masks.values()))),
                weights=conv.weight.numel(),
                density={p: choice.packed.density(p) for p in masks},
                backend=choice.backend,
                why=choice.why,
                bytes=choice.packed.nbytes,
                dense_us=choice.dense_us,
                sparse_us=choice.sparse_us,
            )
        )
        return choice


def _sparse_conv(
    conv: nn.Module,
    choice: Choice,
    scale: Mapping[str, Tensor] | None,
    bias: Mapping[str, Tensor] | None,
    relu: bool = False,
) -> SparseConv2d:
    pad = None
    if conv.padding_mode != "zeros":
        pad = (tuple(conv._reversed_padding_repeated_twice), conv.padding_mode)
    return SparseConv2d(choice.packed, Geometry.of_module(conv), choice.backend, scale, bias, relu, pad)


def _paths_of(model: nn.Module) -> tuple[str, ...]:
    """The path names the model's masks and norms agree on; one path for a network that has neither."""
    found = {
        tuple(getattr(m, "masks", None) or m.norms)
        for m in model.modules()
        if hasattr(m, "masks") or hasattr(m, "norms")
    }
    if len(found) > 1:
        raise ValueError(f"modules of the model disagree on the paths' names: {sorted(found)}; all must have the same")
    return found.pop() if found else PATHS[:1]


def _masks_of(conv: nn.Module, paths: tuple[str, ...]) -> dict[str, Tensor]:
    if hasattr(conv, "masks"):
        return {path: conv.masks[path] for path in paths}
    return dict.fromkeys(paths, conv.weight.detach() != 0)


def _private_copy(model: nn.Module) -> nn.Module:
    """A deep copy, also of modules that keep a computed tensor as an attribute, as torch.nn.utils.prune's do."""
    attributes = (value for module in model.modules() for value in vars(module).values())
    computed = (value for value in attributes if isinstance(value, Tensor) and not value.is_leaf)
    return copy.deepcopy(model, {id(value): value.detach().clone() for value in computed})


def _settle_pruning(model: nn.Module) -> None:
    """Makes torch.nn.utils.prune's masks final: the weight it would compute before each forward becomes the weight."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and hasattr(module, "weight_orig") and hasattr(module, "weight_mask"):
            prune.remove(module, "weight")


def _input_shapes(model: nn.Module, example: Tensor) -> dict[nn.Module, torch.Size]:
    """Runs the example through the model and notes what shape each convolution is given (the last one it sees)."""
    shapes: dict[nn.Module, torch.Size] = {}
    convs = [module for module in model.modules() if fusion.is_conv(module)]
    hooks = [conv.register_forward_pre_hook(lambda m, inputs: shapes.update({m: inputs[0].shape})) for conv in convs]
    try:
        with torch.no_grad():
            model(example)
    finally:
        for hook in hooks:
            hook.remove()
    return shapes


def _fresh(name: str, taken: set[str]) -> str:
    """A module used twice in the graph becomes two, since each may be fused with something else."""
    candidate, n = name, 2
    while candidate in taken:
        candidate, n = f"{name}_{n}", n + 1
    taken.add(candidate)
    return candidate
