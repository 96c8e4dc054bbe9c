"""The ``nms`` family against its peers: ``pytest benchmarks --benchmark-only``."""

from typing import Any

import pytest

from benchmarks.rows import Row, run_in_pytest, select
from fastzoo.testing.selftest import default_device


@pytest.mark.parametrize("row", select("nms", device=default_device()), ids=str)
def test_nms(row: Row, benchmark: Any) -> None:
    run_in_pytest(row, benchmark)


@pytest.mark.parametrize("row", select("batched_nms", device=default_device()), ids=str)
def test_batched_nms(row: Row, benchmark: Any) -> None:
    run_in_pytest(row, benchmark)


@pytest.mark.parametrize("row", select("nms_rotated", device=default_device()), ids=str)
def test_nms_rotated(row: Row, benchmark: Any) -> None:
    run_in_pytest(row, benchmark)


@pytest.mark.parametrize("row", select("soft_nms", device=default_device()), ids=str)
def test_soft_nms(row: Row, benchmark: Any) -> None:
    run_in_pytest(row, benchmark)


@pytest.mark.parametrize("row", select("matrix_nms", device=default_device()), ids=str)
def test_matrix_nms(row: Row, benchmark: Any) -> None:
    run_in_pytest(row, benchmark)
