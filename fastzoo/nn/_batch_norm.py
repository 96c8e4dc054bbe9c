"""Batch normalisation from moments: of what its layer reads, so that what it normalises need never
be stored.

The statistics of ``z = W h + b`` follow from the mean and the covariance of h: the mean is
``W mean + b`` and the variance ``diag(W covariance W^T)``. The normalisation is then a scale and a
shift, which fold into W and b before a single z is made.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastzoo.nn._state import updates_state
from fastzoo.reference.precision import compute_dtype

# Rows of which one product makes a covariance, and which are centred at a time.
_ROWS = 8192

Layer = tuple[Tensor, Tensor]
Stage = tuple[nn.Module, _BatchNorm]


class Moments(NamedTuple):
    """Of some vectors: mean ``[C]``, covariance ``[C, C]`` or variance ``[C]``, and number."""

    mean: Tensor
    spread: Tensor
    number: Tensor


def stages(convs: nn.ModuleList, norms: nn.ModuleList) -> list[Stage]:
    """Layers, each with the normalisation after it."""
    for norm in norms:
        if isinstance(norm, nn.SyncBatchNorm):
            raise TypeError(
                "SyncBatchNorm: moments are those of this process's points; "
                "keep nn.BatchNorm in point layers"
            )
    return list(zip(convs, norms, strict=True))  # type: ignore[arg-type]


def uses_batch(norm: _BatchNorm) -> bool:
    """Whether it normalises by the batch's moments instead of its running ones."""
    return norm.training or norm.running_mean is None


def scale_and_shift(norm: _BatchNorm, batch: Moments | None) -> Layer:
    """What ``norm`` does: ``z * scale + shift``, by the mean and variance of z in the batch, which
    enter the running ones; None where :func:`uses_batch` says that only those count."""
    if batch is None:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        mean, variance = norm.running_mean, norm.running_var
    else:
        mean, variance, count = batch
        if updates_state(norm) and norm.running_mean is not None:
            _track(norm, mean.detach(), variance.detach() * (count / (count - 1).clamp(min=1)))
    scale = torch.rsqrt(variance + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight
    shift = -mean * scale
    return scale, shift if norm.bias is None else shift + norm.bias


@torch.no_grad()
def _track(norm: _BatchNorm, mean: Tensor, variance: Tensor) -> None:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked.add_(1)
    share: Any = norm.momentum
    if share is None:
        share = (1 / norm.num_batches_tracked).to(norm.running_mean.dtype)
    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), share)
    norm.running_var.lerp_(variance.to(norm.running_var.dtype), share)


def fold(conv: nn.Module, norm: _BatchNorm, inputs: Moments | None) -> Layer:
    """Weight ``[O, I]`` and bias ``[O]`` of a layer and the normalisation after it, in one, no
    narrower than float32; by the moments of the layer's inputs in the batch, None where
    :func:`uses_batch` is false."""
    weight, bias = weight_and_bias(conv)
    weight, bias = (t.to(compute_dtype(weight)) for t in (weight, bias))
    with torch.autocast(weight.device.type, enabled=False):
        batch = None
        if inputs is not None:
            mean, covariance = (t.to(weight.dtype) for t in inputs[:2])
            outputs = (weight * mean).sum(1) + bias
            variance = ((weight @ covariance) * weight).sum(1).clamp(min=0)
            batch = Moments(outputs, variance, inputs.number)
        scale, shift = scale_and_shift(norm, batch)
        return weight * scale[:, None], bias * scale + shift


def weight_and_bias(conv: nn.Module) -> Layer:
    """Of a linear layer or a convolution of one point: ``[O, I]`` and ``[O]``."""
    weight, bias = conv.weight, conv.bias
    assert isinstance(weight, Tensor)
    return weight.flatten(1), weight.new_zeros(len(weight)) if bias is None else bias  # type: ignore[return-value]


def moments(rows: Tensor, valid: Tensor | None = None) -> Moments:
    """Of the rows ``[..., C]``, or of those where ``valid [...]`` is true. Only the rows are kept
    for the gradient, and sums are in double."""
    rows = rows.flatten(0, -2)
    if valid is None:
        count = torch.full((), len(rows), dtype=torch.float64, device=rows.device)
    else:
        valid = valid.flatten()
        count = valid.sum(dtype=torch.float64)
    mean, covariance = _Moments.apply(rows, valid, count.clamp(min=1))  # type: ignore[no-untyped-call]
    return Moments(mean, covariance, count)


def together(parts: list[Moments]) -> Moments:
    """The moments, with a covariance, of all the vectors of which ``parts`` are the moments."""
    count = torch.stack([part.number for part in parts]).sum()
    total = count.clamp(min=1)
    mean = torch.stack([part.mean * (part.number / total) for part in parts]).sum(0)
    spreads = [
        (part.spread + torch.outer(part.mean - mean, part.mean - mean)) * (part.number / total)
        for part in parts
    ]
    return Moments(mean, torch.stack(spreads).sum(0), count)


class _Moments(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, valid: Tensor | None, count: Tensor
    ) -> tuple[Tensor, Tensor]:
        dtype = compute_dtype(rows)
        chunks: list[Any] = [(part, None) for part in rows.split(_ROWS)]
        if valid is not None:
            marks = valid[:, None].split(_ROWS)
            chunks = [(part, mark) for (part, _), mark in zip(chunks, marks, strict=True)]
        mean = rows.new_zeros(rows.shape[1], dtype=torch.float64)
        covariance = rows.new_zeros(2 * (rows.shape[1],), dtype=torch.float64)
        for part, mark in chunks:
            mean += (part if mark is None else torch.where(mark, part, 0)).sum(
                0, dtype=torch.float64
            )
        mean = (mean / count).to(dtype)
        with torch.autocast(rows.device.type, enabled=False):
            for part, mark in chunks:
                centred = part.to(dtype) - mean
                if mark is not None:
                    centred = torch.where(mark, centred, 0)
                covariance += centred.T @ centred
        ctx.save_for_backward(rows, valid, count, mean)
        return mean, (covariance / count).to(dtype)

    @staticmethod
    def backward(ctx: Any, grad_mean: Tensor, grad_spread: Tensor) -> tuple[Tensor, None, None]:
        rows, valid, count, mean = ctx.saved_tensors
        both = (grad_spread + grad_spread.T) / count.to(mean.dtype)
        grad = torch.addmm(
            grad_mean / count.to(mean.dtype) - mean @ both, rows.to(mean.dtype), both
        )
        if valid is not None:
            grad = torch.where(valid[:, None], grad, 0)
        return grad.to(rows.dtype), None, None
