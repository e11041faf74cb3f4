"""A finished run, its checkpoint, and what it was swapped into, once for all tests of commands."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from calls import QUICK
from small import make_data

from smart import cli


@pytest.fixture(scope="session")
def npz(tmp_path_factory) -> Path:
    """Three classes of 6x6 grey images, as bytes."""
    file = tmp_path_factory.mktemp("data") / "stripes.npz"
    images, labels = make_data(60).train
    np.savez(file, images=(images[:, 0, :6, :6] * 255).byte().numpy(), labels=labels.numpy())
    return file


@pytest.fixture(scope="session")
def run(npz, tmp_path_factory) -> Path:
    """The folder of a finished run."""
    out = tmp_path_factory.mktemp("runs") / "run"
    assert cli.main(["train", "--data", str(npz), "--epochs", "2", "--out", str(out), *QUICK]) == 0
    return out


@pytest.fixture(scope="session")
def checkpoint(run) -> str:
    return str(run / "best.safetensors")


@pytest.fixture(scope="session")
def packed(checkpoint, tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("packed") / "m.safetensors"
    assert cli.main(["swap", checkpoint, "--out", str(file)]) == 0
    return file


@pytest.fixture
def smart(capfd):
    """Runs a command; gives its exit code, its output, and what it said on stderr."""

    def call(*argv: object) -> tuple[int, str, str]:
        capfd.readouterr()
        try:
            code = cli.main([str(arg) for arg in argv])
        except SystemExit as stop:
            code = stop.code
        said = capfd.readouterr()
        assert "Traceback" not in said.err
        return code, said.out, said.err

    return call
