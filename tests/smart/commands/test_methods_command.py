"""`smart train --method`: each method from training to the table that compares them."""

from __future__ import annotations

import csv

import pytest
import yaml
from calls import QUICK, assert_refused

from smart.checkpoint import load_checkpoint
from smart.methods import METHODS


@pytest.fixture(scope="module")
def folders(npz, tmp_path_factory):
    """A finished run of each method."""
    from smart import cli

    runs = tmp_path_factory.mktemp("methods")
    for method in METHODS:
        argv = ["train", "--method", method, "--data", str(npz), "--epochs", "1", "--out", str(runs / method), *QUICK]
        assert cli.main(argv) == 0
    return runs


@pytest.mark.parametrize("method", METHODS)
def test_trains_and_evaluates(method, folders, smart):
    best = folders / method / "best.safetensors"
    assert yaml.safe_load((folders / method / "settings.yaml").read_text())["method"] == method
    assert load_checkpoint(best)[0].method == method
    lambdas = ["--lambdas", "0.15"] if METHODS[method].norms == "switched" else []
    code, out, err = smart("eval", best, "--attacks", "clean", "pgd2", "--card", "--no-progress", *lambdas)
    assert code == 0, err
    assert "adv" in out and ("0.15" in out) == bool(lambdas)


@pytest.mark.parametrize("method", ["oat", "float", "trades"])
def test_goes_on(method, folders, smart, npz, tmp_path):
    args = ["train", "--method", method, "--data", npz, "--epochs", 1, "--out", tmp_path / "run", *QUICK]
    assert smart(*args)[0] == 0
    code, out, err = smart("train", "--resume", "--out", tmp_path / "run", "--no-progress", "--device", "cpu")
    assert code == 0 and f"by {method}" in out, err
    refused = smart("train", "--resume", "--method", "pgd_at", "--out", tmp_path / "run", "--no-progress")
    assert_refused(refused, 1, f"was started with model method '{method}', not 'pgd_at'")


def test_compares_them_all(folders, smart, tmp_path):
    runs = [folders / method for method in METHODS]
    code, out, _ = smart("compare", *runs, "--csv", tmp_path / "runs.csv")
    assert code == 0 and all(method in out for method in METHODS)
    with (tmp_path / "runs.csv").open() as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    assert set(rows) == set(METHODS)
    assert {row["nonzeros_dense"] for row in rows.values()} == {rows["smart"]["nonzeros_dense"]}
    assert rows["trades"]["density"] == rows["oat"]["density"] == "1" and rows["floats"]["density"] == "0.2"


def test_draws_the_dial(folders, smart, tmp_path):
    for method in ("oat", "float"):
        best = folders / method / "best.safetensors"
        code, _, err = smart("dial", best, "--attack", "pgd1", "--csv", tmp_path / "dial.csv", "--no-progress")
        assert code == 0, err


def test_swaps_or_says_why_not(folders, smart, tmp_path):
    code, out, err = smart("swap", folders / "trades" / "best.safetensors", "--out", tmp_path / "m.safetensors")
    assert code == 0 and "largest relative error" in out, err
    refused = smart("swap", folders / "floats" / "best.safetensors", "--dry-run")
    assert_refused(refused, 1, "cannot be swapped: it adds noise to its weights")


def test_exports_film(folders, smart, tmp_path):
    code, out, err = smart("export", folders / "oat" / "best.safetensors", "--out", tmp_path / "m.pt2")
    assert code == 0 and "largest relative error" in out, err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--method", "trade"], "unknown method 'trade': accepted are smart, dual_bn, float"),
        (["--method", "trades", "--density", "0.2"], "has dense weights"),
        (["--method", "oat", "--dial", "sampled"], "dial is 'sampled' and the method 'oat'"),
        (["--method", "trades", "--trades-beta", "-1"], "trades_beta is -1"),
    ],
)
def test_refuses(flags, words, smart, npz, tmp_path):
    assert_refused(smart("train", *flags, "--data", npz, "--out", tmp_path / "run"), 2, words)
