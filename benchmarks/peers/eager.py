"""The formula written out in PyTorch."""

import functools
from typing import Any

from benchmarks.implementation import Implementation, Loss, require_memory
from fastzoo.testing import SPECS, OpSpec
from fastzoo.testing.losses import leaves


def _prepare(spec: OpSpec, autocast: bool, *args: Any, **_: Any) -> Any:
    require_memory(spec.eager_bytes(*args), args[0].device.type)
    formula = functools.partial(spec.eager, *args)
    wanted = leaves(args)
    return Loss(formula, wanted, autocast=autocast) if wanted else formula


def _implementation(name: str, autocast: bool, **fields: Any) -> Implementation:
    operators = {op: functools.partial(_prepare, spec, autocast) for op, spec in SPECS.items()}
    return Implementation(name, operators, **fields)


PEER = _implementation("eager", True)
FLOAT32 = _implementation(
    "eager float32", False, note="the same formula without autocast", only_autocast=True
)
