"""fastzoo.compat.zuko in zuko's own flows, and its transformations beside zuko's.

float32 comes within 1e-5 of zuko in float64, relative above 1, which is what the two are to agree
to; in float64, where rounding is 1e-16, within 1e-10.
"""

import copy
import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, TransformedDistribution
from torch.utils._python_dispatch import TorchDispatchMode

from fastzoo.compat.zuko import MonotonicAffineTransform, MonotonicRQSTransform

flows = pytest.importorskip("zuko.flows")
theirs = pytest.importorskip("zuko.transforms")

ALLOWED = {torch.float32: 1e-5, torch.float64: 1e-10}
BINS = 8
RQS_SHAPES = [(BINS,), (BINS,), (BINS - 1,)]
PAIRS = {
    "rqs": (theirs.MonotonicRQSTransform, MonotonicRQSTransform),
    "affine": (theirs.MonotonicAffineTransform, MonotonicAffineTransform),
}


class Called(TorchDispatchMode):
    """The operators that run inside, but those that give nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if not isinstance(found, Tensor) or found.numel() > 0:
            self.names.append(func.name())
        return found

    @property
    def fused(self) -> list[str]:
        return [name for name in self.names if name.startswith("fastzoo::")]


def near(found: Tensor, right: Tensor, allowed: float) -> None:
    assert found.shape == right.shape
    off = (found.double() - right.double()).abs() / right.double().abs().clamp(min=1)
    assert bool((off <= allowed).all()), float(off.nan_to_num(math.inf).max())


def drawn(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64)


def parameters(name: str, *shape: int, scale: float = 1.0) -> list[Tensor]:
    trailing = RQS_SHAPES if name == "rqs" else [(), ()]
    return [drawn(*shape, *own, seed=i + 1, scale=scale) for i, own in enumerate(trailing)]


def widened(x: Tensor, parameters: tuple[int, ...]) -> Tensor:
    """Their log-derivatives want elements that are as many as the parameters."""
    return x.double().expand(torch.broadcast_shapes(x.shape, parameters))


def both(name: str, given: list[Tensor], dtype: torch.dtype, **kwargs: Any) -> tuple[Any, Any]:
    """Theirs in float64 and ours in a dtype, of the same numbers."""
    rounded = [p.to(dtype) for p in given]
    their, our = PAIRS[name]
    return their(*(p.double() for p in rounded), **kwargs), our(*rounded, **kwargs)


# --- in their flows -------------------------------------------------------------------------------


def of_theirs(kind: str, dtype: torch.dtype, **options: Any) -> tuple[Any, Any]:
    """One of their flows in float64, and the same in a dtype with our maps and their weights."""
    torch.manual_seed(0)
    if kind == "NSF":
        their = flows.NSF(5, bins=BINS, slope=2e-3, **options)
        univariate, shapes = partial(MonotonicRQSTransform, slope=2e-3), RQS_SHAPES
    else:
        their = flows.MAF(5, **options)
        univariate, shapes = MonotonicAffineTransform, [(), ()]
    our = flows.MAF(5, univariate=univariate, shapes=shapes, **options)
    their.to(dtype)
    our.to(dtype)
    our.load_state_dict(their.state_dict())
    return their.double(), our


@pytest.mark.parametrize("dtype", ALLOWED, ids=str)
@pytest.mark.parametrize("passes", [None, 2])
@pytest.mark.parametrize("kind", ["NSF", "MAF"])
def test_flows_are_theirs(kind: str, passes: int | None, dtype: torch.dtype) -> None:
    options = {"transforms": 2, "hidden_features": (16,), "passes": passes, "context": 2}
    their, our = of_theirs(kind, dtype, **options)
    x, context = drawn(40, 5, seed=3, scale=3.0).to(dtype), drawn(40, 2, seed=4).to(dtype)
    right = their(context.double()).log_prob(x.double())
    found = our(context).log_prob(x)
    near(found, right, ALLOWED[dtype])
    for p, q in zip(our.parameters(), their.parameters(), strict=True):
        (grad,) = torch.autograd.grad(found.mean(), p, retain_graph=True)
        (want,) = torch.autograd.grad(right.mean(), q, retain_graph=True)
        near(grad, want, ALLOWED[dtype])

    z = our(context).base.sample().to(dtype)
    base = partial(torch.Tensor.clone, z)  # both from the same draw
    sampled = []
    for flow, c in ((our, context), (their, context.double())):
        distribution = flow(c)
        distribution.base.rsample = lambda *_, c=c: base().to(c.dtype)
        sampled.append(distribution.rsample_and_log_prob())
    for mine, right in zip(*sampled, strict=True):
        near(mine, right, 4 * ALLOWED[dtype])  # through the inverses of two maps


def test_a_flow_of_one_feature_has_parameters_without_samples() -> None:
    torch.manual_seed(0)
    their = flows.NSF(1, bins=BINS, transforms=2)
    our = flows.MAF(1, transforms=2, univariate=MonotonicRQSTransform, shapes=RQS_SHAPES)
    our.load_state_dict(their.state_dict())
    x = drawn(30, 1).float()
    near(our().log_prob(x), their().log_prob(x), 1e-5)


# --- by themselves --------------------------------------------------------------------------------

SHAPES = {
    "same": ((7, 3), (7, 3)),
    "shared": ((7, 3), (3,)),
    "one-each": ((7, 3), (7, 1)),
    "more-parameters": ((3,), (7, 3)),
    "batches": ((2, 4, 3), (4, 3)),
    "number": ((), ()),
    "vector": ((6,), (6,)),
    "no-samples": ((0, 3), (0, 3)),
}


@pytest.mark.parametrize("dtype", ALLOWED, ids=str)
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", PAIRS)
def test_values_and_gradients_are_theirs(
    name: str, shapes: tuple[tuple[int, ...], tuple[int, ...]], dtype: torch.dtype
) -> None:
    their, our = both(name, parameters(name, *shapes[1]), dtype)
    x = drawn(*shapes[0], seed=9, scale=2.5).to(dtype)
    for call in ("call_and_ladj", "inv"):
        got = (our.inv if call == "inv" else our).call_and_ladj(x)
        right = (their.inv if call == "inv" else their).call_and_ladj(widened(x, shapes[1]))
        for mine, want in zip(got, right, strict=True):
            assert mine.dtype == dtype
            near(mine, want.expand(mine.shape), 4 * ALLOWED[dtype])

    given = [p.to(dtype).requires_grad_() for p in parameters(name, *shapes[1])]
    wide = [p.detach().double().requires_grad_() for p in given]
    for inverse in (False, True):
        found = []
        for kind, values, inputs in ((1, given, x), (0, wide, x.double())):
            leaf = inputs.detach().requires_grad_()
            transform = PAIRS[name][kind](*values)
            wide_leaf = leaf if kind else widened(leaf, shapes[1])
            y, ladj = (transform.inv if inverse else transform).call_and_ladj(wide_leaf)
            loss = (torch.sin(y) + 0.3 * ladj * torch.cos(y)).sum()
            found.append(torch.autograd.grad(loss, [leaf, *values]))
        for mine, want in zip(*found, strict=True):
            near(mine, want, 40 * ALLOWED[dtype])  # sums over what shares a parameter


def test_the_inverse_returns() -> None:
    for name in PAIRS:
        _, our = both(name, parameters(name, 400, 3, scale=2.0), torch.float32)
        x = drawn(400, 3, seed=5, scale=2.5).float()
        y, ladj = our.call_and_ladj(x)
        again, back = our.inv.call_and_ladj(y)
        steep = torch.exp(-ladj).clamp(min=1)  # by which a rounding of y moves x
        assert float(((again - x).abs() / steep / x.abs().clamp(min=1)).max()) <= 1e-5
        assert float(((back + ladj).abs() / steep).max()) <= 1e-4


def test_knots_and_ends() -> None:
    given = parameters("rqs", 1)
    for dtype, allowed in ALLOWED.items():
        their, our = both("rqs", given, dtype)
        ends = torch.tensor([-5.0, 5.0, -5.001, 5.001])
        knots, heights = (torch.cat([t[0], ends]) for t in (their.horizontal, their.vertical))
        for inverse, values in ((False, knots), (True, heights)):
            ours, right = (t.inv if inverse else t for t in (our, their))
            y, ladj = ours.call_and_ladj(values.to(dtype))
            # zuko's own derivatives, at a knot of one arithmetic that is none of the other, change
            # by a rounding over the width of the narrowest bin.
            near(y, right(values), 2 * allowed)
            near(ladj, right.log_abs_det_jacobian(values, right(values)), 40 * allowed)


@pytest.mark.parametrize("scale", [0.0, 30.0, 1e4])
@pytest.mark.parametrize("name", PAIRS)
def test_extreme_parameters(name: str, scale: float) -> None:
    x = drawn(200, 3, seed=6, scale=2.5)
    their, our = both(name, parameters(name, 200, 3, scale=scale), torch.float64)
    for mine, want in zip(our.call_and_ladj(x), their.call_and_ladj(x), strict=True):
        near(mine, want.expand(mine.shape), 1e-8)
    x, ladj = our.inv.call_and_ladj(x)
    assert bool(x.isfinite().all() & ladj.isfinite().all())
    if scale == 0:
        near(our.call_and_ladj(x)[0], x, 1e-12)  # no parameters: the identity


def test_options() -> None:
    for name, options in (
        ("rqs", {"bound": 2.0, "slope": 1e-2}),
        ("rqs", {"slope": 0.1}),
        ("affine", {"slope": 0.3}),
    ):
        their, our = both(name, parameters(name, 50, 2, scale=3.0), torch.float64, **options)
        x = drawn(50, 2, seed=7, scale=2.0)
        for mine, want in zip(our.call_and_ladj(x), their.call_and_ladj(x), strict=True):
            near(mine, want, 1e-10)


def test_parameters_of_other_precision_are_promoted() -> None:
    """As where autocast made them."""
    given = [p.bfloat16() for p in parameters("rqs", 9, 2)]
    y, ladj = MonotonicRQSTransform(*given).call_and_ladj(drawn(9, 2).float())
    assert y.dtype == ladj.dtype == torch.float32
    right = theirs.MonotonicRQSTransform(*(p.double() for p in given))(drawn(9, 2).float().double())
    near(y, right, 1e-5)


# --- one kernel -----------------------------------------------------------------------------------


@pytest.fixture(params=PAIRS)
def transform(request: pytest.FixtureRequest) -> Any:
    return PAIRS[request.param][1](*parameters(request.param, 9, 2))


def test_a_value_and_its_log_derivative_are_one_call(transform: Any) -> None:
    x = drawn(9, 2)
    with Called() as called:
        transform.call_and_ladj(x)
    assert len(called.fused) == 1
    for map_ in (transform, transform.inv):
        with Called() as called:
            y = map_(x)
            first = map_.log_abs_det_jacobian(x, y)
            second = map_.log_abs_det_jacobian(x, y)
        assert len(called.fused) == 1
        assert torch.equal(first, second)
        assert torch.equal(first, map_.call_and_ladj(x)[1])
    with Called() as called:
        x, log_prob = rsampled(transform)
    assert len(called.fused) == 1
    near(log_prob, Normal(0.0, 1.0).log_prob(transform.inv(x)) - ladj_of(transform.inv, x), 1e-10)


def rsampled(transform: Any) -> tuple[Tensor, Tensor]:
    """As torch.distributions has a sample and its density of one map."""
    zero = torch.zeros(9, 2, dtype=torch.float64)
    distribution = TransformedDistribution(Normal(zero, zero + 1), [transform.with_cache(0)])
    z = distribution.base_dist.rsample()
    x = transform(z)
    return x, distribution.base_dist.log_prob(z) - transform.log_abs_det_jacobian(z, x)


def ladj_of(map_: Any, x: Tensor) -> Tensor:
    found: Tensor = map_.call_and_ladj(x)[1]
    return -found


def test_what_is_kept_is_of_its_arguments_alone(transform: Any) -> None:
    x = drawn(9, 2).requires_grad_()
    with torch.no_grad():
        y = transform(x)
        fixed = transform.log_abs_det_jacobian(x, y)
    assert not fixed.requires_grad
    if isinstance(transform, MonotonicRQSTransform):
        # It was computed without gradients, and now there are.
        assert transform.log_abs_det_jacobian(x, y).requires_grad
    other = x.detach() + 1
    right = transform.call_and_ladj(other)
    assert torch.equal(transform.log_abs_det_jacobian(other, right[0]), right[1])
    with torch.no_grad():
        y = transform(other)
        other.add_(1)  # in place: the same tensor, and another value
        moved = transform.log_abs_det_jacobian(other, y)
        assert torch.equal(moved, transform.call_and_ladj(other)[1])
    assert transform.inv.inv is transform
    assert transform.sign == 1
    assert transform.bijective


def test_parameters_that_a_network_gave_are_not_copied() -> None:
    """Views of one tensor, as their flows unpack it."""
    for name, sizes in (("rqs", (BINS, BINS, BINS - 1)), ("affine", (1, 1))):
        packed = drawn(6, 3 * sum(sizes)).unflatten(-1, (3, -1))
        parts = packed.split(sizes, -1)
        given = parts if name == "rqs" else [p.squeeze(-1) for p in parts]
        x = drawn(6, 3, seed=8)
        with Called() as called:
            PAIRS[name][1](*given).call_and_ladj(x)
        copies = ("aten::clone", "aten::copy_", "aten::_to_copy", "aten::cat", "aten::contiguous")
        assert not set(called.names) & set(copies), called.names


def test_it_shows_what_it_is() -> None:
    _, our = both("rqs", parameters("rqs", 2), torch.float32)
    assert repr(our) == "MonotonicRQSTransform(bins=8)"
    assert copy.copy(our).bins == 8
