"""Overlaps against polygons of shapely, closed forms and torchvision's loss formulas."""

import math

import numpy as np
import pytest
import shapely
import torch

from fastzoo import ops
from fastzoo.ops._operator import OPERATORS
from fastzoo.testing.boxes import jittered, random_boxes, rotated_boxes
from tests.conftest import DEVICE

BACKENDS = [
    b
    for b in ("reference", "cpu", "cuda", "triton")
    if OPERATORS["box_overlap"].refusal(b, DEVICE) is None
]
ROTATED = [b for b in BACKENDS if b in OPERATORS["box_iou_rotated"].has]


def polygon(box: list[float]) -> shapely.Polygon:
    """A rotated box, its angle in radians from x towards y."""
    x, y, width, height, angle = box
    c, s = math.cos(angle), math.sin(angle)
    corners = [(-0.5, -0.5), (0.5, -0.5), (0.5, 0.5), (-0.5, 0.5)]
    return shapely.Polygon(
        [(x + c * p * width - s * q * height, y + s * p * width + c * q * height)
         for p, q in corners]
    )  # fmt: skip


def polygon_iou(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    a = np.array([polygon(b) for b in first.tolist()])
    b = np.array([polygon(b) for b in second.tolist()])
    shared = shapely.area(shapely.intersection(a, b))
    return torch.from_numpy(shared / (shapely.area(a) + shapely.area(b) - shared))


def hard_pairs() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Pairs on which clippers that sort corners fail."""
    boxes = rotated_boxes(400, extent=120, seed=1)[0].double()
    other = rotated_boxes(400, extent=120, seed=2)[0].double()
    generator = torch.Generator().manual_seed(3)

    def nudge(size: float) -> torch.Tensor:
        return torch.randn(400, 5, generator=generator, dtype=torch.double) * size

    slivers = boxes.clone()
    slivers[:, 3] *= 1e-4
    half_turn, quarter = boxes.clone(), boxes.clone()
    half_turn[:, 4] += math.pi
    quarter[:, 4] += math.pi / 2
    quarter[:, 2], quarter[:, 3] = boxes[:, 3], boxes[:, 2]
    touching = boxes.clone()
    touching[:, 0] += boxes[:, 2] * torch.cos(boxes[:, 4])
    touching[:, 1] += boxes[:, 2] * torch.sin(boxes[:, 4])
    inside = boxes * torch.tensor([1, 1, 0.5, 0.5, 1], dtype=torch.double)
    return {
        "any": (boxes, other),
        "identical": (boxes, boxes.clone()),
        "nearly identical": (boxes, boxes + nudge(1e-9)),
        "close": (boxes, boxes + nudge(1e-3)),
        "half a turn": (boxes, half_turn),
        "sides exchanged": (boxes, quarter),
        "an edge shared": (boxes, touching),
        "one within the other": (boxes, inside),
        "slivers": (slivers, boxes),
        "crossing slivers": (slivers, slivers + torch.tensor([0, 0, 0, 0, 1.0]).double()),
    }


@pytest.mark.parametrize("name", hard_pairs())
@pytest.mark.parametrize("backend", ROTATED)
def test_rotated_overlap_is_that_of_polygons(backend: str, name: str) -> None:
    first, second = (b.to(DEVICE) for b in hard_pairs()[name])
    found = ops.box_iou_rotated(first, second, pairwise=False, backend=backend).cpu()
    # shapely itself gives 0 for one of the boxes whose sides were exchanged.
    whole = name in ("identical", "half a turn", "sides exchanged")
    exact = torch.ones_like(found) if whole else polygon_iou(first, second)
    # Corners are good to a few 2^-52 of the diagonal D, and an area to that times the perimeter:
    # relative to the smaller area A a few 2^-50 D^2 / A, and shapely's likewise.
    a, b = (boxes.double().cpu() for boxes in (first, second))
    diagonal = torch.maximum(a[:, 2:4].norm(dim=1), b[:, 2:4].norm(dim=1))
    bound = 2.0**-46 * diagonal**2 / torch.minimum(a[:, 2] * a[:, 3], b[:, 2] * b[:, 3])
    assert ((found - exact).abs() <= bound).all()
    assert ((found >= 0) & (found <= 1)).all()
    mirrored = ops.box_iou_rotated(second, first, pairwise=False, backend=backend).cpu()
    assert torch.equal(found, mirrored)
    if name == "identical":
        assert (found == 1).all()


@pytest.mark.parametrize("backend", ROTATED)
def test_what_other_libraries_get_wrong(backend: str) -> None:
    # Reported as 0.333 for identical boxes (mmcv), 0.585 (detectron2), 0.37 for disjoint ones.
    identical = torch.tensor([[160.0, 153, 230, 23, -37], [293, 296, 3, 22, -0.00001]])
    same = identical.to(DEVICE)
    iou = ops.box_iou_rotated(same, same, angle="deg", pairwise=False, backend=backend)
    assert (iou == 1).all()
    far = same + torch.tensor([400.0, 0, 0, 0, 0], device=DEVICE)
    assert (ops.box_iou_rotated(same, far, angle="deg", backend=backend)[0] == 0).all()


@pytest.mark.parametrize("backend", ROTATED)
def test_units_and_directions_of_angles(backend: str) -> None:
    boxes = torch.tensor([[0.0, 0, 8, 2, 30], [3, 2, 8, 2, 50]], device=DEVICE)
    radians = boxes * torch.tensor([1, 1, 1, 1, math.pi / 180], device=DEVICE)
    mirrored = boxes * torch.tensor([1, -1, 1, 1, 1.0], device=DEVICE)
    clockwise = ops.box_iou_rotated(boxes, boxes, angle="deg", backend=backend)
    assert clockwise[0, 1] > 0.05
    torch.testing.assert_close(ops.box_iou_rotated(radians, radians, backend=backend), clockwise)
    counter = ops.box_iou_rotated(mirrored, mirrored, angle="deg", clockwise=False, backend=backend)
    torch.testing.assert_close(counter, clockwise)
    other = ops.box_iou_rotated(boxes, boxes, angle="deg", clockwise=False, backend=backend)
    assert abs(other[0, 1] - clockwise[0, 1]) > 0.01


@pytest.mark.parametrize("backend", BACKENDS)
def test_right_angles_give_the_overlap_of_upright_boxes(backend: str) -> None:
    if backend not in ROTATED:
        pytest.skip("has no rotated boxes")
    boxes, _ = random_boxes(40, extent=60)
    boxes = boxes.round().to(DEVICE)
    centres, sides = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    upright = ops.box_iou(boxes.double(), boxes.double(), backend=backend)
    for turn in range(0, 720, 90):
        swapped = sides.flip(1) if turn % 180 else sides
        angle = torch.full_like(sides[:, :1], turn)
        turned = torch.cat([centres, swapped, angle], 1).double()
        found = ops.box_iou_rotated(turned, turned, angle="deg", backend=backend)
        torch.testing.assert_close(found, upright, rtol=1e-14, atol=1e-15)


def torchvision_loss(kind: str, a: np.ndarray, b: np.ndarray, eps: float = 1e-7) -> np.ndarray:
    """The published losses, pair by pair in numpy."""
    losses = []
    for (x1, y1, x2, y2), (X1, Y1, X2, Y2) in zip(a, b, strict=True):
        shared = max(0, min(x2, X2) - max(x1, X1)) * max(0, min(y2, Y2) - max(y1, Y1))
        union = (x2 - x1) * (y2 - y1) + (X2 - X1) * (Y2 - Y1) - shared
        iou = shared / (union + eps)
        w, h = max(x2, X2) - min(x1, X1), max(y2, Y2) - min(y1, Y1)
        if kind == "generalized":
            losses.append(1 - iou + (w * h - union) / (w * h + eps))
            continue
        centre = ((x1 + x2 - X1 - X2) / 2) ** 2 + ((y1 + y2 - Y1 - Y2) / 2) ** 2
        loss = 1 - iou + centre / (w * w + h * h + eps)
        if kind == "complete":
            turn = math.atan((X2 - X1) / (Y2 - Y1)) - math.atan((x2 - x1) / (y2 - y1))
            v = 4 / math.pi**2 * turn**2
            loss += v * v / (1 - iou + v + eps)
        losses.append(loss)
    return np.array(losses)


@pytest.mark.parametrize("kind", ["generalized", "distance", "complete"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_losses_are_the_published_ones(backend: str, kind: str) -> None:
    boxes = random_boxes(50, extent=60)[0].double()
    moved = jittered(boxes)
    moved[::5] = boxes[::5]
    moved[1::5] += 500
    exact = torch.from_numpy(torchvision_loss(kind, boxes.numpy(), moved.numpy()))
    loss = getattr(ops, f"{kind}_box_iou_loss")
    given = boxes.to(DEVICE), moved.to(DEVICE)
    torch.testing.assert_close(loss(*given, backend=backend).cpu(), exact, rtol=1e-13, atol=1e-14)
    mean = loss(*given, reduction="mean", backend=backend).cpu()
    torch.testing.assert_close(mean, exact.mean(), rtol=1e-13, atol=0)
    pairwise = getattr(ops, f"{kind}_box_iou")(*given, backend=backend).cpu()
    torch.testing.assert_close(1 - pairwise.diagonal(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("fmt", ["xywh", "cxcywh"])
def test_formats(fmt: str) -> None:
    boxes = random_boxes(20, extent=60)[0].round()
    sides = boxes[:, 2:] - boxes[:, :2]
    first = boxes[:, :2] if fmt == "xywh" else boxes[:, :2] + sides / 2
    given = torch.cat([first, sides], 1)
    assert torch.equal(ops.box_iou(given, given, fmt), ops.box_iou(boxes, boxes))


def test_no_matrix_of_intermediates() -> None:
    from fastzoo.testing.timing import peak_memory

    boxes, _ = random_boxes(2000)
    peak = peak_memory(lambda: ops.box_iou(boxes, boxes), "cpu")
    assert peak < 1.2 * 4 * 2000 * 2000


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_many_tiles_and_any_number_of_threads(threads: int) -> None:
    first = random_boxes(301, extent=150, seed=1)[0].requires_grad_()
    second = random_boxes(701, extent=150, seed=2)[0].requires_grad_()
    exact = ops.complete_box_iou(first.double(), second.double(), backend="reference")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = ops.complete_box_iou(first, second, backend="cpu")
        weights = torch.linspace(-1, 2, found.numel()).view(found.shape)
        grads = torch.autograd.grad((found * weights).sum(), (first, second))
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(found, exact.float(), rtol=0, atol=1e-5)
    right = torch.autograd.grad((exact * weights).sum(), (first, second))
    for actual, expected in zip(grads, right, strict=True):
        # Each is a sum of hundreds of terms, in float32.
        assert (actual - expected).norm() < 1e-5 * expected.norm()
    again = ops.complete_box_iou(first, second, backend="cpu")
    for a, b in zip(
        grads, torch.autograd.grad((again * weights).sum(), (first, second)), strict=True
    ):
        assert torch.equal(a, b)


def test_every_instruction_set_overlaps_alike(capability: str) -> None:
    boxes, _ = rotated_boxes(60, extent=60)
    right = ops.box_iou_rotated(boxes, boxes, backend="reference")
    assert torch.equal(ops.box_iou_rotated(boxes, boxes, backend="cpu"), right), capability
    upright, _ = random_boxes(61, extent=60)
    right = ops.box_iou(upright, upright, backend="reference")
    found = ops.box_iou(upright, upright, backend="cpu")
    torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-6)
