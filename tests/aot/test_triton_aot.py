"""Every Triton kernel, compiled for every architecture of the wheel, on any machine.

No GPU and no driver. Not under TRITON_INTERPRET=1: the interpreter replaces the compiler, so this
file needs a process of its own.
"""

import functools
import importlib
import os
import pkgutil
import re
import shutil
import subprocess

import pytest

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from fastzoo import kernels  # noqa: E402

ARCHITECTURES = {80: "sm_80", 90: "sm_90a", 100: "sm_100a"}

FAMILIES = [
    module
    for info in pkgutil.iter_modules(kernels.__path__)
    if hasattr(
        module := importlib.import_module(f"{kernels.__name__}.{info.name}"), "compile_cases"
    )
]


CASES = [
    pytest.param(case, capability, id=f"{case.name}-{architecture}")
    for module in FAMILIES
    for capability, architecture in ARCHITECTURES.items()
    for case in module.compile_cases(capability // 10)
]


def ptx_of(case, capability: int) -> str:
    names = case.kernel.arg_names
    signature = {name: case.types.get(name, "constexpr") for name in names}
    constants = {name: case.constants.get(name) for name in names if name not in case.types}
    attributes = {
        (position,): [["tt.divisibility", 16]]
        for position, name in enumerate(names)
        if signature[name].startswith("*") or name in case.multiples
    }
    compiled = triton.compile(
        ASTSource(case.kernel, signature, constants, attributes),
        target=GPUTarget("cuda", capability, 32),
        options=dict(case.options),
    )
    return compiled.asm["ptx"]


@functools.cache
def assembler() -> str:
    """The newest ptxas at hand: triton's own (two of them in some versions), or the toolkit's."""
    folder = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
    found = [shutil.which(name, path=folder) for name in ("ptxas-blackwell", "ptxas")]
    return next(path for path in [*found, shutil.which("ptxas")] if path)


def resources(ptx: str, case, capability: int, folder) -> tuple[int, int]:
    """Registers of a thread and bytes spilled, as ptxas reports them."""
    source = folder / "kernel.ptx"
    source.write_text(ptx)
    fusion = [] if case.options["enable_fp_fusion"] else ["--fmad=false"]
    command = [assembler(), "-v", *fusion, f"--gpu-name={ARCHITECTURES[capability]}"]
    report = subprocess.run(
        [*command, str(source), "-o", str(folder / "kernel.cubin")],
        capture_output=True,
        text=True,
        check=True,
    ).stderr
    spilled = re.findall(r"(\d+) bytes spill (?:stores|loads)", report)
    return int(re.search(r"Used (\d+) registers", report)[1]), sum(map(int, spilled))


@pytest.fixture(scope="module")
def table():
    rows = []
    yield rows
    print()
    for name, architecture, registers in rows:
        print(f"{name:24} {architecture:8} {registers:4} registers")


@pytest.mark.parametrize(("case", "capability"), CASES)
def test_compiles(case, capability, tmp_path, table):
    ptx = ptx_of(case, capability)
    registers, spilled = resources(ptx, case, capability, tmp_path)
    table.append((case.name, ARCHITECTURES[capability], registers))
    assert spilled == 0
    if not case.stack:
        assert "st.local" not in ptx
        assert "ld.local" not in ptx
    for instruction in case.instructions:
        assert instruction in ptx
    if not case.fused:
        assert not case.options["enable_fp_fusion"]  # ptxas contracts on its own, too
        assert not re.findall(r"\bfma\.\S+|\bmad\.\S*f(?:32|64)", ptx)
        assert not re.findall(r"\.approx|\.full|\.ftz", ptx)
    if case.vector_loads:
        loads = re.findall(r"ld\.global\S*|cp\.async\.c[ag]\S*.*", ptx)
        wide = [load for load in loads if ".v4.b32" in load or ".v2.b64" in load or "0x10," in load]
        assert wide, loads


def test_every_kernel_has_a_case():
    for module in FAMILIES:
        compiled = {case.kernel.__name__ for case in module.compile_cases(9)}
        defined = {name for name, value in vars(module).items() if isinstance(value, JITFunction)}
        assert {name for name in defined if name.endswith("_kernel")} == compiled
