"""The ``neighbours`` family against its peers: ``pytest benchmarks --benchmark-only``."""

from typing import Any

import pytest

from benchmarks.rows import Row, run_in_pytest, select
from fastzoo.testing.selftest import default_device


@pytest.mark.parametrize("row", select("knn_points", device=default_device()), ids=str)
def test_knn_points(row: Row, benchmark: Any) -> None:
    run_in_pytest(row, benchmark)


@pytest.mark.parametrize("row", select("ball_query", device=default_device()), ids=str)
def test_ball_query(row: Row, benchmark: Any) -> None:
    run_in_pytest(row, benchmark)
