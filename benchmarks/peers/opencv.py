"""cv2.dnn.NMSBoxes, on boxes converted once to the (x, y, width, height) it takes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.implementation import Implementation, require, require_cpu


def _nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Callable[[], Any]:
    require_cpu(boxes)
    cv2 = require("cv2")
    cv2.setNumThreads(torch.get_num_threads())
    rectangles = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1).double().numpy()
    levels = scores.numpy()
    return lambda: cv2.dnn.NMSBoxes(rectangles, levels, 0.0, iou_threshold)


PEER = Implementation("OpenCV", {"nms": _nms})
