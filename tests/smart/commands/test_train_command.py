"""`smart train`: settings, runs, stopping and going on."""

from __future__ import annotations

import dataclasses
import sys

import pytest
import yaml
from calls import QUICK, assert_refused
from small import make_data

from smart import settings, text
from smart.allocation import ALLOCATIONS
from smart.checkpoint import load_checkpoint, read_checkpoint
from smart.config import TrainConfig
from smart.datasets import DATASETS
from smart.layers import smart_convs
from smart.rewire import METHODS, REDISTRIBUTE, SCHEDULES


def test_train_writes_a_run(run, npz):
    assert {"config.json", "log.csv", "best.safetensors", "last.safetensors", "settings.yaml"} == {
        file.name for file in run.iterdir()
    }
    saved = yaml.safe_load((run / "settings.yaml").read_text())
    assert saved["data"] == str(npz) and saved["epochs"] == 2 and saved["density"] == {"clean": 0.2, "adv": 0.2}
    assert set(saved) == set(settings.ALL)


def test_saved_settings_repeat_the_run(run, tmp_path, smart):
    code, out, _ = smart("train", "--config", run / "settings.yaml", "--out", tmp_path / "again", "--no-progress")
    assert code == 0 and str(tmp_path / "again" / "best.safetensors") in out
    assert (tmp_path / "again" / "best.safetensors").stat().st_size
    first, again = (read_checkpoint(folder / "last.safetensors")[1]["model"] for folder in (run, tmp_path / "again"))
    assert all(bool((first[key] == again[key]).all()) for key in first)


def test_flag_beats_file_and_file_beats_default(npz, tmp_path, smart):
    config = tmp_path / "x.yaml"
    config.write_text(f"data: {npz}\ndensity: 0.5\noverlap: 0.75\nepochs: 3\nweight-decay: 1e-4\neps: 4/255\nseed: 5\n")
    code, out, err = smart("train", "--config", config, "--epochs", 1, "--out", tmp_path / "run", *QUICK)
    assert code == 0, err
    saved = yaml.safe_load((tmp_path / "run" / "settings.yaml").read_text())
    assert saved["epochs"] == 1
    assert saved["weight_decay"] == 1e-4 and saved["eps"] == 4 / 255 and saved["seed"] == 5
    assert saved["momentum"] == TrainConfig().momentum
    model, _ = load_checkpoint(tmp_path / "run" / "best.safetensors")
    assert model.spec["overlap"] == 0.75 and model.spec["seed"] == 5 and model.spec["density"]["adv"] == 0.5
    assert "clean 0.500, adv 0.500, union 0.625" in out


def test_densities_differ_by_path(npz, tmp_path, smart):
    code, out, _ = smart(
        "train", "--data", npz, "--density", "0.4,0.1", "--epochs", 1, "--out", tmp_path / "run", *QUICK
    )
    assert code == 0 and "clean 0.4" in out and "adv 0.10" in out


def test_every_choice_of_masks_reaches_the_network(npz, tmp_path, smart):
    config = tmp_path / "x.yaml"
    config.write_text(
        "masked_layers: [last_stages, 'stages.0.0.conv2']\ndedicated_layers: stages\\.2.*\nallocation: erk\n"
        "overlap: free\nrewire: rigl\n"
        "prune_schedule: constant\nrewire_every: 2\nrewire_unit: steps\nrewire_until: 0.5\n"
    )
    flags = ("--pattern", "block:64x16", "--density", "0.3", "--epochs", 1)
    out = tmp_path / "run"
    code, _, err = smart("train", "--data", npz, "--config", config, *flags, "--out", out, *QUICK)
    assert (
        code == 0 and err.count("\n") == 1 and err.startswith("smart: warning: 1 of 7 layers cannot have pattern block")
    )
    assert "stages.0.0.conv2: its 32 output channels are no multiple of 64" in err
    model, metadata = load_checkpoint(out / "last.safetensors")
    assert model.spec["allocation"] == "erk" and model.overlap == "independent" and model.pattern == "block:64x16"
    shares = {name.removeprefix("net."): layer.shares_mask for name, layer in smart_convs(model).items()}
    assert len(shares) == 6 and {name for name, one in shares.items() if not one} == {n for n in shares if "s.2." in n}
    expected = {"rewire": "rigl", "prune_schedule": "constant", "rewire_every": 2, "rewire_until": 0.5}
    assert expected.items() <= metadata["config"].items()
    code, _, err = smart(
        "train", "--data", npz, "--config", config, *flags, "--strict", "--out", tmp_path / "b", *QUICK
    )
    assert_refused((code, "", err), 2, "stages.0.0.conv2", "block:64x16")


def test_info_lists_the_words(smart):
    out = smart("info")[1]
    for word in (*ALLOCATIONS, *METHODS, *SCHEDULES, *REDISTRIBUTE, "last_stages", "block:64x16", "nested"):
        assert word in out


def test_train_help_shows_every_setting_and_its_default(smart):
    out = " ".join(smart("train", "--help")[1].split())
    for name, setting in settings.ALL.items():
        assert f"--{name.replace('_', '-')}" in out
        assert setting.default is None or f"(default: {text.show(setting.default)})" in out
    assert "(default: 8/255)" in out


def test_stopped_run_goes_on_to_the_same_numbers(run, npz, tmp_path, smart, monkeypatch):
    out = tmp_path / "a run"
    command = ["train", "--data", npz, "--epochs", 2, "--out", out, *QUICK]
    training = sys.modules["smart.train"]  # smart.train is the function
    original = training._Run.epoch

    def stop_in_the_second(self, epoch, bar):
        if epoch == 1:
            raise KeyboardInterrupt
        original(self, epoch, bar)

    monkeypatch.setattr(training._Run, "epoch", stop_in_the_second)
    code, _, err = smart(*command)
    assert code == 130 and f"smart train --resume --out '{out}'" in err
    monkeypatch.undo()
    code, _, err = smart("train", "--resume", "--out", out, "--no-progress")
    assert code == 0, err
    for name in ("log.csv", "settings.yaml"):
        whole, resumed = ((folder / name).read_text().splitlines() for folder in (run, out))
        # The last column of the log is the seconds taken.
        assert [line.rpartition(",")[0] for line in whole] == [line.rpartition(",")[0] for line in resumed]


def test_resume_with_another_setting(run, smart):
    assert_refused(smart("train", "--resume", "--out", run, "--lr", 0.2, "--no-progress"), 1, "lr", "0.1", "0.2")
    assert yaml.safe_load((run / "settings.yaml").read_text())["lr"] == 0.1


def test_resume_of_nothing(tmp_path, npz, smart):
    assert_refused(smart("train", "--resume", "--data", npz, "--out", tmp_path), 1, "no run to resume")


def test_folder_that_holds_a_run_is_kept_unless_told(run, npz, smart):
    before = (run / "settings.yaml").read_text()
    assert_refused(smart("train", "--data", npz, "--epochs", 1, "--out", run, *QUICK), 1, "already holds a run")
    assert (run / "settings.yaml").read_text() == before


def test_diverging_training(npz, tmp_path, smart):
    wild = ["--lr", 1000, "--weight-decay", 1, "--epochs", 9]
    outcome = smart("train", "--data", npz, *wild, "--out", tmp_path / "run", *QUICK)
    # The gradients or the loss overflow first, as the images have it.
    assert_refused(outcome, 1, "lower")


@pytest.mark.parametrize(
    "content, words",
    [
        ("epoch: 3", ["'epoch'", "'epochs'"]),
        ("densty: 0.2", ["'densty'", "'density'"]),
        ("zzz: 1", ["'zzz'", "smart train --help"]),
        ("density: 0", ["(0, 1]"]),
        ("density: {clean: 0.2}", ["'clean'", "'adv'"]),
        ("epochs: many", ["epochs", "'many'"]),
        ("flip: 1", ["flip", "bool"]),
        ("lr: [1]", ["lr", "[1]"]),
        ("image_size: big", ["image_size", "'big'"]),
        ("- epochs", ["list"]),
        ("a: b: c", ["not YAML"]),
    ],
)
def test_bad_config_file(content, words, tmp_path, smart):
    file = tmp_path / "x.yaml"
    file.write_text(content)
    assert_refused(smart("train", "--config", file, "--out", tmp_path / "run"), 2, "x.yaml", *words)


def test_a_data_set_by_name_is_found_again_from_elsewhere(tmp_path, smart, monkeypatch):
    images, labels = make_data(60).train
    asked = []

    def read(root):
        asked.append(str(root))
        splits = {"train": ((images * 255).byte(), labels), "test": ((images[:9] * 255).byte(), labels[:9])}
        return splits, ["a", "b", "c"]

    monkeypatch.setitem(DATASETS, "cifar10", dataclasses.replace(DATASETS["cifar10"], read=read))
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "run"
    flags = ["--data", "cifar10", "--data-root", "kept", "--epochs", 1, "--out", out, *QUICK]
    code, said, err = smart("train", *flags)
    assert code == 0 and "cifar10: 54 train, 6 val, 9 test images" in said, err
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    code, said, _ = smart("eval", out / "best.safetensors", "--attacks", "clean", "--no-progress")
    assert code == 0 and "cifar10, 9 test images" in said
    assert asked == [str(tmp_path / "kept")] * 2
