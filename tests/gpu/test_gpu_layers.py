"""Every backend of GPUs against the float64 reference, layer by layer."""

import pytest
import torch

from smart_kernels import pack, reference
from smart_kernels.backends import BACKENDS, Affine, fused_cudnn
from smart_kernels.backends.schedules import Schedule
from smart_kernels.backends.triton import covered_by_tma
from smart_kernels.geometry import Geometry
from smart_kernels.paths import Samples

TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float32: 2e-5}
BACKEND_NAMES = ("triton", "channels", "dense")


@pytest.fixture(autouse=True)
def exact():
    """float32 is multiplied as float32."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def masks_for(backend, shape):
    k, c, r, s = shape
    if backend == "triton":
        kept = torch.rand(2, -(-k // 64), -(-c // 16), r, s) < 0.3
        masks = kept.repeat_interleave(64, 1).repeat_interleave(16, 2)[:, :k, :c]
    elif backend == "channels":
        masks = torch.zeros(2, *shape, dtype=torch.bool)
        for mask in masks:
            mask[torch.randperm(k)[: -(-k // 3), None], torch.randperm(c)[: -(-c // 2)]] = True
    else:
        masks = torch.rand(2, *shape) < 0.2
    return {name: mask.contiguous().cuda() for name, mask in zip(("clean", "adv"), masks, strict=True)}


def error(y, expected):
    return float((y.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("backend", BACKEND_NAMES)
@pytest.mark.parametrize(
    ("shape", "geometry", "size", "batch"),
    [
        ((64, 64, 3, 3), {"padding": 1}, 32, 2),
        ((128, 64, 3, 3), {"padding": 1, "stride": 2}, 17, 3),
        ((128, 64, 1, 1), {"stride": 2}, 16, 5),
        ((512, 512, 3, 3), {"padding": 1}, 4, 1),
        ((70, 40, 3, 3), {"padding": 2, "dilation": 2}, 9, 2),
        ((64, 3, 7, 7), {"padding": 3}, 20, 2),
    ],
    ids=str,
)
@pytest.mark.parametrize("second", [False, True], ids=["one result", "two results"])
def test_layers_match_the_reference(backend, dtype, shape, geometry, size, batch, second):
    geometry = Geometry.of(shape, **geometry)
    masks = masks_for(backend, shape)
    weight = (torch.randn(shape) / 10).cuda().to(dtype)
    packed = pack(weight, masks, BACKENDS[backend].format)
    x = torch.randn(batch, shape[1], size, size).cuda().to(dtype).contiguous(memory_format=torch.channels_last)
    scale, bias, affine_scale, affine_bias = torch.randn(4, shape[0]).cuda().to(dtype)
    residual = torch.randn(geometry.output_shape(x.shape)).cuda().to(dtype)
    affine = Affine(affine_scale, affine_bias, True) if second else None
    for path in ("clean", "adv", 0.3):
        for z in (None, residual):
            y = BACKENDS[backend].bind(packed, geometry, path, scale, bias, True, affine)(x, z)
            first, other = y if second else (y, None)
            expected = reference.sparse_conv2d(x.double(), packed.dense(path), geometry, scale, bias, z, True)
            assert error(first, expected) < TOLERANCE[dtype]
            if second:
                expected = (expected * affine_scale[:, None, None] + affine_bias[:, None, None]).relu()
                assert error(other, expected) < 2 * TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_cudnn_fuses_all_it_is_said_to(dtype, monkeypatch):
    """A fused convolution that fell back to others would pass every other test."""
    shape = (64, 64, 3, 3)
    geometry, weight = Geometry.of(shape, padding=1), torch.randn(shape).cuda().to(dtype)
    weight = weight.contiguous(memory_format=torch.channels_last)
    assert fused_cudnn.applies(weight, geometry, True, False)

    def plain(x, residual):
        raise AssertionError("it fell back")

    run = fused_cudnn.bind(weight, geometry, None, plain)
    x = torch.randn(8, 64, 16, 16).cuda().to(dtype).contiguous(memory_format=torch.channels_last)
    for z in (None, x):
        assert run(x, z).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_samples_on_paths_of_their_own(dtype):
    shape = (128, 64, 3, 3)
    geometry, masks = Geometry.of(shape, padding=1), masks_for("triton", shape)
    packed = pack((torch.randn(shape) / 10).cuda().to(dtype), masks, "block")
    x = torch.randn(9, 64, 8, 8).cuda().to(dtype)
    scale, bias = torch.randn(2, 2, 128).cuda().to(dtype)
    choice = torch.randint(2, (9,)).cuda()
    run = BACKENDS["triton"].bind_samples(packed, geometry, scale, bias, True)
    y = run(x, None, Samples.of(choice, x))
    for i, path in enumerate(("clean", "adv")):
        rows = choice == i
        weight = packed.dense(path)
        expected = reference.sparse_conv2d(x[rows].double(), weight, geometry, scale[i], bias[i], None, True)
        assert error(y[rows], expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("shape", "geometry", "size", "batch"),
    [
        ((64, 64, 3, 3), {"padding": 1}, 32, 2),
        ((128, 64, 3, 3), {"padding": 1, "stride": 2}, 16, 3),
        ((128, 64, 1, 1), {"stride": 2}, 16, 5),
        ((512, 512, 3, 3), {"padding": 1}, 4, 1),
        ((120, 40, 3, 3), {"padding": 2, "dilation": 2}, 9, 2),
        ((64, 16, 7, 7), {"padding": 3}, 20, 2),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "schedule",
    [
        Schedule(128, 64, 4, 4, splits=1, tma=True),
        Schedule(256, 64, 8, 3, splits=1, tma=True),
        Schedule(32, 32, 4, 2, splits=4, tma=True),
        Schedule(64, 128, 8, 3, tma=True),
    ],
    ids=lambda schedule: "x".join(map(str, schedule.numbers)),
)
def test_the_kernel_with_tma(schedule, dtype, shape, geometry, size, batch):
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("this needs an NVIDIA GPU of compute capability 9.0")
    geometry = Geometry.of(shape, **geometry)
    packed = pack((torch.randn(shape) / 10).cuda().to(dtype), masks_for("triton", shape), "block")
    x = torch.randn(batch, shape[1], size, size).cuda().to(dtype).contiguous(memory_format=torch.channels_last)
    assert covered_by_tma(geometry, packed.values, packed.rows_per_tile, x.shape[2:])
    scale, bias, affine_scale, affine_bias = torch.randn(4, shape[0]).cuda().to(dtype)
    residual = torch.randn(geometry.output_shape(x.shape)).cuda().to(dtype)
    affine = Affine(affine_scale, affine_bias, True)
    for path in ("clean", "adv", 0.3):
        run = BACKENDS["triton"].bind(packed, geometry, path, scale, bias, True, affine, schedule)
        y, second = run(x, residual)
        expected = reference.sparse_conv2d(x.double(), packed.dense(path), geometry, scale, bias, residual, True)
        assert error(y, expected) < TOLERANCE[dtype]
        expected = (expected * affine_scale[:, None, None] + affine_bias[:, None, None]).relu()
        assert error(second, expected) < 2 * TOLERANCE[dtype]
