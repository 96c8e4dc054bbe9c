"""Non-maximum suppression: boxes by falling score, an overlap, and a rule for what overlaps."""

import torch
from torch import Tensor

from fastzoo import reference
from fastzoo.ops._checks import (
    at_most,
    check_choice,
    check_floating,
    check_same,
    check_tensor,
)
from fastzoo.ops._operator import Operator
from fastzoo.ops.boxes import check_boxes, turned
from fastzoo.reference.precision import compute_dtype

_WITHOUT_TRITON = ("reference", "cpu", "cuda")
SOFT_METHODS = ("linear", "gaussian", "hard")
MATRIX_METHODS = ("gaussian", "linear")


def _dynamic(like: Tensor, *dtypes: torch.dtype) -> tuple[Tensor, ...]:
    """Results of one length, which depends on the values."""
    kept = torch.library.get_ctx().new_dynamic_size()
    return tuple(like.new_empty(kept, dtype=dtype) for dtype in dtypes)


def _fake_nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    return _dynamic(boxes, torch.int64)[0]


_NMS = Operator(
    "nms(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor",
    reference=reference.nms,
    fake=_fake_nms,
    triton="nms.nms",
    autocast=torch.float32,
)


def _fake_batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    return _dynamic(boxes, torch.int64)[0]


_BATCHED_NMS = Operator(
    "batched_nms(Tensor boxes, Tensor scores, Tensor idxs, float iou_threshold) -> Tensor",
    reference=reference.batched_nms,
    fake=_fake_batched_nms,
    triton="nms.batched_nms",
    autocast=torch.float32,
)


def _fake_suppress(
    boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float, overlap: str, match: bool
) -> tuple[Tensor, Tensor]:
    (keep,) = _dynamic(boxes, torch.int64)
    return keep, boxes.new_empty(boxes.shape[0] if match else 0, dtype=torch.int64)


_SUPPRESS = Operator(
    "suppress(Tensor boxes, Tensor scores, Tensor idxs, float iou_threshold, str overlap,"
    " bool match) -> (Tensor, Tensor)",
    public=("nms_match", "nms_rotated"),
    reference=reference.suppress,
    fake=_fake_suppress,
    has=_WITHOUT_TRITON,
    autocast=torch.float32,
)


def _fake_soft_nms(boxes: Tensor, *args: object) -> tuple[Tensor, ...]:
    return _dynamic(boxes, torch.int64, compute_dtype(boxes))


_SOFT_NMS = Operator(
    "soft_nms(Tensor boxes, Tensor scores, Tensor idxs, str method, float iou_threshold,"
    " float sigma, float score_threshold, int max_detections) -> (Tensor, Tensor)",
    reference=reference.soft_nms,
    fake=_fake_soft_nms,
    has=_WITHOUT_TRITON,
    autocast=torch.float32,
)

_MATRIX_NMS = Operator(
    "matrix_nms(Tensor boxes, Tensor scores, Tensor idxs, str method, float sigma,"
    " float score_threshold, int max_detections) -> (Tensor, Tensor)",
    reference=reference.matrix_nms,
    fake=_fake_soft_nms,
    has=_WITHOUT_TRITON,
    autocast=torch.float32,
)


def _check(boxes: Tensor, scores: Tensor, columns: int = 4, name: str = "boxes") -> None:
    check_boxes(name, boxes, columns)
    check_tensor("scores", scores, "[N]", 1)
    if scores.shape[0] != boxes.shape[0]:
        raise ValueError(f"scores: expected {boxes.shape[0]}, one a box, got {list(scores.shape)}")
    check_floating("scores", scores)
    check_same(name, boxes, "scores", scores)


def _segments(idxs: Tensor | None, boxes: Tensor) -> Tensor:
    """int64 ``[N]``, or ``[0]`` for one segment."""
    if idxs is None:
        return torch.empty(0, dtype=torch.int64, device=boxes.device)
    check_tensor("idxs", idxs, "[N]", 1)
    if idxs.shape[0] != boxes.shape[0]:
        raise ValueError(f"idxs: expected {boxes.shape[0]}, one a box, got {list(idxs.shape)}")
    if idxs.dtype.is_floating_point or idxs.dtype.is_complex:
        raise TypeError(f"idxs: expected integers, got {idxs.dtype}")
    if idxs.device != boxes.device:
        raise ValueError(f"idxs: expected the device of boxes, {boxes.device}, got {idxs.device}")
    return idxs.to(torch.int64)


def _check_method(method: str, known: tuple[str, ...], sigma: float) -> None:
    check_choice("method", method, known)
    if not 0 < sigma < float("inf"):
        raise ValueError(f"sigma: expected a positive number, got {sigma}")


def nms(
    boxes: Tensor, scores: Tensor, iou_threshold: float, *, backend: str | None = None
) -> Tensor:
    """Greedy non-maximum suppression, as ``torchvision.ops.nms``.

    Boxes are visited by falling score; one is dropped if a box kept before it overlaps it by an
    intersection over union strictly greater than ``iou_threshold``.

    Every backend returns the same indices bit for bit:

    - equal scores (-0 equals +0) are visited by lower index; NaN scores last;
    - overlaps are computed in float32 (float64 for float64 boxes), one rounding an operation, and
      compared with the threshold in double precision;
    - a box with a NaN coordinate neither suppresses nor is suppressed;
    - an inverted or empty box has intersection 0 with every box, and 0/0 suppresses nothing: with
      ``iou_threshold >= 0`` it is always kept.

    Args:
        boxes: ``[N, 4]`` as (x1, y1, x2, y2); float32, float64, float16 or bfloat16.
        scores: ``[N]``, dtype and device of ``boxes``.
        iou_threshold: any float; NaN suppresses nothing.
        backend: ``auto``, ``reference``, ``cpu``, ``cuda`` or ``triton``; None follows
            :func:`fastzoo.use_backend`.

    Returns:
        int64 indices of the kept boxes, by falling score.

    Gradient: none, the result is integer. Deterministic. On a GPU the number of kept boxes is
    read once (one synchronisation). Under autocast it computes in float32.

    Raises:
        TypeError, ValueError: an argument of the wrong kind; the message names it.
        RuntimeError: a forced backend that cannot run, with the reason.

    Source: greedy NMS with the strict comparison of torchvision.ops.nms.
    """
    _check(boxes, scores)
    result: Tensor = _NMS.choose(backend, boxes.device.type)(boxes, scores, float(iou_threshold))
    return result


def batched_nms(
    boxes: Tensor,
    scores: Tensor,
    idxs: Tensor,
    iou_threshold: float,
    *,
    backend: str | None = None,
) -> Tensor:
    """:func:`nms` within each segment, as ``torchvision.ops.batched_nms``.

    Boxes of different ``idxs`` (classes, images, or both in one number) do not overlap. Segments
    are told apart by their numbers, not by moving boxes away from each other, so the answer is
    right for coordinates that are negative, huge or infinite, in half precision, and for any
    number of segments.

    Args:
        boxes: ``[N, 4]`` as (x1, y1, x2, y2); float32, float64, float16 or bfloat16.
        scores: ``[N]``, dtype and device of ``boxes``.
        idxs: ``[N]`` integers, any values.
        iou_threshold: any float; NaN suppresses nothing.
        backend: as of :func:`nms`.

    Returns:
        int64 indices of the kept boxes, by falling score over all segments.

    Gradient, determinism, edges and errors: as :func:`nms`.

    Source: torchvision.ops.batched_nms.
    """
    _check(boxes, scores)
    segments = _segments(idxs if isinstance(idxs, Tensor) else torch.as_tensor(idxs), boxes)
    overload = _BATCHED_NMS.choose(backend, boxes.device.type)
    result: Tensor = overload(boxes, scores, segments, float(iou_threshold))
    return result


def nms_1d(
    segments: Tensor,
    scores: Tensor,
    iou_threshold: float,
    *,
    idxs: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """:func:`nms` of intervals, for temporal detection.

    An interval is a box of height 1, whose overlaps are those of the interval to the last bit.

    Args:
        segments: ``[N, 2]`` as (start, end); float32, float64, float16 or bfloat16.
        scores: ``[N]``, dtype and device of ``segments``.
        iou_threshold: any float; NaN suppresses nothing.
        idxs: ``[N]`` integers: intervals of different numbers do not overlap. None for one set.
        backend: as of :func:`nms`.

    Returns:
        int64 indices of the kept intervals, by falling score.

    Gradient, determinism, edges and errors: as :func:`nms`.
    """
    _check(segments, scores, 2, "segments")
    low = torch.zeros_like(segments[:, :1])
    boxes = torch.cat([segments[:, :1], low, segments[:, 1:], low + 1], 1)
    if idxs is None:
        return nms(boxes, scores, iou_threshold, backend=backend)
    return batched_nms(boxes, scores, idxs, iou_threshold, backend=backend)


def nms_rotated(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float,
    *,
    idxs: Tensor | None = None,
    angle: str = "rad",
    clockwise: bool = True,
    backend: str | None = None,
) -> Tensor:
    """:func:`nms` of rotated boxes, whose overlap is that of :func:`box_iou_rotated`, in float64.

    Args:
        boxes: ``[N, 5]`` as (cx, cy, width, height, angle); float32, float64, float16 or bfloat16.
        scores: ``[N]``, dtype and device of ``boxes``.
        iou_threshold: any float; NaN suppresses nothing.
        idxs: ``[N]`` integers: boxes of different numbers do not overlap. None for one set.
        angle: its unit, ``rad`` or ``deg``.
        clockwise: which way it turns, as seen in an image, where y points down. mmcv has radians
            clockwise; torchvision degrees counter-clockwise.
        backend: ``auto``, ``reference``, ``cpu`` or ``cuda``; None follows
            :func:`fastzoo.use_backend`.

    Returns:
        int64 indices of the kept boxes, by falling score.

    A box with a number that is not finite neither suppresses nor is suppressed. Gradient,
    determinism and errors: as :func:`nms`.
    """
    _check(boxes, scores, 5)
    overlap = "rotated_degrees" if angle == "deg" else "rotated"
    overload = _SUPPRESS.choose(backend, boxes.device.type)
    segments = _segments(idxs, boxes)
    keep: Tensor = overload(
        turned(boxes, angle, clockwise), scores, segments, float(iou_threshold), overlap, False
    )[0]
    return keep


def nms_match(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float,
    *,
    idxs: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`nms`, and for every box which kept box it goes with.

    Args:
        boxes: ``[N, 4]`` as (x1, y1, x2, y2); float32, float64, float16 or bfloat16.
        scores: ``[N]``, dtype and device of ``boxes``.
        iou_threshold: any float; NaN suppresses nothing.
        idxs: ``[N]`` integers: boxes of different numbers do not overlap. None for one set.
        backend: ``auto``, ``reference``, ``cpu`` or ``cuda``; None follows
            :func:`fastzoo.use_backend`.

    Returns:
        ``keep``, int64 indices of the kept boxes, by falling score, and ``group``, int64 ``[N]``:
        the position in ``keep`` of the first kept box, the one of highest score, that suppresses
        a box; of a kept box its own.

    Gradient, determinism, edges and errors: as :func:`nms`.
    """
    _check(boxes, scores)
    overload = _SUPPRESS.choose(backend, boxes.device.type)
    segments = _segments(idxs, boxes)
    keep, group = overload(boxes, scores, segments, float(iou_threshold), "aligned", True)
    return keep, group


def weighted_nms(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float,
    *,
    idxs: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`nms_match`, and each group's mean box, weighted by the scores: box voting.

    Args:
        boxes, scores, iou_threshold, idxs, backend: as of :func:`nms_match`. Scores are to be
            positive: they are the weights.

    Returns:
        ``keep``, int64 ``[kept]``, and ``[kept, 4]`` in float32 (float64 for float64 boxes): the
        mean of the boxes that go with each kept box, itself included, summed in float64. Of a
        group whose weights do not add up to a positive number it is the kept box itself.

    Gradient: none. Deterministic. Edges and errors: as :func:`nms`.

    Source: Gidaris and Komodakis, Object detection via a multi-region CNN (2015), section 4, with
    each box voting once.
    """
    keep, group = nms_match(boxes, scores, iou_threshold, idxs=idxs, backend=backend)
    return keep, reference.vote(boxes.detach(), scores.detach(), keep, group)


def soft_nms(
    boxes: Tensor,
    scores: Tensor,
    *,
    method: str = "linear",
    iou_threshold: float = 0.3,
    sigma: float = 0.5,
    score_threshold: float = 0.001,
    max_detections: int | None = None,
    idxs: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Soft-NMS: a box that is taken lowers the scores of those that it overlaps.

    The remaining box of the highest score is taken (of equal ones the lower index), and all others
    are multiplied with a factor of their intersection over union ``o`` with it:

    - ``linear``: ``1 - o`` where ``o > iou_threshold``, else 1;
    - ``gaussian``: ``exp(-o^2 / sigma)``;
    - ``hard``: 0 where ``o > iou_threshold``, else 1;

    until no score is above ``score_threshold``. Every backend gives the sequence itself, and the
    same bits: the factor is rounded once to the scores' precision, from an exponential that is the
    same everywhere. A NaN score is never taken, and a NaN overlap lowers nothing.

    Args:
        boxes: ``[N, 4]`` as (x1, y1, x2, y2); float32, float64, float16 or bfloat16.
        scores: ``[N]``, dtype and device of ``boxes``.
        method: one of the above.
        iou_threshold: of the linear and hard methods.
        sigma: of the gaussian method, positive.
        score_threshold: at least 0.
        max_detections: the most boxes to take; None for no limit.
        idxs: ``[N]`` integers: boxes of different numbers do not overlap. None for one set.
        backend: ``auto``, ``reference``, ``cpu`` or ``cuda``; None follows
            :func:`fastzoo.use_backend`.

    Returns:
        ``keep``, int64 indices in the order in which boxes were taken, and their scores then, in
        float32 (float64 for float64 inputs).

    Gradient: none. Deterministic. On a GPU one size is read. Under autocast it computes in float32.

    Raises:
        TypeError, ValueError: an argument of the wrong kind; the message names it.
        RuntimeError: a forced backend that cannot run, with the reason.

    Source: Bodla et al., Soft-NMS (2017), equations 1 and 3 and figure 2.
    """
    _check(boxes, scores)
    _check_method(method, SOFT_METHODS, sigma)
    if not score_threshold >= 0:
        raise ValueError(f"score_threshold: expected at least 0, got {score_threshold}")
    overload = _SOFT_NMS.choose(backend, boxes.device.type)
    keep, lowered = overload(
        boxes.detach(),
        scores.detach(),
        _segments(idxs, boxes),
        method,
        float(iou_threshold),
        float(sigma),
        float(score_threshold),
        at_most("max_detections", max_detections),
    )
    return keep, lowered


def matrix_nms(
    boxes: Tensor,
    scores: Tensor,
    *,
    method: str = "gaussian",
    sigma: float = 2.0,
    score_threshold: float = 0.0,
    max_detections: int | None = None,
    idxs: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Matrix NMS: every score is lowered at once, by the worst of the better boxes.

    With ``o_ij`` the intersection over union of box ``i`` and a later one ``j`` in the order of
    falling scores, and ``m_i`` the largest of ``i`` with an earlier one, the factor of ``j`` is

    - ``gaussian``: ``min(1, min_i exp(sigma (m_i^2 - o_ij^2)))``;
    - ``linear``: ``min(1, min_i (1 - o_ij) / (1 - m_i))``.

    A NaN overlap, or 0/0, lowers nothing. The N x N matrix is not stored.

    Args:
        boxes: ``[N, 4]`` as (x1, y1, x2, y2); float32, float64, float16 or bfloat16.
        scores: ``[N]``, dtype and device of ``boxes``.
        method: one of the above.
        sigma: of the gaussian method, positive.
        score_threshold: boxes whose lowered score is above it are returned.
        max_detections: the most boxes to return; None for no limit.
        idxs: ``[N]`` integers: boxes of different numbers do not overlap. None for one set.
        backend: ``auto``, ``reference``, ``cpu`` or ``cuda``; None follows
            :func:`fastzoo.use_backend`.

    Returns:
        ``keep``, int64 indices by falling lowered score (of equal ones the lower index), and these
        scores in float32 (float64 for float64 inputs). Equal bit for bit on every backend.

    Gradient: none. Deterministic. On a GPU one size is read. Under autocast it computes in float32.

    Raises:
        TypeError, ValueError: an argument of the wrong kind; the message names it.
        RuntimeError: a forced backend that cannot run, with the reason.

    Source: Wang et al., SOLOv2 (2020), section 3.3, with boxes in the place of masks.
    """
    _check(boxes, scores)
    _check_method(method, MATRIX_METHODS, sigma)
    overload = _MATRIX_NMS.choose(backend, boxes.device.type)
    keep, lowered = overload(
        boxes.detach(),
        scores.detach(),
        _segments(idxs, boxes),
        method,
        float(sigma),
        float(score_threshold),
        at_most("max_detections", max_detections),
    )
    return keep, lowered
