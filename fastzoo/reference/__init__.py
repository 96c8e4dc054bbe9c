"""Every operator's definition in plain PyTorch: the oracle, and the fallback on any device."""

from fastzoo.reference.contrastive import (
    clip_loss,
    contrastive,
    contrastive_backward,
    info_nce,
    nt_xent,
    sigmoid_contrastive_loss,
)
from fastzoo.reference.margin_softmax import (
    margin_softmax_logits,
    margin_softmax_loss,
    margin_softmax_negatives,
    margin_softmax_negatives_backward,
    margin_softmax_scores,
    margin_softmax_scores_backward,
    margin_softmax_target,
    margin_softmax_target_backward,
)
from fastzoo.reference.nms import nms
from fastzoo.reference.vq import vq_nearest, vq_nearest_backward

__all__ = [
    "clip_loss",
    "contrastive",
    "contrastive_backward",
    "info_nce",
    "margin_softmax_logits",
    "margin_softmax_loss",
    "margin_softmax_negatives",
    "margin_softmax_negatives_backward",
    "margin_softmax_scores",
    "margin_softmax_scores_backward",
    "margin_softmax_target",
    "margin_softmax_target_backward",
    "nms",
    "nt_xent",
    "sigmoid_contrastive_loss",
    "vq_nearest",
    "vq_nearest_backward",
]
