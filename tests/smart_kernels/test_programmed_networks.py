"""Networks that run as programs: when they do, and what becomes of them."""

import copy
import gc

import pytest
import torch
from forks import holds_in_fork, needs_fork
from networks import MaskedConv, TwoPaths
from programmed import example, forced, programs_of
from torch import nn

from smart_kernels import load, lowering, model, native, save, swap, verify
from smart_kernels.backends import BACKENDS
from smart_kernels.modules import SparseConv2d

pytestmark = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))


def test_networks_that_write_in_place_are_left_as_they_are():
    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = MaskedConv(1, 4, 3), MaskedConv(4, 4, 3, padding=1)

        def forward(self, x):
            y = self.a(x)
            z = self.b(y)
            y.add_(1)
            return z * y

    model, x = Writes().eval(), torch.rand(2, 1, 8, 8)
    sparse = swap(model, x, strict=True)
    assert lowering.rewrite(sparse.net, x) is None
    sparse.choose_programs(x)
    assert not sparse.runs_programs


def test_one_layer_is_no_program():
    model, x = nn.Sequential(MaskedConv(1, 4, 3), nn.GELU(), MaskedConv(4, 4, 3)).eval(), torch.rand(2, 1, 8, 8)
    assert lowering.rewrite(swap(model, x, backend="cpu").net, x) is None


def test_layers_of_other_backends_join_only_to_be_moved():
    model, x = TwoPaths().eval(), example(TwoPaths, 2)
    sparse = swap(model, x, backend="dense")
    assert lowering.rewrite(sparse.net, x) is None
    rewritten = lowering.rewrite(sparse.net, x, move=True)
    assert {conv for conv in sparse.net.modules() if isinstance(conv, SparseConv2d)} >= set(rewritten.moves)
    torch.testing.assert_close(rewritten.graph(x, path="adv"), sparse(x, path="adv"))


@pytest.fixture
def ways(monkeypatch):
    """Says how long each way to run a network takes: layer by layer, with programs, with layers moved into programs."""
    from smart_kernels import model as module

    times: list[float] = []

    def interleave(calls, budget_s):
        for call in calls.values():
            call()
        assert len(calls) == len(times)
        return {net: [seconds] for net, seconds in zip(calls, times, strict=True)}

    monkeypatch.setattr(module, "interleave", interleave)
    return times


def test_the_faster_way_is_taken(ways):
    x = example(TwoPaths, 2)
    sparse = swap(TwoPaths().eval(), x, backend="cpu", measure=False)
    ways[:] = [2.0, 1.0]
    sparse.choose_programs(x)
    assert sparse.runs_programs
    ways[:] = [1.0, 2.0]
    sparse.choose_programs(x)
    assert not sparse.runs_programs


def test_layers_move_where_the_whole_network_is_faster_for_it(ways, tmp_path):
    model, x = TwoPaths().eval(), example(TwoPaths, 2)
    sparse = swap(model, x, backend="cpu", measure=False)
    expected = sparse(x, path="adv")
    name, conv = next((name, m) for name, m in sparse.net.named_modules() if isinstance(m, SparseConv2d))
    row = next(row for row in sparse._rows if row.name == name)

    def make_dense():
        conv.use(BACKENDS["dense"].pack(*conv.packed.unpack()), "dense")
        row.backend, row.why, row.bytes = "dense", "dense is faster here", conv.packed.nbytes

    for seconds in ([1.0, 2.0, 3.0], [2.0, 1.0, 3.0]):
        make_dense()
        ways[:] = seconds
        sparse.choose_programs(x)
        assert (sparse.runs_programs, conv.backend) == (seconds[0] == 2.0, "dense")
        torch.testing.assert_close(sparse(x, path="adv"), expected)

    ways[:] = [2.0, 3.0]  # not asked to move
    sparse.choose_programs(x, move=False)
    assert not sparse.runs_programs

    ways[:] = [3.0, 2.0, 1.0]
    sparse.choose_programs(x)
    assert (sparse.runs_programs, conv.backend) == (True, "cpu")
    (told,) = [row for row in sparse.report() if row["name"] == name]
    assert (told["backend"], told["bytes"]) == ("cpu", conv.packed.nbytes)
    assert told["why"] == "the whole network is faster so; alone: dense is faster here"
    assert sum(row["bytes"] for row in sparse.report()) == sparse.weight_bytes
    torch.testing.assert_close(sparse(x, path="adv"), expected)
    save(sparse, tmp_path / "m.safetensors")
    torch.testing.assert_close(load(tmp_path / "m.safetensors")(x, path="adv"), expected)


def test_they_follow_new_values_copies_and_moves():
    model, x = TwoPaths().eval(), example(TwoPaths, 3)
    sparse = forced(model, x)
    before = sparse(x)
    assert sparse._graphs
    assert not any("program" in key for key in sparse.state_dict())
    assert copy.deepcopy(sparse)._graphs == {}
    torch.testing.assert_close(copy.deepcopy(sparse)(x), before)

    changed = {k: v * 1.5 if v.is_floating_point() else v for k, v in sparse.state_dict().items()}
    sparse.load_state_dict(changed)
    after = sparse(x)
    sparse.runs_programs = False
    torch.testing.assert_close(after, sparse(x))
    assert not torch.allclose(after, before)

    sparse.runs_programs = True
    moved = sparse.double()
    assert not moved.runs_programs
    assert moved(x.double()).dtype == torch.float64


def test_a_network_that_runs_them_can_be_planned_anew():
    model, x = TwoPaths().eval(), example(TwoPaths, 3)
    sparse = forced(model, x)
    sparse(x)
    report = sparse.replan(torch.rand(2, 1, 30, 20), measure=False)
    assert all(conv.input_shape[0] == 2 for conv in sparse.net.modules() if isinstance(conv, SparseConv2d))
    assert report
    assert sparse.runs_programs
    assert max(verify(model, sparse, x).values()) < 1e-5


def test_a_loaded_network_runs_them(tmp_path):
    model, x = TwoPaths().eval(), example(TwoPaths, 3)
    sparse = forced(model, x)
    save(sparse, tmp_path / "m.safetensors")
    loaded = load(tmp_path / "m.safetensors")
    assert loaded.runs_programs
    torch.testing.assert_close(loaded(x, path="adv"), sparse(x, path="adv"))
    assert programs_of(loaded, x)


@needs_fork
def test_a_forked_process_goes_on():
    model, x = TwoPaths().eval(), example(TwoPaths, 1)
    sparse = forced(model, x)

    def check(expected):
        return torch.equal(sparse(x), expected) and torch.equal(forced(model, x)(x), expected)

    assert holds_in_fork(check, prepare=lambda: sparse(x))


def test_programs_are_freed_with_their_network():
    model, x = TwoPaths().eval(), example(TwoPaths, 2)
    sparse = forced(model, x)
    sparse(x)
    (program, *_) = programs_of(sparse, x)
    number = program._handles["clean"].number
    stage = torch.rand(program.shapes[0])
    assert torch.ops.smart_kernels.program_run(number, [stage])
    del program, sparse
    gc.collect()
    with pytest.raises(RuntimeError, match=f"no program {number}"):
        torch.ops.smart_kernels.program_run(number, [stage])


def test_one_that_is_freed_while_a_network_is_traced_leaves_no_trace_in_it():
    model, x = TwoPaths().eval(), example(TwoPaths, 2)
    kept = []

    class FreesOne(nn.Module):
        def forward(self, x):
            kept.clear()
            return x + 1

    sparse = forced(model, x)
    sparse(x)
    kept += programs_of(sparse, x)
    del sparse
    traced = torch.export.export(FreesOne(), (x,))
    assert not kept
    assert [node.op for node in traced.graph.nodes] == ["placeholder", "call_function", "output"]


def test_a_new_shape_takes_the_place_of_the_oldest_only(monkeypatch):
    sparse = swap(TwoPaths().eval(), torch.rand(2, 1, 9, 9), backend="cpu", measure=False)
    sparse.runs_programs = True
    planned = []
    rewrite = lowering.rewrite
    monkeypatch.setattr(model, "MAX_GRAPHS", 2)
    monkeypatch.setattr(lowering, "rewrite", lambda net, x: planned.append(len(x)) or rewrite(net, x))
    for batch in (1, 2, 3, 2, 3, 1):
        sparse(torch.rand(batch, 1, 9, 9))
    assert planned == [1, 2, 3, 1]
