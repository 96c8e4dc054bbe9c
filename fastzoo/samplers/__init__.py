"""Sampling: schedules, sampler methods and ODE solvers, one fused kernel a step."""

from fastzoo.samplers.sample import Sampler, noise, sample

__all__ = ["Sampler", "noise", "sample"]
