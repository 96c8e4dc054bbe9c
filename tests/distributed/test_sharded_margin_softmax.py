"""ShardedMarginSoftmaxLoss on 2, 3 and 4 ranks against the definition in one process, in float64.

The definition holds all logits and knows nothing of ranks. A sum over ranks changes the order of
additions alone: 1e-9 of the value stands far above that and far below any term left out.
"""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from fastzoo import ops, reference
from fastzoo.nn import MarginSoftmaxLoss, ShardedMarginSoftmaxLoss
from fastzoo.testing.margin_softmax import MARGINS
from tests.distributed.ranks import expect, run, same
from tests.insightface_head import MARGINS as MARGINS_OF_INSIGHTFACE
from tests.insightface_head import insightface_loss

DIM = 6
COUNTS = (5, 0, 3, 7)
WRAPPED = "classes differ per rank: wrap the backbone only"


class Problem:
    """A batch of which each rank has COUNTS rows, and the weight of all classes."""

    def __init__(
        self, classes: int = 10, sub_centers: int = 1, counts: tuple[int, ...] = COUNTS
    ) -> None:
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.counts = counts[: self.world]
        generator = torch.Generator().manual_seed(classes)
        n = sum(self.counts)
        self.classes, self.sub_centers = classes, sub_centers
        self.w = torch.randn(classes * sub_centers, DIM, generator=generator, dtype=torch.float64)
        self.x = 2 * torch.randn(n, DIM, generator=generator, dtype=torch.float64)
        # The last ranks have no row's class.
        self.y = torch.randint(-1, max(1, classes // 3), (n,), generator=generator)
        first = sum(self.counts[: self.rank])
        self.rows = slice(first, first + self.counts[self.rank])

    def head(self, margin: ops.Margin, scale: float = 4.0, **options: Any) -> Any:
        head = ShardedMarginSoftmaxLoss(
            self.classes,
            DIM,
            margin,
            scale,
            sub_centers=self.sub_centers,
            dtype=torch.float64,
            **options,
        )
        head.load_state_dict({"weight": self.w}, strict=False)
        return head

    def own_weight(self, whole: Tensor) -> Tensor:
        """What torch.chunk gives this rank, class by class."""
        chunks = whole.unflatten(0, (self.classes, -1)).chunk(self.world)
        return (chunks[self.rank] if self.rank < len(chunks) else chunks[0][:0]).flatten(0, 1)

    def embeddings(self) -> Tensor:
        return self.x[self.rows].clone().requires_grad_()

    def definition(
        self, margin: ops.Margin, classes: Tensor | None = None, **options: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss and gradients in one process, of some classes or all."""
        x, w = self.x.clone().requires_grad_(), self.w.clone().requires_grad_()
        y, used = self.y, w
        if classes is not None:
            used = w.unflatten(0, (self.classes, -1))[classes].flatten(0, 1)
            y = torch.where(y >= 0, torch.searchsorted(classes, y), -1)
        options = {"scale": 4.0, **options}
        result = reference.margin_softmax_loss(
            x, used, y, margin=margin, sub_centers=self.sub_centers, **options
        )
        loss = result if isinstance(result, Tensor) else result[0]
        loss.sum().backward()
        return loss.detach(), x.grad, w.grad  # type: ignore[return-value]


def compare(problem: Problem, margin: ops.Margin, what: str, **options: Any) -> None:
    head, x = problem.head(margin, **options), problem.embeddings()
    loss = head(x, problem.y[problem.rows])
    loss.sum().backward()
    expected, grad_x, grad_w = problem.definition(margin, **options)
    if expected.dim():
        expected = expected[problem.rows]
    same(loss.detach(), expected, f"{what}: loss")
    same(x.grad, problem.world * grad_x[problem.rows], f"{what}: embeddings")
    same(head.weight.grad, problem.own_weight(grad_w), f"{what}: weight")


def every_margin(folder: Path) -> None:
    for sub_centers in (1, 3):
        problem = Problem(sub_centers=sub_centers)
        for name, margin in MARGINS.items():
            compare(problem, margin, f"{name}, {sub_centers}")


def every_option(folder: Path) -> None:
    problem = Problem()
    class_weight = torch.linspace(0.5, 2, 10, dtype=torch.float64)
    options: list[dict[str, Any]] = [
        {"label_smoothing": 0.2},
        {"class_weight": class_weight},
        {"label_smoothing": 0.1, "class_weight": class_weight},
        {"ignore_index": 1},
        {"interclass_filter": 0.3},
        {"grad": "insightface"},
        {"reduction": "sum"},
        {"reduction": "none"},
    ]
    for option in options:
        for name in ("arcface", "magface"):
            compare(problem, MARGINS[name], f"{name}, {option}", **option)


def fewer_classes_than_ranks(folder: Path) -> None:
    for classes in (1, 2, 5):
        for sub_centers in (1, 2):
            problem = Problem(classes, sub_centers)
            for name in ("arcface", "l-softmax", "inner-product", "curricularface"):
                compare(problem, MARGINS[name], f"{name}, {classes} classes")
            smooth = {"label_smoothing": 0.1, "class_weight": torch.arange(1.0, classes + 1)}
            compare(problem, MARGINS["arcface"], f"smooth, {classes} classes", **smooth)


def no_row_counts(folder: Path) -> None:
    problem = Problem()
    problem.y = torch.full_like(problem.y, -1)
    compare(problem, MARGINS["magface"], "nowhere")
    compare(Problem(counts=(0,) * 4), MARGINS["arcface"], "no rows")
    compare(Problem(counts=(3,) * 4), MARGINS["arcface"], "even")


def a_rank_without_gradient(folder: Path) -> None:
    problem = Problem()
    head = problem.head(MARGINS["arcface"])
    x = problem.embeddings()
    if problem.counts[problem.rank] == 0:
        x = x.detach()
    head(x, problem.y[problem.rows]).backward()
    _, _, grad_w = problem.definition(MARGINS["arcface"])
    same(head.weight.grad, problem.own_weight(grad_w), "weight")


def running_state(folder: Path) -> None:
    for name in ("adaface", "curricularface"):
        problem = Problem()
        margin = MARGINS[name]
        head, state = problem.head(margin), None
        for _ in range(3):
            before = state
            head(problem.embeddings(), problem.y[problem.rows])
            kwargs: dict[str, Any] = {"margin": margin, "scale": 4.0}
            _, state = reference.margin_softmax_loss(
                problem.x, problem.w, problem.y, state=state, **kwargs
            )
            same(head.state, state, name)
        expect(not torch.equal(state, before), name)
        head.eval()
        frozen = head(problem.embeddings(), problem.y[problem.rows])
        same(head.state, state, f"{name}: evaluation")
        same(frozen, problem.definition(margin.frozen(), **_state(head))[0], f"{name}: evaluation")


def sampling(folder: Path) -> None:
    for sub_centers in (1, 3):
        problem = Problem(40, sub_centers)
        own = ShardedMarginSoftmaxLoss.shares(40, problem.world)[problem.rank]
        for name in ("arcface", "adaface", "curricularface"):
            margin = MARGINS[name]
            head, x = problem.head(margin, sample_rate=0.3, seed=5), problem.embeddings()
            draws = [_drawn(problem, head) for _ in range(3)]
            head.step = 0
            loss = head(x, problem.y[problem.rows])
            loss.backward()
            everywhere: list[Any] = [None] * problem.world
            dist.all_gather_object(everywhere, draws[0])
            drawn = torch.cat(everywhere)
            expected, grad_x, grad_w = problem.definition(margin, classes=drawn)
            same(loss.detach(), expected, f"{name}: loss")
            same(x.grad, problem.world * grad_x[problem.rows], f"{name}: embeddings")
            same(head.weight.grad, problem.own_weight(grad_w), f"{name}: weight")
            present = problem.y[problem.y >= 0].unique()
            expect(set(present.tolist()) <= set(drawn.tolist()), "positives")
            here = (present >= head._classes().start) & (present < head._classes().stop)
            number = max(math.ceil(0.3 * own), int(here.sum()))
            expect(len(draws[0]) == number and head.step == 1, "number")
            chance = number > int(here.sum())
            expect(chance != torch.equal(draws[0], draws[1]), "another step, other classes")
            head.eval()
            same(
                head(x, problem.y[problem.rows]),
                problem.definition(margin.frozen(), **_state(head))[0],
                f"{name}: evaluation",
            )


def _drawn(problem: Problem, head: Any) -> Tensor:
    """The classes of a draw, as classes of all ranks."""
    first = head._classes().start
    here = (problem.y >= first) & (problem.y < head._classes().stop)
    return first + head._draw(torch.where(here, problem.y - first, -1))  # type: ignore[no-any-return]


def _state(head: Any) -> dict[str, Tensor]:
    return {} if head.state is None else {"state": head.state}


def activation_checkpoint(folder: Path) -> None:
    problem = Problem(40)
    for name in ("adaface", "curricularface"):
        plain, again = (problem.head(MARGINS[name], sample_rate=0.3) for _ in range(2))
        x, y = problem.embeddings(), problem.y[problem.rows]
        plain(x, y).backward()
        x_again = problem.embeddings()
        checkpoint(again, x_again, y, use_reentrant=False).backward()
        same(x_again.grad, x.grad, name)
        same(again.weight.grad, plain.weight.grad, name)
        same(again.state, plain.state, name)


class Model(nn.Module):
    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.head(self.backbone(x), y)  # type: ignore[no-any-return]


def through_ddp(folder: Path) -> None:
    problem = Problem()
    for name in ("arcface", "magface", "curricularface"):
        backbone = nn.Sequential(nn.Linear(DIM, DIM), nn.Tanh(), nn.Linear(DIM, DIM)).double()
        alone = [p.detach().clone().requires_grad_() for p in backbone.parameters()]
        model = Model(DistributedDataParallel(backbone), problem.head(MARGINS[name]))
        model(problem.x[problem.rows], problem.y[problem.rows]).backward()
        w = problem.w.clone().requires_grad_()
        embeddings = torch.tanh(problem.x @ alone[0].t() + alone[1]) @ alone[2].t() + alone[3]
        result = reference.margin_softmax_loss(
            embeddings, w, problem.y, margin=MARGINS[name], scale=4.0
        )
        (result if isinstance(result, Tensor) else result[0]).backward()
        for parameter, expected in zip(backbone.parameters(), alone, strict=True):
            same(parameter.grad, expected.grad, name)
        same(model.head.weight.grad, problem.own_weight(w.grad), name)


def whole_head_through_ddp(folder: Path) -> None:
    """A head with every class on every rank is any other module: DDP averages its gradients."""
    problem = Problem(counts=(5, 2, 3, 7))
    head = MarginSoftmaxLoss(problem.classes, DIM, MARGINS["arcface"], 4.0).double()
    head.load_state_dict({"weight": problem.w})
    model = Model(nn.Linear(DIM, DIM).double(), head)
    alone = [p.detach().clone().requires_grad_() for p in model.backbone.parameters()]
    wrapper = DistributedDataParallel(model)
    wrapper(problem.x[problem.rows], problem.y[problem.rows]).backward()
    w = problem.w.clone().requires_grad_()
    parts = zip(
        problem.x.split(list(problem.counts)), problem.y.split(list(problem.counts)), strict=True
    )
    losses = [
        reference.margin_softmax_loss(
            x @ alone[0].t() + alone[1], w, y, margin=MARGINS["arcface"], scale=4.0
        )
        for x, y in parts
    ]
    torch.stack(losses).mean().backward()  # type: ignore[arg-type]
    for parameter, expected in zip(model.parameters(), [*alone, w], strict=True):
        same(parameter.grad, expected.grad, "whole head")


def wrapped(folder: Path) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    def model(classes: int = 10) -> Model:
        return Model(nn.Linear(DIM, DIM), ShardedMarginSoftmaxLoss(classes, DIM, ops.ArcFace()))

    def fsdp(module: nn.Module) -> None:
        FullyShardedDataParallel(module, device_id=torch.device("cpu"))

    for classes in (11, 12):
        for wrap in (DistributedDataParallel, fsdp, fully_shard):
            for module in (model(classes), model(classes).head):
                with pytest.raises(RuntimeError, match=WRAPPED):
                    wrap(module)
    # What may be: a backbone in either, the head left out.
    fine = model()
    fine.backbone = fully_shard(fine.backbone)
    problem = Problem()
    fine(problem.x[problem.rows].float(), problem.y[problem.rows]).backward()
    ignoring = model()
    fully_shard(ignoring, ignored_params=set(ignoring.head.parameters()))
    FullyShardedDataParallel(
        (outer := model()), device_id=torch.device("cpu"), ignored_modules=[outer.head]
    )
    ignoring = model()
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(ignoring, ["head.weight"])
    DistributedDataParallel(ignoring)
    torch.optim.SGD(ignoring.parameters(), 0.1)


def unlike_weights(folder: Path) -> None:
    torch.manual_seed(3)
    heads = [ShardedMarginSoftmaxLoss(12, DIM, ops.ArcFace()) for _ in range(2)]
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, torch.cat([h.weight.detach() for h in heads]))
    rows = torch.cat(everywhere)
    expect(len(rows.unique(dim=0)) == 24, "rows of two classes are equal")
    # 144 numbers: their deviation is within 6 % of 0.01 two times out of three.
    expect(0.007 < float(rows.std()) < 0.013, "deviation")


def a_label_of_no_class(folder: Path) -> None:
    problem = Problem()
    head = problem.head(MARGINS["arcface"])
    problem.y[0] = 10
    with pytest.raises(ValueError, match="labels: expected less than 10, got 10"):
        head(problem.embeddings(), problem.y[problem.rows])


def low_precision(folder: Path) -> None:
    problem = Problem(counts=(4, 1, 3, 7))
    margin = MARGINS["arcface"]
    expected = problem.definition(margin)[0]
    x, y = problem.embeddings().detach().float().requires_grad_(), problem.y[problem.rows]
    head = problem.head(margin).float()
    losses = {}
    with torch.autocast("cpu", torch.bfloat16):
        losses["autocast"] = head(x, y)
    losses["float32"] = head(x, y)
    losses["bfloat16"] = head.bfloat16()(x.bfloat16(), y)
    for name, loss in losses.items():
        expect(loss.dtype == torch.float32, name)
        loss.backward()
        everywhere: list[Any] = [None] * problem.world
        dist.all_gather_object(everywhere, loss.item())
        expect(len(set(everywhere)) == 1, name)
        # A score of 4 times a cosine whose operands are rounded, doubled by the margin's slope.
        unit = 2.0**-24 if name == "float32" else 2.0**-8
        expect(abs(loss.item() - expected.item()) < 4 * 4 * (DIM + 8) * unit, name)


def saved(folder: Path) -> None:
    """Each world loads what the one before it saved, and saves what it has."""
    world = dist.get_world_size()
    for sub_centers in (1, 3):
        problem = Problem(11, sub_centers)
        head = problem.head(MARGINS["adaface"])
        head(problem.embeddings(), problem.y[problem.rows])
        momentum = head.weight.detach() * 2
        mine = {**head.state_dict(), "momentum": head.checkpointed(momentum)}
        dcp.save(mine, checkpoint_id=folder / f"{world}-{sub_centers}")
        before = folder / f"{world - 1}-{sub_centers}"
        if not before.exists():
            continue
        other = problem.head(MARGINS["adaface"])
        nn.init.zeros_(other.weight)
        read = {**other.state_dict(), "momentum": other.checkpointed(torch.zeros_like(momentum))}
        dcp.load(read, checkpoint_id=before)
        local = read.pop("momentum").to_local()
        same(local.flatten(0, -2), momentum, "momentum")
        other.load_state_dict(read)
        same(other.weight, problem.own_weight(problem.w), "weight")
        expect(float(other.state[0]) != 20, "state")
        # A whole weight, this rank's rows, or another's DTensor: all of them load.
        rows = problem.own_weight(problem.w)
        for weight in (problem.w, rows, head.state_dict()["weight"]):
            nn.init.zeros_(other.weight)
            other.load_state_dict({**read, "weight": weight})
            same(other.weight, problem.own_weight(problem.w), "weight")


def partial_fc(folder: Path) -> None:
    from fastzoo.compat.insightface import CombinedMarginLoss, PartialFC_V2

    problem = Problem(11)
    problem.y = problem.y.clamp(min=0)
    for margin in MARGINS_OF_INSIGHTFACE:
        head = PartialFC_V2(CombinedMarginLoss(*margin), DIM, problem.classes).double()
        # Of another number of ranks.
        head.load_ranks({"weight": rows} for rows in problem.w.split([3, 3, 3, 1, 1]))
        x, w = problem.x.clone().requires_grad_(), problem.w.clone().requires_grad_()
        expected = insightface_loss(x, w, problem.y, *margin)
        expected.backward()
        own = problem.embeddings()
        loss = head(own, problem.y[problem.rows])
        loss.backward()
        same(loss.detach(), expected.detach(), f"{margin}: loss")
        same(own.grad, problem.world * x.grad[problem.rows], f"{margin}: embeddings")
        # Theirs: the first classes % ranks ranks have a class more.
        share, more = divmod(problem.classes, problem.world)
        rows = torch.tensor([share + (rank < more) for rank in range(problem.world)])
        first = int(rows[: problem.rank].sum())
        mine = slice(first, first + int(rows[problem.rank]))
        same(head.state_dict()["weight"], problem.w[mine], f"{margin}: checkpoint")
        same(head.weight.grad, w.grad[mine], f"{margin}: weight")


CHECKS = {
    check.__name__: check
    for check in (
        every_margin,
        every_option,
        fewer_classes_than_ranks,
        no_row_counts,
        a_rank_without_gradient,
        running_state,
        sampling,
        activation_checkpoint,
        through_ddp,
        whole_head_through_ddp,
        wrapped,
        unlike_weights,
        a_label_of_no_class,
        low_precision,
        saved,
        partial_fc,
    )
}
WORLDS = (2, 3, 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def errors(folder: Path) -> dict[int, dict[str, str]]:
    return {world: run(CHECKS, world, folder) for world in WORLDS}


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("check", CHECKS)
def test_ranks(errors: dict[int, dict[str, str]], check: str, world: int) -> None:
    assert errors[world].get(check) is None, errors[world][check]


@pytest.mark.parametrize("sub_centers", [1, 3])
def test_one_process_loads_what_many_saved(
    errors: dict[int, dict[str, str]], folder: Path, sub_centers: int
) -> None:
    generator = torch.Generator().manual_seed(11)
    weight = torch.randn(11 * sub_centers, DIM, generator=generator, dtype=torch.float64)
    for kind in (MarginSoftmaxLoss, ShardedMarginSoftmaxLoss):
        head = kind(11, DIM, MARGINS["adaface"], sub_centers=sub_centers, dtype=torch.float64)
        state = head.state_dict()
        dcp.load(state, checkpoint_id=folder / f"4-{sub_centers}")
        head.load_state_dict(state)
        assert torch.equal(head.weight, weight)
        assert not torch.equal(head.state, torch.tensor([20.0, 100.0]))
