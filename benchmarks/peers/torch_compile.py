"""The eager formula through torch.compile."""

import functools
from typing import Any

import torch

from benchmarks.implementation import Implementation, Loss, Unavailable, by_generator, first_line
from benchmarks.peers.eager import formula
from benchmarks.workload import Workload
from benchmarks.workloads import MEASURED
from fastzoo.testing import OpSpec
from fastzoo.testing.losses import leaves

_BRANCHING = ("nms", "batched_nms", "nms_match", "nms_rotated", "soft_nms", "multiclass_nms")


def _prepare(spec: OpSpec | Workload, *args: Any, **kwargs: Any) -> Any:
    written = formula(spec, *args, **kwargs)
    # A function that is compiled for the ninth time is run eagerly: each row starts from nothing.
    torch.compiler.reset()
    compiled = functools.partial(torch.compile(written, dynamic=False), *args)
    wanted = leaves(args)
    if wanted:
        return Loss(compiled, wanted)
    try:
        compiled()
    except Exception as error:  # whatever a missing compiler raises
        raise Unavailable(f"it does not compile ({first_line(error)})") from error
    return by_generator(compiled, kwargs)


def _refuse(reason: str, *_: Any, **__: Any) -> Any:
    raise Unavailable(reason)


_REASONS = {
    **dict.fromkeys(_BRANCHING, "the formula branches on its data: a graph break for every box"),
    "sample_farthest_points": "it would unroll the loop over the points",
    "SplineFlow": "zuko's flow is compiled in the place of the formula",
    "MAF": "it would unroll the loop over the features",
    "sample": "it would unroll the loop over the steps",
    "odeint": "how many steps there are depends on the data",
    "denoising_step": "it would compile the model, too",
    "voxel_grid": "the formula is one sort of torch.unique, at which the graph breaks",
}
_PREPARED = {op: functools.partial(_prepare, spec) for op, spec in MEASURED.items()}
_REFUSED = {op: functools.partial(_refuse, reason) for op, reason in _REASONS.items()}
PEER = Implementation("torch.compile", {**_PREPARED, **_REFUSED})
