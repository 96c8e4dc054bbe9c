"""Ancestral sampling with Euler's method (k-diffusion)."""

from typing import Any

import numpy
import torch
from torch import Tensor

from fastzoo.samplers import formulas
from fastzoo.samplers.algebra import Combination, tensor
from fastzoo.samplers.diffusers.base import parent, register_to_config
from fastzoo.samplers.diffusers.noise_levels import VarianceExploding, spaced


class EulerAncestralDiscreteScheduler(
    VarianceExploding,
    parent("EulerAncestralDiscreteScheduler"),  # type: ignore[misc]
):
    """diffusers' ``EulerAncestralDiscreteScheduler``, each step one kernel."""

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Any = None,
        prediction_type: str = "epsilon",
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
    ) -> None:
        self.num_inference_steps = None
        self._set_noise_levels()
        timesteps = numpy.arange(num_train_timesteps, dtype=numpy.float64)[::-1].copy()
        self._publish(timesteps, numpy.append(self._training[::-1], 0.0))

    def set_timesteps(
        self, num_inference_steps: int, device: torch.device | str | None = None
    ) -> None:
        """The noise levels of a run, by ``timestep_spacing``."""
        self.num_inference_steps = num_inference_steps
        timesteps = spaced(self.config, num_inference_steps, whole=False)
        training = self._training
        levels = numpy.interp(timesteps, numpy.arange(len(training)), training)
        self._publish(timesteps, numpy.append(levels, 0.0), device)

    def rows(
        self, steps: numpy.ndarray, x: Combination, output: Combination, noise: Combination
    ) -> dict[str, Combination]:
        sigma, next_sigma = self._levels[steps], self._levels[steps + 1]
        down, up = formulas.ancestral(sigma, next_sigma)
        x0 = self._denoised_at(x, output, sigma, sigma)
        return {"x0": x0, "prev_sample": formulas.euler(x, tensor("x0"), sigma, down) + up * noise}

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Any = None,
        return_dict: bool = True,
        *,
        seeds: Any = None,
        guidance_scale: float | None = None,
        guidance_rescale: float = 0.0,
    ) -> Any:
        """The sample at the next noise level; see ``docs/samplers/diffusers.md``."""
        self._check_step(timestep)
        return self._step(
            return_dict,
            model_output,
            timestep,
            sample,
            generator=generator,
            seeds=seeds,
            guidance_scale=guidance_scale,
            guidance_rescale=guidance_rescale,
        )
