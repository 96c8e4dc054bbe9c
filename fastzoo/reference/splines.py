"""The definition of the ``splines`` family: monotone rational-quadratic splines.

Between knots ``(X_k, Y_k)`` with derivatives ``D_k``, with ``s = h / w`` the slope of the bin's
chord and ``th = (x - X_k) / w`` (Gregory & Delbourgo 1982; Durkan et al. 2019, eqs. 4-8):

    y           = Y_k + h (s th^2 + D_k th (1 - th)) / den
    den         = s + (D_k + D_{k+1} - 2 s) th (1 - th)
    log dy/dx   = 2 log s + log E - 2 log den
    E           = D_{k+1} th^2 + 2 s th (1 - th) + D_k (1 - th)^2

Knots come of unconstrained numbers in two conventions, which are not the same function:

    nflows    w = m + (1 - K m) softmax(u)            D = m + softplus(d)
    zuko      w = softmax(u / (1 + |2 u / log m|))    D = exp(d / (1 + |d / log m|))

m being the least width or derivative of the one and the least slope of the other.

The first and the last knot stand at the ends of the domain exactly. An x at a knot belongs to the
bin above it, one at the right end to the last. Beyond the domain a spline with tails is the
identity, and one without gives NaN. Arithmetic is float32, and float64 for float64.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastzoo.reference.coupling import as_rows, part_shape, rows_of, softplus
from fastzoo.reference.precision import compute_dtype

CONVENTIONS = ("nflows", "zuko")
# What an element has beside K widths and K heights: derivatives at K + this many knots.
TAILS = {"linear": -1, "circular": 0, "none": 1}


class Bin(NamedTuple):
    """The bin that each element is in."""

    number: Tensor
    x: Tensor
    width: Tensor
    y: Tensor
    height: Tensor
    low: Tensor
    high: Tensor


def softclip(u: Tensor, limit: float) -> Tensor:
    """u / (1 + |u / limit|)."""
    return u / (1 + (u / limit).abs())


def knots(u: Tensor, least: float, low: float, high: float, convention: str) -> Tensor:
    """K + 1 ascending places from low to high."""
    bins = u.shape[-1]
    if convention == "nflows":
        shares = least + (1 - bins * least) * torch.softmax(u, -1)
    else:
        shares = torch.softmax(softclip(u, math.log(least) / 2), -1)
    inner = low + (high - low) * shares.cumsum(-1)[..., :-1]
    return pad(pad(inner, (1, 0), value=low), (0, 1), value=high)


def slopes(d: Tensor, least: float, convention: str, tails: str) -> Tensor:
    """The derivatives at K + 1 knots."""
    if convention == "nflows":
        inner = least + softplus(d)
    else:
        inner = torch.exp(softclip(d, math.log(least)))
    if tails == "linear":
        return pad(inner, (1, 1), value=1.0)
    return torch.cat([inner, inner[..., :1]], -1) if tails == "circular" else inner


def bin_of(value: Tensor, x: Tensor, y: Tensor, d: Tensor, inverse: bool) -> Bin:
    """The last bin whose first knot is not above the value."""
    edges = y if inverse else x
    number = (edges[..., 1:-1] <= value[..., None]).sum(-1, keepdim=True)

    def at(table: Tensor, k: Tensor) -> Tensor:
        return table.gather(-1, k)[..., 0]

    x0, y0 = at(x, number), at(y, number)
    return Bin(
        number,
        x0,
        at(x, number + 1) - x0,
        y0,
        at(y, number + 1) - y0,
        at(d, number),
        at(d, number + 1),
    )


def _clamped(value: Tensor, low: float | Tensor, high: float | Tensor) -> Tensor:
    """What rounding put beyond a limit goes back to it; its derivative stays."""
    inside = torch.minimum(
        torch.maximum(value, torch.as_tensor(low, dtype=value.dtype, device=value.device)),
        torch.as_tensor(high, dtype=value.dtype, device=value.device),
    )
    return value + (inside - value).detach()


def place(value: Tensor, b: Bin, inverse: bool) -> Tensor:
    """th: how far into its bin an element is, from x, or for the inverse from y."""
    if not inverse:
        return _clamped((value - b.x) / b.width, 0.0, 1.0)
    # The root of the quadratic that y's formula makes of th, written so that nothing cancels: its
    # discriminant is a sum of squares, and th or 1 - th a quotient of sums, whichever is less.
    s = b.height / b.width
    above = _clamped(value - b.y, torch.zeros_like(value), b.height)
    below = b.height - above
    lean = below * b.low - above * b.high
    root = torch.sqrt(lean * lean + 4 * s * s * above * below)
    from_low = 2 * s * above / (lean.abs() + 2 * s * above + root)
    from_high = 2 * s * below / (lean.abs() + 2 * s * below + root)
    return torch.where(lean >= 0, from_low, 1 - from_high)


def _terms(th: Tensor, b: Bin) -> tuple[Tensor, ...]:
    """s, q, beta, den, A and E of the formulas above, with ``y = Y_k + h A / den``."""
    s, q = b.height / b.width, th * (1 - th)
    bend = b.low + b.high - 2 * s
    chord = s * th * th + b.low * q
    slope = b.high * th * th + 2 * s * q + b.low * (1 - th) * (1 - th)
    return s, q, bend, s + bend * q, chord, slope


def evaluate(th: Tensor, b: Bin, inverse: bool) -> tuple[Tensor, Tensor]:
    """The spline, or its inverse, and the logarithm of its derivative."""
    s, _, _, den, chord, slope = _terms(th, b)
    log = 2 * torch.log(s) + torch.log(slope) - 2 * torch.log(den)
    if inverse:
        return b.x + th * b.width, -log
    return _clamped(b.y + b.height * chord / den, b.y, b.y + b.height), log


def adjoints(
    grad_y: Tensor, grad_log: Tensor, th: Tensor, b: Bin, inverse: bool
) -> tuple[Tensor, ...]:
    """Gradients of the value, X_k, X_{k+1}, Y_k, Y_{k+1}, D_k and D_{k+1}."""
    s, q, bend, den, chord, slope = _terms(th, b)
    by_place = 2 * (b.high * th - b.low * (1 - th))
    if inverse:
        # The total derivative: dx = (dy - the parameters' part of the forward map) / f'.
        log_by_place = (by_place + 2 * s * (1 - 2 * th)) / slope - 2 * bend * (1 - 2 * th) / den
        of_x = grad_y - grad_log * log_by_place / b.width
        grad_value = of_x * den * den / (s * s * slope)
        grad_y, grad_log = -grad_value, -grad_log
    of_ratio = grad_y / den
    of_den = -of_ratio * b.height * chord / den - 2 * grad_log / den
    of_slope = grad_log / slope
    of_chord = of_ratio * b.height
    of_bend = of_den * q
    of_s = 2 * grad_log / s + of_chord * th * th + of_den - 2 * of_bend + 2 * of_slope * q
    of_low = of_chord * q + of_bend + of_slope * (1 - th) * (1 - th)
    of_high = of_bend + of_slope * th * th
    of_q = of_chord * b.low + of_den * bend + 2 * of_slope * s
    of_th = 2 * of_chord * s * th + of_slope * by_place + of_q * (1 - 2 * th)
    of_height = of_ratio * chord + of_s / b.width
    of_width = -(of_s * s + of_th * th) / b.width
    of_value = of_th / b.width
    return (
        grad_value if inverse else of_value,
        -of_value - of_width,
        of_width,
        grad_y - of_height,
        of_height,
        of_low,
        of_high,
    )


class Domain(NamedTuple):
    """The box of a spline and its least sizes, as the operator takes them."""

    left: float
    right: float
    bottom: float
    top: float
    width: float
    height: float
    derivative: float


def unpacked(
    widths: Tensor, heights: Tensor, derivatives: Tensor, bins: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The three parameters, which may stand side by side in the first."""
    if heights.dim() == 3:
        return widths, heights, derivatives
    return widths[..., :bins], widths[..., bins : 2 * bins], widths[..., 2 * bins :]


def rational_quadratic_spline_rows(
    x: Tensor,
    widths: Tensor,
    heights: Tensor,
    derivatives: Tensor,
    begin: int,
    end: int,
    bins: int,
    left: float,
    right: float,
    bottom: float,
    top: float,
    min_width: float,
    min_height: float,
    min_derivative: float,
    convention: str,
    tails: str,
    inverse: bool,
    sum_logdet: bool,
) -> tuple[Tensor, Tensor]:
    """``rational_quadratic_spline`` of rows ``[R, n]``, whose columns begin to end are changed and
    have parameters ``[R, m, ...]``; with heights empty all of them stand side by side in widths.
    """
    domain = Domain(left, right, bottom, top, min_width, min_height, min_derivative)
    dtype = compute_dtype(x)
    part = x[:, begin:end].to(dtype)
    w, h, d = (t.to(dtype) for t in unpacked(widths, heights, derivatives, bins))
    inside, b, th, _ = _located(part, w, h, d, domain, convention, tails, inverse)
    y, log = evaluate(th, b, inverse)
    if tails == "none":
        y, log = torch.where(inside, y, torch.nan), torch.where(inside, log, torch.nan)
    else:
        y, log = torch.where(inside, y, part), torch.where(inside, log, 0)
    y = torch.cat([x[:, :begin], y.to(x.dtype), x[:, end:]], 1)
    return y, log.sum(1) if sum_logdet else pad(log, (begin, x.shape[1] - end))


def _located(
    part: Tensor,
    w: Tensor,
    h: Tensor,
    d: Tensor,
    domain: Domain,
    convention: str,
    tails: str,
    inverse: bool,
) -> tuple[Tensor, Bin, Tensor, list[Tensor]]:
    """Which elements are in the domain, their bins and places, and the parameters; the others are
    at the lower end of a spline of zeros, so that neither they nor their derivatives can be more
    than a number.
    """
    low, high = (domain.bottom, domain.top) if inverse else (domain.left, domain.right)
    inside = (part >= low) & (part <= high)
    value = torch.where(inside, part, low)
    w, h, d = parameters = [torch.where(inside[..., None], t, 0) for t in (w, h, d)]
    b = bin_of(
        value,
        knots(w, domain.width, domain.left, domain.right, convention),
        knots(h, domain.height, domain.bottom, domain.top, convention),
        slopes(d, domain.derivative, convention, tails),
        inverse,
    )
    return inside, b, place(value, b, inverse), parameters


def rational_quadratic_spline_backward(
    grad_y: Tensor,
    grad_logdet: Tensor,
    x: Tensor,
    widths: Tensor,
    heights: Tensor,
    derivatives: Tensor,
    begin: int,
    end: int,
    bins: int,
    left: float,
    right: float,
    bottom: float,
    top: float,
    min_width: float,
    min_height: float,
    min_derivative: float,
    convention: str,
    tails: str,
    inverse: bool,
    sum_logdet: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x and the parameters, from x as the operator was given it."""
    domain = Domain(left, right, bottom, top, min_width, min_height, min_derivative)
    dtype = compute_dtype(x)
    part = x[:, begin:end].to(dtype)
    w, h, d = (t.to(dtype) for t in unpacked(widths, heights, derivatives, bins))
    inside, b, th, (w, h, d) = _located(part, w, h, d, domain, convention, tails, inverse)
    above = grad_y[:, begin:end].to(dtype)
    of_log = grad_logdet[:, None] if sum_logdet else grad_logdet[:, begin:end]
    of_value, *of_knots = adjoints(above, of_log.expand_as(part), th, b, inverse)
    beyond = above if tails != "none" else torch.zeros_like(above)
    of_value = torch.where(inside, of_value, beyond)
    x0, x1, y0, y1, d0, d1 = (torch.where(inside, g, 0)[..., None] for g in of_knots)
    knot = torch.arange(bins + 1, device=x.device)

    def spread(first: Tensor, second: Tensor) -> Tensor:
        """To the K + 1 knots: nothing but to the two of an element's bin."""
        return torch.where(knot == b.number, first, 0) + torch.where(
            knot == b.number + 1, second, 0
        )

    grads = (
        _knots_backward(spread(x0, x1), w, min_width, right - left, convention),
        _knots_backward(spread(y0, y1), h, min_height, top - bottom, convention),
        _slopes_backward(spread(d0, d1), d, min_derivative, convention, tails),
    )
    grad_x = torch.cat([grad_y[:, :begin], of_value.to(x.dtype), grad_y[:, end:]], 1)
    if heights.dim() != 3:
        none = widths.new_empty(0)
        return grad_x, torch.cat(grads, -1).to(widths.dtype), none, none.clone()
    of_w, of_h, of_d = (g.to(widths.dtype) for g in grads)
    return grad_x, of_w, of_h, of_d


def _knots_backward(
    grad: Tensor, u: Tensor, least: float, extent: float, convention: str
) -> Tensor:
    """From the knots to what they come of; the ends stand still."""
    inner = grad[..., 1:-1]
    of_shares = extent * pad(inner.flip(-1).cumsum(-1).flip(-1), (0, 1))
    if convention == "nflows":
        shares = torch.softmax(u, -1)
        of_shares = (1 - u.shape[-1] * least) * of_shares
        return shares * (of_shares - (shares * of_shares).sum(-1, keepdim=True))
    limit = math.log(least) / 2
    shares = torch.softmax(softclip(u, limit), -1)
    damped = 1 + (u / limit).abs()
    of_clipped = shares * (of_shares - (shares * of_shares).sum(-1, keepdim=True))
    return of_clipped / (damped * damped)


def _slopes_backward(grad: Tensor, d: Tensor, least: float, convention: str, tails: str) -> Tensor:
    if tails == "linear":
        grad = grad[..., 1:-1]
    elif tails == "circular":
        grad = torch.cat([grad[..., :1] + grad[..., -1:], grad[..., 1:-1]], -1)
    if convention == "nflows":
        return grad * torch.sigmoid(d)
    limit = math.log(least)
    damped = 1 + (d / limit).abs()
    return grad * torch.exp(softclip(d, limit)) / (damped * damped)


def rational_quadratic_spline(x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """See :func:`fastzoo.ops.rational_quadratic_spline`."""
    return spline_with(rational_quadratic_spline_rows, x, *args, **kwargs)


def spline_with(
    kernel: Callable[..., tuple[Tensor, Tensor]],
    x: Tensor,
    widths: Tensor,
    heights: Tensor | None = None,
    derivatives: Tensor | None = None,
    *,
    bound: float = 5.0,
    tails: str | None = "linear",
    inverse: bool = False,
    convention: str = "nflows",
    split: int | None = None,
    sum_logdet: bool = True,
    domain: tuple[float, float, float, float] | None = None,
    min_bin_width: float = 1e-3,
    min_bin_height: float = 1e-3,
    min_derivative: float = 1e-3,
    slope: float = 1e-3,
) -> tuple[Tensor, Tensor]:
    """``rational_quadratic_spline`` by any kernel."""
    rows, begin, end = rows_of(x, split)
    part = part_shape(x, split)
    none = x.new_empty(0)
    tails = tails or "none"
    given = [
        none if t is None else as_rows(t, part, (t.shape[-1],))
        for t in (widths, heights, derivatives)
    ]
    given = [t if t.dim() == 1 or t.stride(-1) == 1 else t.contiguous() for t in given]
    box = domain or (-bound, bound, -bound, bound)
    least = (min_bin_width, min_bin_height, min_derivative)
    y, logdet = kernel(
        rows,
        *given,
        begin,
        end,
        bins_of(widths, heights, tails),
        *(float(edge) for edge in box),
        *(float(m) for m in (least if convention == "nflows" else (slope, slope, slope))),
        convention,
        tails,
        inverse,
        sum_logdet,
    )
    return y.view(x.shape), logdet if sum_logdet else logdet.view(x.shape)


def bins_of(widths: Tensor, heights: Tensor | None, tails: str) -> int:
    """K, of three tensors or of their numbers side by side."""
    if heights is not None:
        return widths.shape[-1]
    return (widths.shape[-1] - TAILS[tails]) // 3
