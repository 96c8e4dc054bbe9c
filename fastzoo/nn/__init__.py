"""Modules with parameters, assembled from fastzoo.ops."""

from fastzoo.nn.margin_softmax import MarginSoftmaxLoss, ShardedMarginSoftmaxLoss

__all__ = ["MarginSoftmaxLoss", "ShardedMarginSoftmaxLoss"]
