"""Depthwise convolutions on the CPU kernels, alone and within programs, against the float64 reference."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from networks import MaskedConv
from torch import nn

from smart_kernels import native, pack, paths, programs, reference, swap
from smart_kernels.backends import BACKENDS, Affine
from smart_kernels.geometry import Geometry

pytestmark = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))
TOLERANCE = 2e-6  # of the largest output
ISAS = native.cpu_isas()


def relative_error(actual, expected):
    assert torch.isfinite(actual).all()
    return float((actual.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


@st.composite
def geometries(draw):
    """Of 2 to 20 channels, and the size of a map that they fit."""
    channels, multiplier = draw(st.integers(2, 20)), draw(st.sampled_from([1, 1, 2, 3]))
    kernel = [draw(st.sampled_from([1, 2, 3, 3, 5, 7])) for _ in range(2)]
    same = draw(st.booleans())
    stride = (1, 1) if same else (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    dilation = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    padding = draw(st.tuples(*[st.integers(0, 4)] * 4))
    if same:
        padding = (reach[0] // 2, reach[0] - reach[0] // 2, reach[1] // 2, reach[1] - reach[1] // 2)
    size = draw(st.integers(1, 20)), draw(st.integers(1, 40))
    assume(size[0] + sum(padding[:2]) > reach[0])
    assume(size[1] + sum(padding[2:]) > reach[1])
    return Geometry((channels * multiplier, 1, *kernel), stride, padding, dilation, channels), size


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=100)
@given(data=st.data())
def test_any_geometry_matches_the_reference(isa, data):
    geometry, size = data.draw(geometries())
    batch, epilogue = data.draw(st.sampled_from([1, 1, 3, 16, 17])), data.draw(st.integers(0, 31))
    torch.manual_seed(epilogue)
    weight, (k, _, _, _) = torch.randn(geometry.weight_shape), geometry.weight_shape
    densities = data.draw(st.tuples(*[st.sampled_from([0.0, 0.2, 1.0])] * 2))
    masks = {p: torch.rand_like(weight) < d for p, d in zip(paths.PATHS, densities, strict=True)}
    packed, path = pack(weight, masks, "unstructured"), data.draw(st.sampled_from([*paths.PATHS, 0.3]))
    x = torch.randn(batch, geometry.groups, *size)
    scale, bias = (torch.randn(k) if epilogue & bit else None for bit in (1, 2))
    residual = torch.randn(geometry.output_shape(x.shape)) if epilogue & 4 else None
    affine, relu = (Affine(torch.randn(k), torch.randn(k), True) if epilogue & 16 else None), bool(epilogue & 8)

    y = BACKENDS["cpu"].bind(packed, geometry, path, scale, bias, relu, affine, isa=isa)(x, residual)

    if affine is not None:
        y, second = y
        normed = y.double() * affine.scale.double()[:, None, None] + affine.bias.double()[:, None, None]
        assert relative_error(second, normed.relu()) < TOLERANCE
    expected = reference.sparse_conv2d(x.double(), packed.dense(path), geometry, scale, bias, residual, relu)
    assert relative_error(y, expected) < TOLERANCE


def in_program(isa, geometry, size, batch, act):
    """A depthwise layer between two of one tap, and a function, as one program: its result and the float64 one."""
    (k, _, *kernel), c = geometry.weight_shape, geometry.groups
    padding = geometry.padding
    middle = MaskedConv(c, k, kernel, geometry.stride, 0, geometry.dilation, c, density=0.5)
    if (padding[0], padding[2]) == (padding[1], padding[3]):
        middle.padding = (padding[0], padding[2])
    else:
        middle.padding = (0, 0)
        assume(size[0] > geometry.dilation[0] * (kernel[0] - 1))
        assume(size[1] > geometry.dilation[1] * (kernel[1] - 1))
    model = nn.Sequential(MaskedConv(3, c, 1, density=1.0), middle, act, MaskedConv(k, 4, 1, density=1.0)).eval()
    x = torch.randn(batch, 3, *size)
    sparse = swap(model, x, backend="cpu", measure=False)
    sparse.runs_programs = True
    (program,) = [m for m in sparse._graph_for(sparse.net, x).modules() if isinstance(m, programs.Program)]
    assert len(program.steps) == 4
    program.isa = isa
    with paths.running("adv"), torch.no_grad():
        return sparse(x, path="adv"), model.double()(x.double())


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=60)
@given(data=st.data())
def test_within_programs_of_either_layout(isa, data):
    geometry, size = data.draw(geometries())
    torch.manual_seed(data.draw(st.integers(0, 9)))
    act = data.draw(st.sampled_from([nn.ReLU6(), nn.SiLU(), nn.Hardswish()]))
    y, expected = in_program(isa, geometry, size, data.draw(st.sampled_from([1, 3, 16, 17])), act)
    assert relative_error(y, expected) < 1e-5


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(1, 1), (4, 4), (7, 7), (8, 8), (12, 12), (33, 17), (56, 40)], ids=str)
def test_every_output_is_written_and_all_that_lies_beside_the_image_is_zero(poisoned, isa, size, stride):
    weight, batch = torch.rand(5, 1, 5, 5) + 0.5, 3
    packed = pack(weight, {"clean": torch.ones_like(weight, dtype=torch.bool)}, "unstructured")
    geometry = Geometry.of(weight.shape, stride, 2, groups=5)
    # Neighbours in memory, before and after the images and between them, would be seen.
    around = torch.full((batch + 2, 5, *size), float("nan"))
    x = around[1:-1]
    x[:] = torch.rand_like(x)
    x[1] = float("inf")
    y = BACKENDS["cpu"].bind(packed, geometry, "clean", None, None, False, None, isa=isa)(x, None)
    assert torch.isinf(y[1]).all()
    expected = reference.sparse_conv2d(x[::2].double(), packed.dense("clean"), geometry)
    assert relative_error(y[::2], expected) < TOLERANCE


def test_kernels_too_large_for_tables_of_lanes_run_as_ever():
    weight = torch.randn(2, 1, 90, 90)
    packed = pack(weight, {"clean": torch.rand_like(weight) < 0.01}, "unstructured")
    geometry, x = Geometry.of(weight.shape, padding=45, groups=2), torch.randn(1, 2, 60, 60)
    y = BACKENDS["cpu"].bind(packed, geometry, "clean", None, None, False)(x, None)
    assert relative_error(y, reference.sparse_conv2d(x.double(), packed.dense("clean"), geometry)) < TOLERANCE


def test_threads_agree():
    weight, before = torch.randn(64, 1, 3, 3), torch.get_num_threads()
    packed = pack(weight, {"clean": torch.rand_like(weight) < 0.5}, "unstructured")
    run = BACKENDS["cpu"].bind(packed, Geometry.of(weight.shape, padding=1, groups=64), "clean", None, None, False)
    x, results = torch.randn(3, 64, 30, 30), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(x, None))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
