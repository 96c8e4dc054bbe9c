"""torchvision's box operators on fastzoo's kernels.

The functions are drop-ins for those of ``torchvision.ops`` (0.26): names, arguments, defaults.
:func:`enable` instead replaces the kernels of the operator ``torchvision::nms``, so that code which
imported torchvision's function before (and torchvision's own ``batched_nms`` and detection models)
runs on fastzoo too, unchanged.

Overlaps of boxes in half precision are computed and returned in float32. Box by box functions that
only rearrange or compare (``box_area`` and those after it) are plain PyTorch, as theirs are.
"""

import importlib
import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from fastzoo import ops
from fastzoo.ops._operator import OPERATORS
from fastzoo.reference.boxes import FORMATS

_ROTATED = ("xywhr", "cxcywhr", "xyxyxyxy")
_REPLACED_ON = {"cpu": "CPU", "cuda": "CUDA"}
_library: torch.library.Library | None = None


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """``torchvision.ops.nms``: see :func:`fastzoo.ops.nms`, which has the same answers."""
    return ops.nms(boxes, scores, iou_threshold)


def batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    """``torchvision.ops.batched_nms``: see :func:`fastzoo.ops.batched_nms`.

    Also right where theirs, which up to 25 000 boxes on a GPU and 1 000 on a CPU moves boxes away
    from each other, is not: negative coordinates, half precision, many classes.
    """
    return ops.batched_nms(boxes, scores, idxs, iou_threshold)


def _image_by_image(
    overlap: Callable[[Tensor, Tensor], Tensor], boxes1: Tensor, boxes2: Tensor
) -> Tensor:
    """``[..., N, M]`` of ``[..., N, K]`` and ``[..., M, K]``; leading dimensions are broadcast."""
    boxes1, boxes2 = (b if b.is_floating_point() else b.float() for b in (boxes1, boxes2))
    if boxes1.dim() == boxes2.dim() == 2:
        return overlap(boxes1, boxes2)
    batch = torch.broadcast_shapes(boxes1.shape[:-2], boxes2.shape[:-2])
    first, second = (b.expand(*batch, *b.shape[-2:]).flatten(0, -3) for b in (boxes1, boxes2))
    found = [overlap(a, b) for a, b in zip(first, second, strict=True)]
    if not found:
        return boxes1.new_empty(*batch, boxes1.shape[-2], boxes2.shape[-2])
    return torch.stack(found).reshape(*batch, boxes1.shape[-2], boxes2.shape[-2])


def box_iou(boxes1: Tensor, boxes2: Tensor, fmt: str = "xyxy") -> Tensor:
    """``torchvision.ops.box_iou``: see :func:`fastzoo.ops.box_iou`.

    ``fmt`` may also be ``cxcywhr``, of degrees counter-clockwise.
    """
    if fmt == "cxcywhr":
        return _image_by_image(
            lambda a, b: ops.box_iou_rotated(a, b, angle="deg", clockwise=False), boxes1, boxes2
        )
    return _image_by_image(lambda a, b: ops.box_iou(a, b, fmt), boxes1, boxes2)


def generalized_box_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """``torchvision.ops.generalized_box_iou``: see :func:`fastzoo.ops.generalized_box_iou`."""
    return _image_by_image(ops.generalized_box_iou, boxes1, boxes2)


def distance_box_iou(boxes1: Tensor, boxes2: Tensor, eps: float = 1e-7) -> Tensor:
    """``torchvision.ops.distance_box_iou``: see :func:`fastzoo.ops.distance_box_iou`."""
    return _image_by_image(lambda a, b: ops.distance_box_iou(a, b, eps), boxes1, boxes2)


def complete_box_iou(boxes1: Tensor, boxes2: Tensor, eps: float = 1e-7) -> Tensor:
    """``torchvision.ops.complete_box_iou``: see :func:`fastzoo.ops.complete_box_iou`."""
    return _image_by_image(lambda a, b: ops.complete_box_iou(a, b, eps), boxes1, boxes2)


def _loss(
    loss: Callable[..., Tensor], boxes1: Tensor, boxes2: Tensor, reduction: str, eps: float
) -> Tensor:
    """A loss of boxes ``[..., 4]``; their mean of no boxes is 0."""
    each = loss(boxes1.reshape(-1, 4), boxes2.reshape(-1, 4), "none", eps)
    if reduction == "none":
        return each.reshape(boxes1.shape[:-1])
    if reduction == "mean":
        return each.mean() if each.numel() else 0.0 * each.sum()
    if reduction == "sum":
        return each.sum()
    raise ValueError(f"reduction: expected 'none', 'mean' or 'sum', got {reduction!r}")


def generalized_box_iou_loss(
    boxes1: Tensor, boxes2: Tensor, reduction: str = "none", eps: float = 1e-7
) -> Tensor:
    """``torchvision.ops.generalized_box_iou_loss``:
    see :func:`fastzoo.ops.generalized_box_iou_loss`."""
    return _loss(ops.generalized_box_iou_loss, boxes1, boxes2, reduction, eps)


def distance_box_iou_loss(
    boxes1: Tensor, boxes2: Tensor, reduction: str = "none", eps: float = 1e-7
) -> Tensor:
    """``torchvision.ops.distance_box_iou_loss``: see :func:`fastzoo.ops.distance_box_iou_loss`."""
    return _loss(ops.distance_box_iou_loss, boxes1, boxes2, reduction, eps)


def complete_box_iou_loss(
    boxes1: Tensor, boxes2: Tensor, reduction: str = "none", eps: float = 1e-7
) -> Tensor:
    """``torchvision.ops.complete_box_iou_loss``: see :func:`fastzoo.ops.complete_box_iou_loss`."""
    return _loss(ops.complete_box_iou_loss, boxes1, boxes2, reduction, eps)


def _wide(boxes: Tensor) -> Tensor:
    """Half precision as float32, small integers as int32: areas would overflow."""
    if boxes.is_floating_point():
        return boxes if boxes.dtype in (torch.float32, torch.float64) else boxes.float()
    return boxes if boxes.dtype in (torch.int32, torch.int64) else boxes.int()


def box_area(boxes: Tensor, fmt: str = "xyxy") -> Tensor:
    """``torchvision.ops.box_area``: areas of boxes ``[..., 4]``; a ``fmt`` of :func:`box_convert`
    without angle."""
    if fmt not in FORMATS:
        raise ValueError(f"fmt: expected one of {FORMATS}, got {fmt!r}")
    boxes = _wide(boxes)
    sides = boxes[..., 2:] - boxes[..., :2] if fmt == "xyxy" else boxes[..., 2:]
    return sides[..., 0] * sides[..., 1]


def _side_by_side(boxes: Tensor, in_fmt: str, out_fmt: str) -> Tensor:
    """Of boxes along the axes, by way of their corners."""
    first, second = boxes[..., :2], boxes[..., 2:]
    low, high = {
        "xyxy": (first, second),
        "xywh": (first, first + second),
        "cxcywh": (first - second / 2, first + second / 2),
    }[in_fmt]
    if out_fmt == "xyxy":
        return torch.cat([low, high], -1)
    return torch.cat([low if out_fmt == "xywh" else (low + high) / 2, high - low], -1)


def _turned_axes(degrees: Tensor) -> tuple[Tensor, Tensor]:
    """Unit vectors ``[..., 2]`` along the width and down the height, where y points down."""
    radians = degrees * math.pi / 180
    cos, sin = torch.cos(radians), torch.sin(radians)
    return torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)


def _turned_around(boxes: Tensor, in_fmt: str, out_fmt: str) -> Tensor:
    """Of rotated boxes, by way of their first corner."""
    if in_fmt == "xyxyxyxy":
        corner, top, bottom = boxes[..., :2], boxes[..., 2:4], boxes[..., 4:6]
        width, height = (top - corner).norm(dim=-1), (bottom - top).norm(dim=-1)
        x, y = (top - corner).unbind(-1)
        degrees = torch.atan2(-y, x) * 180 / math.pi
    else:
        corner, (width, height, degrees) = boxes[..., :2], boxes[..., 2:].unbind(-1)
    along, down = _turned_axes(degrees)
    across, deep = along * width[..., None], down * height[..., None]
    if in_fmt == "cxcywhr":
        corner = corner - across / 2 - deep / 2
    if out_fmt == "xyxyxyxy":
        corners = corner, corner + across, corner + across + deep, corner + deep
        return torch.cat(corners, -1)
    if out_fmt == "cxcywhr":
        corner = corner + across / 2 + deep / 2
    return torch.cat([corner, torch.stack([width, height, degrees], -1)], -1)


def box_convert(boxes: Tensor, in_fmt: str, out_fmt: str) -> Tensor:
    """``torchvision.ops.box_convert`` of boxes ``[..., K]``.

    Between ``xyxy``, ``xywh`` and ``cxcywh``, and between the rotated ``xywhr``, ``cxcywhr`` and
    ``xyxyxyxy``: angles in degrees counter-clockwise, x and y of the corner that is top left before
    the turn, corners from there clockwise.
    """
    for known, convert in ((FORMATS, _side_by_side), (_ROTATED, _turned_around)):
        if in_fmt in known and out_fmt in known:
            return boxes.clone() if in_fmt == out_fmt else convert(boxes, in_fmt, out_fmt)
    raise ValueError(
        f"in_fmt, out_fmt: expected two of {FORMATS} or two of {_ROTATED}, got "
        f"{in_fmt!r} and {out_fmt!r}"
    )


def clip_boxes_to_image(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """``torchvision.ops.clip_boxes_to_image``: boxes ``[..., 4]`` within a ``size`` of
    (height, width)."""
    height, width = size
    x, y = boxes[..., 0::2].clamp(0, width), boxes[..., 1::2].clamp(0, height)
    return torch.stack([x, y], -1).reshape(boxes.shape)


def remove_small_boxes(boxes: Tensor, min_size: float) -> Tensor:
    """``torchvision.ops.remove_small_boxes``: indices of the boxes ``[N, 4]`` whose sides are both
    at least ``min_size``."""
    return ((boxes[:, 2:] - boxes[:, :2]) >= min_size).all(1).nonzero()[:, 0]


def masks_to_boxes(masks: Tensor) -> Tensor:
    """``torchvision.ops.masks_to_boxes``: float32 ``[N, 4]`` of masks ``[N, H, W]``, the first and
    the last column and row with an element that is not 0.

    An empty mask gives zeros, where theirs raises.
    """
    n, height, width = masks.shape
    if masks.numel() == 0:
        return torch.zeros(n, 4, device=masks.device)
    marked = masks != 0
    edges = []
    for line, length in ((marked.any(1), width), (marked.any(2), height)):
        first = line.byte().argmax(1)
        last = length - 1 - line.flip(1).byte().argmax(1)
        edges.append(torch.stack([first, last], 1) * line.any(1, keepdim=True))
    return torch.stack(edges, 2).flatten(1).float()


def enable() -> None:
    """Run ``torchvision::nms`` on fastzoo, process-wide, until :func:`disable`.

    A device type on which fastzoo would only have its reference keeps torchvision's kernel.
    Calling it again changes nothing.

    Raises:
        RuntimeError: torchvision is not installed or lacks its compiled operators, or fastzoo has
            no kernel to put in their place.
    """
    global _library
    if _library is not None:
        return
    try:
        importlib.import_module("torchvision")
    except ImportError as error:
        raise RuntimeError(
            f"fastzoo.compat.torchvision: {error} (pip install torchvision)"
        ) from error
    if not hasattr(torch.ops.torchvision, "nms"):
        raise RuntimeError(
            "fastzoo.compat.torchvision: this torchvision was imported without its compiled "
            "operators: there is no torchvision::nms to replace"
        )
    operator = OPERATORS["nms"]
    keys = [key for device, key in _REPLACED_ON.items() if operator.owner(device) != "reference"]
    if not keys:
        raise RuntimeError(
            "fastzoo.compat.torchvision: no kernel to replace torchvision's with: "
            f"{operator.refusal('cpu', 'cpu')}"
        )
    _library = torch.library.Library("torchvision", "IMPL")
    with warnings.catch_warnings():
        # torch warns that a kernel is overridden: that is what was asked for.
        warnings.filterwarnings("ignore", message="(?s).*Overriding a previously registered kernel")
        for key in keys:
            _library.impl("nms", nms, key, allow_override=True)


def disable() -> None:
    """Give ``torchvision::nms`` its own kernels back."""
    global _library
    if _library is not None:
        _library._destroy()
        _library = None
