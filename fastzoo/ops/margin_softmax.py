"""Margin softmax: cross-entropy over many classes without their logits in memory.

The operators see two things: the target's score and norms, which are a few numbers a row, and a
log-sum-exp over all other classes, whose scores no margin changes but CurricularFace's. The margin
and the loss are then arithmetic on ``[N]``.
"""

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fastzoo import reference
from fastzoo.ops._checks import (
    check_floating,
    check_reduction,
    check_same,
    check_tensor,
    multiplies_in_bfloat16,
)
from fastzoo.ops._operator import Operator
from fastzoo.reference.margin_softmax import (
    KEPT_BLOCK,
    inverse,
    per_row,
    reduce_rows,
    row_extras,
    row_weights,
    safe_norm,
    valid_rows,
)
from fastzoo.reference.margins import Margin
from fastzoo.reference.precision import compute_dtype

# What a backward with bfloat16 products keeps by default, in bytes.
KEPT_BYTES = 32 << 20

_CLASSES = (
    "Tensor embeddings, Tensor weight, Tensor labels, Tensor scale, Tensor threshold,"
    " Tensor hardness"
)
_OPTIONS = (
    "float interclass_filter, int sub_centers, bool normalize_embeddings, bool normalize_weight,"
    " bool bfloat16_products"
)
_NEEDS = "bool needs_embeddings, bool needs_weight, bool needs_scale"


def _fake_negatives(
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
) -> tuple[Tensor, ...]:
    n, classes = embeddings.shape[0], weight.shape[0] // sub_centers
    rows = [scale.new_empty(n) for _ in range(5)]
    kept = weight.new_empty((classes, n) if keep else (0,), dtype=torch.bfloat16)
    blocks = (classes + KEPT_BLOCK - 1) // KEPT_BLOCK
    return *rows, kept, scale.new_empty((blocks, n) if keep else (0,))


def _setup_negatives(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, interclass_filter, sub_centers, by_x, by_w, bfloat16, _, _ = inputs
    _, lse, _, _, _, kept, kept_max = output
    ctx.mark_non_differentiable(kept, kept_max)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, lse, kept, kept_max)
    ctx.options = interclass_filter, sub_centers, by_x, by_w, bfloat16


def _needed(ctx: Any) -> tuple[bool, bool, bool]:
    needs = ctx.needs_input_grad
    return needs[0], needs[1], needs[3]


def _gradients_of_inputs(
    ctx: Any, grads: tuple[Tensor, Tensor, Tensor], count: int
) -> tuple[Tensor | None, ...]:
    """Gradients of embeddings, weight and scale in their places among ``count`` inputs."""
    x, w, s = (g if needed else None for g, needed in zip(grads, _needed(ctx), strict=True))
    return x, w, None, s, *([None] * (count - 4))


def _backward_negatives(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    scale = saved[3]
    rows = [torch.zeros_like(scale) if g is None else g for g in grads[:5]]
    overload = _NEGATIVES_BACKWARD.like(ctx)
    return _gradients_of_inputs(ctx, overload(*rows, *saved, *ctx.options, *_needed(ctx)), 14)


def _fake_gradients(
    embeddings: Tensor, weight: Tensor, scale: Tensor, needs: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    x, w, s = (
        t.new_empty(t.shape if needed else (0,))
        for t, needed in zip((embeddings, weight, scale), needs, strict=True)
    )
    return x, w, s


_NEGATIVES = Operator(
    f"margin_softmax_negatives({_CLASSES}, Tensor class_weight, {_OPTIONS}, bool with_total,"
    " bool keep) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    public=("margin_softmax_loss",),
    reference=reference.margin_softmax_negatives,
    fake=_fake_negatives,
    triton="margin_softmax.margin_softmax_negatives",
    cuda_owner="triton",
    setup_context=_setup_negatives,
    backward=_backward_negatives,
    autocast="off",
)

_NEGATIVES_BACKWARD = Operator(
    "margin_softmax_negatives_backward(Tensor grad_target, Tensor grad_lse, Tensor grad_total,"
    f" Tensor grad_embedding_norm, Tensor grad_weight_norm, {_CLASSES}, Tensor class_weight,"
    f" Tensor lse, Tensor kept, Tensor kept_max, {_OPTIONS}, {_NEEDS})"
    " -> (Tensor, Tensor, Tensor)",
    public=("margin_softmax_loss",),
    reference=reference.margin_softmax_negatives_backward,
    fake=lambda *args: _fake_gradients(args[5], args[6], args[8], args[-3:]),
    triton="margin_softmax.margin_softmax_negatives_backward",
    has=("reference", "cpu", "triton"),
    cuda_owner="triton",
    differentiable_reference=True,
    autocast="off",
)


def _setup_target(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.rule = inputs
    ctx.save_for_backward(*tensors)


def _backward_target(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    overload = _TARGET_BACKWARD.like(ctx)
    return *overload(grad, *ctx.saved_tensors, ctx.rule), None


_TARGET = Operator(
    "margin_softmax_target(Tensor cosine, Tensor m1, Tensor m2, Tensor m3, str rule) -> Tensor",
    reference=reference.margin_softmax_target,
    fake=lambda cosine, m1, m2, m3, rule: cosine.new_empty(cosine.shape),
    triton="margin_softmax.margin_softmax_target",
    cuda_owner="triton",
    setup_context=_setup_target,
    backward=_backward_target,
)

_TARGET_BACKWARD = Operator(
    "margin_softmax_target_backward(Tensor grad, Tensor cosine, Tensor m1, Tensor m2, Tensor m3,"
    " str rule) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference.margin_softmax_target_backward,
    fake=lambda grad, *args: tuple(grad.new_empty(grad.shape) for _ in range(4)),
    triton="margin_softmax.margin_softmax_target_backward",
    cuda_owner="triton",
    differentiable_reference=True,
)


def _fake_scores(embeddings: Tensor, weight: Tensor, *args: Any) -> tuple[Tensor, ...]:
    scale, sub_centers = args[1], args[5]
    n = embeddings.shape[0]
    rows = [scale.new_empty(n) for _ in range(3)]
    return scale.new_empty((n, weight.shape[0] // sub_centers)), *rows


def _setup_scores(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, interclass_filter, sub_centers, by_x, by_w, bfloat16 = inputs
    ctx.save_for_backward(*tensors)
    ctx.options = interclass_filter, sub_centers, by_x, by_w, bfloat16


def _backward_scores(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    overload = _SCORES_BACKWARD.like(ctx)
    return _gradients_of_inputs(
        ctx, overload(*grads, *ctx.saved_tensors, *ctx.options, *_needed(ctx)), 11
    )


_SCORES = Operator(
    f"margin_softmax_scores({_CLASSES}, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
    public=("margin_softmax_logits",),
    reference=reference.margin_softmax_scores,
    fake=_fake_scores,
    triton="margin_softmax.margin_softmax_scores",
    has=("reference", "cpu", "triton"),
    cuda_owner="triton",
    setup_context=_setup_scores,
    backward=_backward_scores,
    autocast="off",
)

_SCORES_BACKWARD = Operator(
    "margin_softmax_scores_backward(Tensor grad_scores, Tensor grad_target,"
    f" Tensor grad_embedding_norm, Tensor grad_weight_norm, {_CLASSES}, {_OPTIONS}, {_NEEDS})"
    " -> (Tensor, Tensor, Tensor)",
    public=("margin_softmax_logits",),
    reference=reference.margin_softmax_scores_backward,
    fake=lambda *args: _fake_gradients(args[4], args[5], args[7], args[-3:]),
    triton="margin_softmax.margin_softmax_scores_backward",
    has=("reference", "cpu", "triton"),
    cuda_owner="triton",
    differentiable_reference=True,
    autocast="off",
)


class Rows(NamedTuple):
    """What the loss knows of each row, ``[N]`` each."""

    target: Tensor  # the score of the row's own class, without scale
    lse: Tensor  # the log-sum-exp over all other classes
    total: Tensor  # the sum of their scores by class weight, for label smoothing
    embedding_norm: Tensor
    weight_norm: Tensor  # of the row's own class


class Losses(NamedTuple):
    """What is to be reduced, ``[N]`` each."""

    loss: Tensor  # times the weight of the row's class; 0 where the row does not count
    extra: Tensor | None  # the margin's regulariser
    weight: Tensor
    lse: Tensor  # the log-sum-exp of all logits


class Classes(NamedTuple):
    """Checked operands of a call."""

    embeddings: Tensor  # [N, D]
    weight: Tensor  # [C * sub_centers, D], the embeddings' dtype
    labels: Tensor  # [N], -1 where no class of these is the target
    sub_centers: int
    bfloat16_products: bool

    @property
    def number(self) -> int:
        return self.weight.shape[0] // self.sub_centers


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
    backend: str | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """Cross-entropy of margin softmax, without the N x C logits in memory.

    Class ``j`` has the logit ``s cos(theta_j)``, the row's own class ``s f(theta_y)`` with the
    margin's ``f``; ``loss = -log softmax(logits)[y]``, as ``torch.nn.functional.cross_entropy``
    has it. Forward and backward walk over the classes a chunk at a time: beyond inputs and
    gradients the memory needed does not grow with N x C. Gradients are finite everywhere: an
    angle's derivative is held at sines below 2^-12, and a vector shorter than 1e-12, whose
    cosines are 0, passes none on.

    Args:
        embeddings: ``[N, D]``; float32, float64, float16 or bfloat16.
        weight: ``[C, D]``, or with ``k`` sub-centres a class ``[C, k, D]``, also as ``[C * k, D]``
            with ``sub_centers=k``, rows ``c k + j``. A class's score is the highest of its
            sub-centres', the first of equal ones.
        labels: ``[N]`` integers below C; rows whose label is negative are left out. A label of C
            or more raises on the CPU; on a GPU its loss is NaN.
        margin: how the own class's logit is changed: ``Plain``, ``LSoftmax``, ``SphereFace``,
            ``CosFace``, ``ArcFace``, ``Combined``, ``AdaFace``, ``MagFace`` or ``CurricularFace``
            of fastzoo.ops. Angles are in radians.
        scale: the factor ``s``: a number, a tensor of one, or ``[N]``; None takes the margin's own.
        reduction: ``mean`` over the rows that count, by their class weights (0 where none counts),
            ``sum`` or ``none``.
        ignore_index: a label to leave out, besides the negative ones.
        label_smoothing: as in ``cross_entropy``.
        class_weight: ``[C]``, as ``weight`` in ``cross_entropy``; without gradient.
        interclass_filter: a cosine of another class above this counts as 0; 0 filters nothing.
        return_lse: also return the log-sum-exp of each row's logits ``[N]``.
        grad: ``exact``, or ``insightface``: the margin passes gradients on as if it did nothing,
            as insightface's heads have it.
        state: the running state of AdaFace or CurricularFace, as the last call returned it; None
            starts anew.
        sub_centers: as above; a weight of three dimensions says it itself.
        memory_budget: bytes that may be kept for the backward, in which a bfloat16 copy of the
            probabilities saves it one of its three products. None: 32 MiB where products are in
            bfloat16 themselves, otherwise 0, since the copy rounds gradients to 2^-9.
        backend: ``auto``, ``reference``, ``cpu``, ``cuda`` or ``triton``; None follows
            :func:`fastzoo.use_backend`.

    Returns:
        The loss, in float32 (float64 for float64 inputs): a scalar, or ``[N]`` without reduction.
        With ``return_lse``, and with a margin that has a state, a tuple ``(loss[, lse][, state])``.

    Gradient: to embeddings, weight, ``scale`` and the margin's tensors, of any order; the second
    holds the logits. Forward-mode derivatives raise. Deterministic. Under autocast the products
    run in bfloat16; norms, target scores and log-sum-exps stay in float32.

    Raises:
        TypeError, ValueError: an argument of the wrong kind; the message names it.
        RuntimeError: a forced backend that cannot run, with the reason.

    Source: Deng et al., ArcFace (2019), equation 4; each margin names its own.
    """
    classes, valid = check_classes(embeddings, weight, labels, ignore_index, sub_centers)
    check_options(reduction, label_smoothing, grad, margin)
    if class_weight is not None:
        check_tensor("class_weight", class_weight, "[C]", 1)
        if class_weight.shape[0] != classes.number:
            raise ValueError(
                f"class_weight: expected [{classes.number}], one for each class, "
                f"got {list(class_weight.shape)}"
            )
    x = classes.embeddings
    s = row_scale(margin, scale, x)
    state = state_of(margin, state, s)
    cosine = None
    if margin.hardens_negatives:
        cosine = target_cosine(classes, margin)
        state = margin.update(state, cosine, s.detach(), valid)
    rows = negatives(
        classes,
        s,
        valid,
        margin=margin,
        state=state,
        cosine=cosine,
        class_weight=class_weight,
        interclass_filter=interclass_filter,
        with_total=label_smoothing > 0,
        memory_budget=memory_budget,
        backend=backend,
    )
    if not margin.hardens_negatives:
        norm = rows.embedding_norm.detach()
        state = margin.update(state, rows.target.detach(), norm, valid)
    losses = losses_of_rows(
        rows,
        s,
        valid,
        labels=classes.labels,
        classes=classes.number,
        margin=margin,
        state=state,
        label_smoothing=label_smoothing,
        class_weight=class_weight,
        grad=grad,
        backend=backend,
    )
    loss = reduce_rows(losses.loss, losses.extra, losses.weight, valid, reduction)
    results = [loss, *((losses.lse,) if return_lse else ())]
    results += [state] if margin.state_size else []
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
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The logits ``[N, C]`` of margin softmax, for those who want them.

    Rows without a target have every class's plain logit. Arguments, gradient and errors as
    :func:`margin_softmax_loss` has them.

    Returns:
        The logits, in float32 (float64 for float64 inputs); with a margin that has a state,
        ``(logits, state)``.
    """
    classes, valid = check_classes(embeddings, weight, labels, ignore_index, sub_centers)
    check_options("mean", 0.0, grad, margin)
    x = classes.embeddings
    s = row_scale(margin, scale, x)
    state = state_of(margin, state, s)
    cosine = None
    if margin.hardens_negatives:
        cosine = target_cosine(classes, margin)
        state = margin.update(state, cosine, s.detach(), valid)
    scores, target, norm, weight_norm = _SCORES.choose(backend, x.device.type)(
        x,
        classes.weight,
        classes.labels,
        s,
        *hard_negatives(margin, state, cosine, valid, s),
        interclass_filter,
        classes.sub_centers,
        margin.normalize_embeddings,
        margin.normalize_weight,
        classes.bfloat16_products,
    )
    if not margin.hardens_negatives:
        state = margin.update(state, target.detach(), norm.detach(), valid)
    rows = Rows(target, s, s, norm, weight_norm)
    own = target_logit(rows, s, margin=margin, state=state, grad=grad, backend=backend)
    column = classes.labels.clamp(min=0)[:, None]
    own = torch.where(valid, own, scores.gather(1, column)[:, 0])
    logits = scores.scatter(1, column, own[:, None])
    return (logits, state) if margin.state_size else logits  # type: ignore[return-value]


def check_classes(
    embeddings: Tensor,
    weight: Tensor,
    labels: Tensor,
    ignore_index: int | None,
    sub_centers: int,
) -> tuple[Classes, Tensor]:
    """The operands, checked and brought into one form, and which rows count."""
    check_tensor("embeddings", embeddings, "[N, D]", 2)
    check_tensor("weight", weight, "[C, D] or [C, k, D]", 3 if _rank(weight) == 3 else 2)
    check_tensor("labels", labels, "[N]", 1)
    check_floating("embeddings", embeddings)
    check_floating("weight", weight)
    check_same("embeddings", embeddings, "weight", weight)
    n, dim = embeddings.shape
    if weight.dim() == 3:
        if sub_centers not in (1, weight.shape[1]):
            raise ValueError(
                f"sub_centers: expected {weight.shape[1]}, the second dimension of weight, "
                f"got {sub_centers}"
            )
        sub_centers = weight.shape[1]
        weight = weight.flatten(0, 1)
    if sub_centers < 1 or weight.shape[0] % max(sub_centers, 1) != 0:
        raise ValueError(
            f"sub_centers: expected a divisor of the {weight.shape[0]} rows of weight, "
            f"got {sub_centers}"
        )
    if weight.shape[1] != dim or weight.shape[0] == 0:
        raise ValueError(
            f"weight: expected [C, {dim}] with at least one class, got {list(weight.shape)}"
        )
    if labels.shape[0] != n:
        raise ValueError(f"labels: expected [{n}], one a row, got {list(labels.shape)}")
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise TypeError(f"labels: expected integers, got {labels.dtype}")
    if labels.device != embeddings.device:
        raise ValueError(
            f"labels: expected the device of embeddings, {embeddings.device}, got {labels.device}"
        )
    labels = labels.long()
    valid = valid_rows(labels, ignore_index)
    operands = Classes(
        embeddings.to(weight.dtype),
        weight,
        torch.where(valid, labels, -1),
        sub_centers,
        multiplies_in_bfloat16(weight),
    )
    return operands, valid


def _rank(value: object) -> int:
    return value.dim() if isinstance(value, Tensor) else 0


def check_options(reduction: str, label_smoothing: float, grad: str, margin: Margin) -> None:
    if not isinstance(margin, Margin):
        raise TypeError(
            f"margin: expected one of fastzoo.ops's margins, got {type(margin).__name__}"
        )
    check_reduction(reduction)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing: expected 0 to 1, got {label_smoothing}")
    if grad not in ("exact", "insightface"):
        raise ValueError(f"grad: expected exact or insightface, got {grad!r}")


def row_scale(margin: Margin, scale: float | Tensor | None, embeddings: Tensor) -> Tensor:
    """What multiplies each row's scores ``[N]``."""
    n, dtype = embeddings.shape[0], compute_dtype(embeddings)
    if scale is None:
        scale = margin.default_scale
    if isinstance(scale, Tensor) and scale.shape not in ((), (1,), (n,)):
        raise ValueError(f"scale: expected a number or [{n}], got {list(scale.shape)}")
    rows = per_row(scale, embeddings.new_empty(n, dtype=dtype))
    if margin.scales_by_norm:
        rows = rows * safe_norm(embeddings.to(dtype))
    return rows


def state_of(margin: Margin, state: Tensor | None, like: Tensor) -> Tensor:
    """The running state a call starts from, in the dtype and on the device of ``like``."""
    if state is None:
        return margin.initial_state(like.detach())
    if state.shape != (margin.state_size,):
        raise ValueError(f"state: expected [{margin.state_size}], got {list(state.shape)}")
    return state.detach().to(like)


@torch.no_grad()
def target_cosine(classes: Classes, margin: Margin) -> Tensor:
    """The score of each row's own class ``[N]``, 0 where it has none; without gradient."""
    x, k = classes.embeddings, classes.sub_centers
    dtype = compute_dtype(x)
    index = classes.labels.clamp(0, classes.number - 1)
    own = classes.weight.view(-1, k, x.shape[1])[index].to(dtype)
    dots = (own * x.to(dtype)[:, None]).sum(2)
    if margin.normalize_weight:
        dots = dots * inverse(safe_norm(own))
    if margin.normalize_embeddings:
        dots = dots * inverse(safe_norm(x.to(dtype)))[:, None]
    return torch.where(classes.labels >= 0, dots.amax(1), 0)


def hard_negatives(
    margin: Margin, state: Tensor, cosine: Tensor | None, valid: Tensor, like: Tensor
) -> tuple[Tensor, Tensor]:
    """CurricularFace's threshold ``[N]`` and hardness ``[1]``; otherwise nothing, twice."""
    if cosine is None:
        return like.new_empty(0), like.new_empty(0)
    ones = torch.ones_like(cosine)
    m = margin.terms(ones, state).m2
    zeros = torch.zeros_like(cosine)
    threshold = reference.margin_softmax_target(
        cosine, ones, per_row(m, cosine), zeros, "unguarded"
    )
    return torch.where(valid, threshold, math.inf), state


def negatives(
    classes: Classes,
    scale: Tensor,
    valid: Tensor,
    *,
    margin: Margin,
    state: Tensor,
    cosine: Tensor | None = None,
    class_weight: Tensor | None = None,
    interclass_filter: float = 0.0,
    with_total: bool = False,
    memory_budget: int | None = None,
    backend: str | None = None,
) -> Rows:
    """The rows' targets and log-sum-exps over these classes. ``cosine``: CurricularFace's."""
    x = classes.embeddings
    threshold, hardness = hard_negatives(margin, state, cosine, valid, scale)
    factor = scale.new_empty(0) if class_weight is None else class_weight.detach().to(scale)
    plain = classes.sub_centers == 1 and cosine is None and interclass_filter == 0
    wanted = torch.is_grad_enabled() and (x.requires_grad or classes.weight.requires_grad)
    if memory_budget is None:
        memory_budget = KEPT_BYTES if classes.bfloat16_products else 0
    keep = (
        memory_budget > 0
        and plain
        and wanted
        and not with_total
        and not scale.requires_grad
        and _kept_bytes(x.shape[0], classes.number) <= memory_budget
    )
    outputs = _NEGATIVES.choose(backend, x.device.type)(
        x,
        classes.weight,
        classes.labels,
        scale,
        threshold,
        hardness,
        factor,
        interclass_filter,
        classes.sub_centers,
        margin.normalize_embeddings,
        margin.normalize_weight,
        classes.bfloat16_products,
        with_total,
        keep,
    )
    return Rows(*outputs[:5])


def _kept_bytes(rows: int, classes: int) -> int:
    return rows * (2 * classes + 4 * (classes + KEPT_BLOCK - 1) // KEPT_BLOCK)


def target_logit(
    rows: Rows,
    scale: Tensor,
    *,
    margin: Margin,
    state: Tensor,
    grad: str,
    backend: str | None,
) -> Tensor:
    """The logit of each row's own class, the margin applied ``[N]``."""
    by_weight = margin.normalize_embeddings and not margin.normalize_weight
    cosine = rows.target * inverse(rows.weight_norm) if by_weight else rows.target
    rule, *coefficients = margin.terms(rows.embedding_norm, state)
    m1, m2, m3 = (per_row(value, scale) for value in coefficients)
    operator = _TARGET.choose(backend, scale.device.type)
    value = operator(cosine, m1, m2, m3, rule)
    if grad == "insightface":
        value = cosine + (value - cosine).detach()
    if by_weight:
        value = value * rows.weight_norm
    return scale * value  # type: ignore[no-any-return]


def losses_of_rows(
    rows: Rows,
    scale: Tensor,
    valid: Tensor,
    *,
    labels: Tensor,
    classes: int,
    margin: Margin,
    state: Tensor,
    label_smoothing: float = 0.0,
    class_weight: Tensor | None = None,
    grad: str = "exact",
    backend: str | None = None,
) -> Losses:
    """What the rows' scores over all ``classes`` make of each row."""
    own = target_logit(rows, scale, margin=margin, state=state, grad=grad, backend=backend)
    # Never lse - own of two large numbers: where the target wins, what is left is exact.
    loss = torch.logaddexp(rows.lse - own, torch.zeros_like(own))
    lse = own + loss
    row_weight = row_weights(labels, valid, class_weight, loss.dtype)
    if label_smoothing > 0:
        everything: Tensor | float = classes
        if class_weight is not None:
            everything = class_weight.detach().to(loss.dtype).sum()
        smooth = (everything * lse - rows.total - row_weight * own) / classes
        loss = (1 - label_smoothing) * row_weight * loss + label_smoothing * smooth
    else:
        loss = row_weight * loss
    extra = row_extras(margin, rows.embedding_norm, valid)
    return Losses(torch.where(valid, loss, 0), extra, row_weight, torch.where(valid, lse, rows.lse))
