import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from smart_kernels import paths


def test_names_and_both_ends_of_the_dial_are_names():
    assert paths.resolve("clean") == "clean"
    assert paths.resolve(0) == paths.resolve(0.0) == "clean"
    assert paths.resolve(1) == paths.resolve(1.0) == "adv"
    assert paths.resolve(0.25) == 0.25
    assert paths.resolve(1, ("only",)) == "only"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("robust", "unknown path 'robust': this network has 'clean' or 'adv'"),
        (1.01, r"lambda is 1.01: it must lie in \[0, 1\]"),
        (float("nan"), r"lambda is nan: it must lie in \[0, 1\]"),
        (True, "path is a bool"),
        (None, "path is a NoneType"),
        ([0, 1], "a sequence of 2, one for each stage of the network: it has no stages"),
        ({0: 1}, "path is a dict"),
    ],
)
def test_anything_else_is_refused(path, message):
    with pytest.raises((ValueError, TypeError), match=message):
        paths.resolve(path)


def test_a_path_for_each_stage():
    assert paths.resolve(("clean", 1, 0.5), stages=3) == ("clean", "adv", 0.5)
    assert paths.resolve(["adv", 1.0], stages=2) == "adv"
    with paths.running(("clean", "adv")):
        assert [paths.current(stage) for stage in (0, 1)] == ["clean", "adv"]
        with paths.running("adv"):
            assert paths.current(0) == "adv"
        assert paths.current(0) == "clean"
    with pytest.raises(ValueError, match="a sequence of 2, one for each stage of the network: it has 3 stages"):
        paths.resolve(("clean", "adv"), stages=3)
    with pytest.raises(TypeError, match="path is a tuple"):
        paths.resolve(("clean", ("adv",)), stages=2)


def test_threads_see_their_own_path():
    seen, barrier = {}, threading.Barrier(2)

    def work(path):
        with paths.running(path):
            barrier.wait()
            seen[path] = paths.current()

    threads = [threading.Thread(target=work, args=(path,)) for path in paths.PATHS]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert seen == {"clean": "clean", "adv": "adv"}
    assert paths.current() == "clean"


def test_an_error_restores_the_outer_path():
    with pytest.raises(KeyError), paths.running("adv"):
        raise KeyError
    assert paths.current() == "clean"


@given(st.lists(st.integers(0, 1), max_size=20))
def test_samples_come_back_in_their_order(choices):
    x = torch.arange(len(choices)).float()[:, None]
    sizes = []

    def run(rows, path):
        sizes.append(len(rows))
        return rows * (2 if path == "clean" else 3)

    y = paths.run_per_sample(run, x, torch.tensor(choices, dtype=torch.long))
    assert y.flatten().tolist() == [i * (3 if c else 2) for i, c in enumerate(choices)]
    assert sum(sizes) == len(choices)
