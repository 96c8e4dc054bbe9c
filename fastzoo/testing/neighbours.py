"""Sample inputs and benchmark cases of the ``neighbours`` family."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastzoo import ops, reference
from fastzoo.reference.clouds import as_clouds
from fastzoo.testing.spec import BenchmarkCase, Invalid, OpSpec, Sample


def random_points(
    clouds: int, n: int, dim: int = 3, *, seed: int = 0, device: str = "cpu"
) -> Tensor:
    """Uniform points of the unit cube, ``[B, N, D]``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(clouds, n, dim, generator=generator).to(device)


def lattice(clouds: int, n: int, dim: int, *, seed: int = 0) -> Tensor:
    """Points of a small grid: many equal distances, and duplicates."""
    return (random_points(clouds, n, dim, seed=seed) * 4).floor()


def special(points: Tensor) -> Tensor:
    """With coordinates that are not finite."""
    broken = points.clone()
    broken[0, 1, 0], broken[0, 3, -1], broken[-1, 0] = torch.nan, torch.inf, -torch.inf
    return broken


def knn_function(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    return _given(ops.knn_points(*args, **kwargs))


def knn_definition(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    return _given(reference.knn_points(*args, **kwargs))


def ball_function(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    return _given(ops.ball_query(*args, **kwargs))


def ball_definition(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    return _given(reference.ball_query(*args, **kwargs))


def _given(found: ops.KNN) -> tuple[Tensor, ...]:
    """What there is, the points as wide as the distances."""
    dists, idx, points = found
    return (dists, idx) if points is None else (dists, idx, points.to(dists.dtype))


def samples(dtype: torch.dtype) -> Iterator[Sample]:
    def sample(name: str, p1: Tensor, p2: Tensor, **kwargs: Any) -> Sample:
        return Sample(name, (p1.to(dtype), p2.to(dtype)), kwargs)

    for clouds, n, m, dim, k in (
        (4, 1, 1, 1, 1),
        (4, 33, 65, 3, 8),
        (4, 17, 40, 2, 33),
        (4, 5, 130, 7, 3),
        (4, 9, 3, 3, 5),
    ):
        p1, p2 = random_points(clouds, n, dim, seed=n), random_points(clouds, m, dim, seed=m + 1)
        yield sample(f"random-{n}x{m}x{dim}-{k}", p1, p2, K=k)
    points, other = random_points(2, 70, 3, seed=3), random_points(2, 31, 3, seed=4)
    yield sample("self", points, points, K=6)
    yield sample("offset", other + 100, points + 100, K=9)
    yield sample("norm-1", other, points, K=7, norm=1)
    yield sample("lattice", lattice(2, 30, 3), lattice(2, 70, 3, seed=1), K=20)
    yield sample("equal-points", other, torch.ones_like(points), K=11)
    yield sample("near", other, points, K=5, radius=0.3)
    yield sample("near-lattice", lattice(2, 30, 3), lattice(2, 70, 3), K=9, radius=2.0)
    yield sample("special", special(other), special(points), K=70)
    yield sample("special-near", special(other), special(points), K=4, radius=0.4)
    yield sample("wide", random_points(1, 7, 512), random_points(1, 20, 512, seed=1), K=3)
    yield sample("many", other[:1], points[:1].repeat(1, 3, 1), K=200)
    lengths1, lengths2 = torch.tensor([31, 0]), torch.tensor([4, 70])
    yield sample("lengths", other, points, K=6, lengths1=lengths1, lengths2=lengths2)
    yield sample("no-points", other, points[:, :0], K=2)
    yield sample("no-queries", other[:, :0], points, K=2)
    yield sample("no-clouds", other[:0], points[:0], K=2)
    ptr1, ptr2 = torch.tensor([0, 7, 7, 62]), torch.tensor([0, 30, 50, 140])
    packed1, packed2 = other.reshape(-1, 3), points.reshape(-1, 3)
    yield sample("packed", packed1, packed2, K=4, ptr1=ptr1, ptr2=ptr2)
    yield sample("one-packed", packed1, packed2, K=4, radius=0.2)
    batch1, batch2 = torch.arange(62) // 20, torch.arange(140) // 60
    yield sample("batch", packed1, packed2, K=4, batch1=batch1, batch2=batch2)


def _search_invalid() -> Iterator[Invalid]:
    """What both searches refuse."""
    points = random_points(2, 5)
    lengths = torch.tensor([5, 5])
    yield Invalid("list", ([1.0], points), {}, TypeError, "p1")
    yield Invalid("rank", (points[0, 0], points), {}, ValueError, "p1")
    yield Invalid("ranks", (points, points[0]), {}, ValueError, "p2")
    yield Invalid("dimensions", (points, points[..., :2]), {}, ValueError, "p2")
    yield Invalid("no-dimensions", (points[..., :0], points[..., :0]), {}, ValueError, "p1")
    yield Invalid("clouds", (points, points[:1]), {}, ValueError, "p2")
    yield Invalid("integers", (points.long(), points), {}, TypeError, "p1")
    yield Invalid("dtype-mix", (points, points.double()), {}, TypeError, "p2")
    yield Invalid("device-mix", (points, points.to("meta")), {}, ValueError, "p2")
    yield Invalid("too-wide", (points.repeat(1, 1, 171),) * 2, {}, ValueError, "512")
    yield Invalid("K", (points, points), {"K": 0}, ValueError, "K: ")
    yield Invalid("K-float", (points, points), {"K": 1.5}, TypeError, "K: ")
    yield Invalid("radius", (points, points), {"radius": 0.0}, ValueError, "radius")
    yield Invalid("radius-word", (points, points), {"radius": "far"}, TypeError, "radius")
    yield Invalid("length", (points, points), {"lengths1": lengths[:1]}, ValueError, "lengths1")
    yield Invalid("long", (points, points), {"lengths2": lengths + 1}, ValueError, "lengths2")
    yield Invalid("floats", (points, points), {"lengths2": lengths / 2}, TypeError, "lengths2")
    packed = points.reshape(-1, 3)
    yield Invalid("ptr-padded", (points, points), {"ptr1": lengths}, ValueError, "ptr1")
    yield Invalid("lengths-packed", (packed, packed), {"lengths1": lengths}, ValueError, "lengths1")
    ptr = torch.tensor([0, 10])
    yield Invalid("one-ptr", (packed, packed), {"ptr1": ptr}, ValueError, "ptr2")
    yield Invalid("ptr-end", (packed, packed), {"ptr1": ptr, "ptr2": ptr - 1}, ValueError, "ptr2")
    batch = torch.arange(10)
    falling = {"batch1": batch, "batch2": batch.flip(0)}
    yield Invalid("falling-batch", (packed, packed), falling, ValueError, "batch2")
    yield Invalid("backend", (points, points), {"backend": "gpu"}, ValueError, "backend")


def invalid() -> Iterator[Invalid]:
    points = random_points(2, 5)
    yield from _search_invalid()
    yield Invalid("norm", (points, points), {"norm": 3}, ValueError, "norm")


def gradient_sample(dtype: torch.dtype) -> Sample:
    p1, p2 = random_points(2, 4, 3, seed=5), random_points(2, 6, 3, seed=6)
    return Sample("gradient", (p1.to(dtype), p2.to(dtype)), {"K": 3})


def dispatched(
    p1: Tensor,
    p2: Tensor,
    lengths1: Tensor | None = None,
    lengths2: Tensor | None = None,
    norm: int = 2,
    K: int = 1,
    *,
    radius: float | None = None,
    **_: Any,
) -> tuple[Any, ...]:
    first, second = as_clouds(p1), as_clouds(p2)
    longest, reach = max(first.longest, second.longest), radius or float("inf")
    ranges = first.ranges, second.ranges
    return first.rows, second.rows, *ranges, longest, K, reach, "nearest", norm


def eager(p1: Tensor, p2: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """Every distance, then the K least."""
    found = torch.cdist(p1, p2).topk(args[3], largest=False)
    return found.values.square(), found.indices


def knn_case(clouds: int, n: int, dim: int, k: int) -> BenchmarkCase:
    def make(device: str, clouds: int, n: int, dim: int, k: int) -> tuple[Any, ...]:
        points = random_points(clouds, n, dim, device=device)
        return points, points, None, None, 2, k

    return BenchmarkCase(
        name=f"{clouds} x {n} x {dim}, K {k}",
        shape={"clouds": clouds, "n": n, "dim": dim, "k": k},
        make=make,
        kwargs={},
        flops=lambda p1, p2, *rest: 3.0 * p1.numel() * p2.shape[1],
        bytes=lambda p1, p2, *rest: (
            (p1.numel() + p2.numel()) * 4.0 + 12.0 * p1[..., 0].numel() * rest[3]
        ),
    )


KNN_POINTS = OpSpec(
    name="knn_points",
    operator="neighbour_search",
    function=knn_function,
    definition=knn_definition,
    eager=eager,
    eager_bytes=lambda p1, p2, *_: 4.0 * p1[..., 0].numel() * p2.shape[1],
    samples=samples,
    invalid=invalid,
    dispatch_args=dispatched,
    fixed_shape=True,
    differentiable=lambda output: output[0],
    gradient_sample=gradient_sample,
    benchmarks=(
        knn_case(1, 4096, 3, 32),
        knn_case(1, 100_000, 3, 16),
        knn_case(32, 1024, 3, 32),
        knn_case(8, 1024, 64, 20),
    ),
)


def ball_samples(dtype: torch.dtype) -> Iterator[Sample]:
    def sample(name: str, p1: Tensor, p2: Tensor, **kwargs: Any) -> Sample:
        return Sample(name, (p1.to(dtype), p2.to(dtype)), kwargs)

    for clouds, n, m, dim, k, radius in (
        (4, 1, 1, 1, 1, 2.0),
        (4, 9, 65, 3, 4, 0.5),
        (4, 17, 40, 2, 50, 0.3),
    ):
        p1, p2 = random_points(clouds, n, dim, seed=n), random_points(clouds, m, dim, seed=m + 1)
        yield sample(f"random-{n}x{m}x{dim}-{k}", p1, p2, K=k, radius=radius)
    points, other = random_points(2, 70, 3, seed=3), random_points(2, 31, 3, seed=4)
    yield sample("without-points", other, points, K=6, radius=0.4, return_nn=False)
    yield sample("nobody", other, points + 9, K=3, radius=1)
    yield sample("edge", lattice(2, 30, 3), lattice(2, 70, 3, seed=1), K=20, radius=2.0)
    yield sample("special", special(other), special(points), K=7, radius=0.5, return_nn=False)
    lengths = {"lengths1": torch.tensor([31, 0]), "lengths2": torch.tensor([4, 70])}
    yield sample("lengths", other, points, K=6, radius=0.7, **lengths)
    ptr = {"ptr1": torch.tensor([0, 7, 7, 62]), "ptr2": torch.tensor([0, 30, 50, 140])}
    yield sample("packed", other.reshape(-1, 3), points.reshape(-1, 3), K=4, radius=0.4, **ptr)


def dispatched_ball(
    p1: Tensor,
    p2: Tensor,
    lengths1: Tensor | None = None,
    lengths2: Tensor | None = None,
    K: int = 500,
    radius: float = 0.2,
    return_nn: bool = True,
    **_: Any,
) -> tuple[Any, ...]:
    *args, _, norm = dispatched(p1, p2, K=K, radius=radius)
    return *args, "first", norm


def ball_eager(p1: Tensor, p2: Tensor, *args: Any) -> Tensor:
    """The first K inside, as PointNet++'s Python code finds them; -1 where there are fewer."""
    k, radius = args[2:4]
    points = p2.shape[1]
    index = torch.arange(points, device=p1.device).expand(*p1.shape[:2], points)
    outside = torch.cdist(p1, p2).square() >= radius**2
    first = torch.where(outside, points, index).sort(-1).values[..., :k]
    return torch.where(first == points, -1, first)


def _ball_case(clouds: int, n: int, m: int, k: int, radius: float) -> BenchmarkCase:
    def make(device: str, clouds: int, n: int, m: int, k: int) -> tuple[Any, ...]:
        points = random_points(clouds, m, device=device)
        return points[:, :n].contiguous(), points, None, None, k, radius, False

    return BenchmarkCase(
        name=f"{clouds} x {n} of {m}, K {k}",
        shape={"clouds": clouds, "n": n, "m": m, "k": k},
        make=make,
        kwargs={},
        flops=lambda p1, p2, *rest: 3.0 * p1.numel() * p2.shape[1],
        bytes=lambda p1, p2, *rest: (
            (p1.numel() + p2.numel()) * 4.0 + 12.0 * p1[..., 0].numel() * rest[2]
        ),
    )


BALL_QUERY = OpSpec(
    name="ball_query",
    operator="neighbour_search",
    function=ball_function,
    definition=ball_definition,
    eager=ball_eager,
    eager_bytes=lambda p1, p2, *_: 24.0 * p1[..., 0].numel() * p2.shape[1],
    samples=ball_samples,
    invalid=_search_invalid,
    dispatch_args=dispatched_ball,
    fixed_shape=True,
    differentiable=lambda output: output[0],
    gradient_sample=lambda dtype: Sample(
        "gradient", gradient_sample(dtype).args, {"K": 3, "radius": 0.6}
    ),
    benchmarks=(_ball_case(8, 512, 4096, 32, 0.1),),
)

SPECS = (KNN_POINTS, BALL_QUERY)
