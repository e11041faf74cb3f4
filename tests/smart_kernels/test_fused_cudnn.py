"""When dense and compact weights run on cuDNN's fused convolutions, on a CPU that plays a GPU.

The operators are torch's, with their own schemas; what computes behind them here is the reference. Nothing here says
that cuDNN computes it, or how fast.
"""

import pytest
import torch
import torch.nn.functional as F

from smart_kernels import reference
from smart_kernels.backends import BACKENDS, Affine, channels, dense, fused_cudnn
from smart_kernels.backends.base import Verdict
from smart_kernels.geometry import Geometry
from smart_kernels.packing import DenseWeight, pack

CHANNELS_LAST = torch.channels_last


@pytest.fixture
def calls(monkeypatch):
    """What the fused operators were called for; the CPU counts as a GPU that has them."""
    seen = []

    def compute(x, weight, z, bias, stride, padding, dilation, groups):
        seen.append((z is not None, weight.is_contiguous(memory_format=CHANNELS_LAST), tuple(weight.shape)))
        if not getattr(compute, "fits", True):
            raise RuntimeError("FIND was unable to find an engine to execute this computation")
        y = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
        return (y if z is None else y + z).relu()

    def relu(x, weight, bias, stride, padding, dilation, groups):
        return compute(x, weight, None, bias, stride, padding, dilation, groups)

    def add_relu(x, weight, z, alpha, bias, stride, padding, dilation, groups):
        assert alpha == 1
        return compute(x, weight, z, bias, stride, padding, dilation, groups)

    library = torch.library.Library("aten", "IMPL", "CPU")
    library.impl("cudnn_convolution_relu", relu)
    library.impl("cudnn_convolution_add_relu", add_relu)
    monkeypatch.setattr(fused_cudnn, "is_on_gpu", lambda weight: True)
    monkeypatch.setattr(fused_cudnn, "available", lambda: Verdict(True))
    seen_and = type("Calls", (), {"seen": seen, "compute": compute})
    yield seen_and
    library._destroy()


def problem(k=24, c=20, kernel=3, **geometry):
    weight = torch.randn(k, c, kernel, kernel)
    masks = {"clean": torch.rand_like(weight) < 0.3, "adv": torch.rand_like(weight) < 0.3}
    geometry = Geometry.of(weight.shape, **{"padding": kernel // 2, **geometry})
    x = torch.randn(2, c, 9, 8).contiguous(memory_format=CHANNELS_LAST)
    return weight, masks, geometry, x


def close(y, expected):
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("stride", [1, 2])
def test_scale_bias_residual_and_relu_are_one_call(calls, residual, bias, stride):
    weight, masks, geometry, x = problem(stride=stride)
    scale, bias = torch.randn(24), torch.randn(24) if bias else None
    z = torch.randn(geometry.output_shape(x.shape)) if residual else None
    y = BACKENDS["dense"].bind(DenseWeight(weight, masks), geometry, "adv", scale, bias, True)(x, z)
    close(y, reference.sparse_conv2d(x.double(), weight * masks["adv"], geometry, scale, bias, z, True))
    assert calls.seen == [(residual, True, (24, 20, 3, 3))]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"relu": False}, "end with a ReLU"),
        ({"second": True}, "one result"),
        ({"groups": 2}, "of one group, not of 2"),
        ({"padding": "same", "dilation": 1, "kernel": 2}, "pads both sides alike"),
        ({"dtype": torch.float64}, "not in float64"),
    ],
)
def test_what_cudnn_does_not_fuse_is_computed_all_the_same(calls, change, why):
    relu, second, dtype = change.pop("relu", True), change.pop("second", False), change.pop("dtype", torch.float32)
    kernel, groups = change.pop("kernel", 3), change.get("groups", 1)
    weight, _, _, x = problem(kernel=kernel)
    weight = weight[:, : 20 // groups].to(dtype)
    geometry = Geometry.of(weight.shape, **{"padding": kernel // 2, **change})
    assert why in fused_cudnn.applies(weight, geometry, relu, second).why
    affine = Affine(torch.randn(24, dtype=dtype), torch.randn(24, dtype=dtype), True) if second else None
    scale, bias = torch.randn(2, 24, dtype=dtype)
    y = dense.bind_weight(weight, geometry, scale, bias, relu, affine)(x.to(dtype), None)
    y = y[0] if second else y
    close(y, reference.sparse_conv2d(x.double(), weight, geometry, scale, bias, None, relu))
    assert calls.seen == []


def test_gradients_flow_around_it(calls):
    weight, masks, geometry, x = problem()
    run = BACKENDS["dense"].bind(DenseWeight(weight, masks), geometry, "clean", None, None, True)
    x.requires_grad_()
    run(x, None).sum().backward()
    assert x.grad is not None and calls.seen == []
    with torch.no_grad():
        run(x, None)
    assert len(calls.seen) == 1


def test_without_an_engine_it_is_asked_once(calls):
    weight, masks, geometry, x = problem()
    run = BACKENDS["dense"].bind(DenseWeight(weight, masks), geometry, "clean", None, None, True)
    calls.compute.fits = False
    expected = reference.sparse_conv2d(x.double(), weight * masks["clean"], geometry, relu=True)
    close(run(x, None), expected)
    close(run(x, None), expected)
    assert len(calls.seen) == 1


def test_an_error_after_it_ran_is_not_hidden(calls):
    weight, masks, geometry, x = problem()
    run = BACKENDS["dense"].bind(DenseWeight(weight, masks), geometry, "clean", None, None, True)
    run(x, None)
    calls.compute.fits = False
    with pytest.raises(RuntimeError, match="unable to find an engine"):
        run(x, None)


def test_memory_that_runs_out_is_no_missing_engine(calls, monkeypatch):
    weight, masks, geometry, x = problem()
    run = BACKENDS["dense"].bind(DenseWeight(weight, masks), geometry, "clean", None, None, True)

    def fail(*_):
        raise torch.OutOfMemoryError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(torch.ops.aten, "cudnn_convolution_relu", type("Op", (), {"default": staticmethod(fail)}))
        with pytest.raises(torch.OutOfMemoryError):
            run(x, None)
    run(x, None)
    assert len(calls.seen) == 1


def test_operands_that_do_not_fit_never_reach_it(calls):
    """The operators check no shapes themselves: they would read beyond tensors."""
    weight, masks, geometry, x = problem()
    run = BACKENDS["dense"].bind(DenseWeight(weight, masks), geometry, "clean", None, None, True)
    with pytest.raises(ValueError, match="input has 19 channels: this convolution takes 20"):
        run(x[:, :19], None)
    with pytest.raises(ValueError, match=r"residual is torch\.float32"):
        run(x, torch.randn(2, 24, 9, 7))
    with pytest.raises(TypeError, match=r"torch\.float32 on cpu is needed"):
        run(x.double(), None)
    assert calls.seen == []


def test_a_scale_that_float16_cannot_take_in_stays_outside(calls):
    weight = torch.tensor([1e-3, 3.0], dtype=torch.float16)[:, None, None, None].expand(2, 4, 3, 3).contiguous()
    for scale in ([1e-4, 1.0], [1.0, 3e4]):  # subnormal numbers, and infinity
        folded, left = dense.fold(weight, torch.tensor(scale, dtype=torch.float16))
        assert folded is weight and left is not None
        geometry = Geometry.of(weight.shape, padding=1)
        x = torch.full((1, 4, 5, 5), 1e-3, dtype=torch.float16)
        y = dense.bind_weight(weight, geometry, left, None, True)(x, None)
        truth = reference.sparse_conv2d(x.double(), weight, geometry, left)
        assert ((y.double() - truth).abs() <= 2e-3 * truth.abs().amax((2, 3), keepdim=True) + 1e-7).all()
    assert calls.seen == []
    folded, left = dense.fold(weight, torch.tensor([2.0, 0.5], dtype=torch.float16))
    assert left is None and torch.equal(folded[:, 0, 0, 0], torch.tensor([2e-3, 1.5], dtype=torch.float16))


def compact_problem(k, c, keep_out, keep_in):
    weight = torch.randn(k, c, 3, 3)
    mask = torch.zeros(weight.shape, dtype=torch.bool)
    rows, columns = torch.randperm(k)[:keep_out], torch.randperm(c)[:keep_in]
    mask[rows[:, None], columns] = True
    return weight, mask


@pytest.mark.parametrize(
    ("k", "c", "keep_out", "keep_in", "shape"),
    [
        (64, 64, 29, 29, (32, 32, 3, 3)),
        (64, 48, 32, 16, (32, 16, 3, 3)),
        (20, 40, 18, 1, (20, 16, 3, 3)),
        (64, 64, 50, 60, (64, 64, 3, 3)),
    ],
)
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("second", [False, True], ids=["one result", "two results"])
def test_compact_weights_fill_their_groups_of_16(calls, k, c, keep_out, keep_in, shape, residual, second):
    weight, mask = compact_problem(k, c, keep_out, keep_in)
    geometry = Geometry.of(weight.shape, padding=1)
    x = torch.randn(2, c, 6, 7).contiguous(memory_format=CHANNELS_LAST)
    scale, bias = torch.randn(2, k)
    z = torch.randn(geometry.output_shape(x.shape)) if residual else None
    affine = Affine(torch.randn(k), torch.randn(k), True) if second else None
    packed = pack(weight, {"clean": mask}, "channel")
    y = BACKENDS["channels"].bind(packed, geometry, "clean", scale, bias, True, affine)(x, z)
    expected = reference.sparse_conv2d(x.double(), weight * mask, geometry, scale, bias, z, True)
    close(y[0] if second else y, expected)
    if second:
        close(y[1], (expected * affine.scale[:, None, None] + affine.bias[:, None, None]).relu())
    whole = shape[0] == k
    fused = not (second and whole) and not (residual and not whole)
    assert calls.seen == ([(residual, True, shape)] if fused else [])


def test_rounding_up_moves_no_weight():
    weight, mask = compact_problem(40, 33, 17, 30)
    packed = pack(weight, {"clean": mask}, "channel")
    wide, out, into = channels.rounded_up(*packed.kept("clean"), Geometry.of(weight.shape))
    assert wide.shape[:2] == (32, 32) and len(out) == len(out.unique()) == 32 and len(into.unique()) == 32
    back = torch.zeros_like(weight)
    back[out[:, None], into] = wide
    assert torch.equal(back, packed.dense("clean"))


def test_weights_that_keep_nothing_stay_empty(calls):
    weight, mask = compact_problem(20, 20, 0, 0)
    geometry, bias = Geometry.of(weight.shape, padding=1), torch.randn(20)
    run = BACKENDS["channels"].bind(pack(weight, {"clean": mask}, "channel"), geometry, "clean", None, bias, True)
    y = run(torch.randn(2, 20, 4, 4), None)
    assert torch.equal(y, bias.relu()[:, None, None].expand(2, 20, 4, 4)) and calls.seen == []


def test_results_of_one_pixel_do_not_write_into_the_bias():
    weight, mask = compact_problem(20, 20, 9, 9)
    geometry, bias = Geometry.of(weight.shape, padding=1), torch.randn(20)
    before = bias.clone()
    run = BACKENDS["channels"].bind(pack(weight, {"clean": mask}, "channel"), geometry, "clean", None, bias, False)
    x, z = torch.randn(1, 20, 1, 1), torch.randn(1, 20, 1, 1)
    first = run(x, z)
    assert torch.equal(bias, before) and torch.equal(run(x, z), first)


def test_compact_inputs_keep_their_layout():
    x = torch.randn(2, 8, 5, 6)
    chosen = torch.tensor([1, 4, 7])
    for layout in (torch.contiguous_format, CHANNELS_LAST):
        y = channels._select(x.contiguous(memory_format=layout), chosen)
        assert y.is_contiguous(memory_format=layout) and torch.equal(y, x[:, chosen])
