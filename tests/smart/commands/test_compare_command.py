"""`smart eval --card` and `smart compare`."""

from __future__ import annotations

import csv
import hashlib
import json
import shutil

import pytest
from calls import QUICK, assert_refused

from smart.cards import read_card
from smart.checkpoint import load_checkpoint
from smart.costs import macs, nonzeros


@pytest.fixture(scope="module")
def runs(run, tmp_path_factory):
    """Two runs of which one has a card, and folders that are none, or not yet one, or were one."""
    from smart import cli

    root = tmp_path_factory.mktemp("many")
    for name in ("first", "second", "young", "broken", "no-config"):
        shutil.copytree(run, root / name)
    evaluated = ["eval", str(root / "second" / "best.safetensors"), "--attacks", "clean", "pgd2", "--eps", "4/255"]
    assert cli.main([*evaluated, "--limit", "9", "--card", "--no-progress"]) == 0
    (root / "young" / "best.safetensors").unlink()
    content = (root / "broken" / "best.safetensors").read_bytes()
    (root / "broken" / "best.safetensors").write_bytes(content[: len(content) // 2])
    (root / "no-config" / "config.json").unlink()
    (root / "file").write_text("no folder")
    return root


def test_a_card_says_all_that_is_needed_to_measure_again(runs, npz):
    checkpoint = runs / "second" / "best.safetensors"
    card = json.loads((runs / "second" / "best.card.json").read_text())
    assert card == read_card(checkpoint)
    assert card["sha256"] == hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    assert (card["dataset"], card["split"], card["n_examples"]) == (npz.name, "test", 9)
    assert (card["threat_model"], card["eps"], card["step"], card["restarts"]) == ("Linf", "4/255", "1/255", 1)
    assert card["attacks"] == {"clean": {"steps": 0}, "pgd2": {"steps": 2}} and card["seed"] == 0
    assert card["command"].startswith("smart eval ") and card["versions"]["torch"] and card["training"]["config"]
    for path in ("clean", "adv"):
        row = card["accuracy"][path]
        assert card["paths"][path]["clean_acc"] == round(100 * row["clean"], 2)
        assert card["paths"][path]["robust_acc"] <= round(100 * min(row.values()), 2)
    model, _ = load_checkpoint(checkpoint)
    assert card["nonzeros"] == nonzeros(model) and card["macs"] == macs(model, (1, 6, 6))


def test_a_card_of_another_checkpoint_is_not_believed(runs, tmp_path):
    shutil.copytree(runs / "second", tmp_path / "run")
    checkpoint = tmp_path / "run" / "best.safetensors"
    checkpoint.write_bytes(checkpoint.read_bytes() + b"x")
    with pytest.raises(ValueError, match="of another checkpoint than"):
        read_card(checkpoint)
    for content in ("{", "[]", "{}"):
        (tmp_path / "run" / "best.card.json").write_text(content)
        with pytest.raises(ValueError, match="is no card"):
            read_card(checkpoint)
    (tmp_path / "run" / "best.card.json").unlink()
    assert read_card(checkpoint) is None


def test_compare(runs, npz, tmp_path, smart):
    pytest.importorskip("matplotlib")
    files = {name: tmp_path / "new" / f"c{name}.png" for name in ("csv", "markdown", "plot")}
    flags = [part for name, file in files.items() for part in (f"--{name}", file)]
    code, out, err = smart("compare", *sorted(runs.iterdir()), runs / "missing", *flags)
    assert code == 0
    lines = out.splitlines()
    assert len(lines) == 4 and lines[0].startswith("run ") and lines[1].split()[:2] == ["first", "tiny"]
    assert "validation images" in lines[1] and "9 test images" in lines[2] and "PGD-2, eps 4/255" in lines[2]
    for name, why in {
        "young": "it has no finished epoch",
        "broken": "is not a whole safetensors file",
        "no-config": "it is no folder of a run",
        "file": "there is no such folder",
        "missing": "there is no such folder",
    }.items():
        assert any(f"left out {runs / name}: " in line and why in line for line in err.splitlines()), err
    assert "accuracies are on different attacks, which do not compare: PGD-" in err
    with files["csv"].open() as file:
        first, second = csv.DictReader(file)
    model, _ = load_checkpoint(runs / "second" / "best.safetensors")
    card = read_card(runs / "second" / "best.safetensors")
    assert float(second["robust"]) == card["paths"]["adv"]["robust_acc"] / 100
    assert float(second["clean"]) == card["paths"]["clean"]["clean_acc"] / 100
    assert int(second["nonzeros_union"]) == nonzeros(model)["union"] and first["data"] == npz.name
    assert int(first["macs_adv"]) == macs(model, (1, 6, 6))["adv"] and first["epochs"].endswith(" of 2")
    log = list(csv.DictReader((runs / "first" / "log.csv").open()))
    assert float(first["clean"]) in [float(row["val_clean"]) for row in log]
    text = files["markdown"].read_text().splitlines()
    assert (
        text[1] == "|" + " --- |" * 17 and text[2].startswith("| first | tiny | smart |") and "* left out" in text[-1]
    )
    assert files["plot"].read_bytes().startswith(b"\x89PNG")


def test_a_run_that_goes_on_is_named(npz, tmp_path, smart, monkeypatch):
    out = tmp_path / "run"
    assert smart("train", "--data", npz, "--epochs", 1, "--out", out, *QUICK)[0] == 0
    config = json.loads((out / "config.json").read_text())
    config["config"]["epochs"] = 5
    (out / "config.json").write_text(json.dumps(config))
    code, out_text, err = smart("compare", out)
    assert code == 0 and "1 of 5" in out_text and f"{out} is not finished: 1 of 5 epochs" in err


def test_a_run_from_before_shapes_were_kept_has_no_multiplications(run, tmp_path, smart):
    shutil.copytree(run, tmp_path / "old")
    config = json.loads((run / "config.json").read_text())
    del config["image_shape"]
    (tmp_path / "old" / "config.json").write_text(json.dumps(config))
    code, out, _ = smart("compare", tmp_path / "old", "--csv", tmp_path / "c.csv")
    assert code == 0 and out.splitlines()[1].split()[-3:] == ["-", "-", "-"]


def test_nothing_to_compare(runs, smart, tmp_path):
    outcome = smart("compare", runs / "young", runs / "missing")
    assert_refused(outcome, 1, "nothing to compare", "young: it has no finished epoch", "missing: there is no such")
    assert_refused(smart("compare"), 2, "RUN")
    assert_refused(smart("compare", runs / "first", "--plot", "c.jpg"), 2, "'c.jpg'", ".png")
    (runs / "no-config" / "config.json").write_text('{"config": 3}')
    assert_refused(smart("compare", runs / "no-config"), 1, "its config.json is damaged")
    (runs / "no-config" / "config.json").unlink()


def test_a_card_needs_a_place(run, tmp_path, smart):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    (copy / "best.card.json").mkdir()
    assert_refused(smart("eval", copy / "best.safetensors", "--card"), 1, "best.card.json is a folder")
