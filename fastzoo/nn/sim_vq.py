"""Vector quantisation by a frozen codebook, seen through a map that is learned."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastzoo import ops
from fastzoo.ops._checks import check_floating, check_tensor


class SimVQ(nn.Module):
    """Vector quantisation by codes ``transform(frozen_codebook)``, with the arguments of
    lucidrains' vector_quantize_pytorch.

    A step moves all codes at once, through the transform, so none is left behind unused. No
    N x codebook_size matrix is made (:func:`fastzoo.ops.vq_quantize`).

    Args:
        dim: channels of the input.
        codebook_size: how many codes there are.
        codebook_transform: a module from ``[..., frozen_codebook_dim]`` to ``[..., dim]``; None is
            a linear map without bias.
        init_fn: makes the frozen codebook of normal numbers with variance 1 /
            frozen_codebook_dim; None leaves them as they are.
        channel_first: channels are the second dimension, not the last.
        rotation_trick: the gradient goes to the input through the map that turns and scales it into
            its code; False is straight through.
        input_to_quantize_commit_loss_weight: what the loss that moves the input counts beside the
            one that moves the codes.
        commitment_weight: of their sum.
        frozen_codebook_dim: None is ``dim``.

    Attributes:
        frozen_codebook: a buffer ``[codebook_size, frozen_codebook_dim]``.
        codebook: the codes ``[codebook_size, dim]``.
        code_transform: the transform. Names in state dicts are those of lucidrains' class.

    The nearest code is exact, the lowest index where two are equally near. Deterministic. Beside
    lucidrains' class: ``quantized`` is the code itself to the last bit.

    Raises:
        TypeError, ValueError: an argument of the wrong kind; the message names it.

    Source: Zhu et al., Addressing Representation Collapse in Vector Quantized Models with One
    Linear Layer (2024); Fifty et al., Restructuring Vector Quantization with the Rotation Trick
    (2024).
    """

    frozen_codebook: Tensor

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        codebook_transform: nn.Module | None = None,
        init_fn: Callable[[Tensor], Tensor] | None = None,
        channel_first: bool = False,
        rotation_trick: bool = True,
        input_to_quantize_commit_loss_weight: float = 0.25,
        commitment_weight: float = 1.0,
        frozen_codebook_dim: int | None = None,
    ) -> None:
        super().__init__()
        frozen_dim = dim if frozen_codebook_dim is None else frozen_codebook_dim
        sizes = {"dim": dim, "codebook_size": codebook_size, "frozen_codebook_dim": frozen_dim}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        self.dim = dim
        self.codebook_size = codebook_size
        self.channel_first = channel_first
        self.rotation_trick = rotation_trick
        self.input_to_quantize_commit_loss_weight = input_to_quantize_commit_loss_weight
        self.commitment_weight = commitment_weight
        frozen = torch.randn(codebook_size, frozen_dim) * frozen_dim**-0.5
        self.register_buffer("frozen_codebook", frozen if init_fn is None else init_fn(frozen))
        self.code_transform = codebook_transform or nn.Linear(frozen_dim, dim, bias=False)

    @property
    def codebook(self) -> Tensor:
        codes: Tensor = self.code_transform(self.frozen_codebook)
        return codes

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """The quantised vectors of indices as :meth:`forward` returns both, with a gradient to the
        transform."""
        codes: Tensor = self.code_transform(self.frozen_codebook[indices])
        return codes.movedim(-1, 1) if self.channel_first else codes

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``(quantized, indices, loss)``: the shape and dtype of ``x [..., dim]`` (or
        ``[B, dim, ...]``), int64 ``[...]``, and a scalar in float32 (float64 for float64):
        ``commitment_weight (mean (sg(x) - c)^2 + input_to_quantize_commit_loss_weight
        mean (x - sg(c))^2)``.

        Gradient: of ``quantized`` to ``x``; of ``loss`` to ``x`` and to the transform.
        """
        check_tensor("x", x, "[..., D]", -1)
        check_floating("x", x)
        if x.dim() < 1 + self.channel_first or x.shape[1 if self.channel_first else -1] != self.dim:
            where = "[B, D, ...]" if self.channel_first else "[..., D]"
            raise ValueError(f"x: expected {where}, D = {self.dim}, got {list(x.shape)}")
        found = ops.vq_quantize(
            x.movedim(1, -1) if self.channel_first else x,
            self.codebook,
            beta=self.input_to_quantize_commit_loss_weight,
            estimator="rotation" if self.rotation_trick else "ste",
        )
        quantized = found.quantized.movedim(-1, 1) if self.channel_first else found.quantized
        return quantized, found.indices, found.loss * self.commitment_weight

    def extra_repr(self) -> str:
        return f"dim={self.dim}, codebook_size={self.codebook_size}"
