"""The table of public functions."""

from fastzoo.testing import (
    boxes,
    coupling,
    density,
    detections,
    masked_linear,
    neighbours,
    nms,
    ode_step,
    pointconv,
    sampling,
    splines,
    vq,
)
from fastzoo.testing.contrastive import CLIP_LOSS, INFO_NCE, SIGMOID_CONTRASTIVE_LOSS
from fastzoo.testing.margin_softmax import MARGIN_SOFTMAX_LOSS
from fastzoo.testing.spec import OpSpec

SPECS: dict[str, OpSpec] = {
    spec.name: spec
    for spec in (
        *nms.SPECS,
        *vq.SPECS,
        MARGIN_SOFTMAX_LOSS,
        CLIP_LOSS,
        SIGMOID_CONTRASTIVE_LOSS,
        INFO_NCE,
        *boxes.SPECS,
        *detections.SPECS,
        *neighbours.SPECS,
        *sampling.SPECS,
        *density.SPECS,
        *pointconv.SPECS,
        *coupling.SPECS,
        *splines.SPECS,
        *masked_linear.SPECS,
        *ode_step.SPECS,
    )
}
