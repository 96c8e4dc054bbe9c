"""The inverse of masked-autoregressive maps against the forward map of a dense masked network."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastzoo import ops
from fastzoo.reference.masked_linear import UNIVARIATE, parameters_each
from fastzoo.testing.coupling import values
from fastzoo.testing.masked_linear import MAPS, network
from tests.conftest import DEVICE

BACKENDS = ["reference", "cpu", "cuda"] if DEVICE == "cpu" else ["cuda"]


def forward(
    x: Tensor, net: Tensor, widths: list[int], name: str, bins: int, first: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """y of x by whole layers, as a masked network is trained."""
    units, at = x, 0
    for number, (reads, gives) in enumerate(itertools.pairwise(widths)):
        weight = net[at : at + reads * gives].view(gives, reads)
        bias = net[at + reads * gives : at + (reads + 1) * gives]
        at += (reads + 1) * gives
        units = F.linear(units, weight, bias)
        if number == 0 and first is not None:
            units = units + first
        if number + 2 < len(widths):
            units = torch.relu(units)
    constant, floor = MAPS[name]
    each = units.view(len(x), x.shape[1], -1)
    if name in ("nflows", "zuko"):
        return ops.rational_quadratic_spline(
            x,
            each,
            bound=constant,
            convention=name,
            min_bin_width=floor,
            min_bin_height=floor,
            min_derivative=floor,
            slope=floor or 1e-3,
            backend="reference",
        )
    shift, scale = each.unbind(-1)
    return ops.coupling(
        x, shift, scale, map=name, constant=constant, min_scale=floor, backend="reference"
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", UNIVARIATE)
@pytest.mark.parametrize("steps", [None, 3])
def test_it_inverts_the_forward_map(name: str, steps: int | None, backend: str) -> None:
    bins, features = 5, 7
    net, starts, widths = network(
        features, (12, 9), parameters_each(name, bins), steps=steps, seed=2
    )
    x, first, net = values(11, features).double(), values(11, 12, seed=5).double(), net.double()
    y, logdet = forward(x, net, widths, name, bins, first)
    constant, floor = MAPS[name]
    kwargs: dict[str, Any] = {"map": name, "bins": bins, "constant": constant, "floor": floor}
    back, minus = ops.autoregressive_inverse(
        y.to(DEVICE),
        net.to(DEVICE),
        first.to(DEVICE),
        widths=widths,
        starts=starts.to(DEVICE),
        backend=backend,
        **kwargs,
    )
    torch.testing.assert_close(back.cpu(), x, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(minus.cpu(), -logdet, rtol=1e-8, atol=1e-8)


def test_gradients_are_those_of_the_inverse_function() -> None:
    """dx/dy is the inverse matrix of dy/dx, and a parameter moves x by minus that times dy."""
    net, starts, widths = network(4, (6,), 2, seed=1)
    x, net = values(1, 4).double(), net.double()
    y, _ = forward(x, net, widths, "tanh", 0)

    def invert(y: Tensor, net: Tensor) -> Tensor:
        return ops.autoregressive_inverse(
            y[None], net, widths=widths, starts=starts, map="tanh", constant=2.0
        )[0][0]

    of_y, of_net = torch.autograd.functional.jacobian(invert, (y[0], net))
    of_x, of_parameters = torch.autograd.functional.jacobian(
        lambda x, net: forward(x[None], net, widths, "tanh", 0)[0][0], (x[0], net)
    )
    torch.testing.assert_close(of_y, torch.linalg.inv(of_x))
    # Of the weights that the mask hides the dense network has a gradient, and the inverse none.
    shown = (of_net != 0).any(0)
    assert shown.sum() > 30
    expected = -torch.linalg.solve(of_x, of_parameters)
    torch.testing.assert_close(of_net[:, shown], expected[:, shown])
    assert (net[~shown] == 0).all() or (expected[:, ~shown][:, net[~shown] != 0] == 0).all()


@pytest.mark.parametrize("rows", [1, 3, 97, 1000])
def test_every_instruction_set(rows: int, capability: str) -> None:
    for name, hidden in (("softclip", (33, 40)), ("nflows", (16,))):
        net, starts, widths = network(9, hidden, parameters_each(name, 8), seed=4)
        constant, floor = MAPS[name]
        kwargs: dict[str, Any] = {"map": name, "constant": constant, "floor": floor}
        y = values(rows, 9)
        right, right_log = ops.autoregressive_inverse(
            y.double(), net.double(), widths=widths, starts=starts, backend="reference", **kwargs
        )
        found, log = ops.autoregressive_inverse(
            y, net, widths=widths, starts=starts, backend="cpu", **kwargs
        )
        size = right.abs().max()
        assert (found - right).abs().max() < 2e-3 * size, capability
        assert (found - right).abs().mean() < 1e-5 * size, capability
        assert (log - right_log).abs().mean() < 1e-4, capability


def test_rows_do_not_depend_on_the_batch() -> None:
    net, starts, widths = network(12, (20, 20), 2, seed=6)
    y = values(130, 12)
    whole, _ = ops.autoregressive_inverse(y, net, widths=widths, starts=starts)
    for begin, end in ((0, 1), (5, 70), (64, 130)):
        part, _ = ops.autoregressive_inverse(y[begin:end], net, widths=widths, starts=starts)
        torch.testing.assert_close(part, whole[begin:end], rtol=1e-5, atol=1e-5)
