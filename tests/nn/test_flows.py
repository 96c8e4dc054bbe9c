"""Transforms against autograd's Jacobian and their own formulas, distributions against
torch.distributions, flows against nflows."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Normal, TransformedDistribution
from torch.distributions import transforms as maps

from fastzoo.nn import flows
from fastzoo.nn.flows import (
    MLP,
    AdditiveCoupling,
    AffineCoupling,
    BatchNorm,
    Compose,
    Flow,
    Inverse,
    Logit,
    Permutation,
    Reverse,
    Scaling,
    SoftClip,
    SplineCoupling,
    StandardNormal,
    Transform,
    spline_identity,
)

CHECKERBOARD = torch.tensor([[[True, False], [False, True]]])
ODD = torch.tensor([False, True, False, True, False])


def stirred(module: nn.Module, seed: int = 0) -> nn.Module:
    """In double, with parameters and moments that start nowhere in particular."""
    generator = torch.Generator().manual_seed(seed)
    module = module.double()
    with torch.no_grad():
        for value in module.parameters():
            value.copy_(torch.randn(value.shape, generator=generator) * 0.3)
        for name, value in module.named_buffers():
            if "running" in name:
                value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
    return module.eval()


def data(*shape: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def convolution(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inputs, 6, 1), nn.Tanh(), nn.Conv2d(6, outputs, 1))


TRANSFORMS: dict[str, tuple[Callable[[], Transform], tuple[int, ...]]] = {
    "additive": (lambda: AdditiveCoupling(MLP(2, 3, (8,), context=1), split=2), (5,)),
    "affine": (lambda: AffineCoupling(MLP(2, 6, (8,), context=1), split=-2), (5,)),
    "affine, a mask": (lambda: AffineCoupling(MLP(2, 6, (8,), context=1), mask=ODD), (5,)),
    "affine, Glow's": (
        lambda: AffineCoupling(
            convolution(1, 4),
            split=1,
            scale_map="sigmoid2",
            shift_first=True,
            interleaved=True,
        ),
        (3, 2, 2),
    ),
    "affine, a checkerboard": (
        lambda: AffineCoupling(convolution(2, 4), mask=CHECKERBOARD, scale_map="tanh"),
        (2, 2, 2),
    ),
    "spline": (lambda: SplineCoupling(MLP(2, 3 * 8, (8,), context=1), split=2, bins=3), (5,)),
    "spline, zuko's, a mask": (
        lambda: SplineCoupling(MLP(2, 33, (8,), context=1), mask=ODD, bins=4, convention="zuko"),
        (5,),
    ),
    "spline, an image": (
        lambda: SplineCoupling(convolution(1, 2 * 9), split=-1, bins=3, tails="circular"),
        (3, 2, 2),
    ),
    "soft clip": (lambda: SoftClip(2.0), (5,)),
    "logit": (lambda: Compose([SoftClip(0.4), Inverse(Logit(0.0)), Logit(0.05)]), (5,)),
    "leaky": (lambda: flows.LeakyReLU(0.3), (5,)),
    "scaling": (lambda: Scaling((3, 1, 1)), (3, 2, 2)),
    "batch norm": (lambda: BatchNorm(3), (3, 2, 2)),
    "permutation": (lambda: Permutation([2, 0, 3, 1, 4]), (5,)),
    "reverse": (lambda: Reverse(), (5,)),
    "radial": (lambda: flows.Radial(5), (5,)),
    "several": (
        lambda: Compose(
            [
                AffineCoupling(MLP(2, 6, (8,), context=1), split=2),
                BatchNorm(5),
                Permutation.random(5, torch.Generator().manual_seed(0)),
                Inverse(SplineCoupling(MLP(3, 2 * 8, (8,), context=1), split=-3, bins=3)),
            ]
        ),
        (5,),
    ),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transform_is_a_bijection_with_its_own_jacobian(name: str) -> None:
    build, shape = TRANSFORMS[name]
    transform = stirred(build())
    x = data(3, *shape)
    context = data(3, 1) if len(shape) == 1 else None
    z, logdet = transform(x, context)
    assert z.shape == x.shape
    assert logdet.shape == (3,)
    back, opposite = transform.inverse(z, context)
    # The log-odds of a uniform variable's logit lose a few digits of double.
    torch.testing.assert_close(back, x, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(opposite, -logdet, rtol=1e-9, atol=1e-9)
    for row in range(3):
        own = None if context is None else context[row : row + 1]

        def alone(value: Tensor, own: Tensor | None = own) -> Tensor:
            mapped: Tensor = transform(value[None], own)[0][0]
            return mapped

        jacobian = torch.autograd.functional.jacobian(alone, x[row]).view(x[row].numel(), -1)
        torch.testing.assert_close(torch.linalg.slogdet(jacobian)[1], logdet[row])


def test_affine_couplings_read_shifts_and_scales_where_they_lie() -> None:
    x = data(4, 5)
    net = stirred(MLP(2, 6))
    parameters = net(x[:, 3:])
    wanted = x[:, :3] * parameters[:, 3:].exp() + parameters[:, :3]
    z, logdet = AffineCoupling(net, split=-2)(x)
    torch.testing.assert_close(z, torch.cat([wanted, x[:, 3:]], 1))
    torch.testing.assert_close(logdet, parameters[:, 3:].sum(1))
    wanted = x[:, :3] * parameters[:, 1::2].exp() + parameters[:, ::2]
    z, _ = AffineCoupling(net, split=-2, interleaved=True)(x)
    torch.testing.assert_close(z, torch.cat([wanted, x[:, 3:]], 1))


def test_a_mask_of_features_passes_those_and_reads_those_alone() -> None:
    x = data(4, 5)
    net = stirred(MLP(2, 3))
    wanted = x.clone()
    wanted[:, ~ODD] += net(x[:, ODD])
    z, _ = AdditiveCoupling(net, mask=ODD)(x)
    assert torch.equal(z, wanted)


def test_a_mask_of_elements_is_real_nvps_equation() -> None:
    x = data(2, 2, 2, 2)
    net = stirred(convolution(2, 4))
    b = CHECKERBOARD.double()
    t, s = net(b * x).chunk(2, 1)
    z, logdet = AffineCoupling(net, mask=CHECKERBOARD, scale_map="exp")(x)
    torch.testing.assert_close(z, b * x + (1 - b) * (x * s.exp() + t))
    torch.testing.assert_close(logdet, ((1 - b) * s).flatten(1).sum(1))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_splines_of_images_are_those_of_pixels(memory_format: torch.memory_format) -> None:
    transform = stirred(SplineCoupling(convolution(1, 2 * 8), split=1, bins=3))
    x = data(2, 3, 2, 4).to(memory_format=memory_format)
    z, logdet = transform(x)
    first, last = transform.conditioner[0], transform.conditioner[2]
    perceptron = nn.Sequential(nn.Linear(1, 6), nn.Tanh(), nn.Linear(6, 16)).double()
    for linear, layer in ((perceptron[0], first), (perceptron[2], last)):
        linear.load_state_dict({"weight": layer.weight[..., 0, 0], "bias": layer.bias})
    pixels = SplineCoupling(perceptron, split=1, bins=3)
    wanted, each = pixels(x.movedim(1, -1).reshape(-1, 3))
    torch.testing.assert_close(z.movedim(1, -1).reshape(-1, 3), wanted)
    torch.testing.assert_close(logdet, each.view(2, 8).sum(1))


@pytest.mark.parametrize(
    "build",
    [
        lambda: AffineCoupling(MLP(2, 4), split=2),
        lambda: AffineCoupling(MLP(2, 4), split=-2, scale_map="softclip"),
        lambda: AdditiveCoupling(MLP(2, 2), split=2),
        lambda: SplineCoupling(MLP(2, 46, start=spline_identity(8)), split=2),
        lambda: SplineCoupling(
            MLP(2, 48, start=spline_identity(8, "circular")), split=2, tails="circular"
        ),
        lambda: SplineCoupling(
            MLP(2, 46, start=spline_identity(8, convention="zuko")), split=2, convention="zuko"
        ),
    ],
)
def test_couplings_start_as_the_identity(build: Callable[[], Transform]) -> None:
    transform = build()
    x = data(64, 4).float()
    z, logdet = transform(x)
    # Each knot has a rounding of its softmax's sum, of a domain that is 10 wide.
    torch.testing.assert_close(z, x, rtol=0, atol=1e-5)
    torch.testing.assert_close(logdet, torch.zeros(64), rtol=0, atol=1e-5)
    z.sum().backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in transform.parameters())


def test_orders_are_of_features() -> None:
    x = data(2, 4, 3)
    assert torch.equal(Permutation([2, 0, 3, 1])(x)[0], x[:, [2, 0, 3, 1]])
    assert torch.equal(Reverse()(x)[0], x[:, [3, 2, 1, 0]])
    drawn = [Permutation.random(9, torch.Generator().manual_seed(5)).order for _ in range(2)]
    assert torch.equal(*drawn)
    assert torch.equal(drawn[0].sort().values, torch.arange(9))
    assert not torch.equal(drawn[0], torch.arange(9))


def test_nice_has_the_volume_of_its_scaling() -> None:
    layers = [AdditiveCoupling(MLP(4, 4), split=4 if i % 2 else -4) for i in range(4)]
    transform = stirred(Compose([*layers, Scaling(8)]))
    _, logdet = transform(data(5, 8))
    scaling = transform.transforms[-1]
    assert isinstance(scaling, Scaling)
    assert torch.equal(logdet, scaling.log_scale.sum().expand(5))


def test_batch_norm_takes_the_batchs_moments_in_training() -> None:
    x = data(6, 3, 2, 2).requires_grad_()
    ours, theirs = BatchNorm(3).double(), nn.BatchNorm2d(3, affine=False).double()
    z, logdet = ours(x)
    torch.testing.assert_close(z, theirs(x))
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    variance = x.var((0, 2, 3), correction=0)
    wanted = -0.5 * 4 * (variance + 1e-5).log().sum()
    torch.testing.assert_close(logdet, wanted.expand(6))
    torch.testing.assert_close(
        *(
            torch.autograd.grad(value.sum(), x, retain_graph=True)[0]
            for value in (logdet, wanted * 6)
        )
    )
    with pytest.raises(RuntimeError, match="no inverse in training"):
        ours.inverse(z)


def mixture(dimensions: int = 2, context: int = 0) -> Flow:
    """A flow with an affine, a spline and a permuted coupling."""
    half = dimensions // 2
    rest = dimensions - half
    return Flow(
        [
            AffineCoupling(MLP(half, 2 * rest, (8,), context=context), split=half),
            SplineCoupling(MLP(rest, half * 11, (8,), context=context), split=-rest, bins=4),
            Permutation(range(dimensions)[::-1]),
            Scaling(dimensions),
            AffineCoupling(MLP(half, 2 * rest, (8,), context=context), split=half),
        ],
        StandardNormal(dimensions),
    )


def test_a_density_in_the_plane_has_mass_one() -> None:
    flow = stirred(mixture(), seed=3)
    side = torch.linspace(-12, 12, 241, dtype=torch.float64)
    with torch.no_grad():
        mass = flow.log_prob(torch.cartesian_prod(side, side)).exp().sum() * 0.1**2
    assert abs(mass.item() - 1) < 1e-4


def test_samples_have_their_own_density() -> None:
    flow = stirred(mixture(3))
    x, log_prob = flow.sample_and_log_prob(7, generator=torch.Generator().manual_seed(0))
    assert x.shape == (7, 3)
    torch.testing.assert_close(flow.log_prob(x), log_prob)
    again = flow.sample(7, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again, x)
    z, _ = flow(x)
    torch.testing.assert_close(flow.inverse(z)[0], x)
    assert x.requires_grad


def test_nothing_has_a_density_too() -> None:
    flow = mixture(3)
    x, log_prob = flow.sample_and_log_prob(0)
    assert x.shape == (0, 3)
    assert flow.log_prob(x).shape == log_prob.shape == (0,)


def test_each_row_of_a_context_has_its_own_samples() -> None:
    flow = stirred(mixture(3, context=2))
    assert isinstance(flow, Flow)
    context = data(4, 2)
    x, log_prob = flow.sample_and_log_prob(6, context)
    assert x.shape == (4, 6, 3)
    for row in range(4):
        own = context[row].expand(6, 2)
        torch.testing.assert_close(flow.log_prob(x[row], own), log_prob[row])
    embedded = Flow(flow.transform, flow.base, nn.Linear(5, 2).double())
    wide = data(4, 5)
    torch.testing.assert_close(
        embedded.log_prob(x[:, 0], wide), flow.log_prob(x[:, 0], embedded.embedding(wide))
    )
    assert embedded.sample(3, wide).shape == (4, 3, 3)


@pytest.mark.filterwarnings("ignore:Inputs to the softmax")
def test_a_flow_is_nflows_with_the_same_weights() -> None:
    pytest.importorskip("nflows")
    from nflows.distributions import StandardNormal as TheirNormal
    from nflows.flows import Flow as TheirFlow
    from nflows.transforms import AffineCouplingTransform, CompositeTransform
    from nflows.transforms import PiecewiseRationalQuadraticCouplingTransform as TheirSpline

    class Net(nn.Module):
        def __init__(self, inputs: int, outputs: int) -> None:
            super().__init__()
            self.net = MLP(inputs, outputs, (8,), context=2)

        def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
            found: Tensor = self.net(x, context)
            return found

    theirs = TheirFlow(
        CompositeTransform(
            [
                AffineCouplingTransform([0, 1, 0, 1, 1], Net),
                TheirSpline([1, 1, 0, 0, 0], Net, num_bins=4, tails="linear", tail_bound=3.0),
            ]
        ),
        TheirNormal([5]),
    )
    stirred(theirs)
    affine, spline = (t.transform_net for t in theirs._transform._transforms)
    ours = Flow(
        [
            AffineCoupling(
                affine,
                mask=torch.tensor([True, False, True, False, False]),
                scale_map="sigmoid2",
                min_scale=1e-3,
            ),
            SplineCoupling(spline, split=-3, bins=4, bound=3.0),
        ],
        StandardNormal(5),
    )
    x, context = data(32, 5), data(32, 2)
    torch.testing.assert_close(ours.log_prob(x, context), theirs.log_prob(x, context))


def test_a_flow_keeps_its_state() -> None:
    flow = stirred(mixture(4))
    other = mixture(4).double().eval()
    x = data(3, 4)
    assert not torch.equal(other.log_prob(x), flow.log_prob(x))
    other.load_state_dict(flow.state_dict())
    assert torch.equal(other.log_prob(x), flow.log_prob(x))
    assert torch.equal(copy.deepcopy(flow).log_prob(x), flow.log_prob(x))


def test_a_flow_compiles_into_one_graph() -> None:
    flow = stirred(mixture(3)).float()
    x = data(4, 3).float()
    compiled = torch.compile(flow.log_prob, fullgraph=True, backend="eager")
    wanted, found = flow.log_prob(x), compiled(x)
    torch.testing.assert_close(found, wanted)
    parameters = list(flow.parameters())
    for ours, theirs in zip(
        torch.autograd.grad(found.sum(), parameters),
        torch.autograd.grad(wanted.sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def logistic() -> TransformedDistribution:
    unit = torch.distributions.Uniform(torch.zeros(()).double(), torch.ones(()).double())
    return TransformedDistribution(unit, maps.SigmoidTransform().inv)


def learned() -> tuple[flows.Base, torch.distributions.Distribution]:
    base = stirred(flows.DiagonalNormal((2, 3)))
    assert isinstance(base, flows.DiagonalNormal)
    return base, Normal(base.mean, base.log_scale.exp())


BASES: dict[str, Callable[[], tuple[flows.Base, torch.distributions.Distribution]]] = {
    "standard": lambda: (
        StandardNormal((2, 3)).double(),
        Normal(torch.zeros(()).double(), torch.ones(()).double()),
    ),
    "learned": learned,
    "logistic": lambda: (flows.Logistic((2, 3)).double(), logistic()),
    "uniform": lambda: (
        flows.Uniform((2, 3), -1.5, 2.0).double(),
        torch.distributions.Uniform(
            torch.tensor(-1.5).double(), torch.tensor(2.0).double(), validate_args=False
        ),
    ),
}


@pytest.mark.parametrize("name", BASES)
def test_distributions_are_torchs(name: str) -> None:
    base, theirs = BASES[name]()
    z = data(50, 2, 3)
    torch.testing.assert_close(base.log_prob(z), theirs.log_prob(z).sum((1, 2)))
    drawn, log_prob = base.sample_and_log_prob(20_000, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(log_prob, base.log_prob(drawn))
    spread = drawn.std(0)
    mean = theirs.mean if name != "logistic" else torch.zeros(())
    wanted = theirs.stddev if name != "logistic" else torch.tensor(math.pi / math.sqrt(3))
    # Five standard errors; a logistic's fourth moment is 4.2 times its squared variance.
    assert ((drawn.mean(0) - mean) / spread).abs().max() < 5 / math.sqrt(20_000)
    assert (spread / wanted - 1).abs().max() < 5 * math.sqrt(0.8 / 20_000)
    narrow = base.sample(20_000, generator=torch.Generator().manual_seed(3), temperature=0.5)
    torch.testing.assert_close(narrow.std(0), spread / 2)


@pytest.mark.parametrize("seed", [0, 2, 4])
def test_planar_maps_are_their_formula(seed: int) -> None:
    transform = stirred(flows.Planar(3), seed)
    assert isinstance(transform, flows.Planar)
    with torch.no_grad():
        transform.u.mul_(10)  # w.u is 3.8, -0.5 and -1.8, with which the plain formula folds.
    w, u, b = transform.w, transform.u, transform.b
    moved = u + (F.softplus(w @ u) - 1 - w @ u) * w / w.square().sum()
    x = data(4, 3)
    z, logdet = transform(x)
    torch.testing.assert_close(z, x + moved * torch.tanh(x @ w + b)[:, None])
    for row in range(4):
        jacobian = torch.autograd.functional.jacobian(lambda v: transform(v[None])[0][0], x[row])
        sign, wanted = torch.linalg.slogdet(jacobian)
        assert sign == 1
        torch.testing.assert_close(logdet[row], wanted)
    with pytest.raises(NotImplementedError, match="Planar has no inverse"):
        transform.inverse(z)
    flow = Flow(Inverse(transform), StandardNormal(3).double())
    drawn, log_prob = flow.sample_and_log_prob(5, generator=torch.Generator().manual_seed(0))
    noise = flow.base.sample(5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(drawn, transform(noise)[0])
    torch.testing.assert_close(log_prob, flow.base.log_prob(noise) - transform(noise)[1])


def test_radial_maps_are_their_formula() -> None:
    transform = stirred(flows.Radial(3))
    assert isinstance(transform, flows.Radial)
    x = data(4, 3)
    alpha = F.softplus(transform.raw_alpha)
    beta = F.softplus(transform.raw_beta) - alpha
    away = x - transform.center
    wanted = x + beta * away / (alpha + away.norm(dim=1, keepdim=True))
    torch.testing.assert_close(transform(x)[0], wanted)
    # Contracting and spreading ones, at the center and far from it.
    for raw in (-6.0, 6.0):
        with torch.no_grad():
            transform.raw_beta.fill_(raw)
        points = torch.cat([transform.center[None], x, 1e9 * x]).detach().requires_grad_()
        z, _ = transform(points)
        back, logdet = transform.inverse(z)
        torch.testing.assert_close(back, points, rtol=1e-9, atol=1e-9)
        assert torch.autograd.grad(back.sum() + logdet.sum(), points)[0].isfinite().all()


def test_a_conditional_normal_reads_its_context() -> None:
    base = stirred(flows.ConditionalDiagonalNormal((2, 2), nn.Linear(3, 8)))
    assert isinstance(base, flows.ConditionalDiagonalNormal)
    context, z = data(5, 3), data(5, 2, 2)
    assert base.context_encoder is not None
    mean, log_scale = base.context_encoder(context).view(5, 2, 2, 2).unbind(1)
    wanted = Normal(mean, log_scale.exp()).log_prob(z).sum((1, 2))
    torch.testing.assert_close(base.log_prob(z, context), wanted)
    drawn, log_prob = base.sample_and_log_prob(9, context)
    assert drawn.shape == (5, 9, 2, 2)
    for row in range(5):
        own = context[row].expand(9, 3)
        torch.testing.assert_close(base.log_prob(drawn[row], own), log_prob[row])
    with pytest.raises(ValueError, match="context"):
        base.log_prob(z)


def test_half_data_have_float32_densities() -> None:
    x = data(3, 4).half()
    flow = Flow([SoftClip(8.0), Reverse()], StandardNormal(4))
    assert flow.log_prob(x).dtype == Reverse()(x)[1].dtype == torch.float32
    wanted = Flow([SoftClip(8.0)], StandardNormal(4)).double().log_prob(x.double())
    torch.testing.assert_close(flow.log_prob(x), wanted.float(), rtol=0, atol=4 * 2e-3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: AffineCoupling(MLP(2, 2)), "split, mask"),
        (lambda: AffineCoupling(MLP(2, 2), split=1, mask=ODD), "split, mask"),
        (lambda: AffineCoupling(MLP(2, 2), mask=ODD & False), "elements that pass"),
        (lambda: AffineCoupling(MLP(2, 3), split=2)(torch.zeros(1, 4)), "a shift and a scale"),
        (lambda: AffineCoupling(MLP(2, 6), split=2)(torch.zeros(1, 4)), "shift: expected"),
        (lambda: SplineCoupling(MLP(2, 6), mask=CHECKERBOARD), "mask: expected one of features"),
        (lambda: Permutation([0, 0, 2]), "each of the features once"),
        (lambda: StandardNormal(3).log_prob(torch.zeros(2, 4)), r"expected \[B, 3\]"),
        (lambda: MLP(2, 2, activation="sine"), "activation"),
    ],
)
def test_mistakes_are_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
