"""The rows: every benchmark case of an operator x every implementation of it."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks import dispatched
from benchmarks.expected import compare, expected, expected_loss
from benchmarks.implementation import Implementation, Loss, Other, Unavailable, first_line
from benchmarks.peers import PEERS
from benchmarks.workload import Workload, prepared
from benchmarks.workloads import MEASURED
from fastzoo import _native
from fastzoo.ops._operator import OPERATORS
from fastzoo.testing import BenchmarkCase, OpSpec
from fastzoo.testing.losses import deviation, leaves, loss_and_gradients, with_gradients
from fastzoo.testing.timing import measure_together, peak_memory

# Below this share of right answers a peer computes something else, and its time means nothing.
_LEAST_SHARE = 0.99


# Products in float32 alone, where a CPU also has them in bfloat16.
_WITHOUT_BFLOAT16 = "avx512"


def _fastzoo(spec: OpSpec | Workload, backend: str, *args: Any, **kwargs: Any) -> Any:
    reason = OPERATORS[spec.operator].refusal(backend, args[0].device.type)
    if reason is not None:
        raise Unavailable(reason)
    call = prepared(spec, backend, *args, **kwargs)
    wanted = leaves(args)
    return Loss(call, wanted) if wanted else call


def _in_float32(spec: OpSpec | Workload, *args: Any, **kwargs: Any) -> Callable[[], Any]:
    if _native.cpu_capability() != "avx512_bf16":
        raise Unavailable("the default is the same: this CPU has no products in bfloat16")
    call = prepared(spec, "cpu", *args, **kwargs)

    def forced() -> Any:
        _native.force_cpu_capability(_WITHOUT_BFLOAT16)
        try:
            return call()
        finally:
            _native.force_cpu_capability(None)

    return forced


def implementations(op: str, device: str) -> list[Implementation]:
    """fastzoo's backends for a device, then the peers that have the operator."""
    spec = MEASURED[op]
    operator = OPERATORS[spec.operator]
    owner = operator.owner(device)
    own = [
        Implementation(
            f"fastzoo {backend}",
            {op: functools.partial(_fastzoo, spec, backend)},
            kind="auto" if backend == owner else "backend",
        )
        for backend in operator.has
        if backend == device or (backend == "triton" and device == "cuda")
    ]
    if (op, device) == ("vq_nearest", "cpu"):
        own.append(
            Implementation(
                f"fastzoo cpu {_WITHOUT_BFLOAT16}",
                {op: functools.partial(_in_float32, spec)},
                kind="backend",
                note="its kernels on a CPU without products in bfloat16",
            )
        )
    return own + [peer for peer in PEERS if op in peer.operators]


@dataclasses.dataclass(frozen=True)
class Problem:
    """One case on a device; its inputs and the right answer are made once for all its rows."""

    spec: OpSpec | Workload
    case: BenchmarkCase
    shape: dict[str, int]
    device: str

    @functools.cached_property
    def args(self) -> tuple[Any, ...]:
        return with_gradients(self.case.make(self.device, **self.shape), self.case.gradients)

    @functools.cached_property
    def right(self) -> Any:
        if self.case.gradients:
            seeds = self.case.seeds(*self.args)
            return expected_loss(self.spec.name, *self.args, seeds=seeds, **self.case.kwargs)
        return expected(self.spec.name, *self.args, **self.case.kwargs)

    @property
    def gradient_bytes(self) -> int:
        """What the gradients take, which no implementation can do without."""
        return sum(leaf.numel() * leaf.element_size() for leaf in leaves(self.args))

    def release(self) -> None:
        """Forget the inputs and the answer: all cases together would not fit into memory."""
        vars(self).pop("args", None)
        vars(self).pop("right", None)

    @property
    def name(self) -> str:
        if self.shape == self.case.shape:
            return self.case.name
        return ", ".join(f"{key} = {value}" for key, value in self.shape.items())


def _results(answer: Any) -> tuple[Tensor, ...]:
    return tuple(t.cpu() for t in (answer if isinstance(answer, tuple) else (answer,)))


@dataclasses.dataclass(frozen=True)
class Row:
    problem: Problem
    implementation: Implementation

    def __str__(self) -> str:
        return f"{self.problem.name}: {self.implementation.name}"

    def _prepare(self) -> Any:
        problem = self.problem
        prepare = self.implementation.operators[problem.spec.name]
        return prepare(*problem.args, **problem.case.kwargs)

    def _of_loss(self, loss: Loss) -> Callable[[], tuple[Tensor, ...]]:
        case, spec = self.problem.case, self.problem.spec
        autocast = case.autocast if loss.autocast else None
        call = loss_and_gradients(
            loss.forward, loss.inputs, autocast, case.seeds(*self.problem.args)
        )
        if isinstance(spec, OpSpec) or spec.optimizer is None:
            return call
        optimize = spec.optimizer(loss.inputs)

        def step() -> tuple[Tensor, ...]:
            found = call()
            optimize(found[-len(loss.inputs) :])
            return found

        return step

    def call(self) -> Callable[[], Any]:
        """The call, unchecked.

        Raises:
            Unavailable: it cannot run here.
        """
        prepared = self._prepare()
        if isinstance(prepared, Other):
            return prepared.call
        return self._of_loss(prepared) if isinstance(prepared, Loss) else prepared

    def checked_call(self) -> tuple[Callable[[], Any], dict[str, float]]:
        """The call to time, and how right it is: ``equal``, its share of right answers, and of a
        loss, or where the case allows some, ``deviation``, its and its gradients' largest relative
        error. Of a step with an optimizer also ``operators``, how many it dispatches.

        Raises:
            Unavailable: it cannot run here.
            AssertionError: its answer is wrong.
        """
        prepared = self._prepare()
        if isinstance(prepared, Loss):
            call = self._of_loss(prepared)
            found = {"equal": 1.0, "deviation": self._checked_deviation(prepared, call())}
            if isinstance(self.problem.spec, Workload) and self.problem.spec.optimizer:
                call()  # which allocates what an optimizer keeps
                found["operators"] = dispatched.count(call)
            return call, found
        problem = self.problem
        allowed = problem.case.tolerance(*problem.args, **problem.case.kwargs)
        right = problem.right
        if isinstance(prepared, Other):
            right = expected(problem.spec.name, *problem.args, **prepared.kwargs)
            prepared = prepared.call
        if allowed:
            off = deviation(_results(prepared()), _results(right))
            self._require(off, allowed)
            return prepared, {"equal": 1.0, "deviation": off}
        exact, share = compare(
            problem.spec.name, prepared(), right, problem.args, problem.case.kwargs
        )
        passed = share >= _LEAST_SHARE if self.implementation.kind == "peer" else exact
        if not passed:
            raise AssertionError(f"wrong answer: {share:.2%} of it is right")
        return prepared, {"equal": share}

    def _checked_deviation(self, loss: Loss, answer: tuple[Tensor, ...]) -> float:
        problem = self.problem
        right = problem.right
        if loss.answers is not None:
            args, kwargs = loss.answers
            right = expected_loss(problem.spec.name, *args, **kwargs)
        value, *gradients = answer
        off = deviation((value, *loss.arranged(tuple(gradients))), right)
        self._require(off, problem.case.tolerance(*problem.args, **problem.case.kwargs))
        return off

    def _require(self, off: float, allowed: float) -> None:
        if not off <= allowed:
            raise AssertionError(f"wrong answer: off by {off:.1e}, {allowed:.1e} is allowed")

    def extra_bytes(self, peak: int) -> int:
        """Of the memory at a call's peak, what is not its gradients."""
        return max(0, peak - self.problem.gradient_bytes)

    def rates(self, seconds: float) -> dict[str, float]:
        case, args = self.problem.case, self.problem.args
        return {
            "gflops": case.flops(*args, **case.kwargs) / seconds / 1e9,
            "gbps": case.bytes(*args, **case.kwargs) / seconds / 1e9,
        }


def select(
    op: str | None = None,
    *,
    device: str,
    case: str = "",
    shape: dict[str, int] | None = None,
    peers: Iterable[str] | None = None,
) -> list[Row]:
    """Rows whose case contains ``case``; ``shape`` replaces the sizes of the first that has them.

    ``peers`` keeps only the peers of these names.
    """
    if op is not None and op not in MEASURED:
        raise ValueError(f"unknown operator {op!r}, expected one of {', '.join(MEASURED)}")
    unknown = set(peers or ()) - {peer.name for peer in PEERS}
    if unknown:
        known = ", ".join(peer.name for peer in PEERS)
        raise ValueError(f"unknown peer {min(unknown)!r}, expected some of {known}")
    return [
        Row(problem, implementation)
        for spec in MEASURED.values()
        if op in (None, spec.name)
        for problem in _problems(spec, device, case, shape)
        for implementation in implementations(spec.name, device)
        if implementation.kind != "peer" or peers is None or implementation.name in peers
        if implementation.autocast in (None, problem.case.autocast is not None)
    ]


def _problems(
    spec: OpSpec | Workload, device: str, case: str, shape: dict[str, int] | None
) -> Iterator[Problem]:
    for known in spec.benchmarks:
        if (
            device not in known.devices
            or case not in known.name
            or (shape and set(shape) != set(known.shape))
        ):
            continue
        kwargs = {
            name: value.to(device) if isinstance(value, Tensor) else value
            for name, value in known.kwargs.items()
        }
        yield Problem(spec, dataclasses.replace(known, kwargs=kwargs), shape or known.shape, device)
        if shape:
            return


def measure_row(row: Row, *, budget: float = 1.0) -> dict[str, Any]:
    """The record of a row: a time, or ``reason`` (it cannot run) or ``error`` (it is wrong)."""
    return measure_case([row], budget=budget)[0]


def measure_case(rows: list[Row], *, budget: float = 1.0) -> list[dict[str, Any]]:
    """The records of rows of one case: all are checked, then timed turn by turn."""
    checked = [_check(row) for row in rows]
    calls = [record.pop("call") for record in checked if "call" in record]
    timings = iter(measure_together(calls, rows[0].problem.device, budget=budget))
    del calls
    for row, record in zip(rows, checked, strict=True):
        if "equal" in record:
            timing = next(timings)
            record.update(
                seconds=timing.median,
                minimum=timing.minimum,
                repeats=timing.repeats,
                peak_bytes=row.extra_bytes(timing.peak_bytes),
                **row.rates(timing.median),
            )
    rows[0].problem.release()
    return checked


def _check(row: Row) -> dict[str, Any]:
    record: dict[str, Any] = {
        "op": row.problem.spec.name,
        "case": row.problem.name,
        "implementation": row.implementation.name,
        "kind": row.implementation.kind,
    }
    if row.implementation.note:
        record["note"] = row.implementation.note
    try:
        call, how_right = row.checked_call()
    except Unavailable as reason:
        return {**record, "reason": str(reason)}
    except AssertionError as wrong:
        return {**record, "error": str(wrong)}
    except Exception as failure:  # a report goes on past any failure
        return {**record, "error": first_line(failure)}
    return {**record, **how_right, "call": call}


# The problem whose inputs and answer are in memory; pytest keeps all rows to the end.
_held: list[Problem] = []


def run_in_pytest(row: Row, benchmark: Any) -> None:
    """Time a row with pytest-benchmark."""
    import pytest

    if _held and _held[0] is not row.problem:
        _held.pop().release()
    _held[:] = [row.problem]
    try:
        call, how_right = row.checked_call()
    except Unavailable as reason:
        pytest.skip(str(reason))
    benchmark.group = f"{row.problem.spec.name}: {row.problem.name}"
    benchmark(_synchronised(call) if row.problem.device == "cuda" else call)
    benchmark.extra_info.update(how_right)
    peak = row.extra_bytes(peak_memory(call, row.problem.device))
    benchmark.extra_info["peak_bytes"] = peak
    benchmark.extra_info["threads"] = torch.get_num_threads()
    if benchmark.stats:
        benchmark.extra_info.update(row.rates(benchmark.stats.stats.median))


def _synchronised(call: Callable[[], Any]) -> Callable[[], None]:
    def synchronised() -> None:
        call()
        torch.cuda.synchronize()

    return synchronised
