"""Proves parity and speed of the installed build on the user's own machine and shapes."""

import datetime
import functools
import platform
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

import fastzoo
from fastzoo.ops._operator import OPERATORS
from fastzoo.testing.conformance import checks_on, runnable_backends
from fastzoo.testing.losses import deviation, leaves, loss_and_gradients, with_gradients
from fastzoo.testing.spec import BenchmarkCase, OpSpec
from fastzoo.testing.specs import SPECS
from fastzoo.testing.timing import measure_together, room


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def machine(device: str) -> dict[str, Any]:
    """What a measurement is worth nothing without."""
    return {
        "fastzoo": fastzoo.__version__,
        "torch": torch.__version__,
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "cpu_capability": fastzoo.info().cpu_capability,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":")[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def run_checks(specs: list[OpSpec], backend: str | None, device: str) -> Iterator[dict[str, Any]]:
    """One record a check, as it finishes."""
    for spec in specs:
        backends = [backend] if backend else runnable_backends(spec, device)
        for name in backends:
            reason = OPERATORS[spec.operator].refusal(name, device)
            if reason is not None:
                raise RuntimeError(f"{spec.name}: backend {name!r} cannot run: {reason}")
            for check_name, check in checks_on(device).items():
                started, error = time.perf_counter(), None
                try:
                    check(spec, name, device)
                except Exception as failure:  # a report goes on past any failure
                    error = f"{type(failure).__name__}: {failure}"
                yield {
                    "op": spec.name,
                    "backend": name,
                    "check": check_name,
                    "passed": error is None,
                    "error": error,
                    "seconds": round(time.perf_counter() - started, 3),
                }


def run_benchmarks(
    specs: list[OpSpec], backend: str | None, device: str, shape: dict[str, int]
) -> Iterator[dict[str, Any]]:
    """One record a case: fastzoo against the formula in eager PyTorch.

    A case whose answer differs from the definition's, a loss or a gradient by more than rounding
    explains, is reported so, without a time.
    """
    for spec in specs:
        for case in spec.benchmarks:
            if device not in case.devices or (shape and set(shape) != set(case.shape)):
                continue
            yield _benchmark(spec, case, backend, device, shape or case.shape)
            if shape:
                break


def _benchmark(
    spec: OpSpec, case: BenchmarkCase, backend: str | None, device: str, shape: dict[str, int]
) -> dict[str, Any]:
    args = with_gradients(case.make(device, **shape), case.gradients)

    def call(function: Callable[..., Any], **kwargs: Any) -> Callable[[], Any]:
        bound = functools.partial(function, *args, **kwargs)
        if not case.gradients:
            return bound
        return loss_and_gradients(bound, leaves(args), case.autocast)

    ours = call(spec.function, **case.kwargs, backend=backend)
    eager = call(spec.eager)
    name = case.name if shape == case.shape else "shape as asked"
    record: dict[str, Any] = {"op": spec.name, "case": name, "shape": shape}
    record["backend"] = backend or OPERATORS[spec.operator].owner(device)
    needed = spec.eager_bytes(*args)
    if needed > room(device):
        return {**record, "skipped": f"the eager formula needs {needed / 1e9:.1f} GB"}
    # The eager formula is not exact; the share of equal answers is shown, the definition decides.
    mine, theirs = ours(), eager()
    record["checked_against"] = "reference" if _small(args) else "eager"
    expected = theirs
    if _small(args):
        expected = call(spec.function, **case.kwargs, backend="reference")()
    if case.gradients:
        off = deviation(mine, expected)
        record["equal"] = off <= case.tolerance(*args, **case.kwargs)
    else:
        record["equal"] = bool(torch.equal(mine, expected))
    if not record["equal"] and (case.gradients or _small(args)):
        error = f"differs from the {record['checked_against']}: no time is given"
        return {**record, "error": error}
    times, baseline = measure_together([ours, eager], device)
    return {
        **record,
        "seconds": times.median,
        "peak_bytes": times.peak_bytes,
        "eager_seconds": baseline.median,
        "eager_peak_bytes": baseline.peak_bytes,
        "speedup": baseline.median / times.median,
    }


def _small(args: tuple[Any, ...]) -> bool:
    """Whether the reference answers in seconds."""
    sizes = [a for a in args if isinstance(a, torch.Tensor)]
    work = sizes[0].numel() * sizes[1].shape[0]
    return work <= 1 << 28


def select(op: str | None) -> list[OpSpec]:
    if op is None:
        return list(SPECS.values())
    if op not in SPECS:
        raise ValueError(f"unknown operator {op!r}, expected one of {', '.join(SPECS)}")
    return [SPECS[op]]
