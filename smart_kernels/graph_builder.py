"""Builds a swapped network as one graph, each convolution fused with what follows it."""

from __future__ import annotations

import operator
from collections.abc import Mapping

from torch import Tensor, fx, nn

from smart_kernels import fusion
from smart_kernels.builder import Builder
from smart_kernels.model import SparseModel
from smart_kernels.modules import PathAffine, SparseConv2d
from smart_kernels.planner import Planner
from smart_kernels.protocol import is_conv, is_norm, norm_affine, stage_of


class GraphBuilder(Builder):
    """Rewrites the graph that :func:`smart_kernels.fusion.capture` made of the model."""

    def __init__(self, model: nn.Module, planner: Planner, traced: fx.GraphModule) -> None:
        super().__init__(model, planner)
        self.traced = traced
        self.graph = traced.graph
        self.modules = dict(traced.named_modules())
        self.path = next(node for node in self.graph.nodes if node.op == "placeholder" and node.target == fusion.PATH)
        self._names: set[str] = set()

    def build(self) -> SparseModel:
        """Fuses the graph's chains, and drops what does nothing at inference.

        Dead code stays: it may write in place into what others read.
        """
        for node in list(self.graph.nodes):
            if fusion.is_inert(self.modules, node):
                node.replace_all_uses_with(node.args[0])
                self.graph.erase_node(node)
        for node in self._calls():
            module = self.modules[node.target]
            if self._is_read(node.target) and self.is_replaceable(node.target, module):
                self.leave(node.target, module, "the network also uses its weight by other ways than calling it")
            elif self.is_replaceable(node.target, module):
                self._fuse(node)
        self._note_uncalled()
        self.check_refusals()
        for node in self._calls():
            if is_norm(self.modules[node.target]):
                self._replace_norm(node)
        self.traced.delete_all_unused_submodules()
        self.traced.recompile()
        # A fresh GraphModule takes along only what the graph uses.
        net = fx.GraphModule(self.traced, self.graph)
        return SparseModel(net, self.paths, self.rows, takes_path=True, stages=self.stages)

    def _note_uncalled(self) -> None:
        """Writes rows of layers whose weights the network uses otherwise than by calling them."""
        told = {row.name for row in self.rows}
        for name, module in self.model.named_modules():
            if name not in told and self._is_read(name) and self.is_replaceable(name, module):
                self.leave(name, module, "the network uses its weight by other ways than calling it")

    def _is_read(self, name: str) -> bool:
        """Whether the network itself reads a tensor of the module of that name."""
        return any(node.op == "get_attr" and node.target.startswith(f"{name}.") for node in self.graph.nodes)

    def _calls(self) -> list[fx.Node]:
        """The nodes that call modules of the original."""
        return [node for node in self.graph.nodes if node.op == "call_module" and node.target in self.modules]

    def _fuse(self, node: fx.Node) -> None:
        module = self.modules[node.target]
        if is_conv(module):
            chain = fusion.find_chain(self.traced, node)
            fused, layer = self._insert(chain, *self._scale_and_bias(chain))
            self._add_second(fused, layer)
        else:
            self._insert(fusion.find_linear_chain(self.traced, node), None, self.own_bias(module))

    def _scale_and_bias(self, chain: fusion.Chain) -> tuple[dict[str, Tensor] | None, dict[str, Tensor] | None]:
        bias = self.own_bias(self.modules[chain.conv.target])
        if chain.norm is None:
            return None, bias
        scale, shift = norm_affine(self.modules[chain.norm.target], self.paths)
        return scale, shift if bias is None else {p: shift[p] + bias[p] * scale[p] for p in self.paths}

    def _insert(
        self, chain: fusion.Chain, scale: Mapping[str, Tensor] | None, bias: Mapping[str, Tensor] | None
    ) -> tuple[fx.Node, SparseConv2d]:
        """Puts one layer in the place of a chain."""
        name, x = self._fresh(chain.conv.target), chain.conv.args[0]
        layer = self.replace(name, self.modules[chain.conv.target], fusion.shape_of(x), scale, bias, chain.relu)
        residual = () if chain.residual is None else (chain.residual,)
        self.traced.add_submodule(name, layer)
        with self.graph.inserting_before(chain.last):
            fused = self.graph.call_module(name, (x, self.path, *residual))
        fused.meta = dict(chain.last.meta)
        chain.last.replace_all_uses_with(fused)
        for node in reversed(chain.nodes):
            self.graph.erase_node(node)
        return fused, layer

    def _add_second(self, fused: fx.Node, layer: SparseConv2d) -> None:
        """Moves a norm that reads a convolution's result beside others into its epilogue."""
        norm = fusion.find_second(self.modules, fused)
        if norm is None:
            return
        layer.second, replaced = self._affine(norm)
        with self.graph.inserting_after(fused):
            second = self.graph.call_function(operator.getitem, (fused, 1))
            first = self.graph.call_function(operator.getitem, (fused, 0))
        first.meta, second.meta = dict(fused.meta), dict(fused.meta)
        replaced[-1].replace_all_uses_with(second)
        for node in reversed(replaced):
            self.graph.erase_node(node)
        fused.replace_all_uses_with(first, delete_user_cb=lambda user: user not in (first, second))

    def _replace_norm(self, norm: fx.Node) -> None:
        name = self._fresh(norm.target)
        affine, replaced = self._affine(norm)
        self.traced.add_submodule(name, affine)
        # In the norm's own place: later, its input may have been written into.
        with self.graph.inserting_before(norm):
            replacement = self.graph.call_module(name, (norm.args[0], self.path))
        replaced[-1].replace_all_uses_with(replacement)
        for node in reversed(replaced):
            self.graph.erase_node(node)

    def _affine(self, norm: fx.Node) -> tuple[PathAffine, list[fx.Node]]:
        """A norm, with the ReLU that alone reads it, as a module; and the nodes it replaces."""
        users = list(norm.users)
        relu = len(users) == 1 and fusion.is_relu(self.modules, users[0])
        affine = PathAffine(*norm_affine(self.modules[norm.target], self.paths), relu=relu)
        affine.stage = stage_of(self.modules[norm.target])
        return affine, [norm, users[0]] if relu else [norm]

    def _fresh(self, name: str) -> str:
        """A module used twice becomes two, since each may be fused with something else; they share the weight."""
        candidate, n = name, 2
        while candidate in self._names:
            candidate, n = f"{name}_{n}", n + 1
        self._names.add(candidate)
        return candidate
