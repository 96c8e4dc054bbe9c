"""Distributions of latents."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastzoo import ops
from fastzoo.ops._checks import check_count
from fastzoo.reference.precision import compute_dtype


class Base(nn.Module):
    """A distribution of latents of one ``shape``: a noise of independent elements, perhaps with a
    location and scale for each.

    A noise has :meth:`_noise` and :meth:`_density`; what has a location and scale, perhaps of the
    context, has :meth:`_location`.
    """

    _like: Tensor

    def __init__(self, shape: int | Sequence[int]) -> None:
        super().__init__()
        self.shape = torch.Size((shape,) if isinstance(shape, int) else shape)
        # Has the dtype and device in which noise is drawn.
        self.register_buffer("_like", torch.empty(0), persistent=False)

    def _noise(self, shape: Sequence[int], generator: torch.Generator | None) -> Tensor:
        raise NotImplementedError

    def _density(self, noise: Tensor) -> Tensor:
        """Its logarithm, of rows ``[B, D]``: ``[B]``."""
        raise NotImplementedError

    def _location(self, context: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """Location and logarithm of the scale, each of ``shape`` or ``[B, *shape]``."""
        return None

    def log_prob(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """``[B]`` of latents ``[B, *shape]``, no narrower than float32."""
        self._check(z)
        placed = self._location(context)
        if placed is None:
            return self._density(z.flatten(1))
        noise, logdet = ops.affine_coupling(z, *placed, inverse=True)
        return self._density(noise.flatten(1)) + logdet

    def sample(
        self,
        n: int,
        context: Tensor | None = None,
        generator: torch.Generator | None = None,
        temperature: float = 1.0,
    ) -> Tensor:
        """``[n, *shape]``, or ``[B, n, *shape]`` for a context ``[B, ...]``; differentiable in
        the parameters. ``temperature`` multiplies the scale."""
        return self._place(self._draw(n, context, generator, temperature), context)

    def sample_and_log_prob(
        self,
        n: int,
        context: Tensor | None = None,
        generator: torch.Generator | None = None,
        temperature: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """Samples, and ``[n]`` or ``[B, n]``: their log-density at temperature 1."""
        noise = self._draw(n, context, generator, temperature)
        lead = noise.dim() - len(self.shape)
        log_prob = self._density(noise.flatten(lead).flatten(0, lead - 1)).view(noise.shape[:lead])
        placed = self._location(context)
        if placed is not None:
            # One for all samples, or one a context.
            own = placed[1].sum(tuple(range(-len(self.shape), 0)), dtype=log_prob.dtype)
            log_prob = log_prob - (own if own.dim() == 0 else own[:, None])
        return self._place(noise, context), log_prob

    def _check(self, z: Tensor) -> None:
        if z.shape[1:] != self.shape:
            wanted = ", ".join(map(str, ("B", *self.shape)))
            raise ValueError(f"z: expected [{wanted}], got {list(z.shape)}")

    def _draw(
        self,
        n: int,
        context: Tensor | None,
        generator: torch.Generator | None,
        temperature: float,
    ) -> Tensor:
        check_count("n", n)
        lead = (n,) if context is None else (context.shape[0], n)
        noise = self._noise((*lead, *self.shape), generator)
        return noise if temperature == 1 else noise * temperature

    def _place(self, noise: Tensor, context: Tensor | None) -> Tensor:
        placed = self._location(context)
        if placed is None:
            return noise
        location, log_scale = placed
        if location.dim() > len(self.shape):
            location, log_scale = location[:, None], log_scale[:, None]
        return torch.addcmul(location, noise, log_scale.exp())

    def extra_repr(self) -> str:
        return f"{list(self.shape)}"


class StandardNormal(Base):
    """Normal with mean 0 and variance 1."""

    def _noise(self, shape: Sequence[int], generator: torch.Generator | None) -> Tensor:
        like = self._like
        return torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device)

    def _density(self, noise: Tensor) -> Tensor:
        squares = noise.to(compute_dtype(noise)).square().sum(1)
        return -0.5 * squares - 0.5 * math.log(2 * math.pi) * noise.shape[1]


class Logistic(Base):
    """The logistic distribution, with a heavier tail than the normal one: NICE's."""

    def _noise(self, shape: Sequence[int], generator: torch.Generator | None) -> Tensor:
        like = self._like
        uniform = torch.rand(shape, generator=generator, dtype=like.dtype, device=like.device)
        return torch.logit(uniform, eps=torch.finfo(like.dtype).eps)

    def _density(self, noise: Tensor) -> Tensor:
        # The density is the sigmoid's derivative.
        return ops.logit(noise, inverse=True)[1]


class Uniform(Base):
    """Uniform between ``low`` and ``high``, of which neither is learned; outside, ``log_prob`` is
    -inf.

    ``temperature`` multiplies the distance from the middle.
    """

    low: Tensor
    high: Tensor

    def __init__(
        self, shape: int | Sequence[int], low: float | Tensor = 0.0, high: float | Tensor = 1.0
    ) -> None:
        super().__init__(shape)
        for name, value in (("low", low), ("high", high)):
            self.register_buffer(name, torch.as_tensor(value).expand(self.shape).float().clone())

    def log_prob(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        self._check(z)
        inside = ((z >= self.low) & (z <= self.high)).flatten(1).all(1)
        constant = -(self.high - self.low).log().sum().to(compute_dtype(z))
        return torch.where(inside, constant, -torch.inf)

    def _location(self, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return (self.low + self.high) / 2, ((self.high - self.low) / 2).log()

    def _noise(self, shape: Sequence[int], generator: torch.Generator | None) -> Tensor:
        like = self._like
        uniform = torch.rand(shape, generator=generator, dtype=like.dtype, device=like.device)
        return 2 * uniform - 1

    def _density(self, noise: Tensor) -> Tensor:
        return noise.new_full(noise.shape[:1], -math.log(2) * noise.shape[1])

    def _place(self, noise: Tensor, context: Tensor | None) -> Tensor:
        return super()._place(noise, context).clamp(self.low, self.high)


class DiagonalNormal(StandardNormal):
    """Independent normals with a learned mean and standard deviation each."""

    def __init__(self, shape: int | Sequence[int]) -> None:
        super().__init__(shape)
        self.mean = nn.Parameter(torch.zeros(self.shape))
        self.log_scale = nn.Parameter(torch.zeros(self.shape))

    def _location(self, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.mean, self.log_scale


class ConditionalDiagonalNormal(StandardNormal):
    """Independent normals whose means and standard deviations are functions of a context.

    Args:
        shape: of the latents.
        context_encoder: gives, of a context ``[B, ...]``, the means and then the logarithms of the
            standard deviations: ``[B, 2 * shape.numel()]``. None: the context has them.
    """

    def __init__(
        self, shape: int | Sequence[int], context_encoder: nn.Module | None = None
    ) -> None:
        super().__init__(shape)
        self.context_encoder = context_encoder

    def _location(self, context: Tensor | None) -> tuple[Tensor, Tensor]:
        if context is None:
            raise ValueError("context: expected a tensor [B, ...], got None")
        found = context if self.context_encoder is None else self.context_encoder(context)
        mean, log_scale = found.flatten(1).chunk(2, 1)
        return mean.reshape(-1, *self.shape), log_scale.reshape(-1, *self.shape)
