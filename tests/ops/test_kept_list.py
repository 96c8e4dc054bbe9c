"""The CUDA kernel of suppression over many blocks: its lists, segments, images and limits."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from fastzoo import _native, ops, reference
from fastzoo.ops._operator import OPERATORS
from fastzoo.testing.boxes import random_boxes, rotated_boxes
from fastzoo.testing.detections import decoder_inputs, decoder_of, detector_output, random_output
from fastzoo.testing.nms import clustered_boxes
from tests.conftest import DEVICE, EMULATOR

pytestmark = pytest.mark.skipif(
    OPERATORS["nms"].refusal("cuda", DEVICE) is not None, reason="the CUDA kernels are not here"
)
NONE = torch.empty(0, dtype=torch.int64)
ORDERS = ("forward", "reverse", "random:1", "random:2") if DEVICE == "cpu" else ("",)


@pytest.fixture(params=ORDERS)
def order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The order in which the emulator runs the threads of a block."""
    monkeypatch.setenv("FASTZOO_EMULATOR_ORDER", request.param)
    return str(request.param)


@contextmanager
def reads(expected: int) -> Iterator[None]:
    """How often the host waits for the device."""
    library = ctypes.CDLL(os.fspath(EMULATOR if DEVICE == "cpu" else _native.library("_C_cuda")))
    library.fastzoo_cuda_sync_count.restype = ctypes.c_int64
    before = library.fastzoo_cuda_sync_count()
    yield
    assert library.fastzoo_cuda_sync_count() - before == expected


def in_segments(n: int, segments: int, seed: int = 0) -> Tensor:
    """Of different sizes, with ids far apart."""
    generator = torch.Generator().manual_seed(seed)
    share = torch.rand(n, generator=generator) ** 3
    return ((share * segments).long() - segments // 2) * (2**61 // segments)


def check_suppress(boxes: Tensor, scores: Tensor, idxs: Tensor, overlap: str, match: bool) -> int:
    arguments = boxes, scores, idxs, 0.4, overlap, match
    expected = reference.suppress(*arguments)
    moved = [a.to(DEVICE) if isinstance(a, Tensor) else a for a in arguments]
    with reads(1):
        found = OPERATORS["suppress"].overloads["cuda"](*moved)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.cpu(), other)
    return len(expected[0])


@pytest.mark.parametrize("match", [False, True])
@pytest.mark.parametrize("segments", [0, 1, 3, 40, 700])
def test_segments_of_any_size(segments: int, match: bool, order: str) -> None:
    sets = (
        clustered_boxes(9, 40, seed=0),
        clustered_boxes(17, 40, seed=1),
        random_boxes(900, seed=2),
    )
    for boxes, scores in sets:
        idxs = in_segments(len(boxes), segments) if segments else NONE
        check_suppress(boxes, scores, idxs, "aligned", match)
    assert len(reference.nms(boxes, scores, 0.4)) > 3 * 128  # a list of several blocks


@pytest.mark.parametrize("match", [False, True])
@pytest.mark.parametrize("segments", [0, 5])
@pytest.mark.parametrize("overlap", ["rotated", "rotated_degrees"])
def test_rotated_boxes_of_many_blocks(overlap: str, segments: int, match: bool, order: str) -> None:
    boxes, scores = rotated_boxes(400, extent=300, seed=3)
    if overlap == "rotated_degrees":
        boxes[:, 4] = boxes[:, 4].rad2deg().round()
    idxs = in_segments(400, segments) if segments else NONE
    assert 200 < check_suppress(boxes, scores, idxs, overlap, match) < 390


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_every_dtype(dtype: torch.dtype) -> None:
    boxes, scores = (t.to(dtype) for t in clustered_boxes(17, 20, seed=5))
    for idxs in (NONE, in_segments(len(boxes), 9)):
        check_suppress(boxes, scores, idxs, "aligned", True)
    boxes, scores = (t.to(dtype) for t in rotated_boxes(200, seed=6))
    check_suppress(boxes, scores, in_segments(200, 2), "rotated", True)


def test_batched_nms_reads_the_count_once() -> None:
    boxes, scores = (t.to(DEVICE) for t in random_boxes(300))
    with reads(1):
        ops.batched_nms(boxes, scores, in_segments(300, 4).to(DEVICE), 0.5, backend="cuda")


LIMITS: dict[str, dict[str, int]] = {
    "none": {},
    "of the image": {"max_detections": 20},
    "at a block's end": {"max_detections": 128},
    "of a class": {"max_per_class": 3},
    "of a class, late": {"max_per_class": 70},
    "of both": {"max_per_class": 9, "max_detections": 30},
    "before": {"pre_top_k": 200},
    "all": {"pre_top_k": 150, "max_per_class": 5, "max_detections": 10},
}


@pytest.mark.parametrize("class_agnostic", [False, True])
@pytest.mark.parametrize("limits", LIMITS.values(), ids=LIMITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_images_of_different_fill(
    dtype: torch.dtype, limits: dict[str, int], class_agnostic: bool, order: str
) -> None:
    boxes, scores = (t.to(dtype) for t in random_output(4, 150, 3, extent=400, seed=7))
    scores[0] *= 0.25  # no candidate,
    scores[1] = (scores[1] * 4).round() / 4  # many equal scores, some at the threshold,
    scores[3, 7:] = torch.nan  # and few
    options: dict[str, Any] = {
        "score_threshold": 0.25,
        "iou_threshold": 0.3,
        "max_detections": 500,
        "class_agnostic": class_agnostic,
        **limits,
    }
    expected = ops.multiclass_nms(boxes, scores, **options, backend="reference")
    with reads(0):
        found = ops.multiclass_nms(boxes.to(DEVICE), scores.to(DEVICE), **options, backend="cuda")
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.cpu(), other)
    assert 0 == expected.num[0] < expected.num[3] <= expected.num[2]


@pytest.mark.parametrize("each_class", [False, True])
@pytest.mark.parametrize("form", ["deltas", "distances", "yolov3", "yolov5", "yolox"])
def test_every_decoder(form: str, each_class: bool) -> None:
    offsets, priors = decoder_inputs(form, 300)
    scores = detector_output(2, 300, 3)[1]
    boxes = offsets.expand(2, 300, 4)
    if each_class:
        boxes = torch.stack([boxes, boxes * 0.9, boxes * 1.1], 2)
    options: dict[str, Any] = {"score_threshold": 0.02, "iou_threshold": 0.5}
    expected = ops.multiclass_nms(
        boxes, scores, decode=decoder_of(form, priors), **options, backend="reference"
    )
    with reads(0):
        found = ops.multiclass_nms(
            boxes.to(DEVICE),
            scores.to(DEVICE),
            decode=decoder_of(form, priors.to(DEVICE)),
            **options,
            backend="cuda",
        )
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.cpu(), other)
    assert expected.num.min() > 20


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_a_graph_captures_it() -> None:
    boxes, scores = (t.to(DEVICE) for t in detector_output(2, 500, 4, seed=1))
    others = [t.to(DEVICE) for t in detector_output(2, 500, 4, seed=2)]
    options: dict[str, Any] = {
        "score_threshold": 0.05,
        "iou_threshold": 0.5,
        "pre_top_k": 300,
        "max_per_class": 9,
    }
    ops.multiclass_nms(boxes, scores, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = ops.multiclass_nms(boxes, scores, **options)
    boxes.copy_(others[0])
    scores.copy_(others[1])
    graph.replay()
    for one, other in zip(found, ops.multiclass_nms(boxes, scores, **options), strict=True):
        assert torch.equal(one, other)
