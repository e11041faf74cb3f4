from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from small import make_data, make_model
from torch import Tensor

from smart.data import ImageData
from smart.layers import SmartNet


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def model() -> SmartNet:
    return make_model()


@pytest.fixture
def x() -> Tensor:
    return torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def y() -> Tensor:
    return torch.tensor([0, 1, 2, 0, 1, 2])


@pytest.fixture
def data() -> ImageData:
    return make_data()
