"""Sample inputs and benchmark cases of the ``boxes`` family."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastzoo import ops, reference
from fastzoo.reference.boxes import box_area, box_intersection
from fastzoo.reference.precision import compute_dtype
from fastzoo.testing.spec import BenchmarkCase, Invalid, OpSpec, Sample
from fastzoo.testing.tolerance import in_double, unit_roundoff


def random_boxes(
    n: int, *, extent: float = 600.0, seed: int = 0, device: str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Boxes with a uniform top-left corner and sides of 4 to 84, uniform scores."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(n, 2, generator=generator) * extent
    sides = torch.rand(n, 2, generator=generator) * 80 + 4
    scores = torch.rand(n, generator=generator)
    return torch.cat([corner, corner + sides], 1).to(device), scores.to(device)


def rotated_boxes(
    n: int, *, extent: float = 600.0, seed: int = 0, device: str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Boxes (cx, cy, width, height, angle) of any angle, with sides of 4 to 84, uniform scores."""
    boxes, scores = random_boxes(n, extent=extent, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    angle = (torch.rand(n, 1, generator=generator) - 0.5) * 7
    return torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2], angle], 1).to(device), scores.to(
        device
    )


def jittered(boxes: Tensor, seed: int = 0) -> Tensor:
    """What a head regresses to: each box moved by about a tenth of its sides."""
    generator = torch.Generator().manual_seed(seed)
    sides = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
    return boxes + 0.1 * sides * torch.randn(boxes.shape, generator=generator).to(boxes)


def _pairs(dtype: torch.dtype) -> Iterator[tuple[str, Tensor, Tensor]]:
    for n in (0, 1, 2, 15, 17, 33):
        boxes, _ = random_boxes(n, extent=60, seed=n)
        yield f"random-{n}", boxes.to(dtype), jittered(boxes, n).to(dtype)
    generator = torch.Generator().manual_seed(0)
    corner = torch.randint(0, 6, (2, 40, 2), generator=generator).to(dtype)
    sides = torch.randint(1, 4, (2, 40, 2), generator=generator).to(dtype)
    first, second = torch.cat([corner, corner + sides], 2)
    yield "lattice", first, second
    yield "identical", first, first.clone()
    boxes, _ = random_boxes(20, seed=3)
    yield "offset", (boxes + 1000).to(dtype), (jittered(boxes) + 1000).to(dtype)
    yield "small", (boxes * 2**-10).to(dtype), (jittered(boxes) * 2**-10).to(dtype)


def _edges(dtype: torch.dtype) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Boxes without area, inverted, or not finite."""
    corners = [
        [0, 0, 2, 2], [1, 1, 1, 3], [1, 1, 1, 1], [3, 3, 1, 1], [0, 2, 4, 1],
        [torch.nan, 0, 1, 1], [0, 0, torch.inf, 1], [-torch.inf, 0, 1, 1],
    ]  # fmt: skip
    boxes = torch.tensor(corners, dtype=dtype)
    yield "degenerate", boxes, boxes.flip(0)


def _overlap_samples(dtype: torch.dtype) -> Iterator[Sample]:
    for name, first, second in (*_pairs(dtype), *_edges(dtype)):
        yield Sample(name, (first, second))
    boxes, _ = random_boxes(9, extent=40, seed=5)
    other, _ = random_boxes(14, extent=40, seed=6)
    yield Sample("sizes", (boxes.to(dtype), other.to(dtype)))
    yield Sample("none", (boxes.to(dtype), other[:0].to(dtype)))


def _formats(dtype: torch.dtype) -> Iterator[Sample]:
    yield from _overlap_samples(dtype)
    boxes, _ = random_boxes(9, extent=40, seed=5)
    # Whole numbers and halves: the corners are exact in any dtype.
    boxes = boxes.round()
    for fmt in ("xywh", "cxcywh"):
        yield Sample(fmt, (boxes.to(dtype), boxes.flip(0).to(dtype)), {"fmt": fmt})


def _loss_samples(dtype: torch.dtype) -> Iterator[Sample]:
    for name, first, second in _pairs(dtype):
        yield Sample(name, (first, second))
        if name == "random-17":
            yield Sample(f"{name}, mean", (first, second), {"reduction": "mean"})
            yield Sample(f"{name}, sum", (first, second), {"reduction": "sum", "eps": 1e-3})


def _terms(first: Tensor, second: Tensor, pairwise: bool) -> dict[str, Tensor]:
    """Sizes of what an overlap is computed from, in float64."""
    first, second = first.double(), second.double()
    if pairwise:
        first, second = first[:, None], second[None]
    shared = box_intersection(first, second)
    areas = box_area(first).abs() + box_area(second).abs() + shared
    union = box_area(first) + box_area(second) - shared
    hull = torch.maximum(first[..., 2:], second[..., 2:]) - torch.minimum(
        first[..., :2], second[..., :2]
    )
    between = (first[..., :2] + first[..., 2:] - second[..., :2] - second[..., 2:]) / 2
    return {
        "cancelling": areas / union.abs(),
        "iou": shared / union,
        "hull": hull.prod(-1).abs(),
        "areas": areas,
        "union": union.abs(),
        "diagonal": hull.square().sum(-1),
        "between": between.abs().sum(-1),
        "farthest": torch.maximum(first.abs().amax(-1), second.abs().amax(-1)),
        "longest": hull.abs().amax(-1),
    }


def tolerance(first: Tensor, second: Tensor, *, measure: str, pairwise: bool) -> Tensor:
    """Absolute error of an overlap, a rounding being relative 2^-24.

    Sides are differences of exact numbers, so areas are good to three roundings, and a union to
    eight of what is added up in it. Centres are good to the rounding of coordinates, however far
    they lie from 0. An arctangent is allowed four roundings, and ``alpha v`` passes on the error
    of the iou and at most twice that of ``v``, as ``alpha <= 1``.
    """
    u = unit_roundoff(compute_dtype(first))
    t = _terms(first, second, pairwise)
    iou = 8 * u * (1 + t["cancelling"]) * (1 + t["iou"].abs())
    if measure == "iou":
        return iou
    if measure == "giou":
        return iou + 8 * u * (2 + t["areas"] / t["hull"]) * (1 + t["union"] / t["hull"])
    centre = 4 * u * t["farthest"]
    error = iou + (2 * t["between"] * centre + 2 * centre**2) / t["diagonal"] + 16 * u
    return error if measure == "diou" else 2 * error + 64 * u


def _loss_tolerance(first: Tensor, second: Tensor, **kwargs: Any) -> Tensor:
    error = tolerance(first, second, measure="ciou", pairwise=False)
    error = error + 2 * unit_roundoff(compute_dtype(first))
    if kwargs.get("reduction", "none") == "none":
        return error
    # A sum of n losses of at most 3, n roundings of it.
    n = len(first)
    error = error.sum() + 3 * n * n * unit_roundoff(compute_dtype(first))
    return error / n if kwargs["reduction"] == "mean" else error


def _largest_derivative(first: Tensor, second: Tensor, pairwise: bool) -> float:
    """Of the terms that a gradient's entry is the sum of."""
    t = _terms(first, second, pairwise)
    each = (t["longest"] * (1 + t["cancelling"]) / t["union"]).nan_to_num(0, 0, 0)
    return float(8 * each.sum(-1).max()) if pairwise and each.numel() else float(8 * each.sum())


def _gradient_rtol(pairwise: bool) -> Callable[..., float]:
    def rtol(dtype: torch.dtype, first: Tensor, second: Tensor, **_: Any) -> float:
        u = unit_roundoff(compute_dtype(first))
        t = _terms(first, second, pairwise)
        far = t["farthest"] / t["diagonal"].sqrt()
        worst = (t["cancelling"] ** 2 + far).nan_to_num(0, 0, 0)
        return 32 * u * float(worst.max()) if worst.numel() else 0.0

    return rtol


def invalid_pair(function: Callable[..., Any]) -> Iterator[Invalid]:
    boxes, _ = random_boxes(4)
    yield Invalid("list", ([[0.0] * 4], boxes), {}, TypeError, "boxes1")
    yield Invalid("rank", (boxes, boxes[0]), {}, ValueError, "boxes2")
    yield Invalid("columns", (boxes[:, :3], boxes), {}, ValueError, "boxes1")
    yield Invalid("integers", (boxes.long(), boxes), {}, TypeError, "boxes1")
    yield Invalid("dtype-mix", (boxes, boxes.double()), {}, TypeError, "boxes2")
    yield Invalid("device-mix", (boxes, boxes.to("meta")), {}, ValueError, "boxes2")
    yield Invalid("backend", (boxes, boxes), {"backend": "gpu"}, ValueError, "backend")


def _invalid_iou() -> Iterator[Invalid]:
    yield from invalid_pair(ops.box_iou)
    boxes, _ = random_boxes(4)
    yield Invalid("fmt", (boxes, boxes), {"fmt": "xyxyr"}, ValueError, "fmt")


def _invalid_loss() -> Iterator[Invalid]:
    yield from invalid_pair(ops.complete_box_iou_loss)
    boxes, _ = random_boxes(4)
    yield Invalid("length", (boxes, boxes[:3]), {}, ValueError, "boxes2")
    yield Invalid("reduction", (boxes, boxes), {"reduction": "all"}, ValueError, "reduction")


def _invalid_rotated() -> Iterator[Invalid]:
    boxes, _ = rotated_boxes(4)
    yield Invalid("columns", (boxes[:, :4], boxes), {}, ValueError, "boxes1")
    yield Invalid("integers", (boxes, boxes.long()), {}, TypeError, "boxes2")
    yield Invalid("angle", (boxes, boxes), {"angle": "degrees"}, ValueError, "angle")
    yield Invalid("length", (boxes, boxes[:3]), {"pairwise": False}, ValueError, "boxes2")


def eager_box_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """The formula as torchvision writes it."""
    area1 = (boxes1[:, 2] - boxes1[:, 0]) * (boxes1[:, 3] - boxes1[:, 1])
    area2 = (boxes2[:, 2] - boxes2[:, 0]) * (boxes2[:, 3] - boxes2[:, 1])
    low = torch.max(boxes1[:, None, :2], boxes2[:, :2])
    high = torch.min(boxes1[:, None, 2:], boxes2[:, 2:])
    sides = (high - low).clamp(min=0)
    shared = sides[:, :, 0] * sides[:, :, 1]
    return shared / (area1[:, None] + area2 - shared)


def _eager_loss(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    return reference.complete_box_iou_loss(boxes1, boxes2, "mean")


def _two(device: str, n: int, m: int) -> tuple[Tensor, Tensor]:
    return random_boxes(n, device=device)[0], random_boxes(m, seed=1, device=device)[0]


def _regression(device: str, n: int) -> tuple[Tensor, Tensor]:
    boxes, _ = random_boxes(n, device=device)
    return jittered(boxes), boxes


def _iou_case(n: int, m: int) -> BenchmarkCase:
    # The least: both sets read, the matrix written; 12 operations a pair.
    return BenchmarkCase(
        name=f"{n} x {m}",
        shape={"n": n, "m": m},
        make=_two,
        kwargs={},
        flops=lambda a, b: 12.0 * len(a) * len(b),
        bytes=lambda a, b: 4.0 * len(a) * len(b) + 16.0 * (len(a) + len(b)),
    )


def _loss_case(n: int) -> BenchmarkCase:
    # The least: both sets read twice, one gradient written; about 200 operations a pair.
    return BenchmarkCase(
        name=f"{n} pairs",
        shape={"n": n},
        make=_regression,
        kwargs={"reduction": "mean"},
        flops=lambda a, b, **_: 200.0 * len(a),
        bytes=lambda a, b, **_: 80.0 * len(a),
        gradients=(0,),
        tolerance=lambda a, b, **_: 1e-4,
    )


_IOU = OpSpec(
    name="box_iou",
    operator="box_overlap",
    function=ops.box_iou,
    definition=in_double(reference.box_iou),
    eager=eager_box_iou,
    # Two tensors [N, M, 2] and two [N, M] at once.
    eager_bytes=lambda a, b: 24.0 * len(a) * len(b),
    samples=_formats,
    invalid=_invalid_iou,
    dispatch_args=lambda a, b, **_: (a, b, "iou", True, 0.0),
    fixed_shape=True,
    differentiable=lambda overlap: overlap,
    gradient_sample=lambda dtype: Sample(
        "gradient", tuple(b.to(dtype) for b in _two_overlapping(5, 4))
    ),
    tolerance=lambda a, b, fmt="xyxy": tolerance(
        reference.to_corners(a, fmt), reference.to_corners(b, fmt), measure="iou", pairwise=True
    ),
    gradient_rtol=_gradient_rtol(True),
    cancellation=lambda a, b, **_: _largest_derivative(a, b, True),
    benchmarks=(_iou_case(300, 30000), _iou_case(5000, 5000)),
)


def _two_overlapping(n: int, m: int) -> tuple[Tensor, Tensor]:
    return random_boxes(n, extent=30, seed=1)[0], random_boxes(m, extent=30, seed=2)[0]


def _pairwise(name: str, measure: str, eps: float) -> OpSpec:
    definition = getattr(reference, name)
    return dataclasses.replace(
        _IOU,
        name=name,
        function=getattr(ops, name),
        definition=in_double(definition),
        eager=definition,
        samples=_overlap_samples if measure == "giou" else _finite_samples,
        invalid=lambda: invalid_pair(getattr(ops, name)),
        dispatch_args=lambda a, b, **_: (a, b, measure, True, eps),
        tolerance=lambda a, b, **_: tolerance(a, b, measure=measure, pairwise=True),
        held_constant=measure == "ciou",
        benchmarks=(),
    )


def _finite_samples(dtype: torch.dtype) -> Iterator[Sample]:
    return (s for s in _overlap_samples(dtype) if s.name != "degenerate")


COMPLETE_BOX_IOU_LOSS = OpSpec(
    name="complete_box_iou_loss",
    operator="box_overlap",
    function=ops.complete_box_iou_loss,
    definition=in_double(reference.complete_box_iou_loss),
    eager=_eager_loss,
    samples=_loss_samples,
    invalid=_invalid_loss,
    dispatch_args=lambda a, b, **_: (a, b, "ciou", False, 1e-7),
    fixed_shape=True,
    differentiable=lambda loss: loss,
    gradient_sample=lambda dtype: Sample(
        "gradient", tuple(b.to(dtype) for b in (_regression("cpu", 5)))
    ),
    tolerance=_loss_tolerance,
    gradient_rtol=_gradient_rtol(False),
    cancellation=lambda a, b, **_: _largest_derivative(a, b, False),
    held_constant=True,
    benchmarks=(_loss_case(10_000), _loss_case(1_000_000)),
)


def rotated_pairs(dtype: torch.dtype) -> Iterator[tuple[str, Tensor, Tensor]]:
    for n in (0, 1, 2, 9, 17, 33):
        boxes, _ = rotated_boxes(n, extent=80, seed=n)
        other, _ = rotated_boxes(n, extent=80, seed=n + 100)
        yield f"random-{n}", boxes.to(dtype), other.to(dtype)
    boxes, _ = rotated_boxes(24, extent=50, seed=7)
    turn = torch.zeros(24, 5)
    turn[:, 4] = torch.arange(24) * 15
    upright = boxes * torch.tensor([1.0, 1, 1, 1, 0])
    yield "turns", (upright + turn).to(dtype), (upright + turn).to(dtype)
    touching = torch.tensor([[0.0, 0, 2, 2, 0], [2, 0, 2, 2, 0], [0, 2, 2, 2, 90], [2, 2, 2, 2, 0]])
    yield "touching", touching.to(dtype), touching.to(dtype)
    slivers = boxes.clone()
    slivers[:, 3] *= 2**-12
    yield "slivers", slivers.to(dtype), boxes.to(dtype)
    broken = boxes.clone()
    broken[::6, 2] = 0
    broken[1::6, 3] = -1
    broken[2::6, 0] = torch.nan
    broken[3::6, 4] = torch.inf
    broken[4::6, 2] = torch.inf
    yield "degenerate", broken.to(dtype), boxes.to(dtype)
    yield "offset", (boxes + 500).to(dtype), (boxes.flip(0) + 500).to(dtype)


def _rotated_samples(dtype: torch.dtype) -> Iterator[Sample]:
    for name, first, second in rotated_pairs(dtype):
        yield Sample(name, (first, second))
        yield Sample(f"{name}, degrees", (first, second), {"angle": "deg"})
        each = {"pairwise": False, "clockwise": False}
        yield Sample(f"{name}, pairs", (first, second), each)


def _rotated_definition(
    first: Tensor,
    second: Tensor,
    *,
    angle: str = "rad",
    clockwise: bool = True,
    pairwise: bool = True,
) -> Tensor:
    if not clockwise:
        first, second = (b * b.new_tensor([1, 1, 1, 1, -1]) for b in (first, second))
    return reference.box_iou_rotated(first, second, angle == "deg", pairwise)


BOX_IOU_ROTATED = OpSpec(
    name="box_iou_rotated",
    function=ops.box_iou_rotated,
    definition=_rotated_definition,
    eager=_rotated_definition,
    samples=_rotated_samples,
    invalid=_invalid_rotated,
    dispatch_args=lambda a, b, **_: (a, b, False, True),
    fixed_shape=True,
    benchmarks=(),
)

SPECS = (
    _IOU,
    _pairwise("generalized_box_iou", "giou", 0.0),
    _pairwise("distance_box_iou", "diou", 1e-7),
    _pairwise("complete_box_iou", "ciou", 1e-7),
    COMPLETE_BOX_IOU_LOSS,
    BOX_IOU_ROTATED,
)
