"""The aggregation against einsum in float64 and against what it is meant to be."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastzoo import ops
from fastzoo.ops._operator import OPERATORS
from fastzoo.testing.gradients import assert_gradient_close
from fastzoo.testing.neighbours import random_points
from fastzoo.testing.pointconv import (
    WIDTHS,
    layers_of,
    pointconv_definition,
    pointconv_function,
    pointconv_tolerance,
    random_edges,
    random_net,
)
from fastzoo.testing.timing import peak_memory
from tests.conftest import DEVICE

BACKENDS = [
    b for b in ("cpu", "cuda", "triton") if OPERATORS["pointconv"].refusal(b, DEVICE) is None
]
ALL_BACKENDS = ["reference", *BACKENDS]
REDUCING = [b for b in ALL_BACKENDS if b in OPERATORS["neighbour_reduce"].has]


def naive(
    xyz: Tensor,
    features: Tensor,
    centres: Tensor,
    neighbours: Tensor,
    net: list[tuple[Tensor, Tensor]],
    scale: Tensor,
) -> Tensor:
    """Weights ``[B, S, K, C, O]`` of every edge, whose last layer has no ReLU, and their sum."""
    cloud = torch.arange(len(xyz))[:, None, None]
    hidden = xyz[cloud, neighbours] - centres[:, :, None]
    *before, (last, offset) = net
    for weight, bias in before:
        hidden = torch.relu(hidden @ weight.t() + bias)
    weights = (hidden @ last.t() + offset).unflatten(-1, (features.shape[-1], -1))
    return torch.einsum("bsk,bskc,bskco->bso", scale, features[cloud, neighbours], weights)


@pytest.mark.parametrize("hidden", [(), (5,), (8, 6)])
@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_the_full_form_is_a_weight_of_every_edge(backend: str, hidden: tuple[int, ...]) -> None:
    channels, out = 4, 3
    args = random_edges(2, 20, 7, 6, channels, out, seed=1)
    xyz, features, centres, neighbours, scale, *_ = (
        a.double() if a.is_floating_point() else a for a in args
    )
    widths = (*hidden, channels * out)
    net = layers_of(random_net(widths, 3, seed=2).double(), widths, 3)
    expected = naive(xyz, features, centres, neighbours, list(net), scale)
    moved = [a.to(DEVICE) for a in (xyz, features, centres, neighbours)]
    layers = [(w.to(DEVICE), b.to(DEVICE)) for w, b in net]
    found = ops.pointconv(*moved, layers, scale.to(DEVICE), form="full", backend=backend)
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_many_centres(backend: str, dtype: torch.dtype) -> None:
    """Of several tiles, and of more than one chunk where these are small."""
    widths = (5, 13)
    edges = random_edges(2, 30, 105, 5, 37, 21, widths, seed=11)
    args = [a.to(dtype) if a.is_floating_point() else a for a in edges]
    moved = [a.to(DEVICE) for a in args]
    found = pointconv_function(*moved, widths=widths, backend=backend).cpu()
    expected = pointconv_definition(*args, widths=widths)
    assert ((found - expected).abs() <= pointconv_tolerance(*args, widths=widths)).all()


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_neither_order_nor_place_matters(backend: str) -> None:
    args = [a.to(DEVICE) for a in random_edges(2, 30, 9, 8, 6, 5, seed=3)]
    xyz, features, centres, neighbours, scale, net, linear, bias = args
    layers = layers_of(net, WIDTHS, 3)

    def call(xyz: Tensor, features: Tensor, centres: Tensor, idx: Tensor, scale: Tensor) -> Tensor:
        return ops.pointconv(
            xyz, features, centres, idx, layers, scale, (linear, bias), backend=backend
        )

    plain = call(xyz, features, centres, neighbours, scale)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(4)).to(DEVICE)
    mixed = call(xyz, features, centres, neighbours[..., order], scale[..., order])
    torch.testing.assert_close(mixed, plain, rtol=1e-5, atol=1e-5)
    points = torch.randperm(30, generator=torch.Generator().manual_seed(5)).to(DEVICE)
    place = torch.argsort(points)
    renamed = call(xyz[:, points], features[:, points], centres, place[neighbours], scale)
    torch.testing.assert_close(renamed, plain, rtol=1e-5, atol=1e-5)
    # A step of 2^-10 of the coordinates leaves them exact eight units away.
    xyz, centres = ((t * 1024).round() / 1024 for t in (xyz, centres))
    near = call(xyz, features, centres, neighbours, scale)
    far = call(xyz + 8, features, centres + 8, neighbours, scale)
    assert torch.equal(near, far)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_on_a_grid_it_is_a_convolution(backend: str) -> None:
    generator = torch.Generator().manual_seed(6)
    image = torch.randn(1, 2, 8, 8, generator=generator, dtype=torch.float64)
    kernel = torch.randn(4, 2, 3, 3, generator=generator, dtype=torch.float64)
    side = torch.arange(8.0, dtype=torch.float64)
    xyz = torch.cartesian_prod(side, side)[None]
    inside = (xyz[0] >= 1).all(1) & (xyz[0] <= 6).all(1)
    centres = xyz[:, inside]
    near = ops.ball_query(centres, xyz, K=9, radius=1.5)
    # Hats of the offset: h_m is 1 at the m-th of the nine offsets and 0 at the others, as a
    # second layer over relu(dx + 1), relu(dx), relu(dx - 1), ... of a first.
    first = torch.tensor([[1.0, 0], [1, 0], [1, 0], [0, 1], [0, 1], [0, 1]], dtype=torch.float64)
    offset = torch.tensor([2.0, 1, 0, 2, 1, 0], dtype=torch.float64)
    hat = {-1: [1.0, -2, 0], 0: [0.0, 1, -2], 1: [0.0, 0, 1]}
    second = torch.tensor(
        [[*hat[i], *hat[j]] for i in (-1, 0, 1) for j in (-1, 0, 1)], dtype=torch.float64
    )
    net = [(first, offset), (second, torch.full((9,), -1.0, dtype=torch.float64))]
    matrix = kernel.flatten(2).reshape(4, -1)
    features = image.flatten(2).transpose(1, 2).contiguous()
    found = ops.pointconv(
        xyz.to(DEVICE),
        features.to(DEVICE),
        centres.to(DEVICE),
        near.idx.to(DEVICE),
        [(w.to(DEVICE), b.to(DEVICE)) for w, b in net],
        None,
        (matrix.to(DEVICE), None),
        backend=backend,
    )
    expected = F.conv2d(image, kernel).flatten(2).transpose(1, 2)
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-12, atol=1e-12)


def test_every_instruction_set(capability: str) -> None:
    args = random_edges(2, 90, 70, 17, 37, 21, (5, 13), seed=7)
    weights = torch.linspace(-1, 1, 2 * 70 * 21).view(2, 70, 21)

    def run(dtype: torch.dtype, backend: str) -> tuple[Tensor, ...]:
        cast = [a.to(dtype) if a.is_floating_point() else a for a in args]
        leaves = [a.requires_grad_() if a.is_floating_point() else a for a in cast]
        xyz, features, centres, neighbours, scale, net, linear, bias = leaves
        layers = layers_of(net, (5, 13), 3)
        out = ops.pointconv(
            xyz, features, centres, neighbours, layers, scale, (linear, bias), backend=backend
        )
        floats = [a for a in leaves if a.is_floating_point()]
        return out, *torch.autograd.grad((out * weights.to(dtype)).sum(), floats)

    expected = run(torch.float64, "reference")
    for a, e in zip(run(torch.float32, "cpu"), expected, strict=True):
        assert_gradient_close(a, e, rtol=5e-5, name=capability)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_deep_net(backend: str) -> None:
    widths = (3, 4, 2, 5, 3, 4, 2, 3)
    args = random_edges(1, 12, 5, 4, 3, 2, widths, seed=19)
    xyz, features, centres, neighbours, scale, net, linear, bias = (
        a.double().to(DEVICE) if a.is_floating_point() else a.to(DEVICE) for a in args
    )
    net = (net * 2).requires_grad_()
    results = []
    for which in ("reference", backend):
        layers = layers_of(net, widths, 3)
        last = (linear, bias)
        out = ops.pointconv(xyz, features, centres, neighbours, layers, scale, last, backend=which)
        results.append((out, *torch.autograd.grad(out.square().sum(), net)))
    assert results[0][1].abs().max() > 0
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


def test_the_number_of_threads_changes_no_bit() -> None:
    args = random_edges(3, 80, 300, 9, 40, 16, seed=8)
    leaves = [a.requires_grad_() if a.is_floating_point() else a for a in args]
    xyz, features, centres, neighbours, scale, net, linear, bias = leaves

    def step() -> tuple[Tensor, ...]:
        layers = layers_of(net, WIDTHS, 3)
        out = ops.pointconv(xyz, features, centres, neighbours, layers, scale, (linear, bias))
        reduced = ops.neighbour_reduce(features, neighbours, scale)
        mean, covariance = ops.pointconv_moments(xyz, centres, neighbours, layers)
        loss = out.square().sum() + reduced.square().sum() + mean.sum() + covariance.sum()
        return out, *torch.autograd.grad(loss, [a for a in leaves if a.is_floating_point()])

    threads, first = torch.get_num_threads(), step()
    try:
        torch.set_num_threads(1)
        assert all(map(torch.equal, step(), first))
    finally:
        torch.set_num_threads(threads)


def test_neither_edges_nor_their_products_are_kept() -> None:
    args = random_edges(4, 1024, 512, 32, 128, 128, seed=9)
    leaves = [a.requires_grad_() if a.is_floating_point() else a for a in args]
    xyz, features, centres, neighbours, scale, net, linear, bias = leaves

    def step() -> None:
        layers = layers_of(net, WIDTHS, 3)
        out = ops.pointconv(xyz, features, centres, neighbours, layers, scale, (linear, bias))
        torch.autograd.grad(out.sum(), (features, scale, net, linear, bias))

    edges = 4 * 512 * 32 * 128 * 4  # 32 MiB; the published form keeps several times that
    gradients = sum(a.numel() * 4 for a in (features, scale, net, linear, bias))
    assert peak_memory(step, "cpu") < edges // 2 + gradients


@pytest.mark.parametrize("backend", [b for b in ALL_BACKENDS if b != "cuda"])
def test_moments_fold_a_batch_norm(backend: str) -> None:
    xyz, _, centres, neighbours, _, net, *_ = random_edges(2, 30, 12, 9, 1, 1, (6,), seed=10)
    layer = layers_of(net, (6,), 3)
    mean, covariance = ops.pointconv_moments(
        xyz.to(DEVICE),
        centres.to(DEVICE),
        neighbours.to(DEVICE),
        [(w.to(DEVICE), b.to(DEVICE)) for w, b in layer],
        backend=backend,
    )
    relative = xyz[torch.arange(2)[:, None, None], neighbours] - centres[:, :, None]
    hidden = torch.relu(relative @ layer[0][0].t() + layer[0][1]).flatten(0, 2)
    weight = torch.randn(5, 6, generator=torch.Generator().manual_seed(11))
    z = hidden @ weight.t()
    torch.testing.assert_close(weight @ mean.cpu(), z.mean(0), rtol=1e-5, atol=1e-6)
    variance = (weight @ covariance.cpu() @ weight.t()).diagonal()
    torch.testing.assert_close(variance, z.var(0, correction=0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", REDUCING)
def test_the_first_of_equal_neighbours_has_the_gradient(backend: str) -> None:
    features = torch.tensor([[[1.0, 5.0], [3.0, 5.0], [3.0, 2.0], [torch.nan, 0.0]]])
    features = features.to(DEVICE).requires_grad_()
    idx = torch.tensor([[[0, 2, 1], [1, 0, -1], [0, 3, 3], [-1, -1, -1]]], device=DEVICE)
    out = ops.neighbour_reduce(features, idx, reduce="max", backend=backend)
    expected = [[3.0, 5.0], [3.0, 5.0], [float("nan"), 5.0], [0.0, 0.0]]
    np.testing.assert_array_equal(out.detach().cpu().numpy()[0], expected)
    (grad,) = torch.autograd.grad(out, features, torch.ones_like(out))
    # Row 2 comes before row 1 in the first list; row 0 has 5 first there and in the third.
    assert grad.tolist() == [[[0.0, 2.0], [1.0, 1.0], [1.0, 0.0], [1.0, 0.0]]]


@pytest.mark.parametrize("backend", REDUCING)
def test_a_hot_neighbour(backend: str) -> None:
    """Every edge leads to one row, whose gradient is a long sum."""
    features = random_points(1, 5, 3, seed=12).double().to(DEVICE).requires_grad_()
    idx = torch.full((1, 300, 7), 2, device=DEVICE)
    weights = random_points(1, 300, 7, seed=13).double().to(DEVICE).requires_grad_()
    out = ops.neighbour_reduce(features, idx, weights, backend=backend)
    grad_features, grad_weights = torch.autograd.grad(out.sum(), (features, weights))
    expected = torch.zeros_like(features)
    expected[0, 2] = weights.sum()
    torch.testing.assert_close(grad_features, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        grad_weights, features[0, 2].sum().expand(1, 300, 7), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("backend", REDUCING)
def test_interpolation_keeps_constants_and_known_points(backend: str) -> None:
    known = random_points(2, 40, seed=14)
    features = random_points(2, 40, 6, seed=15)
    unknown = torch.cat([random_points(2, 9, seed=16), known[:, :5]], 1)
    dist, idx = ops.three_nn(unknown, known)
    weight = 1 / (dist.square() + 1e-8)
    weight = weight / weight.sum(-1, keepdim=True)
    args = idx.to(DEVICE), weight.to(DEVICE)
    constant = ops.three_interpolate(torch.ones_like(features).to(DEVICE), *args, backend=backend)
    torch.testing.assert_close(constant.cpu(), torch.ones(2, 14, 6), rtol=3e-7, atol=0)
    found = ops.three_interpolate(features.to(DEVICE), *args, backend=backend).cpu()
    torch.testing.assert_close(found[:, 9:], features[:, :5], rtol=0, atol=1e-5)
    expected = (features[torch.arange(2)[:, None, None], idx] * weight[..., None]).sum(2)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("backend", REDUCING)
def test_edge_features_like_a_loop(backend: str) -> None:
    x = random_points(2, 7, 4, seed=17)
    idx = ops.knn_points(x, x, K=3).idx
    found = ops.edge_features(x.to(DEVICE), idx.to(DEVICE), backend=backend).cpu()
    for b in range(2):
        for i in range(7):
            for place, j in enumerate(idx[b, i].tolist()):
                assert torch.equal(found[b, i, place], torch.cat([x[b, i], x[b, j] - x[b, i]]))


def test_a_neighbour_outside_the_cloud_is_refused() -> None:
    args = random_edges(1, 5, 3, 4, 2, 2, seed=18)
    xyz, features, centres, neighbours, scale, net, *_ = args
    neighbours[0, 1, 2] = 5
    layers = layers_of(net, WIDTHS, 3)
    with pytest.raises(RuntimeError, match="neighbours"):
        ops.pointconv(xyz, features, centres, neighbours, layers, scale, backend="cpu")
    with pytest.raises(RuntimeError, match="neighbours"):
        ops.neighbour_reduce(features, neighbours, backend="cpu")
    with pytest.raises(RuntimeError, match="neighbours"):
        ops.pointconv_moments(xyz, centres, neighbours, layers, backend="cpu")
