"""The ``pointconv`` family against its peers: ``pytest benchmarks --benchmark-only``."""

from typing import Any

import pytest

from benchmarks.rows import Row, run_in_pytest, select
from fastzoo.testing.selftest import default_device


@pytest.mark.parametrize("row", select("pointconv", device=default_device()), ids=str)
def test_pointconv(row: Row, benchmark: Any) -> None:
    run_in_pytest(row, benchmark)


@pytest.mark.parametrize("row", select("PointConv", device=default_device()), ids=str)
def test_pointconv_layer(row: Row, benchmark: Any) -> None:
    run_in_pytest(row, benchmark)


@pytest.mark.parametrize("row", select("EdgeConv", device=default_device()), ids=str)
def test_edge_conv(row: Row, benchmark: Any) -> None:
    run_in_pytest(row, benchmark)


@pytest.mark.parametrize("row", select("neighbour_reduce", device=default_device()), ids=str)
def test_neighbour_reduce(row: Row, benchmark: Any) -> None:
    run_in_pytest(row, benchmark)
