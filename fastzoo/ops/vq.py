"""Vector quantisation: the nearest codes of a codebook, and what training makes of them."""

from typing import Any, Literal, overload

import torch
from torch import Tensor

from fastzoo import reference
from fastzoo.ops._checks import (
    check_choice,
    check_count,
    check_floating,
    check_same,
    check_tensor,
)
from fastzoo.ops._operator import Operator
from fastzoo.reference.precision import compute_dtype
from fastzoo.reference.vq import VQOutput, flat, mean_loss, statistics_by_head

METRICS = ("l2", "cosine", "dot")
PRECISIONS = ("exact", "fast")
ESTIMATORS = ("ste", "rotation", "none")


# The operators take vectors [N, D] with a codebook [K, D], or [N, H, D] with [H, K, D]; no mask is
# one of no elements. They return values before indices, as torch.max does.


def _reference_nearest(
    x: Tensor, codebook: Tensor, mask: Tensor, metric: str, k: int, precision: str
) -> tuple[Tensor, Tensor]:
    indices, d = reference.vq_nearest(
        x, codebook, k=k or None, metric=metric, mask=_given(mask, x), return_distance=True
    )
    return d, indices


def _given(mask: Tensor, x: Tensor) -> Tensor | None:
    # Of no vectors, a mask of no elements is one of all, and no mask.
    return mask if mask.shape[0] == x.shape[0] else None


def _fake_nearest(
    x: Tensor, codebook: Tensor, mask: Tensor, metric: str, k: int, precision: str
) -> tuple[Tensor, Tensor]:
    shape = (*x.shape[:-1], k) if k else x.shape[:-1]
    return x.new_empty(shape, dtype=compute_dtype(x)), x.new_empty(shape, dtype=torch.int64)


def _setup_nearest(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, codebook, _, ctx.metric, ctx.k, _ = inputs
    _, indices = output
    ctx.mark_non_differentiable(indices)
    ctx.save_for_backward(x, codebook, indices)


def _backward_nearest(ctx: Any, grad_d: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    x, codebook, indices = ctx.saved_tensors
    k = ctx.k or 1
    rows, codes, chosen = flat(x, codebook, indices.movedim(-1, 0) if ctx.k else indices)
    if ctx.k:
        # The k choices of a vector one after the other, each for all the vectors.
        rows, grad_d = rows.repeat(k, 1), grad_d.movedim(-1, 0)
    backward = _VQ_NEAREST_BACKWARD.like(ctx)
    grad_rows, grad_codes = backward(grad_d.reshape(-1), rows, codes, chosen, ctx.metric)
    if ctx.k:
        grad_rows = grad_rows.view(k, *x.shape).sum(0)
    return grad_rows.view(x.shape), grad_codes.view(codebook.shape), None, None, None, None


def _fake_nearest_backward(
    grad_d: Tensor, x: Tensor, codebook: Tensor, indices: Tensor, metric: str
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), codebook.new_empty(codebook.shape)


_VQ_NEAREST = Operator(
    "vq_nearest(Tensor x, Tensor codebook, Tensor mask, str metric, int k, str precision)"
    " -> (Tensor, Tensor)",
    reference=_reference_nearest,
    fake=_fake_nearest,
    triton="vq.vq_nearest",
    setup_context=_setup_nearest,
    backward=_backward_nearest,
    autocast=torch.float32,
)

_VQ_NEAREST_BACKWARD = Operator(
    "vq_nearest_backward(Tensor grad_d, Tensor x, Tensor codebook, Tensor indices, str metric)"
    " -> (Tensor, Tensor)",
    reference=reference.vq_nearest_backward,
    fake=_fake_nearest_backward,
    has=("reference", "cpu"),
    differentiable_reference=True,
)


def _reference_quantize(
    x: Tensor,
    codebook: Tensor,
    mask: Tensor,
    metric: str,
    precision: str,
    estimator: str,
    codebook_weight: float,
    beta: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return reference.vq_quantize_rows(
        x,
        codebook,
        metric=metric,
        mask=_given(mask, x),
        estimator=estimator,
        codebook_weight=codebook_weight,
        beta=beta,
    )


def _fake_quantize(x: Tensor, codebook: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    losses = x.new_empty(x.shape[:-1], dtype=compute_dtype(x))
    return x.new_empty(x.shape), losses, x.new_empty(x.shape[:-1], dtype=torch.int64)


def _setup_quantize(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]
) -> None:
    x, codebook, _, _, _, *ctx.options = inputs
    quantized, _, indices = output
    ctx.mark_non_differentiable(indices)
    # A codebook without a gradient may be updated before the backward, by its statistics.
    ctx.save_for_backward(x, codebook if ctx.needs_input_grad[1] else quantized, indices)


def _backward_quantize(
    ctx: Any, grad_quantized: Tensor, grad_losses: Tensor, _: Tensor
) -> tuple[Tensor | None, ...]:
    x, codes, indices = ctx.saved_tensors
    learns = ctx.needs_input_grad[1]
    if learns:
        rows, every, chosen = flat(x, codes, indices)
    else:
        # Each row has its code beside it.
        rows, every = x.reshape(-1, x.shape[-1]), codes.detach().reshape(-1, x.shape[-1])
        own = torch.arange(len(rows), device=x.device)
        chosen = torch.where(indices.reshape(-1) < 0, -1, own)
    grad_x, grad_codebook = _VQ_QUANTIZE_BACKWARD.like(ctx)(
        grad_quantized.reshape(rows.shape),
        grad_losses.reshape(-1),
        rows,
        every,
        chosen,
        *ctx.options,
        learns,
    )
    none = (None,) * 6
    return grad_x.view(x.shape), grad_codebook.view(codes.shape) if learns else None, *none


def _fake_quantize_backward(
    grad_quantized: Tensor, grad_losses: Tensor, x: Tensor, codebook: Tensor, *args: Any
) -> tuple[Tensor, Tensor]:
    codes, dim = codebook.shape
    return x.new_empty(x.shape), codebook.new_empty(codes if args[-1] else 0, dim)


_VQ_QUANTIZE = Operator(
    "vq_quantize(Tensor x, Tensor codebook, Tensor mask, str metric, str precision, str estimator,"
    " float codebook_weight, float beta) -> (Tensor, Tensor, Tensor)",
    reference=_reference_quantize,
    fake=_fake_quantize,
    triton="vq.vq_quantize",
    setup_context=_setup_quantize,
    backward=_backward_quantize,
    autocast=torch.float32,
)

_VQ_QUANTIZE_BACKWARD = Operator(
    "vq_quantize_backward(Tensor grad_quantized, Tensor grad_losses, Tensor x, Tensor codebook,"
    " Tensor indices, str estimator, float codebook_weight, float beta, bool wants_codebook)"
    " -> (Tensor, Tensor)",
    reference=reference.vq_quantize_backward,
    fake=_fake_quantize_backward,
    has=("reference", "cpu", "triton"),
    triton="vq_codes.vq_quantize_backward",
    differentiable_reference=True,
)


def _fake_statistics(x: Tensor, indices: Tensor, codes: int) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(x)
    return x.new_empty(codes, dtype=dtype), x.new_empty(codes, x.shape[1], dtype=dtype)


def _setup_statistics(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, indices, _ = inputs
    ctx.mark_non_differentiable(output[0])
    ctx.save_for_backward(indices)
    ctx.dtype = x.dtype


def _backward_statistics(ctx: Any, _: Tensor, grad_sums: Tensor) -> tuple[Tensor, None, None]:
    (indices,) = ctx.saved_tensors
    grad = torch.where(indices[:, None] < 0, 0, grad_sums[indices.clamp(min=0)])
    return grad.to(ctx.dtype), None, None


_VQ_STATISTICS = Operator(
    "vq_statistics(Tensor x, Tensor indices, SymInt codes) -> (Tensor, Tensor)",
    reference=reference.vq_statistics,
    fake=_fake_statistics,
    triton="vq_codes.vq_statistics",
    setup_context=_setup_statistics,
    backward=_backward_statistics,
    autocast=torch.float32,
)


@overload
def vq_nearest(
    x: Tensor,
    codebook: Tensor,
    *,
    k: int | None = ...,
    metric: str = ...,
    mask: Tensor | None = ...,
    precision: str = ...,
    return_distance: Literal[False] = ...,
    backend: str | None = ...,
) -> Tensor: ...


@overload
def vq_nearest(
    x: Tensor,
    codebook: Tensor,
    *,
    k: int | None = ...,
    metric: str = ...,
    mask: Tensor | None = ...,
    precision: str = ...,
    return_distance: Literal[True],
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...


def vq_nearest(
    x: Tensor,
    codebook: Tensor,
    *,
    k: int | None = None,
    metric: str = "l2",
    mask: Tensor | None = None,
    precision: str = "exact",
    return_distance: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The nearest codes of each vector, without an N x K matrix in memory.

    The answer is exact and the same bit for bit on every backend: the lowest index whose score is
    the highest, the score computed in float64 and summed over the dimensions in ascending order:
    ``-sum (x - c)^2`` (l2), ``sum x c`` (dot), ``sum x c / max(|c|, 1e-12)`` (cosine). A fast pass,
    in low precision where the machine multiplies that faster, finds the codes that could win within
    a proven error bound, and only those are scored exactly, so an offset common to ``x`` and
    ``codebook`` changes no code. A NaN score ranks below every other; where all are NaN the index
    is 0.

    Args:
        x: ``[..., D]``, or ``[..., H, D]`` where the codebook has heads; float32, float64, float16
            or bfloat16. Half precision is read exactly.
        codebook: ``[K, D]``, K and D at least 1, or ``[H, K, D]``: head h of each vector meets the
            codes of ``codebook[h]``. Dtype and device of ``x``.
        k: how many codes of each vector, 1 to K; best first, ties by lower index. None: the best
            alone, without a dimension for it. GPU kernels take k up to 64.
        metric: ``l2``, ``cosine`` or ``dot``.
        mask: bool, the shape of ``x`` without D (and H): where it is false the index is -1 and
            ``d`` is 0.
        precision: ``exact``; or ``fast``: the low-precision pass decides alone. Its code's score is
            below the best one by at most ``(2^-7 + D 2^-20) (|x'| + |c'|)^2``, where x' and c' are
            the vector and the longest code less the mean code (l2), the vector and a unit vector
            (cosine), or both as they are (dot). A backend without low-precision products, and
            float64, give the exact answer.
        return_distance: also return ``d``.
        backend: ``auto``, ``reference``, ``cpu``, ``cuda`` or ``triton``; None follows
            :func:`fastzoo.use_backend`.

    Returns:
        int64 indices ``[...]``, ``[..., H]`` with heads, and one more dimension of k where k is
        given; with ``return_distance``, ``(indices, d)`` with ``d`` of that shape the squared
        distance (l2), the cosine similarity or the dot product of the chosen code, in float32
        (float64 for float64 inputs).

    Gradient: ``d`` to ``x`` and to the chosen codes, of any order; indices have none.
    Forward-mode derivatives raise. Deterministic. Under autocast it computes in float32.

    Raises:
        TypeError, ValueError: an argument of the wrong kind; the message names it.
        RuntimeError: a forced backend that cannot run, with the reason.

    Source: van den Oord et al., Neural Discrete Representation Learning (2017), equation 1.
    """
    check_choice("metric", metric, METRICS)
    check_choice("precision", precision, PRECISIONS)
    rows, no_mask = _checked(x, codebook, mask)
    if k is not None:
        if isinstance(k, bool) or not isinstance(k, int):
            raise TypeError(f"k: expected an int, got {type(k).__name__}")
        if not 1 <= k <= codebook.shape[-2]:
            raise ValueError(f"k: expected 1 to {codebook.shape[-2]}, the codes, got {k}")
    overload = _VQ_NEAREST.choose(backend, x.device.type)
    d, indices = overload(rows, codebook, no_mask, metric, k or 0, precision)
    if rows is not x:
        shape = (*x.shape[:-1], k) if k else x.shape[:-1]
        indices, d = indices.view(shape), d.view(shape)
    return (indices, d) if return_distance else indices


def _checked(x: Tensor, codebook: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The vectors as the operators take them, ``[N, D]`` or ``[N, H, D]``, and the mask."""
    check_tensor("x", x, "[..., D]", -1)
    heads = isinstance(codebook, Tensor) and codebook.dim() == 3
    check_tensor("codebook", codebook, "[K, D] or [H, K, D]", 3 if heads else 2)
    dim = codebook.shape[-1]
    if x.shape[-1] != dim:
        raise ValueError(
            f"codebook: expected [K, {x.shape[-1]}], the last dimension of x, "
            f"got {list(codebook.shape)}"
        )
    if heads and (x.dim() < 2 or x.shape[-2] != codebook.shape[0]):
        raise ValueError(
            f"x: expected [..., {codebook.shape[0]}, {dim}], a vector for each head of the "
            f"codebook, got {list(x.shape)}"
        )
    if 0 in codebook.shape:
        raise ValueError(
            f"codebook: expected at least one code and one dimension, got {list(codebook.shape)}"
        )
    check_floating("x", x)
    check_floating("codebook", codebook)
    check_same("x", x, "codebook", codebook)
    end = 2 if heads else 1
    rows = x if x.dim() == 1 + end else x.reshape(-1, *x.shape[-end:])
    if mask is None:
        return rows, x.new_empty(0, dtype=torch.bool)
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask: expected a tensor, got {type(mask).__name__}")
    if mask.dtype != torch.bool:
        raise TypeError(f"mask: expected bool, got {mask.dtype}")
    if mask.shape != x.shape[:-end]:
        raise ValueError(f"mask: expected {list(x.shape[:-end])}, got {list(mask.shape)}")
    if mask.device != x.device:
        raise ValueError(f"mask: expected the device of x, {x.device}, got {mask.device}")
    return rows, mask.reshape(-1)


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
    backend: str | None = None,
) -> VQOutput:
    """Quantise vectors: nearest code, its gradient estimator and both losses in one pass.

    Nothing of size N x K is kept. Where a row's nearest code is known, the code is gathered and
    the loss computed before the row leaves the cache; the backward reads each row once.

    Args:
        x: ``[..., D]``, or ``[..., H, D]`` where the codebook has heads; float32, float64, float16
            or bfloat16.
        codebook: ``[K, D]`` or ``[H, K, D]``; dtype and device of ``x``.
        beta: weight of the commitment loss, which moves ``x``.
        codebook_weight: weight of the loss that moves the codebook; 0 where statistics move it
            (:func:`vq_ema_update_`).
        legacy: swap the two weights, as the first published code had them.
        estimator: the gradient of ``quantized``: ``ste``, to ``x`` unchanged (straight through);
            ``rotation``, to ``x`` through the map that turns and scales x into its code; ``none``,
            to the codebook alone, as an embedding.
        metric: ``l2``, ``cosine`` or ``dot``: how the code is chosen. The losses are squared
            errors whatever it is.
        mask: bool, the shape of ``x`` without D (and H): where it is false ``quantized`` is ``x``,
            the index is -1, and neither losses nor statistics count the vector.
        precision: ``exact`` or ``fast``, as in :func:`vq_nearest`.
        return_stats: also ``counts`` and ``sums``, a second pass over ``x`` in order of the codes.
        backend: ``auto``, ``reference``, ``cpu``, ``cuda`` or ``triton``; None follows
            :func:`fastzoo.use_backend`.

    Returns:
        VQOutput with
        ``quantized``, shape and dtype of ``x``: the chosen codes themselves, to the last bit;
        ``indices`` int64 ``[...]``, ``[..., H]`` with heads;
        ``loss``, a scalar in float32 (float64 for float64):
        ``codebook_weight mean((sg(x) - c)^2) + beta mean((x - sg(c))^2)`` over the elements of
        unmasked vectors, 0 where there are none;
        ``counts`` ``[K]`` or ``[H, K]`` and ``sums`` ``[K, D]`` or ``[H, K, D]`` of the vectors of
        each code, in the dtype of ``loss`` and without a gradient; empty unless asked for;
        and ``perplexity``, ``exp`` of the entropy of ``counts``.

    Gradient: to ``x`` and ``codebook``, of any order, with the gradient stopped (sg) where the
    losses stop it. A codebook that wants no gradient may be written into before the backward.
    Forward-mode derivatives raise. Deterministic. Under autocast it computes in float32.

    Raises:
        TypeError, ValueError: an argument of the wrong kind; the message names it.
        RuntimeError: a forced backend that cannot run, with the reason.

    Source: van den Oord et al., Neural Discrete Representation Learning (2017), equation 3;
    Fifty et al., Restructuring Vector Quantization with the Rotation Trick (2024).
    """
    check_choice("metric", metric, METRICS)
    check_choice("precision", precision, PRECISIONS)
    check_choice("estimator", estimator, ESTIMATORS)
    rows, checked_mask = _checked(x, codebook, mask)
    if legacy:
        codebook_weight, beta = beta, codebook_weight
    quantized, losses, indices = _VQ_QUANTIZE.choose(backend, x.device.type)(
        rows, codebook, checked_mask, metric, precision, estimator, codebook_weight, beta
    )
    loss = mean_loss(losses, mask, x.shape[-1])
    counts = sums = losses.new_empty(0)
    if return_stats:
        statistics = _VQ_STATISTICS.choose(backend, x.device.type)
        counts, sums = statistics_by_head(rows, codebook, indices, statistics)
    if rows is not x:
        quantized, indices = quantized.view(x.shape), indices.view(x.shape[:-1])
    return VQOutput(quantized, indices, loss, counts, sums)


def vq_statistics(
    x: Tensor, indices: Tensor, codes: int, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """How many vectors each code has, and their sum.

    Args:
        x: ``[..., D]``; float32, float64, float16 or bfloat16.
        indices: int64 ``[...]``, each below ``codes``; a negative one leaves its vector out.
        codes: how many there are.
        backend: ``auto``, ``reference``, ``cpu``, ``cuda`` or ``triton``; None follows
            :func:`fastzoo.use_backend`.

    Returns:
        ``(counts, sums)``: ``[codes]`` and ``[codes, D]``, both float32 (float64 for float64). The
        sums are taken in float64 and rounded once.

    Gradient: ``sums`` to ``x``, of any order. Forward-mode derivatives raise. Deterministic, and on
    a CPU the same for any number of threads. Under autocast it computes in float32.

    Raises:
        TypeError, ValueError: an argument of the wrong kind; the message names it. An index that is
            too large raises on the CPU (RuntimeError, or IndexError of the reference) and is
            undefined on a GPU.
        RuntimeError: a forced backend that cannot run, with the reason.
    """
    check_tensor("x", x, "[..., D]", -1)
    check_floating("x", x)
    check_tensor("indices", indices, "[...]", x.dim() - 1)
    if indices.dtype != torch.int64:
        raise TypeError(f"indices: expected int64, got {indices.dtype}")
    if indices.shape != x.shape[:-1]:
        raise ValueError(f"indices: expected {list(x.shape[:-1])}, got {list(indices.shape)}")
    if indices.device != x.device:
        raise ValueError(f"indices: expected the device of x, {x.device}, got {indices.device}")
    check_count("codes", codes)
    rows, chosen = x.reshape(-1, x.shape[-1]), indices.reshape(-1)
    counts, sums = _VQ_STATISTICS.choose(backend, x.device.type)(rows, chosen, codes)
    return counts, sums


def average_(
    cluster_size: Tensor, embed_avg: Tensor, counts: Tensor, sums: Tensor, decay: float
) -> None:
    """Enter the statistics of a batch into their moving averages."""
    cluster_size.lerp_(counts.to(cluster_size.dtype), 1 - decay)
    embed_avg.lerp_(sums.to(embed_avg.dtype), 1 - decay)


@torch.no_grad()
def vq_ema_update_(
    codebook: Tensor,
    cluster_size: Tensor,
    embed_avg: Tensor,
    counts: Tensor,
    sums: Tensor,
    *,
    decay: float,
    eps: float = 1e-5,
) -> None:
    """Move a codebook towards the vectors of its codes, by exponential moving averages; in place.

    ``cluster_size = decay cluster_size + (1 - decay) counts``, ``embed_avg`` likewise of ``sums``,
    and ``codebook = embed_avg / n`` with the sizes smoothed,
    ``n = (cluster_size + eps) / (total + K eps) total``, ``total = sum cluster_size``. Where the
    total is 0 the codebook stays.

    Quantise first and update afterwards, as the paper does: then indices, output and loss of a step
    all belong to one codebook.

    Args:
        codebook: ``[K, D]`` or ``[H, K, D]``, written.
        cluster_size: ``[K]`` or ``[H, K]``, float32 or float64, written.
        embed_avg: shape of ``codebook``, dtype of ``cluster_size``, written.
        counts, sums: of :func:`vq_quantize` or :func:`vq_statistics`; over many machines, their
            sums.
        decay: in [0, 1].
        eps: of the smoothing.

    Gradient: none. Deterministic.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, before anything is written.

    Source: van den Oord et al. (2017), appendix A.1.
    """
    check_tensor("codebook", codebook, "[..., K, D]", -1)
    check_floating("codebook", codebook)
    size = codebook.shape[:-1]
    for name, value, shape in (
        ("cluster_size", cluster_size, size),
        ("embed_avg", embed_avg, codebook.shape),
        ("counts", counts, size),
        ("sums", sums, codebook.shape),
    ):
        check_tensor(name, value, f"{list(shape)}", -1)
        if value.shape != shape:
            raise ValueError(f"{name}: expected {list(shape)}, got {list(value.shape)}")
        if value.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{name}: expected float32 or float64, got {value.dtype}")
    if not 0 <= decay <= 1:
        raise ValueError(f"decay: expected 0 to 1, got {decay}")
    # Two passes over the matrices and nothing beside them: already what a kernel would move.
    average_(cluster_size, embed_avg, counts, sums, decay)
    total = cluster_size.sum(-1, keepdim=True)
    smoothed = (cluster_size + eps) / (total + size[-1] * eps) * total
    counted = total > 0
    codebook.mul_((~counted)[..., None])
    codebook.addcmul_(
        embed_avg.to(codebook.dtype),
        torch.where(counted, 1 / smoothed, 0)[..., None].to(codebook.dtype),
    )
