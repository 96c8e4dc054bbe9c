"""What the families that score all pairs of two sets of vectors share: tiles of dot products, and
the products that carry gradients back."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastzoo.reference.precision import compute_dtype

from .runtime import FUSED, INTERPRETER

# A gradient of scores is held for as many columns at a time as fit in this many bytes.
GRADIENT_BYTES = {INTERPRETER: 16 << 10, 8: 128 << 20, 9: 256 << 20, 10: 256 << 20}

# Programs among which the columns of a forward are split, until each has a tile: eight for each
# multiprocessor, so that those which end last weigh little.
PROGRAMS = {INTERPRETER: 4, 8: 864, 9: 1056, 10: 1184}

TRITON_TYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}


# For the compile test: a name, what is stored, what is multiplied, and instructions to be seen.
COMPILED_TYPES = (
    ("fp32", "fp32", torch.float32, ()),
    ("fp64", "fp64", torch.float64, ()),
    ("fp16", "fp16", torch.float16, ("mma",)),
    ("bf16", "bf16", torch.bfloat16, ("mma",)),
    ("autocast", "fp32", torch.bfloat16, ("mma",)),
)
LAUNCH_CONSTANTS = ("PRODUCT", "OPERAND", "BLOCK_M", "BLOCK_N", "BLOCK_D")


class Tile(NamedTuple):
    """What a program scores at a time, and how it is compiled."""

    rows: int
    columns: int
    dims: int
    num_warps: int
    num_stages: int


# Where operands are stored as they are multiplied, and a kernel holds little else. A tile of twice
# the size reads half as much for a product; these are the largest that spill nothing.
LARGE = Tile(128, 128, 64, 8, 3)
TALL = Tile(128, 64, 64, 8, 3)

# Elsewhere, by generation and the type of products.
_HALF = Tile(64, 64, 64, 8, 3)
_SINGLE = Tile(64, 64, 16, 8, 2)
_DOUBLE = Tile(32, 64, 16, 8, 2)
_INTERPRETED = Tile(32, 64, 32, 4, 1)
_BY_TYPE = {
    torch.bfloat16: _HALF,
    torch.float16: _HALF,
    torch.float32: _SINGLE,
    torch.float64: _DOUBLE,
}
TILES = {
    INTERPRETER: dict.fromkeys(_BY_TYPE, _INTERPRETED),
    8: _BY_TYPE,
    9: _BY_TYPE,
    10: _BY_TYPE,
}


def short_name(dtype: torch.dtype) -> str:
    """As triton writes it: bf16."""
    return str(TRITON_TYPES[dtype])


def known(generation: int) -> int:
    """The newest generation in the tables that is not newer than this one."""
    return max(key for key in TILES if key <= generation)


def tile_of(
    machine: int, stored: torch.dtype, product: torch.dtype, large: dict[int, Tile] | None
) -> Tile:
    """The tile of a kernel, by generation from ``large`` where operands are plain halves."""
    half = product in (torch.bfloat16, torch.float16) and stored == product
    if large is not None and half and machine in large:
        return large[machine]
    return TILES[machine][product]


def product_dtype(tensor: torch.Tensor, bfloat16_products: bool) -> torch.dtype:
    """The type that operands of products are rounded to."""
    rounds = bfloat16_products and tensor.dtype != torch.float64
    return torch.bfloat16 if rounds else tensor.dtype


def gradient_dtype(product: torch.dtype) -> torch.dtype:
    """The type that gradients of scores are held in: float16 would lose the small ones."""
    return torch.float32 if product == torch.float16 else product


def launch_options(tile: Tile, product: torch.dtype, machine: int) -> dict:
    """What all kernels here are launched with."""
    # The interpreter multiplies the bits of bfloat16.
    widens = machine == INTERPRETER and product == torch.bfloat16
    return {
        "PRODUCT": TRITON_TYPES[product],
        "OPERAND": tl.float32 if widens else TRITON_TYPES[product],
        "BLOCK_M": tile.rows,
        "BLOCK_N": tile.columns,
        "BLOCK_D": tile.dims,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        **FUSED,
    }


def compile_options(
    machine: int, stored: str, product: torch.dtype, large: dict[int, Tile] | None
) -> tuple[dict, dict]:
    """For the compile test: a launch's options and constants."""
    types = {str(name): dtype for dtype, name in TRITON_TYPES.items()}
    options = launch_options(tile_of(machine, types[stored], product, large), product, machine)
    return options, {key: options.pop(key) for key in LAUNCH_CONSTANTS}


def splits(tile: Tile, generation: int, rows: int, columns: int) -> tuple[int, int]:
    """Among how many programs the column tiles of a row tile are split, and how many each has."""
    tiles = triton.cdiv(columns, tile.columns)
    each = triton.cdiv(tiles, max(1, PROGRAMS[generation] // triton.cdiv(rows, tile.rows)))
    return triton.cdiv(tiles, each), each


def columns_at_a_time(
    tile: Tile, generation: int, rows: int, dims: int, each: int, size: int
) -> int:
    """How many columns of ``each`` vectors have gradients that fit, in whole tiles: those of their
    scores, ``size`` bytes each, and as much again for the vectors' own, up to four copies."""
    fitting = GRADIENT_BYTES[generation] // (each * max(1, rows * size, 4 * dims * 4))
    return max(1, fitting // tile.columns) * tile.columns


@triton.jit
def score_tile(
    left,  # the tile's first row, rows `left_stride` apart
    left_stride,
    left_inside,
    right,  # likewise
    right_stride,
    right_inside,
    dims,
    SUM: tl.constexpr,
    PRODUCT: tl.constexpr,
    OPERAND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Dot products of rows with rows, operands rounded to PRODUCT, multiplied as OPERAND and
    summed in SUM. Within a tile offsets are of 32 bits, or pointers would fill the registers."""
    total = tl.zeros((BLOCK_M, BLOCK_N), SUM)
    # A row that is not there reads the tile's first instead: no mask of rows, less to hold.
    left_row = tl.where(left_inside, tl.arange(0, BLOCK_M), 0)
    right_row = tl.where(right_inside, tl.arange(0, BLOCK_N), 0)
    for start in range(0, dims, BLOCK_D):
        lane = start + tl.arange(0, BLOCK_D)
        exists = lane < dims
        a = tl.load(
            left + (left_row[:, None] * left_stride + lane[None, :]),
            mask=exists[None, :],
            other=0.0,
        )
        b = tl.load(
            right + (right_row[None, :] * right_stride + lane[:, None]),
            mask=exists[:, None],
            other=0.0,
        )
        a, b = a.to(PRODUCT).to(OPERAND), b.to(PRODUCT).to(OPERAND)
        total = tl.dot(a, b, total, input_precision="ieee", out_dtype=SUM)
    return total


@triton.jit
def finite(x):
    """A reference that exponentials may subtract: -inf, the maximum of nothing, becomes 0."""
    return tl.where(x == float("-inf"), 0.0, x)


def log_sum(highest: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """The log-sum-exp that parts ``[parts, n]`` of ``sum exp(z - highest)`` add up to ``[n]``."""
    return torch.logsumexp(highest + total.log(), 0)


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``a @ b``, summed and returned in the compute dtype."""
    dtype = compute_dtype(a)
    if a.dtype == dtype:
        return a @ b.to(dtype)
    if a.is_cuda:
        return torch.mm(a, b.to(a.dtype), out_dtype=dtype)
    return a.to(dtype) @ b.to(a.dtype).to(dtype)
