"""Sample inputs and benchmark cases of the ``vq`` family."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastzoo import ops, reference
from fastzoo.ops.vq import ESTIMATORS, METRICS
from fastzoo.reference.precision import compute_dtype
from fastzoo.testing.spec import BenchmarkCase, Invalid, OpSpec, Sample
from fastzoo.testing.tolerance import unit_roundoff


def random_codes(
    n: int, k: int, dim: int, *, seed: int = 0, device: str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Standard normal vectors ``[n, dim]`` and codes ``[k, dim]``."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, dim, generator=generator)
    return x.to(device), torch.randn(k, dim, generator=generator).to(device)


def random_heads(n: int, heads: int, k: int, dim: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Standard normal vectors ``[n, heads, dim]`` and codes ``[heads, k, dim]``."""
    x, codebook = random_codes(n * heads, heads * k, dim, seed=seed)
    return x.view(n, heads, dim), codebook.view(heads, k, dim)


def samples(dtype: torch.dtype) -> Iterator[Sample]:
    def sample(name: str, x: Tensor, codebook: Tensor, metric: str = "l2", **more: Any) -> Sample:
        kwargs = {"metric": metric, "return_distance": True, **more}
        return Sample(f"{name}-{metric}", (x.to(dtype), codebook.to(dtype)), kwargs)

    shapes = [(0, 3, 4), (1, 1, 1), (7, 13, 5), (63, 65, 31), (64, 64, 32), (65, 129, 33)]
    for n, k, dim in [*shapes, (13, 300, 8), (31, 7, 100)]:
        for metric in METRICS:
            yield sample(f"random-{n}x{k}x{dim}", *random_codes(n, k, dim, seed=n), metric)
    x, codebook = random_codes(50, 70, 9, seed=3)
    for metric in METRICS:
        yield sample("offset", x + 100, codebook + 100, metric)
        yield sample("far-offset", x / 16 + 1000, codebook / 16 + 1000, metric)
        yield sample("duplicates", x, codebook[torch.arange(70) % 5], metric)
        yield sample("zero-codebook", x, torch.zeros_like(codebook), metric)
        yield sample("zero-rows", torch.zeros_like(x), codebook, metric)
        lattice = (x * 2).round(), (codebook * 2).round()
        yield sample("lattice", *lattice, metric)
        yield sample("lattice-codes", codebook[:50], codebook, metric)
        near = codebook[:1] + codebook * 2**-9
        yield sample("near-ties", x, near, metric)
        yield sample("large", x * 100, codebook * 100, metric)
        broken_x = x.clone()
        broken_x[3, 2], broken_x[5, 1], broken_x[7] = torch.nan, torch.inf, -torch.inf
        yield sample("special-rows", broken_x, codebook, metric)
        broken_codes = codebook.clone()
        broken_codes[3, 2], broken_codes[5, 1], broken_codes[9, 0] = (
            torch.nan,
            torch.inf,
            -torch.inf,
        )
        yield sample("special-codes", broken_x, broken_codes, metric)
        yield sample("nan-codebook", x, torch.full_like(codebook, torch.nan), metric)
    # The only score that is a number, and no higher than -inf, is the best.
    x, codes = torch.ones(1, 2), torch.tensor([[torch.nan, 0], [-torch.inf, 0], [-torch.inf, 1]])
    yield sample("nan-below-minus-infinity", x, codes, "dot")
    if dtype in (torch.float32, torch.bfloat16):
        # Partial sums of the fast pass overflow where the exact score does not.
        x, codes = (
            torch.ones(1, 4),
            torch.tensor([[2, 2, -3, 0], [1.5, 0, 0, 0], [2, -3, 2, 0], [-3, 2, 2, 0]]),
        )
        for metric in METRICS:
            yield sample("overflowing-partial-sums", x, codes * 1e38, metric)
    x, codebook = random_codes(50, 70, 9, seed=3)
    yield sample("leading-dimensions", x.reshape(2, 5, 5, 9), codebook)
    yield sample("one-vector", x[0], codebook)
    heads_x, heads_codes = random_heads(40, 3, 37, 10, seed=5)
    some = torch.arange(40) % 3 > 0
    for metric in METRICS:
        yield sample("heads-masked", heads_x, heads_codes, metric, mask=some)
        yield sample("top", x, codebook, metric, k=7)
    yield sample("heads", heads_x, heads_codes)
    yield sample("heads-top", heads_x, heads_codes, "cosine", mask=some, k=5)
    yield sample("top-ties", x, codebook[torch.arange(70) % 5], "l2", k=13)
    yield sample("top-special", broken_x, broken_codes, "dot", k=9)
    yield sample("top-nan", x, torch.full_like(codebook, torch.nan), "cosine", k=2)
    yield sample("masked", x, codebook, mask=torch.arange(50) % 4 > 1)
    yield sample("all-masked", x, codebook, mask=torch.zeros(50, dtype=torch.bool))
    yield sample("top-one", x, codebook, k=1)
    yield sample("top-all", x[:9], codebook[:11], k=11)
    yield sample("one-head", heads_x[:, :1], heads_codes[:1])
    if dtype in (torch.float32, torch.float64):
        tiny, huge = torch.finfo(dtype).tiny, torch.finfo(dtype).max / 4
        for metric in METRICS:
            yield sample("denormal", x * tiny, codebook * tiny, metric)
            yield sample("overflowing", x * huge, codebook * huge, metric)


def invalid() -> Iterator[Invalid]:
    x, codebook = random_codes(4, 3, 2)
    yield Invalid("list", ([1.0], codebook), {}, TypeError, "x")
    yield Invalid("scalar", (x[0, 0], codebook), {}, ValueError, "x")
    yield Invalid("codebook-rank", (x, codebook[0]), {}, ValueError, "codebook")
    yield Invalid("width", (x, codebook[:, :1]), {}, ValueError, "codebook")
    yield Invalid("no-codes", (x, codebook[:0]), {}, ValueError, "codebook")
    yield Invalid("no-dimensions", (x[:, :0], codebook[:, :0]), {}, ValueError, "codebook")
    yield Invalid("integers", (x.long(), codebook), {}, TypeError, "x")
    yield Invalid("dtype-mix", (x, codebook.double()), {}, TypeError, "codebook")
    yield Invalid("device-mix", (x, codebook.to("meta")), {}, ValueError, "codebook")
    yield Invalid("metric", (x, codebook), {"metric": "l1"}, ValueError, "metric")
    yield Invalid("backend", (x, codebook), {"backend": "gpu"}, ValueError, "backend")
    yield from _invalid_vectors(x, codebook)
    yield Invalid("k-zero", (x, codebook), {"k": 0}, ValueError, "k: ")
    yield Invalid("k-above", (x, codebook), {"k": 4}, ValueError, "k: ")
    yield Invalid("k-float", (x, codebook), {"k": 1.0}, TypeError, "k: ")


def _invalid_vectors(x: Tensor, codebook: Tensor) -> Iterator[Invalid]:
    """What the lookup and the quantiser refuse alike."""
    mask = torch.ones(len(x), dtype=torch.bool)
    yield Invalid("heads", (x, codebook[None]), {}, ValueError, "x: ")
    yield Invalid("precision", (x, codebook), {"precision": "low"}, ValueError, "precision")
    yield Invalid("mask-list", (x, codebook), {"mask": [True]}, TypeError, "mask")
    yield Invalid("mask-dtype", (x, codebook), {"mask": mask.int()}, TypeError, "mask")
    yield Invalid("mask-shape", (x, codebook), {"mask": mask[1:]}, ValueError, "mask")
    yield Invalid("mask-device", (x, codebook), {"mask": mask.to("meta")}, ValueError, "mask")


def tolerance(
    x: Tensor,
    codebook: Tensor,
    metric: str = "l2",
    mask: Tensor | None = None,
    k: int | None = None,
    **_: Any,
) -> Tensor:
    """Absolute error allowed of ``d``.

    ``d`` is a float64 sum of D terms, in any order, rounded once to its dtype. The sum's error is
    at most (D + 4) 2^-53 times the sum of the terms' magnitudes, for both sides; the rounding's is
    one unit round-off of ``d`` a side. ``codebook`` is seen through its largest code.
    """
    dim = x.shape[-1]
    out = compute_dtype(x)
    rows, codes = x.double(), codebook.double()
    finite = codes.isfinite().all(-1, keepdim=True)
    largest = torch.where(finite, codes, 0).norm(dim=-1).amax(-1)
    norm = rows.norm(dim=-1).nan_to_num(0, 0, 0)
    if metric == "l2":
        magnitude = (norm + largest) ** 2
    elif metric == "dot":
        magnitude = norm * largest
    else:
        magnitude = torch.ones_like(norm)
    d = reference.vq_nearest(rows, codes, k=k, metric=metric, mask=mask, return_distance=True)[1]
    magnitude = magnitude if k is None else magnitude[..., None]
    rounding = 2 * unit_roundoff(out) * d.abs().nan_to_num(0, 0, 0)
    allowed: Tensor = 2 * (dim + 4) * 2**-53 * magnitude + rounding + torch.finfo(out).tiny
    return allowed


def cancellation(x: Tensor, codebook: Tensor, metric: str = "l2", **_: Any) -> float:
    """The size of the terms that a gradient is the difference of, for a unit grad_d.

    Cosine: the component along the vector is taken out of the normalised other one, which leaves
    nothing at all in one dimension.
    """
    if metric != "cosine":
        return 0.0
    vectors = torch.cat([t.reshape(-1, x.shape[-1]) for t in (x, codebook)])
    norms = vectors.double().norm(dim=1)
    return float(1 / norms[norms > 0].min()) if norms.any() else 0.0


def eager(x: Tensor, codebook: Tensor) -> Tensor:
    """The expanded distance with one matrix product, as quantisers write it."""
    scores = torch.addmm(codebook.square().sum(1), x, codebook.t(), beta=-0.5)
    return scores.argmax(1)


def gradient_sample(dtype: torch.dtype) -> Sample:
    x, codebook = random_codes(11, 5, 3, seed=6)
    return Sample("gradient", (x.to(dtype), codebook.to(dtype)), {"return_distance": True})


def _dispatched(
    x: Tensor,
    codebook: Tensor,
    *,
    metric: str = "l2",
    mask: Tensor | None = None,
    k: int | None = None,
    precision: str = "exact",
    **_: Any,
) -> tuple[Any, ...]:
    x, mask = _operands(x, codebook, mask)
    return x, codebook, mask, metric, k or 0, precision


def _operands(x: Tensor, codebook: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The vectors and the mask as the operators take them."""
    mask = x.new_empty(0, dtype=torch.bool) if mask is None else mask.reshape(-1)
    return x.reshape(-1, *codebook.shape[:-2], x.shape[-1]), mask


def _case(n: int, k: int, dim: int) -> BenchmarkCase:
    return BenchmarkCase(
        name=f"{n} x {k} x {dim}",
        shape={"n": n, "k": k, "dim": dim},
        make=lambda device, n, k, dim: random_codes(n, k, dim, device=device),
        kwargs={},
        flops=lambda x, codebook: 2.0 * len(x) * codebook.numel(),
        bytes=lambda x, codebook: (x.numel() + codebook.numel()) * x.element_size() + 8 * len(x),
    )


VQ_NEAREST = OpSpec(
    name="vq_nearest",
    function=ops.vq_nearest,
    definition=reference.vq_nearest,
    eager=eager,
    eager_bytes=lambda x, codebook: float(len(x) * len(codebook) * x.element_size()),
    samples=samples,
    invalid=invalid,
    dispatch_args=_dispatched,
    fixed_shape=True,
    differentiable=lambda output: output[1],
    gradient_sample=gradient_sample,
    tolerance=tolerance,
    cancellation=cancellation,
    benchmarks=(
        _case(1, 1, 1),
        _case(4096, 1024, 64),
        _case(4096, 8192, 256),
        _case(16384, 8192, 64),
        _case(16384, 16384, 8),
    ),
)


def quantize_samples(dtype: torch.dtype) -> Iterator[Sample]:
    def sample(name: str, x: Tensor, codebook: Tensor, **kwargs: Any) -> Sample:
        kwargs = {"return_stats": True, **kwargs}
        return Sample(name, (x.to(dtype), codebook.to(dtype)), kwargs)

    for estimator in ESTIMATORS:
        x, codebook = random_codes(65, 33, 12, seed=7)
        yield sample(f"random-{estimator}", x, codebook, estimator=estimator)
    yield sample("random-one", *random_codes(1, 1, 1), legacy=True)
    yield sample("empty", *random_codes(0, 3, 4))
    yield sample("wide", *random_codes(31, 7, 130, seed=1), beta=0.5, codebook_weight=0.125)
    x, codebook = random_codes(50, 20, 9, seed=8)
    some = torch.arange(50) % 3 > 0
    yield sample("offset", x + 100, codebook + 100)
    yield sample("one-code", x, codebook[:1])
    yield sample("one-chosen", x, codebook + torch.arange(20)[:, None] * 1000)
    yield sample("leading-dimensions", x.view(2, 5, 5, 9), codebook, mask=some.view(2, 5, 5))
    yield sample("all-masked", x, codebook, mask=torch.zeros(50, dtype=torch.bool))
    yield sample("without-statistics", x, codebook, return_stats=False, legacy=True)
    yield sample("zero-codebook", x, torch.zeros_like(codebook), estimator="rotation")
    short = torch.where(some[:, None], x, 0)
    yield sample("zero-rows", short, codebook, estimator="rotation")
    opposite = torch.cat([-x, codebook[:1]])
    yield sample("opposite", x, opposite, estimator="rotation", metric="dot")
    heads_x, heads_codes = random_heads(40, 3, 11, 10, seed=5)
    for metric, estimator in zip(METRICS, ESTIMATORS, strict=True):
        named = {"metric": metric, "estimator": estimator}
        yield sample(f"{metric}-masked", x, codebook, mask=some, **named)
        yield sample(f"heads-{metric}", heads_x, heads_codes, mask=some[:40], **named)
    broken = x.clone()
    broken[3, 2], broken[5, 1], broken[7] = torch.nan, torch.inf, -torch.inf
    yield sample("special-rows", broken, codebook, mask=torch.arange(50) != 7, return_stats=False)


def quantize_invalid() -> Iterator[Invalid]:
    x, codebook = random_codes(4, 3, 2)
    yield Invalid("width", (x, codebook[:, :1]), {}, ValueError, "codebook")
    yield Invalid("integers", (x.long(), codebook), {}, TypeError, "x")
    yield Invalid("metric", (x, codebook), {"metric": "l1"}, ValueError, "metric")
    yield Invalid("estimator", (x, codebook), {"estimator": "st"}, ValueError, "estimator")
    yield from _invalid_vectors(x, codebook)


def quantize_tolerance(x: Tensor, codebook: Tensor, **kwargs: Any) -> Tensor:
    """Absolute error allowed of the loss and of the statistics.

    A row's loss is rounded once a side. Their sum is one of N terms above zero in float32
    (float64), in any order, then divided. Statistics are float64 sums of N terms, rounded once.
    """
    out = reference.vq_quantize(x, codebook, **{**kwargs, "return_stats": True})
    rows = x[..., None].numel() // x.shape[-1]
    unit = unit_roundoff(compute_dtype(x))
    loss = 2 * (rows + 8) * unit * out.loss.nan_to_num(0, 0, 0)
    largest = out.sums.abs().nan_to_num(0, 0, 0).amax() if out.sums.numel() else 0.0
    terms = 2 * rows * 2**-53 * float(x.double().nan_to_num(0, 0, 0).abs().sum())
    allowed: Tensor = loss + 2 * unit * largest + terms
    return allowed


def _dispatched_quantize(
    x: Tensor,
    codebook: Tensor,
    *,
    metric: str = "l2",
    mask: Tensor | None = None,
    estimator: str = "ste",
    **_: Any,
) -> tuple[Any, ...]:
    x, mask = _operands(x, codebook, mask)
    return x, codebook, mask, metric, "exact", estimator, 1.0, 0.25


def quantize_eager(x: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The straight-through quantiser with both losses, as one writes it."""
    indices = eager(x, codebook)
    codes = F.embedding(
        indices, codebook
    )  # whose gradient is faster than that of codebook[indices]
    loss = (codes - x.detach()).square().mean() + 0.25 * (x - codes.detach()).square().mean()
    return x + (codes - x).detach(), indices, loss


def _quantize_gradient_sample(dtype: torch.dtype) -> Sample:
    x, codebook = random_codes(11, 5, 3, seed=6)
    return Sample("gradient", (x.to(dtype), codebook.to(dtype)), {"estimator": "rotation"})


def _everything(output: ops.VQOutput) -> Tensor:
    return torch.cat([output.quantized.flatten(), output.loss.reshape(1)])


VQ_QUANTIZE = OpSpec(
    name="vq_quantize",
    function=ops.vq_quantize,
    definition=reference.vq_quantize,
    eager=quantize_eager,
    eager_bytes=lambda x, codebook: float(len(x) * len(codebook) * x.element_size()),
    samples=quantize_samples,
    invalid=quantize_invalid,
    dispatch_args=_dispatched_quantize,
    fixed_shape=True,
    differentiable=_everything,
    gradient_sample=_quantize_gradient_sample,
    held_constant=True,
    tolerance=quantize_tolerance,
    benchmarks=(),
)


def statistics_samples(dtype: torch.dtype) -> Iterator[Sample]:
    def sample(name: str, x: Tensor, indices: Tensor, codes: int) -> Sample:
        return Sample(name, (x.to(dtype), indices, codes))

    for n, codes, dim in ((0, 3, 4), (1, 1, 1), (65, 7, 5), (300, 129, 33), (700, 3, 8)):
        x, _ = random_codes(n, 1, dim, seed=n)
        indices = torch.randint(codes, (n,), generator=torch.Generator().manual_seed(n))
        yield sample(f"random-{n}x{codes}x{dim}", x, indices, codes)
    x, _ = random_codes(600, 1, 6, seed=3)
    yield sample("one-code", x, torch.full((600,), 2), 5)
    yield sample("left-out", x, torch.arange(600) % 8 - 1, 7)
    yield sample("all-left-out", x, torch.full((600,), -1), 2)
    yield sample("leading-dimensions", x.view(3, 200, 6), torch.arange(600).view(3, 200) // 7, 90)
    yield sample("no-codes", x[:0], torch.zeros(0, dtype=torch.int64), 0)


def statistics_invalid() -> Iterator[Invalid]:
    x, indices = torch.ones(4, 2), torch.zeros(4, dtype=torch.int64)
    yield Invalid("integers", (x.long(), indices, 3), {}, TypeError, "x")
    yield Invalid("list", (x, [0], 3), {}, TypeError, "indices")
    yield Invalid("floats", (x, x[:, 0], 3), {}, TypeError, "indices")
    yield Invalid("length", (x, indices[1:], 3), {}, ValueError, "indices")
    yield Invalid("device", (x, indices.to("meta"), 3), {}, ValueError, "indices")
    yield Invalid("codes", (x, indices, -1), {}, ValueError, "codes")
    yield Invalid("codes-float", (x, indices, 3.0), {}, TypeError, "codes")


def statistics_tolerance(x: Tensor, indices: Tensor, codes: int) -> Tensor:
    """A float64 sum of N terms, rounded once a side."""
    out = compute_dtype(x)
    sizes = reference.vq_statistics(x.double().abs(), indices, codes)[1]
    rows = indices.numel()
    largest = sizes.amax() if sizes.numel() else sizes.new_zeros(())
    return (2 * unit_roundoff(out) + 2 * rows * 2**-53) * largest


def statistics_eager(x: Tensor, indices: Tensor, codes: int) -> tuple[Tensor, Tensor]:
    counts = x.new_zeros(codes).index_add(0, indices, x.new_ones(len(x)))
    return counts, x.new_zeros(codes, x.shape[1]).index_add(0, indices, x)


def _flat_statistics(x: Tensor, indices: Tensor, codes: int) -> tuple[Any, ...]:
    return x.reshape(-1, x.shape[-1]), indices.reshape(-1), codes


VQ_STATISTICS = OpSpec(
    name="vq_statistics",
    function=ops.vq_statistics,
    definition=reference.vq_statistics,
    eager=statistics_eager,
    samples=statistics_samples,
    invalid=statistics_invalid,
    dispatch_args=_flat_statistics,
    fixed_shape=True,
    tolerance=statistics_tolerance,
    benchmarks=(),
)

SPECS = (VQ_NEAREST, VQ_QUANTIZE, VQ_STATISTICS)
