"""Vector quantisation: the nearest code, by its definition."""

import torch
from torch import Tensor

NORM_FLOOR = 1e-12
_CHUNK_ELEMENTS = 1 << 22


def exact_scores(x: Tensor, codebook: Tensor, metric: str) -> Tensor:
    """Scores ``[N, K]`` in float64, each sum taken over the dimensions in ascending order."""
    x, codebook = x.double(), codebook.double()
    total = x.new_zeros(len(x), len(codebook))
    norm = x.new_zeros(len(codebook))
    for d in range(x.shape[1]):
        x_d, c_d = x[:, d, None], codebook[:, d]
        if metric == "l2":
            difference = x_d - c_d
            total -= difference * difference
        else:
            total += x_d * c_d
            norm += c_d * c_d
    return total / norm.sqrt().clamp(min=NORM_FLOOR) if metric == "cosine" else total


def selected_distance(x: Tensor, codes: Tensor, metric: str) -> Tensor:
    """``d`` of each row of ``x [N, D]`` with the code beside it ``[N, D]``; differentiable."""
    if metric == "l2":
        return (x - codes).square().sum(-1)
    dot = (x * codes).sum(-1)
    if metric == "dot":
        return dot
    return dot / (_floored_norm(x) * _floored_norm(codes))


def _floored_norm(x: Tensor) -> Tensor:
    # The norm of a zero row has no derivative: keep the square root away from it.
    square = x.square().sum(-1)
    above = square > NORM_FLOOR**2
    return torch.where(above, torch.where(above, square, 1.0).sqrt(), NORM_FLOOR)


def vq_nearest(
    x: Tensor, codebook: Tensor, *, metric: str = "l2", return_distance: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """See :func:`fastzoo.ops.vq_nearest`."""
    if x.device.type == "mps":
        raise RuntimeError("vq_nearest decides in float64, which mps lacks: move to cpu")
    rows = x.reshape(-1, x.shape[-1])
    with torch.no_grad():
        chunk = max(1, _CHUNK_ELEMENTS // len(codebook))
        indices = [_first_best(exact_scores(r, codebook, metric)) for r in rows.split(chunk)]
    chosen = torch.cat(indices)
    if not return_distance:
        return chosen.view(x.shape[:-1])
    d = selected_distance(rows.double(), codebook[chosen].double(), metric)
    d = d.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    return chosen.view(x.shape[:-1]), d.view(x.shape[:-1])


def _first_best(scores: Tensor) -> Tensor:
    """The lowest index of the highest score, NaN below everything."""
    best = scores.masked_fill(scores.isnan(), -torch.inf).amax(1, keepdim=True)
    # Where all are NaN none equals the best, and argmax gives the first.
    return (scores == best).byte().argmax(1)


def vq_nearest_backward(
    grad_d: Tensor, x: Tensor, codebook: Tensor, indices: Tensor, metric: str
) -> tuple[Tensor, Tensor]:
    """Gradients of ``d`` to ``x`` and ``codebook``; differentiable itself.

    Rows that chose one code are added in ascending order, so the result is deterministic.
    """
    grad_d = grad_d.double()[:, None]
    rows, codes = x.double(), codebook[indices].double()
    if metric == "l2":
        grad_rows = 2 * grad_d * (rows - codes)
        grad_codes = -grad_rows
    elif metric == "dot":
        grad_rows, grad_codes = grad_d * codes, grad_d * rows
    else:
        row_norm, code_norm = _floored_norm(rows)[:, None], _floored_norm(codes)[:, None]
        cosine = (rows * codes).sum(-1, keepdim=True) / (row_norm * code_norm)
        grad_rows = _cosine_gradient(grad_d, rows, codes, row_norm, code_norm, cosine)
        grad_codes = _cosine_gradient(grad_d, codes, rows, code_norm, row_norm, cosine)
    grad_codebook = codebook.new_zeros(codebook.shape, dtype=torch.float64)
    # index_put accumulates by sorted index on every device; index_add does not on CUDA.
    grad_codebook = grad_codebook.index_put((indices,), grad_codes, accumulate=True)
    return grad_rows.to(x.dtype), grad_codebook.to(codebook.dtype)


def _cosine_gradient(
    grad: Tensor, a: Tensor, b: Tensor, a_norm: Tensor, b_norm: Tensor, cosine: Tensor
) -> Tensor:
    # Below the floor the norm is a constant, and only the dot product varies.
    radial = torch.where(a_norm > NORM_FLOOR, cosine * a / a_norm.square(), 0.0)
    return grad * (b / (a_norm * b_norm) - radial)
