"""taming-transformers' quantisers on fastzoo's operators.

Names, arguments, results and checkpoints are those of ``taming.modules.vqvae.quantize`` (2022):
latents ``z [B, e_dim, H, W]``, ``(z_q, loss, (perplexity, min_encodings, indices))``.

Differences: the nearest code is exact (theirs expands the square in float32), the lowest index
where two are equally near; ``z_q`` is the code to the last bit; a random index is another draw;
used indices are not changed in place; the perplexity is exact, theirs adds 1e-10 in the logarithm.
No N x n_e matrix is made. Where theirs return one-hot rows, here is a sparse tensor with one entry
a row, which multiplies as theirs do and whose ``to_dense()`` is theirs.
"""

import os
from typing import Any

import torch
from torch import Tensor, nn

from fastzoo import ops
from fastzoo.nn import GumbelVQ
from fastzoo.nn._remapped import Remapped
from fastzoo.ops._checks import check_floating, check_tensor

GumbelQuantize = GumbelVQ


def _one_hot(indices: Tensor, codes: int, dtype: torch.dtype) -> Tensor:
    """Rows ``[N, codes]`` with a 1 at their index; sparse, so of N entries."""
    rows = torch.arange(len(indices), device=indices.device)
    ones = torch.ones(len(indices), dtype=dtype, device=indices.device)
    places = torch.stack([rows, indices])
    found: Tensor = torch.sparse_coo_tensor(
        places, ones, (len(indices), codes), check_invariants=False, is_coalesced=True
    )
    return found


class _Quantizer(Remapped):
    """Codes in ``embedding.weight [n, dim]``, for images of ``dim`` channels."""

    embedding: nn.Module

    def __init__(
        self,
        codes: int,
        dim: int,
        remap: str | os.PathLike[str] | Tensor | None = None,
        unknown_index: str | int = "random",
    ) -> None:
        for name, value in {"n_e": codes, "e_dim": dim}.items():
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        super().__init__(codes, remap, unknown_index)
        self.n_e = codes
        self.e_dim = dim

    @property
    def _codebook(self) -> Tensor:
        weight = self.embedding.weight
        assert isinstance(weight, Tensor)
        return weight

    def _quantize(self, z: Tensor, **options: Any) -> tuple[Tensor, ops.VQOutput]:
        """``z_q [B, e_dim, H, W]``, and what the operator found of ``z [B, H, W, e_dim]``."""
        check_tensor("z", z, f"[B, {self.e_dim}, H, W]", 4)
        check_floating("z", z)
        if z.shape[1] != self.e_dim:
            raise ValueError(f"z: expected [B, {self.e_dim}, H, W], got {list(z.shape)}")
        found = ops.vq_quantize(z.movedim(1, -1), self._codebook, **options)
        return found.quantized.movedim(-1, 1).contiguous(), found

    def get_codebook_entry(self, indices: Tensor, shape: tuple[int, ...] | None) -> Tensor:
        """Codes of indices: ``[..., e_dim]``, or with a ``shape (B, H, W, e_dim)`` the image
        ``[B, e_dim, H, W]``. Has a gradient to the codes."""
        if self.remap is not None:
            indices = self.unmap_to_all(indices)
        if shape is None:
            return self._codebook[indices]
        return self._codebook[indices.flatten()].view(shape).movedim(-1, 1).contiguous()


def _embedding(codes: int, dim: int) -> nn.Embedding:
    embedding = nn.Embedding(codes, dim)
    nn.init.uniform_(embedding.weight, -1 / codes, 1 / codes)
    return embedding


class VectorQuantizer2(_Quantizer):
    """Theirs of that name, which their VQGANs use.

    Args:
        n_e, e_dim: codes, and their dimensions.
        beta: weighs the loss that moves ``z``; with ``legacy`` the one that moves the codes.
        remap: the file (``.npy``) or tensor of the codes that are used; indices then count these.
        unknown_index: the index of other codes: ``random``, ``extra`` or a number.
        sane_index_shape: indices ``[B, H, W]`` instead of ``[B H W]`` (``[B H W, 1]`` with
            ``remap``).
        legacy: the weights of the losses as their first version had them.
    """

    def __init__(
        self,
        n_e: int,
        e_dim: int,
        beta: float,
        remap: str | os.PathLike[str] | Tensor | None = None,
        unknown_index: str | int = "random",
        sane_index_shape: bool = False,
        legacy: bool = True,
    ) -> None:
        super().__init__(n_e, e_dim, remap, unknown_index)
        self.beta = beta
        self.legacy = legacy
        self.sane_index_shape = sane_index_shape
        self.embedding = _embedding(n_e, e_dim)

    def forward(
        self,
        z: Tensor,
        temp: float | None = None,
        rescale_logits: bool = False,
        return_logits: bool = False,
    ) -> tuple[Tensor, Tensor, tuple[None, None, Tensor]]:
        """``(z_q, loss, (None, None, indices))`` of ``z [B, e_dim, H, W]``; the other arguments
        exist for :class:`GumbelQuantize` and have one value each here."""
        if temp not in (None, 1.0):
            raise ValueError(f"temp: expected None or 1, got {temp}")
        for name, value in {
            "rescale_logits": rescale_logits,
            "return_logits": return_logits,
        }.items():
            if value:
                raise ValueError(f"{name}: expected False, got {value}")
        z_q, found = self._quantize(z, beta=self.beta, legacy=self.legacy)
        indices = found.indices
        if self.remap is not None:
            indices = self.remap_to_used(indices)
        if not self.sane_index_shape:
            indices = indices.flatten()
            if self.remap is not None:
                indices = indices.unsqueeze(1)
        return z_q, found.loss, (None, None, indices)


class VectorQuantizer(_Quantizer):
    """Theirs of that name: :class:`VectorQuantizer2` with ``legacy``, indices ``[B H W, 1]``, the
    perplexity, and one-hot rows, which are sparse here."""

    def __init__(self, n_e: int, e_dim: int, beta: float) -> None:
        super().__init__(n_e, e_dim)
        self.beta = beta
        self.embedding = _embedding(n_e, e_dim)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
        """``(z_q, loss, (perplexity, min_encodings, indices))`` of ``z [B, e_dim, H, W]``;
        ``min_encodings [B H W, n_e]`` in the dtype of ``z``."""
        z_q, found = self._quantize(z, beta=self.beta, legacy=True, return_stats=True)
        indices = found.indices.flatten()
        min_encodings = _one_hot(indices, self.n_e, z.dtype)
        return z_q, found.loss, (found.perplexity, min_encodings, indices.unsqueeze(1))


class EmbeddingEMA(nn.Module):
    """Codes that follow the averages of their vectors; no parameter has a gradient.

    ``update`` False keeps the codes as they are.
    """

    def __init__(
        self, num_tokens: int, codebook_dim: int, decay: float = 0.99, eps: float = 1e-5
    ) -> None:
        super().__init__()
        self.decay = decay
        self.eps = eps
        self.update = True
        weight = torch.randn(num_tokens, codebook_dim)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.cluster_size = nn.Parameter(torch.zeros(num_tokens), requires_grad=False)
        self.embed_avg = nn.Parameter(weight.clone(), requires_grad=False)

    def forward(self, embed_id: Tensor) -> Tensor:
        return self.weight[embed_id]


class EMAVectorQuantizer(_Quantizer):
    """Theirs of that name, which as published cannot be constructed: its constructor reads names
    that its arguments do not have.

    ``z_q`` and ``loss = beta mean (z - sg(c))^2`` belong to the codes before the update, which is
    of this process's vectors alone. ``remap`` is for :meth:`remap_to_used`, not for the indices
    that are returned. One-hot rows are sparse.
    """

    embedding: EmbeddingEMA

    def __init__(
        self,
        n_embed: int,
        embedding_dim: int,
        beta: float,
        decay: float = 0.99,
        eps: float = 1e-5,
        remap: str | os.PathLike[str] | Tensor | None = None,
        unknown_index: str | int = "random",
    ) -> None:
        super().__init__(n_embed, embedding_dim, remap, unknown_index)
        self.beta = beta
        self.embedding = EmbeddingEMA(n_embed, embedding_dim, decay, eps)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
        """``(z_q, loss, (perplexity, encodings, indices))`` of ``z [B, embedding_dim, H, W]``;
        ``indices [B H W]``, and ``encodings [B H W, n_embed]`` in the dtype of ``z``."""
        z_q, found = self._quantize(z, beta=self.beta, codebook_weight=0.0, return_stats=True)
        if self.training and self.embedding.update:
            ops.vq_ema_update_(
                self.embedding.weight,
                self.embedding.cluster_size,
                self.embedding.embed_avg,
                found.counts,
                found.sums,
                decay=self.embedding.decay,
                eps=self.embedding.eps,
            )
        indices = found.indices.flatten()
        encodings = _one_hot(indices, self.n_e, z.dtype)
        return z_q, found.loss, (found.perplexity, encodings, indices)
