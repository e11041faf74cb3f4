"""What a run keeps to go on from: the network, and what the optimizer and the rewirer remember."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from smart.checkpoint import CheckpointError, load_into, read_checkpoint, save_checkpoint
from smart.layers import SmartNet
from smart.rewire import Rewirer


def save_state(
    file: Path,
    model: SmartNet,
    optimizer: torch.optim.Optimizer,
    rewirer: Rewirer | None,
    metadata: Mapping[str, Any],
) -> None:
    """Writes a checkpoint that :func:`load_state` goes on from, and that is one of the network as well."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    velocity = {
        names[parameter]: state["momentum_buffer"]
        for parameter, state in optimizer.state.items()
        if state.get("momentum_buffer") is not None
    }
    tensors = {"optimizer": velocity, "rewirer": rewirer.state_dict() if rewirer is not None else {}}
    save_checkpoint(file, model, metadata, tensors)


def load_state(
    file: Path, model: SmartNet, optimizer: torch.optim.Optimizer, rewirer: Rewirer | None
) -> dict[str, Any]:
    """Puts all back as it was saved; returns the metadata.

    Raises:
        CheckpointError: the file is damaged, of another network, or holds no training state.
    """
    metadata, groups = read_checkpoint(file)
    if "history" not in metadata:
        raise CheckpointError(f"{file} holds no training state: resume from the last.safetensors of a run")
    load_into(model, file)
    parameters: dict[str, nn.Parameter] = dict(model.named_parameters())
    for name, buffer in groups.get("optimizer", {}).items():
        parameter = parameters[name]
        optimizer.state[parameter]["momentum_buffer"] = torch.empty_like(parameter.detach()).copy_(buffer)
    if rewirer is not None:
        rewirer.load_state_dict(groups.get("rewirer", {}))
    return metadata
