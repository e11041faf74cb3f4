"""The CUDA backend and its operators, with the kernel itself on the emulated GPU in the place of a real one."""

import shutil

import pytest
import torch
from emulated import emulated_library, run
from networks import TwoPaths
from torch._subclasses import FakeTensorMode
from two_four_cases import slab_masks

from smart_kernels import load, native, save, swap, two_four_ops, verify
from smart_kernels.backends import BACKENDS, Affine, Verdict
from smart_kernels.backends.cuda import CudaBackend, overfull_share
from smart_kernels.geometry import Geometry
from smart_kernels.packing import TwoFourWeight
from smart_kernels.packing.two_four import Operand
from smart_kernels.paths import Samples
from smart_kernels.two_four_ops import TILES

CUDA = BACKENDS["cuda"]
needs_operators = pytest.mark.skipif(two_four_ops.missing() is not None, reason=str(two_four_ops.missing()))


def problem(shape=(32, 16, 3, 3), density=0.2, dtype=torch.float16):
    masks = {name: torch.rand(shape) < density for name in ("clean", "adv")}
    return TwoFourWeight(torch.randint(-1, 2, shape).to(dtype), masks), Geometry.of(shape, padding=1)


@pytest.fixture
def emulated():
    """The operators answer on CPU tensors, by way of the emulated GPU."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    compiled = emulated_library()

    def convolve(x, *arguments, affine=None, tile=-1, column_runs=None):
        *tensors, numbers, scale, bias, residual, relu, order, first = arguments
        name = "small" if tile < 0 else TILES[tile]
        return run(compiled, x, Operand(*tensors), Geometry.of_numbers(numbers), name, scale=scale, bias=bias,
                   residual=residual, relu=relu, order=order, first=first, affine=affine,
                   column_runs=column_runs)  # fmt: skip

    def plain(*arguments):
        return convolve(*arguments[:15], **dict(zip(("tile", "column_runs"), arguments[15:], strict=False)))

    def affine(*arguments):
        last = dict(zip(("tile", "column_runs"), arguments[18:], strict=False))
        return convolve(*arguments[:15], affine=arguments[15:18], **last)

    library = torch.library.Library("smart_kernels", "IMPL", "CPU")
    library.impl("sparse_conv2d_two_four", plain)
    library.impl("sparse_conv2d_affine_two_four", affine)
    yield
    library._destroy()


@needs_operators
@pytest.mark.parametrize("path", ["clean", "adv", 0.5])
@pytest.mark.parametrize("with_second", [False, True])
def test_the_backend_computes_what_dense_does(emulated, path, with_second):
    packed, geometry = problem()
    x, residual = torch.randint(-1, 2, (2, 16, 5, 5)).half(), torch.randint(-2, 3, (2, 32, 5, 5)).half()
    scale, bias, second_scale, second_bias = torch.randint(-2, 3, (4, 32)).half()
    affine = Affine(second_scale, second_bias, True) if with_second else None
    results = [
        backend.bind(each, geometry, path, scale, bias, True, affine)(x, residual)
        for backend, each in ((CUDA, packed), (BACKENDS["dense"], packed))
    ]
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-2)


@needs_operators
def test_operators_keep_their_promises(emulated):
    packed, geometry = problem()
    x = torch.rand(1, 16, 4, 4).half()
    arguments = (x, *packed.operand("adv"), geometry.numbers, torch.rand(32), None, None, True, None, None)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.smart_kernels.sparse_conv2d_two_four.default, arguments, test_utils=checks)
    torch.library.opcheck(
        torch.ops.smart_kernels.sparse_conv2d_affine_two_four.default,
        (*arguments, torch.rand(32), torch.rand(32), False),
        test_utils=checks,
    )


@needs_operators
def test_a_compiled_graph_holds_the_operator(fresh_compiler, emulated):
    packed, geometry = problem()
    run_path = CUDA.bind(packed, geometry, "clean", None, None, True)
    compiled = torch.compile(lambda x: run_path(x, None), fullgraph=True, backend="aot_eager")
    x = torch.rand(1, 16, 4, 4).half()
    with torch.inference_mode():
        assert torch.equal(compiled(x), run_path(x, None))


@needs_operators
def test_results_are_channels_last_on_the_inputs_device():
    packed, geometry = problem()
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(3, 16, 9, 9, dtype=torch.float16, device="cuda")
        *tensors, first_slab = packed.operand("adv")
        weight = [torch.empty(each.shape, dtype=each.dtype, device="cuda") for each in tensors]
        y = torch.ops.smart_kernels.sparse_conv2d_two_four(
            x, *weight, first_slab, geometry.numbers, None, None, None, False, None, None
        )
    assert y.shape == (3, 32, 9, 9) and y.dtype == x.dtype and y.device.type == "cuda"
    assert y.is_contiguous(memory_format=torch.channels_last)


@needs_operators
def test_the_operator_has_no_answer_on_a_cpu():
    packed, geometry = problem()
    x = torch.rand(1, 16, 4, 4).half()
    with pytest.raises(NotImplementedError, match="CPU"):
        CUDA.bind(packed, geometry, "clean", None, None, False)(x, None)


def test_a_corrupt_weight_never_runs():
    packed, geometry = problem()
    state = packed.state_dict()
    state = {**state, "extra_columns": torch.full_like(state["extra_columns"], 255)}
    with pytest.raises(ValueError, match="corrupt"):
        packed.load_state_dict(state)
    if two_four_ops.missing() is None:
        with pytest.raises(ValueError, match="corrupt data was loaded"):
            CUDA.bind(packed, geometry, "clean", None, None, False)(torch.rand(1, 16, 4, 4).half(), None)


@needs_operators
def test_the_backward_pass_is_refused(emulated):
    packed, geometry = problem()
    x = torch.rand(1, 16, 4, 4).half().requires_grad_()
    with pytest.raises(RuntimeError, match="compute no gradients"):
        CUDA.bind(packed, geometry, "clean", None, None, False)(x, None).sum().backward()


@pytest.mark.parametrize(
    ("shape", "arguments", "dtype", "message"),
    [
        ((32, 16, 3, 3), {}, torch.float32, "float16 and bfloat16, not float32"),
        ((32, 3, 3, 3), {}, torch.float16, "3 input or 32 output channels"),
        ((10, 16, 1, 1), {}, torch.float16, "16 input or 10 output channels"),
        ((32, 8, 3, 3), {"groups": 2}, torch.float16, "one group, not 2"),
    ],
)
def test_what_it_cannot_compute_it_says(shape, arguments, dtype, message):
    verdict = CUDA.computes(Geometry.of(shape, **arguments), dtype)
    assert not verdict and message in verdict.why


def test_it_is_for_gpus_of_capability_8(monkeypatch):
    _, geometry = problem()
    assert "not on cpu" in CUDA.supports(geometry, torch.float16, torch.device("cpu")).why
    monkeypatch.setattr(CudaBackend, "available", lambda self: Verdict(True))
    for capability, ok in (((7, 5), False), ((8, 0), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert bool(CUDA.supports(geometry, torch.float16, torch.device("cuda"))) == ok


def test_without_a_gpu_it_says_why():
    if native.cuda_missing() is None:
        pytest.skip("there is a GPU")
    assert CUDA.available().why


def test_masks_that_overflow_much_are_left_to_others():
    mask = torch.zeros(8, 10, 1, 1, dtype=torch.bool)
    assert overfull_share(mask) == 0
    mask[:, :3] = mask[0, 8:] = True
    assert overfull_share(mask) == pytest.approx(1 / 3)
    assert not CUDA.suits({"clean": mask})
    assert CUDA.suits({"clean": torch.rand(64, 64, 3, 3) < 0.2})


@needs_operators
def test_a_swapped_network_runs_on_it(emulated, monkeypatch, tmp_path):
    """All the way from the planner, as on a GPU, and back from a file; layers it cannot run stay dense."""
    monkeypatch.setattr(CudaBackend, "supports", lambda self, geometry, dtype, device: self.computes(geometry, dtype))
    model = TwoPaths().eval().half()
    images = torch.rand(2, 1, 9, 9).half()
    sparse = swap(model, images, backend="cuda")
    assert "cuda" in {row["backend"] for row in sparse.report()}
    verify(model, sparse, images)
    with torch.inference_mode():
        apart = [sparse(images, path=path) for path in ("adv", "clean")]
        together = sparse(images, path=torch.tensor([1, 0]))
        torch.testing.assert_close(together, torch.stack([apart[0][0], apart[1][1]]), rtol=1e-2, atol=1e-2)
        save(sparse, tmp_path / "net.safetensors")
        again = load(tmp_path / "net.safetensors")
        torch.testing.assert_close(again(images, path="adv"), apart[0], rtol=1e-2, atol=1e-2)


@needs_operators
@pytest.mark.parametrize("path", ["clean", "adv", 0.5, "samples"])
def test_runs_of_columns_are_left_out(emulated, path):
    shape = (160, 32, 3, 3)
    packed = CUDA.pack(torch.randint(-1, 2, shape).half(), slab_masks(shape, 0.4))
    geometry, x = Geometry.of(shape, padding=1), torch.randint(-1, 2, (3, 32, 4, 4)).half()
    if path == "samples":
        choice = torch.tensor([1, 0, 1])
        y = CUDA.bind_samples(packed, geometry, None, None, False)(x, None, Samples.of(choice, x))
        each = [BACKENDS["dense"].bind(packed, geometry, path, None, None, False)(x, None) for path in packed.paths]
        expected = torch.where(choice[:, None, None, None].bool(), each[1], each[0])
    else:
        y, expected = (
            each.bind(packed, geometry, path, None, None, False)(x, None) for each in (CUDA, BACKENDS["dense"])
        )
    assert packed.column_runs is not None and torch.equal(y, expected)


@needs_operators
@pytest.mark.parametrize("choice", [[0, 1, 1, 0, 1], [0] * 5, [1] * 5], ids=str)
@pytest.mark.parametrize("tile", range(len(TILES)), ids=TILES)
def test_each_sample_runs_on_its_own_path(emulated, choice, tile):
    """In one launch, whose tiles hold samples of one path: 45 pixels of five samples fill none of them."""
    packed, geometry = problem()
    x, residual = torch.randint(-1, 2, (5, 16, 3, 3)).half(), torch.randint(-2, 3, (5, 32, 3, 3)).half()
    scale, bias, second_scale, second_bias = torch.randint(-2, 3, (4, 2, 32)).float()
    affine = Affine(second_scale, second_bias, True)
    samples = Samples.of(torch.tensor(choice), x)
    results = CUDA.bind_samples(packed, geometry, scale, bias, True, affine, tile)(x, residual, samples)
    for i, path in enumerate(choice):
        of_path = Affine(second_scale[path], second_bias[path], True)
        call = CUDA.bind(packed, geometry, packed.paths[path], scale[path], bias[path], True, of_path, tile)
        alone = call(x[i : i + 1], residual[i : i + 1])
        assert all(torch.equal(y[i : i + 1], expected) for y, expected in zip(results, alone, strict=True))
