"""Every operator's definition in plain PyTorch: the oracle, and the fallback on any device."""

from fastzoo.reference.boxes import (
    box_iou,
    box_iou_rotated,
    box_overlap,
    box_overlap_backward,
    complete_box_iou,
    complete_box_iou_loss,
    distance_box_iou,
    distance_box_iou_loss,
    generalized_box_iou,
    generalized_box_iou_loss,
    to_corners,
)
from fastzoo.reference.contrastive import (
    clip_loss,
    contrastive,
    contrastive_backward,
    info_nce,
    nt_xent,
    sigmoid_contrastive_loss,
)
from fastzoo.reference.detections import multiclass_nms, peak_nms
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
from fastzoo.reference.nms import batched_nms, matrix_nms, nms, soft_nms, suppress, vote
from fastzoo.reference.vq import vq_nearest, vq_nearest_backward

__all__ = [
    "batched_nms",
    "box_iou",
    "box_iou_rotated",
    "box_overlap",
    "box_overlap_backward",
    "clip_loss",
    "complete_box_iou",
    "complete_box_iou_loss",
    "contrastive",
    "contrastive_backward",
    "distance_box_iou",
    "distance_box_iou_loss",
    "generalized_box_iou",
    "generalized_box_iou_loss",
    "info_nce",
    "margin_softmax_logits",
    "margin_softmax_loss",
    "margin_softmax_negatives",
    "margin_softmax_negatives_backward",
    "margin_softmax_scores",
    "margin_softmax_scores_backward",
    "margin_softmax_target",
    "margin_softmax_target_backward",
    "matrix_nms",
    "multiclass_nms",
    "nms",
    "nt_xent",
    "peak_nms",
    "sigmoid_contrastive_loss",
    "soft_nms",
    "suppress",
    "to_corners",
    "vote",
    "vq_nearest",
    "vq_nearest_backward",
]
