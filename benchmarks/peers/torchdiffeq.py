"""torchdiffeq's dopri5, which must ask for the derivative as often as fastzoo's."""

from collections.abc import Callable

from torch import Tensor

from benchmarks.implementation import Implementation, require
from benchmarks.samplers import evaluations, solve
from fastzoo.samplers.ode import odeint


def _odeint(y0: Tensor) -> Callable[[], Tensor]:
    theirs = require("torchdiffeq").odeint
    found, ours = evaluations(theirs, y0), evaluations(odeint, y0)
    if found != ours:
        raise AssertionError(f"it takes {found} evaluations, fastzoo {ours}")
    return solve(theirs, y0)


PEER = Implementation("torchdiffeq", {"odeint": _odeint})
