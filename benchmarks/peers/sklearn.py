"""scikit-learn's KMeans(algorithm="lloyd"), from the same centroids and for as many rounds; and its
KernelDensity, whose tree is built in every call."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.implementation import Implementation, Unavailable, require, require_cpu


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


def _kernel_density(points: Tensor, bandwidth: float) -> Callable[[], Tensor]:
    require_cpu(points)
    neighbors = require("sklearn.neighbors")
    if points.requires_grad:
        raise Unavailable("it has no gradient")
    clouds = points.double().numpy()

    def call() -> Tensor:
        # Far points are left out where they change less than a millionth.
        density = neighbors.KernelDensity(bandwidth=bandwidth, rtol=1e-6)
        found = [density.fit(cloud).score_samples(cloud) for cloud in clouds]
        return torch.stack([torch.from_numpy(logarithm) for logarithm in found]).exp().float()

    return call


PEER = Implementation("scikit-learn", {"kmeans": _kmeans, "kernel_density": _kernel_density})
