"""`smart eval`."""

from __future__ import annotations

import csv
import json

from calls import QUICK


def test_eval(checkpoint, tmp_path, smart):
    files = ["--csv", tmp_path / "t.csv", "--json", tmp_path / "t.json"]
    wanted = ["--attacks", "clean", "fgsm", "pgd2", "--lambdas", "0.5", "--eps", "4/255", "--limit", 9, "--transfer"]
    code, out, _ = smart("eval", checkpoint, *wanted, "--no-progress", *files)
    assert code == 0 and "9 test images; L-infinity eps 4/255" in out and "PGD-2" in out and "lambda 0.5" in out
    table = json.loads((tmp_path / "t.json").read_text())
    assert table["eps"] == 4 / 255 and set(table["accuracy"]) == {"clean", "adv", "0.5"}
    assert set(table["transfer"]["pgd2"]["adv"]) == {"clean", "adv", "0.5"}
    with (tmp_path / "t.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 3 * 3 * 3


def test_eval_uses_the_test_images_of_the_training_split(npz, tmp_path, smart):
    folder = tmp_path / "run"
    split = ["--split-seed", 7, "--test-fraction", 0.3]
    assert smart("train", "--data", npz, "--epochs", 1, "--out", folder, *split, *QUICK)[0] == 0
    default = smart("eval", folder / "best.safetensors", "--attacks", "clean", "--no-progress")
    spelt_out = smart("eval", folder / "best.safetensors", "--no-progress", "--attacks", "clean", "--data", npz, *split)
    assert default == spelt_out and "18 test images; L-infinity eps 8/255" in default[1]
