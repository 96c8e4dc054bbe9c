"""Features in another order."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastzoo.nn.flows.transform import Transform, no_logdet


class Permutation(Transform):
    """``z[:, i] = x[:, order[i]]``, of features or channels.

    Between couplings of halves it is not needed: ``split=d`` and ``split=-d`` in turn do the same
    and move nothing.
    """

    order: Tensor

    def __init__(self, order: Sequence[int] | Tensor) -> None:
        super().__init__()
        order = torch.as_tensor(order)
        if order.dim() != 1 or not torch.equal(order.sort().values, torch.arange(len(order))):
            raise ValueError(f"order: expected each of the features once, got {order.tolist()}")
        self.register_buffer("order", order)

    @classmethod
    def random(cls, features: int, generator: torch.Generator | None = None) -> "Permutation":
        return cls(torch.randperm(features, generator=generator))

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x.index_select(1, self.order), no_logdet(x)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return z.index_select(1, self.order.argsort()), no_logdet(z)


class Reverse(Transform):
    """Features, or channels, in reverse."""

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x.flip(1), no_logdet(x)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.forward(z)
