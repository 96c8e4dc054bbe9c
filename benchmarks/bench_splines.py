"""The ``splines`` family against its peers: ``pytest benchmarks --benchmark-only``."""

from typing import Any

import pytest

from benchmarks.rows import Row, run_in_pytest, select
from fastzoo.testing.selftest import default_device


@pytest.mark.parametrize(
    "row", select("rational_quadratic_spline", device=default_device()), ids=str
)
def test_rational_quadratic_spline(row: Row, benchmark: Any) -> None:
    run_in_pytest(row, benchmark)


@pytest.mark.parametrize("row", select("SplineFlow", device=default_device()), ids=str)
def test_spline_flow(row: Row, benchmark: Any) -> None:
    run_in_pytest(row, benchmark)
