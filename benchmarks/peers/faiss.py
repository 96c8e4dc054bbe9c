"""faiss.IndexFlatL2 with k=1; the index is built once."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.implementation import Implementation, require, require_cpu


def _vq_nearest(x: Tensor, codebook: Tensor) -> Callable[[], Any]:
    require_cpu(x)
    faiss = require("faiss")
    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatL2(codebook.shape[1])
    index.add(codebook.numpy())
    queries = x.numpy()
    return lambda: index.search(queries, 1)[1]


PEER = Implementation("faiss", {"vq_nearest": _vq_nearest})
