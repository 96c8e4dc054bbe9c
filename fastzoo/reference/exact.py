"""Functions of float64 tensors made of additions, products and exact steps alone.

A library's exponential differs from another's in the last bit, and then so do the keeps that hang
on it. These are the same operations in the same order on every backend (csrc/math/exact.h), each
rounded once, so their results are equal bit for bit. They are within 2 ulp of the true value.
"""

import math

import torch
from torch import Tensor

# Cody and Waite's constants: the leading parts have trailing zeros, so that their products with
# small whole numbers are exact (fdlibm, e_exp.c and e_rem_pio2.c, has the same split).
_LOG2_E = 1.4426950408889634
_LN2 = (6.93147180369123816490e-01, 1.90821492927058770002e-10)
_HALF_PI = (1.57079632673412561417e00, 6.07710050630396597660e-11, 2.02226624879595063154e-21)
_TWO_OVER_PI = 0.6366197723675814
_DEGREE = 0.017453292519943295

_EXPONENTIAL = [1 / math.factorial(i) for i in range(13, -1, -1)]
_SINE = [(-1) ** i / math.factorial(2 * i + 1) for i in range(8, 0, -1)]
_COSINE = [(-1) ** i / math.factorial(2 * i) for i in range(9, 0, -1)]


def _horner(coefficients: list[float], x: Tensor) -> Tensor:
    value = torch.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        value = value * x + coefficient
    return value


def square_root(x: Tensor) -> Tensor:
    """Rounded to nearest, of values from 1e-280 to 1e280: torch's own may come from a library whose
    last bit is off. The error of the root, from its exact square (Dekker, 1971), corrects it."""
    root = x.sqrt()
    high = 134217729 * root
    high = high - (high - root)
    low = root - high
    square = root * root
    beyond = ((high * high - square) + 2 * high * low) + low * low
    nearer = root + (x - square - beyond) / (2 * root)
    return torch.where((x > 1e-280) & (x < 1e280), nearer, root)


def exponential(x: Tensor) -> Tensor:
    """e^x; 0 below -708, infinite above 709."""
    inside = (x >= -708) & (x <= 709)
    y = torch.where(inside, x, 0)
    k = torch.floor(y * _LOG2_E + 0.5)
    r = (y - k * _LN2[0]) - k * _LN2[1]
    power = ((k.to(torch.int64) + 1023) << 52).view(torch.float64)
    outside = torch.where(x > 709, torch.inf, torch.where(x < -708, 0.0, torch.nan))
    return torch.where(inside, _horner(_EXPONENTIAL, r) * power, outside.to(torch.float64))


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + exponential(-x))


def sine_cosine(angle: Tensor, degrees: bool) -> tuple[Tensor, Tensor]:
    """Multiples of 90 degrees are exact. Radians beyond 10^5 lose accuracy."""
    if degrees:
        quarter = torch.floor(angle / 90 + 0.5)
        r = (angle - quarter * 90) * _DEGREE
    else:
        quarter = torch.floor(angle * _TWO_OVER_PI + 0.5)
        r = angle
        for part in _HALF_PI:
            r = r - quarter * part
    square = r * r
    sine = r + r * (square * _horner(_SINE, square))
    cosine = 1 + square * _horner(_COSINE, square)
    quadrant = quarter - 4 * torch.floor(quarter * 0.25)
    odd = (quadrant == 1) | (quadrant == 3)
    swapped = torch.where(odd, cosine, sine), torch.where(odd, sine, cosine)
    return (
        torch.where(quadrant >= 2, -swapped[0], swapped[0]),
        torch.where((quadrant == 1) | (quadrant == 2), -swapped[1], swapped[1]),
    )
