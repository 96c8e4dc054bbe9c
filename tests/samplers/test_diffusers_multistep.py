"""Whole runs of Heun, DPM-Solver and UniPC beside diffusers' own, computed in float64."""

from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from fastzoo import ops
from fastzoo.samplers import diffusers as ours
from fastzoo.samplers import formulas
from tests.samplers.test_diffusers import (
    DYNAMIC,
    MULTISTEP,
    SCALED,
    ZERO_SNR,
    check_close,
    default_dtype,
    in_float64,
    initial,
    model,
    without_diffusers,
)

diffusers = pytest.importorskip("diffusers")

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*dpmsolver is deprecated:FutureWarning"),
]

# diffusers' weight of the second derivative goes to -1 where it should vanish with the step.
THIRD_ORDER = {"wrong": "(2.0 * h) ** 2 - 0.5)", "right": "(2.0 * h) ** 2 + 0.5)"}

FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
# A step of the noise divides by alpha, which magnifies float32's rounding where it is small.
OF_NOISE = {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min", **SCALED}
SDE = {"algorithm_type": "sde-dpmsolver++"}
SDE_OF_NOISE = {**OF_NOISE, "algorithm_type": "sde-dpmsolver"}
UNIPC_OF_NOISE = {"predict_x0": False, "final_sigmas_type": "sigma_min", **SCALED}

# Scheduler, its config, the arguments of set_timesteps (a number is of steps).
CASES: list[tuple[str, dict[str, Any], Any]] = [
    ("HeunDiscrete", {}, 5),
    ("HeunDiscrete", {"prediction_type": "v_prediction", "use_karras_sigmas": True, **SCALED}, 4),
    ("HeunDiscrete", {"prediction_type": "sample", "use_exponential_sigmas": True}, 4),
    # Heun's method magnifies an error where a step is long beside the level it ends at.
    ("HeunDiscrete", {"clip_sample": True, "use_beta_sigmas": True, **SCALED}, 10),
    ("HeunDiscrete", {"timestep_spacing": "trailing", "beta_schedule": "exp"}, 4),
    ("HeunDiscrete", {"timestep_spacing": "leading", "steps_offset": 1}, 4),
    ("HeunDiscrete", {}, {"timesteps": [900, 600, 300, 20]}),
    ("HeunDiscrete", {}, 1),
    ("DPMSolverMultistep", {"solver_order": 1}, 5),
    ("DPMSolverMultistep", {}, 6),
    ("DPMSolverMultistep", {"solver_type": "heun", "use_karras_sigmas": True, **SCALED}, 6),
    ("DPMSolverMultistep", {"solver_order": 3}, 17),
    (
        "DPMSolverMultistep",
        {"solver_order": 3, "euler_at_final": True, "timestep_spacing": "leading"},
        6,
    ),
    (
        "DPMSolverMultistep",
        {"solver_order": 3, "lower_order_final": False, "final_sigmas_type": "sigma_min"},
        6,
    ),
    # A last step of no length.
    ("DPMSolverMultistep", {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min"}, 16),
    ("DPMSolverMultistep", {"use_exponential_sigmas": True, "prediction_type": "sample"}, 5),
    ("DPMSolverMultistep", {"use_beta_sigmas": True, **DYNAMIC}, 5),
    ("DPMSolverMultistep", {"use_lu_lambdas": True, "prediction_type": "v_prediction"}, 5),
    ("DPMSolverMultistep", {**FLOW, "flow_shift": 3.0}, 6),
    (
        "DPMSolverMultistep",
        {**FLOW, "use_dynamic_shifting": True},
        {"num_inference_steps": 5, "mu": 0.8},
    ),
    ("DPMSolverMultistep", ZERO_SNR, 5),
    ("DPMSolverMultistep", {"variance_type": "learned_range"}, 4),
    (
        "DPMSolverMultistep",
        {
            "beta_schedule": "squaredcos_cap_v2",
            "lambda_min_clipped": -5.1,
            "prediction_type": "v_prediction",
        },
        5,
    ),
    ("DPMSolverMultistep", {"solver_order": 3}, {"timesteps": [900, 600, 300, 20]}),
    ("DPMSolverMultistep", {}, 1),
    ("DPMSolverMultistep", {**OF_NOISE, "solver_order": 3}, 16),
    (
        "DPMSolverMultistep",
        {**OF_NOISE, "solver_type": "heun", "prediction_type": "v_prediction"},
        5,
    ),
    ("DPMSolverMultistep", {**OF_NOISE, **DYNAMIC, "prediction_type": "sample"}, 5),
    ("DPMSolverMultistep", SDE, 6),
    ("DPMSolverMultistep", {**SDE, "solver_type": "heun"}, 5),
    ("DPMSolverMultistep", {**SDE, "solver_order": 3}, 16),
    ("DPMSolverMultistep", SDE_OF_NOISE, 5),
    ("DPMSolverMultistep", {**SDE_OF_NOISE, "solver_type": "heun"}, 5),
    ("UniPCMultistep", {"solver_order": 1}, 5),
    ("UniPCMultistep", {}, 6),
    ("UniPCMultistep", {"solver_order": 3, "disable_corrector": [0, 2]}, 7),
    (
        "UniPCMultistep",
        {"solver_order": 3, "solver_type": "bh1", "final_sigmas_type": "sigma_min"},
        7,
    ),
    (
        "UniPCMultistep",
        {"solver_type": "bh1", "lower_order_final": False, "final_sigmas_type": "sigma_min"},
        5,
    ),
    ("UniPCMultistep", {"solver_order": 4, "use_karras_sigmas": True, **SCALED}, 7),
    ("UniPCMultistep", {"use_exponential_sigmas": True, "final_sigmas_type": "sigma_min"}, 5),
    ("UniPCMultistep", {"use_beta_sigmas": True, **DYNAMIC}, 5),
    ("UniPCMultistep", {**FLOW, "flow_shift": 3.0}, 6),
    (
        "UniPCMultistep",
        {**FLOW, "shift_terminal": 0.02},
        {"sigmas": numpy.array([1.0, 0.8, 0.5, 0.2])},
    ),
    (
        "UniPCMultistep",
        {**FLOW, "use_karras_sigmas": True, "sigma_min": 0.01, "sigma_max": 200.0},
        5,
    ),
    (
        "UniPCMultistep",
        {**FLOW, "use_dynamic_shifting": True, "time_shift_type": "linear"},
        {"num_inference_steps": 5, "mu": 1.3},
    ),
    ("UniPCMultistep", {**ZERO_SNR, "solver_order": 3}, 6),
    ("UniPCMultistep", {**UNIPC_OF_NOISE, "solver_order": 3}, 6),
    ("UniPCMultistep", {**UNIPC_OF_NOISE, "prediction_type": "v_prediction"}, 5),
    ("UniPCMultistep", {**UNIPC_OF_NOISE, "prediction_type": "sample"}, 5),
    ("UniPCMultistep", {}, 1),
]


def arguments(steps: Any) -> dict[str, Any]:
    return steps if isinstance(steps, dict) else {"num_inference_steps": steps}


def trajectory(
    scheduler: Any, x: Tensor, steps: Any, begin: int = 0, **options: Any
) -> list[Tensor]:
    """Every sample of a run, and Heun's every x0."""
    scheduler.set_timesteps(**arguments(steps))
    learned = scheduler.config.get("variance_type") == "learned_range"
    if scheduler.config.get("algorithm_type", "").startswith("sde") and not options:
        options = {"generator": torch.Generator().manual_seed(7)}
    # diffusers takes three channels of a model that predicts its variance too.
    x = x[:, : 3 if learned else 4] * float(scheduler.init_noise_sigma)
    found: list[Tensor] = []
    for i, t in enumerate(scheduler.timesteps[begin:]):
        out = model(scheduler.scale_model_input(x, t), i, learned)
        result = scheduler.step(out, t, x, return_dict=False, **options)
        # x0 is a difference, as exact as the sample that it is of.
        found += [result[0], *(x + x0 for x0 in result[1:])]
        x = result[0]
    return found


# float32: 1e-5 of the largest element; a run of a few steps rounds each to 6e-8 and the model does
# not amplify. float64: what is left is the rounding of two ways to write the same coefficients.
@pytest.mark.parametrize("case", range(len(CASES)), ids=lambda c: f"{c}-{CASES[c][0]}")
def test_trajectory(case: int) -> None:
    kind, config, steps = CASES[case]
    name = f"{kind}Scheduler"
    repaired = THIRD_ORDER if kind == "DPMSolverMultistep" else {}
    with default_dtype(torch.float64):
        reference = in_float64(name, torch.float32, **repaired)(**config)
        expected = trajectory(reference, initial(), steps)
    scheduler = getattr(ours, name)(**config)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        found = trajectory(scheduler, initial(dtype), steps)
        assert all(f.dtype == dtype for f in found)
        check_close(found, expected, tolerance)
    published = getattr(diffusers, name)(**config)
    published.set_timesteps(**arguments(steps))
    assert scheduler.timesteps.dtype == published.timesteps.dtype
    assert scheduler.sigmas.dtype == published.sigmas.dtype
    check_close(
        [scheduler.timesteps, scheduler.sigmas],
        [reference.timesteps.double(), reference.sigmas],
        1e-7,
    )
    assert float(scheduler.init_noise_sigma) == pytest.approx(
        float(reference.init_noise_sigma), rel=1e-12
    )
    assert scheduler.order == published.order


@pytest.mark.parametrize("begin_index", [True, False])
@pytest.mark.parametrize("name", MULTISTEP)
def test_begins_in_the_middle(name: str, begin_index: bool) -> None:
    found = []
    for library in (ours, diffusers):
        scheduler = getattr(library, name)()
        scheduler.set_timesteps(6)
        begin = 2 * scheduler.order
        if begin_index:
            scheduler.set_begin_index(begin)
        x = initial(torch.float32)
        for i, t in enumerate(scheduler.timesteps[begin:]):
            x = scheduler.step(model(scheduler.scale_model_input(x, t), i), t, x).prev_sample
        found.append(x)
    check_close(found[:1], [found[1].double()], 1e-5)


@pytest.mark.parametrize("name", MULTISTEP)
def test_options_may_change_within_a_run(name: str) -> None:
    """What came before stays: a step of the second order is not one of the first."""
    config = {"solver_order": 3} if name != "HeunDiscreteScheduler" else {}
    found = []
    for library in (ours, diffusers):
        scheduler = getattr(library, name)(**config)
        scheduler.set_timesteps(7)
        x = initial(torch.float32)
        for i, t in enumerate(scheduler.timesteps):
            scaled = scheduler.scale_model_input(x, t)
            uncond, cond = model(scaled, i), model(scaled.flip(1), i)
            scale = 3.0 if i < 4 else 1.5
            if library is ours:
                out = torch.cat([uncond, cond])
                x = scheduler.step(out, t, x, guidance_scale=scale).prev_sample
            else:
                x = scheduler.step(uncond + scale * (cond - uncond), t, x).prev_sample
        found.append(x)
    check_close(found[:1], [found[1].double()], 1e-5)


@pytest.mark.parametrize("name", MULTISTEP)
def test_a_step_is_one_kernel(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    kernel = ops.ode_step

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return kernel(*args, **kwargs)

    monkeypatch.setattr(ops, "ode_step", counted)
    scheduler = getattr(ours, name)()
    scheduler.set_timesteps(4)
    x = initial(torch.float32)
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.step(model(scheduler.scale_model_input(x, t), i), t, x).prev_sample
        assert len(calls) == i + 1


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_what_is_kept(name: str) -> None:
    """Pipelines read and change these attributes."""
    both = [getattr(library, name)(solver_order=3) for library in (ours, diffusers)]
    for scheduler in both:
        scheduler.set_timesteps(6)
    x = initial(torch.float32)
    for i in range(4):
        for scheduler in both:
            after = scheduler.step(model(x, i), scheduler.timesteps[i], x).prev_sample
        mine, theirs = both
        assert mine.lower_order_nums == theirs.lower_order_nums
        assert mine.step_index == theirs.step_index
        for found, expected in zip(mine.model_outputs, theirs.model_outputs, strict=True):
            assert (found is None) == (expected is None)
            if found is not None:
                check_close([found], [expected.double()], 1e-5)
        if name.startswith("UniPC"):
            check_close([mine.last_sample], [theirs.last_sample.double()], 1e-5)
        x = after


@pytest.mark.parametrize("config", [SDE, {**SDE_OF_NOISE, "solver_order": 3}])
def test_seeds(config: dict[str, Any]) -> None:
    scheduler = ours.DPMSolverMultistepScheduler(**config)
    x = initial(torch.float32)
    whole = trajectory(scheduler, x, 4, seeds=[11, -5, 2**40])
    part = trajectory(scheduler, x[1:2], 4, seeds=torch.tensor([-5]))
    assert all(torch.equal(a[1:2], b) for a, b in zip(whole, part, strict=True))
    # Step i has draw i + 1.
    scheduler.set_timesteps(4)
    keys = ops.counter_keys([11, -5, 2**40], 3)
    for i, t in enumerate(scheduler.timesteps):
        noise = ops.counter_normal(keys, x[0].numel(), i + 1).view(x.shape)
        x = scheduler.step(model(x, i), t, x, variance_noise=noise).prev_sample
    check_close([x], [whole[-1].double()], 1e-5)
    with pytest.raises(ValueError, match="variance_noise: not together"):
        scheduler.step(x, 0, x, seeds=1, variance_noise=noise)


def test_generators_end_where_they_do_in_diffusers() -> None:
    states = []
    for library in (ours, diffusers):
        scheduler = library.DPMSolverMultistepScheduler(**SDE)
        generator = torch.Generator().manual_seed(1)
        trajectory(scheduler, initial(torch.float32), 3, generator=generator)
        states.append(generator.get_state())
    assert torch.equal(*states)


@pytest.mark.parametrize("name", MULTISTEP)
def test_add_noise(name: str) -> None:
    x, noise = initial(torch.float32), model(initial(torch.float32), 2)
    for begin in (None, 4):
        found = []
        for library in (ours, diffusers):
            scheduler = getattr(library, name)()
            scheduler.set_timesteps(9)
            if begin is not None:
                scheduler.set_begin_index(begin)
            t = scheduler.timesteps[[0, 4, 8]] if begin is None else scheduler.timesteps[4:5]
            found.append(scheduler.add_noise(x, noise, t))
        check_close(found[:1], [found[1].double()], 2e-5)


@pytest.mark.parametrize("config", [{"solver_type": "bh1"}, {"lower_order_final": False}])
def test_unipc_ends_at_the_data(config: dict[str, Any]) -> None:
    """Where diffusers' last step is NaN, or a system without a solution."""
    scheduler = ours.UniPCMultistepScheduler(solver_order=3, **config)
    last = trajectory(scheduler, initial(), 6)[-1]
    assert last.isfinite().all()
    check_close([last], [scheduler.model_outputs[-1]], 1e-12)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("DPMSolverMultistepScheduler", {"solver_type": "heun"}),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver"}),
        ("UniPCMultistepScheduler", {"predict_x0": False}),
    ],
)
def test_a_step_of_no_length_stays(name: str, config: dict[str, Any]) -> None:
    """Karras's last level is the least, and so is the one it ends at."""
    config = {**config, "solver_order": 3, "lower_order_final": False, "use_karras_sigmas": True}
    scheduler = getattr(ours, name)(final_sigmas_type="sigma_min", **config)
    before, after = trajectory(scheduler, initial(), 6)[-2:]
    if name.startswith("UniPC"):
        before = scheduler.last_sample
    assert torch.equal(before, after)


@pytest.mark.parametrize(
    ("name", "config", "steps", "match"),
    [
        ("DPMSolver", {"solver_order": 4}, None, "solver_order: expected 1, 2 or 3"),
        ("DPMSolver", {"algorithm_type": "ddim"}, None, "algorithm_type: expected one of"),
        ("DPMSolver", {"solver_type": "euler"}, None, "solver_type: expected 'midpoint'"),
        ("DPMSolver", {"algorithm_type": "dpmsolver"}, None, "final_sigmas_type: 'zero' is not"),
        ("DPMSolver", {**FLOW, "use_karras_sigmas": True}, None, "use_flow_sigmas: not with"),
        ("DPMSolver", {"prediction_type": "flow_prediction"}, None, "expects use_flow_sigmas"),
        ("DPMSolver", {"final_sigmas_type": "one"}, 4, "final_sigmas_type: expected 'zero'"),
        ("DPMSolver", {}, {"num_inference_steps": 4, "mu": 1.0}, "mu: expected with use_dyn"),
        ("DPMSolver", {}, {"num_inference_steps": 4, "timesteps": [3]}, "one of it and timesteps"),
        ("DPMSolver", {"use_karras_sigmas": True}, {"timesteps": [9, 3]}, "timesteps: not with a"),
        ("DPMSolver", {}, 0, "num_inference_steps: expected 1 to 1000"),
        ("DPMSolver", {"timestep_spacing": "even"}, 4, "timestep_spacing: expected 'linspace'"),
        ("UniPC", {"solver_p": 1}, None, "solver_p: not supported"),
        ("UniPC", {"solver_order": 0}, None, "solver_order: expected at least 1"),
        ("UniPC", {"solver_type": "rk"}, None, "solver_type: expected 'bh1'"),
        ("UniPC", {"thresholding": True, "predict_x0": False}, None, "thresholding: expected with"),
        ("UniPC", {**FLOW, "use_beta_sigmas": True}, None, "use_flow_sigmas: not with"),
        ("UniPC", {"shift_terminal": 0.1}, None, "shift_terminal: expected with"),
        ("UniPC", {"time_shift_type": "cubic"}, None, "time_shift_type: expected"),
        ("UniPC", {**FLOW, "use_dynamic_shifting": True}, 4, "mu: expected with"),
        ("UniPC", {}, {"sigmas": [0.9, 0.1]}, "sigmas: expected with use_flow_sigmas"),
        ("UniPC", {"use_karras_sigmas": True, "use_beta_sigmas": True}, None, "at most one"),
        ("Heun", {}, {"num_inference_steps": 4, "timesteps": [9]}, "expected one of num_infer"),
        ("Heun", {"use_karras_sigmas": True}, {"timesteps": [9, 3]}, "timesteps: not with a"),
        ("Heun", {}, {"num_inference_steps": 4, "num_train_timesteps": 10}, "num_train_timesteps"),
    ],
)
def test_errors(name: str, config: dict[str, Any], steps: Any, match: str) -> None:
    kind = next(full for full in MULTISTEP if full.startswith(name))
    with pytest.raises(ValueError, match=match):
        getattr(ours, kind)(**config).set_timesteps(**arguments(steps))


def test_heun_gives_x0_at_both_calls() -> None:
    both = [library.HeunDiscreteScheduler() for library in (ours, diffusers)]
    for scheduler in both:
        scheduler.set_timesteps(3)
    x = initial(torch.float32)
    for i, t in enumerate(both[0].timesteps):
        found, expected = (s.step(model(x, i), t, x) for s in both)
        assert both[0].state_in_first_order == both[1].state_in_first_order
        check_close([found.pred_original_sample], [expected.pred_original_sample.double()], 1e-5)
        x = found.prev_sample


def test_errors_of_a_step() -> None:
    x = initial(torch.float32)
    for name in MULTISTEP[::2]:
        with pytest.raises(ValueError, match="step: call set_timesteps first"):
            getattr(ours, name)().step(x, 999, x)
    heun = ours.HeunDiscreteScheduler()
    heun.set_timesteps(4)
    heun.set_begin_index(1)
    with pytest.raises(ValueError, match="a run begins with the first of a step's two calls"):
        heun.step(x, heun.timesteps[1], x)


def test_without_diffusers() -> None:
    with without_diffusers() as alone:
        for kind, config, steps in CASES[::3]:
            name = f"{kind}Scheduler"
            single, both = (
                trajectory(getattr(library, name)(**config), initial(torch.float32), steps)
                for library in (alone, ours)
            )
            assert all(torch.equal(a, b) for a, b in zip(single, both, strict=True))
        for name in MULTISTEP:
            configs = [dict(getattr(library, name)().config) for library in (alone, diffusers)]
            defaults = [set(config.pop("_use_default_values")) for config in configs]
            assert configs[0] == configs[1]
            assert defaults[0] == defaults[1]


# The formulas, beside the integrals that they stand for.

ALPHA_SIGMA = (0.3, 0.95), (0.55, 0.8)


# In lambda, about that of the step's begin.
POLYNOMIAL = [0.4, 0.7, -1.3, 0.9]


def integral(kernel: Any, terms: list[float]) -> tuple[float, float]:
    """The integral of a kernel times a polynomial over a step, by quadrature; the step's length."""
    here, there = (formulas.log_snr(*ends) for ends in ALPHA_SIGMA)
    h = there - here
    nodes, weights = numpy.polynomial.legendre.leggauss(24)
    u = (nodes + 1) / 2 * h
    values = numpy.polynomial.Polynomial(terms)(u)
    return float((weights * h / 2 * kernel(h, u) * values).sum()), float(h)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("of_noise", [False, True])
@pytest.mark.parametrize("stochastic", [False, True])
def test_dpm_solver_integrates_polynomials(order: int, of_noise: bool, stochastic: bool) -> None:
    """Exact in the first and second order; in what is called the third the quadratic term counts
    half."""
    (alpha, sigma), (next_alpha, next_sigma) = ALPHA_SIGMA
    terms = POLYNOMIAL[:order]
    halved = [*terms[:2], *(term / 2 for term in terms[2:])]
    rate = 2.0 if stochastic else 1.0
    if of_noise:
        whole, h = integral(lambda h, u: -rate * numpy.exp(h - u), halved)
        expected = next_alpha / alpha * 0.7 + next_sigma * whole
    else:
        whole, h = integral(lambda h, u: rate * numpy.exp(rate * (u - h)), halved)
        drift = next_sigma / sigma * (numpy.exp(-h) if stochastic else 1.0)
        expected = drift * 0.7 + next_alpha * whole
    value, *before = (numpy.polynomial.Polynomial(terms)(u) for u in (0.0, -0.4, -1.1))
    ratios = 0.4 / h, 0.7 / h
    first = second = None
    if order == 2:
        first, _ = formulas.differences(value, before[0], ratios[0])
    elif order == 3:
        first, second = formulas.differences(value, before[0], ratios[0], before[1], ratios[1])
    more: dict[str, Any] = {"solver_type": "heun", "noise": 0.0 if stochastic else None}
    solve = formulas.dpm_solver
    if not of_noise:
        solve, more["eta"] = formulas.dpm_solver_pp, rate - 1
    found = solve(0.7, value, *ALPHA_SIGMA, first, second, **more)
    assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("of_noise", [False, True])
@pytest.mark.parametrize("corrector", [False, True])
@pytest.mark.parametrize("order", [3, 4])
def test_unipc_integrates_polynomials(order: int, corrector: bool, of_noise: bool) -> None:
    (alpha, sigma), (next_alpha, next_sigma) = ALPHA_SIGMA
    here, terms = formulas.log_snr(alpha, sigma), POLYNOMIAL[:order]
    if of_noise:
        whole, h = integral(lambda h, u: -numpy.exp(h - u), terms)
        expected = next_alpha / alpha * 0.7 + next_sigma * whole
    else:
        whole, h = integral(lambda h, u: numpy.exp(u - h), terms)
        expected = next_sigma / sigma * 0.7 + next_alpha * whole
    value = numpy.polynomial.Polynomial(terms)
    earlier = [(value(u), here + u) for u in (-0.4, -1.1, -1.9)[: order - 1 - corrector]]
    reached = value(h) if corrector else None
    found = formulas.unipc(0.7, value(0.0), *ALPHA_SIGMA, earlier, reached, of_noise=of_noise)
    assert found == pytest.approx(expected, rel=1e-12)
