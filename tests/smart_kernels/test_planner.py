import json

import pytest
import torch
from networks import TwoPaths
from torch import nn

from smart_kernels import DenseFallbackError, Timings, native, planner, swap, timings
from smart_kernels.backends import BACKENDS, Verdict
from smart_kernels.geometry import Geometry
from smart_kernels.planner import Planner

needs_library = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))
GEOMETRY = Geometry((8, 6, 3, 3), padding=(1, 1, 1, 1))
SHAPE = torch.Size((2, 6, 9, 9))


@pytest.fixture
def weight():
    return torch.randn(GEOMETRY.weight_shape)


@pytest.fixture
def masks(weight):
    return {"clean": torch.rand_like(weight) < 0.2, "adv": torch.rand_like(weight) < 0.4}


@pytest.fixture
def images():
    return torch.rand(4, 1, 9, 9)


@pytest.fixture
def measured(monkeypatch):
    """Counts measurements; each takes as long as the dict says, without being run."""
    times = {"dense": 20e-6, "cpu": 10e-6, "channels": 5e-6}
    calls = []

    def interleave(candidates, budget_s):
        calls.append(set(candidates))
        return {name: [times[name]] for name in candidates}

    monkeypatch.setattr(planner, "interleave", interleave)
    return times, calls


@needs_library
def test_the_fastest_is_taken_and_both_times_are_told(weight, masks, measured):
    times, _ = measured
    choice = Planner(timings=Timings()).choose(weight, masks, GEOMETRY, SHAPE)
    assert (choice.backend, choice.why) == ("cpu", "2.00x faster than dense")
    assert (choice.dense_us, choice.sparse_us) == pytest.approx((20, 10))
    times["dense"] = 4e-6
    choice = Planner(timings=Timings()).choose(weight, masks, GEOMETRY, SHAPE)
    assert (choice.backend, choice.why) == ("dense", "dense is faster here, 4 us against 10 us")


@needs_library
def test_a_layer_is_measured_once_for_its_masks_and_shape(weight, masks, measured):
    _, calls = measured
    planner = Planner(timings=Timings())
    first = planner.choose(weight, masks, GEOMETRY, SHAPE)
    again = planner.choose(weight * 2, masks, GEOMETRY, SHAPE)
    assert len(calls) == 1
    assert (again.dense_us, again.sparse_us, again.why) == (first.dense_us, first.sparse_us, first.why)
    planner.choose(weight, masks, GEOMETRY, torch.Size((3, 6, 9, 9)))
    other = {"clean": masks["clean"], "adv": masks["adv"].flip(0)}
    planner.choose(weight, other, GEOMETRY, SHAPE)
    assert len(calls) == 3


@needs_library
def test_times_are_of_a_number_of_threads(weight, masks, measured):
    _, calls = measured
    planner, before = Planner(timings=Timings()), torch.get_num_threads()
    try:
        for threads in (1, 2, 1):
            torch.set_num_threads(threads)
            planner.choose(weight, masks, GEOMETRY, SHAPE)
    finally:
        torch.set_num_threads(before)
    assert len(calls) == 2


@needs_library
def test_times_outlive_the_process_in_a_file(images, measured, tmp_path):
    _, calls = measured
    model, file = TwoPaths().eval(), tmp_path / "sub" / "times.json"
    first = swap(model, images, timings=Timings(file)).report()
    count = len(calls)
    assert count > 1
    assert swap(model, images, timings=Timings(file)).report() == first
    assert len(calls) == count
    # Two processes that write one file keep what the other measured.
    ours, theirs = Timings(file), Timings(file)
    ours.put("ours", 1.0)
    theirs.put("theirs", 2.0)
    ours.save()
    theirs.save()
    assert Timings(file).get("ours") == 1.0
    assert Timings(file).get("theirs") == 2.0


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"version": 1}', '{"version": 2, "us": {}}', '{"version": 1, "us": {"a": "b"}}', "\x00",
     '{"version": 1, "us": {"a": -1.0}}', '{"version": 1, "us": {"a": NaN}}', '{"version": 1, "us": [1]}'],
)  # fmt: skip
def test_a_file_of_anything_else_is_refused(tmp_path, content):
    file = tmp_path / "times.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=r"times\.json is not a file of measured times"):
        Timings(file)


def test_mask_hashes_tell_masks_apart(masks):
    assert timings.mask_hash(masks) == timings.mask_hash({name: mask.clone() for name, mask in masks.items()})
    flipped = masks["adv"].clone()
    flipped[-1, -1, -1, -1] ^= True
    assert timings.mask_hash(masks) != timings.mask_hash({**masks, "adv": flipped})


@needs_library
def test_channels_are_cut_off_where_masks_drop_them_whole(weight, masks, measured):
    _, calls = measured
    masks = {name: mask.clone() for name, mask in masks.items()}
    masks["clean"][:4] = False
    assert Planner(timings=Timings()).choose(weight, masks, GEOMETRY, SHAPE).backend == "cpu"
    masks["adv"][:, 1::2] = False
    choice = Planner(timings=Timings()).choose(weight, masks, GEOMETRY, SHAPE)
    assert calls == [{"cpu", "dense"}, {"cpu", "dense", "channels"}]
    assert (choice.backend, choice.why) == ("channels", "4.00x faster than dense")
    assert choice.packed.kept("adv")[0].shape == (8, 3, 3, 3)
    for path, mask in masks.items():
        assert torch.equal(choice.packed.dense(path), weight * mask)


@needs_library
def test_without_measuring_estimates_decide(weight, masks, measured):
    _, calls = measured
    choice = Planner(measure=False, timings=Timings()).choose(weight, masks, GEOMETRY, SHAPE)
    assert not calls
    assert choice.backend in BACKENDS
    assert choice.why.endswith("(estimated, not measured)")
    assert choice.dense_us is None
    assert choice.sparse_us is None


@needs_library
def test_estimates_rise_with_the_work():
    cpu, dense = BACKENDS["cpu"], BACKENDS["dense"]
    device = torch.device("cpu")
    big = Geometry((256, 256, 3, 3), padding=(1, 1, 1, 1))
    shape = (16, 256, 16, 16)
    assert cpu.estimate_us(big, shape, 0.1, device) < cpu.estimate_us(big, shape, 0.2, device)
    assert cpu.estimate_us(big, shape, 0.05, device) < dense.estimate_us(big, shape, 0.05, device)
    strided = Geometry((256, 256, 3, 3), (2, 2), (1, 1, 1, 1))
    assert cpu.estimate_us(strided, shape, 1.0, device) > dense.estimate_us(strided, shape, 1.0, device)
    assert dense.estimate_us(big, shape, 0.1, device) > dense.estimate_us(big, (1, 256, 16, 16), 0.1, device)


@needs_library
def test_estimates_know_of_winograd():
    """A cost model that counted products on non-zeros alone would have the time rise 2.8 times."""
    geometry, shape, cpu = Geometry((64, 64, 3, 3), padding=(1, 1, 1, 1)), (1, 64, 48, 48), BACKENDS["cpu"]
    sparse, full = (cpu.estimate_us(geometry, shape, density, torch.device("cpu")) for density in (0.36, 1.0))
    assert sparse < full < 1.5 * sparse


FULL = Geometry((64, 64, 3, 3), padding=(1, 1, 1, 1))
LARGE = torch.Size((1, 64, 48, 48))


@needs_library
@pytest.mark.parametrize(
    ("geometry", "shape", "is_measured"),
    [
        (FULL, LARGE, True),
        (FULL, None, False),
        (Geometry((64, 64, 1, 1)), LARGE, False),
        (Geometry((64, 64, 3, 3), (2, 2), (1, 1, 1, 1)), LARGE, False),
    ],
    ids=["3x3", "of unknown shape", "1x1", "stride 2"],
)
def test_a_layer_without_zeros_is_measured_where_winograd_may_pay(measured, geometry, shape, is_measured):
    _, calls = measured
    weight = torch.randn(geometry.weight_shape)
    masks = {"clean": torch.ones_like(weight, dtype=torch.bool)}
    choice = Planner(timings=Timings()).choose(weight, masks, geometry, shape)
    assert calls == ([{"cpu", "dense"}] if is_measured else [])
    expected = ("cpu", "2.00x faster than dense") if is_measured else ("dense", "no path has zeros to skip")
    assert (choice.backend, choice.why) == expected


@needs_library
def test_strictness_is_of_layers_with_zeros_alone(measured):
    times, _ = measured
    times["dense"] = 4e-6
    weight = torch.randn(FULL.weight_shape)
    masks = {"clean": torch.ones_like(weight, dtype=torch.bool)}
    assert Planner(strict=True, timings=Timings()).choose(weight, masks, FULL, LARGE).backend == "dense"


@needs_library
def test_what_is_hopeless_by_estimate_is_not_measured(weight, masks, measured, monkeypatch):
    _, calls = measured
    monkeypatch.setattr(type(BACKENDS["dense"]), "estimate_us", lambda self, *_: 1e6)
    choice = Planner(timings=Timings()).choose(weight, masks, GEOMETRY, SHAPE)
    assert calls == [{"cpu"}]
    assert choice.backend == "cpu"
    assert "by estimate" in choice.why


def test_a_dry_run_reports_and_swaps_nothing(images):
    model = TwoPaths().eval()
    report = swap(model, images, dry_run=True)
    assert isinstance(report, list)
    assert report == swap(model, images).report()
    assert "layers.0.conv1" in str(report)
    assert {"name", "pattern", "density", "backend", "why", "bytes", "dense_us", "sparse_us"} <= set(report[0])


@needs_library
def test_strict_takes_sparse_kernels_even_where_dense_is_faster(images, measured):
    times, _ = measured
    times["dense"] = 1e-6
    model = TwoPaths().eval()
    lenient, strict = swap(model, images, timings=Timings()), swap(model, images, strict=True, timings=Timings())
    pruned = [row for row in lenient.report() if row["pattern"] != "dense"]
    # Programs, measured apart, may have moved them since.
    assert pruned and all("dense is faster here" in row["why"] for row in pruned)
    assert {row["backend"] for row in strict.report() if row["pattern"] != "dense"} == {"cpu"}
    assert not any("dense is faster here" in row["why"] for row in strict.report())
    assert next(row for row in strict.report() if row["name"] == "layers.0.conv1")["dense_us"] == pytest.approx(1)


@pytest.mark.parametrize("control_flow", [False, True], ids=["graph", "module by module"])
def test_strict_refuses_what_could_only_run_densely_and_names_every_layer(images, control_flow):
    model = TwoPaths(control_flow).eval()
    with pytest.raises(DenseFallbackError, match=r"layers\.0\.conv1, .*layers\.2\.conv2: .*float64") as refused:
        swap(model, images.double(), dtype=torch.float64, strict=True)
    assert "stem" not in str(refused.value)  # it has no zeros to skip
    assert isinstance(refused.value, ValueError)


def test_strict_refuses_a_layer_left_alone(images):
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)).eval()
    with torch.no_grad():
        model[2].weight[:, :2] = 0
    model[2].register_forward_hook(lambda module, inputs, output: output + 1)
    with pytest.raises(DenseFallbackError, match="2: it has forward hooks"):
        swap(model, images, strict=True)


def test_strict_and_dense_contradict_each_other(images):
    with pytest.raises(ValueError, match="drop one of them"):
        swap(TwoPaths(), images, backend="dense", strict=True)


def test_a_times_file_is_plain_json(tmp_path):
    times = Timings(tmp_path / "t.json")
    times.put("key", 3.5)
    times.save()
    assert json.loads((tmp_path / "t.json").read_text()) == {"version": 1, "us": {"key": 3.5}}


CUDA = torch.device("cuda")


def gpu_estimates(geometry, shape, density, dtype=torch.float16):
    names = ("dense", "channels", "triton", "cuda")
    return {name: BACKENDS[name].estimate_us(geometry, shape, density, CUDA, dtype) for name in names}


def test_estimates_on_gpus_prefer_sparse_kernels_only_where_much_is_skipped():
    deep = Geometry((512, 512, 3, 3), padding=(1, 1, 1, 1))
    many, few = gpu_estimates(deep, (256, 512, 4, 4), 0.9), gpu_estimates(deep, (256, 512, 4, 4), 0.1)
    assert min(many, key=many.get) == "dense"
    assert few["triton"] < few["cuda"] and few["triton"] < 0.6 * few["dense"]
    assert few["channels"] < few["dense"]
    # A batch of one is a matter of starting kernels, of which gathering and scattering take four.
    small = gpu_estimates(Geometry((64, 64, 3, 3), padding=(1, 1, 1, 1)), (1, 64, 32, 32), 0.2)
    assert small["channels"] > 2 * small["dense"]


def test_estimates_on_gpus_follow_the_gpu_and_the_dtype(monkeypatch):
    deep, shape = Geometry((512, 512, 3, 3), padding=(1, 1, 1, 1)), (256, 512, 4, 4)
    unknown = gpu_estimates(deep, shape, 0.2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    ours = gpu_estimates(deep, shape, 0.2)
    assert all(ours[name] < unknown[name] for name in ours)
    assert ours["dense"] < gpu_estimates(deep, shape, 0.2, torch.float32)["dense"]
    assert all(BACKENDS[name].estimate_us(deep, shape, 0.2, torch.device("cpu")) is None for name in ("triton", "cuda"))


def test_without_measuring_the_estimates_of_a_gpu_decide(monkeypatch):
    """All backends can run the layer: the one that skips blocks is taken where there is something to skip."""
    weight, geometry = torch.randn(128, 128, 3, 3), Geometry((128, 128, 3, 3), padding=(1, 1, 1, 1))
    for each in ("triton", "dense"):
        kind = type(BACKENDS[each])
        monkeypatch.setattr(kind, "supports", lambda self, *_: Verdict(True))
        estimate = kind.estimate_us
        monkeypatch.setattr(kind, "estimate_us", lambda self, g, s, d, _, t, own=estimate: own(self, g, s, d, CUDA, t))
    for each in ("channels", "cpu", "cuda"):
        monkeypatch.setattr(type(BACKENDS[each]), "supports", lambda self, *_: Verdict(False, "not here"))
    for density, taken in ((0.1, "triton"), (0.9, "dense")):
        mask = (torch.rand(2, 8, 3, 3) < density).repeat_interleave(64, 0).repeat_interleave(16, 1)
        choice = Planner(measure=False).choose(weight, {"clean": mask}, geometry, torch.Size((256, 128, 16, 16)))
        assert choice.backend == taken and "estimated" in choice.why
