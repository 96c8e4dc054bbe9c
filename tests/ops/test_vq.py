"""vq_nearest against independent oracles, and the edges that belong to it alone."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from torch import Tensor

from fastzoo import ops, reference
from fastzoo.ops._operator import OPERATORS
from fastzoo.reference.exact import square_root
from fastzoo.testing.timing import peak_memory
from fastzoo.testing.vq import METRICS, random_codes, random_heads, samples
from tests.conftest import DEVICE

BACKENDS = [
    b for b in ("cpu", "cuda", "triton") if OPERATORS["vq_nearest"].refusal(b, DEVICE) is None
]
ALL_BACKENDS = ["reference", *BACKENDS]


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


def test_the_reference_takes_square_roots_that_are_rounded_right() -> None:
    generator = torch.Generator().manual_seed(16)
    x = torch.exp2(torch.rand(20_000, dtype=torch.double, generator=generator) * 1600 - 800)
    x = torch.cat([x, torch.tensor([0.0, 4.0, torch.inf, 5e-324], dtype=torch.double)])
    assert square_root(x).tolist() == [math.sqrt(v) for v in x.tolist()]
    assert square_root(torch.tensor(torch.nan)).isnan()


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_an_offset_changes_no_code(backend: str) -> None:
    x, codebook = random_codes(60, 200, 12, seed=3)
    # On a lattice of 2^-10 the sums with 100 are exact, so the answers must be the same.
    x, codebook = ((t * 1024).round().div(1024).to(DEVICE) for t in (x, codebook))
    plain = ops.vq_nearest(x, codebook, backend=backend)
    assert torch.equal(ops.vq_nearest(x + 100, codebook + 100, backend=backend), plain)
    assert torch.equal(plain.cpu(), reference.vq_nearest(x.cpu(), codebook.cpu()))


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("metric", METRICS)
def test_ties_go_to_the_lowest_index(backend: str, metric: str) -> None:
    _, codebook = random_codes(1, 90, 6, seed=4)
    twice = torch.cat([codebook, codebook]).to(DEVICE)
    found = ops.vq_nearest(twice, twice, metric=metric, backend=backend)
    assert int(found.max()) < 90
    if metric != "dot":
        assert torch.equal(found.cpu(), torch.arange(180) % 90)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_nan_is_never_nearest(backend: str) -> None:
    x, codebook = (t.to(DEVICE) for t in random_codes(30, 40, 4, seed=5))
    codebook[0, 1] = torch.nan
    codebook[17] = torch.nan
    indices = ops.vq_nearest(x, codebook, backend=backend)
    assert not set(indices.tolist()) & {0, 17}
    every = ops.vq_nearest(x, codebook, k=40, backend=backend)
    assert torch.equal(every[:, 38:].cpu(), torch.tensor([[0, 17]]).expand(30, 2))
    x[3, 0] = torch.nan
    indices, d = ops.vq_nearest(x, codebook, backend=backend, return_distance=True)
    assert indices[3] == 0
    assert d[3].isnan()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("metric", METRICS)
def test_clusters_that_the_fast_pass_cannot_tell_apart(backend: str, metric: str) -> None:
    """Enough codes for several groups, or panels, of each row block; equal ones lie far apart."""
    x, centres = random_codes(150, 12, 8, seed=16)
    _, noise = random_codes(1, 3000, 8, seed=17)
    codebook = centres[torch.arange(3000) % 12] + noise * 2.0 ** -(torch.arange(3000) % 22)[:, None]
    codebook[1500:1600] = codebook[:100]
    x[:50] = codebook[1490:1540]
    for k in (None, 3):
        expected = reference.vq_nearest(x, codebook, metric=metric, k=k)
        found = ops.vq_nearest(
            x.to(DEVICE), codebook.to(DEVICE), metric=metric, k=k, backend=backend
        )
        assert torch.equal(found.cpu(), expected)


@pytest.mark.skipif("cuda" not in BACKENDS, reason="neither a GPU nor the emulator")
def test_a_gpu_gives_no_more_than_64_codes() -> None:
    x, codebook = (t.to(DEVICE) for t in random_codes(3, 70, 2))
    assert ops.vq_nearest(x, codebook, k=64, backend="cuda").shape == (3, 64)
    with pytest.raises(RuntimeError, match="k of at most 64 expected, got 65"):
        ops.vq_nearest(x, codebook, k=65, backend="cuda")


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
        if any(part in sample.name for part in ("random-65", "duplicates", "heads-top")):
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


def scores_in_double(x: Tensor, codebook: Tensor, metric: str) -> Tensor:
    """By another route than the reference: cdist, matrix product, cosine_similarity."""
    x, codebook = x.double().cpu(), codebook.double().cpu()
    if metric == "l2":
        return -torch.cdist(x, codebook, compute_mode="donot_use_mm_for_euclid_dist").square()
    if metric == "dot":
        return x @ codebook.T
    return torch.cosine_similarity(x[:, None], codebook[None], dim=2)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("metric", METRICS)
def test_the_k_best_are_the_first_of_a_sorted_list(backend: str, metric: str) -> None:
    x, codebook = random_codes(70, 150, 11, seed=9)
    scores, order = scores_in_double(x, codebook, metric).sort(dim=1, descending=True)
    for k in (1, 4, 33):
        indices, d = ops.vq_nearest(
            x.to(DEVICE),
            codebook.to(DEVICE),
            k=k,
            metric=metric,
            return_distance=True,
            backend=backend,
        )
        assert torch.equal(indices.cpu(), order[:, :k])
        expected = -scores[:, :k] if metric == "l2" else scores[:, :k]
        torch.testing.assert_close(d.cpu(), expected.float(), rtol=2**-22, atol=1e-6)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_a_head_is_a_codebook_of_its_own(backend: str) -> None:
    x, codebook = (t.to(DEVICE) for t in random_heads(45, 3, 50, 7, seed=10))
    mask = torch.arange(45, device=DEVICE) % 5 > 0
    together = ops.vq_nearest(x, codebook, mask=mask, backend=backend)
    for head in range(3):
        alone = ops.vq_nearest(x[:, head], codebook[head], backend=backend)
        assert torch.equal(together[:, head], torch.where(mask, alone, -1))


# Of a GPU's groups of codes: one group of four tiles, or a group more than a list of four holds.
@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize(("k", "near"), [(None, range(5, 600, 128)), (3, range(0, 600, 134))])
def test_a_few_codes_within_rounding_are_told_apart(
    backend: str, k: int | None, near: range
) -> None:
    x, codebook = random_codes(60, 600, 8, seed=16)
    x, codebook = x / 8, codebook * 50
    codebook[list(near)] = 1 + codebook[list(near)] * 2**-29
    expected = reference.vq_nearest(x, codebook, k=k)
    found = ops.vq_nearest(x.to(DEVICE), codebook.to(DEVICE), k=k, backend=backend)
    assert set(expected.unique().tolist()) <= set(near)
    assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("metric", METRICS)
def test_fast_is_within_its_stated_error(backend: str, metric: str) -> None:
    x, codebook = random_codes(200, 700, 24, seed=11)
    codebook[100:] = codebook[:1] + codebook[100:] / 64  # many that bfloat16 cannot tell apart
    scores = scores_in_double(x, codebook, metric)
    found = ops.vq_nearest(
        x.to(DEVICE), codebook.to(DEVICE), metric=metric, precision="fast", backend=backend
    )
    missed = scores.amax(1) - scores.gather(1, found.cpu()[:, None])[:, 0]
    centre = codebook.double().mean(0) if metric == "l2" else torch.zeros(24, dtype=torch.double)
    row, code = (x - centre).norm(dim=1), (codebook - centre).norm(dim=1).max()
    if metric == "cosine":  # d is of a unit vector, the bound of the vector as it is
        missed, code = missed * row, torch.ones(())
    assert (missed <= (2**-7 + 24 * 2**-20) * (row + code) ** 2).all()
    assert (missed > 0).double().mean() < 0.5


def written_out(
    x: Tensor,
    codebook: Tensor,
    indices: Tensor,
    mask: Tensor,
    estimator: str,
    codebook_weight: float,
    beta: float,
) -> tuple[Tensor, Tensor]:
    """The quantiser's output and loss as the papers write them, for indices that are known."""
    codes = codebook[indices]
    valid = mask[:, None].expand(codes.shape)
    loss = codebook_weight * (x.detach() - codes).pow(2)[valid].mean()
    loss = loss + beta * (x - codes.detach()).pow(2)[valid].mean()
    if estimator == "ste":
        out = x + (codes - x).detach()
    elif estimator == "none":
        out = codes
    else:
        u, v = (torch.nn.functional.normalize(t, dim=1).detach() for t in (x, codes))
        w = torch.nn.functional.normalize(u + v, dim=1)
        # Fifty et al. (2024), equation 3, with matrices.
        eye = torch.eye(x.shape[1], dtype=x.dtype)
        turn = eye - 2 * w[:, :, None] * w[:, None] + 2 * v[:, :, None] * u[:, None]
        scale = (codes.norm(dim=1) / x.norm(dim=1)).detach()
        out = scale[:, None] * (turn @ x[:, :, None])[:, :, 0]
    return torch.where(valid, out, x), loss


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("estimator", ["ste", "rotation", "none"])
@pytest.mark.parametrize("legacy", [False, True])
def test_quantising_is_the_papers_formula(backend: str, estimator: str, legacy: bool) -> None:
    x, codebook = (t.double().requires_grad_() for t in random_codes(60, 13, 7, seed=12))
    mask = torch.arange(60) % 4 > 0
    indices = scores_in_double(x.detach(), codebook.detach(), "l2").argmax(1)
    weights = (0.3, 0.8) if legacy else (0.8, 0.3)
    expected = written_out(x, codebook, indices, mask, estimator, *weights)
    on_device = [t.detach().to(DEVICE).requires_grad_() for t in (x, codebook)]
    actual = ops.vq_quantize(
        *on_device,
        beta=0.3,
        codebook_weight=0.8,
        legacy=legacy,
        estimator=estimator,
        mask=mask.to(DEVICE),
        backend=backend,
    )
    assert torch.equal(actual.indices.cpu(), torch.where(mask, indices, -1))
    # The codes themselves: no rounding of x + (c - x).
    chosen = torch.where(mask[:, None], codebook[indices], x)
    assert torch.equal(actual.quantized.cpu(), chosen)
    torch.testing.assert_close(actual.loss.cpu(), expected[1], rtol=1e-14, atol=0)
    weight = torch.randn(60, 7, generator=torch.Generator().manual_seed(1), dtype=torch.double)
    grads = [
        torch.autograd.grad((out.cpu() * weight).sum() + 3 * loss.cpu(), leaves)
        for (out, loss), leaves in (
            (expected, (x, codebook)),
            ((actual.quantized, actual.loss), on_device),
        )
    ]
    for e, a in zip(*grads, strict=True):
        torch.testing.assert_close(a.cpu(), e, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_statistics_are_numpys(backend: str) -> None:
    x, codebook = random_codes(500, 20, 6, seed=13)
    mask = torch.arange(500) % 7 > 0
    out = ops.vq_quantize(
        x.to(DEVICE), codebook.to(DEVICE), mask=mask.to(DEVICE), return_stats=True, backend=backend
    )
    sums = np.zeros((20, 6))
    np.add.at(sums, out.indices.cpu()[mask].numpy(), x[mask].double().numpy())
    np.testing.assert_allclose(out.sums.cpu().numpy(), sums, rtol=2**-23, atol=1e-12)
    counts = np.bincount(out.indices.cpu()[mask].numpy(), minlength=20)
    assert out.counts.tolist() == counts.tolist()
    share = counts[counts > 0] / counts.sum()
    assert out.perplexity.item() == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-5)


def test_perplexity_of_nothing_and_without_statistics() -> None:
    x, codebook = random_codes(0, 5, 3)
    assert ops.vq_quantize(x, codebook, return_stats=True).perplexity == 1
    with pytest.raises(ValueError, match="return_stats"):
        _ = ops.vq_quantize(x, codebook).perplexity


def test_statistics_have_the_gradient_of_a_sum() -> None:
    x, _ = random_codes(30, 1, 4, seed=14)
    indices = torch.arange(30) % 6 - 1
    x = x.double().requires_grad_()
    weight = torch.arange(20, dtype=torch.double).view(5, 4)
    (ops.vq_statistics(x, indices, 5)[1] * weight).sum().backward()
    expected = torch.where(indices[:, None] < 0, 0, weight[indices.clamp(min=0)])
    assert torch.equal(x.grad, expected)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_a_codebook_may_be_updated_before_the_backward(backend: str) -> None:
    x, codebook = (t.to(DEVICE) for t in random_codes(40, 9, 5, seed=15))
    grads = []
    for update in (False, True):
        leaf, codes = x.clone().requires_grad_(), codebook.clone()
        out = ops.vq_quantize(leaf, codes, beta=0.5, estimator="rotation", backend=backend)
        if update:
            codes.zero_()
        (out.quantized.square().sum() + out.loss).backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize("heads", [(), (3,)])
def test_the_update_is_the_papers_moving_average(heads: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(2)
    codebook, embed_avg, sums = (
        torch.randn(*heads, 6, 4, generator=generator, dtype=torch.double) for _ in range(3)
    )
    size, counts = (
        torch.rand(*heads, 6, generator=generator, dtype=torch.double) * 9 for _ in range(2)
    )
    decay, eps = 0.8, 1e-3
    expected_size = decay * size + (1 - decay) * counts
    expected_avg = decay * embed_avg + (1 - decay) * sums
    total = expected_size.sum(-1, keepdim=True)
    smoothed = (expected_size + eps) / (total + 6 * eps) * total
    ops.vq_ema_update_(codebook, size, embed_avg, counts, sums, decay=decay, eps=eps)
    torch.testing.assert_close(size, expected_size)
    torch.testing.assert_close(embed_avg, expected_avg)
    torch.testing.assert_close(codebook, expected_avg / smoothed[..., None])


def test_an_update_of_nothing_keeps_the_codebook() -> None:
    codebook = torch.ones(3, 2)
    zeros = torch.zeros(3), torch.zeros(3, 2)
    ops.vq_ema_update_(codebook, *(z.clone() for z in zeros), *zeros, decay=0.9)
    assert torch.equal(codebook, torch.ones(3, 2))


def test_the_update_refuses_before_it_writes() -> None:
    codebook, size, average = torch.ones(3, 2), torch.ones(3), torch.ones(3, 2)
    for bad, error, match in (
        ({"counts": torch.ones(2)}, ValueError, "counts"),
        ({"sums": torch.ones(3, 2).long()}, TypeError, "sums"),
        ({"decay": 1.5}, ValueError, "decay"),
    ):
        named = {"counts": torch.zeros(3), "sums": torch.zeros(3, 2), "decay": 0.5, **bad}
        with pytest.raises(error, match=match):
            ops.vq_ema_update_(codebook, size, average, **named)
        assert torch.equal(size, torch.ones(3))
        assert torch.equal(average, torch.ones(3, 2))


@pytest.mark.skipif(DEVICE == "cuda", reason="measures this process's memory")
def test_a_training_step_keeps_nothing_of_size_n_times_k() -> None:
    n, k, dim = 8192, 8192, 16
    x, codebook = random_codes(n, k, dim)
    x.requires_grad_()
    codebook.requires_grad_()

    def step() -> None:
        out = ops.vq_quantize(x, codebook, estimator="rotation", return_stats=True)
        torch.autograd.grad(out.quantized.sum() + out.loss, (x, codebook))

    step()
    # N K elements would be 256 MiB; what is N or K times D is half a MiB each.
    assert peak_memory(step, "cpu") < 24 << 20


# ---- the CPU's candidates ------------------------------------------------------------------------


@pytest.mark.parametrize("k", [None, 5])
@pytest.mark.parametrize("hard", [slice(1, 3), slice(0, 300, 2)], ids=["few", "half"])
def test_rows_that_low_precision_cannot_decide_are_exact(
    capability: str, k: int | None, hard: slice
) -> None:
    # Hundreds of codes are as good for the hard rows as bfloat16 can tell; it is given up where a
    # sample of the rows shows many such, and its lists overflow where it misses the few.
    x, codebook = random_codes(300, 700, 33, seed=9)
    codebook[:400] = codebook[:1] + codebook[:400] * 2**-10
    x[hard] = codebook[:1] + x[hard] / 4
    for metric in METRICS:
        found = ops.vq_nearest(x, codebook, k=k, metric=metric, backend="cpu")
        expected = reference.vq_nearest(x, codebook, k=k, metric=metric)
        assert torch.equal(found, expected), f"{capability} {metric}"


def test_a_fast_answer_is_within_twice_the_bound(capability: str) -> None:
    x, codebook = random_codes(300, 500, 24, seed=10)
    indices, d = ops.vq_nearest(x, codebook, precision="fast", return_distance=True, backend="cpu")
    best = reference.vq_nearest(x, codebook, return_distance=True)[1]
    torch.testing.assert_close(d, (x - codebook[indices]).square().sum(1))
    mean = codebook.mean(0)
    a, b = (x - mean).norm(dim=1), (codebook - mean).norm(dim=1).max()
    # Both operands rounded by 2^-9, and 32 roundings of float32; d is twice a score.
    bound = 1.04 * (2.01 * 2**-9 * a * b + 32 * 2**-24 * (a + b) ** 2 / 2)
    assert ((d - best) / 2 <= 2 * bound).all()
    if capability != "avx512_bf16":
        assert torch.equal(d, best)
