"""The ``coupling`` family against its peers: ``pytest benchmarks --benchmark-only``."""

from typing import Any

import pytest

from benchmarks.rows import Row, run_in_pytest, select
from fastzoo.testing.selftest import default_device


@pytest.mark.parametrize("row", select("coupling", device=default_device()), ids=str)
def test_coupling(row: Row, benchmark: Any) -> None:
    run_in_pytest(row, benchmark)
