"""Kernel densities at points, and the gradients: tiles of all pairs of a cloud.

A program has a block of rows and goes through a part of the cloud's others; torch adds up the
parts in double. Sums are float32 over few terms, and double over those.

  density   sums of kernels at the queries
  gradient  of the queries; or of the points, their scales and weights: the other way round
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastzoo.reference.precision import compute_dtype

from .runtime import FUSED, INTERPRETER, CompileCase, generation, on_device_of
from .score_tiles import known

KERNELS = {"gaussian": 0, "epanechnikov": 1, "tophat": 2}
GAUSSIAN = tl.constexpr(KERNELS["gaussian"])
EPANECHNIKOV = tl.constexpr(KERNELS["epanechnikov"])


class Tile(NamedTuple):
    rows: int
    others: int
    at_a_time: int  # tiles that are added in float32
    programs: int  # wanted: rows of small clouds share their others among several
    distance_dims: int  # that are loaded at once
    gradient_dims: int  # that a program has gradients of: it makes the distances for these alone


# By generation, and by the bytes of what is computed in.
TILES = {
    INTERPRETER: dict.fromkeys((4, 8), Tile(64, 128, 2, 4, 64, 64)),
    8: {4: Tile(32, 64, 16, 864, 1, 8), 8: Tile(32, 32, 16, 864, 1, 8)},
    9: {4: Tile(32, 64, 16, 1056, 1, 8), 8: Tile(32, 32, 16, 1056, 1, 8)},
    10: {4: Tile(32, 64, 16, 1184, 1, 8), 8: Tile(32, 32, 16, 1184, 1, 8)},
}
GRADIENT_TILES = {
    INTERPRETER: dict.fromkeys((4, 8), Tile(64, 64, 1, 4, 64, 64)),
    8: {4: Tile(16, 32, 1, 864, 1, 8), 8: Tile(16, 16, 1, 864, 1, 8)},
    9: {4: Tile(16, 32, 1, 1056, 1, 8), 8: Tile(16, 16, 1, 1056, 1, 8)},
    10: {4: Tile(16, 32, 1, 1184, 1, 8), 8: Tile(16, 16, 1, 1184, 1, 8)},
}
LARGEST_SPLIT = 32
FEW_DIMS = tl.constexpr(4)  # unrolled


@triton.jit
def _cloud(ranges, cloud, rows):
    """The first row of a cloud, and the one after its last."""
    first = tl.maximum(tl.load(ranges + 2 * cloud), 0)
    return first, tl.minimum(tl.load(ranges + 2 * cloud + 1), rows)


@triton.jit
def _part(first, last, needed, BLOCK_N: tl.constexpr):
    """The part of a cloud's rows that is this program's: whole tiles, or none if not needed."""
    each = tl.cdiv(tl.cdiv(last - first, BLOCK_N), tl.num_programs(1)) * BLOCK_N
    begin = first + tl.program_id(1) * each
    return begin, tl.where(needed, tl.minimum(begin + each, last), begin)


@triton.jit
def _differences(
    a,
    a_row,
    a_inside,
    b,
    b_row,
    b_inside,
    lane,
    COMPUTE: tl.constexpr,
    DIMS: tl.constexpr,
):
    """Of the coordinates of each row of a and each row of b, in the dimensions of `lane`."""
    within = (lane < DIMS)[None, :]
    at = a_row[:, None] * DIMS + lane[None, :]
    x = tl.load(a + at, mask=a_inside[:, None] & within, other=0.0).to(COMPUTE)
    at = b_row[:, None] * DIMS + lane[None, :]
    y = tl.load(b + at, mask=b_inside[:, None] & within, other=0.0).to(COMPUTE)
    return x[:, None, :] - y[None, :, :]


@triton.jit
def _squared_distances(
    a,
    a_row,
    a_inside,
    b,
    b_row,
    b_inside,
    COMPUTE: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    total = tl.zeros((BLOCK_M, BLOCK_N), COMPUTE)
    lane = tl.arange(0, BLOCK_D)
    if DIMS <= FEW_DIMS:
        for d in tl.static_range(0, DIMS, BLOCK_D):
            x = _differences(a, a_row, a_inside, b, b_row, b_inside, d + lane, COMPUTE, DIMS)
            total += tl.sum(x * x, axis=2)
    else:
        for d in range(0, DIMS, BLOCK_D):
            x = _differences(a, a_row, a_inside, b, b_row, b_inside, d + lane, COMPUTE, DIMS)
            total += tl.sum(x * x, axis=2)
    return total


@triton.jit
def _value(u, KERNEL: tl.constexpr):
    if KERNEL == GAUSSIAN:
        value = tl.exp(-u)
    elif KERNEL == EPANECHNIKOV:
        value = tl.where(u >= 1, 0.0, 1 - u)
    else:
        value = (u < 1).to(u.dtype)
    return value


@triton.jit
def _slope(u, KERNEL: tl.constexpr):
    if KERNEL == GAUSSIAN:
        slope = -tl.exp(-u)
    elif KERNEL == EPANECHNIKOV:
        slope = -(u < 1).to(u.dtype)
    else:
        slope = tl.zeros_like(u)
    return slope


@triton.jit(do_not_specialize=["rows", "others", "tiles"])
def _density_kernel(
    queries,  # [rows, DIMS]
    points,  # [others, DIMS]
    scale,  # [others]
    weight,  # [others]
    ranges1,  # [clouds, 2]: rows of queries
    ranges2,  # [clouds, 2]: rows of points
    partial,  # [parts, rows], written
    rows,
    others,
    tiles,  # of a cloud's queries
    KERNEL: tl.constexpr,
    AT_A_TIME: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    COMPUTE: tl.constexpr = scale.dtype.element_ty
    cloud = tl.program_id(0).to(tl.int64) // tiles
    first, last = _cloud(ranges1, cloud, rows)
    first += (tl.program_id(0) % tiles) * BLOCK_M
    needed = first < last
    row = first + tl.arange(0, BLOCK_M)
    inside = row < last
    first, last = _cloud(ranges2, cloud, others)
    begin, end = _part(first, last, needed, BLOCK_N)
    total = tl.zeros((BLOCK_M,), tl.float64)
    for start in range(begin, end, BLOCK_N * AT_A_TIME):
        sums = tl.zeros((BLOCK_M, BLOCK_N), COMPUTE)
        for place in range(start, tl.minimum(start + BLOCK_N * AT_A_TIME, end), BLOCK_N):
            other = place + tl.arange(0, BLOCK_N)
            live = other < end
            u = _squared_distances(
                queries,
                row,
                inside,
                points,
                other,
                live,
                COMPUTE,
                DIMS,
                BLOCK_M,
                BLOCK_N,
                BLOCK_D,
            )
            u *= tl.load(scale + other, mask=live, other=0.0)[None, :]
            term = _value(u, KERNEL) * tl.load(weight + other, mask=live, other=0.0)[None, :]
            sums += tl.where(live[None, :], term, 0.0)
        total += tl.sum(sums, axis=1)
    out = partial + tl.program_id(1).to(tl.int64) * rows + row
    tl.store(out, total.to(COMPUTE), mask=inside)


@triton.jit(do_not_specialize=["own_rows", "other_rows", "tiles"])
def _gradient_kernel(
    grad,  # by query
    own,  # [own_rows, DIMS]: the queries, or the points
    other,  # [other_rows, DIMS]: the points, or the queries
    scale,  # by point
    weight,  # by point
    own_ranges,
    other_ranges,
    partial,  # [parts, own_rows, DIMS], written: gradients of the coordinates
    grad_scale,  # [parts, own_rows], written if own are points
    grad_weight,  # likewise
    own_rows,
    other_rows,
    tiles,  # of a cloud's own
    KERNEL: tl.constexpr,
    POINTS: tl.constexpr,  # own are points
    DIMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GRADIENT_D: tl.constexpr,
):
    COMPUTE: tl.constexpr = scale.dtype.element_ty
    cloud = tl.program_id(0).to(tl.int64) // tiles
    first, last = _cloud(own_ranges, cloud, own_rows)
    first += (tl.program_id(0) % tiles) * BLOCK_M
    needed = first < last
    row = first + tl.arange(0, BLOCK_M)
    inside = row < last
    first, last = _cloud(other_ranges, cloud, other_rows)
    begin, end = _part(first, last, needed, BLOCK_N)
    lane = tl.program_id(2) * GRADIENT_D + tl.arange(0, GRADIENT_D)
    if POINTS:
        own_scale = tl.load(scale + row, mask=inside, other=0.0)
        own_weight = tl.load(weight + row, mask=inside, other=0.0)
    total = tl.zeros((BLOCK_M, GRADIENT_D), tl.float64)
    scale_total = tl.zeros((BLOCK_M,), tl.float64)
    weight_total = tl.zeros((BLOCK_M,), tl.float64)
    for start in range(begin, end, BLOCK_N):
        number = start + tl.arange(0, BLOCK_N)
        live = number < end
        squares = _squared_distances(
            own, row, inside, other, number, live, COMPUTE, DIMS, BLOCK_M, BLOCK_N, BLOCK_D
        )
        if POINTS:
            u = squares * own_scale[:, None]
            factor = tl.load(grad + number, mask=live, other=0.0)
            term = tl.where(live[None, :], _value(u, KERNEL) * factor[None, :], 0.0)
            weight_total += tl.sum(term, axis=1)
        else:
            other_scale = tl.load(scale + number, mask=live, other=0.0)
            u = squares * other_scale[None, :]
            factor = other_scale * tl.load(weight + number, mask=live, other=0.0)
        slope = tl.where(live[None, :], _slope(u, KERNEL) * factor[None, :], 0.0)
        if POINTS:
            scale_total += tl.sum(slope * squares, axis=1)
        x = _differences(own, row, inside, other, number, live, lane, COMPUTE, DIMS)
        total += tl.sum(slope[:, :, None] * x, axis=1)
    part = tl.program_id(1).to(tl.int64) * own_rows
    if POINTS:
        factor = own_scale * own_weight
        if tl.program_id(2) == 0:
            of_scale = (scale_total * own_weight).to(COMPUTE)
            tl.store(grad_scale + part + row, of_scale, mask=inside)
            tl.store(grad_weight + part + row, weight_total.to(COMPUTE), mask=inside)
    else:
        factor = tl.load(grad + row, mask=inside, other=0.0)
    total = 2 * factor[:, None] * total
    out = partial + part * DIMS + row[:, None] * DIMS + lane[None, :]
    tl.store(out, total.to(COMPUTE), mask=inside[:, None] & (lane < DIMS)[None, :])


def _grid(tile: Tile, clouds: int, longest: int, others: int) -> tuple[int, int, int]:
    """Tiles of a cloud's rows, programs for the rows, and among how many the others are split."""
    tiles = triton.cdiv(longest, tile.rows)
    programs = clouds * tiles
    most = min(LARGEST_SPLIT, triton.cdiv(others, tile.others))
    return tiles, programs, max(1, min(most, tile.programs // max(programs, 1)))


def kernel_density(
    queries: torch.Tensor,
    points: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    ranges1: torch.Tensor,
    ranges2: torch.Tensor,
    longest: int,
    kernel: str,
) -> torch.Tensor:
    """At each query, its cloud's points' sum of weight * kernel(scale * squared distance)."""
    (rows, dims), clouds = queries.shape, len(ranges1)
    tile = TILES[known(generation(queries))][scale.itemsize]
    tiles, programs, parts = _grid(tile, clouds, longest, len(points))
    partial = scale.new_zeros(parts, rows)
    if rows and programs:
        with on_device_of(queries):
            _density_kernel[(programs, parts)](
                *(t.contiguous() for t in (queries, points, scale, weight, ranges1, ranges2)),
                partial,
                rows,
                len(points),
                tiles,
                KERNEL=KERNELS[kernel],
                AT_A_TIME=tile.at_a_time,
                DIMS=dims,
                BLOCK_M=tile.rows,
                BLOCK_N=tile.others,
                BLOCK_D=_dims_at_once(tile.distance_dims, dims),
                **FUSED,
            )
    return _sum_of_parts(partial, scale.dtype)


def _sum_of_parts(partial: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return partial.sum(0, dtype=torch.float64).to(dtype)


def kernel_density_backward(
    grad: torch.Tensor,
    queries: torch.Tensor,
    points: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    ranges1: torch.Tensor,
    ranges2: torch.Tensor,
    longest1: int,
    longest2: int,
    kernel: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients to the queries, the points, the scales and the weights."""
    grad, scale, weight = grad.contiguous(), scale.contiguous(), weight.contiguous()
    by_query = (queries.contiguous(), ranges1.contiguous(), longest1)
    by_point = (points.contiguous(), ranges2.contiguous(), longest2)
    operands = (grad, scale, weight, KERNELS[kernel])
    grad_queries, _, _ = _gradients(by_query, by_point, *operands, of_points=False)
    return grad_queries, *_gradients(by_point, by_query, *operands, of_points=True)


def _gradients(own, others, grad, scale, weight, kernel, of_points):
    (x, own_ranges, longest), (y, other_ranges, _) = own, others
    rows, dims = x.shape
    tile = GRADIENT_TILES[known(generation(x))][scale.itemsize]
    tiles, programs, parts = _grid(tile, len(own_ranges), longest, len(y))
    partial = scale.new_zeros(parts, rows, dims)
    of_scale, of_weight = scale.new_zeros(2, parts, rows if of_points else 0)
    block_dims = _dims_at_once(tile.gradient_dims, dims)
    if rows and programs:
        with on_device_of(x):
            _gradient_kernel[(programs, parts, triton.cdiv(dims, block_dims))](
                grad,
                x,
                y,
                scale,
                weight,
                own_ranges,
                other_ranges,
                partial,
                of_scale if of_points else None,
                of_weight if of_points else None,
                rows,
                len(y),
                tiles,
                KERNEL=kernel,
                POINTS=of_points,
                DIMS=dims,
                BLOCK_M=tile.rows,
                BLOCK_N=tile.others,
                BLOCK_D=_dims_at_once(tile.distance_dims, dims),
                GRADIENT_D=block_dims,
                **FUSED,
            )
    return (
        _sum_of_parts(partial, compute_dtype(x)).to(x.dtype),
        _sum_of_parts(of_scale, scale.dtype),
        _sum_of_parts(of_weight, scale.dtype),
    )


def _dims_at_once(most: int, dims: int) -> int:
    return min(most, triton.next_power_of_2(dims))


def compile_cases(generation: int) -> list[CompileCase]:
    cases = []
    for type_, dims in (("fp32", 3), ("bf16", 3), ("fp64", 3), ("fp32", 64)):
        given = f"*{type_}"
        size = 8 if type_ == "fp64" else 4
        computed = f"*fp{8 * size}"
        tile = TILES[known(generation)][size]
        for kernel, number in KERNELS.items():
            cases.append(
                CompileCase(
                    name=f"density-{kernel}-{type_}-{dims}",
                    kernel=_density_kernel,
                    types={
                        **dict.fromkeys(("queries", "points"), given),
                        **dict.fromkeys(("scale", "weight", "partial"), computed),
                        **dict.fromkeys(("ranges1", "ranges2"), "*i64"),
                        **dict.fromkeys(("rows", "others", "tiles"), "i32"),
                    },
                    constants={
                        "KERNEL": number,
                        "AT_A_TIME": tile.at_a_time,
                        "DIMS": dims,
                        "BLOCK_M": tile.rows,
                        "BLOCK_N": tile.others,
                        "BLOCK_D": tile.distance_dims,
                    },
                    options=FUSED,
                    fused=True,
                )
            )
        tile = GRADIENT_TILES[known(generation)][size]
        for of_points in (False, True):
            results = ("partial", "grad_scale", "grad_weight") if of_points else ("partial",)
            cases.append(
                CompileCase(
                    name=f"density-gradient-{'points' if of_points else 'queries'}-{type_}-{dims}",
                    kernel=_gradient_kernel,
                    types={
                        **dict.fromkeys(("own", "other"), given),
                        **dict.fromkeys(("grad", "scale", "weight", *results), computed),
                        **dict.fromkeys(("own_ranges", "other_ranges"), "*i64"),
                        **dict.fromkeys(("own_rows", "other_rows", "tiles"), "i32"),
                    },
                    constants={
                        "KERNEL": KERNELS["gaussian"],
                        "POINTS": of_points,
                        "DIMS": dims,
                        "BLOCK_M": tile.rows,
                        "BLOCK_N": tile.others,
                        "BLOCK_D": tile.distance_dims,
                        "GRADIENT_D": _dims_at_once(tile.gradient_dims, dims),
                    },
                    options=FUSED,
                    fused=True,
                )
            )
    return cases
