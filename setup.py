"""Drives CMake for pip. The build itself is defined in CMakeLists.txt.

Environment:
    FASTZOO_NATIVE=0         install pure Python: no compiler, no torch headers.
    FASTZOO_TORCH=DIR        the torch package whose headers to build against.
    FASTZOO_CUDA=auto|0|1    build the CUDA kernels: auto where nvcc is found (no GPU is needed).
    FASTZOO_CUDA_ARCHS=...   default "80 90a 100+PTX".
    FASTZOO_TESTS=1          also build the C++ tests and the CUDA emulator, into build/native.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from packaging.version import Version
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
TORCH_FLOOR = Version("2.10")
NATIVE = os.environ.get("FASTZOO_NATIVE", "1") != "0"
NO_NATIVE_NOTE = "_no_native.txt"


def fail(message: str) -> None:
    sys.exit(
        f"fastzoo: {message}\n"
        "fastzoo: FASTZOO_NATIVE=0 installs it in pure Python, without compiled kernels."
    )


def find_torch() -> Path:
    """The torch package to build against: named, importable, or in the target environment.

    Under pip's build isolation torch is not importable, but sysconfig still names the target.
    """
    named = os.environ.get("FASTZOO_TORCH")
    if named:
        candidates = [Path(named)]
    else:
        spec = importlib.util.find_spec("torch")
        paths = sysconfig.get_paths()
        candidates = [Path(spec.origin).parent] if spec and spec.origin else []
        candidates += [Path(paths[key]) / "torch" for key in ("purelib", "platlib")]
    for candidate in candidates:
        version_file = candidate / "version.py"
        if not version_file.is_file():
            continue
        match = re.search(r"__version__ = '([^']+)'", version_file.read_text())
        if not match or Version(match[1]) < TORCH_FLOOR:
            fail(
                f"torch {match[1] if match else '?'} in {candidate}: {TORCH_FLOOR} or newer needed"
            )
        if not (candidate / "include" / "torch" / "csrc" / "stable").is_dir():
            fail(f"torch {match[1]} in {candidate} has no headers")
        return candidate
    fail(
        "no torch found to build against. Install torch first, or set FASTZOO_TORCH to the torch "
        f"package folder. Looked in: {', '.join(map(str, candidates))}"
    )
    raise AssertionError


def find_nvcc() -> str | None:
    """The compiler to build the CUDA kernels with, or None to leave them out."""
    choice = os.environ.get("FASTZOO_CUDA", "auto")
    if choice not in ("auto", "0", "1"):
        fail(f"FASTZOO_CUDA={choice}: expected auto, 0 or 1")
    if choice == "0":
        return None
    home = os.environ.get("CUDA_HOME")
    nvcc = (home and shutil.which(str(Path(home) / "bin" / "nvcc"))) or shutil.which("nvcc")
    if choice == "1" and not nvcc:
        fail("FASTZOO_CUDA=1, but nvcc is neither in CUDA_HOME nor on PATH")
    return nvcc


class BuildNative(build_ext):
    """Builds every library with CMake and puts them beside the package."""

    def run(self) -> None:
        if shutil.which(os.environ.get("CXX", "c++")) is None:
            fail("no C++ compiler found (g++ or clang++, or set CXX)")
        # cmake and ninja may have come as wheels, into an environment that is not activated.
        search = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
        cmake = shutil.which("cmake", path=search)
        if cmake is None or shutil.which("ninja", path=search) is None:
            fail("cmake or ninja not found (pip install cmake ninja)")
        build = ROOT / "build" / "native" if self.inplace else Path(self.build_temp) / "native"
        package = ROOT if self.inplace else Path(self.build_lib).resolve()
        nvcc = find_nvcc()
        flag = {True: "ON", False: "OFF"}
        configure = [
            cmake,
            "-S",
            str(ROOT),
            "-B",
            str(build),
            "-G",
            "Ninja",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DFASTZOO_VERSION={self.distribution.get_version()}",
            f"-DFASTZOO_TORCH={find_torch()}",
            f"-DFASTZOO_PYTHON_OUTPUT={package / 'fastzoo'}",
            f"-DFASTZOO_CUDA={flag[nvcc is not None]}",
            f"-DFASTZOO_TESTS={flag[os.environ.get('FASTZOO_TESTS') == '1']}",
        ]
        if nvcc:
            configure.append(f"-DCMAKE_CUDA_COMPILER={nvcc}")
        else:
            # Left by an earlier build with CUDA, it would travel in a CPU wheel.
            (package / "fastzoo" / "_C_cuda.so").unlink(missing_ok=True)
        if "FASTZOO_CUDA_ARCHS" in os.environ:
            configure.append(f"-DFASTZOO_CUDA_ARCHS={os.environ['FASTZOO_CUDA_ARCHS']}")
        # A path inside an isolated build environment does not outlive it.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        try:
            for command in (configure, [cmake, "--build", str(build)]):
                subprocess.run(command, check=True, env={**os.environ, "PATH": search})
        except subprocess.CalledProcessError as error:
            fail(f"the native build failed: {' '.join(error.cmd[:3])} exited {error.returncode}")
        (package / "fastzoo" / NO_NATIVE_NOTE).unlink(missing_ok=True)
        commands = build / "compile_commands.json"
        if self.inplace and commands.exists():
            shutil.copy(commands, ROOT / "compile_commands.json")


class BuildPython(build_py):
    """In a pure Python install, leaves the reason for fastzoo.info()."""

    def run(self) -> None:
        super().run()
        if NATIVE:
            return
        package = ROOT / "fastzoo" if self.editable_mode else Path(self.build_lib) / "fastzoo"
        package.mkdir(parents=True, exist_ok=True)
        note = "fastzoo was installed with FASTZOO_NATIVE=0, in pure Python"
        (package / NO_NATIVE_NOTE).write_text(note + "\n")


setup(
    ext_modules=[Extension("fastzoo._C", sources=[])] if NATIVE else [],
    cmdclass={"build_ext": BuildNative, "build_py": BuildPython},
)
