"""Maps of each element by itself."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastzoo import ops
from fastzoo.nn._state import updates_state
from fastzoo.nn.flows.transform import Transform
from fastzoo.reference.precision import compute_dtype


class _Fixed(Transform):
    """A bijection without parameters."""

    def __init__(self, backend: str | None = None) -> None:
        super().__init__()
        self.backend = backend

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._map(x, inverse=False)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._map(z, inverse=True)

    def _map(self, x: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


class SoftClip(_Fixed):
    """``z = x / (1 + |x| / bound)``, within ``bound`` of 0."""

    def __init__(self, bound: float = 1.0, backend: str | None = None) -> None:
        super().__init__(backend)
        self.bound = bound

    def _map(self, x: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        return ops.soft_clip(x, self.bound, inverse=inverse, backend=self.backend)

    def extra_repr(self) -> str:
        return f"bound={self.bound}"


class Logit(_Fixed):
    """``z = logit(alpha + (1 - 2 alpha) x)`` of x in [0, 1]: pixels to the real line."""

    def __init__(self, alpha: float = 0.0, backend: str | None = None) -> None:
        super().__init__(backend)
        self.alpha = alpha

    def _map(self, x: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        return ops.logit(x, self.alpha, inverse=inverse, backend=self.backend)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}"


class LeakyReLU(_Fixed):
    """``z = x`` where x is not negative, ``slope x`` elsewhere."""

    def __init__(self, slope: float = 0.01, backend: str | None = None) -> None:
        super().__init__(backend)
        self.slope = slope

    def _map(self, x: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        return ops.leaky_relu(x, self.slope, inverse=inverse, backend=self.backend)

    def extra_repr(self) -> str:
        return f"slope={self.slope}"


def _each(logdet: Tensor, x: Tensor) -> Tensor:
    """One log-determinant for every element of the batch."""
    return logdet.to(compute_dtype(x)).expand(x.shape[0])


class Scaling(Transform):
    """``z = exp(log_scale) x``, with a learned scale for each element.

    Args:
        shape: of an element of the batch, or what broadcasts to it.

    Source: Dinh et al., NICE (2015), section 3.3.
    """

    def __init__(self, shape: int | Sequence[int]) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(shape))

    def _logdet(self, x: Tensor) -> Tensor:
        return _each(self.log_scale.expand(x.shape[1:]).sum(), x)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x * self.log_scale.exp(), self._logdet(x)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return z * (-self.log_scale).exp(), -self._logdet(z)


class BatchNorm(Transform):
    """``z = (x - mean) / sqrt(variance + eps)`` of each feature or channel.

    In training the moments are the batch's, of which the running ones are an average; otherwise
    they are the running ones. The inverse, which has no batch of data to take moments of, is by
    the running ones and raises in training.

    Source: Dinh et al., Density estimation using Real NVP (2017), section 3.7.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, features: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.eps = eps
        self.momentum = momentum
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_var", torch.ones(features))

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if not self.training:
            z = F.batch_norm(x, self.running_mean, self.running_var, eps=self.eps)
            return z, self._logdet(x, self.running_var)
        axes = [axis for axis in range(x.dim()) if axis != 1]
        variance, mean = torch.var_mean(x.to(compute_dtype(x)), axes, correction=0)
        if updates_state(self):
            self._track(mean.detach(), variance.detach(), x[:, 0].numel())
        z = F.batch_norm(x, None, None, training=True, eps=self.eps)
        return z, self._logdet(x, variance)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if self.training:
            raise RuntimeError("BatchNorm: no inverse in training, whose moments are a batch's")
        wide = (-1, *(z.dim() - 2) * (1,))
        scale = (self.running_var + self.eps).sqrt()
        x = torch.addcmul(self.running_mean.view(wide), z, scale.view(wide))
        return x, -self._logdet(z, self.running_var)

    def _logdet(self, x: Tensor, variance: Tensor) -> Tensor:
        return _each(-0.5 * x.shape[2:].numel() * (variance + self.eps).log().sum(), x)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor, number: int) -> None:
        unbiased = variance * (number / max(number - 1, 1))
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)

    def extra_repr(self) -> str:
        return f"{len(self.running_mean)}, eps={self.eps}, momentum={self.momentum}"
