"""`smart curve` and `smart sanity`."""

from __future__ import annotations

import csv
import json
import sys

import pytest
from calls import assert_refused

from smart import plots
from smart.sanity import Check, SanityReport

QUIET = ["--limit", 9, "--no-progress"]


def test_curve(checkpoint, tmp_path, smart):
    pytest.importorskip("matplotlib")
    files = ["--csv", tmp_path / "new" / "c.csv", "--plot", tmp_path / "new" / "c.png"]
    wanted = ["--eps", 0, "4/255", "0.5", "--attack", "pgd2-cw", "--lambdas", "0.5", "--paths", "adv"]
    code, out, err = smart("curve", checkpoint, *wanted, *QUIET, *files)
    assert code == 0, err
    lines = [line.split() for line in out.splitlines()]
    assert "9 test images; PGD-2 CW, restarts 1, seed 0; accuracy by L-infinity eps" in out
    assert lines[1] == ["path", "0", "4/255", "0.5"] and [line[0] for line in lines[2:4]] == ["adv", "lambda"]
    with (tmp_path / "new" / "c.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 2 * 3
    assert (tmp_path / "new" / "c.png").read_bytes().startswith(b"\x89PNG")


def test_curve_takes_the_radii_from_the_training(checkpoint, smart):
    code, out, _ = smart("curve", checkpoint, "--attack", "fgsm", *QUIET)
    assert code == 0 and out.splitlines()[1].split()[1:] == [
        "0", "2/255", "4/255", "6/255", "8/255", "12/255", "16/255", "0.12549"
    ]  # fmt: skip


def test_sanity_passes_or_says_what_failed(checkpoint, tmp_path, smart, monkeypatch):
    report = SanityReport([Check("loss grows with the radius", "adv", True, {"at 0": 1.0})], {"eps": 0.1})
    used = {**report.settings, "n_examples": 9, "seed": 0}
    asked = {}

    def checks(model, data, eps, paths, lambdas, steps, queries, restarts, **options):
        asked.update(count=len(data[0]), eps=eps, paths=paths, lambdas=lambdas, steps=steps, queries=queries)
        return SanityReport(report.checks, used)

    monkeypatch.setattr("smart.commands.sanity.sanity_checks", checks)
    options = ["--eps", 0.1, "--paths", "adv", "--lambdas", "0.25", "--steps", 3, "--queries", 7]
    code, out, _ = smart("sanity", checkpoint, *options, *QUIET)
    assert code == 0 and "9 test images; L-infinity eps 0.1, seed 0" in out and "pass" in out
    assert asked == {"count": 9, "eps": 0.1, "paths": ["adv"], "lambdas": [0.25], "steps": 3, "queries": 7}
    report.checks.append(Check("a black box is not stronger", "adv", False, {"Square-7": 0.1, "PGD-3": 0.9}))
    outcome = smart("sanity", checkpoint, *options, *QUIET, "--json", tmp_path / "s.json")
    assert_refused(outcome, 1, "1 of 2 checks failed", "a black box is not stronger (path adv)")
    assert "FAIL" in outcome[1] and "Square-7 10.0 %" in outcome[1]
    content = json.loads((tmp_path / "s.json").read_text())
    assert content["passed"] is False and content["checkpoint"] == checkpoint and len(content["checks"]) == 2


def test_sanity_of_a_checkpoint(checkpoint, tmp_path, smart):
    """Whatever the verdict on a network that was hardly trained, all was checked, and the exit code says it."""
    code, out, _ = smart("sanity", checkpoint, "--steps", 3, "--queries", 5, *QUIET, "--json", tmp_path / "s.json")
    content = json.loads((tmp_path / "s.json").read_text())
    assert code == (0 if content["passed"] else 1)
    assert len(content["checks"]) == 2 * 8 and content["eps"] == 8 / 255 and content["n_examples"] == 9
    assert len(out.splitlines()) == 1 + 1 + 16 + 1


def test_autoattack_must_be_installed(checkpoint, smart, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for command in (["eval", checkpoint, "--attacks"], ["curve", checkpoint, "--attack"]):
        assert_refused(smart(*command, "autoattack"), 2, "pip install pyautoattack")


def test_wrong_usage(checkpoint, tmp_path, smart, monkeypatch):
    assert_refused(smart("curve", checkpoint, "--eps", "8"), 2, "--eps", "eps is 8.0", "8/255")
    assert_refused(smart("curve", checkpoint, "--attack", "pgd"), 2, "unknown attack 'pgd'", "pgd20")
    assert_refused(smart("sanity", checkpoint, "--eps", "0"), 1, "eps is 0.0", "8/255")
    assert_refused(smart("sanity", checkpoint, "--steps", "0"), 2, "--steps", "at least 1")
    assert_refused(smart("curve", tmp_path / "nothing"), 1, "nothing")
    monkeypatch.setattr(plots, "missing", lambda: "matplotlib is not installed: pip install matplotlib")
    assert_refused(smart("curve", checkpoint, "--plot", "c.png"), 2, "--plot", "pip install matplotlib")
