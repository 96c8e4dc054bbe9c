"""Normalizing flows: transforms, distributions of latents, and the densities that they make."""

from fastzoo.nn.flows.base import Base, StandardNormal
from fastzoo.nn.flows.flow import Flow
from fastzoo.nn.flows.transform import Compose, Inverse, Transform

__all__ = [
    "Base",
    "Compose",
    "Flow",
    "Inverse",
    "StandardNormal",
    "Transform",
]
