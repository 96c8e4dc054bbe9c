"""Gradients of an integration in the memory of one state: the adjoint equation, run backwards."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fastzoo.samplers.ode import odeint
from fastzoo.samplers.runge_kutta import LeadingParts


def odeint_adjoint(
    func: Callable[..., Any],
    y0: Any,
    t: Tensor,
    *,
    rtol: Any = 1e-7,
    atol: Any = 1e-9,
    method: str | None = None,
    options: dict[str, Any] | None = None,
    event_fn: Callable[..., Any] | None = None,
    adjoint_rtol: Any = None,
    adjoint_atol: Any = None,
    adjoint_method: str | None = None,
    adjoint_options: dict[str, Any] | None = None,
    adjoint_params: Iterable[Tensor] | None = None,
) -> Any:
    """:func:`odeint` whose gradient is integrated backwards in time and keeps no step.

    Backwards run the state y, from what the forward pass found at each time of t, its adjoint
    ``da/dt = -a df/dy``, and the gradients ``-a df/dt`` and ``-a df/dp`` as integrals. Their error
    is that of the tolerances; through the steps themselves :func:`odeint` is exact.

    Args:
        func: a module, whose parameters get gradients, or any function with ``adjoint_params``.
        y0, t, rtol, atol, method, options, event_fn: as :func:`odeint` takes them, without
            ``per_sample``.
        adjoint_rtol, adjoint_atol, adjoint_method: of the backward integration, by default the
            forward one's.
        adjoint_options: by default ``options`` without its norm. Their ``norm`` is a function of
            the tuple (t's adjoint, y, y's adjoint, the parameters' gradients), a y of several
            tensors in its place; by default the greatest of their root mean squares, and with
            ``"seminorm"`` without the parameters'.
        adjoint_params: the tensors beside y0 and t that get gradients.

    Returns:
        As :func:`odeint`.

    Gradient: to y0, t and ``adjoint_params``, of first order; a second derivative raises.

    Source: Chen et al., Neural ordinary differential equations (2018), appendix B; Kidger et al.,
    "Hey, that's not an ODE" (2021), for the seminorm.
    """
    if event_fn is not None:
        raise NotImplementedError("event_fn: events are not supported; integrate in pieces")
    if adjoint_params is None:
        if not isinstance(func, nn.Module):
            raise ValueError(
                "adjoint_params: expected, because func is no module; () if it has no parameters"
            )
        adjoint_params = func.parameters()
    if (options or {}).get("per_sample") or (adjoint_options or {}).get("per_sample"):
        raise ValueError("options per_sample: not with odeint_adjoint; odeint has its gradient")
    if adjoint_method is None:
        adjoint_method = method
    if adjoint_options is None:
        if adjoint_method != method and options is not None:
            raise ValueError("adjoint_options: expected, because adjoint_method is not method")
        adjoint_options = {key: value for key, value in (options or {}).items() if key != "norm"}
    params = tuple(p for p in adjoint_params if p.requires_grad)
    is_tuple = not isinstance(y0, Tensor)
    parts = tuple(y0) if is_tuple else (y0,)
    run = _Run(
        func,
        is_tuple,
        len(parts),
        {"rtol": rtol, "atol": atol, "method": method, "options": options},
        {
            "rtol": _scalar("adjoint_rtol", rtol if adjoint_rtol is None else adjoint_rtol),
            "atol": _scalar("adjoint_atol", atol if adjoint_atol is None else adjoint_atol),
            "method": adjoint_method,
            "options": {
                **adjoint_options,
                "norm": _norm(adjoint_options, (options or {}).get("norm"), is_tuple, len(parts)),
            },
        },
    )
    found = _Adjoint.apply(run, t, *parts, *params)  # type: ignore[no-untyped-call]
    return found if is_tuple else found[0]


class _Run:
    """What both passes know."""

    def __init__(
        self,
        func: Callable[..., Any],
        is_tuple: bool,
        count: int,
        forward: dict[str, Any],
        backward: dict[str, Any],
    ) -> None:
        self.func = func
        self.is_tuple = is_tuple
        self.count = count
        self.forward = forward
        self.backward = backward

    def state(self, parts: tuple[Tensor, ...]) -> Any:
        return parts if self.is_tuple else parts[0]

    def parts(self, state: Any) -> tuple[Tensor, ...]:
        return tuple(state) if self.is_tuple else (state,)


class _Adjoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: _Run, t: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        y0 = tensors[: run.count]
        found = run.parts(odeint(run.func, run.state(y0), t, **run.forward))
        ctx.run = run
        ctx.save_for_backward(t, *tensors[run.count :], *found)
        return found

    @staticmethod
    def backward(ctx: Any, *grad_found: Tensor) -> tuple[Any, ...]:
        run, (t, *rest) = ctx.run, ctx.saved_tensors
        params, found = tuple(rest[: -run.count]), rest[-run.count :]
        with torch.no_grad():
            grads = _backwards(run, t, params, found, grad_found)
        if torch.is_grad_enabled():
            # Their own derivatives are asked for.
            grads = _first_order(grads, [t, *params, *grad_found, *found])
        of_t, *others = grads
        return None, of_t if ctx.needs_input_grad[1] else None, *others


def _backwards(
    run: _Run,
    t: Tensor,
    params: tuple[Tensor, ...],
    found: list[Tensor],
    grad_found: tuple[Tensor, ...],
) -> list[Tensor]:
    """Gradients of t, y0 and the parameters."""
    count = run.count
    wants_t = t.requires_grad

    def adjoint(moment: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        y, a = state[1 : 1 + count], state[1 + count : 1 + 2 * count]
        with torch.enable_grad():
            moment = moment.detach().requires_grad_(wants_t)
            y = tuple(part.detach().requires_grad_() for part in y)
            f = run.parts(run.func(moment, run.state(y)))
            of = (*([moment] if wants_t else []), *y, *params)
            live = [(part, -grad) for part, grad in zip(f, a, strict=True) if part.requires_grad]
            grads: Any = [None] * len(of)
            if live:
                outputs, weights = zip(*live, strict=True)
                grads = torch.autograd.grad(outputs, of, weights, allow_unused=True)
        grads = [
            torch.zeros_like(x) if grad is None else grad for grad, x in zip(grads, of, strict=True)
        ]
        of_t = grads.pop(0) if wants_t else torch.zeros_like(state[0])
        return (of_t.to(state[0]), *(part.detach() for part in f), *grads)

    dtype, device = found[0].dtype, found[0].device
    of_times = torch.zeros(len(t), dtype=dtype, device=device)
    state: list[Tensor] = [
        torch.zeros((), dtype=dtype, device=device),
        *(part[-1] for part in found),
        *(grad[-1] for grad in grad_found),
        *(torch.zeros_like(p, dtype=dtype) for p in params),
    ]
    for i in range(len(t) - 1, 0, -1):
        if wants_t:
            # What a later end is worth, and so a later start of the piece before it is not.
            f = run.parts(run.func(t[i].to(dtype), run.state(tuple(part[i] for part in found))))
            worth = [(x * g[i]).sum() for x, g in zip(f, grad_found, strict=True)]
            of_times[i] = torch.stack(worth).sum()
            state[0] = state[0] - of_times[i]
        piece = t[i - 1 : i + 1].detach().flip(0)
        state = [part[1] for part in odeint(adjoint, tuple(state), piece, **run.backward)]
        for j in range(count):
            state[1 + j] = found[j][i - 1]
            state[1 + count + j] = state[1 + count + j] + grad_found[j][i - 1]
    of_times[0] = state[0]
    of_params = [grad.to(p.dtype) for grad, p in zip(state[1 + 2 * count :], params, strict=True)]
    return [of_times.to(t), *state[1 + count : 1 + 2 * count], *of_params]


class _FirstOrder(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(each.clone() for each in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Any, ...]:
        raise NotImplementedError("odeint_adjoint has no second derivative: odeint does")


def _first_order(grads: list[Tensor], depends_on: list[Tensor]) -> list[Tensor]:
    return list(_FirstOrder.apply(len(grads), *grads, *depends_on))  # type: ignore[no-untyped-call]


def _scalar(name: str, value: Any) -> float:
    """The backward state has no tensor of the forward tolerances' shape."""
    if isinstance(value, tuple | list) or (isinstance(value, Tensor) and value.numel() > 1):
        raise ValueError(f"{name}: expected a number, because the forward one is of the state")
    return float(value)


def _norm(options: dict[str, Any], of_state: Any, is_tuple: bool, count: int) -> Any:
    """The norm of the backward state."""
    norm = options.get("norm")
    if norm is not None and norm != "seminorm":
        return norm
    leading = 1 + 2 * count
    if of_state is None:
        return None if norm is None else LeadingParts(leading)

    def combined(state: tuple[Tensor, ...]) -> Tensor:
        parts = [state[1 : 1 + count], state[1 + count : leading]]
        values = [of_state(part if is_tuple else part[0]) for part in parts]
        rest = [] if norm == "seminorm" else list(state[leading:])
        values += [part.abs().square().mean().sqrt() for part in (state[0], *rest)]
        return torch.stack([torch.as_tensor(value).to(state[0]) for value in values]).max()

    return combined
