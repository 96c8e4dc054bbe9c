"""Networks that give a transform its parameters."""

import itertools
from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastzoo.ops._checks import check_choice, check_positive

Activation = Literal["relu", "tanh", "elu", "silu", "leaky_relu", "gelu"]
_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "elu": nn.ELU,
    "silu": nn.SiLU,
    "leaky_relu": nn.LeakyReLU,
    "gelu": nn.GELU,
}


def _stack(linears: Sequence[nn.Linear], activation: str) -> list[nn.Module]:
    """The layers with activations between."""
    check_choice("activation", activation, tuple(_ACTIVATIONS))
    layers: list[nn.Module] = [linears[0]]
    for linear in linears[1:]:
        layers += [_ACTIVATIONS[activation](), linear]
    return layers


def _start_at(last: nn.Linear, parameters: Tensor | None) -> None:
    """Make a last layer give the same for every input: ``parameters``, which are repeated over its
    outputs, or zeros."""
    with torch.no_grad():
        last.weight.zero_()
        if parameters is None:
            last.bias.zero_()
        else:
            last.bias.copy_(parameters.repeat(last.out_features // len(parameters)))


class MLP(nn.Sequential):
    """Linear layers with an activation between: ``[B, in_features]``, perhaps with a context
    ``[B, context]``, to ``[B, out_features]``.

    Args:
        in_features, out_features, hidden_features: widths.
        context: width of the context, which joins the input.
        activation: relu, tanh, elu, silu, leaky_relu or gelu.
        start: what the last layer, whose weights start at 0, gives at first: some numbers, repeated
            over its outputs, such as :func:`spline_identity`; None: zeros, with which most affine
            maps are the identity.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        hidden_features: Sequence[int] = (64, 64),
        *,
        context: int = 0,
        activation: Activation = "relu",
        start: Tensor | None = None,
    ) -> None:
        widths = (in_features + context, *hidden_features, out_features)
        linears = [nn.Linear(*pair) for pair in itertools.pairwise(widths)]
        _start_at(linears[-1], start)
        super().__init__(*_stack(linears, activation))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        found: Tensor = super().forward(x if context is None else torch.cat([x, context], -1))
        return found


class MaskedLinear(nn.Linear):
    """A linear layer of which only the weights at ``mask [out, in]`` count."""

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__(mask.shape[1], mask.shape[0])
        self.register_buffer("mask", mask)

    def masked(self) -> Tensor:
        return torch.where(self.mask, self.weight, 0)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.masked(), self.bias)


class MaskedMLP(nn.Sequential):
    """An :class:`MLP` whose outputs for a feature see only the features of steps before its own
    (MADE): ``[B, features]`` to ``[B, features * multiplier]``, a feature's side by side.

    Hidden units have steps in turn, and see units of their own step and of those before. Layers,
    masks and names are those of zuko's ``MaskedMLP``, whose weights load.

    Args:
        steps: of each feature, 0 first.
        multiplier: outputs of a feature.
        hidden_features, context, activation, start: as :class:`MLP` has them. Every output sees
            the context.

    Source: Germain et al., MADE: Masked Autoencoder for Distribution Estimation (2015).
    """

    def __init__(
        self,
        steps: Sequence[int],
        multiplier: int,
        hidden_features: Sequence[int] = (64, 64),
        *,
        context: int = 0,
        activation: Activation = "relu",
        start: Tensor | None = None,
    ) -> None:
        check_positive("multiplier", multiplier)
        features = torch.as_tensor(steps)
        number = int(features.max()) + 1
        # A unit of the first step, which sees no feature, sees a context.
        first = 0 if context else 1
        if first >= number:
            raise ValueError("steps: expected more than one without a context, got one")
        units = torch.arange(first, number)
        hidden = [units[torch.arange(width) % len(units)] for width in hidden_features]
        # What layers give, from the input to the output; the context is there before any feature.
        outputs = features.repeat_interleave(multiplier)
        given = [torch.cat([features, features.new_full((context,), -1)]), *hidden, outputs]
        masks = [given[1][:, None] > given[0]]
        masks += [after[:, None] >= before for before, after in itertools.pairwise(given[1:])]
        linears = [MaskedLinear(mask) for mask in masks]
        _start_at(linears[-1], start)
        super().__init__(*_stack(linears, activation))
        self.activation = activation
        self.context = context
        self.unit_steps = [features, *hidden]
