"""Schedules beside k-diffusion's and diffusers', both run in float64, and their limits.

What differs is the order in which a few powers are taken: 1e-12 relative is a thousand roundings.
"""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fastzoo.samplers import schedules
from tests.samplers.peers import k_diffusion_sampling

theirs = k_diffusion_sampling()

NEAR = {"rtol": 1e-12, "atol": 1e-14}


@pytest.fixture
def in_float64(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Those who ask for float32 by name, or for nothing, get float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    monkeypatch.setattr(torch, "float32", torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("n", [1, 2, 37])
def test_levels_are_those_of_k_diffusion(n: int) -> None:
    pairs = [
        (schedules.karras_sigmas(n, 0.01, 50), theirs.get_sigmas_karras(n, 0.01, 50)),
        (schedules.karras_sigmas(n, 0.01, 50, 3), theirs.get_sigmas_karras(n, 0.01, 50, 3)),
        (schedules.exponential_sigmas(n, 0.1, 9), theirs.get_sigmas_exponential(n, 0.1, 9)),
        (
            schedules.polyexponential_sigmas(n, 0.1, 9, 1.7),
            theirs.get_sigmas_polyexponential(n, 0.1, 9, 1.7),
        ),
        (schedules.vp_sigmas(n), theirs.get_sigmas_vp(n)),
        (schedules.vp_sigmas(n, 12.0, 0.3, 0.02), theirs.get_sigmas_vp(n, 12.0, 0.3, 0.02)),
    ]
    for ours, right in pairs:
        assert ours.dtype == torch.float64
        assert ours.shape == (n + 1,)
        torch.testing.assert_close(ours, right, **NEAR)


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize(
    ("betas", "config"),
    [
        (schedules.linear_betas(50), {"beta_schedule": "linear"}),
        (
            schedules.scaled_linear_betas(50),
            {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        ),
        (schedules.cosine_betas(50), {"beta_schedule": "squaredcos_cap_v2"}),
    ],
    ids=["linear", "scaled_linear", "cosine"],
)
@pytest.mark.parametrize("zero", [False, True])
def test_betas_are_those_of_diffusers(betas: Tensor, config: dict[str, Any], zero: bool) -> None:
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDPMScheduler(50, rescale_betas_zero_snr=zero, **config)
    ours = schedules.rescale_zero_terminal_snr(betas) if zero else betas
    assert theirs.betas.dtype == torch.float64
    torch.testing.assert_close(ours, theirs.betas, **NEAR)
    torch.testing.assert_close(schedules.alphas_cumprod(ours), theirs.alphas_cumprod, **NEAR)


@pytest.mark.usefixtures("in_float64")
def test_flows_are_shifted_as_those_of_diffusers() -> None:
    flow = pytest.importorskip("diffusers").FlowMatchEulerDiscreteScheduler
    times = torch.linspace(1, 0.05, 20)
    moving = flow(use_dynamic_shifting=True)
    for tokens in (256, 1000, 4096):
        shift = schedules.token_shift(tokens)
        mu = 0.5 + (tokens - 256) * (1.15 - 0.5) / (4096 - 256)
        right = moving.time_shift(mu, 1.0, times)
        torch.testing.assert_close(schedules.flow_shift(times, shift), right, **NEAR)
    still = flow(1000, shift=3.0)
    times = torch.arange(1000, 0, -1) / 1000
    torch.testing.assert_close(schedules.flow_shift(times, 3.0), still.sigmas, rtol=1e-6, atol=0)


def test_ends_are_exact() -> None:
    for sigmas in (
        schedules.karras_sigmas(18, 0.002, 80),
        schedules.exponential_sigmas(18, 0.002, 80),
        schedules.polyexponential_sigmas(18, 0.002, 80, 2.0),
    ):
        assert sigmas[[0, -2, -1]].tolist() == [80, 0.002, 0]
        assert bool((sigmas.diff() < 0).all())
    assert schedules.karras_sigmas(1, 0.002, 80).tolist() == [80, 0]
    assert schedules.karras_sigmas(3, 1, 4, 1.0, final=None).tolist() == [4, 2.5, 1]
    assert schedules.flow_sigmas(4, 3.0)[[0, 2, 4]].tolist() == [1, 0.75, 0]
    assert schedules.resolution_shift(1024**2, 512**2) == 2


def test_zero_terminal_snr_leaves_no_signal() -> None:
    before = schedules.scaled_linear_betas(1000)
    betas = schedules.rescale_zero_terminal_snr(before.tolist())
    bar = schedules.alphas_cumprod(betas)
    assert betas[-1] == 1
    assert bar[-1] == 0
    torch.testing.assert_close(betas[0], before[0], **NEAR)
    assert schedules.noise_levels(bar)[-1] == math.inf
    alpha, sigma = schedules.alpha_sigma(bar)
    assert (alpha[-1], sigma[-1]) == (0, 1)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(alpha), **NEAR)
    torch.testing.assert_close((sigma / alpha)[:-1], schedules.noise_levels(bar)[:-1], **NEAR)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: schedules.karras_sigmas(0), "n: expected at least 1"),
        (lambda: schedules.karras_sigmas(2.5), "n: expected an int"),  # type: ignore[arg-type]
        (lambda: schedules.karras_sigmas(3, 0.0, 1.0), "sigma_min: expected a positive"),
        (lambda: schedules.karras_sigmas(3, 2.0, 1.0), "sigma_min: expected at most sigma_max"),
        (lambda: schedules.karras_sigmas(3, rho=0), "rho"),
        (lambda: schedules.karras_sigmas(3, final=1.0), "final"),
        (lambda: schedules.exponential_sigmas(3, 0.1, math.inf), "sigma_max"),
        (lambda: schedules.vp_sigmas(3, eps=0), "eps"),
        (lambda: schedules.linear_betas(3, -0.1), "start and end"),
        (lambda: schedules.alphas_cumprod([0.1, 1.5]), "betas: expected variances"),
        (lambda: schedules.alphas_cumprod(0.5), "betas: expected a tensor"),
        (lambda: schedules.rescale_zero_terminal_snr([0.0, 0.0]), "betas: expected at least two"),
        (lambda: schedules.noise_levels(torch.ones(2, 2)), r"alphas_cumprod: expected \[n\]"),
        (lambda: schedules.flow_shift([0.5, 2.0], 3.0), "t: expected times"),
        (lambda: schedules.flow_sigmas(3, shift=0), "shift"),
        (lambda: schedules.token_shift(9, 4, 4), "max_tokens"),
    ],
)
def test_errors_name_the_argument(call: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        call()
