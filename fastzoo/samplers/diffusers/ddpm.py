"""DDPM's ancestral sampling (Ho et al. 2020)."""

from typing import Any

import numpy
import torch
from torch import Tensor

from fastzoo.samplers import formulas
from fastzoo.samplers.algebra import Combination, tensor
from fastzoo.samplers.diffusers.base import parent, randn, register_to_config
from fastzoo.samplers.diffusers.noise_levels import VariancePreserving, spaced

_SMALL = ("fixed_small", "fixed_small_log")
_LARGE = ("fixed_large", "fixed_large_log")
_LEARNED = ("learned", "learned_range")
_LEAST_VARIANCE = 1e-20


class DDPMScheduler(VariancePreserving, parent("DDPMScheduler")):  # type: ignore[misc]
    """diffusers' ``DDPMScheduler``, each step one kernel."""

    any_order = True

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Any = None,
        variance_type: str = "fixed_small",
        clip_sample: bool = True,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
    ) -> None:
        if variance_type not in (*_SMALL, *_LARGE, *_LEARNED):
            raise ValueError(
                f"variance_type: expected one of {(*_SMALL, *_LARGE, *_LEARNED)}, got "
                f"{variance_type!r}"
            )
        self.variance_type = variance_type
        self.one = torch.tensor(1.0)
        self.custom_timesteps = False
        self.num_inference_steps = None
        self._set_noise_levels()
        self._publish(numpy.arange(num_train_timesteps)[::-1].copy())

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        timesteps: list[int] | None = None,
    ) -> None:
        """The timesteps of a run: ``num_inference_steps`` of them by ``timestep_spacing``, or
        these, in descending order."""
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError("num_inference_steps: expected it or timesteps")
        self.custom_timesteps = timesteps is not None
        if timesteps is None:
            assert num_inference_steps is not None
            self.num_inference_steps = num_inference_steps
            grid = spaced(self.config, num_inference_steps, whole=True)
        else:
            grid = numpy.asarray(timesteps, dtype=numpy.int64)
            if (numpy.diff(grid) >= 0).any():
                raise ValueError(f"timesteps: expected them in descending order, got {timesteps}")
            if grid[0] >= self.config.num_train_timesteps:
                raise ValueError(
                    f"timesteps: expected them below {self.config.num_train_timesteps}, got "
                    f"{grid[0]}"
                )
        self._publish(grid, device=device)

    def previous_timestep(self, timestep: int | Tensor) -> int:
        """The timestep after this one in the run; -1 after the last."""
        place = self.index_for_timestep(timestep)
        return int(self._grid[place + 1]) if place + 1 < len(self._grid) else -1

    def _levels_of(self, steps: Any) -> tuple[Any, Any, Any, Any]:
        """alpha and sigma before and after the steps."""
        bar = numpy.append(self._alphas_bar[self._grid], 1.0)
        return *self._alpha_sigma(bar[steps]), *self._alpha_sigma(bar[steps + 1])

    def groups(self, steps: numpy.ndarray) -> list[numpy.ndarray]:
        drawn = self._grid[steps] > 0
        return [steps[drawn], steps[~drawn]]

    def rows(
        self, steps: numpy.ndarray, x: Combination, output: Combination, noise: Combination
    ) -> dict[str, Combination]:
        alpha, sigma, next_alpha, next_sigma = self._levels_of(steps)
        x0 = self._denoised(x, output, alpha, sigma)
        prev_sample = formulas.ddpm_mean(x, tensor("x0"), alpha, sigma, next_alpha, next_sigma)
        if self._grid[steps[0]] > 0:
            prev_sample = prev_sample + self._std(alpha, sigma, next_alpha, next_sigma) * noise
        return {"x0": x0, "prev_sample": prev_sample}

    def _std(self, alpha: Any, sigma: Any, next_alpha: Any, next_sigma: Any) -> Any:
        """By how much the noise is multiplied; 1 where the model says by how much."""
        if self.variance_type in _LEARNED:
            return 1.0
        if self.variance_type in _LARGE:
            return numpy.sqrt(1 - alpha**2 / next_alpha**2)
        variance = formulas.posterior_variance(alpha, sigma, next_alpha, next_sigma)
        return numpy.sqrt(numpy.maximum(variance, _LEAST_VARIANCE))

    def _learned_std(self, predicted: Tensor, place: int) -> Tensor:
        """The standard deviation that a model predicts: its square, or where between the logarithms
        of the least and the largest variance it is (Nichol & Dhariwal 2021, eq. 15)."""
        if self.variance_type == "learned":
            return predicted.sqrt()
        alpha, sigma, next_alpha, next_sigma = self._levels_of(place)
        least = formulas.posterior_variance(alpha, sigma, next_alpha, next_sigma)
        low = float(numpy.log(max(least, _LEAST_VARIANCE)))
        high = float(numpy.log(1 - alpha**2 / next_alpha**2))
        return torch.exp(((predicted + 1) * (high - low) / 2 + low) / 2)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Any = None,
        return_dict: bool = True,
        *,
        seeds: Any = None,
        guidance_scale: float | None = None,
        guidance_rescale: float = 0.0,
    ) -> Any:
        """The sample at the previous timestep; see ``docs/samplers/diffusers.md``."""
        noise = None
        if self.variance_type in _LEARNED:
            channels = sample.shape[1]
            if model_output.shape[1] != 2 * channels:
                raise ValueError(
                    f"model_output: expected {2 * channels} channels, those of the prediction and "
                    f"of its variance, got {model_output.shape[1]}"
                )
            model_output, variance = model_output.split(channels, dim=1)
            place = self._place(timestep)
            if self._grid[place] > 0:
                if seeds is None:
                    noise = randn(sample.shape, generator, sample.device, model_output.dtype)
                else:
                    noise = self._counter_noise(seeds, sample, place + 1)
                # With guidance it is the conditional prediction's.
                noise = noise * self._learned_std(variance[-len(sample) :], place)
        return self._step(
            return_dict,
            model_output,
            timestep,
            sample,
            noise=noise,
            generator=generator,
            seeds=seeds,
            guidance_scale=guidance_scale,
            guidance_rescale=guidance_rescale,
        )
