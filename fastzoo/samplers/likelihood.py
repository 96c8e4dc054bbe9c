"""Log-likelihoods of flows in continuous time: how a density changes along an ODE."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastzoo import ops
from fastzoo.samplers.ode import odeint

Velocity = Callable[[Tensor, Tensor], Tensor]


def probability_flow(
    denoiser: Callable[..., Tensor], extra_args: Mapping[str, Any] | None = None
) -> Velocity:
    """The velocity ``dx/dsigma = (x - D(x, sigma)) / sigma`` of a denoiser as k-diffusion calls it,
    ``denoiser(x, sigma [B], **extra_args)``: the ODE with the marginals of x0 + sigma noise.

    Source: Karras et al., Elucidating the design space of diffusion-based generative models (2022),
    eqs. 1 and 3.
    """
    more = dict(extra_args or {})

    def velocity(sigma: Tensor, x: Tensor) -> Tensor:
        each = sigma.expand(len(x)).to(x.dtype)
        denoised = denoiser(x, each, **more)
        return (x - denoised) / each.reshape(-1, *(1,) * (x.dim() - 1))

    return velocity


def log_likelihood(
    velocity: Velocity,
    x: Tensor,
    t: Tensor,
    prior: Callable[[Tensor], Tensor] | float = 1.0,
    *,
    divergence: str = "exact",
    probes: int = 1,
    generator: torch.Generator | None = None,
    seeds: int | Sequence[int] | Tensor | None = None,
    method: str | None = None,
    rtol: Any = 1e-5,
    atol: Any = 1e-5,
    options: dict[str, Any] | None = None,
) -> Tensor:
    """``log p(x)``, ``[B]``, of the density that an ODE carries from a prior to the data.

    Along ``dx/dt = v(t, x)`` the logarithm of the density changes by ``-div v``, so that ``log p(x)
    = log prior(x(T)) + integral of div v`` from the data's time to the prior's. Both are integrated
    together.

    Args:
        velocity: ``v(t, x)`` of a scalar t (``[B]`` with ``options={"per_sample": True}``) and
            ``[B, ...]``, each sample by itself; :func:`probability_flow` makes one of a denoiser.
        x: ``[B, ...]``, the data.
        t: the time of the data and that of the prior; times between them make no difference, but to
            methods of fixed steps, which step on them. With :func:`probability_flow`, sigmas.
        prior: its log density of ``[B, ...]`` as ``[B]``, or the standard deviation of a normal
            distribution around 0: 1 of a flow from noise, the greatest sigma of a diffusion.
        divergence: ``exact``: one derivative for each element of a sample. ``hutchinson``: the mean
            of ``z dv/dx z`` over ``probes`` of random signs z, the same all along, without bias.
        probes: of ``hutchinson``.
        generator: what they are drawn from.
        seeds: counter noise in its place, as :func:`fastzoo.ops.ode_step` takes them: the same
            probes in any batch.
        method, rtol, atol, options: as :func:`odeint` takes them.

    Gradient: to x and whatever velocity depends on, through the steps. Under ``torch.no_grad()``
    each evaluation keeps no more than its own.

    Source: Chen et al., Neural ordinary differential equations (2018), theorem 1; Grathwohl et al.,
    FFJORD (2019), for the estimate; Song et al., Score-based generative modeling (2021), appendix
    D.2, for diffusions.
    """
    if not isinstance(x, Tensor) or x.dim() < 2 or not x.is_floating_point():
        raise ValueError("x: expected a floating tensor [B, ...]")
    if not isinstance(t, Tensor) or t.dim() != 1 or len(t) < 2:
        raise ValueError("t: expected the time of the data and that of the prior")
    trace: Callable[[Tensor, Tensor, bool], Tensor]
    if divergence == "exact":
        trace = _exact
    elif divergence == "hutchinson":
        trace = _hutchinson(_signs(x, probes, generator, seeds))
    else:
        raise ValueError(f"divergence: expected exact or hutchinson, got {divergence!r}")
    keeps_graph = torch.is_grad_enabled()

    def augmented(moment: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            at = state[0] if state[0].requires_grad else state[0].detach().requires_grad_()
            v = velocity(moment, at)
            if not v.requires_grad:
                return v, torch.zeros_like(state[1])
            change = trace(v, at, keeps_graph)
        return (v, change) if keeps_graph else (v.detach(), change)

    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    start = (x, torch.zeros(len(x), dtype=x.dtype, device=x.device))
    found, change = odeint(
        augmented, start, t, method=method, rtol=rtol, atol=atol, options=options
    )
    end = found[-1].to(wide)
    of_end: Tensor = _normal(end, float(prior)) if isinstance(prior, int | float) else prior(end)
    total: Tensor = of_end + change[-1]
    return total


def _normal(x: Tensor, deviation: float) -> Tensor:
    """Its log density."""
    size = x[0].numel()
    squares = (x / deviation).square().flatten(1).sum(1)
    return -0.5 * squares - size * (math.log(deviation) + 0.5 * math.log(2 * math.pi))


def _exact(v: Tensor, x: Tensor, keeps_graph: bool) -> Tensor:
    flat = v.flatten(1)
    total = torch.zeros_like(flat[:, 0])
    size = flat.shape[1]
    for i in range(size):
        (row,) = torch.autograd.grad(
            flat[:, i].sum(),
            x,
            retain_graph=keeps_graph or i + 1 < size,
            create_graph=keeps_graph,
            materialize_grads=True,
        )
        total = total + row.flatten(1)[:, i]
    return total


def _hutchinson(signs: Tensor) -> Callable[[Tensor, Tensor, bool], Tensor]:
    count = len(signs)

    def trace(v: Tensor, x: Tensor, keeps_graph: bool) -> Tensor:
        total = torch.zeros_like(v.flatten(1)[:, 0])
        for p, z in enumerate(signs):
            (row,) = torch.autograd.grad(
                v,
                x,
                z,
                retain_graph=keeps_graph or p + 1 < count,
                create_graph=keeps_graph,
                materialize_grads=True,
            )
            total = total + (row * z).flatten(1).sum(1)
        return total / count

    return trace


def _signs(
    x: Tensor,
    probes: int,
    generator: torch.Generator | None,
    seeds: int | Sequence[int] | Tensor | None,
) -> Tensor:
    """``[probes, B, ...]`` of 1 and -1."""
    if probes < 1:
        raise ValueError(f"probes: expected at least 1, got {probes}")
    if seeds is None:
        shape = (probes, *x.shape)
        device = x.device if generator is None else generator.device
        bits = torch.randint(0, 2, shape, generator=generator, device=device).to(x.device)
    else:
        if generator is not None:
            raise ValueError("generator, seeds: expected at most one")
        keys = ops.counter_keys(seeds, len(x), x.device)
        draws = [ops.counter_bits(keys, x[0].numel(), probe) for probe in range(probes)]
        bits = (torch.stack(draws) >> 31).reshape(probes, *x.shape)
    return (2 * bits - 1).to(x.dtype)
