"""Sampling: schedules, sampler methods and ODE solvers, one fused kernel a step."""
