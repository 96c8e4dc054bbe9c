"""The table of public functions."""

from fastzoo.testing.nms import NMS
from fastzoo.testing.spec import OpSpec
from fastzoo.testing.vq import VQ_NEAREST

SPECS: dict[str, OpSpec] = {spec.name: spec for spec in (NMS, VQ_NEAREST)}
