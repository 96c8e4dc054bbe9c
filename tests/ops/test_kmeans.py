"""k-means against scikit-learn's, from the same first centroids."""

import warnings

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from torch import Tensor

from fastzoo import ops
from fastzoo.ops import KMeansOutput
from fastzoo.testing.timing import peak_memory
from tests.conftest import DEVICE


def mixture(n: int, dim: int, centres: int, *, spread: float = 3.0, seed: int = 0) -> Tensor:
    """Normal clouds around normal centres, float64."""
    generator = torch.Generator().manual_seed(seed)
    own = torch.randint(0, centres, (n,), generator=generator)
    places = spread * torch.randn(centres, dim, generator=generator, dtype=torch.double)
    return places[own] + torch.randn(n, dim, generator=generator, dtype=torch.double)


def sklearn_from(x: Tensor, init: Tensor, iters: int, tol: float = 0.0) -> KMeans:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "did not converge", "distinct clusters found"
        fresh = KMeans(
            len(init), init=init.numpy(), n_init=1, max_iter=iters, tol=tol, algorithm="lloyd"
        )
        return fresh.fit(x.numpy())


def ours_from(x: Tensor, init: Tensor, iters: int = 100, tol: float = 0.0) -> KMeansOutput:
    found = ops.kmeans(x.to(DEVICE), len(init), init=init.to(DEVICE), iters=iters, tol=tol)
    return KMeansOutput(found.centroids.cpu(), found.indices.cpu(), *found[2:])


@pytest.mark.parametrize("iters", [1, 2, 5, 100])
def test_double_takes_sklearns_steps(iters: int) -> None:
    x = mixture(1500, 7, 12)
    ours, theirs = (run(x, x[:30], iters) for run in (ours_from, sklearn_from))
    assert ours.indices.tolist() == theirs.labels_.tolist()
    assert ours.iterations == theirs.n_iter_
    np.testing.assert_allclose(ours.centroids.numpy(), theirs.cluster_centers_, rtol=1e-9)
    assert ours.inertia == pytest.approx(theirs.inertia_, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_single_and_half_end_as_well_as_sklearn(dtype: torch.dtype) -> None:
    x = mixture(3000, 16, 20, seed=1).to(dtype)
    ours = ours_from(x, x[:40], tol=1e-4)
    theirs = sklearn_from(x.double(), x[:40].double(), 100, 1e-4)
    assert ours.centroids.dtype == torch.float32
    # Both are local minima; roundings may lead from one to another.
    assert ours.inertia == pytest.approx(theirs.inertia_, rel=1e-3)


@pytest.mark.parametrize("tol", [0.3, 1e-2, 1e-4])
def test_tolerance_is_sklearns(tol: float) -> None:
    x = mixture(2000, 5, 9, spread=1.0, seed=2)
    ours, theirs = (run(x, x[:25], 300, tol) for run in (ours_from, sklearn_from))
    assert 1 < ours.iterations == theirs.n_iter_ < 100


def test_indices_and_inertia_are_those_of_the_centroids() -> None:
    x = mixture(2000, 6, 10, seed=3).float()
    for iters in (1, 4, 100):
        found = ours_from(x, x[:20], iters)
        indices, d = ops.vq_nearest(x, found.centroids, return_distance=True)
        assert torch.equal(found.indices, indices)
        assert found.inertia == pytest.approx(float(d.double().sum()), rel=1e-12)


def test_one_cluster_is_the_mean() -> None:
    x = mixture(500, 4, 3)
    found = ours_from(x, x[:1])
    torch.testing.assert_close(found.centroids[0], x.mean(0), rtol=1e-13, atol=1e-13)
    assert found.inertia == pytest.approx(float((x - x.mean(0)).square().sum()), rel=1e-12)


def test_as_many_clusters_as_rows() -> None:
    x = mixture(40, 3, 5)
    for init in ("k-means++", "random"):
        found = ops.kmeans(x.to(DEVICE), 40, init=init)
        assert found.inertia == 0
        assert sorted(found.indices.tolist()) == list(range(40))


@pytest.mark.parametrize("empty", [1, 3])
@pytest.mark.parametrize("iters", [1, 50])
def test_empty_clusters_move_as_sklearns(empty: int, iters: int) -> None:
    x = mixture(400, 4, 6, seed=4)
    init = torch.cat([x[:8], torch.full((empty, 4), 100.0, dtype=torch.double)])
    ours, theirs = (run(x, init, iters) for run in (ours_from, sklearn_from))
    assert ours.indices.bincount(minlength=8 + empty).min() > 0
    assert ours.inertia == pytest.approx(theirs.inertia_, rel=1e-9)
    # scikit-learn gives the farthest rows to the empty clusters in an order of its own.
    both = ours.centroids.numpy(), theirs.cluster_centers_
    assert len({frozenset(tuple(c.round(9)) for c in found) for found in both}) == 1


def test_the_farthest_row_goes_to_the_lowest_empty_cluster() -> None:
    x = torch.tensor([[0.0], [1.0], [2.0], [12.0], [8.0]], dtype=torch.double)
    init = torch.tensor([[99.0], [1.0], [99.0]], dtype=torch.double)
    found = ours_from(x, init, iters=1)
    assert found.centroids[:, 0].tolist() == [12.0, 1.0, 8.0]
    assert found.indices.tolist() == [1, 1, 1, 0, 2]


def test_fewer_distinct_rows_than_clusters() -> None:
    x = mixture(5, 3, 2)[torch.arange(60) % 5].to(DEVICE)
    for init in ("k-means++", "random", x[:12].clone()):
        found = ops.kmeans(x, 12, init=init)
        assert found.inertia == pytest.approx(0, abs=1e-25)
        assert found.centroids.isfinite().all()
        # Of equal centroids the lowest has the rows.
        assert len(found.indices.unique()) == 5


def test_an_empty_cluster_stays_where_no_row_is_off_its_centroid() -> None:
    x = torch.tensor([[0.0], [0.0], [1.0], [1.0]], dtype=torch.double)
    found = ours_from(x, torch.tensor([[0.0], [9.0], [1.0]], dtype=torch.double))
    assert found.centroids[:, 0].tolist() == [0.0, 9.0, 1.0]
    assert found.inertia == 0


def test_ties_go_to_the_lower_index() -> None:
    x = torch.tensor([[-1.0], [0.0], [1.0]], dtype=torch.double)
    found = ours_from(x, torch.tensor([[1.0], [-1.0]], dtype=torch.double), iters=1)
    assert found.centroids[:, 0].tolist() == [0.5, -1.0]


def test_plus_plus_finds_every_far_cloud() -> None:
    # 200 clouds in 2 million times their own volume: uniform draws would leave out a third.
    places = torch.cartesian_prod(torch.arange(20.0), torch.arange(10.0)) * 50
    x = (places.repeat(10, 1) + torch.rand(2000, 2, generator=torch.Generator().manual_seed(5))) / 4
    x = x.to(DEVICE)
    found = ops.kmeans(x, 200, iters=1, generator=torch.Generator().manual_seed(6))
    assert found.indices.bincount(minlength=200).tolist() == [10] * 200
    at_random = ops.kmeans(
        x, 200, init="random", iters=1, generator=torch.Generator().manual_seed(6)
    )
    assert at_random.inertia > 10 * found.inertia


def test_an_offset_changes_no_choice() -> None:
    # On a lattice of 2^-10 the sums with 4096 are exact.
    x = (mixture(700, 6, 5, seed=13).float() * 1024).round().div(1024).to(DEVICE)
    near, far = (
        ops.kmeans(x + offset, 60, iters=1, generator=torch.Generator().manual_seed(4)).centroids
        for offset in (0, 4096)
    )
    torch.testing.assert_close(far - 4096, near, rtol=0, atol=2**-10)


def test_plus_plus_draws_by_squared_distance() -> None:
    # The first row is a zero but for 1 of 500; then 2 is drawn with probability 4 / 5, and 1 leaves
    # no more than 2 does, so that the first of the candidates stands.
    x = torch.cat([torch.zeros(1000), torch.tensor([2.0, 1.0])])[:, None].to(DEVICE)
    generator, runs = torch.Generator().manual_seed(3), 400
    found = [ops.kmeans(x, 2, iters=1, generator=generator).indices for _ in range(runs)]
    # The last row joins the zeros where 2 is a centroid: their means move little.
    share = sum(int(indices[-1] == indices[0]) for indices in found) / runs
    assert abs(share - 0.8) < 4 * (0.8 * 0.2 / runs) ** 0.5


def test_plus_plus_is_as_good_as_sklearns() -> None:
    x = mixture(2000, 8, 40, seed=7)
    ours = [
        ops.kmeans(x.to(DEVICE), 40, generator=torch.Generator().manual_seed(s)).inertia
        for s in range(5)
    ]
    theirs = [KMeans(40, n_init=1, random_state=s).fit(x.numpy()).inertia_ for s in range(5)]
    assert np.mean(ours) < 1.1 * np.mean(theirs)


@pytest.mark.parametrize("init", ["k-means++", "random"])
def test_equal_seeds_give_equal_bits(init: str) -> None:
    x = mixture(700, 9, 11, seed=8).float().to(DEVICE)
    first, again, other = (
        ops.kmeans(x, 15, init=init, iters=3, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    )
    assert torch.equal(first.centroids, again.centroids)
    assert torch.equal(first.indices, again.indices)
    assert not torch.equal(first.centroids, other.centroids)
    torch.manual_seed(1)
    assert torch.equal(ops.kmeans(x, 15, init=init, iters=3).centroids, first.centroids)


def test_any_number_of_threads_gives_equal_bits() -> None:
    x = mixture(70_000, 6, 11, seed=9).float()
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(ops.kmeans(x, 9, init=x[:9], iters=3, backend="cpu"))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert torch.equal(other.centroids, found[0].centroids)
        assert torch.equal(other.indices, found[0].indices)


@pytest.mark.parametrize("backend", ["reference", "cpu", "cuda", "triton"])
def test_every_backend_takes_the_same_steps(backend: str) -> None:
    x = mixture(150, 5, 7, seed=10).float().to(DEVICE)
    try:
        ops.vq_nearest(x, x[:2], backend=backend)
    except RuntimeError as error:
        pytest.skip(str(error))
    found = ops.kmeans(x, 8, init=x[:8], iters=3, backend=backend)
    expected = ops.kmeans(x, 8, init=x[:8], iters=3, backend="reference")
    assert torch.equal(found.indices, expected.indices)
    torch.testing.assert_close(found.centroids, expected.centroids, rtol=2**-22, atol=2**-22)


def test_inputs_are_left_alone() -> None:
    x = mixture(300, 6, 5, seed=11).float().to(DEVICE).T.contiguous().T.requires_grad_()
    before, init = x.detach().clone(), x.detach()[:7].clone()
    found = ops.kmeans(x, 7, init=init, iters=4)
    assert not found.centroids.requires_grad
    assert torch.equal(x, before)
    assert torch.equal(init, before[:7])


def test_autocast_changes_nothing() -> None:
    x = mixture(600, 6, 5, seed=11).float().to(DEVICE)
    plain = ops.kmeans(x, 60, iters=2, generator=torch.Generator().manual_seed(1))
    with torch.autocast(DEVICE, torch.bfloat16):
        cast = ops.kmeans(x, 60, iters=2, generator=torch.Generator().manual_seed(1))
    assert torch.equal(plain.centroids, cast.centroids)


@pytest.mark.skipif(DEVICE == "cuda", reason="measures this process's memory")
def test_memory_has_nothing_of_size_n_times_k() -> None:
    x = mixture(50_000, 8, 10, seed=12).float()

    def cluster() -> KMeansOutput:
        return ops.kmeans(x, 1024, init=x[:1024], iters=2)

    cluster()
    # N K elements would be 205 MB; the rows are 1.6.
    assert peak_memory(cluster, "cpu") < 16 << 20


@pytest.mark.parametrize(
    ("changed", "error", "name"),
    [
        ({"x": [1.0]}, TypeError, "x"),
        ({"x": torch.ones(4)}, ValueError, "x"),
        ({"x": torch.ones(0, 2)}, ValueError, "x"),
        ({"x": torch.ones(4, 0)}, ValueError, "x"),
        ({"x": torch.ones(4, 2).long()}, TypeError, "x"),
        ({"x": torch.tensor([[1.0, torch.nan]] * 4)}, ValueError, "x"),
        ({"x": torch.tensor([[1.0, -torch.inf]] * 4)}, ValueError, "x"),
        ({"k": 0}, ValueError, "k"),
        ({"k": 5}, ValueError, "k"),
        ({"k": 2.0}, TypeError, "k"),
        ({"init": "kmeans"}, ValueError, "init"),
        ({"init": torch.ones(3, 2)}, ValueError, "init"),
        ({"init": torch.ones(2, 2).double()}, TypeError, "init"),
        ({"init": torch.full((2, 2), torch.nan)}, ValueError, "init"),
        ({"iters": 0}, ValueError, "iters"),
        ({"iters": True}, TypeError, "iters"),
        ({"tol": -1.0}, ValueError, "tol"),
        ({"tol": float("nan")}, ValueError, "tol"),
        ({"backend": "gpu"}, ValueError, "backend"),
    ],
)
def test_errors_name_the_argument(
    changed: dict[str, object], error: type[Exception], name: str
) -> None:
    arguments = {"x": torch.arange(8.0).view(4, 2), "k": 2, **changed}
    with pytest.raises(error, match=f"^{name}:"):
        ops.kmeans(**arguments)
