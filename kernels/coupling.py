"""Couplings: elementwise bijections, the logarithms of their derivatives, and the gradients.

A program has a tile of rows and columns. Its rows' sums of logarithms are its own part of the sums,
and torch adds up the parts of a row in double: no atomics.

What a map computes is in `_scale` and `_slope` for the affine ones, and in `_bijection` and
`_derivatives` for those without parameters.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastzoo.reference.precision import compute_dtype

from .elementary import arctan, log1p, sigmoid, softplus, tanh
from .runtime import FUSED, INTERPRETER, CompileCase, generation, on_device_of
from .score_tiles import TRITON_TYPES, known

MAPS = {
    name: number
    for number, name in enumerate(
        (
            *("exp", "sigmoid2", "tanh", "atan", "softplus", "softclip"),
            *("additive", "soft_clip", "logit", "leaky_relu"),
        )
    )
}
EXP = tl.constexpr(MAPS["exp"])
SIGMOID2 = tl.constexpr(MAPS["sigmoid2"])
TANH = tl.constexpr(MAPS["tanh"])
ATAN = tl.constexpr(MAPS["atan"])
SOFTPLUS = tl.constexpr(MAPS["softplus"])
SOFTCLIP = tl.constexpr(MAPS["softclip"])
ADDITIVE = tl.constexpr(MAPS["additive"])
SOFT_CLIP = tl.constexpr(MAPS["soft_clip"])
LOGIT = tl.constexpr(MAPS["logit"])


class Tiles(NamedTuple):
    elements: int  # of a program
    widest: int  # columns
    narrowest: int


_GPU_TILES = Tiles(1024, 1024, 32)
TILES = {INTERPRETER: Tiles(2048, 128, 32), 8: _GPU_TILES, 9: _GPU_TILES, 10: _GPU_TILES}

LARGEST_ALIGNMENT = 16  # elements


class Tile(NamedTuple):
    rows: int
    columns: int
    parts: int  # of a row


def tile_of(tiles: Tiles, columns: int) -> Tile:
    """The widest tile of those with the fewest columns left over, of which up to a third of all
    counts as none."""

    def covered(width: int) -> int:
        return triton.cdiv(columns, width) * width

    widest = min(tiles.widest, triton.next_power_of_2(max(columns, 1)))
    widths = [widest, *(w for i in range(1, 10) if (w := widest >> i) >= tiles.narrowest)]
    width = max(widths, key=lambda w: (-max(covered(w), columns * 4 // 3), w))
    return Tile(tiles.elements // width, width, max(1, triton.cdiv(columns, width)))


def alignment(*lengths: int) -> int:
    """The largest power of two that divides lengths and strides: they are given to a kernel in
    units of it, so that the compiler knows, whatever they are."""
    bits = LARGEST_ALIGNMENT
    for length in lengths:
        bits |= length
    return bits & -bits


def sum_of_parts(partial: torch.Tensor) -> torch.Tensor:
    """[rows, parts] to [rows]."""
    if partial.shape[1] == 1:
        return partial.view(-1)
    return partial.sum(1, dtype=torch.float64).to(partial.dtype)


@triton.jit
def _place(parts, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The rows and the columns of a program's tile, and which part of the rows it is."""
    row = (tl.program_id(0) // parts).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    part = tl.program_id(0) % parts
    return row[:, None], (part.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :], part


@triton.jit
def _changing(mask, mask_row, column, inside, begin, end):
    """Which elements of a tile are not passed on as they are."""
    changes = inside & (column >= begin) & (column < end)
    if mask is not None:
        changes &= tl.load(mask + mask_row + (column - begin), mask=changes, other=1) == 0
    return changes


@triton.jit
def _scale(
    s,
    MAP: tl.constexpr,
    CONSTANT: tl.constexpr,
    LOG: tl.constexpr,
    FLOOR: tl.constexpr,
    INVERSE: tl.constexpr,
):
    """The logarithm of the scale, and the scale; or one over it, if INVERSE."""
    if MAP == SOFTPLUS or (MAP == SIGMOID2 and FLOOR != 0):
        if MAP == SOFTPLUS:
            factor = softplus(s) + FLOOR
        else:
            factor = sigmoid(s + 2) + FLOOR
        a = tl.log(factor)
        if FLOOR == 0:
            a = tl.where(s < -30, s, a)
        if INVERSE:
            factor = 1 / factor
    else:
        if MAP == EXP:
            a = s
        elif MAP == SIGMOID2:
            a = -softplus(-s - 2)
        elif MAP == TANH:
            a = tanh(s) * CONSTANT
        elif MAP == ATAN:
            a = arctan(s) * (0.636 * CONSTANT)
        else:
            a = s / (1 + tl.abs(s / LOG))
        if INVERSE:
            factor = tl.exp(-a)
        else:
            factor = tl.exp(a)
    return a, factor


@triton.jit
def _slope(s, MAP: tl.constexpr, CONSTANT: tl.constexpr, LOG: tl.constexpr, FLOOR: tl.constexpr):
    """The derivative of the scale's logarithm by s."""
    if MAP == EXP:
        slope = tl.full(s.shape, 1.0, s.dtype)
    elif MAP == SIGMOID2:
        slope = sigmoid(-s - 2)
        if FLOOR != 0:
            share = sigmoid(s + 2)
            slope *= share / (share + FLOOR)
    elif MAP == TANH:
        e = tl.exp(-2 * tl.abs(s))
        slope = e / ((1 + e) * (1 + e)) * (4 * CONSTANT)
    elif MAP == ATAN:
        slope = 1 / (1 + s * s) * (0.636 * CONSTANT)
    elif MAP == SOFTPLUS:
        slope = sigmoid(s) / (softplus(s) + FLOOR)
        if FLOOR == 0:
            slope = tl.where(s < -30, 1.0, slope)
    else:
        damped = 1 + tl.abs(s / LOG)
        slope = 1 / (damped * damped)
    return slope


@triton.jit
def _bijection(
    x, MAP: tl.constexpr, CONSTANT: tl.constexpr, LOG: tl.constexpr, INVERSE: tl.constexpr
):
    """A map without parameters, and the logarithm of its derivative."""
    if MAP == SOFT_CLIP:
        near = tl.abs(x) / CONSTANT
        if INVERSE:
            room = tl.where(near < 1, 1 - near, float("nan"))
            y = x / room
            log = -2 * tl.where(near < 1, log1p(-near), room)
        else:
            y = x / (1 + near)
            log = -2 * log1p(near)
    elif MAP == LOGIT:
        if INVERSE:
            y = (sigmoid(x) - CONSTANT) / (1 - 2 * CONSTANT)
            log = -softplus(x) - softplus(-x) - LOG
        else:
            u = x * (1 - 2 * CONSTANT) + CONSTANT
            low = tl.log(u)
            high = tl.log(1 - u)
            y = low - high
            log = LOG - low - high
    else:
        # NaN is neither: it comes out as NaN, with the derivative of a number below zero.
        SIGN: tl.constexpr = -1 if INVERSE else 1
        y = tl.where(x >= 0, x, x / CONSTANT if INVERSE else x * CONSTANT)
        log = (x < 0).to(x.dtype) * (SIGN * LOG)
    return y, log


@triton.jit
def _derivatives(x, MAP: tl.constexpr, CONSTANT: tl.constexpr, INVERSE: tl.constexpr):
    """Of a map without parameters, and of the logarithm of its derivative."""
    if MAP == SOFT_CLIP:
        sign = tl.where(x > 0, 2.0, tl.where(x < 0, -2.0, 0.0)) / tl.full(
            x.shape, CONSTANT, x.dtype
        )
        near = tl.abs(x) / CONSTANT
        if INVERSE:
            room = tl.where(near < 1, 1 - near, float("nan"))
            of_log = sign / room
        else:
            room = 1 + near
            of_log = -sign / room
        of_y = 1 / (room * room)
    elif MAP == LOGIT:
        WIDTH: tl.constexpr = 1 - 2 * CONSTANT
        if INVERSE:
            share = sigmoid(x)
            rest = sigmoid(-x)
            of_y = share * rest / WIDTH
            of_log = rest - share
        else:
            u = x * WIDTH + CONSTANT
            rest = 1 - u
            of_y = 1 / (u * rest) * WIDTH
            of_log = (1 / rest - 1 / u) * WIDTH
    else:
        one = tl.full(x.shape, 1.0, x.dtype)
        of_y = tl.where(x >= 0, one, one / CONSTANT if INVERSE else one * CONSTANT)
        of_log = tl.zeros_like(x)
    return of_y, of_log


@triton.jit(
    do_not_specialize=[
        *("rows", "parts", "columns", "begin", "end"),
        *("shift_row", "scale_row", "mask_row"),
    ]
)
def _coupling_kernel(
    x,  # [rows, columns]
    shift,  # [rows, end - begin], if any
    scale,  # likewise
    mask,  # likewise, or one row: nonzero passes unchanged
    y,  # [rows, columns], written
    logdet,  # [rows, columns], or if SUM [rows, parts], written if any
    rows,
    parts,
    columns,  # this and what follows, but for shift_column and scale_column, in units of ALIGN
    begin,
    end,
    shift_row,  # strides
    shift_column,
    scale_row,
    scale_column,
    mask_row,
    MAP: tl.constexpr,
    CONSTANT: tl.constexpr,
    LOG: tl.constexpr,
    FLOOR: tl.constexpr,
    SHIFT_FIRST: tl.constexpr,
    INVERSE: tl.constexpr,
    SUM: tl.constexpr,
    COMPUTE: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row, column, part = _place(parts, BLOCK_M, BLOCK_N)
    columns = columns.to(tl.int64) * ALIGN
    begin = begin.to(tl.int64) * ALIGN
    end = end.to(tl.int64) * ALIGN
    inside = (row < rows) & (column < columns)
    changes = _changing(mask, row * ALIGN * mask_row, column, inside, begin, end)
    at = row * columns + column
    given = tl.load(x + at, mask=inside, other=0.0).to(COMPUTE)
    if shift is not None:
        places = row * ALIGN * shift_row + (column - begin) * shift_column
        t = tl.load(shift + places, mask=changes, other=0.0).to(COMPUTE)
    if scale is not None:
        places = row * ALIGN * scale_row + (column - begin) * scale_column
        s = tl.load(scale + places, mask=changes, other=0.0).to(COMPUTE)
        log, factor = _scale(s, MAP, CONSTANT, LOG, FLOOR, INVERSE)
        if INVERSE:
            log = -log
            out = given * factor - t if SHIFT_FIRST else (given - t) * factor
        else:
            out = (given + t) * factor if SHIFT_FIRST else given * factor + t
    elif MAP == ADDITIVE:
        out = given - t if INVERSE else given + t
    else:
        out, log = _bijection(given, MAP, CONSTANT, LOG, INVERSE)
    out = tl.where(changes, out, given)
    tl.store(y + at, out.to(y.dtype.element_ty), mask=inside)
    if logdet is not None:
        log = tl.where(changes, log, 0.0)
        if SUM:
            tl.store(logdet + row * parts + part, tl.sum(log, 1, keep_dims=True), mask=row < rows)
        else:
            tl.store(logdet + at, log, mask=inside)


@triton.jit(
    do_not_specialize=[
        *("rows", "parts", "columns", "begin", "end"),
        *("shift_row", "scale_row", "mask_row"),
    ]
)
def _gradient_kernel(
    grad_y,  # [rows, columns]
    grad_logdet,  # [rows, columns], or if SUM [rows]
    x,  # [rows, columns]
    shift,  # [rows, end - begin], if any
    scale,  # likewise
    mask,  # likewise, or one row: nonzero passes unchanged
    grad_x,  # [rows, columns], written
    grad_shift,  # [rows, end - begin], written if there is a shift
    grad_scale,  # likewise
    rows,
    parts,
    columns,  # this and what follows, but for shift_column and scale_column, in units of ALIGN
    begin,
    end,
    shift_row,  # strides
    shift_column,
    scale_row,
    scale_column,
    mask_row,
    MAP: tl.constexpr,
    CONSTANT: tl.constexpr,
    LOG: tl.constexpr,
    FLOOR: tl.constexpr,
    SHIFT_FIRST: tl.constexpr,
    INVERSE: tl.constexpr,
    SUM: tl.constexpr,
    COMPUTE: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row, column, _ = _place(parts, BLOCK_M, BLOCK_N)
    columns = columns.to(tl.int64) * ALIGN
    begin = begin.to(tl.int64) * ALIGN
    end = end.to(tl.int64) * ALIGN
    inside = (row < rows) & (column < columns)
    changes = _changing(mask, row * ALIGN * mask_row, column, inside, begin, end)
    at = row * columns + column
    above = tl.load(grad_y + at, mask=inside, other=0.0).to(COMPUTE)
    if MAP != ADDITIVE:
        given = tl.load(x + at, mask=changes, other=0.0).to(COMPUTE)
        if SUM:
            of_log = tl.load(grad_logdet + row, mask=row < rows, other=0.0)
        else:
            of_log = tl.load(grad_logdet + at, mask=changes, other=0.0)
    if shift is not None:
        places = row * ALIGN * shift_row + (column - begin) * shift_column
        t = tl.load(shift + places, mask=changes, other=0.0).to(COMPUTE)
    if scale is not None:
        places = row * ALIGN * scale_row + (column - begin) * scale_column
        s = tl.load(scale + places, mask=changes, other=0.0).to(COMPUTE)
        _, factor = _scale(s, MAP, CONSTANT, LOG, FLOOR, INVERSE)
        through = above * factor
        if INVERSE:
            # What is multiplied by the scale's inverse.
            moved = given if SHIFT_FIRST else given - t
            of_shift = -above if SHIFT_FIRST else -through
            of_scale = -through * moved - of_log
        else:
            moved = given + t if SHIFT_FIRST else given
            of_shift = through if SHIFT_FIRST else above
            of_scale = through * moved + of_log
        of_scale = tl.where(changes, of_scale * _slope(s, MAP, CONSTANT, LOG, FLOOR), 0.0)
    elif MAP == ADDITIVE:
        through = above
        of_shift = -above if INVERSE else above
    else:
        of_y, of_own_log = _derivatives(given, MAP, CONSTANT, INVERSE)
        through = above * of_y + of_log * of_own_log
    through = tl.where(changes, through, above)
    tl.store(grad_x + at, through.to(grad_x.dtype.element_ty), mask=inside)
    own = row * (end - begin) + (column - begin)
    has_parameters = inside & (column >= begin) & (column < end)
    if shift is not None:
        of_shift = tl.where(changes, of_shift, 0.0)
        tl.store(grad_shift + own, of_shift.to(grad_shift.dtype.element_ty), mask=has_parameters)
    if scale is not None:
        tl.store(grad_scale + own, of_scale.to(grad_scale.dtype.element_ty), mask=has_parameters)


class _Launch:
    """What both kernels are given of a coupling besides tensors."""

    def __init__(self, x, shift, scale, mask, begin, end, map, constant, floor):
        self.rows, columns = x.shape
        self.tile = tile_of(TILES[known(generation(x))], columns)
        strides = [*_strides(shift), *_strides(scale)]
        mask_row = end - begin if mask.dim() == 2 else 0
        unit = alignment(columns, begin, end, strides[0], strides[2])
        self.strides = (
            self.rows,
            self.tile.parts,
            columns // unit,
            begin // unit,
            end // unit,
            strides[0] // unit,
            strides[1],
            strides[2] // unit,
            strides[3],
            mask_row // unit,
        )
        self.constants = {
            **_map_constants(map, constant, floor),
            "COMPUTE": TRITON_TYPES[compute_dtype(x)],
            "ALIGN": unit,
            "BLOCK_M": self.tile.rows,
            "BLOCK_N": self.tile.columns,
        }
        self.operands = (
            _given(shift),
            _given(scale),
            mask.contiguous().view(torch.uint8) if mask.numel() else None,
        )

    @property
    def grid(self) -> tuple[int]:
        return (triton.cdiv(self.rows, self.tile.rows) * self.tile.parts,)


def _given(parameter: torch.Tensor) -> torch.Tensor | None:
    return parameter if parameter.dim() == 2 else None


def _strides(parameter: torch.Tensor) -> tuple[int, ...]:
    return parameter.stride() if parameter.dim() == 2 else (0, 1)


def _map_constants(map: str, constant: float, floor: float) -> dict:
    argument = {"softclip": constant, "logit": 1 - 2 * constant, "leaky_relu": constant}
    return {
        "MAP": MAPS[map],
        "CONSTANT": constant,
        "LOG": math.log(argument.get(map, 1.0)),
        "FLOOR": floor,
    }


def coupling(
    x: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    mask: torch.Tensor,
    begin: int,
    end: int,
    map: str,
    constant: float,
    floor: float,
    shift_first: bool,
    inverse: bool,
    sum_logdet: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The columns begin to end of rows by a map, and the logarithms of its derivatives."""
    x = x.contiguous()
    launch = _Launch(x, shift, scale, mask, begin, end, map, constant, floor)
    shape = (launch.rows, launch.tile.parts) if sum_logdet else x.shape
    kind = {"dtype": compute_dtype(x), "device": x.device}
    y = torch.empty_like(x)
    has_log = map != "additive" and y.numel() > 0
    logdet = torch.empty(shape, **kind) if has_log else torch.zeros(shape, **kind)
    if y.numel():
        with on_device_of(x):
            _coupling_kernel[launch.grid](
                x,
                *launch.operands,
                y,
                logdet if has_log else None,
                *launch.strides,
                **launch.constants,
                SHIFT_FIRST=shift_first,
                INVERSE=inverse,
                SUM=sum_logdet,
                **FUSED,
            )
    return y, sum_of_parts(logdet) if sum_logdet else logdet


def coupling_backward(
    grad_y: torch.Tensor,
    grad_logdet: torch.Tensor,
    x: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    mask: torch.Tensor,
    begin: int,
    end: int,
    map: str,
    constant: float,
    floor: float,
    shift_first: bool,
    inverse: bool,
    sum_logdet: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients to x, shift and scale, from x as the map was given it."""
    grad_y, grad_logdet, x = grad_y.contiguous(), grad_logdet.contiguous(), x.contiguous()
    launch = _Launch(x, shift, scale, mask, begin, end, map, constant, floor)
    grad_x = torch.empty_like(x)
    grad_shift, grad_scale = (p.new_empty(p.shape) for p in (shift, scale))
    if x.numel():
        with on_device_of(x):
            _gradient_kernel[launch.grid](
                grad_y,
                grad_logdet,
                x,
                *launch.operands,
                grad_x,
                _given(grad_shift),
                _given(grad_scale),
                *launch.strides,
                **launch.constants,
                SHIFT_FIRST=shift_first,
                INVERSE=inverse,
                SUM=sum_logdet,
                **FUSED,
            )
    return grad_x, grad_shift, grad_scale


def compile_cases(generation: int) -> list[CompileCase]:
    tile = tile_of(TILES[known(generation)], 4096)
    cases = []
    for map in MAPS:
        for type_ in ("fp32", "bf16", "fp64"):
            has_scale = MAPS[map] < MAPS["additive"]
            parameters = (("shift",) if has_scale or map == "additive" else ()) + (
                ("scale",) if has_scale else ()
            )
            given = f"*{type_}"
            computed = "fp64" if type_ == "fp64" else "fp32"
            log = {} if map == "additive" else {"logdet": f"*{computed}"}
            shared = {
                **dict.fromkeys(("x", *parameters), given),
                "mask": "*u8",
                **dict.fromkeys(("rows", "parts", "columns", "begin", "end"), "i32"),
                **dict.fromkeys(("shift_row", "scale_row", "mask_row"), "i32"),
            }
            gradients = (f"grad_{name}" for name in ("y", "x", *parameters))
            for kernel, name, types in (
                (_coupling_kernel, "coupling", {"y": given, **log}),
                (
                    _gradient_kernel,
                    "coupling-gradient",
                    {**dict.fromkeys(gradients, given), "grad_logdet": f"*{computed}"},
                ),
            ):
                cases.append(
                    CompileCase(
                        name=f"{name}-{map}-{type_}",
                        kernel=kernel,
                        types={**shared, **types},
                        constants={
                            **_map_constants(map, 0.25, 1e-3),
                            "shift_column": 1,
                            "scale_column": 1,
                            "SHIFT_FIRST": False,
                            "INVERSE": map in ("softplus", "soft_clip", "leaky_relu"),
                            "SUM": True,
                            "COMPUTE": getattr(tl, f"float{computed[2:]}"),
                            "ALIGN": LARGEST_ALIGNMENT,
                            "BLOCK_M": tile.rows,
                            "BLOCK_N": tile.columns,
                        },
                        options=FUSED,
                        vector_loads=True,
                        fused=True,
                    )
                )
    return cases
