"""Polynomial splines against nflows, autograd's Jacobian and themselves turned round."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastzoo import ops
from fastzoo.testing.coupling import values

SIZES = {"linear": (5,), "quadratic": (5, 4), "cubic": (5, 5, 1, 1)}
FUNCTIONS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "linear": ops.linear_spline,
    "quadratic": ops.quadratic_spline,
    "cubic": ops.cubic_spline,
}


def given(kind: str, *part: int) -> list[Tensor]:
    return [values(*part, n, seed=i + 1).double() for i, n in enumerate(SIZES[kind])]


@pytest.mark.parametrize("kind", SIZES)
def test_like_nflows(kind: str) -> None:
    splines: Any = pytest.importorskip("nflows.transforms.splines")
    x, parameters = torch.rand(30, 4).double(), given(kind, 30, 4)
    if kind == "quadratic":
        parameters[1] = values(30, 4, 6, seed=2).double()
    box = (0.0, 1.0, 0.0, 1.0)
    found = FUNCTIONS[kind](x, *parameters, tails=None, domain=box, sum_logdet=False)
    expected = getattr(splines, f"{kind}_spline")(x, *parameters)
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-9, atol=1e-9)


def test_a_quadratic_spline_meets_its_tails_with_their_density() -> None:
    x, parameters = torch.tensor([[-3.0, 3.0]]).double(), given("quadratic", 1, 2)
    _, log = ops.quadratic_spline(x, *parameters, bound=3.0, sum_logdet=False)
    torch.testing.assert_close(log, torch.zeros_like(log), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", SIZES)
def test_the_inverse_and_the_jacobian(kind: str) -> None:
    x, parameters = torch.linspace(-2.9, 2.9, 7)[None].double(), given(kind, 1, 7)
    spline, box = FUNCTIONS[kind], (-3.0, 3.0, 0.0, 2.0)
    y, logdet = spline(x, *parameters, domain=box, tails=None)
    back, minus = spline(y, *parameters, domain=box, tails=None, inverse=True)
    torch.testing.assert_close(back, x, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(minus, -logdet, rtol=1e-8, atol=1e-8)
    jacobian = torch.autograd.functional.jacobian(
        lambda row: spline(row[None], *parameters, domain=box, tails=None)[0][0], x[0]
    )
    torch.testing.assert_close(torch.linalg.slogdet(jacobian).logabsdet, logdet[0])
    assert spline(x + 10, *parameters, domain=box, tails=None)[0].isnan().all()


@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize("inverse", [False, True])
def test_gradients_of_both_orders(kind: str, inverse: bool) -> None:
    x = torch.tensor([[-2.1, 1.3]]).double().requires_grad_()
    parameters = [p.requires_grad_() for p in given(kind, 1, 2)]

    def call(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        return FUNCTIONS[kind](*leaves, bound=3.0, inverse=inverse)

    assert torch.autograd.gradcheck(call, (x, *parameters))
    assert torch.autograd.gradgradcheck(call, (x, *parameters))


def test_errors() -> None:
    x, (widths, heights, left, right) = values(2, 3), (p.float() for p in given("cubic", 2, 3))
    for call, match in (
        (lambda: ops.linear_spline(x, widths[:1]), "pdf"),
        (lambda: ops.quadratic_spline(x, widths, heights), "heights"),
        (lambda: ops.cubic_spline(x, widths, heights[..., :4], left, right), "heights"),
        (lambda: ops.linear_spline(x, widths, tails="circular"), "tails"),
    ):
        with pytest.raises(ValueError, match=match):
            call()
