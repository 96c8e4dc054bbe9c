"""The textbook loops of torchvision's, mmcv's and pytorch3d's CPU kernels, one pair of boxes or
points at a time, compiled here for the baseline CPU."""

import functools
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.implementation import (
    Implementation,
    Unavailable,
    first_line,
    require_cpu,
    require_few,
)

_SOURCE = Path(__file__).with_suffix(".cpp")
_BUILD = Path(__file__).parents[2] / "build" / "benchmarks"


@functools.cache
def compiled() -> Any:
    """``nms``, ``soft_nms``, ``nms_rotated`` and ``farthest_points``, as torch operators."""
    library = _BUILD / f"{_SOURCE.stem}-torch{torch.__version__}.so"
    if not library.exists() or library.stat().st_mtime < _SOURCE.stat().st_mtime:
        try:
            _compile(library)
        except OSError as error:
            raise Unavailable(f"there is no C++ compiler ({first_line(error)})") from error
        except subprocess.CalledProcessError as error:
            raise Unavailable(f"it does not compile: {error.stderr.strip()[:200]}") from error
    torch.ops.load_library(library)
    return torch.ops.fastzoo_peers


def _compile(library: Path) -> None:
    # Not cpp_extension.load: a run that was interrupted leaves a lock there, and the next waits.
    torch_folder = Path(torch.__file__).parent
    includes = (torch_folder / "include", torch_folder / "include/torch/csrc/api/include")
    library.parent.mkdir(parents=True, exist_ok=True)
    unfinished = library.with_suffix(f".{os.getpid()}")
    command = [
        os.environ.get("CXX", "c++"),
        *("-std=c++20", "-O3", "-shared", "-fPIC"),
        *(f"-isystem{folder}" for folder in includes),
        *(str(_SOURCE), "-o", str(unfinished)),
        *(f"-L{torch_folder / 'lib'}", "-lc10", "-ltorch_cpu"),
    ]
    subprocess.run(command, check=True, capture_output=True, text=True)
    unfinished.replace(library)


def _nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Callable[[], Tensor]:
    require_cpu(boxes)
    require_few(len(boxes))
    return functools.partial(compiled().nms.default, boxes, scores, iou_threshold)


def _soft_nms(
    boxes: Tensor,
    scores: Tensor,
    *,
    method: str = "linear",
    iou_threshold: float = 0.3,
    sigma: float = 0.5,
    score_threshold: float = 0.001,
) -> Callable[[], tuple[Tensor, Tensor]]:
    require_cpu(boxes)
    limits = iou_threshold, sigma, score_threshold
    return functools.partial(compiled().soft_nms.default, boxes, scores, method, *limits)


def _nms_rotated(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Callable[[], Tensor]:
    require_cpu(boxes)
    return functools.partial(compiled().nms_rotated.default, boxes, scores, iou_threshold)


def _sample_farthest_points(points: Tensor, _: None, k: int) -> Callable[[], Tensor]:
    require_cpu(points)
    return functools.partial(compiled().farthest_points.default, points, k)


PEER = Implementation(
    "scalar loop",
    {
        "nms": _nms,
        "soft_nms": _soft_nms,
        "nms_rotated": _nms_rotated,
        "sample_farthest_points": _sample_farthest_points,
    },
)
