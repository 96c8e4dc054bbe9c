"""diffusers' schedulers, each step one kernel: with diffusers installed, and without it."""

from fastzoo.samplers.diffusers.base import DIFFUSERS, SchedulerOutput
from fastzoo.samplers.diffusers.ddim import DDIMScheduler
from fastzoo.samplers.diffusers.ddpm import DDPMScheduler
from fastzoo.samplers.diffusers.dpmsolver_multistep import DPMSolverMultistepScheduler
from fastzoo.samplers.diffusers.euler import EulerDiscreteScheduler
from fastzoo.samplers.diffusers.euler_ancestral import EulerAncestralDiscreteScheduler
from fastzoo.samplers.diffusers.flow_match import FlowMatchEulerDiscreteScheduler
from fastzoo.samplers.diffusers.heun import HeunDiscreteScheduler
from fastzoo.samplers.diffusers.unipc_multistep import UniPCMultistepScheduler

# What diffusers looks for beside the class of a saved pipeline's scheduler.
SchedulerMixin = getattr(DIFFUSERS, "SchedulerMixin", None)

__all__ = [
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "SchedulerOutput",
    "UniPCMultistepScheduler",
]
