"""vq_nearest against independent oracles, and the edges that belong to it alone."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist

from fastzoo import ops, reference
from fastzoo.ops._operator import OPERATORS
from fastzoo.testing.timing import peak_memory
from fastzoo.testing.vq import METRICS, random_codes, samples
from tests.conftest import DEVICE

BACKENDS = [
    b for b in ("cpu", "cuda", "triton") if OPERATORS["vq_nearest"].refusal(b, DEVICE) is None
]


def rational_argmax(x: np.ndarray, codebook: np.ndarray, metric: str) -> list[int]:
    """The answer in exact rational arithmetic; ties by lower index."""

    def fractions(row: np.ndarray) -> list[Fraction]:
        return [Fraction(float(v)) for v in row]

    def score(row: list[Fraction], code: list[Fraction]) -> Fraction:
        if metric == "l2":
            return -sum(((a - b) ** 2 for a, b in zip(row, code, strict=True)), Fraction())
        return sum((a * b for a, b in zip(row, code, strict=True)), Fraction())

    rows, codes = [fractions(r) for r in x], [fractions(c) for c in codebook]
    return [max(range(len(codes)), key=lambda k: (score(row, codes[k]), -k)) for row in rows]


@pytest.mark.parametrize("metric", ["l2", "dot"])
def test_reference_is_the_rational_answer(metric: str) -> None:
    for scale in (1.0, 0.1):
        x, codebook = random_codes(40, 30, 5, seed=1)
        lattice = (x * 2).round() * scale, (codebook * 2).round() * scale
        for pair in ((x, codebook), lattice if scale == 1 else (x, codebook)):
            expected = rational_argmax(pair[0].numpy(), pair[1].numpy(), metric)
            assert reference.vq_nearest(*pair, metric=metric).tolist() == expected


@pytest.mark.parametrize(
    ("metric", "scipy_metric"), [("l2", "sqeuclidean"), ("cosine", "cosine"), ("dot", None)]
)
def test_like_scipy(metric: str, scipy_metric: str | None) -> None:
    x, codebook = random_codes(500, 300, 17, seed=2)
    if scipy_metric:
        distance = cdist(x.double().numpy(), codebook.double().numpy(), scipy_metric)
    else:
        distance = -x.double().numpy() @ codebook.double().numpy().T
    indices, d = ops.vq_nearest(x, codebook, metric=metric, return_distance=True)
    assert indices.tolist() == distance.argmin(1).tolist()
    best = distance.min(1)
    expected = {"l2": best, "cosine": 1 - best, "dot": -best}[metric]
    np.testing.assert_allclose(d.numpy(), expected, rtol=2**-23)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_an_offset_changes_no_code(backend: str) -> None:
    x, codebook = random_codes(60, 200, 12, seed=3)
    # On a lattice of 2^-10 the sums with 100 are exact, so the answers must be the same.
    x, codebook = ((t * 1024).round().div(1024).to(DEVICE) for t in (x, codebook))
    plain = ops.vq_nearest(x, codebook, backend=backend)
    assert torch.equal(ops.vq_nearest(x + 100, codebook + 100, backend=backend), plain)
    assert torch.equal(plain.cpu(), reference.vq_nearest(x.cpu(), codebook.cpu()))


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("metric", METRICS)
def test_ties_go_to_the_lowest_index(backend: str, metric: str) -> None:
    _, codebook = random_codes(1, 90, 6, seed=4)
    twice = torch.cat([codebook, codebook]).to(DEVICE)
    found = ops.vq_nearest(twice, twice, metric=metric, backend=backend)
    assert int(found.max()) < 90
    if metric != "dot":
        assert torch.equal(found.cpu(), torch.arange(180) % 90)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_nan_is_never_nearest(backend: str) -> None:
    x, codebook = (t.to(DEVICE) for t in random_codes(30, 40, 4, seed=5))
    codebook[0, 1] = torch.nan
    codebook[17] = torch.nan
    indices = ops.vq_nearest(x, codebook, backend=backend)
    assert not set(indices.tolist()) & {0, 17}
    x[3, 0] = torch.nan
    indices, d = ops.vq_nearest(x, codebook, backend=backend, return_distance=True)
    assert indices[3] == 0
    assert d[3].isnan()


@pytest.mark.parametrize("metric", METRICS)
def test_every_instruction_set_finds_the_same(capability: str, metric: str) -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        x, codebook = random_codes(333, 777, 20, seed=7)
        for offset in (0, 100):
            case = (x + offset).to(dtype), (codebook + offset).to(dtype)
            found = ops.vq_nearest(*case, metric=metric, backend="cpu")
            expected = reference.vq_nearest(*case, metric=metric)
            assert torch.equal(found, expected), f"{capability} {dtype} +{offset}"


@pytest.mark.skipif(DEVICE == "cuda", reason="the emulator is for machines without a GPU")
@pytest.mark.parametrize("order", ["forward", "reverse", "random:1"])
def test_any_order_of_threads_finds_the_same(order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTZOO_EMULATOR_ORDER", order)
    for sample in samples(torch.float32):
        if "random-65" in sample.name or "duplicates" in sample.name:
            expected = reference.vq_nearest(*sample.args, **sample.kwargs)
            found = ops.vq_nearest(*sample.args, **sample.kwargs, backend="cuda")
            assert torch.equal(found[0], expected[0]), sample.name


@pytest.mark.skipif(DEVICE == "cuda", reason="measures this process's memory")
def test_memory_stays_within_the_packed_codebook() -> None:
    n, k, dim = 16384, 16384, 8
    x, codebook = random_codes(n, k, dim)
    ops.vq_nearest(x, codebook)
    packed = 4 * k * dim
    assert peak_memory(lambda: ops.vq_nearest(x, codebook), "cpu") < 2 * packed + (16 << 20)


@pytest.mark.parametrize("metric", METRICS)
def test_gradients_are_those_of_the_gathered_formula(metric: str) -> None:
    x, codebook = (t.double().requires_grad_() for t in random_codes(50, 7, 5, seed=8))
    indices, d = ops.vq_nearest(x, codebook, metric=metric, return_distance=True)
    weights = torch.linspace(-1, 1, 50, dtype=torch.double)
    grads = torch.autograd.grad((d * weights).sum(), (x, codebook))
    codes = codebook[indices]
    formula = {
        "l2": (x - codes).pow(2).sum(1),
        "dot": (x * codes).sum(1),
        "cosine": torch.nn.functional.cosine_similarity(x, codes),
    }[metric]
    expected = torch.autograd.grad((formula * weights).sum(), (x, codebook))
    torch.testing.assert_close(grads, expected, rtol=1e-12, atol=1e-12)


def test_zero_rows_have_finite_gradients() -> None:
    x = torch.zeros(3, 4, requires_grad=True)
    codebook = torch.ones(2, 4, requires_grad=True)
    d = ops.vq_nearest(x, codebook, metric="cosine", return_distance=True)[1]
    d.sum().backward()
    assert x.grad is not None
    assert codebook.grad is not None
    assert x.grad.isfinite().all()
    assert codebook.grad.isfinite().all()
