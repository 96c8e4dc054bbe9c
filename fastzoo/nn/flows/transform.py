"""Bijections with their log-determinant, and what is made of several."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fastzoo.reference.precision import compute_dtype


class Transform(nn.Module):
    """A differentiable bijection of the elements of a batch.

    ``forward`` goes from data to latents, ``inverse`` back. Each returns what it maps to and, of
    its own direction, ``log |det|`` of every element ``[B]``, no narrower than float32. ``context``
    holds a row ``[B, ...]`` for each element; a transform without use for it ignores it.
    """

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        raise NotImplementedError(f"{type(self).__name__} has no inverse in closed form")


def no_logdet(x: Tensor) -> Tensor:
    """Zeros ``[B]``, of a map that keeps volumes."""
    return torch.zeros(x.shape[0], dtype=compute_dtype(x), device=x.device)


class Compose(Transform):
    """Transforms one after the other, the first one next to the data."""

    def __init__(self, transforms: Iterable[Transform]) -> None:
        super().__init__()
        self.transforms = nn.ModuleList(transforms)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        total = no_logdet(x)
        for transform in self.transforms:
            x, logdet = transform(x, context)
            total = total + logdet
        return x, total

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        total = no_logdet(z)
        for transform in reversed(self.transforms):
            assert isinstance(transform, Transform)
            z, logdet = transform.inverse(z, context)
            total = total + logdet
        return z, total


class Inverse(Transform):
    """The inverse of a transform: an inverse autoregressive flow of an autoregressive one; planar
    maps, which have no inverse in closed form, where a flow is only sampled."""

    def __init__(self, transform: Transform) -> None:
        super().__init__()
        self.transform = transform

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.transform.inverse(x, context)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = self.transform(z, context)
        return found
