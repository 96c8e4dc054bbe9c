"""Random numbers by counter: each is a function of where it stands, and of nothing drawn before it.

The words are those of Philox4x32-10 (Salmon et al., Parallel random numbers: as easy as 1, 2, 3,
2011) with the seed for its key and (block, draw, sample) for its counter; element e of a sample is
word ``e % 4`` of block ``e / 4``. The normals are made of them by Box and Muller's formula, whose
logarithm, sine and cosine are Cephes' polynomials, in float32 without contraction: multiplications
and additions round the same way everywhere, so that the normals too are the same bits everywhere.
"""

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10

_LOG = (
    7.0376836292e-2,
    -1.1514610310e-1,
    1.1676998740e-1,
    -1.2420140846e-1,
    1.4249322787e-1,
    -1.6668057665e-1,
    2.0000714765e-1,
    -2.4999993993e-1,
    3.3333331174e-1,
)
_SQRT_HALF_BITS = 0x3F3504F3


def counter_words(keys: Tensor, n: int, draw: int | Tensor) -> Tensor:
    """``[B, n]`` int64, each in [0, 2^32): the words of ``keys[b] = (seed, sample)``."""
    batch = keys.shape[0]
    blocks = torch.arange((n + 3) // 4, device=keys.device).expand(batch, -1)
    seed, sample = keys[:, :1], keys[:, 1:]
    counter = [
        blocks & _MASK,
        blocks >> 32,
        (torch.zeros_like(blocks) + draw) & _MASK,
        (sample & _MASK).expand_as(blocks),
    ]
    key = [seed & _MASK, (seed >> 32) & _MASK]
    for _ in range(_ROUNDS):
        # A product of two words overflows int64; its 64 bits are right all the same.
        first, second = counter[0] * _MULTIPLIERS[0], counter[2] * _MULTIPLIERS[1]
        counter = [
            ((second >> 32) & _MASK) ^ counter[1] ^ key[0],
            second & _MASK,
            ((first >> 32) & _MASK) ^ counter[3] ^ key[1],
            first & _MASK,
        ]
        key = [(k + w) & _MASK for k, w in zip(key, _WEYL, strict=True)]
    return torch.stack(counter, -1).flatten(1)[:, :n]


def _log(u: Tensor) -> Tensor:
    bits = u.view(torch.int32)
    exponent = (bits - _SQRT_HALF_BITS) >> 23
    f = (bits - (exponent << 23)).view(torch.float32) - 1
    e, square = exponent.float(), f * f
    p = torch.full_like(f, _LOG[0])
    for coefficient in _LOG[1:]:
        p = p * f + coefficient
    y = p * f * square
    y = y + e * -2.12194440e-4
    y = y - 0.5 * square
    return f + y + e * 0.693359375


def _turn(word: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of ``2 pi word / 2^32``, reduced to an eighth of a turn in integers."""
    quadrant = ((word + (1 << 29)) & _MASK) >> 30
    rest = (word - (quadrant << 30)) & _MASK
    a = torch.where(rest >= 1 << 31, rest - (1 << 32), rest).float() * 1.4629180792671596e-09
    h = a * a
    sine = ((-1.9515295891e-4 * h + 8.3321608736e-3) * h - 1.6666654611e-1) * h * a + a
    cosine = (2.443315711809948e-5 * h - 1.388731625493765e-3) * h + 4.166664568298827e-2
    cosine = cosine * h * h - 0.5 * h + 1
    swapped, negated = quadrant % 2 == 1, quadrant >= 2
    first, second = torch.where(swapped, -sine, cosine), torch.where(swapped, cosine, sine)
    return torch.where(negated, -first, first), torch.where(negated, -second, second)


def normals_of(words: Tensor) -> Tensor:
    """``[B, n]`` float32 of words ``[B, n]``, n a multiple of 4: two words make two normals."""
    pairs = words.unflatten(1, (-1, 2))
    u = pairs[..., 0].float() * 2.0**-32 + 2.0**-33
    # A float's square root in double rounds to the right float; torch.sqrt of floats, on the CPU,
    # is off by a unit for one in six.
    radius = torch.clamp_min(-2 * _log(u), 0).double().sqrt().float()
    cosine, sine = _turn(pairs[..., 1])
    return torch.stack([radius * cosine, radius * sine], -1).flatten(1)


def counter_bits(keys: Tensor, n: int, draw: int) -> Tensor:
    """The words themselves; see :func:`fastzoo.ops.counter_bits`."""
    return counter_words(keys, n, draw)


def counter_normals(keys: Tensor, n: int, draw: int | Tensor) -> Tensor:
    """``[B, n]`` float32 normals of ``keys[b] = (seed, sample)``."""
    return normals_of(counter_words(keys, -(-n // 4) * 4, draw))[:, :n].contiguous()
