"""Neighbours of points by the definition: every distance, then a stable sort."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastzoo.reference.clouds import Clouds, as_clouds, clouds_of, first_rows, rows_at
from fastzoo.reference.precision import compute_dtype

Search = Callable[..., tuple[Tensor, Tensor]]
Gather = Callable[[Tensor, Tensor], Tensor]


def distance_matrix(p1: Tensor, p2: Tensor, norm: int = 2) -> Tensor:
    """``[n, m]`` between ``[n, D]`` and ``[m, D]``."""
    return distances_between(p1[:, None], p2[None], norm)


def distances_between(p1: Tensor, p2: Tensor, norm: int = 2) -> Tensor:
    """Squared Euclidean distances (norm 2) or sums of absolute differences (norm 1).

    Direct differences, added in ascending order of the dimensions, each operation rounded by
    itself: these bits decide who is nearer, on every backend.
    """

    def term(d: int) -> Tensor:
        difference = p1[..., d] - p2[..., d]
        return difference * difference if norm == 2 else difference.abs()

    total = term(0)
    for d in range(1, p1.shape[-1]):
        total = total + term(d)
    return total


def reach(radius: float, norm: int, dtype: torch.dtype) -> Tensor:
    """What a distance has to stay below; the square of the radius where distances are squared."""
    limit = torch.tensor(radius, dtype=dtype)
    return limit * limit if norm == 2 else limit


def neighbour_search(
    p1: Tensor,
    p2: Tensor,
    ranges1: Tensor,
    ranges2: Tensor,
    longest: int,
    k: int,
    radius: float,
    order: str,
    norm: int,
) -> tuple[Tensor, Tensor]:
    """Neighbours among the points of the same cloud.

    ``nearest``: the k least by (distance, index), NaN distances last; ``first``: the k of lowest
    index. Only distances below the radius count; an infinite radius admits every point.

    Returns:
        distances (differentiable) and indices within the cloud ``[N1, k]``; 0 and -1 where there
        are fewer than k.
    """
    p1, p2 = p1.to(compute_dtype(p1)), p2.to(compute_dtype(p2))
    limit = reach(radius, norm, p1.dtype).to(p1.device)
    dists = p1.new_zeros(p1.shape[0], k)
    indices = torch.full((p1.shape[0], k), -1, device=p1.device)
    for (start1, end1), (start2, end2) in zip(ranges1.tolist(), ranges2.tolist(), strict=True):
        found = distance_matrix(p1[start1:end1], p2[start2:end2], norm)
        inside = torch.ones_like(found, dtype=torch.bool)
        if not math.isinf(radius):
            inside = found < limit
        ranked = found.detach() if order == "nearest" else (~inside).to(found.dtype)
        # Distances below the radius come before all others in either order.
        chosen = torch.argsort(ranked, dim=1, stable=True)[:, :k]
        valid = torch.arange(chosen.shape[1], device=p1.device) < inside.sum(1, keepdim=True)
        rows = torch.arange(start1, end1, device=p1.device)[:, None]
        columns = torch.arange(chosen.shape[1], device=p1.device)
        kept = torch.where(valid, found.gather(1, chosen), 0)
        dists = dists.index_put((rows, columns), kept)
        indices = indices.index_put((rows, columns), torch.where(valid, chosen, -1))
    return dists, indices


def neighbour_search_backward(
    grad_dists: Tensor,
    p1: Tensor,
    p2: Tensor,
    ranges1: Tensor,
    ranges2: Tensor,
    longest: int,
    indices: Tensor,
    norm: int,
) -> tuple[Tensor, Tensor]:
    """Gradients of the distances; differentiable itself."""
    clouds1, clouds2 = Clouds(p1, ranges1, longest, ()), Clouds(p2, ranges2, longest, ())
    valid = indices >= 0
    rows = indices.clamp(min=0) + first_rows(clouds1, clouds2)[:, None]
    if p2.shape[0] == 0:
        return torch.zeros_like(p1), torch.zeros_like(p2)
    rows = torch.where(valid, rows, 0)
    difference = p1.double()[:, None] - p2.double()[rows]
    slope = 2 * difference if norm == 2 else difference.sign()
    # Where a padded place would multiply an infinity by zero, zero is right.
    terms = torch.where(valid[..., None], grad_dists.double()[..., None] * slope, 0)
    grad_p2 = torch.zeros_like(p2, dtype=torch.float64)
    grad_p2 = grad_p2.index_add(0, rows.flatten(), -terms.flatten(0, 1))
    return terms.sum(1).to(p1.dtype), grad_p2.to(p2.dtype)


class KNN(NamedTuple):
    """What :func:`fastzoo.ops.knn_points` and :func:`fastzoo.ops.ball_query` return."""

    dists: Tensor
    idx: Tensor
    knn: Tensor | None


def knn_points(p1: Tensor, p2: Tensor, *args: Any, **kwargs: Any) -> KNN:
    """See :func:`fastzoo.ops.knn_points`."""
    return knn_with(neighbour_search, rows_at, p1, p2, *args, **kwargs)


def knn_with(
    search: Search,
    gather: Gather,
    p1: Tensor,
    p2: Tensor,
    lengths1: Tensor | None = None,
    lengths2: Tensor | None = None,
    norm: int = 2,
    K: int = 1,
    version: int = -1,
    return_nn: bool = False,
    return_sorted: bool = True,
    *,
    radius: float | None = None,
    ptr1: Tensor | None = None,
    ptr2: Tensor | None = None,
    batch1: Tensor | None = None,
    batch2: Tensor | None = None,
) -> KNN:
    """``knn_points`` by any kernels."""
    clouds1, clouds2 = _both(p1, p2, lengths1, lengths2, ptr1, ptr2, batch1, batch2)
    distance = math.inf if radius is None else radius
    dists, idx = _search(search, clouds1, clouds2, K, distance, "nearest", norm)
    points = gather(p2, idx) if return_nn else None
    full = lengths2 is None and clouds2.longest >= K
    if p1.dim() == 3 and radius is None and not full:
        idx = idx.clamp(min=0)  # pytorch3d's padding
    return KNN(dists, idx, points)


def ball_query(p1: Tensor, p2: Tensor, *args: Any, **kwargs: Any) -> KNN:
    """See :func:`fastzoo.ops.ball_query`."""
    return ball_with(neighbour_search, rows_at, p1, p2, *args, **kwargs)


def ball_with(
    search: Search,
    gather: Gather,
    p1: Tensor,
    p2: Tensor,
    lengths1: Tensor | None = None,
    lengths2: Tensor | None = None,
    K: int = 500,
    radius: float = 0.2,
    return_nn: bool = True,
    skip_points_outside_cube: bool = False,
    *,
    ptr1: Tensor | None = None,
    ptr2: Tensor | None = None,
    batch1: Tensor | None = None,
    batch2: Tensor | None = None,
) -> KNN:
    """``ball_query`` by any kernels."""
    clouds1, clouds2 = _both(p1, p2, lengths1, lengths2, ptr1, ptr2, batch1, batch2)
    dists, idx = _search(search, clouds1, clouds2, K, radius, "first", 2)
    return KNN(dists, idx, gather(p2, idx) if return_nn else None)


def _both(
    p1: Tensor,
    p2: Tensor,
    lengths1: Tensor | None,
    lengths2: Tensor | None,
    ptr1: Tensor | None,
    ptr2: Tensor | None,
    batch1: Tensor | None,
    batch2: Tensor | None,
) -> tuple[Clouds, Clouds]:
    size = None
    if batch1 is not None and batch2 is not None:
        size = max(clouds_of(batch1), clouds_of(batch2))
    return as_clouds(p1, lengths1, ptr1, batch1, size), as_clouds(p2, lengths2, ptr2, batch2, size)


def _search(
    search: Search,
    clouds1: Clouds,
    clouds2: Clouds,
    k: int,
    radius: float,
    order: str,
    norm: int,
) -> tuple[Tensor, Tensor]:
    """In the shape of the points; indices of packed clouds are rows."""
    dists, idx = search(
        clouds1.rows,
        clouds2.rows,
        clouds1.ranges,
        clouds2.ranges,
        max(clouds1.longest, clouds2.longest),
        k,
        radius,
        order,
        norm,
    )
    if len(clouds1.shape) == 2:
        return dists.view(*clouds1.shape, k), idx.view(*clouds1.shape, k)
    if len(clouds2.ranges) > 1:
        idx = torch.where(idx < 0, -1, idx + first_rows(clouds1, clouds2)[:, None])
    return dists, idx


def knn_gather(x: Tensor, idx: Tensor, lengths: Tensor | None = None) -> Tensor:
    """See :func:`fastzoo.ops.knn_gather`."""
    gathered = rows_at(x, idx)
    if lengths is not None:
        beyond = torch.arange(idx.shape[2], device=x.device) >= lengths[:, None, None]
        gathered = torch.where(beyond[..., None], 0, gathered)
    return gathered


def distances_of(squares: Tensor) -> Tensor:
    """Square roots, whose gradient at 0 is 0."""
    apart = squares > 0
    return torch.where(apart, torch.where(apart, squares, 1).sqrt(), 0)
