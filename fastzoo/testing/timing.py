"""Time and memory of one call, on the CPU and on a GPU."""

import contextlib
import ctypes
import dataclasses
import gc
import os
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

# Larger than any cache we time on, so that a call does not find its inputs in it.
_FLUSH_BYTES = 256 << 20
_TURNS = 10
_SLOW_REPEATS = 2
_CPU_MEMORY = 4e9


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds a call, and the memory it needs beyond its inputs at its peak."""

    median: float
    minimum: float
    repeats: int
    peak_bytes: int


def measure(call: Callable[[], object], device: str, *, budget: float = 1.0) -> Timing:
    """Time one call; see :func:`measure_together`."""
    return measure_together([call], device, budget=budget)[0]


def measure_together(
    calls: list[Callable[[], object]], device: str, *, budget: float = 1.0
) -> list[Timing]:
    """Time calls that are to be compared, turn by turn, so that a busy machine slows them all.

    Each is called until it has had ``budget`` seconds, at least 5 times after two warm-ups; one
    that alone exceeds the budget is timed twice. On a GPU device events time each call, with the
    L2 cache flushed between calls.
    """
    once = _time_cuda if device == "cuda" else _time_cpu
    times = [[once(call)] for call in calls]
    quick = [i for i, (first,) in enumerate(times) if first <= budget]
    spent = dict.fromkeys(quick, 0.0)
    for i in quick:
        once(calls[i])
        times[i].clear()
    while unfinished := [i for i in quick if spent[i] < budget or len(times[i]) < 5]:
        for i in unfinished:
            turn = time.perf_counter() + budget / _TURNS
            while True:
                started = time.perf_counter()
                times[i].append(once(calls[i]))
                spent[i] += time.perf_counter() - started
                if time.perf_counter() >= turn:
                    break
    slow = [i for i in range(len(calls)) if i not in quick]
    for _ in range(1, _SLOW_REPEATS):
        for i in slow:
            times[i].append(once(calls[i]))
    return [
        Timing(statistics.median(found), min(found), len(found), peak_memory(call, device))
        for call, found in zip(calls, times, strict=True)
    ]


def room(device: str) -> float:
    """Bytes that a call may take without swapping, or pushing other users off the machine."""
    return torch.cuda.mem_get_info()[0] / 2 if device == "cuda" else _CPU_MEMORY


def _time_cpu(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _time_cuda(call: Callable[[], object]) -> float:
    torch.empty(_FLUSH_BYTES, dtype=torch.int8, device="cuda").zero_()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def peak_memory(call: Callable[[], object], device: str) -> int:
    """Bytes allocated at the peak of a call beyond what was there before it.

    On the CPU this is the resident memory of the process, sampled every 0.2 ms: memory of any
    library counts, and calls shorter than a few samples show 0.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated() - before)
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return 0
    page = os.sysconf("SC_PAGE_SIZE")
    done = threading.Event()
    peak = 0

    def resident() -> int:
        return int(statm.read_text().split()[1]) * page

    def sample() -> None:
        nonlocal peak
        while not done.wait(0.0002):
            peak = max(peak, resident())

    # Memory that malloc keeps from earlier calls would hide this one's.
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
    before = resident()
    watcher = threading.Thread(target=sample)
    watcher.start()
    try:
        call()
    finally:
        done.set()
        watcher.join()
    return max(0, peak - before)
