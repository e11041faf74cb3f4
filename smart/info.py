"""What is installed, what this machine is, and which backends it runs."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

from smart.allocation import ALLOCATIONS
from smart.config import DIAL, LR_SCHEDULES, REWIRE_UNITS
from smart.datasets import DATASETS
from smart.layer_policy import LAYER_WORDS
from smart.masks import OVERLAPS
from smart.methods import METHODS
from smart.models import list_models
from smart.peers import PEERS, missing
from smart.results import machine
from smart.rewire import METHODS as REWIRE
from smart.rewire import REDISTRIBUTE, SCHEDULES
from smart.text import align
from smart.version import __version__
from smart_kernels import native
from smart_kernels.backends import BACKENDS
from smart_kernels.patterns import SPELLINGS

OPTIONAL = {
    "scikit-learn": "the digits of smart demo",
    "scipy": "SVHN",
    "pillow": "folders of images and Tiny-ImageNet",
    "matplotlib": "pictures",
    "triton": "the GPU kernels",
    "pyautoattack": "AutoAttack",
    "onnxruntime": "smart bench",
    "openvino": "smart bench",
    "ncnn": "smart bench",
}
WORDS = {
    "method": ", ".join(METHODS),
    "pattern": SPELLINGS,
    "allocation": ", ".join(ALLOCATIONS),
    "overlap": f"{', '.join(OVERLAPS)}, or a fraction",
    "masked_layers": f"{', '.join(word for word in LAYER_WORDS if word != 'none')}, names, regular expressions",
    "dedicated_layers": f"{', '.join(LAYER_WORDS)}, names, regular expressions",
    "rewire": ", ".join(REWIRE),
    "redistribute": ", ".join(REDISTRIBUTE),
    "rewire_unit": ", ".join(REWIRE_UNITS),
    "prune_schedule": ", ".join(SCHEDULES),
    "lr_schedule": ", ".join(LR_SCHEDULES),
    "dial": ", ".join(DIAL),
}


def describe() -> str:
    """The text of `smart info`."""
    about = machine()
    facts = [
        ("smart", f"{__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}"),
        ("torch", f"{torch.__version__}, {torch.get_num_threads()} threads"),
        ("processor", f"{about['cpu']}; instruction sets used: {', '.join(about['isa']) or 'none'}"),
        ("GPU", about["gpu"] or "none that torch sees"),
        ("models", ", ".join(list_models())),
        ("data sets", ", ".join(DATASETS)),
        ("peers", ", ".join(name for name in PEERS if not missing(name))),
    ]
    verdicts = {name: backend.available().why for name, backend in BACKENDS.items()}
    verdicts["cuda kernels"] = native.cuda_missing() or ""
    backends = [(name, f"no: {why}" if why else "yes") for name, why in verdicts.items()]
    packages = [(name, _version(name) or f"not installed, it serves {use}") for name, use in OPTIONAL.items()]
    sections = [align(facts, left=2)]
    for title, rows in (("Backends that load", backends), ("Optional packages", packages)):
        sections.append(f"{title}\n{align(rows, indent=2, left=2)}")
    sections.append(
        f"Words that training takes (docs/methods.md, docs/masks.md)\n{align(list(WORDS.items()), indent=2, left=2)}"
    )
    return "\n\n".join(sections)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
