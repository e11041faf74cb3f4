from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch

from smart import plots

ACCURACY = {
    "clean": {"clean": 0.99, "fgsm": 0.6, "pgd20": 0.4},
    "adv": {"clean": 0.97, "fgsm": 0.9, "pgd20": 0.85},
}
DIAL = {0.5: {"clean": 0.95, "fgsm": 0.8, "pgd20": 0.7}}
LATENCY = {1: {"dense": 0.7, "sparse, clean path": 0.4}, 16: {"dense": 3.0, "sparse, adv path": 3.5}}


@pytest.fixture
def pixels(tmp_path):
    """Draws a picture and reads it back as (H, W, 3)."""
    image = pytest.importorskip("matplotlib.image")
    file = tmp_path / "picture.png"

    def draw(plot, *args):
        plot(file, *args)
        return image.imread(file)[:, :, :3]

    return draw


def share_of(pixels: np.ndarray, colour: str) -> float:
    wanted = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return float((np.abs(pixels - wanted).max(axis=2) < 0.01).mean())


def test_accuracy(pixels):
    image = pixels(plots.plot_accuracy, ACCURACY, DIAL, 0.15, "a title")
    assert image.shape[1] == pytest.approx(9.6 * plots.DPI, abs=1)
    # The bars of the adversarial path are higher.
    assert share_of(image, plots.ADV) > share_of(image, plots.CLEAN) > 0.02


def test_masks_show_each_kind_in_its_share(pixels):
    clean, adv = torch.zeros(2, 16, 16, 3, 3, dtype=torch.bool)
    clean[:8], adv[4:] = True, True
    image = pixels(plots.plot_masks, {"clean": clean, "adv": adv}, "stages.0.conv1")
    shares = {kind: share_of(image, colour) for kind, colour in (("adv", plots.ADV), ("clean", plots.CLEAN))}
    # Half of the weights live in the second path only, a quarter in the first only; the corner shows the first rows.
    assert shares["adv"] > shares["clean"] > 0.03
    assert share_of(image, plots.BOTH) > 0.03


def test_masks_of_a_layer_smaller_than_the_corner(pixels):
    masks = {path: torch.ones(2, 3, 1, 1, dtype=torch.bool) for path in ("clean", "adv")}
    assert share_of(pixels(plots.plot_masks, masks, "shortcut"), plots.BOTH) > 0.1


def test_latency(pixels):
    memory = {"dense": 4000, "sparse, both paths": 1000}
    image = pixels(plots.plot_latency, LATENCY, memory, "a title")
    assert image.shape[0] == pytest.approx(7.5 * plots.DPI, abs=1)
    for colour in (plots.DENSE, plots.CLEAN, plots.ADV, plots.BOTH):
        assert share_of(image, colour) > 0.005


def test_global_style_is_left_alone(pixels):
    import matplotlib

    before = dict(matplotlib.rcParams)
    pixels(plots.plot_accuracy, ACCURACY, DIAL, 0.15, "a title")
    assert dict(matplotlib.rcParams) == before


def test_missing_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install matplotlib" in plots.missing()


def bench_row(runner, path="clean", **other):
    times = {"ms_p20": 0.9, "ms_p50": 1.0, "ms_p80": 1.1}
    facts = {"network": "net", "pattern": "unstructured", "density": 0.2, "batch": 1, "device": "cpu", "threads": 1}
    return {**facts, **times, "dtype": "float32", "runner": runner, "path": path, **other}


BENCHMARK = {
    "machine": {"cpu": "a processor", "gpu": None},
    "rows": [
        bench_row("eager", ms_p20=1.8, ms_p50=2.0, ms_p80=2.2),
        bench_row("smart_kernels"),
        bench_row("smart_kernels", "adv"),
        bench_row("smart_kernels", batch=2, threads=2),  # nothing beside it
    ],
}


def test_benchmark(pixels):
    image = pixels(plots.plot_benchmark, BENCHMARK)
    clean, adv, dense = (share_of(image, colour) for colour in (plots.CLEAN, plots.ADV, plots.RUNNERS["eager"]))
    # The second clean bar is twice as high, the dense one half as high.
    assert clean > 2 * adv and adv > 1.5 * dense > 0


def test_the_same_benchmark_is_the_same_file(tmp_path):
    pytest.importorskip("matplotlib")
    for name in ("a.png", "b.png"):
        plots.plot_benchmark(tmp_path / name, BENCHMARK, comment="made from these numbers")
    written = (tmp_path / "a.png").read_bytes()
    assert written == (tmp_path / "b.png").read_bytes()
    assert b"made from these numbers" in written and b"Matplotlib" not in written
