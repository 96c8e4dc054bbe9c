"""Heun's method (Karras et al. 2022, algorithm 1) on data left unscaled, two model calls a step."""

from typing import Any

import numpy
import torch
from torch import Tensor

from fastzoo.samplers import formulas
from fastzoo.samplers.algebra import Combination, tensor
from fastzoo.samplers.diffusers.base import SchedulerOutput, parent, register_to_config
from fastzoo.samplers.diffusers.noise_levels import spaced
from fastzoo.samplers.diffusers.respaced import Respaced, times_of


class HeunDiscreteScheduler(Respaced, parent("HeunDiscreteScheduler")):  # type: ignore[misc]
    """diffusers' ``HeunDiscreteScheduler``, each call of ``step`` one kernel.

    Its timesteps stand twice, as diffusers has them: the first call goes to the next noise level by
    Euler's method, and the second from there again, by the mean of both derivatives.
    """

    order = 2

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
        self._set_trained_levels()
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
        if timesteps is not None:
            if self._spacing is not None:
                raise ValueError(f"timesteps: not together with {self._spacing}")
            times = numpy.asarray(timesteps, dtype=numpy.float64)
        else:
            count = num_train_timesteps or self.config.num_train_timesteps
            spacing, offset = self.config.timestep_spacing, self.config.steps_offset
            assert num_inference_steps is not None
            times = spaced(spacing, num_inference_steps, count, offset, whole=False)
        levels = self._levels_at_trained(times)
        if self._spacing is not None:
            levels = self._respaced(len(levels), levels[-1], levels[0])
            times = times_of(levels, self._trained)
        self.num_inference_steps = len(times)
        twice = numpy.append(levels[:1], numpy.repeat(levels[1:], 2))
        self._publish(
            numpy.append(times[:1], numpy.repeat(times[1:], 2)), numpy.append(twice, 0.0), device
        )
        self._start: tuple[Tensor, Tensor] | None = None

    @property
    def init_noise_sigma(self) -> Tensor:  # type: ignore[override]
        """The standard deviation of the noise that a run begins with."""
        largest = self.sigmas.max()
        if self.config.timestep_spacing in ("linspace", "trailing"):
            return largest
        return (largest**2 + 1) ** 0.5

    @property
    def state_in_first_order(self) -> bool:
        """Whether the next call is the first one of a step."""
        return self._start is None

    def scale_model_input(self, sample: Tensor, timestep: Any) -> Tensor:
        """The sample scaled to variance 1, for the model."""
        return sample * float(self._scale(self._levels[self._place(timestep)]))

    @staticmethod
    def _scale(level: Any) -> Any:
        return 1 / numpy.sqrt(level**2 + 1)

    def _alpha_sigma_of(self, levels: Any) -> tuple[Any, Any]:
        return 1.0, levels

    def groups(self, steps: numpy.ndarray) -> list[numpy.ndarray]:
        first, second = steps[steps % 2 == 0], steps[steps % 2 == 1]
        return [group for group in (first, second) if len(group)]

    def rows(
        self, steps: numpy.ndarray, x: Combination, output: Combination, noise: Combination
    ) -> dict[str, Combination]:
        second = steps[0] % 2 == 1
        level, next_level = self._levels[steps], self._levels[steps + 1]
        if self.config.prediction_type == "v_prediction":
            # v is of the sample as the model sees it.
            scale = self._scale(level)
            x0 = self._denoised(scale * x, output, scale, level * scale)
        else:
            x0 = self._denoised(x, output, 1.0, level)
        if not second:
            return {"x0": x0, "sample": formulas.euler(x, tensor("x0"), level, next_level)}
        start, begin = tensor("start"), self._levels[steps - 1]
        slope = formulas.derivative(start, tensor("start_x0"), begin)
        slope = slope + formulas.derivative(x, tensor("x0"), level)
        return {"x0": x0, "sample": start + ((level - begin) / 2) * slope}

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
        second = self._place(timestep) % 2 == 1
        history = {}
        if second:
            if self._start is None:
                raise ValueError("step: a run begins with the first of a step's two calls")
            history = dict(zip(("start", "start_x0"), self._start, strict=True))
        prev_sample, x0 = self._advance(
            model_output,
            timestep,
            sample,
            history=history,
            guidance_scale=guidance_scale,
            guidance_rescale=guidance_rescale,
        )
        self._start = None if second else (sample, x0)
        return SchedulerOutput(prev_sample, x0) if return_dict else (prev_sample, x0)
