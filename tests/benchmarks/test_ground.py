"""The first GPU run's measurements, with the kernel and the clock replaced: no GPU is needed, and none is claimed."""

import argparse
import json

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from benchmarks import ground, roofline
from benchmarks.cases import LayerCase
from smart_kernels.backends.triton import TritonBackend
from smart_kernels.verify import VerificationError

CASES = [LayerCase(32, 64, 3, 1, 8, batch=2, density=1.0), LayerCase(3, 64, 3, 1, 8, batch=2, density=1.0)]
RATES = {"empty_kernel_us": 1.5, "matmul_tflops": 700.0, "copy_terabytes_per_s": 4.0}


@pytest.fixture
def wrong(monkeypatch):
    """Makes the block kernel compute with torch; what is put into the list is added to its results."""
    added = []

    def bind(self, packed, geometry, path, scale, bias, relu, affine, schedule=None):
        weight = packed.dense(path)

        def run(x, residual):
            y = torch.nn.functional.conv2d(x, weight, bias, geometry.stride, geometry.padding[0])
            return y.relu() + sum(added)

        return run

    monkeypatch.setattr(TritonBackend, "bind", bind)
    return added


def times(calls):
    for call in calls.values():
        call()
    return {name: {"cudnn": 10.0, 1.0: 11.0, 0.2: 4.0}[name] for name in calls}


def test_a_layer_against_the_matrix_product(wrong):
    row = ground.measure(CASES[0], torch.float32, "cpu", times, 0.5)
    tflops = 2 * 32 * 64 * 9 * 2 * 64 / 10e-6 / 1e12
    assert row["cudnn_tflops"] == pytest.approx(tflops) and row["cudnn_of_matmul"] == pytest.approx(2 * tflops)
    assert (row["block_us_density_1"], row["block_us_density_0.2"]) == (11, 4)
    assert (row["layer"], row["batch"], row["dtype"]) == ("32to64-3x3-stride1-8px", 2, "float32")


def test_layers_of_few_channels_have_no_blocks(wrong):
    row = ground.measure(CASES[1], torch.float32, "cpu", times, 0.5)
    assert row["cudnn_us"] == 10 and row["block_us_density_1"] is row["block_us_density_0.2"] is None


def test_wrong_results_are_not_timed(wrong):
    wrong.append(1.0)
    with pytest.raises(VerificationError, match="not timed"):
        ground.measure(CASES[0], torch.float32, "cpu", times, 0.5)


def test_all_layers_of_the_networks_are_measured():
    cases = ground.cases([256, 1])
    assert len(cases) == len(set(cases)) and {case.batch for case in cases} == {1, 256}
    assert cases[0].batch == 256 and any(case.inputs == 3 for case in cases)
    assert {case.outputs for case in cases} == {16, 32, 64, 128, 256, 512}


def test_a_run_is_written_as_it_goes_and_goes_on(wrong, tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(ground, "machine_rates", lambda *given: asked.append(given) or RATES)
    monkeypatch.setattr(ground, "cases", lambda batches: CASES)
    clock = iter((0, 0, 100, 0, 0, 0, 0))
    monkeypatch.setattr(ground.time, "monotonic", lambda: next(clock))
    arguments = argparse.Namespace(
        batches=[2], dtype="float32", budget=0.1, limit=50, out=tmp_path / "ground.json", append=True
    )
    benchmark = torch.backends.cudnn.benchmark
    ground.run(arguments, "cpu", times, pytest.fail)
    content = json.loads(arguments.out.read_text())
    assert content["ground"] == RATES and len(content["rows"]) == 1
    ground.run(arguments, "cpu", times, pytest.fail)
    content = json.loads(arguments.out.read_text())
    assert [row["layer"] for row in content["rows"]] == ["32to64-3x3-stride1-8px", "3to64-3x3-stride1-8px"]
    assert len(asked) == 1 and torch.backends.cudnn.benchmark == benchmark
    printed = capsys.readouterr().out
    assert "empty kernel 1.50 us, matrix product 700 TFLOP/s, copy 4.00 TB/s" in printed
    assert "| 11.00 us, 0.91x | 4.00 us, 2.50x |" in printed and "| - | - |" in printed

    roofline.main(["tiny", "--ground", str(arguments.out), "--json", str(tmp_path / "floors.json")])
    gpu = json.loads((tmp_path / "floors.json").read_text())["gpu"]
    assert (gpu["tflops"], gpu["terabytes_per_s"]) == (700, 4)

    content["machine"]["cpu"] = "another"
    arguments.out.write_text(json.dumps(content))
    errors = []
    ground.run(arguments, "cpu", times, errors.append)
    assert "is of another run: its machine is" in errors[0]


def test_without_a_gpu_it_says_so(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit):
        ground.main([])
    assert "need an NVIDIA GPU" in capsys.readouterr().err
