"""faiss: an exact index with k=1, built once; and its k-means."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.implementation import Implementation, require, require_cpu


def _faiss(x: Tensor) -> Any:
    require_cpu(x)
    faiss = require("faiss")
    faiss.omp_set_num_threads(torch.get_num_threads())
    return faiss


def _vq_nearest(x: Tensor, codebook: Tensor, *, metric: str = "l2", **_: Any) -> Callable[[], Any]:
    faiss = _faiss(x)
    if metric == "cosine":
        index = faiss.IndexFlatIP(codebook.shape[1])
        codebook = F.normalize(codebook)
    else:
        index = faiss.IndexFlatL2(codebook.shape[1])
    index.add(codebook.numpy())
    queries = x.numpy()
    return lambda: index.search(queries, 1)[1]


def _kmeans(x: Tensor, initial: Tensor, *, iters: int) -> Callable[[], Any]:
    faiss = _faiss(x)
    points, centroids = x.numpy(), initial.numpy()

    def call() -> Any:
        # Without the bounds it would sample the points where a centroid has many of them.
        kmeans = faiss.Kmeans(
            points.shape[1],
            len(centroids),
            niter=iters,
            min_points_per_centroid=1,
            max_points_per_centroid=len(points),
        )
        kmeans.train(points, init_centroids=centroids)
        return kmeans.centroids

    return call


PEER = Implementation("faiss", {"vq_nearest": _vq_nearest, "kmeans": _kmeans})
