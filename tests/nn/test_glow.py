"""Channel mixing, Glow and RealNVP against their formulas and the autograd Jacobian."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastzoo import ops
from fastzoo.nn.flows import (
    ActNorm,
    Compose,
    Flow,
    Glow,
    GlowConditioner,
    GlowStep,
    InvertibleConv1x1,
    MultiScale,
    RealNVP,
    Squeeze,
    StandardNormal,
    Transform,
    checkerboard_mask,
    prior_coupling,
)

SHAPES = [(3, 5), (3, 5, 4, 2), (2, 5, 7), (2, 70, 3)]


def data(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def well_conditioned(channels: int) -> Tensor:
    """Its largest elements lie off the diagonal, so that an LU permutes."""
    weight = data(channels, channels, seed=5) / math.sqrt(channels) + 2 * torch.eye(channels)
    return weight.roll(1, 0)


def across(vector: Tensor, x: Tensor) -> Tensor:
    return vector.view(-1, *(x.dim() - 2) * (1,))


def stir(module: nn.Module) -> None:
    """Zero-initialised layers would hide what a conditioner does."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.add_(noise, alpha=0.05)


def log_determinant(transform: Any, x: Tensor) -> Tensor:
    jacobian: Tensor = torch.autograd.functional.jacobian(
        lambda one: transform(one)[0].flatten(), x[:1]
    )
    return torch.linalg.slogdet(jacobian.reshape(x[0].numel(), -1)).logabsdet


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("factored", [False, True])
def test_a_folded_1x1_convolution_is_actnorm_and_a_product(
    shape: tuple[int, ...], factored: bool
) -> None:
    x, channels = data(*shape), shape[1]
    weight = well_conditioned(channels)
    log_scale, bias = 0.3 * data(2, channels, seed=1)
    given = ops.LU.factor(weight) if factored else weight
    normed, of_norm = ops.actnorm(x, log_scale, bias)
    torch.testing.assert_close(normed, (x + across(bias, x)) * across(log_scale, x).exp())
    y, logdet = ops.invertible_conv1x1(x, given, log_scale, bias)
    torch.testing.assert_close(y, torch.einsum("ij,bj...->bi...", weight, normed))
    places = math.prod(shape[2:])
    of_weight = places * torch.linalg.slogdet(weight).logabsdet
    torch.testing.assert_close(of_norm, (places * log_scale.sum()).expand(shape[0]))
    torch.testing.assert_close(logdet, of_norm + of_weight)
    back, undone = ops.invertible_conv1x1(y, given, log_scale, bias, inverse=True)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(undone, -logdet)
    torch.testing.assert_close(ops.actnorm(normed, log_scale, bias, inverse=True)[0], x)
    assert torch.equal(ops.invertible_conv1x1(x, given, log_scale)[1], logdet)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("factored", [False, True])
def test_mixing_has_gradients_of_every_order(factored: bool, inverse: bool) -> None:
    weight = well_conditioned(3)
    parts = ops.LU.factor(weight)
    matrices = [parts.lower, parts.upper, parts.log_abs] if factored else [weight]
    inputs = [data(2, 3, 2), *matrices, *(0.3 * data(2, 3, seed=1))]

    def mixed(x: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        *given, log_scale, bias = rest
        lu = ops.LU(parts.permutation, *given[:2], parts.sign, *given[2:]) if factored else given[0]
        return ops.invertible_conv1x1(x, lu, log_scale, bias, inverse=inverse)

    leaves = [t.requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(mixed, leaves)
    assert torch.autograd.gradgradcheck(mixed, leaves)


def test_mixing_in_low_precision_and_under_autocast() -> None:
    x, weight = data(4, 6, 8).float(), well_conditioned(6).float()
    y, _ = ops.invertible_conv1x1(x, weight)
    with torch.autocast("cpu", torch.bfloat16):
        again = ops.invertible_conv1x1(x, weight)
    assert torch.equal(again[0], y)
    rounded, other = ops.invertible_conv1x1(x.bfloat16(), weight.bfloat16())
    assert rounded.dtype == torch.bfloat16
    assert other.dtype == torch.float32
    # Operands and result are rounded by at most 2^-9 each, of six terms.
    assert (rounded - y).abs().max() <= 6 * 3 * 2**-9 * y.abs().max()
    torch.testing.assert_close(
        other[0], 8 * torch.linalg.slogdet(weight.bfloat16().double()).logabsdet.float()
    )


def test_squares_become_channels_in_glows_order() -> None:
    x = data(2, 3, 4, 6)
    z = ops.squeeze(x)
    for channel, row, column in [(0, 0, 1), (1, 1, 0), (2, 1, 1)]:
        assert torch.equal(z[:, 4 * channel + 2 * row + column], x[:, channel, row::2, column::2])
    assert torch.equal(ops.unsqueeze(z), x)
    assert ops.unsqueeze(data(1, 18, 2, 2), 3).shape == (1, 2, 6, 6)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: ops.squeeze(data(1, 1, 3, 4)), "x"),
        (lambda: ops.unsqueeze(data(1, 3, 4, 4)), "x"),
        (lambda: ops.squeeze(data(1, 3, 4, 4), 0), "factor"),
        (lambda: ops.actnorm(data(4), data(4), data(4)), "x"),
        (lambda: ops.actnorm(data(2, 4), data(3), data(4)), "log_scale"),
        (lambda: ops.invertible_conv1x1(data(2, 4), data(4, 3)), "weight"),
        (lambda: ops.invertible_conv1x1(data(2, 4), data(4, 4), bias=data(2)), "bias"),
        (lambda: MultiScale((1, 4, 4), [Squeeze(), Squeeze(3)]), "shape"),
        (lambda: MultiScale((3, 4, 4), [Compose([]), Compose([])]), "levels"),
        (lambda: GlowStep(3), "channels"),
        (lambda: GlowConditioner(2, 2, context=1)(data(1, 2, 2, 2).float()), "context"),
    ],
)
def test_errors_name_the_argument(call: Any, named: str) -> None:
    with pytest.raises(ValueError, match=f"^{named}: expected"):
        call()


def test_actnorm_normalises_the_first_batch_of_training_alone() -> None:
    first = 3 * data(16, 3, 4, 4).float() + torch.tensor([1.0, -20.0, 0.0])[:, None, None]
    first[:, 2] = 0.25
    norm = ActNorm(3)
    assert torch.equal(norm.eval()(first)[0], first)
    z, _ = norm.train()(first)
    # Normalised by what is folded into the convolution, as well as by itself.
    folded = InvertibleConv1x1(3, actnorm=True)
    folded(first)
    assert folded.actnorm is not None
    assert torch.equal(folded.actnorm.log_scale, norm.log_scale)
    assert z.mean((0, 2, 3)).abs().max() <= 1e-4
    assert (z[:, :2].var((0, 2, 3), correction=0) - 1).abs().max() <= 1e-4
    assert norm.log_scale[2] == 0
    kept = norm.bias.clone()
    norm(first + 1)
    assert torch.equal(norm.bias, kept)
    other = ActNorm(3)
    other.load_state_dict(norm.state_dict())
    other(first + 1)
    assert torch.equal(other.bias, kept)


def test_an_lu_convolution_starts_as_a_rotation_and_stays_one_number() -> None:
    torch.manual_seed(0)
    lu = InvertibleConv1x1(6).double()
    eye = torch.eye(6, dtype=torch.float64)
    matrix = lu(eye)[0].T
    torch.testing.assert_close(matrix @ matrix.T, eye, rtol=0, atol=1e-6)
    stir(lu)
    matrix = lu(eye)[0].T
    _, logdet = lu(data(2, 6, 3, 5))
    torch.testing.assert_close(logdet[0], 15 * torch.linalg.slogdet(matrix).logabsdet)


MODELS: dict[str, tuple[tuple[int, int, int], Any, dict[str, Any]]] = {
    "lu": ((3, 4, 4), Glow, {"steps": 2}),
    "plain, learned prior": ((1, 8, 8), Glow, {"mixing": "plain", "learned_prior": True}),
    "reverse": ((1, 4, 4), Glow, {"levels": 1, "mixing": "reverse"}),
    "shuffle, anchors": ((1, 4, 4), Glow, {"mixing": "shuffle", "anchor_every": 2}),
    "RealNVP": ((2, 4, 4), RealNVP, {}),
    "RealNVP, anchors": ((1, 4, 4), RealNVP, {"anchor_every": 3}),
}


@pytest.mark.parametrize("name", MODELS)
def test_log_determinants_are_the_jacobians_and_inverses_come_back(name: str) -> None:
    torch.manual_seed(0)
    shape, kind, options = MODELS[name]
    if kind is Glow:
        options = {"levels": 2, "steps": 2, **options}
    model, x = kind(shape, hidden=8, **options).double(), 2 * data(3, *shape) + 1
    model(x)
    stir(model)
    z, logdet = model(x)
    assert z.shape == (3, x[0].numel())
    torch.testing.assert_close(logdet[0], log_determinant(model, x), rtol=0, atol=1e-9)
    back, undone = model.inverse(z)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-9)
    torch.testing.assert_close(undone, -logdet, rtol=0, atol=1e-9)
    wide, single = model.inverse(z)[0], model.float()
    z, logdet = single(x.float())
    assert (single.inverse(z)[0] - wide).abs().max() <= 1e-4
    assert (logdet - -undone).abs().max() <= 1e-4


def test_a_steps_first_log_determinant_has_three_closed_terms() -> None:
    torch.manual_seed(0)
    step, x = GlowStep(6, hidden=8).double(), data(4, 6, 3, 3)
    _, logdet = step(x)
    mix = step.transforms[0]
    assert isinstance(mix, InvertibleConv1x1)
    assert mix.actnorm is not None
    of_mix = 9 * (mix.actnorm.log_scale.sum() + mix.log_abs.sum())
    of_coupling = 9 * 3 * F.logsigmoid(torch.tensor(2.0, dtype=torch.float64))
    torch.testing.assert_close(logdet, (of_mix + of_coupling).expand(4), rtol=1e-14, atol=0)


def test_the_second_half_of_the_channels_is_done_first() -> None:
    levels: list[Transform] = [Squeeze(), Compose([Squeeze()]), Compose([])]
    model, x = MultiScale((2, 8, 8), levels), data(2, 2, 8, 8)
    z, logdet = model(x)
    first = ops.squeeze(x)
    second = ops.squeeze(first[:, :4])
    done = [first[:, 4:], second[:, 8:], second[:, :8]]
    assert torch.equal(z, torch.cat([part.flatten(1) for part in done], 1))
    assert torch.equal(model.inverse(z)[0], x)
    assert torch.equal(logdet, torch.zeros(2, dtype=torch.float64))


def test_a_prior_coupling_is_a_normal_of_the_other_half() -> None:
    prior, x = prior_coupling(4).double(), data(3, 4, 2, 2)
    assert torch.equal(prior(x)[0], x)
    stir(prior)
    shift, log_scale = prior.conditioner(x[:, :2]).chunk(2, 1)
    z, logdet = prior(x)
    found = StandardNormal(8).log_prob(z[:, 2:].flatten(1)) + logdet
    normal = torch.distributions.Normal(-shift, (-log_scale).exp())
    torch.testing.assert_close(found, normal.log_prob(x[:, 2:]).flatten(1).sum(1))


def test_checkerboards_take_turns() -> None:
    even, odd = checkerboard_mask(3, 4), checkerboard_mask(3, 4, odd=True)
    assert even.shape == (1, 3, 4)
    assert bool(even[0, 0, 0])
    assert torch.equal(even, ~odd)
    assert not (even[0, 1:] & even[0, :-1]).any()
    assert not (even[0, :, 1:] & even[0, :, :-1]).any()


def test_a_glow_is_a_density_with_context() -> None:
    torch.manual_seed(0)
    flow = Flow(Glow((1, 4, 4), 1, 2, hidden=8, context=3), StandardNormal(16)).double()
    x, context = data(5, 1, 4, 4), data(5, 3, seed=2).requires_grad_()
    flow.log_prob(x, context)
    stir(flow)
    (grad,) = torch.autograd.grad(flow.log_prob(x, context).sum(), context)
    assert (grad != 0).any(1).all()
    drawn, log_prob = flow.sample_and_log_prob(2, context, torch.Generator().manual_seed(0))
    assert drawn.shape == (5, 2, 1, 4, 4)
    rows = context.repeat_interleave(2, 0)
    torch.testing.assert_close(flow.log_prob(drawn.flatten(0, 1), rows), log_prob.flatten())


def test_anchors_change_no_name_in_a_checkpoint() -> None:
    shape = (1, 4, 4)
    stored, inverted = Glow(shape, 1, 2, hidden=4), Glow(shape, 1, 2, hidden=4, anchor_every=1)
    inverted.load_state_dict(stored.state_dict())
    x = data(2, *shape).float()
    assert torch.equal(stored(x)[0], inverted(x)[0])


def test_an_image_of_another_shape_is_refused() -> None:
    flow = Glow((3, 8, 8), levels=2, steps=1, hidden=4)
    with pytest.raises(ValueError, match="x: expected"):
        flow(torch.zeros(2, 1, 8, 8))
    with pytest.raises(ValueError, match="z: expected"):
        flow.inverse(torch.zeros(2, 100))
