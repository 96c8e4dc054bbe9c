"""Detections against numpy, scipy and the published decoders, and what fixed shapes are for."""

import ctypes
import math
import os
from typing import Any

import numpy as np
import pytest
import scipy.ndimage
import torch

from fastzoo import _native, ops
from fastzoo.ops._operator import OPERATORS
from fastzoo.testing.detections import (
    decoder_inputs,
    decoder_of,
    detector_output,
    random_output,
)
from fastzoo.testing.tolerance import assert_same_outputs
from tests.conftest import DEVICE, EMULATOR
from tests.ops.test_nms import iou

BACKENDS = [
    b
    for b in ("reference", "cpu", "cuda", "triton")
    if OPERATORS["multiclass_nms"].refusal(b, DEVICE) is None
]
PEAKS = [b for b in BACKENDS if b in OPERATORS["peak_nms"].has]


def per_class(
    boxes: np.ndarray,
    scores: np.ndarray,
    *,
    score_threshold: float,
    iou_threshold: float,
    pre_top_k: int = 10**9,
    max_per_class: int = 10**9,
    max_detections: int = 100,
    class_agnostic: bool = False,
) -> list[tuple[float, int, int]]:
    """Of one image: (score, label, location), by scalar loops."""
    pairs = [
        (-float(scores[n, c]), n, c)
        for n in range(scores.shape[0])
        for c in range(scores.shape[1])
        if scores[n, c] > score_threshold
    ]
    kept: list[tuple[float, int, int]] = []
    for score, n, c in sorted(pairs)[:pre_top_k]:
        rivals = [k for k in kept if class_agnostic or k[1] == c]
        if not any(iou(boxes[k[2]], boxes[n]) > iou_threshold for k in rivals):
            kept.append((-score, c, n))
    few = [k for i, k in enumerate(kept) if [j[1] for j in kept[:i]].count(k[1]) < max_per_class]
    return few[:max_detections]


@pytest.mark.parametrize(
    "limits",
    [
        {},
        {"pre_top_k": 25},
        {"max_per_class": 2},
        {"max_detections": 5},
        {"class_agnostic": True},
        {"class_agnostic": True, "max_per_class": 3, "pre_top_k": 60, "max_detections": 9},
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_detections_are_those_of_scalar_loops(backend: str, limits: dict[str, Any]) -> None:
    boxes, scores = random_output(3, 40, 4, extent=90, seed=2)
    given: dict[str, Any] = {"score_threshold": 0.4, "iou_threshold": 0.3, **limits}
    found = ops.multiclass_nms(boxes.to(DEVICE), scores.to(DEVICE), **given, backend=backend)
    for image in range(3):
        expected = per_class(boxes[image].numpy(), scores[image].numpy(), **given)
        n = int(found.num[image])
        rows = zip(*(t[image, :n].tolist() for t in found[2:]), strict=True)
        assert list(rows) == expected
        assert torch.equal(found.boxes[image, :n].cpu(), boxes[image, [k[2] for k in expected]])
        assert (found.boxes[image, n:] == 0).all()
        assert (found.scores[image, n:] == 0).all()
        assert (found.labels[image, n:] == -1).all()
        assert (found.indices[image, n:] == -1).all()
    assert found.num.min() > 3


def published_decoder(form: str, t: np.ndarray, prior: np.ndarray) -> np.ndarray:
    """Each decoder as its own project writes it, in float64."""
    t, prior = t.astype(np.float64), prior.astype(np.float64)

    def logistic(x: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-x))

    if form == "deltas":  # torchvision's BoxCoder, weights (10, 10, 5, 5)
        w, h = prior[:, 2] - prior[:, 0], prior[:, 3] - prior[:, 1]
        x = t[:, 0] / 10 * w + prior[:, 0] + 0.5 * w
        y = t[:, 1] / 10 * h + prior[:, 1] + 0.5 * h
        w, h = w * np.exp(np.minimum(t[:, 2] / 5, 2.0)), h * np.exp(np.minimum(t[:, 3] / 5, 2.0))
    elif form == "distances":  # FCOS
        x1, y1 = prior[:, 0] - t[:, 0] * prior[:, 2], prior[:, 1] - t[:, 1] * prior[:, 2]
        x2, y2 = prior[:, 0] + t[:, 2] * prior[:, 2], prior[:, 1] + t[:, 3] * prior[:, 2]
        return np.stack([x1, y1, x2, y2], 1)
    elif form == "yolov5":
        x, y = ((logistic(t[:, i]) * 2 - 0.5 + prior[:, i]) * prior[:, 2] for i in (0, 1))
        w, h = ((logistic(t[:, i]) * 2) ** 2 * prior[:, i + 1] for i in (2, 3))
    else:
        move = logistic if form == "yolov3" else (lambda v: v)
        x, y = ((move(t[:, i]) + prior[:, i]) * prior[:, 2] for i in (0, 1))
        w, h = (np.exp(t[:, i]) * prior[:, i + 1] for i in (2, 3))
    return np.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], 1)


@pytest.mark.parametrize("form", ["deltas", "distances", "yolov3", "yolov5", "yolox"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_heads_are_decoded_as_published(backend: str, form: str) -> None:
    offsets, priors = decoder_inputs(form, 30, seed=3)
    if form == "deltas":
        offsets = offsets * 10
    expected = published_decoder(form, offsets.numpy(), priors.numpy())
    scores = torch.linspace(0.9, 0.1, 30)[None, :, None]
    found = ops.multiclass_nms(
        offsets[None].to(DEVICE),
        scores.to(DEVICE),
        decode=decoder_of(form, priors.to(DEVICE)),
        score_threshold=0.0,
        iou_threshold=1.0,
        max_detections=30,
        backend=backend,
    )
    assert found.indices[0].tolist() == list(range(30))
    # Computed in float64 and rounded once.
    np.testing.assert_allclose(found.boxes[0].cpu().numpy(), expected, rtol=2.0**-23, atol=1e-5)


def test_distances_without_strides_are_in_pixels() -> None:
    points = torch.tensor([[10.0, 20]])
    found = ops.multiclass_nms(
        torch.tensor([[[1.0, 2, 3, 4]]]),
        torch.ones(1, 1, 1),
        decode=ops.Distances(points),
        score_threshold=0.5,
        iou_threshold=0.5,
        max_detections=1,
    )
    assert found.boxes[0, 0].tolist() == [9, 18, 13, 24]


@pytest.mark.parametrize("form", ["", "deltas"])
def test_it_exports_and_compiles_whole(form: str) -> None:
    class Head(torch.nn.Module):
        def forward(self, boxes: torch.Tensor, scores: torch.Tensor) -> ops.Detections:
            return ops.multiclass_nms(
                boxes,
                scores,
                decode=decoder_of(form, priors),
                score_threshold=0.3,
                iou_threshold=0.4,
                pre_top_k=50,
                max_detections=10,
            )

    priors = decoder_inputs("deltas", 40)[1]
    given = random_output(2, 40, 3)
    right = Head()(*given)
    program = torch.export.export(Head(), given)
    assert_same_outputs(program.module()(*given), tuple(right), context="exported")
    compiled = torch.compile(Head(), fullgraph=True, backend="aot_eager")
    assert_same_outputs(compiled(*given), tuple(right), context="compiled")
    assert isinstance(compiled(*given), ops.Detections)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b in ("cuda", "triton")])
def test_nothing_waits_for_the_device(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No result is read: no size, no mask, no number."""

    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a value was read")

    boxes, scores = (t.to(DEVICE) for t in random_output(2, 30, 3))
    library = ctypes.CDLL(os.fspath(EMULATOR) if DEVICE == "cpu" else _native.library("_C_cuda"))
    library.fastzoo_cuda_sync_count.restype = ctypes.c_int64
    before = library.fastzoo_cuda_sync_count()
    limits: dict[str, Any] = {"score_threshold": 0.3, "iou_threshold": 0.4, "pre_top_k": 20}
    # The interpreter itself reads numbers: watch the launcher's own calls only.
    for name in ("nonzero", "masked_select", "tolist"):
        monkeypatch.setattr(torch.Tensor, name, fail)
    ops.multiclass_nms(boxes, scores, **limits, max_per_class=3, backend=backend)
    assert library.fastzoo_cuda_sync_count() == before


def test_every_instruction_set_detects_the_same(capability: str) -> None:
    boxes, scores = detector_output(2, 500, 9, objects=12)
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        given = boxes.to(dtype), scores.to(dtype)
        for limits in ({"score_threshold": 0.2}, {"score_threshold": 0.001, "pre_top_k": 700}):
            right = ops.multiclass_nms(*given, **limits, iou_threshold=0.5, backend="reference")
            found = ops.multiclass_nms(*given, **limits, iou_threshold=0.5, backend="cpu")
            assert_same_outputs(found, tuple(right), context=f"{dtype}, {capability}")
        heatmap = scores.view(2, 9, 20, 25).to(dtype)
        right = ops.peak_nms(heatmap, 3, 30, backend="reference")
        assert_same_outputs(ops.peak_nms(heatmap, 3, 30, backend="cpu"), right, context=capability)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads_detects_the_same(threads: int) -> None:
    boxes, scores = detector_output(3, 2000, 11)
    limits: dict[str, Any] = {"score_threshold": 0.01, "iou_threshold": 0.5, "backend": "cpu"}
    right = ops.multiclass_nms(boxes, scores, **limits)
    single = ops.multiclass_nms(boxes[:1], scores[:1], **limits)
    peaks = ops.peak_nms(scores.view(3, 11, 40, 50), 3, 50, backend="cpu")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_same_outputs(ops.multiclass_nms(boxes, scores, **limits), tuple(right))
        assert_same_outputs(ops.multiclass_nms(boxes[:1], scores[:1], **limits), tuple(single))
        found = ops.peak_nms(scores.view(3, 11, 40, 50), 3, 50, backend="cpu")
        assert_same_outputs(found, peaks)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("max_per_class", [None, 1])
def test_candidates_are_looked_for_until_they_run_out(
    images: int, max_per_class: int | None
) -> None:
    """Of boxes that are all the same, only the best of each class stays: many rounds for few."""
    generator = torch.Generator().manual_seed(5)
    scores = (torch.rand(images, 9000, 3, generator=generator) * 4000).round() / 4000
    boxes = torch.tensor([0.0, 0, 5, 5]).expand(images, 9000, 4)
    for image in range(images):
        scores[image, :, 2] *= 0.01  # behind thousands of the others
    given = {"score_threshold": 0.001, "iou_threshold": 0.5, "max_detections": 4}
    found = ops.multiclass_nms(boxes, scores, **given, max_per_class=max_per_class, backend="cpu")
    best = scores.numpy().max(1)
    for image in range(images):
        order = sorted(range(3), key=lambda c: (-best[image, c], scores[image, :, c].argmax(), c))
        assert found.labels[image].tolist() == [*order, -1]
        for rank, c in enumerate(order):
            assert found.scores[image, rank] == best[image, c]
            first = int((scores[image, :, c].numpy() == best[image, c]).argmax())
            assert found.indices[image, rank] == first
    few = ops.multiclass_nms(boxes, scores, **given, pre_top_k=6000, backend="cpu")
    assert few.num.tolist() == [2] * images


@pytest.mark.parametrize("images", [1, 2])
def test_any_layout_detects_the_same(images: int) -> None:
    """Equal scores abound; those of a head that has its classes first are not copied."""
    boxes, scores = detector_output(images, 3000, 12)
    scores = (scores * 50).round() / 50
    limits: dict[str, Any] = {"score_threshold": 0.01, "iou_threshold": 0.5, "pre_top_k": 200}
    right = ops.multiclass_nms(boxes, scores, **limits, backend="cpu")
    output = torch.cat([boxes, torch.ones(images, 3000, 1), scores], 2)
    classes_first = output.transpose(1, 2).contiguous().transpose(1, 2)
    spread = torch.stack([output, output], 3)[..., 0]
    for layout in (output, classes_first, spread, output.flip(0).flip(0)[:, :3000]):
        found = ops.multiclass_nms(layout[..., :4], layout[..., 5:], **limits, backend="cpu")
        assert_same_outputs(found, tuple(right))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("top_k", [20, 900, 60000])
def test_peaks_of_many_cells_are_the_best(dtype: torch.dtype, top_k: int) -> None:
    """More peaks than a list has room for, many of them equal; in parts where there are threads."""
    generator = torch.Generator().manual_seed(3)
    heatmap = torch.randn(1, 7, 83, 101, generator=generator).to(dtype)
    heatmap[0, 3] = (heatmap[0, 3] * 4).round()
    for kernel in (1, 3):
        right = ops.peak_nms(heatmap, kernel, top_k, backend="reference")
        found = ops.peak_nms(heatmap, kernel, top_k, backend="cpu")
        assert_same_outputs(found, right, context=f"kernel {kernel}")


@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("backend", PEAKS)
def test_peaks_are_those_of_a_maximum_filter(backend: str, kernel: int) -> None:
    heatmap = torch.rand(2, 3, 17, 23, generator=torch.Generator().manual_seed(1))
    found = ops.peak_nms(heatmap.to(DEVICE), kernel, 40, backend=backend)
    values = heatmap.numpy()
    size = (1, 1, kernel, kernel)
    peaks = scipy.ndimage.maximum_filter(values, size, mode="constant", cval=-math.inf) == values
    for image in range(2):
        best = sorted(
            ((-values[image][c, y, x], c, y, x) for c, y, x in np.argwhere(peaks[image]).tolist()),
        )[:40]
        scores, *places = (t[image, : len(best)].cpu().tolist() for t in found)
        assert scores == [-b[0] for b in best]
        assert list(zip(*places, strict=True)) == [b[1:] for b in best]


def test_gradients_stop_at_detections() -> None:
    boxes, scores = random_output(1, 10, 2)
    found = ops.multiclass_nms(
        boxes.requires_grad_(), scores.requires_grad_(), score_threshold=0.1, iou_threshold=0.5
    )
    assert not any(t.requires_grad for t in found)
