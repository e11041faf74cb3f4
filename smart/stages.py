"""The stages of a network, in which its layers follow one another: what layer policies and the stage dial go by."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn


def find_stages(net: nn.Module) -> list[str]:
    """Names of the modules that are the stages of ``net``: the children of ``.stages``, or ``.layer1``, ``.layer2`` ...

    A network that has neither has no stages: an empty list.
    """
    stages = getattr(net, "stages", None)
    if isinstance(stages, (nn.Sequential, nn.ModuleList)):
        return [f"stages.{name}" for name, _ in stages.named_children()]
    return [name for name, _ in net.named_children() if name.startswith("layer") and name[5:].isdecimal()]


def stage_of_each(net: nn.Module, stages: Sequence[str]) -> dict[str, int]:
    """The stage, from 0, that each module of ``net`` belongs to, by name.

    What is registered before the first stage belongs to the first, all else outside the stages to the one before it.

    Args:
        stages: names of modules, in the order they run.

    Raises:
        ValueError: one of them is not there.
    """
    names = [name for name, _ in net.named_modules()]
    for stage in stages:
        if stage not in names:
            raise ValueError(f"there is no module {stage!r} that could be a stage: give names as in named_modules()")
    found, current = {}, 0
    for name in names:
        inside = [i for i, stage in enumerate(stages) if name == stage or name.startswith(f"{stage}.")]
        current = inside[-1] if inside else current
        found[name] = current
    return found
