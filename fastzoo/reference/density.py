"""Kernel density estimates by the definition: every pair of a cloud."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastzoo.reference.clouds import as_clouds, cloud_of_rows, rows_at
from fastzoo.reference.neighbours import distance_matrix, distances_between
from fastzoo.reference.precision import compute_dtype


def profile(u: Tensor, kernel: str) -> Tensor:
    """k(u) of a scaled squared distance: ``exp(-u)``, ``max(1 - u, 0)`` or ``[u < 1]``."""
    if kernel == "gaussian":
        return torch.exp(-u)
    return (1 - u).clamp(min=0) if kernel == "epanechnikov" else (u < 1).to(u.dtype)


def profile_slope(u: Tensor, kernel: str) -> Tensor:
    """k'(u)."""
    if kernel == "gaussian":
        return -torch.exp(-u)
    return -(u < 1).to(u.dtype) if kernel == "epanechnikov" else torch.zeros_like(u)


def scale_and_volume(bandwidth: Tensor, kernel: str, dim: int) -> tuple[Tensor, Tensor]:
    """What a squared distance is multiplied by, and the integral of the kernel over space."""
    ball = math.pi ** (dim / 2) / math.gamma(dim / 2 + 1)
    factor, volume = {
        "gaussian": (0.5, (2 * math.pi) ** (dim / 2)),
        "epanechnikov": (1.0, 2 * ball / (dim + 2)),
        "tophat": (1.0, ball),
    }[kernel]
    return factor / bandwidth.square(), volume * bandwidth.pow(dim)


def kernel_density_rows(
    queries: Tensor,
    points: Tensor,
    scale: Tensor,
    weight: Tensor,
    ranges1: Tensor,
    ranges2: Tensor,
    longest: int,
    kernel: str,
) -> Tensor:
    """``sum_j weight_j k(scale_j |q_i - p_j|^2)`` over the points of the query's cloud."""
    dtype = compute_dtype(points)
    queries, points = queries.to(dtype), points.to(dtype)
    sums = queries.new_zeros(queries.shape[0])
    for (start1, end1), (start2, end2) in zip(ranges1.tolist(), ranges2.tolist(), strict=True):
        distances = distance_matrix(queries[start1:end1], points[start2:end2])
        terms = weight[start2:end2] * profile(scale[start2:end2] * distances, kernel)
        rows = torch.arange(start1, end1, device=queries.device)
        sums = sums.index_put((rows,), terms.sum(1))
    return sums


def kernel_density_backward(
    grad: Tensor,
    queries: Tensor,
    points: Tensor,
    scale: Tensor,
    weight: Tensor,
    ranges1: Tensor,
    ranges2: Tensor,
    longest1: int,
    longest2: int,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the sums; differentiable itself."""
    dtype = compute_dtype(points)
    q, p = queries.to(dtype), points.to(dtype)
    grad_q, grad_p = torch.zeros_like(q), torch.zeros_like(p)
    grad_scale, grad_weight = torch.zeros_like(scale), torch.zeros_like(weight)
    for (start1, end1), (start2, end2) in zip(ranges1.tolist(), ranges2.tolist(), strict=True):
        here, there = q[start1:end1], p[start2:end2]
        g, s, w = grad[start1:end1, None], scale[start2:end2], weight[start2:end2]
        distances = distance_matrix(here, there)
        u = s * distances
        slope = g * w * profile_slope(u, kernel)
        pull = 2 * slope * s
        rows1 = torch.arange(start1, end1, device=q.device)
        rows2 = torch.arange(start2, end2, device=q.device)
        # sum_j pull_ij (q_i - p_j), with the differences taken before the products.
        apart = here[:, None] - there
        grad_q = grad_q.index_put((rows1,), (pull[..., None] * apart).sum(1))
        grad_p = grad_p.index_put((rows2,), -(pull[..., None] * apart).sum(0))
        grad_scale = grad_scale.index_put((rows2,), (slope * distances).sum(0))
        grad_weight = grad_weight.index_put((rows2,), (g * profile(u, kernel)).sum(0))
    return grad_q.to(queries.dtype), grad_p.to(points.dtype), grad_scale, grad_weight


def kernel_density(points: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """See :func:`fastzoo.ops.kernel_density`."""
    return density_with(kernel_density_rows, rows_at, points, *args, **kwargs)


def density_with(
    sums: Callable[..., Tensor],
    gather: Callable[[Tensor, Tensor], Tensor],
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
) -> Tensor:
    """``kernel_density`` by any kernels."""
    dtype, dim = compute_dtype(points), points.shape[-1]
    clouds = as_clouds(points, lengths, ptr, batch)
    sizes = (clouds.ranges[:, 1] - clouds.ranges[:, 0]).double()
    if points.dim() == 3:
        count = sizes[:, None]
    elif len(sizes) == 1:
        count = sizes
    else:
        count = sizes[cloud_of_rows(clouds)]
    # In float64 and rounded once: these few numbers multiply every term.
    width = torch.as_tensor(bandwidth, dtype=torch.float64, device=points.device)
    if points.dim() == 3 and width.dim() == 1:
        width = width[:, None]
    scale, volume = scale_and_volume(width, kernel, dim)
    shape = points.shape[:-1]
    scale = scale.to(dtype).expand(shape)
    weight = (1 / (volume * count.clamp(min=1))).to(dtype).expand(shape)
    ask, ask_lengths = (points, lengths) if queries is None else (queries, query_lengths)
    if neighbours is not None:
        return _listed(gather, ask, points, scale, weight, neighbours, kernel, ask_lengths)
    asking = clouds if queries is None else as_clouds(ask, ask_lengths)
    found = sums(
        asking.rows,
        clouds.rows,
        scale.reshape(-1),
        weight.reshape(-1),
        asking.ranges,
        clouds.ranges,
        max(asking.longest, clouds.longest),
        kernel,
    )
    return found.view(ask.shape[:-1])


def _listed(
    gather: Callable[[Tensor, Tensor], Tensor],
    queries: Tensor,
    points: Tensor,
    scale: Tensor,
    weight: Tensor,
    neighbours: Tensor,
    kernel: str,
    lengths: Tensor | None,
) -> Tensor:
    """The sums over a list of neighbours alone."""
    rows = torch.cat([points.to(scale.dtype), scale[..., None], weight[..., None]], -1)
    listed = gather(rows, neighbours)
    distances = distances_between(queries[..., None, :].to(scale.dtype), listed[..., :-2])
    terms = listed[..., -1] * profile(listed[..., -2] * distances, kernel)
    sums = torch.where(neighbours < 0, 0, terms).sum(-1)
    if lengths is not None:
        beyond = torch.arange(queries.shape[1], device=queries.device) >= lengths[:, None]
        sums = torch.where(beyond, 0, sums)
    return sums


def inverse_density_scale(density: Tensor, neighbours: Tensor) -> Tensor:
    """See :func:`fastzoo.ops.inverse_density_scale`."""
    return inverse_scale_with(rows_at, density, neighbours)


def inverse_scale_with(
    gather: Callable[[Tensor, Tensor], Tensor], density: Tensor, neighbours: Tensor
) -> Tensor:
    """``inverse_density_scale`` by any gather."""
    # Padded rows have no density, and are nobody's neighbours.
    inverse = 1 / density.clamp(min=torch.finfo(density.dtype).tiny)
    listed = gather(inverse[..., None], neighbours)[..., 0]
    largest = listed.amax(-1, keepdim=True)
    return listed / torch.where(largest > 0, largest, 1)
