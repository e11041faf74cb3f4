"""Networks that a swap could get wrong: each is swapped rightly, reported, or refused in one sentence."""

import pytest
import torch
import torch.nn.functional as F
from networks import MaskedConv, TwoPaths, sparsify, why
from torch import nn

from smart_kernels import native, swap, verify
from smart_kernels.modules import SparseConv2d, SparseLinear


@pytest.fixture
def images():
    return torch.rand(3, 2, 9, 9)


def test_no_zeros_is_a_report_not_an_error(images):
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(196, 2)).eval()
    sparse = swap(model, images)
    assert [(row["backend"], row["why"]) for row in sparse.report()] == [("dense", "no path has zeros to skip")]
    verify(model, sparse, images)


def test_linear_layers_with_zeros_are_swapped(images):
    model = sparsify(nn.Sequential(nn.Flatten(), nn.Linear(162, 64), nn.ReLU(), nn.Dropout(), nn.Linear(64, 5)))
    sparse = swap(model, images, strict=native.missing() is None)
    assert [row["name"] for row in sparse.report()] == ["1", "4"]
    layers = [m for m in sparse.modules() if isinstance(m, SparseLinear)]
    assert [layer.relu for layer in layers] == [True, False]
    assert max(verify(model, sparse, images).values()) < 1e-5
    verify(model, sparse, torch.rand(17, 2, 9, 9), 1e-5)


class Attention(nn.Module):
    """Linear layers on (N, tokens, features), and one module that reaches into another's weight."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 8, 3)
        self.query = nn.Linear(8, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        tokens = self.conv(x).flatten(2).transpose(1, 2)
        return self.attention(self.query(tokens), tokens, tokens, need_weights=False)[0]


def test_linear_layers_take_any_leading_dimensions(images):
    model = sparsify(Attention())
    sparse = swap(model, images)
    assert {"conv", "query"} <= {row["name"] for row in sparse.report()}
    assert max(verify(model, sparse, images).values()) < 1e-5


class ReachesIn(nn.Module):
    """Cannot be captured, and uses one layer's weight by itself."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3)

    def forward(self, x):
        if x.sum() > -1e9:
            x = self.a(x)
        return F.conv2d(x, self.b.weight) + self.b(x) * 0


def test_a_layer_that_others_reach_into_is_left_alone(images):
    model = sparsify(ReachesIn())
    sparse = swap(model, images)
    assert sparse.uncaptured
    assert {row["name"]: row["backend"] == "original" for row in sparse.report()} == {"a": False, "b": True}
    assert "reaches into it" in why(sparse, "b")
    assert max(verify(model, sparse, images).values()) < 1e-5


def test_hooks_inside_the_network_keep_running(images):
    model, seen = sparsify(nn.Sequential(nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU()), nn.Conv2d(4, 2, 3))), []
    model[0].register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    sparse = swap(model, images)
    seen.clear()
    sparse(images)
    assert seen == [(3, 4, 7, 7)]
    assert "0 has forward hooks, which would not run in a graph" in sparse.uncaptured
    verify(model, sparse, images, 1e-5)


@pytest.mark.parametrize("place", [1, 2], ids=["norm", "relu"])
def test_layers_with_hooks_are_not_fused_away(images, place):
    model, seen = sparsify(nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU())), []
    model[place].register_forward_hook(lambda module, inputs, output: seen.append(1))
    sparse = swap(model, images)
    assert sparse.uncaptured is None
    seen.clear()
    sparse(images)
    assert seen == [1]
    verify(model, sparse, images, 1e-5)


def test_other_kinds_of_convolution_are_left_and_said_so(images):
    class Scaled(nn.Conv2d):
        def forward(self, x):
            return super().forward(x) * 2

    model = sparsify(nn.Sequential(nn.Conv2d(2, 4, 3), nn.ConvTranspose2d(4, 4, 2), Scaled(4, 2, 3)))
    sparse = swap(model, images)
    assert [row["backend"] == "original" for row in sorted(sparse.report(), key=lambda row: row["name"])] == [
        False, True, True,
    ]  # fmt: skip
    assert "not for this ConvTranspose2d" in why(sparse, "1")
    assert "not for this Scaled" in why(sparse, "2")
    verify(model, sparse, images, 1e-5)


def quantized(images):
    torch.backends.quantized.engine = "fbgemm"
    model = nn.Sequential(torch.ao.quantization.QuantStub(), nn.Conv2d(2, 4, 3), torch.ao.quantization.DeQuantStub())
    model.eval().qconfig = torch.ao.quantization.default_qconfig
    prepared = torch.ao.quantization.prepare(model)
    prepared(images)
    return torch.ao.quantization.convert(prepared)


@pytest.mark.filterwarnings("ignore")
def test_quantized_layers_are_left_alone_or_refused(images):
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.skip("this torch has no fbgemm engine")
    model = quantized(images)
    with pytest.raises(ValueError, match="quantized: swap the floating-point network it was made from"):
        swap(model, images)
    both = nn.Sequential(model, sparsify(nn.Conv2d(4, 2, 3)))
    sparse = swap(both, images)
    assert why(sparse, "0.1") == "left as it was: it is quantized"
    verify(both, sparse, images)


def test_weights_of_a_tensor_subclass_are_left_alone(images):
    class Odd(nn.Parameter):
        pass

    model = sparsify(nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 2, 3)))
    model[1].weight = Odd(model[1].weight.detach())
    sparse = swap(model, images)
    assert {row["name"]: row["backend"] == "original" for row in sparse.report()} == {"0": False, "1": True}
    verify(model, sparse, images, 1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number_is_refused_by_its_layers_name(images, value):
    model = sparsify(nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 2, 3)))
    with torch.no_grad():
        model[1].weight[0, 0, 0, 0] = value
    with pytest.raises(ValueError, match="1 cannot be packed: the weight holds NaN or infinity"):
        swap(model, images)


def test_a_network_without_weights_on_this_device_is_refused(images):
    with torch.device("meta"):
        model = TwoPaths()
    with pytest.raises(ValueError, match="meta device"):
        swap(model, images)
    with pytest.raises(ValueError, match="lazy layers"):
        swap(nn.Sequential(nn.LazyConv2d(4, 3)), images)
    with pytest.raises(TypeError, match=r"swapped already: sparse\.replan"):
        swap(swap(sparsify(nn.Sequential(nn.Conv2d(2, 4, 3))), images), images)


def test_outputs_that_are_no_numbers_are_compared_as_such(images):
    class Overflows(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(2, 4, 3)

        def forward(self, x):
            y = self.conv(x)
            return torch.cat([y, y.abs() / 0, y * float("nan")])

    model = sparsify(Overflows())
    sparse = swap(model, images)
    assert sparse.uncaptured is None
    assert max(verify(model, sparse, images).values()) < 1e-5


def test_memory_formats_and_empty_batches(images):
    model = sparsify(nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3)))
    model.to(memory_format=torch.channels_last)
    x = images.to(memory_format=torch.channels_last)
    sparse = swap(model, x)
    verify(model, sparse, x, 1e-5)
    verify(model, sparse, images, 1e-5)
    assert sparse(x[:0]).shape == (0, 2, 5, 5)


def test_an_example_of_no_images_is_planned_without_measuring(images):
    model = sparsify(nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 2, 3)))
    sparse = swap(model, images[:0])
    verify(model, sparse, images, 1e-5)
    assert all(row["dense_us"] is None for row in sparse.report())


class Siamese(nn.Module):
    def __init__(self):
        super().__init__()
        self.tower = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3))

    def forward(self, x):
        return self.tower(x) - self.tower(x.flip(3))


def test_a_tower_used_twice_stays_shared(images):
    model = sparsify(Siamese())
    model.tower[1].running_mean.normal_()
    sparse = swap(model, images)
    assert max(verify(model, sparse, images).values()) < 1e-5
    packed = [m.packed for m in sparse.modules() if isinstance(m, SparseConv2d)]
    assert len(packed) == 4
    assert len({id(p) for p in packed}) == 2


class PreActivations(nn.Module):
    """Ways of reading a sum and its norm that must not be taken for each other."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.conv, self.last = MaskedConv(2, 4, 3, padding=1), MaskedConv(4, 4, 3, padding=1)
        self.norm, self.other = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        for norm in (self.norm, self.other):
            norm.running_mean.normal_()
            norm.weight.data.uniform_(0.5, 2)

    def forward(self, x):
        y = self.conv(x)
        if self.kind == "norm and relu":
            return y + self.last(F.relu(self.norm(y)))
        if self.kind == "norm alone":
            z = self.norm(y)
            return y + self.last(F.relu(z)) + z
        if self.kind == "two norms":
            return y + self.last(F.relu(self.norm(y))) + self.other(y)
        if self.kind == "written in place between":
            z = y * 1
            y.add_(1)
            return self.norm(y) + z
        if self.kind == "written in place after":
            z = F.relu(self.norm(y))
            y.add_(1)
            return y + z
        if self.kind == "after a relu":
            y = torch.relu(y)
            return y + F.relu(self.norm(y))
        z = self.norm(y).relu_()
        return z * 2 + self.last(y)


KINDS = [
    "norm and relu", "norm alone", "two norms", "written in place between", "written in place after", "after a relu",
    "in place",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_norms_beside_other_readers_stay_right(images, kind):
    model = PreActivations(kind).eval()
    for strict in {False, native.missing() is None}:
        sparse = swap(model, images, strict=strict)
        assert sparse.uncaptured is None
        assert max(verify(model, sparse, images).values()) < 1e-5
        second = [m.second for m in sparse.modules() if isinstance(m, SparseConv2d)]
        assert any(second) == (kind != "written in place between")
    for lam in (0.25, 0.5):
        with torch.no_grad():
            from smart_kernels import paths

            with paths.running(lam):
                expected = model(images)
            torch.testing.assert_close(sparse(images, path=lam), expected)
