"""fastzoo.compat.nflows beside nflows' own splines, and inside of its modules.

float32 comes within 1e-5 of nflows in float64, relative above 1; float64 within 1e-10.
"""

import inspect
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastzoo.compat import nflows as mine

splines = pytest.importorskip("nflows.transforms.splines")
theirs = pytest.importorskip("nflows.transforms.splines.rational_quadratic")

ALLOWED = {torch.float32: 1e-5, torch.float64: 1e-10}
BOX = {"left": -2.0, "right": 3.0, "bottom": -1.0, "top": 2.5}
# By function: what it is called with, and derivatives less bins.
CALLS: dict[str, list[dict[str, Any]]] = {
    "unconstrained_rational_quadratic_spline": [
        {},
        {"tail_bound": 3.0, "tails": "linear"},
        {"tail_bound": 3.0, "min_bin_width": 0.05, "min_bin_height": 0.1, "min_derivative": 0.2},
    ],
    "rational_quadratic_spline": [{}, BOX, {**BOX, "min_bin_width": 0.05, "min_derivative": 0.0}],
}
CASES = [(name, options) for name, every in CALLS.items() for options in every]
BINS = 8


def near(found: Tensor, right: Tensor, allowed: float) -> None:
    assert found.shape == right.shape
    off = (found.double() - right.double()).abs() / right.double().abs().clamp(min=1)
    assert bool((off <= allowed).all()), float(off.nan_to_num(math.inf).max())


def interval(name: str, options: dict[str, Any], inverse: bool) -> tuple[float, float]:
    if name.startswith("unconstrained"):
        bound = options.get("tail_bound", 1.0)
        return -bound, bound
    ends = ("bottom", "top") if inverse else ("left", "right")
    return options.get(ends[0], 0.0), options.get(ends[1], 1.0)


def arguments(
    name: str,
    options: dict[str, Any],
    inverse: bool,
    dtype: torch.dtype,
    shape: tuple[int, ...] = (40, 3),
    scale: float = 1.0,
) -> list[Tensor]:
    """Inputs, of an unconstrained spline also outside, and parameters, exact in the dtype."""
    generator = torch.Generator().manual_seed(0)
    low, high = interval(name, options, inverse)
    share = torch.rand(shape, generator=generator, dtype=torch.float64)
    extra = -1
    if name.startswith("unconstrained"):
        share = 1.4 * share - 0.2
    else:
        extra = 1
    parameters = [
        scale * torch.randn((*shape, size), generator=generator, dtype=torch.float64)
        for size in (BINS, BINS, BINS + extra)
    ]
    return [t.to(dtype) for t in (low + (high - low) * share, *parameters)]


def called(module: Any, name: str, tensors: list[Tensor], **options: Any) -> Any:
    return getattr(module, name)(*tensors, **options)


@pytest.mark.parametrize("name", CALLS)
def test_signatures(name: str) -> None:
    right = inspect.signature(getattr(theirs, name)).parameters
    found = inspect.signature(getattr(mine, name)).parameters
    assert list(found) == list(right)
    assert [p.default for p in found.values()] == [p.default for p in right.values()]
    for constant in ("MIN_BIN_WIDTH", "MIN_BIN_HEIGHT", "MIN_DERIVATIVE"):
        constant = f"DEFAULT_{constant}"
        assert getattr(mine, constant) == getattr(theirs, constant)


@pytest.mark.parametrize("dtype", ALLOWED, ids=str)
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_values_and_gradients_are_theirs(
    name: str, options: dict[str, Any], inverse: bool, dtype: torch.dtype
) -> None:
    # nflows asks whether what an inverse is given lies between left and right.
    given = arguments(name, options, inverse, dtype)
    if inverse and options is not CALLS[name][0] and name == "rational_quadratic_spline":
        given[0] = given[0].clamp(min=options["left"])
    found = []
    for module, tensors in ((mine, given), (theirs, [t.double() for t in given])):
        leaves = [t.detach().requires_grad_() for t in tensors]
        outputs, logs = called(module, name, leaves, inverse=inverse, **options)
        assert outputs.dtype == logs.dtype == tensors[0].dtype
        loss = (torch.sin(outputs) + 0.3 * logs * torch.cos(outputs)).sum()
        found.append((outputs, logs, *torch.autograd.grad(loss, leaves)))
    for place, (got, right) in enumerate(zip(*found, strict=True)):
        # A small derivative at an inverse's knot multiplies roundings.
        near(got, right, ALLOWED[dtype] * (4 if place < 2 else 100))


@pytest.mark.parametrize("shape", [(), (7,), (2, 3, 4, 5), (0, 3)], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_shapes(name: str, shape: tuple[int, ...]) -> None:
    given = arguments(name, {}, False, torch.float64, shape)
    found = called(mine, name, given)
    if 0 in shape:
        assert found[0].shape == found[1].shape == shape  # theirs takes the least of nothing
        return
    for got, right in zip(found, called(theirs, name, given), strict=True):
        near(got, right, 1e-10)


@pytest.mark.parametrize("scale", [0.0, 30.0, 300.0])
@pytest.mark.parametrize("name", CALLS)
def test_extreme_parameters(name: str, scale: float) -> None:
    given = arguments(name, {}, False, torch.float64, (200, 3), scale)
    for got, right in zip(called(mine, name, given), called(theirs, name, given), strict=True):
        near(got, right, 1e-8)
    outputs, logs = called(mine, name, given, inverse=True)
    assert bool(outputs.isfinite().all() & logs.isfinite().all())
    again, _ = called(theirs, name, [outputs, *given[1:]])
    near(again, given[0], 1e-8)


@pytest.mark.parametrize("dtype", ALLOWED, ids=str)
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_knots_and_ends(name: str, inverse: bool, dtype: torch.dtype) -> None:
    """Where the bins meet, and at both ends, which are inside."""
    given = [t[:1, :1].expand(1, BINS + 1, *t.shape[2:]) for t in arguments(name, {}, False, dtype)]
    low, high = interval(name, {}, inverse)
    minimum = theirs.DEFAULT_MIN_BIN_WIDTH
    lengths = minimum + (1 - BINS * minimum) * given[2 if inverse else 1][:, 0].double().softmax(-1)
    knots = nn.functional.pad(low + (high - low) * lengths.cumsum(-1), (1, 0), value=low)
    given[0] = knots.clamp(low, high).to(dtype)
    found = called(mine, name, given, inverse=inverse)
    right = called(theirs, name, [t.double() for t in given], inverse=inverse)
    near(found[0], right[0], ALLOWED[dtype])
    # A knot of one arithmetic is none of the other, and the logarithm of the derivative changes by
    # a rounding over the width of the narrowest bin.
    near(found[1], right[1], 40 * ALLOWED[dtype])


def test_what_is_outside_is_refused() -> None:
    given = arguments("rational_quadratic_spline", {}, False, torch.float32)
    for change in (1.0001, -0.0001):
        given[0][3, 1] = change
        for inverse in (False, True):
            with pytest.raises(mine.InputOutsideDomain, match=r"\[0\.0, 1\.0\]"):
                mine.rational_quadratic_spline(*given, inverse=inverse)
    assert issubclass(mine.InputOutsideDomain, ValueError)
    given[0][3, 1] = 0.1 * 3  # within float32's rounding of an end
    mine.rational_quadratic_spline(*given, right=1.0, left=float(given[0].min()))
    # What an inverse is given lies between bottom and top.
    high = [torch.full_like(given[0], 1.5), *given[1:]]
    outputs, _ = mine.rational_quadratic_spline(*high, inverse=True, top=2.0)
    assert bool(((outputs > 0) & (outputs < 1)).all())
    with pytest.raises(mine.InputOutsideDomain):
        mine.rational_quadratic_spline(*high, inverse=True, top=1.2)


def test_what_is_outside_of_the_tails_bound_stays() -> None:
    name = "unconstrained_rational_quadratic_spline"
    given = arguments(name, {}, False, torch.float32)
    given[0] = given[0].abs() + 5  # all of it: their older versions failed
    for inverse in (False, True):
        outputs, logs = called(mine, name, given, inverse=inverse)
        assert torch.equal(outputs, given[0])
        assert not bool(logs.any())


@pytest.mark.parametrize("name", CALLS)
def test_refusals(name: str) -> None:
    given = arguments(name, {}, False, torch.float32)
    for minimum in ("min_bin_width", "min_bin_height"):
        for module in (mine, theirs):
            with pytest.raises(ValueError, match=r"[Mm]in"):
                called(module, name, given, **{minimum: 0.2})
    if name.startswith("unconstrained"):
        for module in (mine, theirs):
            with pytest.raises(RuntimeError, match="circular tails are not implemented"):
                called(module, name, given, tails="circular")


def replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the documentation of the module says."""
    autoregressive = pytest.importorskip("nflows.transforms.autoregressive")
    for name in CALLS:
        for module in (splines, autoregressive):
            monkeypatch.setattr(module, name, getattr(mine, name))


class Network(nn.Sequential):
    """A conditioner as nflows calls it."""

    hidden_features = 16

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(nn.Linear(inputs, 16), nn.ReLU(), nn.Linear(16, outputs))

    def forward(self, x: Tensor, context: None = None) -> Tensor:
        found: Tensor = super().forward(x)
        return found


@pytest.mark.parametrize("tails", [None, "linear"])
@pytest.mark.parametrize("kind", ["coupling", "autoregressive"])
def test_their_modules_take_ours(
    kind: str, tails: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    transforms = pytest.importorskip("nflows.transforms")
    torch.manual_seed(0)
    options = {"num_bins": BINS, "tails": tails, "tail_bound": 2.0}
    if kind == "coupling":
        transform = transforms.PiecewiseRationalQuadraticCouplingTransform(
            [1, 0, 1, 0, 1], Network, **options
        )
    else:
        masked = transforms.MaskedPiecewiseRationalQuadraticAutoregressiveTransform
        transform = masked(5, 16, **options)
    x = torch.rand(30, 5) * (1 if tails is None else 5)
    z = x * 0.9
    right = both_ways(transform, x, z)
    refused: list[str] = []
    monkeypatch.setattr(theirs.F, "softmax", lambda *_, **__: refused.append("theirs"))
    replaced(monkeypatch)
    found = both_ways(transform, x, z)
    assert refused == []
    for got, want in zip(found, right, strict=True):
        near(got, want, 1e-4)  # both in float32, an inverse through five maps


def both_ways(transform: Any, x: Tensor, z: Tensor) -> list[Tensor]:
    outputs, logs = transform(x)
    grads = torch.autograd.grad((outputs * x + logs[:, None]).mean(), list(transform.parameters()))
    with torch.no_grad():
        return [outputs.detach(), logs.detach(), *grads, *transform.inverse(z)]
