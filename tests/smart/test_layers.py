from __future__ import annotations

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from small import make_model
from torch import nn

from smart.layers import DualBatchNorm2d, SmartConv2d, held_weights
from smart.modes import eval_mode
from smart.rewire import Rewirer
from smart_kernels import paths


def masked_conv(**options) -> SmartConv2d:
    torch.manual_seed(3)
    conv = SmartConv2d(4, 6, 3, **options)
    conv.set_mask("clean", torch.rand_like(conv.weight) < 0.4)
    conv.set_mask("adv", torch.rand_like(conv.weight) < 0.4)
    return conv


@pytest.mark.parametrize("path", ["clean", "adv", 0.3])
@pytest.mark.parametrize(
    "options", [{}, {"stride": 2, "padding": 1, "groups": 2}, {"padding": 2, "padding_mode": "reflect"}]
)
def test_conv_gradients_are_those_of_the_masked_weight(path, options):
    conv = masked_conv(**options).double()
    x = torch.randn(2, 4, 7, 7, dtype=torch.double, requires_grad=True)
    mask = conv.masks[path] if isinstance(path, str) else 0.7 * conv.mask_clean.double() + 0.3 * conv.mask_adv.double()
    effective = (conv.weight * mask).detach().requires_grad_()
    x_ref = x.detach().clone().requires_grad_()
    padded, padding = x_ref, conv.padding
    if conv.padding_mode == "reflect":
        padded, padding = F.pad(x_ref, (2, 2, 2, 2), mode="reflect"), 0
    truth = F.conv2d(padded, effective, conv.bias.detach(), conv.stride, padding, 1, conv.groups)
    out_grad = torch.randn_like(truth)
    truth.backward(out_grad)

    rewirer = Rewirer(conv)
    with paths.running(path):
        y = conv(x)
    y.backward(out_grad)
    torch.testing.assert_close(y, truth)
    torch.testing.assert_close(x.grad, x_ref.grad)
    torch.testing.assert_close(conv.weight.grad, effective.grad * mask)
    assert (conv.weight.grad[mask == 0] == 0).all()
    shares = {"clean": 0.0, "adv": 0.0, path: 1.0} if isinstance(path, str) else {"clean": 0.7, "adv": 0.3}
    for name, sink in conv.gradient_sinks.items():
        torch.testing.assert_close(sink, shares[name] * effective.grad)
    assert any((sink[~conv.masks[name]] != 0).any() for name, sink in conv.gradient_sinks.items())
    rewirer.close()
    assert not conv.gradient_sinks


def test_sinks_leave_results_and_gradients_bit_identical():
    conv = masked_conv()
    x = torch.randn(2, 4, 7, 7)
    (plain,) = torch.autograd.grad(conv(x).square().sum(), conv.weight)
    Rewirer(conv)
    (with_sink,) = torch.autograd.grad(conv(x).square().sum(), conv.weight)
    assert torch.equal(plain, with_sink)


def test_copies_collect_no_gradients():
    conv = masked_conv()
    Rewirer(conv)
    assert conv.gradient_sinks and not copy.deepcopy(conv).gradient_sinks


def test_set_mask_refuses():
    conv = masked_conv()
    with pytest.raises(ValueError, match="unknown path"):
        conv.set_mask("robust", conv.mask_clean)
    with pytest.raises(TypeError, match="bool"):
        conv.set_mask("adv", conv.weight)
    with pytest.raises(ValueError, match="shape"):
        conv.set_mask("adv", conv.mask_adv[:1])


def test_paths_differ_and_each_is_its_own_network(model, x):
    for path in ("clean", "adv"):
        conv1, norm1, relu, _, conv2, norm2, *rest = model.net
        h = relu(norm1.norms[path](F.conv2d(x, conv1.weight * conv1.masks[path], padding=1)))
        h = norm2.norms[path](F.conv2d(h, conv2.weight * conv2.masks[path], conv2.bias, stride=2))
        torch.testing.assert_close(nn.Sequential(*rest)(relu(h)), model(x, path=path))
    assert not torch.allclose(model(x, path="clean"), model(x, path="adv"))


def test_ends_of_the_dial_are_the_named_paths(model, x):
    assert torch.equal(model(x, path=0.0), model(x, path="clean"))
    assert torch.equal(model(x, path=1), model(x, path="adv"))
    near = model(x, path=1e-6)
    torch.testing.assert_close(near, model(x, path="clean"), rtol=1e-3, atol=1e-4)
    middle = model(x, path=0.5)
    assert not torch.allclose(middle, model(x)) and not torch.allclose(middle, model(x, path="adv"))


def test_per_sample_path_runs_each_sample_on_its_own(model, x):
    choice = torch.tensor([0, 1, 1, 0, 1, 0])
    mixed = model(x, path=choice)
    for i, path in enumerate(choice.tolist()):
        torch.testing.assert_close(mixed[i : i + 1], model(x[i : i + 1], path=("clean", "adv")[path]))


def test_threads_keep_their_paths(model, x):
    truth = {path: model(x, path=path) for path in ("clean", "adv", 0.5)}
    wrong: list[object] = []
    start = threading.Barrier(len(truth))

    def work(path):
        start.wait()
        for _ in range(50):
            if not torch.equal(model(x, path=path), truth[path]):
                wrong.append(path)

    threads = [threading.Thread(target=work, args=(path,)) for path in truth]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize(
    ("bad", "error", "words"),
    [
        (torch.rand(1, 8, 8), ValueError, r"shape \(1, 8, 8\)"),
        (torch.rand(2, 3, 8, 8), ValueError, r"takes \(N, 1, H, W\)"),
        (torch.zeros(2, 1, 8, 8, dtype=torch.uint8), TypeError, "255"),
        (torch.rand(2, 1, 8, 8, dtype=torch.double), TypeError, "float32"),
        (torch.rand(2, 1, 8, 8, device="meta"), ValueError, "meta"),
        ([[0.0]], TypeError, "list"),
    ],
)
def test_bad_input_is_refused(model, bad, error, words):
    with pytest.raises(error, match=words):
        model(bad)


@pytest.mark.parametrize("path", ["robust", 1.5, -0.1, torch.tensor([0, 1]), torch.tensor([0, 0, 0, 0, 0, 2])])
def test_bad_path_is_refused(model, x, path):
    with pytest.raises(ValueError):
        model(x, path=path)


def test_training_a_path_moves_only_its_own_statistics(model, x):
    model.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model(x, path="adv")
    after = model.state_dict()
    for key, value in before.items():
        moved = not torch.equal(value, after[key])
        assert moved == ("norms.adv" in key and ("running" in key or "num_batches" in key)), key


def test_eval_mode_restores_each_flag(model):
    model.train()
    frozen = next(m for m in model.modules() if isinstance(m, DualBatchNorm2d))
    frozen.eval()
    flags = [m.training for m in model.modules()]
    with pytest.raises(KeyError), eval_mode(model):
        assert not any(m.training for m in model.modules())
        raise KeyError
    assert flags == [m.training for m in model.modules()]


class LeafTracer(torch.fx.Tracer):
    def is_leaf_module(self, module, name):
        return isinstance(module, (SmartConv2d, DualBatchNorm2d)) or super().is_leaf_module(module, name)


def test_symbolic_trace(model, x):
    graph = LeafTracer().trace(model, concrete_args={"path": "adv"})
    traced = torch.fx.GraphModule(model, graph)
    with paths.running("adv"):
        torch.testing.assert_close(traced(x, "adv"), model(x, path="adv"))


@pytest.mark.parametrize("path", ["clean", "adv"])
def test_compiles_as_one_graph(x, path):
    torch._dynamo.reset()
    model = make_model()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, path=path), model(x, path=path))


def test_held_weights_are_computed_once_for_each_path_and_have_no_gradient(model, x, monkeypatch):
    computed = []
    original = SmartConv2d.effective_weight
    monkeypatch.setattr(
        SmartConv2d, "effective_weight", lambda self, path: computed.append(path) or original(self, path)
    )
    expected = {path: model(x, path=path) for path in ("clean", "adv", 0.5)}
    assert len(computed) == 6
    with held_weights():
        for _ in range(3):
            for path, y in expected.items():
                assert torch.equal(model(x, path=path), y)
        assert len(computed) == 12
        x.requires_grad_()
        model(x).sum().backward()
    assert x.grad is not None and model.net[4].weight.grad is None and model.net[4].bias.grad is not None
    with torch.no_grad():
        model.net[4].weight.mul_(2)
    assert not torch.equal(model(x), expected["clean"]) and len(computed) == 14


def test_noise_is_drawn_anew_though_weights_are_held(x):
    model = make_model(method="floats")
    with held_weights(), torch.no_grad():
        assert not torch.equal(model(x, path="adv"), model(x, path="adv"))
