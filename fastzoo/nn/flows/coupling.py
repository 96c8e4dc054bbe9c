"""Couplings: a part of the elements passes, and gives the parameters of a map of the rest."""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from fastzoo import ops
from fastzoo.nn.flows.transform import Transform

ScaleMap = Literal["exp", "sigmoid2", "tanh", "atan", "softplus", "softclip"]
Tails = Literal["linear", "circular"] | None
Convention = Literal["nflows", "zuko"]


class _Coupling(Transform):
    """What passes, and its conditioner.

    With ``split``, or a mask of features, the conditioner reads what passes and answers for the
    rest. That order, in which what passes comes first, is the mask's only cost.
    """

    order: Tensor | None
    mask: Tensor | None

    def __init__(self, conditioner: nn.Module, split: int | None, mask: Tensor | None) -> None:
        super().__init__()
        if (split is None) == (mask is None):
            raise ValueError("split, mask: expected one of them")
        if mask is not None and mask.dtype != torch.bool:
            raise TypeError(f"mask: expected bool, got {mask.dtype}")
        order = None
        if mask is not None and mask.dim() == 1:
            order = mask.logical_not().int().argsort(stable=True)
            split, mask = int(mask.sum()), None
        if split == 0:
            raise ValueError("split, mask: expected elements that pass, got none")
        self.conditioner = conditioner
        self.split = split
        self.register_buffer("order", order)
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._mapped(x, self._conditioned(x, context), inverse=False)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._mapped(z, self._conditioned(z, context), inverse=True)

    def _conditioned(self, x: Tensor, context: Tensor | None) -> Tensor:
        """The parameters, the same of what the map takes and of what it gives."""
        if self.mask is not None:
            given = torch.where(self.mask, x, 0)
        else:
            assert self.split is not None
            if self.order is not None:
                given = x.index_select(1, self.order[: self.split])
            else:
                given = x[:, : self.split] if self.split > 0 else x[:, self.split :]
        found: Tensor = (
            self.conditioner(given) if context is None else self.conditioner(given, context)
        )
        return found

    def _mapped(self, x: Tensor, parameters: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        if self.order is None:
            return self._map(x, parameters, inverse)
        y, logdet = self._map(x.index_select(1, self.order), parameters, inverse)
        return y.index_select(1, self.order.argsort()), logdet

    def _map(self, x: Tensor, parameters: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def extra_repr(self) -> str:
        return "mask" if self.split is None else f"split={self.split}"


class AdditiveCoupling(_Coupling):
    """``z = x + shift`` of the elements that do not pass, with shifts of those that do; volumes are
    kept.

    Args:
        conditioner: any module. Called with what passes, and with the context where there is one,
            it returns a shift for each of the rest.
        split: d: the first d features, or channels, pass; -d: the last d.
        mask: in place of split, bool: what passes. ``[n]``, of features or channels. With more
            dimensions, of all elements or broadcast to them, such as a checkerboard ``[1, H, W]``:
            then the conditioner reads all elements, the rest as 0, and answers for all.
        backend: of the operator.

    Source: Dinh et al., NICE (2015).
    """

    def __init__(
        self,
        conditioner: nn.Module,
        *,
        split: int | None = None,
        mask: Tensor | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__(conditioner, split, mask)
        self.backend = backend

    def _map(self, x: Tensor, parameters: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        return ops.additive_coupling(
            x, parameters, mask=self.mask, split=self.split, inverse=inverse, backend=self.backend
        )


class AffineCoupling(_Coupling):
    """``z = scale x + shift`` of the elements that do not pass.

    Args:
        conditioner: as :class:`AdditiveCoupling` has it; it returns shifts and raw scales.
        split, mask: as :class:`AdditiveCoupling` has them.
        scale_map: how a scale is made of a raw one, with ``bound``, ``slope`` and ``min_scale``:
            see :func:`fastzoo.ops.affine_coupling`. ``sigmoid2`` with ``shift_first`` is Glow's.
        shift_first: ``z = scale (x + shift)``.
        interleaved: shift and scale of an element side by side. Otherwise all shifts come before
            all scales. Either way they are read where the conditioner wrote them.
        backend: of the operator.

    Source: Dinh et al., Density estimation using Real NVP (2017).
    """

    def __init__(
        self,
        conditioner: nn.Module,
        *,
        split: int | None = None,
        mask: Tensor | None = None,
        scale_map: ScaleMap = "exp",
        bound: float = 2.0,
        slope: float = 1e-3,
        min_scale: float = 0.0,
        shift_first: bool = False,
        interleaved: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__(conditioner, split, mask)
        self.scale_map: ScaleMap = scale_map
        self.bound = bound
        self.slope = slope
        self.min_scale = min_scale
        self.shift_first = shift_first
        self.interleaved = interleaved
        self.backend = backend

    def _map(self, x: Tensor, parameters: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        shift, scale = shift_and_scale(parameters, self.interleaved)
        return ops.affine_coupling(
            x,
            shift,
            scale,
            scale_map=self.scale_map,
            mask=self.mask,
            split=self.split,
            bound=self.bound,
            slope=self.slope,
            min_scale=self.min_scale,
            shift_first=self.shift_first,
            inverse=inverse,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scale_map={self.scale_map!r}"


def shift_and_scale(parameters: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Views of what a conditioner gives."""
    if parameters.shape[1] % 2:
        raise ValueError(
            f"conditioner: expected a shift and a scale for each, got {list(parameters.shape)}"
        )
    if interleaved:
        return parameters[:, ::2], parameters[:, 1::2]
    half = parameters.shape[1] // 2
    return parameters[:, :half], parameters[:, half:]


class SplineCoupling(_Coupling):
    """A monotone rational-quadratic spline for each of the elements that do not pass.

    Args:
        conditioner: as :class:`AdditiveCoupling` has it; it returns the parameters of each spline
            side by side: widths, heights and derivatives, :func:`spline_parameters` of them.
        split, mask: as :class:`AdditiveCoupling` has them; masks are of features or channels.
        bins, bound, tails, convention: as :func:`fastzoo.ops.rational_quadratic_spline` has them.
        min_bin_width, min_bin_height, min_derivative: of the convention nflows.
        slope: of the convention zuko.
        backend: of the operator.

    Images are mapped with channels last, in which a convolution in ``torch.channels_last`` writes
    its splines' parameters side by side; what other formats write is copied once.

    Source: Durkan et al., Neural Spline Flows (2019).
    """

    def __init__(
        self,
        conditioner: nn.Module,
        *,
        split: int | None = None,
        mask: Tensor | None = None,
        bins: int = 8,
        bound: float = 5.0,
        tails: Tails = "linear",
        convention: Convention = "nflows",
        min_bin_width: float = 1e-3,
        min_bin_height: float = 1e-3,
        min_derivative: float = 1e-3,
        slope: float = 1e-3,
        backend: str | None = None,
    ) -> None:
        super().__init__(conditioner, split, mask)
        if self.mask is not None:
            raise ValueError(f"mask: expected one of features, [n], got {list(self.mask.shape)}")
        self.bins = bins
        self.bound = bound
        self.tails: Tails = tails
        self.convention: Convention = convention
        self.min_bin_width = min_bin_width
        self.min_bin_height = min_bin_height
        self.min_derivative = min_derivative
        self.slope = slope
        self.backend = backend

    def _map(self, x: Tensor, parameters: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        if x.dim() == 2:
            return self._spline(x, parameters, inverse)
        rows, places = x.movedim(1, -1), x.shape[2:].numel()
        y, logdet = self._spline(
            rows.flatten(0, -2), parameters.movedim(1, -1).flatten(0, -2), inverse
        )
        return y.view(rows.shape).movedim(-1, 1), logdet.view(-1, places).sum(1)

    def _spline(self, x: Tensor, parameters: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        each = spline_parameters(self.bins, self.tails)
        return ops.rational_quadratic_spline(
            x,
            parameters.unflatten(1, (-1, each)),
            bound=self.bound,
            tails=self.tails,
            inverse=inverse,
            convention=self.convention,
            split=self.split,
            min_bin_width=self.min_bin_width,
            min_bin_height=self.min_bin_height,
            min_derivative=self.min_derivative,
            slope=self.slope,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bins={self.bins}, bound={self.bound}"


def spline_parameters(bins: int, tails: Tails = "linear") -> int:
    """How many parameters a spline has: widths, heights and the derivatives that are free."""
    return 2 * bins + {"linear": bins - 1, "circular": bins, None: bins + 1}[tails]


def spline_identity(
    bins: int,
    tails: Tails = "linear",
    convention: Convention = "nflows",
    min_derivative: float = 1e-3,
) -> Tensor:
    """Parameters of the identity, at which a conditioner may start."""
    found = torch.zeros(spline_parameters(bins, tails))
    if convention == "nflows":
        found[2 * bins :] = math.log(math.expm1(1 - min_derivative))
    return found
