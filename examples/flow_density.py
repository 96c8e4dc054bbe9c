"""Fits densities with flows of affine couplings (RealNVP) and of spline couplings (NSF), each once
through fastzoo's fused couplings and once through their definitions, and compares the two.

    python examples/flow_density.py [--steps 400] [--backend cpu] [--plot [docs/images/...png]]

The data are two moons in the plane, and scikit-learn's 569 tumours with 30 measurements each. Parts
of them are kept to choose the step at which to stop, and to test.
"""

import argparse
import copy
import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from matplotlib import pyplot
from sklearn.base import TransformerMixin
from sklearn.datasets import load_breast_cancer, make_moons
from sklearn.decomposition import PCA
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from torch import Tensor

import fastzoo
from fastzoo.nn import flows

LAYERS, HIDDEN, BINS = 6, (64, 64), 8
BATCH, RATE, STEPS, EVERY = 256, 3e-3, 400, 25
# How far apart two ways of training may end, in nats: every step multiplies what rounding made of
# the first, and 1000 test samples leave their mean uncertain by as much. And by how much a normal
# has to be beaten.
ALLOWED, LEAST_GAIN = 0.03, 0.5
OUTPUT = Path(__file__).parent.parent / "docs" / "images" / "flow-density.png"


@dataclasses.dataclass(frozen=True)
class Data:
    """Samples ``[N, D]``."""

    train: Tensor
    validation: Tensor
    test: Tensor


def parted(samples: np.ndarray, validation: int, test: int, scaler: TransformerMixin) -> Data:
    rest, tested = train_test_split(samples, test_size=test, random_state=0)
    known, chosen = train_test_split(rest, test_size=validation, random_state=0)
    scaler.fit(known)
    parts = (torch.from_numpy(scaler.transform(part)) for part in (known, chosen, tested))
    return Data(*(part.float() for part in parts))


def moons() -> Data:
    samples, _ = make_moons(6000, noise=0.07, random_state=0)
    return parted(samples, 1000, 1000, StandardScaler())


def tumours() -> Data:
    # Measurements of one another's multiples: standardised along their principal axes.
    return parted(
        StandardScaler().fit_transform(load_breast_cancer().data), 100, 100, PCA(whiten=True)
    )


def real_nvp(features: int) -> flows.Flow:
    return _couplings(
        features,
        2,
        lambda network, split: flows.AffineCoupling(
            network, split=split, bound=2.0, scale_map="tanh"
        ),
    )


def neural_splines(features: int) -> flows.Flow:
    return _couplings(
        features,
        flows.spline_parameters(BINS),
        lambda network, split: flows.SplineCoupling(network, split=split, bins=BINS),
    )


def _couplings(
    features: int, each: int, coupling: Callable[[flows.MLP, int], flows.Transform]
) -> flows.Flow:
    """The first half and the last half pass in turn."""
    half = features // 2
    layers = []
    for number in range(LAYERS):
        passing, split = (features - half, -(features - half)) if number % 2 else (half, half)
        outputs = (features - passing) * each
        layers.append(coupling(flows.MLP(passing, outputs, HIDDEN, activation="silu"), split))
    return flows.Flow(layers, flows.StandardNormal(features))


MODELS = {"RealNVP": real_nvp, "NSF": neural_splines}
DATA = {"two moons": moons, "tumours": tumours}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What the validation's best step gave, and how long all of them took."""

    flow: flows.Flow
    test: float
    seconds: float


def train(
    model: Callable[[int], flows.Flow],
    data: Data,
    *,
    steps: int = STEPS,
    backend: str = "auto",
    seed: int = 0,
) -> Outcome:
    """Two runs of one seed differ in nothing but the backend."""
    torch.manual_seed(seed)
    flow = model(data.train.shape[1])
    optimizer = torch.optim.Adam(flow.parameters(), lr=RATE, weight_decay=1e-5)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    best, kept = -torch.inf, copy.deepcopy(flow.state_dict())
    # Of so small a network a second thread does little, and on a busy machine it is waited for.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    started = time.perf_counter()
    try:
        with fastzoo.use_backend(backend):
            for step in range(1, steps + 1):
                batch = data.train[torch.randint(len(data.train), (BATCH,), generator=generator)]
                optimizer.zero_grad()
                (-flow.log_prob(batch).mean()).backward()
                torch.nn.utils.clip_grad_norm_(flow.parameters(), 5.0)
                optimizer.step()
                schedule.step()
                if step % EVERY == 0 and (found := likelihood(flow, data.validation)) > best:
                    best, kept = found, copy.deepcopy(flow.state_dict())
            seconds = time.perf_counter() - started
            flow.load_state_dict(kept)
            return Outcome(flow, likelihood(flow, data.test), seconds)
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
def likelihood(flow: flows.Flow, x: Tensor) -> float:
    """The mean logarithm of the density, in nats."""
    return float(flow.log_prob(x).mean())


def normal_likelihood(data: Data) -> float:
    """Of a normal distribution with the training data's mean and covariance."""
    covariance = data.train.T.cov() + 1e-4 * torch.eye(data.train.shape[1])
    normal = torch.distributions.MultivariateNormal(data.train.mean(0), covariance)
    return float(normal.log_prob(data.test).mean())


def passed(fused: Outcome, reference: Outcome, normal: float) -> bool:
    return abs(fused.test - reference.test) <= ALLOWED and fused.test >= normal + LEAST_GAIN


@torch.no_grad()
def draw(data: Data, found: dict[str, flows.Flow], output: Path) -> None:
    """The moons, and of each flow its density and its samples."""
    figure, panels = pyplot.subplots(
        1, 1 + 2 * len(found), figsize=(3 * (1 + 2 * len(found)), 3.4), layout="constrained"
    )
    side = torch.linspace(-2.4, 2.4, 200)
    grid = torch.cartesian_prod(side, side)
    edges = (-2.4, 2.4, -2.4, 2.4)

    def scatter(axes: pyplot.Axes, x: Tensor, title: str) -> None:
        axes.scatter(*x.T.numpy(), s=1.5, color="#1b2a3a", alpha=0.5, linewidths=0)
        axes.set_title(title, fontsize=11)

    scatter(panels[0], data.test, "two moons")
    generator = torch.Generator().manual_seed(0)
    for (name, flow), density, samples in zip(
        found.items(), panels[1::2], panels[2::2], strict=True
    ):
        values = flow.log_prob(grid).exp().view(200, 200).T.numpy()
        density.imshow(values, extent=edges, origin="lower", cmap="Blues")
        density.set_title(f"{name}: density", fontsize=11)
        scatter(samples, flow.sample(1000, generator=generator), f"{name}: samples")
    for axes in panels:
        axes.set(xlim=edges[:2], ylim=edges[2:], xticks=[], yticks=[], aspect="equal")
        axes.spines[:].set_visible(False)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=110, facecolor="white", metadata={"Software": None})
    pyplot.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--backend", default="auto", help="of the fused couplings")
    parser.add_argument("--plot", type=Path, nargs="?", const=OUTPUT, help="save a picture")
    arguments = parser.parse_args()
    succeeded, shown = True, {}
    print(f"{'':20} log-likelihood of the test set, nats            seconds of training")
    print(f"{'':20}     fused  reference  difference   normal     fused  reference   ratio")
    for data_name, load in DATA.items():
        data = load()
        normal = normal_likelihood(data)
        for name, model in MODELS.items():
            fused, reference = (
                train(model, data, steps=arguments.steps, backend=backend)
                for backend in (arguments.backend, "reference")
            )
            print(
                f"{data_name + ', ' + name:20} {fused.test:9.4f}  {reference.test:9.4f}  "
                f"{fused.test - reference.test:10.1e}  {normal:7.3f}  {fused.seconds:8.1f}  "
                f"{reference.seconds:9.1f}  {reference.seconds / fused.seconds:5.1f}x",
                flush=True,
            )
            succeeded &= passed(fused, reference, normal)
            if data_name == "two moons":
                shown[name] = fused.flow
    if arguments.plot:
        draw(moons(), shown, arguments.plot)
        print(f"saved {arguments.plot}")
    print(
        f"fused and reference {'end' if succeeded else 'do NOT end'} within {ALLOWED} nats of each "
        f"other, and {LEAST_GAIN} above a normal distribution"
    )
    return 0 if succeeded else 1


if __name__ == "__main__":
    sys.exit(main())
