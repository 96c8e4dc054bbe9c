"""mmcv's NMS functions (mmcv 2.2, ``mmcv.ops``) on fastzoo's operators.

Names, arguments and returns are theirs: ``dets`` with the scores as its last column, and indices;
NumPy arrays come back for NumPy arrays. Thresholds are rounded to float32 as theirs are, and where
they compare with ``>=`` an overlap equal to the threshold counts here too.

Everything runs on the device of its arguments, soft-NMS and matching included, in float32 or
float64, and gives the same on CPU and GPU: equal scores are ordered by lower index, where theirs
are in no order, and NaN scores come last. Other differences stand at each function.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from fastzoo import ops
from fastzoo.reference.nms import falling_order
from fastzoo.reference.precision import compute_dtype

Array = TypeVar("Array", Tensor, np.ndarray)

_METHODS = {"naive": "hard", "linear": "linear", "gaussian": "gaussian"}


def _tensors(*arrays: Tensor | np.ndarray) -> tuple[Tensor, ...]:
    return tuple(torch.from_numpy(a) if isinstance(a, np.ndarray) else a for a in arrays)


def _like(result: Tensor, given: Tensor | np.ndarray) -> Any:
    return result.cpu().numpy() if isinstance(given, np.ndarray) else result


def _single(threshold: float) -> float:
    """The float32 that theirs is compared as."""
    return float(np.float32(threshold))


def _just_below(threshold: float, dtype: torch.dtype) -> float:
    """``value >= threshold`` is ``value > _just_below(threshold)``, for values of the dtype."""
    number = torch.tensor(_single(threshold), dtype=dtype)
    return torch.nextafter(number, torch.tensor(-torch.inf, dtype=dtype)).item()


def _with_offset(boxes: Tensor, offset: int) -> Tensor:
    """Boxes of pixels, of which the last belongs to them, as boxes of edges."""
    if offset not in (0, 1):
        raise ValueError(f"offset: expected 0 or 1, got {offset!r}")
    return boxes + boxes.new_tensor([0, 0, 1, 1]) if offset else boxes


def _with_scores(boxes: Tensor, scores: Tensor) -> Tensor:
    return torch.cat([boxes, scores[:, None]], 1)


def _nms(
    boxes: Tensor,
    scores: Tensor,
    idxs: Tensor | None,
    iou_threshold: float,
    offset: int = 0,
    score_threshold: float = 0,
    max_num: int = -1,
) -> tuple[Tensor, Tensor]:
    """Scores and indices of what is kept."""
    if score_threshold > 0:
        place = (scores > score_threshold).nonzero()[:, 0]
        parts = boxes[place], scores[place], idxs if idxs is None else idxs[place]
        kept_scores, keep = _nms(*parts, iou_threshold, offset, max_num=max_num)
        return kept_scores, place[keep]
    shifted, threshold = _with_offset(boxes, offset), _single(iou_threshold)
    if idxs is None:
        keep = ops.nms(shifted, scores, threshold)
    else:
        keep = ops.batched_nms(shifted, scores, idxs, threshold)
    if max_num > 0:
        keep = keep[:max_num]
    return scores[keep], keep


def _soft_nms(
    boxes: Tensor,
    scores: Tensor,
    idxs: Tensor | None,
    iou_threshold: float = 0.3,
    sigma: float = 0.5,
    min_score: float = 1e-3,
    method: str = "linear",
    offset: int = 0,
) -> tuple[Tensor, Tensor]:
    if method not in _METHODS:
        raise ValueError(f"method: expected one of {tuple(_METHODS)}, got {method!r}")
    dtype = compute_dtype(boxes)
    keep, lowered = ops.soft_nms(
        _with_offset(boxes, offset),
        scores,
        method=_METHODS[method],
        iou_threshold=_just_below(iou_threshold, dtype),
        sigma=_single(sigma),
        score_threshold=max(0.0, _just_below(min_score, dtype)),
        idxs=idxs,
    )
    return lowered.to(scores.dtype), keep


def _nms_rotated(
    boxes: Tensor,
    scores: Tensor,
    idxs: Tensor | None,
    iou_threshold: float,
    clockwise: bool = True,
) -> tuple[Tensor, Tensor]:
    keep = ops.nms_rotated(boxes, scores, _single(iou_threshold), idxs=idxs, clockwise=clockwise)
    return scores[keep], keep


_BATCHED: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "nms": _nms,
    "soft_nms": _soft_nms,
    "nms_rotated": _nms_rotated,
}


def nms(
    boxes: Array,
    scores: Array,
    iou_threshold: float,
    offset: int = 0,
    score_threshold: float = 0,
    max_num: int = -1,
) -> tuple[Array, Array]:
    """Greedy NMS of ``boxes [N, 4]``: ``dets [k, 5]`` and int64 ``[k]``, by falling score.

    Args:
        offset: 1 for boxes of pixels, whose width is ``x2 - x1 + 1``. It is added to ``x2`` and
            ``y2``, theirs to the difference: equal for whole numbers, otherwise to a rounding.
        score_threshold: boxes of at most this score are left out; 0 or below leaves out none.
        max_num: the most boxes to return; 0 or below for no limit.

    On a GPU theirs compares ``intersection > threshold * union``, which rounds otherwise; here, as
    on their CPU, the quotient is compared.
    """
    own_boxes, own_scores = _tensors(boxes, scores)
    options = iou_threshold, offset, score_threshold, max_num
    kept_scores, keep = _nms(own_boxes, own_scores, None, *options)
    return _like(_with_scores(own_boxes[keep], kept_scores), boxes), _like(keep, boxes)


def soft_nms(
    boxes: Array,
    scores: Array,
    iou_threshold: float = 0.3,
    sigma: float = 0.5,
    min_score: float = 1e-3,
    method: str = "linear",
    offset: int = 0,
) -> tuple[Array, Array]:
    """Soft-NMS of ``boxes [N, 4]``: ``dets [k, 5]`` with the lowered scores, and int64 ``[k]``, in
    the order in which boxes are taken.

    Args:
        method: ``naive``, ``linear`` or ``gaussian``.
        offset: as of :func:`nms`.

    Different from theirs: the best box is dropped as any other where its score is below
    ``min_score``; a score of 0 or below is dropped whatever ``min_score`` is; two boxes without
    area do not make a score NaN under ``gaussian``, whose exponential is rounded once.
    """
    own_boxes, own_scores = _tensors(boxes, scores)
    options = iou_threshold, sigma, min_score, method, offset
    lowered, keep = _soft_nms(own_boxes, own_scores, None, *options)
    return _like(_with_scores(own_boxes[keep], lowered), boxes), _like(keep, boxes)


def nms_match(dets: Array, iou_threshold: float) -> list[Array]:
    """Groups of ``dets [N, 5]``, boxes and scores: the indices of a kept box and of those that it
    suppresses, by falling score; a list of int64 arrays.

    Boxes are suppressed by an overlap of ``iou_threshold`` or more.
    """
    (own,) = _tensors(dets)
    if len(own) == 0:
        return []
    if own.dim() != 2 or own.shape[1] != 5:
        raise ValueError(f"dets: expected shape [N, 5], got {list(own.shape)}")
    scores = own[:, 4]
    limit = _just_below(iou_threshold, compute_dtype(own))
    keep, group = ops.nms_match(own[:, :4], scores, limit)
    order = falling_order(scores)
    members = order[group[order].argsort(stable=True)]
    sizes = torch.bincount(group, minlength=len(keep)).tolist()
    return [_like(part, dets) for part in members.split(sizes)]


def nms_rotated(
    dets: Tensor,
    scores: Tensor,
    iou_threshold: float,
    labels: Tensor | None = None,
    clockwise: bool = True,
) -> tuple[Tensor, Tensor]:
    """NMS of rotated ``dets [N, 5]`` as (cx, cy, width, height, radians): ``[k, 6]`` with the
    scores, and int64 ``[k]``, by falling score.

    Args:
        labels: ``[N]``: boxes of different labels do not overlap.
        clockwise: which way the angle turns, as seen in an image.

    Different from theirs: overlaps are right, where theirs lose corners of boxes that are
    identical (1/3 instead of 1 has been seen: mmcv #2621) or nearly so; ``labels`` keep boxes
    apart, where theirs are taken and have no effect; an overlap equal to the threshold does not
    suppress, as on their GPU; and no boxes give ``[0, 6]`` and ``[0]``, where theirs give ``dets``
    and None.
    """
    if labels is not None and labels.is_floating_point():
        labels = labels.unique(return_inverse=True)[1]
    kept_scores, keep = _nms_rotated(dets, scores, labels, iou_threshold, clockwise)
    return _with_scores(dets[keep], kept_scores), keep


def batched_nms(
    boxes: Tensor,
    scores: Tensor,
    idxs: Tensor,
    nms_cfg: dict[str, Any] | None,
    class_agnostic: bool = False,
) -> tuple[Tensor, Tensor]:
    """NMS within each class: ``dets [k, 5]`` or ``[k, 6]``, and int64 ``[k]``, by falling score.

    Args:
        boxes: ``[N, 4]``, or ``[N, 5]`` with the type ``nms_rotated``.
        idxs: ``[N]`` integers, the classes.
        nms_cfg: ``type`` (``nms``, ``soft_nms`` or ``nms_rotated``; default ``nms``), the arguments
            of that function, and ``class_agnostic`` or ``max_num``. ``split_thr`` is of no
            consequence. None only sorts.

    Classes are told apart by their numbers, where theirs moves boxes away from each other, which
    goes wrong for negative coordinates and rounds them off for many classes.
    """
    if nms_cfg is None:
        order = falling_order(scores)
        return _with_scores(boxes[order], scores[order]), order
    config = dict(nms_cfg)
    class_agnostic = config.pop("class_agnostic", class_agnostic)
    config.pop("split_thr", None)
    kind, max_num = config.pop("type", "nms"), config.pop("max_num", -1)
    if kind not in _BATCHED:
        raise ValueError(f"nms_cfg: expected a type of {tuple(_BATCHED)}, got {kind!r}")
    kept_scores, keep = _BATCHED[kind](boxes, scores, None if class_agnostic else idxs, **config)
    if max_num > 0:
        kept_scores, keep = kept_scores[:max_num], keep[:max_num]
    return _with_scores(boxes[keep], kept_scores), keep
