"""The definition of the ``masked_linear`` family: the inverse of a masked-autoregressive map.

A masked network (MADE) gives the parameters of feature d from the features before it, so that

    y_d = f(x_d; parameters_d(x_0, ..., x_{d-1}))

for all d at once. Its inverse knows x_d only when those before it are known; but a unit of the
network never changes once all that it reads is known. Units sorted by the step at which that is so
are each computed once, at their step: the inverse costs as much as one pass of the masked network,
where repeating the whole network for each feature costs D of them.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastzoo.reference.coupling import SCALE_MAPS, coupling_backward, coupling_rows
from fastzoo.reference.precision import compute_dtype
from fastzoo.reference.splines import (
    CONVENTIONS,
    rational_quadratic_spline_backward,
    rational_quadratic_spline_rows,
)

_ROOT, _DENSITY = 0.5**0.5, (2 * math.pi) ** -0.5
# Each activation and its derivative.
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "relu": (torch.relu, lambda u: (u > 0).to(u.dtype)),
    "tanh": (torch.tanh, lambda u: 1 - torch.tanh(u).square()),
    "elu": (F.elu, lambda u: torch.where(u > 0, 1, torch.exp(u.clamp(max=0)))),
    "silu": (F.silu, lambda u: torch.sigmoid(u) * (1 + u * torch.sigmoid(-u))),
    "leaky_relu": (F.leaky_relu, lambda u: torch.where(u > 0, 1.0, 0.01).to(u.dtype)),
    "gelu": (
        F.gelu,
        lambda u: (1 + torch.erf(u * _ROOT)) / 2 + u * torch.exp(-u * u / 2) * _DENSITY,
    ),
}
UNIVARIATE = (*SCALE_MAPS, *CONVENTIONS)


def parameters_each(map: str, bins: int) -> int:
    """How many parameters a feature's map has."""
    return 3 * bins - 1 if map in CONVENTIONS else 2


def layers_of(net: Tensor, widths: list[int]) -> list[tuple[Tensor, Tensor]]:
    """Weight and bias of each layer, which stand one after another in ``net``."""
    layers, at = [], 0
    for inputs, outputs in itertools.pairwise(widths):
        weight = net[at : at + inputs * outputs].view(outputs, inputs)
        at += inputs * outputs
        layers.append((weight, net[at : at + outputs]))
        at += outputs
    return layers


def autoregressive_inverse_rows(
    y: Tensor,
    first: Tensor,
    net: Tensor,
    widths: list[int],
    starts: Tensor,
    activation: str,
    map: str,
    bins: int,
    constant: float,
    floor: float,
) -> tuple[Tensor, Tensor]:
    """``autoregressive_inverse`` of features in the order in which they are solved; an empty
    ``first`` is none."""
    known, _, _, logdet = _recursion(
        y, first, net, widths, starts, activation, map, bins, constant, floor
    )
    return known[0].to(y.dtype), logdet


def _recursion(
    y: Tensor,
    first: Tensor,
    net: Tensor,
    widths: list[int],
    starts: Tensor,
    activation: str,
    map: str,
    bins: int,
    constant: float,
    floor: float,
) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    """What each layer reads (the features, then the activations), what each hidden layer's
    activation reads, the parameters, and the log-determinant."""
    dtype = compute_dtype(y)
    layers = layers_of(net.to(dtype), widths)
    table = starts.tolist()
    known = [y.new_zeros(y.shape[0], 0, dtype=dtype) for _ in layers]
    before = [k.clone() for k in known]
    logdet = y.new_zeros(y.shape[0], dtype=dtype)
    for step in range(len(table[0]) - 1):
        for number, (weight, bias) in enumerate(layers):
            low, high = table[number + 1][step], table[number + 1][step + 1]
            reads = known[number].shape[1]
            units = known[number] @ weight[low:high, :reads].T + bias[low:high]
            if number == 0 and first.dim() == 2:
                units = units + first[:, low:high].to(dtype)
            before[number] = torch.cat([before[number], units], 1)
            if number + 1 < len(layers):
                active = ACTIVATIONS[activation][0](units)
                known[number + 1] = torch.cat([known[number + 1], active], 1)
        values = y[:, table[0][step] : table[0][step + 1]].to(dtype)
        found, log = _univariate(values, units, map, bins, constant, floor)
        known[0] = torch.cat([known[0], found], 1)
        logdet = logdet + log
    return known, before[:-1], before[-1], logdet


def autoregressive_inverse_backward(
    grad_x: Tensor,
    grad_logdet: Tensor,
    y: Tensor,
    first: Tensor,
    net: Tensor,
    widths: list[int],
    starts: Tensor,
    activation: str,
    map: str,
    bins: int,
    constant: float,
    floor: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of y, first and net: the recursion again, and then its steps in reverse."""
    dtype = compute_dtype(y)
    layers = layers_of(net.to(dtype), widths)
    table = starts.tolist()
    known, before, parameters, _ = _recursion(
        y, first, net, widths, starts, activation, map, bins, constant, floor
    )
    of_known = [grad_x.to(dtype), *(torch.zeros_like(k) for k in known[1:])]
    of_units = [torch.zeros_like(u) for u in (*before, parameters)]
    of_y = torch.zeros_like(known[0])
    for step in reversed(range(len(table[0]) - 1)):
        of_step = [slice(row[step], row[step + 1]) for row in table]
        of_values, grads = _univariate_backward(
            of_known[0][:, of_step[0]],
            grad_logdet,
            y[:, of_step[0]].to(dtype),
            parameters[:, of_step[-1]],
            map,
            bins,
            constant,
            floor,
        )
        of_y = _placed(of_y, of_values, of_step[0])
        for number in reversed(range(len(layers))):
            if number + 1 < len(layers):
                units = of_step[number + 1]
                slope = ACTIVATIONS[activation][1](before[number][:, units])
                grads = of_known[number + 1][:, units] * slope
            rows = of_step[number + 1]
            of_units[number] = _placed(of_units[number], grads, rows)
            # What a step reads ends where its own units do; of the features, where they begin.
            reads = of_step[number].stop if number else of_step[0].start
            pulled = grads @ layers[number][0][rows, :reads]
            of_known[number] = of_known[number] + F.pad(
                pulled, (0, of_known[number].shape[1] - reads)
            )
    parts: list[Tensor] = []
    for number, grads in enumerate(of_units):
        of_weight = grads.T @ known[number]
        parts += [(of_weight * _read(table, number, of_weight)).flatten(), grads.sum(0)]
    of_first = of_units[0].to(first.dtype) if first.dim() == 2 else first.new_empty(0)
    return of_y.to(y.dtype), of_first, torch.cat(parts).to(net.dtype)


def _read(table: list[list[int]], number: int, weight: Tensor) -> Tensor:
    """Which of a layer's weights are read at all."""
    edges = torch.tensor(table[number + 1][1:], device=weight.device)
    step = torch.searchsorted(
        edges, torch.arange(weight.shape[0], device=weight.device), right=True
    )
    ends = torch.tensor(table[number][1:] if number else table[0][:-1], device=weight.device)
    return torch.arange(weight.shape[1], device=weight.device) < ends[step][:, None]


def _placed(whole: Tensor, part: Tensor, columns: slice) -> Tensor:
    """``whole`` with ``part`` added in some columns."""
    return whole + F.pad(part, (columns.start, whole.shape[1] - columns.stop))


def _univariate(
    values: Tensor, units: Tensor, map: str, bins: int, constant: float, floor: float
) -> tuple[Tensor, Tensor]:
    """The inverse of one step's features, and its log-determinant."""
    rows = coupling_rows if map in SCALE_MAPS else rational_quadratic_spline_rows
    return rows(values, *_arguments(values, units, map, bins, constant, floor))


def _univariate_backward(
    grad: Tensor, grad_logdet: Tensor, values: Tensor, units: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    """Gradients of a step's features and of its parameters."""
    arguments = _arguments(values, units, *rest)
    if rest[0] in SCALE_MAPS:
        of_values, *grads = coupling_backward(grad, grad_logdet, values, *arguments)
        return of_values, torch.stack(grads, -1).flatten(1)
    of_values, packed, *_ = rational_quadratic_spline_backward(
        grad, grad_logdet, values, *arguments
    )
    return of_values, packed.flatten(1)


def _arguments(
    values: Tensor, units: Tensor, map: str, bins: int, constant: float, floor: float
) -> tuple[Any, ...]:
    """What the map of the other families takes beside the values."""
    count, none = values.shape[1], values.new_empty(0)
    each = units.view(len(values), count, parameters_each(map, bins))
    if map in SCALE_MAPS:
        shift, scale = each.unbind(-1)
        return shift, scale, none.bool(), 0, count, map, constant, floor, False, True, True
    box = (-constant, constant, -constant, constant, floor, floor, floor)
    return each, none, none, 0, count, bins, *box, map, "linear", True, True


def autoregressive_inverse(y: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """See :func:`fastzoo.ops.autoregressive_inverse`."""
    return inverse_with(autoregressive_inverse_rows, y, *args, **kwargs)


def inverse_with(
    kernel: Callable[..., tuple[Tensor, Tensor]],
    y: Tensor,
    net: Tensor,
    first: Tensor | None = None,
    *,
    widths: list[int],
    starts: Tensor,
    activation: str = "relu",
    map: str = "softclip",
    bins: int = 8,
    constant: float = 1e-3,
    floor: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """``autoregressive_inverse`` by any kernel."""
    return kernel(
        y.contiguous(),
        y.new_empty(0) if first is None else first.contiguous(),
        net.contiguous(),
        list(widths),
        starts.contiguous(),
        activation,
        map,
        bins,
        float(constant),
        float(floor),
    )
