"""The answer that a row must give, and how near another answer comes to it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastzoo import reference
from fastzoo.testing import SPECS

_ROWS = 1024


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


# Where the definition itself would take minutes.
_FAST: dict[str, Callable[..., Tensor]] = {"vq_nearest": vq_nearest}


def expected(op: str, *args: Any, **kwargs: Any) -> Tensor:
    """The definition's answer, on the CPU."""
    moved = [a.cpu() if isinstance(a, Tensor) else a for a in args]
    definition: Callable[..., Tensor] = _FAST.get(op, SPECS[op].definition)
    answer: Tensor = definition(*moved, **kwargs)
    return answer


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
