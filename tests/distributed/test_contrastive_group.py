"""clip_loss and sigmoid_contrastive_loss over a group against their definitions in one process."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastzoo import ops, reference
from fastzoo.testing.contrastive import random_pairs
from tests.distributed.ranks import run, same

DIM = 6
LOSSES: dict[str, tuple[Any, Any]] = {
    "clip": (ops.clip_loss, reference.clip_loss),
    "sigmoid": (ops.sigmoid_contrastive_loss, reference.sigmoid_contrastive_loss),
}
BATCHES = ((5, 0, 3, 7), (4, 4, 4, 4), (0, 1, 0, 0))


def pairs(counts: tuple[int, ...]) -> tuple[list[Tensor], slice]:
    """Images, texts, scale and bias, in float64, and which pairs are this rank's."""
    counts = counts[: dist.get_world_size()]
    image, text = random_pairs(sum(counts), DIM, seed=2)
    first = sum(counts[: dist.get_rank()])
    inputs = [image, text, torch.tensor(7.0), torch.tensor(-3.0)]
    return [t.double() for t in inputs], slice(first, first + counts[dist.get_rank()])


def losses_and_gradients(folder: Path) -> None:
    group = dist.group.WORLD
    for name, (function, definition) in LOSSES.items():
        for counts in BATCHES:
            inputs, rows = pairs(counts)
            own = [t[rows] if t.dim() else t for t in inputs]
            own = [t.clone().requires_grad_() for t in own]
            whole = [t.clone().requires_grad_() for t in inputs]
            loss, expected = function(*own, group=group), definition(*whole)
            loss.backward()
            expected.backward()
            what = f"{name}, {counts}"
            same(loss.detach(), expected.detach(), what)
            for mine, every in zip(own[:2], whole[:2], strict=True):
                same(mine.grad, dist.get_world_size() * every.grad[rows], what)
            for mine, every in zip(own[2:], whole[2:], strict=True):
                # Each rank has a share, which averaging over ranks adds up.
                dist.all_reduce(mine.grad)
                same(mine.grad / dist.get_world_size(), every.grad, what)


def one_tower_frozen(folder: Path) -> None:
    for frozen in (0, 1):
        inputs, rows = pairs(BATCHES[0])
        own = [t[rows] if t.dim() else t for t in inputs]
        own[1 - frozen] = own[1 - frozen].clone().requires_grad_()
        whole = [t.clone().requires_grad_() for t in inputs]
        ops.clip_loss(*own, group=dist.group.WORLD).backward()
        reference.clip_loss(*whole).backward()
        expected = dist.get_world_size() * whole[1 - frozen].grad[rows]
        same(own[1 - frozen].grad, expected, f"frozen {frozen}")


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = (nn.Linear(DIM, 4, dtype=torch.float64) for _ in range(2))
        self.scale = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.image(image), self.text(text), self.scale.exp()


def through_ddp(folder: Path) -> None:
    towers, alone = Towers(), Towers()
    model = DistributedDataParallel(towers)
    alone.load_state_dict(towers.state_dict())
    (image, text, *_), rows = pairs(BATCHES[0])
    ops.clip_loss(*model(image[rows], text[rows]), group=dist.group.WORLD).backward()
    reference.clip_loss(*alone(image, text)).backward()
    for (name, actual), expected in zip(towers.named_parameters(), alone.parameters(), strict=True):
        # The text tower's bias has a gradient of 0, the difference of numbers near 1.
        same(actual.grad, expected.grad, name)


CHECKS = {check.__name__: check for check in (losses_and_gradients, one_tower_frozen, through_ddp)}
WORLDS = (2, 4)


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, str]]:
    folder = tmp_path_factory.mktemp("ranks")
    return {world: run(CHECKS, world, folder) for world in WORLDS}


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("check", CHECKS)
def test_ranks(errors: dict[int, dict[str, str]], check: str, world: int) -> None:
    assert errors[world].get(check) is None, errors[world][check]
