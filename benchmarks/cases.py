"""What is measured: networks as the method's page fixes them, and the layers they are made of."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise


@dataclass(frozen=True)
class NetworkCase:
    """A network of ``smart.list_models()`` on images (C, H, W), with random masks of one density on each path.

    Attributes:
        backend: that layers run on where they can, whether it is the fastest or not; None for the run's.
    """

    network: str
    image: tuple[int, int, int]
    density: float
    batches: tuple[int, ...]
    pattern: str = "unstructured"
    dtype: str = "float32"
    backend: str | None = None

    def __str__(self) -> str:
        parts = [self.network] + [f"{self.pattern}"] * (self.pattern != "unstructured")
        return ", ".join([*parts, f"density {self.density}"])


@dataclass(frozen=True)
class LayerCase:
    """A convolution of ``taps`` x ``taps`` on maps of ``size`` x ``size`` pixels."""

    inputs: int
    outputs: int
    taps: int
    stride: int
    size: int
    batch: int = 1
    density: float = 0.2
    groups: int = 1

    def __str__(self) -> str:
        shape = f"{self.inputs}to{self.outputs}-{self.taps}x{self.taps}-stride{self.stride}-{self.size}px"
        groups = f"-groups{self.groups}" if self.groups > 1 else ""
        return f"{shape}{groups}-batch{self.batch}-d{self.density}"

    @property
    def multiplications_per_weight(self) -> int:
        """How often each weight is used, padding included."""
        return self.batch * (self.size // self.stride) ** 2


SUITES: dict[str, list[NetworkCase]] = {
    "cpu": [
        NetworkCase("tiny", (1, 8, 8), 0.2, (1, 16)),
        *(
            NetworkCase(network, image, density, batches)
            for network, image in (("resnet34", (3, 32, 32)), ("wrn_16_8", (3, 32, 32)), ("wrn_40_2", (3, 96, 96)))
            for density, batches in ((0.1, (1,)), (0.2, (1, 16, 64)), (0.36, (1, 16)))
        ),
    ],
    # What counts most comes first: a run is stopped by its time limit.
    "gpu": [
        NetworkCase(network, image, density, batches, pattern, "float16", backend)
        for batches in ((256,), (1, 16))
        for pattern, density, backend in (
            ("block:64x16", 0.2, None),
            ("coupled:16", 0.2, None),
            ("channel", 0.2, None),
            ("unstructured", 1.0, None),
            # Sparse tensor cores, which keep half of all slots, whatever of them is used.
            ("2:4", 0.5, "cuda"),
            ("unstructured", 0.2, "cuda"),
        )
        for network, image in (("resnet34", (3, 32, 32)), ("wrn_16_8", (3, 32, 32)), ("wrn_40_2", (3, 96, 96)))
    ],
    "smoke": [NetworkCase("tiny", (1, 8, 8), 0.2, (1, 2))],
}

DEVICES = {"gpu": "cuda"}  # of suites; that of others is the CPU

# Of each network of the suites: its image's size, and the channels its stages begin and end with.
_STAGES = {
    "resnet34": (32, (64, 64, 128, 256, 512)),
    "wrn_16_8": (32, (16, 128, 256, 512)),
    "wrn_40_2": (96, (16, 32, 64, 128)),
}


def layers_of(network: str) -> list[LayerCase]:
    """The distinct convolutions of a network: the dense stem, and what each stage begins and goes on with.

    A stage that changes the number of channels begins with a 3x3 convolution beside a 1x1 shortcut.
    """
    size, channels = _STAGES[network]
    layers = [LayerCase(3, channels[0], 3, 1, size, density=1.0)]
    for stage, (inputs, outputs) in enumerate(pairwise(channels)):
        stride = 2 if stage else 1
        if inputs != outputs:
            layers += [LayerCase(inputs, outputs, taps, stride, size) for taps in (3, 1)]
        size //= stride
        layers.append(LayerCase(outputs, outputs, 3, 1, size))
    return layers


LAYERS = [
    replace(layer, batch=batch)
    for layer in dict.fromkeys(layer for network in _STAGES for layer in layers_of(network))
    for batch in (1, 16)
]
