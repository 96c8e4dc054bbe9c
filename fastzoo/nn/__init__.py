"""Modules with parameters, assembled from fastzoo.ops."""

from fastzoo.nn import flows
from fastzoo.nn.edge_conv import EdgeConv
from fastzoo.nn.fsq import FSQ
from fastzoo.nn.gumbel_vq import GumbelVQ
from fastzoo.nn.lfq import LFQ
from fastzoo.nn.margin_softmax import MarginSoftmaxLoss, ShardedMarginSoftmaxLoss
from fastzoo.nn.pointconv import PointConv, PointConvDensitySetAbstraction, PointDeConv
from fastzoo.nn.set_abstraction import FeaturePropagation, SetAbstraction
from fastzoo.nn.sim_vq import SimVQ
from fastzoo.nn.vq import ResidualVQ, VectorQuantize

__all__ = [
    "FSQ",
    "LFQ",
    "EdgeConv",
    "FeaturePropagation",
    "GumbelVQ",
    "MarginSoftmaxLoss",
    "PointConv",
    "PointConvDensitySetAbstraction",
    "PointDeConv",
    "ResidualVQ",
    "SetAbstraction",
    "ShardedMarginSoftmaxLoss",
    "SimVQ",
    "VectorQuantize",
    "flows",
]
