"""Farthest points and voxels against loops in numpy."""

import numpy as np
import pytest
import torch
from torch import Tensor

from fastzoo import ops
from fastzoo.ops._operator import OPERATORS
from fastzoo.testing.neighbours import random_points
from tests.conftest import DEVICE
from tests.ops.test_neighbours import clouds

BACKENDS = [b for b in ("cpu", "cuda") if OPERATORS["farthest_points"].refusal(b, DEVICE) is None]
ALL_BACKENDS = ["reference", *BACKENDS]
LARGE = {"cpu": 6000, "cuda": 700 if DEVICE == "cpu" else 20_000}


def farthest(points: np.ndarray, k: int, start: int = 0) -> list[int]:
    """One point after the other; the arithmetic in the points' dtype, ties by lower index."""
    least = np.full(len(points), np.inf, points.dtype)
    chosen = [start]
    while True:
        apart = points - points[chosen[-1]]
        distance = apart[:, 0] * apart[:, 0]
        for d in range(1, points.shape[1]):
            distance = distance + apart[:, d] * apart[:, d]
        least = np.minimum(least, distance)
        least[chosen[-1]] = -1
        if len(chosen) == k:
            return chosen
        chosen.append(int(least.argmax()))


@pytest.mark.parametrize("kind", clouds(10))
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_cloud_like_a_loop(backend: str, kind: str) -> None:
    n = LARGE[backend]
    points = clouds(n)[kind]
    k = n // 10
    idx = ops.sample_farthest_points(points[None].to(DEVICE), K=k, backend=backend)[1]
    assert idx[0].tolist() == farthest(points.numpy(), k)


@pytest.mark.parametrize("dim", [1, 2, 4, 9, 33])
def test_every_dimension(dim: int) -> None:
    points = random_points(1, 700, dim, seed=dim)
    found = ops.sample_farthest_points(points, K=90)[1][0].tolist()
    assert found == farthest(points[0].numpy(), 90)


def test_every_instruction_set_takes_the_same(capability: str) -> None:
    for n, k in ((100, 100), (1100, 200), (5000, 600)):
        for kind, points in clouds(n).items():
            found = ops.sample_farthest_points(points[None], K=k, backend="cpu")[1][0]
            right = farthest(points.numpy(), k)
            assert found.tolist() == right, f"{capability}, {n} {kind}"


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_no_point_is_taken_twice(backend: str) -> None:
    points = random_points(1, 6, seed=1)[:, torch.arange(60) % 6].to(DEVICE)
    idx = ops.sample_farthest_points(points, K=60, backend=backend)[1][0].tolist()
    assert sorted(idx) == list(range(60))
    assert sorted(idx[:6]) == list(range(6))  # each place once before any duplicate
    assert idx[6:] == list(range(6, 60))  # then the lowest that is left


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_a_start_and_a_number_for_each_cloud(backend: str) -> None:
    points = random_points(3, 40, seed=2)
    start, counts = torch.tensor([5, 0, 39]), [4, 0, 9]
    selected, idx = ops.sample_farthest_points(
        points.to(DEVICE), K=counts, start=start.to(DEVICE), backend=backend
    )
    assert idx.shape == (3, 9)
    for b, k in enumerate(counts):
        right = farthest(points[b].numpy(), k, int(start[b])) if k else []
        assert idx[b].tolist() == right + [-1] * (9 - k)
        assert torch.equal(selected[b, :k].cpu(), points[b, right])
        assert not selected[b, k:].any()


def test_a_random_start_is_torchs() -> None:
    points = random_points(8, 50, seed=3)
    torch.manual_seed(4)
    first = ops.sample_farthest_points(points, K=5, random_start_point=True)[1]
    torch.manual_seed(4)
    assert torch.equal(ops.sample_farthest_points(points, K=5, random_start_point=True)[1], first)
    assert len(set(first[:, 0].tolist())) > 2
    lengths = torch.full((8,), 3)
    for _ in range(5):
        idx = ops.sample_farthest_points(points, lengths, 3, random_start_point=True)[1]
        assert sorted(idx[0].tolist()) == [0, 1, 2]


def test_selected_points_pass_gradients() -> None:
    points = random_points(2, 20, seed=5).double().requires_grad_()
    selected, idx = ops.sample_farthest_points(points, K=6)
    weights = torch.arange(36.0, dtype=torch.float64).view(2, 6, 3)
    (grad,) = torch.autograd.grad((selected * weights).sum(), points)
    expected = torch.zeros(2, 20, 3, dtype=torch.float64)
    for b in range(2):
        expected[b, idx[b]] = weights[b]
    assert torch.equal(grad, expected)


def cells(points: Tensor, size: float) -> list[int]:
    """A dictionary of cells, numbered as they come."""
    seen: dict[tuple[float, ...], int] = {}
    keys = np.floor(points.numpy() / np.float32(size))
    return [seen.setdefault(tuple(key), len(seen)) for key in keys.tolist()]


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_voxels_like_a_dictionary(backend: str) -> None:
    for seed, (n, dim, size) in enumerate(((2000, 3, 0.07), (900, 2, 0.5), (300, 5, 0.9))):
        points = (random_points(1, n, dim, seed=seed)[0] - 0.5) * 3
        found = ops.voxel_grid(points.to(DEVICE), size, backend=backend)
        assert found.tolist() == cells(points, size)


def test_voxels_of_every_instruction_set(capability: str) -> None:
    points = (random_points(1, 5000, seed=6)[0] - 0.5) * 1e6
    assert ops.voxel_grid(points, 0.7, backend="cpu").tolist() == cells(points, 0.7), capability


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_a_grid_keeps_the_mean_of_each_cell(backend: str) -> None:
    points = random_points(1, 400, seed=7)[0]
    features = random_points(1, 400, 5, seed=8)[0].requires_grad_()
    batch = torch.arange(400) // 150
    sample = ops.grid_subsample(
        points.to(DEVICE), 0.3, features.to(DEVICE), batch=batch.to(DEVICE), backend=backend
    )
    keys = [(int(b), *c) for b, c in zip(batch, (points / 0.3).floor().tolist(), strict=True)]
    members: dict[tuple[float, ...], list[int]] = {}
    for row, key in enumerate(keys):
        members.setdefault(key, []).append(row)
    assert sample.counts.tolist() == [len(rows) for rows in members.values()]
    for voxel, rows in enumerate(members.values()):
        assert (sample.voxels[rows] == voxel).all()
        torch.testing.assert_close(sample.points[voxel].cpu(), points[rows].mean(0))
        assert sample.features is not None
        torch.testing.assert_close(sample.features[voxel].cpu(), features[rows].mean(0))
    assert sample.features is not None
    (grad,) = torch.autograd.grad(sample.features.sum(), features)
    share = 1 / sample.counts.cpu()[sample.voxels.cpu()]
    torch.testing.assert_close(grad, share[:, None].expand(400, 5))
