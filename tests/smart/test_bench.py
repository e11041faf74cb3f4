import pytest
import torch

import smart
import smart_kernels
from smart import bench
from smart.peers import PEERS, Peer, Ready
from smart_kernels.modules import SparseConv2d

COMMON = ("network", "pattern", "density", "batch", "dtype", "device", "threads", "path", "runner", "backend")
FIELDS = {*COMMON, "ms_p20", "ms_p50", "ms_p80", "images_per_s", "weight_bytes", "peak_bytes", "max_rel_error"}


@pytest.fixture(scope="module")
def model():
    return smart.create_model("tiny", in_channels=1, density=0.2).eval()


@pytest.fixture
def sparse(model):
    return smart_kernels.swap(model, torch.rand(2, 1, 8, 8))


@pytest.fixture
def rows(model, sparse):
    return bench.benchmark(
        model, sparse, torch.rand(2, 1, 8, 8), (1, 3), peers=("eager", "fused"), budget_s=0.01, network="tiny"
    )


def test_every_case_has_a_whole_row_for_every_runner(rows):
    assert all(set(row) == FIELDS for row in rows)
    cases = [(row["batch"], row["path"], row["runner"]) for row in rows]
    # The dense runners' time is that of any path.
    paths = (("eager", "clean"), ("fused", "clean"), ("smart_kernels", "clean"), ("smart_kernels", "adv"))
    assert cases == [(batch, path, runner) for batch in (1, 3) for runner, path in paths]
    for row in rows:
        assert 0 < row["ms_p20"] <= row["ms_p50"] <= row["ms_p80"]
        assert row["images_per_s"] == pytest.approx(row["batch"] / row["ms_p50"] * 1e3)
        assert row["max_rel_error"] < 1e-5
        assert row["density"] == pytest.approx(0.2, abs=0.01)


def test_a_wrong_network_is_never_timed(model, sparse):
    next(m for m in sparse.modules() if isinstance(m, SparseConv2d)).bias.clean.add_(0.1)
    with pytest.raises(smart_kernels.VerificationError, match="smart_kernels differs from the dense network"):
        bench.benchmark(model, sparse, torch.rand(1, 1, 8, 8), (1,), budget_s=0.01)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batches": (0,)}, "batch 0: give sizes of at least 1"),
        ({"peers": ("tensorrt",)}, "unknown peer 'tensorrt': accepted are 'all', 'eager'"),
        ({"paths": ("robust",)}, "unknown path 'robust'"),
    ],
)
def test_wrong_settings_are_refused(model, sparse, arguments, message):
    with pytest.raises(ValueError, match=message):
        bench.benchmark(model, sparse, torch.rand(1, 1, 8, 8), **arguments)


def peer_that(changes, dtype=None):
    def make(net, example):
        return Ready(lambda x: net(x) * (1 + changes), "changed")

    return Peer(make, dtype=dtype)


def test_a_wrong_peer_is_never_timed(model, sparse, monkeypatch):
    monkeypatch.setitem(PEERS, "wrong", peer_that(0.01))
    with pytest.raises(smart_kernels.VerificationError, match="wrong differs from the dense network"):
        bench.benchmark(model, sparse, torch.rand(1, 1, 8, 8), (1,), peers=["wrong"], budget_s=0.01)


def test_a_peer_of_less_precision_has_a_looser_tolerance(model, sparse, monkeypatch):
    monkeypatch.setitem(PEERS, "coarse", peer_that(0.01, torch.bfloat16))
    row, *_ = bench.benchmark(model, sparse, torch.rand(1, 1, 8, 8), (1,), ["clean"], ["coarse"], budget_s=0.01)
    assert (row["runner"], row["dtype"], row["backend"]) == ("coarse", "bfloat16", "dense (changed)")
    assert row["weight_bytes"] == 2 * sum(layer["weights"] for layer in sparse.report())
    assert 0.005 < row["max_rel_error"] < 0.02


def test_peers_run_the_first_path_asked_for(model, sparse):
    rows = bench.benchmark(model, sparse, torch.rand(1, 1, 8, 8), (1,), ["adv", "clean"], budget_s=0.01)
    assert [(row["runner"], row["path"]) for row in rows] == [
        ("eager", "adv"),
        ("smart_kernels", "adv"),
        ("smart_kernels", "clean"),
    ]
