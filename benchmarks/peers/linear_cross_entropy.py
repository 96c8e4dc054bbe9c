"""torch's fused linear cross-entropy, of normalised operands: NormFace, without a margin."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from benchmarks.implementation import Implementation, Loss, Unavailable, require_memory
from fastzoo import ops
from fastzoo.testing import SPECS


def _margin_softmax_loss(x: Tensor, w: Tensor, y: Tensor, **_: Any) -> Loss:
    if not hasattr(F, "linear_cross_entropy"):
        raise Unavailable("this torch has no linear_cross_entropy")
    require_memory(SPECS["margin_softmax_loss"].eager_bytes(x, w, y), x.device.type)
    margin = ops.Plain()

    def forward() -> Tensor:
        return F.linear_cross_entropy(margin.default_scale * F.normalize(x), F.normalize(w), y)

    return Loss(forward, (x, w), answers=((x, w, y), {"margin": margin}))


PEER = Implementation(
    "linear_cross_entropy",
    {"margin_softmax_loss": _margin_softmax_loss},
    note="has no margin",
    autocast=False,
)
