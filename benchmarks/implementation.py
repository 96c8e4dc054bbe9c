"""One way to compute an operator: a backend of fastzoo, or a peer."""

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

from torch import Tensor

from fastzoo.testing.timing import room

_MANY_BOXES = 100_000
_MANY_DISTANCES = 10**8


class Unavailable(Exception):
    """Why an implementation cannot run a row here; the report shows it in place of a time."""


@dataclasses.dataclass(frozen=True)
class Implementation:
    """
    Args:
        name: as it appears in the tables.
        operators: by operator, ``prepare(*args, **kwargs) -> call``. What users of it do once,
            outside of the call, is done in ``prepare``: an index is built, boxes are converted.
            ``call()`` returns indices; of a loss ``prepare`` returns a :class:`Loss` instead, and
            is given leaves where gradients are wanted; or an :class:`Other`. It may raise
            :class:`Unavailable`.
        kind: ``auto`` (what fastzoo runs by default), ``backend`` (another one of its own) or
            ``peer``.
        note: what a reader of its times has to know.
        autocast: whether it is for cases under autocast only, or for the others only; None for
            all.
    """

    name: str
    operators: dict[str, Callable[..., Any]]
    kind: str = "peer"
    note: str | None = None
    autocast: bool | None = None


@dataclasses.dataclass(frozen=True)
class Loss:
    """A loss whose gradients belong to the call.

    Args:
        forward: returns the scalar, or the results that gradients start from.
        inputs: what the gradients are taken of.
        arranged: the gradients as the definition has them, where they lie in another way.
        answers: the arguments and keyword arguments of the definition that it answers, where these
            are not the row's.
        autocast: whether autocast is for it.
    """

    forward: Callable[[], Tensor | tuple[Tensor, ...]]
    inputs: tuple[Tensor, ...]
    arranged: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]] = lambda gradients: gradients
    answers: tuple[tuple[Any, ...], dict[str, Any]] | None = None
    autocast: bool = True


@dataclasses.dataclass(frozen=True)
class Other:
    """A call that answers another question than its row's: one with other noise.

    Args:
        call: as what ``prepare`` returns.
        kwargs: the keyword arguments of the definition that it answers.
    """

    call: Callable[[], Any]
    kwargs: dict[str, Any]


def by_generator(call: Callable[[], Any], kwargs: dict[str, Any]) -> Any:
    """A peer's call with the noise of torch's generator, also where the case's is by counter."""
    if kwargs.get("noise") == "seeds":
        return Other(call, {**kwargs, "noise": "generator"})
    return call


def require(module: str) -> Any:
    """The imported module."""
    try:
        return importlib.import_module(module)
    except Exception as error:  # a broken install raises more than ImportError
        raise Unavailable(f"it cannot be imported ({first_line(error)})") from error


def require_cpu(tensor: Tensor) -> None:
    if tensor.device.type != "cpu":
        raise Unavailable("it runs on the CPU only")


def require_memory(needed: float, device: str) -> None:
    if needed > room(device):
        raise Unavailable(f"it needs {needed / 1e9:.1f} GB")


def require_few(boxes: int) -> None:
    """For what compares every pair: a million boxes take the better part of an hour."""
    if boxes > _MANY_BOXES:
        raise Unavailable(f"it compares every pair of {boxes:,} boxes")


def require_few_steps(points: Tensor, k: int) -> None:
    """For what takes several calls of torch a step: a large cloud takes it half a minute."""
    if points.device.type == "cpu" and points.shape[1] * k > _MANY_DISTANCES:
        raise Unavailable(f"it goes over {points.shape[1]:,} points {k:,} times, call by call")


def first_line(error: Exception) -> str:
    """What a table has room for of an error."""
    line = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {line[:120]}"
