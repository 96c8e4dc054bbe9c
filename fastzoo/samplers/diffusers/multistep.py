"""What DPM-Solver and UniPC share: a run's levels, and the values of the steps before."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy
import torch
from torch import Tensor

from fastzoo.samplers import formulas, schedules
from fastzoo.samplers.algebra import Combination, tensor
from fastzoo.samplers.diffusers.base import PREDICTIONS
from fastzoo.samplers.diffusers.respaced import Respaced, times_of


class Multistep(Respaced):
    """A scheduler that steps by what the model said at the last ``solver_order`` steps.

    ``model_outputs`` are these values, x0 or eps, the latest last, each a row that its step kept;
    ``lower_order_nums`` counts them. Level i of a run is that of its step i.
    """

    model_outputs: list[Tensor | None]
    lower_order_nums: int

    def _set_trained_levels(self) -> None:
        super()._set_trained_levels()
        order = self.config.solver_order
        if not isinstance(order, int) or order < 1:
            raise ValueError(f"solver_order: expected at least 1, got {order!r}")
        if self.config.prediction_type == "flow_prediction" and not self.config.use_flow_sigmas:
            raise ValueError("prediction_type: 'flow_prediction' expects use_flow_sigmas")
        alpha, sigma = self._alpha_sigma(self._alphas_bar)
        self.alpha_t = torch.from_numpy(alpha.astype(numpy.float32))
        self.sigma_t = torch.from_numpy(sigma.astype(numpy.float32))
        self._lambdas = formulas.log_snr(alpha, sigma)
        self.lambda_t = torch.from_numpy(self._lambdas.astype(numpy.float32))
        self.num_inference_steps = None
        count = self.config.num_train_timesteps
        self._begin_run(numpy.arange(count)[::-1], self._trained[::-1], None)

    def _begin_run(
        self,
        times: numpy.ndarray,
        levels: numpy.ndarray,
        device: torch.device | str | None,
    ) -> None:
        """Publishes the timesteps, as whole numbers, and the levels with the last one; the run has
        no values yet."""
        self._publish(times.astype(numpy.int64), levels, device)
        self.model_outputs = [None] * self.config.solver_order
        self.lower_order_nums = 0

    def _final(self, sigma_min: float) -> float:
        """Where the last step ends, by ``final_sigmas_type``."""
        kind = self.config.final_sigmas_type
        if kind not in ("zero", "sigma_min"):
            raise ValueError(f"final_sigmas_type: expected 'zero' or 'sigma_min', got {kind!r}")
        return sigma_min if kind == "sigma_min" else 0.0

    def _spaced_of(self, n: int, count: int) -> numpy.ndarray:
        """n whole timesteps below ``count``, that of no noise left out."""
        config = self.config
        if not 1 <= n <= config.num_train_timesteps:
            raise ValueError(
                f"num_inference_steps: expected 1 to {config.num_train_timesteps}, got {n}"
            )
        if config.timestep_spacing == "trailing":
            return numpy.arange(count, 0, -config.num_train_timesteps / n).round() - 1
        return spaced(config.timestep_spacing, n + 1, count, config.steps_offset, whole=True)[:-1]

    def _alpha_sigma_of(self, levels: Any) -> tuple[Any, Any]:
        if self.config.use_flow_sigmas:
            return 1 - levels, levels
        return super()._alpha_sigma_of(levels)

    # The plan of a run.

    def _orders(self, steps: numpy.ndarray) -> numpy.ndarray:
        """The order of each of the steps that come now: one more than there are values, at most
        ``solver_order``."""
        values = self.lower_order_nums + 1 + numpy.arange(len(steps))
        return numpy.minimum(values, self.config.solver_order)

    def _ends(self, steps: numpy.ndarray) -> numpy.ndarray:
        """The steps to no noise at all and those of no length, which are of order 1: the limit."""
        here, there = self._levels[steps], self._levels[steps + 1]
        return (there == 0) | (there == here)

    @staticmethod
    def _alike(steps: numpy.ndarray, *marks: numpy.ndarray) -> list[numpy.ndarray]:
        """The steps by their marks."""
        groups: dict[Any, list[int]] = {}
        for step, *mark in zip(steps.tolist(), *(m.tolist() for m in marks), strict=True):
            groups.setdefault(tuple(mark), []).append(step)
        return [numpy.array(group) for group in groups.values()]
