"""VectorQuantize and ResidualVQ on several ranks against one process with the whole batch."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastzoo.nn import ResidualVQ, VectorQuantize
from tests.distributed.ranks import expect, run, same

DIM, CODES = 4, 7
COUNTS = ((5, 9, 3, 7), (6, 0, 1, 2))
KINDS: dict[str, tuple[type, dict[str, Any]]] = {
    "plain": (VectorQuantize, {}),
    "cosine": (VectorQuantize, {"use_cosine_sim": True}),
    "heads": (
        VectorQuantize,
        {"heads": 2, "codebook_dim": 2, "separate_codebook_per_head": True},
    ),
    "chain": (ResidualVQ, {"num_quantizers": 2}),
    "shared": (ResidualVQ, {"num_quantizers": 2, "shared_codebook": True}),
}


def vectors(counts: tuple[int, ...], seed: int = 0) -> tuple[Tensor, slice]:
    """The vectors of all ranks ``[1, N, D]``, and which are this rank's."""
    counts = counts[: dist.get_world_size()]
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, sum(counts), DIM, generator=generator, dtype=torch.float64)
    first = sum(counts[: dist.get_rank()])
    return x, slice(first, first + counts[dist.get_rank()])


def quantizer(kind: str, **options: Any) -> Any:
    torch.manual_seed(1)
    module, own = KINDS[kind]
    return module(dim=DIM, codebook_size=CODES, **own, **options).double()


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: t.double() for name, t in module.state_dict().items()}


def same_everywhere(module: nn.Module, what: str) -> None:
    for name, value in state(module).items():
        every = [torch.empty_like(value) for _ in range(dist.get_world_size())]
        dist.all_gather(every, value)
        for other in every:
            same(other, every[0], f"{what}, {name}", rtol=0)


def statistics(folder: Path) -> None:
    for kind in KINDS:
        for counts in COUNTS:
            mine, alone = quantizer(kind), quantizer(kind, sync_codebook=False)
            for seed in range(3):
                x, own = vectors(counts, seed)
                quantized, indices, _ = mine(x[:, own])
                expected, chosen, _ = alone(x)
                same(quantized, expected[:, own], kind)
                same(indices, chosen[:, own], kind)
            same_everywhere(mine, kind)
            for name, value in state(mine).items():
                same(value, state(alone)[name], f"{kind}, {counts}, {name}")


def own_statistics(folder: Path) -> None:
    mine = quantizer("plain", sync_codebook=False)
    x, own = vectors(COUNTS[0])
    expected = copy.deepcopy(mine)
    expected._codebook.sync = False
    mine(x[:, own])
    every = [torch.empty_like(mine.codebook) for _ in range(dist.get_world_size())]
    dist.all_gather(every, mine.codebook)
    expect(not torch.equal(every[0], every[1]), "codebooks are each rank's own")


def dead_codes(folder: Path) -> None:
    ranks = dist.get_world_size()
    for kind in ("plain", "cosine", "heads", "chain", "shared"):
        for counts in COUNTS:
            mine = quantizer(kind, threshold_ema_dead_code=0.5)
            for stage in getattr(mine, "layers", [mine]):
                stage._codebook.cluster_size.zero_()
            # As training scripts seed them, each rank draws other lots.
            torch.manual_seed(dist.get_rank())
            x, own = vectors(counts)
            mine(x[:, own])
            same_everywhere(mine, f"{kind}, {counts}")
            if kind == "plain":
                # Chosen once, a code has a count of 0.2.
                distance = torch.cdist(mine.codebook, x[0])
                drawn = distance.amin(1) < 1e-9
                sources = distance[drawn].argmin(1)
                expect(len(sources) >= min(CODES, sum(counts[:ranks])) - 4, "codes are replaced")
                expect(len(sources.unique()) == len(sources), "no vector twice")
                expect(bool((mine._codebook.cluster_size[0, drawn] == 0.5).all()), "their count")


def dead_codes_come_from_every_rank(folder: Path) -> None:
    seen = torch.zeros(dist.get_world_size())
    x = torch.full((1, 6, DIM), 1.0 + dist.get_rank()) + 0.001 * torch.rand(1, 6, DIM)
    for seed in range(10):
        mine = quantizer("plain", threshold_ema_dead_code=10).float()
        torch.manual_seed(seed)
        mine(x)
        ranks = mine.codebook[:, 0].round().long() - 1
        seen += torch.bincount(ranks.clamp(0), minlength=len(seen))
    # 70 codes, shared by chance among up to 4 ranks.
    expect(bool((seen >= 5).all()), f"codes by rank {seen.tolist()}")


def kmeans(folder: Path) -> None:
    for kind in ("plain", "cosine", "heads"):
        for counts in COUNTS:
            counts = tuple(8 * count for count in counts)
            mine = quantizer(kind, kmeans_init=True)
            torch.manual_seed(dist.get_rank())
            x, own = vectors(counts)
            mine.eval()(x[:, own])
            same_everywhere(mine, kind)
            book = mine._codebook
            total = sum(counts[: dist.get_world_size()])
            expect(bool((book.cluster_size.sum(1) == total).all()), "every vector counts")
            # Lloyd's iterations by one process from these codes hardly move them.
            quantized, _, _ = mine(x)
            target = torch.nn.functional.normalize(x, dim=-1) if kind == "cosine" else x
            inertia = float((quantized - target).square().mean())
            expect(inertia < 0.8 * float(target.var()), f"{kind}: {inertia}")


def left_out_stages(folder: Path) -> None:
    torch.manual_seed(0)
    mine = ResidualVQ(dim=DIM, codebook_size=CODES, num_quantizers=5, quantize_dropout=True)
    torch.manual_seed(dist.get_rank())
    found = []
    for _ in range(6):
        last = (mine(torch.randn(1, 3, DIM))[1][0, 0] >= 0).sum()
        every = [torch.empty_like(last) for _ in range(dist.get_world_size())]
        dist.all_gather(every, last)
        expect(len({int(t) for t in every}) == 1, "ranks leave out the same stages")
        found.append(int(last))
    expect(len(set(found)) > 1, "stages are left out at random")


def through_ddp(folder: Path) -> None:
    encoder = nn.Linear(DIM, DIM, dtype=torch.float64)
    both = nn.Sequential(encoder, quantizer("plain"))
    alone = nn.Sequential(copy.deepcopy(encoder), quantizer("plain", sync_codebook=False))
    model = DistributedDataParallel(both)
    for seed in range(2):
        x, own = vectors((4, 4, 4, 4), seed)
        for network, part in ((model, x[:, own]), (alone, x)):
            network.zero_grad()
            quantized, _, loss = network(part)
            (quantized.square().mean() + loss).backward()
    for (name, p), expected in zip(both.named_parameters(), alone.parameters(), strict=True):
        same(p.grad, expected.grad, name)
    for name, value in state(both).items():
        same(value, state(alone)[name], name)


CHECKS = {
    check.__name__: check
    for check in (
        statistics,
        own_statistics,
        dead_codes,
        dead_codes_come_from_every_rank,
        kmeans,
        left_out_stages,
        through_ddp,
    )
}
WORLDS = (2,)


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, str]]:
    folder = tmp_path_factory.mktemp("ranks")
    return {world: run(CHECKS, world, folder) for world in WORLDS}


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("check", CHECKS)
def test_ranks(errors: dict[int, dict[str, str]], check: str, world: int) -> None:
    assert errors[world].get(check) is None, errors[world][check]
