"""Sample inputs, tolerances, gradient oracle and the conformance checks of every operator.

fastzoo's own tests, its benchmarks and ``python -m fastzoo selftest`` use this code; so may the
tests of operators that are not fastzoo's.
"""

from fastzoo.testing.gradients import assert_gradient_close
from fastzoo.testing.losses import deviation, loss_and_gradients
from fastzoo.testing.spec import BenchmarkCase, Invalid, OpSpec, Sample
from fastzoo.testing.specs import SPECS
from fastzoo.testing.tolerance import assert_same_outputs, unit_roundoff

__all__ = [
    "SPECS",
    "BenchmarkCase",
    "Invalid",
    "OpSpec",
    "Sample",
    "assert_gradient_close",
    "assert_same_outputs",
    "deviation",
    "loss_and_gradients",
    "unit_roundoff",
]
