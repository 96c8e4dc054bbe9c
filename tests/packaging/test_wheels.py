"""What the wheels hold, and that they work where nothing else is: built and installed for real."""

import importlib.util
import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

from tests.packaging.environments import Environment, build, copy_sources

pytestmark = pytest.mark.slow

# The answers of both operators on inputs that can be read.
USE = """
import torch, fastzoo
boxes = torch.tensor([[0., 0, 10, 10], [1, 1, 11, 11], [20, 20, 30, 30]])
kept = fastzoo.ops.nms(boxes, torch.tensor([.5, .9, .1]), 0.5)
assert kept.tolist() == [1, 2], kept
codes = torch.tensor([[0., 0], [4, 4]])
found = fastzoo.ops.vq_nearest(torch.tensor([[3., 3], [1, 0]]), codes)
assert found.tolist() == [1, 0], found
assert "site-packages" in fastzoo.__file__
"""


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_sources(tmp_path_factory.mktemp("sources"))


@pytest.fixture(scope="module")
def cpu_dist(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist, and the CPU wheel built from it."""
    out = tmp_path_factory.mktemp("cpu")
    done = build(sources, out, FASTZOO_CUDA="0")
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def only(folder: Path, pattern: str) -> Path:
    (path,) = folder.glob(pattern)
    return path


def contents(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def test_sdist_holds_what_it_is_built_from(cpu_dist: Path) -> None:
    with tarfile.open(only(cpu_dist, "*.tar.gz")) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = {"setup.py", "CMakeLists.txt", "LICENSE", "README.md", "csrc/module.cpp"}
    needed |= {"csrc/cuda/nms.cu", "csrc/math/nms.h", "kernels/nms.py", "fastzoo/py.typed"}
    assert needed - names == set()
    assert [name for name in names if name.endswith((".so", ".pyc"))] == []


def test_cpu_wheel_holds_the_libraries_and_no_sources(cpu_dist: Path) -> None:
    names = contents(only(cpu_dist, "*.whl"))
    libraries = sorted(name for name in names if name.endswith(".so"))
    assert len(libraries) == 2
    assert libraries[0].startswith("fastzoo/_C.cpython-")
    assert libraries[1] == "fastzoo/_C_cpu.so"
    for needed in ("py.typed", "ops/nms.py", "kernels/nms.py", "compat/torchvision.py"):
        assert f"fastzoo/{needed}" in names
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"fastzoo"}
    assert [n for n in names if n.endswith((".cpp", ".cu", ".h", "_no_native.txt"))] == []


@pytest.fixture(scope="module")
def installed(cpu_dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    env = Environment(tmp_path_factory.mktemp("env") / "env")
    done = env.install(only(cpu_dist, "*.whl"), "--no-index")
    assert done.returncode == 0, done.stdout + done.stderr
    return env


def test_cpu_wheel_works_without_compiler_triton_and_cuda(installed: Environment) -> None:
    installed.run("-c", "import shutil; assert not any(map(shutil.which, ('cc', 'c++', 'nvcc')))")
    installed.run("-c", USE + "assert fastzoo.info().owners['nms']['cpu'] == 'cpu'")
    table = installed.run(str(installed.bin / "fastzoo"), "info")
    assert "auto:cpu" in table
    assert "triton is not installed" in table
    assert "cuda: fastzoo was built without CUDA" in table


def test_a_forced_backend_that_is_not_there_says_why(installed: Environment) -> None:
    said = installed.run(
        "-c",
        "import torch, fastzoo\n"
        "try: fastzoo.ops.nms(torch.zeros(1, 4), torch.zeros(1), .5, backend='triton')\n"
        "except RuntimeError as error: print(error)",
    )
    assert "triton is not installed (pip install triton)" in said


def test_selftest_ships(installed: Environment) -> None:
    assert "0 failed" in installed.run("-m", "fastzoo", "selftest", "nms", "--backend", "cpu")


def test_pure_python_wheel_works_and_says_what_it_is(sources: Path, tmp_path: Path) -> None:
    done = build(sources, tmp_path, "--wheel", FASTZOO_NATIVE="0", CXX="/no/compiler")
    assert done.returncode == 0, done.stdout + done.stderr
    wheel = only(tmp_path, "*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert [name for name in contents(wheel) if name.endswith(".so")] == []
    env = Environment(tmp_path / "env")
    assert env.install(wheel, "--no-index").returncode == 0
    env.run("-c", USE + "assert fastzoo.info().owners['nms']['cpu'] == 'reference'")
    assert "installed with FASTZOO_NATIVE=0, in pure Python" in env.run("-m", "fastzoo", "info")


@pytest.mark.parametrize(
    ("variable", "reason"),
    [("CXX", "no C++ compiler found"), ("FASTZOO_TORCH", "no torch found to build against")],
)
def test_a_build_that_cannot_be_says_what_can(
    sources: Path, tmp_path: Path, variable: str, reason: str
) -> None:
    done = build(sources, tmp_path, "--wheel", **{variable: str(tmp_path / "nothing")})
    said = done.stdout + done.stderr
    assert done.returncode != 0
    assert reason in said
    assert "FASTZOO_NATIVE=0 installs it in pure Python" in said
    assert "Traceback" not in said.split(reason)[1].split("FASTZOO_NATIVE=0")[0]


def test_isolated_build_finds_the_torch_of_its_target(sources: Path, tmp_path: Path) -> None:
    """``pip install .`` beside an installed torch: no flag, and no second torch is fetched."""
    env = Environment(tmp_path / "env")
    done = env.install(sources, FASTZOO_CUDA="0")
    said = done.stdout + done.stderr
    if "No matching distribution found for" in said or "connection broken" in said.lower():
        pytest.skip("no package registry here, which an isolated build asks for cmake and ninja")
    assert done.returncode == 0, said
    env.run("-c", USE + "assert fastzoo.info().owners['nms']['cpu'] == 'cpu'")
    assert torch.__version__ in env.run("-m", "fastzoo", "info")


@pytest.fixture(scope="module")
def cuda_wheel(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc: the CUDA wheel cannot be built here")
    out = tmp_path_factory.mktemp("cuda")
    done = build(sources, out, "--wheel", FASTZOO_CUDA="1")
    assert done.returncode == 0, done.stdout + done.stderr
    return only(out, "*.whl")


def test_cuda_wheel_holds_code_for_every_architecture(cuda_wheel: Path, tmp_path: Path) -> None:
    assert "fastzoo/_C_cuda.so" in contents(cuda_wheel)
    with zipfile.ZipFile(cuda_wheel) as archive:
        library = archive.extract("fastzoo/_C_cuda.so", tmp_path)
    spec = importlib.util.find_spec("triton")
    assert spec is not None
    assert spec.origin is not None
    cuobjdump = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

    def architectures(kind: str) -> set[str]:
        command = [str(cuobjdump), f"--list-{kind}", library]
        listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        return {line.split(".")[-2] for line in listed.splitlines() if line}

    assert architectures("elf") == {"sm_80", "sm_90a", "sm_100"}
    assert architectures("ptx") == {"sm_100"}


def test_cpu_wheel_built_after_a_cuda_wheel_holds_no_cuda(
    sources: Path, cuda_wheel: Path, tmp_path: Path
) -> None:
    # Without an sdist between them, both are built in the same folder.
    done = build(sources, tmp_path, "--wheel", FASTZOO_CUDA="0")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "fastzoo/_C_cuda.so" not in contents(only(tmp_path, "*.whl"))


def test_cuda_wheel_declines_a_torch_without_cuda(cuda_wheel: Path, tmp_path: Path) -> None:
    if torch.version.cuda is not None:
        pytest.skip("this torch has CUDA")
    env = Environment(tmp_path / "env")
    assert env.install(cuda_wheel, "--no-index").returncode == 0
    env.run("-c", USE + "assert '_C_cuda' not in open('/proc/self/maps').read()")
    table = env.run("-m", "fastzoo", "info")
    assert f"built for CUDA 13.0; this torch {torch.__version__} has no CUDA" in table
    assert "cuda_archs: 80 90a 100+PTX" in table
