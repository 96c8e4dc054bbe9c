"""A small network over the edges of neighbour lists, with batch normalisation after each layer.

Its first layer is linear in the neighbour and in the centre, so it is a product for each point and
one for each centre, added up at the edges. Later layers are folded with their normalisation
(:mod:`fastzoo.nn._batch_norm`): one tensor of edges is kept for each, or none where edges are
computed again.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from fastzoo import ops
from fastzoo.nn._batch_norm import (
    Layer,
    Moments,
    Stage,
    fold,
    moments,
    scale_and_shift,
    together,
    uses_batch,
    weight_and_bias,
)
from fastzoo.ops.pointconv import sum_at_neighbours
from fastzoo.reference.precision import compute_dtype

# Numbers that the edges of one part have in their widest layer, where edges are computed again.
_PART = 1 << 19
# Channels whose sums are made in double at a time.
_BLOCK = 16


Finish = Callable[[Tensor, slice], Tensor]


def linear(h: Tensor, layer: Layer) -> Tensor:
    """A folded layer, in the dtype of what it reads."""
    weight, bias = layer
    return F.linear(h, weight.to(h.dtype), bias.to(h.dtype))


def activate_(z: Tensor, slope: float) -> Tensor:
    """ReLU in place; with a slope below 0, leaky."""
    return F.leaky_relu_(z, slope) if slope else F.relu_(z)


def centred(xyz: Tensor) -> Tensor:
    """The mean of each cloud ``[B, 1, D]``, without gradient: differences are not affected, and
    products of what is left lose nothing to a large offset."""
    return xyz.detach().mean(1, keepdim=True)


def relative_layer(
    conv: nn.Module, xyz: Tensor, features: Tensor | None, centres: Tensor
) -> tuple[Tensor, Tensor]:
    """A layer over ``(x_j - c_s, f_j)``, as what points ``[B, N, O]`` and centres ``[B, S, O]`` add
    to each edge."""
    weight, bias = weight_and_bias(conv)
    dim, middle = xyz.shape[-1], centred(xyz)
    toward = weight[:, :dim]
    points = F.linear(xyz - middle, toward, bias)
    if features is not None:
        points = points + F.linear(features, weight[:, dim:])
    return points, F.linear(middle - centres, toward)


def moments_of_sums(points: Tensor, centres: Tensor, neighbours: Tensor) -> Moments:
    """Mean and variance of ``points[j] + centres[s]`` over the edges, of which none is made."""
    valid = neighbours >= 0
    first = torch.arange(len(neighbours), device=neighbours.device) * points.shape[1]
    rows = neighbours.clamp(min=0) + first[:, None, None]
    uses = torch.zeros(points.shape[:2].numel(), dtype=torch.int64, device=points.device)
    uses.scatter_add_(0, rows.flatten(), valid.flatten().long())
    number = valid.sum(dtype=torch.float64)
    mean, variance = _SumMoments.apply(  # type: ignore[no-untyped-call]
        points,
        centres,
        neighbours,
        uses.view(*points.shape[:2], 1),
        valid.sum(-1, keepdim=True),
        number.clamp(min=1),
    )
    return Moments(mean, variance, number)


class _SumMoments(torch.autograd.Function):
    """Points ``[B, N, C]``, of which each is used by some edges, and centres ``[B, S, C]``, each
    with some edges: both numbers ``[..., 1]``."""

    @staticmethod
    def forward(
        ctx: Any,
        points: Tensor,
        centres: Tensor,
        neighbours: Tensor,
        uses: Tensor,
        edges: Tensor,
        number: Tensor,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(points, centres, neighbours, uses, edges, number)
        found = [
            _sum_moments(u.double(), v.double(), neighbours, uses, edges, number)
            for u, v in zip(points.split(_BLOCK, 2), centres.split(_BLOCK, 2), strict=True)
        ]
        mean, variance = (
            torch.cat(parts).to(compute_dtype(points)) for parts in zip(*found, strict=True)
        )
        return mean, variance

    @staticmethod
    def backward(ctx: Any, grad_mean: Tensor, grad_variance: Tensor) -> tuple[Tensor | None, ...]:
        points, centres, neighbours, uses, edges, number = ctx.saved_tensors
        dtype = compute_dtype(points)
        share = (1 / number).to(dtype)
        own_points, own_centres = points.to(dtype), centres.to(dtype)
        own_points = own_points - (uses * own_points).sum((0, 1)) * share
        own_centres = own_centres - (edges * own_centres).sum((0, 1)) * share
        # What lies at the other ends of a point's edges, and of a centre's.
        at_points = sum_at_neighbours(own_centres, neighbours, own_points)
        at_centres = ops.neighbour_reduce(own_points, neighbours)
        grad_mean, twice = grad_mean * share, 2 * grad_variance * share
        to_points = uses * (grad_mean + twice * own_points) + twice * at_points
        to_centres = edges * (grad_mean + twice * own_centres) + twice * at_centres
        return to_points.to(points.dtype), to_centres.to(centres.dtype), *(None,) * 4


def _sum_moments(
    points: Tensor,
    centres: Tensor,
    neighbours: Tensor,
    uses: Tensor,
    edges: Tensor,
    number: Tensor,
) -> tuple[Tensor, Tensor]:
    """Each about its own mean, in double: where neighbourhoods are small the two nearly cancel."""
    point_mean = (uses * points).sum((0, 1)) / number
    centre_mean = (edges * centres).sum((0, 1)) / number
    points, centres = points - point_mean, centres - centre_mean
    crossed = 2 * ops.neighbour_reduce(points, neighbours) + edges * centres
    squares = (uses * points.square()).sum((0, 1)) + (centres * crossed).sum((0, 1))
    return point_mean + centre_mean, (squares / number).clamp(min=0)


def normalised_sums(
    points: Tensor, centres: Tensor, neighbours: Tensor, norm: _BatchNorm
) -> tuple[Tensor, Tensor]:
    """``points`` and ``centres`` whose sums at the edges are those of the given, normalised."""
    batch = None
    if uses_batch(norm):
        batch = moments_of_sums(points, centres, neighbours)
    scale, shift = scale_and_shift(norm, batch)
    return (points * scale).to(points.dtype), (centres * scale + shift).to(centres.dtype)


def over_edges(
    points: Tensor,
    centres: Tensor,
    neighbours: Tensor,
    network: Sequence[Stage],
    finish: Finish,
    *,
    slope: float = 0.0,
    complete: bool = False,
    recompute: bool = False,
) -> Tensor:
    """``finish`` of the last layer's values, before their activation.

    Args:
        points, centres: ``[B, N, C]`` and ``[B, S, C]``, whose sums at the edges the first layer
            gives.
        network: its layers; of the first only the normalisation is left to do.
        finish: from ``[B, s, K, O]``, which it may overwrite, and which of the centres these are,
            to ``[B, s, ...]``.
        slope: of the leaky ReLU between layers.
        complete: no neighbour is -1.
        recompute: keep no edges; a backward computes them again, part by part of the centres.
    """
    points, centres = normalised_sums(points, centres, neighbours, network[0][1])
    valid = None if complete else neighbours >= 0
    edges = _Edges(points, centres, neighbours, valid, slope)
    if not recompute:
        every = slice(None)
        z = edges.at(every, ())
        for conv, norm in network[1:]:
            h = activate_(z, slope)
            layer = fold(conv, norm, moments(h, valid) if uses_batch(norm) else None)
            z = linear(h, layer)
        return finish(z, every)

    batch, number, k = neighbours.shape
    # Each part's gradient is as large as the points', so the parts are not many times smaller.
    size = max(_PART, 2 * points.numel())
    step = max(1, size // max(1, batch * k * max(norm.num_features for _, norm in network)))
    parts = [slice(start, start + step) for start in range(0, max(1, number), step)]
    layers: tuple[Layer, ...] = ()
    for conv, norm in network[1:]:
        found = None
        if uses_batch(norm):
            found = together([Moments(*again(edges.moments, part, layers)) for part in parts])
        layers += (fold(conv, norm, found),)
    return torch.cat([again(edges.finished, finish, part, layers) for part in parts], 1)


@dataclasses.dataclass(frozen=True)
class _Edges:
    """Sums of points and centres at the edges, and layers over them; ``valid`` marks the edges."""

    points: Tensor
    centres: Tensor
    neighbours: Tensor
    valid: Tensor | None
    slope: float

    def at(self, part: slice, layers: tuple[Layer, ...]) -> Tensor:
        """The last of the layers before its activation, ``[B, s, K, C]``."""
        z = ops.group_points(self.points, self.neighbours[:, part])
        z = z + self.centres[:, part, None]
        for layer in layers:
            z = linear(activate_(z, self.slope), layer)
        return z

    def moments(self, part: slice, layers: tuple[Layer, ...]) -> tuple[Tensor, Tensor, Tensor]:
        h = activate_(self.at(part, layers), self.slope)
        return moments(h, None if self.valid is None else self.valid[:, part])

    def finished(self, finish: Finish, part: slice, layers: tuple[Layer, ...]) -> Tensor:
        return finish(self.at(part, layers), part)


def again(call: Callable[..., Any], *args: Any) -> Any:
    """The call, which keeps nothing for its gradient but what it was given."""
    return checkpoint(call, *args, use_reentrant=False, preserve_rng_state=False)


def max_over_edges(
    points: Tensor,
    centres: Tensor,
    neighbours: Tensor,
    network: Sequence[Stage],
    *,
    slope: float = 0.0,
    complete: bool = False,
    recompute: bool = False,
) -> Tensor:
    """The greatest output of the network over each centre's edges, ``[B, S, O]``; 0 without any.

    The activation rises, so it is applied to the greatest value alone; and with one layer that is
    the centre's own part and the greatest of its neighbours'.
    """
    none = None if complete else (neighbours < 0).all(-1, keepdim=True)
    if len(network) == 1:
        points, centres = normalised_sums(points, centres, neighbours, network[0][1])
        z = ops.neighbour_reduce(points, neighbours, reduce="max") + centres
    else:

        def greatest(z: Tensor, part: slice) -> Tensor:
            if not complete:
                z = z.masked_fill((neighbours[:, part] < 0)[..., None], -torch.inf)
            return z.max(2).values

        z = over_edges(
            points,
            centres,
            neighbours,
            network,
            greatest,
            slope=slope,
            complete=complete,
            recompute=recompute,
        )
    if none is not None:
        z = torch.where(none, 0, z)
    return activate_(z, slope)
