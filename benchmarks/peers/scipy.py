"""scipy's cKDTree, as many workers as there are threads; the tree is built in every call."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.implementation import Implementation, Unavailable, require, require_cpu

# Beyond, a tree prunes nothing.
_MOST_DIMENSIONS = 16


def _knn_points(
    p1: Tensor, p2: Tensor, lengths1: None, lengths2: None, norm: int, k: int
) -> Callable[[], tuple[Tensor, Tensor]]:
    return _search(p1, p2, k, float("inf"))


def _ball_query(
    p1: Tensor, p2: Tensor, lengths1: None, lengths2: None, k: int, radius: float, _: bool
) -> Callable[[], tuple[Tensor, Tensor]]:
    return _search(p1, p2, k, radius)


def _search(p1: Tensor, p2: Tensor, k: int, radius: float) -> Callable[[], tuple[Tensor, Tensor]]:
    require_cpu(p1)
    spatial = require("scipy.spatial")
    if p1.shape[2] > _MOST_DIMENSIONS:
        raise Unavailable(f"a tree in {p1.shape[2]} dimensions visits every point")
    workers = torch.get_num_threads()
    clouds = [(queries.numpy(), points.numpy()) for queries, points in zip(p1, p2, strict=True)]

    def call() -> tuple[Tensor, Tensor]:
        found: list[Any] = [
            spatial.cKDTree(points).query(
                queries, k=k, distance_upper_bound=radius, workers=workers
            )
            for queries, points in clouds
        ]
        dists, idx = (
            torch.stack([torch.from_numpy(a).view(-1, k) for a in part])
            for part in zip(*found, strict=True)
        )
        # Where there are fewer it gives an infinity and the number of points.
        return dists, torch.where(dists.isinf(), -1, idx)

    return call


PEER = Implementation(
    "scipy cKDTree",
    {"knn_points": _knn_points, "ball_query": _ball_query},
    note="its tree is built in every call; in a ball it finds the nearest K, not the first",
)
