"""What DPM-Solver and UniPC share: a run's levels, and what the model said at the steps before."""

from typing import Any

import numpy
import torch
from torch import Tensor

from fastzoo.samplers import formulas, schedules
from fastzoo.samplers.algebra import Combination, tensor
from fastzoo.samplers.diffusers.base import PREDICTIONS
from fastzoo.samplers.diffusers.noise_levels import Trained, check_conversion

# Of alpha bar with rescale_betas_zero_snr, in place of an exact 0: levels are sigma / alpha.
_LEAST_SHARE = 2.0**-24


class Multistep(Trained):
    """A scheduler that steps by the values, x0 or eps, of the last ``solver_order`` steps.

    ``model_outputs`` are those values, the latest last, each a row that its step kept, and
    ``lower_order_nums`` is how many there are. ``_levels`` are sigma / alpha, or with
    ``use_flow_sigmas`` the sigma of rectified flows.
    """

    model_outputs: list[Tensor | None]
    lower_order_nums: int

    def _set_noise_levels(self) -> None:
        config = self.config
        check_conversion(config)
        order = config.solver_order
        if not isinstance(order, int) or order < 1:
            raise ValueError(f"solver_order: expected at least 1, got {order!r}")
        if config.prediction_type == "flow_prediction" and not config.use_flow_sigmas:
            raise ValueError("prediction_type: 'flow_prediction' expects use_flow_sigmas")
        super()._set_noise_levels()
        if config.rescale_betas_zero_snr:
            self._alphas_bar[-1] = self.alphas_cumprod[-1] = _LEAST_SHARE
        alpha, sigma = (part.numpy() for part in schedules.alpha_sigma(self._alphas_bar))
        self._lambdas = formulas.log_snr(alpha, sigma)
        self.alpha_t, self.sigma_t, self.lambda_t = (
            torch.from_numpy(part.astype(numpy.float32)) for part in (alpha, sigma, self._lambdas)
        )
        self._training = schedules.noise_levels(self._alphas_bar).numpy()
        times = numpy.arange(len(self._training))[::-1]
        self._begin(times, numpy.append(self._training[::-1], 0.0), None)
        self.num_inference_steps = None

    def _begin(
        self, times: numpy.ndarray, levels: numpy.ndarray, device: torch.device | str | None
    ) -> None:
        """A run of these timesteps, cut to whole ones, and levels; it has no values yet."""
        self._publish(times.astype(numpy.int64), levels, device)
        self.num_inference_steps = len(times)
        self.model_outputs = [None] * self.config.solver_order
        self.lower_order_nums = 0

    def _spaced(self, n: int | None, count: int) -> numpy.ndarray:
        """n timesteps below ``count``, the last one not that with the least noise."""
        config = self.config
        most, spacing = config.num_train_timesteps, config.timestep_spacing
        if n is None or not 1 <= n <= most:
            raise ValueError(f"num_inference_steps: expected 1 to {most}, got {n}")
        if spacing == "linspace":
            times = numpy.linspace(0, count - 1, n + 1).round()[:0:-1]
        elif spacing == "leading":
            times = numpy.arange(n, 0, -1) * float(count // (n + 1)) + config.steps_offset
        elif spacing == "trailing":
            times = numpy.arange(count, 0, -most / n).round() - 1
        else:
            raise ValueError(
                f"timestep_spacing: expected 'linspace', 'leading' or 'trailing', got {spacing!r}"
            )
        return numpy.asarray(times)

    def _levels_at(self, times: numpy.ndarray) -> numpy.ndarray:
        """The levels at which the model was trained at these timesteps."""
        return numpy.asarray(numpy.interp(times, numpy.arange(len(self._training)), self._training))

    def _final(self, least: float) -> float:
        """Where the last step ends, by ``final_sigmas_type``."""
        kind = self.config.final_sigmas_type
        if kind not in ("zero", "sigma_min"):
            raise ValueError(f"final_sigmas_type: expected 'zero' or 'sigma_min', got {kind!r}")
        return 0.0 if kind == "zero" else float(least)

    def _alpha_sigma(self, levels: Any) -> tuple[Any, Any]:
        if self.config.use_flow_sigmas:
            return 1 - levels, levels
        alpha = 1 / numpy.sqrt(levels**2 + 1)
        return alpha, levels * alpha

    def _lambda(self, steps: numpy.ndarray) -> numpy.ndarray:
        return numpy.asarray(formulas.log_snr(*self._alpha_sigma(self._levels[steps])))

    def scale_model_input(self, sample: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The sample as it is: its scale is the same at every timestep."""
        return sample

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """``alpha x + sigma noise`` at each sample's timestep of this run, or at the run's step
        where ``set_begin_index`` was called."""
        alpha, sigma = self._alpha_sigma(self._levels)
        row = alpha * tensor("x") + sigma * tensor("noise")
        places = self._places_of(timesteps)
        return self._mixed("add_noise", row, original_samples, noise, places)

    # A run's plan.

    def _orders(self, steps: numpy.ndarray) -> numpy.ndarray:
        """The order of the steps that come now: there is one value more at each."""
        values = self.lower_order_nums + 1 + numpy.arange(len(steps))
        # A step to no noise, or of no length, has its limit in the first order.
        here, there = self._levels[steps], self._levels[steps + 1]
        values[(there == 0) | (there == here)] = 1
        return numpy.asarray(numpy.minimum(values, self.config.solver_order))

    def _value(
        self, steps: numpy.ndarray, x: Combination, output: Combination, of_noise: bool
    ) -> tuple[dict[str, Combination], Combination]:
        """What the model says, x0 or eps, as rows to be kept; and by its name."""
        alpha, sigma = self._alpha_sigma(self._levels[steps])
        if not of_noise:
            return {"x0": self._denoised(x, output, alpha, sigma)}, tensor("x0")
        if self.config.thresholding:
            x0 = self._denoised(x, output, alpha, sigma)
            eps = formulas.noise_of(x, tensor("x0"), alpha, sigma)
            return {"x0": x0, "eps": eps}, tensor("eps")
        prediction = PREDICTIONS[self.config.prediction_type]
        return {"eps": formulas.predicted_noise(prediction, x, output, alpha, sigma)}, tensor("eps")

    @staticmethod
    def _before(k: int) -> Combination:
        """The value of k steps before."""
        return tensor(f"before {k}")

    def _history(self) -> dict[str, Tensor]:
        latest = enumerate(reversed(self.model_outputs), 1)
        return {f"before {k}": value for k, value in latest if value is not None}

    def _remember(self, value: Tensor) -> None:
        self.model_outputs = [*self.model_outputs[1:], value]
        self.lower_order_nums = min(self.lower_order_nums + 1, self.config.solver_order)


def alike(steps: numpy.ndarray, *marks: numpy.ndarray) -> list[numpy.ndarray]:
    """The steps whose marks are the same."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for step, *mark in zip(*(values.tolist() for values in (steps, *marks)), strict=True):
        groups.setdefault(tuple(mark), []).append(step)
    return [numpy.array(group) for group in groups.values()]
