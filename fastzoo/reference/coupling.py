"""The definition of the ``coupling`` family: elementwise bijections with their log-determinants.

A coupling changes some elements of a sample by a monotone map whose parameters come from the
others, and sums the logarithms of its derivatives over the sample:

    affine       y = x e^a + t      log dy/dx = a(s)
    additive     y = x + t          log dy/dx = 0
    soft_clip    y = x / (1 + |x| / c)
    logit        y = log u - log(1 - u),  u = c + (1 - 2 c) x
    leaky_relu   y = x where x >= 0, c x elsewhere

``a(s)``, the logarithm of the scale of an unconstrained parameter s, in the conventions in use:

    exp          a = s                           RealNVP
    sigmoid2     e^a = sigmoid(s + 2) + floor    Glow; nflows with floor 1e-3
    tanh         a = c tanh(s)                   RealNVP's own clamp
    atan         a = .636 c atan(s)              FrEIA, whose rounding of 2 / pi this is
    softplus     e^a = softplus(s) + floor       nflows' autoregressive maps
    softclip     a = s / (1 + |s / log c|)       zuko; c is the least slope

Where a mask is true an element passes as it is, and gives its parameters no gradient whatever they
are. Arithmetic is float32, and float64 for float64.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastzoo.reference.precision import compute_dtype

SCALE_MAPS = ("exp", "sigmoid2", "tanh", "atan", "softplus", "softclip")
MAPS = (*SCALE_MAPS, "additive", "soft_clip", "logit", "leaky_relu")
_ATAN = 0.636


def softplus(s: Tensor) -> Tensor:
    """log(1 + e^s) to the last digits in every dtype."""
    return torch.logaddexp(s, torch.zeros_like(s))


def scales(s: Tensor, scale_map: str, constant: float, floor: float) -> tuple[Tensor, Tensor]:
    """The logarithm of the scale, and its derivative by s."""
    if scale_map == "exp":
        return s, torch.ones_like(s)
    if scale_map == "sigmoid2":
        share, rest = torch.sigmoid(s + 2), torch.sigmoid(-s - 2)
        if floor == 0:
            return -softplus(-s - 2), rest
        return torch.log(share + floor), share * rest / (share + floor)
    if scale_map == "tanh":
        t = torch.tanh(s)
        return constant * t, constant * (1 - t * t)
    if scale_map == "atan":
        return _ATAN * constant * torch.atan(s), _ATAN * constant / (1 + s * s)
    if scale_map == "softplus":
        if floor == 0:
            # Far below zero softplus(s) is e^s, which must not vanish before its logarithm.
            far = s < -30
            near = torch.where(far, 0, s)
            plus = softplus(near)
            return (
                torch.where(far, s, torch.log(plus)),
                torch.where(far, 1, torch.sigmoid(near) / plus),
            )
        plus = softplus(s) + floor
        return torch.log(plus), torch.sigmoid(s) / plus
    damped = 1 + (s / math.log(constant)).abs()
    return s / damped, 1 / (damped * damped)


def _map(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    name: str,
    constant: float,
    floor: float,
    shift_first: bool,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    """The map or its inverse, and the logarithm of its derivative, of each element."""
    if name in SCALE_MAPS:
        a, _ = scales(scale, name, constant, floor)
        if inverse:
            y = x * torch.exp(-a) - shift if shift_first else (x - shift) * torch.exp(-a)
            return y, -a
        return ((x + shift) * torch.exp(a) if shift_first else x * torch.exp(a) + shift), a
    if name == "additive":
        return (x - shift if inverse else x + shift), torch.zeros_like(x)
    if name == "soft_clip":
        near = x.abs() / constant
        if inverse:
            inside = near < 1
            room = torch.where(inside, 1 - near, torch.nan)
            return x / room, -2 * torch.log(room)
        return x / (1 + near), -2 * torch.log1p(near)
    if name == "logit":
        width = 1 - 2 * constant
        if inverse:
            derivative = -softplus(x) - softplus(-x) - math.log(width)
            return (torch.sigmoid(x) - constant) / width, derivative
        u = constant + width * x
        low, high = torch.log(u), torch.log(1 - u)
        return low - high, math.log(width) - low - high
    slope = 1 / constant if inverse else constant
    above = x >= 0
    # NaN is neither: it comes out as NaN, with the derivative of a number below zero.
    return torch.where(above, x, slope * x), (~above).to(x.dtype) * math.log(slope)


def _derivatives(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    name: str,
    constant: float,
    floor: float,
    shift_first: bool,
    inverse: bool,
    grad_y: Tensor,
    grad_log: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, shift and scale (zeros where there is none)."""
    zero = torch.zeros_like(x)
    if name in SCALE_MAPS:
        a, slope = scales(scale, name, constant, floor)
        factor = torch.exp(-a if inverse else a)
        grad_x = grad_y * factor
        y, _ = _map(x, shift, scale, name, constant, floor, shift_first, inverse)
        if inverse:
            moved = y + shift if shift_first else y
            grad_shift = -grad_y if shift_first else -grad_x
            return grad_x, grad_shift, (-grad_y * moved - grad_log) * slope
        moved = x + shift if shift_first else x
        return grad_x, (grad_x if shift_first else grad_y), (grad_x * moved + grad_log) * slope
    if name == "additive":
        return grad_y, (-grad_y if inverse else grad_y), zero
    if name == "soft_clip":
        sign, near = torch.sign(x) / constant, x.abs() / constant
        if inverse:
            room = torch.where(near < 1, 1 - near, torch.nan)
            return grad_y / (room * room) + 2 * grad_log * sign / room, zero, zero
        damped = 1 + near
        return grad_y / (damped * damped) - 2 * grad_log * sign / damped, zero, zero
    if name == "logit":
        width = 1 - 2 * constant
        if inverse:
            share, rest = torch.sigmoid(x), torch.sigmoid(-x)
            return grad_y * share * rest / width + grad_log * (rest - share), zero, zero
        u = constant + width * x
        rest = 1 - u
        return width * (grad_y / (u * rest) + grad_log * (1 / rest - 1 / u)), zero, zero
    below = 1 / constant if inverse else constant
    return torch.where(x >= 0, grad_y, below * grad_y), zero, zero


def coupling_rows(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    mask: Tensor,
    begin: int,
    end: int,
    name: str,
    constant: float,
    floor: float,
    shift_first: bool,
    inverse: bool,
    sum_logdet: bool,
) -> tuple[Tensor, Tensor]:
    """``coupling`` of rows ``[R, n]``: columns begin to end are changed, and have the parameters.

    An empty shift, scale or mask is none.
    """
    part, shift, scale, masked = _widened(x, shift, scale, mask, begin, end)
    y, log = _map(part, shift, scale, name, constant, floor, shift_first, inverse)
    if masked is not None:
        y, log = torch.where(masked, part, y), torch.where(masked, 0, log)
    y = torch.cat([x[:, :begin], y.to(x.dtype), x[:, end:]], 1)
    if sum_logdet:
        return y, log.sum(1)
    return y, torch.nn.functional.pad(log, (begin, x.shape[1] - end))


def coupling_backward(
    grad_y: Tensor,
    grad_logdet: Tensor,
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    mask: Tensor,
    begin: int,
    end: int,
    name: str,
    constant: float,
    floor: float,
    shift_first: bool,
    inverse: bool,
    sum_logdet: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, shift and scale, from x as the operator was given it."""
    part, wide_shift, wide_scale, masked = _widened(x, shift, scale, mask, begin, end)
    above = grad_y[:, begin:end].to(part.dtype)
    of_log = grad_logdet[:, None] if sum_logdet else grad_logdet[:, begin:end]
    grads = _derivatives(
        part,
        wide_shift,
        wide_scale,
        name,
        constant,
        floor,
        shift_first,
        inverse,
        above,
        of_log.expand_as(part),
    )
    if masked is not None:
        grads = (
            torch.where(masked, above, grads[0]),
            torch.where(masked, 0, grads[1]),
            torch.where(masked, 0, grads[2]),
        )
    grad_x = torch.cat([grad_y[:, :begin], grads[0].to(x.dtype), grad_y[:, end:]], 1)
    return (
        grad_x,
        grads[1].to(x.dtype) if shift.dim() == 2 else shift.new_empty(0),
        grads[2].to(x.dtype) if scale.dim() == 2 else scale.new_empty(0),
    )


def _widened(
    x: Tensor, shift: Tensor, scale: Tensor, mask: Tensor, begin: int, end: int
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """What changes, its parameters and the mask; parameters that a mask hides are zeros, so that
    neither they nor their derivatives can be more than a number."""
    dtype = compute_dtype(x)
    part = x[:, begin:end].to(dtype)
    zero = torch.zeros_like(part)
    shift = shift.to(dtype) if shift.dim() == 2 else zero
    scale = scale.to(dtype) if scale.dim() == 2 else zero
    if mask.numel() == 0:
        return part, shift, scale, None
    return part, torch.where(mask, 0, shift), torch.where(mask, 0, scale), mask


def coupling(x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """See :func:`fastzoo.ops.coupling`."""
    return coupling_with(coupling_rows, x, *args, **kwargs)


def affine_coupling(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    scale_map: str = "exp",
    bound: float = 2.0,
    slope: float = 1e-3,
    min_scale: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """See :func:`fastzoo.ops.affine_coupling`."""
    constant = slope if scale_map == "softclip" else bound
    return coupling(
        x, shift, scale, map=scale_map, constant=constant, min_scale=min_scale, **kwargs
    )


def additive_coupling(x: Tensor, shift: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """See :func:`fastzoo.ops.additive_coupling`."""
    return coupling(x, shift, map="additive", **kwargs)


def soft_clip(x: Tensor, bound: float = 1.0, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """See :func:`fastzoo.ops.soft_clip`."""
    return coupling(x, map="soft_clip", constant=bound, **kwargs)


def logit(x: Tensor, alpha: float = 0.0, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """See :func:`fastzoo.ops.logit`."""
    return coupling(x, map="logit", constant=alpha, **kwargs)


def leaky_relu(x: Tensor, slope: float = 0.01, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """See :func:`fastzoo.ops.leaky_relu`."""
    return coupling(x, map="leaky_relu", constant=slope, **kwargs)


def coupling_with(
    kernel: Callable[..., tuple[Tensor, Tensor]],
    x: Tensor,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    map: str = "exp",
    constant: float = 1.0,
    min_scale: float = 0.0,
    split: int | None = None,
    shift_first: bool = False,
    inverse: bool = False,
    sum_logdet: bool = True,
) -> tuple[Tensor, Tensor]:
    """``coupling`` by any kernel."""
    rows, begin, end = rows_of(x, split)
    none = x.new_empty(0)
    part = part_shape(x, split)
    masks = none.bool()
    if mask is not None:
        mask = mask if mask.dtype == torch.bool else mask != 0
        masks = (
            mask.expand(part).reshape(rows.shape)
            if is_of_each_sample(mask, part)
            else mask.expand(1, *part[1:]).reshape(rows.shape[1])
        )
    y, logdet = kernel(
        rows,
        none if shift is None else as_rows(shift, part),
        none if scale is None else as_rows(scale, part),
        masks,
        begin,
        end,
        map,
        constant,
        min_scale,
        shift_first,
        inverse,
        sum_logdet,
    )
    return y.view(x.shape), logdet if sum_logdet else logdet.view(x.shape)


def rows_of(x: Tensor, split: int | None) -> tuple[Tensor, int, int]:
    """Samples as rows, and the columns of them that change: all but the first ``split`` entries
    of dimension 1, or all but the last ``-split``."""
    columns = math.prod(x.shape[1:])
    rows = x.reshape(x.shape[0], columns)
    if split is None:
        return rows, 0, columns
    inner = math.prod(x.shape[2:])
    return (rows, split * inner, columns) if split > 0 else (rows, 0, columns + split * inner)


def part_shape(x: Tensor, split: int | None) -> tuple[int, ...]:
    """The shape of what changes."""
    if split is None:
        return tuple(x.shape)
    return (x.shape[0], x.shape[1] - abs(split), *x.shape[2:])


def is_of_each_sample(value: Tensor, part: tuple[int, ...], trailing: int = 0) -> bool:
    """Whether a tensor that broadcasts to samples differs from one to the next."""
    return value.dim() == len(part) + trailing and (value.shape[0] != 1 or len(part) == 1)


def as_rows(value: Tensor, part: tuple[int, ...], each: tuple[int, ...] = ()) -> Tensor:
    """A parameter as ``[R, m, *each]``, ``each`` being what an element has of it; without a copy
    where it can be: one for all samples keeps stride 0, and a slice of a conditioner's output its
    own strides."""
    columns = math.prod(part[1:])
    if is_of_each_sample(value, part, len(each)):
        return value.expand(*part, *each).reshape(part[0], columns, *each)
    rows = value.expand(1, *part[1:], *each).reshape(1, columns, *each)
    return rows.expand(part[0], columns, *each)
