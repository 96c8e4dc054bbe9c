"""Linear, quadratic and cubic splines: definitions, without kernels of their own."""

from torch import Tensor

from fastzoo import reference
from fastzoo.ops._checks import check_choice, check_floating, check_same, check_tensor

Box = tuple[float, float, float, float]


def linear_spline(
    x: Tensor,
    pdf: Tensor,
    *,
    bound: float = 5.0,
    tails: str | None = "linear",
    inverse: bool = False,
    sum_logdet: bool = True,
    domain: Box | None = None,
) -> tuple[Tensor, Tensor]:
    """A monotone spline of straight lines over equal bins, with its log-determinant.

    Plain PyTorch on every device; :func:`rational_quadratic_spline` is the fast one.

    Args:
        x: ``[B, ...]``.
        pdf: unconstrained masses, ``[..., K]``.
        bound, domain: the box, as :func:`rational_quadratic_spline` takes it.
        tails: ``linear``: the identity beyond the domain. None: NaN beyond.
        inverse, sum_logdet: the inverse map; elementwise logarithms.

    Returns:
        y like x and logdet ``[B]``, float32 (float64 for float64).

    Gradient: by autograd, of any order.

    Source: Mueller et al., Neural Importance Sampling (2018), section 4.2; parameters as nflows has
    them.
    """
    _check(x, tails, pdf=pdf)
    return reference.linear_spline(
        x,
        pdf,
        bound=bound,
        tails=tails,
        inverse=inverse,
        sum_logdet=sum_logdet,
        domain=domain,
    )


def quadratic_spline(
    x: Tensor,
    widths: Tensor,
    heights: Tensor,
    *,
    bound: float = 5.0,
    tails: str | None = "linear",
    inverse: bool = False,
    sum_logdet: bool = True,
    domain: Box | None = None,
) -> tuple[Tensor, Tensor]:
    """A monotone spline of parabolas, whose density is piecewise linear; see :func:`linear_spline`.

    Args:
        x: ``[B, ...]``.
        widths: unconstrained, ``[..., K]``.
        heights: unconstrained densities at the knots: ``[..., K + 1]``, or ``[..., K - 1]`` with
            the ends at a density of 1, for linear tails.
        bound, tails, inverse, sum_logdet, domain: as there.

    Source: Mueller et al., Neural Importance Sampling (2018), section 4.3; parameters as nflows has
    them, an inverse that does not divide by what may be zero. With K - 1 heights nflows 0.14 counts
    the outer bins by half, which leaves a step at the ends; here the density there is 1 exactly.
    """
    _check(x, tails, widths=widths, heights=heights)
    bins = widths.shape[-1]
    if heights.shape[-1] not in (bins + 1, bins - 1) or heights.shape[-1] == 0:
        raise ValueError(
            f"heights: expected {bins + 1} or {bins - 1} for {bins} bins, got {heights.shape[-1]}"
        )
    return reference.quadratic_spline(
        x,
        widths,
        heights,
        bound=bound,
        tails=tails,
        inverse=inverse,
        sum_logdet=sum_logdet,
        domain=domain,
    )


def cubic_spline(
    x: Tensor,
    widths: Tensor,
    heights: Tensor,
    derivative_left: Tensor,
    derivative_right: Tensor,
    *,
    bound: float = 5.0,
    tails: str | None = "linear",
    inverse: bool = False,
    sum_logdet: bool = True,
    domain: Box | None = None,
) -> tuple[Tensor, Tensor]:
    """A monotone spline of cubics with Steffen's derivatives; see :func:`linear_spline`.

    Args:
        x: ``[B, ...]``.
        widths, heights: unconstrained, ``[..., K]``.
        derivative_left, derivative_right: unconstrained, ``[..., 1]``.
        bound, tails, inverse, sum_logdet, domain: as there.

    Source: Durkan et al., Cubic-Spline Flows (2019); parameters as nflows has them. The inverse is
    found by halving and two steps of Newton's method, in the place of the cubic formula.
    """
    _check(
        x,
        tails,
        widths=widths,
        heights=heights,
        derivative_left=derivative_left,
        derivative_right=derivative_right,
    )
    if heights.shape[-1] != widths.shape[-1]:
        raise ValueError(f"heights: expected {widths.shape[-1]} bins, got {heights.shape[-1]}")
    return reference.cubic_spline(
        x,
        widths,
        heights,
        derivative_left,
        derivative_right,
        bound=bound,
        tails=tails,
        inverse=inverse,
        sum_logdet=sum_logdet,
        domain=domain,
    )


def _check(x: Tensor, tails: str | None, **parameters: Tensor) -> None:
    check_tensor("x", x, "[B, ...]", -1)
    check_floating("x", x)
    check_choice("tails", tails, ("linear", None))
    for name, value in parameters.items():
        check_tensor(name, value, "[..., bins]", -1)
        check_same("x", x, name, value)
        if value.dim() != x.dim() + 1 or value.shape[:-1] != x.shape or value.shape[-1] == 0:
            raise ValueError(f"{name}: expected {[*x.shape, 'bins']}, got {list(value.shape)}")
