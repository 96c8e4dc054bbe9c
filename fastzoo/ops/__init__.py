"""The public operators: checked arguments, one dispatcher operator each, any backend."""

from fastzoo.ops._kmeans import KMeansOutput, kmeans
from fastzoo.ops._mixing import actnorm, invertible_conv1x1, squeeze, unsqueeze
from fastzoo.ops._polynomial_splines import (
    cubic_spline,
    linear_spline,
    quadratic_spline,
)
from fastzoo.ops.boxes import (
    box_iou,
    box_iou_rotated,
    complete_box_iou,
    complete_box_iou_loss,
    distance_box_iou,
    distance_box_iou_loss,
    generalized_box_iou,
    generalized_box_iou_loss,
)
from fastzoo.ops.contrastive import clip_loss, info_nce, nt_xent, sigmoid_contrastive_loss
from fastzoo.ops.coupling import (
    additive_coupling,
    affine_coupling,
    coupling,
    leaky_relu,
    logit,
    soft_clip,
)
from fastzoo.ops.density import (
    inverse_density_scale,
    kernel_density,
)
from fastzoo.ops.detections import Detections, multiclass_nms, peak_nms
from fastzoo.ops.margin_softmax import margin_softmax_logits, margin_softmax_loss
from fastzoo.ops.masked_linear import (
    autoregressive_inverse,
)
from fastzoo.ops.neighbours import (
    ball_query,
    knn_gather,
    knn_points,
    three_nn,
)
from fastzoo.ops.nms import (
    batched_nms,
    matrix_nms,
    nms,
    nms_1d,
    nms_match,
    nms_rotated,
    soft_nms,
    weighted_nms,
)
from fastzoo.ops.ode_step import (
    counter_bits,
    counter_keys,
    counter_normal,
    guidance_factor,
    ode_step,
    step_error,
)
from fastzoo.ops.pointconv import (
    edge_features,
    group_points,
    neighbour_reduce,
    pointconv,
    pointconv_moments,
    three_interpolate,
)
from fastzoo.ops.sampling import (
    grid_subsample,
    sample_farthest_points,
    voxel_grid,
)
from fastzoo.ops.splines import (
    rational_quadratic_spline,
)
from fastzoo.ops.vq import vq_ema_update_, vq_nearest, vq_quantize, vq_statistics
from fastzoo.reference.detections import Deltas, Distances, Grid
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
from fastzoo.reference.mixing import LU
from fastzoo.reference.neighbours import (
    KNN,
)
from fastzoo.reference.sampling import (
    GridSubsample,
)
from fastzoo.reference.vq import VQOutput

__all__ = [
    "KNN",
    "LU",
    "AdaFace",
    "ArcFace",
    "Combined",
    "CosFace",
    "CurricularFace",
    "Deltas",
    "Detections",
    "Distances",
    "Grid",
    "GridSubsample",
    "KMeansOutput",
    "LSoftmax",
    "MagFace",
    "Margin",
    "Plain",
    "SphereFace",
    "VQOutput",
    "actnorm",
    "additive_coupling",
    "affine_coupling",
    "autoregressive_inverse",
    "ball_query",
    "batched_nms",
    "box_iou",
    "box_iou_rotated",
    "clip_loss",
    "complete_box_iou",
    "complete_box_iou_loss",
    "counter_bits",
    "counter_keys",
    "counter_normal",
    "coupling",
    "cubic_spline",
    "distance_box_iou",
    "distance_box_iou_loss",
    "edge_features",
    "generalized_box_iou",
    "generalized_box_iou_loss",
    "grid_subsample",
    "group_points",
    "guidance_factor",
    "info_nce",
    "inverse_density_scale",
    "invertible_conv1x1",
    "kernel_density",
    "kmeans",
    "knn_gather",
    "knn_points",
    "leaky_relu",
    "linear_spline",
    "logit",
    "margin_softmax_logits",
    "margin_softmax_loss",
    "matrix_nms",
    "multiclass_nms",
    "neighbour_reduce",
    "nms",
    "nms_1d",
    "nms_match",
    "nms_rotated",
    "nt_xent",
    "ode_step",
    "peak_nms",
    "pointconv",
    "pointconv_moments",
    "quadratic_spline",
    "rational_quadratic_spline",
    "sample_farthest_points",
    "sigmoid_contrastive_loss",
    "soft_clip",
    "soft_nms",
    "squeeze",
    "step_error",
    "three_interpolate",
    "three_nn",
    "unsqueeze",
    "voxel_grid",
    "vq_ema_update_",
    "vq_nearest",
    "vq_quantize",
    "vq_statistics",
    "weighted_nms",
]
