from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

import smart_kernels
from smart import bench, cli, demo, load_checkpoint
from smart.data import load_data

SKELETON = {
    "accuracy": {path: {"clean", "fgsm", "pgd20"} for path in ("clean", "adv")},
    "nonzero_params": {"dense", "union", "clean", "adv"},
    "macs": {"dense", "clean", "adv"},
    "bytes": {"dense", "packed"},
    "latency_ms": {batch: {"dense", "clean", "adv"} for batch in ("1", "16")},
    "max_rel_error": {"clean", "adv"},
}
PICTURES = {"accuracy.png", "masks.png", "latency.png"}


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Forty images a split, weak attacks and no repeated timing: the demo's way, not its numbers."""
    with pytest.MonkeyPatch.context() as patch:
        recipe = demo.demo_config
        patch.setattr(demo, "demo_config", lambda **changes: recipe(attack_steps=1, val_attack_steps=1, **changes))
        patch.setattr(demo.Settings, "load_data", _few_digits)
        patch.setattr(bench.benchmark, "__defaults__", _with_budget(0.0))
        yield


def _few_digits(settings):
    data = load_data("digits")
    data.train, data.val, data.test = ((x[:40], y[:40]) for x, y in (data.train, data.val, data.test))
    return data


def _with_budget(seconds: float) -> tuple:
    return tuple(seconds if value == 2.0 else value for value in bench.benchmark.__defaults__)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "out"
    torch.set_num_threads(1)
    assert cli.main(["demo", "--epochs", "2", "--out", str(out), "--no-progress"]) == 0
    return out


def test_report_is_complete(finished):
    report = json.loads((finished / "report.json").read_text())
    required = ["data", "model", "seed", "density", "eps", *SKELETON]
    assert list(report)[: len(required)] == required
    for key, keys in SKELETON.items():
        assert set(report[key]) == set(keys)
        for inner, names in keys.items() if isinstance(keys, dict) else ():
            assert set(report[key][inner]) == names
    assert (report["data"], report["model"], report["density"], report["seed"]) == ("digits", "tiny", 0.2, 0)
    assert all(0 <= a <= 1 for row in report["accuracy"].values() for a in row.values())
    assert all(ms > 0 for row in report["latency_ms"].values() for ms in row.values())
    assert all(error < 1e-5 for error in report["max_rel_error"].values())
    assert report["nonzero_params"]["union"] <= 0.4 * report["nonzero_params"]["dense"]
    # How many layers stay dense, and so the bytes, depends on what was faster.
    assert report["bytes"]["dense"] == 4 * report["nonzero_params"]["dense"]
    assert 0 < report["bytes"]["packed"] < 3 * report["bytes"]["dense"]
    assert set(report["lambda"]) == {"0.25", "0.5", "0.75"}


def test_files_are_what_they_say(finished):
    assert {file.name for file in finished.iterdir()} == PICTURES | {
        "report.json",
        "benchmark.json",
        "checkpoint.safetensors",
        "packed.safetensors",
        "settings.yaml",
        "training",
    }
    model, metadata = load_checkpoint(finished / "checkpoint.safetensors")
    assert metadata["config"]["epochs"] == 2
    smart_kernels.verify(model, smart_kernels.load(finished / "packed.safetensors"), torch.rand(3, 1, 8, 8))
    assert len(json.loads((finished / "benchmark.json").read_text())["rows"]) == 2 * (2 + 2)


def test_checkpoint_can_be_evaluated_by_name_alone(finished, capsys):
    assert cli.main(["eval", str(finished / "checkpoint.safetensors"), "--attacks", "clean", "--no-progress"]) == 0
    assert "digits" in capsys.readouterr().out


def test_summary_fits_the_screen(finished):
    report = json.loads((finished / "report.json").read_text())
    text = demo.summary(report)
    assert max(map(len, text.splitlines())) <= 100
    for word in ("PGD-20", "lambda 0.5", "sparse adv", "norms folded", "KiB", "eps 0."):
        assert word in text


def test_stopped_demo_goes_on_and_a_finished_one_starts_anew(tmp_path, capsys, monkeypatch):
    training = sys.modules["smart.train"]
    original = training._Run.epoch
    trained = []

    def epoch(self, number, bar):
        trained.append(number)
        if len(trained) == 2:
            raise KeyboardInterrupt
        original(self, number, bar)

    monkeypatch.setattr(training._Run, "epoch", epoch)
    monkeypatch.setattr(demo.plots, "missing", lambda: "matplotlib is not installed")
    command = ["demo", "--epochs", "2", "--out", str(tmp_path), "--no-progress"]
    assert cli.main(command) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert not (tmp_path / "report.json").exists()
    assert cli.main(command) == 0
    assert trained == [0, 1, 1]
    assert "no pictures: matplotlib is not installed" in capsys.readouterr().out
    assert not PICTURES & {file.name for file in tmp_path.iterdir()}
    assert cli.main(command) == 0
    assert trained == [0, 1, 1, 0, 1]


def test_unfinished_run_of_other_settings_or_damaged_is_replaced(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo.plots, "missing", lambda: "not drawn here")
    monkeypatch.setattr(demo, "evaluate", _stop)
    for epochs in ("1", "2"):
        assert cli.main(["demo", "--epochs", epochs, "--out", str(tmp_path), "--no-progress"]) == 130
    assert "starting anew: " in capsys.readouterr().out
    (tmp_path / "training" / "last.safetensors").write_bytes(b"cut")
    assert cli.main(["demo", "--epochs", "2", "--out", str(tmp_path), "--no-progress"]) == 130
    out = capsys.readouterr().out
    assert "starting anew: " in out and "last.safetensors" in out


def _stop(*args, **options):
    raise KeyboardInterrupt


def test_without_scikit_learn(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    monkeypatch.setattr(demo.Settings, "load_data", lambda settings: load_data("digits"))
    assert cli.main(["demo", "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "smart: error: the digits come with scikit-learn: pip install scikit-learn\n"


def test_pictures_are_drawn_only_where_matplotlib_is(finished):
    assert (importlib.util.find_spec("matplotlib") is not None) == (finished / "masks.png").exists()
