"""insightface's arcface_torch head on fastzoo: ``CombinedMarginLoss`` and ``PartialFC_V2``.

The losses are theirs: ``cos(theta + m2)`` also past pi, a margin that passes gradients on as if it
did nothing, filtering of other classes' cosines, and the mean over all ranks' rows.

Differences: where ``m1`` is not 1 and ``m3`` is 0, where theirs crashes, stands the formula of the
paper; ``m3 > 0`` with another margin beside it, which theirs drops, is refused. The loss is not cut
off at 69.08, their logarithm of 1e-30. ``ceil(sample_rate * classes)`` classes are drawn, where
theirs takes the floor. ``fp16`` runs the products in bfloat16. One process needs no
``init_process_group``. The N x C logits are never in memory.
"""

import dataclasses
from collections.abc import Iterable
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from fastzoo import ops
from fastzoo.nn import ShardedMarginSoftmaxLoss
from fastzoo.reference import margin_softmax_target
from fastzoo.reference.margin_softmax import per_row
from fastzoo.reference.margins import Terms


@dataclasses.dataclass(frozen=True, eq=False)
class _Unguarded(ops.ArcFace):
    """ArcFace whose logit rises again past ``theta + m = pi``."""

    def terms(self, norm: Tensor, state: Tensor) -> Terms:
        return Terms("unguarded", m2=self.m)


class CombinedMarginLoss(nn.Module):
    """What the margin does to logits: for :class:`PartialFC_V2`, or by itself.

    Args:
        s: the scale.
        m1, m2, m3: ``cos(m1 theta + m2) - m3``, radians. Either ``m1 = 1`` and ``m3 = 0``, ArcFace,
            or ``m3 > 0`` alone, CosFace, whose gradient is exact.
        interclass_filtering_threshold: a cosine of another class above this counts as 0; 0 filters
            nothing.
    """

    def __init__(
        self,
        s: float,
        m1: float,
        m2: float,
        m3: float,
        interclass_filtering_threshold: float = 0,
    ) -> None:
        super().__init__()
        self.s = s
        self.m1, self.m2, self.m3 = m1, m2, m3
        self.interclass_filtering_threshold = interclass_filtering_threshold
        self.margin: ops.Margin
        if m3 > 0:
            if (m1, m2) != (1, 0):
                raise ValueError(f"m1, m2: expected 1 and 0 with m3 = {m3}, got {m1} and {m2}")
            self.margin = ops.CosFace(m3)
        elif m1 == 1 and m3 == 0:
            self.margin = _Unguarded(m2)
        else:
            self.margin = ops.Combined(m1, m2, m3)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The scaled logits of the cosines ``logits [N, C]``; ``labels [N]`` are -1 where none of
        these classes is the row's."""
        labels = labels.view(-1, 1)
        known = labels >= 0
        column = labels.clamp(min=0)
        own = logits.gather(1, column)[:, 0]
        rule, *coefficients = self.margin.terms(own, own.new_empty(0))
        m1, m2, m3 = (per_row(value, own) for value in coefficients)
        moved = margin_softmax_target(own, m1, m2, m3, rule)
        moved = own + (moved - own).detach()
        if self.interclass_filtering_threshold > 0:
            logits = torch.where(logits > self.interclass_filtering_threshold, 0, logits)
        own = torch.where(known[:, 0], moved, logits.gather(1, column)[:, 0])
        return self.s * logits.scatter(1, column, own[:, None])


class PartialFC_V2(ShardedMarginSoftmaxLoss):
    """The head of one rank: its classes' ``weight``, and the loss of all ranks' embeddings.

    Classes are shared out as theirs are, so that a rank's ``state_dict()`` is theirs: the rank's
    own ``weight``. :meth:`load_ranks` reads the checkpoints of any number of ranks. See
    :class:`fastzoo.nn.ShardedMarginSoftmaxLoss` for gradients and DistributedDataParallel.
    """

    def __init__(
        self,
        margin_loss: CombinedMarginLoss,
        embedding_size: int,
        num_classes: int,
        sample_rate: float = 1.0,
        fp16: bool = False,
    ) -> None:
        if not isinstance(margin_loss, CombinedMarginLoss):
            raise TypeError(
                "margin_loss: expected fastzoo.compat.insightface.CombinedMarginLoss, "
                f"got {type(margin_loss).__name__}"
            )
        super().__init__(
            num_classes,
            embedding_size,
            margin_loss.margin,
            margin_loss.s,
            sample_rate=sample_rate,
            interclass_filter=margin_loss.interclass_filtering_threshold,
            grad="insightface",
        )
        self.fp16 = fp16

    @staticmethod
    def shares(num_classes: int, ranks: int) -> list[int]:
        return [num_classes // ranks + (rank < num_classes % ranks) for rank in range(ranks)]

    def forward(self, local_embeddings: Tensor, local_labels: Tensor) -> Tensor:
        """The mean loss of all ranks' rows, of which ``[n, D]`` and ``[n]`` or ``[n, 1]`` are this
        rank's."""
        with torch.autocast(local_embeddings.device.type, torch.bfloat16, enabled=self.fp16):
            return super().forward(local_embeddings, local_labels.view(-1))

    def checkpointed(self, rows: Tensor) -> Tensor:
        return rows

    def load_ranks(self, checkpoints: Iterable[str | PathLike[str] | dict[str, Any]]) -> None:
        """Load this rank's classes from the checkpoints of all ranks that saved, in their order.

        Each is a file, or what it holds: a state dict with the ``weight`` of a rank, by itself or
        as ``state_dict_softmax_fc``. The number of ranks that saved is free.
        """
        rows = []
        for checkpoint in checkpoints:
            if not isinstance(checkpoint, dict):
                # Mapped: of the other ranks' rows nothing is read.
                checkpoint = torch.load(
                    checkpoint, map_location="cpu", mmap=True, weights_only=True
                )
            rows.append(checkpoint.get("state_dict_softmax_fc", checkpoint)["weight"])
        held = sum(len(part) for part in rows)
        if held != self.num_classes:
            raise ValueError(f"checkpoints: expected {self.num_classes} classes, got {held}")
        here, first = self._classes(), 0
        with torch.no_grad():
            for part in rows:
                start, stop = max(here.start, first), min(here.stop, first + len(part))
                if start < stop:
                    own = self.weight[start - here.start : stop - here.start]
                    own.copy_(part[start - first : stop - first])
                first += len(part)
