"""Euler's method in sigma (Karras et al. 2022, algorithm 2 without its correction)."""

import math
from typing import Any

import numpy
import torch
from torch import Tensor

from fastzoo.samplers import formulas
from fastzoo.samplers.algebra import Combination, tensor
from fastzoo.samplers.diffusers.base import parent, register_to_config
from fastzoo.samplers.diffusers.noise_levels import (
    VarianceExploding,
    check_conversion,
    converted,
    sigma_to_t,
    spaced,
)

_MOST_CHURN = math.sqrt(2) - 1


class EulerDiscreteScheduler(VarianceExploding, parent("EulerDiscreteScheduler")):  # type: ignore[misc]
    """diffusers' ``EulerDiscreteScheduler``, each step one kernel."""

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Any = None,
        prediction_type: str = "epsilon",
        interpolation_type: str = "linear",
        use_karras_sigmas: bool | None = False,
        use_exponential_sigmas: bool | None = False,
        use_beta_sigmas: bool | None = False,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        timestep_spacing: str = "linspace",
        timestep_type: str = "discrete",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
        final_sigmas_type: str = "zero",
    ) -> None:
        check_conversion(self.config)
        self.use_karras_sigmas = use_karras_sigmas
        self.use_exponential_sigmas = use_exponential_sigmas
        self.use_beta_sigmas = use_beta_sigmas
        self.num_inference_steps = None
        self._set_noise_levels()
        timesteps = numpy.arange(num_train_timesteps, dtype=numpy.float64)[::-1].copy()
        self._begin(timesteps, numpy.append(self._training[::-1], 0.0), None)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        timesteps: list[float] | None = None,
        sigmas: list[float] | None = None,
    ) -> None:
        """The noise levels of a run: of ``num_inference_steps`` by ``timestep_spacing`` and the
        config's conversion, of these timesteps, or these, the last of which is where it ends."""
        given = [num_inference_steps, timesteps, sigmas]
        if sum(value is not None for value in given) != 1:
            raise ValueError("num_inference_steps: expected one of it, timesteps and sigmas")
        config, training = self.config, self._training
        if sigmas is not None:
            levels = numpy.asarray(sigmas, dtype=numpy.float64)
            self.num_inference_steps = len(levels) - 1
            self._begin(sigma_to_t(levels[:-1], training), levels, device)
            return
        if timesteps is None:
            assert num_inference_steps is not None
            grid, n = spaced(config, num_inference_steps, whole=False), num_inference_steps
        else:
            grid, n = numpy.asarray(timesteps, dtype=numpy.float64), len(timesteps)
        self.num_inference_steps = n
        if config.interpolation_type == "linear":
            levels = numpy.interp(grid, numpy.arange(len(training)), training)
        elif config.interpolation_type == "log_linear":
            first, last = math.log(training[-1]), math.log(training[0])
            levels = numpy.exp(numpy.linspace(first, last, n + 1))
        else:
            raise ValueError(
                "interpolation_type: expected 'linear' or 'log_linear', got "
                f"{config.interpolation_type!r}"
            )
        changed = converted(config, levels, n)
        if changed is not None:
            if timesteps is not None:
                raise ValueError("timesteps: not with a config that converts the noise levels")
            grid, levels = sigma_to_t(changed, training), changed
        if config.final_sigmas_type not in ("zero", "sigma_min"):
            raise ValueError(
                f"final_sigmas_type: expected 'zero' or 'sigma_min', got "
                f"{config.final_sigmas_type!r}"
            )
        final = 0.0 if config.final_sigmas_type == "zero" else training[0]
        self._begin(grid, numpy.append(levels, final), device)

    def _begin(
        self, timesteps: numpy.ndarray, levels: numpy.ndarray, device: torch.device | str | None
    ) -> None:
        config = self.config
        if config.timestep_type == "continuous" and config.prediction_type == "v_prediction":
            timesteps = numpy.log(levels[: len(timesteps)]) / 4
        self._publish(timesteps, levels, device)

    def _gamma(
        self, steps: numpy.ndarray, s_churn: float, s_tmin: float, s_tmax: float
    ) -> numpy.ndarray:
        sigma = self._levels[steps]
        churn = min(s_churn / (len(self._levels) - 1), _MOST_CHURN)
        return numpy.where((s_tmin <= sigma) & (sigma <= s_tmax), churn, 0.0)

    def groups(
        self,
        steps: numpy.ndarray,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = math.inf,
        s_noise: float = 1.0,
    ) -> list[numpy.ndarray]:
        churned = self._gamma(steps, s_churn, s_tmin, s_tmax) > 0
        return [steps[churned], steps[~churned]]

    def rows(
        self,
        steps: numpy.ndarray,
        x: Combination,
        output: Combination,
        noise: Combination,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = math.inf,
        s_noise: float = 1.0,
    ) -> dict[str, Combination]:
        sigma, next_sigma = self._levels[steps], self._levels[steps + 1]
        gamma = self._gamma(steps, s_churn, s_tmin, s_tmax)
        hat, added = formulas.churned(sigma, gamma)
        if gamma[0] > 0:
            x = x + s_noise * added * noise
        # diffusers reads v at the level without the churn.
        x0 = self._denoised_at(x, output, hat, sigma)
        # From 0 to 0 is no step; any level has the limit.
        stays = (hat == 0) & (next_sigma == 0)
        hat, next_sigma = numpy.where(stays, 1, hat), numpy.where(stays, 1, next_sigma)
        return {"x0": x0, "prev_sample": formulas.euler(x, tensor("x0"), hat, next_sigma)}

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
        return_dict: bool = True,
        *,
        seeds: Any = None,
        guidance_scale: float | None = None,
        guidance_rescale: float = 0.0,
    ) -> Any:
        """The sample at the next noise level; see ``docs/samplers/diffusers.md``."""
        self._check_step(timestep)
        noise = None
        if s_churn > 0 and seeds is not None:
            # It is part of x0 too, and a kernel's own noise is of its last row alone.
            noise = self._counter_noise(seeds, sample, self._place(timestep) + 1)
        return self._step(
            return_dict,
            model_output,
            timestep,
            sample,
            (s_churn, s_tmin, s_tmax, s_noise) if s_churn > 0 else (),
            noise=noise,
            generator=generator,
            seeds=seeds,
            guidance_scale=guidance_scale,
            guidance_rescale=guidance_rescale,
        )
