"""What the loops of :mod:`fastzoo.samplers.ode` and :mod:`fastzoo.samplers.per_sample` share.

A state lies in rows ``[R, n]``: one row where all of it takes the same steps, one a sample where
each takes its own. Time runs upwards inside: tau = ``sign`` t, and steps are above 0.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastzoo.ops._operator import OPERATORS
from fastzoo.samplers.algebra import Program, Tables, tensor
from fastzoo.samplers.tableaus import EULER, Tableau

FLOATING = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class IntegrationError(RuntimeError):
    """An integration that could not go on, with what it had reached.

    Attributes:
        t: the times of ``y``: those asked for and reached, then that of the last step. With a step
            size a sample ``[B]``, where each sample stood.
        y: the states then, as :func:`fastzoo.samplers.odeint` returns them; with a step size a
            sample, one state.
    """

    def __init__(self, message: str, t: Tensor, y: Any) -> None:
        super().__init__(message)
        self.t = t
        self.y = y


class MaxStepsExceeded(IntegrationError):
    """``max_num_steps`` were taken before the next time that was asked for."""


class StepSizeUnderflow(IntegrationError):
    """The step became too small to move the time."""


class NonFiniteDerivative(IntegrationError):
    """The right-hand side gave infinity or NaN where no smaller step could avoid it."""


@dataclass
class Options:
    """How an adaptive method chooses its steps."""

    first_step: float | None = None
    min_step: float = 0.0
    max_step: float = math.inf
    safety: float = 0.9
    ifactor: float = 10.0
    dfactor: float = 0.2
    max_num_steps: int = 2**31 - 1
    dtype: torch.dtype = torch.float64
    step_t: Tensor | None = None
    jump_t: Tensor | None = None
    norm: Any = None
    per_sample: bool = False

    def __post_init__(self) -> None:
        for name in ("first_step", "min_step", "max_step", "safety", "ifactor", "dfactor"):
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, float(value))
        self.max_num_steps = int(self.max_num_steps)
        if self.dtype not in (torch.float64, torch.float32):
            raise ValueError(f"options dtype: expected float64 or float32, got {self.dtype}")


class Layout:
    """The one tensor that a state is integrated as: itself, or those of a tuple side by side,
    ``[n]``, and ``[B, n]`` with steps per sample."""

    def __init__(self, y0: Any, per_sample: bool) -> None:
        self.is_tuple = not isinstance(y0, Tensor)
        self.per_sample = per_sample
        tensors = tuple(y0) if isinstance(y0, tuple | list) else (y0,)
        if not tensors or not all(isinstance(each, Tensor) for each in tensors):
            raise TypeError(f"y0: expected a tensor or a tuple of them, got {type(y0).__name__}")
        first = tensors[0]
        for each in tensors:
            if each.dtype not in FLOATING:
                raise TypeError(
                    "y0: expected float32, float64, float16 or bfloat16, got "
                    f"{each.dtype} (torch.view_as_real makes real numbers of complex ones)"
                )
            if (each.dtype, each.device) != (first.dtype, first.device):
                raise ValueError("y0: expected tensors of one dtype and device")
            if per_sample and (each.dim() == 0 or len(each) != len(first)):
                raise ValueError("y0: expected [B, ...], a row for each sample, with per_sample")
        self.dtype, self.device = first.dtype, first.device
        self.shapes = [each.shape for each in tensors]
        self.lead = (len(first),) if per_sample else ()
        self._as_is = not self.is_tuple and first.dim() > 0
        rows = max((1, *self.lead))
        ends = np.cumsum([0, *(each.numel() // rows for each in tensors)]).tolist()
        self.parts = list(pairwise(ends))

    def pack(self, state: Any, name: str) -> Tensor:
        """A state, or its derivative, as the tensor."""
        if not self.is_tuple:
            if not isinstance(state, Tensor):
                raise TypeError(f"{name}: expected a tensor, got {type(state).__name__}")
            if state.shape != self.shapes[0]:
                raise ValueError(
                    f"{name}: expected y's shape {list(self.shapes[0])}, got {list(state.shape)}"
                )
            return state if self._as_is else state.reshape(1)
        if not isinstance(state, tuple | list) or [s.shape for s in state] != self.shapes:
            raise ValueError(f"{name}: expected a tuple of tensors with the shapes of y's")
        return torch.cat([each.reshape((*self.lead, -1)) for each in state], -1)

    def unpack(self, packed: Tensor, *times: int) -> Any:
        """The state, or the states of as many times."""
        if self._as_is:
            return packed
        if not self.is_tuple:
            return packed.view(times)
        return tuple(
            packed[..., begin:end].reshape((*times, *shape))
            for (begin, end), shape in zip(self.parts, self.shapes, strict=True)
        )

    def rows(self, packed: Tensor, part: int) -> Tensor:
        """A tensor of the state as ``[1, n]``, or ``[B, n]`` with steps per sample."""
        if self.is_tuple:
            begin, end = self.parts[part]
            packed = packed[..., begin:end]
        elif self.per_sample:
            return packed
        return packed.reshape((*self.lead, -1) if self.per_sample else (1, -1))

    def spread(self, each: Tensor) -> Tensor:
        """A number of each sample ``[B]``, so that it broadcasts to the tensor."""
        return each.reshape(self.lead + (1,) * (1 if self.is_tuple else len(self.shapes[0]) - 1))


class RightHandSide:
    """``func`` on rows, and the times as it sees them: in the state's dtype, float32 for half
    precision."""

    def __init__(self, func: Callable[..., Any], layout: Layout, sign: float) -> None:
        self.func = func
        self.layout = layout
        self.sign = sign
        self.time_dtype = torch.float64 if layout.dtype == torch.float64 else torch.float32
        self._first: Tensor | None = None
        self._calls = 0
        self._reuses_memory = False

    def __call__(self, t: Tensor, rows: Tensor) -> Tensor:
        layout = self.layout
        found = layout.pack(self.func(t, layout.unpack(rows)), "func")
        if found.dtype != layout.dtype:
            found = found.to(layout.dtype)
        # A captured model writes every answer to the same memory. The first answer is copied, so
        # that the second can tell.
        if self._calls < 2:
            self._calls += 1
            if self._first is None:
                self._first = found
                return found.clone()
            self._reuses_memory = found.data_ptr() == self._first.data_ptr()
            self._first = None
        return found.clone() if self._reuses_memory else found

    def time(self, tau: float, nudge: int = 0) -> Tensor:
        """tau as a scalar tensor of t; ``nudge`` -1 or 1 for the number before or after it."""
        if nudge:
            tau = self.nudged(tau, nudge)
        return torch.scalar_tensor(
            self.sign * tau, dtype=self.time_dtype, device=self.layout.device
        )

    def times(self, tau: Tensor, nudge: int = 0) -> Tensor:
        """float64 tau ``[R]`` as t: a scalar of one row, and one for each sample."""
        t = tau.to(self.time_dtype)
        if nudge:
            t = torch.nextafter(t, torch.full_like(t, nudge * math.inf))
        t = self.sign * t
        return t if self.layout.per_sample else t.reshape(())

    def nudged(self, tau: float, nudge: int) -> float:
        if self.time_dtype == torch.float64:
            return math.nextafter(tau, nudge * math.inf)
        return float(np.nextafter(np.float32(tau), np.float32(nudge * math.inf)))


class Kernels:
    """ops.ode_step and ops.step_error as a loop calls them: the arguments that never change are
    made once, and what the loop made itself is not checked."""

    def __init__(self, device: torch.device) -> None:
        self._sum, self._error = (
            OPERATORS[name].launcher(None, device.type) for name in ("ode_step", "step_error")
        )
        none = torch.empty(0, device=device)
        indices = torch.empty(0, dtype=torch.int64, device=device)
        self._absent = [(none,) * count for count in range(9)]
        self._rest = (none, indices)
        self._step = indices

    def sum(self, tensors: list[Tensor], table: Tensor, factor: Tensor, scaled: int) -> Tensor:
        out: Tensor = self._sum(
            tensors,
            *tensors,
            *self._absent[8 - len(tensors)],
            table,
            self._step,
            factor,
            *self._rest,
            scaled,
            0,
            False,
        )[0]
        return out

    def error(
        self, tensors: list[Tensor], weights: Tensor, factor: Tensor, rtol: float, atol: float
    ) -> Tensor:
        absent = self._absent[8 - len(tensors)]
        found: Tensor = self._error(tensors, *tensors, *absent, weights, factor, rtol, atol)
        return found


@functools.lru_cache(maxsize=256)
def _sum_of(weights: tuple[float, ...]) -> Program:
    """``y + h sum_j w_j k_j``; a method's are the same in every integration."""
    names = {f"k{j}": weight for j, weight in enumerate(weights) if weight != 0}
    total = tensor("y")
    for name, weight in names.items():
        total = total + weight * tensor(name)
    return Program({"end": total}, like="y", scaled=names)


class _Sum:
    """``y + h sum_j w_j k_j`` over the k with weights, as one call of ops.ode_step."""

    def __init__(self, weights: Sequence[float], kernels: Kernels) -> None:
        self.stages = [j for j, weight in enumerate(weights) if weight != 0]
        self.program = _sum_of(tuple(weights))
        self._scaled = sum(1 << position for position in self.program.scaled)
        self._kernels = kernels

    def __call__(self, table: Tensor, y: Tensor, k: Sequence[Tensor], factor: Tensor) -> Tensor:
        tensors = [y, *[k[j] for j in self.stages]]
        return self._kernels.sum(tensors, table, factor, self._scaled)


class Stages:
    """A method's sums on a device."""

    def __init__(self, tableau: Tableau, device: torch.device) -> None:
        self.tableau = tableau
        rows = list(tableau.stages)
        if not tableau.ends_in_stage:
            rows.append(tableau.solution)
        kernels = Kernels(device)
        self._sums = [_Sum(row, kernels) for row in rows]
        tables = Tables([each.program for each in self._sums]).on(device)
        self._calls = list(zip(self._sums, tables, strict=True))

    def run(
        self,
        rhs: "RightHandSide",
        times: Sequence[Tensor],
        y: Tensor,
        first: Tensor,
        factor: Tensor,
    ) -> tuple[Tensor, list[Tensor]]:
        """The end of a step and its k; ``times`` are those of the stages after the first."""
        k, end = [first], y
        for t, (each, table) in zip(times, self._calls, strict=False):
            end = each(table, y, k, factor)
            k.append(rhs(t, end))
        if not self.tableau.ends_in_stage:
            each, table = self._calls[-1]
            end = each(table, y, k, factor)
        return end, k


class DenseOutput:
    """The quartic of a step, at any fraction x of it."""

    def __init__(self, tableau: Tableau, device: torch.device) -> None:
        powers = tableau.dense
        self._sum = _Sum(np.abs(powers).sum(0).tolist(), Kernels(device))
        self._table = self._sum.program.table[None]
        self._powers = powers[:, self._sum.stages]
        self._device_table, self._device_powers = (
            torch.from_numpy(array).to(device) for array in (self._table, self._powers)
        )

    def __call__(self, x: float | Tensor, y: Tensor, k: Sequence[Tensor], factor: Tensor) -> Tensor:
        """``x`` a number, or float64 ``[B]`` on the device for as many rows."""
        count = len(self._sum.stages)
        if isinstance(x, Tensor):
            table = self._device_table.repeat(1, len(x), 1, 1)
            table[0, :, 0, 1 : 1 + count] = _polynomial(x[:, None], self._device_powers)
        else:
            host = self._table.copy()
            host[..., 1 : 1 + count] = _polynomial(x, self._powers)
            table = torch.from_numpy(host).to(y.device)
        return self._sum(table, y, k, factor)


def _polynomial(x: Any, powers: Any) -> Any:
    """``sum_p x^(p + 1) powers[p]``, elementwise: the bits of a product of matrices depend on the
    batch."""
    total = powers[-1] * x
    for row in reversed(powers[:-1].unbind() if isinstance(powers, Tensor) else powers[:-1]):
        total = (total + row) * x
    return total


@dataclass(frozen=True)
class LeadingParts:
    """A norm option: the default one, of the first ``count`` tensors of the state alone."""

    count: int


class ErrorNorm:
    """The default norm, root mean square (over a tuple the greatest of its tensors'), or the one
    that was given."""

    def __init__(self, layout: Layout, rtol: Any, atol: Any, norm: Any) -> None:
        self._layout = layout
        tolerances = [
            _each(name, value, layout) for name, value in (("rtol", rtol), ("atol", atol))
        ]
        self.least_rtol = min(float(torch.as_tensor(one).min()) for one in tolerances[0])
        count = len(layout.parts)
        if isinstance(norm, LeadingParts):
            count, norm = norm.count, None
        self._parts = [j for j, (begin, end) in enumerate(layout.parts[:count]) if end > begin]
        self._norm = norm
        self._kernels = Kernels(layout.device)
        self._by_part: list[tuple[int, tuple[float, float]]] | None = None
        if norm is None and all(isinstance(one, float) for both in tolerances for one in both):
            by_part = list(zip(*tolerances, strict=True))
            self._by_part = [(j, by_part[j]) for j in self._parts]
        else:
            self._rtol, self._atol = (_by_element(both, layout) for both in tolerances)
        # A mean of few means costs less than the views that make it one.
        shape = layout.shapes[0]
        single = self._by_part is not None and not (layout.is_tuple or layout.per_sample)
        self._is_short = single and len(shape) > 0 and shape[0] <= 256

    def squares(
        self, y0: Tensor, y1: Tensor, k: Sequence[Tensor], weights: Tensor, factor: Tensor
    ) -> Tensor:
        """The square of the norm of ``factor sum_j weights_{2 + j} k_j`` relative to what is
        tolerated between y0 and y1: float64 ``[1]``, or ``[B]`` with steps per sample."""
        if self._by_part is None:
            return self._general(y0, y1, k, weights, factor)
        rows, error = self._layout.rows, self._kernels.error
        if self._is_short:
            rtol, atol = self._by_part[0][1]
            return error([y0, y1, *k], weights, factor, rtol, atol).mean(0, True)
        found = [
            error([rows(each, part) for each in (y0, y1, *k)], weights, factor, rtol, atol)
            for part, (rtol, atol) in self._by_part
        ]
        return found[0] if len(found) == 1 else torch.stack(found).amax(0)

    @torch.no_grad()
    def _general(
        self, y0: Tensor, y1: Tensor, k: Sequence[Tensor], weights: Tensor, factor: Tensor
    ) -> Tensor:
        error = sum(weight * each for weight, each in zip(weights[2:], k, strict=False))
        allowed = self._atol + self._rtol * torch.maximum(y0.abs(), y1.abs())
        ratio = self._layout.spread(factor) * error / allowed
        if self._norm is None:
            parts = [self._layout.rows(ratio, part) for part in self._parts]
            return torch.stack([part.double().square().flatten(1).mean(1) for part in parts]).amax(
                0
            )
        value = self._norm(self._layout.unpack(ratio.to(y0.dtype)))
        return torch.as_tensor(value, dtype=torch.float64, device=y0.device).square().reshape(1)


def _each(name: str, value: Any, layout: Layout) -> list[Any]:
    """A tolerance for each tensor of the state: a number, or a tensor that broadcasts to it."""
    given = list(value) if isinstance(value, tuple | list) else [value] * len(layout.parts)
    if len(given) != len(layout.parts):
        raise ValueError(f"{name}: expected {len(layout.parts)}, one for each tensor of y0")
    for one in given:
        if not isinstance(one, Tensor | float | int):
            raise TypeError(f"{name}: expected a number or a tensor, got {type(one).__name__}")
        if isinstance(one, Tensor) and one.requires_grad:
            raise ValueError(f"{name}: it has no gradient, detach it")
    return [one if isinstance(one, Tensor) and one.numel() > 1 else float(one) for one in given]


def _by_element(each: list[Any], layout: Layout) -> Tensor:
    """Like the state."""
    spread = tuple(
        torch.as_tensor(one, dtype=layout.dtype, device=layout.device).broadcast_to(shape)
        for one, shape in zip(each, layout.shapes, strict=True)
    )
    return layout.pack(spread if layout.is_tuple else spread[0], "tolerances")


def norm_weights(values: Sequence[float], device: torch.device) -> Tensor:
    """The weights of k as ops.step_error takes them."""
    return torch.tensor([0.0, 0.0, *values, *[0.0] * (6 - len(values))], dtype=torch.float64).to(
        device
    )


def embedded_error(tableau: Tableau, device: torch.device) -> tuple[list[int], Tensor]:
    """Which k a pair's error is of, and their weights as ops.step_error takes them."""
    used = [j for j, weight in enumerate(tableau.error) if weight != 0]
    return used, norm_weights([tableau.error[j] for j in used], device)


@torch.no_grad()
def first_step(
    rhs: RightHandSide, norm: ErrorNorm, y: Tensor, f: Tensor, tau: Tensor, order: int
) -> Tensor:
    """A step to begin with, float64 ``[R]``, from one more evaluation and without a look at it from
    the host: Hairer, Norsett & Wanner, II.4."""
    one = torch.ones(1, dtype=rhs.time_dtype, device=y.device)
    alone, difference = norm_weights([1.0], y.device), norm_weights([1.0, -1.0], y.device)
    size = norm.squares(y, y, [y], alone, one).sqrt()
    slope = norm.squares(y, y, [f], alone, one).sqrt()
    guess = torch.where((size < 1e-5) | (slope < 1e-5), 1e-6, 0.01 * size / slope)
    end, _ = Stages(EULER, y.device).run(rhs, (), y, f, (rhs.sign * guess).to(rhs.time_dtype))
    k = [rhs(rhs.times(tau + guess), end), f]
    bend = norm.squares(y, y, k, difference, one).sqrt() / guess
    # fmax: where the trial leaves the domain of f, the slope has to do.
    most = torch.fmax(slope, bend)
    step = torch.where(most <= 1e-15, 1e-6, (0.01 / most) ** (1 / order))
    return torch.minimum(100 * guess, step)


def not_finite(y: Tensor, f: Tensor) -> str | None:
    """Which of a state and its derivative has infinities or NaN."""
    if not bool(y.isfinite().all()):
        return "y has"
    return None if bool(f.isfinite().all()) else "func gave"


def underflow_cause(finite: bool, norm: ErrorNorm, dtype: torch.dtype) -> str:
    """Why steps become too small."""
    if not finite:
        return "func gives infinities or NaN however small the step is"
    rounding = torch.finfo(dtype).eps
    if norm.least_rtol < 4 * rounding:
        return (
            f"rtol = {norm.least_rtol:g} asks for more than {dtype} holds (a rounding is "
            f"{rounding:g}); raise rtol or integrate in float64"
        )
    return "the solution is singular, discontinuous (say where in jump_t) or stiff there"
