"""What keeps classes apart around an NMS that knows of none: boxes moved away from each other, or a
call a class; and around these the steps from a detector's scores to its detections."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.implementation import Implementation, require_cpu
from benchmarks.peers import scalar

# Of boxes, scores, classes and a threshold: the kept boxes by falling score.
Suppress = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def coordinate_trick(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    moved = boxes + (idxs * (boxes.max() + 1))[:, None]
    kept: Tensor = scalar.compiled().nms(moved, scores, iou_threshold)
    return kept


def class_by_class(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    nms = scalar.compiled().nms
    kept = torch.zeros(len(boxes), dtype=torch.bool)
    for label in idxs.unique():
        own = (idxs == label).nonzero()[:, 0]
        kept[own[nms(boxes[own], scores[own], iou_threshold)]] = True
    found = kept.nonzero()[:, 0]
    return found[scores[found].argsort(descending=True)]


def detections(
    suppress: Suppress,
    boxes: Tensor,
    scores: Tensor,
    *,
    score_threshold: float,
    iou_threshold: float,
    pre_top_k: int | None = None,
    max_detections: int = 100,
) -> list[tuple[Tensor, ...]]:
    """Of each image boxes, scores, labels and locations, without padding."""
    found: list[tuple[Tensor, ...]] = []
    for own_boxes, own_scores in zip(boxes, scores, strict=True):
        place, label = (own_scores > score_threshold).nonzero().unbind(1)
        level = own_scores[place, label]
        if pre_top_k is not None and len(level) > pre_top_k:
            level, best = level.topk(pre_top_k)
            place, label = place[best], label[best]
        keep = suppress(own_boxes[place], level, label, iou_threshold)[:max_detections]
        found.append((own_boxes[place[keep]], level[keep], label[keep], place[keep]))
    return found


def operators(suppress: Suppress) -> dict[str, Callable[..., Any]]:
    """The operators that a way of keeping classes apart computes."""
    return {
        "batched_nms": functools.partial(_prepared, suppress),
        "multiclass_nms": functools.partial(_prepared, functools.partial(detections, suppress)),
    }


def _prepared(call: Callable[..., Any], boxes: Tensor, *args: Any, **kwargs: Any) -> Any:
    require_cpu(boxes)
    scalar.compiled()
    return functools.partial(call, boxes, *args, **kwargs)


TRICK = Implementation(
    "coordinate trick",
    operators(coordinate_trick),
    note="boxes moved by their class, then the scalar loop",
)
LOOP = Implementation(
    "per-class loop", operators(class_by_class), note="the scalar loop, called for each class"
)
