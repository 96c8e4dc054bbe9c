"""k-diffusion's samplers as they are, without what else its package imports."""

import importlib
import importlib.util
import sys
import types
from typing import Any

import pytest


def k_diffusion_sampling() -> Any:
    """``k_diffusion.sampling``, with torchvision and torchsde as empty modules where they are
    missing: no sampler uses the one, and the other makes noise that tests give themselves."""
    found = importlib.util.find_spec("k_diffusion")
    if found is None:
        pytest.skip("k-diffusion is not installed", allow_module_level=True)
    package = types.ModuleType("k_diffusion")
    package.__path__ = list(found.submodule_search_locations or [])
    transforms = types.ModuleType("torchvision.transforms")
    transforms.functional = None  # type: ignore[attr-defined]
    stand_ins = {"k_diffusion": package}
    if importlib.util.find_spec("torchvision") is None:
        stand_ins["torchvision"] = types.ModuleType("torchvision")
        stand_ins["torchvision.transforms"] = transforms
    if importlib.util.find_spec("torchsde") is None:
        stand_ins["torchsde"] = types.ModuleType("torchsde")
    sys.modules.update(stand_ins)
    try:
        return importlib.import_module("k_diffusion.sampling")
    finally:
        for name in stand_ins:
            del sys.modules[name]
