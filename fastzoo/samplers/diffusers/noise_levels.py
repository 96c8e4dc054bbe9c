"""Which noise levels the timesteps of a trained model stand for, and which a run takes; float64."""

import importlib
import math
import warnings
from typing import Any

import numpy
import torch
from torch import Tensor

from fastzoo.samplers import schedules
from fastzoo.samplers.algebra import tensor
from fastzoo.samplers.diffusers.base import Scheduler

# Of alpha bar in place of an exact 0, where levels are sigma / alpha: the least float16.
_LEAST_SHARE = 2.0**-24
_LEAST_SIGMA = 1e-10


def _exponential_share(t: float) -> float:
    return math.exp(-12 * t)


def _laplace_share(t: float) -> float:
    half = 0.5 - t
    log_snr = -0.5 * math.copysign(1, half) * math.log(1 - 2 * abs(half) + 1e-6)
    snr = math.exp(log_snr)
    return math.sqrt(snr / (1 + snr))


def betas(config: Any) -> Tensor:
    """The noise variance that each step of a config's training adds."""
    count, start, end = config.num_train_timesteps, config.beta_start, config.beta_end
    schedule = config.beta_schedule
    if config.trained_betas is not None:
        found = torch.as_tensor(config.trained_betas, dtype=torch.float64)
    elif schedule == "linear":
        found = schedules.linear_betas(count, start, end)
    elif schedule == "scaled_linear":
        found = schedules.scaled_linear_betas(count, start, end)
    elif schedule == "squaredcos_cap_v2":
        found = schedules.cosine_betas(count)
    elif schedule in ("exp", "laplace"):
        share = _laplace_share if schedule == "laplace" else _exponential_share
        bar = torch.tensor([share(i / count) for i in range(count + 1)], dtype=torch.float64)
        found = (1 - bar[1:] / bar[:-1]).clamp(max=0.999)
    elif schedule == "sigmoid":
        ramp = torch.linspace(-6, 6, count, dtype=torch.float64)
        found = ramp.sigmoid() * (end - start) + start
    else:
        raise ValueError(
            "beta_schedule: expected 'linear', 'scaled_linear', 'squaredcos_cap_v2', 'exp', "
            f"'laplace' or 'sigmoid', got {schedule!r}"
        )
    if getattr(config, "rescale_betas_zero_snr", False):
        found = schedules.rescale_zero_terminal_snr(found)
    return found


def spaced(config: Any, n: int, *, whole: bool) -> numpy.ndarray:
    """The timesteps of a run of n steps by ``timestep_spacing`` (Lin et al. 2023, table 2);
    ``linspace`` rounds them where whole ones are wanted."""
    count, spacing = config.num_train_timesteps, config.timestep_spacing
    if isinstance(n, bool) or not isinstance(n, int | numpy.integer) or not 1 <= n <= count:
        raise ValueError(f"num_inference_steps: expected 1 to {count}, got {n}")
    if spacing == "linspace":
        timesteps: numpy.ndarray = numpy.linspace(0, count - 1, n)[::-1]
        timesteps = timesteps.round() if whole else timesteps
    elif spacing == "leading":
        timesteps = numpy.arange(n)[::-1] * float(count // n) + config.steps_offset
    elif spacing == "trailing":
        timesteps = numpy.arange(count, 0, -count / n).round() - 1
    else:
        raise ValueError(
            f"timestep_spacing: expected 'linspace', 'leading' or 'trailing', got {spacing!r}"
        )
    return timesteps.astype(numpy.int64 if whole else numpy.float64)


def sigma_to_t(sigmas: numpy.ndarray, training: numpy.ndarray) -> numpy.ndarray:
    """The timesteps of noise levels, by their logarithms' place between those of training."""
    logs = numpy.log(numpy.maximum(sigmas, _LEAST_SIGMA))
    found: numpy.ndarray = numpy.interp(logs, numpy.log(training), numpy.arange(len(training)))
    return found


def check_conversion(config: Any) -> None:
    """At most one of the conversions of noise levels is chosen."""
    names = [f"use_{name}_sigmas" for name in ("karras", "exponential", "beta")]
    chosen = [name for name in names if getattr(config, name, False)]
    if len(chosen) > 1:
        raise ValueError(f"{chosen[0]}: expected at most one conversion, got {chosen}")


def converted(config: Any, sigmas: numpy.ndarray, n: int) -> numpy.ndarray | None:
    """n levels between the first and the last of these (or ``sigma_max`` and ``sigma_min`` of the
    config), spaced as the config says; None where it does not."""
    low, high = getattr(config, "sigma_min", None), getattr(config, "sigma_max", None)
    low = float(sigmas[-1] if low is None else low)
    high = float(sigmas[0] if high is None else high)
    if getattr(config, "use_karras_sigmas", False):
        return schedules.karras_sigmas(n, low, high, final=None).numpy()
    if getattr(config, "use_exponential_sigmas", False):
        return schedules.exponential_sigmas(n, low, high, final=None).numpy()
    if getattr(config, "use_beta_sigmas", False):
        # Lee et al., Beta sampling is all you need (2024).
        beta = importlib.import_module("scipy.stats").beta
        shares: numpy.ndarray = beta.ppf(1 - numpy.linspace(0, 1, n), 0.6, 0.6)
        return low + shares * (high - low)
    return None


class Trained(Scheduler):
    """A scheduler whose noise levels are those of a beta schedule."""

    _alphas_bar: numpy.ndarray

    def _set_noise_levels(self) -> None:
        """``_alphas_bar``, and the attributes that users of diffusers read."""
        found = betas(self.config)
        bar = schedules.alphas_cumprod(found)
        self._alphas_bar = bar.numpy()
        self.betas, self.alphas = found.float(), (1 - found).float()
        self.alphas_cumprod = bar.float()


class VariancePreserving(Trained):
    """States are ``alpha x0 + sigma eps`` with ``alpha^2 + sigma^2 = 1``."""

    @staticmethod
    def _alpha_sigma(alphas_bar: Any) -> tuple[Any, Any]:
        return numpy.sqrt(alphas_bar), numpy.sqrt(1 - alphas_bar)

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The sample as it is: its scale is the same at every timestep."""
        return sample

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """``alpha x + sigma noise`` at each sample's timestep."""
        alpha, sigma = self._alpha_sigma(self._alphas_bar)
        row = alpha * tensor("x") + sigma * tensor("noise")
        return self._mixed("add_noise", row, original_samples, noise, timesteps)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """``alpha noise - sigma x``, what a model that predicts v is trained to give."""
        alpha, sigma = self._alpha_sigma(self._alphas_bar)
        row = alpha * tensor("noise") - sigma * tensor("x")
        return self._mixed("get_velocity", row, sample, noise, timesteps)


class VarianceExploding(Trained):
    """States are ``x0 + sigma eps``; the model takes them divided by ``sqrt(sigma^2 + 1)``."""

    like_output = True

    def _set_noise_levels(self) -> None:
        super()._set_noise_levels()
        if getattr(self.config, "rescale_betas_zero_snr", False):
            self._alphas_bar[-1] = self.alphas_cumprod[-1] = _LEAST_SHARE
        self._training = schedules.noise_levels(self._alphas_bar).numpy()
        self.is_scale_input_called = False

    @property
    def init_noise_sigma(self) -> float:
        """What initial standard normal noise is multiplied by."""
        top = float(self._levels.max())
        if self.config.timestep_spacing in ("linspace", "trailing"):
            return top
        return math.sqrt(top**2 + 1)

    def _vp_scale(self, sigma: Any) -> Any:
        """alpha of the variance preserving process with this sigma / alpha."""
        return 1 / numpy.sqrt(sigma**2 + 1)

    def _denoised_at(self, x: Any, output: Any, sigma: Any, sigma_v: Any) -> Any:
        """x0 of a state at sigma; v is that of the variance preserving process at ``sigma_v``."""
        if self.config.prediction_type != "v_prediction":
            return self._denoised(x, output, 1.0, sigma)
        alpha = self._vp_scale(sigma_v)
        return self._denoised(alpha * x, output, alpha, alpha * sigma_v)

    def scale_model_input(self, sample: Tensor, timestep: Any) -> Tensor:
        """The sample divided by ``sqrt(sigma^2 + 1)``: what the model takes."""
        self.is_scale_input_called = True
        return sample * float(self._vp_scale(self._levels[self._place(timestep)]))

    def _check_step(self, timestep: Any) -> None:
        """diffusers' two warnings to those whose loop is not the pipelines'."""
        if isinstance(timestep, int) or (
            isinstance(timestep, Tensor) and not timestep.is_floating_point()
        ):
            raise ValueError(
                "timestep: expected one of scheduler.timesteps, got an integer (of enumerate?)"
            )
        if not self.is_scale_input_called:
            warnings.warn(
                "scale_model_input was not called: the model is given samples of a wrong scale",
                stacklevel=3,
            )

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """``x + sigma noise`` at each sample's timestep, or at this run's step where
        ``set_begin_index`` was called."""
        row = tensor("x") + self._levels * tensor("noise")
        places = self._places_of(timesteps)
        return self._mixed("add_noise", row, original_samples, noise, places)
