"""How much noise a trained model's timesteps stand for, and which of them a run takes; float64."""

import math
from collections.abc import Callable
from typing import Any

import numpy
import torch
from torch import Tensor

from fastzoo.samplers.algebra import Program, Tables, tensor

MAX_BETA = 0.999


def _cosine(t: float) -> float:
    return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2


def _laplace(t: float) -> float:
    half = 0.5 - t
    log_snr = -0.5 * math.copysign(1, half) * math.log(1 - 2 * abs(half) + 1e-6)
    snr = math.exp(log_snr)
    return math.sqrt(snr / (1 + snr))


def _betas_of(alpha_bar: Callable[[float], float], count: int) -> numpy.ndarray:
    bar = [alpha_bar(i / count) for i in range(count + 1)]
    result: numpy.ndarray = numpy.minimum(1 - numpy.divide(bar[1:], bar[:-1]), MAX_BETA)
    return result


def betas(config: Any) -> numpy.ndarray:
    """The variances that a config's training adds at each timestep."""
    count, start, end = config.num_train_timesteps, config.beta_start, config.beta_end
    schedule = config.beta_schedule
    if config.trained_betas is not None:
        return numpy.asarray(config.trained_betas, dtype=numpy.float64)
    if schedule == "linear":
        return numpy.linspace(start, end, count)
    if schedule == "scaled_linear":
        return numpy.square(numpy.linspace(start**0.5, end**0.5, count))
    if schedule == "squaredcos_cap_v2":
        return _betas_of(_cosine, count)
    if schedule == "laplace":
        return _betas_of(_laplace, count)
    if schedule == "sigmoid":
        return (end - start) / (1 + numpy.exp(-numpy.linspace(-6, 6, count))) + start
    raise ValueError(
        "beta_schedule: expected 'linear', 'scaled_linear', 'squaredcos_cap_v2', 'laplace' or "
        f"'sigmoid', got {schedule!r}"
    )


def zero_terminal_snr(alphas_bar: numpy.ndarray) -> numpy.ndarray:
    """alpha bar moved so that the last one is exactly 0 and the first one stays: Lin et al. 2023,
    algorithm 1."""
    root = numpy.sqrt(alphas_bar)
    return numpy.square((root - root[-1]) * (root[0] / (root[0] - root[-1])))


def spaced(spacing: str, n: int, count: int, offset: int, whole: bool) -> numpy.ndarray:
    """The n timesteps of a run of ``count`` (Lin et al. 2023, table 2), rounded to whole ones for
    ``linspace`` too or not."""
    if spacing == "linspace":
        timesteps: numpy.ndarray = numpy.linspace(0, count - 1, n)[::-1]
        timesteps = timesteps.round() if whole else timesteps
    elif spacing == "leading":
        timesteps = numpy.arange(n)[::-1] * float(count // n) + offset
    elif spacing == "trailing":
        timesteps = numpy.arange(count, 0, -count / n).round() - 1
    else:
        raise ValueError(
            f"timestep_spacing: expected 'linspace', 'leading' or 'trailing', got {spacing!r}"
        )
    return timesteps.astype(numpy.int64) if whole else timesteps.copy()


class VariancePreserving:
    """A scheduler with the noise levels of a beta schedule."""

    config: Any
    _noised: dict[str, Tables]

    def _set_noise_levels(self) -> None:
        """``_alphas_bar`` in float64, and the attributes that users of diffusers read."""
        bar = numpy.cumprod(1 - betas(self.config))
        if self.config.rescale_betas_zero_snr:
            bar = zero_terminal_snr(bar)
        self._alphas_bar = bar
        alphas = bar / numpy.concatenate([[1.0], bar[:-1]])
        self.alphas = torch.from_numpy(alphas.astype(numpy.float32))
        self.betas = torch.from_numpy((1 - alphas).astype(numpy.float32))
        self.alphas_cumprod = torch.from_numpy(bar.astype(numpy.float32))
        self._noised = {}

    @staticmethod
    def _alpha_sigma(alphas_bar: Any) -> tuple[Any, Any]:
        return numpy.sqrt(alphas_bar), numpy.sqrt(1 - alphas_bar)

    def _spaced(self, n: int) -> numpy.ndarray:
        config = self.config
        if not 1 <= n <= config.num_train_timesteps:
            raise ValueError(
                f"num_inference_steps: expected 1 to {config.num_train_timesteps}, got {n}"
            )
        return spaced(
            config.timestep_spacing, n, config.num_train_timesteps, config.steps_offset, whole=True
        )

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The sample: a variance preserving process has one scale."""
        return sample

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """``alpha x + sigma noise`` at each sample's timestep."""
        return self._combine("add_noise", original_samples, noise, timesteps)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """``alpha noise - sigma x``, what a model that predicts v is trained to give."""
        return self._combine("get_velocity", sample, noise, timesteps)

    def _combine(self, what: str, x: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        if what not in self._noised:
            alpha, sigma = self._alpha_sigma(self._alphas_bar)
            data, z = tensor("x"), tensor("noise")
            row = alpha * data + sigma * z if what == "add_noise" else alpha * z - sigma * data
            self._noised[what] = Tables([Program({what: row}, "x")])
        tables = self._noised[what]
        table = tables.on(x.device)[0].index_select(1, timesteps.to(x.device).flatten())
        result: Tensor = tables.programs[0]({"x": x, "noise": noise.expand_as(x)}, table)
        return result
