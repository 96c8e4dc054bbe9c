"""Margins: what each does to the logit of a row's own class.

A margin is a few numbers and three decisions: which operands are normalised, whether a row's norm
scales its logits, and the rule of :func:`fastzoo.reference.margin_softmax_target` that moves the
target's cosine, with its coefficients ``m1, m2, m3`` for each row.
"""

import dataclasses
import math
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor


class Terms(NamedTuple):
    """A rule and its coefficients, each a number or one for each row."""

    rule: str
    m1: float | Tensor = 1.0
    m2: float | Tensor = 0.0
    m3: float | Tensor = 0.0


def _check_angle(name: str, value: float | Tensor) -> None:
    if isinstance(value, Tensor):
        return
    if not 0 <= value <= math.pi:
        raise ValueError(f"{name}: expected radians, from 0 to pi, got {value}")


@dataclasses.dataclass(frozen=True, eq=False)
class Margin:
    """What all margins have in common; the defaults are those of a margin on the cosine."""

    default_scale: ClassVar[float] = 64.0
    normalize_embeddings: ClassVar[bool] = True
    normalize_weight: ClassVar[bool] = True
    scales_by_norm: ClassVar[bool] = False  # a row's logits are multiplied by |x|
    state_size: ClassVar[int] = 0  # numbers of running state
    hardens_negatives: ClassVar[bool] = False  # other classes' scores depend on the target's

    def terms(self, norm: Tensor, state: Tensor) -> Terms:
        """``norm [N]`` of the embeddings; ``state`` as :meth:`update` returned it."""
        raise NotImplementedError

    def initial_state(self, like: Tensor) -> Tensor:
        return like.new_zeros(self.state_size)

    def update(self, state: Tensor, cosine: Tensor, norm: Tensor, valid: Tensor) -> Tensor:
        """The state after a batch of target cosines and norms ``[N]``, of which ``valid`` count."""
        return state

    def frozen(self) -> "Margin":
        """The same margin, whose state no batch changes: for evaluation."""
        return self

    def regularizer(self, norm: Tensor) -> Tensor | None:
        """What is added to each row's loss ``[N]``."""
        return None


@dataclasses.dataclass(frozen=True, eq=False)
class Plain(Margin):
    """No margin: NormFace, or with ``normalized=False`` the inner-product softmax.

    Source: Wang et al., NormFace (2017), equation 8.
    """

    normalized: bool = True

    @property
    def default_scale(self) -> float:  # type: ignore[override]
        return 64.0 if self.normalized else 1.0

    @property
    def normalize_embeddings(self) -> bool:  # type: ignore[override]
        return self.normalized

    @property
    def normalize_weight(self) -> bool:  # type: ignore[override]
        return self.normalized

    def terms(self, norm: Tensor, state: Tensor) -> Terms:
        return Terms("shift")


@dataclasses.dataclass(frozen=True, eq=False)
class LSoftmax(Margin):
    """``|w| |x| psi(theta)`` for the target, ``w x`` elsewhere; ``m`` a positive integer.

    ``psi(theta) = (-1)^k cos(m theta) - 2 k`` for ``theta`` in ``[k pi / m, (k + 1) pi / m]``,
    annealed as ``(lam cos(theta) + psi(theta)) / (1 + lam)``.

    Source: Liu et al., Large-Margin Softmax (2016), equations 4 to 6.
    """

    m: int = 2
    lam: float = 0.0

    default_scale: ClassVar[float] = 1.0
    normalize_weight: ClassVar[bool] = False
    scales_by_norm: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.m, int) or self.m < 1:
            raise ValueError(f"m: expected a positive integer, got {self.m!r}")
        if not self.lam >= 0:
            raise ValueError(f"lam: expected 0 or more, got {self.lam}")

    def terms(self, norm: Tensor, state: Tensor) -> Terms:
        return Terms("psi", float(self.m), self.lam)


@dataclasses.dataclass(frozen=True, eq=False)
class SphereFace(LSoftmax):
    """L-Softmax with normalised classes: ``|x| psi(theta)`` and ``|x| cos(theta)``.

    Source: Liu et al., SphereFace (2017), equation 7.
    """

    m: int = 4
    lam: float = 0.0

    normalize_weight: ClassVar[bool] = True


@dataclasses.dataclass(frozen=True, eq=False)
class CosFace(Margin):
    """``cos(theta) - m``; ``m`` a number or ``[N]``.

    Source: Wang et al., CosFace (2018), equation 4.
    """

    m: float | Tensor = 0.35

    def terms(self, norm: Tensor, state: Tensor) -> Terms:
        return Terms("shift", m3=self.m)


@dataclasses.dataclass(frozen=True, eq=False)
class ArcFace(Margin):
    """``cos(theta + m)``, and ``cos(theta) - m sin(m)`` where ``theta + m > pi``.

    ``easy_margin``: ``cos(theta)`` unchanged where it is not positive, instead. ``m`` a number or
    ``[N]``, in radians.

    Source: Deng et al., ArcFace (2019), equation 3.
    """

    m: float | Tensor = 0.5
    easy_margin: bool = False

    def __post_init__(self) -> None:
        _check_angle("m", self.m)

    def terms(self, norm: Tensor, state: Tensor) -> Terms:
        return Terms("easy" if self.easy_margin else "arcface", m2=self.m)


@dataclasses.dataclass(frozen=True, eq=False)
class Combined(Margin):
    """``cos(m1 theta + m2) - m3``; numbers or ``[N]``.

    Past pi: for ``m1 = 1`` as ArcFace does; otherwise ``(-1)^k cos(a) - 2 k - m3`` with ``a = m1
    theta + m2`` and ``k = floor(a / pi)``, which goes on falling.

    Source: Deng et al., ArcFace (2019), equation 4.
    """

    m1: float | Tensor = 1.0
    m2: float | Tensor = 0.0
    m3: float | Tensor = 0.0

    def __post_init__(self) -> None:
        _check_angle("m2", self.m2)
        if not isinstance(self.m1, Tensor) and not self.m1 > 0:
            raise ValueError(f"m1: expected a positive factor, got {self.m1}")

    def terms(self, norm: Tensor, state: Tensor) -> Terms:
        single = not isinstance(self.m1, Tensor) and self.m1 == 1
        return Terms("arcface" if single else "combined", self.m1, self.m2, self.m3)


@dataclasses.dataclass(frozen=True, eq=False)
class AdaFace(Margin):
    """A margin that follows the quality of an image, read from its embedding's norm.

    With ``z = clip(h (|x| - mean) / (std + 1e-3), -1, 1)``: ``cos(theta - m z) - (m + m z)``, the
    angle kept within ``[1e-3, pi - 1e-3]``. The state is the running mean and deviation of the
    norms, clipped to ``[1e-3, 100]``, from 20 and 100; a batch enters them with weight
    ``t_alpha``. Neither has a gradient.

    Source: Kim et al., AdaFace (2022), equations 12 to 14.
    """

    m: float = 0.4
    h: float = 0.333
    t_alpha: float = 0.01

    state_size: ClassVar[int] = 2

    def __post_init__(self) -> None:
        _check_angle("m", self.m)

    def initial_state(self, like: Tensor) -> Tensor:
        return like.new_tensor([20.0, 100.0])

    def update(self, state: Tensor, cosine: Tensor, norm: Tensor, valid: Tensor) -> Tensor:
        norm = torch.where(valid, norm.clamp(1e-3, 100), 0)
        count = valid.sum()
        mean = norm.sum() / count.clamp(min=1)
        square = torch.where(valid, norm - mean, 0).square().sum()
        deviation = (square / (count - 1).clamp(min=1)).sqrt()
        batch = torch.stack([mean, deviation])
        # A mean wants one row, a deviation two.
        known = torch.stack([count >= 1, count >= 2])
        return torch.where(known, state + self.t_alpha * (batch - state), state)

    def frozen(self) -> Margin:
        return dataclasses.replace(self, t_alpha=0.0)

    def terms(self, norm: Tensor, state: Tensor) -> Terms:
        mean, deviation = state.unbind()
        quality = self.h * (norm.detach().clamp(1e-3, 100) - mean) / (deviation + 1e-3)
        quality = self.m * quality.clamp(-1, 1)
        return Terms("clip", m2=-quality, m3=self.m + quality)


@dataclasses.dataclass(frozen=True, eq=False)
class MagFace(Margin):
    """ArcFace whose margin grows with the embedding's norm, which it also regularises.

    With ``a = clip(|x|, l_a, u_a)``: ``m(a) = l_m + (u_m - l_m) (a - l_a) / (u_a - l_a)``, and
    ``lambda_g (a / u_a^2 + 1 / a)`` is added to each row's loss. Gradients flow through ``a``.

    Source: Meng et al., MagFace (2021), equations 3 and 4.
    """

    l_a: float = 10.0
    u_a: float = 110.0
    l_m: float = 0.45
    u_m: float = 0.8
    lambda_g: float = 20.0

    def __post_init__(self) -> None:
        _check_angle("l_m", self.l_m)
        _check_angle("u_m", self.u_m)
        if not 0 < self.l_a < self.u_a:
            raise ValueError(f"l_a, u_a: expected 0 < l_a < u_a, got {self.l_a}, {self.u_a}")

    def terms(self, norm: Tensor, state: Tensor) -> Terms:
        slope = (self.u_m - self.l_m) / (self.u_a - self.l_a)
        return Terms("arcface", m2=self.l_m + slope * (norm.clamp(self.l_a, self.u_a) - self.l_a))

    def regularizer(self, norm: Tensor) -> Tensor:
        a = norm.clamp(self.l_a, self.u_a)
        return self.lambda_g * (a / self.u_a**2 + 1 / a)


@dataclasses.dataclass(frozen=True, eq=False)
class CurricularFace(Margin):
    """ArcFace whose hard negatives, those above ``cos(theta + m)``, become ``cos (t + cos)``.

    The state is ``t``, the running mean of the target cosines, from 0; a batch enters it with
    weight ``alpha`` before it is used. It has no gradient.

    Source: Huang et al., CurricularFace (2020), equations 9 to 11.
    """

    m: float = 0.5
    alpha: float = 0.01

    state_size: ClassVar[int] = 1
    hardens_negatives: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_angle("m", self.m)

    def update(self, state: Tensor, cosine: Tensor, norm: Tensor, valid: Tensor) -> Tensor:
        count = valid.sum()
        mean = torch.where(valid, cosine, 0).sum() / count.clamp(min=1)
        return torch.where(count > 0, state + self.alpha * (mean - state), state)

    def frozen(self) -> Margin:
        return dataclasses.replace(self, alpha=0.0)

    def terms(self, norm: Tensor, state: Tensor) -> Terms:
        return Terms("arcface", m2=self.m)
