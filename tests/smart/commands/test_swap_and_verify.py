"""`smart swap` and `smart verify`."""

from __future__ import annotations

import json

import torch
from calls import assert_refused

import smart_kernels
from smart.checkpoint import load_checkpoint
from smart.layers import smart_convs
from smart_kernels.model import SparseModel


def test_swap_and_verify(checkpoint, packed, smart):
    code, out, _ = smart("swap", checkpoint, "--out", packed)
    assert code == 0 and "stages.0.0.conv1" in out and "largest relative error on 12 images: clean" in out
    code, out, _ = smart("verify", checkpoint, packed)
    assert code == 0 and "clean" in out and "adv" in out


def test_swap_on_a_shape_in_another_dtype(checkpoint, tmp_path, smart):
    out = tmp_path / "new" / "m.safetensors"
    shape = ["--example-shape", 2, 1, 6, 6]
    assert smart("swap", checkpoint, "--out", out, *shape, "--dtype", "bfloat16", "--backend", "dense")[0] == 0
    assert smart("verify", checkpoint, out, *shape)[0] == 0


def test_swap_plans_only(checkpoint, tmp_path, smart):
    times = tmp_path / "new" / "times.json"
    code, out, _ = smart("swap", checkpoint, "--dry-run", "--strict", "--timings", times)
    assert code == 0 and "stages.0.0.conv1" in out and "written" not in out
    kept = json.loads(times.read_text())["us"]
    assert smart("swap", checkpoint, "--dry-run", "--timings", times)[0] == 0
    assert json.loads(times.read_text())["us"] == kept
    code, out, _ = smart("swap", checkpoint, "--dry-run", "--no-measure")
    assert code == 0 and "(estimated, not measured)" in out
    assert_refused(smart("swap", checkpoint), 2, "--out", "--dry-run")
    assert_refused(smart("swap", checkpoint, "--dry-run", "--strict", "--dtype", "float16"), 1, "float16", "strict")
    assert not list(tmp_path.glob("*.safetensors"))


def test_verify_compares_robustness(checkpoint, packed, tmp_path, smart):
    file = tmp_path / "new" / "v.json"
    quick = ["--steps", 2, "--queries", 5, "--limit", 9, "--no-progress"]
    code, out, _ = smart("verify", checkpoint, packed, *quick, "--json", file)
    lines = [line.split() for line in out.splitlines()]
    assert code == 0 and "on 9 images: clean" in out and "L-infinity eps 8/255, PGD step 2/255, seed 0" in out
    assert lines[2] == ["path", "attack", "dense", "swapped", "predictions", "that", "differ"]
    attacks = [["no", "attack"], ["PGD-2"], ["Square-5"]]
    assert [line[:-5] for line in lines[3:9]] == [[path, *attack] for path in ("clean", "adv") for attack in attacks]
    assert all(line[-5:-3] == line[-3:-1] and line[-1] == "0" for line in lines[3:9])
    assert lines[9] == ["written:", str(file)]
    content = json.loads(file.read_text())
    assert content["sparse"] == str(packed) and content["eps"] == 8 / 255 and content["n_examples"] == 9
    assert [row["attack"] for row in content["rows"]] == ["clean", "pgd2", "square5"] * 2
    assert content["disagreements"] == [] and set(content["max_rel_error"]) == {"clean", "adv"}
    again = smart("verify", checkpoint, packed, *quick, "--eps", 0.5, "--seed", 3)[1]
    assert "eps 0.5, PGD step 0.125, seed 3" in again


def test_verify_leaves_out_attacks(checkpoint, packed, smart):
    quick = [checkpoint, packed, "--no-progress", "--steps", 1]
    assert "PGD-1" in (out := smart("verify", *quick, "--queries", 0)[1]) and "Square" not in out
    code, out, _ = smart("verify", *quick, "--no-attacks")
    assert code == 0 and "no attack  " in out and "%" in out
    assert not any(words in out for words in ("PGD", "Square", "no labels"))
    code, out, _ = smart("verify", *quick, "--example-shape", 4, 1, 6, 6)
    assert code == 0 and "on 4 images" in out and "no attack was run: random images have no labels" in out
    assert "PGD" not in out and "%" not in out


def test_verify_fails_above_the_tolerance(checkpoint, packed, smart):
    assert_refused(smart("verify", checkpoint, packed, "--tolerance", "1e-12"), 1, "differs", "1e-12")


def test_verify_finds_another_network(checkpoint, tmp_path, smart):
    model, _ = load_checkpoint(checkpoint)
    with torch.no_grad():
        next(iter(smart_convs(model).values())).weight += 1
    other = tmp_path / "other.safetensors"
    smart_kernels.save(smart_kernels.swap(model, torch.rand(2, 1, 6, 6), measure=False), other)
    assert_refused(smart("verify", checkpoint, other, "--no-progress"), 1, "differs from the original by", "adv")


def test_verify_shows_the_table_of_networks_that_differ_under_attack(checkpoint, packed, tmp_path, smart, monkeypatch):
    class WrongOnBrightImages(SparseModel):
        def forward(self, x, path="clean"):
            logits = super().forward(x, path)
            return torch.where(x.amax((1, 2, 3))[:, None] > 0.99, logits.roll(1, 1), logits)

    def load(file, device):
        sparse = original(file, device)
        sparse.__class__ = WrongOnBrightImages
        return sparse

    original = smart_kernels.load
    monkeypatch.setattr(smart_kernels, "load", load)
    wanted = ["--eps", 0.5, "--queries", 3, "--steps", 2, "--limit", 9, "--no-progress", "--json", tmp_path / "v.json"]
    outcome = smart("verify", checkpoint, packed, *wanted)
    assert_refused(outcome, 1, "path 'adv' under PGD-2: ", "of 9 predictions differ beyond rounding")
    assert "PGD-2" in outcome[1] and json.loads((tmp_path / "v.json").read_text())["disagreements"]
