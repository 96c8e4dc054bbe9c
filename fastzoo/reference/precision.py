"""What precision an operator works in."""

import torch
from torch import Tensor


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """What an operator computes in, and returns: float64 for float64, float32 for the rest."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
