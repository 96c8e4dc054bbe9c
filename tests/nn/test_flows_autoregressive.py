"""Masked autoregressive maps against autograd's Jacobian and zuko's."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastzoo.nn.flows import (
    MAF,
    NSF,
    Flow,
    Inverse,
    MaskedAutoregressive,
    MaskedMLP,
    StandardNormal,
)
from tests.nn.test_flows import data, stirred

MAPS: dict[str, Callable[[], MaskedAutoregressive]] = {
    "affine": lambda: MaskedAutoregressive(4, (7, 6)),
    "a context and an order": lambda: MaskedAutoregressive(
        4, (9, 5, 8), context=3, order=[2, 0, 3, 1], activation="elu", scale_map="sigmoid2"
    ),
    "spline": lambda: MaskedAutoregressive(4, (8,), univariate="spline", bins=3, bound=3.0),
    "zuko's spline, two passes": lambda: MaskedAutoregressive(
        4, (8, 8), context=3, univariate="spline", bins=4, convention="zuko", passes=2
    ),
    "no hidden layer": lambda: MaskedAutoregressive(
        4, (), context=3, order=[3, 2, 1, 0], scale_map="softplus", min_scale=0.1
    ),
    "fewer units than steps": lambda: MaskedAutoregressive(4, (2,), scale_map="tanh", bound=1.5),
    "one feature of a context": lambda: MaskedAutoregressive(1, (5,), context=3),
}


@pytest.mark.parametrize("name", MAPS)
def test_the_jacobian_is_triangular_in_its_order(name: str) -> None:
    transform = stirred(MAPS[name]())
    assert isinstance(transform, MaskedAutoregressive)
    features = transform.features
    x = data(3, features)
    context = data(3, 3) if transform.conditioner.context else None
    z, logdet = transform(x, context)
    back, opposite = transform.inverse(z, context)
    torch.testing.assert_close(back, x, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(opposite, -logdet, rtol=1e-9, atol=1e-9)
    places = transform.conditioner.order0
    for row in range(3):
        own = None if context is None else context[row : row + 1]

        def alone(value: Tensor, own: Tensor | None = own) -> Tensor:
            mapped: Tensor = transform(value[None], own)[0][0]
            return mapped

        jacobian = torch.autograd.functional.jacobian(alone, x[row])
        ordered = jacobian[places][:, places]
        assert torch.equal(ordered.triu(1), torch.zeros_like(ordered))
        torch.testing.assert_close(torch.linalg.slogdet(jacobian)[1], logdet[row])


@pytest.mark.parametrize(("passes", "together"), [(None, 1), (3, 2), (2, 3), (1, 5)])
def test_every_earlier_feature_is_seen(passes: int | None, together: int) -> None:
    order = [4, 2, 0, 1, 3]
    transform = stirred(
        MaskedAutoregressive(5, (16, 16), context=1, order=order, passes=passes, activation="tanh")
    )
    by_x, by_context = torch.autograd.functional.jacobian(
        lambda x, context: transform(x, context)[0][0], (data(1, 5), data(1, 1))
    )
    step = torch.tensor(order) // together
    wanted = torch.eye(5, dtype=torch.bool) | (step[:, None] > step)
    assert torch.equal(by_x[:, 0] != 0, wanted)
    assert (by_context != 0).all()


@pytest.mark.parametrize("univariate", ["affine", "spline"])
@pytest.mark.parametrize("convention", ["nflows", "zuko"])
def test_it_starts_as_the_identity(univariate: str, convention: str) -> None:
    transform = MaskedAutoregressive(3, univariate=univariate, convention=convention)
    x = data(16, 3).float()
    z, logdet = transform(x)
    # Each knot has a rounding of its softmax's sum, of a domain that is 10 wide.
    torch.testing.assert_close(z, x, rtol=0, atol=1e-5)
    torch.testing.assert_close(logdet, torch.zeros(16), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["MAF", "NSF"])
def test_a_flow_is_zukos_with_its_weights(kind: str) -> None:
    zuko = pytest.importorskip("zuko")
    theirs = getattr(zuko.flows, kind)(5, context=2, transforms=3, hidden_features=(12, 9))
    ours = {"MAF": MAF, "NSF": NSF}[kind](
        5, context=2, transforms=3, hidden_features=(12, 9), convention="zuko"
    )
    for own, transform in zip(ours.transform.transforms, theirs.transform.transforms, strict=True):
        assert isinstance(own, MaskedAutoregressive)
        own.conditioner.load_state_dict(transform.hyper.state_dict())
    x, context = 2 * data(64, 5).float(), data(64, 2).float()
    torch.testing.assert_close(
        ours.log_prob(x, context), theirs(context).log_prob(x), rtol=1e-5, atol=1e-5
    )
    z, _ = ours(x, context)
    wanted = theirs(context).transform.inv(z)
    torch.testing.assert_close(ours.inverse(z, context)[0], wanted, rtol=1e-5, atol=1e-5)


def test_samples_have_their_own_density_and_gradient() -> None:
    flow = stirred(
        Flow(
            [
                MaskedAutoregressive(3, (8,), context=2),
                Inverse(MaskedAutoregressive(3, (8,), context=2, order=[2, 1, 0])),
            ],
            StandardNormal(3),
        )
    )
    context = data(2, 2).requires_grad_()
    x, log_prob = flow.sample_and_log_prob(4, context)
    assert x.shape == (2, 4, 3)
    rows = context.repeat_interleave(4, 0)
    torch.testing.assert_close(flow.log_prob(x.flatten(0, 1), rows).view(2, 4), log_prob)
    # x -> z -> x: what the inverse's gradient says of a weight, the forward's must undo.
    z = data(8, 3)
    inner = flow.transform.transforms[0]
    assert isinstance(inner, MaskedAutoregressive)
    weight = inner.conditioner[0].weight
    back, _ = inner.inverse(z, rows)
    wanted, _ = torch.autograd.grad(back.square().sum(), [weight, context])
    step = torch.zeros_like(weight)
    step[0, 0] = 1e-6
    with torch.no_grad():
        values = []
        for sign in (1, -2):
            weight.add_(sign * step)
            values.append(inner.inverse(z, rows)[0].square().sum())
        weight.add_(step)
    torch.testing.assert_close((values[0] - values[1]) / 2e-6, wanted[0, 0], rtol=1e-6, atol=1e-6)


def test_a_density_compiles_into_one_graph() -> None:
    flow = stirred(
        Flow([MaskedAutoregressive(3, (4,), univariate="spline", bins=3)], StandardNormal(3))
    )
    x = data(4, 3)
    compiled = torch.compile(flow.log_prob, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), flow.log_prob(x))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MaskedAutoregressive(1), "features: expected at least 2"),
        (lambda: MaskedMLP([0, 0], 2), "more than one without a context"),
        (lambda: MaskedAutoregressive(3, order=[0, 0, 1]), "order: expected 0 to 2"),
        (lambda: MaskedAutoregressive(3, univariate="cubic"), "univariate"),
        (lambda: MaskedMLP([0, 1], 2, activation="sine"), "activation"),
        (lambda: NSF(3).log_prob(data(4, 2)), "x: expected 3 features"),
        (lambda: NSF(3, context=2).log_prob(data(4, 3)), "context"),
        (lambda: NSF(3).inverse(data(4, 3), data(4, 2)), "context"),
        (lambda: NSF(3).sample(-1), "n: expected"),
    ],
)
def test_mistakes_are_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
