"""Steps of samplers: linear combinations of tensors and of noise by a table of weights.

A program has a tile of samples and of their elements; where nothing is per sample, all of them are
one sample's. The table's row is chosen on the device.
"""

import torch
import triton
import triton.language as tl

from fastzoo.reference import ode_step as reference
from fastzoo.reference.precision import compute_dtype

from .counter_random import counter_bits as bits_of
from .counter_random import counter_normal as normals_of
from .counter_random import rounded_at_random
from .coupling import LARGEST_ALIGNMENT, Tiles, alignment, tile_of
from .runtime import EXACT, CompileCase, on_device_of
from .score_tiles import TRITON_TYPES

WIDTH = tl.constexpr(reference.WIDTH)
EARLIER = tl.constexpr(reference.EARLIER)
NOISE = tl.constexpr(reference.NOISE)
DRAW = tl.constexpr(reference.DRAW)
BOUND = tl.constexpr(reference.BOUND)

# By the bytes of a number in the compute dtype.
TILES = {4: Tiles(1024, 1024, 32), 8: Tiles(512, 512, 32)}
BLOCK = 4  # elements to a counter


@triton.jit
def _add(value, weight, x):
    """A weight of zero ignores x, whatever it holds."""
    return value + tl.where(weight != 0, weight * x, 0.0)


@triton.jit
def _clamp(value, bound):
    return tl.where(value > bound, bound, tl.where(value < -bound, -bound, value))


@triton.jit
def _quotient(a, b):
    return a / b if a.dtype == tl.float64 else tl.div_rn(a, b)


@triton.jit
def _place(rows, parts, columns, ALIGN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """A program's first column, the sample of each of its rows, which elements are there, and
    where. A row that is not there has the first sample's numbers: no mask to read them by."""
    columns = columns.to(tl.int64) * ALIGN
    row = (tl.program_id(0) // parts).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    first = (tl.program_id(0) % parts).to(tl.int64) * BLOCK_N
    column = first + tl.arange(0, BLOCK_N)[None, :]
    inside = (row < rows) & (column < columns)
    return first, tl.where(row < rows, row, 0), inside, row * columns + column


@triton.jit
def _counters(keys, sample, first, BLOCK_N: tl.constexpr):
    """Seeds, numbers of samples, and blocks."""
    block = first // 4 + tl.arange(0, BLOCK_N // 4)[None, :]
    return tl.load(keys + 2 * sample), tl.load(keys + 2 * sample + 1), block


@triton.jit(do_not_specialize=["rows", "parts", "columns", "tables"])
def _ode_step_kernel(
    t0,  # [rows, columns] each, or None
    t1,
    t2,
    t3,
    t4,
    t5,
    t6,
    t7,
    table,  # [steps, tables, R, WIDTH]
    step,  # [1], or None for the first
    factor,  # [rows] or [1], or None
    threshold,  # [rows], or None
    keys,  # [rows, 2], or None
    out,  # [rows, columns], written
    kept0,  # likewise, if any
    kept1,
    rows,
    parts,
    columns,  # in units of ALIGN
    tables,
    N: tl.constexpr,
    R: tl.constexpr,
    SCALED: tl.constexpr,  # a bit for each tensor
    TABLE_EACH: tl.constexpr,  # whether a sample has its own
    FACTOR_EACH: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    COMPUTE: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    first, sample, inside, at = _place(rows, parts, columns, ALIGN, BLOCK_M, BLOCK_N)
    entry = table + sample * (R * WIDTH if TABLE_EACH else 0)
    if step is not None:
        entry += tl.load(step) * tables * (R * WIDTH)
    if factor is not None:
        scale = tl.load(factor + (sample if FACTOR_EACH else sample * 0))
    weights = ()
    for i in tl.static_range(R * N):
        weight = tl.load(entry + (i // N * WIDTH + i % N)).to(COMPUTE)
        if (SCALED >> i % N) & 1:
            weight *= scale
        weights += (weight,)

    pointers = (t0, t1, t2, t3, t4, t5, t6, t7)
    tensors = ()
    for k in tl.static_range(N):
        used = weights[k] != 0
        for r in tl.static_range(1, R):
            used |= weights[r * N + k] != 0
        x = tl.load(pointers[k] + at, mask=inside & used, other=0.0)
        tensors += (x.to(COMPUTE),)

    values = ()
    for r in tl.static_range(R):
        value = tl.zeros((BLOCK_M, BLOCK_N), COMPUTE)
        for k in tl.static_range(N):
            value = _add(value, weights[r * N + k], tensors[k])
        for j in tl.static_range(r):
            weight = tl.load(entry + (r * WIDTH + EARLIER + j)).to(COMPUTE)
            value = _add(value, weight, values[j])
        if r < R - 1:
            if r == 0 and threshold is not None:
                limit = tl.load(threshold + sample)
                value = _quotient(_clamp(value, limit), limit)
            else:
                value = _clamp(value, tl.load(entry + (r * WIDTH + BOUND)).to(COMPUTE))
        values += (value,)

    value = values[R - 1]
    if keys is not None:
        seed, number, block = _counters(keys, sample, first, BLOCK_N)
        last = entry + (R - 1) * WIDTH
        draw = tl.load(last + DRAW).to(tl.int32).to(tl.uint32, bitcast=True)
        weight = tl.load(last + NOISE).to(COMPUTE)
        value = _add(value, weight, normals_of(seed, number, draw, block).to(COMPUTE))
        if STOCHASTIC:
            word = bits_of(seed, number, draw | 0x80000000, block)
            value = rounded_at_random(value, word, out.dtype.element_ty)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)
    # Behind all loads: no weight has to be read a second time.
    if kept0 is not None:
        tl.store(kept0 + at, values[0].to(out.dtype.element_ty), mask=inside)
    if kept1 is not None:
        tl.store(kept1 + at, values[1].to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "parts", "columns", "draw"])
def _counter_kernel(
    keys,  # [rows, 2]
    out,  # [rows, columns], written: normals in float32 or words in int64
    rows,
    parts,
    columns,  # in units of ALIGN
    draw,
    ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    first, sample, inside, at = _place(rows, parts, columns, ALIGN, BLOCK_M, BLOCK_N)
    seed, number, block = _counters(keys, sample, first, BLOCK_N)
    if out.dtype.element_ty == tl.float32:
        drawn = normals_of(seed, number, draw.to(tl.uint32), block)
    else:
        drawn = bits_of(seed, number, draw.to(tl.uint32), block).to(tl.int64)
    tl.store(out + at, drawn, mask=inside)


def _given(tensor: torch.Tensor) -> torch.Tensor | None:
    return tensor.contiguous() if tensor.numel() else None


def _launch(rows: int, columns: int, tiles: Tiles) -> tuple[tuple[int], tuple[int, ...], dict]:
    """The grid, and what both kernels are given of sizes. A counter's elements share a row of the
    tile, even where there are fewer of them."""
    tile = tile_of(tiles, max(columns, BLOCK))
    unit = alignment(columns)
    constants = {"ALIGN": unit, "BLOCK_M": tile.rows, "BLOCK_N": tile.columns, **EXACT}
    grid = (triton.cdiv(rows, tile.rows) * tile.parts,)
    return grid, (rows, tile.parts, columns // unit), constants


def ode_step(
    t0: torch.Tensor,
    t1: torch.Tensor,
    t2: torch.Tensor,
    t3: torch.Tensor,
    t4: torch.Tensor,
    t5: torch.Tensor,
    t6: torch.Tensor,
    t7: torch.Tensor,
    table: torch.Tensor,
    step: torch.Tensor,
    factor: torch.Tensor,
    threshold: torch.Tensor,
    keys: torch.Tensor,
    scaled: int,
    keep: int,
    stochastic: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The last row's combination of the tensors, and those of the rows before it that are kept."""
    given = [t.contiguous() for t in reference.given((t0, t1, t2, t3, t4, t5, t6, t7))]
    table = table.contiguous()
    _, tables, r, _ = table.shape
    out = torch.empty_like(t0, memory_format=torch.contiguous_format)
    kept = [
        torch.empty_like(out) if i < r - 1 and keep >> i & 1 else out.new_empty(0) for i in (0, 1)
    ]
    if not out.numel():
        return out, *kept
    per_sample = (factor, threshold, keys)
    one = tables == 1 and factor.numel() <= 1 and not (threshold.numel() or keys.numel())
    rows = 1 if one else t0.shape[0]
    compute = compute_dtype(out)
    grid, sizes, constants = _launch(rows, out.numel() // rows, TILES[compute.itemsize])
    with on_device_of(out):
        _ode_step_kernel[grid](
            *given,
            *[None] * (reference.TENSORS - len(given)),
            table,
            _given(step),
            *map(_given, per_sample),
            out,
            *map(_given, kept),
            *sizes,
            tables,
            N=len(given),
            R=r,
            SCALED=scaled if factor.numel() else 0,
            TABLE_EACH=tables > 1,
            FACTOR_EACH=factor.numel() > 1,
            STOCHASTIC=stochastic and out.dtype in (torch.float16, torch.bfloat16),
            COMPUTE=TRITON_TYPES[compute],
            **constants,
        )
    return out, *kept


def _counter(keys: torch.Tensor, n: int, draw: int, dtype: torch.dtype) -> torch.Tensor:
    keys = keys.contiguous()
    out = torch.empty(keys.shape[0], n, dtype=dtype, device=keys.device)
    if out.numel():
        grid, sizes, constants = _launch(*out.shape, TILES[4])
        with on_device_of(keys):
            _counter_kernel[grid](keys, out, *sizes, draw, **constants)
    return out


def counter_bits(keys: torch.Tensor, n: int, draw: int) -> torch.Tensor:
    """Each key's words of a draw."""
    return _counter(keys, n, draw, torch.int64)


def counter_normal(keys: torch.Tensor, n: int, draw: int) -> torch.Tensor:
    """Each key's normals of a draw."""
    return _counter(keys, n, draw, torch.float32)


def compile_cases(generation: int) -> list[CompileCase]:
    cases = []
    shared = {
        **dict.fromkeys(("rows", "parts", "columns", "tables"), "i32"),
        **dict.fromkeys(("step", "keys"), "*i64"),
    }
    sizes = {
        bytes: {"ALIGN": LARGEST_ALIGNMENT, "BLOCK_M": 1, "BLOCK_N": tiles.widest}
        for bytes, tiles in TILES.items()
    }
    for n, r, type_, each, noise in (
        (2, 1, "fp32", False, False),
        (3, 2, "fp32", False, False),
        (8, 1, "fp32", False, False),
        (8, 3, "fp32", True, False),
        (2, 1, "bf16", False, False),
        (2, 1, "fp16", False, True),
        (3, 2, "fp32", False, True),
        (3, 2, "bf16", True, True),
        (8, 1, "fp64", True, False),
        (8, 3, "fp64", True, True),
    ):
        computed = "fp64" if type_ == "fp64" else "fp32"
        kept = [f"kept{i}" for i in range(r - 1)]
        tensors = dict.fromkeys((*(f"t{k}" for k in range(n)), "out", *kept), f"*{type_}")
        per_sample = {"factor": f"*{computed}", "threshold": f"*{computed}"} if each else {}
        absent = () if noise else ("keys",)
        case = CompileCase(
            name="-".join(
                ("ode-step", str(n), str(r), type_, *["each"] * each, *["noise"] * noise)
            ),
            kernel=_ode_step_kernel,
            types={
                **{name: type_ for name, type_ in shared.items() if name not in absent},
                **tensors,
                **per_sample,
                "table": "*fp64",
            },
            constants={
                "N": n,
                "R": r,
                "SCALED": 2 if each else 0,
                "TABLE_EACH": each,
                "FACTOR_EACH": each,
                "STOCHASTIC": noise and type_ in ("fp16", "bf16"),
                "COMPUTE": getattr(tl, f"float{computed[2:]}"),
                **sizes[8 if computed == "fp64" else 4],
            },
            options=EXACT,
            vector_loads=True,
        )
        cases.append(case)
    for name, type_ in (("bits", "*i64"), ("normal", "*fp32")):
        types = {"keys": "*i64", "out": type_}
        integers = dict.fromkeys(("rows", "parts", "columns", "draw"), "i32")
        cases.append(
            CompileCase(
                name=f"counter-{name}",
                kernel=_counter_kernel,
                types={**types, **integers},
                constants=sizes[4],
                options=EXACT,
            )
        )
    return cases
