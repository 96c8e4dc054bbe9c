"""torchvision's CPU algorithm, a scalar greedy loop, compiled here for the baseline CPU."""

import functools
import os
import subprocess
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
    library = _BUILD / f"{_SOURCE.stem}-torch{torch.__version__}.so"
    if not library.exists() or library.stat().st_mtime < _SOURCE.stat().st_mtime:
        try:
            _compile(library)
        except OSError as error:
            raise Unavailable(f"there is no C++ compiler ({first_line(error)})") from error
        except subprocess.CalledProcessError as error:
            raise Unavailable(f"it does not compile: {error.stderr.strip()[:200]}") from error
    torch.ops.load_library(library)
    return torch.ops.fastzoo_peers.scalar_nms.default


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
    return functools.partial(_compiled(), boxes, scores, iou_threshold)


PEER = Implementation("scalar loop", {"nms": _nms})
