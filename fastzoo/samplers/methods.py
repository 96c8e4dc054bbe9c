"""The methods of :func:`fastzoo.samplers.sample`, each a generator function of one step.

``x, denoised = yield at, sigma`` asks for the model at a state and a noise level; what is returned
is the next state. The state is ``x0 + sigma eps`` (alpha = 1) and obeys ``dx/dsigma = (x - x0) /
sigma``, as does a rectified flow with its time for sigma: what draws no noise is a method for both.
A step that ends without noise (sigma' = 0) takes the limit of its formula.

``docs/samplers/methods.md`` has their orders and model calls.
"""

from collections.abc import Generator, Sequence
from typing import Any, TypeAlias

import numpy

from fastzoo.samplers import formulas
from fastzoo.samplers.algebra import Coefficient, Combination
from fastzoo.samplers.formulas import Value, derivative
from fastzoo.samplers.plan import Evaluation, Step, method
from fastzoo.samplers.tableaus import ADAPTIVE, FIXED, HEUN3, Tableau

_Slopes: TypeAlias = Generator[Any, Any, tuple[Combination, Combination]]

_MOST_CHURN = 2**0.5 - 1
# Kutta's classic one; FIXED["rk4"] is his 3/8 rule.
_CLASSIC = Tableau(
    order=4,
    nodes=(1 / 2, 1 / 2, 1.0),
    stages=((1 / 2,), (0.0, 1 / 2), (0.0, 0.0, 1.0)),
    solution=(1 / 6, 1 / 3, 1 / 3, 1 / 6),
)
_ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


def _churned(
    x: Combination, step: Step, s_churn: float, s_tmin: float, s_tmax: float, s_noise: float
) -> tuple[Combination, Coefficient]:
    """The state with some more noise, and its level."""
    inside = (s_tmin <= step.sigma) & (step.sigma <= s_tmax)
    gamma = inside * min(s_churn / (len(step.sigmas) - 1), _MOST_CHURN)
    if not numpy.any(gamma):
        return x, step.sigma
    hat, up = formulas.churned(step.sigma, gamma)
    return x + s_noise * up * step.noise(step.sigma, hat), hat


def _noised(x: Value, step: Step, std: Coefficient) -> Value:
    """The state with the noise that brings it to the step's end; none is drawn where none is."""
    if not numpy.any(std):
        return x
    return x + std * step.noise(step.sigma, step.next_sigma)


@method
def euler(
    x: Combination,
    step: Step,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = float("inf"),
    s_noise: float = 1.0,
) -> Evaluation:
    """Euler's, with the churn of Karras et al. 2022."""
    x, sigma = _churned(x, step, s_churn, s_tmin, s_tmax, s_noise)
    x, denoised = yield x, sigma
    return formulas.euler(x, denoised, sigma, step.next_sigma)


@method
def heun(
    x: Combination,
    step: Step,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = float("inf"),
    s_noise: float = 1.0,
) -> Evaluation:
    """Karras et al. 2022, algorithm 2 (1 without churn)."""
    x, sigma = _churned(x, step, s_churn, s_tmin, s_tmax, s_noise)
    x, denoised = yield x, sigma
    ahead = formulas.euler(x, denoised, sigma, step.next_sigma)
    if step.last:
        return ahead
    _, denoised_ahead = yield ahead, step.next_sigma
    slopes = derivative(x, denoised, sigma) + derivative(ahead, denoised_ahead, step.next_sigma)
    return x + (step.next_sigma - sigma) / 2 * slopes


@method
def euler_ancestral(
    x: Combination, step: Step, eta: float = 1.0, s_noise: float = 1.0
) -> Evaluation:
    """Euler's to less noise than the step's end has, and noise up to it (k-diffusion)."""
    x, denoised = yield x, step.sigma
    down, up = formulas.ancestral(step.sigma, step.next_sigma, eta)
    return _noised(formulas.euler(x, denoised, step.sigma, down), step, s_noise * up)


@method
def ddim(x: Combination, step: Step, eta: float = 0.0, s_noise: float = 1.0) -> Evaluation:
    """Song et al. 2021, eq. 12 and 16, whose variance preserving state is this one scaled."""
    x, denoised = yield x, step.sigma
    _, std = formulas.ancestral(step.sigma, step.next_sigma, eta)
    eps = formulas.noise_of(x, denoised, 1.0, step.sigma)
    return _noised(formulas.ddim(denoised, eps, 1.0, step.next_sigma, std), step, s_noise * std)


@method
def ddpm(x: Combination, step: Step, s_noise: float = 1.0) -> Evaluation:
    """Ho et al. 2020, algorithm 2, with the posterior's variance (eq. 7)."""
    x, denoised = yield x, step.sigma
    # alpha^2 + sigma^2 = 1 in the paper: alpha x has that form.
    alpha, next_alpha = (1 / numpy.sqrt(1 + s**2) for s in (step.sigma, step.next_sigma))
    levels = (alpha, alpha * step.sigma, next_alpha, next_alpha * step.next_sigma)
    mean = formulas.ddpm_mean(alpha * x, denoised, *levels) / next_alpha
    std = numpy.sqrt(formulas.posterior_variance(*levels)) / next_alpha
    return _noised(mean, step, s_noise * std)


def _dpm_2(x: Combination, sigma: Coefficient, end: Coefficient) -> Evaluation:
    """The step of DPM-Solver-2 as k-diffusion has it: by the slope at the geometric middle."""
    x, denoised = yield x, sigma
    if numpy.all(end == 0):
        return formulas.euler(x, denoised, sigma, end)
    middle = numpy.sqrt(sigma * end)
    between = formulas.euler(x, denoised, sigma, middle)
    _, denoised = yield between, middle
    return x + (end - sigma) * derivative(between, denoised, middle)


@method
def dpm_2(
    x: Combination,
    step: Step,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = float("inf"),
    s_noise: float = 1.0,
) -> Evaluation:
    """After DPM-Solver-2 (Lu et al. 2022) and Karras et al. 2022 (k-diffusion)."""
    x, sigma = _churned(x, step, s_churn, s_tmin, s_tmax, s_noise)
    return (yield from _dpm_2(x, sigma, step.next_sigma))


@method
def dpm_2_ancestral(
    x: Combination, step: Step, eta: float = 1.0, s_noise: float = 1.0
) -> Evaluation:
    """:func:`dpm_2` to less noise than the step's end has, and noise up to it (k-diffusion)."""
    down, up = formulas.ancestral(step.sigma, step.next_sigma, eta)
    return _noised((yield from _dpm_2(x, step.sigma, down)), step, s_noise * up)


def _lagrange_integrals(
    nodes: Sequence[Coefficient], start: Coefficient, end: Coefficient
) -> list[Coefficient]:
    """The integral from start to end of each polynomial that is 1 at one of the nodes and 0 at the
    others. Gauss's quadrature is exact for them."""
    points, weights = numpy.polynomial.legendre.leggauss(len(nodes))
    half = (end - start) / 2
    integrals = []
    for j, node in enumerate(nodes):
        others = [other for k, other in enumerate(nodes) if k != j]
        values = [
            numpy.prod([(start + half * (1 + p) - o) / (node - o) for o in others], axis=0)
            for p in points
        ]
        integrals.append(half * sum(w * value for w, value in zip(weights, values, strict=True)))
    return integrals


@method
def lms(x: Combination, step: Step, order: int = 4) -> Evaluation:
    """Linear multistep: the polynomial through the last slopes, integrated exactly (k-diffusion;
    Adams & Bashforth 1883 on uneven steps)."""
    _check_order(order, 4)
    x, denoised = yield x, step.sigma
    slopes = [(step.keep(derivative(x, denoised, step.sigma)), step.sigma)]
    slopes += step.memory.get("slopes", [])[: order - 1]
    step.memory["slopes"] = slopes
    weights = _lagrange_integrals([s for _, s in slopes], step.sigma, step.next_sigma)
    for weight, (slope, _) in zip(weights, slopes, strict=True):
        x = x + weight * slope
    return x


@method
def plms(x: Combination, step: Step) -> Evaluation:
    """Pseudo linear multistep (Liu et al. 2022, algorithm 2): the weights of even steps on
    whatever steps there are, after three steps of Runge and Kutta's (one that ends without noise
    takes what slopes there are)."""
    before = step.memory.get("slopes", [])[:3]
    if len(before) < 3 and not step.last:
        end, slope = yield from _runge_kutta(x, step, _CLASSIC)
        step.memory["slopes"] = [step.keep(slope), *before]
        return end
    x, denoised = yield x, step.sigma
    slopes = [step.keep(derivative(x, denoised, step.sigma)), *before]
    step.memory["slopes"] = slopes
    for weight, slope in zip(_ADAMS_BASHFORTH[len(slopes) - 1], slopes, strict=True):
        x = x + weight * (step.next_sigma - step.sigma) * slope
    return x


def _runge_kutta(x: Combination, step: Step, tableau: Tableau) -> _Slopes:
    """The step's end, and the slope at its beginning."""
    if step.last and 1.0 in tableau.nodes:
        # At sigma' = 0 there is no slope to ask for. One step of order 3 leaves an order of 4.
        tableau = HEUN3
    length = step.next_sigma - step.sigma
    slopes: list[Combination] = []
    for node, row in zip((0.0, *tableau.nodes), ((), *tableau.stages), strict=True):
        if len(slopes) == len(tableau.solution) - 1 and tableau.solution[-1] == 0:
            break
        sigma = step.sigma + node * length
        at = _moved(x, length, row, slopes)
        stage, denoised = yield at, sigma
        if not slopes:
            x = at = stage
        slopes.append(derivative(at, denoised, sigma))
    return _moved(x, length, tableau.solution, slopes), slopes[0]


def _moved(
    x: Combination, length: Coefficient, weights: Sequence[float], slopes: Sequence[Combination]
) -> Combination:
    for weight, slope in zip(weights, slopes, strict=False):
        x = x + weight * length * slope
    return x


@method
def runge_kutta(x: Combination, step: Step, tableau: str | Tableau = "rk4") -> Evaluation:
    """Any explicit Runge-Kutta method in sigma: a name of :func:`fastzoo.samplers.odeint`, or a
    tableau of one's own."""
    if not isinstance(tableau, Tableau):
        known = {**FIXED, **ADAPTIVE}
        _check_choice("tableau", tableau, tuple(known))
        tableau = known[tableau]
    return (yield from _runge_kutta(x, step, tableau))[0]


@method
def midpoint(x: Combination, step: Step) -> Evaluation:
    """The slope in the middle of the step; no stage is at its end, so that the last is as any."""
    return (yield from _runge_kutta(x, step, FIXED["midpoint"]))[0]


@method
def rk4(x: Combination, step: Step) -> Evaluation:
    """Kutta's classic one."""
    return (yield from _runge_kutta(x, step, _CLASSIC))[0]


def _dpmpp_2s(x: Combination, step: Step, down: Coefficient) -> Evaluation:
    """Lu et al. 2022 (DPM-Solver++), algorithm 1 with r = 1/2; where alpha is 1 a step of the
    first order is Euler's."""
    x, denoised = yield x, step.sigma
    if numpy.all(down == 0):
        return formulas.euler(x, denoised, step.sigma, down)
    middle = numpy.sqrt(step.sigma * down)
    _, denoised = yield formulas.euler(x, denoised, step.sigma, middle), middle
    return formulas.euler(x, denoised, step.sigma, down)


@method
def dpmpp_2s(x: Combination, step: Step) -> Evaluation:
    """DPM-Solver++(2S), Lu et al. 2022."""
    return (yield from _dpmpp_2s(x, step, step.next_sigma))


@method
def dpmpp_2s_ancestral(
    x: Combination, step: Step, eta: float = 1.0, s_noise: float = 1.0
) -> Evaluation:
    """:func:`dpmpp_2s` to less noise than the step's end has, and noise up to it (k-diffusion)."""
    down, up = formulas.ancestral(step.sigma, step.next_sigma, eta)
    return _noised((yield from _dpmpp_2s(x, step, down)), step, s_noise * up)


@method
def dpmpp_sde(
    x: Combination, step: Step, eta: float = 1.0, s_noise: float = 1.0, r: float = 0.5
) -> Evaluation:
    """SDE-DPM-Solver++(2S): both halves of a step are ancestral (k-diffusion).

    The noise of the whole step holds that of its first part, as the increments of a Brownian
    motion in sigma do, which is what k-diffusion draws by default. With independent noises instead
    the order is 1.
    """
    sigma, next_sigma = step.sigma, step.next_sigma
    x, denoised = yield x, sigma
    if step.last:
        return denoised
    middle = sigma * (next_sigma / sigma) ** r
    down, up = formulas.ancestral(sigma, middle, eta)
    between, std = formulas.euler(x, denoised, sigma, down), s_noise * up
    noisy = numpy.any(std)
    start = between + std * step.noise(sigma, middle) if noisy else between
    start, denoised_between = yield start, middle
    first = (start - between) / std if noisy else None
    down, up = formulas.ancestral(sigma, next_sigma, eta)
    ahead = denoised + (denoised_between - denoised) / (2 * r)
    end = formulas.euler(x, ahead, sigma, down)
    if first is None:
        return end
    share = (sigma - middle) / (sigma - next_sigma)
    second = step.noise(middle, next_sigma)
    return end + s_noise * up * (numpy.sqrt(share) * first + numpy.sqrt(1 - share) * second)


def _dpmpp_multistep(
    x: Combination, step: Step, order: int, eta: float, s_noise: float, solver_type: str
) -> Evaluation:
    """DPM-Solver++(2M) and (3M), of the ODE (eta = 0) and the SDE (1)."""
    x, denoised = yield x, step.sigma
    if step.last:
        return denoised
    here, ahead = formulas.log_snr(1.0, step.sigma), formulas.log_snr(1.0, step.next_sigma)
    before = step.memory.get("before", [])[: order - 1]
    step.memory["before"] = [(step.keep(denoised), here), *before]
    derivatives: tuple[Any, ...] = ()
    if before:
        h, values = ahead - here, [value for value, _ in before]
        lengths = -numpy.diff([here, *(at for _, at in before)], axis=0) / h
        derivatives = formulas.differences(
            denoised, values[0], lengths[0], *values[1:], *lengths[1:]
        )
    return formulas.dpm_solver_pp(
        x,
        denoised,
        (1.0, step.sigma),
        (1.0, step.next_sigma),
        *derivatives,
        eta=eta,
        noise=s_noise * step.noise(step.sigma, step.next_sigma) if eta else None,
        solver_type=solver_type,
    )


@method
def dpmpp_2m(x: Combination, step: Step, solver_type: str = "midpoint") -> Evaluation:
    """DPM-Solver++(2M), Lu et al. 2022, algorithm 2."""
    return dpmpp_2m_sde(x, step, eta=0.0, solver_type=solver_type)


@method
def dpmpp_2m_sde(
    x: Combination,
    step: Step,
    eta: float = 1.0,
    s_noise: float = 1.0,
    solver_type: str = "midpoint",
) -> Evaluation:
    """SDE-DPM-Solver++(2M), Lu et al. 2022, with eta (k-diffusion)."""
    _check_choice("solver_type", solver_type, ("midpoint", "heun"))
    return _dpmpp_multistep(x, step, 2, eta, s_noise, solver_type)


@method
def dpmpp_3m(x: Combination, step: Step) -> Evaluation:
    """DPM-Solver++(3M), Lu et al. 2022."""
    return dpmpp_3m_sde(x, step, eta=0.0)


@method
def dpmpp_3m_sde(x: Combination, step: Step, eta: float = 1.0, s_noise: float = 1.0) -> Evaluation:
    """SDE-DPM-Solver++(3M) (k-diffusion); its second step is the ``heun`` one of 2M."""
    return _dpmpp_multistep(x, step, 3, eta, s_noise, "heun")


@method
def unipc(
    x: Combination, step: Step, order: int = 2, solver_type: str = "bh2", corrector: bool = True
) -> Evaluation:
    """UniPC, Zhao et al. 2023, of x0. The corrector takes the model's value at the predicted state
    and moves where the next step begins; the last state stays as it was predicted."""
    _check_order(order, 4)
    _check_choice("solver_type", solver_type, ("bh1", "bh2"))
    x, denoised = yield x, step.sigma
    if step.last:
        return denoised
    here, memory = (1.0, step.sigma), step.memory
    if corrector and "x" in memory:
        x = step.keep(
            formulas.unipc(
                memory["x"],
                memory["values"][0][0],
                memory["levels"],
                here,
                memory["values"][1:],
                denoised,
                solver_type=solver_type,
            )
        )
    earlier = memory.get("values", [])[: order - 1]
    values = [(step.keep(denoised), formulas.log_snr(*here)), *earlier]
    memory.update(x=x, levels=here, values=values)
    return formulas.unipc(
        x, denoised, here, (1.0, step.next_sigma), earlier, solver_type=solver_type
    )


def _check_order(order: int, most: int) -> None:
    if order not in range(1, most + 1):
        raise ValueError(f"order: expected 1 to {most}, got {order}")


def _check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name}: expected one of {known}, got {value!r}")
