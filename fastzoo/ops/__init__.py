"""The public operators: checked arguments, one dispatcher operator each, any backend."""

from fastzoo.ops.nms import nms
from fastzoo.ops.vq import vq_nearest

__all__ = ["nms", "vq_nearest"]
