"""pytorch3d's point-cloud functions (0.7, ``pytorch3d.ops``) on fastzoo's operators.

Names, arguments, defaults, returns and padding are theirs. Equal distances go to the lower index
and the nearest comes first whatever ``return_sorted`` is; float64 is computed in float64, and half
precision in float32. :func:`sample_farthest_points` takes no point twice, where theirs takes
duplicates of a point that was taken before it takes what is left.
"""

from collections.abc import Sequence

from torch import Tensor

from fastzoo import ops
from fastzoo.ops import KNN

__all__ = ["KNN", "ball_query", "knn_gather", "knn_points", "sample_farthest_points"]


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
) -> KNN:
    """``pytorch3d.ops.knn_points``: see :func:`fastzoo.ops.knn_points`.

    ``dists`` and ``idx`` are 0 where a cloud of ``p2`` has fewer than K points, and so is ``knn``.
    """
    found = ops.knn_points(p1, p2, lengths1, lengths2, norm, K)
    if not return_nn:
        return found
    if lengths2 is None:
        lengths2 = found.idx.new_full((len(p2),), p2.shape[1])
    return found._replace(knn=ops.knn_gather(p2, found.idx, lengths2))


def knn_gather(x: Tensor, idx: Tensor, lengths: Tensor | None = None) -> Tensor:
    """``pytorch3d.ops.knn_gather``: see :func:`fastzoo.ops.knn_gather`."""
    return ops.knn_gather(x, idx, lengths)


def ball_query(
    p1: Tensor,
    p2: Tensor,
    lengths1: Tensor | None = None,
    lengths2: Tensor | None = None,
    K: int = 500,
    radius: float = 0.2,
    return_nn: bool = True,
    skip_points_outside_cube: bool = False,
) -> KNN:
    """``pytorch3d.ops.ball_query``: see :func:`fastzoo.ops.ball_query`."""
    return ops.ball_query(
        p1, p2, lengths1, lengths2, K, radius, return_nn, skip_points_outside_cube
    )


def sample_farthest_points(
    points: Tensor,
    lengths: Tensor | None = None,
    K: int | Sequence[int] | Tensor = 50,
    random_start_point: bool = False,
) -> tuple[Tensor, Tensor]:
    """``pytorch3d.ops.sample_farthest_points``: see :func:`fastzoo.ops.sample_farthest_points`."""
    return ops.sample_farthest_points(points, lengths, K, random_start_point)
