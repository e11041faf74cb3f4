"""`smart methods`: several trainings, tests and a comparison in one command."""

from __future__ import annotations

import csv
import json

import pytest
import yaml
from calls import QUICK, assert_refused

from smart.settings import Settings, for_method


@pytest.fixture
def methods(npz, tmp_path, smart):
    """Runs the command on a file of settings that suits masks of their own."""
    file = tmp_path / "settings.yaml"
    chosen = {"data": str(npz), "epochs": 1, "density": 0.3, "overlap": "disjoint", "dial": "sampled"}
    file.write_text(yaml.safe_dump(chosen))

    def call(*words):
        flags = ["--config", file, "--out", tmp_path / "out", "--attacks", "clean", "pgd1", "--limit", 9, *QUICK]
        return smart("methods", *words, *flags)

    return call


def test_each_is_trained_tested_and_compared(methods, tmp_path):
    code, _, err = methods("smart", "floats", "pgd_at", "--csv", tmp_path / "table.csv")
    assert code == 0, err
    with (tmp_path / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == ["smart", "floats", "pgd_at"]
    assert {row["measured_on"] for row in rows} == {"9 test images"}
    settings = {
        name: yaml.safe_load((tmp_path / "out" / name / "settings.yaml").read_text())
        for name in ("smart", "floats", "pgd_at")
    }
    assert {name: each["overlap"] for name, each in settings.items()} == {
        "smart": "disjoint",
        "floats": "shared",
        "pgd_at": "independent",
    }
    assert [each["density"]["adv"] for each in settings.values()] == [0.3, 0.3, 1.0]
    assert [each["dial"] for each in settings.values()] == ["sampled", "ends", "ends"]
    card = json.loads((tmp_path / "out" / "smart" / "best.card.json").read_text())
    assert set(card["attacks"]) == {"clean", "pgd1"} and card["command"].startswith("smart methods smart floats")


def test_it_goes_on_with_what_is_there(methods, tmp_path):
    assert methods("smart")[0] == 0
    trained = (tmp_path / "out" / "smart" / "last.safetensors").stat().st_mtime_ns
    code, out, _ = methods("smart", "standard")
    assert code == 0 and len(out.splitlines()[-2:]) == 2
    assert (tmp_path / "out" / "smart" / "last.safetensors").stat().st_mtime_ns == trained
    assert methods("smart", "--overwrite")[0] == 0
    assert (tmp_path / "out" / "smart" / "last.safetensors").stat().st_mtime_ns != trained
    assert_refused(methods("smart", "--epochs", 2), 1, "was started with epochs 1, not 2")


def test_all_that_is_wrong_is_said_before_any_training(methods, tmp_path, monkeypatch):
    monkeypatch.setattr("smart.commands.methods.train_into", lambda *_: pytest.fail("work was begun"))
    assert_refused(methods("nothing"), 2, "nothing")
    assert_refused(methods("pgd_at", "smart", "--density", 0.7), 2, "disjoint")
    assert_refused(methods("smart", "--plot", tmp_path / "x.pdf"), 2, ".png")
    monkeypatch.setattr("torch.distributed.is_torchelastic_launched", lambda: True)
    assert_refused(methods("smart"), 2, "torchrun")


def test_settings_for_another_method_leave_out_what_it_does_not_have():
    given = {"pattern": "2:4", "overlap": 0.5, "epochs": 3, "dial": "sampled"}
    assert for_method("smart", given) == given | {"method": "smart"}
    assert for_method("dual_bn", given) == {"epochs": 3, "dial": "sampled", "method": "dual_bn"}
    assert for_method("oat", given) == {"epochs": 3, "method": "oat"}
    assert Settings.resolve(for_method("floats", given)).model["overlap"] == "shared"
