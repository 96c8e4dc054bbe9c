"""scikit-learn's KMeans(algorithm="lloyd"), from the same centroids and for as many rounds."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from benchmarks.implementation import Implementation, require, require_cpu


def _kmeans(x: Tensor, initial: Tensor, *, iters: int) -> Callable[[], Any]:
    require_cpu(x)
    cluster = require("sklearn.cluster")
    points, centroids = x.numpy(), initial.numpy()

    def call() -> Any:
        kmeans = cluster.KMeans(
            len(centroids), init=centroids, n_init=1, max_iter=iters, tol=0, algorithm="lloyd"
        )
        return kmeans.fit(points).cluster_centers_

    return call


PEER = Implementation("scikit-learn", {"kmeans": _kmeans})
