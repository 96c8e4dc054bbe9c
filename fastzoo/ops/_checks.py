"""Argument checks of the public functions: an error names the argument, what came, what is
wanted."""

import torch
from torch import Tensor

REDUCTIONS = ("mean", "sum", "none")
FLOATING = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def check_tensor(name: str, value: object, shape: str, rank: int) -> None:
    """``shape`` is how the documentation writes it, e.g. ``[N, 4]``; ``rank`` -1 allows any."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor {shape}, got {type(value).__name__}")
    if (value.dim() != rank and rank >= 0) or value.dim() == 0:
        raise ValueError(f"{name}: expected shape {shape}, got {list(value.shape)}")


def check_floating(name: str, value: Tensor) -> None:
    if value.dtype not in FLOATING:
        raise TypeError(
            f"{name}: expected float32, float64, float16 or bfloat16, got {value.dtype}"
        )


def check_same(first_name: str, first: Tensor, name: str, value: Tensor) -> None:
    """The second tensor has the first one's device, and its dtype unless autocast unifies them."""
    if value.device != first.device:
        raise ValueError(
            f"{name}: expected the device of {first_name}, {first.device}, got {value.device}"
        )
    if value.dtype != first.dtype and not torch.is_autocast_enabled(first.device.type):
        raise TypeError(
            f"{name}: expected the dtype of {first_name}, {first.dtype}, got {value.dtype}"
        )


def check_choice(name: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name}: expected one of {known}, got {value!r}")


def check_reduction(reduction: str) -> None:
    check_choice("reduction", reduction, REDUCTIONS)


def check_count(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < 0:
        raise ValueError(f"{name}: expected at least 0, got {value}")
    return value


def at_most(name: str, limit: int | None) -> int:
    """A limit as the operators take it: -1 for none."""
    return -1 if limit is None else check_count(name, limit)


def multiplies_in_bfloat16(operand: Tensor) -> bool:
    """Whether products of a loss round their operands: bfloat16's own, and under autocast."""
    if operand.dtype == torch.float64:
        return False
    return operand.dtype == torch.bfloat16 or torch.is_autocast_enabled(operand.device.type)
