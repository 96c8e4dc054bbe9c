"""Whole runs beside diffusers' own schedulers, computed in float64 throughout."""

import importlib
import inspect
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from fastzoo import ops
from fastzoo.samplers import diffusers as ours

diffusers = pytest.importorskip("diffusers")

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SHAPE = (3, 4, 6, 6)
NAMES = (
    "DDIMScheduler",
    "DDPMScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def in_float64(name: str, drawn_in: torch.dtype) -> Any:
    """diffusers' scheduler with every float32 of its source a float64; noise is drawn in another
    precision, since a generator's numbers depend on it."""
    module = importlib.import_module(getattr(diffusers, name).__module__)
    source = inspect.getsource(module).replace("float32", "float64")
    double = types.ModuleType(module.__name__)
    double.__package__ = module.__package__
    exec(compile(source, module.__file__ or "", "exec"), double.__dict__)
    drawn = double.__dict__.get("randn_tensor")

    def randn(*args: Any, dtype: Any = None, **kwargs: Any) -> Tensor:
        assert drawn is not None
        return drawn(*args, dtype=drawn_in, **kwargs).double()

    double.__dict__["randn_tensor"] = randn
    return double.__dict__[name]


def initial(dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(SHAPE, generator=generator, dtype=torch.float64).to(dtype)


def model(x: Tensor, step: int, learned: bool = False) -> Tensor:
    """A cheap one, smooth enough not to amplify differences."""
    out = torch.tanh(0.7 * x + 0.1 * step) * 1.2 - 0.05 * x
    return torch.cat([out, torch.sin(3 * x)], 1) if learned else out


def trajectory(
    scheduler: Any,
    x: Tensor,
    steps: dict[str, Any],
    options: dict[str, Any],
    learned: bool = False,
    begin: int = 0,
) -> list[Tensor]:
    """Every sample and every x0 of a run."""
    scheduler.set_timesteps(**steps)
    generator = torch.Generator().manual_seed(7)
    x = x * float(scheduler.init_noise_sigma) if hasattr(scheduler, "init_noise_sigma") else x
    found = []
    for i, t in enumerate(scheduler.timesteps[begin:]):
        scaled = x
        if hasattr(scheduler, "scale_model_input"):
            scaled = scheduler.scale_model_input(x, t)
        out = model(scaled, i, learned)
        result = scheduler.step(out, t, x, generator=generator, return_dict=False, **options)
        x = result[0]
        found += result
    return found


ZERO_SNR = {
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
}
SCALED = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
DYNAMIC = {"thresholding": True, "sample_max_value": 1.5, "dynamic_thresholding_ratio": 0.9}

# Scheduler, its config, the arguments of set_timesteps (a number is of steps) and of step.
CASES: list[tuple[str, dict[str, Any], Any, dict[str, Any]]] = [
    ("DDPM", {}, 6, {}),
    ("DDPM", {"prediction_type": "sample", "variance_type": "fixed_large"}, 5, {}),
    ("DDPM", {**ZERO_SNR, "clip_sample": False}, 5, {}),
    ("DDPM", {**DYNAMIC, "timestep_spacing": "linspace"}, 5, {}),
    ("DDPM", {"variance_type": "learned_range", "beta_schedule": "sigmoid"}, 5, {}),
    ("DDPM", {"beta_schedule": "laplace"}, {"timesteps": [900, 500, 320, 1]}, {}),
    ("DDIM", {}, 6, {}),
    ("DDIM", {"clip_sample_range": 0.7}, 5, {"eta": 0.6, "use_clipped_model_output": True}),
    ("DDIM", {**ZERO_SNR, "beta_schedule": "squaredcos_cap_v2"}, 5, {"eta": 0.9}),
    ("DDIM", {**DYNAMIC, "prediction_type": "sample"}, 5, {"eta": 1.0}),
    (
        "DDIM",
        {**SCALED, "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1},
        5,
        {},
    ),
    ("DDIM", {"timestep_spacing": "linspace", "trained_betas": [0.1] * 9, **SCALED}, 4, {}),
    ("DDIM", {}, 1, {}),
    ("EulerDiscrete", {}, 6, {}),
    ("EulerDiscrete", {"use_karras_sigmas": True, **SCALED, "timestep_spacing": "leading"}, 5, {}),
    ("EulerDiscrete", {"use_exponential_sigmas": True, "sigma_min": 0.1, "sigma_max": 9.0}, 5, {}),
    ("EulerDiscrete", {"use_beta_sigmas": True, "final_sigmas_type": "sigma_min"}, 5, {}),
    ("EulerDiscrete", ZERO_SNR, 5, {"s_churn": 1.5, "s_tmin": 0.2, "s_tmax": 30.0}),
    ("EulerDiscrete", {"prediction_type": "sample"}, 5, {"s_churn": 9.0, "s_noise": 1.1}),
    ("EulerDiscrete", {"interpolation_type": "log_linear"}, 5, {}),
    (
        "EulerDiscrete",
        {"timestep_type": "continuous", "prediction_type": "v_prediction"},
        {"sigmas": [14.0, 3.0, 0.7, 0.0]},
        {},
    ),
    ("EulerDiscrete", {}, {"sigmas": [14.0, 3.0, 0.7, 0.0]}, {}),
    ("EulerDiscrete", {}, {"timesteps": [999, 500, 20]}, {}),
    ("EulerDiscrete", {}, 1, {}),
    ("EulerAncestralDiscrete", {}, 6, {}),
    ("EulerAncestralDiscrete", {**SCALED, "timestep_spacing": "leading"}, 5, {}),
    ("EulerAncestralDiscrete", ZERO_SNR, 5, {}),
    ("FlowMatchEulerDiscrete", {}, 6, {}),
    ("FlowMatchEulerDiscrete", {"shift": 3.0, "use_karras_sigmas": True}, 5, {}),
    (
        "FlowMatchEulerDiscrete",
        {"use_dynamic_shifting": True, "shift_terminal": 0.1},
        {"num_inference_steps": 5, "mu": 0.8},
        {},
    ),
    (
        "FlowMatchEulerDiscrete",
        {"use_dynamic_shifting": True, "time_shift_type": "linear", "use_beta_sigmas": True},
        {"num_inference_steps": 5, "mu": 0.8},
        {},
    ),
    ("FlowMatchEulerDiscrete", {"invert_sigmas": True}, 5, {}),
    ("FlowMatchEulerDiscrete", {"stochastic_sampling": True, "shift": 2.0}, 5, {}),
    ("FlowMatchEulerDiscrete", {"shift": 2.0}, {"sigmas": [1.0, 0.6, 0.2]}, {}),
]


def check_close(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    assert len(found) == len(expected)
    for f, e in zip(found, expected, strict=True):
        scale = e.abs().max().item()
        assert (f.double() - e).abs().max().item() <= tolerance * scale


# float32: 1e-5 of the largest element; a run of a few steps rounds each to 6e-8 and the model does
# not amplify. float64: what is left is the rounding of two ways to write the same coefficients.
@pytest.mark.parametrize("case", range(len(CASES)), ids=lambda c: f"{c}-{CASES[c][0]}")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_trajectory(case: int, dtype: torch.dtype, tolerance: float) -> None:
    kind, config, steps, options = CASES[case]
    name = f"{kind}Scheduler"
    if not isinstance(steps, dict):
        steps = {"num_inference_steps": steps}
    learned = config.get("variance_type") == "learned_range"
    if "trained_betas" in config:
        config = {**config, "num_train_timesteps": len(config["trained_betas"])}
    with default_dtype(torch.float64):
        reference = in_float64(name, dtype)(**config)
        expected = trajectory(reference, initial(), steps, options, learned)
    scheduler = getattr(ours, name)(**config)
    found = trajectory(scheduler, initial(dtype), steps, options, learned)
    assert all(f.dtype == dtype for f in found)
    check_close(found, expected, tolerance)

    # What users read has diffusers' dtypes; a float32 timestep of 1000 is good to 1e-4.
    published = getattr(diffusers, name)(**config)
    published.set_timesteps(**steps)
    assert scheduler.timesteps.dtype == published.timesteps.dtype
    check_close([scheduler.timesteps], [reference.timesteps.double()], 1e-7)
    if hasattr(published, "sigmas"):
        assert scheduler.sigmas.dtype == published.sigmas.dtype
        check_close([scheduler.sigmas], [reference.sigmas], 1e-7)
    if hasattr(published, "init_noise_sigma"):
        ratio = float(scheduler.init_noise_sigma) / float(reference.init_noise_sigma)
        assert ratio == pytest.approx(1, rel=1e-12)
    assert len(scheduler) == len(published)
    assert scheduler.order == published.order
