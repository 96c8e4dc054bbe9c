"""Bijections that mix or move channels: actnorm, the invertible 1x1 convolution, squeeze."""

import contextlib
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastzoo.reference.precision import compute_dtype

# Up to so many channels a batch of small products is faster than a convolution, measured on
# images of 4x4 to 16x16, forward and backward.
_FEW_CHANNELS = 64


class LU(NamedTuple):
    """A square matrix as ``W = P L (U + diag(sign exp(log_abs)))``, whose log-determinant is
    ``sum(log_abs)``."""

    permutation: Tensor
    """int64 ``[C]``: row i of W is row ``permutation[i]`` of the product without P."""
    lower: Tensor
    """``[C, C]``; only what is below the diagonal is read, and L's diagonal is 1."""
    upper: Tensor
    """``[C, C]``; only what is above the diagonal is read."""
    sign: Tensor
    """``[C]``, 1 or -1."""
    log_abs: Tensor
    """``[C]``."""

    @classmethod
    def factor(cls, weight: Tensor) -> "LU":
        """The factors of a matrix ``[C, C]``, by partial pivoting in float64."""
        placed, lower, upper = torch.linalg.lu(weight.double())
        diagonal = upper.diagonal()
        return cls(
            placed.argmax(1),
            lower.tril(-1).to(weight.dtype),
            upper.triu(1).to(weight.dtype),
            diagonal.sign().to(weight.dtype),
            diagonal.abs().log().to(weight.dtype),
        )


def actnorm(
    x: Tensor, log_scale: Tensor, bias: Tensor, *, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    """``y = (x + bias) exp(log_scale)`` of each channel, and the log-determinant ``[B]``."""
    dtype = compute_dtype(x)
    across = (-1,) + (1,) * (x.dim() - 2)
    logs, shift = log_scale.to(dtype).view(across), bias.to(dtype).view(across)
    wide = x.to(dtype)
    y = wide * (-logs).exp() - shift if inverse else (wide + shift) * logs.exp()
    return y.to(x.dtype), _log_determinant(x, logs.sum(), inverse)


def invertible_conv1x1(
    x: Tensor,
    weight: Tensor | LU,
    log_scale: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    inverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """``y = W (x + bias) exp(log_scale)`` at each position, and the log-determinant ``[B]``.

    The matrix is made, inverted and measured in float64, and actnorm is part of it.
    """
    matrix, log_det = _inverse_of(weight) if inverse else _matrix_of(weight)
    shift = None if bias is None else bias.double()
    if log_scale is not None:
        logs = log_scale.double()
        log_det = log_det + logs.sum()
        matrix = matrix * ((-logs).exp()[:, None] if inverse else logs.exp())
    if shift is not None:
        shift = -shift if inverse else matrix @ shift
    with _unrounded(x):
        y = _product(matrix.to(x.dtype), None if shift is None else shift.to(x.dtype), x)
    return y, _log_determinant(x, log_det, inverse)


def squeeze(x: Tensor, factor: int = 2) -> Tensor:
    """``[B, C, H, W]`` to ``[B, C factor^2, H / factor, W / factor]``: channel
    ``(c, row, column)``, in this order, of each square."""
    return F.pixel_unshuffle(x, factor)


def unsqueeze(x: Tensor, factor: int = 2) -> Tensor:
    """The inverse of :func:`squeeze`."""
    return F.pixel_shuffle(x, factor)


def _unrounded(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Without autocast: rounded to bfloat16, a bijection would not be inverted."""
    kind = x.device.type
    if torch.amp.is_autocast_available(kind):
        return torch.autocast(kind, enabled=False)
    return contextlib.nullcontext()


def _matrix_of(weight: Tensor | LU) -> tuple[Tensor, Tensor]:
    """W in float64, and ``log |det W|``."""
    if isinstance(weight, LU):
        lower, upper, log_abs = _triangles(weight)
        return (lower @ upper)[weight.permutation], log_abs.sum()
    return weight.double(), torch.linalg.slogdet(weight.double()).logabsdet


def _inverse_of(weight: Tensor | LU) -> tuple[Tensor, Tensor]:
    """The inverse of W in float64, and ``log |det W|``."""
    if isinstance(weight, LU):
        lower, upper, log_abs = _triangles(weight)
        placed = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
        placed = placed[weight.permutation].T
        half = torch.linalg.solve_triangular(lower, placed, upper=False, unitriangular=True)
        return torch.linalg.solve_triangular(upper, half, upper=True), log_abs.sum()
    return torch.linalg.inv(weight.double()), torch.linalg.slogdet(weight.double()).logabsdet


def _triangles(weight: LU) -> tuple[Tensor, Tensor, Tensor]:
    lower, upper, log_abs = weight.lower.double(), weight.upper.double(), weight.log_abs.double()
    eye = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
    diagonal = weight.sign.double() * log_abs.exp()
    return lower.tril(-1) + eye, upper.triu(1) + diagonal.diag(), log_abs


def _product(matrix: Tensor, shift: Tensor | None, x: Tensor) -> Tensor:
    """``matrix x + shift`` at each position of x ``[B, C, ...]``."""
    if x.dim() == 2:
        return F.linear(x, matrix, shift)
    rows, channels = x.shape[:2]
    flat = x.flatten(2)
    if channels > _FEW_CHANNELS:
        return F.conv1d(flat, matrix[:, :, None], shift).view(x.shape)
    matrices = matrix.expand(rows, channels, channels)
    if shift is None:
        return torch.bmm(matrices, flat).view(x.shape)
    return torch.baddbmm(shift[:, None], matrices, flat).view(x.shape)


def _log_determinant(x: Tensor, of_position: Tensor, inverse: bool) -> Tensor:
    total = of_position * x.shape[2:].numel()
    return (-total if inverse else total).to(compute_dtype(x)).expand(x.shape[0])
