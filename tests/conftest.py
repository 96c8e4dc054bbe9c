"""Without a GPU, Triton kernels run in its interpreter and CUDA kernels in the host emulator."""

import os
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

if DEVICE == "cpu":
    # Read when triton is first imported, so set before any test is.
    os.environ["TRITON_INTERPRET"] = "1"

from fastzoo import _native  # noqa: E402

EMULATOR = Path(os.environ.get("FASTZOO_EMULATOR", ROOT / "build" / "native" / "_C_emulator.so"))
if DEVICE == "cpu" and EMULATOR.exists():
    _native.load_emulator(EMULATOR)
