"""A swapped network and its exported program, for every test that asks for them."""

import pytest
import torch
from emulated_operators import on_any_device, tiles_run  # noqa: F401
from exporting import BACKENDS
from networks import TwoPaths

from smart_kernels import export, swap


@pytest.fixture
def images():
    return torch.rand(4, 1, 9, 9)


@pytest.fixture(params=[False, True], ids=["graph", "module by module"])
def model(request):
    return TwoPaths(control_flow=request.param).eval()


@pytest.fixture
def sparse(images):
    return swap(TwoPaths().eval(), images, backend=BACKENDS[-1])


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """A network and its program of both paths."""
    torch.manual_seed(0)
    images, file = torch.rand(4, 1, 9, 9), tmp_path_factory.mktemp("exported") / "net.pt2"
    sparse = swap(TwoPaths().eval(), images, backend=BACKENDS[-1])
    export(sparse, images, file)
    return sparse, file
