"""Integration of ordinary differential equations by explicit Runge-Kutta methods."""

import bisect
import dataclasses
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastzoo.samplers.algebra import Program, tensor
from fastzoo.samplers.per_sample import integrate_per_sample
from fastzoo.samplers.runge_kutta import (
    DenseOutput,
    ErrorNorm,
    IntegrationError,
    Layout,
    MaxStepsExceeded,
    NonFiniteDerivative,
    Options,
    RightHandSide,
    Stages,
    StepSizeUnderflow,
    embedded_error,
    first_step,
    not_finite,
    underflow_cause,
)
from fastzoo.samplers.tableaus import ADAPTIVE, FIXED, Tableau

METHODS = (*ADAPTIVE, *FIXED)
_FIXED_OPTIONS = ("step_size", "grid_constructor", "perturb", "interp", "norm")
_CALLBACKS = ("callback_step", "callback_accept_step", "callback_reject_step")


def odeint(
    func: Callable[..., Any],
    y0: Any,
    t: Tensor,
    *,
    rtol: Any = 1e-7,
    atol: Any = 1e-9,
    method: str | None = None,
    options: dict[str, Any] | None = None,
    event_fn: Callable[..., Any] | None = None,
) -> Any:
    """The solution of ``dy/dt = func(t, y)`` from ``y(t[0]) = y0`` at the times ``t``.

    torchdiffeq's function: its signature, methods, norm and control of the step, so that the steps
    it accepts and the evaluations it makes are the same. Each stage, the end of a step and each
    requested time is one call of :func:`fastzoo.ops.ode_step`; a step reads one number back.

    Args:
        func: ``func(t, y)`` of a scalar tensor t, in y's dtype (float32 for half precision), and y
            like y0; a tuple of tensors for a tuple.
        y0: a tensor of any shape, or a tuple of tensors, of float32, float64, float16 or bfloat16.
        t: one dimension, floating, strictly increasing or decreasing.
        rtol, atol: a number, a tensor that broadcasts to y0, or for a tuple one for each tensor.
        method: of adaptive steps ``dopri5`` (the default), ``bosh3``, ``fehlberg2``,
            ``adaptive_heun``; of fixed steps ``euler``, ``midpoint``, ``heun2``, ``heun3``,
            ``rk4`` (the 3/8 rule).
        options: of adaptive steps ``first_step``, ``min_step``, ``max_step``, ``safety`` (.9),
            ``ifactor`` (10), ``dfactor`` (.2), ``max_num_steps`` (between two times of t),
            ``dtype`` of the time (float64), ``norm``, ``step_t`` and ``jump_t``: times to step on,
            and where func jumps. ``per_sample``: each entry of dimension 0 has time, steps and
            acceptance of its own; t is then given to func as ``[B]``. Of fixed steps
            ``step_size`` or ``grid_constructor(func, y0, t)`` (by default the steps go from one
            time of t to the next), ``perturb``, ``interp`` (``linear`` or ``cubic``).
        event_fn: not supported.

    Returns:
        ``[T, *y0.shape]``, at first y0; for a tuple a tuple.

    Gradient: to y0 and whatever func depends on, through the steps as they were taken, which are
    constants; to t that of the exact flow, of first order. See :func:`odeint_adjoint` for less
    memory. Deterministic.

    Raises:
        TypeError, ValueError: an argument of the wrong kind; the message names it.
        MaxStepsExceeded, StepSizeUnderflow, NonFiniteDerivative: adaptive steps could not go on;
            the exception has the times and states reached, ``.t`` and ``.y``.

    Source: Dormand & Prince 1980; Hairer, Norsett & Wanner, Solving ordinary differential equations
    I (1993), II.4; the methods' sources are in ``fastzoo/samplers/tableaus.py``.
    """
    if event_fn is not None:
        raise NotImplementedError("event_fn: events are not supported; integrate in pieces")
    method = "dopri5" if method is None else method
    if method not in METHODS:
        raise ValueError(f"method: expected one of {METHODS}, got {method!r}")
    given = dict(options or {})
    times, sign = _check_times(t)
    layout = Layout(y0, bool(given.get("per_sample", False)))
    rhs = RightHandSide(func, layout, sign)
    y = layout.pack(y0, "y0")
    moved = (t - t.detach()).to(y) if t.requires_grad and torch.is_grad_enabled() else None
    if moved is not None:
        # A later start from the same state is a start from an earlier one.
        start, y = y, y - moved[0] * rhs(rhs.time(times[0]), y)
    if len(times) == 1 or y.numel() == 0:
        states = [y] * len(times)
    elif method in FIXED:
        states = _fixed(rhs, y, y0, t, times, FIXED[method], given)
    else:
        settings = _adaptive_options(given)
        norm = ErrorNorm(layout, rtol, atol, settings.norm)
        if settings.per_sample:
            states = integrate_per_sample(rhs, norm, y, times, ADAPTIVE[method], settings)
        else:
            states = _Adaptive(rhs, norm, y, times, ADAPTIVE[method], settings).integrate()
    if moved is not None:
        states = [start] + [
            state + moved[i] * rhs(rhs.time(times[i]), state)
            for i, state in enumerate(states[1:], 1)
        ]
    return layout.unpack(torch.stack(states), len(states))


def _check_times(t: object) -> tuple[list[float], float]:
    """The times as they run upwards, and what makes t of them."""
    if not isinstance(t, Tensor):
        raise TypeError(f"t: expected a tensor, got {type(t).__name__}")
    if not t.is_floating_point():
        raise TypeError(f"t: expected a floating tensor, got {t.dtype}")
    if t.dim() != 1 or len(t) == 0:
        raise ValueError(f"t: expected [T] with T above 0, got {list(t.shape)}")
    times = t.detach().double().tolist()
    sign = -1.0 if len(times) > 1 and times[0] > times[1] else 1.0
    times = [sign * value for value in times]
    if not all(a < b for a, b in pairwise(times)):
        raise ValueError("t: expected strictly increasing or strictly decreasing times")
    return times, sign


def _adaptive_options(given: dict[str, Any]) -> Options:
    known = [each.name for each in dataclasses.fields(Options)]
    _check_options(given, known)
    return Options(**given)


def _check_options(given: dict[str, Any], known: Sequence[str]) -> None:
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ValueError(f"options: expected some of {tuple(known)}, got {unknown}")


class _Adaptive:
    """One integration in which all of the state takes the same steps."""

    def __init__(
        self,
        rhs: RightHandSide,
        norm: ErrorNorm,
        y: Tensor,
        times: list[float],
        tableau: Tableau,
        options: Options,
    ) -> None:
        device = rhs.layout.device
        self.rhs, self.norm, self.options = rhs, norm, options
        self.order = tableau.order
        # The last stages stand at the end of the step together.
        self.nodes = [node for node in tableau.nodes if node != 1.0]
        self.at_end = len(tableau.nodes) - len(self.nodes)
        self.stages = Stages(tableau, device)
        self.dense = DenseOutput(tableau, device)
        self.used, self.error_weights = embedded_error(tableau, device)
        narrow = options.dtype == torch.float32 and rhs.time_dtype == torch.float32
        self.rounded = _to_float32 if narrow else float
        self.times = [self.rounded(time) for time in times]
        self.stops = sorted(
            [(time, False) for time in self._given("step_t")]
            + [(time, True) for time in self._given("jump_t")]
        )
        if len({time for time, _ in self.stops}) < len(self.stops):
            raise ValueError("options: step_t and jump_t have a time in common, or one twice")
        self.callbacks = [getattr(rhs.func, name, None) for name in _CALLBACKS]
        # What the last step went from, for dense output.
        self.t0 = self.t = self.times[0]
        self.y0 = self.y = y
        self.k: list[Tensor] = []
        self.factor = self._factor(0.0)
        self.finite = True

    def _given(self, name: str) -> list[float]:
        value = getattr(self.options, name)
        if value is None:
            return []
        return [self.rounded(self.rhs.sign * float(time)) for time in value]

    def _factor(self, h: float) -> Tensor:
        return torch.full(
            (1,), self.rhs.sign * h, dtype=self.rhs.time_dtype, device=self.rhs.layout.device
        )

    def integrate(self) -> list[Tensor]:
        states = [self.y]
        self.f = self.rhs(self.rhs.time(self.t), self.y)
        self.h = self._first_step()
        for target in self.times[1:]:
            steps = 0
            while target > self.t:
                if steps >= self.options.max_num_steps:
                    raise self._stopped(
                        MaxStepsExceeded,
                        states,
                        f"max_num_steps = {steps} steps reached t = {self._at()}, not "
                        f"{self.rhs.sign * target} (h = {self.h})",
                    )
                self._step(states)
                steps += 1
            states.append(self._evaluate(target))
        if not bool(self.y.isfinite().all()):
            raise self._stopped(
                NonFiniteDerivative, states, f"the state overflows before {self._at()}"
            )
        return states

    def _first_step(self) -> float:
        if self.options.first_step is not None:
            return self.rounded(self.options.first_step)
        tau = torch.full((1,), self.t, dtype=torch.float64, device=self.y.device)
        h = first_step(self.rhs, self.norm, self.y, self.f, tau, self.order).item()
        if not h > 0:
            found = not_finite(self.y, self.f)
            if found is not None:
                message = f"{found} infinities or NaN at t = {self._at()}"
                raise self._stopped(NonFiniteDerivative, [self.y], message)
        return self.rounded(h)

    def _step(self, states: list[Tensor]) -> None:
        options, t = self.options, self.t
        h = min(max(self.h, options.min_step), options.max_step)
        end = self.rounded(t + h)
        if not end > t:
            raise self._stopped(
                StepSizeUnderflow if self.finite else NonFiniteDerivative,
                states,
                f"the step at t = {self._at()} became h = {h}, too small to move the time: "
                + underflow_cause(self.finite, self.norm, self.y.dtype),
            )
        self._call_back(0, h)
        jumps = False
        if self.stops:
            i = bisect.bisect_right(self.stops, (t, True))
            if i < len(self.stops) and self.stops[i][0] <= end:
                end, jumps = self.stops[i]
                h = end - t
        rhs = self.rhs
        times = self._stage_times(t, end, h)
        factor = self._factor(h)
        y, k = self.stages.run(rhs, times, self.y, self.f, factor)
        used = [k[j] for j in self.used]
        square = self.norm.squares(self.y, y, used, self.error_weights, factor).item()
        ratio = math.sqrt(square)
        self.finite = not math.isnan(ratio)
        accepted = ratio <= 1 or (self.finite and h <= options.min_step)
        if accepted:
            self._call_back(1, h)
            self.t0, self.y0, self.k, self.factor = t, self.y, k, factor
            self.t, self.y, self.f = end, y, k[-1]
            if jumps:
                self.f = rhs(rhs.time(end, 1), y)
        else:
            self._call_back(2, h)
        self.h = self.rounded(h * self._growth(ratio))

    def _stage_times(self, t: float, end: float, h: float) -> Sequence[Tensor]:
        rhs = self.rhs
        taus = [t + node * h for node in self.nodes] + [rhs.nudged(end, -1)] * self.at_end
        if rhs.layout.device.type == "cpu":
            moments = torch.tensor([rhs.sign * tau for tau in taus], dtype=rhs.time_dtype)
            return moments.unbind()
        # Elsewhere that would be a copy that is waited for.
        return [rhs.time(tau) for tau in taus]

    def _growth(self, ratio: float) -> float:
        """By what the next step is longer."""
        options = self.options
        if ratio == 0:
            return options.ifactor
        if math.isnan(ratio):
            return options.dfactor
        least = 1.0 if ratio < 1 else options.dfactor
        wanted: float = options.safety / ratio ** (1 / self.order)
        return min(options.ifactor, max(wanted, least))

    def _evaluate(self, target: float) -> Tensor:
        """The state at a time in the last step."""
        if target == self.t:
            return self.y
        x = (target - self.t0) / (self.t - self.t0)
        return self.dense(x, self.y0, self.k, self.factor)

    def _call_back(self, which: int, h: float) -> None:
        callback = self.callbacks[which]
        if callback is not None:
            rhs = self.rhs
            y = rhs.layout.unpack(self.y)
            callback(rhs.time(self.t), y, torch.scalar_tensor(h, dtype=self.options.dtype))

    def _at(self) -> float:
        return self.rhs.sign * self.t

    def _stopped(
        self, kind: type[IntegrationError], states: list[Tensor], message: str
    ) -> IntegrationError:
        reached = self.times[: len(states)]
        if self.t > reached[-1]:
            reached, states = [*reached, self.t], [*states, self.y]
        t = torch.tensor(reached, dtype=torch.float64, device=self.y.device) * self.rhs.sign
        return kind(message, t, self.rhs.layout.unpack(torch.stack(states), len(states)))


def _to_float32(value: float) -> float:
    return float(np.float32(value))


def _fixed(
    rhs: RightHandSide,
    y: Tensor,
    y0: Any,
    t: Tensor,
    times: list[float],
    tableau: Tableau,
    options: dict[str, Any],
) -> list[Tensor]:
    """Steps over a grid: everything about them is known beforehand, and nothing is read back."""
    _check_options(options, _FIXED_OPTIONS)
    interp = options.get("interp", "linear")
    if interp not in ("linear", "cubic"):
        raise ValueError(f"options interp: expected linear or cubic, got {interp!r}")
    grid = np.array(_grid(rhs, y0, t, times, options))
    if grid[0] != times[0] or grid[-1] != times[-1]:
        raise ValueError("options grid_constructor: expected a grid from t[0] to t[-1]")
    lengths = np.diff(grid)
    nodes = np.array([0.0, *tableau.nodes])
    at = np.where(nodes == 1, grid[1:, None], grid[:-1, None] + lengths[:, None] * nodes)
    kind = np.float64 if rhs.time_dtype == torch.float64 else np.float32
    at = at.astype(kind)
    if options.get("perturb", False):
        at[:, 0] = np.nextafter(at[:, 0], kind(np.inf))
        at[:, nodes == 1] = np.nextafter(at[:, nodes == 1], kind(-np.inf))
    device = y.device
    moments = torch.from_numpy(rhs.sign * at).to(device)
    factors = torch.from_numpy((rhs.sign * lengths).astype(kind)).to(device).split(1)
    stages = Stages(tableau, device)
    callback = getattr(rhs.func, _CALLBACKS[0], None)
    states = [y]
    for step, factor in enumerate(factors):
        first_time, *later = moments[step].unbind()
        if callback is not None:
            length = torch.scalar_tensor(lengths[step], dtype=rhs.time_dtype)
            callback(rhs.time(grid[step]), rhs.layout.unpack(y), length)
        first = rhs(first_time, y)
        end, _ = stages.run(rhs, later, y, first, factor)
        while len(states) < len(times) and grid[step + 1] >= times[len(states)]:
            target = times[len(states)]
            if target == grid[step + 1]:
                states.append(end)
                continue
            x = (target - grid[step]) / lengths[step]
            if interp == "cubic":
                last = rhs(rhs.time(grid[step + 1]), end)
                states.append(_hermite(x, y, first, end, last, factor))
            else:
                states.append(_interpolated({"y": 1 - x, "end": x}, {"y": y, "end": end}))
        y = end
    return states


def _grid(
    rhs: RightHandSide, y0: Any, t: Tensor, times: list[float], options: dict[str, Any]
) -> list[float]:
    step_size, constructor = options.get("step_size"), options.get("grid_constructor")
    if constructor is not None:
        if step_size is not None:
            raise ValueError("options: step_size and grid_constructor exclude each other")
        found = constructor(rhs.func, y0, t.detach())
        return [rhs.sign * value for value in found.detach().double().tolist()]
    if step_size is None:
        return times
    # In t's own dtype, in which the number of steps may differ from float64's.
    upwards = torch.tensor([times[0], times[-1]], dtype=t.dtype)
    count = int(torch.ceil((upwards[1] - upwards[0]) / step_size + 1))
    grid = torch.arange(0, count, dtype=t.dtype) * step_size + upwards[0]
    grid[-1] = upwards[1]
    found_grid: list[float] = grid.double().tolist()
    return found_grid


def _hermite(
    x: float, y: Tensor, first: Tensor, end: Tensor, last: Tensor, factor: Tensor
) -> Tensor:
    """The cubic through both ends of a step with their slopes."""
    weights = {
        "y": (1 + 2 * x) * (1 - x) ** 2,
        "end": x**2 * (3 - 2 * x),
        "first": x * (1 - x) ** 2,
        "last": x**2 * (x - 1),
    }
    tensors = {"y": y, "end": end, "first": first, "last": last}
    return _interpolated(weights, tensors, scaled=("first", "last"), factor=factor)


def _interpolated(
    weights: dict[str, float], tensors: dict[str, Tensor], scaled: Any = (), **more: Any
) -> Tensor:
    total = weights["y"] * tensor("y")
    for name in list(weights)[1:]:
        total = total + weights[name] * tensor(name)
    program = Program({"state": total}, like="y", scaled=scaled)
    out: Tensor = program(tensors, **more)
    return out
