"""mmcv's functions against loops over scalars, and against what mmcv documents of itself."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastzoo import ops
from fastzoo.compat import mmcv
from fastzoo.testing.boxes import random_boxes, rotated_boxes

Numbers = np.ndarray


def overlap(a: Numbers, b: Numbers, offset: float = 0) -> Any:
    """In float32, one operation after the other."""
    one, zero = np.float32(offset), np.float32(0)
    w = max(zero, min(a[2], b[2]) - max(a[0], b[0]) + one)
    h = max(zero, min(a[3], b[3]) - max(a[1], b[1]) + one)
    areas = [(x[2] - x[0] + one) * (x[3] - x[1] + one) for x in (a, b)]
    with np.errstate(invalid="ignore"):
        return w * h / (areas[0] + areas[1] - w * h)


def groups_of(
    boxes: Numbers, scores: Numbers, threshold: float, offset: int = 0, *, equal: bool
) -> list[list[int]]:
    """Each kept box with those that it suppresses; ``equal``: an overlap of the threshold does."""
    left = sorted(range(len(boxes)), key=lambda i: -scores[i])
    limit, found = np.float32(threshold), []
    while left:
        first, *rest = left
        found.append([first])
        left = []
        for i in rest:
            o = overlap(boxes[first], boxes[i], offset)
            (found[-1] if o > limit or (equal and o == limit) else left).append(i)
    return found


def lowered(
    boxes: Numbers, scores: Numbers, threshold: float, sigma: float, least: float, method: str
) -> list[tuple[int, float]]:
    """The sequence of soft-NMS in float32: which box is taken, with which score."""
    left = {i: score for i, score in enumerate(scores) if score >= np.float32(least)}
    taken = []
    while left:
        best = max(left, key=lambda i: (left[i], -i))
        taken.append((best, float(left.pop(best))))
        for i in list(left):
            o = overlap(boxes[best], boxes[i])
            if method == "gaussian":
                left[i] *= np.exp(-(o * o) / np.float32(sigma))
            elif o >= np.float32(threshold):
                left[i] *= np.float32(1) - o if method == "linear" else np.float32(0)
            if left[i] < np.float32(least):
                del left[i]
    return taken


def lattice(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Boxes of pixels, whose overlaps tie with thresholds; scores are all different."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.randint(0, 12, (n, 2), generator=generator).float()
    sides = torch.randint(1, 6, (n, 2), generator=generator).float()
    scores = torch.randperm(n, generator=generator).float().add(1) / n
    return torch.cat([corner, corner + sides], 1), scores


BOXES, SCORES = lattice(80, 0)
THRESHOLDS = (0.0, 0.2, 0.25, 0.3, 1 / 3, 0.5, 0.6, 1.0)


def check(dets: Any, inds: Any, given: Any, order: list[int], scores: Any) -> None:
    """``dets`` are the given boxes of these indices with these scores; both are of its kind."""
    assert type(dets) is type(inds) is type(given)
    assert (inds.dtype, dets.dtype) == (
        (np.int64, given.dtype) if isinstance(given, np.ndarray) else (torch.int64, given.dtype)
    )
    assert inds.tolist() == order
    assert dets.shape == (len(order), given.shape[1] + 1)
    assert dets[:, :-1].tolist() == given[order].tolist()
    assert dets[:, -1].tolist() == scores


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_nms(threshold: float, offset: int) -> None:
    boxes, scores = BOXES.numpy(), SCORES.numpy()
    kept = [g[0] for g in groups_of(boxes, scores, threshold, offset, equal=False)]
    check(*mmcv.nms(BOXES, SCORES, threshold, offset), BOXES, kept, SCORES[kept].tolist())
    check(*mmcv.nms(boxes, scores, threshold, offset), boxes, kept, scores[kept].tolist())
    strong = [i for i in kept if scores[i] > 0.9]
    for most in (-1, 3):
        wanted = strong[:most] if most > 0 else strong
        some = mmcv.nms(boxes, scores, threshold, offset, score_threshold=0.9, max_num=most)
        check(*some, boxes, wanted, scores[wanted].tolist())


def test_offset_matters_and_is_checked() -> None:
    assert len(mmcv.nms(BOXES, SCORES, 0.3, 1)[1]) < len(mmcv.nms(BOXES, SCORES, 0.3, 0)[1])
    with pytest.raises(ValueError, match="offset"):
        mmcv.nms(BOXES, SCORES, 0.3, 2)
    with pytest.raises(ValueError, match="offset"):
        mmcv.soft_nms(BOXES, SCORES, offset=-1)


def test_thresholds_are_float32() -> None:
    # Overlap 3 / 10, which in float32 is above 0.3, but is no longer above a threshold rounded too.
    boxes = torch.tensor([[0.0, 0, 6.5, 1], [3.5, 0, 10, 1]])
    scores = torch.tensor([0.9, 0.8])
    assert len(ops.nms(boxes, scores, 0.3)) == 1
    assert mmcv.nms(boxes, scores, 0.3)[1].tolist() == [0, 1]
    dets = torch.cat([boxes, scores[:, None]], 1)
    assert [m.tolist() for m in mmcv.nms_match(dets, 0.3)] == [[0, 1]]


@pytest.mark.parametrize("method", ["naive", "linear", "gaussian"])
@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_soft_nms(method: str, threshold: float) -> None:
    boxes, scores = BOXES.numpy(), SCORES.numpy()
    right = lowered(boxes, scores, threshold, 0.4, 0.05, method)
    given: tuple[tuple[Any, Any], ...] = ((boxes, scores), (BOXES, SCORES))
    for args in given:
        dets, inds = mmcv.soft_nms(args[0], args[1], threshold, 0.4, 0.05, method)
        found = dets[:, 4].tolist()
        check(dets, inds, args[0], [i for i, _ in right], found)
        # An exponential of another library, once for each box that was taken before.
        off = 0 if method != "gaussian" else len(right) * 2.0**-22
        assert found == pytest.approx([score for _, score in right], rel=off, abs=0)


def test_soft_nms_at_its_limits() -> None:
    # Overlap 1/2, which lowers 0.5 to 0.25.
    boxes = torch.tensor([[0.0, 0, 4, 3], [0, 1, 4, 4], [9, 9, 10, 10]])
    scores = torch.tensor([0.9, 0.5, 0.25])
    dets, inds = mmcv.soft_nms(boxes, scores, iou_threshold=0.5, min_score=0.25)
    assert inds.tolist() == [0, 1, 2]
    assert dets[:, 4].tolist() == pytest.approx([0.9, 0.25, 0.25])
    above = math.nextafter(0.25, 1) * (1 + 2**-20)
    assert mmcv.soft_nms(boxes, scores, iou_threshold=0.5, min_score=above)[1].tolist() == [0]
    assert mmcv.soft_nms(boxes, scores, min_score=0)[1].tolist() == [0, 1, 2]
    shifted = mmcv.soft_nms(boxes, scores, offset=1)[0]  # overlap 15 / 25
    assert shifted[:, 4].tolist() == pytest.approx([0.9, 0.25, 0.2])
    with pytest.raises(ValueError, match="method"):
        mmcv.soft_nms(boxes, scores, method="hard")


@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_nms_match(threshold: float) -> None:
    dets = torch.cat([BOXES, SCORES[:, None]], 1)
    right = groups_of(BOXES.numpy(), SCORES.numpy(), threshold, equal=True)
    found = mmcv.nms_match(dets, threshold)
    assert [m.tolist() for m in found] == right
    assert {m.dtype for m in found} == {torch.int64}
    numbers = mmcv.nms_match(dets.numpy(), threshold)
    assert [m.tolist() for m in numbers] == right
    assert {type(m) for m in numbers} == {np.ndarray}
    if threshold == 0.25:  # not the strict comparison
        assert right != groups_of(BOXES.numpy(), SCORES.numpy(), threshold, equal=False)


def test_nms_match_of_nothing_and_of_too_little() -> None:
    assert mmcv.nms_match(torch.empty(0, 5), 0.5) == []
    assert mmcv.nms_match(np.empty((0, 5), np.float32), 0.5) == []
    with pytest.raises(ValueError, match="dets"):
        mmcv.nms_match(BOXES, 0.5)


def polygon(box: list[float], clockwise: bool) -> Any:
    shapely = pytest.importorskip("shapely")
    x, y, w, h, angle = box
    c, s = math.cos(angle), math.sin(angle) * (1 if clockwise else -1)
    signs = ((-1, -1), (1, -1), (1, 1), (-1, 1))
    return shapely.Polygon(
        [(x + (u * w * c - v * h * s) / 2, y + (u * w * s + v * h * c) / 2) for u, v in signs]
    )


@pytest.mark.parametrize("clockwise", [True, False])
def test_nms_rotated(clockwise: bool) -> None:
    boxes, scores = rotated_boxes(60, extent=120, seed=3)
    labels = torch.arange(60) % 2
    shapes = [polygon(box, clockwise) for box in boxes.tolist()]
    for given in (None, labels, labels.float() / 4):
        kept: list[int] = []
        for i in sorted(range(60), key=lambda i: -scores[i]):
            rivals = [k for k in kept if given is None or given[k] == given[i]]
            shared = {k: shapes[k].intersection(shapes[i]).area for k in rivals}
            if all(
                shared[k] / (shapes[k].area + shapes[i].area - shared[k]) <= 0.2 for k in rivals
            ):
                kept.append(i)
        found = mmcv.nms_rotated(boxes, scores, 0.2, given, clockwise)
        check(*found, boxes, kept, scores[kept].tolist())
        assert 20 < len(kept) < 60


def test_nms_rotated_of_identical_boxes_and_of_none() -> None:
    box = torch.tensor([[3.0, 7.0, 10.0, 12.0, 0.3]]).expand(4, 5)
    assert mmcv.nms_rotated(box, torch.arange(4.0), 0.999)[1].tolist() == [3]
    dets, inds = mmcv.nms_rotated(torch.empty(0, 5), torch.empty(0), 0.5)
    assert (dets.shape, inds.shape) == ((0, 6), (0,))


def test_documented_examples() -> None:
    boxes = np.array(
        [
            [49.1, 32.4, 51.0, 35.9],
            [49.3, 32.9, 51.0, 35.3],
            [49.2, 31.8, 51.0, 35.4],
            [35.1, 11.5, 39.1, 15.7],
            [35.6, 11.8, 39.3, 14.2],
            [35.3, 11.5, 39.9, 14.5],
            [35.2, 11.7, 39.7, 15.7],
        ],
        dtype=np.float32,
    )
    scores = np.array([0.9, 0.9, 0.5, 0.5, 0.5, 0.4, 0.3], dtype=np.float32)
    assert len(mmcv.nms(boxes, scores, 0.6)[1]) == 3
    lines = np.array([[4, 3, 5, 3], [4, 3, 5, 4], *[[3, 1, 3, 1]] * 4], dtype=np.float32)
    scores = np.array([0.9, 0.9, 0.5, 0.5, 0.4, 0.0], dtype=np.float32)
    assert len(mmcv.soft_nms(lines, scores, 0.6, sigma=0.5)[1]) == 5
    rotated = [[6, 3, 8, 7, 0.5], [3, 6, 9, 11, 0.6], [3, 7, 10, 12, 0.3], [1, 4, 13, 7, 0.6]]
    levels = torch.tensor([0.7, 0.8, 0.5, 0.9])
    for sign, clockwise in ((1, True), (-1, False)):
        dets = torch.tensor(rotated) * torch.tensor([1, 1, 1, 1, sign])
        assert mmcv.nms_rotated(dets, levels, 0.5, clockwise=clockwise)[1].tolist() == [3, 1, 0]


IDXS = torch.arange(80) % 3
CLASSES = [torch.arange(80)[c::3] for c in range(3)]


@pytest.mark.parametrize(
    "config",
    [
        {"iou_threshold": 0.3},
        {"type": "nms", "iou_threshold": 0.3, "score_threshold": 0.3, "max_num": 20},
        {"type": "nms", "iou_threshold": 0.3, "split_thr": 10, "max_num": 20},
        {"type": "soft_nms", "iou_threshold": 0.3, "min_score": 0.1},
        {"type": "soft_nms", "sigma": 0.3, "method": "gaussian", "max_num": 9},
    ],
    ids=str,
)
def test_batched_nms(config: dict[str, Any]) -> None:
    for boxes in (BOXES, BOXES - 20):
        alone = dict(config)
        function = getattr(mmcv, alone.pop("type", "nms"))
        most = alone.pop("max_num", 80)
        alone.pop("split_thr", None)
        rows = []
        for own in CLASSES:
            dets, inds = function(boxes[own], SCORES[own], **alone)
            rows += [(float(d[4]), int(own[i])) for d, i in zip(dets, inds, strict=True)]
        rows = sorted(rows, key=lambda row: (-row[0], row[1]))[:most]
        found = mmcv.batched_nms(boxes, SCORES, IDXS, config)
        check(*found, boxes, [i for _, i in rows], [score for score, _ in rows])
        for agnostic in (
            mmcv.batched_nms(boxes, SCORES, IDXS, config, class_agnostic=True),
            mmcv.batched_nms(boxes, SCORES, IDXS, {**config, "class_agnostic": True}),
        ):
            dets, inds = function(boxes, SCORES, **alone)
            check(*agnostic, boxes, inds[:most].tolist(), dets[:most, 4].tolist())
            assert len(agnostic[1]) < len(rows) or len(rows) == most


def test_batched_nms_of_rotated_boxes_and_without_any() -> None:
    boxes, scores = rotated_boxes(80, extent=120, seed=4)
    config = {"type": "nms_rotated", "iou_threshold": 0.2, "clockwise": False}
    dets, inds = mmcv.nms_rotated(boxes, scores, 0.2, IDXS, clockwise=False)
    check(*mmcv.batched_nms(boxes, scores, IDXS, config), boxes, inds.tolist(), dets[:, 5].tolist())
    order = sorted(range(80), key=lambda i: -SCORES[i])
    found = mmcv.batched_nms(BOXES, SCORES, IDXS, None)
    check(*found, BOXES, order, SCORES[order].tolist())
    with pytest.raises(ValueError, match="nms_quadri"):
        mmcv.batched_nms(BOXES, SCORES, IDXS, {"type": "nms_quadri"})
    assert config["type"] == "nms_rotated"  # it is the caller's


def test_other_dtypes() -> None:
    boxes, scores = random_boxes(40, extent=80)
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        own = boxes.to(dtype), scores.to(dtype)
        for dets, inds in (mmcv.nms(*own, 0.5), mmcv.soft_nms(*own)):
            assert dets.dtype == dtype
            assert torch.equal(dets[:, :4], own[0][inds])
