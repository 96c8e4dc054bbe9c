"""Noise schedules: the noise levels of a run, and those at which a model was trained.

All are computed on the host in float64 and returned as float64 tensors on the CPU, where
:func:`fastzoo.samplers.sample` and the schedulers want them: in float32 the rounding of a schedule
is larger than that of the whole run. Levels descend, and the first and the last one above zero are
the ones asked for to the last bit.
"""

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy
import torch
from torch import Tensor

# A tensor on any device, an array, or numbers.
Levels: TypeAlias = Any

_COSINE_OFFSET = 0.008


def karras_sigmas(
    n: int,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    *,
    final: float | None = 0.0,
) -> Tensor:
    """The steps of EDM: equal steps of ``sigma^(1 / rho)``, and a last one to 0.

    Args:
        n: model calls of a method of order 1.
        sigma_min, sigma_max: the last and the first level.
        rho: how much shorter the steps are at low noise; 1 makes them equal.
        final: where the last step ends; None leaves it out.

    Returns:
        ``[n + 1]``, or ``[n]`` without ``final``.

    Source: Karras et al., Elucidating the design space of diffusion-based generative models (2022),
    eq. 5.
    """
    _check_range(n, sigma_min, sigma_max)
    _check_positive("rho", rho)
    ramp = numpy.linspace(0, 1, n)
    first, last = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return _between((first + ramp * (last - first)) ** rho, sigma_min, sigma_max, final)


def exponential_sigmas(
    n: int, sigma_min: float, sigma_max: float, *, final: float | None = 0.0
) -> Tensor:
    """Equal steps of ``log sigma``; the arguments of :func:`karras_sigmas`.

    Source: k-diffusion; the uniform steps of Lu et al., DPM-Solver (2022), section 3.4.
    """
    return polyexponential_sigmas(n, sigma_min, sigma_max, final=final)


def polyexponential_sigmas(
    n: int,
    sigma_min: float,
    sigma_max: float,
    rho: float = 1.0,
    *,
    final: float | None = 0.0,
) -> Tensor:
    """``log sigma`` falls by the power ``rho`` of equal steps; the arguments of
    :func:`karras_sigmas`.

    Source: k-diffusion.
    """
    _check_range(n, sigma_min, sigma_max)
    _check_positive("rho", rho)
    ramp = numpy.linspace(1, 0, n) ** rho
    low, high = math.log(sigma_min), math.log(sigma_max)
    return _between(numpy.exp(low + ramp * (high - low)), sigma_min, sigma_max, final)


def vp_sigmas(
    n: int,
    beta_d: float = 19.9,
    beta_min: float = 0.1,
    eps: float = 1e-3,
    *,
    final: float | None = 0.0,
) -> Tensor:
    """Equal steps of the time, from 1 to ``eps``, of the variance preserving SDE whose beta is
    ``beta_min + beta_d t``, as noise levels of data left unscaled (alpha = 1).

    Source: Song et al., Score-based generative modeling through SDEs (2021), eq. 33; in this form
    Karras et al. 2022, table 1.
    """
    _check_count(n)
    _check_positive("beta_d", beta_d)
    _check_positive("beta_min", beta_min)
    if not 0 < eps < 1:
        raise ValueError(f"eps: expected a time between 0 and 1, got {eps}")
    t = numpy.linspace(1, eps, n)
    return _ending(numpy.sqrt(numpy.expm1(beta_d * t**2 / 2 + beta_min * t)), final)


def linear_betas(n: int = 1000, start: float = 1e-4, end: float = 0.02) -> Tensor:
    """DDPM's noise variances ``[n]``, linear in the step.

    Source: Ho et al., Denoising diffusion probabilistic models (2020), section 4.
    """
    _check_count(n)
    _check_betas("start and end", numpy.array([start, end]))
    return torch.from_numpy(numpy.linspace(start, end, n))


def scaled_linear_betas(n: int = 1000, start: float = 0.00085, end: float = 0.012) -> Tensor:
    """Latent diffusion's noise variances ``[n]``, their square root linear in the step.

    Source: Rombach et al., High-resolution image synthesis with latent diffusion models (2022).
    """
    _check_count(n)
    _check_betas("start and end", numpy.array([start, end]))
    return torch.from_numpy(numpy.linspace(math.sqrt(start), math.sqrt(end), n) ** 2)


def cosine_betas(n: int = 1000, max_beta: float = 0.999) -> Tensor:
    """Improved DDPM's noise variances ``[n]`` (``squaredcos_cap_v2``), at most ``max_beta``.

    Source: Nichol & Dhariwal, Improved denoising diffusion probabilistic models (2021), eq. 17.
    """
    _check_count(n)
    _check_betas("max_beta", numpy.array([max_beta]))
    t = numpy.arange(n + 1) / n
    bar = numpy.cos((t + _COSINE_OFFSET) / (1 + _COSINE_OFFSET) * math.pi / 2) ** 2
    return torch.from_numpy(numpy.minimum(1 - bar[1:] / bar[:-1], max_beta))


def alphas_cumprod(betas: Levels) -> Tensor:
    """The share of the signal's variance left after each step, ``prod(1 - beta)``.

    Args:
        betas: the noise variance that each step adds, in [0, 1].

    Source: Ho et al. 2020, eq. 4.
    """
    values = _array("betas", betas)
    _check_betas("betas", values)
    return torch.from_numpy(numpy.cumprod(1 - values))


def rescale_zero_terminal_snr(betas: Levels) -> Tensor:
    """The betas whose last step leaves no signal at all: ``sqrt(alphas_cumprod)`` shifted and
    scaled so that its last value is 0 and its first one stays. The last beta is exactly 1.

    Args:
        betas: the noise variance that each step adds, in [0, 1]; at least two.

    Source: Lin et al., Common diffusion noise schedules and sample steps are flawed (2023),
    algorithm 1.
    """
    root = alphas_cumprod(betas).sqrt().numpy()
    if len(root) < 2 or root[0] <= root[-1]:
        raise ValueError("betas: expected at least two, of steps that add noise")
    bar = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
    return torch.from_numpy(1 - numpy.append(bar[0], bar[1:] / bar[:-1]))


def alpha_sigma(alphas_cumprod: Levels) -> tuple[Tensor, Tensor]:
    """``(alpha, sigma)`` of ``x = alpha x0 + sigma eps`` in a variance preserving process."""
    bar = _array("alphas_cumprod", alphas_cumprod)
    _check_shares(bar)
    return torch.from_numpy(numpy.sqrt(bar)), torch.from_numpy(numpy.sqrt(1 - bar))


def noise_levels(alphas_cumprod: Levels) -> Tensor:
    """The same process as levels of data left unscaled, ``sigma / alpha``; infinite where no
    signal is left.

    Source: Karras et al. 2022, table 1.
    """
    bar = _array("alphas_cumprod", alphas_cumprod)
    _check_shares(bar)
    with numpy.errstate(divide="ignore"):
        return torch.from_numpy(numpy.sqrt((1 - bar) / bar))


def flow_sigmas(n: int, shift: float = 1.0) -> Tensor:
    """Times ``[n + 1]`` of a rectified flow, from 1 (noise) to 0 (data): equal steps, shifted.

    Args:
        n: model calls of a method of order 1.
        shift: as :func:`flow_shift` takes it; 3 in Stable Diffusion 3.

    Source: Liu et al., Flow straight and fast (2022); Esser et al. 2024.
    """
    _check_count(n)
    return flow_shift(numpy.linspace(1, 0, n + 1), shift)


def flow_shift(t: Levels, shift: float) -> Tensor:
    """``t' = s t / (1 + (s - 1) t)``: more of the steps at high noise, where shift is above 1.

    Args:
        t: times of a rectified flow, in [0, 1].
        shift: s; see :func:`resolution_shift` and :func:`token_shift`.

    Source: Esser et al., Scaling rectified flow transformers (2024), eq. 23.
    """
    _check_positive("shift", shift)
    values = _array("t", t)
    if not ((values >= 0) & (values <= 1)).all():
        raise ValueError("t: expected times in [0, 1]")
    return torch.from_numpy(shift * values / (1 + (shift - 1) * values))


def resolution_shift(pixels: float, base_pixels: float) -> float:
    """The shift that leaves as much of the signal uncertain at ``pixels`` as there was at
    ``base_pixels``: the square root of their ratio.

    Source: Esser et al. 2024, eq. 23.
    """
    _check_positive("pixels", pixels)
    _check_positive("base_pixels", base_pixels)
    return math.sqrt(pixels / base_pixels)


def token_shift(
    tokens: int,
    base_tokens: int = 256,
    max_tokens: int = 4096,
    base_shift: float = 0.5,
    max_shift: float = 1.15,
) -> float:
    """The shift of FLUX.1 for a latent of so many tokens: its logarithm is linear in them, from
    ``base_shift`` at ``base_tokens`` to ``max_shift`` at ``max_tokens``.

    Source: Black Forest Labs, FLUX.1 (2024), its sampling.
    """
    if base_tokens == max_tokens:
        raise ValueError(f"max_tokens: expected another number than base_tokens, {base_tokens}")
    slope = (max_shift - base_shift) / (max_tokens - base_tokens)
    return math.exp(base_shift + (tokens - base_tokens) * slope)


def _between(
    levels: numpy.ndarray, sigma_min: float, sigma_max: float, final: float | None
) -> Tensor:
    """The last and the first level as they were asked for: a power and its root round."""
    levels[-1] = sigma_min
    levels[0] = sigma_max
    return _ending(levels, final)


def _ending(levels: numpy.ndarray, final: float | None) -> Tensor:
    if final is None:
        return torch.from_numpy(levels)
    if not 0 <= final <= levels[-1]:
        raise ValueError(f"final: expected 0 to the last level, {levels[-1]}, got {final}")
    return torch.from_numpy(numpy.append(levels, final))


def _array(name: str, values: Levels) -> numpy.ndarray:
    if not isinstance(values, Tensor | numpy.ndarray | Sequence):
        raise TypeError(f"{name}: expected a tensor or numbers, got {type(values).__name__}")
    found = torch.as_tensor(values, dtype=torch.float64, device="cpu").detach().numpy()
    if found.ndim != 1 or found.size == 0:
        raise ValueError(f"{name}: expected [n], got {list(found.shape)}")
    return found


def _check_count(n: int) -> None:
    if isinstance(n, bool) or not isinstance(n, int):
        raise TypeError(f"n: expected an int, got {type(n).__name__}")
    if n < 1:
        raise ValueError(f"n: expected at least 1, got {n}")


def _check_positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{name}: expected a positive number, got {value}")


def _check_range(n: int, sigma_min: float, sigma_max: float) -> None:
    _check_count(n)
    _check_positive("sigma_min", sigma_min)
    _check_positive("sigma_max", sigma_max)
    if sigma_min > sigma_max:
        raise ValueError(f"sigma_min: expected at most sigma_max, {sigma_max}, got {sigma_min}")


def _check_betas(name: str, betas: numpy.ndarray) -> None:
    if not ((betas >= 0) & (betas <= 1)).all():
        raise ValueError(f"{name}: expected variances in [0, 1]")


def _check_shares(bar: numpy.ndarray) -> None:
    if not ((bar >= 0) & (bar <= 1)).all():
        raise ValueError("alphas_cumprod: expected shares in [0, 1]")
