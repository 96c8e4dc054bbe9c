"""fastzoo.compat.insightface against the head as its paper and its users know it, written out here
with the logits in memory. Several ranks: tests/distributed/test_sharded_margin_softmax.py."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastzoo.compat.insightface import CombinedMarginLoss, PartialFC_V2
from tests.insightface_head import MARGINS, insightface_logits, insightface_loss

CLASSES, DIM = 9, 5


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings at every angle from their class, past ``pi - m2`` too; some of no class."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(CLASSES, DIM, generator=generator, dtype=torch.float64)
    y = torch.arange(30) % CLASSES
    noise = torch.randn(30, DIM, generator=generator, dtype=torch.float64)
    x = torch.linspace(-2, 2, 30, dtype=torch.float64)[:, None] * w[y] + 0.4 * noise
    return x, w, y


def head(margin: tuple[float, ...], w: Tensor, **options: float) -> PartialFC_V2:
    result = PartialFC_V2(CombinedMarginLoss(*margin), DIM, CLASSES, **options).double()  # type: ignore[arg-type]
    result.load_state_dict({"weight": w})
    return result


@pytest.mark.parametrize("margin", MARGINS)
def test_losses_and_gradients_are_theirs(margin: tuple[float, ...]) -> None:
    x, w, y = batch()
    ours = head(margin, w)
    mine = x.clone().requires_grad_()
    loss = ours(mine, y[:, None])
    loss.backward()
    x.requires_grad_()
    w.requires_grad_()
    expected = insightface_loss(x, w, y, *margin)
    expected.backward()
    # Two ways to the same numbers, in float64.
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(mine.grad, x.grad, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(ours.weight.grad, w.grad, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("margin", MARGINS)
def test_a_margin_by_itself(margin: tuple[float, ...]) -> None:
    x, w, y = batch()
    cosine = F.normalize(x) @ F.normalize(w).t()
    y[::5] = -1
    mine = cosine.clone().requires_grad_()
    theirs = cosine.clone().requires_grad_()
    logits, expected = CombinedMarginLoss(*margin)(mine, y), insightface_logits(theirs, y, *margin)
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-11)
    generator = torch.Generator().manual_seed(1)
    direction = torch.randn(cosine.shape, generator=generator, dtype=torch.float64)
    (logits * direction).sum().backward()
    (expected * direction).sum().backward()
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-9, atol=1e-11)


def test_the_margin_past_pi_is_reached() -> None:
    x, w, y = batch()
    angle = F.cosine_similarity(x, w[y]).acos()
    assert bool((angle + 0.5 > torch.pi).any())


def test_margins_that_theirs_has_not() -> None:
    with pytest.raises(ValueError, match="m1, m2: expected 1 and 0 with m3"):
        CombinedMarginLoss(64, 1, 0.5, 0.1)
    x, w, y = batch()
    assert bool(head((64, 1.2, 0.1, 0), w)(x, y).isfinite())
    with pytest.raises(TypeError, match="margin_loss"):
        PartialFC_V2(torch.nn.Identity(), DIM, CLASSES)  # type: ignore[arg-type]


def test_initial_weights_and_state_are_theirs() -> None:
    ours = PartialFC_V2(CombinedMarginLoss(64, 1, 0.5, 0), 64, 1000)
    assert {name: tuple(t.shape) for name, t in ours.state_dict().items()} == {"weight": (1000, 64)}
    # Of 64 000 numbers the deviation is within 1 % of its expectation.
    assert 0.0099 < ours.weight.detach().std().item() < 0.0101


def test_sampling_keeps_the_positives() -> None:
    x, w, y = batch()
    y = y % 2
    ours = head((8, 1, 0.5, 0), w, sample_rate=0.5)
    ours(x, y).backward()
    assert ours.weight.grad is not None
    sampled = (ours.weight.grad != 0).any(1)
    assert int(sampled.sum()) == 5
    assert bool(sampled[:2].all())
    expected = insightface_loss(x, w[sampled], y, 8, 1, 0.5, 0)
    ours.step = 0
    torch.testing.assert_close(ours(x, y), expected, rtol=1e-9, atol=0)


def test_products_in_low_precision() -> None:
    x, w, y = batch()
    full, half = (
        head((8, 1, 0.5, 0), w, fp16=fp16).float()(x.float(), y).item() for fp16 in (False, True)
    )
    assert full != half
    # A score of 8 times a cosine of rounded operands.
    assert abs(full - half) < 8 * 2**-8


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("wrapped", [False, True])
def test_checkpoints_of_any_number_of_ranks(ranks: int, wrapped: bool, tmp_path: Path) -> None:
    _, w, _ = batch()
    files = []
    for rank, rows in enumerate(w.split(PartialFC_V2.shares(CLASSES, ranks))):
        state = {"weight": rows.clone()}
        files.append(tmp_path / f"checkpoint_gpu_{rank}.pt")
        torch.save({"epoch": 3, "state_dict_softmax_fc": state} if wrapped else state, files[-1])
    ours = head((64, 1, 0.5, 0), torch.zeros_like(w))
    ours.load_ranks(files)
    assert torch.equal(ours.weight, w)
    with pytest.raises(ValueError, match="expected 9 classes"):
        ours.load_ranks(files[:-1])
