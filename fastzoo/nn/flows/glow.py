"""Glow and RealNVP, and the layers that they are made of."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastzoo import ops
from fastzoo.nn._state import updates_state
from fastzoo.nn.flows.coupling import AffineCoupling
from fastzoo.nn.flows.invertible import InvertibleSequence
from fastzoo.nn.flows.multiscale import MultiScale, Squeeze, checkerboard_mask
from fastzoo.nn.flows.permutation import Permutation, Reverse
from fastzoo.nn.flows.transform import Compose, Transform
from fastzoo.ops._checks import check_choice, check_positive
from fastzoo.ops._collectives import sum_over
from fastzoo.reference.precision import compute_dtype

Mixing = Literal["lu", "plain", "reverse", "shuffle"]
MIXINGS = ("lu", "plain", "reverse", "shuffle")


class ActNorm(Transform):
    """``z = (x + bias) exp(log_scale)`` of each feature or channel, with learned parameters that
    make the first training batch (of all ranks) have mean 0 and variance 1.

    Until then it is the identity. A channel that does not vary is not scaled.

    Source: Kingma and Dhariwal, Glow (2018), section 3.1.
    """

    initialised: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        check_positive("channels", channels)
        self.log_scale = nn.Parameter(torch.zeros(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("initialised", torch.tensor(False))
        # What the buffer says, known without waiting for the device.
        self.ready = False

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self.see(x)
        return ops.actnorm(x, self.log_scale, self.bias)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return ops.actnorm(z, self.log_scale, self.bias, inverse=True)

    def see(self, x: Tensor) -> None:
        """Called with each batch; takes the parameters from the first one of training."""
        if not self.ready and updates_state(self):
            self._initialise(x)

    @torch.no_grad()
    def _initialise(self, x: Tensor) -> None:
        rows = x.movedim(1, -1).flatten(0, -2).to(compute_dtype(x))
        number = sum_over(rows.new_tensor(float(len(rows))), None)
        mean = sum_over(rows.sum(0), None) / number
        deviation = (sum_over((rows - mean).square().sum(0), None) / number).sqrt()
        # What rounding leaves of a constant is not to be blown up.
        constant = deviation <= mean.abs() * torch.finfo(x.dtype).eps
        self.bias.copy_(-mean)
        self.log_scale.copy_(-torch.where(constant, 1, deviation).log())
        self.initialised.fill_(True)
        self.ready = True

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.ready = not self.initialised.is_meta and bool(self.initialised)

    def extra_repr(self) -> str:
        return f"{len(self.bias)}"


class InvertibleConv1x1(Transform):
    """``z = W x`` at each position, with a learned W that starts as a random rotation; after
    actnorm, both in one product over the data.

    Args:
        channels: of an image, or features.
        lu: learn the factors :class:`fastzoo.ops.LU` of W, with signs and permutation as they
            are: the log-determinant is a sum, and W never singular. Otherwise W itself.
        actnorm: an :class:`ActNorm` before, folded into W.

    Source: Kingma and Dhariwal, Glow (2018), section 3.2.
    """

    def __init__(self, channels: int, *, lu: bool = True, actnorm: bool = False) -> None:
        super().__init__()
        check_positive("channels", channels)
        self.actnorm = ActNorm(channels) if actnorm else None
        rotation = torch.empty(channels, channels)
        nn.init.orthogonal_(rotation)
        self.lu = lu
        if not lu:
            self.weight = nn.Parameter(rotation)
            return
        factors = ops.LU.factor(rotation)
        self.register_buffer("permutation", factors.permutation)
        self.register_buffer("sign", factors.sign)
        self.lower = nn.Parameter(factors.lower)
        self.upper = nn.Parameter(factors.upper)
        self.log_abs = nn.Parameter(factors.log_abs)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if self.actnorm is not None:
            self.actnorm.see(x)
        return self._mix(x, inverse=False)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._mix(z, inverse=True)

    def _weight(self) -> Tensor | ops.LU:
        if not self.lu:
            return self.weight
        assert isinstance(self.permutation, Tensor)
        assert isinstance(self.sign, Tensor)
        return ops.LU(self.permutation, self.lower, self.upper, self.sign, self.log_abs)

    def _mix(self, x: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        norm = self.actnorm
        folded = (None, None) if norm is None else (norm.log_scale, norm.bias)
        return ops.invertible_conv1x1(x, self._weight(), *folded, inverse=inverse)

    def extra_repr(self) -> str:
        return f"lu={self.lu}"


class ZeroConv2d(nn.Conv2d):
    """A 3x3 convolution that gives zeros at first, times ``exp(3 log_scale)`` of each output.

    Source: Kingma and Dhariwal, Glow (2018), section 3.3.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1)
        self.log_scale = nn.Parameter(torch.zeros(out_channels))
        for zero in self.parameters():
            nn.init.zeros_(zero)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        scale = (3 * self.log_scale).exp()
        assert self.bias is not None
        return F.conv2d(x, self.weight * scale[:, None, None, None], self.bias * scale, padding=1)


class GlowConditioner(nn.Module):
    """A 3x3 convolution, a 1x1 and a :class:`ZeroConv2d`, with ReLU between: it starts at 0.

    Args:
        in_channels, out_channels, hidden: widths.
        context: channels of a context ``[B, context]`` or ``[B, context, H, W]``, which join the
            input.
    """

    def __init__(
        self, in_channels: int, out_channels: int, hidden: int = 512, *, context: int = 0
    ) -> None:
        super().__init__()
        self.context = context
        self.first = nn.Conv2d(in_channels + context, hidden, 3, padding=1)
        self.second = nn.Conv2d(hidden, hidden, 1)
        self.last = ZeroConv2d(hidden, out_channels)
        for layer in (self.first, self.second):
            nn.init.normal_(layer.weight, std=0.05)
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        if self.context:
            if context is None:
                raise ValueError(f"context: expected [B, {self.context}], got none")
            if context.dim() == 2:
                context = context[:, :, None, None].expand(-1, -1, *x.shape[2:])
            x = torch.cat([x, context], 1)
        found: Tensor = self.last(F.relu(self.second(F.relu(self.first(x)))))
        return found


class GlowStep(Compose):
    """Actnorm and an invertible 1x1 convolution in one, then an affine coupling: the first half of
    the channels passes, of the rest ``z = (x + shift) sigmoid(scale + 2)``.

    Args:
        channels: an even number.
        conditioner: a network that makes ``channels`` of the first half, all shifts before all
            scales; by default :class:`GlowConditioner`.
        hidden, context: of the default conditioner.
        mixing: ``lu`` or ``plain``, the form of :class:`InvertibleConv1x1`; ``reverse`` or
            ``shuffle``: a fixed order of the channels in its place.

    Source: Kingma and Dhariwal, Glow (2018).
    """

    def __init__(
        self,
        channels: int,
        conditioner: nn.Module | None = None,
        *,
        hidden: int = 512,
        context: int = 0,
        mixing: Mixing = "lu",
    ) -> None:
        check_choice("mixing", mixing, MIXINGS)
        if channels < 2 or channels % 2:
            raise ValueError(f"channels: expected an even number, got {channels}")
        half = channels // 2
        if conditioner is None:
            conditioner = GlowConditioner(half, channels, hidden, context=context)
        mixed: list[Transform]
        if mixing in ("lu", "plain"):
            mixed = [InvertibleConv1x1(channels, lu=mixing == "lu", actnorm=True)]
        else:
            order = Reverse() if mixing == "reverse" else Permutation.random(channels)
            mixed = [ActNorm(channels), order]
        coupling = AffineCoupling(conditioner, split=half, scale_map="sigmoid2", shift_first=True)
        super().__init__([*mixed, coupling])


def prior_coupling(channels: int) -> AffineCoupling:
    """Glow's learned prior of the channels that a level puts out: mean and deviation from a
    convolution of those that go on, at first 0 and 1. The last transform of a level."""
    half = channels // 2
    return AffineCoupling(ZeroConv2d(half, 2 * (channels - half)), split=half, shift_first=True)


class Glow(MultiScale):
    """Levels of squeeze and Glow steps, to flat latents that are standard normal.

    ``Flow(Glow((3, 32, 32)), StandardNormal(3 * 32 * 32))`` is the density.

    Args:
        shape: ``(C, H, W)``, H and W multiples of ``2^levels``.
        levels, steps: steps in each level.
        hidden, context, mixing: as :class:`GlowStep` has them.
        learned_prior: a :func:`prior_coupling` at the end of each level but the last.
        anchor_every: train in memory that does not grow with the steps: each level is an
            :class:`InvertibleSequence` with these anchors.

    Source: Kingma and Dhariwal, Glow (2018).
    """

    def __init__(
        self,
        shape: Sequence[int],
        levels: int = 3,
        steps: int = 32,
        *,
        hidden: int = 512,
        context: int = 0,
        mixing: Mixing = "lu",
        learned_prior: bool = False,
        anchor_every: int | None = None,
    ) -> None:
        check_positive("levels", levels)
        check_positive("steps", steps)
        channels = shape[0]
        made = []
        for level in range(levels):
            channels *= 4
            layers: list[Transform] = [Squeeze()]
            for _ in range(steps):
                layers.append(GlowStep(channels, hidden=hidden, context=context, mixing=mixing))
            if learned_prior and level + 1 < levels:
                layers.append(prior_coupling(channels))
            made.append(sequence(layers, anchor_every))
            channels //= 2
        super().__init__(shape, made)


class RealNVP(MultiScale):
    """RealNVP's scales, to flat latents that are standard normal: three couplings by checkerboards,
    a squeeze and three by halves of the channels; at the last scale four checkerboards.

    Scales are ``exp(bound tanh(s))``, and each coupling follows an :class:`ActNorm`, where the
    paper has batch normalisation, whose inverse in training is none of the batch's.

    Args:
        shape: ``(C, H, W)``, H and W multiples of ``2^(levels - 1)``.
        levels: scales.
        hidden, context: of the conditioners.
        bound: of the logarithm of a coupling's scale.
        conditioner: ``conditioner(in_channels, out_channels)`` makes a network, by default
            :class:`GlowConditioner`.
        anchor_every: as :class:`Glow` has it.

    Source: Dinh et al., Density estimation using Real NVP (2017).
    """

    def __init__(
        self,
        shape: Sequence[int],
        levels: int = 2,
        *,
        hidden: int = 64,
        context: int = 0,
        bound: float = 2.0,
        conditioner: Callable[[int, int], nn.Module] | None = None,
        anchor_every: int | None = None,
    ) -> None:
        check_positive("levels", levels)
        channels, height, width = shape

        def made_by(inputs: int, outputs: int) -> nn.Module:
            if conditioner is not None:
                return conditioner(inputs, outputs)
            return GlowConditioner(inputs, outputs, hidden, context=context)

        def coupled(channels: int, **passing: Any) -> list[Transform]:
            inputs = channels if "mask" in passing else channels // 2
            network = made_by(inputs, 2 * inputs)
            return [
                ActNorm(channels),
                AffineCoupling(network, scale_map="tanh", bound=bound, **passing),
            ]

        def checkerboards(number: int) -> list[Transform]:
            masks = (checkerboard_mask(height, width, odd=i % 2 == 1) for i in range(number))
            return [layer for mask in masks for layer in coupled(channels, mask=mask)]

        scales = []
        for _ in range(levels - 1):
            layers = [*checkerboards(3), Squeeze()]
            channels, height, width = 4 * channels, height // 2, width // 2
            for sign in (1, -1, 1):
                layers += coupled(channels, split=sign * channels // 2)
            scales.append(sequence(layers, anchor_every))
            channels //= 2
        scales.append(sequence(checkerboards(4), anchor_every))
        super().__init__(shape, scales)


def sequence(layers: list[Transform], anchor_every: int | None) -> Transform:
    if anchor_every is None:
        return Compose(layers)
    return InvertibleSequence(layers, anchor_every=anchor_every)
