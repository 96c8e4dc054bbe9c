"""Which implementation of an operator runs, and why another cannot.

There are four: ``reference`` (plain PyTorch, any device), ``cpu`` (C++), ``cuda`` (CUDA C++) and
``triton``. Left alone (``auto``), every operator has one owner per device, fixed when fastzoo is
imported. ``backend=`` on a call, ``use_backend`` around calls and ``FASTZOO_BACKEND`` force one,
in that order of precedence; a forced backend that cannot run raises with the reason.
"""

import contextlib
import importlib.util
import os
from collections.abc import Iterator

from fastzoo import _native

NAMES = ("reference", "cpu", "cuda", "triton")


def _checked(name: str | None, source: str) -> str | None:
    """The backend's name, or None for auto."""
    if name is None or name == "auto":
        return None
    if name not in NAMES:
        raise ValueError(f"{source}: unknown backend {name!r}, expected auto or one of {NAMES}")
    return name


# A plain global, not a context variable: torch.compile guards on it.
forced: str | None = _checked(os.environ.get("FASTZOO_BACKEND") or None, "FASTZOO_BACKEND")
interpreted = os.environ.get("TRITON_INTERPRET") == "1"
_triton_missing = (
    None if importlib.util.find_spec("triton") else "triton is not installed (pip install triton)"
)


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every fastzoo operator on one backend inside the ``with`` block.

    The choice is process-wide, like torch.backends' flags: other threads see it too.

    Args:
        name: ``auto``, ``reference``, ``cpu``, ``cuda`` or ``triton``.

    Raises:
        ValueError: the name is unknown.
    """
    global forced
    before, forced = forced, _checked(name, "use_backend")
    try:
        yield
    finally:
        forced = before


def refusal(backend: str, device_type: str) -> str | None:
    """Why ``backend`` cannot run on tensors of this device type, or None where it can."""
    if backend == "reference":
        return None
    if backend == "cpu":
        return _native.cpu_missing or _wants(device_type, "cpu")
    if backend == "cuda":
        if device_type == "cpu":
            return None if _native.emulator_loaded else _wants(device_type, "cuda")
        return _native.cuda_missing or _wants(device_type, "cuda")
    if backend == "triton":
        if device_type == "cpu":
            wanted = None if interpreted else _wants(device_type, "cuda")
        else:
            wanted = _wants(device_type, "cuda")
        return _triton_missing or wanted
    raise ValueError(f"unknown backend {backend!r}, expected one of {NAMES}")


def _wants(device_type: str, wanted: str) -> str | None:
    return None if device_type == wanted else f"it runs on {wanted} tensors, not on {device_type}"
