"""The compiled libraries of this checkout's build, and what binutils says of them."""

import subprocess
from pathlib import Path

import fastzoo
from tests.conftest import EMULATOR, ROOT

PACKAGE = Path(fastzoo.__file__).parent
BUILD = ROOT / "build" / "native"
LIBRARIES = [
    path for path in (PACKAGE / "_C_cpu.so", EMULATOR, PACKAGE / "_C_cuda.so") if path.exists()
]


def symbols(path: Path, *options: str) -> list[tuple[str, str]]:
    """(kind, name) of nm's lines."""
    command = ["nm", *options, str(path)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    return [(fields[-2], fields[-1]) for line in lines if len(fields := line.split()) >= 2]
