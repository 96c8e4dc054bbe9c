"""Sample inputs and benchmark cases of the ``splines`` family."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastzoo import ops, reference
from fastzoo.reference.coupling import as_rows, part_shape, rows_of
from fastzoo.reference.precision import compute_dtype
from fastzoo.reference.splines import (
    CONVENTIONS,
    TAILS,
    adjoints,
    bin_of,
    bins_of,
    evaluate,
    knots,
    place,
    slopes,
    unpacked,
)
from fastzoo.testing.coupling import both_outputs, values
from fastzoo.testing.spec import BenchmarkCase, Invalid, OpSpec, Sample
from fastzoo.testing.tolerance import unit_roundoff


def parameters(
    *part: int, bins: int = 8, tails: str = "linear", seed: int = 1, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """What a conditioner might give."""
    sizes = (bins, bins, bins + TAILS[tails])
    w, h, d = (values(*part, n, seed=seed + i, device=device) for i, n in enumerate(sizes))
    return w, h, d


def samples(dtype: torch.dtype) -> Iterator[Sample]:
    def sample(name: str, x: Tensor, *given: Tensor | None, **kwargs: Any) -> Sample:
        moved = (None if g is None else g.to(dtype) for g in given)
        return Sample(name, (x.to(dtype), *moved), kwargs)

    for n, columns, bins, convention in (
        (1, 1, 1, "nflows"),
        (9, 4, 8, "nflows"),
        (5, 33, 3, "zuko"),
        (70, 2, 8, "zuko"),
    ):
        yield sample(
            f"random-{n}x{columns}-{bins}-{convention}",
            values(n, columns) * 2,
            *parameters(n, columns, bins=bins),
            convention=convention,
            bound=3.0,
        )
    x = values(6, 11) * 2
    for convention in CONVENTIONS:
        for tails, named in (("linear", "linear"), ("circular", "circular"), ("none", None)):
            given = parameters(6, 11, bins=5, tails=tails)
            kwargs = {"convention": convention, "tails": named, "bound": 3.7}
            yield sample(f"{convention}-{tails}", x, *given, **kwargs)
            yield sample(f"{convention}-{tails}-inverse", x, *given, inverse=True, **kwargs)
    w, h, d = parameters(6, 11)
    packed = torch.cat([w, h, d], -1)
    for inverse in (False, True):
        yield sample(f"packed-{inverse}", x, packed, None, None, inverse=inverse)
    yield sample("slices", x, *packed.split((8, 8, 7), -1))
    yield sample(
        "transposed", x, *(t.transpose(-1, 0).contiguous().transpose(-1, 0) for t in (w, h, d))
    )
    yield sample("many-bins", x, *parameters(6, 11, bins=21), inverse=True)
    yield sample("one-for-all", x, w[0], h[:1], d[0, 0])
    yield sample("elementwise", x, w, h, d, sum_logdet=False)
    yield sample("long-row", values(2, 1311), *parameters(2, 1311, bins=2))
    image = values(3, 6, 2, 2)
    for split in (2, -5):
        part = (3, 6 - abs(split), 2, 2)
        yield sample(f"split{split}", image, *parameters(*part, bins=4), split=split)
    wide = parameters(6, 11, bins=4, tails="none")
    inside = torch.sigmoid(x)
    box = (-0.25, 1.25, -2.0, 3.0)
    yield sample("domain", inside, *wide, tails=None, domain=box)
    yield sample("domain-inverse", inside, *wide, tails=None, domain=box, inverse=True)
    # Zeros make zuko's knots stand at whole numbers.
    on_knots = torch.arange(-5.0, 6.0).expand(6, 11)
    level = tuple(torch.zeros_like(t) for t in (w, h, d))
    ends = torch.tensor([[-5.0, 5.0, 0.3]])
    odd = torch.tensor([[torch.nan, torch.inf, -torch.inf, 1e30]])
    for inverse in (False, True):
        kwargs = {"bound": 4.0, "convention": "zuko", "inverse": inverse}
        yield sample(f"on-knots-{inverse}", on_knots, *level, **kwargs)
        yield sample(f"at-the-ends-{inverse}", ends, *parameters(1, 3), inverse=inverse)
        for tails, named in (("linear", "linear"), ("none", None)):
            given = parameters(1, 4, bins=3, tails=tails)
            yield sample(f"not-finite-{tails}-{inverse}", odd, *given, tails=named, inverse=inverse)
        for size, convention in ((50.0, "nflows"), (1e4, "nflows"), (1e4, "zuko")):
            kwargs = {"inverse": inverse, "convention": convention}
            large = (size * t for t in (w, h, d))
            yield sample(f"overflow-{size:g}-{convention}-{inverse}", x, *large, **kwargs)
    yield sample("vector", x[0], w[0], h[0], d[0])
    yield sample("no-samples", x[:0], w[:0], h[:0], d[:0])
    yield sample("no-elements", x[:, :0], w[:, :0], h[:, :0], d[:, :0])


def invalid() -> Iterator[Invalid]:
    x, (w, h, d) = values(4, 6), parameters(4, 6)
    yield Invalid("list", ([1.0], w, h, d), {}, TypeError, "x")
    yield Invalid("integers", (x.long(), w, h, d), {}, TypeError, "x")
    yield Invalid("widths", (x, "w"), {}, TypeError, "widths")
    yield Invalid("widths-shape", (x, w[:, :5], h, d), {}, ValueError, "widths")
    yield Invalid("heights", (x, w, h[..., :7], d), {}, ValueError, "heights")
    yield Invalid("heights-dtype", (x, w, h.double(), d), {}, TypeError, "heights")
    yield Invalid("heights-alone", (x, w, h), {}, ValueError, "derivatives")
    yield Invalid("derivatives", (x, w, h, h), {}, ValueError, "derivatives")
    yield Invalid("packed", (x, torch.cat([w, h], -1)), {}, ValueError, "widths")
    yield Invalid("bins", (x, *parameters(4, 6, bins=65)), {}, ValueError, "64 bins")
    yield Invalid("tails", (x, w, h, d), {"tails": "periodic"}, ValueError, "tails")
    yield Invalid("convention", (x, w, h, d), {"convention": "pyro"}, ValueError, "convention")
    yield Invalid("bound", (x, w, h, d), {"bound": 0.0}, ValueError, "bound")
    yield Invalid("domain", (x, w, h, d), {"domain": (0, 1, 0, 2)}, ValueError, "domain")
    yield Invalid("minimum", (x, w, h, d), {"min_bin_width": 0.2}, ValueError, "min_bin_width")
    yield Invalid("minimum-height", (x, w, h, d), {"min_bin_height": -1.0}, ValueError, "height")
    yield Invalid("slope", (x, w, h, d), {"slope": 1.0, "convention": "zuko"}, ValueError, "slope")
    yield Invalid("split", (x, w, h, d), {"split": 9}, ValueError, "split")
    yield Invalid("backend", (x, w, h, d), {"backend": "gpu"}, ValueError, "backend")


def definition(x: Tensor, *given: Tensor | None, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """In float64, its results in the operator's dtypes."""
    wide = (None if g is None else g.double() for g in given)
    y, logdet = reference.rational_quadratic_spline(x.double(), *wide, **kwargs)
    return y.to(x.dtype), logdet.to(compute_dtype(x))


def _in_rows(part: tuple[int, ...], bins: int, *given: Tensor | None) -> tuple[Tensor, ...]:
    """The parameters in float64, as the operator sees them."""
    w, h, d = (
        torch.zeros(0) if t is None else as_rows(t.detach().double(), part, (t.shape[-1],))
        for t in given
    )
    return unpacked(w, h, d, bins)


def tolerance(
    x: Tensor,
    widths: Tensor,
    heights: Tensor | None = None,
    derivatives: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Absolute errors allowed of y and the log-determinant.

    A knot is good to K + 16 roundings of the domain (a softmax and K additions), a derivative to
    16, and to 16 of its logarithm; what they move the results by is the formula's own gradient.
    The results themselves take 32 roundings of their terms; a sum of logarithms, with at most 1024
    terms in one accumulator's lanes, 128 of the sum of their magnitudes.
    """
    split, inverse = kwargs.get("split"), kwargs.get("inverse", False)
    convention, tails = kwargs.get("convention", "nflows"), kwargs.get("tails", "linear") or "none"
    bins = bins_of(widths, heights, tails)
    bound = kwargs.get("bound", 5.0)
    left, right, bottom, top = kwargs.get("domain") or (-bound, bound, -bound, bound)
    rows, begin, end = rows_of(x.double(), split)
    part = part_shape(x, split)
    w, h, d = _in_rows(part, bins, widths, heights, derivatives)
    value = (
        rows[:, begin:end].nan_to_num(0, 0, 0).clamp(*((bottom, top) if inverse else (left, right)))
    )
    slope = slopes(d, 1e-3, convention, tails)
    b = bin_of(
        value,
        knots(w, 1e-3, left, right, convention),
        knots(h, 1e-3, bottom, top, convention),
        slope,
        inverse,
    )
    th = place(value, b, inverse)
    y, log = evaluate(th, b, inverse)
    zero, one = torch.zeros_like(th), torch.ones_like(th)
    along, up = (right - left) * (bins + 16), (top - bottom) * (bins + 16)
    steps = 16 * (1 + slope.log().abs().amax(-1)) if slope.numel() else zero

    def moved(grad_y: Tensor, grad_log: Tensor) -> Tensor:
        of_value, x0, x1, y0, y1, d0, d1 = (
            g.abs() for g in adjoints(grad_y, grad_log, th, b, inverse)
        )
        errors: Tensor = (
            of_value * 4 * value.abs()
            + (x0 + x1) * along
            + (y0 + y1) * up
            + (d0 * b.low + d1 * b.high) * steps
        )
        return errors

    work, store = unit_roundoff(compute_dtype(x)), unit_roundoff(x.dtype)
    bound_y = torch.zeros_like(rows)
    bound_y[:, begin:end] = work * (moved(one, zero) + 32 * (y.abs() + right - left + top - bottom))
    of_log = torch.zeros_like(rows)
    size = 1 + 2 * (b.height / b.width).log().abs() + b.low.log().abs() + b.high.log().abs()
    of_log[:, begin:end] = work * (moved(zero, one) + 32 * size + 128 * log.abs())
    bound_y = bound_y.view(x.shape) + 2 * store * x.double().abs().nan_to_num(0, 0, 0)
    bound_y = bound_y + 2 * store * max(abs(bottom), abs(top), abs(left), abs(right))
    return bound_y, of_log.sum(1) if kwargs.get("sum_logdet", True) else of_log.view(x.shape)


def gradient_rtol(
    dtype: torch.dtype,
    x: Tensor,
    widths: Tensor,
    heights: Tensor | None = None,
    derivatives: Tensor | None = None,
    **kwargs: Any,
) -> float:
    """Of the largest gradient: its own chain takes 256 roundings, and a place in a bin is good to
    that of the knots over the narrowest bin, by which the gradient of a logarithm changes."""
    tails = kwargs.get("tails", "linear") or "none"
    bins = bins_of(widths, heights, tails)
    part = part_shape(x, kwargs.get("split"))
    if math.prod(part) == 0:
        return 0.0
    convention = kwargs.get("convention", "nflows")
    w, h, _ = _in_rows(part, bins, widths, heights, derivatives)
    narrowest = min(float(knots(u, 1e-3, 0.0, 1.0, convention).diff().min()) for u in (w, h))
    return (256 + (bins + 16) / narrowest) * unit_roundoff(compute_dtype(x))


def gradient_sample(dtype: torch.dtype) -> Sample:
    given = parameters(1, 3, bins=2, seed=3)
    x = torch.tensor([[-1.3, 2.1, 7.0]])
    return Sample("gradient", tuple(t.to(dtype) for t in (x, *given)), {"bound": 3.0})


def _dispatched(x: Tensor, w: Tensor, h: Tensor, d: Tensor, **kwargs: Any) -> tuple[Any, ...]:
    bound = kwargs.get("bound", 5.0)
    box = (-bound, bound, -bound, bound, 1e-3, 1e-3, 1e-3)
    convention, inverse = kwargs.get("convention", "nflows"), kwargs.get("inverse", False)
    whole = (0, x.shape[1], w.shape[-1])
    return x, w, h, d, *whole, *box, convention, "linear", inverse, True


def eager(x: Tensor, w: Tensor, h: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """The definition, which is what one writes in PyTorch without indexing by masks."""
    return reference.rational_quadratic_spline(x, w, h, d)


def _case(
    rows: int, columns: int, *, backward: bool = False, inverse: bool = False
) -> BenchmarkCase:
    def make(device: str, rows: int, columns: int) -> tuple[Any, ...]:
        return values(rows, columns, device=device), *parameters(rows, columns, device=device)

    numbers = 2 * (1 + 23) + 24 if backward else 25
    suffix = ", forward + backward" if backward else ""
    return BenchmarkCase(
        name=f"{rows} x {columns}, K 8{suffix}",
        shape={"rows": rows, "columns": columns},
        make=make,
        kwargs={},
        flops=lambda x, *_: (900.0 if backward else 300.0) * x.numel(),
        bytes=lambda x, *_: float(numbers * x.element_size() * x.numel()),
        gradients=(0, 1, 2, 3) if backward else (),
        seeds=lambda x, *_: (
            values(*x.shape, seed=8, device=str(x.device)),
            values(x.shape[0], seed=9, device=str(x.device)),
        ),
        tolerance=lambda x, w, h, d: gradient_rtol(x.dtype, x, w, h, d),
    )


RATIONAL_QUADRATIC_SPLINE = OpSpec(
    name="rational_quadratic_spline",
    function=ops.rational_quadratic_spline,
    definition=definition,
    eager=eager,
    samples=samples,
    invalid=invalid,
    dispatch_args=_dispatched,
    fixed_shape=True,
    differentiable=both_outputs,
    gradient_sample=gradient_sample,
    tolerance=tolerance,
    gradient_rtol=gradient_rtol,
    benchmarks=(
        _case(8192, 16),
        _case(8192, 16, backward=True),
    ),
)

SPECS = (RATIONAL_QUADRATIC_SPLINE,)
