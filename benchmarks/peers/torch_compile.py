"""The eager formula through torch.compile."""

import functools
from typing import Any

import torch

from benchmarks.implementation import Implementation, Loss, Unavailable, first_line
from benchmarks.peers.eager import formula
from benchmarks.workloads import MEASURED, Workload
from fastzoo.testing import OpSpec
from fastzoo.testing.losses import leaves

_BRANCHING = ("nms", "batched_nms", "nms_match", "nms_rotated", "soft_nms", "multiclass_nms")


def _prepare(spec: OpSpec | Workload, *args: Any, **kwargs: Any) -> Any:
    written = formula(spec, *args, **kwargs)
    compiled = functools.partial(torch.compile(written, dynamic=False), *args)
    wanted = leaves(args)
    if wanted:
        return Loss(compiled, wanted)
    try:
        compiled()
    except Exception as error:  # whatever a missing compiler raises
        raise Unavailable(f"it does not compile ({first_line(error)})") from error
    return compiled


def _refuse(*_: Any, **__: Any) -> Any:
    raise Unavailable("the formula branches on its data: a graph break for every box")


_PREPARED = {op: functools.partial(_prepare, spec) for op, spec in MEASURED.items()}
PEER = Implementation("torch.compile", {**_PREPARED, **dict.fromkeys(_BRANCHING, _refuse)})
