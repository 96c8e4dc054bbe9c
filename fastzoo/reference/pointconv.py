"""Aggregation over a list of neighbours by the definition: every edge in memory."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastzoo.reference.clouds import rows_at
from fastzoo.reference.neighbours import distances_of, knn_points
from fastzoo.reference.precision import compute_dtype

WeightNet = Sequence[tuple[Tensor, Tensor]]


def _layers(net: Tensor, widths: Sequence[int], dim: int) -> list[tuple[Tensor, Tensor]]:
    """Weight ``[out, in]`` and bias ``[out]`` of each layer, as they lie one after the other."""
    layers, place = [], 0
    for width in widths:
        weight = net[place : place + width * dim].view(width, dim)
        bias = net[place + width * dim : place + width * dim + width]
        layers.append((weight, bias))
        place, dim = place + width * dim + width, width
    return layers


def _relative(xyz: Tensor, centres: Tensor, neighbours: Tensor) -> Tensor:
    return rows_at(xyz, neighbours) - centres[:, :, None]


def _activations(
    relative: Tensor, net: Tensor, widths: Sequence[int]
) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
    """What goes into each layer and what comes out of the last, and the layers."""
    layers = _layers(net, widths, relative.shape[-1])
    hidden = [relative]
    for weight, bias in layers:
        hidden.append(torch.relu(hidden[-1] @ weight.t() + bias))
    return hidden, layers


def _through_net(
    grad: Tensor, hidden: list[Tensor], layers: list[tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Gradients to the relative coordinates and to the net, of one to its output."""
    grads: list[Tensor] = []
    for (weight, _), before, after in zip(
        reversed(layers), reversed(hidden[:-1]), reversed(hidden[1:]), strict=True
    ):
        grad = torch.where(after > 0, grad, 0)
        rows = grad.flatten(0, -2)
        grads = [(rows.t() @ before.flatten(0, -2)).flatten(), rows.sum(0), *grads]
        grad = grad @ weight
    empty = grad.new_zeros(0)
    return grad, torch.cat([empty, *grads])


def _sum_by_row(values: Tensor, neighbours: Tensor, points: int) -> Tensor:
    """``values [B, S, K, C]`` of the edges, added up at their neighbours: ``[B, points, C]``."""
    clouds, channels = len(values), values.shape[-1]
    first = torch.arange(clouds, device=values.device)[:, None, None] * points
    valid = neighbours >= 0
    rows = torch.where(valid, neighbours + first, 0).flatten()
    kept = torch.where(valid[..., None], values, 0).flatten(0, -2)
    sums = values.new_zeros(clouds * points, channels)
    if clouds * points == 0:
        return sums.view(clouds, points, channels)
    return sums.index_add(0, rows, kept).view(clouds, points, channels)


def _edge_weights(scale: Tensor, neighbours: Tensor, dtype: torch.dtype) -> Tensor:
    valid = (neighbours >= 0).to(dtype)
    return valid if scale.dim() == 1 else torch.where(neighbours >= 0, scale.to(dtype), 0)


def _edge_features(features: Tensor, neighbours: Tensor) -> Tensor:
    return features if features.dim() == 4 else rows_at(features, neighbours)


def pointconv_edges(
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
    """``out_s = linear vec(sum_k scale_sk f_j net(x_j - c_s)^T) + bias`` over the neighbours."""
    dtype = compute_dtype(features)
    hidden, _ = _activations(_relative(xyz, centres, neighbours).to(dtype), net.to(dtype), widths)
    weighted = hidden[-1] * _edge_weights(scale, neighbours, dtype)[..., None]
    listed = torch.where(
        neighbours[..., None] < 0, 0, _edge_features(features.to(dtype), neighbours)
    )
    out = (listed.transpose(2, 3) @ weighted).flatten(2)
    if linear.dim() == 2:
        out = out @ linear.to(dtype).t()
    if bias.numel():
        out = out + bias.to(dtype)
    return out.to(features.dtype)


def pointconv_backward(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients to xyz, features, centres, scale, net, linear and bias; differentiable itself."""
    dtype = compute_dtype(features)
    relative = _relative(xyz, centres, neighbours).to(dtype)
    hidden, layers = _activations(relative, net.to(dtype), widths)
    share = _edge_weights(scale, neighbours, dtype)[..., None]
    listed = torch.where(
        neighbours[..., None] < 0, 0, _edge_features(features.to(dtype), neighbours)
    )
    grad = grad.to(dtype)
    channels, mid = listed.shape[-1], hidden[-1].shape[-1]
    grad_sums = grad @ linear.to(dtype) if linear.dim() == 2 else grad
    grad_sums = grad_sums.unflatten(2, (channels, mid))
    toward = hidden[-1] @ grad_sums.transpose(2, 3)  # [B, S, K, C]
    grad_edges = share * toward
    if features.dim() == 4:
        grad_features = torch.where(neighbours[..., None] < 0, 0, grad_edges)
    else:
        grad_features = _sum_by_row(grad_edges, neighbours, features.shape[1])
    pulled = listed @ grad_sums  # [B, S, K, M]
    grad_relative, grad_net = _through_net(share * pulled, hidden, layers)
    empty = grad.new_empty(0)
    grad_xyz = grad_centres = grad_scale = empty.to(xyz.dtype)
    if wants_coordinates:
        grad_xyz = _sum_by_row(grad_relative, neighbours, xyz.shape[1]).to(xyz.dtype)
        grad_centres = -torch.where(neighbours[..., None] < 0, 0, grad_relative).sum(2)
        grad_centres = grad_centres.to(centres.dtype)
    if scale.dim() == 3:
        grad_scale = (pulled * hidden[-1]).sum(-1)
        grad_scale = torch.where(neighbours < 0, 0, grad_scale).to(scale.dtype)
    grad_linear = grad_bias = empty.to(features.dtype)
    if linear.dim() == 2:
        sums = (listed.transpose(2, 3) @ (hidden[-1] * share)).flatten(2)
        grad_linear = (grad.flatten(0, 1).t() @ sums.flatten(0, 1)).to(linear.dtype)
    if bias.numel():
        grad_bias = grad.sum((0, 1)).to(bias.dtype)
    return (
        grad_xyz,
        grad_features.to(features.dtype),
        grad_centres,
        grad_scale,
        grad_net.to(net.dtype),
        grad_linear,
        grad_bias,
    )


def pointconv_moments_edges(
    xyz: Tensor, centres: Tensor, neighbours: Tensor, net: Tensor, widths: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Mean ``[M]`` and covariance ``[M, M]`` of the net's output over every edge."""
    relative = _relative(xyz, centres, neighbours).double()
    out = _activations(relative, net.double(), widths)[0][-1]
    valid = (neighbours >= 0)[..., None]
    count = valid.sum().clamp(min=1)
    mean = torch.where(valid, out, 0).sum((0, 1, 2)) / count
    apart = torch.where(valid, out - mean, 0).flatten(0, -2)
    return mean.to(xyz.dtype), (apart.t() @ apart / count).to(xyz.dtype)


def pointconv_moments_backward(
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
    """Gradients to xyz, centres and net; differentiable itself."""
    relative = _relative(xyz, centres, neighbours).double()
    hidden, layers = _activations(relative, net.double(), widths)
    valid = (neighbours >= 0)[..., None]
    count = valid.sum().clamp(min=1)
    # Formed again of the output, since a derivative of this gradient moves it.
    centre = torch.where(valid, hidden[-1], 0).sum((0, 1, 2)) / count
    both = grad_covariance.double() + grad_covariance.double().t()
    grad = (grad_mean.double() + (hidden[-1] - centre) @ both) / count
    grad_relative, grad_net = _through_net(torch.where(valid, grad, 0), hidden, layers)
    empty = xyz.new_empty(0)
    if not wants_coordinates:
        return empty, empty, grad_net.to(net.dtype)
    grad_relative = torch.where(valid, grad_relative, 0)
    grad_xyz = _sum_by_row(grad_relative, neighbours, xyz.shape[1])
    return grad_xyz.to(xyz.dtype), -grad_relative.sum(2).to(centres.dtype), grad_net.to(net.dtype)


def neighbour_reduce_rows(
    features: Tensor, neighbours: Tensor, weights: Tensor, reduce: str
) -> tuple[Tensor, Tensor]:
    """``sum_k w_k f_j`` or ``max_k f_j`` over the neighbours; of ``max`` also the rows that won."""
    valid = (neighbours >= 0)[..., None]
    listed = rows_at(features.to(compute_dtype(features)), neighbours)
    none = torch.empty(0, dtype=torch.int32, device=features.device)
    if reduce == "sum":
        terms = listed if weights.dim() == 1 else weights.to(listed.dtype)[..., None] * listed
        return torch.where(valid, terms, 0).sum(2).to(features.dtype), none
    if neighbours.shape[2] == 0:
        shape = (*neighbours.shape[:2], features.shape[2])
        return features.new_zeros(shape), none.new_full(shape, -1)
    masked = torch.where(valid, listed, -torch.inf)
    best = masked.detach().amax(2, keepdim=True)
    # A NaN is the greatest; the first of equals wins.
    wins = ((masked == best) | (masked.isnan() & best.isnan())) & valid
    place = wins.to(torch.int8).argmax(2, keepdim=True)
    row = neighbours[..., None].expand(masked.shape).gather(2, place)
    winner = torch.where(wins.any(2, keepdim=True), row, -1)[:, :, 0]
    out = torch.where(winner < 0, 0, listed.gather(2, place)[:, :, 0])
    return out.to(features.dtype), winner.int()


def neighbour_reduce_backward(
    grad: Tensor,
    features: Tensor,
    neighbours: Tensor,
    weights: Tensor,
    winner: Tensor,
    reduce: str,
) -> tuple[Tensor, Tensor]:
    """Gradients to features and weights; differentiable itself."""
    dtype = compute_dtype(features)
    points = features.shape[1]
    wide = grad.to(dtype)
    empty = torch.empty(0, dtype=weights.dtype, device=grad.device)
    if reduce == "max":
        if points == 0:
            return torch.zeros_like(features), empty
        kept = torch.where(winner < 0, 0, wide)
        sums = torch.zeros_like(features, dtype=dtype)
        sums = sums.scatter_add(1, winner.clamp(min=0).long(), kept)
        return sums.to(features.dtype), empty
    each = wide[:, :, None].expand(*neighbours.shape, wide.shape[-1])
    if weights.dim() == 1:
        return _sum_by_row(each, neighbours, points).to(features.dtype), empty
    grad_features = _sum_by_row(weights[..., None] * each, neighbours, points)
    listed = rows_at(features.to(dtype), neighbours)
    grad_weights = torch.where(neighbours < 0, 0, (listed * each).sum(-1))
    return grad_features.to(features.dtype), grad_weights.to(weights.dtype)


def as_net(weight_net: WeightNet, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The layers' tensors one after the other."""
    parts = [tensor.reshape(-1).to(dtype) for layer in weight_net for tensor in layer]
    return torch.cat(parts) if parts else torch.empty(0, dtype=dtype, device=device)


def pointconv(xyz: Tensor, features: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """See :func:`fastzoo.ops.pointconv`."""
    return pointconv_with(pointconv_edges, group_points, xyz, features, *args, **kwargs)


def pointconv_with(
    aggregate: Callable[..., Tensor],
    group: Callable[[Tensor, Tensor], Tensor],
    xyz: Tensor,
    features: Tensor,
    centres: Tensor,
    neighbours: Tensor,
    weight_net: WeightNet,
    density_scale: Tensor | None = None,
    linear: tuple[Tensor, Tensor | None] | None = None,
    *,
    form: str = "efficient",
) -> Tensor:
    """``pointconv`` by any kernels."""
    dtype = compute_dtype(features)
    channels = features.shape[-1]
    none = torch.empty(0, dtype=dtype, device=xyz.device)
    scale = none if density_scale is None else density_scale.to(dtype)
    if scale.dim() == 2:
        scale = group(scale[..., None], neighbours)[..., 0]
    if form == "full":
        weight_net, linear = _lemma(weight_net, channels)
    matrix, bias = (none, None) if linear is None else linear
    return aggregate(
        xyz.to(dtype),
        features,
        centres.to(dtype),
        neighbours,
        scale,
        as_net(weight_net, dtype, xyz.device),
        [weight.shape[0] for weight, _ in weight_net],
        matrix.to(features.dtype),
        (none if bias is None else bias).to(features.dtype),
    )


def _lemma(
    weight_net: WeightNet, channels: int
) -> tuple[list[tuple[Tensor, Tensor]], tuple[Tensor, None]]:
    """A net without its last layer, and the linear that this layer becomes.

    ``sum_k s_k sum_c f_kc (A h_k + a)_co`` is ``sum_cm A_com e_cm`` with a last h that is always 1
    for ``a``: the layer comes out of the sum over the neighbours (the paper's Lemma 1).
    """
    *before, (last, offset) = weight_net
    out = last.shape[0] // channels
    if not before:
        # The coordinates themselves, which are not cut off at zero: x = relu(x) - relu(-x).
        unit = torch.eye(last.shape[1], dtype=last.dtype, device=last.device)
        before = [(torch.cat([unit, -unit]), last.new_zeros(2 * len(unit)))]
        last = torch.cat([last, -last], 1)
    weight, bias = before.pop()
    constant = torch.cat([weight, weight.new_zeros(1, weight.shape[1])])
    before.append((constant, torch.cat([bias, bias.new_ones(1)])))
    matrix = torch.cat([last, offset[:, None]], 1).view(channels, out, -1)
    return before, (matrix.transpose(0, 1).reshape(out, -1), None)


def pointconv_moments(
    xyz: Tensor, centres: Tensor, neighbours: Tensor, weight_net: WeightNet
) -> tuple[Tensor, Tensor]:
    """See :func:`fastzoo.ops.pointconv_moments`."""
    return moments_with(pointconv_moments_edges, xyz, centres, neighbours, weight_net)


def moments_with(
    moments: Callable[..., tuple[Tensor, Tensor]],
    xyz: Tensor,
    centres: Tensor,
    neighbours: Tensor,
    weight_net: WeightNet,
) -> tuple[Tensor, Tensor]:
    """``pointconv_moments`` by any kernel."""
    dtype = compute_dtype(xyz)
    net = as_net(weight_net, dtype, xyz.device)
    widths = [weight.shape[0] for weight, _ in weight_net]
    return moments(xyz.to(dtype), centres.to(dtype), neighbours, net, widths)


def neighbour_reduce(
    features: Tensor, idx: Tensor, weights: Tensor | None = None, reduce: str = "sum"
) -> Tensor:
    """See :func:`fastzoo.ops.neighbour_reduce`."""
    return reduce_with(neighbour_reduce_rows, features, idx, weights, reduce)


def reduce_with(
    kernel: Callable[..., tuple[Tensor, Tensor]],
    features: Tensor,
    idx: Tensor,
    weights: Tensor | None = None,
    reduce: str = "sum",
) -> Tensor:
    """``neighbour_reduce`` by any kernel."""
    dtype = compute_dtype(features)
    if reduce == "mean":
        valid = (idx >= 0).to(dtype)
        weights, reduce = valid / valid.sum(-1, keepdim=True).clamp(min=1), "sum"
    if weights is None:
        weights = torch.empty(0, dtype=dtype, device=features.device)
    return kernel(features, idx, weights.to(dtype), reduce)[0]


def group_points(points: Tensor, idx: Tensor) -> Tensor:
    """See :func:`fastzoo.ops.group_points`."""
    return rows_at(points, idx)


def three_interpolate(features: Tensor, idx: Tensor, weight: Tensor) -> Tensor:
    """See :func:`fastzoo.ops.three_interpolate`."""
    return neighbour_reduce(features, idx, weight)


def three_nn(unknown: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """See :func:`fastzoo.ops.three_nn`."""
    found = knn_points(unknown, known, K=3)
    return distances_of(found.dists), found.idx


def edge_features(x: Tensor, idx: Tensor) -> Tensor:
    """See :func:`fastzoo.ops.edge_features`."""
    return edges_with(group_points, x, idx)


def edges_with(group: Callable[[Tensor, Tensor], Tensor], x: Tensor, idx: Tensor) -> Tensor:
    """``edge_features`` by any gather."""
    own = x[:, :, None].expand(*idx.shape, x.shape[-1])
    return torch.cat([own, group(x, idx) - own], -1)
