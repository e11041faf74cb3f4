"""Sparse learning at a fixed density: what is small is pruned, and regrown where gradients are large.

After Dettmers and Zettlemoyer, "Sparse Networks from Scratch" (arXiv 1907.04840), done for each path on its own; which
weights the paths share therefore changes as they train, unless their overlap is to be kept. That SMART does this is a
reconstruction from its authors' earlier code, not their word. Patterns of groups of weights are our addition.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from smart.coupled_masks import CoupledLayers
from smart.layers import SmartConv2d, smart_convs
from smart.rewire.coupled import move_streams, start_rows
from smart.rewire.methods import METHODS, SCHEDULES, check_method
from smart.rewire.moves import MOVES, Turn
from smart.seeds import derive_seed
from smart_kernels import patterns
from smart_kernels.coupling import Stream, find_streams
from smart_kernels.paths import PATHS
from smart_kernels.patterns import Coupled


class Rewirer:
    """Moves the masks of a model's convolutions while it trains; never touches biases, norms or the classifier.

    Masks keep the pattern and the overlap that the model was made with. Groups of weights that live or die together are
    pruned by the L2 norm of their weights, and regrown by that of their gradients.

    Use::

        rewirer = Rewirer(model, optimizer)
        for step in range(total):
            if step and step % every == 0:
                rewirer.rewire(progress=step / total)
            ...; loss.backward(); optimizer.step(); rewirer.after_step()
        rewirer.close()

    Args:
        model: on its final device; its masked convolutions get gradient sinks until :meth:`close`.
        optimizer: of the model, so that what it remembers of dead weights can be cleared.
        momentum: of the running mean of effective-weight gradients that ranks candidates for regrowth.
        prune_rate: part of each layer's live weights moved by the first rewiring, in [0, 1).
        schedule: how that part falls over training: ``"linear"`` or ``"cosine"``, to zero; or ``"constant"``.
        method: ``"sparse_momentum"``; ``"rigl"``, by the last step's gradient alone and with layers keeping their
            densities (arXiv 1911.11134); or ``"static"``, masks that stay.
        redistribute: whether layers trade density: ``"momentum"``, to where live weights have more momentum;
            ``"none"``, each layer keeps its own, and with it the multiplications; ``"auto"``, as the method does.
        until: the part of training after which masks stay.

    Raises:
        ValueError: a setting outside what is accepted, settings that contradict one another or the model's pattern, a
            model without masked convolutions.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        momentum: float = 0.9,
        prune_rate: float = 0.5,
        schedule: str = "linear",
        method: str = "sparse_momentum",
        redistribute: str = "auto",
        until: float = 1.0,
    ) -> None:
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum is {momentum}: it must lie in [0, 1)")
        if not 0 <= prune_rate < 1:
            raise ValueError(f"prune_rate is {prune_rate}: it must lie in [0, 1)")
        if not 0 < until <= 1:
            raise ValueError(f"until is {until}: it must lie in (0, 1], a part of training")
        if schedule not in SCHEDULES:
            raise ValueError(f"unknown schedule {schedule!r}: accepted are {', '.join(SCHEDULES)}")
        self._pattern = patterns.parse(getattr(model, "pattern", "unstructured"))
        self._redistributes = check_method(method, redistribute, self._pattern)
        self._layers = smart_convs(model)
        if not self._layers:
            raise ValueError(f"{type(model).__name__} has no masked convolutions: make it with create_model or convert")
        self._coupled: CoupledLayers | None = None
        if isinstance(self._pattern, Coupled):
            self._coupled = CoupledLayers(self._layers, find_streams(model))
        self._keeps_overlap = getattr(model, "overlap", "independent") != "independent"
        self._optimizer = optimizer
        self._decay = momentum if METHODS[method].remembers else 0.0
        self._prune_rate = prune_rate
        self._schedule = SCHEDULES[schedule]
        self._until = until
        self._momentum: dict[str, dict[str, Tensor]] = {}
        if METHODS[method].moves:
            for name, layer in self._layers.items():
                layer.gradient_sinks = {path: torch.zeros_like(layer.weight.detach()) for path in PATHS}
                self._momentum[name] = {path: torch.zeros_like(layer.weight.detach()) for path in PATHS}

    def close(self) -> None:
        """Stops the layers from keeping effective-weight gradients."""
        for layer in self._layers.values():
            layer.gradient_sinks = {}

    def rate(self, progress: float) -> float:
        """The part of the live weights to move at ``progress``, in [0, 1], of training."""
        if not 0 <= progress <= 1:
            raise ValueError(f"progress is {progress}: it must lie in [0, 1], the part of training that is done")
        if not self._momentum or progress > self._until:
            return 0.0
        return self._prune_rate * self._schedule(progress / self._until)

    @torch.no_grad()
    def after_step(self) -> None:
        """Call after each optimizer step: takes in the gradients of the step, zeroes weights dead in both paths."""
        if self._momentum:
            momenta = list(self.state_dict().values())
            sinks = [self._layers[name].gradient_sinks[path] for name in self._momentum for path in PATHS]
            # Of all layers at once, as optimizers do: on a GPU in a few kernels.
            torch._foreach_mul_(momenta, self._decay)
            torch._foreach_add_(momenta, sinks)
            torch._foreach_zero_(sinks)
        for layer in self._layers.values():
            layer.weight.mul_(layer.union())

    @torch.no_grad()
    def rewire(self, progress: float) -> dict[str, int]:
        """Prunes and regrows; the number of ones in the masks of each path stays exactly the same.

        :func:`smart.rewire.moves.exchange` says what moves where. Layers whose masks are one for both paths move once,
        by the sum of both paths' momenta, and trade density among themselves only.

        A weight alive in the other path keeps its value when pruned or regrown in this one; others regrow from zero,
        but for coupled channels as :func:`smart.rewire.coupled.start_rows` says.

        Args:
            progress: the part of training that is done, in [0, 1].

        Returns:
            How many weights moved, per path.

        Raises:
            RuntimeError: the gradients held NaN or infinity.
        """
        moved = dict.fromkeys(PATHS, 0)
        if not (rate := self.rate(progress)):
            return moved
        if self._coupled is None:
            units, shares_mask = list(self._layers), lambda name: self._layers[name].shares_mask
            move = self._move_layers
        else:
            units, shares_mask = self._coupled.streams, self._coupled.shares_mask
            move = partial(self._move_streams, progress=progress)
        dedicated = [unit for unit in units if not shares_mask(unit)]
        shared = [unit for unit in units if shares_mask(unit)]
        for members, paths in ((dedicated, PATHS[:1]), (dedicated, PATHS[1:]), (shared, PATHS)):
            if members:
                for path, count in move(members, paths, rate).items():
                    moved[path] += count
        return moved

    def _move_layers(self, names: Sequence[str], paths: Sequence[str], rate: float) -> dict[str, int]:
        """Moves the masks of one path, or those that are one for both, in these layers."""
        turns = [self._turn(name, paths) for name in names]
        masks = MOVES[type(self._pattern)](turns, self._pattern, rate, self._redistributes)
        return self._set_masks({path: dict(zip(names, masks, strict=True)) for path in paths})

    def _move_streams(
        self, streams: Sequence[Stream], paths: Sequence[str], rate: float, progress: float
    ) -> dict[str, int]:
        """Moves the channels of one path, or those that are one for both, in these streams."""
        momenta = {name: self._momentum_of(name, paths) for name in self._layers}
        kept, regrown = move_streams(self._coupled, streams, paths, momenta, rate, self._keeps_overlap)
        masks = {path: {name: self._coupled.mask(name, kept[path]) for name in self._layers} for path in paths}
        for path in paths:
            # Drawn alike in all processes, and by a run that goes on.
            start_rows(self._coupled, regrown, masks[path], derive_seed("rows", progress, path))
        return self._set_masks(masks)

    def _set_masks(self, masks: Mapping[str, Mapping[str, Tensor]]) -> dict[str, int]:
        """Gives layers new masks, by path and name; returns how many weights each path drops."""
        moved = dict.fromkeys(masks, 0)
        for path, layers in masks.items():
            for name, mask in layers.items():
                moved[path] += int((self._layers[name].masks[path] & ~mask).count_nonzero())
                self._layers[name].set_mask(path, mask)
        for name in next(iter(masks.values())):
            # Before the other path's turn, so that what it regrows here finds nothing of what this path has dropped.
            layer = self._layers[name]
            layer.weight.mul_(layer.union())
            self._forget_dead(layer)
        return moved

    def _turn(self, name: str, paths: Sequence[str]) -> Turn:
        layer, momentum = self._layers[name], self._momentum_of(name, paths)
        (other,) = [path for path in PATHS if path not in paths] or [None]
        keeps = self._keeps_overlap and other is not None
        return Turn(layer.weight, momentum, layer.masks[paths[0]], layer.masks[other].clone() if keeps else None)

    def _momentum_of(self, name: str, paths: Sequence[str]) -> Tensor:
        momentum = sum(self._momentum[name][path] for path in paths)
        if not bool(momentum.isfinite().all()):
            raise RuntimeError(
                f"the gradients of path {paths[0]!r} hold NaN or infinity: lower the learning rate or clip them"
            )
        return momentum

    def _forget_dead(self, layer: SmartConv2d) -> None:
        """Clears the optimizer's memory of weights dead in both paths, which would move them when they regrow."""
        if self._optimizer is None:
            return
        dead = ~layer.union()
        for value in self._optimizer.state.get(layer.weight, {}).values():
            if isinstance(value, Tensor) and value.shape == dead.shape:
                value.masked_fill_(dead, 0)

    def state_dict(self) -> dict[str, Tensor]:
        """The momenta by "layer.path". The masks are part of the model's own state."""
        return {f"{name}.{path}": m for name, momentum in self._momentum.items() for path, m in momentum.items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes over what :meth:`state_dict` gave.

        Raises:
            ValueError: ``state`` is of another model or another method.
        """
        own = self.state_dict()
        if set(own) != set(state) or any(own[key].shape != state[key].shape for key in own):
            raise ValueError(
                "the rewirer's state does not fit: it must come from the same network with the same method"
            )
        for key, momentum in own.items():
            momentum.copy_(state[key])
