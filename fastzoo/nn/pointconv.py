"""Convolution over points, whose weights are a function of relative coordinates."""

import itertools
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastzoo import ops
from fastzoo.nn._batch_norm import (
    Layer,
    Moments,
    Stage,
    fold,
    moments,
    stages,
    uses_batch,
    weight_and_bias,
)
from fastzoo.nn._edge_mlp import again, linear, over_edges, relative_layer
from fastzoo.nn.set_abstraction import _Abstraction, interpolate
from fastzoo.ops._checks import check_choice, check_floating, check_tensor
from fastzoo.reference.density import scale_and_volume

Mode = Literal["paper", "compat"]
_MODES = ("paper", "compat")


def _folded(
    network: Sequence[Stage], xyz: Tensor, centres: Tensor, neighbours: Tensor
) -> list[Layer]:
    """The layers with their normalisation over the edges, of which none is kept: each layer's
    moments are a pass over the neighbour lists, which computes the layers before again."""
    net: list[Layer] = []
    for conv, norm in network:
        inputs = None
        if uses_batch(norm):
            count = (neighbours >= 0).sum(dtype=torch.float64)
            inputs = Moments(*ops.pointconv_moments(xyz, centres, neighbours, net), count)
        net.append(fold(conv, norm, inputs))
    return net


class WeightNet(nn.Module):
    """The weights of an edge from its relative coordinates: layers with batch normalisation and
    ReLU after each.

    Args:
        in_channel: coordinates.
        out_channel: weights of an edge.
        hidden_unit: widths between.
    """

    def __init__(
        self, in_channel: int, out_channel: int, hidden_unit: Sequence[int] = (8, 8)
    ) -> None:
        super().__init__()
        widths = [in_channel, *hidden_unit, out_channel]
        self.mlp_convs = nn.ModuleList(nn.Conv2d(*pair, 1) for pair in itertools.pairwise(widths))
        self.mlp_bns = nn.ModuleList(nn.BatchNorm2d(width) for width in widths[1:])

    def forward(self, xyz: Tensor, centres: Tensor, neighbours: Tensor) -> list[Layer]:
        """Weight and bias of each layer, as :func:`fastzoo.ops.pointconv` takes them: normalised
        over the edges of ``neighbours [B, S, K]`` in training."""
        return _folded(stages(self.mlp_convs, self.mlp_bns), xyz, centres, neighbours)


class DensityNet(nn.Module):
    """The factor of an edge from its density.

    Args:
        hidden_unit: widths of the hidden layers.
        mode: ``paper``: reads the inverse density, relative to the greatest in the neighbourhood,
            and ends with a sigmoid. ``compat``: reads a point's density, and ends with batch
            normalisation and ReLU as its other layers do.
    """

    def __init__(self, hidden_unit: Sequence[int] = (8, 8), mode: Mode = "paper") -> None:
        super().__init__()
        check_choice("mode", mode, _MODES)
        self.mode = mode
        widths = [1, *hidden_unit, 1]
        self.mlp_convs = nn.ModuleList(nn.Conv1d(*pair, 1) for pair in itertools.pairwise(widths))
        normalised = widths[1:] if mode == "compat" else hidden_unit
        self.mlp_bns = nn.ModuleList(nn.BatchNorm1d(width) for width in normalised)

    def density(self, xyz: Tensor, bandwidth: float) -> Tensor:
        """What it reads of points ``[B, N, D]``: the kernel density estimate; in ``compat`` with
        2.5 bandwidths for its Gaussian's integral, in any dimension."""
        found = ops.kernel_density(xyz, bandwidth)
        if self.mode == "paper":
            return found
        wide = torch.tensor(bandwidth, dtype=torch.float64)
        _, volume = scale_and_volume(wide, "gaussian", xyz.shape[-1])
        return found * (volume.item() / (2.5 * bandwidth))

    def forward(self, density: Tensor, neighbours: Tensor) -> Tensor:
        """``density [B, N]`` of points and ``neighbours [B, S, K]``: factors ``[B, S, K]``, no
        narrower than float32."""
        with torch.autocast(density.device.type, enabled=False):
            if self.mode == "paper":
                return self._of_edges(ops.inverse_density_scale(density, neighbours), neighbours)
            x = density[..., None]
            for conv, norm in stages(self.mlp_convs, self.mlp_bns):
                layer = fold(conv, norm, moments(x) if uses_batch(norm) else None)
                x = F.relu(F.linear(x, *layer))
            return ops.group_points(x, neighbours)[..., 0]

    def _of_edges(self, scale: Tensor, neighbours: Tensor) -> Tensor:
        """The layers of a number for each edge, whose activations a gradient computes again; their
        moments are those of points on a line, each with itself alone as its neighbour."""
        own = torch.arange(scale.numel(), device=scale.device).view(neighbours.shape)
        lists = torch.where(neighbours < 0, -1, own).view(1, -1, 1)
        line = scale.reshape(1, -1, 1)
        origin = torch.zeros_like(line)
        net = _folded(stages(self.mlp_convs[:-1], self.mlp_bns), line, origin, lists)
        last = weight_and_bias(self.mlp_convs[-1])
        factors: Tensor = again(_sigmoid_of_layers, line, *net, last)
        return factors.view(scale.shape)


def _sigmoid_of_layers(x: Tensor, *layers: Layer) -> Tensor:
    for layer in layers[:-1]:
        x = F.relu_(linear(x, layer))
    return torch.sigmoid(linear(x, layers[-1]))


class PointConv(nn.Module):
    """A convolution over points: ``sum_k S(k) F(k) W(x_k - x)``, then a linear layer.

    W is a small network of relative coordinates, S one of the density, so that where points are
    dense each counts less. The weights of an edge are never of the size of its features times the
    outputs: of W's last layer but one there are ``mid`` numbers, and what is left is the linear
    layer (the paper's lemma).

    Args:
        in_channel, out_channel: C and O.
        nsample: neighbours; all where there are fewer points.
        dim: coordinates D.
        hidden, mid: widths of W, at most 64 each.
        density_hidden: widths of S's hidden layers; None: S is 1.
        bandwidth: of the kernel density estimate, where ``forward`` is given none.
        mode: of S, see :class:`DensityNet`.

    Gradients go to features, parameters, coordinates and density. Deterministic.

    Source: Wu et al., PointConv: Deep Convolutional Networks on 3D Point Clouds (2019).
    """

    def __init__(
        self,
        in_channel: int,
        out_channel: int,
        nsample: int = 16,
        dim: int = 3,
        *,
        hidden: Sequence[int] = (8, 8),
        mid: int = 16,
        density_hidden: Sequence[int] | None = (8, 8),
        bandwidth: float = 0.1,
        mode: Mode = "paper",
    ) -> None:
        super().__init__()
        check_choice("mode", mode, _MODES)
        sizes = {"in_channel": in_channel, "out_channel": out_channel, "nsample": nsample}
        for name, value in {**sizes, "dim": dim, "mid": mid}.items():
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        self.in_channel = in_channel
        self.nsample = nsample
        self.dim = dim
        self.bandwidth = bandwidth
        self.weightnet = WeightNet(dim, mid, hidden)
        self.densitynet = None if density_hidden is None else DensityNet(density_hidden, mode)
        self.linear = nn.Linear(mid * in_channel, out_channel)

    def forward(
        self,
        xyz: Tensor,
        features: Tensor,
        centres: Tensor | None = None,
        neighbours: Tensor | None = None,
        density: Tensor | None = None,
    ) -> Tensor:
        """``xyz [B, N, D]`` and ``features [B, N, C]`` to ``[B, S, O]``.

        Args:
            centres: ``[B, S, D]``, where to convolve; None: at the points.
            neighbours: ``[B, S, K]`` rows of each cloud, -1 for none; None: the nearest.
            density: ``[B, N]``; None: the kernel density estimate.
        """
        check_tensor("xyz", xyz, "[B, N, D]", 3)
        check_floating("xyz", xyz)
        check_tensor("features", features, "[B, N, C]", 3)
        if xyz.shape[-1] != self.dim:
            raise ValueError(f"xyz: expected [B, N, {self.dim}], got {list(xyz.shape)}")
        if features.shape != (*xyz.shape[:2], self.in_channel):
            raise ValueError(
                f"features: expected {[*xyz.shape[:2], self.in_channel]}, "
                f"got {list(features.shape)}"
            )
        centres = xyz if centres is None else centres
        if neighbours is None:
            neighbours = _nearest(centres, xyz, self.nsample)
        scale = None
        if self.densitynet is not None:
            if density is None:
                density = self.densitynet.density(xyz, self.bandwidth)
            scale = self.densitynet(density, neighbours)
        net = self.weightnet(xyz, centres, neighbours)
        return ops.pointconv(
            xyz, features, centres, neighbours, net, scale, weight_and_bias(self.linear)
        )

    def extra_repr(self) -> str:
        return f"nsample={self.nsample}, bandwidth={self.bandwidth}"


def _nearest(centres: Tensor, xyz: Tensor, number: int) -> Tensor:
    """The nearest points' rows ``[B, S, K]``, of all where there are fewer."""
    found = ops.knn_points(centres.detach(), xyz.detach(), K=min(number, xyz.shape[1]))
    return found.idx


class PointDeConv(nn.Module):
    """Features of coarse points at fine ones by interpolation, joined with theirs, and a
    :class:`PointConv` over the fine points.

    Args:
        in_channel: the fine points' channels and the coarse points'.
        out_channel, options: as :class:`PointConv` has them.

    Source: Wu et al., PointConv (2019), section 3.2.
    """

    def __init__(
        self, in_channel: int, out_channel: int, nsample: int = 16, **options: Any
    ) -> None:
        super().__init__()
        self.conv = PointConv(in_channel, out_channel, nsample, **options)

    def forward(
        self,
        xyz1: Tensor,
        xyz2: Tensor,
        features1: Tensor | None,
        features2: Tensor,
        neighbours: Tensor | None = None,
        density: Tensor | None = None,
    ) -> Tensor:
        """Of fine points ``xyz1 [B, N, D]`` with ``features1 [B, N, C1]`` or None, and coarse ones
        ``xyz2 [B, S, D]`` with ``features2 [B, S, C2]``: ``[B, N, O]``. ``neighbours`` and
        ``density`` are of the fine points."""
        features = interpolate(xyz1, xyz2, features2)
        if features1 is not None:
            features = torch.cat([features1, features], -1)
        result: Tensor = self.conv(xyz1, features, None, neighbours, density)
        return result


class PointConvDensitySetAbstraction(_Abstraction):
    """PointConv around some farthest points, after a small network over the edges.

    Arguments, layout and checkpoints are those of the published repository (pointconv_pytorch).
    The network sees coordinates relative to the centre, then features; the last linear layer is
    followed by batch normalisation and ReLU.

    Args:
        npoint: centres.
        nsample: nearest points of each; all where there are fewer.
        in_channel: 3 and the features' channels.
        mlp: widths of the network over the edges; the last one is also the output's.
        bandwidth: of the kernel density estimate.
        group_all: one neighbourhood of all points, around their mean.
        mode: of the density, see :class:`DensityNet`; ``compat`` is the published repository's, for
            its checkpoints.
        random_start: draw the first centre, as the repository does; otherwise it is point 0.
        recompute: keep no edges for the gradient, which computes them again: memory that does not
            grow with ``npoint * nsample``, for about twice the time.

    Batch normalisation is folded into the layers by the moments of what they read
    (docs/nn/pointconv.md has the identity); results are those of ``nn.BatchNorm2d``. Differences of
    coordinates are direct where theirs are ``a^2 - 2 a b + b^2``, so that neighbours far from the
    origin are right.

    Source: Wu et al., PointConv: Deep Convolutional Networks on 3D Point Clouds (2019).
    """

    def __init__(
        self,
        npoint: int | None,
        nsample: int | None,
        in_channel: int,
        mlp: list[int],
        bandwidth: float,
        group_all: bool,
        *,
        mode: Mode = "compat",
        random_start: bool = False,
        recompute: bool = False,
    ) -> None:
        super().__init__(npoint, nsample, in_channel, mlp, group_all, random_start, recompute)
        self.bandwidth = bandwidth
        self.weightnet = WeightNet(3, 16)
        self.linear = nn.Linear(16 * mlp[-1], mlp[-1])
        self.bn_linear = nn.BatchNorm1d(mlp[-1])
        self.densitynet = DensityNet(mode=mode)

    def forward(self, xyz: Tensor, points: Tensor | None) -> tuple[Tensor, Tensor]:
        """``xyz [B, 3, N]`` and ``points [B, D, N]`` or None: the centres ``[B, 3, S]`` and their
        features ``[B, mlp[-1], S]``."""
        coordinates, features = self._rows(xyz, points)
        if self.group_all:
            centres = coordinates.mean(1, keepdim=True)
            neighbours = self._everything(coordinates)
        else:
            centres = self._centres(coordinates)
            assert self.nsample is not None
            neighbours = _nearest(centres, coordinates, self.nsample)
        density = self.densitynet.density(coordinates, self.bandwidth)
        scale = self.densitynet(density, neighbours)
        net = self.weightnet(coordinates, centres, neighbours)
        linear = weight_and_bias(self.linear)

        def convolve(z: Tensor, part: slice) -> Tensor:
            own = centres[:, part], neighbours[:, part]
            return ops.pointconv(coordinates, F.relu_(z), *own, net, scale[:, part], linear)

        found = over_edges(
            *relative_layer(self.mlp_convs[0], coordinates, features, centres),
            neighbours,
            stages(self.mlp_convs, self.mlp_bns),
            convolve,
            complete=True,
            recompute=self.recompute,
        )
        found = F.relu(self.bn_linear(found.transpose(1, 2)))
        return centres.transpose(1, 2), found

    def extra_repr(self) -> str:
        if self.group_all:
            return f"group_all=True, bandwidth={self.bandwidth}"
        return f"npoint={self.npoint}, nsample={self.nsample}, bandwidth={self.bandwidth}"
