"""tools/gpu.py without a GPU: order, resumption, limits, reasons and what comes home."""

import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from benchmarks.workloads import MEASURED
from fastzoo import _native
from tests.conftest import DEVICE, ROOT

TOOL = ROOT / "tools" / "gpu.py"


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The tool, with its state in a folder of the test, on a machine that lacks nothing."""
    spec = importlib.util.spec_from_file_location("gpu_tool", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # where dataclasses looks it up
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "STATE", tmp_path / "state")
    monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(module, "missing", lambda: None)
    monkeypatch.setattr(module, "source_fingerprint", lambda: "sources")
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    return module


class Script:
    """Stages whose steps note that they ran, and fail or skip when told to."""

    def __init__(self, gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ran: list[str] = []
        self.failing: set[str] = set()
        self.skipping: set[str] = set()
        self.gpu = gpu
        for stage in gpu.STAGES:
            monkeypatch.setitem(gpu.STAGES, stage, self.stage(stage))

    def stage(self, stage: str) -> Callable[..., Iterator[object]]:
        def steps(line: Callable[[str], None]) -> Iterator[object]:
            for name in ("one", "two"):
                yield self.gpu.Step(name, self.step(f"{stage}.{name}"))

        return steps

    def step(self, name: str) -> Callable[..., None]:
        def run(line: Callable[[str], None], seconds: float) -> None:
            self.ran.append(name)
            line(f"this is {name}")
            if name in self.failing:
                raise RuntimeError(f"{name} broke")
            if name in self.skipping:
                raise self.gpu.Skipped(f"{name} is not for this machine")

        return run

    def run(self, *arguments: str) -> int:
        self.ran.clear()
        status: int = self.gpu.main([*arguments])
        return status


@pytest.fixture
def script(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Script:
    return Script(gpu, monkeypatch)


STAGES = ("build", "test", "bench", "sanitize")
EVERYTHING = [f"{stage}.{step}" for stage in STAGES for step in ("one", "two")]


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_does_nothing() -> None:
    existed = (ROOT / "build" / "gpu").exists()
    done = subprocess.run([sys.executable, str(TOOL)], capture_output=True, text=True, cwd="/")
    assert done.returncode == 2
    assert f"no GPU: torch {torch.__version__}" in done.stderr
    assert "make test" in done.stderr
    assert (ROOT / "build" / "gpu").exists() == existed


def test_stages_run_in_order_whatever_order_is_asked(script: Script) -> None:
    assert script.run() == 0
    assert script.ran == EVERYTHING
    assert script.run("--fresh", "all") == 0
    assert script.ran == EVERYTHING
    assert script.run("--fresh", "bench", "test") == 0
    assert script.ran == ["test.one", "test.two", "bench.one", "bench.two"]


def test_everything_that_has_cases_is_measured(gpu: ModuleType) -> None:
    assert set(gpu.MEASURED) == set(MEASURED)
    assert [step.name for step in gpu.bench_steps(print)] == [*gpu.MEASURED, "machine"]


def test_an_unknown_stage_is_refused(script: Script, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        script.run("tests")
    assert error.value.code == 2
    assert "unknown stage tests" in capsys.readouterr().err
    assert script.ran == []


def test_what_passed_is_not_repeated_until_the_sources_change(
    script: Script, gpu: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    script.failing = {"test.two", "bench.one"}
    assert script.run() == 1
    assert script.ran == EVERYTHING
    script.failing = {"bench.one"}
    assert script.run() == 1
    assert script.ran == ["test.two", "bench.one"]
    monkeypatch.setattr(gpu, "source_fingerprint", lambda: "other sources")
    script.failing = set()
    assert script.run("bench") == 0
    assert script.ran == ["bench.one", "bench.two"]


def test_a_marker_that_was_cut_off_counts_for_nothing(script: Script, gpu: ModuleType) -> None:
    assert script.run("test") == 0
    (gpu.STATE / "test.one.json").write_text('{"status": "pas')
    assert script.run("test") == 0
    assert script.ran == ["test.one"]


def test_nothing_follows_a_build_that_failed(script: Script) -> None:
    script.failing = {"build.one"}
    assert script.run() == 1
    assert script.ran == ["build.one"]


def test_no_step_begins_when_the_time_is_used(
    script: Script, gpu: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "STAGE_SECONDS", 0)
    assert script.run("test") == 1
    assert script.ran == []
    assert "run test again to resume" in (gpu.STATE / "test.log").read_text()


def test_what_comes_home(script: Script, gpu: ModuleType, tmp_path: Path) -> None:
    script.skipping = {"sanitize.one"}
    script.failing = {"bench.two"}
    gpu.STATE.mkdir()
    for name in ("nms", "vq"):
        suite = f'<testsuites><testsuite name="{name}" tests="3"/></testsuites>'
        (gpu.STATE / f"junit.{name}.xml").write_text(suite)
    (gpu.STATE / "junit.cut.xml").write_text("<testsuites><testsu")
    assert script.run() == 1
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"junit.xml", "summary.json", *(f"{stage}.log" for stage in STAGES)}
    assert len(files) + 1 <= 8  # the results of the benchmarks come as one more
    junit = (tmp_path / "out" / "junit.xml").read_text()
    assert '"nms"' in junit
    assert '"vq"' in junit
    assert "this is build.two" in (tmp_path / "out" / "build.log").read_text()
    steps = json.loads((tmp_path / "out" / "summary.json").read_text())["steps"]
    assert steps["bench"]["two"]["status"] == "failed"
    assert steps["bench"]["two"]["reason"] == "bench.two broke"
    assert steps["sanitize"]["one"]["status"] == "skipped"
    assert steps["sanitize"]["one"]["reason"] == "sanitize.one is not for this machine"
    assert steps["build"]["one"]["status"] == "passed"


def test_a_command_is_stopped_with_its_children_at_the_limit(gpu: ModuleType) -> None:
    lines: list[str] = []
    started = time.monotonic()
    with pytest.raises(RuntimeError, match="run it again to resume"):
        # The shell's child would keep the pipe open if only the shell were stopped.
        gpu.command("sh", "-c", "echo begun; sleep 60; echo never")(lines.append, 1.0)
    assert time.monotonic() - started < 30
    assert lines[1:] == ["begun"]


def test_a_command_that_fails_gives_its_last_line_as_the_reason(gpu: ModuleType) -> None:
    with pytest.raises(RuntimeError, match="exited 7: it broke"):
        gpu.command("sh", "-c", "echo begun; echo it broke >&2; exit 7")(print, 30.0)


def test_lacking_packages_are_named_with_their_versions(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = {"packaging": "1", "pytest": "999", "no-such-package": "1.5"}
    monkeypatch.setattr(gpu, "NEEDED", needed)
    monkeypatch.setenv("CUDA_HOME", "/cuda")
    with pytest.raises(RuntimeError) as error:
        gpu.check_tools(print, 1)
    assert "pytest>=999 (here " in str(error.value)
    assert "no-such-package>=1.5" in str(error.value)
    assert "packaging>" not in str(error.value)
    assert ".wheels/" in str(error.value)


RAN = ["ran cuda", "ran triton"]


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (0, [*RAN, "========= ERROR SUMMARY: 0 errors"]),
        (0, [*RAN, "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"]),
    ],
)
def test_a_clean_sanitizer_run_passes(gpu: ModuleType, status: int, said: list[str]) -> None:
    gpu.judge_sanitizer(status, said, ("cuda", "triton"))


@pytest.mark.parametrize(
    ("status", "said", "skipped", "reason"),
    [
        (1, [*RAN, "========= ERROR SUMMARY: 3 errors"], False, "3 errors"),
        (0, [*RAN, "========= RACECHECK SUMMARY: 2 hazards displayed"], False, "2 hazards"),
        (1, ["AssertionError", "========= ERROR SUMMARY: 0 errors"], False, "AssertionError"),
        (1, ["========= Error: Device not supported", "x"], True, "Device not supported"),
        (0, RAN, True, "cannot run here"),
        (127, [], False, "no output"),
    ],
)
def test_a_sanitizer_run_that_is_not_clean_fails_or_is_skipped_with_its_reason(
    gpu: ModuleType, status: int, said: list[str], skipped: bool, reason: str
) -> None:
    with pytest.raises(gpu.Skipped if skipped else RuntimeError, match=reason):
        gpu.judge_sanitizer(status, said, ("cuda", "triton"))


def test_the_sanitized_script_is_right(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = gpu.SANITIZED
    if DEVICE != "cuda":
        script = script.replace('"cuda"', '"cpu"').replace("torch.cuda.synchronize()", "")
    backends = ("cuda",) if DEVICE == "cuda" or _native.emulator_loaded else ("cpu",)
    monkeypatch.setattr(sys, "argv", ["-c", *backends])
    exec(compile(script, "sanitized", "exec"), {})
    gpu.judge_sanitizer(
        0, [*capsys.readouterr().out.splitlines(), "ERROR SUMMARY: 0 errors"], backends
    )
