"""Networks whose activations carry no dropped channels compute what the whole ones do."""

import copy

import pytest
import torch
from channel_networks import NETWORKS, Block, Net
from recorded_graphs import Recorder
from torch import nn

from smart_kernels import (
    FileError,
    backends,
    compaction,
    cuda_graphs,
    dense_twin,
    export,
    io,
    load,
    load_exported,
    native,
    save,
    swap,
    verify,
)  # fmt: skip
from smart_kernels.compact_nets import CompactNets
from smart_kernels.geometry import Geometry
from smart_kernels.modules import SparseConv2d

PATHS = ("clean", "adv", 0.3)
TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def always_worth_it(monkeypatch):
    """However little a network of the tests gains."""
    monkeypatch.setattr(compaction, "WORTH", 2.0)


@pytest.fixture
def images():
    return torch.rand(3, 3, 11, 14)


@pytest.fixture
def model():
    return NETWORKS["residual"]().eval()


def made(model, images, backend="channels"):
    sparse = swap(model, images, backend=backend, measure=False)
    assert sparse.runs_compact
    return sparse


def error(sparse, model, images, path):
    with torch.no_grad():
        expected = model.double()(images.double(), path=path)
        model.float()
    return float((sparse(images, path=path).double() - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", NETWORKS)
def test_it_computes_what_the_whole_network_does(name, seed, images):
    torch.manual_seed(seed)
    model = NETWORKS[name]().eval()
    sparse = made(model, images)
    for path in PATHS:
        assert error(sparse, model, images, path) < TOLERANCE
    choice = torch.tensor([0, 1, 0])
    torch.testing.assert_close(sparse(images, path=choice)[1:2], sparse(images[1:2], path="adv"))


@pytest.mark.parametrize("group", [4, 16])
def test_groups_for_tensor_cores_change_no_result(group, model, images, monkeypatch):
    sparse = swap(model, images, backend="dense")
    expected = sparse(images, path="adv")
    rounded_up = compaction._rounded_up
    monkeypatch.setattr(compaction, "is_on_gpu", lambda tensor: True)
    monkeypatch.setattr(compaction, "GROUP", group)
    monkeypatch.setattr(compaction, "_rounded_up", lambda kept, _, ones: rounded_up(kept, group, ones))
    compact = compaction.compact(sparse.net, "adv", "adv", densely)
    torch.testing.assert_close(compact.net(images, path="adv"), expected, rtol=1e-4, atol=1e-5)
    widths = {name: channels[2:] for name, channels in compact.channels.items()}
    assert all(k % group == 0 or k == all_k for k, all_k in widths.values())


def densely(name, weight, masks, geometry, shape):
    return backends.find("dense").pack(weight, masks), "dense"


def test_streams_carry_what_is_computed_and_needed():
    """Two layers in a row: the first computes channels 0 to 9, the second reads 6 to 15: 6 to 9 are left."""
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.ReLU(), nn.Conv2d(16, 8, 3, bias=False)).eval()
    with torch.no_grad():
        model[0].weight[10:] = 0
        model[2].weight[:, :6] = 0
    images = torch.rand(2, 3, 8, 8)
    sparse = made(model, images)
    (compact,) = sparse._compact
    assert compact.channels["0"] == (3, 3, 4, 16) and compact.channels["2"] == (4, 16, 8, 8)
    assert max(verify(model, sparse, images).values()) < TOLERANCE


@pytest.mark.parametrize("padding", [0, 1])
def test_constants_cost_a_channel_of_ones_where_borders_differ_and_nothing_elsewhere(padding):
    """Now channels 10 to 15 are constants that the second layer reads."""
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3, padding=padding)).eval()
    with torch.no_grad():
        model[0].weight[10:] = 0
        model[0].bias.abs_()
        model[2].weight[:, :6] = 0
    images = torch.rand(2, 3, 8, 8)
    sparse = made(model, images)
    (compact,) = sparse._compact
    assert compact.channels["2"] == (4 + padding, 16, 8, 8)
    assert max(verify(model, sparse, images).values()) < TOLERANCE


def test_networks_that_drop_hardly_a_channel_stay_as_they_are(images, monkeypatch):
    monkeypatch.setattr(compaction, "WORTH", 0.9)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3)).eval()
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] = 0
    sparse = swap(model, images, backend="channels", measure=False)
    assert not sparse.runs_compact and compaction.compact(sparse.net, "clean", "clean", densely) is None


def test_constants_that_are_no_numbers_stay_in_their_channels(images):
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3)).eval()
    with torch.no_grad():
        model[0].weight[5:] = 0
        model[0].bias[9] = float("inf")
    sparse = swap(model, images, backend="channels", measure=False)
    assert not sparse.runs_compact
    torch.testing.assert_close(sparse(images), model(images), equal_nan=True)


@pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))
def test_a_plan_made_for_another_device_is_followed_by_what_reads_the_same_weight():
    nets, shape = CompactNets(), (32, 32, 3, 3)
    nets.plan = {"conv": "direct"}
    masks = {"clean": torch.rand(shape) < 0.2}
    packed, backend = nets._as_planned("conv", torch.randn(shape), masks, Geometry.of(shape), None)
    assert (packed.format, backend) == ("unstructured", "cpu")


@pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))
@pytest.mark.parametrize("programs", [False, True], ids=["layer by layer", "programs"])
def test_it_runs_on_the_cpu_kernels(model, images, programs):
    sparse = made(model, images, "cpu")
    sparse.runs_programs = programs
    for path in PATHS:
        assert error(sparse, model, images, path) < TOLERANCE
    assert error(sparse, model, torch.rand(2, 3, 20, 9), "adv") < TOLERANCE
    assert len(sparse._graphs) == programs * 4


def test_it_is_taken_where_it_is_faster(model, images, monkeypatch):
    from smart_kernels import model as module

    fastest = True

    def interleave(calls, budget_s):
        for call in calls.values():
            call()
        return {way: [1.0 if (way.compact is not None) == fastest else 2.0] for way in calls}

    monkeypatch.setattr(module, "interleave", interleave)
    sparse = swap(model, images)
    assert sparse.runs_compact
    told = {row["name"]: row["why"] for row in sparse.report()}
    (adv, _) = (sparse._compact.of(sparse.net, path, sparse.paths) for path in ("adv", "clean"))
    c, all_c, k, all_k = adv.channels["middle.2.conv2"]
    assert told["middle.2.conv2"] == f"activations are compact: {c} of {all_c} channels in, {k} of {all_k} out"
    assert sum(row["bytes"] for row in sparse.report()) == sparse.weight_bytes
    fastest = False
    sparse.replan(images)
    assert not sparse.runs_compact and "compact" not in str(sparse.report())
    assert sum(row["bytes"] for row in sparse.report()) == sparse.weight_bytes
    assert error(sparse, model, images, "adv") < TOLERANCE


def test_dense_layers_give_up_their_masked_copies(model, images):
    sparse = swap(model, images, backend="dense")
    before = sparse.weight_bytes
    sparse.use_compact()
    own = sum(conv.packed.nbytes for conv in sparse.net.modules() if isinstance(conv, SparseConv2d))
    assert own < 0.6 * before and sparse.weight_bytes < before
    assert sum(row["bytes"] for row in sparse.report()) == sparse.weight_bytes
    assert error(sparse, model, images, 0.3) < TOLERANCE


def test_new_values_copies_and_moves(model, images):
    sparse = made(model, images)
    before = sparse(images, path="adv")
    torch.testing.assert_close(copy.deepcopy(sparse)(images, path="adv"), before)
    changed = {k: v * 1.5 if v.is_floating_point() else v for k, v in sparse.state_dict().items()}
    assert not any("compact" in key for key in changed)
    sparse.load_state_dict(changed)
    after = sparse(images, path="adv")
    sparse.runs_compact = False
    torch.testing.assert_close(after, sparse(images, path="adv"), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(before, after)
    sparse.runs_compact = True
    double = sparse.double()
    assert double.runs_compact
    assert double(images.double(), path="clean").dtype == torch.float64


def test_gradients_go_through_the_whole_network(model, images):
    sparse = made(model, images)
    images.requires_grad_()
    sparse(images, path="adv").sum().backward()
    gradient, images.grad = images.grad, None
    dense_twin(sparse, "adv")(images).sum().backward()
    torch.testing.assert_close(gradient, images.grad, rtol=1e-3, atol=1e-4)


def test_saved_and_loaded(model, images, tmp_path):
    sparse = made(model, images)
    save(sparse, tmp_path / "m.safetensors")
    loaded = load(tmp_path / "m.safetensors")
    assert loaded.runs_compact and loaded.report() == sparse.report() and loaded.weight_bytes == sparse.weight_bytes
    for path in PATHS:
        assert torch.equal(loaded(images, path=path), sparse(images, path=path))


@pytest.mark.parametrize("plan", [{"stem": "no such backend"}, {"stem": None}, ["stem"], 5])
def test_files_with_a_corrupt_plan_are_refused(model, images, tmp_path, monkeypatch, plan):
    sparse = made(model, images)
    sparse._compact.plan = plan
    save(sparse, tmp_path / "m.safetensors")
    with pytest.raises(FileError, match="does not describe a network"):
        load(tmp_path / "m.safetensors")
    assert io.VERSION == 2  # older files have no plan, and load as ever


@pytest.mark.parametrize("path", ["adv", 0.3])
def test_exported(model, images, tmp_path, path):
    sparse = made(model, images)
    assert export(sparse, images, tmp_path / "m.pt2", path=path)
    torch.testing.assert_close(
        load_exported(tmp_path / "m.pt2")(images), sparse(images, path=path), rtol=1e-4, atol=1e-5
    )
    whole = 4 * sum(row["weights"] for row in sparse.report())
    if path == "adv":
        assert (tmp_path / "m.pt2").stat().st_size < whole + 300_000


def test_captured_as_cuda_graphs(model, images, monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(cuda_graphs, "Cuda", lambda: recorder)
    sparse = made(model, images)
    expected = {path: sparse(images, path=path) for path in ("clean", "adv")}
    sparse.capture(images)
    for path, y in expected.items():
        torch.testing.assert_close(sparse(images, path=path), y)
    assert recorder.captured == 2 and recorder.log.count("replay") == 4
    assert all(compact in sparse._held() for compact in sparse._compact)


def test_more_lambdas_than_are_kept(model, images):
    sparse = made(model, images)
    for i in range(1, 11):
        assert error(sparse, model, images, i / 11) < TOLERANCE
    assert len(list(sparse._compact)) <= 8 and {"clean", "adv"} <= set(sparse._compact._nets)


def test_strict_planning_is_of_the_whole_layers(images):
    """What is left of a layer may be dense: it has no zeros to skip."""
    model = Net(Block(16, 24)).eval()
    sparse = swap(model, images, strict=True, measure=False)
    assert sparse.runs_compact
    assert error(sparse, model, images, "adv") < TOLERANCE
