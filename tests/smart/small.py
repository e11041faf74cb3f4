"""Networks and data that train in a second, and comparisons of states."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from smart.config import TrainConfig
from smart.conversion import convert
from smart.data import ImageData
from smart.layers import DualBatchNorm2d, SmartNet
from smart.train import train


def make_net(dropout: float = 0.0) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Conv2d(8, 6, 3, stride=2),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 3),
    )


def make_model(density: float | None = 0.4, dropout: float = 0.0, seed: int = 0, **options: object) -> SmartNet:
    """A two-path network whose norms differ between the paths, in eval mode."""
    torch.manual_seed(seed)
    model = convert(make_net(dropout), density, seed=seed, **options)
    for module in model.modules():
        if isinstance(module, DualBatchNorm2d):
            for norm in module.norms.values():
                nn.init.uniform_(norm.weight, 0.5, 1.5)
                nn.init.normal_(norm.bias)
                norm.running_mean.normal_()
                norm.running_var.uniform_(0.5, 2)
    return model.eval()


def make_trained() -> SmartNet:
    """A two-path network that tells the classes of :func:`make_data` apart on both paths."""
    torch.manual_seed(0)
    net = make_net()
    # Rows tell the classes apart, so they must not be averaged away.
    net[7], net[9] = nn.Identity(), nn.Linear(54, 3)
    model = convert(net, 0.4, seed=0)
    config = TrainConfig(
        epochs=10, batch_size=16, lr=0.05, attack_steps=2, val_attack_steps=1, crop_padding=0, flip=False
    )
    train(model, make_data(96), config, progress=False)
    return model.eval()


def make_data(count: int = 48) -> ImageData:
    """Three classes of 1x8x8 images, bright in different rows."""
    generator = torch.Generator().manual_seed(2)
    labels = torch.arange(count) % 3
    images = 0.4 * torch.rand(count, 1, 8, 8, generator=generator)
    for i, label in enumerate(labels.tolist()):
        images[i, 0, 2 * label : 2 * label + 3] += 0.5
    held_out = (images[:12], labels[:12])
    return ImageData("stripes", ["top", "middle", "bottom"], (images, labels), held_out, held_out)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_same_state(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert torch.equal(value, second[key]), key
