"""The inverse of masked-autoregressive maps, at the cost of one pass of their network."""

import itertools
from typing import Any

import torch
from torch import Tensor

from fastzoo import reference
from fastzoo.ops._checks import check_choice, check_floating, check_same, check_tensor
from fastzoo.ops._operator import Operator
from fastzoo.reference.masked_linear import (
    ACTIVATIONS,
    UNIVARIATE,
    inverse_with,
    parameters_each,
)
from fastzoo.reference.precision import compute_dtype
from fastzoo.reference.splines import CONVENTIONS


def _fake_inverse(y: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return y.new_empty(y.shape), y.new_empty(y.shape[0], dtype=compute_dtype(y))


def _setup_inverse(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    y, first, net, ctx.widths, starts, *ctx.rest = inputs
    ctx.save_for_backward(y, first, net, starts)


def _backward_inverse(ctx: Any, grad_x: Tensor, grad_logdet: Tensor) -> tuple[Any, ...]:
    y, first, net, starts = ctx.saved_tensors
    backward = _INVERSE_BACKWARD.like(ctx)
    grads = backward(grad_x, grad_logdet, y, first, net, ctx.widths, starts, *ctx.rest)
    return *grads, None, None, *(None for _ in ctx.rest)


def _fake_inverse_backward(
    grad_x: Tensor, grad_logdet: Tensor, y: Tensor, first: Tensor, net: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return y.new_empty(y.shape), first.new_empty(first.shape), net.new_empty(net.shape)


_INVERSE = Operator(
    "autoregressive_inverse(Tensor y, Tensor first, Tensor net, int[] widths, Tensor starts,"
    " str activation, str map, SymInt bins, float constant, float floor) -> (Tensor, Tensor)",
    reference=reference.autoregressive_inverse_rows,
    fake=_fake_inverse,
    has=("reference", "cpu", "cuda"),
    setup_context=_setup_inverse,
    backward=_backward_inverse,
    autocast=torch.float32,
)

_INVERSE_BACKWARD = Operator(
    "autoregressive_inverse_backward(Tensor grad_x, Tensor grad_logdet, Tensor y, Tensor first,"
    " Tensor net, int[] widths, Tensor starts, str activation, str map, SymInt bins,"
    " float constant, float floor) -> (Tensor, Tensor, Tensor)",
    reference=reference.autoregressive_inverse_backward,
    fake=_fake_inverse_backward,
    has=("reference",),
    differentiable_reference=True,
)


def autoregressive_inverse(
    y: Tensor,
    net: Tensor,
    first: Tensor | None = None,
    *,
    widths: list[int],
    starts: Tensor,
    activation: str = "relu",
    map: str = "softclip",
    bins: int = 8,
    constant: float = 1e-3,
    floor: float = 0.0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """x of ``y_d = f(x_d; parameters_d(x_0 .. x_{d-1}))``, where a masked network gives the
    parameters: each of its units is computed once, at the step where all that it reads is known.
    :class:`fastzoo.nn.flows.MaskedAutoregressive` prepares the arguments from its layers.

    Args:
        y: ``[B, D]``, float32, float64, float16 or bfloat16, features in the order in which they
            are solved.
        net: the network, flat, in y's dtype: of each layer its masked weight ``[outputs, inputs]``
            and its bias. Units are sorted by their step; those of the last layer are the
            parameters, P a feature side by side.
        first: ``[B, widths[1]]``, added to the first layer before its activation: a context's part.
        widths: D, then the units of each layer; the last is D P.
        starts: int64 ``[L + 1, S + 1]`` on y's device: units of layer l (0: the features) of step s
            are ``starts[l, s]`` to ``starts[l, s + 1]``. A first layer's unit of step s reads the
            features of the steps before s, one of a later layer the units of steps up to s.
        activation: of the hidden layers: ``relu``, ``tanh``, ``elu``, ``silu``, ``leaky_relu`` or
            ``gelu``.
        map: what y is of x: an affine map of :func:`coupling`, with P = 2, shift and scale, and its
            ``constant`` and ``floor``; or a spline of :func:`rational_quadratic_spline` in the
            convention ``nflows`` or ``zuko`` with linear tails, P = 3 bins - 1, the bound
            ``constant``, and ``floor`` for its minima or slope.
        bins: of a spline.
        backend: ``auto``, ``reference``, ``cpu`` or ``cuda``; None follows
            :func:`fastzoo.use_backend`.

    Returns:
        x ``[B, D]``, and the log-determinant of the inverse ``[B]``, float32 (float64 for float64).

    Gradient: to y, net and first, of any order, by the recursion's steps in reverse, in PyTorch;
    weights that the mask hides get none. Deterministic.
    Under autocast it computes in float32.

    Raises:
        TypeError, ValueError: an argument of the wrong kind; the message names it.
        RuntimeError: a forced backend that cannot run, with the reason.

    Source: Papamakarios et al., Masked Autoregressive Flow (2017), section 3.1; Germain et al.,
    MADE (2015).
    """
    check_tensor("y", y, "[B, D]", 2)
    check_floating("y", y)
    check_choice("activation", activation, tuple(ACTIVATIONS))
    check_choice("map", map, UNIVARIATE)
    _check_net(y, net, list(widths), map, bins)
    _check_starts(y, starts, list(widths))
    if first is not None:
        check_tensor("first", first, "[B, widths[1]]", 2)
        check_same("y", y, "first", first)
        if first.shape != (y.shape[0], widths[1]):
            raise ValueError(f"first: expected {[y.shape[0], widths[1]]}, got {list(first.shape)}")
    if map in (*CONVENTIONS, "tanh", "atan") and not constant > 0:
        raise ValueError(f"constant: expected above 0 for {map}, got {constant}")
    if map == "softclip" and not 0 < constant < 1:
        raise ValueError(f"constant: expected in (0, 1) for {map}, got {constant}")
    if not 0 <= floor < 1 or (map == "zuko" and floor == 0):
        raise ValueError(f"floor: expected in {'(' if map == 'zuko' else '['}0, 1), got {floor}")
    return inverse_with(
        _INVERSE.choose(backend, y.device.type),
        y,
        net,
        first,
        widths=widths,
        starts=starts,
        activation=activation,
        map=map,
        bins=bins,
        constant=constant,
        floor=floor,
    )


def _check_net(y: Tensor, net: Tensor, widths: list[int], map: str, bins: int) -> None:
    if len(widths) < 2 or min(widths) < 1:
        raise ValueError(f"widths: expected the features and one layer at least, got {widths}")
    if map in CONVENTIONS and bins < 1:
        raise ValueError(f"bins: expected at least 1, got {bins}")
    each = parameters_each(map, bins)
    if widths[0] != y.shape[1] or widths[-1] != widths[0] * each:
        raise ValueError(
            f"widths: expected {y.shape[1]} features first and {y.shape[1] * each} parameters "
            f"last, got {widths}"
        )
    check_tensor("net", net, "[numbers]", 1)
    check_same("y", y, "net", net)
    numbers = sum((i + 1) * o for i, o in itertools.pairwise(widths))
    if net.shape[0] != numbers:
        raise ValueError(f"net: expected {numbers} numbers for widths {widths}, got {len(net)}")


def _check_starts(y: Tensor, starts: Tensor, widths: list[int]) -> None:
    check_tensor("starts", starts, "[layers + 1, steps + 1]", 2)
    if starts.dtype != torch.int64:
        raise TypeError(f"starts: expected int64, got {starts.dtype}")
    if starts.device != y.device:
        raise ValueError(f"starts: expected device {y.device}, got {starts.device}")
    if starts.shape[0] != len(widths) or starts.shape[1] < 2:
        raise ValueError(f"starts: expected [{len(widths)}, steps + 1], got {list(starts.shape)}")
    # Elsewhere a look would wait for the device.
    if starts.device.type == "cpu" and not torch.compiler.is_compiling():
        rows = starts.tolist()
        each = widths[-1] // widths[0]
        for row, width in zip(rows, widths, strict=True):
            if row[0] != 0 or row[-1] != width or sorted(row) != row:
                raise ValueError(f"starts: expected 0, ..., {width} ascending, got {row}")
        if any(units != each * features for units, features in zip(rows[-1], rows[0], strict=True)):
            raise ValueError(f"starts: expected {each} parameters for each feature of a step")
