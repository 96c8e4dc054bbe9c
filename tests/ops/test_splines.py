"""Splines against nflows, zuko, autograd's Jacobian and themselves turned round."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fastzoo import ops
from fastzoo.testing.coupling import values
from fastzoo.testing.gradients import assert_gradient_close
from fastzoo.testing.splines import gradient_rtol, parameters, tolerance
from tests.conftest import DEVICE

BACKENDS = ["reference", "cpu", "cuda", "triton"] if DEVICE == "cpu" else ["cuda", "triton"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("inverse", [False, True])
def test_like_zuko(inverse: bool, backend: str) -> None:
    zuko = pytest.importorskip("zuko")
    x, given = 3 * values(20, 3).double(), [p.double() for p in parameters(20, 3)]
    transform = zuko.transforms.MonotonicRQSTransform(*given, bound=4.0)
    transform = transform.inv if inverse else transform
    y, log = ops.rational_quadratic_spline(
        x.to(DEVICE),
        *(p.to(DEVICE) for p in given),
        bound=4.0,
        convention="zuko",
        inverse=inverse,
        sum_logdet=False,
        backend=backend,
    )
    expected, expected_log = transform.call_and_ladj(x)
    torch.testing.assert_close(y.cpu(), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(log.cpu(), expected_log, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("inverse", [False, True])
def test_like_nflows(inverse: bool, backend: str) -> None:
    splines = pytest.importorskip("nflows.transforms.splines.rational_quadratic")
    x, given = 3 * values(20, 3).double(), [p.double() for p in parameters(20, 3)]
    expected = splines.unconstrained_rational_quadratic_spline(
        x, *(p.clone() for p in given), inverse=inverse, tail_bound=4.0
    )
    moved = [p.to(DEVICE) for p in given]
    found = ops.rational_quadratic_spline(
        x.to(DEVICE), *moved, bound=4.0, inverse=inverse, sum_logdet=False, backend=backend
    )
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f.cpu(), e, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("convention", ["nflows", "zuko"])
@pytest.mark.parametrize("tails", ["linear", "circular", None])
@pytest.mark.parametrize("inverse", [False, True])
def test_logdet_is_that_of_the_jacobian(convention: str, tails: str | None, inverse: bool) -> None:
    x = torch.tensor([[-2.9, -0.3, 0.4, 1.8]]).double()
    given = [p.double() for p in parameters(1, 4, bins=5, tails=tails or "none")]
    kwargs: dict[str, Any] = {"convention": convention, "tails": tails, "bound": 3.0}

    def forward(row: Tensor) -> Tensor:
        return ops.rational_quadratic_spline(row[None], *given, inverse=inverse, **kwargs)[0][0]

    jacobian = torch.autograd.functional.jacobian(forward, x[0])
    _, logdet = ops.rational_quadratic_spline(x, *given, inverse=inverse, **kwargs)
    torch.testing.assert_close(torch.linalg.slogdet(jacobian).logabsdet, logdet[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [0.3, 4.0])
def test_the_inverse_of_the_forward_map(size: float, backend: str) -> None:
    x = 2 * values(300, 8)
    given = [(size * p).to(DEVICE) for p in parameters(300, 8)]
    x = x.to(DEVICE)
    kwargs: dict[str, Any] = {"bound": 5.0, "sum_logdet": False, "backend": backend}
    y, log = ops.rational_quadratic_spline(x, *given, **kwargs)
    back, minus = ops.rational_quadratic_spline(y, *given, inverse=True, **kwargs)
    # y is good to half a unit of its own last place, which a flat spline enlarges going back.
    flat = 2.0**-21 * 5 * torch.exp(-log).clamp(min=1)
    assert ((back - x).abs() <= torch.maximum(flat, torch.tensor(1e-5, device=DEVICE))).all()
    if size < 1:
        assert (back - x).abs().max() <= 1e-5
        torch.testing.assert_close(minus, -log, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_knots_and_ends(backend: str) -> None:
    """zuko's zero parameters are equal bins, whose knots are whole numbers here."""
    x = torch.arange(-4.0, 5.0, device=DEVICE)[None]
    given = [torch.zeros(1, 9, n, device=DEVICE) for n in (8, 8, 7)]
    for inverse in (False, True):
        y, log = ops.rational_quadratic_spline(
            x,
            *given,
            bound=4.0,
            convention="zuko",
            inverse=inverse,
            sum_logdet=False,
            backend=backend,
        )
        torch.testing.assert_close(y, x, rtol=0, atol=2e-6)
        assert torch.equal(y[:, [0, -1]], x[:, [0, -1]])
        torch.testing.assert_close(log, torch.zeros_like(x), rtol=0, atol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("convention", ["nflows", "zuko"])
def test_steep_and_flat_bins(convention: str, backend: str) -> None:
    """Bins of the least size with derivatives of a thousand have an inverse, and gradients."""
    x = torch.linspace(-4.9, 4.9, 41, device=DEVICE)[None].requires_grad_()
    given = [p.to(DEVICE).mul(40).requires_grad_() for p in parameters(1, 41)]
    for inverse in (False, True):
        y, log = ops.rational_quadratic_spline(
            x, *given, convention=convention, inverse=inverse, sum_logdet=False, backend=backend
        )
        assert y.isfinite().all()
        assert log.isfinite().all()
        assert (y.abs() <= 5).all()
        grads = torch.autograd.grad((y.sum(), log.sum()), (x, *given))
        assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_beyond_the_domain_parameters_are_never_touched(backend: str) -> None:
    x = torch.tensor([[-7.0, 0.5, 5.5]], device=DEVICE).requires_grad_()
    given = [p.to(DEVICE) for p in parameters(1, 3)]
    for p in given:
        p[:, [0, 2]] = torch.nan
        p.requires_grad_()
    y, log = ops.rational_quadratic_spline(x, *given, sum_logdet=False, backend=backend)
    assert torch.equal(y[:, [0, 2]], x[:, [0, 2]])
    assert torch.equal(log[:, [0, 2]], torch.zeros(1, 2, device=DEVICE))
    grads = torch.autograd.grad((y.sum(), log.sum()), (x, *given))
    assert torch.equal(grads[0][:, [0, 2]], torch.ones(1, 2, device=DEVICE))
    for g in grads[1:]:
        assert torch.equal(g[:, [0, 2]], torch.zeros_like(g[:, [0, 2]]))
        assert g[:, 1].isfinite().all()


def test_slices_of_a_conditioner_are_read_where_they_are() -> None:
    x, packed = values(9, 5), values(9, 5 * 23, seed=3)
    whole = packed.view(9, 5, 23).requires_grad_()
    slices = [t.detach().requires_grad_() for t in whole.split((8, 8, 7), -1)]
    found = ops.rational_quadratic_spline(x, whole)
    apart = ops.rational_quadratic_spline(x, *slices)
    assert all(map(torch.equal, found, apart))
    grad = torch.autograd.grad((found[0].sum(), found[1].sum()), whole)[0]
    parts = torch.autograd.grad((apart[0].sum(), apart[1].sum()), slices)
    assert torch.equal(grad, torch.cat(parts, -1))


@pytest.mark.parametrize("shape", [(3, 700), (5001, 3), (1, 1)])
@pytest.mark.parametrize("bins", [8, 5])
def test_every_instruction_set(shape: tuple[int, ...], bins: int, capability: str) -> None:
    leaves = [t.requires_grad_() for t in (2 * values(*shape), *parameters(*shape, bins=bins))]
    for convention, inverse in (("nflows", False), ("zuko", True)):
        kwargs: dict[str, Any] = {"convention": convention, "inverse": inverse}
        right = ops.rational_quadratic_spline(
            *(t.double() for t in leaves), backend="reference", **kwargs
        )
        found = ops.rational_quadratic_spline(*leaves, backend="cpu", **kwargs)
        bounds = tolerance(*leaves, **kwargs)
        for f, r, allowed in zip(found, right, bounds, strict=True):
            assert ((f - r).abs() <= allowed).all(), f"{capability}, {convention}"
        expected = torch.autograd.grad((right[0].square().sum(), right[1].sum()), leaves)
        actual = torch.autograd.grad((found[0].square().sum(), found[1].sum()), leaves)
        for a, e in zip(actual, expected, strict=True):
            allowed = gradient_rtol(torch.float32, *leaves, **kwargs)
            assert_gradient_close(a, e, rtol=allowed, name=f"{capability}, {convention}")


def test_the_number_of_threads_changes_no_bit() -> None:
    x, given = values(3, 5000), parameters(3, 5000)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(ops.rational_quadratic_spline(x, *given))
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, *found))
