"""The formula written out in PyTorch."""

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from benchmarks.implementation import Implementation, require_memory
from fastzoo.testing import SPECS, OpSpec

# At its peak ``nms`` holds four tensors [N, N, 2], ``vq_nearest`` one [N, K].
_PEAK_BYTES: dict[str, Callable[..., float]] = {
    "nms": lambda boxes, scores, iou_threshold: 8.0 * len(boxes) ** 2 * boxes.element_size(),
    "vq_nearest": lambda x, codebook: float(len(x) * len(codebook) * x.element_size()),
}


def _prepare(spec: OpSpec, *args: Any, **kwargs: Any) -> Callable[[], Tensor]:
    require_memory(_PEAK_BYTES[spec.name](*args, **kwargs), args[0].device)
    return functools.partial(spec.eager, *args, **kwargs)


PEER = Implementation(
    "eager", {name: functools.partial(_prepare, spec) for name, spec in SPECS.items()}
)
