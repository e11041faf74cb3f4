"""What users do with a swapped network after the swap."""

import copy
import io
import threading

import pytest
import torch
from networks import ManyOutputs, MaskedConv, TwoPaths
from torch import nn

from smart_kernels import native, swap, verify
from smart_kernels.modules import SparseConv2d

needs_library = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))


def backends(sparse):
    return {row["backend"] for row in sparse.report() if row["pattern"] != "dense"}


@needs_library
def test_in_another_dtype_it_is_planned_anew_and_says_why(model, images):
    sparse = swap(model, images, strict=True)
    assert backends(sparse) == {"cpu"}
    for dtype in (torch.float64, torch.float16):
        moved = copy.deepcopy(sparse).to(dtype)
        assert backends(moved) == {"dense"}
        assert all(str(dtype).removeprefix("torch.") in row["why"] for row in moved.report()[1:])
        assert moved(images.to(dtype)).dtype == dtype
        verify(model, moved, images.to(dtype) if dtype == torch.float64 else images)
    assert backends(sparse) == {"cpu"}


@needs_library
def test_half_and_back_is_sparse_again(model, images):
    sparse = swap(model, images, strict=True).half()
    assert backends(sparse) == {"dense"}
    assert sparse(images.half()).dtype == torch.float16
    again = sparse.float()
    assert all(row["dense_us"] and row["sparse_us"] for row in again.report() if row["pattern"] != "dense")
    verify(model, again, images, tolerance=3e-2)


@needs_library
def test_a_move_that_changes_nothing_plans_nothing(images):
    sparse = swap(TwoPaths().eval(), images, strict=True)
    before, packed = sparse.report(), [id(m.packed) for m in sparse.modules() if isinstance(m, SparseConv2d)]
    sparse.to("cpu").float().cpu()
    assert sparse.report() == before
    assert [id(m.packed) for m in sparse.modules() if isinstance(m, SparseConv2d)] == packed


@needs_library
def test_a_part_moved_by_itself_is_refused_with_the_way_out(images):
    sparse = swap(TwoPaths().eval(), images, strict=True)
    sparse.net.double()
    with pytest.raises(RuntimeError, match=r"planned for the cpu backend was moved: .*move the whole swapped network"):
        sparse(images.double())


@needs_library
def test_replanning_for_another_input(model, images):
    sparse = swap(model, images, backend="dense")
    assert backends(sparse) == {"dense"}
    other = torch.rand(2, 1, 16, 12)
    report = sparse.replan(other, strict=True)
    assert {row["backend"] for row in report if row["pattern"] != "dense"} == {"cpu"}
    shapes = {name: conv.input_shape for name, conv in sparse.net.named_modules() if isinstance(conv, SparseConv2d)}
    assert shapes["stem"] == (2, 1, 16, 12)
    assert shapes["layers.2.conv1"] == (2, 24, 10, 8)  # its reflected padding included
    verify(model, sparse, other, 1e-5)
    verify(model, sparse, images, 1e-5)
    assert sparse.report() == report
    assert {row["backend"] for row in sparse.replan(images, backend="dense")} == {"dense"}
    verify(model, sparse, images, 1e-5)


def test_packing_again_loses_nothing(images):
    sparse = swap(TwoPaths().eval(), images)
    before = {path: sparse(images, path=path) for path in sparse.paths}
    for backend in ("dense", "auto"):
        sparse.replan(images, backend=backend)
    for name, conv in sparse.net.named_modules():
        if isinstance(conv, SparseConv2d):
            weight, masks = conv.packed.unpack()
            for path, mask in masks.items():
                assert torch.equal(conv.packed.dense(path), weight * mask), name
    for path, y in before.items():
        torch.testing.assert_close(sparse(images, path=path), y)


def test_pickled_it_is_the_same_network(images):
    sparse = swap(TwoPaths().eval(), images)
    file = io.BytesIO()
    torch.save(sparse, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for path in ("clean", "adv", 0.5):
        assert torch.equal(loaded(images, path=path), sparse(images, path=path))
    assert loaded.report() == sparse.report()


def test_outputs_may_be_dicts_and_tuples(images):
    model = ManyOutputs().eval()
    sparse = swap(model, images)
    assert max(verify(model, sparse, images).values()) < 1e-5
    y = sparse(images, path=torch.tensor([0, 1, 1, 0]))
    for i, path in enumerate(("clean", "adv", "adv", "clean")):
        alone = sparse(images[i : i + 1], path=path)
        torch.testing.assert_close(y["features"][i : i + 1], alone["features"])
        torch.testing.assert_close(y["maps"][1][i : i + 1], alone["maps"][1])


def test_a_mixed_batch_costs_the_sum_of_its_parts(images):
    """Each sample is computed once: no path runs on samples of the other."""
    sparse, seen = swap(TwoPaths().eval(), images, measure=False), []
    sparse.net.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((len(args[0]), kwargs["path"])), with_kwargs=True
    )
    sparse(images, path=torch.tensor([0, 1, 1, 1]))
    sparse(images, path=torch.tensor([1, 1, 1, 1]))
    assert seen == [(1, "clean"), (3, "adv"), (4, "adv")]


def test_a_shared_layer_is_in_memory_once(images):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = MaskedConv(1, 1, 3, padding=1)

        def forward(self, x):
            return torch.relu(self.conv(x)) + self.conv(x * 2)

    model = Twice().eval()
    sparse = swap(model, images)
    verify(model, sparse, images, 1e-5)
    first, second = sparse.report()
    assert (first["name"], second["name"]) == ("conv", "conv_2")
    assert second["bytes"] == 0
    assert sparse.weight_bytes == first["bytes"]
    twin = copy.deepcopy(sparse)
    assert twin.weight_bytes == first["bytes"]
    assert twin.double().weight_bytes == 9 * 2 * 8  # dense copies of both paths, once


def test_threads_may_swap_and_run_at_once(images):
    model, wrong = TwoPaths().eval(), []

    def work():
        sparse = swap(model, images)
        for path in sparse.paths:
            if not torch.allclose(sparse(images, path=path), model(images, path=path), atol=1e-4):
                wrong.append(path)

    with torch.no_grad():
        threads = [threading.Thread(target=work) for _ in range(4)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    assert not wrong
