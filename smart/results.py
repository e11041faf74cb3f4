"""Files of benchmark rows, with what one needs to believe and repeat them: machine, versions, commit, command."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import smart_kernels
from smart import peers
from smart.version import __version__
from smart_kernels import devices, native
from smart_kernels.files import write_text

Results = dict[str, Any]
# Rows that agree in these are measurements of the same thing. "how" is the coverage suite's own.
KEY = ("network", "how", "pattern", "batch", "device", "threads", "path", "runner")


def results(rows: Sequence[Mapping[str, Any]], command: str, commit_: str | None = None) -> Results:
    """What a results file holds.

    Args:
        commit_: that was measured; by default the checkout's present one.
    """
    return {
        "machine": machine(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "smart": __version__,
            "smart_kernels": smart_kernels.__version__,
            **peers.versions(row["runner"] for row in rows if "runner" in row),
        },
        "commit": commit_ or commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "rows": list(rows),
    }


def write_results(rows: Sequence[Mapping[str, Any]], file: str | Path, command: str) -> Results:
    """Writes rows that were measured just now by ``command``; returns all that was written."""
    content = results(rows, command)
    write(content, file)
    return content


def write(content: Results, file: str | Path) -> None:
    """Writes a results file, replacing one that is there only when complete."""
    write_text(file, json.dumps(content, indent=1) + "\n")


def read(file: str | Path) -> Results:
    """Reads a results file.

    Raises:
        ValueError: it is none. OSError: it cannot be read.
    """
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no results file: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("rows"), list):
        raise ValueError(f"{file} is no results file: it has no list 'rows'")
    return content


def mismatch(old: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    """Why two results must not be put into one file; None if they come from the same machine, code and packages."""
    for what in ("machine", "commit"):
        if old.get(what) != new.get(what):
            return f"its {what} is {old.get(what)}, here it is {new.get(what)}"
    for package, version in new["versions"].items():
        if (other := old["versions"].get(package, version)) != version:
            return f"its {package} is {other}, here it is {version}"
    return None


def merge(old: Results, new: Results) -> Results:
    """Both results as one; of the same thing measured twice only the new rows are kept.

    Raises:
        ValueError: they differ in machine, commit or version of a package.
    """
    if why := mismatch(old, new):
        raise ValueError(f"these results are of another run: {why}")
    measured = {_key(row) for row in new["rows"]}
    commands = [command for command in old["command"].split("; ") if command != new["command"]]
    return {
        **new,
        "versions": {**old["versions"], **new["versions"]},
        "command": "; ".join([*commands, new["command"]]),
        "rows": [row for row in old["rows"] if _key(row) not in measured] + new["rows"],
    }


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    # A random mask misses its density by less than a hundredth.
    return (*(row.get(name) for name in KEY), round(row["density"], 2))


def machine() -> dict[str, Any]:
    """What ran the measurement: processor, instruction sets, cores, GPU."""
    return {
        "cpu": devices.cpu_name(),
        "isa": native.cpu_isas(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def commit() -> str | None:
    """The commit of the checkout this file lies in, None outside one; "-dirty" is added if it was changed.

    Results already written do not count as changes: a run that is resumed would be of another commit otherwise.
    """
    head = _git("rev-parse", "--short=12", "HEAD")
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)benchmarks/results")
    if head is None or changed is None:
        return None
    return f"{head}-dirty" if changed else head


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
