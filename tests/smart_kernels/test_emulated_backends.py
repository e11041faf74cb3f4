"""What the backends of every GPU kernel promise, with the kernels on emulated GPUs in the place of a real one."""

from typing import NamedTuple

import pytest
import torch
from emulated_operators import needs_operators
from exact import integers, layer
from networks import TwoPaths
from torch._subclasses import FakeTensorMode

from smart_kernels import bitmap_ops, direct_ops, native, swap, two_four_ops, verify
from smart_kernels.backends import BACKENDS, Affine, Backend
from smart_kernels.backends.tensor_cores import Schedule
from smart_kernels.packing import FORMATS
from smart_kernels.paths import Samples

DENSE = BACKENDS["dense"]
CHANNELS = 40, 32  # output and input


class Case(NamedTuple):
    backend: Backend
    dtype: torch.dtype
    operator: str

    def problem(self, outputs=CHANNELS[0]):
        shape = (outputs, CHANNELS[1], 3, 3)
        return layer(FORMATS[self.backend.format], shape, dtype=self.dtype, padding=1)

    def images(self, *shape):
        return integers(shape[0], CHANNELS[1], *shape[1:], dtype=self.dtype)


CASES = {
    "direct": Case(BACKENDS["direct"], torch.float32, "direct"),
    "cuda": Case(BACKENDS["cuda"], torch.float16, "two_four"),
    "bitmap": Case(BACKENDS["bitmap"], torch.float16, "bitmap"),
    "wgmma": Case(BACKENDS["wgmma"], torch.float16, "two_four"),
}
# Tiles by their number; of the 2:4 kernel also with splits.
OF_SAMPLES = [("direct", tile) for tile in range(len(direct_ops.TILES))]
OF_SAMPLES += [("cuda", Schedule(tile, 1 + tile % 3)) for tile in range(len(two_four_ops.TILES))]
OF_SAMPLES += [("bitmap", Schedule(tile, 1 + tile % 3)) for tile in range(len(bitmap_ops.TILES))]


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


@needs_operators
@pytest.mark.parametrize("path", ["clean", "adv", 0.5])
@pytest.mark.parametrize("with_second", [False, True])
def test_the_backend_computes_what_dense_does(tiles_run, case, path, with_second):
    packed, geometry = case.problem()
    x, residual = case.images(2, 5, 5), integers(2, CHANNELS[0], 5, 5, largest=2, dtype=case.dtype)
    scale, bias, second_scale, second_bias = integers(4, CHANNELS[0], largest=2, dtype=case.dtype)
    affine = Affine(second_scale, second_bias, True) if with_second else None
    results = [
        backend.bind(packed, geometry, path, scale, bias, True, affine)(x, residual)
        for backend in (case.backend, DENSE)
    ]
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-2)
    assert len(tiles_run) == 1


@needs_operators
def test_operators_keep_their_promises(tiles_run, case):
    packed, geometry = case.problem()
    ones = torch.rand(CHANNELS[0])
    for with_affine in (False, True):
        operator, layer_arguments, tuning = case.backend.launch(packed, geometry, "adv", with_affine, None)
        second = (ones, ones, False) if with_affine else ()
        epilogue = (ones, None, None, True, None, None, *second, *tuning)
        arguments = (case.images(1, 4, 4), *layer_arguments, *epilogue)
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


@needs_operators
def test_a_compiled_graph_holds_the_operator(fresh_compiler, tiles_run, case):
    packed, geometry = case.problem()
    run_path = case.backend.bind(packed, geometry, "clean", None, None, True)
    compiled = torch.compile(lambda x: run_path(x, None), fullgraph=True, backend="aot_eager")
    x = case.images(1, 4, 4)
    with torch.inference_mode():
        assert torch.equal(compiled(x), run_path(x, None))


@needs_operators
def test_results_are_channels_last_on_the_inputs_device(case):
    packed, geometry = case.problem()
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(3, CHANNELS[1], 9, 9, dtype=case.dtype, device="cuda")
        operator, layer_arguments, tuning = case.backend.launch(packed, geometry, "adv", False, None)
        on_gpu = [torch.empty_like(each, device="cuda") if torch.is_tensor(each) else each for each in layer_arguments]
        y = operator(x, *on_gpu, None, None, None, False, None, None, *tuning)
    assert y.shape == (3, CHANNELS[0], 9, 9) and y.dtype == x.dtype and y.device.type == "cuda"
    assert y.is_contiguous(memory_format=torch.channels_last)


@needs_operators
def test_operators_have_no_answer_on_a_cpu(case):
    packed, geometry = case.problem()
    with pytest.raises(NotImplementedError, match="CPU"):
        case.backend.bind(packed, geometry, "clean", None, None, False)(case.images(1, 4, 4), None)


@needs_operators
def test_a_corrupt_weight_never_runs(tiles_run, case):
    packed, geometry = case.problem()
    good = {name: tensor.clone() for name, tensor in packed.state_dict().items()}
    run = case.backend.bind(packed, geometry, "clean", None, None, False)
    name = next(name for name in ("codes", "extra_columns", "bits") if name in good)
    outside = torch.full_like(good[name], torch.iinfo(good[name].dtype).max)
    with pytest.raises(ValueError, match="corrupt"):
        packed.load_state_dict({**good, name: outside})
    with pytest.raises(ValueError, match="corrupt data was loaded"):
        run(case.images(1, 4, 4), None)
    packed.load_state_dict(good)
    run(case.images(1, 4, 4), None)


@needs_operators
@pytest.mark.parametrize("affine", [None, Affine(torch.ones(CHANNELS[0]), torch.ones(CHANNELS[0]), True)])
def test_the_backward_pass_is_refused(tiles_run, case, affine):
    packed, geometry = case.problem()
    x = case.images(1, 4, 4).requires_grad_()
    y = case.backend.bind(packed, geometry, "clean", None, None, False, affine)(x, None)
    for each in [y] if affine is None else y:
        with pytest.raises(RuntimeError, match="compute no gradients"):
            each.sum().backward()


def test_without_a_gpu_it_says_why(case):
    if native.cuda_missing() is None:
        pytest.skip("there is a GPU")
    _, geometry = case.problem()
    assert case.backend.available().why
    assert "not on cpu" in case.backend.supports(geometry, case.dtype, torch.device("cpu")).why


@needs_operators
@pytest.mark.parametrize("name", ["direct", "cuda", "bitmap"])
def test_a_swapped_network_runs_on_it(tiles_run, on_any_device, name):
    """All the way from the planner, as on a GPU; layers it cannot run stay dense."""
    dtype = CASES[name].dtype
    model, images = TwoPaths().eval().to(dtype), torch.rand(2, 1, 9, 9).to(dtype)
    sparse = swap(model, images, backend=name)
    assert name in {row["backend"] for row in sparse.report()}
    verify(model, sparse, images)
    with torch.inference_mode():
        apart = [sparse(images, path=path) for path in ("adv", "clean")]
        together = sparse(images, path=torch.tensor([1, 0]))
        torch.testing.assert_close(together, torch.stack([apart[0][0], apart[1][1]]), rtol=1e-2, atol=1e-2)


@needs_operators
@pytest.mark.parametrize("choice", [[0, 1, 1, 0, 1], [0] * 5, [1] * 5], ids=str)
@pytest.mark.parametrize(("name", "schedule"), OF_SAMPLES)
@pytest.mark.parametrize("outputs", [CHANNELS[0], 43])
def test_each_sample_runs_on_its_own_path(tiles_run, choice, name, schedule, outputs):
    """In one launch, whose tiles hold samples of one path: 45 pixels of five samples fill none of them."""
    case = CASES[name]
    packed, geometry = case.problem(outputs)
    x, residual = case.images(5, 3, 3), integers(5, outputs, 3, 3, largest=2, dtype=case.dtype)
    scale, bias, second_scale, second_bias = integers(4, 2, outputs, largest=2)
    affine = Affine(second_scale, second_bias, True)
    samples = Samples.of(torch.tensor(choice), x)
    results = case.backend.bind_samples(packed, geometry, scale, bias, True, affine, schedule)(x, residual, samples)
    assert len(tiles_run) == 1
    for i, path in enumerate(choice):
        of_path = Affine(second_scale[path], second_bias[path], True)
        call = case.backend.bind(packed, geometry, packed.paths[path], scale[path], bias[path], True, of_path, schedule)
        alone = call(x[i : i + 1], residual[i : i + 1])
        assert all(torch.equal(y[i : i + 1], expected) for y, expected in zip(results, alone, strict=True))
