"""Which layers' channels are coupled: the dependency groups of structural pruning, found from a network's graph.

A channel that every writer of a sum drops is gone for good only if all its readers drop it as well, and a sum is no
narrower than the widest of what it adds. So the layers around one *stream* (values that are added, normed, rectified,
pooled or multiplied into each other, channel by channel) have to agree on its channels, as in DepGraph (Fang et al.,
arXiv 2301.12900). What :mod:`smart_kernels.liveness` finds in a swapped network is found here before masks exist.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import fx, nn

from smart_kernels import fusion
from smart_kernels.protocol import is_conv, is_hooked

# What gives each channel of its result from that channel of its input alone.
_MODULES = (
    nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd, nn.Identity, nn.Upsample,
    nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d,
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.SiLU, nn.GELU, nn.Mish, nn.Softplus,
    nn.Sigmoid, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.Tanh,
)  # fmt: skip
_FUNCTIONS = {
    F.relu, F.relu_, torch.relu, torch.relu_, F.relu6, F.leaky_relu, F.elu, F.silu, F.gelu, F.mish, F.softplus,
    F.sigmoid, torch.sigmoid, F.hardsigmoid, F.hardswish, F.tanh, torch.tanh, torch.clamp,
    F.dropout, F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d, F.interpolate,
}  # fmt: skip
_METHODS = {"relu", "relu_", "sigmoid", "sigmoid_", "tanh", "clamp", "contiguous", "clone"}
# What joins two tensors channel by channel.
_PAIRS = {operator.add, operator.iadd, operator.sub, operator.mul, operator.imul, torch.add, torch.sub, torch.mul}
_PAIR_METHODS = {"add", "add_", "sub", "sub_", "mul", "mul_"}


@dataclass(eq=False)
class Stream:
    """Masked convolutions that are coupled by the channels of the values they write and read.

    Attributes:
        channels: of the values.
        writers, readers: names of the layers whose outputs, and whose inputs, they are.
        whole: whether they are unknown, and so keep all channels: an image, a concatenation, a share of groups.
        read_elsewhere: whether something else than masked convolutions reads them too.
    """

    channels: int
    writers: list[str] = field(default_factory=list)
    readers: list[str] = field(default_factory=list)
    whole: bool = False
    read_elsewhere: bool = False


def find_streams(model: nn.Module) -> list[Stream]:
    """The streams that a network's masked convolutions write and read; each layer writes one and reads one.

    A depthwise convolution's outputs are coupled with its inputs. Other layers in groups read a stream of their own,
    and so does what reads an image or channels that cannot be followed: it is whole.

    Args:
        model: of one image batch (N, C, H, W); its masked convolutions follow :mod:`smart_kernels.protocol`.

    Raises:
        Exception: the network cannot be traced; whatever tracing met.
    """
    traced = fusion.trace(model)
    search = _Search(model)
    for node in traced.graph.nodes:
        search.visit(node)
    for name in search.masked.keys() - search.written.keys():
        search.convolve(name, None)  # a layer that the network does not call
    return search.streams()


class _Search:
    """Follows channels through a graph, in its order."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(model.named_modules())
        self.masked = {name: each for name, each in self.modules.items() if is_conv(each) and hasattr(each, "masks")}
        self.values: dict[fx.Node, Stream] = {}
        self.written: dict[str, Stream] = {}
        self.read: dict[str, Stream] = {}
        self.joined: dict[Stream, Stream] = {}

    def visit(self, node: fx.Node) -> None:
        """Notes the stream of what a node makes, if it is known; what an unknown node reads is read elsewhere."""
        inputs = [self.root(self.values[each]) for each in node.all_input_nodes if each in self.values]
        module = self.modules.get(node.target) if node.op == "call_module" else None
        if module is not None and is_conv(module):
            self.values[node] = self.convolve(node.target, inputs[0] if inputs else None)
        elif (stream := self.passed_on(node, module, inputs)) is not None:
            self.values[node] = stream
        else:
            for stream in inputs:
                stream.read_elsewhere = True

    def convolve(self, name: str, x: Stream | None) -> Stream:
        """The stream that a convolution writes, given the one it reads, or None where that is unknown."""
        conv = self.modules[name]
        outputs, inputs = conv.weight.shape[:2]
        depthwise = x is not None and conv.groups == outputs == x.channels
        y = x if depthwise else Stream(outputs)
        if x is not None and (name not in self.masked or (conv.groups > 1 and not depthwise)):
            x.read_elsewhere = True
        if name in self.masked:
            into = Stream(inputs, whole=True) if x is None or conv.groups > 1 else x
            # Called twice, a layer couples what it writes, and what it reads.
            self.read[name] = self.join(self.read.get(name, into), into)
            y = self.written[name] = self.join(self.written.get(name, y), y)
        return y

    def passed_on(self, node: fx.Node, module: nn.Module | None, inputs: list[Stream]) -> Stream | None:
        """The stream of a node that keeps channels apart; None for any other."""
        if not inputs or len(inputs) < len(node.all_input_nodes):
            return None
        if module is not None:
            keeps = (isinstance(module, _MODULES) or hasattr(module, "norms")) and not is_hooked(module)
            return inputs[0] if keeps else None
        called = (node.op, node.target)
        if called[1] in (_FUNCTIONS if node.op == "call_function" else _METHODS):
            return inputs[0] if len(inputs) == 1 else None
        if called[1] not in (_PAIRS if node.op == "call_function" else _PAIR_METHODS):
            return None
        if len({stream.channels for stream in inputs}) > 1:
            return None
        return inputs[0] if len(inputs) == 1 else self.join(*inputs)

    def root(self, stream: Stream) -> Stream:
        """The stream it has become a part of, perhaps itself."""
        while stream in self.joined:
            stream = self.joined[stream]
        return stream

    def join(self, one: Stream, other: Stream) -> Stream:
        """Makes one of two streams."""
        one, other = self.root(one), self.root(other)
        if one is not other:
            self.joined[other] = one
            one.whole, one.read_elsewhere = one.whole or other.whole, one.read_elsewhere or other.read_elsewhere
        return one

    def streams(self) -> list[Stream]:
        """Those of masked layers, in the order of the network's modules."""
        found: dict[Stream, None] = {}
        for name in self.masked:
            for stream, side in ((self.root(self.read[name]), "readers"), (self.root(self.written[name]), "writers")):
                getattr(stream, side).append(name)
                found[stream] = None
        return list(found)
