import pytest
import torch

from smart.seeds import derive_seed, seeded


def test_the_global_state_is_that_of_the_seed_and_then_put_back():
    before = torch.get_rng_state()
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.set_rng_state(before)
    with seeded(7, torch.device("cpu")):
        assert torch.equal(torch.rand(3), expected)
    assert torch.equal(torch.get_rng_state(), before)


def test_devices_that_are_not_put_back_are_not_seeded(monkeypatch):
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("all GPUs were seeded"))
    with seeded(7, torch.device("cpu")):
        pass


def test_other_parts_give_another_seed():
    assert derive_seed(0, "epoch", 1) == derive_seed(0, "epoch", 1) != derive_seed(0, "epoch", 2)
    assert 0 <= derive_seed("a") < 2**63
