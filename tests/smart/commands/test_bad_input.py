"""Files and data that commands refuse."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from calls import assert_refused


def test_missing_files(checkpoint, tmp_path, smart):
    nothing = tmp_path / "nothing"
    assert_refused(smart("train", "--config", nothing), 1, str(nothing))
    assert_refused(smart("train", "--data", nothing, "--out", tmp_path / "run"), 1, str(nothing), "digits")
    assert_refused(smart("eval", nothing), 1, str(nothing))
    assert_refused(smart("verify", checkpoint, nothing), 1, str(nothing))
    assert_refused(smart("bench", nothing), 1, str(nothing), "resnet18")


def test_data_must_be_named_where_nothing_names_it(checkpoint, tmp_path, smart):
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes(Path(checkpoint).read_bytes())
    assert_refused(smart("eval", alone), 2, "give --data")
    assert_refused(smart("swap", alone, "--out", tmp_path / "m"), 2, "--example-shape")
    assert_refused(smart("bench", alone), 2, "--image-shape")
    assert_refused(smart("bench", checkpoint, "--density", 0.1), 2, "--density")


@pytest.mark.parametrize(
    "arrays, words",
    [
        ({"images": np.zeros((9, 5, 6, 6, 1), "float32")}, ["(9, 5, 6, 6, 1)"]),
        ({"images": np.zeros((9, 6, 6), "int64")}, ["int64"]),
        ({"images": np.full((9, 6, 6), 7.0)}, ["[0, 1]"]),
        ({"images": np.full((9, 6, 6), np.nan)}, ["NaN"]),
        ({"images": np.zeros((8, 6, 6))}, ["8 images"]),
        ({"images": np.zeros((0, 6, 6)), "labels": np.zeros(0, int)}, ["no images"]),
    ],
    ids=["5-D", "int64", "range", "nan", "count", "empty"],
)
def test_bad_data(arrays, words, tmp_path, smart):
    file = tmp_path / "bad.npz"
    np.savez(file, **{"labels": np.arange(9) % 3, **arrays})
    assert_refused(smart("train", "--data", file, "--out", tmp_path / "run"), 1, "bad.npz", *words)


def test_empty_data_folder(tmp_path, smart):
    (tmp_path / "data" / "train").mkdir(parents=True)
    assert_refused(smart("train", "--data", tmp_path / "data", "--out", tmp_path / "run"), 1, "train", "empty")


def test_data_of_another_kind(checkpoint, tmp_path, smart):
    assert_refused(smart("eval", checkpoint, "--data", "digits"), 1, "10 classes", "3 classes")
    np.savez(tmp_path / "colour.npz", images=np.zeros((15, 6, 6, 3)), labels=np.arange(15) % 3)
    assert_refused(smart("eval", checkpoint, "--data", tmp_path / "colour.npz"), 1, "3 channels", "1 channels")
    shape = ["--example-shape", 2, 3, 6, 6]
    assert_refused(smart("swap", checkpoint, "--out", tmp_path / "m", *shape), 1, "(1, 3, 6, 6)", "(N, 1, H, W)")
    assert_refused(smart("bench", checkpoint, "--image-shape", 3, 6, 6), 1, "(1, 3, 6, 6)")


@pytest.mark.parametrize("damage", ["truncated", "tampered", "other"])
def test_damaged_files(damage, checkpoint, packed, tmp_path, smart):
    bad = {}
    for name, file in (("checkpoint", checkpoint), ("packed", packed)):
        content = bytearray(Path(file).read_bytes())
        if damage == "truncated":
            content = content[: len(content) // 2]
        elif damage == "tampered":
            content[-5] ^= 1
        else:
            content = bytearray(b"not a network at all")
        bad[name] = tmp_path / f"{name}.safetensors"
        bad[name].write_bytes(content)
    assert_refused(smart("eval", bad["checkpoint"]), 1, "checkpoint.safetensors")
    assert_refused(smart("verify", checkpoint, bad["packed"]), 1, "packed.safetensors")


def test_files_taken_for_each_other(checkpoint, packed, smart):
    assert_refused(smart("eval", packed), 1, str(packed))
    assert_refused(smart("verify", checkpoint, checkpoint), 1, checkpoint)


def test_unwritable_out_is_found_before_any_work(checkpoint, npz, tmp_path, smart, monkeypatch):
    monkeypatch.setattr("smart.commands.demo.run_demo", lambda *_: pytest.fail("work was begun"))
    monkeypatch.setattr("smart.commands.train.train", lambda *_: pytest.fail("work was begun"))
    for command in ("eval", "swap", "verify", "bench"):
        loads = f"smart.commands.{command}.load_checkpoint"
        monkeypatch.setattr(loads, lambda *_: pytest.fail("work was begun"))
    wall = tmp_path / "file"
    wall.write_text("in the way")
    for argv in (
        ["train", "--data", npz, "--out"],
        ["demo", "--out"],
        ["swap", checkpoint, "--out"],
        ["eval", checkpoint, "--csv"],
        ["eval", checkpoint, "--json"],
        ["bench", checkpoint, "--json"],
        ["verify", checkpoint, checkpoint, "--json"],
    ):
        assert_refused(smart(*argv, wall / "run" / "x"), 1, "cannot write into", str(wall))
    assert_refused(smart("swap", checkpoint, "--out", tmp_path), 1, "is a folder")
