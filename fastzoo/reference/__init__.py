"""Every operator's definition in plain PyTorch: the oracle, and the fallback on any device."""

from fastzoo.reference.nms import nms
from fastzoo.reference.vq import vq_nearest, vq_nearest_backward

__all__ = ["nms", "vq_nearest", "vq_nearest_backward"]
