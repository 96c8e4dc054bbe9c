"""What the public function adds to the native operator, and fastzoo's import to torch's."""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from fastzoo.ops._operator import OPERATORS
from fastzoo.testing import OpSpec

_CALLS = 1000
_ROUNDS = 15
_ROUND_SECONDS = 0.05
# Larger ones hide what a call costs.
_LARGEST_SIZE = 16


def _per_call(call: Callable[[], object], device: str, count: int) -> float:
    started = time.perf_counter()
    for _ in range(count):
        call()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / count


def call_overhead(spec: OpSpec, device: str) -> dict[str, Any]:
    """Seconds of a call on the first case with small sizes, through the public function and without
    it.

    Of a loss, the operator alone is its scores over all classes or pairs; the function adds what
    is made of them for each row.
    """
    operator = OPERATORS[spec.operator]
    case = spec.benchmarks[0]
    shape = {name: min(size, _LARGEST_SIZE) for name, size in case.shape.items()}
    args = case.make(device, **shape)
    native = operator.overloads[operator.owner(device)]
    dispatched = spec.dispatch_args(*args, **case.kwargs)

    def public() -> object:
        return spec.function(*args, **case.kwargs)

    def bare() -> object:
        return native(*dispatched)

    _per_call(public, device, 2)
    count = max(1, min(_CALLS, int(_ROUND_SECONDS / _per_call(public, device, 2))))
    # Turn by turn, so that a busy machine slows both; the fastest of each.
    pairs = [
        (_per_call(public, device, count), _per_call(bare, device, count)) for _ in range(_ROUNDS)
    ]
    return {
        "op": spec.name,
        "case": ", ".join(f"{name} = {size}" for name, size in shape.items()),
        "public": min(pair[0] for pair in pairs),
        "bare": min(pair[1] for pair in pairs),
    }


def import_seconds(repeats: int = 5) -> float:
    """What ``import fastzoo`` takes in a process that has imported torch."""
    program = (
        "import time, torch; started = time.perf_counter(); import fastzoo; "
        "print(time.perf_counter() - started)"
    )
    command = [sys.executable, "-c", program]
    return statistics.median(
        float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        for _ in range(repeats)
    )
