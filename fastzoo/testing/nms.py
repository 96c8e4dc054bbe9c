"""Sample inputs and benchmark cases of the ``nms`` family."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastzoo import ops, reference
from fastzoo.testing.boxes import random_boxes, rotated_boxes, rotated_pairs
from fastzoo.testing.spec import BenchmarkCase, Invalid, OpSpec, Sample


def clustered_boxes(
    clusters: int, size: int, *, seed: int = 0, device: str = "cpu"
) -> tuple[Tensor, Tensor]:
    """What a detector gives: ``size`` jittered copies of each of ``clusters`` objects."""
    generator = torch.Generator().manual_seed(seed)
    boxes, _ = random_boxes(clusters, seed=seed)
    sides = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2).repeat_interleave(size, 0)
    jitter = torch.randn(clusters * size, 4, generator=generator) * 0.05 * sides
    scores = torch.rand(clusters * size, generator=generator)
    return (boxes.repeat_interleave(size, 0) + jitter).to(device), scores.to(device)


def threshold_pairs(
    pairs: int, threshold: float, *, seed: int = 0, device: str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Pairs far from one another, each overlapping by a hair more or less than the threshold.

    Widths of a pair differ by every ratio at which such an overlap exists: what a search for the
    boxes that could suppress another must not miss.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(pairs, generator=generator, dtype=torch.double)

    x, y, width, height = (uniform(*r) for r in ((-2e4, 2e4), (-2e4, 2e4), (4, 84), (4, 84)))
    height = torch.where(uniform(0, 1) < 0.5, height, 30 * width)
    ratio = torch.where(uniform(0, 1) < 0.7, 1 / threshold, uniform(threshold, 1 / threshold))
    ratio = ratio * (1 - 1e-5)
    hair = 10 ** -uniform(2, 7) * torch.where(uniform(0, 1) < 0.7, 1.0, -1.0)
    wanted = threshold * (1 + hair)
    shared = (wanted / (1 + wanted) * (1 + ratio)).minimum(ratio).clamp(max=1) * width
    left = torch.where(uniform(0, 1) < 0.5, shared - ratio * width, width - shared) + x
    first = torch.stack([x, y, x + width, y + height], 1)
    second = torch.stack([left, y, left + ratio * width, y + height], 1)
    scores = torch.rand(2 * pairs, generator=generator)
    return torch.cat([first, second]).float().to(device), scores.to(device)


def _lattice(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Small integer boxes and few score levels: overlaps tie with the threshold, scores tie."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.randint(0, 8, (n, 2), generator=generator).float()
    sides = torch.randint(1, 5, (n, 2), generator=generator).float()
    scores = torch.randint(0, 4, (n,), generator=generator).float()
    return torch.cat([corner, corner + sides], 1), scores


def samples(dtype: torch.dtype) -> Iterator[Sample]:
    def sample(name: str, boxes: Tensor, scores: Tensor, threshold: float) -> Sample:
        return Sample(name, (boxes.to(dtype), scores.to(dtype), threshold))

    for n in (0, 1, 2, 31, 33, 61, 127, 128, 129, 257):
        yield sample(f"random-{n}", *random_boxes(n, extent=200, seed=n), 0.5)
    boxes, scores = clustered_boxes(9, 15, seed=1)
    for threshold in (0.0, 0.1, 0.3, 0.45, 0.5, 0.7, 0.95, 1.0, 1.1, -0.1, float("nan")):
        yield sample(f"clusters-{threshold}", boxes, scores, threshold)
    for seed, threshold in enumerate((0.25, 1 / 3, 0.5, 0.5000000001, 2 / 3)):
        yield sample(f"lattice-{threshold:.4f}", *_lattice(90, seed), threshold)
    boxes, scores = random_boxes(70, extent=100, seed=2)
    yield sample("identical", boxes[:1].expand(70, 4), scores, 0.5)
    yield sample("equal-scores", boxes, torch.zeros(70), 0.5)
    special = scores.clone()
    special[::7], special[1::7], special[2::7] = float("nan"), float("inf"), -float("inf")
    special[3::7], special[4::7] = 0.0, -0.0
    yield sample("special-scores", boxes, special, 0.5)
    yield sample("offset", boxes + 1000, scores, 0.5)
    yield sample("negative-coordinates", boxes - 150, scores, 0.5)
    yield sample("small", boxes * 2**-10, scores, 0.5)
    broken = boxes.clone()
    broken[::9, 0], broken[1::9, 3] = float("nan"), float("inf")
    broken[2::9] = broken[2::9][:, [2, 3, 0, 1]]
    broken[3::9, 2] = broken[3::9, 0]
    broken[4::9, [1, 3]] = broken[4::9, [3, 1]]
    broken[5::9, 0] = -float("inf")
    for threshold in (0.0, 0.5, -0.1):
        yield sample(f"degenerate-{threshold}", broken, scores, threshold)
    long = boxes.clone()
    long[::2, 2] = long[::2, 0] + 400
    yield sample("elongated", long, scores, 0.5)
    scales = 2.0 ** torch.linspace(-8, 8, 70)[:, None]
    yield sample("mixed-scales", boxes * scales, scores, 0.3)


def invalid() -> Iterator[Invalid]:
    boxes, scores = random_boxes(4)
    yield Invalid("list", ([1.0], scores, 0.5), {}, TypeError, "boxes")
    yield Invalid("rank", (boxes[0], scores, 0.5), {}, ValueError, "boxes")
    yield Invalid("columns", (boxes[:, :3], scores, 0.5), {}, ValueError, "boxes")
    yield Invalid("scores-rank", (boxes, scores[:, None], 0.5), {}, ValueError, "scores")
    yield Invalid("length", (boxes, scores[:3], 0.5), {}, ValueError, "scores")
    yield Invalid("integers", (boxes.long(), scores, 0.5), {}, TypeError, "boxes")
    yield Invalid("dtype-mix", (boxes.double(), scores, 0.5), {}, TypeError, "scores")
    yield Invalid("device-mix", (boxes, scores.to("meta"), 0.5), {}, ValueError, "scores")
    yield Invalid("backend", (boxes, scores, 0.5), {"backend": "gpu"}, ValueError, "backend")
    if not torch.cuda.is_available():
        gpu = {"backend": "cuda"}
        yield Invalid("refused", (boxes.to("meta"), scores.to("meta"), 0.5), gpu, RuntimeError, "")


def eager(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """The formula written out: the full overlap matrix, then the greedy pass over its rows."""
    order = scores.argsort(descending=True, stable=True)
    boxes = boxes[order]
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    low = torch.maximum(boxes[:, None, :2], boxes[:, :2])
    high = torch.minimum(boxes[:, None, 2:], boxes[:, 2:])
    intersection = (high - low).clamp(min=0).prod(2)
    overlaps = intersection / (area[:, None] + area - intersection) > iou_threshold
    overlaps.triu_(diagonal=1)
    kept = torch.ones(len(boxes), dtype=torch.bool, device=boxes.device)
    for i in range(len(boxes)):
        if kept[i]:
            kept &= ~overlaps[i]
    return order[kept]


def in_segments(n: int) -> Tensor:
    """Segments of every kind of number, with gaps and far apart."""
    return torch.tensor([7, -3, 0, 2**40, -(2**62)])[torch.arange(n) * 7 % 11 % 5]


def _batched_samples(dtype: torch.dtype) -> Iterator[Sample]:
    for sample in samples(dtype):
        boxes, scores, threshold = sample.args
        yield Sample(sample.name, (boxes, scores, in_segments(len(boxes)), threshold))
    boxes, scores = (t.to(dtype) for t in random_boxes(60, extent=60, seed=4))
    yield Sample("one-segment", (boxes, scores, torch.full((60,), 9), 0.3))
    yield Sample("every-box-its-own", (boxes, scores, torch.arange(60), 0.0))
    yield Sample("int32", (boxes, scores, (torch.arange(60) % 2).int(), 0.3))


def _match_samples(dtype: torch.dtype) -> Iterator[Sample]:
    for sample in samples(dtype):
        yield sample
        if sample.name.startswith(("random-6", "clusters-0.3", "degenerate")):
            idxs = {"idxs": in_segments(len(sample.args[0]))}
            yield Sample(f"{sample.name}, segments", sample.args, idxs)


def _decay_samples(dtype: torch.dtype, *options: dict[str, Any]) -> Iterator[Sample]:
    """Small sets with each of the options; those of edges alternately in segments."""
    names = ("random-", "lattice-0.5", "identical", "equal", "special", "degenerate-0.5", "elong")
    for sample in samples(dtype):
        boxes, scores, _ = sample.args
        if not sample.name.startswith(names) or len(boxes) > 130:
            continue
        for i, given in enumerate(options):
            if i % 2 and not sample.name.startswith("random-"):
                given = {**given, "idxs": in_segments(len(boxes))}
            yield Sample(f"{sample.name}, {i}", (boxes, scores), given)


def _soft_samples(dtype: torch.dtype) -> Iterator[Sample]:
    return _decay_samples(
        dtype,
        {"method": "linear", "iou_threshold": 0.3},
        {"method": "gaussian", "sigma": 0.5},
        {"method": "gaussian", "sigma": 0.1, "score_threshold": 0.3},
        {"method": "linear", "iou_threshold": 0.0, "score_threshold": 0.0},
        {"method": "hard", "iou_threshold": 0.5, "max_detections": 7},
        {"method": "linear", "iou_threshold": -1.0, "max_detections": 0},
    )


def _matrix_samples(dtype: torch.dtype) -> Iterator[Sample]:
    return _decay_samples(
        dtype,
        {"method": "gaussian"},
        {"method": "linear"},
        {"method": "gaussian", "sigma": 0.5, "score_threshold": 0.2, "max_detections": 9},
        {"method": "linear", "score_threshold": -1.0},
    )


def _rotated_samples(dtype: torch.dtype) -> Iterator[Sample]:
    def sample(name: str, n: int, extent: float, threshold: float, **kwargs: Any) -> Sample:
        boxes, scores = rotated_boxes(n, extent=extent, seed=n)
        return Sample(name, (boxes.to(dtype), scores.to(dtype), threshold), kwargs)

    for n in (0, 1, 2, 31, 61, 129):
        yield sample(f"random-{n}", n, 200, 0.3)
    for threshold in (0.0, 0.1, 0.5, 0.9, 1.0, -0.1, float("nan")):
        yield sample(f"dense-{threshold}", 60, 60, threshold)
    yield sample("degrees", 60, 60, 0.2, angle="deg")
    yield sample("counter-clockwise", 60, 60, 0.2, clockwise=False)
    yield sample("segments", 60, 60, 0.2, idxs=in_segments(60))
    for name, first, second in rotated_pairs(dtype):
        if not name.startswith("random-"):
            boxes = torch.cat([first, second])
            scores = torch.linspace(0, 1, len(boxes)).to(dtype)
            for threshold in (0.0, 0.4, -0.1):
                yield Sample(f"{name}, {threshold}", (boxes, scores, threshold))
                kwargs = {"angle": "deg"}
                yield Sample(f"{name}, {threshold}, degrees", (boxes, scores, threshold), kwargs)


def _invalid_batched() -> Iterator[Invalid]:
    for bad in invalid():
        if bad.name not in ("backend", "refused"):
            boxes, scores, threshold = bad.args
            args = boxes, scores, torch.zeros(4, dtype=torch.int64), threshold
            yield Invalid(bad.name, args, bad.kwargs, bad.error, bad.match)
    boxes, scores = random_boxes(4)
    ids = torch.arange(4)
    yield Invalid("float-ids", (boxes, scores, ids.float(), 0.5), {}, TypeError, "idxs")
    yield Invalid("ids-length", (boxes, scores, ids[:3], 0.5), {}, ValueError, "idxs")
    yield Invalid("ids-device", (boxes, scores, ids.to("meta"), 0.5), {}, ValueError, "idxs")


def _invalid_match() -> Iterator[Invalid]:
    yield from (bad for bad in invalid() if bad.name != "refused")
    boxes, scores = random_boxes(4)
    yield Invalid("ids", (boxes, scores, 0.5), {"idxs": torch.arange(3)}, ValueError, "idxs")


def _invalid_rotated() -> Iterator[Invalid]:
    boxes, scores = rotated_boxes(4)
    yield Invalid("columns", (boxes[:, :4], scores, 0.5), {}, ValueError, "boxes")
    yield Invalid("length", (boxes, scores[:3], 0.5), {}, ValueError, "scores")
    yield Invalid("angle", (boxes, scores, 0.5), {"angle": "grad"}, ValueError, "angle")


def _invalid_decay() -> Iterator[Invalid]:
    boxes, scores = random_boxes(4)
    call = boxes, scores
    yield Invalid("columns", (boxes[:, :3], scores), {}, ValueError, "boxes")
    yield Invalid("length", (boxes, scores[:3]), {}, ValueError, "scores")
    yield Invalid("method", call, {"method": "cosine"}, ValueError, "method")
    yield Invalid("sigma", call, {"sigma": 0.0}, ValueError, "sigma")
    yield Invalid("sigma-nan", call, {"sigma": float("nan")}, ValueError, "sigma")
    yield Invalid("max", call, {"max_detections": -1}, ValueError, "max_detections")
    yield Invalid("max-type", call, {"max_detections": 1.5}, TypeError, "max_detections")
    yield Invalid("ids", call, {"idxs": torch.arange(3)}, ValueError, "idxs")


def _invalid_soft() -> Iterator[Invalid]:
    yield from _invalid_decay()
    for threshold in (-0.1, float("nan")):
        kwargs = {"score_threshold": threshold}
        yield Invalid(f"threshold-{threshold}", random_boxes(4), kwargs, ValueError, "score_thr")


def _none_if(idxs: Tensor | None) -> Tensor:
    return torch.empty(0, dtype=torch.int64) if idxs is None else idxs


def _match_definition(
    boxes: Tensor, scores: Tensor, iou_threshold: float, *, idxs: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    return reference.suppress(boxes, scores, _none_if(idxs), iou_threshold, "aligned", True)


def _rotated_definition(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float,
    *,
    idxs: Tensor | None = None,
    angle: str = "rad",
    clockwise: bool = True,
) -> Tensor:
    if not clockwise:
        boxes = boxes * boxes.new_tensor([1, 1, 1, 1, -1])
    overlap = "rotated_degrees" if angle == "deg" else "rotated"
    return reference.suppress(boxes, scores, _none_if(idxs), iou_threshold, overlap, False)[0]


def _soft_definition(
    boxes: Tensor,
    scores: Tensor,
    *,
    method: str = "linear",
    iou_threshold: float = 0.3,
    sigma: float = 0.5,
    score_threshold: float = 0.001,
    max_detections: int = -1,
    idxs: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    limits = iou_threshold, sigma, score_threshold, max_detections
    return reference.soft_nms(boxes, scores, _none_if(idxs), method, *limits)


def _matrix_definition(
    boxes: Tensor,
    scores: Tensor,
    *,
    method: str = "gaussian",
    sigma: float = 2.0,
    score_threshold: float = 0.0,
    max_detections: int = -1,
    idxs: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    limits = sigma, score_threshold, max_detections
    return reference.matrix_nms(boxes, scores, _none_if(idxs), method, *limits)


def _eager_batched(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    """One call a class, then all kept boxes by score."""
    kept = [torch.empty(0, dtype=torch.int64, device=boxes.device)]
    for segment in idxs.unique():
        own = (idxs == segment).nonzero()[:, 0]
        kept.append(own[eager(boxes[own], scores[own], iou_threshold)])
    found = torch.cat(kept)
    return found[scores[found].argsort(descending=True)]


def _benchmark(
    name: str, make: Any, shape: dict[str, int], kwargs: dict[str, Any] | None = None
) -> BenchmarkCase:
    # The least: every box read once and sorted, the kept ones written. Overlaps depend on the data.
    return BenchmarkCase(
        name=name,
        shape=shape,
        make=make,
        kwargs=kwargs or {},
        flops=lambda *_, **__: 0.0,
        bytes=lambda boxes, *_, **__: boxes.numel() * 1.25 * boxes.element_size() + 8 * len(boxes),
    )


def _uniform_case(device: str, n: int) -> tuple[Any, ...]:
    return (*random_boxes(n, device=device), 0.5)


def _clustered_case(device: str, clusters: int, size: int) -> tuple[Any, ...]:
    return (*clustered_boxes(clusters, size, device=device), 0.5)


def _spread_case(device: str, n: int) -> tuple[Any, ...]:
    return (*random_boxes(n, extent=20.0 * n**0.5, device=device), 0.5)


def _batched_case(device: str, n: int, classes: int) -> tuple[Any, ...]:
    boxes, scores = random_boxes(n, device=device)
    idxs = torch.randint(0, classes, (n,), generator=torch.Generator().manual_seed(0))
    return boxes, scores, idxs.to(device), 0.5


def _rotated_case(device: str, n: int) -> tuple[Any, ...]:
    return (*rotated_boxes(n, device=device), 0.3)


def _decay_case(device: str, n: int) -> tuple[Any, ...]:
    return random_boxes(n, device=device)


NMS = OpSpec(
    name="nms",
    function=ops.nms,
    definition=reference.nms,
    eager=eager,
    # At its peak it holds four tensors [N, N, 2].
    eager_bytes=lambda boxes, *_: 8.0 * len(boxes) ** 2 * boxes.element_size(),
    samples=samples,
    invalid=invalid,
    dispatch_args=lambda boxes, scores, iou_threshold: (boxes, scores, iou_threshold),
    benchmarks=(
        _benchmark("1 box", _uniform_case, {"n": 1}),
        _benchmark("1 000 boxes", _uniform_case, {"n": 1000}),
        _benchmark("8 400 boxes", _uniform_case, {"n": 8400}),
        _benchmark("20 000 boxes", _uniform_case, {"n": 20000}),
        _benchmark("200 clusters of 40", _clustered_case, {"clusters": 200, "size": 40}),
        _benchmark("40 clusters of 500", _clustered_case, {"clusters": 40, "size": 500}),
        _benchmark("1 000 000 boxes", _spread_case, {"n": 1_000_000}),
    ),
)

BATCHED_NMS = OpSpec(
    name="batched_nms",
    function=ops.batched_nms,
    definition=reference.batched_nms,
    eager=_eager_batched,
    samples=_batched_samples,
    invalid=_invalid_batched,
    dispatch_args=lambda boxes, scores, idxs, iou_threshold: (boxes, scores, idxs, iou_threshold),
    benchmarks=(
        _benchmark("10 000 boxes, 80 classes", _batched_case, {"n": 10_000, "classes": 80}),
    ),
)

NMS_MATCH = OpSpec(
    name="nms_match",
    operator="suppress",
    function=ops.nms_match,
    definition=_match_definition,
    eager=_match_definition,
    samples=_match_samples,
    invalid=_invalid_match,
    dispatch_args=lambda boxes, scores, threshold, idxs=None: (
        boxes,
        scores,
        _none_if(idxs),
        threshold,
        "aligned",
        True,
    ),
    benchmarks=(),
)

NMS_ROTATED = OpSpec(
    name="nms_rotated",
    operator="suppress",
    function=ops.nms_rotated,
    definition=_rotated_definition,
    eager=_rotated_definition,
    samples=_rotated_samples,
    invalid=_invalid_rotated,
    dispatch_args=lambda boxes, scores, threshold, **_: (
        boxes,
        scores,
        _none_if(None),
        threshold,
        "rotated",
        False,
    ),
    benchmarks=(_benchmark("5 000 boxes", _rotated_case, {"n": 5000}),),
)

SOFT_NMS = OpSpec(
    name="soft_nms",
    function=ops.soft_nms,
    definition=_soft_definition,
    eager=_soft_definition,
    samples=_soft_samples,
    invalid=_invalid_soft,
    dispatch_args=lambda boxes, scores, **_: (
        boxes,
        scores,
        _none_if(None),
        "linear",
        0.3,
        0.5,
        0.001,
        -1,
    ),
    benchmarks=(
        _benchmark("5 000 boxes, linear", _decay_case, {"n": 5000}, {"method": "linear"}),
        _benchmark("5 000 boxes, gaussian", _decay_case, {"n": 5000}, {"method": "gaussian"}),
    ),
)

MATRIX_NMS = OpSpec(
    name="matrix_nms",
    function=ops.matrix_nms,
    definition=_matrix_definition,
    eager=_matrix_definition,
    samples=_matrix_samples,
    invalid=_invalid_decay,
    dispatch_args=lambda boxes, scores, **_: (
        boxes,
        scores,
        _none_if(None),
        "gaussian",
        2.0,
        0.0,
        -1,
    ),
    benchmarks=(_benchmark("5 000 boxes", _decay_case, {"n": 5000}),),
)

SPECS = (NMS, BATCHED_NMS, NMS_MATCH, NMS_ROTATED, SOFT_NMS, MATRIX_NMS)
