from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from small import make_data

import smart_kernels
from smart import cli, options, peers, plots, settings
from smart.checkpoint import load_checkpoint, read_checkpoint
from smart.config import TrainConfig
from smart.layers import smart_convs
from smart_kernels.model import SparseModel

COMMANDS = ("train", "eval", "swap", "verify", "bench", "info", "demo")
QUICK = ["--batch-size", "16", "--attack-steps", "1", "--val-attack-steps", "1", "--crop-padding", "0", "--no-flip"]
QUICK += ["--no-progress", "--device", "cpu"]


@pytest.fixture(scope="module")
def npz(tmp_path_factory) -> Path:
    """Three classes of 6x6 grey images."""
    file = tmp_path_factory.mktemp("data") / "stripes.npz"
    images, labels = make_data(60).train
    np.savez(file, images=images[:, 0, :6, :6].numpy(), labels=labels.numpy())
    return file


@pytest.fixture(scope="module")
def run(npz, tmp_path_factory) -> Path:
    """The folder of a finished run."""
    out = tmp_path_factory.mktemp("runs") / "run"
    assert cli.main(["train", "--data", str(npz), "--epochs", "2", "--out", str(out), *QUICK]) == 0
    return out


@pytest.fixture(scope="module")
def checkpoint(run) -> str:
    return str(run / "best.safetensors")


@pytest.fixture(scope="module")
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


def assert_refused(outcome: tuple[int, str, str], code: int, *words: str) -> None:
    """One line on stderr, that names what was given."""
    actual, _, err = outcome
    assert (actual, err.count("\n")) == (code, 1), err
    assert err.startswith("smart: error: ") and len(err) < 500, err
    for word in words:
        assert word in err


# ---- what commands do ----


def test_train_writes_a_run(run, npz):
    assert {"config.json", "log.csv", "best.safetensors", "last.safetensors", "settings.yaml"} == {
        file.name for file in run.iterdir()
    }
    saved = yaml.safe_load((run / "settings.yaml").read_text())
    assert saved["data"] == str(npz) and saved["epochs"] == 2 and saved["density"] == {"clean": 0.2, "adv": 0.2}
    assert set(saved) == set(settings.ALL)


def test_saved_settings_repeat_the_run(run, tmp_path, smart):
    code, out, _ = smart("train", "--config", run / "settings.yaml", "--out", tmp_path / "again", "--no-progress")
    assert code == 0 and str(tmp_path / "again" / "best.safetensors") in out
    assert (tmp_path / "again" / "best.safetensors").stat().st_size
    first, again = (read_checkpoint(folder / "last.safetensors")[1]["model"] for folder in (run, tmp_path / "again"))
    assert all(bool((first[key] == again[key]).all()) for key in first)


def test_flag_beats_file_and_file_beats_default(npz, tmp_path, smart):
    config = tmp_path / "x.yaml"
    config.write_text(f"data: {npz}\ndensity: 0.5\noverlap: 0.75\nepochs: 3\nweight-decay: 1e-4\neps: 4/255\nseed: 5\n")
    code, out, err = smart("train", "--config", config, "--epochs", 1, "--out", tmp_path / "run", *QUICK)
    assert code == 0, err
    saved = yaml.safe_load((tmp_path / "run" / "settings.yaml").read_text())
    assert saved["epochs"] == 1
    assert saved["weight_decay"] == 1e-4 and saved["eps"] == 4 / 255 and saved["seed"] == 5
    assert saved["momentum"] == TrainConfig().momentum
    model, _ = load_checkpoint(tmp_path / "run" / "best.safetensors")
    assert model.spec["overlap"] == 0.75 and model.spec["seed"] == 5 and model.spec["density"]["adv"] == 0.5
    assert "clean 0.500, adv 0.500, union 0.625" in out


def test_densities_differ_by_path(npz, tmp_path, smart):
    code, out, _ = smart(
        "train", "--data", npz, "--density", "0.4,0.1", "--epochs", 1, "--out", tmp_path / "run", *QUICK
    )
    assert code == 0 and "clean 0.4" in out and "adv 0.10" in out


def test_eval(checkpoint, tmp_path, smart):
    files = ["--csv", tmp_path / "t.csv", "--json", tmp_path / "t.json"]
    wanted = ["--attacks", "clean", "fgsm", "pgd2", "--lambdas", "0.5", "--eps", "4/255", "--limit", 9, "--transfer"]
    code, out, _ = smart("eval", checkpoint, *wanted, "--no-progress", *files)
    assert code == 0 and "9 test images; L-infinity eps 4/255" in out and "PGD-2" in out and "lambda 0.5" in out
    table = json.loads((tmp_path / "t.json").read_text())
    assert table["eps"] == 4 / 255 and set(table["accuracy"]) == {"clean", "adv", "0.5"}
    assert set(table["transfer"]["pgd2"]["adv"]) == {"clean", "adv", "0.5"}
    with (tmp_path / "t.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 3 * 3 * 3


def test_eval_uses_the_test_images_of_the_training_split(npz, tmp_path, smart):
    folder = tmp_path / "run"
    split = ["--split-seed", 7, "--test-fraction", 0.3]
    assert smart("train", "--data", npz, "--epochs", 1, "--out", folder, *split, *QUICK)[0] == 0
    default = smart("eval", folder / "best.safetensors", "--attacks", "clean", "--no-progress")
    spelt_out = smart("eval", folder / "best.safetensors", "--no-progress", "--attacks", "clean", "--data", npz, *split)
    assert default == spelt_out and "18 test images; L-infinity eps 8/255" in default[1]


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
    assert_refused(smart("swap", checkpoint, "--dry-run", "--strict", "--dtype", "bfloat16"), 1, "bfloat16", "strict")
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


def test_bench_of_a_checkpoint_and_of_a_name(checkpoint, tmp_path, smart):
    quick = ["--batches", 1, 3, "--budget", 0, "--threads", 1, "--no-progress"]
    code, out, _ = smart("bench", checkpoint, *quick, "--peers", "eager", "fused", "--json", tmp_path / "b.json")
    assert code == 0 and "1x6x6 images" in out
    content = json.loads((tmp_path / "b.json").read_text())
    assert len(content["rows"]) == 2 * (2 + 2) and content["command"].startswith("smart bench")
    code, out, _ = smart("bench", "tiny", "--density", 0.1, "--image-shape", 3, 8, 8, "--paths", "adv", *quick)
    assert code == 0 and "3x8x8 images" in out


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
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "smart" / "cli.py"))
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


def test_info(smart):
    code, out, _ = smart("info")
    assert code == 0 and "torch" in out and "tiny" in out and "dense" in out and "cuda kernels" in out


def test_info_says_why_a_backend_does_not_load(smart, monkeypatch):
    monkeypatch.setattr("smart_kernels.native._missing", "no compiler was found")
    assert "cpu           no: no compiler was found" in smart("info")[1]


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command, smart):
    code, out, _ = smart(command, "--help")
    assert code == 0 and out.startswith(f"usage: smart {command}")


def test_train_help_shows_every_setting_and_its_default(smart):
    out = " ".join(smart("train", "--help")[1].split())
    for name, setting in settings.ALL.items():
        assert f"--{name.replace('_', '-')}" in out
        assert setting.default is None or f"(default: {options.show(setting.default)})" in out
    assert "(default: 8/255)" in out


def test_python_m_smart():
    done = subprocess.run([sys.executable, "-m", "smart", "--help"], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and all(f"    {command}" in done.stdout for command in COMMANDS)


# ---- stopping and going on ----


def test_stopped_run_goes_on_to_the_same_numbers(run, npz, tmp_path, smart, monkeypatch):
    out = tmp_path / "a run"
    command = ["train", "--data", npz, "--epochs", 2, "--out", out, *QUICK]
    training = sys.modules["smart.train"]  # smart.train is the function
    original = training._Run.epoch

    def stop_in_the_second(self, epoch, bar):
        if epoch == 1:
            raise KeyboardInterrupt
        original(self, epoch, bar)

    monkeypatch.setattr(training._Run, "epoch", stop_in_the_second)
    code, _, err = smart(*command)
    assert code == 130 and f"smart train --resume --out '{out}'" in err
    monkeypatch.undo()
    code, _, err = smart("train", "--resume", "--out", out, "--no-progress")
    assert code == 0, err
    for name in ("log.csv", "settings.yaml"):
        whole, resumed = ((folder / name).read_text().splitlines() for folder in (run, out))
        # The last column of the log is the seconds taken.
        assert [line.rpartition(",")[0] for line in whole] == [line.rpartition(",")[0] for line in resumed]


def test_stopped_elsewhere(smart, monkeypatch):
    def stop(args):
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, "info", stop)
    code, _, err = smart("info")
    assert code == 130 and err.strip() == "smart: stopped"


def test_resume_with_another_setting(run, smart):
    assert_refused(smart("train", "--resume", "--out", run, "--lr", 0.2, "--no-progress"), 1, "lr", "0.1", "0.2")
    assert yaml.safe_load((run / "settings.yaml").read_text())["lr"] == 0.1


def test_resume_of_nothing(tmp_path, npz, smart):
    assert_refused(smart("train", "--resume", "--data", npz, "--out", tmp_path), 1, "no run to resume")


def test_folder_that_holds_a_run_is_kept_unless_told(run, npz, smart):
    before = (run / "settings.yaml").read_text()
    assert_refused(smart("train", "--data", npz, "--epochs", 1, "--out", run, *QUICK), 1, "already holds a run")
    assert (run / "settings.yaml").read_text() == before


def test_diverging_training(npz, tmp_path, smart):
    wild = ["--lr", 1000, "--weight-decay", 1, "--epochs", 9]
    outcome = smart("train", "--data", npz, *wild, "--out", tmp_path / "run", *QUICK)
    assert_refused(outcome, 1, "loss", "lower lr")


# ---- bad input ----


@pytest.mark.parametrize(
    "argv, words",
    [
        ([], ["COMMAND"]),
        (["fly"], ["fly"]),
        (["train", "--density", "0"], ["--density", "0.0", "(0, 1]"]),
        (["train", "--density", "1.5"], ["1.5"]),
        (["train", "--density", "some"], ["'some'", "not a number"]),
        (["train", "--pattern", "3-4"], ["unknown pattern '3-4'"]),
        (["train", "--pattern", "2:4"], ["2:4", "unstructured"]),
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


@pytest.mark.parametrize(
    "content, words",
    [
        ("epoch: 3", ["'epoch'", "'epochs'"]),
        ("densty: 0.2", ["'densty'", "'density'"]),
        ("zzz: 1", ["'zzz'", "known are data"]),
        ("density: 0", ["(0, 1]"]),
        ("density: {clean: 0.2}", ["'clean'", "'adv'"]),
        ("epochs: many", ["epochs", "'many'"]),
        ("flip: 1", ["flip", "bool"]),
        ("lr: [1]", ["lr", "[1]"]),
        ("image_size: big", ["image_size", "'big'"]),
        ("- epochs", ["list"]),
        ("a: b: c", ["not YAML"]),
    ],
)
def test_bad_config_file(content, words, tmp_path, smart):
    file = tmp_path / "x.yaml"
    file.write_text(content)
    assert_refused(smart("train", "--config", file, "--out", tmp_path / "run"), 2, "x.yaml", *words)


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
    monkeypatch.setattr(cli, "run_demo", lambda *_: pytest.fail("work was begun"))
    monkeypatch.setattr(cli, "train", lambda *_: pytest.fail("work was begun"))
    monkeypatch.setattr(cli, "load_checkpoint", lambda *_: pytest.fail("work was begun"))
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


def test_traceback_on_request(tmp_path, capsys):
    assert cli.main(["eval", str(tmp_path / "nothing"), "--traceback"]) == 1
    assert "Traceback" in capsys.readouterr().err
