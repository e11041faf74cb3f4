"""Precision, layout in memory and determinism of training, and what it shows meanwhile."""

from __future__ import annotations

import dataclasses
import io
import sys

import pytest
import torch
from small import assert_same_state, make_data, make_model, state_of
from torch import nn

from smart.checkpoint import read_checkpoint
from smart.config import TrainConfig
from smart.layers import SmartConv2d, smart_convs
from smart.numerics import deterministic
from smart.progress import Progress, TensorBoard
from smart.rewire import Rewirer
from smart.train import train

CONFIG = TrainConfig(
    epochs=3, batch_size=16, lr=0.05, eps=0.1, attack_step=0.05, attack_steps=2, val_attack_steps=2, crop_padding=1
)
WORDS = {
    "bf16": {"amp": "bf16"},
    "channels_last": {"channels_last": True},
    "all": {"amp": "bf16", "channels_last": True, "deterministic": True},
}


def run(changes, out=None, **options):
    model = make_model(dropout=0.2)
    result = train(model, make_data(), dataclasses.replace(CONFIG, **changes), out, progress=False, **options)
    return model, result


def stop_before(epoch, monkeypatch):
    training = sys.modules["smart.train"]
    original = training._Run.epoch

    def stopping(self, number, progress):
        if number == epoch:
            raise KeyboardInterrupt
        original(self, number, progress)

    monkeypatch.setattr(training._Run, "epoch", stopping)


@pytest.mark.parametrize("words", WORDS)
def test_a_run_resumes_to_the_same_numbers(words, tmp_path, monkeypatch):
    whole, _ = run(WORDS[words], tmp_path / "whole")
    stop_before(2, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        run(WORDS[words], tmp_path / "stopped")
    monkeypatch.undo()
    resumed, result = run(WORDS[words], tmp_path / "stopped", resume=True)
    assert_same_state(state_of(whole), state_of(resumed))
    assert len(result.history) == 3
    for group, tensors in read_checkpoint(tmp_path / "whole" / "last.safetensors")[1].items():
        assert_same_state(tensors, read_checkpoint(tmp_path / "stopped" / "last.safetensors")[1][group])


def test_bf16_is_where_autocast_puts_it_and_nowhere_else(monkeypatch):
    seen = {"in": set(), "weight": set(), "momentum": set()}

    def watch(module, args, output):
        seen["in"].add((module.training, args[0].dtype, output.dtype))

    model = make_model()
    model.net[4].register_forward_hook(watch)
    rewire = Rewirer.rewire

    def look(self, progress):
        seen["momentum"] |= {tensor.dtype for tensor in self.state_dict().values()}
        seen["weight"] |= {tensor.dtype for tensor in model.parameters()}
        return rewire(self, progress)

    monkeypatch.setattr(Rewirer, "rewire", look)
    train(model, make_data(), dataclasses.replace(CONFIG, amp="bf16"), progress=False)
    bf16 = torch.bfloat16
    # The only float32 call is that of the check which model and data fit, before training.
    assert {(training, out) for training, _, out in seen["in"]} == {(True, bf16), (False, bf16), (False, torch.float32)}
    assert seen["weight"] == seen["momentum"] == {torch.float32}


def test_bf16_differs_from_float32_by_its_rounding_alone():
    """One epoch of three steps at a small rate: weights move by 1e-2, and the difference is a small part of that."""
    settings = {"epochs": 1, "lr": 0.01, "rewire": "static"}
    start = state_of(make_model())
    (exact, _), (rounded, _) = run(settings), run({**settings, "amp": "bf16"})
    moved, differs = [], []
    for name, parameter in exact.named_parameters():
        moved.append((parameter.detach() - start[name]).norm())
        differs.append((parameter - rounded.get_parameter(name)).detach().norm())
    assert 0 < sum(differs) < 0.2 * sum(moved)


def test_after_a_bf16_attack_all_parameters_get_gradients():
    """Autocast keeps its casts of weights: those made for the KL attack, without a history, must not stay."""
    model = make_model(None, method="trades")
    before = state_of(model)
    train(model, make_data(), dataclasses.replace(CONFIG, epochs=1, amp="bf16", weight_decay=0.0), progress=False)
    for name, parameter in model.named_parameters():
        assert not torch.equal(parameter, before[name]), name


def test_channels_last_is_while_training_and_changes_no_more_than_rounding():
    seen = set()
    model = make_model()
    layer = next(iter(smart_convs(model).values()))
    last = torch.channels_last
    deep = model.net[4]
    deep.register_forward_hook(
        lambda m, args, out: seen.add((m.weight.is_contiguous(memory_format=last), m.mask_adv.stride()[1] == 1))
    )
    train(model, make_data(), dataclasses.replace(CONFIG, epochs=1, channels_last=True), progress=False)
    assert (True, True) in seen
    assert layer.weight.is_contiguous() and deep.mask_adv.is_contiguous() and isinstance(deep, SmartConv2d)
    other = make_model()
    train(other, make_data(), dataclasses.replace(CONFIG, epochs=1), progress=False)
    torch.testing.assert_close(state_of(model), state_of(other), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("pattern", ["1:2", "block:2x2", "channel"])
def test_rewiring_is_the_same_in_either_layout(pattern):
    masks = []
    for layout in (torch.contiguous_format, torch.channels_last):
        model = make_model(None if pattern == "1:2" else 0.5, pattern=pattern, masked_layers="4")
        model.to(memory_format=layout)
        rewirer = Rewirer(model)
        torch.manual_seed(0)
        for momentum in rewirer.state_dict().values():
            momentum.copy_(torch.randn(momentum.shape))
        rewirer.rewire(0.1)
        masks.append({name: mask for name, mask in state_of(model).items() if ".mask_" in name})
    assert_same_state(*masks)


def test_deterministic_mode_ends_with_the_training(monkeypatch):
    inside = []
    cudnn = torch.backends.cudnn

    def look(*_):
        inside.append((torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark))

    monkeypatch.setattr(cudnn, "benchmark", True)
    model = make_model()
    model.register_forward_pre_hook(look)
    train(model, make_data(), dataclasses.replace(CONFIG, epochs=1, deterministic=True), progress=False)
    assert set(inside[1:]) == {(True, True, False)}
    look()
    assert inside[-1] == (False, False, True)
    with pytest.raises(KeyError), deterministic(True):
        raise KeyError
    assert not torch.are_deterministic_algorithms_enabled()


def test_deterministic_mode_refuses_what_is_not():
    with deterministic(True), pytest.raises(RuntimeError, match="deterministic"):
        nn.functional.max_unpool2d(torch.rand(1, 1, 2, 2), torch.zeros(1, 1, 2, 2, dtype=torch.long), 2)


def test_in_a_file_there_is_a_line_for_each_epoch():
    file = io.StringIO()
    row = {"loss": 1.5, "val_clean": 0.5, "val_adv": 0.25, "seconds": 2.0}
    with Progress(True, epochs=4, steps=100, done=1, file=file) as progress:
        for epoch in (2, 3, 4):
            for _ in range(100):
                progress.step(epoch, {"clean": 1.0, "adv": float("nan")})
            progress.epoch({"epoch": epoch, **row})
    lines = file.getvalue().splitlines()
    assert len(lines) == 3 and "\r" not in file.getvalue()
    assert lines[0].startswith("epoch 2/4: loss 1.500, val_clean 50.0 %, val_adv 25.0 %, 2.0 s; 00:00 left")


def test_the_time_left_is_that_of_all_epochs(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("smart.progress.time.monotonic", lambda: now[0])
    file = io.StringIO()
    with Progress(True, epochs=12, steps=1, done=2, file=file) as progress:
        now[0] = 120.0  # two epochs took this long, and eight are left
        progress.epoch({"epoch": 4, "loss": 1.5, "val_clean": 0.5, "val_adv": 0.25, "seconds": 60.0})
    assert "08:00 left" in file.getvalue()


def test_on_a_terminal_there_is_a_bar():
    file = io.StringIO()
    file.isatty = lambda: True
    with Progress(True, epochs=2, steps=2, file=file) as progress:
        for step in range(4):
            progress.step(1 + step // 2, {"clean": 1.0, "adv": float("nan")})
        progress.epoch({"epoch": 2})
    assert "4/4" in file.getvalue() and "clean=" not in file.getvalue().partition("4/4")[0].split("\r")[0]
    hidden = io.StringIO()
    with Progress(False, epochs=1, steps=1, file=hidden) as progress:
        progress.step(1, {})
        progress.epoch({"epoch": 1})
    assert hidden.getvalue() == ""


def test_tensorboard_shows_the_log(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    stop_before(2, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        run({}, tmp_path, tensorboard=True)
    monkeypatch.undo()
    _, result = run({}, tmp_path, tensorboard=True, resume=True)
    events = EventAccumulator(str(tmp_path)).Reload()
    curve = [(event.step, event.value) for event in events.Scalars("val_adv")]
    assert curve == [(row["epoch"], pytest.approx(row["val_adv"])) for row in result.history]


def test_without_tensorboard_one_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match="pip install tensorboard, or train without it"):
        TensorBoard(tmp_path)
    with pytest.raises(ValueError, match="tensorboard needs the run folder"):
        run({}, tensorboard=True)


def test_the_words_are_checked():
    with pytest.raises(ValueError, match="amp is 'fp8': accepted are off, bf16"):
        TrainConfig(amp="fp8")
    with pytest.raises(TypeError, match="channels_last is 1"):
        TrainConfig(channels_last=1)
