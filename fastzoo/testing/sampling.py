"""Sample inputs and benchmark cases of the ``sampling`` family."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastzoo import ops, reference
from fastzoo.reference.clouds import as_clouds
from fastzoo.reference.precision import compute_dtype
from fastzoo.testing.neighbours import lattice, random_points, special
from fastzoo.testing.spec import BenchmarkCase, Invalid, OpSpec, Sample


def farthest_function(points: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    selected, idx = ops.sample_farthest_points(points, *args, **kwargs)
    return selected.to(compute_dtype(selected)), idx


def farthest_definition(points: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    selected, idx = reference.sample_farthest_points(points, *args, **kwargs)
    return selected.to(compute_dtype(selected)), idx


def farthest_samples(dtype: torch.dtype) -> Iterator[Sample]:
    def sample(name: str, points: Tensor, **kwargs: Any) -> Sample:
        return Sample(name, (points.to(dtype),), kwargs)

    for clouds, n, dim, k in ((4, 1, 1, 1), (4, 65, 3, 17), (4, 40, 2, 40), (4, 33, 9, 7)):
        yield sample(f"random-{n}x{dim}-{k}", random_points(clouds, n, dim, seed=n), K=k)
    points = random_points(2, 50, 3, seed=2)
    yield sample("offset", points + 100, K=20)
    yield sample("duplicates", points[:, torch.arange(50) % 7], K=30)
    yield sample("equal-points", torch.ones_like(points), K=9)
    yield sample("lattice", lattice(2, 60, 3), K=25)
    yield sample("beyond", points[:, :5], K=8)
    yield sample("special", special(points), K=12)
    yield sample("none", points, K=0)
    yield sample("no-points", points[:, :0], K=3)
    yield sample("no-clouds", points[:0], K=3)
    lengths = torch.tensor([3, 50])
    yield sample("lengths", points, K=6, lengths=lengths, start=torch.tensor([2, 49]))
    yield sample("each", points, K=[9, 4])
    packed, ptr = points.reshape(-1, 3), torch.tensor([0, 20, 20, 100])
    yield sample("packed", packed, K=5, ptr=ptr)
    yield sample("batch", packed, K=torch.tensor([2, 7]), batch=torch.arange(100) // 70)


def farthest_invalid() -> Iterator[Invalid]:
    points = random_points(2, 5)
    yield Invalid("list", ([1.0],), {}, TypeError, "points")
    yield Invalid("rank", (points[0, 0],), {}, ValueError, "points")
    yield Invalid("integers", (points.long(),), {}, TypeError, "points")
    yield Invalid("K", (points,), {"K": -1}, ValueError, "K: ")
    yield Invalid("K-float", (points,), {"K": 2.5}, TypeError, "K: ")
    yield Invalid("K-list", (points,), {"K": [1]}, ValueError, "K: ")
    yield Invalid("K-floats", (points,), {"K": [1.5, 2.0]}, TypeError, "K: ")
    packed, ptr = points[0], torch.tensor([0, 2, 5])
    yield Invalid("K-packed", (packed,), {"K": [1], "ptr": ptr}, ValueError, "K: ")
    yield Invalid("start-packed", (packed,), {"start": ptr, "ptr": ptr}, ValueError, "start")
    start = torch.tensor([0])
    yield Invalid("start", (points,), {"start": start}, ValueError, "start")
    yield Invalid("start-floats", (points,), {"start": start / 2}, TypeError, "start")
    yield Invalid("lengths", (points,), {"lengths": torch.tensor([6, 1])}, ValueError, "lengths")
    yield Invalid("backend", (points,), {"backend": "gpu"}, ValueError, "backend")


def _dispatched_farthest(
    points: Tensor, lengths: Tensor | None = None, K: int = 50, **_: Any
) -> tuple[Any, ...]:
    clouds = as_clouds(points)
    size = len(clouds.ranges)
    return clouds.rows, clouds.ranges, torch.zeros(size).long(), torch.full((size,), K), K


def farthest_eager(points: Tensor, lengths: None, k: int) -> Tensor:
    """The loop as one writes it: a few operators a step."""
    clouds, n, _ = points.shape
    chosen = torch.zeros(clouds, k, dtype=torch.int64, device=points.device)
    least = torch.full((clouds, n), torch.inf, device=points.device)
    latest = torch.zeros(clouds, dtype=torch.int64, device=points.device)
    every = torch.arange(clouds, device=points.device)
    for place in range(k):
        chosen[:, place] = latest
        centre = points[every, latest]
        least = torch.minimum(least, (points - centre[:, None]).square().sum(-1))
        latest = least.argmax(1)
    return chosen


def _farthest_case(clouds: int, n: int, k: int) -> BenchmarkCase:
    return BenchmarkCase(
        name=f"{clouds} x {n} -> {k}",
        shape={"clouds": clouds, "n": n, "k": k},
        make=lambda device, clouds, n, k: (random_points(clouds, n, device=device), None, k),
        kwargs={},
        flops=lambda points, _, k: 9.0 * points[..., 0].numel() * k,
        bytes=lambda points, _, k: 4.0 * points.numel() + 8.0 * len(points) * k,
    )


SAMPLE_FARTHEST_POINTS = OpSpec(
    name="sample_farthest_points",
    operator="farthest_points",
    function=farthest_function,
    definition=farthest_definition,
    eager=farthest_eager,
    samples=farthest_samples,
    invalid=farthest_invalid,
    dispatch_args=_dispatched_farthest,
    fixed_shape=True,
    benchmarks=(
        _farthest_case(1, 4096, 1024),
        _farthest_case(32, 4096, 512),
        _farthest_case(1, 100_000, 10_000),
    ),
)


def voxel_samples(dtype: torch.dtype) -> Iterator[Sample]:
    def sample(name: str, points: Tensor, size: Any, **kwargs: Any) -> Sample:
        return Sample(name, (points.to(dtype), size), kwargs)

    for n, dim, size in ((1, 1, 0.5), (200, 3, 0.25), (64, 2, 0.1), (50, 9, 0.6)):
        yield sample(f"random-{n}x{dim}", random_points(1, n, dim, seed=n)[0], size)
    points = random_points(1, 150, 3, seed=2)[0]
    yield sample("signs", points - 0.5, 0.3)
    yield sample("zeros", torch.zeros_like(points) * -1, 0.3)
    yield sample("lattice", lattice(1, 90, 3)[0] - 2, 2.0, start=[-1.0, 0.0, 1.0])
    yield sample("each", points, [0.1, 0.5, 2.0], start=0.05)
    yield sample("far", points * 1e4, 1e-3)
    yield sample("special", special(points[None])[0], 0.4)
    yield sample("none", points[:0], 1.0)
    yield sample("packed", points, 0.5, ptr=torch.tensor([0, 40, 40, 150]))
    yield sample("batch", points, 0.5, batch=torch.arange(150) // 60)


def voxel_invalid() -> Iterator[Invalid]:
    points = random_points(1, 5)[0]
    yield Invalid("padded", (points[None], 1.0), {}, ValueError, "points")
    yield Invalid("integers", (points.long(), 1.0), {}, TypeError, "points")
    yield Invalid("size", (points, 0.0), {}, ValueError, "size")
    yield Invalid("size-word", (points, "big"), {}, TypeError, "size")
    yield Invalid("sizes", (points, [1.0, 2.0]), {}, ValueError, "size")
    yield Invalid("size-tensor", (points, torch.ones(2)), {}, ValueError, "size")
    yield Invalid("size-below", (points, torch.tensor([-1.0])), {}, ValueError, "size")
    yield Invalid("start", (points, 1.0), {"start": [0.0, 1.0]}, ValueError, "start")
    yield Invalid("backend", (points, 1.0), {"backend": "gpu"}, ValueError, "backend")


def _dispatched_voxels(points: Tensor, size: float, **_: Any) -> tuple[Any, ...]:
    edges = torch.full(points.shape[1:], size, dtype=compute_dtype(points))
    return points, as_clouds(points).ranges, edges, torch.zeros_like(edges)


def voxel_eager(points: Tensor, size: float) -> Tensor:
    """Packed keys of the cells, made consecutive by a sort."""
    cells = torch.floor(points / size).long()
    cells = cells - cells.amin(0)
    extent = cells.amax(0) + 1
    keys = (cells[:, 0] * extent[1] + cells[:, 1]) * extent[2] + cells[:, 2]
    voxels: Tensor = torch.unique(keys, return_inverse=True)[1]
    return voxels


VOXEL_GRID = OpSpec(
    name="voxel_grid",
    function=ops.voxel_grid,
    definition=reference.voxel_grid,
    eager=voxel_eager,
    samples=voxel_samples,
    invalid=voxel_invalid,
    dispatch_args=_dispatched_voxels,
    fixed_shape=True,
    benchmarks=(
        BenchmarkCase(
            name="1000000, 1/50",
            shape={"n": 1_000_000},
            make=lambda device, n: (random_points(1, n, device=device)[0], 0.02),
            kwargs={},
            flops=lambda points, _: 3.0 * points.numel(),
            bytes=lambda points, _: 4.0 * points.numel() + 8.0 * len(points),
        ),
    ),
)

SPECS = (SAMPLE_FARTHEST_POINTS, VOXEL_GRID)
