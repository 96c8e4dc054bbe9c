"""Adaptive Runge-Kutta steps of which each sample has its own: time, length and acceptance.

One sample that is hard makes the others neither smaller steps nor a worse answer, and what a sample
takes does not depend on the batch it is in. The steps are chosen on the device; the host reads four
numbers a step: whether all are done, whether one cannot go on, and which of the requested times
were passed.
"""

import torch
from torch import Tensor

from fastzoo.samplers.runge_kutta import (
    DenseOutput,
    ErrorNorm,
    IntegrationError,
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
from fastzoo.samplers.tableaus import Tableau


def integrate_per_sample(
    rhs: RightHandSide,
    norm: ErrorNorm,
    y: Tensor,
    times: list[float],
    tableau: Tableau,
    options: Options,
) -> list[Tensor]:
    for name in ("norm", "step_t", "jump_t"):
        if getattr(options, name) is not None:
            raise ValueError(f"options {name}: not with per_sample")
    device, count, spread = y.device, len(times), rhs.layout.spread
    stages = Stages(tableau, device)
    dense = DenseOutput(tableau, device)
    used, weights = embedded_error(tableau, device)
    targets = torch.tensor(times, dtype=torch.float64, device=device)
    tau = targets[0].repeat(len(y))
    f = rhs(rhs.times(tau), y)
    if options.first_step is None:
        h = first_step(rhs, norm, y, f, tau, tableau.order)
    else:
        h = torch.full_like(tau, options.first_step)
    states = [y, *[torch.zeros_like(y)] * (count - 1)]
    # How many of the requested times each sample has reached.
    reached = torch.ones(len(y), dtype=torch.int64, device=device)
    # Whose last step came to NaN.
    undefined = torch.zeros_like(reached, dtype=torch.bool)
    steps = 0
    while True:
        with torch.no_grad():
            active = reached < count
            h = torch.where(active, h.clamp(options.min_step, options.max_step), 0)
            ends = tau + h
            # Of NaN too.
            stuck = active & ~(ends > tau)
            at = [
                rhs.times(ends, -1) if node == 1.0 else rhs.times(tau + node * h)
                for node in tableau.nodes
            ]
            factor = (rhs.sign * h).to(rhs.time_dtype)
        end, k = stages.run(rhs, at, y, f, factor)
        with torch.no_grad():
            used_k = [k[j] for j in used]
            ratio = norm.squares(y, end, used_k, weights, factor).sqrt()
            forced = (h <= options.min_step) & ~ratio.isnan()
            accepted = active & ~stuck & ((ratio <= 1) | forced)
            before, reached = (
                reached,
                torch.where(accepted, torch.searchsorted(targets, ends, right=True), reached),
            )
            lowest = torch.where(accepted, before, count).amin()
            read = torch.stack([lowest, reached.amax(), (reached < count).any(), stuck.any()])
            # The step's one look from the host.
            first, last, going_on, failed = read.tolist()
        for j in range(first, last):
            passed = accepted & (before <= j) & (j < reached)
            x = torch.where(passed, (targets[j] - tau) / h, 0)
            states[j] = torch.where(spread(passed), dense(x, y, k, factor), states[j])
        if failed:
            raise _stuck(rhs, norm, tau, h, y, f, stuck, undefined)
        y = torch.where(spread(accepted), end, y)
        f = torch.where(spread(accepted), k[-1], f)
        tau = torch.where(accepted, ends, tau)
        h = h * growth(ratio, tableau.order, options)
        undefined = ratio.isnan()
        steps += 1
        if not going_on:
            return states
        if steps >= options.max_num_steps:
            waiting = int((reached < count).sum())
            raise _stopped(
                MaxStepsExceeded,
                rhs,
                tau,
                y,
                f"max_num_steps = {steps} steps left {waiting} of {len(y)} samples before "
                f"t = {rhs.sign * times[-1]}",
            )


def growth(ratio: Tensor, order: int, options: Options) -> Tensor:
    """By what the next steps are longer."""
    least = torch.where(ratio < 1, 1.0, options.dfactor)
    found = (options.safety * ratio ** (-1 / order)).maximum(least).clamp(max=options.ifactor)
    return torch.where(ratio.isnan(), options.dfactor, found)


def _stuck(
    rhs: RightHandSide,
    norm: ErrorNorm,
    tau: Tensor,
    h: Tensor,
    y: Tensor,
    f: Tensor,
    stuck: Tensor,
    undefined: Tensor,
) -> IntegrationError:
    b = int(stuck.nonzero()[0])
    at, step = rhs.sign * float(tau[b]), float(h[b])
    source = not_finite(y[b], f[b])
    finite = source is None and not bool(undefined[b])
    if source is not None:
        message = f"{source} infinities or NaN at t = {at} in sample {b}"
    else:
        message = (
            f"the step of sample {b} at t = {at} became h = {step}, too small to move the time: "
            + underflow_cause(finite, norm, y.dtype)
        )
    return _stopped(StepSizeUnderflow if finite else NonFiniteDerivative, rhs, tau, y, message)


def _stopped(
    kind: type[IntegrationError], rhs: RightHandSide, tau: Tensor, y: Tensor, message: str
) -> IntegrationError:
    return kind(message, rhs.sign * tau, rhs.layout.unpack(y))
