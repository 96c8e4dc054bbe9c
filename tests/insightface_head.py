"""The arcface_torch head, from its paper and its documented behaviour, all logits in memory."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# s, m1, m2, m3, interclass_filtering_threshold
MARGINS = (
    (64.0, 1.0, 0.5, 0.0, 0.0),
    (64.0, 1.0, 0.0, 0.4, 0.0),
    (30.0, 1.0, 0.0, 0.0, 0.0),
    (16.0, 1.0, 0.5, 0.0, 0.3),
    (16.0, 1.0, 0.0, 0.4, 0.3),
)


def insightface_logits(
    cosine: Tensor, y: Tensor, s: float, m1: float, m2: float, m3: float, threshold: float = 0
) -> Tensor:
    """ArcFace's angle moves by ``m2`` behind autograd's back; CosFace's cosine by ``m3`` before its
    eyes. Neither changes a gradient."""
    assert m1 == 1
    assert m2 == 0 or m3 == 0
    rows = []
    for row, label in zip(cosine, y.tolist(), strict=True):
        entries = []
        for index, value in enumerate(row):
            moved = value
            if index == label:
                angle = math.acos(max(-1.0, min(1.0, value.item()))) + m2
                moved = value + (math.cos(angle) - value.item()) - m3
            elif threshold > 0 and value.item() > threshold:
                moved = 0 * value
            entries.append(s * moved)
        rows.append(torch.stack(entries))
    return torch.stack(rows)


def insightface_loss(x: Tensor, w: Tensor, y: Tensor, *margin: float) -> Tensor:
    cosine = F.normalize(x) @ F.normalize(w).t()
    return F.cross_entropy(insightface_logits(cosine, y, *margin), y)
