"""Sample inputs and benchmark cases of the ``vq`` family."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastzoo import ops, reference
from fastzoo.testing.spec import BenchmarkCase, Invalid, OpSpec, Sample
from fastzoo.testing.tolerance import unit_roundoff

METRICS = ("l2", "cosine", "dot")


def random_codes(
    n: int, k: int, dim: int, *, seed: int = 0, device: str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Standard normal vectors ``[n, dim]`` and codes ``[k, dim]``."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, dim, generator=generator)
    return x.to(device), torch.randn(k, dim, generator=generator).to(device)


def samples(dtype: torch.dtype) -> Iterator[Sample]:
    def sample(name: str, x: Tensor, codebook: Tensor, metric: str = "l2") -> Sample:
        kwargs = {"metric": metric, "return_distance": True}
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


def tolerance(x: Tensor, codebook: Tensor, metric: str = "l2", **_: Any) -> Tensor:
    """Absolute error allowed of ``d``.

    ``d`` is a float64 sum of D terms, in any order, rounded once to its dtype. The sum's error is
    at most (D + 4) 2^-53 times the sum of the terms' magnitudes, for both sides; the rounding's is
    one unit round-off of ``d`` a side. ``codebook`` is seen through its largest code.
    """
    dim = x.shape[-1]
    out = torch.float64 if x.dtype == torch.float64 else torch.float32
    rows, codes = x.double(), codebook.double()
    finite = codes[codes.isfinite().all(1)]
    largest = finite.norm(dim=1).max() if len(finite) else codes.new_zeros(())
    norm = rows.norm(dim=-1).nan_to_num(0, 0, 0)
    if metric == "l2":
        magnitude = (norm + largest) ** 2
    elif metric == "dot":
        magnitude = norm * largest
    else:
        magnitude = torch.ones_like(norm)
    d = reference.vq_nearest(rows, codes, metric=metric, return_distance=True)[1]
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
    norms = torch.cat([x.reshape(-1, x.shape[-1]), codebook]).double().norm(dim=1)
    return float(1 / norms[norms > 0].min()) if norms.any() else 0.0


def eager(x: Tensor, codebook: Tensor) -> Tensor:
    """The expanded distance with one matrix product, as quantisers write it."""
    scores = torch.addmm(codebook.square().sum(1), x, codebook.t(), beta=-0.5)
    return scores.argmax(1)


def gradient_sample(dtype: torch.dtype) -> Sample:
    x, codebook = random_codes(11, 5, 3, seed=6)
    return Sample("gradient", (x.to(dtype), codebook.to(dtype)), {"return_distance": True})


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
    dispatch_args=lambda x, codebook, metric="l2", **_: (
        x.reshape(-1, x.shape[-1]),
        codebook,
        metric,
    ),
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
