"""The block kernels against the float64 reference, in Triton's interpreter."""

import contextlib
import dataclasses

import pytest
import torch
from blocks import TOLERANCE, block_mask, block_problem, check, epilogue, relative_error
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from smart_kernels import reference
from smart_kernels.backends import BACKENDS, Affine
from smart_kernels.backends.schedules import Schedule
from smart_kernels.geometry import Geometry
from smart_kernels.packing import BlockWeight
from smart_kernels.paths import Samples

TRITON = BACKENDS["triton"]
BLOCKS = [(64, 16), (64, 32), (32, 16), (16, 16), (16, 64), (128, 16)]
SMALL = Schedule(pixels=32, channels=32, warps=4, stages=2, splits=1)


@st.composite
def problems(draw):
    block = draw(st.sampled_from(BLOCKS))
    groups = draw(st.sampled_from([1, 1, 1, 2]))
    out = draw(st.integers(1, 100)) if groups == 1 else groups * 128
    inner = draw(st.sampled_from([1, 3, 8, 16, 24, 40]))
    kernel = draw(st.sampled_from([(1, 1), (3, 3), (3, 3), (2, 3), (5, 1), (7, 7)]))
    stride, dilation = (draw(st.tuples(st.integers(1, 3), st.integers(1, 3))) for _ in range(2))
    padding = draw(st.tuples(*[st.integers(0, 3)] * 4))
    geometry = Geometry((out, inner, *kernel), stride, padding, dilation, groups)
    height, width = draw(st.integers(1, 7)), draw(st.integers(1, 7))
    assume(height + padding[0] + padding[1] >= dilation[0] * (kernel[0] - 1) + 1)
    assume(width + padding[2] + padding[3] >= dilation[1] * (kernel[1] - 1) + 1)
    shape = (draw(st.integers(1, 3)), inner * groups, height, width)
    densities = draw(st.tuples(*[st.sampled_from([0.0, 0.1, 0.4, 1.0])] * 2))
    schedule = dataclasses.replace(SMALL, pixels=draw(st.sampled_from([32, 128])), splits=draw(st.sampled_from([1, 2])))
    dtype = draw(st.sampled_from(list(TOLERANCE)))
    return geometry, shape, block, densities, schedule, dtype, draw(st.integers(0, 63))


@settings(max_examples=18)
@given(problem=problems(), path=st.sampled_from(["clean", "adv", 0.3]))
def test_any_problem_matches_the_reference(problem, path):
    geometry, shape, block, densities, schedule, dtype, bits = problem
    torch.manual_seed(bits)
    assert TRITON.computes(geometry, dtype)
    packed = BlockWeight(*block_problem(geometry.weight_shape, block, densities, dtype))
    scale, bias, residual, relu, affine = epilogue(bits, geometry, shape, dtype)
    x = torch.randn(shape).to(dtype)
    # A pixel that no other may read: a mask that lets one through shows, also where the weight there is zero.
    x[-1, :, -1, -1] = float("nan")
    torch.use_deterministic_algorithms(True)  # fills outputs with NaN before they are written
    y = TRITON.bind(packed, geometry, path, scale, bias, relu, affine, schedule)(x, residual)
    expected = reference.sparse_conv2d(x.double(), packed.dense(path), geometry, scale, bias, residual, relu)
    check(y, expected, affine, dtype)


@settings(max_examples=6)
@given(problem=problems(), choice=st.lists(st.integers(0, 1), min_size=3, max_size=3))
def test_each_sample_runs_on_its_own_path(problem, choice):
    geometry, shape, block, densities, schedule, dtype, bits = problem
    torch.manual_seed(bits)
    packed = BlockWeight(*block_problem(geometry.weight_shape, block, densities, dtype))
    scale, bias, residual, relu, affine = epilogue(bits, geometry, shape, dtype, paths=(2,))
    x, choice = torch.randn(shape).to(dtype), torch.tensor(choice[: shape[0]])
    samples = Samples.of(choice, x)
    torch.use_deterministic_algorithms(True)
    y = TRITON.bind_samples(packed, geometry, scale, bias, relu, affine, schedule)(x, residual, samples)
    for i, sample in enumerate(choice.tolist()):
        own = [None if each is None else each[sample] for each in (scale, bias)]
        rest = None if residual is None else residual[i : i + 1]
        weight = packed.dense(packed.paths[sample])
        expected = reference.sparse_conv2d(x[i : i + 1].double(), weight, geometry, *own, rest, relu)
        own_affine = affine and Affine(affine.scale[sample], affine.bias[sample], affine.relu)
        check(tuple(each[i : i + 1] for each in y) if affine else y[i : i + 1], expected, own_affine, dtype)


def run(weight, masks, x, path="clean", schedule=SMALL, **geometry):
    packed = BlockWeight(weight, masks)
    return TRITON.bind(packed, Geometry.of(weight.shape, **geometry), path, None, None, False, None, schedule)(x, None)


@pytest.mark.parametrize("splits", [1, 2])
def test_tiles_that_keep_nothing_are_zero(poisoned, splits):
    weight, masks = block_problem((130, 16, 3, 3), (64, 16), (0.5, 0.0))
    masks["clean"][:64] = False
    x, schedule = torch.randn(1, 16, 4, 4), dataclasses.replace(SMALL, splits=splits)
    assert not run(weight, masks, x, "adv", schedule, padding=1).any()
    y = run(weight, masks, x, "clean", schedule, padding=1)
    assert not y[:, :64].any()
    assert y[:, 64:].any()


def test_every_split_has_its_share_and_more_splits_than_steps_do_no_harm():
    weight, masks = block_problem((64, 32, 3, 3), (64, 16), (0.7, 0.3))
    x = torch.randn(1, 32, 5, 5)
    expected = reference.sparse_conv2d(x.double(), weight * masks["adv"], Geometry.of(weight.shape, padding=1))
    for splits in (2, 5):
        y = run(weight, masks, x, "adv", dataclasses.replace(SMALL, channels=16, splits=splits), padding=1)
        assert relative_error(y, expected) < TOLERANCE[torch.float32]


def test_one_path_alone():
    weight, mask = torch.randn(40, 24, 3, 3), block_mask((40, 24, 3, 3), (16, 16), 0.5)
    x = torch.randn(2, 24, 6, 6)
    y = run(weight, {"only": mask}, x, "only", padding=1)
    expected = reference.sparse_conv2d(x.double(), weight * mask, Geometry.of(weight.shape, padding=1))
    assert relative_error(y, expected) < TOLERANCE[torch.float32]


def test_nan_and_infinity_reach_the_output_as_in_torch():
    keep = torch.ones(16, 16, 1, 1, dtype=torch.bool)
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), -1.0]).expand(1, 16, 1, 4).contiguous()
    packed = BlockWeight(torch.ones(16, 16, 1, 1), {"clean": keep})
    y = TRITON.bind(packed, Geometry.of(packed.shape), "clean", None, None, True, None, SMALL)(x, None)[0, 0, 0]
    assert torch.isnan(y[0])
    assert y[1:].tolist() == [float("inf"), 0.0, 0.0]


@pytest.mark.parametrize("kind", ["channels_last", "strided", "transposed", "expanded", "offset"])
def test_inputs_of_any_strides(kind):
    weight, masks = block_problem((32, 16, 3, 3), (16, 16))
    x = {
        "channels_last": lambda x: x.to(memory_format=torch.channels_last),
        "strided": lambda x: torch.stack([x, x + 1], dim=-1)[..., 0],
        "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
        "expanded": lambda x: x[:1].expand(3, -1, -1, -1),
        "offset": lambda x: torch.cat([x, x])[1:3],
    }[kind](torch.randn(3, 16, 5, 6))
    packed, geometry = BlockWeight(weight, masks), Geometry.of(weight.shape, padding=1)
    residual = torch.randn(len(x), 32, 5, 6)
    y = TRITON.bind(packed, geometry, "adv", None, None, False, None, SMALL)(x, residual)
    expected = reference.sparse_conv2d(x.double(), weight * masks["adv"], geometry, residual=residual)
    assert relative_error(y, expected) < TOLERANCE[torch.float32]


def test_an_empty_batch_gives_an_empty_output():
    weight, masks = block_problem((16, 16, 3, 3), (16, 16))
    assert run(weight, masks, torch.randn(0, 16, 8, 8)).shape == (0, 16, 6, 6)


def test_the_default_schedule_splits_small_maps():
    weight, masks = block_problem((64, 128, 3, 3), (64, 16), (0.6, 0.6))
    x = torch.randn(1, 128, 4, 4)
    expected = reference.sparse_conv2d(x.double(), weight * masks["clean"], Geometry.of(weight.shape, padding=1))
    assert relative_error(run(weight, masks, x, schedule=None, padding=1), expected) < TOLERANCE[torch.float32]


def test_it_launches_on_the_device_of_its_input(monkeypatch):
    from smart_kernels import triton_ops

    events = []
    launch = triton_ops._launch

    @contextlib.contextmanager
    def device_of(x):
        events.append(("enter", x.shape))
        yield
        events.append("leave")

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(triton_ops, "_launch", lambda *args: (events.append("launch"), launch(*args)))
    weight, masks = block_problem((16, 16, 3, 3), (16, 16))
    run(weight, masks, torch.randn(1, 16, 4, 4))
    assert events == [("enter", (1, 16, 4, 4)), "launch", "leave"]
