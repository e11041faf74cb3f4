"""The Gluon kernel for Hopper against the float64 reference, run by a model of what it is written in.

In this folder because what adds split sums up is a Triton kernel, and because the operator takes CPU tensors here.
"""

import dataclasses

import pytest
import torch
from blocks import TOLERANCE, block_problem, check, epilogue, relative_error
from gluon_model import Model, ModelError
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from smart_kernels import reference, tma_ops
from smart_kernels.backends import BACKENDS, schedules
from smart_kernels.backends.schedules import Schedule
from smart_kernels.geometry import Geometry
from smart_kernels.kernels import block, block_tma
from smart_kernels.packing import BlockWeight
from smart_kernels.paths import Samples

TRITON = BACKENDS["triton"]
SCHEDULE = Schedule(pixels=32, channels=32, warps=4, stages=3, splits=1, tma=True)


def model(eager=False, edits=()):
    return Model(block_tma, "convolve", {"finish": block.finish.fn}, eager, edits)


@pytest.fixture(autouse=True)
def modelled(monkeypatch):
    monkeypatch.setattr(block_tma, "convolve", model())
    return monkeypatch


@st.composite
def problems(draw):
    block = draw(st.sampled_from([(64, 16), (64, 32), (64, 64), (128, 16)]))
    groups = draw(st.sampled_from([1, 1, 1, 2]))
    out = draw(st.sampled_from([50, 64, 120, 128, 192])) if groups == 1 else groups * 128
    stride = draw(st.sampled_from([(1, 1), (1, 1), (2, 2), (1, 2), (3, 1)]))
    tails = groups == stride[1] == 1
    inner = draw(st.sampled_from([8, 24, 40, 64] if tails else [block[1], 64]))
    kernel = draw(st.sampled_from([(1, 1), (3, 3), (3, 3), (2, 3), (5, 1), (7, 7)]))
    dilation, padding = draw(st.tuples(*[st.integers(1, 3)] * 2)), draw(st.tuples(*[st.integers(0, 3)] * 4))
    geometry = Geometry((out, inner, *kernel), stride, padding, dilation, groups)
    size = []
    for i in (0, 1):
        reach = dilation[i] * (kernel[i] - 1) + 1 - padding[2 * i] - padding[2 * i + 1]
        size.append(-(-max(reach, 1) // stride[i]) * stride[i] + stride[i] * draw(st.integers(0, 4 // stride[i])))
    shape = (draw(st.integers(1, 3)), inner * groups, *size)
    densities = draw(st.tuples(*[st.sampled_from([0.0, 0.1, 0.4, 1.0])] * 2))
    numbers = {"pixels": [16, 32, 128], "channels": [16, 32, 64], "stages": [2, 3, 4], "splits": [1, 2]}
    schedule = dataclasses.replace(SCHEDULE, **{name: draw(st.sampled_from(each)) for name, each in numbers.items()})
    dtype = draw(st.sampled_from(tma_ops.DTYPES))
    return geometry, shape, block, densities, schedule, dtype, draw(st.integers(0, 63))


@settings(max_examples=15)
@given(problem=problems(), path=st.sampled_from(["clean", "adv", 0.3]), eager=st.booleans())
def test_any_problem_matches_the_reference(problem, path, eager):
    geometry, shape, block, densities, schedule, dtype, bits = problem
    torch.manual_seed(bits)
    packed = BlockWeight(*block_problem(geometry.weight_shape, block, densities, dtype))
    assume(tma_ops.covers(geometry, packed.values, packed.rows_per_tile, shape[2:]))
    block_tma.convolve.eager = eager
    scale, bias, residual, relu, affine = epilogue(bits, geometry, shape, dtype)
    x = torch.randn(shape).to(dtype)
    # A pixel that no other may read: a box that lets one through shows, also where the weight there is zero.
    x[-1, :, -1, -1] = float("nan")
    torch.use_deterministic_algorithms(True)  # fills outputs with NaN before they are written
    y = TRITON.bind(packed, geometry, path, scale, bias, relu, affine, schedule)(x, residual)
    expected = reference.sparse_conv2d(x.double(), packed.dense(path), geometry, scale, bias, residual, relu)
    check(y, expected, affine, dtype)


def run(schedule=SCHEDULE, geometry=None, x=None):
    """The error of a layer with two tiles of channels, whose lists fill all stages twice and end within a step.

    What the rest of such a step may not use is there: a pixel that the first code reads.
    """
    torch.manual_seed(0)
    geometry = geometry or Geometry((128, 32, 3, 3), padding=(1, 1, 1, 1))
    weight, masks = block_problem(geometry.weight_shape, (64, 16), (0.2, 1.0), torch.float16)
    masks["adv"][:, :, 0, 0] = masks["adv"][:, 16:, 0, 1] = False
    packed = BlockWeight(weight, masks)
    assert packed.items_per_tile("adv") == 15 > 2 * SCHEDULE.stages * SCHEDULE.channels // 16
    if x is None:
        x = torch.randn(3, 32, 6, 6).half()
        x[0, :, 1, 1] = float("nan")
    y = TRITON.bind(packed, geometry, "adv", None, None, False, None, schedule)(x, None)
    return relative_error(y, reference.sparse_conv2d(x.double(), packed.dense("adv"), geometry))


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize(
    ("stride", "padding", "dilation"), [(1, 1, 1), (2, 1, 1), (1, 2, 2), (2, 3, 2), (3, 2, 1), ((1, 2), (2, 0), 1)]
)
def test_strides_paddings_and_dilations(modelled, stride, padding, dilation, eager):
    modelled.setattr(block_tma, "convolve", model(eager))
    assert run(geometry=Geometry.of((128, 32, 3, 3), stride, padding, dilation)) < TOLERANCE[torch.float16]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("mbarrier.wait(barriers.index(stage), step // STAGES & 1)", "pass"),
        ("step // STAGES & 1)", "(step // STAGES & 1) ^ 1)"),
        ("step // STAGES & 1)", "0)"),
        ("num_outstanding=STEP", "num_outstanding=STEP + 1"),
        ("num_outstanding=0", "num_outstanding=1"),
        ("gl.static_range(STAGES - 1)", "gl.static_range(STAGES - 2)"),
        ("step + STAGES - 1, run", "step + STAGES, run"),
        ("stage = step % STAGES\n    first", "stage = (step + 1) % STAGES\n    first"),
        ("STEP * (BLOCK_M + BLOCK_N)", "STEP * BLOCK_N"),
        ("STEP * (BLOCK_M + BLOCK_N)", "(STEP + 1) * (BLOCK_M + BLOCK_N)"),
        ("BYTES, pred=there", "BYTES"),
        ("barriers.index(stage), inputs.index(stage * STEP + j)", "barriers.index(stage), inputs.index(stage * STEP)"),
        ("count=1", "count=2"),
        ("mbarrier.invalidate(barriers.index(i))", "pass"),
        ("gl.where(listed, first_image, -x_desc.block_shape[0])", "first_image"),
        ("[first * BLOCK_M, 0]", "[step * STEP * BLOCK_M, 0]"),
        ("slice(j * BLOCK_M, BLOCK_M)", "slice(0, BLOCK_M)"),
        ("first_p - lift_h", "first_p"),
        ("h % STRIDE_H, left", "0, left"),
        ("w % STRIDE_W * in_channels", "0"),
        ("+ shift_w", ""),
        ("(p < out_height) &", ""),
        ("(image < images) &", ""),
    ],
)
def test_the_model_finds_what_breaks_the_kernel(modelled, old, new):
    geometry = Geometry.of((128, 32, 3, 3), 2, 1)
    found = 0
    for eager in (False, True):
        modelled.setattr(block_tma, "convolve", model(eager, [(old, new)]))
        try:
            found += not run(geometry=geometry) < TOLERANCE[torch.float16]
        except (ModelError, AssertionError):
            found += 1
    assert found


@pytest.mark.parametrize(
    ("changes", "needed"),
    [
        ({"dtype": torch.float32}, "float16 or bfloat16"),
        ({"block": (32, 16)}, "blocks of 64 output channels"),
        ({"densities": (0.0, 0.0)}, "keeps some block"),
        ({"geometry": Geometry((64, 12, 3, 3))}, "input channels in multiples of 8"),
        ({"geometry": Geometry((64, 24, 3, 3), (2, 2))}, "in multiples of the block's 16"),
        ({"geometry": Geometry((256, 24, 3, 3), groups=2)}, "in multiples of the block's 16"),
        ({"geometry": Geometry((64, 32, 3, 3), (2, 2)), "size": (8, 7)}, "multiples of the stride"),
        ({"samples": True}, "all samples on one path"),
    ],
)
def test_it_says_what_it_does_not_cover_and_triton_runs_that(modelled, changes, needed):
    geometry = changes.get("geometry", Geometry((64, 32, 3, 3)))
    dtype, size, samples = (
        changes.get("dtype", torch.float16),
        changes.get("size", (8, 8)),
        changes.get("samples", False),
    )
    weight, masks = block_problem(
        geometry.weight_shape, changes.get("block", (64, 16)), changes.get("densities", (0.5, 0.5)), dtype
    )
    packed, x = BlockWeight(weight, masks), torch.randn(2, geometry.in_channels, *size).to(dtype)
    verdict = tma_ops.covers(geometry, packed.values, packed.rows_per_tile, size, samples)
    assert needed in verdict.why
    order = (Samples.of(torch.tensor([1, 1]), x),) if samples else ()

    def bound(schedule):
        bind = TRITON.bind_samples if samples else lambda *layer: TRITON.bind(*layer[:2], "adv", *layer[2:])
        return bind(packed, geometry, None, None, False, None, schedule)

    with pytest.raises(ValueError, match=f"{needed}.*take a schedule without TMA"):
        bound(SCHEDULE)(x, None, *order)
    modelled.setattr(schedules, "find", lambda *_: SCHEDULE)
    modelled.setattr(block_tma, "convolve", None)
    expected = reference.sparse_conv2d(x.double(), weight * masks["adv"], geometry)
    assert relative_error(bound(None)(x, None, *order), expected) < TOLERANCE[dtype]


def test_a_schedule_that_was_measured_is_taken(modelled):
    modelled.setattr(schedules, "find", lambda *_: SCHEDULE)
    with modelled.context() as patch:
        patch.setattr(block, "convolve", None)
        assert run(schedule=None) < TOLERANCE[torch.float16]
    modelled.setattr(block_tma, "convolve", None)
    with schedules.without_tma():
        assert run(schedule=None) < TOLERANCE[torch.float16]


def test_tensors_that_begin_anywhere_are_copied():
    x = torch.randn(2 * 32 * 6 * 6 + 1).half()[1:].view(2, 6, 6, 32).permute(0, 3, 1, 2)
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert x.data_ptr() % 16
    assert run(x=x) < TOLERANCE[torch.float16]


@pytest.mark.parametrize(
    ("pixels", "outputs", "box"),
    [
        (128, (256, 32, 32), (1, 4, 32)),
        (128, (256, 8, 8), (2, 8, 8)),
        (128, (256, 4, 4), (8, 4, 4)),
        (128, (2, 96, 96), (1, 4, 32)),
        (64, (16, 7, 7), (8, 1, 8)),
        (128, (1, 14, 28), (1, 4, 32)),
    ],
)
def test_boxes_fit_the_outputs(pixels, outputs, box):
    assert tma_ops.box_of(pixels, *outputs) == box


def test_the_operator_keeps_torchs_rules(modelled):
    weight, masks = block_problem((64, 32, 3, 3), (64, 16), dtype=torch.float16)
    packed, geometry = BlockWeight(weight, masks), Geometry.of(weight.shape, padding=1)
    x = torch.randn(1, 32, 4, 4).half().contiguous(memory_format=torch.channels_last)
    y = torch.empty(1, 64, 4, 4, dtype=torch.float16).contiguous(memory_format=torch.channels_last)
    arguments = (
        x, packed.values, packed.codes, packed.segments, geometry.numbers, 0, 2, SCHEDULE.numbers,
        None, None, None, y, None, None, None, None, False, False,
    )  # fmt: skip
    utilities = ("test_schema", "test_faketensor")
    torch.library.opcheck(tma_ops.convolve_blocks_tma, arguments, test_utils=utilities)
