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
from fastzoo.reference.precision import compute_dtype

# Numbers that the edges of one part have in their widest layer, where edges are computed again.
_PART = 1 << 21


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
    edges = valid.sum(-1, keepdim=True).double()
    first = torch.arange(len(neighbours), device=neighbours.device) * points.shape[1]
    rows = neighbours.clamp(min=0) + first[:, None, None]
    degree = torch.zeros(points.shape[:2].numel(), dtype=torch.int64, device=points.device)
    degree.scatter_add_(0, rows.flatten(), valid.flatten().long())
    uses = degree.view(*points.shape[:2], 1).double()
    count = edges.sum()
    total = count.clamp(min=1)
    points, centres = points.double(), centres.double()
    point_mean = (uses * points).sum((0, 1)) / total
    centre_mean = (edges * centres).sum((0, 1)) / total
    # Each about its own mean, in double: the two nearly cancel where neighbourhoods are small.
    points, centres = points - point_mean, centres - centre_mean
    sums = ops.neighbour_reduce(points, neighbours, reduce="sum")
    squares = (uses * points.square()).sum((0, 1)) + (centres * (edges * centres + 2 * sums)).sum(
        (0, 1)
    )
    return Moments(point_mean + centre_mean, (squares / total).clamp(min=0), count)


def normalised_sums(
    points: Tensor, centres: Tensor, neighbours: Tensor, norm: _BatchNorm
) -> tuple[Tensor, Tensor]:
    """``points`` and ``centres`` whose sums at the edges are those of the given, normalised."""
    batch = None
    if uses_batch(norm):
        mean, variance, number = moments_of_sums(points, centres, neighbours)
        dtype = compute_dtype(points)
        batch = Moments(mean.to(dtype), variance.to(dtype), number)
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
    step = max(1, _PART // max(1, batch * k * max(norm.num_features for _, norm in network)))
    parts = [slice(start, start + step) for start in range(0, max(1, number), step)]
    layers: tuple[Layer, ...] = ()
    for conv, norm in network[1:]:
        found = None
        if uses_batch(norm):
            found = together([Moments(*_again(edges.moments, part, layers)) for part in parts])
        layers += (fold(conv, norm, found),)
    return torch.cat([_again(edges.finished, finish, part, layers) for part in parts], 1)


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


def _again(call: Callable[..., Any], *args: Any) -> Any:
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
