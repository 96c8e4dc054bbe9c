"""The formula written out in PyTorch."""

import functools
from typing import Any

from benchmarks.implementation import Implementation, Loss, require_memory
from fastzoo.testing import SPECS, OpSpec
from fastzoo.testing.losses import leaves


def _prepare(spec: OpSpec, *args: Any, **_: Any) -> Any:
    require_memory(spec.eager_bytes(*args), args[0].device.type)
    formula = functools.partial(spec.eager, *args)
    wanted = leaves(args)
    return Loss(formula, wanted) if wanted else formula


def _without_autocast(spec: OpSpec, *args: Any, **_: Any) -> Loss:
    require_memory(spec.eager_bytes(*args), args[0].device.type)
    return Loss(functools.partial(spec.eager, *args), leaves(args), autocast=False)


PEER = Implementation("eager", {op: functools.partial(_prepare, s) for op, s in SPECS.items()})
FLOAT32 = Implementation(
    "eager float32",
    {op: functools.partial(_without_autocast, spec) for op, spec in SPECS.items()},
    note="the same formula without autocast",
    autocast=True,
)
