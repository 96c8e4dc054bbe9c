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
from fastzoo.nn.flows.maf import MAF, NSF
from fastzoo.nn.flows.permutation import Permutation, Reverse
from fastzoo.nn.flows.planar import Planar, Radial
from fastzoo.nn.flows.transform import Compose, Inverse, Transform

__all__ = [
    "MAF",
    "MLP",
    "NSF",
    "AdditiveCoupling",
    "AffineCoupling",
    "Base",
    "BatchNorm",
    "Compose",
    "ConditionalDiagonalNormal",
    "DiagonalNormal",
    "Flow",
    "Inverse",
    "LeakyReLU",
    "Logistic",
    "Logit",
    "MaskedAutoregressive",
    "MaskedLinear",
    "MaskedMLP",
    "Permutation",
    "Planar",
    "Radial",
    "Reverse",
    "Scaling",
    "SoftClip",
    "SplineCoupling",
    "StandardNormal",
    "Transform",
    "Uniform",
    "spline_identity",
    "spline_parameters",
]
