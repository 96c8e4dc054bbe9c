"""pytorch3d's functions against what it documents: its padding, over all pairs of float64."""

import inspect

import numpy as np
import pytest
import torch
from torch import Tensor

from fastzoo.compat import pytorch3d as mine

LENGTHS1, LENGTHS2 = torch.tensor([9, 12, 0]), torch.tensor([20, 3, 7])


def clouds(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.rand(3, n, 3, generator=generator, dtype=dtype) for n in (12, 20))
    return first, second


SIGNATURES = {
    "knn_points": "(p1, p2, lengths1=None, lengths2=None, norm=2, K=1, version=-1, "
    "return_nn=False, return_sorted=True)",
    "knn_gather": "(x, idx, lengths=None)",
    "ball_query": "(p1, p2, lengths1=None, lengths2=None, K=500, radius=0.2, return_nn=True, "
    "skip_points_outside_cube=False)",
    "sample_farthest_points": "(points, lengths=None, K=50, random_start_point=False)",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name: str) -> None:
    signature = inspect.signature(getattr(mine, name))
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    assert str(inspect.Signature(bare)) == SIGNATURES[name]


@pytest.mark.parametrize("norm", [1, 2])
@pytest.mark.parametrize("k", [1, 5])
def test_knn_points(norm: int, k: int) -> None:
    p1, p2 = clouds()
    found = mine.knn_points(p1, p2, LENGTHS1, LENGTHS2, norm, k, return_nn=True)
    assert found.knn is not None
    for b in range(3):
        for i in range(12):
            n = int(LENGTHS2[b]) if i < LENGTHS1[b] else 0
            apart = (p2[b, :n] - p1[b, i]).abs()
            far = (apart if norm == 1 else apart.square()).sum(1)
            order = far.argsort()[:k]
            m = len(order)
            assert found.idx[b, i, :m].tolist() == order.tolist()
            torch.testing.assert_close(found.dists[b, i, :m], far[order])
            assert found.idx[b, i, m:].tolist() == [0] * (k - m)
            assert found.dists[b, i, m:].tolist() == [0] * (k - m)
            if i < LENGTHS1[b]:
                assert torch.equal(found.knn[b, i, :m], p2[b, order])
                assert not found.knn[b, i, m:].any()
    unsorted = mine.knn_points(p1, p2, LENGTHS1, LENGTHS2, norm, k, return_sorted=False)
    assert torch.equal(unsorted.idx, found.idx)
    assert unsorted.knn is None
    assert torch.equal(mine.knn_gather(p2, found.idx, LENGTHS2), found.knn)


def test_more_neighbours_than_points() -> None:
    p1, p2 = clouds()
    found = mine.knn_points(p1, p2[:, :3], K=5, return_nn=True)
    assert found.knn is not None
    assert not found.idx[..., 3:].any()
    assert not found.dists[..., 3:].any()
    assert not found.knn[..., 3:, :].any()
    assert found.knn[..., :3, :].all()


def test_gradients() -> None:
    p1, p2 = (p.requires_grad_() for p in clouds())
    found = mine.knn_points(p1, p2, K=4, return_nn=True)
    assert found.knn is not None
    squares = (p1[:, :, None] - found.knn).square().sum(-1)
    weight = torch.linspace(-1, 1, squares.numel()).view_as(squares)
    right = torch.autograd.grad((squares * weight).sum(), (p1, p2), retain_graph=True)
    got = torch.autograd.grad((found.dists * weight).sum(), (p1, p2))
    torch.testing.assert_close(got, right)


@pytest.mark.parametrize("k", [3, 30])
def test_ball_query(k: int) -> None:
    p1, p2 = clouds()
    found = mine.ball_query(p1, p2, LENGTHS1, LENGTHS2, k, 0.5)
    assert found.knn is not None
    for b in range(3):
        for i in range(12):
            n = int(LENGTHS2[b]) if i < LENGTHS1[b] else 0
            far = (p2[b, :n] - p1[b, i]).square().sum(1)
            inside = (far < 0.25).nonzero()[:k, 0]
            m = len(inside)
            assert found.idx[b, i].tolist() == inside.tolist() + [-1] * (k - m)
            torch.testing.assert_close(found.dists[b, i, :m], far[inside])
            assert torch.equal(found.knn[b, i, :m], p2[b, inside])
            assert not found.dists[b, i, m:].any()
            assert not found.knn[b, i, m:].any()
    assert mine.ball_query(p1, p2).idx.shape == (3, 12, 500)
    skipping = mine.ball_query(p1, p2, K=k, radius=0.5, skip_points_outside_cube=True)
    assert torch.equal(skipping.idx, mine.ball_query(p1, p2, K=k, radius=0.5).idx)


def test_sample_farthest_points() -> None:
    _, points = clouds()
    selected, idx = mine.sample_farthest_points(points, LENGTHS2, [4, 5, 2])
    assert (selected.shape, idx.shape) == ((3, 5, 3), (3, 5))
    for b, count in enumerate([4, 3, 2]):
        own = points[b, : LENGTHS2[b]].numpy()
        chosen, least = [0], np.full(len(own), np.inf)
        while len(chosen) < count:
            least = np.minimum(least, ((own - own[chosen[-1]]) ** 2).sum(1))
            chosen.append(int(least.argmax()))
        assert idx[b].tolist() == chosen + [-1] * (5 - count)
        assert torch.equal(selected[b, :count], points[b, chosen])
        assert not selected[b, count:].any()
    same = mine.sample_farthest_points(points, LENGTHS2, torch.tensor([4, 5, 2]))
    assert torch.equal(same[1], idx)
    firsts = {
        int(mine.sample_farthest_points(points, K=1, random_start_point=True)[1][0, 0])
        for _ in range(30)
    }
    assert len(firsts) > 5
