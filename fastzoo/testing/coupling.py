"""Sample inputs and benchmark cases of the ``coupling`` family: a row for each bijection."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastzoo import ops, reference
from fastzoo.reference.coupling import (
    MAPS,
    SCALE_MAPS,
    as_rows,
    part_shape,
    rows_of,
    scales,
)
from fastzoo.reference.precision import compute_dtype
from fastzoo.testing.spec import BenchmarkCase, Invalid, OpSpec, Sample
from fastzoo.testing.tolerance import unit_roundoff

# Every bijection: its constant and the floor of its scale.
ROWS: dict[str, tuple[float, float]] = {
    "exp": (1.0, 0.0),
    "sigmoid2": (1.0, 0.0),
    "tanh": (2.0, 0.0),
    "atan": (1.5, 0.0),
    "softplus": (1.0, 1e-3),
    "softclip": (1e-3, 0.0),
    "additive": (1.0, 0.0),
    "soft_clip": (1.7, 0.0),
    "logit": (0.05, 0.0),
    "leaky_relu": (0.2, 0.0),
}
assert tuple(ROWS) == MAPS


def values(*shape: int, seed: int = 0, device: str = "cpu") -> Tensor:
    """Around zero, as data and what a conditioner gives are; the same numbers on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device)


def arguments(map: str, x: Tensor, *, seed: int = 1, split: int | None = None) -> tuple[Any, ...]:
    """x and the parameters of a map, of a domain that both directions of it have."""
    if map in ("soft_clip", "logit"):
        return ((torch.sigmoid(x) * 0.9 + 0.05).to(x.dtype), None, None)
    part = part_shape(x, split)
    shift = values(*part, seed=seed).to(x.dtype)
    scale = values(*part, seed=seed + 1).to(x.dtype)
    return (
        x,
        None if map == "leaky_relu" else shift,
        scale if map in SCALE_MAPS else None,
    )


def samples(dtype: torch.dtype) -> Iterator[Sample]:
    def sample(name: str, map: str, x: Tensor, *args: Any, **kwargs: Any) -> Sample:
        constant, floor = ROWS[map]
        named = {"map": map, "constant": constant, "min_scale": floor, **kwargs}
        given = args or arguments(map, x, split=kwargs.get("split"))[1:]
        moved = (
            a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in given
        )
        return Sample(name, (x.to(dtype), *moved), named)

    rows = values(7, 33)
    for map in MAPS:
        x, *rest = arguments(map, rows)
        yield sample(f"{map}", map, x, *rest)
        yield sample(f"{map}-inverse", map, x, *rest, inverse=True)
    for shape, map in (((1, 1), "exp"), ((37, 8), "tanh"), ((130, 3), "softclip")):
        yield sample(f"random-{shape[0]}x{shape[1]}-{map}", map, values(*shape))
    image = values(3, 6, 4, 5)
    for split in (2, -4):
        yield sample(f"split{split}", "sigmoid2", image, split=split, shift_first=True)
        yield sample(
            f"split{split}-inverse", "sigmoid2", image, split=split, shift_first=True, inverse=True
        )
    yield sample("elementwise", "exp", image, split=3, sum_logdet=False)
    yield sample("long-row", "tanh", values(2, 2311))
    _, shift, scale = arguments("exp", rows)
    mask = torch.arange(33) % 2 == 0
    yield sample("mask", "exp", rows, shift, scale, mask)
    yield sample("mask-inverse", "tanh", rows, shift, scale, mask, inverse=True)
    each = values(7, 33, seed=9) > 0
    yield sample("mask-of-each-sample", "exp", rows, shift, scale, each.float())
    yield sample("mask-elementwise", "exp", rows, shift, scale, each, sum_logdet=False)
    checkers = (torch.arange(4)[:, None] + torch.arange(5)) % 2
    yield sample("checkerboard", "tanh", image, *arguments("tanh", image)[1:], checkers[None, None])
    poison = torch.where(mask, torch.inf, scale)
    yield sample(
        "mask-hides-infinities", "exp", rows, torch.where(mask, torch.nan, shift), poison, mask
    )
    yield sample("one-for-all", "exp", rows, shift[:1], scale[0])
    yield sample(
        "one-for-channels", "softplus", image, shift[0, :6, None, None], scale[:1, :1, None, None]
    )
    both = values(7, 66, seed=5)
    yield sample("halves", "tanh", rows, *both.chunk(2, 1))
    yield sample("interleaved", "tanh", rows, both[:, 0::2], both[:, 1::2])
    far = torch.linspace(-60, 60, 33).expand(7, 33)
    for map in SCALE_MAPS:
        if map != "exp":
            yield sample(f"overflow-{map}", map, rows, shift, far)
    yield sample("overflow-far-below", "softplus", rows, shift, -far.abs(), min_scale=0.0)
    yield sample("vector", "exp", rows[:, 0], shift[:, 0], scale[:, 0])
    yield sample("no-samples", "exp", rows[:0], shift[:0], scale[:0])
    yield sample("no-elements", "exp", rows[:, :0], shift[:, :0], scale[:, :0])


def invalid() -> Iterator[Invalid]:
    x = values(4, 6)
    yield Invalid("list", ([1.0], x, x), {}, TypeError, "x")
    yield Invalid("integers", (x.long(), x, x), {}, TypeError, "x")
    yield Invalid("map", (x, x, x), {"map": "cubic"}, ValueError, "map")
    yield Invalid("no-shift", (x, None, x), {}, ValueError, "shift")
    yield Invalid("no-scale", (x, x), {}, ValueError, "scale")
    yield Invalid("scale-too-many", (x, x, x), {"map": "additive"}, ValueError, "scale")
    yield Invalid("shift-shape", (x, x[:, :5], x), {}, ValueError, "shift")
    yield Invalid("scale-word", (x, x, "exp"), {}, TypeError, "scale")
    yield Invalid("scale-dtype", (x, x, x.double()), {}, TypeError, "scale")
    yield Invalid("mask-shape", (x, x, x, torch.ones(5)), {}, ValueError, "mask")
    yield Invalid("mask-list", (x, x, x, [1, 0]), {}, TypeError, "mask")
    yield Invalid("mask-split", (x, x, x, torch.ones(6)), {"split": 3}, ValueError, "split")
    yield Invalid("split", (x, x, x), {"split": 6}, ValueError, "split")
    yield Invalid("split-float", (x, x, x), {"split": 0.5}, TypeError, "split")
    yield Invalid("constant", (x, x, x), {"map": "tanh", "constant": 0.0}, ValueError, "constant")
    yield Invalid("alpha", (x,), {"map": "logit", "constant": 0.5}, ValueError, "alpha")
    yield Invalid("floor", (x, x, x), {"map": "softplus", "min_scale": -1.0}, ValueError, "min_s")
    yield Invalid("backend", (x, x, x), {"backend": "gpu"}, ValueError, "backend")


def definition(x: Tensor, *args: Tensor | None, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """In float64, its results in the operator's dtypes."""
    wide = (a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)
    y, logdet = reference.coupling(x.double(), *wide, **kwargs)
    return y.to(x.dtype), logdet.to(compute_dtype(x))


def tolerance(
    x: Tensor,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    mask: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Absolute errors allowed of y and the log-determinant.

    A logarithm of a scale is good to 8 roundings of itself and of 1, and to 2 of its argument;
    a product with e^a to 8 and what a's own error makes of it; the maps without parameters to 16
    of their terms. A sum of logarithms has at most 1024 terms in one accumulator's lanes, and 128
    roundings of the sum of their magnitudes.
    """
    name, split = kwargs["map"], kwargs.get("split")
    wide, shifts, factors = (
        a.double() if a is not None else torch.zeros(()) for a in (x, shift, scale)
    )

    def placed(part: Tensor) -> Tensor:
        """Of what changes, in the shape of x."""
        rows, begin, end = rows_of(torch.zeros_like(wide), split)
        rows[:, begin:end] = part.nan_to_num(0, 0, 0)
        return rows.view(x.shape)

    elementwise = {**kwargs, "sum_logdet": False}
    given = (a if a is None else a.double() for a in (shift, scale))
    y, log = reference.coupling(wide, *given, mask, **elementwise)
    work, store = unit_roundoff(compute_dtype(x)), unit_roundoff(x.dtype)
    part = part_shape(x, split)
    of_log = 8 * log.abs() + 8
    if name in SCALE_MAPS:
        s = as_rows(factors, part)
        _, slope = scales(s, name, kwargs["constant"], kwargs["min_scale"])
        of_log = of_log + placed(2 * (s.abs() + 2) * slope)
    size = y.abs() + wide.abs() * log.exp() + placed(as_rows(shifts, part).abs()) * (1 + log.exp())
    if name == "logit":
        # Its argument is good to 2 roundings, which near 0 and 1 the logarithms enlarge.
        size = size + log.exp() + 1
        of_log = of_log + 4 * log.exp()
    of_y = work * size * (8 + of_log) + 2 * store * y.abs() + torch.finfo(x.dtype).tiny
    sums = (
        of_log
        if not kwargs.get("sum_logdet", True)
        else rows_of(of_log + 128 * log.abs(), None)[0].sum(1)
    )
    return of_y, work * sums


def both_outputs(output: tuple[Tensor, Tensor]) -> Tensor:
    y, logdet = output
    return torch.cat([y.flatten().to(logdet.dtype), logdet.flatten()])


def gradient_sample(dtype: torch.dtype) -> Sample:
    x, shift, scale = arguments("tanh", values(3, 5, seed=4))
    mask = torch.arange(5) == 1
    return Sample(
        "gradient",
        (x.to(dtype), shift.to(dtype), scale.to(dtype), mask),
        {"map": "tanh", "constant": 2.0},
    )


def _dispatched(
    x: Tensor, shift: Tensor, scale: Tensor, mask: Tensor | None = None, **kwargs: Any
) -> tuple[Any, ...]:
    name = kwargs.get("map", "exp")
    masks = x.new_empty(0).bool() if mask is None else mask
    constant, floor = kwargs.get("constant", 1.0), kwargs.get("min_scale", 0.0)
    inverse = kwargs.get("inverse", False)
    return x, shift, scale, masks, 0, x.shape[1], name, constant, floor, False, inverse, True


def eager(x: Tensor, shift: Tensor, scale: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """As Real NVP's published formula has it, with its clamp."""
    keep = mask.to(x.dtype)
    a = 2 * torch.tanh(scale) * (1 - keep)
    return keep * x + (1 - keep) * (x * torch.exp(a) + shift), a.sum(1)


def _case(rows: int, columns: int, *, backward: bool = False) -> BenchmarkCase:
    def make(device: str, rows: int, columns: int) -> tuple[Any, ...]:
        x, shift, scale = (values(rows, columns, seed=seed, device=device) for seed in range(3))
        return x, shift, scale, torch.arange(columns, device=device) % 2 == 0

    streams = 10.0 if backward else 4.0
    return BenchmarkCase(
        name=f"{rows} x {columns}, tanh, mask" + (", forward + backward" if backward else ""),
        shape={"rows": rows, "columns": columns},
        make=make,
        kwargs={"map": "tanh", "constant": 2.0},
        flops=lambda x, *_: (60.0 if backward else 30.0) * x.numel(),
        bytes=lambda x, *_: streams * x.element_size() * x.numel(),
        gradients=(0, 1, 2) if backward else (),
        seeds=lambda x, *_: (
            values(*x.shape, seed=8, device=str(x.device)),
            values(x.shape[0], seed=9, device=str(x.device)),
        ),
        tolerance=lambda x, *_: 64 * 2.0**-24,
    )


COUPLING = OpSpec(
    name="coupling",
    function=ops.coupling,
    definition=definition,
    eager=eager,
    samples=samples,
    invalid=invalid,
    dispatch_args=_dispatched,
    whole=(3,),
    fixed_shape=True,
    differentiable=both_outputs,
    gradient_sample=gradient_sample,
    tolerance=tolerance,
    gradient_rtol=lambda dtype, x, *_, **__: 64 * unit_roundoff(compute_dtype(x)),
    benchmarks=(_case(65536, 64), _case(65536, 64, backward=True)),
)

SPECS = (COUPLING,)
