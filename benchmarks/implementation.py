"""One way to compute an operator: a backend of fastzoo, or a peer."""

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_CPU_MEMORY = 4e9


class Unavailable(Exception):
    """Why an implementation cannot run a row here; the report shows it in place of a time."""


@dataclasses.dataclass(frozen=True)
class Implementation:
    """
    Args:
        name: as it appears in the tables.
        operators: by operator, ``prepare(*args, **kwargs) -> call``. What users of it do once,
            outside of the call, is done in ``prepare``: an index is built, boxes are converted.
            ``call()`` returns indices. ``prepare`` may raise :class:`Unavailable`.
        kind: ``auto`` (what fastzoo runs by default), ``backend`` (another one of its own) or
            ``peer``.
    """

    name: str
    operators: dict[str, Callable[..., Callable[[], Any]]]
    kind: str = "peer"


def require(module: str) -> Any:
    """The imported module."""
    try:
        return importlib.import_module(module)
    except Exception as error:  # a broken install raises more than ImportError
        raise Unavailable(f"it cannot be imported ({first_line(error)})") from error


def require_cpu(tensor: Tensor) -> None:
    if tensor.device.type != "cpu":
        raise Unavailable("it runs on the CPU only")


def require_memory(needed: float, device: torch.device) -> None:
    """Refuse what would swap, or push another user of the machine out."""
    free = torch.cuda.mem_get_info(device)[0] / 2 if device.type == "cuda" else _CPU_MEMORY
    if needed > free:
        raise Unavailable(f"it needs {needed / 1e9:.1f} GB")


def first_line(error: Exception) -> str:
    """What a table has room for of an error."""
    line = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {line[:120]}"
