"""zuko: its transformations, made anew in every call as its flows do; its flows, eager and through
torch.compile; the inverse of an autoregressive map, a pass of the network for each feature."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.implementation import Implementation, Loss, Unavailable, require
from benchmarks.workloads import BINS, SLOPE, adopt
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
    transforms = require("zuko.transforms")
    if convention != "zuko":
        raise Unavailable("the case is of nflows' convention")

    def call() -> tuple[Tensor, Tensor]:
        spline = transforms.MonotonicRQSTransform(widths, heights, derivatives)
        y, logs = (spline.inv if inverse else spline).call_and_ladj(x)
        return y, logs.sum(1)

    wanted = leaves((x, widths, heights, derivatives))
    return Loss(call, wanted) if wanted else call


def _flow(x: Tensor, parameters: Sequence[Tensor], kind: str, **options: Any) -> Any:
    flows = require("zuko.flows")
    hidden = len(parameters[0]), len(parameters[2])
    layers = len(parameters) // 6
    return adopt(
        getattr(flows, kind)(x.shape[1], transforms=layers, hidden_features=hidden, **options),
        parameters,
    )


def _spline_flow(
    compiler: dict[str, Any] | None, x: Tensor, *parameters: Tensor, passes: int
) -> Loss:
    flow = _flow(x, parameters, "NSF", bins=BINS, slope=SLOPE, passes=passes)

    def call() -> Tensor:
        found: Tensor = -flow().log_prob(x).mean()
        return found

    if compiler is None:
        return Loss(call, parameters)
    # So that the profiler, which counts operators, sees its kernels.
    options = {"cpp.enable_kernel_profile": True, **compiler}
    return Loss(torch.compile(call, dynamic=False, options=options), parameters)


def _maf_inverse(z: Tensor, *parameters: Tensor) -> Callable[[], Any]:
    flow = _flow(z, parameters, "MAF")

    def call() -> Any:
        with torch.no_grad():
            return flow().transform.inv.call_and_ladj(z)

    return call


PEER = Implementation(
    "zuko",
    {
        "rational_quadratic_spline": _spline,
        "SplineFlow": functools.partial(_spline_flow, None),
        "MAF": _maf_inverse,
    },
)
COMPILED = Implementation(
    "zuko compiled",
    {"SplineFlow": functools.partial(_spline_flow, {})},
    note="its flow's log_prob through torch.compile",
)
SCALAR = Implementation(
    "zuko compiled, scalar",
    {"SplineFlow": functools.partial(_spline_flow, {"cpp.simdlen": 1})},
    note="the same without vectors, with which torch 2.13 gives wrong gradients on a CPU",
)
