"""The two packages together: every network of the zoo, swapped."""

import pytest
import torch
from torch import nn

import smart
import smart_kernels
from smart.twin import DenseTwin
from smart_kernels import native
from smart_kernels.modules import SparseConv2d


def settled(model):
    """Gives the norms statistics that differ by path, so that mixing them up would show."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.3)
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(std=0.3)
    return model.eval()


@pytest.mark.parametrize("name", smart.list_models())
def test_every_network_swaps_into_one_fused_graph(name):
    model = settled(smart.create_model(name, density=0.2))
    x = torch.rand(2, 3, 16, 16)
    sparse = smart_kernels.swap(model, x)
    assert sparse.uncaptured is None
    assert max(smart_kernels.verify(model, sparse, x).values()) < 1e-5
    convs = sum(isinstance(module, nn.Conv2d) for module in model.modules())
    assert len(sparse.report()) == convs == sum(isinstance(m, SparseConv2d) for m in sparse.modules())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in sparse.modules())


@pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))
def test_both_paths_take_less_memory_than_one_dense_copy():
    model = smart.create_model("resnet18", density=0.2)
    sparse = smart_kernels.swap(model, torch.rand(1, 3, 8, 8), backend="cpu")
    assert sparse.weight_bytes <= 0.60 * 4 * smart.nonzeros(model)["dense"]


def test_a_saved_network_is_small(tmp_path):
    model = smart.create_model("resnet18", density=0.2)
    file = tmp_path / "m.safetensors"
    smart_kernels.save(smart_kernels.swap(model, torch.rand(1, 3, 8, 8), backend="cpu"), file)
    dense = sum(p.numel() * 4 for p in model.parameters())
    assert file.stat().st_size <= 0.43 * dense


@pytest.mark.parametrize("path", ["clean", "adv", 0.3])
def test_the_dense_twin_computes_the_same(path):
    model = settled(smart.create_model("tiny", in_channels=1, density=0.3, mean=[0.3], std=[0.4]))
    x = torch.rand(3, 1, 8, 8)
    if isinstance(path, float):
        with pytest.raises(ValueError, match="named path"):
            DenseTwin(model, path)
        return
    twin = DenseTwin(model, path)
    torch.testing.assert_close(twin(x), model(x, path=path))
    assert not any(hasattr(module, "masks") or hasattr(module, "norms") for module in twin.modules())
