"""MarginSoftmaxLoss: what a module adds to the operator. Many ranks: tests/distributed."""

import copy
import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastzoo import ops, reference
from fastzoo.nn import MarginSoftmaxLoss, ShardedMarginSoftmaxLoss
from fastzoo.testing.margin_softmax import MARGINS, random_faces

CLASSES, DIM = 12, 6
HEADS = [MarginSoftmaxLoss, ShardedMarginSoftmaxLoss]
STATEFUL = ["adaface", "curricularface"]


def faces(sub_centers: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    x, w, y = random_faces(9, CLASSES, DIM, sub_centers=sub_centers, seed=1)
    y[2] = -1
    return x.double(), w.double(), y


def head_of(kind: type, w: Tensor, margin: ops.Margin, **options: Any) -> Any:
    head = kind(CLASSES, DIM, margin, 8.0, dtype=torch.float64, **options)
    head.load_state_dict({"weight": w}, strict=False)
    return head


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("sub_centers", [1, 3])
@pytest.mark.parametrize("name", MARGINS)
def test_loss_and_gradients_are_the_definition(kind: type, name: str, sub_centers: int) -> None:
    x, w, y = faces(sub_centers)
    head = head_of(kind, w, MARGINS[name], sub_centers=sub_centers)
    mine = x.clone().requires_grad_()
    loss = head(mine, y)
    loss.backward()
    x.requires_grad_()
    w.requires_grad_()
    options: dict[str, Any] = {"margin": MARGINS[name], "scale": 8.0, "sub_centers": sub_centers}
    expected = reference.margin_softmax_loss(x, w, y, **options)
    if isinstance(expected, tuple):
        expected, state = expected
        torch.testing.assert_close(head.state, state)
    expected.backward()
    # Float64, in another order.
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(mine.grad, x.grad, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(head.weight.grad, w.grad, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize(
    "option",
    [
        {"reduction": "none"},
        {"ignore_index": 1},
        {"label_smoothing": 0.1, "class_weight": torch.linspace(1, 2, CLASSES)},
        {"interclass_filter": 0.2},
        {"grad": "insightface"},
    ],
    ids=lambda option: next(iter(option)),
)
def test_options_reach_the_operator(kind: type, option: dict[str, Any]) -> None:
    x, w, y = faces()
    margin = MARGINS["magface"]
    loss = head_of(kind, w, margin, **option)(x.requires_grad_(), y)
    (mine,) = torch.autograd.grad(loss.sum(), x)
    expected = reference.margin_softmax_loss(x, w, y, margin=margin, scale=8.0, **option)
    assert isinstance(expected, Tensor)
    (theirs,) = torch.autograd.grad(expected.sum(), x)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)
    assert str(next(iter(option))) in repr(head_of(kind, w, margin, **option))


@pytest.mark.parametrize("name", MARGINS)
@pytest.mark.parametrize("training", [True, False])
def test_cross_entropy_of_the_logits_is_the_loss(name: str, training: bool) -> None:
    x, w, y = faces()
    head = head_of(MarginSoftmaxLoss, w, MARGINS[name]).train(training)
    loss = head(x, y)
    before = None if head.state is None else head.state.clone()
    extra = MARGINS[name].regularizer(x.norm(dim=1))
    expected = F.cross_entropy(head.logits(x, y), y, ignore_index=-1)
    if extra is not None:
        expected = expected + extra[y >= 0].mean()
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    if before is not None:
        assert torch.equal(head.state, before), "logits leave the state alone"


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("name", STATEFUL)
def test_the_state_runs_in_training_alone(kind: type, name: str) -> None:
    x, w, y = faces()
    head, state = head_of(kind, w, MARGINS[name]), None
    for _ in range(3):
        kwargs: dict[str, Any] = {"margin": MARGINS[name], "scale": 8.0, "state": state}
        expected, state = reference.margin_softmax_loss(x, w, y, **kwargs)
        torch.testing.assert_close(head(x, y), expected, rtol=1e-9, atol=0)
        torch.testing.assert_close(head.state, state, rtol=1e-12, atol=0)
    trained = head.state.clone()
    head.eval()
    first, second = head(x, y), head(x, y)
    assert torch.equal(first, second)
    assert torch.equal(head.state, trained)
    head.reset_parameters()
    assert torch.equal(head.state, MARGINS[name].initial_state(head.state))


@pytest.mark.parametrize("name", STATEFUL)
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpoints_count_a_batch_once(name: str, reentrant: bool) -> None:
    x, w, y = faces()
    plain, again = (head_of(MarginSoftmaxLoss, w, MARGINS[name]) for _ in range(2))
    x.requires_grad_()
    (expected,) = torch.autograd.grad(plain(x, y), x)
    checkpoint(again, x, y, use_reentrant=reentrant).backward()
    assert torch.equal(again.state, plain.state)
    assert x.grad is not None
    assert torch.equal(x.grad, expected)


@pytest.mark.parametrize("name", ["arcface", *STATEFUL])
def test_fullgraph_compile(name: str) -> None:
    x, w, y = faces()
    plain, compiled = (head_of(MarginSoftmaxLoss, w, MARGINS[name]) for _ in range(2))
    function = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for training in (True, False):
        plain.train(training)
        compiled.train(training)
        loss, expected = function(x, y), plain(x, y)
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
        loss.backward()
        expected.backward()
    torch.testing.assert_close(compiled.weight.grad, plain.weight.grad, rtol=1e-9, atol=1e-12)
    if plain.state is not None:
        torch.testing.assert_close(compiled.state, plain.state, rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", HEADS)
def test_autocast(kind: type) -> None:
    x, w, y = faces()
    head = head_of(kind, w, MARGINS["adaface"]).float()
    exact = head_of(kind, w, MARGINS["adaface"])(x, y).item()
    with torch.autocast("cpu", torch.bfloat16):
        loss = head(x.bfloat16(), y)
    loss.backward()
    assert loss.dtype == torch.float32
    assert head.weight.grad.dtype == torch.float32
    # Scores of 8 times a cosine: of rounded operands, doubled by the margin's slope; and AdaFace's
    # norms are of rounded embeddings.
    assert abs(loss.item() - exact) < 8 * 3 * 2**-8


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("sub_centers", [1, 3])
def test_checkpoints(kind: type, sub_centers: int) -> None:
    _, w, _ = faces(sub_centers)
    head = head_of(kind, w, MARGINS["adaface"], sub_centers=sub_centers)
    state = head.state_dict()
    shape = (CLASSES, 3, DIM) if sub_centers == 3 else (CLASSES, DIM)
    assert tuple(state["weight"].shape) == shape
    assert state["weight"].data_ptr() == head.weight.data_ptr()
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    for other_kind in HEADS:
        other = other_kind(CLASSES, DIM, MARGINS["adaface"], sub_centers=sub_centers).double()
        file.seek(0)
        other.load_state_dict(torch.load(file))
        assert torch.equal(other.weight, w)
        other.load_state_dict({**state, "weight": w})
        assert torch.equal(other.weight, w)
    assert torch.equal(copy.deepcopy(head).weight, w)


@pytest.mark.parametrize("kind", HEADS)
def test_parameters_and_buffers(kind: type) -> None:
    torch.manual_seed(0)
    head = kind(1000, 64, ops.ArcFace(), class_weight=torch.ones(1000))
    assert [name for name, _ in head.named_parameters()] == ["weight"]
    # Of 64 000 numbers the deviation is within 1 % of its expectation.
    assert 0.0099 < head.weight.detach().std().item() < 0.0101
    assert list(head.state_dict()) == ["weight"]
    assert head.to("meta").class_weight.device.type == "meta"
    on_meta = kind(1000, 64, ops.AdaFace(), device="meta").to_empty(device="cpu")
    on_meta.reset_parameters()
    assert 0.0099 < on_meta.weight.detach().std().item() < 0.0101
    assert torch.equal(on_meta.state, torch.tensor([20.0, 100.0]))


def test_a_learnt_scale() -> None:
    x, w, y = faces()
    head = MarginSoftmaxLoss(CLASSES, DIM, ops.CosFace(), nn.Parameter(torch.tensor(8.0)))
    assert {name for name, _ in head.named_parameters()} == {"scale", "weight"}
    head.double()
    head.load_state_dict({"weight": w}, strict=False)
    head(x, y).backward()
    scale = torch.tensor(8.0, dtype=torch.float64, requires_grad=True)
    expected = reference.margin_softmax_loss(x, w, y, margin=ops.CosFace(), scale=scale)
    assert isinstance(expected, Tensor)
    expected.backward()
    torch.testing.assert_close(head.scale.grad, scale.grad)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("match", "kwargs"),
    [
        ("num_classes", {"num_classes": 0}),
        ("embedding_size", {"embedding_size": 0}),
        ("sub_centers", {"sub_centers": 0}),
        ("reduction", {"reduction": "max"}),
        ("class_weight", {"class_weight": torch.ones(3)}),
        ("margin", {"margin": 0.5}),
    ],
)
@pytest.mark.parametrize("kind", HEADS)
def test_bad_arguments(kind: type, match: str, kwargs: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError), match=match):
        kind(**{"num_classes": 4, "embedding_size": 3, "margin": ops.ArcFace(), **kwargs})


@pytest.mark.parametrize(
    ("match", "kwargs"),
    [
        ("sample_rate", {"sample_rate": 0.0}),
        ("sample_rate", {"sample_rate": 1.5}),
        ("label_smoothing", {"sample_rate": 0.5, "label_smoothing": 0.1}),
        ("scale", {"scale": torch.tensor(1.0)}),
    ],
)
def test_bad_arguments_of_shards(match: str, kwargs: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError), match=match):
        ShardedMarginSoftmaxLoss(4, 3, ops.ArcFace(), **kwargs)
    head = ShardedMarginSoftmaxLoss(4, 3, ops.ArcFace())
    for x, y in [(torch.ones(2, 4), torch.zeros(2)), (torch.ones(2, 3), torch.zeros(3))]:
        with pytest.raises(ValueError, match="embeddings, labels"):
            head(x, y.long())
    with pytest.raises(ValueError, match="labels: expected less than 4"):
        head(torch.ones(2, 3), torch.tensor([1, 4]))
