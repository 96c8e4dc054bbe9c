"""What ``import fastzoo`` costs and touches."""

import json
import os
import subprocess
import sys

import pytest

LIMIT_SECONDS = 0.2
SCRIPT = """
import json, sys, time
import torch
before = set(sys.modules)
started = time.perf_counter()
import fastzoo
seconds = time.perf_counter() - started
maps = open("/proc/self/maps").read() if sys.platform == "linux" else ""
print(json.dumps({
    "seconds": seconds,
    "modules": sorted({name.split(".")[0] for name in set(sys.modules) - before}),
    "cuda_initialized": torch.cuda.is_initialized(),
    "driver_mapped": "libcuda.so" in maps,
}))
"""


def run_import() -> dict[str, object]:
    # An installed package is compiled to bytecode; a checkout is so by its first import.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    report: dict[str, object] = json.loads(done.stdout)
    return report


@pytest.fixture(scope="module")
def report() -> dict[str, object]:
    return run_import()


def test_import_is_quick(report: dict[str, object]) -> None:
    # The least of a few: a busy machine makes any one of them slow, none of them fast.
    seconds = [report["seconds"]]
    while min(seconds) > LIMIT_SECONDS and len(seconds) < 6:
        seconds.append(run_import()["seconds"])
    assert min(seconds) <= LIMIT_SECONDS


def test_import_touches_no_driver(report: dict[str, object]) -> None:
    assert not report["cuda_initialized"]
    assert not report["driver_mapped"]


def test_import_needs_torch_and_numpy_only(report: dict[str, object]) -> None:
    brought = set(report["modules"]) - set(sys.stdlib_module_names)
    assert brought == {"fastzoo"}
