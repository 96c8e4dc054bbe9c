"""Work that is made of several operators."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

import fastzoo
from fastzoo.testing import BenchmarkCase, OpSpec


@dataclasses.dataclass(frozen=True)
class Workload:
    """What an :class:`OpSpec` does not describe: the gradients of several results, a module's step.

    Its right answers are in benchmarks/expected.py.

    Args:
        name: as it appears in the tables.
        operator: the dispatcher operator whose backends can do it.
        prepare: ``prepare(*args, **kwargs) -> call`` of fastzoo, on the backend that is forced.
        eager: the same as one writes it in PyTorch, of the same arguments.
        eager_bytes: as that of an operator.
        benchmarks: its cases.
        optimizer: of what the gradients are taken of: what a call ends with, given them. Then the
            operators that a call dispatches are counted, too.
    """

    name: str
    operator: str
    prepare: Callable[..., Callable[[], Any]]
    eager: Callable[..., Any]
    eager_bytes: Callable[..., float]
    benchmarks: tuple[BenchmarkCase, ...]
    optimizer: Callable[[tuple[Tensor, ...]], Callable[[tuple[Tensor, ...]], object]] | None = None


def prepared(work: OpSpec | Workload, backend: str, *args: Any, **kwargs: Any) -> Callable[[], Any]:
    """fastzoo's call on one backend."""
    if isinstance(work, OpSpec):
        return functools.partial(work.function, *args, **kwargs, backend=backend)
    call = work.prepare(*args, **kwargs)

    def forced() -> Any:
        with fastzoo.use_backend(backend):
            return call()

    return forced
