"""torchvision's CPU algorithm, a scalar greedy loop, compiled here for the baseline CPU."""

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.implementation import Implementation, Unavailable, first_line, require_cpu

_SOURCE = Path(__file__).with_suffix(".cpp")
_BUILD = Path(__file__).parents[2] / "build" / "benchmarks"


@functools.cache
def _compiled() -> Any:
    from torch.utils import cpp_extension

    _BUILD.mkdir(parents=True, exist_ok=True)
    path = os.environ.get("PATH", "")
    try:
        # ninja stands beside the interpreter, which may have been called by its path.
        os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), path])
        cpp_extension.load(
            _SOURCE.stem,
            [str(_SOURCE)],
            extra_cflags=["-O3"],
            build_directory=str(_BUILD),
            is_python_module=False,
        )
    except (ImportError, OSError, RuntimeError) as error:
        raise Unavailable(f"it cannot be compiled ({first_line(error)})") from error
    finally:
        os.environ["PATH"] = path
    return torch.ops.fastzoo_peers.scalar_nms.default


def _nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Callable[[], Tensor]:
    require_cpu(boxes)
    return functools.partial(_compiled(), boxes, scores, iou_threshold)


PEER = Implementation("scalar loop", {"nms": _nms})
