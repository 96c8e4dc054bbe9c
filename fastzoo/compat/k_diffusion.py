"""k-diffusion's samplers and schedules (0.1.1) on :func:`fastzoo.samplers.sample`: one kernel a
model call in the place of a dozen.

Names, arguments and results are theirs::

    from fastzoo.compat import k_diffusion as K

    sigmas = K.get_sigmas_karras(20, 0.03, 15.0, device=x.device)
    x = K.sample_dpmpp_2m(denoiser, x, sigmas)

Differences:

- A step's coefficients are computed in float64 from the sigmas, which may be float32 as theirs.
- Noise that is not given by ``noise_sampler`` is drawn by ``torch.randn`` from torch's global
  generator, for the SDE samplers too, whose default is a Brownian tree of torchsde; a
  ``BrownianTreeNoiseSampler`` is taken as any other. Theirs without an option for noise draw it
  where it is not used, and move the generator on.
- :func:`sample_dpmpp_sde` asks for the noise of the two parts of a step, not of its first part and
  the whole: the same thing for a Brownian motion, and of order 2 for independent noise too.
- ``sample_dpm_fast`` and ``sample_dpm_adaptive`` are not here.
- :func:`sample_dpm_2_ancestral` adds a step's noise where eta is so large that there is nothing
  else left of it.
"""

import math
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastzoo import samplers
from fastzoo.samplers import schedules

__all__ = [
    "get_sigmas_exponential",
    "get_sigmas_karras",
    "get_sigmas_polyexponential",
    "get_sigmas_vp",
    "sample_dpm_2",
    "sample_dpm_2_ancestral",
    "sample_dpmpp_2m",
    "sample_dpmpp_2m_sde",
    "sample_dpmpp_2s_ancestral",
    "sample_dpmpp_3m_sde",
    "sample_dpmpp_sde",
    "sample_euler",
    "sample_euler_ancestral",
    "sample_heun",
    "sample_lms",
]

Model = Callable[..., Tensor]
Callback = Callable[[dict[str, Any]], Any]
NoiseSampler = Callable[[Any, Any], Tensor]


def get_sigmas_karras(
    n: int,
    sigma_min: float,
    sigma_max: float,
    rho: float = 7.0,
    device: torch.device | str = "cpu",
) -> Tensor:
    return _on(device, schedules.karras_sigmas(n, sigma_min, sigma_max, rho))


def get_sigmas_exponential(
    n: int, sigma_min: float, sigma_max: float, device: torch.device | str = "cpu"
) -> Tensor:
    return _on(device, schedules.exponential_sigmas(n, sigma_min, sigma_max))


def get_sigmas_polyexponential(
    n: int,
    sigma_min: float,
    sigma_max: float,
    rho: float = 1.0,
    device: torch.device | str = "cpu",
) -> Tensor:
    return _on(device, schedules.polyexponential_sigmas(n, sigma_min, sigma_max, rho))


def get_sigmas_vp(
    n: int,
    beta_d: float = 19.9,
    beta_min: float = 0.1,
    eps_s: float = 1e-3,
    device: torch.device | str = "cpu",
) -> Tensor:
    return _on(device, schedules.vp_sigmas(n, beta_d, beta_min, eps_s))


def sample_euler(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> Tensor:
    options: dict[str, Any] = {
        "s_churn": s_churn,
        "s_tmin": s_tmin,
        "s_tmax": s_tmax,
        "s_noise": s_noise,
    }
    return _run("euler", model, x, sigmas, extra_args, callback, disable, **options)


def sample_euler_ancestral(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:
    options: dict[str, Any] = {"eta": eta, "s_noise": s_noise, "noise_sampler": noise_sampler}
    return _run("euler_ancestral", model, x, sigmas, extra_args, callback, disable, **options)


def sample_heun(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> Tensor:
    options: dict[str, Any] = {
        "s_churn": s_churn,
        "s_tmin": s_tmin,
        "s_tmax": s_tmax,
        "s_noise": s_noise,
    }
    return _run("heun", model, x, sigmas, extra_args, callback, disable, **options)


def sample_dpm_2(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> Tensor:
    options: dict[str, Any] = {
        "s_churn": s_churn,
        "s_tmin": s_tmin,
        "s_tmax": s_tmax,
        "s_noise": s_noise,
    }
    return _run("dpm_2", model, x, sigmas, extra_args, callback, disable, **options)


def sample_dpm_2_ancestral(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:
    options: dict[str, Any] = {"eta": eta, "s_noise": s_noise, "noise_sampler": noise_sampler}
    return _run("dpm_2_ancestral", model, x, sigmas, extra_args, callback, disable, **options)


def sample_lms(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    order: int = 4,
) -> Tensor:
    return _run("lms", model, x, sigmas, extra_args, callback, disable, order=order)


def sample_dpmpp_2s_ancestral(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:
    options: dict[str, Any] = {"eta": eta, "s_noise": s_noise, "noise_sampler": noise_sampler}
    return _run("dpmpp_2s_ancestral", model, x, sigmas, extra_args, callback, disable, **options)


def sample_dpmpp_sde(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
    r: float = 1 / 2,
) -> Tensor:
    options: dict[str, Any] = {
        "eta": eta,
        "s_noise": s_noise,
        "noise_sampler": noise_sampler,
        "r": r,
    }
    return _run("dpmpp_sde", model, x, sigmas, extra_args, callback, disable, **options)


def sample_dpmpp_2m(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
) -> Tensor:
    return _run("dpmpp_2m", model, x, sigmas, extra_args, callback, disable)


def sample_dpmpp_2m_sde(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
    solver_type: str = "midpoint",
) -> Tensor:
    options: dict[str, Any] = {
        "eta": eta,
        "s_noise": s_noise,
        "noise_sampler": noise_sampler,
        "solver_type": solver_type,
    }
    return _run("dpmpp_2m_sde", model, x, sigmas, extra_args, callback, disable, **options)


def sample_dpmpp_3m_sde(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:
    options: dict[str, Any] = {"eta": eta, "s_noise": s_noise, "noise_sampler": noise_sampler}
    return _run("dpmpp_3m_sde", model, x, sigmas, extra_args, callback, disable, **options)


def _on(device: torch.device | str, sigmas: Tensor) -> Tensor:
    return sigmas.to(device, torch.get_default_dtype())


def _run(
    method: str,
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None,
    callback: Callback | None,
    disable: bool | None,
    noise_sampler: NoiseSampler | None = None,
    **options: Any,
) -> Tensor:
    # Levels are tensors there.
    def drawn(sigma: float, next_sigma: float) -> Tensor:
        assert noise_sampler is not None
        return noise_sampler(sigmas.new_tensor(sigma), sigmas.new_tensor(next_sigma))

    def report(info: dict[str, Any]) -> None:
        assert callback is not None
        levels = {name: sigmas.new_tensor(info[name]) for name in ("sigma", "sigma_hat")}
        callback({**info, **levels})

    return samplers.sample(
        model,
        x,
        sigmas,
        method,
        extra_args,
        None if callback is None else report,
        None if noise_sampler is None else drawn,
        # As tqdm takes it: None shows a bar where someone looks.
        progress=sys.stderr.isatty() if disable is None else not disable,
        **options,
    )
