"""Shows that PointConv is a Monte-Carlo convolution once it knows how densely its points lie.

    python examples/pointconv_integral.py [--backend cpu] [--output docs/images/...png]

Points are drawn in the unit square with the density p(x, y) = 2 x: few on the left, many on the
right. At each centre the convolution of f = 1 + sin 4x cos 3y with a Gaussian is estimated from
them; the weight net has learnt the Gaussian from offsets alone, and never sees the points. A sum
over the points is an integral with respect to p. Divided by their estimated densities it becomes
the integral itself.

The kernel ends three standard deviations from its centre, and every centre lies as far from the
border: its disc is full of points, and the right value is an integral over the whole disc, found by
quadrature. At the border the density is estimated too low; that reaches the outermost centres, and
only through the lightest points of their kernels.
"""

import argparse
import dataclasses
import math
import sys
from pathlib import Path

import numpy
import torch
import torch.nn.functional as F
from matplotlib import pyplot
from torch import Tensor, nn

import fastzoo
from fastzoo import ops

POINTS = 4096
DEVIATION = 0.1
RADIUS = 3 * DEVIATION
# Of the density's estimate: narrower than the convolution, with dozens of points in it.
BANDWIDTH = 0.05
WIDTH, STEPS, BATCH, RATE = 32, 1500, 2048, 1e-2
SIDE = 32
# More than lie around any centre.
NEIGHBOURS = 2048
# Mean relative errors: what the one has to reach, and the other cannot.
LARGEST_WITH, LEAST_WITHOUT = 0.03, 0.10
OUTPUT = Path(__file__).parent.parent / "docs" / "images" / "pointconv-integral.png"
INK = "#1b2a3a"


def points(seed: int = 0) -> Tensor:
    """``[POINTS, 2]`` of density 2 x: x is distributed as the root of a uniform number."""
    drawn = torch.rand(POINTS, 2, generator=torch.Generator().manual_seed(seed))
    return torch.stack([drawn[:, 0].sqrt(), drawn[:, 1]], 1)


def centres() -> Tensor:
    """A grid ``[SIDE * SIDE, 2]`` over the centres whose discs lie in the square."""
    line = torch.linspace(RADIUS, 1 - RADIUS, SIDE)
    return torch.cartesian_prod(line, line)


def signal(at: Tensor) -> Tensor:
    return 1 + (4 * at[..., 0]).sin() * (3 * at[..., 1]).cos()


def gaussian(offsets: Tensor) -> Tensor:
    """1 at its centre; its integral over the plane is 2 pi DEVIATION^2."""
    return (-offsets.square().sum(-1) / (2 * DEVIATION**2)).exp()


def exact(at: Tensor, rings: int = 40, spokes: int = 40) -> Tensor:
    """The convolution by quadrature over the disc: Gauss's rule along the radius, equal angles
    around it, both exact far beyond float32 for so smooth a function."""
    nodes, weights = (torch.from_numpy(a) for a in numpy.polynomial.legendre.leggauss(rings))
    radius = RADIUS * (nodes + 1) / 2
    angle = torch.arange(spokes).double() * (2 * math.pi / spokes)
    offsets = radius[:, None, None] * torch.stack([angle.cos(), angle.sin()], 1)
    area = (weights * RADIUS / 2 * radius)[:, None] * (2 * math.pi / spokes)
    around = signal(at.double()[:, None, None] + offsets)
    return (around * gaussian(offsets) * area).sum((1, 2))


def disc(count: int, generator: torch.Generator) -> Tensor:
    """Offsets ``[count, 2]``, uniform over the kernel's disc."""
    radius, angle = torch.rand(2, count, generator=generator)
    angle = 2 * math.pi * angle
    return RADIUS * radius.sqrt()[:, None] * torch.stack([angle.cos(), angle.sin()], 1)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A convolution's weights as PointConv has them: ``linear`` of what the net makes of an
    offset."""

    net: list[tuple[Tensor, Tensor]]
    linear: Tensor

    def __call__(self, offsets: Tensor) -> Tensor:
        for weight, bias in self.net:
            offsets = F.relu(F.linear(offsets, weight, bias))
        return F.linear(offsets, self.linear)[..., 0]


def learn(steps: int = STEPS, seed: int = 0) -> Kernel:
    """A weight net that has learnt the Gaussian over its disc."""
    torch.manual_seed(seed)
    layers = nn.Linear(2, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1, bias=False)
    with torch.no_grad():
        layers[0].weight /= DEVIATION
    kernel = Kernel([(layer.weight, layer.bias) for layer in layers[:2]], layers[2].weight)
    optimizer = torch.optim.Adam(nn.ModuleList(layers).parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps)
    generator = torch.Generator().manual_seed(seed)
    # Of so small a network a second thread does little, and on a busy machine it is waited for.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(steps):
            offsets = disc(BATCH, generator)
            optimizer.zero_grad()
            F.mse_loss(kernel(offsets), gaussian(offsets)).backward()
            optimizer.step()
            schedule.step()
    finally:
        torch.set_num_threads(threads)
    net = [(layer.weight.detach(), layer.bias.detach()) for layer in layers[:2]]
    return Kernel(net, layers[2].weight.detach())


def convolve(at: Tensor, cloud: Tensor, density: Tensor | None, kernel: Kernel) -> Tensor:
    """PointConv at ``at`` of the signal on a cloud: a mean over the points of f times the weights,
    divided by the density where there is one."""
    found = ops.ball_query(at[None], cloud[None], K=NEIGHBOURS, radius=RADIUS, return_nn=False)
    if int(found.idx[..., -1].max()) >= 0:
        raise RuntimeError(f"a centre has {NEIGHBOURS} neighbours or more")
    sums = ops.pointconv(
        cloud[None],
        signal(cloud)[None, :, None],
        at[None],
        found.idx,
        kernel.net,
        None if density is None else 1 / density[None],
        (kernel.linear, None),
    )
    return sums[0, :, 0] / len(cloud)


def mean_relative_error(found: Tensor, right: Tensor) -> float:
    return float(((found - right).abs() / right.abs()).mean())


def passed(with_density: float, without: float) -> bool:
    return with_density <= LARGEST_WITH and without >= LEAST_WITHOUT


def draw(cloud: Tensor, right: Tensor, maps: dict[str, Tensor], output: Path) -> None:
    """The points, the right values, and what was found: one picture a name of ``maps``."""
    figure, panels = pyplot.subplots(
        1, 2 + len(maps), figsize=(3.3 * (2 + len(maps)), 3.5), layout="constrained"
    )
    panels[0].scatter(
        *cloud.t().numpy(), c=signal(cloud).numpy(), s=3, linewidths=0, cmap="viridis"
    )
    inner = pyplot.Rectangle((RADIUS, RADIUS), 1 - 2 * RADIUS, 1 - 2 * RADIUS, fill=False, ec=INK)
    panels[0].add_patch(inner)
    panels[0].set_title("points of density 2x, centres in the frame", fontsize=10, color=INK)
    panels[0].set_aspect("equal")
    lowest, highest = float(right.min()), float(right.max())
    square = (RADIUS, 1 - RADIUS, RADIUS, 1 - RADIUS)
    for panel, (name, values) in zip(
        panels[1:], {"the convolution": right, **maps}.items(), strict=True
    ):
        image = values.reshape(SIDE, SIDE).t().numpy()
        shown = panel.imshow(image, origin="lower", extent=square, vmin=lowest, vmax=highest)
        panel.set_title(name, fontsize=10, color=INK)
    figure.colorbar(shown, ax=panels[1:], shrink=0.8)
    for panel in panels:
        panel.spines[:].set_visible(False)
        panel.tick_params(length=0, labelsize=8)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=110, facecolor="white", metadata={"Software": None})
    pyplot.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", default="auto", help="of the search, density and PointConv")
    parser.add_argument("--seed", type=int, default=0, help="of the points")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    cloud, at, kernel = points(arguments.seed), centres(), learn()
    right = exact(at)
    offsets = disc(1 << 16, torch.Generator().manual_seed(1))
    off = (kernel(offsets) - gaussian(offsets)).square().mean().sqrt()
    print(f"the weight net is off its Gaussian by {off:.4f} of its peak, root mean square")
    with fastzoo.use_backend(arguments.backend):
        densities = {
            "with inverse density": ops.kernel_density(cloud, BANDWIDTH),
            "with the true density": 2 * cloud[:, 0],
            "without": None,
        }
        found = {name: convolve(at, cloud, d, kernel) for name, d in densities.items()}
    errors = {name: mean_relative_error(values, right) for name, values in found.items()}
    print("mean relative error of the convolution")
    for name, error in errors.items():
        print(f"  {name:24} {error:6.2%}")
    shown = ("with inverse density", "without")
    maps = {f"{name}: {errors[name]:.1%} off": found[name] for name in shown}
    draw(cloud, right, maps, arguments.output)
    print(f"saved {arguments.output}")
    succeeded = passed(*(errors[name] for name in shown))
    print(
        f"with inverse density at most {LARGEST_WITH:.0%} and without it at least "
        f"{LEAST_WITHOUT:.0%}: {'yes' if succeeded else 'NO'}"
    )
    return 0 if succeeded else 1


if __name__ == "__main__":
    sys.exit(main())
