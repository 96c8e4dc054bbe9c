"""The definition of the ``ode_step`` family: weighted sums of tensors, as steps of samplers are.

A step has one to three rows. The value of row r is

    v_r = clamp(sum_k w_rk f_k t_k + sum_{j<r} w_rj v_j + w_r z, -bound_r, bound_r)

with the weights ``w`` of a table, the factor ``f`` of the sample where tensor k is scaled by it,
and counter noise z. Arithmetic is float32, and float64 for float64; what is computed is rounded
once. A weight of zero ignores its tensor whatever that holds.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastzoo.reference.counter_random import counter_normals, counter_words
from fastzoo.reference.precision import compute_dtype

TENSORS, ROWS = 8, 3
# Where in a row of the table: weights of the tensors, of the earlier rows, of the noise; the number
# of its draw; the bound.
EARLIER, NOISE, DRAW, BOUND, WIDTH = 8, 10, 11, 12, 13
_ROUNDING_DRAW = 1 << 31


def given(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Those that are there: an absent one is empty."""
    return [t for k, t in enumerate(tensors) if k == 0 or t.dim() != 1 or t.numel()]


def _samples(t: Tensor) -> Tensor:
    """One row a sample."""
    return t.reshape(t.shape[0], t.numel() // max(t.shape[0], 1))


def _row(table: Tensor, step: Tensor) -> Tensor:
    """``[Q, R, 13]`` of this step, found on the device."""
    return table.index_select(0, step)[0] if step.numel() else table[0]


def _weights(
    coefficients: Tensor, factor: Tensor, scaled: int, count: int, dtype: torch.dtype
) -> Tensor:
    """``[Q or B, R, count]``: of the tensors, the factor in them."""
    weights = coefficients[:, :, :count].to(dtype)
    if not factor.numel() or not scaled:
        return weights
    marked = torch.tensor([bool(scaled >> k & 1) for k in range(count)], device=weights.device)
    scales = torch.where(marked, factor.to(dtype)[:, None, None], 1)
    return weights * scales


def _rows(
    tensors: list[Tensor],
    coefficients: Tensor,
    weights: Tensor,
    threshold: Tensor,
    noise: Tensor | None,
) -> tuple[list[Tensor], list[Tensor]]:
    """The rows' values, and what they were before they were clamped."""
    dtype = weights.dtype
    values: list[Tensor] = []
    sums: list[Tensor] = []
    last = coefficients.shape[1] - 1
    for r in range(last + 1):
        total = torch.zeros_like(tensors[0])
        for k, t in enumerate(tensors):
            weight = weights[:, r, k, None]
            total = total + torch.where(weight == 0, 0, t) * weight
        for j, value in enumerate(values):
            weight = coefficients[:, r, EARLIER + j, None].to(dtype)
            total = total + torch.where(weight == 0, 0, value) * weight
        if r == last and noise is not None:
            total = total + coefficients[:, r, NOISE, None].to(dtype) * noise
        sums.append(total)
        if r < last:
            limit = _limit(coefficients, threshold, r)
            # Not clamp: a bound of NaN (a threshold of NaN) is a NaN, and so is one of the sum.
            total = torch.where(total > limit, limit, torch.where(total < -limit, -limit, total))
            if r == 0 and threshold.numel():
                total = total / limit
        values.append(total)
    return values, sums


def _limit(coefficients: Tensor, threshold: Tensor, r: int) -> Tensor:
    """What row r is clamped to, ``[Q or B, 1]``."""
    if r == 0 and threshold.numel():
        return threshold[:, None]
    return coefficients[:, r, BOUND, None]


def _stochastically(value: Tensor, words: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 rounded up or down, each as likely as it is near."""
    if dtype == torch.bfloat16:
        bits = value.view(torch.int32).long() & 0xFFFFFFFF
        up = ((bits + (words & 0xFFFF)) >> 16) << 16
    else:
        bits = value.view(torch.int32).long() & 0xFFFFFFFF
        up = ((bits + (words & 0x1FFF)) >> 13) << 13
    rounded = torch.where(up >= 1 << 31, up - (1 << 32), up).int().view(torch.float32)
    kept = ~value.isfinite()
    if dtype == torch.float16:
        small = value.abs() < 2.0**-14
        steps = torch.floor(value.abs() * 2.0**24 + (words & 0xFFFFFF).float() * 2.0**-24)
        rounded = torch.where(small, torch.copysign(steps * 2.0**-24, value), rounded)
        kept = kept | (value.abs() > 65504)
    return torch.where(kept, value, rounded).to(dtype)


def ode_step_rows(
    t0: Tensor,
    t1: Tensor,
    t2: Tensor,
    t3: Tensor,
    t4: Tensor,
    t5: Tensor,
    t6: Tensor,
    t7: Tensor,
    table: Tensor,
    step: Tensor,
    factor: Tensor,
    threshold: Tensor,
    keys: Tensor,
    scaled: int,
    keep: int,
    stochastic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The last row's value, and those of rows 0 and 1 whose bit is in ``keep``; see
    :func:`fastzoo.ops.ode_step`."""
    tensors = given((t0, t1, t2, t3, t4, t5, t6, t7))
    dtype = compute_dtype(t0)
    coefficients = _row(table, step)
    weights = _weights(coefficients, factor, scaled, len(tensors), dtype)
    flat = [_samples(t).to(dtype) for t in tensors]
    n = flat[0].shape[1]
    draw = coefficients[:, -1, DRAW, None].long()
    noise = counter_normals(keys, n, draw).to(dtype) if keys.numel() else None
    values, _ = _rows(flat, coefficients.to(dtype), weights, threshold, noise)
    out = values[-1]
    if stochastic and t0.dtype in (torch.float16, torch.bfloat16):
        words = counter_words(keys, n, draw | _ROUNDING_DRAW)
        out = _stochastically(out, words, t0.dtype)
    first, second = (
        values[r].to(t0.dtype).reshape(t0.shape)
        if keep >> r & 1 and r < len(values) - 1
        else t0.new_empty(0)
        for r in range(ROWS - 1)
    )
    return out.to(t0.dtype).reshape(t0.shape), first, second


def ode_step_backward(
    grad_out: Tensor,
    grad_kept: Sequence[Tensor],
    tensors: Sequence[Tensor],
    dtypes: Sequence[torch.dtype],
    table: Tensor,
    step: Tensor,
    factor: Tensor,
    threshold: Tensor,
    scaled: int,
    wants_factor: bool,
) -> tuple[list[Tensor], Tensor | None]:
    """Gradients of the tensors, which have these dtypes, and of the factor. A step of one row
    needs the tensors for the factor's alone."""
    dtype = compute_dtype(grad_out)
    coefficients = _row(table, step).to(dtype)
    weights = _weights(coefficients, factor, scaled, len(dtypes), dtype)
    last = coefficients.shape[1] - 1
    flat = [_samples(t).to(dtype) for t in tensors]
    above = {last: _samples(grad_out).to(dtype)}
    sums = _rows(flat, coefficients, weights, threshold, None)[1] if last else []
    for r in range(last - 1, -1, -1):
        gradient = torch.zeros_like(above[last])
        if grad_kept[r].numel():
            gradient = gradient + _samples(grad_kept[r]).to(dtype)
        for q in range(r + 1, last + 1):
            gradient = gradient + above[q] * coefficients[:, q, EARLIER + r, None]
        limit = _limit(coefficients, threshold, r)
        gradient = torch.where((sums[r] >= -limit) & (sums[r] <= limit), gradient, 0)
        above[r] = gradient / limit if r == 0 and threshold.numel() else gradient

    def weighted(k: int, of: Tensor) -> Tensor:
        total = torch.zeros_like(above[last])
        for r in range(last + 1):
            total = total + above[r] * of[:, r, k, None]
        return total

    grads = [weighted(k, weights).to(kind).reshape(grad_out.shape) for k, kind in enumerate(dtypes)]
    if not wants_factor:
        return grads, None
    each = torch.zeros_like(above[last])
    for k, t in enumerate(flat):
        if scaled >> k & 1:
            share = weighted(k, coefficients)
            each = each + torch.where(share == 0, 0, t) * share
    of_factor = each.sum(1) if factor.shape[0] > 1 else each.sum().view(1)
    return grads, of_factor.to(factor.dtype)


def spread(rows: Tensor) -> Tensor:
    """The standard deviation of each row, with n - 1 in the denominator."""
    deviations = rows - rows.mean(1, keepdim=True)
    return (deviations.square().sum(1) / (rows.shape[1] - 1)).sqrt()


def guidance_factor(cond: Tensor, uncond: Tensor, guidance: Tensor, rescale: float) -> Tensor:
    """``rescale std(cond) / std(guided) + 1 - rescale`` of each sample; see
    :func:`fastzoo.ops.guidance_factor`."""
    dtype = compute_dtype(cond)
    if rescale == 0:
        return torch.ones(cond.shape[0], dtype=dtype, device=cond.device)
    c, u = _samples(cond).double(), _samples(uncond).double()
    guided = u + guidance[:, None] * (c - u)
    return (rescale * spread(c) / spread(guided) + (1 - rescale)).to(dtype)


def step_error(
    t0: Tensor,
    t1: Tensor,
    t2: Tensor,
    t3: Tensor,
    t4: Tensor,
    t5: Tensor,
    t6: Tensor,
    t7: Tensor,
    weights: Tensor,
    factor: Tensor,
    rtol: float,
    atol: float,
) -> Tensor:
    """The mean square of an embedded Runge-Kutta pair's error over its tolerance, of each sample;
    see :func:`fastzoo.ops.step_error`."""
    dtype = compute_dtype(t0)
    before, after, *stages = (
        _samples(t).to(dtype) for t in given((t0, t1, t2, t3, t4, t5, t6, t7))
    )
    error = torch.zeros_like(before)
    for k, stage in enumerate(stages):
        weight = weights[k + 2].to(dtype)
        error = error + torch.where(weight == 0, 0, stage) * weight
    allowed = atol + rtol * torch.maximum(before.abs(), after.abs())
    return (error * factor.to(dtype)[:, None] / allowed).double().square().mean(1)
