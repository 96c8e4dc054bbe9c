"""What rows leave to their codes: the statistics of a codebook, and the quantiser's gradients.

Rows are brought into the order of their codes by a stable sort, so that a code's rows lie together
and ascend. A code with many rows is cut into parts of fixed length, whose sums in double are added
in their order: no atomics, and the same sums whatever runs where.

  partial  the sum of a part of a code's rows, or of what they leave to the code's gradient
  combine  the parts' sums of a code
  rows     gradients of the rows
"""

from typing import Any

import torch
import triton
import triton.language as tl

from fastzoo.reference.precision import compute_dtype

from .runtime import FUSED, INTERPRETER, CompileCase, generation, on_device_of

ESTIMATORS = {"ste": 0, "rotation": 1, "none": 2}
ROTATION = tl.constexpr(ESTIMATORS["rotation"])
NO_ESTIMATOR = tl.constexpr(ESTIMATORS["none"])

PART = 128  # rows
GPU_TILE = (16, 64)  # rows, dimensions
TILES = {INTERPRETER: (64, 128), 8: GPU_TILE, 9: GPU_TILE, 10: GPU_TILE}


@triton.jit
def _rounded(value, DTYPE: tl.constexpr):
    """A double, by way of float32 as in torch: the interpreter has no other way to bfloat16."""
    if tl.float64 == DTYPE:
        return value
    return value.to(tl.float32).to(DTYPE)


@triton.jit(do_not_specialize=["codes", "parts"])
def _partial_kernel(
    x,  # [rows, dims]
    order,  # [rows]: the rows by code
    offsets,  # [codes + 1]: where a code's rows begin in `order`
    part_ends,  # [codes]: the number of parts up to and with a code's
    part_codes,  # [parts]: which code a part is of; `codes` for none
    codebook,  # [codes, dims], if LOSSES
    grad_losses,  # [rows], if LOSSES
    weight,  # [1] in double, if LOSSES: twice the loss's weight
    grad_quantized,  # [rows, dims], if they reach the code
    partial,  # [parts, dims] in double, written
    codes,
    parts,
    dims,
    LOSSES: tl.constexpr,
    PART: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    part = tl.program_id(0).to(tl.int64)
    lane = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    within = lane < dims
    found = tl.load(part_codes + part)
    code = tl.minimum(found, codes - 1)
    first = tl.load(offsets + code)
    last = tl.load(offsets + code + 1)
    # A code's parts are counted from its first.
    part_number = part - tl.load(part_ends + code) + (last - first + PART - 1) // PART
    first += part_number * PART
    last = tl.where(found < codes, tl.minimum(last, first + PART), first)
    if LOSSES:
        factor = tl.load(weight)
        c = tl.load(codebook + code * dims + lane, mask=within, other=0.0)
        c = c.to(tl.float64)[None, :]
    total = tl.zeros((BLOCK_D,), tl.float64)
    for start in range(first, last, BLOCK_M):
        place = start + tl.arange(0, BLOCK_M)
        inside = place < last
        row = tl.load(order + place, mask=inside, other=0)
        live = inside[:, None] & within[None, :]
        at = row[:, None] * dims + lane[None, :]
        term = tl.load(x + at, mask=live, other=0.0).to(tl.float64)
        if LOSSES:
            loss = tl.load(grad_losses + row, mask=inside, other=0.0).to(tl.float64)
            term = (factor * loss)[:, None] * (c - term)
            if grad_quantized is not None:
                term += tl.load(grad_quantized + at, mask=live, other=0.0).to(tl.float64)
            term = tl.where(live, term, 0.0)
        total += tl.sum(term, axis=0)
    tl.store(partial + part * dims + lane, total, mask=within)


@triton.jit(do_not_specialize=["codes"])
def _combine_kernel(
    partial,  # [parts, dims]
    offsets,  # [codes + 1]
    part_ends,  # [codes]
    sums,  # [codes, dims], written
    codes,
    dims,
    PART: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    code = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    there = code < codes
    lane = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    within = (lane < dims)[None, :]
    length = tl.load(offsets + code + 1, mask=there, other=0)
    length -= tl.load(offsets + code, mask=there, other=0)
    parts = (length + PART - 1) // PART
    part = tl.load(part_ends + code, mask=there, other=0) - parts
    total = tl.zeros((BLOCK_M, BLOCK_D), tl.float64)
    for i in range(tl.max(parts, axis=0)):
        live = (i < parts)[:, None] & within
        at = (part + i)[:, None] * dims + lane[None, :]
        total += tl.load(partial + at, mask=live, other=0.0)
    out = code[:, None] * dims + lane[None, :]
    tl.store(sums + out, _rounded(total, sums.dtype.element_ty), mask=there[:, None] & within)


@triton.jit(do_not_specialize=["rows"])
def _rows_kernel(
    grad_quantized,  # [rows, dims]
    grad_losses,  # [rows]
    x,  # [rows, dims]
    codebook,  # [codes, dims]
    indices,  # [rows]
    weight,  # [1] in double: twice the loss's weight
    grad_x,  # [rows, dims], written
    rows,
    dims,
    ESTIMATOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < rows
    lane = tl.arange(0, BLOCK_D)
    index = tl.load(indices + row, mask=inside, other=-1)
    chosen = index >= 0
    factor = tl.load(weight) * tl.load(grad_losses + row, mask=inside, other=0.0).to(tl.float64)
    x_row = row[:, None] * dims + lane[None, :]
    c_row = index[:, None] * dims + lane[None, :]
    if ESTIMATOR == ROTATION:
        floor = tl.full((BLOCK_M,), 1e-12, tl.float64)
        xx = tl.zeros((BLOCK_M,), tl.float64)
        cc = tl.zeros((BLOCK_M,), tl.float64)
        for d in range(0, dims, BLOCK_D):
            within = (d + lane < dims)[None, :]
            a = tl.load(x + x_row + d, mask=inside[:, None] & within, other=0.0).to(tl.float64)
            c = tl.load(codebook + c_row + d, mask=chosen[:, None] & within, other=0.0)
            c = c.to(tl.float64)
            xx += tl.sum(a * a, axis=1)
            cc += tl.sum(c * c, axis=1)
        x_norm = tl.sqrt(xx)
        c_norm = tl.sqrt(cc)
        turns = x_norm > 1e-12
        x_inverse = 1 / tl.maximum(x_norm, floor)
        c_inverse = 1 / tl.maximum(c_norm, floor)
        ww = tl.zeros((BLOCK_M,), tl.float64)
        gw = tl.zeros((BLOCK_M,), tl.float64)
        gv = tl.zeros((BLOCK_M,), tl.float64)
        for d in range(0, dims, BLOCK_D):
            within = (d + lane < dims)[None, :]
            live = inside[:, None] & within
            a = tl.load(x + x_row + d, mask=live, other=0.0).to(tl.float64)
            c = tl.load(codebook + c_row + d, mask=chosen[:, None] & within, other=0.0)
            g = tl.load(grad_quantized + x_row + d, mask=live, other=0.0).to(tl.float64)
            v = c.to(tl.float64) * c_inverse[:, None]
            w = a * x_inverse[:, None] + v
            ww += tl.sum(w * w, axis=1)
            gw += tl.sum(g * w, axis=1)
            gv += tl.sum(g * v, axis=1)
        w_inverse = 1 / tl.maximum(tl.sqrt(ww), floor)
        scale = c_norm * x_inverse
    for d in range(0, dims, BLOCK_D):
        within = (d + lane < dims)[None, :]
        live = inside[:, None] & within
        a = tl.load(x + x_row + d, mask=live, other=0.0).to(tl.float64)
        c = tl.load(codebook + c_row + d, mask=chosen[:, None] & within, other=0.0).to(tl.float64)
        g = tl.load(grad_quantized + x_row + d, mask=live, other=0.0).to(tl.float64)
        through = g
        if ESTIMATOR == NO_ESTIMATOR:
            through = tl.zeros_like(g)
        if ESTIMATOR == ROTATION:
            u = a * x_inverse[:, None]
            w = (u + c * c_inverse[:, None]) * w_inverse[:, None]
            turned = g - (2 * gw * w_inverse)[:, None] * w + (2 * gv)[:, None] * u
            through = tl.where(turns[:, None], scale[:, None] * turned, g)
        gradient = through + factor[:, None] * (a - c)
        gradient = tl.where(chosen[:, None], gradient, g)
        tl.store(grad_x + x_row + d, _rounded(gradient, grad_x.dtype.element_ty), mask=live)


def _sums_by_code(
    x: torch.Tensor,
    indices: torch.Tensor,
    codes: int,
    dtype: torch.dtype,
    codebook: torch.Tensor | None = None,
    grad_losses: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    grad_quantized: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """How many rows each code has, and the sums [codes, dims] over them: of x, or with a codebook
    of the gradients that reach the code."""
    rows, dims = x.shape
    device = x.device
    sums = torch.empty(codes, dims, dtype=dtype, device=device)
    by_code, order = torch.sort(indices, stable=True)
    offsets = torch.searchsorted(by_code, torch.arange(codes + 1, device=device))
    counts = offsets.diff()
    part_ends = ((counts + PART - 1) // PART).cumsum(0)
    # As many as there can be, so that nothing is read back.
    parts = min(rows, rows // PART + codes)
    part_codes = torch.searchsorted(part_ends, torch.arange(parts, device=device), right=True)
    partial = torch.empty(parts, dims, dtype=torch.float64, device=device)
    tile_rows, tile_dims = tile_of(x)
    tiles = triton.cdiv(dims, tile_dims)
    with on_device_of(x):
        if parts:
            _partial_kernel[(parts, tiles)](
                x,
                order,
                offsets,
                part_ends,
                part_codes,
                codebook,
                grad_losses,
                weight,
                grad_quantized,
                partial,
                codes,
                parts,
                dims,
                LOSSES=codebook is not None,
                PART=PART,
                BLOCK_M=tile_rows,
                BLOCK_D=tile_dims,
                **FUSED,
            )
        _combine_kernel[(triton.cdiv(codes, tile_rows), tiles)](
            partial,
            offsets,
            part_ends,
            sums,
            codes,
            dims,
            PART=PART,
            BLOCK_M=tile_rows,
            BLOCK_D=tile_dims,
            **FUSED,
        )
    return counts, sums


def tile_of(x: torch.Tensor) -> tuple[int, int]:
    machine = generation(x)
    return TILES[max(key for key in TILES if key <= machine)]


def vq_statistics(
    x: torch.Tensor, indices: torch.Tensor, codes: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """How many rows each code has, and their sum; a row of index -1 is left out."""
    dtype = compute_dtype(x)
    if codes == 0:
        return x.new_empty(0, dtype=dtype), x.new_empty(0, x.shape[1], dtype=dtype)
    counts, sums = _sums_by_code(x.contiguous(), indices.contiguous(), codes, dtype)
    return counts.to(dtype), sums


def vq_quantize_backward(
    grad_quantized: torch.Tensor,
    grad_losses: torch.Tensor,
    x: torch.Tensor,
    codebook: torch.Tensor,
    indices: torch.Tensor,
    estimator: str,
    codebook_weight: float,
    beta: float,
    wants_codebook: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients to x, and to the codebook where it is wanted, else of no codes."""
    rows, dims = x.shape
    grad_quantized, grad_losses = grad_quantized.contiguous(), grad_losses.contiguous()
    x, codebook, indices = x.contiguous(), codebook.contiguous(), indices.contiguous()

    def twice(weight: float) -> torch.Tensor:
        return torch.full((1,), 2 * weight, dtype=torch.float64, device=x.device)

    grad_x = torch.empty_like(x)
    if rows:
        tile_rows, tile_dims = tile_of(x)
        with on_device_of(x):
            _rows_kernel[(triton.cdiv(rows, tile_rows),)](
                grad_quantized,
                grad_losses,
                x,
                codebook,
                indices,
                twice(beta),
                grad_x,
                rows,
                dims,
                ESTIMATOR=ESTIMATORS[estimator],
                BLOCK_M=tile_rows,
                BLOCK_D=tile_dims,
                **FUSED,
            )
    if not wants_codebook:
        return grad_x, codebook.new_empty(0, dims)
    _, grad_codebook = _sums_by_code(
        x,
        indices,
        len(codebook),
        codebook.dtype,
        codebook=codebook,
        grad_losses=grad_losses,
        weight=twice(codebook_weight),
        grad_quantized=grad_quantized if estimator == "none" else None,
    )
    return grad_x, grad_codebook


def compile_cases(generation: int) -> list[CompileCase]:
    tile_rows, tile_dims = TILES[max(key for key in TILES if key <= generation)]
    blocks = {"BLOCK_M": tile_rows, "BLOCK_D": tile_dims}
    cases = []

    def add(
        name: str, kernel: Any, types: dict[str, str], constants: dict[str, Any], **checks: Any
    ) -> None:
        constants = {**constants, **blocks}
        case = CompileCase(
            name, kernel, types, constants, FUSED, multiples=("dims",), fused=True, **checks
        )
        cases.append(case)

    for type_ in ("fp32", "bf16", "fp64"):
        given = f"*{type_}"
        computed = "*fp64" if type_ == "fp64" else "*fp32"
        by_code = {
            "x": given,
            "order": "*i64",
            "offsets": "*i64",
            "part_ends": "*i64",
            "part_codes": "*i64",
            "partial": "*fp64",
            **dict.fromkeys(("codes", "parts", "dims"), "i32"),
        }
        losses = {"codebook": given, "grad_losses": computed, "weight": "*fp64"}
        for name, types in (
            ("sums", {}),
            ("gradient", losses),
            ("gradient-none", {**losses, "grad_quantized": given}),
        ):
            constants = {"LOSSES": bool(types), "PART": PART}
            add(
                f"partial-{name}-{type_}",
                _partial_kernel,
                {**by_code, **types},
                constants,
                vector_loads=True,
            )
        for name, summed in (("sums", computed), ("gradient", given)):
            add(
                f"combine-{name}-{type_}",
                _combine_kernel,
                {
                    "partial": "*fp64",
                    "offsets": "*i64",
                    "part_ends": "*i64",
                    "sums": summed,
                    "codes": "i32",
                    "dims": "i32",
                },
                {"PART": PART},
                vector_loads=True,
            )
        for estimator, number in ESTIMATORS.items():
            add(
                f"rows-{estimator}-{type_}",
                _rows_kernel,
                {
                    "grad_quantized": given,
                    "grad_losses": computed,
                    "x": given,
                    "codebook": given,
                    "indices": "*i64",
                    "weight": "*fp64",
                    "grad_x": given,
                    "rows": "i32",
                    "dims": "i32",
                },
                {"ESTIMATOR": number},
                vector_loads=True,
            )
    return cases
