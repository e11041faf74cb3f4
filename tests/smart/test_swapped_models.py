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


STAGED = {
    "tiny": ("adv", "clean", "adv"),
    "wrn_16_8": ("clean", "adv", 0.5),
    "resnet18": ("clean", "clean", "adv", "adv"),
}


@pytest.mark.parametrize("programs", [False, True], ids=["layers", "programs"])
@pytest.mark.parametrize("name", STAGED)
def test_each_stage_of_a_swapped_network_runs_on_its_own_path(name, programs, tmp_path):
    """In a pre-activation network the first norm of a stage is in the epilogue of the stage before."""
    model = settled(smart.create_model(name, in_channels=1, density=0.3))
    x = torch.rand(3, 1, 8, 8)
    sparse = smart_kernels.swap(model, x, backend="cpu" if programs else "dense", measure=False)
    sparse.runs_programs = programs
    file = tmp_path / "m.safetensors"
    smart_kernels.save(sparse, file)
    loaded = smart_kernels.load(file)
    with torch.no_grad():
        for path in (STAGED[name], STAGED[name][::-1], list(STAGED[name])):
            expected = model(x, path=path)
            twin = smart_kernels.dense_twin(sparse, path)
            for network in (sparse, loaded, twin):
                y = network(x) if network is twin else network(x, path=path)
                torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(sparse(x, path=STAGED[name]), sparse(x, path="adv"), rtol=1e-2)
    with pytest.raises(ValueError, match=f"a sequence of 2, one for each stage of the network: it has {model.stages}"):
        sparse(x, path=("clean", "adv"))


def test_each_stage_of_a_network_that_is_no_graph_runs_on_its_own_path():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer1 = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4))
            self.layer2 = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))

        def forward(self, x):
            return self.layer2(self.layer1(x)) if float(x.sum()) > 0 else x

    model = settled(smart.convert(Branching(), 0.5))
    x = torch.rand(2, 1, 8, 8)
    sparse = smart_kernels.swap(model, x, measure=False)
    assert sparse.uncaptured and sparse.stages == 2
    with torch.no_grad():
        for path in (("clean", "adv"), ("adv", "clean")):
            torch.testing.assert_close(sparse(x, path=path), model(x, path=path), rtol=1e-4, atol=1e-5)


def test_a_norm_of_another_stage_is_not_folded_into_a_convolution():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3))
    model = settled(smart.convert(net, 0.5, stages=["0", "1"]))
    x = torch.rand(2, 1, 8, 8)
    sparse = smart_kernels.swap(model, x, measure=False)
    with torch.no_grad():
        torch.testing.assert_close(sparse(x, path=("clean", "adv")), model(x, path=("clean", "adv")))
        torch.testing.assert_close(sparse(x, path="adv"), model(x, path="adv"))


@pytest.mark.parametrize("format", ["pt2", "onnx"])
def test_a_program_of_a_path_for_each_stage(format, tmp_path):
    if format == "onnx":
        pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    model = settled(smart.create_model("tiny", in_channels=1, density=0.3))
    x, path = torch.rand(2, 1, 8, 8), ("adv", "clean", "clean")
    sparse = smart_kernels.swap(model, x, measure=False)
    file = tmp_path / f"m.{format}"
    errors = smart_kernels.export(sparse, x, file, path, format)
    assert list(errors) == ["adv, clean, clean"] and max(errors.values()) < 1e-4
    if format == "pt2":
        program = smart_kernels.load_exported(file)
        with torch.no_grad():
            torch.testing.assert_close(program(x), model(x, path=path), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(program(x, path), program(x))
        with pytest.raises(ValueError, match="was exported for path"):
            program(x, "adv")
