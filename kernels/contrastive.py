"""Contrastive losses: log-sum-exps of the rows and the columns of all pairs' scores from one pass,
and their gradients.

  positives  each query's score with its own key, by torch: they are few
  forward    a row's maximum and sum over the keys, which may be split among programs, and each row
             tile's maximum and sum over every column
  gradient   V, the gradients of the dot products with a chunk of keys, from the scores made again;
             the two products with V are torch's
"""

import torch
import triton
import triton.language as tl

from fastzoo.reference.precision import compute_dtype

from . import score_tiles
from .elementary import softplus
from .runtime import CompileCase, generation, on_device_of
from .score_tiles import (
    LARGE,
    TALL,
    finite,
    gradient_dtype,
    known,
    log_sum,
    product_dtype,
    score_tile,
    tile_of,
)

FORWARD = {8: LARGE, 9: LARGE, 10: TALL}
GRADIENT = dict.fromkeys((8, 9, 10), TALL)


@triton.jit(do_not_specialize=["rows", "columns", "tiles"])
def _forward_kernel(
    queries,  # [rows, dims]
    keys,  # [columns, dims]
    scale,  # [1]
    bias,  # [1]
    row_highest,  # [splits, rows], written unless SIGMOID
    row_sums,  # [splits, rows], written
    column_highest,  # [row tiles, columns], written if COLUMNS
    column_sums,  # [row tiles, columns], written if COLUMNS
    rows,
    columns,
    dims,
    tiles,  # of keys, a split
    EXCLUDE_SELF: tl.constexpr,
    COLUMNS: tl.constexpr,
    SIGMOID: tl.constexpr,
    PRODUCT: tl.constexpr,
    OPERAND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    dtype = scale.dtype.element_ty
    split = tl.program_id(1).to(tl.int64)
    row_tile = tl.program_id(0).to(tl.int64)
    first_row = row_tile * BLOCK_M
    row = first_row + tl.arange(0, BLOCK_M)
    inside = row < rows
    s, b = tl.load(scale), tl.load(bias)
    best = tl.full((BLOCK_M,), float("-inf"), dtype)
    total = tl.zeros((BLOCK_M,), dtype)
    first = split * tiles * BLOCK_N
    last = tl.minimum(first + tiles * BLOCK_N, columns)
    for start in range(first, last, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N).to(tl.int64)
        exists = column < columns
        dots = score_tile(
            queries + first_row * dims,
            dims,
            inside,
            keys + start * dims,
            dims,
            exists,
            dims,
            dtype,
            PRODUCT,
            OPERAND,
            BLOCK_M,
            BLOCK_N,
            BLOCK_D,
        )
        z = s * dots + b
        counts = inside[:, None] & exists[None, :]
        if EXCLUDE_SELF:
            itself = (row - start).to(tl.int32)
            counts = counts & (itself[:, None] != tl.arange(0, BLOCK_N)[None, :])
        if SIGMOID:
            total += tl.sum(tl.where(counts, softplus(z), 0.0), axis=1)
        else:
            z = tl.where(counts, z, float("-inf"))
            higher = tl.maximum(best, tl.max(z, axis=1))
            reference = finite(higher)
            total = total * tl.exp(best - reference)
            total += tl.sum(tl.exp(z - reference[:, None]), axis=1)
            best = higher
            if COLUMNS:
                top = tl.max(z, axis=0)
                sums = tl.sum(tl.exp(z - finite(top)[None, :]), axis=0)
                tl.store(column_highest + row_tile * columns + column, top, mask=exists)
                tl.store(column_sums + row_tile * columns + column, sums, mask=exists)
    out = split * rows + row
    if not SIGMOID:
        tl.store(row_highest + out, best, mask=inside)
    tl.store(row_sums + out, total, mask=inside)


@triton.jit(do_not_specialize=["rows", "columns", "first", "last"])
def _gradient_kernel(
    queries,  # [rows, dims]
    keys,  # [columns, dims]
    positives,  # [rows]
    scale,  # [1]
    bias,  # [1]
    grad_positive,  # [rows]
    grad_row,  # [rows]
    grad_column,  # [columns], if COLUMNS
    row_lse,  # [rows], unless SIGMOID
    column_lse,  # [columns], if COLUMNS
    v,  # [rows, last - first in whole tiles], written
    scale_sums,  # [key tiles, rows], written
    bias_sums,  # [key tiles, rows], written
    rows,
    columns,
    dims,
    first,  # key of v
    last,
    EXCLUDE_SELF: tl.constexpr,
    COLUMNS: tl.constexpr,
    SIGMOID: tl.constexpr,
    PRODUCT: tl.constexpr,
    OPERAND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    dtype = scale.dtype.element_ty
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_M
    row = first_row + tl.arange(0, BLOCK_M)
    inside = row < rows
    tile = tl.program_id(1).to(tl.int64)
    start = first + tile * BLOCK_N
    column = start + tl.arange(0, BLOCK_N)
    exists = column < last
    dots = score_tile(
        queries + first_row * dims,
        dims,
        inside,
        keys + start * dims,
        dims,
        exists,
        dims,
        dtype,
        PRODUCT,
        OPERAND,
        BLOCK_M,
        BLOCK_N,
        BLOCK_D,
    )
    s = tl.load(scale)
    z = s * dots + tl.load(bias)
    counts = inside[:, None] & exists[None, :]
    there = counts
    place = tl.arange(0, BLOCK_N)[None, :]
    if EXCLUDE_SELF:
        counts = counts & ((row - start).to(tl.int32)[:, None] != place)
    by_row = tl.load(grad_row + row, mask=inside, other=0.0)[:, None]
    if SIGMOID:
        small = tl.exp(-tl.abs(z))
        dz = by_row * tl.where(z >= 0, 1.0, small) / (1 + small)
    else:
        above = finite(tl.load(row_lse + row, mask=inside, other=0.0))[:, None]
        dz = by_row * tl.exp(tl.where(counts, z - above, float("-inf")))
        if COLUMNS:
            by_column = tl.load(grad_column + column, mask=exists, other=0.0)[None, :]
            above = finite(tl.load(column_lse + column, mask=exists, other=0.0))[None, :]
            dz += by_column * tl.exp(tl.where(counts, z - above, float("-inf")))
    dz = tl.where(counts, dz, 0.0)
    positive = tl.load(positives + row, mask=inside, other=-1)
    own = (positive - start).to(tl.int32)[:, None] == place
    own_grad = tl.load(grad_positive + row, mask=inside, other=0.0)[:, None]
    dz += tl.where(own & exists[None, :], own_grad, 0.0)
    width = tl.cdiv(last - first, BLOCK_N) * BLOCK_N
    at = v + first_row * width + tile * BLOCK_N
    at += tl.arange(0, BLOCK_M)[:, None] * width + place
    tl.store(at, (s * dz).to(v.dtype.element_ty), mask=there)
    tl.store(scale_sums + tile * rows + row, tl.sum(dz * dots, axis=1), mask=inside)
    tl.store(bias_sums + tile * rows + row, tl.sum(dz, axis=1), mask=inside)


def contrastive(
    queries, keys, positives, scale, bias, exclude_self, columns, sigmoid, bfloat16_products
):
    queries, keys = queries.contiguous(), keys.contiguous()
    n, m = queries.shape[0], keys.shape[0]
    dtype = compute_dtype(queries)
    empty = scale.new_empty
    column = empty(m if columns else 0).fill_(-torch.inf)
    if n == 0:
        return empty(0), empty(0), column
    if m == 0:
        nowhere = torch.where(positives < 0, 0, torch.nan).to(dtype)
        row = torch.full_like(nowhere, 0 if sigmoid else -torch.inf)
        return nowhere, row, column
    own = (queries.to(dtype) * keys[positives.clamp(0, m - 1)].to(dtype)).sum(1)
    positive = torch.where(positives < 0, 0, scale * own + bias)
    positive = torch.where(positives >= m, torch.nan, positive)

    kind = product_dtype(queries, bfloat16_products)
    machine = known(generation(queries))
    tile = tile_of(machine, queries.dtype, kind, FORWARD)
    row_tiles = triton.cdiv(n, tile.rows)
    parts, tiles = score_tiles.splits(tile, machine, n, m)
    row_highest, row_sums = empty(parts, n), empty(parts, n)
    column_highest, column_sums = (empty(row_tiles, m if columns else 0) for _ in range(2))
    with on_device_of(queries):
        _forward_kernel[(row_tiles, parts)](
            queries,
            keys,
            scale,
            bias,
            row_highest if not sigmoid else None,
            row_sums,
            column_highest if columns else None,
            column_sums if columns else None,
            n,
            m,
            queries.shape[1],
            tiles,
            EXCLUDE_SELF=exclude_self,
            COLUMNS=columns,
            SIGMOID=sigmoid,
            **score_tiles.launch_options(tile, kind, machine),
        )
    row = row_sums.sum(0) if sigmoid else log_sum(row_highest, row_sums)
    if columns:
        column = log_sum(column_highest, column_sums)
    return positive, row, column


def contrastive_backward(
    grad_positive,
    grad_row,
    grad_column,
    queries,
    keys,
    positives,
    scale,
    bias,
    row,
    column,
    exclude_self,
    sigmoid,
    bfloat16_products,
    needs_queries,
    needs_keys,
    needs_scale,
):
    q, k = queries.contiguous(), keys.contiguous()
    (n, dims), m = q.shape, k.shape[0]
    kind = product_dtype(q, bfloat16_products)
    machine = known(generation(q))
    tile = tile_of(machine, q.dtype, kind, GRADIENT)
    grad_q = scale.new_zeros(n, dims)
    grad_k = torch.zeros_like(k) if needs_keys else k.new_empty(0)
    scale_sum, bias_sum = scale.new_zeros(1), scale.new_zeros(1)
    grads = [grad_positive, grad_row, row] + ([grad_column, column] if column.numel() else [])
    grad_positive, grad_row, row, *by_column = (t.contiguous() for t in grads)
    grad_column, column = by_column if by_column else (None, None)
    held = gradient_dtype(kind)
    rounded = q.to(held)
    at_a_time = score_tiles.columns_at_a_time(tile, machine, n, dims, 1, held.itemsize)
    for first in range(0, m if n else 0, at_a_time):
        last = min(first + at_a_time, m)
        key_tiles = triton.cdiv(last - first, tile.columns)
        # Whole tiles a row: the products want aligned rows.
        v = torch.empty(n, key_tiles * tile.columns, dtype=held, device=q.device)
        scale_sums, bias_sums = (scale.new_empty(key_tiles, n) for _ in range(2))
        with on_device_of(q):
            _gradient_kernel[(triton.cdiv(n, tile.rows), key_tiles)](
                q,
                k,
                positives.contiguous(),
                scale,
                bias,
                grad_positive,
                grad_row,
                grad_column,
                row if not sigmoid else None,
                column,
                v,
                scale_sums,
                bias_sums,
                n,
                m,
                dims,
                first,
                last,
                EXCLUDE_SELF=exclude_self,
                COLUMNS=column is not None,
                SIGMOID=sigmoid,
                **score_tiles.launch_options(tile, kind, machine),
            )
        v = v[:, : last - first]
        if needs_queries:
            grad_q += score_tiles.product(v, k[first:last])
        if needs_keys:
            grad_k[first:last] = score_tiles.product(v.t(), rounded)
        if needs_scale:
            scale_sum += scale_sums.sum()
            bias_sum += bias_sums.sum()
    grad_q = grad_q.to(q.dtype) if needs_queries else q.new_empty(0)
    if not needs_scale:
        scale_sum, bias_sum = scale.new_empty(0), scale.new_empty(0)
    return grad_q, grad_k, scale_sum, bias_sum


def compile_cases(generation: int) -> list[CompileCase]:
    machine = known(generation)
    cases = []
    for name, stored, kind, instruction in score_tiles.COMPILED_TYPES:
        computed = "*fp64" if stored == "fp64" else "*fp32"
        operands = {
            "queries": f"*{stored}",
            "keys": f"*{stored}",
            "scale": computed,
            "bias": computed,
            **dict.fromkeys(("rows", "columns", "dims"), "i32"),
        }
        gradient = {
            "positives": "*i64",
            **dict.fromkeys(("grad_positive", "grad_row", "scale_sums", "bias_sums"), computed),
            "v": f"*{score_tiles.short_name(gradient_dtype(kind))}",
            "first": "i32",
            "last": "i32",
        }
        for variant, flags, forward, backward in (
            (
                "columns",
                {"COLUMNS": True},
                ("row_highest", "row_sums", "column_highest", "column_sums"),
                ("row_lse", "grad_column", "column_lse"),
            ),
            ("self", {"EXCLUDE_SELF": True}, ("row_highest", "row_sums"), ("row_lse",)),
            ("sigmoid", {"SIGMOID": True}, ("row_sums",), ()),
        ):
            if variant != "columns" and kind != torch.bfloat16:
                continue
            off = dict.fromkeys(("EXCLUDE_SELF", "COLUMNS", "SIGMOID"), False)
            for kernel, part, large, types in (
                (
                    _forward_kernel,
                    "forward",
                    FORWARD,
                    {**operands, "tiles": "i32", **dict.fromkeys(forward, computed)},
                ),
                (
                    _gradient_kernel,
                    "gradient",
                    GRADIENT,
                    {**operands, **gradient, **dict.fromkeys(backward, computed)},
                ),
            ):
                options, blocks = score_tiles.compile_options(machine, stored, kind, large)
                cases.append(
                    CompileCase(
                        name=f"{part}-{variant}-{name}",
                        kernel=kernel,
                        types=types,
                        constants={**off, **flags, **blocks},
                        options=options,
                        multiples=("dims",),
                        vector_loads=True,
                        fused=True,
                        instructions=instruction,
                    )
                )
    return cases
