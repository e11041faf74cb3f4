"""Every row of the coverage table, at a small size."""

import json
import subprocess
import sys

import pytest
import torch
from torch import nn

import smart_kernels
from benchmarks import coverage, networks, report
from smart_kernels import native, patterns, swap, verify
from smart_kernels.protocol import is_conv, is_linear, masks_of

TOLERANCE = 1e-5
IDS = [str(case) for case in coverage.CASES]


@pytest.fixture(scope="module", params=coverage.CASES, ids=IDS)
def case(request):
    return request.param


@pytest.fixture(scope="module")
def model(case):
    torch.manual_seed(0)
    return case.model(small=True)


@pytest.fixture(scope="module")
def x(model):
    torch.manual_seed(1)
    return torch.rand(2, 3, 16, 16)


@pytest.fixture(scope="module")
def sparse(model, x):
    return swap(model, x, strict=case_is_sparse(model), measure=False)


def case_is_sparse(model):
    """Strict where every layer with zeros has a sparse kernel: a transposed convolution with zeros would have none."""
    return native.missing() is None and not any(isinstance(module, nn.ConvTranspose2d) for module in model.modules())


def test_it_is_swapped_as_one_graph_and_computes_the_same(model, sparse, x):
    assert sparse.uncaptured is None
    assert max(verify(model, sparse, x).values()) < TOLERANCE


def test_another_batch_and_size(model, sparse):
    size = 24 if any(isinstance(module, nn.AdaptiveAvgPool2d) for module in sparse.modules()) else 20
    verify(model, sparse, torch.rand(17, 3, size, size), TOLERANCE)


def test_the_report_names_every_layer_with_zeros(case, model, sparse):
    rows = {row["name"]: row for row in sparse.report()}
    expected = set()
    for name, module in model.named_modules():
        if is_conv(module) or (is_linear(module) and not bool(masks_of(module, sparse.paths)[sparse.paths[0]].all())):
            expected.add(name)
    assert set(rows) == expected
    assert all(row["why"] and row["bytes"] > 0 for row in rows.values())
    if case.how == coverage.TWO_PATHS:
        parsed = patterns.parse(model.pattern)
        assert all(parsed.holds(mask) for m in model.modules() if hasattr(m, "masks") for mask in m.masks.values())
        assert sparse.paths == ("clean", "adv")


def test_measured_plans_and_dense_ones_agree(model, x):
    for backend in ("auto", "dense"):
        sparse = swap(model, x, backend=backend)
        verify(model, sparse, x, TOLERANCE)


def test_saved_and_loaded_it_is_the_same(model, sparse, x, tmp_path):
    smart_kernels.save(sparse, tmp_path / "network.safetensors")
    loaded = smart_kernels.load(tmp_path / "network.safetensors")
    for path in sparse.paths:
        assert torch.equal(loaded(x, path=path), sparse(x, path=path))


@pytest.mark.parametrize("name", networks.NETWORKS)
def test_the_networks_follow_their_seed(name):
    first, again, other = (networks.make(name, 8, 1, seed) for seed in (0, 0, 1))
    x = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(first(x), again(x))
        assert not torch.equal(first(x), other(x))
        assert first(x).shape[:2] == (1, networks.CLASSES)


@pytest.mark.parametrize("how", [coverage.PRUNE, coverage.REMOVED, coverage.ZEROS])
def test_ways_of_pruning_leave_the_density_asked_for(how):
    model = coverage.CoverageCase("vgg", how).model(small=True)
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    density = [float((layer.weight != 0).float().mean()) for layer in layers]
    assert density[0] == density[-1] == 1
    assert density[1:-1] == pytest.approx([0.2] * (len(layers) - 2), abs=0.01)
    assert any("weight_orig" in name for name, _ in model.named_parameters()) == (how == coverage.PRUNE)


def test_the_suite_runs_from_the_command_line(tmp_path):
    command = ["-m", "benchmarks.run", "--suite", "coverage", "--only", "tiny, two paths, 2:4", "--budget", "0.01"]
    out = tmp_path / "coverage-cpu-2000-01-01.json"
    subprocess.run(
        [sys.executable, *command, "--peers", "eager", "--out", str(out)],
        check=True,
        capture_output=True,
        cwd=report.ROOT,
    )
    content = json.loads(out.read_text())
    ours = [row for row in content["rows"] if row["runner"] == "smart_kernels"]
    assert [(row["batch"], row["layers"], row["pattern"]) for row in ours] == [(1, 8, "2:4"), (16, 8, "2:4")]
    assert "| tiny | two paths | 2:4 | 0.5" in report._coverage_table(content, out.name)
