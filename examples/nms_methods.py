"""One scene before and after each method of non-maximum suppression.

``python examples/nms_methods.py`` writes docs/images/nms-methods.png.
"""

import sys
from pathlib import Path

import matplotlib
import torch
from matplotlib import patheffects, pyplot
from matplotlib.axes import Axes
from matplotlib.patches import Ellipse, Polygon
from torch import Tensor

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from fastzoo import ops  # noqa: E402

OUTPUT = ROOT / "docs" / "images" / "nms-methods.png"
WIDTH, HEIGHT = 320, 228
COPIES = 14
SHOWN = 0.35
INK, PAPER = "#1b2a3a", "#f3f6f8"
COLOURS = "#e4572e", "#17779a"  # of the two classes
# Centre, sides, degrees clockwise, class. In three corners a pair that is hard to tell apart: of
# one class, of two classes, and side by side aslant.
OBJECTS = torch.tensor(
    [
        [62.0, 60, 72, 70, 0, 0],
        [90, 66, 66, 72, 0, 0],
        [228, 60, 92, 62, 0, 1],
        [244, 66, 80, 66, 0, 0],
        [76, 162, 104, 20, -35, 1],
        [91, 178, 104, 20, -35, 1],
        [236, 168, 104, 26, 25, 0],
    ]
)


def detect() -> tuple[Tensor, Tensor, Tensor]:
    """What a detector gives: of each object some boxes ``[N, 5]`` (cx, cy, w, h, degrees) about it,
    better ones with higher scores, and its class."""
    generator = torch.Generator().manual_seed(3)
    truth = OBJECTS.repeat_interleave(COPIES, 0)
    noise = torch.randn(len(truth), 4, generator=generator)
    sides = truth[:, 2:4]
    shorter = sides.amin(1, keepdim=True).expand(-1, 2)
    boxes = truth[:, :5].clone()
    boxes[:, :4] += 0.07 * noise * torch.cat([shorter, sides], 1)
    boxes[:, 4] += 2 * torch.randn(len(truth), generator=generator) * (truth[:, 4] != 0)
    scores = 0.97 * torch.exp(-0.22 * noise.norm(dim=1)) - 0.04 * truth[:, 5]
    return boxes, scores, truth[:, 5].long()


def around(rotated: Tensor) -> Tensor:
    """The boxes along the axes that hold rotated ones: ``[N, 4]`` corners."""
    angle = rotated[:, 4].deg2rad()
    cos, sin = angle.cos().abs(), angle.sin().abs()
    w, h = rotated[:, 2], rotated[:, 3]
    half = torch.stack([w * cos + h * sin, w * sin + h * cos], 1) / 2
    return torch.cat([rotated[:, :2] - half, rotated[:, :2] + half], 1)


def corners_of(boxes: Tensor) -> Tensor:
    """``[N, 4, 2]`` of boxes ``[N, 4]`` (corners) or ``[N, 5]`` (rotated)."""
    if boxes.shape[1] == 4:
        return boxes[:, [0, 1, 2, 1, 2, 3, 0, 3]].unflatten(1, (4, 2))
    angle = boxes[:, 4].deg2rad()
    along = torch.stack([angle.cos(), angle.sin()], 1) * boxes[:, 2:3] / 2
    down = torch.stack([-angle.sin(), angle.cos()], 1) * boxes[:, 3:4] / 2
    centre = boxes[:, :2]
    return torch.stack(
        [
            centre - along - down,
            centre + along - down,
            centre + along + down,
            centre - along + down,
        ],
        1,
    )


def panels() -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """By title, what a method leaves: boxes, scores, classes."""
    rotated, scores, classes = detect()
    boxes = around(rotated)
    threshold = 0.45
    kept = ops.nms(boxes, scores, threshold)
    soft, softened = ops.soft_nms(boxes, scores, method="gaussian")
    matrix, lowered = ops.matrix_nms(boxes, scores, sigma=3.0)
    voted, means = ops.weighted_nms(boxes, scores, threshold, idxs=classes)
    aslant = ops.nms_rotated(rotated, scores, threshold, idxs=classes, angle="deg")
    found = ops.multiclass_nms(
        boxes[None],
        torch.nn.functional.one_hot(classes, 2)[None] * scores[None, :, None],
        score_threshold=SHOWN,
        iou_threshold=threshold,
        max_detections=20,
    )
    some = slice(0, int(found.num[0]))
    return {
        f"before: {len(boxes)} boxes of {len(OBJECTS)} objects": (boxes, scores, classes),
        "nms: one kept box drops what it overlaps": (boxes[kept], scores[kept], classes[kept]),
        "soft_nms: it lowers their scores": (boxes[soft], softened, classes[soft]),
        "matrix_nms: all scores lowered at once": (boxes[matrix], lowered, classes[matrix]),
        "multiclass_nms: each class by itself": (
            found.boxes[0, some],
            found.scores[0, some],
            found.labels[0, some],
        ),
        "weighted_nms: the mean of each group": (means, scores[voted], classes[voted]),
        "before: the rotated boxes": (rotated, scores, classes),
        "nms_rotated: overlaps along their own axes": (
            rotated[aslant],
            scores[aslant],
            classes[aslant],
        ),
    }


def draw_scene(axes: Axes) -> None:
    axes.set_facecolor(PAPER)
    for x, y, w, h, degrees, label in OBJECTS.tolist():
        shape = Ellipse((x, y), w, h, angle=degrees, color=COLOURS[int(label)], alpha=0.16, lw=0)
        axes.add_patch(shape)
    axes.set_xlim(0, WIDTH)
    axes.set_ylim(HEIGHT, 0)
    axes.set_aspect("equal")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)


def draw_boxes(axes: Axes, boxes: Tensor, scores: Tensor, classes: Tensor, *, after: bool) -> int:
    """Those with a score of at least ``SHOWN``, the score as strength; how many there are."""
    shown = 0
    rows = zip(corners_of(boxes), scores.tolist(), classes.tolist(), strict=True)
    for corners, score, label in reversed(list(rows)):
        if score < SHOWN:
            continue
        shown += 1
        strength = score if after else 0.35 * score
        outline = Polygon(corners.numpy(), fill=False, edgecolor=COLOURS[label], alpha=strength)
        outline.set_linewidth(0.6 + 1.6 * score if after else 0.7)
        axes.add_patch(outline)
        if after:
            x, y = corners[corners.sum(1).argmin()].tolist()
            text = axes.text(x + 2, y + 8, f"{score:.2f}", color=COLOURS[label], fontsize=6.5)
            text.set_path_effects([patheffects.withStroke(linewidth=2, foreground=PAPER)])
    return shown


def draw(output: Path = OUTPUT) -> dict[str, int]:
    """The picture, and how many boxes each panel shows."""
    matplotlib.use("Agg")
    found = panels()
    figure, grid = pyplot.subplots(2, 4, figsize=(14, 5.6), layout="constrained")
    shown = {}
    for axes, (title, given) in zip(grid.flat, found.items(), strict=True):
        draw_scene(axes)
        after = not title.startswith("before")
        shown[title] = draw_boxes(axes, *given, after=after)
        heading = f"{title} ({shown[title]})" if after else title
        axes.set_title(heading, loc="left", fontsize=9.5, color=INK)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=110, facecolor="white", metadata={"Software": None})
    pyplot.close(figure)
    return shown


if __name__ == "__main__":
    for name, count in draw().items():
        print(f"{count:4d}  {name}")
    print(f"saved {OUTPUT.relative_to(ROOT)}")
