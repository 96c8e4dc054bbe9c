"""Trains a small face-like recogniser with ArcFace, once through fastzoo's fused loss and once
through its definition with all logits in memory, and compares the two runs.

    python examples/face_margin.py [--steps 500] [--backend cpu]

An identity is one scan of a digit, seen at other angles, sizes, places and lights each time; it is
learned from 400 of them and tested on 200 others by comparing views in pairs.
"""

import argparse
import copy
import sys
import time
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fastzoo
from fastzoo.ops import ArcFace

SIDE = 16
TRAINED, TESTED, VIEWS = 400, 200, 6
EMBEDDING, BATCH = 64, 128
MARGIN, SCALE = ArcFace(0.3), 16.0
ALLOWED = 1e-4  # relative difference of the two loss curves

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def identities(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images ``[N, 1, 16, 16]`` to train with and others to test with, one an identity."""
    scans = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 16
    scans = F.interpolate(scans, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
    order = torch.randperm(len(scans), generator=torch.Generator().manual_seed(seed))
    return scans[order[:TRAINED]], scans[order[TRAINED : TRAINED + TESTED]]


def views(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image turned by up to 20 degrees, scaled by up to 20 %, shifted by up to 25 % of half
    its side, lit from one side, brightened or dimmed, with noise of deviation 0.1."""

    def within(limit: float, *size: int) -> Tensor:
        return (torch.rand(len(images), *size, generator=generator) * 2 - 1) * limit

    angle, scale = within(torch.pi / 9), 1 + within(0.2)
    turned = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(-1, 2, 2)
    affine = torch.cat([turned / scale[:, None, None], within(0.25, 2, 1)], 2)
    grid = F.affine_grid(affine, list(images.shape), align_corners=False)
    seen = F.grid_sample(images, grid, align_corners=False)
    slope = (torch.linspace(-1, 1, SIDE) * within(0.1, 2, 1)).unsqueeze(1)
    light = slope[:, :, 0, :, None] + slope[:, :, 1, None, :]
    gain = 1 + within(0.3, 1, 1, 1)
    return gain * seen + light + 0.1 * torch.randn(seen.shape, generator=generator)


class Embedder(nn.Sequential):
    """Images ``[N, 1, 16, 16]`` to embeddings ``[N, 64]``.

    Smooth on purpose: with ReLU and maximum pooling, whose slopes jump, training is chaotic, and a
    single rounding is a thousandth of the loss within forty steps, whatever the loss.
    """

    def __init__(self) -> None:
        layers: list[nn.Module] = []
        for before, after in ((1, 32), (32, 64), (64, 128)):
            layers += [nn.Conv2d(before, after, 3, padding=1, bias=False)]
            layers += [nn.BatchNorm2d(after), nn.GELU(), nn.AvgPool2d(2)]
        width = 128 * (SIDE // 8) ** 2
        layers += [nn.Flatten(), nn.Linear(width, EMBEDDING, bias=False)]
        super().__init__(*layers, nn.BatchNorm1d(EMBEDDING, affine=False))


def train(
    loss: Loss,
    images: Tensor,
    *,
    steps: int,
    seed: int = 0,
    shown: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> tuple[Embedder, Tensor]:
    """The trained network and the loss of every step. Two runs differ in nothing but the loss.

    ``shown`` iterates over the steps, and may show how far they have come.
    """
    torch.manual_seed(seed)
    network, weight = Embedder(), nn.Parameter(0.05 * torch.randn(len(images), EMBEDDING))
    parameters = [*network.parameters(), weight]
    optimizer = torch.optim.SGD(parameters, lr=0.01, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    curve = []
    # Of so small a network a second thread does little, and on a busy machine it is waited for.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in shown(range(steps)):
            labels = torch.randint(len(images), (BATCH,), generator=generator)
            value = loss(network(views(images[labels], generator)), weight, labels)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            schedule.step()
            curve.append(value.detach())
    finally:
        torch.set_num_threads(threads)
    return network, torch.stack(curve)


def verify(network: nn.Module, images: Tensor) -> tuple[float, float]:
    """Of all pairs of views: the area under the ROC curve, and the share of pairs of one identity
    that are found while one in a hundred of the others is taken for such a pair."""
    network = copy.deepcopy(network).eval()
    generator = torch.Generator().manual_seed(1)
    owner = torch.arange(len(images)).repeat(VIEWS)
    with torch.no_grad():
        unit = F.normalize(network(views(images[owner], generator)))
    first, second = torch.triu_indices(len(owner), len(owner), 1)
    score, same = (unit @ unit.t())[first, second], owner[first] == owner[second]
    rank = torch.empty(len(score), dtype=torch.float64)
    rank[score.argsort()] = torch.arange(1, len(score) + 1, dtype=torch.float64)
    positive, negative = int(same.sum()), int((~same).sum())
    area = (rank[same].sum() - positive * (positive + 1) / 2) / (positive * negative)
    threshold = score[~same].sort().values[int(0.99 * negative)]
    return float(area), float((score[same] > threshold).double().mean())


def fused(backend: str | None = None) -> Loss:
    def loss(embeddings: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        result = fastzoo.ops.margin_softmax_loss(
            embeddings, weight, labels, margin=MARGIN, scale=SCALE, backend=backend
        )
        assert isinstance(result, Tensor)
        return result

    return loss


def definition(embeddings: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    result = fastzoo.reference.margin_softmax_loss(
        embeddings, weight, labels, margin=MARGIN, scale=SCALE
    )
    assert isinstance(result, Tensor)
    return result


def largest_difference(curve: Tensor, right: Tensor) -> Tensor:
    """The largest relative difference of two loss curves up to each step."""
    return ((curve - right).abs() / right).cummax(0).values


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--backend", help="of the fused loss; default auto")
    arguments = parser.parse_args()
    known, unknown = identities()
    curves = {}
    for name, loss in (("fused", fused(arguments.backend)), ("definition", definition)):
        started = time.perf_counter()
        network, curves[name] = train(loss, known, steps=arguments.steps)
        seconds = time.perf_counter() - started
        area, found = verify(network, unknown)
        print(
            f"{name:10}  {arguments.steps} steps in {seconds:.1f} s, loss "
            f"{curves[name][0]:.4f} to {curves[name][-1]:.4f}; AUC {area:.4f}, "
            f"TPR at FPR 1e-2 {found:.3f}"
        )
    difference = largest_difference(curves["fused"], curves["definition"])
    for step in (10, 40, 100, 200, arguments.steps):
        if step <= arguments.steps:
            print(f"largest relative difference in {step:4} steps: {difference[step - 1]:.1e}")
    within = bool(difference[-1] <= ALLOWED)
    print(f"the curves are {'equal' if within else 'NOT equal'} to {ALLOWED:.0e}")
    return 0 if within else 1


if __name__ == "__main__":
    sys.exit(main())
