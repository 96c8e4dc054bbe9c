"""diffusers' schedulers."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from benchmarks.implementation import Implementation, by_generator, require
from benchmarks.samplers import denoising_step, scheduler_step


def _scheduler_step(*args: Tensor, scheduler: str, noise: str | None) -> Any:
    drawn = "generator" if noise else None
    call = scheduler_step(require("diffusers"), *args, scheduler=scheduler, noise=drawn)
    return by_generator(call, {"scheduler": scheduler, "noise": noise})


def _denoising_step(x: Tensor) -> Callable[[], Tensor]:
    return denoising_step(require("diffusers"), x)


PEER = Implementation(
    "diffusers", {"scheduler_step": _scheduler_step, "denoising_step": _denoising_step}
)
