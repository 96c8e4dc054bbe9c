"""The update formulas of the samplers, each once, as its paper writes it.

A state is ``x = alpha x0 + sigma eps``; ``x0`` is what the model takes the data for. Variance
exploding samplers (Karras, k-diffusion) have ``alpha = 1``, variance preserving ones ``alpha^2 +
sigma^2 = 1``, rectified flows ``alpha = 1 - sigma``. ``lambda = log(alpha / sigma)``. A prime (here
``next_``) is the end of the step, where there is less noise; ``sigma' = 0`` takes the limit.

The tensors may be combinations of names (:mod:`fastzoo.samplers.algebra`) or torch tensors; the
coefficients are numbers, or arrays with one for each sample.
"""

from collections.abc import Sequence
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


def predicted_noise(
    prediction: str, x: Value, output: Value, alpha: Coefficient = 1.0, sigma: Coefficient = 0.0
) -> Value:
    """eps from what the model predicts, as :func:`denoised` is x0; for these predictions it needs
    no division by alpha, and has a value where there is no signal."""
    if prediction == "epsilon":
        return output
    if prediction == "v":
        return (sigma * x + alpha * output) / (alpha**2 + sigma**2)
    if prediction == "velocity":
        return (x + alpha * output) / (alpha + sigma)
    return noise_of(x, denoised(prediction, x, output, alpha, sigma), alpha, sigma)


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
    # At eta = 1 after an alpha of 0 the difference is 0 but for its rounding.
    x = next_alpha * x0 + numpy.sqrt(numpy.maximum(next_sigma**2 - std**2, 0)) * eps
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
    many derivatives of x0 with respect to lambda are given: those of :func:`differences`, with h
    the step in lambda. At sigma' = 0 it is alpha' x0.

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
    """h times the first and h^2 / 2 times the second derivative of x0 with respect to lambda, from
    its values of the last two or three steps: r0 and r1 are the lengths in lambda of the step
    before and of that before it, over this one's.

    The authors' code, diffusers and k-diffusion give h^2 / 2 times the second derivative the weight
    of h^2 times it, and so does :func:`dpm_solver_pp`: what is called its third order converges as
    a second one. :func:`unipc` with two earlier steps converges as a third one.
    """
    first = (x0 - before) / r0
    if earlier is None:
        return first, None
    second = (first - (before - earlier) / r1) / (r0 + r1)
    return first + r0 * second, second


def dpm_solver(
    x: Value,
    eps: Value,
    alpha_sigma: tuple[Coefficient, Coefficient],
    next_alpha_sigma: tuple[Coefficient, Coefficient],
    first: Value | None = None,
    second: Value | None = None,
    *,
    noise: Value | None = None,
    solver_type: str = "midpoint",
) -> Value:
    """DPM-Solver (Lu et al. 2022): :func:`dpm_solver_pp` with the noise eps, where that has x0, and
    with derivatives of eps. With ``noise`` it is the SDE's, whose drift has eps twice. At
    sigma' = 0 it is alpha' x0, the limit of the first order; a higher one has none."""
    (alpha, sigma), (next_alpha, next_sigma) = alpha_sigma, next_alpha_sigma
    if numpy.all(numpy.asarray(next_sigma) == 0):
        return (next_alpha / alpha) * (x - sigma * eps)
    h = log_snr(next_alpha, next_sigma) - log_snr(alpha, sigma)
    drift = next_sigma * (1.0 if noise is None else 2.0)
    phi_1 = numpy.expm1(h)
    result = (next_alpha / alpha) * x - (drift * phi_1) * eps
    if first is not None:
        phi_2 = phi_1 / h - 1
        halfway = solver_type == "midpoint" and second is None
        result = result - (drift * (phi_1 / 2 if halfway else phi_2)) * first
        if second is not None:
            result = result - (drift * (phi_2 / h - 0.5)) * second
    if noise is not None:
        result = result + (next_sigma * numpy.sqrt(numpy.expm1(2 * h))) * noise
    return result


def unipc(
    x: Value,
    value: Value,
    alpha_sigma: tuple[Coefficient, Coefficient],
    next_alpha_sigma: tuple[Coefficient, Coefficient],
    earlier: Sequence[tuple[Value, Coefficient]] = (),
    reached: Value | None = None,
    *,
    of_noise: bool = False,
    solver_type: str = "bh2",
) -> Value:
    """UniP, and with ``reached`` UniC (Zhao et al. 2023): a step from x by the values of x0 (or of
    eps, ``of_noise``) here, at ``earlier`` steps, the latest first and each with its lambda, and,
    for the corrector, at the step's end. UniP has order 1 + len(earlier), UniC one more. At
    sigma' = 0 it is alpha' x0.

    ``solver_type`` is B(h), ``bh1`` h and ``bh2`` e^h - 1; it matters only where there is a single
    difference, whose weight is B(h) / 2. The weights of more solve the order conditions.
    """
    (alpha, sigma), (next_alpha, next_sigma) = alpha_sigma, next_alpha_sigma
    if numpy.all(numpy.asarray(next_sigma) == 0):
        return next_alpha * (denoised("epsilon", x, value, alpha, sigma) if of_noise else value)
    here = log_snr(alpha, sigma)
    h = log_snr(next_alpha, next_sigma) - here
    if of_noise:
        z, ratio, scale = h, next_alpha / alpha, next_sigma
    else:
        z, ratio, scale = -h, next_sigma / sigma, next_alpha
    result = ratio * x - (scale * numpy.expm1(z)) * value
    positions = [(at - here) / h for _, at in earlier]
    slopes = [(v - value) / r for (v, _), r in zip(earlier, positions, strict=True)]
    if reached is not None:
        positions.append(numpy.ones_like(h))
        slopes.append(reached - value)
    if len(slopes) == 1:
        weights = [(z if solver_type == "bh1" else numpy.expm1(z)) / 2]
    else:
        weights = _order_conditions(positions, z) if slopes else []
    for weight, slope in zip(weights, slopes, strict=True):
        result = result - (scale * weight) * slope
    return result


def _order_conditions(positions: Sequence[Coefficient], z: Coefficient) -> list[Coefficient]:
    """The w with ``sum_i w_i r_i^(k-1) = k! z phi_(k+1)(z)`` for k = 1, 2, ... (Zhao et al. 2023,
    eq. 5; their a B(h)): polynomials of lambda are integrated exactly."""
    powers, moments = [], []
    moment, factorial = numpy.expm1(z) / z - 1, 1.0
    for k in range(len(positions)):
        powers.append(numpy.stack([numpy.asarray(r) ** k for r in positions], -1))
        moments.append(moment * factorial)
        factorial *= k + 2
        moment = moment / z - 1 / factorial
    weights = numpy.linalg.solve(numpy.stack(powers, -2), numpy.stack(moments, -1)[..., None])
    return [weights[..., i, 0] for i in range(len(positions))]
