"""The benchmarks refuse wrong answers, and their report is made from results alone."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("matplotlib")

from benchmarks import machine, overhead, report, results
from benchmarks.__main__ import main
from benchmarks.expected import compare, vq_nearest
from benchmarks.implementation import Implementation, Unavailable, require_memory
from benchmarks.peers import PEERS
from benchmarks.rows import Problem, Row, measure_row, select
from fastzoo import reference
from fastzoo.testing import SPECS
from fastzoo.testing.nms import random_boxes
from fastzoo.testing.vq import random_codes

ROOT = Path(__file__).parent.parent
BOXES = {"n": 60}


def _timed(case: str, implementation: str, kind: str, seconds: float) -> dict[str, Any]:
    return {
        "op": "nms",
        "case": case,
        "implementation": implementation,
        "kind": kind,
        "seconds": seconds,
        "peak_bytes": 1 << 20,
        "equal": 1.0,
        "gflops": 0.0,
        "gbps": 2.0,
        "commit": "abc",
    }


def _report(*rows: dict[str, Any], kind: str = "cpu") -> dict[str, Any]:
    described = {
        "device": f"A {kind.upper()}",
        "slug": kind,
        "kind": kind,
        "threads": 2,
        "cpu_capability": "avx2",
        "python": "3.11",
        "torch": "2.13",
        "packages": {"faiss-cpu": "1.0", "torchvision": None},
        "fastzoo": "0.1.0",
        "date": "2026-01-02T03:04:05",
        "commit": "abc",
    }
    return {"machine": described, "rows": list(rows)}


def _row(call: Any, kind: str) -> Row:
    spec = SPECS["nms"]
    problem = Problem(spec, spec.benchmarks[1], BOXES, "cpu")
    return Row(problem, Implementation("planted", {"nms": lambda *args: call}, kind=kind))


def test_a_wrong_answer_gets_no_time() -> None:
    right = reference.nms(*random_boxes(60), 0.5)
    for kind in ("auto", "backend", "peer"):
        assert "seconds" in measure_row(_row(lambda: right, kind), budget=0.01)
        wrong = measure_row(_row(lambda: right[:-5], kind), budget=0.01)
        assert "seconds" not in wrong
        assert "wrong answer" in wrong["error"]
    # A peer may order ties in another way; fastzoo may not.
    assert "error" in measure_row(_row(lambda: right.flip(0), "auto"), budget=0.01)
    assert measure_row(_row(lambda: right.flip(0), "peer"), budget=0.01)["equal"] == 1.0


def test_a_red_check_prints_no_ratio(tmp_path: Path) -> None:
    own = _timed("1 box", "fastzoo cpu", "auto", 1e-3)
    peer = _timed("1 box", "eager", "peer", 2e-3)
    assert results.ratios(_report(own, peer), "nms", "1 box") == {"eager": 2.0}
    red = {key: own[key] for key in ("op", "case", "implementation", "kind", "commit")}
    red["error"] = "wrong answer: 3% of it is right"
    for rows in ((red, peer), (peer,), (own, {**red, "implementation": "eager", "kind": "peer"})):
        assert results.ratios(_report(*rows), "nms", "1 box") == {}
    results.save(tmp_path, _report(red, peer), partial=False)
    report.write(tmp_path, tmp_path / "benchmarks.md")
    text = (tmp_path / "benchmarks.md").read_text()
    assert "2.00x" not in text
    assert "No ratio" in text
    assert red["error"] in text
    assert not (tmp_path / "images").exists()


def test_report_of_several_machines(tmp_path: Path) -> None:
    reason = {"op": "nms", "implementation": "torchvision", "kind": "peer", "commit": "abc"}
    cpu = _report(
        _timed("1 box", "fastzoo cpu", "auto", 1e-6),
        _timed("1 box", "eager", "peer", 5e-6),
        _timed("9 boxes", "fastzoo cpu", "auto", 1e-6),
        _timed("9 boxes", "eager", "peer", 9e-7),
        {**_timed("9 boxes", "OpenCV", "peer", 1e-5), "equal": 0.9999999},
        {**reason, "case": "9 boxes", "reason": "it needs 99 GB"},
    )
    cpu["ceilings"] = {"matmul_float32": 100.0, "matmul_bfloat16": 200.0, "copy": 8.0}
    call = {"op": "nms", "case": "1 box", "public": 7e-6, "bare": 3e-6}
    cpu["overhead"] = {"import": 0.05, "calls": [call]}
    gpu = _report(
        _timed("1 box", "fastzoo cuda", "auto", 1e-6),
        _timed("1 box", "fastzoo triton", "backend", 2e-6),
        kind="cuda",
    )
    for one in (gpu, cpu):
        results.save(tmp_path, one, partial=False)
    report.write(tmp_path, tmp_path / "benchmarks.md")
    text = (tmp_path / "benchmarks.md").read_text()
    assert text.index("## A CPU") < text.index("## A CUDA")
    assert "Smallest ratio: **0.90x** (9 boxes, eager)." in text
    assert "| 9 boxes | 1.00 µs | 0.90 µs (0.90x) | 10.0 µs (10.0x) | **0.90x** |" in text
    assert "| 1 box | - | 2.00 | 25.0% |" in text  # 2 GB/s of a copy's 8
    assert "99.999%" in text  # a miss is not rounded away
    assert "- torchvision at 9 boxes: it needs 99 GB" in text
    assert "| nms | 1 box | 3.00 µs | 7.00 µs | 4.00 µs |" in text
    assert "takes 50.0 ms beyond" in text
    assert "| 1 box | 1.00 µs | 2.00 µs | - |" in text  # another backend has no ratio
    assert (tmp_path / "images" / "benchmarks-cpu-nms.png").stat().st_size > 1000


def test_summary_of_the_readme_starts_with_the_smallest_ratio(tmp_path: Path) -> None:
    own = [_timed(case, "fastzoo", "auto", 1.0) for case in ("a", "b")]
    peers = [_timed("a", "peer", "peer", 9.0), _timed("b", "peer", "peer", 4.0)]
    results.save(tmp_path, _report(*own, *peers), partial=False)
    readme = tmp_path / "README.md"
    marks = report._SUMMARY_BEGIN, report._SUMMARY_END
    readme.write_text(f"before\n{marks[0]}\nold\n{marks[1]}\nafter\n")
    for _ in range(2):  # writing again changes nothing
        report.write_summary(tmp_path, readme)
        text = readme.read_text()
        assert text.index("4.00x") < text.index("9.00x")
        assert text.startswith(f"before\n{marks[0]}")
        assert text.endswith(f"{marks[1]}\nafter\n")
        assert "old" not in text


def test_partial_results_are_merged_on_one_machine_only(tmp_path: Path) -> None:
    first, second = (_timed(case, "fastzoo cpu", "auto", 1.0) for case in ("1 box", "9 boxes"))
    path = results.save(tmp_path, {**_report(first, second), "ceilings": {}}, partial=False)
    again = results.save(tmp_path, _report({**second, "seconds": 2.0}), partial=True)
    merged = results.load(again)
    assert [row["seconds"] for row in merged["rows"]] == [1.0, 2.0]
    assert "ceilings" in merged
    other = _report(second)
    other["machine"]["threads"] = 3
    results.save(tmp_path, other, partial=True)
    assert len(results.load(path)["rows"]) == 1


def test_fast_oracle_is_the_definition() -> None:
    x, codebook = random_codes(200, 70, 9, seed=1)
    tied = codebook[torch.arange(70) % 5]
    near = codebook[:1] + codebook * 2**-24
    broken = codebook.clone()
    broken[3, 2], broken[4, 1] = torch.nan, torch.inf
    for codes in (codebook, tied, near, broken, codebook + 1000):
        for rows in (x, x + 1000, (x * 2).round()):
            assert torch.equal(vq_nearest(rows, codes), reference.vq_nearest(rows, codes))


def test_shares() -> None:
    right = torch.tensor([1, 2, 3, 4])
    assert compare("vq_nearest", [[1], [2], [3], [5]], right) == (False, 0.75)
    assert compare("vq_nearest", [1, 2, 3], right) == (False, 0.0)
    assert compare("vq_nearest", right.int(), right) == (True, 1.0)
    assert compare("nms", [4, 3, 2], right) == (False, 0.75)


def test_every_peer_answers_or_says_why() -> None:
    # Without the two that compile for a while.
    names = {peer.name for peer in PEERS} - {"scalar loop", "torch.compile"}
    shapes = {"nms": BOXES, "vq_nearest": {"n": 20, "k": 30, "dim": 4}}
    for op, shape in shapes.items():
        for row in select(op, device="cpu", shape=shape, peers=names):
            record = measure_row(row, budget=0.001)
            assert "error" not in record, record
            assert record.get("equal") == 1.0 or record["reason"], record


def test_failures_become_reasons_and_errors() -> None:
    def refuse() -> torch.Tensor:
        raise Unavailable("no such thing")

    def fail() -> torch.Tensor:
        raise RuntimeError("broken\nover two lines")

    assert measure_row(_row(refuse, "peer"))["reason"] == "no such thing"
    assert measure_row(_row(fail, "peer"))["error"] == "RuntimeError: broken"
    with pytest.raises(Unavailable, match=r"needs 9000\.0 GB"):
        require_memory(9e12, torch.device("cpu"))


def test_selection() -> None:
    assert {row.problem.name for row in select("nms", device="cpu", case="1 box")} == {"1 box"}
    assert {row.problem.name for row in select(device="cpu", shape=BOXES)} == {"n = 60"}
    with pytest.raises(ValueError, match="unknown peer 'rival'"):
        select("nms", device="cpu", peers=["rival"])
    with pytest.raises(ValueError, match="unknown operator"):
        select("nmz", device="cpu")


def test_slug(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {
        "NVIDIA H200": "h200",
        "AMD EPYC 9R14 96-Core Processor": "amd-epyc-9r14",
        "Intel(R) Xeon(R) CPU @ 2.20GHz": "intel-xeon",
    }
    for name, slug in names.items():
        monkeypatch.setattr(machine.selftest, "device_name", lambda device, name=name: name)
        assert machine.slug("cuda") == slug
        assert machine.slug("cpu") == f"{slug}-{torch.get_num_threads()}-threads"


def test_overhead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overhead, "_ROUNDS", 1)
    monkeypatch.setattr(overhead, "_CALLS", 10)
    found = overhead.call_overhead(SPECS["nms"], "cpu")
    assert found["public"] > 0 < found["bare"]


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = ["--op", "nms", "--case", "1 box", "--peers", "eager", "--budget", "0.05"]
    assert main([*chosen, "--device", "cpu", "--output", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*.json")
    written = json.loads(path.read_text())
    assert {row["case"] for row in written["rows"]} == {"1 box"}
    assert written["machine"]["torch"] == torch.__version__
    assert "### nms" in (tmp_path / "benchmarks.md").read_text()
    (tmp_path / "benchmarks.md").unlink()
    assert main(["--report-only", "--output", str(tmp_path)]) == 0
    assert (tmp_path / "benchmarks.md").exists()
    shape = ["--op", "nms", "--shape", "n=7", "--peers", "eager", "--device", "cpu"]
    assert main([*shape, "--budget", "0.01", "--output", str(tmp_path / "none")]) == 0
    assert not (tmp_path / "none").exists()
    assert "n = 7" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--shape", "width=3"])


def test_pytest_collects_and_runs_rows() -> None:
    pytest.importorskip("pytest_benchmark")
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-disable"]
    run = subprocess.run(
        [*command, "-k", "1 and box and eager or vq and 1024 and faiss"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "passed" in run.stdout
