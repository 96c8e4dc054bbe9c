"""torch_cluster's functions (1.6) on fastzoo's operators.

Names, arguments, defaults and shapes are theirs: edges ``[2, E]``, in order of the point that was
asked about, and of distance where the nearest were sought. ``num_workers`` is ignored. Integer
points are computed in float64, half precision in float32. Batches ascend, as theirs must.

Where answers differ: the same on CPU and GPU; equally near points come by lower index; a radius is
a limit that no point may reach, and with more points inside than ``max_num_neighbors`` those of
lowest index are given, as on their GPU (their CPU takes any, in no order). A graph without loops
has ``k`` (``max_num_neighbors``) edges for each point that has as many neighbours, where theirs has
one more if a point is not found among its own nearest, which duplicates do. :func:`fps` takes no
point twice and draws from torch's generator; :func:`knn` has cosine distances on the CPU too, and
:func:`nearest` does not round points to float32 or clouds away from each other.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastzoo import ops
from fastzoo.reference.clouds import clouds_of, ptr_of
from fastzoo.reference.precision import compute_dtype

_FLOWS = ("source_to_target", "target_to_source")


def _rows(x: Tensor) -> Tensor:
    """Points ``[N, D]``."""
    x = x.reshape(-1, 1) if x.dim() == 1 else x
    return x if x.is_floating_point() else x.double()


def _clouds(
    batch_x: Tensor | None, batch_y: Tensor | None, batch_size: int | None
) -> dict[str, Any]:
    """How a search is told the clouds of y, from which it starts, and of x."""
    given = [batch for batch in (batch_x, batch_y) if batch is not None]
    if batch_size is None:
        batch_size = max([1, *map(clouds_of, given)])
    if batch_size == 1:
        return {}
    if batch_x is None or batch_y is None:
        raise ValueError("batch_x, batch_y: expected both of more clouds than one")
    return {"ptr1": ptr_of(batch_y, batch_size), "ptr2": ptr_of(batch_x, batch_size)}


def _at_most(number: int, x: Tensor) -> int:
    """No more places than there are points to fill them."""
    return min(number, max(1, len(x)))


def _edges(found: Tensor) -> Tensor:
    """``[2, E]`` of lists ``[M, K]`` with -1 for none: who asked, and what was found."""
    valid = found >= 0
    asked = torch.arange(len(found), device=found.device)[:, None].expand_as(found)
    return torch.stack([asked[valid], found[valid]])


def _nearest(x: Tensor, y: Tensor, k: int, cosine: bool, clouds: dict[str, Any]) -> Tensor:
    x, y = _rows(x), _rows(y)
    if cosine:
        # Of unit vectors the squared distance is twice the cosine's.
        x, y = (F.normalize(t.to(compute_dtype(t)), dim=-1) for t in (x, y))
    return ops.knn_points(y.detach(), x.detach(), K=_at_most(k, x), **clouds).idx


def _within(x: Tensor, y: Tensor, r: float, most: int, clouds: dict[str, Any]) -> Tensor:
    x, y = _rows(x).detach(), _rows(y).detach()
    return ops.ball_query(y, x, K=_at_most(most, x), radius=r, return_nn=False, **clouds).idx


def _others(found: Tensor) -> Tensor:
    """Of lists of the points themselves, without the point; where it is not in, without the
    last."""
    own = torch.arange(len(found), device=found.device)[:, None]
    last = found.shape[1] - 1
    place = torch.where(found == own, torch.arange(last + 1, device=found.device), last)
    left = torch.arange(last, device=found.device).expand(len(found), -1)
    return found.gather(1, left + (left >= place.amin(1, keepdim=True)))


def _graph(found: Tensor, loop: bool, flow: str) -> Tensor:
    if flow not in _FLOWS:
        raise ValueError(f"flow: expected one of {_FLOWS}, got {flow!r}")
    edges = _edges(found if loop else _others(found))
    return edges.flip(0) if flow == "source_to_target" else edges


def knn(
    x: Tensor,
    y: Tensor,
    k: int,
    batch_x: Tensor | None = None,
    batch_y: Tensor | None = None,
    cosine: bool = False,
    num_workers: int = 1,
    batch_size: int | None = None,
) -> Tensor:
    """``torch_cluster.knn``: for each row of ``y [M, F]`` the nearest of ``x [N, F]``, as edges
    ``[2, E]`` from rows of y to rows of x."""
    return _edges(_nearest(x, y, k, cosine, _clouds(batch_x, batch_y, batch_size)))


def knn_graph(
    x: Tensor,
    k: int,
    batch: Tensor | None = None,
    loop: bool = False,
    flow: str = "source_to_target",
    cosine: bool = False,
    num_workers: int = 1,
    batch_size: int | None = None,
) -> Tensor:
    """``torch_cluster.knn_graph``: edges ``[2, E]`` from the nearest to each point, or the other
    way with ``target_to_source``."""
    clouds = _clouds(batch, batch, batch_size)
    return _graph(_nearest(x, x, k + (not loop), cosine, clouds), loop, flow)


def radius(
    x: Tensor,
    y: Tensor,
    r: float,
    batch_x: Tensor | None = None,
    batch_y: Tensor | None = None,
    max_num_neighbors: int = 32,
    num_workers: int = 1,
    batch_size: int | None = None,
    ignore_same_index: bool = False,
) -> Tensor:
    """``torch_cluster.radius``: for each row of ``y [M, F]`` those of ``x [N, F]`` nearer than
    ``r``, as edges ``[2, E]`` from rows of y to rows of x."""
    clouds = _clouds(batch_x, batch_y, batch_size)
    found = _within(x, y, r, max_num_neighbors + ignore_same_index, clouds)
    return _edges(_others(found) if ignore_same_index else found)


def radius_graph(
    x: Tensor,
    r: float,
    batch: Tensor | None = None,
    loop: bool = False,
    max_num_neighbors: int = 32,
    flow: str = "source_to_target",
    num_workers: int = 1,
    batch_size: int | None = None,
) -> Tensor:
    """``torch_cluster.radius_graph``: edges ``[2, E]`` from the points nearer than ``r`` to each
    point, or the other way with ``target_to_source``."""
    clouds = _clouds(batch, batch, batch_size)
    return _graph(_within(x, x, r, max_num_neighbors + (not loop), clouds), loop, flow)


def fps(
    src: Tensor,
    batch: Tensor | None = None,
    ratio: float | Tensor | None = None,
    random_start: bool = True,
    batch_size: int | None = None,
    ptr: Tensor | Sequence[int] | None = None,
) -> Tensor:
    """``torch_cluster.fps``: rows of ``src [N, ...]``, of each cloud ``ceil(ratio * points)``
    (ratio 0.5 unless given, for each cloud if it is a tensor) farthest points in the order they
    were taken, cloud after cloud."""
    points = _rows(src.detach()).flatten(1)
    device = points.device
    if ptr is not None:
        first = torch.as_tensor(ptr, device=device)
    elif batch is not None:
        size = (int(batch[-1]) + 1 if batch.numel() else 0) if batch_size is None else batch_size
        first = ptr_of(batch, size)
    else:
        first = torch.tensor([0, len(points)], device=device)
    if not isinstance(ratio, Tensor):
        # Rounded to the points' dtype, as theirs is: the ceiling of a product depends on it.
        share = 0.5 if ratio is None else ratio
        ratio = torch.tensor(share, dtype=points.dtype, device=device)
    counts = torch.ceil(first.diff().float() * ratio).long()
    _, found = ops.sample_farthest_points(
        points, K=counts, random_start_point=random_start, ptr=first
    )
    return found[found >= 0]


def nearest(
    x: Tensor, y: Tensor, batch_x: Tensor | None = None, batch_y: Tensor | None = None
) -> Tensor:
    """``torch_cluster.nearest``: for each row of ``x [N, F]`` the nearest of ``y [M, F]``,
    ``[N]``."""
    if batch_x is None and batch_y is not None:
        batch_x = batch_y.new_zeros(len(x))
    if batch_y is None and batch_x is not None:
        batch_y = batch_x.new_zeros(len(y))
    for name, batch in (("batch_x", batch_x), ("batch_y", batch_y)):
        if batch is not None and bool((batch.diff() < 0).any()):
            raise ValueError(f"'{name}' is not sorted")
    found = _nearest(y, x, 1, False, _clouds(batch_y, batch_x, None))[:, 0]
    if bool((found < 0).any()):
        raise ValueError("Some batch indices occur in 'batch_x' that do not occur in 'batch_y'")
    return found


def grid_cluster(
    pos: Tensor, size: Tensor, start: Tensor | None = None, end: Tensor | None = None
) -> Tensor:
    """``torch_cluster.grid_cluster``: the number of each point's voxel in a grid from ``start`` to
    ``end`` (the least and the greatest coordinates), the first coordinate counting fastest,
    ``[N]``. For numbers without gaps see :func:`fastzoo.ops.voxel_grid`."""
    pos = pos.reshape(len(pos), -1)
    start = pos.amin(0) if start is None else start
    end = pos.amax(0) if end is None else end
    cells = ((pos - start) / size).long()
    extent = ((end - start) / size).long() + 1
    strides = torch.cat([extent.new_ones(1), extent.cumprod(0)[:-1]])
    return (cells * strides).sum(1)
