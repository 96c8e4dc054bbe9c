"""Monotone splines of polynomials, by their definition alone: linear, quadratic and cubic.

Each maps [0, 1] to itself by a polynomial in each bin, with nflows' parameters; the domain is
scaled to the box that is asked for. The rational-quadratic spline of ``splines.py``, which does
more with as many parameters, is the one that has kernels.

Source: Mueller et al., Neural Importance Sampling (2018), for the first two; Durkan et al.,
Cubic-Spline Flows (2019), with Steffen's derivatives (1990).
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastzoo.reference.precision import compute_dtype
from fastzoo.reference.splines import knots

_LEAST = 1e-3
# Halvings of a bin, after which Newton's two steps are exact in float64.
_HALVINGS = 30

Box = tuple[float, float, float, float]
Polynomial = Callable[[Tensor, bool], tuple[Tensor, Tensor]]


def linear_spline(
    x: Tensor,
    pdf: Tensor,
    **box: Any,
) -> tuple[Tensor, Tensor]:
    """See :func:`fastzoo.ops.linear_spline`."""
    bins = pdf.shape[-1]
    edges = torch.linspace(0, 1, bins + 1, device=x.device, dtype=compute_dtype(x))
    edges = edges.expand(*x.shape, bins + 1)
    heights = knots(_wide(pdf, x), 0.0, 0.0, 1.0, "nflows")

    def polynomial(value: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        at = _bin(heights if inverse else edges, value)
        x0, x1, y0, y1 = at(edges, 0), at(edges, 1), at(heights, 0), at(heights, 1)
        slope = (y1 - y0) / (x1 - x0)
        if inverse:
            return x0 + (value - y0) / slope, -torch.log(slope)
        return y0 + (value - x0) * slope, torch.log(slope)

    return _in_box(x, polynomial, **box)


def quadratic_spline(
    x: Tensor,
    widths: Tensor,
    heights: Tensor,
    **box: Any,
) -> tuple[Tensor, Tensor]:
    """See :func:`fastzoo.ops.quadratic_spline`."""
    edges = knots(_wide(widths, x), _LEAST, 0.0, 1.0, "nflows")
    sizes = edges.diff()
    density = torch.nn.functional.softplus(_wide(heights, x)) + 1e-3
    if density.shape[-1] == widths.shape[-1] - 1:
        # The ends at a density that comes out as 1, as that of the tails.
        first, last = sizes[..., 0] / 2, sizes[..., -1] / 2
        middle = (density[..., :-1] + density[..., 1:]) / 2 * sizes[..., 1:-1]
        area = first * density[..., 0] + last * density[..., -1] + middle.sum(-1)
        end = (area / (1 - first - last))[..., None]
        density = torch.cat([end, density, end], -1)
    area = ((density[..., :-1] + density[..., 1:]) / 2 * sizes).sum(-1, keepdim=True)
    density = _LEAST + (1 - _LEAST) * density / area
    masses = (density[..., :-1] + density[..., 1:]) / 2 * sizes
    sums = pad(pad(masses.cumsum(-1)[..., :-1], (1, 0)), (0, 1), value=1.0)

    def polynomial(value: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        at = _bin(sums if inverse else edges, value)
        x0, width, y0 = at(edges, 0), at(edges, 1) - at(edges, 0), at(sums, 0)
        low, high = at(density, 0), at(density, 1)
        rise = high - low
        if inverse:
            # The quotient in which a rise of zero is nothing special.
            mass = (value - y0) / width
            root = torch.sqrt((low * low + 2 * rise * mass).clamp(min=0))
            th = 2 * mass / (low + root)
            return x0 + th * width, -torch.log(low + th * rise)
        th = (value - x0) / width
        return y0 + width * th * (low + rise * th / 2), torch.log(low + th * rise)

    return _in_box(x, polynomial, **box)


def cubic_spline(
    x: Tensor,
    widths: Tensor,
    heights: Tensor,
    derivative_left: Tensor,
    derivative_right: Tensor,
    **box: Any,
) -> tuple[Tensor, Tensor]:
    """See :func:`fastzoo.ops.cubic_spline`."""
    edges = knots(_wide(widths, x), _LEAST, 0.0, 1.0, "nflows")
    levels = knots(_wide(heights, x), _LEAST, 0.0, 1.0, "nflows")
    sizes, rises = edges.diff(), levels.diff()
    slopes = rises / sizes
    # Steffen: between two bins, what keeps both monotone.
    mean = sizes[..., 1:] * slopes[..., :-1] + sizes[..., :-1] * slopes[..., 1:]
    mean = mean / (sizes[..., 1:] + sizes[..., :-1]) / 2
    inner = 2 * torch.minimum(torch.minimum(slopes[..., :-1], slopes[..., 1:]), mean)
    ends = (
        3 * torch.sigmoid(_wide(raw, x)) * slopes[..., end : end + 1 or None]
        for raw, end in ((derivative_left, 0), (derivative_right, -1))
    )
    left, right = ends
    derivatives = torch.cat([left, inner, right], -1)

    def polynomial(value: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        at = _bin(levels if inverse else edges, value)
        x0, width, y0 = at(edges, 0), at(edges, 1) - at(edges, 0), at(levels, 0)
        slope = (at(levels, 1) - y0) / width
        low, high = at(derivatives, 0), at(derivatives, 1)

        def rise(th: Tensor) -> Tensor:
            third, second = low + high - 2 * slope, 3 * slope - 2 * low - high
            return width * th * (low + th * (second + th * third))

        def derivative(th: Tensor) -> Tensor:
            third, second = low + high - 2 * slope, 3 * slope - 2 * low - high
            return low + th * (2 * second + 3 * third * th)

        if not inverse:
            th = (value - x0) / width
            return y0 + rise(th), torch.log(derivative(th))
        wanted = value - y0
        with torch.no_grad():
            # The root of an increasing function: halved until it is near, whatever its curvature.
            below, above = torch.zeros_like(wanted), torch.ones_like(wanted)
            for _ in range(_HALVINGS):
                middle = (below + above) / 2
                short = rise(middle) < wanted
                below, above = torch.where(short, middle, below), torch.where(short, above, middle)
            th = (below + above) / 2
        # Two of Newton's steps, which carry derivatives of the first and the second order.
        for _ in range(2):
            th = (th - (rise(th) - wanted) / (width * derivative(th))).clamp(0, 1)
        return x0 + th * width, -torch.log(derivative(th))

    return _in_box(x, polynomial, **box)


def _wide(parameter: Tensor, x: Tensor) -> Tensor:
    return parameter.to(compute_dtype(x)).expand(*x.shape, parameter.shape[-1])


def _bin(edges: Tensor, value: Tensor) -> Callable[[Tensor, int], Tensor]:
    """What reads a table at the bin of each value, or ``offset`` further."""
    number = (edges[..., 1:-1] <= value[..., None]).sum(-1, keepdim=True)
    return lambda table, offset: table.gather(-1, number + offset)[..., 0]


def _in_box(
    x: Tensor,
    polynomial: Polynomial,
    *,
    bound: float = 5.0,
    tails: str | None = "linear",
    inverse: bool = False,
    sum_logdet: bool = True,
    domain: Box | None = None,
) -> tuple[Tensor, Tensor]:
    """A map of [0, 1] as one of the box, with the identity beyond, or NaN."""
    left, right, bottom, top = domain or (-bound, bound, -bound, bound)
    low, size, to, scale = left, right - left, bottom, top - bottom
    if inverse:
        low, size, to, scale = bottom, top - bottom, left, right - left
    value = x.to(compute_dtype(x))
    inside = (value >= low) & (value <= low + size)
    y, log = polynomial(torch.where(inside, (value - low) / size, 0.5), inverse)
    y, log = to + scale * y, log + math.log(scale / size)
    beyond, flat = (value, 0.0) if tails == "linear" else (torch.nan, torch.nan)
    y, log = torch.where(inside, y, beyond), torch.where(inside, log, flat)
    return y.to(x.dtype), log.flatten(1).sum(1) if sum_logdet and x.dim() > 1 else log
