"""Non-maximum suppression."""

import torch
from torch import Tensor

from fastzoo import reference
from fastzoo.ops._checks import check_floating, check_same, check_tensor
from fastzoo.ops._operator import Operator


def _fake(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    kept = torch.library.get_ctx().new_dynamic_size()
    return boxes.new_empty(kept, dtype=torch.int64)


_NMS = Operator(
    "nms(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor",
    reference=reference.nms,
    fake=_fake,
    triton="nms.nms",
    autocast=torch.float32,
)


def nms(
    boxes: Tensor, scores: Tensor, iou_threshold: float, *, backend: str | None = None
) -> Tensor:
    """Greedy non-maximum suppression, as ``torchvision.ops.nms``.

    Boxes are visited by falling score; one is dropped if a box kept before it overlaps it by an
    intersection over union strictly greater than ``iou_threshold``.

    Every backend returns the same indices bit for bit:

    - equal scores (-0 equals +0) are visited by lower index; NaN scores last;
    - overlaps are computed in float32 (float64 for float64 boxes), one rounding an operation, and
      compared with the threshold in double precision;
    - a box with a NaN coordinate neither suppresses nor is suppressed;
    - an inverted or empty box has intersection 0 with every box, and 0/0 suppresses nothing: with
      ``iou_threshold >= 0`` it is always kept.

    Args:
        boxes: ``[N, 4]`` as (x1, y1, x2, y2); float32, float64, float16 or bfloat16.
        scores: ``[N]``, dtype and device of ``boxes``.
        iou_threshold: any float; NaN suppresses nothing.
        backend: ``auto``, ``reference``, ``cpu``, ``cuda`` or ``triton``; None follows
            :func:`fastzoo.use_backend`.

    Returns:
        int64 indices of the kept boxes, by falling score.

    Gradient: none, the result is integer. Deterministic. On a GPU the number of kept boxes is
    read once (one synchronisation). Under autocast it computes in float32.

    Raises:
        TypeError, ValueError: an argument of the wrong kind; the message names it.
        RuntimeError: a forced backend that cannot run, with the reason.

    Source: greedy NMS with the strict comparison of torchvision.ops.nms.
    """
    check_tensor("boxes", boxes, "[N, 4]", 2)
    check_tensor("scores", scores, "[N]", 1)
    if boxes.shape[1] != 4:
        raise ValueError(f"boxes: expected shape [N, 4], got {list(boxes.shape)}")
    if scores.shape[0] != boxes.shape[0]:
        raise ValueError(f"scores: expected {boxes.shape[0]}, one a box, got {list(scores.shape)}")
    check_floating("boxes", boxes)
    check_floating("scores", scores)
    check_same("boxes", boxes, "scores", scores)
    result: Tensor = _NMS.choose(backend, boxes.device.type)(boxes, scores, float(iou_threshold))
    return result
