"""Couplings against published layers, autograd's Jacobian and themselves turned round."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fastzoo import ops
from fastzoo.reference.coupling import MAPS, SCALE_MAPS
from fastzoo.testing.coupling import COUPLING, ROWS, arguments, values
from fastzoo.testing.gradients import assert_gradient_close
from tests.conftest import DEVICE

BACKENDS = ["reference", "cpu", "cuda", "triton"] if DEVICE == "cpu" else ["cuda", "triton"]


def numpy_scale(s: np.ndarray, name: str, constant: float, floor: float) -> np.ndarray:
    """The scale as the papers and libraries of each name write it."""
    if name == "exp":
        return np.exp(s)
    if name == "sigmoid2":
        return 1 / (1 + np.exp(-(s + 2))) + floor
    if name == "tanh":
        return np.exp(constant * np.tanh(s))
    if name == "atan":
        return np.exp(constant * 0.636 * np.arctan(s))
    if name == "softplus":
        return np.log1p(np.exp(s)) + floor
    return np.exp(s / (1 + np.abs(s / np.log(constant))))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SCALE_MAPS)
def test_like_the_formulas(name: str, backend: str) -> None:
    constant, floor = ROWS[name]
    x, shift, scale = (values(5, 7, seed=s).double() for s in range(3))
    e = numpy_scale(scale.numpy(), name, constant, floor)
    kwargs = {"map": name, "constant": constant, "min_scale": floor, "backend": backend}
    moved = (x.to(DEVICE), shift.to(DEVICE), scale.to(DEVICE))
    y, logdet = ops.coupling(*moved, **kwargs)
    np.testing.assert_allclose(y.cpu(), x.numpy() * e + shift.numpy(), rtol=1e-12)
    np.testing.assert_allclose(logdet.cpu(), np.log(e).sum(1), rtol=1e-12, atol=1e-12)
    y, _ = ops.coupling(*moved, **kwargs, shift_first=True)
    np.testing.assert_allclose(y.cpu(), (x.numpy() + shift.numpy()) * e, rtol=1e-12)


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("inverse", [False, True])
def test_logdet_is_that_of_the_jacobian(name: str, inverse: bool) -> None:
    constant, floor = ROWS[name]
    x, *rest = arguments(name, values(1, 6).double())
    split = 2 if name in SCALE_MAPS else None
    if split:
        rest = [r[:, split:] for r in rest]
    kwargs = {"map": name, "constant": constant, "min_scale": floor, "split": split}

    def forward(row: Tensor) -> Tensor:
        y, _ = ops.coupling(row[None], *rest, inverse=inverse, **kwargs)
        return y[0]

    jacobian = torch.autograd.functional.jacobian(forward, x[0])
    _, logdet = ops.coupling(x, *rest, inverse=inverse, **kwargs)
    torch.testing.assert_close(torch.linalg.slogdet(jacobian).logabsdet, logdet[0])


@pytest.mark.parametrize("name", MAPS)
def test_the_inverse_of_the_forward_map(name: str) -> None:
    constant, floor = ROWS[name]
    x, *rest = arguments(name, values(64, 40))
    kwargs = {"map": name, "constant": constant, "min_scale": floor}
    y, logdet = ops.coupling(x, *rest, **kwargs)
    back, inverse_logdet = ops.coupling(y, *rest, inverse=True, **kwargs)
    # A shift larger than what it was added to costs digits of the latter.
    assert (back - x).abs().max() <= 1e-5
    torch.testing.assert_close(inverse_logdet, -logdet, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mask_hides_what_is_not_finite_from_values_and_gradients(backend: str) -> None:
    x, shift, scale = (values(4, 9, seed=s).to(DEVICE) for s in range(3))
    mask = (torch.arange(9) % 3 == 0).to(DEVICE)
    for poison in (torch.inf, -torch.inf, torch.nan, 1e30):
        bad = [torch.where(mask, poison, t).requires_grad_() for t in (shift, scale)]
        given = x.clone().requires_grad_()
        y, logdet = ops.coupling(given, *bad, mask, map="tanh", constant=2.0, backend=backend)
        assert torch.equal(y[:, mask], x[:, mask])
        grads = torch.autograd.grad((y.square().sum(), logdet.sum()), (given, *bad))
        assert all(g.isfinite().all() for g in grads)
        assert all((g[:, mask] == 0).all() for g in grads[1:])
        torch.testing.assert_close(grads[0][:, mask], 2 * x[:, mask])


def test_what_passes_is_passed_bit_for_bit() -> None:
    x = values(3, 6, 2)
    x[0, 0, 0], x[1, 5, 1] = -0.0, torch.nan
    shift = scale = values(3, 2, 2)
    y, _ = ops.affine_coupling(x, shift, scale, split=4)
    assert torch.equal(y[:, :4].view(torch.int32), x[:, :4].view(torch.int32))
    y, _ = ops.affine_coupling(x, shift, scale, split=-4)
    assert torch.equal(y[:, 2:].view(torch.int32), x[:, 2:].view(torch.int32))


@pytest.mark.parametrize("shape", [(3, 1000), (1, 70_001), (517, 6), (40, 3, 5, 7)])
def test_every_instruction_set(shape: tuple[int, ...], capability: str) -> None:
    x, shift, scale = (values(*shape, seed=s).requires_grad_() for s in range(3))
    mask = torch.arange(shape[-1]) % 2 == 0
    for name in ("tanh", "sigmoid2", "softclip"):
        kwargs = {"map": name, "constant": ROWS[name][0]}
        expected = ops.coupling(
            *(t.double() for t in (x, shift, scale)), mask, backend="reference", **kwargs
        )
        found = ops.coupling(x, shift, scale, mask, backend="cpu", **kwargs)
        for f, e in zip(found, expected, strict=True):
            scaled = (f - e).abs().max() / e.abs().max()
            assert scaled < 2e-6, f"{capability}, {name}"
        right = torch.autograd.grad(
            (expected[0].square().sum(), expected[1].sum()), (x, shift, scale)
        )
        actual = torch.autograd.grad((found[0].square().sum(), found[1].sum()), (x, shift, scale))
        for a, e in zip(actual, right, strict=True):
            assert_gradient_close(a, e, rtol=4e-6, name=f"{capability}, {name}")


def test_the_number_of_threads_changes_no_bit() -> None:
    x, shift, scale = (values(3, 150_001, seed=s) for s in range(3))
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(ops.affine_coupling(x, shift, scale, scale_map="tanh"))
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("backend", BACKENDS)
def test_scales_far_out(backend: str) -> None:
    """Logarithms of scales that float32 can no longer hold, and gradients through them."""
    s = torch.tensor([[-100.0, -60.0, -20.0, 20.0, 60.0, 100.0]], device=DEVICE).requires_grad_()
    x = torch.zeros(1, 6, device=DEVICE)
    for name in ("sigmoid2", "softplus"):
        _, log = ops.coupling(
            x, torch.zeros_like(x), s, map=name, sum_logdet=False, backend=backend
        )
        share = s.detach().double() + (2 if name == "sigmoid2" else 0)
        exact = (
            torch.nn.functional.logsigmoid(share)
            if name == "sigmoid2"
            else torch.where(share < -30, share, torch.log(torch.nn.functional.softplus(share)))
        )
        torch.testing.assert_close(log.double(), exact, rtol=1e-6, atol=1e-12)
        (grad,) = torch.autograd.grad(log.sum(), s)
        assert grad.isfinite().all()
        torch.testing.assert_close(grad[0, :2], torch.ones(2, device=DEVICE))


def test_a_shared_parameter_gets_the_sum_of_its_gradients() -> None:
    x, shift, scale = values(6, 4), values(4, seed=1), values(4, seed=2)
    leaves = [t.clone().requires_grad_() for t in (shift, scale)]
    y, logdet = ops.affine_coupling(x, *leaves)
    grads = torch.autograd.grad((y.sum(), logdet.sum()), leaves)
    torch.testing.assert_close(grads[0], torch.full((4,), 6.0))
    torch.testing.assert_close(grads[1], (x * scale.exp()).sum(0) + 6)


def test_names_of_their_own() -> None:
    x, shift, scale = (values(3, 8, seed=s) for s in range(3))
    y, logdet = ops.additive_coupling(x, shift)
    assert torch.equal(y, x + shift)
    assert torch.equal(logdet, torch.zeros(3))
    y, _ = ops.affine_coupling(x, shift, scale, scale_map="softclip", slope=0.01)
    torch.testing.assert_close(
        y, x * torch.exp(scale / (1 + (scale / math.log(0.01)).abs())) + shift
    )
    share = torch.sigmoid(x)
    for alpha in (0.0, 0.05):
        y, logdet = ops.logit(share, alpha)
        torch.testing.assert_close(
            y, torch.logit(alpha + (1 - 2 * alpha) * share), rtol=1e-5, atol=1e-5
        )
        back, minus = ops.logit(y, alpha, inverse=True)
        torch.testing.assert_close(back, share)
        torch.testing.assert_close(minus, -logdet, rtol=1e-5, atol=1e-5)
    y, logdet = ops.leaky_relu(x, 0.2)
    assert torch.equal(y, torch.nn.functional.leaky_relu(x, 0.2))
    torch.testing.assert_close(logdet, (x < 0).sum(1) * math.log(0.2))
    y, _ = ops.soft_clip(10 * x, 2.0)
    assert y.abs().max() < 2
    assert ops.soft_clip(torch.tensor([[2.0, -2.5]]), 2.0, inverse=True)[0].isnan().all()


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda x: ops.affine_coupling(x, x, x, scale_map="sigmoid"), "scale_map"),
        (lambda x: ops.affine_coupling(x, x, x, scale_map="softclip", slope=1.0), "slope"),
        (lambda x: ops.affine_coupling(x, x, x, scale_map="atan", bound=0.0), "bound"),
        (lambda x: ops.logit(x, 0.5), "alpha"),
    ],
)
def test_errors(call: object, match: str) -> None:
    assert callable(call)
    with pytest.raises(ValueError, match=match):
        call(values(2, 3))


def test_every_bijection_has_its_samples() -> None:
    names = {s.kwargs["map"] for s in COUPLING.samples(torch.float32)}
    assert names == set(MAPS)
