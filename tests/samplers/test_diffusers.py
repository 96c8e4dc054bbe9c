"""Whole runs beside diffusers' own schedulers, computed in float64 throughout."""

import functools
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
# Those of test_diffusers_multistep.py.
MULTISTEP = (
    "DPMSolverMultistepScheduler",
    "HeunDiscreteScheduler",
    "UniPCMultistepScheduler",
)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def in_float64(name: str, drawn_in: torch.dtype, **repaired: str) -> Any:
    """diffusers' scheduler with every float32 of its source a float64; noise is drawn in another
    precision, since a generator's numbers depend on it. ``repaired`` is a part of the source,
    ``wrong``, that stands as ``right``."""
    module = importlib.import_module(getattr(diffusers, name).__module__)
    source = inspect.getsource(module).replace("float32", "float64")
    if repaired:
        assert source.count(repaired["wrong"]) == 1
        source = source.replace(repaired["wrong"], repaired["right"])
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


def ready(name: str, n: int = 5, **config: Any) -> Any:
    scheduler = getattr(ours, name)(**config)
    scheduler.set_timesteps(n)
    return scheduler


def run(
    scheduler: Any, x: Tensor, predict: Callable[[Tensor, int], Tensor] = model, **options: Any
) -> Tensor:
    for i, t in enumerate(scheduler.timesteps):
        scaled = x
        if hasattr(scheduler, "scale_model_input"):
            scaled = scheduler.scale_model_input(x, t)
        x = scheduler.step(predict(scaled, i), t, x, **options).prev_sample
    return x


@pytest.mark.parametrize("name", [*NAMES, *MULTISTEP])
def test_signatures(name: str) -> None:
    theirs = getattr(diffusers, name)
    for method in ("__init__", "set_timesteps", "step"):
        expected = inspect.signature(getattr(theirs, method)).parameters
        found = inspect.signature(getattr(getattr(ours, name), method)).parameters
        assert list(found)[: len(expected)] == list(expected)
        for argument, parameter in expected.items():
            assert found[argument].default == parameter.default
        assert {p.kind for p in list(found.values())[len(expected) :]} <= {
            inspect.Parameter.KEYWORD_ONLY
        }


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("begin_index", [True, False])
def test_begins_in_the_middle(name: str, begin_index: bool) -> None:
    found = []
    for library in (ours, diffusers):
        scheduler = getattr(library, name)()
        scheduler.set_timesteps(6)
        if begin_index and hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(2)
        x, generator = initial(torch.float32), torch.Generator().manual_seed(1)
        for i, t in enumerate(scheduler.timesteps[2:]):
            if hasattr(scheduler, "scale_model_input"):
                scheduler.scale_model_input(x, t)
            x = scheduler.step(model(x, i), t, x, generator=generator).prev_sample
        found.append(x)
    check_close(found[:1], [found[1].double()], 1e-5)


def test_timesteps_in_any_order() -> None:
    # DDIM takes any timestep at any time, also one that is not of the run.
    x, out = initial(torch.float32), model(initial(torch.float32), 0)
    mine, theirs = ready("DDIMScheduler", 10), diffusers.DDIMScheduler()
    theirs.set_timesteps(10)
    for t in (500, 7, 900, torch.tensor(500), 333, 7):
        found, expected = (s.step(out, t, x).prev_sample for s in (mine, theirs))
        check_close([found], [expected.double()], 1e-5)
    with pytest.raises(ValueError, match="timestep: 7 is not one of this run's"):
        ready("DDPMScheduler", 10).step(out, 7, x)
    with pytest.raises(ValueError, match="timestep: expected one of scheduler"):
        ready("EulerDiscreteScheduler").step(out, 1, x)


def test_runs_end() -> None:
    scheduler, x = ready("FlowMatchEulerDiscreteScheduler", 2), initial(torch.float32)
    run(scheduler, x)
    with pytest.raises(ValueError, match="2 steps; set_timesteps begins anew"):
        scheduler.step(x, scheduler.timesteps[-1], x)


class OnDevice(Tensor):
    """Stands for a tensor of a GPU, whose values one does not read without waiting for it."""

    is_cpu = False

    def item(self) -> Any:
        raise AssertionError("read a value on a device")

    tolist = __bool__ = __float__ = __int__ = __index__ = item


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("copies", [False, True])
def test_no_timestep_on_a_device_is_read(name: str, copies: bool) -> None:
    x = initial(torch.float32)
    expected = ready(name, 6)
    found = ready(name, 6)
    seeds = {} if name.startswith("Flow") else {"seeds": 4}
    found.timesteps = found._shown_timesteps = found.timesteps.as_subclass(OnDevice)
    if copies:
        # No part of the scheduler's own timesteps, so that only their order tells.
        found.set_begin_index(2)
    y = x
    for i in range(2, 6):
        t = expected.timesteps[i]
        on_device = found.timesteps[i]
        if copies:
            on_device = on_device.as_subclass(Tensor).clone().as_subclass(OnDevice)
        for scheduler in (expected, found):
            if hasattr(scheduler, "scale_model_input"):
                scheduler.scale_model_input(x, t if scheduler is expected else on_device)
        x = expected.step(model(x, i), t, x, **seeds).prev_sample
        y = found.step(model(y, i), on_device, y, **seeds).prev_sample
    assert torch.equal(x, y)


def test_assigned_levels_are_taken() -> None:
    scheduler = ready("EulerDiscreteScheduler", 4)
    scheduler.sigmas = scheduler.sigmas / 2
    x = initial(torch.float32)
    first, second = scheduler.sigmas[:2].tolist()
    scheduler.scale_model_input(x, scheduler.timesteps[0])
    out = model(x, 0)
    expected = x.double() + (second - first) * out.double()
    found = scheduler.step(out, scheduler.timesteps[0], x).prev_sample
    check_close([found], [expected], 1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_forward_process(name: str) -> None:
    mine, theirs = getattr(ours, name)(), getattr(diffusers, name)()
    x, noise = initial(torch.float32), model(initial(torch.float32), 2)
    whole = name in ("DDIMScheduler", "DDPMScheduler")
    timesteps = torch.tensor([1, 640, 998]) if whole else theirs.timesteps[[3, 500, 990]]
    for method in ("add_noise", "get_velocity", "scale_noise"):
        # Euler's get_velocity is diffusers' own: see the page.
        if method in vars(type(mine)) or any(
            method in vars(c) for c in type(mine).__mro__ if c.__module__.startswith("fastzoo")
        ):
            order = (x, timesteps, noise) if method == "scale_noise" else (x, noise, timesteps)
            found, expected = (getattr(s, method)(*order) for s in (mine, theirs))
            check_close([found], [expected.double()], 2e-5)
    if not whole:
        method = "scale_noise" if hasattr(mine, "scale_noise") else "add_noise"
        found = []
        for scheduler in (mine, theirs):
            scheduler.set_timesteps(8)
            scheduler.set_begin_index(3)
            t = scheduler.timesteps[3:4]
            order = (x, t, noise) if method == "scale_noise" else (x, noise, t)
            found.append(getattr(scheduler, method)(*order))
        check_close(found[:1], [found[1].double()], 2e-5)


@pytest.mark.parametrize("name", NAMES)
def test_seeds(name: str) -> None:
    config: dict[str, Any] = {}
    options: dict[str, Any] = {"seeds": [11, -5, 2**40]}
    if name == "DDIMScheduler":
        options["eta"] = 1.0
    if name == "EulerDiscreteScheduler":
        options["s_churn"] = 2.0
    if name == "FlowMatchEulerDiscreteScheduler":
        config["stochastic_sampling"] = True
    scheduler = ready(name, 4, **config)
    x = initial(torch.float32)
    whole = run(scheduler, x, **options)
    scheduler.set_timesteps(4)
    part = run(scheduler, x[1:2], **{**options, "seeds": torch.tensor([-5])})
    assert torch.equal(whole[1:2], part)
    scheduler.set_timesteps(4)
    assert not torch.equal(whole, run(scheduler, x, **{**options, "seeds": 11}))


def test_step_i_uses_draw_i_plus_1() -> None:
    scheduler, theirs = ready("DDIMScheduler", 4), diffusers.DDIMScheduler()
    theirs.set_timesteps(4)
    x, t = initial(torch.float32), int(scheduler.timesteps[2])
    keys = ops.counter_keys(9, len(x))
    noise = ops.counter_normal(keys, x[0].numel(), 3).view(x.shape)
    found = scheduler.step(model(x, 0), t, x, eta=1.0, seeds=9).prev_sample
    expected = theirs.step(model(x, 0), t, x, eta=1.0, variance_noise=noise).prev_sample
    check_close([found], [expected.double()], 1e-5)
    given = scheduler.step(model(x, 0), t, x, eta=1.0, variance_noise=noise).prev_sample
    check_close([given], [found.double()], 1e-6)
    with pytest.raises(ValueError, match="variance_noise: not together with"):
        scheduler.step(x, t, x, eta=1.0, seeds=9, variance_noise=noise)


def test_generators() -> None:
    # A list of one for each sample, as diffusers draws from it.
    x, found = initial(torch.float32), []
    for library in (ours, diffusers):
        scheduler = library.EulerAncestralDiscreteScheduler()
        scheduler.set_timesteps(3)
        generators = [torch.Generator().manual_seed(i) for i in range(len(x))]
        found.append(run(scheduler, x, generator=generators))
    check_close(found[:1], [found[1].double()], 1e-5)
    with pytest.raises(ValueError, match="generator: expected 1 or 3, got 2"):
        ready("DDPMScheduler").step(x, 800, x, generator=generators[:2])


@pytest.mark.parametrize("rescale", [0.0, 0.7])
@pytest.mark.parametrize("name", [*NAMES, *MULTISTEP])
def test_guidance(name: str, rescale: float) -> None:
    """Beside the pipelines' own lines before a step of diffusers."""
    scale = 4.5

    def doubled(x: Tensor, i: int) -> Tensor:
        return torch.cat([model(x, i), model(x.flip(1), i + 1)])

    def guided(x: Tensor, i: int) -> Tensor:
        uncond, cond = doubled(x, i).chunk(2)
        out = uncond + scale * (cond - uncond)
        dims = tuple(range(1, x.dim()))
        ratio = cond.std(dims, keepdim=True) / out.std(dims, keepdim=True)
        return rescale * out * ratio + (1 - rescale) * out

    x, options = initial(torch.float32), {}
    if name in ("DDPMScheduler", "EulerAncestralDiscreteScheduler"):
        options["generator"] = torch.Generator().manual_seed(4)
    theirs = getattr(diffusers, name)()
    theirs.set_timesteps(4)
    expected = run(theirs, x, guided, **options)
    if options:
        options["generator"].manual_seed(4)
    found = run(
        ready(name, 4), x, doubled, guidance_scale=scale, guidance_rescale=rescale, **options
    )
    check_close([found], [expected.double()], 2e-5)
    with pytest.raises(ValueError, match="model_output: expected a batch of 6"):
        run(ready(name, 4), x, model, guidance_scale=scale)


def test_guidance_thresholds_what_it_guides() -> None:
    x = initial(torch.float32)
    out = torch.cat([model(x, 0), model(x, 1)])
    config = {**DYNAMIC, "prediction_type": "v_prediction"}
    scheduler = ready("DDPMScheduler", 4, **config)
    found = scheduler.step(out, 0, x, guidance_scale=3.0, guidance_rescale=0.5)
    uncond, cond = out.chunk(2)
    factor = ops.guidance_factor(cond, uncond, 3.0, 0.5).view(-1, 1, 1, 1)
    theirs = diffusers.DDPMScheduler(**config)
    theirs.set_timesteps(4)
    expected = theirs.step(factor * (uncond + 3 * (cond - uncond)), 0, x)
    check_close(
        [found.prev_sample, found.pred_original_sample],
        [expected.prev_sample.double(), expected.pred_original_sample.double()],
        1e-5,
    )


@pytest.mark.parametrize("name", [*NAMES, *MULTISTEP])
@pytest.mark.parametrize("of_output", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("of_sample", [torch.float16, torch.bfloat16])
def test_low_precision(name: str, of_sample: torch.dtype, of_output: torch.dtype) -> None:
    """The arithmetic is float32's, and the result has diffusers' dtype."""
    x = initial().to(of_sample)
    out = model(x.double(), 0).to(of_output)
    results = []
    for scheduler, dtype in ((getattr(diffusers, name)(), None), (ready(name), torch.float64)):
        scheduler.set_timesteps(5)
        t = scheduler.timesteps[-1]
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(x, t)
        results.append(scheduler.step(out, t, x).prev_sample)
        if dtype is not None:
            scheduler.set_timesteps(5)
            exact = scheduler.step(out.to(dtype), t, x.to(dtype)).prev_sample
    expected, found = results
    assert found.dtype == expected.dtype
    # One rounding of the result, and of a float32 what float32 loses.
    unit = max(torch.finfo(found.dtype).eps / 2, 1e-6)
    error = (found.double() - exact).abs()
    assert (error <= unit * exact.abs() + unit * 2**-8).all()


def test_mixed_float64() -> None:
    x = initial()
    found = ready("DDIMScheduler").step(model(x, 0).float(), 800, x).prev_sample
    expected = ready("DDIMScheduler").step(model(x, 0).float().double(), 800, x).prev_sample
    assert found.dtype == torch.float64
    assert torch.equal(found, expected)
    out = ready("EulerAncestralDiscreteScheduler")
    out.scale_model_input(x, out.timesteps[0])
    assert out.step(x.float(), out.timesteps[0], x).prev_sample.dtype == torch.float32


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler"])
def test_zero_terminal_snr(name: str) -> None:
    config = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    x = initial(torch.float32)
    scheduler = ready(name, **config)
    with pytest.raises(ValueError, match="prediction_type: 'epsilon' says nothing of the data"):
        run(scheduler, x)
    # A run that begins later does not meet it.
    scheduler.set_timesteps(5)
    t = scheduler.timesteps[1]
    assert scheduler.step(model(x, 0), t, x).prev_sample.isfinite().all()
    for prediction in ("v_prediction", "sample"):
        assert run(ready(name, **config, prediction_type=prediction), x).isfinite().all()


def test_a_level_of_zero_stays() -> None:
    ends = []
    for sigmas in ([3.0, 1.0, 0.0], [3.0, 1.0, 0.0, 0.0]):
        scheduler = ours.EulerDiscreteScheduler()
        scheduler.set_timesteps(sigmas=sigmas)
        ends.append(run(scheduler, initial(torch.float32)))
    assert torch.equal(*ends)


def test_gradients_reach_the_model() -> None:
    x = initial()
    out = model(x, 0).requires_grad_()
    scheduler = ready("DDIMScheduler", clip_sample=False)
    result = scheduler.step(out, 600, x)
    (result.prev_sample.sum() + result.pred_original_sample.sum()).backward()
    bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    a, b = bar[600], bar[400]
    of_x0 = -((1 - a) / a).sqrt()
    expected = of_x0 * (b.sqrt() + 1) + (1 - b).sqrt()
    torch.testing.assert_close(out.grad, expected.expand_as(x), rtol=1e-10, atol=0)


def test_x0_is_computed_when_read() -> None:
    x = initial(torch.float32)
    out = model(x, 0)
    for options in ({"eta": 0.5, "seeds": 3}, {}):
        step = functools.partial(ready("DDIMScheduler", **DYNAMIC).step, out, 800, **options)
        found, both = step(x), step(x, return_dict=False)
        assert torch.equal(found.pred_original_sample, both[1])
        assert torch.equal(found.prev_sample, both[0])
        late = step(x)
        x.add_(0.5)
        with pytest.raises(RuntimeError, match="changed in place since"):
            late.to_tuple()
        assert torch.equal(found[1], both[1])


def test_outputs_read_as_diffusers() -> None:
    x = initial(torch.float32)
    found = ready("DDIMScheduler").step(model(x, 0), 800, x)
    assert found["prev_sample"] is found.prev_sample is found[0]
    assert found.to_tuple()[1] is found.pred_original_sample
    assert len(found) == 2
    flow = ready("FlowMatchEulerDiscreteScheduler")
    assert len(flow.step(x, flow.timesteps[0], x)) == 1


# Their place in diffusers.


@pytest.mark.parametrize("name", [*NAMES, *MULTISTEP])
def test_config(name: str, tmp_path: Any) -> None:
    own, theirs = getattr(ours, name), getattr(diffusers, name)
    scheduler = own(num_train_timesteps=77)
    assert isinstance(scheduler, theirs)
    assert dict(scheduler.config) == dict(theirs(num_train_timesteps=77).config)
    scheduler.save_pretrained(tmp_path)
    loaded = own.from_pretrained(tmp_path)
    assert type(loaded) is own
    assert loaded.config.num_train_timesteps == 77
    # From diffusers' config, and the other way: a pipeline that rebuilds its scheduler keeps ours.
    assert type(own.from_config(theirs().config)) is own
    kept = theirs.from_config(scheduler.config)
    assert type(kept) is own
    assert kept.config.num_train_timesteps == 77
    assert type(theirs.from_config(dict(scheduler.config))) is theirs
    assert type(theirs.from_config(theirs().config)) is theirs
    assert type(theirs.from_pretrained(tmp_path)) is theirs


def test_pipeline_keeps_the_scheduler(tmp_path: Any) -> None:
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    images = []
    for scheduler in (ours.DDIMScheduler(), diffusers.DDIMScheduler()):
        pipeline = diffusers.DDIMPipeline(unet, scheduler)
        assert type(pipeline.scheduler) is type(scheduler)
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(2)
        result = pipeline(2, generator, eta=0.5, num_inference_steps=3, output_type="np")
        images.append(torch.from_numpy(result.images))
        if isinstance(scheduler, ours.DDIMScheduler):
            pipeline.save_pretrained(tmp_path)
    torch.testing.assert_close(images[0], images[1], rtol=0, atol=1e-5)
    loaded = diffusers.DDIMPipeline.from_pretrained(tmp_path, local_files_only=True)
    assert type(loaded.scheduler) is ours.DDIMScheduler


def test_inherited_per_token_timesteps() -> None:
    x = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    results = []
    for library in (ours, diffusers):
        scheduler = library.FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(4)
        t = scheduler.timesteps[1]
        tokens = t.expand(2, 5)
        results.append(scheduler.step(x, t, x, per_token_timesteps=tokens).prev_sample)
    assert torch.equal(*results)
    scheduler = ready("FlowMatchEulerDiscreteScheduler")
    with pytest.raises(NotImplementedError, match="per_token_timesteps"):
        scheduler.step(x, 1000.0, x, per_token_timesteps=tokens, seeds=1)


@contextmanager
def without_diffusers() -> Iterator[Any]:
    """The package as it is where diffusers is not installed."""
    package = "fastzoo.samplers.diffusers"
    hidden = {
        name: module
        for name, module in sys.modules.items()
        if name.split(".")[0] == "diffusers" or name == package or name.startswith(package + ".")
    }
    for name in hidden:
        del sys.modules[name]
    sys.modules["diffusers"] = None  # type: ignore[assignment]
    try:
        yield importlib.import_module(package)
    finally:
        for name in [n for n in sys.modules if n == package or n.startswith(package + ".")]:
            del sys.modules[name]
        del sys.modules["diffusers"]
        sys.modules.update(hidden)
        sys.modules["fastzoo.samplers"].diffusers = hidden[package]  # type: ignore[attr-defined]


def test_without_diffusers() -> None:
    with without_diffusers() as alone:
        assert not issubclass(alone.DDIMScheduler, diffusers.DDIMScheduler)
        for kind, config, steps, options in CASES:
            name = f"{kind}Scheduler"
            if "trained_betas" in config:
                config = {**config, "num_train_timesteps": len(config["trained_betas"])}
            learned = config.get("variance_type") == "learned_range"
            arguments = steps if isinstance(steps, dict) else {"num_inference_steps": steps}
            x = initial(torch.float32)
            single, both = (
                trajectory(getattr(library, name)(**config), x, arguments, options, learned)
                for library in (alone, ours)
            )
            assert all(torch.equal(a, b) for a, b in zip(single, both, strict=True))
        made = alone.DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False)
        for name in NAMES:
            both = [dict(getattr(library, name)().config) for library in (alone, diffusers)]
            defaults = [set(config.pop("_use_default_values")) for config in both]
            assert both[0] == both[1]
            assert defaults[0] == defaults[1]
        # As diffusers does it: what was not chosen is the other one's default, and what that one
        # has no argument for is kept for a third.
        euler = alone.EulerDiscreteScheduler.from_config(made.config, use_karras_sigmas=True)
        assert euler.config.beta_schedule == "scaled_linear"
        assert euler.config.timestep_spacing == "linspace"
        assert euler.config.use_karras_sigmas
        back = alone.DDPMScheduler.from_config(euler.config)
        assert back.config.clip_sample is False
        with pytest.raises(TypeError, match="has no arguments"):
            alone.DDIMScheduler.from_config(made.config, s_churn=1)
        flow = alone.FlowMatchEulerDiscreteScheduler()
        x = initial(torch.float32)
        with pytest.raises(NotImplementedError, match="per_token_timesteps"):
            flow.step(x, 1000.0, x, per_token_timesteps=x)
