"""DGCNN's layer: the greatest output of a network over pairs of a point and a neighbour."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from fastzoo import ops
from fastzoo.nn._batch_norm import stages, weight_and_bias
from fastzoo.nn._edge_mlp import centred, max_over_edges
from fastzoo.ops._checks import check_floating, check_tensor


class EdgeConv(nn.Module):
    """``x'_i = max_j h(x_i, x_j - x_i)`` over the nearest neighbours, in the space of the features.

    Args:
        in_channel: C.
        mlp: widths of the layers of h, without bias, each followed by batch normalisation and a
            leaky ReLU.
        k: neighbours, of which a point itself is the first; all where there are fewer points.
        negative_slope: of the leaky ReLU.
        recompute: keep no edges for the gradient, which computes them again. Only of more layers
            than one, which keeps none anyway.

    With one layer, ``A x_j + (B - A) x_i`` is a number for each point and one for each centre, so
    the greatest over j is that of ``A x_j``, and the batch's moments are sums over neighbours:
    nothing of ``N k`` times the channels is made.

    Source: Wang et al., Dynamic Graph CNN for Learning on Point Clouds (2019).
    """

    def __init__(
        self,
        in_channel: int,
        mlp: int | Sequence[int],
        k: int = 20,
        *,
        negative_slope: float = 0.2,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        widths = [mlp] if isinstance(mlp, int) else list(mlp)
        if not widths:
            raise ValueError("mlp: expected at least one layer")
        sizes = {f"mlp[{i}]": width for i, width in enumerate(widths)}
        for name, value in {"in_channel": in_channel, **sizes, "k": k}.items():
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if negative_slope < 0:
            raise ValueError(f"negative_slope: expected at least 0, got {negative_slope}")
        self.in_channel = in_channel
        self.k = k
        self.negative_slope = negative_slope
        self.recompute = recompute
        inputs = [2 * in_channel, *widths[:-1]]
        self.mlp_convs = nn.ModuleList(
            nn.Conv2d(*pair, 1, bias=False) for pair in zip(inputs, widths, strict=True)
        )
        self.mlp_bns = nn.ModuleList(nn.BatchNorm2d(width) for width in widths)

    def forward(self, x: Tensor, neighbours: Tensor | None = None) -> Tensor:
        """Features ``[B, N, C]`` to ``[B, N, mlp[-1]]``.

        Args:
            neighbours: ``[B, N, K]`` rows of each cloud, -1 for none; None: the nearest in the
                space of ``x``. A point without neighbours gets 0.
        """
        check_tensor("x", x, "[B, N, C]", 3)
        check_floating("x", x)
        if x.shape[-1] != self.in_channel:
            raise ValueError(f"x: expected [B, N, {self.in_channel}], got {list(x.shape)}")
        complete = neighbours is None
        if neighbours is None:
            own = x.detach()
            neighbours = ops.knn_points(own, own, K=min(self.k, x.shape[1])).idx
        elif neighbours.dim() != 3 or neighbours.shape[:2] != x.shape[:2]:
            raise ValueError(
                f"neighbours: expected [{x.shape[0]}, {x.shape[1]}, K], "
                f"got {list(neighbours.shape)}"
            )
        weight, bias = weight_and_bias(self.mlp_convs[0])
        alone, toward = weight.split(self.in_channel, 1)
        points = F.linear(x - centred(x), toward)
        return max_over_edges(
            points,
            F.linear(x, alone, bias) - points,
            neighbours,
            stages(self.mlp_convs, self.mlp_bns),
            slope=self.negative_slope,
            complete=complete,
            recompute=self.recompute,
        )

    def extra_repr(self) -> str:
        return f"k={self.k}"
