"""Non-maximum suppression, the greedy definition."""

import torch
from torch import Tensor


def falling_order(scores: Tensor) -> Tensor:
    """Indices by falling score; ties by lower index, NaN last."""
    order = torch.argsort(scores, descending=True, stable=True)
    return order[torch.argsort(scores[order].isnan().byte(), stable=True)]


def box_iou_with(box: Tensor, boxes: Tensor) -> Tensor:
    """Intersection over union of one box ``[4]`` with boxes ``[N, 4]``."""
    x1, y1, x2, y2 = boxes.unbind(1)
    area = (x2 - x1) * (y2 - y1)
    own_area = (box[2] - box[0]) * (box[3] - box[1])
    width = (torch.minimum(box[2], x2) - torch.maximum(box[0], x1)).clamp(min=0)
    height = (torch.minimum(box[3], y2) - torch.maximum(box[1], y1)).clamp(min=0)
    intersection = width * height
    return intersection / (own_area + area - intersection)


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """See :func:`fastzoo.ops.nms`. ``boxes [N, 4]``, ``scores [N]`` -> int64 ``[kept]``."""
    order = falling_order(scores)
    if boxes.dtype != torch.float64:
        boxes = boxes.float()
    boxes = boxes[order]
    kept = torch.ones(len(boxes), dtype=torch.bool, device=boxes.device)
    for i in range(len(boxes)):
        if kept[i]:
            overlap = box_iou_with(boxes[i], boxes[i + 1 :])
            kept[i + 1 :] &= ~(overlap > round_down(iou_threshold, boxes.dtype))
    return order[kept]


def round_down(threshold: float, dtype: torch.dtype) -> float:
    """The largest value of ``dtype`` not above ``threshold``.

    torch compares a float32 tensor with a Python number in float32; an overlap exceeds the double
    threshold exactly when it exceeds this.
    """
    nearest = torch.tensor(threshold, dtype=dtype)
    if nearest.item() > threshold:
        nearest = torch.nextafter(nearest, torch.tensor(-torch.inf, dtype=dtype))
    return nearest.item()
