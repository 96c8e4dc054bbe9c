"""What sums over the rows of each code: vq_statistics and the gradients, on every instruction set
and any number of threads."""

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from fastzoo import ops, reference
from fastzoo.testing.tolerance import unit_roundoff
from fastzoo.testing.vq import METRICS

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
ESTIMATORS = ("ste", "rotation", "none")


def draws(n: int, codes: int, dim: int, dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    losses = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        "x": normal(n, dim),
        "codebook": normal(codes, dim),
        "grad_quantized": normal(n, dim),
        "grad_losses": normal(n).to(losses),
        # Some rows have no code.
        "indices": torch.randint(-1, codes, (n,), generator=generator),
    }


def cases(dtype: torch.dtype) -> Iterator[dict[str, Tensor]]:
    """Vectors of every remainder, parts of a code, and dimensions that are summed in blocks."""
    for seed, (n, codes, dim) in enumerate([(1, 1, 1), (300, 7, 19), (40, 90, 8), (130, 3, 1030)]):
        yield draws(n, codes, dim, dtype, seed)
    hot = draws(5000, 4, 6, dtype, 9)
    hot["indices"] = torch.where(torch.arange(5000) % 50 > 0, 2, hot["indices"])
    yield hot


def check_sums(found: Tensor, terms: np.ndarray, indices: Tensor, codes: int) -> None:
    """Sums in float64 of at most D + 8 roundings a term, rounded once to the result's dtype."""
    kept = indices.numpy() >= 0
    expected, magnitude = (np.zeros((codes, terms.shape[1])) for _ in range(2))
    np.add.at(expected, indices.numpy()[kept], terms[kept])
    np.add.at(magnitude, indices.numpy()[kept], np.abs(terms[kept]))
    rounding = unit_roundoff(found.dtype) * (1 + 2**-10) * np.abs(expected)
    if found.dtype in (torch.float16, torch.bfloat16):
        rounding += 2**-24 * np.abs(expected) + 2**-25  # by way of float; subnormal halves
    allowed = rounding + 2 * (terms.shape[1] + 8 + len(terms)) * 2**-53 * magnitude
    assert (np.abs(found.double().numpy() - expected) <= allowed).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics_are_numpys_on_every_instruction_set(
    capability: str, dtype: torch.dtype
) -> None:
    for case in cases(dtype):
        codes = len(case["codebook"])
        counts, sums = ops.vq_statistics(case["x"], case["indices"], codes, backend="cpu")
        kept = case["indices"][case["indices"] >= 0]
        assert counts.tolist() == kept.bincount(minlength=codes).tolist()
        check_sums(sums, case["x"].double().numpy(), case["indices"], codes)


def test_statistics_of_short_codes_are_the_references_bits() -> None:
    # Up to 1024 rows of a code are added one after the other, as the definition adds them.
    case = draws(9000, 37, 21, torch.float64, seed=3)
    args = case["x"], case["indices"], 37
    found, expected = (ops.vq_statistics(*args, backend=b) for b in ("cpu", "reference"))
    assert torch.equal(found[1], expected[1])


def test_statistics_are_kmeans_centres() -> None:
    from sklearn.cluster import KMeans

    x = draws(2000, 1, 5, torch.float64, seed=4)["x"]
    fitted = KMeans(9, n_init=1, random_state=0, tol=0, max_iter=500).fit(x.numpy())
    counts, sums = ops.vq_statistics(x, torch.from_numpy(fitted.labels_).long(), 9, backend="cpu")
    np.testing.assert_allclose((sums / counts[:, None]).numpy(), fitted.cluster_centers_, rtol=1e-9)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_quantisers_gradient_on_every_instruction_set(
    capability: str, estimator: str, dtype: torch.dtype
) -> None:
    backward = torch.ops.fastzoo.vq_quantize_backward.cpu
    for case in cases(dtype):
        args = [case[n] for n in ("grad_quantized", "grad_losses", "x", "codebook", "indices")]
        options = estimator, 0.7, 0.3
        by_x, by_codebook = backward(*args, *options, True)
        gradient, by_loss, x, codebook = (t.double() for t in args[:4])
        expected = reference.vq_quantize_backward(
            gradient, by_loss, x, codebook, args[4], *options, True
        )[0]
        # The rotation divides by |x| and |u + v|: roundings grow with what they are divided by.
        scale = (expected.norm(dim=1, keepdim=True) + 1) * 2**-53 * 64 * (x.shape[1] + 8)
        check_rounded(by_x, expected, scale)
        terms = 2 * 0.7 * by_loss[:, None] * (codebook[args[4].clamp(min=0)] - x)
        if estimator == "none":
            terms = terms + gradient
        check_sums(by_codebook, terms.numpy(), args[4], len(codebook))
        alone, nothing = backward(*args, *options, False)
        assert torch.equal(alone, by_x)
        assert nothing.shape == (0, x.shape[1])


def check_rounded(found: Tensor, expected: Tensor, allowed: Tensor) -> None:
    """One rounding to the result's dtype, beside what is allowed."""
    rounding = unit_roundoff(found.dtype) * (1 + 2**-10) * expected.abs()
    if found.dtype in (torch.float16, torch.bfloat16):
        rounding = rounding + 2**-24 * expected.abs() + 2**-25
    assert ((found.double() - expected).abs() <= rounding + allowed).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("metric", METRICS)
def test_the_lookups_gradient_on_every_instruction_set(
    capability: str, metric: str, dtype: torch.dtype
) -> None:
    for case in cases(dtype):
        args = [case[n] for n in ("grad_losses", "x", "codebook", "indices")]
        by_x, by_codebook = torch.ops.fastzoo.vq_nearest_backward.cpu(*args, metric)
        double = [t.double() for t in args[:3]]
        expected = reference.vq_nearest_backward(*double, args[3], metric)
        n, dim = args[1].shape
        # A cosine's gradient is a difference of terms of this size.
        norms = torch.cat(double[1:]).norm(dim=1)
        size = 1 / float(norms.min()) if metric == "cosine" else float(norms.max())
        scale = 2**-53 * 8 * (dim + 8) * size * float(double[0].abs().max())
        check_rounded(by_x, expected[0], torch.tensor(scale))
        check_rounded(by_codebook, expected[1], torch.tensor(scale * n))
        assert (by_x[args[3] < 0] == 0).all()


def with_threads(count: int, call: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    threads = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return call()
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("hot", [False, True])
def test_any_number_of_threads_gives_equal_bits(hot: bool) -> None:
    # Long enough for the sort, too, to be divided; float32 would hide the order of additions.
    case = draws(100_000, 50, 7, torch.float64, seed=5)
    if hot:
        case["indices"].fill_(17)
    args = [case[n] for n in ("grad_quantized", "grad_losses", "x", "codebook", "indices")]

    def everything() -> tuple[Tensor, ...]:
        return (
            *ops.vq_statistics(case["x"], case["indices"], 50, backend="cpu"),
            *torch.ops.fastzoo.vq_quantize_backward.cpu(*args, "rotation", 1.0, 0.25, True),
            *torch.ops.fastzoo.vq_nearest_backward.cpu(*args[1:], "cosine"),
        )

    first = with_threads(1, everything)
    for count in (2, 3):
        for a, b in zip(with_threads(count, everything), first, strict=True):
            assert torch.equal(a, b)


def test_an_index_too_large_raises() -> None:
    case = draws(6, 3, 2, torch.float32, seed=6)
    case["indices"][4] = 3
    args = [case[n] for n in ("grad_quantized", "grad_losses", "x", "codebook", "indices")]
    with pytest.raises(RuntimeError, match="index 3 is out of range"):
        ops.vq_statistics(case["x"], case["indices"], 3, backend="cpu")
    for wants_codebook in (False, True):
        with pytest.raises(RuntimeError, match="index 3 is out of range"):
            torch.ops.fastzoo.vq_quantize_backward.cpu(*args, "ste", 1.0, 0.25, wants_codebook)
    with pytest.raises(RuntimeError, match="index 3 is out of range"):
        torch.ops.fastzoo.vq_nearest_backward.cpu(*args[1:], "l2")


def test_nothing_sums_to_nothing() -> None:
    counts, sums = ops.vq_statistics(torch.ones(0, 3), torch.ones(0).long(), 4, backend="cpu")
    assert torch.equal(counts, torch.zeros(4))
    assert torch.equal(sums, torch.zeros(4, 3))
    assert ops.vq_statistics(torch.ones(2, 3), -torch.ones(2).long(), 0)[1].shape == (0, 3)
