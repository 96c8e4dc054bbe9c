"""nms against independent oracles, and the edges that belong to it alone."""

import ctypes
import functools
import itertools
import os

import cv2
import numpy as np
import pytest
import torch

from fastzoo import _native, ops, reference
from fastzoo.ops._operator import OPERATORS
from fastzoo.testing.boxes import random_boxes, rotated_boxes
from fastzoo.testing.nms import clustered_boxes, samples, threshold_pairs
from fastzoo.testing.tolerance import assert_same_outputs
from tests.conftest import DEVICE, EMULATOR
from tests.ops.test_boxes import polygon

BACKENDS = [b for b in ("cpu", "cuda", "triton") if OPERATORS["nms"].refusal(b, DEVICE) is None]
ALL = ["reference", *BACKENDS]
RULES = [b for b in ALL if b in OPERATORS["suppress"].has]  # of the side operators


def greedy(boxes: np.ndarray, scores: np.ndarray, threshold: float) -> list[int]:
    """The definition once more, in scalar numpy arithmetic of the boxes' own precision."""
    one = boxes.dtype.type
    order = sorted(
        range(len(scores)),
        key=lambda i: (np.isnan(scores[i]), 0.0 if np.isnan(scores[i]) else -scores[i], i),
    )
    kept: list[int] = []
    with np.errstate(all="ignore"):
        areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in boxes]
        for i in order:
            for j in kept:
                width = max(one(0), min(boxes[i][2], boxes[j][2]) - max(boxes[i][0], boxes[j][0]))
                height = max(one(0), min(boxes[i][3], boxes[j][3]) - max(boxes[i][1], boxes[j][1]))
                inter = width * height
                if float(inter / (areas[j] + areas[i] - inter)) > threshold:
                    break
            else:
                kept.append(i)
    return kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_reference_is_the_greedy_definition(dtype: torch.dtype) -> None:
    checked = 0
    for sample in samples(dtype):
        boxes, scores, threshold = sample.args
        expected = greedy(boxes.numpy(), scores.numpy(), threshold)
        assert reference.nms(boxes, scores, threshold).tolist() == expected, sample.name
        checked += 1
    assert checked > 30


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_threshold_is_strict_and_compared_in_double(backend: str) -> None:
    boxes = torch.tensor([[0.0, 0, 4, 1], [2, 0, 4, 1], [0, 0, 1, 3], [0, 0, 1, 10]], device=DEVICE)
    half, third = boxes[:2], boxes[2:]
    scores = torch.tensor([0.9, 0.8], device=DEVICE)

    def kept(pair: torch.Tensor, threshold: float) -> int:
        return len(ops.nms(pair, scores, threshold, backend=backend))

    assert kept(half, 0.5) == 2
    assert kept(half, np.nextafter(0.5, 0.0)) == 1
    # 3/10 in float32 lies above the double 0.3, and is not above itself.
    assert float(np.float32(0.3)) > 0.3
    assert kept(third, 0.3) == 1
    assert kept(third, float(np.float32(0.3))) == 2


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_order_of_special_scores(backend: str) -> None:
    nan, inf = float("nan"), float("inf")
    scores = torch.tensor([nan, 0.0, -inf, 3.0, -0.0, inf, nan, 3.0, -1.0], device=DEVICE)
    corner = torch.arange(9.0, device=DEVICE)[:, None] * 10
    boxes = torch.cat([corner, corner, corner + 1, corner + 1], 1)
    assert ops.nms(boxes, scores, 0.5, backend=backend).tolist() == [5, 3, 7, 1, 4, 8, 2, 0, 6]


def test_like_opencv() -> None:
    for seed in range(5):
        boxes, scores = random_boxes(400, extent=300, seed=seed)
        boxes = boxes.round()
        xywh = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1)
        expected = cv2.dnn.NMSBoxes(xywh.int().tolist(), scores.tolist(), 0.0, 0.437)
        assert ops.nms(boxes, scores, 0.437).tolist() == list(expected)


def test_every_instruction_set_keeps_the_same(capability: str) -> None:
    sets = [clustered_boxes(40, 30, seed=5), random_boxes(2000, seed=6)]
    dtypes = [torch.float32, torch.float64]
    for (boxes, scores), dtype, threshold in itertools.product(sets, dtypes, [0.0, 0.3, 0.5, 0.9]):
        case = boxes.to(dtype), scores.to(dtype), threshold
        assert torch.equal(ops.nms(*case, backend="cpu"), reference.nms(*case)), capability


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("threshold", [0.07, 0.1, 0.25, 0.3, 0.45, 0.5, 0.6, 0.75, 0.9])
def test_no_overlap_at_the_threshold_is_missed(threshold: float, transposed: bool) -> None:
    boxes, scores = threshold_pairs(900, threshold, seed=1)
    if transposed:
        boxes = boxes[:, [1, 0, 3, 2]]
    expected = reference.nms(boxes, scores, threshold)
    assert 950 < len(expected) < 1700  # both sides of the threshold are there
    for dtype in (torch.float32, torch.float64):
        found = ops.nms(boxes.to(dtype), scores.to(dtype), threshold, backend="cpu")
        exact = reference.nms(boxes.to(dtype), scores.to(dtype), threshold)
        assert torch.equal(found, exact), dtype


@pytest.mark.parametrize("seed", range(3))
def test_boxes_of_every_scale_among_one_another(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scale = 10 ** (torch.rand(1500, 1, generator=generator) * 7 - 3)
    corner = (torch.rand(1500, 2, generator=generator) * 6 - 3) * scale
    sides = (torch.rand(1500, 2, generator=generator) * 0.7 + 0.3) * scale
    boxes = torch.cat([corner, corner + sides], 1)
    boxes[::50] = torch.nan
    boxes[1::50, 2:] = torch.inf
    boxes[2::50] *= 1e-30
    boxes[3::50] += 1e6
    scores = torch.rand(1500, generator=generator)
    for threshold in (0.1, 0.3, 0.5, 0.8):
        expected = reference.nms(boxes, scores, threshold)
        assert torch.equal(ops.nms(boxes, scores, threshold, backend="cpu"), expected)


@pytest.mark.skipif(DEVICE == "cuda", reason="the emulator is for machines without a GPU")
@pytest.mark.parametrize("order", ["forward", "reverse", "random:1", "random:2"])
def test_any_order_of_threads_keeps_the_same(order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTZOO_EMULATOR_ORDER", order)
    for boxes, scores in (random_boxes(300, seed=8), clustered_boxes(10, 40, seed=8)):
        expected = reference.nms(boxes, scores, 0.5)
        assert torch.equal(ops.nms(boxes, scores, 0.5, backend="cuda"), expected)


@pytest.mark.skipif(DEVICE == "cuda", reason="the emulator is for machines without a GPU")
@pytest.mark.parametrize("order", ["forward", "random:1"])
@pytest.mark.parametrize("segments", [1, 2])
def test_many_boxes_are_lowered_in_any_order_of_threads(
    segments: int, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # More boxes in a segment than a block has threads, and few levels of scores.
    monkeypatch.setenv("FASTZOO_EMULATOR_ORDER", order)
    boxes, scores = clustered_boxes(20, 70, seed=8)
    scores = (scores * 50).round() / 50
    idxs = torch.arange(len(boxes)) % segments
    soft = functools.partial(ops.soft_nms, boxes, scores, idxs=idxs, max_detections=40)
    for method in ("linear", "gaussian"):
        right = soft(method=method, backend="reference")
        assert_same_outputs(soft(method=method, backend="cuda"), right, context=method)
    matrix = functools.partial(ops.matrix_nms, boxes, scores, idxs=idxs)
    assert_same_outputs(matrix(backend="cuda"), matrix(backend="cpu"))


def test_cuda_reads_the_count_once() -> None:
    library = ctypes.CDLL(os.fspath(EMULATOR) if DEVICE == "cpu" else _native.library("_C_cuda"))
    library.fastzoo_cuda_sync_count.restype = ctypes.c_int64
    boxes, scores = (t.to(DEVICE) for t in random_boxes(300))
    idxs = torch.arange(300, device=DEVICE) % 5
    rotated = torch.cat([boxes, scores[:, None]], 1)
    for call in (
        functools.partial(ops.nms, boxes, scores, 0.5),
        functools.partial(ops.batched_nms, boxes, scores, idxs, 0.5),
        functools.partial(ops.nms_match, boxes, scores, 0.5),
        functools.partial(ops.nms_rotated, rotated, scores, 0.5),
        functools.partial(ops.soft_nms, boxes, scores, max_detections=20),
        functools.partial(ops.matrix_nms, boxes, scores),
    ):
        before = library.fastzoo_cuda_sync_count()
        call(backend="cuda")
        assert library.fastzoo_cuda_sync_count() == before + 1


def test_triton_reads_the_count_once(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = 0
    item = torch.Tensor.item

    def counted(self: torch.Tensor) -> float:
        nonlocal reads
        reads += self.device.type == DEVICE
        return item(self)

    boxes, scores = (t.to(DEVICE) for t in random_boxes(40))
    # round_down reads a tensor of its own, on the CPU whatever the boxes' device: count without.
    from fastzoo.kernels import nms as kernels_nms

    monkeypatch.setattr(kernels_nms, "round_down", lambda threshold, dtype: threshold)
    monkeypatch.setattr(torch.Tensor, "item", counted)
    ops.nms(boxes, scores, 0.5, backend="triton")
    assert reads == 1


def test_many_boxes_need_no_square() -> None:
    boxes, scores = random_boxes(100_000, extent=20_000)
    kept = ops.nms(boxes, scores, 0.5)
    again = ops.nms(boxes[kept], scores[kept], 0.5)
    assert torch.equal(again, torch.arange(len(kept)))  # nothing kept suppresses anything kept
    assert 50_000 < len(kept) < 100_000


def iou(a: np.ndarray, b: np.ndarray) -> np.floating:
    """Of two boxes, in the boxes' own precision."""
    zero = a.dtype.type(0)
    width = max(zero, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(zero, min(a[3], b[3]) - max(a[1], b[1]))
    areas = [(c[2] - c[0]) * (c[3] - c[1]) for c in (a, b)]
    inter = width * height
    with np.errstate(all="ignore"):
        return inter / (areas[0] + areas[1] - inter)


def crowd(n: int, seed: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    boxes, scores = random_boxes(n, extent=120, seed=seed)
    return boxes.to(DEVICE, dtype), scores.to(DEVICE, dtype)


@pytest.mark.parametrize("backend", ALL)
def test_segments_are_suppressed_one_by_one(backend: str) -> None:
    boxes, scores = crowd(150, 1)
    idxs = torch.arange(150, device=DEVICE) * 13 % 7 - 3
    kept = torch.cat([
        own[ops.nms(boxes[own], scores[own], 0.3, backend="reference")]
        for own in ((idxs == segment).nonzero()[:, 0] for segment in idxs.unique())
    ])  # fmt: skip
    expected = kept[scores[kept].argsort(descending=True)]
    assert torch.equal(ops.batched_nms(boxes, scores, idxs, 0.3, backend=backend), expected)
    assert len(ops.nms(boxes, scores, 0.3, backend=backend)) < len(expected) < 150


@pytest.mark.parametrize("backend", ALL)
def test_segments_need_no_room_between_coordinates(backend: str) -> None:
    # Moving the boxes of a class by its number times the largest coordinate fails on each of these.
    same = torch.tensor([[-50.0, -50, -10, -10]] * 2, device=DEVICE)
    scores = torch.tensor([0.9, 0.8], device=DEVICE)
    for boxes, ids in (
        (same, [0, 1]),  # negative: the offset is, too
        (same * 1e30, [0, 1]),
        (same + 60, [0, 2**62]),
        ((same + 60).half(), [0, 60_000]),
        (torch.tensor([[0.0, 0, torch.inf, 5]] * 2, device=DEVICE), [0, 1]),
    ):
        idxs = torch.tensor(ids, device=DEVICE)
        apart = ops.batched_nms(boxes, scores.to(boxes), idxs, 0.5, backend=backend)
        assert apart.tolist() == [0, 1]
    together = ops.batched_nms(same, scores, torch.tensor([5, 5], device=DEVICE), 0.5)
    assert together.tolist() == [0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", RULES)
def test_every_box_goes_with_the_first_that_suppresses_it(backend: str, dtype: torch.dtype) -> None:
    boxes, scores = crowd(120, 2, dtype)
    keep, group = ops.nms_match(boxes, scores, 0.2, backend=backend)
    own = boxes.cpu().numpy()
    assert torch.equal(keep, ops.nms(boxes, scores, 0.2))
    kept = keep.tolist()
    for i in range(len(own)):
        if i in kept:
            expected = kept.index(i)
        else:
            expected = next(k for k, j in enumerate(kept) if iou(own[j], own[i]) > 0.2)
        assert group[i] == expected
    _, merged = ops.weighted_nms(boxes, scores, 0.2, backend=backend)
    weights = scores.cpu().double().numpy()
    for k in range(len(kept)):
        members = (group == k).cpu().numpy()
        mean = (own[members] * weights[members, None]).sum(0) / weights[members].sum()
        # One rounding to the result's precision, of a mean in float64.
        tolerance = 1e-12 if dtype == torch.float64 else 2.0**-23
        np.testing.assert_allclose(merged[k].cpu().numpy(), mean, rtol=tolerance)
    assert merged.dtype == dtype


def test_votes_of_no_weight_leave_the_kept_box() -> None:
    boxes = torch.tensor([[0.0, 0, 4, 4], [0, 0, 4, 5]])
    keep, merged = ops.weighted_nms(boxes, torch.zeros(2), 0.5)
    assert keep.tolist() == [0]
    assert torch.equal(merged, boxes[:1])


def soft_sequence(
    boxes: np.ndarray, scores: np.ndarray, method: str, threshold: float, least: float
) -> tuple[list[int], list[float]]:
    """Soft-NMS as its paper's figure 2 has it, one pair at a time, in the scores' precision."""
    left, order, taken = dict(enumerate(scores)), [], []
    while left:
        best = max(left, key=lambda i: (left[i], -i))
        if not float(left[best]) > least:
            break
        order.append(best)
        taken.append(float(left.pop(best)))
        for i in left:
            o = iou(boxes[best], boxes[i])
            if method == "gaussian":
                left[i] = left[i] * scores.dtype.type(np.exp(-(float(o) ** 2) / 0.5))
            elif float(o) > threshold:
                left[i] = left[i] * (scores.dtype.type(1) - o if method == "linear" else 0)
    return order, taken


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", ["linear", "gaussian", "hard"])
@pytest.mark.parametrize("backend", RULES)
def test_soft_nms_is_the_sequence(backend: str, method: str, dtype: torch.dtype) -> None:
    for seed, n in enumerate((40, 90)):
        boxes, scores = crowd(n, seed, dtype)
        keep, lowered = ops.soft_nms(
            boxes, scores, method=method, iou_threshold=0.2, score_threshold=0.01, backend=backend
        )
        sequence = soft_sequence(boxes.cpu().numpy(), scores.cpu().numpy(), method, 0.2, 0.01)
        # numpy's exponential may differ from ours in its last bit, and so may a score each time.
        assert keep.tolist() == sequence[0]
        rtol = n * torch.finfo(dtype).eps if method == "gaussian" else 0.0
        np.testing.assert_allclose(lowered.cpu().numpy(), sequence[1], rtol=rtol)
        assert 5 < len(keep) < n


@pytest.mark.parametrize("backend", RULES)
def test_soft_nms_that_is_hard_keeps_what_nms_keeps(backend: str) -> None:
    boxes, scores = crowd(100, 3)
    keep, lowered = ops.soft_nms(boxes, scores, method="hard", iou_threshold=0.4, backend=backend)
    assert torch.equal(keep, ops.nms(boxes, scores, 0.4)[: len(keep)])
    assert torch.equal(lowered, scores[keep])


def test_soft_nms_at_opencv() -> None:
    boxes, scores = random_boxes(60, extent=80, seed=4)
    boxes = boxes.round()
    sides = boxes[:, 2:] - boxes[:, :2]
    rectangles = torch.cat([boxes[:, :2], sides], 1).int().tolist()
    lowered, keep = cv2.dnn.softNMSBoxes(
        rectangles, scores.tolist(), 0.05, 0.3, 0, 0.5, cv2.dnn.SOFT_NMSMETHOD_SOFTNMS_GAUSSIAN
    )
    found, own = ops.soft_nms(boxes, scores, method="gaussian", sigma=0.5, score_threshold=0.05)
    assert found.tolist() == keep.tolist()
    np.testing.assert_allclose(own.numpy(), lowered, rtol=1e-5)


def matrix_scores(boxes: np.ndarray, scores: np.ndarray, method: str, sigma: float) -> np.ndarray:
    """Matrix NMS with its matrix, as SOLOv2's paper has it, in float64."""
    order = np.argsort(-scores, kind="stable")
    n = len(order)
    o = np.array([[iou(boxes[i], boxes[j]) for j in order] for i in order], dtype=np.float64)
    o = np.triu(o, 1)
    covered = o.max(0)[:, None].repeat(n, 1)
    if method == "gaussian":
        decay = np.exp(-sigma * o**2) / np.exp(-sigma * covered**2)
    else:
        decay = (1 - o) / (1 - covered)
    lowered = np.empty(n)
    lowered[order] = scores[order] * np.minimum(1, decay.min(0))
    return lowered


@pytest.mark.parametrize("method", ["gaussian", "linear"])
@pytest.mark.parametrize("backend", RULES)
def test_matrix_nms_is_that_of_the_matrix(backend: str, method: str) -> None:
    boxes, scores = crowd(110, 5)
    keep, lowered = ops.matrix_nms(
        boxes, scores, method=method, sigma=2.0, score_threshold=0.1, backend=backend
    )
    exact = matrix_scores(boxes.cpu().numpy(), scores.cpu().numpy(), method, 2.0)
    assert set(keep.tolist()) == set((exact > 0.1).nonzero()[0].tolist())
    # An iou is good to a few 2^-24, and a linear decay divides by 1 - iou.
    np.testing.assert_allclose(lowered.cpu().numpy(), exact[keep.cpu().numpy()], rtol=1e-5)
    assert (lowered[:-1] >= lowered[1:]).all()
    assert 10 < len(keep) < 110
    few, _ = ops.matrix_nms(
        boxes, scores, method=method, score_threshold=0.1, max_detections=4, backend=backend
    )
    assert torch.equal(few, keep[:4])


@pytest.mark.parametrize("method", ["soft_nms", "matrix_nms"])
@pytest.mark.parametrize("backend", RULES)
def test_decays_stay_within_segments(backend: str, method: str) -> None:
    boxes, scores = crowd(80, 6)
    idxs = torch.arange(80, device=DEVICE) % 3
    call = getattr(ops, method)
    keep, lowered = call(boxes, scores, idxs=idxs, score_threshold=0.05, backend=backend)
    found = dict(zip(keep.tolist(), lowered.tolist(), strict=True))
    expected = {}
    for segment in range(3):
        own = (idxs == segment).nonzero()[:, 0]
        part, low = call(boxes[own], scores[own], score_threshold=0.05, backend=backend)
        expected |= dict(zip(own[part].tolist(), low.tolist(), strict=True))
    assert found == expected


@pytest.mark.parametrize("backend", ALL)
def test_intervals(backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.rand(80, generator=generator, dtype=torch.float64) * 50 - 25
    length = torch.rand(80, generator=generator, dtype=torch.float64) * 8
    segments = torch.stack([start, start + length], 1)
    scores = torch.rand(80, generator=generator, dtype=torch.float64)
    kept: list[int] = []
    for i in scores.argsort(descending=True).tolist():
        for j in kept:
            low, high = torch.maximum(start[i], start[j]), torch.minimum(*(segments[[i, j], 1]))
            shared = (high - low).clamp(min=0)
            if shared / (length[i] + length[j] - shared) > 0.3:
                break
        else:
            kept.append(i)
    given = segments.to(DEVICE), scores.to(DEVICE)
    assert ops.nms_1d(*given, 0.3, backend=backend).tolist() == kept
    idxs = torch.arange(80, device=DEVICE)
    assert len(ops.nms_1d(*given, 0.3, idxs=idxs, backend=backend)) == 80


@pytest.mark.parametrize("backend", RULES)
def test_rotated_keeps_are_those_of_polygons(backend: str) -> None:
    boxes, scores = rotated_boxes(90, extent=100, seed=7)
    shapes = [polygon(box) for box in boxes.double().tolist()]
    kept: list[int] = []
    for i in scores.argsort(descending=True).tolist():
        for j in kept:
            shared = shapes[i].intersection(shapes[j]).area
            if shared / (shapes[i].area + shapes[j].area - shared) > 0.15:
                break
        else:
            kept.append(i)
    found = ops.nms_rotated(boxes.to(DEVICE), scores.to(DEVICE), 0.15, backend=backend)
    assert found.tolist() == kept
    assert 20 < len(kept) < 80


def test_every_instruction_set_follows_the_same_rules(capability: str) -> None:
    boxes, scores = clustered_boxes(20, 20, seed=8)
    idxs = torch.arange(400) % 3
    rotated, levels = rotated_boxes(400, extent=150)
    calls = {
        "batched": lambda b: ops.batched_nms(boxes, scores, idxs, 0.4, backend=b),
        "match": lambda b: ops.nms_match(boxes, scores, 0.4, idxs=idxs, backend=b),
        "rotated": lambda b: ops.nms_rotated(rotated, levels, 0.2, backend=b),
        "linear": lambda b: ops.soft_nms(boxes, scores, backend=b),
        "gaussian": lambda b: ops.soft_nms(boxes, scores, method="gaussian", backend=b),
        "matrix": lambda b: ops.matrix_nms(boxes, scores, backend=b),
        "matrix linear": lambda b: ops.matrix_nms(boxes, scores, method="linear", backend=b),
    }
    for name, call in calls.items():
        for dtype in (torch.float32, torch.float64):
            boxes, scores, rotated, levels = (t.to(dtype) for t in (boxes, scores, rotated, levels))
            assert_same_outputs(call("cpu"), call("reference"), context=f"{name}, {capability}")


def test_a_million_boxes() -> None:
    boxes, scores = random_boxes(1_000_000, extent=60_000)
    idxs = torch.arange(1_000_000) % 50_000
    kept = ops.nms(boxes, scores, 0.5)
    assert torch.equal(ops.nms(boxes[kept], scores[kept], 0.5), torch.arange(len(kept)))
    assert 900_000 < len(kept) < 1_000_000
    assert len(ops.batched_nms(boxes, scores, idxs, 0.5)) > len(kept)
