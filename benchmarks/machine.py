"""What was measured, on which machine, and what that machine can do at most."""

import functools
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from fastzoo.testing import selftest
from fastzoo.testing.timing import measure

_PACKAGES = (
    "triton",
    "torchvision",
    "faiss-cpu",
    "opencv-python-headless",
    "pytorch-metric-learning",
    "scikit-learn",
    "vector-quantize-pytorch",
    "torch_cluster",
    "zuko",
    "nflows",
    "diffusers",
    "k-diffusion",
    "torchdiffeq",
    "scipy",
    "numpy",
)


def describe(device: str) -> dict[str, Any]:
    return {
        **selftest.machine(device),
        "kind": device,
        "slug": slug(device),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "commit": _commit(),
    }


def slug(device: str) -> str:
    """``h200``, ``amd-epyc-9r14-2-threads``: names the file of results."""
    name = re.sub(
        r"\((r|tm)\)|@.*|\d+-core|nvidia|processor|cpu", " ", selftest.device_name(device).lower()
    )
    words = re.findall(r"[a-z0-9]+", name)
    if device == "cpu":
        words += [str(torch.get_num_threads()), "threads"]
    return "-".join(words)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        run = subprocess.run(
            command, cwd=Path(__file__).parent, check=True, capture_output=True, text=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return run.stdout.strip()


def ceilings(device: str, *, budget: float = 0.5) -> dict[str, float]:
    """The fastest matrix product and copy that torch reaches here, GFLOP/s and GB/s.

    A case cannot be faster than its operations at the one or its bytes at the other.
    """
    size = 8192 if device == "cuda" else 2048
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.randn(size, size, device=device).to(dtype)
        seconds = measure(functools.partial(torch.mm, a, a), device, budget=budget).minimum
        found[f"matmul_{str(dtype).removeprefix('torch.')}"] = 2 * size**3 / seconds / 1e9
    source = torch.zeros(1 << 28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = measure(lambda: target.copy_(source), device, budget=budget).minimum
    found["copy"] = 2 * source.numel() / seconds / 1e9
    return found
