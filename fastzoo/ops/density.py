"""Kernel density estimates of points, and the scale that PointConv makes of them."""

from typing import Any

import torch
from torch import Tensor

from fastzoo import reference
from fastzoo.ops._checks import check_choice, check_clouds, check_indices, check_same, check_tensor
from fastzoo.ops._operator import Operator
from fastzoo.ops.pointconv import group_beside
from fastzoo.reference.density import density_with, inverse_scale_with
from fastzoo.reference.precision import compute_dtype

KERNELS = ("gaussian", "epanechnikov", "tophat")


def _fake_density(queries: Tensor, points: Tensor, *_: Any) -> Tensor:
    return queries.new_empty(queries.shape[0], dtype=compute_dtype(queries))


def _setup_density(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.longest, ctx.kernel = inputs
    ctx.save_for_backward(*tensors)


def _backward_density(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    backward = _KERNEL_DENSITY_BACKWARD.like(ctx)
    grads = backward(grad, *ctx.saved_tensors, ctx.longest, ctx.longest, ctx.kernel)
    return *grads, None, None, None, None


def _fake_density_backward(
    grad: Tensor, queries: Tensor, points: Tensor, scale: Tensor, weight: Tensor, *_: Any
) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape) for t in (queries, points, scale, weight))


_KERNEL_DENSITY = Operator(
    "kernel_density(Tensor queries, Tensor points, Tensor scale, Tensor weight, Tensor ranges1,"
    " Tensor ranges2, SymInt longest, str kernel) -> Tensor",
    reference=reference.kernel_density_rows,
    fake=_fake_density,
    triton="density.kernel_density",
    setup_context=_setup_density,
    backward=_backward_density,
    autocast=torch.float32,
)

_KERNEL_DENSITY_BACKWARD = Operator(
    "kernel_density_backward(Tensor grad, Tensor queries, Tensor points, Tensor scale,"
    " Tensor weight, Tensor ranges1, Tensor ranges2, SymInt longest1, SymInt longest2, str kernel)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference.kernel_density_backward,
    fake=_fake_density_backward,
    has=("reference", "cpu", "triton"),
    triton="density.kernel_density_backward",
    differentiable_reference=True,
)


def kernel_density(
    points: Tensor,
    bandwidth: float | Tensor,
    lengths: Tensor | None = None,
    kernel: str = "gaussian",
    neighbours: Tensor | None = None,
    *,
    queries: Tensor | None = None,
    query_lengths: Tensor | None = None,
    ptr: Tensor | None = None,
    batch: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The kernel density estimate of each cloud at its own points, without an N x N matrix.

    ``density(x) = 1/n sum_j K(|x - x_j| / h_j) / h_j^D`` over the n points of the cloud, the point
    itself and its duplicates among them, with K integrating to one: a probability density, equal to
    scipy's ``gaussian_kde`` with the same bandwidth. A bandwidth of each point gives the adaptive
    (sample-point) estimate of Breiman et al. and Abramson. Differences are taken directly.

    Args:
        points: padded clouds ``[B, N, D]``, or packed ones ``[N, D]``; float32, float64, float16 or
            bfloat16.
        bandwidth: h above 0: a number, a tensor of one element, ``[B]`` of padded clouds, or one of
            each point, ``[B, N]`` or ``[N]``.
        lengths: int64 ``[B]``: how many points of each padded cloud there are; the rest have
            density 0.
        kernel: ``gaussian`` (``exp(-d^2 / 2 h^2)``), ``epanechnikov`` (``max(1 - d^2/h^2, 0)``) or
            ``tophat`` (``d < h``), each divided by its integral.
        neighbours: int64 ``[..., K]`` of :func:`knn_points` on padded clouds or one packed cloud:
            the sum goes over these alone; -1 is none. By default over every point.
        queries: ``[B, M, D]``, or ``[M, D]`` of one packed cloud: where to estimate, in place of
            the points themselves.
        query_lengths: int64 ``[B]``: how many queries of each padded cloud there are.
        ptr, batch: the packed clouds, as :func:`knn_points` takes them.
        backend: ``auto``, ``reference``, ``cpu``, ``cuda`` or ``triton``; None follows
            :func:`fastzoo.use_backend`.

    Returns:
        ``[B, N]`` or ``[N]`` (with queries ``[B, M]``, ``[M]``), float32 (float64 for float64).

    Gradient: to points, queries and bandwidth, of any order; that of a compact kernel is zero
    beyond its bandwidth. Forward-mode derivatives raise. Deterministic. Under autocast it computes
    in float32.

    Raises:
        TypeError, ValueError: an argument of the wrong kind; the message names it.
        RuntimeError: a forced backend that cannot run, with the reason.

    Source: Wu et al., PointConv (2019), section 3.1; Silverman, Density Estimation (1986).
    """
    check_choice("kernel", kernel, KERNELS)
    check_clouds("points", points, lengths, ptr, batch)
    _check_bandwidth(bandwidth, points)
    if queries is not None:
        check_tensor("queries", queries, "[B, M, D] or [M, D]", points.dim())
        check_same("points", points, "queries", queries)
        check_clouds("queries", queries, query_lengths, None, None)
        if queries.shape[-1] != points.shape[-1] or queries.shape[:-2] != points.shape[:-2]:
            raise ValueError(
                f"queries: expected the clouds and dimensions of points {list(points.shape)}, "
                f"got {list(queries.shape)}"
            )
        if ptr is not None or batch is not None:
            raise ValueError("queries: expected padded clouds, or one packed cloud")
    elif query_lengths is not None:
        raise ValueError("query_lengths: expected with queries alone")
    if neighbours is not None:
        check_indices("neighbours", neighbours, "[..., K]", points.dim(), points.device)
        asked = points if queries is None else queries
        if neighbours.shape[:-1] != asked.shape[:-1]:
            raise ValueError(
                f"neighbours: expected {[*asked.shape[:-1], 'K']}, got {list(neighbours.shape)}"
            )
    return density_with(
        _KERNEL_DENSITY.choose(backend, points.device.type),
        group_beside(backend),
        points,
        bandwidth,
        lengths,
        kernel,
        neighbours,
        queries=queries,
        query_lengths=query_lengths,
        ptr=ptr,
        batch=batch,
    )


def inverse_density_scale(density: Tensor, neighbours: Tensor) -> Tensor:
    """What PointConv multiplies each neighbour's features by: one over its density, divided by the
    largest such number among the neighbours of the same centre.

    Args:
        density: ``[B, N]``, above 0 where there is a point.
        neighbours: int64 ``[B, S, K]``; -1 is none, and gives 0.

    Returns:
        ``[B, S, K]``, in (0, 1].

    Gradient: to ``density``. A constant factor of the density cancels.

    Source: Wu et al., PointConv (2019), whose published code normalises so.
    """
    check_tensor("density", density, "[B, N]", 2)
    check_indices("neighbours", neighbours, "[B, S, K]", 3, density.device)
    if neighbours.shape[0] != density.shape[0]:
        raise ValueError(
            f"neighbours: expected {density.shape[0]} clouds, got {list(neighbours.shape)}"
        )
    return inverse_scale_with(group_beside(None), density, neighbours)


def _check_bandwidth(bandwidth: float | Tensor, points: Tensor) -> None:
    if isinstance(bandwidth, Tensor):
        rows = points.shape[:-1]
        allowed = {(), (1,), tuple(rows), tuple(rows[:1]) if points.dim() == 3 else ()}
        if tuple(bandwidth.shape) not in allowed:
            raise ValueError(
                f"bandwidth: expected one number, or one of each cloud or point {list(rows)}, "
                f"got {list(bandwidth.shape)}"
            )
        looks = bandwidth.device.type == "cpu" and not torch.compiler.is_compiling()
        if looks and bool((bandwidth <= 0).any()):
            raise ValueError("bandwidth: expected above 0")
        if bandwidth.device != points.device:
            raise ValueError(
                f"bandwidth: expected the device of points, {points.device}, got {bandwidth.device}"
            )
    elif isinstance(bandwidth, bool) or not isinstance(bandwidth, float | int):
        raise TypeError(f"bandwidth: expected a number or a tensor, got {bandwidth!r}")
    elif not bandwidth > 0:
        raise ValueError(f"bandwidth: expected above 0, got {bandwidth}")
