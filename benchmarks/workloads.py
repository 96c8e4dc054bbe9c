"""What is measured: every operator that has cases, and work that is made of several of them."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.samplers import ODE_STEP_CASES, SAMPLERS
from benchmarks.workload import Workload
from fastzoo import nn, ops, reference
from fastzoo.nn import flows
from fastzoo.testing import SPECS, BenchmarkCase, OpSpec
from fastzoo.testing.ode_step import ODE_STEP
from fastzoo.testing.pointconv import random_edges
from fastzoo.testing.splines import RATIONAL_QUADRATIC_SPLINE
from fastzoo.testing.vq import VQ_NEAREST, VQ_QUANTIZE, VQ_STATISTICS, random_codes

# vector-quantize-pytorch's defaults, of which fastzoo.nn's are the same.
DECAY, EPS, COMMITMENT = 0.8, 1e-5, 1.0


# --- vq_quantize, forward and backward ------------------------------------------------------------


def _quantize(x: Tensor, codebook: Tensor, _: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    def call() -> tuple[Tensor, ...]:
        output = ops.vq_quantize(x, codebook)
        return output.loss, output.quantized

    return call


def _eager_quantize(x: Tensor, codebook: Tensor, _: Tensor) -> tuple[Tensor, ...]:
    quantized, _, loss = VQ_QUANTIZE.eager(x, codebook)
    return loss, quantized


def _scores_bytes(x: Tensor, codebook: Tensor, *_: Any) -> float:
    return x.element_size() * x.numel() / x.shape[-1] * len(codebook)


def _lookup_flops(x: Tensor, codebook: Tensor, *_: Any, **__: Any) -> float:
    return 2.0 * x.numel() * len(codebook)


def _codes_and_gradient(
    n: int, k: int, dim: int, *, device: str, leading: tuple[int, ...] = ()
) -> tuple[Tensor, Tensor, Tensor]:
    """Vectors, codes, and what a decoder sends back."""
    x, codebook = random_codes(n, k, dim, device=device)
    gradient = random_codes(n, 1, dim, seed=1, device=device)[0]
    return x.view(*leading, n, dim), codebook, gradient.view(*leading, n, dim)


def _quantize_case(n: int, k: int, dim: int) -> BenchmarkCase:
    return BenchmarkCase(
        name=f"{n} x {k} x {dim}",
        shape={"n": n, "k": k, "dim": dim},
        make=lambda device, n, k, dim: _codes_and_gradient(n, k, dim, device=device),
        kwargs={},
        flops=_lookup_flops,
        # Vectors, codes, results and all gradients, each once.
        bytes=lambda x, codebook, grad: 4.0 * (4 * x.numel() + 2 * codebook.numel()),
        gradients=(0, 1),
        seeds=lambda x, codebook, grad: (None, grad),
        tolerance=lambda *args, **kwargs: 1e-5,
    )


QUANTIZE = Workload(
    "vq_quantize",
    "vq_quantize",
    _quantize,
    _eager_quantize,
    _scores_bytes,
    (_quantize_case(4096, 1024, 64), _quantize_case(4096, 8192, 256)),
)


# --- nn.VectorQuantize: a step of training, or the forward alone ----------------------------------


def step_of(module: Any, x: Tensor, codebook: Tensor, training: bool) -> Callable[[], Any]:
    """A call of vector-quantize-pytorch's module, or of fastzoo's, which keeps the same state; each
    begins with that of a new module, so that none depends on how many came before it."""
    module = module(
        dim=codebook.shape[1],
        codebook_size=len(codebook),
        decay=DECAY,
        commitment_weight=COMMITMENT,
        eps=EPS,
        rotation_trick=False,
    )
    module.to(x.device).train(training)
    state = dict(module._codebook.named_buffers())
    new = {
        "embed": codebook.detach(),
        "embed_avg": codebook.detach(),
        "cluster_size": torch.ones_like(codebook[:, 0]).detach(),
    }

    def call() -> Any:
        with torch.no_grad():
            for name, value in new.items():
                state[name].copy_(value.view(state[name].shape))
        quantized, _, loss = module(x)
        if not training:
            return quantized
        return loss, quantized, state["embed"].view(codebook.shape)

    return call


def _vector_quantize(
    x: Tensor, codebook: Tensor, _: Tensor, *, training: bool
) -> Callable[[], Any]:
    return step_of(nn.VectorQuantize, x, codebook, training)


def _eager_vector_quantize(
    x: Tensor, codebook: Tensor, _: Tensor, *, training: bool
) -> Tensor | tuple[Tensor, ...]:
    rows, k = x.detach().flatten(0, -2), len(codebook)
    indices = VQ_NEAREST.eager(rows, codebook)
    codes = F.embedding(indices, codebook).view(x.shape)
    if not training:
        return codes
    counts, sums = VQ_STATISTICS.eager(rows, indices, k)
    cluster_size = DECAY + (1 - DECAY) * counts
    embed_avg = DECAY * codebook + (1 - DECAY) * sums
    total = cluster_size.sum()
    smoothed = (cluster_size + EPS) / (total + k * EPS) * total
    loss = COMMITMENT * F.mse_loss(x, codes)
    return loss, x + (codes - x).detach(), embed_avg / smoothed[:, None]


def _step_case(name: str, training: bool) -> BenchmarkCase:
    return BenchmarkCase(
        name=name,
        shape={"n": 4096, "k": 8192, "dim": 256},
        make=lambda device, n, k, dim: _codes_and_gradient(n, k, dim, device=device, leading=(1,)),
        kwargs={"training": training},
        flops=_lookup_flops,
        # Forward: vectors, codes, results. Training also: both gradients, the codebook's averages
        # read and written, the codebook written.
        bytes=lambda x, codebook, grad, training: (
            4.0 * (2 + 2 * training) * x.numel() + 4.0 * (1 + 3 * training) * codebook.numel()
        ),
        gradients=(0,) if training else (),
        seeds=lambda x, codebook, grad: (None, grad),
        tolerance=lambda *args, **kwargs: 1e-5 if training else 0.0,
    )


VECTOR_QUANTIZE = Workload(
    "VectorQuantize",
    "vq_quantize",
    _vector_quantize,
    _eager_vector_quantize,
    _scores_bytes,
    (
        _step_case("train step, 4096 x 8192 x 256", True),
        _step_case("eval, 4096 x 8192 x 256", False),
    ),
)


# --- kmeans ---------------------------------------------------------------------------------------


def _kmeans(x: Tensor, initial: Tensor, *, iters: int) -> Callable[[], Tensor]:
    def call() -> Tensor:
        return ops.kmeans(x, len(initial), init=initial, iters=iters, tol=0.0).centroids

    return call


def _eager_kmeans(x: Tensor, initial: Tensor, *, iters: int) -> Tensor:
    centroids = initial
    for _ in range(iters):
        counts, sums = VQ_STATISTICS.eager(x, VQ_NEAREST.eager(x, centroids), len(initial))
        centroids = torch.where(counts[:, None] > 0, sums / counts[:, None], centroids)
    return centroids


def _points(device: str, n: int, k: int, dim: int) -> tuple[Tensor, Tensor]:
    """Points, and the first of them as the initial centroids."""
    points = random_codes(n, 1, dim, device=device)[0]
    return points, points[:k].clone()


KMEANS = Workload(
    "kmeans",
    "vq_nearest",
    _kmeans,
    _eager_kmeans,
    _scores_bytes,
    (
        BenchmarkCase(
            name="100000 x 1024 x 64, 5 rounds",
            shape={"n": 100_000, "k": 1024, "dim": 64},
            make=_points,
            kwargs={"iters": 5},
            flops=lambda x, initial, iters: iters * _lookup_flops(x, initial),
            bytes=lambda x, initial, iters: 4.0 * iters * (x.numel() + 2 * initial.numel()),
        ),
    ),
)


# --- vq_statistics --------------------------------------------------------------------------------


def _chosen(device: str, n: int, k: int, dim: int) -> tuple[Tensor, Tensor, int]:
    """Vectors, and codes chosen as unevenly as training does: a few of them by many vectors."""
    generator = torch.Generator().manual_seed(2)
    indices = (k * torch.rand(n, generator=generator) ** 3).long()
    return random_codes(n, 1, dim, device=device)[0], indices.to(device), k


STATISTICS = Workload(
    "vq_statistics",
    "vq_statistics",
    lambda x, indices, codes: functools.partial(ops.vq_statistics, x, indices, codes),
    VQ_STATISTICS.eager,
    lambda *args: 0.0,
    (
        BenchmarkCase(
            name="65536 x 8192 x 64",
            shape={"n": 65536, "k": 8192, "dim": 64},
            make=_chosen,
            kwargs={},
            flops=lambda x, indices, codes: 0.0,
            bytes=lambda x, indices, codes: (
                4.0 * (x.numel() + codes * (x.shape[1] + 1)) + 8.0 * len(x)
            ),
        ),
    ),
)


# --- layers over points: a step of training -------------------------------------------------------


def _step_of_layer(
    module: torch.nn.Module, parameters: tuple[Tensor, ...], *inputs: Any
) -> Callable[[], Any]:
    """A call of a module with these parameters, in the order in which it names its own."""
    module.to(inputs[0].device).train()
    names = [name for name, _ in module.named_parameters()]
    given = dict(zip(names, parameters, strict=True))
    return lambda: torch.func.functional_call(module, given, inputs)


def _parameters(module: torch.nn.Module, *, seed: int = 0) -> list[Tensor]:
    """Drawn anew, since a normalisation that is new does nothing."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(p.shape, generator=generator) / max(1, p[0].numel()) ** 0.5
        for p in module.parameters()
    ]


def _normalised(z: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """By the batch's moments, channels last."""
    found = F.batch_norm(z.flatten(0, -2), None, None, scale, shift, training=True)
    return found.view(z.shape)


def _edge_conv(
    x: Tensor, grad: Tensor, neighbours: Tensor, *parameters: Tensor
) -> Callable[[], Any]:
    outputs, both = parameters[0].shape[:2]
    module = nn.EdgeConv(both // 2, outputs, neighbours.shape[2])
    return _step_of_layer(module, parameters, x, neighbours)


def _eager_edge_conv(
    x: Tensor, grad: Tensor, neighbours: Tensor, weight: Tensor, scale: Tensor, shift: Tensor
) -> Tensor:
    """DGCNN's code: the edges' features, a convolution, its normalisation, the maximum."""
    cloud = torch.arange(len(x), device=x.device)[:, None, None]
    own = x[:, :, None].expand(*neighbours.shape, x.shape[-1])
    edges = torch.cat([own, x[cloud, neighbours] - own], -1)
    found = _normalised(edges @ weight.flatten(1).t(), scale, shift)
    return F.leaky_relu(found, 0.2).amax(2)


def _edges(device: str, clouds: int, n: int, k: int, channels: int) -> tuple[Tensor, ...]:
    _, x, _, neighbours, _, _, _, _ = random_edges(clouds, n, n, k, channels, 1)
    grad = random_edges(clouds, n, 1, 1, channels, 1, seed=1)[1]
    parameters = _parameters(nn.EdgeConv(channels, channels, k))
    return tuple(t.to(device) for t in (x, grad, neighbours, *parameters))


EDGE_CONV = Workload(
    "EdgeConv",
    "neighbour_reduce",
    _edge_conv,
    _eager_edge_conv,
    lambda x, grad, neighbours, *_: 32.0 * neighbours.numel() * x.shape[-1],
    (
        BenchmarkCase(
            name="train step, 8 x 1024 x 64, K 20",
            shape={"clouds": 8, "n": 1024, "k": 20, "channels": 64},
            make=_edges,
            kwargs={},
            # Two products of the points, and as many again for each of the gradients.
            flops=lambda x, *_: 12.0 * x.numel() * x.shape[-1],
            bytes=lambda x, grad, neighbours, *_: 16.0 * x.numel() + 16.0 * neighbours.numel(),
            gradients=(0, 3, 4, 5),
            seeds=lambda x, grad, *_: (grad,),
            # Of two edges within rounding of each other the other may be the greatest, and its
            # gradient then goes elsewhere: that of a few among half a million.
            tolerance=lambda *args, **kwargs: 5e-3,
        ),
    ),
)


def _pointconv_layer(
    features: Tensor,
    grad: Tensor,
    xyz: Tensor,
    centres: Tensor,
    neighbours: Tensor,
    *parameters: Tensor,
) -> Callable[[], Any]:
    channels, outputs = features.shape[-1], grad.shape[-1]
    module = nn.PointConv(channels, outputs, neighbours.shape[2], density_hidden=None)
    return _step_of_layer(module, parameters, xyz, features, centres, neighbours)


def _eager_pointconv_layer(
    features: Tensor,
    grad: Tensor,
    xyz: Tensor,
    centres: Tensor,
    neighbours: Tensor,
    *parameters: Tensor,
) -> Tensor:
    """The published code: the weight net with its normalisations over all edges, then the sums."""
    cloud = torch.arange(len(xyz), device=xyz.device)[:, None, None]
    hidden = xyz[cloud, neighbours] - centres[:, :, None]
    *layers, linear, bias = parameters
    half = len(layers) // 2
    for weight, offset, scale, shift in zip(
        layers[:half:2], layers[1:half:2], layers[half::2], layers[half + 1 :: 2], strict=True
    ):
        hidden = F.linear(hidden, weight.flatten(1), offset)
        hidden = F.relu(_normalised(hidden, scale, shift))
    sums = features[cloud, neighbours].transpose(2, 3) @ hidden
    return F.linear(sums.flatten(2), linear, bias)


def _layer_inputs(
    device: str, clouds: int, n: int, s: int, k: int, channels: int
) -> tuple[Tensor, ...]:
    xyz, features, centres, neighbours, *_ = random_edges(clouds, n, s, k, channels, 1)
    grad = random_edges(clouds, s, 1, 1, channels, 1, seed=1)[1]
    parameters = _parameters(nn.PointConv(channels, channels, k, density_hidden=None))
    return tuple(t.to(device) for t in (features, grad, xyz, centres, neighbours, *parameters))


POINTCONV_LAYER = Workload(
    "PointConv",
    "pointconv_moments",
    _pointconv_layer,
    _eager_pointconv_layer,
    lambda features, grad, xyz, centres, neighbours, *_: (
        32.0 * neighbours.numel() * features.shape[-1]
    ),
    (
        BenchmarkCase(
            name="train step, 4 x 1024 -> 512, K 32, 128 x 16 -> 128",
            shape={"clouds": 4, "n": 1024, "s": 512, "k": 32, "channels": 128},
            make=_layer_inputs,
            kwargs={},
            flops=lambda features, grad, xyz, centres, neighbours, *parameters: (
                6.0 * neighbours[..., 0].numel() * parameters[-2].numel()
                + 6.0 * neighbours.numel() * parameters[-2].shape[1]
            ),
            bytes=lambda *args: 3 * sum(float(a.numel() * a.element_size()) for a in args),
            # Not of what is added before a normalisation: it has none.
            gradients=(0, 5, 7, 9, *range(11, 19)),
            seeds=lambda features, grad, *_: (grad,),
            # Gradients of the net are small differences of sums over 65 536 edges, which torch's
            # batch normalisation adds up in float32: that is off by up to 2 %.
            tolerance=lambda *args, **kwargs: 3e-2,
        ),
    ),
)


# --- flows: a step of training, and the inverse of an autoregressive map --------------------------

BINS, BOUND, SLOPE = 8, 5.0, 1e-3


def adopt(module: torch.nn.Module, tensors: Sequence[Tensor]) -> Any:
    """The module on the device of these tensors, which are its parameters in its order of them."""
    module.to(tensors[0].device)
    names = [name for name, _ in module.named_parameters()]
    for name, tensor in zip(names, tensors, strict=True):
        path, _, last = name.rpartition(".")
        module.get_submodule(path)._parameters[last] = tensor  # type: ignore[assignment]
    return module


def masked_network(
    x: Tensor, parameters: Sequence[Tensor], multiplier: int, passes: int, *, descending: bool
) -> Tensor:
    """Of two hidden layers, whose outputs ``[B, D, multiplier]`` for a feature see those before."""
    w1, b1, w2, b2, w3, b3 = parameters
    passes = min(passes, x.shape[1])
    steps = torch.arange(x.shape[1], device=x.device) // -(-x.shape[1] // passes)
    steps = steps.flip(0) if descending else steps
    first, second = (1 + torch.arange(len(w), device=x.device) % (passes - 1) for w in (w1, w2))
    hidden = F.relu(F.linear(x, w1 * (first[:, None] > steps), b1))
    hidden = F.relu(F.linear(hidden, w2 * (second[:, None] >= first), b2))
    seen = steps.repeat_interleave(multiplier)[:, None] >= second
    return F.linear(hidden, w3 * seen, b3).view(len(x), x.shape[1], multiplier)


def _networks(features: int, hidden: int, multiplier: int, *, layers: int = 1) -> list[Tensor]:
    """The parameters of masked networks, such that what they give is no identity."""
    widths = (features, hidden, hidden, features * multiplier)
    linears = [torch.nn.Linear(*pair) for _ in range(layers) for pair in itertools.pairwise(widths)]
    return [0.3 * p for p in _parameters(torch.nn.Sequential(*linears))]


def _spline_flow(x: Tensor, *parameters: Tensor, passes: int) -> Callable[[], Tensor]:
    features, hidden = x.shape[1], (len(parameters[0]), len(parameters[2]))
    layers = [
        flows.MaskedAutoregressive(
            features,
            hidden,
            univariate="spline",
            order=torch.arange(features).flip(0) if layer % 2 else None,
            passes=passes,
            bins=BINS,
            bound=BOUND,
            slope=SLOPE,
            convention="zuko",
        )
        for layer in range(len(parameters) // 6)
    ]
    flow = adopt(flows.Flow(layers, flows.StandardNormal(features)), parameters)
    return lambda: -flow.log_prob(x).mean()


def _eager_spline_flow(x: Tensor, *parameters: Tensor, passes: int) -> Tensor:
    total = x.new_zeros(len(x))
    for layer in range(len(parameters) // 6):
        own = parameters[6 * layer : 6 * layer + 6]
        found = masked_network(x, own, 3 * BINS - 1, passes, descending=layer % 2 == 1)
        x, logdet = reference.rational_quadratic_spline(
            x, found, bound=BOUND, slope=SLOPE, convention="zuko"
        )
        total = total + logdet
    return ((0.5 * x.square() + 0.5 * math.log(2 * math.pi)).sum(1) - total).mean()


def _flow_inputs(
    device: str, batch: int, features: int, layers: int, hidden: int
) -> tuple[Tensor, ...]:
    x = random_codes(batch, 1, features)[0]
    found = x, *_networks(features, hidden, 3 * BINS - 1, layers=layers)
    return tuple(t.to(device) for t in found)


def _adam(parameters: tuple[Tensor, ...]) -> Callable[[tuple[Tensor, ...]], object]:
    """With a learning rate of 0, which takes as long and changes nothing."""
    optimizer = torch.optim.Adam(parameters, lr=0.0, fused=True)

    def step(gradients: tuple[Tensor, ...]) -> None:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()

    return step


def _flow_case(name: str, passes: int) -> BenchmarkCase:
    return BenchmarkCase(
        name=f"train step, 4096 x 16, 10 layers, {name}",
        shape={"batch": 4096, "features": 16, "layers": 10, "hidden": 64},
        make=_flow_inputs,
        kwargs={"passes": passes},
        # The networks' products, and as many again for each of the gradients.
        flops=lambda x, *parameters, passes: 6.0 * len(x) * sum(p.numel() for p in parameters),
        bytes=lambda x, *parameters, passes: 16.0 * sum(p.numel() for p in parameters),
        gradients=tuple(range(1, 61)),
        # Of a value within rounding of where a rectifier turns or a bin ends the gradient goes
        # another way. In ten layers 4096 samples have some, each 1 / sqrt(4096) of a row's.
        tolerance=lambda x, *parameters, passes: max(5e-3, 2 / 4096**0.5 * len(x) / 4096),
    )


SPLINE_FLOW = Workload(
    "SplineFlow",
    "rational_quadratic_spline",
    _spline_flow,
    _eager_spline_flow,
    # Per spline a dozen tables of knots, kept for the backward.
    lambda x, *parameters: 48.0 * 3 * BINS * x.numel() * len(parameters) / 6,
    (_flow_case("2 passes", 2), _flow_case("autoregressive", 16)),
    _adam,
)


def _maf_inverse(z: Tensor, *parameters: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
    hidden = len(parameters[0]), len(parameters[2])
    layer = adopt(flows.MaskedAutoregressive(z.shape[1], hidden, slope=SLOPE), parameters)

    def call() -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            found: tuple[Tensor, Tensor] = layer.inverse(z)
        return found

    return call


def _eager_maf_inverse(z: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
    """The whole network once for each feature."""
    x, features = torch.zeros_like(z), z.shape[1]
    for _ in range(features):
        shift, scale = masked_network(x, parameters, 2, features, descending=False).unbind(2)
        a = scale / (1 + (scale / math.log(SLOPE)).abs())
        x = (z - shift) * torch.exp(-a)
    return x, -a.sum(1)


MAF_INVERSE = Workload(
    "MAF",
    "autoregressive_inverse",
    _maf_inverse,
    _eager_maf_inverse,
    lambda *args: 0.0,
    (
        BenchmarkCase(
            name="inverse, 1024 x 64, hidden 256, 256",
            shape={"batch": 1024, "features": 64, "hidden": 256},
            make=lambda device, batch, features, hidden: tuple(
                t.to(device)
                for t in (
                    random_codes(batch, 1, features)[0],
                    *_networks(features, hidden, 2),
                )
            ),
            kwargs={},
            # Each weight once a sample, about half of them being masked.
            flops=lambda z, *parameters: float(len(z) * sum(p.numel() for p in parameters)),
            bytes=lambda z, *parameters: 8.0 * z.numel() + 4.0 * sum(p.numel() for p in parameters),
            # 64 roundings, each of which goes through the networks of all features after it.
            tolerance=lambda *args: 1e-4,
        ),
    ),
)


def _also(spec: OpSpec, *cases: BenchmarkCase) -> OpSpec:
    return dataclasses.replace(spec, benchmarks=spec.benchmarks + cases)


def _option(spec: OpSpec, case: str, **kwargs: Any) -> BenchmarkCase:
    known = next(known for known in spec.benchmarks if known.name == case)
    listed = ", ".join(name if value is True else str(value) for name, value in kwargs.items())
    return dataclasses.replace(
        known,
        name=f"{case}, {listed}",
        kwargs=kwargs,
        flops=lambda *args, **_: known.flops(*args),
        bytes=lambda *args, **_: known.bytes(*args),
        tolerance=lambda *args, **_: known.tolerance(*args),
    )


_WORKLOADS = (
    QUANTIZE,
    VECTOR_QUANTIZE,
    STATISTICS,
    KMEANS,
    EDGE_CONV,
    POINTCONV_LAYER,
    SPLINE_FLOW,
    MAF_INVERSE,
    *SAMPLERS,
)
MEASURED: dict[str, OpSpec | Workload] = {
    **{name: spec for name, spec in SPECS.items() if spec.benchmarks},
    "vq_nearest": _also(
        VQ_NEAREST,
        _option(VQ_NEAREST, "16384 x 8192 x 64", metric="cosine"),
        _option(VQ_NEAREST, "16384 x 8192 x 64", precision="fast"),
    ),
    "rational_quadratic_spline": _also(
        RATIONAL_QUADRATIC_SPLINE,
        _option(RATIONAL_QUADRATIC_SPLINE, "8192 x 16, K 8", inverse=True),
        *(
            _option(RATIONAL_QUADRATIC_SPLINE, f"8192 x 16, K 8{suffix}", convention="zuko", **more)
            for suffix, more in (
                ("", {}),
                (", forward + backward", {}),
                ("", {"inverse": True}),
            )
        ),
    ),
    "ode_step": _also(ODE_STEP, *ODE_STEP_CASES),
    **{work.name: work for work in _WORKLOADS},
}
