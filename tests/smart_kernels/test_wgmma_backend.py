"""What is particular to the wgmma backend, on an emulated Hopper; test_emulated_backends.py has the rest."""

import ctypes
import shutil

import pytest
import torch
from emulated import emulated_hopper, problem_of
from emulated_operators import needs_operators
from exact import integers, layer, reference
from gpu_cases import slab_masks
from networks import BasicBlock
from torch import nn

from smart_kernels import load, save, swap, two_four_ops, verify
from smart_kernels.backends import BACKENDS, Verdict
from smart_kernels.backends.cuda import CudaBackend
from smart_kernels.backends.wgmma import WgmmaBackend
from smart_kernels.geometry import Geometry
from smart_kernels.packing import TwoFourWeight
from smart_kernels.planner import Planner
from smart_kernels.two_four_ops import WGMMA_TILES

WGMMA = BACKENDS["wgmma"]


@needs_operators
@pytest.mark.parametrize("channels", [40, 72])
def test_tiles_have_no_more_channels_than_there_are(tiles_run, channels):
    packed, geometry = layer(TwoFourWeight, (channels, 32, 3, 3), dtype=torch.float16, padding=1)
    WGMMA.bind(packed, geometry, "adv", None, None, False)(torch.zeros(1, 32, 5, 5).half(), None)
    assert tiles_run == [WGMMA_TILES[0] if channels > 64 else WGMMA_TILES[1]]


@needs_operators
def test_weights_that_leave_out_columns_run_on_the_other_kernel(tiles_run):
    shape = (72, 32, 3, 3)
    packed = WGMMA.pack(integers(*shape, dtype=torch.float16), slab_masks(shape, 0.4))
    geometry, x = Geometry.of(shape, padding=1), integers(1, 32, 4, 4, dtype=torch.float16)
    y, expected = (
        each.bind(packed, geometry, "adv", None, None, False)(x, None) for each in (WGMMA, BACKENDS["dense"])
    )
    assert packed.column_runs is not None and torch.equal(y, expected)
    assert tiles_run == ["small"]


@needs_operators
@pytest.mark.parametrize(("shape", "groups", "tile"), [((20, 16, 3, 3), 2, "wgmma twin"), ((64, 8, 3, 3), 8, "narrow")])
def test_groups_run_on_either_kernel(tiles_run, shape, groups, tile):
    """On the other one where slabs leave out the columns of other groups."""
    packed, geometry = layer(TwoFourWeight, shape, dtype=torch.float16, padding=1, groups=groups)
    x = integers(2, geometry.in_channels, 5, 5, dtype=torch.float16)
    y = WGMMA.bind(packed, geometry, "adv", None, None, False)(x, None)
    assert torch.equal(y.double(), reference(x, packed, geometry, "adv"))
    assert tiles_run == [tile]


class Wide(nn.Module):
    """A stem that stays dense, and a block of 32 channels."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.block = BasicBlock(32, 32, 1)

    def forward(self, x):
        return self.block(self.stem(x))


@needs_operators
def test_a_swapped_network_runs_on_it_and_samples_of_both_paths_on_the_other_kernel(tiles_run, on_any_device):
    model = Wide().eval().half()
    images = torch.rand(2, 3, 6, 6).half()
    sparse = swap(model, images, backend="wgmma")
    assert "wgmma" in {row["backend"] for row in sparse.report()}
    verify(model, sparse, images)
    with torch.inference_mode():
        tiles_run.clear()
        apart = [sparse(images, path=path) for path in ("adv", "clean")]
        assert set(tiles_run) == {WGMMA_TILES[1]}
        tiles_run.clear()
        together = sparse(images, path=torch.tensor([1, 0]))
        assert set(tiles_run) == {"small"}
    torch.testing.assert_close(together, torch.stack([apart[0][0], apart[1][1]]), rtol=1e-2, atol=1e-2)


@needs_operators
def test_a_file_saved_on_hopper_runs_on_other_gpus_from_the_same_packed_weight(
    tiles_run, on_any_device, monkeypatch, tmp_path
):
    model, path = Wide().eval().half(), tmp_path / "net.safetensors"
    images = torch.rand(2, 3, 6, 6).half()
    sparse = swap(model, images, backend="wgmma")
    save(sparse, path)
    assert load(path).report() == sparse.report()

    monkeypatch.setattr(WgmmaBackend, "supports", lambda *_: Verdict(False, "this GPU has 8.0"))
    again = load(path)
    rows = {row["name"]: row for row in again.report()}
    assert rows["block.conv1"]["backend"] == "cuda" and rows["block.conv1"]["dense_us"] is None
    why = "in place of wgmma, which reads the same packed weight: this GPU has 8.0"
    assert rows["block.conv1"]["why"] == why
    tiles_run.clear()
    verify(model, again, images)
    assert set(tiles_run) == {"small"}

    monkeypatch.setattr(CudaBackend, "supports", lambda *_: Verdict(False, "there is no GPU"))
    dense = load(path)
    row = next(row for row in dense.report() if row["name"] == "block.conv1")
    assert (row["backend"], row["why"]) == ("dense", "in place of wgmma: this GPU has 8.0")
    assert row["bytes"] == dense.net.get_submodule("block.conv1").packed.nbytes
    verify(model, dense, images)


def test_without_a_measurement_it_is_never_chosen(on_any_device):
    shape = (64, 64, 3, 3)
    masks = {"clean": torch.rand(shape) < 0.2}
    planner = Planner(measure=False, strict=True)
    choice = planner.choose(torch.randn(shape).half(), masks, Geometry.of(shape, padding=1), torch.Size((2, 64, 8, 8)))
    assert choice.backend != "wgmma"


@pytest.mark.parametrize(
    ("shape", "arguments", "message"),
    [
        ((32, 16, 3, 3), {}, "which 16 input channels do not divide into"),
        ((32, 32, 1, 1), {"stride": 9}, "strides up to 8"),
        ((32, 32, 3, 3), {"padding": 129}, "cannot reach 2 pixels"),
        ((32, 32, 3, 3), {"dilation": 65}, "cannot reach 130 pixels"),
        ((32, 32, 3, 3), {"dilation": 128, "padding": 128}, "cannot reach 256 pixels"),
    ],
)
def test_what_it_cannot_compute_it_says(shape, arguments, message):
    verdict = WGMMA.computes(Geometry.of(shape, **arguments), torch.float16)
    assert not verdict and message in verdict.why


def test_it_is_for_hopper_only(monkeypatch):
    geometry = Geometry.of((40, 32, 3, 3))
    monkeypatch.setattr(CudaBackend, "available", lambda self: Verdict(True))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(two_four_ops, "wgmma_missing", ["this GPU has 8.0", None].__getitem__)
    for device, ok in ((0, False), (1, True)):
        verdict = WGMMA.supports(geometry, torch.float16, torch.device("cuda", device))
        assert verdict == (ok, "" if ok else "this GPU has 8.0")
    monkeypatch.setattr(two_four_ops, "wgmma_missing", lambda device: "this GPU has 8.0")
    assert WGMMA.available() == (False, "this GPU has 8.0")


def test_every_geometry_that_the_backend_takes_the_kernel_takes():
    """The one judges without the input's size, so it may refuse more."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    library, taken = emulated_hopper(), 0
    for taps in (1, 2, 3, 5):
        for dilation in (1, 31, 32, 43, 64, 85, 128):
            for stride in (1, 2, 8, 9):
                for padding in (0, 1, 127, 128, 129):
                    shape = (8, 32, taps, 1)
                    geometry = Geometry.of(shape, (stride, 1), (padding, 0), (dilation, 1))
                    size = max(1, (taps - 1) * dilation + 1 - 2 * padding) + stride - 1
                    weight = TwoFourWeight(torch.zeros(shape).half(), {"clean": torch.zeros(shape, dtype=torch.bool)})
                    if not WGMMA.computes(geometry, torch.float16):
                        continue
                    for height in range(size, size + stride):
                        x = torch.zeros(1, 32, height, 1).half()
                        told, *_ = problem_of(x, weight.operand("clean"), geometry)
                        assert library.takes(ctypes.byref(told)), geometry
                        taken += 1
    assert taken > 100
