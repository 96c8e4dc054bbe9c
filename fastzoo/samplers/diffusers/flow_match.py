"""Euler's method on a rectified flow (Liu et al. 2022; Esser et al. 2024)."""

import math
import warnings
from typing import Any

import numpy
import torch
from torch import Tensor

from fastzoo.samplers import formulas, schedules
from fastzoo.samplers.algebra import Combination, tensor
from fastzoo.samplers.diffusers.base import (
    DIFFUSERS,
    Scheduler,
    SchedulerOutput,
    parent,
    register_to_config,
)
from fastzoo.samplers.diffusers.noise_levels import check_conversion, converted


class FlowMatchEulerDiscreteScheduler(
    Scheduler,
    parent("FlowMatchEulerDiscreteScheduler"),  # type: ignore[misc]
):
    """diffusers' ``FlowMatchEulerDiscreteScheduler``, each step one kernel."""

    like_output = True

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        base_shift: float | None = 0.5,
        max_shift: float | None = 1.15,
        base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096,
        invert_sigmas: bool = False,
        shift_terminal: float | None = None,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        time_shift_type: str = "exponential",
        stochastic_sampling: bool = False,
    ) -> None:
        check_conversion(self.config)
        if time_shift_type not in ("exponential", "linear"):
            raise ValueError(
                f"time_shift_type: expected 'exponential' or 'linear', got {time_shift_type!r}"
            )
        self._shift = shift
        sigmas = numpy.arange(num_train_timesteps, 0, -1) / num_train_timesteps
        if not use_dynamic_shifting:
            sigmas = schedules.flow_shift(sigmas, shift).numpy()
        self.sigma_min, self.sigma_max = float(sigmas[-1]), float(sigmas[0])
        self._publish(sigmas * num_train_timesteps, sigmas)

    @property
    def shift(self) -> float:
        """What ``set_timesteps`` shifts the noise levels by."""
        return self._shift

    def set_shift(self, shift: float) -> None:
        """Sets ``shift``, for the runs that follow."""
        self._shift = shift

    def time_shift(self, mu: float, sigma: float, t: Any) -> Any:
        """Times shifted by the resolution: ``s / (s + (1 / t - 1)^sigma)``, where s is ``mu``, or
        its exponential."""
        s = math.exp(mu) if self.config.time_shift_type == "exponential" else mu
        return s / (s + (1 / t - 1) ** sigma)

    def stretch_shift_to_terminal(self, t: Any) -> Any:
        """Times stretched so that the last one is the config's ``shift_terminal``."""
        left = 1 - t
        return 1 - left * ((1 - self.config.shift_terminal) / left[-1])

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        sigmas: list[float] | None = None,
        mu: float | None = None,
        timesteps: list[float] | None = None,
    ) -> None:
        """The noise levels of a run: ``num_inference_steps`` equal steps, or these, shifted (by
        ``mu`` under dynamic shifting), stretched and converted as the config says. ``timesteps``
        are what the model is given in place of the levels' own."""
        config, count = self.config, self.config.num_train_timesteps
        given = {len(v) for v in (sigmas, timesteps) if v is not None}
        given |= set() if num_inference_steps is None else {num_inference_steps}
        if len(given) != 1:
            raise ValueError(
                "num_inference_steps: expected it, or as many sigmas and timesteps, got "
                f"{sorted(given)}"
            )
        n = self.num_inference_steps = given.pop()
        if config.use_dynamic_shifting and mu is None:
            raise ValueError("mu: expected with use_dynamic_shifting")
        if sigmas is not None:
            levels = numpy.asarray(sigmas, dtype=numpy.float64)
        elif timesteps is not None:
            warnings.warn(
                "timesteps without sigmas: the levels are shifted, the timesteps are not",
                stacklevel=2,
            )
            levels = numpy.asarray(timesteps, dtype=numpy.float64) / count
        else:
            levels = numpy.linspace(self.sigma_max, self.sigma_min, n)
        if config.use_dynamic_shifting:
            levels = self.time_shift(mu or 0.0, 1.0, levels)
        else:
            levels = schedules.flow_shift(levels, self.shift).numpy()
        if config.shift_terminal:
            levels = self.stretch_shift_to_terminal(levels)
        changed = converted(config, levels, n)
        levels = levels if changed is None else changed
        grid = levels * count if timesteps is None else numpy.asarray(timesteps, numpy.float64)
        if config.invert_sigmas:
            levels = 1 - levels
            grid = levels * count
        self._publish(grid, numpy.append(levels, float(config.invert_sigmas)), device)
        self.sigmas = self._shown_sigmas = self.sigmas.to(device)

    def rows(
        self, steps: numpy.ndarray, x: Combination, output: Combination, noise: Combination
    ) -> dict[str, Combination]:
        sigma, next_sigma = self._levels[steps], self._levels[steps + 1]
        if self.config.stochastic_sampling:
            x0 = formulas.denoised("velocity", x, output, 1 - sigma, sigma)
            return {"prev_sample": (1 - next_sigma) * x0 + next_sigma * noise}
        # The derivative itself: an inverted flow begins at sigma = 0, where x0 has none.
        return {"prev_sample": x + (next_sigma - sigma) * output}

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = math.inf,
        s_noise: float = 1.0,
        generator: Any = None,
        per_token_timesteps: Tensor | None = None,
        return_dict: bool = True,
        *,
        seeds: Any = None,
        guidance_scale: float | None = None,
        guidance_rescale: float = 0.0,
    ) -> Any:
        """The sample at the next noise level; the arguments ``s_...`` are ignored, as diffusers
        does. See ``docs/samplers/diffusers.md``."""
        if isinstance(timestep, int) or (
            isinstance(timestep, Tensor) and not timestep.is_floating_point()
        ):
            raise ValueError(
                "timestep: expected one of scheduler.timesteps, got an integer (of enumerate?)"
            )
        if per_token_timesteps is not None:
            if DIFFUSERS is None or seeds is not None or guidance_scale is not None:
                raise NotImplementedError(
                    "per_token_timesteps: only diffusers' own step takes them, without seeds and "
                    "guidance"
                )
            return super().step(
                model_output,
                timestep,
                sample,
                generator=generator,
                per_token_timesteps=per_token_timesteps,
                return_dict=return_dict,
            )
        (prev_sample,) = self._advance(
            model_output,
            timestep,
            sample,
            generator=generator,
            noise_dtype=torch.promote_types(sample.dtype, torch.float32),
            seeds=seeds,
            guidance_scale=guidance_scale,
            guidance_rescale=guidance_rescale,
        )
        return SchedulerOutput(prev_sample) if return_dict else (prev_sample,)

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor | None = None) -> Tensor:
        """``sigma noise + (1 - sigma) sample`` at each sample's timestep, or at this run's step
        where ``set_begin_index`` was called."""
        if noise is None:
            raise ValueError("noise: expected a tensor")
        row = self._levels * tensor("noise") + (1 - self._levels) * tensor("x")
        return self._mixed("scale_noise", row, sample, noise, self._places_of(timestep))
