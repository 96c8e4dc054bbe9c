"""Aggregation over a list of neighbours: PointConv, and sums and maxima of rows."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastzoo import reference
from fastzoo.ops._checks import (
    check_choice,
    check_floating,
    check_indices,
    check_same,
    check_tensor,
)
from fastzoo.ops._operator import Operator
from fastzoo.reference.pointconv import (
    WeightNet,
    edges_with,
    moments_with,
    pointconv_with,
    reduce_with,
)
from fastzoo.reference.precision import compute_dtype

REDUCTIONS = ("sum", "mean", "max")
FORMS = ("efficient", "full")
WIDEST = 64
DEEPEST = 8


def _width(xyz: Tensor, widths: Sequence[int]) -> int:
    """Of what comes out of the net."""
    return widths[-1] if widths else xyz.shape[-1]


def _fake_pointconv(
    xyz: Tensor,
    features: Tensor,
    centres: Tensor,
    neighbours: Tensor,
    scale: Tensor,
    net: Tensor,
    widths: Sequence[int],
    linear: Tensor,
    bias: Tensor,
) -> Tensor:
    channels = features.shape[-1] * _width(xyz, widths)
    out = linear.shape[0] if linear.dim() == 2 else channels
    return features.new_empty(*neighbours.shape[:2], out)


def _setup_pointconv(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.widths, linear, bias = inputs
    ctx.save_for_backward(*tensors, linear, bias)


def _backward_pointconv(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, linear, bias = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    coordinates = wanted[0] or wanted[2]
    grads = _POINTCONV_BACKWARD.like(ctx)(grad, *tensors, ctx.widths, linear, bias, coordinates)
    xyz, features, centres, scale, net, matrix, offset = grads
    places = (xyz, features, centres, None, scale, net, None, matrix, offset)
    return tuple(g if want else None for g, want in zip(places, wanted, strict=True))


def _fake_pointconv_backward(
    grad: Tensor,
    xyz: Tensor,
    features: Tensor,
    centres: Tensor,
    neighbours: Tensor,
    scale: Tensor,
    net: Tensor,
    widths: Sequence[int],
    linear: Tensor,
    bias: Tensor,
    wants_coordinates: bool,
) -> tuple[Tensor, ...]:
    places = (xyz, features, centres, scale, net, linear, bias)
    unwanted = () if wants_coordinates else (0, 2)
    return tuple(t.new_empty(0 if place in unwanted else t.shape) for place, t in enumerate(places))


_POINTCONV = Operator(
    "pointconv(Tensor xyz, Tensor features, Tensor centres, Tensor neighbours, Tensor scale,"
    " Tensor net, int[] widths, Tensor linear, Tensor bias) -> Tensor",
    reference=reference.pointconv_edges,
    fake=_fake_pointconv,
    triton="pointconv.pointconv",
    setup_context=_setup_pointconv,
    backward=_backward_pointconv,
    autocast="off",
)

_POINTCONV_BACKWARD = Operator(
    "pointconv_backward(Tensor grad, Tensor xyz, Tensor features, Tensor centres,"
    " Tensor neighbours, Tensor scale, Tensor net, int[] widths, Tensor linear, Tensor bias,"
    " bool wants_coordinates) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=reference.pointconv_backward,
    fake=_fake_pointconv_backward,
    has=("reference", "cpu", "triton"),
    triton="pointconv.pointconv_backward",
    differentiable_reference=True,
    autocast="off",
)


def _fake_moments(
    xyz: Tensor, centres: Tensor, neighbours: Tensor, net: Tensor, widths: Sequence[int]
) -> tuple[Tensor, Tensor]:
    width = _width(xyz, widths)
    return xyz.new_empty(width), xyz.new_empty(width, width)


def _setup_moments(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.widths = inputs
    ctx.save_for_backward(output[0], *tensors)


def _backward_moments(ctx: Any, grad_mean: Tensor, grad_cov: Tensor) -> tuple[Any, ...]:
    mean, *tensors = ctx.saved_tensors
    coordinates = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
    backward = _POINTCONV_MOMENTS_BACKWARD.like(ctx)
    xyz, centres, net = backward(grad_mean, grad_cov, mean, *tensors, ctx.widths, coordinates)
    places = (xyz, centres, None, net, None)
    return tuple(g if want else None for g, want in zip(places, ctx.needs_input_grad, strict=True))


def _fake_moments_backward(
    grad_mean: Tensor,
    grad_covariance: Tensor,
    mean: Tensor,
    xyz: Tensor,
    centres: Tensor,
    neighbours: Tensor,
    net: Tensor,
    widths: Sequence[int],
    wants_coordinates: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if not wants_coordinates:
        return xyz.new_empty(0), xyz.new_empty(0), net.new_empty(net.shape)
    return xyz.new_empty(xyz.shape), centres.new_empty(centres.shape), net.new_empty(net.shape)


_POINTCONV_MOMENTS = Operator(
    "pointconv_moments(Tensor xyz, Tensor centres, Tensor neighbours, Tensor net, int[] widths)"
    " -> (Tensor, Tensor)",
    reference=reference.pointconv_moments_edges,
    fake=_fake_moments,
    has=("reference", "cpu", "triton"),
    triton="pointconv.pointconv_moments",
    setup_context=_setup_moments,
    backward=_backward_moments,
    autocast=torch.float32,
)

_POINTCONV_MOMENTS_BACKWARD = Operator(
    "pointconv_moments_backward(Tensor grad_mean, Tensor grad_covariance, Tensor mean, Tensor xyz,"
    " Tensor centres, Tensor neighbours, Tensor net, int[] widths, bool wants_coordinates)"
    " -> (Tensor, Tensor, Tensor)",
    reference=reference.pointconv_moments_backward,
    fake=_fake_moments_backward,
    has=("reference", "cpu", "triton"),
    triton="pointconv.pointconv_moments_backward",
    differentiable_reference=True,
)


def _fake_reduce(
    features: Tensor, neighbours: Tensor, weights: Tensor, reduce: str
) -> tuple[Tensor, Tensor]:
    out = features.new_empty(*neighbours.shape[:2], features.shape[2])
    winner = features.new_empty(out.shape if reduce == "max" else (0,), dtype=torch.int32)
    return out, winner


def _setup_reduce(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    features, neighbours, weights, ctx.reduce = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(features, neighbours, weights, output[1])


def _backward_reduce(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    backward = _NEIGHBOUR_REDUCE_BACKWARD.like(ctx)
    grad_features, grad_weights = backward(grad, *ctx.saved_tensors, ctx.reduce)
    return grad_features, None, grad_weights if ctx.needs_input_grad[2] else None, None


def _fake_reduce_backward(
    grad: Tensor, features: Tensor, neighbours: Tensor, weights: Tensor, *_: Any
) -> tuple[Tensor, Tensor]:
    return features.new_empty(features.shape), weights.new_empty(weights.shape)


_NEIGHBOUR_REDUCE = Operator(
    "neighbour_reduce(Tensor features, Tensor neighbours, Tensor weights, str reduce)"
    " -> (Tensor, Tensor)",
    reference=reference.neighbour_reduce_rows,
    fake=_fake_reduce,
    has=("reference", "cpu", "triton"),
    triton="neighbour_reduce.neighbour_reduce",
    setup_context=_setup_reduce,
    backward=_backward_reduce,
    autocast="off",
)

_NEIGHBOUR_REDUCE_BACKWARD = Operator(
    "neighbour_reduce_backward(Tensor grad, Tensor features, Tensor neighbours, Tensor weights,"
    " Tensor winner, str reduce) -> (Tensor, Tensor)",
    reference=reference.neighbour_reduce_backward,
    fake=_fake_reduce_backward,
    has=("reference", "cpu", "triton"),
    triton="neighbour_reduce.neighbour_reduce_backward",
    differentiable_reference=True,
    autocast="off",
)


def pointconv(
    xyz: Tensor,
    features: Tensor,
    centres: Tensor,
    neighbours: Tensor,
    weight_net: WeightNet,
    density_scale: Tensor | None = None,
    linear: tuple[Tensor, Tensor | None] | None = None,
    *,
    form: str = "efficient",
    backend: str | None = None,
) -> Tensor:
    """PointConv: a convolution whose weights are a function of where the neighbour lies.

    ``e_s = sum_k scale_sk f_j m(x_j - c_s)^T`` over the neighbours j of centre s, with m the
    weight net, and ``out_s = linear vec(e_s) + bias``. The net is computed again wherever it is
    needed; neither a tensor of the edges' features nor one of ``e`` is kept, forward or backward.

    Args:
        xyz: ``[B, N, D]``; computed in float32 (float64 for float64 features).
        features: ``[B, N, C]`` of the points, or ``[B, S, K, C]`` of the edges; float32, float64,
            float16 or bfloat16, also the dtype of the products; sums are in float32 (float64).
        centres: ``[B, S, D]``.
        neighbours: int64 ``[B, S, K]``, rows of ``xyz``; -1 is none.
        weight_net: ``(weight [out, in], bias [out])`` of each layer, a ReLU after each; the first
            takes D coordinates; at most 8 layers of at most 64. None at all: m is ``x_j - c_s``.
        density_scale: ``[B, S, K]`` of the edges or ``[B, N]`` of the points, such as
            :func:`inverse_density_scale`; none: 1.
        linear: ``(weight [O, C M], bias [O] or None)`` over the pairs ``c M + m``. None: ``e``
            itself.
        form: ``efficient``; or ``full``: the net's last layer, without a ReLU, has ``C O`` outputs
            (``c O + o``), the weights of the convolution, and there is no ``linear``. Computed by
            the paper's Lemma 1, which is the same sum in the order of ``efficient``.
        backend: ``auto``, ``reference``, ``cpu``, ``cuda`` or ``triton``; None follows
            :func:`fastzoo.use_backend`.

    Returns:
        ``[B, S, O]`` or ``[B, S, C M]``, the dtype of ``features``; under autocast its dtype.

    Gradient: to every floating argument, of any order; added up in a fixed order. Forward-mode
    derivatives raise. Deterministic. Under autocast features and linear take the autocast dtype,
    coordinates and the net float32.

    Raises:
        TypeError, ValueError: an argument of the wrong kind; the message names it.
        RuntimeError: a forced backend that cannot run, with the reason.

    Source: Wu, Qi, Li, PointConv: Deep Convolutional Networks on 3D Point Clouds (2019), equation 3
    and Lemma 1.
    """
    check_choice("form", form, FORMS)
    _check_edges(xyz, centres, neighbours)
    grouped = isinstance(features, Tensor) and features.dim() == 4
    shape = "[B, N, C] or [B, S, K, C]"
    check_tensor("features", features, shape, 4 if grouped else 3)
    check_floating("features", features)
    expected = neighbours.shape if grouped else xyz.shape[:2]
    if features.shape[:-1] != expected or features.device != xyz.device:
        raise ValueError(
            f"features: expected {[*expected, 'C']} on {xyz.device}, got {list(features.shape)} "
            f"on {features.device}"
        )
    width = _check_net(weight_net, xyz, last=None if form == "efficient" else features.shape[-1])
    if density_scale is not None:
        check_tensor("density_scale", density_scale, "[B, S, K] or [B, N]", -1)
        if density_scale.shape not in (neighbours.shape, xyz.shape[:2]):
            raise ValueError(
                f"density_scale: expected {list(neighbours.shape)} or {list(xyz.shape[:2])}, "
                f"got {list(density_scale.shape)}"
            )
    if linear is not None:
        _check_linear(linear, features.shape[-1] * width, form)
    kind = xyz.device.type
    if torch.is_autocast_enabled(kind) and features.dtype != torch.float64:
        features = features.to(torch.get_autocast_dtype(kind))
    return pointconv_with(
        _POINTCONV.choose(backend, kind),
        group_beside(backend),
        xyz,
        features,
        centres,
        neighbours,
        weight_net,
        density_scale,
        linear,
        form=form,
    )


def pointconv_moments(
    xyz: Tensor,
    centres: Tensor,
    neighbours: Tensor,
    weight_net: WeightNet,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean and covariance of what the weight net makes of every edge, which no memory holds.

    With them a batch normalisation after the next layer folds into that layer: of ``W m + b`` the
    mean is ``W mean + b``, and the variance the diagonal of ``W covariance W^T``.

    Args:
        xyz, centres, neighbours, weight_net, backend: as :func:`pointconv` takes them; no layers
            at all: the moments of ``x_j - c_s``.

    Returns:
        ``(mean [M], covariance [M, M])``, divided by the number of edges; zeros where there are
        none. float32 (float64 for float64), accumulated in float64.

    Gradient: to xyz, centres and the net, of any order. Deterministic.

    Errors: as :func:`pointconv`.
    """
    _check_edges(xyz, centres, neighbours)
    _check_net(weight_net, xyz)
    kernel = _POINTCONV_MOMENTS.choose(backend, xyz.device.type)
    return moments_with(kernel, xyz, centres, neighbours, weight_net)


def neighbour_reduce(
    features: Tensor,
    idx: Tensor,
    weights: Tensor | None = None,
    reduce: str = "sum",
    *,
    backend: str | None = None,
) -> Tensor:
    """Sum, mean or maximum of the neighbours' rows, without a tensor of them.

    Args:
        features: ``[B, N, C]``; float32, float64, float16 or bfloat16.
        idx: int64 ``[B, S, K]``, rows of ``features``; -1 is none.
        weights: ``[B, S, K]``, of a sum alone.
        reduce: ``sum``, ``mean`` (over the neighbours that there are) or ``max`` (a NaN is the
            greatest; of equal rows the first in the list has the gradient).
        backend: ``auto``, ``reference``, ``cpu`` or ``triton``; None follows
            :func:`fastzoo.use_backend`.

    Returns:
        ``[B, S, C]``, the dtype of ``features``; 0 where there is no neighbour.

    Gradient: to features and weights, of any order, added up in a fixed order over the inverse
    list. Forward-mode derivatives raise. Deterministic.

    Raises:
        TypeError, ValueError: an argument of the wrong kind; the message names it.
        RuntimeError: a forced backend that cannot run, with the reason.
    """
    check_choice("reduce", reduce, REDUCTIONS)
    _check_rows("features", features, idx)
    if weights is not None:
        check_tensor("weights", weights, "[B, S, K]", 3)
        if weights.shape != idx.shape:
            raise ValueError(f"weights: expected {list(idx.shape)}, got {list(weights.shape)}")
        if reduce != "sum":
            raise ValueError(f"weights: expected with a sum alone, got reduce={reduce!r}")
    kernel = _NEIGHBOUR_REDUCE.choose(backend, features.device.type)
    return reduce_with(kernel, features, idx, weights, reduce)


def group_beside(backend: str | None) -> Callable[[Tensor, Tensor], Tensor]:
    """A gather of rows ``[B, N, C]`` or ``[N, C]`` for a function whose operator runs elsewhere."""

    def group(points: Tensor, idx: Tensor) -> Tensor:
        rows, places = (points, idx) if points.dim() == 3 else (points[None], idx[None])
        kernel = _NEIGHBOUR_REDUCE.beside(backend, points.device.type)
        return _group(kernel, rows, places).view(*idx.shape, rows.shape[-1])

    return group


def _group(kernel: Any, points: Tensor, idx: Tensor) -> Tensor:
    """A gather is a sum over one neighbour."""
    found = reduce_with(kernel, points, idx.flatten(1)[..., None])
    return found.view(*idx.shape, points.shape[-1])


def sum_at_neighbours(values: Tensor, neighbours: Tensor, points: Tensor) -> Tensor:
    """The values ``[B, S, C]`` of the centres, added up at each of their neighbours, in the shape
    of ``points [B, N, C]``: the transpose of a sum over neighbours."""
    kernel = _NEIGHBOUR_REDUCE_BACKWARD.beside(None, points.device.type)
    none = points.new_empty(0, dtype=compute_dtype(points))
    winner = neighbours.new_empty(0, dtype=torch.int32)
    found: Tensor = kernel(values, points, neighbours, none, winner, "sum")[0]
    return found


def group_points(points: Tensor, idx: Tensor, *, backend: str | None = None) -> Tensor:
    """The rows of ``points [B, N, C]`` at ``idx [B, S, K]``: ``[B, S, K, C]``, zeros at -1.

    Channels last; PointNet++'s ``group_points`` has them second. Where a sum, a maximum or a
    convolution follows, :func:`neighbour_reduce` and :func:`pointconv` need no such tensor.

    Gradient: to ``points``, added up in a fixed order over the inverse list.
    """
    _check_rows("points", points, idx)
    return _group(_NEIGHBOUR_REDUCE.choose(backend, points.device.type), points, idx)


def three_interpolate(
    features: Tensor, idx: Tensor, weight: Tensor, *, backend: str | None = None
) -> Tensor:
    """``sum_k weight_k features[idx_k]``: PointNet++'s feature propagation, channels last.

    Args:
        features: ``[B, M, C]``.
        idx: int64 ``[B, N, 3]`` of :func:`three_nn` (any number of neighbours).
        weight: ``[B, N, 3]``.

    Returns:
        ``[B, N, C]``.

    Gradient: to features and weight, of any order.
    """
    return neighbour_reduce(features, idx, weight, backend=backend)


def edge_features(x: Tensor, idx: Tensor, *, backend: str | None = None) -> Tensor:
    """``(x_i, x_j - x_i)`` of every edge of a graph, as DGCNN's EdgeConv takes them.

    Args:
        x: ``[B, N, C]``.
        idx: int64 ``[B, N, K]``: the neighbours of each point.

    Returns:
        ``[B, N, K, 2 C]``. :class:`fastzoo.nn.EdgeConv` needs no such tensor.

    Gradient: to ``x``, of any order.

    Source: Wang et al., Dynamic Graph CNN (2019), equation 7.
    """
    check_tensor("x", x, "[B, N, C]", 3)
    check_indices("idx", idx, "[B, N, K]", 3, x.device)
    if idx.shape[:2] != x.shape[:2]:
        raise ValueError(f"idx: expected {[*x.shape[:2], 'K']}, got {list(idx.shape)}")

    def group(points: Tensor, neighbours: Tensor) -> Tensor:
        return group_points(points, neighbours, backend=backend)

    return edges_with(group, x, idx)


def _check_rows(name: str, features: Tensor, idx: Tensor) -> None:
    check_tensor(name, features, "[B, N, C]", 3)
    check_floating(name, features)
    check_indices("idx", idx, "[B, S, K]", 3, features.device)
    if idx.shape[0] != features.shape[0]:
        raise ValueError(f"idx: expected {features.shape[0]} clouds, got {list(idx.shape)}")


def _check_edges(xyz: Tensor, centres: Tensor, neighbours: Tensor) -> None:
    check_tensor("xyz", xyz, "[B, N, D]", 3)
    check_tensor("centres", centres, "[B, S, D]", 3)
    check_floating("xyz", xyz)
    check_same("xyz", xyz, "centres", centres)
    if xyz.shape[2] == 0:
        raise ValueError(f"xyz: expected at least one dimension, got {list(xyz.shape)}")
    if centres.shape[0] != xyz.shape[0] or centres.shape[2] != xyz.shape[2]:
        raise ValueError(
            f"centres: expected [{xyz.shape[0]}, S, {xyz.shape[2]}] like xyz, "
            f"got {list(centres.shape)}"
        )
    check_indices("neighbours", neighbours, "[B, S, K]", 3, xyz.device)
    if neighbours.shape[:2] != centres.shape[:2]:
        raise ValueError(
            f"neighbours: expected {[*centres.shape[:2], 'K']}, got {list(neighbours.shape)}"
        )


def _check_net(weight_net: WeightNet, xyz: Tensor, last: int | None = None) -> int:
    """Every layer takes what the one before it gives; returns what the last one gives."""
    if isinstance(weight_net, Tensor) or not isinstance(weight_net, Sequence):
        raise TypeError(
            f"weight_net: expected a sequence of (weight, bias), got {type(weight_net).__name__}"
        )
    # The full form's constant is one more output.
    width, limit = xyz.shape[2], WIDEST - (last is not None)
    if last is not None and not weight_net:
        raise ValueError("weight_net: expected the layer of the weights, got none")
    if len(weight_net) > DEEPEST:
        raise ValueError(f"weight_net: expected at most {DEEPEST} layers, got {len(weight_net)}")
    for place, layer in enumerate(weight_net):
        name = f"weight_net[{place}]"
        if not isinstance(layer, tuple | list) or len(layer) != 2:
            raise TypeError(f"{name}: expected (weight, bias), got {type(layer).__name__}")
        weight, bias = layer
        check_tensor(f"{name} weight", weight, "[out, in]", 2)
        check_tensor(f"{name} bias", bias, "[out]", 1)
        if weight.shape[1] != width or bias.shape[0] != weight.shape[0]:
            raise ValueError(
                f"{name}: expected weight [out, {width}] and bias [out], "
                f"got {list(weight.shape)} and {list(bias.shape)}"
            )
        if weight.device != xyz.device or bias.device != xyz.device:
            raise ValueError(f"{name}: expected device {xyz.device}, got {weight.device}")
        if last is not None and place == len(weight_net) - 1:
            if last == 0 or weight.shape[0] % last:
                raise ValueError(
                    f"{name}: expected a multiple of {last} outputs, the channels of features, "
                    f"got {weight.shape[0]}"
                )
        elif not 1 <= weight.shape[0] <= limit:
            raise ValueError(f"{name}: expected 1 to {limit} outputs, got {weight.shape[0]}")
        width = weight.shape[0]
    return width


def _check_linear(linear: tuple[Tensor, Tensor | None], inputs: int, form: str) -> None:
    if form == "full":
        raise ValueError("linear: expected none in the full form, whose net has the weights")
    if not isinstance(linear, tuple | list) or len(linear) != 2:
        raise TypeError(f"linear: expected (weight, bias), got {type(linear).__name__}")
    weight, bias = linear
    check_tensor("linear weight", weight, "[O, C M]", 2)
    if weight.shape[1] != inputs:
        raise ValueError(f"linear: expected weight [O, {inputs}], got {list(weight.shape)}")
    if bias is not None:
        check_tensor("linear bias", bias, "[O]", 1)
        if bias.shape[0] != weight.shape[0]:
            raise ValueError(f"linear: expected bias [{weight.shape[0]}], got {list(bias.shape)}")
