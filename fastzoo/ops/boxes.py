"""How much boxes overlap: intersection over union and its kin, for boxes along the axes or rotated,
pair by pair or each with each, and the losses made of them."""

from typing import Any

import torch
from torch import Tensor

from fastzoo import reference
from fastzoo.ops._checks import (
    check_choice,
    check_floating,
    check_reduction,
    check_same,
    check_tensor,
)
from fastzoo.ops._operator import Operator
from fastzoo.reference.boxes import to_corners
from fastzoo.reference.contrastive import reduce
from fastzoo.reference.precision import compute_dtype

ANGLES = ("rad", "deg")
_PUBLIC = (
    "box_iou",
    "generalized_box_iou",
    "distance_box_iou",
    "complete_box_iou",
    "generalized_box_iou_loss",
    "distance_box_iou_loss",
    "complete_box_iou_loss",
)


def _shape(boxes1: Tensor, boxes2: Tensor, pairwise: bool) -> tuple[Any, ...]:
    return (boxes1.shape[0], boxes2.shape[0]) if pairwise else (boxes1.shape[0],)


def _fake_overlap(
    boxes1: Tensor, boxes2: Tensor, measure: str, pairwise: bool, eps: float
) -> Tensor:
    return boxes1.new_empty(_shape(boxes1, boxes2, pairwise), dtype=compute_dtype(boxes1))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    boxes1, boxes2, *options = inputs
    ctx.save_for_backward(boxes1, boxes2)
    ctx.options = options


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    first, second = _BOX_OVERLAP_BACKWARD.like(ctx)(grad, *ctx.saved_tensors, *ctx.options)
    needs = ctx.needs_input_grad
    return first if needs[0] else None, second if needs[1] else None, None, None, None


def _fake_backward(
    grad: Tensor, boxes1: Tensor, boxes2: Tensor, measure: str, pairwise: bool, eps: float
) -> tuple[Tensor, Tensor]:
    return boxes1.new_empty(boxes1.shape), boxes2.new_empty(boxes2.shape)


_BOX_OVERLAP = Operator(
    "box_overlap(Tensor boxes1, Tensor boxes2, str measure, bool pairwise, float eps) -> Tensor",
    public=_PUBLIC,
    reference=reference.box_overlap,
    fake=_fake_overlap,
    triton="boxes.box_overlap",
    setup_context=_setup_context,
    backward=_backward,
    autocast=torch.float32,
)

_BOX_OVERLAP_BACKWARD = Operator(
    "box_overlap_backward(Tensor grad, Tensor boxes1, Tensor boxes2, str measure, bool pairwise,"
    " float eps) -> (Tensor, Tensor)",
    public=_PUBLIC,
    reference=reference.box_overlap_backward,
    fake=_fake_backward,
    triton="boxes.box_overlap_backward",
    differentiable_reference=True,
    autocast="off",
)


def _fake_rotated(boxes1: Tensor, boxes2: Tensor, degrees: bool, pairwise: bool) -> Tensor:
    return boxes1.new_empty(_shape(boxes1, boxes2, pairwise), dtype=compute_dtype(boxes1))


_BOX_IOU_ROTATED = Operator(
    "box_iou_rotated(Tensor boxes1, Tensor boxes2, bool degrees, bool pairwise) -> Tensor",
    reference=reference.box_iou_rotated,
    fake=_fake_rotated,
    has=("reference", "cpu", "cuda"),
    autocast=torch.float32,
)


def check_boxes(name: str, boxes: Tensor, columns: int = 4) -> None:
    check_tensor(name, boxes, f"[N, {columns}]", 2)
    if boxes.shape[1] != columns:
        raise ValueError(f"{name}: expected shape [N, {columns}], got {list(boxes.shape)}")
    check_floating(name, boxes)


def _check_two(boxes1: Tensor, boxes2: Tensor, columns: int, pairwise: bool) -> None:
    check_boxes("boxes1", boxes1, columns)
    check_boxes("boxes2", boxes2, columns)
    check_same("boxes1", boxes1, "boxes2", boxes2)
    if not pairwise and boxes1.shape[0] != boxes2.shape[0]:
        raise ValueError(
            f"boxes2: expected {boxes1.shape[0]}, one for each of boxes1, got {boxes2.shape[0]}"
        )


def _overlap(
    boxes1: Tensor, boxes2: Tensor, measure: str, pairwise: bool, eps: float, backend: str | None
) -> Tensor:
    _check_two(boxes1, boxes2, 4, pairwise)
    overload = _BOX_OVERLAP.choose(backend, boxes1.device.type)
    result: Tensor = overload(boxes1, boxes2, measure, pairwise, float(eps))
    return result


def box_iou(
    boxes1: Tensor, boxes2: Tensor, fmt: str = "xyxy", *, backend: str | None = None
) -> Tensor:
    """Intersection over union of each of ``boxes1`` with each of ``boxes2``, as torchvision's.

    The intermediates of shape [N, M] do not exist, forward or backward; only the result does.
    ``0 / 0``, of two boxes without area, is NaN, as torchvision has it. A box with ``x2 < x1`` has
    intersection 0 with every box, and a negative area.

    Args:
        boxes1: ``[N, 4]``; float32, float64, float16 or bfloat16.
        boxes2: ``[M, 4]``, dtype and device of ``boxes1``.
        fmt: ``xyxy``, ``xywh`` (corner and sides) or ``cxcywh`` (centre and sides).
        backend: ``auto``, ``reference``, ``cpu``, ``cuda`` or ``triton``; None follows
            :func:`fastzoo.use_backend`.

    Returns:
        ``[N, M]`` in float32 (float64 for float64 boxes).

    Gradient: to both, of any order; ties of a minimum or maximum share it equally. Forward-mode
    derivatives raise. Deterministic. Under autocast it computes in float32.

    Raises:
        TypeError, ValueError: an argument of the wrong kind; the message names it.
        RuntimeError: a forced backend that cannot run, with the reason.

    Source: torchvision.ops.box_iou.
    """
    for name, boxes in (("boxes1", boxes1), ("boxes2", boxes2)):
        check_boxes(name, boxes)
    return _overlap(to_corners(boxes1, fmt), to_corners(boxes2, fmt), "iou", True, 0.0, backend)


def generalized_box_iou(boxes1: Tensor, boxes2: Tensor, *, backend: str | None = None) -> Tensor:
    """``iou - (hull - union) / hull`` of each with each; ``hull`` is the area of the box around
    both.

    Arguments, result, gradient and errors are those of :func:`box_iou`.

    Source: Rezatofighi et al., Generalized Intersection over Union (2019), algorithm 1.
    """
    return _overlap(boxes1, boxes2, "giou", True, 0.0, backend)


def distance_box_iou(
    boxes1: Tensor, boxes2: Tensor, eps: float = 1e-7, *, backend: str | None = None
) -> Tensor:
    """``iou - d^2 / c^2`` of each with each: ``d`` between the centres, ``c`` the diagonal of the
    box around both.

    Arguments, result, gradient and errors are those of :func:`box_iou`; ``eps`` is added to the
    denominators but the union, as torchvision has it.

    Source: Zheng et al., Distance-IoU Loss (2020), equation 7.
    """
    return _overlap(boxes1, boxes2, "diou", True, eps, backend)


def complete_box_iou(
    boxes1: Tensor, boxes2: Tensor, eps: float = 1e-7, *, backend: str | None = None
) -> Tensor:
    """``iou - d^2 / c^2 - alpha v`` of each with each: see :func:`complete_box_iou_loss`.

    Arguments, result, gradient and errors are those of :func:`box_iou`; ``eps`` is added to the
    denominators but the union, as torchvision has it.

    Source: Zheng et al., Distance-IoU Loss (2020), equations 8 to 11.
    """
    return _overlap(boxes1, boxes2, "ciou", True, eps, backend)


def _loss(
    boxes1: Tensor, boxes2: Tensor, measure: str, reduction: str, eps: float, backend: str | None
) -> Tensor:
    check_reduction(reduction)
    return reduce(1 - _overlap(boxes1, boxes2, measure, False, eps, backend), reduction)


def generalized_box_iou_loss(
    boxes1: Tensor,
    boxes2: Tensor,
    reduction: str = "none",
    eps: float = 1e-7,
    *,
    backend: str | None = None,
) -> Tensor:
    """``1 - giou`` of box ``i`` of both sets, as ``torchvision.ops.generalized_box_iou_loss``.

    Args:
        boxes1, boxes2: ``[N, 4]`` as (x1, y1, x2, y2), of one dtype and device; float32, float64,
            float16 or bfloat16.
        reduction: ``none``, ``mean`` or ``sum``.
        eps: added to the denominators, so that empty boxes give numbers.
        backend: ``auto``, ``reference``, ``cpu``, ``cuda`` or ``triton``; None follows
            :func:`fastzoo.use_backend`.

    Returns:
        ``[N]`` or a scalar, in float32 (float64 for float64 boxes). The mean of no boxes is NaN.

    Gradient: to both, of any order; ties of a minimum or maximum share it equally. Forward-mode
    derivatives raise. Deterministic. Under autocast it computes in float32.

    Raises:
        TypeError, ValueError: an argument of the wrong kind; the message names it.
        RuntimeError: a forced backend that cannot run, with the reason.

    Source: Rezatofighi et al., Generalized Intersection over Union (2019), algorithm 1.
    """
    return _loss(boxes1, boxes2, "giou", reduction, eps, backend)


def distance_box_iou_loss(
    boxes1: Tensor,
    boxes2: Tensor,
    reduction: str = "none",
    eps: float = 1e-7,
    *,
    backend: str | None = None,
) -> Tensor:
    """``1 - iou + d^2 / c^2`` of box ``i`` of both sets: ``d`` between the centres, ``c`` the
    diagonal of the box around both.

    Arguments, result, gradient and errors are those of :func:`generalized_box_iou_loss`.

    Source: Zheng et al., Distance-IoU Loss (2020), equation 7.
    """
    return _loss(boxes1, boxes2, "diou", reduction, eps, backend)


def complete_box_iou_loss(
    boxes1: Tensor,
    boxes2: Tensor,
    reduction: str = "none",
    eps: float = 1e-7,
    *,
    backend: str | None = None,
) -> Tensor:
    """``1 - iou + d^2 / c^2 + alpha v`` of box ``i`` of both sets.

    ``v = 4 / pi^2 (atan(w2 / h2) - atan(w1 / h1))^2`` compares their shapes, and
    ``alpha = v / (1 - iou + v)`` has no gradient, as in the paper and in torchvision.

    Arguments, result, gradient and errors are those of :func:`generalized_box_iou_loss`.

    Source: Zheng et al., Distance-IoU Loss (2020), equations 8 to 11.
    """
    return _loss(boxes1, boxes2, "ciou", reduction, eps, backend)


def turned(boxes: Tensor, angle: str, clockwise: bool) -> Tensor:
    """Rotated boxes with their angle from x towards y, which is clockwise in an image."""
    check_choice("angle", angle, ANGLES)
    if clockwise:
        return boxes
    return torch.cat([boxes[:, :4], -boxes[:, 4:]], 1)


def box_iou_rotated(
    boxes1: Tensor,
    boxes2: Tensor,
    *,
    angle: str = "rad",
    clockwise: bool = True,
    pairwise: bool = True,
    backend: str | None = None,
) -> Tensor:
    """Intersection over union of rotated boxes.

    It is computed in float64 by a clip that has no list of corners to get out of order: identical
    boxes give exactly 1, the result is symmetric to the last bit and within [0, 1], slivers and
    boxes that touch included. It lies within ``2^-46 D^2 / A`` of the true value, ``D`` the larger
    diagonal and ``A`` the smaller area, before it is rounded. A box whose width or height is not
    positive has intersection 0 with every box; a number that is not finite gives NaN.

    Args:
        boxes1: ``[N, 5]`` as (cx, cy, width, height, angle); float32, float64, float16 or bfloat16.
        boxes2: ``[M, 5]``, dtype and device of ``boxes1``; ``M = N`` unless ``pairwise``.
        angle: its unit, ``rad`` or ``deg``. Radians beyond 10^5 lose accuracy.
        clockwise: which way it turns, as seen in an image, where y points down. mmcv has radians
            clockwise; torchvision degrees counter-clockwise.
        pairwise: each with each, or box ``i`` with box ``i``.
        backend: ``auto``, ``reference``, ``cpu`` or ``cuda``; None follows
            :func:`fastzoo.use_backend`.

    Returns:
        ``[N, M]`` or ``[N]`` in float32 (float64 for float64 boxes).

    Gradient: none. Deterministic, and equal bit for bit on every backend.

    Raises:
        TypeError, ValueError: an argument of the wrong kind; the message names it.
        RuntimeError: a forced backend that cannot run, with the reason.
    """
    _check_two(boxes1, boxes2, 5, pairwise)
    boxes1, boxes2 = (turned(b.detach(), angle, clockwise) for b in (boxes1, boxes2))
    overload = _BOX_IOU_ROTATED.choose(backend, boxes1.device.type)
    result: Tensor = overload(boxes1, boxes2, angle == "deg", pairwise)
    return result
