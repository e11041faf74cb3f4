"""Whole networks and operators over the block kernels, in Triton's interpreter."""

import copy

import pytest
import torch
import torch.nn.functional as F
from blocks import block_mask, block_problem
from networks import BasicBlock, DualNorm, MaskedConv, PreActivation
from torch import nn

from smart_kernels import load, pack, paths, save, sparse_conv2d, swap, triton_ops, verify
from smart_kernels.backends import BACKENDS, Affine, schedules
from smart_kernels.backends.schedules import Schedule
from smart_kernels.backends.triton import TritonBackend
from smart_kernels.geometry import Geometry
from smart_kernels.packing import BlockWeight

SCHEDULE = Schedule(pixels=128, channels=64, warps=4, stages=2, splits=1)


@pytest.fixture(autouse=True, scope="module")
def on_the_cpu():
    """Lets the backend take CPU tensors, which only the interpreter can run, and which it runs best unsplit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TritonBackend, "supports", lambda self, geometry, dtype, device: self.computes(geometry, dtype))
        patch.setattr(TritonBackend, "available", lambda self: True)
        patch.setattr(schedules, "find", lambda *_: SCHEDULE)
        yield


class Blocks(nn.Module):
    """A small network of both kinds of residual blocks, whose masks keep blocks of 16x16."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, 1, 1, bias=False)
        self.bn = DualNorm(16)
        self.layers = nn.Sequential(BasicBlock(16, 16, 2), PreActivation(16))
        self.layers[1].conv2 = MaskedConv(16, 16, 3, padding=1)
        self.classifier = nn.Linear(16, 5)
        for module in self.modules():
            if isinstance(module, MaskedConv):
                for name in paths.PATHS:
                    setattr(module, f"mask_{name}", block_mask(module.weight.shape, (16, 16), 0.6))

    def forward(self, x, path="clean"):
        with paths.running(paths.resolve(path)):
            x = F.relu(self.bn(self.stem(x)))
            return self.classifier(F.adaptive_avg_pool2d(self.layers(x), 1).flatten(1))


@pytest.fixture(scope="module")
def networks():
    torch.manual_seed(0)
    model, images = Blocks().eval(), torch.rand(3, 1, 5, 5)
    return model, swap(model, images, backend="triton"), images


@pytest.fixture
def swapped(networks):
    return networks[0], copy.deepcopy(networks[1]), networks[2]


def test_a_swapped_network_computes_the_same_on_every_path(swapped, tmp_path):
    model, sparse, images = swapped
    masked = [row for row in sparse.report() if row["pattern"] != "dense"]
    assert {row["backend"] for row in masked} == {"triton"}
    assert not sparse.uncaptured
    assert max(verify(model, sparse, images).values()) < 1e-5
    save(sparse, tmp_path / "blocks.safetensors")
    loaded = load(tmp_path / "blocks.safetensors")
    assert {row["backend"] for row in loaded.report()} == {row["backend"] for row in sparse.report()}
    assert torch.equal(loaded(images, path="adv"), sparse(images, path="adv"))


def test_samples_of_both_paths_pass_through_the_network_together(swapped, monkeypatch):
    _, sparse, images = swapped
    choice = torch.tensor([1, 0, 1])
    clean, adv = (sparse(images, path=path) for path in paths.PATHS)
    apart = torch.where(choice[:, None].bool(), adv, clean)
    monkeypatch.setattr(paths, "run_per_sample", None)  # what would split the batch
    torch.testing.assert_close(sparse(images, path=choice), apart, rtol=1e-4, atol=1e-5)
    together = sparse(images, path=torch.ones(3, dtype=torch.int64))
    torch.testing.assert_close(together, sparse(images, path="adv"), rtol=1e-4, atol=1e-5)
    for wrong in (torch.tensor([0, 2, 1]), torch.tensor([0, 1]), torch.tensor([0.0, 1.0, 1.0])):
        with pytest.raises((ValueError, TypeError), match="path tensor"):
            sparse(images, path=wrong)


def test_a_batch_is_split_where_a_layer_runs_one_path_at_a_time(swapped):
    _, sparse, images = swapped
    conv = sparse.net.get_submodule("layers.0.conv1")
    conv.use(pack(*conv.packed.unpack(), "dense"), "dense")
    assert not sparse._runs_samples()
    y = sparse(images, path=torch.tensor([1, 0, 1]))
    torch.testing.assert_close(y[1:2], sparse(images[1:2], path="clean"), rtol=1e-4, atol=1e-5)


def test_a_corrupt_state_is_refused_and_a_good_one_runs_again(swapped):
    _, sparse, images = swapped
    before = sparse(images, path="adv")
    state = {name: value.clone() for name, value in sparse.state_dict().items()}
    good = {name: value.clone() for name, value in state.items()}
    key = next(name for name in state if name.endswith("codes"))
    state[key][0] = 10**6
    with pytest.raises(ValueError, match=r"names no slab and tap.*nothing was loaded"):
        sparse.load_state_dict(state)
    assert torch.equal(sparse(images, path="adv"), before)
    packed = next(module for module in sparse.modules() if isinstance(module, BlockWeight))
    with pytest.raises(ValueError, match="corrupt"):
        packed.load_state_dict({**packed.state_dict(), "codes": packed.codes + 10**6})
    with pytest.raises(ValueError, match="corrupt data was loaded"):
        sparse(images, path="adv")
    sparse.load_state_dict(good)
    assert torch.equal(sparse(images, path="adv"), before)


def test_the_function_takes_each_sample_on_its_own_path():
    weight, masks = block_problem((32, 16, 3, 3), (16, 16))
    packed = pack(weight, masks, "block")
    x, residual, choice = torch.randn(4, 16, 5, 5), torch.randn(4, 32, 3, 3), torch.tensor([0, 1, 1, 0])
    bias, scale = {"clean": torch.randn(32), "adv": torch.randn(32)}, torch.randn(32)
    y = sparse_conv2d(x, packed, bias, path=choice, scale=scale, residual=residual, relu=True)
    for i, name in enumerate(masks):
        own = choice == i
        alone = sparse_conv2d(x[own], packed, bias, path=name, scale=scale, residual=residual[own], relu=True)
        torch.testing.assert_close(y[own], alone)


def test_finer_blocks_run_densely():
    weight, masks = block_problem((32, 16, 3, 3), (8, 16))
    packed, x = pack(weight, masks, "block"), torch.randn(1, 16, 5, 5)
    torch.testing.assert_close(sparse_conv2d(x, packed), F.conv2d(x, weight * masks["clean"]))
    with pytest.raises(ValueError, match="finer than the 16x16 the triton kernels take: run this weight on the dense"):
        BACKENDS["triton"].bind(packed, Geometry.of(weight.shape), "clean", None, None, False)


def operands(samples=False):
    weight, masks = block_problem((32, 16, 3, 3), (16, 16))
    packed, geometry = BlockWeight(weight, masks), Geometry.of(weight.shape, padding=1)
    x, rows = torch.randn(3, 16, 4, 4), (2,) if samples else ()
    order = paths.Samples.of(torch.tensor([1, 0, 1]), x) if samples else None
    return [
        x, packed.values, packed.codes, packed.rows, packed.starts, packed.segments, packed.rows_per_tile,
        geometry.numbers, *packed.segment_range("adv"), packed.items_per_tile("adv"), [],
        torch.randn(*rows, 32), torch.randn(*rows, 32), torch.randn(3, 32, 4, 4), True,
        order and order.order, order and order.first,
    ]  # fmt: skip


# Triton's interpreter cannot be traced, so what opcheck traces is tested with compiled kernels: test_triton_backend.py.
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")


@pytest.mark.parametrize("samples", [False, True])
def test_the_operators_keep_torchs_rules(samples):
    ops, arguments = torch.ops.smart_kernels, operands(samples)
    torch.library.opcheck(ops.sparse_conv2d_triton.default, tuple(arguments), test_utils=CHECKS)
    numbers = torch.randn(2, 32) if samples else torch.randn(32)
    arguments += [numbers, numbers, True]
    torch.library.opcheck(ops.sparse_conv2d_affine_triton.default, tuple(arguments), test_utils=CHECKS)


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (0, torch.randn(3, 15, 4, 4), "takes 16"),
        (0, torch.randn(3, 16, 4, 4, dtype=torch.float16), "convert one to the other"),
        (7, [32, 16, 3, 3, 0, 1, 1, 1, 1, 1, 1, 1, 1], "at least 1"),
        (7, [32, 16, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 2], "a multiple of the tile of 32"),
        (11, [32, 48, 4, 2, 1, 0, 0], "powers of two"),
        (11, [32, 32, 4, 0, 1, 0, 0], "at least 1 stage"),
        (11, [32, 32, 4, 1, 1, 0, 1], "with TMA, at least 2 stages"),
        (12, torch.randn(31), "scale or bias has shape"),
        (14, torch.randn(3, 32, 4, 5), "residual is"),
        (16, torch.zeros(3, dtype=torch.int64), "int32"),
    ],
)
def test_the_operator_itself_refuses_operands_that_do_not_fit(index, value, message):
    arguments = operands()
    if index == 7 and value[-1] == 2:
        arguments[0] = torch.randn(3, 32, 4, 4)
    if index == 16:
        arguments[12] = arguments[13] = None
    arguments[index] = value
    with pytest.raises((ValueError, TypeError), match=message):
        triton_ops.sparse_conv2d_triton(*arguments)


def test_inputs_too_large_for_the_indices_are_refused(monkeypatch):
    monkeypatch.setattr(triton_ops, "MAX_PIXELS", 47)
    with pytest.raises(ValueError, match="split the batch"):
        triton_ops.sparse_conv2d_triton(*operands())


def test_a_gradient_is_refused_rather_than_missing():
    weight, masks = block_problem((16, 16, 1, 1), (16, 16))
    x, packed = torch.randn(1, 16, 3, 3, requires_grad=True), BlockWeight(weight, masks)
    affine = Affine(torch.ones(16), torch.ones(16), False)
    results = BACKENDS["triton"].bind(packed, Geometry.of(weight.shape), "adv", None, None, True, affine)(x, None)
    for result in results:
        with pytest.raises(RuntimeError, match="compute no gradients: take them through the original network"):
            result.sum().backward()
