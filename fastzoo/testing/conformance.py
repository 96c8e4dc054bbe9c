"""What every operator passes, on every backend it has, from one table of sample inputs.

Each check takes ``(spec, backend, device)``, returns nothing and raises AssertionError. The tests
and ``python -m fastzoo selftest`` run the same ones.
"""

import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastzoo import backends
from fastzoo.ops._operator import OPERATORS
from fastzoo.testing.gradients import assert_gradient_close
from fastzoo.testing.spec import OpSpec, Sample
from fastzoo.testing.tolerance import assert_same_outputs, outputs_of, unit_roundoff

Check = Callable[[OpSpec, str, str], None]

_EVERY_SUBSET = 3  # arguments at most, of which every subset is tried


def runnable_backends(spec: OpSpec, device: str) -> list[str]:
    operator = OPERATORS[spec.operator]
    return [b for b in operator.has if operator.refusal(b, device) is None]


def _to(value: Any, device: str) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def _has_gradient(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _named_on(sample: Sample, device: str) -> dict[str, Any]:
    return {name: _to(value, device) for name, value in sample.kwargs.items()}


def _call(spec: OpSpec, sample: Sample, backend: str, device: str) -> Any:
    args = [_to(arg, device) for arg in sample.args]
    return spec.function(*args, **_named_on(sample, device), backend=backend)


def _assert_like_definition(
    spec: OpSpec, sample: Sample, actual: Any, context: str, *, autocast: bool = False
) -> None:
    expected = spec.definition(*sample.args, **sample.kwargs)
    tolerance = None
    derive = spec.autocast_tolerance if autocast and spec.autocast_tolerance else spec.tolerance
    if derive is not None:

        def tolerance() -> Tensor | tuple[Tensor, ...]:
            return derive(*sample.args, **sample.kwargs)

    assert_same_outputs(actual, expected, tolerance=tolerance, context=context)


def _each(spec: OpSpec) -> Iterator[tuple[Sample, str]]:
    for dtype in spec.dtypes:
        for sample in spec.samples(dtype):
            yield sample, f"{sample.name} in {str(dtype).removeprefix('torch.')}"


def _equal(a: Any, b: Any) -> bool:
    """Bit for bit; NaN equals NaN."""
    if not isinstance(a, Tensor):
        return a is b or a == b or (a != a and b != b)
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(0), b.nan_to_num(0))


def check_values(spec: OpSpec, backend: str, device: str) -> None:
    """Every sample in every dtype equals the definition, and the inputs are left as they were."""
    for sample, context in _each(spec):
        before = copy.deepcopy(sample.args)
        actual = _call(spec, sample, backend, device)
        for position, (was, now) in enumerate(zip(before, sample.args, strict=True)):
            assert _equal(was, now), f"{context}: argument {position} was written into"
        _assert_like_definition(spec, sample, actual, context)


def check_repeats(spec: OpSpec, backend: str, device: str) -> None:
    """A second run gives the same bits; of every third sample, since it is no matter of values."""
    for sample in itertools.islice(spec.samples(torch.float32), 0, None, 3):
        first, second = (outputs_of(_call(spec, sample, backend, device)) for _ in range(2))
        assert all(map(_equal, first, second)), f"{sample.name}: a second run differs"


def check_kernel_ran(spec: OpSpec, backend: str, device: str) -> None:
    """The forced backend's overload has one kernel for this device, and it is that backend's."""
    operator = OPERATORS[spec.operator]
    chosen = operator.choose(backend, device)
    assert chosen._overloadname == backend, f"chose {chosen}"
    key = "CPU" if device == "cpu" else "CUDA"
    dump = torch._C._dispatch_dump(chosen.name())
    registered = [line for line in dump.splitlines() if line.startswith(f"{key}:")]
    if backend == "reference":
        assert not registered, f"{chosen} has a kernel of its own: {registered}"
        return
    assert len(registered) == 1, f"{chosen} has no kernel for {key}:\n{dump}"
    source = "/csrc/" if backend in ("cpu", "cuda") else "_operator.py"
    assert source in registered[0], f"{chosen} runs {registered[0]}"


def _layouts(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The same values, stored otherwise."""
    if x.dim() > 1:
        yield "transposed", x.transpose(0, -1).contiguous().transpose(0, -1)
    yield "strided", x.repeat_interleave(2, 0)[::2]
    padded = x.new_zeros(x.numel() + 1)
    padded[1:] = x.flatten()
    yield "misaligned", padded[1:].view(x.shape)
    wide = x.new_zeros(*x.shape[:-1], x.shape[-1] + 3)
    wide[..., 1:-2] = x
    yield "sliced", wide[..., 1:-2]


def _plain_samples(spec: OpSpec, dtype: torch.dtype = torch.float32) -> list[Sample]:
    """A few middle-sized samples, for checks that multiply them."""
    plain = [s for s in spec.samples(dtype) if s.name.startswith("random-")]
    return plain[len(plain) // 2 : len(plain) // 2 + 3]


def check_layouts(spec: OpSpec, backend: str, device: str) -> None:
    """Any strides give the contiguous answer; so does an expanded tensor."""
    for sample in _plain_samples(spec):
        tensors = [i for i, arg in enumerate(sample.args) if isinstance(arg, Tensor)]
        for position in tensors:
            for name, stored in _layouts(sample.args[position]):
                args = [*sample.args[:position], stored, *sample.args[position + 1 :]]
                actual = _call(spec, Sample("", tuple(args), sample.kwargs), backend, device)
                context = f"{sample.name}, argument {position} {name}"
                _assert_like_definition(spec, sample, actual, context)
        for position in tensors:
            row = sample.args[position][:1]
            expanded = row.expand(sample.args[position].shape)
            args = [*sample.args[:position], expanded, *sample.args[position + 1 :]]
            repeated = Sample("expanded", tuple(args), sample.kwargs)
            actual = _call(spec, repeated, backend, device)
            _assert_like_definition(spec, repeated, actual, f"argument {position} expanded")


def check_uninitialised_memory(spec: OpSpec, backend: str, device: str) -> None:
    """Allocations filled with NaN change nothing: every output element is written."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
        for sample in _plain_samples(spec):
            actual = _call(spec, sample, backend, device)
            _assert_like_definition(spec, sample, actual, sample.name)
    finally:
        torch.use_deterministic_algorithms(deterministic)


def check_autocast(spec: OpSpec, backend: str, device: str) -> None:
    """Under autocast a low-precision argument is computed in float32, as if cast by hand; products
    may run in the autocast dtype."""
    for sample in _plain_samples(spec)[:1]:
        floats = [i for i, arg in enumerate(sample.args) if _has_gradient(arg)]
        for position in floats:
            mixed, rounded = list(sample.args), list(sample.args)
            mixed[position] = mixed[position].bfloat16()
            rounded[position] = mixed[position].float()
            with torch.autocast(device, dtype=torch.bfloat16):
                actual = _call(spec, Sample("", tuple(mixed), sample.kwargs), backend, device)
            sample_of_rounded = Sample("", tuple(rounded), sample.kwargs)
            _assert_like_definition(
                spec, sample_of_rounded, actual, f"argument {position}", autocast=True
            )


def check_opcheck(spec: OpSpec, backend: str, device: str) -> None:
    """torch.library.opcheck, all four: schema, autograd registration, fake, AOT dispatch."""
    operator = OPERATORS[spec.operator]
    for sample in _plain_samples(spec)[:1]:
        args = [_to(a, device) for a in spec.dispatch_args(*sample.args, **sample.kwargs)]
        if spec.differentiable is not None:
            args = [a.requires_grad_() if _has_gradient(a) else a for a in args]
        for overload in (operator.default, operator.overloads[backend]):
            torch.library.opcheck(overload, tuple(args))


def check_compiled(spec: OpSpec, backend: str, device: str) -> None:
    """torch.compile takes it whole, and other lengths do not recompile it."""
    torch._dynamo.reset()
    graphs = 0

    def count(module: Any, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return module.forward

    compiled = torch.compile(spec.function, fullgraph=True, dynamic=True, backend=count)
    for sample in _plain_samples(spec)[:1]:
        for keep in (1.0, 0.75, 0.5):
            args = tuple(
                arg[: int(len(arg) * keep)].clone()
                if isinstance(arg, Tensor) and position not in spec.whole
                else arg
                for position, arg in enumerate(sample.args)
            )
            part = Sample(sample.name, args, sample.kwargs)
            moved = [_to(arg, device) for arg in args]
            actual = compiled(*moved, **_named_on(sample, device), backend=backend)
            _assert_like_definition(spec, part, actual, f"{sample.name}, {keep:.0%}")
    assert graphs == 1, f"compiled {graphs} times for one graph"
    torch._dynamo.reset()


def _gradients(
    spec: OpSpec,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    backend: str | None,
    device: str = "cpu",
) -> tuple[list[Tensor], Tensor]:
    """Gradients of a weighted sum of the differentiable output, and that output."""
    assert spec.differentiable is not None
    leaves = [a.detach().clone().requires_grad_() if _has_gradient(a) else a for a in args]
    if backend is None:
        output = spec.differentiable(spec.definition(*leaves, **kwargs))
    else:
        kwargs = {name: _to(value, device) for name, value in kwargs.items()}
        output = spec.differentiable(spec.function(*leaves, **kwargs, backend=backend))
    weights = torch.linspace(-1, 2, output.numel(), dtype=output.dtype, device=output.device)
    # Of nothing the definition has no graph; its gradients are zeros as well.
    loss = (output * weights.view(output.shape)).sum()
    wanted = [a for a in leaves if _has_gradient(a)]
    if not loss.requires_grad:
        return [torch.zeros_like(a) for a in wanted], output
    return list(torch.autograd.grad(loss, wanted, materialize_grads=True)), output


def check_gradients(spec: OpSpec, backend: str, device: str) -> None:
    """Gradients of every finite sample equal the definition's in float64."""
    if spec.differentiable is None:
        return
    for dtype in spec.dtypes:
        # Every sample in float32; elsewhere, where only the rounding differs, a few.
        every = dtype == torch.float32
        for sample in spec.samples(dtype) if every else _plain_samples(spec, dtype):
            tensors = [a for a in sample.args if _has_gradient(a)]
            if not all(t.isfinite().all() for t in tensors) or "overflow" in sample.name:
                continue
            moved = tuple(_to(arg, device) for arg in sample.args)
            exact = tuple(a.double() if _has_gradient(a) else a for a in sample.args)
            actual, _ = _gradients(spec, moved, sample.kwargs, backend, device)
            expected, _ = _gradients(spec, exact, sample.kwargs, None)
            # Each entry is a sum over rows and dimensions, accumulated in at least float32, and
            # rounded once to the argument's dtype.
            terms = sum(t.shape[0] + t.shape[-1] for t in tensors) + 8
            accumulate = torch.float64 if dtype == torch.float64 else torch.float32
            rtol = terms * unit_roundoff(accumulate) + 2 * unit_roundoff(dtype)
            if spec.gradient_rtol is not None:
                rtol += spec.gradient_rtol(dtype, *sample.args, **sample.kwargs)
            cancelled = 0.0
            if spec.cancellation is not None:
                cancelled = 2 * spec.cancellation(*sample.args, **sample.kwargs)  # |grad| <= 2
            for position, (a, e) in enumerate(zip(actual, expected, strict=True)):
                name = f"{sample.name} in {dtype}, gradient {position}"
                assert a.dtype == tensors[position].dtype, f"{name}: dtype {a.dtype}"
                largest = e.abs().max().item() if e.numel() else 0.0
                limits = torch.finfo(dtype)
                if not limits.tiny / unit_roundoff(dtype) < largest < limits.max:
                    continue  # below or beyond what the dtype resolves
                assert_gradient_close(a, e, rtol=rtol, cancelled=cancelled, name=name)


def _smooth_call(
    spec: OpSpec, backend: str, device: str, dtype: torch.dtype
) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    assert spec.differentiable is not None
    assert spec.gradient_sample is not None
    differentiable, sample = spec.differentiable, spec.gradient_sample(dtype)

    def call(*floats: Tensor) -> Tensor:
        args = [_to(a, device) for a in _with_floats(sample, floats)]
        named = _named_on(sample, device)
        return differentiable(spec.function(*args, **named, backend=backend))

    floats = (a for a in sample.args if _has_gradient(a))
    return call, tuple(_to(a, device).clone().requires_grad_() for a in floats)


def _with_floats(sample: Sample, floats: tuple[Tensor, ...]) -> list[Any]:
    """The sample's arguments, with others in the place of those that have gradients."""
    given = iter(floats)
    return [next(given) if _has_gradient(a) else a for a in sample.args]


def check_gradcheck(spec: OpSpec, backend: str, device: str) -> None:
    """First and second derivatives against finite differences, on the double kernel."""
    if spec.differentiable is None or spec.held_constant:
        return
    call, args = _smooth_call(spec, backend, device, torch.float64)
    torch.autograd.gradcheck(call, args)
    torch.autograd.gradgradcheck(call, args)


def check_gradient_penalty(spec: OpSpec, backend: str, device: str) -> None:
    """The gradient of a gradient's norm, which an opaque backward gets silently wrong."""
    if spec.differentiable is None:
        return
    penalties = []
    for which in (backend, "reference"):
        call, args = _smooth_call(spec, which, device, torch.float64)
        first = torch.autograd.grad(call(*args).sum(), args, create_graph=True)
        norm = sum((g.square().sum() for g in first), torch.zeros((), device=device)).sqrt()
        penalties.append(torch.autograd.grad((norm - 1).square(), args, materialize_grads=True))
    for actual, expected in zip(*penalties, strict=True):
        assert_gradient_close(actual, expected, rtol=1e-12, name="gradient penalty")


def check_partial_gradients(spec: OpSpec, backend: str, device: str) -> None:
    """Any subset of arguments may want gradients (of many, each alone); backward runs twice; any
    grad_out layout."""
    if spec.differentiable is None:
        return
    call, args = _smooth_call(spec, backend, device, torch.float64)
    full = torch.autograd.grad(call(*args).sum(), args)
    subsets = itertools.product((False, True), repeat=len(args))
    for wanted in subsets:
        if not any(wanted) or (len(args) > _EVERY_SUBSET and sum(wanted) > 1):
            continue
        part = [a if want else a.detach() for a, want in zip(args, wanted, strict=True)]
        leaves = [a for a, want in zip(part, wanted, strict=True) if want]
        expected = [g for g, want in zip(full, wanted, strict=True) if want]
        output = call(*part)
        expanded = torch.ones((), dtype=output.dtype, device=device).expand(output.shape)
        for _ in range(2):
            grads = torch.autograd.grad(output, leaves, expanded, retain_graph=True)
            assert all(map(torch.equal, grads, expected)), f"gradients differ with {wanted}"
        strided = torch.ones(*output.shape, 2, dtype=output.dtype, device=device)[..., 0]
        grads = torch.autograd.grad(output, leaves, strided)
        assert all(map(torch.equal, grads, expected)), f"strided grad_out differs with {wanted}"


def check_transforms(spec: OpSpec, backend: str, device: str) -> None:
    """torch.func works; forward mode is right or raises naming the reference, never zero."""
    if spec.differentiable is None or spec.gradient_sample is None:
        return
    differentiable = spec.differentiable
    call, args = _smooth_call(spec, backend, device, torch.float64)
    plain = tuple(a.detach() for a in args)
    expected = torch.autograd.grad(call(*args).sum(), args)
    actual = torch.func.grad(lambda *a: call(*a).sum(), argnums=tuple(range(len(plain))))(*plain)
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e), "torch.func.grad differs from autograd"
    first = torch.autograd.grad(call(*args).sum(), args[0], create_graph=True)[0]
    (second,) = torch.autograd.grad(first.sum(), args[0])
    nested = torch.func.grad(
        lambda x: torch.func.grad(lambda y: call(y, *plain[1:]).sum())(x).sum()
    )
    assert_gradient_close(nested(plain[0]), second, rtol=1e-12, name="torch.func.grad twice")
    sample = spec.gradient_sample(torch.float64)

    def definition(*floats: Tensor) -> Tensor:
        args = _with_floats(sample, floats)
        return differentiable(spec.definition(*args, **sample.kwargs))

    tangent = torch.func.jvp(definition, plain, plain)[1]
    assert tangent.abs().max() > 0, "the reference's own tangent is zero"
    try:
        actual_tangent = torch.func.jvp(call, plain, plain)[1]
    except NotImplementedError as error:
        assert f"fastzoo.reference.{spec.name}" in str(error), f"unhelpful message: {error}"
    else:
        assert_gradient_close(actual_tangent, tangent, rtol=1e-12, name="tangent")


def check_errors(spec: OpSpec, backend: str, device: str) -> None:
    """Bad arguments raise the documented error, naming the argument."""
    for bad in spec.invalid():
        kwargs = {"backend": backend, **bad.kwargs}
        try:
            spec.function(*bad.args, **kwargs)
        except bad.error as error:
            assert bad.match in str(error), f"{bad.name}: message lacks {bad.match!r}: {error}"
        else:
            raise AssertionError(f"{bad.name}: no {bad.error.__name__}")


def check_selection(spec: OpSpec, backend: str, device: str) -> None:
    """The argument wins over use_backend, which wins over auto."""
    operator = OPERATORS[spec.operator]
    other = "reference" if backend != "reference" else operator.owner(device)
    with backends.use_backend(other):
        assert operator.choose(backend, device)._overloadname == backend
    with backends.use_backend(backend):
        assert operator.choose(None, device)._overloadname == backend
        for sample in _plain_samples(spec)[:1]:
            args = [_to(arg, device) for arg in sample.args]
            actual = spec.function(*args, **_named_on(sample, device))
            _assert_like_definition(spec, sample, actual, "under use_backend")


def gpu_check_side_stream(spec: OpSpec, backend: str, device: str) -> None:
    """Kernels run on the current stream, after what made their inputs there."""
    for sample in _plain_samples(spec):
        waiting = [_to(arg, device) for arg in sample.args]
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)
            args = [arg.clone() if isinstance(arg, Tensor) else arg for arg in waiting]
            actual = spec.function(*args, **_named_on(sample, device), backend=backend)
        stream.synchronize()
        _assert_like_definition(spec, sample, actual, f"{sample.name} on a side stream")


def gpu_check_graph_capture(spec: OpSpec, backend: str, device: str) -> None:
    """A fixed-shape operator is captured in a CUDA graph, and replays on other values."""
    if not spec.fixed_shape or backend == "reference":
        return
    first, second = (
        next(iter(_plain_samples(spec, dtype))) for dtype in (torch.float32, torch.bfloat16)
    )
    # The same shapes with other values: those that bfloat16 has.
    other = tuple(a.float() if _has_gradient(a) else a for a in second.args)
    args = [_to(arg, device) for arg in first.args]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        spec.function(*args, **_named_on(first, device), backend=backend)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = spec.function(*args, **_named_on(first, device), backend=backend)
    for sample in (first, Sample(second.name, other, second.kwargs)):
        for static, value in zip(args, sample.args, strict=True):
            if isinstance(static, Tensor):
                static.copy_(value)
        graph.replay()
        torch.cuda.synchronize()
        _assert_like_definition(spec, sample, captured, f"{sample.name}, replayed")


def _named(prefix: str) -> dict[str, Check]:
    return {
        name.removeprefix(prefix): check
        for name, check in globals().items()
        if name.startswith(prefix)
    }


CHECKS: dict[str, Check] = _named("check_")
GPU_CHECKS: dict[str, Check] = _named("gpu_check_")


def checks_on(device: str) -> dict[str, Check]:
    """Every check by name; on a GPU also those that need one."""
    return {**CHECKS, **GPU_CHECKS} if device == "cuda" else CHECKS
