"""DPM-Solver and DPM-Solver++ (Lu et al. 2022), of the ODE and the SDE, multistep."""

import itertools
import math
from typing import Any

import numpy
import torch
from torch import Tensor

from fastzoo.samplers import formulas, schedules
from fastzoo.samplers.algebra import Combination
from fastzoo.samplers.diffusers.base import SchedulerOutput, parent, register_to_config
from fastzoo.samplers.diffusers.multistep import Multistep, alike
from fastzoo.samplers.diffusers.noise_levels import converted, sigma_to_t

_ALGORITHMS = ("dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver")
# Below this many steps lower_order_final is heeded.
_FEW = 15


class DPMSolverMultistepScheduler(Multistep, parent("DPMSolverMultistepScheduler")):  # type: ignore[misc]
    """diffusers' ``DPMSolverMultistepScheduler``, each step one kernel.

    Differences: the third order of ``sde-dpmsolver++`` has the second derivative's weight that
    vanishes with the step (diffusers' goes to -1), and ``sde-dpmsolver`` has a third order.
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Any = None,
        solver_order: int = 2,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        algorithm_type: str = "dpmsolver++",
        solver_type: str = "midpoint",
        lower_order_final: bool = True,
        euler_at_final: bool = False,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        use_lu_lambdas: bool = False,
        use_flow_sigmas: bool = False,
        flow_shift: float = 1.0,
        final_sigmas_type: str = "zero",
        lambda_min_clipped: float = -math.inf,
        variance_type: str | None = None,
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
        use_dynamic_shifting: bool = False,
        time_shift_type: str = "exponential",
    ) -> None:
        # What other schedulers of diffusers' call theirs.
        if algorithm_type == "deis":
            self.register_to_config(algorithm_type="dpmsolver++")
        if solver_type in ("logrho", "bh1", "bh2"):
            self.register_to_config(solver_type="midpoint")
        config = self.config
        if config.algorithm_type not in _ALGORITHMS:
            raise ValueError(f"algorithm_type: expected one of {_ALGORITHMS}, got {algorithm_type}")
        if config.solver_type not in ("midpoint", "heun"):
            raise ValueError(f"solver_type: expected 'midpoint' or 'heun', got {solver_type!r}")
        if solver_order not in (1, 2, 3):
            raise ValueError(f"solver_order: expected 1, 2 or 3, got {solver_order!r}")
        if use_flow_sigmas and (
            use_karras_sigmas or use_exponential_sigmas or use_beta_sigmas or use_lu_lambdas
        ):
            raise ValueError("use_flow_sigmas: not with another placing of the noise levels")
        self._of_noise = not config.algorithm_type.endswith("++")
        self._stochastic = config.algorithm_type.startswith("sde")
        if self._of_noise and final_sigmas_type == "zero":
            raise ValueError(
                f"final_sigmas_type: 'zero' is not for {algorithm_type}, which steps by the noise; "
                "expected 'sigma_min'"
            )
        self._set_noise_levels()

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        mu: float | None = None,
        timesteps: Any = None,
    ) -> None:
        """A run of ``num_inference_steps`` by ``timestep_spacing`` and the config's levels, or of
        these timesteps; ``mu`` is the logarithm of a ``flow_shift`` in the config's place."""
        config, training = self.config, self._training
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError("num_inference_steps: expected one of it and timesteps")
        if mu is not None and not config.use_dynamic_shifting:
            raise ValueError("mu: expected with use_dynamic_shifting")
        if timesteps is None:
            clipped = numpy.searchsorted(self._lambdas[::-1], config.lambda_min_clipped)
            times = self._spaced(num_inference_steps, len(training) - int(clipped))
            n = num_inference_steps
        else:
            times = numpy.asarray(timesteps).astype(numpy.int64)
            n = len(times)
        assert n is not None
        levels = converted(config, training[::-1], n)
        if config.use_lu_lambdas and levels is None:
            # Equal steps of lambda.
            levels = schedules.exponential_sigmas(n, training[0], training[-1], final=None).numpy()
        if timesteps is not None and (levels is not None or config.use_flow_sigmas):
            raise ValueError("timesteps: not with a config that places the noise levels")
        if levels is not None:
            times = sigma_to_t(levels, training)
            between = config.use_exponential_sigmas or config.use_beta_sigmas
            if not between and config.beta_schedule != "squaredcos_cap_v2":
                times = times.round()
        elif config.use_flow_sigmas:
            shift = config.flow_shift if mu is None else math.exp(mu)
            ramp = 1 - numpy.linspace(1, 1 / len(training), n + 1)
            levels = schedules.flow_shift(ramp, shift).numpy()[:0:-1]
            times = levels * len(training)
        else:
            levels = self._levels_at(times)
        self._begin(times, numpy.append(levels, self._final(training[0])), device)

    def groups(self, steps: numpy.ndarray) -> list[numpy.ndarray]:
        config, left = self.config, len(self._grid) - steps
        few = config.lower_order_final and len(self._grid) < _FEW
        orders = self._orders(steps)
        if few or config.euler_at_final or config.final_sigmas_type == "zero":
            orders[left == 1] = 1
        if few:
            orders[left == 2] = numpy.minimum(orders[left == 2], 2)
        self._plan = dict(zip(steps.tolist(), orders.tolist(), strict=True))
        return alike(steps, orders, self._levels[steps + 1] == 0)

    def rows(
        self, steps: numpy.ndarray, x: Combination, output: Combination, noise: Combination
    ) -> dict[str, Combination]:
        rows, value = self._value(steps, x, output, self._of_noise)
        order = self._plan[int(steps[0])]
        first = second = None
        if order > 1:
            lambdas = [self._lambda(steps + 1 - k) for k in range(order + 1)]
            h, *lengths = (later - earlier for later, earlier in itertools.pairwise(lambdas))
            values = [self._before(k) for k in range(1, order)]
            pairs = [(v, length / h) for v, length in zip(values, lengths, strict=True)]
            first, second = formulas.differences(value, *itertools.chain(*pairs))
        here, there = (self._alpha_sigma(self._levels[at]) for at in (steps, steps + 1))
        drawn = noise if self._stochastic else None
        more = {"noise": drawn, "solver_type": self.config.solver_type}
        if self._of_noise:
            prev_sample = formulas.dpm_solver(x, value, here, there, first, second, **more)
        else:
            more["eta"] = 1.0 if self._stochastic else 0.0
            prev_sample = formulas.dpm_solver_pp(x, value, here, there, first, second, **more)
        if drawn is not None:
            # A step without noise draws it too, as diffusers does: later draws are the same.
            prev_sample = prev_sample + numpy.zeros(len(steps)) * drawn
        return {**rows, "prev_sample": prev_sample}

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Any = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
        *,
        seeds: Any = None,
        guidance_scale: float | None = None,
        guidance_rescale: float = 0.0,
    ) -> Any:
        """The sample at the next timestep; see ``docs/samplers/diffusers.md``."""
        config = self.config
        if self.num_inference_steps is None:
            raise ValueError("step: call set_timesteps first")
        if variance_noise is not None and (generator is not None or seeds is not None):
            raise ValueError("variance_noise: not together with generator or seeds")
        learned = config.variance_type in ("learned", "learned_range")
        if learned and config.prediction_type == "epsilon":
            model_output = model_output[:, :3]
        prev_sample, *values = self._advance(
            model_output,
            timestep,
            sample,
            history=self._history(),
            noise=variance_noise,
            noise_dtype=torch.float32,
            generator=generator,
            seeds=seeds,
            guidance_scale=guidance_scale,
            guidance_rescale=guidance_rescale,
        )
        self._remember(values[-1])
        return SchedulerOutput(prev_sample) if return_dict else (prev_sample,)
