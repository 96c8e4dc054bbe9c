"""SetAbstraction and FeaturePropagation against the published formulas, written with nn.Conv2d and
nn.BatchNorm2d over every edge."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.spatial import cKDTree
from torch import Tensor, nn

from fastzoo.nn import FeaturePropagation, SetAbstraction
from fastzoo.testing.timing import peak_memory
from tests.nn.steps import assert_same_steps, kept, step

MLP = [7, 4, 9]


def cloud(seed: int = 0, n: int = 40, channels: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    xyz = torch.rand(2, 3, n, generator=generator, dtype=torch.float64)
    return xyz, torch.randn(2, channels, n, generator=generator, dtype=torch.float64)


def module(kind: type[nn.Module], *args: Any, **options: Any) -> Any:
    """In float64, with scales of both signs in its normalisations."""
    torch.manual_seed(0)
    found = kind(*args, **options).double()
    for part in found.modules():
        if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.normal_(part.weight)
            nn.init.normal_(part.bias)
    return found


def farthest(xyz: np.ndarray, number: int) -> list[int]:
    chosen, least = [0], np.full(len(xyz), np.inf)
    while len(chosen) < number:
        least = np.minimum(least, ((xyz - xyz[chosen[-1]]) ** 2).sum(1))
        chosen.append(int(least.argmax()))
    return chosen


def in_ball(xyz: np.ndarray, centres: np.ndarray, radius: float, most: int) -> np.ndarray:
    rows = [sorted(own)[:most] for own in cKDTree(xyz).query_ball_point(centres, radius)]
    return np.array([own + own[:1] * (most - len(own)) for own in rows])


def layers(part: Any, x: Tensor) -> Tensor:
    for conv, norm in zip(part.mlp_convs, part.mlp_bns, strict=True):
        x = F.relu(norm(conv(x)))
    return x


def published(theirs: Any, xyz: Tensor, points: Tensor | None) -> tuple[Tensor, Tensor]:
    rows = xyz.transpose(1, 2)
    every = torch.arange(len(rows))[:, None]
    if theirs.group_all:
        centres, grouped = torch.zeros_like(rows[:, :1]), rows[:, None]
        listed = None if points is None else points.transpose(1, 2)[:, None]
    else:
        own = rows.detach().numpy()
        chosen = np.stack([farthest(one, theirs.npoint) for one in own])
        centres = rows[every, torch.from_numpy(chosen)]
        balls = [
            in_ball(one, one[at], theirs.radius, theirs.nsample)
            for one, at in zip(own, chosen, strict=True)
        ]
        idx = torch.from_numpy(np.stack(balls))
        grouped = rows[every[:, None], idx]
        listed = None if points is None else points.transpose(1, 2)[every[:, None], idx]
    x = grouped - centres[:, :, None]
    x = x if listed is None else torch.cat([x, listed], -1)
    return centres.transpose(1, 2), layers(theirs, x.permute(0, 3, 2, 1)).max(2).values


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("widths", [MLP, [6]], ids=str)
@pytest.mark.parametrize("group_all", [False, True])
@pytest.mark.parametrize("featured", [False, True])
def test_steps_are_those_of_plain_batch_normalisation(
    monkeypatch: pytest.MonkeyPatch,
    recompute: bool,
    widths: list[int],
    group_all: bool,
    featured: bool,
) -> None:
    monkeypatch.setattr("fastzoo.nn._edge_mlp._PART", 2 * 8 * 9 * 3)  # parts of few centres
    xyz, points = cloud()
    channels = 8 if featured else 3
    mine = module(SetAbstraction, 11, 0.35, 8, channels, widths, group_all, recompute=recompute)
    theirs = copy.deepcopy(mine)
    assert_same_steps(mine, theirs, published, (xyz, points if featured else None))


def test_a_neighbourhood_is_filled_with_its_first_point() -> None:
    """The copies count in the moments, as they do where edges are made."""
    xyz, points = cloud()
    mine = module(SetAbstraction, 11, 0.15, 8, 8, MLP, False)
    found = published(copy.deepcopy(mine), xyz, points)
    own = xyz[0].T.numpy()
    sizes = [len(b) for b in cKDTree(own).query_ball_point(own[farthest(own, 11)], 0.15)]
    assert min(sizes) < 8
    torch.testing.assert_close(mine(xyz, points), found)


@pytest.mark.parametrize("recompute", [False, True])
def test_far_from_the_origin(recompute: bool) -> None:
    xyz, points = (t.float() for t in cloud())
    moved = xyz + 100
    near = moved - 100  # the same points again: what the addition rounded off is off in both
    mine = module(SetAbstraction, 11, 0.35, 8, 8, MLP, False, recompute=recompute).float()
    theirs = copy.deepcopy(mine)
    found, right = mine(moved, points)[1], theirs(near, points)[1]
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4)


def test_order_does_not_matter() -> None:
    xyz, points = cloud()
    mine = module(SetAbstraction, 1, None, None, 8, MLP, True)
    order = torch.randperm(40)
    right = mine(xyz, points)[1]
    torch.testing.assert_close(mine(xyz[..., order], points[..., order])[1], right)


def test_start_is_drawn_when_asked_for() -> None:
    xyz, points = cloud()
    mine = module(SetAbstraction, 1, 0.35, 8, 8, MLP, False, random_start=True)
    firsts = {tuple(mine(xyz, points)[0].flatten().tolist()) for _ in range(20)}
    assert len(firsts) > 5
    fixed = module(SetAbstraction, 1, 0.35, 8, 8, MLP, False)
    assert torch.equal(fixed(xyz, points)[0], xyz[..., :1])


def test_what_is_kept_of_edges() -> None:
    n, number, k, widths = 1024, 256, 32, [32, 48, 128]
    xyz, points = torch.rand(2, 3, n), torch.rand(2, 16, n, requires_grad=True)
    channel = 2 * number * k * 4  # bytes of one number for each edge

    def abstraction(recompute: bool) -> SetAbstraction:
        return SetAbstraction(number, 0.3, k, 19, widths, False, recompute=recompute)

    every, none = abstraction(False), abstraction(True)
    # The first layers' activations; neighbour lists are two channels, and points are few.
    assert channel * (32 + 48) < kept(lambda: every(xyz, points)) < channel * (32 + 48 + 31)
    assert kept(lambda: none(xyz, points)) < channel * 20


def test_recomputing_saves_memory() -> None:
    n, number, k, widths = 2048, 1024, 32, [64, 64, 128]
    xyz, points = torch.rand(1, 3, n), torch.rand(1, 16, n, requires_grad=True)
    mine = SetAbstraction(number, 0.2, k, 19, widths, False, recompute=True)

    def train() -> None:
        mine(xyz, points)[1].sum().backward()

    train()
    # All edges have 32 MB in the three layers, and as much again in gradients.
    assert peak_memory(train, "cpu") < 48 << 20


def interpolated(theirs: Any, xyz1: Tensor, xyz2: Tensor, p1: Any, p2: Tensor) -> Tensor:
    squares = (xyz1[..., None] - xyz2[:, :, None]).square().sum(1)
    near = squares.topk(min(3, xyz2.shape[2]), largest=False)
    weight = 1 / (near.values + 1e-8)
    weight = weight / weight.sum(-1, keepdim=True)
    every = torch.arange(len(xyz1))[:, None, None]
    x = (p2.transpose(1, 2)[every, near.indices] * weight[..., None]).sum(2).transpose(1, 2)
    return layers(theirs, x if p1 is None else torch.cat([p1, x], 1))


@pytest.mark.parametrize("coarse", [1, 2, 3, 20])
@pytest.mark.parametrize("skip", [False, True])
def test_feature_propagation(coarse: int, skip: bool) -> None:
    xyz, points = cloud()
    xyz2, points2 = cloud(1, coarse, 4)
    mine = module(FeaturePropagation, 4 + 5 * skip, MLP)
    inputs = xyz, xyz2, points if skip else None, points2
    assert_same_steps(mine, copy.deepcopy(mine), interpolated, inputs)


def test_interpolation_of_constants_and_at_the_points() -> None:
    from fastzoo.nn.set_abstraction import interpolate

    fine = cloud()[0].transpose(1, 2).float()
    lattice = torch.cartesian_prod(*[torch.tensor([0.0, 0.5, 1.0])] * 3).expand(2, -1, -1)
    constant = torch.full((2, 27, 3), 0.7)
    torch.testing.assert_close(
        interpolate(fine, lattice, constant), torch.full((2, 40, 3), 0.7), rtol=2e-7, atol=0
    )
    features = torch.randn(2, 27, 3)
    found = interpolate(lattice, lattice, features)
    torch.testing.assert_close(found, features, rtol=0, atol=1e-6)


def test_a_running_average_over_all_steps() -> None:
    xyz, points = cloud()
    mine = module(SetAbstraction, 11, 0.35, 8, 8, MLP, False)
    for norm in mine.mlp_bns:
        norm.momentum = None
    theirs = copy.deepcopy(mine)
    assert_same_steps(mine, theirs, published, (xyz, points))


def test_moments_of_the_batch_without_running_ones() -> None:
    xyz, points = cloud()
    mine = module(SetAbstraction, 11, 0.35, 8, 8, MLP, False)
    mine.mlp_bns = nn.ModuleList(
        nn.BatchNorm2d(width, affine=False, track_running_stats=False).double() for width in MLP
    )
    assert_same_steps(mine, copy.deepcopy(mine), published, (xyz, points))


def test_a_forward_of_a_backward_does_not_count() -> None:
    from torch.utils.checkpoint import checkpoint

    xyz, points = cloud()
    mine = module(SetAbstraction, 11, 0.35, 8, 8, MLP, False)
    theirs = copy.deepcopy(mine)
    right = step(theirs, theirs, (xyz, points))
    found = step(mine, lambda *a: checkpoint(mine, *a, use_reentrant=False), (xyz, points))
    torch.testing.assert_close(found, right)


def test_errors() -> None:
    xyz, points = cloud()
    with pytest.raises(ValueError, match="radius: expected above 0, got None"):
        SetAbstraction(4, None, 8, 8, MLP, False)
    with pytest.raises(ValueError, match="npoint: expected at least 1"):
        SetAbstraction(None, 0.1, 8, 8, MLP, False)
    with pytest.raises(ValueError, match="mlp: expected at least one"):
        SetAbstraction(4, 0.1, 8, 8, [], False)
    mine = module(SetAbstraction, 4, 0.1, 8, 8, MLP, False)
    with pytest.raises(ValueError, match=r"expected 8 channels together .* got 3 and 0"):
        mine(xyz, None)
    with pytest.raises(ValueError, match=r"points: expected \[2, D, 40\]"):
        mine(xyz, points[..., :-1])
