"""The direct backend and its operators, with the kernel itself on the emulated GPU in the place of a real one."""

import shutil

import pytest
import torch
from emulated_direct import run_direct
from networks import TwoPaths
from torch._subclasses import FakeTensorMode

from smart_kernels import direct_ops, native, pack, swap, verify
from smart_kernels.backends import BACKENDS, Affine, Verdict
from smart_kernels.backends.direct import DirectBackend
from smart_kernels.direct_ops import TILES
from smart_kernels.geometry import Geometry
from smart_kernels.ops import backend_for
from smart_kernels.paths import Samples

DIRECT = BACKENDS["direct"]
needs_operators = pytest.mark.skipif(direct_ops.missing() is not None, reason=str(direct_ops.missing()))


def problem(shape=(20, 12, 3, 3), density=0.2, groups=1):
    masks = {name: torch.rand(shape) < density for name in ("clean", "adv")}
    weight = torch.randint(-1, 2, shape).float()
    return pack(weight, masks, "unstructured"), Geometry.of(shape, padding=1, groups=groups)


@pytest.fixture
def emulated():
    """The operators answer on CPU tensors, by way of the emulated GPU."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")

    def convolve(x, *arguments, affine=None, tile=-1):
        values, codes, segments, numbers, of_slab, begin, end, scale, bias, residual, relu, order, first = arguments
        name = "small" if tile < 0 else TILES[tile]
        return run_direct(x, values, codes, segments, Geometry.of_numbers(numbers), of_slab, (begin, end), name,
                          scale=scale, bias=bias, residual=residual, relu=relu, order=order, first=first,
                          affine=affine)  # fmt: skip

    def plain(*arguments):
        return convolve(*arguments[:14], tile=arguments[14] if len(arguments) > 14 else -1)

    def affine(*arguments):
        return convolve(*arguments[:14], affine=arguments[14:17], tile=arguments[17] if len(arguments) > 17 else -1)

    library = torch.library.Library("smart_kernels", "IMPL", "CPU")
    library.impl("sparse_conv2d_direct", plain)
    library.impl("sparse_conv2d_affine_direct", affine)
    yield
    library._destroy()


@needs_operators
@pytest.mark.parametrize("path", ["clean", "adv", 0.5])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("with_second", [False, True])
def test_the_backend_computes_what_dense_does(emulated, path, with_second, groups):
    packed, geometry = problem(groups=groups)
    x, residual = torch.randn(2, 12 * groups, 5, 5), torch.randn(2, 20, 5, 5)
    scale, bias, second_scale, second_bias = torch.randn(4, 20)
    affine = Affine(second_scale, second_bias, True) if with_second else None
    results = [
        backend.bind(packed, geometry, path, scale, bias, True, affine)(x, residual)
        for backend in (DIRECT, BACKENDS["dense"])
    ]
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


@needs_operators
def test_operators_keep_their_promises(emulated):
    packed, geometry = problem()
    weight = (packed.values, packed.codes, packed.segments, geometry.numbers, packed.slab_channels, 0, 2)
    arguments = (torch.rand(1, 12, 4, 4), *weight, torch.rand(20), None, None, True, None, None)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.smart_kernels.sparse_conv2d_direct.default, arguments, test_utils=checks)
    torch.library.opcheck(
        torch.ops.smart_kernels.sparse_conv2d_affine_direct.default,
        (*arguments, torch.rand(20), torch.rand(20), False),
        test_utils=checks,
    )


@needs_operators
def test_a_compiled_graph_holds_the_operator(fresh_compiler, emulated):
    packed, geometry = problem()
    run_path = DIRECT.bind(packed, geometry, "clean", None, None, True)
    compiled = torch.compile(lambda x: run_path(x, None), fullgraph=True, backend="aot_eager")
    x = torch.rand(1, 12, 4, 4)
    with torch.inference_mode():
        assert torch.equal(compiled(x), run_path(x, None))


@needs_operators
def test_results_are_channels_last_on_the_inputs_device():
    packed, geometry = problem()
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(3, 12, 9, 9, device="cuda")
        weight = [
            torch.empty(each.shape, dtype=each.dtype, device="cuda")
            for each in (packed.values, packed.codes, packed.segments)
        ]
        y = torch.ops.smart_kernels.sparse_conv2d_direct(
            x, *weight, geometry.numbers, packed.slab_channels, 0, 2, None, None, None, False, None, None
        )
    assert y.shape == (3, 20, 9, 9) and y.dtype == x.dtype and y.device.type == "cuda"
    assert y.is_contiguous(memory_format=torch.channels_last)


@needs_operators
def test_a_corrupt_weight_never_runs(emulated):
    packed, geometry = problem()
    good = {name: tensor.clone() for name, tensor in packed.state_dict().items()}
    run = DIRECT.bind(packed, geometry, "clean", None, None, False)
    with pytest.raises(ValueError, match="corrupt"):
        packed.load_state_dict({**good, "codes": torch.full_like(good["codes"], 255)})
    with pytest.raises(ValueError, match="corrupt data was loaded"):
        run(torch.rand(1, 12, 4, 4), None)
    packed.load_state_dict(good)
    run(torch.rand(1, 12, 4, 4), None)


@needs_operators
def test_the_backward_pass_is_refused(emulated):
    packed, geometry = problem()
    x = torch.rand(1, 12, 4, 4).requires_grad_()
    with pytest.raises(RuntimeError, match="compute no gradients"):
        DIRECT.bind(packed, geometry, "clean", None, None, False)(x, None).sum().backward()


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((32, 16, 3, 3), torch.float16, "takes float32, not float16"),
        ((4, 2, 17, 16), torch.float32, "at most 256 taps, not 17x16"),
    ],
)
def test_what_it_cannot_compute_it_says(shape, dtype, message):
    verdict = DIRECT.computes(Geometry.of(shape), dtype)
    assert not verdict and message in verdict.why
    assert DIRECT.computes(Geometry.of((4, 2, 16, 16)), torch.float32)


def test_it_is_for_gpus_and_sparse_masks(monkeypatch):
    packed, geometry = problem()
    assert "not on cpu" in DIRECT.supports(geometry, torch.float32, torch.device("cpu")).why
    assert DIRECT.suits({"clean": torch.rand(64, 64) < 0.2})
    assert "masks keep" in DIRECT.suits({"clean": torch.rand(64, 64) < 0.2, "adv": torch.rand(64, 64) < 0.5}).why
    monkeypatch.setattr(DirectBackend, "available", lambda self: Verdict(True))
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert backend_for(packed, torch.empty(1, 12, 4, 4, device="cuda"), geometry) is DIRECT
    assert backend_for(packed, torch.empty(1, 12, 4, 4), geometry) is not DIRECT


def test_without_a_gpu_it_says_why():
    if native.cuda_missing() is None:
        pytest.skip("there is a GPU")
    assert DIRECT.available().why


@needs_operators
def test_a_swapped_network_runs_on_it(emulated, monkeypatch):
    """All the way from the planner, as on a GPU."""
    monkeypatch.setattr(DirectBackend, "supports", lambda self, geometry, dtype, device: self.computes(geometry, dtype))
    model, images = TwoPaths().eval(), torch.rand(2, 1, 9, 9)
    sparse = swap(model, images, backend="direct")
    assert "direct" in {row["backend"] for row in sparse.report()}
    verify(model, sparse, images)
    with torch.inference_mode():
        apart = [sparse(images, path=path) for path in ("adv", "clean")]
        together = sparse(images, path=torch.tensor([1, 0]))
        torch.testing.assert_close(together, torch.stack([apart[0][0], apart[1][1]]), rtol=1e-4, atol=1e-5)


@needs_operators
@pytest.mark.parametrize("choice", [[0, 1, 1, 0, 1], [0] * 5, [1] * 5], ids=str)
@pytest.mark.parametrize("tile", range(len(TILES)), ids=TILES)
def test_each_sample_runs_on_its_own_path(emulated, choice, tile):
    """In one launch, whose tiles hold samples of one path: 45 pixels of five samples fill none of them."""
    packed, geometry = problem()
    x, residual = torch.randint(-1, 2, (5, 12, 3, 3)).float(), torch.randint(-2, 3, (5, 20, 3, 3)).float()
    scale, bias, second_scale, second_bias = torch.randint(-2, 3, (4, 2, 20)).float()
    affine = Affine(second_scale, second_bias, True)
    samples = Samples.of(torch.tensor(choice), x)
    results = DIRECT.bind_samples(packed, geometry, scale, bias, True, affine, tile)(x, residual, samples)
    for i, path in enumerate(choice):
        of_path = Affine(second_scale[path], second_bias[path], True)
        call = DIRECT.bind(packed, geometry, packed.paths[path], scale[path], bias[path], True, of_path, tile)
        alone = call(x[i : i + 1], residual[i : i + 1])
        assert all(torch.equal(y[i : i + 1], expected) for y, expected in zip(results, alone, strict=True))
