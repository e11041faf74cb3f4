"""Programs of torch.export: what they compute and what they hold."""

from pathlib import Path

import pytest
import torch
from exporting import BACKENDS, PACKAGE, PATHS, TOLERANCE, in_fresh_process, payloads
from networks import MaskedConv, TwoPaths
from torch import nn

from smart_kernels import VerificationError, export, load_exported, native, paths, swap
from smart_kernels.verify import relative_error


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_file_holds_both_paths_for_any_batch(images, tmp_path, backend):
    sparse, file = swap(TwoPaths().eval(), images, backend=backend), tmp_path / "net.pt2"
    errors = export(sparse, images, file)
    assert set(errors) == set(PATHS) and max(errors.values()) < TOLERANCE
    program = load_exported(file)
    assert (program.format, program.paths, program.shape) == ("pt2", PATHS, (None, 1, 9, 9))
    for batch in (1, 2, 7, 16):
        x = torch.rand(batch, 1, 9, 9)
        for path in PATHS:
            assert relative_error(program(x, path=path), sparse(x, path=path)) < TOLERANCE
    assert torch.equal(program(images), program(images, path="clean"))
    assert torch.equal(program(images, path=1), program(images, path="adv"))
    choice = torch.tensor([1, 0, 0, 1])
    torch.testing.assert_close(program(images, path=choice), sparse(images, path=choice))


def test_weights_are_stored_once(exported, images, tmp_path):
    sparse, file = exported
    stored = payloads(file)
    large = [content for content in stored if len(content) > 1000]
    assert len(large) > 5 and len(set(large)) == len(large)
    small = 2 * 4 * 24 * len(list(sparse.modules()))  # a bias that both paths share is stored for each
    assert sum(map(len, stored)) <= sparse.total_bytes + small
    export(sparse, images, tmp_path / "one.pt2", "adv")
    one = sum(map(len, payloads(tmp_path / "one.pt2")))
    assert one < 0.65 * sum(map(len, stored))


@pytest.mark.parametrize("path", ["adv", 0.3, 0.0])
def test_a_program_of_one_path(sparse, images, tmp_path, path):
    export(sparse, images, tmp_path / "one.pt2", path)
    program = load_exported(tmp_path / "one.pt2")
    assert program.paths == ("clean" if path == 0 else path,)
    for batch in (1, 7):
        x = torch.rand(batch, 1, 9, 9)
        assert relative_error(program(x), sparse(x, path=path)) < TOLERANCE
        assert torch.equal(program(x, path=program.paths[0]), program(x))
    for other in (0.7, "robust", torch.tensor([0, 1, 0, 1])):
        with pytest.raises(ValueError, match=f"was exported for path {program.paths[0]!r} alone"):
            program(images, path=other)


def test_a_network_of_one_path_needs_no_choice(images, tmp_path):
    conv = nn.Conv2d(1, 4, 3)
    conv.weight.data.mul_(torch.rand_like(conv.weight) < 0.3)
    sparse = swap(nn.Sequential(conv, nn.ReLU()).eval(), images)
    export(sparse, images, tmp_path / "net.pt2")
    program = load_exported(tmp_path / "net.pt2")
    assert relative_error(program(images), sparse(images)) < TOLERANCE
    assert torch.export.load(tmp_path / "net.pt2").module()(images).shape == (4, 4, 7, 7)


@pytest.mark.parametrize("batch", [3, 16])
def test_a_batch_of_fixed_size(sparse, tmp_path, batch):
    images = torch.rand(batch, 1, 9, 9)
    export(sparse, images, tmp_path / "net.pt2", dynamic_batch=False)
    program = load_exported(tmp_path / "net.pt2")
    assert relative_error(program(images, path="adv"), sparse(images, path="adv")) < TOLERANCE
    with pytest.raises(ValueError, match=rf"input is \(2, 1, 9, 9\).* takes \({batch}, 1, 9, 9\), float32 on cpu"):
        program(images[:2])


def test_half_precision(images, tmp_path):
    sparse = swap(TwoPaths().eval(), images, dtype=torch.bfloat16)
    export(sparse, images.bfloat16(), tmp_path / "net.pt2")
    assert load_exported(tmp_path / "net.pt2")(images.bfloat16(), path="adv").dtype == torch.bfloat16


def test_a_fresh_process_needs_only_the_operators(exported, images, tmp_path):
    sparse, file = exported
    images.numpy().tofile(tmp_path / "x")
    code = """
import sys, numpy, torch, smart_kernels
x = torch.from_numpy(numpy.fromfile(sys.argv[2], "f4")).reshape(4, 1, 9, 9)
program = torch.export.load(sys.argv[1]).module()
for second in (False, True):
    program(x, torch.tensor(second)).numpy().tofile(f"{sys.argv[2]}{int(second)}")
assert "networks" not in sys.modules
"""
    in_fresh_process(code, file, tmp_path / "x")
    for i, path in enumerate(PATHS):
        y = torch.frombuffer(bytearray((tmp_path / f"x{i}").read_bytes()), dtype=torch.float32).view(4, 10)
        assert relative_error(y, sparse(images, path=path)) < TOLERANCE


def test_files_tell_nothing_of_the_example_or_the_machine(sparse, tmp_path):
    images = torch.rand(4, 1, 9, 9)
    export(sparse, images, tmp_path / "net.pt2")
    content = (tmp_path / "net.pt2").read_bytes()
    assert b"sparse_conv2d_cpu" in content or native.missing()
    assert images.numpy().tobytes()[:64] not in content
    for folder in (PACKAGE, Path(__file__).parent, Path(torch.__file__).parent, tmp_path):
        assert str(folder).encode() not in content


class PathOfItsOwn(nn.Module):
    """Cannot be one graph, but each path can be a program."""

    def __init__(self):
        super().__init__()
        self.conv = MaskedConv(1, 4, 3)
        self.register_buffer("never_read", torch.rand(5000))

    def forward(self, x, path="clean"):
        with paths.running(path):
            y = self.conv(x)
        return y * 2 if path == "adv" else y


def test_a_network_swapped_module_by_module(images, tmp_path):
    sparse = swap(PathOfItsOwn().eval(), images)
    assert sparse.uncaptured
    for path in (None, "adv", 0.3):
        export(sparse, images, tmp_path / "net.pt2", path)
        program = load_exported(tmp_path / "net.pt2")
        y = sparse(images, path="adv" if path is None else path)
        assert relative_error(program(images, path="adv" if path is None else path), y) < TOLERANCE
        assert sum(map(len, payloads(tmp_path / "net.pt2"))) < 2000


def test_a_network_that_is_no_program_is_refused_and_the_old_file_kept(images, tmp_path):
    file = tmp_path / "net.pt2"
    file.write_text("old")
    with pytest.raises(ValueError, match=r"cannot export the network: .*could not be captured as a graph \(TraceError"):
        export(swap(TwoPaths(control_flow=True).eval(), images), images, file, "clean")
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]


class OddWhenAlone(nn.Module):
    """Computes something else for a single image, which a trace of several cannot show."""

    def __init__(self):
        super().__init__()
        self.conv = MaskedConv(1, 4, 3)

    def forward(self, x):
        return self.conv(x) * (2 if x.shape[0] == 1 else 1)


def test_a_program_that_computes_something_else_is_not_written(images, tmp_path):
    sparse = swap(OddWhenAlone().eval(), images)
    with pytest.raises(VerificationError, match=r"differs from the swapped network by clean: .*nothing was written"):
        export(sparse, images, tmp_path / "net.pt2")
    assert not list(tmp_path.iterdir())
    export(sparse, images, tmp_path / "net.pt2", dynamic_batch=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparse": nn.Conv2d(1, 1, 1)}, "a Conv2d was given: a swapped network is needed"),
        ({"format": "tflite"}, "unknown format 'tflite': accepted are 'pt2', 'aoti', 'onnx'"),
        ({"path": "robust"}, "unknown path 'robust'"),
        ({"format": "onnx"}, "an ONNX file holds one path: give path, 'clean' or 'adv', or a lambda"),
    ],
)
def test_wrong_arguments_of_export_are_refused(sparse, images, tmp_path, arguments, message):
    given = {"sparse": sparse, "example": images, "file": tmp_path / "net.pt2"} | arguments
    with pytest.raises((ValueError, TypeError), match=message):
        export(**given)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.rand(2, 3, 9, 9), r"input is \(2, 3, 9, 9\), float32 on cpu: this program takes \(N, 1, 9, 9\)"),
        (torch.rand(2, 1, 9, 8), r"takes \(N, 1, 9, 9\), float32 on cpu; export it for other sizes"),
        (torch.rand(1, 9, 9), r"input is \(1, 9, 9\)"),
        (torch.rand(2, 1, 9, 9).double(), "float64 on cpu: this program takes .* float32"),
        ([[1.0]], "input is a list: a tensor"),
        (torch.rand(2, 1, 9, 9, requires_grad=True), "computes no gradients.*dense_twin"),
    ],
)
def test_wrong_inputs_are_refused_in_one_sentence(exported, x, message):
    program = load_exported(exported[1])
    with pytest.raises((ValueError, TypeError, RuntimeError), match=message) as caught:
        program(x)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("path", "message"),
    [("robust", "unknown path 'robust'"), (0.5, "export one with path=0.5"), (2, r"lie in \[0, 1\]")],
)
def test_wrong_paths_are_refused(exported, images, path, message):
    with pytest.raises(ValueError, match=message):
        load_exported(exported[1])(images, path=path)
