"""Two processes on the CPU that train one network, against one process that trains it alone."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from small import assert_same_state, make_data, make_model
from torch import nn

from smart.checkpoint import read_checkpoint
from smart.config import TrainConfig
from smart.global_norms import global_norms
from smart.launch import _own
from smart.share import Share
from smart.train import train

CONFIG = TrainConfig(
    epochs=3, batch_size=24, lr=0.05, eps=0.1, attack_step=0.05, attack_steps=2, val_attack_steps=2, crop_padding=1
)
KINDS = {
    "smart": ({}, {"rewire_every": 1, "rewire_unit": "steps", "dial": "sampled"}),
    "rigl": ({"pattern": "1:2", "density": None, "masked_layers": "4"}, {"rewire": "rigl"}),
    "oat": ({"method": "oat", "density": None}, {}),
    "floats": ({"method": "floats"}, {}),
    "trades": ({"method": "trades", "density": None}, {}),
}


def run(kind, out=None, **options):
    """Trains in float64, so that rounding cannot turn the sign of a gradient that an attack follows."""
    choices, settings = KINDS[kind]
    model = make_model(**choices).double()
    config = dataclasses.replace(CONFIG, **settings)
    result = train(model, make_data(), config, out, progress=False, **options)
    return model, [{key: value for key, value in row.items() if key != "seconds"} for row in result.history]


def refusal(call):
    try:
        call()
    except (ValueError, RuntimeError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was refused"


def stop_before(last, call):
    """Ctrl-C before the epoch ``last``, from 0, in each process."""
    training = sys.modules["smart.train"]
    original = training._Run.epoch

    def epoch(self, number, progress):
        if number == last:
            raise KeyboardInterrupt
        original(self, number, progress)

    training._Run.epoch = epoch
    try:
        call()
    except KeyboardInterrupt:
        training._Run.epoch = original


def norm_of_share(rank):
    """A batch norm of three channels on half of a batch: output, gradients and statistics."""
    torch.manual_seed(0)
    x, upstream = torch.randn(8, 3, 4, 5, dtype=torch.float64) + 3, torch.randn(8, 3, 4, 5, dtype=torch.float64)
    norm = nn.BatchNorm2d(3, momentum=0.3).double()
    nn.init.uniform_(norm.weight)
    x, upstream = (each[rank::2].clone().requires_grad_() for each in (x, upstream))
    with global_norms(nn.Sequential(norm)):
        y = norm(x)
        (y * upstream.detach()).sum().backward()
    assert type(norm) is nn.BatchNorm2d
    grads = [norm.weight.grad, norm.bias.grad]
    return {"y": y.detach(), "x": x.grad, "parameters": grads, "state": norm.state_dict()}


def work(rank, folder):
    """All that two processes do for these tests; what each found lies in a file of its own."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    found = {"norm": norm_of_share(rank)}
    for kind in KINDS:
        model, history = run(kind, folder / kind)
        found[kind] = {"state": model.state_dict(), "history": history}
    stop_before(2, lambda: run("smart", folder / "stopped"))
    model, history = run("smart", folder / "stopped", resume=True)
    found["resumed"] = {"state": model.state_dict(), "history": history}
    odd = dataclasses.replace(CONFIG, batch_size=18)
    seeds = dataclasses.replace(CONFIG, seed=rank)
    found["refusals"] = {
        "batch": refusal(lambda: train(make_model(), make_data(), odd, progress=False)),
        "folder": refusal(lambda: run("smart", folder / "smart")),
        "seeds": refusal(lambda: train(make_model(), make_data(), seeds, progress=False)),
        "weights": refusal(lambda: train(make_model(seed=rank), make_data(), CONFIG, progress=False)),
    }
    torch.save(found, folder / f"found{rank}")
    dist.destroy_process_group()


def guarded(rank, folder):
    try:
        work(rank, folder)
    except BaseException:
        (folder / f"error{rank}").write_text(traceback.format_exc())
        raise


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """What two processes found, and their folder."""
    folder = tmp_path_factory.mktemp("pair")
    torch.multiprocessing.spawn(guarded, (folder,), nprocs=2)
    return [torch.load(folder / f"found{rank}", weights_only=True) for rank in (0, 1)], folder


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_do_what_one_does(kind, pair):
    (first, second), folder = pair
    model, history = run(kind)
    assert_same_state(first[kind]["state"], second[kind]["state"])
    assert first[kind]["history"] == second[kind]["history"]
    masks = [key for key in first[kind]["state"] if ".mask_" in key]
    assert all(torch.equal(first[kind]["state"][key], model.state_dict()[key]) for key in masks)
    # Sums in another order, over 6 steps: 1e-10 is far above the rounding of float64, far below any real difference.
    torch.testing.assert_close(first[kind]["state"], model.state_dict(), rtol=1e-10, atol=1e-10)
    for mine, alone in zip(first[kind]["history"], history, strict=True):
        assert mine == pytest.approx(alone, abs=2e-6)
    saved = read_checkpoint(folder / kind / "last.safetensors")[0]
    assert len(saved["history"]) == CONFIG.epochs


def test_masks_moved(pair):
    start = make_model().state_dict()
    for kind in ("smart", "floats"):
        moved = pair[0][0][kind]["state"]
        assert any(not torch.equal(moved[key], start[key]) for key in start if ".mask_" in key)


def test_two_processes_resume_to_the_same_numbers(pair):
    (first, second), folder = pair
    assert_same_state(first["resumed"]["state"], first["smart"]["state"])
    assert_same_state(second["resumed"]["state"], second["smart"]["state"])
    assert first["resumed"]["history"] == first["smart"]["history"]
    groups = [read_checkpoint(folder / name / "last.safetensors")[1] for name in ("smart", "stopped")]
    for group in ("model", "optimizer", "rewirer"):
        assert_same_state(groups[0][group], groups[1][group])


def test_batch_norms_norm_by_the_whole_batch(pair):
    torch.manual_seed(0)
    x, upstream = torch.randn(8, 3, 4, 5, dtype=torch.float64) + 3, torch.randn(8, 3, 4, 5, dtype=torch.float64)
    norm = nn.BatchNorm2d(3, momentum=0.3).double()
    nn.init.uniform_(norm.weight)
    x.requires_grad_()
    y = norm(x)
    (y * upstream).sum().backward()
    parts = [found["norm"] for found in pair[0]]
    for rank, part in enumerate(parts):
        torch.testing.assert_close(part["y"], y[rank::2].detach())
        torch.testing.assert_close(part["x"], x.grad[rank::2])
        torch.testing.assert_close(part["state"], norm.state_dict())
    for i, parameter in enumerate(norm.parameters()):
        torch.testing.assert_close(parts[0]["parameters"][i] + parts[1]["parameters"][i], parameter.grad)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("batch", "ValueError: batches have 18 images and there are 2 processes: give a batch_size that is a multiple"),
        ("folder", "FileExistsError: "),
        ("seeds", "RuntimeError: the model, its data or the config is not the same on all 2 processes, process 1"),
        ("weights", "RuntimeError: the model, its data or the config is not the same"),
    ],
)
def test_both_refuse_what_cannot_be(what, words, pair):
    assert all(found["refusals"][what].startswith(words) for found in pair[0]), pair[0][0]["refusals"][what]


def test_one_process_is_the_whole():
    share = Share.current()
    assert share == Share(0, 1) and share.leads
    share.check_batch(5)
    assert share.lead(lambda: 3) == 3 and torch.equal(share.take(torch.arange(4)), torch.arange(4))


def test_each_process_takes_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert _own(torch.device("cuda"), 1) == torch.device("cuda", 1)
    assert _own(torch.device("cpu"), 1) == torch.device("cpu")
    with pytest.raises(ValueError, match="process 3 of this machine finds 2 GPUs"):
        _own(torch.device("cuda"), 2)
    with pytest.raises(ValueError, match="leave it out"):
        _own(torch.device("cuda", 0), 0)


def test_torchrun(tmp_path):
    images, labels = make_data(60).train
    np.savez(tmp_path / "stripes.npz", images=(images[:, 0] * 255).byte().numpy(), labels=labels.numpy())
    settings = "--epochs 1 --batch-size 16 --attack-steps 1 --val-attack-steps 1 --device cpu --no-progress"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "smart"]
    command += ["train", "--data", tmp_path / "stripes.npz", "--out", tmp_path / "run", *settings.split()]
    root = Path(__file__).parents[2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("best epoch 1 of 1") == 1
    metadata, _ = read_checkpoint(tmp_path / "run" / "last.safetensors")
    assert metadata["epoch"] == 1
    assert '"processes": 2' in (tmp_path / "run" / "config.json").read_text()
