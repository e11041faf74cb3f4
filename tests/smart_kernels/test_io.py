import json
import os
import subprocess
import sys
import zlib

import pytest
import torch
from networks import TwoPaths
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from smart_kernels import FileError, io, load, native, save, swap, verify
from smart_kernels.backends import BACKENDS, Verdict, of_format, runnable
from smart_kernels.geometry import Geometry
from smart_kernels.packing import FORMATS
from smart_kernels.planned_layers import convs_of


@pytest.fixture
def images():
    return torch.rand(3, 1, 9, 9)


@pytest.fixture
def model():
    return TwoPaths().eval()


@pytest.fixture
def saved(model, images, tmp_path):
    path = tmp_path / "network.safetensors"
    save(swap(model, images, backend="cpu" if native.missing() is None else "auto"), path)
    return path


def parts(path):
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def rewrite(path, tensors, metadata):
    """Writes altered contents with a checksum that fits: what a hostile author would do."""
    metadata["sha256"] = io._digest(metadata["network"], tensors)
    save_file(tensors, path, metadata)


def test_a_loaded_network_gives_the_same_numbers(model, images, saved):
    sparse = swap(model, images, backend="cpu" if native.missing() is None else "auto")
    loaded = load(saved)
    verify(model, loaded, images)
    for path in ("clean", "adv", 0.5, torch.tensor([0, 1, 0])):
        assert torch.equal(loaded(images, path=path), sparse(images, path=path))
    assert loaded.report() == sparse.report()
    assert loaded.weight_bytes == sparse.weight_bytes


def test_it_loads_in_a_fresh_process_that_never_saw_the_model(saved, images, model):
    code = (
        "import sys, torch, smart_kernels; torch.manual_seed(0); x = torch.full((3, 1, 9, 9), 0.5);"
        "print(smart_kernels.load(sys.argv[1])(x, path='adv').double().sum().item())"
    )
    out = subprocess.run([sys.executable, "-c", code, str(saved)], capture_output=True, text=True, check=True).stdout
    with torch.no_grad():
        expected = model(torch.full((3, 1, 9, 9), 0.5), path="adv").double().sum().item()
    assert float(out) == pytest.approx(expected, rel=1e-4)


def test_values_are_stored_once_and_masks_as_bits(saved, model):
    tensors, _ = parts(saved)
    conv = model.layers[0].conv1
    assert len(tensors["layers.0.conv1.values"]) == int((conv.mask_clean | conv.mask_adv).sum())
    assert len(tensors["layers.0.conv1.mask.clean"]) < -(-conv.weight.numel() // 8)  # bits, deflated


def test_a_weight_used_twice_is_stored_once(images, tmp_path):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 1, 3, padding=1)

        def forward(self, x):
            return torch.relu(self.conv(x)) + self.conv(x * 2)

    model = Twice().eval()
    model.conv.weight.data[0, 0, 0] = 0
    sparse, path = swap(model, images), tmp_path / "x.safetensors"
    save(sparse, path)
    assert [name for name in parts(path)[0] if name.endswith(".values")] == ["conv.values"]
    loaded = load(path)
    assert torch.equal(loaded(images), sparse(images))
    assert loaded.weight_bytes == sparse.weight_bytes


def test_saving_twice_gives_the_same_bytes(saved, tmp_path):
    again = tmp_path / "again.safetensors"
    save(load(saved), again)
    assert parts(again)[1]["sha256"] == parts(saved)[1]["sha256"]


def test_a_failed_save_leaves_the_old_file(saved, monkeypatch):
    before = saved.read_bytes()
    monkeypatch.setattr(io, "save_file", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save(load(saved), saved)
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == [saved.name]


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 100, 0.5, 0.999])
def test_a_truncated_file_is_refused(saved, keep):
    content = saved.read_bytes()
    saved.write_bytes(content[: keep if isinstance(keep, int) else int(len(content) * keep)])
    with pytest.raises(FileError, match="not a whole safetensors file"):
        load(saved)


@pytest.mark.parametrize("seed", range(40))
def test_any_flipped_byte_is_refused(saved, seed):
    content = bytearray(saved.read_bytes())
    position = int(torch.randint(len(content), (), generator=torch.Generator().manual_seed(seed)))
    content[position] ^= 0x55
    saved.write_bytes(content)
    with pytest.raises(FileError):
        load(saved)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load(tmp_path / "missing.safetensors")
    other = tmp_path / "other.safetensors"
    save_file({"weight": torch.zeros(3)}, other)
    with pytest.raises(FileError, match="not a swapped network"):
        load(other)


def test_a_version_of_the_future_is_refused(saved):
    tensors, metadata = parts(saved)
    rewrite(saved, tensors, metadata | {"version": "99"})
    with pytest.raises(FileError, match="version 99"):
        load(saved)


def edit(change):
    def apply(tensors, network):
        change(tensors, network)
        return tensors

    return apply


def node(network, op):
    return next(n for n in network["graph"] if n["op"] == op)


HOSTILE = {
    "a function by any name": lambda t, n: node(n, "call_function").update(target="os.system"),
    "a method by any name": lambda t, n: n["graph"].insert(
        -1,
        {"name": "evil", "op": "call_method", "target": "__reduce__", "args": [{"node": "x"}], "kwargs": {"dict": {}}},
    ),
    "an unknown operation": lambda t, n: node(n, "call_function").update(op="call_python"),
    "an unknown layer": lambda t, n: n["modules"]["classifier"].update(type="Module"),
    "a layer that is missing": lambda t, n: n["modules"].pop("classifier"),
    "a node before it is made": lambda t, n: n["graph"].reverse(),
    "no graph": lambda t, n: n.pop("graph"),
    "a graph that is no list": lambda t, n: n.update(graph=3),
    "missing values": lambda t, n: t.pop("layers.0.conv1.values"),
    "too few values": lambda t, n: t.update({"layers.0.conv1.values": torch.zeros(3)}),
    "a mask of another size": lambda t, n: t.update({"layers.0.conv1.mask.clean": torch.zeros(3, dtype=torch.uint8)}),
    "a huge weight": lambda t, n: n["modules"]["stem"]["geometry"].__setitem__(0, [2**20, 2**20, 3, 3]),
    "a negative padding": lambda t, n: n["modules"]["stem"]["geometry"].__setitem__(2, [-1, -1, -1, -1]),
    "scales of another length": lambda t, n: t.update({"stem.scale.clean": torch.zeros(3)}),
    "an unknown backend": lambda t, n: n["modules"]["stem"].update(backend="os"),
    "a node named as code": lambda t, n: n["graph"][2].update(name="x):\n import os\ndef f("),
    "a layer named as code": lambda t, n: n["modules"].update({"a = 1; b": n["modules"]["classifier"]}),
    "a huge layer": lambda t, n: n["modules"]["classifier"]["arguments"].update(in_features=2**40),
    "a weight of a layer that is none": lambda t, n: n["modules"]["stem"].update(weight_of="classifier"),
    "a deflated bomb": lambda t, n: t.update(
        {"layers.0.conv1.mask.clean": torch.frombuffer(bytearray(zlib.compress(bytes(2**24))), dtype=torch.uint8)[:200]}
    ),
    "no path": lambda t, n: n.update(paths=[]),
    "a stage that is not there": lambda t, n: n["modules"]["stem"].update(stage=3),
    "a stage before the first": lambda t, n: n.update(stages=2) or n["modules"]["stem"].update(stage=-1),
    "a stage that is no number": lambda t, n: n["modules"]["stem"].update(stage="first"),
    "three paths": lambda t, n: n.update(paths=["a", "b", "c"]),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_file_is_refused_before_anything_runs(saved, kind):
    tensors, metadata = parts(saved)
    network = json.loads(metadata["network"])
    HOSTILE[kind](tensors, network)
    rewrite(saved, tensors, metadata | {"network": json.dumps(network)})
    with pytest.raises(FileError):
        load(saved)


class Custom(nn.Module):
    def forward(self, x):
        return torch.linalg.vector_norm(x, dim=1, keepdim=True)


@pytest.mark.parametrize("layer", [Custom(), nn.Unfold(2)], ids=["function", "layer"])
def test_what_a_file_cannot_hold_is_refused_when_saved(layer, images, tmp_path):
    sparse = swap(nn.Sequential(nn.Conv2d(1, 4, 3), layer).eval(), images)
    with pytest.raises(ValueError, match="saved network cannot"):
        save(sparse, tmp_path / "x.safetensors")
    assert not os.listdir(tmp_path)


def test_a_network_without_a_graph_is_refused_when_saved(images, tmp_path):
    with pytest.raises(ValueError, match="could not be captured as a graph"):
        save(swap(TwoPaths(control_flow=True).eval(), images), tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("planned", "there", "density", "expected"),
    [
        ("cpu", {"cpu", "direct"}, 0.2, "cpu"),
        ("cpu", {"direct"}, 0.2, "direct"),
        ("cpu", {"direct"}, 0.6, None),
        ("direct", {"cpu"}, 0.2, "cpu"),
        ("direct", {"direct"}, 0.6, "direct"),
        ("wgmma", {"cuda"}, 0.2, "cuda"),
        ("wgmma", {"direct"}, 0.2, None),
        ("triton", {"cuda"}, 0.2, None),
    ],
)
def test_a_backend_that_is_missing_is_replaced_by_one_of_its_packed_format(
    planned, there, density, expected, monkeypatch
):
    for backend in BACKENDS.values():
        verdict = Verdict(backend.name in there, "it is missing")
        monkeypatch.setattr(type(backend), "supports", lambda *_, verdict=verdict: verdict)
    masks = {"clean": torch.rand(32, 32, 3, 3) < density}
    found = runnable(planned, Geometry.of((32, 32, 3, 3)), masks, torch.float16, torch.device("cpu"))
    assert (found and found.name) == expected


def test_each_packed_format_has_backends_that_read_it():
    assert [each.name for each in of_format("2:4")] == ["cuda", "wgmma"]
    assert sorted(name for each in FORMATS for name in [b.name for b in of_format(each)]) == sorted(BACKENDS)


def test_layers_of_a_file_lie_on_their_device_before_they_could_be_planned_anew(saved):
    network = json.loads(parts(saved)[1]["network"])
    sparse = io._build(network, parts(saved)[0], torch.device("meta"))
    assert {buffer.device.type for _, conv in convs_of(sparse.net) for buffer in conv.packed.buffers()} == {"meta"}
    assert {row["backend"] for row in sparse.report()} <= {"dense", "channels"} and not sparse.runs_programs
