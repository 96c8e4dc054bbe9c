"""What is measured of samplers: a step of each scheduler, guidance, whole runs, adaptive ODEs."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy
import torch
from torch import Tensor

from benchmarks.implementation import Unavailable, require
from benchmarks.workload import Workload
from fastzoo import ops, samplers
from fastzoo.samplers import diffusers, formulas
from fastzoo.samplers.algebra import Combination, Program, Tables, tensor
from fastzoo.samplers.ode import odeint
from fastzoo.testing import BenchmarkCase
from fastzoo.testing.coupling import values
from fastzoo.testing.ode_step import ODE_STEP, table_of

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


def _one_before(scheduler: Any, tensors: Mapping[str, Tensor], **options: Any) -> None:
    """For what needs no history: a run may do something at its first step."""
    timestep = scheduler.timesteps[MIDDLE - 1]
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(MIDDLE - 1)
    if hasattr(scheduler, "scale_model_input"):  # without which Euler's warn at every step
        scheduler.scale_model_input(tensors["x"], timestep)
    scheduler.step(tensors["model"], timestep, tensors["x"], **options)


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of a scheduler as its paper has it.

    Args:
        options: of the scheduler.
        inputs: the names of the tensors that the rows are of; the sample and the model's output
            come first, noise last.
        rows: as those of :class:`fastzoo.samplers.algebra.Program`; the last is the step's result.
        bound: of the rows before the last.
        begin: ``begin(scheduler, tensors, **options)`` takes the steps before it, after which its
            history is what the tensors say; the options are those of ``step``.
        index: of the timed step's timestep.
        run: of ``set_timesteps``.
        kept: rows that the next step needs, which are results too, and where a scheduler has them
            after the step.
    """

    options: dict[str, Any]
    inputs: tuple[str, ...]
    rows: dict[str, Combination]
    bound: float = float("inf")
    begin: Callable[..., None] = _one_before
    index: int = MIDDLE
    run: Mapping[str, Any] = dataclasses.field(
        default_factory=lambda: {"num_inference_steps": STEPS}
    )
    kept: Mapping[str, Callable[[Any], Tensor]] = dataclasses.field(default_factory=dict)

    @property
    def noisy(self) -> bool:
        return "noise" in self.inputs

    @functools.cached_property
    def weights(self) -> list[tuple[str, list[tuple[str, float]]]]:
        """Of each row, by the names of tensors and rows before it."""
        return [
            (name, [(str(term), float(weight)) for term, weight in row.terms.items()])
            for name, row in self.rows.items()
        ]


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
_LATENT_ALPHAS = _alpha_bar("scaled_linear", 0.00085, 0.012)


def _ddpm() -> Step:
    (a, s), (next_a, next_s) = _preserving(_alpha_bar("linear", 1e-4, 0.02), 450, 400)
    mean = formulas.ddpm_mean(_X, tensor("x0"), a, s, next_a, next_s)
    std = formulas.posterior_variance(a, s, next_a, next_s) ** 0.5
    x0 = formulas.denoised("epsilon", _X, _MODEL, a, s)
    rows = {"x0": x0, "out": mean + std * _NOISE}
    return Step({}, ("x", "model", "noise"), rows, bound=1.0)


def _ddim() -> Step:
    (a, s), (next_a, next_s) = _preserving(_LATENT_ALPHAS, 451, 401)
    x0 = formulas.denoised("epsilon", _X, _MODEL, a, s)
    rows = {"out": formulas.ddim(x0, _MODEL, next_a, next_s)}
    options = {**_LATENTS, "clip_sample": False, "set_alpha_to_one": False}
    return Step(options, ("x", "model"), rows)


def _exploding(*timesteps: int) -> list[float]:
    """sigma where alpha is 1."""
    return [s / a for a, s in _preserving(_LATENT_ALPHAS, *timesteps)]


def _euler() -> Step:
    sigma, next_sigma = _exploding(451, 401)
    x0 = formulas.denoised("epsilon", _X, _MODEL, 1.0, sigma)
    rows = {"out": formulas.euler(_X, x0, sigma, next_sigma)}
    return Step(_LATENTS, ("x", "model"), rows)


def _euler_ancestral() -> Step:
    sigma, next_sigma = _exploding(451, 401)
    x0 = formulas.denoised("epsilon", _X, _MODEL, 1.0, sigma)
    down, up = formulas.ancestral(sigma, next_sigma)
    rows = {"out": formulas.euler(_X, x0, sigma, down) + up * _NOISE}
    return Step(_LATENTS, ("x", "model", "noise"), rows)


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
    return _preserving(_LATENT_ALPHAS, *(47 * (STEPS - index) + 1 for index in indices))


def _take(
    scheduler: Any, index: int, x: Tensor, x0: Tensor, alpha_sigma: tuple[float, float]
) -> None:
    """A step whose sample is x, and whose model takes the data for x0."""
    alpha, sigma = alpha_sigma
    scheduler.step(formulas.noise_of(x, x0, alpha, sigma), scheduler.timesteps[index], x)


def _latest_output(scheduler: Any) -> Tensor:
    found: Tensor = scheduler.model_outputs[-1]
    return found


def _dpm_solver() -> Step:
    before, now, then = _latest(MIDDLE - 1, MIDDLE, MIDDLE + 1)
    x0 = tensor("x0")
    at = [formulas.log_snr(*pair) for pair in (before, now, then)]
    ratio = (at[1] - at[0]) / (at[2] - at[1])
    first, _ = formulas.differences(x0, tensor("x0 before"), ratio)
    rows = {
        "x0": formulas.denoised("epsilon", _X, _MODEL, *now),
        "out": formulas.dpm_solver_pp(_X, x0, now, then, first),
    }

    def begin(scheduler: Any, tensors: Mapping[str, Tensor]) -> None:
        scheduler.set_begin_index(MIDDLE - 1)
        _take(scheduler, MIDDLE - 1, tensors["x"], tensors["x0 before"], before)

    inputs = "x", "model", "x0 before"
    return Step(_LATENTS, inputs, rows, begin=begin, kept={"x0": _latest_output})


def _unipc() -> Step:
    earlier, before, now, then = _latest(*range(MIDDLE - 2, MIDDLE + 2))
    x0 = tensor("x0")
    start, x0_before, x0_earlier = (tensor(name) for name in ("start", "x0 before", "x0 earlier"))
    history = [(x0_earlier, formulas.log_snr(*earlier))]
    latest = [(x0_before, formulas.log_snr(*before))]
    rows = {
        "x0": formulas.denoised("epsilon", _X, _MODEL, *now),
        "corrected": formulas.unipc(start, x0_before, before, now, history, x0),
        "out": formulas.unipc(tensor("corrected"), x0, now, then, latest),
    }

    def begin(scheduler: Any, tensors: Mapping[str, Tensor]) -> None:
        scheduler.set_begin_index(MIDDLE - 2)
        _take(scheduler, MIDDLE - 2, tensors["x"], tensors["x0 earlier"], earlier)
        _take(scheduler, MIDDLE - 1, tensors["start"], tensors["x0 before"], before)

    # The step before is left uncorrected, so that it starts from the sample that is given.
    options = {**_LATENTS, "disable_corrector": [MIDDLE - 2]}
    inputs = "x", "model", "start", "x0 before", "x0 earlier"
    kept = {"x0": _latest_output, "corrected": lambda scheduler: scheduler.last_sample}
    return Step(options, inputs, rows, begin=begin, kept=kept)


def _flow_match() -> Step:
    run = numpy.linspace(1, 1 / STEPS, STEPS)
    sigmas = 3 * run / (1 + 2 * run)  # shift = 3
    sigma, next_sigma = float(sigmas[MIDDLE]), float(sigmas[MIDDLE + 1])
    x0 = formulas.denoised("velocity", _X, _MODEL, 1 - sigma, sigma)
    rows = {"out": formulas.euler(_X, x0, sigma, next_sigma)}
    return Step({"shift": 3.0}, ("x", "model"), rows, run={"sigmas": run})


SCHEDULERS: dict[str, Step] = {
    "DDPM": _ddpm(),
    "DDIM": _ddim(),
    "EulerDiscrete": _euler(),
    "EulerAncestralDiscrete": _euler_ancestral(),
    "HeunDiscrete": _heun(),
    "DPMSolverMultistep": _dpm_solver(),
    "UniPCMultistep": _unipc(),
    "FlowMatchEulerDiscrete": _flow_match(),
}


def scheduler_step(
    package: Any, *args: Tensor, scheduler: str, noise: str | None
) -> Callable[[], Any]:
    """The middle step of diffusers' scheduler, or of fastzoo's; each call starts from its state
    before that step."""
    step = SCHEDULERS[scheduler]
    tensors = dict(zip(step.inputs, args, strict=True))
    x, model = tensors["x"], tensors["model"]
    made = getattr(package, f"{scheduler}Scheduler")(**step.options)
    made.set_timesteps(**step.run, device=x.device)
    timestep = made.timesteps[step.index]
    more: dict[str, Any] = {}
    if noise == "generator":
        more["generator"] = torch.Generator(x.device)
    elif noise == "seeds":
        more["seeds"] = torch.arange(len(x), device=x.device)
    step.begin(made, tensors, **more)
    if noise == "generator":
        more["generator"].manual_seed(SEED)
    state = dict(vars(made))
    lists = {name: value for name, value in state.items() if isinstance(value, list)}

    def call() -> Any:
        vars(made).update(state)
        for name, value in lists.items():
            setattr(made, name, list(value))
        found: Tensor = made.step(model, timestep, x, **more).prev_sample
        return (found, *(of(made) for of in step.kept.values())) if step.kept else found

    return call


def evaluated(step: Step, tensors: Mapping[str, Tensor]) -> Any:
    """The rows as sums of tensors, each with its one weight: the last, and those that are kept."""
    known = dict(tensors)
    for name, terms in step.weights:
        value = functools.reduce(torch.add, [weight * known[term] for term, weight in terms])
        known[name] = value if name == "out" else value.clamp(-step.bound, step.bound)
    return (known["out"], *(known[row] for row in step.kept)) if step.kept else known["out"]


def _eager_scheduler_step(*args: Tensor, scheduler: str, noise: str | None) -> Any:
    """The step by hand: what the papers' formulas come to, with its noise from a generator."""
    step = SCHEDULERS[scheduler]
    tensors = dict(zip(step.inputs, args, strict=True))
    if noise is not None:
        tensors["noise"] = _normals(args[0])
    return evaluated(step, tensors)


def _normals(like: Tensor) -> Tensor:
    generator = torch.Generator(like.device).manual_seed(SEED)
    return torch.randn(like.shape, generator=generator, device=like.device)


def _latents(device: str, batch: int, channels: int, side: int, *, count: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = batch, channels, side, side
    return [torch.randn(shape, generator=generator).to(device) for _ in range(count)]


_LATENT = {"batch": 8, "channels": 4, "side": 128}
_LATENT_NAME = "8 x 4 x 128 x 128"


def _scheduler_case(scheduler: str, noise: str | None = None) -> BenchmarkCase:
    step = SCHEDULERS[scheduler]
    tensors = len(step.inputs) - step.noisy

    def make(device: str, **shape: int) -> tuple[Tensor, ...]:
        found = _latents(device, **shape, count=tensors)
        return *found, *([_normals(found[0])] if step.noisy else [])

    return BenchmarkCase(
        name=scheduler + (f", {noise}" if noise else ""),
        shape=_LATENT,
        make=make,
        kwargs={"scheduler": scheduler, "noise": noise},
        flops=lambda x, *_, **__: 2.0 * tensors * x.numel(),
        bytes=lambda x, *_, **__: 4.0 * (tensors + 1 + len(step.kept)) * x.numel(),
        # Of weights in float32, schedules included, and a cancellation in x0.
        tolerance=lambda *_, **__: 1e-5,
    )


SCHEDULER_STEP = Workload(
    "scheduler_step",
    "ode_step",
    lambda *args, **kwargs: scheduler_step(diffusers, *args, **kwargs),
    _eager_scheduler_step,
    lambda x, *_: 32.0 * x.numel(),
    tuple(
        _scheduler_case(scheduler, noise)
        for scheduler, step in SCHEDULERS.items()
        for noise in (("generator", "seeds") if step.noisy else (None,))
    ),
)


# --- ode_step alone -------------------------------------------------------------------------------

_EULER = (0.75, 0.25)


def eager_ode_step(*tensors: Tensor, **_: Any) -> Tensor:
    """The specification's case as it is written, or Euler's step."""
    if len(tensors) > 2:
        found: Tensor = ODE_STEP.eager(*tensors)
        return found
    return _EULER[0] * tensors[0] + _EULER[1] * tensors[1]


def _euler_case(batch: int, n: int, shape: str) -> BenchmarkCase:
    return BenchmarkCase(
        name=f"{shape}, Euler",
        shape={"batch": batch, "n": n},
        make=lambda device, batch, n: tuple(
            values(batch, n, seed=k, device=device) for k in range(2)
        ),
        kwargs={"table": table_of(_EULER)},
        flops=lambda x, *_, **__: 3.0 * x.numel(),
        bytes=lambda x, *_, **__: 12.0 * x.numel(),
        tolerance=lambda x, *_, **__: 64 * 2.0**-24,
    )


ODE_STEP_CASES = (
    _euler_case(8, 65536, _LATENT_NAME),
    _euler_case(256, 65536, "256 x 4 x 128 x 128"),
)


# --- guidance, its rescaling, the conversion of a v prediction and the update ---------------------

_GUIDANCE, _RESCALE = 7.5, 0.7
_GUIDED_FROM, _GUIDED_TO = _preserving(_LATENT_ALPHAS, 451, 401)


def _guided_step(cond: Tensor, uncond: Tensor, x: Tensor) -> Callable[[], Tensor]:
    model = formulas.guided(tensor("uncond"), tensor("cond"), _GUIDANCE)
    x0 = formulas.denoised("v", _X, model, *_GUIDED_FROM)
    eps = formulas.noise_of(_X, x0, *_GUIDED_FROM)
    rows = {"out": formulas.ddim(x0, eps, *_GUIDED_TO)}
    program = Program(rows, "x", scaled=("cond", "uncond"))
    (table,) = Tables([program]).on(x.device)
    tensors = {"x": x, "cond": cond, "uncond": uncond}
    scale = torch.full((1,), _GUIDANCE, dtype=torch.float64, device=x.device)

    def call() -> Tensor:
        factor = ops.guidance_factor(cond, uncond, scale, _RESCALE)
        found: Tensor = program(tensors, table, factor=factor)
        return found

    return call


def _eager_guided_step(cond: Tensor, uncond: Tensor, x: Tensor) -> Tensor:
    """As pipelines have it: guidance, `rescale_noise_cfg`, and a step of DDIM."""
    (alpha, sigma), (next_alpha, next_sigma) = _GUIDED_FROM, _GUIDED_TO
    guided = uncond + _GUIDANCE * (cond - uncond)
    spread = cond.std((1, 2, 3), keepdim=True) / guided.std((1, 2, 3), keepdim=True)
    model = _RESCALE * (guided * spread) + (1 - _RESCALE) * guided
    x0 = alpha * x - sigma * model
    eps = alpha * model + sigma * x
    return next_alpha * x0 + next_sigma * eps


GUIDED_STEP = Workload(
    "guided_step",
    "guidance_factor",
    _guided_step,
    _eager_guided_step,
    lambda x, *_: 40.0 * x.numel(),
    (
        BenchmarkCase(
            name=f"{_LATENT_NAME}, v, rescaled",
            shape=_LATENT,
            make=lambda device, **shape: tuple(_latents(device, **shape, count=3)),
            kwargs={},
            flops=lambda cond, uncond, x: 16.0 * x.numel(),
            # The predictions twice: their spread is known when all of them has been read.
            bytes=lambda cond, uncond, x: 24.0 * x.numel(),
            tolerance=lambda *_: 1e-5,
        ),
    ),
)


# --- whole runs around an empty model -------------------------------------------------------------

CHURN = {"s_churn": 40.0, "s_noise": 1.003}


def karras(steps: int) -> Tensor:
    """From 80 to 0.5, in float32: k-diffusion takes its state to the dtype of these. At 0 nothing
    is left of the steps but the model's last output, and whatever they did would be right."""
    return samplers.schedules.karras_sigmas(steps + 1, 0.5, 80.0, final=None).float()


def empty_model(outputs: Tensor) -> Callable[..., Tensor]:
    """A denoiser that does nothing: of two tensors it returns one, then the other."""
    turn = itertools.cycle(outputs.unbind())
    return lambda x, sigma, **_: next(turn)


def run(
    x: Tensor, outputs: Tensor, sigmas: Tensor, method: str, draw: Callable[[int], Tensor]
) -> Tensor:
    """A run as its paper writes it."""
    model, at = empty_model(outputs), sigmas.tolist()
    before: Tensor | None = None
    for i, (sigma, next_sigma) in enumerate(itertools.pairwise(at)):
        if method == "heun":
            gamma = min(CHURN["s_churn"] / (len(at) - 1), 2**0.5 - 1)
            hat, up = formulas.churned(sigma, gamma)
            x = x + (float(up) * CHURN["s_noise"]) * draw(i)
            slope = formulas.derivative(x, model(x, hat), hat)
            predicted = x + (next_sigma - hat) * slope
            end = formulas.derivative(predicted, model(predicted, next_sigma), next_sigma)
            x = x + ((next_sigma - hat) / 2) * (slope + end)
        else:
            x0 = model(x, sigma)
            first = None
            if before is not None:
                ratio = math.log(at[i - 1] / sigma) / math.log(sigma / next_sigma)
                first, _ = formulas.differences(x0, before, ratio)
            x = formulas.dpm_solver_pp(x, x0, (1.0, sigma), (1.0, next_sigma), first)
            before = x0
    return x


def _eager_sample(
    x: Tensor, outputs: Tensor, sigmas: Tensor, _: Tensor, *, method: str, noise: str | None
) -> Tensor:
    torch.manual_seed(SEED)
    return run(x, outputs, sigmas, method, lambda i: torch.randn_like(x))


def _sample(
    x: Tensor, outputs: Tensor, sigmas: Tensor, _: Tensor, *, method: str, noise: str | None
) -> Callable[[], Tensor]:
    options: dict[str, Any] = dict(CHURN, seeds=SEED) if method == "heun" else {}

    def call() -> Tensor:
        return samplers.sample(empty_model(outputs), x, sigmas, method=method, **options)

    return call


def _sample_case(name: str, method: str, steps: int) -> BenchmarkCase:
    noisy = method == "heun"

    def make(device: str, **shape: int) -> tuple[Tensor, ...]:
        x, *outputs = _latents(device, **shape, count=3)
        with torch.random.fork_rng([device] if device == "cuda" else []):
            torch.manual_seed(SEED)
            draws = [torch.randn_like(x) for _ in range(steps * noisy)]
        noise = torch.stack(draws) if noisy else x.new_empty(0)
        return 80 * x, torch.stack(outputs), karras(steps).to(device), noise

    passes = 7 * steps if noisy else 4 * steps
    return BenchmarkCase(
        name=name,
        shape=_LATENT,
        make=make,
        kwargs={"method": method, "noise": "seeds" if noisy else None},
        flops=lambda x, *_, **__: 2.0 * passes * x.numel(),
        bytes=lambda x, *_, **__: 4.0 * passes * x.numel(),
        # Twenty steps, each with a rounding or two of a state that is 80 times what it ends as.
        tolerance=lambda *_, **__: 1e-4,
    )


SAMPLE = Workload(
    "sample",
    "ode_step",
    _sample,
    _eager_sample,
    lambda x, *_: 40.0 * x.numel(),
    (
        _sample_case("EDM Heun with churn, 18 steps", "heun", 18),
        _sample_case("DPM-Solver++ 2M, 20 steps", "dpmpp_2m", 20),
    ),
)


# --- dopri5 ---------------------------------------------------------------------------------------

# The tolerance with which flows are sampled; of much less in float32 rounding decides on the steps.
RTOL, ATOL, END = 1e-5, 1e-5, 10.0


class Oscillation:
    """y' = cos(t) y, and how often it was asked for: a right-hand side of one pass."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        return torch.cos(t).to(y.dtype) * y


def solve(odeint: Callable[..., Tensor], y0: Tensor) -> Callable[[], Tensor]:
    times = torch.tensor([0.0, END], dtype=torch.float64, device=y0.device)
    return lambda: odeint(Oscillation(), y0, times, rtol=RTOL, atol=ATOL, method="dopri5")[-1]


def evaluations(odeint: Callable[..., Tensor], y0: Tensor) -> int:
    function = Oscillation()
    odeint(function, y0, torch.tensor([0.0, END], dtype=torch.float64), rtol=RTOL, atol=ATOL)
    return function.calls


def _odeint_case(rows: int) -> BenchmarkCase:
    return BenchmarkCase(
        name=f"dopri5, {rows} x 64" if rows > 1 else "dopri5, 64",
        shape={"rows": rows, "columns": 64},
        make=lambda device, rows, columns: (
            torch.linspace(0.5, 2, rows * columns, device=device).view(rows, columns),
        ),
        kwargs={},
        flops=lambda y0: 0.0,
        bytes=lambda y0: 0.0,
        # The solver's tolerance, of each of some thirty steps.
        tolerance=lambda *_: 30 * (RTOL + ATOL),
    )


def _no_loop(y0: Tensor) -> Tensor:
    raise Unavailable("torchdiffeq is the loop written out")


ODEINT = Workload(
    "odeint",
    "ode_step",
    lambda y0: solve(odeint, y0),
    _no_loop,
    lambda *_: 0.0,
    (_odeint_case(4096), _odeint_case(1)),
)


# --- a step of sampling, model included -----------------------------------------------------------


@functools.cache
def small_unet(channels: int, side: int, device: torch.device, dtype: torch.dtype) -> Any:
    """diffusers' UNet2DModel, of two levels of 32 and 64 channels."""
    package = require("diffusers")
    with torch.random.fork_rng([]):
        torch.manual_seed(SEED)
        model = package.UNet2DModel(
            sample_size=side,
            in_channels=channels,
            out_channels=channels,
            layers_per_block=1,
            block_out_channels=(32, 64),
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
            norm_num_groups=8,
        )
    # Not diffusers' own `to`, which warns of a dtype.
    return torch.nn.Module.to(model, device, dtype).eval()


def denoising_step(package: Any, x: Tensor) -> Callable[[], Tensor]:
    """The model's call and the scheduler's."""
    unet = small_unet(x.shape[1], x.shape[2], x.device, x.dtype)
    step = SCHEDULERS["DDIM"]
    made = package.DDIMScheduler(**step.options)
    made.set_timesteps(STEPS, device=x.device)
    timestep = made.timesteps[step.index]

    def call() -> Tensor:
        with torch.no_grad():
            model = unet(x, timestep).sample
        found: Tensor = made.step(model, timestep, x).prev_sample
        return found

    return call


def _eager_denoising_step(x: Tensor) -> Tensor:
    unet = small_unet(x.shape[1], x.shape[2], x.device, x.dtype)
    with torch.no_grad():
        model = unet(x, 451).sample
    found: Tensor = evaluated(SCHEDULERS["DDIM"], {"x": x, "model": model})
    return found


DENOISING_STEP = Workload(
    "denoising_step",
    "ode_step",
    lambda x: denoising_step(diffusers, x),
    _eager_denoising_step,
    lambda x: 1e3 * x.numel(),
    (
        BenchmarkCase(
            name=f"{_LATENT_NAME}, a small UNet2DModel and DDIM",
            shape=_LATENT,
            make=lambda device, **shape: tuple(_latents(device, **shape)),
            kwargs={},
            flops=lambda x: 0.0,
            bytes=lambda x: 0.0,
            tolerance=lambda x: 1e-4,
        ),
    ),
)

SAMPLERS = (SCHEDULER_STEP, GUIDED_STEP, SAMPLE, ODEINT, DENOISING_STEP)
