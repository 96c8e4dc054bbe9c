"""Sample inputs of the contrastive losses."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastzoo import ops, reference
from fastzoo.reference.precision import compute_dtype
from fastzoo.testing.losses import bound
from fastzoo.testing.spec import BenchmarkCase, Invalid, OpSpec, Sample
from fastzoo.testing.tolerance import in_double, unit_roundoff


def random_pairs(n: int, dim: int, *, seed: int = 0, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Two sets of unit vectors ``[n, dim]``, each vector's partner near it."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(n, dim, generator=generator)
    text = image + torch.randn(n, dim, generator=generator)
    return F.normalize(image).to(device), F.normalize(text).to(device)


def _pair_samples(dtype: torch.dtype, scale: str, bias: str | None) -> Iterator[Sample]:
    def sample(name: str, image: Tensor, text: Tensor, factor: Any, shift: Any = None) -> Sample:
        kwargs = {scale: factor} if shift is None or bias is None else {scale: factor, bias: shift}
        return Sample(name, (image.to(dtype), text.to(dtype)), kwargs)

    for n, dim in [(1, 1), (2, 3), (7, 5), (33, 17), (40, 32), (65, 9), (193, 4)]:
        yield sample(f"random-{n}x{dim}", *random_pairs(n, dim, seed=n), 14.0)
    image, text = random_pairs(21, 6, seed=3)
    yield sample("factors-are-tensors", image, text, torch.tensor(3.0), torch.tensor(-2.0))
    yield sample("bias", image, text, 10.0, -10.0)
    yield sample("logits-of-100", image, torch.where(text > 0, image, -image), 100.0)
    yield sample("zero-rows", image * (torch.arange(21) % 3 > 0)[:, None], text, 5.0)
    yield sample("long-rows", image * 30, text * 30, 0.1)


def invalid_pairs(scale: str) -> Iterator[Invalid]:
    image, text = random_pairs(4, 3)
    one = {scale: 1.0}
    yield Invalid("list", ([1.0], text), one, TypeError, "")
    yield Invalid("rank", (image[0], text), one, ValueError, "")
    yield Invalid("width", (image, text[:, :2]), one, ValueError, "")
    yield Invalid("integers", (image.long(), text), one, TypeError, "")
    yield Invalid("dtype-mix", (image, text.double()), one, TypeError, "")
    yield Invalid("device-mix", (image, text.to("meta")), one, ValueError, "")
    yield Invalid(scale, (image, text), {scale: torch.ones(2)}, ValueError, scale)
    yield Invalid("backend", (image, text), {**one, "backend": "gpu"}, ValueError, "backend")


def _invalid_clip() -> Iterator[Invalid]:
    yield from invalid_pairs("logit_scale")
    image, text = random_pairs(4, 3)
    yield Invalid("pairs", (image, text[:3]), {"logit_scale": 1.0}, ValueError, "text")


def _largest_score(image: Tensor, text: Tensor, kwargs: dict[str, Any]) -> float:
    if not len(image):
        return 0.0
    bias = abs(float(kwargs.get("logit_bias") or 0.0))
    longest = [float(t.double().norm(dim=1).max()) for t in (image, text)]
    return _factor(kwargs) * longest[0] * longest[1] + bias


def _factor(kwargs: dict[str, Any]) -> float:
    return abs(float(kwargs.get("logit_scale", 1.0)) / float(kwargs.get("temperature", 1.0)))


def tolerance(
    image: Tensor, text: Tensor, *, product_unit: float = 0.0, rows: int = 1, **kwargs: Any
) -> Tensor:
    """Absolute error allowed of a loss: that of a score, ``(D + 8) u`` of its size or
    ``product_unit``, twice, and ``(M + 16) u`` for the sum of a log-sum-exp; SigLIP adds up as
    many as ``rows`` errors."""
    u = unit_roundoff(compute_dtype(image))
    size = _largest_score(image, text, kwargs)
    error = 3 * size * ((image.shape[-1] + 8) * u + product_unit) + (len(text) + 16) * u * (
        1 + size
    )
    return torch.tensor(rows * error, dtype=torch.float64)


def autocast_tolerance(image: Tensor, text: Tensor, **kwargs: Any) -> Tensor:
    """Two operands rounded to bfloat16 change a product by up to ``2^-8`` of its terms' size."""
    return tolerance(image, text, product_unit=2.0**-8, **kwargs)


def gradient_rtol(dtype: torch.dtype, image: Tensor, text: Tensor, **kwargs: Any) -> float:
    """A probability is off by what its score is off by; products in bfloat16 round it."""
    u = unit_roundoff(compute_dtype(image))
    size = _largest_score(image, text, kwargs)
    coarse = 2.0**-8 if dtype == torch.bfloat16 else 0.0
    return 4 * size * (image.shape[-1] + 8) * u + 2 * (len(text) + 16) * u + coarse


def cancellation(image: Tensor, text: Tensor, **kwargs: Any) -> float:
    """Where each positive has nearly all of the probability, what is left is the difference of
    two terms of this size."""
    return _factor(kwargs) * max(float(t.double().abs().max()) for t in (image, text) if t.numel())


def _clip_dispatch(image: Tensor, text: Tensor, *_: Any, **__: Any) -> tuple[Any, ...]:
    dtype = compute_dtype(image)
    scale, bias = image.new_full((1,), 10.0, dtype=dtype), image.new_zeros(1, dtype=dtype)
    own = torch.arange(len(image), device=image.device)
    return image, text, own, scale, bias, False, True, False, False


def _pair_gradient(scale: str, factor: float) -> Any:
    def gradient_sample(dtype: torch.dtype) -> Sample:
        image, text = random_pairs(6, 4, seed=8)
        return Sample("gradient", (image.to(dtype), text.to(dtype)), {scale: factor})

    return gradient_sample


def eager_clip(image: Tensor, text: Tensor, logit_scale: float | Tensor) -> Tensor:
    """open_clip's formula: both directions' logits in memory."""
    by_image = logit_scale * image @ text.t()
    by_text = logit_scale * text @ image.t()
    own = torch.arange(len(image), device=image.device)
    return (F.cross_entropy(by_image, own) + F.cross_entropy(by_text, own)) / 2


def _trained_pairs(
    n: int, dim: int, device: str, logit_scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs whose partners are found about every other time, and the scale as a tensor."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(n, dim, generator=generator)
    text = image + 4 * torch.randn(n, dim, generator=generator)
    scale = torch.tensor(logit_scale, device=device)
    return F.normalize(image).to(device), F.normalize(text).to(device), scale


def _clip_case(
    n: int,
    dim: int,
    autocast: torch.dtype | None = None,
    devices: tuple[str, ...] = ("cpu", "cuda"),
) -> BenchmarkCase:
    def tolerance(image: Tensor, text: Tensor, logit_scale: Tensor) -> float:
        coarse, scale = autocast is not None, float(logit_scale.detach())
        return bound(scale=scale, dim=image.shape[1], terms=len(text), bfloat16=coarse)

    return BenchmarkCase(
        name=f"{n} x {n} x {dim}" + (", bf16 autocast" if autocast else ""),
        shape={"n": n, "dim": dim},
        make=lambda device, n, dim: _trained_pairs(n, dim, device, 50.0),
        kwargs={},
        flops=lambda image, text, *_: 8.0 * len(image) * text.numel(),
        bytes=lambda image, *_: 4.0 * image.numel() * image.element_size(),
        gradients=(0, 1, 2),
        tolerance=tolerance,
        autocast=autocast,
        devices=devices,
    )


def _spec(name: str, function: Any, definition: Any, **fields: Any) -> OpSpec:
    return OpSpec(
        name=name,
        operator="contrastive",
        function=function,
        definition=in_double(definition),
        dispatch_args=_clip_dispatch,
        fixed_shape=True,
        differentiable=lambda output: output,
        gradient_rtol=gradient_rtol,
        cancellation=cancellation,
        **fields,
    )


CLIP_LOSS = _spec(
    "clip_loss",
    ops.clip_loss,
    reference.clip_loss,
    eager=eager_clip,
    samples=lambda dtype: _pair_samples(dtype, "logit_scale", "logit_bias"),
    invalid=_invalid_clip,
    gradient_sample=_pair_gradient("logit_scale", 5.0),
    tolerance=tolerance,
    autocast_tolerance=autocast_tolerance,
    # Each direction's logits, their logarithm and two gradients.
    eager_bytes=lambda image, text, *_: 24.0 * len(image) * len(text),
    benchmarks=(
        _clip_case(512, 512),
        _clip_case(8192, 512),
        _clip_case(8192, 512, torch.bfloat16),
        _clip_case(32768, 768, torch.bfloat16, ("cuda",)),
    ),
)

SIGMOID_CONTRASTIVE_LOSS = _spec(
    "sigmoid_contrastive_loss",
    ops.sigmoid_contrastive_loss,
    reference.sigmoid_contrastive_loss,
    eager=reference.sigmoid_contrastive_loss,
    samples=lambda dtype: _pair_samples(dtype, "logit_scale", "logit_bias"),
    invalid=_invalid_clip,
    gradient_sample=_pair_gradient("logit_scale", 5.0),
    tolerance=lambda image, text, **kwargs: tolerance(image, text, rows=len(text), **kwargs),
    autocast_tolerance=lambda image, text, **kwargs: autocast_tolerance(
        image, text, rows=len(text), **kwargs
    ),
    benchmarks=(),
)

INFO_NCE = _spec(
    "info_nce",
    ops.info_nce,
    reference.info_nce,
    eager=reference.info_nce,
    samples=lambda dtype: _nce_samples(dtype),
    invalid=lambda: invalid_pairs("temperature"),
    gradient_sample=_pair_gradient("temperature", 0.2),
    tolerance=tolerance,
    autocast_tolerance=autocast_tolerance,
    benchmarks=(),
)


def _nce_samples(dtype: torch.dtype) -> Iterator[Sample]:
    yield from _pair_samples(dtype, "temperature", None)
    q, k = random_pairs(21, 6, seed=3)
    generator = torch.Generator().manual_seed(0)
    more = torch.randn(30, 6, generator=generator)
    positives = torch.randperm(30, generator=generator)[:21]
    q, k, more = q.to(dtype), k.to(dtype), more.to(dtype)
    given = {"temperature": 0.3, "reduction": "none"}
    yield Sample("positives", (q, more), {**given, "positives": positives})
    yield Sample("symmetric", (q, more), {**given, "positives": positives, "symmetric": True})
    yield Sample("queue", (q, k), {**given, "queue": more})
