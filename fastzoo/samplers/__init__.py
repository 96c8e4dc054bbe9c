"""Sampling: schedules, sampler methods and ODE solvers, one fused kernel a step."""

from fastzoo.samplers import methods, schedules
from fastzoo.samplers.sample import Sampler, noise, sample

__all__ = ["Sampler", "methods", "noise", "sample", "schedules"]
