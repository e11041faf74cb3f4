"""Builds ``csrc/`` into one shared library, ``smart_kernels/_C.abi3.so``, against the stable ABI of libtorch.

The library holds no Python code: ``smart_kernels.native`` loads it with ``torch.ops.load_library``. So one build
serves every Python and every torch from 2.11 on, and needs neither Python headers nor a GPU.

Variables, each ``auto`` (build what this machine can build), ``0`` (leave out) or ``1`` (fail without it):
    SMART_BUILD_CPU      C++ kernels; needs a C++17 compiler
    SMART_BUILD_CUDA     CUDA kernels; needs nvcc 12 or later
    TORCH_CUDA_ARCH_LIST GPU generations, default "8.0;9.0a"
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
CSRC = ROOT / "csrc"
CXX_FLAGS = ["-std=c++17", "-O3", "-fno-tree-loop-distribute-patterns", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-psabi"]
TORCH_TARGET = "0x020b000000000000"  # 2.11.0

# The kernels are one header; each of these files compiles it for one instruction set.
ISA_FLAGS = {
    "avx2.cpp": ["-mavx2", "-mfma"],
    "avx512.cpp": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"],
}
IS_X86 = platform.machine().lower() in ("x86_64", "amd64")


def wanted(variable: str, possible: bool, need: str) -> bool:
    """Reads one SMART_BUILD_* variable; ``need`` names what a build forced with 1 misses."""
    setting = os.environ.get(variable, "auto")
    if setting not in ("auto", "0", "1"):
        raise SystemExit(f"{variable}={setting}: accepted are auto, 0 and 1")
    if setting == "1" and not possible:
        raise SystemExit(f"{variable}=1, but {need}")
    return setting != "0" and possible


def cuda_arch_flags() -> list[str]:
    """TORCH_CUDA_ARCH_LIST ("8.0;9.0a", "+PTX" allowed) as options of nvcc."""
    flags = []
    for arch in os.environ.get("TORCH_CUDA_ARCH_LIST", "8.0;9.0a").replace(" ", ";").split(";"):
        number = arch.removesuffix("+PTX").replace(".", "")
        codes = [f"sm_{number}"] + ([f"compute_{number}"] if arch.endswith("+PTX") else [])
        flags += [f"-gencode=arch=compute_{number},code={code}" for code in codes]
    return flags


class BuildLibrary(build_ext):
    """Compiles each source with the flags of its instruction set, then links them into one library."""

    def build_extension(self, ext: Extension) -> None:
        import torch
        from torch.utils.cpp_extension import include_paths

        compiler = shutil.which(os.environ.get("CXX", "c++"))
        if not wanted("SMART_BUILD_CPU", compiler is not None, "no C++ compiler was found: install g++ or set CXX"):
            print(
                "smart-kernels: no compiled kernels (no C++ compiler, or SMART_BUILD_CPU=0): the dense backend answers"
            )
            return
        nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
        with_cuda = wanted("SMART_BUILD_CUDA", nvcc is not None, "no nvcc was found: install the CUDA toolkit")

        includes = [f"-I{path}" for path in (CSRC, *include_paths())]
        common = [*includes, f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", *(["-DSMART_WITH_CUDA"] if with_cuda else [])]
        sources = [CSRC / "ops.cpp", *sorted((CSRC / "cpu").glob("*.cpp"))]
        if not IS_X86:
            sources = [source for source in sources if source.name not in ISA_FLAGS]
        commands = [[compiler, "-fPIC", *CXX_FLAGS, *ISA_FLAGS.get(source.name, []), *common] for source in sources]
        if with_cuda:
            sources += sorted((CSRC / "cuda").glob("*.cu"))
            nvcc_flags = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", "-lineinfo", *cuda_arch_flags()]
            commands += [[nvcc, *nvcc_flags, *common, "-DUSE_CUDA"] for _ in sources[len(commands) :]]

        objects = self.compile_all(sources, commands)
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        link = [compiler, "-shared", "-o", str(target), *objects]
        link += [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu"]
        if with_cuda:
            # Static: the library must load on machines that have no CUDA runtime at all.
            link += [f"-L{cuda_home(nvcc) / 'lib64'}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
        self.run_command_line(link)

    def compile_all(self, sources: list[Path], commands: list[list[str]]) -> list[str]:
        """Compiles all sources, as many at a time as the machine has cores; returns the object files."""
        from concurrent.futures import ThreadPoolExecutor

        folder = Path(self.build_temp)
        folder.mkdir(parents=True, exist_ok=True)
        objects = [str(folder / f"{source.parent.name}_{source.stem}.o") for source in sources]
        lines = [[*c, "-c", str(s), "-o", o] for c, s, o in zip(commands, sources, objects, strict=True)]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(self.run_command_line, lines))
        return objects

    @staticmethod
    def run_command_line(line: list[str]) -> None:
        done = subprocess.run(line, capture_output=True, text=True)
        if done.stdout or done.stderr:
            print(done.stdout + done.stderr, flush=True)
        if done.returncode:
            raise SystemExit(f"smart-kernels: a build step failed (exit code {done.returncode}): {' '.join(line)}")

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".abi3.so"


def cuda_home(nvcc: str) -> Path:
    """The toolkit that ``nvcc`` compiles with; the command itself may be a script elsewhere."""
    dry_run = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", "/dev/null"], capture_output=True, text=True)
    for line in dry_run.stderr.splitlines():
        if line.startswith("#$ TOP="):
            return Path(line.removeprefix("#$ TOP=")).resolve()
    raise SystemExit(f"{nvcc} --dryrun names no toolkit folder (TOP=): set SMART_BUILD_CUDA=0 to build without CUDA")


setup(ext_modules=[Extension("smart_kernels._C", sources=[])], cmdclass={"build_ext": BuildLibrary})
