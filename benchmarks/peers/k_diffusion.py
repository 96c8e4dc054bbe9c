"""k-diffusion's samplers."""

import contextlib
import functools
import importlib
import importlib.util
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.implementation import Implementation, Unavailable, by_generator, first_line
from benchmarks.samplers import CHURN, SEED, empty_model

# What `k_diffusion.sampling` imports and deterministic samplers never call.
_UNUSED = ("torchsde", "torchvision", "torchvision.transforms", "torchvision.transforms.functional")


@functools.cache
def load() -> Any:
    """The module `k_diffusion.sampling`, also where it is installed without its dependencies.

    The package's own `__init__` imports models, training and metrics, so it is passed over.

    Raises:
        ImportError: k-diffusion, or what its samplers need, is not installed.
    """
    found = importlib.util.find_spec("k_diffusion")
    if found is None:
        raise ModuleNotFoundError("No module named 'k_diffusion'", name="k_diffusion")
    package = types.ModuleType("k_diffusion")
    package.__path__ = list(found.submodule_search_locations or ())
    before = sys.modules.get("k_diffusion")
    sys.modules["k_diffusion"] = before or package
    try:
        with _without(*_UNUSED):
            return importlib.import_module("k_diffusion.sampling")
    except ImportError:
        if before is None:
            del sys.modules["k_diffusion"]
        raise


@contextlib.contextmanager
def _without(*names: str) -> Iterator[None]:
    """Modules that are not installed are empty ones, but for others that look for them later."""
    empty = [name for name in names if name not in sys.modules and not _installed(name)]
    for name in empty:
        module = types.ModuleType(name)
        module.__path__ = []
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], last, module)
        sys.modules[name] = module
    try:
        yield
    finally:
        for name in empty:
            del sys.modules[name]


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # its parent is not
        return False


def _sample(
    x: Tensor, outputs: Tensor, sigmas: Tensor, _: Tensor, *, method: str, noise: str | None
) -> Any:
    try:
        module = load()
    except ImportError as error:
        raise Unavailable(f"it cannot be imported ({first_line(error)})") from error
    sampler = getattr(module, f"sample_{method}")
    options = CHURN if method == "heun" else {}

    def call() -> Tensor:
        torch.manual_seed(SEED)
        found: Tensor = sampler(empty_model(outputs), x, sigmas, disable=True, **options)
        return found

    return by_generator(call, {"method": method, "noise": noise})


PEER = Implementation("k-diffusion", {"sample": _sample})
