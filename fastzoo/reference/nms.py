"""Non-maximum suppression: boxes by falling score, an overlap, and a rule for what overlaps.

The overlap is that of boxes along the axes or of rotated ones, and nothing between boxes of
different segments (classes, images). The rule drops a box (:func:`suppress`), or lowers its score
one kept box after another (:func:`soft_nms`) or all at once (:func:`matrix_nms`).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fastzoo.reference.boxes import (
    box_area,
    box_intersection,
    rotated_columns,
    rotated_iou,
)
from fastzoo.reference.exact import exponential
from fastzoo.reference.precision import compute_dtype

# Overlaps of sorted boxes: of the i-th with all after it.
Overlap = Callable[[int], Tensor]


def falling_order(scores: Tensor) -> Tensor:
    """Indices by falling score; ties by lower index, NaN last."""
    order = torch.argsort(scores, descending=True, stable=True)
    return order[torch.argsort(scores[order].isnan().byte(), stable=True)]


def box_iou_with(box: Tensor, boxes: Tensor) -> Tensor:
    """Intersection over union of one box ``[4]`` with boxes ``[N, 4]``."""
    intersection = box_intersection(box, boxes)
    return intersection / (box_area(box) + box_area(boxes) - intersection)


def round_down(threshold: float, dtype: torch.dtype) -> float:
    """The largest value of ``dtype`` not above ``threshold``.

    torch compares a float32 tensor with a Python number in float32; an overlap exceeds the double
    threshold exactly when it exceeds this.
    """
    nearest = torch.tensor(threshold, dtype=dtype)
    if nearest.item() > threshold:
        nearest = torch.nextafter(nearest, torch.tensor(-torch.inf, dtype=dtype))
    return nearest.item()


def aligned_overlap(boxes: Tensor) -> Overlap:
    return lambda i: box_iou_with(boxes[i], boxes[i + 1 :])


def rotated_overlap(boxes: Tensor, degrees: bool) -> Overlap:
    columns = rotated_columns(boxes, degrees)

    def overlap(i: int) -> Tensor:
        own = {name: column[i] for name, column in columns.items()}
        others = {name: column[i + 1 :] for name, column in columns.items()}
        return rotated_iou(own, others)

    return overlap


def gated(overlap: Overlap, idxs: Tensor) -> Overlap:
    """NaN, which suppresses nothing, between boxes of different segments."""
    if len(idxs) == 0:
        return overlap
    return lambda i: torch.where(idxs[i + 1 :] == idxs[i], overlap(i), torch.nan)


def suppress(
    boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float, overlap: str, match: bool
) -> tuple[Tensor, Tensor]:
    """Greedy suppression.

    Args:
        boxes: ``[N, 4]``, or ``[N, 5]`` for an ``overlap`` of ``rotated`` or ``rotated_degrees``.
        idxs: ``[N]`` segments, or ``[0]`` for a single one.
        match: whether the second result is wanted.

    Returns:
        The indices of kept boxes, by falling score; and ``[N]`` for each box the position among
        these of the first that suppresses it, or its own.
    """
    order = falling_order(scores)
    sorted_boxes = boxes[order].to(compute_dtype(boxes))
    if overlap == "aligned":
        overlaps = aligned_overlap(sorted_boxes)
        limit = round_down(iou_threshold, sorted_boxes.dtype)
    else:
        overlaps = rotated_overlap(sorted_boxes, overlap == "rotated_degrees")
        limit = iou_threshold
    overlaps = gated(overlaps, idxs[order] if len(idxs) else idxs)
    n = len(boxes)
    by = torch.full((n,), -1, device=boxes.device)  # which kept box settled a box
    for i in range(n):
        if by[i] < 0:
            by[i] = i
            later = by[i + 1 :]
            later[(overlaps(i) > limit) & (later < 0)] = i
    position = torch.arange(n, device=boxes.device)
    kept = by == position
    group = torch.empty(n if match else 0, dtype=torch.int64, device=boxes.device)
    if match:
        group[order] = (kept.cumsum(0) - 1)[by]
    return order[kept], group


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """See :func:`fastzoo.ops.nms`. ``boxes [N, 4]``, ``scores [N]`` -> int64 ``[kept]``."""
    no_segments = torch.empty(0, dtype=torch.int64, device=boxes.device)
    return suppress(boxes, scores, no_segments, iou_threshold, "aligned", False)[0]


def batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    """See :func:`fastzoo.ops.batched_nms`."""
    return suppress(boxes, scores, idxs, iou_threshold, "aligned", False)[0]


def soft_decay(iou: Tensor, method: str, iou_threshold: float, sigma: float) -> Tensor:
    """What the score of a box is multiplied with for its overlap with one that was taken."""
    one = torch.ones_like(iou)
    if method == "gaussian":
        wide = iou.double()
        decay = exponential(-(wide * wide) / sigma).to(iou.dtype)
        return torch.where(iou.isnan(), one, decay)
    lowered = 1 - iou if method == "linear" else torch.zeros_like(iou)
    return torch.where(iou > round_down(iou_threshold, iou.dtype), lowered, one)


def soft_nms(
    boxes: Tensor,
    scores: Tensor,
    idxs: Tensor,
    method: str,
    iou_threshold: float,
    sigma: float,
    score_threshold: float,
    max_detections: int,
) -> tuple[Tensor, Tensor]:
    """The sequence itself: take the best box, lower the others; see :func:`fastzoo.ops.soft_nms`.

    ``idxs [0]`` for a single segment, ``max_detections`` -1 for no limit.
    """
    dtype = compute_dtype(boxes)
    boxes, left = boxes.to(dtype), scores.to(dtype)
    left = left.masked_fill(left.isnan(), -torch.inf)
    keep: list[Tensor] = []
    taken: list[Tensor] = []
    while len(left) and len(keep) != max_detections:
        best = left.max()
        if not best.double() > score_threshold:
            break
        i = (left == best).nonzero()[0, 0]
        keep.append(i)
        taken.append(best)
        iou = box_iou_with(boxes[i], boxes)
        if len(idxs):
            iou = torch.where(idxs == idxs[i], iou, torch.nan)
        left = left * soft_decay(iou, method, iou_threshold, sigma)
        left[i] = -torch.inf
        left = left.masked_fill(left.isnan(), -torch.inf)
    if not keep:
        return idxs.new_empty(0, dtype=torch.int64), left[:0]
    return torch.stack(keep), torch.stack(taken)


def matrix_decay(iou: Tensor, covered: Tensor, method: str, sigma: float) -> Tensor:
    """Of the gaussian method the exponent of the decay, of the linear one the decay itself.

    Args:
        iou: of a box with those after it.
        covered: the largest overlap of that box with those before it.
    """
    wide, most = iou.double(), covered.double()
    if method == "gaussian":
        return sigma * (most * most - wide * wide)
    return (1 - wide) / (1 - most)


def matrix_nms(
    boxes: Tensor,
    scores: Tensor,
    idxs: Tensor,
    method: str,
    sigma: float,
    score_threshold: float,
    max_detections: int,
) -> tuple[Tensor, Tensor]:
    """See :func:`fastzoo.ops.matrix_nms`; ``idxs [0]`` for a single segment."""
    dtype = compute_dtype(boxes)
    order = falling_order(scores)
    overlaps = aligned_overlap(boxes[order].to(dtype))
    overlaps = gated(overlaps, idxs[order] if len(idxs) else idxs)
    n = len(boxes)
    covered = torch.zeros(n, dtype=dtype, device=boxes.device)
    none = 0.0 if method == "gaussian" else 1.0
    decay = torch.full((n,), none, dtype=torch.float64, device=boxes.device)
    for i in range(n):
        iou = overlaps(i)
        least = matrix_decay(iou, covered[i], method, sigma)
        covered[i + 1 :] = torch.fmax(covered[i + 1 :], iou)
        decay[i + 1 :] = torch.fmin(decay[i + 1 :], least)
    if method == "gaussian":
        decay = exponential(decay)
    lowered = torch.empty(n, dtype=dtype, device=boxes.device)
    lowered[order] = scores[order].to(dtype) * decay.to(dtype)
    ranked = falling_order(lowered)
    ranked = ranked[lowered[ranked].double() > score_threshold]
    if max_detections >= 0:
        ranked = ranked[:max_detections]
    return ranked, lowered[ranked]


def vote(boxes: Tensor, scores: Tensor, keep: Tensor, group: Tensor) -> Tensor:
    """The mean box of each group, weighted by scores; see :func:`fastzoo.ops.weighted_nms`."""
    order = torch.argsort(group, stable=True)
    weights = scores.double()[order, None]
    members = torch.zeros_like(keep).index_add_(0, group, torch.ones_like(group))
    # A sum a segment, in the order of the members: the same bits at every run.
    columns = torch.cat([boxes.double()[order] * weights, weights], 1)
    sums = torch.segment_reduce(columns, "sum", lengths=members, axis=0, unsafe=True)
    mean = sums[:, :4] / sums[:, 4:]
    own = boxes[keep].double()
    return torch.where(sums[:, 4:] > 0, mean, own).to(compute_dtype(boxes))
