"""What launchers share: the device they launch on, and what the compile test must know."""

import contextlib
import functools
from typing import Any, NamedTuple

import torch

INTERPRETER = 0

# Launch options: no launch that decides an index or a keep may contract its arithmetic.
EXACT = {"enable_fp_fusion": False}
FUSED = {"enable_fp_fusion": True}


class CompileCase(NamedTuple):
    """One specialisation of a kernel, for the ahead-of-time compile test.

    types: an argument's type in triton's notation, by name; arguments that are in neither table
    are None. Pointers, and the integers named in `multiples`, are multiples of 16.
    """

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, Any]
    multiples: tuple[str, ...] = ()
    vector_loads: bool = False  # 16 bytes at a time
    fused: bool = False  # may contract: decides nothing on its own
    stack: bool = False  # a library function inside keeps a table in local memory
    instructions: tuple[str, ...] = ()  # that must appear


@functools.cache
def _cuda_generation(index: int) -> int:
    return torch.cuda.get_device_capability(index)[0]


def generation(tensor: torch.Tensor) -> int:
    """The key of the configuration tables: the major compute capability, or INTERPRETER."""
    return _cuda_generation(tensor.get_device()) if tensor.is_cuda else INTERPRETER


def on_device_of(tensor: torch.Tensor):
    """Triton launches on the current device, whatever its arguments; make it theirs."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
