"""Trains a VQ-VAE on scans of digits, once through fastzoo's fused quantiser and once through its
definition, and compares the two with simpler ways to keep an image in as few bits.

    python examples/vqvae_digits.py [--steps 800] [--backend cpu] [--output docs/images/...png]

An image of 8 x 8 pixels becomes 4 x 4 codes out of 64, which is 96 bits.
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib import pyplot
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import fastzoo
from fastzoo.nn import VectorQuantize

CODES, DIM, LATENT, WIDTH = 64, 16, 4, 64
BATCH, RATE, STEPS = 128, 5e-3, 800
BETA, DECAY = 0.25, 0.95
# What both ways of training have to reach, and how many times as far off fixed codes have to be.
LARGEST_ERROR, LEAST_PERPLEXITY, LEAST_GAIN = 0.006, 25.0, 3.0
SHOWN = 12
OUTPUT = Path(__file__).parent.parent / "docs" / "images" / "vqvae-digits.png"
INK, ACCENT = "#1b2a3a", "#e4572e"


def digits() -> tuple[Tensor, Tensor]:
    """Images ``[N, 1, 8, 8]`` to train with, 1 297, and 500 others to test with."""
    pixels, labels = load_digits(return_X_y=True)
    parts = train_test_split(pixels, test_size=500, random_state=0, stratify=labels)
    train, test = (torch.tensor(p, dtype=torch.float32).view(-1, 1, 8, 8) / 16 for p in parts)
    return train, test


class Autoencoder(nn.Module):
    """Images ``[N, 1, 8, 8]`` to codes ``[N, 4, 4]`` and back.

    Args:
        random_codes: leave the codebook as it is drawn, of standard normal vectors.
    """

    def __init__(self, *, random_codes: bool = False) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, WIDTH, 4, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(WIDTH, WIDTH, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(WIDTH, DIM, 1),
        )
        self.quantizer = VectorQuantize(
            DIM,
            CODES,
            decay=DECAY,
            commitment_weight=BETA,
            rotation_trick=False,
            accept_image_fmap=True,
            freeze_codebook=random_codes,
        )
        if random_codes:
            self.quantizer.codebook = torch.randn(CODES, DIM)
        self.decoder = nn.Sequential(
            nn.Conv2d(DIM, WIDTH, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(WIDTH, WIDTH, 3, padding=1),
            nn.GELU(),
            nn.ConvTranspose2d(WIDTH, 1, 4, stride=2, padding=1),
        )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The rebuilt images, their codes, and the commitment loss."""
        quantized, indices, commitment = self.quantizer(self.encoder(images))
        return self.decoder(quantized), indices, commitment


def train(
    images: Tensor,
    *,
    steps: int,
    backend: str = "auto",
    random_codes: bool = False,
    seed: int = 0,
    shown: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> Autoencoder:
    """The trained network. Two runs of one seed differ in nothing but the backend.

    ``shown`` iterates over the steps, and may show how far they have come.
    """
    torch.manual_seed(seed)
    network = Autoencoder(random_codes=random_codes)
    optimizer = torch.optim.Adam(network.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps)
    generator = torch.Generator().manual_seed(seed)
    # Of so small a network a second thread does little, and on a busy machine it is waited for.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with fastzoo.use_backend(backend):
            for _ in shown(range(steps)):
                batch = images[torch.randint(len(images), (BATCH,), generator=generator)]
                rebuilt, _, commitment = network(batch)
                optimizer.zero_grad()
                (F.mse_loss(rebuilt, batch) + commitment).backward()
                optimizer.step()
                schedule.step()
    finally:
        torch.set_num_threads(threads)
    return network.eval()


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Images rebuilt, and how often each code was used, the most used first."""

    rebuilt: Tensor
    usage: Tensor
    error: float

    @property
    def perplexity(self) -> float:
        """How many codes, used equally often, would carry as much."""
        return float(torch.special.entr(self.usage).sum().exp())


@torch.no_grad()
def rebuild(network: Autoencoder, images: Tensor) -> Outcome:
    rebuilt, indices, _ = network(images)
    counts = torch.bincount(indices.flatten(), minlength=CODES)
    usage = counts.sort(descending=True).values / counts.sum()
    return Outcome(rebuilt, usage, float(F.mse_loss(rebuilt, images)))


def mean_image_error(known: Tensor, unknown: Tensor) -> float:
    return float((unknown - known.mean(0)).square().mean())


def k_means_error(known: Tensor, unknown: Tensor) -> float:
    """Each image as the nearest of 64 that k-means finds."""
    generator = torch.Generator().manual_seed(0)
    found = fastzoo.ops.kmeans(known.flatten(1), CODES, iters=100, generator=generator)
    pixels = unknown.flatten(1)
    nearest = fastzoo.ops.vq_nearest(pixels, found.centroids)
    return float(F.mse_loss(found.centroids[nearest], pixels))


def passed(fused: Outcome, reference: Outcome, fixed: Outcome) -> bool:
    return all(
        outcome.error <= LARGEST_ERROR
        and outcome.perplexity >= LEAST_PERPLEXITY
        and fixed.error >= LEAST_GAIN * outcome.error
        for outcome in (fused, reference)
    )


def draw(originals: Tensor, fused: Outcome, fixed: Outcome, output: Path) -> None:
    figure, (tiles, bars) = pyplot.subplots(
        1, 2, figsize=(13, 2.9), width_ratios=(3.2, 1), layout="constrained"
    )
    rows = {
        "scans": originals,
        f"16 trained codes\nerror {fused.error:.4f}": fused.rebuilt,
        f"16 random codes\nerror {fixed.error:.4f}": fixed.rebuilt,
    }
    strips = [F.pad(images[:SHOWN, 0], (0, 1, 0, 1), value=torch.nan) for images in rows.values()]
    mosaic = torch.cat([torch.cat(list(strip), 1) for strip in strips])
    shades = pyplot.get_cmap("Blues").with_extremes(bad="#c3ced8")
    tiles.imshow(mosaic.numpy(), cmap=shades, vmin=0, vmax=1, interpolation="nearest")
    tiles.set_yticks([4 + 9 * row for row in range(len(rows))], list(rows), color=INK)
    tiles.set_xticks([])
    tiles.tick_params(length=0)
    tiles.set_title("digits that were not trained with", loc="left", fontsize=11, color=INK)
    for outcome, colour, name in ((fixed, INK, "random"), (fused, ACCENT, "trained")):
        label = f"{name}, perplexity {outcome.perplexity:.1f}"
        bars.stairs(outcome.usage.numpy(), color=colour, linewidth=1.5, label=label)
    bars.set_yscale("log")
    bars.set_xlabel("the 64 codes, the most used first")
    bars.set_title("share of the test images' places", loc="left", fontsize=11, color=INK)
    bars.legend(frameon=False, fontsize=8)
    for axes in (tiles, bars):
        axes.spines[:].set_visible(False)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=110, facecolor="white", metadata={"Software": None})
    pyplot.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--backend", default="auto", help="of the fused quantiser")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    known, unknown = digits()
    outcomes = []
    print(f"{'':24} test MSE  perplexity  seconds")
    for name, backend, random_codes in (
        ("fused", arguments.backend, False),
        ("reference", "reference", False),
        ("random codes", arguments.backend, True),
    ):
        started = time.perf_counter()
        network = train(known, steps=arguments.steps, backend=backend, random_codes=random_codes)
        seconds = time.perf_counter() - started
        outcomes.append(rebuild(network, unknown))
        found = outcomes[-1]
        print(f"{name:24} {found.error:8.4f}  {found.perplexity:10.1f}  {seconds:7.1f}", flush=True)
    print(f"{'one of 64 mean images':24} {k_means_error(known, unknown):8.4f}")
    print(f"{'the mean image':24} {mean_image_error(known, unknown):8.4f}")
    fused, reference, fixed = outcomes
    draw(unknown, fused, fixed, arguments.output)
    print(f"saved {arguments.output}")
    succeeded = passed(fused, reference, fixed)
    print(
        f"both {'reach' if succeeded else 'do NOT reach'} an error of {LARGEST_ERROR} and a "
        f"perplexity of {LEAST_PERPLEXITY:.0f}, with random codes at least {LEAST_GAIN:.0f} times "
        "as far off"
    )
    return 0 if succeeded else 1


if __name__ == "__main__":
    sys.exit(main())
