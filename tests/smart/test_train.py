from __future__ import annotations

import csv
import json
import sys

import pytest
import torch
from small import assert_same_state, make_data, make_model, state_of

from smart.attacks import pgd
from smart.checkpoint import load_into, read_checkpoint
from smart.config import TrainConfig
from smart.data import ImageData
from smart.evaluate import evaluate
from smart.layers import smart_convs
from smart.recipes import demo_config
from smart.train import train

CONFIG = TrainConfig(
    epochs=4, batch_size=16, lr=0.05, eps=0.1, attack_step=0.05, attack_steps=2, val_attack_steps=2, crop_padding=1
)


def fresh():
    return make_model(dropout=0.2)


def train_quietly(model, out=None, config=CONFIG, **options):
    return train(model, make_data(), config, out, progress=False, **options)


def log_rows(out):
    with (out / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        del row["seconds"]
    return rows


def interrupt_after(model, calls):
    """Raises KeyboardInterrupt, as Ctrl-C does, at the model's forward pass number ``calls``."""
    left = [calls]

    def count(module, args):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt

    return model.register_forward_pre_hook(count)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("whole")
    model = fresh()
    calls = [0]
    model.register_forward_pre_hook(lambda module, args: calls.__setitem__(0, calls[0] + 1))
    result = train_quietly(model, out)
    return model, result, out, calls[0]


# 0.02: in the first epoch; 0.5: between two; 0.6: in the third; 0.99: while the last is validated.
@pytest.mark.parametrize("moment", [0.02, 0.3, 0.5, 0.6, 0.99])
def test_an_interrupted_run_resumes_to_the_same_numbers(uninterrupted, tmp_path, moment):
    whole, result, out, calls = uninterrupted
    model = fresh()
    hook = interrupt_after(model, max(2, int(moment * calls)))
    with pytest.raises(KeyboardInterrupt):
        train_quietly(model, tmp_path)
    hook.remove()
    assert not any(layer.gradient_sinks for layer in smart_convs(model).values())

    resumed = fresh()
    torch.manual_seed(999)
    again = train_quietly(resumed, tmp_path, resume=True)
    assert_same_state(state_of(whole), state_of(resumed))
    assert log_rows(tmp_path) == log_rows(out) and len(log_rows(out)) == 4
    assert {**again.best, "seconds": 0} == {**result.best, "seconds": 0}
    for name in ("best.safetensors", "last.safetensors"):
        mine, theirs = read_checkpoint(tmp_path / name)[1], read_checkpoint(out / name)[1]
        for group in theirs:
            assert_same_state(mine[group], theirs[group])


def test_masks_move_and_densities_stay(uninterrupted):
    model, result, _, _ = uninterrupted
    start = fresh()
    for name, layer in smart_convs(model).items():
        assert not torch.equal(layer.mask_clean, smart_convs(start)[name].mask_clean)
        assert (layer.weight[~layer.union()] == 0).all()
    assert len({row["density_clean"] for row in result.history}) == 1
    assert [row["prune_rate"] for row in result.history] == [0, 0.375, 0.25, 0.125]


def test_run_folder(uninterrupted):
    model, result, out, _ = uninterrupted
    assert sorted(path.name for path in out.iterdir()) == [
        "best.safetensors",
        "config.json",
        "last.safetensors",
        "log.csv",
    ]
    saved = json.loads((out / "config.json").read_text())
    assert TrainConfig.from_dict(saved["config"]) == CONFIG and saved["versions"]["torch"] == torch.__version__
    assert [row["epoch"] for row in log_rows(out)] == ["1", "2", "3", "4"]
    assert result.last["epoch"] == 4 and result.best in result.history
    assert result.best["val_clean"] + result.best["val_adv"] == max(
        r["val_clean"] + r["val_adv"] for r in result.history
    )
    other = fresh()
    load_into(other, result.last_path)
    assert_same_state(state_of(model), state_of(other))
    result.load_best(other)
    table = evaluate(other, make_data().val, ["clean"], eps=0.1)
    assert table["clean"]["clean"] == pytest.approx(result.best["val_clean"], abs=1e-6)


def test_learns_and_needs_no_folder():
    model = make_model()
    config = TrainConfig.from_dict({**CONFIG.to_dict(), "epochs": 10, "crop_padding": 0})
    result = train_quietly(model, config=config)
    assert result.last["loss"] < result.history[0]["loss"]
    assert result.last["val_clean"] > 0.6 and not model.training
    result.load_best(model)
    assert evaluate(model, make_data().val, ["clean"])["clean"]["clean"] == pytest.approx(
        result.best["val_clean"], abs=1e-6
    )


def test_global_random_state_neither_matters_nor_changes():
    config = TrainConfig.from_dict({**CONFIG.to_dict(), "epochs": 1})
    states = []
    for seed in (1, 2):
        model = fresh()
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        train_quietly(model, config=config)
        assert torch.equal(before, torch.get_rng_state())
        states.append(state_of(model))
    assert_same_state(*states)


@pytest.mark.parametrize(
    "changes",
    [
        {"rewire_every": 2, "rewire_unit": "steps", "prune_schedule": "cosine", "lr_schedule": "constant"},
        {"rewire": "rigl", "prune_schedule": "constant", "rewire_until": 0.75},
        {"rewire": "static"},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_other_settings_run(changes):
    model = fresh()
    config = TrainConfig.from_dict({**CONFIG.to_dict(), "epochs": 2, **changes})
    result = train_quietly(model, config=config)
    moved = any(
        not torch.equal(layer.mask_adv, smart_convs(fresh())[name].mask_adv)
        for name, layer in smart_convs(model).items()
    )
    assert moved == (changes.get("rewire") != "static")
    assert (result.last["lr"] == CONFIG.lr) == ("lr_schedule" in changes)


def test_training_attacks_the_adversarial_path_with_the_second_half(monkeypatch):
    seen = []

    def record(model, x, y, *args, **kwargs):
        seen.append((len(x), *args))
        return pgd(model, x, y, *args, **kwargs)

    # By the module's entry, because the name smart.train is the function.
    monkeypatch.setattr(sys.modules["smart.train"], "pgd", record)
    train_quietly(fresh(), config=TrainConfig.from_dict({**CONFIG.to_dict(), "epochs": 1}))
    assert seen == [(8, "adv", CONFIG.eps, CONFIG.attack_step, CONFIG.attack_steps)] * 3


def test_a_sampled_dial_trains_every_other_step_at_a_lambda(monkeypatch):
    seen = []

    def record(model, x, y, path, *args, **kwargs):
        seen.append(path)
        return pgd(model, x, y, path, *args, **kwargs)

    monkeypatch.setattr(sys.modules["smart.train"], "pgd", record)
    train_quietly(fresh(), config=TrainConfig.from_dict({**CONFIG.to_dict(), "dial": "sampled"}))
    assert len(seen) == 12 and set(seen[::2]) == {"adv"}
    assert all(0 < path < 1 for path in seen[1::2]) and len(set(seen[1::2])) == 6


def test_training_with_a_sampled_dial_resumes_to_the_same_numbers(tmp_path):
    config = TrainConfig.from_dict({**CONFIG.to_dict(), "epochs": 3, "dial": "sampled"})
    whole = fresh()
    train_quietly(whole, tmp_path / "whole", config)
    stopped = fresh()
    hook = interrupt_after(stopped, 40)
    with pytest.raises(KeyboardInterrupt):
        train_quietly(stopped, tmp_path / "stopped", config)
    hook.remove()
    resumed = fresh()
    train_quietly(resumed, tmp_path / "stopped", config, resume=True)
    assert len(log_rows(tmp_path / "stopped")) == 3
    assert_same_state(state_of(whole), state_of(resumed))


@pytest.mark.parametrize("poisoned", ["loss", "weights"])
def test_numbers_gone_bad_stop_the_run_and_the_last_good_epoch_stays(poisoned, tmp_path, monkeypatch):
    model, steps = fresh(), [0]
    good = pgd

    def spoil(*args, **kwargs):
        steps[0] += 1
        if poisoned == "loss" and steps[0] == 5:  # the second step of the second epoch
            return torch.full_like(args[1], float("nan"))
        if poisoned == "weights" and steps[0] == 6:  # the last step of that epoch
            model.net[4].bias.register_hook(lambda gradient: gradient * float("inf"))
        return good(*args, **kwargs)

    monkeypatch.setattr(sys.modules["smart.train"], "pgd", spoil)
    where = {"loss": r"the loss is nan in epoch 2, step 2 of 3", "weights": "last step of epoch 2 net.4.bias is not"}
    with pytest.raises(RuntimeError, match=rf"{where[poisoned]}.*last\.safetensors keeps epoch 1.*lower lr"):
        train_quietly(model, tmp_path)
    monkeypatch.undo()
    assert len(log_rows(tmp_path)) == 1
    resumed = fresh()
    result = train_quietly(resumed, tmp_path, resume=True)
    assert len(result.history) == 4 and all(value.isfinite().all() for value in resumed.state_dict().values())


def test_a_folder_with_a_run_is_not_overwritten_by_accident(uninterrupted, tmp_path):
    _, _, out, _ = uninterrupted
    with pytest.raises(FileExistsError, match="already holds a run"):
        train_quietly(fresh(), out)
    config = TrainConfig.from_dict({**CONFIG.to_dict(), "epochs": 1})
    train_quietly(fresh(), tmp_path, config)
    train_quietly(fresh(), tmp_path, config, overwrite=True)
    assert len(log_rows(tmp_path)) == 1


def test_resume_refuses(uninterrupted, tmp_path):
    _, _, out, _ = uninterrupted
    with pytest.raises(FileNotFoundError, match="no run to resume"):
        train_quietly(fresh(), tmp_path, resume=True)
    with pytest.raises(ValueError, match=r"started with lr 0\.05, not 0\.1"):
        train_quietly(fresh(), out, TrainConfig.from_dict({**CONFIG.to_dict(), "lr": 0.1}), resume=True)
    with pytest.raises(ValueError, match="give out"):
        train_quietly(fresh(), resume=True)


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write"):
        train_quietly(fresh(), tmp_path / "file" / "run")


def test_diverging_training_says_where():
    config = TrainConfig.from_dict({**CONFIG.to_dict(), "lr": 1000.0, "momentum": 0.0, "weight_decay": 1.0})
    with pytest.raises(RuntimeError, match=r"epoch \d+.*: lower lr|lower the learning rate"):
        train_quietly(make_model(), config=TrainConfig.from_dict({**config.to_dict(), "epochs": 20}))


def test_data_and_model_must_fit(data):
    rgb = tuple(images.expand(-1, 3, -1, -1).contiguous() for images, _ in (data.train, data.val, data.test))
    labels = (data.train[1], data.val[1], data.test[1])
    with pytest.raises(ValueError, match="3 channels, the model takes 1"):
        train(make_model(), ImageData("rgb", list("abc"), *zip(rgb, labels, strict=True)), CONFIG)
    more = ImageData("more", list("abcd"), data.train, data.val, data.test)
    with pytest.raises(ValueError, match="num_classes=4"):
        train(make_model(), more, CONFIG)
    with pytest.raises(TypeError, match="create_model"):
        train(make_model().net, data, CONFIG)


def test_config_round_trip_and_text_numbers():
    config = TrainConfig.from_dict({"eps": "8/255", "weight_decay": "5e-4", "lr": 1, "epochs": 3})
    assert config.eps == 8 / 255 and config.weight_decay == 5e-4
    assert TrainConfig.from_dict(config.to_dict()) == config
    assert demo_config(epochs=2, seed=4).epochs == 2


@pytest.mark.parametrize(
    ("values", "error", "words"),
    [
        ({"learning_rate": 0.1}, ValueError, "unknown setting 'learning_rate'"),
        ({"weight_decy": 0.1}, ValueError, "did you mean 'weight_decay'"),
        ({"epochs": 0}, ValueError, "epochs is 0"),
        ({"epochs": 2.5}, TypeError, "epochs is 2.5"),
        ({"epochs": True}, TypeError, "epochs is True"),
        ({"flip": 1}, TypeError, "flip"),
        ({"eps": 8}, ValueError, r"eps is 8: .* did you mean 8/255\?"),
        ({"attack_step": "2"}, ValueError, r"did you mean 2/255\?"),
        ({"rewire": "rigl", "redistribute": "momentum"}, ValueError, "keeps no momentum"),
        ({"dial": "often"}, ValueError, "ends, sampled"),
        ({"rewire": "set"}, ValueError, "sparse_momentum, rigl, static"),
        ({"prune_schedule": "step"}, ValueError, "linear, cosine, constant"),
        ({"redistribute": "some"}, ValueError, "auto, momentum, none"),
        ({"rewire_unit": "hours"}, ValueError, "epochs, steps"),
        ({"rewire_every": 0}, ValueError, "rewire_every is 0"),
        ({"eps": "eight"}, ValueError, "8/255"),
        ({"lr": float("nan")}, ValueError, "lr"),
        ({"batch_size": 2}, ValueError, "batch_size"),
        ({"lr_schedule": "step"}, ValueError, "cosine"),
    ],
)
def test_config_refuses(values, error, words):
    with pytest.raises(error, match=words):
        TrainConfig.from_dict(values)
