"""torchvision's box operators, against formulas over scalars and with a stand-in for torchvision.

There is no torchvision to test with on every machine, so a process of its own defines what
torchvision would: the operator ``torchvision::nms`` with a kernel, and a Python function that calls
it. The stand-in's kernel answers with an index that no NMS gives.
"""

import math
import subprocess
import sys

import pytest
import torch

import fastzoo
from fastzoo.compat import torchvision as compat
from fastzoo.testing.boxes import random_boxes
from tests.conftest import ROOT

STAND_IN = """
import sys, types, warnings
import torch
warnings.simplefilter("error")
library = torch.library.Library("torchvision", "DEF")
library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
library.impl("nms", lambda dets, scores, iou_threshold: torch.tensor([-1]), "CPU")
sys.modules["torchvision"] = types.ModuleType("torchvision")

def nms(boxes, scores, iou_threshold):
    return torch.ops.torchvision.nms(boxes, scores, iou_threshold)

early_bound = nms
boxes = torch.tensor([[0., 0, 10, 10], [1, 1, 11, 11], [20, 20, 30, 30]])
scores = torch.tensor([.5, .9, .1])
def answer(): return early_bound(boxes, scores, 0.5).tolist()

from fastzoo.compat import torchvision as compat
"""


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", STAND_IN + code], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_nms_is_fastzoos() -> None:
    boxes, scores = torch.rand(50, 4).cumsum(1), torch.rand(50)
    assert torch.equal(compat.nms(boxes, scores, 0.5), fastzoo.ops.nms(boxes, scores, 0.5))


def test_early_bound_callers_get_our_kernel_and_then_their_own_again() -> None:
    run("""
assert answer() == [-1]
for _ in range(2):
    compat.enable()
    assert answer() == [1, 2]
    compat.enable()  # a second time changes nothing
    assert answer() == [1, 2]
    compat.disable()
    assert answer() == [-1]
    compat.disable()
    assert answer() == [-1]
""")


def test_use_backend_and_our_checks_apply() -> None:
    run("""
import fastzoo
from fastzoo.ops._operator import OPERATORS
compat.enable()
OPERATORS["nms"].overloads["reference"] = lambda *_: torch.tensor([5])
with fastzoo.use_backend("reference"):
    assert answer() == [5]
try:
    early_bound(boxes[:, :3], scores, 0.5)
except ValueError as error:
    assert str(error).startswith("boxes: expected shape [N, 4]"), error
else:
    raise AssertionError("three columns were taken for boxes")
""")


def test_boxes_that_require_gradients_are_taken() -> None:
    run("""
compat.enable()
boxes.requires_grad_()
assert answer() == [1, 2]
""")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("del sys.modules['torchvision']; sys.modules['torchvision'] = None", "pip install"),
        ("library._destroy()", "without its compiled operators"),
        (
            "from fastzoo.ops._operator import OPERATORS\n"
            "OPERATORS['nms'].owner = lambda device: 'reference'",
            "no kernel to replace torchvision's with",
        ),
    ],
)
def test_enable_says_why_it_cannot(change: str, message: str) -> None:
    said = run(f"""
{change}
try:
    compat.enable()
except RuntimeError as error:
    print(error)
compat.disable()
""")
    assert said.startswith("fastzoo.compat.torchvision: ")
    assert message in said


def test_batched_nms_is_fastzoos() -> None:
    boxes, scores = random_boxes(60, extent=60)
    idxs = torch.arange(60) % 3
    kept = compat.batched_nms(boxes, scores, idxs, 0.2)
    assert torch.equal(kept, fastzoo.ops.batched_nms(boxes, scores, idxs, 0.2))
    assert len(compat.nms(boxes, scores, 0.2)) < len(kept) < 60


def overlap(a: list[float], b: list[float], kind: str, eps: float, union_eps: float = 0.0) -> float:
    """Of two boxes, in Python's floats."""
    w = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    h = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    sides = [(x[2] - x[0], x[3] - x[1]) for x in (a, b)]
    union = sides[0][0] * sides[0][1] + sides[1][0] * sides[1][1] - w * h
    iou = w * h / (union + union_eps)
    hull = max(a[2], b[2]) - min(a[0], b[0]), max(a[3], b[3]) - min(a[1], b[1])
    if kind == "iou":
        return iou
    if kind == "generalized":
        area = hull[0] * hull[1]
        return iou - (area - union) / (area + eps)
    apart = math.hypot((a[0] + a[2] - b[0] - b[2]) / 2, (a[1] + a[3] - b[1] - b[3]) / 2)
    value = iou - apart**2 / (hull[0] ** 2 + hull[1] ** 2 + eps)
    if kind == "distance":
        return value
    v = (
        4
        / math.pi**2
        * (math.atan(sides[0][0] / sides[0][1]) - math.atan(sides[1][0] / sides[1][1])) ** 2
    )
    return value - v / (1 - iou + v + eps) * v


FIRST, SECOND = random_boxes(12, extent=60, seed=1)[0], random_boxes(9, extent=60, seed=2)[0]
PAIRWISE = {
    "iou": compat.box_iou,
    "generalized": compat.generalized_box_iou,
    "distance": compat.distance_box_iou,
    "complete": compat.complete_box_iou,
}
LOSSES = {
    "generalized": compat.generalized_box_iou_loss,
    "distance": compat.distance_box_iou_loss,
    "complete": compat.complete_box_iou_loss,
}
# Sides of 4 to 84 are differences of coordinates below 150: areas are good to 2^-20, and the
# terms of an overlap, which are at most 1, to a few times that.
TOLERANCE = 2.0**-16


@pytest.mark.parametrize("kind", PAIRWISE)
def test_pairwise_overlaps(kind: str) -> None:
    eps = 0.0 if kind in ("iou", "generalized") else 1e-7
    right = torch.tensor(
        [[overlap(a, b, kind, eps) for b in SECOND.tolist()] for a in FIRST.tolist()]
    )
    found = PAIRWISE[kind](FIRST, SECOND)
    torch.testing.assert_close(found, right, rtol=0, atol=TOLERANCE)
    assert PAIRWISE[kind](FIRST.half(), SECOND.half()).dtype == torch.float32
    assert PAIRWISE[kind](FIRST.long(), SECOND.long()).dtype == torch.float32
    images = torch.stack([FIRST, FIRST + 3]).unflatten(0, (2, 1))
    by_image = PAIRWISE[kind](images, SECOND)
    assert by_image.shape == (2, 1, 12, 9)
    assert torch.equal(by_image[0, 0], found)
    assert torch.equal(by_image[1, 0], PAIRWISE[kind](FIRST + 3, SECOND))
    assert PAIRWISE[kind](images[:0], SECOND).shape == (0, 1, 12, 9)


@pytest.mark.parametrize("kind", ["distance", "complete"])
def test_eps_is_added_where_theirs_is(kind: str) -> None:
    # Boxes of an image whose sides are 1: an eps in the union would be seen in the third digit.
    first, second = (b.double() * 2**-14 for b in (FIRST, SECOND))
    right = [[overlap(a, b, kind, 1e-7) for b in second.tolist()] for a in first.tolist()]
    found = PAIRWISE[kind](first, second)
    torch.testing.assert_close(found, torch.tensor(right).double(), rtol=0, atol=1e-6)
    wrong = [[overlap(a, b, kind, 1e-7, 1e-7) for b in second.tolist()] for a in first.tolist()]
    assert (found - torch.tensor(wrong)).abs().max() > 1e-4


@pytest.mark.parametrize("kind", LOSSES)
def test_losses(kind: str) -> None:
    first, second = FIRST[:9].clone().requires_grad_(), SECOND
    right = [
        1 - overlap(a, b, kind, 1e-7, 1e-7)
        for a, b in zip(first.tolist(), second.tolist(), strict=True)
    ]
    loss = LOSSES[kind]
    torch.testing.assert_close(loss(first, second).tolist(), right, rtol=0, atol=TOLERANCE)
    for reduction, total in (("mean", sum(right) / 9), ("sum", sum(right))):
        found = loss(first, second, reduction)
        assert found.item() == pytest.approx(total, abs=9 * TOLERANCE)
    assert torch.autograd.grad(loss(first, second, "mean"), first)[0].abs().sum() > 0
    assert loss(first[0], second[0]).item() == pytest.approx(right[0], abs=TOLERANCE)
    assert loss(first[:0], second[:0], reduction="mean").item() == 0
    with pytest.raises(ValueError, match="reduction"):
        loss(first, second, "all")
    assert loss(first, second, eps=1e3).mean() != loss(first, second).mean()


def test_formats_of_box_iou() -> None:
    right = compat.box_iou(FIRST, SECOND)
    for fmt in ("xywh", "cxcywh"):
        first, second = (compat.box_convert(b, "xyxy", fmt) for b in (FIRST, SECOND))
        found = compat.box_iou(first, second, fmt)
        torch.testing.assert_close(found, right, rtol=0, atol=TOLERANCE)
    angles = torch.zeros(12, 1), torch.full((9, 1), 90.0)
    first, second = (compat.box_convert(b, "xyxy", "cxcywh") for b in (FIRST, SECOND))
    turned = second[:, [0, 1, 3, 2]]  # 90 degrees of a box whose sides have changed places
    rotated = torch.cat([first, angles[0]], 1), torch.cat([turned, angles[1]], 1)
    found = compat.box_iou(*rotated, fmt="cxcywhr")
    torch.testing.assert_close(found, right, rtol=0, atol=TOLERANCE)


def test_counter_clockwise() -> None:
    long = torch.tensor([[0.0, 0, 10, 1, 30]])
    corners = compat.box_convert(long, "cxcywhr", "xyxyxyxy")[0].reshape(4, 2)
    right = (corners[1] + corners[2]) / 2  # of the box before it was turned
    expected = [5 * math.cos(math.radians(30)), -5 * math.sin(math.radians(30))]
    assert right.tolist() == pytest.approx(expected, abs=1e-5)  # up in an image, y pointing down
    assert corners.diff(dim=0).norm(dim=1).tolist() == pytest.approx([10, 1, 10], abs=1e-5)
    across = torch.tensor([[right[0], right[1], 1, 1, 0]])
    assert compat.box_iou(long, across, fmt="cxcywhr").item() > 0.03
    mirrored = across * torch.tensor([1, -1, 1, 1, 1])
    assert compat.box_iou(long, mirrored, fmt="cxcywhr").item() == 0


@pytest.mark.parametrize(
    ("formats", "boxes"),
    [
        (
            ("xyxy", "xywh", "cxcywh"),
            {"xyxy": [1, 2, 5, 10], "xywh": [1, 2, 4, 8], "cxcywh": [3, 6, 4, 8]},
        ),
        (
            ("xywhr", "cxcywhr", "xyxyxyxy"),
            {
                "xywhr": [1, 10, 8, 4, 90],
                "cxcywhr": [3, 6, 8, 4, 90],
                "xyxyxyxy": [1, 10, 1, 2, 5, 2, 5, 10],
            },
        ),
    ],
)
def test_box_convert(formats: tuple[str, ...], boxes: dict[str, list[float]]) -> None:
    for given in formats:
        for wanted in formats:
            box = torch.tensor(boxes[given], dtype=torch.float32).expand(2, 3, -1)
            found = compat.box_convert(box, given, wanted)
            assert found.shape == (2, 3, len(boxes[wanted]))
            assert found[1, 2].tolist() == pytest.approx(boxes[wanted], abs=1e-5)
            assert found.data_ptr() != box.data_ptr()


@pytest.mark.parametrize("formats", [("xyxy", "xywhr"), ("xyxyxyxy", "xywh"), ("xy", "xywh")])
def test_unknown_conversions(formats: tuple[str, str]) -> None:
    with pytest.raises(ValueError, match="in_fmt"):
        compat.box_convert(FIRST, *formats)


def test_box_area() -> None:
    right = [(x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in FIRST.tolist()]
    for fmt in ("xyxy", "xywh", "cxcywh"):
        moved = compat.box_convert(FIRST, "xyxy", fmt)
        assert compat.box_area(moved, fmt).tolist() == pytest.approx(right, rel=2**-16)
    large = torch.tensor([[0, 0, 300, 300]])
    for dtype, area in ((torch.float16, torch.float32), (torch.int16, torch.int32)):
        assert compat.box_area(large.to(dtype)).dtype == area
        assert compat.box_area(large.to(dtype)).item() == 90000
    with pytest.raises(ValueError, match="fmt"):
        compat.box_area(FIRST, "xywhr")


def test_clip_and_remove() -> None:
    boxes = torch.tensor([[-5.0, -5, 40, 3], [1, 1, 3, 40], [2, 2, 2, 9], [4, 4, 7, 7]])
    clipped = [[0, 0, 20, 3], [1, 1, 3, 10], [2, 2, 2, 9], [4, 4, 7, 7]]
    assert compat.clip_boxes_to_image(boxes, (10, 20)).tolist() == clipped
    assert compat.clip_boxes_to_image(boxes.expand(2, 4, 4), (10, 20)).tolist() == [clipped] * 2
    assert compat.remove_small_boxes(boxes, 3).tolist() == [0, 3]
    assert compat.remove_small_boxes(boxes, 0).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32])
def test_masks_to_boxes(dtype: torch.dtype) -> None:
    masks = torch.zeros(4, 7, 9, dtype=dtype)
    masks[0, 2:5, 3:9] = 1
    masks[1, 6, 0] = masks[1, 0, 4] = 1
    masks[2] = 1
    right = [[3, 2, 8, 4], [0, 0, 4, 6], [0, 0, 8, 6], [0, 0, 0, 0]]
    assert compat.masks_to_boxes(masks).tolist() == right
    assert compat.masks_to_boxes(masks).dtype == torch.float32
    assert compat.masks_to_boxes(masks[:0]).shape == (0, 4)
