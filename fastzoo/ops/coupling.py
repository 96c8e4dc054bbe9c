"""Elementwise bijections and their log-determinants: the couplings that flows are made of."""

from typing import Any

import torch
from torch import Tensor

from fastzoo import reference
from fastzoo.ops._checks import check_choice, check_floating, check_same, check_tensor
from fastzoo.ops._operator import Operator
from fastzoo.reference.coupling import MAPS, SCALE_MAPS, coupling_with, part_shape
from fastzoo.reference.precision import compute_dtype


def _fake_coupling(
    x: Tensor, shift: Tensor, scale: Tensor, mask: Tensor, begin: Any, end: Any, *rest: Any
) -> tuple[Tensor, Tensor]:
    *_, sum_logdet = rest
    dtype = compute_dtype(x)
    logdet = x.new_empty(x.shape[:1] if sum_logdet else x.shape, dtype=dtype)
    return x.new_empty(x.shape), logdet


def _setup_coupling(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.rest = inputs[4:]


def _backward_coupling(ctx: Any, grad_y: Tensor, grad_logdet: Tensor) -> tuple[Any, ...]:
    backward = _COUPLING_BACKWARD.like(ctx)
    grads = backward(grad_y.contiguous(), grad_logdet.contiguous(), *ctx.saved_tensors, *ctx.rest)
    return *grads, None, *(None for _ in ctx.rest)


def _fake_coupling_backward(
    grad_y: Tensor, grad_logdet: Tensor, x: Tensor, shift: Tensor, scale: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), shift.new_empty(shift.shape), scale.new_empty(scale.shape)


_COUPLING = Operator(
    "coupling(Tensor x, Tensor shift, Tensor scale, Tensor mask, SymInt begin, SymInt end, str map,"
    " float constant, float floor, bool shift_first, bool inverse, bool sum_logdet)"
    " -> (Tensor, Tensor)",
    reference=reference.coupling_rows,
    fake=_fake_coupling,
    triton="coupling.coupling",
    setup_context=_setup_coupling,
    backward=_backward_coupling,
    autocast=torch.float32,
    public=(
        "coupling",
        "affine_coupling",
        "additive_coupling",
        "soft_clip",
        "logit",
        "leaky_relu",
    ),
)

_COUPLING_BACKWARD = Operator(
    "coupling_backward(Tensor grad_y, Tensor grad_logdet, Tensor x, Tensor shift, Tensor scale,"
    " Tensor mask, SymInt begin, SymInt end, str map, float constant, float floor,"
    " bool shift_first, bool inverse, bool sum_logdet) -> (Tensor, Tensor, Tensor)",
    reference=reference.coupling_backward,
    fake=_fake_coupling_backward,
    triton="coupling.coupling_backward",
    differentiable_reference=True,
)


def coupling(
    x: Tensor,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    map: str = "exp",
    constant: float = 1.0,
    min_scale: float = 0.0,
    split: int | None = None,
    shift_first: bool = False,
    inverse: bool = False,
    sum_logdet: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Any elementwise bijection of the family with its log-determinant, in one pass.

    Those below are this function with other names for ``constant``; what each map computes is the
    table of ``docs/ops/coupling.md``.

    Args:
        x: ``[B, ...]``, float32, float64, float16 or bfloat16; a sample is an entry of dimension 0.
        shift, scale: what the conditioner gave, of a shape that broadcasts to what changes. An
            affine map takes both, ``additive`` the shift, the others neither. Slices of one tensor
            are read where they are.
        mask: broadcasts to x; where it is not 0 an element passes unchanged, whatever its shift
            and scale are, and gives them no gradient.
        map: ``exp``, ``sigmoid2``, ``tanh``, ``atan``, ``softplus``, ``softclip`` (affine, by what
            makes the scale positive), ``additive``, ``soft_clip``, ``logit``, ``leaky_relu``.
        constant: the bound of ``tanh`` and ``atan`` and ``soft_clip``, the least slope of
            ``softclip``, alpha of ``logit``, the slope of ``leaky_relu``.
        min_scale: added to the scale of ``sigmoid2`` and ``softplus``.
        split: the first ``split`` entries of dimension 1 pass unchanged, or the last ``-split``;
            shift and scale are then of the rest. In place of a mask.
        shift_first: ``y = (x + shift) e^a``, Glow's order, in place of ``x e^a + shift``.
        inverse: the inverse map and its log-determinant.
        sum_logdet: False keeps the logarithms of the derivatives elementwise.
        backend: ``auto``, ``reference``, ``cpu``, ``cuda`` or ``triton``; None follows
            :func:`fastzoo.use_backend`.

    Returns:
        y like x, and logdet ``[B]`` (like x without the sum), float32 (float64 for float64):
        ``log |det dy/dx|``.

    Gradient: to x, shift and scale, of any order; the backward reads the inputs again and keeps
    nothing else. Forward-mode derivatives raise. Deterministic. Under autocast it computes in
    float32.

    Raises:
        TypeError, ValueError: an argument of the wrong kind; the message names it.
        RuntimeError: a forced backend that cannot run, with the reason.

    Source: Dinh et al., NICE (2014), eq. 10, and Real NVP (2017), eqs. 7-9.
    """
    check_tensor("x", x, "[B, ...]", -1)
    check_floating("x", x)
    check_choice("map", map, MAPS)
    _check_part(x, mask, split)
    part = part_shape(x, split)
    _check_parameter("shift", shift, map in (*SCALE_MAPS, "additive"), x, part)
    _check_parameter("scale", scale, map in SCALE_MAPS, x, part)
    _check_constant(map, constant, min_scale)
    return coupling_with(
        _COUPLING.choose(backend, x.device.type),
        x,
        shift,
        scale,
        mask,
        map=map,
        constant=float(constant),
        min_scale=float(min_scale),
        split=split,
        shift_first=shift_first,
        inverse=inverse,
        sum_logdet=sum_logdet,
    )


def affine_coupling(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    scale_map: str = "exp",
    bound: float = 2.0,
    slope: float = 1e-3,
    min_scale: float = 0.0,
    mask: Tensor | None = None,
    split: int | None = None,
    shift_first: bool = False,
    inverse: bool = False,
    sum_logdet: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """``y = x e^a + shift``, with the logarithm of the scale a made of ``scale`` in one of the six
    ways in use; see :func:`coupling` for what is not told here.

    Args:
        x: ``[B, ...]``.
        shift, scale: broadcast to what changes of x.
        scale_map: ``exp``: a = s. ``sigmoid2``: e^a = sigmoid(s + 2) + min_scale. ``tanh``: a =
            bound tanh(s). ``atan``: a = .636 bound atan(s). ``softplus``: e^a = softplus(s) +
            min_scale. ``softclip``: a = s / (1 + \\|s / log slope\\|).
        bound: of ``tanh`` and ``atan``, above 0.
        slope: of ``softclip``, the least scale that it gives, in (0, 1).
        min_scale: of ``sigmoid2`` and ``softplus``, at least 0.
        mask, split: what passes unchanged: by a mask (not 0 is unchanged), or the first ``split``
            (the last ``-split``) entries of dimension 1.
        shift_first: ``y = (x + shift) e^a``.
        inverse, sum_logdet, backend: as :func:`coupling` takes them.

    Returns:
        y like x, logdet ``[B]``.

    Source: Dinh et al., Real NVP (2017); Kingma & Dhariwal, Glow (2018); the scale maps of FrEIA,
    nflows and zuko.
    """
    check_choice("scale_map", scale_map, SCALE_MAPS)
    if scale_map == "softclip" and not 0 < slope < 1:
        raise ValueError(f"slope: expected in (0, 1), got {slope}")
    if scale_map in ("tanh", "atan") and not bound > 0:
        raise ValueError(f"bound: expected above 0, got {bound}")
    return coupling(
        x,
        shift,
        scale,
        map=scale_map,
        constant=slope if scale_map == "softclip" else bound,
        min_scale=min_scale,
        mask=mask,
        split=split,
        shift_first=shift_first,
        inverse=inverse,
        sum_logdet=sum_logdet,
        backend=backend,
    )


def additive_coupling(
    x: Tensor,
    shift: Tensor,
    *,
    mask: Tensor | None = None,
    split: int | None = None,
    inverse: bool = False,
    sum_logdet: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """``y = x + shift`` of what changes, whose log-determinant is 0; see :func:`coupling`.

    Source: Dinh et al., NICE (2014), section 3.2.
    """
    return coupling(
        x,
        shift,
        map="additive",
        mask=mask,
        split=split,
        inverse=inverse,
        sum_logdet=sum_logdet,
        backend=backend,
    )


def soft_clip(
    x: Tensor,
    bound: float = 1.0,
    *,
    inverse: bool = False,
    sum_logdet: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """``y = x / (1 + |x| / bound)``, into (-bound, bound), with its log-determinant; the inverse of
    what is not inside is NaN. See :func:`coupling`.

    Source: zuko's SoftclipTransform.
    """
    return coupling(
        x,
        map="soft_clip",
        constant=bound,
        inverse=inverse,
        sum_logdet=sum_logdet,
        backend=backend,
    )


def logit(
    x: Tensor,
    alpha: float = 0.0,
    *,
    inverse: bool = False,
    sum_logdet: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """``y = logit(alpha + (1 - 2 alpha) x)`` of x in [0, 1] with its log-determinant, by which
    images become unbounded; the inverse is a sigmoid. See :func:`coupling`.

    Args:
        x: in [0, 1]; beyond it the answer is NaN or infinite where its logarithms are.
        alpha: in [0, 1/2): how far from 0 and 1 the argument of the logit is kept.

    Source: Dinh et al., Real NVP (2017), section 4.1, with both ends kept away; nflows' Logit.
    """
    return coupling(
        x, map="logit", constant=alpha, inverse=inverse, sum_logdet=sum_logdet, backend=backend
    )


def leaky_relu(
    x: Tensor,
    slope: float = 0.01,
    *,
    inverse: bool = False,
    sum_logdet: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """``y = x`` where x is at least 0 and ``slope x`` elsewhere, a bijection, with its
    log-determinant. See :func:`coupling`."""
    return coupling(
        x,
        map="leaky_relu",
        constant=slope,
        inverse=inverse,
        sum_logdet=sum_logdet,
        backend=backend,
    )


def _check_part(x: Tensor, mask: Tensor | None, split: int | None) -> None:
    """What passes unchanged."""
    if mask is not None:
        if not isinstance(mask, Tensor):
            raise TypeError(f"mask: expected a tensor, got {type(mask).__name__}")
        if split is not None:
            raise ValueError("split: expected without a mask")
        if mask.device != x.device:
            raise ValueError(f"mask: expected the device of x, {x.device}, got {mask.device}")
        check_broadcast("mask", mask, tuple(x.shape))
    check_split(x, split)


def check_split(x: Tensor, split: int | None) -> None:
    if split is None:
        return
    if isinstance(split, bool) or not isinstance(split, int | torch.SymInt):
        raise TypeError(f"split: expected an int, got {type(split).__name__}")
    if x.dim() < 2 or not 0 < abs(split) < x.shape[1]:
        raise ValueError(
            f"split: expected 1 to {x.shape[1] - 1 if x.dim() > 1 else 0}, or as much below 0, of "
            f"dimension 1 of x {list(x.shape)}, got {split}"
        )


def _check_parameter(
    name: str, value: Tensor | None, wanted: bool, x: Tensor, part: tuple[int, ...]
) -> None:
    if (value is not None) != wanted:
        raise ValueError(f"{name}: expected {'a tensor' if wanted else 'none'} for this map")
    if value is None:
        return
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    check_same("x", x, name, value)
    check_broadcast(name, value, part)


def check_broadcast(name: str, value: Tensor, part: tuple[int, ...]) -> None:
    shape = tuple(value.shape)
    fits = len(shape) <= len(part) and all(
        have in (1, want) for have, want in zip(reversed(shape), reversed(part), strict=False)
    )
    if not fits:
        raise ValueError(
            f"{name}: expected a shape that broadcasts to {list(part)}, got {list(shape)}"
        )


def _check_constant(map: str, constant: float, min_scale: float) -> None:
    allowed = {
        "tanh": (0.0, float("inf")),
        "atan": (0.0, float("inf")),
        "soft_clip": (0.0, float("inf")),
        "leaky_relu": (0.0, float("inf")),
        "softclip": (0.0, 1.0),
    }
    if map in allowed and not allowed[map][0] < constant < allowed[map][1]:
        raise ValueError(f"constant: expected in {allowed[map]} for {map}, got {constant}")
    if map == "logit" and not 0 <= constant < 0.5:
        raise ValueError(f"alpha: expected in [0, 1/2), got {constant}")
    if not 0 <= min_scale < float("inf"):
        raise ValueError(f"min_scale: expected at least 0, got {min_scale}")
