"""Contrastive losses over all pairs of two sets of vectors, without their N x M matrix."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from fastzoo import reference
from fastzoo.ops._checks import (
    check_floating,
    check_reduction,
    check_same,
    check_tensor,
    multiplies_in_bfloat16,
)
from fastzoo.ops._collectives import Batch, for_average, log_of_sum, sum_over
from fastzoo.ops._operator import Operator
from fastzoo.reference.contrastive import reduce
from fastzoo.reference.precision import compute_dtype

_PUBLIC = ("clip_loss", "sigmoid_contrastive_loss", "info_nce", "nt_xent")


def _fake(
    queries: Tensor, keys: Tensor, positives: Tensor, scale: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    n, m = queries.shape[0], keys.shape[0]
    columns = args[2]
    return scale.new_empty(n), scale.new_empty(n), scale.new_empty(m if columns else 0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, exclude_self, _, sigmoid, bfloat16 = inputs
    _, row, column = output
    ctx.save_for_backward(*tensors, row, column)
    ctx.options = exclude_self, sigmoid, bfloat16


def _backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad
    overload = _CONTRASTIVE_BACKWARD.like(ctx)
    q, k, scale, bias = overload(
        *grads, *ctx.saved_tensors, *ctx.options, needs[0], needs[1], needs[3] or needs[4]
    )
    return (
        q if needs[0] else None,
        k if needs[1] else None,
        None,
        scale if needs[3] else None,
        bias if needs[4] else None,
        *([None] * 4),
    )


def _fake_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    queries, keys, scale = args[3], args[4], args[6]
    needs_queries, needs_keys, needs_scale = args[-3:]
    return (
        queries.new_empty(queries.shape if needs_queries else (0,)),
        keys.new_empty(keys.shape if needs_keys else (0,)),
        scale.new_empty(1 if needs_scale else 0),
        scale.new_empty(1 if needs_scale else 0),
    )


_CONTRASTIVE = Operator(
    "contrastive(Tensor queries, Tensor keys, Tensor positives, Tensor scale, Tensor bias,"
    " bool exclude_self, bool columns, bool sigmoid, bool bfloat16_products)"
    " -> (Tensor, Tensor, Tensor)",
    public=_PUBLIC,
    reference=reference.contrastive,
    fake=_fake,
    triton="contrastive.contrastive",
    cuda_owner="triton",
    setup_context=_setup_context,
    backward=_backward,
    autocast="off",
)

_CONTRASTIVE_BACKWARD = Operator(
    "contrastive_backward(Tensor grad_positive, Tensor grad_row, Tensor grad_column,"
    " Tensor queries, Tensor keys, Tensor positives, Tensor scale, Tensor bias, Tensor row,"
    " Tensor column, bool exclude_self, bool sigmoid, bool bfloat16_products, bool needs_queries,"
    " bool needs_keys, bool needs_scale) -> (Tensor, Tensor, Tensor, Tensor)",
    public=_PUBLIC,
    reference=reference.contrastive_backward,
    fake=_fake_backward,
    triton="contrastive.contrastive_backward",
    has=("reference", "cpu", "triton"),
    cuda_owner="triton",
    differentiable_reference=True,
    autocast="off",
)


def info_nce(
    q: Tensor,
    k: Tensor,
    *,
    temperature: float | Tensor,
    positives: Tensor | None = None,
    queue: Tensor | None = None,
    symmetric: bool = False,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """Cross-entropy of each query's positive among keys, without the N x M logits in memory.

    The logits are ``q k / temperature``; normalise both first for cosines. The candidates of a
    query are all keys ``k``, the other queries' positives being its negatives; or with ``queue``
    its own positive and the queue alone, as MoCo has it.

    Args:
        q: ``[N, D]``; float32, float64, float16 or bfloat16.
        k: ``[M, D]``, dtype and device of ``q``.
        temperature: a number, or a tensor of one, which has a gradient.
        positives: ``[N]``, the key that is each query's positive; None for key ``n`` of query
            ``n``. An index out of range raises on the CPU; on a GPU its loss is NaN.
        queue: ``[Q, D]``, negatives.
        symmetric: the mean of this loss and of that with queries and keys in each other's place.
            Not with ``queue``.
        reduction: ``mean``, ``sum`` or ``none``.
        backend: ``auto``, ``reference``, ``cpu``, ``cuda`` or ``triton``; None follows
            :func:`fastzoo.use_backend`.

    Returns:
        The loss in float32 (float64 for float64 inputs), a scalar or ``[N]``.

    Gradient: to ``q``, ``k``, ``queue`` and ``temperature``, of any order; the second holds the
    logits. Forward-mode derivatives raise. Deterministic. Under autocast products run in bfloat16;
    scores of positives and log-sum-exps stay in float32.

    Raises:
        TypeError, ValueError: an argument of the wrong kind; the message names it.
        RuntimeError: a forced backend that cannot run, with the reason.

    Source: van den Oord et al., Contrastive Predictive Coding (2018), equation 4; with ``queue``
    He et al., MoCo (2020), equation 1.
    """
    q, k = _check_pair("q", q, "k", k)
    check_reduction(reduction)
    n = q.shape[0]
    if positives is None:
        if k.shape[0] < n:
            raise ValueError(f"k: expected at least {n} keys, one a query, got {k.shape[0]}")
        positives = torch.arange(n, device=q.device)
    else:
        check_tensor("positives", positives, "[N]", 1)
        if positives.shape[0] != n or positives.is_floating_point():
            raise ValueError(
                f"positives: expected {n} integers, got {list(positives.shape)} {positives.dtype}"
            )
        positives = positives.long()
    scale = 1 / _number("temperature", temperature, q)
    if queue is not None:
        if symmetric:
            raise ValueError("symmetric: expected False with queue")
        q, queue = _check_pair("q", q, "queue", queue)
        dtype = compute_dtype(q)
        own = scale * (q.to(dtype) * k[positives].to(dtype)).sum(1)
        nowhere = torch.full_like(positives, -1)
        _, negatives, _ = _scores(q, queue, nowhere, scale, backend=backend)
        return reduce(torch.logaddexp(negatives - own, torch.zeros_like(own)), reduction)
    own, row, column = _scores(q, k, positives, scale, columns=symmetric, backend=backend)
    loss = row - own
    if symmetric:
        loss = (loss + column[positives] - own) / 2
    return reduce(loss, reduction)


def clip_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor | None = None,
    *,
    group: "dist.ProcessGroup | None" = None,
    backend: str | None = None,
) -> Tensor:
    """The mean of image-to-text and text-to-image cross-entropy, without the N x N logits.

    The logits are ``logit_scale (image text) + logit_bias``; row ``n`` of both belong together.
    Rows and columns come from one pass over the products.

    Args:
        image, text: ``[N, D]``, as a rule of norm 1; float32, float64, float16 or bfloat16.
        logit_scale: the factor itself, not its logarithm: a number or a tensor of one.
        logit_bias: a number or a tensor of one; a softmax does not see it.
        group: of torch.distributed. Each rank passes its own pairs, as many as it has, and gets the
            loss of all ranks' pairs. Gradients are multiplied by the number of ranks, so that what
            averages them over the ranks, as DistributedDataParallel does, has those of this loss.
            None: this process alone.
        backend: ``auto``, ``reference``, ``cpu``, ``cuda`` or ``triton``; None follows
            :func:`fastzoo.use_backend`.

    Returns:
        The loss, a scalar in float32 (float64 for float64 inputs).

    Gradient: to ``image``, ``text`` and ``logit_scale``, of any order; the second holds the
    logits. Forward-mode derivatives raise. Deterministic. Under autocast products run in bfloat16;
    scores of pairs and log-sum-exps stay in float32.

    Raises:
        TypeError, ValueError: an argument of the wrong kind; the message names it.
        RuntimeError: a forced backend that cannot run, with the reason.

    Source: Radford et al., CLIP (2021), figure 3.
    """
    pairs = _Pairs(image, text, logit_scale, logit_bias, group)
    positive, row, column = _scores(*pairs.operands, columns=True, backend=backend)
    if pairs.batch is not None:
        exponentials, top = pairs.batch.exponentials(column)
        column = log_of_sum(pairs.batch.scatter_sum(exponentials), top)
    return pairs.mean((row + column) / 2 - positive)


def sigmoid_contrastive_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor | None = None,
    *,
    group: "dist.ProcessGroup | None" = None,
    backend: str | None = None,
) -> Tensor:
    """SigLIP's loss: every pair by itself belongs together or does not; without N x N logits.

    ``-sum_ij log sigmoid(y_ij (logit_scale (image_i text_j) + logit_bias)) / N`` with ``y`` 1 for
    ``i = j`` and -1 elsewhere. Arguments, gradient (also to ``logit_bias``) and errors as
    :func:`clip_loss` has them.

    Source: Zhai et al., SigLIP (2023), equation 1.
    """
    pairs = _Pairs(image, text, logit_scale, logit_bias, group)
    positive, row, _ = _scores(*pairs.operands, sigmoid=True, backend=backend)
    return pairs.mean(row - positive)


def nt_xent(z: Tensor, temperature: float | Tensor, *, backend: str | None = None) -> Tensor:
    """SimCLR's loss: two views of N images, each the other's positive among all other views.

    Args:
        z: ``[2 N, D]``; rows ``i`` and ``i + N`` are views of one image. Normalised here.
        temperature: a number, or a tensor of one, which has a gradient.
        backend: as in :func:`clip_loss`.

    Returns, gradient and errors as :func:`clip_loss` has them.

    Source: Chen et al., SimCLR (2020), equation 1.
    """
    check_tensor("z", z, "[2 N, D]", 2)
    check_floating("z", z)
    n = z.shape[0]
    if n % 2 != 0 or n == 0:
        raise ValueError(f"z: expected an even number of views, two an image, got {n}")
    unit = F.normalize(z.to(compute_dtype(z)))
    if z.dtype == torch.bfloat16:
        unit = unit.to(z.dtype)
    partner = (torch.arange(n, device=z.device) + n // 2) % n
    scale = 1 / _number("temperature", temperature, unit)
    positive, row, _ = _scores(unit, unit, partner, scale, exclude_self=True, backend=backend)
    return (row - positive).mean()


def _check_pair(name: str, first: Tensor, other_name: str, other: Tensor) -> tuple[Tensor, Tensor]:
    check_tensor(name, first, "[N, D]", 2)
    check_tensor(other_name, other, "[M, D]", 2)
    check_floating(name, first)
    check_floating(other_name, other)
    check_same(name, first, other_name, other)
    if other.shape[1] != first.shape[1]:
        raise ValueError(
            f"{other_name}: expected [M, {first.shape[1]}], the last dimension of {name}, "
            f"got {list(other.shape)}"
        )
    # Under autocast the two may differ: the wider one holds both.
    dtype = torch.promote_types(first.dtype, other.dtype)
    return first.to(dtype), other.to(dtype)


def _check_pairs(image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    image, text = _check_pair("image", image, "text", text)
    if image.shape[0] != text.shape[0]:
        raise ValueError(
            f"text: expected {image.shape[0]} rows, one for each image, got {text.shape[0]}"
        )
    return image, text


class _Pairs:
    """Images against texts, the texts being those of all ranks of a group, if there is one."""

    def __init__(
        self,
        image: Tensor,
        text: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None,
        group: "dist.ProcessGroup | None",
    ) -> None:
        image, text = _check_pairs(image, text)
        scale = _number("logit_scale", logit_scale, image)
        bias = _number("logit_bias", 0.0 if logit_bias is None else logit_bias, image)
        own = torch.arange(image.shape[0], device=image.device)
        self.batch: Batch | None = None
        if group is not None:
            self.batch, tensors = Batch.of(group, image.shape[0], image, text, scale, bias)
            image, text, scale, bias = (for_average(t, group) for t in tensors)
            text, own = self.batch.gather(text), own + self.batch.own.start
        self.operands = image, text, own, scale, bias

    def mean(self, loss: Tensor) -> Tensor:
        if self.batch is None:
            return loss.mean()
        return sum_over(loss.sum(), self.batch.group) / sum(self.batch.counts)


def _number(name: str, value: float | Tensor, like: Tensor) -> Tensor:
    """A number as a tensor ``[1]`` of the compute dtype, its gradient kept."""
    dtype = compute_dtype(like)
    if not isinstance(value, Tensor):
        return like.new_full((1,), float(value), dtype=dtype)
    if value.numel() != 1:
        raise ValueError(f"{name}: expected a number, got {list(value.shape)}")
    return value.reshape(1).to(like.device, dtype)


def _scores(
    queries: Tensor,
    keys: Tensor,
    positives: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    exclude_self: bool = False,
    columns: bool = False,
    sigmoid: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator: positive, row and column, as :func:`fastzoo.reference.contrastive` says."""
    device = queries.device.type
    result: tuple[Tensor, Tensor, Tensor] = _CONTRASTIVE.choose(backend, device)(
        queries,
        keys,
        positives,
        scale,
        scale.new_zeros(1) if bias is None else bias,
        exclude_self,
        columns,
        sigmoid,
        multiplies_in_bfloat16(queries),
    )
    return result
