"""Sampling: schedules, sampler methods and ODE solvers, one fused kernel a step."""

from fastzoo.samplers import methods, schedules
from fastzoo.samplers.adjoint import odeint_adjoint
from fastzoo.samplers.likelihood import log_likelihood, probability_flow
from fastzoo.samplers.ode import odeint
from fastzoo.samplers.runge_kutta import (
    IntegrationError,
    MaxStepsExceeded,
    NonFiniteDerivative,
    StepSizeUnderflow,
)
from fastzoo.samplers.sample import Sampler, noise, sample

__all__ = [
    "IntegrationError",
    "MaxStepsExceeded",
    "NonFiniteDerivative",
    "Sampler",
    "StepSizeUnderflow",
    "log_likelihood",
    "methods",
    "noise",
    "odeint",
    "odeint_adjoint",
    "probability_flow",
    "sample",
    "schedules",
]
