"""torch_cluster's functions: where it is installed it says what is right; otherwise small cases of
its documentation do, and searches over all pairs."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastzoo.compat import torch_cluster as mine

SQUARE = torch.tensor([[-1.0, -1], [-1, 1], [1, -1], [1, 1]])
NAMES = ("knn", "knn_graph", "radius", "radius_graph", "fps", "nearest", "grid_cluster")
BATCH_X = torch.tensor([0] * 30 + [1] * 1 + [3] * 29)
BATCH_Y = torch.tensor([0] * 5 + [1] * 4 + [2] * 2 + [3] * 9)


def points(n: int, dim: int = 3, seed: int = 0) -> Tensor:
    return torch.rand(n, dim, generator=torch.Generator().manual_seed(seed))


X, Y = points(60), points(20, seed=1)


def peer() -> Any:
    return pytest.importorskip("torch_cluster")


def ordered(edges: Tensor) -> list[list[int]]:
    return sorted(edges.T.tolist())


def by_hand(x: Tensor, y: Tensor, bx: Tensor, by: Tensor, near: Callable[[Tensor], Any]) -> Tensor:
    """``near`` picks among the squared distances of one cloud's rows."""
    edges = []
    for i in range(len(y)):
        own = (bx == by[i]).nonzero()[:, 0]
        squares = (x[own] - y[i]).square().sum(1)
        edges += [[i, int(own[j])] for j in near(squares)]
    return torch.tensor(edges).T.reshape(2, -1)


def nearest_first(k: int) -> Callable[[Tensor], Any]:
    return lambda squares: squares.sort(stable=True).indices[:k].tolist()


def inside(r: float, most: int) -> Callable[[Tensor], Any]:
    return lambda squares: (squares < r * r).nonzero()[:, 0][:most].tolist()


@pytest.mark.parametrize("name", NAMES)
def test_signatures(name: str) -> None:
    theirs = inspect.signature(getattr(peer(), name)).parameters
    ours = dict(inspect.signature(getattr(mine, name)).parameters)
    if name == "radius":
        ours.pop("ignore_same_index")  # of later versions
    assert list(ours) == list(theirs)
    for key, value in ours.items():
        assert value.default == theirs[key].default


@pytest.mark.parametrize("k", [1, 5, 40])
def test_knn(k: int) -> None:
    found = mine.knn(X, Y, k, BATCH_X, BATCH_Y)
    assert torch.equal(found, by_hand(X, Y, BATCH_X, BATCH_Y, nearest_first(k)))
    assert torch.equal(found, peer().knn(X, Y, k, BATCH_X, BATCH_Y))
    assert torch.equal(mine.knn(X, Y, k), peer().knn(X, Y, k))


def test_documented_examples() -> None:
    zeros, y = torch.zeros(4, dtype=torch.int64), torch.tensor([[-1.0, 0], [1, 0]])
    two = torch.tensor([[0, 0, 1, 1], [0, 1, 2, 3]])
    assert torch.equal(mine.knn(SQUARE, y, 2, zeros, zeros[:2]), two)
    assert torch.equal(mine.radius(SQUARE, y, 1.5, zeros, zeros[:2]), two)
    graph = torch.tensor([[1, 2, 0, 3, 0, 3, 1, 2], [0, 0, 1, 1, 2, 2, 3, 3]])
    assert torch.equal(mine.knn_graph(SQUARE, 2, zeros), graph)
    assert torch.equal(mine.radius_graph(SQUARE, 2.5, zeros), graph)
    assert torch.equal(mine.radius_graph(SQUARE, 2.5, flow="target_to_source"), graph.flip(0))
    assert mine.fps(SQUARE, zeros, 0.5, random_start=False).tolist() == [0, 3]
    assert mine.nearest(SQUARE, y, zeros, zeros[:2]).tolist() == [0, 0, 1, 1]
    pixels = torch.tensor([[0.0, 0], [11, 9], [2, 8], [2, 2], [8, 3]])
    assert mine.grid_cluster(pixels, torch.tensor([5.0, 5.0])).tolist() == [0, 5, 3, 0, 1]


@pytest.mark.parametrize("dtype", [torch.int64, torch.float16, torch.float64])
def test_other_dtypes_and_one_coordinate(dtype: torch.dtype) -> None:
    x, y = (X[:, 0] * 1000).to(dtype), (Y[:, 0] * 1000).to(dtype)
    right = by_hand(
        x.double()[:, None],
        y.double()[:, None],
        torch.zeros(60),
        torch.zeros(20),
        nearest_first(3),
    )
    assert torch.equal(mine.knn(x, y, 3), right)


def test_cosine() -> None:
    similarity = (Y / Y.norm(dim=1, keepdim=True)) @ (X / X.norm(dim=1, keepdim=True)).T
    found = mine.knn(X, Y, 4, cosine=True)[1].view(20, 4)
    best = similarity.topk(4).values
    torch.testing.assert_close(similarity.gather(1, found), best, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("loop", [False, True])
@pytest.mark.parametrize("flow", ["source_to_target", "target_to_source"])
def test_graphs(loop: bool, flow: str) -> None:
    options = {"batch": BATCH_X, "loop": loop, "flow": flow}
    for k in (2, 40):
        found = mine.knn_graph(X, k, **options)
        assert torch.equal(found, peer().knn_graph(X, k, **options))
    found = mine.radius_graph(X, 0.3, max_num_neighbors=60, **options)
    assert ordered(found) == ordered(peer().radius_graph(X, 0.3, max_num_neighbors=60, **options))
    centres = found[1 if flow == "source_to_target" else 0]
    assert torch.equal(centres, centres.sort().values)


@pytest.mark.parametrize("most", [3, 60])
def test_radius(most: int) -> None:
    found = mine.radius(X, Y, 0.4, BATCH_X, BATCH_Y, most)
    assert torch.equal(found, by_hand(X, Y, BATCH_X, BATCH_Y, inside(0.4, most)))
    theirs = peer().radius(X, Y, 0.4, BATCH_X, BATCH_Y, most)
    if most == 60:
        assert ordered(found) == ordered(theirs)
    assert found[0].bincount().tolist() == theirs[0].bincount().tolist()
    itself = mine.radius(X, X, 0.4, max_num_neighbors=most, ignore_same_index=True)
    assert torch.equal(itself.flip(0), mine.radius_graph(X, 0.4, max_num_neighbors=most))


def test_a_graph_has_as_many_edges_as_asked_for() -> None:
    """Of duplicates, and of points with too many neighbours before them."""
    same = torch.zeros(6, 3)
    assert mine.knn_graph(same, 2)[1].bincount().tolist() == [2] * 6
    found = mine.radius_graph(same, 1.0, max_num_neighbors=2)
    assert found[1].bincount().tolist() == [2] * 6
    assert (found[0] != found[1]).all()
    assert peer().radius_graph(same, 1.0, max_num_neighbors=2).shape[1] > 12


@pytest.mark.parametrize("ratio", [None, 0.1, 0.33, 1.0, torch.tensor([0.2, 1.0, 0.5, 0.4])])
def test_fps(ratio: Any) -> None:
    batch = BATCH_X.clone()
    batch[30:33] = torch.tensor([1, 2, 2])
    found = mine.fps(X, batch, ratio, random_start=False)
    assert torch.equal(found, peer().fps(X, batch, ratio, random_start=False))
    ptr = [0, 30, 31, 33, 60]
    assert torch.equal(mine.fps(X, ratio=ratio, random_start=False, ptr=ptr), found)
    assert torch.equal(mine.fps(X, ratio=ratio, random_start=False, ptr=torch.tensor(ptr)), found)
    assert torch.equal(mine.fps(X, batch, ratio, random_start=False, batch_size=4), found)


def test_fps_of_one_cloud_starts_at_random() -> None:
    firsts = {int(mine.fps(X, ratio=0.2)[0]) for _ in range(30)}
    assert len(firsts) > 5
    assert len(mine.fps(X)) == 30
    images = points(10, 12).view(10, 3, 4)
    assert torch.equal(
        mine.fps(images, random_start=False), mine.fps(images.flatten(1), random_start=False)
    )
    assert len(set(mine.fps(torch.zeros(6, 3), ratio=1.0).tolist())) == 6


def test_nearest() -> None:
    by = BATCH_Y[BATCH_Y != 2]
    y = Y[: len(by)]
    found = mine.nearest(X, y, BATCH_X, by)
    assert torch.equal(found, by_hand(y, X, by, BATCH_X, nearest_first(1))[1])
    assert torch.equal(found, peer().nearest(X, y, BATCH_X, by))
    assert torch.equal(mine.nearest(X, Y), peer().nearest(X, Y))
    with pytest.raises(ValueError, match="do not occur in 'batch_y'"):
        mine.nearest(X, y, BATCH_X, by.clamp(max=1))
    with pytest.raises(ValueError, match="'batch_x' is not sorted"):
        mine.nearest(X, y, BATCH_X.flip(0), by)


@pytest.mark.parametrize("given", [False, True])
def test_grid_cluster(given: bool) -> None:
    size = torch.tensor([0.3, 0.2, 0.45])
    bounds = {"start": torch.zeros(3), "end": torch.full((3,), 2.0)} if given else {}
    found = mine.grid_cluster(X, size, **bounds)
    assert torch.equal(found, peer().grid_cluster(X, size, **bounds))
    assert len(found.unique()) > 10


def test_nothing() -> None:
    none = torch.empty(0, 3)
    for found in (mine.knn(none, Y, 2), mine.knn(X, none, 2), mine.radius(none, Y, 1.0)):
        assert found.shape == (2, 0)
        assert found.dtype == torch.int64
    assert mine.fps(none, torch.empty(0, dtype=torch.int64)).tolist() == []


def test_errors() -> None:
    with pytest.raises(ValueError, match="batch_x, batch_y: expected both"):
        mine.knn(X, Y, 2, BATCH_X)
    with pytest.raises(ValueError, match="flow: expected one of"):
        mine.knn_graph(X, 2, flow="down")
