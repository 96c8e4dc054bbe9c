"""setup.py finds what to build with, or says what is missing and how to do without."""

import importlib.util
import runpy
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import setuptools

from tests.conftest import ROOT


@pytest.fixture
def setup_py(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names of setup.py, executed without building anything."""
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    for variable in ("FASTZOO_TORCH", "FASTZOO_CUDA", "FASTZOO_NATIVE", "CUDA_HOME"):
        monkeypatch.delenv(variable, raising=False)
    return runpy.run_path(str(ROOT / "setup.py"))


def fake_torch(folder: Path, version: str, headers: bool = True) -> Path:
    torch = folder / "torch"
    (torch / "include" / "torch" / "csrc" / "stable" if headers else torch).mkdir(parents=True)
    (torch / "version.py").write_text(f"__version__ = '{version}'\ncuda = None\n")
    return torch


@pytest.mark.parametrize("version", ["2.10.0", "2.10.0+cu130", "2.11.0", "2.13.0+cpu", "3.0.0"])
def test_torch_from_the_floor_up_is_taken(
    setup_py: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    torch = fake_torch(tmp_path, version)
    monkeypatch.setenv("FASTZOO_TORCH", str(torch))
    assert setup_py["find_torch"]() == torch


# As strings, "2.9.1" would pass and "2.10.0" would not.
@pytest.mark.parametrize("version", ["2.9.1", "2.4.0+cu121", "1.13.1", "2.10.0.dev20251001"])
def test_torch_below_the_floor_is_refused_by_its_version(
    setup_py: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    monkeypatch.setenv("FASTZOO_TORCH", str(fake_torch(tmp_path, version)))
    with pytest.raises(SystemExit) as error:
        setup_py["find_torch"]()
    assert f"torch {version} in" in str(error.value)
    assert "2.10 or newer needed" in str(error.value)
    assert "FASTZOO_NATIVE=0" in str(error.value)


def no_torch_folder(folder: Path) -> str:
    return str(folder)


def torch_without_headers(folder: Path) -> str:
    return str(fake_torch(folder, "2.13.0", headers=False))


@pytest.mark.parametrize("make", [no_torch_folder, torch_without_headers])
def test_a_named_folder_that_is_no_torch_is_not_passed_over(
    setup_py: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[Path], str],
) -> None:
    monkeypatch.setenv("FASTZOO_TORCH", make(tmp_path))
    with pytest.raises(SystemExit, match="FASTZOO_NATIVE=0") as error:
        setup_py["find_torch"]()
    assert str(tmp_path) in str(error.value)


def test_torch_of_the_target_environment_is_found_where_it_cannot_be_imported(
    setup_py: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    paths = {"purelib": str(tmp_path), "platlib": str(tmp_path)}
    monkeypatch.setattr(sysconfig, "get_paths", lambda: paths)
    with pytest.raises(SystemExit, match="no torch found to build against"):
        setup_py["find_torch"]()
    torch = fake_torch(tmp_path, "2.12.1")
    assert setup_py["find_torch"]() == torch


def test_cuda_follows_the_toolkit_and_never_a_gpu(
    setup_py: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_nvcc = setup_py["find_nvcc"]
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_nvcc() is None
    monkeypatch.setenv("FASTZOO_CUDA", "1")
    with pytest.raises(SystemExit, match="nvcc is neither in CUDA_HOME nor on PATH"):
        find_nvcc()
    nvcc = tmp_path / "home" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert find_nvcc() == str(nvcc)
    monkeypatch.setenv("FASTZOO_CUDA", "auto")
    assert find_nvcc() == str(nvcc)
    monkeypatch.setenv("FASTZOO_CUDA", "0")
    assert find_nvcc() is None
    monkeypatch.setenv("FASTZOO_CUDA", "yes")
    with pytest.raises(SystemExit, match="expected auto, 0 or 1"):
        find_nvcc()
