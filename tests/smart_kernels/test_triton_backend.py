"""The Triton backend where there is no GPU: what it refuses, how it is chosen, traced, and given a schedule."""

import json
import subprocess
import sys

import pytest
import torch
from blocks import block_problem
from torch._dynamo.backends.common import aot_autograd

from smart_kernels import Timings, pack, planner, sparse_conv2d
from smart_kernels.backends import BACKENDS, dense, schedules
from smart_kernels.backends.schedules import Schedule
from smart_kernels.backends.triton import TritonBackend
from smart_kernels.geometry import Geometry
from smart_kernels.packing import BlockWeight
from smart_kernels.planner import Planner

TRITON = BACKENDS["triton"]
GPU, CPU = torch.device("cuda"), torch.device("cpu")
GEOMETRY = Geometry((64, 32, 3, 3), padding=(1, 1, 1, 1))


@pytest.fixture
def gpu(monkeypatch):
    """Makes the backend believe in a GPU; nothing runs on it."""
    monkeypatch.setattr(TritonBackend, "available", lambda self: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    return monkeypatch


def test_importing_the_package_imports_no_triton():
    code = "import sys, smart_kernels; from smart_kernels.backends import BACKENDS; BACKENDS['triton'].available(); "
    code += "sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_it_says_why_not_on_the_cpu():
    assert TRITON.supports(GEOMETRY, torch.float16, CPU).why == "the GPU kernels run on NVIDIA GPUs, not on cpu"


def test_without_triton_or_a_gpu_it_is_not_available(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not TRITON.supports(GEOMETRY, torch.float16, GPU)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install triton" in TRITON.available().why


@pytest.mark.parametrize(
    ("geometry", "dtype", "why"),
    [
        (GEOMETRY, torch.float64, "not in float64"),
        (Geometry((64, 32, 9, 9)), torch.float16, "more than the 64 taps"),
        (Geometry((64, 1, 3, 3), groups=64), torch.float16, "do not divide into tiles of 128"),
    ],
)
def test_it_says_which_convolutions_it_does_not_compute(gpu, geometry, dtype, why):
    verdict = TRITON.supports(geometry, dtype, GPU)
    assert why in verdict.why
    assert TRITON.supports(GEOMETRY, torch.bfloat16, GPU)
    assert TRITON.supports(Geometry((256, 16, 7, 7), (2, 2), dilation=(3, 3), groups=2), torch.float32, GPU)


def test_it_needs_tensor_cores_of_the_last_generations(gpu):
    gpu.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "this GPU has 7.5" in TRITON.supports(GEOMETRY, torch.float16, GPU).why


def test_masks_must_drop_whole_blocks():
    _, masks = block_problem((64, 32, 3, 3), (64, 16))
    assert TRITON.suits(masks)
    assert not TRITON.suits({**masks, "adv": torch.rand(64, 32, 3, 3) < 0.2})
    assert not TRITON.suits(block_problem((64, 32, 3, 3), (8, 16))[1])


@pytest.fixture
def measured(monkeypatch):
    """Lets the planner choose for a GPU; candidates take as long as the dict says, without being run."""
    times, calls = {"dense": 20e-6, "cpu": 1.0, "triton": 5e-6}, []

    def interleave(candidates, budget_s):
        calls.append(set(candidates))
        return {name: [times[name]] for name in candidates}

    monkeypatch.setattr(planner, "interleave", interleave)
    monkeypatch.setattr(TritonBackend, "supports", lambda self, geometry, dtype, device: self.computes(geometry, dtype))
    monkeypatch.setattr(TritonBackend, "bind", lambda self, *_: lambda x, residual: x)
    return times, calls


def choose(masks, backend="auto", dtype=torch.float16):
    weight = torch.randn(64, 32, 3, 3).to(dtype)
    return Planner(backend, timings=Timings()).choose(weight, masks, GEOMETRY, torch.Size((2, 32, 8, 8)))


def test_auto_considers_it_where_blocks_are_dropped_and_takes_it_where_it_is_faster(measured):
    times, calls = measured
    _, blocks = block_problem((64, 32, 3, 3), (64, 16))
    choice = choose(blocks)
    assert (choice.backend, choice.why, choice.packed.format) == ("triton", "4.00x faster than dense", "block")
    times["triton"] = 1e-3
    assert choose(blocks).backend == "dense"
    assert calls == [{"triton", "dense"}] * 2
    assert choose({name: torch.rand(64, 32, 3, 3) < 0.2 for name in blocks}).backend == "dense"
    assert len(calls) == 2


def test_by_name_it_is_taken_unmeasured_also_for_masks_that_keep_everything(measured):
    _, calls = measured
    full = dict.fromkeys(("clean", "adv"), torch.ones(64, 32, 3, 3, dtype=torch.bool))
    assert choose(full, "triton").backend == "triton"
    assert choose(full).backend == "dense"
    assert choose({name: torch.rand(64, 32, 3, 3) < 0.2 for name in full}, "triton").backend == "dense"
    assert not calls


def test_on_the_cpu_a_packed_block_weight_still_gives_its_answer():
    weight, masks = block_problem((64, 32, 3, 3), (64, 16))
    x = torch.randn(2, 32, 6, 6)
    y = sparse_conv2d(x, pack(weight, masks, "block"), path="adv")
    assert torch.equal(y, dense.DenseBackend().run(x, pack(weight, masks, "dense"), Geometry.of(weight.shape), "adv"))


# ---- tracing ----


class OneLayer(torch.nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.packed = BlockWeight(*block_problem((64, 32, 3, 3), (64, 16), dtype=dtype))

    def forward(self, x):
        return TRITON.bind(self.packed, GEOMETRY, "adv", None, None, True)(x, None) * 2


@pytest.fixture
def layer():
    pytest.importorskip("triton", reason="Triton is not installed")
    return OneLayer()


@pytest.mark.parametrize("splits", [False, True])
def test_a_compiled_graph_holds_the_kernels_themselves(fresh_compiler, layer, splits, monkeypatch):
    schedule = Schedule(128, 64, 4, 3, splits=2 if splits else 1)
    monkeypatch.setattr(schedules, "find", lambda *_: schedule)
    graphs = []

    def compiler(graph, inputs):
        graphs.append(graph.code)
        raise StopIteration  # what would be compiled further needs a GPU

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=aot_autograd(fw_compiler=compiler))
    with torch.no_grad(), pytest.raises(Exception, match="StopIteration"):
        compiled(torch.randn(2, 32, 5, 5))
    assert graphs[0].count("triton_kernel_wrapper_functional(") == 1 + splits


def test_a_compiled_graph_holds_the_kernel_with_tma_as_an_operator(fresh_compiler, monkeypatch):
    pytest.importorskip("triton", reason="Triton is not installed")
    schedule = Schedule(128, 64, 4, 3, splits=2, tma=True)
    monkeypatch.setattr(schedules, "find", lambda *_: schedule)
    layer, graphs = OneLayer(torch.float16), []

    def compiler(graph, inputs):
        graphs.append(graph.code)
        raise StopIteration  # what would be compiled further needs a GPU

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=aot_autograd(fw_compiler=compiler))
    with torch.no_grad(), pytest.raises(Exception, match="StopIteration"):
        compiled(torch.randn(2, 32, 5, 5).half())
    assert graphs[0].count("smart_kernels.convolve_blocks_tma") == 1
    assert graphs[0].count("triton_kernel_wrapper_functional(") == 1  # which adds the sums up


def test_exported_programs_hold_the_operator_and_take_any_batch(layer):
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(layer, (torch.randn(2, 32, 5, 5),), dynamic_shapes=({0: batch},))
    calls = [
        node for node in program.graph.nodes if node.target is torch.ops.smart_kernels.sparse_conv2d_triton.default
    ]
    assert len(calls) == 1
    assert calls[0].meta["val"].shape[1:] == (64, 5, 5)
    assert calls[0].meta["val"].is_contiguous(memory_format=torch.channels_last)


def test_a_process_that_loads_a_program_registers_the_operator_first(layer):
    code = "from pathlib import Path; import torch; from smart_kernels import exported; "
    code += "about = {'operators': ['smart_kernels::sparse_conv2d_triton'], 'device': 'cpu', 'format': 'pt2'}; "
    code += "assert not hasattr(torch.ops.smart_kernels, 'sparse_conv2d_triton'); "
    code += "exported._check_machine(Path('x'), about); torch.ops.smart_kernels.sparse_conv2d_triton"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_cpu_is_refused_where_kernels_are_compiled(layer):
    with pytest.raises(ValueError, match="run on NVIDIA GPUs, or in Triton's interpreter"):
        layer(torch.randn(2, 32, 5, 5))


# ---- schedules ----


def test_every_default_is_there_and_fits_the_smallest_gpu():
    defaults, _ = schedules.read(schedules.FILE)
    for itemsize, kind in ((2, "2 bytes"), (4, "4 bytes"), (4, "precise"), (4, "scattered")):
        for tile in (16, 32, 64, 128):
            for block_in in (16, 32, 64):
                schedule = schedules.settle(defaults[kind][str(tile)], block_in, 1, 1, 1)
                step = (tile + schedule.pixels) * schedule.channels * itemsize
                assert step * schedule.stages <= 99 * 1024
                assert schedule.channels % block_in == 0


@pytest.mark.parametrize(
    ("itemsize", "contiguous", "precision", "kind"),
    [(2, 16, "tf32", "2 bytes"), (2, 4, "tf32", "scattered"), (4, 4, "tf32", "4 bytes"), (4, 16, "tf32x3", "precise")],
)
def test_layers_take_the_default_of_their_kind(itemsize, contiguous, precision, kind):
    assert schedules.kind_of(itemsize, contiguous, precision) == kind


def test_small_maps_are_split_and_large_ones_are_not():
    schedule = Schedule(128, 64, 4, 4)
    assert schedules.settle(schedule, 16, tiles=8, items=400, processors=132).splits == 16
    assert schedules.settle(schedule, 16, tiles=8, items=40, processors=132).splits == 2
    assert schedules.settle(schedule, 16, tiles=500, items=400, processors=132).splits == 1
    assert schedules.settle(Schedule(128, 64, 4, 4, splits=3), 16, 500, 400, 132).splits == 3


def test_what_was_measured_on_a_gpu_is_found_by_its_name(tmp_path, monkeypatch):
    file = tmp_path / "schedules.json"
    file.write_text(schedules.FILE.read_text())
    layer = schedules.layer_name(GEOMETRY, torch.float16, (64, 16), 64, 30, 4096)
    ours, theirs = Schedule(256, 64, 8, 3, 1, True), Schedule(64, 32, 4, 2, 2, False)
    schedules.write(file, "GPU A", {layer: ours})
    schedules.write(file, "GPU B", {layer: theirs})
    monkeypatch.setattr(schedules, "FILE", file)
    default = schedules.find("GPU C", layer, "2 bytes", 64)
    assert [schedules.find(f"GPU {name}", layer, "2 bytes", 64) for name in "AB"] == [ours, theirs]
    assert default == schedules.find("GPU A", "another layer", "2 bytes", 64) not in (ours, theirs)
    assert json.loads(file.read_text())["default"] == json.loads(schedules.FILE.read_text())["default"]
    assert Schedule.of_numbers(ours.numbers) == ours


def test_layers_that_are_alike_share_a_schedule():
    names = [schedules.layer_name(GEOMETRY, torch.float16, (64, 16), 64, n, p) for n, p in ((30, 4096), (25, 5000))]
    assert names[0] == names[1]
    assert names[0] != schedules.layer_name(GEOMETRY, torch.float16, (64, 16), 64, 70, 4096)
    assert names[0] != schedules.layer_name(GEOMETRY, torch.bfloat16, (64, 16), 64, 30, 4096)


@pytest.mark.parametrize(
    "content",
    ["", "[]", '{"version": 2}', '{"version": 1, "default": {}}',
     '{"version": 1, "default": {"a": {"64": 3}}, "gpus": {}}',
     '{"version": 1, "default": {}, "gpus": {"A": {"x": {"pixels": 100, "channels": 64, "warps": 4, "stages": 3, '
     '"splits": 0, "through_l1": false, "tma": false}}}}',
     '{"version": 1, "default": {}, "gpus": {"A": {"x": {"pixels": 64.0, "channels": 64, "warps": 4, "stages": 3, '
     '"splits": 0, "through_l1": false, "tma": false}}}}'],
)  # fmt: skip
def test_a_file_of_anything_else_is_refused(tmp_path, content):
    file = tmp_path / "schedules.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=r"schedules\.json does not hold schedules"):
        schedules.read(file)
