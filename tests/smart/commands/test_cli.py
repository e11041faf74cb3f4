"""What holds for every command: help, exit codes, stopping."""

from __future__ import annotations

import subprocess
import sys

import pytest
from calls import assert_refused

from smart import cli
from smart.commands import COMMANDS


def test_info(smart):
    code, out, _ = smart("info")
    assert (
        code == 0 and "torch" in out and "tiny" in out and "cifar10" in out and "dense" in out and "cuda kernels" in out
    )


def test_info_says_why_a_backend_does_not_load(smart, monkeypatch):
    monkeypatch.setattr("smart_kernels.native._missing", "no compiler was found")
    assert "cpu           no: no compiler was found" in smart("info")[1]


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command, smart):
    code, out, _ = smart(command, "--help")
    assert code == 0 and out.startswith(f"usage: smart {command}")


def test_python_m_smart():
    done = subprocess.run([sys.executable, "-m", "smart", "--help"], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and all(f"    {command}" in done.stdout for command in COMMANDS)


def test_stopped_elsewhere(smart, monkeypatch):
    def stop(args):
        raise KeyboardInterrupt

    monkeypatch.setattr("smart.commands.info.run", stop)
    code, _, err = smart("info")
    assert code == 130 and err.strip() == "smart: stopped"


@pytest.mark.parametrize(
    "argv, words",
    [
        ([], ["COMMAND"]),
        (["fly"], ["fly"]),
        (["train", "--density", "0"], ["--density", "0.0", "(0, 1]"]),
        (["train", "--density", "1.5"], ["1.5"]),
        (["train", "--density", "some"], ["'some'", "not a number"]),
        (["train", "--pattern", "3-4"], ["unknown pattern '3-4'"]),
        (["train", "--pattern", "2:4", "--density", "0.2"], ["density is 0.2", "2:4", "0.5"]),
        (["train", "--pattern", "2:4", "--allocation", "erk"], ["erk", "2:4", "uniform"]),
        (["train", "--pattern", "channel", "--overlap", "disjoint"], ["channel", "nested"]),
        (["train", "--pattern", "coupled", "--overlap", "0.5"], ["coupled", "nested"]),
        (["train", "--pattern", "coupled", "--allocation", "erk"], ["erk", "coupled", "uniform"]),
        (["train", "--pattern", "channel", "--redistribute", "momentum"], ["momentum", "channel", "none"]),
        (["train", "--rewire", "rigl", "--redistribute", "momentum"], ["rigl", "momentum"]),
        (["train", "--rewire", "often"], ["often", "sparse_momentum", "rigl", "static"]),
        (["train", "--prune-schedule", "step"], ["step", "constant"]),
        (["train", "--allocation", "even"], ["even", "uniform", "erk", "global"]),
        (["train", "--masked-layers", "("], ["(", "regular expression"]),
        (["train", "--dedicated-layers", "last_stages", "--overlap", "shared"], ["last_stages", "shared"]),
        (["train", "--eps", "8"], ["eps is 8", "8/255"]),
        (["train", "--model", "vgg"], ["'vgg'", "resnet18"]),
        (["train", "--overlap", "some"], ["'some'", "disjoint"]),
        (["train", "--overlap", "disjoint", "--density", "0.7"], ["disjoint", "0.7"]),
        (["train", "--epochs", "0"], ["epochs", "0"]),
        (["train", "--epochs", "2.5"], ["epochs", "'2.5'"]),
        (["train", "--lr-schedule", "stairs"], ["'stairs'", "cosine"]),
        (["train", "--eps", "8/0"], ["--eps", "'8/0'"]),
        (["train", "--val-fraction", "1"], ["--val-fraction", "(0, 1)"]),
        (["train", "--epoch-count", "2"], ["--epoch-count"]),
        (["train", "--device", "abacus"], ["'abacus'"]),
        (["train", "--device", "cuda:99"], ["cuda:99", "GPUs"]),
        (["eval", "x", "--attacks", "hammer"], ["'hammer'", "pgd20"]),
        (["eval", "x", "--paths", "dirty"], ["dirty", "clean"]),
        (["eval", "x", "--lambdas", "1.5"], ["1.5", "[0, 1]"]),
        (["swap", "x", "--out", "y", "--backend", "magic"], ["magic"]),
        (["swap", "x"], ["--out"]),
        (["bench", "tiny", "--peers", "tensorrt"], ["tensorrt"]),
        (["bench", "tiny", "--batches", "0"], ["'0'"]),
        (["demo", "--density", "2"], ["2"]),
    ],
    ids=" ".join,
)
def test_wrong_usage(argv, words, npz, tmp_path, smart):
    data = ["--data", npz, "--out", tmp_path / "run", "--no-progress"] if argv[:1] == ["train"] else []
    assert_refused(smart(*argv, *data), 2, *words)


def test_traceback_on_request(tmp_path, capsys):
    assert cli.main(["eval", str(tmp_path / "nothing"), "--traceback"]) == 1
    assert "Traceback" in capsys.readouterr().err
