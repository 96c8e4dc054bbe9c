"""Explicit Runge-Kutta methods as tables of float64 numbers.

A step from ``y`` with ``k_0 = f(t, y)`` is ``k_i = f(t + c_i h, y + h sum_j a_ij k_j)``, its end
``y + h sum_j b_j k_j`` and its error ``h sum_j e_j k_j``: each of them one linear combination.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Tableau:
    """One method.

    Args:
        order: of the solution that is kept.
        nodes: c of the stages after the first.
        stages: a, one row for each of them.
        solution: b.
        error: b less the embedded method's; empty for a method of fixed steps.
        middle: the solution in the middle of a step, from which dense output is made.
    """

    order: int
    nodes: tuple[float, ...]
    stages: tuple[tuple[float, ...], ...]
    solution: tuple[float, ...]
    error: tuple[float, ...] = ()
    middle: tuple[float, ...] = ()

    @property
    def ends_in_stage(self) -> bool:
        """Whether the last stage stands at the solution, which so needs no sum of its own."""
        return self.solution == (*self.stages[-1], 0.0) if self.stages else False

    @property
    def dense(self) -> np.ndarray:
        """``[4, stages]``: weights of the k in ``(y(t + x h) - y(t)) / h``, for each power of x.

        The quartic through both ends, their slopes and the middle of the step.
        """
        count = len(self.solution)
        first, last = np.eye(count)[0], np.eye(count)[-1]
        end, middle = np.array(self.solution), np.array(self.middle)
        return np.stack(
            [
                first,
                last - 4 * first - 5 * end + 16 * middle,
                5 * first - 3 * last + 14 * end - 32 * middle,
                2 * (last - first) - 8 * end + 16 * middle,
            ]
        )


# Dormand and Prince (1980); the middle is Shampine's (1986), of order 4.
DOPRI5 = Tableau(
    order=5,
    nodes=(1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0),
    stages=(
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
    ),
    solution=(35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0.0),
    error=(
        35 / 384 - 1951 / 21600,
        0.0,
        500 / 1113 - 22642 / 50085,
        125 / 192 - 451 / 720,
        -2187 / 6784 + 12231 / 42400,
        11 / 84 - 649 / 6300,
        -1 / 60,
    ),
    middle=(
        6025192743 / 30085553152 / 2,
        0.0,
        51252292925 / 65400821598 / 2,
        -2691868925 / 45128329728 / 2,
        187940372067 / 1594534317056 / 2,
        -1776094331 / 19743644256 / 2,
        11237099 / 235043384 / 2,
    ),
)

# Bogacki and Shampine (1989).
BOSH3 = Tableau(
    order=3,
    nodes=(1 / 2, 3 / 4, 1.0),
    stages=((1 / 2,), (0.0, 3 / 4), (2 / 9, 1 / 3, 4 / 9)),
    solution=(2 / 9, 1 / 3, 4 / 9, 0.0),
    error=(2 / 9 - 7 / 24, 1 / 3 - 1 / 4, 4 / 9 - 1 / 3, -1 / 8),
    middle=(0.0, 0.5, 0.0, 0.0),
)

# Fehlberg (1969), RK1(2).
FEHLBERG2 = Tableau(
    order=2,
    nodes=(1 / 2, 1.0),
    stages=((1 / 2,), (1 / 256, 255 / 256)),
    solution=(1 / 512, 255 / 256, 1 / 512),
    error=(-1 / 512, 0.0, 1 / 512),
    middle=(0.0, 0.5, 0.0),
)

ADAPTIVE_HEUN = Tableau(
    order=2,
    nodes=(1.0,),
    stages=((1.0,),),
    solution=(0.5, 0.5),
    error=(0.5, -0.5),
    middle=(0.5, 0.0),
)

EULER = Tableau(order=1, nodes=(), stages=(), solution=(1.0,))
MIDPOINT = Tableau(order=2, nodes=(1 / 2,), stages=((1 / 2,),), solution=(0.0, 1.0))
HEUN2 = Tableau(order=2, nodes=(1.0,), stages=((1.0,),), solution=(1 / 2, 1 / 2))
HEUN3 = Tableau(
    order=3,
    nodes=(1 / 3, 2 / 3),
    stages=((1 / 3,), (0.0, 2 / 3)),
    solution=(1 / 4, 0.0, 3 / 4),
)
# Kutta's 3/8 rule.
RK4 = Tableau(
    order=4,
    nodes=(1 / 3, 2 / 3, 1.0),
    stages=((1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0)),
    solution=(1 / 8, 3 / 8, 3 / 8, 1 / 8),
)

ADAPTIVE = {
    "dopri5": DOPRI5,
    "bosh3": BOSH3,
    "fehlberg2": FEHLBERG2,
    "adaptive_heun": ADAPTIVE_HEUN,
}
FIXED = {"euler": EULER, "midpoint": MIDPOINT, "heun2": HEUN2, "heun3": HEUN3, "rk4": RK4}
