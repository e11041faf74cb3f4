"""Networks whose activations carry only the channels that a path computes and needs.

Of masks that drop whole channels, layers by themselves can skip dropped rows and columns, but they would gather and
scatter channels around each. Here a whole network is rewritten for one path: its layers become smaller ones, and
tensors between them carry no dropped channel (:mod:`smart_kernels.liveness`). The result is exact: what dropped
channels are all the same, bias after batch norm and ReLU, goes into the bias of the next layer. Where that is
surrounded by zeros, whose borders see less of it, the tensor carries one channel of ones, which stands for all
of them.

The rewritten network is made of the same modules as a swapped one, so that everything else knows how to run it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn

from smart_kernels import liveness
from smart_kernels.backends.fused_cudnn import is_on_gpu
from smart_kernels.geometry import Geometry
from smart_kernels.liveness import Layer, Stream
from smart_kernels.modules import PathAffine, SparseConv2d
from smart_kernels.packing import PackedWeight
from smart_kernels.paths import Path
from smart_kernels.protocol import is_hooked

GROUP = 16  # channels that tensor cores take at a time
WORTH = 0.9  # of the weights left: above it there is too little to gain

# (name, weight, masks, geometry, input shape) -> the weight packed, and the backend it is for
Choose = Callable[[str, Tensor, Mapping[str, Tensor], Geometry, torch.Size | None], tuple[PackedWeight, str]]


@dataclass(frozen=True)
class Compact:
    """A network rewritten for one path.

    Attributes:
        net: takes the path by ``name``.
        name: of its only path.
        channels: of each layer, by name: input channels it reads, of all, and outputs it computes, of all.
    """

    net: fx.GraphModule
    name: str
    channels: Mapping[str, tuple[int, int, int, int]]

    @property
    def nbytes(self) -> int:
        """Bytes of its layers' weights."""
        packed = {module.packed for module in self.net.modules() if isinstance(module, SparseConv2d)}
        return sum(each.nbytes for each in packed)


def compact(net: fx.GraphModule, path: Path, name: str, choose: Choose) -> Compact | None:
    """Rewrites a swapped network for a resolved path.

    Args:
        name: that the path shall have in the new network.
        choose: packs a layer's weight for some backend.

    Returns:
        None if hardly any channel can be left out, or the network is of a kind that is not rewritten.
    """
    if any(isinstance(module, SparseConv2d) and is_hooked(module) for module in net.modules()):
        return None
    with torch.no_grad():
        found = liveness.analyse(net, path)
        if not all(bool(value.constant.isfinite().all()) for value in found.values.values()) or not _is_worth(found):
            return None
        return _Rewriter(net, path, name, choose, found).run()


def _is_worth(found: liveness.Liveness) -> bool:
    before = after = 0
    for layer in found.layers.values():
        taps = layer.module.geometry.numbers[2] * layer.module.geometry.numbers[3] if _is_sparse(layer) else 1
        outputs, inputs = layer.keeps.shape
        before += outputs * inputs * taps
        inputs = inputs if layer.x is None else int(layer.x.stream.kept.sum())
        after += int(layer.y.stream.kept.sum()) * inputs * taps
    return after < WORTH * before


def _is_sparse(layer: Layer) -> bool:
    return isinstance(layer.module, SparseConv2d)


@dataclass(frozen=True)
class _Carried:
    """What the tensors of a stream carry.

    Attributes:
        channels: (c,) in ascending order.
        ones: whether a channel of ones follows them.
    """

    channels: Tensor
    ones: bool

    def __len__(self) -> int:
        return len(self.channels) + self.ones

    def kept(self, count: int) -> Tensor:
        """(count,) bool, the channels of all that are carried."""
        return torch.zeros(count, dtype=torch.bool, device=self.channels.device).index_fill_(0, self.channels, True)

    def take(self, tensor: Tensor, one: float) -> Tensor:
        """Of numbers (C,) of all channels those that are carried, with ``one`` for the channel of ones."""
        return torch.cat([tensor[self.channels], tensor.new_full((int(self.ones),), one)])


class _Rewriter:
    """Copies a graph, layer by layer."""

    def __init__(self, net: fx.GraphModule, path: Path, name: str, choose: Choose, found: liveness.Liveness) -> None:
        self.net = net
        self.path = path
        self.name = name
        self.choose = choose
        self.found = found
        self.graph = fx.Graph()
        self.modules: dict[str, nn.Module] = {}
        self.channels: dict[str, tuple[int, int, int, int]] = {}
        self.with_ones = {
            layer.x.stream.root() for layer in found.layers.values() if layer.x is not None and self._needs_ones(layer)
        }
        self.carried: dict[Stream, _Carried] = {}

    def run(self) -> Compact:
        copies: dict[fx.Node, fx.Node] = {}
        for node in self.net.graph.nodes:
            copies[node] = self.graph.node_copy(node, copies.__getitem__)
            if node.op == "call_module" and node.target not in self.modules:
                self.modules[node.target] = self._module(node, self.net.get_submodule(node.target))
        attributes = {n.target: _attribute(self.net, n.target) for n in self.graph.nodes if n.op == "get_attr"}
        net = fx.GraphModule({**self.modules, **attributes}, self.graph)
        return Compact(net.eval(), self.name, self.channels)

    def _module(self, node: fx.Node, module: nn.Module) -> nn.Module:
        if (layer := self.found.layers.get(node)) is not None:
            return self._conv(node.target, layer, node) if _is_sparse(layer) else self._linear(layer)
        if isinstance(module, PathAffine):
            value = self.found.values.get(node)
            return self._affine(module, None if value is None else self._carried(value.stream))
        return module

    def _needs_ones(self, layer: Layer) -> bool:
        weight = liveness.weight_of(layer.module, self.path)[layer.y.stream.kept]
        return layer.padded and bool(liveness.absent(weight, layer.x.constant, layer.x.stream.kept).any())

    def _carried(self, stream: Stream) -> _Carried:
        stream = stream.root()
        if stream not in self.carried:
            kept, ones = stream.kept, stream in self.with_ones
            if not ones and not bool(kept.any()):
                kept = kept.index_fill(0, kept.new_zeros(1, dtype=torch.long), True)  # tensors have some channel
            if is_on_gpu(kept):
                kept = _rounded_up(kept, GROUP, ones)
            self.carried[stream] = _Carried(kept.nonzero().flatten(), ones)
        return self.carried[stream]

    def _weights(self, layer: Layer) -> tuple[Tensor, Tensor]:
        """The smaller weight (k, c, R, S), and what input channels that are left out add to each output (k,)."""
        weight = liveness.weight_of(layer.module, self.path)
        out = self._carried(layer.y.stream)
        rows = weight[out.channels]
        always = rows.new_zeros(len(out), dtype=torch.float64)
        if layer.x is not None:
            into = self._carried(layer.x.stream)
            left_out = liveness.absent(rows, layer.x.constant, into.kept(rows.shape[1]))
            rows = rows[:, into.channels]
            if into.ones:
                ones = left_out if layer.padded else torch.zeros_like(left_out)
                rows = torch.cat([rows, ones[:, None].to(rows.dtype)], dim=1)
            if not layer.padded:
                always[: len(out.channels)] = left_out.sum((1, 2))
        if out.ones:
            rows = torch.cat([rows, rows.new_zeros(1, *rows.shape[1:])])
        return rows.contiguous(), always

    def _conv(self, target: str, layer: Layer, node: fx.Node) -> SparseConv2d:
        conv, out = layer.module, self._carried(layer.y.stream)
        weight, always = self._weights(layer)
        scale, bias = liveness.epilogue_of(conv, self.path)
        # A residual brings ones along.
        one = 0.0 if len(node.args) > 2 else 1.0
        scale = None if scale is None else out.take(scale, 1.0)
        if bias is not None or out.ones or bool(always.any()):
            bias = weight.new_zeros(layer.keeps.shape[0]) if bias is None else bias
            added = always if scale is None else always * scale.double()
            bias = (out.take(bias, one).double() + added).to(bias.dtype)
        geometry = replace(conv.geometry, weight_shape=tuple(weight.shape))
        if conv.geometry.groups > 1:
            geometry = conv.geometry
        shape = None if conv.input_shape is None else torch.Size(conv.input_shape)
        if shape is not None and layer.x is not None:
            shape = torch.Size((shape[0], weight.shape[1], *shape[2:]))
        packed, backend = self.choose(target, weight, {self.name: weight != 0}, geometry, shape)
        second = None if conv.second is None else self._affine(conv.second, out)
        mine = type(conv)(
            packed, geometry, backend, self._named(scale), self._named(bias), conv.relu, conv.pad, second, shape
        )
        inputs = conv.geometry.in_channels
        self.channels[target] = (
            inputs if layer.x is None else weight.shape[1],
            inputs,
            weight.shape[0],
            layer.keeps.shape[0],
        )
        return mine

    def _linear(self, layer: Layer) -> nn.Linear:
        weight, always = self._weights(layer)
        out, bias = self._carried(layer.y.stream), layer.module.bias
        if bias is not None or bool(always.any()):
            bias = weight.new_zeros(len(layer.keeps)) if bias is None else bias
            bias = nn.Parameter((out.take(bias, 1.0).double() + always).to(bias.dtype), requires_grad=False)
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
        linear.weight, linear.bias = nn.Parameter(weight.flatten(1), requires_grad=False), bias
        return linear

    def _affine(self, affine: PathAffine, carried: _Carried | None) -> PathAffine:
        scale, bias = (each.flatten() for each in affine.of(self.path))
        if carried is not None:
            scale, bias = carried.take(scale, 1.0), carried.take(bias, 0.0)
        return PathAffine({self.name: scale}, {self.name: bias}, affine.relu)

    def _named(self, tensor: Tensor | None) -> dict[str, Tensor] | None:
        return None if tensor is None else {self.name: tensor}


def _rounded_up(kept: Tensor, group: int, ones: bool) -> Tensor:
    """Marks more channels (C,) until all that are carried fill their groups: these cost no time."""
    missing = -(int(kept.sum()) + ones) % group
    others = (~kept).nonzero().flatten()[:missing]
    return kept.index_fill(0, others, True)


def _attribute(root: nn.Module, name: str) -> Tensor:
    owner, _, attribute = name.rpartition(".")
    return getattr(root.get_submodule(owner), attribute)
