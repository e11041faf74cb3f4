import copy

import pytest
import torch
from networks import DualNorm, MaskedConv, TwoPaths
from torch import nn

import smart_kernels
from smart_kernels import dense_twin, native, paths, swap
from smart_kernels.modules import PathAffine, PerPathTensors, SparseConv2d
from smart_kernels.packing import PackedWeight
from smart_kernels.twin import single_path
from smart_kernels.verify import relative_error

BACKENDS = ["dense", *(["cpu"] if native.missing() is None else [])]
OURS = (SparseConv2d, PathAffine, PerPathTensors, PackedWeight)
TOLERANCE = 1e-5


@pytest.fixture
def images():
    return torch.rand(5, 1, 9, 9)


class Paddings(nn.Module):
    """Layers whose padding no single argument of nn.Conv2d expresses, and a fully connected one with zeros."""

    def __init__(self):
        super().__init__()
        self.even = nn.Conv2d(1, 4, 4, padding="same", padding_mode="reflect")
        self.zeros = nn.Conv2d(4, 4, (2, 3), padding="same", bias=False)
        self.circular = nn.Conv2d(4, 8, 3, padding=(1, 2), padding_mode="circular", stride=2, groups=2)
        self.replicate = nn.Conv2d(8, 8, 3, padding=1, dilation=2, padding_mode="replicate")
        self.norm = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 3)
        with torch.no_grad():
            for layer in (self.even, self.zeros, self.circular, self.replicate, self.fc):
                layer.weight.mul_(torch.rand_like(layer.weight) < 0.3)

    def forward(self, x):
        x = torch.relu(self.circular(torch.relu(self.zeros(self.even(x)))))
        return torch.relu(self.fc(self.norm(self.replicate(x)).mean((2, 3))))


class Twice(nn.Module):
    """One layer used twice, with other norms behind it."""

    def __init__(self):
        super().__init__()
        self.first, self.layer = MaskedConv(1, 8, 3, padding=1), MaskedConv(8, 8, 3, padding=1)
        self.one, self.two = DualNorm(8), DualNorm(8)

    def forward(self, x):
        x = self.first(x)
        return self.two(self.layer(torch.relu(self.one(self.layer(x))))).flatten(1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("path", ["clean", "adv", 0.3, 1])
def test_a_dense_twin_computes_the_same_in_plain_layers(model, images, backend, path):
    sparse = swap(model, images, backend=backend)
    twin = dense_twin(sparse, path)
    for x in (images, torch.rand(2, 1, 14, 11)):
        assert relative_error(twin(x), sparse(x, path=path)) < TOLERANCE
    assert not any(isinstance(module, OURS) for module in twin.modules())


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_the_input_are_those_of_the_original(model, images, backend):
    sparse, gradients = swap(model, images, backend=backend), []
    for run in (dense_twin(sparse, "adv"), lambda x: model(x, path="adv")):
        x = images.clone().requires_grad_()
        run(x).square().sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("network", [Paddings, Twice])
def test_twins_of_unusual_networks(images, backend, network):
    sparse = swap(network().eval(), images, backend=backend)
    for path in sparse.paths:
        assert relative_error(dense_twin(sparse, path)(images), sparse(images, path=path)) < TOLERANCE


def test_layers_left_alone_still_run_the_twins_path(model, images):
    model.layers[0].conv1.register_forward_hook(lambda module, inputs, output: output + 1)
    model.bn.norms["clean"] = nn.BatchNorm2d(16, track_running_stats=False)
    sparse = swap(model, images)
    for path in ("clean", "adv", 0.4):
        twin = dense_twin(sparse, path)
        assert relative_error(twin(images), sparse(images, path=path)) < TOLERANCE
    assert paths.current() == "clean"


def test_a_twin_stands_alone(model, images):
    sparse = swap(model, images)
    twin, before = dense_twin(sparse, "adv"), sparse(images, path="adv")
    expected = twin(images)
    assert not twin.train().training and not any(module.training for module in twin.modules())
    assert not any(parameter.requires_grad for parameter in twin.parameters())
    assert torch.equal(copy.deepcopy(twin)(images), expected)
    with torch.no_grad():
        for tensor in (*twin.parameters(), *twin.buffers()):
            tensor.zero_()
    assert torch.equal(sparse(images, path="adv"), before)


def test_a_twin_of_a_loaded_network(images, tmp_path):
    sparse = swap(TwoPaths().eval(), images)
    smart_kernels.save(sparse, tmp_path / "m.safetensors")
    twin = dense_twin(smart_kernels.load(tmp_path / "m.safetensors"), "adv")
    assert relative_error(twin(images), sparse(images, path="adv")) < TOLERANCE


def test_a_twin_in_half_precision(images):
    sparse = swap(TwoPaths().eval(), images, dtype=torch.bfloat16)
    twin = dense_twin(sparse, "adv")
    assert twin(images.bfloat16()).dtype == torch.bfloat16
    assert relative_error(twin(images.bfloat16()), sparse(images.bfloat16(), path="adv")) < 0.1


def test_what_has_no_twin_is_refused(model, images):
    with pytest.raises(TypeError, match=r"a TwoPaths was given: a swapped network is needed, from smart_kernels.swap"):
        dense_twin(model)
    with pytest.raises(ValueError, match="unknown path 'robust'"):
        dense_twin(swap(model, images), "robust")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("path", ["clean", "adv", 0.3])
def test_a_single_path_holds_its_own_weights_only(images, backend, path):
    sparse = swap(TwoPaths().eval(), images, backend=backend)
    single = single_path(sparse, path)
    assert single.paths == (path if isinstance(path, str) else "clean",)
    assert relative_error(single(images, path=single.paths[0]), sparse(images, path=path)) < TOLERANCE
    both = sum(packed.nbytes for packed in sparse.modules() if isinstance(packed, PackedWeight))
    alone = sum(packed.nbytes for packed in single.modules() if isinstance(packed, PackedWeight))
    assert alone < (0.65 if isinstance(path, str) else 1.01) * both
    held = {tensor.untyped_storage().data_ptr() for tensor in sparse.buffers()}
    assert not held & {tensor.untyped_storage().data_ptr() for tensor in single.buffers()}


def test_a_layer_used_twice_stays_one_weight(images):
    sparse = swap(Twice().eval(), images, backend=BACKENDS[-1])
    single = single_path(sparse, "adv")
    assert relative_error(single(images, path="adv"), sparse(images, path="adv")) < TOLERANCE
    layers = [module for module in single.modules() if isinstance(module, SparseConv2d)]
    assert len(layers) == 3 and len({id(layer.packed) for layer in layers}) == 2


def test_a_network_that_reads_the_path_itself_keeps_all_paths(images):
    sparse = swap(TwoPaths(control_flow=True).eval(), images)
    single = single_path(sparse, 0.3)
    assert single is not sparse and single.paths == sparse.paths
    assert torch.equal(single(images, path=0.3), sparse(images, path=0.3))
