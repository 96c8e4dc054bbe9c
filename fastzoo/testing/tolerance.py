"""Tolerances, derived from the arithmetic rather than tuned to pass."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastzoo.reference.precision import compute_dtype


def unit_roundoff(dtype: torch.dtype) -> float:
    """The largest relative error of rounding to ``dtype``: 2^-24 for float32."""
    return torch.finfo(dtype).eps / 2


def outputs_of(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def assert_same_outputs(
    actual: Any,
    expected: Any,
    *,
    tolerance: Callable[[], Tensor | tuple[Tensor, ...]] | None = None,
    context: str = "",
) -> None:
    """Integer outputs equal bit for bit; floating ones within ``tolerance()`` of the oracle.

    NaN and infinities must stand in the same places. The tolerance is absolute, of the shape of
    the output or broadcastable to it; one of each output, where they differ.
    """
    actual, expected = outputs_of(actual), outputs_of(expected)
    assert len(actual) == len(expected), f"{context}: {len(actual)} outputs for {len(expected)}"
    for position, (a, e) in enumerate(zip(actual, expected, strict=True)):
        where = f"{context}: output {position}"
        assert a.dtype == e.dtype, f"{where}: dtype {a.dtype}, expected {e.dtype}"
        assert a.shape == e.shape, f"{where}: shape {list(a.shape)}, expected {list(e.shape)}"
        a, e = a.detach().cpu(), e.detach().cpu()
        if not a.is_floating_point():
            if not torch.equal(a, e):
                wrong = (a != e).nonzero().flatten()
                raise AssertionError(
                    f"{where}: {len(wrong)} of {a.numel()} differ, first at {wrong[:4].tolist()}"
                )
            continue
        assert torch.equal(a.isnan(), e.isnan()), f"{where}: NaN in other places"
        assert torch.equal(a.isinf(), e.isinf()), f"{where}: infinities in other places"
        finite = e.isfinite()
        assert torch.equal(a[e.isinf()], e[e.isinf()]), f"{where}: infinities of another sign"
        bounds = tolerance() if tolerance else torch.zeros(())
        allowed = (bounds[position] if isinstance(bounds, tuple) else bounds).double().cpu()
        error = (a.double() - e.double()).abs()
        excess = torch.where(finite, error - allowed, -torch.inf)
        if excess.numel() and excess.max() > 0:
            at = int(excess.argmax())
            raise AssertionError(
                f"{where}: {a.flatten()[at].item()!r} for {e.flatten()[at].item()!r}, error "
                f"{error.flatten()[at].item():.3e} above the tolerance"
            )


def in_double(function: Callable[..., Any]) -> Callable[..., Tensor]:
    """A reference in float64, its result in the operator's dtype."""

    def definition(first: Tensor, second: Tensor, *rest: Any, **kwargs: Any) -> Tensor:
        wide = {
            name: value.double()
            if isinstance(value, Tensor) and value.is_floating_point()
            else value
            for name, value in kwargs.items()
        }
        result: Tensor = function(first.double(), second.double(), *rest, **wide)
        return result.to(compute_dtype(first))

    return definition
