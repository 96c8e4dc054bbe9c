"""Fewer points for many: the farthest ones, and one for each cell of a grid."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastzoo.reference.clouds import Clouds, as_clouds, rows_at
from fastzoo.reference.neighbours import distance_matrix
from fastzoo.reference.precision import compute_dtype
from fastzoo.reference.vq import vq_statistics


def farthest_points(
    points: Tensor, ranges: Tensor, starts: Tensor, counts: Tensor, k: int
) -> Tensor:
    """Each next point is the one whose least squared distance to those before is the greatest,
    the lowest index among equals; a NaN distance lowers nothing; no point is taken twice.

    Returns:
        int64 ``[B, k]`` within the cloud, -1 beyond ``counts`` and beyond the cloud.
    """
    rows = points.to(compute_dtype(points))
    chosen = torch.full((len(ranges), k), -1, device=points.device)
    for cloud, (start, end) in enumerate(ranges.tolist()):
        part = rows[start:end]
        size = min(len(part), int(counts[cloud]), k)
        if size <= 0:
            continue
        least = part.new_full((len(part),), torch.inf)
        latest = min(max(int(starts[cloud]), 0), len(part) - 1)
        for place in range(size):
            chosen[cloud, place] = latest
            distance = distance_matrix(part, part[latest : latest + 1])[:, 0]
            least = torch.where(distance < least, distance, least)
            least[latest] = -1
            latest = int(least.argmax())
    return chosen


def sample_farthest_points(points: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """See :func:`fastzoo.ops.sample_farthest_points`."""
    return sample_with(farthest_points, points, *args, **kwargs)


def sample_with(
    farthest: Callable[..., Tensor],
    points: Tensor,
    lengths: Tensor | None = None,
    K: int | Sequence[int] | Tensor = 50,
    random_start_point: bool = False,
    *,
    ptr: Tensor | None = None,
    batch: Tensor | None = None,
    start: Tensor | None = None,
    gather: Callable[[Tensor, Tensor], Tensor] = rows_at,
) -> tuple[Tensor, Tensor]:
    """``sample_farthest_points`` by any kernels."""
    clouds = as_clouds(points, lengths, ptr, batch)
    device = points.device
    size = len(clouds.ranges)
    if isinstance(K, int | torch.SymInt):
        most, counts = K, torch.full((size,), K, device=device)
    else:
        counts = torch.as_tensor(K, device=device)
        if counts.shape != (size,):
            raise ValueError(f"K: expected {size} numbers, one a cloud, got {list(counts.shape)}")
        if counts.is_floating_point() and size:
            raise TypeError(f"K: expected whole numbers, got {counts.dtype}")
        counts = counts.long()
        most = int(counts.max()) if size else 0
    if start is None:
        start = torch.zeros(size, dtype=torch.int64, device=device)
        if random_start_point:
            start = _random_starts(clouds)
    elif start.shape[0] != size:
        raise ValueError(f"start: expected {size} clouds, got {start.shape[0]}")
    idx = farthest(clouds.rows, clouds.ranges, start, counts, most)
    if points.dim() == 3:
        return gather(points, idx[..., None])[:, :, 0], idx
    idx = torch.where(idx < 0, -1, idx + clouds.ranges[:, :1])
    return gather(points[None], idx[None])[0], idx


def _random_starts(clouds: Clouds) -> Tensor:
    sizes = clouds.ranges[:, 1] - clouds.ranges[:, 0]
    share = torch.rand(len(sizes), dtype=torch.float64, device=sizes.device)
    return (share * sizes).long()


def voxel_grid_rows(
    points: Tensor, ranges: Tensor, size: Tensor, start: Tensor
) -> tuple[Tensor, Tensor]:
    """The cell of each row, numbered in order of first appearance, and the first row of each."""
    count = points.shape[0]
    cells = torch.floor((points.to(size.dtype) - start) / size)
    rows = torch.arange(count, device=points.device)
    cloud = torch.full((count,), -1, device=points.device)
    for number, (first, last) in enumerate(ranges.tolist()):
        cloud[first:last] = number
    valid = (cloud >= 0) & ~cells.isnan().any(1)
    voxels = torch.full((count,), -1, device=points.device)
    first_row = torch.full((count,), -1, device=points.device)
    if valid.any():
        keys = torch.cat([cloud[:, None].to(cells.dtype), cells], 1)[valid]
        _, group = torch.unique(keys, dim=0, return_inverse=True)
        groups = int(group.max()) + 1
        lowest = torch.full((groups,), count, device=points.device)
        lowest = lowest.scatter_reduce(0, group, rows[valid], "amin")
        in_order = torch.argsort(lowest)
        place = torch.empty_like(in_order)
        place[in_order] = torch.arange(groups, device=points.device)
        voxels[valid] = place[group]
        first_row[:groups] = lowest[in_order]
    return voxels, first_row


def voxel_grid(points: Tensor, size: Any, *args: Any, **kwargs: Any) -> Tensor:
    """See :func:`fastzoo.ops.voxel_grid`."""
    return voxels_with(voxel_grid_rows, points, size, *args, **kwargs)[0]


def voxels_with(
    voxelise: Callable[..., tuple[Tensor, Tensor]],
    points: Tensor,
    size: float | Sequence[float] | Tensor,
    start: float | Sequence[float] | Tensor | None = None,
    *,
    ptr: Tensor | None = None,
    batch: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``voxel_grid`` by any kernel, with the first row of each voxel."""
    clouds = as_clouds(points, None, ptr, batch)
    dtype, dim = compute_dtype(points), points.shape[1]

    def by_dimension(value: Any) -> Tensor:
        return torch.as_tensor(value, dtype=dtype, device=points.device).expand(dim).contiguous()

    origin = by_dimension(0.0 if start is None else start)
    return voxelise(points, clouds.ranges, by_dimension(size), origin)


class GridSubsample(NamedTuple):
    """What :func:`fastzoo.ops.grid_subsample` returns."""

    points: Tensor
    features: Tensor | None
    voxels: Tensor
    counts: Tensor


def grid_subsample(points: Tensor, size: Any, *args: Any, **kwargs: Any) -> GridSubsample:
    """See :func:`fastzoo.ops.grid_subsample`."""
    return subsample_with(voxel_grid_rows, vq_statistics, points, size, *args, **kwargs)


def subsample_with(
    voxelise: Callable[..., tuple[Tensor, Tensor]],
    statistics: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]],
    points: Tensor,
    size: float | Sequence[float] | Tensor,
    features: Tensor | None = None,
    start: float | Sequence[float] | Tensor | None = None,
    *,
    ptr: Tensor | None = None,
    batch: Tensor | None = None,
) -> GridSubsample:
    """``grid_subsample`` by any kernels."""
    voxels, first = voxels_with(voxelise, points, size, start, ptr=ptr, batch=batch)
    number = int((first >= 0).sum())
    counts, sums = statistics(points, voxels, number)
    means = (sums / counts[:, None]).to(points.dtype)
    feature_means = None
    if features is not None:
        _, feature_sums = statistics(features, voxels, number)
        feature_means = (feature_sums / counts[:, None]).to(features.dtype)
    return GridSubsample(means, feature_means, voxels, counts)
