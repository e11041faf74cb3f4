"""`smart dial`."""

from __future__ import annotations

import csv
import json

import pytest
from calls import assert_refused


def test_it_draws_the_whole_trade_off(checkpoint, tmp_path, smart):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    files = [tmp_path / f"dial.{kind}" for kind in ("csv", "json", "png")]
    flags = [part for kind, file in zip(("csv", "json", "plot"), files, strict=True) for part in (f"--{kind}", file)]
    code, out, err = smart(
        "dial", checkpoint, "--attack", "pgd2", "--lambdas", 0, 0.5, 1, "--limit", 6, "--no-progress", *flags
    )
    assert code == 0, err
    assert "6 test images" in out and "PGD-2" in out and out.count("first_stages") == 4
    content = json.loads(files[1].read_text())
    assert content["n_examples"] == 6 and len(content["rows"]) == 3 + 4 + 4
    assert content["rows"][4]["path"] == ["adv", "clean", "clean"]
    assert all({"clean", "pgd2", "macs", "nonzeros"} <= row.keys() for row in content["rows"])
    assert len(list(csv.DictReader(files[0].open()))) == 11
    assert files[2].read_bytes()[:4] == b"\x89PNG"


def test_wrong_usage(checkpoint, smart):
    assert_refused(smart("dial", checkpoint, "--dials", "stages"), 2, "stages", "first_stages")
    assert_refused(smart("dial", checkpoint, "--lambdas", "2"), 2, "[0, 1]")
    assert_refused(smart("dial", checkpoint, "--eps", "8", "--no-progress"), 2, "did you mean 8/255?")
