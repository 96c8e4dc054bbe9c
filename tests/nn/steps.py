"""One training step of a module and of its plain formulation, number by number."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Forward = Callable[..., Any]


def kept(call: Callable[[], object]) -> int:
    """Bytes of the storages that a forward keeps for its gradient."""
    storages: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = call()
    del result
    return sum(storages.values())


def outputs(found: Any) -> tuple[Tensor, ...]:
    return found if isinstance(found, tuple) else (found,)


def step(module: nn.Module, forward: Forward, inputs: Sequence[Any]) -> dict[str, Any]:
    """What a forward gives, the gradients of inputs and parameters, and the buffers after it."""
    module.zero_grad()
    leaves = [
        t.clone().requires_grad_() if isinstance(t, Tensor) and t.is_floating_point() else t
        for t in inputs
    ]
    found = outputs(forward(*leaves))
    weights = [torch.linspace(-1, 2, t.numel(), dtype=t.dtype).view_as(t) for t in found]
    total = sum((t * w).sum() for t, w in zip(found, weights, strict=True))
    assert isinstance(total, Tensor)
    total.backward()
    return {
        "outputs": found,
        "inputs": [t.grad for t in leaves if isinstance(t, Tensor) and t.requires_grad],
        "parameters": {
            name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
            for name, p in module.named_parameters()
        },
        "buffers": {name: buffer.clone() for name, buffer in module.named_buffers()},
    }


def assert_same_steps(
    mine: nn.Module,
    theirs: nn.Module,
    plain: Callable[..., Any],
    inputs: Sequence[Any],
    **tolerance: float,
) -> None:
    """Two training steps and one in evaluation; ``plain(theirs, *inputs)`` is the formulation."""
    for training in (True, True, False):
        mine.train(training), theirs.train(training)
        found = step(mine, mine, inputs)
        right = step(theirs, lambda *leaves: plain(theirs, *leaves), inputs)
        for part, values in right.items():
            torch.testing.assert_close(
                found[part],
                values,
                **{"rtol": 1e-9, "atol": 1e-9, **tolerance},
                msg=lambda text, part=part: f"{part}, training={training}: {text}",  # noqa: B023
            )
