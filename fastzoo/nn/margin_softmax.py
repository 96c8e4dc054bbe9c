"""Classification heads with a margin: the class weights, and the loss of embeddings and labels."""

import math
import sys
from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastzoo import ops
from fastzoo.nn._state import updates_state
from fastzoo.ops._checks import check_tensor
from fastzoo.ops._collectives import Batch, for_average, log_of_sum, sum_over, world
from fastzoo.ops.margin_softmax import (
    Classes,
    Rows,
    check_classes,
    check_options,
    losses_of_rows,
    negatives,
    row_scale,
    state_of,
    target_cosine,
)
from fastzoo.reference.margin_softmax import reduce_rows, row_weights, valid_rows
from fastzoo.reference.precision import compute_dtype

WRAPPED = "classes differ per rank: wrap the backbone only"


class _Head(nn.Module):
    """The weight of some classes, the options of the loss, and the margin's running state."""

    weight: nn.Parameter
    state: Tensor | None
    class_weight: Tensor | None

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: ops.Margin,
        scale: float | Tensor | None = None,
        *,
        sub_centers: int = 1,
        reduction: str = "mean",
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        class_weight: Tensor | None = None,
        interclass_filter: float = 0.0,
        grad: Literal["exact", "insightface"] = "exact",
        memory_budget: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_options(reduction, label_smoothing, grad, margin)
        sizes = {"num_classes": num_classes, "embedding_size": embedding_size}
        for name, value in {**sizes, "sub_centers": sub_centers}.items():
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if class_weight is not None and class_weight.shape != (num_classes,):
            raise ValueError(
                f"class_weight: expected [{num_classes}], one for each class, "
                f"got {list(class_weight.shape)}"
            )
        self.num_classes = num_classes
        self.embedding_size = embedding_size
        self.margin = margin
        self.scale = scale
        self.sub_centers = sub_centers
        self.reduction = reduction
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.interclass_filter = interclass_filter
        self.grad: Literal["exact", "insightface"] = grad
        self.memory_budget = memory_budget
        self._frozen = margin.frozen()
        rows = len(self._classes()) * sub_centers
        self.weight = nn.Parameter(torch.empty(rows, embedding_size, device=device, dtype=dtype))
        self.register_buffer("class_weight", class_weight, persistent=False)
        like = self.weight.detach().to(compute_dtype(self.weight))
        self.register_buffer("state", margin.initial_state(like) if margin.state_size else None)
        self.reset_parameters()

    def _classes(self) -> range:
        """The classes whose weights are here."""
        return range(self.num_classes)

    def _generator(self) -> torch.Generator | None:
        """What initial weights are drawn from; None for torch's own."""
        return None

    def reset_parameters(self) -> None:
        """Normal weights of deviation 0.01, as insightface has them; the state starts anew."""
        nn.init.normal_(self.weight, std=0.01, generator=self._generator())
        if self.state is not None:
            self.state.copy_(self.margin.initial_state(self.state))

    def checkpointed(self, rows: Tensor) -> Tensor:
        """A tensor like ``weight``, an optimizer's momentum say, as checkpoints have it."""
        return rows.unflatten(0, (-1, self.sub_centers)) if self.sub_centers > 1 else rows

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not keep_vars:
            destination[f"{prefix}weight"] = self.checkpointed(destination[f"{prefix}weight"])

    def _loaded(self, rows: Tensor) -> Tensor:
        """A checkpoint's weight as the parameter has it."""
        return rows.flatten(0, 1) if rows.dim() == 3 else rows

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        key = f"{prefix}weight"
        if isinstance(state_dict.get(key), Tensor):
            state_dict[key] = self._loaded(state_dict[key])
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        parts = [f"{self.num_classes}, {self.embedding_size}, {self.margin}"]
        defaults = {
            "scale": None,
            "sub_centers": 1,
            "reduction": "mean",
            "ignore_index": None,
            "label_smoothing": 0.0,
            "interclass_filter": 0.0,
            "grad": "exact",
            "memory_budget": None,
        }
        for name, default in defaults.items():
            value = getattr(self, name)
            if isinstance(value, Tensor) or value != default:
                parts.append(f"{name}={value!r}")
        return ", ".join(parts)


class MarginSoftmaxLoss(_Head):
    """Class weights, and :func:`fastzoo.ops.margin_softmax_loss` over them.

    Args:
        num_classes, embedding_size: C and D.
        margin: one of fastzoo.ops's margins; angles are in radians.
        scale: a number, or a tensor of one, which is learnt if it is a parameter; None takes the
            margin's own.
        sub_centers: weight rows a class.
        reduction, ignore_index, label_smoothing, class_weight, interclass_filter, grad,
            memory_budget: as the operator has them.

    Attributes:
        weight: the parameter ``[num_classes * sub_centers, embedding_size]``, rows
            ``c * sub_centers + j``. With sub-centres, ``state_dict()`` has it as ``[num_classes,
            sub_centers, embedding_size]``; both load.
        state: the running state of AdaFace or CurricularFace, a buffer, otherwise None. Training
            updates it, evaluation uses it as it is.
    """

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss of ``embeddings [N, D]`` with ``labels [N]``; negative labels are left out."""
        updates = updates_state(self)
        result = ops.margin_softmax_loss(
            embeddings,
            self.weight,
            labels,
            margin=self.margin if updates else self._frozen,
            scale=self.scale,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            class_weight=self.class_weight,
            interclass_filter=self.interclass_filter,
            grad=self.grad,
            state=self.state,
            sub_centers=self.sub_centers,
            memory_budget=self.memory_budget,
        )
        if isinstance(result, Tensor):
            return result
        loss, state = result
        if updates and self.state is not None:
            self.state.copy_(state)
        return loss

    def logits(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The logits ``[N, C]``, the margin applied at each row's label (none at a negative one),
        by the running state as it is."""
        result = ops.margin_softmax_logits(
            embeddings,
            self.weight,
            labels,
            margin=self._frozen,
            scale=self.scale,
            ignore_index=self.ignore_index,
            interclass_filter=self.interclass_filter,
            grad=self.grad,
            state=self.state,
            sub_centers=self.sub_centers,
        )
        return result if isinstance(result, Tensor) else result[0]


class ShardedMarginSoftmaxLoss(_Head):
    """:class:`MarginSoftmaxLoss` with its classes shared out over the ranks of a process group.

    Every rank passes its own embeddings, as many as it has, with labels among all classes, and gets
    the loss of all ranks' rows, the same on every rank. After ``loss.backward()`` a rank's weight
    has its part of the gradient of that loss, not averaged; embeddings have theirs multiplied by
    the number of ranks, so that DistributedDataParallel around the backbone, which averages over
    the ranks, makes of it the gradient of the loss. The head itself goes into no
    DistributedDataParallel or FSDP, since its parameters differ per rank.

    Args:
        num_classes, embedding_size, margin: as :class:`MarginSoftmaxLoss` has them, of all ranks.
        scale: a number; None takes the margin's own.
        process_group: None is the default group, or this process alone where there is none.
        sample_rate: the share of its classes that a rank works with in a training step: all that
            the batch has, and others drawn at random up to ``ceil(sample_rate * classes)``. Only
            they have a gradient. Not with label smoothing.
        seed: of the draws. A draw depends on it, on the rank and on ``step``.
        options: the other arguments of :class:`MarginSoftmaxLoss`. A reduction is over all ranks'
            rows; ``none`` gives a rank its own rows' losses, and the sum of what the ranks make of
            these is what is differentiated.

    Attributes:
        weight: this rank's rows. ``state_dict()`` has all ranks' as a DTensor: it serves
            torch.distributed.checkpoint at any number of ranks, and for
            :class:`MarginSoftmaxLoss`. To ``load_state_dict``, a whole weight or this rank's rows
            will do as well.
        state: as in :class:`MarginSoftmaxLoss`, the same on every rank.
        step: how many times classes were drawn. It is in no checkpoint: set it when resuming to go
            on with the draws.

    A step waits for the device once, to learn the ranks' numbers of rows, and to sample once more.
    An error in one rank's arguments is raised there alone.

    Source: Deng et al., ArcFace (2019), section 2.4; sampling An et al., Partial FC (2021).
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: ops.Margin,
        scale: float | None = None,
        *,
        process_group: "dist.ProcessGroup | None" = None,
        sample_rate: float = 1.0,
        seed: int = 0,
        **options: Any,
    ) -> None:
        if isinstance(scale, Tensor):
            raise TypeError("scale: expected a number, got a tensor")
        if not 0 < sample_rate <= 1:
            raise ValueError(f"sample_rate: expected above 0 and up to 1, got {sample_rate}")
        if sample_rate < 1 and options.get("label_smoothing"):
            raise ValueError(
                "label_smoothing: expected 0 with sample_rate, which leaves out what "
                "it spreads over"
            )
        self.process_group = process_group
        self.sample_rate = sample_rate
        self.seed = seed
        self.step = 0
        super().__init__(num_classes, embedding_size, margin, scale, **options)

    @staticmethod
    def shares(num_classes: int, ranks: int) -> list[int]:
        """How many classes each rank has: as ``torch.chunk`` has it, the last ones maybe none."""
        most = -(-num_classes // ranks)
        return [min(most, max(0, num_classes - rank * most)) for rank in range(ranks)]

    def _classes(self) -> range:
        rank, ranks = world(self.process_group)
        shares = self.shares(self.num_classes, ranks)
        return range(sum(shares[:rank]), sum(shares[: rank + 1]))

    def _generator(self) -> torch.Generator | None:
        # Ranks are often seeded alike, and must not have each other's classes.
        rank, ranks = world(self.process_group)
        if ranks == 1 or self.weight.is_meta:
            return None
        return self._seeded(int(torch.randint(2**62, ())), rank)

    def _seeded(self, *numbers: int) -> torch.Generator:
        # The CPU's generator takes 32 bits of its seed; a hash of integers is the same everywhere.
        return torch.Generator(self.weight.device).manual_seed(hash(numbers) % 2**32)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss of all ranks' rows; ``embeddings [n, D]`` and ``labels [n]`` are this rank's."""
        check_tensor("embeddings", embeddings, f"[n, {self.embedding_size}]", 2)
        check_tensor("labels", labels, "[n]", 1)
        if embeddings.shape[1] != self.embedding_size or len(labels) != len(embeddings):
            raise ValueError(
                f"embeddings, labels: expected [n, {self.embedding_size}] and [n], "
                f"got {list(embeddings.shape)} and {list(labels.shape)}"
            )
        if self.weight.shape[0] != len(self._classes()) * self.sub_centers:
            raise RuntimeError(WRAPPED)
        group = self.process_group
        batch, (embeddings, weight) = Batch.of(group, len(embeddings), embeddings, self.weight)
        x = batch.gather(for_average(embeddings, group))
        y = batch.gather(labels.long())
        valid = valid_rows(y, self.ignore_index)
        if y.device.type == "cpu" and bool((valid & (y >= self.num_classes)).any()):
            raise ValueError(f"labels: expected less than {self.num_classes}, got {int(y.max())}")
        classes, class_weight = self._operands(x, weight, torch.where(valid, y, -1))
        updates = updates_state(self)
        margin = self.margin if updates else self._frozen
        s = row_scale(margin, self.scale, classes.embeddings)
        state = state_of(margin, self.state, s)
        cosine = None
        if margin.hardens_negatives:
            cosine = sum_over(target_cosine(classes, margin), group)
            state = margin.update(state, cosine, s.detach(), valid)
        rows = negatives(
            classes,
            s,
            valid,
            margin=margin,
            state=state,
            cosine=cosine,
            class_weight=class_weight,
            interclass_filter=self.interclass_filter,
            with_total=self.label_smoothing > 0,
            memory_budget=self.memory_budget,
        )
        if margin.state_size and not margin.hardens_negatives:
            target = sum_over(rows.target.detach(), group)
            state = margin.update(state, target, rows.embedding_norm.detach(), valid)
        if updates and self.state is not None:
            self.state.copy_(state)
        own = batch.own
        rows = _own_rows(batch, rows)
        # On a GPU a label of no class is told by its loss.
        target = torch.where(y[own] >= self.num_classes, math.nan, rows.target)
        losses = losses_of_rows(
            rows._replace(target=target),
            s[own],
            valid[own],
            labels=y[own],
            classes=self.num_classes,
            margin=margin,
            state=state,
            label_smoothing=self.label_smoothing,
            class_weight=self.class_weight,
            grad=self.grad,
        )
        weights = row_weights(y, valid, self.class_weight, losses.loss.dtype)
        loss = reduce_rows(losses.loss, losses.extra, weights, valid, self.reduction)
        return loss if self.reduction == "none" else sum_over(loss, group)

    def _operands(self, x: Tensor, weight: Tensor, labels: Tensor) -> tuple[Classes, Tensor | None]:
        """This rank's classes, those drawn if it samples, and their class weights."""
        here = self._classes()
        k, class_weight = self.sub_centers, self.class_weight
        if class_weight is not None:
            class_weight = class_weight[here.start : here.stop]
        labels = torch.where((labels >= here.start) & (labels < here.stop), labels - here.start, -1)
        if not here:
            # The operator wants a class. One of zeros that is every row's own adds nothing.
            weight = torch.cat([weight, weight.new_zeros(k, weight.shape[1])])
            labels = torch.zeros_like(labels)
            class_weight = None
        elif self.training and self.sample_rate < 1:
            drawn = self._draw(labels)
            weight = weight.unflatten(0, (-1, k)).index_select(0, drawn).flatten(0, 1)
            class_weight = None if class_weight is None else class_weight[drawn]
            labels = torch.where(labels >= 0, torch.searchsorted(drawn, labels), -1)
        return check_classes(x, weight, labels, None, k)[0], class_weight

    @torch.no_grad()
    def _draw(self, labels: Tensor) -> Tensor:
        """The classes of a step, ascending: those of the labels, and others by chance."""
        # A forward that activation checkpointing runs again draws what it drew.
        step = self.step
        if updates_state(self):
            self.step += 1
        else:
            step -= 1
        number = len(self._classes())
        lots = torch.rand(
            number,
            device=labels.device,
            generator=self._seeded(self.seed, step, world(self.process_group)[0]),
        )
        own = labels[labels >= 0].unique()
        lots[own] = 2.0
        count = max(len(own), math.ceil(self.sample_rate * number))
        return lots.topk(count).indices.sort().values

    def checkpointed(self, rows: Tensor) -> Tensor:
        rows = super().checkpointed(rows.detach())
        ranks = world(self.process_group)[1]
        if ranks == 1:
            return rows
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.tensor import DTensor, Shard

        group = self.process_group or dist.distributed_c10d._get_default_group()
        return DTensor.from_local(
            rows,
            DeviceMesh.from_group(group, rows.device.type),
            [Shard(0)],
            run_check=False,
            shape=torch.Size((self.num_classes, *rows.shape[1:])),
            stride=rows.stride(),
        )

    def _loaded(self, rows: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor

        if isinstance(rows, DTensor):
            local = rows.to_local()
            rows = local if local.numel() == self.weight.numel() else rows.full_tensor()
        rows = super()._loaded(rows)
        if len(rows) != self.num_classes * self.sub_centers:
            return rows
        here = self._classes()
        return rows[here.start * self.sub_centers : here.stop * self.sub_centers]

    # DistributedDataParallel and FSDP make parameters of one name one parameter. Neither asks a
    # module whether it agrees, but DistributedDataParallel lists its parameters, and FSDP marks it.

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        asking = sys._getframe(1).f_globals.get("__name__", "")
        if asking == "torch.nn.parallel.distributed" and not hasattr(self.weight, "_ddp_ignored"):
            raise RuntimeError(WRAPPED)
        return super().named_parameters(*args, **kwargs)

    @property
    def _is_fsdp_managed_module(self) -> bool:
        return False

    @_is_fsdp_managed_module.setter
    def _is_fsdp_managed_module(self, value: bool) -> None:
        raise RuntimeError(WRAPPED)

    def extra_repr(self) -> str:
        here = self._classes()
        sampled = f", sample_rate={self.sample_rate}" if self.sample_rate < 1 else ""
        return f"{super().extra_repr()}, classes {here.start} to {here.stop}{sampled}"


def _own_rows(batch: Batch, rows: Rows) -> Rows:
    """What this rank's own rows are over all ranks' classes: all of it sums but the log-sum-exp,
    which is a logarithm of a sum."""
    exponentials, top = batch.exponentials(rows.lse)
    parts = torch.stack([rows.target, exponentials, rows.total, rows.weight_norm], 1)
    target, total_exponential, total, weight_norm = batch.scatter_sum(parts).unbind(1)
    lse = log_of_sum(total_exponential, top)
    return Rows(target, lse, total, rows.embedding_norm[batch.own], weight_norm)
