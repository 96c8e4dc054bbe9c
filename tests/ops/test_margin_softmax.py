"""margin_softmax against the papers' formulas as their authors wrote them, and its own edges."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastzoo import ops, reference
from fastzoo.ops._operator import OPERATORS
from fastzoo.testing.gradients import assert_gradient_close
from fastzoo.testing.margin_softmax import MARGINS, definition, random_faces
from fastzoo.testing.timing import peak_memory
from tests.conftest import DEVICE

BACKENDS = [
    b
    for b in ("reference", "cpu", "cuda", "triton")
    if OPERATORS["margin_softmax_negatives"].refusal(b, DEVICE) is None
]


def faces(n: int, classes: int, dim: int, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
    x, w, y = random_faces(n, classes, dim, **kwargs)
    return x.double().to(DEVICE), w.double().to(DEVICE), y.to(DEVICE)


def cosines(x: Tensor, w: Tensor) -> Tensor:
    return F.linear(F.normalize(x), F.normalize(w))


def replaced(logits: Tensor, y: Tensor, own: Tensor) -> Tensor:
    return logits.scatter(1, y[:, None], own[:, None])


# Each is the loss as its paper's authors have it, with every logit in memory.


def paper_normface(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(64 * cosines(x, w), y)


def paper_arcface(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    cos = cosines(x, w)
    theta = cos.gather(1, y[:, None])[:, 0].acos()
    assert (theta + 0.5 < math.pi).all()
    return F.cross_entropy(64 * replaced(cos, y, (theta + 0.5).cos()), y)


def paper_cosface(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    cos = cosines(x, w)
    return F.cross_entropy(64 * (cos - 0.35 * F.one_hot(y, len(w)).to(cos.dtype)), y)


def paper_combined(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    cos = cosines(x, w)
    angle = 1.2 * cos.gather(1, y[:, None])[:, 0].acos() + 0.3
    below = angle < math.pi
    own = torch.where(below, angle.cos(), -angle.cos() - 2) - 0.1
    return F.cross_entropy(64 * replaced(cos, y, own), y)


def psi(theta: Tensor, m: int) -> Tensor:
    k = (m * theta / math.pi).floor()
    return (-1) ** k * (m * theta).cos() - 2 * k


def paper_l_softmax(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    length = x.norm(dim=1) * w[y].norm(dim=1)
    own = (x * w[y]).sum(1)
    moved = (0.5 * own + length * psi((own / length).acos(), 3)) / 1.5
    return F.cross_entropy(replaced(x @ w.t(), y, moved), y)


def paper_sphereface(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    cos, length = cosines(x, w), x.norm(dim=1)
    own = cos.gather(1, y[:, None])[:, 0]
    moved = (own + psi(own.acos(), 4)) / 2
    return F.cross_entropy(length[:, None] * replaced(cos, y, moved), y)


def paper_adaface(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    cos = cosines(x, w)
    norm = x.norm(dim=1).clip(0.001, 100).detach()
    mean = norm.mean() * 0.01 + 0.99 * 20
    std = norm.std() * 0.01 + 0.99 * 100
    scaler = ((norm - mean) / (std + 1e-3) * 0.333).clip(-1, 1)
    theta = cos.gather(1, y[:, None])[:, 0].acos()
    own = (theta - 0.4 * scaler).clip(1e-3, math.pi - 1e-3).cos() - (0.4 + 0.4 * scaler)
    return F.cross_entropy(64 * replaced(cos, y, own), y)


def paper_magface(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    a = x.norm(dim=1).clamp(1, 6)
    margin = (0.8 - 0.45) / (6 - 1) * (a - 1) + 0.45
    cos = cosines(x, w)
    own = cos.gather(1, y[:, None])[:, 0]
    moved = own * margin.cos() - (1 - own**2).sqrt() * margin.sin()
    moved = torch.where(
        own > (math.pi - margin).cos(), moved, own - margin * (math.pi - margin).sin()
    )
    return F.cross_entropy(64 * replaced(cos, y, moved), y) + 20 * (a / 36 + 1 / a).mean()


def paper_curricularface(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    cos = cosines(x, w)
    own = cos.gather(1, y[:, None])[:, 0]
    moved = own * math.cos(0.5) - (1 - own**2).sqrt() * math.sin(0.5)
    final = torch.where(own > math.cos(math.pi - 0.5), moved, own - 0.5 * math.sin(math.pi - 0.5))
    t = own.mean().detach() * 0.01
    hard = cos > moved[:, None]
    assert hard.any()
    return F.cross_entropy(64 * replaced(torch.where(hard, cos * (t + cos), cos), y, final), y)


PAPERS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "plain": paper_normface,
    "arcface": paper_arcface,
    "cosface": paper_cosface,
    "combined": paper_combined,
    "l-softmax": paper_l_softmax,
    "sphereface": paper_sphereface,
    "adaface": paper_adaface,
    "magface": paper_magface,
    "curricularface": paper_curricularface,
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", PAPERS)
def test_like_the_paper(name: str, backend: str) -> None:
    x, w, y = (t.requires_grad_() if t.is_floating_point() else t for t in faces(24, 31, 8, seed=4))
    result = ops.margin_softmax_loss(x, w, y, margin=MARGINS[name], backend=backend)
    loss = result[0] if isinstance(result, tuple) else result
    expected = PAPERS[name](x, w, y)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    grads = torch.autograd.grad(loss, (x, w))
    for a, e in zip(grads, torch.autograd.grad(expected, (x, w)), strict=True):
        assert_gradient_close(a, e, rtol=1e-10)


def test_insightface_gradient_is_that_of_its_head() -> None:
    x, w, y = (t.requires_grad_() if t.is_floating_point() else t for t in faces(24, 31, 8, seed=4))
    cos = cosines(x, w)
    with torch.no_grad():
        angle = cos.acos()
        angle[torch.arange(24), y] += 0.5
        moved = angle.cos()
    expected = F.cross_entropy(64 * (cos + (moved - cos).detach()), y)
    loss = ops.margin_softmax_loss(x, w, y, margin=ops.ArcFace(0.5), grad="insightface")
    assert isinstance(loss, Tensor)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for a, e in zip(
        torch.autograd.grad(loss, (x, w)), torch.autograd.grad(expected, (x, w)), strict=True
    ):
        assert_gradient_close(a, e, rtol=1e-10)


def test_the_state_is_the_running_one() -> None:
    x, w, y = faces(24, 31, 8, seed=4)
    own = (F.normalize(x) * F.normalize(w)[y]).sum(1)
    y[3] = -1
    counted = torch.arange(24) != 3
    *_, t = ops.margin_softmax_loss(
        x, w, y, margin=ops.CurricularFace(0.5), state=torch.tensor([0.5], device=DEVICE)
    )
    torch.testing.assert_close(t, 0.99 * 0.5 + 0.01 * own[counted].mean().view(1))
    _, lse, state = ops.margin_softmax_loss(x, w, y, margin=ops.AdaFace(), return_lse=True)
    norm = x.norm(dim=1)[counted]
    torch.testing.assert_close(
        state, torch.stack([19.8 + 0.01 * norm.mean(), 99 + 0.01 * norm.std()])
    )
    assert lse.shape == (24,)
    one = ops.margin_softmax_loss(x[:1], w, y[:1], margin=ops.AdaFace())
    torch.testing.assert_close(one[1], state.new_tensor([19.8 + 0.01 * x[0].norm().item(), 100]))


COSINES = torch.linspace(-1, 1, 10001, dtype=torch.float64)


def rule(
    name: str, c: Tensor, m1: float = 1, m2: float = 0, m3: float = 0, **kwargs: Any
) -> Tensor:
    ms = (torch.full_like(c, m) for m in (m1, m2, m3))
    backend = kwargs.get("backend", "reference")
    value: Tensor = OPERATORS["margin_softmax_target"].choose(backend, c.device.type)(c, *ms, name)
    return value


@pytest.mark.parametrize("backend", BACKENDS)
def test_rules_are_the_formulas(backend: str) -> None:
    c = COSINES.to(DEVICE)
    theta = c.acos()
    inside = theta + 0.5 < math.pi
    close = {"rtol": 0, "atol": 1e-9}
    arcface = rule("arcface", c, m2=0.5, m3=0.25, backend=backend)
    beyond = c - 0.5 * math.sin(0.5)
    expected = torch.where(inside, (theta + 0.5).cos(), beyond) - 0.25
    torch.testing.assert_close(arcface, expected, **close)
    # Downhill in the angle on each side of pi - m, and a drop between them.
    for part in (arcface[inside], arcface[~inside]):
        assert (part.diff() > 0).all()
    assert arcface[~inside].max() < arcface[inside].min()
    easy = rule("easy", c, m2=0.5, backend=backend)
    torch.testing.assert_close(easy, torch.where(c > 0, (theta + 0.5).cos(), c), **close)
    torch.testing.assert_close(
        rule("unguarded", c, m2=0.5, backend=backend), (theta + 0.5).cos(), **close
    )
    clipped = (theta - 0.3).clip(1e-3, math.pi - 1e-3).cos() - 0.1
    torch.testing.assert_close(rule("clip", c, m2=-0.3, m3=0.1, backend=backend), clipped, **close)
    torch.testing.assert_close(rule("shift", 9 * c, m3=0.5, backend=backend), 9 * c - 0.5)
    for m in (1, 2, 3, 4, 5):
        value = rule("psi", c, m1=m, backend=backend)
        torch.testing.assert_close(value[1:-1], psi(theta, m)[1:-1], **close)
        assert (value.diff() > 0).all()
        assert value[0].item() == pytest.approx(1 - 2 * m)
        assert value.diff().max() < m * m * 2e-4 * 1.01  # continuous
    fourth = 8 * c**4 - 8 * c**2 + 1
    first_branch = c > math.cos(math.pi / 4)
    psi4 = rule("psi", c, m1=4, backend=backend)
    torch.testing.assert_close(psi4[first_branch], fourth[first_branch], **close)
    combined = rule("combined", c, m1=1.5, m2=0.4, backend=backend)
    assert (combined.diff() > 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("name", "ms"),
    [
        ("shift", (1, 0, 0.2)),
        ("arcface", (1, 0.5, 0.2)),
        ("easy", (1, 0.5, 0.2)),
        ("unguarded", (1, 0.5, 0.2)),
        ("clip", (1, -0.3, 0.2)),
        ("combined", (1.3, 0.4, 0.2)),
        ("psi", (4, 0.5, 0.2)),
    ],
)
def test_rules_have_their_derivatives(name: str, ms: tuple[float, ...], backend: str) -> None:
    c = torch.linspace(-0.97, 0.96, 23, dtype=torch.float64, device=DEVICE)
    coefficients = [torch.full_like(c, m) for m in ms]
    inputs = [c, *coefficients]
    for t in inputs[:1] + inputs[3:] if name == "psi" else inputs:
        t.requires_grad_()
    operator = OPERATORS["margin_softmax_target"].choose(backend, DEVICE)
    torch.autograd.gradcheck(lambda *a: operator(*a, name), inputs)
    torch.autograd.gradgradcheck(lambda *a: operator(*a, name), inputs)
    edges = torch.tensor([-1.5, -1, 0, 1, 1 + 1e-7], device=DEVICE, requires_grad=True)
    rest = [torch.full_like(edges, m, requires_grad=False) for m in ms]
    (slope,) = torch.autograd.grad(operator(edges, *rest, name).sum(), edges)
    assert slope.isfinite().all()
    assert slope.abs().max() <= 2.0**13


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sub_centers", [1, 2])
@pytest.mark.parametrize("name", MARGINS)
def test_gradcheck(name: str, sub_centers: int, backend: str) -> None:
    x, w, y = faces(4, 5, 3, sub_centers=sub_centers, seed=12)
    y[2] = -1
    x, w = x.requires_grad_(), w.requires_grad_()
    scale = torch.tensor(2.0, dtype=torch.float64, device=DEVICE, requires_grad=True)

    margin, state = MARGINS[name], None
    if isinstance(margin, ops.CurricularFace):
        # The state follows the cosines, without a gradient: it is held for the check.
        margin, state = ops.CurricularFace(0.5, alpha=0), torch.tensor([0.3], device=DEVICE)

    def loss(x: Tensor, w: Tensor, scale: Tensor) -> Tensor:
        result = ops.margin_softmax_loss(
            x,
            w,
            y,
            margin=margin,
            state=state,
            scale=scale,
            sub_centers=sub_centers,
            label_smoothing=0.1,
            class_weight=torch.arange(1.0, 6, device=DEVICE),
            backend=backend,
        )
        return result[0] if isinstance(result, tuple) else result

    # AdaFace's margin follows the norm, likewise.
    torch.autograd.gradcheck(loss, (x.detach(), w, scale) if name == "adaface" else (x, w, scale))


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "cuda"])
@pytest.mark.parametrize("name", MARGINS)
def test_logits(name: str, backend: str) -> None:
    x, w, y = (t.requires_grad_() if t.is_floating_point() else t for t in faces(9, 14, 5, seed=3))
    kwargs: dict[str, Any] = {"margin": MARGINS[name], "scale": 3.0, "interclass_filter": 0.5}
    kwargs["sub_centers"] = 2
    logits = ops.margin_softmax_logits(x, w, y % 7, **kwargs, backend=backend)
    loss = ops.margin_softmax_loss(x, w, y % 7, **kwargs, backend="reference")
    logits, loss = (r[0] if isinstance(r, tuple) else r for r in (logits, loss))
    if not isinstance(MARGINS[name], ops.MagFace):
        torch.testing.assert_close(F.cross_entropy(logits, y % 7), loss)
    expected = reference.margin_softmax_logits(x, w, y % 7, **kwargs)
    expected = expected[0] if isinstance(expected, tuple) else expected
    torch.testing.assert_close(logits, expected, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(logits)
    grads = torch.autograd.grad(logits, (x, w), upstream)
    for a, e in zip(grads, torch.autograd.grad(expected, (x, w), upstream), strict=True):
        assert_gradient_close(a, e, rtol=1e-11)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gradients_are_finite_where_formulas_are_not(dtype: torch.dtype, backend: str) -> None:
    _, w, y = random_faces(6, 9, 8, seed=1)
    w, y = w.to(DEVICE, dtype), y.to(DEVICE)
    x = torch.stack([w[y[0]], -w[y[1]], 0 * w[0], 100 * w[y[3]], w[y[4]] / 100, -9 * w[y[5]]])
    w = torch.cat([w, torch.zeros_like(w[:1])])
    for margin in MARGINS.values():
        leaves = [t.detach().clone().requires_grad_() for t in (x, w)]
        result = ops.margin_softmax_loss(*leaves, y, margin=margin, backend=backend)
        loss = result[0] if isinstance(result, tuple) else result
        assert loss.isfinite().all(), margin
        for grad in torch.autograd.grad(loss, leaves):
            assert grad.isfinite().all(), margin


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_class_alone_costs_nothing(backend: str) -> None:
    x, w, _ = faces(5, 1, 4)
    x.requires_grad_()
    y = torch.zeros(5, dtype=torch.long, device=DEVICE)
    loss = ops.margin_softmax_loss(x, w, y, margin=ops.ArcFace(), backend=backend)
    assert isinstance(loss, Tensor)
    assert loss.item() == 0
    assert torch.autograd.grad(loss, x)[0].abs().max() == 0


def test_a_label_out_of_range_raises_on_the_cpu() -> None:
    x, w, y = random_faces(5, 7, 4)
    y[2] = 7
    with pytest.raises(RuntimeError, match="label"):
        ops.margin_softmax_loss(x, w, y, margin=ops.ArcFace(), backend="cpu")


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b in ("cuda", "triton")])
def test_a_label_out_of_range_is_nan_on_a_gpu(backend: str) -> None:
    x, w, y = (t.to(DEVICE) for t in random_faces(5, 7, 4))
    y[2] = 7
    loss = ops.margin_softmax_loss(x, w, y, margin=ops.ArcFace(), reduction="none", backend=backend)
    assert isinstance(loss, Tensor)
    assert loss.isnan().tolist() == [False, False, True, False, False]


def test_angles_are_in_radians() -> None:
    for make in (ops.ArcFace, ops.CurricularFace, ops.AdaFace, lambda m: ops.Combined(1, m)):
        with pytest.raises(ValueError, match="radians"):
            make(28.6)


def test_the_smallest_sub_center_of_equal_ones_learns() -> None:
    x, w, y = faces(6, 4, 5, seed=2)
    same = w.repeat_interleave(3, 0).requires_grad_()
    for backend in BACKENDS:
        loss = ops.margin_softmax_loss(
            x, same, y, margin=ops.ArcFace(), sub_centers=3, backend=backend
        )
        assert isinstance(loss, Tensor)
        (grad,) = torch.autograd.grad(loss, same)
        by_center = grad.view(4, 3, 5).abs().amax((0, 2))
        assert by_center[0] > 0
        assert by_center[1:].max() == 0


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b in ("cpu", "triton")])
def test_a_kept_copy_serves_the_backward(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, w, y = (t.to(DEVICE) for t in random_faces(40, 300, 16, seed=5))
    x, w = x.requires_grad_(), w.requires_grad_()
    operator = OPERATORS["margin_softmax_negatives"]
    kept = []
    overload = operator.choose(backend, DEVICE)
    monkeypatch.setattr(
        operator, "choose", lambda *_: lambda *args: kept.append(args[-1]) or overload(*args)
    )
    grads = []
    for budget in (0, 40 * 300 * 2, 1 << 20):
        loss = ops.margin_softmax_loss(
            x, w, y, margin=ops.ArcFace(), memory_budget=budget, backend=backend
        )
        assert isinstance(loss, Tensor)
        grads.append(torch.autograd.grad(loss, (x, w)))
    assert kept == [False, False, True]
    for exact, copied in zip(grads[0], grads[2], strict=True):
        assert not torch.equal(exact, copied)
        assert_gradient_close(copied, exact.double(), rtol=2.0**-8)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b in ("reference", "cpu", "triton")])
def test_a_kept_copy_leaves_the_scale_its_gradient(backend: str) -> None:
    """The copy holds probabilities, no scores: it cannot serve the scale."""
    x, w, y = faces(9, 70, 5, seed=6)
    nothing = [x.new_empty(0) for _ in range(3)]
    slopes = []
    for keep in (False, True):
        scale = torch.full((9,), 3.0, dtype=x.dtype, device=DEVICE, requires_grad=True)
        operator = OPERATORS["margin_softmax_negatives"].choose(backend, DEVICE)
        args = (x, w, y, scale, *nothing, 0.0, 1, True, True, False, False, keep)
        slopes.append(torch.autograd.grad(operator(*args)[1].sum(), scale)[0])
    assert slopes[0].abs().min() > 0
    torch.testing.assert_close(slopes[1], slopes[0], rtol=1e-12, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_small_gradients_survive_float16(backend: str) -> None:
    """A gradient's terms may lie below float16's range where their sum does not: only the sum is
    rounded, by half a step of 2^-24 or 2^-11 of itself. In float32 scores of up to 8 of 32
    dimensions move probabilities by 2 * 8 * (32 + 8) * 2^-24 < 2^-14."""
    x, w, y = (t.to(DEVICE) for t in random_faces(40, 200, 32, seed=1))
    leaves = [(4 * t).half().requires_grad_() for t in (x, w)]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    grads = []
    for pair, which in ((leaves, backend), (exact, "reference")):
        loss = ops.margin_softmax_loss(
            *pair, y, margin=ops.ArcFace(), scale=8.0, reduction="sum", backend=which
        )
        assert isinstance(loss, Tensor)
        grads.append(torch.autograd.grad(loss * 2.0**-12, pair))
    for a, e in zip(*grads, strict=True):
        limit = 2.0**-25 + 2.0**-11 * e.abs() + 2.0**-14 * e.abs().max()
        assert ((a - e).abs() <= limit).all()


@pytest.mark.parametrize("name", ["arcface", "magface", "curricularface"])
def test_autocast_rounds_products_alone(name: str) -> None:
    """In bfloat16 the loss stays near the exact one, and norms and target scores are exact."""
    x, w, y = (t.to(DEVICE) for t in random_faces(32, 100, 64, seed=7))
    kwargs: dict[str, Any] = {"margin": MARGINS[name], "scale": 16.0, "reduction": "none"}
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        rounded = ops.margin_softmax_loss(x, w, y, **kwargs)
        halves = ops.margin_softmax_loss(x.bfloat16(), w, y, **kwargs)
    exact = ops.margin_softmax_loss(x, w, y, **kwargs)
    of_halves = ops.margin_softmax_loss(x.bfloat16().float(), w, y, **kwargs)
    for low, high in ((rounded, exact), (halves, of_halves)):
        a, e = (r[0] if isinstance(r, tuple) else r for r in (low, high))
        assert a.dtype == torch.float32
        assert not torch.equal(a, e)
        # The scores' errors, 16 * 2^-9 at worst each, average out in the sum over classes.
        torch.testing.assert_close(a, e, rtol=0, atol=16 * 2.0**-9)


def test_compiled_whole_with_its_gradient() -> None:
    x, w, y = (t.to(DEVICE) for t in random_faces(16, 50, 8, seed=7))
    x, w = x.requires_grad_(), w.requires_grad_()

    def loss(x: Tensor, w: Tensor) -> Tensor:
        result = ops.margin_softmax_loss(x, w, y, margin=ops.CurricularFace(0.5))
        return result[0]

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, w), loss(x, w), rtol=0, atol=0)
    for a, e in zip(
        torch.autograd.grad(compiled(x, w), (x, w)),
        torch.autograd.grad(loss(x, w), (x, w)),
        strict=True,
    ):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-7)


def test_under_gradient_checkpointing() -> None:
    x, w, y = (t.to(DEVICE) for t in random_faces(16, 50, 8, seed=7))
    x, w = x.requires_grad_(), w.requires_grad_()

    def loss(x: Tensor, w: Tensor) -> Tensor:
        value = ops.margin_softmax_loss(x, w, y, margin=ops.ArcFace())
        assert isinstance(value, Tensor)
        return value

    again = checkpoint(loss, x, w, use_reentrant=False)
    for a, e in zip(
        torch.autograd.grad(again, (x, w)), torch.autograd.grad(loss(x, w), (x, w)), strict=True
    ):
        assert torch.equal(a, e)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_every_instruction_set(dtype: torch.dtype, capability: str) -> None:
    """Sizes around tiles and chunks, on each instruction set of the C++ kernels."""
    unit = 2.0**-52 if dtype == torch.float64 else 2.0**-23
    for n, classes, dim, k in [
        (70, 400, 33, 1),
        (33, 193, 100, 3),
        (5, 1000, 8, 1),
        (600, 20, 16, 2),
    ]:
        x, w, y = random_faces(n, classes, dim, sub_centers=k, seed=n)
        x, w = x.to(dtype).requires_grad_(), w.to(dtype).requires_grad_()
        kwargs: dict[str, Any] = {"margin": ops.ArcFace(0.3), "scale": 8.0, "sub_centers": k}
        loss = ops.margin_softmax_loss(x, w, y, **kwargs, backend="cpu")
        wide = [t.detach().double().requires_grad_() for t in (x, w)]
        expected = definition(*wide, y, **kwargs)
        assert isinstance(loss, Tensor)
        assert isinstance(expected, Tensor)
        score = 8 * (dim + 8) * unit
        torch.testing.assert_close(
            loss.double(), expected, rtol=0, atol=4 * score + (classes + 16) * unit
        )
        coarse = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}.get(dtype, 0.0)
        for a, e in zip(
            torch.autograd.grad(loss, (x, w)), torch.autograd.grad(expected, wide), strict=True
        ):
            assert_gradient_close(a, e, rtol=8 * score + (n + classes) * unit + coarse)


def test_no_logits_in_memory() -> None:
    """Beyond inputs and gradients, 60 000 classes cost what 6 000 do."""
    n, classes, dim = 256, 60_000, 64
    x, w, y = (t.to(DEVICE) for t in random_faces(n, classes, dim))
    x, w = x.requires_grad_(), w.requires_grad_()

    def step() -> None:
        loss = ops.margin_softmax_loss(x, w, y, margin=ops.ArcFace())
        assert isinstance(loss, Tensor)
        torch.autograd.grad(loss, (x, w))

    step()
    gradients = 4 * (x.numel() + w.numel())
    assert peak_memory(step, DEVICE) - gradients < n * classes * 4 // 4
