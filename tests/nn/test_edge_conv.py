"""EdgeConv against the network over every edge, with nn.Conv2d and nn.BatchNorm2d."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastzoo.nn import EdgeConv
from fastzoo.testing.timing import peak_memory
from tests.nn.steps import assert_same_steps, kept


def module(mlp: int | list[int], **options: Any) -> EdgeConv:
    """In float64, with scales of both signs in its normalisations: the least value of some
    channels becomes the greatest."""
    torch.manual_seed(0)
    found = EdgeConv(5, mlp, **{"k": 8, **options}).double()
    for norm in found.mlp_bns:
        nn.init.normal_(norm.weight)  # type: ignore[arg-type]
        nn.init.normal_(norm.bias)  # type: ignore[arg-type]
    return found


def features(n: int = 40, offset: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, n, 5, generator=generator, dtype=torch.float64) + offset


def over_every_edge(theirs: Any, x: Tensor, neighbours: Tensor | None = None) -> Tensor:
    """The edges that exist, one after the other, as a batch of one row."""
    if neighbours is None:
        k = min(theirs.k, x.shape[1])
        neighbours = torch.cdist(x, x).topk(k, largest=False).indices
    cloud, centre, place = (neighbours >= 0).nonzero(as_tuple=True)
    own = x[cloud, centre]
    z = torch.cat([own, x[cloud, neighbours[cloud, centre, place]] - own], 1).T[None, :, None]
    for conv, norm in zip(theirs.mlp_convs, theirs.mlp_bns, strict=True):
        z = F.leaky_relu(norm(conv(z)), theirs.negative_slope)
    rows = torch.full((*neighbours.shape, z.shape[1]), -torch.inf, dtype=x.dtype)
    rows = rows.index_put((cloud, centre, place), z[0, :, 0].T)
    none = (neighbours < 0).all(-1, keepdim=True)
    return torch.where(none, 0, rows.max(2).values)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("mlp", [9, [7, 6], [7, 4, 9]], ids=str)
@pytest.mark.parametrize("given", [False, True])
def test_steps_are_those_of_every_edge(
    monkeypatch: pytest.MonkeyPatch, recompute: bool, mlp: int | list[int], given: bool
) -> None:
    monkeypatch.setattr("fastzoo.nn._edge_mlp._PART", 2 * 8 * 9 * 7)
    mine = module(mlp, recompute=recompute)
    neighbours = None
    if given:
        generator = torch.Generator().manual_seed(2)
        neighbours = torch.randint(-4, 40, (2, 40, 6), generator=generator).clamp(min=-1)
        neighbours[0, 3] = -1
    inputs = [features()] + ([] if neighbours is None else [neighbours])
    assert_same_steps(mine, copy.deepcopy(mine), over_every_edge, inputs)


def test_a_point_without_neighbours_is_zero() -> None:
    mine = module(9)
    neighbours = torch.arange(40).repeat(2, 40, 1)
    neighbours[1, 7] = -1
    found = mine(features(), neighbours)
    assert (found[1, 7] == 0).all()
    assert (found[1, 8] != 0).all()


def test_the_definition() -> None:
    """One layer in evaluation, one edge at a time."""
    mine = module(4, k=3).eval()
    norm: Any = mine.mlp_bns[0]
    with torch.no_grad():
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    x = features(9)
    weight: Any = mine.mlp_convs[0].weight
    for i in range(9):
        values = []
        for j in (x[0] - x[0, i]).square().sum(1).argsort()[:3].tolist():
            z = weight[:, :, 0, 0] @ torch.cat([x[0, i], x[0, j] - x[0, i]])
            z = (z - norm.running_mean) / (norm.running_var + norm.eps).sqrt()
            z = z * norm.weight + norm.bias
            values.append(torch.where(z < 0, 0.2 * z, z))
        torch.testing.assert_close(mine(x)[0, i], torch.stack(values).amax(0))


def test_the_graph_is_that_of_the_features_and_fewer_points_are_all() -> None:
    mine = module([7, 6], k=20)
    x = features(12)
    every = torch.arange(12).expand(2, 12, 12)
    torch.testing.assert_close(mine(x), mine(x, every))
    near = module([7, 6])
    moved = x.clone()
    moved[:, :6] += 100  # two groups of six, which see each other with 8 neighbours
    found = near(moved)
    groups = torch.cdist(moved, moved).topk(8, largest=False).indices
    torch.testing.assert_close(found, near(moved, groups))


def test_far_from_the_origin() -> None:
    """Differences of neighbours keep their digits; what each point adds alone is rounded off."""
    x, y = features().float(), (features(offset=1000.0).float() - 1000)
    mine = module(9).float()
    with torch.no_grad():
        mine.mlp_convs[0].weight[:, :5] = 0  # of the centre alone
    found = mine(y + 1000)
    torch.testing.assert_close(found, mine(y), rtol=1e-4, atol=1e-4)
    assert x.shape == y.shape


def test_one_layer_keeps_and_makes_no_edges() -> None:
    n, k, channels = 2048, 96, 64
    x = torch.randn(1, n, channels, requires_grad=True)
    near = torch.randint(0, n, (1, n, k))
    mine = EdgeConv(channels, channels, k)

    def train() -> None:
        mine(x, near).sum().backward()

    train()
    # The lists are three times as large as the features.
    rows = n * channels * 4
    assert kept(lambda: mine(x, near)) < 15 * rows
    assert peak_memory(train, "cpu") < n * k * channels * 4 / 1.5


def test_more_layers_keep_one_tensor_of_edges_each_but_the_last() -> None:
    n, k = 512, 32
    x = torch.randn(1, n, 8, requires_grad=True)
    near = torch.randint(0, n, (1, n, k))
    channel = n * k * 4
    mine = EdgeConv(8, [32, 48, 64], k)
    assert channel * 80 < kept(lambda: mine(x, near)) < channel * (80 + 31)
    mine.recompute = True
    assert kept(lambda: mine(x, near)) < channel * 10


def test_errors() -> None:
    with pytest.raises(ValueError, match="k: expected at least 1"):
        EdgeConv(5, 4, 0)
    with pytest.raises(ValueError, match="mlp: expected at least one"):
        EdgeConv(5, [])
    with pytest.raises(ValueError, match="negative_slope"):
        EdgeConv(5, 4, negative_slope=-0.1)
    mine = module(4)
    with pytest.raises(ValueError, match=r"x: expected \[B, N, 5\]"):
        mine(torch.zeros(2, 9, 4))
    with pytest.raises(ValueError, match=r"neighbours: expected \[2, 40, K\]"):
        mine(features(), torch.zeros(2, 39, 4, dtype=torch.int64))
