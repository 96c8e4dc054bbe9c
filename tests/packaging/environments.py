"""Sources and virtual environments for the tests that build and install."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import Requirement

from tests.conftest import ROOT


def copy_sources(folder: Path) -> Path:
    """What git tracks or would track: the tree of a fresh clone, with this checkout's changes."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in listed.split("\0"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def environment(**changes: str) -> dict[str, str]:
    """This process's variables, less those that steer fastzoo and Python's search for modules."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("FASTZOO_", "PYTHON", "TRITON_")) and name != "VIRTUAL_ENV"
    }
    return {**kept, **changes}


def build(sources: Path, out: Path, *options: str, **changes: str) -> subprocess.CompletedProcess:
    """``python -m build`` with this environment's tools."""
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), *options]
    return subprocess.run(
        command, cwd=sources, env=environment(**changes), capture_output=True, text=True
    )


class Environment:
    """A virtual environment that holds torch and what torch needs, but no triton and no tools.

    torch is linked, not installed: the registry is not asked and nothing large is copied.
    """

    def __init__(self, folder: Path) -> None:
        venv.create(folder, with_pip=False, symlinks=True)
        self.bin = folder / "bin"
        self.python = self.bin / "python"
        self.site = next(folder.glob("lib/python*/site-packages"))
        for name in _needed_by("torch") | _needed_by("numpy"):
            for entry in _top_level(name):
                target = self.site / entry.name
                if not target.exists():
                    target.symlink_to(entry)

    def install(self, what: Path, *options: str, **changes: str) -> subprocess.CompletedProcess:
        pip = [sys.executable, "-m", "pip", "--python", str(self.python), "install"]
        command = [*pip, "--quiet", "--no-deps", "--disable-pip-version-check", *options, str(what)]
        return subprocess.run(
            command, cwd="/", env=environment(**changes), capture_output=True, text=True
        )

    def run(self, *arguments: str) -> str:
        """Run Python outside any checkout, with nothing on PATH but this environment."""
        variables = {"PATH": str(self.bin), "HOME": str(self.bin)}
        done = subprocess.run(
            [str(self.python), *arguments], cwd="/", env=variables, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


def _needed_by(name: str) -> set[str]:
    needed, todo = set(), [name]
    while todo:
        current = re.sub(r"[-_.]+", "-", todo.pop()).lower()
        if current in needed or current == "triton":
            continue
        needed.add(current)
        for line in importlib.metadata.requires(current) or ():
            requirement = Requirement(line)
            marker = requirement.marker
            if marker is None or marker.evaluate({**default_environment(), "extra": ""}):
                todo.append(requirement.name)
    return needed


def _top_level(name: str) -> set[Path]:
    distribution = importlib.metadata.distribution(name)
    first = {file.parts[0] for file in distribution.files or ()}
    return {Path(str(distribution.locate_file(f))) for f in first if f not in ("..", "__pycache__")}
