"""Normalizing flows: transforms, distributions of latents, and the densities that they make."""

from fastzoo.nn.flows.base import Base, StandardNormal
from fastzoo.nn.flows.flow import Flow
from fastzoo.nn.flows.glow import (
    ActNorm,
    Glow,
    GlowConditioner,
    GlowStep,
    InvertibleConv1x1,
    RealNVP,
    ZeroConv2d,
    prior_coupling,
)
from fastzoo.nn.flows.invertible import InvertibleSequence
from fastzoo.nn.flows.multiscale import MultiScale, Squeeze, checkerboard_mask
from fastzoo.nn.flows.transform import Compose, Inverse, Transform

__all__ = [
    "ActNorm",
    "Base",
    "Compose",
    "Flow",
    "Glow",
    "GlowConditioner",
    "GlowStep",
    "Inverse",
    "InvertibleConv1x1",
    "InvertibleSequence",
    "MultiScale",
    "RealNVP",
    "Squeeze",
    "StandardNormal",
    "Transform",
    "ZeroConv2d",
    "checkerboard_mask",
    "prior_coupling",
]
