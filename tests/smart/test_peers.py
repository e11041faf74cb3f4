import importlib.machinery
import importlib.metadata
import importlib.util
import sys
import types

import numpy as np
import pytest
import torch
from recorded_graphs import Recorder
from torch import nn

import smart
from smart import peers
from smart.peers import PEERS, runtimes
from smart.peers.ready import fastest
from smart.twin import dense_twin_of
from smart_kernels import cuda_graphs
from smart_kernels.verify import TOLERANCE, relative_error


@pytest.fixture(scope="module")
def net():
    return dense_twin_of(smart.create_model("tiny", in_channels=3, density=0.2).eval(), "clean")


@pytest.fixture
def absent(monkeypatch):
    """Makes packages look as if all but some were installed."""

    def hide(*packages):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in packages else name)

    return hide


def there(name):
    if why := peers.missing(name):
        pytest.skip(why)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", PEERS)
def test_a_peer_computes_what_the_network_does(net, name, batch):
    there(name)
    first, second = torch.rand(2, batch, 3, 8, 8)
    with torch.inference_mode():
        ready = peers.make(name, net, first)
        for x in (first, second, second.contiguous(memory_format=torch.channels_last)):
            assert relative_error(ready.call(x), net(x)) < TOLERANCE[PEERS[name].dtype or torch.float32]


@pytest.mark.parametrize("name", [name for name, peer in PEERS.items() if peer.packages])
def test_other_peers_than_torch_take_float32_on_cpus_only(name):
    for device, dtype in (("cuda", torch.float32), ("cpu", torch.float16)):
        with pytest.raises(ValueError, match=f"peer '{name}' takes images of float32 on cpu, not {str(dtype)[6:]} on"):
            peers.select([name], device, dtype)


def test_all_are_those_installed_and_a_sentence_says_which_are_not(absent):
    absent("openvino", "pnnx", "deepsparse", "onnxruntime")
    names, note = peers.select(["all"])
    assert names == ["eager", "fused", "compile"]
    assert note.startswith("not installed, so not measured: onnxruntime, openvino, ncnn (pip install onnxruntime ")
    assert "pnnx" in note and "[bench]" in note and "deepsparse" not in note


def test_all_says_nothing_where_nothing_is_missing(absent):
    absent()
    names, note = peers.select(["ncnn", "all"])
    assert note is None and names[0] == "ncnn" and names.count("ncnn") == 1
    assert set(names) == {name for name, peer in PEERS.items() if name != "openvino-bf16" and peer.device is None}


def test_all_on_a_gpu_are_those_of_torch():
    assert peers.select(["all"], "cuda") == (["eager", "fused", "compile"], None)


def test_peers_of_gpus_only(monkeypatch):
    with pytest.raises(ValueError, match="peer 'cudnn' takes images on cuda, not on cpu: name other peers"):
        peers.select(["cudnn"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="peer 'max-autotune' cannot run here: it needs an NVIDIA GPU"):
        peers.select(["max-autotune"], "cuda", torch.float16)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert peers.select(["all"], "cuda", torch.float16)[0] == ["eager", "fused", "compile", "cudnn", "max-autotune"]


def test_the_cudnn_peer_is_the_dense_backend_as_a_graph(net, monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(cuda_graphs, "Cuda", lambda: recorder)
    x, other = torch.rand(2, 3, 3, 8, 8)
    ready = peers.make("cudnn", net, x)
    before = recorder.log.count("replay")
    with torch.inference_mode():
        assert relative_error(ready.call(other), net(other)) < TOLERANCE[torch.float32]
    assert recorder.log.count("replay") == before + 1 and ready.mode == "CUDA graph"
    assert {row["backend"] for row in ready.net.report()} == {"dense"}


def test_the_max_autotune_peer_asks_for_it(net, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "compile", lambda part, **options: asked.append(options) or part)
    x = torch.rand(2, 3, 8, 8)
    ready = peers.make("max-autotune", net, x)
    assert asked == [{"mode": "max-autotune", "dynamic": False}] and not ready.counted
    with torch.inference_mode():
        assert relative_error(ready.call(x), net(x)) < TOLERANCE[torch.float32]


def test_a_peer_that_is_named_must_be_there(absent):
    absent("ncnn")
    with pytest.raises(ValueError, match=r"peer 'ncnn' needs what is not installed: pip install ncnn, or .*\[bench\]"):
        peers.select(["eager", "ncnn"])
    with pytest.raises(ValueError, match="unknown peer 'tvm': accepted are 'all', 'eager'"):
        peers.select(["tvm"])


def test_deepsparse_is_not_in_the_extra(absent):
    absent("deepsparse")
    assert peers.missing("deepsparse").endswith("pip install deepsparse")


def test_openvino_in_bfloat16_needs_a_processor_that_has_it(monkeypatch):
    there("openvino")
    import openvino

    monkeypatch.setattr(openvino.Core, "get_property", lambda *_: ["FP32"])
    assert "no bfloat16 instructions" in peers.missing("openvino-bf16")


def test_what_a_peer_cannot_take_is_said_in_one_sentence(monkeypatch):
    def make(net, example):
        raise TypeError("no such operator\nand a page of more")

    monkeypatch.setitem(PEERS, "picky", peers.Peer(make))
    with pytest.raises(RuntimeError, match=r"^peer 'picky' cannot take this network, .*: no such operator$"):
        peers.make("picky", nn.Identity(), torch.rand(1))


def test_a_network_that_pnnx_cannot_convert():
    there("ncnn")
    with pytest.raises(RuntimeError, match="peer 'ncnn' cannot take this network"):
        peers.make("ncnn", _Sorted(), torch.rand(1, 3, 8, 8))


class _Sorted(nn.Module):
    def forward(self, x):
        return torch.linalg.eigvals(x).real


def test_versions_are_those_of_the_packages_used():
    assert peers.versions(["eager", "smart_kernels"]) == {}
    there("openvino")
    assert set(peers.versions(["openvino", "eager"])) == {"openvino", "onnx", "onnxscript"}


def test_versions_of_packages_by_other_names(monkeypatch):
    def version(name):
        if name == "deepsparse-nightly":
            return "1.9"
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(importlib.metadata, "packages_distributions", lambda: {"deepsparse": ["deepsparse-nightly"]})
    found = peers.versions(["deepsparse"])
    assert found["deepsparse"] == "deepsparse-nightly 1.9" and found["onnx"] == "unknown"


def test_the_fastest_way_is_taken():
    def slow(x):
        for _ in range(200):
            x = x + 1
        return x

    assert fastest({"slow": slow, "quick": torch.neg}, torch.rand(8), budget_s=0.01).mode == "quick"


def test_a_network_is_written_as_onnx_once_for_each_shape(net, monkeypatch):
    written = []

    def write(net, inputs, shapes, file):
        written.append(inputs[0].shape)
        file.write_bytes(b"onnx")

    monkeypatch.setattr(runtimes, "write_onnx", write)
    twin = dense_twin_of(smart.create_model("tiny").eval(), "adv")
    for batch in (1, 2, 1):
        assert runtimes.onnx_file(twin, torch.rand(batch, 3, 8, 8)) == b"onnx"
    assert [shape[0] for shape in written] == [1, 2]


class FakeEngine:
    """What deepsparse.compile_model returns, as far as it is used: it runs a list of arrays, one an input."""

    def __init__(self, path, batch_size, num_cores):
        with open(path, "rb") as file:
            self.file = file.read()
        self.batch_size, self.num_cores = batch_size, num_cores

    def run(self, inputs):
        (images,) = inputs
        assert images.shape[0] == self.batch_size and images.dtype == np.float32 and images.flags.c_contiguous
        return [2 * images]


def test_deepsparse_where_it_is_installed(monkeypatch):
    module = types.ModuleType("deepsparse")
    module.__spec__ = importlib.machinery.ModuleSpec("deepsparse", None)
    engines = []
    module.compile_model = lambda *args, **kwargs: engines.append(FakeEngine(*args, **kwargs)) or engines[-1]
    monkeypatch.setitem(sys.modules, "deepsparse", module)
    monkeypatch.setattr(runtimes, "onnx_file", lambda net, example: b"a network")
    x = torch.rand(2, 3, 8, 8)
    ready = peers.make("deepsparse", nn.Identity(), x)
    assert torch.equal(ready.call(x.contiguous(memory_format=torch.channels_last)), 2 * x)
    assert (engines[0].file, engines[0].num_cores) == (b"a network", torch.get_num_threads())
