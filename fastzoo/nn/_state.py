"""Running state in buffers, that a training step's forward updates."""

import torch
from torch import nn


def updates_state(module: nn.Module) -> bool:
    """Whether a forward enters the running state: in training, but not where activation
    checkpointing runs a forward again, which is in the midst of a backward."""
    if torch.compiler.is_compiling():
        return module.training
    return module.training and torch._C._current_graph_task_id() == -1
