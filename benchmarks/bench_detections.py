"""The ``detections`` family against its peers: ``pytest benchmarks --benchmark-only``."""

from typing import Any

import pytest

from benchmarks.rows import Row, run_in_pytest, select
from fastzoo.testing.selftest import default_device


@pytest.mark.parametrize("row", select("multiclass_nms", device=default_device()), ids=str)
def test_multiclass_nms(row: Row, benchmark: Any) -> None:
    run_in_pytest(row, benchmark)


@pytest.mark.parametrize("row", select("peak_nms", device=default_device()), ids=str)
def test_peak_nms(row: Row, benchmark: Any) -> None:
    run_in_pytest(row, benchmark)
