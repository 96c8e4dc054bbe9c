"""k-means: Lloyd's algorithm made of the exact lookup and the sums over its codes."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastzoo.ops._checks import check_choice, check_count, check_floating, check_same, check_tensor
from fastzoo.ops.vq import vq_nearest, vq_statistics

INITS = ("k-means++", "random")


class KMeansOutput(NamedTuple):
    """What :func:`kmeans` returns."""

    centroids: Tensor
    indices: Tensor
    inertia: float
    iterations: int


@torch.no_grad()
def kmeans(
    x: Tensor,
    k: int,
    *,
    init: str | Tensor = "k-means++",
    iters: int = 100,
    tol: float = 1e-4,
    generator: torch.Generator | None = None,
    backend: str | None = None,
) -> KMeansOutput:
    """Clusters the rows of ``x`` by squared distance, without an N x K matrix in memory.

    An iteration finds the nearest centroid of every row (:func:`fastzoo.ops.vq_nearest`: exact,
    ties to the lower index) and moves each centroid to the mean of its rows, summed in float64. It
    ends after ``iters`` iterations, when no row has changed its centroid, or when the centroids'
    squared movements add up to at most ``tol`` times the mean variance of the columns of ``x``, as
    scikit-learn's does. The centroids of empty clusters move to the rows that are farthest from
    their own, the farthest to the lowest; where all distances are 0 they stay.

    ``k-means++`` chooses rows as first centroids, each the best of ``2 + log k`` candidates drawn
    with probability proportional to the squared distance from those chosen before; ``random``
    chooses distinct rows with equal probability.

    Args:
        x: ``[N, D]``, finite; float32, float64, float16 or bfloat16. Half precision is read exactly
            and clustered in float32.
        k: the number of clusters, from 1 to N.
        init: ``k-means++``, ``random``, or the first centroids ``[k, D]``, of the dtype and device
            of ``x``.
        iters: the most iterations, at least 1.
        tol: relative tolerance of the movement, at least 0.
        generator: of the random choices; None takes torch's own.
        backend: of the lookup and the sums: ``auto``, ``reference``, ``cpu``, ``cuda`` or
            ``triton``; None follows :func:`fastzoo.use_backend`.

    Returns:
        ``KMeansOutput(centroids, indices, inertia, iterations)``: ``centroids [k, D]`` in float32
        (float64 for float64 inputs); ``indices [N]``, int64, the nearest of them for each row;
        ``inertia``, the sum of the squared distances to them; how many iterations ran.

    No gradient. Deterministic for given first centroids; those of ``k-means++`` depend on the
    generator and, where two candidates are equally good to rounding, on torch's matrix product.
    Autocast changes nothing. Memory beyond ``x`` and the result: what the lookup needs, the order
    of the rows, and for ``k-means++`` a copy of ``x`` and ``[2 + log k, N]`` distances.

    Raises:
        TypeError, ValueError: an argument of the wrong kind; the message names it.
        RuntimeError: a forced backend that cannot run, with the reason.

    Source: Lloyd, Least squares quantization in PCM (1982); Arthur and Vassilvitskii, k-means++:
    the advantages of careful seeding (2007).
    """
    check_tensor("x", x, "[N, D]", 2)
    check_floating("x", x)
    n, dim = x.shape
    if n == 0 or dim == 0:
        raise ValueError(f"x: expected at least one row and one dimension, got {list(x.shape)}")
    if not 1 <= check_count("k", k) <= n:
        raise ValueError(f"k: expected 1 to {n}, the number of rows of x, got {k}")
    if check_count("iters", iters) < 1:
        raise ValueError(f"iters: expected at least 1, got {iters}")
    if not tol >= 0:
        raise ValueError(f"tol: expected at least 0, got {tol}")
    if isinstance(init, Tensor):
        check_tensor("init", init, "[k, D]", 2)
        check_same("x", x, "init", init)
        if init.shape != (k, dim):
            raise ValueError(f"init: expected shape {[k, dim]}, got {list(init.shape)}")
        _check_finite("init", init)
    else:
        check_choice("init", init, INITS)
    _check_finite("x", x)
    with torch.autocast(x.device.type, enabled=False):
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        x = x.to(dtype).contiguous()
        if isinstance(init, Tensor):
            centroids = init.to(dtype)
        elif init == "random":
            order = torch.randperm(n, generator=generator, device=_device(generator))
            centroids = x[order[:k].to(x.device)]
        else:
            centroids = x[_plus_plus(x, k, generator)]
        return _lloyd(x, centroids, iters, tol, backend)


def _check_finite(name: str, value: Tensor) -> None:
    # The least and the greatest; a NaN is both.
    if not torch.stack(value.aminmax()).isfinite().all():
        raise ValueError(f"{name}: expected finite values")


def _device(generator: torch.Generator | None) -> torch.device:
    return torch.device("cpu") if generator is None else generator.device


def _lloyd(
    x: Tensor, centroids: Tensor, iters: int, tol: float, backend: str | None
) -> KMeansOutput:
    # The mean over the columns of their variances.
    limit = tol * _distances(x, x.mean(0, keepdim=True)).mean() / x.shape[1]
    previous = None
    for iteration in range(1, iters + 1):
        indices, d = vq_nearest(x, centroids, return_distance=True, backend=backend)
        if previous is not None and torch.equal(indices, previous):
            break
        means = _means(x, centroids, indices, d, backend)
        movement = (means - centroids).square().sum()
        centroids, previous = means, indices
        if iteration == iters or movement <= limit:
            indices, d = vq_nearest(x, centroids, return_distance=True, backend=backend)
            break
    return KMeansOutput(centroids, indices, float(d.sum(dtype=torch.float64)), iteration)


def _means(x: Tensor, centroids: Tensor, indices: Tensor, d: Tensor, backend: str | None) -> Tensor:
    counts, sums = (t.double() for t in vq_statistics(x, indices, len(centroids), backend=backend))
    if not counts.all():
        _fill_empty(x, indices, d, counts, sums)
    means = (sums / counts[:, None]).to(x.dtype)
    return torch.where(counts[:, None] > 0, means, centroids)


def _fill_empty(x: Tensor, indices: Tensor, d: Tensor, counts: Tensor, sums: Tensor) -> None:
    """Moves the rows farthest from their centroids to the empty clusters, in place."""
    empty = (counts == 0).nonzero()[:, 0]
    distances, order = d.sort(descending=True, stable=True)
    # A row that lies on its centroid would found a cluster that the lookup never chooses.
    far = order[: len(empty)][distances[: len(empty)] > 0]
    empty, rows, left = empty[: len(far)], x[far].double(), indices[far]
    # index_put adds in a fixed order on every device; index_add does not on CUDA.
    sums.index_put_((left,), -rows, accumulate=True)
    counts.index_put_((left,), counts.new_tensor(-1.0), accumulate=True)
    sums[empty], counts[empty] = rows, 1.0


def _plus_plus(x: Tensor, k: int, generator: torch.Generator | None) -> Tensor:
    """The rows that greedy k-means++ chooses. Nothing is read back from the device."""
    n = len(x)
    trials = 2 + int(math.log(k))
    draws = torch.rand(
        k, trials, generator=generator, device=_device(generator), dtype=torch.float64
    ).to(x.device)
    # Products of centred rows tell well enough which candidate leaves the least; the distances that
    # draws depend on are sums of squared differences.
    centred = x - x.mean(0)
    squares = torch.linalg.vector_norm(centred, dim=1).square()
    rows = [(draws[0, :1] * n).long().clamp(max=n - 1)]
    closest = torch.full_like(squares, torch.inf)
    for draw in draws[1:]:
        closest = torch.minimum(closest, _distances(x, x[rows[-1]]))
        mass = closest.cumsum(0, dtype=torch.float64)
        candidates = torch.searchsorted(mass, draw * mass[-1], right=True).clamp_(max=n - 1)
        distances = torch.addmm(squares, centred[candidates], centred.T, alpha=-2)
        distances += squares[candidates, None]
        potentials = torch.minimum(distances.clamp_(min=0), closest).sum(1)
        rows.append(candidates[potentials.argmin(keepdim=True)])
    return torch.cat(rows)


def _distances(x: Tensor, point: Tensor) -> Tensor:
    """The squared distances ``[N]`` to one point ``[1, D]``, without cancellation."""
    return torch.cdist(x, point, compute_mode="donot_use_mm_for_euclid_dist")[:, 0].square()
