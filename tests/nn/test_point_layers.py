"""What all layers over points share: compiled, in half precision, and what they refuse."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastzoo.nn import EdgeConv, PointConv, PointConvDensitySetAbstraction, SetAbstraction
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
