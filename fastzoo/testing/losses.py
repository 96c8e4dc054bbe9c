"""A loss with its gradients as one call, and how near to the right ones it must come."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_ROWS = 1 << 14


def loss_and_gradients(
    loss: Callable[[], Tensor | tuple[Tensor, ...]],
    inputs: tuple[Tensor, ...],
    autocast: torch.dtype | None = None,
    seeds: tuple[Tensor | None, ...] = (None,),
) -> Callable[[], tuple[Tensor, ...]]:
    """A call that goes forward and backward; as in training, autocast ends with the forward.

    Args:
        loss: returns the scalar, or several results.
        inputs: what the gradients are taken of.
        autocast: the dtype to run the forward in; None without autocast.
        seeds: what the backward starts from, of each result that has a gradient; None of a scalar.
    """
    device = inputs[0].device.type

    def call() -> tuple[Tensor, ...]:
        with torch.autocast(device, autocast, enabled=autocast is not None):
            value = loss()
        results = value if isinstance(value, tuple) else (value,)
        varying = [result for result in results if result.requires_grad]
        gradients = torch.autograd.grad(varying, inputs, seeds)
        return *(result.detach() for result in results), *gradients

    return call


def with_gradients(args: tuple[Any, ...], positions: tuple[int, ...]) -> tuple[Any, ...]:
    """The arguments, those at ``positions`` as leaves that want a gradient."""
    return tuple(a.detach().requires_grad_() if i in positions else a for i, a in enumerate(args))


def leaves(args: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """The arguments that want a gradient."""
    return tuple(a for a in args if isinstance(a, Tensor) and a.requires_grad)


def deviation(actual: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> float:
    """The largest relative error among a loss and its gradients; infinite where one is not finite.

    A scalar's error is relative to it, or absolute where it is above 1. A matrix's is relative L2,
    once of the whole, where the longest rows count, and once of each row, the root mean square,
    where all count alike: of a gradient over many classes, the rows of labels and all the others.
    """
    if len(actual) != len(right):
        return math.inf
    return max(_relative(a, e) for a, e in zip(actual, right, strict=True))


def _relative(a: Tensor, e: Tensor) -> float:
    if a.shape != e.shape:
        return math.inf
    if e.numel() == 1:
        off_by = abs(a.item() - e.item()) / min(1.0, max(abs(e.item()), 1e-30))
        return off_by if math.isfinite(off_by) else math.inf
    if e.dim() == 1:
        a, e = a[None], e[None]
    zero = torch.zeros((), dtype=torch.float64, device=e.device)
    error, square, by_row = zero, zero, zero
    for part, right in zip(a.detach().split(_ROWS), e.split(_ROWS), strict=True):
        right = right.double().flatten(1)
        off = (part.double().flatten(1) - right).square().sum(1)
        size = right.square().sum(1)
        error, square = error + off.sum(), square + size.sum()
        # A row that ought to be zero has no relative error but none or an infinite one.
        by_row = by_row + torch.where(off == 0, 0, off / size).sum()
    whole = float((error / square).sqrt()) if square > 0 else math.inf if error > 0 else 0.0
    worst = max(whole, float((by_row / max(1, len(e))).sqrt()))
    return worst if math.isfinite(worst) else math.inf


def bound(*, scale: float, dim: int, terms: int, bfloat16: bool = False) -> float:
    """The relative error that rounding explains, of a loss of scores ``scale (x w)`` of unit
    vectors and of its gradients.

    Roundings are as often up as down, so ``k`` of them add up to ``sqrt(k)`` of one, four times
    which are allowed (Higham and Mary, 2019). A probability is off by what its score is off by:
    ``sqrt(dim) + 8`` roundings of ``scale``; and by the ``sqrt(terms) + 16`` of the sum it is
    divided by. With products in bfloat16 the vectors' elements are rounded to 2^-8, and so are,
    where the scores come out in bfloat16, those that count, of about ``4 scale / sqrt(dim)``; then
    the gradient of each score.
    """
    off = 4 * 2.0**-24 * (scale * (math.sqrt(dim) + 8) + math.sqrt(terms) + 16)
    return off + bfloat16 * 2.0**-8 * (5 * scale / math.sqrt(dim) + 2)
