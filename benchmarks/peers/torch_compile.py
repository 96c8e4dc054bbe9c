"""The eager formula through torch.compile."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.implementation import Implementation, Unavailable, first_line
from fastzoo.testing import SPECS


def _vq_nearest(x: Tensor, codebook: Tensor) -> Callable[[], Tensor]:
    compiled = torch.compile(SPECS["vq_nearest"].eager, dynamic=False)
    try:
        compiled(x, codebook)
    except Exception as error:  # whatever a missing compiler raises
        raise Unavailable(f"it does not compile ({first_line(error)})") from error
    return functools.partial(compiled, x, codebook)


def _nms(*_: Any) -> Callable[[], Tensor]:
    raise Unavailable("the greedy pass branches on its data: a graph break for every box")


PEER = Implementation("torch.compile", {"vq_nearest": _vq_nearest, "nms": _nms})
