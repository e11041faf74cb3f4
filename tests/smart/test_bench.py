import json

import pytest
import torch

import smart
import smart_kernels
from smart import bench
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
    cases = {(row["batch"], row["path"], row["runner"]) for row in rows}
    assert cases == {(b, p, r) for b in (1, 3) for p in ("clean", "adv") for r in ("eager", "fused", "smart_kernels")}
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
        ({"peers": ("tensorrt",)}, "unknown peer 'tensorrt': accepted are 'eager'"),
        ({"paths": ("robust",)}, "unknown path 'robust'"),
    ],
)
def test_wrong_settings_are_refused(model, sparse, arguments, message):
    with pytest.raises(ValueError, match=message):
        bench.benchmark(model, sparse, torch.rand(1, 1, 8, 8), **arguments)


def test_the_table_has_a_line_for_each_case(rows):
    lines = bench.table(rows).splitlines()
    assert len(lines) == 1 + 4
    assert lines[0].split()[-1] == "speed-up"
    assert all(line.endswith("x") for line in lines[1:])


def test_results_say_where_they_come_from(rows, tmp_path):
    file = bench.write_results(rows, tmp_path, "smoke", "a command")
    content = json.loads(file.read_text())
    assert file.name.startswith("smoke-cpu-20")
    assert set(content) == {"machine", "versions", "commit", "date", "command", "rows"}
    assert content["rows"] == rows
    assert content["versions"]["torch"] == torch.__version__
    assert bench.write_results(rows, tmp_path / "named.json", "smoke", "c").name == "named.json"
