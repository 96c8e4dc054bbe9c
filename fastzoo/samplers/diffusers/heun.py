"""Heun's method (Karras et al. 2022, algorithm 1) on data left unscaled, two model calls a step."""

from typing import Any

import numpy
import torch
from torch import Tensor

from fastzoo.samplers import formulas
from fastzoo.samplers.algebra import Combination, tensor
from fastzoo.samplers.diffusers.base import SchedulerOutput, parent, register_to_config
from fastzoo.samplers.diffusers.noise_levels import (
    VarianceExploding,
    check_conversion,
    converted,
    sigma_to_t,
    spaced,
)


class HeunDiscreteScheduler(VarianceExploding, parent("HeunDiscreteScheduler")):  # type: ignore[misc]
    """diffusers' ``HeunDiscreteScheduler``, each call of ``step`` one kernel.

    Its timesteps stand twice, as diffusers has them: the first call goes to the next noise level by
    Euler's method, and the second from there again, by the mean of both derivatives.
    """

    order = 2
    like_output = False

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: str = "linear",
        trained_betas: Any = None,
        prediction_type: str = "epsilon",
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
    ) -> None:
        check_conversion(self.config)
        self._set_noise_levels()
        self.set_timesteps(num_train_timesteps)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        num_train_timesteps: int | None = None,
        timesteps: Any = None,
    ) -> None:
        """The timesteps of a run, by ``timestep_spacing`` or as given."""
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError("set_timesteps: expected one of num_inference_steps and timesteps")
        config, training = self.config, self._training
        if num_train_timesteps not in (None, config.num_train_timesteps):
            raise ValueError(
                f"num_train_timesteps: expected that of the config, {config.num_train_timesteps}"
            )
        if timesteps is None:
            assert num_inference_steps is not None
            times = spaced(config, num_inference_steps, whole=False)
        else:
            times = numpy.asarray(timesteps, dtype=numpy.float64)
        levels = numpy.interp(times, numpy.arange(len(training)), training)
        changed = converted(config, levels, len(levels))
        if changed is not None:
            if timesteps is not None:
                raise ValueError("timesteps: not with a config that converts the noise levels")
            times, levels = sigma_to_t(changed, training), changed
        self.num_inference_steps = len(times)
        twice = numpy.append(levels[:1], numpy.repeat(levels[1:], 2))
        self._publish(
            numpy.append(times[:1], numpy.repeat(times[1:], 2)), numpy.append(twice, 0.0), device
        )
        self._start: tuple[Tensor, Tensor] | None = None

    @property
    def state_in_first_order(self) -> bool:
        """Whether the next call is the first one of a step."""
        return self._start is None

    def groups(self, steps: numpy.ndarray) -> list[numpy.ndarray]:
        return [steps[steps % 2 == 0], steps[steps % 2 == 1]]

    def rows(
        self, steps: numpy.ndarray, x: Combination, output: Combination, noise: Combination
    ) -> dict[str, Combination]:
        second = steps[0] % 2 == 1
        level, next_level = self._levels[steps], self._levels[steps + 1]
        x0 = self._denoised_at(x, output, level, level)
        if not second:
            return {"x0": x0, "prev_sample": formulas.euler(x, tensor("x0"), level, next_level)}
        start, begin = tensor("start"), self._levels[steps - 1]
        slope = formulas.derivative(start, tensor("start_x0"), begin)
        slope = slope + formulas.derivative(x, tensor("x0"), level)
        return {"x0": x0, "prev_sample": start + ((level - begin) / 2) * slope}

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        return_dict: bool = True,
        *,
        guidance_scale: float | None = None,
        guidance_rescale: float = 0.0,
    ) -> Any:
        """The sample at the next timestep; see ``docs/samplers/diffusers.md``."""
        call = (model_output, timestep, sample)
        guidance: dict[str, Any] = {
            "guidance_scale": guidance_scale,
            "guidance_rescale": guidance_rescale,
        }
        if self._place(timestep) % 2 == 0:
            prev_sample, x0 = self._advance(*call, **guidance)
            self._start = sample, x0
            return SchedulerOutput(prev_sample, x0) if return_dict else (prev_sample, x0)
        if self._start is None:
            raise ValueError("step: a run begins with the first of a step's two calls")
        history = dict(zip(("start", "start_x0"), self._start, strict=True))
        self._start = None
        return self._step(return_dict, *call, history=history, **guidance)
