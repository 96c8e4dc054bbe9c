"""The operators on real input: checked, timed against other libraries, drawn.

``make demo`` runs it. It saves demo_output/demo.png.
"""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.patches import Ellipse, Rectangle
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # the benchmarks and their peers are not installed

import fastzoo  # noqa: E402
from benchmarks import report, results  # noqa: E402
from benchmarks.rows import Problem, Row, implementations, measure_case  # noqa: E402
from examples import face_margin  # noqa: E402
from fastzoo.testing import SPECS, BenchmarkCase  # noqa: E402

OUTPUT = ROOT / "demo_output" / "demo.png"
PATCH = 4
CODES = 256
IMAGE = 640
OBJECTS = 12
STEPS = 100
SCORE_THRESHOLD = 0.25
IOU_THRESHOLD = 0.5
INK, ACCENT = "#1b2a3a", "#e4572e"

console = Console()


# --- vq_nearest: a codebook for images -----------------------------------------------------------


def cut(images: Tensor) -> Tensor:
    """Images ``[N, 8, 8]`` as patches ``[4 N, 16]``."""
    tiles = images.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH)
    return tiles.reshape(-1, PATCH * PATCH)


def assemble(patches: Tensor) -> Tensor:
    """The inverse of ``cut``."""
    tiles = patches.reshape(-1, 2, 2, PATCH, PATCH)
    return tiles.transpose(2, 3).reshape(-1, 2 * PATCH, 2 * PATCH)


def fit_codebook(patches: Tensor, *, rounds: int = 25) -> Tensor:
    """k-means: each code becomes the mean of the patches that it is nearest to."""
    different = patches.unique(dim=0)
    start = torch.randperm(len(different), generator=torch.Generator().manual_seed(0))
    codebook = different[start[:CODES]]
    for _ in track(range(rounds), "fitting a codebook to digits", console=console):
        indices = fastzoo.ops.vq_nearest(patches, codebook)
        count = torch.bincount(indices, minlength=CODES)[:, None]
        total = torch.zeros_like(codebook).index_add_(0, indices, patches)
        codebook = torch.where(count > 0, total / count.clamp(min=1), codebook)
    return codebook


# --- nms: a detector's boxes ---------------------------------------------------------------------


def scene() -> Tensor:
    """Boxes ``[OBJECTS, 4]`` of objects in an image, one in each cell of a 4 x 3 grid."""
    generator = torch.Generator().manual_seed(4)
    number = torch.arange(OBJECTS)
    cell = torch.tensor([IMAGE / 4, IMAGE / 3])
    centre = (torch.stack([number % 4, number // 4], 1) + 0.5) * cell
    centre += (torch.rand(OBJECTS, 2, generator=generator) - 0.5) * 36
    sides = 60 + torch.rand(OBJECTS, 2, generator=generator) * torch.tensor([60, 90])
    return torch.cat([centre - sides / 2, centre + sides / 2], 1)


def detect(objects: Tensor) -> tuple[Tensor, Tensor]:
    """What a one-stage detector gives for a 640 x 640 image: a box and a score for each of the
    8 400 cells of its grids of stride 8, 16 and 32, better the nearer the cell is to an object."""
    generator = torch.Generator().manual_seed(5)
    cells = [
        torch.cartesian_prod(ticks, ticks)
        for ticks in (torch.arange(stride / 2, IMAGE, stride) for stride in (8, 16, 32))
    ]
    anchors = torch.cat(cells).flip(1)
    centre, sides = (objects[:, :2] + objects[:, 2:]) / 2, objects[:, 2:] - objects[:, :2]
    distance = ((anchors[:, None] - centre) / sides).norm(dim=2)
    nearest, owner = distance.min(1)
    noise = torch.randn(len(anchors), 4, generator=generator)
    boxes = objects[owner] + noise * (0.02 + 0.15 * nearest[:, None]) * sides[owner].repeat(1, 2)
    # A cell away from all objects sees a small box around itself.
    away = nearest > 0.7
    half = 4 + 20 * torch.rand(int(away.sum()), 2, generator=generator)
    boxes[away] = torch.cat([anchors[away] - half, anchors[away] + half], 1)
    scores = 0.95 * torch.exp(-9 * nearest.square())
    scores *= 0.9 + 0.1 * torch.rand(len(anchors), generator=generator)
    return boxes, scores


# --- margin_softmax_loss: faces, or scans of digits ----------------------------------------------


def learn_faces() -> None:
    """Learn to tell views of one scan from views of others, none of which was trained with."""
    known, unknown = face_margin.identities()
    network, curve = face_margin.train(
        face_margin.fused(),
        known,
        steps=STEPS,
        shown=lambda steps: track(steps, "learning identities", console=console),
    )
    area, _ = face_margin.verify(network, unknown)
    console.print(
        f"{STEPS} steps with ArcFace over {len(known)} identities: loss {curve[0]:.2f} to "
        f"{curve[-1]:.2f}; of {len(unknown)} identities never seen, a pair of views of one is "
        f"closer than a pair of two {area:.1%} of the time."
    )


# --- checks and times ----------------------------------------------------------------------------


def as_case(name: str, op: str, args: tuple[Any, ...]) -> BenchmarkCase:
    """Data of the demo, with what the benchmarks know of the operator."""
    known = SPECS[op].benchmarks[0]
    make: Callable[[str], tuple[Any, ...]] = lambda device: args  # noqa: E731
    return BenchmarkCase(name, {}, make, {}, known.flops, known.bytes)


def known_case(op: str, name: str) -> BenchmarkCase:
    return next(case for case in SPECS[op].benchmarks if case.name == name)


def compare(cases: list[list[Row]]) -> list[dict[str, Any]]:
    records = []
    for rows in track(cases, "checking and timing", console=console):
        records += measure_case(rows, budget=0.5)
    return records


def confirm(answer: Tensor, definition: Tensor) -> None:
    if not torch.equal(answer, definition):
        raise AssertionError("fastzoo's answer differs from fastzoo.reference's")
    console.print("[green]✓[/green] equal to fastzoo.reference, bit for bit")


def rows_of(op: str, case: BenchmarkCase) -> list[Row]:
    problem = Problem(SPECS[op], case, case.shape, "cpu")
    # Compiling takes longer than the rest of the demo.
    found = [
        implementation
        for implementation in implementations(op, "cpu")
        if implementation.name != "torch.compile"
        and implementation.autocast in (None, case.autocast is not None)
    ]
    return [Row(problem, implementation) for implementation in found]


def show(records: list[dict[str, Any]]) -> None:
    """A table a case."""
    measured = {"rows": records}
    absent = {}
    for op, case in dict.fromkeys((record["op"], record["case"]) for record in records):
        title = f"{op}, {case}"
        table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
        table.add_column("", min_width=20)
        for heading in ("time", "times as long", "memory", "right answers"):
            table.add_column(heading, justify="right", min_width=11)
        ratios = results.ratios(measured, op, case)
        for record in records:
            if (record["op"], record["case"]) != (op, case):
                continue
            name = record["implementation"]
            if "seconds" not in record:
                absent[op, name] = record.get("reason") or record["error"]
                continue
            right = "[green]✓ all[/green]"
            if "deviation" in record:
                right = f"[green]✓[/green] within {record['deviation']:.0e}"
            table.add_row(
                name,
                report.time_text(record["seconds"]),
                report.ratio_text(ratios[name]) if name in ratios else "",
                report.memory_text(record["peak_bytes"]),
                right if record["equal"] == 1 else report.share_text(record["equal"]),
                style="bold" if record["kind"] == "auto" else None,
            )
        console.print(table)
    for (op, name), why in absent.items():
        console.print(f"{op}, {name}: not timed, {why}", style="dim", highlight=False)


# --- the picture ---------------------------------------------------------------------------------


def mosaic(tiles: Tensor, columns: int, gap: int = 1) -> Tensor:
    """Small images ``[N, H, W]`` side by side, NaN between them."""
    n, height, width = tiles.shape
    padded = torch.full((n, height + gap, width + gap), torch.nan)
    padded[:, :height, :width] = tiles
    grid = padded.reshape(-1, columns, height + gap, width + gap).transpose(1, 2)
    return grid.reshape(-1, columns * (width + gap))[:-gap, :-gap]


def draw_tiles(axes: Axes, tiles: Tensor, columns: int, title: str) -> None:
    shades = pyplot.get_cmap("Blues").with_extremes(bad="#c3ced8")
    axes.imshow(mosaic(tiles, columns), cmap=shades, vmin=0, vmax=1, interpolation="nearest")
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    axes.set_axis_off()


def draw_scene(axes: Axes, objects: Tensor, title: str) -> None:
    axes.set_facecolor("#eef2f5")
    hues = pyplot.get_cmap("YlGnBu")(torch.linspace(0.35, 0.95, len(objects)).numpy())
    for number, (hue, (x1, y1, x2, y2)) in enumerate(zip(hues, objects.tolist(), strict=True)):
        width, height = x2 - x1, y2 - y1
        shape = (
            Rectangle((x1, y1), width, height, color=hue, linewidth=0)
            if number % 3 == 2
            else Ellipse(((x1 + x2) / 2, (y1 + y2) / 2), width, height, color=hue, linewidth=0)
        )
        axes.add_patch(shape)
    axes.set_xlim(0, IMAGE)
    axes.set_ylim(IMAGE, 0)
    axes.set_aspect("equal")
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)


def draw_boxes(axes: Axes, boxes: Tensor, *, alpha: float, width: float) -> None:
    for x1, y1, x2, y2 in boxes.tolist():
        outline = Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=ACCENT)
        outline.set(alpha=alpha, linewidth=width)
        axes.add_patch(outline)


def label_boxes(axes: Axes, boxes: Tensor, scores: Tensor) -> None:
    for (x1, y1, *_), score in zip(boxes.tolist(), scores.tolist(), strict=True):
        style = {"facecolor": ACCENT, "edgecolor": "none", "pad": 1.5}
        axes.text(x1 + 3, y1 - 6, f"{score:.2f}", color="white", fontsize=7.5, bbox=style)


def draw(
    images: Tensor,
    rebuilt: Tensor,
    codebook: Tensor,
    objects: Tensor,
    boxes: Tensor,
    scores: Tensor,
    kept: Tensor,
) -> None:
    figure, axes = pyplot.subplots(2, 3, figsize=(13, 8.9), layout="constrained")
    figure.suptitle("fastzoo: vq_nearest and nms", x=0.012, ha="left", fontsize=15, color=INK)
    shown = torch.arange(49)
    draw_tiles(axes[0, 0], images[shown], 7, "digits, 64 pixels each")
    by_ink = codebook[codebook.sum(1).argsort()].reshape(-1, PATCH, PATCH)
    draw_tiles(axes[0, 1], by_ink, 16, f"a codebook of {CODES} patches, fitted by vq_nearest")
    psnr = 10 * torch.log10(1 / (images - rebuilt).square().mean()).item()
    draw_tiles(axes[0, 2], rebuilt[shown], 7, f"rebuilt from 4 codes each, {psnr:.1f} dB")

    strong = scores > SCORE_THRESHOLD
    draw_scene(axes[1, 0], objects, f"a detector's grid: {len(boxes):,} boxes")
    draw_boxes(axes[1, 0], boxes, alpha=0.1, width=0.5)
    title = f"{int(strong.sum()):,} boxes with a score above {SCORE_THRESHOLD}"
    draw_scene(axes[1, 1], objects, title)
    draw_boxes(axes[1, 1], boxes[strong], alpha=0.12, width=0.6)
    draw_scene(axes[1, 2], objects, f"nms at {IOU_THRESHOLD} keeps {len(kept)}")
    draw_boxes(axes[1, 2], boxes[strong][kept], alpha=1, width=2)
    label_boxes(axes[1, 2], boxes[strong][kept], scores[strong][kept])
    OUTPUT.parent.mkdir(exist_ok=True)
    figure.savefig(OUTPUT, dpi=110, facecolor="white")


def main() -> int:
    console.rule("what this build can run here", align="left")
    console.print(str(fastzoo.info()), highlight=False)
    console.rule("vq_nearest: digits as codes", align="left")
    images = torch.tensor(load_digits().images, dtype=torch.float32) / 16
    patches = cut(images)
    codebook = fit_codebook(patches)
    indices = fastzoo.ops.vq_nearest(patches, codebook)
    rebuilt = assemble(codebook[indices])
    console.print(f"{len(images):,} images of 64 pixels became {len(indices):,} codes of one byte.")
    confirm(indices, fastzoo.reference.vq_nearest(patches, codebook))
    console.rule("nms: a detector's boxes", align="left")
    objects = scene()
    boxes, scores = detect(objects)
    strong = scores > SCORE_THRESHOLD
    kept = fastzoo.ops.nms(boxes[strong], scores[strong], IOU_THRESHOLD)
    console.print(
        f"{OBJECTS} objects gave {len(boxes):,} boxes, {int(strong.sum()):,} with a score above "
        f"{SCORE_THRESHOLD}; nms kept {len(kept)}."
    )
    confirm(kept, fastzoo.reference.nms(boxes[strong], scores[strong], IOU_THRESHOLD))
    console.rule("margin_softmax_loss: identities", align="left")
    learn_faces()
    console.rule("against the definition and other libraries", align="left")
    large = known_case("vq_nearest", "4096 x 8192 x 256")
    pairs = dataclasses.replace(
        known_case("clip_loss", "8192 x 8192 x 512"),
        name="4096 x 4096 x 512",
        shape={"n": 4096, "dim": 512},
    )
    strong_boxes = boxes[strong], scores[strong], IOU_THRESHOLD
    strong_case = as_case(f"{int(strong.sum()):,} boxes", "nms", strong_boxes)
    cases = (
        ("vq_nearest", as_case("digit patches", "vq_nearest", (patches, codebook))),
        ("vq_nearest", large),
        ("nms", strong_case),
        ("nms", as_case(f"all {len(boxes):,} boxes", "nms", (boxes, scores, IOU_THRESHOLD))),
        ("margin_softmax_loss", known_case("margin_softmax_loss", "128 x 85742 x 512")),
        ("clip_loss", pairs),
    )
    records = compare([rows_of(op, case) for op, case in cases])
    show(records)
    draw(images, rebuilt, codebook, objects, boxes, scores, kept)
    console.print(f"\nsaved {OUTPUT.relative_to(ROOT)}")
    own = [record for record in records if record["kind"] == "auto"]
    return int(any("seconds" not in record for record in own))


if __name__ == "__main__":
    sys.exit(main())
