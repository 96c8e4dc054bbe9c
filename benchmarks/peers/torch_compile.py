"""The eager formula through torch.compile."""

import functools
from typing import Any

import torch

from benchmarks.implementation import (
    Implementation,
    Loss,
    Unavailable,
    first_line,
    require_memory,
)
from fastzoo.testing import SPECS, OpSpec
from fastzoo.testing.losses import leaves


def _prepare(spec: OpSpec, *args: Any, **_: Any) -> Any:
    require_memory(spec.eager_bytes(*args), args[0].device.type)
    compiled = functools.partial(torch.compile(spec.eager, dynamic=False), *args)
    wanted = leaves(args)
    if wanted:
        return Loss(compiled, wanted)
    try:
        compiled()
    except Exception as error:  # whatever a missing compiler raises
        raise Unavailable(f"it does not compile ({first_line(error)})") from error
    return compiled


def _nms(*_: Any) -> Any:
    raise Unavailable("the greedy pass branches on its data: a graph break for every box")


_PREPARED = {op: functools.partial(_prepare, spec) for op, spec in SPECS.items()}
PEER = Implementation("torch.compile", {**_PREPARED, "nms": _nms})
