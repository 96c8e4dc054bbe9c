"""Margin softmax: the log-sum-exp over all classes but the target, and its gradients.

rows      norms and the targets' scores, by torch: they are small
forward   a row's maximum and sum over the classes, which may be split among programs
gradient  V, the gradients of the dot products of a chunk of classes, from the scores made again;
          the two products with V are torch's
target    the margins' rules, elementwise
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastzoo.reference.margin_softmax import KEPT_BLOCK, inverse
from fastzoo.reference.precision import compute_dtype

from . import score_tiles
from .runtime import FUSED, CompileCase, generation, on_device_of
from .score_tiles import (
    LARGE,
    TALL,
    Tile,
    finite,
    gradient_dtype,
    known,
    log_sum,
    product_dtype,
    score_tile,
    tile_of,
)

# Of kernels without sub-centres, hard classes, sums or copies.
PLAIN_FORWARD = {8: LARGE, 9: LARGE, 10: TALL}
PLAIN_GRADIENT = dict.fromkeys((8, 9, 10), LARGE)

TARGET_BLOCK = 256

RULES = {
    "shift": 0,
    "arcface": 1,
    "easy": 2,
    "unguarded": 3,
    "clip": 4,
    "combined": 5,
    "psi": 6,
}
SHIFT = tl.constexpr(RULES["shift"])
ARCFACE = tl.constexpr(RULES["arcface"])
EASY = tl.constexpr(RULES["easy"])
CLIP = tl.constexpr(RULES["clip"])
COMBINED = tl.constexpr(RULES["combined"])
PSI = tl.constexpr(RULES["psi"])

# What the gradient kernel starts from.
PROBABILITIES, KEPT_COPY, SCORE_GRADIENTS = (tl.constexpr(i) for i in range(3))


@triton.jit
def _class_scores(
    x,
    first_row,
    inside,
    x_inverse,
    weight,
    first_class,
    exists,
    w_inverse,
    dims,
    K: tl.constexpr,
    SUM: tl.constexpr,
    PRODUCT: tl.constexpr,
    OPERAND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """u of a tile of rows and classes, and which sub-centre has it: the first of equal ones."""
    winner = tl.zeros((BLOCK_M, BLOCK_N), tl.int8)
    stride = K * dims
    x += first_row * dims
    weight += first_class * stride
    row = first_row + tl.arange(0, BLOCK_M)
    at = (first_class + tl.arange(0, BLOCK_N)) * K
    best = tl.full((BLOCK_M, BLOCK_N), float("-inf"), SUM)
    winner = tl.zeros((BLOCK_M, BLOCK_N), tl.int8)
    for j in tl.static_range(K):
        dots = score_tile(
            x,
            dims,
            inside,
            weight + j * dims,
            stride,
            exists,
            dims,
            SUM,
            PRODUCT,
            OPERAND,
            BLOCK_M,
            BLOCK_N,
            BLOCK_D,
        )
        u = dots * tl.load(w_inverse + at + j, mask=exists, other=0.0)[None, :]
        if j == 0:
            best = u
        else:
            better = u > best
            best = tl.where(better, u, best)
            winner = tl.where(better, j, winner).to(tl.int8)
    return best * tl.load(x_inverse + row, mask=inside, other=0.0)[:, None], winner


@triton.jit
def _negative(u, row, inside, threshold, hardness, interclass_filter, HARD: tl.constexpr):
    """What a score of another class becomes, and its derivative."""
    value = u
    slope = tl.full(u.shape, 1.0, u.dtype)
    if HARD:
        t = tl.load(hardness)
        hard = u > tl.load(threshold + row, mask=inside, other=0.0)[:, None]
        value = tl.where(hard, u * (t + u), value)
        slope = tl.where(hard, t + 2 * u, slope)
    filtered = (u > interclass_filter) & (interclass_filter > 0)
    return tl.where(filtered, 0.0, value), tl.where(filtered, 0.0, slope)


@triton.jit(do_not_specialize=["rows", "classes", "tiles"])
def _forward_kernel(
    x,  # [rows, dims]
    weight,  # [classes * K, dims]
    labels,  # [rows]
    x_inverse,  # [rows]
    w_inverse,  # [classes * K]
    scale,  # [rows]
    threshold,  # [rows], if HARD
    hardness,  # [1], if HARD
    class_weight,  # [classes], if WEIGHTED
    highest,  # [splits, rows], written
    sums,  # [splits, rows], written
    totals,  # [splits, rows], written if TOTAL
    kept,  # [classes, rows], written if KEEP
    kept_max,  # [blocks, rows], written if KEEP
    scores,  # [rows, classes], written if SCORES, nothing else then
    rows,
    classes,
    dims,
    tiles,  # of classes, a split
    interclass_filter,
    K: tl.constexpr,  # sub-centres
    HARD: tl.constexpr,
    WEIGHTED: tl.constexpr,
    TOTAL: tl.constexpr,
    KEEP: tl.constexpr,
    SCORES: tl.constexpr,
    PRODUCT: tl.constexpr,
    OPERAND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    dtype = scale.dtype.element_ty
    split = tl.program_id(1).to(tl.int64)
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_M
    row = first_row + tl.arange(0, BLOCK_M)
    inside = row < rows
    label = tl.load(labels + row, mask=inside, other=-1)
    s = tl.load(scale + row, mask=inside, other=0.0)[:, None]
    best = tl.full((BLOCK_M,), float("-inf"), dtype)
    total = tl.zeros((BLOCK_M,), dtype)
    score_sum = tl.zeros((BLOCK_M,), dtype)
    first = split * tiles * BLOCK_N
    last = tl.minimum(first + tiles * BLOCK_N, classes)
    for start in range(first, last, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N).to(tl.int64)
        exists = column < classes
        u, _ = _class_scores(
            x,
            first_row,
            inside,
            x_inverse,
            weight,
            start,
            exists,
            w_inverse,
            dims,
            K,
            dtype,
            PRODUCT,
            OPERAND,
            BLOCK_M,
            BLOCK_N,
            BLOCK_D,
        )
        own = tl.arange(0, BLOCK_N)[None, :] == (label - start).to(tl.int32)[:, None]
        value, _ = _negative(u, row, inside, threshold, hardness, interclass_filter, HARD)
        if SCORES:
            there = inside[:, None] & exists[None, :]
            z = s * tl.where(own, u, value)
            at = scores + first_row * classes + start
            at += tl.arange(0, BLOCK_M)[:, None] * classes + tl.arange(0, BLOCK_N)[None, :]
            tl.store(at, z, mask=there)
        else:
            z = s * value
            counts = exists[None, :] & ~own
            if TOTAL:
                if WEIGHTED:
                    part = z * tl.load(class_weight + column, mask=exists, other=0.0)[None, :]
                else:
                    part = z
                score_sum += tl.sum(tl.where(counts, part, 0.0), axis=1)
            z = tl.where(counts, z, float("-inf"))
            higher = tl.maximum(best, tl.max(z, axis=1))
            reference = finite(higher)
            exponentials = tl.exp(z - reference[:, None])
            total = total * tl.exp(best - reference) + tl.sum(exponentials, axis=1)
            best = higher
            if KEEP:
                at = kept + start * rows + first_row
                at += tl.arange(0, BLOCK_N)[None, :] * rows + tl.arange(0, BLOCK_M)[:, None]
                there = inside[:, None] & exists[None, :]
                tl.store(at, exponentials.to(tl.bfloat16), mask=there)
                for block in tl.static_range(BLOCK_N // 64):
                    if start + block * 64 < classes:
                        at_block = kept_max + (start // 64 + block) * rows + row
                        tl.store(at_block, reference, mask=inside)
    if not SCORES:
        out = split * rows + row
        tl.store(highest + out, best, mask=inside)
        tl.store(sums + out, total, mask=inside)
        if TOTAL:
            tl.store(totals + out, score_sum, mask=inside)


@triton.jit(do_not_specialize=["rows", "classes", "first", "last"])
def _gradient_kernel(
    x,  # [rows, dims]
    weight,  # [classes * K, dims]
    labels,  # [rows]
    target_row,  # [rows]: of weight, that has the target's score; -1 for none
    x_inverse,  # [rows]
    w_inverse,  # [classes * K]
    scale,  # [rows]
    threshold,  # [rows], if HARD
    hardness,  # [1], if HARD
    class_weight,  # [classes], if WEIGHTED
    grad_target,  # [rows]
    grad_lse,  # [rows], unless from SCORE_GRADIENTS
    grad_total,  # [rows], unless from SCORE_GRADIENTS
    lse,  # [rows], unless from SCORE_GRADIENTS
    kept,  # [classes, rows], from KEPT_COPY
    kept_max,  # [blocks, rows], from KEPT_COPY
    grad_scores,  # [rows, classes], from SCORE_GRADIENTS
    v,  # [rows, (last - first) * K in whole tiles], written
    scale_sums,  # [class tiles, rows], written if SCALE
    rows,
    classes,
    dims,
    first,  # class of v
    last,
    interclass_filter,
    K: tl.constexpr,  # sub-centres
    HARD: tl.constexpr,
    WEIGHTED: tl.constexpr,
    FROM: tl.constexpr,
    SCALE: tl.constexpr,
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
    label = tl.load(labels + row, mask=inside, other=-1)
    own = tl.arange(0, BLOCK_N)[None, :] == (label - start).to(tl.int32)[:, None]
    counts = exists[None, :] & ~own & inside[:, None]
    s = tl.load(scale + row, mask=inside, other=0.0)[:, None]
    x_inv = tl.load(x_inverse + row, mask=inside, other=0.0)[:, None]

    winner = tl.zeros((BLOCK_M, BLOCK_N), tl.int8)
    if FROM == KEPT_COPY:
        lanes = tl.arange(0, BLOCK_M)[:, None]
        at = kept + start * rows + first_row
        at += tl.arange(0, BLOCK_N)[None, :] * rows + lanes
        e = tl.load(at, mask=counts, other=0.0)
        at_block = kept_max + start // 64 * rows + first_row
        at_block += tl.arange(0, BLOCK_N)[None, :] // 64 * rows + lanes
        reference = tl.load(at_block, mask=counts, other=0.0)
        above = tl.load(lse + row, mask=inside, other=0.0)[:, None]
        p = e.to(dtype) * tl.exp(reference - finite(above))
        dz = tl.load(grad_lse + row, mask=inside, other=0.0)[:, None] * p
        slope = tl.full((BLOCK_M, BLOCK_N), 1.0, dtype)
        value = tl.zeros((BLOCK_M, BLOCK_N), dtype)
    else:
        u, winner = _class_scores(
            x,
            first_row,
            inside,
            x_inverse,
            weight,
            start,
            exists,
            w_inverse,
            dims,
            K,
            dtype,
            PRODUCT,
            OPERAND,
            BLOCK_M,
            BLOCK_N,
            BLOCK_D,
        )
        value, slope = _negative(u, row, inside, threshold, hardness, interclass_filter, HARD)
        if FROM == SCORE_GRADIENTS:
            at = grad_scores + first_row * classes + start
            at += tl.arange(0, BLOCK_M)[:, None] * classes + tl.arange(0, BLOCK_N)[None, :]
            dz = tl.load(at, mask=counts, other=0.0)
        else:
            by_lse = tl.load(grad_lse + row, mask=inside, other=0.0)[:, None]
            by_total = tl.load(grad_total + row, mask=inside, other=0.0)[:, None]
            above = finite(tl.load(lse + row, mask=inside, other=0.0))[:, None]
            # A row that passes nothing on passes nothing on, whatever it holds.
            p = tl.exp(tl.where(counts & (by_lse != 0), s * value - above, float("-inf")))
            dz = by_lse * p
            if WEIGHTED:
                dz += by_total * tl.load(class_weight + column, mask=exists, other=0.0)[None, :]
            else:
                dz += by_total
    dz = tl.where(counts, dz, 0.0)
    if SCALE:
        tl.store(scale_sums + tile * rows + row, tl.sum(dz * value, axis=1), mask=inside)

    du = dz * s * slope
    by_target = tl.load(grad_target + row, mask=inside, other=0.0)[:, None]
    target = (tl.load(target_row + row, mask=inside, other=-1) - start * K).to(tl.int32)[:, None]
    width = tl.cdiv(last - first, BLOCK_N) * BLOCK_N * K
    there = inside[:, None] & exists[None, :]
    place = tl.arange(0, BLOCK_N)[None, :] * K
    to = v + first_row * width + tile * BLOCK_N * K
    to += tl.arange(0, BLOCK_M)[:, None] * width + place
    for j in tl.static_range(K):
        w_inv = tl.load(w_inverse + column * K + j, mask=exists, other=0.0)[None, :]
        wins = du if K == 1 else tl.where(winner == j, du, 0.0)
        d = tl.where(place + j == target, by_target, wins) * x_inv * w_inv
        tl.store(to + j, d.to(v.dtype.element_ty), mask=there)


@triton.jit
def _angle(c, sine):
    """acos(c) in double, without a library: a polynomial that is good to 1e-4, and one step."""
    a = tl.abs(c)
    near = ((-0.0187293 * a + 0.0742610) * a - 0.2121144) * a + 1.5707288
    near = near * tl.sqrt(1 - a)
    near = tl.where(c < 0, 3.141592653589793 - near, near)
    off = tl.sin(near) * c - tl.cos(near) * sine  # sin(near - angle)
    square = off * off
    return near - off * (1 + square * (1.0 / 6 + square * (3.0 / 40)))


@triton.jit
def _alternating(k):
    """(-1)^k of a whole number."""
    return 1 - 2 * (k - 2 * tl.floor(k / 2))


@triton.jit
def _target_rule(cosine, m1, m2, RULE: tl.constexpr):
    """The value of a margin's rule, less m3, and its derivatives by cosine, m1 and m2."""
    zero = tl.zeros(cosine.shape, tl.float64)
    if RULE == SHIFT:
        return cosine, zero + 1, zero, zero
    c = tl.where(cosine > 1, zero + 1, tl.where(cosine < -1, zero - 1, cosine))
    square = (1 - c) * (1 + c)
    sine = tl.sqrt(tl.maximum(square, 0.0))
    floored = tl.maximum(sine, 0.000244140625)
    if RULE == PSI:
        a = m1 * _angle(c, sine)
        k = tl.minimum(tl.maximum(tl.floor(a / 3.141592653589793), 0.0), m1 - 1)
        sign = _alternating(k)
        value = (m2 * c + sign * tl.cos(a) - 2 * k) / (1 + m2)
        # At both ends the slope is m^2.
        steep = sine < 1e-6
        slope = tl.where(steep, m1 * m1, sign * m1 * tl.sin(a) / tl.where(steep, 1.0, sine))
        return value, (m2 + slope) / (1 + m2), zero, zero
    if RULE == COMBINED:
        theta = _angle(c, sine)
        a = m1 * theta + m2
        k = tl.maximum(tl.floor(a / 3.141592653589793), 0.0)
        sign = _alternating(k)
        by_angle = -sign * tl.sin(a)
        return sign * tl.cos(a) - 2 * k, -by_angle * m1 / floored, by_angle * theta, by_angle
    m_cosine, m_sine = tl.cos(m2), tl.sin(m2)
    value = c * m_cosine - sine * m_sine
    by_c = m_cosine + c * m_sine / floored
    by_m2 = -c * m_sine - sine * m_cosine
    if RULE == ARCFACE:
        below = c > -m_cosine
        value = tl.where(below, value, c - m2 * m_sine)
        by_c = tl.where(below, by_c, 1.0)
        by_m2 = tl.where(below, by_m2, -(m_sine + m2 * m_cosine))
    if RULE == EASY:
        positive = c > 0
        value = tl.where(positive, value, c)
        by_c = tl.where(positive, by_c, 1.0)
        by_m2 = tl.where(positive, by_m2, 0.0)
    if RULE == CLIP:
        angle = _angle(c, sine) + m2
        low, high = angle <= 1e-3, angle >= 3.141592653589793 - 1e-3
        edge = zero + 0.9999995000000417  # cos(1e-3)
        value = tl.where(low, edge, tl.where(high, -edge, value))
        by_c = tl.where(low | high, 0.0, by_c)
        by_m2 = tl.where(low | high, 0.0, by_m2)
    return value, by_c, zero, by_m2


@triton.jit(do_not_specialize=["rows"])
def _target_kernel(
    grad,  # [rows], if GRADIENT
    cosine,  # [rows]
    m1,  # [rows]
    m2,  # [rows]
    m3,  # [rows]
    value,  # [rows], written unless GRADIENT
    grad_cosine,  # [rows], these written if GRADIENT
    grad_m1,
    grad_m2,
    grad_m3,
    rows,
    RULE: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    dtype = cosine.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    c = tl.load(cosine + row, mask=inside, other=0.0).to(tl.float64)
    first = tl.load(m1 + row, mask=inside, other=1.0).to(tl.float64)
    second = tl.load(m2 + row, mask=inside, other=0.0).to(tl.float64)
    result, by_c, by_m1, by_m2 = _target_rule(c, first, second, RULE)
    if GRADIENT:
        g = tl.load(grad + row, mask=inside, other=0.0).to(tl.float64)
        tl.store(grad_cosine + row, (g * by_c).to(dtype), mask=inside)
        tl.store(grad_m1 + row, (g * by_m1).to(dtype), mask=inside)
        tl.store(grad_m2 + row, (g * by_m2).to(dtype), mask=inside)
        tl.store(grad_m3 + row, (-g).to(dtype), mask=inside)
    else:
        third = tl.load(m3 + row, mask=inside, other=0.0).to(tl.float64)
        tl.store(value + row, (result - third).to(dtype), mask=inside)


class _Operands(NamedTuple):
    """A call's operands, contiguous, and what is known of each row before the classes."""

    x: torch.Tensor
    weight: torch.Tensor
    labels: torch.Tensor
    scale: torch.Tensor
    threshold: torch.Tensor | None
    hardness: torch.Tensor | None
    interclass_filter: float
    sub_centers: int
    product: torch.dtype
    x_norm: torch.Tensor
    x_inverse: torch.Tensor
    w_inverse: torch.Tensor
    target: torch.Tensor
    target_row: torch.Tensor
    target_norm: torch.Tensor

    @property
    def classes(self) -> int:
        return self.weight.shape[0] // self.sub_centers

    def tile(self, machine: int, large: dict[int, Tile], extras: bool) -> Tile:
        """That of a kernel which may hold more than scores."""
        extras = extras or self.sub_centers > 1 or self.threshold is not None
        return tile_of(machine, self.x.dtype, self.product, None if extras else large)

    def common(self) -> dict:
        return {
            "x": self.x,
            "weight": self.weight,
            "labels": self.labels,
            "x_inverse": self.x_inverse,
            "w_inverse": self.w_inverse,
            "scale": self.scale,
            "threshold": self.threshold,
            "hardness": self.hardness,
            "rows": self.x.shape[0],
            "classes": self.classes,
            "dims": self.x.shape[1],
            "interclass_filter": self.interclass_filter,
            "K": self.sub_centers,
            "HARD": self.threshold is not None,
        }


def _prepare(
    embeddings,
    weight,
    labels,
    scale,
    threshold,
    hardness,
    interclass_filter,
    sub_centers,
    normalize_embeddings,
    normalize_weight,
    bfloat16_products,
) -> _Operands:
    x, weight, labels = embeddings.contiguous(), weight.contiguous(), labels.contiguous()
    dtype = compute_dtype(x)
    x_norm = torch.linalg.vector_norm(x, dim=1, dtype=dtype)
    w_norm = torch.linalg.vector_norm(weight, dim=1, dtype=dtype)
    ones = torch.ones_like
    x_inverse = inverse(x_norm) if normalize_embeddings else ones(x_norm)
    w_inverse = inverse(w_norm) if normalize_weight else ones(w_norm)

    classes = weight.shape[0] // sub_centers
    known_label = (labels >= 0) & (labels < classes)
    rows = labels.clamp(0, classes - 1)[:, None] * sub_centers
    rows = rows + torch.arange(sub_centers, device=x.device)
    wide = torch.float64 if dtype == torch.float64 or not x.is_cuda else dtype
    dots = (weight[rows].to(wide) * x.to(wide)[:, None]).sum(2).to(dtype) * w_inverse[rows]
    winner = dots.argmax(1, keepdim=True)
    target = dots.gather(1, winner)[:, 0] * x_inverse
    target = torch.where(labels >= classes, torch.nan, torch.where(labels < 0, 0, target))
    row = rows.gather(1, winner)[:, 0]
    return _Operands(
        x,
        weight,
        labels,
        scale.contiguous(),
        threshold.contiguous() if threshold.numel() else None,
        hardness.contiguous() if hardness.numel() else None,
        interclass_filter,
        sub_centers,
        product_dtype(x, bfloat16_products),
        x_norm,
        x_inverse,
        w_inverse,
        target,
        torch.where(known_label, row, -1),
        torch.where(known_label, w_norm[row], 0),
    )


def margin_softmax_negatives(
    embeddings,
    weight,
    labels,
    scale,
    threshold,
    hardness,
    class_weight,
    interclass_filter,
    sub_centers,
    normalize_embeddings,
    normalize_weight,
    bfloat16_products,
    with_total,
    keep,
):
    operands = _prepare(
        embeddings,
        weight,
        labels,
        scale,
        threshold,
        hardness,
        interclass_filter,
        sub_centers,
        normalize_embeddings,
        normalize_weight,
        bfloat16_products,
    )
    n, classes = operands.x.shape[0], operands.classes
    empty, dtype = operands.scale.new_empty, torch.bfloat16
    kept = empty((classes, n) if keep else (0,), dtype=dtype)
    kept_max = empty((triton.cdiv(classes, KEPT_BLOCK), n) if keep else (0,))
    total = operands.scale.new_zeros(n)
    if n == 0:
        return empty(0), empty(0), total, empty(0), empty(0), kept, kept_max
    machine = known(generation(operands.x))
    tile = operands.tile(machine, PLAIN_FORWARD, with_total or keep)
    parts, tiles = score_tiles.splits(tile, machine, n, classes)
    highest, sums = empty(parts, n), empty(parts, n)
    totals = empty(parts, n) if with_total else None
    with on_device_of(operands.x):
        _forward_kernel[(triton.cdiv(n, tile.rows), parts)](
            **operands.common(),
            class_weight=class_weight.contiguous() if class_weight.numel() else None,
            highest=highest,
            sums=sums,
            totals=totals,
            kept=kept if keep else None,
            kept_max=kept_max if keep else None,
            scores=None,
            tiles=tiles,
            WEIGHTED=class_weight.numel() > 0,
            TOTAL=with_total,
            KEEP=keep,
            SCORES=False,
            **score_tiles.launch_options(tile, operands.product, machine),
        )
    if totals is not None:
        total = totals.sum(0)
    lse = log_sum(highest, sums)
    return operands.target, lse, total, operands.x_norm, operands.target_norm, kept, kept_max


def margin_softmax_scores(
    embeddings,
    weight,
    labels,
    scale,
    threshold,
    hardness,
    interclass_filter,
    sub_centers,
    normalize_embeddings,
    normalize_weight,
    bfloat16_products,
):
    operands = _prepare(
        embeddings,
        weight,
        labels,
        scale,
        threshold,
        hardness,
        interclass_filter,
        sub_centers,
        normalize_embeddings,
        normalize_weight,
        bfloat16_products,
    )
    n, classes = operands.x.shape[0], operands.classes
    scores = operands.scale.new_empty(n, classes)
    machine = known(generation(operands.x))
    tile = operands.tile(machine, PLAIN_FORWARD, True)
    if n > 0:
        parts, tiles = score_tiles.splits(tile, machine, n, classes)
        with on_device_of(operands.x):
            _forward_kernel[(triton.cdiv(n, tile.rows), parts)](
                **operands.common(),
                class_weight=None,
                highest=None,
                sums=None,
                totals=None,
                kept=None,
                kept_max=None,
                scores=scores,
                tiles=tiles,
                WEIGHTED=False,
                TOTAL=False,
                KEEP=False,
                SCORES=True,
                **score_tiles.launch_options(tile, operands.product, machine),
            )
    return scores, operands.target, operands.x_norm, operands.target_norm


def margin_softmax_negatives_backward(
    grad_target,
    grad_lse,
    grad_total,
    grad_embedding_norm,
    grad_weight_norm,
    embeddings,
    weight,
    labels,
    scale,
    threshold,
    hardness,
    class_weight,
    lse,
    kept,
    kept_max,
    interclass_filter,
    sub_centers,
    normalize_embeddings,
    normalize_weight,
    bfloat16_products,
    needs_embeddings,
    needs_weight,
    needs_scale,
):
    operands = _prepare(
        embeddings,
        weight,
        labels,
        scale,
        threshold,
        hardness,
        interclass_filter,
        sub_centers,
        normalize_embeddings,
        normalize_weight,
        bfloat16_products,
    )
    has_copy = kept.numel() > 0 and not needs_scale  # it holds no scores
    return _gradients(
        operands,
        {
            "grad_target": grad_target.contiguous(),
            "grad_lse": grad_lse.contiguous(),
            "grad_total": grad_total.contiguous(),
            "class_weight": class_weight.contiguous() if class_weight.numel() else None,
            "lse": lse.contiguous(),
            "kept": kept if has_copy else None,
            "kept_max": kept_max if has_copy else None,
            "grad_scores": None,
            "WEIGHTED": class_weight.numel() > 0,
            "FROM": KEPT_COPY if has_copy else PROBABILITIES,
        },
        (grad_embedding_norm, grad_weight_norm),
        (normalize_embeddings, normalize_weight),
        (needs_embeddings, needs_weight, needs_scale),
        embeddings,
    )


def margin_softmax_scores_backward(
    grad_scores,
    grad_target,
    grad_embedding_norm,
    grad_weight_norm,
    embeddings,
    weight,
    labels,
    scale,
    threshold,
    hardness,
    interclass_filter,
    sub_centers,
    normalize_embeddings,
    normalize_weight,
    bfloat16_products,
    needs_embeddings,
    needs_weight,
    needs_scale,
):
    operands = _prepare(
        embeddings,
        weight,
        labels,
        scale,
        threshold,
        hardness,
        interclass_filter,
        sub_centers,
        normalize_embeddings,
        normalize_weight,
        bfloat16_products,
    )
    return _gradients(
        operands,
        {
            "grad_target": grad_target.contiguous(),
            "grad_lse": None,
            "grad_total": None,
            "class_weight": None,
            "lse": None,
            "kept": None,
            "kept_max": None,
            "grad_scores": grad_scores.contiguous(),
            "WEIGHTED": False,
            "FROM": SCORE_GRADIENTS,
        },
        (grad_embedding_norm, grad_weight_norm),
        (normalize_embeddings, normalize_weight),
        (needs_embeddings, needs_weight, needs_scale),
        embeddings,
    )


def _gradients(operands, sources, grad_norms, normalized, needs, embeddings):
    x, weight, scale = operands.x, operands.weight, operands.scale
    (n, dims), classes, k = x.shape, operands.classes, operands.sub_centers
    needs_x, needs_w, needs_scale = needs
    grad_w = torch.empty_like(weight) if needs_w else weight.new_empty(0)
    if n == 0:
        nothing = (embeddings.new_empty(embeddings.shape if needs_x else (0,)), grad_w.zero_())
        return *nothing, scale.new_empty(0)
    grad_x = scale.new_zeros(n, dims)
    grad_scale = scale.new_zeros(n)
    machine = known(generation(x))
    extras = needs_scale or sources["WEIGHTED"] or sources["FROM"] != PROBABILITIES
    tile = operands.tile(machine, PLAIN_GRADIENT, extras)
    held = gradient_dtype(operands.product)
    at_a_time = score_tiles.columns_at_a_time(tile, machine, n, dims, k, held.itemsize)
    rounded = x.to(held)
    # What the gradient of a target's norm adds along its weight: sorted, so deterministic.
    by_norm = scale.new_zeros(weight.shape[0])
    known_row = operands.target_row.clamp(min=0)
    part = torch.where(operands.target_row < 0, 0, grad_norms[1] * inverse(operands.target_norm))
    by_norm.index_put_((known_row,), part, accumulate=True)
    for first in range(0, classes, at_a_time):
        last = min(first + at_a_time, classes)
        width, row_tiles = (last - first) * k, triton.cdiv(n, tile.rows)
        class_tiles = triton.cdiv(last - first, tile.columns)
        # Whole tiles a row: the products want aligned rows.
        v = torch.empty(n, class_tiles * tile.columns * k, dtype=held, device=x.device)
        scale_sums = scale.new_empty(class_tiles, n) if needs_scale else None
        with on_device_of(x):
            _gradient_kernel[(row_tiles, class_tiles)](
                **operands.common(),
                **sources,
                target_row=operands.target_row,
                v=v,
                scale_sums=scale_sums,
                SCALE=needs_scale,
                first=first,
                last=last,
                **score_tiles.launch_options(tile, operands.product, machine),
            )
        v = v[:, :width]
        part = weight[first * k : last * k]
        if needs_x:
            grad_x += score_tiles.product(v, part)
        if needs_w:
            grad = score_tiles.product(v.t(), rounded)
            values = part.to(grad.dtype)
            along = by_norm[first * k : last * k]
            if normalized[1]:
                shrink = operands.w_inverse[first * k : last * k]
                along = along - (grad * values).sum(1) * shrink * shrink
            grad_w[first * k : last * k] = torch.addcmul(grad, along[:, None], values)
        if needs_scale:
            grad_scale += scale_sums.sum(0)
    if not needs_x:
        grad_x = embeddings.new_empty(0)
    else:
        values, shrink = x.to(grad_x.dtype), inverse(operands.x_norm)
        along = grad_norms[0] * shrink
        if normalized[0]:
            along = along - (grad_x * values).sum(1) * shrink * shrink
        grad_x = torch.addcmul(grad_x, along[:, None], values).to(embeddings.dtype)
    return grad_x, grad_w, grad_scale if needs_scale else grad_scale.new_empty(0)


def margin_softmax_target(cosine, m1, m2, m3, rule):
    value = torch.empty_like(cosine, memory_format=torch.contiguous_format)
    _launch_target(None, cosine, m1, m2, m3, rule, value, (None,) * 4)
    return value


def margin_softmax_target_backward(grad, cosine, m1, m2, m3, rule):
    grads = tuple(torch.empty_like(cosine, memory_format=torch.contiguous_format) for _ in range(4))
    _launch_target(grad.contiguous(), cosine, m1, m2, m3, rule, None, grads)
    return grads


def _launch_target(grad, cosine, m1, m2, m3, rule, value, grads) -> None:
    n = cosine.shape[0]
    if n == 0:
        return
    with on_device_of(cosine):
        _target_kernel[(triton.cdiv(n, TARGET_BLOCK),)](
            grad,
            *(t.contiguous() for t in (cosine, m1, m2, m3)),
            value,
            *grads,
            n,
            RULE=RULES[rule],
            GRADIENT=grad is not None,
            BLOCK=TARGET_BLOCK,
            **FUSED,
        )


def compile_cases(generation: int) -> list[CompileCase]:
    machine = known(generation)
    cases = []
    gradients = ("grad", "grad_cosine", "grad_m1", "grad_m2", "grad_m3")
    for rule, gradient in ((rule, rule in ("shift", "combined", "clip")) for rule in RULES):
        pointers = ("cosine", "m1", "m2", *(gradients if gradient else ("m3", "value")))
        cases.append(
            CompileCase(
                name=f"{rule}-gradient" if gradient else rule,
                kernel=_target_kernel,
                types={**dict.fromkeys(pointers, "*fp32"), "rows": "i32"},
                constants={"RULE": RULES[rule], "GRADIENT": gradient, "BLOCK": TARGET_BLOCK},
                options=FUSED,
                fused=True,
                # A double's sine reduces large angles by a table on the stack.
                stack=rule not in ("shift",),
            )
        )
    for name, stored, kind, instruction in score_tiles.COMPILED_TYPES:
        computed = "*fp64" if stored == "fp64" else "*fp32"
        operands = {
            "x": f"*{stored}",
            "weight": f"*{stored}",
            "labels": "*i64",
            **dict.fromkeys(("x_inverse", "w_inverse", "scale"), computed),
            **dict.fromkeys(("rows", "classes", "dims"), "i32"),
            "interclass_filter": "fp32",
        }
        hard = dict.fromkeys(("threshold", "hardness"), computed)
        forward = dict.fromkeys(("highest", "sums"), computed)
        kept = {"kept": "*bf16", "kept_max": computed}
        weighted = dict.fromkeys(("totals", "class_weight"), computed)
        for variant, types, flags in (
            ("plain", forward, {}),
            ("kept", {**forward, **kept}, {"KEEP": True}),
            (
                "everything",
                {**forward, **hard, **weighted},
                {"HARD": True, "WEIGHTED": True, "TOTAL": True},
            ),
            ("scores", {"scores": computed}, {"SCORES": True}),
        ):
            if variant in ("kept", "scores") and kind != torch.bfloat16:
                continue
            options, blocks = score_tiles.compile_options(
                machine, stored, kind, PLAIN_FORWARD if variant == "plain" else None
            )
            off = {
                "K": 2 if variant == "everything" else 1,
                **dict.fromkeys(("HARD", "WEIGHTED", "TOTAL", "KEEP", "SCORES"), False),
            }
            cases.append(
                CompileCase(
                    name=f"forward-{variant}-{name}",
                    kernel=_forward_kernel,
                    types={**operands, "tiles": "i32", **types},
                    constants={**off, **flags, **blocks},
                    options=options,
                    multiples=("dims",),
                    vector_loads=True,
                    fused=True,
                    instructions=instruction,
                )
            )
        gradient = {
            "grad_target": computed,
            "v": f"*{score_tiles.short_name(gradient_dtype(kind))}",
        }
        by_lse = dict.fromkeys(("grad_lse", "grad_total", "lse"), computed)
        for variant, types, flags in (
            ("plain", by_lse, {"FROM": PROBABILITIES}),
            ("kept", {**by_lse, **kept}, {"FROM": KEPT_COPY}),
            (
                "everything",
                {**by_lse, **hard, "class_weight": computed, "scale_sums": computed},
                {"FROM": PROBABILITIES, "HARD": True, "WEIGHTED": True},
            ),
            ("scores", {"grad_scores": computed}, {"FROM": SCORE_GRADIENTS}),
        ):
            if variant in ("kept", "scores") and kind != torch.bfloat16:
                continue
            copies = variant == "kept"
            options, blocks = score_tiles.compile_options(
                machine, stored, kind, PLAIN_GRADIENT if variant == "plain" else None
            )
            cases.append(
                CompileCase(
                    name=f"gradient-{variant}-{name}",
                    kernel=_gradient_kernel,
                    types={
                        **operands,
                        **gradient,
                        "target_row": "*i64",
                        "first": "i32",
                        "last": "i32",
                        **types,
                    },
                    constants={
                        "K": 2 if variant == "everything" else 1,
                        "HARD": False,
                        "WEIGHTED": False,
                        "SCALE": variant == "everything",
                        **flags,
                        **blocks,
                    },
                    options=options,
                    multiples=("dims",),
                    vector_loads=not copies,
                    fused=True,
                    instructions=() if copies else instruction,
                )
            )
    return cases
