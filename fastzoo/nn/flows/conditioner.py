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
        x = x if context is None else torch.cat([x, context], -1)
        for layer in self:
            x = layer(x)
        return x


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

    starts: Tensor
    order0: Tensor

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
        outputs = features.repeat_interleave(multiplier)
        # The context is there before any feature.
        before = [torch.cat([features, features.new_full((context,), -1)]), *hidden]
        after = [*hidden, outputs]
        masks = [after[0][:, None] > before[0]]
        masks += [b[:, None] >= a for a, b in zip(before[1:], after[1:], strict=True)]
        linears = [MaskedLinear(mask) for mask in masks]
        _start_at(linears[-1], start)
        super().__init__(*_stack(linears, activation))
        self.activation = activation
        self.context = context
        layers = [features, *after]
        self.widths = [len(layer) for layer in layers]
        starts = [torch.searchsorted(s.sort().values, torch.arange(number + 1)) for s in layers]
        self.register_buffer("starts", torch.stack(starts), persistent=False)
        for index, layer in enumerate(layers):
            self.register_buffer(f"order{index}", layer.argsort(stable=True), persistent=False)

    def by_steps(self, context: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The network with its units in the order of their steps, as
        :func:`fastzoo.ops.autoregressive_inverse` reads it: every layer's weight and bias in one
        array, and the context's part of the first layer."""
        linears = [layer for layer in self if isinstance(layer, MaskedLinear)]
        orders = [getattr(self, f"order{index}") for index in range(len(linears) + 1)]
        parts = []
        first = None
        for linear, before, after in zip(linears, orders, orders[1:], strict=False):
            weight = linear.masked().index_select(0, after)
            if linear is linears[0] and context is not None:
                first = F.linear(context, weight[:, len(before) :])
            parts += [weight.index_select(1, before).flatten(), linear.bias.index_select(0, after)]
        return torch.cat(parts), first
