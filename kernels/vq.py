"""Nearest-codebook lookup: a fast pass in the codes' precision, and a proof of its answer.

The answer is defined in csrc/math/vq.h: the lowest index with the highest score in double. The
fast pass scores tiles of codes by a matrix product and keeps a row's best, its index and its
second best. Where the second best lies more than twice the proven bound below the best, the index
is the answer; the other rows are listed and scored again as the definition says.

  pack      the codes transposed and padded, centred (l2) or normalised (cosine), once a call
  match     the fast pass; the codes may be split among programs
  settle    join the splits; list the rows that are not proven
  rescore   the listed rows by the definition
  distance  from each row to its code
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .runtime import EXACT, FUSED, INTERPRETER, CompileCase, generation, on_device_of

METRICS = {"l2": 0, "cosine": 1, "dot": 2}
L2 = tl.constexpr(METRICS["l2"])
COSINE = tl.constexpr(METRICS["cosine"])

BLOCK_ROWS = 128  # rows a program settles
RESCORE_PROGRAMS = 1024
DISTANCE_TILE = (32, 32)  # rows, dimensions


class Tile(NamedTuple):
    """What a program of the fast pass holds at a time, and how it is compiled."""

    rows: int
    codes: int
    dims: int
    num_warps: int
    num_stages: int


# By generation and type, in rising order: up to which D, the tile.
TILES = {
    INTERPRETER: {
        torch.float32: ((float("inf"), Tile(32, 64, 32, 4, 1)),),
        torch.float64: ((float("inf"), Tile(32, 64, 32, 4, 1)),),
    },
    8: {
        torch.float32: ((float("inf"), Tile(128, 128, 16, 8, 2)),),
        torch.float64: ((float("inf"), Tile(64, 64, 16, 8, 2)),),
    },
}
TILES[9] = TILES[8]
TILES[10] = TILES[8]

# The fast pass splits the codes until there are this many programs, or a tile each.
MATCH_PROGRAMS = {INTERPRETER: 8, 8: 216, 9: 264, 10: 296}

# Rows and codes that a program scores at a time by the definition.
RESCORE_TILES = {INTERPRETER: (32, 128), 8: (2, 128), 9: (2, 128), 10: (2, 128)}


@triton.jit
def _norm_above(sum_of_squares, dims):
    """norm_above of csrc/math/vq.h."""
    return tl.sqrt(sum_of_squares + dims.to(tl.float64) * 2.2250738585072014e-308)


@triton.jit
def _score_bound(a, b, dims, DTYPE: tl.constexpr, METRIC: tl.constexpr):
    """score_bound of csrc/math/vq.h; infinite also where a sum might leave the range of DTYPE."""
    if tl.float64 == DTYPE:
        unit = 1.1102230246251565e-16
        smallest = 2.2250738585072014e-308
        largest_sum = 1e307
    else:
        unit = 5.9604644775390625e-08
        smallest = 1.1754943508222875e-38
        largest_sum = 1e38
    if METRIC == L2:
        scale = (a + b) * (a + b) / 2
    else:
        scale = a * b
    roundings = (dims + 8).to(tl.float64)
    bound = 1.02 * roundings * (unit + 2.220446049250313e-16) * scale
    bound += 4 * roundings * smallest * (1 + tl.maximum(a, b))
    provable = (a * b + b * b < largest_sum) & (dims <= 65536)
    return tl.where(provable, bound, float("inf"))


@triton.jit(do_not_specialize=["codes", "dims"])
def _pack_kernel(
    codebook,  # [codes, dims]
    mean,  # [dims], l2 only
    packed,  # [padded_dims, padded_codes], written
    bias,  # [padded_codes], written: what a code's score starts from
    squares,  # [padded_codes], written: double |c'|^2 of the packed code
    norms,  # [padded_codes], written: double max(|c|, floor), cosine only
    codes,
    dims,
    padded_codes,
    padded_dims,
    METRIC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    dtype = packed.dtype.element_ty
    stride = tl.cast(padded_codes, tl.int64)
    code = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = code < codes
    source = codebook + code * dims
    norm = tl.full((BLOCK,), 1.0, tl.float64)
    if METRIC == COSINE:
        total = tl.zeros((BLOCK,), tl.float64)
        for d in range(dims):
            c = tl.load(source + d, mask=inside, other=0.0).to(tl.float64)
            total = total + c * c
        norm = tl.maximum(tl.sqrt(total), tl.full((BLOCK,), 1e-12, tl.float64))
        tl.store(norms + code, norm)

    square = tl.zeros((BLOCK,), tl.float64)
    target = packed + code
    for d in range(dims):
        c = tl.load(source + d, mask=inside, other=0.0)
        if METRIC == L2:
            c = tl.where(inside, c - tl.load(mean + d), 0.0)
        if METRIC == COSINE:
            c = (c.to(tl.float64) / norm).to(dtype)
        tl.store(target, c)
        target += stride
        square = square + c.to(tl.float64) * c.to(tl.float64)
    for _ in range(dims, padded_dims):
        tl.store(target, tl.zeros((BLOCK,), dtype))
        target += stride
    # Nothing is proven of a code whose norm overflowed.
    square = tl.where(norm < float("inf"), square, float("inf"))
    tl.store(squares + code, square)
    start = tl.zeros((BLOCK,), tl.float64)
    if METRIC == L2:
        start = -square / 2
    tl.store(bias + code, tl.where(inside, start, float("-inf")).to(dtype))


@triton.jit(do_not_specialize=["rows", "tiles"])
def _match_kernel(
    x,  # [rows, padded_dims]
    mean,  # [padded_dims], l2 only
    packed,  # [padded_dims, padded_codes]
    bias,  # [padded_codes]
    best_scores,  # [splits, rows], written
    best_indices,  # [splits, rows], written
    second_scores,  # [splits, rows], written
    squares,  # [rows], written: double |x'|^2
    rows,
    padded_dims,
    padded_codes,
    tiles,  # of codes, a split
    METRIC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    dtype = packed.dtype.element_ty
    stride = tl.cast(padded_codes, tl.int64)
    split = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < rows
    lane = tl.arange(0, BLOCK_D)
    column = tl.arange(0, BLOCK_N)
    source = x + row[:, None] * padded_dims + lane[None, :]

    if split == 0:
        square = tl.zeros((BLOCK_M,), tl.float64)
        for d in range(0, padded_dims, BLOCK_D):
            part = tl.load(source + d, mask=inside[:, None], other=0.0)
            if METRIC == L2:
                part = part - tl.load(mean + d + lane)[None, :]
            wide = part.to(tl.float64)
            square += tl.sum(wide * wide, axis=1)
        tl.store(squares + row, square, mask=inside)

    best = tl.full((BLOCK_M,), float("-inf"), dtype)
    second = tl.full((BLOCK_M,), float("-inf"), dtype)
    index = tl.zeros((BLOCK_M,), tl.int64)
    first = split * tiles * BLOCK_N
    last = tl.minimum(first + tiles * BLOCK_N, padded_codes)
    for start in range(first, last, BLOCK_N):
        code = start + column
        score = tl.zeros((BLOCK_M, BLOCK_N), dtype) + tl.load(bias + code)[None, :]
        tile = packed + lane[:, None] * stride + code[None, :]
        for d in range(0, padded_dims, BLOCK_D):
            part = tl.load(source + d, mask=inside[:, None], other=0.0)
            if METRIC == L2:
                part = part - tl.load(mean + d + lane)[None, :]
            score = tl.dot(part, tl.load(tile), score, input_precision="ieee", out_dtype=dtype)
            tile += BLOCK_D * stride
        tile_best = tl.max(score, axis=1)
        place = tl.min(tl.where(score == tile_best[:, None], column[None, :], BLOCK_N), axis=1)
        others = tl.where(column[None, :] == place[:, None], float("-inf"), score)
        tile_second = tl.max(others, axis=1)
        second = tl.maximum(tl.maximum(second, tile_second), tl.minimum(best, tile_best))
        index = tl.where(tile_best > best, start + place, index)
        best = tl.maximum(best, tile_best)

    out = split * rows + row
    tl.store(best_scores + out, best, mask=inside)
    tl.store(best_indices + out, index, mask=inside)
    tl.store(second_scores + out, second, mask=inside)


@triton.jit(do_not_specialize=["rows", "dims", "splits"])
def _settle_kernel(
    best_scores,  # [splits, rows]
    best_indices,  # [splits, rows]
    second_scores,  # [splits, rows]
    row_squares,  # [rows]
    code_square,  # [1]: the largest
    indices,  # [rows], written
    listed,  # [rows], written: the rows to score again
    listed_count,  # [1], zero at first
    rows,
    dims,
    splits,
    METRIC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    best = tl.full((BLOCK,), float("-inf"), tl.float64)
    second = tl.full((BLOCK,), float("-inf"), tl.float64)
    index = tl.zeros((BLOCK,), tl.int64)
    place = row
    for _ in range(splits):
        split_best = tl.load(best_scores + place, mask=inside, other=0.0).to(tl.float64)
        split_second = tl.load(second_scores + place, mask=inside, other=0.0).to(tl.float64)
        split_index = tl.load(best_indices + place, mask=inside, other=0)
        second = tl.maximum(tl.maximum(second, split_second), tl.minimum(best, split_best))
        index = tl.where(split_best > best, split_index, index)
        best = tl.maximum(best, split_best)
        place += rows
    tl.store(indices + row, index, mask=inside)

    a = _norm_above(tl.load(row_squares + row, mask=inside, other=0.0), dims)
    b = _norm_above(tl.load(code_square), dims)
    bound = _score_bound(a, b, dims, best_scores.dtype.element_ty, METRIC)
    proven = second < best - 2 * bound
    unproven = (inside & ~proven).to(tl.int64)
    base = tl.atomic_add(listed_count, tl.sum(unproven, axis=0), sem="relaxed")
    place = base + tl.cumsum(unproven, axis=0) - unproven
    tl.store(listed + place, row, mask=unproven != 0)


@triton.jit(do_not_specialize=["codes", "dims"])
def _rescore_kernel(
    x,  # [rows, dims]
    codebook,  # [codes, dims]
    norms,  # [codes], cosine only
    listed,  # [listed_count]
    listed_count,  # [1]
    indices,  # [rows], those listed are written
    codes,
    dims,
    METRIC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    count = tl.load(listed_count)
    for start in range(tl.program_id(0) * BLOCK_M, count, tl.num_programs(0) * BLOCK_M):
        item = start + tl.arange(0, BLOCK_M)
        row = tl.load(listed + item, mask=item < count, other=0)
        # The definition, each lane its own codes; index -1: no code but NaN so far.
        best = tl.full((BLOCK_M, BLOCK_N), float("-inf"), tl.float64)
        index = tl.full((BLOCK_M, BLOCK_N), -1, tl.int64)
        for first in range(0, codes, BLOCK_N):
            code = first + tl.arange(0, BLOCK_N).to(tl.int64)
            inside = code < codes
            score = tl.zeros((BLOCK_M, BLOCK_N), tl.float64)
            for d in range(dims):
                a = tl.load(x + row * dims + d).to(tl.float64)[:, None]
                c = tl.load(codebook + code * dims + d, mask=inside, other=0.0)
                c = c.to(tl.float64)[None, :]
                if METRIC == L2:
                    score = score + (a - c) * (a - c)
                else:
                    score = score + a * c
            if METRIC == L2:
                score = -score
            if METRIC == COSINE:
                score = score / tl.load(norms + code, mask=inside, other=1.0)[None, :]
            better = (score > best) | ((index < 0) & (score == score))
            better = better & inside[None, :]
            best = tl.where(better, score, best)
            index = tl.where(better, code[None, :], index)
        top = tl.max(best, axis=1)
        winner = tl.where((index >= 0) & (best == top[:, None]), index, codes)
        winner = tl.min(winner, axis=1)
        winner = tl.where(winner < codes, winner, 0)
        tl.store(indices + row, winner, mask=item < count)


@triton.jit(do_not_specialize=["rows"])
def _distance_kernel(
    x,  # [rows, dims]
    codebook,  # [codes, dims]
    indices,  # [rows]
    distances,  # [rows], written
    rows,
    dims,
    METRIC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < rows
    lane = tl.arange(0, BLOCK_D)
    index = tl.load(indices + row, mask=inside, other=0)
    total = tl.zeros((BLOCK_M,), tl.float64)
    x_square = tl.zeros((BLOCK_M,), tl.float64)
    c_square = tl.zeros((BLOCK_M,), tl.float64)
    for d in range(0, dims, BLOCK_D):
        live = inside[:, None] & (d + lane < dims)[None, :]
        a = tl.load(x + row[:, None] * dims + d + lane[None, :], mask=live, other=0.0)
        c = tl.load(codebook + index[:, None] * dims + d + lane[None, :], mask=live, other=0.0)
        a = a.to(tl.float64)
        c = c.to(tl.float64)
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
    tl.store(distances + row, total.to(distances.dtype.element_ty), mask=inside)


def known(generation: int) -> int:
    """The newest generation in the tables that is not newer than this one."""
    return max(key for key in TILES if key <= generation)


def match_tile(generation: int, dtype: torch.dtype, dims: int) -> Tile:
    return next(tile for largest, tile in TILES[known(generation)][dtype] if dims <= largest)


def vq_nearest(
    x: torch.Tensor, codebook: torch.Tensor, mask: torch.Tensor, metric: str, k: int, precision: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The index of each row's nearest code, int64, and the distance (l2) or similarity to it."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    x, codebook = x.to(dtype).contiguous(), codebook.to(dtype).contiguous()
    rows, dims = x.shape
    codes = codebook.shape[0]
    device = x.device
    kind = METRICS[metric]

    def empty(*shape, dtype):
        return torch.empty(shape, dtype=dtype, device=device)

    indices = empty(rows, dtype=torch.int64)
    distances = empty(rows, dtype=dtype)
    if rows == 0:
        return distances, indices

    machine = known(generation(x))
    tile = match_tile(machine, dtype, dims)
    rescore_rows, rescore_codes = RESCORE_TILES[machine]
    padded_codes = triton.cdiv(codes, tile.codes) * tile.codes
    padded_dims = triton.cdiv(dims, tile.dims) * tile.dims
    row_tiles = triton.cdiv(rows, tile.rows)
    code_tiles = padded_codes // tile.codes
    split_tiles = triton.cdiv(code_tiles, max(1, MATCH_PROGRAMS[machine] // row_tiles))
    splits = triton.cdiv(code_tiles, split_tiles)

    # The fast pass takes whole tiles of dimensions: zeros add nothing, roundings included.
    padding = (0, padded_dims - dims)
    padded_x = torch.nn.functional.pad(x, padding) if padded_dims > dims else x
    mean = torch.nn.functional.pad(codebook.mean(dim=0), padding) if metric == "l2" else None
    norms = empty(padded_codes, dtype=torch.float64) if metric == "cosine" else None
    packed = empty(padded_dims, padded_codes, dtype=dtype)
    bias = empty(padded_codes, dtype=dtype)
    code_squares = empty(padded_codes, dtype=torch.float64)
    row_squares = empty(rows, dtype=torch.float64)
    best_scores = empty(splits, rows, dtype=dtype)
    second_scores = empty(splits, rows, dtype=dtype)
    best_indices = empty(splits, rows, dtype=torch.int64)
    listed = empty(rows, dtype=torch.int64)
    listed_count = torch.zeros(1, dtype=torch.int64, device=device)

    with on_device_of(x):
        _pack_kernel[(code_tiles,)](
            codebook,
            mean,
            packed,
            bias,
            code_squares,
            norms,
            codes,
            dims,
            padded_codes,
            padded_dims,
            METRIC=kind,
            BLOCK=tile.codes,
            **EXACT,
        )
        _match_kernel[(row_tiles, splits)](
            padded_x,
            mean,
            packed,
            bias,
            best_scores,
            best_indices,
            second_scores,
            row_squares,
            rows,
            padded_dims,
            padded_codes,
            split_tiles,
            METRIC=kind,
            BLOCK_M=tile.rows,
            BLOCK_N=tile.codes,
            BLOCK_D=tile.dims,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            **FUSED,
        )
        _settle_kernel[(triton.cdiv(rows, BLOCK_ROWS),)](
            best_scores,
            best_indices,
            second_scores,
            row_squares,
            code_squares.max(),
            indices,
            listed,
            listed_count,
            rows,
            dims,
            splits,
            METRIC=kind,
            BLOCK=BLOCK_ROWS,
            **EXACT,
        )
        _rescore_kernel[(min(triton.cdiv(rows, rescore_rows), RESCORE_PROGRAMS),)](
            x,
            codebook,
            norms,
            listed,
            listed_count,
            indices,
            codes,
            dims,
            METRIC=kind,
            BLOCK_M=rescore_rows,
            BLOCK_N=rescore_codes,
            **EXACT,
        )
        _distance_kernel[(triton.cdiv(rows, DISTANCE_TILE[0]),)](
            x,
            codebook,
            indices,
            distances,
            rows,
            dims,
            METRIC=kind,
            BLOCK_M=DISTANCE_TILE[0],
            BLOCK_D=DISTANCE_TILE[1],
            **EXACT,
        )
    return distances, indices


def compile_cases(generation: int) -> list[CompileCase]:
    cases = []
    rescore_rows, rescore_codes = RESCORE_TILES[known(generation)]
    for metric, kind in METRICS.items():
        for type_, dtype in (("fp32", torch.float32), ("fp64", torch.float64)):
            pointer = f"*{type_}"
            name = f"{metric}-{type_}"
            mean = {"mean": pointer} if metric == "l2" else {}
            norms = {"norms": "*fp64"} if metric == "cosine" else {}
            tile = match_tile(generation, dtype, 64)
            cases += [
                CompileCase(
                    name=f"pack-{name}",
                    kernel=_pack_kernel,
                    types={
                        "codebook": pointer,
                        "packed": pointer,
                        "bias": pointer,
                        "squares": "*fp64",
                        "codes": "i32",
                        "dims": "i32",
                        "padded_codes": "i32",
                        "padded_dims": "i32",
                        **mean,
                        **norms,
                    },
                    constants={"METRIC": kind, "BLOCK": tile.codes},
                    options=EXACT,
                    multiples=("padded_codes", "padded_dims"),
                    instructions=("sqrt.rn.f64", "div.rn.f64") if norms else (),
                ),
                CompileCase(
                    name=f"match-{name}",
                    kernel=_match_kernel,
                    types={
                        "x": pointer,
                        "packed": pointer,
                        "bias": pointer,
                        "best_scores": pointer,
                        "best_indices": "*i64",
                        "second_scores": pointer,
                        "squares": "*fp64",
                        "rows": "i32",
                        "padded_dims": "i32",
                        "padded_codes": "i32",
                        "tiles": "i32",
                        **mean,
                    },
                    constants={
                        "METRIC": kind,
                        "BLOCK_M": tile.rows,
                        "BLOCK_N": tile.codes,
                        "BLOCK_D": tile.dims,
                    },
                    options={
                        "num_warps": tile.num_warps,
                        "num_stages": tile.num_stages,
                        **FUSED,
                    },
                    multiples=("padded_dims", "padded_codes"),
                    vector_loads=True,
                    fused=True,
                ),
                CompileCase(
                    name=f"settle-{name}",
                    kernel=_settle_kernel,
                    types={
                        "best_scores": pointer,
                        "best_indices": "*i64",
                        "second_scores": pointer,
                        "row_squares": "*fp64",
                        "code_square": "*fp64",
                        "indices": "*i64",
                        "listed": "*i64",
                        "listed_count": "*i64",
                        "rows": "i32",
                        "dims": "i32",
                        "splits": "i32",
                    },
                    constants={"METRIC": kind, "BLOCK": BLOCK_ROWS},
                    options=EXACT,
                    instructions=("sqrt.rn.f64",),
                ),
                CompileCase(
                    name=f"rescore-{name}",
                    kernel=_rescore_kernel,
                    types={
                        "x": pointer,
                        "codebook": pointer,
                        "listed": "*i64",
                        "listed_count": "*i64",
                        "indices": "*i64",
                        "codes": "i32",
                        "dims": "i32",
                        **norms,
                    },
                    constants={
                        "METRIC": kind,
                        "BLOCK_M": rescore_rows,
                        "BLOCK_N": rescore_codes,
                    },
                    options=EXACT,
                    instructions=("div.rn.f64",) if norms else (),
                ),
                CompileCase(
                    name=f"distance-{name}",
                    kernel=_distance_kernel,
                    types={
                        "x": pointer,
                        "codebook": pointer,
                        "indices": "*i64",
                        "distances": pointer,
                        "rows": "i32",
                        "dims": "i32",
                    },
                    constants={
                        "METRIC": kind,
                        "BLOCK_M": DISTANCE_TILE[0],
                        "BLOCK_D": DISTANCE_TILE[1],
                    },
                    options=EXACT,
                    multiples=("dims",),
                    vector_loads=True,
                ),
            ]
    return cases
