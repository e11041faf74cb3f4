"""Every backend and instruction set against the float64 reference."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from smart_kernels import native, pack, reference, sparse_conv2d
from smart_kernels.backends import BACKENDS, Affine
from smart_kernels.geometry import Geometry

TOLERANCE = 2e-6  # of the largest output: some thousand products summed in float32
ISAS = native.cpu_isas()
needs_library = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))


def run(runner, x, packed, geometry, path, scale=None, bias=None, residual=None, relu=False, affine=None):
    if runner in BACKENDS:
        return BACKENDS[runner].bind(packed, geometry, path, scale, bias, relu, affine)(x, residual)
    return BACKENDS["cpu"].bind(packed, geometry, path, scale, bias, relu, affine, isa=runner)(x, residual)


def packed_for(runner, weight, masks):
    return pack(weight, masks, BACKENDS[runner].format if runner in BACKENDS else "unstructured")


def relative_error(actual, expected):
    assert torch.isfinite(actual).all()
    return float((actual.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-30)) if len(actual) else 0


@st.composite
def problems(draw):
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    in_channels = groups * draw(st.integers(1, 23))
    out_channels = groups * draw(st.integers(1, 19))
    if draw(st.integers(0, 9)) == 0:
        groups = in_channels = out_channels = draw(st.integers(1, 9))  # depthwise
    kernel = [draw(st.sampled_from([1, 3, 3, 5, 7])), draw(st.sampled_from([1, 2, 3, 3, 5, 7]))]
    stride = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    padding = draw(st.tuples(*[st.integers(0, 3)] * 4))
    dilation = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    geometry = Geometry((out_channels, in_channels // groups, *kernel), stride, padding, dilation, groups)
    height, width = draw(st.integers(1, 20)), draw(st.integers(1, 35))
    top, bottom, left, right = padding
    assume(height + top + bottom >= dilation[0] * (kernel[0] - 1) + 1)
    assume(width + left + right >= dilation[1] * (kernel[1] - 1) + 1)
    shape = (draw(st.integers(1, 33)), in_channels, height, width)
    densities = draw(st.tuples(*[st.sampled_from([0.0, 0.02, 0.2, 0.5, 1.0])] * 2))
    return geometry, shape, densities, draw(st.sampled_from(["clean", "adv", 0.3])), draw(st.integers(0, 63))


@pytest.mark.parametrize("runner", ["dense", "channels", *ISAS])
@settings(max_examples=120)
@given(problem=problems())
def test_any_geometry_matches_the_reference(runner, problem):
    geometry, shape, densities, path, epilogue = problem
    assume(runner != "channels" or geometry.groups == 1)
    torch.manual_seed(epilogue)
    weight = torch.randn(geometry.weight_shape)
    masks = {p: torch.rand_like(weight) < d for p, d in zip(("clean", "adv"), densities, strict=True)}
    if runner == "channels":
        for mask in masks.values():
            mask[torch.rand(len(mask)) < 0.5] = False
            mask[:, torch.rand(mask.shape[1]) < 0.5] = False
    packed = packed_for(runner, weight, masks)
    x = torch.randn(shape)
    channels = geometry.weight_shape[0]
    scale = torch.randn(channels) if epilogue & 1 else None
    bias = torch.randn(channels) if epilogue & 2 else None
    residual = torch.randn(geometry.output_shape(shape)) if epilogue & 4 else None
    relu = bool(epilogue & 8)
    affine = Affine(torch.randn(channels), torch.randn(channels), bool(epilogue & 32)) if epilogue & 16 else None

    y = run(runner, x, packed, geometry, path, scale, bias, residual, relu, affine)

    if affine is not None:
        y, second = y
        expected = y.double() * affine.scale.double()[:, None, None] + affine.bias.double()[:, None, None]
        expected = expected.relu() if affine.relu else expected
        assert second.shape == y.shape
        assert relative_error(second, expected) < TOLERANCE
    expected = reference.sparse_conv2d(x.double(), packed.dense(path), geometry, scale, bias, residual, relu)
    assert y.shape == expected.shape
    assert relative_error(y, expected) < TOLERANCE


@pytest.mark.parametrize("runner", ["dense", "channels", *ISAS])
@pytest.mark.parametrize("batch", [1, 3, 15, 16, 17, 33])
@pytest.mark.parametrize("size", [1, 2, 4, 7, 8, 16, 32, 33])
def test_every_layout_of_batch_and_map_writes_every_output(poisoned, runner, batch, size):
    weight = torch.randn(9, 18, 3, 3)
    masks = {"clean": torch.rand_like(weight) < 0.2, "adv": torch.rand_like(weight) < 0.2}
    packed = packed_for(runner, weight, masks)
    geometry, x = Geometry.of(weight.shape, padding=1), torch.randn(batch, 18, size, size)
    affine = Affine(torch.full((9,), 2.0), torch.ones(9), True)
    y, second = run(runner, x, packed, geometry, "adv", affine=affine)
    expected = reference.sparse_conv2d(x.double(), packed.dense("adv"), geometry)
    assert relative_error(y, expected) < TOLERANCE
    assert relative_error(second, (2 * expected + 1).relu()) < TOLERANCE


def view_of(kind, x):
    if kind == "channels_last":
        return x.to(memory_format=torch.channels_last)
    if kind == "strided":
        return torch.stack([x, x + 1], dim=-1)[..., 0]
    if kind == "transposed":
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    return x.expand(4, -1, -1, -1) if kind == "expanded" else torch.cat([x, x])[1:3]


@pytest.mark.parametrize("kind", ["channels_last", "strided", "transposed", "expanded", "offset"])
@pytest.mark.parametrize("format", ["dense", "channel", "unstructured"])
def test_inputs_of_any_strides(kind, format):
    weight = torch.randn(6, 5, 3, 3)
    packed = pack(weight, {"clean": torch.rand_like(weight) < 0.3}, format)
    x = view_of(kind, torch.randn(1 if kind == "expanded" else 3, 5, 9, 10))
    residual = view_of("channels_last", torch.randn(len(x), 6, 9, 10))
    y = sparse_conv2d(x, packed, padding=1, residual=residual)
    geometry = Geometry.of(weight.shape, padding=1)
    expected = reference.sparse_conv2d(x.double(), packed.dense("clean"), geometry, residual=residual)
    assert relative_error(y, expected) < TOLERANCE


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", [(9, 18, 3, 3), (7, 40, 1, 1), (5, 3, 17, 16)], ids=str)  # the last has wide codes
def test_bfloat16_weights_are_computed_with_as_floats(isa, shape):
    weight = torch.randn(shape).bfloat16()
    masks = {"clean": torch.rand(shape) < 0.2, "adv": torch.rand(shape) < 0.2}
    half, full = (pack(each, masks, "unstructured") for each in (weight, weight.float()))
    geometry, scale, bias = Geometry.of(shape, padding=1), torch.randn(shape[0]), torch.randn(shape[0])
    affine = Affine(torch.randn(shape[0]), torch.randn(shape[0]), True)
    for batch, size in ((1, 17), (1, 16), (17, 17)):
        x = torch.randn(batch, shape[1], size, size).bfloat16()
        ours = run(isa, x, half, geometry, "adv", scale, bias, None, True, affine)
        truth = run(isa, x.float(), full, geometry, "adv", scale, bias, None, True, affine)
        assert all(torch.equal(y, expected.bfloat16()) for y, expected in zip(ours, truth, strict=True))


@needs_library
def test_the_answer_does_not_depend_on_the_number_of_threads():
    weight = torch.randn(64, 40, 3, 3)
    packed = pack(weight, {"clean": torch.rand_like(weight) < 0.2}, "unstructured")
    x, before = torch.randn(20, 40, 17, 17), torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(sparse_conv2d(x, packed, padding=1))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("format", ["dense", "channel", "unstructured"])
def test_nan_and_infinity_reach_the_output_as_in_torch(format):
    packed = pack(torch.ones(1, 1, 1, 1), {"clean": torch.ones(1, 1, 1, 1, dtype=torch.bool)}, format)
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), -1.0]).reshape(1, 1, 1, 4)
    y = sparse_conv2d(x, packed, relu=True).flatten()
    assert torch.isnan(y[0])
    assert y[1:].tolist() == [float("inf"), 0.0, 0.0]


@pytest.mark.parametrize("format", ["dense", "channel", "unstructured"])
def test_an_empty_batch_gives_an_empty_output(format):
    weight = torch.randn(4, 3, 3, 3)
    packed = pack(weight, {"clean": weight > 0}, format)
    assert sparse_conv2d(torch.randn(0, 3, 8, 8), packed).shape == (0, 4, 6, 6)


@pytest.mark.parametrize("relu", [False, True])
def test_dense_one_pixel_images_are_a_matrix_product(monkeypatch, relu):
    weight, x, residual = torch.randn(6, 9, 1, 1), torch.randn(5, 9, 1, 1), torch.randn(5, 6, 1, 1)
    masks = {"clean": torch.rand(6, 9, 1, 1) < 0.5}
    packed, geometry = packed_for("dense", weight, masks), Geometry.of((6, 9, 1, 1))
    scale, bias = torch.randn(2, 6)
    expected = reference.sparse_conv2d(x.double(), packed.dense("clean"), geometry, scale, bias, residual, relu)
    monkeypatch.delattr(torch.nn.functional, "conv2d")  # three times slower
    actual = run("dense", x, packed, geometry, "clean", scale, bias, residual, relu)
    assert relative_error(actual, expected) < TOLERANCE


@needs_library
def test_memory_given_to_another_weight_brings_no_plan_along():
    geometry, x, weight = Geometry.of((32, 32, 3, 3), padding=1), torch.randn(2, 32, 32, 32), torch.randn(32, 32, 3, 3)
    full, thin = (packed_for("cpu", weight, {"clean": torch.rand_like(weight) < density}) for density in (0.9, 0.02))

    def convolve(packed, segments):
        layer = (packed.path_values("clean"), packed.codes, segments, geometry.numbers, packed.slab_channels)
        end = (*packed.segment_range("clean"), None, None, None, False)
        return torch.ops.smart_kernels.sparse_conv2d_cpu(x, *layer, *end)

    expected, memory = convolve(thin, thin.segments), torch.empty_like(full.segments)
    convolve(full, memory.copy_(full.segments))  # by Winograd's algorithm, where the other runs directly
    assert torch.equal(convolve(thin, memory.copy_(thin.segments)), expected)
