"""cv2.dnn's NMS functions, on boxes converted once to the rectangles that they take.

``NMSBoxesRotated`` is left out: to it a box within another overlaps it by 1.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.implementation import Implementation, require, require_cpu, require_few
from benchmarks.peers.classes import detections

# softNMSBoxes takes whole numbers: of 256ths of a pixel, whose areas still fit into 31 bits.
_FRACTIONS = 256


def _dnn(boxes: Tensor) -> Any:
    require_cpu(boxes)
    require_few(len(boxes))
    cv2 = require("cv2")
    cv2.setNumThreads(torch.get_num_threads())
    return cv2.dnn


def _rectangles(boxes: Tensor) -> Tensor:
    return torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1).double()


def _nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Callable[[], Any]:
    dnn, rectangles, levels = _dnn(boxes), _rectangles(boxes).numpy(), scores.numpy()
    return lambda: dnn.NMSBoxes(rectangles, levels, 0.0, iou_threshold)


def _batched_nms(
    boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float
) -> Callable[[], Any]:
    dnn, rectangles, levels = _dnn(boxes), _rectangles(boxes).numpy(), scores.numpy()
    labels = idxs.int().numpy()
    return lambda: dnn.NMSBoxesBatched(rectangles, levels, labels, 0.0, iou_threshold)


def _multiclass_nms(boxes: Tensor, scores: Tensor, **kwargs: Any) -> Callable[[], Any]:
    _dnn(boxes)

    def suppress(own: Tensor, levels: Tensor, labels: Tensor, iou_threshold: float) -> Tensor:
        return torch.as_tensor(_batched_nms(own, levels, labels, iou_threshold)()).long()

    return lambda: detections(suppress, boxes, scores, **kwargs)


def _soft_nms(
    boxes: Tensor,
    scores: Tensor,
    *,
    method: str = "linear",
    iou_threshold: float = 0.3,
    sigma: float = 0.5,
    score_threshold: float = 0.001,
) -> Callable[[], tuple[Tensor, Tensor]]:
    dnn, levels = _dnn(boxes), scores.numpy()
    rectangles = (_rectangles(boxes) * _FRACTIONS).round().int().numpy()
    kind = getattr(dnn, f"SOFT_NMSMETHOD_SOFTNMS_{method.upper()}")

    def call() -> tuple[Tensor, Tensor]:
        lowered, keep = dnn.softNMSBoxes(
            rectangles, levels, score_threshold, iou_threshold, 0, sigma, kind
        )
        return torch.as_tensor(keep), torch.as_tensor(lowered)

    return call


PEER = Implementation(
    "OpenCV",
    {
        "nms": _nms,
        "batched_nms": _batched_nms,
        "multiclass_nms": _multiclass_nms,
        "soft_nms": _soft_nms,
    },
)
