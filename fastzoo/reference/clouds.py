"""Clouds of points as rows: one form for padded and for packed tensors."""

from typing import NamedTuple

import torch
from torch import Tensor


class Clouds(NamedTuple):
    """The points of every cloud, one after the other.

    Args:
        rows: ``[N, D]``.
        ranges: int64 ``[B, 2]``: the first row of each cloud and the one after its last.
        longest: a bound on the points of one cloud, known without looking at ``ranges``.
        shape: ``(B, P)`` of a padded tensor, ``(N,)`` of a packed one: what stands before D.
    """

    rows: Tensor
    ranges: Tensor
    longest: int
    shape: tuple[int, ...]


def as_clouds(
    points: Tensor,
    lengths: Tensor | None = None,
    ptr: Tensor | None = None,
    batch: Tensor | None = None,
    size: int | None = None,
) -> Clouds:
    """Padded ``[B, P, D]`` with ``lengths [B]``, or packed ``[N, D]``: the clouds of ``ptr``
    (``[B + 1]``, first rows) or of an ascending ``batch [N]`` with ``size`` clouds; else one."""
    device = points.device
    if points.dim() == 3:
        clouds, longest, dim = points.shape
        start = torch.arange(clouds, device=device) * longest
        end = start + (longest if lengths is None else lengths.clamp(0, longest))
        ranges = torch.stack([start, end], 1)
        return Clouds(points.reshape(-1, dim), ranges, longest, (clouds, longest))
    if batch is not None:
        ptr = ptr_of(batch, clouds_of(batch) if size is None else size)
    if ptr is None:
        ptr = torch.arange(2, device=device) * points.shape[0]
    ranges = torch.stack([ptr[:-1], ptr[1:]], 1)
    return Clouds(points, ranges, points.shape[0], (points.shape[0],))


def clouds_of(batch: Tensor) -> int:
    """How many clouds an ascending ``batch`` names; reads its last element."""
    return int(batch[-1]) + 1 if batch.numel() else 0


def ptr_of(batch: Tensor, size: int) -> Tensor:
    """The first row of each of ``size`` clouds, and the end."""
    return torch.searchsorted(batch, torch.arange(size + 1, device=batch.device))


def cloud_of_rows(clouds: Clouds) -> Tensor:
    """Which cloud each row is of, int64 ``[N]``; a row of none counts to one beside it."""
    rows = torch.arange(clouds.rows.shape[0], device=clouds.ranges.device)
    cloud = torch.searchsorted(clouds.ranges[:, 1].contiguous(), rows, right=True)
    return cloud.clamp(max=max(0, len(clouds.ranges) - 1))


def first_rows(clouds: Clouds, like: Clouds) -> Tensor:
    """For each row of ``clouds``, the first row of the same cloud of ``like``; int64 ``[N]``."""
    return like.ranges[cloud_of_rows(clouds), 0]


def rows_at(x: Tensor, idx: Tensor) -> Tensor:
    """``x [B, N, C]`` at ``idx [B, S, K]``, or ``[N, C]`` at ``[S, K]``; zeros at -1."""
    if x.dim() == 2:
        return rows_at(x[None], idx[None])[0]
    clouds, points, channels = x.shape
    first = torch.arange(clouds, device=x.device)[:, None, None] * points
    if points == 0:
        return x.new_zeros(*idx.shape, channels)
    rows = x.flatten(0, 1)[(idx.clamp(min=0) + first).flatten()]
    return torch.where(idx[..., None] < 0, 0, rows.view(*idx.shape, channels))
