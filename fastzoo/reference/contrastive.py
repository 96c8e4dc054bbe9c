"""Contrastive losses over all pairs of two sets of vectors, in plain PyTorch.

The four public functions are the definitions, with the matrix of scores in memory;
:func:`contrastive` and its backward define the operator that fastzoo.ops assembles them from.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastzoo.reference.precision import compute_dtype


def info_nce(
    q: Tensor,
    k: Tensor,
    *,
    temperature: float | Tensor,
    positives: Tensor | None = None,
    queue: Tensor | None = None,
    symmetric: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """:func:`fastzoo.ops.info_nce`."""
    q, k = _computed(q), _computed(k)
    if positives is None:
        positives = torch.arange(len(q), device=q.device)
    if queue is not None:
        own = (q * k[positives]).sum(1, keepdim=True)
        logits = torch.cat([own, q @ _computed(queue).t()], 1) / temperature
        loss = -logits.log_softmax(1)[:, 0]
    else:
        logits = q @ k.t() / temperature
        loss = F.cross_entropy(logits, positives, reduction="none")
        if symmetric:
            back = -logits.log_softmax(0).gather(1, positives[:, None])[:, 0]
            loss = (loss + back) / 2
    return reduce(loss, reduction)


def clip_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor | None = None,
) -> Tensor:
    """:func:`fastzoo.ops.clip_loss`."""
    logits = logit_scale * _computed(image) @ _computed(text).t()
    if logit_bias is not None:
        logits = logits + logit_bias
    own = torch.arange(len(image), device=image.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.t(), own)) / 2


def sigmoid_contrastive_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor | None = None,
) -> Tensor:
    """:func:`fastzoo.ops.sigmoid_contrastive_loss`."""
    logits = logit_scale * _computed(image) @ _computed(text).t()
    if logit_bias is not None:
        logits = logits + logit_bias
    sign = 2 * torch.eye(len(image), dtype=logits.dtype, device=logits.device) - 1
    return -F.logsigmoid(sign * logits).sum() / len(image)


def nt_xent(z: Tensor, temperature: float | Tensor) -> Tensor:
    """:func:`fastzoo.ops.nt_xent`."""
    z = F.normalize(_computed(z))
    n = len(z)
    logits = (z @ z.t() / temperature).fill_diagonal_(-math.inf)
    return F.cross_entropy(logits, (torch.arange(n, device=z.device) + n // 2) % n)


def _computed(t: Tensor) -> Tensor:
    return t.to(compute_dtype(t))


def reduce(loss: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.mean()


def _scores(
    queries: Tensor,
    keys: Tensor,
    scale: Tensor,
    bias: Tensor,
    exclude_self: bool,
    bfloat16_products: bool,
) -> tuple[Tensor, Tensor]:
    """The dot products and the scores ``[N, M]``, -inf where excluded."""
    if bfloat16_products and queries.dtype == torch.float32:
        queries, keys = (t + (t.bfloat16().float() - t).detach() for t in (queries, keys))
    dots = queries @ keys.t()
    z = scale * dots + bias
    if exclude_self:
        z = z.masked_fill(torch.eye(*z.shape, dtype=torch.bool, device=z.device), -math.inf)
    return dots, z


def _positive_dots(queries: Tensor, keys: Tensor, positives: Tensor) -> tuple[Tensor, Tensor]:
    """The dot product with each query's positive, and where there is one."""
    known = (positives >= 0) & (positives < len(keys))
    if not len(keys):
        return queries.new_zeros(len(queries)), known
    dots = (queries * keys[positives.clamp(0, len(keys) - 1)]).sum(1)
    return torch.where(positives >= len(keys), math.nan, dots), known


def contrastive(
    queries: Tensor,
    keys: Tensor,
    positives: Tensor,
    scale: Tensor,
    bias: Tensor,
    exclude_self: bool,
    columns: bool,
    sigmoid: bool,
    bfloat16_products: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Each query's score with its positive, and what its scores with all keys add up to.

    A score is ``scale (q k) + bias``. Rows and columns are log-sum-exps; with ``sigmoid`` a row is
    the sum of ``log(1 + exp(score))``.

    Args:
        positives: ``[N]``, a key each; negative for none, whose score is then 0.
        scale, bias: ``[1]``.
        exclude_self: key ``n`` is left out of row ``n``.
        columns: whether the column of each key is wanted.

    Returns:
        positive ``[N]``, row ``[N]``, column ``[M]`` or ``[0]``.
    """
    queries, keys = _computed(queries), _computed(keys)
    _, z = _scores(queries, keys, scale, bias, exclude_self, bfloat16_products)
    dots, known = _positive_dots(queries, keys, positives)
    positive = torch.where(known | dots.isnan(), scale * dots + bias, 0)
    if sigmoid:
        row = torch.logaddexp(z, torch.zeros_like(z)).sum(1)
    else:
        row = z.logsumexp(1) if z.shape[1] else z.new_full((len(z),), -math.inf)
    column = z.logsumexp(0) if columns else z.new_zeros(0)
    return positive, row, column


def contrastive_backward(
    grad_positive: Tensor,
    grad_row: Tensor,
    grad_column: Tensor,
    queries: Tensor,
    keys: Tensor,
    positives: Tensor,
    scale: Tensor,
    bias: Tensor,
    row: Tensor,
    column: Tensor,
    exclude_self: bool,
    sigmoid: bool,
    bfloat16_products: bool,
    needs_queries: bool,
    needs_keys: bool,
    needs_scale: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of :func:`contrastive` to queries, keys, scale and bias."""
    q, k = _computed(queries), _computed(keys)
    dots, z = _scores(q, k, scale, bias, exclude_self, bfloat16_products)
    if sigmoid:
        grad_z = grad_row[:, None] * z.sigmoid()
    else:
        excluded = z == -math.inf
        grad_z = grad_row[:, None] * torch.exp(z - row[:, None])
        if column.numel():
            grad_z = grad_z + grad_column * torch.exp(z - column)
        grad_z = torch.where(excluded, 0, grad_z)
    own_dots, known = _positive_dots(q, k, positives)
    grad_own = torch.where(known, grad_positive, 0)
    index = positives.clamp(0, max(len(k) - 1, 0))
    grad_dots = scale * grad_z
    grad_q, grad_k = grad_dots @ k, grad_dots.t() @ q
    if len(k):
        grad_q = grad_q + (scale * grad_own)[:, None] * k[index]
        grad_k = grad_k.index_add(0, index, (scale * grad_own)[:, None] * q)
    grad_scale = (grad_z * dots).sum() + torch.where(known, grad_own * own_dots, 0).sum()
    grad_bias = grad_z.sum() + grad_own.sum()
    results: list[Any] = [grad_q.to(queries.dtype), grad_k.to(keys.dtype)]
    results += [grad_scale.view(1), grad_bias.view(1)]
    needs = (needs_queries, needs_keys, needs_scale, needs_scale)
    q_out, k_out, scale_out, bias_out = (
        result if needed else result.new_zeros(0)
        for result, needed in zip(results, needs, strict=True)
    )
    return q_out, k_out, scale_out, bias_out
