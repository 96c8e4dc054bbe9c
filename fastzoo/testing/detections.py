"""Sample inputs and benchmark cases of the ``detections`` family."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastzoo import ops, reference
from fastzoo.testing.boxes import random_boxes
from fastzoo.testing.nms import clustered_boxes, eager
from fastzoo.testing.spec import BenchmarkCase, Invalid, OpSpec, Sample


def random_output(
    images: int, n: int, classes: int, *, extent: float = 200.0, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """``[B, N, 4]`` boxes anywhere and uniform ``[B, N, C]`` scores."""
    generator = torch.Generator().manual_seed(seed)
    boxes = random_boxes(images * n, extent=extent, seed=seed)[0].view(images, n, 4)
    return boxes, torch.rand(images, n, classes, generator=generator)


def detector_output(
    images: int, n: int, classes: int, *, objects: int = 40, seed: int = 0, device: str = "cpu"
) -> tuple[Tensor, Tensor]:
    """What a dense detector gives: near each object some boxes whose scores of its class are high,
    everywhere else scores next to nothing."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(images, n, classes, generator=generator) ** 8 * 0.04
    boxes = random_boxes(images * n, extent=600, seed=seed)[0].view(images, n, 4)
    near = min(n, objects * 20)
    for image in range(images):
        around, levels = clustered_boxes(max(1, near // 20), 20, seed=seed + image)
        place = torch.randperm(n, generator=generator)[: len(around)]
        label = torch.randint(0, classes, (max(1, near // 20),), generator=generator)
        boxes[image, place] = around[: len(place)]
        scores[image, place, label.repeat_interleave(20)[: len(place)]] = levels[: len(place)]
    return boxes.to(device), scores.to(device)


def decoder_inputs(form: str, n: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A head's output ``[N, 4]`` and priors ``[N, P]`` that make boxes of usual sizes."""
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.randn(n, 4, generator=generator)
    if form == "deltas":
        return offsets * 0.5, random_boxes(n, extent=200, seed=seed)[0]
    points = torch.rand(n, 2, generator=generator) * 20
    strides = 2.0 ** torch.randint(2, 5, (n, 1), generator=generator)
    if form == "distances":
        return offsets.abs() * 3, torch.cat([points * 10, strides], 1)
    sides = strides.expand(n, 2) if form == "yolox" else strides * (points + 1)
    return offsets, torch.cat([points.floor(), strides, sides], 1)


def decoder_of(form: str, priors: Tensor) -> ops.Deltas | ops.Distances | ops.Grid | None:
    if not form:
        return None
    if form == "deltas":
        return ops.Deltas(priors, weights=(10.0, 10.0, 5.0, 5.0), clip=2.0)
    if form == "distances":
        return ops.Distances(priors[:, :2], priors[:, 2])
    return ops.Grid(priors[:, :2], priors[:, 2], None if form == "yolox" else priors[:, 3:], form)


def _multiclass_nms(
    boxes: Tensor, scores: Tensor, *, form: str = "", priors: Tensor | None = None, **kwargs: Any
) -> tuple[Tensor, ...]:
    """The public function, with a decoder made of tensors that can be moved."""
    decode = decoder_of(form, boxes if priors is None else priors)
    return ops.multiclass_nms(boxes, scores, decode=decode, **kwargs)


def _operator_arguments(
    boxes: Tensor,
    scores: Tensor,
    *,
    form: str = "",
    priors: Tensor | None = None,
    score_threshold: float,
    iou_threshold: float,
    pre_top_k: int = -1,
    max_per_class: int = -1,
    max_detections: int = 100,
    class_agnostic: bool = False,
) -> tuple[Any, ...]:
    if priors is None:
        priors = torch.empty(0, device=boxes.device)
    deltas = (10.0, 10.0, 5.0, 5.0, 2.0) if form == "deltas" else (1.0, 1.0, 1.0, 1.0, 0.0)
    return (
        boxes, scores, priors, form, *deltas, score_threshold, iou_threshold, pre_top_k,
        max_per_class, max_detections, class_agnostic,
    )  # fmt: skip


def _definition(boxes: Tensor, scores: Tensor, **kwargs: Any) -> tuple[Tensor, ...]:
    return reference.multiclass_nms(*_operator_arguments(boxes, scores, **kwargs))


def _samples(dtype: torch.dtype) -> Iterator[Sample]:
    usual = {"score_threshold": 0.5, "iou_threshold": 0.4, "max_detections": 12}

    def sample(name: str, boxes: Tensor, scores: Tensor, **kwargs: Any) -> Sample:
        return Sample(name, (boxes.to(dtype), scores.to(dtype)), {**usual, **kwargs})

    for images, n, classes in (
        (1, 40, 1),
        (4, 30, 3),
        (4, 17, 5),
        (5, 64, 2),
        (4, 33, 4),
        (2, 1, 1),
    ):
        yield sample(f"random-{images}-{n}-{classes}", *random_output(images, n, classes))
    for images, n, classes in ((0, 5, 3), (2, 0, 3), (2, 5, 0)):
        yield sample(f"empty-{images}-{n}-{classes}", *random_output(images, n, classes))
    boxes, scores = random_output(3, 50, 4, extent=90, seed=1)
    options: dict[str, dict[str, Any]] = {
        "all": {"score_threshold": -1.0, "max_detections": 220},
        "none": {"score_threshold": 1.5},
        "nan-threshold": {"score_threshold": float("nan")},
        "top-k": {"pre_top_k": 9},
        "top-k-0": {"pre_top_k": 0},
        "top-k-many": {"pre_top_k": 1000, "iou_threshold": 0.1},
        "per-class": {"max_per_class": 2},
        "per-class-0": {"max_per_class": 0},
        "agnostic": {"class_agnostic": True, "iou_threshold": 0.2},
        "agnostic-per-class": {"class_agnostic": True, "max_per_class": 1, "iou_threshold": 0.3},
        "no-detections": {"max_detections": 0},
        "one": {"max_detections": 1},
        "iou-0": {"iou_threshold": 0.0},
        "iou-negative": {"iou_threshold": -0.5},
        "iou-nan": {"iou_threshold": float("nan")},
    }
    for name, kwargs in options.items():
        yield sample(name, boxes, scores, **kwargs)
    apart = torch.arange(130.0)[:, None] * 10 + torch.tensor([0.0, 0, 5, 5])
    falling = torch.linspace(1, 0.6, 130)[:, None]
    # A limit within and at the edge of the blocks that a kernel works in.
    for most in (63, 64, 65, 127, 128, 129):
        two = apart.expand(2, -1, -1), falling.expand(2, -1, -1)
        yield sample(f"full-at-{most}", *two, max_detections=most)
    special = scores.clone().flatten()
    special[::7], special[1::7], special[2::7] = float("nan"), float("inf"), -float("inf")
    special[3::7], special[4::7] = 0.0, -0.0
    special = special.view(scores.shape)
    yield sample("special-scores", boxes, special, score_threshold=-0.5, max_detections=90)
    yield sample("special-scores-top-k", boxes, special, score_threshold=-0.5, pre_top_k=31)
    yield sample("equal-scores", boxes, torch.full_like(scores, 0.75), pre_top_k=90)
    broken = boxes.clone()
    broken[:, ::9, 0], broken[:, 1::9, 3] = float("nan"), float("inf")
    broken[:, 2::9] = broken[:, 2::9][..., [2, 3, 0, 1]]
    yield sample("degenerate", broken, scores)
    own = boxes[:, :, None] + torch.arange(4.0)[:, None] * 3
    yield sample("boxes-of-classes", own, scores)
    yield sample("boxes-of-classes-agnostic", own, scores, class_agnostic=True, pre_top_k=60)
    yield sample("detector", *detector_output(2, 300, 7, objects=6), score_threshold=0.1)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    for form in ("deltas", "distances", "yolov3", "yolov5", "yolox"):
        offsets, priors = decoder_inputs(form, 50)
        if form == "deltas":
            offsets = offsets * 10
        raw = torch.stack([offsets, offsets.flip(0), offsets * 100])
        given = {"form": form, "priors": priors.to(compute), "iou_threshold": 0.2}
        yield sample(form, raw, scores, **given)
    given = {"form": "deltas", "priors": decoder_inputs("deltas", 50)[1].to(compute)}
    yield sample("deltas-of-classes", torch.randn(3, 50, 4, 4).mul(3), scores, **given)


def _invalid() -> Iterator[Invalid]:
    boxes, scores = random_output(2, 5, 3)
    usual: dict[str, Any] = {"score_threshold": 0.5, "iou_threshold": 0.5}

    def bad(
        name: str, match: str, error: type[Exception] = ValueError, *args: Any, **kwargs: Any
    ) -> Invalid:
        return Invalid(name, args or (boxes, scores), {**usual, **kwargs}, error, match)

    yield bad("list", "boxes", TypeError, [1.0], scores)
    yield bad("scores-rank", "scores", ValueError, boxes, scores[0])
    yield bad("columns", "boxes", ValueError, boxes[..., :3], scores)
    yield bad("locations", "boxes", ValueError, boxes[:, :4], scores)
    yield bad("images", "boxes", ValueError, boxes[:1], scores)
    yield bad("classes", "boxes", ValueError, boxes[:, :, None].expand(2, 5, 2, 4), scores)
    yield bad("integers", "boxes", TypeError, boxes.long(), scores)
    yield bad("dtype-mix", "scores", TypeError, boxes, scores.double())
    yield bad("device-mix", "scores", ValueError, boxes, scores.to("meta"))
    yield bad("max", "max_detections", max_detections=-1)
    yield bad("max-none", "max_detections", TypeError, max_detections=None)
    yield bad("top-k", "pre_top_k", pre_top_k=-1)
    yield bad("per-class", "max_per_class", TypeError, max_per_class=0.5)
    yield bad("anchors", "decode.anchors", form="deltas", priors=torch.zeros(4, 4))
    yield bad("points", "decode.points", form="distances", priors=torch.zeros(4, 3))
    yield bad("grid", "decode.form", form="yolov9", priors=torch.zeros(5, 5))
    yield bad("backend", "backend", backend="gpu")


def eager_multiclass_nms(boxes: Tensor, scores: Tensor, **kwargs: Any) -> tuple[Tensor, ...]:
    """One call of NMS an image and a class, as it is usually written."""
    limit = kwargs.get("max_detections", 100)
    images = len(boxes)
    num = torch.zeros(images, dtype=torch.int64)
    found = torch.zeros(images, limit, 4), torch.zeros(images, limit)
    labels, indices = torch.full((2, images, limit), -1)
    for image in range(images):
        parts = []
        for label in range(scores.shape[2]):
            place = (scores[image, :, label] > kwargs["score_threshold"]).nonzero()[:, 0]
            if len(place):
                own = scores[image, place, label]
                kept = place[eager(boxes[image, place], own, kwargs["iou_threshold"])]
                parts.append(torch.stack([kept, torch.full_like(kept, label)]))
        if parts:
            places, classes = torch.cat(parts, 1)
            best = scores[image, places, classes].argsort(descending=True)[:limit]
            places, classes, n = places[best], classes[best], len(best)
            num[image], found[0][image, :n] = n, boxes[image, places]
            found[1][image, :n] = scores[image, places, classes]
            labels[image, :n], indices[image, :n] = classes, places
    return num, *found, labels, indices


def _yolo(device: str, images: int, n: int, classes: int) -> tuple[Tensor, Tensor]:
    return detector_output(images, n, classes, device=device)


def _yolo_case(name: str, images: int, threshold: float, **kwargs: Any) -> BenchmarkCase:
    # The least: every score read, the boxes of candidates, the result written.
    return BenchmarkCase(
        name=name,
        shape={"images": images, "n": 8400, "classes": 80},
        make=_yolo,
        kwargs={
            "score_threshold": threshold,
            "iou_threshold": 0.5,
            "max_detections": 300,
            **kwargs,
        },
        flops=lambda *_, **__: 0.0,
        bytes=lambda boxes, scores, **_: scores.numel() * scores.element_size(),
    )


MULTICLASS_NMS = OpSpec(
    name="multiclass_nms",
    function=_multiclass_nms,
    definition=_definition,
    eager=lambda boxes, scores: eager_multiclass_nms(
        boxes, scores, score_threshold=0.25, iou_threshold=0.5, max_detections=300
    ),
    samples=_samples,
    invalid=_invalid,
    dispatch_args=_operator_arguments,
    fixed_shape=True,
    benchmarks=(
        _yolo_case("8 x 8 400 x 80, scores > 0.25", 8, 0.25),
        _yolo_case("1 x 8 400 x 80, scores > 0.01", 1, 0.01, pre_top_k=30_000),
    ),
)


def _heatmaps(dtype: torch.dtype) -> Iterator[Sample]:
    generator = torch.Generator().manual_seed(0)

    def sample(name: str, shape: tuple[int, ...], *args: int, levels: int = 0) -> Sample:
        heatmap = torch.rand(shape, generator=generator)
        if levels:
            heatmap = (heatmap * levels).floor()
        return Sample(name, (heatmap.to(dtype), *args))

    for shape in (
        (1, 1, 5, 5),
        (4, 2, 9, 17),
        (4, 3, 16, 16),
        (5, 1, 33, 20),
        (4, 1, 1, 40),
        (4, 2, 3, 1),
    ):
        yield sample(f"random-{shape}", shape, 3, 10)
    for shape in ((0, 2, 4, 4), (2, 0, 4, 4), (2, 2, 0, 4)):
        yield sample(f"empty-{shape}", shape, 3, 4)
    for kernel in (1, 5, 9):
        yield sample(f"kernel-{kernel}", (2, 2, 12, 19), kernel, 20)
    yield sample("plateaus", (2, 2, 12, 19), 3, 60, levels=3)
    yield sample("more-than-cells", (2, 1, 4, 4), 3, 40)
    yield sample("no-peaks-wanted", (2, 1, 4, 4), 3, 0)
    special = torch.rand(2, 2, 12, 19, generator=generator).mul(5).floor() - 2
    special[0, 0, 3, 4], special[0, 1, 5, 5], special[1, 0, 2, 2] = torch.nan, torch.inf, -torch.inf
    special[1, 1] = -torch.inf
    special[0, 0, :2], special[0, 0, 0, ::3] = 0.0, -0.0
    yield Sample("special", (special.to(dtype), 3, 500))
    yield Sample("all-nan", (torch.full((1, 2, 5, 5), torch.nan, dtype=dtype), 3, 5))


def _invalid_heatmaps() -> Iterator[Invalid]:
    heatmap = torch.rand(1, 1, 4, 4)
    yield Invalid("list", ([1.0],), {}, TypeError, "heatmap")
    yield Invalid("rank", (heatmap[0],), {}, ValueError, "heatmap")
    yield Invalid("integers", (heatmap.long(),), {}, TypeError, "heatmap")
    yield Invalid("even", (heatmap, 2), {}, ValueError, "kernel")
    yield Invalid("kernel", (heatmap, -1), {}, ValueError, "kernel")
    yield Invalid("top-k", (heatmap, 3, -1), {}, ValueError, "top_k")
    yield Invalid("top-k-type", (heatmap, 3, 2.0), {}, TypeError, "top_k")
    yield Invalid("backend", (heatmap,), {"backend": "gpu"}, ValueError, "backend")


def eager_peak_nms(heatmap: Tensor, kernel: int, top_k: int) -> tuple[Tensor, ...]:
    """As CenterNet's code has it: max-pooling, equality, top-k."""
    images, _, height, width = heatmap.shape
    highest = torch.nn.functional.max_pool2d(heatmap, kernel, 1, kernel // 2)
    peaks = (heatmap * (highest == heatmap)).view(images, -1)
    scores, cell = peaks.topk(top_k)
    return scores, cell // (height * width), cell // width % height, cell % width


def _heatmap_case(device: str, images: int, classes: int, side: int) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(images, classes, side, side, generator=generator)
    return (noise**4).to(device), 3, 100


PEAK_NMS = OpSpec(
    name="peak_nms",
    function=ops.peak_nms,
    definition=reference.peak_nms,
    eager=eager_peak_nms,
    samples=_heatmaps,
    invalid=_invalid_heatmaps,
    dispatch_args=lambda heatmap, kernel, top_k: (heatmap, kernel, top_k),
    fixed_shape=True,
    benchmarks=(
        # The least: every cell read once.
        BenchmarkCase(
            name="8 x 80 x 128 x 128",
            shape={"images": 8, "classes": 80, "side": 128},
            make=_heatmap_case,
            kwargs={},
            flops=lambda *_: 0.0,
            bytes=lambda heatmap, *_: heatmap.numel() * heatmap.element_size(),
        ),
    ),
)

SPECS = (MULTICLASS_NMS, PEAK_NMS)
