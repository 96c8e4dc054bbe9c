"""Finite scalar quantisation: every dimension is rounded to a few levels."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastzoo.nn._scalar_quantizer import ScalarQuantizer, straight_through
from fastzoo.ops._checks import check_floating, check_tensor
from fastzoo.reference.precision import compute_dtype

# How far beyond its outermost level a bounded dimension can go, as the authors' code has it: the
# outermost levels are then reached by finite inputs.
BEYOND = 1e-3


class FSQ(ScalarQuantizer):
    """Finite scalar quantisation, with the arguments of lucidrains' vector_quantize_pytorch.

    A code has one dimension for each of ``levels``. A dimension with L levels is bounded by a
    hyperbolic tangent and rounded to the nearest of L equally spaced values in [-1, 1]: where L is
    odd they are symmetric about 0, where it is even the value 1 is missing, unless
    ``preserve_symmetry``. The index of a code counts the first dimension fastest.

    Args:
        levels: how many values each dimension has; at least 2, and at least 3 without
            ``preserve_symmetry``.
        dim: channels of the input; None is ``len(levels) * num_codebooks``. Another number is
            projected there and back (``project_in``, ``project_out``).
        num_codebooks: how many codes an input vector has, side by side.
        keep_num_codebooks_dim: whether indices have a last dimension of codebooks; None where there
            are several, when it cannot be left out.
        channel_first: channels are the second dimension. They also are in inputs of four dimensions
            or more: images, videos.
        projection_has_bias: of both projections.
        return_indices: False returns None in the place of indices.
        preserve_symmetry: space the levels from -1 to 1 for every L, and round to
            ``(2 / (L - 1)) floor((L - 1) (tanh(z) + 1) / 2 + 1/2) - 1`` (Parker et al. 2024).

    Attributes:
        codebook_size: the product of ``levels``.
        implicit_codebook: all codes ``[codebook_size, len(levels)]``, made when it is asked for.

    Half precision is quantised in float32. There are no losses, no state and no randomness; which
    level is nearest is decided in the input's precision by torch's tanh. Where an input is NaN,
    the code is NaN and its level in the index 0.

    Beside lucidrains' class: indices are int64 and right for any number of codes up to 2^63; codes
    are exact multiples of the step. Its other arguments do not exist here.

    Raises:
        TypeError, ValueError: an argument of the wrong kind; the message names it.

    Source: Mentzer et al., Finite Scalar Quantization (2023), section 3 and appendix A.1;
    symmetric levels: Parker et al., Scaling Transformers for Low-Bitrate High-Quality Speech
    Coding (2024), section 3.2.
    """

    _levels: Tensor
    _basis: Tensor

    def __init__(
        self,
        levels: Sequence[int],
        dim: int | None = None,
        num_codebooks: int = 1,
        keep_num_codebooks_dim: bool | None = None,
        *,
        channel_first: bool = False,
        projection_has_bias: bool = True,
        return_indices: bool = True,
        preserve_symmetry: bool = False,
    ) -> None:
        levels = list(levels)
        least = 2 if preserve_symmetry else 3
        if not levels or min(levels) < least:
            hint = "" if preserve_symmetry else " (2 with preserve_symmetry)"
            raise ValueError(f"levels: expected numbers of at least {least}{hint}, got {levels}")
        if math.prod(levels) >= 2**63:
            raise ValueError(f"levels: expected fewer than 2^63 codes, got {levels}")
        super().__init__(
            len(levels),
            dim=dim,
            num_codebooks=num_codebooks,
            keep_num_codebooks_dim=keep_num_codebooks_dim,
            has_projections=None,
            projection_has_bias=projection_has_bias,
            channel_first=channel_first or None,
        )
        self.levels = tuple(levels)
        self.codebook_size = math.prod(levels)
        self.return_indices = return_indices
        self.preserve_symmetry = preserve_symmetry
        basis = [math.prod(levels[:i]) for i in range(len(levels))]
        self.register_buffer("_levels", torch.tensor(levels), persistent=False)
        self.register_buffer("_basis", torch.tensor(basis), persistent=False)

    def _centre(self, dtype: torch.dtype) -> Tensor:
        """The level whose value is 0, between two levels with symmetry and an even L. It is as well
        how many levels there are to the value 1."""
        if self.preserve_symmetry:
            return (self._levels - 1).to(dtype) / 2
        return (self._levels // 2).to(dtype)

    def _rounded(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The code before it is rounded, and the nearest levels."""
        centre = self._centre(z.dtype)
        if self.preserve_symmetry:
            soft = torch.tanh(z)
            return soft, torch.floor((soft + 1) * centre + 0.5)
        reach = (self._levels - 1).to(z.dtype) * (1 + BEYOND) / 2
        # Even numbers of levels have one more below 0 than above; z = 0 stays at 0.
        offset = (self._levels % 2 == 0).to(z.dtype) / 2
        bounded = torch.tanh(z + torch.atanh(offset / reach)) * reach - offset
        return bounded / centre, torch.round(bounded) + centre

    def _values(self, level: Tensor) -> Tensor:
        centre = self._centre(level.dtype)
        return (level - centre) / centre

    def _index(self, level: Tensor) -> Tensor:
        return (level.nan_to_num(0).long() * self._basis).sum(-1)

    @property
    def implicit_codebook(self) -> Tensor:
        everything = torch.arange(self.codebook_size, device=self._levels.device)
        return self._values(self.indices_to_level_indices(everything).to(self._code_dtype()))

    def indices_to_level_indices(self, indices: Tensor) -> Tensor:
        """Levels ``[..., len(levels)]``, int64, of indices ``[...]``."""
        return indices.long().unsqueeze(-1) // self._basis % self._levels

    def codes_to_indices(self, codes: Tensor) -> Tensor:
        """Indices ``[...]``, int64, of codes ``[..., len(levels)]`` as they are before
        ``project_out``."""
        check_tensor("codes", codes, f"[..., {self.codebook_dim}]", -1)
        check_floating("codes", codes)
        if codes.shape[-1] != self.codebook_dim:
            raise ValueError(f"codes: expected [..., {self.codebook_dim}], got {list(codes.shape)}")
        codes = codes.to(compute_dtype(codes))
        centre = self._centre(codes.dtype)
        return self._index(torch.round(codes * centre + centre))

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """The quantised vectors of indices as :meth:`forward` returns both; in the dtype of
        ``project_out``, the default one without."""
        level = self.indices_to_level_indices(self._by_codebook(indices))
        return self._leave(self._values(level.to(self._code_dtype())))

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor | None]:
        """``(quantized, indices)``: the shape and dtype of ``z [..., dim]`` (or ``[B, dim, ...]``),
        and int64 ``[...]`` (``[..., num_codebooks]`` with ``keep_num_codebooks_dim``).

        The gradient to ``z`` is that of the bounded vector before it is rounded.
        """
        x = self._enter("z", z)
        soft, level = self._rounded(x.to(compute_dtype(x)))
        quantized = self._leave(straight_through(soft, self._values(level)).to(x.dtype))
        if not self.return_indices:
            return quantized, None
        return quantized, self._of_codebooks(self._index(level))

    def extra_repr(self) -> str:
        return f"levels={self.levels}, dim={self.dim}, num_codebooks={self.num_codebooks}"
