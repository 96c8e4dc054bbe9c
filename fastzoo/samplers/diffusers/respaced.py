"""Noise levels that a run places otherwise than its model's timesteps are."""

import importlib
from typing import Any

import numpy
from torch import Tensor

from fastzoo.samplers import schedules
from fastzoo.samplers.algebra import Program, tensor
from fastzoo.samplers.diffusers.base import Scheduler
from fastzoo.samplers.diffusers.noise_levels import VariancePreserving

_SPACINGS = (
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "use_lu_lambdas",
)

# Of alpha bar at the last timestep with rescale_betas_zero_snr: the noise level is finite.
_NO_SIGNAL = 2.0**-24


def beta_sigmas(n: int, sigma_min: float, sigma_max: float, a: float, b: float) -> numpy.ndarray:
    """Levels at equal steps of the Beta(a, b) distribution (Lee et al., Beta sampling is all you
    need, 2024)."""
    try:
        distribution = importlib.import_module("scipy.stats").beta
    except ModuleNotFoundError as error:
        raise ImportError("use_beta_sigmas: expected scipy to be installed") from error
    share: numpy.ndarray = distribution.ppf(1 - numpy.linspace(0, 1, n), a, b)
    return sigma_min + share * (sigma_max - sigma_min)


def times_of(levels: numpy.ndarray, trained: numpy.ndarray) -> numpy.ndarray:
    """The timesteps, between whole ones, whose trained levels these are; linear in log sigma."""
    return numpy.interp(numpy.log(levels), numpy.log(trained), numpy.arange(len(trained)))


class Respaced(VariancePreserving, Scheduler):
    """A scheduler whose run has noise levels ``sigma / alpha`` of its own: ``_levels``."""

    def _set_trained_levels(self) -> None:
        """``_trained``: sigma / alpha of each of the model's timesteps."""
        asked = [name for name in _SPACINGS if getattr(self.config, name, False)]
        if len(asked) > 1:
            raise ValueError(f"expected at most one of {_SPACINGS}, got {asked}")
        self._spacing = asked[0] if asked else None
        self._set_noise_levels()
        if getattr(self.config, "rescale_betas_zero_snr", False):
            self._alphas_bar[-1] = self.alphas_cumprod[-1] = _NO_SIGNAL
        self._trained = numpy.sqrt((1 - self._alphas_bar) / self._alphas_bar)

    def _respaced(self, n: int, sigma_min: float, sigma_max: float) -> numpy.ndarray:
        """n levels from one to the other, spaced as the config has it."""
        if self._spacing == "use_karras_sigmas":
            return schedules.karras_sigmas(n, sigma_min, sigma_max, final=None).numpy()
        if self._spacing == "use_beta_sigmas":
            return beta_sigmas(n, sigma_min, sigma_max, 0.6, 0.6)
        # Lu's lambdas are equal steps of log sigma too.
        return schedules.exponential_sigmas(n, sigma_min, sigma_max, final=None).numpy()

    def _levels_at_trained(self, timesteps: numpy.ndarray) -> numpy.ndarray:
        return numpy.interp(timesteps, numpy.arange(len(self._trained)), self._trained)

    def _alpha_sigma_of(self, levels: Any) -> tuple[Any, Any]:
        """alpha and sigma of the samples of these levels."""
        alpha = 1 / numpy.sqrt(levels**2 + 1)
        return alpha, levels * alpha

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """``alpha x + sigma noise`` at each sample's timestep of the run; within a run, or one whose
        begin is set, at the next step whatever the timesteps are."""
        if self._begin_index is None:
            places = [self.index_for_timestep(t) for t in timesteps.flatten().tolist()]
        else:
            next_place = self._step_index
            places = [self._begin_index if next_place is None else next_place] * len(timesteps)
        alpha, sigma = self._alpha_sigma_of(self._levels[places])
        row = alpha * tensor("x") + sigma * tensor("noise")
        tensors = {"x": original_samples, "noise": noise.expand_as(original_samples)}
        result: Tensor = Program({"sample": row}, "x")(tensors)
        return result
