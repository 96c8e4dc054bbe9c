"""Flows of masked-autoregressive maps, ready to train."""

from typing import Any

import torch

from fastzoo.nn.flows.autoregressive import MaskedAutoregressive
from fastzoo.nn.flows.base import StandardNormal
from fastzoo.nn.flows.flow import Flow


class MAF(Flow):
    """A masked autoregressive flow of rows ``[B, features]``, in zuko's arguments.

    Args:
        features: at least 2.
        context: width of the context.
        transforms: how many maps.
        randperm: a random order for each map; else forwards and backwards in turn.
        kwargs: of :class:`MaskedAutoregressive`.

    Source: Papamakarios et al., Masked Autoregressive Flow for Density Estimation (2017).
    """

    def __init__(
        self,
        features: int,
        context: int = 0,
        transforms: int = 3,
        randperm: bool = False,
        **kwargs: Any,
    ) -> None:
        forwards = torch.arange(features)
        turns = (forwards, forwards.flip(0))
        super().__init__(
            [
                MaskedAutoregressive(
                    features,
                    context=context,
                    order=torch.randperm(features) if randperm else turns[number % 2],
                    **kwargs,
                )
                for number in range(transforms)
            ],
            StandardNormal((features,)),
        )


class NSF(MAF):
    """A neural spline flow: :class:`MAF` of rational-quadratic splines.

    Source: Durkan et al., Neural Spline Flows (2019).
    """

    def __init__(self, features: int, context: int = 0, bins: int = 8, **kwargs: Any) -> None:
        super().__init__(features, context, univariate="spline", bins=bins, **kwargs)
