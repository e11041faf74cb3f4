"""The commands of `smart`.

Each is a module of this package with two functions: ``add_flags(parser)``; and ``run(args)``, which reads the
arguments, calls the library, prints, and says where files went.
"""

from __future__ import annotations

import importlib
from types import ModuleType

# What each does, in the order of --help.
COMMANDS = {
    "train": "train a two-path network, or a baseline to compare it with",
    "eval": "accuracy of a checkpoint's paths, clean and attacked",
    "curve": "accuracy of a checkpoint's paths against the radius of the attack",
    "dial": "the trade-off curve of a checkpoint: accuracy and robustness at every position of its dials",
    "sanity": "check whether a checkpoint's robustness can be believed, or gradients are masked",
    "methods": "train a network by several methods, test each alike, and set them beside each other",
    "compare": "runs beside each other: accuracy, robustness, non-zero weights, multiplications",
    "swap": "turn a checkpoint into a network that skips its zeros",
    "export": "write a swapped network as a program that runs without its code",
    "verify": "compare a swapped network with its checkpoint, clean and attacked",
    "bench": "latency of a swapped network beside dense ones",
    "info": "versions, this machine, and which backends load",
    "demo": "train, swap, verify and measure a small network on real images, in a few minutes",
}


def module(name: str) -> ModuleType:
    """The module of a command."""
    return importlib.import_module(f"{__name__}.{name}")
