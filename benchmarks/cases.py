"""What is measured: networks as the method's page fixes them, and the layers they are made of."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class NetworkCase:
    """A network of ``smart.list_models()`` on images (C, H, W), with random masks of one density on each path."""

    network: str
    image: tuple[int, int, int]
    density: float
    batches: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.network}, density {self.density}"


@dataclass(frozen=True)
class LayerCase:
    """A 3x3 convolution, padding 1, of ``channels`` to as many on maps of ``size`` x ``size`` pixels."""

    channels: int
    size: int
    batch: int
    density: float

    def __str__(self) -> str:
        return f"{self.channels}ch-{self.size}px-batch{self.batch}-d{self.density}"


SUITES: dict[str, list[NetworkCase]] = {
    "cpu": [
        NetworkCase("tiny", (1, 8, 8), 0.2, (1, 16)),
        *(
            NetworkCase(network, image, density, batches)
            for network, image in (("resnet34", (3, 32, 32)), ("wrn_16_8", (3, 32, 32)), ("wrn_40_2", (3, 96, 96)))
            for density, batches in ((0.1, (1,)), (0.2, (1, 16, 64)), (0.36, (1, 16)))
        ),
    ],
    "smoke": [NetworkCase("tiny", (1, 8, 8), 0.2, (1, 2))],
}

# The stages of ResNet-34 on 32x32 images.
LAYERS = [
    LayerCase(channels, size, batch, 0.2)
    for channels, size in ((64, 32), (128, 16), (256, 8), (512, 4))
    for batch in (1, 16)
]
