"""Sample inputs and benchmark cases of the ``masked_linear`` family."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastzoo import ops, reference
from fastzoo.reference.masked_linear import ACTIVATIONS, UNIVARIATE, layers_of, parameters_each
from fastzoo.reference.precision import compute_dtype
from fastzoo.testing.coupling import both_outputs, values
from fastzoo.testing.spec import BenchmarkCase, Invalid, OpSpec, Sample
from fastzoo.testing.tolerance import unit_roundoff

# Constant and floor of each map.
MAPS: dict[str, tuple[float, float]] = {
    "exp": (1.0, 0.0),
    "sigmoid2": (1.0, 1e-3),
    "tanh": (2.0, 0.0),
    "atan": (2.0, 0.0),
    "softplus": (1.0, 1e-3),
    "softclip": (1e-3, 0.0),
    "nflows": (3.0, 1e-3),
    "zuko": (3.0, 1e-3),
}
assert tuple(MAPS) == UNIVARIATE


def network(
    features: int,
    hidden: Sequence[int],
    each: int,
    *,
    steps: int | None = None,
    seed: int = 0,
    device: str = "cpu",
) -> tuple[Tensor, Tensor, list[int]]:
    """A masked network whose units are sorted by step: flat, its starts, and its widths."""
    steps = steps or features
    of_feature = torch.arange(features) * steps // features
    of_units = [of_feature]
    of_units += [torch.arange(width) * steps // width for width in hidden]
    of_units += [of_feature.repeat_interleave(each)]
    widths = [len(units) for units in of_units]
    parts: list[Tensor] = []
    for number, (reads, gives) in enumerate(itertools.pairwise(of_units)):
        mask = gives[:, None] > reads if number == 0 else gives[:, None] >= reads
        weight = values(len(gives), len(reads), seed=seed + 2 * number)
        fan = mask.sum(1, keepdim=True).clamp(min=1)
        parts.append((weight * mask / fan.sqrt()).flatten())
        parts.append(values(len(gives), seed=seed + 2 * number + 1) / 4)
    numbers = torch.arange(steps + 1)
    starts = torch.stack([(units[:, None] < numbers).sum(0) for units in of_units])
    return torch.cat(parts).to(device), starts.to(device), widths


def samples(dtype: torch.dtype) -> Iterator[Sample]:
    def sample(
        name: str,
        rows: int,
        features: int,
        hidden: Sequence[int],
        map: str,
        *,
        bins: int = 4,
        steps: int | None = None,
        context: bool = False,
        **kwargs: Any,
    ) -> Sample:
        each = parameters_each(map, bins)
        net, starts, widths = network(features, hidden, each, steps=steps, seed=features)
        constant, floor = MAPS[map]
        named = {
            "widths": widths,
            "starts": starts,
            "map": map,
            "bins": bins,
            "constant": constant,
            "floor": floor,
        }
        y, first = values(rows, features), values(rows, widths[1], seed=7) if context else None
        args = (y.to(dtype), net.to(dtype), None if first is None else first.to(dtype))
        return Sample(name, args, {**named, **kwargs})

    yield sample("random-1x1", 1, 1, (3,), "exp")
    yield sample("random-9x7", 9, 7, (12, 9), "tanh", context=True)
    yield sample("random-70x5", 70, 5, (16,), "zuko")
    for map in UNIVARIATE:
        yield sample(map, 5, 6, (10, 8), map)
    for activation in ACTIVATIONS:
        yield sample(activation, 5, 4, (6, 6), "softclip", activation=activation)
    yield sample("no-hidden-layer", 6, 5, (), "tanh", context=True)
    yield sample("steps-of-several", 6, 7, (11,), "tanh", steps=3)
    yield sample("one-step", 6, 4, (5,), "nflows", steps=1)
    yield sample("few-units", 6, 9, (4, 3), "softclip")
    yield sample("deep", 4, 5, (7, 7, 7, 7), "atan")
    yield sample("wide", 3, 20, (67, 130), "softclip")
    yield sample("many-rows", 300, 3, (8,), "softclip")
    yield sample("no-rows", 0, 4, (6,), "exp")


def invalid() -> Iterator[Invalid]:
    net, starts, widths = network(4, (6,), 2)
    y, kwargs = values(3, 4), {"widths": widths, "starts": starts}
    yield Invalid("list", ([1.0], net), kwargs, TypeError, "y")
    yield Invalid("integers", (y.long(), net), kwargs, TypeError, "y")
    yield Invalid("rank", (y[0], net), kwargs, ValueError, "y")
    yield Invalid("net", (y, net[1:]), kwargs, ValueError, "net")
    yield Invalid("net-dtype", (y, net.double()), kwargs, TypeError, "net")
    yield Invalid("starts", (y, net), {**kwargs, "starts": starts.float()}, TypeError, "starts")
    yield Invalid("starts-rows", (y, net), {**kwargs, "starts": starts[1:]}, ValueError, "starts")
    yield Invalid(
        "starts-order", (y, net), {**kwargs, "starts": starts.flip(1)}, ValueError, "starts"
    )
    yield Invalid("widths", (y[:, :3], net), kwargs, ValueError, "widths")
    yield Invalid("parameters", (y, net), {**kwargs, "map": "zuko"}, ValueError, "widths")
    yield Invalid("first", (y, net, y), kwargs, ValueError, "first")
    yield Invalid("map", (y, net), {**kwargs, "map": "additive"}, ValueError, "map")
    yield Invalid("activation", (y, net), {**kwargs, "activation": "sine"}, ValueError, "act")
    yield Invalid("constant", (y, net), {**kwargs, "constant": 2.0}, ValueError, "constant")
    yield Invalid("floor", (y, net), {**kwargs, "floor": -1.0}, ValueError, "floor")
    yield Invalid("backend", (y, net), {**kwargs, "backend": "gpu"}, ValueError, "backend")


def definition(
    y: Tensor, net: Tensor, first: Tensor | None = None, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """In float64, its results in the operator's dtypes."""
    wide = None if first is None else first.double()
    x, logdet = reference.autoregressive_inverse(y.double(), net.double(), wide, **kwargs)
    return x.to(y.dtype), logdet.to(compute_dtype(y))


def tolerance(
    y: Tensor, net: Tensor, first: Tensor | None = None, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """Absolute errors allowed of x and the log-determinant.

    An error of a feature goes into all that follow it, by the network's own derivatives: it is
    measured rather than bounded, as what PyTorch's own operators make of the definition in
    float32, by the working precision's roundoff; four times that, and 64 roundings of the results.
    """
    work, store = compute_dtype(y), unit_roundoff(y.dtype)

    def solved(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        context = None if first is None else first.to(dtype)
        given = (y.to(dtype), net.to(dtype), context)
        return reference.autoregressive_inverse(*given, **kwargs)

    exact, rounded = solved(torch.float64), solved(torch.float32)
    finer = unit_roundoff(work) / unit_roundoff(torch.float32)
    of_x, of_log = (
        (
            4 * finer * (r.double() - e).abs().amax(0, keepdim=True).amax(-1, keepdim=True)
            + 64 * unit_roundoff(work) * (1 + e.abs())
            for e, r in zip(exact, rounded, strict=True)
        )
        if len(y)
        else (torch.zeros(1), torch.zeros(1))
    )
    return of_x + 2 * store * exact[0].abs(), of_log


def gradient_sample(dtype: torch.dtype) -> Sample:
    net, starts, widths = network(3, (3,), 2, seed=3)
    args = (values(2, 3).to(dtype), net.to(dtype))
    named = {"widths": widths, "starts": starts, "map": "tanh", "activation": "tanh"}
    return Sample("gradient", args, {**named, "constant": 1.0})


def _dispatched(
    y: Tensor, net: Tensor, first: Tensor | None = None, **kwargs: Any
) -> tuple[Any, ...]:
    none = y.new_empty(0) if first is None else first
    activation = kwargs.get("activation", "relu")
    defaults = {"map": "softclip", "bins": 8, "constant": 1e-3, "floor": 0.0}
    rest = tuple(kwargs.get(name, value) for name, value in defaults.items())
    return y, none, net, kwargs["widths"], kwargs["starts"], activation, *rest


def _case(rows: int, features: int, hidden: tuple[int, ...]) -> BenchmarkCase:
    net, starts, widths = network(features, hidden, 2)

    def make(device: str, rows: int) -> tuple[Any, ...]:
        return values(rows, features, device=device), net.to(device)

    return BenchmarkCase(
        name=f"{rows} x {features}, hidden {hidden}, affine",
        shape={"rows": rows},
        make=make,
        kwargs={"widths": widths, "starts": starts},
        # Half of a dense network's, which is what the mask leaves.
        flops=lambda y, net, **_: float(net.numel() * y.shape[0]),
        bytes=lambda y, net, **_: 4.0 * (2 * y.numel() + net.numel()),
        # Every solved feature hands its rounding to all that are solved after it.
        tolerance=lambda *_, **__: 1e-5,
        devices=("cpu",),
    )


def eager(y: Tensor, net: Tensor) -> tuple[Tensor, Tensor]:
    """The sequential loop in use: the whole network, of two hidden layers, once a feature."""
    features = y.shape[1]
    # Of n = (D + 1) H + (H + 1) H + (H + 1) 2 D numbers.
    sides = 3 * features + 2
    hidden = round((-sides + (sides**2 + 4 * (len(net) - 2 * features)) ** 0.5) / 2)
    layers = layers_of(net, [features, hidden, hidden, 2 * features])
    x = torch.zeros_like(y)
    for _ in range(features):
        units = x
        for number, (weight, bias) in enumerate(layers):
            units = torch.nn.functional.linear(units, weight, bias)
            units = torch.relu(units) if number + 1 < len(layers) else units
        shift, scale = units.view(len(y), features, 2).unbind(-1)
        x, logdet = reference.affine_coupling(y, shift, scale, scale_map="softclip", inverse=True)
    return x, logdet


AUTOREGRESSIVE_INVERSE = OpSpec(
    name="autoregressive_inverse",
    function=ops.autoregressive_inverse,
    definition=definition,
    eager=eager,
    samples=samples,
    invalid=invalid,
    dispatch_args=_dispatched,
    whole=(1,),
    fixed_shape=True,
    differentiable=both_outputs,
    gradient_sample=gradient_sample,
    tolerance=tolerance,
    gradient_rtol=lambda dtype, y, *_, **__: 2048 * unit_roundoff(compute_dtype(y)),
    benchmarks=(_case(1024, 64, (256, 256)), _case(64, 64, (64, 64))),
)

SPECS = (AUTOREGRESSIVE_INVERSE,)
