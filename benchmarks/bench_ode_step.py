"""The ``ode_step`` family and the samplers on it: ``pytest benchmarks --benchmark-only``."""

from typing import Any

import pytest

from benchmarks.rows import Row, run_in_pytest, select
from fastzoo.testing.selftest import default_device


@pytest.mark.parametrize("row", select("ode_step", device=default_device()), ids=str)
def test_ode_step(row: Row, benchmark: Any) -> None:
    run_in_pytest(row, benchmark)


@pytest.mark.parametrize("row", select("counter_bits", device=default_device()), ids=str)
def test_counter_bits(row: Row, benchmark: Any) -> None:
    run_in_pytest(row, benchmark)


@pytest.mark.parametrize("row", select("counter_normal", device=default_device()), ids=str)
def test_counter_normal(row: Row, benchmark: Any) -> None:
    run_in_pytest(row, benchmark)


@pytest.mark.parametrize("row", select("guidance_factor", device=default_device()), ids=str)
def test_guidance_factor(row: Row, benchmark: Any) -> None:
    run_in_pytest(row, benchmark)


@pytest.mark.parametrize("row", select("step_error", device=default_device()), ids=str)
def test_step_error(row: Row, benchmark: Any) -> None:
    run_in_pytest(row, benchmark)


@pytest.mark.parametrize("row", select("scheduler_step", device=default_device()), ids=str)
def test_scheduler_step(row: Row, benchmark: Any) -> None:
    run_in_pytest(row, benchmark)


@pytest.mark.parametrize("row", select("guided_step", device=default_device()), ids=str)
def test_guided_step(row: Row, benchmark: Any) -> None:
    run_in_pytest(row, benchmark)


@pytest.mark.parametrize("row", select("sample", device=default_device()), ids=str)
def test_sample(row: Row, benchmark: Any) -> None:
    run_in_pytest(row, benchmark)


@pytest.mark.parametrize("row", select("odeint", device=default_device()), ids=str)
def test_odeint(row: Row, benchmark: Any) -> None:
    run_in_pytest(row, benchmark)


@pytest.mark.parametrize("row", select("denoising_step", device=default_device()), ids=str)
def test_denoising_step(row: Row, benchmark: Any) -> None:
    run_in_pytest(row, benchmark)
