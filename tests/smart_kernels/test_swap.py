import copy
import threading

import pytest
import torch
from networks import TwoPaths
from torch import nn
from torch.nn.utils import prune

import smart_kernels
from smart_kernels import VerificationError, load, native, save, swap, verify
from smart_kernels.report import format_table
from smart_kernels.verify import relative_error

BACKENDS = ["auto", "dense", *(["cpu"] if native.missing() is None else [])]
TOLERANCE = 1e-5


@pytest.fixture
def images():
    return torch.rand(5, 1, 9, 9)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_swapped_network_computes_the_same(model, images, backend):
    sparse = swap(model, images, backend=backend)
    assert max(verify(model, sparse, images, TOLERANCE).values()) < TOLERANCE
    assert set(verify(model, sparse, images)) == {"clean", "adv"}
    # Another batch and another size than the example's.
    other = torch.rand(2, 1, 14, 11)
    verify(model, sparse, other, TOLERANCE)


def test_a_lambda_runs_the_mixed_network(model, images):
    sparse = swap(model, images)
    for lam in (0.3, 0.75):
        torch.testing.assert_close(sparse(images, path=lam), model(images, path=lam))
    assert torch.equal(sparse(images, path=0.0), sparse(images, path="clean"))
    assert torch.equal(sparse(images, path=1), sparse(images, path="adv"))


def test_each_sample_runs_as_if_alone_on_its_path(model, images):
    sparse, choice = swap(model, images), torch.tensor([1, 0, 0, 1, 1])
    y = sparse(images, path=choice)
    for i, c in enumerate(choice):
        alone = sparse(images[i : i + 1], path=("clean", "adv")[c])
        torch.testing.assert_close(y[i : i + 1], alone)


def test_the_original_is_untouched(model, images):
    model.train()
    before = copy.deepcopy(model.state_dict())
    swap(model, images)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_switching_paths_repacks_nothing(images):
    sparse = swap(TwoPaths().eval(), images)
    held = [buffer.data_ptr() for buffer in sparse.buffers()]
    sparse(images, path="clean")
    sparse(images, path="adv")
    assert [buffer.data_ptr() for buffer in sparse.buffers()] == held


def test_threads_may_run_different_paths_at_once(model, images):
    sparse, outputs = swap(model, images), {}
    expected = {path: sparse(images, path=path) for path in sparse.paths}

    def work(path):
        outputs[path] = [sparse(images, path=path) for _ in range(20)]

    threads = [threading.Thread(target=work, args=(path,)) for path in sparse.paths]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    for path in sparse.paths:
        assert all(torch.equal(y, expected[path]) for y in outputs[path])


@pytest.mark.parametrize("removed", [False, True], ids=["hooks", "removed"])
def test_a_network_pruned_by_torch_swaps_as_one_path(images, removed):
    model = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    for conv in (model[0], model[3]):
        prune.random_unstructured(conv, "weight", 0.8)
        if removed:
            prune.remove(conv, "weight")
    sparse = swap(model, images)
    assert sparse.paths == ("clean",)
    assert max(verify(model, sparse, images).values()) < TOLERANCE
    assert [round(row["density"]["clean"], 1) for row in sparse.report()] == [0.2, 0.2]
    with pytest.raises(ValueError, match="this network has 'clean'"):
        sparse(images, path="adv")


def test_new_values_reach_paths_that_already_ran(images):
    used = swap(TwoPaths().eval(), images, backend=BACKENDS[-1])
    fresh = copy.deepcopy(used)
    before = {path: used(images, path=path) for path in ("clean", 0.5)}
    changed = {k: v * 1.5 if v.is_floating_point() else v for k, v in used.state_dict().items()}
    for network in (used, fresh):
        network.load_state_dict(changed)
    for path, old in before.items():
        assert torch.equal(used(images, path=path), fresh(images, path=path))
        assert not torch.allclose(used(images, path=path), old)


@pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))
def test_a_state_of_other_masks_is_refused(images):
    first, second = (swap(TwoPaths().eval(), images, backend=BACKENDS[-1]) for _ in range(2))
    before = {path: first(images, path=path) for path in first.paths}
    with pytest.raises(ValueError, match=r"state of .*: .*(other masks|corrupt).*; nothing was loaded"):
        first.load_state_dict(second.state_dict())
    assert all(torch.equal(first(images, path=path), y) for path, y in before.items())


def test_the_report_explains_every_convolution(images):
    sparse = swap(TwoPaths().eval(), images)
    rows = sparse.report()
    assert [row["name"] for row in rows][:2] == ["stem", "layers.0.conv1"]
    assert rows[0]["pattern"] == "dense"
    assert rows[0]["why"].endswith("no path has zeros to skip")
    assert all(row["why"] for row in rows)
    if native.missing() is None:
        assert all(row["dense_us"] > 0 and row["sparse_us"] > 0 for row in rows[1:])
    for row in rows:
        if row["backend"] == "dense" and row["dense_us"] is not None:
            assert row["dense_us"] <= row["sparse_us"]
    table = format_table(rows)
    assert all(row["name"] in table for row in rows)


def test_half_precision_runs_dense_and_says_why(images):
    model = TwoPaths().eval()
    sparse = swap(model, images, dtype=torch.float16)
    assert sparse(images.half()).dtype == torch.float16
    verify(model, sparse, images)
    assert {row["backend"] for row in sparse.report()} == {"dense"}
    if native.missing() is None:
        assert any("float16" in row["why"] for row in sparse.report())


@pytest.mark.parametrize("runs_programs", [False, True], ids=["layer by layer", "programs"])
def test_bfloat16_weights_take_half_the_memory(model, images, runs_programs, tmp_path):
    if native.missing() is not None:
        pytest.skip(native.missing())
    full, sparse = (swap(model, images, "cpu", dtype=dtype, measure=False) for dtype in (None, torch.bfloat16))
    if sparse.uncaptured and runs_programs:
        pytest.skip("a network swapped module by module runs no programs")
    sparse.runs_programs = runs_programs
    assert {row["backend"] for row in sparse.report() if row["pattern"] != "dense"} == {"cpu"}
    sizes = [sum(m.values.nbytes for m in net.modules() if hasattr(m, "segments")) for net in (full, sparse)]
    assert sizes[0] == 2 * sizes[1]
    x = images.bfloat16()
    for path in ("clean", "adv", 0.3, torch.tensor([0, 1, 0, 1, 1])):
        y = sparse(x, path=path)
        assert y.dtype == torch.bfloat16
        assert relative_error(y, full(x.float(), path=path)) < 0.05
    if not sparse.uncaptured:
        save(sparse, tmp_path / "m.safetensors")
        assert torch.equal(load(tmp_path / "m.safetensors")(x), sparse(x))


@pytest.mark.parametrize("runs_programs", [False, True], ids=["layer by layer", "programs"])
def test_it_runs_under_autocast(runs_programs):
    class Mixed(nn.Module):
        """Autocast gives the second convolution bfloat16, and the third a sum of it and float32."""

        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))

        def forward(self, x):
            y = self.b(torch.matmul(x, x.new_ones(6, 6) / 6))
            return self.c(self.a(x) + y) + y

    model, x = Mixed().eval(), torch.rand(2, 3, 6, 6)
    for conv in (model.a, model.b, model.c):
        conv.weight.data.mul_(torch.rand_like(conv.weight) < 0.3)
    sparse = swap(model, x, BACKENDS[-1], measure=False)
    sparse.runs_programs = runs_programs
    with torch.no_grad(), torch.autocast("cpu"):
        assert relative_error(sparse(x), model(x)) < 3e-2


def test_it_compiles_into_one_graph(fresh_compiler, images):
    sparse = swap(TwoPaths().eval(), images)
    compiled = torch.compile(sparse, fullgraph=True, backend="aot_eager")
    for path in ("clean", "adv"):
        torch.testing.assert_close(compiled(images, path=path), sparse(images, path=path))


def test_a_copy_and_a_state_dict_behave(model, images):
    sparse = swap(model, images)
    twin = copy.deepcopy(sparse)
    assert torch.equal(twin(images, path="adv"), sparse(images, path="adv"))
    for buffer in twin.buffers():
        if buffer.is_floating_point():
            buffer.zero_()
    twin.load_state_dict(sparse.state_dict())
    assert torch.equal(twin(images, path="adv"), sparse(images, path="adv"))
    assert not sparse.train().training


def test_verify_notices_a_wrong_network(model, images):
    sparse = swap(model, images)
    state = sparse.state_dict()
    name = next(key for key in state if key.endswith((".weight_clean", "stem.packed.values")))
    sparse.load_state_dict({**state, name: state[name] * 1.01})
    with pytest.raises(VerificationError, match="differs from the original by clean"):
        verify(model, sparse, images)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": nn.Sequential(nn.Flatten(), nn.Linear(81, 2))}, "no convolution"),
        ({"model": "resnet18"}, "a torch.nn.Module is needed"),
        ({"example": torch.rand(1, 9, 9)}, r"\(N, C, H, W\) is needed"),
        ({"example": torch.zeros(1, 1, 9, 9, dtype=torch.uint8)}, "float image batch"),
        ({"backend": "tpu"}, "unknown backend 'tpu'"),
    ],
)
def test_what_cannot_be_swapped_is_refused(images, arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        swap(**{"model": TwoPaths(), "example": images} | arguments)


def test_an_example_the_model_rejects_is_refused(model):
    with pytest.raises(ValueError, match=r"does not accept the example, \(2, 3, 9, 9\), float32 on cpu: .*channels"):
        swap(model, torch.rand(2, 3, 9, 9))


def test_the_library_knows_nothing_of_the_training_package():
    import subprocess
    import sys

    code = "import sys, smart_kernels; sys.exit(any(n == 'smart' or n.startswith('smart.') for n in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    assert smart_kernels.__version__
