"""nflows' rational-quadratic splines (0.14) on fastzoo's operator, one kernel each way.

Names, arguments, defaults and returns ``(outputs, logabsdet)`` are theirs, elementwise. Their
modules take these functions by name, so that this is all that their couplings and autoregressive
flows need::

    from nflows.transforms import autoregressive, splines
    from fastzoo.compat import nflows

    for module in (splines, autoregressive):
        module.rational_quadratic_spline = nflows.rational_quadratic_spline
        module.unconstrained_rational_quadratic_spline = (
            nflows.unconstrained_rational_quadratic_spline
        )

Differences: :class:`InputOutsideDomain` is a ValueError of fastzoo's own, and what it says of an
inverse is about the inverse's domain, ``[bottom, top]``, where theirs looks at ``[left, right]``;
under torch.compile it is not raised, and what is outside comes out as NaN. The discriminant of the
inverse is never negative, where theirs stops at an assertion. No input, or none inside the
interval, is no error.
"""

import torch
from torch import Tensor

from fastzoo import ops

__all__ = [
    "DEFAULT_MIN_BIN_HEIGHT",
    "DEFAULT_MIN_BIN_WIDTH",
    "DEFAULT_MIN_DERIVATIVE",
    "InputOutsideDomain",
    "rational_quadratic_spline",
    "unconstrained_rational_quadratic_spline",
]

DEFAULT_MIN_BIN_WIDTH = 1e-3
DEFAULT_MIN_BIN_HEIGHT = 1e-3
DEFAULT_MIN_DERIVATIVE = 1e-3


class InputOutsideDomain(ValueError):
    """An input of a spline without tails lies outside of its interval."""


def unconstrained_rational_quadratic_spline(
    inputs: Tensor,
    unnormalized_widths: Tensor,
    unnormalized_heights: Tensor,
    unnormalized_derivatives: Tensor,
    inverse: bool = False,
    tails: str = "linear",
    tail_bound: float = 1.0,
    min_bin_width: float = DEFAULT_MIN_BIN_WIDTH,
    min_bin_height: float = DEFAULT_MIN_BIN_HEIGHT,
    min_derivative: float = DEFAULT_MIN_DERIVATIVE,
) -> tuple[Tensor, Tensor]:
    """``nflows.transforms.splines.unconstrained_rational_quadratic_spline``: the identity outside
    of ``[-tail_bound, tail_bound]``; of ``[..., K]`` widths and heights and ``[..., K - 1]``
    derivatives."""
    if tails != "linear":
        raise RuntimeError(f"{tails} tails are not implemented.")
    return _spline(
        inputs,
        unnormalized_widths,
        unnormalized_heights,
        unnormalized_derivatives,
        inverse,
        "linear",
        (-tail_bound, tail_bound, -tail_bound, tail_bound),
        min_bin_width,
        min_bin_height,
        min_derivative,
    )


def rational_quadratic_spline(
    inputs: Tensor,
    unnormalized_widths: Tensor,
    unnormalized_heights: Tensor,
    unnormalized_derivatives: Tensor,
    inverse: bool = False,
    left: float = 0.0,
    right: float = 1.0,
    bottom: float = 0.0,
    top: float = 1.0,
    min_bin_width: float = DEFAULT_MIN_BIN_WIDTH,
    min_bin_height: float = DEFAULT_MIN_BIN_HEIGHT,
    min_derivative: float = DEFAULT_MIN_DERIVATIVE,
) -> tuple[Tensor, Tensor]:
    """``nflows.transforms.splines.rational_quadratic_spline``: from ``[left, right]`` onto
    ``[bottom, top]``; of ``[..., K]`` widths and heights and ``[..., K + 1]`` derivatives."""
    low, high = (bottom, top) if inverse else (left, right)
    if inputs.numel() > 0 and not torch.compiler.is_compiling():
        least, greatest = torch.aminmax(inputs.detach())
        if bool((least < low) | (greatest > high)):
            raise InputOutsideDomain(f"inputs: expected in [{low}, {high}]")
    return _spline(
        inputs,
        unnormalized_widths,
        unnormalized_heights,
        unnormalized_derivatives,
        inverse,
        None,
        (left, right, bottom, top),
        min_bin_width,
        min_bin_height,
        min_derivative,
    )


def _spline(
    inputs: Tensor,
    widths: Tensor,
    heights: Tensor,
    derivatives: Tensor,
    inverse: bool,
    tails: str | None,
    domain: tuple[float, float, float, float],
    min_bin_width: float,
    min_bin_height: float,
    min_derivative: float,
) -> tuple[Tensor, Tensor]:
    # A single number is a sample of one.
    x = inputs.reshape(inputs.shape or (1,))
    outputs, logabsdet = ops.rational_quadratic_spline(
        x,
        widths,
        heights,
        derivatives,
        domain=domain,
        tails=tails,
        inverse=inverse,
        convention="nflows",
        sum_logdet=False,
        min_bin_width=min_bin_width,
        min_bin_height=min_bin_height,
        min_derivative=min_derivative,
    )
    return outputs.view(inputs.shape), logabsdet.view(inputs.shape)
