"""Non-maximum suppression: the list of kept boxes grows, and every block of boxes follows it.

Boxes are sorted by falling score and cut into blocks, one a program. A program first finds
which boxes of its own block overlap each other; then it tests its boxes against the kept list as
earlier programs append to it; when all of those are done, it settles its own block, appends what
it keeps and says so. No matrix of all overlaps exists. Boxes may have segments, and suppress none
of another; there may be several images, each with a kept list of its own.
"""

import torch
import triton
import triton.language as tl

from fastzoo.reference.nms import round_down
from fastzoo.reference.precision import compute_dtype

from .boxes import divide, intersection_and_union
from .runtime import EXACT, CompileCase, on_device_of

# Boxes in a block (at most 64: its survivors are the bits of an int64) and warps, by type: the
# largest that spill no registers.
CONFIGS = {torch.float32: (64, 8), torch.float64: (32, 4)}

# The progress word: how many blocks are done, above how many boxes are kept.
KEPT_BITS = 32
KEPT_MASK = (1 << KEPT_BITS) - 1


@triton.jit
def _overlap_exceeds(a, b, threshold):
    intersection, union = intersection_and_union(a, b)
    return divide(intersection, union) > threshold


@triton.jit(do_not_specialize=["n", "images", "most"])
def _nms_kernel(
    boxes,  # [images, 4, n]: coordinates, in falling order of score
    segments,  # [images, n], if GATED
    order,  # [n]: original indices; the boxes' own places if BATCHED
    counts,  # [images]: boxes to look at, if BATCHED
    threshold,  # [1], of the boxes' type
    kept_boxes,  # [images, 4, n], written
    kept_segments,  # [images, n], written if GATED
    kept,  # [images, n], written: original indices
    progress,  # [images], zero at first
    tickets,  # [1], zero at first
    n,
    images,
    most,  # boxes an image is to keep at least, if BATCHED; it may stop there
    GATED: tl.constexpr,
    BATCHED: tl.constexpr,  # one image without
    BLOCK: tl.constexpr,
    KEPT_BITS: tl.constexpr,
):
    # Blocks are dealt out in the order in which programs start, so that whatever a program waits
    # for is running already.
    block = tl.atomic_add(tickets, 1, sem="relaxed")
    stride = tl.cast(n, tl.int64)
    count = stride
    if BATCHED:
        image = block % images
        block = block // images
        boxes += 4 * stride * image
        kept_boxes += 4 * stride * image
        kept += stride * image
        if GATED:
            segments += stride * image
            kept_segments += stride * image
        progress += image
        count = tl.load(counts + image)
        if block * BLOCK >= count:
            return
    limit = tl.load(threshold)

    lane = tl.arange(0, BLOCK)
    bit = tl.full((BLOCK,), 1, tl.int64) << lane.to(tl.int64)
    box = block * BLOCK + lane
    inside = box < count
    x1 = tl.load(boxes + box, mask=inside, other=0.0)
    y1 = tl.load(boxes + stride + box, mask=inside, other=0.0)
    x2 = tl.load(boxes + 2 * stride + box, mask=inside, other=0.0)
    y2 = tl.load(boxes + 3 * stride + box, mask=inside, other=0.0)
    if BATCHED:
        index = box
    else:
        index = tl.load(order + box, mask=inside, other=0)
    if GATED:
        segment = tl.load(segments + box, mask=inside, other=0)

    # A box's suppressors within its block, as bits. Found before there is anything to wait for.
    own = x1[:, None], y1[:, None], x2[:, None], y2[:, None]
    overlapping = _overlap_exceeds(own, (x1[None, :], y1[None, :], x2[None, :], y2[None, :]), limit)
    if GATED:
        overlapping &= segment[:, None] == segment[None, :]
    earlier = lane[None, :] < lane[:, None]
    suppressors = tl.sum(tl.where(overlapping & earlier, bit[None, :], 0), axis=1)

    suppressed = tl.zeros((BLOCK, BLOCK), tl.int1)
    tested = block * 0
    total = block * 0
    done = block * 0 - 1
    while done < block:
        word = tl.atomic_add(progress, 0, sem="acquire")
        done = word >> KEPT_BITS
        total = word & ((1 << KEPT_BITS) - 1)
        for start in range(tested, total, BLOCK):
            entry = kept_boxes + start + lane
            filled = start + lane < total
            # Other programs wrote these: past the L1 cache, which may hold the line as it was.
            kept_x1 = tl.load(entry, mask=filled, other=0.0, cache_modifier=".cg")
            kept_y1 = tl.load(entry + stride, mask=filled, other=0.0, cache_modifier=".cg")
            kept_x2 = tl.load(entry + 2 * stride, mask=filled, other=0.0, cache_modifier=".cg")
            kept_y2 = tl.load(entry + 3 * stride, mask=filled, other=0.0, cache_modifier=".cg")
            kept_box = kept_x1[None, :], kept_y1[None, :], kept_x2[None, :], kept_y2[None, :]
            overlapping = _overlap_exceeds(own, kept_box, limit)
            if GATED:
                at = kept_segments + start + lane
                kept_segment = tl.load(at, mask=filled, other=0, cache_modifier=".cg")
                overlapping &= segment[:, None] == kept_segment[None, :]
            suppressed = suppressed | (overlapping & filled[None, :])
        tested = total
        if BATCHED and total >= most:
            done = block
    if BATCHED and total >= most:
        count = count * 0  # no more are wanted; every later block will see so, too
    alive = (box < count) & (tl.max(suppressed.to(tl.int32), axis=1) == 0)

    # A box survives if no survivor suppresses it. Each round settles at least one more box, from
    # the first on, and a round that changes nothing has settled all.
    survivors = tl.sum(tl.where(alive, bit, 0), axis=0)
    before = ~survivors
    keep = alive
    while survivors != before:
        before = survivors
        keep = alive & ((suppressors & survivors) == 0)
        survivors = tl.sum(tl.where(keep, bit, 0), axis=0)

    one_each = keep.to(tl.int64)
    place = total + tl.cumsum(one_each, axis=0) - one_each
    tl.store(kept_boxes + place, x1, mask=keep)
    tl.store(kept_boxes + stride + place, y1, mask=keep)
    tl.store(kept_boxes + 2 * stride + place, x2, mask=keep)
    tl.store(kept_boxes + 3 * stride + place, y2, mask=keep)
    tl.store(kept + place, index, mask=keep)
    if GATED:
        tl.store(kept_segments + place, segment, mask=keep)
    tl.debug_barrier()  # all of the program's stores come before its release
    total += tl.sum(one_each, axis=0)
    tl.atomic_xchg(progress, ((block + 1) << KEPT_BITS) | total, sem="release")


def falling_key(scores: torch.Tensor) -> torch.Tensor:
    """Integers that ascend as scores fall; -0 equals +0, every NaN shares the last key.

    The twin of falling_key in csrc/math/nms.h, as signed integers of the scores' width.
    """
    width = {torch.float32: torch.int32, torch.float64: torch.int64}[scores.dtype]
    last = torch.iinfo(width).max
    bits = (scores + 0.0).view(width)
    return torch.where(bits < 0, bits & last, ~bits).masked_fill(scores.isnan(), last)


def launch(
    boxes: torch.Tensor,
    iou_threshold: float,
    segments: torch.Tensor | None,
    order: torch.Tensor | None = None,
    counts: torch.Tensor | None = None,
    most: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Suppresses within each image's boxes ``[images, 4, n]``, which fall in score.

    Args:
        segments: ``[images, n]``, or None for a single one.
        order: ``[n]``, of a single image, what its boxes are called in the result.
        counts: ``[images]``, how many boxes each image has; without ``order``.
        most: with ``counts``, an image may stop once it has kept as many.

    Returns:
        ``[images, n]`` the kept boxes, by their places without ``order``, and ``[images]`` how
        many there are: at least ``most`` or all, maybe a block more.
    """
    images, _, n = boxes.shape
    device = boxes.device
    threshold = round_down(iou_threshold, boxes.dtype)
    kept = torch.empty(images, n, dtype=torch.int64, device=device)
    progress = torch.zeros(images, dtype=torch.int64, device=device)
    block, num_warps = CONFIGS[boxes.dtype]
    with on_device_of(boxes):
        _nms_kernel[(images * triton.cdiv(n, block),)](
            boxes,
            segments,
            order,
            counts,
            torch.full((1,), threshold, dtype=boxes.dtype, device=device),
            torch.empty_like(boxes),
            None if segments is None else torch.empty_like(segments),
            kept,
            progress,
            torch.zeros(1, dtype=torch.int64, device=device),
            n,
            images,
            most,
            GATED=segments is not None,
            BATCHED=counts is not None,
            BLOCK=block,
            KEPT_BITS=KEPT_BITS,
            num_warps=num_warps,
            **EXACT,
        )
    return kept, progress & KEPT_MASK


def _keep(
    boxes: torch.Tensor, scores: torch.Tensor, idxs: torch.Tensor | None, iou_threshold: float
) -> torch.Tensor:
    if len(boxes) == 0:
        return torch.empty(0, dtype=torch.int64, device=boxes.device)
    dtype = compute_dtype(boxes)
    order = falling_key(scores.to(dtype)).sort(stable=True).indices
    sorted_boxes = boxes.to(dtype)[order].t().contiguous()
    segments = None if idxs is None else idxs[order][None]
    kept, counts = launch(sorted_boxes[None], iou_threshold, segments, order)
    return kept[0, : counts.item()]


def nms(boxes: torch.Tensor, scores: torch.Tensor, iou_threshold: float) -> torch.Tensor:
    """Indices of the boxes kept, int64, by falling score. Reads the device once: their number."""
    return _keep(boxes, scores, None, iou_threshold)


def batched_nms(
    boxes: torch.Tensor, scores: torch.Tensor, idxs: torch.Tensor, iou_threshold: float
) -> torch.Tensor:
    """:func:`nms` within the boxes of each id, all by falling score."""
    return _keep(boxes, scores, idxs, iou_threshold)


def compile_cases(generation: int) -> list[CompileCase]:
    return [
        CompileCase(
            name=f"{name}-{type_}",
            kernel=_nms_kernel,
            types={
                "boxes": f"*{type_}",
                "threshold": f"*{type_}",
                "kept_boxes": f"*{type_}",
                "kept": "*i64",
                "progress": "*i64",
                "tickets": "*i64",
                "n": "i32",
                "images": "i32",
                "most": "i32",
                **({"segments": "*i64", "kept_segments": "*i64"} if gated else {}),
                **({"counts": "*i64"} if batched else {"order": "*i64"}),
            },
            constants={
                "GATED": gated,
                "BATCHED": batched,
                "BLOCK": CONFIGS[dtype][0],
                "KEPT_BITS": KEPT_BITS,
            },
            options={"num_warps": CONFIGS[dtype][1], **EXACT},
            instructions=(
                f"div.rn.f{type_[2:]}",
                "ld.global.gpu.acquire.b64",
                "atom.global.gpu.release.exch.b64",
                "ld.global.cg",
            ),
        )
        for type_, dtype in (("fp32", torch.float32), ("fp64", torch.float64))
        for name, gated, batched in (
            ("nms", False, False),
            ("batched_nms", True, False),
            ("multiclass_nms", True, True),
            ("class_agnostic_nms", False, True),
        )
    ]
