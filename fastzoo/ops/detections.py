"""What a dense detector does after its head, for a whole batch and with fixed shapes."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastzoo import reference
from fastzoo.ops._checks import at_most, check_count, check_floating, check_same, check_tensor
from fastzoo.ops._operator import Operator
from fastzoo.reference.detections import GRID_FORMS, Decoder, Deltas, Distances, Grid, priors_of
from fastzoo.reference.precision import compute_dtype


class Detections(NamedTuple):
    """What :func:`multiclass_nms` finds in ``B`` images, at most ``M`` in each.

    Attributes:
        num: ``[B]``, how many.
        boxes: ``[B, M, 4]`` as (x1, y1, x2, y2); 0 beyond ``num``.
        scores: ``[B, M]``, falling; 0 beyond ``num``.
        labels: ``[B, M]``, classes; -1 beyond ``num``.
        indices: ``[B, M]``, which of the ``N`` locations; -1 beyond ``num``.
    """

    num: Tensor
    boxes: Tensor
    scores: Tensor
    labels: Tensor
    indices: Tensor


def _fake_multiclass_nms(
    boxes: Tensor, scores: Tensor, priors: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    shape = (scores.shape[0], args[-2])
    dtype = compute_dtype(boxes)
    return (
        boxes.new_empty(shape[0], dtype=torch.int64),
        boxes.new_empty((*shape, 4), dtype=dtype),
        boxes.new_empty(shape, dtype=dtype),
        boxes.new_empty(shape, dtype=torch.int64),
        boxes.new_empty(shape, dtype=torch.int64),
    )


_MULTICLASS_NMS = Operator(
    "multiclass_nms(Tensor boxes, Tensor scores, Tensor priors, str decode, float weight_x,"
    " float weight_y, float weight_w, float weight_h, float clip, float score_threshold,"
    " float iou_threshold, int pre_top_k, int max_per_class, int max_detections,"
    " bool class_agnostic) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=reference.multiclass_nms,
    fake=_fake_multiclass_nms,
    triton="detections.multiclass_nms",
    autocast=torch.float32,
)


def _fake_peak_nms(
    heatmap: Tensor, kernel: int, top_k: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = (heatmap.shape[0], top_k)
    labels, ys, xs = (heatmap.new_empty(shape, dtype=torch.int64) for _ in range(3))
    return heatmap.new_empty(shape), labels, ys, xs


_PEAK_NMS = Operator(
    "peak_nms(Tensor heatmap, int kernel, int top_k) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference.peak_nms,
    fake=_fake_peak_nms,
    triton="detections.peak_nms",
    has=("reference", "cpu", "triton"),
    cuda_owner="triton",
    autocast=torch.float32,
)


def multiclass_nms(
    boxes: Tensor,
    scores: Tensor,
    *,
    score_threshold: float,
    iou_threshold: float,
    pre_top_k: int | None = None,
    max_per_class: int | None = None,
    max_detections: int = 100,
    class_agnostic: bool = False,
    decode: Decoder | None = None,
    backend: str | None = None,
) -> Detections:
    """From a dense detector's output to its detections: threshold, selection, decoding, NMS, top.

    Of each image, the pairs of a location and a class whose score is above ``score_threshold`` are
    candidates; of these the ``pre_top_k`` best go on. They pass :func:`nms`, classes apart unless
    ``class_agnostic``; of each class the first ``max_per_class`` stay, and of the image the first
    ``max_detections``. Equal scores are ordered by location, then class. NaN scores are no
    candidates. The rules of :func:`nms` hold for the boxes' edges.

    Shapes do not depend on the values and nothing waits for the device, so a GPU goes on working,
    a CUDA graph can capture the call, and torch.export exports it. On a GPU it takes
    8 bytes a pair, and some 50 bytes a candidate, of which ``pre_top_k`` bounds the number.

    Args:
        boxes: ``[B, N, 4]`` as (x1, y1, x2, y2), or ``[B, N, C, 4]`` where each class has its own;
            with ``decode`` the head's raw output in their place. float32, float64, float16 or
            bfloat16.
        scores: ``[B, N, C]``, dtype and device of ``boxes``; no limit on their range.
        score_threshold: any float, compared in double precision.
        iou_threshold: any float; NaN suppresses nothing.
        pre_top_k: the most candidates of an image; None for no limit.
        max_per_class: the most detections of a class; None for no limit.
        max_detections: ``M``, the most detections of an image.
        class_agnostic: boxes of different classes suppress each other.
        decode: :class:`Deltas`, :class:`Distances` or :class:`Grid`: candidates are decoded, in
            float64, on the way. None where ``boxes`` are boxes.
        backend: ``auto``, ``reference``, ``cpu``, ``cuda`` or ``triton``; None follows
            :func:`fastzoo.use_backend`.

    Returns:
        :class:`Detections` by falling score; boxes and scores in float32 (float64 for float64
        inputs).

    Gradient: none. Deterministic, and equal bit for bit on every backend. Under autocast it
    computes in float32.

    Raises:
        TypeError, ValueError: an argument of the wrong kind; the message names it.
        RuntimeError: a forced backend that cannot run, with the reason.

    Source: the fixed shapes of TensorRT's EfficientNMS, with torchvision's greedy rule.
    """
    check_tensor("scores", scores, "[B, N, C]", 3)
    check_tensor("boxes", boxes, "[B, N, 4]", boxes.dim() if _has_rank(boxes, 3, 4) else 3)
    expected = (*scores.shape[: boxes.dim() - 1], 4)
    if tuple(boxes.shape) != expected:
        raise ValueError(
            f"boxes: expected shape {list(expected)} for scores {list(scores.shape)}, got "
            f"{list(boxes.shape)}"
        )
    check_floating("boxes", boxes)
    check_floating("scores", scores)
    check_same("boxes", boxes, "scores", scores)
    priors = boxes.new_empty(0, dtype=compute_dtype(boxes))
    form, weights, clip = "", (1.0, 1.0, 1.0, 1.0), 0.0
    if decode is not None:
        form, priors = _check_decoder(decode, boxes)
        if isinstance(decode, Deltas):
            weights, clip = decode.weights, decode.clip
    overload = _MULTICLASS_NMS.choose(backend, boxes.device.type)
    found = overload(
        boxes.detach(),
        scores.detach(),
        priors,
        form,
        *(float(weight) for weight in weights),
        float(clip),
        float(score_threshold),
        float(iou_threshold),
        at_most("pre_top_k", pre_top_k),
        at_most("max_per_class", max_per_class),
        check_count("max_detections", max_detections),
        class_agnostic,
    )
    return Detections(*found)


def _has_rank(value: object, *ranks: int) -> bool:
    return isinstance(value, Tensor) and value.dim() in ranks


def _check_decoder(decode: Decoder, boxes: Tensor) -> tuple[str, Tensor]:
    """The name of its form, and its tensors as one ``[N, P]`` in the precision computed in."""
    n = boxes.shape[1]
    parts: dict[str, tuple[Tensor, tuple[int, ...]]]
    if isinstance(decode, Deltas):
        form, parts = "deltas", {"anchors": (decode.anchors, (n, 4))}
        if len(decode.weights) != 4:
            raise ValueError(f"decode.weights: expected 4 numbers, got {len(decode.weights)}")
    elif isinstance(decode, Distances):
        form, parts = "distances", {"points": (decode.points, (n, 2))}
        if decode.strides is not None:
            parts["strides"] = decode.strides, (n,)
    elif isinstance(decode, Grid):
        form = decode.form
        if form not in GRID_FORMS:
            raise ValueError(f"decode.form: expected one of {GRID_FORMS}, got {form!r}")
        if (decode.anchors is None) != (form == "yolox"):
            needed = "no anchors" if form == "yolox" else "anchors"
            raise ValueError(f"decode.anchors: {form} has {needed}")
        parts = {"cells": (decode.cells, (n, 2)), "strides": (decode.strides, (n,))}
        if decode.anchors is not None:
            parts["anchors"] = decode.anchors, (n, 2)
    else:
        raise TypeError(
            f"decode: expected Deltas, Distances, Grid or None, got {type(decode).__name__}"
        )
    for name, (tensor, shape) in parts.items():
        check_tensor(f"decode.{name}", tensor, str(list(shape)), len(shape))
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"decode.{name}: expected shape {list(shape)}, got {list(tensor.shape)}"
            )
        if tensor.device != boxes.device:
            raise ValueError(
                f"decode.{name}: expected the device of boxes, {boxes.device}, got {tensor.device}"
            )
    return form, priors_of(decode).detach().to(compute_dtype(boxes))


def peak_nms(
    heatmap: Tensor, kernel: int = 3, top_k: int = 100, *, backend: str | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The best local maxima of each image's heatmap, for detectors of points (CenterNet).

    A cell is a peak if it is not below any cell of the ``kernel x kernel`` window around it, in
    its own class; every cell of a plateau is one. A comparison with NaN does not hold, so NaN and
    the cells around it are no peaks. Equal peaks are ordered by class, then row, then column.

    Args:
        heatmap: ``[B, C, H, W]``; float32, float64, float16 or bfloat16.
        kernel: side of the window, odd.
        top_k: ``K``, the most peaks of an image.
        backend: ``auto``, ``reference``, ``cpu`` or ``triton``; None follows
            :func:`fastzoo.use_backend`.

    Returns:
        ``scores`` in the heatmap's dtype, falling, and int64 ``labels``, ``ys``, ``xs``, each
        ``[B, K]``; 0, -1, -1, -1 beyond the last peak.

    Gradient: none. Deterministic. Nothing waits for the device.

    Raises:
        TypeError, ValueError: an argument of the wrong kind; the message names it.
        RuntimeError: a forced backend that cannot run, with the reason.

    Source: Zhou et al., Objects as Points (2019), section 4.
    """
    check_tensor("heatmap", heatmap, "[B, C, H, W]", 4)
    check_floating("heatmap", heatmap)
    if isinstance(kernel, bool) or not isinstance(kernel, int) or kernel < 1 or kernel % 2 == 0:
        raise ValueError(f"kernel: expected an odd number, at least 1, got {kernel!r}")
    check_count("top_k", top_k)
    scores, labels, ys, xs = _PEAK_NMS.choose(backend, heatmap.device.type)(
        heatmap.detach(), kernel, top_k
    )
    return scores, labels, ys, xs
