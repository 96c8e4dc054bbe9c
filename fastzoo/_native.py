"""The compiled libraries: what was built, what could be loaded, and why not.

Loading touches no driver: ``_C_cuda.so`` is linked to the CUDA runtime library alone, and is
loaded only beside a torch of the same CUDA major.
"""

import ctypes
import functools
import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_PACKAGE = Path(__file__).parent
_NO_NATIVE = _PACKAGE / "_no_native.txt"


def _load_facts() -> tuple[dict[str, Any], str | None]:
    try:
        return dict(importlib.import_module("fastzoo._C").facts()), None
    except ImportError as error:
        if _NO_NATIVE.exists():
            return {}, _NO_NATIVE.read_text().strip()
        return {}, f"fastzoo._C cannot be imported ({error}): reinstall fastzoo"


def library(name: str) -> Path:
    """Where ``_C_cpu`` or ``_C_cuda`` is, if it was built."""
    return _PACKAGE / f"{name}.so"


def _load_library(name: str) -> str | None:
    """Load one library of operators; the reason why it cannot be, if so."""
    if not library(name).exists():
        return f"{name}.so was not built"
    try:
        torch.ops.load_library(library(name))
    except OSError as error:
        return f"{name}.so cannot be loaded with torch {torch.__version__}: {error}"
    return None


def _load_cuda() -> str | None:
    built = facts.get("cuda")
    if not built:
        return "fastzoo was built without CUDA (FASTZOO_CUDA=1 and nvcc build it)"
    if torch.version.cuda is None:
        return f"fastzoo was built for CUDA {built}; this torch {torch.__version__} has no CUDA"
    if torch.version.cuda.split(".")[0] != built.split(".")[0]:
        return f"fastzoo was built for CUDA {built}; this torch is built for {torch.version.cuda}"
    return _load_library("_C_cuda")


def load_emulator(path: str | os.PathLike[str]) -> None:
    """Load the CUDA kernels built for the host (tests only): ``cuda`` then runs on CPU tensors."""
    global emulator_loaded
    torch.ops.load_library(path)
    emulator_loaded = True


_open = functools.cache(ctypes.CDLL)


def _cpu_library() -> ctypes.CDLL | None:
    return None if cpu_missing else _open(str(library("_C_cpu")))


def cpu_capability() -> str | None:
    """The instruction set that the C++ CPU kernels run on, or None where they are not built.

    Raises:
        RuntimeError: ``FASTZOO_CPU_CAPABILITY`` asks for one that this CPU lacks.
    """
    library = _cpu_library()
    if library is None:
        return None
    active: Callable[[], bytes | None] = library.fastzoo_cpu_capability
    active.restype = ctypes.c_char_p  # type: ignore[attr-defined]
    name = active()
    if name is None:
        raise RuntimeError(_last_error(library))
    return name.decode()


def force_cpu_capability(name: str | None) -> None:
    """Run the C++ CPU kernels on one instruction set; None returns to the default.

    Raises:
        RuntimeError: the name is unknown, this CPU lacks it, or the kernels are not built.
    """
    library = _cpu_library()
    if library is None:
        raise RuntimeError(cpu_missing)
    if library.fastzoo_force_cpu_capability((name or "").encode()) != 0:
        raise RuntimeError(_last_error(library))


def _last_error(library: ctypes.CDLL) -> str:
    library.fastzoo_cpu_error.restype = ctypes.c_char_p
    message: bytes = library.fastzoo_cpu_error()
    return message.decode()


facts, native_missing = _load_facts()
cpu_missing = native_missing or _load_library("_C_cpu")
cuda_missing = native_missing or _load_cuda()
emulator_loaded = False
