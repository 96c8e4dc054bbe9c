"""Noise by counter: the words of Philox4x32-10, and normals of them, the same bits as on every
backend. Kernels that use it are launched with EXACT: no product may be contracted with a sum.
"""

import triton
import triton.language as tl


@triton.jit
def _element_wise(w0, w1, w2, w3):
    """Four tiles [M, N / 4], the words of blocks, as one [M, N] in the order of elements."""
    return tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))


@triton.jit
def _words(seed, sample, draw, block):
    """seed, sample [M, 1] and block [1, K] of 64 bits, draw of 32 bits and no sign."""
    return tl.philox(
        seed, block.to(tl.uint32), (block >> 32).to(tl.uint32), draw, sample.to(tl.uint32)
    )


@triton.jit
def _log(u):
    """The logarithm of a positive normal number by Cephes' polynomial."""
    bits = u.to(tl.int32, bitcast=True)
    e = (bits - 0x3F3504F3) >> 23
    f = (bits - (e << 23)).to(tl.float32, bitcast=True) - 1.0
    e = e.to(tl.float32)
    g = f * f
    p = f * 7.0376836292e-2 - 1.1514610310e-1
    p = p * f + 1.1676998740e-1
    p = p * f - 1.2420140846e-1
    p = p * f + 1.4249322787e-1
    p = p * f - 1.6668057665e-1
    p = p * f + 2.0000714765e-1
    p = p * f - 2.4999993993e-1
    p = p * f + 3.3333331174e-1
    y = (p * f) * g
    y = y + e * -2.12194440e-4
    y = y - g * 0.5
    return (f + y) + e * 0.693359375


@triton.jit
def _pair(radius_word, angle_word):
    """Two independent normals by Box and Muller: the angle is of a whole turn in 32 bits, its first
    two the quadrant, whose sides are an eighth of a turn from the axis."""
    u = radius_word.to(tl.float32) * 2.0**-32 + 2.0**-33
    square = _log(u) * -2.0
    radius = tl.sqrt_rn(tl.where(square > 0, square, 0.0))
    quadrant = (angle_word + 0x20000000) >> 30
    rest = (angle_word - (quadrant << 30)).to(tl.int32, bitcast=True)
    a = rest.to(tl.float32) * 1.4629180792671596e-09
    h = a * a
    sine = h * -1.9515295891e-4 + 8.3321608736e-3
    sine = sine * h - 1.6666654611e-1
    sine = (sine * h) * a + a
    cosine = h * 2.443315711809948e-5 - 1.388731625493765e-3
    cosine = cosine * h + 4.166664568298827e-2
    cosine = (cosine * h) * h - h * 0.5 + 1.0
    odd = (quadrant & 1) != 0
    along = tl.where(odd, sine, cosine)
    across = tl.where(odd, cosine, sine)
    along = tl.where((quadrant == 1) | (quadrant == 2), -along, along)
    across = tl.where(quadrant >= 2, -across, across)
    return radius * along, radius * across


@triton.jit
def counter_bits(seed, sample, draw, block):
    """The words [M, 4 K] of elements."""
    w0, w1, w2, w3 = _words(seed, sample, draw, block)
    return _element_wise(w0, w1, w2, w3)


@triton.jit
def counter_normal(seed, sample, draw, block):
    """Normals [M, 4 K] of elements, in float32."""
    w0, w1, w2, w3 = _words(seed, sample, draw, block)
    z0, z1 = _pair(w0, w1)
    z2, z3 = _pair(w2, w3)
    return _element_wise(z0, z1, z2, z3)


@triton.jit
def rounded_at_random(value, word, STORED: tl.constexpr):
    """A float32 as one of its two neighbours in a half precision, each as often as it is near."""
    SPARE: tl.constexpr = 23 - STORED.fp_mantissa_width  # bits of the fraction
    bits = value.to(tl.uint32, bitcast=True)
    cut = (bits + (word & ((1 << SPARE) - 1))) >> SPARE << SPARE
    out = cut.to(tl.float32, bitcast=True)
    if SPARE == 13:
        # Below 2^-14 the neighbours in float16 are 2^-24 apart.
        size = tl.abs(value)
        low = size < 2.0**-14
        part = (word & 0xFFFFFF).to(tl.float32) * 2.0**-24
        steps = (tl.where(low, size, 0.0) * 2.0**24 + part).to(tl.int32).to(tl.float32) * 2.0**-24
        out = tl.where(low, tl.where(bits >> 31 != 0, -steps, steps), out)
        out = tl.where(size > 65504, value, out)
    return tl.where(value == value, out, value).to(STORED)
