"""The formula written out in PyTorch."""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.implementation import (
    Implementation,
    Loss,
    by_generator,
    require_few_steps,
    require_memory,
)
from benchmarks.samplers import eager_ode_step
from benchmarks.workload import Workload
from benchmarks.workloads import MEASURED
from fastzoo import reference
from fastzoo.testing import OpSpec
from fastzoo.testing.boxes import eager_box_iou
from fastzoo.testing.detections import eager_multiclass_nms
from fastzoo.testing.losses import leaves
from fastzoo.testing.vq import VQ_NEAREST


def matrix_nms(
    boxes: Tensor, scores: Tensor, *, sigma: float = 2.0, score_threshold: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The gaussian method as SOLOv2 has it: the whole matrix of overlaps, and its decays."""
    scores, order = scores.sort(descending=True, stable=True)
    overlaps = eager_box_iou(boxes[order], boxes[order]).triu(diagonal=1)
    covered = overlaps.amax(0)[:, None]
    decay = torch.exp(sigma * (covered.square() - overlaps.square())).amin(0).clamp(max=1)
    lowered, again = (scores * decay).sort(descending=True, stable=True)
    kept = lowered > score_threshold
    return order[again][kept], lowered[kept]


def _matrix_bytes(boxes: Tensor, _: Tensor) -> float:
    return 24.0 * len(boxes) ** 2


def soft_nms(
    boxes: Tensor,
    scores: Tensor,
    *,
    method: str = "linear",
    iou_threshold: float = 0.3,
    sigma: float = 0.5,
    score_threshold: float = 0.001,
) -> tuple[Tensor, Tensor]:
    """The sequence, with every box lowered at each step."""
    left = scores.clone()
    keep: list[Tensor] = []
    taken: list[Tensor] = []
    while True:
        best, i = left.max(0)
        if not best > score_threshold:
            return torch.stack(keep), torch.stack(taken)
        keep.append(i)
        taken.append(best)
        overlap = eager_box_iou(boxes[i][None], boxes)[0]
        if method == "gaussian":
            left *= torch.exp(-overlap.square() / sigma)
        else:
            left *= torch.where(overlap > iou_threshold, 1 - overlap, 1)
        left[i] = -torch.inf


def vq_nearest(x: Tensor, codebook: Tensor, *, metric: str = "l2", **_: Any) -> Tensor:
    if metric == "cosine":
        return (x @ F.normalize(codebook).t()).argmax(1)
    found: Tensor = VQ_NEAREST.eager(x, codebook)
    return found


def guidance_factor(cond: Tensor, uncond: Tensor, scale: float, rescale: float) -> Tensor:
    guided = uncond + scale * (cond - uncond)
    return rescale * (cond.std(1) / guided.std(1)) + (1 - rescale)


# Where the keyword arguments of a case count, and what the formula then is.
_WITH_OPTIONS: dict[str, Callable[..., Any]] = {
    "guidance_factor": guidance_factor,
    "matrix_nms": matrix_nms,
    "ode_step": eager_ode_step,
    "multiclass_nms": eager_multiclass_nms,
    "rational_quadratic_spline": reference.rational_quadratic_spline,
    "soft_nms": soft_nms,
    "vq_nearest": vq_nearest,
}
_BYTES: dict[str, Callable[..., float]] = {"matrix_nms": _matrix_bytes}


def formula(spec: OpSpec | Workload, *args: Any, **kwargs: Any) -> Callable[..., Any]:
    """The formula of an operator with its options, to be called with the positional arguments.

    Raises:
        Unavailable: it would not fit into memory, or take too long.
    """
    needed = _BYTES.get(spec.name, spec.eager_bytes)
    require_memory(needed(*args), args[0].device.type)
    if spec.name == "sample_farthest_points":
        require_few_steps(args[0], args[2])
    if isinstance(spec, Workload):
        return functools.partial(spec.eager, **kwargs)
    if spec.name in _WITH_OPTIONS:
        return functools.partial(_WITH_OPTIONS[spec.name], **kwargs)
    return spec.eager


def _prepare(spec: OpSpec | Workload, *args: Any, **kwargs: Any) -> Any:
    call = functools.partial(formula(spec, *args, **kwargs), *args)
    wanted = leaves(args)
    return Loss(call, wanted) if wanted else by_generator(call, kwargs)


def _without_autocast(spec: OpSpec | Workload, *args: Any, **_: Any) -> Loss:
    require_memory(spec.eager_bytes(*args), args[0].device.type)
    return Loss(functools.partial(spec.eager, *args), leaves(args), autocast=False)


PEER = Implementation("eager", {op: functools.partial(_prepare, s) for op, s in MEASURED.items()})
FLOAT32 = Implementation(
    "eager float32",
    {op: functools.partial(_without_autocast, spec) for op, spec in MEASURED.items()},
    note="the same formula without autocast",
    autocast=True,
)
