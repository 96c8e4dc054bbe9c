"""UniPC (Zhao et al. 2023): a multistep predictor, corrected by what the model says at its end."""

import math
from typing import Any

import numpy
import torch
from torch import Tensor

from fastzoo.samplers import formulas, schedules
from fastzoo.samplers.algebra import Combination, tensor
from fastzoo.samplers.diffusers.base import SchedulerOutput, parent, register_to_config
from fastzoo.samplers.diffusers.multistep import Multistep, alike
from fastzoo.samplers.diffusers.noise_levels import converted, sigma_to_t

# Rectified flows begin here and not at 1, where lambda is infinite.
_LEAST_ALPHA = 1e-6


class UniPCMultistepScheduler(Multistep, parent("UniPCMultistepScheduler")):  # type: ignore[misc]
    """diffusers' ``UniPCMultistepScheduler``, corrector and predictor of a step one kernel.

    Differences: ``solver_p`` is not supported. A last step to no noise is of the first order with
    ``lower_order_final=False`` too, where diffusers gives NaN.
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
        predict_x0: bool = True,
        solver_type: str = "bh2",
        lower_order_final: bool = True,
        disable_corrector: list[int] = [],  # noqa: B006 - as diffusers has it
        solver_p: Any = None,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        use_flow_sigmas: bool = False,
        flow_shift: float = 1.0,
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
        final_sigmas_type: str = "zero",
        rescale_betas_zero_snr: bool = False,
        use_dynamic_shifting: bool = False,
        time_shift_type: str = "exponential",
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        shift_terminal: float | None = None,
    ) -> None:
        # What other schedulers of diffusers' call theirs.
        if solver_type in ("midpoint", "heun", "logrho"):
            self.register_to_config(solver_type="bh2")
        elif solver_type not in ("bh1", "bh2"):
            raise ValueError(f"solver_type: expected 'bh1' or 'bh2', got {solver_type!r}")
        if solver_p is not None:
            raise ValueError("solver_p: not supported; expected None, UniPC's own predictor")
        if thresholding and not predict_x0:
            raise ValueError("thresholding: expected with predict_x0, as it is of x0")
        if use_flow_sigmas and (use_exponential_sigmas or use_beta_sigmas):
            raise ValueError(
                "use_flow_sigmas: not with use_exponential_sigmas or use_beta_sigmas, whose levels "
                "are not a rectified flow's"
            )
        if shift_terminal is not None and not use_flow_sigmas:
            raise ValueError("shift_terminal: expected with use_flow_sigmas")
        if time_shift_type not in ("exponential", "linear"):
            raise ValueError(
                f"time_shift_type: expected 'exponential' or 'linear', got {time_shift_type!r}"
            )
        self.predict_x0 = predict_x0
        self.disable_corrector = disable_corrector
        self.solver_p = None
        self._set_noise_levels()

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        sigmas: Any = None,
        mu: float | None = None,
    ) -> None:
        """A run of ``num_inference_steps`` by ``timestep_spacing`` and the config's levels, or of
        these levels of a rectified flow, shifted; ``mu`` is the dynamic shift."""
        config, training = self.config, self._training
        if config.use_dynamic_shifting and mu is None:
            raise ValueError("mu: expected with use_dynamic_shifting")
        if sigmas is not None:
            if not config.use_flow_sigmas or config.use_karras_sigmas:
                raise ValueError("sigmas: expected with use_flow_sigmas and no other placing")
            num_inference_steps = len(sigmas)
        times = self._spaced(num_inference_steps, len(training))
        n = len(times) if num_inference_steps is None else num_inference_steps
        levels = converted(config, training[::-1], n)
        if levels is not None:
            least = levels[-1]
            if config.use_flow_sigmas:
                levels = levels / (levels + 1)
                least, times = levels[-1], levels * len(training)
            else:
                times = sigma_to_t(levels, training)
                times = times.round() if config.use_karras_sigmas else times
        elif config.use_flow_sigmas:
            levels = self._flow(n, sigmas, mu)
            least, times = levels[-1], levels * len(training)
        else:
            levels, least = self._levels_at(times), training[0]
        self._begin(times, numpy.append(levels, self._final(least)), device)

    def _flow(self, n: int, sigmas: Any, mu: float | None) -> numpy.ndarray:
        """The levels of a rectified flow."""
        config = self.config
        if sigmas is None:
            sigmas = numpy.linspace(1, 1 / len(self._training), n + 1)[:-1]
        shift = config.flow_shift
        if config.use_dynamic_shifting:
            assert mu is not None
            shift = math.exp(mu) if config.time_shift_type == "exponential" else mu
        levels = schedules.flow_shift(numpy.asarray(sigmas, dtype=numpy.float64), shift).numpy()
        if config.shift_terminal:
            levels = 1 - (1 - levels) / ((1 - levels[-1]) / (1 - config.shift_terminal))
        if abs(levels[0] - 1) < _LEAST_ALPHA:
            levels[0] -= _LEAST_ALPHA
        return levels

    def _begin(
        self, times: numpy.ndarray, levels: numpy.ndarray, device: torch.device | str | None
    ) -> None:
        super()._begin(times, levels, device)
        self.last_sample: Tensor | None = None
        self.this_order = 0

    def groups(self, steps: numpy.ndarray) -> list[numpy.ndarray]:
        orders = self._orders(steps)
        if self.config.lower_order_final:
            orders = numpy.minimum(orders, len(self._grid) - steps)
        # The corrector is of the step before, and so is its order; 0: there is none.
        correctors = numpy.append(self.this_order, orders[:-1])
        correctors[numpy.isin(steps - 1, [-1, *self.disable_corrector])] = 0
        pairs = zip(orders.tolist(), correctors.tolist(), strict=True)
        self._plan = dict(zip(steps.tolist(), pairs, strict=True))
        return alike(steps, orders, correctors, self._levels[steps + 1] == 0)

    def rows(
        self, steps: numpy.ndarray, x: Combination, output: Combination, noise: Combination
    ) -> dict[str, Combination]:
        of_noise, solver = not self.predict_x0, self.config.solver_type
        rows, value = self._value(steps, x, output, of_noise)
        order, corrector = self._plan[int(steps[0])]
        before, here, there = (self._alpha_sigma(self._levels[steps + k]) for k in (-1, 0, 1))
        reach = max(order, corrector + 1)
        earlier = [(self._before(k), self._lambda(steps - k)) for k in range(1, reach)]
        if corrector:
            rows["corrected"] = formulas.unipc(
                tensor("last"),
                self._before(1),
                before,
                here,
                earlier[1:corrector],
                value,
                of_noise=of_noise,
                solver_type=solver,
            )
            x = tensor("corrected")
        rows["prev_sample"] = formulas.unipc(
            x, value, here, there, earlier[: order - 1], of_noise=of_noise, solver_type=solver
        )
        return rows

    def _of_one_kind(self, model_output: Tensor, sample: Tensor) -> tuple[str, Tensor, Tensor]:
        """The next sample has this one's dtype, whatever the model's."""
        if torch.float64 in (model_output.dtype, sample.dtype):
            model_output = model_output.to(sample.dtype)
        return "sample", model_output, sample

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        return_dict: bool = True,
        *,
        guidance_scale: float | None = None,
        guidance_rescale: float = 0.0,
    ) -> Any:
        """The sample at the next timestep; see ``docs/samplers/diffusers.md``."""
        if self.num_inference_steps is None:
            raise ValueError("step: call set_timesteps first")
        place, history = self._place(timestep), self._history()
        if self.last_sample is not None:
            history["last"] = self.last_sample
        prev_sample, value, *corrected = self._advance(
            model_output,
            timestep,
            sample,
            history=history,
            guidance_scale=guidance_scale,
            guidance_rescale=guidance_rescale,
        )
        self.last_sample = corrected[0] if corrected else sample
        self.this_order = self._plan[place][0]
        self._remember(value)
        return SchedulerOutput(prev_sample) if return_dict else (prev_sample,)
