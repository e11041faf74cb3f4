"""Sparse learning at a fixed density: weights are pruned by magnitude and regrown where the gradient has momentum.

After Dettmers and Zettlemoyer, "Sparse Networks from Scratch" (arXiv 1907.04840), done for each path on its own; which
weights the paths share therefore changes as they train. That SMART does this is a reconstruction from its authors'
earlier code, not their word.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from smart.layers import SmartConv2d, smart_convs
from smart_kernels.paths import PATHS

SCHEDULES = ("linear", "cosine")
REGROW = ("momentum", "gradient", "none")


def check_pattern(pattern: str, regrow: str) -> None:
    """Raises ValueError where rewiring would break the pattern that a model's masks have."""
    if pattern != "unstructured" and regrow != "none":
        raise ValueError(
            f"the model's masks have pattern {pattern!r}, and rewiring moves single weights so far: train it with "
            "regrow='none', which leaves the masks as they are, or make it with pattern='unstructured'"
        )


class Rewirer:
    """Moves the masks of a model's convolutions while it trains; never touches biases, norms or the classifier.

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
        schedule: how that part falls to zero over training, ``"linear"`` or ``"cosine"``.
        regrow: ``"momentum"``; ``"gradient"``, the last step's alone (as in RigL, arXiv 1911.11134); or ``"none"``,
            static masks.

    Raises:
        ValueError: a setting outside what is accepted, a model without masked convolutions, or one whose masks have
            another pattern than unstructured, unless they are to be static.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        momentum: float = 0.9,
        prune_rate: float = 0.5,
        schedule: str = "linear",
        regrow: str = "momentum",
    ) -> None:
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum is {momentum}: it must lie in [0, 1)")
        if not 0 <= prune_rate < 1:
            raise ValueError(f"prune_rate is {prune_rate}: it must lie in [0, 1)")
        if schedule not in SCHEDULES:
            raise ValueError(f"unknown schedule {schedule!r}: accepted are {', '.join(SCHEDULES)}")
        if regrow not in REGROW:
            raise ValueError(f"unknown regrow {regrow!r}: accepted are {', '.join(REGROW)}")
        check_pattern(getattr(model, "pattern", "unstructured"), regrow)
        self._layers = smart_convs(model)
        if not self._layers:
            raise ValueError(f"{type(model).__name__} has no masked convolutions: make it with create_model or convert")
        self._optimizer = optimizer
        self._decay = momentum if regrow == "momentum" else 0.0
        self._prune_rate = prune_rate
        self._schedule = schedule
        self._momentum: dict[str, dict[str, Tensor]] = {}
        if regrow != "none":
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
        left = 1 - progress if self._schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
        return self._prune_rate * left

    @torch.no_grad()
    def after_step(self) -> None:
        """Call after each optimizer step: takes in the gradients of the step, zeroes weights dead in both paths."""
        for name, momentum in self._momentum.items():
            for path, sink in self._layers[name].gradient_sinks.items():
                momentum[path].mul_(self._decay).add_(sink)
                sink.zero_()
        for layer in self._layers.values():
            layer.weight.mul_(layer.union())

    @torch.no_grad()
    def rewire(self, progress: float) -> dict[str, int]:
        """Prunes and regrows each path; the number of ones in its masks together stays exactly the same.

        In each layer the ceil(rate * alive) live weights of smallest magnitude are pruned, but never the last one. As
        many are regrown over all layers, in proportion to the mean |momentum| of a layer's live weights, at the dead
        positions of largest |momentum|; what a full layer cannot take goes to the others. Only where no other dead
        position is left does a weight pruned here come back, largest first.

        A weight alive in the other path keeps its value when pruned or regrown in this one; others regrow from zero.

        Args:
            progress: the part of training that is done, in [0, 1].

        Returns:
            How many weights moved, per path.

        Raises:
            RuntimeError: the gradients held NaN or infinity.
        """
        rate = self.rate(progress)
        if not self._momentum or rate == 0:
            return dict.fromkeys(PATHS, 0)
        return {path: self._rewire_path(path, rate) for path in PATHS}

    def _rewire_path(self, path: str, rate: float) -> int:
        layers = list(self._layers.values())
        momenta = [self._momentum[name][path].abs().flatten() for name in self._layers]
        masks = [layer.masks[path].flatten() for layer in layers]
        alive = [int(mask.count_nonzero()) for mask in masks]
        removed = [min(math.ceil(rate * count), count - 1) if count else 0 for count in alive]
        shares = [float(m[mask].mean()) if count else 0.0 for m, mask, count in zip(momenta, masks, alive, strict=True)]
        if not all(math.isfinite(share) for share in shares):
            raise RuntimeError(
                f"the gradients of path {path!r} hold NaN or infinity: lower the learning rate or clip them"
            )
        if sum(shares) == 0:
            shares = [float(count) for count in removed]
        free = [mask.numel() - count for mask, count in zip(masks, alive, strict=True)]
        grown = apportion(sum(removed), shares, free)
        returned = apportion(sum(removed) - sum(grown), [float(count) for count in removed], removed)

        for i, layer in enumerate(layers):
            weight = layer.weight.abs().flatten()
            pruned = _first(weight, masks[i], removed[i])
            regrown = _first(-momenta[i], ~masks[i], grown[i])
            # `pruned` is sorted by magnitude: those that come back are at its end, and keep their values.
            mask = masks[i].clone()
            mask[pruned[: removed[i] - returned[i]]] = False
            mask[regrown] = True
            layer.set_mask(path, mask.view_as(layer.weight))
            # Before the other path's turn, so that what it regrows here finds nothing of what this path has dropped.
            layer.weight.mul_(layer.union())
            self._forget_dead(layer)
        return sum(removed) - sum(returned)

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
            ValueError: ``state`` is of another model or another ``regrow``.
        """
        own = self.state_dict()
        if set(own) != set(state) or any(own[key].shape != state[key].shape for key in own):
            raise ValueError(
                "the rewirer's state does not fit: it must come from the same network with the same regrow"
            )
        for key, momentum in own.items():
            momentum.copy_(state[key])


def _first(score: Tensor, among: Tensor, count: int) -> Tensor:
    """Indices (count,) of the smallest scores where ``among`` holds, in rising order; all flat. Ties: lowest index."""
    positions = torch.nonzero(among).flatten()
    return positions[torch.sort(score[positions], stable=True).indices[:count]]


def apportion(total: int, shares: Sequence[float], capacity: Sequence[int]) -> list[int]:
    """Splits ``total`` into whole parts in proportion to ``shares``, none above its capacity.

    What full parts cannot take is spread over the others in proportion again; parts whose shares are all zero are
    filled in proportion to the room left. The sum is min(total, sum of capacity).
    """
    given = [0] * len(capacity)
    left = min(total, sum(capacity))
    while left:
        room = {i: capacity[i] - given[i] for i in range(len(capacity)) if given[i] < capacity[i]}
        weights = {i: shares[i] for i in room}
        if sum(weights.values()) == 0:
            weights = {i: float(r) for i, r in room.items()}
        scale = left / sum(weights.values())
        exact = {i: weight * scale for i, weight in weights.items()}
        parts = {i: math.floor(e) for i, e in exact.items()}
        by_remainder = sorted(room, key=lambda i: parts[i] - exact[i])
        for i in by_remainder[: left - sum(parts.values())]:
            parts[i] += 1
        for i, part in parts.items():
            given[i] += min(part, room[i])
        left = min(total, sum(capacity)) - sum(given)
    return given
