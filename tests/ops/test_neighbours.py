"""The searches against scipy, and against the stated arithmetic written in numpy."""

import numpy as np
import pytest
import torch
from scipy.spatial import cKDTree
from torch import Tensor

from fastzoo import ops, reference
from fastzoo.ops._operator import OPERATORS
from fastzoo.testing.neighbours import lattice, random_points
from fastzoo.testing.timing import peak_memory
from tests.conftest import DEVICE

BACKENDS = [b for b in ("cpu", "cuda") if OPERATORS["neighbour_search"].refusal(b, DEVICE) is None]
ALL_BACKENDS = ["reference", *BACKENDS]
# The emulator takes its time: its large clouds are smaller.
LARGE = {"reference": 900, "cpu": 3000, "cuda": 900 if DEVICE == "cpu" else 20_000}


def distances(p1: np.ndarray, p2: np.ndarray) -> np.ndarray:
    """Squared distances, each operation rounded to the dtype, the dimensions in order."""
    total = (p1[:, None, 0] - p2[None, :, 0]) ** 2
    for d in range(1, p1.shape[1]):
        total = total + (p1[:, None, d] - p2[None, :, d]) ** 2
    return total


def nearest(p1: np.ndarray, p2: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Ties by lower index."""
    found = distances(p1, p2)
    idx = np.argsort(found, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(found, idx, 1), idx


def clouds(n: int) -> dict[str, Tensor]:
    """Clouds of every kind, ``[N, 3]``."""
    uniform = random_points(1, n, seed=1)[0]
    along = torch.zeros(n, 3)
    along[:, 1] = uniform[:, 0]
    clusters = uniform.pow(6) + torch.arange(n)[:, None] % 5
    return {
        "uniform": uniform,
        "far": uniform + 100,
        "clusters": clusters,
        "line": along,
        "lattice": lattice(1, n, 3)[0],
        "equal": torch.ones(n, 3),
        "spread": (uniform - 0.5) * torch.tensor([1e18, 1.0, 1e-18]),
    }


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_like_scipy(backend: str) -> None:
    n = LARGE[backend]
    points = random_points(1, n, seed=2)[0].double()
    queries = random_points(1, n // 3, seed=3)[0].double()
    right, right_idx = cKDTree(points.numpy()).query(queries.numpy(), 20)
    found = ops.knn_points(queries.to(DEVICE), points.to(DEVICE), K=20, backend=backend)
    assert found.idx.tolist() == right_idx.tolist()
    np.testing.assert_allclose(found.dists.cpu().numpy(), right**2, rtol=1e-14)


@pytest.mark.parametrize("kind", clouds(10))
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_cloud_to_the_last_bit(backend: str, kind: str) -> None:
    points = clouds(LARGE[backend])[kind]
    right, right_idx = nearest(points[::3].numpy(), points.numpy(), 9)
    given = points.to(DEVICE)
    found = ops.knn_points(given[::3], given, K=9, backend=backend)
    assert torch.equal(found.idx.cpu(), torch.from_numpy(right_idx))
    assert torch.equal(found.dists.cpu(), torch.from_numpy(right))


@pytest.mark.parametrize("dim", [1, 2, 4, 8, 9, 70])
def test_every_dimension(dim: int) -> None:
    points = random_points(1, 1500, dim, seed=dim)[0]
    right, right_idx = nearest(points[:200].numpy(), points.numpy(), 12)
    found = ops.knn_points(points[:200], points, K=12)
    assert torch.equal(found.idx, torch.from_numpy(right_idx))
    assert torch.equal(found.dists, torch.from_numpy(right))


def test_every_instruction_set_finds_the_same(capability: str) -> None:
    for kind, points in clouds(1100).items():
        right = nearest(points[::5].numpy(), points.numpy(), 33)[1]
        found = ops.knn_points(points[::5], points, K=33, backend="cpu").idx
        assert torch.equal(found, torch.from_numpy(right)), f"{capability}, {kind}"
        ball = ops.ball_query(points[::5], points, K=20, radius=0.3, backend="cpu")
        right_ball = ops.ball_query(points[::5], points, K=20, radius=0.3, backend="reference")
        assert torch.equal(ball.idx, right_ball.idx), f"{capability}, {kind}"
        assert torch.equal(ball.dists, right_ball.dists), f"{capability}, {kind}"
    wide = random_points(1, 300, 37, seed=4)[0]
    right = nearest(wide.numpy(), wide.numpy(), 5)[1]
    assert torch.equal(ops.knn_points(wide, wide, K=5, backend="cpu").idx, torch.from_numpy(right))


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_balls_like_scipy(backend: str) -> None:
    points = random_points(1, LARGE[backend], seed=5)[0].double()
    queries = random_points(1, 150, seed=6)[0].double()
    for radius, k in ((0.08, 16), (0.4, 7)):
        inside = cKDTree(points.numpy()).query_ball_point(queries.numpy(), radius)
        found = ops.ball_query(
            queries.to(DEVICE), points.to(DEVICE), K=k, radius=radius, backend=backend
        )
        for row, every in zip(found.idx.tolist(), inside, strict=True):
            first = sorted(every)[:k]
            assert row == first + [-1] * (k - len(first))
        assert found.knn is not None
        apart = (found.knn.cpu() - queries[:, None]).square().sum(-1)
        padded = found.idx.cpu() < 0
        np.testing.assert_allclose(found.dists.cpu()[~padded], apart[~padded], rtol=1e-14)
        assert not found.dists.cpu()[padded].any()


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_the_nearest_in_a_ball_like_scipy(backend: str) -> None:
    points = random_points(1, LARGE[backend], seed=7)[0].double()
    queries = random_points(1, 150, seed=8)[0].double()
    found = ops.knn_points(
        queries.to(DEVICE), points.to(DEVICE), K=12, radius=0.09, backend=backend
    )
    _, idx = cKDTree(points.numpy()).query(queries.numpy(), 12, distance_upper_bound=0.09)
    assert found.idx.tolist() == np.where(idx == len(points), -1, idx).tolist()


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_padded_and_packed_clouds_agree(backend: str) -> None:
    sizes = [40, 0, 65, 7]
    padded = random_points(4, 65, seed=9).to(DEVICE)
    lengths = torch.tensor(sizes, device=DEVICE)
    packed = torch.cat([padded[b, :n] for b, n in enumerate(sizes)])
    ptr = torch.tensor([0, 40, 40, 105, 112], device=DEVICE)
    batch = torch.repeat_interleave(torch.arange(4, device=DEVICE), lengths)
    one = ops.knn_points(padded, padded, lengths, lengths, K=9, radius=5.0, backend=backend)
    for named in ({"ptr1": ptr, "ptr2": ptr}, {"batch1": batch, "batch2": batch}):
        other = ops.knn_points(packed, packed, K=9, backend=backend, **named)
        for b, n in enumerate(sizes):
            rows = slice(int(ptr[b]), int(ptr[b]) + n)
            local = torch.where(other.idx[rows] < 0, -1, other.idx[rows] - ptr[b])
            assert torch.equal(local, one.idx[b, :n])
            assert torch.equal(other.dists[rows], one.dists[b, :n])
            assert (one.idx[b, n:] == -1).all()


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_an_offset_changes_no_neighbour(backend: str) -> None:
    # On a grid of 2^-10 the sums with 100 are exact, so the answers must be the same.
    points = (random_points(1, 300, seed=10) * 1024).round().div(1024).to(DEVICE)
    plain = ops.knn_points(points, points, K=10, backend=backend)
    moved = ops.knn_points(points + 100, points + 100, K=10, backend=backend)
    assert torch.equal(moved.idx, plain.idx)
    assert torch.equal(moved.dists, plain.dists)


@pytest.mark.parametrize("norm", [1, 2])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_a_large_cloud(backend: str, norm: int) -> None:
    points = random_points(1, 500, seed=11)[0].double().to(DEVICE).requires_grad_()
    queries = random_points(1, 90, seed=12)[0].double().to(DEVICE).requires_grad_()
    found = ops.knn_points(queries, points, K=7, norm=norm, backend=backend)
    weights = torch.linspace(-1, 1, found.dists.numel(), device=DEVICE).view_as(found.dists)
    actual = torch.autograd.grad((found.dists * weights).sum(), (queries, points))
    apart = queries[:, None] - points[found.idx]
    plain = apart.abs().sum(-1) if norm == 1 else apart.square().sum(-1)
    expected = torch.autograd.grad((plain * weights).sum(), (queries, points))
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-14)


def test_no_matrix_of_distances_is_kept() -> None:
    points = random_points(1, 20_000, seed=13)[0]
    found = 20_000 * 8 * 12
    peak = peak_memory(lambda: ops.knn_points(points, points, K=8), "cpu")
    assert peak < found + (8 << 20)


def test_knn_gather_leaves_out_what_is_padding() -> None:
    x = random_points(2, 9, 4, seed=14)
    idx = torch.tensor([[[0, 3, 8]], [[1, 2, -1]]])
    rows = ops.knn_gather(x, idx)
    assert torch.equal(rows[0, 0], x[0, [0, 3, 8]])
    assert torch.equal(rows[1, 0], torch.stack([x[1, 1], x[1, 2], torch.zeros(4)]))
    short = ops.knn_gather(x, idx, torch.tensor([2, 9]))
    assert torch.equal(short[0, 0], torch.stack([x[0, 0], x[0, 3], torch.zeros(4)]))
    assert torch.equal(short[1], rows[1])
    assert torch.equal(reference.knn_gather(x, idx, torch.tensor([2, 9])), short)


def test_three_nearest_have_distances_not_squares() -> None:
    known, unknown = random_points(2, 30, seed=15), random_points(2, 11, seed=16)
    dist, idx = ops.three_nn(unknown, known)
    right, right_idx = cKDTree(known[1].numpy()).query(unknown[1].numpy(), 3)
    assert idx[1].tolist() == right_idx.tolist()
    np.testing.assert_allclose(dist[1].numpy(), right, rtol=1e-6)
    (grad,) = torch.autograd.grad(ops.three_nn(known.requires_grad_(), known)[0].sum(), known)
    assert grad.isfinite().all()  # of points that coincide as well
    with pytest.raises(ValueError, match="known"):
        ops.three_nn(unknown, known[:, :2])


@pytest.mark.parametrize("backend", BACKENDS)
def test_infinite_distances_come_before_nan(backend: str) -> None:
    points = random_points(1, 400, seed=17)[0]
    points[90:100], points[100:] = np.inf, np.nan
    queries = points[:20].to(DEVICE)
    order = nearest(points[:20].numpy(), points[:90].numpy(), 90)[1]
    for k in (89, 90, 95, 100, 130):
        found = ops.knn_points(queries, points.to(DEVICE), K=k, backend=backend).idx.cpu()
        assert torch.equal(found[:, :90], torch.from_numpy(order)[:, :k])
        assert torch.equal(found[:, 90:], torch.arange(90, max(k, 90)).expand(20, -1))
    found = ops.knn_points(points[100:120].to(DEVICE), points.to(DEVICE), K=9, backend=backend).idx
    assert torch.equal(found.cpu(), torch.arange(9).expand(20, -1))


@pytest.mark.parametrize("kind", clouds(10))
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_cloud_with_itself(backend: str, kind: str) -> None:
    points = clouds(LARGE[backend])[kind]
    given, array = points.to(DEVICE), points.numpy()
    some = slice(0, None, 7)
    for norm in (1, 2):
        found = ops.knn_points(given, given, K=11, norm=norm, backend=backend)
        apart = distances(array[some], array)
        if norm == 1:
            terms = np.abs(array[some, None] - array)
            apart = terms[..., 0] + terms[..., 1] + terms[..., 2]
        right = np.argsort(apart, axis=1, kind="stable")[:, :11]
        assert torch.equal(found.idx[some].cpu(), torch.from_numpy(right))
        right_dists = np.take_along_axis(apart, right, 1)
        assert torch.equal(found.dists[some].cpu(), torch.from_numpy(right_dists))


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_padding_is_pytorch3ds(backend: str) -> None:
    points = random_points(1, 4, seed=19).to(DEVICE) + 1
    found = ops.knn_points(points[:, :2], points[:, :2], K=3, return_nn=True, backend=backend)
    assert found.knn is not None
    assert found.idx[0, :, 2].tolist() == [0, 0]
    assert found.dists[0, :, 2].tolist() == [0, 0]
    assert not found.knn[0, :, 2].any()
