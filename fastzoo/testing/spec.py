"""What the conformance suite and the benchmarks need to know of an operator."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Sample:
    """One valid call of a public function."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Invalid:
    """One call that must raise, and what its message must name."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    error: type[Exception]
    match: str


@dataclasses.dataclass(frozen=True)
class BenchmarkCase:
    """One row of the benchmarks.

    Args:
        name: as it appears in the tables.
        shape: the numbers that ``selftest --shape`` replaces, by name.
        make: ``make(device, **shape)`` -> the arguments of the call.
        kwargs: its keyword arguments.
        flops, bytes: of the arguments, the least any implementation must do and move.
        gradients: positions of the arguments whose gradients belong to the call, which then goes
            forward and backward; none where the answer is made of integers.
        seeds: of the arguments, what the backward starts from; see
            :func:`fastzoo.testing.losses.loss_and_gradients`.
        tolerance: of the arguments, the relative error allowed of a loss and its gradients; see
            :func:`fastzoo.testing.losses.deviation`.
        autocast: the dtype of torch.autocast around the forward.
        devices: where the case is measured.
    """

    name: str
    shape: dict[str, int]
    make: Callable[..., tuple[Any, ...]]
    kwargs: dict[str, Any]
    flops: Callable[..., float]
    bytes: Callable[..., float]
    gradients: tuple[int, ...] = ()
    seeds: Callable[..., tuple[Tensor | None, ...]] = lambda *args: (None,)
    tolerance: Callable[..., float] = lambda *args, **kwargs: 0.0
    autocast: torch.dtype | None = None
    devices: tuple[str, ...] = ("cpu", "cuda")


@dataclasses.dataclass(frozen=True)
class OpSpec:
    """One public function of fastzoo.ops.

    Args:
        name: of the function.
        operator: the dispatcher operator that does its work; by default of the function's name.
        function: the public function.
        definition: the oracle, same arguments as ``function`` less ``backend``. It is called on
            CPU tensors, and decides in float64 where the operator does.
        eager: the formula as one writes it in PyTorch, for benchmarks; it takes the positional
            arguments alone.
        samples: ``samples(dtype)`` -> valid calls on CPU tensors, every edge of the family.
        invalid: calls that must raise.
        dtypes: that the operator takes.
        whole: positions of the tensors whose first dimension is no batch, which a check of other
            batch sizes leaves as they are.
        fixed_shape: the output's shape does not depend on the values, and no call waits for the
            device.
        differentiable: the floating result that has gradients, given the output, or None.
        gradient_sample: ``gradient_sample(dtype)`` -> a call where the result is smooth around
            its arguments, with ``differentiable`` results on.
        dispatch_args: the arguments of the dispatcher operator for a sample.
        tolerance: ``tolerance(args, kwargs)`` -> absolute error allowed of each floating output,
            or a tuple of one each, derived beside its definition.
        autocast_tolerance: as ``tolerance``, of an operator whose products run in the autocast
            dtype; None where it computes in float32 as if its arguments were cast by hand.
        gradient_rtol: ``gradient_rtol(dtype, *args, **kwargs)`` -> relative error of gradients
            beyond that of sums over the arguments' elements.
        cancellation: ``cancellation(args, kwargs)`` -> the size of terms that cancel in a
            gradient, on which its rounding errors are relative.
        held_constant: a part of the result has no gradient by definition, so that gradients are
            compared with the definition's, and not with finite differences.
        benchmarks: rows.
        eager_bytes: of the positional arguments, the memory that ``eager`` needs at its peak, with
            its gradients; 0 where it is not worth a thought.
    """

    name: str
    function: Callable[..., Any]
    definition: Callable[..., Any]
    eager: Callable[..., Any]
    samples: Callable[[torch.dtype], Iterable[Sample]]
    invalid: Callable[[], Iterable[Invalid]]
    dispatch_args: Callable[..., tuple[Any, ...]]
    benchmarks: tuple[BenchmarkCase, ...]
    dtypes: tuple[torch.dtype, ...] = (
        torch.float32,
        torch.float64,
        torch.float16,
        torch.bfloat16,
    )
    whole: tuple[int, ...] = ()
    fixed_shape: bool = False
    differentiable: Callable[[Any], Tensor] | None = None
    gradient_sample: Callable[[torch.dtype], Sample] | None = None
    tolerance: Callable[..., Tensor | tuple[Tensor, ...]] | None = None
    autocast_tolerance: Callable[..., Tensor] | None = None
    gradient_rtol: Callable[..., float] | None = None
    cancellation: Callable[..., float] | None = None
    held_constant: bool = False
    operator: str = ""
    eager_bytes: Callable[..., float] = lambda *args: 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "operator", self.operator or self.name)
