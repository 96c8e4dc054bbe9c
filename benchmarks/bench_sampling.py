"""The ``sampling`` family against its peers: ``pytest benchmarks --benchmark-only``."""

from typing import Any

import pytest

from benchmarks.rows import Row, run_in_pytest, select
from fastzoo.testing.selftest import default_device


@pytest.mark.parametrize("row", select("sample_farthest_points", device=default_device()), ids=str)
def test_sample_farthest_points(row: Row, benchmark: Any) -> None:
    run_in_pytest(row, benchmark)


@pytest.mark.parametrize("row", select("voxel_grid", device=default_device()), ids=str)
def test_voxel_grid(row: Row, benchmark: Any) -> None:
    run_in_pytest(row, benchmark)
