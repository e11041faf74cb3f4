"""`smart bench`."""

from __future__ import annotations

import json

import pytest
from calls import assert_refused

from smart import peers, plots


def test_bench_of_a_checkpoint_and_of_a_name(checkpoint, tmp_path, smart):
    quick = ["--batches", 1, 3, "--budget", 0, "--threads", 1, "--no-progress"]
    code, out, _ = smart("bench", checkpoint, *quick, "--peers", "eager", "fused", "--json", tmp_path / "b.json")
    assert code == 0 and "1x6x6 images" in out
    content = json.loads((tmp_path / "b.json").read_text())
    assert len(content["rows"]) == 2 * (2 + 2) and content["command"].startswith("smart bench")
    code, out, _ = smart("bench", "tiny", "--density", 0.1, "--image-shape", 3, 8, 8, "--paths", "adv", *quick)
    assert code == 0 and "3x8x8 images" in out


@pytest.mark.parametrize("pattern", ["channel", "coupled"])
def test_rows_name_the_pattern_that_was_asked_for(pattern, tmp_path, smart):
    quick = ["--image-shape", 3, 8, 8, "--batches", 1, "--budget", 0, "--no-progress", "--json", tmp_path / "b.json"]
    code, _, _ = smart("bench", "tiny", "--pattern", pattern, *quick)
    rows = json.loads((tmp_path / "b.json").read_text())["rows"]
    assert code == 0 and {row["pattern"] for row in rows} == {pattern}


def test_bench_in_another_dtype(tmp_path, smart):
    quick = ["--image-shape", 3, 8, 8, "--batches", 1, "--budget", 0, "--no-progress", "--json", tmp_path / "b.json"]
    code, _, _ = smart("bench", "tiny", "--dtype", "bfloat16", *quick)
    rows = json.loads((tmp_path / "b.json").read_text())["rows"]
    assert code == 0 and {row["dtype"] for row in rows} == {"bfloat16"}
    assert 0 < max(row["max_rel_error"] for row in rows) < 0.2
    assert_refused(smart("bench", "tiny", "--dtype", "float8", *quick), 2, "float8", "bfloat16")


def test_bench_writes_a_table_and_a_picture(tmp_path, smart):
    pytest.importorskip("matplotlib")
    quick = ["--image-shape", 3, 8, 8, "--batches", 1, "--budget", 0, "--no-progress"]
    files = ["--markdown", tmp_path / "b.md", "--plot", tmp_path / "b.png"]
    code, out, _ = smart("bench", "tiny", *quick, *files)
    assert code == 0 and str(tmp_path / "b.png") in out
    assert "| tiny | 0.2 | 1 |" in (tmp_path / "b.md").read_text()
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")


def test_bench_of_a_suite(tmp_path, smart, monkeypatch):
    files = ["--json", tmp_path / "b.json", "--markdown", tmp_path / "b.md"]
    code, out, _ = smart("bench", "--suite", "smoke", "--peers", "eager", "--budget", 0.01, "--threads", 1, *files)
    assert code == 0 and "tiny" in out
    assert {row["runner"] for row in json.loads((tmp_path / "b.json").read_text())["rows"]} == {
        "eager",
        "smart_kernels",
    }
    assert "| tiny | 0.2 | 1 |" in (tmp_path / "b.md").read_text()
    code, _, err = smart("bench", "--suite", "no-such")
    assert code == 2 and "no-such" in err
    assert_refused(smart("bench", "--suite", "smoke", "--batches", 3), 2, "--batches does not go with --suite")
    assert_refused(smart("bench"), 2, "name a network", "--suite")
    assert_refused(smart("bench", "tiny", "--suite", "smoke"), 2, "not both")
    monkeypatch.setattr("smart.__file__", str(tmp_path / "smart" / "__init__.py"))
    assert_refused(smart("bench", "--suite", "smoke"), 2, "source checkout")


def test_bench_against_all_says_which_are_not_installed(smart, monkeypatch):
    quick = ["--image-shape", 3, 8, 8, "--batches", 1, "--budget", 0, "--no-progress"]
    monkeypatch.setattr(peers, "missing", lambda name: None if name in ("eager", "fused") else "not installed")
    code, out, err = smart("bench", "tiny", *quick, "--peers", "all")
    assert code == 0 and "fused" in out and "compile" not in out
    assert "not installed, so not measured: compile, onnxruntime" in err


def test_bench_against_what_is_not_installed(smart, monkeypatch):
    monkeypatch.setattr(peers, "missing", lambda name: f"peer {name!r} needs what is not installed: pip install it")
    assert_refused(smart("bench", "tiny", "--peers", "ncnn"), 2, "peer 'ncnn'", "pip install")
    monkeypatch.setattr(plots, "missing", lambda: "matplotlib is not installed: pip install matplotlib")
    assert_refused(smart("bench", "tiny", "--plot", "b.png"), 2, "--plot", "pip install matplotlib")
