"""Margin softmax: cross-entropy over classes whose weights are directions, in plain PyTorch.

The definition is :func:`margin_softmax_loss`, with the logits in memory. The other functions
define the operators that fastzoo.ops assembles it from; they never need the logits of all classes
at once, but here they hold them.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastzoo.reference.margins import Margin
from fastzoo.reference.precision import compute_dtype

# Below this sine the derivative of an angle is held, so that it is finite at cosines of +-1.
SINE_FLOOR = 2.0**-12
# AdaFace's angles end here.
ANGLE_EDGE = 1e-3
# Shorter vectors have no direction: their cosines are 0, and pass no gradient on.
NORM_FLOOR = 1e-12
# Classes that share one reference of the copy that kernels keep for the backward.
KEPT_BLOCK = 64


def margin_softmax_loss(
    embeddings: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    margin: Margin,
    scale: float | Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    class_weight: Tensor | None = None,
    interclass_filter: float = 0.0,
    return_lse: bool = False,
    grad: Literal["exact", "insightface"] = "exact",
    state: Tensor | None = None,
    sub_centers: int = 1,
    memory_budget: int | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """:func:`fastzoo.ops.margin_softmax_loss`: ``F.cross_entropy`` of the logits."""
    logits, norm, state = _logits_and_norm(
        embeddings,
        weight,
        labels,
        margin=margin,
        scale=scale,
        ignore_index=ignore_index,
        interclass_filter=interclass_filter,
        grad=grad,
        state=state,
        sub_centers=sub_centers,
    )
    valid = valid_rows(labels, ignore_index)
    if class_weight is not None:
        class_weight = class_weight.to(logits.dtype)
    loss = F.cross_entropy(
        logits,
        torch.where(valid, labels, -1),
        class_weight,
        ignore_index=-1,
        label_smoothing=label_smoothing,
        reduction="none",
    )
    row_weight = row_weights(labels, valid, class_weight, loss.dtype)
    extra = row_extras(margin, norm, valid)
    results = [reduce_rows(loss, extra, row_weight, valid, reduction)]
    if return_lse:
        results.append(logits.logsumexp(1))
    if margin.state_size:
        results.append(state)
    return results[0] if len(results) == 1 else tuple(results)


def margin_softmax_logits(
    embeddings: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    margin: Margin,
    scale: float | Tensor | None = None,
    ignore_index: int | None = None,
    interclass_filter: float = 0.0,
    grad: Literal["exact", "insightface"] = "exact",
    state: Tensor | None = None,
    sub_centers: int = 1,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`fastzoo.ops.margin_softmax_logits`: the logits ``[N, C]``."""
    logits, _, state = _logits_and_norm(
        embeddings,
        weight,
        labels,
        margin=margin,
        scale=scale,
        ignore_index=ignore_index,
        interclass_filter=interclass_filter,
        grad=grad,
        state=state,
        sub_centers=sub_centers,
    )
    return (logits, state) if margin.state_size else logits


def _logits_and_norm(
    embeddings: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    margin: Margin,
    scale: float | Tensor | None,
    ignore_index: int | None,
    interclass_filter: float,
    grad: str,
    state: Tensor | None,
    sub_centers: int,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = compute_dtype(embeddings)
    if weight.dim() == 3:
        sub_centers = weight.shape[1]
    x, w = embeddings.to(dtype), weight.to(dtype).reshape(-1, weight.shape[-1])
    norm = safe_norm(x)
    u = x @ w.t()
    if margin.normalize_embeddings:
        u = u * inverse(norm)[:, None]
    length = safe_norm(w)
    if margin.normalize_weight:
        u = u * inverse(length)
    u = u.unflatten(1, (-1, sub_centers))
    winner = u.argmax(2, keepdim=True)
    u = u.gather(2, winner)[..., 0]

    valid = valid_rows(labels, ignore_index)
    column = torch.where(valid, labels, 0)[:, None]
    own = u.gather(1, column)[:, 0]
    magnitude = length.view(-1, sub_centers)[
        column[:, 0], winner.gather(1, column[..., None])[:, 0, 0]
    ]
    unscaled = margin.normalize_embeddings and not margin.normalize_weight
    cosine = own * inverse(magnitude) if unscaled else own
    state = margin.initial_state(norm.detach()) if state is None else state.to(dtype)
    state = margin.update(state, cosine.detach(), norm.detach(), valid)
    rule, *coefficients = margin.terms(norm, state)
    m1, m2, m3 = (per_row(value, norm) for value in coefficients)
    value = margin_softmax_target(cosine, m1, m2, m3, rule)
    if grad == "insightface":
        value = cosine + (value - cosine).detach()
    if unscaled:
        value = magnitude * value

    others = u
    if margin.hardens_negatives:
        unguarded = margin_softmax_target(cosine.detach(), m1, m2, m3, "unguarded")
        hard = valid[:, None] & (u > unguarded[:, None])
        others = torch.where(hard, u * (state + u), u)
    if interclass_filter > 0:
        others = torch.where(u > interclass_filter, 0, others)
    is_own = valid[:, None] & (torch.arange(u.shape[1], device=u.device) == column)
    s = per_row(margin.default_scale if scale is None else scale, norm)
    if margin.scales_by_norm:
        s = s * norm
    return s[:, None] * torch.where(is_own, value[:, None], others), norm, state


def valid_rows(labels: Tensor, ignore_index: int | None) -> Tensor:
    """Rows that count: neither negative nor ``ignore_index``."""
    valid = labels >= 0
    return valid if ignore_index is None else valid & (labels != ignore_index)


def per_row(value: float | Tensor, like: Tensor) -> Tensor:
    """A number, or one for each row, as ``[N]`` in the dtype of ``like [N]``."""
    if isinstance(value, Tensor):
        return value.to(like.dtype).expand(like.shape)
    return torch.full_like(like, value, requires_grad=False)


def row_weights(
    labels: Tensor, valid: Tensor, class_weight: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """What each row weighs in the mean ``[N]``: its class's weight, or 1; 0 where ignored."""
    if class_weight is None:
        return valid.to(dtype)
    return torch.where(valid, class_weight.to(dtype)[torch.where(valid, labels, 0)], 0)


def row_extras(margin: Margin, norm: Tensor, valid: Tensor) -> Tensor | None:
    """The margin's regulariser of each row that counts ``[N]``."""
    extra = margin.regularizer(norm)
    return None if extra is None else torch.where(valid, extra, 0)


def reduce_rows(
    loss: Tensor, extra: Tensor | None, row_weight: Tensor, valid: Tensor, reduction: str
) -> Tensor:
    """The mean over the rows' weights, and over the valid rows for the regulariser; 0 of none.

    Weights and validity are those of the whole batch, also where the losses are some of its rows'.
    """
    if reduction == "none":
        return loss if extra is None else loss + extra
    if reduction == "sum":
        return loss.sum() if extra is None else loss.sum() + extra.sum()
    total = row_weight.sum()
    mean = loss.sum() / torch.where(total == 0, 1, total)
    return mean if extra is None else mean + extra.sum() / valid.sum().clamp(min=1)


def safe_norm(x: Tensor) -> Tensor:
    """The norm of each row, whose gradient at zero is zero."""
    square = x.square().sum(-1)
    zero = square == 0
    return torch.where(zero, 0, torch.where(zero, 1, square).sqrt())


def inverse(norm: Tensor) -> Tensor:
    """``1 / norm``, and 0 for no direction."""
    short = norm <= NORM_FLOOR
    return torch.where(short, 0, 1 / torch.where(short, 1, norm))


def margin_softmax_target(cosine: Tensor, m1: Tensor, m2: Tensor, m3: Tensor, rule: str) -> Tensor:
    """A margin's rule for the target's cosine, all ``[N]``, evaluated in float64.

    shift: ``cosine - m3``, of any number. For the others ``c`` is the cosine within [-1, 1]:

    - unguarded: ``cos(theta + m2) - m3``
    - arcface: the same; ``c - m2 sin(m2) - m3`` where ``theta + m2 > pi``
    - easy: the same; ``c - m3`` where ``c <= 0``
    - clip: the same, ``theta + m2`` kept within [1e-3, pi - 1e-3]
    - combined: ``(-1)^k cos(a) - 2 k - m3``, ``a = m1 theta + m2``, ``k = max(0, floor(a / pi))``
    - psi: ``(m2 c + (-1)^k cos(m1 theta) - 2 k) / (1 + m2) - m3``, ``m1`` a whole number and ``k``
      that of ``m1 theta``; ``m1`` and ``m2`` have no gradient

    Derivatives divide by ``max(sin(theta), 2^-12)``: they are finite everywhere.
    """
    dtype = cosine.dtype
    cosine, m1, m2, m3 = (t.double() for t in (cosine, m1, m2, m3))
    if rule == "shift":
        return (cosine - m3).to(dtype)
    # Beyond +-1, by rounding, the cosine is clamped, and its gradient goes on.
    c = cosine + (cosine.clamp(-1, 1) - cosine).detach()
    if rule == "psi":
        lam = m2.detach()
        return ((lam * c + _psi(c, m1.detach())) / (1 + lam) - m3).to(dtype)
    sine = _sine(c)
    shifted = c * m2.cos() - sine * m2.sin()
    if rule == "arcface":
        shifted = torch.where(c > -m2.cos(), shifted, c - m2 * m2.sin())
    elif rule == "easy":
        shifted = torch.where(c > 0, shifted, c)
    elif rule == "clip":
        angle = (c.acos() + m2).detach()
        edge = angle.clamp(ANGLE_EDGE, math.pi - ANGLE_EDGE)
        shifted = torch.where(angle == edge, shifted, edge.cos())
    elif rule == "combined":
        a = m1 * torch.atan2(sine, c) + m2
        k = (a / math.pi).floor().clamp(min=0).detach()
        shifted = (1 - 2 * (k % 2)) * a.cos() - 2 * k
    elif rule != "unguarded":
        raise ValueError(f"rule: unknown {rule!r}")
    return (shifted - m3).to(dtype)


def _sine(c: Tensor) -> Tensor:
    """``sin(theta)``, with a derivative that stays ``-c / 2^-12`` below that sine."""
    square = (1 - c) * (1 + c)
    inside = square > SINE_FLOOR**2
    held = square.detach().clamp(min=0).sqrt() - (c - c.detach()) * c.detach() / SINE_FLOOR
    return torch.where(inside, torch.where(inside, square, 1).sqrt(), held)


def _chebyshev(c: Tensor, m: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``T_m(c)``, ``U_{m-1}(c)`` and ``k``, for whole numbers ``m >= 1``."""
    first, second = torch.ones_like(c), c
    u_before, u = torch.zeros_like(c), torch.ones_like(c)
    value, slope, k = second, u, torch.zeros_like(c)
    for degree in range(2, int(m.max()) + 1 if m.numel() else 0):
        first, second = second, 2 * c * second - first
        u_before, u = u, 2 * c * u - u_before
        value = torch.where(m == degree, second, value)
        slope = torch.where(m == degree, u, slope)
    for j in range(1, int(m.max()) if m.numel() else 0):
        k = k + ((j < m) & (c < torch.cos(j * math.pi / m))).to(c.dtype)
    return value, slope, k


def _psi(c: Tensor, m: Tensor) -> Tensor:
    value, _, k = _chebyshev(c, m)
    return (1 - 2 * (k % 2)) * value - 2 * k


def margin_softmax_target_backward(
    grad: Tensor, cosine: Tensor, m1: Tensor, m2: Tensor, m3: Tensor, rule: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of :func:`margin_softmax_target` to ``cosine, m1, m2, m3``."""
    dtype = cosine.dtype
    grad, cosine, m1, m2 = (t.double() for t in (grad, cosine, m1, m2))
    zero = torch.zeros_like(grad)
    by_c, by_m1, by_m2 = grad, zero, zero
    c = cosine + (cosine.clamp(-1, 1) - cosine).detach()
    square = (1 - c) * (1 + c)
    inside = square > SINE_FLOOR**2
    sine = torch.where(square > 0, torch.where(square > 0, square, 1).sqrt(), 0)
    floored = torch.where(inside, sine, SINE_FLOOR)
    if rule == "psi":
        lam = m2.detach()
        _, slope, k = _chebyshev(c, m1.detach())
        by_c = grad * (lam + (1 - 2 * (k % 2)) * m1.detach() * slope) / (1 + lam)
    elif rule == "combined":
        theta = torch.atan2(sine, c)
        a = m1 * theta + m2
        k = (a / math.pi).floor().clamp(min=0).detach()
        by_m2 = -grad * (1 - 2 * (k % 2)) * a.sin()
        by_m1 = by_m2 * theta
        by_c = -by_m2 * m1 / floored
    elif rule != "shift":
        by_c = grad * (m2.cos() + c * m2.sin() / floored)
        by_m2 = -grad * (c * m2.sin() + sine * m2.cos())
        if rule == "arcface":
            below = c > -m2.cos()
            by_c = torch.where(below, by_c, grad)
            by_m2 = torch.where(below, by_m2, -grad * (m2.sin() + m2 * m2.cos()))
        elif rule == "easy":
            by_c, by_m2 = torch.where(c > 0, by_c, grad), torch.where(c > 0, by_m2, 0)
        elif rule == "clip":
            angle = c.acos() + m2
            moves = (angle > ANGLE_EDGE) & (angle < math.pi - ANGLE_EDGE)
            by_c, by_m2 = torch.where(moves, by_c, 0), torch.where(moves, by_m2, 0)
        elif rule != "unguarded":
            raise ValueError(f"rule: unknown {rule!r}")
    return by_c.to(dtype), by_m1.to(dtype), by_m2.to(dtype), -grad.to(dtype)


class _Scores:
    """What the operators share: the scores of every class, and how they pass a gradient on.

    Operands are rounded to bfloat16 for the product alone, and normalised after it.
    """

    def __init__(
        self,
        embeddings: Tensor,
        weight: Tensor,
        labels: Tensor,
        threshold: Tensor,
        hardness: Tensor,
        interclass_filter: float,
        sub_centers: int,
        normalize_embeddings: bool,
        normalize_weight: bool,
        bfloat16_products: bool,
    ) -> None:
        dtype = compute_dtype(embeddings)
        self.x, self.w = embeddings.to(dtype), weight.to(dtype)
        self.x_norm, self.w_norm = safe_norm(self.x), safe_norm(self.w)
        self.x_inverse = (
            inverse(self.x_norm) if normalize_embeddings else torch.ones_like(self.x_norm)
        )
        self.w_inverse = inverse(self.w_norm) if normalize_weight else torch.ones_like(self.w_norm)
        self.normalized = normalize_embeddings, normalize_weight
        left, right = self.x, self.w
        if bfloat16_products and dtype == torch.float32:
            left, right = (_rounded(t) for t in (left, right))
        self.raw = left @ right.t() * self.x_inverse[:, None] * self.w_inverse
        every = self.raw.unflatten(1, (-1, sub_centers))
        self.winner = every.argmax(2)
        self.u = every.gather(2, self.winner[..., None])[..., 0]
        self.sub_centers = sub_centers

        classes = self.u.shape[1]
        self.labels = labels
        self.column = labels.clamp(0, classes - 1)
        self.known = (labels >= 0) & (labels < classes)
        self.own = self.known[:, None] & (
            torch.arange(classes, device=labels.device) == labels[:, None]
        )
        self.hardness = hardness
        self.hard = self.u > threshold[:, None] if threshold.numel() else self.own
        self.kept = ~((self.u > interclass_filter) & (interclass_filter > 0)) | self.own

    def values(self) -> Tensor:
        """``g(u)``, the scores less their scale; the label's as any other class's."""
        value = self.u
        if self.hardness.numel():
            hard = self.hard & ~self.own
            value = torch.where(hard, self.u * (self.hardness + self.u), value)
        return torch.where(self.kept, value, 0)

    def slopes(self) -> Tensor:
        slope = torch.ones_like(self.u)
        if self.hardness.numel():
            slope = torch.where(self.hard, self.hardness + 2 * self.u, slope)
        return torch.where(self.kept, slope, 0)

    def target(self) -> tuple[Tensor, Tensor, Tensor]:
        """The target's ``u``, its weight row, and that row's norm."""
        k = self.sub_centers
        rows = self.column[:, None] * k + torch.arange(k, device=self.column.device)
        dots = (self.x[:, None] * self.w[rows]).sum(2)
        dots = dots * self.x_inverse[:, None] * self.w_inverse[rows]
        winner = dots.argmax(1, keepdim=True)
        row = rows.gather(1, winner)[:, 0]
        u = torch.where(self.known, dots.gather(1, winner)[:, 0], 0)
        beyond = self.labels >= self.u.shape[1]
        u = torch.where(beyond, math.nan, u)
        return u, row, torch.where(self.known, self.w_norm[row], 0)

    def backward(
        self, grad_u: Tensor, grad_target: Tensor, grad_x_norm: Tensor, grad_w_norm: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Gradients of embeddings and weight, from those of ``u``, 0 at the labels, and norms."""
        grad_rows = torch.zeros_like(self.raw).unflatten(1, (-1, self.sub_centers))
        grad_rows = grad_rows.scatter(2, self.winner[..., None], grad_u[..., None]).flatten(1)
        target, row, _ = self.target()
        grad_target = torch.where(self.known, grad_target, 0)
        own = torch.zeros_like(grad_rows).scatter(1, row[:, None], 1) * grad_target[:, None]
        v = (grad_rows + own) * self.x_inverse[:, None] * self.w_inverse
        radial = grad_rows * self.raw + own * target[:, None]
        grad_x, grad_w = v @ self.w, v.t() @ self.x
        x_unit = self.x / torch.where(self.x_norm == 0, 1, self.x_norm)[:, None]
        w_unit = self.w / torch.where(self.w_norm == 0, 1, self.w_norm)[:, None]
        by_x_norm, by_w_norm = grad_x_norm, torch.zeros_like(self.w_norm)
        by_w_norm = by_w_norm.index_add(0, row, torch.where(self.known, grad_w_norm, 0))
        if self.normalized[0]:
            by_x_norm = by_x_norm - radial.sum(1) * self.x_inverse
        if self.normalized[1]:
            by_w_norm = by_w_norm - radial.sum(0) * self.w_inverse
        return grad_x + by_x_norm[:, None] * x_unit, grad_w + by_w_norm[:, None] * w_unit


def _rounded(t: Tensor) -> Tensor:
    return t + (t.bfloat16().to(t.dtype) - t).detach()


def margin_softmax_negatives(
    embeddings: Tensor,
    weight: Tensor,
    labels: Tensor,
    scale: Tensor,
    threshold: Tensor,
    hardness: Tensor,
    class_weight: Tensor,
    interclass_filter: float,
    sub_centers: int,
    normalize_embeddings: bool,
    normalize_weight: bool,
    bfloat16_products: bool,
    with_total: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The target's score, and what the loss needs of all other classes.

    Args:
        labels: ``[N]``; negative where the target is none of these classes.
        scale: ``[N]``.
        threshold, hardness: ``[N]`` and ``[1]``, or both ``[0]``: scores ``u`` above the threshold
            become ``u (hardness + u)``.
        class_weight: ``[C]``, or ``[0]`` for ones.

    Returns:
        ``target [N]``, unscaled; ``lse [N]``, the log-sum-exp over the other classes;
        ``total [N]``, the sum of their scores by class weight; the norms of the embeddings and of
        the targets' weights ``[N]``; two tensors that only kernels fill.
    """
    scores = _Scores(
        embeddings,
        weight,
        labels,
        threshold,
        hardness,
        interclass_filter,
        sub_centers,
        normalize_embeddings,
        normalize_weight,
        bfloat16_products,
    )
    target, _, norm = scores.target()
    z = scale[:, None] * scores.values()
    lse = z.masked_fill(scores.own, -math.inf).logsumexp(1)
    if with_total:
        factor = class_weight if class_weight.numel() else z.new_ones(z.shape[1])
        total = (factor * z).masked_fill(scores.own, 0).sum(1)
    else:
        total = torch.zeros_like(lse)
    n, classes = z.shape
    blocks = -(-classes // KEPT_BLOCK)
    kept = weight.new_zeros((classes, n) if keep else (0,), dtype=torch.bfloat16)
    kept_max = z.new_zeros((blocks, n) if keep else (0,))
    return target, lse, total, scores.x_norm.clone(), norm, kept, kept_max


def margin_softmax_negatives_backward(
    grad_target: Tensor,
    grad_lse: Tensor,
    grad_total: Tensor,
    grad_embedding_norm: Tensor,
    grad_weight_norm: Tensor,
    embeddings: Tensor,
    weight: Tensor,
    labels: Tensor,
    scale: Tensor,
    threshold: Tensor,
    hardness: Tensor,
    class_weight: Tensor,
    lse: Tensor,
    kept: Tensor,
    kept_max: Tensor,
    interclass_filter: float,
    sub_centers: int,
    normalize_embeddings: bool,
    normalize_weight: bool,
    bfloat16_products: bool,
    needs_embeddings: bool,
    needs_weight: bool,
    needs_scale: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`margin_softmax_negatives` to embeddings, weight and scale."""
    scores = _Scores(
        embeddings,
        weight,
        labels,
        threshold,
        hardness,
        interclass_filter,
        sub_centers,
        normalize_embeddings,
        normalize_weight,
        bfloat16_products,
    )
    value = scores.values()
    p = torch.exp((scale[:, None] * value).masked_fill(scores.own, -math.inf) - lse[:, None])
    factor = class_weight if class_weight.numel() else value.new_ones(value.shape[1])
    grad_z = grad_lse[:, None] * p + grad_total[:, None] * factor
    # Without another class the log-sum-exp is -inf, and p is not a number.
    grad_z = torch.where(scores.own, 0, grad_z)
    return _score_gradients(
        scores,
        grad_z,
        scale,
        (grad_target, grad_embedding_norm, grad_weight_norm),
        (embeddings, weight),
        (needs_embeddings, needs_weight, needs_scale),
    )


def _score_gradients(
    scores: _Scores,
    grad_z: Tensor,
    scale: Tensor,
    grads: tuple[Tensor, Tensor, Tensor],
    inputs: tuple[Tensor, Tensor],
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    grad_scale = (grad_z * scores.values()).sum(1)
    grad_x, grad_w = scores.backward(grad_z * scale[:, None] * scores.slopes(), *grads)
    results = (grad_x.to(inputs[0].dtype), grad_w.to(inputs[1].dtype), grad_scale)
    first, second, third = (
        result if needed else result.new_zeros(0)
        for result, needed in zip(results, needs, strict=True)
    )
    return first, second, third


def margin_softmax_scores(
    embeddings: Tensor,
    weight: Tensor,
    labels: Tensor,
    scale: Tensor,
    threshold: Tensor,
    hardness: Tensor,
    interclass_filter: float,
    sub_centers: int,
    normalize_embeddings: bool,
    normalize_weight: bool,
    bfloat16_products: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The scores ``[N, C]``, the label's as of a class without margin, and the target's
    ``[N]``, with the norms of the embeddings and of the targets' weights."""
    scores = _Scores(
        embeddings,
        weight,
        labels,
        threshold,
        hardness,
        interclass_filter,
        sub_centers,
        normalize_embeddings,
        normalize_weight,
        bfloat16_products,
    )
    target, _, norm = scores.target()
    return scale[:, None] * scores.values(), target, scores.x_norm.clone(), norm


def margin_softmax_scores_backward(
    grad_scores: Tensor,
    grad_target: Tensor,
    grad_embedding_norm: Tensor,
    grad_weight_norm: Tensor,
    embeddings: Tensor,
    weight: Tensor,
    labels: Tensor,
    scale: Tensor,
    threshold: Tensor,
    hardness: Tensor,
    interclass_filter: float,
    sub_centers: int,
    normalize_embeddings: bool,
    normalize_weight: bool,
    bfloat16_products: bool,
    needs_embeddings: bool,
    needs_weight: bool,
    needs_scale: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`margin_softmax_scores`; that of the label's score is left out."""
    scores = _Scores(
        embeddings,
        weight,
        labels,
        threshold,
        hardness,
        interclass_filter,
        sub_centers,
        normalize_embeddings,
        normalize_weight,
        bfloat16_products,
    )
    return _score_gradients(
        scores,
        torch.where(scores.own, 0, grad_scores),
        scale,
        (grad_target, grad_embedding_norm, grad_weight_norm),
        (embeddings, weight),
        (needs_embeddings, needs_weight, needs_scale),
    )
