"""The sampling loop: what it computes, how often, and that a sample depends on its seed alone."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastzoo import ops, samplers
from fastzoo.samplers import formulas, plan
from fastzoo.samplers.algebra import Program, stacked, tensor
from fastzoo.samplers.algebra import noise as drawn
from fastzoo.testing.coupling import values
from tests.conftest import DEVICE

SIGMAS = [10.0, 5.0, 2.0, 1.0, 0.3, 0.0]


def denoiser(x: Tensor, sigma: Tensor, **_: Any) -> Tensor:
    """Of data N(0.3, 1), nearly; it depends on x and on sigma."""
    variance = sigma.view(-1, *(1,) * (x.dim() - 1)) ** 2
    return (x + 0.3 * variance) / (1 + variance) + 0.05 * torch.sin(x)


class Calls(TorchDispatchMode):
    """The operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))

    @property
    def steps(self) -> int:
        return sum(name.startswith("fastzoo.ode_step") for name in self.names)


def latents(batch: int = 3) -> Tensor:
    return SIGMAS[0] * samplers.noise((batch, 2, 5), 7, device=DEVICE)


@pytest.mark.parametrize(
    ("method", "options", "kernels"),
    [
        # One for each call of the model but the first; the last ends at sigma 0, which is its
        # answer. Churn is in the kernel of the step before, but for the first.
        ("euler", {}, 4),
        ("dpmpp_2m", {}, 4),
        ("heun", {}, 8),
        ("heun", {"s_churn": 2.0}, 9),
        ("euler_ancestral", {}, 4),
    ],
)
def test_a_model_call_costs_one_kernel(method: str, options: dict[str, Any], kernels: int) -> None:
    sampler = samplers.Sampler(SIGMAS, method, **options)
    x = latents()
    sampler(lambda x, sigma: x * 0.5, x, seeds=1)
    keys = ops.counter_keys(1, 3, DEVICE)
    with Calls() as calls:
        sampler(lambda x, sigma: x, x, seeds=keys)
    assert calls.steps == kernels
    # And nothing else but views, and the choice of a sigma's row.
    others = {n for n in calls.names if not n.startswith("fastzoo.")}
    assert others <= {
        "aten.select.int",
        "aten.unbind.int",
        "aten.empty.memory_format",
        "aten.new_empty.default",
        "aten.view.default",
        "aten.detach.default",
    }, others


def test_nothing_waits_for_the_device() -> None:
    """A loop reads no tensor on the host once its tables are there."""
    sampler = samplers.Sampler(SIGMAS, "heun", s_churn=2.0)
    keys = ops.counter_keys(1, 3, DEVICE)
    sampler(denoiser, latents(), seeds=keys)
    with Calls() as calls:
        sampler(denoiser, latents(), seeds=keys)
    waits = ("_local_scalar_dense", "_to_copy", "copy_", "nonzero", "equal")
    assert not [name for name in calls.names if any(wait in name for wait in waits)]


def predictions() -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """The same model, saying it in other words."""

    def at(sigma: Tensor) -> Tensor:
        return sigma[:, None, None]

    def scale(sigma: Tensor) -> Tensor:
        return 1 / torch.sqrt(1 + at(sigma) ** 2)

    def of_f(x: Tensor, sigma: Tensor) -> Tensor:
        total = at(sigma) ** 2 + 0.25
        skipped = 0.25 / total * x
        return (denoiser(x, sigma) - skipped) / (at(sigma) * 0.5 / torch.sqrt(total))

    return {
        "denoised": denoiser,
        "epsilon": lambda x, sigma: (x - denoiser(x, sigma)) / at(sigma),
        "score": lambda x, sigma: (denoiser(x, sigma) - x) / at(sigma) ** 2,
        "v": lambda x, sigma: (
            (x / (1 + at(sigma) ** 2) - denoiser(x, sigma)) / (at(sigma) * scale(sigma))
        ),
        "F": of_f,
    }


@pytest.mark.parametrize("prediction", predictions())
@pytest.mark.parametrize("method", ["heun", "dpmpp_2m", "euler_ancestral"])
def test_every_prediction_gives_the_same_sample(method: str, prediction: str) -> None:
    x = latents().double()
    expected = samplers.sample(denoiser, x, SIGMAS, method, seeds=3)
    model = predictions()[prediction]
    found = samplers.sample(model, x, SIGMAS, method, seeds=3, prediction=prediction)
    assert (found - expected).abs().max() < 1e-10


def test_a_velocity_is_that_of_a_straight_path() -> None:
    """Euler along ``x + (t' - t) v``, as rectified flows are sampled."""
    times = [1.0, 0.7, 0.4, 0.1, 0.0]

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return torch.sin(x) - t[:, None, None]

    x = samplers.noise((3, 2, 5), 1, dtype=torch.float64)
    expected = x
    for t, after in itertools.pairwise(times):
        expected = expected + (after - t) * velocity(expected, torch.full((3,), t, dtype=x.dtype))
    found = samplers.sample(velocity, x, times, "euler", prediction="velocity")
    assert (found - expected).abs().max() < 1e-12


@pytest.mark.parametrize("method", ["heun", "dpmpp_2m", "euler_ancestral"])
def test_guidance_is_in_the_kernel(method: str) -> None:
    scale, rescale = 3.0, 0.6

    def pair(x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return denoiser(x, sigma), denoiser(1.1 * x, sigma)

    def guided(x: Tensor, sigma: Tensor) -> Tensor:
        """As diffusers' rescale_noise_cfg has it; data predictions are rescaled as any other."""
        uncond, cond = pair(x, sigma)
        total = uncond + scale * (cond - uncond)
        ratio = cond.std((1, 2), keepdim=True) / total.std((1, 2), keepdim=True)
        return rescale * ratio * total + (1 - rescale) * total

    x = latents().double()
    expected = samplers.sample(guided, x, SIGMAS, method, seeds=3)
    settings = {"guidance_scale": scale, "guidance_rescale": rescale}
    for model in (pair, lambda x, sigma: torch.cat(pair(x, sigma))):
        found = samplers.sample(model, x, SIGMAS, method, seeds=3, **settings)
        assert (found - expected).abs().max() < 1e-10
    each = torch.tensor([scale, 1.0, 5.0])
    found = samplers.sample(pair, x, SIGMAS, method, seeds=3, **settings | {"guidance_scale": each})
    assert (found[0] - expected[0]).abs().max() < 1e-10
    assert (found[1] - expected[1]).abs().max() > 1e-3


@pytest.mark.parametrize("method", ["heun", "dpmpp_2m", "euler_ancestral"])
def test_a_sample_depends_on_its_seed_alone(method: str) -> None:
    """Not on the batch it is in, on its place there, or on what the others are."""
    options = {"s_churn": 2.0} if method == "heun" else {}
    seeds = [5, 2, 9]

    def run(which: list[int]) -> Tensor:
        x = SIGMAS[0] * samplers.noise((len(which), 2, 5), which, device=DEVICE)
        return samplers.sample(denoiser, x, SIGMAS, method, seeds=which, **options)

    whole = run(seeds)
    assert torch.equal(run([2]), whole[1:2])
    assert torch.equal(run([9, 5]), whole[[2, 0]])
    assert not torch.equal(run([3]), whole[1:2])


def test_a_schedule_of_each_sample() -> None:
    scales = [1.0, 0.5, 2.0]
    sigmas = torch.tensor(SIGMAS)[:, None] * torch.tensor(scales)
    x = latents()
    found = samplers.sample(denoiser, x, sigmas, "dpmpp_2m")
    for b, factor in enumerate(scales):
        own = [sigma * factor for sigma in SIGMAS]
        alone = samplers.sample(denoiser, x[b : b + 1], own, "dpmpp_2m")
        assert (found[b : b + 1] - alone).abs().max() < 1e-5


def test_the_callback_sees_what_k_diffusions_does() -> None:
    seen: list[dict[str, Any]] = []
    x = latents()
    found = samplers.sample(denoiser, x, SIGMAS, "heun", None, seen.append, s_churn=2.0, seeds=1)
    assert torch.equal(found, samplers.sample(denoiser, x, SIGMAS, "heun", s_churn=2.0, seeds=1))
    assert [entry["i"] for entry in seen] == [0, 1, 2, 3, 4]
    assert [entry["sigma"] for entry in seen] == SIGMAS[:-1]
    assert all(entry["sigma_hat"] > entry["sigma"] for entry in seen)
    up = (seen[0]["sigma_hat"] ** 2 - SIGMAS[0] ** 2) ** 0.5
    churned = x + up * samplers.noise(x.shape, 1, device=DEVICE, draw=1)
    assert (seen[0]["x"] - churned).abs().max() < 1e-5
    assert torch.equal(seen[-1]["denoised"], found)


def test_noise_is_drawn_as_it_is_asked_for() -> None:
    x = latents()
    asked: list[tuple[float, float]] = []

    def sampler(sigma: float, next_sigma: float) -> Tensor:
        asked.append((sigma, next_sigma))
        return values(3, 2, 5, seed=len(asked)).to(DEVICE)

    own = samplers.sample(denoiser, x, SIGMAS, "euler_ancestral", noise_sampler=sampler)
    assert asked == list(itertools.pairwise(SIGMAS[:-1]))
    expected = x
    for step, (sigma, after) in enumerate(itertools.pairwise(SIGMAS), 1):
        down, up = formulas.ancestral(sigma, after)
        denoised = denoiser(expected, torch.full((3,), sigma, device=DEVICE))
        expected = formulas.euler(expected, denoised, sigma, down)
        if after > 0:
            expected = expected + up * values(3, 2, 5, seed=step).to(DEVICE)
    assert (own - expected).abs().max() < 1e-5
    draws = [
        samplers.sample(
            denoiser,
            x,
            SIGMAS,
            "euler_ancestral",
            generator=torch.Generator(DEVICE).manual_seed(seed),
        )
        for seed in (1, 1, 2)
    ]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_a_state_in_half_precision_is_computed_in_float32() -> None:
    x = latents()
    wide = samplers.sample(denoiser, x, SIGMAS, "dpmpp_2m")
    for dtype, digits in ((torch.float16, 2**-9), (torch.bfloat16, 2**-6)):
        found = samplers.sample(denoiser, x.to(dtype), SIGMAS, "dpmpp_2m")
        assert found.dtype == dtype
        assert (found.float() - wide).abs().max() < 10 * digits
    # A model in low precision beside a state in float32.
    low = samplers.sample(lambda x, s: denoiser(x, s).bfloat16(), x, SIGMAS, "dpmpp_2m")
    assert low.dtype == torch.float32


def test_rounding_by_chance_keeps_the_mean_of_a_low_precision_run() -> None:
    """200 small steps in bfloat16, of many copies of one sample."""
    sigmas = samplers.schedules.exponential_sigmas(200, 0.5, 1.0, final=None)
    x = torch.full((1, 1, 4096), 1.0, device=DEVICE)
    wide = samplers.sample(denoiser, x, sigmas, "euler")
    low = x.bfloat16()
    nearest = samplers.sample(denoiser, low, sigmas, "euler").float()
    chance = samplers.sample(denoiser, low, sigmas, "euler", seeds=1, stochastic_rounding=True)
    assert chance.dtype == torch.bfloat16
    errors = (abs(value.float().mean() - wide.mean()) for value in (nearest, chance))
    assert next(errors) > 20 * next(errors)
    with pytest.raises(ValueError, match="seeds"):
        samplers.sample(denoiser, low, sigmas, "euler", stochastic_rounding=True)


def test_a_sampler_made_in_inference_mode_has_gradients_afterwards() -> None:
    sampler, x = samplers.Sampler(SIGMAS, "dpmpp_2m"), latents()
    with torch.inference_mode():
        first = sampler(denoiser, x)
    x.requires_grad_()
    found = sampler(denoiser, x, differentiable=True)
    assert torch.equal(first, found)
    assert torch.autograd.grad(found.sum(), x)[0].abs().sum() > 0


def test_gradients_go_through_a_run_when_asked() -> None:
    x = latents().double().requires_grad_()
    assert not samplers.sample(denoiser, x, SIGMAS, "heun").requires_grad
    found = samplers.sample(denoiser, x, SIGMAS, "heun", differentiable=True)
    (gradient,) = torch.autograd.grad(found.sum(), x)
    direction, h = values(3, 2, 5, seed=4).double().to(DEVICE), 1e-5
    with torch.no_grad():
        ahead, behind = (
            samplers.sample(denoiser, x + sign * h * direction, SIGMAS, "heun").sum()
            for sign in (1, -1)
        )
    assert abs((ahead - behind) / (2 * h) - (gradient * direction).sum()) < 1e-6


def test_one_step_is_captured_once_and_finds_its_row() -> None:
    """What a CUDA graph of one step does: the same call again, with a counter on the device."""
    x, model = tensor("x"), tensor("model")
    programs = []
    for step, (sigma, after) in enumerate(itertools.pairwise(SIGMAS[:-1])):
        down, up = formulas.ancestral(sigma, after)
        row = formulas.euler(x, model, sigma, down) + up * drawn(1 + 2 * step)
        programs.append(Program({"next": row}, "x"))
    table = stacked(programs).to(DEVICE)
    counter = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    keys, state = ops.counter_keys(1, 3, DEVICE), latents()
    for sigma in SIGMAS[:-2]:
        found = denoiser(state, torch.full((3,), sigma, device=DEVICE))
        state = programs[0]({"x": state, "model": found}, table, step=counter, seeds=keys)
        counter += 1
    expected = samplers.sample(denoiser, latents(), SIGMAS[:-1], "euler_ancestral", seeds=keys)
    assert torch.equal(state, expected)


def test_a_kept_row_may_be_the_result() -> None:
    """The last one, or one that another is made of."""
    for wanted, kernels in ((1, 1), (0, 1)):

        def kept(x: Any, step: Any, wanted: int = wanted) -> Any:
            x, denoised = yield x, step.sigma
            first = step.keep(0.5 * x + 0.5 * denoised)
            return (first, step.keep(2.0 * first))[wanted]

        plan.METHODS["kept"] = kept
        try:
            sampler = samplers.Sampler([1.0, 0.5], "kept")
        finally:
            del plan.METHODS["kept"]
        x = latents()
        with Calls() as calls:
            found = sampler(lambda x, sigma: 3 * x, x, seeds=1)
        assert torch.allclose(found, (2 * x, 4 * x)[wanted])
        assert calls.steps == kernels


def test_one_step_is_enough() -> None:
    x = latents()
    found = samplers.sample(denoiser, x, [10.0, 0.0], "dpmpp_2m")
    assert torch.equal(found, denoiser(x, torch.full((3,), 10.0, device=DEVICE)))


@pytest.mark.parametrize(
    ("arguments", "named", "error"),
    [
        ({"method": "eulre"}, "method", ValueError),
        ({"method": "heun", "eta": 1.0}, "eta", TypeError),
        ({"sigmas": [1.0]}, "sigmas", ValueError),
        ({"sigmas": [1.0, 2.0]}, "sigmas", ValueError),
        ({"sigmas": [1.0, 0.0, 0.0]}, "sigmas", ValueError),
        ({"sigmas": [float("nan"), 0.0]}, "sigmas", ValueError),
        ({"sigmas": torch.ones(2, 5) * torch.tensor([[2.0], [1.0]])}, "sigmas", ValueError),
        ({"prediction": "noise"}, "prediction", ValueError),
        ({"guidance_rescale": 0.5}, "guidance_rescale", ValueError),
        ({"guidance_scale": 2.0}, "model", ValueError),
        ({"guidance_scale": [1.0, 2.0]}, "guidance_scale", ValueError),
        ({"seeds": 1, "generator": torch.Generator()}, "seeds", ValueError),
        ({"seeds": [1, 2]}, "seeds", ValueError),
        ({"x": [1.0]}, "x", TypeError),
        ({"x": torch.ones(3, dtype=torch.int64)}, "x", ValueError),
        ({"model": lambda x, sigma: x[:1]}, "model", ValueError),
        ({"model": lambda x, sigma: 1.0}, "model", TypeError),
    ],
)
def test_a_wrong_argument_is_named(
    arguments: dict[str, Any], named: str, error: type[Exception]
) -> None:
    given = {"model": denoiser, "x": latents(), "sigmas": SIGMAS, **arguments}
    with pytest.raises(error, match=named):
        samplers.sample(**given)


def test_a_coefficient_that_is_no_number_is_refused() -> None:
    with pytest.raises(ValueError, match="coefficient of model"):
        Program({"next": tensor("x") + tensor("model") * float("inf")}, "x")
    names = [tensor(f"t{k}") for k in range(9)]
    with pytest.raises(ValueError, match="8 tensors"):
        Program({"next": sum(names[1:], names[0])}, "t0")
    with pytest.raises(ValueError, match="one noise"):
        Program({"next": drawn(1) + drawn(2)}, "x")
    with pytest.raises(ValueError, match="name of a tensor"):
        Program({"x": 2.0 * tensor("x")}, "x")
    with pytest.raises(ValueError, match="zero terminal"):
        formulas.denoised("epsilon", tensor("x"), tensor("model"), 0.0, 1.0)
    zero_snr = formulas.denoised("v", tensor("x"), tensor("model"), 0.0, 1.0)
    assert zero_snr.terms == {"model": -1.0}
