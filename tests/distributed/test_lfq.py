"""LFQ's mean distribution over the ranks of the default group, against one process."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from fastzoo.nn import LFQ
from tests.distributed.ranks import run, same

BITS = 4
BATCHES = ((5, 5), (7, 2), (6, 0))


def losses(w: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Each vector's entropy, and the distribution over codes of each."""
    signs = torch.tensor([[2 * (i >> b & 1) - 1 for b in range(BITS)] for i in range(2**BITS)])
    log_p = (2 * 3.0 * vectors @ w @ signs.to(w.dtype).T).log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1), log_p.exp()


def mean_over_ranks(folder: Path) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(3)
    w = torch.randn(3, BITS, generator=generator, dtype=torch.float64)
    for counts in BATCHES:
        vectors = torch.randn(sum(counts), 3, generator=generator, dtype=torch.float64)
        parts = vectors.split(counts)
        mine, whole = w.clone().requires_grad_(), w.clone().requires_grad_()
        quantizer = LFQ(dim=BITS, diversity_gamma=2.0)
        output, found = quantizer(parts[rank] @ mine, 3.0, return_loss_breakdown=True)
        output.entropy_aux_loss.backward()

        own = [losses(whole, part)[0].sum() / max(len(part), 1) for part in parts]
        mean = losses(whole, vectors)[1].mean(0)
        batch = torch.special.entr(mean).sum()
        what = f"{counts}"
        same(found.batch_entropy.detach(), batch.detach(), what)
        same(found.per_sample_entropy.detach(), own[rank].detach(), what)
        # What DistributedDataParallel does with gradients, and what it then should have.
        (0.1 * (sum(own) / world - 2.0 * batch)).backward()
        assert mine.grad is not None
        dist.all_reduce(mine.grad)
        same(mine.grad / world, whole.grad, what)


CHECKS = {"mean_over_ranks": mean_over_ranks}


def test_ranks(tmp_path: Path) -> None:
    errors = run(CHECKS, 2, tmp_path)
    if errors:
        pytest.fail("\n".join(errors.values()))
