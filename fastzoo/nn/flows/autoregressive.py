"""Masked autoregressive maps: the parameters of a feature come from the features before it."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from fastzoo import ops
from fastzoo.nn.flows.conditioner import Activation, MaskedMLP
from fastzoo.nn.flows.coupling import (
    Convention,
    ScaleMap,
    shift_and_scale,
    spline_identity,
    spline_parameters,
)
from fastzoo.nn.flows.transform import Transform
from fastzoo.ops._checks import check_choice, check_positive, check_tensor

Univariate = Literal["affine", "spline"]


class MaskedAutoregressive(Transform):
    """``z_d = f(x_d; parameters of x_{<d})``, with an affine map or a spline for f.

    Densities take one pass of a masked network; samples solve one feature after the other, in one
    operator that does the network's work once (:func:`fastzoo.ops.autoregressive_inverse`).

    Args:
        features: D, at least 2 unless there is a context.
        hidden_features, activation: of the network, :class:`MaskedMLP`.
        context: width of the context.
        univariate: ``affine``: ``scale x + shift``, of :func:`fastzoo.ops.affine_coupling`;
            ``spline``: of :func:`fastzoo.ops.rational_quadratic_spline` with linear tails.
        order: place of each feature in the order; None: as they come.
        passes: steps in which features are solved, as many at once as it takes; None: one a step.
            Two make a coupling.
        scale_map, min_scale: of affine maps.
        bins, convention: of splines.
        bound: of splines; of the affine maps ``tanh`` and ``atan``. None: 5 and 2.
        slope: of the affine map ``softclip`` and of splines, where ``nflows`` has it for each of
            its three minima.
        backend: of the operators.

    Starts as the identity where its maps can be it. The network's layers, masks and names are those
    of zuko's ``MaskedAutoregressiveTransform``: its ``hyper`` loads into ``conditioner``, with
    convention ``zuko`` for splines. ``Inverse`` of it is an inverse autoregressive flow.

    Source: Papamakarios et al., Masked Autoregressive Flow for Density Estimation (2017).
    """

    def __init__(
        self,
        features: int,
        hidden_features: Sequence[int] = (64, 64),
        *,
        context: int = 0,
        univariate: Univariate = "affine",
        order: Sequence[int] | Tensor | None = None,
        passes: int | None = None,
        activation: Activation = "relu",
        scale_map: ScaleMap = "softclip",
        min_scale: float = 0.0,
        bins: int = 8,
        convention: Convention = "nflows",
        bound: float | None = None,
        slope: float = 1e-3,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check_positive("features", features)
        check_choice("univariate", univariate, ("affine", "spline"))
        if features < 2 and not context:
            raise ValueError(f"features: expected at least 2 without a context, got {features}")
        places = list(range(features) if order is None else torch.as_tensor(order).tolist())
        if sorted(places) != list(range(features)):
            raise ValueError(f"order: expected 0 to {features - 1}, each once, got {places}")
        passes = features if passes is None else min(max(passes, 1), features)
        steps = [place // math.ceil(features / passes) for place in places]
        self.features = features
        self.univariate: Univariate = univariate
        self.scale_map: ScaleMap = scale_map
        self.min_scale = min_scale
        self.convention: Convention = convention
        self.slope = slope
        self.backend = backend
        self.bins = bins
        is_spline = univariate == "spline"
        self.bound = bound if bound is not None else 5.0 if is_spline else 2.0
        start = None
        if is_spline:
            start = spline_identity(bins, convention=convention, min_derivative=slope)
        self.conditioner = MaskedMLP(
            steps,
            self.parameters_each,
            hidden_features,
            context=context,
            activation=activation,
            start=start,
        )

    @property
    def parameters_each(self) -> int:
        """Parameters of a feature."""
        return spline_parameters(self.bins) if self.univariate == "spline" else 2

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._check(x, context)
        parameters = self.conditioner(x if context is None else torch.cat([x, context], -1))
        if self.univariate == "spline":
            return ops.rational_quadratic_spline(
                x,
                parameters.unflatten(1, (self.features, -1)),
                bound=self.bound,
                convention=self.convention,
                min_bin_width=self.slope,
                min_bin_height=self.slope,
                min_derivative=self.slope,
                slope=self.slope,
                backend=self.backend,
            )
        return ops.affine_coupling(
            x,
            *shift_and_scale(parameters, interleaved=True),
            scale_map=self.scale_map,
            bound=self.bound,
            slope=self.slope,
            min_scale=self.min_scale,
            backend=self.backend,
        )

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._check(z, context)
        conditioner = self.conditioner
        net, first = conditioner.by_steps(context)
        is_spline = self.univariate == "spline"
        x, logdet = ops.autoregressive_inverse(
            z.index_select(1, conditioner.order0),
            net,
            first,
            widths=conditioner.widths,
            starts=conditioner.starts,
            activation=conditioner.activation,
            map=self.convention if is_spline else self.scale_map,
            bins=self.bins,
            constant=self.slope if self.scale_map == "softclip" and not is_spline else self.bound,
            floor=self.slope if is_spline else self.min_scale,
            backend=self.backend,
        )
        return x.index_select(1, conditioner.order0.argsort()), logdet

    def _check(self, x: Tensor, context: Tensor | None) -> None:
        check_tensor("x", x, f"[B, {self.features}]", 2)
        if x.shape[1] != self.features:
            raise ValueError(f"x: expected {self.features} features, got {list(x.shape)}")
        width = self.conditioner.context
        have = 0 if context is None else context.shape[-1]
        if have != width:
            wanted = f"[B, {width}]" if width else "none"
            got = "none" if context is None else list(context.shape)
            raise ValueError(f"context: expected {wanted}, got {got}")

    def extra_repr(self) -> str:
        how = (
            f"bins={self.bins}" if self.univariate == "spline" else f"scale_map={self.scale_map!r}"
        )
        return f"{self.features}, {self.univariate}, {how}"
