"""odeint and odeint_adjoint beside torchdiffeq (answers, steps, evaluations) and scipy, steps per
sample, what happens when a step cannot be taken, gradients, and log-likelihoods of known densities.

In float64 the same steps give answers that differ by rounding: 1e-12 relative over these
integrations of some hundred evaluations.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastzoo import samplers
from fastzoo.compat import torchdiffeq as compat
from fastzoo.samplers import log_likelihood, odeint, odeint_adjoint, probability_flow
from fastzoo.samplers.tableaus import ADAPTIVE, FIXED

SAME = 1e-12
# An error within the tolerances is a difference of numbers some 1e6 times as large, so that lengths
# of steps agree to fewer digits.
SAME_TIMES = 1e-7
EVERY = {**ADAPTIVE, **FIXED}
DOUBLE = {"dtype": torch.float64}


def cubic(t: Tensor, y: Tensor) -> Tensor:
    """Damped cubic oscillators, a pair each, pushed."""
    a, b = y[..., 0], y[..., 1]
    return torch.stack([-0.1 * a**3 + 2 * b**3, -2 * a**3 - 0.1 * b**3 + 0.3 * torch.sin(t)], -1)


class Counted:
    """A right-hand side that remembers when it was asked."""

    def __init__(self, func: Callable[[Tensor, Any], Any] = cubic) -> None:
        self.func = func
        self.times: list[float] = []

    def __call__(self, t: Tensor, y: Any) -> Any:
        self.times.append(float(t))
        return self.func(t, y)


class Calls(TorchDispatchMode):
    """How often each operator runs inside."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split(".")[0]
        self.counts[name] = self.counts.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=generator, dtype=torch.float64).add(0.5).to(dtype)


def near(found: Tensor, right: Tensor, allowed: float) -> None:
    assert found.shape == right.shape
    assert found.dtype == right.dtype
    off = (found - right).abs() / right.abs().clamp(min=1)
    assert bool((off <= allowed).all()), float(off.nan_to_num(math.inf).max())


def both(
    func: Callable[..., Any], y0: Any, t: Tensor, **arguments: Any
) -> tuple[Any, Any, Counted, Counted]:
    """Ours and torchdiffeq's answer, with what each asked for."""
    theirs = pytest.importorskip("torchdiffeq")
    ours_asked, theirs_asked = Counted(func), Counted(func)
    with torch.no_grad():
        ours = odeint(ours_asked, y0, t, **arguments)
        right = theirs.odeint(theirs_asked, y0, t, **arguments)
    return ours, right, ours_asked, theirs_asked


@pytest.mark.parametrize("name", EVERY)
def test_tableaus_meet_the_conditions_of_their_order(name: str) -> None:
    """Hairer, Norsett & Wanner, II.2: up to order 5, each condition by itself."""
    tableau = EVERY[name]
    count = len(tableau.solution)
    a = np.zeros((count, count))
    for i, row in enumerate(tableau.stages, 1):
        a[i, : len(row)] = row
    b, c = np.array(tableau.solution), np.array([0.0, *tableau.nodes])
    one = np.ones(count)
    ac, acc = a @ c, a @ c**2
    conditions = [
        (1, b @ one, 1),
        (2, b @ c, 1 / 2),
        (3, b @ c**2, 1 / 3),
        (3, b @ ac, 1 / 6),
        (4, b @ c**3, 1 / 4),
        (4, b @ (c * ac), 1 / 8),
        (4, b @ acc, 1 / 12),
        (4, b @ a @ ac, 1 / 24),
        (5, b @ c**4, 1 / 5),
        (5, b @ (c**2 * ac), 1 / 10),
        (5, b @ (c * acc), 1 / 15),
        (5, b @ (c * (a @ ac)), 1 / 30),
        (5, b @ ac**2, 1 / 20),
        (5, b @ a @ c**3, 1 / 20),
        (5, b @ a @ (c * ac), 1 / 40),
        (5, b @ a @ acc, 1 / 60),
        (5, b @ a @ a @ ac, 1 / 120),
    ]
    for order, found, right in conditions:
        if order <= tableau.order:
            assert found == pytest.approx(right, abs=1e-14)
    assert a.sum(1) == pytest.approx(c, abs=1e-14)
    if tableau.error:
        assert sum(tableau.error) == pytest.approx(0, abs=1e-15)
        # The middle's published fractions have 11 digits.
        assert tableau.dense.sum(0) == pytest.approx(b, abs=1e-11)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("times", [(0.0, 0.3, 1.1, 2.0), (2.0, 1.9, 0.8)])
@pytest.mark.parametrize("method", ADAPTIVE)
def test_adaptive_methods_take_torchdiffeqs_steps(
    method: str, times: tuple[float, ...], dtype: torch.dtype
) -> None:
    t = torch.tensor(times, dtype=torch.float64)
    arguments = {"method": method, "rtol": 1e-4, "atol": 1e-5}
    ours, right, asked, theirs = both(cubic, drawn(5, 2, dtype=dtype), t, **arguments)
    wide = dtype == torch.float64
    # float32: an error of 1e-5 is a difference of numbers that round by 6e-8, and steps follow it
    # to some 1e-3; the states then differ by a share of their error.
    near(ours, right, SAME if wide else 1e-4)
    assert len(asked.times) == len(theirs.times)
    assert asked.times == pytest.approx(theirs.times, abs=SAME_TIMES if wide else 1e-3)


@pytest.mark.parametrize("t_dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "options",
    [{}, {"step_size": 0.07}, {"step_size": 0.1, "perturb": True}],
    ids=["on t", "step_size", "perturb"],
)
@pytest.mark.parametrize("method", FIXED)
def test_fixed_methods_are_torchdiffeqs(
    method: str, options: dict[str, Any], t_dtype: torch.dtype
) -> None:
    t = torch.tensor([1.0, 0.75, 0.5, 0.3], dtype=t_dtype)
    ours, right, asked, theirs = both(cubic, drawn(3, 2), t, method=method, options=options)
    # Lengths of steps are theirs rounded to t's dtype.
    allowed = SAME if t_dtype == torch.float64 else 1e-6
    near(ours, right, allowed)
    assert asked.times == pytest.approx(theirs.times, abs=allowed)


def test_fixed_steps_between_times_are_interpolated() -> None:
    t = torch.tensor([0.0, 0.13, 0.55, 1.0], **DOUBLE)
    for interp in ("linear", "cubic"):
        options = {"step_size": 0.2, "interp": interp}
        ours, right, *_ = both(cubic, drawn(3, 2), t, method="rk4", options=options)
        near(ours, right, SAME)
    # A cubic's derivative is a parabola, which a cubic through both ends with slopes is right for.
    found = odeint(
        lambda t, y: 3 * t**2 + 0 * y,
        torch.zeros(1, **DOUBLE),
        torch.tensor([0.0, 0.3, 1.0], **DOUBLE),
        method="rk4",
        options={"step_size": 0.5, "interp": "cubic"},
    )
    assert float(found[1]) == pytest.approx(0.027, abs=1e-14)


def test_a_grid_may_be_given() -> None:
    def grid(func: Any, y0: Tensor, t: Tensor) -> Tensor:
        return torch.cat([torch.linspace(float(t[0]), 0.4, 4, dtype=t.dtype), t[-1:]])

    for times in ([0.0, 1.0], [1.0, -1.0]):
        t = torch.tensor(times, **DOUBLE)
        options = {"grid_constructor": grid}
        ours, right, asked, theirs = both(cubic, drawn(3, 2), t, method="heun3", options=options)
        near(ours, right, SAME)
        assert len(asked.times) == len(theirs.times) == 12
    with pytest.raises(ValueError, match="grid_constructor"):
        odeint(
            cubic,
            drawn(3, 2),
            torch.tensor([0.0, 1.0]),
            method="euler",
            options={"grid_constructor": lambda func, y0, t: t[:1]},
        )


@pytest.mark.parametrize(
    "arguments",
    [
        {"options": {"first_step": 0.01, "min_step": 0.004, "max_step": 0.05}},
        {"options": {"safety": 0.8, "ifactor": 3.0, "dfactor": 0.5}},
        {"options": {"step_t": torch.tensor([0.31, 0.77]), "jump_t": torch.tensor([0.5])}},
        {"options": {"norm": lambda error: error.abs().max()}},
        {"rtol": torch.linspace(1e-3, 1e-5, 6).view(3, 2), "atol": torch.tensor(1e-6)},
    ],
    ids=["lengths", "control", "stops", "norm", "tolerances"],
)
def test_options_are_torchdiffeqs(arguments: dict[str, Any]) -> None:
    t = torch.tensor([0.0, 1.0], **DOUBLE)
    arguments = {"rtol": 1e-5, "atol": 1e-6, **arguments}
    ours, right, asked, theirs = both(cubic, drawn(3, 2), t, **arguments)
    near(ours, right, SAME)
    assert asked.times == pytest.approx(theirs.times, abs=SAME_TIMES)


def test_time_in_float32() -> None:
    options = {"dtype": torch.float32}
    y0, t = drawn(3, 2, dtype=torch.float32), torch.tensor([0.0, 1.0])
    ours, right, asked, theirs = both(cubic, y0, t, rtol=1e-4, atol=1e-4, options=options)
    near(ours, right, 2e-5)
    assert asked.times == pytest.approx(theirs.times, abs=1e-3)


def test_steps_stop_where_func_jumps() -> None:
    def steep(t: Tensor, y: Tensor) -> Tensor:
        return torch.where(t < 0.3, -y, 5 + y)

    t = torch.tensor([0.0, 1.0], **DOUBLE)
    y0 = torch.ones((), **DOUBLE)
    right = (math.exp(-0.3) + 5) * math.exp(0.7) - 5
    informed, guessing = Counted(steep), Counted(steep)
    found = odeint(informed, y0, t, options={"jump_t": torch.tensor([0.3], **DOUBLE)})
    assert float(found[-1]) == pytest.approx(right, rel=1e-7)
    odeint(guessing, y0, t)
    assert len(informed.times) < len(guessing.times)


@pytest.mark.parametrize("arguments", [{}, {"rtol": (1e-3, 1e-5), "atol": (1e-4, 1e-6)}])
@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_a_tuple_is_integrated_as_one(method: str, arguments: dict[str, Any]) -> None:
    def coupled(t: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        a, b = y
        return -a * b + t, a.mean() - b

    t = torch.linspace(0, 2, 4, **DOUBLE)
    y0 = (drawn(3, 4), drawn(1, seed=1)[0])
    tight = {"rtol": 1e-6, "atol": 1e-7, "method": method, **arguments}
    ours, right, asked, theirs = both(coupled, y0, t, **tight)
    assert len(ours) == 2
    for mine, other in zip(ours, right, strict=True):
        near(mine, other, SAME)
    assert asked.times == pytest.approx(theirs.times, abs=SAME_TIMES)


def test_any_shape_and_any_number_of_times() -> None:
    t = torch.tensor([0.0, 1.0])
    for shape in ((), (1,), (3, 1, 2), (0, 4)):
        y0 = torch.full(shape, 2.0, **DOUBLE)
        found = odeint(lambda t, y: -y, y0, t)
        near(found, torch.stack([y0, y0 / math.e]), 1e-6)
        near(odeint(lambda t, y: -y, y0, t[:1]), y0[None], 0)
    transposed = drawn(2, 3).T
    near(odeint(lambda t, y: -y.T.T, transposed, t)[1], transposed / math.e, 1e-6)
    for dtype in (torch.float16, torch.bfloat16):
        y0 = torch.tensor([1.0, 2.0], dtype=dtype)
        seen = Counted(lambda t, y: -y)
        found = odeint(seen, y0, t, rtol=1e-2, atol=1e-2)
        # The tolerance in each of a few steps.
        near(found[1], (y0.double() / math.e).to(dtype), 0.05)


@pytest.mark.parametrize("method", ["dopri5", "bosh3"])
def test_tight_tolerances_agree_with_scipy(method: str) -> None:
    integrate = pytest.importorskip("scipy.integrate")
    y0, times = drawn(4), np.linspace(0, 3, 5)
    right = integrate.solve_ivp(
        lambda t, y: cubic(torch.tensor(t), torch.from_numpy(y).view(2, 2)).flatten().numpy(),
        (0, 3),
        y0.numpy(),
        method="DOP853",
        t_eval=times,
        rtol=1e-12,
        atol=1e-13,
    )
    tight = 1e-9 if method == "dopri5" else 1e-7
    found = odeint(cubic, y0.view(2, 2), torch.from_numpy(times), rtol=tight, atol=tight)
    near(found.flatten(1), torch.from_numpy(right.y.T), 100 * tight)


def test_a_step_is_one_kernel_a_stage_and_one_look() -> None:
    arguments = {"rtol": 1e-3, "atol": 1e-3, "options": {"first_step": 0.1, "max_step": 0.1}}
    y0 = drawn(8, 2, dtype=torch.float32)
    counts = []
    for end in (0.15, 0.35):
        with Calls() as calls, torch.no_grad():
            odeint(cubic, y0, torch.tensor([0.0, end]), **arguments)
        counts.append(calls.counts)
    # Two steps more.
    for name, each in (
        ("fastzoo::ode_step", 6),
        ("fastzoo::step_error", 1),
        ("aten::_local_scalar_dense", 1),
    ):
        assert counts[1][name] - counts[0][name] == 2 * each, name
    with Calls() as calls, torch.no_grad():
        odeint(cubic, y0, torch.linspace(0, 1, 11), method="rk4")
    assert calls.counts["fastzoo::ode_step"] == 10 * 4
    assert "aten::_local_scalar_dense" not in calls.counts


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_steps_per_sample_do_not_depend_on_the_batch(dtype: torch.dtype) -> None:
    y0 = 2 * drawn(6, 2, dtype=dtype)
    y0[3] *= 3  # which takes many more
    t = torch.tensor([0.0, 0.4, 0.41, 1.0], **DOUBLE)
    arguments = {"rtol": 1e-5, "atol": 1e-6, "options": {"per_sample": True}}

    def each(t: Tensor, y: Tensor) -> Tensor:
        return torch.stack([-(y[:, 0] ** 3) + 2 * y[:, 1], -2 * y[:, 0] - y[:, 1] * t], 1)

    with torch.no_grad():
        together = odeint(each, y0, t, **arguments)
        shuffled = odeint(each, y0.flip(0), t, **arguments).flip(1)
        alone = torch.cat([odeint(each, y0[b : b + 1], t, **arguments) for b in range(6)], 1)
        assert torch.equal(together, alone)
        assert torch.equal(together, shuffled)
        # One sample takes the steps of the joint norm.
        joint = {"rtol": 1e-5, "atol": 1e-6}
        for b in (0, 3):
            allowed = 1e-5 if dtype == torch.float32 else SAME
            near(odeint(each, y0[b : b + 1], t, **joint), alone[:, b : b + 1], allowed)
        exact = odeint(each, y0.double(), t, rtol=1e-11, atol=1e-11)
        near(together.double(), exact, 2e-4)
        back = t.flip(0)
        near(
            odeint(each, 0.1 * y0[:1], back, **arguments),
            odeint(each, 0.1 * y0[:1], back, **joint),
            allowed,
        )


def test_steps_per_sample_look_once_a_step() -> None:
    def each(t: Tensor, y: Tensor) -> Tensor:
        assert t.shape == (3,)
        return -y

    options = {"per_sample": True, "first_step": 0.1, "max_step": 0.1}
    counts = []
    for end in (0.15, 0.35):
        with Calls() as calls, torch.no_grad():
            odeint(each, drawn(3, 4), torch.tensor([0.0, end]), options=options, rtol=1e-3)
        counts.append(calls.counts)
    for name, expected in (("fastzoo::ode_step", 6), ("fastzoo::step_error", 1)):
        assert counts[1][name] - counts[0][name] == 2 * expected, name
    # One transfer of four numbers, whose parts are read on the host.
    assert counts[1]["aten::_local_scalar_dense"] - counts[0]["aten::_local_scalar_dense"] <= 2 * 4
    tuple_found = odeint(
        lambda t, y: (-y[0], t),
        (drawn(3, 4), torch.zeros(3, **DOUBLE)),
        torch.tensor([0.0, 2.0]),
        options={"per_sample": True},
    )
    near(tuple_found[0][1], drawn(3, 4) * math.exp(-2), 1e-6)
    near(tuple_found[1][1], torch.full((3,), 2.0, **DOUBLE), 1e-12)


def test_too_many_steps_leave_what_was_reached() -> None:
    t = torch.tensor([0.0, 1.0, 30.0])
    y0 = torch.ones(2, **DOUBLE)
    for sign in (1, -1):
        with pytest.raises(samplers.MaxStepsExceeded, match="max_num_steps = 12") as caught:
            odeint(lambda t, y, sign=sign: -sign * y, y0, sign * t, options={"max_num_steps": 12})
        reached = caught.value.t * sign
        assert reached[:2].tolist() == [0.0, 1.0]
        assert 1 < float(reached[2]) < 30
        near(caught.value.y, torch.exp(-reached)[:, None].expand(3, 2), 1e-6)
    with pytest.raises(samplers.MaxStepsExceeded, match="2 of 2") as caught:
        odeint(lambda t, y: -y, y0, t, options={"max_num_steps": 8, "per_sample": True})
    near(caught.value.y, torch.exp(-caught.value.t), 1e-6)


@pytest.mark.parametrize("per_sample", [False, True])
def test_steps_that_cannot_be_taken_say_why(per_sample: bool) -> None:
    options = {"per_sample": per_sample}
    t = torch.tensor([0.0, 2.0], **DOUBLE)
    one = torch.ones(1, **DOUBLE)
    with pytest.raises(samplers.StepSizeUnderflow, match=r"t = (1\.0|0\.99).*h = .*singular") as e:
        odeint(lambda t, y: y * y, one, t, options=options)
    assert float(e.value.t[-1]) == pytest.approx(1, abs=1e-6)
    asked = [0.0]

    def rough(t: Tensor, y: Tensor) -> Tensor:
        asked[0] += 1
        return y + 1e8 * (asked[0] % 2)

    with pytest.raises(samplers.StepSizeUnderflow, match="asks for more than torch"):
        odeint(rough, one.float(), 1 + t, rtol=1e-12, atol=1e-12, options=options)
    with pytest.raises(samplers.NonFiniteDerivative, match=r"func gave .* t = 0\.0"):
        odeint(lambda t, y: y / 0, one, t, options=options)
    with pytest.raises(samplers.NonFiniteDerivative, match="y has"):
        odeint(lambda t, y: y, one / 0, t, options=options)
    with pytest.raises(samplers.NonFiniteDerivative, match="however small"):
        odeint(lambda t, y: torch.where(t < 1, y, math.nan), one, t, options=options)
    # A trial that leaves the domain is tried again with less.
    shrink = odeint(
        lambda t, y: -torch.sqrt(1 + 0 * y) / torch.sqrt(y),
        one,
        t / 4,
        options={"first_step": 0.9, **options},
    )
    assert float(shrink[1]) == pytest.approx((1 - 1.5 * 0.5) ** (2 / 3), rel=1e-5)


def test_a_func_may_write_to_the_same_memory() -> None:
    buffer = torch.empty(3, **DOUBLE)
    t = torch.tensor([0.0, 1.0])
    for method in ("dopri5", "rk4"):
        found = odeint(
            lambda t, y: torch.mul(y, -1, out=buffer), torch.ones(3, **DOUBLE), t, method=method
        )
        fresh = odeint(lambda t, y: -y, torch.ones(3, **DOUBLE), t, method=method)
        assert torch.equal(found, fresh)


def test_callbacks_are_called() -> None:
    class Watched:
        def __init__(self) -> None:
            self.steps: list[tuple[float, float]] = []
            self.accepted = self.rejected = 0

        def __call__(self, t: Tensor, y: Tensor) -> Tensor:
            return cubic(t, y)

        def callback_step(self, t: Tensor, y: Tensor, h: Tensor) -> None:
            assert y.shape == (3, 2)
            self.steps.append((float(t), float(h)))

        def callback_accept_step(self, t: Tensor, y: Tensor, h: Tensor) -> None:
            self.accepted += 1

        def callback_reject_step(self, t: Tensor, y: Tensor, h: Tensor) -> None:
            self.rejected += 1

    theirs = pytest.importorskip("torchdiffeq")
    mine, other = Watched(), Watched()
    t = torch.tensor([1.0, 0.0], **DOUBLE)
    options = {"first_step": 0.9}
    for func, run in ((mine, odeint), (other, theirs.odeint)):
        run(func, drawn(3, 2), t, rtol=1e-4, atol=1e-4, options=options)
    assert np.array(mine.steps) == pytest.approx(np.array(other.steps), abs=SAME_TIMES)
    assert (mine.accepted, mine.rejected) == (other.accepted, other.rejected)
    assert mine.rejected > 0


BAD = {
    "method": ({"method": "dopri9"}, ValueError),
    "t: expected strictly": ({"t": torch.tensor([0.0, 1.0, 1.0])}, ValueError),
    "t: expected a floating": ({"t": torch.tensor([0, 1])}, TypeError),
    "y0: .*complex": ({"y0": torch.ones(2) * 1j}, TypeError),
    "y0: expected tensors of one": ({"y0": (torch.ones(2), torch.ones(2, **DOUBLE))}, ValueError),
    "options: .*step_size": ({"options": {"step_size": 0.1}}, ValueError),
    "options: .*first_step": ({"method": "rk4", "options": {"first_step": 0.1}}, ValueError),
    "func: expected y's shape": ({"func": lambda t, y: y[:1]}, ValueError),
    "rtol: expected a number": ({"rtol": "tight"}, TypeError),
    "event_fn": ({"event_fn": lambda t, y: y}, NotImplementedError),
    "options norm: not with": ({"options": {"per_sample": True, "norm": max}}, ValueError),
    "y0: expected .B, ...": ({"y0": torch.ones(()), "options": {"per_sample": True}}, ValueError),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_are_named(message: str) -> None:
    changed, kind = BAD[message]
    arguments = {"func": lambda t, y: -y, "y0": torch.ones(2), "t": torch.tensor([0.0, 1.0])}
    arguments |= changed
    with pytest.raises(kind, match=message):
        odeint(**arguments)


class Field(nn.Module):
    """A small network, of a tensor or of a tuple."""

    def __init__(self, is_tuple: bool = False) -> None:
        super().__init__()
        self.is_tuple = is_tuple
        torch.manual_seed(0)
        self.inner = nn.Linear(3, 5, **DOUBLE)
        self.outer = nn.Linear(5, 2, **DOUBLE)

    def forward(self, t: Tensor, y: Any) -> Any:
        x = y[0] if self.is_tuple else y
        time = t.expand(*x.shape[:-1], 1)
        v = self.outer(torch.tanh(self.inner(torch.cat([x, time.to(x)], -1))))
        return (v + y[1].mean(), -y[1] * t) if self.is_tuple else v


def gradients(
    run: Callable[..., Any], field: Field, times: list[float], wants_t: bool, **arguments: Any
) -> list[Tensor]:
    y0 = drawn(4, 2).requires_grad_()
    beside = [drawn(3, seed=1).requires_grad_()] if field.is_tuple else []
    t = torch.tensor(times, dtype=torch.float64, requires_grad=wants_t)
    state = (y0, *beside) if field.is_tuple else y0
    found = run(field, state, t, **arguments)
    parts = found if field.is_tuple else (found,)
    loss = sum(
        (part.sin() * (1 + torch.arange(part.numel()).view(part.shape))).sum() for part in parts
    )
    inputs = [y0, *beside, *field.parameters(), *([t] if wants_t else [])]
    return list(torch.autograd.grad(loss, inputs))


@pytest.mark.parametrize("method", ["dopri5", "bosh3", "rk4"])
def test_gradients_through_the_steps_are_torchdiffeqs(method: str) -> None:
    theirs = pytest.importorskip("torchdiffeq")
    # With a first step given, neither's steps depend on y0.
    options = {"step_size": 0.21} if method == "rk4" else {"first_step": 0.3}
    arguments = {"rtol": 1e-4, "atol": 1e-5, "method": method, "options": options}
    for is_tuple in (False, True):
        field = Field(is_tuple)
        ours, right = (
            gradients(run, field, [0.0, 0.4, 1.0], False, **arguments)
            for run in (odeint, theirs.odeint)
        )
        for mine, other in zip(ours, right, strict=True):
            near(mine, other, 1e-11)


@pytest.mark.parametrize("times", [[0.0, 0.4, 1.0], [1.0, 0.2]])
def test_adjoint_gradients_are_torchdiffeqs(times: list[float]) -> None:
    theirs = pytest.importorskip("torchdiffeq")
    for is_tuple in (False, True):
        for more in (
            {},
            {"adjoint_options": {"norm": "seminorm"}, "adjoint_rtol": 1e-5},
            {"method": "rk4", "options": {"step_size": 0.1}},
        ):
            field = Field(is_tuple)
            arguments = {"rtol": 1e-6, "atol": 1e-7, **more}
            ours, right = (
                gradients(run, field, times, True, **arguments)
                for run in (odeint_adjoint, theirs.odeint_adjoint)
            )
            for mine, other in zip(ours, right, strict=True):
                near(mine, other, 1e-9)


def test_both_gradients_are_right() -> None:
    """Those through the steps and the adjoint's, against the exact flow's and each other."""
    field = Field()
    direct = gradients(odeint, field, [0.2, 0.5, 1.0], True, rtol=1e-8, atol=1e-9)
    adjoint = gradients(odeint_adjoint, field, [0.2, 0.5, 1.0], True, rtol=1e-8, atol=1e-9)
    # Between steps the solution is a quartic, whose error the tolerances do not know.
    for mine, other in zip(direct, adjoint, strict=True):
        near(mine, other, 1e-4)
    # y = y0 e^(t1 - t0)
    y0 = torch.tensor([2.0], requires_grad=True, **DOUBLE)
    t = torch.tensor([0.5, 1.5], requires_grad=True, **DOUBLE)
    for run in (odeint, lambda *a: odeint_adjoint(*a, adjoint_params=())):
        of_y, of_t = torch.autograd.grad(run(lambda t, y: y, y0, t)[1].sum(), (y0, t))
        near(of_y, torch.tensor([math.e], **DOUBLE), 1e-6)
        near(of_t, torch.tensor([-2 * math.e, 2 * math.e], **DOUBLE), 1e-6)


def test_gradients_of_steps_per_sample() -> None:
    weight = drawn(2, 2).requires_grad_()

    def run(y0: Tensor, weight: Tensor) -> Tensor:
        options = {"per_sample": True, "first_step": 0.3}
        found = odeint(
            lambda t, y: torch.tanh(y @ weight) * t[:, None],
            y0,
            torch.tensor([0.0, 0.5, 1.0]),
            rtol=1e-3,
            atol=1e-3,
            options=options,
        )
        return found[1:]

    assert torch.autograd.gradcheck(run, (drawn(3, 2).requires_grad_(), weight))


def test_the_adjoint_refuses_what_it_has_not() -> None:
    field, y0, t = Field(), drawn(4, 2).requires_grad_(), torch.tensor([0.0, 1.0])
    found = odeint_adjoint(field, y0, t)
    (once,) = torch.autograd.grad(found.sum(), y0, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        once.square().sum().backward()
    with pytest.raises(ValueError, match="adjoint_params"):
        odeint_adjoint(cubic, y0, t)
    with pytest.raises(ValueError, match="per_sample"):
        odeint_adjoint(field, y0, t, options={"per_sample": True})
    with pytest.raises(ValueError, match="adjoint_options"):
        odeint_adjoint(field, y0, t, adjoint_method="rk4", options={"first_step": 0.1})


class Mixture:
    """Three Gaussians in the plane: their density under noise, and the exact denoiser."""

    weights = torch.tensor([0.2, 0.5, 0.3], **DOUBLE)
    means = torch.tensor([[-2.0, 0.0], [1.0, 1.5], [2.0, -1.0]], **DOUBLE)
    deviations = torch.tensor([0.3, 0.5, 0.4], **DOUBLE)

    def _joint(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        variance = self.deviations**2 + sigma.reshape(-1, 1) ** 2
        apart = x[:, None] - self.means
        logs = self.weights.log() - (2 * math.pi * variance).log()
        return logs - apart.square().sum(-1) / (2 * variance), variance, apart

    def log_prob(self, x: Tensor, sigma: float = 0.0) -> Tensor:
        return self._joint(x, torch.full((1,), sigma, **DOUBLE))[0].logsumexp(1)

    def denoiser(self, x: Tensor, sigma: Tensor) -> Tensor:
        joint, variance, apart = self._joint(x, sigma)
        towards = self.means + (self.deviations**2 / variance)[..., None] * apart
        return (joint.softmax(1)[..., None] * towards).sum(1)

    def sample(self, count: int) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        which = torch.multinomial(self.weights, count, True, generator=generator)
        noise = torch.randn(count, 2, generator=generator, **DOUBLE)
        return self.means[which] + self.deviations[which, None] * noise


def test_log_likelihood_of_a_mixture_along_its_probability_flow() -> None:
    mixture = Mixture()
    x, sigmas = mixture.sample(8), torch.tensor([5e-3, 30.0])
    velocity, right = probability_flow(mixture.denoiser), mixture.log_prob(x)
    with torch.no_grad():
        for options in ({}, {"per_sample": True}):
            found = log_likelihood(
                velocity, x, sigmas, lambda z: mixture.log_prob(z, 30.0), rtol=1e-3, options=options
            )
            near(found, right, 0.01)
        # The normal distribution of the greatest sigma in the place of the noisy mixture's density.
        near(log_likelihood(velocity, x, sigmas, 30.0, rtol=1e-3), right, 0.03)
        # The wrong sign is seen.
        wrong = log_likelihood(
            lambda s, x: -velocity(s, x), x, sigmas[:1] * torch.tensor([1.0, 2.0]), 1.0
        )
        assert float((wrong - right).abs().mean()) > 0.3


def test_hutchinsons_estimate_has_no_bias() -> None:
    """Of a linear flow, whose density is known, and whose divergence the probes do not see."""
    matrix = torch.tensor([[-0.5, 1.2, 0.0], [0.3, 0.2, -0.7], [0.9, 0.4, -0.1]], **DOUBLE)
    x, t = drawn(1, 3).expand(400, 3).contiguous(), torch.tensor([0.0, 1.0])

    def velocity(t: Tensor, x: Tensor) -> Tensor:
        return x @ matrix.T

    arguments = {"method": "rk4", "options": {"step_size": 0.1}}
    with torch.no_grad():
        exact = log_likelihood(velocity, x[:1], t, **arguments)
        moved = x[:1] @ torch.linalg.matrix_exp(matrix).T
        normal = -0.5 * moved.square().sum() - 1.5 * math.log(2 * math.pi)
        near(exact, (normal + matrix.trace())[None], 1e-5)
        arguments["divergence"] = "hutchinson"
        found = log_likelihood(velocity, x, t, seeds=7, **arguments)
        error = found.std() / math.sqrt(len(found))
        assert float(found.std()) > 0.1
        assert abs(float(found.mean() - exact)) < 3 * float(error)
        # As many probes, as much less spread.
        many = log_likelihood(velocity, x, t, seeds=7, probes=16, **arguments)
        assert float(many.std() / found.std()) == pytest.approx(0.25, rel=0.2)
        keys = [(7, b) for b in range(400)]
        part = log_likelihood(
            velocity, x[100:110], t, seeds=torch.tensor(keys[100:110]), **arguments
        )
        assert torch.equal(part, found[100:110])
        drawn_twice = [
            log_likelihood(
                velocity, x[:8], t, generator=torch.Generator().manual_seed(1), **arguments
            )
            for _ in range(2)
        ]
        assert torch.equal(*drawn_twice)


def test_the_heat_flow_carries_its_density() -> None:
    """dx/dt = -grad log p of N(0, 1 + 2t): x(t) = x sqrt(1 + 2t), and the density with it."""
    x, t = (
        torch.randn(4096, 1, generator=torch.Generator().manual_seed(0), **DOUBLE),
        torch.tensor([0.0, 1.5]),
    )

    def velocity(t: Tensor, x: Tensor) -> Tensor:
        return x / (1 + 2 * t)

    found = odeint(velocity, x, t, rtol=1e-6, atol=1e-6)[1]
    near(found, 2 * x, 1e-4)
    assert float(found.var() / x.var()) == pytest.approx(4, rel=0.01)
    with torch.no_grad():
        change = log_likelihood(velocity, x[:32], t, 2.0)
    near(change, -0.5 * x[:32, 0] ** 2 - 0.5 * math.log(2 * math.pi), 1e-3)


def test_log_likelihoods_train() -> None:
    scale = torch.tensor(0.3, requires_grad=True, **DOUBLE)
    x, t = drawn(5, 2), torch.tensor([0.0, 1.0])
    for divergence in ("exact", "hutchinson"):
        found = log_likelihood(lambda t, x: scale * x, x, t, divergence=divergence)
        (gradient,) = torch.autograd.grad(found.sum(), scale)
        # log p = 2 s - |x|^2 e^(2 s) / 2 - log 2 pi
        right = (2 - x.square().sum(1) * torch.exp(2 * scale)).sum()
        assert float(gradient) == pytest.approx(float(right.detach()), rel=1e-4)


def test_compat_has_torchdiffeqs_names() -> None:
    assert compat.odeint is odeint
    assert compat.odeint_adjoint is odeint_adjoint
