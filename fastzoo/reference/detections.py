"""What a dense detector does after its head: decoding, selection, suppression, padding."""

import dataclasses
import math

import torch
from torch import Tensor

from fastzoo.reference.exact import exponential, sigmoid
from fastzoo.reference.nms import batched_nms, falling_order, nms
from fastzoo.reference.precision import compute_dtype

GRID_FORMS = ("yolov3", "yolov5", "yolox")


@dataclasses.dataclass(frozen=True)
class Deltas:
    """Offsets from anchors, as Faster R-CNN and RetinaNet have them.

    With an anchor's centre ``(x, y)`` and sides ``(w, h)``, and ``t`` the head's output over
    ``weights``: the centre is ``(x + t0 w, y + t1 h)`` and the sides
    ``(w exp(min(t2, clip)), h exp(min(t3, clip)))``.

    Args:
        anchors: ``[N, 4]`` as (x1, y1, x2, y2).
        weights: by which the offsets were multiplied in training.
        clip: the largest logarithm of a ratio of sides.
    """

    anchors: Tensor
    weights: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0)
    clip: float = math.log(1000 / 16)


@dataclasses.dataclass(frozen=True)
class Distances:
    """Distances from points to the four sides, as FCOS has them.

    ``(x - t0 s, y - t1 s, x + t2 s, y + t3 s)``.

    Args:
        points: ``[N, 2]``.
        strides: ``[N]``, the unit of the distances; None where it is 1.
    """

    points: Tensor
    strides: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class Grid:
    """Offsets within the cells of a grid, as the YOLO family has them.

    With the cell ``(x, y)``, its stride ``s``, the anchor's sides ``(w, h)`` and ``g`` the
    logistic function, the centre and the sides are

    ====== ============================================== ==================================
    form   centre                                         sides
    ====== ============================================== ==================================
    yolov3 ``((x + g(t0)) s, (y + g(t1)) s)``             ``(w exp(t2), h exp(t3))``
    yolov5 ``((x + 2 g(t0) - .5) s, (y + 2 g(t1) - .5) s)`` ``(w (2 g(t2))^2, h (2 g(t3))^2)``
    yolox  ``((x + t0) s, (y + t1) s)``                   ``(s exp(t2), s exp(t3))``
    ====== ============================================== ==================================

    Args:
        cells: ``[N, 2]``, column and row of each cell.
        strides: ``[N]``, pixels a cell.
        anchors: ``[N, 2]``, sides in pixels; None for yolox, which has none.
        form: one of the above.
    """

    cells: Tensor
    strides: Tensor
    anchors: Tensor | None = None
    form: str = "yolov3"


Decoder = Deltas | Distances | Grid


def priors_of(decoder: Decoder) -> Tensor:
    """The tensors of a decoder as one, ``[N, 4]``, ``[N, 3]`` or ``[N, 5]``."""
    if isinstance(decoder, Deltas):
        return decoder.anchors
    if isinstance(decoder, Distances):
        strides = decoder.strides
        if strides is None:
            strides = torch.ones_like(decoder.points[:, 0])
        return torch.cat([decoder.points, strides[:, None]], 1)
    sides = decoder.anchors
    if sides is None:
        sides = decoder.strides[:, None].expand(-1, 2)
    return torch.cat([decoder.cells, decoder.strides[:, None], sides], 1)


def decode_boxes(
    offsets: Tensor,
    priors: Tensor,
    decode: str,
    weights: tuple[float, float, float, float],
    clip: float,
) -> Tensor:
    """Boxes ``[..., 4]`` of a head's output ``[..., 4]`` and priors ``[..., 3 to 5]``, broadcast.

    In float64, rounded once: the twin of ``decode_box`` in csrc/math/detections.h.

    Args:
        decode: ``deltas``, ``distances``, a form of :class:`Grid`, or empty, where the offsets
            are boxes.
        weights, clip: of :class:`Deltas`.
    """
    dtype = compute_dtype(offsets)
    if not decode:
        return offsets.to(dtype)
    t0, t1, t2, t3 = offsets.double().unbind(-1)
    prior = priors.double().unbind(-1)
    if decode == "distances":
        x, y, stride = prior
        corners = x - t0 * stride, y - t1 * stride, x + t2 * stride, y + t3 * stride
        return torch.stack(corners, -1).to(dtype)
    if decode == "deltas":
        x1, y1, x2, y2 = prior
        w, h = x2 - x1, y2 - y1
        x = x1 + 0.5 * w + t0 / weights[0] * w
        y = y1 + 0.5 * h + t1 / weights[1] * h
        w = w * exponential((t2 / weights[2]).clamp(max=clip))
        h = h * exponential((t3 / weights[3]).clamp(max=clip))
    else:
        column, row, stride, w, h = prior
        if decode == "yolov5":
            x, y = (2 * sigmoid(t0) - 0.5 + column) * stride, (2 * sigmoid(t1) - 0.5 + row) * stride
            twice_w, twice_h = 2 * sigmoid(t2), 2 * sigmoid(t3)
            w, h = w * (twice_w * twice_w), h * (twice_h * twice_h)
        else:
            if decode == "yolov3":
                t0, t1 = sigmoid(t0), sigmoid(t1)
            x, y = (t0 + column) * stride, (t1 + row) * stride
            w, h = w * exponential(t2), h * exponential(t3)
    corners = x - 0.5 * w, y - 0.5 * h, x + 0.5 * w, y + 0.5 * h
    return torch.stack(corners, -1).to(dtype)


def multiclass_nms(
    boxes: Tensor,
    scores: Tensor,
    priors: Tensor,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See :func:`fastzoo.ops.multiclass_nms`; -1 stands for no limit, ``priors`` may be empty."""
    images, _, classes = scores.shape
    dtype = compute_dtype(boxes)
    num = torch.zeros(images, dtype=torch.int64, device=boxes.device)
    padded_boxes = torch.zeros(images, max_detections, 4, dtype=dtype, device=boxes.device)
    padded_scores = torch.zeros(images, max_detections, dtype=dtype, device=boxes.device)
    labels = torch.full((images, max_detections), -1, device=boxes.device)
    indices = torch.full((images, max_detections), -1, device=boxes.device)
    weights = weight_x, weight_y, weight_w, weight_h
    for image in range(images):
        flat = scores[image].flatten().to(dtype)
        order = falling_order(flat)
        order = order[flat[order].double() > score_threshold]
        if pre_top_k >= 0:
            order = order[:pre_top_k]
        place, label = order // max(1, classes), order % max(1, classes)
        offsets = boxes[image][place] if boxes.dim() == 3 else boxes[image][place, label]
        decoded = decode_boxes(offsets, priors[place] if decode else priors, decode, weights, clip)
        if class_agnostic:
            kept = nms(decoded, flat[order], iou_threshold)
        else:
            kept = batched_nms(decoded, flat[order], label, iou_threshold)
        if max_per_class >= 0:
            kept = kept[rank_in_class(label[kept]) < max_per_class]
        kept = kept[:max_detections]
        n = len(kept)
        num[image] = n
        padded_boxes[image, :n] = decoded[kept]
        padded_scores[image, :n] = flat[order[kept]]
        labels[image, :n] = label[kept]
        indices[image, :n] = place[kept]
    return num, padded_boxes, padded_scores, labels, indices


def rank_in_class(labels: Tensor) -> Tensor:
    """How many earlier elements are equal to each."""
    order = torch.argsort(labels, stable=True)
    ordered = labels[order]
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(labels), device=labels.device) - torch.searchsorted(
        ordered, ordered
    )
    return rank


def peak_nms(heatmap: Tensor, kernel: int, top_k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`fastzoo.ops.peak_nms`."""
    images, _, height, width = heatmap.shape
    reach = kernel // 2
    padded = torch.nn.functional.pad(heatmap.double(), [reach] * 4, value=-torch.inf)
    peak = torch.ones_like(heatmap, dtype=torch.bool)
    for dy in range(kernel):
        for dx in range(kernel):
            peak &= heatmap.double() >= padded[..., dy : dy + height, dx : dx + width]
    scores = heatmap.new_zeros(images, top_k)
    labels, ys, xs = torch.full((3, images, top_k), -1, device=heatmap.device)
    for image in range(images):
        cells = peak[image].flatten().nonzero()[:, 0]
        values = heatmap[image].flatten()[cells]
        best = falling_order(values)[:top_k]
        n, cell = len(best), cells[best]
        scores[image, :n] = values[best]
        labels[image, :n] = cell // (height * width)
        ys[image, :n] = cell // width % height
        xs[image, :n] = cell % width
    return scores, labels.clone(), ys.clone(), xs.clone()
