"""Runs the tests of ``interpreted/`` in a process whose Triton interprets kernels; see conftest.py there."""

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest

FOLDER = Path(__file__).with_name("interpreted")


def why_not():
    """Why Triton's interpreter does not run here, or nothing."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    triton = importlib.metadata.version("triton")
    if tuple(map(int, triton.split(".")[:2])) < (3, 9) and numpy.lib.NumpyVersion(numpy.__version__) >= "2.4.0":
        return f"the interpreter of Triton {triton} fails with numpy {numpy.__version__}: loop bounds that were loaded"
    return ""


@pytest.mark.skipif(why_not() != "", reason=why_not())
@pytest.mark.parametrize("file", sorted(file.name for file in FOLDER.glob("test_*.py")))
def test_kernels_in_the_interpreter(file):
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(FOLDER / file)]
    run = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "passed" in run.stdout
