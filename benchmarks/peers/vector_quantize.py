"""vector-quantize-pytorch's VectorQuantize, with the same weights and options."""

from typing import Any

from torch import Tensor

from benchmarks.implementation import Implementation, Loss, require, require_memory
from benchmarks.workloads import step_of


def _vector_quantize(x: Tensor, codebook: Tensor, _: Tensor, *, training: bool) -> Any:
    package = require("vector_quantize_pytorch")
    # Its distances, their one-hot answer in int64, and that in float32.
    require_memory(16.0 * x.numel() / x.shape[-1] * len(codebook), x.device.type)
    call = step_of(package.VectorQuantize, x, codebook, training)
    return Loss(call, (x,)) if training else call


PEER = Implementation("vector-quantize-pytorch", {"VectorQuantize": _vector_quantize})
