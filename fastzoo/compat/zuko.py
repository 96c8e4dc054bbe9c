"""zuko's univariate transformations (1.6) on fastzoo's operators, one kernel for a value and its
log-derivative.

Names, arguments and shapes are theirs, so that they take the place of zuko's in its flows, and load
the weights of these::

    from zuko.flows import MAF
    from fastzoo.compat.zuko import MonotonicRQSTransform

    flow = MAF(16, univariate=MonotonicRQSTransform, shapes=[(8,), (8,), (7,)])
    flow.load_state_dict(zuko.flows.NSF(16, bins=8).state_dict())

Parameters are read where they lie, as views of what a network gave, and their gradients are
computed without intermediates of knots or bins. The log-derivative of the last call, in either
direction, is kept with its arguments for whoever asks for it next; it depends on the parameters and
on what that call was given, and has no gradient to what the call returned.

Differences: a value on a knot belongs to the bin right of it, which changes nothing but rounding;
the inverse is finite wherever theirs takes the root of a negative discriminant.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Transform, constraints

from fastzoo import ops

__all__ = ["MonotonicAffineTransform", "MonotonicRQSTransform"]


class _Call:
    """x, y and ``log |dy/dx|`` of one call, in either direction."""

    def __init__(self, x: Tensor, y: Tensor, ladj: Tensor) -> None:
        self.x, self.y, self.ladj = x, y, ladj
        self._when = self._now()

    def _now(self) -> tuple[Any, ...]:
        """What changes if a tensor is written to, or if gradients begin to be wanted."""
        found: list[Any] = [torch.is_grad_enabled()]
        if not torch.compiler.is_compiling():
            found += [0 if t.is_inference() else t._version for t in (self.x, self.y)]
        return tuple(found)

    def is_of(self, x: Tensor, y: Tensor) -> bool:
        return x is self.x and y is self.y and self._when == self._now()


class _Univariate(Transform):
    """A monotone map of each element, with parameters of its own.

    Args:
        parameters: in the order in which the operator takes them.
        trailing: how many of their dimensions belong to one element.
    """

    domain = constraints.real
    codomain = constraints.real
    bijective = True
    sign = +1

    def __init__(self, trailing: int, parameters: tuple[Tensor, ...], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._trailing = trailing
        self._parameters = parameters
        self._last: _Call | None = None

    def _map(
        self, x: Tensor, parameters: tuple[Tensor, ...], inverse: bool
    ) -> tuple[Tensor, Tensor]:
        """The operator, elementwise."""
        raise NotImplementedError

    def _apply(self, given: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        """The other value, and the logarithm of its derivative by the given one."""
        shapes = [p.shape[: p.dim() - self._trailing] for p in self._parameters]
        shape = torch.broadcast_shapes(given.shape, *shapes)
        x = given if given.shape == shape else given.expand(shape)
        dtypes = {x.dtype, *(p.dtype for p in self._parameters)}
        parameters = self._parameters
        if len(dtypes) > 1:
            dtype = functools.reduce(torch.promote_types, dtypes)
            x, parameters = x.to(dtype), tuple(p.to(dtype) for p in parameters)
        if shape:
            return self._map(x, parameters, inverse)
        # An element alone is a sample of one.
        found, ladj = self._map(x[None], parameters, inverse)
        return found[0], ladj[0]

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """y and log |dy/dx| of each element."""
        return self._apply(x, False)

    def _call(self, x: Tensor) -> Tensor:
        y, ladj = self._apply(x, False)
        self._last = _Call(x, y, ladj)
        return y

    def _inverse(self, y: Tensor) -> Tensor:
        x, ladj = self._apply(y, True)
        self._last = _Call(x, y, -ladj)
        return x

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        if self._last is not None and self._last.is_of(x, y):
            return self._last.ladj
        return self._apply(x, False)[1]


class MonotonicAffineTransform(_Univariate):
    """``zuko.transforms.MonotonicAffineTransform``: ``y = exp(a) x + shift``, with ``a = scale /
    (1 + |scale / log slope|)``.

    Args:
        shift, scale: ``[...]``.
        slope: the least of the transformation, in (0, 1).
    """

    def __init__(self, shift: Tensor, scale: Tensor, slope: float = 1e-3, **kwargs: Any) -> None:
        super().__init__(0, (shift, scale), **kwargs)
        self._slope = slope

    def _map(
        self, x: Tensor, parameters: tuple[Tensor, ...], inverse: bool
    ) -> tuple[Tensor, Tensor]:
        return ops.affine_coupling(
            x,
            *parameters,
            scale_map="softclip",
            slope=self._slope,
            inverse=inverse,
            sum_logdet=False,
        )


class MonotonicRQSTransform(_Univariate):
    """``zuko.transforms.MonotonicRQSTransform``: a monotone rational-quadratic spline on
    ``[-bound, bound]``, the identity beyond.

    Args:
        widths, heights: unconstrained, ``[..., K]``.
        derivatives: unconstrained, at the knots inside, ``[..., K - 1]``.
        bound: half of the interval's length.
        slope: the least of the transformation, in (0, 1).
    """

    def __init__(
        self,
        widths: Tensor,
        heights: Tensor,
        derivatives: Tensor,
        bound: float = 5.0,
        slope: float = 1e-3,
        **kwargs: Any,
    ) -> None:
        super().__init__(1, (widths, heights, derivatives), **kwargs)
        self._bound, self._slope = bound, slope

    def __repr__(self) -> str:
        return f"{type(self).__name__}(bins={self.bins})"

    @property
    def bins(self) -> int:
        return self._parameters[0].shape[-1]

    def _map(
        self, x: Tensor, parameters: tuple[Tensor, ...], inverse: bool
    ) -> tuple[Tensor, Tensor]:
        return ops.rational_quadratic_spline(
            x,
            *parameters,
            bound=self._bound,
            slope=self._slope,
            convention="zuko",
            inverse=inverse,
            sum_logdet=False,
        )
