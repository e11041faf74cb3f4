"""What the studies train: one network, one recipe, and in each case one choice made differently."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

import smart
from smart import ImageData, TrainConfig
from smart.layers import SmartNet
from smart.models import ResNet

WIDTHS = (16, 32, 64)
NETWORK = f"ResNet of 3 basic blocks, {', '.join(map(str, WIDTHS))} channels, each of stride 2"
# Every choice that a case does not make is the same in all: the standard of the method's page.
DENSITY = 0.2
# With a dense first stage, the part of the other two that leaves as many weights as DENSITY of all three.
LAST_STAGES_DENSITY = 0.1457

RECIPE = TrainConfig(
    epochs=3,
    batch_size=128,
    lr=0.1,
    eps=0.1,
    attack_step=0.025,
    attack_steps=5,
    val_attack_steps=10,
    rewire_every=20,
    rewire_unit="steps",
    crop_padding=0,
    flip=True,
)
# Images of each split, drawn class by class; fewer where the data has fewer.
IMAGES = {"train": 8_000, "val": 400, "test": 600}
ATTACKS = ("clean", "pgd20", "pgd20-cw")


@dataclass(frozen=True)
class StudyCase:
    """A way to train the network.

    Attributes:
        name: in tables.
        method: of :mod:`smart.methods`.
        masks: choices of :func:`smart.convert`.
        training: fields of the recipe that differ.
    """

    name: str
    method: str = "smart"
    masks: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)

    def config(self, seed: int) -> TrainConfig:
        """The recipe, with what this case changes."""
        return TrainConfig(**{**RECIPE.to_dict(), **self.training, "seed": seed})

    def model(self, data: ImageData, seed: int) -> SmartNet:
        """The network for such images; weights and masks follow from the seed. Its stem is dense."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            net = ResNet((1, 1, 1), data.num_classes, data.image_shape[0], WIDTHS, (2, 2, 2))
        model = smart.convert(
            net,
            filter_fn=lambda _, layer: layer != "conv1",
            seed=seed,
            mean=data.mean,
            std=data.std,
            method=self.method,
            **self.masks,
        )
        # In this layout the same convolutions take 0.6 of the time.
        return model.to(memory_format=torch.channels_last)


SMART = StudyCase("SMART, density 0.2", masks={"density": DENSITY})
_HALF = {"density": 0.5}


def _mask(name: str, **masks: Any) -> StudyCase:
    return StudyCase(name, masks={**SMART.masks, **masks})


@dataclass(frozen=True)
class Study:
    """Cases to set beside each other; the first is what the others are compared with."""

    title: str
    cases: tuple[StudyCase, ...]


STUDIES: dict[str, Study] = {
    "methods": Study(
        "Methods",
        (
            SMART,
            StudyCase("SMART, density 0.1", masks={"density": 0.1}),
            StudyCase("FLOATS, density 0.2", "floats", {"density": DENSITY}),
            StudyCase("dense, two batch norms", "dual_bn"),
            StudyCase("dense, PGD-AT", "pgd_at"),
        ),
    ),
    "overlap": Study(
        "Overlap of the two masks, density 0.2",
        (SMART, _mask("shared", overlap="shared"), _mask("disjoint", overlap="disjoint")),
    ),
    "layers": Study(
        "Which layers have masks, as many weights a path",
        (
            SMART,
            _mask("masks of their own in the last two stages", dedicated_layers="last_stages"),
            _mask("masks in the last two stages", masked_layers="last_stages", density=LAST_STAGES_DENSITY),
        ),
    ),
    "patterns at 0.5": Study(
        "Patterns, density 0.5",
        (
            _mask("unstructured, 0.5", **_HALF),
            _mask("2:4", pattern="2:4", **_HALF),
            _mask("blocks of 8x8, 0.5", pattern="block:8x8", **_HALF),
            _mask("channels, 0.5", pattern="channel", **_HALF),
        ),
    ),
    "patterns at 0.2": Study(
        "Patterns, density 0.2",
        (SMART, _mask("blocks of 8x8, 0.2", pattern="block:8x8"), _mask("channels, 0.2", pattern="channel")),
    ),
    "learning": Study(
        "How masks learn, density 0.2",
        (
            SMART,
            StudyCase("sparse momentum, layers keep their density", "smart", SMART.masks, {"redistribute": "none"}),
            StudyCase("RigL", "smart", SMART.masks, {"rewire": "rigl"}),
            StudyCase("static", "smart", SMART.masks, {"rewire": "static"}),
        ),
    ),
    "dial": Study(
        "How the dial is trained, density 0.2",
        (SMART, StudyCase("SMART, dial trained", "smart", SMART.masks, {"dial": "sampled"})),
    ),
    "channels": Study(
        "Whole channels, density 0.2: drawn for each layer, and coupled",
        (
            SMART,
            _mask("channels, 0.2", pattern="channel"),
            StudyCase("channels, 0.2, static", "smart", {**SMART.masks, "pattern": "channel"}, {"rewire": "static"}),
            _mask("coupled, 0.2", pattern="coupled"),
            StudyCase("coupled, 0.2, static", "smart", {**SMART.masks, "pattern": "coupled"}, {"rewire": "static"}),
        ),
    ),
}
CASES: dict[str, StudyCase] = {case.name: case for study in STUDIES.values() for case in study.cases}
