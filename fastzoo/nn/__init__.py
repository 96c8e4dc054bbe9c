"""Modules with parameters, assembled from fastzoo.ops."""

from fastzoo.nn.fsq import FSQ
from fastzoo.nn.gumbel_vq import GumbelVQ
from fastzoo.nn.lfq import LFQ
from fastzoo.nn.margin_softmax import MarginSoftmaxLoss, ShardedMarginSoftmaxLoss
from fastzoo.nn.sim_vq import SimVQ
from fastzoo.nn.vq import ResidualVQ, VectorQuantize

__all__ = [
    "FSQ",
    "LFQ",
    "GumbelVQ",
    "MarginSoftmaxLoss",
    "ResidualVQ",
    "ShardedMarginSoftmaxLoss",
    "SimVQ",
    "VectorQuantize",
]
