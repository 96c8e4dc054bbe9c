"""A dense detector's post-processing: fixed shapes, and nothing that waits for the device.

A kernel gives each pair of a location and a class, or each cell of a heatmap, a key that ascends
as its score falls; torch selects the first. Suppression is the kernel of :mod:`.nms`, for all
images at once.
"""

import torch
import triton
import triton.language as tl

from fastzoo.reference.detections import decode_boxes, rank_in_class
from fastzoo.reference.nms import round_down
from fastzoo.reference.precision import compute_dtype

from . import nms
from .runtime import EXACT, CompileCase, on_device_of

CANDIDATES_BLOCK = 1024
PEAKS_TILE = (8, 64)
NUM_WARPS = 4

# The key of what is not to be selected; no number has it.
EXCLUDED = torch.iinfo(torch.int64).max
INDEX_BITS = 32

_EXCLUDED = tl.constexpr(EXCLUDED)
_INDEX_BITS = tl.constexpr(INDEX_BITS)


@triton.jit
def _wide(x):
    if x.dtype == tl.float64:
        wide = x
    else:
        wide = x.to(tl.float32)
    return wide


@triton.jit
def _key(score, index, wanted, PACKED: tl.constexpr):
    """falling_key of numbers, as int64; PACKED has the index below it, and so is unique."""
    if score.dtype == tl.float64:
        bits = (score + 0.0).to(tl.int64, bitcast=True)
        key = tl.where(bits < 0, bits & 0x7FFFFFFFFFFFFFFF, ~bits)
    else:
        bits = (score + 0.0).to(tl.int32, bitcast=True)
        key = tl.where(bits < 0, bits & 0x7FFFFFFF, ~bits).to(tl.int64)
    if PACKED:
        key = (key << _INDEX_BITS) | index
    return tl.where(wanted, key, _EXCLUDED)


@triton.jit
def _candidate_keys_kernel(
    scores,  # [images, n]
    threshold,  # [1], of the type computed in
    keys,  # [images, n], written
    n,
    PACKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tiles = tl.cdiv(n, BLOCK)
    start = (tl.program_id(0) // tiles).to(tl.int64) * n
    index = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < n
    score = _wide(tl.load(scores + start + index, mask=inside, other=0.0))
    key = _key(score, index, score > tl.load(threshold), PACKED)
    tl.store(keys + start + index, key, mask=inside)


@triton.jit
def _peak_keys_kernel(
    heatmap,  # [images, classes, height, width]
    keys,  # of that shape, written
    classes,
    height,
    width,
    KERNEL: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    columns = tl.cdiv(width, BLOCK_X)
    rows = tl.cdiv(height, BLOCK_Y)
    tile = tl.program_id(0)
    plane = (tile // columns // rows).to(tl.int64)
    y = (tile // columns % rows * BLOCK_Y + tl.arange(0, BLOCK_Y))[:, None]
    x = (tile % columns * BLOCK_X + tl.arange(0, BLOCK_X))[None, :]
    inside = (y < height) & (x < width)
    cell = y.to(tl.int64) * width + x
    size = tl.cast(height, tl.int64) * width
    heatmap += plane * size
    score = _wide(tl.load(heatmap + cell, mask=inside, other=0.0))
    peak = inside
    for down in range(KERNEL):
        near_y = y + down - KERNEL // 2
        for right in range(KERNEL):
            near_x = x + right - KERNEL // 2
            there = (near_y >= 0) & (near_y < height) & (near_x >= 0) & (near_x < width)
            near = heatmap + near_y.to(tl.int64) * width + near_x
            peak &= score >= _wide(tl.load(near, mask=there, other=float("-inf")))
    key = _key(score, plane % classes * size + cell, peak, PACKED)
    tl.store(keys + plane * size + cell, key, mask=inside)


def _packed(keys: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether scores of a type and the indices of a row fit into one integer."""
    return dtype != torch.float64 and keys.shape[1] <= 1 << INDEX_BITS


def _first(keys: torch.Tensor, count: int, packed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each row, which of the ``count`` lowest keys exist, and their indices, 0 for the rest."""
    if packed:
        if count < keys.shape[1]:
            lowest = keys.topk(count, largest=False).values
        else:
            lowest = keys.sort().values
        index = lowest & ((1 << INDEX_BITS) - 1)
    else:
        lowest, index = (part[:, :count] for part in keys.sort(stable=True))
    found = lowest != EXCLUDED
    return found, torch.where(found, index, 0)


def _padded(values: torch.Tensor, found: torch.Tensor, count: int, padding: int) -> torch.Tensor:
    """``[images, count, ...]``: the values that were found, and padding."""
    result = values.new_full((len(values), count, *values.shape[2:]), padding)
    found = found.view(*found.shape, *[1] * (values.dim() - 2))
    result[:, : values.shape[1]] = torch.where(found, values, result[:, : values.shape[1]])
    return result


def multiclass_nms(
    boxes: torch.Tensor,
    scores: torch.Tensor,
    priors: torch.Tensor,
    decode: str,
    weight_x: float,
    weight_y: float,
    weight_w: float,
    weight_h: float,
    clip: float,
    score_threshold: float,
    iou_threshold: float,
    pre_top_k: int,
    max_per_class: int,
    max_detections: int,
    class_agnostic: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    images, n, classes = scores.shape
    dtype = compute_dtype(boxes)
    device = boxes.device
    candidates = n * classes if pre_top_k < 0 else min(pre_top_k, n * classes)
    most = min(max_detections, candidates)
    if images == 0 or most == 0:
        labels, indices = torch.full((2, images, max_detections), -1, device=device)
        return (
            torch.zeros(images, dtype=torch.int64, device=device),
            torch.zeros(images, max_detections, 4, dtype=dtype, device=device),
            torch.zeros(images, max_detections, dtype=dtype, device=device),
            labels,
            indices.clone(),
        )
    found, pair = _candidates(scores, score_threshold, candidates)
    place, label = pair // classes, pair % classes
    image = torch.arange(images, device=device)[:, None]
    offsets = boxes[image, place] if boxes.dim() == 3 else boxes[image, place, label]
    weights = weight_x, weight_y, weight_w, weight_h
    decoded = decode_boxes(offsets, priors[place] if decode else priors, decode, weights, clip)

    kept, counts = nms.launch(
        decoded.transpose(1, 2).contiguous(),
        iou_threshold,
        None if class_agnostic else label,
        counts=found.sum(1),
        most=most if max_per_class < 0 else candidates,
    )
    rank = torch.arange(candidates, device=device)
    chosen = rank < counts[:, None]
    kept = torch.where(chosen, kept, 0)
    if max_per_class >= 0:
        own = torch.where(chosen, label.gather(1, kept), classes) + image * (classes + 1)
        chosen &= rank_in_class(own.flatten()).view_as(own) < max_per_class
        # The chosen ones come first, in their order.
        first = torch.where(chosen, rank, rank + candidates).sort(1).indices[:, :most]
        chosen, kept = chosen.gather(1, first), kept.gather(1, first)
    chosen, kept = chosen[:, :most], kept[:, :most]
    return (
        chosen.sum(1),
        _padded(decoded[image, kept], chosen, max_detections, 0),
        _padded(scores[image, place, label].to(dtype).gather(1, kept), chosen, max_detections, 0),
        _padded(label.gather(1, kept), chosen, max_detections, -1),
        _padded(place.gather(1, kept), chosen, max_detections, -1),
    )


def _candidates(
    scores: torch.Tensor, score_threshold: float, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`_first` of the pairs above the threshold."""
    dtype = compute_dtype(scores)
    scores = scores.contiguous().flatten(1)
    images, n = scores.shape
    threshold = round_down(score_threshold, dtype)
    keys = torch.empty(scores.shape, dtype=torch.int64, device=scores.device)
    packed = _packed(keys, dtype)
    with on_device_of(scores):
        _candidate_keys_kernel[(images * triton.cdiv(n, CANDIDATES_BLOCK),)](
            scores,
            torch.full((1,), threshold, dtype=dtype, device=scores.device),
            keys,
            n,
            PACKED=packed,
            BLOCK=CANDIDATES_BLOCK,
            num_warps=NUM_WARPS,
            **EXACT,
        )
    return _first(keys, count, packed)


def peak_nms(
    heatmap: torch.Tensor, kernel: int, top_k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    images, classes, height, width = heatmap.shape
    heatmap = heatmap.contiguous()
    flat = heatmap.flatten(1)
    found = torch.zeros(images, 0, dtype=torch.bool, device=heatmap.device)
    index = found.to(torch.int64)
    if heatmap.numel() > 0:
        keys = torch.empty(flat.shape, dtype=torch.int64, device=heatmap.device)
        packed = _packed(keys, heatmap.dtype)
        tiles = triton.cdiv(height, PEAKS_TILE[0]) * triton.cdiv(width, PEAKS_TILE[1])
        with on_device_of(heatmap):
            _peak_keys_kernel[(images * classes * tiles,)](
                heatmap,
                keys,
                classes,
                height,
                width,
                KERNEL=kernel,
                PACKED=packed,
                BLOCK_Y=PEAKS_TILE[0],
                BLOCK_X=PEAKS_TILE[1],
                num_warps=NUM_WARPS,
                **EXACT,
            )
        found, index = _first(keys, min(top_k, flat.shape[1]), packed)
    area = max(1, height * width)
    return (
        _padded(flat.gather(1, index), found, top_k, 0),
        _padded(index // area, found, top_k, -1),
        _padded(index % area // max(1, width), found, top_k, -1),
        _padded(index % max(1, width), found, top_k, -1),
    )


def compile_cases(generation: int) -> list[CompileCase]:
    cases = []
    for type_ in ("fp32", "fp64", "fp16", "bf16"):
        packed = {"PACKED": type_ != "fp64"}
        compute = "fp64" if type_ == "fp64" else "fp32"
        # Adding 0 makes -0 equal to 0.
        given = {
            "options": {"num_warps": NUM_WARPS, **EXACT},
            "instructions": (f"add.rn.f{compute[2:]}", "st.global.v2.b64"),
        }
        cases.append(
            CompileCase(
                name=f"candidates-{type_}",
                kernel=_candidate_keys_kernel,
                types={
                    "scores": f"*{type_}",
                    "threshold": f"*{compute}",
                    "keys": "*i64",
                    "n": "i32",
                },
                constants={**packed, "BLOCK": CANDIDATES_BLOCK},
                multiples=("n",),
                **given,
            )
        )
        cases += [
            CompileCase(
                name=f"peaks-{kernel}-{type_}",
                kernel=_peak_keys_kernel,
                types={
                    "heatmap": f"*{type_}",
                    "keys": "*i64",
                    "classes": "i32",
                    "height": "i32",
                    "width": "i32",
                },
                constants={
                    **packed,
                    "KERNEL": kernel,
                    "BLOCK_Y": PEAKS_TILE[0],
                    "BLOCK_X": PEAKS_TILE[1],
                },
                multiples=("width",),
                **given,
            )
            for kernel in (3, 9)
        ]
    return cases
