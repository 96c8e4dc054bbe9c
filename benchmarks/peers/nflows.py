"""nflows' rational-quadratic spline, summed over a sample as its transforms do."""

from typing import Any

from torch import Tensor

from benchmarks.implementation import Implementation, Loss, Unavailable, require
from benchmarks.workloads import BOUND
from fastzoo.testing.losses import leaves


def _spline(
    x: Tensor,
    widths: Tensor,
    heights: Tensor,
    derivatives: Tensor,
    *,
    convention: str = "nflows",
    inverse: bool = False,
) -> Any:
    splines = require("nflows.transforms.splines")
    if convention != "nflows":
        raise Unavailable("the case is of zuko's convention")

    def call() -> tuple[Tensor, Tensor]:
        y, logs = splines.unconstrained_rational_quadratic_spline(
            x, widths, heights, derivatives, inverse=inverse, tail_bound=BOUND
        )
        return y, logs.sum(1)

    wanted = leaves((x, widths, heights, derivatives))
    return Loss(call, wanted) if wanted else call


PEER = Implementation("nflows", {"rational_quadratic_spline": _spline})
