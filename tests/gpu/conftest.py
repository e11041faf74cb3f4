"""Tests of what only a GPU can show. Elsewhere they are skipped."""

import pytest
import torch


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.path.parts:
            item.add_marker(pytest.mark.skip(reason="this needs an NVIDIA GPU, and torch sees none"))
