import io
import json
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from networks import DualNorm, MaskedConv, TwoPaths
from torch import nn
from torch.utils.cpp_extension import include_paths, library_paths

import smart_kernels
from smart_kernels import FileError, VerificationError, export, load_exported, native, paths, swap
from smart_kernels.verify import relative_error

BACKENDS = ["auto", "dense", *(["cpu"] if native.missing() is None else [])]
PATHS = ("clean", "adv")
TOLERANCE = 1e-5
PACKAGE = Path(smart_kernels.__file__).parent
needs_library = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))


@pytest.fixture
def images():
    return torch.rand(4, 1, 9, 9)


@pytest.fixture
def sparse(images):
    return swap(TwoPaths().eval(), images, backend=BACKENDS[-1])


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A network and its program of both paths."""
    torch.manual_seed(0)
    images, file = torch.rand(4, 1, 9, 9), tmp_path_factory.mktemp("exported") / "net.pt2"
    sparse = swap(TwoPaths().eval(), images, backend=BACKENDS[-1])
    export(sparse, images, file)
    return sparse, file


def in_fresh_process(code, *arguments):
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def payloads(file):
    """The stored tensors of a program, as bytes."""
    with zipfile.ZipFile(file) as archive:
        names = [n for n in archive.namelist() if "/data/" in n and not n.endswith((".json", "model.pt"))]
        return [archive.read(name) for name in names]


# ---- torch.compile ----


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_inductor_compiles_it_into_one_graph(images, backend):
    sparse = swap(Small().eval(), images, backend=backend)
    compiled = torch.compile(sparse, fullgraph=True)
    for x in (images, torch.rand(7, 1, 9, 9)):
        for path in PATHS:
            assert relative_error(compiled(x, path=path), sparse(x, path=path)) < TOLERANCE


# ---- torch.export ----


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


# ---- files that are not as they were written ----


def rewritten(file, target, change):
    """A copy of an archive whose entries ``change(name without root, content)`` has altered."""
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            new.writestr(name, change(name.partition("/")[2], old.read(name)))
    return target


def about(**changes):
    def change(name, content):
        return json.dumps(json.loads(content) | changes) if name.endswith("smart_kernels.json") else content

    return change


def test_damaged_and_foreign_files_are_refused(exported, tmp_path):
    content, file = bytearray(exported[1].read_bytes()), tmp_path / "net.pt2"
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_exported(file)
    for cut in (0, 10, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:cut])
        with pytest.raises(FileError, match="is not a whole file of an exported network"):
            load_exported(file)
    with zipfile.ZipFile(exported[1]) as archive:
        entry = next(each for each in archive.infolist() if "weight_0" in each.filename)
    content[entry.header_offset + 200] ^= 1
    file.write_bytes(content)
    with pytest.raises(FileError, match=r"was damaged after it was written, in .*: copy or export it again"):
        load_exported(file)
    torch.save({}, file)
    with pytest.raises(FileError, match="an archive, but no exported network"):
        load_exported(file)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"version": 2}, FileError, "format version 2: this library reads version 1"),
        ({"kind": "other"}, FileError, "no exported network"),
        ({"operators": ["smart_kernels::sparse_conv9d"]}, RuntimeError, "operator smart_kernels::sparse_conv9d, which"),
        ({"format": "aoti", "machine": "pdp11"}, RuntimeError, "machine code for pdp11 .*: export it on a machine"),
        ({"format": "aoti"}, FileError, r"exported with torch .*, cannot be loaded"),
    ],
)
def test_files_this_machine_cannot_run_are_refused(exported, tmp_path, changes, error, message):
    file = rewritten(exported[1], tmp_path / "net.pt2", about(**changes))
    with pytest.raises(error, match=message):
        load_exported(file)


@needs_library
def test_a_machine_without_the_compiled_library_says_so(exported, tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "smart_kernels", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    code = """
import sys
sys.path.insert(0, sys.argv[1])
import smart_kernels
try:
    smart_kernels.load_exported(sys.argv[2])
except RuntimeError as error:
    print(error)
"""
    said = in_fresh_process(code, tmp_path, exported[1])
    assert "needs the operator smart_kernels::sparse_conv2d" in said and "compiled library was not built" in said


class Bomb:
    def __reduce__(self):
        return exec, ("import builtins; builtins.bomb_went_off = True",)


def _bomb(save):
    buffer = io.BytesIO()
    save(Bomb(), buffer)
    return buffer.getvalue()


def _pickled_weight(name, content):
    if name.endswith("weights_config.json"):
        config = json.loads(content)
        next(entry for entry in config["config"].values() if entry["path_name"] == "weight_0")["use_pickle"] = True
        return json.dumps(config)
    return _bomb(torch.save) if name.endswith("/weight_0") else content


def _opaque_constant(name, content):
    if name.endswith("constants_config.json"):
        entry = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}
        return json.dumps({"config": {"bomb": entry}})
    return content


def _sample_inputs(name, content):
    return _bomb(torch.save) if "sample_inputs" in name else content


@pytest.mark.parametrize("change", [_pickled_weight, _opaque_constant, _sample_inputs])
def test_nothing_is_ever_unpickled(exported, tmp_path, change):
    import builtins

    file = rewritten(exported[1], tmp_path / "net.pt2", change)
    with pytest.raises(FileError, match=r"holds pickled data or machine code \(.*do not open it"):
        load_exported(file)
    assert not hasattr(builtins, "bomb_went_off")


def test_an_archive_of_torchs_older_pickles_is_refused(exported, tmp_path):
    file = rewritten(exported[1], tmp_path / "net.pt2", lambda name, content: content)
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("version", "8.14")
        archive.writestr("serialized_state_dict.pt", _bomb(pickle.dump))
    with pytest.raises(FileError, match=r"holds pickled data or machine code \(version\)"):
        load_exported(file)


# ---- AOTInductor ----


class Small(nn.Module):
    """What AOTInductor compiles in seconds."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = MaskedConv(1, 8, 3, padding=1), MaskedConv(8, 8, 3, padding=1)
        self.norm1, self.norm2 = DualNorm(8), DualNorm(8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = F.relu(self.norm1(self.conv1(x)))
        x = F.relu(self.norm2(self.conv2(x)) + x)
        return self.fc(x.mean((2, 3)))


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A network and its AOTInductor package of both paths."""
    if shutil.which("g++") is None:
        pytest.skip("there is no g++ to compile packages with")
    torch.manual_seed(0)
    images, file = torch.rand(4, 1, 9, 9), tmp_path_factory.mktemp("aoti") / "net.pt2"
    sparse = swap(Small().eval(), images, backend=BACKENDS[-1])
    errors = export(sparse, images, file, format="aoti")
    assert max(errors.values()) < TOLERANCE
    return sparse, file


def test_a_compiled_package_runs_both_paths_for_any_batch(package):
    sparse, file = package
    program = load_exported(file)
    assert (program.format, program.paths, program.shape) == ("aoti", PATHS, (None, 1, 9, 9))
    for batch in (1, 7):
        x = torch.rand(batch, 1, 9, 9)
        for path in PATHS:
            assert relative_error(program(x, path=path), sparse(x, path=path)) < TOLERANCE
    with pytest.raises(ValueError, match=r"this program takes \(N, 1, 9, 9\)"):
        program(torch.rand(2, 3, 9, 9))


def test_a_compiled_package_runs_in_a_fresh_process(package, images, tmp_path):
    sparse, file = package
    images.numpy().tofile(tmp_path / "x")
    code = """
import sys, numpy, torch, smart_kernels
x = torch.from_numpy(numpy.fromfile(sys.argv[2], "f4")).reshape(4, 1, 9, 9)
program = torch._inductor.aoti_load_package(sys.argv[1])
program(x, torch.tensor(True)).numpy().tofile(sys.argv[3])
"""
    in_fresh_process(code, file, tmp_path / "x", tmp_path / "y")
    y = torch.frombuffer(bytearray((tmp_path / "y").read_bytes()), dtype=torch.float32).view(4, 5)
    assert relative_error(y, sparse(images, path="adv")) < TOLERANCE


@needs_library
def test_a_compiled_package_runs_in_cpp(package, images, tmp_path):
    """Without Python: tests/cpp/run_pt2.cpp, built here."""
    sparse, file = package
    source, program = Path(__file__).parents[1] / "cpp" / "run_pt2.cpp", tmp_path / "run_pt2"
    command = ["g++", "-std=c++20", str(source), "-o", str(program), *(f"-I{each}" for each in include_paths())]
    for folder in library_paths():
        command += [f"-L{folder}", f"-Wl,-rpath,{folder}"]
    built = subprocess.run([*command, "-ltorch_cpu", "-lc10", "-ldl"], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    images.numpy().tofile(tmp_path / "x")
    for path in PATHS:
        arguments = [native.LIBRARY, file, tmp_path / "x", tmp_path / "y", path, *images.shape]
        ran = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        y = torch.frombuffer(bytearray((tmp_path / "y").read_bytes()), dtype=torch.float32).view(4, 5)
        assert relative_error(y, sparse(images, path=path)) < TOLERANCE


def test_a_missing_compiler_is_named(images, tmp_path):
    from torch._inductor import config

    sparse = swap(Small().eval(), images)
    # Undone by monkeypatch, the setting would be gone for the rest of the process.
    with (
        config.patch({"cpp.cxx": (None, "no-such-compiler")}),
        pytest.raises(RuntimeError, match=r"AOTInductor found no C\+\+ compiler: install g\+\+"),
    ):
        export(sparse, images, tmp_path / "net.pt2", format="aoti")
    assert not list(tmp_path.iterdir())


# ---- ONNX ----


@pytest.mark.parametrize("path", ["clean", "adv", 0.3])
def test_onnx_computes_the_same_for_any_batch(sparse, images, tmp_path, path):
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    from onnx.reference import ReferenceEvaluator

    errors = export(sparse, images, tmp_path / "net.onnx", path, format="onnx")
    assert max(errors.values()) < TOLERANCE
    model = onnx.load(tmp_path / "net.onnx")
    assert {node.domain for node in model.graph.node} == {""}
    assert list(tmp_path.iterdir()) == [tmp_path / "net.onnx"]
    for batch in (1, 7):
        x = torch.rand(batch, 1, 9, 9)
        (y,) = ReferenceEvaluator(model).run(None, {"images": x.numpy()})
        assert relative_error(torch.from_numpy(y), sparse(x, path=path)) < TOLERANCE


def test_missing_packages_for_onnx_are_named(sparse, images, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ImportError, match=r"format 'onnx' needs onnx: pip install onnx onnxscript"):
        export(sparse, images, tmp_path / "net.onnx", "adv", format="onnx")
    assert not list(tmp_path.iterdir())
