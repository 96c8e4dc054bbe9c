"""Sample inputs and benchmark cases of the ``density`` family."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastzoo import ops, reference
from fastzoo.ops.density import KERNELS
from fastzoo.reference.clouds import as_clouds
from fastzoo.reference.density import profile, profile_slope, scale_and_volume
from fastzoo.reference.precision import compute_dtype
from fastzoo.testing.neighbours import random_points
from fastzoo.testing.spec import BenchmarkCase, Invalid, OpSpec, Sample
from fastzoo.testing.tolerance import unit_roundoff


def samples(dtype: torch.dtype) -> Iterator[Sample]:
    def sample(name: str, points: Tensor, bandwidth: Any, **kwargs: Any) -> Sample:
        if isinstance(bandwidth, Tensor):
            bandwidth = bandwidth.to(dtype)
        return Sample(name, (points.to(dtype), bandwidth), kwargs)

    # Bandwidths whose square is no distance of points with few digits.
    for n, dim, h, kernel in (
        (1, 1, 0.317, "gaussian"),
        (65, 3, 0.217, "gaussian"),
        (40, 2, 0.417, "epanechnikov"),
        (33, 7, 0.917, "tophat"),
    ):
        points = random_points(4, n, dim, seed=n)
        yield sample(f"random-{n}x{dim}-{kernel}", points, h, kernel=kernel)
    points, other = random_points(2, 70, 3, seed=3), random_points(2, 31, 3, seed=4)
    adaptive = 0.1 + random_points(2, 70, 1, seed=5)[..., 0] / 3
    for kernel in KERNELS:
        yield sample(f"adaptive-{kernel}", points, adaptive, kernel=kernel)
        yield sample(f"queries-{kernel}", points, 0.317, kernel=kernel, queries=other.to(dtype))
    yield sample("duplicates", points[:, torch.arange(70) % 9], 0.217)
    yield sample("offset", points + 100, 0.217)
    yield sample("narrow", points, 0.01, kernel="gaussian")
    yield sample("wide", points, 30.0)
    yield sample("by-cloud", points, torch.tensor([0.2, 0.7]))
    yield sample("one-number", points, torch.tensor([0.25]))
    yield sample("lengths", points, 0.3, lengths=torch.tensor([70, 11]))
    yield sample("no-points", points[:, :0], 0.3)
    yield sample("no-clouds", points[:0], 0.3)
    neighbours = torch.cdist(points, points).topk(8, largest=False).indices
    neighbours[:, ::3, 5:] = -1
    yield sample("neighbours", points, 0.2, neighbours=neighbours)
    packed = points.reshape(-1, 3)
    yield sample("packed", packed, 0.2, ptr=torch.tensor([0, 50, 50, 140]))
    yield sample("batch", packed, adaptive.flatten(), batch=torch.arange(140) // 60)


def invalid() -> Iterator[Invalid]:
    points = random_points(2, 5)
    yield Invalid("list", ([1.0], 0.1), {}, TypeError, "points")
    yield Invalid("integers", (points.long(), 0.1), {}, TypeError, "points")
    yield Invalid("bandwidth", (points, 0.0), {}, ValueError, "bandwidth")
    yield Invalid("bandwidth-below", (points, -torch.ones(1)), {}, ValueError, "bandwidth")
    yield Invalid("bandwidth-word", (points, "scott"), {}, TypeError, "bandwidth")
    yield Invalid("bandwidth-shape", (points, torch.ones(3)), {}, ValueError, "bandwidth")
    yield Invalid("kernel", (points, 0.1), {"kernel": "cosine"}, ValueError, "kernel")
    yield Invalid("queries", (points, 0.1), {"queries": points[:1]}, ValueError, "queries")
    lengths = torch.tensor([5, 5])
    yield Invalid("query-lengths", (points, 0.1), {"query_lengths": lengths}, ValueError, "query")
    neighbours = torch.zeros(2, 4, 3, dtype=torch.int64)
    yield Invalid("neighbours", (points, 0.1), {"neighbours": neighbours}, ValueError, "neighb")
    floats = neighbours.float()
    yield Invalid("neighbour-floats", (points, 0.1), {"neighbours": floats}, TypeError, "neighb")
    yield Invalid("backend", (points, 0.1), {"backend": "gpu"}, ValueError, "backend")


def definition(points: Tensor, bandwidth: float | Tensor, **kwargs: Any) -> Tensor:
    """In float64, its result in the operator's dtype."""
    wide = {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in kwargs.items()
    }
    if isinstance(bandwidth, Tensor):
        bandwidth = bandwidth.double()
    return reference.kernel_density(points.double(), bandwidth, **wide).to(compute_dtype(points))


def _terms(
    points: Tensor,
    bandwidth: float | Tensor,
    *,
    kernel: str = "gaussian",
    queries: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """u, the weights, the scales and the distances of all pairs, in float64."""
    p = points.double()
    q = p if queries is None else queries.double()
    width = torch.as_tensor(bandwidth, dtype=torch.float64)
    if points.dim() == 3 and width.dim() == 1:
        width = width[:, None]
    scale, volume = scale_and_volume(width, kernel, p.shape[-1])
    distances = torch.cdist(q, p, compute_mode="donot_use_mm_for_euclid_dist").square()
    by_point = torch.broadcast_to(scale, p.shape[:-1])[..., None, :]
    # Of however few points: the least sizes give the greatest terms, which only loosens the bound.
    weight = torch.broadcast_to(1 / volume, p.shape[:-1])[..., None, :]
    return by_point * distances, weight, by_point, distances


def tolerance(points: Tensor, bandwidth: float | Tensor, **kwargs: Any) -> Tensor:
    """Absolute error allowed of a density.

    A scaled distance u is good to D + 6 roundings, which move a term by ``|k'| u`` of them; the
    kernel itself is good to 8, and the sum, in parts of at most 1024 terms, to 32.
    """
    kernel = kwargs.get("kernel", "gaussian")
    u, weight, _, _ = _terms(points, bandwidth, **kwargs)
    roundings = (
        40 * profile(u, kernel) + (points.shape[-1] + 6) * u * profile_slope(u, kernel).abs()
    )
    sums = (weight * roundings).sum(-1)
    lengths = kwargs.get("lengths")
    smallest = points.shape[-2] if lengths is None else int(lengths.min())
    packed = points.dim() == 2
    unit = unit_roundoff(compute_dtype(points))
    return unit * sums / (1 if packed else max(1, smallest))


def cancellation(points: Tensor, bandwidth: float | Tensor, **kwargs: Any) -> float:
    """The largest sum of the magnitudes that cancel in a gradient to the points."""
    kernel = kwargs.get("kernel", "gaussian")
    u, weight, scale, distances = _terms(points, bandwidth, **kwargs)
    if u.numel() == 0:
        return 0.0
    pulls = weight * scale * profile_slope(u, kernel).abs() * 2 * distances.sqrt()
    return float((pulls.sum(-1).max() + pulls.sum(-2).max()) / max(1, points.shape[-2]))


def gradient_sample(dtype: torch.dtype) -> Sample:
    points = random_points(2, 5, 3, seed=6)
    bandwidth = 0.3 + random_points(2, 5, 1, seed=7)[..., 0]
    return Sample("gradient", (points.to(dtype), bandwidth.to(dtype)))


def _dispatched(
    points: Tensor, bandwidth: float, *, kernel: str = "gaussian", **_: Any
) -> tuple[Any, ...]:
    clouds = as_clouds(points)
    scale = torch.full(clouds.rows.shape[:1], 1 / bandwidth, dtype=compute_dtype(points))
    ranges = clouds.ranges
    return clouds.rows, clouds.rows, scale, scale * 2, ranges, ranges, clouds.longest, kernel


def eager(points: Tensor, bandwidth: float) -> Tensor:
    """As PointConv's published code has it: squared distances by a matrix product, then the mean
    of their exponentials; here with the constant that makes it a density."""
    square = points.square().sum(-1)
    products = points @ points.transpose(1, 2)
    distances = square[..., None] + square[..., None, :] - 2 * products
    scale, volume = scale_and_volume(torch.tensor(bandwidth), "gaussian", points.shape[-1])
    return torch.exp(-distances * scale).mean(-1) / volume


def _case(clouds: int, n: int, bandwidth: float, *, backward: bool = False) -> BenchmarkCase:
    def make(device: str, clouds: int, n: int) -> tuple[Any, ...]:
        return random_points(clouds, n, device=device), bandwidth

    pairs = 30.0 if backward else 11.0
    return BenchmarkCase(
        name=f"{clouds} x {n}, h {bandwidth:g}" + (", forward + backward" if backward else ""),
        shape={"clouds": clouds, "n": n},
        make=make,
        kwargs={},
        flops=lambda points, _: pairs * points[..., 0].numel() * points.shape[1],
        bytes=lambda points, _: 4.0 * (points.numel() + points[..., 0].numel()),
        gradients=(0,) if backward else (),
        seeds=lambda points, _: (torch.ones_like(points[..., 0]),),
        tolerance=lambda points, _: 64 * 2.0**-24 * points.shape[1] ** 0.5,
    )


KERNEL_DENSITY = OpSpec(
    name="kernel_density",
    function=ops.kernel_density,
    definition=definition,
    eager=eager,
    eager_bytes=lambda points, _: 16.0 * points[..., 0].numel() * points.shape[1],
    samples=samples,
    invalid=invalid,
    dispatch_args=_dispatched,
    fixed_shape=True,
    differentiable=lambda output: output,
    gradient_sample=gradient_sample,
    tolerance=tolerance,
    gradient_rtol=lambda dtype, points, *_, **__: 128 * unit_roundoff(compute_dtype(points)),
    cancellation=cancellation,
    benchmarks=(
        _case(1, 4096, 0.1),
        _case(8, 1024, 0.2),
        _case(1, 50_000, 0.005),
        _case(1, 4096, 0.1, backward=True),
    ),
)

SPECS = (KERNEL_DENSITY,)
