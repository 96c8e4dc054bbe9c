"""Sample inputs and benchmark cases of the ``pointconv`` family."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastzoo import ops, reference
from fastzoo.reference.clouds import rows_at
from fastzoo.reference.pointconv import WeightNet
from fastzoo.reference.precision import compute_dtype
from fastzoo.testing.neighbours import random_points
from fastzoo.testing.spec import BenchmarkCase, Invalid, OpSpec, Sample
from fastzoo.testing.tolerance import unit_roundoff

WIDTHS = (8, 8, 16)  # of the published weight net


def layers_of(net: Tensor, widths: Sequence[int], dim: int) -> WeightNet:
    """A weight net of one tensor, so that samples and gradients have one argument for it."""
    sizes = [n for i, o in zip((dim, *widths), widths, strict=False) for n in (i * o, o)]
    parts = iter(net[: sum(sizes)].split(sizes))
    ins = (dim, *widths)
    return [(next(parts).view(o, i), next(parts)) for i, o in zip(ins, widths, strict=False)]


def random_net(widths: Sequence[int], dim: int, *, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for width in widths:
        parts += [torch.randn(width * dim, generator=generator) / dim**0.5]
        parts += [torch.randn(width, generator=generator) / 4]
        dim = width
    return torch.cat([torch.zeros(0), *parts])


def random_neighbours(clouds: int, n: int, s: int, k: int, *, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, max(1, n), (clouds, s, k), generator=generator)


def random_edges(
    clouds: int,
    n: int,
    s: int,
    k: int,
    channels: int,
    out: int,
    widths: Sequence[int] = WIDTHS,
    *,
    dim: int = 3,
    seed: int = 0,
) -> tuple[Tensor, ...]:
    """xyz, features, centres, neighbours, scale, net, linear and bias."""
    generator = torch.Generator().manual_seed(seed)
    xyz = random_points(clouds, n, dim, seed=seed)
    mid = widths[-1] if widths else dim
    features = torch.randn(clouds, n, channels, generator=generator)
    centres = torch.rand(clouds, s, dim, generator=generator)
    scale = 0.2 + torch.rand(clouds, s, k, generator=generator)
    linear = torch.randn(out, channels * mid, generator=generator) / (channels * mid) ** 0.5
    bias = torch.randn(out, generator=generator)
    neighbours = random_neighbours(clouds, n, s, k, seed=seed)
    net = random_net(widths, dim, seed=seed)
    return xyz, features, centres, neighbours, scale, net, linear, bias


def _flat(
    function: Any,
    xyz: Tensor,
    features: Tensor,
    centres: Tensor,
    neighbours: Tensor,
    scale: Tensor | None,
    net: Tensor,
    linear: Tensor | None,
    bias: Tensor | None,
    *,
    widths: Sequence[int] = WIDTHS,
    **kwargs: Any,
) -> Tensor:
    layers = layers_of(net, widths, xyz.shape[-1])
    last = None if linear is None else (linear, bias)
    found: Tensor = function(xyz, features, centres, neighbours, layers, scale, last, **kwargs)
    return found.to(compute_dtype(found))


def pointconv_function(*args: Any, **kwargs: Any) -> Tensor:
    """:func:`fastzoo.ops.pointconv` with the net as one tensor; its result widened."""
    return _flat(ops.pointconv, *args, **kwargs)


def pointconv_definition(*args: Any, **kwargs: Any) -> Tensor:
    """In float64, the result in the operator's dtype."""
    wide = [_double(a) for a in args]
    return _flat(reference.pointconv, *wide, **kwargs).to(compute_dtype(args[1]))


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def pointconv_samples(dtype: torch.dtype) -> Iterator[Sample]:
    def sample(name: str, *args: Any, **kwargs: Any) -> Sample:
        cast = [a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
        return Sample(name, tuple(cast), kwargs)

    for n, s, k, channels, out, widths in (
        (1, 1, 1, 1, 1, (1,)),
        (12, 5, 7, 6, 9, (8, 4)),
        (20, 17, 3, 33, 5, (3, 5)),
    ):
        edges = random_edges(4, n, s, k, channels, out, widths, seed=n)
        yield sample(f"random-{n}-{channels}-{out}", *edges, widths=widths)
    xyz, features, centres, neighbours, scale, net, linear, bias = random_edges(
        2, 19, 9, 8, 10, 7, (4, 6), seed=1
    )
    rest = (net, linear, bias)
    short = neighbours.clone()
    short[:, ::2, 3:] = -1
    short[:, 4] = -1
    named = {"widths": (4, 6)}
    yield sample("missing", xyz, features, centres, short, scale, *rest, **named)
    yield sample("no-scale", xyz, features, centres, neighbours, None, *rest, **named)
    yield sample("no-bias", xyz, features, centres, short, scale, net, linear, None, **named)
    yield sample("no-linear", xyz, features, centres, short, scale, net, None, None, **named)
    of_points = scale.reshape(2, -1)[:, :19]
    yield sample("point-scale", xyz, features, centres, short, of_points, *rest, **named)
    grouped = rows_at(features, neighbours) * 1.5
    yield sample("grouped", xyz, grouped, centres, short, scale, *rest, **named)
    yield sample("offset", xyz + 8, features, centres + 8, short, scale, *rest, **named)
    none = neighbours[:, :, :0]
    yield sample("no-neighbours", xyz, features, centres, none, scale[:, :, :0], *rest, **named)
    yield sample(
        "no-centres", xyz, features, centres[:, :0], neighbours[:, :0], None, *rest, **named
    )
    empty = (t[:0] for t in (xyz, features, centres, neighbours, scale))
    yield sample("no-clouds", *empty, *rest, **named)
    plane = random_edges(2, 15, 6, 5, 4, 3, (16,), dim=2, seed=2)
    yield sample("plane", *plane, widths=(16,))
    bare = random_edges(2, 15, 6, 5, 4, 3, (), dim=4, seed=3)
    yield sample("coordinates", *bare, widths=())
    many = random_edges(1, 60, 70, 40, 20, 18, (5, 7, 16), seed=4)
    yield sample("many", *many, widths=(5, 7, 16))


def pointconv_invalid() -> Iterator[Invalid]:
    args = random_edges(2, 5, 3, 4, 2, 6, (4,))
    xyz, features, centres, neighbours, scale, net, linear, bias = args
    rest = (scale, net, linear, bias)
    named = {"widths": (4,)}

    def call(error: type[Exception], match: str, *call_args: Any, **kwargs: Any) -> Invalid:
        return Invalid(match, call_args, {**named, **kwargs}, error, match)

    yield call(ValueError, "xyz", xyz[0], features, centres, neighbours, *rest)
    yield call(TypeError, "xyz", xyz.long(), features, centres, neighbours, *rest)
    yield call(ValueError, "features", xyz, features[:, :2], centres, neighbours, *rest)
    yield call(TypeError, "features", xyz, features.long(), centres, neighbours, *rest)
    yield call(ValueError, "centres", xyz, features, centres[:1], neighbours, *rest)
    yield call(TypeError, "neighbours", xyz, features, centres, neighbours.int(), *rest)
    yield call(ValueError, "neighbours", xyz, features, centres, neighbours[:, :2], *rest)
    short = (scale[:, :, :1], *rest[1:])
    yield call(ValueError, "density_scale", xyz, features, centres, neighbours, *short)
    narrow = (scale, net, linear[:, 1:], bias)
    yield call(ValueError, "linear", xyz, features, centres, neighbours, *narrow)
    offset = (scale, net, linear, bias[1:])
    yield call(ValueError, "linear", xyz, features, centres, neighbours, *offset)
    full = {"form": "full"}
    yield call(ValueError, "linear", xyz, features, centres, neighbours, *rest, **full)
    yield call(ValueError, "form", xyz, features, centres, neighbours, *rest, form="half")
    broad = (scale, torch.zeros(65 * 4), linear, bias)
    yield call(ValueError, "weight_net", xyz, features, centres, neighbours, *broad, widths=(65,))
    yield call(ValueError, "backend", xyz, features, centres, neighbours, *rest, backend="gpu")


def _magnitudes(
    xyz: Tensor,
    features: Tensor,
    centres: Tensor,
    neighbours: Tensor,
    scale: Tensor | None,
    net: Tensor,
    linear: Tensor | None,
    bias: Tensor | None,
    *,
    widths: Sequence[int] = WIDTHS,
    **_: Any,
) -> Tensor:
    """The answer with every product and every term taken by its magnitude, in float64."""
    relative = (rows_at(xyz.double(), neighbours) - centres.double()[:, :, None]).abs()
    size = torch.where(neighbours[..., None] < 0, 0, relative)
    for weight, offset in layers_of(net.double(), widths, xyz.shape[-1]):
        size = size @ weight.abs().t() + offset.abs()
    if scale is not None:
        if scale.dim() == 2:
            scale = rows_at(scale[..., None], neighbours)[..., 0]
        size = size * scale.double().abs()[..., None]
    listed = features if features.dim() == 4 else rows_at(features, neighbours)
    listed = torch.where(neighbours[..., None] < 0, 0, listed.double().abs())
    out = (listed.transpose(2, 3) @ size).flatten(2)
    if linear is not None:
        out = out @ linear.double().abs().t()
        if bias is not None:
            out = out + bias.double().abs()
    return out


def _roundings(xyz: Tensor, features: Tensor, neighbours: Tensor, widths: Sequence[int]) -> int:
    mid = widths[-1] if widths else xyz.shape[-1]
    return xyz.shape[-1] + sum(widths) + neighbours.shape[-1] + features.shape[-1] * mid + 16


def pointconv_tolerance(*args: Any, **kwargs: Any) -> Tensor:
    """Absolute error allowed: as many roundings as a chain of sums has terms, of the magnitudes
    that are added up; in 16 bits the net's output and the sums over neighbours are rounded too,
    and so is the result."""
    xyz, features, _, neighbours = args[:4]
    dtype = features.dtype
    count = _roundings(xyz, features, neighbours, kwargs.get("widths", WIDTHS))
    unit = count * unit_roundoff(compute_dtype(features))
    if dtype in (torch.float16, torch.bfloat16):
        unit += 4 * unit_roundoff(dtype)
    return unit * _magnitudes(*args, **kwargs) + torch.finfo(dtype).tiny


def _pointconv_autocast_tolerance(*args: Any, **kwargs: Any) -> Tensor:
    """Features and the linear's weights are rounded as well."""
    size = _magnitudes(*args, **kwargs)
    return pointconv_tolerance(*args, **kwargs) + 7 * unit_roundoff(torch.bfloat16) * size


def _gradient_rtol(dtype: torch.dtype, *args: Any, **kwargs: Any) -> float:
    """Beyond the sums over batches: those over centres, neighbours and channels, and in 16 bits
    the roundings of the two products' operands."""
    xyz, features, _, neighbours = args[:4]
    count = _roundings(xyz, features, neighbours, kwargs.get("widths", WIDTHS))
    rtol: float = (count + neighbours.numel()) * unit_roundoff(compute_dtype(features))
    return rtol + (8 * unit_roundoff(dtype) if dtype in (torch.float16, torch.bfloat16) else 0)


def _pointconv_gradient(dtype: torch.dtype) -> Sample:
    args = random_edges(1, 3, 2, 3, 2, 2, (3, 2), seed=5)
    args[3][0, 1, 2:] = -1
    cast = (a.to(dtype) if a.is_floating_point() else a for a in args)
    return Sample("gradient", tuple(cast), {"widths": (3, 2)})


def _dispatched_pointconv(
    xyz: Tensor,
    features: Tensor,
    centres: Tensor,
    neighbours: Tensor,
    scale: Tensor,
    net: Tensor,
    linear: Tensor,
    bias: Tensor,
    *,
    widths: Sequence[int] = WIDTHS,
    **_: Any,
) -> tuple[Any, ...]:
    return xyz, features, centres, neighbours, scale, net, list(widths), linear, bias


def pointconv_eager(
    xyz: Tensor,
    features: Tensor,
    centres: Tensor,
    neighbours: Tensor,
    scale: Tensor,
    net: Tensor,
    linear: Tensor,
    bias: Tensor,
) -> Tensor:
    """As the published code has it: gather, weight net, product, linear."""
    cloud = torch.arange(len(xyz), device=xyz.device)[:, None, None]
    hidden = xyz[cloud, neighbours] - centres[:, :, None]
    for weight, offset in layers_of(net, WIDTHS, xyz.shape[-1]):
        hidden = torch.relu(hidden @ weight.t() + offset)
    scaled = features[cloud, neighbours] * scale[..., None].to(features.dtype)
    sums = scaled.transpose(2, 3) @ hidden.to(features.dtype)
    return sums.flatten(2) @ linear.t() + bias


def _pointconv_flops(
    xyz: Tensor, features: Tensor, centres: Tensor, neighbours: Tensor, *rest: Tensor
) -> float:
    aggregated = neighbours.numel() * features.shape[-1] * WIDTHS[-1]
    rows = neighbours[..., 0].numel()
    return 2.0 * aggregated + 2.0 * rows * len(rest[2]) * rest[2].shape[1]


def _pointconv_case(
    clouds: int,
    *,
    backward: bool = False,
    dtype: torch.dtype = torch.float32,
    devices: tuple[str, ...] = ("cpu", "cuda"),
) -> BenchmarkCase:
    def make(device: str, clouds: int, n: int, s: int, k: int, channels: int) -> tuple[Any, ...]:
        args = list(random_edges(clouds, n, s, k, channels, channels))
        for place in (1, 6, 7):
            args[place] = args[place].to(dtype)
        return tuple(a.to(device) for a in args)

    passes = 3.0 if backward else 1.0
    name = f"{clouds} x 1024 -> 512, K 32, 128 x 16 -> 128"
    name += ", bf16" if dtype == torch.bfloat16 else ""
    return BenchmarkCase(
        name=name + (", forward + backward" if backward else ""),
        shape={"clouds": clouds, "n": 1024, "s": 512, "k": 32, "channels": 128},
        make=make,
        kwargs={},
        flops=lambda *args: passes * _pointconv_flops(*args),
        bytes=lambda *args: passes * sum(float(a.numel() * a.element_size()) for a in args),
        gradients=(1, 4, 5, 6, 7) if backward else (),
        seeds=lambda xyz, features, centres, *rest: (
            torch.ones(*centres.shape[:2], rest[3].shape[0], device=xyz.device),
        ),
        tolerance=lambda *args, **_: 2.0**-7 if dtype == torch.bfloat16 else 1e-5,
        devices=devices,
    )


POINTCONV = OpSpec(
    name="pointconv",
    function=pointconv_function,
    definition=pointconv_definition,
    eager=pointconv_eager,
    eager_bytes=lambda *args: 24.0 * args[3].numel() * args[1].shape[-1],
    samples=pointconv_samples,
    invalid=pointconv_invalid,
    dispatch_args=_dispatched_pointconv,
    whole=(5, 6, 7),
    fixed_shape=True,
    differentiable=lambda output: output,
    gradient_sample=_pointconv_gradient,
    tolerance=pointconv_tolerance,
    autocast_tolerance=_pointconv_autocast_tolerance,
    gradient_rtol=_gradient_rtol,
    benchmarks=(
        _pointconv_case(4),
        _pointconv_case(4, backward=True),
        _pointconv_case(32, dtype=torch.bfloat16, devices=("cuda",)),
        _pointconv_case(32, backward=True, dtype=torch.bfloat16, devices=("cuda",)),
    ),
)


def _flat_moments(
    function: Any,
    xyz: Tensor,
    centres: Tensor,
    neighbours: Tensor,
    net: Tensor,
    *,
    widths: Sequence[int],
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    layers = layers_of(net, widths, xyz.shape[-1])
    mean, covariance = function(xyz, centres, neighbours, layers, **kwargs)
    return mean, covariance


def moments_function(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    return _flat_moments(ops.pointconv_moments, *args, **kwargs)


def moments_definition(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    found = _flat_moments(reference.pointconv_moments, *map(_double, args), **kwargs)
    return tuple(value.to(compute_dtype(args[0])) for value in found)


def moments_samples(dtype: torch.dtype) -> Iterator[Sample]:
    def sample(name: str, args: tuple[Tensor, ...], widths: Sequence[int]) -> Sample:
        xyz, _, centres, neighbours, _, net, *_ = args
        cast = (xyz.to(dtype), centres.to(dtype), neighbours, net.to(dtype))
        return Sample(name, cast, {"widths": widths})

    for n, s, k, widths in ((1, 1, 1, (1,)), (12, 5, 7, (8, 4)), (30, 33, 9, (3, 5, 16))):
        args = random_edges(4, n, s, k, 1, 1, widths, seed=n)
        yield sample(f"random-{n}-{k}", args, widths)
    args = random_edges(2, 19, 9, 8, 1, 1, (4,), seed=1)
    args[3][:, ::2, 3:] = -1
    yield sample("missing", args, (4,))
    args[3].fill_(-1)
    yield sample("no-neighbours", args, (4,))
    yield sample("coordinates", random_edges(2, 19, 9, 8, 1, 1, (), dim=2, seed=2), ())
    yield sample("no-clouds", random_edges(0, 19, 9, 8, 1, 1, (4,)), (4,))


def moments_invalid() -> Iterator[Invalid]:
    xyz, _, centres, neighbours, _, net, *_ = random_edges(2, 5, 3, 4, 1, 1, (4,))
    named = {"widths": (4,)}
    yield Invalid("rank", (xyz[0], centres, neighbours, net), named, ValueError, "xyz")
    yield Invalid("dims", (xyz, centres[..., :2], neighbours, net), named, ValueError, "centres")
    yield Invalid("ints", (xyz, centres, neighbours.int(), net), named, TypeError, "neighbours")
    bad = {**named, "backend": "gpu"}
    yield Invalid("backend", (xyz, centres, neighbours, net), bad, ValueError, "backend")


def moments_tolerance(
    xyz: Tensor, centres: Tensor, neighbours: Tensor, net: Tensor, *, widths: Sequence[int]
) -> Tensor:
    """Absolute error allowed: the net's roundings of the largest magnitude of an output, twice in
    a product of two; the sums are in float64."""
    if neighbours.numel() == 0:
        return torch.zeros(())
    relative = (rows_at(xyz.double(), neighbours) - centres.double()[:, :, None]).abs()
    size = relative
    for weight, offset in layers_of(net.double(), widths, xyz.shape[-1]):
        size = size @ weight.abs().t() + offset.abs()
    unit = (xyz.shape[-1] + sum(widths) + 8) * unit_roundoff(compute_dtype(xyz))
    largest = size.amax()
    return 4 * unit * torch.maximum(largest, largest.square())


def _dispatched_moments(
    xyz: Tensor, centres: Tensor, neighbours: Tensor, net: Tensor, *, widths: Sequence[int]
) -> tuple[Any, ...]:
    return xyz, centres, neighbours, net, list(widths)


def _moments_gradient(dtype: torch.dtype) -> Sample:
    xyz, _, centres, neighbours, _, net, *_ = random_edges(1, 3, 2, 3, 1, 1, (3, 2), seed=5)
    neighbours[0, 1, 2:] = -1
    cast = (xyz.to(dtype), centres.to(dtype), neighbours, net.to(dtype))
    return Sample("gradient", cast, {"widths": (3, 2)})


def moments_eager(xyz: Tensor, centres: Tensor, neighbours: Tensor, net: Tensor) -> Tensor:
    """Every edge's output, and its covariance."""
    cloud = torch.arange(len(xyz), device=xyz.device)[:, None, None]
    hidden = xyz[cloud, neighbours] - centres[:, :, None]
    for weight, offset in layers_of(net, WIDTHS, xyz.shape[-1]):
        hidden = torch.relu(hidden @ weight.t() + offset)
    return torch.cov(hidden.flatten(0, 2).t(), correction=0)


POINTCONV_MOMENTS = OpSpec(
    name="pointconv_moments",
    function=moments_function,
    definition=moments_definition,
    eager=moments_eager,
    samples=moments_samples,
    invalid=moments_invalid,
    dispatch_args=_dispatched_moments,
    whole=(3,),
    fixed_shape=True,
    differentiable=lambda output: torch.cat([output[0], output[1].flatten()]),
    gradient_sample=_moments_gradient,
    tolerance=moments_tolerance,
    gradient_rtol=lambda dtype, *args, **_: args[2].numel() * unit_roundoff(torch.float32),
    benchmarks=(),
)


def reduce_function(features: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    found = ops.neighbour_reduce(features, *args, **kwargs)
    return found.to(compute_dtype(found))


def reduce_definition(features: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    found = reference.neighbour_reduce(features.double(), *map(_double, args), **kwargs)
    return found.to(compute_dtype(features))


def reduce_samples(dtype: torch.dtype) -> Iterator[Sample]:
    def sample(name: str, features: Tensor, *args: Any, **kwargs: Any) -> Sample:
        rest = (_cast(a, dtype) for a in args)
        return Sample(name, (features.to(dtype), *rest), kwargs)

    for n, s, k, channels, reduce in (
        (1, 1, 1, 1, "sum"),
        (12, 5, 7, 6, "max"),
        (20, 17, 3, 33, "mean"),
        (9, 8, 4, 70, "sum"),
    ):
        _, features, _, idx, weights, *_ = random_edges(4, n, s, k, channels, 1, seed=n)
        extra = (weights,) if reduce == "sum" else ()
        yield sample(f"random-{n}-{reduce}", features, idx, *extra, reduce=reduce)
    _, features, _, idx, weights, *_ = random_edges(2, 19, 9, 8, 10, 1, seed=1)
    idx[:, ::2, 3:] = -1
    idx[:, 4] = -1
    coarse = (features * 2).round()
    for reduce in ("sum", "mean", "max"):
        yield sample(f"missing-{reduce}", coarse, idx, reduce=reduce)
        yield sample(f"no-neighbours-{reduce}", features, idx[:, :, :0], reduce=reduce)
        yield sample(f"no-points-{reduce}", features[:, :0], idx.clamp(max=-1), reduce=reduce)
    yield sample("one-each", features, idx[:, :, :1])
    broken = features.clone()
    broken[:, 2, 3], broken[:, 5, 4], broken[:, 7] = torch.nan, torch.inf, -torch.inf
    yield sample("special-max", broken, idx, reduce="max")
    yield sample("no-clouds", features[:0], idx[:0], weights[:0])
    yield sample("no-channels", features[..., :0], idx, weights)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def reduce_invalid() -> Iterator[Invalid]:
    _, features, _, idx, weights, *_ = random_edges(2, 5, 3, 4, 2, 1)
    yield Invalid("list", ([1.0], idx), {}, TypeError, "features")
    yield Invalid("rank", (features[0], idx), {}, ValueError, "features")
    yield Invalid("integers", (features.long(), idx), {}, TypeError, "features")
    yield Invalid("int32", (features, idx.int()), {}, TypeError, "idx")
    yield Invalid("clouds", (features, idx[:1]), {}, ValueError, "idx")
    yield Invalid("weights", (features, idx, weights[:, :1]), {}, ValueError, "weights")
    maximum = {"reduce": "max"}
    yield Invalid("weighted-max", (features, idx, weights), maximum, ValueError, "weights")
    yield Invalid("reduce", (features, idx), {"reduce": "min"}, ValueError, "reduce")
    yield Invalid("backend", (features, idx), {"backend": "gpu"}, ValueError, "backend")


def reduce_tolerance(
    features: Tensor, idx: Tensor, weights: Tensor | None = None, reduce: str = "sum"
) -> Tensor:
    """A sum of K products in float32 (float64), rounded to the dtype; a maximum is exact."""
    if reduce == "max":
        return torch.zeros(())
    sizes = None if weights is None else weights.double().abs()
    total = reference.neighbour_reduce(features.double().abs(), idx, sizes, reduce)
    unit = (idx.shape[-1] + 4) * unit_roundoff(compute_dtype(features))
    return (unit + 2 * unit_roundoff(features.dtype)) * total


def _reduce_autocast_tolerance(features: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return reduce_tolerance(features.bfloat16(), *args, **kwargs)


def _dispatched_reduce(
    features: Tensor, idx: Tensor, weights: Tensor | None = None, reduce: str = "sum"
) -> tuple[Any, ...]:
    none = features.new_empty(0) if weights is None else weights
    return features, idx, none, "sum" if reduce == "mean" else reduce


def _reduce_gradient(dtype: torch.dtype) -> Sample:
    _, features, _, idx, weights, *_ = random_edges(2, 5, 3, 4, 2, 1, seed=5)
    idx[0, 1, 2:] = -1
    return Sample("gradient", (features.to(dtype), idx, weights.to(dtype)))


def reduce_eager(features: Tensor, idx: Tensor, _: None, reduce: str) -> Tensor:
    """A gather, then the reduction."""
    cloud = torch.arange(len(features), device=features.device)[:, None, None]
    listed = features[cloud, idx]
    return listed.amax(2) if reduce == "max" else listed.sum(2)


def _reduce_case(reduce: str) -> BenchmarkCase:
    def make(device: str, clouds: int, n: int, k: int, channels: int) -> tuple[Any, ...]:
        features = random_points(clouds, n, channels, device=device)
        return features, random_neighbours(clouds, n, n, k).to(device), None, reduce

    return BenchmarkCase(
        name=f"{reduce}, 8 x 1024, K 20, 64, forward + backward",
        shape={"clouds": 8, "n": 1024, "k": 20, "channels": 64},
        make=make,
        kwargs={},
        flops=lambda features, idx, *_: 2.0 * idx.numel() * features.shape[-1],
        bytes=lambda features, idx, *_: 16.0 * features.numel() + 16.0 * idx.numel(),
        gradients=(0,),
        seeds=lambda features, idx, *_: (
            torch.ones(*idx.shape[:2], features.shape[-1], device=features.device),
        ),
        tolerance=lambda *_: 1e-5,
    )


NEIGHBOUR_REDUCE = OpSpec(
    name="neighbour_reduce",
    function=reduce_function,
    definition=reduce_definition,
    eager=reduce_eager,
    eager_bytes=lambda features, idx, *_: 8.0 * idx.numel() * features.shape[-1],
    samples=reduce_samples,
    invalid=reduce_invalid,
    dispatch_args=_dispatched_reduce,
    fixed_shape=True,
    differentiable=lambda output: output,
    gradient_sample=_reduce_gradient,
    tolerance=reduce_tolerance,
    autocast_tolerance=_reduce_autocast_tolerance,
    gradient_rtol=lambda dtype, features, idx, *_, **__: (
        idx.numel() * unit_roundoff(compute_dtype(features))
    ),
    benchmarks=(_reduce_case("max"), _reduce_case("sum")),
)

SPECS = (POINTCONV, POINTCONV_MOMENTS, NEIGHBOUR_REDUCE)
