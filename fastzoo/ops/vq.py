"""Vector quantisation: the nearest code of a codebook."""

from typing import Any, Literal, overload

import torch
from torch import Tensor

from fastzoo import reference
from fastzoo.ops._checks import check_floating, check_same, check_tensor
from fastzoo.ops._operator import Operator

METRICS = ("l2", "cosine", "dot")


# The operator returns values before indices, as torch.max does.


def _reference(x: Tensor, codebook: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    indices, d = reference.vq_nearest(x, codebook, metric=metric, return_distance=True)
    return d, indices


def _fake(x: Tensor, codebook: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    n = x.shape[0]
    d_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty(n, dtype=d_dtype), x.new_empty(n, dtype=torch.int64)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, codebook, ctx.metric = inputs
    _, indices = output
    ctx.mark_non_differentiable(indices)
    ctx.save_for_backward(x, codebook, indices)


def _backward(ctx: Any, grad_d: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None]:
    x, codebook, indices = ctx.saved_tensors
    overload = _VQ_NEAREST_BACKWARD.like(ctx)
    grad_x, grad_codebook = overload(grad_d, x, codebook, indices, ctx.metric)
    return grad_x, grad_codebook, None


def _fake_backward(
    grad_d: Tensor, x: Tensor, codebook: Tensor, indices: Tensor, metric: str
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), codebook.new_empty(codebook.shape)


_VQ_NEAREST = Operator(
    "vq_nearest(Tensor x, Tensor codebook, str metric) -> (Tensor, Tensor)",
    reference=_reference,
    fake=_fake,
    triton="vq.vq_nearest",
    setup_context=_setup_context,
    backward=_backward,
    autocast=torch.float32,
)

_VQ_NEAREST_BACKWARD = Operator(
    "vq_nearest_backward(Tensor grad_d, Tensor x, Tensor codebook, Tensor indices, str metric)"
    " -> (Tensor, Tensor)",
    reference=reference.vq_nearest_backward,
    fake=_fake_backward,
    has=("reference", "cpu"),
    differentiable_reference=True,
)


@overload
def vq_nearest(
    x: Tensor,
    codebook: Tensor,
    *,
    metric: str = ...,
    return_distance: Literal[False] = ...,
    backend: str | None = ...,
) -> Tensor: ...


@overload
def vq_nearest(
    x: Tensor,
    codebook: Tensor,
    *,
    metric: str = ...,
    return_distance: Literal[True],
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...


def vq_nearest(
    x: Tensor,
    codebook: Tensor,
    *,
    metric: str = "l2",
    return_distance: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The nearest code of each vector, without an N x K matrix in memory.

    The answer is exact and the same bit for bit on every backend: the lowest index whose score is
    the highest, the score computed in float64 and summed over the dimensions in ascending order:
    ``-sum (x - c)^2`` (l2), ``sum x c`` (dot), ``sum x c / max(|c|, 1e-12)`` (cosine). A fast pass
    finds the codes that could win within a proven error bound, and only those are scored exactly,
    so an offset common to ``x`` and ``codebook`` changes no code. A NaN score ranks below every
    other; where all are NaN the index is 0.

    Args:
        x: ``[..., D]``; float32, float64, float16 or bfloat16. Half precision is read exactly.
        codebook: ``[K, D]``, K and D at least 1; dtype and device of ``x``.
        metric: ``l2``, ``cosine`` or ``dot``.
        return_distance: also return ``d``.
        backend: ``auto``, ``reference``, ``cpu``, ``cuda`` or ``triton``; None follows
            :func:`fastzoo.use_backend`.

    Returns:
        int64 indices ``[...]``; with ``return_distance``, ``(indices, d)`` with ``d [...]`` the
        squared distance (l2), the cosine similarity or the dot product of the chosen code, in
        float32 (float64 for float64 inputs).

    Gradient: ``d`` to ``x`` and to the chosen codes, of any order; indices have none.
    Forward-mode derivatives raise. Deterministic. Under autocast it computes in float32.

    Raises:
        TypeError, ValueError: an argument of the wrong kind; the message names it.
        RuntimeError: a forced backend that cannot run, with the reason.

    Source: van den Oord et al., Neural Discrete Representation Learning (2017), equation 1.
    """
    check_tensor("x", x, "[..., D]", -1)
    check_tensor("codebook", codebook, "[K, D]", 2)
    k, dim = codebook.shape
    if x.shape[-1] != dim:
        raise ValueError(
            f"codebook: expected [K, {x.shape[-1]}], the last dimension of x, "
            f"got {list(codebook.shape)}"
        )
    if k == 0 or dim == 0:
        raise ValueError(
            f"codebook: expected at least one code and one dimension, got {list(codebook.shape)}"
        )
    check_floating("x", x)
    check_floating("codebook", codebook)
    check_same("x", x, "codebook", codebook)
    if metric not in METRICS:
        raise ValueError(f"metric: expected one of {METRICS}, got {metric!r}")
    rows = x if x.dim() == 2 else x.reshape(-1, dim)
    d, indices = _VQ_NEAREST.choose(backend, x.device.type)(rows, codebook, metric)
    if x.dim() != 2:
        indices, d = indices.view(x.shape[:-1]), d.view(x.shape[:-1])
    return (indices, d) if return_distance else indices
