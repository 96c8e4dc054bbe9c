"""How much boxes overlap, pair by pair or each with each, and the gradients.

Each with each, a program has a tile of pairs. Their gradients are summed by programs that have a
block of the boxes they belong to and go through a chunk of the others; torch adds up the chunks.
A box is a tuple of its coordinates (x1, y1, x2, y2), blocks of one shape or that broadcast.
"""

import math

import torch
import triton
import triton.language as tl

from fastzoo.reference.precision import compute_dtype

from .runtime import EXACT, CompileCase, on_device_of

# Pairs in a program: of boxes by boxes, of boxes by boxes backward, where registers are what limits
# how many programs run at a time, and of pairs in a row.
TILE = (16, 64)
BACKWARD_TILES = {torch.float32: (8, 32), torch.float64: (8, 16)}
ROW = 256
NUM_WARPS = 4

# Others that a program of the backward pass goes through; a sum in memory for each such chunk.
CHUNK = 1024

# pi / 4, the first part exact in float32
QUARTER_PI = tl.constexpr(0.7853981852531433)
QUARTER_PI_REST = tl.constexpr(-2.1855695000931213e-08)
ASPECT_SCALE = tl.constexpr(4 / math.pi**2)


@triton.jit
def divide(a, b):
    """a / b, rounded once."""
    if a.dtype == tl.float64:
        quotient = a / b
    else:
        quotient = tl.div_rn(a, b)
    return quotient


@triton.jit
def _arctangent(x):
    """Within 2 ulp; triton's own is not in its interpreter."""
    size = tl.abs(x)
    steep = size > 2.414213562373095  # tan(3 pi / 8)
    middle = size > 0.4142135623730950  # tan(pi / 8)
    # atan(x) = k pi / 4 + atan(r), k = 0, 1, 2
    r = divide(
        tl.where(steep, -1.0, tl.where(middle, size - 1, size)),
        tl.where(steep, size, tl.where(middle, size + 1, 1.0)),
    )
    square = r * r
    # (atan(r) / r - 1) / square, of least greatest error where |r| <= tan(pi / 8): 3e-17.
    series = -0.01917392228554793 * square + 0.03922923713835943
    series = series * square - 0.05085365922344248
    series = series * square + 0.05858132894427922
    series = series * square - 0.06664509603255386
    series = series * square + 0.07692183059894114
    series = series * square - 0.09090904572487347
    series = series * square + 0.11111111015117626
    series = series * square - 0.1428571428466482
    series = series * square + 0.19999999999995513
    series = series * square - 0.3333333333333333
    k = steep.to(r.dtype) + middle.to(r.dtype)
    angle = k * QUARTER_PI + (k * QUARTER_PI_REST + (r + r * (square * series)))
    return tl.where(x < 0, -angle, angle)


@triton.jit
def _sides(box):
    return box[2] - box[0], box[3] - box[1]


@triton.jit
def _shared_sides(a, b):
    """Sides of the intersection, negative where the boxes are apart.

    How maximum and minimum treat NaN is of no account: a NaN coordinate makes the area NaN.
    """
    width = tl.minimum(a[2], b[2]) - tl.maximum(a[0], b[0])
    height = tl.minimum(a[3], b[3]) - tl.maximum(a[1], b[1])
    return width, height


@triton.jit
def intersection_and_union(a, b):
    """Areas, as csrc/math/boxes.h has them, operation for operation."""
    width, height = _shared_sides(a, b)
    intersection = tl.maximum(width, 0.0) * tl.maximum(height, 0.0)
    area_a = (a[2] - a[0]) * (a[3] - a[1])
    area_b = (b[2] - b[0]) * (b[3] - b[1])
    return intersection, area_a + area_b - intersection


@triton.jit
def _hull(a, b):
    """Sides of the box around both."""
    width = tl.maximum(a[2], b[2]) - tl.minimum(a[0], b[0])
    height = tl.maximum(a[3], b[3]) - tl.minimum(a[1], b[1])
    return width, height


@triton.jit
def _between_centres(a, b):
    dx = (a[0] + a[2]) * 0.5 - (b[0] + b[2]) * 0.5
    dy = (a[1] + a[3]) * 0.5 - (b[1] + b[3]) * 0.5
    return dx, dy


@triton.jit
def _aspects_apart(a, b, iou, EPS: tl.constexpr):
    """The difference of the angles of the diagonals, v of it, and alpha."""
    a_width, a_height = _sides(a)
    b_width, b_height = _sides(b)
    difference = _arctangent(divide(b_width, b_height)) - _arctangent(divide(a_width, a_height))
    v = difference * difference * ASPECT_SCALE
    return difference, v, divide(v, 1 - iou + v + EPS)


@triton.jit
def _measure(a, b, MEASURE: tl.constexpr, UNION_EPS: tl.constexpr, EPS: tl.constexpr):
    intersection, union = intersection_and_union(a, b)
    iou = divide(intersection, union + UNION_EPS)
    overlap = iou
    if MEASURE == "giou":
        width, height = _hull(a, b)
        hull = width * height
        overlap = iou - divide(hull - union, hull + EPS)
    elif MEASURE != "iou":
        width, height = _hull(a, b)
        dx, dy = _between_centres(a, b)
        overlap = iou - divide(dx * dx + dy * dy, width * width + height * height + EPS)
    if MEASURE == "ciou":
        _, v, alpha = _aspects_apart(a, b, iou, EPS)
        overlap -= alpha * v
    return overlap


@triton.jit
def _share(larger, smaller):
    """What a maximum of the two gives to the first: all, or half where they are equal."""
    return tl.where(larger > smaller, 1.0, tl.where(larger == smaller, 0.5, 0.0))


@triton.jit
def _by_edges(
    low, high, other_low, other_high, across, own_across, by_shared, by_union, by_hull, by_centre
):
    """Derivatives by an axis' two edges of a box, given those by the areas that they bound.

    across, own_across: sides of the intersection and of the box along the other axis.
    """
    apart = tl.minimum(high, other_high) < tl.maximum(low, other_low)
    by_shared = tl.where(apart, 0.0, by_shared * tl.maximum(across, 0.0))
    by_side = by_union * own_across
    by_low = by_centre - by_shared * _share(low, other_low) - by_side
    by_high = by_centre + by_shared * _share(other_high, high) + by_side
    by_low -= by_hull * _share(other_low, low)
    by_high += by_hull * _share(high, other_high)
    return by_low, by_high


@triton.jit
def _gradient(grad, own, other, MEASURE: tl.constexpr, UNION_EPS: tl.constexpr, EPS: tl.constexpr):
    """grad times the derivatives of the measure by the coordinates of the first box.

    The measures are symmetric: those by the second are got with the boxes changed about.
    """
    width, height = _sides(own)
    shared_width, shared_height = _shared_sides(own, other)
    intersection, union = intersection_and_union(own, other)
    iou = divide(intersection, union + UNION_EPS)
    by_intersection = divide(grad, union + UNION_EPS)
    by_union = -grad * divide(iou, union + UNION_EPS)
    if MEASURE == "giou":
        hull_width, hull_height = _hull(own, other)
        hull = hull_width * hull_height + EPS
        by_union += divide(grad, hull)
        by_hull = -grad * divide(union + EPS, hull * hull)
        by_hull_width, by_hull_height = by_hull * hull_height, by_hull * hull_width
        by_x, by_y = 0.0, 0.0
    elif MEASURE != "iou":
        hull_width, hull_height = _hull(own, other)
        dx, dy = _between_centres(own, other)
        diagonal = hull_width * hull_width + hull_height * hull_height + EPS
        by_hull = 2 * grad * divide(dx * dx + dy * dy, diagonal * diagonal)
        by_hull_width, by_hull_height = by_hull * hull_width, by_hull * hull_height
        by_x, by_y = -grad * divide(dx, diagonal), -grad * divide(dy, diagonal)
    else:
        by_hull_width, by_hull_height, by_x, by_y = 0.0, 0.0, 0.0, 0.0
    by_intersection -= by_union
    x1, x2 = _by_edges(
        own[0], own[2], other[0], other[2],
        shared_height, height, by_intersection, by_union, by_hull_width, by_x,
    )  # fmt: skip
    y1, y2 = _by_edges(
        own[1], own[3], other[1], other[3],
        shared_width, width, by_intersection, by_union, by_hull_height, by_y,
    )  # fmt: skip
    if MEASURE == "ciou":
        difference, _, alpha = _aspects_apart(own, other, iou, EPS)
        by_aspect = 2 * grad * alpha * difference * ASPECT_SCALE
        turn = divide(by_aspect, width * width + height * height)
        x1 -= turn * height
        x2 += turn * height
        y1 += turn * width
        y2 -= turn * width
    return x1, y1, x2, y2


@triton.jit
def _load_box(boxes, index, inside, DTYPE: tl.constexpr):
    at = boxes + 4 * index
    x1 = tl.load(at, mask=inside, other=0.0).to(DTYPE)
    y1 = tl.load(at + 1, mask=inside, other=0.0).to(DTYPE)
    x2 = tl.load(at + 2, mask=inside, other=0.0).to(DTYPE)
    y2 = tl.load(at + 3, mask=inside, other=0.0).to(DTYPE)
    return x1, y1, x2, y2


@triton.jit
def _store_box(boxes, index, inside, box):
    at = boxes + 4 * index
    tl.store(at, box[0], mask=inside)
    tl.store(at + 1, box[1], mask=inside)
    tl.store(at + 2, box[2], mask=inside)
    tl.store(at + 3, box[3], mask=inside)


@triton.jit
def _down(box):
    return box[0][:, None], box[1][:, None], box[2][:, None], box[3][:, None]


@triton.jit
def _across(box):
    return box[0][None, :], box[1][None, :], box[2][None, :], box[3][None, :]


@triton.jit(do_not_specialize=["n"])
def _overlap_kernel(
    boxes1,  # [n, 4]
    boxes2,  # [m, 4]
    overlaps,  # [n, m], written
    n,
    m,
    MEASURE: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    dtype = overlaps.dtype.element_ty
    tiles = tl.cdiv(m, BLOCK_M)
    i = (tl.program_id(0) // tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    j = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    a = _down(_load_box(boxes1, i, i < n, dtype))
    b = _across(_load_box(boxes2, j, j < m, dtype))
    overlap = _measure(a, b, MEASURE, 0.0, EPS)
    inside = (i < n)[:, None] & (j < m)[None, :]
    tl.store(overlaps + i[:, None] * m + j[None, :], overlap, mask=inside)


@triton.jit(do_not_specialize=["n"])
def _pairs_kernel(
    boxes1,  # [n, 4]
    boxes2,  # [n, 4]
    overlaps,  # [n], written
    n,
    MEASURE: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    dtype = overlaps.dtype.element_ty
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    a = _load_box(boxes1, i, i < n, dtype)
    b = _load_box(boxes2, i, i < n, dtype)
    tl.store(overlaps + i, _measure(a, b, MEASURE, EPS, EPS), mask=i < n)


@triton.jit(do_not_specialize=["n", "m"])
def _overlap_backward_kernel(
    grad,  # [n, m], of any strides
    boxes,  # [n, 4], whose gradients these are
    others,  # [m, 4]
    gradients,  # [chunks, n, 4], written
    n,
    m,
    stride_n,
    stride_m,
    MEASURE: tl.constexpr,
    EPS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    dtype = gradients.dtype.element_ty
    rows = tl.cdiv(n, BLOCK_N)
    chunk = (tl.program_id(0) // rows).to(tl.int64)
    i = (tl.program_id(0) % rows).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    own = _down(_load_box(boxes, i, i < n, dtype))
    sum_x1 = tl.zeros((BLOCK_N, BLOCK_M), dtype)
    sum_y1 = tl.zeros((BLOCK_N, BLOCK_M), dtype)
    sum_x2 = tl.zeros((BLOCK_N, BLOCK_M), dtype)
    sum_y2 = tl.zeros((BLOCK_N, BLOCK_M), dtype)
    first = chunk * CHUNK
    for start in range(first, tl.minimum(first + CHUNK, m), BLOCK_M):
        j = start + tl.arange(0, BLOCK_M)
        other = _across(_load_box(others, j, j < m, dtype))
        inside = (i < n)[:, None] & (j < m)[None, :]
        at = grad + i[:, None] * stride_n + j[None, :] * stride_m
        g = tl.load(at, mask=inside, other=0.0)
        x1, y1, x2, y2 = _gradient(g, own, other, MEASURE, 0.0, EPS)
        sum_x1 += tl.where(inside, x1, 0.0)
        sum_y1 += tl.where(inside, y1, 0.0)
        sum_x2 += tl.where(inside, x2, 0.0)
        sum_y2 += tl.where(inside, y2, 0.0)
    sums = (
        tl.sum(sum_x1, axis=1),
        tl.sum(sum_y1, axis=1),
        tl.sum(sum_x2, axis=1),
        tl.sum(sum_y2, axis=1),
    )
    _store_box(gradients, chunk * n + i, i < n, sums)


@triton.jit(do_not_specialize=["n", "stride"])
def _pairs_backward_kernel(
    grad,  # [n]
    boxes1,  # [n, 4]
    boxes2,  # [n, 4]
    gradients1,  # [n, 4], written
    gradients2,  # [n, 4], written
    n,
    stride,  # of grad
    MEASURE: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    dtype = grad.dtype.element_ty
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    a = _load_box(boxes1, i, i < n, dtype)
    b = _load_box(boxes2, i, i < n, dtype)
    g = tl.load(grad + i * stride, mask=i < n, other=0.0)
    _store_box(gradients1, i, i < n, _gradient(g, a, b, MEASURE, EPS, EPS))
    _store_box(gradients2, i, i < n, _gradient(g, b, a, MEASURE, EPS, EPS))


def box_overlap(
    boxes1: torch.Tensor, boxes2: torch.Tensor, measure: str, pairwise: bool, eps: float
) -> torch.Tensor:
    n, m = len(boxes1), len(boxes2)
    boxes1, boxes2 = boxes1.contiguous(), boxes2.contiguous()
    shape = (n, m) if pairwise else (n,)
    overlaps = torch.empty(shape, dtype=compute_dtype(boxes1), device=boxes1.device)
    if overlaps.numel() == 0:
        return overlaps
    with on_device_of(boxes1):
        if pairwise:
            _overlap_kernel[(triton.cdiv(n, TILE[0]) * triton.cdiv(m, TILE[1]),)](
                boxes1,
                boxes2,
                overlaps,
                n,
                m,
                MEASURE=measure,
                EPS=eps,
                BLOCK_N=TILE[0],
                BLOCK_M=TILE[1],
                num_warps=NUM_WARPS,
                **EXACT,
            )
        else:
            _pairs_kernel[(triton.cdiv(n, ROW),)](
                boxes1,
                boxes2,
                overlaps,
                n,
                MEASURE=measure,
                EPS=eps,
                BLOCK=ROW,
                num_warps=NUM_WARPS,
                **EXACT,
            )
    return overlaps


def box_overlap_backward(
    grad: torch.Tensor,
    boxes1: torch.Tensor,
    boxes2: torch.Tensor,
    measure: str,
    pairwise: bool,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    boxes1, boxes2 = boxes1.contiguous(), boxes2.contiguous()
    grad = grad.to(compute_dtype(boxes1))
    if pairwise:
        return (
            _summed_gradient(grad, boxes1, boxes2, measure, eps),
            _summed_gradient(grad.t(), boxes2, boxes1, measure, eps),
        )
    gradients = torch.empty_like(boxes1), torch.empty_like(boxes2)
    n = len(boxes1)
    if n > 0:
        with on_device_of(boxes1):
            _pairs_backward_kernel[(triton.cdiv(n, ROW),)](
                grad,
                boxes1,
                boxes2,
                *gradients,
                n,
                grad.stride(0),
                MEASURE=measure,
                EPS=eps,
                BLOCK=ROW,
                num_warps=NUM_WARPS,
                **EXACT,
            )
    return gradients


def _summed_gradient(
    grad: torch.Tensor, boxes: torch.Tensor, others: torch.Tensor, measure: str, eps: float
) -> torch.Tensor:
    """Of ``boxes``, given that of the overlaps of each with each of ``others``."""
    n, m = grad.shape
    if n == 0 or m == 0:
        return torch.zeros_like(boxes)
    chunks = triton.cdiv(m, CHUNK)
    block_n, block_m = BACKWARD_TILES[grad.dtype]
    gradients = torch.empty(chunks, n, 4, dtype=grad.dtype, device=boxes.device)
    with on_device_of(boxes):
        _overlap_backward_kernel[(chunks * triton.cdiv(n, block_n),)](
            grad,
            boxes,
            others,
            gradients,
            n,
            m,
            *grad.stride(),
            MEASURE=measure,
            EPS=eps,
            CHUNK=CHUNK,
            BLOCK_N=block_n,
            BLOCK_M=block_m,
            num_warps=NUM_WARPS,
            **EXACT,
        )
    return gradients.sum(0).to(boxes.dtype)


def compile_cases(generation: int) -> list[CompileCase]:
    cases = []
    for type_ in ("fp32", "fp64", "bf16"):
        compute = "fp64" if type_ == "fp64" else "fp32"
        block_n, block_m = BACKWARD_TILES[getattr(torch, f"float{compute[2:]}")]
        backward_tile = {"BLOCK_N": block_n, "BLOCK_M": block_m}
        boxes = {"boxes1": f"*{type_}", "boxes2": f"*{type_}", "n": "i32"}
        for measure in ("iou", "giou", "diou", "ciou"):
            given = {"MEASURE": measure, "EPS": 1e-7}
            tile = {"BLOCK_N": TILE[0], "BLOCK_M": TILE[1]}
            overlaps = {"overlaps": f"*{compute}"}
            kinds = {
                "overlap": (_overlap_kernel, boxes | overlaps | {"m": "i32"}, tile),
                "pairs": (_pairs_kernel, boxes | overlaps, {"BLOCK": ROW}),
                "overlap-backward": (
                    _overlap_backward_kernel,
                    {
                        "grad": f"*{compute}",
                        "boxes": f"*{type_}",
                        "others": f"*{type_}",
                        "gradients": f"*{compute}",
                        "n": "i32",
                        "m": "i32",
                        "stride_n": "i32",
                    },
                    backward_tile | {"CHUNK": CHUNK, "stride_m": 1},
                ),
                "pairs-backward": (
                    _pairs_backward_kernel,
                    boxes
                    | {
                        "grad": f"*{compute}",
                        "gradients1": f"*{type_}",
                        "gradients2": f"*{type_}",
                        "stride": "i32",
                    },
                    {"BLOCK": ROW},
                ),
            }
            cases += [
                CompileCase(
                    name=f"{measure}-{kind}-{type_}",
                    kernel=kernel,
                    types=types,
                    constants=given | constants,
                    options={"num_warps": NUM_WARPS, **EXACT},
                    instructions=(f"div.rn.f{compute[2:]}",),
                )
                for kind, (kernel, types, constants) in kinds.items()
                if type_ != "bf16" or measure == "ciou"
            ]
    return cases
