"""torchdiffeq's functions (0.2.5) on fastzoo's samplers.

Names, arguments, defaults, methods, norms and the control of the step are theirs, and so are the
steps and the evaluations of func. Where it differs: no events, no ``dopri8``, Adams methods or
scipy's, no complex states; options that a method does not have raise in the place of a warning; a
trial step that gives NaN is tried again with a smaller one; what cannot go on raises
:class:`fastzoo.samplers.IntegrationError`, with the times and states that were reached, and no
assertion; half-precision states see a time in float32; gradients through adaptive steps take the
first step, too, as a constant, and that of t is the exact flow's.
"""

from fastzoo.samplers import odeint, odeint_adjoint

__all__ = ["odeint", "odeint_adjoint"]
