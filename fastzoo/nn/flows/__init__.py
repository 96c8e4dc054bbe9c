"""Normalizing flows: transforms, distributions of latents, and the densities that they make."""

from fastzoo.nn.flows.autoregressive import MaskedAutoregressive
from fastzoo.nn.flows.base import (
    Base,
    ConditionalDiagonalNormal,
    DiagonalNormal,
    Logistic,
    StandardNormal,
    Uniform,
)
from fastzoo.nn.flows.conditioner import MLP, MaskedLinear, MaskedMLP
from fastzoo.nn.flows.coupling import (
    AdditiveCoupling,
    AffineCoupling,
    SplineCoupling,
    spline_identity,
    spline_parameters,
)
from fastzoo.nn.flows.elementwise import BatchNorm, LeakyReLU, Logit, Scaling, SoftClip
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
from fastzoo.nn.flows.maf import MAF, NSF
from fastzoo.nn.flows.multiscale import MultiScale, Squeeze, checkerboard_mask
from fastzoo.nn.flows.permutation import Permutation, Reverse
from fastzoo.nn.flows.planar import Planar, Radial
from fastzoo.nn.flows.transform import Compose, Inverse, Transform

__all__ = [
    "MAF",
    "MLP",
    "NSF",
    "ActNorm",
    "AdditiveCoupling",
    "AffineCoupling",
    "Base",
    "BatchNorm",
    "Compose",
    "ConditionalDiagonalNormal",
    "DiagonalNormal",
    "Flow",
    "Glow",
    "GlowConditioner",
    "GlowStep",
    "Inverse",
    "InvertibleConv1x1",
    "InvertibleSequence",
    "LeakyReLU",
    "Logistic",
    "Logit",
    "MaskedAutoregressive",
    "MaskedLinear",
    "MaskedMLP",
    "MultiScale",
    "Permutation",
    "Planar",
    "Radial",
    "RealNVP",
    "Reverse",
    "Scaling",
    "SoftClip",
    "SplineCoupling",
    "Squeeze",
    "StandardNormal",
    "Transform",
    "Uniform",
    "ZeroConv2d",
    "checkerboard_mask",
    "prior_coupling",
    "spline_identity",
    "spline_parameters",
]
