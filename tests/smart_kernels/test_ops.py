import pytest
import torch
import torch.nn.functional as F

from smart_kernels import native, pack, sparse_conv2d
from smart_kernels.backends import BACKENDS, Affine
from smart_kernels.geometry import Geometry

needs_library = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))


@pytest.fixture
def weight():
    return torch.randn(8, 6, 3, 3)


@pytest.fixture
def masks(weight):
    return {"clean": torch.rand_like(weight) < 0.3, "adv": torch.rand_like(weight) < 0.3}


@pytest.fixture(params=["dense", "unstructured"])
def packed(request, weight, masks):
    return pack(weight, masks, request.param)


@pytest.mark.parametrize("padding", ["same", "valid", 1, (2, 1), [1]], ids=str)
@pytest.mark.parametrize("dilation", [1, 2, (1, 3)], ids=str)
def test_arguments_mean_what_they_mean_to_conv2d(weight, masks, packed, padding, dilation):
    x = torch.randn(2, 6, 11, 12)
    y = sparse_conv2d(x, packed, padding=padding, dilation=dilation, path="adv")
    torch.testing.assert_close(y, F.conv2d(x, weight * masks["adv"], padding=padding, dilation=dilation))


def test_an_even_kernel_with_same_padding_pads_as_torch_does(weight):
    kernel = weight[:, :, :2, :2].contiguous()
    for format in ("dense", "unstructured"):
        packed = pack(kernel, {"clean": kernel > 0}, format)
        x = torch.randn(2, 6, 5, 5)
        expected = F.conv2d(x, kernel * (kernel > 0), padding="same")
        torch.testing.assert_close(sparse_conv2d(x, packed, padding="same"), expected)


def test_bias_and_scale_may_differ_by_path(weight, masks, packed):
    x, bias = torch.randn(2, 6, 5, 5), {"clean": torch.randn(8), "adv": torch.randn(8)}
    scale = {"clean": torch.rand(8), "adv": torch.rand(8)}
    for path in ("clean", "adv"):
        y = sparse_conv2d(x, packed, bias, path=path, scale=scale)
        expected = F.conv2d(x, weight * masks[path]) * scale[path][:, None, None] + bias[path][:, None, None]
        torch.testing.assert_close(y, expected)
    mixed = sparse_conv2d(x, packed, bias, path=0.25)
    torch.testing.assert_close(
        mixed, 0.75 * sparse_conv2d(x, packed, bias) + 0.25 * sparse_conv2d(x, packed, bias, path="adv")
    )


def test_each_sample_may_take_its_own_path(packed):
    x, residual = torch.randn(7, 6, 5, 5), torch.randn(7, 8, 3, 3)
    choice = torch.tensor([0, 1, 1, 0, 1, 0, 0])
    y = sparse_conv2d(x, packed, path=choice, residual=residual, relu=True)
    for i, name in enumerate(("clean", "adv")):
        alone = sparse_conv2d(x, packed, path=name, residual=residual, relu=True)
        torch.testing.assert_close(y[choice == i], alone[choice == i])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": torch.randn(2, 5, 5, 5)}, "input has 5 channels: this convolution takes 6"),
        ({"x": torch.randn(6, 5, 5)}, r"\(N, C, H, W\) is needed"),
        ({"x": torch.randn(2, 6, 2, 2)}, "smaller than the kernel's reach"),
        ({"x": torch.randn(2, 6, 5, 5, dtype=torch.float64)}, "convert one to the other"),
        ({"bias": torch.randn(3)}, r"bias has shape \(3,\): \(8,\) is needed"),
        ({"bias": {"clean": torch.randn(8)}}, "bias has no entry for path 'adv'"),
        ({"residual": torch.randn(2, 8, 5, 5)}, "the shape of the output"),
        ({"path": "robust"}, "unknown path 'robust'"),
        ({"path": 1.5}, r"must lie in \[0, 1\]"),
        ({"path": None}, "path is a NoneType"),
        ({"path": torch.tensor([0, 1, 0])}, r"\(2,\) is needed"),
        ({"path": torch.tensor([0, 2])}, "outside 0..1"),
        ({"path": torch.tensor([0.0, 1.0])}, "give integers"),
        ({"stride": 0}, "at least 1"),
        ({"padding": "reflect"}, "unknown padding 'reflect'"),
        ({"padding": "same", "stride": 2}, "needs stride 1"),
        ({"padding": -1}, "negative"),
        ({"dilation": (1, 2, 3)}, "two"),
        ({"groups": 3}, "cannot be split into 3 groups"),
    ],
)
def test_wrong_arguments_are_refused_in_one_sentence(packed, arguments, message):
    call = {"x": torch.randn(2, 6, 5, 5), "packed": packed} | arguments
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        sparse_conv2d(**call)
    assert "\n" not in str(caught.value)


def operands(weight, masks, batch=3):
    packed, geometry = pack(weight, masks, "unstructured"), Geometry.of(weight.shape, padding=1)
    x = torch.randn(batch, 6, 9, 9)
    first, last = packed.segment_range("adv")
    epilogue = (torch.randn(8), torch.randn(8), torch.randn(batch, 8, 9, 9), True)
    return [
        x,
        packed.values,
        packed.codes,
        packed.segments,
        geometry.numbers,
        packed.slab_channels,
        first,
        last,
        *epilogue,
    ]


@needs_library
def test_the_custom_operator_keeps_torchs_rules(weight, masks):
    torch.library.opcheck(torch.ops.smart_kernels.sparse_conv2d_cpu.default, tuple(operands(weight, masks)))


@needs_library
def test_the_operator_with_a_second_result_keeps_torchs_rules(weight, masks):
    arguments = (*operands(weight, masks), torch.randn(8), torch.randn(8), True)
    torch.library.opcheck(torch.ops.smart_kernels.sparse_conv2d_affine_cpu.default, arguments)
    with pytest.raises(RuntimeError, match="affine_scale has shape"):
        torch.ops.smart_kernels.sparse_conv2d_affine_cpu(*arguments[:-3], torch.randn(7), torch.randn(8), True)


@needs_library
def test_a_second_result_takes_no_gradient_either(weight, masks):
    x, packed = torch.randn(2, 6, 5, 5, requires_grad=True), pack(weight, masks, "unstructured")
    affine = Affine(torch.ones(8), torch.ones(8), True)
    run = BACKENDS["cpu"].bind(packed, Geometry.of(weight.shape), "clean", None, None, False, affine)
    for result in run(x, None):
        with pytest.raises(RuntimeError, match="compute no gradients"):
            result.sum().backward()


@needs_library
@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (0, torch.randn(3, 5, 9, 9), "takes 6"),
        (0, torch.randn(3, 6, 9, 9).double(), "float32"),
        (1, torch.randn(3), "same length"),
        (2, torch.zeros(3, dtype=torch.int64), "uint8 or int16"),
        (3, torch.zeros(5, dtype=torch.int32), "segment offsets"),
        (4, [8, 6, 3, 3], "13 are needed"),
        (4, [8, 6, 3, 3, 0, 1, 1, 1, 1, 1, 1, 1, 1], "at least 1"),
        (5, 0, "slab_channels"),
        (7, 4, "last_segment"),
        (8, torch.randn(7), "scale has shape"),
        (10, torch.randn(3, 8, 9, 8), "the shape of the output"),
    ],
)
def test_the_operator_itself_refuses_operands_that_do_not_fit(weight, masks, index, value, message):
    arguments = operands(weight, masks)
    arguments[index] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.smart_kernels.sparse_conv2d_cpu(*arguments)


@needs_library
def test_a_gradient_is_refused_rather_than_missing(weight, masks):
    x = torch.randn(2, 6, 5, 5, requires_grad=True)
    y = sparse_conv2d(x, pack(weight, masks, "unstructured"))
    with pytest.raises(RuntimeError, match="compute no gradients: take them through the original network"):
        y.sum().backward()


@needs_library
def test_an_unknown_instruction_set_is_refused(weight, masks):
    with pytest.raises(RuntimeError, match="no 'sse9' kernels"):
        torch.ops.smart_kernels.sparse_conv2d_cpu(*operands(weight, masks), "sse9")


@needs_library
def test_it_compiles_into_one_graph(fresh_compiler, weight, masks):
    packed = pack(weight, masks, "unstructured")

    def network(x):
        return sparse_conv2d(x, packed, padding=1, path="adv", relu=True) * 2

    x = torch.randn(2, 6, 9, 9)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), network(x))
