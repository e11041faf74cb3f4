"""Swaps a network module by module, where it could not be captured as a graph; norms stay as they are."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import Tensor, nn

from smart_kernels import fusion
from smart_kernels.builder import Builder
from smart_kernels.model import SparseModel
from smart_kernels.modules import SparseConv2d
from smart_kernels.protocol import is_conv, is_linear


class ModuleBuilder(Builder):
    """Replaces layers in place."""

    def build(self, example: Tensor, reason: str, is_right: Callable[[SparseModel], bool]) -> SparseModel:
        """Replaces all layers that can be.

        Args:
            example: shows which shape reaches which layer.
            reason: why there is no graph.
            is_right: tells whether a network computes what the original does. A layer whose owner reaches into it, for
                its weight say, cannot be replaced: if the whole is wrong, each layer is tried by itself.
        """
        shapes = _input_shapes(self.model, example)
        originals = {
            name: module
            for name, module in self.model.named_modules(remove_duplicate=False)
            if name and self.is_replaceable(name, module)
        }
        made: dict[nn.Module, SparseConv2d] = {}
        for name, module in originals.items():
            if module not in made:
                made[module] = self.replace(name, module, shapes.get(module), None, self.own_bias(module))
        self.check_refusals()
        takes_path = fusion.PATH in inspect.signature(self.model.forward).parameters
        sparse = SparseModel(self.model, self.paths, self.rows, takes_path, reason, self.stages)
        for name, module in originals.items():
            self._put(name, made[module])
        if is_right(sparse):
            return sparse
        for name, module in originals.items():
            self._put(name, module)
        for module, layer in made.items():
            self._try([name for name, each in originals.items() if each is module], module, layer, sparse, is_right)
        self.check_refusals()
        return sparse

    def _try(
        self,
        names: list[str],
        module: nn.Module,
        layer: SparseConv2d,
        sparse: SparseModel,
        is_right: Callable[[SparseModel], bool],
    ) -> None:
        """Keeps one replacement if the network is right with it."""
        for name in names:
            self._put(name, layer)
        if is_right(sparse):
            return
        for name in names:
            self._put(name, module)
        rows = sparse._rows
        place = next(i for i, row in enumerate(rows) if row.name == names[0])
        self.leave(names[0], module, "with it replaced the network fails, so something reaches into it")
        rows[place] = self.rows.pop()

    def _put(self, name: str, module: nn.Module) -> None:
        parent, _, attribute = name.rpartition(".")
        setattr(self.model.get_submodule(parent), attribute, module)


def _input_shapes(model: nn.Module, example: Tensor) -> dict[nn.Module, torch.Size]:
    """Runs the example through the model and notes what shape each layer is given (the last one it sees)."""
    shapes: dict[nn.Module, torch.Size] = {}

    def note(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        shapes[module] = next(iter((*args, *kwargs.values()))).shape

    layers = [module for module in model.modules() if is_conv(module) or is_linear(module)]
    hooks = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
    try:
        with torch.no_grad():
            model(example)
    finally:
        for hook in hooks:
            hook.remove()
    return shapes
