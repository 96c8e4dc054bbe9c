"""The memory that a loss needs beyond its inputs and gradients, as its matrix of scores grows."""

import dataclasses
from typing import Any

from benchmarks.implementation import Unavailable
from benchmarks.rows import Row, select
from fastzoo.testing.timing import peak_memory

_PEERS = ("eager", "metric-learning")


@dataclasses.dataclass(frozen=True)
class Curve:
    """``size`` takes each of ``sizes``, the rest of the shape stays."""

    op: str
    size: str
    sizes: tuple[int, ...]
    fixed: dict[str, int]


CURVES = (
    Curve(
        "margin_softmax_loss",
        "classes",
        (10_000, 30_000, 100_000, 300_000, 1_000_000),
        {"n": 256, "dim": 512},
    ),
    Curve("clip_loss", "n", (1024, 2048, 4096, 8192, 16384), {"dim": 512}),
)


def measure(curve: Curve, device: str) -> dict[str, Any]:
    """Points of fastzoo's default and of the peers, as far as these fit into memory.

    Answers are not compared here: the benchmarks' cases do it, at both ends of the curve.
    """
    points = []
    for number, size in enumerate(curve.sizes):
        shape = {**curve.fixed, curve.size: size}
        rows = select(curve.op, device=device, shape=shape, peers=_PEERS)
        for row in rows:
            if row.implementation.kind == "backend":
                continue
            if number == 0:
                _point(row)  # what is allocated once and kept is there from now on
            points.append({**_point(row), "size": size})
        rows[0].problem.release()
    return {"size_name": curve.size, "fixed": curve.fixed, "points": points}


def _point(row: Row) -> dict[str, Any]:
    point: dict[str, Any] = {"implementation": row.implementation.name}
    try:
        call = row.call()
    except Unavailable as reason:
        return {**point, "reason": str(reason)}
    return {**point, "peak_bytes": row.extra_bytes(peak_memory(call, row.problem.device))}
