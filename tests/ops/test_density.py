"""Densities against scipy, scikit-learn and what a density is."""

import numpy as np
import pytest
import torch
from scipy.stats import gaussian_kde
from sklearn.neighbors import KernelDensity

from fastzoo import ops
from fastzoo.ops._operator import OPERATORS
from fastzoo.ops.density import KERNELS
from fastzoo.testing.gradients import assert_gradient_close
from fastzoo.testing.neighbours import random_points
from fastzoo.testing.timing import peak_memory
from tests.conftest import DEVICE

BACKENDS = [
    b for b in ("cpu", "cuda", "triton") if OPERATORS["kernel_density"].refusal(b, DEVICE) is None
]
ALL_BACKENDS = ["reference", *BACKENDS]


@pytest.mark.parametrize("dim", [1, 2, 3])
@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_like_scipy(backend: str, dim: int) -> None:
    points = random_points(1, 300, dim, seed=1)[0].double()
    # scipy takes the bandwidth relative to the covariance: with points of unit covariance it is h.
    centred = points - points.mean(0)
    factor = torch.linalg.cholesky(centred.t() @ centred / 299)
    white = torch.linalg.solve_triangular(factor, centred.t(), upper=False).t()
    right = gaussian_kde(white.numpy().T, bw_method=0.25)(white.numpy().T)
    found = ops.kernel_density(white.to(DEVICE), 0.25, backend=backend)
    np.testing.assert_allclose(found.cpu().numpy(), right, rtol=1e-11)
    single = ops.kernel_density(white.float().to(DEVICE), 0.25, backend=backend)
    np.testing.assert_allclose(single.cpu().numpy(), right, rtol=1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_like_scikit_learn(backend: str, kernel: str) -> None:
    points = random_points(1, 250, seed=2)[0].double()
    queries = random_points(1, 90, seed=3)[0].double() * 1.2
    estimate = KernelDensity(bandwidth=0.2, kernel=kernel).fit(points.numpy())
    right = np.exp(estimate.score_samples(queries.numpy()))
    found = ops.kernel_density(
        points.to(DEVICE), 0.2, kernel=kernel, queries=queries.to(DEVICE), backend=backend
    )
    np.testing.assert_allclose(found.cpu().numpy(), right, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("kernel", KERNELS)
def test_an_adaptive_density_integrates_to_one(kernel: str) -> None:
    points = random_points(1, 40, 2, seed=4)[0].double()
    bandwidth = 0.05 + random_points(1, 40, 1, seed=5)[0, :, 0].double() / 5
    side = torch.linspace(-1.5, 2.5, 801, dtype=torch.float64)
    grid = torch.cartesian_prod(side, side)
    density = ops.kernel_density(points, bandwidth, kernel=kernel, queries=grid)
    total = density.sum() * (side[1] - side[0]) ** 2
    assert abs(total - 1) < (1e-6 if kernel == "gaussian" else 5e-3)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_narrow_bandwidth_on_a_large_cloud(kernel: str) -> None:
    points = random_points(1, 9000, seed=6)[0]
    some = torch.arange(0, 9000, 90)
    apart = torch.cdist(points[some].double(), points.double()).div(0.02).square()
    profile = {
        "gaussian": torch.exp(-apart / 2) / (2 * torch.pi) ** 1.5,
        "epanechnikov": (1 - apart).clamp(min=0) * 15 / (8 * torch.pi),
        "tophat": (apart < 1) * 3 / (4 * torch.pi),
    }[kernel]
    right = profile.mean(1) / 0.02**3
    found = ops.kernel_density(points, 0.02, kernel=kernel)[some]
    np.testing.assert_allclose(found.numpy(), right.numpy(), rtol=2e-5)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "triton"])  # which has all terms
def test_tiles_of_zero_terms_change_nothing(backend: str, kernel: str) -> None:
    points = random_points(1, 1100, 2, seed=9)[0].double()
    apart = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
    distances = apart.div(0.0317).square()
    profile = {
        "gaussian": torch.exp(-distances / 2) / (2 * torch.pi),
        "epanechnikov": (1 - distances).clamp(min=0) * 2 / torch.pi,
        "tophat": (distances < 1).double() / torch.pi,
    }[kernel]
    right = profile.mean(1) / 0.0317**2
    found = ops.kernel_density(points.to(DEVICE), 0.0317, kernel=kernel, backend=backend)
    np.testing.assert_allclose(found.cpu().numpy(), right.numpy(), rtol=1e-11)


@pytest.mark.parametrize("shape", [(3, 500, 3), (1, 2100, 2)], ids=["small", "wide"])
def test_every_instruction_set(shape: tuple[int, int, int], capability: str) -> None:
    points = random_points(*shape, seed=7).requires_grad_()
    widest = 0.35 if shape[1] == 500 else 0.05  # of the wide cloud most pairs are left out
    bandwidth = widest * (0.3 + 0.7 * random_points(*shape[:2], 1, seed=8)[..., 0])
    bandwidth.requires_grad_()
    for kernel in ("gaussian", "epanechnikov"):
        right = ops.kernel_density(
            points.double(), bandwidth.double(), kernel=kernel, backend="reference"
        )
        found = ops.kernel_density(points, bandwidth, kernel=kernel, backend="cpu")
        error = (found - right).abs().max() / right.max()
        assert error < 4e-6, f"{capability}, {kernel}"
        expected = torch.autograd.grad(right.square().sum(), (points, bandwidth))
        actual = torch.autograd.grad(found.square().sum(), (points, bandwidth))
        for a, e in zip(actual, expected, strict=True):
            assert_gradient_close(a, e, rtol=2e-5, name=f"{capability}, {kernel}")


def test_nothing_that_is_not_finite_is_left_out() -> None:
    points = random_points(1, 2100, seed=12)[0]
    bandwidth = torch.full((2100,), 0.01)
    right = ops.kernel_density(points, bandwidth, queries=points)
    queries = points.clone()
    queries[3, 1] = torch.nan
    found = ops.kernel_density(points, bandwidth, queries=queries)
    assert found[3].isnan()
    others = torch.arange(2100) != 3
    torch.testing.assert_close(found[others], right[others], rtol=1e-6, atol=0)
    bandwidth[5] = torch.nan
    assert ops.kernel_density(points, bandwidth).isnan().all()
    bandwidth[5] = 0.01
    points[5, 0] = torch.nan
    assert ops.kernel_density(points, bandwidth).isnan().all()


def test_the_number_of_threads_changes_no_bit() -> None:
    points = random_points(1, 3000, seed=9).requires_grad_()

    def both() -> tuple[torch.Tensor, torch.Tensor]:
        density = ops.kernel_density(points, 0.1)
        return density, torch.autograd.grad(density.square().sum(), points)[0]

    threads, first = torch.get_num_threads(), both()
    try:
        torch.set_num_threads(1)
        assert all(map(torch.equal, both(), first))
    finally:
        torch.set_num_threads(threads)


def test_no_matrix_of_pairs_is_kept() -> None:
    points = random_points(1, 6000, seed=10).requires_grad_()

    def step() -> None:
        torch.autograd.grad(ops.kernel_density(points, 0.05).sum(), points)

    assert peak_memory(step, "cpu") < 8 << 20


def test_neighbours_that_are_everyone_change_nothing() -> None:
    points = random_points(2, 40, seed=11).double()
    everyone = torch.arange(40).expand(2, 40, 40)
    torch.testing.assert_close(
        ops.kernel_density(points, 0.2, neighbours=everyone), ops.kernel_density(points, 0.2)
    )


def test_inverse_density_scale_is_one_at_the_least_dense() -> None:
    density = torch.tensor([[4.0, 1.0, 2.0, 0.5]])
    neighbours = torch.tensor([[[0, 1, 2], [3, 0, -1], [-1, -1, -1]]])
    scale = ops.inverse_density_scale(density, neighbours)
    assert scale.tolist() == [[[0.25, 1.0, 0.5], [1.0, 0.125, 0.0], [0.0, 0.0, 0.0]]]
    with pytest.raises(ValueError, match="neighbours"):
        ops.inverse_density_scale(density.repeat(2, 1), neighbours)
