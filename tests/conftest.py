"""Without a GPU, Triton kernels run in its interpreter and CUDA kernels in the host emulator."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# Read when triton is first imported, so set before any test is. The interpreter replaces the
# compiler: ahead-of-time compiles run in a process of their own, with TRITON_INTERPRET=0.
if DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")
if os.environ.get("TRITON_INTERPRET") == "1":
    collect_ignore = ["aot/test_triton_aot.py"]

from fastzoo import _native  # noqa: E402

EMULATOR = Path(os.environ.get("FASTZOO_EMULATOR", ROOT / "build" / "native" / "_C_emulator.so"))
if DEVICE == "cpu" and EMULATOR.exists():
    _native.load_emulator(EMULATOR)


@pytest.fixture(params=["baseline", "avx2", "avx512", "avx512_bf16"])
def capability(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set of this CPU in turn, forced on the C++ kernels."""
    try:
        _native.force_cpu_capability(request.param)
    except RuntimeError as error:
        pytest.skip(str(error))
    assert _native.cpu_capability() == request.param
    yield request.param
    _native.force_cpu_capability(None)
