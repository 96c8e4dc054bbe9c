"""torch_cluster's functions, of flat points with the number of each one's cloud."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.implementation import Implementation, require, require_few_steps


def _flat(points: Tensor) -> tuple[Tensor, Tensor | None]:
    """The points of all clouds, and the cloud of each; None of one cloud."""
    clouds, n, dim = points.shape
    batch = torch.arange(clouds, device=points.device).repeat_interleave(n)
    return points.reshape(-1, dim), batch if clouds > 1 else None


def _padded(edges: Tensor, p1: Tensor, p2: Tensor, k: int) -> Tensor:
    """Edges (query, point) of flat rows, ascending queries, as ``[B, N, K]`` within the cloud."""
    query, point = edges
    rows = p1[..., 0].numel()
    count = torch.bincount(query, minlength=rows)
    place = torch.arange(len(query), device=query.device) - (count.cumsum(0) - count)[query]
    idx = torch.full((rows, k), -1, device=query.device)
    idx[query, place] = point - query // p1.shape[1] * p2.shape[1]
    return idx.view(*p1.shape[:2], k)


def _knn_points(
    p1: Tensor, p2: Tensor, lengths1: None, lengths2: None, norm: int, k: int
) -> Callable[[], Tensor]:
    package = require("torch_cluster")
    (queries, of_queries), (points, of_points) = _flat(p1), _flat(p2)
    workers = torch.get_num_threads()

    def call() -> Tensor:
        edges = package.knn(points, queries, k, of_points, of_queries, num_workers=workers)
        return _padded(edges, p1, p2, k)

    return call


def _ball_query(
    p1: Tensor, p2: Tensor, lengths1: None, lengths2: None, k: int, radius: float, _: bool
) -> Callable[[], Tensor]:
    package = require("torch_cluster")
    (queries, of_queries), (points, of_points) = _flat(p1), _flat(p2)
    workers = torch.get_num_threads()

    def call() -> Tensor:
        edges = package.radius(
            points,
            queries,
            radius,
            of_points,
            of_queries,
            max_num_neighbors=k,
            num_workers=workers,
        )
        return _padded(edges, p1, p2, k)

    return call


def _sample_farthest_points(points: Tensor, _: None, k: int) -> Callable[[], Tensor]:
    package = require("torch_cluster")
    require_few_steps(points, k)
    clouds, n, _dim = points.shape
    flat, batch = _flat(points)
    # It takes a share of the points, rounded up.
    ratio = (k - 0.5) / n
    first = torch.arange(clouds, device=points.device)[:, None] * n

    def call() -> Tensor:
        chosen: Tensor = package.fps(flat, batch, ratio=ratio, random_start=False)
        return chosen.view(clouds, k) - first

    return call


def _voxel_grid(points: Tensor, size: float) -> Callable[[], Any]:
    package = require("torch_cluster")
    edges = points.new_full((points.shape[1],), size)
    start = torch.zeros_like(edges)

    def call() -> Tensor:
        cells = package.grid_cluster(points, edges, start)
        voxels: Tensor = torch.unique(cells, return_inverse=True)[1]
        return voxels

    return call


PEER = Implementation(
    "torch_cluster",
    {
        "knn_points": _knn_points,
        "ball_query": _ball_query,
        "sample_farthest_points": _sample_farthest_points,
        "voxel_grid": _voxel_grid,
    },
    note="in a ball it finds any K points; its cells are numbered by place, with gaps, which"
    " torch.unique closes, as PyG's pooling does",
)
