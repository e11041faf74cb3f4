"""Data sets by name, and readers of users' own images.

Each module here that registers a :class:`Dataset` is found by itself: a new one is a new file.
"""

import importlib
import pkgutil

from smart.datasets.base import DATASETS, Dataset, Splits

__all__ = ["DATASETS", "Dataset", "Splits"]

for _each in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_each.name}")
