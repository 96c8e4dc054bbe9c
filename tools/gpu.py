"""Build, prove and measure fastzoo on a machine with an NVIDIA GPU: ``make gpu``.

    python tools/gpu.py [build] [test] [bench] [sanitize] [--fresh]

Without a stage, all of them in this order. A stage is made of steps; a step that has passed is not
repeated while the sources stay as they are, so a run that was cut off is resumed by the same
command. A stage stops after 8 minutes. Nothing is fetched: wheels that the machine lacks are taken
from the folder .wheels/. Results lie in $OUT (default build/gpu/out), at most 8 files.

docs/gpu.md has the details.
"""

import argparse
import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
STATE = ROOT / "build" / "gpu"
RESULTS = ROOT / "benchmarks" / "results"
STAGE_SECONDS = 8 * 60
LEAST_SECONDS = 20  # for a step to be worth starting
SOURCES = (
    *("CMakeLists.txt", "setup.py", "pyproject.toml"),
    *("csrc", "kernels", "fastzoo", "tests", "benchmarks"),
)
# What the stages import or run, by the name of the distribution, and the least version.
NEEDED = {
    "cmake": "3.25",
    "ninja": "1",
    "numpy": "1",
    "packaging": "20",
    "pybind11": "2.13",
    "pytest": "7",
    "pytest-benchmark": "4",
    "setuptools": "77",
    "torch": "2.10",
    "triton": "3.6",
}

# What the benchmarks measure, a step each.
MEASURED = (
    "nms",
    "batched_nms",
    "multiclass_nms",
    "nms_rotated",
    "soft_nms",
    "matrix_nms",
    "peak_nms",
    "box_iou",
    "complete_box_iou_loss",
    "vq_nearest",
    "vq_quantize",
    "VectorQuantize",
    "vq_statistics",
    "kmeans",
    "margin_softmax_loss",
    "clip_loss",
    "knn_points",
    "ball_query",
    "sample_farthest_points",
    "voxel_grid",
    "kernel_density",
    "pointconv",
    "neighbour_reduce",
    "PointConv",
    "EdgeConv",
    "coupling",
    "rational_quadratic_spline",
    "SplineFlow",
    "autoregressive_inverse",
    "MAF",
    "ode_step",
    "counter_bits",
    "counter_normal",
    "guidance_factor",
    "step_error",
    "scheduler_step",
    "guided_step",
    "sample",
    "odeint",
    "denoising_step",
)

SHOW_INFO = """
import sys, fastzoo
info = fastzoo.info()
print(info)
sys.exit(info.operators["nms"]["cuda"])  # the reason why not, and status 1
"""

# Small inputs: compute-sanitizer slows a kernel down by a factor of 10 to 100.
SANITIZED = """
import sys, torch, fastzoo
boxes = torch.rand(700, 4, device="cuda").cumsum(1)
scores = torch.rand(700, device="cuda")
x, codebook = torch.randn(300, 33, device="cuda"), torch.randn(500, 33, device="cuda")
labels = torch.randint(500, (300,), device="cuda")
arcface = {"margin": fastzoo.ops.ArcFace(0.5), "scale": 8.0}
leaves = x.clone().requires_grad_(), codebook.clone().requires_grad_()
for backend in sys.argv[1:]:
    kept = fastzoo.ops.nms(boxes, scores, 0.5, backend=backend)
    assert torch.equal(kept.cpu(), fastzoo.reference.nms(boxes.cpu(), scores.cpu(), 0.5))
    ids = torch.arange(700, device="cuda") % 3
    given = {"score_threshold": 0.2, "iou_threshold": 0.5}
    fastzoo.ops.batched_nms(boxes, scores, ids, 0.5, backend=backend)
    fastzoo.ops.multiclass_nms(boxes[None], scores[None, :, None], **given, backend=backend)
    fastzoo.ops.complete_box_iou(boxes, boxes[:100], backend=backend)
    if backend == "cuda":
        fastzoo.ops.nms_match(boxes, scores, 0.5, backend=backend)
        fastzoo.ops.soft_nms(boxes, scores, max_detections=50, backend=backend)
        fastzoo.ops.matrix_nms(boxes, scores, backend=backend)
    found = fastzoo.ops.vq_nearest(x, codebook, backend=backend)
    assert torch.equal(found.cpu(), fastzoo.reference.vq_nearest(x.cpu(), codebook.cpu()))
    for loss, right in (
        (
            fastzoo.ops.margin_softmax_loss(*leaves, labels, **arcface, backend=backend),
            fastzoo.reference.margin_softmax_loss(x, codebook, labels, **arcface),
        ),
        (
            fastzoo.ops.clip_loss(leaves[0], leaves[1][:300], 0.1, backend=backend),
            fastzoo.reference.clip_loss(x, codebook[:300], 0.1),
        ),
    ):
        torch.testing.assert_close(loss, right, rtol=1e-4, atol=0)
        loss.backward()
    print("ran", backend)
torch.cuda.synchronize()
"""


class Skipped(Exception):
    """A step that this machine cannot run, and why."""


Line = Callable[[str], None]
Run = Callable[[Line, float], None]


@dataclasses.dataclass(frozen=True)
class Step:
    """``run(line, seconds)`` shows lines, and raises Skipped, or RuntimeError where it fails."""

    name: str
    run: Run


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="tools/gpu.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"all, or of {[*STAGES]}")
    parser.add_argument("--fresh", action="store_true", help="repeat what has passed before")
    arguments = parser.parse_args(argv)
    chosen = [s for s in STAGES if s in arguments.stages] if arguments.stages else [*STAGES]
    unknown = set(arguments.stages) - {*STAGES, "all"}
    if unknown:
        parser.error(f"unknown stage {', '.join(sorted(unknown))}: expected all or {[*STAGES]}")
    if "all" in arguments.stages:
        chosen = [*STAGES]
    reason = missing()
    if reason is not None:
        print(f"tools/gpu.py: {reason}", file=sys.stderr)
        return 2
    if arguments.fresh:
        shutil.rmtree(STATE, ignore_errors=True)
    status = 0
    for stage in chosen:
        try:
            passed = run_stage(stage)
        finally:
            collect()
        if not passed:
            status = 1
            # Later stages need the build; a failed test does not make the measurements useless.
            if stage == "build":
                break
    return status


def missing() -> str | None:
    """What this machine lacks, in words, or None."""
    if importlib.util.find_spec("torch") is None:
        return f"{sys.executable} has no torch: run it with the Python that has"
    import torch

    if not torch.cuda.is_available():
        cuda = torch.version.cuda
        built = f"is built for CUDA {cuda} and sees no GPU" if cuda else "is built without CUDA"
        return (
            f"no GPU: torch {torch.__version__} {built}. "
            "`make test` runs the same kernels' logic without one (emulator and interpreter)."
        )
    return None


# ---- running stages ------------------------------------------------------------------------------


def run_stage(stage: str) -> bool:
    """Run the steps that have not passed; whether all have now."""
    STATE.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + STAGE_SECONDS
    fingerprint = source_fingerprint()
    passed = True
    with open(STATE / f"{stage}.log", "a") as log:

        def line(text: str) -> None:
            print(text, flush=True)
            print(text, file=log, flush=True)

        for step in STAGES[stage](line):
            marker = STATE / f"{stage}.{step.name}.json"
            before = read_marker(marker)
            if before.get("sources") == fingerprint and before["status"] in ("passed", "skipped"):
                line(f"== {stage} {step.name}: {before['status']} before")
                continue
            started = time.monotonic()
            if deadline - started < LEAST_SECONDS:
                line(f"== {stage} {step.name}: not begun; run {stage} again to resume")
                return False
            line(f"== {stage} {step.name}")
            record = {"status": "passed", "reason": None, "sources": fingerprint}
            try:
                step.run(line, deadline - started)
            except Skipped as reason:
                record.update(status="skipped", reason=str(reason))
            except RuntimeError as error:
                record.update(status="failed", reason=str(error))
                passed = False
            record["seconds"] = round(time.monotonic() - started, 1)
            marker.write_text(json.dumps(record) + "\n")
            line(f"== {stage} {step.name}: {record['status']} {record['reason'] or ''}".rstrip())
            if not passed and stage == "build":
                break
    return passed


def read_marker(marker: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads(marker.read_text())
    except (OSError, ValueError):  # not there, or cut off while it was written
        return {}
    return record


def source_fingerprint() -> str:
    """What a step's result holds for: these sources, built for this Python and torch."""
    torch_version = importlib.metadata.version("torch")
    digest = hashlib.sha256(f"{sys.executable}\0{torch_version}\0".encode())
    for name in SOURCES:
        top = ROOT / name
        for path in sorted(top.rglob("*")) if top.is_dir() else [top]:
            if path.suffix in (".py", ".h", ".cpp", ".cu", ".txt", ".toml") and path.is_file():
                digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def command(*words: str, **variables: str) -> Run:
    """A step that runs a command and shows its output as it comes."""

    def run(line: Line, seconds: float) -> None:
        status, said = execute(words, line, seconds, variables)
        if status != 0:
            raise RuntimeError(f"exited {status}: {said[-1] if said else 'no output'}")

    return run


def execute(
    words: tuple[str, ...],
    line: Line,
    seconds: float,
    variables: dict[str, str],
) -> tuple[int, list[str]]:
    line(f"$ {' '.join(f'{k}={v}' for k, v in variables.items())} {' '.join(words)}"[:400])
    process = subprocess.Popen(
        words,
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    timed_out = threading.Event()

    def stop() -> None:
        timed_out.set()
        os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(seconds, stop)
    timer.start()
    said = []
    try:
        assert process.stdout is not None
        for text in process.stdout:
            said.append(text.rstrip("\n"))
            line(said[-1])
        status = process.wait()
    finally:
        timer.cancel()
    if timed_out.is_set():
        raise RuntimeError("stopped at the end of the stage's 8 minutes; run it again to resume")
    return status, said


# ---- the stages ----------------------------------------------------------------------------------


def build_steps(line: Line) -> Iterator[Step]:
    carried = sorted((ROOT / ".wheels").glob("*.whl"))
    if carried:
        install = (sys.executable, "-m", "pip", "install", "--no-index", "--no-deps")
        yield Step("wheels", command(*install, *map(str, carried)))
    yield Step("tools", check_tools)
    import torch

    major, minor = torch.cuda.get_device_capability()
    # The architecture-specific code of Hopper is not in plain sm_90.
    architecture = "90a" if (major, minor) == (9, 0) else f"{major}{minor}"
    variables = {
        "FASTZOO_CUDA": "1",
        "FASTZOO_CUDA_ARCHS": os.environ.get("FASTZOO_CUDA_ARCHS", architecture),
    }
    pip = (sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps")
    yield Step("install", command(*pip, "-v", "-e", ".", **variables))
    yield Step("info", command(sys.executable, "-c", SHOW_INFO))


def check_tools(line: Line, seconds: float) -> None:
    from packaging.version import Version

    lacking = []
    for name, least in NEEDED.items():
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            # cmake and ninja may be the system's.
            if shutil.which(name) is None:
                lacking.append(f"{name}>={least}")
            continue
        line(f"{name} {found}")
        if Version(found) < Version(least):
            lacking.append(f"{name}>={least} (here {found})")
    if shutil.which("nvcc") is None and "CUDA_HOME" not in os.environ:
        lacking.append("nvcc (on PATH or in CUDA_HOME)")
    if lacking:
        raise RuntimeError(
            f"missing here: {', '.join(lacking)}. Python packages can be carried: see "
            "docs/gpu.md on .wheels/"
        )


def test_steps(line: Line) -> Iterator[Step]:
    for path in sorted((ROOT / "tests" / "ops").glob("test_*.py")):
        report = STATE / f"junit.{path.stem}.xml"
        pytest = (sys.executable, "-m", "pytest", str(path), "-m", "not slow", "-rs")
        yield Step(path.stem, command(*pytest, f"--junitxml={report}"))


def bench_steps(line: Line) -> Iterator[Step]:
    for op in MEASURED:
        yield Step(op, command(sys.executable, "-m", "benchmarks", "--op", op))
    yield Step("machine", command(sys.executable, "-m", "benchmarks", "--machine"))


def sanitize_steps(line: Line) -> Iterator[Step]:
    yield Step("memcheck", sanitizer("memcheck", "cuda", "triton"))
    yield Step("racecheck", sanitizer("racecheck", "cuda"))


def sanitizer(tool: str, *backends: str) -> Run:
    def run(line: Line, seconds: float) -> None:
        home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
        program = shutil.which("compute-sanitizer") or shutil.which(f"{home}/bin/compute-sanitizer")
        if program is None:
            raise Skipped("compute-sanitizer is neither on PATH nor in CUDA_HOME/bin")
        words = (program, "--tool", tool, sys.executable, "-c", SANITIZED, *backends)
        # torch's allocator would hide an access past the end of a tensor.
        variables = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        status, said = execute(words, line, seconds, variables)
        judge_sanitizer(status, said, backends)

    return run


def judge_sanitizer(status: int, said: list[str], backends: tuple[str, ...]) -> None:
    """Nothing where the tool ran over the kernels and found nothing."""
    summaries = [text for text in said if re.search(r"(ERROR|RACECHECK) SUMMARY: ", text)]
    clean = any(re.search(r"SUMMARY: 0 (errors|hazards)", text) for text in summaries)
    ran = all(f"ran {backend}" in said for backend in backends)
    if summaries and not clean:
        raise RuntimeError(summaries[-1].strip("= "))
    if not ran or not clean:
        told = [text for text in said if "Error" in text or "not supported" in text] or said
        if status == 0 or any("not supported" in text for text in said):
            raise Skipped(f"compute-sanitizer cannot run here: {told[-1] if told else 'no output'}")
        raise RuntimeError(f"exited {status}: {told[-1] if told else 'no output'}")


STAGES: dict[str, Callable[[Line], Iterator[Step]]] = {
    "build": build_steps,
    "test": test_steps,
    "bench": bench_steps,
    "sanitize": sanitize_steps,
}


# ---- what comes home -----------------------------------------------------------------------------


def collect() -> None:
    """At most 8 files in $OUT: results, one junit file, a log a stage, a summary."""
    out = Path(os.environ.get("OUT") or STATE / "out")
    out.mkdir(parents=True, exist_ok=True)
    for stage in STAGES:
        log = STATE / f"{stage}.log"
        if log.exists():
            shutil.copy(log, out / log.name)
    suites = ElementTree.Element("testsuites")
    for report in sorted(STATE.glob("junit.*.xml")):
        try:
            suites.extend(ElementTree.parse(report).getroot())
        except ElementTree.ParseError:  # cut off while it was written
            continue
    if len(suites):
        ElementTree.ElementTree(suites).write(out / "junit.xml", encoding="unicode")
    import torch

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    for result in sorted(RESULTS.glob("*.json")):
        if name and json.loads(result.read_text()).get("machine", {}).get("device") == name:
            shutil.copy(result, out / result.name)
    steps: dict[str, dict[str, Any]] = {}
    for stage in STAGES:
        for marker in sorted(STATE.glob(f"{stage}.*.json")):
            record = read_marker(marker)
            record.pop("sources", None)
            steps.setdefault(stage, {})[marker.stem.partition(".")[2]] = record
    summary = {
        "machine": {
            "gpu": name,
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
        },
        "sources": source_fingerprint(),
        "steps": steps,
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
