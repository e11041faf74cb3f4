"""Builds ``csrc/`` into one shared library, ``smart_kernels/_C.abi3.so``, against the stable ABI of libtorch.

The library holds no Python code: ``smart_kernels.native`` loads it with ``torch.ops.load_library``. So one build
serves every Python and every torch from 2.11 on, and needs neither Python headers nor a GPU.

Variables, each ``auto`` (build what this machine can build), ``0`` (leave out) or ``1`` (fail without it):
    SMART_BUILD_CPU      C++ kernels; needs a C++17 compiler
    SMART_BUILD_CUDA     CUDA kernels; needs nvcc 12 or later

And TORCH_CUDA_ARCH_LIST, the GPU generations to compile for (default "8.0;9.0a"); SMART_SANITIZE=1, a CPU-only build
with the address and undefined-behaviour sanitizers, for ``make sanitize``.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CSRC = Path(__file__).parent / "csrc"
CXX_FLAGS = [
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Wno-unused-parameter",
    "-Wno-psabi",
]
# Kernels need fused multiply-add, and copies of a few floats must not become calls of memcpy.
CXX_FLAGS += ["-ffp-contract=fast", "-fno-tree-loop-distribute-patterns"]
NVCC_FLAGS = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", "-lineinfo", "-DUSE_CUDA"]
HOPPER_FILES = ("wgmma.cu",)  # instructions that sm_90a alone has
TORCH_TARGET = "0x020b000000000000"  # 2.11.0

# The kernels are one header; each of these files compiles it for one instruction set.
ISA_FLAGS = {
    "avx2.cpp": ["-mavx2", "-mfma"],
    "avx512.cpp": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"],
}
SANITIZE_FLAGS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g", "-O1"]
IS_X86 = platform.machine().lower() in ("x86_64", "amd64")


def wanted(variable: str, possible: bool, need: str) -> bool:
    """Reads one SMART_BUILD_* variable; ``need`` names what a build forced with 1 misses."""
    setting = os.environ.get(variable, "auto")
    if setting not in ("auto", "0", "1"):
        raise SystemExit(f"{variable}={setting}: accepted are auto, 0 and 1")
    if setting == "1" and not possible:
        raise SystemExit(f"{variable}=1, but {need}")
    return setting != "0" and possible


def cuda_arch_flags(source: Path) -> list[str]:
    """TORCH_CUDA_ARCH_LIST ("8.0;9.0a", "+PTX" allowed) as options of nvcc; of files for Hopper only its part."""
    flags = []
    archs = os.environ.get("TORCH_CUDA_ARCH_LIST", "8.0;9.0a").replace(" ", ";").split(";")
    if source.name in HOPPER_FILES and (hopper := [arch for arch in archs if arch.startswith("9.0a")]):
        archs, flags = hopper, ["-DSMART_SM90A"]
    for arch in archs:
        number = arch.removesuffix("+PTX").replace(".", "")
        codes = [f"sm_{number}"] + ([f"compute_{number}"] if arch.endswith("+PTX") else [])
        flags += [f"-gencode=arch=compute_{number},code={code}" for code in codes]
    return flags


class BuildError(SystemExit):
    """A build step failed; the message says which."""


class BuildLibrary(build_ext):
    """Compiles each source with the flags of its instruction set, then links them into one library."""

    def build_extension(self, ext: Extension) -> None:
        compiler = shutil.which(os.environ.get("CXX", "c++"))
        if not wanted("SMART_BUILD_CPU", compiler is not None, "no C++ compiler was found: install g++ or set CXX"):
            print(
                "smart-kernels: no C++ compiler, or SMART_BUILD_CPU=0: no kernels are built, the dense backend answers"
            )
            return
        try:
            import torch
            from torch.utils.cpp_extension import include_paths
        except ImportError as error:
            raise BuildError(
                f"the build needs torch ({error}): install it first, then pip install --no-build-isolation"
            ) from error

        sanitize = SANITIZE_FLAGS if os.environ.get("SMART_SANITIZE") == "1" else []
        common = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", *(f"-I{path}" for path in (CSRC, *include_paths()))]
        sources = [*sorted(CSRC.glob("*.cpp")), *sorted((CSRC / "cpu").glob("*.cpp"))]
        if not IS_X86:
            sources = [source for source in sources if source.name not in ISA_FLAGS]
        objects = self.compile_all(
            {s: [compiler, *CXX_FLAGS, *ISA_FLAGS.get(s.name, []), *sanitize, *common] for s in sources}
        )
        cuda_objects, cuda_libraries = ([], []) if sanitize else self.compile_cuda(common)

        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        torch_library = [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu"]
        link = [compiler, "-shared", *sanitize, "-o", str(target), *objects, *cuda_objects]
        run([*link, *torch_library, *cuda_libraries])

    def compile_cuda(self, common: list[str]) -> tuple[list[str], list[str]]:
        """Compiles csrc/cuda; returns objects and what to link with them, nothing where it is not wanted or fails."""
        nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
        if not wanted("SMART_BUILD_CUDA", nvcc is not None, "no nvcc was found: install the CUDA toolkit"):
            return [], []
        sources = sorted((CSRC / "cuda").glob("*.cu"))
        try:
            objects = self.compile_all({s: [nvcc, *NVCC_FLAGS, *cuda_arch_flags(s), *common] for s in sources})
            # Static: the library must load on machines that have no CUDA runtime at all.
            return objects, [f"-L{cuda_home(nvcc) / 'lib64'}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
        except BuildError as error:
            if os.environ.get("SMART_BUILD_CUDA") == "1":
                raise
            print(f"smart-kernels: built without CUDA, since {error}")
            return [], []

    def compile_all(self, commands: dict[Path, list[str]]) -> list[str]:
        """Compiles sources, each with its command, as many at a time as there are cores; returns the object files."""
        folder = Path(self.build_temp)
        folder.mkdir(parents=True, exist_ok=True)
        objects = {source: str(folder / f"{source.parent.name}_{source.stem}.o") for source in commands}
        lines = [[*command, "-c", str(source), "-o", objects[source]] for source, command in commands.items()]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(run, lines))
        return list(objects.values())

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".abi3.so"


def run(line: list[str]) -> None:
    """Runs one step, and shows what it says."""
    done = subprocess.run(line, capture_output=True, text=True)
    if done.stdout or done.stderr:
        print(done.stdout + done.stderr, flush=True)
    if done.returncode:
        raise BuildError(f"a build step failed with exit code {done.returncode}: {' '.join(line)}")


def cuda_home(nvcc: str) -> Path:
    """The toolkit that ``nvcc`` compiles with; the command itself may be a script elsewhere."""
    dry_run = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", "/dev/null"], capture_output=True, text=True)
    for line in dry_run.stderr.splitlines():
        if line.startswith("#$ TOP="):
            return Path(line.removeprefix("#$ TOP=")).resolve()
    raise BuildError(f"{nvcc} --dryrun names no toolkit folder (TOP=): set SMART_BUILD_CUDA=0 to build without CUDA")


setup(
    ext_modules=[Extension("smart_kernels._C", sources=[], py_limited_api=True)],
    cmdclass={"build_ext": BuildLibrary},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
