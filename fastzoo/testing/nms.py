"""Sample inputs and benchmark cases of the ``nms`` family."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastzoo import ops, reference
from fastzoo.testing.boxes import random_boxes
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


def _benchmark(name: str, make: Any, shape: dict[str, int]) -> BenchmarkCase:
    # The least: every box read once and sorted, the kept ones written. Overlaps depend on the data.
    return BenchmarkCase(
        name=name,
        shape=shape,
        make=make,
        kwargs={},
        flops=lambda boxes, scores, threshold: 0.0,
        bytes=lambda boxes, scores, threshold: len(boxes) * (5 * boxes.element_size() + 8),
    )


def _uniform_case(device: str, n: int) -> tuple[Any, ...]:
    return (*random_boxes(n, device=device), 0.5)


def _clustered_case(device: str, clusters: int, size: int) -> tuple[Any, ...]:
    return (*clustered_boxes(clusters, size, device=device), 0.5)


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
    ),
)
