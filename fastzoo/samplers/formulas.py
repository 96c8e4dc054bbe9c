"""The update formulas of the samplers, each once, as its paper writes it.

A state is ``x = alpha x0 + sigma eps``; ``x0`` is what the model takes the data for. Variance
exploding samplers (Karras, k-diffusion) have ``alpha = 1``, variance preserving ones ``alpha^2 +
sigma^2 = 1``, rectified flows ``alpha = 1 - sigma``. ``lambda = log(alpha / sigma)``. A prime (here
``next_``) is the end of the step, where there is less noise; ``sigma' = 0`` takes the limit.

The tensors may be combinations of names (:mod:`fastzoo.samplers.algebra`) or torch tensors; the
coefficients are numbers, or arrays with one for each sample.
"""

from typing import Any, TypeAlias

import numpy

from fastzoo.samplers.algebra import Coefficient

# A combination or a tensor.
Value: TypeAlias = Any

PREDICTIONS = ("denoised", "epsilon", "v", "score", "velocity", "F")


def denoised(
    prediction: str,
    x: Value,
    output: Value,
    alpha: Coefficient = 1.0,
    sigma: Coefficient = 0.0,
    sigma_data: float = 0.5,
) -> Value:
    """x0 from what the model predicts: itself, the noise, ``v = alpha eps - sigma x0`` (Salimans &
    Ho 2022), the score ``-eps / sigma``, the velocity ``eps - x0`` of a straight path, or F of
    ``x0 = c_skip x + c_out F`` (Karras et al. 2022, eq. 7, alpha = 1)."""
    if prediction == "denoised":
        return output
    if prediction in ("epsilon", "score") and numpy.any(numpy.asarray(alpha) == 0):
        raise ValueError(
            f"prediction: {prediction} says nothing of the data where alpha is 0 (a schedule with "
            "zero terminal signal-to-noise ratio); a v or denoised prediction does"
        )
    if prediction == "epsilon":
        return (x - sigma * output) / alpha
    if prediction == "score":
        return (x + sigma**2 * output) / alpha
    if prediction == "v":
        return (alpha * x - sigma * output) / (alpha**2 + sigma**2)
    if prediction == "velocity":
        return (x - sigma * output) / (alpha + sigma)
    if prediction == "F":
        both = sigma**2 + sigma_data**2
        return (sigma_data**2 / both) * x + (sigma * sigma_data / numpy.sqrt(both)) * output
    raise ValueError(f"prediction: expected one of {PREDICTIONS}, got {prediction!r}")


def noise_of(x: Value, x0: Value, alpha: Coefficient, sigma: Coefficient) -> Value:
    """eps of ``x = alpha x0 + sigma eps``."""
    return (x - alpha * x0) / sigma


def guided(uncond: Value, cond: Value, scale: Coefficient) -> Value:
    """Classifier-free guidance (Ho & Salimans 2022)."""
    return uncond + scale * (cond - uncond)


def derivative(x: Value, x0: Value, sigma: Coefficient) -> Value:
    """dx/dsigma of the probability flow where alpha = 1 (Karras et al. 2022, eq. 3), and of a
    rectified flow with sigma for t."""
    return (x - x0) / sigma


def euler(x: Value, x0: Value, sigma: Coefficient, next_sigma: Coefficient) -> Value:
    """``x + (sigma' - sigma) dx/dsigma``, which at sigma' = 0 is x0 to the last bit."""
    ratio = next_sigma / sigma
    return ratio * x + (1 - ratio) * x0


def ancestral(
    sigma: Coefficient, next_sigma: Coefficient, eta: float = 1.0
) -> tuple[Coefficient, Coefficient]:
    """(sigma_down, sigma_up): how far the deterministic part of a step goes and how much noise
    brings it to sigma' (alpha = 1; k-diffusion)."""
    up = numpy.minimum(
        next_sigma,
        eta * numpy.sqrt(next_sigma**2 * numpy.maximum(sigma**2 - next_sigma**2, 0) / sigma**2),
    )
    return numpy.sqrt(next_sigma**2 - up**2), up


def churned(sigma: Coefficient, gamma: Coefficient) -> tuple[Coefficient, Coefficient]:
    """(sigma hat, the noise that brings sigma there): Karras et al. 2022, algorithm 2."""
    hat = sigma * (1 + gamma)
    return hat, numpy.sqrt(hat**2 - sigma**2)


def posterior_variance(
    alpha: Coefficient, sigma: Coefficient, next_alpha: Coefficient, next_sigma: Coefficient
) -> Coefficient:
    """Of q(x' | x, x0), Ho et al. 2020, eq. 7: ``(sigma'^2 / sigma^2) (1 - alpha^2 / alpha'^2)`` of
    a variance preserving process."""
    return next_sigma**2 / sigma**2 * (1 - alpha**2 / next_alpha**2)


def ddim(
    x0: Value,
    eps: Value,
    next_alpha: Coefficient,
    next_sigma: Coefficient,
    std: Coefficient = 0.0,
    noise: Value | None = None,
) -> Value:
    """Song et al. 2021, eq. 12, whose sigma_t is ``std``."""
    x = next_alpha * x0 + numpy.sqrt(next_sigma**2 - std**2) * eps
    return x if noise is None else x + std * noise


def ddpm_mean(
    x: Value,
    x0: Value,
    alpha: Coefficient,
    sigma: Coefficient,
    next_alpha: Coefficient,
    next_sigma: Coefficient,
) -> Value:
    """The mean of q(x' | x, x0) of a variance preserving process, Ho et al. 2020, eq. 7."""
    step = alpha / next_alpha
    beta = 1 - step**2
    return (next_alpha * beta / sigma**2) * x0 + (step * next_sigma**2 / sigma**2) * x


def log_snr(alpha: Coefficient, sigma: Coefficient) -> Coefficient:
    """lambda, half the logarithm of the signal-to-noise ratio; infinite at sigma = 0."""
    with numpy.errstate(divide="ignore"):
        return numpy.log(alpha) - numpy.log(sigma)


def dpm_solver_pp(
    x: Value,
    x0: Value,
    alpha_sigma: tuple[Coefficient, Coefficient],
    next_alpha_sigma: tuple[Coefficient, Coefficient],
    first: Value | None = None,
    second: Value | None = None,
    *,
    eta: Coefficient = 0.0,
    noise: Value | None = None,
    solver_type: str = "midpoint",
) -> Value:
    """DPM-Solver++ (Lu et al. 2022), its ODE (eta 0) and SDE (eta 1), of order 1, 2 or 3 by how
    many derivatives of x0 with respect to lambda are given: ``first`` is h times the first one,
    ``second`` h^2 times the second, with h the step in lambda. At sigma' = 0 it is alpha' x0.

    ``solver_type`` is how the first derivative enters a step of order 2: ``midpoint`` or ``heun``.
    """
    (alpha, sigma), (next_alpha, next_sigma) = alpha_sigma, next_alpha_sigma
    if numpy.all(numpy.asarray(next_sigma) == 0):
        return next_alpha * x0
    h = log_snr(next_alpha, next_sigma) - log_snr(alpha, sigma)
    whole = h * (1 + eta)
    phi_1 = -numpy.expm1(-whole)
    result = (next_sigma / sigma * numpy.exp(-eta * h)) * x + (next_alpha * phi_1) * x0
    if first is not None:
        phi_2 = 1 - phi_1 / whole
        halfway = solver_type == "midpoint" and second is None
        result = result + (next_alpha * (phi_1 / 2 if halfway else phi_2)) * first
        if second is not None:
            result = result - (next_alpha * (phi_2 / whole - 0.5)) * second
    if noise is not None:
        result = result + (next_sigma * numpy.sqrt(-numpy.expm1(-2 * eta * h))) * noise
    return result


def differences(
    x0: Value, before: Value, r0: Coefficient, earlier: Value | None = None, r1: Coefficient = 1.0
) -> tuple[Value, Value | None]:
    """h times the first and h^2 times the second derivative of x0 with respect to lambda, from its
    values of the last two or three steps: r0 and r1 are the lengths in lambda of the step before
    and of that before it, over this one's."""
    first = (x0 - before) / r0
    if earlier is None:
        return first, None
    second = (first - (before - earlier) / r1) / (r0 + r1)
    return first + r0 * second, second
