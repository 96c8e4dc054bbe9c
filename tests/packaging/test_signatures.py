"""The C++ kernels take and return what the schemas say; the stable ABI does not compare them."""

import ctypes
from pathlib import Path
from typing import Any

import pytest
import torch

from fastzoo import _native
from fastzoo.ops._operator import OPERATORS
from tests.packaging.libraries import LIBRARIES, PACKAGE


def registered(library: Path) -> dict[str, str]:
    """``overload: types`` as the library's C++ functions are declared."""
    signatures = ctypes.CDLL(str(library)).fastzoo_signatures
    signatures.restype = ctypes.c_char_p
    return parse(signatures().decode())


def parse(lines: str) -> dict[str, str]:
    return {
        name: " ".join(types.split())
        for name, types in (line.split(":", 1) for line in lines.splitlines())
    }


def of_schema(overload: Any) -> str:
    schema = overload._schema
    arguments = " ".join(str(a.type) for a in schema.arguments)
    return f"{arguments} -> {' '.join(str(r.type) for r in schema.returns)}"


def mismatches(signatures: dict[str, str]) -> list[str]:
    wrong = []
    for qualified, found in signatures.items():
        name, _, backend = qualified.partition(".")
        operator = OPERATORS.get(name)
        overload = operator and (operator.overloads.get(backend) if backend else operator.default)
        if overload is None:
            wrong.append(f"{qualified}: no such overload")
        elif found != of_schema(overload):
            wrong.append(f"{qualified}: C++ has {found}, the schema {of_schema(overload)}")
    return wrong


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.name)
def test_cpp_agrees_with_the_schemas(library: Path) -> None:
    signatures = registered(library)
    assert signatures
    assert mismatches(signatures) == []


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.name)
def test_every_native_kernel_tells_its_signature(library: Path) -> None:
    """m.impl() in place of implement() would register a kernel that nobody compares."""
    cuda = library != PACKAGE / "_C_cpu.so"
    backend = "cuda" if cuda else "cpu"
    if cuda and not (_native.emulator_loaded or _native.cuda_missing is None):
        pytest.skip(f"{library.name} is not loaded here")
    key = "CUDA" if library == PACKAGE / "_C_cuda.so" else "CPU"
    kernels = {
        overload.name().removeprefix("fastzoo::")
        for operator in OPERATORS.values()
        for name, overload in operator.overloads.items()
        if name == backend and torch._C._dispatch_has_kernel_for_dispatch_key(overload.name(), key)
    }
    assert kernels
    assert kernels <= set(registered(library))


@pytest.mark.parametrize(
    "line",
    [
        "nms.cpu: Tensor Tensor int -> Tensor",
        "nms.cpu: Tensor Tensor -> Tensor",
        "nms.cpu: Tensor Tensor float -> Tensor Tensor",
        "vq_nearest: Tensor Tensor Tensor str int str -> Tensor",
        "nms.metal: Tensor Tensor float -> Tensor",
        "sort: Tensor -> Tensor",
    ],
)
def test_a_wrong_signature_is_seen(line: str) -> None:
    assert len(mismatches(parse(line))) == 1


def test_a_right_signature_passes() -> None:
    lines = (
        "nms: Tensor Tensor float -> Tensor\n"
        "vq_nearest.cpu: Tensor Tensor Tensor str int str -> Tensor Tensor "
    )
    assert mismatches(parse(lines)) == []
