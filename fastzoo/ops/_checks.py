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


def check_choice(name: str, value: object, known: tuple[str | None, ...]) -> None:
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


def check_indices(name: str, value: object, shape: str, rank: int, device: torch.device) -> None:
    check_tensor(name, value, shape, rank)
    assert isinstance(value, Tensor)
    if value.dtype != torch.int64:
        raise TypeError(f"{name}: expected int64, got {value.dtype}")
    if value.device != device:
        raise ValueError(f"{name}: expected device {device}, got {value.device}")


def check_positive(name: str, value: int) -> None:
    if check_count(name, value) < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")


def check_clouds(
    name: str,
    points: Tensor,
    lengths: Tensor | None,
    ptr: Tensor | None,
    batch: Tensor | None,
    suffix: str = "",
) -> None:
    """Points of padded clouds with their lengths, or of packed ones with ptr or batch.

    What the lengths, ptr and batch hold is looked at on the CPU alone: elsewhere that would wait
    for the device.
    """
    shape = "[B, P, D] or [N, D]"
    check_tensor(name, points, shape, 3 if getattr(points, "ndim", 0) == 3 else 2)
    check_floating(name, points)
    if points.shape[-1] == 0:
        raise ValueError(f"{name}: expected at least one dimension, got {list(points.shape)}")
    padded, device = points.dim() == 3, points.device
    looks = device.type == "cpu" and not torch.compiler.is_compiling()
    given = [value for value in (lengths, ptr, batch) if value is not None]
    if len(given) > 1:
        raise ValueError(f"lengths{suffix}, ptr{suffix}, batch{suffix}: expected at most one")
    if lengths is not None:
        label = f"lengths{suffix}"
        if not padded:
            raise ValueError(f"{label}: expected padded {name} [B, P, D], got {list(points.shape)}")
        check_indices(label, lengths, "[B]", 1, device)
        clouds, longest = points.shape[:2]
        if lengths.shape[0] != clouds:
            raise ValueError(f"{label}: expected {clouds} clouds, got {lengths.shape[0]}")
        if looks and bool(((lengths < 0) | (lengths > longest)).any()):
            raise ValueError(f"{label}: expected 0 to {longest}, the points of a cloud")
    for label, value, wanted in (
        (f"ptr{suffix}", ptr, "[B + 1]"),
        (f"batch{suffix}", batch, "[N]"),
    ):
        if value is None:
            continue
        if padded:
            raise ValueError(f"{label}: expected packed {name} [N, D], got {list(points.shape)}")
        check_indices(label, value, wanted, 1, device)
        if looks and bool((value[1:] < value[:-1]).any()):
            raise ValueError(f"{label}: expected ascending values")
    if batch is not None and batch.shape[0] != points.shape[0]:
        raise ValueError(f"batch{suffix}: expected {points.shape[0]} rows, got {batch.shape[0]}")
    if batch is not None and looks and bool((batch < 0).any()):
        raise ValueError(f"batch{suffix}: expected at least 0")
    if ptr is not None and (
        ptr.shape[0] == 0 or (looks and (int(ptr[0]) != 0 or int(ptr[-1]) != points.shape[0]))
    ):
        raise ValueError(f"ptr{suffix}: expected 0, ..., {points.shape[0]}, the first row of each")
