"""diffusers' schedulers, each step one kernel; with diffusers and without it."""

from fastzoo.samplers.diffusers.ddim import DDIMScheduler

__all__ = ["DDIMScheduler"]
