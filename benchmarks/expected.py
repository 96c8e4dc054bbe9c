"""The answer that a row must give, and how near another answer comes to it."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastzoo import ops, reference
from fastzoo.reference.margin_softmax import margin_softmax_target, per_row
from fastzoo.testing import SPECS
from fastzoo.testing.losses import leaves, loss_and_gradients

_ROWS = 1024
_CLASSES = 8192


def vq_nearest(x: Tensor, codebook: Tensor) -> Tensor:
    """The definition's answer, found with a float64 matrix product.

    The product's score ``x c - |c|^2 / 2`` and half of the definition's, less ``|x|^2 / 2``, are
    sums of at most ``D + 4`` terms, whose magnitudes add up to no more than ``(|x| + |c|)^2``: they
    differ by at most the bound below. Where only one code is within twice the bound of the best,
    it is the answer; the other rows go through the definition.
    """
    rows, codes = x.cpu().double(), codebook.cpu().double()
    half_square = codes.square().sum(1) / 2
    norm = half_square.max().mul(2).sqrt()
    chosen, alone = [], []
    for part in rows.split(_ROWS):
        scores = torch.addmm(-half_square, part, codes.t())
        best, index = scores.max(1)
        largest = (part.square().sum(1).sqrt() + norm).square()
        bound = 2 * (codes.shape[1] + 4) * 2.0**-53 * largest
        chosen.append(index)
        alone.append((scores >= (best - 2 * bound)[:, None]).sum(1) == 1)
    indices, decided = torch.cat(chosen), torch.cat(alone)
    if not decided.all():
        close: Any = reference.vq_nearest(rows[~decided], codes)
        indices[~decided] = close
    return indices


def _double_leaf(t: Tensor) -> Tensor:
    return t.detach().double().requires_grad_()


def margin_softmax_loss(
    x: Tensor, w: Tensor, y: Tensor, *, margin: ops.Margin, grad: str = "exact"
) -> tuple[Tensor, ...]:
    """The loss and the gradients of ``x`` and ``w``, in float64 a chunk of classes at a time.

    Of a margin that normalises both, whose state and other classes' scores it leaves alone. With
    the log-sum-exp known, a chunk's share of the gradient is that of its probabilities, held
    constant, times its scores.
    """
    s, n = margin.default_scale, len(x)
    own_w, wide_x = _double_leaf(w[y]), _double_leaf(x)
    unit = F.normalize(wide_x)

    def scores(start: int, part: Tensor) -> Tensor:
        place = (y - start)[:, None]
        mine = torch.arange(len(part), device=y.device) == place
        return (s * unit @ F.normalize(part).t()).masked_fill(mine, -torch.inf)

    lse = torch.full_like(unit[:, 0], -torch.inf)
    with torch.no_grad():
        for start, part in _chunks(w):
            lse = lse.logaddexp(scores(start, part.double()).logsumexp(1))
    cosine = (unit * F.normalize(own_w)).sum(1)
    rule, *numbers = margin.terms(x.detach().double().norm(dim=1), cosine.new_zeros(0))
    m1, m2, m3 = (per_row(m, cosine) for m in numbers)
    value = margin_softmax_target(cosine, m1, m2, m3, rule)
    if grad == "insightface":
        value = cosine + (value - cosine).detach()
    rows = (lse - s * value).exp().log1p()
    own = (lse - s * value.detach()).sigmoid() / n  # what a row's gradient of lse is
    grad_x, grad_own = torch.autograd.grad(rows.mean(), (wide_x, own_w), retain_graph=True)
    grad_w = torch.empty(w.shape, device=w.device)
    for start, part in _chunks(w):
        wide_w = _double_leaf(part)
        z = scores(start, wide_w)
        p = (z.detach() - lse[:, None]).exp() * own[:, None]
        total = (p * z.masked_fill(z == -torch.inf, 0)).sum()
        by_x, by_w = torch.autograd.grad(total, (wide_x, wide_w), retain_graph=True)
        grad_x = grad_x + by_x
        mine = (y >= start) & (y < start + len(part))
        by_w.index_add_(0, y[mine] - start, grad_own[mine])
        grad_w[start : start + len(part)] = by_w
    return rows.mean().detach(), grad_x, grad_w


def _chunks(w: Tensor) -> Iterator[tuple[int, Tensor]]:
    for start in range(0, len(w), _CLASSES):
        yield start, w.detach()[start : start + _CLASSES]


def clip_loss(image: Tensor, text: Tensor, logit_scale: Tensor) -> tuple[Tensor, ...]:
    """The loss and its gradients, in float64 a part of the rows at a time."""
    image, text, scale = (_double_leaf(t) for t in (image, text, logit_scale))
    n = len(image)
    row, column = [], torch.full_like(text[:, 0], -torch.inf).detach()
    with torch.no_grad():
        for part in image.split(_ROWS):
            z = scale * part @ text.t()
            row.append(z.logsumexp(1))
            column = column.logaddexp(z.logsumexp(0))
    own = scale * (image * text).sum(1)
    loss = ((torch.cat(row) + column) / 2 - own).mean().detach()
    wanted = (image, text, scale)
    total = torch.autograd.grad(-own.mean(), wanted)
    for start in range(0, n, _ROWS):
        z = scale * image[start : start + _ROWS] @ text.t()
        by_row = (z - row[start // _ROWS][:, None]).exp()
        p = (by_row + (z - column).exp()).detach() / (2 * n)
        share = torch.autograd.grad((p * z).sum(), wanted)
        total = tuple(a + b for a, b in zip(total, share, strict=True))
    return loss, *total


# Where the definition itself would take minutes, or many times the memory.
_FAST: dict[str, Callable[..., Tensor]] = {"vq_nearest": vq_nearest}
_FAST_LOSSES: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "margin_softmax_loss": margin_softmax_loss,
    "clip_loss": clip_loss,
}


def expected(op: str, *args: Any, **kwargs: Any) -> Tensor:
    """The definition's answer, on the CPU."""
    moved = [a.cpu() if isinstance(a, Tensor) else a for a in args]
    definition: Callable[..., Tensor] = _FAST.get(op, SPECS[op].definition)
    answer: Tensor = definition(*moved, **kwargs)
    return answer


def expected_loss(op: str, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    """The loss that the definition has in float64, and its gradients, on the arguments' device."""
    if op in _FAST_LOSSES:
        return _FAST_LOSSES[op](*args, **kwargs)
    definition = functools.partial(SPECS[op].definition, *args, **kwargs)
    return loss_and_gradients(definition, leaves(args))()


def compare(op: str, answer: Any, right: Tensor) -> tuple[bool, float]:
    """Whether an answer is right bit for bit, and the share of it that is right.

    The share of kept boxes is taken of sets: peers may order equal scores in another way.
    """
    indices = torch.as_tensor(answer).cpu().reshape(-1)
    if torch.equal(indices, right):
        return True, 1.0
    if op == "nms":
        theirs, ours = set(indices.tolist()), set(right.tolist())
        return False, len(theirs & ours) / max(1, len(theirs | ours))
    if len(indices) != len(right):
        return False, 0.0
    return False, (indices == right).double().mean().item()
