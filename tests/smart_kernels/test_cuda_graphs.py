"""CUDA graphs of whole networks, on a CPU: what is captured when, and what replays read and write.

A recorder stands in for CUDA: its replay runs the recorded call again on the same memory, as a graph does. That a GPU
can capture the kernels is for tests/gpu.
"""

import copy
import threading

import pytest
import torch
from networks import ManyOutputs, TwoPaths
from recorded_graphs import Recorder

from smart_kernels import cuda_graphs, paths, swap
from smart_kernels.modules import SparseConv2d


@pytest.fixture
def cuda(monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(cuda_graphs, "Cuda", lambda: recorder)
    return recorder


@pytest.fixture
def images():
    return torch.rand(4, 1, 9, 9)


@pytest.fixture
def sparse(images):
    return swap(TwoPaths().eval(), images, measure=False)


def replays(cuda):
    return cuda.log.count("replay")


def test_a_captured_network_computes_the_same_and_results_stay(cuda, sparse, images):
    other = torch.rand(4, 1, 9, 9)
    expected = {(i, path): sparse(x, path=path) for i, x in enumerate((images, other)) for path in ("clean", "adv")}
    assert sparse.capture(images) is sparse and cuda.captured == 2
    before = replays(cuda)
    found = {(i, path): sparse(x, path=path) for i, x in enumerate((images, other)) for path in ("clean", "adv")}
    assert replays(cuda) == before + 4 and cuda.captured == 2
    for key, y in expected.items():
        torch.testing.assert_close(found[key], y, msg=str(key))
    assert len({y.data_ptr() for y in found.values()}) == 4


def test_lambdas_have_graphs_of_their_own(cuda, sparse, images):
    expected = {path: sparse(images, path=path) for path in (0.3, 0.6)}
    sparse.capture(images, 0.3)
    torch.testing.assert_close(sparse(images, path=0.3), expected[0.3])
    before = replays(cuda)
    torch.testing.assert_close(sparse(images, path=0.6), expected[0.6])
    assert replays(cuda) == before
    sparse.capture(images, 0)  # the same as its name
    sparse(images, path="clean")
    assert replays(cuda) > before + 1 and cuda.captured == 2


def test_graphs_hold_on_to_what_layers_let_go(cuda, sparse, images):
    sparse.capture(images, 0.5)
    kept = [conv._bound[0.5] for conv in sparse.modules() if isinstance(conv, SparseConv2d)]
    for i in range(12):
        sparse(torch.rand(1, 1, 9, 9), path=0.01 * (i + 1))
    assert all(0.5 not in conv._bound for conv in sparse.modules() if isinstance(conv, SparseConv2d))
    (graph,) = sparse._captured._graphs.values()
    assert [bound[0.5] for bound in graph.held] == kept


def test_replays_follow_each_other_whatever_the_stream(cuda, sparse, images):
    sparse.capture(images, "clean")
    cuda.log.clear()
    sparse(images)
    sparse(images)
    assert cuda.log == ["wait", "replay", "record"] * 2


def test_one_pool_and_one_input_serve_all_paths(cuda, sparse, images):
    sparse.capture(images)
    sparse.capture(torch.rand(2, 1, 9, 9))
    assert cuda.log.count("pool") == 1
    graphs = sparse._captured._graphs
    assert len(graphs) == 4 and len({id(graph.x) for graph in graphs.values()}) == 2
    assert all(graph.x.is_contiguous(memory_format=torch.channels_last) for graph in graphs.values())


@pytest.mark.parametrize(
    "call",
    [
        lambda sparse, x: sparse(x[:2]),
        lambda sparse, x: sparse(x.clone().requires_grad_()),
        lambda sparse, x: sparse(torch.nn.Parameter(x)),
        lambda sparse, x: sparse(x, path=torch.tensor([0, 1, 1, 0])),
        lambda sparse, x: sparse(x, path="adv"),
    ],
    ids=["shape", "gradients", "parameter", "samples", "path"],
)
def test_other_calls_run_as_ever(cuda, sparse, images, call):
    expected = call(sparse, images)
    sparse.capture(images, "clean")
    before = replays(cuda)
    torch.testing.assert_close(call(sparse, images), expected)
    assert replays(cuda) == before and cuda.captured == 1


def test_autocast_and_other_captures_run_as_ever(cuda, images):
    sparse = swap(TwoPaths().eval(), images, backend="dense")
    sparse.capture(images, "clean")
    before = replays(cuda)
    with torch.autocast("cpu", torch.bfloat16):
        sparse(images)
    cuda.capturing = True
    sparse(images)
    cuda.capturing = False
    assert replays(cuda) == before


def test_inference_mode_and_others_share_graphs(cuda, sparse, images):
    with torch.inference_mode():
        sparse.capture(images, "clean")
        inside = sparse(images.clone())
    outside = sparse(images)
    assert inside.is_inference() and not outside.is_inference()
    assert torch.equal(inside, outside)
    (outside * 2).sum()


def test_new_weights_are_captured_when_called_for(cuda, images):
    first = swap(TwoPaths().eval(), images, backend="dense")
    state = {key: value + 1 if key.startswith("net.classifier") else value for key, value in first.state_dict().items()}
    first.capture(images)
    before = first(images)
    first.load_state_dict(state)
    assert not first._captured._graphs and "synchronize" in cuda.log
    changed = first(images)
    assert cuda.captured == 3 and not torch.allclose(before, changed)
    first.half()
    assert not first._captured._graphs
    first(images.half())
    assert cuda.captured == 4


def test_replanning_runs_layers_and_drops_graphs(cuda, sparse, images):
    sparse.capture(images, "clean")
    before = replays(cuda)
    report = sparse.replan(images, backend="dense")
    assert replays(cuda) == before and {row["backend"] for row in report} == {"dense"}
    assert not sparse._captured._graphs
    sparse(images)
    assert cuda.captured == 2


def test_the_oldest_graphs_give_way(cuda, sparse, images, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "MAX_GRAPHS", 3)
    for batch in (1, 2, 3, 4):
        sparse.capture(torch.rand(batch, 1, 9, 9), "clean")
    sparse.capture(torch.rand(2, 1, 9, 9), "clean")  # renewed
    sparse.capture(torch.rand(5, 1, 9, 9), "clean")
    assert [key[1][0] for key in sparse._captured._graphs] == [2, 4, 5]


def test_what_cannot_be_captured_is_said_once_and_runs(cuda, sparse, images):
    expected = sparse(images)
    cuda.fails = True
    with pytest.raises(
        ValueError, match="cannot be captured as a CUDA graph: operation not permitted when stream is cap"
    ):
        sparse.capture(images)
    torch.testing.assert_close(sparse(images), expected)
    cuda.fails = False
    sparse.capture(images, "clean")
    sparse._forget()
    cuda.fails = True
    for _ in range(2):  # found out at the first call, and not tried again at the second
        torch.testing.assert_close(sparse(images), expected)
    assert cuda.log.count("warm up") == 3


def test_a_bad_input_is_told_as_ever(cuda, sparse, images):
    with pytest.raises(RuntimeError):
        sparse.capture(torch.rand(4, 2, 9, 9))
    assert not sparse._captured._graphs


def test_on_a_cpu_there_are_none(sparse, images):
    with pytest.raises(ValueError, match=r"an example on cpu: give a plain tensor on an NVIDIA GPU"):
        sparse.capture(images)
    with pytest.raises(ValueError, match="split here"):
        sparse.capture(images, torch.tensor([0, 1, 1, 0]))
    sparse(images)


def test_samples_with_paths_of_their_own(cuda, sparse, images, monkeypatch):
    def run(x, path):
        assert isinstance(path, paths.Samples)
        return torch.stack([x.flatten(1).sum(1) * (1 + path.choice), path.choice], dim=1)

    monkeypatch.setattr(sparse, "_runs_samples", lambda: True)
    monkeypatch.setattr(sparse, "_run", run)
    sparse.capture(images, torch.tensor([0, 1, 1, 0]))
    for choice in (torch.tensor([1, 0, 0, 0]), torch.tensor([True, True, False, False])):
        before = replays(cuda)
        y = sparse(images, path=choice)
        assert replays(cuda) == before + 1
        assert torch.equal(y, run(images, paths.Samples.of(choice, images)))
    before = replays(cuda)
    with pytest.raises(ValueError, match="path tensor has shape"):
        sparse(images, path=torch.tensor([0, 1]))
    with pytest.raises(TypeError, match="give integers"):
        sparse(images, path=torch.rand(4))
    assert replays(cuda) == before


def test_outputs_of_any_nesting(cuda, images):
    sparse = swap(ManyOutputs().eval(), images)
    expected = sparse(images)
    sparse.capture(images)
    y = sparse(images)
    torch.testing.assert_close(y, expected)
    assert y["maps"][0].data_ptr() != sparse(images)["maps"][0].data_ptr()


def test_copies_have_no_graphs(cuda, sparse, images):
    sparse.capture(images)
    twin = copy.deepcopy(sparse)
    before = replays(cuda)
    torch.testing.assert_close(twin(images), sparse(images))
    assert twin._captured is None and replays(cuda) == before + 1


def test_threads_share_graphs(cuda, sparse, images):
    inputs = torch.rand(6, *images.shape)
    expected = [sparse(x, path="adv") for x in inputs]
    sparse.capture(images)
    wrong = []

    def work():
        for x, y in zip(inputs, expected, strict=True):
            if not torch.allclose(sparse(x, path="adv"), y, atol=1e-5):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not wrong


def test_torch_compile_sees_no_graphs(fresh_compiler, cuda, sparse, images):
    sparse.capture(images, "clean")
    before = replays(cuda)
    compiled = torch.compile(sparse, backend="eager", fullgraph=True)
    with torch.no_grad():
        y = compiled(images)
    assert replays(cuda) == before
    torch.testing.assert_close(y, sparse(images))


def test_a_call_repeated_is_one_launch(cuda):
    total = torch.zeros(())
    replay = cuda_graphs.repeated(lambda: total.add_(1), 5)
    before = int(total)
    replay()
    assert int(total) == before + 5 and cuda.log == ["warm up", "replay"]
