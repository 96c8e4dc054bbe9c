"""How much boxes overlap: the definitions."""

import math

import torch
from torch import Tensor

from fastzoo.reference.contrastive import reduce
from fastzoo.reference.exact import sine_cosine
from fastzoo.reference.precision import compute_dtype

MEASURES = ("iou", "giou", "diou", "ciou")
FORMATS = ("xyxy", "xywh", "cxcywh")


def to_corners(boxes: Tensor, fmt: str) -> Tensor:
    """Boxes ``[..., 4]`` of a format of :data:`FORMATS` as (x1, y1, x2, y2)."""
    if fmt not in FORMATS:
        raise ValueError(f"fmt: expected one of {FORMATS}, got {fmt!r}")
    if fmt == "xyxy":
        return boxes
    first, sides = boxes[..., :2], boxes[..., 2:]
    if fmt == "cxcywh":
        first = first - sides / 2
    return torch.cat([first, first + sides], -1)


def box_area(boxes: Tensor) -> Tensor:
    """Areas of ``[..., 4]`` boxes (x1, y1, x2, y2)."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    return (x2 - x1) * (y2 - y1)


def box_intersection(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Areas that ``[..., 4]`` boxes share, broadcast."""
    low = torch.maximum(boxes1[..., :2], boxes2[..., :2])
    high = torch.minimum(boxes1[..., 2:], boxes2[..., 2:])
    width, height = (high - low).clamp(min=0).unbind(-1)
    return width * height


def box_overlap(boxes1: Tensor, boxes2: Tensor, measure: str, pairwise: bool, eps: float) -> Tensor:
    """``[N, M]`` if ``pairwise``, else ``[N]``: one of :data:`MEASURES` of two sets of boxes.

    ``eps`` is added to the denominators, to the union however only in the losses, which are not
    pairwise: so torchvision has it.
    """
    boxes1, boxes2 = (b.to(compute_dtype(b)) for b in (boxes1, boxes2))
    if pairwise:
        boxes1, boxes2 = boxes1[:, None], boxes2[None]
    intersection = box_intersection(boxes1, boxes2)
    union = box_area(boxes1) + box_area(boxes2) - intersection
    iou = intersection / (union if pairwise else union + eps)
    if measure == "iou":
        return iou
    width, height = _hull(boxes1, boxes2)
    if measure == "giou":
        hull = width * height
        return iou - (hull - union) / (hull + eps)
    dx, dy = _between_centres(boxes1, boxes2)
    diou = iou - (dx * dx + dy * dy) / (width * width + height * height + eps)
    if measure == "diou":
        return diou
    _, v, alpha = _aspects_apart(boxes1, boxes2, iou, eps)
    return diou - alpha * v


def _hull(boxes1: Tensor, boxes2: Tensor) -> tuple[Tensor, Tensor]:
    """Width and height of the box around both."""
    low = torch.minimum(boxes1[..., :2], boxes2[..., :2])
    high = torch.maximum(boxes1[..., 2:], boxes2[..., 2:])
    width, height = (high - low).unbind(-1)
    return width, height


def _between_centres(boxes1: Tensor, boxes2: Tensor) -> tuple[Tensor, Tensor]:
    centres1, centres2 = ((b[..., :2] + b[..., 2:]) / 2 for b in (boxes1, boxes2))
    dx, dy = (centres1 - centres2).unbind(-1)
    return dx, dy


def _aspect(boxes: Tensor) -> Tensor:
    width, height = (boxes[..., 2:] - boxes[..., :2]).unbind(-1)
    return torch.atan(width / height)


def _aspects_apart(
    boxes1: Tensor, boxes2: Tensor, iou: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The difference of the aspects, its square brought into [0, 1], and the weight of that, which
    is held constant."""
    difference = _aspect(boxes2) - _aspect(boxes1)
    v = 4 / math.pi**2 * (difference * difference)
    return difference, v, (v / (1 - iou + v + eps)).detach()


def box_overlap_backward(
    grad: Tensor, boxes1: Tensor, boxes2: Tensor, measure: str, pairwise: bool, eps: float
) -> tuple[Tensor, Tensor]:
    """Gradients of both sets of boxes, given that of :func:`box_overlap`.

    Of equal arguments of a minimum or a maximum each gets half.
    """
    dtypes = boxes1.dtype, boxes2.dtype
    boxes1, boxes2 = (b.to(compute_dtype(b)) for b in (boxes1, boxes2))
    if pairwise:
        boxes1, boxes2 = boxes1[:, None], boxes2[None]
    intersection = box_intersection(boxes1, boxes2)
    union = box_area(boxes1) + box_area(boxes2) - intersection
    padded = union if pairwise else union + eps
    iou = intersection / padded
    # What the measure changes by with the union, the hull's sides, the centres' distance along x
    # and y, and the difference of the aspects.
    by_union = -grad * iou / padded
    by_hull = by_centre = by_aspect = None
    if measure == "giou":
        width, height = _hull(boxes1, boxes2)
        hull = width * height + eps
        by_union = by_union + grad / hull
        shrinking = -grad * (union + eps) / (hull * hull)
        by_hull = shrinking * height, shrinking * width
    elif measure != "iou":
        width, height = _hull(boxes1, boxes2)
        dx, dy = _between_centres(boxes1, boxes2)
        diagonal = width * width + height * height + eps
        growing = 2 * grad * (dx * dx + dy * dy) / (diagonal * diagonal)
        by_hull = growing * width, growing * height
        by_centre = -2 * grad * dx / diagonal, -2 * grad * dy / diagonal
    if measure == "ciou":
        difference, _, alpha = _aspects_apart(boxes1, boxes2, iou, eps)
        by_aspect = -8 / math.pi**2 * grad * alpha * difference
    by_intersection = grad / padded - by_union

    def of(own: Tensor, other: Tensor, sign: int) -> Tensor:
        """The gradient of one side of the pair; differences are other minus own for sign -1."""
        sides = (own[..., 2:] - own[..., :2]).unbind(-1)
        shared = torch.minimum(own[..., 2:], other[..., 2:]) - torch.maximum(
            own[..., :2], other[..., :2]
        )
        lows, highs = [], []
        for axis in (0, 1):
            across = 1 - axis
            low, other_low = own[..., axis], other[..., axis]
            high, other_high = own[..., axis + 2], other[..., axis + 2]
            by_shared = torch.where(
                shared[..., axis] >= 0, by_intersection * shared[..., across].clamp(min=0), 0
            )
            by_side = by_union * sides[across]
            if by_aspect is not None:
                square = sides[0] * sides[0] + sides[1] * sides[1]
                turn = (sides[1] if axis == 0 else -sides[0]) / square
                by_side = by_side - sign * by_aspect * turn
            by_low = -_passed(by_shared, low, other_low) - by_side
            by_high = _passed(by_shared, other_high, high) + by_side
            if by_hull is not None:
                by_low = by_low - _passed(by_hull[axis], other_low, low)
                by_high = by_high + _passed(by_hull[axis], high, other_high)
            if by_centre is not None:
                by_low = by_low + sign * by_centre[axis] / 2
                by_high = by_high + sign * by_centre[axis] / 2
            lows.append(by_low)
            highs.append(by_high)
        return torch.stack(lows + highs, -1)

    first, second = of(boxes1, boxes2, 1), of(boxes2, boxes1, -1)
    if pairwise:
        first, second = first.sum(1), second.sum(0)
    return first.to(dtypes[0]), second.to(dtypes[1])


def _passed(grad: Tensor, larger: Tensor, smaller: Tensor) -> Tensor:
    """The gradient where the first is the larger, half of it where they are equal."""
    return torch.where(larger > smaller, grad, torch.where(larger == smaller, grad / 2, 0))


def rotated_columns(boxes: Tensor, degrees: bool) -> dict[str, Tensor]:
    """What the overlap needs of ``[..., 5]`` boxes (cx, cy, width, height, angle), in float64."""
    x, y, width, height, angle = boxes.double().unbind(-1)
    sine, cosine = sine_cosine(angle, degrees)
    return {
        "x": x,
        "y": y,
        "width": width,
        "height": height,
        "angle": angle,
        "sine": sine,
        "cosine": cosine,
        "radius": torch.sqrt(width * width + height * height) * 0.5,
        "area": width * height + 0 * (x + y + angle),
    }


def rotated_iou(first: dict[str, Tensor], second: dict[str, Tensor]) -> Tensor:
    """Intersection over union of rotated boxes, broadcast, in float64 and within [0, 1].

    Put into the order of :func:`_precedes`, so that it is symmetric to the last bit. In the frame
    in which the second box lies along the axes, its half sides being ``w`` and ``h``, the shared
    area is the sum over the edges of the first of the integral of ``clamp(y, -h, h) dx`` within
    ``-w <= x <= w``: no list of corners, no sorting, and nothing that a rounding can turn over.
    """
    swapped = _precedes(second, first)
    a = {name: torch.where(swapped, second[name], first[name]) for name in first}
    b = {name: torch.where(swapped, first[name], second[name]) for name in first}
    dx, dy = a["x"] - b["x"], a["y"] - b["y"]
    reach = a["radius"] + b["radius"]
    equal = a["angle"] == b["angle"]
    sine = torch.where(equal, 0.0, a["sine"] * b["cosine"] - a["cosine"] * b["sine"])
    cosine = torch.where(equal, 1.0, a["cosine"] * b["cosine"] + a["sine"] * b["sine"])
    x = dx * b["cosine"] + dy * b["sine"]
    y = dy * b["cosine"] - dx * b["sine"]
    ux, uy = a["width"] * 0.5 * cosine, a["width"] * 0.5 * sine
    vx, vy = -(a["height"] * 0.5 * sine), a["height"] * 0.5 * cosine
    corners = [
        (x - ux - vx, y - uy - vy),
        (x + ux - vx, y + uy - vy),
        (x + ux + vx, y + uy + vy),
        (x - ux + vx, y - uy + vy),
    ]
    w, h = b["width"] * 0.5, b["height"] * 0.5
    edges = zip(corners, corners[1:] + corners[:1], strict=True)
    area = torch.zeros_like(x)
    for p, q in edges:
        area = area + _area_under_edge(*p, *q, w, h)
    smaller = _minimum(a["area"], b["area"])
    shared = _maximum(torch.zeros_like(x), _minimum(-area, smaller))
    apart = dx * dx + dy * dy > reach * reach
    whole = (a["width"] > 0) & (a["height"] > 0) & (b["width"] > 0) & (b["height"] > 0)
    shared = torch.where(apart | ~whole, 0.0, shared)
    return shared / (first["area"] + second["area"] - shared)


def _area_under_edge(
    px: Tensor, py: Tensor, qx: Tensor, qy: Tensor, w: Tensor, h: Tensor
) -> Tensor:
    """The integral of ``clamp(y, -h, h) dx`` along the edge from p to q, where ``|x| <= w``."""
    x0, x1 = _within(px, w), _within(qx, w)
    slope = (qy - py) / (qx - px)
    y0, y1 = py + slope * (x0 - px), py + slope * (x1 - px)
    low, high = _minimum(y0, y1), _maximum(y0, y1)
    start, stop = _within(low, h), _within(high, h)
    mean = (start + stop) * 0.5
    # Where the edge leaves the band, the parts outside count with the band's edge.
    outside = (stop - start) * 0.5 * (((high - stop) - (start - low)) / (high - low))
    mean = torch.where(start != stop, mean + outside, mean)
    return torch.where(x0 == x1, 0.0, (x1 - x0) * mean)


def _minimum(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(b < a, b, a)


def _maximum(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(a < b, b, a)


def _within(x: Tensor, limit: Tensor) -> Tensor:
    return _maximum(-limit, _minimum(x, limit))


def _precedes(a: dict[str, Tensor], b: dict[str, Tensor]) -> Tensor:
    """A strict order of boxes."""
    before = a["y"] < b["y"]
    for name in ("x", "angle", "height", "width"):
        before = torch.where(a[name] != b[name], a[name] < b[name], before)
    return before


def box_iou_rotated(boxes1: Tensor, boxes2: Tensor, degrees: bool, pairwise: bool) -> Tensor:
    """``[N, M]`` if ``pairwise``, else ``[N]``; see :func:`fastzoo.ops.box_iou_rotated`."""
    dtype = compute_dtype(boxes1)
    if pairwise:
        boxes1, boxes2 = boxes1[:, None], boxes2[None]
    return rotated_iou(rotated_columns(boxes1, degrees), rotated_columns(boxes2, degrees)).to(dtype)


def box_iou(boxes1: Tensor, boxes2: Tensor, fmt: str = "xyxy") -> Tensor:
    """See :func:`fastzoo.ops.box_iou`."""
    return box_overlap(to_corners(boxes1, fmt), to_corners(boxes2, fmt), "iou", True, 0.0)


def generalized_box_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """See :func:`fastzoo.ops.generalized_box_iou`."""
    return box_overlap(boxes1, boxes2, "giou", True, 0.0)


def distance_box_iou(boxes1: Tensor, boxes2: Tensor, eps: float = 1e-7) -> Tensor:
    """See :func:`fastzoo.ops.distance_box_iou`."""
    return box_overlap(boxes1, boxes2, "diou", True, eps)


def complete_box_iou(boxes1: Tensor, boxes2: Tensor, eps: float = 1e-7) -> Tensor:
    """See :func:`fastzoo.ops.complete_box_iou`."""
    return box_overlap(boxes1, boxes2, "ciou", True, eps)


def generalized_box_iou_loss(
    boxes1: Tensor, boxes2: Tensor, reduction: str = "none", eps: float = 1e-7
) -> Tensor:
    """See :func:`fastzoo.ops.generalized_box_iou_loss`."""
    return reduce(1 - box_overlap(boxes1, boxes2, "giou", False, eps), reduction)


def distance_box_iou_loss(
    boxes1: Tensor, boxes2: Tensor, reduction: str = "none", eps: float = 1e-7
) -> Tensor:
    """See :func:`fastzoo.ops.distance_box_iou_loss`."""
    return reduce(1 - box_overlap(boxes1, boxes2, "diou", False, eps), reduction)


def complete_box_iou_loss(
    boxes1: Tensor, boxes2: Tensor, reduction: str = "none", eps: float = 1e-7
) -> Tensor:
    """See :func:`fastzoo.ops.complete_box_iou_loss`."""
    return reduce(1 - box_overlap(boxes1, boxes2, "ciou", False, eps), reduction)
