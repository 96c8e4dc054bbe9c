"""nms against independent oracles, and the edges that belong to it alone."""

import ctypes
import itertools
import os

import cv2
import numpy as np
import pytest
import torch

from fastzoo import _native, ops, reference
from fastzoo.ops._operator import OPERATORS
from fastzoo.testing.nms import clustered_boxes, random_boxes, samples, threshold_pairs
from tests.conftest import DEVICE, EMULATOR

BACKENDS = [b for b in ("cpu", "cuda", "triton") if OPERATORS["nms"].refusal(b, DEVICE) is None]


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


def test_cuda_reads_the_count_once() -> None:
    library = ctypes.CDLL(os.fspath(EMULATOR) if DEVICE == "cpu" else _native.library("_C_cuda"))
    library.fastzoo_cuda_sync_count.restype = ctypes.c_int64
    boxes, scores = (t.to(DEVICE) for t in random_boxes(300))
    before = library.fastzoo_cuda_sync_count()
    ops.nms(boxes, scores, 0.5, backend="cuda")
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
