"""Inverted sequences against the same transforms with stored activations."""

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastzoo.nn.flows import (
    MLP,
    AdditiveCoupling,
    AffineCoupling,
    Compose,
    GlowConditioner,
    GlowStep,
    InvertibleSequence,
    SplineCoupling,
    Squeeze,
    Transform,
    spline_parameters,
)
from fastzoo.testing.timing import peak_memory

DEPTH = 5


def stirred(module: nn.Module, scale: float = 0.1) -> nn.Module:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.add_(noise, alpha=scale)
    return module


def alternating(make: Callable[[dict[str, Any]], Transform]) -> list[Transform]:
    return [make({"split": 3 if i % 2 else -3}) for i in range(DEPTH)]


def network(outputs: int) -> MLP:
    return MLP(3, outputs, (16,), context=2, activation="tanh")


MASK = torch.tensor([True, False, True, True, False, False])
STACKS: dict[str, Callable[[], list[Transform]]] = {
    "additive": lambda: alternating(lambda side: AdditiveCoupling(network(3), **side)),
    "affine": lambda: alternating(
        lambda side: AffineCoupling(network(6), scale_map="tanh", **side)
    ),
    "mask": lambda: [
        AffineCoupling(network(6), mask=MASK if i % 2 else ~MASK) for i in range(DEPTH)
    ],
    "spline": lambda: alternating(
        lambda side: SplineCoupling(network(3 * spline_parameters(4)), bins=4, **side)
    ),
    "Glow": lambda: [Squeeze(), *(GlowStep(4, hidden=8, context=2) for _ in range(DEPTH))],
    "nested": lambda: [
        Compose([Squeeze(), GlowStep(4, hidden=8, context=2)]),
        Compose([InvertibleSequence([GlowStep(4, hidden=8, context=2)])]),
    ],
}


def batch(name: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (4, 1, 4, 4) if name in ("Glow", "nested") else (7, 6)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    return x, torch.randn(len(x), 2, generator=generator, dtype=torch.float64)


def made(name: str, **options: Any) -> tuple[Compose, InvertibleSequence]:
    torch.manual_seed(0)
    stored = Compose(STACKS[name]()).double()
    x, context = batch(name)
    stored(x, context)
    stirred(stored)
    inverted = InvertibleSequence(copy.deepcopy(stored).transforms, **options)
    assert inverted.state_dict().keys() == stored.state_dict().keys()
    return stored, inverted


def trained(
    transform: Transform, x: Tensor, context: Tensor | None, inverse: bool = False
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Results, and the gradients of input, context and parameters."""
    leaves = [t.detach().requires_grad_() for t in (x, context) if t is not None]
    z, logdet = (transform.inverse if inverse else transform)(*leaves)
    loss = (z.square() * torch.arange(z.numel(), dtype=z.dtype).view(z.shape)).sum() - logdet.sum()
    return z, logdet, list(torch.autograd.grad(loss, [*leaves, *transform.parameters()]))


def assert_same(found: list[Tensor], right: list[Tensor], bound: float) -> None:
    """The greatest difference over the greatest absolute value of each tensor."""
    assert len(found) == len(right)
    for one, other in zip(found, right, strict=True):
        assert (one - other).abs().max() <= bound * other.abs().max()


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("anchor_every", [None, 1, 3])
@pytest.mark.parametrize("name", STACKS)
def test_gradients_are_those_of_stored_activations(
    name: str, anchor_every: int | None, inverse: bool
) -> None:
    stored, inverted = made(name, anchor_every=anchor_every)
    x, context = batch(name)
    if inverse:
        x = stored(x, context)[0].detach()
    z, logdet, right = trained(stored, x, context, inverse)
    found = trained(inverted, x, context, inverse)
    assert torch.equal(found[0], z)
    # Composed parts are added up in another order.
    torch.testing.assert_close(found[1], logdet, rtol=0, atol=1e-12)
    assert_same(found[2], right, 1e-9)
    assert 0 < inverted.reconstruction_error < 1e-11
    with torch.no_grad():
        again = (inverted.inverse if inverse else inverted)(x, context)
    assert torch.equal(again[0], found[0])
    assert torch.equal(again[1], found[1])


@pytest.mark.parametrize("name", ["additive", "affine", "spline"])
def test_in_single_precision_gradients_are_off_by_the_rounding(name: str) -> None:
    stored, inverted = made(name)
    x, context = (t.float() for t in batch(name))
    *_, right = trained(stored.float(), x, context)
    *_, found = trained(inverted.float(), x, context)
    assert_same(found, right, 1e-4)
    assert inverted.reconstruction_error < 1e-5


class Steep(Transform):
    """``x e^-25 + 1``, of whose result x cannot be told; and how often it ran each way."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(-25.0))
        self.ran = {"forward": 0, "inverse": 0}

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self.ran["forward"] += 1
        logdet = self.log_scale * x[0].numel()
        return x * self.log_scale.exp() + 1, logdet.expand(len(x))

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self.ran["inverse"] += 1
        logdet = -self.log_scale * z[0].numel()
        return (z - 1) * (-self.log_scale).exp(), logdet.expand(len(z))


def with_steep(**options: Any) -> tuple[Compose, InvertibleSequence, Steep]:
    stored, _ = made("affine")
    layers = [*stored.transforms[:3], Steep(), *stored.transforms[3:]]
    stored = Compose(layers).float()
    inverted = InvertibleSequence(copy.deepcopy(stored).transforms, anchor_every=2, **options)
    steep = inverted.transforms[3]
    assert isinstance(steep, Steep)
    return stored, inverted, steep


def test_a_segment_that_cannot_be_inverted_is_computed_again_from_its_anchor() -> None:
    stored, inverted, steep = with_steep()
    x, context = (t.float() for t in batch("affine"))
    *_, right = trained(stored, x, context)
    with pytest.warns(UserWarning, match="segment 1 was reconstructed with a relative error"):
        *_, found = trained(inverted, x, context)
    # From the exact inputs of each layer: the same operations in the same order.
    assert_same(found, right, 1e-6)
    # Once forwards, once each for the wrong gradients and the right ones: its own result is not
    # needed to find the inputs of the segment, as it is the last one there.
    assert steep.ran == {"forward": 3, "inverse": 1}
    first, second, third = inverted.segment_errors
    assert inverted.reconstruction_error == second > 1e-3
    assert max(first, third) < 1e-5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trained(inverted, x, context)


def test_errors_may_raise_or_be_ignored() -> None:
    stored, inverted, _ = with_steep(on_error="raise")
    x, context = (t.float() for t in batch("affine"))
    with pytest.raises(RuntimeError, match="segment 1 was reconstructed"):
        trained(inverted, x, context)
    inverted.tolerance = float("inf")
    *_, right = trained(stored, x, context)
    *_, found = trained(inverted, x, context)
    assert (found[0] - right[0]).abs().max() > 1e-2 * right[0].abs().max()
    _, ignoring, _ = with_steep(on_error="ignore")
    *_, same = trained(ignoring, x, context)
    assert_same(same, found, 0)
    assert ignoring.reconstruction_error > 1e-3


def test_what_is_not_finite_is_beyond_any_tolerance() -> None:
    stored, inverted, steep = with_steep(tolerance=1e30)
    x, context = (t.float() for t in batch("affine"))
    with torch.no_grad():
        # exp(-log_scale) overflows.
        for one in (stored.transforms[3], steep):
            one.log_scale.fill_(-95.0)
    with pytest.warns(UserWarning, match="relative error of"):
        *_, found = trained(inverted, x, context)
    *_, right = trained(stored, x, context)
    assert all(bool(grad.isfinite().all()) for grad in right)
    assert_same(found, right, 1e-6)


def test_dropout_is_drawn_again_and_the_callers_numbers_stay() -> None:
    def dropped(step: GlowStep) -> GlowStep:
        coupling = step.transforms[1]
        assert isinstance(coupling, AffineCoupling)
        coupling.conditioner = nn.Sequential(coupling.conditioner, nn.Dropout(0.5))
        return step

    torch.manual_seed(0)
    stored = Compose([dropped(GlowStep(4, hidden=8)) for _ in range(4)]).double()
    x = batch("Glow")[0].view(4, 4, 2, 2)
    stored(x)
    stirred(stored)
    inverted = InvertibleSequence(copy.deepcopy(stored).transforms, anchor_every=2)
    torch.manual_seed(7)
    *_, right = trained(stored, x, None)
    after = torch.rand(3)
    torch.manual_seed(7)
    *_, found = trained(inverted, x, None)
    assert torch.equal(torch.rand(3), after)
    assert_same(found, right, 1e-9)
    inverted.preserve_rng_state = False
    with pytest.warns(UserWarning, match="reconstructed"):
        trained(inverted, x, None)


def test_autocast_is_entered_again() -> None:
    torch.manual_seed(0)
    stored = Compose([GlowStep(4, hidden=8) for _ in range(4)])
    x = batch("Glow")[0].view(4, 4, 2, 2).float()
    stored(x)
    stirred(stored)
    inverted = InvertibleSequence(copy.deepcopy(stored).transforms)
    seen = []
    for step in inverted.transforms:
        conditioner = step.transforms[1].conditioner
        conditioner.register_forward_hook(lambda *_: seen.append(_[2].dtype))
    found = []
    for transform in (stored, inverted):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            z, logdet = transform(leaf)
            # Weights cast without a gradient are not met again by what needs theirs.
            last = transform.transforms[-1].transforms[1].conditioner(x[:, :2])
        assert z.dtype == torch.float32
        loss = z.square().sum() - logdet.sum() + 1e3 * last.sum()
        found.append(torch.autograd.grad(loss, [leaf, *transform.parameters()]))
    assert seen == 9 * [torch.bfloat16]
    # Eight convolutions, whose roundings fall differently.
    assert_same(list(found[1]), list(found[0]), 8 * 2**-8)


def test_a_backward_may_be_repeated_and_needs_its_parameters_unchanged() -> None:
    _, inverted = made("affine")
    x, context = batch("affine")
    parameters = list(inverted.parameters())
    loss = inverted(x, context)[0].square().sum()
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    again = torch.autograd.grad(loss, parameters, retain_graph=True)
    assert_same(list(again), list(first), 0)
    with pytest.raises(RuntimeError, match="create_graph=True"):
        torch.autograd.grad(loss, parameters, create_graph=True)
    with torch.no_grad():
        parameters[0].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, parameters)


def test_parameters_of_a_functional_call_are_refused() -> None:
    _, inverted = made("affine")
    others = {name: p.detach().clone().requires_grad_() for name, p in inverted.named_parameters()}
    z, _ = torch.func.functional_call(inverted, others, batch("affine"))
    with pytest.raises(RuntimeError, match="others than in the forward pass"):
        z.sum().backward()


def test_parameters_that_are_not_trained_and_empty_batches() -> None:
    stored, inverted = made("affine")
    x, context = batch("affine")
    for transform in (stored, inverted):
        transform.transforms[1].requires_grad_(False)
    for transform in (stored, inverted):
        transform(x, context)[0].square().sum().backward()
    pairs = zip(inverted.parameters(), stored.parameters(), strict=True)
    for found, right in pairs:
        assert (found.grad is None) == (right.grad is None)
        if right.grad is not None:
            assert found.grad is not None
            assert_same([found.grad], [right.grad], 1e-9)
    z, logdet = inverted(x[:0], context[:0])
    (z.sum() + logdet.sum()).backward()
    assert inverted.reconstruction_error == 0


def parts(depth: int) -> Iterator[Transform]:
    torch.manual_seed(0)
    for i in range(depth):
        split = 4 if i % 2 else -4
        yield AffineCoupling(GlowConditioner(4, 8, 32), split=split, scale_map="tanh", bound=0.1)


def test_memory_hardly_grows_with_depth() -> None:
    x = torch.randn(8, 8, 32, 32, generator=torch.Generator().manual_seed(0))

    def needed(transform: Transform) -> int:
        def step() -> None:
            z, logdet = transform(x)
            (z.square().sum() - logdet.sum()).backward()

        return peak_memory(step, "cpu")

    needed(Compose(parts(1)))
    few = needed(InvertibleSequence(parts(8), anchor_every=None))
    many = needed(InvertibleSequence(parts(64), anchor_every=None))
    stored = needed(Compose(parts(32)))
    # 56 layers more add the gradients of their parameters, and what malloc leaves between them;
    # kept, their activations would be twice those of 32.
    assert many - few <= stored / 4
    assert many <= stored / 2
