"""The public operators: checked arguments, one dispatcher operator each, any backend."""

from fastzoo.ops.contrastive import clip_loss, info_nce, nt_xent, sigmoid_contrastive_loss
from fastzoo.ops.margin_softmax import margin_softmax_logits, margin_softmax_loss
from fastzoo.ops.nms import nms
from fastzoo.ops.vq import vq_nearest
from fastzoo.reference.margins import (
    AdaFace,
    ArcFace,
    Combined,
    CosFace,
    CurricularFace,
    LSoftmax,
    MagFace,
    Margin,
    Plain,
    SphereFace,
)

__all__ = [
    "AdaFace",
    "ArcFace",
    "Combined",
    "CosFace",
    "CurricularFace",
    "LSoftmax",
    "MagFace",
    "Margin",
    "Plain",
    "SphereFace",
    "clip_loss",
    "info_nce",
    "margin_softmax_logits",
    "margin_softmax_loss",
    "nms",
    "nt_xent",
    "sigmoid_contrastive_loss",
    "vq_nearest",
]
