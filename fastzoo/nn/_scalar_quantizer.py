"""What quantisers share that round each dimension by itself: layouts, projections, the
straight-through estimator."""

import torch
from torch import Tensor, nn

from fastzoo.ops._checks import check_floating, check_tensor


def straight_through(x: Tensor, value: Tensor) -> Tensor:
    """``value``, bit for bit, with the gradient of ``x``."""
    return value.detach() + (x - x.detach())


class ScalarQuantizer(nn.Module):
    """Channels as ``num_codebooks`` codes of ``codebook_dim`` dimensions, and back.

    ``dim`` channels are projected where they are not exactly that many. They are the last dimension
    of an input, or the second with ``channel_first``; None makes it the second where there are four
    dimensions or more, an image or a video.
    """

    def __init__(
        self,
        codebook_dim: int,
        *,
        dim: int | None,
        num_codebooks: int,
        keep_num_codebooks_dim: bool | None,
        has_projections: bool | None,
        projection_has_bias: bool,
        channel_first: bool | None,
    ) -> None:
        super().__init__()
        for name, value in {"dim": dim, "num_codebooks": num_codebooks}.items():
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if keep_num_codebooks_dim is None:
            keep_num_codebooks_dim = num_codebooks > 1
        if num_codebooks > 1 and not keep_num_codebooks_dim:
            raise ValueError(
                f"keep_num_codebooks_dim: expected True, since there are {num_codebooks} "
                "codebooks, got False"
            )
        width = codebook_dim * num_codebooks
        dim = width if dim is None else dim
        if has_projections is None:
            has_projections = dim != width
        if not has_projections and dim != width:
            raise ValueError(
                f"has_projections: expected True, since dim is {dim} and the codes have "
                f"{width} dimensions, got False"
            )
        self.dim = dim
        self.codebook_dim = codebook_dim
        self.num_codebooks = num_codebooks
        self.keep_num_codebooks_dim = keep_num_codebooks_dim
        self.channel_first = channel_first
        self.project_in: nn.Module = nn.Identity()
        self.project_out: nn.Module = nn.Identity()
        if has_projections:
            self.project_in = nn.Linear(dim, width, bias=projection_has_bias)
            self.project_out = nn.Linear(width, dim, bias=projection_has_bias)

    def _channels_second(self, rank: int) -> bool:
        return rank >= 4 if self.channel_first is None else self.channel_first

    def _enter(self, name: str, x: Tensor) -> Tensor:
        """``[..., num_codebooks, codebook_dim]`` of an input."""
        check_tensor(name, x, "[..., D]", -1)
        check_floating(name, x)
        second = self._channels_second(x.dim())
        if x.dim() < 1 + second or x.shape[1 if second else -1] != self.dim:
            where = "[B, D, ...]" if second else "[..., D]"
            raise ValueError(f"{name}: expected {where}, D = {self.dim}, got {list(x.shape)}")
        projected: Tensor = self.project_in(x.movedim(1, -1) if second else x)
        return projected.reshape(*projected.shape[:-1], self.num_codebooks, self.codebook_dim)

    def _leave(self, codes: Tensor, project_out: bool = True) -> Tensor:
        """An output of codes ``[..., num_codebooks, codebook_dim]``."""
        out = codes.flatten(-2)
        if project_out:
            out = self.project_out(out)
        return out.movedim(-1, 1) if self._channels_second(out.dim()) else out

    def _of_codebooks(self, indices: Tensor) -> Tensor:
        """Indices as they are returned, of ``[..., num_codebooks]``."""
        return indices if self.keep_num_codebooks_dim else indices.squeeze(-1)

    def _by_codebook(self, indices: Tensor) -> Tensor:
        """The inverse of :meth:`_of_codebooks`."""
        if not isinstance(indices, Tensor) or indices.is_floating_point():
            kind = indices.dtype if isinstance(indices, Tensor) else type(indices).__name__
            raise TypeError(f"indices: expected a tensor of integers, got {kind}")
        if not self.keep_num_codebooks_dim:
            return indices.unsqueeze(-1)
        if indices.dim() == 0 or indices.shape[-1] != self.num_codebooks:
            raise ValueError(
                f"indices: expected [..., {self.num_codebooks}], got {list(indices.shape)}"
            )
        return indices

    def _code_dtype(self) -> torch.dtype:
        """What codes of indices are in: what the projection multiplies."""
        weights = self.project_out.parameters()
        return next((weight.dtype for weight in weights), torch.get_default_dtype())
