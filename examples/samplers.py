"""The same noise through every sampler, at 5, 10, 20 and 50 steps.

    python examples/samplers.py [--output docs/images]

Two models that are known exactly, so that what is seen is the samplers' error alone: a mixture of
three normal distributions in the plane, and scikit-learn's 1797 digits, the mean of which, each
weighted by how likely it is under the noise, is the best denoiser of a distribution of these images
and no others: a sampler without error ends at one of them. Prints how far samplers of the ODE end
from its solution, and all of them from the data's distribution, and draws where they end.
"""

import argparse
import dataclasses
import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from matplotlib import pyplot
from sklearn.datasets import load_digits
from torch import Tensor

from fastzoo import samplers
from fastzoo.samplers.schedules import karras_sigmas

Model = Callable[[Tensor, Tensor], Tensor]

# By the names of `samplers.sample`, and what they are called in print.
ODE = {
    "euler": "Euler, DDIM",
    "heun": "Heun",
    "dpm_2": "DPM2",
    "midpoint": "midpoint",
    "rk4": "RK4",
    "lms": "LMS",
    "plms": "PLMS",
    "dpmpp_2s": "DPM++ 2S",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_3m": "DPM++ 3M",
    "unipc": "UniPC",
}
SDE = {
    "ddpm": "DDPM",
    "euler_ancestral": "Euler ancestral",
    "dpm_2_ancestral": "DPM2 ancestral",
    "dpmpp_2s_ancestral": "DPM++ 2S ancestral",
    "dpmpp_sde": "DPM++ SDE",
    "dpmpp_2m_sde": "DPM++ 2M SDE",
    "dpmpp_3m_sde": "DPM++ 3M SDE",
}
STEPS = (5, 10, 20, 50)
SEED = 8
OUTPUT = Path(__file__).parent.parent / "docs" / "images"
COLOURS = ("#1b6ca8", "#d1603d", "#3a7d44")


@dataclasses.dataclass(frozen=True)
class Problem:
    """A distribution whose denoiser is known.

    Args:
        sigmas: of a number of steps.
        model: the denoiser.
        shape: of a batch of samples.
    """

    sigmas: Callable[[int], Tensor]
    model: Model
    shape: tuple[int, ...]

    def start(self) -> Tensor:
        return self.sigmas(1)[0].item() * samplers.noise(self.shape, SEED)

    def run(self, method: str, steps: int, x: Tensor | None = None) -> Tensor:
        x = self.start() if x is None else x
        return samplers.sample(self.model, x, self.sigmas(steps), method, seeds=SEED)

    def solution(self) -> Tensor:
        """Where the ODE takes the noise, in float64: dx / d log sigma = x - D(x, sigma)."""

        def slope(log_sigma: Tensor, x: Tensor) -> Tensor:
            return x - self.model(x, log_sigma.exp().expand(len(x)))

        first, last = math.log(self.sigmas(1)[0].item()), math.log(1e-4)
        times = torch.tensor([first, last], dtype=torch.float64)
        y0 = self.start().double()
        found: Tensor = samplers.odeint(slope, y0, times, rtol=1e-7, atol=1e-7)[-1]
        return self.model(found, found.new_full((len(found),), 1e-4))


# ---- two distributions ---------------------------------------------------------------------------

MEANS = torch.tensor([[-1.5, -0.9], [1.5, -0.9], [0.0, 1.7]])
SHARES, SPREAD = torch.tensor([0.3, 0.3, 0.4]), 0.35


def nearest_mean(x: Tensor) -> Tensor:
    return torch.cdist(x.float(), MEANS).argmin(1)


def mixture(samples: int = 600) -> Problem:
    def model(x: Tensor, sigma: Tensor) -> Tensor:
        variance = (SPREAD**2 + sigma.double() ** 2)[:, None]
        off = MEANS.double() - x.double()[:, None]
        weight = torch.softmax(SHARES.double().log() - off.square().sum(2) / (2 * variance), 1)
        towards = (weight[..., None] * off).sum(1)
        return (x + sigma.double()[:, None] ** 2 / variance * towards).to(x.dtype)

    return Problem(lambda n: karras_sigmas(n, 0.02, 10.0), model, (samples, 2))


def digits(samples: int = 60) -> Problem:
    images = torch.from_numpy(load_digits().data) / 8 - 1
    sizes = images.square().sum(1)

    def model(x: Tensor, sigma: Tensor) -> Tensor:
        # Half the squared distance, but for what all images share.
        nearness = x.double() @ images.T - sizes / 2
        weight = torch.softmax(nearness / sigma.double()[:, None] ** 2, 1)
        return (weight @ images).to(x.dtype)

    return Problem(lambda n: karras_sigmas(n, 0.05, 20.0), model, (samples, 64))


# ---- errors --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Row:
    method: str
    steps: int
    samples: Tensor
    error: float
    """Root mean square distance to the ODE's solution, which only samplers of the ODE aim at."""
    distance: float
    """Of the samples' distribution to that of the solutions, sliced Wasserstein of order 1; of
    digits the share that ends at another image than the solution."""


def sliced_distance(a: Tensor, b: Tensor) -> float:
    """The mean over directions of how far sorted projections are apart."""
    angles = torch.arange(64, dtype=torch.float64) * (math.pi / 64)
    directions = torch.stack([angles.cos(), angles.sin()])
    along = [(t.double() @ directions).sort(0).values for t in (a, b)]
    return float((along[0] - along[1]).abs().mean())


def measure(problem: Problem, exact: Tensor) -> list[Row]:
    rows = []
    for method in (*ODE, *SDE):
        for steps in STEPS:
            found = problem.run(method, steps)
            error = float((found - exact).square().sum(1).mean().sqrt())
            elsewhere = float(((found - exact).norm(dim=1) > 1).double().mean())
            distance = sliced_distance(found, exact) if found.shape[1] == 2 else elsewhere
            rows.append(Row(method, steps, found, error, distance))
    return rows


def same_in_any_batch(problem: Problem, method: str) -> bool:
    """Whether each part of a batch alone, with its own seeds, ends at the same bits."""
    seeds = list(range(problem.shape[0]))
    sigmas = problem.sigmas(10)

    def run(own: list[int]) -> Tensor:
        x = sigmas[0].item() * samplers.noise((len(own), *problem.shape[1:]), own)
        return samplers.sample(problem.model, x, sigmas, method, seeds=own)

    part = len(seeds) // 3
    return torch.equal(run(seeds), torch.cat([run(seeds[:part]), run(seeds[part:])]))


def passed(rows: list[Row]) -> bool:
    """Whether 50 steps come nearer than 10 for every sampler of the ODE, and those of higher order
    nearer than Euler's."""
    error = {(row.method, row.steps): row.error for row in rows}
    most = STEPS[-1]
    return all(
        error[method, most] < error[method, STEPS[1]] / 3
        and (method == "euler" or error[method, most] < error["euler", most] / 2)
        for method in ODE
    )


# ---- pictures ------------------------------------------------------------------------------------


def _grid(
    width: float, height: float, columns: int
) -> tuple[pyplot.Figure, list[list[pyplot.Axes]]]:
    methods = {**ODE, **SDE}
    figure, panels = pyplot.subplots(
        len(methods), columns, figsize=(width * columns, height * len(methods)), squeeze=False
    )
    figure.subplots_adjust(1.6 / (width * columns), 0.005, 0.995, 0.965, 0.04, 0.04)
    for line, title in zip(panels, methods.values(), strict=True):
        line[0].set_ylabel(title, fontsize=8, rotation=0, ha="right", va="center")
    heads = [f"{steps} steps" for steps in STEPS] + ["the ODE's solution"]
    for axes, head in zip(panels[0], heads, strict=True):
        axes.set_title(head, fontsize=9)
    for axes in panels.flat:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    return figure, panels


def _save(figure: pyplot.Figure, output: Path) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=100, facecolor="white", metadata={"Software": None})
    pyplot.close(figure)


def draw_points(rows: list[Row], exact: Tensor, output: Path) -> None:
    """Where the samples end, coloured by where the ODE's solution takes their noise."""
    figure, panels = _grid(1.5, 1.2, len(STEPS) + 1)
    colours = [COLOURS[k] for k in nearest_mean(exact).tolist()]
    by_method = {(row.method, row.steps): row.samples for row in rows}
    for line, method in zip(panels, (*ODE, *SDE), strict=True):
        for axes, steps in zip(line, (*STEPS, None), strict=True):
            x = exact if steps is None else by_method[method, steps]
            axes.scatter(*x.double().T.numpy(), s=1.2, c=colours, linewidths=0)
            axes.set(xlim=(-3, 3), ylim=(-2.1, 2.9), aspect="equal")
    _save(figure, output)


def draw_digits(rows: list[Row], exact: Tensor, output: Path) -> None:
    """The six noises that Euler's five steps take farthest from the solution."""
    figure, panels = _grid(2.0, 0.42, len(STEPS) + 1)
    figure.subplots_adjust(0.14, 0.0, 0.995, 0.94)
    by_method = {(row.method, row.steps): row.samples for row in rows}
    chosen = (by_method["euler", STEPS[0]] - exact).norm(dim=1).topk(6).indices
    for line, method in zip(panels, (*ODE, *SDE), strict=True):
        for axes, steps in zip(line, (*STEPS, None), strict=True):
            x = exact if steps is None else by_method[method, steps]
            images = torch.cat([image.view(8, 8) for image in x[chosen].double()], 1)
            axes.imshow(images.numpy(), cmap="gray_r", vmin=-1, vmax=1)
    _save(figure, output)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    succeeded = True
    for name, problem, draw in (
        ("mixture", mixture(), draw_points),
        ("digits", digits(), draw_digits),
    ):
        exact = problem.solution()
        rows = measure(problem, exact)
        what = "between the distributions" if name == "mixture" else "the share at another digit"
        print(f"{name}: distance to the ODE's solution, and {what}")
        for method, title in (ODE | SDE if name == "mixture" else ODE).items():
            own = [row for row in rows if row.method == method]
            errors = "".join(f"{row.error:10.2e}" if method in ODE else f"{'-':>10}" for row in own)
            distances = "".join(f"{row.distance:8.3f}" for row in own)
            print(f"  {title:18}{errors}   {distances}")
        image = arguments.output / f"samplers-{name}.png"
        draw(rows, exact, image)
        print(f"saved {image}")
        if name == "mixture":
            succeeded = passed(rows)
            print(f"every order shows: {'yes' if succeeded else 'NO'}")
            same = all(same_in_any_batch(problem, method) for method in (*ODE, *SDE))
            print(f"the same bits in any batch: {'yes' if same else 'NO'}")
            succeeded = succeeded and same
    return 0 if succeeded else 1


if __name__ == "__main__":
    sys.exit(main())
