"""The ``vq`` family against its peers: ``pytest benchmarks --benchmark-only``."""

from typing import Any

import pytest

from benchmarks.rows import Row, run_in_pytest, select
from fastzoo.testing.selftest import default_device


@pytest.mark.parametrize("row", select("vq_nearest", device=default_device()), ids=str)
def test_vq_nearest(row: Row, benchmark: Any) -> None:
    run_in_pytest(row, benchmark)


@pytest.mark.parametrize("row", select("vq_quantize", device=default_device()), ids=str)
def test_vq_quantize(row: Row, benchmark: Any) -> None:
    run_in_pytest(row, benchmark)


@pytest.mark.parametrize("row", select("VectorQuantize", device=default_device()), ids=str)
def test_vector_quantize(row: Row, benchmark: Any) -> None:
    run_in_pytest(row, benchmark)


@pytest.mark.parametrize("row", select("vq_statistics", device=default_device()), ids=str)
def test_vq_statistics(row: Row, benchmark: Any) -> None:
    run_in_pytest(row, benchmark)


@pytest.mark.parametrize("row", select("kmeans", device=default_device()), ids=str)
def test_kmeans(row: Row, benchmark: Any) -> None:
    run_in_pytest(row, benchmark)
