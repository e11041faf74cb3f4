"""How schedules are tuned, with the kernels replaced by what they compute: no GPU is needed."""

import dataclasses
import sys

import pytest
import torch

from benchmarks import tune
from benchmarks.cases import LayerCase
from smart_kernels.backends import schedules
from smart_kernels.backends.schedules import Schedule
from smart_kernels.backends.triton import TritonBackend
from smart_kernels.verify import VerificationError

CASE = LayerCase(32, 64, 3, 1, 8, batch=2, density=0.5)


class OutOfResources(Exception):
    pass


@pytest.fixture
def problem(monkeypatch):
    monkeypatch.setattr(tune.Problem, "shared_bytes", 227 * 1024)
    return tune.make_problem(CASE, (64, 16), torch.float32, "cpu")


@pytest.fixture
def bound(monkeypatch, problem):
    """Makes the backend return the truth; schedules that were run, and a hook that may do otherwise."""
    seen, hook = [], {}

    def bind(self, *arguments, schedule=None):
        def run(x, residual):
            seen.append(schedule)
            return hook.get("run", lambda _: problem.truth)(schedule)

        return run

    monkeypatch.setattr(TritonBackend, "bind", bind)
    return seen, hook


def times_by(cost):
    def times(calls):
        for call in calls.values():
            call()
        return {name: cost(name) for name in calls}

    return times


def test_the_fastest_of_all_is_found_and_each_was_verified(problem, bound):
    seen, _ = bound
    goal = Schedule(128, 64, 4, 4, splits=2, through_l1=True)

    def cost(schedule):
        return sum(abs(a - b) for a, b in zip(schedule.numbers, goal.numbers, strict=True))

    assert tune.tune(problem, times_by(cost)) == goal
    assert len(set(seen)) > 30


def test_the_kernel_with_tma_is_a_candidate_where_it_covers_the_layer(problem, bound, monkeypatch):
    seen, _ = bound
    times = times_by(lambda schedule: schedule.tma * -100 + schedule.stages + schedule.splits)
    assert not tune.tune(problem, times).tma  # of float32
    assert not any(schedule.tma for schedule in seen)
    monkeypatch.setattr(tune.Problem, "covered_by_tma", True)
    assert tune.tune(problem, times) == Schedule(32, 32, 4, 2, splits=1, tma=True)
    assert {schedule.through_l1 for schedule in seen if schedule.tma} == {False}
    assert not tune.tune(problem, times, tma=False).tma


def test_what_needs_too_much_is_left_out_and_what_computes_wrongly_is_an_error(problem, bound):
    _, hook = bound

    def needs_much(schedule):
        if schedule.warps == 8:
            raise OutOfResources
        return problem.truth

    hook["run"] = needs_much
    assert tune.tune(problem, times_by(lambda schedule: -schedule.warps)).warps == 4
    hook["run"] = lambda schedule: problem.truth + (schedule.stages == 3)
    with pytest.raises(VerificationError, match="differs from the reference"):
        tune.tune(problem, times_by(lambda schedule: 1.0))
    hook["run"] = lambda schedule: (_ for _ in ()).throw(OutOfResources())
    with pytest.raises(ValueError, match="none of"):
        tune.tune(problem, times_by(lambda schedule: 1.0))
    hook["run"] = lambda schedule: (_ for _ in ()).throw(KeyError())
    with pytest.raises(KeyError):
        tune.tune(problem, times_by(lambda schedule: 1.0))


@pytest.mark.parametrize(("tile", "block_in", "itemsize"), [(16, 16, 2), (64, 16, 2), (64, 64, 4), (128, 16, 2)])
def test_candidates_fit_the_gpu(tile, block_in, itemsize):
    found = list(tune.candidates(tile, block_in, itemsize, 99 * 1024))
    assert found
    for schedule in found:
        assert (tile + schedule.pixels) * schedule.channels * itemsize * schedule.stages <= 99 * 1024
        assert schedule.channels % block_in == 0
        assert schedules.settle(schedule, block_in, 1, 1, 1).channels == schedule.channels


def test_a_row_tells_both_times_and_the_rate_on_what_is_kept(problem, bound):
    row = tune.row(CASE, problem, times_by({"triton": 10.0, "dense": 30.0}.__getitem__))
    kept = problem.packed.nonzeros("clean")
    assert (row["triton_us"], row["dense_us"], row["block"]) == (10.0, 30.0, "64x16")
    assert row["density"] == pytest.approx(kept / (64 * 32 * 9))
    assert row["tflops_on_nonzeros"] == pytest.approx(2 * kept * 2 * 64 / 10.0 / 1e6)
    torch.testing.assert_close(problem.dense()(), problem.truth)


def test_layers_are_found_again_by_the_name_they_were_tuned_under(problem):
    other = tune.make_problem(dataclasses.replace(CASE, density=0.05), (64, 16), torch.float32, "cpu")
    assert "blocks 64x16 in 64" in problem.layer
    assert problem.layer != other.layer


def test_without_a_gpu_the_command_says_so(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tune"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        tune.main()
    assert "NVIDIA GPU" in capsys.readouterr().err
