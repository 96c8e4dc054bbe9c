"""Sample inputs of margin_softmax: every margin, every edge."""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastzoo import ops, reference
from fastzoo.reference.margin_softmax import NORM_FLOOR, per_row
from fastzoo.reference.precision import compute_dtype
from fastzoo.testing.losses import bound
from fastzoo.testing.spec import BenchmarkCase, Invalid, OpSpec, Sample
from fastzoo.testing.tolerance import unit_roundoff

MARGINS: dict[str, ops.Margin] = {
    "plain": ops.Plain(),
    "inner-product": ops.Plain(normalized=False),
    "l-softmax": ops.LSoftmax(3, lam=0.5),
    "sphereface": ops.SphereFace(4, lam=1.0),
    "cosface": ops.CosFace(0.35),
    "arcface": ops.ArcFace(0.5),
    "arcface-easy": ops.ArcFace(0.5, easy_margin=True),
    "combined": ops.Combined(1.2, 0.3, 0.1),
    "adaface": ops.AdaFace(0.4, 0.333),
    "magface": ops.MagFace(l_a=1.0, u_a=6.0),
    "curricularface": ops.CurricularFace(0.5),
}


def random_faces(
    n: int, classes: int, dim: int, *, sub_centers: int = 1, seed: int = 0, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """Standard normal embeddings and class weights; labels among the lower half of the classes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, dim, generator=generator)
    w = torch.randn(classes * sub_centers, dim, generator=generator)
    y = torch.randint(max(1, classes // 2), (n,), generator=generator)
    return x.to(device), w.to(device), y.to(device)


def samples(dtype: torch.dtype) -> Iterator[Sample]:
    def sample(name: str, x: Tensor, w: Tensor, y: Tensor, margin: Any, **kwargs: Any) -> Sample:
        kwargs = {"margin": margin, "reduction": "none", **kwargs}
        return Sample(name, (x.to(dtype), w.to(dtype), y), kwargs)

    arcface = MARGINS["arcface"]
    shapes = [(0, 3, 4), (1, 1, 1), (3, 2, 7), (7, 13, 5), (33, 65, 17), (40, 70, 32), (65, 193, 9)]
    for n, classes, dim in shapes:
        faces = random_faces(n, classes, dim, seed=n)
        yield sample(f"random-{n}x{classes}x{dim}", *faces, arcface, scale=16.0)
    for name, margin in MARGINS.items():
        for k in (1, 3):
            x, w, y = random_faces(9, 21, 6, sub_centers=k, seed=k)
            y[4] = -1
            yield sample(f"{name}-{k}", x, w, y, margin, sub_centers=k)
    x, w, y = random_faces(11, 30, 8, seed=5)
    yield sample("three-dimensions", x, w.view(10, 3, 8), y % 10, arcface)
    smooth = {"label_smoothing": 0.1, "class_weight": torch.arange(1.0, 31) / 10}
    yield sample("smooth", x, w, y, arcface, label_smoothing=0.2, scale=8.0)
    for reduction in ("mean", "sum"):
        yield sample("weighted", x, w, y, arcface, **{**smooth, "reduction": reduction})
    yield sample(
        "mean-magface", x, w, y, MARGINS["magface"], reduction="mean", ignore_index=int(y[0])
    )
    yield sample("none-counts", x, w, torch.full_like(y, -1), arcface, reduction="mean")
    yield sample("filtered", x, w, y, arcface, interclass_filter=0.2, return_lse=True)
    curricular = MARGINS["curricularface"]
    state = torch.tensor([0.3])
    yield sample("hard", w[y] + x / 2, w, y, curricular, state=state, interclass_filter=0.7)
    yield sample("insightface", x, w, y, arcface, grad="insightface")
    rows = torch.linspace(1, 20, len(x))
    yield sample("each-row-its-own", x, w, y, ops.ArcFace(rows / 20), scale=rows)
    yield sample("kept", x, w, y, ops.CosFace(0.2), memory_budget=1 << 20, scale=4.0)
    aligned = w[y].clone()
    aligned[::2] *= -3
    for name in ("arcface", "combined", "sphereface", "adaface"):
        yield sample(f"aligned-{name}", aligned, w, y, MARGINS[name], scale=4.0)
    x, w = x.clone(), w.clone()
    x[::3], w[::4] = 0, 0
    for name in ("arcface", "sphereface", "l-softmax", "magface"):
        yield sample(f"zero-rows-{name}", x, w, y, MARGINS[name], scale=4.0)
    # Sums of squares beyond float16's range, and logits of +-100.
    x, w, y = random_faces(11, 30, 64, seed=6)
    yield sample("long-rows", x * 100, w, y, arcface)
    unit = F.normalize(w) * 10
    logits = MARGINS["inner-product"]
    yield sample(
        "logits-of-100", unit[y] * torch.tensor([[1.0], [-1.0]]).repeat(6, 1)[:11], unit, y, logits
    )


def invalid() -> Iterator[Invalid]:
    x, w, y = random_faces(4, 6, 2)
    margin = {"margin": ops.ArcFace()}

    def bad(name: str, error: type[Exception], match: str, *args: Any, **kwargs: Any) -> Invalid:
        return Invalid(name, args, {**margin, **kwargs}, error, match)

    yield bad("list", TypeError, "embeddings", [1.0], w, y)
    yield bad("embeddings-rank", ValueError, "embeddings", x[0], w, y)
    yield bad("weight-rank", ValueError, "weight", x, w[0], y)
    yield bad("width", ValueError, "weight", x, w[:, :1], y)
    yield bad("no-classes", ValueError, "weight", x, w[:0], y)
    yield bad("integers", TypeError, "embeddings", x.long(), w, y)
    yield bad("dtype-mix", TypeError, "weight", x, w.double(), y)
    yield bad("device-mix", ValueError, "weight", x, w.to("meta"), y)
    yield bad("labels-length", ValueError, "labels", x, w, y[:2])
    yield bad("labels-dtype", TypeError, "labels", x, w, y.float())
    yield bad("sub-centers", ValueError, "sub_centers", x, w, y, sub_centers=4)
    yield bad("margin", TypeError, "margin", x, w, y, margin=0.5)
    yield bad("scale", ValueError, "scale", x, w, y, scale=torch.ones(3))
    yield bad("reduction", ValueError, "reduction", x, w, y, reduction="max")
    yield bad("label-smoothing", ValueError, "label_smoothing", x, w, y, label_smoothing=2.0)
    yield bad("class-weight", ValueError, "class_weight", x, w, y, class_weight=torch.ones(5))
    yield bad("grad", ValueError, "grad", x, w, y, grad="none")
    yield bad("state", ValueError, "state", x, w, y, state=torch.zeros(2))
    yield bad("backend", ValueError, "backend", x, w, y, backend="gpu")


def _double(value: Any) -> Any:
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.double() if floating else value


def definition(
    embeddings: Tensor, weight: Tensor, labels: Tensor, **kwargs: Any
) -> Tensor | tuple[Tensor, ...]:
    """The reference in float64, its results in the operator's dtype."""
    out = compute_dtype(embeddings)
    kwargs = {name: _double(value) for name, value in kwargs.items()}
    result = reference.margin_softmax_loss(embeddings.double(), weight.double(), labels, **kwargs)
    if isinstance(result, Tensor):
        return result.to(out)
    return tuple(part.to(out) for part in result)


def _unit(embeddings: Tensor) -> float:
    return unit_roundoff(compute_dtype(embeddings))


def _lengths(margin: ops.Margin, x: Tensor, w: Tensor) -> Tensor:
    """What a row's scores are multiples of, less the scale ``[N]``."""
    longest = x.norm(dim=1)
    size = torch.ones_like(longest)
    if not margin.normalize_weight and w.numel():
        size = size * w.norm(dim=1).max()
    return size * longest if margin.scales_by_norm or not margin.normalize_embeddings else size


def tolerance(
    embeddings: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    margin: ops.Margin,
    scale: float | Tensor | None = None,
    product_unit: float = 0.0,
    memory_budget: int | None = None,
    **_: Any,
) -> Tensor:
    """Absolute error allowed of each row's loss; of a reduced one, the worst row's times N.

    With unit round-off u a score is a product of D terms and three roundings of norms, off by
    ``(D + 8) u`` of its size; ``product_unit`` adds the rounding of the product's operands. A
    log-sum-exp is off by as much, and by ``(C + 16) u`` for its sum. The target's score moves
    through the margin, whose slope is at most ``m^2`` or ``m1 / sin(theta)``; at the sine's root
    a cosine's error e becomes ``sqrt(2 e)``.
    """
    x, w = embeddings.double(), weight.double().flatten(0, -2)
    n, dim = x.shape
    u = _unit(embeddings)
    size = _lengths(margin, x, w)
    factor = per_row(margin.default_scale if scale is None else _double(scale), size) * size
    error = (dim + 8) * u
    own = w.view(*weight.shape)[labels.clamp(min=0) % max(len(weight), 1)]
    unit_x = x / x.norm(dim=1, keepdim=True).clamp(min=NORM_FLOOR)
    if weight.dim() == 2:
        own = own[:, None]
    unit_w = own / own.norm(dim=-1, keepdim=True).clamp(min=NORM_FLOOR)
    cosine = (unit_x[:, None] * unit_w).sum(2).abs().amax(1) if n else x.new_zeros(0)
    sine = ((1 - cosine) * (1 + cosine)).clamp(min=0).sqrt()
    steepest = float(getattr(margin, "m1", 1.0)) + 1
    if isinstance(margin, ops.LSoftmax):
        moved = torch.full_like(sine, margin.m**2 * error)
    else:
        moved = steepest * torch.minimum(
            error / sine.clamp(min=1e-12), sine.new_tensor(2 * error).sqrt()
        )
    scores = factor * (2 * (error + product_unit) + moved)
    row = scores + (len(w) + 16) * u + 4 * u * factor * 3
    if isinstance(margin, ops.MagFace):
        row = row + 8 * u * margin.lambda_g
    return 4 * n * row.max() if n else x.new_zeros(())


def autocast_tolerance(embeddings: Tensor, weight: Tensor, labels: Tensor, **kwargs: Any) -> Tensor:
    """Two operands rounded to bfloat16 change a product by up to ``2^-8`` of its terms' size."""
    return tolerance(embeddings, weight, labels, product_unit=2.0**-8, **kwargs)


def gradient_rtol(
    dtype: torch.dtype,
    embeddings: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    margin: ops.Margin,
    scale: float | Tensor | None = None,
    memory_budget: int | None = None,
    **_: Any,
) -> float:
    """Relative error allowed of gradients, less their own rounding.

    A probability is off by what its score is off by, absolutely (see :func:`tolerance`), and by
    what the copy kept for the backward rounds it; products in bfloat16 round it too.
    """
    if not len(embeddings):
        return 0.0
    x, w = embeddings.double(), weight.double().flatten(0, -2)
    size = _lengths(margin, x, w)
    factor = per_row(margin.default_scale if scale is None else _double(scale), size) * size
    scores = 2 * float(factor.max()) * (x.shape[1] + 8) + len(w) + 16
    coarse = dtype == torch.bfloat16 or bool(memory_budget)
    return 2 * scores * unit_roundoff(compute_dtype(embeddings)) + coarse * 2.0**-8


def cancellation(
    embeddings: Tensor, weight: Tensor, labels: Tensor, *, margin: ops.Margin, **kwargs: Any
) -> float:
    """What is left of a gradient where target and embedding point the same way, nearly nothing."""
    x, w = embeddings.double(), weight.double().flatten(0, -2)
    if not len(x):
        return 0.0
    own = w[labels.clamp(min=0) % len(w)]
    cosine = F.cosine_similarity(x, own)
    norms = torch.cat([x, w]).norm(dim=1)
    if x.shape[1] > 1 and not (cosine.abs() > 0.99).any() and (norms > 0).all():
        return 0.0
    scale = kwargs.get("scale")
    factor = per_row(margin.default_scale if scale is None else _double(scale), x[:, 0]).max()
    size = _lengths(margin, x, w).max()
    steepest = 2.0**12 if isinstance(margin, ops.ArcFace | ops.Combined | ops.AdaFace) else 64.0
    return float(factor * size * steepest / norms[norms > 0].min()) if norms.any() else 0.0


def eager(embeddings: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """ArcFace as one writes it: all logits in memory."""
    cosine = F.linear(F.normalize(embeddings), F.normalize(weight))
    own = cosine.gather(1, labels[:, None])
    sine = (1 - own.square()).clamp(1e-7, 1).sqrt()
    moved = own * math.cos(0.5) - sine * math.sin(0.5)
    moved = torch.where(own > -math.cos(0.5), moved, own - 0.5 * math.sin(0.5))
    return F.cross_entropy(64 * cosine.scatter(1, labels[:, None], moved), labels)


def gradient_sample(dtype: torch.dtype) -> Sample:
    x, w, y = random_faces(7, 5, 4, seed=8)
    kwargs = {"labels": y, "margin": ops.ArcFace(0.5), "scale": 4.0, "reduction": "none"}
    return Sample("gradient", (x.to(dtype), w.to(dtype)), kwargs)


def dispatch_args(
    embeddings: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    margin: ops.Margin,
    scale: float = 64.0,
    **_: Any,
) -> tuple[Any, ...]:
    """Of a sample without sub-centres, in the order of ``margin_softmax_negatives``."""
    dtype = compute_dtype(embeddings)
    rows = embeddings.new_full((len(embeddings),), scale, dtype=dtype)
    nothing = embeddings.new_empty(0, dtype=dtype)
    normalized = margin.normalize_embeddings, margin.normalize_weight
    tensors = embeddings, weight, labels, rows, nothing, nothing.clone(), nothing.clone()
    return *tensors, 0.0, 1, *normalized, False, False, False


def _eager_bytes(embeddings: Tensor, weight: Tensor, *_: Any) -> float:
    """Four matrices of logits; normalised weights, their gradient and the weights'."""
    return 16.0 * len(embeddings) * len(weight) + 12.0 * weight.numel()


def _case(
    n: int,
    classes: int,
    dim: int,
    autocast: torch.dtype | None = None,
    devices: tuple[str, ...] = ("cpu", "cuda"),
) -> BenchmarkCase:
    def tolerance(x: Tensor, w: Tensor, y: Tensor, *, margin: ops.Margin) -> float:
        coarse = autocast is not None
        return bound(scale=margin.default_scale, dim=x.shape[1], terms=len(w), bfloat16=coarse)

    return BenchmarkCase(
        name=f"{n} x {classes} x {dim}" + (", bf16 autocast" if autocast else ""),
        shape={"n": n, "classes": classes, "dim": dim},
        make=lambda device, n, classes, dim: random_faces(n, classes, dim, device=device),
        kwargs={"margin": ops.ArcFace(0.5)},
        flops=lambda x, w, y, **_: 8.0 * len(x) * w.numel(),
        bytes=lambda x, w, y, **_: (2 * x.numel() + 3 * w.numel()) * x.element_size(),
        gradients=(0, 1),
        tolerance=tolerance,
        autocast=autocast,
        devices=devices,
    )


MARGIN_SOFTMAX_LOSS = OpSpec(
    name="margin_softmax_loss",
    operator="margin_softmax_negatives",
    function=ops.margin_softmax_loss,
    definition=definition,
    eager=eager,
    eager_bytes=_eager_bytes,
    samples=samples,
    invalid=invalid,
    dispatch_args=dispatch_args,
    fixed_shape=True,
    differentiable=lambda output: output[0] if isinstance(output, tuple) else output,
    gradient_sample=gradient_sample,
    tolerance=tolerance,
    autocast_tolerance=autocast_tolerance,
    gradient_rtol=gradient_rtol,
    cancellation=cancellation,
    benchmarks=(
        _case(64, 1000, 128),
        _case(128, 85742, 512),
        _case(512, 85742, 512),
        _case(128, 85742, 512, torch.bfloat16),
        _case(512, 85742, 512, torch.bfloat16),
        _case(256, 1000000, 512),
        # What one GPU holds, and one of 8 that share two million classes.
        _case(4096, 1000000, 512, torch.bfloat16, ("cuda",)),
        _case(1024, 257500, 512, torch.bfloat16, ("cuda",)),
    ),
)
