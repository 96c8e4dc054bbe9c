"""Images at several scales: squares into channels, and half of the channels out at each scale."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from fastzoo import ops
from fastzoo.nn.flows.transform import Transform, no_logdet
from fastzoo.ops._checks import check_positive, check_tensor


class Squeeze(Transform):
    """Each square of ``factor x factor`` pixels becomes channels, in the order of
    :func:`fastzoo.ops.squeeze`."""

    def __init__(self, factor: int = 2) -> None:
        super().__init__()
        check_positive("factor", factor)
        self.factor = factor

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return ops.squeeze(x, self.factor), no_logdet(x)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return ops.unsqueeze(z, self.factor), no_logdet(z)

    def shape_of(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """What an image ``[C, H, W]`` becomes."""
        channels, height, width = shape
        if height % self.factor or width % self.factor:
            raise ValueError(
                f"shape: expected height and width to be multiples of {self.factor}, "
                f"got {list(shape)}"
            )
        return channels * self.factor**2, height // self.factor, width // self.factor

    def extra_repr(self) -> str:
        return f"{self.factor}"


class MultiScale(Transform):
    """Levels of transforms of images; after each but the last the second half of the channels is
    done, and the next level sees the first.

    The latents are flat, ``[B, C H W]``: what the first level put out, then the second, and last
    what is left. Each is to be standard normal. A prior of them that is learned from what goes on,
    as Glow has it, is a transform at the end of a level: an affine coupling that passes the first
    half (:func:`prior_coupling`).

    Args:
        shape: ``(C, H, W)`` of the data.
        levels: transforms that change the shape of an image by :class:`Squeeze` alone, at any place
            within them.

    Source: Dinh et al., Density estimation using Real NVP (2017), section 3.6.
    """

    def __init__(self, shape: Sequence[int], levels: Iterable[Transform]) -> None:
        super().__init__()
        self.levels = nn.ModuleList(levels)
        if not self.levels:
            raise ValueError("levels: expected at least one")
        channels, height, width = shape
        self.shape = current = (channels, height, width)
        # Of what each level makes, before half of it is done.
        self.shapes: list[tuple[int, int, int]] = []
        for level in self.levels:
            if self.shapes:
                channels, height, width = self.shapes[-1]
                if channels % 2:
                    raise ValueError(f"levels: expected an even number of channels, got {channels}")
                current = channels // 2, height, width
            for part in level.modules():
                if isinstance(part, Squeeze):
                    current = part.shape_of(current)
            self.shapes.append(current)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_tensor("x", x, "[B, C, H, W]", 4)
        if tuple(x.shape[1:]) != self.shape:
            raise ValueError(f"x: expected {['B', *self.shape]}, got {list(x.shape)}")
        total = no_logdet(x)
        done: list[Tensor] = []
        for level, (channels, _, _) in zip(self.levels, self.shapes, strict=True):
            x, logdet = level(x, context)
            total = total + logdet
            if len(done) + 1 < len(self.levels):
                x, out = x.split(channels // 2, 1)
                done.append(out.flatten(1))
        return torch.cat([*done, x.flatten(1)], 1), total

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_tensor("z", z, "[B, D]", 2)
        if z.shape[1] != math.prod(self.shape):
            raise ValueError(f"z: expected [B, {math.prod(self.shape)}], got {list(z.shape)}")
        total = no_logdet(z)
        parts = z.split(self._sizes(), 1)
        x = parts[-1].view(-1, *self.shapes[-1])
        for index in reversed(range(len(self.levels))):
            if index + 1 < len(self.levels):
                x = torch.cat([x, parts[index].view(x.shape)], 1)
            level = self.levels[index]
            assert isinstance(level, Transform)
            x, logdet = level.inverse(x, context)
            total = total + logdet
        return x, total

    def _sizes(self) -> list[int]:
        sizes = [channels * height * width for channels, height, width in self.shapes]
        return [size // 2 for size in sizes[:-1]] + sizes[-1:]


def checkerboard_mask(height: int, width: int, odd: bool = False) -> Tensor:
    """``[1, height, width]``, True where row + column is even, or where it is ``odd``."""
    places = torch.arange(height)[:, None] + torch.arange(width)
    return (places % 2 == int(odd))[None]
