"""Whether data and a network go together."""

from __future__ import annotations

import torch

from smart.data import ImageData
from smart.layers import SmartNet
from smart.modes import eval_mode


def check_fit(model: SmartNet, data: ImageData) -> None:
    """Raises ValueError, or TypeError for other kinds of objects, unless ``model`` can be trained on ``data``."""
    if not isinstance(model, SmartNet):
        raise TypeError(f"model is a {type(model).__name__}: make it with smart.create_model or smart.convert")
    if not isinstance(data, ImageData):
        raise TypeError(f"data is a {type(data).__name__}: make it with smart.load_data or smart.ImageData")
    channels = data.image_shape[0]
    if channels != model.in_channels:
        raise ValueError(
            f"{data.name} has images of {channels} channels, the model takes {model.in_channels}: set in_channels"
        )
    if len(data.train[0]) < 4:
        raise ValueError(f"{data.name} has {len(data.train[0])} training images: give at least 4, two for each path")
    with eval_mode(model), torch.no_grad():
        logits = model(data.floats("train", 1).to(model.mean.device))
    if logits.dim() != 2 or logits.shape[1] < data.num_classes:
        raise ValueError(
            f"the model's output has shape (N, {', '.join(map(str, logits.shape[1:]))}), {data.name} has "
            f"{data.num_classes} classes: build it with num_classes={data.num_classes}"
        )
