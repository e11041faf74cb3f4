"""Other forms of a swapped network: a path's dense twin in plain torch layers, and a network of that path alone."""

from __future__ import annotations

import copy
import operator

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from smart_kernels import fusion, paths
from smart_kernels.backends import find
from smart_kernels.model import SparseModel
from smart_kernels.modules import PathAffine, PerPathTensors, SparseConv2d, SparseLinear
from smart_kernels.packing import PackedWeight
from smart_kernels.protocol import is_hooked, reads_path, stage_of
from smart_kernels.verify import check_swapped

_PADDINGS = {"reflect": nn.ReflectionPad2d, "replicate": nn.ReplicationPad2d, "circular": nn.CircularPad2d}


class DenseTwin(nn.Module):
    """One path of a swapped network in plain torch layers, which gradients flow through; see :func:`dense_twin`."""

    def __init__(self, net: nn.Module, path: paths.Path, takes_path: bool) -> None:
        super().__init__()
        self.net = net
        self.path = path
        self._takes_path = takes_path
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> object:
        """(N, C, H, W) -> what the swapped network returns on this path."""
        # Layers that the swap left as they were read the path from here.
        with paths.running(self.path):
            return self.net(x, path=self.path) if self._takes_path else self.net(x)

    def train(self, mode: bool = True) -> DenseTwin:
        """Stays in eval mode: the batch norms are folded, so there is nothing to train."""
        return super().train(False)


def dense_twin(sparse: SparseModel, path: paths.Path = paths.PATHS[0]) -> DenseTwin:
    """Builds a network of plain torch layers that computes what a swapped one does on a path.

    Masked weights and folded norms become the weights and biases of nn.Conv2d and nn.Linear. It shares no memory with
    the swapped network, runs and exports wherever torch does, and its input gets gradients, for attacks for instance.
    Layers that the swap left as they were are copied as they are.

    Args:
        sparse: what :func:`smart_kernels.swap` or :func:`smart_kernels.load` returned.
        path: one of its names, a lambda in [0, 1], or one of these for each stage.

    Raises:
        TypeError, ValueError: not a swapped network, or not a path of it.
    """
    check_swapped(sparse)
    path = paths.resolve(path, sparse.paths, sparse.stages)
    if sparse.uncaptured:
        layers = {id(m): _plain(m, path) for m in sparse.net.modules() if isinstance(m, SparseConv2d)}
        return DenseTwin(copy.deepcopy(sparse.net, layers | _norms(sparse.net, path)), path, sparse._takes_path)
    return DenseTwin(_PlainGraph(sparse.net, path).build(), path, takes_path=False)


def single_path(sparse: SparseModel, path: paths.Path) -> SparseModel:
    """A copy of a swapped network that has one path only, and holds the weights of that path only.

    A lambda's weights are mixed once, here. Where layers read the path by themselves the copy keeps all paths.

    Args:
        path: one of its names, a lambda in [0, 1], or one of these for each stage; the copy's path has that name,
            or the first path's.
    """
    path = paths.resolve(path, sparse.paths, sparse.stages)
    if sparse.uncaptured or any(reads_path(module) for module in sparse.net.modules()):
        return copy.deepcopy(sparse)
    name = path if isinstance(path, str) else sparse.paths[0]
    packed: dict[int, PackedWeight] = {}
    replaced: dict[int, nn.Module] = {}
    for module in sparse.net.modules():
        if isinstance(module, PathAffine):
            replaced[id(module)] = _affine_of(module, path, name)
    for module in sparse.net.modules():
        if isinstance(module, SparseConv2d):
            own = paths.at_stage(path, module.stage)
            if id(module.packed) not in packed:
                packed[id(module.packed)] = _pack(module, own, name)
            replaced[id(module)] = type(module)(
                packed[id(module.packed)],
                module.geometry,
                module.backend,
                _tensors_of(module.scale, own, name),
                _tensors_of(module.bias, own, name),
                module.relu,
                module.pad,
                None if module.second is None else replaced[id(module.second)],
                module.input_shape,
            )
    single = copy.deepcopy(sparse, replaced)
    single.paths, single.stages = (name,), 0
    if sparse.runs_compact and (compact := sparse._compact.of(sparse.net, path, sparse.paths)) is not None:
        single.net, single.runs_compact = copy.deepcopy(compact.net), False
    return single.eval()


def _pack(conv: SparseConv2d, path: str | float, name: str) -> PackedWeight:
    masks = [conv.packed.mask(each) for each in ([path] if isinstance(path, str) else conv.packed.paths)]
    masks = {name: masks[0] | masks[-1]}
    return find(conv.backend).pack(conv.packed.dense(path), masks, conv.geometry.groups)


def _tensors_of(tensors: PerPathTensors | None, path: str | float, name: str) -> dict[str, Tensor] | None:
    # A copy: a tensor that both paths shared must not be shared with the original.
    return None if tensors is None else {name: tensors.of(path).clone()}


def _affine_of(affine: PathAffine, path: paths.Path, name: str) -> PathAffine:
    scale, bias = ({name: tensor.flatten().clone()} for tensor in affine.of(path))
    return PathAffine(scale, bias, affine.relu)


# ---- plain layers ----


def _plain(conv: SparseConv2d, path: paths.Path) -> nn.Module:
    """A layer without what follows it: residual, ReLU and second result are the graph's."""
    path = paths.at_stage(path, conv.stage)
    weight, bias = conv.packed.dense(path), None if conv.bias is None else conv.bias.of(path)
    if conv.scale is not None:
        # In float64: the product is rounded once.
        weight = (weight.double() * conv.scale.of(path).double()[:, None, None, None]).to(weight.dtype)
    if isinstance(conv, SparseLinear):
        out_features, in_features = weight.shape[:2]
        return _with(nn.Linear(in_features, out_features, bias is not None, device="meta"), weight.flatten(1), bias)
    g = conv.geometry
    (top, bottom, left, right), mode = g.padding, "zeros"
    if conv.pad is not None:
        (left, right, top, bottom), mode = conv.pad
    even = mode == "zeros" and (top, left) == (bottom, right)
    padding = (top, left) if even else 0
    plain = nn.Conv2d(
        g.in_channels, weight.shape[0], weight.shape[2:], g.stride, padding, g.dilation, g.groups, bias is not None,
        device="meta",
    )  # fmt: skip
    _with(plain, weight, bias)
    return plain if even else nn.Sequential(_PADDINGS.get(mode, nn.ZeroPad2d)((left, right, top, bottom)), plain)


def _with(layer: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
    layer.bias = None if bias is None else nn.Parameter(bias.clone(), requires_grad=False)
    return layer


def _plain_affine(affine: PathAffine, path: paths.Path) -> nn.BatchNorm2d:
    scale, bias = (tensor.flatten() for tensor in affine.of(path))
    norm = nn.BatchNorm2d(len(scale), eps=0.0, device=scale.device, dtype=scale.dtype)
    return _with(norm, scale, bias)


def _norms(net: nn.Module, path: paths.Path) -> dict[int, nn.Module]:
    """For norms of several paths that were left as they were: that of a named path, by the id of the whole."""
    found = [module for module in net.modules() if hasattr(module, "norms") and not is_hooked(module)]
    own = {module: paths.at_stage(path, stage_of(module)) for module in found}
    return {id(m): copy.deepcopy(m.norms[name]) for m, name in own.items() if isinstance(name, str)}


class _PlainGraph:
    """Copies a swapped network's graph with plain layers in the place of its own."""

    def __init__(self, net: fx.GraphModule, path: paths.Path) -> None:
        self.net = net
        self.path = path
        self.graph = fx.Graph()
        # A layer with a second result stands for two values.
        self.values: dict[fx.Node, fx.Node | tuple[fx.Node, fx.Node] | None] = {}
        self.modules: dict[str, nn.Module] = {}
        self.copied: dict[int, object] = dict(_norms(net, path))

    def build(self) -> fx.GraphModule:
        for node in self.net.graph.nodes:
            self.values[node] = self._copy(node)
        attributes = {
            node.target: operator.attrgetter(node.target)(self.net) for node in self.graph.find_nodes(op="get_attr")
        }
        return fx.GraphModule({**self.modules, **copy.deepcopy(attributes)}, self.graph)

    def _copy(self, node: fx.Node) -> fx.Node | tuple[fx.Node, fx.Node] | None:
        if node.op == "placeholder" and node.target == fusion.PATH:
            return None
        if node.op == "call_function" and node.target is operator.getitem:
            pair = self.values.get(node.args[0])
            if isinstance(pair, tuple):
                return pair[node.args[1]]
        if node.op != "call_module":
            return self.graph.node_copy(node, self.values.__getitem__)
        module = self.net.get_submodule(node.target)
        if isinstance(module, SparseConv2d):
            return self._conv(node, module)
        if isinstance(module, PathAffine):
            return self._affine(node.target, module, self.values[node.args[0]])
        self.modules[node.target] = copy.deepcopy(module, self.copied)
        return self.graph.node_copy(node, self.values.__getitem__)

    def _conv(self, node: fx.Node, conv: SparseConv2d) -> fx.Node | tuple[fx.Node, fx.Node]:
        x, _, *residual = node.args
        self.modules[node.target] = _plain(conv, self.path)
        y = self.graph.call_module(node.target, (self.values[x],))
        if residual:
            y = self.graph.call_function(torch.add, (y, self.values[residual[0]]))
        if conv.relu:
            y = self.graph.call_function(F.relu, (y,))
        return y if conv.second is None else (y, self._affine(f"{node.target}_second", conv.second, y))

    def _affine(self, name: str, affine: PathAffine, x: fx.Node) -> fx.Node:
        self.modules[name] = _plain_affine(affine, self.path)
        y = self.graph.call_module(name, (x,))
        return self.graph.call_function(F.relu, (y,)) if affine.relu else y
