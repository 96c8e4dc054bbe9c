"""Vector quantisation by a sample of a distribution over the codes."""

import math
import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastzoo.nn._remapped import Remapped
from fastzoo.ops._checks import check_floating, check_tensor


class GumbelVQ(Remapped):
    """Quantisation by Gumbel-Softmax, as ``GumbelQuantize`` of taming-transformers has it.

    A 1x1 convolution makes logits over the codes; a code is drawn by adding Gumbel noise, in
    training and in evaluation, and the gradient is that of the softmax of the noisy logits over the
    temperature. The loss is ``kl_weight`` times the mean of ``KL(softmax(logits) | uniform)``. Here
    the logits are the model, so they are in memory: ``n_embed`` for every vector, a few times.

    Args:
        num_hiddens: channels of the input.
        embedding_dim: channels of the output.
        n_embed: how many codes there are.
        straight_through: in training, give codes themselves; False gives their average by the
            softmax. In evaluation it is always codes.
        kl_weight: of the loss.
        temp_init: the first ``temperature``, an attribute to be lowered while training.
        use_vqinterface: return ``(None, None, indices)`` where otherwise there are only indices.
        remap: the file (``.npy``) or tensor of the codes that may be drawn; None is all of them.
            Indices then count these.
        unknown_index: for :meth:`remap_to_used`: ``random``, ``extra`` or a number.

    Attributes:
        proj, embed: ``proj.weight [n_embed, num_hiddens, 1, 1]``, ``proj.bias [n_embed]`` and
            ``embed.weight [n_embed, embedding_dim]``, as in checkpoints of taming-transformers.

    The noise is that of ``torch.nn.functional.gumbel_softmax``: with torch's generator in the same
    state, the result is as well. Beside their class: the divergence is exact, theirs adds 1e-10 in
    the logarithm.

    Raises:
        TypeError, ValueError: an argument of the wrong kind; the message names it.

    Source: Jang et al., Categorical Reparameterization with Gumbel-Softmax (2016); Esser et al.,
    Taming Transformers (2021).
    """

    def __init__(
        self,
        num_hiddens: int,
        embedding_dim: int,
        n_embed: int,
        straight_through: bool = True,
        kl_weight: float = 5e-4,
        temp_init: float = 1.0,
        use_vqinterface: bool = True,
        remap: str | os.PathLike[str] | Tensor | None = None,
        unknown_index: str | int = "random",
    ) -> None:
        sizes = {"num_hiddens": num_hiddens, "embedding_dim": embedding_dim, "n_embed": n_embed}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        super().__init__(n_embed, remap, unknown_index)
        self.num_hiddens = num_hiddens
        self.embedding_dim = embedding_dim
        self.n_embed = n_embed
        self.straight_through = straight_through
        self.kl_weight = kl_weight
        self.temperature = temp_init
        self.use_vqinterface = use_vqinterface
        self.proj = nn.Conv2d(num_hiddens, n_embed, 1)
        self.embed = nn.Embedding(n_embed, embedding_dim)

    def forward(
        self, z: Tensor, temp: float | None = None, return_logits: bool = False
    ) -> tuple[Any, ...]:
        """``(z_q, diff, (None, None, indices))`` of ``z [B, num_hiddens, H, W]``.

        ``z_q [B, embedding_dim, H, W]``, the scalar loss ``diff`` and int64 ``indices [B, H, W]``;
        without ``use_vqinterface``, ``(z_q, diff, indices)``. ``z_q`` and ``diff`` have gradients
        to ``z`` and to all parameters.

        Args:
            temp: the temperature; None is the attribute.
            return_logits: with ``use_vqinterface``, also return the logits
                ``[B, n_embed, H, W]`` (of the used codes alone, with a ``remap``).
        """
        check_tensor("z", z, f"[B, {self.num_hiddens}, H, W]", 4)
        check_floating("z", z)
        if z.shape[1] != self.num_hiddens:
            raise ValueError(f"z: expected [B, {self.num_hiddens}, H, W], got {list(z.shape)}")
        temp = self.temperature if temp is None else temp
        if not temp > 0:
            raise ValueError(f"temp: expected more than 0, got {temp}")
        logits, embeddings = self.proj(z), self.embed.weight
        if self.remap is not None:
            logits, embeddings = logits[:, self.used], embeddings[self.used]
        hard = self.straight_through or not self.training
        chosen = F.gumbel_softmax(logits, tau=temp, dim=1, hard=hard)
        z_q = torch.einsum("bnhw,nd->bdhw", chosen, embeddings)
        log_q = torch.log_softmax(logits, 1)
        divergence = (log_q.exp() * (log_q + math.log(self.n_embed))).sum(1)
        diff = self.kl_weight * divergence.mean()
        indices = chosen.argmax(1)
        if not self.use_vqinterface:
            return z_q, diff, indices
        found = z_q, diff, (None, None, indices)
        return (*found, logits) if return_logits else found

    def get_codebook_entry(self, indices: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
        """``[B, embedding_dim, H, W]`` of indices ``[B H W]``; ``shape`` is ``(B, H, W, C)``."""
        b, h, w, _ = shape
        if indices.numel() != b * h * w:
            raise ValueError(f"indices: expected {b * h * w} of them, got {list(indices.shape)}")
        if self.remap is not None:
            indices = self.unmap_to_all(indices)
        codes: Tensor = self.embed(indices.reshape(b, h, w))
        return codes.movedim(-1, 1).contiguous()
