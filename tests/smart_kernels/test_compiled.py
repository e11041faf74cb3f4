"""Networks compiled by Inductor: torch.compile, and AOTInductor packages."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from exporting import BACKENDS, PATHS, TOLERANCE, Small, in_fresh_process, needs_library
from torch.utils.cpp_extension import include_paths, library_paths

from smart_kernels import export, load_exported, native, swap
from smart_kernels.backends import schedules
from smart_kernels.verify import relative_error


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_inductor_compiles_it_into_one_graph(fresh_compiler, images, backend):
    sparse = swap(Small().eval(), images, backend=backend)
    compiled = torch.compile(sparse, fullgraph=True)
    for x in (images, torch.rand(7, 1, 9, 9)):
        for path in PATHS:
            assert relative_error(compiled(x, path=path), sparse(x, path=path)) < TOLERANCE


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


def test_packages_hold_no_kernel_that_is_an_operator_in_python(images, tmp_path, monkeypatch):
    allowed = []

    def compiler(program, package_path):
        allowed.append(schedules.tma_allowed())
        raise RuntimeError("enough seen")

    monkeypatch.setattr("torch._inductor.aoti_compile_and_package", compiler)
    with pytest.raises(RuntimeError, match="enough seen"):
        export(swap(Small().eval(), images), images, tmp_path / "net.pt2", format="aoti")
    assert allowed == [False]
    assert schedules.tma_allowed()


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
