"""Elementary functions that triton's own set lacks, to the last digits of float32 and float64.

They are made of ``tl.exp``, ``tl.log`` and arithmetic, which the interpreter has too.
"""

import triton
import triton.language as tl


@triton.jit
def _odd_series(z, square, TERMS: tl.constexpr):
    """z (1 + w/3 + w^2/5 + ...): artanh z of w = z^2, arctan z of w = -z^2."""
    series = tl.full(z.shape, 1.0 / (2 * TERMS - 1), z.dtype)
    for k in tl.static_range(TERMS - 1, 0, -1):
        series = series * square + 1.0 / (2 * k - 1)
    return z * series


@triton.jit
def _log1p_series(t):
    """log(1 + t) = 2 artanh(t / (2 + t)) for t in [-1/2, 1], however small: of squares up to 1/9
    what is left out is below the last bit."""
    TERMS: tl.constexpr = 17 if t.dtype == tl.float64 else 8
    s = t / (2 + t)
    return 2 * _odd_series(s, s * s, TERMS)


@triton.jit
def log1p(t):
    """log(1 + t) for t above -1, however small."""
    near = (t >= -0.5) & (t <= 1)
    return tl.where(near, _log1p_series(tl.where(near, t, 0.0)), tl.log(1 + t))


@triton.jit
def softplus(z):
    """log(1 + exp(z)), however small."""
    return tl.maximum(z, 0.0) + _log1p_series(tl.exp(-tl.abs(z)))


@triton.jit
def sigmoid(z):
    """1 / (1 + exp(-z)), without an overflow."""
    e = tl.exp(-tl.abs(z))
    return tl.where(z >= 0, 1.0, e) / (1 + e)


@triton.jit
def tanh(z):
    """Near zero its continued fraction, cut where 1/2 to its 14th power is below the last bit."""
    square = z * z
    near = square < 0.25
    e = tl.exp(-2 * tl.abs(z))
    above = z * (135135 + square * (17325 + square * (378 + square)))
    below = 135135 + square * (62370 + square * (3150 + square * 28))
    far = tl.where(z < 0, e - 1, 1 - e)
    return tl.where(near, above, far) / tl.where(near, below, 1 + e)


@triton.jit
def arctan(z):
    """By the tangent of the difference to 0, pi/4 or pi/2, at most sqrt(2) - 1."""
    TERMS: tl.constexpr = 21 if z.dtype == tl.float64 else 10
    size = tl.abs(z)
    middle = size > 0.4142135623730950
    far = size > 2.414213562373095
    above = tl.where(far, -1.0, tl.where(middle, size - 1, size))
    below = tl.where(far, size, tl.where(middle, size + 1, 1.0))
    t = above / below
    eighths = middle.to(z.dtype) + far.to(z.dtype)
    angle = eighths * 0.7853981633974483 + _odd_series(t, -t * t, TERMS)
    return tl.where(z < 0, -angle, angle)
