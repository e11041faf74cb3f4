"""Stretches of a network that run as one call of the CPU kernels, and what they compute."""

import threading
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from networks import MaskedConv, TwoPaths
from programmed import LANES, example, forced, programs_of
from torch import nn

from smart_kernels import native, verify

pytestmark = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))


class Zoo(nn.Module):
    """Joins, gates, pools and activations, in place and not; some of it no program can run."""

    def __init__(self):
        super().__init__()
        self.a, self.b = MaskedConv(2, 6, 3, padding=1), MaskedConv(6, 6, 1)
        self.depthwise = MaskedConv(6, 6, 3, padding=1, groups=6, density=0.9)
        self.squeeze, self.excite = MaskedConv(6, 2, 1, density=0.5), MaskedConv(2, 6, 1, density=0.5)
        self.norm, self.relu6, self.silu = nn.BatchNorm2d(6), nn.ReLU6(inplace=True), nn.SiLU(inplace=True)
        self.c, self.d, self.relu = (
            MaskedConv(6, 6, 3, 2, padding=(2, 0), dilation=(1, 2)),
            MaskedConv(6, 9, 2),
            nn.ReLU(),
        )
        self.pool, self.average = nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1)
        self.reflect = MaskedConv(9, 4, 3, padding=1, padding_mode="reflect")
        self.e, self.last, self.fc = MaskedConv(4, 20, 3, groups=2, padding=1), MaskedConv(20, 4, 3), nn.Linear(4, 3)

    def forward(self, x):
        x = self.relu6(self.norm(self.a(x)))
        gate = torch.sigmoid(self.excite(self.silu(self.squeeze(self.average(x)))))
        y = self.depthwise(x) * gate + self.b(x)
        z = self.c(y)
        y = self.d(z + F.relu(z))
        y = self.reflect(self.pool(y) + F.max_pool2d(y, (2, 2), stride=2))
        z = self.last(self.e(y))
        return self.fc(F.adaptive_avg_pool2d(torch.relu(z), 1).flatten(1)), y, z


@pytest.mark.parametrize("batch", [1, 2 * LANES])
def test_programs_of_bfloat16_networks(batch):
    x = example(TwoPaths, batch).bfloat16()
    model = TwoPaths().eval().bfloat16().float()  # weights that bfloat16 holds exactly
    half, full = forced(model, x, torch.bfloat16), forced(model, x.float())
    assert len(programs_of(half, x)) == len(programs_of(full, x.float())) == 1
    for path in ("clean", "adv", 0.3):
        ours, truth = (
            net._graph_for(net.net, each).program_0(path, each) for net, each in ((half, x), (full, x.float()))
        )
        for y, expected in zip(ours, truth, strict=True):
            assert y.dtype == torch.bfloat16
            error = (y.float() - expected).abs().max() / expected.abs().max()
            assert error < 2e-2  # scales, biases and mixed values are rounded too


@pytest.mark.parametrize("isa", native.cpu_isas())
@pytest.mark.parametrize("network", [TwoPaths, Zoo])
@pytest.mark.parametrize("batch", [1, 3, LANES, 2 * LANES + 1])
def test_programs_compute_what_the_network_does(poisoned, isa, network, batch):
    model, x = network().eval(), example(network, batch)
    sparse = forced(model, x)
    found = programs_of(sparse, x)
    assert len(found) >= (1 if network is TwoPaths else 2)
    for program in found:
        program.isa = isa
    assert max(verify(model, sparse, x).values()) < 1e-5
    mixed = sparse(x, path=0.4)
    sparse.runs_programs = False
    torch.testing.assert_close(mixed, sparse(x, path=0.4), rtol=1e-4, atol=1e-5)


class Deep(nn.Module):
    """Maps of many sizes: programs of it change their layout on the way."""

    def __init__(self):
        super().__init__()
        widths = (3, 16, 24, 40, 48)
        self.convs = nn.ModuleList(MaskedConv(a, b, 3, 2, 1) for a, b in pairwise(widths))
        self.sames = nn.ModuleList(MaskedConv(b, b, 3, padding=1) for b in widths[1:])

    def forward(self, x):
        early = None
        for conv, same in zip(self.convs, self.sames, strict=True):
            x = F.relu(conv(x))
            x = F.relu(same(x) + x)
            early = x if early is None else early
        return x, early


class Random(nn.Module):
    """Convolutions of any geometry, pooling, sums and ReLUs, in an order drawn by hypothesis."""

    def __init__(self, draw, shape):
        super().__init__()
        self.layers, self.plan = nn.ModuleList(), []
        x = torch.zeros(1, *shape)
        for _ in range(draw(st.integers(2, 5))):
            kind = draw(st.sampled_from(["same", "conv", "conv", "pool", "relu", "residual"]))
            channels, size = x.shape[1], x.shape[2:]
            if kind == "pool" and min(size) >= 2:
                layer = nn.MaxPool2d(draw(st.integers(1, 2)), draw(st.integers(1, 2)))
            elif kind == "conv":
                layer = _any_convolution(draw, channels, size)
            elif kind == "relu":
                layer = nn.ReLU()
            else:
                layer = MaskedConv(channels, channels, 3, padding=1, density=draw(st.sampled_from([0, 0.2, 1])))
            self.layers.append(layer)
            self.plan.append(kind == "residual")
            x = layer(x)

    def forward(self, x):
        for layer, residual in zip(self.layers, self.plan, strict=True):
            x = layer(x) + x if residual else layer(x)
        return x


def _any_convolution(draw, channels, size):
    groups = draw(st.sampled_from([1, 1, channels]))
    kernel = [draw(st.integers(1, 4)) for _ in range(2)]
    dilation = [draw(st.integers(1, 2)) for _ in range(2)]
    padding = [draw(st.integers(0, 3)) for _ in range(2)]
    for i in range(2):  # a kernel no larger than the padded image
        kernel[i] = min(kernel[i], (size[i] + 2 * padding[i] - 1) // dilation[i] + 1)
    outputs = groups * draw(st.integers(1, 3)) if groups > 1 else draw(st.integers(1, 35))
    stride = [draw(st.integers(1, 3)) for _ in range(2)]
    return MaskedConv(
        channels, outputs, kernel, stride, padding, dilation, groups, density=draw(st.sampled_from([0.1, 0.5]))
    )


@settings(max_examples=40)
@given(data=st.data())
def test_any_network_computes_the_same(data):
    torch.manual_seed(data.draw(st.integers(0, 9)))
    shape = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 35)), data.draw(st.integers(1, 35))
    model = Random(data.draw, shape).eval()
    assume(any(isinstance(layer, MaskedConv) for layer in model.layers))
    x = torch.randn(data.draw(st.sampled_from([1, 2, LANES, LANES + 1])), *shape)
    sparse = forced(model, x)
    for path in ("adv", 0.3):
        sparse.runs_programs = True
        y = sparse(x, path=path)
        sparse.runs_programs = False
        torch.testing.assert_close(y, sparse(x, path=path), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch", [1, 2, 2 * LANES, 2 * LANES + 5])
def test_layouts_change_between_layers_and_threads_agree(poisoned, batch):
    model, x, before = Deep().eval(), torch.rand(batch, 3, 33, 48), torch.get_num_threads()
    sparse, results = forced(model, x), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(sparse(x, path="adv"))
    finally:
        torch.set_num_threads(before)
    assert verify(model, sparse, x)["adv"] < 1e-5
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_every_thread_may_run_another_path():
    model, x = TwoPaths().eval(), example(TwoPaths, 2)
    sparse = forced(model, x)
    expected = {path: sparse(x, path=path) for path in ("clean", "adv", 0.3)}
    wrong = []

    def run(path):
        for _ in range(20):
            if not torch.equal(sparse(x, path=path), expected[path]):
                wrong.append(path)

    threads = [threading.Thread(target=run, args=(path,)) for path in expected for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_each_sample_may_take_its_own_path():
    model, x = TwoPaths().eval(), example(TwoPaths, 5)
    sparse = forced(model, x)
    y = sparse(x, path=torch.arange(5) % 2)
    for i in range(5):
        expected = sparse(x[i : i + 1], path=("clean", "adv")[i % 2])
        torch.testing.assert_close(y[i : i + 1], expected, rtol=1e-4, atol=1e-5)


def test_inputs_of_gradients_other_shapes_and_other_strides():
    model, x = TwoPaths().eval(), example(TwoPaths, 3)
    sparse = forced(model, x)
    y = sparse(x)
    with pytest.raises(RuntimeError, match="no gradients"):
        sparse(x.clone().requires_grad_()).sum().backward()
    for batch in (1, 2, 4, 5, 6):  # more shapes than graphs are kept for
        assert max(verify(model, sparse, example(TwoPaths, batch)).values()) < 1e-5
    assert max(verify(model, sparse, torch.rand(2, 1, 9, 30)).values()) < 1e-5
    torch.testing.assert_close(sparse(x.to(memory_format=torch.channels_last)), y)
    assert sparse(x[:0]).shape == (0, 10)
    with pytest.raises(ValueError, match=r"\(N, 1, H, W\) is needed"):
        sparse(torch.rand(2, 3, 14, 17))


def test_nan_and_infinity_stay_where_torch_has_them():
    model = nn.Sequential(MaskedConv(1, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), MaskedConv(3, 2, 1), nn.ReLU())
    x = torch.rand(2, 1, 8, 8)
    sparse = forced(model.eval(), x)
    assert programs_of(sparse, x)
    x[0, 0, 0, 0], x[1, 0, 3, 3] = float("nan"), float("inf")
    y = sparse(x)
    sparse.runs_programs = False
    torch.testing.assert_close(y, sparse(x), equal_nan=True)


def test_tiny_numbers_are_not_flushed_to_zero():
    conv = MaskedConv(1, 2, 1, bias=False, density=1.0)
    conv.weight.data.fill_(1.0)
    model, x = nn.Sequential(conv, MaskedConv(2, 2, 1, density=1.0)).eval(), torch.full((1, 1, 4, 4), 1e-40)
    model[1].weight.data.fill_(1.0)
    model[1].bias.data.zero_()
    sparse = forced(model, x)
    assert programs_of(sparse, x)
    assert torch.equal(sparse(x), model(x))
    assert float(sparse(x).min()) > 0
