"""Vector quantisation by its definition: the nearest codes, and what training makes of them."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastzoo.reference.exact import square_root
from fastzoo.reference.precision import compute_dtype

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
    return total / square_root(norm).clamp(min=NORM_FLOOR) if metric == "cosine" else total


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
    x: Tensor,
    codebook: Tensor,
    *,
    k: int | None = None,
    metric: str = "l2",
    mask: Tensor | None = None,
    precision: str = "exact",
    return_distance: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """See :func:`fastzoo.ops.vq_nearest`; both precisions are exact here."""
    chosen = _nearest(x, codebook, metric, k or 1)
    if mask is not None:
        chosen = torch.where(_over_heads(mask, codebook)[..., None], chosen, -1)
    indices = chosen if k else chosen.squeeze(-1)
    if not return_distance:
        return indices
    codes = chosen_codes(codebook.double(), chosen)
    d = selected_distance(x.double()[..., None, :], codes, metric)
    d = torch.where(chosen < 0, 0, d).to(compute_dtype(x))
    return indices, d if k else d.squeeze(-1)


def _nearest(x: Tensor, codebook: Tensor, metric: str, k: int) -> Tensor:
    """The k best codes ``[..., k]`` of each vector; of each vector of each head with heads."""
    if x.device.type == "mps":
        raise RuntimeError("vq_nearest decides in float64, which mps lacks: move to cpu")
    if codebook.dim() == 3:
        heads = zip(x.unbind(-2), codebook, strict=True)
        return torch.stack([_nearest(*head, metric, k) for head in heads], -2)
    rows = x.reshape(-1, x.shape[-1])
    with torch.no_grad():
        chunk = max(1, _CHUNK_ELEMENTS // len(codebook))
        best = [_first_best(exact_scores(r, codebook, metric), k) for r in rows.split(chunk)]
    return torch.cat(best).view(*x.shape[:-1], k)


def _first_best(scores: Tensor, k: int) -> Tensor:
    """The indices of the k highest scores, ties by lower index, NaN below everything."""
    nan = scores.isnan()
    numbers = scores.masked_fill(nan, -torch.inf)
    if k > 1:
        order = numbers.sort(dim=1, descending=True, stable=True).indices
        return order.gather(1, nan.gather(1, order).byte().sort(dim=1, stable=True).indices)[:, :k]
    # Where all are NaN none equals the best, and argmax gives the first.
    return (scores == numbers.amax(1, keepdim=True)).byte().argmax(1, keepdim=True)


def _over_heads(mask: Tensor, codebook: Tensor) -> Tensor:
    """The mask of the vectors as one that every head's vectors can be compared with."""
    return mask[..., None] if codebook.dim() == 3 else mask


def chosen_codes(codebook: Tensor, chosen: Tensor) -> Tensor:
    """The codes ``[..., k, D]`` of indices ``[..., k]``; index -1 gives the first code."""
    chosen = chosen.clamp(min=0)
    if codebook.dim() == 2:
        return codebook[chosen]
    head = torch.arange(len(codebook), device=chosen.device)[:, None]
    return codebook[head, chosen]


def vq_nearest_backward(
    grad_d: Tensor, x: Tensor, codebook: Tensor, indices: Tensor, metric: str
) -> tuple[Tensor, Tensor]:
    """Gradients of ``d`` to ``x`` and ``codebook``; differentiable itself.

    Rows that chose one code are added in ascending order, so the result is deterministic. Index -1
    stands for no code.
    """
    grad_d = grad_d.double()[:, None]
    rows, codes = x.double(), codebook[indices.clamp(min=0)].double()
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
    grad_rows = torch.where(indices[:, None] < 0, 0, grad_rows)
    return grad_rows.to(x.dtype), _sum_by_code(grad_codes, indices, len(codebook)).to(x.dtype)


def _cosine_gradient(
    grad: Tensor, a: Tensor, b: Tensor, a_norm: Tensor, b_norm: Tensor, cosine: Tensor
) -> Tensor:
    # Below the floor the norm is a constant, and only the dot product varies.
    radial = torch.where(a_norm > NORM_FLOOR, cosine * a / a_norm.square(), 0.0)
    return grad * (b / (a_norm * b_norm) - radial)


def _sum_by_code(rows: Tensor, indices: Tensor, codes: int) -> Tensor:
    """Sums in float64 of the rows of each code ``[codes, ...]``; index -1 is left out."""
    places = torch.where(indices < 0, codes, indices)
    sums = rows.new_zeros(codes + 1, *rows.shape[1:], dtype=torch.float64)
    # index_put accumulates by sorted index on every device; index_add does not on CUDA.
    return sums.index_put((places,), rows.double(), accumulate=True)[:codes]


def vq_statistics(x: Tensor, indices: Tensor, codes: int) -> tuple[Tensor, Tensor]:
    """See :func:`fastzoo.ops.vq_statistics`."""
    rows, indices = x.reshape(-1, x.shape[-1]), indices.reshape(-1)
    counts = _sum_by_code(torch.ones_like(indices), indices, codes)
    return counts.to(compute_dtype(x)), _sum_by_code(rows, indices, codes).to(compute_dtype(x))


def flat(x: Tensor, codebook: Tensor, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Heads as one: vectors ``[N, D]``, codes ``[K, D]`` and indices ``[N]`` into all the codes."""
    if codebook.dim() == 3:
        heads, codes, _ = codebook.shape
        first = torch.arange(0, heads * codes, codes, device=indices.device)
        indices = torch.where(indices < 0, -1, indices + first)
    dim = x.shape[-1]
    return x.reshape(-1, dim), codebook.reshape(-1, dim), indices.reshape(-1)


def statistics_by_head(
    x: Tensor,
    codebook: Tensor,
    indices: Tensor,
    statistics: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor]:
    """Counts and sums in the shape of the codebook, without a gradient."""
    vectors, every, chosen = flat(x.detach(), codebook.detach(), indices)
    counts, sums = statistics(vectors, chosen, len(every))
    return counts.view(codebook.shape[:-1]), sums.view(codebook.shape)


class VQOutput(NamedTuple):
    """What :func:`fastzoo.ops.vq_quantize` returns."""

    quantized: Tensor
    indices: Tensor
    loss: Tensor
    counts: Tensor
    sums: Tensor

    @property
    def perplexity(self) -> Tensor:
        """``exp(-sum p log p)`` of the codes' shares ``p``: 1 to K, of each head; 1 of nothing."""
        if self.counts.numel() == 0:
            raise ValueError("perplexity: expected statistics, ask for them by return_stats=True")
        share = self.counts / self.counts.sum(-1, keepdim=True).clamp(min=1)
        entropy: Tensor = torch.special.entr(share).sum(-1)
        return entropy.exp()


def vq_quantize(
    x: Tensor,
    codebook: Tensor,
    *,
    beta: float = 0.25,
    codebook_weight: float = 1.0,
    legacy: bool = False,
    estimator: str = "ste",
    metric: str = "l2",
    mask: Tensor | None = None,
    precision: str = "exact",
    return_stats: bool = False,
) -> VQOutput:
    """See :func:`fastzoo.ops.vq_quantize`."""
    if legacy:
        codebook_weight, beta = beta, codebook_weight
    quantized, losses, indices = vq_quantize_rows(
        x,
        codebook,
        metric=metric,
        mask=mask,
        estimator=estimator,
        codebook_weight=codebook_weight,
        beta=beta,
    )
    counts = sums = losses.new_empty(0)
    if return_stats:
        counts, sums = statistics_by_head(x, codebook, indices, vq_statistics)
    loss = mean_loss(losses, mask, x.shape[-1])
    return VQOutput(quantized, indices, loss, counts, sums)


def vq_quantize_rows(
    x: Tensor,
    codebook: Tensor,
    *,
    metric: str,
    mask: Tensor | None,
    estimator: str,
    codebook_weight: float,
    beta: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The codes with the estimator's gradient, the sum of both losses of each vector, and the
    indices."""
    indices = _nearest(x, codebook, metric, 1).squeeze(-1)
    if mask is not None:
        indices = torch.where(_over_heads(mask, codebook), indices, -1)
    # Widened before the gather, or a code's gradient would be rounded once for every row.
    rows = x.to(compute_dtype(x))
    codes = chosen_codes(codebook.to(rows.dtype), indices[..., None]).squeeze(-2)
    valid = indices[..., None] >= 0
    error = codebook_weight * (rows.detach() - codes).double().square()
    error = error + beta * (rows - codes.detach()).double().square()
    losses = torch.where(valid, error, 0).sum(-1).to(rows.dtype)
    quantized = torch.where(valid, _estimate(rows, codes, estimator), rows)
    return quantized.to(x.dtype), losses, indices


def mean_loss(losses: Tensor, mask: Tensor | None, dim: int) -> Tensor:
    """The mean over the elements of unmasked vectors; 0 where there are none."""
    if mask is None:
        return losses.sum() / max(1, losses.numel() * dim)
    return losses.sum() / (mask.sum() * (losses.numel() // max(1, mask.numel()) * dim)).clamp(min=1)


def _estimate(x: Tensor, codes: Tensor, estimator: str) -> Tensor:
    """The codes, with the estimator's gradient."""
    if estimator == "none":
        return codes
    # Zero, with the gradient of x.
    step = (x - x.detach()).nan_to_num(0)
    if estimator == "rotation":
        step = _Rotation(x.detach().double(), codes.detach().double()).forward(step)
    return codes.detach() + step.to(codes.dtype)


class _Rotation:
    """The map that turns and scales x into its code: ``lambda (I - 2 w w' + 2 v u')``, of constant
    ``u = x/|x|``, ``v = c/|c|``, ``w = (u + v)/|u + v|`` and ``lambda = |c|/|x|``; the identity for
    an x of no length (Fifty et al., Restructuring Vector Quantization with the Rotation Trick,
    2024, equation 3)."""

    def __init__(self, x: Tensor, codes: Tensor) -> None:
        norm = x.norm(dim=-1, keepdim=True)
        self.turns = norm > NORM_FLOOR
        norm = norm.clamp(min=NORM_FLOOR)
        code_norm = codes.norm(dim=-1, keepdim=True)
        self.u, self.v = x / norm, codes / code_norm.clamp(min=NORM_FLOOR)
        between = self.u + self.v
        self.w = between / between.norm(dim=-1, keepdim=True).clamp(min=NORM_FLOOR)
        self.scale = code_norm / norm

    def forward(self, step: Tensor) -> Tensor:
        return self._turn(step, self.u, self.v)

    def backward(self, gradient: Tensor) -> Tensor:
        return self._turn(gradient, self.v, self.u)

    def _turn(self, vector: Tensor, source: Tensor, target: Tensor) -> Tensor:
        halfway = 2 * (vector * self.w).sum(-1, keepdim=True) * self.w
        end = 2 * (vector * source).sum(-1, keepdim=True) * target
        return torch.where(self.turns, self.scale * (vector - halfway + end), vector)


def vq_quantize_backward(
    grad_quantized: Tensor,
    grad_losses: Tensor,
    x: Tensor,
    codebook: Tensor,
    indices: Tensor,
    estimator: str,
    codebook_weight: float,
    beta: float,
    wants_codebook: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients to ``x`` and ``codebook``; differentiable itself. Both losses stop the gradient of
    the side that they do not move, and so do their derivatives."""
    gradient, by_row = grad_quantized.double(), grad_losses.double()[:, None]
    rows, codes = x.double(), codebook[indices.clamp(min=0)].double()
    masked = indices[:, None] < 0
    commitment = 2 * beta * by_row * (rows - codes.detach())
    through = gradient
    if estimator == "rotation":
        through = _Rotation(rows.detach(), codes.detach()).backward(gradient)
    grad_rows = commitment if estimator == "none" else through + commitment
    grad_rows = torch.where(masked, gradient, grad_rows).to(x.dtype)
    if not wants_codebook:
        return grad_rows, codebook.new_empty(0, codebook.shape[1])
    grad_codes = 2 * codebook_weight * by_row * (codes - rows.detach())
    if estimator == "none":
        grad_codes = grad_codes + gradient
    return grad_rows, _sum_by_code(grad_codes, indices, len(codebook)).to(codebook.dtype)
