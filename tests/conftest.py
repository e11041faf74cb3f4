import pytest
import torch
from hypothesis import settings

settings.register_profile("repeatable", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def poisoned():
    """Every tensor torch allocates is filled with NaN, so that an output never written shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.isnan(torch.empty(64)).all()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def fresh_compiler():
    """Forgets what other tests compiled: torch refuses to compile the same code more than a few times."""
    torch._dynamo.reset()
