"""How an operator is registered: once here, so that every operator has the same shape.

An operator has a default overload, which ``auto`` uses, and one overload a backend, so that
``backend=`` is a choice of overload that the compiler sees. All of them share the schema, the
fake and the autograd formula. C++ registers ``op`` and ``op.cpu`` on the CPU key and ``op.cuda``
on the CUDA key; the rest is registered here.
"""

import functools
import importlib
import operator
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad

from fastzoo import backends

_library = torch.library.Library("fastzoo", "DEF")
_AUTOCAST_DEVICES = ("cpu", "cuda")
_AUTOCAST_KEYS = ("AutocastCPU", "AutocastCUDA")
_AUTOCAST_KEYSET = functools.reduce(
    operator.or_,
    (torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key)) for key in _AUTOCAST_KEYS),
)

OPERATORS: dict[str, "Operator"] = {}


class Operator:
    """One operator of the ``fastzoo`` namespace and its backends.

    Args:
        schema: ``name(arguments) -> returns``.
        reference: the definition in plain PyTorch.
        fake: shapes and dtypes of the outputs.
        triton: ``family.function``: the launcher, imported from ``fastzoo.kernels`` when first
            called. None where the operator has no Triton kernel.
        cuda_owner: the backend that ``auto`` prefers on a GPU.
        has: the backends that the operator has.
        setup_context, backward: as torch.library.register_autograd takes them; None for an
            operator without gradients.
        differentiable_reference: derivatives are those of the reference under autograd, which
            runs when they are computed. For an operator that is itself a gradient.
        autocast: the dtype that autocast casts floating inputs to, or ``off``: the inputs stay as
            they are, and nothing inside of the operator is cast.
        public: the public functions, whose references know forward-mode derivatives; by default
            the one of the operator's own name.
    """

    def __init__(
        self,
        schema: str,
        *,
        reference: Callable[..., Any],
        fake: Callable[..., Any],
        triton: str | None = None,
        has: tuple[str, ...] = backends.NAMES,
        cuda_owner: str = "cuda",
        setup_context: Callable[..., None] | None = None,
        backward: Callable[..., Any] | None = None,
        differentiable_reference: bool = False,
        autocast: torch.dtype | Literal["off"] | None = None,
        public: tuple[str, ...] = (),
    ) -> None:
        self.name = schema.split("(")[0]
        self.public = public or (self.name,)
        self.has = has
        self._reference = reference
        self._triton = triton
        self._warned = False

        for overload in ("", *has):
            qualified = f"{self.name}.{overload}" if overload else self.name
            _library.define(
                schema.replace(self.name, qualified, 1), tags=(torch.Tag.pt2_compliant_tag,)
            )
            torch.library.register_fake(f"fastzoo::{qualified}", fake, lib=_library)
        packet = getattr(torch.ops.fastzoo, self.name)
        self.default: Any = packet.default
        self.overloads: dict[str, Any] = {backend: getattr(packet, backend) for backend in has}

        _library.impl(self.name, self._fall_back, "CompositeExplicitAutograd")
        _library.impl(f"{self.name}.reference", reference, "CompositeExplicitAutograd")
        if "triton" in has:
            for key in ("CPU", "CUDA"):
                _library.impl(f"{self.name}.triton", self._launch_triton, key)

        # auto's owner on a GPU; the default overload elsewhere, whose CPU kernel is the C++ one.
        self._auto: dict[str, Any] = {}
        for backend in (cuda_owner, "cuda", "triton"):
            if backend in has and backends.refusal(backend, "cuda") is None:
                self._auto["cuda"] = self.overloads[backend]
                _library.impl(self.name, self.overloads[backend], "CUDA")
                break

        for overload in (self.default, *self.overloads.values()):
            if setup_context and backward:
                kernel = self._with_gradient(overload, setup_context, backward)
                _library.impl(overload.name().removeprefix("fastzoo::"), kernel, "Autograd")
            elif differentiable_reference:
                kernel = self._through_reference(overload)
                _library.impl(overload.name().removeprefix("fastzoo::"), kernel, "Autograd")
            if autocast == "off":
                for key in _AUTOCAST_KEYS:
                    kernel = self._without_autocast(overload)
                    _library.impl(overload.name().removeprefix("fastzoo::"), kernel, key)
            elif autocast is not None:
                for device in _AUTOCAST_DEVICES:
                    torch.library.register_autocast(overload.name(), device, autocast, lib=_library)
        OPERATORS[self.name] = self

    def refusal(self, backend: str, device_type: str) -> str | None:
        """Why ``backend`` cannot run this operator on a device type, or None where it can."""
        if backend not in self.has:
            return f"{self.name} has no {backend} kernel"
        return backends.refusal(backend, device_type)

    def owner(self, device_type: str) -> str:
        """The backend that ``auto`` runs on a device type."""
        overload = self._auto.get(device_type)
        if overload is not None:
            return str(overload._overloadname)
        if "cpu" in self.has and backends.refusal("cpu", device_type) is None:
            return "cpu"
        return "reference"

    def choose(self, backend: str | None, device_type: str) -> Any:
        """The overload to call for a ``backend=`` argument and the tensors' device type."""
        if backend is None or backend == "auto":
            backend = backends.forced
        if backend is None:
            return self._auto.get(device_type, self.default)
        if backend not in backends.NAMES:
            raise ValueError(
                f"backend: unknown {backend!r}, expected auto or one of {backends.NAMES}"
            )
        reason = self.refusal(backend, device_type)
        if reason is not None:
            raise RuntimeError(f"fastzoo.ops.{self.name}: backend {backend!r} cannot run: {reason}")
        return self.overloads[backend]

    def launcher(self, backend: str | None, device_type: str) -> Callable[..., Any]:
        """The overload of :meth:`choose`, called with the arguments that may want a derivative and
        then with all: where none does it passes by the Python of the Autograd key, which costs as
        much as a small kernel."""
        overload = self.choose(backend, device_type)

        def launch(candidates: Sequence[Tensor], *args: Any) -> Any:
            if (
                torch.compiler.is_compiling()
                or _wants_gradient(candidates)
                or _has_tangent(candidates)
                or torch._C._are_functorch_transforms_active()
            ):
                return overload(*args)
            with torch._C._AutoDispatchBelowAutograd():
                return overload(*args)

        return launch

    def beside(self, backend: str | None, device_type: str) -> Any:
        """The overload for a part of a function whose own operator runs on ``backend``: that
        backend where this operator has it, and what ``auto`` would run elsewhere."""
        if backend is None or backend == "auto":
            backend = backends.forced
        default = self._auto.get(device_type, self.default)
        return default if backend is None else self.overloads.get(backend, default)

    def like(self, ctx: Any) -> Any:
        """The overload for a backward: the forward's backend where this operator has it."""
        return self.overloads.get(ctx.backend, self.default)

    def _fall_back(self, *args: Any) -> Any:
        device_type = next(a for a in args if isinstance(a, Tensor)).device.type
        if device_type != "cpu" and not self._warned:
            self._warned = True
            reasons = "; ".join(
                f"{backend}: {self.refusal(backend, device_type)}"
                for backend in self.has
                if backend != "reference"
            )
            warnings.warn(
                f"fastzoo.ops.{self.name} runs the slow reference on {device_type}: {reasons}",
                stacklevel=2,
            )
        return self._reference(*args)

    def _launch_triton(self, *args: Any) -> Any:
        device_type = next(a for a in args if isinstance(a, Tensor)).device.type
        reason = self.refusal("triton", device_type)
        if reason is not None:
            raise RuntimeError(f"fastzoo::{self.name}.triton cannot run: {reason}")
        assert self._triton is not None
        family, function = self._triton.split(".")
        module = importlib.import_module(f"fastzoo.kernels.{family}")
        return getattr(module, function)(*args)

    def _with_gradient(
        self,
        overload: Any,
        setup_context: Callable[..., None],
        backward: Callable[..., Any],
    ) -> Callable[..., Any]:
        def below(*args: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                return overload(*args)

        def forward(ctx: Any, *args: Any) -> Any:
            ctx.backend = overload._overloadname
            output = below(*args)
            setup_context(ctx, args, output)
            return output

        function = _function(f"{self.name}_{overload._overloadname}", forward, backward)

        def kernel(*args: Any) -> Any:
            if _has_tangent(args):
                # Below the Autograd key the tangent would be dropped, and come out as a zero.
                raise NotImplementedError(
                    f"fastzoo.ops.{self.public[0]} has no forward-mode derivative: use "
                    + ", ".join(f"fastzoo.reference.{name}" for name in self.public)
                )
            if not _wants_gradient(args):
                return below(*args)
            return self._reference(*args) if _in_nested_transforms() else function(*args)

        return kernel

    def _without_autocast(self, overload: Any) -> Callable[..., Any]:
        def kernel(*args: Any) -> Any:
            with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_KEYSET):
                return overload(*args)

        return kernel

    def _through_reference(self, overload: Any) -> Callable[..., Any]:
        """The kernel, whose own derivatives are those of the reference, computed when asked for."""

        def below(*args: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                return overload(*args)

        def forward(ctx: Any, *args: Any) -> Any:
            ctx.save_for_backward(*(a for a in args if isinstance(a, Tensor)))
            ctx.others = [None if isinstance(a, Tensor) else a for a in args]
            return below(*args)

        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
            saved = iter(ctx.saved_tensors)
            args = [next(saved) if other is None else other for other in ctx.others]
            wanted = [i for i, needed in enumerate(ctx.needs_input_grad) if needed]
            with torch.enable_grad():
                # An argument may depend on another: each derivative is to stop at its own.
                args = [a.view_as(a) if isinstance(a, Tensor) else a for a in args]
                outputs = self._reference(*args)
                if isinstance(outputs, Tensor):
                    outputs = (outputs,)
                pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if o.requires_grad]
                found = torch.autograd.grad(
                    [o for o, _ in pairs],
                    [args[i] for i in wanted],
                    [g for _, g in pairs],
                    create_graph=True,
                    allow_unused=True,
                )
            results: list[Tensor | None] = [None] * len(args)
            for i, gradient in zip(wanted, found, strict=True):
                results[i] = gradient
            return tuple(results)

        function = _function(f"{self.name}_{overload._overloadname}", forward, backward)

        def kernel(*args: Any) -> Any:
            if not _wants_gradient(args) and not _has_tangent(args):
                return below(*args)
            if _has_tangent(args) or _in_nested_transforms():
                return self._reference(*args)
            return function(*args)

        return kernel


def _function(
    name: str, forward: Callable[..., Any], backward: Callable[..., Any]
) -> Callable[..., Any]:
    """``apply`` of an autograd.Function, which torch.func's transforms take too."""
    function: Any = type(
        name,
        (torch.autograd.Function,),
        {"forward": staticmethod(forward), "backward": staticmethod(backward)},
    )

    def apply(*args: Any) -> Any:
        if torch._C._are_functorch_transforms_active():
            # Function.apply refuses here, since a forward written in Python could escape the
            # transforms. Ours only dispatches, to the next transform's layer.
            with enable_single_level_autograd_function():
                return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]
        return function.apply(*args)

    return apply


def _wants_gradient(args: Sequence[Any]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args)


def _in_nested_transforms() -> bool:
    """Of two torch.func transforms a function's backward serves the inner one alone."""
    return (torch._C._functorch.maybe_current_level() or 0) > 1


def _has_tangent(args: Sequence[Any]) -> bool:
    return forward_ad._current_level >= 0 and any(
        isinstance(a, Tensor) and torch._VF._unpack_dual(a, level=0)[1] is not None for a in args
    )
