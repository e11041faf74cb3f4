"""Whole networks on a GPU: swapped, captured, replayed."""

import pytest
import torch

import smart
import smart_kernels
from smart import peers
from smart.bench import benchmark
from smart.twin import dense_twin_of
from smart_kernels.verify import TOLERANCE, relative_error

PATTERNS = ("block:16x16", "channel", "coupled", "unstructured")


@pytest.fixture(params=PATTERNS)
def model(request):
    return smart.create_model("resnet18", pattern=request.param, density=0.3).cuda().half().eval()


@pytest.fixture
def images():
    return torch.rand(4, 3, 32, 32).cuda().half()


def test_captured_networks_compute_what_the_original_does(model, images):
    sparse = smart_kernels.swap(model, images)
    smart_kernels.verify(model, sparse, images)
    sparse.capture(images)
    smart_kernels.verify(model, sparse, images)
    smart_kernels.verify(model, sparse, torch.rand_like(images))


@pytest.mark.parametrize("captured", [True, False], ids=["replays", "eager calls"])
def test_nothing_waits_on_the_host(model, images, captured):
    sparse = smart_kernels.swap(model, images, measure=False)
    if captured:
        sparse.capture(images)
    with torch.inference_mode():
        expected = {path: sparse(images, path=path) for path in sparse.paths}
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")  # raises where the host waits
        try:
            results = {path: sparse(images, path=path) for path in sparse.paths}
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(results[path], expected[path]) for path in sparse.paths)


def test_replays_on_two_streams_do_not_mix(model, images):
    sparse = smart_kernels.swap(model, images, measure=False).capture(images)
    inputs = [torch.rand_like(images) for _ in range(8)]
    with torch.inference_mode():
        expected = [sparse(x, path=sparse.paths[i % 2]).clone() for i, x in enumerate(inputs)]
        torch.cuda.synchronize()
        streams, found = [torch.cuda.Stream(), torch.cuda.Stream()], []
        for i, x in enumerate(inputs):
            with torch.cuda.stream(streams[i // 2 % 2]):
                found.append(sparse(x, path=sparse.paths[i % 2]))
        torch.cuda.synchronize()
    for y, truth in zip(found, expected, strict=True):
        assert torch.equal(y, truth)


def test_lambdas_that_layers_let_go_are_still_there(model, images):
    sparse = smart_kernels.swap(model, images, measure=False).capture(images, 0.5)
    expected = sparse(images, path=0.5)
    for i in range(12):
        sparse(images[:1], path=0.01 * (i + 1))
    torch.cuda.empty_cache()
    filler = [torch.full((2**20,), float("nan"), device="cuda") for _ in range(64)]
    assert torch.equal(sparse(images, path=0.5), expected)
    del filler


def test_samples_with_paths_of_their_own_are_captured(images):
    model = smart.create_model("resnet18", pattern="block:64x16", density=0.3).cuda().half().eval()
    sparse = smart_kernels.swap(model, images, backend="triton", measure=False)
    choice = torch.tensor([0, 1, 1, 0]).cuda()
    sparse.capture(images, choice)
    for each in (choice, 1 - choice):
        y = sparse(images, path=each)
        for i, path in enumerate(sparse.paths):
            assert relative_error(y[each == i], sparse(images, path=path)[each == i]) < TOLERANCE[torch.float16]


def test_new_weights_are_replayed(images):
    first, second = (
        smart.create_model("resnet18", pattern="block:64x16", density=0.3, seed=0).cuda().half().eval()
        for _ in range(2)
    )
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.mul_(1.01)
    sparse = smart_kernels.swap(first, images, measure=False, backend="triton").capture(images)
    sparse.load_state_dict(smart_kernels.swap(second, images, measure=False, backend="triton").state_dict())
    smart_kernels.verify(second, sparse, images)


def test_the_cudnn_peer(images):
    net = dense_twin_of(smart.create_model("resnet18", density=0.3).cuda().half().eval(), "clean")
    ready = peers.make("cudnn", net, images)
    with torch.inference_mode():
        assert relative_error(ready.call(images), net(images)) < TOLERANCE[torch.float16]


def test_rows_tell_memory_by_the_allocator(images):
    model = smart.create_model("resnet18", pattern="block:64x16", density=0.2).cuda().half().eval()
    sparse = smart_kernels.swap(model, images, backend="triton", measure=False)
    rows = {row["runner"]: row for row in benchmark(model, sparse, images, (4,), ("clean",), ("cudnn",), 0.1)}
    ours, dense = rows["smart_kernels"], rows["cudnn"]
    assert ours["backend"].endswith("(CUDA graph)")
    assert sparse.weight_bytes <= ours["weight_bytes"] < ours["peak_bytes"]
    assert ours["weight_bytes"] < 0.6 * dense["weight_bytes"]
