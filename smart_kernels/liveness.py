"""Which channels of a swapped network's activations a path computes and reads: what dropped channels leave to do.

A channel that no weight is kept for is the same number at every pixel, its bias after batch norm and ReLU; a channel
that no kept weight reads is computed for nothing. Both are followed through the graph, forwards and backwards, until
each value is known to *live* in some channels, to be *constant* in the others, and to be *needed* in some. What a
network can do without is everything but the live and needed channels (:mod:`smart_kernels.compaction`).

Values that are added, normed, rectified or pooled into each other lie in one *stream*, whose tensors all carry the same
channels: so a sum needs no map from one set of channels to another.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn

from smart_kernels import fusion
from smart_kernels.modules import PathAffine, SparseConv2d, SparseLinear
from smart_kernels.paths import Path, at_stage
from smart_kernels.pooling import averages_all, flattens, pools
from smart_kernels.protocol import is_hooked

_ADDITIONS = (operator.add, torch.add)


class Stream:
    """Values whose tensors carry the same channels.

    Attributes:
        live: (C,) bool, channels that vary in at least one of its values.
        needed: (C,) bool, channels that something reads.
        whole: whether tensors keep all channels, as something reads them that knows nothing of this.
        adds: whether two of its values are added by a node of the graph, not within a convolution.
        constants: (C,) bool, channels that are a constant other than zero in at least one of its values.
    """

    def __init__(self, channels: int, device: torch.device) -> None:
        self.live, self.needed, self.constants = (torch.zeros(3, channels, dtype=torch.bool, device=device)).unbind()
        self.whole = self.adds = False
        self._into: Stream | None = None

    def root(self) -> Stream:
        """The stream it has become a part of, perhaps itself."""
        stream = self
        while stream._into is not None:
            stream = stream._into
        return stream

    def join(self, other: Stream) -> None:
        """Makes one of two streams."""
        ours, theirs = self.root(), other.root()
        if ours is theirs:
            return
        for name in ("live", "needed", "constants"):
            setattr(ours, name, getattr(ours, name) | getattr(theirs, name))
        ours.whole, ours.adds = ours.whole or theirs.whole, ours.adds or theirs.adds
        theirs._into = ours

    @property
    def kept(self) -> Tensor:
        """(C,) bool, the channels that its tensors carry."""
        root = self.root()
        if root.whole:
            return torch.ones_like(root.live)
        # A sum of two ones would be two: where the graph adds, constants are carried as they are.
        varies = root.live | root.constants if root.adds else root.live
        return varies & root.needed


@dataclass
class Value:
    """A tensor (N, C, ...) of the graph.

    Attributes:
        stream: it is part of.
        live: (C,) bool, channels that vary with the input or from pixel to pixel.
        constant: (C,) float64, what the other channels are everywhere.
        one_pixel: whether its images have one pixel.
        flat: whether it is (N, C), without pixels.
    """

    stream: Stream
    live: Tensor
    constant: Tensor
    one_pixel: bool = False
    flat: bool = False


@dataclass
class Layer:
    """A convolution or fully connected layer of the graph on one path.

    Attributes:
        module: a SparseConv2d or nn.Linear.
        x, y, second: values it reads and makes; x is None where nothing is known of its input.
        keeps: (K, C) bool, pairs of channels between which there is a weight other than zero.
        padded: whether its input is surrounded by zeros.
    """

    module: nn.Module
    x: Value | None
    y: Value
    keeps: Tensor
    padded: bool
    second: Value | None = None


@dataclass
class Liveness:
    """What :func:`analyse` finds.

    Attributes:
        values: of the nodes that make tensors whose channels are known.
        layers: of the nodes that call them.
    """

    values: dict[fx.Node, Value] = field(default_factory=dict)
    layers: dict[fx.Node, Layer] = field(default_factory=dict)


def weight_of(module: nn.Module, path: Path) -> Tensor:
    """A layer's weight (K, C/groups, R, S) on a resolved path; a fully connected layer's has one tap."""
    if isinstance(module, SparseConv2d):
        return module.packed.dense(at_stage(path, module.stage))
    return module.weight[:, :, None, None]


def epilogue_of(module: nn.Module, path: Path) -> tuple[Tensor | None, Tensor | None]:
    """A layer's scale and bias (K,) on a resolved path, or None."""
    if isinstance(module, SparseConv2d):
        own = at_stage(path, module.stage)
        return tuple(None if each is None else each.of(own) for each in (module.scale, module.bias))
    return None, module.bias


def absent(weight: Tensor, constant: Tensor, kept: Tensor) -> Tensor:
    """What input channels that are not carried add to each output at each tap, (K, R, S) in float64.

    Args:
        weight: (K, C, R, S).
        constant: (C,), what the channels are.
        kept: (C,) bool, those that are carried.
    """
    adds = torch.where(kept, 0.0, constant).nonzero().flatten()
    return torch.einsum("kcrs,c->krs", weight[:, adds].double(), constant[adds])


def analyse(net: fx.GraphModule, path: Path) -> Liveness:
    """Follows channels through a swapped network's graph.

    Args:
        path: resolved; between the named ones both paths' weights count.
    """
    forwards = _Forwards(net, path)
    with torch.no_grad():
        for node in net.graph.nodes:
            forwards.visit(node)
        _find_needed(forwards.found)
    return forwards.found


class _Forwards:
    """Finds the values of a graph in its order: streams, live channels and constants."""

    def __init__(self, net: fx.GraphModule, path: Path) -> None:
        self.modules: Mapping[str, nn.Module] = dict(net.named_modules())
        self.path = path
        self.found = Liveness()

    def visit(self, node: fx.Node) -> None:
        """Notes what a node makes; tensors it reads in ways unknown here keep all their channels."""
        module = self.modules.get(node.target) if node.op == "call_module" else None
        values = [self.found.values.get(each) for each in node.all_input_nodes]
        if isinstance(module, SparseConv2d) or (type(module) is nn.Linear and not is_hooked(module)):
            if self._layer(node, module):
                return
        elif self._picks(node):
            layer = self.found.layers[node.args[0]]
            self.found.values[node] = layer.second if node.args[1] else layer.y
            return
        elif (value := self._elementwise(node, module)) is not None:
            self.found.values[node] = value
            return
        for value in values:
            if value is not None:
                value.stream.root().whole = True

    def _picks(self, node: fx.Node) -> bool:
        source = node.args[0] if node.args else None
        return node.op == "call_function" and node.target is operator.getitem and source in self.found.layers

    def _layer(self, node: fx.Node, module: nn.Module) -> bool:
        x, residual = (self.found.values.get(node.args[i]) if len(node.args) > i else None for i in (0, 2))
        linear = not isinstance(module, SparseConv2d) or isinstance(module, SparseLinear)
        if x is not None and x.flat != linear:
            return False
        weight = weight_of(module, self.path)
        scale, bias = epilogue_of(module, self.path)
        grouped = isinstance(module, SparseConv2d) and module.geometry.groups > 1
        padded = isinstance(module, SparseConv2d) and any(module.geometry.padding)
        keeps = weight.flatten(2).any(dim=2)
        k = len(weight)
        known = torch.zeros_like(keeps[0]) if x is None or grouped else ~x.live
        constant = torch.zeros_like(known, dtype=torch.float64) if x is None or grouped else x.constant
        always = absent(weight, constant, ~known)
        live = keeps[:, ~known].any(dim=1)
        # Zeros around a constant make borders differ.
        live = live | always.flatten(1).any(dim=1) if padded else live
        constant = always.sum((1, 2))
        constant = constant if scale is None else constant * scale.double()
        constant = constant if bias is None else constant + bias.double()
        stream = Stream(k, weight.device)
        if len(node.args) > 2:
            if residual is None:
                live, stream.whole = torch.ones_like(live), True
            else:
                live, constant = live | residual.live, constant + residual.constant
                stream.join(residual.stream)
        if getattr(module, "relu", False):
            constant = constant.clamp_min(0)
        if grouped:
            stream.root().whole = True
            if x is not None:
                x.stream.root().whole = True
        y = self._value(Value(stream, live, constant, flat=linear))
        layer = self.found.layers[node] = Layer(module, None if grouped else x, y, keeps, padded)
        if isinstance(module, SparseConv2d) and module.second is not None:
            layer.second = self._affine(module.second, y)
        else:
            self.found.values[node] = y
        return True

    def _affine(self, affine: PathAffine, x: Value) -> Value:
        scale, bias = (each.flatten().double() for each in affine.of(self.path))
        constant = x.constant * scale + bias
        constant = constant.clamp_min(0) if affine.relu else constant
        return self._value(Value(x.stream, x.live, constant, x.one_pixel, x.flat))

    def _elementwise(self, node: fx.Node, module: nn.Module | None) -> Value | None:
        """The value of a node that treats each channel by itself, and turns ones into ones; None for any other."""
        x = self.found.values.get(node.args[0]) if node.args and isinstance(node.args[0], fx.Node) else None
        if x is None or (module is not None and is_hooked(module)):
            return None
        if isinstance(module, PathAffine):
            return self._affine(module, x)
        if fusion.is_relu(self.modules, node):
            return self._value(Value(x.stream, x.live, x.constant.clamp_min(0), x.one_pixel, x.flat))
        if node.op == "call_function" and node.target in _ADDITIONS:
            return self._sum(node, x)
        if x.flat:
            return None
        if flattens(node, module) and x.one_pixel:
            return Value(x.stream, x.live, x.constant, x.one_pixel, flat=True)
        if (keeps_dimensions := averages_all(node, module)) is not None:
            return Value(x.stream, x.live, x.constant, one_pixel=True, flat=not keeps_dimensions)
        return Value(x.stream, x.live, x.constant) if pools(node, module) else None

    def _sum(self, node: fx.Node, x: Value) -> Value | None:
        other = self.found.values.get(node.args[1]) if len(node.args) == 2 and not node.kwargs else None
        if other is None or len(other.live) != len(x.live) or other.flat != x.flat:
            return None
        x.stream.join(other.stream)
        x.stream.root().adds = True
        one_pixel = x.one_pixel and other.one_pixel
        return self._value(Value(x.stream, x.live | other.live, x.constant + other.constant, one_pixel, x.flat))

    @staticmethod
    def _value(value: Value) -> Value:
        stream = value.stream.root()
        stream.live = stream.live | value.live
        stream.constants = stream.constants | (~value.live & (value.constant != 0))
        return value


def _find_needed(found: Liveness) -> None:
    """Marks the channels that are read, backwards, until no more are found."""
    layers = [layer for layer in reversed(found.layers.values()) if layer.x is not None]
    changed = True
    while changed:
        changed = False
        for layer in layers:
            stream = layer.x.stream.root()
            needed = stream.needed | layer.keeps[layer.y.stream.kept].any(dim=0)
            if not torch.equal(needed, stream.needed):
                stream.needed, changed = needed, True
