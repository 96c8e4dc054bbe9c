"""Fewer points for many: the farthest ones, and one for each cell of a grid."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastzoo import reference
from fastzoo.ops._checks import check_clouds, check_count, check_floating, check_indices
from fastzoo.ops._operator import Operator
from fastzoo.ops.pointconv import group_beside
from fastzoo.ops.vq import vq_statistics
from fastzoo.reference.sampling import GridSubsample, sample_with, subsample_with, voxels_with


def _fake_farthest(
    points: Tensor, ranges: Tensor, starts: Tensor, counts: Tensor, k: int
) -> Tensor:
    return points.new_empty(ranges.shape[0], k, dtype=torch.int64)


_FARTHEST_POINTS = Operator(
    "farthest_points(Tensor points, Tensor ranges, Tensor starts, Tensor counts, SymInt k)"
    " -> Tensor",
    reference=reference.farthest_points,
    fake=_fake_farthest,
    has=("reference", "cpu", "cuda"),
    autocast=torch.float32,
    public=("sample_farthest_points",),
)


def _fake_voxels(
    points: Tensor, ranges: Tensor, size: Tensor, start: Tensor
) -> tuple[Tensor, Tensor]:
    rows = points.shape[0]
    return ranges.new_empty(rows), ranges.new_empty(rows)


_VOXEL_GRID = Operator(
    "voxel_grid(Tensor points, Tensor ranges, Tensor size, Tensor start) -> (Tensor, Tensor)",
    reference=reference.voxel_grid_rows,
    fake=_fake_voxels,
    has=("reference", "cpu", "cuda"),
    autocast=torch.float32,
)


def sample_farthest_points(
    points: Tensor,
    lengths: Tensor | None = None,
    K: int | Sequence[int] | Tensor = 50,
    random_start_point: bool = False,
    *,
    ptr: Tensor | None = None,
    batch: Tensor | None = None,
    start: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """K points of each cloud, each the farthest from those before it.

    Exact and the same bit for bit on every backend: squared distances are sums of direct
    differences in ascending order of the dimensions, in float32 (float64 for float64 points);
    of equally far points the lowest index is taken. No point is taken twice, so of duplicates each
    is taken in its turn. A NaN distance brings nothing nearer.

    Args:
        points: padded clouds ``[B, P, D]``, or packed ones ``[N, D]``; float32, float64, float16
            or bfloat16.
        lengths: int64 ``[B]``: how many points of each padded cloud there are.
        K: how many points, or a list or tensor of how many of each cloud.
        random_start_point: start at a random point of each cloud, drawn from torch's generator,
            instead of the first.
        ptr: int64 ``[B + 1]``: the first row of each packed cloud.
        batch: int64 ``[N]``, ascending: the cloud of each row.
        start: int64 ``[B]``: the point of each cloud to start at.
        backend: ``auto``, ``reference``, ``cpu`` or ``cuda``; None follows
            :func:`fastzoo.use_backend`.

    Returns:
        ``(selected [B, K, D], idx [B, K])``; of padded clouds ``idx`` counts within the cloud, of
        packed ones it is the row. Where a cloud has fewer points, zeros and -1.

    Gradient: of the points to ``points``; ``idx`` has none. Deterministic for a given start.

    Raises:
        TypeError, ValueError: an argument of the wrong kind; the message names it.
        RuntimeError: a forced backend that cannot run, with the reason.

    Source: pytorch3d.ops.sample_farthest_points, whose signature it has; Qi et al., PointNet++
    (2017).
    """
    check_clouds("points", points, lengths, ptr, batch)
    if isinstance(K, int | torch.SymInt):
        check_count("K", K)
    elif not isinstance(K, Tensor | Sequence) or isinstance(K, str):
        raise TypeError(f"K: expected an int, a list or a tensor, got {type(K).__name__}")
    if start is not None:
        check_indices("start", start, "[B]", 1, points.device)
    farthest = _FARTHEST_POINTS.choose(backend, points.device.type)
    return sample_with(
        farthest,
        points,
        lengths,
        K,
        random_start_point,
        ptr=ptr,
        batch=batch,
        start=start,
        gather=group_beside(backend),
    )


def voxel_grid(
    points: Tensor,
    size: float | Sequence[float] | Tensor,
    start: float | Sequence[float] | Tensor | None = None,
    *,
    ptr: Tensor | None = None,
    batch: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The number of the grid's cell that each point lies in, counted as cells first appear.

    The cell of a point is ``floor((p - start) / size)``, in float32 (float64 for float64 points);
    cells of different clouds are different. A hash table of real cells: any extent, any D.

    Args:
        points: packed ``[N, D]``; float32, float64, float16 or bfloat16.
        size: edge of a cell, or one for each dimension; above 0.
        start: where the grid begins; 0 by default.
        ptr, batch: the clouds, as :func:`fastzoo.ops.knn_points` takes them.
        backend: ``auto``, ``reference``, ``cpu`` or ``cuda``; None follows
            :func:`fastzoo.use_backend`.

    Returns:
        int64 ``[N]``; -1 for a point with a NaN.

    Gradient: none. Deterministic.

    Raises:
        TypeError, ValueError: an argument of the wrong kind; the message names it.
        RuntimeError: a forced backend that cannot run, with the reason.

    Source: Thomas et al., KPConv (2019), section 3.3.
    """
    _check_grid(points, size, start, ptr, batch)
    kernel = _VOXEL_GRID.choose(backend, points.device.type)
    return voxels_with(kernel, points, size, start, ptr=ptr, batch=batch)[0]


def grid_subsample(
    points: Tensor,
    size: float | Sequence[float] | Tensor,
    features: Tensor | None = None,
    start: float | Sequence[float] | Tensor | None = None,
    *,
    ptr: Tensor | None = None,
    batch: Tensor | None = None,
    backend: str | None = None,
) -> GridSubsample:
    """One point for each cell of a grid: the mean of the points and of the features in it.

    Args:
        points, size, start, ptr, batch, backend: as :func:`voxel_grid` takes them.
        features: ``[N, C]``, any floating dtype.

    Returns:
        ``GridSubsample(points [V, D], features [V, C] or None, voxels [N], counts [V])``, the cells
        in the order in which they first appear. Reads V once.

    Gradient: of the means to points and features, added up in a fixed order. Deterministic.

    Errors, source: as :func:`voxel_grid`.
    """
    _check_grid(points, size, start, ptr, batch)
    if features is not None:
        check_floating("features", features)
        if features.dim() != 2 or features.shape[0] != points.shape[0]:
            raise ValueError(
                f"features: expected [{points.shape[0]}, C], got {list(features.shape)}"
            )
    kernel = _VOXEL_GRID.choose(backend, points.device.type)

    return subsample_with(
        kernel, vq_statistics, points, size, features, start, ptr=ptr, batch=batch
    )


def _check_grid(
    points: Tensor, size: Any, start: Any, ptr: Tensor | None, batch: Tensor | None
) -> None:
    check_clouds("points", points, None, ptr, batch)
    if points.dim() != 2:
        raise ValueError(f"points: expected packed [N, D], got {list(points.shape)}")
    for name, value in (("size", size), ("start", 0.0 if start is None else start)):
        if isinstance(value, Tensor):
            count = value.numel()
        else:
            numbers = list(value) if isinstance(value, Sequence) else [value]
            count = len(numbers)
            if any(not isinstance(n, float | int) or isinstance(n, bool) for n in numbers):
                raise TypeError(f"{name}: expected numbers, got {value!r}")
        if count not in (1, points.shape[1]):
            raise ValueError(f"{name}: expected 1 or {points.shape[1]} numbers, got {count}")
    looks = points.device.type == "cpu" and not torch.compiler.is_compiling()
    if not isinstance(size, Tensor):
        positive = all(edge > 0 for edge in (size if isinstance(size, Sequence) else [size]))
    else:
        positive = not looks or bool((size > 0).all())
    if not positive:
        raise ValueError(f"size: expected above 0, got {size!r}")
