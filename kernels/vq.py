"""Nearest-codebook lookup: a fast pass on matrix units, and a proof of its answer.

The answer is defined in csrc/math/vq.h: the lowest index with the highest score in double. The
fast pass rounds the operands to bfloat16, keeps what that loses as a second bfloat16, and adds up
three products, high high + high low + low high (float64 is multiplied as it is). It tells codes
apart by groups: of each tile's scores only the maximum of every group of columns is looked at, and
a row keeps its best groups and the best maximum that it left out. Where that lies more than twice
the proven bound below the k-th best group, the answer is in the groups kept, whose codes are scored
as the definition says; the other rows are listed, and all codes scored so.

  norms    of the codes, as the definition takes them (cosine)
  pack     centre (l2) or normalise (cosine), split into bfloat16, pad: codes and rows alike
  match    the fast pass; the codes may be split among programs
  settle   join the splits; the groups that may hold the answer, or the row is listed
  choose   among the codes of a row's groups, by the definition
  rescore  the listed rows, by the definition
  finish   distances to the codes; or the codes themselves and the losses

With heads, row r of x [N * heads, D] meets the codebook of head r % heads.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from fastzoo.reference.precision import compute_dtype

from .runtime import EXACT, FUSED, INTERPRETER, CompileCase, generation, on_device_of
from .score_tiles import TRITON_TYPES, short_name

METRICS = {"l2": 0, "cosine": 1, "dot": 2}
L2 = tl.constexpr(METRICS["l2"])
COSINE = tl.constexpr(METRICS["cosine"])

# Ranks go by score, then by order: the code's index, and behind all others where the score is NaN.
NAN_LAST = tl.constexpr(1 << 40)
NONE = tl.constexpr(1 << 60)
TAKEN = tl.constexpr(1 << 61)

LARGEST_K = 64
GPUS = (8, 9, 10, 12)  # generations in the tables
BLOCK_ROWS = 128  # rows a program settles
SETTLED_ENTRIES = 1024  # of lists, a program at most
PACK_ELEMENTS = {INTERPRETER: 4096, **dict.fromkeys(GPUS, 1024)}
CHOOSE_SCORES = {INTERPRETER: 8192, **dict.fromkeys(GPUS, 256)}
RESCORE_PROGRAMS = 2048
FINISH_TILES = {INTERPRETER: (128, 64), **dict.fromkeys(GPUS, (32, 32))}  # rows, dims


class Tile(NamedTuple):
    """What a program of the fast pass holds at a time, and how it is compiled."""

    rows: int
    codes: int
    dims: int
    slots: int  # groups of a tile's codes
    num_warps: int
    num_stages: int
    interleaved: bool = False  # the eights of a slot's codes, among those of the others


# By generation, type and number of products, in rising order: up to which D, the tile. Where D fits
# into the tile's dimensions, the rows are read once.
TILES = {
    INTERPRETER: {
        (torch.bfloat16, 1): ((float("inf"), Tile(64, 128, 32, 16, 4, 1)),),
        (torch.bfloat16, 3): ((float("inf"), Tile(64, 128, 32, 16, 4, 1, True)),),
        (torch.float64, 1): ((float("inf"), Tile(64, 128, 32, 16, 4, 1)),),
    },
    8: {
        (torch.bfloat16, 1): (
            (16, Tile(128, 128, 16, 8, 8, 3, True)),
            (32, Tile(128, 128, 32, 8, 8, 3, True)),
            (64, Tile(128, 128, 64, 16, 8, 3, True)),
            (float("inf"), Tile(128, 64, 64, 8, 8, 3, True)),
        ),
        (torch.bfloat16, 3): (
            (16, Tile(128, 128, 16, 16, 8, 3, True)),
            (32, Tile(128, 128, 32, 16, 8, 3, True)),
            (float("inf"), Tile(128, 64, 64, 8, 8, 2, True)),
        ),
        (torch.float64, 1): ((float("inf"), Tile(64, 64, 16, 8, 8, 2, True)),),
    },
    9: {
        (torch.bfloat16, 1): (
            (16, Tile(128, 128, 16, 8, 8, 3)),
            (32, Tile(128, 128, 32, 8, 8, 3)),
            (64, Tile(128, 128, 64, 16, 8, 3)),
            (128, Tile(128, 128, 128, 16, 8, 3)),
            (256, Tile(128, 128, 256, 16, 8, 2)),
            (float("inf"), Tile(128, 128, 64, 16, 8, 4)),
        ),
        (torch.bfloat16, 3): (
            (16, Tile(128, 128, 16, 16, 8, 3)),
            (32, Tile(128, 128, 32, 16, 8, 3)),
            (64, Tile(128, 128, 64, 16, 8, 3)),
            (128, Tile(128, 64, 128, 8, 8, 3)),
            (float("inf"), Tile(128, 128, 64, 16, 8, 3)),
        ),
        (torch.float64, 1): ((float("inf"), Tile(64, 64, 16, 8, 8, 2)),),
    },
}
TILES[10] = TILES[9]
TILES[12] = TILES[8]  # which has as much shared memory as the least of generation 8

# The fast pass splits the codes until there are this many programs, or a tile each.
MATCH_PROGRAMS = {INTERPRETER: 2, 8: 216, 9: 264, 10: 296, 12: 340}
LARGEST_SPLIT = 32

# Rows and codes that a program scores at a time by the definition; two warps have a spare register
# for everything.
RESCORE_TILES = {INTERPRETER: (64, 128), **dict.fromkeys(GPUS, (1, 256))}
RESCORE_OPTIONS = {"num_warps": 2, **EXACT}


@triton.jit
def _score_bound(
    a,
    b,
    a_lost,
    b_lost,
    a_low,
    b_low,
    count,
    PRODUCT: tl.constexpr,
    METRIC: tl.constexpr,
):
    """score_bound of csrc/math/vq.h, of squares that norm_above is yet to be taken of; infinite
    also where a sum might leave the range of float. The product of what is low is left out of the
    three that are taken, and comes on top."""
    above = count.to(tl.float64) * 2.2250738585072014e-308
    a = tl.sqrt(a + above)
    b = tl.sqrt(b + above)
    a_lost = tl.sqrt(a_lost + above)
    b_lost = tl.sqrt(b_lost + above)
    omitted = tl.sqrt(a_low + above) * tl.sqrt(b_low + above)
    if tl.float64 == PRODUCT:
        unit = 1.1102230246251565e-16
        smallest = 2.2250738585072014e-308
        largest_sum = 1e307
    else:
        unit = 2.384185791015625e-07  # matrix units truncate
        smallest = 1.1754943508222875e-38
        largest_sum = 1e38
    if METRIC == L2:
        scale = (a + b) * (a + b) / 2
    else:
        scale = a * b
    roundings = (count + 8).to(tl.float64)
    bound = roundings * (unit + 2.220446049250313e-16) * scale
    bound = 1.04 * (bound + a * b_lost + a_lost * (b + b_lost) + omitted)
    bound += 4 * roundings * smallest * (1 + tl.maximum(a, b))
    provable = (a * b + b * b < largest_sum) & (count <= 65536)
    return tl.where(provable, bound, float("inf"))


@triton.jit
def _best(scores, orders):
    """Of each row the highest score, and the lowest order that has it."""
    top = tl.max(scores, axis=1)
    return top, tl.min(tl.where(scores == top[:, None], orders, TAKEN), axis=1)


@triton.jit
def _worst(scores, orders):
    low = tl.min(scores, axis=1)
    return low, tl.max(tl.where(scores == low[:, None], orders, -1), axis=1)


@triton.jit
def _insert(scores, orders, left_out, new_scores, new_orders):
    """Each row's list with what is better of the new ones; `left_out` is the best of the rest."""
    top, top_order = _best(new_scores, new_orders)
    low, low_order = _worst(scores, orders)
    better = (top > low) | ((top == low) & (top_order < low_order))
    while tl.max(better.to(tl.int32), axis=0) > 0:
        place = better[:, None] & (orders == low_order[:, None])
        taken = better[:, None] & (new_orders == top_order[:, None])
        left_out = tl.where(better, tl.maximum(left_out, low), left_out)
        scores = tl.where(place, top[:, None], scores)
        orders = tl.where(place, top_order[:, None], orders)
        new_scores = tl.where(taken, float("-inf"), new_scores)
        new_orders = tl.where(taken, TAKEN, new_orders)
        top, top_order = _best(new_scores, new_orders)
        low, low_order = _worst(scores, orders)
        better = (top > low) | ((top == low) & (top_order < low_order))
    return scores, orders, tl.maximum(left_out, top)


@triton.jit
def _exact_scores(
    x,
    codebook,
    norms,
    row,
    code,
    there,
    dims,
    METRIC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The definition: scores of rows [M, 1] with codes [M or 1, N] of all heads' codes."""
    x_row = (x + row * dims)[:, :, None]
    code_row = (codebook + code * dims)[:, :, None]
    score = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float64)
    lane = tl.arange(0, 4)[None, None, :]
    # Four dimensions are loaded at once, and added one after the other.
    for d in range(0, dims, 4):
        within = d + lane < dims
        a = tl.load(x_row + (d + lane), mask=within, other=0.0).to(tl.float64)
        c = tl.load(code_row + (d + lane), mask=there[:, :, None] & within, other=0.0)
        c = c.to(tl.float64)
        if METRIC == L2:
            terms = (a - c) * (a - c)
        else:
            terms = a * c
        even, odd = tl.split(tl.reshape(terms, (BLOCK_M, BLOCK_N, 2, 2)))
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
        score = score + first + second + third + fourth
    if METRIC == L2:
        score = -score
    if METRIC == COSINE:
        score = score / tl.load(norms + code, mask=there, other=1.0)
    return score


@triton.jit
def _ranked(score, code, there):
    """What _best and _insert compare: scores that are numbers, and orders."""
    number = score == score
    rank = tl.where(there & number, score, float("-inf"))
    return rank, tl.where(there, tl.where(number, code, code + NAN_LAST), TAKEN)


@triton.jit
def _store_best(indices, inside, scores, orders, k):
    """The k best of each row, in order; -1 for none."""
    for i in range(k):
        _, order = _best(scores, orders)
        tl.store(indices + i, tl.where(order < NONE, order & (NAN_LAST - 1), -1), mask=inside)
        taken = orders == order[:, None]
        scores = tl.where(taken, float("-inf"), scores)
        orders = tl.where(taken, TAKEN, orders)


@triton.jit(do_not_specialize=["codes"])
def _norms_kernel(
    codebook,  # [codes, dims]
    norms,  # [codes], written: double max(|c|, floor)
    codes,
    dims,
    BLOCK: tl.constexpr,
):
    code = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = code < codes
    total = tl.full((BLOCK,), 0.0, tl.float64)
    for d in range(dims):
        c = tl.load(codebook + code * dims + d, mask=there, other=0.0).to(tl.float64)
        total = total + c * c
    norm = tl.maximum(tl.sqrt(total), tl.full((BLOCK,), 1e-12, tl.float64))
    tl.store(norms + code, norm, mask=there)


@triton.jit(do_not_specialize=["count", "source_head", "padded_count", "target_head", "total"])
def _pack_kernel(
    vectors,  # [.., dims]: number i of head h is vector i * step + h * source_head
    mean,  # [heads, dims], l2 only
    norms,  # of the vectors, if they are to be divided by them
    high,  # [.., padded_dims], written: number i of head h is vector i * step + h * target_head
    low,  # likewise, if three products are taken
    bias,  # by vector, written if these are codes: what a code's score starts from
    squares,  # [3, vectors], written: double |v'|^2, |v' - v~|^2 and |low|^2
    count,  # of a head
    step,
    source_head,
    padded_count,
    target_head,
    total,  # of vectors written
    dims,
    padded_dims,
    PRODUCT: tl.constexpr,
    METRIC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    COMPUTE: tl.constexpr = tl.float64 if tl.float64 == PRODUCT else tl.float32
    head = tl.program_id(1).to(tl.int64)
    number = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = number < count
    written = number < padded_count
    source = number * step + head * source_head
    target = number * step + head * target_head
    if norms is not None:
        norm = tl.load(norms + source, mask=exists, other=1.0)
    square = tl.full((BLOCK_M,), 0.0, tl.float64)
    lost_square = tl.full((BLOCK_M,), 0.0, tl.float64)
    low_square = tl.full((BLOCK_M,), 0.0, tl.float64)
    for start in range(0, padded_dims, BLOCK_D):
        lane = start + tl.arange(0, BLOCK_D)
        live = exists[:, None] & (lane < dims)[None, :]
        v = tl.load(vectors + source[:, None] * dims + lane[None, :], mask=live, other=0.0)
        v = v.to(COMPUTE)
        if METRIC == L2:
            v = v - tl.load(mean + head * dims + lane, mask=lane < dims, other=0.0)[None, :]
            v = tl.where(live, v, 0.0)
        if norms is not None:
            v = (v.to(tl.float64) / norm[:, None]).to(COMPUTE)
        wide = v.to(tl.float64)
        square += tl.sum(wide * wide, axis=1)
        at = target[:, None] * padded_dims + lane[None, :]
        rounded = v.to(PRODUCT)
        tl.store(high + at, rounded.to(high.dtype.element_ty), mask=written[:, None])
        lost = v - rounded.to(COMPUTE)
        if low is not None:
            rounded = lost.to(PRODUCT)
            tl.store(low + at, rounded.to(low.dtype.element_ty), mask=written[:, None])
            lost = lost - rounded.to(COMPUTE)
            wide = rounded.to(tl.float64)
            low_square += tl.sum(wide * wide, axis=1)
        wide = lost.to(tl.float64)
        lost_square += tl.sum(wide * wide, axis=1)
    if norms is not None:
        # Nothing is proven of a code whose norm overflowed.
        square = tl.where(norm < float("inf"), square, float("inf"))
    plane = tl.cast(total, tl.int64)
    tl.store(squares + target, square, mask=written)
    tl.store(squares + plane + target, lost_square, mask=written)
    tl.store(squares + 2 * plane + target, low_square, mask=written)
    if bias is not None:
        begin = tl.full((BLOCK_M,), 0.0, tl.float64)
        if METRIC == L2:
            begin = -square / 2
        begin = tl.where(exists, begin, float("-inf")).to(COMPUTE)
        tl.store(bias + target, begin, mask=written)


@triton.jit(do_not_specialize=["rows", "tiles", "all_tiles"])
def _match_kernel(
    x_high,  # [rows, heads, padded_dims]
    x_low,  # likewise, if three products are taken
    code_high,  # [heads, padded codes, padded_dims]
    code_low,  # likewise, if three products are taken
    bias,  # [heads, padded codes]
    scores,  # [splits, rows, heads, ENTRIES], written: the best groups' maxima
    groups,  # likewise, written: a tile's number * SLOTS + the group's number there
    left_out,  # [splits, rows, heads], written: the highest maximum of the other groups
    rows,
    heads,
    padded_dims,
    tiles,  # of codes, a split
    all_tiles,
    SINGLE: tl.constexpr,  # k is 1: a row keeps the best of every slot on the way
    RESIDENT: tl.constexpr,  # padded_dims is BLOCK_D
    SLOTS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ENTRIES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    dtype = bias.dtype.element_ty
    # Matrix instructions leave a thread two neighbours of every eight columns, and a warp all
    # eights, half of them or each fourth, by generation. A slot takes columns that are one
    # thread's, so that a maximum needs nothing of others.
    PARTS: tl.constexpr = SLOTS // 4
    EIGHTS: tl.constexpr = BLOCK_N // PARTS // 8
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_M
    split = tl.program_id(1)
    head = tl.program_id(2).to(tl.int64)
    row = first_row + tl.arange(0, BLOCK_M)
    inside = row < rows
    lane = tl.arange(0, BLOCK_D)
    # A row that is not there reads the tile's first instead: no mask. 32 bits within a tile.
    place = tl.where(inside, tl.arange(0, BLOCK_M), 0)
    x_tile = (first_row * heads + head) * padded_dims
    x_at = place[:, None] * (padded_dims * heads) + lane[None, :]
    code_at = tl.arange(0, BLOCK_N)[None, :] * padded_dims + lane[:, None]
    slot = tl.arange(0, SLOTS)[None, :]

    if RESIDENT:
        x = tl.load(x_high + x_tile + x_at)
        if x_low is not None:
            x_rest = tl.load(x_low + x_tile + x_at)
    if SINGLE:
        best = tl.full((BLOCK_M, SLOTS), float("-inf"), dtype)
        second = tl.full((BLOCK_M, SLOTS), float("-inf"), dtype)
        best_tile = tl.full((BLOCK_M, SLOTS), 0, tl.int32)
    else:
        entry = tl.arange(0, ENTRIES)[None, :].to(tl.int64)
        kept = tl.full((BLOCK_M, ENTRIES), float("-inf"), dtype)
        kept_groups = tl.full((BLOCK_M, ENTRIES), NONE, tl.int64) + entry
        rest = tl.full((BLOCK_M,), float("-inf"), dtype)
    first = split * tiles
    for tile in range(first, tl.minimum(first + tiles, all_tiles)):
        start = (head * all_tiles + tile) * BLOCK_N
        begin = tl.load(bias + start + tl.arange(0, BLOCK_N))[None, :]
        score = tl.broadcast_to(begin, (BLOCK_M, BLOCK_N))
        code_tile = start * padded_dims
        if RESIDENT:
            code = tl.load(code_high + code_tile + code_at)
            score = tl.dot(x, code, score, input_precision="ieee", out_dtype=dtype)
            if x_low is not None:
                score = tl.dot(x_rest, code, score, input_precision="ieee", out_dtype=dtype)
                code = tl.load(code_low + code_tile + code_at)
                score = tl.dot(x, code, score, input_precision="ieee", out_dtype=dtype)
        else:
            for d in range(0, padded_dims, BLOCK_D):
                x = tl.load(x_high + x_tile + d + x_at)
                code = tl.load(code_high + code_tile + d + code_at)
                score = tl.dot(x, code, score, input_precision="ieee", out_dtype=dtype)
                if x_low is not None:
                    x_rest = tl.load(x_low + x_tile + d + x_at)
                    score = tl.dot(x_rest, code, score, input_precision="ieee", out_dtype=dtype)
                    code = tl.load(code_low + code_tile + d + code_at)
                    score = tl.dot(x, code, score, input_precision="ieee", out_dtype=dtype)
        if INTERLEAVED:
            highest = tl.max(tl.reshape(score, (BLOCK_M, EIGHTS, PARTS, 4, 2)), axis=1)
        else:
            highest = tl.max(tl.reshape(score, (BLOCK_M, PARTS, EIGHTS, 4, 2)), axis=2)
        highest = tl.reshape(tl.max(highest, axis=3), (BLOCK_M, SLOTS))
        if SINGLE:
            second = tl.maximum(second, tl.minimum(best, highest))
            best_tile = tl.where(highest > best, tile, best_tile)
            best = tl.maximum(best, highest)
        else:
            group = tl.full((BLOCK_M, SLOTS), 0, tl.int64) + (tile * SLOTS + slot)
            kept, kept_groups, rest = _insert(kept, kept_groups, rest, highest, group)
    out = split.to(tl.int64) * rows * heads + row * heads + head
    if SINGLE:
        group = best_tile.to(tl.int64) * SLOTS + slot
        for i in tl.static_range(ENTRIES):
            top, top_group = _best(best, group)
            tl.store(scores + out * ENTRIES + i, top, mask=inside)
            tl.store(groups + out * ENTRIES + i, top_group, mask=inside)
            taken = group == top_group[:, None]
            best = tl.where(taken, float("-inf"), best)
            group = tl.where(taken, TAKEN, group)
        rest = tl.max(tl.maximum(second, best), axis=1)
    else:
        at = out[:, None] * ENTRIES + entry
        tl.store(scores + at, kept, mask=inside[:, None])
        tl.store(groups + at, kept_groups, mask=inside[:, None])
    tl.store(left_out + out, rest, mask=inside)


@triton.jit(do_not_specialize=["rows", "products", "splits", "k"])
def _settle_kernel(
    scores,  # [splits, rows, ENTRIES]
    groups,  # [splits, rows, ENTRIES]
    left_out,  # [splits, rows]
    row_squares,  # [3, rows]
    code_squares,  # [3, heads]: the largest
    mask,  # [rows / heads], or None
    candidates,  # [rows, ENTRIES], written: the groups that may hold the answer; -1 for none
    listed,  # [rows], written: the rows to score again
    listed_count,  # [1], zero at first
    rows,
    heads,
    products,  # that a score adds up
    splits,
    k,
    PROVE: tl.constexpr,
    PRODUCT: tl.constexpr,
    METRIC: tl.constexpr,
    ENTRIES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    entry = tl.arange(0, ENTRIES)[None, :]
    place = row[:, None] * ENTRIES + entry
    there = inside[:, None]
    score = tl.load(scores + place, mask=there, other=0.0)
    group = tl.load(groups + place, mask=there, other=0)
    rest = tl.load(left_out + row, mask=inside, other=0.0)
    at = tl.cast(rows, tl.int64)
    for _ in range(1, splits):
        new_score = tl.load(scores + at * ENTRIES + place, mask=there, other=0.0)
        new_group = tl.load(groups + at * ENTRIES + place, mask=there, other=0)
        rest = tl.maximum(rest, tl.load(left_out + at + row, mask=inside, other=0.0))
        at += rows
        # Of two entries without a group only one may look like the list's own.
        new_group = tl.where(new_group < NONE, new_group, TAKEN)
        score, group, rest = _insert(score, group, rest, new_score, new_group)

    lower = score
    lower_group = group
    for _ in range(1, k):
        _, first = _best(lower, lower_group)
        lower = tl.where(lower_group == first[:, None], float("-inf"), lower)
        lower_group = tl.where(lower_group == first[:, None], TAKEN, lower_group)
    least = tl.max(lower, axis=1).to(tl.float64)

    a = row_squares + row
    b = code_squares + row % heads
    step = tl.cast(rows, tl.int64)
    bound = _score_bound(
        tl.load(a, mask=inside, other=0.0),
        tl.load(b, mask=inside, other=0.0),
        tl.load(a + step, mask=inside, other=0.0),
        tl.load(b + heads, mask=inside, other=0.0),
        tl.load(a + step * 2, mask=inside, other=0.0),
        tl.load(b + heads * 2, mask=inside, other=0.0),
        products,
        PRODUCT,
        METRIC,
    )
    if PROVE:
        needed = least - 2 * bound
        proven = rest.to(tl.float64) < needed
    else:
        needed = least
        proven = (bound < float("inf")) & (least > float("-inf"))

    live = inside
    if mask is not None:
        live = inside & (tl.load(mask + row // heads, mask=inside, other=0) != 0)
    holds = (live & proven)[:, None] & (score.to(tl.float64) >= needed[:, None])
    tl.store(candidates + place, tl.where(holds, group, -1), mask=there)
    unproven = (live & ~proven).to(tl.int64)
    base = tl.atomic_add(listed_count, tl.sum(unproven, axis=0), sem="relaxed")
    at = base + tl.cumsum(unproven, axis=0) - unproven
    tl.store(listed + at, row, mask=unproven != 0)


@triton.jit(do_not_specialize=["rows", "codes", "k"])
def _choose_kernel(
    x,  # [rows, dims]
    codebook,  # [heads, codes, dims]
    norms,  # [heads, codes], cosine only
    candidates,  # [rows, ENTRIES]
    indices,  # [rows, k], written: -1 for none
    rows,
    heads,
    codes,
    dims,
    k,
    METRIC: tl.constexpr,
    SLOTS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ENTRIES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    PARTS: tl.constexpr = SLOTS // 4
    EIGHTS: tl.constexpr = BLOCK_N // PARTS // 8
    GROUP: tl.constexpr = BLOCK_N // SLOTS
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < rows
    lane = tl.arange(0, ENTRIES * GROUP)[None, :]
    member = lane % GROUP
    place = row[:, None] * ENTRIES + lane // GROUP
    group = tl.load(candidates + place, mask=inside[:, None], other=-1)
    there = group >= 0
    slot = group % SLOTS
    # As _match_kernel takes its columns apart.
    if INTERLEAVED:
        eighth = member // 2 * PARTS + slot // 4
    else:
        eighth = slot // 4 * EIGHTS + member // 2
    code = group // SLOTS * BLOCK_N + eighth * 8 + slot % 4 * 2 + member % 2
    there = there & (code < codes)
    row = tl.where(inside, row, 0)
    head = (row % heads)[:, None]
    all_codes = head * codes + code
    score = _exact_scores(
        x, codebook, norms, row[:, None], all_codes, there, dims, METRIC, BLOCK_M, ENTRIES * GROUP
    )
    rank, order = _ranked(score, code, there)
    _store_best(indices + row * k, inside, rank, order, k)


@triton.jit(do_not_specialize=["codes", "k"])
def _rescore_kernel(
    x,  # [rows, dims]
    codebook,  # [heads, codes, dims]
    norms,  # [heads, codes], cosine only
    listed,  # [listed_count]
    listed_count,  # [1]
    indices,  # [rows, k], those listed are written
    heads,
    codes,
    dims,
    k,
    METRIC: tl.constexpr,
    ENTRIES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    count = tl.load(listed_count)
    entry = tl.arange(0, ENTRIES)[None, :].to(tl.int64)
    for start in range(tl.program_id(0) * BLOCK_M, count, tl.num_programs(0) * BLOCK_M):
        item = start + tl.arange(0, BLOCK_M)
        inside = item < count
        row = tl.load(listed + item, mask=inside, other=0)
        head = (row % heads)[:, None]
        scores = tl.full((BLOCK_M, ENTRIES), float("-inf"), tl.float64)
        orders = tl.full((BLOCK_M, ENTRIES), 0, tl.int64) + (NONE + entry)
        rest = tl.full((BLOCK_M,), float("-inf"), tl.float64)
        for first in range(0, codes, BLOCK_N):
            code = first + tl.arange(0, BLOCK_N)[None, :].to(tl.int64)
            there = code < codes
            score = _exact_scores(
                x,
                codebook,
                norms,
                row[:, None],
                head * codes + code,
                there,
                dims,
                METRIC,
                BLOCK_M,
                BLOCK_N,
            )
            rank, order = _ranked(score, code, there)
            scores, orders, rest = _insert(scores, orders, rest, rank, order)
        _store_best(indices + row * k, inside, scores, orders, k)


@triton.jit(do_not_specialize=["items", "codes"])
def _finish_kernel(
    x,  # [rows, dims]
    codebook,  # [heads, codes, dims]
    indices,  # [items]: k for each row
    values,  # [items], written: d, or factor * |x - c|^2
    quantized,  # [rows, dims], written: the code, or x where there is none; or None
    factor,  # [1] in double, with `quantized`
    items,
    k,
    heads,
    codes,
    dims,
    METRIC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    item = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = item < items
    row = item // k
    lane = tl.arange(0, BLOCK_D)
    index = tl.load(indices + item, mask=inside, other=-1)
    chosen = index >= 0
    code = row % heads * codes + index
    total = tl.full((BLOCK_M,), 0.0, tl.float64)
    x_square = tl.full((BLOCK_M,), 0.0, tl.float64)
    c_square = tl.full((BLOCK_M,), 0.0, tl.float64)
    for d in range(0, dims, BLOCK_D):
        within = (d + lane < dims)[None, :]
        at = row[:, None] * dims + d + lane[None, :]
        a = tl.load(x + at, mask=inside[:, None] & within, other=0.0)
        c = tl.load(
            codebook + code[:, None] * dims + d + lane[None, :],
            mask=chosen[:, None] & within,
            other=0.0,
        )
        if quantized is not None:
            c = tl.where(chosen[:, None], c, a)
            tl.store(quantized + at, c, mask=inside[:, None] & within)
        a = tl.where(chosen[:, None], a, 0.0).to(tl.float64)
        c = tl.where(chosen[:, None], c, 0.0).to(tl.float64)
        if METRIC == L2:
            total += tl.sum((a - c) * (a - c), axis=1)
        else:
            total += tl.sum(a * c, axis=1)
        if METRIC == COSINE:
            x_square += tl.sum(a * a, axis=1)
            c_square += tl.sum(c * c, axis=1)
    if METRIC == COSINE:
        floor = tl.full((BLOCK_M,), 1e-12, tl.float64)
        x_norm = tl.maximum(tl.sqrt(x_square), floor)
        c_norm = tl.maximum(tl.sqrt(c_square), floor)
        total = total / (c_norm * x_norm)
    if quantized is not None:
        total = total * tl.load(factor)
    tl.store(values + item, total.to(values.dtype.element_ty), mask=inside)


def known(generation: int) -> int:
    """The newest generation in the tables that is not newer than this one."""
    return max(key for key in TILES if key <= generation)


def product_of(dtype: torch.dtype, precision: str) -> tuple[torch.dtype, int]:
    """What the fast pass multiplies, and how many products it takes of a pair."""
    if dtype == torch.float64:
        return torch.float64, 1
    return torch.bfloat16, 1 if precision == "fast" else 3


def match_tile(
    generation: int, product: torch.dtype, products: int, dims: int, k: int
) -> tuple[Tile, int]:
    """The tile, and the padded number of dimensions."""
    table = TILES[known(generation)][product, products]
    tile = next(tile for largest, tile in table if dims <= largest)
    if k > 1:
        # All of k groups' codes are scored exactly: small groups. Lists take registers: fewer rows.
        tile = tile._replace(rows=64, slots=tile.codes // 8, interleaved=False)
    return tile, triton.cdiv(dims, tile.dims) * tile.dims


def entries_of(k: int) -> int:
    """How many groups a row keeps."""
    return triton.next_power_of_2(k + 1)


def choose_rows(generation: int, tile: Tile, k: int) -> int:
    return max(1, CHOOSE_SCORES[known(generation)] // (entries_of(k) * tile.codes // tile.slots))


def settle_rows(k: int) -> int:
    return min(BLOCK_ROWS, SETTLED_ENTRIES // entries_of(k))


def pack_tile(generation: int, tile: Tile) -> dict[str, int]:
    width = min(64, tile.dims)
    return {"BLOCK_M": PACK_ELEMENTS[known(generation)] // width, "BLOCK_D": width}


def _nearest(
    x: torch.Tensor,
    codebook: torch.Tensor,
    mask: torch.Tensor,
    metric: str,
    k: int,
    precision: str,
) -> torch.Tensor:
    """Indices [rows * heads, k] for x [rows, heads, dims] and codebook [heads, codes, dims]."""
    rows, heads, dims = x.shape
    codes = codebook.shape[1]
    device = x.device
    kind = METRICS[metric]
    machine = known(generation(x))
    product, products = product_of(x.dtype, precision)
    compute = torch.float64 if product == torch.float64 else torch.float32
    # The interpreter multiplies the bits of bfloat16.
    stored = compute if machine == INTERPRETER else product
    tile, padded_dims = match_tile(machine, product, products, dims, k)
    entries = entries_of(k)
    all_rows = rows * heads
    row_tiles = triton.cdiv(rows, tile.rows)
    code_tiles = triton.cdiv(codes, tile.codes)
    padded_codes = code_tiles * tile.codes
    wanted = min(LARGEST_SPLIT, max(1, MATCH_PROGRAMS[machine] // (row_tiles * heads)))
    split_tiles = triton.cdiv(code_tiles, wanted)
    splits = triton.cdiv(code_tiles, split_tiles)

    def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    mean = codebook.mean(dim=1, dtype=compute) if metric == "l2" else None
    norms = empty(heads, codes, dtype=torch.float64) if metric == "cosine" else None
    x_high = empty(rows, heads, padded_dims, dtype=stored)
    x_low = torch.empty_like(x_high) if products == 3 else None
    row_squares = empty(3, rows, heads, dtype=torch.float64)
    code_high = empty(heads, padded_codes, padded_dims, dtype=stored)
    code_low = torch.empty_like(code_high) if products == 3 else None
    code_squares = empty(3, heads, padded_codes, dtype=torch.float64)
    bias = empty(heads, padded_codes, dtype=compute)
    scores = empty(splits, all_rows, entries, dtype=compute)
    groups = empty(splits, all_rows, entries, dtype=torch.int64)
    left_out = empty(splits, all_rows, dtype=compute)
    candidates = empty(all_rows, entries, dtype=torch.int64)
    listed = empty(all_rows, dtype=torch.int64)
    listed_count = torch.zeros(1, dtype=torch.int64, device=device)
    indices = empty(all_rows, k, dtype=torch.int64)

    pack = pack_tile(machine, tile)
    pack_options = {"PRODUCT": TRITON_TYPES[product], "METRIC": kind, **pack, **EXACT}
    with on_device_of(x):
        if norms is not None:
            _norms_kernel[(triton.cdiv(heads * codes, BLOCK_ROWS),)](
                codebook, norms, heads * codes, dims, BLOCK=BLOCK_ROWS, **EXACT
            )
        _pack_kernel[(triton.cdiv(padded_codes, pack["BLOCK_M"]), heads)](
            codebook,
            mean,
            norms,
            code_high,
            code_low,
            bias,
            code_squares,
            codes,
            1,
            codes,
            padded_codes,
            padded_codes,
            heads * padded_codes,
            dims,
            padded_dims,
            **pack_options,
        )
        _pack_kernel[(triton.cdiv(rows, pack["BLOCK_M"]), heads)](
            x,
            mean,
            None,
            x_high,
            x_low,
            None,
            row_squares,
            rows,
            heads,
            1,
            rows,
            1,
            all_rows,
            dims,
            padded_dims,
            **pack_options,
        )
        _match_kernel[(row_tiles, splits, heads)](
            x_high,
            x_low,
            code_high,
            code_low,
            bias,
            scores,
            groups,
            left_out,
            rows,
            heads,
            padded_dims,
            split_tiles,
            code_tiles,
            SINGLE=k == 1,
            RESIDENT=padded_dims == tile.dims,
            SLOTS=tile.slots,
            INTERLEAVED=tile.interleaved,
            ENTRIES=entries,
            BLOCK_M=tile.rows,
            BLOCK_N=tile.codes,
            BLOCK_D=tile.dims,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            **FUSED,
        )
        _settle_kernel[(triton.cdiv(all_rows, settle_rows(k)),)](
            scores,
            groups,
            left_out,
            row_squares,
            code_squares.amax(dim=2),
            mask.view(torch.uint8) if mask.numel() else None,
            candidates,
            listed,
            listed_count,
            all_rows,
            heads,
            products * dims,
            splits,
            k,
            PROVE=precision == "exact" or product == torch.float64,
            PRODUCT=TRITON_TYPES[product],
            METRIC=kind,
            ENTRIES=entries,
            BLOCK=settle_rows(k),
            **EXACT,
        )
        _choose_kernel[(triton.cdiv(all_rows, choose_rows(machine, tile, k)),)](
            x,
            codebook,
            norms,
            candidates,
            indices,
            all_rows,
            heads,
            codes,
            dims,
            k,
            METRIC=kind,
            SLOTS=tile.slots,
            INTERLEAVED=tile.interleaved,
            ENTRIES=entries,
            BLOCK_M=choose_rows(machine, tile, k),
            BLOCK_N=tile.codes,
            **EXACT,
        )
        rescore_rows, rescore_codes = RESCORE_TILES[machine]
        _rescore_kernel[(min(triton.cdiv(all_rows, rescore_rows), RESCORE_PROGRAMS),)](
            x,
            codebook,
            norms,
            listed,
            listed_count,
            indices,
            heads,
            codes,
            dims,
            k,
            METRIC=kind,
            ENTRIES=triton.next_power_of_2(k),
            BLOCK_M=rescore_rows,
            BLOCK_N=rescore_codes,
            **RESCORE_OPTIONS,
        )
    return indices


def _finish(
    x: torch.Tensor,
    codebook: torch.Tensor,
    indices: torch.Tensor,
    metric: str,
    quantized: torch.Tensor | None = None,
    factor: torch.Tensor | None = None,
) -> torch.Tensor:
    """Distances of the chosen codes; or their loss, with the codes written into `quantized`."""
    _, heads, dims = x.shape
    values = torch.empty_like(indices, dtype=compute_dtype(x))
    tile_rows, tile_dims = FINISH_TILES[known(generation(x))]
    with on_device_of(x):
        _finish_kernel[(triton.cdiv(indices.numel(), tile_rows),)](
            x,
            codebook,
            indices,
            values,
            quantized,
            factor,
            indices.numel(),
            indices.shape[1],
            heads,
            codebook.shape[1],
            dims,
            METRIC=METRICS[metric],
            BLOCK_M=tile_rows,
            BLOCK_D=tile_dims,
            **EXACT,
        )
    return values


def _by_head(x: torch.Tensor, codebook: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Contiguous, one head for none."""
    if x.dim() == 2:
        x, codebook = x[:, None], codebook[None]
    return x.contiguous(), codebook.contiguous()


def vq_nearest(
    x: torch.Tensor,
    codebook: torch.Tensor,
    mask: torch.Tensor,
    metric: str,
    k: int,
    precision: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The distance (l2) or similarity to each row's nearest code or codes, and their indices."""
    if k > LARGEST_K:
        raise ValueError(f"k: at most {LARGEST_K} on the triton backend, got {k}")
    shape = x.shape[:-1] if k == 0 else (*x.shape[:-1], k)
    if x.numel() == 0:
        return x.new_empty(shape, dtype=compute_dtype(x)), x.new_empty(shape, dtype=torch.int64)
    x, codebook = _by_head(x, codebook)
    indices = _nearest(x, codebook, mask.contiguous(), metric, max(1, k), precision)
    distances = _finish(x, codebook, indices, metric)
    return distances.view(shape), indices.view(shape)


def vq_quantize(
    x: torch.Tensor,
    codebook: torch.Tensor,
    mask: torch.Tensor,
    metric: str,
    precision: str,
    estimator: str,
    codebook_weight: float,
    beta: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Each row's nearest code, its loss, and its index."""
    shape = x.shape[:-1]
    if x.numel() == 0:
        losses = x.new_empty(shape, dtype=compute_dtype(x))
        return torch.empty_like(x), losses, x.new_empty(shape, dtype=torch.int64)
    x, codebook = _by_head(x, codebook)
    indices = _nearest(x, codebook, mask.contiguous(), metric, 1, precision)
    quantized = torch.empty_like(x)
    factor = torch.full((1,), codebook_weight + beta, dtype=torch.float64, device=x.device)
    losses = _finish(x, codebook, indices, "l2", quantized, factor)
    return quantized.view(*shape, -1), losses.view(shape), indices.view(shape)


def compile_cases(generation: int) -> list[CompileCase]:
    machine = known(generation)
    finish = dict(zip(("BLOCK_M", "BLOCK_D"), FINISH_TILES[machine], strict=True))
    cases = []

    def add(
        name: str,
        kernel: Any,
        types: dict[str, str],
        constants: dict[str, Any],
        options: dict[str, Any] = EXACT,
        **checks: Any,
    ) -> None:
        cases.append(CompileCase(name, kernel, types, constants, options, **checks))

    def sizes(*names: str) -> dict[str, str]:
        return dict.fromkeys(names, "i32")

    for (product, products), table in TILES[machine].items():
        stored = f"*{short_name(product)}"
        summed = "*fp64" if product == torch.float64 else "*fp32"
        low = {"x_low": stored, "code_low": stored} if products == 3 else {}
        for largest, _ in table:
            for k in (1, 8):
                dims = 1024 if largest == float("inf") else int(largest)
                tile, padded_dims = match_tile(machine, product, products, dims, k)
                add(
                    f"match-{short_name(product)}-{products}-d{dims}-k{k}",
                    _match_kernel,
                    {
                        "x_high": stored,
                        "code_high": stored,
                        **low,
                        "bias": summed,
                        "scores": summed,
                        "groups": "*i64",
                        "left_out": summed,
                        **sizes("rows", "heads", "padded_dims", "tiles", "all_tiles"),
                    },
                    {
                        "SINGLE": k == 1,
                        "RESIDENT": padded_dims == tile.dims,
                        "SLOTS": tile.slots,
                        "INTERLEAVED": tile.interleaved,
                        "ENTRIES": entries_of(k),
                        "BLOCK_M": tile.rows,
                        "BLOCK_N": tile.codes,
                        "BLOCK_D": tile.dims,
                    },
                    {"num_warps": tile.num_warps, "num_stages": tile.num_stages, **FUSED},
                    multiples=("padded_dims",),
                    vector_loads=True,
                    fused=True,
                    instructions=() if product == torch.float64 else ("mma",),
                )

    for type_, product, products in (
        ("fp32", torch.bfloat16, 3),
        ("fp32", torch.bfloat16, 1),
        ("bf16", torch.bfloat16, 3),
        ("fp64", torch.float64, 1),
    ):
        given = f"*{type_}"
        stored = f"*{short_name(product)}"
        summed = "*fp64" if product == torch.float64 else "*fp32"
        tile, _ = match_tile(machine, product, products, 64, 1)
        if not (type_ == "fp32" and products == 1):
            add(
                f"norms-{type_}",
                _norms_kernel,
                {"codebook": given, "norms": "*fp64", **sizes("codes", "dims")},
                {"BLOCK": BLOCK_ROWS},
                instructions=("sqrt.rn.f64",),
            )
            add(
                f"quantize-{type_}",
                _finish_kernel,
                {
                    "x": given,
                    "codebook": given,
                    "indices": "*i64",
                    "values": summed,
                    "quantized": given,
                    "factor": "*fp64",
                    **sizes("items", "k", "heads", "codes", "dims"),
                },
                {"METRIC": METRICS["l2"], **finish},
                multiples=("dims",),
                vector_loads=True,
            )
        for metric, kind in METRICS.items():
            name = f"{metric}-{type_}"
            norms = {"norms": "*fp64"} if metric == "cosine" else {}
            for what, of_codes in (
                ("codes", {**norms, "bias": summed}),
                ("rows", {}),
            ):
                add(
                    f"pack-{what}-{name}-{products}",
                    _pack_kernel,
                    {
                        "vectors": given,
                        "high": stored,
                        "squares": "*fp64",
                        **of_codes,
                        **({"mean": summed} if metric == "l2" else {}),
                        **({"low": stored} if products == 3 else {}),
                        **sizes("count", "step", "source_head", "padded_count", "target_head"),
                        **sizes("total", "dims", "padded_dims"),
                    },
                    {"PRODUCT": TRITON_TYPES[product], "METRIC": kind, **pack_tile(machine, tile)},
                    multiples=("dims", "padded_dims"),
                    vector_loads=True,
                    instructions=("div.rn.f64",) if "norms" in of_codes else (),
                )
            for k in (1, 8):
                if type_ != "bf16":
                    add(
                        f"settle-{name}-{products}-k{k}",
                        _settle_kernel,
                        {
                            "scores": summed,
                            "groups": "*i64",
                            "left_out": summed,
                            "row_squares": "*fp64",
                            "code_squares": "*fp64",
                            "mask": "*u8",
                            **dict.fromkeys(("candidates", "listed", "listed_count"), "*i64"),
                            **sizes("rows", "heads", "products", "splits", "k"),
                        },
                        {
                            "PROVE": products == 3 or type_ == "fp64",
                            "PRODUCT": TRITON_TYPES[product],
                            "METRIC": kind,
                            "ENTRIES": entries_of(k),
                            "BLOCK": settle_rows(k),
                        },
                        instructions=("sqrt.rn.f64",),
                    )
                if type_ == "fp32" and products == 1:
                    continue
                tile, _ = match_tile(machine, product, products, 64, k)
                lookup = {
                    "x": given,
                    "codebook": given,
                    "indices": "*i64",
                    **norms,
                    **sizes("heads", "codes", "dims", "k"),
                }
                division = {"instructions": ("div.rn.f64",)} if norms else {}
                add(
                    f"choose-{name}-k{k}",
                    _choose_kernel,
                    {**lookup, "candidates": "*i64", **sizes("rows")},
                    {
                        "METRIC": kind,
                        "SLOTS": tile.slots,
                        "INTERLEAVED": tile.interleaved,
                        "ENTRIES": entries_of(k),
                        "BLOCK_M": choose_rows(machine, tile, k),
                        "BLOCK_N": tile.codes,
                    },
                    multiples=("dims",),
                    **division,
                )
                add(
                    f"rescore-{name}-k{k}",
                    _rescore_kernel,
                    {**lookup, "listed": "*i64", "listed_count": "*i64"},
                    {
                        "METRIC": kind,
                        "ENTRIES": triton.next_power_of_2(k),
                        "BLOCK_M": RESCORE_TILES[machine][0],
                        "BLOCK_N": RESCORE_TILES[machine][1],
                    },
                    RESCORE_OPTIONS,
                    multiples=("dims",),
                    **division,
                )
            if type_ == "fp32" and products == 1:
                continue
            add(
                f"finish-{name}",
                _finish_kernel,
                {
                    "x": given,
                    "codebook": given,
                    "indices": "*i64",
                    "values": summed,
                    **sizes("items", "k", "heads", "codes", "dims"),
                },
                {"METRIC": kind, **finish},
                multiples=("dims",),
                vector_loads=True,
            )
    return cases
