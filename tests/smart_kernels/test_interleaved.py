"""The CPU kernels' own layout, kept from layer to layer."""

import copy

import pytest
import torch
import torch.nn.functional as F
from networks import MaskedConv, TwoPaths
from torch import nn

from smart_kernels import interleaved, native, reference, swap, verify
from smart_kernels.backends import BACKENDS, Affine
from smart_kernels.geometry import Geometry
from smart_kernels.packing import pack

pytestmark = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))
LANES = native.cpu_lanes()


def test_there_and_back_is_the_same():
    for batch in (1, LANES - 1, LANES, 2 * LANES + 1):
        x = torch.randn(batch, 3, 4, 5)
        y = interleaved.interleave(x)
        assert y.shape == (-(-batch // LANES), 3, 4, 5, LANES)
        assert y.is_contiguous()
        assert torch.equal(interleaved.separate(y, x), x)


def test_only_batches_that_fill_the_lanes_are_interleaved():
    assert interleaved.fills(LANES)
    assert interleaved.fills(4 * LANES)
    assert interleaved.fills(8 * LANES - 1)
    assert not interleaved.fills(0)
    assert not interleaved.fills(1)
    assert not interleaved.fills(LANES + 1)


@pytest.mark.parametrize("isa", native.cpu_isas())
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("stride", [(1, 1), (2, 1), (2, 3)])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (2, 5)])
@pytest.mark.parametrize("padding", [(0, 0, 0, 0), (1, 1, 1, 1), (0, 2, 3, 1)])
def test_kernels_read_and_write_it(poisoned, isa, groups, stride, kernel, padding):
    lanes = torch.ops.smart_kernels.cpu_lanes(isa)
    geometry = Geometry((9, 18 // groups, *kernel), stride, padding, (1, 2), groups)
    weight = torch.randn(geometry.weight_shape)
    packed = pack(
        weight, {"clean": torch.rand_like(weight) < 0.3, "adv": torch.rand_like(weight) < 0.3}, "unstructured"
    )
    x = torch.randn(2 * lanes, 18, 7, 11)
    shape = geometry.output_shape(x.shape)
    residual, scale, bias = torch.randn(shape), torch.randn(9), torch.randn(9)
    affine = Affine(torch.randn(9), torch.randn(9), True)

    def there(t):
        return t.unflatten(0, (-1, lanes)).movedim(1, -1).contiguous()

    run = BACKENDS["cpu"].bind(packed, geometry, "adv", scale, bias, True, affine, isa=isa)
    results = run(there(x), there(residual))

    first = reference.sparse_conv2d(x.double(), packed.dense("adv"), geometry, scale, bias, residual, True)
    second = (first * affine.scale[:, None, None] + affine.bias[:, None, None]).relu()
    for actual, expected in zip(results, (first, second), strict=True):
        actual = actual.movedim(-1, 1).flatten(0, 1)
        assert actual.shape == shape
        torch.testing.assert_close(actual, expected.float(), rtol=1e-5, atol=1e-5)


def test_the_operator_refuses_other_lanes():
    weight = torch.randn(4, 3, 3, 3)
    packed, geometry = pack(weight, {"clean": weight > 0}, "unstructured"), Geometry.of(weight.shape)
    run = BACKENDS["cpu"].bind(packed, geometry, "clean", None, None, False)
    with pytest.raises(RuntimeError, match=rf"\(N/{LANES}, C, H, W, {LANES}\)"):
        run(torch.randn(1, 3, 8, 8, LANES + 1), None)
    with pytest.raises(RuntimeError, match="the shape of the output"):
        run(torch.randn(1, 3, 8, 8, LANES), torch.randn(LANES, 4, 6, 6))


class Zoo(nn.Module):
    """Joins, gates, pools and activations, in place and not."""

    def __init__(self):
        super().__init__()
        self.a, self.b = MaskedConv(2, 6, 3, padding=1), MaskedConv(6, 6, 1)
        self.depthwise = MaskedConv(6, 6, 3, padding=1, groups=6, density=0.9)
        self.squeeze, self.excite = MaskedConv(6, 2, 1, density=0.5), MaskedConv(2, 6, 1, density=0.5)
        self.norm, self.relu6, self.silu = nn.BatchNorm2d(6), nn.ReLU6(inplace=True), nn.SiLU(inplace=True)
        self.pool, self.average = nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1)
        self.reflect = MaskedConv(12, 4, 3, padding=1, padding_mode="reflect")
        self.up = nn.ConvTranspose2d(4, 4, 2, stride=2)
        self.last, self.fc = MaskedConv(4, 4, 3), nn.Linear(4, 3)

    def forward(self, x):
        x = self.relu6(self.norm(self.a(x)))
        gate = torch.sigmoid(self.excite(self.silu(self.squeeze(self.average(x)))))
        y = torch.cat([self.depthwise(x) * gate, self.b(x)], dim=1)
        y = self.pool(F.hardswish(y)) + F.max_pool2d(y, (2, 2), stride=2)
        y = self.up(self.reflect(y)) + 1
        return self.fc(torch.relu(self.last(y)).mean((2, 3))), y


@pytest.mark.parametrize("network", [TwoPaths, Zoo])
@pytest.mark.parametrize("batch", [LANES, 3 * LANES, 8 * LANES - 1])
def test_a_rewritten_graph_computes_the_same(network, batch):
    model = network().eval()
    x = torch.rand(batch, 1 if network is TwoPaths else 2, 10, 12)
    for backend in ("dense", "auto"):
        sparse = swap(model, x, backend=backend)
        graph = interleaved.rewrite(sparse.net)
        if backend == "dense":
            assert graph is None  # all layers would need a second copy of their weights
            continue
        sparse = swap(model, x, strict=True)
        sparse._interleaved.append(interleaved.rewrite(sparse.net))
        sparse.interleaves = True
        converted = [n.target for n in sparse._interleaved[0].graph.nodes].count(interleaved.interleave)
        assert converted == 2  # the input, and behind what cannot be interleaved
        assert max(verify(model, sparse, x).values()) < 1e-5
        lam = sparse(x, path=0.4)
        sparse.interleaves = False
        torch.testing.assert_close(lam, sparse(x, path=0.4))


def forced(model, x):
    sparse = swap(model, x, strict=True)
    sparse.interleaves = True
    return sparse


def test_networks_that_write_in_place_are_left_as_they_are():
    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = MaskedConv(1, 4, 3), MaskedConv(4, 4, 3, padding=1)

        def forward(self, x):
            y = self.a(x)
            z = self.b(y)
            y.add_(1)
            return z * y

    model, x = Writes().eval(), torch.rand(LANES, 1, 8, 8)
    sparse = swap(model, x, strict=True)
    assert interleaved.rewrite(sparse.net) is None
    sparse.choose_layout(x)
    assert not sparse.interleaves


def test_the_faster_layout_is_taken(monkeypatch):
    from smart_kernels import model as module

    times = {}

    def interleave(calls, budget_s):
        (plain, graph) = calls
        for call in calls.values():
            call()
        return {plain: [times["plain"]], graph: [times["graph"]]}

    x = torch.rand(LANES, 1, 9, 9)
    sparse = swap(TwoPaths().eval(), x, strict=True)
    monkeypatch.setattr(module, "interleave", interleave)
    times.update(plain=2.0, graph=1.0)
    sparse.choose_layout(x)
    assert sparse.interleaves
    times.update(plain=1.0, graph=2.0)
    sparse.choose_layout(x)
    assert not sparse.interleaves
    times.update(plain=2.0, graph=1.0)
    sparse.choose_layout(x[:1])
    assert not sparse.interleaves  # one image fills no vector


def test_it_follows_new_values_copies_and_moves():
    model, x = TwoPaths().eval(), torch.rand(LANES, 1, 9, 9)
    sparse = forced(model, x)
    before = sparse(x)
    assert sparse._interleaved
    keys = set(sparse.state_dict())
    assert not any(interleaved.SUFFIX in key for key in keys)
    assert copy.deepcopy(sparse)._interleaved == []
    torch.testing.assert_close(copy.deepcopy(sparse)(x), before)

    changed = {k: v * 1.5 if v.is_floating_point() else v for k, v in sparse.state_dict().items()}
    sparse.load_state_dict(changed)
    after = sparse(x)
    sparse.interleaves = False
    torch.testing.assert_close(after, sparse(x))
    assert not torch.allclose(after, before)

    sparse.interleaves = True
    moved = sparse.double()
    assert not moved.interleaves
    assert moved(x.double()).dtype == torch.float64


def test_smaller_batches_and_mixed_ones_take_the_other_graph():
    model, x = TwoPaths().eval(), torch.rand(LANES, 1, 9, 9)
    sparse = forced(model, x)
    verify(model, sparse, x[:3], 1e-5)
    choice = torch.arange(LANES) % 2
    y = sparse(x, path=choice)
    for i in range(3):
        torch.testing.assert_close(y[i : i + 1], sparse(x[i : i + 1], path=("clean", "adv")[i % 2]))


def test_its_own_weights_are_counted():
    model, x = TwoPaths().eval(), torch.rand(LANES, 1, 9, 9)
    sparse = swap(model, x, strict=True)
    sparse.interleaves = False
    plain = sparse.weight_bytes
    sparse.interleaves = True
    sparse(x)
    # The stem, which runs densely in the other graph.
    twin = sparse._interleaved[0].get_submodule("stem" + interleaved.SUFFIX)
    assert sparse.weight_bytes == plain + twin.packed.nbytes
