"""The house rules that a reviewer would otherwise have to see: arrows between floors, and rooms."""

import ast
import re
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

# What a module of each floor may import of fastzoo, and from other projects. Modules directly in
# fastzoo/ are floors by themselves, since they stand at different heights.
MAY_IMPORT = {
    "models": {"models", "nn", "samplers", "ops"},
    "nn": {"nn", "ops", "reference"},
    "samplers": {"samplers", "ops"},
    "ops": {"ops", "reference", "kernels", "backends", "_native"},
    "reference": {"reference"},
    "kernels": {"kernels", "reference"},
    "testing": {"testing", "ops", "reference", "fastzoo", "backends", "_native", "info"},
    "compat": {"compat", "nn", "samplers", "ops", "reference"},
    "backends": {"_native"},
    "_native": set(),
    "info": {"fastzoo", "_native", "backends", "ops"},
    "cli": {"fastzoo", "testing", "info", "backends"},
    "__main__": {"cli"},
    "fastzoo": {"nn", "ops", "reference", "samplers", "backends", "info"},
}
ANY_PROJECT = {"torch", "numpy"}
# Of samplers: extras, imported where they are used.
OTHER_PROJECTS = {
    "reference": {"torch"},
    "kernels": {"torch", "triton"},
    "samplers": {*ANY_PROJECT, "diffusers", "tqdm"},
}
# recipes/, data/, metrics/, losses/ and tools/ serve the models.
LIKE_MODELS = {"recipes", "data", "metrics", "losses", "tools"}

# Every family has this one file in each room; {} is its stem. One whose operators are irregular
# work, for which Triton does not fit, has no room there.
ROOMS = (
    "csrc/math/{}.h",
    "csrc/cpu/{}.cpp",
    "csrc/cpu/kernels/{}.cpp",
    "csrc/cuda/{}.cu",
    "kernels/{}.py",
    "fastzoo/ops/{}.py",
    "fastzoo/reference/{}.py",
    "fastzoo/testing/{}.py",
    "tests/ops/test_{}.py",
    "benchmarks/bench_{}.py",
    "docs/ops/{}.md",
)
FAMILIES = sorted(
    path.stem for path in (ROOT / "fastzoo/ops").glob("*.py") if not path.stem.startswith("_")
)
NATIVE = sorted(p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cpp", ".cu"))


def module_name(path: Path) -> str:
    """fastzoo/ops/nms.py and kernels/nms.py as they are imported."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] == "kernels":
        parts.insert(0, "fastzoo")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def floor(module: str) -> str:
    parts = module.split(".")
    name = parts[1] if len(parts) > 1 else "fastzoo"
    return "models" if name in LIKE_MODELS else name


PYTHON = {
    module_name(path): path
    for folder in ("fastzoo", "kernels")
    for path in sorted((ROOT / folder).rglob("*.py"))
}
FLOORS = {floor(module) for module in PYTHON}


def imports(source: str, module: str, is_package: bool = False) -> set[str]:
    """Every module that the source imports, at the top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                up = module.split(".")[: None if is_package and node.level == 1 else -node.level]
                base = ".".join([*up, base] if base else up)
            # "from fastzoo import ops" imports a floor, "from fastzoo import info" likewise.
            found |= {
                f"{base}.{a.name}"
                if base == "fastzoo" and floor(f"fastzoo.{a.name}") in FLOORS
                else base
                for a in node.names
            }
    return found


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    here = floor(module)
    allowed = OTHER_PROJECTS.get(here, ANY_PROJECT)
    wrong = []
    for imported in sorted(imports(source, module, is_package)):
        project = imported.split(".")[0]
        if project == "fastzoo":
            if floor(imported) not in MAY_IMPORT[here]:
                wrong.append(f"{module} ({here}) imports {imported}")
        elif project not in sys.stdlib_module_names and project not in allowed:
            wrong.append(f"{module} ({here}) imports {imported}")
    return wrong


@pytest.mark.parametrize("module", PYTHON)
def test_arrows_go_one_way(module: str) -> None:
    path = PYTHON[module]
    assert violations(path.read_text(), module, path.name == "__init__.py") == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("fastzoo.reference.x", "from fastzoo.ops import nms"),
        ("fastzoo.reference.x", "import numpy"),
        ("fastzoo.reference.x", "def f():\n    from fastzoo import ops"),
        ("fastzoo.ops.x", "from fastzoo.nn import Layer"),
        ("fastzoo.ops.x", "from ..nn import Layer"),
        ("fastzoo.ops.x", "import fastzoo"),
        ("fastzoo.ops.x", "import triton"),
        ("fastzoo.kernels.x", "from fastzoo.ops import nms"),
        ("fastzoo.kernels.x", "import numpy"),
        ("fastzoo.nn.x", "from fastzoo.kernels import nms"),
        ("fastzoo.samplers.x", "from fastzoo.nn import Layer"),
        ("fastzoo.cli", "from fastzoo.models.x import Model"),
        ("fastzoo.metrics.x", "from fastzoo.kernels import nms"),
    ],
)
def test_a_wrong_arrow_is_seen(module: str, source: str) -> None:
    assert len(violations(source, module)) == 1


def test_only_the_zoo_may_import_models() -> None:
    assert {here for here, allowed in MAY_IMPORT.items() if "models" in allowed} == {"models"}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_every_room(family: str) -> None:
    irregular = 'triton="' not in (ROOT / f"fastzoo/ops/{family}.py").read_text()
    rooms = [room.format(family) for room in ROOMS if room != "kernels/{}.py" or not irregular]
    assert [room for room in rooms if not (ROOT / room).exists()] == []


def included(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE)


@pytest.mark.parametrize("path", NATIVE, ids=lambda p: str(p.relative_to(ROOT / "csrc")))
def test_native_code_includes_only_what_its_floor_may(path: Path) -> None:
    where = path.relative_to(ROOT / "csrc").as_posix()
    # Kernels and arithmetic know nothing of torch; entries know its stable ABI; only module.cpp
    # knows Python.
    no_torch = where.startswith(("math/", "cpu/kernels/", "cpu/runtime/"))
    stable = ("torch/csrc/stable/", "torch/headeronly/", "torch/csrc/inductor/aoti_torch/c/")
    for header in included(path):
        if header.startswith(("pybind11", "Python.h")):
            assert where == "module.cpp", header
        if header.startswith(("ATen", "c10", "torch/")):
            assert header.startswith(stable), header
            assert not no_torch, header
        if "torch_abi.h" in header:
            assert not no_torch, header
        if header.startswith("."):
            target = (path.parent / header).resolve().relative_to(ROOT / "csrc").parts[0]
            own = path.relative_to(ROOT / "csrc").parts[0]
            assert target in ("math", "torch_abi.h", own), f"{own} includes {target}"


def test_no_file_is_called_utils() -> None:
    folders = ("fastzoo", "kernels", "csrc", "tests", "benchmarks", "tools", "docs", "examples")
    vague = re.compile(r"^_?(utils?|helpers?|common|misc)$")
    paths = [p for folder in folders for p in (ROOT / folder).rglob("*")]
    assert [str(p) for p in paths if vague.match(p.stem)] == []
