"""What all layers over points share: compiled, in half precision, and what they refuse."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastzoo.nn import EdgeConv, PointConv, PointConvDensitySetAbstraction, SetAbstraction
from fastzoo.nn._batch_norm import moments, together
from fastzoo.nn._edge_mlp import moments_of_sums
from tests.nn.steps import outputs

XYZ = torch.rand(2, 50, 3, generator=torch.Generator().manual_seed(0))
FEATURES = torch.randn(2, 50, 5, generator=torch.Generator().manual_seed(1))
ROWS = XYZ, FEATURES
CHANNELS = XYZ.transpose(1, 2), FEATURES.transpose(1, 2)

MODULES: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any], tuple[Tensor, ...]]] = {
    "set-abstraction": (SetAbstraction, (10, 0.4, 8, 8, [6, 7], False), {}, CHANNELS),
    "recomputed": (
        SetAbstraction,
        (10, 0.4, 8, 8, [6, 7], False),
        {"recompute": True},
        CHANNELS,
    ),
    "compat": (PointConvDensitySetAbstraction, (10, 8, 8, [6, 7], 0.1, False), {}, CHANNELS),
    "edge-conv": (EdgeConv, (5, 7, 8), {}, (FEATURES,)),
    "edge-conv-deep": (EdgeConv, (5, [7, 6], 8), {}, (FEATURES,)),
    "pointconv": (PointConv, (5, 7, 8), {}, ROWS),
}


def made(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    kind, args, options, inputs = MODULES[name]
    return kind(*args, **options), inputs


@pytest.mark.parametrize("name", ["recomputed", "compat"])
def test_one_graph(name: str) -> None:
    mine, inputs = made(name)
    compiled = copy.deepcopy(mine)
    torch._dynamo.reset()
    found = outputs(torch.compile(compiled, fullgraph=True, backend="aot_eager")(*inputs))
    torch.testing.assert_close(found, outputs(mine(*inputs)))
    found[-1].sum().backward()
    torch.testing.assert_close(list(compiled.buffers()), list(mine.buffers()))


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision(name: str, autocast: bool) -> None:
    """Moments, densities and coordinates are not of half precision: what is off is a few rounded
    products, relative to outputs of deviation 1."""
    mine, inputs = made(name)
    narrow = copy.deepcopy(mine)
    rounded = [t.bfloat16() for t in inputs]
    if autocast:
        with torch.autocast("cpu", torch.bfloat16):
            found = outputs(narrow(*[t.float() for t in rounded]))[-1]
    else:
        found = outputs(narrow.bfloat16()(*rounded))[-1]
        assert found.dtype == torch.bfloat16
    found.sum().backward()
    right = outputs(mine(*[t.float() for t in rounded]))[-1]
    assert (found - right).abs().mean() < 4 * torch.finfo(torch.bfloat16).eps * right.abs().mean()


@pytest.mark.parametrize("name", MODULES)
def test_synchronised_normalisation_is_refused(name: str) -> None:
    mine, inputs = made(name)
    mine = nn.SyncBatchNorm.convert_sync_batchnorm(mine)
    with pytest.raises(TypeError, match="SyncBatchNorm"):
        mine(*inputs)


@pytest.mark.parametrize("name", ["set-abstraction", "compat", "edge-conv-deep", "pointconv"])
def test_the_same_bits_again(name: str) -> None:
    mine, inputs = made(name)
    steps = []
    for module in (mine, copy.deepcopy(mine)):
        outputs(module(*inputs))[-1].sum().backward()
        steps.append([p.grad for p in module.parameters()])
    for first, second in zip(*steps, strict=True):
        assert first is not None
        assert torch.equal(first, second)


def lists() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    points, centres = (
        torch.randn(2, n, 3, generator=generator, dtype=torch.float64, requires_grad=True)
        for n in (5, 4)
    )
    return points, centres, torch.randint(-1, 5, (2, 4, 3), generator=generator)


def test_moments_of_sums_and_their_gradients() -> None:
    points, centres, neighbours = lists()
    cloud, centre, place = (neighbours >= 0).nonzero(as_tuple=True)
    edges = points[cloud, neighbours[cloud, centre, place]] + centres[cloud, centre]
    found = moments_of_sums(points, centres, neighbours)
    torch.testing.assert_close(found.mean, edges.mean(0))
    torch.testing.assert_close(found.spread, edges.var(0, correction=0))
    assert found.number == len(edges)

    def both(points: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
        return moments_of_sums(points, centres, neighbours)[:2]

    torch.autograd.gradcheck(both, (points, centres))
    torch.autograd.gradgradcheck(both, (points, centres))


@pytest.mark.parametrize("some", [False, True])
def test_moments_and_their_gradients(monkeypatch: pytest.MonkeyPatch, some: bool) -> None:
    monkeypatch.setattr("fastzoo.nn._batch_norm._ROWS", 7)
    rows = torch.randn(3, 6, 4, dtype=torch.float64, requires_grad=True)
    valid = torch.arange(18).view(3, 6) % 4 > 0 if some else None
    own = rows.flatten(0, 1) if valid is None else rows[valid]
    found = moments(rows, valid)
    torch.testing.assert_close(found.mean, own.mean(0))
    torch.testing.assert_close(found.spread, own.T.cov(correction=0))
    torch.autograd.gradcheck(lambda r: moments(r, valid)[:2], rows)
    torch.autograd.gradgradcheck(lambda r: moments(r, valid)[:2], rows)
    marks = (None,) * 3 if valid is None else valid
    parts = [moments(part, mark) for part, mark in zip(rows, marks, strict=True)]
    torch.testing.assert_close(together(parts), found)


def test_small_neighbourhoods_far_apart() -> None:
    """Sums that are 1e4 times smaller than their terms have the variance of the sums."""
    generator = torch.Generator().manual_seed(0)
    at = torch.randn(1, 512, 2, generator=generator, dtype=torch.float64)
    points = (at + 1e-4 * torch.randn(1, 512, 2, generator=generator)).float()
    centres, own = -at.float(), torch.arange(512).view(1, 512, 1)
    edges = points[0].double() + centres[0].double()
    found = moments_of_sums(points, centres, own)
    torch.testing.assert_close(found.mean.double(), edges.mean(0), rtol=1e-3, atol=1e-9)
    torch.testing.assert_close(found.spread.double(), edges.var(0, correction=0), rtol=1e-5, atol=0)
