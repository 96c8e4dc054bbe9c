"""Bijections whose work is torch's own GEMM: actnorm, invertible 1x1 convolutions, squeeze."""

from torch import Tensor

from fastzoo import reference
from fastzoo.ops._checks import check_floating, check_positive, check_tensor
from fastzoo.reference.mixing import LU


def actnorm(
    x: Tensor, log_scale: Tensor, bias: Tensor, *, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    """Glow's activation normalisation, ``y = (x + bias) exp(log_scale)`` of each channel.

    Args:
        x: ``[B, C, ...]``; float32, float64, float16 or bfloat16.
        log_scale, bias: ``[C]``.
        inverse: ``y = x exp(-log_scale) - bias`` instead.

    Returns:
        y like x, computed in float32 (float64 for float64), and the log-determinant ``[B]``, the
        sum of ``log_scale`` times the number of positions (its negative with ``inverse``); one
        value, expanded, that has no memory of its own for each row.

    Gradient: to every tensor, of any order. In place of a 1x1 convolution's own actnorm,
    :func:`invertible_conv1x1` takes these parameters, at no pass over the data.

    Raises:
        TypeError, ValueError: an argument of the wrong kind; the message names it.

    Source: Kingma and Dhariwal, Glow (2018), section 3.1.
    """
    channels = _check_data(x)
    _check_vector("log_scale", log_scale, channels)
    _check_vector("bias", bias, channels)
    return reference.actnorm(x, log_scale, bias, inverse=inverse)


def invertible_conv1x1(
    x: Tensor,
    weight: Tensor | LU,
    log_scale: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    inverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Glow's invertible 1x1 convolution, ``y = W ((x + bias) exp(log_scale))`` at each position.

    With ``log_scale`` and ``bias`` it is actnorm and the convolution in one product over the data:
    they are folded into the small matrix. That matrix, its inverse (a plain one by LU with
    pivoting, an :class:`LU` by two triangular solves) and its log-determinant are computed in
    float64; nothing is solved for a pixel.

    Args:
        x: ``[B, C, ...]``, any number of positions; float32, float64, float16 or bfloat16.
        weight: ``[C, C]``, or the five tensors of an :class:`LU`, whose log-determinant is a sum
            and which is never singular.
        log_scale, bias: ``[C]``: actnorm before the convolution. Each may be None.
        inverse: ``y = (W^-1 x) exp(-log_scale) - bias`` instead.

    Returns:
        y like x, and the log-determinant ``[B]``, ``positions (log |det W| + sum(log_scale))`` (its
        negative with ``inverse``), float32 (float64 for float64), expanded from one value.

    Gradient: to every floating tensor, of any order (the signs of an LU are constants). Of a
    singular plain W the log-determinant is -inf, and the inverse raises. Under autocast it computes
    in x's own dtype: rounded to bfloat16 it would not be inverted.

    Raises:
        TypeError, ValueError: an argument of the wrong kind; the message names it.

    Source: Kingma and Dhariwal, Glow (2018), section 3.2.
    """
    channels = _check_data(x)
    if isinstance(weight, LU):
        for name in ("lower", "upper"):
            _check_matrix(f"weight.{name}", getattr(weight, name), channels)
        for name in ("permutation", "sign", "log_abs"):
            _check_vector(f"weight.{name}", getattr(weight, name), channels)
    else:
        _check_matrix("weight", weight, channels)
    if log_scale is not None:
        _check_vector("log_scale", log_scale, channels)
    if bias is not None:
        _check_vector("bias", bias, channels)
    return reference.invertible_conv1x1(x, weight, log_scale, bias, inverse=inverse)


def squeeze(x: Tensor, factor: int = 2) -> Tensor:
    """Moves each square of ``factor x factor`` pixels into channels; its log-determinant is 0.

    The order is Glow's, and that of ``torch.nn.functional.pixel_unshuffle``: output channel
    ``(c factor + row) factor + column`` holds pixel (row, column) of channel c's squares.

    Args:
        x: ``[B, C, H, W]`` with H and W multiples of ``factor``.
        factor: at least 1.

    Returns:
        ``[B, C factor^2, H / factor, W / factor]``.

    Source: Dinh et al., RealNVP (2017), section 3.6.
    """
    check_tensor("x", x, "[B, C, H, W]", 4)
    check_positive("factor", factor)
    if x.shape[2] % factor or x.shape[3] % factor:
        raise ValueError(f"x: expected H and W to be multiples of {factor}, got {list(x.shape)}")
    return reference.squeeze(x, factor)


def unsqueeze(x: Tensor, factor: int = 2) -> Tensor:
    """The inverse of :func:`squeeze`: ``[B, C factor^2, H, W]`` to
    ``[B, C, H factor, W factor]``."""
    check_tensor("x", x, "[B, C, H, W]", 4)
    check_positive("factor", factor)
    if x.shape[1] % factor**2:
        raise ValueError(f"x: expected C to be a multiple of {factor**2}, got {list(x.shape)}")
    return reference.unsqueeze(x, factor)


def _check_data(x: Tensor) -> int:
    check_tensor("x", x, "[B, C, ...]", -1)
    if x.dim() < 2:
        raise ValueError(f"x: expected shape [B, C, ...], got {list(x.shape)}")
    check_floating("x", x)
    return x.shape[1]


def _check_vector(name: str, value: Tensor, channels: int) -> None:
    check_tensor(name, value, "[C]", 1)
    if value.shape[0] != channels:
        raise ValueError(f"{name}: expected {channels} values, got {value.shape[0]}")


def _check_matrix(name: str, value: Tensor, channels: int) -> None:
    check_tensor(name, value, "[C, C]", 2)
    if tuple(value.shape) != (channels, channels):
        raise ValueError(f"{name}: expected {[channels, channels]}, got {list(value.shape)}")
