"""How many operators a call dispatches, forward and backward, as the profiler sees it."""

from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile

_OPERATORS = ("aten::", "fastzoo::")


def _is_operator(name: str) -> bool:
    """An operator, or a kernel that torch.compile wrote in the place of several."""
    return name.startswith(_OPERATORS) or "_fused_" in name


def count(call: Callable[[], object]) -> int:
    """Operators that Python or the backward called; what these call in turn is theirs."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        call()
    return sum(_is_operator(e.name) and not _is_inside(e) for e in profiled.events())


def _is_inside(event: Any) -> bool:
    parent = event.cpu_parent
    while parent is not None:
        if _is_operator(parent.name):
            return True
        parent = parent.cpu_parent
    return False
