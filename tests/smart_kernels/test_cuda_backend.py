"""What is particular to the cuda backend; test_emulated_backends.py has the rest."""

from functools import partial

import pytest
import torch
from emulated_operators import needs_operators
from exact import integers, layer, reference
from gpu_cases import checkered_masks, slab_masks
from networks import TwoPaths

from smart_kernels import load, pack, save, swap
from smart_kernels.backends import BACKENDS, Affine, Verdict
from smart_kernels.backends.cuda import CudaBackend, overfull_share
from smart_kernels.geometry import Geometry
from smart_kernels.packing import TwoFourWeight
from smart_kernels.paths import Samples

CUDA = BACKENDS["cuda"]


@pytest.mark.parametrize(
    ("shape", "arguments", "dtype", "message"),
    [
        ((32, 16, 3, 3), {}, torch.float32, "float16 and bfloat16, not float32"),
        ((32, 1, 3, 3), {"groups": 32}, torch.float16, "groups of 1 have no such"),
    ],
)
def test_what_it_cannot_compute_it_says(shape, arguments, dtype, message):
    verdict = CUDA.computes(Geometry.of(shape, **arguments), dtype)
    assert not verdict and message in verdict.why


def test_it_is_for_gpus_of_capability_8(monkeypatch):
    geometry = Geometry.of((32, 16, 3, 3))
    monkeypatch.setattr(CudaBackend, "available", lambda self: Verdict(True))
    for capability, why in (((7, 5), "need compute capability 8.0, this GPU has 7.5"), ((8, 0), ""), ((9, 0), "")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        verdict = CUDA.supports(geometry, torch.float16, torch.device("cuda"))
        assert verdict.ok == (not why) and why in verdict.why


def test_masks_that_overflow_much_are_left_to_others():
    mask = torch.zeros(8, 10, 1, 1, dtype=torch.bool)
    assert overfull_share(mask) == 0
    mask[:, :3] = mask[0, 8:] = True
    assert overfull_share(mask) == pytest.approx(1 / 3)
    assert not CUDA.suits({"clean": mask})
    assert CUDA.suits({"clean": torch.rand(64, 64, 3, 3) < 0.2})


@needs_operators
@pytest.mark.parametrize("channels", [3, 20])
def test_input_channels_are_padded_to_copies(fresh_compiler, tiles_run, channels):
    packed, geometry = layer(TwoFourWeight, (24, channels, 3, 3), dtype=torch.float16, padding=1)
    x, residual = integers(2, channels, 6, 5, dtype=torch.float16), integers(2, 24, 6, 5, dtype=torch.float16)
    call = CUDA.bind(packed, geometry, "adv", None, None, True)
    expected = reference(x, packed, geometry, "adv", residual=residual, relu=True)
    assert torch.equal(call(x, residual).double(), expected)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    with torch.inference_mode():
        assert torch.equal(compiled(x.contiguous(memory_format=torch.channels_last), residual).double(), expected)


@needs_operators
@pytest.mark.parametrize("path", ["clean", "adv", 0.5, "samples"])
@pytest.mark.parametrize(("shape", "groups"), [((64, 4, 3, 3), 16), ((20, 6, 3, 3), 2)], ids=str)
def test_groups_run_as_dense_ones_do(tiles_run, shape, groups, path):
    packed, geometry = layer(TwoFourWeight, shape, 0.4, torch.float16, padding=1, groups=groups)
    channels = shape[0], geometry.in_channels
    x, residual = (integers(3, each, 5, 4, largest=2, dtype=torch.float16) for each in channels[::-1])
    scale, bias, second_scale, second_bias = integers(4, 2, shape[0], largest=2)

    def expected(path, sample, row):
        y = reference(x[sample], packed, geometry, path, scale[row], bias[row], residual[sample], True)
        return y, (y * second_scale[row][:, None, None] + second_bias[row][:, None, None]).relu()

    if path == "samples":
        samples = Samples.of(torch.tensor([1, 0, 1]), x)
        affine = Affine(second_scale, second_bias, True)
        results = CUDA.bind_samples(packed, geometry, scale, bias, True, affine)(x, residual, samples)
        alone = [expected(packed.paths[row], slice(i, i + 1), row) for i, row in enumerate([1, 0, 1])]
        wanted = [torch.cat(each) for each in zip(*alone, strict=True)]
    else:
        affine = Affine(second_scale[0], second_bias[0], True)
        results = CUDA.bind(packed, geometry, path, scale[0], bias[0], True, affine)(x, residual)
        wanted = expected(path, slice(None), 0)
    assert all(torch.equal(y.double(), each) for y, each in zip(results, wanted, strict=True))


def test_a_weight_packed_for_other_groups_is_refused():
    packed, _ = layer(TwoFourWeight, (32, 8, 1, 1), dtype=torch.float16)
    grouped = Geometry.of((32, 8, 1, 1), groups=4)
    assert CUDA.accepts(pack(*packed.unpack(), "2:4", groups=4), grouped)
    with pytest.raises(ValueError, match="packed for 1 groups, the convolution has 4"):
        CUDA.bind(packed, grouped, "clean", None, None, False)


def test_padding_the_input_is_part_of_the_estimate():
    estimate = partial(CUDA.estimate_us, density=0.2, device=torch.device("cuda"), dtype=torch.float16)
    us = [estimate(Geometry.of((64, c, 3, 3), padding=1), (256, c, 32, 32)) for c in (32, 31, 25, 24)]
    assert us[1] > us[0] and us[1] > us[2] > us[3]


@needs_operators
def test_a_network_comes_back_from_a_file(tiles_run, on_any_device, tmp_path):
    images = torch.rand(2, 1, 9, 9).half()
    sparse = swap(TwoPaths().eval().half(), images, backend="cuda")
    with torch.inference_mode():
        save(sparse, tmp_path / "net.safetensors")
        again = load(tmp_path / "net.safetensors")
        expected = sparse(images, path="adv")
        torch.testing.assert_close(again(images, path="adv"), expected, rtol=1e-2, atol=1e-2)


@needs_operators
@pytest.mark.parametrize("path", ["clean", "adv", 0.5, "samples"])
@pytest.mark.parametrize("tall", [64, 32])
def test_runs_of_columns_are_left_out(tiles_run, path, tall):
    shape = (160, 32, 3, 3)
    masks = slab_masks(shape, 0.4) if tall == 64 else checkered_masks(shape)
    packed = CUDA.pack(integers(*shape, dtype=torch.float16), masks)
    geometry, x = Geometry.of(shape, padding=1), integers(3, 32, 4, 4, dtype=torch.float16)
    if path == "samples":
        choice = torch.tensor([1, 0, 1])
        y = CUDA.bind_samples(packed, geometry, None, None, False)(x, None, Samples.of(choice, x))
        each = [BACKENDS["dense"].bind(packed, geometry, path, None, None, False)(x, None) for path in packed.paths]
        expected = torch.where(choice[:, None, None, None].bool(), each[1], each[0])
    else:
        y, expected = (
            each.bind(packed, geometry, path, None, None, False)(x, None) for each in (CUDA, BACKENDS["dense"])
        )
    assert packed.column_runs.shape[1] == -(-160 // tall) and torch.equal(y, expected)
    assert set(tiles_run) == {"small" if tall == 64 or path == 0.5 else "narrow"}
