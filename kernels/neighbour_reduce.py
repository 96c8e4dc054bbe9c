"""Sums and maxima of features over neighbours, and the gradients.

A row is a point of any cloud, an edge a centre's k-th neighbour. Gradients are gathered: edges are
brought into the order of their rows by a stable sort, so that each row adds up its own, in order.

  reduce  sums or maxima over a centre's neighbours
  sum     over the edges of a row, of what they or their centres leave
  dot     of each edge: its centre's gradient with its row's features
"""

from typing import Any

import torch
import triton
import triton.language as tl

from fastzoo.reference.precision import compute_dtype

from .runtime import FUSED, INTERPRETER, CompileCase, generation, on_device_of
from .score_tiles import TRITON_TYPES, known

CHANNELS = 128  # of a tile, at most
# The other sides of tiles: centres or edges, by rows and edges for sums over the edges of rows.
CENTRES = {INTERPRETER: 64, 8: 8, 9: 8, 10: 8}
ROW_EDGES = {INTERPRETER: (16, 8), 8: (1, 16), 9: (1, 16), 10: (1, 16)}


@triton.jit(do_not_specialize=["centres", "points"])
def _reduce_kernel(
    features,  # [rows, channels]
    rows,  # [centres, neighbours]; negative for none
    weights,  # likewise, if any
    out,  # [centres, channels], written
    winner,  # likewise, written if maxima are taken: the row within its cloud
    centres,
    neighbours,
    points,  # of a cloud
    channels,
    SUM: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    centre = tl.program_id(0).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    inside = centre < centres
    lane = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    within = (lane < channels)[None, :]
    total = tl.zeros((BLOCK_S, BLOCK_C), SUM)
    best = tl.full((BLOCK_S, BLOCK_C), -1, tl.int32)
    for k in range(neighbours):
        edge = centre * neighbours + k
        row = tl.load(rows + edge, mask=inside, other=-1)
        there = (row >= 0)[:, None] & within
        f = tl.load(features + row[:, None] * channels + lane[None, :], mask=there, other=0.0)
        f = f.to(SUM)
        if winner is not None:
            # The first of equals, and the first NaN.
            better = (best < 0) | (f > total) | ((f != f) & (total == total))
            total = tl.where(there & better, f, total)
            best = tl.where(there & better, (row % points).to(tl.int32)[:, None], best)
        else:
            if weights is not None:
                f *= tl.load(weights + edge, mask=row >= 0, other=0.0)[:, None]
            total += f
    at = centre[:, None] * channels + lane[None, :]
    live = inside[:, None] & within
    tl.store(out + at, total.to(out.dtype.element_ty), mask=live)
    if winner is not None:
        tl.store(winner + at, best, mask=live)


@triton.jit(do_not_specialize=["rows", "points"])
def _sum_kernel(
    source,  # [.., channels]: edge e leaves row e // each
    weights,  # [edges], if any
    winner,  # as source, if only the row that won has a gradient
    order,  # [edges]: by row
    offsets,  # [rows + 1]: where a row's edges begin in `order`
    sums,  # [rows, channels], added to
    rows,
    each,
    points,  # of a cloud
    channels,
    SUM: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = row < rows
    lane = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    within = lane < channels
    first = tl.load(offsets + row, mask=inside, other=0)
    last = tl.load(offsets + row + 1, mask=inside, other=0)
    total = tl.zeros((BLOCK_R, BLOCK_C), SUM)
    for start in range(0, tl.max(last - first, axis=0), BLOCK_E):
        place = (first + start)[:, None] + tl.arange(0, BLOCK_E)[None, :]
        live = place < last[:, None]
        edge = tl.load(order + place, mask=live, other=0)
        source_row = edge // each
        at = source_row[:, :, None] * channels + lane[None, None, :]
        read = live[:, :, None] & within[None, None, :]
        term = tl.load(source + at, mask=read, other=0.0).to(SUM)
        if weights is not None:
            term *= tl.load(weights + edge, mask=live, other=0.0)[:, :, None]
        if winner is not None:
            # A row that a centre names more than once has won but once.
            before = tl.load(order + place - 1, mask=live & (place > first[:, None]), other=0)
            again = (place > first[:, None]) & (before // each == source_row)
            won = tl.load(winner + at, mask=read, other=-1) == (row % points)[:, None, None]
            term = tl.where(won & ~again[:, :, None], term, 0.0)
        total += tl.sum(term, axis=1)
    at = row[:, None] * channels + lane[None, :]
    live = inside[:, None] & within[None, :]
    total += tl.load(sums + at, mask=live, other=0.0)
    tl.store(sums + at, total, mask=live)


@triton.jit(do_not_specialize=["edges"])
def _dot_kernel(
    grad,  # [centres, channels]
    features,  # [rows, channels]
    rows,  # [edges]
    dots,  # [edges], written
    edges,
    neighbours,
    channels,
    BLOCK_E: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    dtype = dots.dtype.element_ty
    edge = tl.program_id(0).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    inside = edge < edges
    row = tl.load(rows + edge, mask=inside, other=-1)
    there = row >= 0
    centre = edge // neighbours
    total = tl.zeros((BLOCK_E,), dtype)
    for start in range(0, channels, BLOCK_C):
        lane = start + tl.arange(0, BLOCK_C)
        live = there[:, None] & (lane < channels)[None, :]
        g = tl.load(grad + centre[:, None] * channels + lane[None, :], mask=live, other=0.0)
        f = tl.load(features + row[:, None] * channels + lane[None, :], mask=live, other=0.0)
        total += tl.sum(g.to(dtype) * f.to(dtype), axis=1)
    tl.store(dots + edge, total, mask=inside)


def edge_rows(neighbours: torch.Tensor, points: int) -> torch.Tensor:
    """``[B, S, K]``: each edge's row among all clouds' of ``points`` rows each, -1 for none."""
    cloud = torch.arange(len(neighbours), device=neighbours.device) * points
    return torch.where(neighbours < 0, -1, neighbours + cloud[:, None, None]).contiguous()


def inverse_list(rows: torch.Tensor, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The edges in the order of their rows, and where each row's from first to last begin there."""
    by_row, order = torch.sort(rows.flatten(), stable=True)
    wanted = torch.arange(first, last + 1, device=rows.device)
    return order, torch.searchsorted(by_row, wanted)


def add_by_row(
    sums: torch.Tensor,
    source: torch.Tensor,
    inverse: tuple[torch.Tensor, torch.Tensor],
    each: int = 1,
    weights: torch.Tensor | None = None,
    winner: torch.Tensor | None = None,
    points: int = 1,
) -> None:
    """Add to each row of ``sums`` what its edges leave: edge e row e // each of ``source``, times
    its weight, or where ``winner`` names the row within its cloud."""
    rows, channels = sums.shape
    if sums.numel() == 0:
        return
    order, offsets = inverse
    block_rows, block_edges = ROW_EDGES[known(generation(sums))]
    block_channels = _channels(channels)
    with on_device_of(sums):
        _sum_kernel[(triton.cdiv(rows, block_rows), triton.cdiv(channels, block_channels))](
            source,
            weights,
            winner,
            order,
            offsets,
            sums,
            rows,
            each,
            points,
            channels,
            SUM=_sum_type(sums),
            BLOCK_R=block_rows,
            BLOCK_E=block_edges,
            BLOCK_C=block_channels,
            **FUSED,
        )


def _channels(channels: int) -> int:
    return min(CHANNELS, max(16, triton.next_power_of_2(channels)))


def _sum_type(tensor: torch.Tensor) -> Any:
    return TRITON_TYPES[compute_dtype(tensor)]


def neighbour_reduce(
    features: torch.Tensor, neighbours: torch.Tensor, weights: torch.Tensor, reduce: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum (with weights, if there are any) or the maximum of a centre's features, and which
    row has the maximum."""
    (clouds, points, channels), (_, centres, k) = features.shape, neighbours.shape
    features, weights = features.contiguous(), weights.contiguous()
    out = features.new_empty(clouds, centres, channels)
    maximum = reduce == "max"
    winner = torch.empty(out.shape if maximum else 0, dtype=torch.int32, device=features.device)
    if out.numel() == 0:
        return out, winner
    block_centres, block_channels = CENTRES[known(generation(features))], _channels(channels)
    grid = (triton.cdiv(clouds * centres, block_centres), triton.cdiv(channels, block_channels))
    with on_device_of(features):
        _reduce_kernel[grid](
            features,
            edge_rows(neighbours, points),
            weights if weights.numel() else None,
            out,
            winner if maximum else None,
            clouds * centres,
            k,
            points,
            channels,
            SUM=_sum_type(features),
            BLOCK_S=block_centres,
            BLOCK_C=block_channels,
            **FUSED,
        )
    return out, winner


def neighbour_reduce_backward(
    grad: torch.Tensor,
    features: torch.Tensor,
    neighbours: torch.Tensor,
    weights: torch.Tensor,
    winner: torch.Tensor,
    reduce: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients to the features, and to the weights where there are any."""
    (clouds, points, channels), k = features.shape, neighbours.shape[2]
    grad, features, weights = grad.contiguous(), features.contiguous(), weights.contiguous()
    rows = edge_rows(neighbours, points)
    sums = features.new_zeros(clouds * points, channels, dtype=compute_dtype(features))
    add_by_row(
        sums,
        grad,
        inverse_list(rows, 0, len(sums)),
        each=k,
        weights=weights if weights.numel() else None,
        winner=winner.contiguous() if reduce == "max" else None,
        points=points,
    )
    grad_weights = torch.empty_like(weights)
    if weights.numel():
        block_edges = CENTRES[known(generation(features))]
        with on_device_of(features):
            _dot_kernel[(triton.cdiv(rows.numel(), block_edges),)](
                grad,
                features,
                rows,
                grad_weights,
                rows.numel(),
                k,
                channels,
                BLOCK_E=block_edges,
                BLOCK_C=_channels(channels),
                **FUSED,
            )
    return sums.view(features.shape).to(features.dtype), grad_weights


def compile_cases(generation: int) -> list[CompileCase]:
    machine = known(generation)
    centres, (rows, edges) = CENTRES[machine], ROW_EDGES[machine]
    cases = []

    def add(
        name: str, kernel: Any, types: dict[str, str], constants: dict[str, Any], **checks: Any
    ) -> None:
        constants = {**constants, "BLOCK_C": CHANNELS}
        cases.append(
            CompileCase(
                name, kernel, types, constants, FUSED, multiples=("channels",), fused=True, **checks
            )
        )

    for type_ in ("fp32", "bf16", "fp64"):
        given = f"*{type_}"
        computed = "*fp64" if type_ == "fp64" else "*fp32"
        sum_type = tl.float64 if type_ == "fp64" else tl.float32
        reads = {
            "features": given,
            "rows": "*i64",
            "out": given,
            **dict.fromkeys(("centres", "neighbours", "points", "channels"), "i32"),
        }
        for name, types in (
            ("sum", {}),
            ("weighted", {"weights": computed}),
            ("max", {"winner": "*i32"}),
        ):
            add(
                f"reduce-{name}-{type_}",
                _reduce_kernel,
                {**reads, **types},
                {"SUM": sum_type, "BLOCK_S": centres},
                vector_loads=True,
            )
        by_row = {
            "source": given,
            "order": "*i64",
            "offsets": "*i64",
            "sums": computed,
            **dict.fromkeys(("rows", "each", "points", "channels"), "i32"),
        }
        for name, types in (
            ("sum", {}),
            ("weighted", {"weights": computed}),
            ("max", {"winner": "*i32"}),
        ):
            add(
                f"by-row-{name}-{type_}",
                _sum_kernel,
                {**by_row, **types},
                {"SUM": sum_type, "BLOCK_R": rows, "BLOCK_E": edges},
                vector_loads=True,
            )
        add(
            f"dot-{type_}",
            _dot_kernel,
            {
                "grad": given,
                "features": given,
                "rows": "*i64",
                "dots": computed,
                **dict.fromkeys(("edges", "neighbours", "channels"), "i32"),
            },
            {"BLOCK_E": centres},
            vector_loads=True,
        )
    return cases
