"""What is measured of samplers: a step of each scheduler, guidance, whole runs, adaptive ODEs."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy
import torch
from torch import Tensor

from benchmarks.workload import Workload
from fastzoo.samplers import formulas
from fastzoo.samplers.algebra import Combination, tensor
from fastzoo.testing import BenchmarkCase

STEPS, MIDDLE = 20, 10
SEED = 0

# --- a step of a scheduler, in the middle of its run ----------------------------------------------

# Stable Diffusion's, of latents.
_LATENTS = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "timestep_spacing": "leading",
    "steps_offset": 1,
}


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of a scheduler as its paper has it.

    Args:
        options: of the scheduler.
        inputs: the names of the tensors that the rows are of; the sample and the model's output
            come first, noise last.
        rows: as those of :class:`fastzoo.samplers.algebra.Program`; the last is the step's result.
        bound: of the rows before the last.
        begin: ``begin(scheduler, tensors)`` brings it to the middle, the tensors being its history.
        index: of the timed step's timestep.
        run: of ``set_timesteps``.
    """

    options: dict[str, Any]
    inputs: tuple[str, ...]
    rows: dict[str, Combination]
    bound: float = float("inf")
    begin: Callable[[Any, Mapping[str, Tensor]], None] = lambda scheduler, tensors: None
    index: int = MIDDLE
    run: Mapping[str, Any] = dataclasses.field(
        default_factory=lambda: {"num_inference_steps": STEPS}
    )

    @property
    def noisy(self) -> bool:
        return "noise" in self.inputs


def _alpha_bar(schedule: str, beta_start: float, beta_end: float) -> Any:
    """In float32, as the schedulers have it, then in float64."""
    if schedule == "linear":
        betas = torch.linspace(beta_start, beta_end, 1000)
    else:
        betas = torch.linspace(beta_start**0.5, beta_end**0.5, 1000) ** 2
    return torch.cumprod(1 - betas, 0).double().numpy()


def _preserving(table: Any, *timesteps: int) -> list[tuple[float, float]]:
    """(alpha, sigma), alpha^2 + sigma^2 = 1."""
    return [(float(table[t]) ** 0.5, float(1 - table[t]) ** 0.5) for t in timesteps]


_X, _MODEL, _NOISE = tensor("x"), tensor("model"), tensor("noise")


def _ddpm() -> Step:
    (a, s), (next_a, next_s) = _preserving(_alpha_bar("linear", 1e-4, 0.02), 450, 400)
    mean = formulas.ddpm_mean(_X, tensor("x0"), a, s, next_a, next_s)
    std = formulas.posterior_variance(a, s, next_a, next_s) ** 0.5
    x0 = formulas.denoised("epsilon", _X, _MODEL, a, s)
    rows = {"x0": x0, "out": mean + std * _NOISE}
    return Step({}, ("x", "model", "noise"), rows, bound=1.0, index=MIDDLE)


@functools.cache
def _latents() -> Any:
    return _alpha_bar("scaled_linear", 0.00085, 0.012)


def _ddim() -> Step:
    (a, s), (next_a, next_s) = _preserving(_latents(), 451, 401)
    x0 = formulas.denoised("epsilon", _X, _MODEL, a, s)
    rows = {"out": formulas.ddim(x0, _MODEL, next_a, next_s)}
    options = {**_LATENTS, "clip_sample": False, "set_alpha_to_one": False}
    return Step(options, ("x", "model"), rows)


def _exploding(*timesteps: int) -> list[float]:
    """sigma where alpha is 1."""
    return [s / a for a, s in _preserving(_latents(), *timesteps)]


def _euler() -> Step:
    sigma, next_sigma = _exploding(451, 401)
    x0 = formulas.denoised("epsilon", _X, _MODEL, 1.0, sigma)
    rows = {"out": formulas.euler(_X, x0, sigma, next_sigma)}
    return Step(_LATENTS, ("x", "model"), rows, begin=_scaled)


def _scaled(scheduler: Any, tensors: Mapping[str, Tensor]) -> None:
    """The call without which these warn at every step."""
    scheduler.scale_model_input(tensors["x"], scheduler.timesteps[MIDDLE])


def _euler_ancestral() -> Step:
    sigma, next_sigma = _exploding(451, 401)
    x0 = formulas.denoised("epsilon", _X, _MODEL, 1.0, sigma)
    down, up = formulas.ancestral(sigma, next_sigma)
    rows = {"out": formulas.euler(_X, x0, sigma, down) + up * _NOISE}
    return Step(_LATENTS, ("x", "model", "noise"), rows, begin=_scaled)


def _heun() -> Step:
    """The second half of a step, which has the derivative at both of its ends."""
    sigma, next_sigma = _exploding(451, 401)
    start, first = tensor("start"), tensor("first")
    slopes = [
        formulas.derivative(x, formulas.denoised("epsilon", x, model, 1.0, at), at)
        for x, model, at in ((start, first, sigma), (_X, _MODEL, next_sigma))
    ]
    rows = {"out": start + ((next_sigma - sigma) / 2) * (slopes[0] + slopes[1])}

    def begin(scheduler: Any, tensors: Mapping[str, Tensor]) -> None:
        scheduler.set_begin_index(2 * MIDDLE)
        scheduler.step(tensors["first"], scheduler.timesteps[2 * MIDDLE], tensors["start"])

    inputs = "x", "model", "start", "first"
    return Step(_LATENTS, inputs, rows, begin=begin, index=2 * MIDDLE + 1)


def _latest(*indices: int) -> list[tuple[float, float]]:
    """(alpha, sigma) at the timesteps of DPM-Solver++ and UniPC, which space them by 1000 / 21."""
    return _preserving(_latents(), *(47 * (STEPS - index) + 1 for index in indices))


def _take(
    scheduler: Any, index: int, x: Tensor, x0: Tensor, alpha_sigma: tuple[float, float]
) -> None:
    """A step whose sample is x, and whose model takes the data for x0."""
    alpha, sigma = alpha_sigma
    scheduler.step(formulas.noise_of(x, x0, alpha, sigma), scheduler.timesteps[index], x)


def _dpm_solver() -> Step:
    before, now, then = _latest(MIDDLE - 1, MIDDLE, MIDDLE + 1)
    x0 = formulas.denoised("epsilon", _X, _MODEL, *now)
    at = [formulas.log_snr(*pair) for pair in (before, now, then)]
    ratio = (at[1] - at[0]) / (at[2] - at[1])
    first, _ = formulas.differences(x0, tensor("x0 before"), ratio)
    rows = {"out": formulas.dpm_solver_pp(_X, x0, now, then, first)}

    def begin(scheduler: Any, tensors: Mapping[str, Tensor]) -> None:
        scheduler.set_begin_index(MIDDLE - 1)
        _take(scheduler, MIDDLE - 1, tensors["x"], tensors["x0 before"], before)

    return Step(_LATENTS, ("x", "model", "x0 before"), rows, begin=begin)


def _flow_match() -> Step:
    run = numpy.linspace(1, 1 / STEPS, STEPS)
    sigmas = 3 * run / (1 + 2 * run)  # shift = 3
    sigma, next_sigma = float(sigmas[MIDDLE]), float(sigmas[MIDDLE + 1])
    x0 = formulas.denoised("velocity", _X, _MODEL, 1 - sigma, sigma)
    rows = {"out": formulas.euler(_X, x0, sigma, next_sigma)}
    return Step({"shift": 3.0}, ("x", "model"), rows, run={"sigmas": run})


SCHEDULERS: dict[str, Callable[[], Step]] = {
    "DDPM": functools.cache(_ddpm),
    "DDIM": functools.cache(_ddim),
    "EulerDiscrete": functools.cache(_euler),
    "EulerAncestralDiscrete": functools.cache(_euler_ancestral),
    "HeunDiscrete": functools.cache(_heun),
    "DPMSolverMultistep": functools.cache(_dpm_solver),
    "FlowMatchEulerDiscrete": functools.cache(_flow_match),
}


def scheduler_step(package: Any, *args: Tensor, scheduler: str, noise: str) -> Callable[[], Tensor]:
    """The middle step of diffusers' scheduler, or of fastzoo's; each call starts from its state
    before that step."""
    step = SCHEDULERS[scheduler]()
    tensors = dict(zip(step.inputs, args, strict=True))
    x, model = tensors["x"], tensors["model"]
    made = getattr(package, f"{scheduler}Scheduler")(**step.options)
    made.set_timesteps(**step.run, device=x.device)
    step.begin(made, tensors)
    timestep = made.timesteps[step.index]
    more: dict[str, Any] = {}
    if noise == "generator":
        more["generator"] = torch.Generator(x.device).manual_seed(SEED)
    elif noise == "seeds":
        more["seeds"] = torch.arange(len(x), device=x.device)
    state = dict(vars(made))
    lists = {name: value for name, value in state.items() if isinstance(value, list)}

    def call() -> Tensor:
        vars(made).update(state)
        for name, value in lists.items():
            setattr(made, name, list(value))
        found: Tensor = made.step(model, timestep, x, **more).prev_sample
        return found

    return call


def _evaluated(step: Step, tensors: Mapping[str, Tensor]) -> Tensor:
    """The rows as sums of tensors, each with its one coefficient."""
    known = dict(tensors)
    for name, row in step.rows.items():
        terms = [float(weight) * known[str(term)] for term, weight in row.terms.items()]
        value = functools.reduce(torch.add, terms)
        known[name] = value if name == "out" else value.clamp(-step.bound, step.bound)
    return known["out"]


def _eager_scheduler_step(*args: Tensor, scheduler: str, noise: str) -> Tensor:
    step = SCHEDULERS[scheduler]()
    tensors = dict(zip(step.inputs, args, strict=True))
    if step.noisy:
        generator = torch.Generator(args[0].device).manual_seed(SEED)
        tensors["noise"] = torch.randn(args[0].shape, generator=generator, device=args[0].device)
    return _evaluated(step, tensors)
