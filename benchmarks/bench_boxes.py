"""The ``boxes`` family against its peers: ``pytest benchmarks --benchmark-only``."""

from typing import Any

import pytest

from benchmarks.rows import Row, run_in_pytest, select
from fastzoo.testing.selftest import default_device


@pytest.mark.parametrize("row", select("box_iou", device=default_device()), ids=str)
def test_box_iou(row: Row, benchmark: Any) -> None:
    run_in_pytest(row, benchmark)


@pytest.mark.parametrize("row", select("complete_box_iou_loss", device=default_device()), ids=str)
def test_complete_box_iou_loss(row: Row, benchmark: Any) -> None:
    run_in_pytest(row, benchmark)
