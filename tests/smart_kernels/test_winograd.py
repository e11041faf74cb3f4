"""Convolutions by Winograd's algorithm against the float64 reference and the direct kernels."""

import pytest
import torch
import torch.nn.functional as F
from forks import holds_in_fork, needs_fork
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import MaskedConv, TwoPaths
from programmed import LANES, forced, programs_of
from torch import nn

from smart_kernels import native, pack, reference, verify
from smart_kernels.backends import BACKENDS, Affine
from smart_kernels.geometry import Geometry

pytestmark = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))
TOLERANCE = 4e-6  # of the largest output: the transformations magnify rounding errors
ISAS = native.cpu_isas()
FASTEST = next(iter(ISAS), "")


def packed_weight(out_channels, in_channels, densities=(0.2, 0.4), dtype=torch.float32):
    weight = torch.randn(out_channels, in_channels, 3, 3).to(dtype)
    masks = {path: torch.rand(weight.shape) < d for path, d in zip(("clean", "adv"), densities, strict=True)}
    return pack(weight, masks, "unstructured")


def run(isa, x, packed, geometry, path="clean", scale=None, bias=None, residual=None, relu=False, affine=None):
    return BACKENDS["cpu"].bind(packed, geometry, path, scale, bias, relu, affine, isa=isa)(x, residual)


def relative_error(actual, expected):
    assert actual.shape == expected.shape
    assert torch.isfinite(actual).all()
    return float((actual.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


@st.composite
def problems(draw):
    weight_shape = (draw(st.integers(1, 40)), draw(st.integers(1, 40)), 3, 3)
    padding = draw(st.tuples(*[st.integers(0, 2)] * 4))
    height, width = draw(st.integers(3, 30)), draw(st.integers(3, 70))
    shape = (draw(st.sampled_from([1, 3, LANES, LANES + 1])), weight_shape[1], height, width)
    densities = draw(st.tuples(*[st.sampled_from([0.0, 0.1, 0.36, 1.0])] * 2))
    path = draw(st.sampled_from(["clean", "adv", 0.3]))
    return Geometry(weight_shape, (1, 1), padding), shape, densities, path, draw(st.integers(0, 63))


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=60)
@given(problem=problems())
def test_any_shape_matches_the_reference(isa, problem):
    geometry, shape, densities, path, epilogue = problem
    torch.manual_seed(epilogue)
    channels = geometry.weight_shape[0]
    packed = packed_weight(channels, shape[1], densities)
    x = torch.randn(shape)
    scale = torch.randn(channels) if epilogue & 1 else None
    bias = torch.randn(channels) if epilogue & 2 else None
    residual = torch.randn(geometry.output_shape(shape)) if epilogue & 4 else None
    relu = bool(epilogue & 8)
    affine = Affine(torch.randn(channels), torch.randn(channels), bool(epilogue & 32)) if epilogue & 16 else None

    y = run(f"{isa} winograd", x, packed, geometry, path, scale, bias, residual, relu, affine)

    expected = reference.sparse_conv2d(x.double(), packed.dense(path), geometry, scale, bias, residual, relu)
    if affine is not None:
        y, second = y
        normed = y.double() * affine.scale.double()[:, None, None] + affine.bias.double()[:, None, None]
        assert relative_error(second, normed.relu() if affine.relu else normed) < TOLERANCE
    assert relative_error(y, expected) < TOLERANCE


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("batch", [1, 3, 16, 17])
@pytest.mark.parametrize("size", [1, 4, 7, 24, 48, 96])
def test_every_size_of_map_writes_every_output(poisoned, isa, batch, size):
    packed, geometry = packed_weight(9, 5), Geometry.of((9, 5, 3, 3), padding=1)
    x, affine = torch.randn(batch, 5, size, size), Affine(torch.full((9,), 2.0), torch.ones(9), True)
    y, second = run(f"{isa} winograd", x, packed, geometry, "adv", affine=affine)
    expected = reference.sparse_conv2d(x.double(), packed.dense("adv"), geometry)
    assert relative_error(y, expected) < TOLERANCE
    assert relative_error(second, (2 * expected + 1).relu()) < TOLERANCE


@pytest.mark.parametrize("channels", [130, 512])
def test_errors_stay_small_over_many_channels(channels):
    packed, geometry = packed_weight(32, channels, (1.0, 1.0)), Geometry.of((32, channels, 3, 3), padding=1)
    for batch, size in ((1, 16), (LANES, 4)):
        x = torch.randn(batch, channels, size, size).relu()
        expected = reference.sparse_conv2d(x.double(), packed.dense("clean"), geometry)
        assert relative_error(run(f"{FASTEST} winograd", x, packed, geometry), expected) < TOLERANCE


def test_weights_are_transformed_in_parts_where_there_are_many():
    packed, geometry = packed_weight(300, 264), Geometry.of((300, 264, 3, 3), padding=1)
    x = torch.randn(1, 264, 8, 8)
    expected = reference.sparse_conv2d(x.double(), packed.dense("adv"), geometry)
    assert relative_error(run(f"{FASTEST} winograd", x, packed, geometry, "adv"), expected) < TOLERANCE


@pytest.mark.parametrize("isa", ISAS)
def test_bfloat16_weights_are_computed_with_as_floats(isa):
    torch.manual_seed(1)
    half = packed_weight(9, 18, dtype=torch.bfloat16)
    full = pack(half.dense("adv").float(), {"adv": half.mask("adv")}, "unstructured")
    geometry = Geometry.of((9, 18, 3, 3), padding=1)
    for batch, size in ((1, 17), (LANES, 8)):
        x = torch.randn(batch, 18, size, size).bfloat16()
        y = run(f"{isa} winograd", x, half, geometry, "adv")
        assert torch.equal(y, run(f"{isa} winograd", x.float(), full, geometry, "adv").bfloat16())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38])
@pytest.mark.parametrize("batch", [1, LANES])
def test_what_is_not_finite_stays_where_torch_has_it(isa, value, batch):
    packed, geometry = packed_weight(5, 3), Geometry.of((5, 3, 3, 3), padding=1)
    x = torch.randn(batch, 3, 11, 9)
    scale, affine = torch.rand(5) / 8, Affine(torch.ones(5), torch.ones(5), True)
    for place in ((0, 0, 0, 0), (batch - 1, 2, 5, 4), (0, 1, 10, 8)):
        spoilt = x.clone()
        spoilt[place] = value
        ours, direct = (
            run(f"{isa} {way}", spoilt, packed, geometry, scale=scale, affine=affine) for way in ("winograd", "direct")
        )
        for y, expected in zip(ours, direct, strict=True):
            torch.testing.assert_close(y, expected, equal_nan=True, rtol=1e-5, atol=1e-5)
        assert int((~ours[0].isfinite()).sum()) <= 5 * 9
        assert torch.isfinite(run(f"{isa} winograd", x, packed, geometry)).all()


def test_the_answer_does_not_depend_on_the_number_of_threads():
    packed, geometry = packed_weight(40, 24), Geometry.of((40, 24, 3, 3), padding=1)
    before, results = torch.get_num_threads(), []
    x = torch.randn(LANES + 3, 24, 25, 33)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append([run(f"{FASTEST} winograd", each, packed, geometry) for each in (x, x[:1])])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(y, expected) for y, expected in zip(other, results[0], strict=True))


@needs_fork
def test_a_forked_process_goes_on():
    packed, geometry = packed_weight(24, 16), Geometry.of((24, 16, 3, 3), padding=1)
    small, large = torch.randn(1, 16, 20, 20), torch.randn(1, 16, 60, 60)

    def compute(x):
        return run(f"{FASTEST} winograd", x, packed, geometry)

    def check(expected):
        return torch.equal(compute(small), expected) and bool(compute(large).isfinite().all())

    assert holds_in_fork(check, prepare=lambda: compute(small))


@pytest.mark.skipif(FASTEST != "avx512", reason="what the cost model was measured for")
@pytest.mark.parametrize(
    ("channels", "size", "batch", "density", "way"),
    [
        (32, 96, 1, 1.0, "winograd"),
        (64, 48, 1, 0.36, "winograd"),
        (256, 8, 16, 1.0, "winograd"),
        (64, 48, 1, 0.05, "direct"),
        (512, 4, 1, 1.0, "direct"),
        (512, 4, 16, 0.2, "direct"),
    ],
)
def test_layers_run_in_the_way_that_is_faster(channels, size, batch, density, way):
    packed = packed_weight(channels, channels, (density, density))
    x, geometry = torch.randn(batch, channels, size, size), Geometry.of((channels, channels, 3, 3), padding=1)
    y = run(FASTEST, x, packed, geometry)
    ways = {each: torch.equal(y, run(f"{FASTEST} {each}", x, packed, geometry)) for each in ("winograd", "direct")}
    assert ways == {"winograd": way == "winograd", "direct": way == "direct"}


class Wide(nn.Module):
    """Layers that programs run by Winograd's algorithm, with residuals and a function, beside one that they cannot."""

    def __init__(self):
        super().__init__()
        self.a, self.b = MaskedConv(2, 16, 3, padding=1), MaskedConv(16, 16, 3, padding=1)
        self.c, self.d = MaskedConv(16, 24, 3, 2, padding=1), MaskedConv(24, 24, 3, padding=2)

    def forward(self, x):
        x = F.silu(self.a(x))
        x = torch.relu(self.b(x) + x)
        return self.d(self.c(x))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("batch", [1, 3, LANES, LANES + 1])
@pytest.mark.parametrize("network", [TwoPaths, Wide])
def test_programs_run_it(poisoned, isa, batch, network):
    model, x = network().eval(), torch.rand(batch, 1 if network is TwoPaths else 2, 26, 33)
    sparse = forced(model, x)
    found = programs_of(sparse, x)
    assert found
    results = {}
    for way in ("winograd", "direct"):
        for program in found:
            program.isa = f"{isa} {way}"
            program._handles.clear()
        assert max(verify(model, sparse, x).values()) < 1e-5
        results[way] = sparse(x, path=0.4)
        spoilt = x.clone()
        spoilt[0, 0, 5, 5] = float("nan")
        results[f"{way} of NaN"] = sparse(spoilt, path=0.4).isnan()
    if network is Wide:  # whose outputs no average makes equal
        assert not torch.equal(results["winograd"], results["direct"])
    torch.testing.assert_close(results["winograd"], results["direct"], rtol=1e-4, atol=1e-5)
    assert torch.equal(results["winograd of NaN"], results["direct of NaN"])
