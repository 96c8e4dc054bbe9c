"""Collectives with gradients, over rows of which each rank of a process group has its own number.

What is differentiated is the sum of what the ranks make of their results, except that a value which
:func:`sum_over` made the same on every rank counts once. Every rank must call what its peers call,
backwards too: :meth:`Batch.of` makes the ranks agree on which tensors have gradients.
"""

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastzoo.reference.precision import compute_dtype


def _named(name: str, older: str) -> Any:
    """A collective by its name, or by the older one, of which newer torches warn."""
    return getattr(dist, name, None) or getattr(dist, older, None)


_all_gather = _named("all_gather_single", "all_gather_into_tensor")
_reduce_scatter = _named("reduce_scatter_single", "reduce_scatter_tensor")


def world(group: "dist.ProcessGroup | None") -> tuple[int, int]:
    """This process's rank in the group, and how many there are. None: the default group, or this
    process alone where there is none."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(group), dist.get_world_size(group)


@dataclasses.dataclass(frozen=True)
class Batch:
    """A batch of which each rank of a group holds consecutive rows, as many as it likes."""

    group: "dist.ProcessGroup | None"
    rank: int
    counts: tuple[int, ...]  # rows of each rank

    @staticmethod
    def of(
        group: "dist.ProcessGroup | None", rows: int, *tensors: Tensor
    ) -> tuple["Batch", tuple[Tensor, ...]]:
        """The batch of which this rank has ``rows``; and the tensors, each with a gradient if it
        has one on any rank. The first tensor's device is where ranks meet."""
        rank, size = world(group)
        if size == 1:
            return Batch(group, rank, (rows,)), tensors
        needs = [torch.is_grad_enabled() and t.requires_grad for t in tensors]
        mine = torch.tensor([rows, *needs], device=tensors[0].device)
        table = mine.new_empty(size * len(mine))
        _all_gather(table, mine, group=group)
        counts, *wanted = table.view(size, -1).t().tolist()
        agreed = tuple(
            t.detach().requires_grad_() if any(everywhere) and not own else t
            for t, own, everywhere in zip(tensors, needs, wanted, strict=True)
        )
        return Batch(group, rank, tuple(counts)), agreed

    @property
    def own(self) -> slice:
        first = sum(self.counts[: self.rank])
        return slice(first, first + self.counts[self.rank])

    def gather(self, own: Tensor) -> Tensor:
        """The rows of all ranks, in their order."""
        return own if len(self.counts) == 1 else _differentiable(_Gather, own, self)

    def scatter_sum(self, rows: Tensor) -> Tensor:
        """Of the sum over ranks of ``rows``, those which this rank has."""
        return rows if len(self.counts) == 1 else _differentiable(_ScatterSum, rows, self)

    def exponentials(self, parts: Tensor) -> tuple[Tensor, Tensor]:
        """What to add up, and what to add to the logarithm of this rank's sums, so that each row
        becomes the log-sum-exp of what the ranks hold of it."""
        top = max_over(parts.detach(), self.group)
        top = torch.where(top.isinf(), 0, top)
        return torch.exp(parts - top), top[self.own]


def log_of_sum(total: Tensor, top: Tensor) -> Tensor:
    """Ends what :meth:`Batch.exponentials` began; of nothing it is -inf, without a gradient."""
    nothing = total == 0
    return torch.where(nothing, -torch.inf, top + torch.where(nothing, 1, total).log())


def sum_over(value: Tensor, group: "dist.ProcessGroup | None") -> Tensor:
    """The sum over ranks, the same on each; its gradient goes to each rank's part unchanged."""
    return value if world(group)[1] == 1 else _differentiable(_Sum, value, group)


def max_over(value: Tensor, group: "dist.ProcessGroup | None") -> Tensor:
    """The maximum over ranks, without gradient."""
    if world(group)[1] == 1:
        return value
    value = value.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(value, dist.ReduceOp.MAX, group=group)
    return value


def for_average(value: Tensor, group: "dist.ProcessGroup | None") -> Tensor:
    """The value, whose gradient is multiplied by the number of ranks: what averages gradients over
    them, as DistributedDataParallel does, then has their sum."""
    size = world(group)[1]
    return value if size == 1 else _differentiable(_ScaleGradient, value, size)


def _padded(rows: Tensor, count: int) -> Tensor:
    if len(rows) == count:
        return rows.contiguous()
    return torch.cat([rows, rows.new_zeros(count - len(rows), *rows.shape[1:])])


def _differentiable(function: type[torch.autograd.Function], *args: Any) -> Tensor:
    result: Tensor = function.apply(*args)  # type: ignore[no-untyped-call]
    return result


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, batch: Batch) -> Tensor:
        ctx.batch = batch
        most = max(batch.counts)
        every = own.new_empty(len(batch.counts) * most, *own.shape[1:])
        _all_gather(every, _padded(own, most), group=batch.group)
        if min(batch.counts) == most:
            return every
        parts = zip(every.split(most), batch.counts, strict=True)
        return torch.cat([part[:count] for part, count in parts])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _differentiable(_ScatterSum, grad, ctx.batch), None


class _ScatterSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, batch: Batch) -> Tensor:
        ctx.batch = batch
        most = max(batch.counts)
        wide = rows.to(compute_dtype(rows))
        if min(batch.counts) != most:
            wide = torch.cat([_padded(part, most) for part in wide.split(list(batch.counts))])
        own = wide.new_empty(most, *rows.shape[1:])
        _reduce_scatter(own, wide.contiguous(), group=batch.group)
        return own[: batch.counts[batch.rank]].to(rows.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _differentiable(_Gather, grad, ctx.batch), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, group: Any) -> Tensor:
        value = value.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(value, group=group)
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, factor: int) -> Tensor:
        ctx.factor = factor
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None
