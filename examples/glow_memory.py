"""Peak memory of a Glow stack against its depth: activations stored, checkpointed, inverted.

A training step of 4 to 64 Glow steps, forward and backward, three ways: with every activation kept
(`Compose`), with the input of each step kept (`torch.utils.checkpoint`), and with inverses
(`InvertibleSequence`), whose backward pass reconstructs the inputs. Prints memory, time and how far
the gradients are from those of the stored activations, and draws the memory.

    python examples/glow_memory.py
"""

import argparse
import dataclasses
import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastzoo.nn.flows import Compose, GlowStep, InvertibleSequence, Transform
from fastzoo.nn.flows.transform import no_logdet
from fastzoo.testing.timing import peak_memory

OUTPUT = Path("docs/images/glow-memory.png")
DEPTHS = (4, 8, 16, 32, 64)
BATCH, CHANNELS, SIDE, HIDDEN = 32, 12, 16, 64
# Of the stored activations' memory at the greatest depth, and of the norm of their gradient.
LARGEST_SHARE, LARGEST_ERROR = 0.25, 1e-3
REPEATS = 3
INK = "#333333"


class Checkpointed(Compose):
    """Each transform's input is kept, and the rest computed again."""

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        total = no_logdet(x)
        for transform in self.transforms:
            x, logdet = checkpoint(transform, x, context, use_reentrant=False)
            total = total + logdet
        return x, total


WAYS: dict[str, Callable[[list[Transform]], Transform]] = {
    "stored": Compose,
    "checkpointed": Checkpointed,
    "inverted, anchors every 8": InvertibleSequence,
    "inverted, no anchors": functools.partial(InvertibleSequence, anchor_every=None),
}


@dataclasses.dataclass(frozen=True)
class Row:
    depth: int
    way: str
    peak: int
    """Bytes beyond the parameters."""
    seconds: float
    error: float
    """Of the gradient of all parameters, relative to its norm with stored activations."""


def stack(depth: int, x: Tensor) -> list[Transform]:
    """Glow steps that have seen a batch, with conditioners that do something."""
    torch.manual_seed(0)
    steps: list[Transform] = [GlowStep(x.shape[1], hidden=HIDDEN) for _ in range(depth)]
    for name, parameter in nn.ModuleList(steps).named_parameters():
        if name.endswith("last.weight"):
            nn.init.normal_(parameter, std=0.02)
    with torch.no_grad():
        Compose(steps).to(x.device)(x)
    return steps


def train(transform: Transform, x: Tensor) -> None:
    z, logdet = transform(x)
    (0.5 * z.square().flatten(1).sum(1) - logdet).mean().backward()


def gradient(transform: Transform) -> Tensor:
    found = [p.grad.flatten() for p in transform.parameters() if p.grad is not None]
    transform.zero_grad()
    return torch.cat(found)


def measure(depth: int, x: Tensor, repeats: int = REPEATS) -> list[Row]:
    steps = stack(depth, x)
    ways = {name: make(steps) for name, make in WAYS.items()}
    peaks, errors, right = {}, {}, None
    for name, transform in ways.items():
        peaks[name] = peak_memory(functools.partial(train, transform, x), x.device.type)
        found = gradient(transform)
        right = found if right is None else right
        errors[name] = float((found - right).norm() / right.norm())
    seconds = dict.fromkeys(ways, float("inf"))
    for _ in range(repeats):
        for name, transform in ways.items():
            started = time.perf_counter()
            train(transform, x)
            if x.is_cuda:
                torch.cuda.synchronize()
            seconds[name] = min(seconds[name], time.perf_counter() - started)
            transform.zero_grad()
    return [Row(depth, name, peaks[name], seconds[name], errors[name]) for name in ways]


def passed(rows: list[Row]) -> bool:
    deepest = {row.way: row for row in rows if row.depth == max(row.depth for row in rows)}
    inverted = [row for way, row in deepest.items() if way.startswith("inverted")]
    return all(
        row.peak <= LARGEST_SHARE * deepest["stored"].peak and row.error <= LARGEST_ERROR
        for row in inverted
    )


def draw(rows: list[Row], output: Path) -> bool:
    """The memory of each way against the depth, where matplotlib is installed."""
    try:
        from matplotlib import pyplot
    except ImportError:
        return False
    figure, panel = pyplot.subplots(figsize=(6, 3.6), layout="constrained")
    for way in WAYS:
        own = [row for row in rows if row.way == way]
        panel.plot([row.depth for row in own], [row.peak / 2**20 for row in own], "o-", label=way)
    panel.set_xlabel("Glow steps", color=INK)
    panel.set_ylabel("peak of a training step, MiB", color=INK)
    panel.set_xticks(sorted({row.depth for row in rows}))
    panel.set_ylim(bottom=0)
    panel.legend(frameon=False, fontsize=9)
    panel.spines[["top", "right"]].set_visible(False)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=110, facecolor="white", metadata={"Software": None})
    pyplot.close(figure)
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--depths", type=int, nargs="+", default=DEPTHS)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(BATCH, CHANNELS, SIDE, SIDE, generator=generator).to(arguments.device)
    print(f"{'steps':>5}  {'':26} {'MiB':>6} {'seconds':>8} {'gradient':>9}")
    rows = []
    for depth in arguments.depths:
        for row in measure(depth, x):
            rows.append(row)
            print(
                f"{row.depth:5}  {row.way:26} {row.peak / 2**20:6.0f} {row.seconds:8.2f} "
                f"{row.error:9.0e}",
                flush=True,
            )
    if draw(rows, arguments.output):
        print(f"saved {arguments.output}")
    succeeded = passed(rows)
    print(
        f"inverted at most {LARGEST_SHARE:.0%} of the memory, gradients within "
        f"{LARGEST_ERROR:.0e}: {'yes' if succeeded else 'NO'}"
    )
    return 0 if succeeded else 1


if __name__ == "__main__":
    sys.exit(main())
