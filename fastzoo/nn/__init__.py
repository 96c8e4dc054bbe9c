"""Modules with parameters, assembled from fastzoo.ops."""

from fastzoo.nn.margin_softmax import MarginSoftmaxLoss, ShardedMarginSoftmaxLoss
from fastzoo.nn.vq import ResidualVQ, VectorQuantize

__all__ = ["MarginSoftmaxLoss", "ResidualVQ", "ShardedMarginSoftmaxLoss", "VectorQuantize"]
