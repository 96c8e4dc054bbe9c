"""What every launcher needs to know about the device it launches on."""

import contextlib
import functools

import torch

INTERPRETER = 0


@functools.cache
def _cuda_generation(index: int) -> int:
    return torch.cuda.get_device_capability(index)[0]


def generation(tensor: torch.Tensor) -> int:
    """The key of the configuration tables: the major compute capability, or INTERPRETER."""
    return _cuda_generation(tensor.get_device()) if tensor.is_cuda else INTERPRETER


def on_device_of(tensor: torch.Tensor):
    """Triton launches on the current device, whatever its arguments; make it theirs."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
