"""PointConv: features of neighbours, weighted by a network of their places, and its gradients.

Everything goes by chunks of centres, so that no tensor of all edges' features is ever held. The
products with the last layer are torch's, which fill the matrix units; a chunk of what they read is
small enough for the cache.

  weights        the network's outputs for edges
  aggregate      the features of a centre's neighbours, times their weights
  edge gradient  of the weights and of the features, by edge
  net gradient   of the network's parameters, in parts that torch adds up; of coordinates, by edge
  moments        sums and products of the network's outputs, in double, in parts

An edge is a centre's k-th neighbour, its row the point among those of all clouds. A layer's outputs
are a tile [edges, width], padded with zeros to a power of two. Going back, the outputs below a
layer are made again: to keep all of them would fill the registers.
"""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from fastzoo import reference
from fastzoo.reference.precision import compute_dtype

from .neighbour_reduce import add_by_row, edge_rows, inverse_list
from .runtime import FUSED, INTERPRETER, CompileCase, generation, on_device_of
from .score_tiles import TRITON_TYPES, gradient_dtype, known, product, short_name

# What is held of a chunk of centres, and of the parts of the network's gradient.
CHUNK_BYTES = {INTERPRETER: 256 << 10, 8: 64 << 20, 9: 64 << 20, 10: 64 << 20}
PARTS_BYTES = {INTERPRETER: 1 << 20, 8: 32 << 20, 9: 32 << 20, 10: 32 << 20}
PARTS = {INTERPRETER: 2, 8: 1024, 9: 2048, 10: 2048}
MOMENT_PARTS = {INTERPRETER: 2, 8: 216, 9: 264, 10: 296}

SMALLEST = 16  # side that a product takes

# Deeper networks go by the definition: their unrolled code, which grows with the square of the
# depth, takes minutes to compile and more registers than there are.
UNROLLED_LAYERS = 4


@triton.jit
def _coordinate(xyz, centres, row, centre, there, d, DIMS: tl.constexpr):
    """Of points, seen from their centres."""
    x = tl.load(xyz + row * DIMS + d, mask=there, other=0.0)
    return x - tl.load(centres + centre * DIMS + d, mask=there, other=0.0)


@triton.jit
def _outputs(
    xyz,
    centres,
    net,
    row,
    centre,
    there,
    AFTER: tl.constexpr,
    WIDTHS: tl.constexpr,
    PADDED: tl.constexpr,
    OFFSETS: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """The outputs of the first AFTER layers; of none, the coordinates themselves."""
    dtype = net.dtype.element_ty
    if AFTER == 0:
        lane = tl.arange(0, PADDED[0])
        live = there[:, None] & (lane < WIDTHS[0])[None, :]
        x = _coordinate(xyz, centres, row[:, None], centre[:, None], live, lane[None, :], WIDTHS[0])
    for i in tl.static_range(AFTER):
        lane = tl.arange(0, PADDED[i + 1])
        within = lane < WIDTHS[i + 1]
        weight = net + OFFSETS[i]
        bias = tl.load(weight + WIDTHS[i] * WIDTHS[i + 1] + lane, mask=within, other=0.0)
        total = tl.zeros((BLOCK_E, PADDED[i + 1]), dtype) + bias[None, :]
        if i == 0:
            for d in range(WIDTHS[0]):
                column = tl.load(weight + lane * WIDTHS[0] + d, mask=within, other=0.0)
                x_d = _coordinate(xyz, centres, row, centre, there, d, WIDTHS[0])
                total += x_d[:, None] * column[None, :]
        else:
            into = tl.arange(0, PADDED[i])
            matrix = tl.load(
                weight + lane[None, :] * WIDTHS[i] + into[:, None],
                mask=within[None, :] & (into < WIDTHS[i])[:, None],
                other=0.0,
            )
            total = tl.dot(x, matrix, total, input_precision="ieee", out_dtype=dtype)
        x = tl.where(total < 0, 0.0, total)
    return x


@triton.jit(do_not_specialize=["edges"])
def _weights_kernel(
    xyz,  # [points, dims]
    centres,  # [centres, dims]
    rows,  # [edges]; negative for none
    scale,  # [edges], if any
    net,
    weights,  # [edges, outputs], written
    edges,
    neighbours,
    WIDTHS: tl.constexpr,
    PADDED: tl.constexpr,
    OFFSETS: tl.constexpr,
    LAYERS: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    edge = tl.program_id(0).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    inside = edge < edges
    row = tl.load(rows + edge, mask=inside, other=-1)
    there = row >= 0
    m = _outputs(
        xyz,
        centres,
        net,
        row,
        edge // neighbours,
        there,
        LAYERS,
        WIDTHS,
        PADDED,
        OFFSETS,
        BLOCK_E,
    )
    if scale is not None:
        m *= tl.load(scale + edge, mask=there, other=0.0)[:, None]
    m = tl.where(there[:, None], m, 0.0)
    lane = tl.arange(0, PADDED[LAYERS])
    live = inside[:, None] & (lane < WIDTHS[LAYERS])[None, :]
    at = weights + edge[:, None] * WIDTHS[LAYERS] + lane[None, :]
    tl.store(at, m.to(weights.dtype.element_ty), mask=live)


@triton.jit
def _aggregate_kernel(
    features,  # [points, channels], or GROUPED [centres, neighbours, channels]
    rows,  # [centres, neighbours]; negative for none
    weights,  # [centres, neighbours, outputs]
    out,  # [centres, channels, outputs], written
    neighbours,
    channels,
    outputs,
    GROUPED: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    SUM: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    centre = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    output = tl.arange(0, BLOCK_M)
    total = tl.zeros((BLOCK_C, BLOCK_M), SUM)
    for start in range(0, neighbours, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        edge = centre * neighbours + k
        row = tl.load(rows + edge, mask=k < neighbours, other=-1)
        there = row >= 0
        if GROUPED:
            row = edge
        w = tl.load(
            weights + edge[:, None] * outputs + output[None, :],
            mask=there[:, None] & (output < outputs)[None, :],
            other=0.0,
        )
        f = tl.load(
            features + row[None, :] * channels + channel[:, None],
            mask=there[None, :] & (channel < channels)[:, None],
            other=0.0,
        )
        f, w = f.to(OPERAND), w.to(OPERAND)
        total = tl.dot(f, w, total, input_precision=PRECISION, out_dtype=SUM)
    at = out + (centre * channels + channel[:, None]) * outputs + output[None, :]
    live = (channel < channels)[:, None] & (output < outputs)[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=live)


@triton.jit
def _edge_gradient_kernel(
    grad,  # [centres, channels, outputs]
    features,  # [points, channels], or GROUPED [centres, neighbours, channels]
    rows,  # [centres, neighbours]; negative for none
    weights,  # [centres, neighbours, outputs]
    grad_weights,  # [centres, neighbours, outputs], written
    grad_features,  # [centres, neighbours, channels], written
    neighbours,
    channels,
    outputs,
    GROUPED: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    SUM: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    centre = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    exists = k < neighbours
    edge = centre * neighbours + k
    row = tl.load(rows + edge, mask=exists, other=-1)
    there = row >= 0
    if GROUPED:
        row = edge
    output = tl.arange(0, BLOCK_M)
    within = (output < outputs)[None, :]
    at = edge[:, None] * outputs + output[None, :]
    w = tl.load(weights + at, mask=there[:, None] & within, other=0.0).to(OPERAND)
    total = tl.zeros((BLOCK_K, BLOCK_M), SUM)
    for start in range(0, channels, BLOCK_C):
        channel = start + tl.arange(0, BLOCK_C)
        exists_channel = channel < channels
        g = tl.load(
            grad + (centre * channels + channel[:, None]) * outputs + output[None, :],
            mask=exists_channel[:, None] & within,
            other=0.0,
        )
        f = tl.load(
            features + row[:, None] * channels + channel[None, :],
            mask=there[:, None] & exists_channel[None, :],
            other=0.0,
        )
        g, f = g.to(OPERAND), f.to(OPERAND)
        total = tl.dot(f, g, total, input_precision=PRECISION, out_dtype=SUM)
        h = tl.dot(w, tl.trans(g), input_precision=PRECISION, out_dtype=SUM)
        h = tl.where(there[:, None], h, 0.0).to(grad_features.dtype.element_ty)
        tl.store(
            grad_features + edge[:, None] * channels + channel[None, :],
            h,
            mask=exists[:, None] & exists_channel[None, :],
        )
    tl.store(grad_weights + at, total, mask=exists[:, None] & within)


@triton.jit
def _add(at, value, mask):
    """To memory that is this program's own."""
    before = tl.load(at, mask=mask, other=0.0)
    tl.store(at, before + value.to(before.dtype), mask=mask)


@triton.jit(do_not_specialize=["edges", "each"])
def _net_gradient_kernel(
    xyz,  # [points, dims]
    centres,  # [centres, dims]
    rows,  # [edges]; negative for none
    scale,  # [edges], if any
    net,
    grad_weights,  # [edges, outputs], if not MOMENTS: before the scale
    grad_mean,  # [outputs], if MOMENTS: for each edge
    grad_product,  # [outputs, outputs], likewise: of what an edge differs from the mean
    mean,  # [outputs], if MOMENTS
    grad_scale,  # [edges], written if there is a scale
    grad_coordinates,  # [edges, dims], written if any
    partial,  # [parts, parameters] in double, added to
    edges,
    each,  # edges of a program
    neighbours,
    MOMENTS: tl.constexpr,
    WIDTHS: tl.constexpr,
    PADDED: tl.constexpr,
    OFFSETS: tl.constexpr,
    LAYERS: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    dtype = net.dtype.element_ty
    DIMS: tl.constexpr = WIDTHS[0]
    OUTPUTS: tl.constexpr = WIDTHS[LAYERS]
    lane = tl.arange(0, PADDED[LAYERS])
    within = lane < OUTPUTS
    partial += tl.program_id(0).to(tl.int64) * OFFSETS[LAYERS]
    first = tl.program_id(0).to(tl.int64) * each
    if MOMENTS:
        middle = tl.load(mean + lane, mask=within, other=0.0)
        along = tl.load(grad_mean + lane, mask=within, other=0.0)
        matrix = tl.load(
            grad_product + lane[:, None] * OUTPUTS + lane[None, :],
            mask=within[:, None] & within[None, :],
            other=0.0,
        )
    for start in range(first, tl.minimum(first + each, edges), BLOCK_E):
        edge = start + tl.arange(0, BLOCK_E)
        inside = edge < edges
        row = tl.load(rows + edge, mask=inside, other=-1)
        there = row >= 0
        centre = edge // neighbours
        above = _outputs(
            xyz,
            centres,
            net,
            row,
            centre,
            there,
            LAYERS,
            WIDTHS,
            PADDED,
            OFFSETS,
            BLOCK_E,
        )
        if MOMENTS:
            g = tl.dot(above - middle[None, :], matrix, input_precision="ieee", out_dtype=dtype)
            g = tl.where(there[:, None], g + along[None, :], 0.0)
        else:
            g = tl.load(
                grad_weights + edge[:, None] * OUTPUTS + lane[None, :],
                mask=there[:, None] & within[None, :],
                other=0.0,
            )
            if scale is not None:
                tl.store(grad_scale + edge, tl.sum(g * above, axis=1), mask=inside)
                g *= tl.load(scale + edge, mask=there, other=0.0)[:, None]
        if LAYERS == 0 and grad_coordinates is not None:
            at = grad_coordinates + edge[:, None] * DIMS + lane[None, :]
            tl.store(at, g, mask=inside[:, None] & within[None, :])
        for i in tl.static_range(LAYERS - 1, -1, -1):
            out = tl.arange(0, PADDED[i + 1])
            live = out < WIDTHS[i + 1]
            bias = OFFSETS[i] + WIDTHS[i] * WIDTHS[i + 1]
            g = tl.where(above > 0, g, 0.0)
            _add(partial + bias + out, tl.sum(g, axis=0), live)
            if i > 0:
                above = _outputs(
                    xyz,
                    centres,
                    net,
                    row,
                    centre,
                    there,
                    i,
                    WIDTHS,
                    PADDED,
                    OFFSETS,
                    BLOCK_E,
                )
                into = tl.arange(0, PADDED[i])
                at = OFFSETS[i] + out[:, None] * WIDTHS[i] + into[None, :]
                inner = live[:, None] & (into < WIDTHS[i])[None, :]
                by_edges = tl.dot(tl.trans(g), above, input_precision="ieee", out_dtype=dtype)
                _add(partial + at, by_edges, inner)
                weight = tl.load(net + at, mask=inner, other=0.0)
                g = tl.dot(g, weight, input_precision="ieee", out_dtype=dtype)
            else:
                for d in range(DIMS):
                    x = _coordinate(xyz, centres, row, centre, there, d, DIMS)
                    column_at = out * DIMS + d
                    _add(partial + column_at, tl.sum(g * x[:, None], axis=0), live)
                    if grad_coordinates is not None:
                        column = tl.load(net + column_at, mask=live, other=0.0)
                        by_d = tl.sum(g * column[None, :], axis=1)
                        tl.store(grad_coordinates + edge * DIMS + d, by_d, mask=inside)
        # Another thread may be the next to add to what this one wrote.
        tl.debug_barrier()


@triton.jit(do_not_specialize=["edges", "each"])
def _moments_kernel(
    xyz,  # [points, dims]
    centres,  # [centres, dims]
    rows,  # [edges]; negative for none
    net,
    mean,  # [outputs] in double, if products are to be summed
    sums,  # [parts, outputs] in double, or products [parts, outputs, outputs], written
    edges,
    each,  # edges of a program
    neighbours,
    WIDTHS: tl.constexpr,
    PADDED: tl.constexpr,
    OFFSETS: tl.constexpr,
    LAYERS: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    OUTPUTS: tl.constexpr = WIDTHS[LAYERS]
    BLOCK_M: tl.constexpr = PADDED[LAYERS]
    part = tl.program_id(0).to(tl.int64)
    first = part * each
    lane = tl.arange(0, BLOCK_M)
    within = lane < OUTPUTS
    if mean is not None:
        middle = tl.load(mean + lane, mask=within, other=0.0)
        total = tl.zeros((BLOCK_M, BLOCK_M), tl.float64)
    else:
        total = tl.zeros((BLOCK_M,), tl.float64)
    for start in range(first, tl.minimum(first + each, edges), BLOCK_E):
        edge = start + tl.arange(0, BLOCK_E)
        row = tl.load(rows + edge, mask=edge < edges, other=-1)
        there = row >= 0
        h = _outputs(
            xyz,
            centres,
            net,
            row,
            edge // neighbours,
            there,
            LAYERS,
            WIDTHS,
            PADDED,
            OFFSETS,
            BLOCK_E,
        ).to(tl.float64)
        if mean is not None:
            h = tl.where(there[:, None], h - middle[None, :], 0.0)
            total = tl.dot(tl.trans(h), h, total, input_precision="ieee", out_dtype=tl.float64)
        else:
            total += tl.sum(tl.where(there[:, None], h, 0.0), axis=0)
    if mean is not None:
        at = sums + (part * OUTPUTS + lane[:, None]) * OUTPUTS + lane[None, :]
        tl.store(at, total, mask=within[:, None] & within[None, :])
    else:
        tl.store(sums + part * OUTPUTS + lane, total, mask=within)


class Launch(NamedTuple):
    constants: dict[str, Any]
    options: dict[str, Any]


def _padded(width: int) -> int:
    return max(SMALLEST, triton.next_power_of_2(width))


def _warps(widest: int) -> int:
    return 8 if widest > 32 else 4


def _products(
    machine: int,
    features: torch.dtype,
    operand: torch.dtype,
    grouped: bool,
    sides: tuple[int, int, int],
) -> Launch:
    """Of the kernels that multiply, as `operand`, features by what their edges have: neighbours,
    channels and outputs."""
    single = torch.float64 if operand == torch.float64 else torch.float32
    if machine == INTERPRETER:
        largest = (64, 128)
    else:
        largest = (32, 128) if operand.itemsize == 2 else (16, 64)
    # The interpreter multiplies the bits of bfloat16.
    widens = machine == INTERPRETER and operand == torch.bfloat16
    constants = {
        "GROUPED": grouped,
        "OPERAND": tl.float32 if widens else TRITON_TYPES[operand],
        # Gradients of float16 are float32: tf32 has the digits of the one, the range of the other.
        "PRECISION": "ieee" if operand == features else "tf32",
        "SUM": TRITON_TYPES[single],
        "BLOCK_K": min(largest[0], _padded(sides[0])),
        "BLOCK_C": min(largest[1], _padded(sides[1])),
        "BLOCK_M": _padded(sides[2]),
    }
    return Launch(constants, {"num_warps": _warps(constants["BLOCK_M"]), **FUSED})


def _network(machine: int, dims: int, widths: list[int]) -> Launch:
    """Widths from the coordinates up, as padded, and where each layer's parameters begin."""
    all_widths = (dims, *widths)
    padded = tuple(_padded(width) for width in all_widths)
    offsets = [0]
    for below, width in zip(all_widths[:-1], widths, strict=True):
        offsets.append(offsets[-1] + (below + 1) * width)
    widest = max(padded[1:] or padded)
    edges = 512 if machine == INTERPRETER else 32 if widest <= 32 else 16
    constants = {
        "WIDTHS": all_widths,
        "PADDED": padded,
        "OFFSETS": tuple(offsets),
        "LAYERS": len(widths),
        "BLOCK_E": edges,
    }
    return Launch(constants, {"num_warps": _warps(widest), **FUSED})


class _Edges:
    """All edges, and the network whose inputs they are."""

    def __init__(self, xyz, centres, neighbours, net, widths) -> None:
        clouds, self.points, self.dims = xyz.shape
        self.cloud_centres, self.k = neighbours.shape[1:]
        self.machine = known(generation(xyz))
        self.centres = clouds * self.cloud_centres
        self.outputs = widths[-1] if widths else self.dims
        self.xyz = xyz.contiguous().flatten(0, 1)
        self.middle = centres.contiguous().flatten(0, 1)
        self.rows = edge_rows(neighbours, self.points).view(self.centres, self.k)
        self.net = net.contiguous()
        self.network = _network(self.machine, self.dims, widths)

    def parts(self, edges: int, most: int) -> tuple[int, int]:
        """Among how many programs edges are split, in whole tiles, and how many each has."""
        block = self.network.constants["BLOCK_E"]
        each = triton.cdiv(triton.cdiv(edges, block), most) * block
        return triton.cdiv(edges, each), each

    def chunks(self, size: int) -> Iterator[slice]:
        """Slices of the centres, of each of which so many bytes are held."""
        step = max(1, CHUNK_BYTES[self.machine] // max(size, 1))
        for first in range(0, self.centres, step):
            yield slice(first, min(first + step, self.centres))

    def weights(self, chunk: slice, scale, dtype: torch.dtype) -> torch.Tensor:
        """Of a chunk's edges, times their scale: [centres, neighbours, outputs]."""
        rows = self.rows[chunk]
        weights = torch.empty(*rows.shape, self.outputs, dtype=dtype, device=rows.device)
        if weights.numel():
            with on_device_of(weights):
                _weights_kernel[(triton.cdiv(rows.numel(), self.network.constants["BLOCK_E"]),)](
                    self.xyz,
                    self.middle[chunk],
                    rows,
                    None if scale is None else scale[chunk],
                    self.net,
                    weights,
                    rows.numel(),
                    self.k,
                    **self.network.constants,
                    **self.network.options,
                )
        return weights

    def aggregate(self, chunk: slice, features, grouped: bool, weights, out) -> None:
        """Into ``out [centres, channels, outputs]``."""
        count, channels = len(weights), features.shape[-1]
        if out.numel() == 0:
            return
        sides = (self.k, channels, self.outputs)
        launch = _products(self.machine, features.dtype, features.dtype, grouped, sides)
        with on_device_of(out):
            _aggregate_kernel[(count, triton.cdiv(channels, launch.constants["BLOCK_C"]))](
                features[chunk] if grouped else features,
                self.rows[chunk],
                weights,
                out,
                self.k,
                channels,
                self.outputs,
                **launch.constants,
                **launch.options,
            )

    def edge_gradient(
        self, chunk: slice, grad, features, grouped: bool, weights, grad_features
    ) -> torch.Tensor:
        """Gradients of the weights of a chunk's edges; into ``grad_features`` those of theirs."""
        channels = features.shape[-1]
        grad_weights = torch.empty_like(weights, dtype=compute_dtype(features))
        if grad_weights.numel() == 0:
            return grad_weights
        sides = (self.k, channels, self.outputs)
        operand = gradient_dtype(features.dtype)
        launch = _products(self.machine, features.dtype, operand, grouped, sides)
        with on_device_of(grad):
            _edge_gradient_kernel[(len(weights), triton.cdiv(self.k, launch.constants["BLOCK_K"]))](
                grad,
                features[chunk] if grouped else features,
                self.rows[chunk],
                weights,
                grad_weights,
                grad_features,
                self.k,
                channels,
                self.outputs,
                **launch.constants,
                **launch.options,
            )
        return grad_weights

    def net_partial(self) -> torch.Tensor:
        """Where the programs of ``net_gradient`` add up their parts."""
        parameters = self.network.constants["OFFSETS"][-1]
        fitting = PARTS_BYTES[self.machine] // (8 * max(parameters, 1))
        parts = max(1, min(PARTS[self.machine], fitting))
        return torch.zeros(parts, parameters, dtype=torch.float64, device=self.net.device)

    def net_gradient(
        self,
        chunk: slice,
        partial: torch.Tensor,
        wants_coordinates: bool,
        *,
        grad_weights=None,
        scale=None,
        grad_scale=None,
        grad_mean=None,
        grad_product=None,
        mean=None,
    ) -> torch.Tensor | None:
        """Add a chunk's parts to ``partial``; its edges' coordinates' gradients, if wanted."""
        rows = self.rows[chunk]
        edges = rows.numel()
        coordinates = None
        if wants_coordinates:
            coordinates = self.xyz.new_empty(*rows.shape, self.dims)
        if edges == 0:
            return coordinates
        parts, each = self.parts(edges, len(partial))
        with on_device_of(rows):
            _net_gradient_kernel[(parts,)](
                self.xyz,
                self.middle[chunk],
                rows,
                None if scale is None else scale[chunk],
                self.net,
                grad_weights,
                grad_mean,
                grad_product,
                mean,
                None if scale is None else grad_scale[chunk],
                coordinates,
                partial,
                edges,
                each,
                self.k,
                MOMENTS=grad_weights is None,
                **self.network.constants,
                **self.network.options,
            )
        return coordinates

    def moments(self, mean: torch.Tensor | None) -> torch.Tensor:
        """Sums over all edges of the outputs, or of the products of their distances from the
        mean."""
        shape = (self.outputs,) if mean is None else (self.outputs, self.outputs)
        edges = self.rows.numel()
        if edges == 0:
            return self.net.new_zeros(shape, dtype=torch.float64)
        parts, each = self.parts(edges, MOMENT_PARTS[self.machine])
        sums = torch.empty(parts, *shape, dtype=torch.float64, device=self.net.device)
        with on_device_of(sums):
            _moments_kernel[(parts,)](
                self.xyz,
                self.middle,
                self.rows,
                self.net,
                mean,
                sums,
                edges,
                each,
                self.k,
                **self.network.constants,
                **self.network.options,
            )
        return sums.sum(0)

    def count(self) -> torch.Tensor:
        """Of edges, at least 1."""
        return (self.rows >= 0).sum().clamp(min=1)

    def coordinate_gradients(self, wanted: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Zeros of the coordinates of the points and of the centres, or nothing."""
        if not wanted:
            return self.xyz.new_empty(0), self.xyz.new_empty(0)
        return torch.zeros_like(self.xyz), torch.zeros_like(self.middle)

    def inverse(self, chunk: slice) -> tuple[slice, tuple[torch.Tensor, torch.Tensor]]:
        """The points of the clouds that a chunk is of, and the inverse list of its edges."""
        first = chunk.start // self.cloud_centres * self.points
        last = ((chunk.stop - 1) // self.cloud_centres + 1) * self.points
        return slice(first, last), inverse_list(self.rows[chunk], first, last)


def pointconv(
    xyz: torch.Tensor,
    features: torch.Tensor,
    centres: torch.Tensor,
    neighbours: torch.Tensor,
    scale: torch.Tensor,
    net: torch.Tensor,
    widths: list[int],
    linear: torch.Tensor,
    bias: torch.Tensor,
) -> torch.Tensor:
    """Without a last layer, the sums over the neighbours themselves."""
    if len(widths) > UNROLLED_LAYERS:
        return reference.pointconv_edges(
            xyz, features, centres, neighbours, scale, net, widths, linear, bias
        )
    edges = _Edges(xyz, centres, neighbours, net, widths)
    grouped, features, scale = _flattened(features, scale)
    channels = features.shape[-1]
    layer = linear.dim() == 2
    inner = channels * edges.outputs
    out = features.new_empty(*neighbours.shape[:2], len(linear) if layer else inner)
    flat = out.view(edges.centres, out.shape[2])
    for chunk in edges.chunks(features.itemsize * edges.outputs * (channels + edges.k)):
        weights = edges.weights(chunk, scale, features.dtype)
        sums = features.new_empty(len(weights), inner) if layer else flat[chunk]
        edges.aggregate(chunk, features, grouped, weights, sums)
        if layer:
            sums = product(sums, linear.t())
            flat[chunk] = sums + bias if bias.numel() else sums
        elif bias.numel():
            flat[chunk] += bias
    return out


def pointconv_backward(
    grad: torch.Tensor,
    xyz: torch.Tensor,
    features: torch.Tensor,
    centres: torch.Tensor,
    neighbours: torch.Tensor,
    scale: torch.Tensor,
    net: torch.Tensor,
    widths: list[int],
    linear: torch.Tensor,
    bias: torch.Tensor,
    wants_coordinates: bool,
) -> tuple[torch.Tensor, ...]:
    """Gradients to xyz, features, centres, scale, net, linear and bias."""
    if len(widths) > UNROLLED_LAYERS:
        return reference.pointconv_backward(
            grad,
            xyz,
            features,
            centres,
            neighbours,
            scale,
            net,
            widths,
            linear,
            bias,
            wants_coordinates,
        )
    edges = _Edges(xyz, centres, neighbours, net, widths)
    shape, dtype, compute = features.shape, features.dtype, compute_dtype(features)
    grouped, features, scale = _flattened(features, scale)
    channels, outputs, k = shape[-1], edges.outputs, edges.k
    inner = channels * outputs
    layer = linear.dim() == 2
    flat = grad.contiguous().view(edges.centres, grad.shape[2])
    held = gradient_dtype(dtype)
    grad_features = torch.zeros_like(features, dtype=dtype if grouped else compute)
    grad_scale = None if scale is None else torch.zeros_like(scale)
    grad_linear = torch.zeros_like(linear, dtype=compute)
    partial = edges.net_partial()
    grad_xyz, grad_centres = edges.coordinate_gradients(wants_coordinates)
    each = (inner + k * outputs) * (dtype.itemsize + compute.itemsize)
    for chunk in edges.chunks(each + k * channels * held.itemsize):
        weights = edges.weights(chunk, scale, dtype)
        toward = flat[chunk]
        if layer:
            sums = features.new_empty(len(weights), inner)
            edges.aggregate(chunk, features, grouped, weights, sums)
            grad_linear += product(toward.t(), sums)
            del sums
            toward = toward @ linear if held == dtype else product(toward, linear)
        by_edge = grad_features[chunk]
        if not grouped:
            by_edge = torch.empty(len(weights) * k, channels, dtype=held, device=grad.device)
        grad_weights = edges.edge_gradient(chunk, toward, features, grouped, weights, by_edge)
        coordinates = edges.net_gradient(
            chunk,
            partial,
            wants_coordinates,
            grad_weights=grad_weights,
            scale=scale,
            grad_scale=grad_scale,
        )
        if not grouped or wants_coordinates:
            points, inverse = edges.inverse(chunk)
        if not grouped:
            add_by_row(grad_features[points], by_edge, inverse)
        if coordinates is not None:
            add_by_row(grad_xyz[points], coordinates.flatten(0, 1), inverse)
            grad_centres[chunk] = -coordinates.sum(1)
    return (
        grad_xyz.view(xyz.shape if wants_coordinates else 0),
        grad_features.view(shape).to(dtype),
        grad_centres.view(centres.shape if wants_coordinates else 0),
        net.new_empty(0) if grad_scale is None else grad_scale.view(neighbours.shape),
        partial.sum(0).to(net.dtype),
        grad_linear.to(linear.dtype),
        flat.sum(0, dtype=compute).to(bias.dtype) if bias.numel() else torch.empty_like(bias),
    )


def _flattened(features, scale):
    """Whether features are of edges, and they and the scales by row or by centre."""
    grouped = features.dim() == 4
    by_centre = scale.contiguous().flatten(0, 1) if scale.dim() == 3 else None
    return grouped, features.contiguous().flatten(0, 1), by_centre


def pointconv_moments(
    xyz: torch.Tensor,
    centres: torch.Tensor,
    neighbours: torch.Tensor,
    net: torch.Tensor,
    widths: list[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and covariance of the network's outputs over all edges."""
    if len(widths) > UNROLLED_LAYERS:
        return reference.pointconv_moments_edges(xyz, centres, neighbours, net, widths)
    edges = _Edges(xyz, centres, neighbours, net, widths)
    count = edges.count()
    mean = edges.moments(None) / count
    covariance = edges.moments(mean) / count
    return mean.to(xyz.dtype), covariance.to(xyz.dtype)


def pointconv_moments_backward(
    grad_mean: torch.Tensor,
    grad_covariance: torch.Tensor,
    mean: torch.Tensor,
    xyz: torch.Tensor,
    centres: torch.Tensor,
    neighbours: torch.Tensor,
    net: torch.Tensor,
    widths: list[int],
    wants_coordinates: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients to xyz, centres and net."""
    if len(widths) > UNROLLED_LAYERS:
        return reference.pointconv_moments_backward(
            grad_mean,
            grad_covariance,
            mean,
            xyz,
            centres,
            neighbours,
            net,
            widths,
            wants_coordinates,
        )
    edges = _Edges(xyz, centres, neighbours, net, widths)
    count = edges.count()
    partial = edges.net_partial()
    grad_xyz, grad_centres = edges.coordinate_gradients(wants_coordinates)
    moments = {
        "grad_mean": grad_mean / count,
        "grad_product": (grad_covariance + grad_covariance.t()) / count,
        "mean": mean.contiguous(),
    }
    for chunk in edges.chunks(edges.k * edges.dims * xyz.itemsize):
        coordinates = edges.net_gradient(chunk, partial, wants_coordinates, **moments)
        if coordinates is not None:
            points, inverse = edges.inverse(chunk)
            add_by_row(grad_xyz[points], coordinates.flatten(0, 1), inverse)
            grad_centres[chunk] = -coordinates.sum(1)
    return (
        grad_xyz.view(xyz.shape if wants_coordinates else 0),
        grad_centres.view(centres.shape if wants_coordinates else 0),
        partial.sum(0).to(net.dtype),
    )


def compile_cases(generation: int) -> list[CompileCase]:
    machine = known(generation)
    cases = []

    def add(
        name: str,
        kernel: Any,
        types: dict[str, str],
        constants: dict[str, Any],
        options: dict[str, Any] = FUSED,
        **checks: Any,
    ) -> None:
        cases.append(CompileCase(name, kernel, types, constants, options, fused=True, **checks))

    for dtype in (torch.float32, torch.float64):
        type_ = f"*{short_name(dtype)}"
        places = {
            **dict.fromkeys(("xyz", "centres", "net"), type_),
            "rows": "*i64",
            **dict.fromkeys(("edges", "neighbours"), "i32"),
        }
        parts = {"partial": "*fp64", "grad_coordinates": type_, "each": "i32"}
        scaled = dict.fromkeys(("scale", "grad_scale", "grad_weights"), type_)
        moments = dict.fromkeys(("grad_mean", "grad_product", "mean"), type_)
        for widths in ([8, 8, 16], [64, 64, 64], []):
            network = _network(machine, 3, widths)
            variants: tuple[tuple[str, Any, dict[str, str], dict[str, Any]], ...] = (
                ("weights", _weights_kernel, {"scale": type_, "weights": type_}, {}),
                ("net-gradient", _net_gradient_kernel, {**parts, **scaled}, {"MOMENTS": False}),
                ("moments-gradient", _net_gradient_kernel, {**parts, **moments}, {"MOMENTS": True}),
                ("mean", _moments_kernel, {"sums": "*fp64", "each": "i32"}, {}),
                (
                    "covariance",
                    _moments_kernel,
                    {"mean": "*fp64", "sums": "*fp64", "each": "i32"},
                    {},
                ),
            )
            for name, kernel, types, constants in variants:
                add(
                    "-".join(map(str, (name, *widths, type_[1:]))),
                    kernel,
                    {**places, **types},
                    {**network.constants, **constants},
                    network.options,
                )
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        type_, held = short_name(dtype), gradient_dtype(dtype)
        computed = short_name(torch.float64 if dtype == torch.float64 else torch.float32)
        reads = {
            **dict.fromkeys(("features", "weights"), f"*{type_}"),
            "rows": "*i64",
            **dict.fromkeys(("neighbours", "channels", "outputs"), "i32"),
        }
        for outputs, grouped in itertools.product((16, 64), (False, True)):
            by_edge = f"*{type_ if grouped else short_name(held)}"
            gradients = {
                "grad": f"*{short_name(held)}",
                "grad_weights": f"*{computed}",
                "grad_features": by_edge,
            }
            for kind, kernel, operand, types in (
                ("aggregate", _aggregate_kernel, dtype, {"out": f"*{type_}"}),
                ("edge-gradient", _edge_gradient_kernel, held, gradients),
            ):
                launch = _products(machine, dtype, operand, grouped, (32, 128, outputs))
                add(
                    f"{kind}-{outputs}{'-grouped' if grouped else ''}-{type_}",
                    kernel,
                    {**reads, **types},
                    launch.constants,
                    launch.options,
                    multiples=("channels", "outputs"),
                    vector_loads=True,
                    instructions=("mma",) if dtype.itemsize == 2 else (),
                )
    return cases
