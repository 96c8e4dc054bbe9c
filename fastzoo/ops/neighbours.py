"""Neighbours of points: the nearest, those in a ball, the nearest in a ball."""

from typing import Any

import torch
from torch import Tensor

from fastzoo import reference
from fastzoo.ops._checks import (
    check_clouds,
    check_indices,
    check_positive,
    check_same,
    check_tensor,
)
from fastzoo.ops._operator import Operator
from fastzoo.ops.pointconv import group_points
from fastzoo.reference.neighbours import KNN, ball_with, distances_of, knn_with
from fastzoo.reference.precision import compute_dtype


def _fake_search(
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
    shape = (p1.shape[0], k)
    return p1.new_empty(shape, dtype=compute_dtype(p1)), p1.new_empty(shape, dtype=torch.int64)


def _setup_search(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    p1, p2, ranges1, ranges2, ctx.longest, _, _, _, ctx.norm = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(p1, p2, ranges1, ranges2, output[1])


def _backward_search(ctx: Any, grad_dists: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    p1, p2, ranges1, ranges2, indices = ctx.saved_tensors
    backward = _NEIGHBOUR_SEARCH_BACKWARD.like(ctx)
    grads = backward(grad_dists, p1, p2, ranges1, ranges2, ctx.longest, indices, ctx.norm)
    return *grads, *(None,) * 7


def _fake_search_backward(
    grad_dists: Tensor, p1: Tensor, p2: Tensor, *_: Any
) -> tuple[Tensor, Tensor]:
    return p1.new_empty(p1.shape), p2.new_empty(p2.shape)


_NEIGHBOUR_SEARCH = Operator(
    "neighbour_search(Tensor p1, Tensor p2, Tensor ranges1, Tensor ranges2, SymInt longest,"
    " SymInt k, float radius, str order, int norm) -> (Tensor, Tensor)",
    reference=reference.neighbour_search,
    fake=_fake_search,
    has=("reference", "cpu", "cuda"),
    setup_context=_setup_search,
    backward=_backward_search,
    autocast=torch.float32,
    public=("knn_points", "ball_query"),
)

_NEIGHBOUR_SEARCH_BACKWARD = Operator(
    "neighbour_search_backward(Tensor grad_dists, Tensor p1, Tensor p2, Tensor ranges1,"
    " Tensor ranges2, SymInt longest, Tensor indices, int norm) -> (Tensor, Tensor)",
    reference=reference.neighbour_search_backward,
    fake=_fake_search_backward,
    has=("reference", "cpu", "cuda"),
    differentiable_reference=True,
)


def knn_points(
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
    backend: str | None = None,
) -> KNN:
    """The K nearest points of ``p2`` for each point of ``p1``, of the same cloud.

    Exact and the same bit for bit on every backend: distances are sums of direct differences in
    ascending order of the dimensions, in float32 (float64 for float64 points), so an offset common
    to all points moves no neighbour but for the rounding of the points themselves. Equal distances
    go to the lower index; NaN distances come last. No matrix of distances is kept.

    Args:
        p1, p2: padded clouds ``[B, P1, D]`` and ``[B, P2, D]``, or packed ones ``[N1, D]`` and
            ``[N2, D]``; float32, float64, float16 or bfloat16, D from 1 to 512.
        lengths1, lengths2: int64 ``[B]``: how many points of each padded cloud there are.
        norm: 2 (squared Euclidean distances) or 1 (sums of absolute differences).
        K: how many; GPU kernels take up to 1024.
        version: ignored; pytorch3d's choice of a kernel.
        return_nn: also return the points.
        return_sorted: ignored: the nearest always comes first.
        radius: only points nearer than this (strictly; its square is compared for norm 2).
        ptr1, ptr2: int64 ``[B + 1]``: the first row of each packed cloud.
        batch1, batch2: int64 ``[N1]``, ``[N2]``, ascending: the cloud of each row. Reads the last
            element: a graph capture wants ``ptr``.
        backend: ``auto``, ``reference``, ``cpu`` or ``cuda``; None follows
            :func:`fastzoo.use_backend`.

    Returns:
        ``KNN(dists, idx, knn)``: ``dists [..., K]`` in float32 (float64), int64 ``idx [..., K]``,
        and ``knn [..., K, D]`` or None. Of padded clouds ``idx`` counts within the cloud, and
        where there are fewer than K points all are 0, as in pytorch3d (``idx`` -1 with ``radius``);
        of packed ones it is the row of ``p2``, or -1. Rows beyond ``lengths1`` are padding.

    Gradient: ``dists`` and ``knn`` to both clouds, of any order; ``idx`` has none. Forward-mode
    derivatives raise. Deterministic. Under autocast it computes in float32.

    Raises:
        TypeError, ValueError: an argument of the wrong kind; the message names it.
        RuntimeError: a forced backend that cannot run, with the reason.

    Source: pytorch3d.ops.knn_points, whose signature it has.
    """
    _check_search(p1, p2, lengths1, lengths2, ptr1, ptr2, batch1, batch2, K)
    if norm not in (1, 2):
        raise ValueError(f"norm: expected 1 or 2, got {norm!r}")
    if radius is not None:
        _check_radius(radius)
    return knn_with(
        _NEIGHBOUR_SEARCH.choose(backend, p1.device.type),
        _gather,
        p1,
        p2,
        lengths1,
        lengths2,
        norm,
        K,
        return_nn=return_nn,
        radius=radius,
        ptr1=ptr1,
        ptr2=ptr2,
        batch1=batch1,
        batch2=batch2,
    )


def ball_query(
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
    backend: str | None = None,
) -> KNN:
    """The first K points of ``p2``, by index, within a radius of each point of ``p1``.

    A point is inside where its squared distance is below the radius' square, strictly. For the K
    nearest inside use :func:`knn_points` with ``radius``.

    Args:
        p1, p2, lengths1, lengths2, ptr1, ptr2, batch1, batch2, backend: as :func:`knn_points`
            takes them.
        K: at most how many; GPU kernels take up to 1024.
        radius: above 0.
        return_nn: also return the points.
        skip_points_outside_cube: ignored; pytorch3d's short cut, which changes no answer.

    Returns:
        ``KNN(dists, idx, knn)`` as :func:`knn_points`: squared distances, in ascending order of
        ``idx``; where there are fewer than K points ``dists`` and ``knn`` are 0 and ``idx`` -1.

    Gradient, determinism, autocast, errors: as :func:`knn_points`.

    Source: pytorch3d.ops.ball_query, whose signature it has; Qi et al., PointNet++ (2017).
    """
    _check_search(p1, p2, lengths1, lengths2, ptr1, ptr2, batch1, batch2, K)
    _check_radius(radius)
    return ball_with(
        _NEIGHBOUR_SEARCH.choose(backend, p1.device.type),
        _gather,
        p1,
        p2,
        lengths1,
        lengths2,
        K,
        radius,
        return_nn,
        ptr1=ptr1,
        ptr2=ptr2,
        batch1=batch1,
        batch2=batch2,
    )


def knn_gather(x: Tensor, idx: Tensor, lengths: Tensor | None = None) -> Tensor:
    """The rows of ``x`` that ``idx`` names.

    Args:
        x: ``[N, M, U]``, any floating dtype.
        idx: int64 ``[N, L, K]`` of :func:`knn_points`; -1 gives zeros.
        lengths: int64 ``[N]``: how many rows of ``x`` there are; the neighbours from that place on
            are padding, and give zeros.

    Returns:
        ``[N, L, K, U]``.

    Gradient: to ``x``, added up in a fixed order.

    Source: pytorch3d.ops.knn_gather, whose signature it has.
    """
    check_tensor("x", x, "[N, M, U]", 3)
    gathered = group_points(x, idx)
    if lengths is None:
        return gathered
    check_indices("lengths", lengths, "[N]", 1, x.device)
    beyond = torch.arange(idx.shape[2], device=x.device) >= lengths[:, None, None]
    return torch.where(beyond[..., None], 0, gathered)


def three_nn(
    unknown: Tensor, known: Tensor, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """The three nearest points of ``known [B, M, 3]`` for each of ``unknown [B, N, 3]``.

    Returns:
        ``(dist, idx)``, both ``[B, N, 3]``: distances, not squared, and int64 indices.

    Gradient: ``dist`` to both, that of a point that coincides with a known one 0.

    Source: PointNet++'s ``three_nn``.
    """
    found = knn_points(unknown, known, K=3, backend=backend)
    if known.shape[-2] < 3:
        raise ValueError(f"known: expected at least 3 points, got {known.shape[-2]}")
    return distances_of(found.dists), found.idx


def _gather(points: Tensor, idx: Tensor) -> Tensor:
    if points.dim() == 3:
        return group_points(points, idx)
    return group_points(points[None], idx[None])[0]


def _check_radius(radius: float) -> None:
    if not isinstance(radius, float | int) or isinstance(radius, bool):
        raise TypeError(f"radius: expected a float, got {type(radius).__name__}")
    if not radius > 0:
        raise ValueError(f"radius: expected above 0, got {radius}")


def _check_search(
    p1: Tensor,
    p2: Tensor,
    lengths1: Tensor | None,
    lengths2: Tensor | None,
    ptr1: Tensor | None,
    ptr2: Tensor | None,
    batch1: Tensor | None,
    batch2: Tensor | None,
    k: int,
) -> None:
    check_clouds("p1", p1, lengths1, ptr1, batch1, "1")
    check_clouds("p2", p2, lengths2, ptr2, batch2, "2")
    check_same("p1", p1, "p2", p2)
    check_positive("K", k)
    if p1.dim() != p2.dim() or p1.shape[-1] != p2.shape[-1]:
        raise ValueError(
            f"p2: expected {p1.dim()} dimensions, the last of {p1.shape[-1]} like that of p1, "
            f"got {list(p2.shape)}"
        )
    if p1.dim() == 3 and p1.shape[0] != p2.shape[0]:
        raise ValueError(f"p2: expected {p1.shape[0]} clouds like p1, got {p2.shape[0]}")
    if p1.shape[-1] > 512:
        raise ValueError(f"p1: expected at most 512 dimensions, got {p1.shape[-1]}")
    for label, one, other in (("ptr2", ptr1, ptr2), ("batch2", batch1, batch2)):
        if (one is None) != (other is None):
            raise ValueError(f"{label}: expected both or none of {label[:-1]}1 and {label}")
    if ptr1 is not None and ptr2 is not None and ptr1.shape != ptr2.shape:
        raise ValueError(f"ptr2: expected {list(ptr1.shape)} like ptr1, got {list(ptr2.shape)}")
