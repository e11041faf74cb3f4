"""Every method in the same trainer: what it attacks, how it resumes, what its networks are."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from small import assert_same_state, make_data, make_net, state_of
from torch import nn

import smart_kernels
from smart.attacks import pgd
from smart.checkpoint import CheckpointError, dense_state, load_checkpoint, load_into, read_checkpoint, save_checkpoint
from smart.conditioning import NoisyConv2d, NoisySmartConv2d
from smart.config import TrainConfig
from smart.conversion import convert
from smart.costs import macs, nonzeros
from smart.dial import trade_off
from smart.evaluate import evaluate
from smart.lambdas import LAMBDAS, Lambdas, draw_lambdas
from smart.layers import SmartConv2d, smart_convs
from smart.methods import METHODS, read_plan
from smart.models import build, create_model
from smart.train import train
from smart.twin import DenseTwin

BASE = {"batch_size": 16, "lr": 0.05, "eps": 0.1, "attack_step": 0.05, "attack_steps": 2, "val_attack_steps": 1}
CONFIG = TrainConfig(epochs=3, crop_padding=1, **BASE)
TWO_STEPS = TrainConfig(epochs=1, **{**BASE, "batch_size": 24})
SINGLE = [name for name, method in METHODS.items() if method.norms == "single"]
NOISY = [name for name, method in METHODS.items() if method.noise]
SWAPPABLE = [name for name in METHODS if name not in NOISY]
every_method = pytest.mark.parametrize("method", METHODS)


def fresh(method):
    torch.manual_seed(0)
    return convert(make_net(), seed=0, method=method).eval()


def settled(method, seed=3):
    """An untrained network whose statistics, norms and FiLM layers are not at their starts."""
    model = create_model("tiny", 3, 1, method=method).eval()
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.bias)
    return model


@every_method
def test_two_steps_move_every_parameter_and_repeat_exactly(method):
    models = []
    for seed in (1, 2):
        model = fresh(method)
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        result = train(model, make_data(), TWO_STEPS, progress=False)
        assert torch.equal(torch.get_rng_state(), before)
        models.append(state_of(model))
    assert_same_state(*models)
    start = dict(fresh(method).named_parameters())
    still = [name for name, each in model.named_parameters() if torch.equal(each, start[name])]
    assert not still
    expected = {"standard": {"adv_loss", "adv_accuracy"}, "pgd_at": {"clean_loss", "clean_accuracy"}}
    assert {key for key, value in result.last.items() if value is None} == expected.get(method, set())


@every_method
def test_a_stopped_run_resumes_to_the_same_numbers(method, tmp_path):
    whole = fresh(method)
    result = train(whole, make_data(), CONFIG, tmp_path / "whole", progress=False)
    stopped, steps = fresh(method), [0]

    def stop(*_):
        steps[0] += 1
        if steps[0] == 5:  # of three in an epoch
            raise KeyboardInterrupt

    hook = stopped.net[9].weight.register_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        train(stopped, make_data(), CONFIG, tmp_path / "stopped", progress=False)
    hook.remove()
    assert len(read_checkpoint(tmp_path / "stopped" / "last.safetensors")[0]["history"]) == 1
    resumed = fresh(method)
    torch.manual_seed(9)
    again = train(resumed, make_data(), CONFIG, tmp_path / "stopped", resume=True, progress=False)
    assert_same_state(state_of(whole), state_of(resumed))
    drop = [[{**row, "seconds": 0} for row in each.history] for each in (result, again)]
    assert drop[0] == drop[1]


def attacked_by(method, monkeypatch):
    seen = []

    def record(model, x, y, path, *args, loss="ce", **kwargs):
        seen.append((len(x), path, loss))
        return pgd(model, x, y, path, *args, loss=loss, **kwargs)

    monkeypatch.setattr(sys.modules["smart.train"], "pgd", record)
    train(fresh(method), make_data(), TWO_STEPS, progress=False)
    return seen


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("standard", []),
        ("pgd_at", [(24, "adv", "ce")] * 2),
        ("trades", [(24, "adv", "kl")] * 2),
        ("smart", [(12, "adv", "ce")] * 2),
        ("dual_bn", [(12, "adv", "ce")] * 2),
        ("float", [(12, "adv", "ce")] * 2),
        ("floats", [(12, "adv", "ce")] * 2),
    ],
)
def test_what_is_attacked(method, expected, monkeypatch):
    assert attacked_by(method, monkeypatch) == expected


def test_oat_attacks_the_images_above_lambda_zero_each_at_its_own(monkeypatch):
    for count, path, loss in attacked_by("oat", monkeypatch):
        assert (count, path.clean, loss) == (20, 0, "ce") and len(path.values) == 20
        assert len(set(path.values.tolist())) > 1 and path.values.min() > 0


def test_lambdas_are_drawn_as_published():
    drawn = draw_lambdas(3001, torch.Generator().manual_seed(0))
    assert drawn.clean == 501 and (drawn.values[:501] == 0).all() and len(drawn.values) == 3001
    counts = {round(at, 1): int((drawn.values == torch.tensor(at)).sum()) for at in LAMBDAS}
    assert all(400 < counts[at] < 600 for at in LAMBDAS)


@pytest.mark.parametrize("name", ["resnet34"])
@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("standard", 21_282_122),
        ("dual_bn", 21_299_146),
        ("float", 21_299_146 + 36),  # published: 21.30 M
        ("floats", 21_299_146 + 36),
        ("oat", 33_355_466),  # published: 33.36 M
    ],
)
def test_parameter_counts(name, method, parameters):
    model = create_model(name, method=method)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_oat_has_film_where_the_published_wide_networks_have_it():
    model = create_model("wrn_40_2", method="oat")
    films = [name for name, _ in model.net.named_modules() if name.endswith(".film")]
    assert len(films) == 2 * 18 and not any(name.startswith("bn") for name in films)


@every_method
def test_networks_hold_what_the_method_needs(method):
    model, how = fresh(method), METHODS[method]
    assert model.method == method
    assert bool(smart_convs(model)) == how.masks
    kinds = {type(layer) for layer in model.modules() if isinstance(layer, nn.Conv2d)}
    assert (
        kinds
        == {
            (False, False): {nn.Conv2d},
            (False, True): {NoisyConv2d},
            (True, False): {SmartConv2d},
            (True, True): {NoisySmartConv2d},
        }[how.masks, how.noise]
    )
    counts = nonzeros(model)
    assert (counts["union"] == counts["dense"]) == (not how.masks)
    if how.one_mask:
        assert counts["union"] == counts["clean"] == counts["adv"] < counts["dense"]
    assert macs(model, (1, 8, 8))["dense"] > 0


@pytest.mark.parametrize("method", SINGLE)
def test_one_network_has_one_path(method):
    model, x = settled(method), torch.rand(4, 1, 8, 8)
    with torch.no_grad():
        for path in ("adv", 0.3, torch.tensor([0, 1, 1, 0]), ("adv", "clean", "adv")):
            assert torch.equal(model(x), model(x, path=path))
    table = evaluate(model, (x, torch.tensor([0, 1, 2, 0])), ["clean", "pgd2"], eps=0.1)
    assert table["clean"]["clean"] == table["adv"]["clean"] and table.losses["clean"] == table.losses["adv"]


def test_a_single_norm_learns_from_both_paths():
    model = fresh("trades").train()
    (norm,) = {id(m): m for m in model.net[1].modules() if isinstance(m, nn.BatchNorm2d)}.values()
    model(torch.rand(4, 1, 8, 8), path="clean")
    model(torch.rand(4, 1, 8, 8), path="adv")
    assert norm.num_batches_tracked == 2


@every_method
def test_checkpoints_bring_the_network_back(method, tmp_path):
    model = settled(method)
    save_checkpoint(tmp_path / "m.safetensors", model)
    loaded, _ = load_checkpoint(tmp_path / "m.safetensors")
    assert_same_state(state_of(model), state_of(loaded))
    x = torch.rand(2, 1, 8, 8)
    for path in ("clean", "adv", 0.15):
        torch.manual_seed(0)
        expected = model(x, path=path)
        torch.manual_seed(0)
        assert torch.equal(loaded(x, path=path), expected)
    other = create_model("tiny", 3, 1, method="oat" if method != "oat" else "float")
    with pytest.raises(CheckpointError, match="another network"):
        load_into(other, tmp_path / "m.safetensors")


def test_a_checkpoint_from_before_methods_is_smart(tmp_path):
    model = settled("smart")
    del model.spec["method"]
    save_checkpoint(tmp_path / "m.safetensors", model)
    assert load_checkpoint(tmp_path / "m.safetensors")[0].method == "smart"


@pytest.mark.parametrize("method", ["oat", "float"])
def test_the_dial_turns_continuously(method):
    model, x = settled(method), torch.rand(6, 1, 8, 8)
    # No steps between neighbours, but for that from the clean norm to the adversarial one.
    outputs = []
    for at in (0, 0.1, 0.15, 0.2, 1):
        torch.manual_seed(0)
        outputs.append(model(x, path=at).detach())
    assert len({float(output.sum()) for output in outputs}) == 5
    torch.manual_seed(0)
    near = model(x, path=0.1500001).detach()
    assert (near - outputs[2]).abs().max() < 1e-4 < (outputs[1] - outputs[2]).abs().max()
    rows = trade_off(model, (x, torch.tensor([0, 1, 2, 0, 1, 2])), ["clean", "pgd1"], lambdas=[0, 0.5, 1], eps=0.1)
    assert [row["position"] for row in rows if row["dial"] == "weights"] == [0, 0.5, 1]
    assert {row["dial"] for row in rows} == {"weights", "first_stages", "last_stages"}


@pytest.mark.parametrize("method", NOISY)
def test_evaluation_of_noisy_networks_repeats(method):
    model, x = settled(method), torch.rand(32, 1, 8, 8)
    labels = torch.arange(32) % 3
    before = torch.get_rng_state()
    first, again = (evaluate(model, (x, labels), ["clean", "pgd2"], lambdas=[0.5], eps=0.1) for _ in range(2))
    assert first == again and first.losses == again.losses and torch.equal(before, torch.get_rng_state())
    other = evaluate(model, (x, labels), ["clean"], seed=1)
    assert other.losses["clean"]["clean"] == first.losses["clean"]["clean"]
    assert other.losses["adv"]["clean"] != first.losses["adv"]["clean"]


@pytest.mark.parametrize("method", SWAPPABLE)
def test_swapped_networks_compute_the_same_at_every_lambda(method):
    model, x = settled(method), torch.rand(4, 1, 8, 8)
    sparse = smart_kernels.swap(model, x, measure=False)
    assert sparse.paths == ("clean", "adv") and sparse.uncaptured is None
    assert smart_kernels.verify(model, sparse, x).keys() == {"clean", "adv"}
    with torch.no_grad():
        for path in ("clean", "adv", 0.15, 0.7, ("adv", 0.3, "clean"), torch.tensor([1, 0, 0, 1])):
            expected = model(x, path=path)
            assert torch.allclose(sparse(x, path=path), expected, atol=1e-5), path
            if not isinstance(path, torch.Tensor):
                twin = smart_kernels.dense_twin(sparse, path)
                assert torch.allclose(twin(x), expected, atol=1e-5), path


@pytest.mark.parametrize("method", NOISY)
def test_noise_is_refused_where_there_is_no_single_weight(method):
    model, x = settled(method), torch.rand(2, 1, 8, 8)
    with pytest.raises(ValueError, match=r"net\.conv1 cannot be swapped: it adds noise.*run the network as it is"):
        smart_kernels.swap(model, x)
    with pytest.raises(ValueError, match="noise anew at each call: take 'clean'"):
        dense_state(model, "adv")
    assert torch.allclose(DenseTwin(model, "clean")(x), model(x), atol=1e-5)


@pytest.mark.parametrize("method", [name for name in SWAPPABLE if name != "smart"])
@pytest.mark.parametrize("path", ["clean", "adv"])
def test_dense_twins(method, path):
    model, x = settled(method), torch.rand(2, 1, 8, 8)
    expected = model(x, path=path)
    twin = DenseTwin(model, path)
    assert torch.allclose(twin(x), expected, atol=1e-5)
    plain = build("tiny", 3, 1)
    plain.load_state_dict(dense_state(model, path))
    assert torch.allclose(plain.eval()(x), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "choices", "words"),
    [
        ("tradse", {}, "unknown method 'tradse': accepted are smart, dual_bn"),
        ("trades", {"density": 0.2}, "'trades' has dense weights, and density is .*'smart' or 'floats'"),
        ("oat", {"pattern": "2:4"}, "'oat' has dense weights.*pattern 2:4"),
        ("dual_bn", {"density": {"clean": 1.0, "adv": 0.5}}, "has dense weights"),
        ("floats", {"overlap": "disjoint"}, "one mask for both paths, and overlap is 'disjoint'"),
    ],
)
def test_contradictions_are_refused(method, choices, words):
    with pytest.raises(ValueError, match=words):
        create_model("tiny", method=method, **choices)
    with pytest.raises(ValueError, match=words):
        convert(make_net(), method=method, **choices)


def test_plans_survive_being_written_down():
    for method in METHODS:
        plan = read_plan(method, {})
        assert read_plan(method, json.loads(json.dumps(plan.settings()))) == plan
    assert read_plan("floats", {"density": 0.1}).overlap == "shared"


@pytest.mark.parametrize("method", [name for name, how in METHODS.items() if not how.dial])
def test_other_methods_have_no_sampled_dial(method):
    config = TrainConfig(dial="sampled", **BASE)
    with pytest.raises(ValueError, match=f"'sampled' and the method '{method}'.*'smart' or 'dual_bn', take 'ends'"):
        train(fresh(method), make_data(), config, progress=False)


def test_a_lambda_for_each_image_is_oats_alone():
    lambdas = Lambdas(torch.tensor([0.0, 1.0]), 1)
    with pytest.raises(TypeError, match="path is a Lambdas"):
        fresh("smart")(torch.rand(2, 1, 8, 8), path=lambdas)
    with pytest.raises(ValueError, match="2 lambdas"):
        fresh("oat")(torch.rand(3, 1, 8, 8), path=lambdas)


def test_standard_training_is_judged_by_clean_accuracy_alone():
    assert METHODS["standard"].judged_by == ("val_clean",)
    result = train(fresh("standard"), make_data(), CONFIG, progress=False)
    best = max(result.history, key=lambda row: (row["val_clean"], row["epoch"]))
    assert result.best == best
