"""Sampler methods: whole runs beside k-diffusion, diffusers and the papers' loops, their orders on
a Gaussian mixture whose denoiser is known, and the law of what the stochastic ones draw."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastzoo import samplers
from fastzoo.samplers import schedules
from fastzoo.samplers.plan import METHODS
from tests.samplers.peers import k_diffusion_sampling

theirs = k_diffusion_sampling()

CHURN = {"s_churn": 3.0, "s_tmin": 0.1, "s_tmax": 9.0, "s_noise": 1.01}
ETA = {"eta": 0.7, "s_noise": 1.01}
# What has no noise without an option that says so.
DETERMINISTIC = {"euler", "heun", "dpm_2", "lms", "plms", "dpmpp_2s", "dpmpp_2m", "dpmpp_3m"}
DETERMINISTIC |= {"ddim", "unipc", "midpoint", "rk4", "runge_kutta"}
STOCHASTIC = [name for name in METHODS if name not in DETERMINISTIC]


def shaped(sigma: Tensor, x: Tensor) -> Tensor:
    return sigma.view(-1, *[1] * (x.dim() - 1)).to(x.dtype)


def denoiser(x: Tensor, sigma: Tensor, shift: float = 0.0) -> Tensor:
    """No data's, but smooth in both."""
    sigma = shaped(sigma, x)
    return x / (1 + sigma**2) + 0.2 * torch.tanh(x / (1 + sigma)) + shift


def start(*shape: int, sigma: float = 15.0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (sigma * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)


class Noise:
    """The same noise for both, and what it was asked for."""

    def __init__(self, shape: torch.Size, dtype: torch.dtype = torch.float64) -> None:
        self.generator = torch.Generator().manual_seed(1)
        self.shape, self.dtype, self.asked = shape, dtype, list[float]()

    def __call__(self, sigma: Any, next_sigma: Any) -> Tensor:
        self.asked += [float(sigma), float(next_sigma)]
        drawn = torch.randn(self.shape, generator=self.generator, dtype=torch.float64)
        return drawn.to(self.dtype)


class Path(Noise):
    """Noise by the increments of one path, as k-diffusion's Brownian tree gives it."""

    def __call__(self, sigma: Any, next_sigma: Any) -> Tensor:
        steps = torch.arange(1, 1 + math.prod(self.shape), dtype=torch.float64).view(self.shape)
        first, last = ((float(s) ** 0.5 * steps).sin() for s in (sigma, next_sigma))
        return ((first - last) / math.sqrt(float(sigma) - float(next_sigma))).to(self.dtype)


def near(found: Tensor, right: Tensor, allowed: float = 1e-10) -> None:
    """Of the largest value's size, as roundings are."""
    assert found.shape == right.shape
    off = float((found.double() - right.double()).abs().max() / right.double().abs().max())
    assert off <= allowed, off


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("euler", {}),
        ("heun", {}),
        ("dpm_2", {}),
        ("lms", {}),
        ("lms", {"order": 2}),
        ("dpmpp_2m", {}),
        ("euler_ancestral", {}),
        ("euler_ancestral", ETA),
        ("dpm_2_ancestral", ETA),
        ("dpmpp_2s_ancestral", ETA),
        ("dpmpp_sde", {}),
        ("dpmpp_sde", {**ETA, "r": 0.4}),
        ("dpmpp_2m_sde", {}),
        ("dpmpp_2m_sde", {**ETA, "solver_type": "heun"}),
        ("dpmpp_3m_sde", ETA),
    ],
    ids=lambda value: value if isinstance(value, str) else ",".join(map(str, value.values())),
)
@pytest.mark.parametrize("final", [0.0, None])
def test_runs_are_those_of_k_diffusion(
    name: str, options: dict[str, Any], dtype: torch.dtype, allowed: float, final: float | None
) -> None:
    x, sigmas = start(3, 2, 5), schedules.karras_sigmas(10, 0.03, 15, final=final)
    kind = Path if name == "dpmpp_sde" else Noise
    ours, right = kind(x.shape, dtype), kind(x.shape)
    found = samplers.sample(denoiser, x.to(dtype), sigmas, name, noise_sampler=ours, **options)
    drawn = {"noise_sampler": right} if name in STOCHASTIC else {}
    function = getattr(theirs, f"sample_{name}")
    near(found, function(denoiser, x, sigmas, disable=True, **drawn, **options), allowed)
    assert found.dtype == dtype
    if kind is Noise:
        assert ours.asked == pytest.approx(right.asked)


@pytest.mark.parametrize("name", ["euler", "heun", "dpm_2"])
def test_churn_is_that_of_k_diffusion(name: str) -> None:
    """Of all its steps, since k-diffusion draws noise that it does not use."""
    x, sigmas = start(3, 7), schedules.karras_sigmas(8, 0.03, 15)
    options = {**CHURN, "s_tmin": 0.0, "s_tmax": math.inf}
    torch.manual_seed(3)
    found = samplers.sample(denoiser, x, sigmas, name, **options)
    torch.manual_seed(3)
    near(found, getattr(theirs, f"sample_{name}")(denoiser, x, sigmas, disable=True, **options))


def test_churn_stays_in_its_range() -> None:
    sigmas = schedules.karras_sigmas(12, 0.03, 15)
    noise = Noise(torch.Size((2, 3)))
    samplers.sample(denoiser, start(2, 3), sigmas, "heun", noise_sampler=noise, **CHURN)
    inside = [s for s in sigmas.tolist() if CHURN["s_tmin"] <= s <= CHURN["s_tmax"]]
    assert noise.asked[::2] == inside
    assert noise.asked[1::2] == pytest.approx([s * (1 + 3 / 12) for s in inside])


def vp(sigma: float) -> tuple[float, float]:
    """(alpha, sigma) of the variance preserving process whose data is as noisy."""
    alpha = 1 / math.sqrt(1 + sigma**2)
    return alpha, alpha * sigma


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_ddim_is_song_s_loop(eta: float) -> None:
    x, sigmas = start(2, 6), schedules.karras_sigmas(9, 0.02, 15)
    noise, ours = Noise(x.shape), Noise(x.shape)
    state = x * vp(15)[0]
    for sigma, next_sigma in pairwise(sigmas.tolist()):
        (a, s), (b, t) = vp(sigma), vp(next_sigma)
        x0 = denoiser(state / a, torch.full((2,), sigma, dtype=torch.float64))
        eps = (state - a * x0) / s
        std = eta * math.sqrt(t**2 / s**2 * (1 - a**2 / b**2))
        state = b * x0 + math.sqrt(t**2 - std**2) * eps
        if std:
            state = state + 1.02 * std * noise(0, 0)
    options = {"eta": eta, "s_noise": 1.02}
    near(samplers.sample(denoiser, x, sigmas, "ddim", noise_sampler=ours, **options), state)


def test_ddpm_is_ho_s_loop() -> None:
    x, noise, ours = start(2, 6), Noise(torch.Size((2, 6))), Noise(torch.Size((2, 6)))
    bar = schedules.alphas_cumprod(schedules.linear_betas(12, 0.01, 0.6)).tolist()
    sigmas = [math.sqrt((1 - b) / b) for b in (*bar[::-1], 1.0)]
    state = x * math.sqrt(bar[-1])
    for t in range(len(bar) - 1, -1, -1):
        before = bar[t - 1] if t else 1.0
        alpha, beta = bar[t] / before, 1 - bar[t] / before
        sigma = torch.full((2,), math.sqrt((1 - bar[t]) / bar[t]), dtype=torch.float64)
        x0 = denoiser(state / math.sqrt(bar[t]), sigma)
        eps = (state - math.sqrt(bar[t]) * x0) / math.sqrt(1 - bar[t])
        state = (state - beta / math.sqrt(1 - bar[t]) * eps) / math.sqrt(alpha)
        if t:
            state = state + 1.02 * math.sqrt(beta * (1 - before) / (1 - bar[t])) * noise(0, 0)
    found = samplers.sample(denoiser, x, sigmas, "ddpm", noise_sampler=ours, s_noise=1.02)
    near(found, state)


def test_plms_is_liu_s_loop() -> None:
    x, sigmas = start(2, 6), schedules.karras_sigmas(9, 0.02, 15).tolist()

    def slope(at: Tensor, sigma: float) -> Tensor:
        return (at - denoiser(at, torch.full((2,), sigma, dtype=torch.float64))) / sigma

    state, slopes = x, list[Tensor]()
    for sigma, end in pairwise(sigmas):
        h, middle = end - sigma, (sigma + end) / 2
        slopes.append(slope(state, sigma))
        if len(slopes) < 4:
            second = slope(state + h / 2 * slopes[-1], middle)
            third = slope(state + h / 2 * second, middle)
            fourth = slope(state + h * third, end)
            total = (slopes[-1] + 2 * second + 2 * third + fourth) / 6
        else:
            e1, e2, e3, e4 = slopes[:-5:-1]
            total = (55 * e1 - 59 * e2 + 37 * e3 - 9 * e4) / 24
        state = state + h * total
    near(samplers.sample(denoiser, x, sigmas, "plms"), state)


@pytest.mark.parametrize("solver_type", ["bh1", "bh2"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc_is_that_of_diffusers(
    order: int, solver_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose state is a variance preserving one, and whose order is lower towards the end unless it
    is told not to."""
    diffusers = pytest.importorskip("diffusers")
    x, sigmas = start(2, 6), schedules.karras_sigmas(9, 0.02, 15)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        scheduler = diffusers.UniPCMultistepScheduler(
            prediction_type="sample",
            solver_order=order,
            solver_type=solver_type,
            lower_order_final=False,
            final_sigmas_type="zero",
        )
        scheduler.set_timesteps(9)
        scheduler.sigmas = sigmas
        state = x * vp(15)[0]
        for i, t in enumerate(scheduler.timesteps):
            sigma = float(sigmas[i])
            x0 = denoiser(state / vp(sigma)[0], torch.full((2,), sigma, dtype=torch.float64))
            if i == 8:
                # At sigma = 0 only the first order has a limit.
                break
            state = scheduler.step(x0, t, state).prev_sample
    finally:
        torch.set_default_dtype(before)
    found = samplers.sample(denoiser, x, sigmas, "unipc", order=order, solver_type=solver_type)
    near(found, x0)


WEIGHTS = torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64)
MEANS = torch.tensor([-0.3, 0.1, 0.4], dtype=torch.float64)
VARIANCES = torch.tensor([0.1, 0.08, 0.1], dtype=torch.float64) ** 2


def of_mixture(x: Tensor, sigma: Tensor) -> Tensor:
    """The mean of x0 given x, where x0 is of a mixture of three Gaussians."""
    variances = VARIANCES + sigma[:, None] ** 2
    off = x - MEANS
    share = (WEIGHTS.log() - variances.log() / 2 - off**2 / (2 * variances)).softmax(1)
    return (share * (MEANS + VARIANCES / variances * off)).sum(1, keepdim=True)


def along(x: Tensor, method: str, n: int, **options: Any) -> Tensor:
    sigmas = schedules.karras_sigmas(n + 1, 0.05, 10, final=None)
    return samplers.sample(of_mixture, x, sigmas, method, **options)


@pytest.fixture(scope="module")
def exact() -> tuple[Tensor, Tensor]:
    integrate = pytest.importorskip("scipy.integrate")
    x = 10 * torch.linspace(-1.6, 1.7, 9, dtype=torch.float64)[:, None]

    def slope(sigma: float, y: Any) -> Any:
        state = torch.from_numpy(y)[:, None]
        level = torch.full((len(y),), sigma, dtype=torch.float64)
        return ((state - of_mixture(state, level)) / sigma).flatten().numpy()

    found = integrate.solve_ivp(
        slope, (10, 0.05), x.flatten().numpy(), method="DOP853", rtol=1e-12, atol=1e-13
    )
    return x, torch.from_numpy(found.y[:, -1])[:, None]


def orders(exact: tuple[Tensor, Tensor], method: str, *steps: int, **options: Any) -> list[float]:
    x, right = exact
    errors = [float((along(x, method, n, **options) - right).norm()) for n in steps]
    return [math.log2(a / b) for a, b in pairwise(errors)]


@pytest.mark.parametrize(
    ("method", "order"),
    [
        ("euler", 1),
        ("ddim", 1),
        ("heun", 2),
        ("dpm_2", 2),
        ("dpmpp_2s", 2),
        ("dpmpp_2m", 2),
        ("plms", 2),
        ("midpoint", 2),
    ],
)
def test_order(method: str, order: float, exact: tuple[Tensor, Tensor]) -> None:
    assert orders(exact, method, 80, 160, 320) == pytest.approx([order] * 2, abs=0.15)


@pytest.mark.parametrize(
    ("method", "least", "options"),
    [
        ("lms", 3.3, {"order": 4}),
        ("rk4", 3.8, {}),
        ("unipc", 2.7, {"order": 2}),
        ("dpmpp_3m", 1.9, {}),
    ],
)
def test_order_is_at_least(
    method: str, least: float, options: dict[str, Any], exact: tuple[Tensor, Tensor]
) -> None:
    """Multistep methods begin with steps of lower order, whose errors lead at last: 2 remains of
    them. A mixture as narrow as this one has little of that at its beginning."""
    assert min(orders(exact, method, 80, 160, 320, **options)) >= least


@pytest.mark.parametrize(
    ("method", "order"), [("euler", 1), ("midpoint", 2), ("heun", 2), ("rk4", 4)]
)
def test_order_on_a_rectified_flow(method: str, order: float) -> None:
    """To t = 0 itself, by a velocity whose flow is known: atan(x) - (t + t^2) / 2 is constant."""

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return (1 + x**2) * (0.5 + t[:, None])

    x = torch.linspace(-0.4, 2, 5, dtype=torch.float64)[:, None]
    right = (x.atan() - 1).tan()
    errors = [
        samplers.sample(velocity, x, schedules.flow_sigmas(n), method, prediction="velocity")
        - right
        for n in (80, 160, 320)
    ]
    found = [math.log2(a.norm() / b.norm()) for a, b in pairwise(errors)]
    assert found == pytest.approx([order] * 2, abs=0.15)


def of_gaussian(mean: float, variance: float) -> Callable[[Tensor, Tensor], Tensor]:
    def model(x: Tensor, sigma: Tensor) -> Tensor:
        return mean + variance / (variance + shaped(sigma, x) ** 2) * (x - mean)

    return model


def law(
    method: str, sigmas: Tensor, mean: float, variance: float, **options: Any
) -> tuple[float, float]:
    """Mean and variance of what a run ends in on Gaussian data, exactly: the result is affine in
    the state and the noises, whose weights are found one a sample."""
    draws = 2 * len(sigmas)
    rows = iter(range(2, 2 + draws))

    def noise_sampler(sigma: float, next_sigma: float) -> Tensor:
        drawn = torch.zeros(2 + draws, 1, dtype=torch.float64)
        drawn[next(rows)] = 1
        return drawn

    x = torch.zeros(2 + draws, 1, dtype=torch.float64)
    x[1] = 1
    model = of_gaussian(mean, variance)
    out = samplers.sample(model, x, sigmas, method, noise_sampler=noise_sampler, **options)
    gains = (out[1:] - out[0])[:, 0]
    assert next(rows) > 2
    spread = gains[0] ** 2 * (variance + sigmas[0] ** 2) + (gains[1:] ** 2).sum()
    return float(out[0, 0] + gains[0] * mean), float(spread)


@pytest.mark.parametrize(
    ("method", "options", "order"),
    [
        ("euler_ancestral", {}, 1),
        ("ddim", {"eta": 0.5}, 1),
        ("ddpm", {}, 1),
        ("dpm_2_ancestral", {}, 2),
        ("dpmpp_2s_ancestral", {}, 2),
        ("dpmpp_sde", {}, 2),
        ("dpmpp_2m_sde", {}, 2),
        ("dpmpp_3m_sde", {}, 2),
        ("heun", {"s_churn": 20.0}, 2),
        ("dpm_2", {"s_churn": 20.0}, 2),
    ],
    ids=str,
)
def test_stochastic_runs_approach_the_data_s_law(
    method: str, options: dict[str, Any], order: int
) -> None:
    errors = []
    for n in (100, 200):
        sigmas = schedules.karras_sigmas(n, 0.01, 40)
        mean, variance = law(method, sigmas, 1.5, 0.6, **options)
        assert mean == pytest.approx(1.5, abs=1e-4)
        errors.append(abs(variance / 0.6 - 1))
    assert errors[1] <= (0.05 if order == 1 else 0.003)
    assert math.log2(errors[0] / errors[1]) >= order - 0.3


@pytest.mark.parametrize("method", ["euler_ancestral", "ddpm", "dpmpp_sde", "dpmpp_2m_sde"])
def test_counter_noise_gives_that_law(method: str) -> None:
    """Mean and covariance of correlated data within five standard errors, from one seed: noise of
    different draws, samples and elements is independent and standard."""
    count, mean, angle = 20000, 1.5, 0.6
    turn = torch.tensor(
        [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]],
        dtype=torch.float64,
    )
    variances = torch.tensor([0.3, 2.0], dtype=torch.float64)

    def model(x: Tensor, sigma: Tensor) -> Tensor:
        keep = variances / (variances + sigma[:, None].double() ** 2)
        return mean + ((x.double() - mean) @ turn * keep) @ turn.T

    sigmas = schedules.karras_sigmas(12, 0.01, 40)
    begin = samplers.noise((count, 2), 7).double() * (variances + 40**2).sqrt() @ turn.T + mean
    out = samplers.sample(model, begin.float(), sigmas, method, seeds=7).double()
    laws = [law(method, sigmas, mean, float(v)) for v in variances]
    expected = turn @ torch.diag(torch.tensor([v for _, v in laws]).double()) @ turn.T
    spread = expected.diagonal()
    off = (out.mean(0) - mean).abs() / (spread / count).sqrt()
    assert float(off.max()) < 5
    errors = ((spread[:, None] * spread + expected**2) / count).sqrt()
    assert float(((out.T.cov() - expected).abs() / errors).max()) < 5


@pytest.mark.parametrize(
    ("method", "options", "same", "others"),
    [
        ("euler_ancestral", {"eta": 0.0}, "euler", {}),
        ("ddim", {}, "euler", {}),
        ("dpm_2_ancestral", {"eta": 0.0}, "dpm_2", {}),
        ("dpmpp_2s_ancestral", {"eta": 0.0}, "dpmpp_2s", {}),
        ("dpmpp_sde", {"eta": 0.0}, "dpmpp_2s", {}),
        ("dpmpp_2m_sde", {"eta": 0.0}, "dpmpp_2m", {}),
        ("dpmpp_3m_sde", {"eta": 0.0}, "dpmpp_3m", {}),
        ("unipc", {"corrector": False, "solver_type": "bh2"}, "dpmpp_2m", {}),
        ("runge_kutta", {"tableau": "midpoint"}, "midpoint", {}),
        ("runge_kutta", {"tableau": "heun2"}, "heun", {}),
    ],
)
def test_without_noise_it_is_the_ode_s_method(
    method: str, options: dict[str, Any], same: str, others: dict[str, Any]
) -> None:
    def none(sigma: float, next_sigma: float) -> Tensor:
        raise AssertionError("noise was drawn")

    x, sigmas = start(2, 5), schedules.karras_sigmas(7, 0.05, 15, final=None)
    found = samplers.sample(denoiser, x, sigmas, method, noise_sampler=none, **options)
    near(found, samplers.sample(denoiser, x, sigmas, same, **others))


@pytest.mark.parametrize("name", METHODS)
def test_the_last_step_takes_the_limit(name: str) -> None:
    """A run of one step is the denoiser, but for methods whose stages lie within the step."""
    x, level = start(2, 5), torch.full((2,), 15.0, dtype=torch.float64)
    found = samplers.sample(denoiser, x, [15.0, 0.0], name, noise_sampler=Noise(x.shape))
    if name in ("midpoint", "rk4", "runge_kutta"):
        assert bool(found.isfinite().all())
    else:
        # x is 50 times as large, and some subtract it.
        near(found, denoiser(x, level), 1e-13)
    for n in (2, 3, 6):
        sigmas = schedules.karras_sigmas(n, 0.01, 15)
        found = samplers.sample(denoiser, x, sigmas, name, noise_sampler=Noise(x.shape))
        assert bool(found.isfinite().all())


@pytest.mark.parametrize("name", METHODS)
def test_each_sample_may_have_its_schedule(name: str) -> None:
    both = torch.stack(
        [schedules.karras_sigmas(6, 0.01, 15), schedules.exponential_sigmas(6, 0.05, 9)], 1
    )
    x = start(2, 5)

    def noise(row: slice) -> Callable[[Any, Any], Tensor]:
        generator = torch.Generator().manual_seed(5)
        return lambda *_: torch.randn(2, 5, generator=generator, dtype=torch.float64)[row]

    options = {"s_churn": 2.0} if name in ("euler", "heun", "dpm_2") else {}
    found = samplers.sample(denoiser, x, both, name, noise_sampler=noise(slice(2)), **options)
    for b in range(2):
        alone = samplers.sample(
            denoiser,
            x[b : b + 1],
            both[:, b],
            name,
            noise_sampler=noise(slice(b, b + 1)),
            **options,
        )
        near(found[b : b + 1], alone, 1e-12)


def predicting(prediction: str, model: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The denoiser as a model of something else."""

    def other(x: Tensor, sigma: Tensor) -> Tensor:
        x0, s = model(x, sigma), shaped(sigma, x)
        if prediction == "epsilon":
            return (x - x0) / s
        if prediction == "score":
            return (x0 - x) / s**2
        if prediction == "v":
            alpha = 1 / (1 + s**2).sqrt()
            return alpha * (x - x0) / s - s * alpha * x0
        skip = 0.25 / (s**2 + 0.25)
        return (x0 - skip * x) / (s * 0.5 / (s**2 + 0.25).sqrt())

    return other


@pytest.mark.parametrize("name", METHODS)
def test_predictions_and_guidance_change_nothing(name: str) -> None:
    """What the model predicts, and its two halves, are folded into the step's weights; no method
    then reads more tensors than a kernel does."""
    x, sigmas = start(2, 5), schedules.karras_sigmas(6, 0.05, 15)

    def run(model: Callable[..., Any], **settings: Any) -> Tensor:
        noise = Noise(x.shape)
        return samplers.sample(model, x, sigmas, name, noise_sampler=noise, **settings)

    right = run(lambda x, sigma: denoiser(x, sigma, 0.4 - 3 * 0.2))
    for prediction in ("epsilon", "score", "v", "F"):
        cond, uncond = (
            predicting(prediction, lambda x, sigma, c=c: denoiser(x, sigma, c)) for c in (-0.2, 0.0)
        )
        near(run(predicting(prediction, denoiser), prediction=prediction), run(denoiser))
        guided = run(
            lambda x, sigma, u=uncond, c=cond: (u(x, sigma), c(x, sigma)),
            prediction=prediction,
            guidance_scale=1.0,
        )
        near(guided, run(lambda x, sigma: denoiser(x, sigma, -0.2)))
    halves = run(
        lambda x, sigma: (denoiser(x, sigma, 0.4), denoiser(x, sigma, 0.2)), guidance_scale=3.0
    )
    near(halves, run(lambda x, sigma: denoiser(x, sigma, 0.4 + 3 * (0.2 - 0.4))))
    assert bool(right.isfinite().all())


class Written(TorchDispatchMode):
    """How many tensors the steps of a run write."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.name().startswith("fastzoo::ode_step"):
            self.count += sum(t.numel() > 0 for t in out)
        return out


@pytest.mark.parametrize(
    ("name", "settings", "kept"),
    [
        ("euler", {"guidance_scale": 2.0}, 0),
        ("euler_ancestral", {"guidance_scale": 2.0}, 0),
        # Each step's denoised but the last two's: there are no derivatives at the end.
        ("dpmpp_2m", {"prediction": "epsilon"}, 3),
        ("dpmpp_2m", {}, 0),
        ("lms", {}, 4),
    ],
)
def test_a_step_writes_what_a_later_one_reads(
    name: str, settings: dict[str, Any], kept: int
) -> None:
    def model(x: Tensor, sigma: Tensor) -> Any:
        return (x, x / 2) if "guidance_scale" in settings else x

    with Written() as written:
        samplers.sample(model, start(2, 5), schedules.karras_sigmas(5), name, **settings)
    # A last step that is the model's answer itself needs no kernel.
    answer = name == "dpmpp_2m" and not settings
    assert written.count == 5 - answer + kept


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("lms", {"order": 5}, "order: expected 1 to 4"),
        ("unipc", {"order": 0}, "order: expected 1 to 4"),
        ("dpmpp_2m_sde", {"solver_type": "bh1"}, "solver_type: expected one of"),
        ("dpmpp_2m", {"solver_type": "bh1"}, "solver_type: expected one of"),
        ("unipc", {"solver_type": "midpoint"}, "solver_type: expected one of"),
        ("runge_kutta", {"tableau": "rk5"}, "tableau: expected one of"),
    ],
)
def test_errors_name_the_option(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        samplers.Sampler([2.0, 1.0], name, **options)


@pytest.mark.parametrize(
    ("name", "options"), [*((name, {}) for name in STOCHASTIC), ("heun", {"s_churn": 1.0})]
)
def test_noise_is_not_for_flows(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="draws no noise"):
        samplers.Sampler([1.0, 0.5, 0.0], name, prediction="velocity", **options)


def test_lagrange_weights_are_exact() -> None:
    """Against the integrals of the polynomials' coefficients."""
    from fastzoo.samplers.methods import _lagrange_integrals

    nodes = [3.0, 3.7, 4.9, 6.0]
    for j, weight in enumerate(_lagrange_integrals(nodes, 3.0, 2.5)):
        roots = nodes[:j] + nodes[j + 1 :]
        line = numpy.poly1d(roots, r=True) / numpy.prod([nodes[j] - r for r in roots])
        whole = line.integ()
        assert weight == pytest.approx(whole(2.5) - whole(3.0), rel=1e-12)
