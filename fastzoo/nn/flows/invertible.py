"""Memory that does not grow with depth: the backward pass inverts what the forward pass dropped."""

import contextlib
import functools
import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastzoo.nn.flows.coupling import _Coupling
from fastzoo.nn.flows.transform import Compose, Transform, no_logdet
from fastzoo.ops._checks import check_choice, check_positive

Gradients = dict[Tensor, Tensor]

ON_ERROR = ("recompute", "raise", "ignore")


class InvertibleSequence(Transform):
    """Transforms one after the other, like :class:`Compose`, that keep no activations for the
    gradient: the backward pass inverts them one by one and computes each again.

    Kept are the input of every ``anchor_every``-th transform (an anchor) and the output. From each
    anchor the backward pass goes on exactly, and there it compares what it reconstructed with what
    was kept. A segment that is off by more than ``tolerance`` has its gradients computed again from
    the anchor: exactly, with the inputs of its transforms in memory.

    Args:
        transforms: the first one next to the data. A :class:`Compose` among them is inverted part
            by part. The state dict is that of a :class:`Compose` of the same transforms.
        anchor_every: transforms in a segment; None keeps the input and the output alone.
        tolerance: largest allowed reconstruction error: the greatest difference at an anchor,
            divided by the greatest absolute value there.
        on_error: what follows an error above ``tolerance``, or one that is not finite:
            ``recompute`` (and warn once), ``raise``, or ``ignore``, which alone does not wait for
            the device.
        preserve_rng_state: draw the same random numbers (of dropout) again, as
            ``torch.utils.checkpoint`` does.

    ``forward`` and ``inverse`` are both trained so; without gradients each is a plain loop. Results
    are bit for bit the same, gradients differ by the reconstruction error alone.
    Gradients flow to the input, the context and the parameters of the transforms, which must not
    change before the backward pass; tensors that a transform has from elsewhere get none. A
    gradient of a gradient raises, and so do ``torch.func`` transforms: use :class:`Compose`.

    Source: Gomez et al., The Reversible Residual Network (2017), section 3; Chen et al., Training
    Deep Nets with Sublinear Memory Cost (2016).
    """

    def __init__(
        self,
        transforms: Iterable[Transform],
        *,
        anchor_every: int | None = 8,
        tolerance: float = 1e-3,
        on_error: str = "recompute",
        preserve_rng_state: bool = True,
    ) -> None:
        super().__init__()
        self.transforms = nn.ModuleList(transforms)
        if anchor_every is not None:
            check_positive("anchor_every", anchor_every)
        if not tolerance >= 0:
            raise ValueError(f"tolerance: expected at least 0, got {tolerance}")
        check_choice("on_error", on_error, ON_ERROR)
        self.anchor_every = anchor_every
        self.tolerance = tolerance
        self.on_error = on_error
        self.preserve_rng_state = preserve_rng_state
        self._errors: list[Tensor] = []
        self._warned = False

    @property
    def segment_errors(self) -> tuple[float, ...]:
        """The reconstruction error of each segment in the last backward pass, in the order of the
        transforms that ran."""
        return tuple(float(error) for error in self._errors)

    @property
    def reconstruction_error(self) -> float:
        """The largest of :attr:`segment_errors`; NaN before the first backward pass."""
        if not self._errors:
            return float("nan")
        return float(torch.stack(self._errors).amax())

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = self._run(x, context, inverse=False)
        return found

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = self._run(z, context, inverse=True)
        return found

    def _run(self, x: Tensor, context: Tensor | None, *, inverse: bool) -> tuple[Tensor, Tensor]:
        # Nothing in it is a graph: it runs the autograd engine inside of a backward pass. Not as a
        # decorator, which imports the compiler with fastzoo.
        run = self._run_here
        if torch.compiler.is_compiling():
            run = torch.compiler.disable(run)
        return run(x, context, inverse=inverse)

    def _run_here(
        self, x: Tensor, context: Tensor | None, *, inverse: bool
    ) -> tuple[Tensor, Tensor]:
        parameters = _trained(self)
        inputs = (x, *parameters) if context is None else (x, context, *parameters)
        if torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
            found: tuple[Tensor, Tensor] = _Inverted.apply(  # type: ignore[no-untyped-call]
                self, inverse, x, context, *parameters
            )
            return found
        total = no_logdet(x)
        for layer in _flat(self._segments(inverse)):
            x, logdet = layer.run(x, context)
            total = total + logdet
        return x, total

    def _segments(self, inverse: bool) -> list[list["_Layer"]]:
        """The elementary transforms of each segment, in the order in which they run."""
        ordered = list(self.transforms)
        if inverse:
            ordered.reverse()
        every = self.anchor_every or max(1, len(ordered))
        return [
            [layer for t in ordered[i : i + every] for layer in _elementary(t, inverse)]
            for i in range(0, len(ordered), every)
        ]

    def _accepts(self, error: Tensor, segment: int) -> bool:
        if self.on_error == "ignore" or bool(error <= self.tolerance):
            return True
        message = (
            f"InvertibleSequence: segment {segment} was reconstructed with a relative error of "
            f"{float(error):.1e}, above the tolerance of {self.tolerance:.1e}"
        )
        if self.on_error == "raise":
            raise RuntimeError(message)
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"{message}; its gradients are computed again from its kept input", stacklevel=2
            )
        return False

    def extra_repr(self) -> str:
        return (
            f"anchor_every={self.anchor_every}, tolerance={self.tolerance:g}, "
            f"on_error={self.on_error!r}"
        )


class _Layer(NamedTuple):
    """An elementary transform, in the direction in which it runs."""

    transform: Transform
    inverse: bool
    parameters: tuple[Tensor, ...]

    def run(self, x: Tensor, context: Tensor | None, back: bool = False) -> tuple[Tensor, Tensor]:
        apply = self.transform.inverse if self.inverse != back else self.transform
        found: tuple[Tensor, Tensor] = apply(x, context)
        return found


def _elementary(transform: nn.Module, inverse: bool) -> Iterator[_Layer]:
    assert isinstance(transform, Transform)
    if isinstance(transform, Compose):
        parts = reversed(transform.transforms) if inverse else transform.transforms
        for part in parts:
            yield from _elementary(part, inverse)
    else:
        yield _Layer(transform, inverse, _trained(transform))


def _flat(segments: list[list[_Layer]]) -> Iterator[_Layer]:
    return (layer for segment in segments for layer in segment)


def _trained(module: nn.Module) -> tuple[Tensor, ...]:
    return tuple(p for p in module.parameters() if p.requires_grad)


class _Surroundings:
    """What a layer saw besides its arguments: autocast, and the random numbers to come."""

    def __init__(self, x: Tensor, preserve_rng_state: bool) -> None:
        self.device = x.device
        self.preserve_rng_state = preserve_rng_state
        self.states: list[tuple[Tensor, list[int], list[Tensor]]] = []
        kind = x.device.type
        self.autocast: dict[str, Any] | None = None
        if torch.amp.is_autocast_available(kind):
            self.autocast = {
                "dtype": torch.get_autocast_dtype(kind),
                "enabled": torch.is_autocast_enabled(kind),
            }

    def entered(self) -> contextlib.AbstractContextManager[Any]:
        if self.autocast is None:
            return contextlib.nullcontext()
        # A weight that is cast without a gradient must not be found in the cache by one with.
        return torch.autocast(self.device.type, **self.autocast, cache_enabled=False)

    def record(self, x: Tensor) -> None:
        """Called before each layer runs."""
        if self.preserve_rng_state:
            # Not at the top: it imports the compiler, and takes a second.
            from torch.utils.checkpoint import get_device_states

            self.states.append((torch.get_rng_state(), *get_device_states(x)))

    def restore(self, layer: int) -> None:
        if self.preserve_rng_state:
            from torch.utils.checkpoint import set_device_states

            state, devices, own = self.states[layer]
            torch.set_rng_state(state)
            set_device_states(devices, own, device_type=self.device.type)

    @contextlib.contextmanager
    def replayed(self) -> Iterator[None]:
        """As it was in the forward pass, and then as it is now."""
        devices = self.states[0][1] if self.states else []
        kind = self.device.type if devices else "cuda"
        forked = torch.random.fork_rng(devices, self.preserve_rng_state, device_type=kind)
        with forked, self.entered():
            yield


class _Inverted(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        sequence: InvertibleSequence,
        inverse: bool,
        x: Tensor,
        context: Tensor | None,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        segments = sequence._segments(inverse)
        surroundings = _Surroundings(x, sequence.preserve_rng_state)
        anchors = []
        total = no_logdet(x)
        with surroundings.entered():
            for segment in segments:
                anchors.append(x)
                for layer in segment:
                    surroundings.record(x)
                    x, logdet = layer.run(x, context)
                    total = total + logdet
        ctx.sequence, ctx.inverse, ctx.surroundings = sequence, inverse, surroundings
        ctx.anchors = len(anchors)
        # The parameters are saved so that a change before the backward pass is an error.
        ctx.save_for_backward(*anchors, x, context, *parameters)
        return x, total

    @staticmethod
    def backward(ctx: Any, grad_z: Tensor, grad_logdet: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "InvertibleSequence: a gradient of its gradient is not available "
                "(create_graph=True); use Compose"
            )
        saved = ctx.saved_tensors
        anchors, (z, context, *parameters) = saved[: ctx.anchors], saved[ctx.anchors :]
        sequence, surroundings = ctx.sequence, ctx.surroundings
        segments = sequence._segments(ctx.inverse)
        if not {p for layer in _flat(segments) for p in layer.parameters} <= set(parameters):
            raise RuntimeError(
                "InvertibleSequence: its parameters are others than in the forward pass "
                "(torch.func.functional_call, or a parametrization); use Compose"
            )
        if context is not None:
            context = context.detach().requires_grad_(ctx.needs_input_grad[3])
        gradients: Gradients = {}
        errors: list[Tensor] = []
        first = len(list(_flat(segments)))
        with surroundings.replayed():
            for index in reversed(range(len(anchors))):
                segment, anchor = segments[index], anchors[index]
                first -= len(segment)
                walk = _Walk(segment, first, surroundings, context)
                x, grad_x, found = walk.back(z, grad_z, grad_logdet)
                errors.insert(0, _relative_error(x, anchor))
                del x
                if not sequence._accepts(errors[0], index):
                    found.clear()
                    inputs = walk.inputs(anchor)
                    _, grad_x, found = walk.back(z, grad_z, grad_logdet, inputs)
                _add(gradients, found)
                z, grad_z = anchor, grad_x
        sequence._errors = errors
        of_context = None if context is None else gradients.get(context)
        return None, None, grad_z, of_context, *(gradients.get(p) for p in parameters)


class _Walk:
    """Back through one segment, layer by layer."""

    def __init__(
        self,
        segment: Sequence[_Layer],
        first: int,
        surroundings: _Surroundings,
        context: Tensor | None,
    ) -> None:
        self.segment = segment
        self.first = first
        self.surroundings = surroundings
        self.context = context

    def inputs(self, x: Tensor) -> list[Tensor]:
        """What each layer saw, from the first one's input on."""
        found = [x]
        for i, layer in enumerate(self.segment[:-1]):
            self.surroundings.restore(self.first + i)
            found.append(layer.run(found[-1], self.context)[0])
        return found

    def back(
        self, z: Tensor, grad_z: Tensor, grad_logdet: Tensor, inputs: list[Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Gradients]:
        """The segment's input, the gradient there, and those of context and parameters. Inputs
        that are not given are reconstructed."""
        gradients: Gradients = {}
        for i, layer in reversed(list(enumerate(self.segment))):
            self.surroundings.restore(self.first + i)
            if inputs is not None:
                leaves, outputs = self._again(layer, inputs.pop())
            elif isinstance(layer.transform, _Coupling):
                leaves, outputs = self._coupled(layer.transform, layer.inverse, z)
            else:
                x = layer.run(z, self.context, back=True)[0]
                self.surroundings.restore(self.first + i)
                leaves, outputs = self._again(layer, x)
            grad_z = self._through(layer, leaves, outputs, (grad_z, grad_logdet), gradients)
            z = leaves[0].detach()
        return z, grad_z, gradients

    def _again(self, layer: _Layer, x: Tensor) -> tuple[list[Tensor], tuple[Tensor, Tensor]]:
        """A layer with a graph: the leaf in the place of its input, and its outputs."""
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            return [x], layer.run(x, self.context)

    def _coupled(
        self, coupling: _Coupling, inverse: bool, z: Tensor
    ) -> tuple[list[Tensor], tuple[Tensor, Tensor]]:
        """Likewise of a coupling's output. What passes is the same in input and output, so the
        conditioner runs once, for both ways; the input's gradient is that of both leaves."""
        z = z.detach().requires_grad_()
        with torch.enable_grad():
            parameters = coupling._conditioned(z, self.context)
        x = coupling._mapped(z.detach(), parameters.detach(), not inverse)[0].requires_grad_()
        with torch.enable_grad():
            return [x, z], coupling._mapped(x, parameters, inverse)

    def _through(
        self,
        layer: _Layer,
        leaves: list[Tensor],
        outputs: tuple[Tensor, Tensor],
        grads: tuple[Tensor, Tensor],
        gradients: Gradients,
    ) -> Tensor:
        """The gradient of the layer's input; those of context and parameters are added up."""
        wanted = [*leaves, *layer.parameters]
        if self.context is not None and self.context.requires_grad:
            wanted.append(self.context)
        both = zip(outputs, grads, strict=True)
        reached = [(out, grad) for out, grad in both if out.requires_grad]
        found = torch.autograd.grad(
            [out for out, _ in reached],
            wanted,
            [grad for _, grad in reached],
            allow_unused=True,
        )
        pairs = zip(wanted[len(leaves) :], found[len(leaves) :], strict=True)
        _add(gradients, {t: grad for t, grad in pairs if grad is not None})
        reaching = (grad for grad in found[: len(leaves)] if grad is not None)
        return functools.reduce(torch.add, reaching)


def _relative_error(found: Tensor, kept: Tensor) -> Tensor:
    """The greatest difference over the greatest absolute value; NaN where there is one."""
    if kept.numel() == 0:
        return torch.zeros((), device=kept.device)
    scale: Tensor = torch.linalg.vector_norm(kept, math.inf).clamp_min(torch.finfo(kept.dtype).tiny)
    difference: Tensor = torch.linalg.vector_norm(found - kept, math.inf)
    return difference / scale


def _add(gradients: Gradients, more: Gradients) -> None:
    for tensor, grad in more.items():
        gradients[tensor] = gradients[tensor] + grad if tensor in gradients else grad
