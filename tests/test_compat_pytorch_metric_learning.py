"""fastzoo.compat.pytorch_metric_learning against pytorch-metric-learning itself, in float64.

Two ways to the same numbers, scaled by 64: 1e-9 of the value is far above what rounding makes of
them and far below a wrong formula.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from fastzoo.compat import pytorch_metric_learning as compat

peer = pytest.importorskip("pytorch_metric_learning.losses")

CLASSES, DIM = 7, 5
CASES: dict[str, dict[str, Any]] = {
    "ArcFaceLoss": {"margin": 28.6, "scale": 64},
    "CosFaceLoss": {"margin": 0.35, "scale": 64},
    "SphereFaceLoss": {"margin": 4, "scale": 1},
    "LargeMarginSoftmaxLoss": {"margin": 4, "scale": 1},
    "SubCenterArcFaceLoss": {"margin": 28.6, "scale": 64, "sub_centers": 3},
    "NormalizedSoftmaxLoss": {"temperature": 0.05},
}
OTHERS: dict[str, dict[str, Any]] = {
    "ArcFaceLoss": {"margin": 80, "scale": 8},
    "CosFaceLoss": {"margin": 0.1, "scale": 3},
    "SphereFaceLoss": {"margin": 3, "scale": 2},
    "LargeMarginSoftmaxLoss": {"margin": 2, "scale": 0.5},
    "SubCenterArcFaceLoss": {"margin": 10, "scale": 8, "sub_centers": 2},
    "NormalizedSoftmaxLoss": {"temperature": 1.0},
}


def pair(name: str, options: dict[str, Any]) -> tuple[Any, Any]:
    """Their loss and ours, with their weights."""
    torch.manual_seed(0)
    sizes = {"num_classes": CLASSES, "embedding_size": DIM}
    theirs = getattr(peer, name)(**sizes, **options).double()
    ours = getattr(compat, name)(**sizes, **options).double()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def batch(w: Tensor) -> tuple[Tensor, Tensor]:
    """Embeddings at every angle from their class, but those of 0 and pi."""
    generator = torch.Generator().manual_seed(1)
    y = torch.arange(40) % CLASSES
    noise = torch.randn(40, DIM, generator=generator, dtype=torch.float64)
    own = w.detach().t().unflatten(0, (CLASSES, -1))[y, 0]
    x = torch.linspace(-2, 2, 40, dtype=torch.float64)[:, None] * own + 0.4 * noise
    return 2 * x, y


@pytest.mark.parametrize("cases", [CASES, OTHERS], ids=["defaults", "others"])
@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients_are_theirs(name: str, cases: dict[str, dict[str, Any]]) -> None:
    theirs, ours = pair(name, cases[name])
    x, y = batch(theirs.W)
    mine = x.clone().requires_grad_()
    x.requires_grad_()
    expected, loss = theirs(x, y), ours(mine, y)
    expected.backward()
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(mine.grad, x.grad, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(ours.weight.grad.t(), theirs.W.grad, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(ours.get_logits(x), theirs.get_logits(x), rtol=1e-9, atol=1e-11)


def test_the_margin_past_pi_is_reached() -> None:
    theirs, _ = pair("ArcFaceLoss", CASES["ArcFaceLoss"])
    x, y = batch(theirs.W)
    angle = torch.nn.functional.cosine_similarity(x, theirs.W.t()[y]).acos().rad2deg()
    assert bool((angle > 180 - 28.6).any())
    assert bool((angle < 28.6).any())


@pytest.mark.parametrize("name", CASES)
def test_defaults_are_theirs(name: str) -> None:
    sizes = {"num_classes": CLASSES, "embedding_size": DIM}
    theirs, ours = getattr(peer, name)(**sizes).double(), getattr(compat, name)(**sizes).double()
    ours.load_state_dict(theirs.state_dict())
    x, y = batch(theirs.W)
    torch.testing.assert_close(ours(x, y), theirs(x, y), rtol=1e-9, atol=0)
    # Weights of deviation 1: of 5000 numbers it is within 4 % of that.
    weight = getattr(compat, name)(num_classes=100, embedding_size=50).W.detach()
    assert 0.96 < float(weight.std()) < 1.04


@pytest.mark.parametrize("name", CASES)
def test_checkpoints_go_both_ways(name: str) -> None:
    theirs, ours = pair(name, CASES[name])
    assert torch.equal(ours.W, theirs.W)
    state = ours.state_dict(prefix="head.")
    assert list(state) == ["head.W"]
    torch.nn.init.zeros_(theirs.W)
    theirs.load_state_dict({"W": state["head.W"]})
    assert torch.equal(ours.W, theirs.W)


def test_initial_weights() -> None:
    ours = compat.SubCenterArcFaceLoss(
        num_classes=3,
        embedding_size=4,
        sub_centers=2,
        weight_init_func=lambda w: w.copy_(torch.arange(w.numel()).view(w.shape)),
    )
    assert torch.equal(ours.W, torch.arange(24.0).view(4, 6))


def test_finite_where_theirs_is_not() -> None:
    theirs, ours = pair("ArcFaceLoss", CASES["ArcFaceLoss"])
    w = theirs.W.detach().t()
    x = torch.cat([w, -w]).requires_grad_()
    mine = x.detach().clone().requires_grad_()
    y = torch.arange(2 * CLASSES) % CLASSES
    theirs(x, y).backward()
    ours(mine, y).backward()
    assert x.grad is not None
    assert mine.grad is not None
    assert not bool(x.grad.isfinite().all())
    assert bool(mine.grad.isfinite().all())


def test_what_is_beyond_fastzoo_is_refused() -> None:
    ours = compat.ArcFaceLoss(CLASSES, DIM)
    x, y = torch.randn(4, DIM), torch.arange(4)
    with pytest.raises(ValueError, match="indices_tuple"):
        ours(x, y, (y, y, y))
    with pytest.raises(ValueError, match="ref_emb"):
        ours(x, y, ref_emb=x)
    with pytest.raises(TypeError):
        compat.ArcFaceLoss(CLASSES, DIM, reducer=None)  # type: ignore[call-arg]


@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_nt_xent_of_two_views(temperature: float) -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(18, DIM, generator=generator, dtype=torch.float64)
    y = torch.arange(9).repeat(2)[torch.randperm(18, generator=generator)]
    mine = x.clone().requires_grad_()
    x.requires_grad_()
    expected = peer.NTXentLoss(temperature)(x, y)
    loss = compat.NTXentLoss(temperature)(mine, y)
    expected.backward()
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(mine.grad, x.grad, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("labels", [[0, 1, 2, 3], [0, 0, 0, 0], [0, 0, 1, 1, 2], [0, 0, 0, 1]])
def test_nt_xent_refuses_other_labels(labels: list[int]) -> None:
    with pytest.raises(ValueError, match="each label twice"):
        compat.NTXentLoss()(torch.randn(len(labels), DIM), torch.tensor(labels))
