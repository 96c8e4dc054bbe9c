"""DDIM (Song et al. 2021), from deterministic (eta 0) to ancestral (eta 1)."""

from typing import Any

import numpy
import torch
from torch import Tensor

from fastzoo.samplers import formulas
from fastzoo.samplers.algebra import Combination, tensor
from fastzoo.samplers.diffusers.base import (
    parent,
    register_to_config,
)
from fastzoo.samplers.diffusers.noise_levels import VariancePreserving, spaced


class DDIMScheduler(VariancePreserving, parent("DDIMScheduler")):  # type: ignore[misc]
    """diffusers' ``DDIMScheduler``, each step one kernel."""

    any_order = True

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Any = None,
        clip_sample: bool = True,
        set_alpha_to_one: bool = True,
        steps_offset: int = 0,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        rescale_betas_zero_snr: bool = False,
    ) -> None:
        self._set_noise_levels()
        self._final = 1.0 if set_alpha_to_one else float(self._alphas_bar[0])
        self.final_alpha_cumprod = torch.tensor(self._final)
        self.num_inference_steps = None
        self._publish(numpy.arange(num_train_timesteps)[::-1].copy())

    def set_timesteps(
        self, num_inference_steps: int, device: torch.device | str | None = None
    ) -> None:
        """The timesteps of a run, by ``timestep_spacing``."""
        self.num_inference_steps = num_inference_steps
        self._publish(spaced(self.config, num_inference_steps, whole=True), device=device)

    def _find(self, timestep: float) -> int:
        """Any timestep has a step, to the one a step's length before it."""
        if timestep not in self._places:
            self._places[timestep] = [len(self._grid)]
            self._grid = numpy.append(self._grid, int(timestep))
            self._host.append(timestep)
            self._run = None
        return self.index_for_timestep(timestep)

    def rows(
        self,
        steps: numpy.ndarray,
        x: Combination,
        output: Combination,
        noise: Combination,
        eta: float,
        from_clipped: bool,
    ) -> dict[str, Combination]:
        t = self._grid[steps]
        assert self.num_inference_steps is not None
        before = t - self.config.num_train_timesteps // self.num_inference_steps
        alpha, sigma = self._alpha_sigma(self._alphas_bar[t])
        next_alpha, next_sigma = self._alpha_sigma(
            numpy.where(before >= 0, self._alphas_bar[before], self._final)
        )
        x0 = self._denoised(x, output, alpha, sigma)
        if from_clipped:
            eps = formulas.noise_of(x, tensor("x0"), alpha, sigma)
        elif self.config.prediction_type == "epsilon":
            eps = output
        else:
            eps = formulas.noise_of(x, x0, alpha, sigma)
        std = eta * numpy.sqrt(formulas.posterior_variance(alpha, sigma, next_alpha, next_sigma))
        drawn = noise if eta > 0 else None
        prev_sample = formulas.ddim(tensor("x0"), eps, next_alpha, next_sigma, std, drawn)
        return {"x0": x0, "prev_sample": prev_sample}

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: Any = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
        *,
        seeds: Any = None,
        guidance_scale: float | None = None,
        guidance_rescale: float = 0.0,
    ) -> Any:
        """The sample at the previous timestep; see ``docs/samplers/diffusers.md``."""
        if self.num_inference_steps is None:
            raise ValueError("step: call set_timesteps first")
        if variance_noise is not None and (generator is not None or seeds is not None):
            raise ValueError("variance_noise: not together with generator or seeds")
        return self._step(
            return_dict,
            model_output,
            timestep,
            sample,
            (eta, bool(use_clipped_model_output)),
            noise=variance_noise,
            generator=generator,
            seeds=seeds,
            guidance_scale=guidance_scale,
            guidance_rescale=guidance_rescale,
        )
