"""torch.cdist and argmin, as most quantisers outside of large libraries do it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.implementation import Implementation, Unavailable, require_memory


def _vq_nearest(
    x: Tensor, codebook: Tensor, *, metric: str = "l2", **_: Any
) -> Callable[[], Tensor]:
    if metric != "l2":
        raise Unavailable("it has distances alone")
    require_memory(float(len(x) * len(codebook) * x.element_size()), x.device.type)
    return lambda: torch.cdist(x, codebook).argmin(1)


PEER = Implementation("cdist", {"vq_nearest": _vq_nearest})
