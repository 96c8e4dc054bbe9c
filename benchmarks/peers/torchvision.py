"""torchvision.ops.nms."""

import functools
from collections.abc import Callable

from torch import Tensor

from benchmarks.implementation import Implementation, require


def _nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Callable[[], Tensor]:
    nms = require("torchvision.ops").nms
    return functools.partial(nms, boxes, scores, iou_threshold)


PEER = Implementation("torchvision", {"nms": _nms})
