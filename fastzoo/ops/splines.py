"""Monotone rational-quadratic splines, the bijections of neural spline flows."""

from typing import Any

import torch
from torch import Tensor

from fastzoo import reference
from fastzoo.ops._checks import check_choice, check_floating, check_same, check_tensor
from fastzoo.ops._operator import Operator
from fastzoo.ops.coupling import check_broadcast, check_split
from fastzoo.reference.coupling import part_shape
from fastzoo.reference.precision import compute_dtype
from fastzoo.reference.splines import CONVENTIONS, TAILS, bins_of, spline_with

# What a kernel keeps of an element on chip.
MOST_BINS = 64

_SCALARS = (
    "SymInt begin, SymInt end, SymInt bins, float left, float right, float bottom, float top,"
    " float min_width, float min_height, float min_derivative, str convention, str tails,"
    " bool inverse, bool sum_logdet"
)


def _fake_spline(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *_, sum_logdet = rest
    logdet = x.new_empty(x.shape[:1] if sum_logdet else x.shape, dtype=compute_dtype(x))
    return x.new_empty(x.shape), logdet


def _setup_spline(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.rest = inputs[4:]


def _backward_spline(ctx: Any, grad_y: Tensor, grad_logdet: Tensor) -> tuple[Any, ...]:
    backward = _SPLINE_BACKWARD.like(ctx)
    grads = backward(grad_y.contiguous(), grad_logdet.contiguous(), *ctx.saved_tensors, *ctx.rest)
    return *grads, *(None for _ in ctx.rest)


def _fake_spline_backward(
    grad_y: Tensor,
    grad_logdet: Tensor,
    x: Tensor,
    widths: Tensor,
    heights: Tensor,
    derivatives: Tensor,
    *_: Any,
) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape) for t in (x, widths, heights, derivatives))


_SPLINE = Operator(
    "rational_quadratic_spline(Tensor x, Tensor widths, Tensor heights, Tensor derivatives,"
    f" {_SCALARS}) -> (Tensor, Tensor)",
    reference=reference.rational_quadratic_spline_rows,
    fake=_fake_spline,
    triton="splines.rational_quadratic_spline",
    setup_context=_setup_spline,
    backward=_backward_spline,
    autocast=torch.float32,
)

_SPLINE_BACKWARD = Operator(
    "rational_quadratic_spline_backward(Tensor grad_y, Tensor grad_logdet, Tensor x,"
    f" Tensor widths, Tensor heights, Tensor derivatives, {_SCALARS})"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference.rational_quadratic_spline_backward,
    fake=_fake_spline_backward,
    triton="splines.rational_quadratic_spline_backward",
    differentiable_reference=True,
)


def rational_quadratic_spline(
    x: Tensor,
    widths: Tensor,
    heights: Tensor | None = None,
    derivatives: Tensor | None = None,
    *,
    bound: float = 5.0,
    tails: str | None = "linear",
    inverse: bool = False,
    convention: str = "nflows",
    split: int | None = None,
    sum_logdet: bool = True,
    domain: tuple[float, float, float, float] | None = None,
    min_bin_width: float = 1e-3,
    min_bin_height: float = 1e-3,
    min_derivative: float = 1e-3,
    slope: float = 1e-3,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """A monotone rational-quadratic spline of each element, or its inverse, with the
    log-determinant, in one pass: nothing of the size of the parameters is made on the way.

    Knots stand at the ends of the domain exactly; the inverse takes the stable root of a quadratic
    whose discriminant is never below zero. An element beyond the domain never touches a parameter,
    nor its gradient.

    Args:
        x: ``[B, ...]``, float32, float64, float16 or bfloat16; a sample is an entry of dimension 0.
        widths, heights: unconstrained, ``[..., K]``, K up to 64: what changes of x, or what
            broadcasts to it, by the bins. Slices of one tensor are read where they are.
        derivatives: unconstrained, ``[..., J]``: at the K - 1 inner knots for ``linear`` tails, at
            K for ``circular`` ones, whose last knot is the first, and at K + 1 without tails.
            Without heights and derivatives, ``widths`` holds all 2 K + J of them side by side, as
            a conditioner gives them.
        bound: the domain and the range are [-bound, bound].
        tails: ``linear``: the identity beyond the domain, with derivative 1 at its ends.
            ``circular``: the identity beyond, for angles. None: NaN beyond.
        inverse: the inverse spline and its log-determinant.
        convention: ``nflows``: softmax and softplus with minima. ``zuko``: soft-clipped softmax and
            exp. They are different functions of the same parameters.
        split: the first ``split`` entries of dimension 1 pass unchanged, or the last ``-split``;
            the parameters are then of the rest.
        sum_logdet: False keeps the logarithms of the derivatives elementwise.
        domain: ``(left, right, bottom, top)`` in place of the bound.
        min_bin_width, min_bin_height, min_derivative: of the ``nflows`` convention.
        slope: of the ``zuko`` convention, in (0, 1).
        backend: ``auto``, ``reference``, ``cpu``, ``cuda`` or ``triton``; None follows
            :func:`fastzoo.use_backend`.

    Returns:
        y like x, and logdet ``[B]`` (like x without the sum), float32 (float64 for float64).

    Gradient: to x and the parameters, of any order; the backward reads the inputs again and keeps
    nothing else. Forward-mode derivatives raise. Deterministic. Under autocast it computes in
    float32.

    Raises:
        TypeError, ValueError: an argument of the wrong kind; the message names it.
        RuntimeError: a forced backend that cannot run, with the reason.

    Source: Durkan et al., Neural Spline Flows (2019), section 3.1; Rezende et al., Normalizing
    Flows on Tori and Spheres (2020) for circles.
    """
    check_tensor("x", x, "[B, ...]", -1)
    check_floating("x", x)
    check_choice("convention", convention, CONVENTIONS)
    check_choice("tails", tails, ("linear", "circular", None))
    check_split(x, split)
    bins = _check_parameters(x, widths, heights, derivatives, tails or "none", split)
    _check_domain(bound, domain, tails)
    _check_minima(bins, convention, min_bin_width, min_bin_height, min_derivative, slope)
    return spline_with(
        _SPLINE.choose(backend, x.device.type),
        x,
        widths,
        heights,
        derivatives,
        bound=bound,
        tails=tails,
        inverse=inverse,
        convention=convention,
        split=split,
        sum_logdet=sum_logdet,
        domain=domain,
        min_bin_width=min_bin_width,
        min_bin_height=min_bin_height,
        min_derivative=min_derivative,
        slope=slope,
    )


def _check_parameters(
    x: Tensor,
    widths: Tensor,
    heights: Tensor | None,
    derivatives: Tensor | None,
    tails: str,
    split: int | None,
) -> int:
    """The number of bins."""
    part = part_shape(x, split)
    named = {"widths": widths, "heights": heights, "derivatives": derivatives}
    if (heights is None) != (derivatives is None):
        missing = "heights" if heights is None else "derivatives"
        raise ValueError(f"{missing}: expected both heights and derivatives, or neither")
    for name, value in named.items():
        if value is None and name != "widths":
            continue
        check_tensor(name, value, "[..., bins]", -1)
        assert value is not None
        check_same("x", x, name, value)
        check_broadcast(name, value, (*part, value.shape[-1]))
    bins = bins_of(widths, heights, tails)
    if bins > MOST_BINS:
        raise ValueError(f"widths: expected at most {MOST_BINS} bins, got {bins}")
    wanted = bins + TAILS[tails]
    if heights is None or derivatives is None:
        if bins < 1 or widths.shape[-1] != 2 * bins + wanted:
            raise ValueError(
                f"widths: expected 3 bins {TAILS[tails]:+d} numbers an element with tails "
                f"{tails!r}, got {widths.shape[-1]}"
            )
        return bins
    if bins < 1:
        raise ValueError("widths: expected at least one bin, got 0")
    if heights.shape[-1] != bins:
        raise ValueError(f"heights: expected {bins} bins as widths, got {heights.shape[-1]}")
    if derivatives.shape[-1] != wanted:
        raise ValueError(
            f"derivatives: expected {wanted} for {bins} bins with tails {tails!r}, got "
            f"{derivatives.shape[-1]}"
        )
    return bins


def _check_domain(
    bound: float, domain: tuple[float, float, float, float] | None, tails: str | None
) -> None:
    if domain is None:
        if not 0 < bound < float("inf"):
            raise ValueError(f"bound: expected above 0, got {bound}")
        return
    left, right, bottom, top = domain
    if not (left < right and bottom < top):
        raise ValueError(f"domain: expected (left, right, bottom, top) ascending, got {domain}")
    if tails is not None and (left, right) != (bottom, top):
        raise ValueError(f"domain: expected a square with tails {tails!r}, got {domain}")


def _check_minima(
    bins: int, convention: str, width: float, height: float, derivative: float, slope: float
) -> None:
    if convention == "zuko":
        if not 0 < slope < 1:
            raise ValueError(f"slope: expected in (0, 1), got {slope}")
        return
    for name, least in (("min_bin_width", width), ("min_bin_height", height)):
        if not 0 <= least * bins <= 1:
            raise ValueError(f"{name}: expected 0 to 1 / {bins} bins, got {least}")
    if derivative < 0:
        raise ValueError(f"min_derivative: expected at least 0, got {derivative}")
