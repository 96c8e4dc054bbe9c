"""torchvision.ops: the functions of the same names, and detections made with its batched_nms."""

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from benchmarks.implementation import Implementation, Loss, require, require_few
from benchmarks.peers.classes import detections


def _function(name: str, *args: Any, **kwargs: Any) -> Callable[[], Any]:
    return functools.partial(getattr(require("torchvision.ops"), name), *args, **kwargs)


def _nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Callable[[], Tensor]:
    if boxes.device.type == "cpu":
        require_few(len(boxes))
    return _function("nms", boxes, scores, iou_threshold)


def _multiclass_nms(boxes: Tensor, scores: Tensor, **kwargs: Any) -> Callable[[], Any]:
    suppress = require("torchvision.ops").batched_nms
    return functools.partial(detections, suppress, boxes, scores, **kwargs)


def _loss(boxes1: Tensor, boxes2: Tensor, **kwargs: Any) -> Loss:
    return Loss(_function("complete_box_iou_loss", boxes1, boxes2, **kwargs), (boxes1,))


PEER = Implementation(
    "torchvision",
    {
        "nms": _nms,
        "batched_nms": functools.partial(_function, "batched_nms"),
        "multiclass_nms": _multiclass_nms,
        "box_iou": functools.partial(_function, "box_iou"),
        "complete_box_iou_loss": _loss,
    },
)
