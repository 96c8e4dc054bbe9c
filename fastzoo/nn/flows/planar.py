"""Maps that bend space along a plane, or around a point."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastzoo.nn.flows.transform import Transform
from fastzoo.ops._checks import check_positive


class Planar(Transform):
    """``z = x + u tanh(w.x + b)`` of rows ``[B, features]``.

    What stands for u is moved along w so far that ``w.u >= -1``, where the map is a bijection. Its
    inverse has no closed form; ``Inverse(Planar(...))`` is for flows that are sampled.

    Source: Rezende & Mohamed, Variational Inference with Normalizing Flows (2015).
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        check_positive("features", features)
        self.w = nn.Parameter(torch.empty(features))
        self.u = nn.Parameter(torch.empty(features))
        self.b = nn.Parameter(torch.zeros(()))
        bound = features**-0.5
        nn.init.uniform_(self.w, -bound, bound)
        nn.init.uniform_(self.u, -bound, bound)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        along = self.w.dot(self.u)
        allowed = F.softplus(along) - 1
        u = self.u + (allowed - along) / self.w.dot(self.w) * self.w
        bent = torch.tanh(x @ self.w + self.b)
        z = torch.addcmul(x, bent[:, None], u)
        return z, torch.log1p((1 - bent * bent) * allowed)


class Radial(Transform):
    """``z = x + beta (x - center) / (alpha + |x - center|)`` of rows ``[B, features]``, with
    ``beta >= -alpha``, where the map is a bijection.

    Source: Rezende & Mohamed, Variational Inference with Normalizing Flows (2015).
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        check_positive("features", features)
        self.center = nn.Parameter(torch.zeros(features))
        self.raw_alpha = nn.Parameter(torch.zeros(()))
        self.raw_beta = nn.Parameter(torch.zeros(()))

    def _constants(self) -> tuple[Tensor, Tensor]:
        alpha = F.softplus(self.raw_alpha)
        return alpha, F.softplus(self.raw_beta) - alpha

    def _logdet(self, radius: Tensor, alpha: Tensor, beta: Tensor, features: int) -> Tensor:
        """Tangents stretch as the radius does; the radius itself by its derivative."""
        share = beta / (alpha + radius)
        return (features - 1) * torch.log1p(share) + torch.log1p(share * alpha / (alpha + radius))

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        alpha, beta = self._constants()
        away = x - self.center
        radius = torch.linalg.vector_norm(away, dim=1)
        z = torch.addcmul(x, away, (beta / (alpha + radius))[:, None])
        return z, self._logdet(radius, alpha, beta, x.shape[1])

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        alpha, beta = self._constants()
        away = z - self.center
        reached = torch.linalg.vector_norm(away, dim=1)
        # reached = r + beta r / (alpha + r); of the root's two forms the one that does not cancel.
        half = (reached - alpha - beta) / 2
        larger = torch.sqrt(half * half + alpha * reached) + half.abs()
        radius = torch.where(half >= 0, larger, alpha * reached / larger)
        x = torch.addcdiv(self.center, away, (1 + beta / (alpha + radius))[:, None])
        return x, -self._logdet(radius, alpha, beta, z.shape[1])
