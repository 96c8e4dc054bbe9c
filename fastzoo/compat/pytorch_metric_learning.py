"""pytorch-metric-learning's classification losses (2.9) on fastzoo's operators.

Names, arguments and units are theirs: angles in degrees, the parameter ``W [embedding_size,
num_classes]`` in checkpoints, in both directions. The loss is the mean over rows. What they have
beyond that (miners, reducers, regularisers, distances, reference embeddings) is refused.

Differences: derivatives stay finite where embedding and class point the same or opposite ways,
where theirs are not numbers or infinite; labels that are negative are left out, where theirs raise;
the N x C logits are never in memory.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastzoo import ops
from fastzoo.nn import MarginSoftmaxLoss


def _refuse(**given: object) -> None:
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"{name}: expected None, which is all that fastzoo has, got {value!r}")


class WeightedLoss(MarginSoftmaxLoss):
    """What their classification losses have in common.

    ``weight_init_func`` fills ``W [embedding_size, num_classes]``; None is ``normal_``.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: ops.Margin,
        scale: float,
        weight_init_func: Callable[[Tensor], Any] | None,
        sub_centers: int = 1,
    ) -> None:
        self._initialize = weight_init_func or nn.init.normal_
        super().__init__(num_classes, embedding_size, margin, scale, sub_centers=sub_centers)

    def reset_parameters(self) -> None:
        with torch.no_grad():
            self._initialize(self.W)

    @property
    def W(self) -> Tensor:
        """Their parameter ``[embedding_size, num_classes * sub_centers]``: the transposed weight,
        of which it is a view."""
        return self.weight.t()

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        indices_tuple: object = None,
        ref_emb: object = None,
        ref_labels: object = None,
    ) -> Tensor:
        """The mean loss of ``embeddings [N, D]`` with ``labels [N]``."""
        _refuse(indices_tuple=indices_tuple, ref_emb=ref_emb, ref_labels=ref_labels)
        return super().forward(embeddings, labels.to(embeddings.device))

    def get_logits(self, embeddings: Tensor) -> Tensor:
        """The logits ``[N, num_classes]`` without a margin."""
        nowhere = torch.full((len(embeddings),), -1, device=embeddings.device)
        return self.logits(embeddings, nowhere)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        rows = destination.pop(f"{prefix}weight")
        destination[f"{prefix}W"] = rows.flatten(0, -2).t()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        if f"{prefix}W" in state_dict:
            state_dict[f"{prefix}weight"] = state_dict.pop(f"{prefix}W").t()
        super()._load_from_state_dict(state_dict, prefix, *args)


class ArcFaceLoss(WeightedLoss):
    """ArcFace; ``margin`` in degrees."""

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: float = 28.6,
        scale: float = 64,
        weight_init_func: Callable[[Tensor], Any] | None = None,
    ) -> None:
        margin_of = ops.ArcFace(math.radians(margin))
        super().__init__(num_classes, embedding_size, margin_of, scale, weight_init_func)


class SubCenterArcFaceLoss(WeightedLoss):
    """ArcFace with ``sub_centers`` columns of ``W`` a class; ``margin`` in degrees."""

    def __init__(
        self,
        *,
        num_classes: int,
        embedding_size: int,
        margin: float = 28.6,
        scale: float = 64,
        sub_centers: int = 3,
        weight_init_func: Callable[[Tensor], Any] | None = None,
    ) -> None:
        margin_of = ops.ArcFace(math.radians(margin))
        super().__init__(
            num_classes, embedding_size, margin_of, scale, weight_init_func, sub_centers
        )


class CosFaceLoss(WeightedLoss):
    """CosFace; ``margin`` is subtracted from the cosine."""

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: float = 0.35,
        scale: float = 64,
        weight_init_func: Callable[[Tensor], Any] | None = None,
    ) -> None:
        margin_of = ops.CosFace(margin)
        super().__init__(num_classes, embedding_size, margin_of, scale, weight_init_func)


class LargeMarginSoftmaxLoss(WeightedLoss):
    """L-Softmax; ``margin`` a whole number that multiplies the angle."""

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: int = 4,
        scale: float = 1,
        weight_init_func: Callable[[Tensor], Any] | None = None,
    ) -> None:
        margin_of = ops.LSoftmax(int(margin))
        super().__init__(num_classes, embedding_size, margin_of, scale, weight_init_func)


class SphereFaceLoss(WeightedLoss):
    """SphereFace, without annealing; ``margin`` a whole number that multiplies the angle."""

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: int = 4,
        scale: float = 1,
        weight_init_func: Callable[[Tensor], Any] | None = None,
    ) -> None:
        margin_of = ops.SphereFace(int(margin))
        super().__init__(num_classes, embedding_size, margin_of, scale, weight_init_func)


class NormalizedSoftmaxLoss(WeightedLoss):
    """The softmax of cosines over a temperature."""

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        temperature: float = 0.05,
        weight_init_func: Callable[[Tensor], Any] | None = None,
    ) -> None:
        super().__init__(
            num_classes, embedding_size, ops.Plain(), 1 / temperature, weight_init_func
        )


class NTXentLoss(nn.Module):
    """NT-Xent of two views an image, as SimCLR has it: every label occurs exactly twice.

    Theirs also takes labels that occur more often or once, which this refuses.
    """

    def __init__(self, temperature: float = 0.07) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        indices_tuple: object = None,
        ref_emb: object = None,
        ref_labels: object = None,
    ) -> Tensor:
        """The mean over the positive pairs of ``embeddings [2 N, D]``, those of equal labels."""
        _refuse(indices_tuple=indices_tuple, ref_emb=ref_emb, ref_labels=ref_labels)
        ordered, order = labels.to(embeddings.device).sort()
        first, second = ordered[::2], ordered[1::2]
        twice = len(ordered) % 2 == 0 and bool(
            (first == second).all() & (first[1:] != first[:-1]).all()
        )
        if not twice:
            raise ValueError("labels: expected each label twice, for the two views of an image")
        return ops.nt_xent(
            torch.cat([embeddings[order[::2]], embeddings[order[1::2]]]), self.temperature
        )
