"""What networks do in a graph beside calling layers, and what torch does to calls of a swapped network."""

import pytest
import torch
from networks import sparsify, why
from torch import nn

import smart_kernels
from smart_kernels import native, swap, verify


@pytest.fixture
def images():
    return torch.rand(3, 2, 9, 9)


class ReadsAWeight(nn.Module):
    """Can be captured, and uses one layer's weight beside calling it."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3)

    def forward(self, x):
        return self.b(self.a(x)) + self.a.weight.sum()


def test_a_layer_whose_weight_the_network_reads_is_left_alone(images):
    model = sparsify(ReadsAWeight())
    sparse = swap(model, images)
    assert sparse.uncaptured is None
    assert why(sparse, "a").startswith("left as it was: the network also uses its weight")
    assert "left" not in why(sparse, "b")
    verify(model, sparse, images)


class MakesTensors(nn.Module):
    """Tensors that are neither parameters nor buffers, one of them made at each call."""

    def __init__(self):
        super().__init__()
        self.conv, self.mean = nn.Conv2d(2, 4, 3), torch.rand(1, 2, 1, 1)

    def forward(self, x):
        return self.conv(x - self.mean) + torch.arange(4.0)[:, None, None] * torch.tensor(0.5)


def test_tensors_made_in_forward_are_part_of_the_graph(images, tmp_path):
    model = sparsify(MakesTensors())
    sparse = swap(model, images)
    assert sparse.uncaptured is None
    verify(model, sparse, torch.rand(1, 2, 12, 9))
    smart_kernels.save(sparse, tmp_path / "m.safetensors")
    verify(model, smart_kernels.load(tmp_path / "m.safetensors"), images)


def test_layers_of_complex_numbers_are_left_alone(images):
    class Spectrum(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 1, dtype=torch.complex64)

        def forward(self, x):
            return self.b(self.a(x).to(torch.complex64)).abs()

    model = sparsify(Spectrum())
    sparse = swap(model, images)
    assert "complex64" in why(sparse, "b")
    verify(model, sparse, images)


@pytest.mark.skipif(native.missing() is not None, reason="the C++ kernels are not built")
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_programs_step_aside_where_torch_transforms_the_call(images):
    model = sparsify(nn.Sequential(nn.Conv2d(2, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU()))
    sparse = swap(model, images, backend="cpu")
    sparse.runs_programs = True
    expected = model(images)
    torch.testing.assert_close(torch.vmap(lambda x: sparse(x[None])[0])(images), expected)
    torch.testing.assert_close(torch.jit.trace(sparse, images)(images), expected)
