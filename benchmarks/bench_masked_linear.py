"""The ``masked_linear`` family against its peers: ``pytest benchmarks --benchmark-only``."""

from typing import Any

import pytest

from benchmarks.rows import Row, run_in_pytest, select
from fastzoo.testing.selftest import default_device


@pytest.mark.parametrize("row", select("autoregressive_inverse", device=default_device()), ids=str)
def test_autoregressive_inverse(row: Row, benchmark: Any) -> None:
    run_in_pytest(row, benchmark)


@pytest.mark.parametrize("row", select("MAF", device=default_device()), ids=str)
def test_masked_autoregressive_flow(row: Row, benchmark: Any) -> None:
    run_in_pytest(row, benchmark)
