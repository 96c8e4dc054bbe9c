"""Densities from a transform and a distribution of latents."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fastzoo.nn.flows.base import Base
from fastzoo.nn.flows.transform import Compose, Transform


class Flow(nn.Module):
    """A density by the change of variables: ``log p(x) = log p(z) + log |det dz/dx|``.

    Args:
        transforms: from data to latents, the first one next to the data; or one transform.
        base: distribution of the latents.
        embedding: read the context first, once for all transforms.

    Everything is differentiable, samples too; put ``torch.no_grad()`` around those that need none.
    """

    def __init__(
        self,
        transforms: Transform | Iterable[Transform],
        base: Base,
        embedding: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.transform = transforms if isinstance(transforms, Transform) else Compose(transforms)
        self.base = base
        self.embedding = embedding

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Latents, and ``log |det dz/dx|`` ``[B]``."""
        found: tuple[Tensor, Tensor] = self.transform(x, self._embedded(context))
        return found

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Data, and ``log |det dx/dz|`` ``[B]``."""
        return self.transform.inverse(z, self._embedded(context))

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """``[B]`` of data ``[B, ...]``, with a row of ``context`` for each."""
        context = self._embedded(context)
        z, logdet = self.transform(x, context)
        found: Tensor = self.base.log_prob(z, context) + logdet
        return found

    def sample(
        self,
        n: int,
        context: Tensor | None = None,
        generator: torch.Generator | None = None,
        temperature: float = 1.0,
    ) -> Tensor:
        """``[n, ...]``; for each of the rows of a context ``[B, ...]``, n: ``[B, n, ...]``.
        ``temperature`` multiplies the scale of the latents."""
        context = self._embedded(context)
        z = self.base.sample(n, context, generator, temperature)
        return self._to_data(z, context)[0]

    def sample_and_log_prob(
        self,
        n: int,
        context: Tensor | None = None,
        generator: torch.Generator | None = None,
        temperature: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """Samples, and their log-density ``[n]`` or ``[B, n]``, for the work of the samples."""
        context = self._embedded(context)
        z, log_prob = self.base.sample_and_log_prob(n, context, generator, temperature)
        x, logdet = self._to_data(z, context)
        return x, log_prob - logdet

    def _embedded(self, context: Tensor | None) -> Tensor | None:
        if self.embedding is None or context is None:
            return context
        found: Tensor = self.embedding(context)
        return found

    def _to_data(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        if context is None:
            return self.transform.inverse(z)
        lead = z.shape[:2]
        rows = context.repeat_interleave(lead[1], 0)
        x, logdet = self.transform.inverse(z.flatten(0, 1), rows)
        return x.unflatten(0, lead), logdet.view(lead)
