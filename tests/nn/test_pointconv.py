"""PointConv's modules against the published formulas, written with nn.Conv2d and nn.BatchNorm2d
over every edge."""

import copy
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastzoo import ops
from fastzoo.nn import PointConv, PointConvDensitySetAbstraction, PointDeConv
from fastzoo.testing.timing import peak_memory
from tests.nn.steps import assert_same_steps, kept
from tests.nn.test_set_abstraction import MLP, cloud, farthest, layers, module

Abstraction = PointConvDensitySetAbstraction


def repository_density(rows: Tensor, bandwidth: float) -> Tensor:
    squares = (rows[:, :, None] - rows[:, None]).square().sum(-1)
    return (torch.exp(-squares / (2 * bandwidth**2)) / (2.5 * bandwidth)).mean(-1)


def nearest(centres: Tensor, rows: Tensor, number: int) -> Tensor:
    squares = (centres[:, :, None] - rows[:, None]).square().sum(-1)
    return squares.topk(number, largest=False).indices


def at(rows: Tensor, idx: Tensor) -> Tensor:
    """``[B, S, K, C]``."""
    return rows[torch.arange(len(rows))[:, None, None], idx]


def edge_scale(net: Any, density: Tensor, idx: Tensor) -> Tensor:
    """``[B, S, K]`` by a copy of a DensityNet."""
    if net.mode == "compat":
        return at(layers(net, density[:, None]).transpose(1, 2), idx)[..., 0]
    inverse = at(1 / density[..., None], idx)[..., 0]
    x = (inverse / inverse.amax(-1, keepdim=True)).flatten(1)[:, None]
    for conv, norm in zip(net.mlp_convs[:-1], net.mlp_bns, strict=True):
        x = F.relu(norm(conv(x)))
    return torch.sigmoid(net.mlp_convs[-1](x)).view(idx.shape)


def convolved(theirs: Any, relative: Tensor, x: Tensor, scale: Tensor | None) -> Tensor:
    """``[B, S, O]`` of relative coordinates ``[B, S, K, D]`` and features ``[B, S, K, C]``."""
    weights = layers(theirs.weightnet, relative.permute(0, 3, 2, 1)).permute(0, 3, 2, 1)
    x = x if scale is None else x * scale[..., None]
    return theirs.linear(torch.matmul(x.transpose(2, 3), weights).flatten(2))


def published(theirs: Any, xyz: Tensor, points: Tensor | None) -> tuple[Tensor, Tensor]:
    rows = xyz.transpose(1, 2)
    density = repository_density(rows, theirs.bandwidth)
    if theirs.group_all:
        centres = rows.mean(1, keepdim=True)
        idx = torch.arange(rows.shape[1]).expand(len(rows), 1, -1)
    else:
        chosen = [farthest(one, theirs.npoint) for one in rows.detach().numpy()]
        centres = at(rows, torch.tensor(chosen)[..., None])[:, :, 0]
        idx = nearest(centres, rows, min(theirs.nsample, rows.shape[1]))
    relative = at(rows, idx) - centres[:, :, None]
    x = relative if points is None else torch.cat([relative, at(points.transpose(1, 2), idx)], -1)
    x = layers(theirs, x.permute(0, 3, 2, 1)).permute(0, 3, 2, 1)
    out = convolved(theirs, relative, x, edge_scale(theirs.densitynet, density, idx))
    return centres.transpose(1, 2), F.relu(theirs.bn_linear(out.transpose(1, 2)))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("group_all", [False, True])
@pytest.mark.parametrize("mode", ["compat", "paper"])
def test_steps_are_those_of_the_published_formulas(
    monkeypatch: pytest.MonkeyPatch, recompute: bool, group_all: bool, mode: str
) -> None:
    monkeypatch.setattr("fastzoo.nn._edge_mlp._PART", 2 * 8 * 9 * 3)
    options = {"mode": mode, "recompute": recompute}
    for featured in (False, True):
        xyz, points = cloud()
        channels = 8 if featured else 3
        mine = module(Abstraction, 11, 8, channels, MLP, 0.2, group_all, **options)
        if group_all:
            mine.npoint = 1
        assert_same_steps(mine, copy.deepcopy(mine), published, (xyz, points if featured else None))


@pytest.mark.parametrize("nsample", [40, 50])
def test_no_more_neighbours_than_points(nsample: int) -> None:
    xyz, points = cloud()
    mine = module(Abstraction, 6, nsample, 8, [5], 0.2, False)
    assert_same_steps(mine, copy.deepcopy(mine), published, (xyz, points))


def test_published_checkpoints_load() -> None:
    def layer(name: str, out: int, *inputs: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (out, *inputs), f"{name}.bias": (out,)}

    def norm(name: str, out: int) -> dict[str, tuple[int, ...]]:
        running = {f"{name}.running_mean": (out,), f"{name}.running_var": (out,)}
        return {**layer(name, out)} | running | {f"{name}.num_batches_tracked": ()}

    names: dict[str, tuple[int, ...]] = {**layer("linear", 128, 16 * 128), **norm("bn_linear", 128)}
    nets: list[tuple[str, list[int], tuple[int, ...]]] = [
        ("", [6, 64, 64, 128], (1, 1)),
        ("weightnet.", [3, 8, 8, 16], (1, 1)),
        ("densitynet.", [1, 8, 8, 1], (1,)),
    ]
    for prefix, widths, kernel in nets:
        for i, (inner, outer) in enumerate(itertools.pairwise(widths)):
            names |= layer(f"{prefix}mlp_convs.{i}", outer, inner, *kernel)
            names |= norm(f"{prefix}mlp_bns.{i}", outer)
    mine = Abstraction(512, 32, 6, [64, 64, 128], 0.1, False)
    assert {name: tuple(t.shape) for name, t in mine.state_dict().items()} == names


def plain_layer(
    theirs: Any,
    xyz: Tensor,
    features: Tensor,
    centres: Tensor | None = None,
    neighbours: Tensor | None = None,
    density: Tensor | None = None,
) -> Tensor:
    """Every list full."""
    centres = xyz if centres is None else centres
    if neighbours is None:
        neighbours = nearest(centres, xyz, min(theirs.nsample, xyz.shape[1]))
    scale = None
    if theirs.densitynet is not None:
        if density is None:
            density = repository_density(xyz, theirs.bandwidth)
        scale = edge_scale(theirs.densitynet, density, neighbours)
    return convolved(
        theirs, at(xyz, neighbours) - centres[:, :, None], at(features, neighbours), scale
    )


def rows_of(n: int = 40, channels: int = 5) -> tuple[Tensor, Tensor]:
    xyz, points = cloud(3, n, channels)
    return xyz.transpose(1, 2).contiguous(), points.transpose(1, 2).contiguous()


@pytest.mark.parametrize("options", [{}, {"mode": "compat"}, {"density_hidden": None}], ids=str)
@pytest.mark.parametrize("given", [False, True])
def test_layer(options: dict[str, Any], given: bool) -> None:
    mine = module(PointConv, 5, 7, 6, hidden=(8, 4), mid=11, bandwidth=0.2, **options)
    xyz, features = rows_of()
    inputs: list[Any] = [xyz, features]
    if given:
        generator = torch.Generator().manual_seed(5)
        inputs.append(torch.rand(2, 13, 3, generator=generator, dtype=torch.float64))
        inputs.append(torch.randint(0, 40, (2, 13, 4), generator=generator))
        if mine.densitynet is not None:
            inputs.append(torch.rand(2, 40, generator=generator, dtype=torch.float64) + 0.5)
    assert_same_steps(mine, copy.deepcopy(mine), plain_layer, inputs)


def test_a_list_with_gaps_is_the_list_without() -> None:
    """Where a neighbour is missing nothing is added and nothing counted, in training as well."""
    mine = module(PointConv, 5, 7, bandwidth=0.2)
    xyz, features = rows_of()
    lists = torch.randint(0, 40, (2, 13, 4))
    gaps = torch.full((2, 13, 7), -1)
    gaps[..., [1, 2, 4, 6]] = lists
    centres = xyz[:, :13].contiguous()
    theirs = copy.deepcopy(mine)
    right = theirs(xyz, features, centres, lists)
    torch.testing.assert_close(mine(xyz, features, centres, gaps), right)
    torch.testing.assert_close(mine.state_dict(), theirs.state_dict())


def test_the_lemma() -> None:
    """Weights of the convolution ``[C, O]`` for each edge, built and summed up one by one."""
    mine = module(PointConv, 5, 7, 6, bandwidth=0.2).eval()
    xyz, features = rows_of()
    near = nearest(xyz, xyz, 6)
    found = mine(xyz, features)
    scale = edge_scale(mine.densitynet, repository_density(xyz, 0.2), near)
    relative = at(xyz, near) - xyz[:, :, None]
    last = layers(mine.weightnet, relative.permute(0, 3, 2, 1)).permute(0, 3, 2, 1)
    kernel = mine.linear.weight.view(7, 5, 16)
    for s in (0, 17, 39):
        total = mine.linear.bias.clone()
        for k in range(6):
            weights = torch.einsum("ocm,m->co", kernel, last[1, s, k])
            total = total + scale[1, s, k] * features[1, near[1, s, k]] @ weights
        torch.testing.assert_close(found[1, s], total)


@pytest.mark.parametrize("training", [True, False])
def test_order_and_place_do_not_matter(training: bool) -> None:
    mine = module(PointConv, 5, 7, bandwidth=0.2).float().train(training)
    xyz, features = (t.float() for t in rows_of())
    right = mine(xyz, features)
    order = torch.randperm(40)
    found = mine(xyz[:, order], features[:, order])
    torch.testing.assert_close(found, right[:, order], rtol=1e-5, atol=1e-5)
    # A power of two above the coordinates, of which it leaves 2^-20: they are rounded first.
    near = (xyz * 2**16).round() / 2**16
    right = mine(near, features)
    torch.testing.assert_close(mine(near + 64, features), right, rtol=1e-5, atol=1e-5)


def test_an_image_is_a_cloud() -> None:
    """With hat functions of the nine offsets as its weights it is a convolution of an image."""
    mine = PointConv(3, 4, 9, 2, hidden=(12,), mid=9, density_hidden=None).eval()
    for norm in mine.weightnet.mlp_bns:
        assert isinstance(norm, nn.BatchNorm2d)
        assert norm.running_var is not None
        norm.running_var.fill_(1 - norm.eps)
    slopes, cuts = torch.zeros(12, 2), torch.zeros(12)
    corners = torch.zeros(9, 12)
    for axis in range(2):
        for i, offset in enumerate((-1, 0, 1)):
            for j, sign in enumerate((1, -1)):
                unit = 6 * axis + 2 * i + j
                slopes[unit, axis], cuts[unit] = sign, -sign * offset
                for row in range(9):
                    if (row // 3, row % 3)[axis] == i:
                        corners[row, unit] = -1
    kernel = torch.randn(4, 3, 3, 3)
    with torch.no_grad():
        for conv, (weight, bias) in zip(
            mine.weightnet.mlp_convs, [(slopes, cuts), (corners, torch.ones(9))], strict=True
        ):
            assert isinstance(conv, nn.Conv2d)
            assert conv.bias is not None
            conv.weight.copy_(weight[..., None, None])
            conv.bias.copy_(bias)
        mine.linear.weight.copy_(kernel.flatten(1))
        mine.linear.bias.zero_()
    image = torch.randn(2, 3, 8, 8)
    pixels = torch.cartesian_prod(torch.arange(8.0), torch.arange(8.0)).expand(2, -1, -1)
    found = mine(pixels.contiguous(), image.flatten(2).transpose(1, 2).contiguous())
    found = found.transpose(1, 2).unflatten(2, (8, 8))[..., 1:-1, 1:-1]
    torch.testing.assert_close(found, F.conv2d(image, kernel), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("corrected", [True, False])
def test_density_makes_a_sum_an_integral(corrected: bool) -> None:
    """Points with the density 2x: a Gaussian's sum over them is its convolution only where each
    counts by its inverse density."""
    generator = np.random.default_rng(0)
    h, n = 0.1, 4096
    plane = np.stack([np.sqrt(generator.random(n)), generator.random(n)], 1)
    xyz = torch.from_numpy(plane)[None].float()
    value = 1 + torch.sin(4 * xyz[..., :1]) * torch.cos(3 * xyz[..., 1:])
    inside = ((xyz > 0.35) & (xyz < 0.65)).all(-1)
    centres = xyz[inside][None]
    near = ops.knn_points(centres, xyz, K=n, radius=4 * h)
    weight = torch.exp(-near.dists / (2 * h * h)) / (2 * math.pi * h * h * n)
    if corrected:
        density = ops.kernel_density(xyz, 0.05)[..., None]
        weight = weight / ops.group_points(density, near.idx)[..., 0]
    found = ops.neighbour_reduce(value, near.idx, weight)[0, :, 0]
    x, y = centres[0].double().unbind(-1)
    right = 1 + torch.sin(4 * x) * torch.cos(3 * y) * math.exp(-(16 + 9) * h * h / 2)
    error = ((found - right).abs() / right.abs()).mean()
    assert error < 0.03 if corrected else error > 0.1, error


def deconvolved(theirs: Any, xyz1: Tensor, xyz2: Tensor, f1: Any, f2: Tensor) -> Tensor:
    squares = (xyz1[:, :, None] - xyz2[:, None]).square().sum(-1)
    near = squares.topk(3, largest=False)
    weight = 1 / (near.values + 1e-8)
    weight = weight / weight.sum(-1, keepdim=True)
    x = (at(f2, near.indices) * weight[..., None]).sum(2)
    return plain_layer(theirs.conv, xyz1, x if f1 is None else torch.cat([f1, x], -1))


@pytest.mark.parametrize("skip", [False, True])
def test_deconvolution(skip: bool) -> None:
    mine = module(PointDeConv, 4 + 5 * skip, 7, 6, bandwidth=0.2)
    fine, features = rows_of()
    coarse, coarse_features = rows_of(11, 4)
    inputs = fine, coarse + 0.01, features if skip else None, coarse_features
    assert_same_steps(mine, copy.deepcopy(mine), deconvolved, inputs, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("mode", ["paper", "compat"])
def test_no_edges_are_kept(mode: str) -> None:
    clouds, n, k, channels = 2, 512, 32, 64
    xyz, features = torch.rand(clouds, n, 3), torch.randn(clouds, n, channels, requires_grad=True)
    mine = module(PointConv, channels, channels, k, mode=mode).float()
    edge = clouds * n * k * 4  # bytes of one number for each edge
    # Of an edge two numbers are the list's; weights would be 8, 8 and 16 more, and densities 16.
    assert kept(lambda: mine(xyz, features)) < edge * 16


def test_what_an_abstraction_keeps_of_edges() -> None:
    n, number, k = 1024, 256, 32
    xyz, points = torch.rand(2, 3, n), torch.rand(2, 16, n, requires_grad=True)
    channel = 2 * number * k * 4
    mine = module(Abstraction, number, k, 19, [32, 48, 64], 0.1, False).float()
    parameters = 2 * 16 * 64 * 64 * 4
    assert channel * 144 < kept(lambda: mine(xyz, points)) < channel * 170 + parameters
    mine.recompute = True
    assert kept(lambda: mine(xyz, points)) < channel * 30 + parameters


def test_memory_of_a_step() -> None:
    clouds, n, k = 4, 1024, 32
    xyz, features = torch.rand(clouds, n, 3), torch.randn(clouds, n, 64, requires_grad=True)
    near, density = torch.randint(0, n, (clouds, n, k)), torch.rand(clouds, n) + 0.5
    mine = PointConv(64, 64, mode="compat")

    def train() -> None:
        mine(xyz, features, None, near, density).sum().backward()

    train()
    assert peak_memory(train, "cpu") < clouds * n * k * 64 * 4


def test_errors() -> None:
    with pytest.raises(ValueError, match="mode: expected one of"):
        PointConv(5, 7, mode="tensorflow")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="mid: expected at least 1"):
        PointConv(5, 7, mid=0)
    mine = module(PointConv, 5, 7)
    xyz, features = rows_of()
    with pytest.raises(ValueError, match=r"xyz: expected \[B, N, 3\]"):
        mine(xyz[..., :2], features)
    with pytest.raises(ValueError, match=r"features: expected \[2, 40, 5\]"):
        mine(xyz, features[..., :4])
