"""Rational-quadratic splines: values, inverses, the logarithms of their derivatives, and gradients.

A program has the elements of a tile of rows and columns. The widths of an element's bins lie along
the last axis of a tile of their own, its heights likewise; of the derivatives it loads the two at
the ends of the element's bin. A bin is found along x, or for the inverse along y: what is called
`along` here are the widths, or for the inverse the heights, and the others are `across`.

Rows' sums of logarithms are formed as those of couplings.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastzoo.reference.precision import compute_dtype

from .coupling import Tiles, alignment, sum_of_parts, tile_of
from .elementary import sigmoid, softplus
from .runtime import FUSED, INTERPRETER, CompileCase, generation, on_device_of
from .score_tiles import TRITON_TYPES, known

TAILS = {"linear": 0, "circular": 1, "none": 2}
LINEAR = tl.constexpr(TAILS["linear"])
CIRCULAR = tl.constexpr(TAILS["circular"])
NO_TAILS = tl.constexpr(TAILS["none"])

# The operands of kernels, by the names of their strides.
SIDES = {"along": "along", "across": "across", "derivative": "derivatives"}


class Launch(NamedTuple):
    lanes: int  # of a program: elements times bins, padded
    num_warps: int


# By generation, and by the bytes of what is computed in. A warp to itself needs no barriers; of 8
# bins in float32 it has an element a thread.
_GPU = {4: Launch(256, 1), 8: Launch(128, 1)}
LAUNCHES = {INTERPRETER: dict.fromkeys((4, 8), Launch(8192, 4)), 8: _GPU, 9: _GPU, 10: _GPU}


@triton.jit
def _place(parts, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The rows and the columns of the elements of a program, and which part of the rows it is."""
    lane = tl.arange(0, ROWS * COLUMNS)
    part = tl.program_id(0) % parts
    row = (tl.program_id(0) // parts).to(tl.int64) * ROWS + lane // COLUMNS
    return row, part.to(tl.int64) * COLUMNS + lane % COLUMNS, part


@triton.jit
def _damping(u, LIMIT: tl.constexpr):
    """What zuko's soft clip to LIMIT divides by."""
    return 1 + tl.abs(u * (1 / LIMIT))


@triton.jit
def _logits(at, there, K: tl.constexpr, COMPUTE: tl.constexpr, BLOCK_K: tl.constexpr):
    bin = tl.arange(0, BLOCK_K)[None, :]
    return tl.load(at[:, None] + bin, mask=there[:, None] & (bin < K), other=0.0).to(COMPUTE)


@triton.jit
def _shares(
    at,
    there,
    K: tl.constexpr,
    BOX: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The softmax of elements' bins, [elements, bins]."""
    bin = tl.arange(0, BLOCK_K)[None, :]
    u = _logits(at, there, K, COMPUTE, BLOCK_K)
    if BOX[3] is not None:
        u = u / _damping(u, BOX[3])  # too small for an exponential to overflow
        e = tl.where(bin < K, tl.exp(u), 0.0)
    else:
        u = tl.where(bin < K, u, float("-inf"))
        e = tl.exp(u - tl.max(u, 1)[:, None])
    return e * (1 / tl.sum(e, 1))[:, None]


@triton.jit
def _knot(number, share, K: tl.constexpr, BOX: tl.constexpr):
    """The one that lies after `number` bins, which have that share of the softmax."""
    FIXED: tl.constexpr = BOX[2] * (BOX[1] - BOX[0])
    FREE: tl.constexpr = (1 - K * BOX[2]) * (BOX[1] - BOX[0])
    return share * FREE + (number.to(share.dtype) * FIXED + BOX[0])


@triton.jit
def _number(given, shares, K: tl.constexpr, BOX: tl.constexpr, BLOCK_K: tl.constexpr):
    """Of the last bin that begins at or before each element: as many as have ended there."""
    bin = tl.arange(0, BLOCK_K)[None, :]
    ended = _knot(bin + 1, tl.cumsum(shares, 1), K, BOX) <= given[:, None]
    return tl.sum((ended & (bin < K - 1)).to(tl.int32), 1)


@triton.jit
def _ends(shares, k, K: tl.constexpr, BOX: tl.constexpr, BLOCK_K: tl.constexpr):
    """The shares that lie before the k-th bin and before its end, and the knots there: the first
    and the last exactly."""
    bin = tl.arange(0, BLOCK_K)[None, :]
    before = tl.sum(tl.where(bin < k[:, None], shares, 0.0), 1)
    upto = before + tl.sum(tl.where(bin == k[:, None], shares, 0.0), 1)
    last = tl.full(k.shape, BOX[1], shares.dtype)
    end = tl.where(k == K - 1, last, _knot(k + 1, upto, K, BOX))
    return before, upto, _knot(k, before, K, BOX), end


@triton.jit
def _derivative_numbers(k, K: tl.constexpr, TAIL: tl.constexpr):
    """Which of the derivatives that are given stand at both ends of a bin; others are 1."""
    if TAIL == LINEAR:
        first = k - 1
        last = k
    else:
        first = k
        last = k + 1
        if TAIL == CIRCULAR:
            last = tl.where(last == K, 0, last)
    return first, last


@triton.jit
def _derivative(
    at, number, there, J: tl.constexpr, DERIVATIVE: tl.constexpr, COMPUTE: tl.constexpr
):
    """One at the end of a bin, and its own derivative by what it is made of."""
    is_given = (number >= 0) & (number < J)
    u = tl.load(at + number, mask=there & is_given, other=0.0).to(COMPUTE)
    if DERIVATIVE[1] is not None:
        damping = _damping(u, DERIVATIVE[1])
        value = tl.exp(u / damping)
        slope = value / (damping * damping)
    else:
        value = softplus(u) + DERIVATIVE[0]
        slope = sigmoid(u)
    return tl.where(is_given, value, 1.0), slope


@triton.jit
def _clamped(value, low, high):
    """NaN stays."""
    return tl.where(value < low, low, tl.where(value > high, high, value))


@triton.jit
def _place_in_bin(given, along0, along1, across0, across1, d0, d1, INVERSE: tl.constexpr):
    """Width, height and slope of the bin, and the place in it, from 0 to 1."""
    if INVERSE:
        h = along1 - along0
        w = across1 - across0
        s = h / w
        # The root of a quadratic, written so that nothing cancels: th or 1 - th, the lesser.
        above = _clamped(given - along0, 0.0, h)
        below = h - above
        lean = below * d0 - above * d1
        root = tl.abs(lean) + tl.sqrt(lean * lean + 4 * s * s * above * below)
        from_low = 2 * s * above / (2 * s * above + root)
        from_high = 2 * s * below / (2 * s * below + root)
        theta = tl.where(lean >= 0, from_low, 1 - from_high)
    else:
        w = along1 - along0
        h = across1 - across0
        s = h / w
        theta = (given - along0) / w
        theta = _clamped(theta, 0.0, 1.0)
    return w, h, s, theta


@triton.jit(
    do_not_specialize=[
        *("rows", "parts", "n", "begin", "m", "along_row", "along_column"),
        *("across_row", "across_column", "derivative_row", "derivative_column"),
    ]
)
def _spline_kernel(
    x,  # [rows, n]; the columns begin to begin + m of it
    along,  # [rows, m, K]
    across,  # likewise
    derivatives,  # [rows, m, J]
    y,  # like x, written in the same columns
    logdet,  # likewise, or if SUM [rows, parts]
    rows,
    parts,
    n,
    begin,
    m,
    along_row,  # strides, those of along and across in units of ALIGN
    along_column,
    across_row,
    across_column,
    derivative_row,
    derivative_column,
    TAIL: tl.constexpr,
    INVERSE: tl.constexpr,
    SUM: tl.constexpr,
    K: tl.constexpr,
    J: tl.constexpr,
    ALONG: tl.constexpr,  # low, high, least share, limit of logits
    ACROSS: tl.constexpr,
    DERIVATIVE: tl.constexpr,  # least, limit of logarithms
    COMPUTE: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row, column, part = _place(parts, ROWS, COLUMNS)
    there = (row < rows) & (column < m)
    at = row * n + begin + column
    given = tl.load(x + at, mask=there, other=0.0).to(COMPUTE)
    along += row * ALIGN * along_row + column * ALIGN * along_column
    across += row * ALIGN * across_row + column * ALIGN * across_column
    derivatives += row * derivative_row + column * derivative_column
    shares = _shares(along, there, K, ALONG, COMPUTE, BLOCK_K)
    k = _number(given, shares, K, ALONG, BLOCK_K)
    _, _, along0, along1 = _ends(shares, k, K, ALONG, BLOCK_K)
    shares = _shares(across, there, K, ACROSS, COMPUTE, BLOCK_K)
    _, _, across0, across1 = _ends(shares, k, K, ACROSS, BLOCK_K)
    first, last = _derivative_numbers(k, K, TAIL)
    d0, _ = _derivative(derivatives, first, there, J, DERIVATIVE, COMPUTE)
    d1, _ = _derivative(derivatives, last, there, J, DERIVATIVE, COMPUTE)
    w, h, s, theta = _place_in_bin(given, along0, along1, across0, across1, d0, d1, INVERSE)
    rest = 1 - theta
    q = theta * rest
    below = s + (d0 + d1 - 2 * s) * q
    above = d1 * theta * theta + 2 * s * q + d0 * rest * rest
    log = 2 * tl.log(s / below) + tl.log(above)
    if INVERSE:
        log = -log
        moved = theta * w
    else:
        moved = h * (s * theta * theta + d0 * q) / below
    inside = (given >= ALONG[0]) & (given <= ALONG[1])
    out = _clamped(across0 + moved, across0, across1)
    if TAIL == NO_TAILS:
        out = tl.where(inside, out, float("nan"))
        log = tl.where(inside, log, float("nan"))
    else:
        out = tl.where(inside, out, given)
        log = tl.where(inside, log, 0.0)
    tl.store(y + at, out.to(y.dtype.element_ty), mask=there)
    if SUM:
        log = tl.sum(tl.reshape(tl.where(there, log, 0.0), (ROWS, COLUMNS)), 1)
        row = (tl.program_id(0) // parts).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        tl.store(logdet + row * parts + part, log, mask=row < rows)
    else:
        tl.store(logdet + at, log, mask=there)


@triton.jit
def _store_logit_gradient(
    out,  # at each element's first
    logits,  # likewise
    shares,
    k,
    before,
    upto,
    grad0,  # of the knots at both ends of the bin
    grad1,
    there,
    inside,
    K: tl.constexpr,
    BOX: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    FREE: tl.constexpr = (1 - K * BOX[2]) * (BOX[1] - BOX[0])
    bin = tl.arange(0, BLOCK_K)[None, :]
    grad0 = grad0 * FREE
    grad1 = tl.where(k == K - 1, 0.0, grad1 * FREE)  # the last knot is where it is
    mean = grad0 * before + grad1 * upto
    of_share = tl.where(bin < k[:, None], (grad0 + grad1)[:, None], 0.0)
    of_share = tl.where(bin == k[:, None], grad1[:, None], of_share)
    gradient = shares * (of_share - mean[:, None])
    if BOX[3] is not None:
        damping = _damping(_logits(logits, there, K, COMPUTE, BLOCK_K), BOX[3])
        gradient = gradient / (damping * damping)
    gradient = tl.where(inside[:, None], gradient, 0.0)
    mask = there[:, None] & (bin < K)
    tl.store(out[:, None] + bin, gradient.to(out.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=[
        *("rows", "parts", "n", "begin", "m", "along_row", "along_column"),
        *("across_row", "across_column", "derivative_row", "derivative_column"),
    ]
)
def _gradient_kernel(
    grad_y,  # [rows, n]; the columns begin to begin + m of it
    grad_logdet,  # likewise, or if SUM [rows]
    x,  # [rows, n], likewise
    along,  # [rows, m, K]
    across,  # likewise
    derivatives,  # [rows, m, J]
    grad_x,  # like x, written in the same columns
    grad_along,  # [rows, m, K], written, in steps of LOGITS
    grad_across,  # likewise
    grad_derivatives,  # [rows, m, J], written, in steps of DERIVATIVES
    rows,
    parts,
    n,
    begin,
    m,
    along_row,  # strides, those of along and across in units of ALIGN
    along_column,
    across_row,
    across_column,
    derivative_row,
    derivative_column,
    TAIL: tl.constexpr,
    INVERSE: tl.constexpr,
    SUM: tl.constexpr,
    K: tl.constexpr,
    J: tl.constexpr,
    ALONG: tl.constexpr,  # low, high, least share, limit of logits
    ACROSS: tl.constexpr,
    DERIVATIVE: tl.constexpr,  # least, limit of logarithms
    LOGITS: tl.constexpr,
    DERIVATIVES: tl.constexpr,
    COMPUTE: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_J: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row, column, _ = _place(parts, ROWS, COLUMNS)
    there = (row < rows) & (column < m)
    at = row * n + begin + column
    given = tl.load(x + at, mask=there, other=0.0).to(COMPUTE)
    along += row * ALIGN * along_row + column * ALIGN * along_column
    across += row * ALIGN * across_row + column * ALIGN * across_column
    derivatives += row * derivative_row + column * derivative_column
    along_shares = _shares(along, there, K, ALONG, COMPUTE, BLOCK_K)
    k = _number(given, along_shares, K, ALONG, BLOCK_K)
    along_before, along_upto, along0, along1 = _ends(along_shares, k, K, ALONG, BLOCK_K)
    across_shares = _shares(across, there, K, ACROSS, COMPUTE, BLOCK_K)
    across_before, across_upto, across0, across1 = _ends(across_shares, k, K, ACROSS, BLOCK_K)
    first, last = _derivative_numbers(k, K, TAIL)
    d0, slope0 = _derivative(derivatives, first, there, J, DERIVATIVE, COMPUTE)
    d1, slope1 = _derivative(derivatives, last, there, J, DERIVATIVE, COMPUTE)
    w, h, s, theta = _place_in_bin(given, along0, along1, across0, across1, d0, d1, INVERSE)
    inside = (given >= ALONG[0]) & (given <= ALONG[1])
    of_y = tl.load(grad_y + at, mask=there, other=0.0).to(COMPUTE)
    outside = of_y
    of_log = tl.load(grad_logdet + (row if SUM else at), mask=there, other=0.0)

    rest = 1 - theta
    q = theta * rest
    turn = rest - theta  # of q by theta
    bend = d0 + d1 - 2 * s
    below = s + bend * q
    above = d1 * theta * theta + 2 * s * q + d0 * rest * rest
    above_by_theta = 2 * (d1 * theta + s * turn - d0 * rest)
    log_by_theta = above_by_theta / above - 2 * bend * turn / below
    if INVERSE:
        # y stays: by the parameters x moves against them, and its logarithm is the other's.
        of_y = (of_y - of_log * log_by_theta / w) * (below / s) * (below / s) / above
        of_x = of_y
        of_y = -of_y
        of_log = -of_log

    # Of y = y0 + h part / below, and of log = 2 log s + log above - 2 log below.
    part = s * theta * theta + d0 * q
    of_fraction = of_y / below
    of_part = of_fraction * h
    of_below = -(of_fraction * h * part + 2 * of_log) / below
    of_above = of_log / above
    of_bend = of_below * q
    of_theta = of_part * (2 * s * theta + d0 * turn) + of_log * log_by_theta
    of_theta -= of_part * part / below * bend * turn
    of_s = of_part * theta * theta + 2 * of_log / s + of_below - 2 * of_bend + 2 * of_above * q
    of_d0 = of_part * q + of_bend + of_above * rest * rest
    of_d1 = of_bend + of_above * theta * theta
    of_h = of_fraction * part + of_s / w
    of_w = -(of_s * s + of_theta * theta) / w
    of_place = of_theta / w
    if INVERSE:
        of_along0 = of_y - of_h
        of_along1 = of_h
        of_across0 = -of_place - of_w
        of_across1 = of_w
    else:
        of_x = of_place
        of_along0 = -of_place - of_w
        of_along1 = of_w
        of_across0 = of_y - of_h
        of_across1 = of_h

    if TAIL == NO_TAILS:
        of_x = tl.where(inside, of_x, 0.0)
    else:
        of_x = tl.where(inside, of_x, outside)
    tl.store(grad_x + at, of_x.to(grad_x.dtype.element_ty), mask=there)
    own = row * m + column
    _store_logit_gradient(
        grad_along + own * LOGITS,
        along,
        along_shares,
        k,
        along_before,
        along_upto,
        of_along0,
        of_along1,
        there,
        inside,
        K,
        ALONG,
        COMPUTE,
        BLOCK_K,
    )
    _store_logit_gradient(
        grad_across + own * LOGITS,
        across,
        across_shares,
        k,
        across_before,
        across_upto,
        of_across0,
        of_across1,
        there,
        inside,
        K,
        ACROSS,
        COMPUTE,
        BLOCK_K,
    )
    number = tl.arange(0, BLOCK_J)[None, :]
    of_d0 = tl.where(inside, of_d0 * slope0, 0.0)
    of_d1 = tl.where(inside, of_d1 * slope1, 0.0)
    gradient = tl.where(number == first[:, None], of_d0[:, None], 0.0)
    gradient += tl.where(number == last[:, None], of_d1[:, None], 0.0)
    mask = there[:, None] & (number < J)
    out = grad_derivatives + (own * DERIVATIVES)[:, None] + number
    tl.store(out, gradient.to(grad_derivatives.dtype.element_ty), mask=mask)


class _Call:
    """What both kernels are given of a spline besides x."""

    def __init__(
        self,
        x: torch.Tensor,
        parameters: tuple[torch.Tensor, ...],
        begin: int,
        end: int,
        bins: int,
        box: tuple[float, ...],
        minima: tuple[float, ...],
        convention: str,
        tails: str,
        inverse: bool,
        sum_logdet: bool,
    ):
        self.rows, columns = x.shape
        self.m = end - begin
        block = triton.next_power_of_2(bins)
        launch = LAUNCHES[known(generation(x))][compute_dtype(x).itemsize]
        elements = max(1, launch.lanes // block)
        self.tile = tile_of(Tiles(elements, elements, 8), self.m)
        self.bins = bins
        self.inverse = inverse
        self.whole = self.m == columns
        self.operands = self.sides(*self.parts(parameters))
        along, across, derivatives = self.operands
        strides = (*along.stride()[:2], *across.stride()[:2])
        unit = alignment(*strides)
        self.strides = (
            self.rows,
            self.tile.parts,
            columns,
            begin,
            self.m,
            *(stride // unit for stride in strides),
            *derivatives.stride()[:2],
        )
        self.constants = {
            **spline_constants(bins, derivatives.shape[2], box, minima, convention, tails, inverse),
            "SUM": sum_logdet,
            "COMPUTE": TRITON_TYPES[compute_dtype(x)],
            "ALIGN": unit,
            "BLOCK_K": block,
            "ROWS": self.tile.rows,
            "COLUMNS": self.tile.columns,
            "num_warps": launch.num_warps,
        }

    def parts(self, parameters: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
        """Widths, heights and derivatives, also of one tensor that has them side by side."""
        widths, heights, derivatives = parameters
        if heights.dim() == 3:
            return [widths, heights, derivatives]
        return list(widths.split([self.bins, self.bins, widths.shape[2] - 2 * self.bins], 2))

    def sides(self, widths, heights, derivatives) -> tuple[torch.Tensor, ...]:
        """The bins along the argument, those across it, and the derivatives."""
        return (*((heights, widths) if self.inverse else (widths, heights)), derivatives)

    @property
    def grid(self) -> tuple[int]:
        return (triton.cdiv(self.rows, self.tile.rows) * self.tile.parts,)


def spline_constants(
    bins: int,
    derivatives: int,
    box: tuple[float, ...],
    minima: tuple[float, ...],
    convention: str,
    tails: str,
    inverse: bool,
) -> dict:
    least_width, least_height, least_derivative = minima
    if convention == "zuko":
        widths = (*box[:2], 0.0, math.log(least_width) / 2)
        heights = (*box[2:], 0.0, math.log(least_height) / 2)
        derivative = (0.0, math.log(least_derivative))
    else:
        widths, heights = (*box[:2], least_width, None), (*box[2:], least_height, None)
        derivative = (least_derivative, None)
    return {
        "TAIL": TAILS[tails],
        "INVERSE": inverse,
        "K": bins,
        "J": derivatives,
        "ALONG": heights if inverse else widths,
        "ACROSS": widths if inverse else heights,
        "DERIVATIVE": derivative,
    }


def rational_quadratic_spline(
    x: torch.Tensor,
    widths: torch.Tensor,
    heights: torch.Tensor,
    derivatives: torch.Tensor,
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
) -> tuple[torch.Tensor, torch.Tensor]:
    """The columns begin to end of rows by a spline, and the logarithms of its derivatives."""
    x = x.contiguous()
    call = _Call(
        x,
        (widths, heights, derivatives),
        begin,
        end,
        bins,
        (left, right, bottom, top),
        (min_width, min_height, min_derivative),
        convention,
        tails,
        inverse,
        sum_logdet,
    )
    kind = {"dtype": compute_dtype(x), "device": x.device}
    y = torch.empty_like(x) if call.whole else x.clone()
    if sum_logdet:
        logdet = torch.empty(call.rows, call.tile.parts, **kind)
    else:
        logdet = torch.empty(x.shape, **kind) if call.whole else torch.zeros(x.shape, **kind)
    if call.rows:
        with on_device_of(x):
            _spline_kernel[call.grid](
                x, *call.operands, y, logdet, *call.strides, **call.constants, **FUSED
            )
    return y, sum_of_parts(logdet) if sum_logdet else logdet


def rational_quadratic_spline_backward(
    grad_y: torch.Tensor,
    grad_logdet: torch.Tensor,
    x: torch.Tensor,
    widths: torch.Tensor,
    heights: torch.Tensor,
    derivatives: torch.Tensor,
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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients to x and to the parameters, from x as the spline was given it."""
    grad_y, grad_logdet, x = grad_y.contiguous(), grad_logdet.contiguous(), x.contiguous()
    call = _Call(
        x,
        (widths, heights, derivatives),
        begin,
        end,
        bins,
        (left, right, bottom, top),
        (min_width, min_height, min_derivative),
        convention,
        tails,
        inverse,
        sum_logdet,
    )
    grad_x = torch.empty_like(x) if call.whole else grad_y.clone()
    grads = tuple(p.new_empty(p.shape) for p in (widths, heights, derivatives))
    outputs = call.sides(*call.parts(grads))
    packed = widths.shape[2] if heights.dim() == 1 else 0
    if call.rows:
        with on_device_of(x):
            _gradient_kernel[call.grid](
                grad_y,
                grad_logdet,
                x,
                *call.operands,
                grad_x,
                *outputs,
                *call.strides,
                **call.constants,
                LOGITS=packed or bins,
                DERIVATIVES=packed or derivatives.shape[2],
                BLOCK_J=triton.next_power_of_2(max(1, outputs[2].shape[2])),
                **FUSED,
            )
    return grad_x, *grads


def compile_cases(generation: int) -> list[CompileCase]:
    cases = []
    for type_, convention, tails, inverse, bins, packed in (
        ("fp32", "nflows", "linear", False, 8, False),
        ("fp32", "nflows", "linear", True, 8, False),
        ("fp32", "nflows", "linear", False, 8, True),
        ("fp32", "zuko", "circular", False, 8, False),
        ("fp32", "nflows", "none", False, 64, False),
        ("bf16", "nflows", "linear", False, 8, False),
        ("bf16", "zuko", "linear", True, 16, True),
        ("fp64", "nflows", "linear", False, 8, False),
        ("fp64", "zuko", "circular", True, 8, True),
    ):
        given = f"*{type_}"
        computed = "fp64" if type_ == "fp64" else "fp32"
        launch = LAUNCHES[known(generation)][8 if type_ == "fp64" else 4]
        derivatives = bins + {"linear": -1, "circular": 0, "none": 1}[tails]
        columns = launch.lanes // bins
        strides = (f"{side}_{axis}" for side in SIDES for axis in ("row", "column"))
        shared = {
            **dict.fromkeys(("x", *SIDES.values()), given),
            **dict.fromkeys(("rows", "parts", "n", "begin", "m", *strides), "i32"),
        }
        constants = {
            **spline_constants(
                bins, derivatives, (-5.0, 5.0) * 2, (1e-3,) * 3, convention, tails, inverse
            ),
            "SUM": True,
            "COMPUTE": getattr(tl, f"float{computed[2:]}"),
            "ALIGN": 1 if packed else 8,
            "BLOCK_K": bins,
            "ROWS": launch.lanes // bins // columns,
            "COLUMNS": columns,
        }
        packed_width = 2 * bins + derivatives if packed else 0
        gradients = (f"grad_{name}" for name in ("y", "x", *SIDES.values()))
        for kernel, name, types, own in (
            (_spline_kernel, "spline", {"y": given, "logdet": f"*{computed}"}, {}),
            (
                _gradient_kernel,
                "spline-gradient",
                {**dict.fromkeys(gradients, given), "grad_logdet": f"*{computed}"},
                {
                    "LOGITS": packed_width or bins,
                    "DERIVATIVES": packed_width or derivatives,
                    "BLOCK_J": triton.next_power_of_2(derivatives),
                },
            ),
        ):
            direction = "inverse" if inverse else "forward"
            layout = "packed" if packed else "apart"
            cases.append(
                CompileCase(
                    name=f"{name}-{convention}-{tails}-{direction}-{bins}-{layout}-{type_}",
                    kernel=kernel,
                    types={**shared, **types},
                    constants={**constants, **own},
                    options={"num_warps": launch.num_warps, **FUSED},
                    vector_loads=not packed,
                    fused=True,
                )
            )
    return cases
