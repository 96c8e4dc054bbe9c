"""fastzoo: fast drop-in PyTorch operators, with the same answers on every machine."""

__version__ = "0.1.0"

from fastzoo import nn, ops, reference, samplers
from fastzoo.backends import use_backend
from fastzoo.info import info

__all__ = ["__version__", "info", "nn", "ops", "reference", "samplers", "use_backend"]
