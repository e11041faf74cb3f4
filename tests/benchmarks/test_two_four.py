"""The benchmark of the 2:4 kernel, with dense results in the kernel's place: there is no GPU to run it."""

from dataclasses import replace

import pytest
import torch

from benchmarks import two_four
from benchmarks.cases import LayerCase
from smart_kernels import reference
from smart_kernels.backends import Verdict
from smart_kernels.backends.bitmap import BitmapBackend
from smart_kernels.backends.cuda import CudaBackend
from smart_kernels.backends.direct import DirectBackend
from smart_kernels.backends.wgmma import WgmmaBackend
from smart_kernels.patterns import parse
from smart_kernels.verify import VerificationError

CASE = LayerCase(16, 32, 3, 1, 6, batch=2, density=0.3)


def put_in_place(monkeypatch, factor):
    def bind(self, packed, geometry, path, scale, bias, relu, affine, schedule):
        def run(x, residual):
            y = reference.sparse_conv2d(x.float(), packed.dense(path).float(), geometry, None, bias.float())
            return (y * factor).relu().to(x.dtype)

        return run

    for backend in (CudaBackend, DirectBackend):
        monkeypatch.setattr(backend, "bind", bind)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "1:4"])
def test_a_row_holds_the_times_of_all_tiles_and_of_dense(monkeypatch, pattern):
    put_in_place(monkeypatch, 1)
    problem = two_four.make_problem(CASE, pattern, torch.float16, "cpu")
    assert parse(pattern).holds(problem.packed.mask("clean"))
    row = two_four.row(
        CASE, pattern, problem, lambda calls: {name: 1.0 for name, call in calls.items() if call() is not None}
    )
    assert {"large_us", "flat_us", "small_us", "narrow_us", "chosen_us", "dense_us"} <= set(row)
    assert row["pattern"] == pattern and row["steps"] >= 1


@pytest.mark.parametrize(("batch", "splits"), [(1, [2, 4]), (32, [2]), (64, [])])
def test_where_small_tiles_do_not_fill_a_gpu_they_are_split(monkeypatch, batch, splits):
    """Of five blocks of columns, 8 x 8 pixels and 256 channels."""
    put_in_place(monkeypatch, 1)
    problem = two_four.make_problem(LayerCase(64, 256, 3, 1, 8, batch), "2:4", torch.float16, "cpu")
    assert problem.splits() == splits
    assert [name for name in problem.calls() if name.startswith("small_")] == [
        "small_us",
        *(f"small_{n}_us" for n in splits),
    ]


def test_on_hopper_its_own_kernel_is_measured_too(monkeypatch):
    put_in_place(monkeypatch, 1)
    monkeypatch.setattr(WgmmaBackend, "bind", CudaBackend.bind)
    monkeypatch.setattr(WgmmaBackend, "supports", lambda self, geometry, dtype, device: Verdict(True))
    problem = two_four.make_problem(CASE, "2:4", torch.float16, "cpu")
    row = two_four.row(CASE, "2:4", problem, lambda calls: {name: 1.0 for name in calls})
    assert {"large_us", "wgmma_tall_us", "wgmma_twin_us", "wgmma_twin_split_us", "chosen_us", "dense_us"} <= set(row)


def test_bitmaps_are_measured_where_masks_are_sparse_enough(monkeypatch):
    put_in_place(monkeypatch, 1)
    monkeypatch.setattr(BitmapBackend, "bind", CudaBackend.bind)
    monkeypatch.setattr(BitmapBackend, "supports", lambda self, geometry, dtype, device: Verdict(True))
    for pattern, density, measured in (("unstructured", 0.2, True), ("unstructured", 0.6, False), ("1:4", 0.25, True)):
        case = replace(CASE, density=density)
        problem = two_four.make_problem(case, pattern, torch.float16, "cpu")
        row = two_four.row(case, pattern, problem, lambda calls: {name: 1.0 for name in calls})
        names = {f"bitmap_{name}_us" for name in ("large", "tall", "flat", "small", "narrow", "chosen")}
        assert names <= set(row) if measured else not names & set(row)


def test_in_float32_it_is_the_direct_kernel(monkeypatch):
    put_in_place(monkeypatch, 1)
    problem = two_four.make_problem(CASE, "unstructured", torch.float32, "cpu")
    row = two_four.row(
        CASE, "unstructured", problem, lambda calls: {name: 1.0 for name, call in calls.items() if call() is not None}
    )
    assert {"large_us", "medium_us", "small_us", "chosen_us", "dense_us"} <= set(row)
    assert (row["dtype"], row["density"]) == ("float32", pytest.approx(0.3, abs=0.03))


def test_tiles_that_do_not_run_a_weight_are_not_timed(monkeypatch):
    put_in_place(monkeypatch, 1)
    case = LayerCase(32, 64, 3, 1, 6, batch=2, density=0.3)
    problem = two_four.make_problem(case, "64:2:8", torch.float16, "cpu")
    row = two_four.row(case, "64:2:8", problem, lambda calls: dict.fromkeys(calls, 1.0))
    assert "large_us" not in row and {"flat_us", "small_us", "narrow_us", "chosen_us"} <= set(row)
    assert row["density"] == 0.25


def test_groups_are_run_by_tiles_no_taller_than_they(monkeypatch):
    put_in_place(monkeypatch, 1)
    case = LayerCase(128, 128, 3, 1, 6, batch=2, density=0.3, groups=32)
    problem = two_four.make_problem(case, "unstructured", torch.float16, "cpu")
    row = two_four.row(case, "unstructured", problem, lambda calls: dict.fromkeys(calls, 1.0))
    assert {each for each in row if each.endswith("_us")} == {"narrow_us", "narrow_2_us", "chosen_us", "dense_us"}
    assert "groups32" in row["layer"]


def test_layers_that_no_kernel_runs_are_left_out():
    image, small, wide = LayerCase(3, 64, 3, 1, 32), LayerCase(64, 64, 3, 1, 32), LayerCase(256, 256, 3, 1, 32)
    assert two_four.runs(image, "unstructured") and not two_four.runs(image, "2:4")
    grouped = [replace(case, groups=32) for case in (image, small, wide)]
    assert [two_four.runs(case, "2:4") for case in grouped] == [False, False, True]


def test_what_computes_something_else_is_not_timed(monkeypatch):
    put_in_place(monkeypatch, 1.5)
    problem = two_four.make_problem(CASE, "2:4", torch.float16, "cpu")
    with pytest.raises(VerificationError, match="nothing was timed"):
        two_four.row(CASE, "2:4", problem, lambda calls: pytest.fail("timed"))


def test_patterns_that_it_cannot_draw_are_refused():
    with pytest.raises(ValueError, match="accepted are 'unstructured', N:M and V:N:M"):
        two_four.random_mask((8, 8, 1, 1), "channel", 0.2, torch.Generator())


def test_without_a_gpu_the_command_says_so(monkeypatch, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.setattr("sys.argv", ["two_four"])
    with pytest.raises(SystemExit):
        two_four.main()
    assert capsys.readouterr().err
