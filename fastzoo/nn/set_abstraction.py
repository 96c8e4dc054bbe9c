"""PointNet++: features of neighbourhoods, and back from coarse points to fine ones."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastzoo import ops
from fastzoo.nn._batch_norm import stages
from fastzoo.nn._edge_mlp import max_over_edges, relative_layer
from fastzoo.ops._checks import check_floating, check_same, check_tensor


class _Abstraction(nn.Module):
    """What abstractions share: the choice of centres, and layers over the edges."""

    def __init__(
        self,
        npoint: int | None,
        nsample: int | None,
        in_channel: int,
        mlp: list[int],
        group_all: bool,
        random_start: bool,
        recompute: bool,
    ) -> None:
        super().__init__()
        sizes = {"in_channel": in_channel, **{f"mlp[{i}]": n for i, n in enumerate(mlp)}}
        if not group_all:
            sizes |= {"npoint": npoint or 0, "nsample": nsample or 0}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if not mlp:
            raise ValueError("mlp: expected at least one layer")
        self.npoint = npoint
        self.nsample = nsample
        self.in_channel = in_channel
        self.group_all = group_all
        self.random_start = random_start
        self.recompute = recompute
        widths = [in_channel, *mlp]
        self.mlp_convs = nn.ModuleList(
            nn.Conv2d(*pair, 1) for pair in zip(widths[:-1], mlp, strict=True)
        )
        self.mlp_bns = nn.ModuleList(nn.BatchNorm2d(width) for width in mlp)

    def _rows(self, xyz: Tensor, points: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Coordinates ``[B, N, 3]`` and features ``[B, N, D]``."""
        check_tensor("xyz", xyz, "[B, 3, N]", 3)
        check_floating("xyz", xyz)
        dim = xyz.shape[1]
        channels = 0
        if points is not None:
            check_tensor("points", points, "[B, D, N]", 3)
            check_same("xyz", xyz, "points", points)
            if (points.shape[0], points.shape[2]) != (xyz.shape[0], xyz.shape[2]):
                raise ValueError(
                    f"points: expected [{xyz.shape[0]}, D, {xyz.shape[2]}], "
                    f"got {list(points.shape)}"
                )
            channels = points.shape[1]
        if dim + channels != self.in_channel:
            raise ValueError(
                f"xyz, points: expected {self.in_channel} channels together (in_channel), "
                f"got {dim} and {channels}"
            )
        rows = xyz.transpose(1, 2).contiguous()
        return rows, None if points is None else points.transpose(1, 2).contiguous()

    def _centres(self, xyz: Tensor) -> Tensor:
        """Farthest points ``[B, S, 3]``, with a gradient."""
        assert self.npoint is not None
        _, chosen = ops.sample_farthest_points(
            xyz.detach(), K=min(self.npoint, xyz.shape[1]), random_start_point=self.random_start
        )
        return xyz.gather(1, chosen[..., None].expand(-1, -1, xyz.shape[2]))

    @staticmethod
    def _everything(xyz: Tensor) -> Tensor:
        """One neighbourhood of all points, ``[B, 1, N]``."""
        own = torch.arange(xyz.shape[1], device=xyz.device)
        return own.expand(xyz.shape[0], 1, -1)


class SetAbstraction(_Abstraction):
    """The greatest features that a small network finds around each of some farthest points.

    Arguments, layout and checkpoints are those of the widespread PyTorch implementation's
    ``PointNetSetAbstraction``. At the edges of ball queries the network sees coordinates relative
    to the centre, then features; each layer is followed by batch normalisation and ReLU.

    Args:
        npoint: centres.
        radius, nsample: neighbours are the first ``nsample`` points nearer than ``radius``, in
            order of index; where there are fewer, the first of them fills up.
        in_channel: 3 and the features' channels.
        mlp: widths of the layers.
        group_all: one neighbourhood of all points, around the origin; the first three are unused.
        random_start: draw the first centre, which otherwise is point 0.
        recompute: keep no edges for the gradient, which computes them again: memory that does not
            grow with ``npoint * nsample``, for about twice the time.

    Batch normalisation is folded into the layers by the moments of what they read, so one tensor
    of edges is kept for each layer but the last (docs/nn/pointconv.md); its results are those of
    ``nn.BatchNorm2d``.

    Source: Qi et al., PointNet++ (2017).
    """

    def __init__(
        self,
        npoint: int | None,
        radius: float | None,
        nsample: int | None,
        in_channel: int,
        mlp: list[int],
        group_all: bool,
        *,
        random_start: bool = False,
        recompute: bool = False,
    ) -> None:
        super().__init__(npoint, nsample, in_channel, mlp, group_all, random_start, recompute)
        if not group_all and not (radius is not None and radius > 0):
            raise ValueError(f"radius: expected above 0, got {radius}")
        self.radius = radius

    def forward(self, xyz: Tensor, points: Tensor | None) -> tuple[Tensor, Tensor]:
        """``xyz [B, 3, N]`` and ``points [B, D, N]`` or None: the centres ``[B, 3, S]`` and their
        features ``[B, mlp[-1], S]``."""
        coordinates, features = self._rows(xyz, points)
        if self.group_all:
            centres = torch.zeros_like(coordinates[:, :1])
            neighbours = self._everything(coordinates)
        else:
            centres = self._centres(coordinates)
            assert self.nsample is not None
            assert self.radius is not None
            found = ops.ball_query(
                centres.detach(),
                coordinates.detach(),
                K=self.nsample,
                radius=self.radius,
                return_nn=False,
            ).idx
            neighbours = torch.where(found < 0, found[..., :1], found)
        first = relative_layer(self.mlp_convs[0], coordinates, features, centres)
        found = max_over_edges(
            *first,
            neighbours,
            stages(self.mlp_convs, self.mlp_bns),
            complete=True,
            recompute=self.recompute,
        )
        return centres.transpose(1, 2), found.transpose(1, 2)

    def extra_repr(self) -> str:
        if self.group_all:
            return "group_all=True"
        return f"npoint={self.npoint}, radius={self.radius}, nsample={self.nsample}"


def interpolate(xyz1: Tensor, xyz2: Tensor, features: Tensor) -> Tensor:
    """Features ``[B, N, C]`` at the points ``xyz1 [B, N, D]``: the mean of the three nearest of
    ``xyz2 [B, S, D]``, weighted by 1 / (squared distance + 1e-8)."""
    near = ops.knn_points(xyz1, xyz2, K=min(3, xyz2.shape[1]))
    weights = 1 / (near.dists + 1e-8)
    return ops.neighbour_reduce(features, near.idx, weights / weights.sum(-1, keepdim=True))


class FeaturePropagation(nn.Module):
    """Features of coarse points at fine ones, joined with theirs, and a network for each point.

    Arguments, layout and checkpoints are those of the widespread PyTorch implementation's
    ``PointNetFeaturePropagation``.

    Args:
        in_channel: the fine points' channels and the coarse points'.
        mlp: widths of the layers, each followed by batch normalisation and ReLU.

    Source: Qi et al., PointNet++ (2017), section 3.4.
    """

    def __init__(self, in_channel: int, mlp: list[int]) -> None:
        super().__init__()
        widths = [in_channel, *mlp]
        self.mlp_convs = nn.ModuleList(
            nn.Conv1d(*pair, 1) for pair in zip(widths[:-1], mlp, strict=True)
        )
        self.mlp_bns = nn.ModuleList(nn.BatchNorm1d(width) for width in mlp)

    def forward(
        self, xyz1: Tensor, xyz2: Tensor, points1: Tensor | None, points2: Tensor
    ) -> Tensor:
        """Of fine points ``xyz1 [B, 3, N]`` with ``points1 [B, D1, N]`` or None, and coarse ones
        ``xyz2 [B, 3, S]`` with ``points2 [B, D2, S]``: ``[B, mlp[-1], N]``."""
        fine, coarse = (t.transpose(1, 2).contiguous() for t in (xyz1, xyz2))
        x = interpolate(fine, coarse, points2.transpose(1, 2).contiguous()).transpose(1, 2)
        if points1 is not None:
            x = torch.cat([points1, x], 1)
        for conv, norm in zip(self.mlp_convs, self.mlp_bns, strict=True):
            x = F.relu(norm(conv(x)))
        return x
