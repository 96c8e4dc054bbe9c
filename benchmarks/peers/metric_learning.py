"""pytorch-metric-learning's ArcFaceLoss; its weight [D, C] is made once."""

import math

from torch import Tensor

from benchmarks.implementation import Implementation, Loss, Unavailable, require, require_memory
from fastzoo import ops
from fastzoo.testing import SPECS


def _margin_softmax_loss(x: Tensor, w: Tensor, y: Tensor, *, margin: ops.Margin) -> Loss:
    losses = require("pytorch_metric_learning.losses")
    if not isinstance(margin, ops.ArcFace):
        raise Unavailable("the case is not of ArcFace")
    require_memory(SPECS["margin_softmax_loss"].eager_bytes(x, w, y), x.device.type)
    criterion = losses.ArcFaceLoss(
        *w.shape, margin=math.degrees(float(margin.m)), scale=margin.default_scale
    )
    criterion.W.data = w.detach().t().contiguous()
    return Loss(
        lambda: criterion(x, y),
        (x, criterion.W),
        arranged=lambda gradients: (gradients[0], gradients[1].t()),
    )


PEER = Implementation(
    "metric-learning", {"margin_softmax_loss": _margin_softmax_loss}, autocast=False
)
