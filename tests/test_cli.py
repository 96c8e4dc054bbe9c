"""``fastzoo`` on the command line: what it prints, writes and exits with."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import fastzoo
from fastzoo.cli import main
from fastzoo.testing.conformance import CHECKS
from tests.conftest import DEVICE, ROOT


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit status, stdout and stderr."""
    try:
        main(list(arguments))
        status = 0
    except SystemExit as exit_:
        status = int(exit_.code or 0)
    said = capsys.readouterr()
    return status, said.out, said.err


def test_info_prints_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "info")
    assert status == 0
    assert out == f"{fastzoo.info()}\n"


def test_module_and_command_are_the_same_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fastzoo", "--version"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0
    assert done.stdout == f"fastzoo {fastzoo.__version__}\n"


def test_selftest_checks_one_operator_on_one_backend(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "report.json"
    status, out, _ = run(capsys, "selftest", "nms", "--backend", "reference", "--json", str(path))
    assert status == 0, out
    assert out.endswith(f"{len(CHECKS)} passed, 0 failed\n")
    report = json.loads(path.read_text())
    assert report["machine"]["fastzoo"] == fastzoo.__version__
    assert report["machine"]["threads"] >= 1
    assert [record["check"] for record in report["records"]] == list(CHECKS)
    assert all(r["passed"] and r["backend"] == "reference" for r in report["records"])


def test_selftest_measures_a_shape(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    status, out, _ = run(
        capsys, "selftest", "nms", "--bench", "--shape", "n=50", "--json", str(path)
    )
    assert status == 0, out
    (record,) = json.loads(path.read_text())["records"]
    assert record["shape"] == {"n": 50}
    assert record["equal"]
    assert record["checked_against"] == "reference"
    assert record["seconds"] > 0
    assert record["speedup"] == pytest.approx(record["eager_seconds"] / record["seconds"])
    assert f"nms [{record['backend']}]" in out


def test_selftest_measures_a_loss_with_its_gradients(capsys: pytest.CaptureFixture[str]) -> None:
    shape = ("--shape", "n=8", "classes=50", "dim=8")
    status, out, _ = run(capsys, "selftest", "margin_softmax_loss", "--bench", *shape)
    assert status == 0, out
    assert "equal to reference" in out


def test_selftest_does_not_measure_what_may_not_fit(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastzoo.testing.selftest.room", lambda device: 100.0)
    status, out, _ = run(capsys, "selftest", "nms", "--bench", "--shape", "n=50")
    assert status == 0, out
    assert "not measured, the eager formula needs" in out


def test_selftest_fails_when_an_answer_is_wrong(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*_: object) -> None:
        raise AssertionError("3 of 9 rows differ")

    monkeypatch.setitem(CHECKS, next(iter(CHECKS)), wrong)
    status, out, _ = run(capsys, "selftest", "nms", "--backend", "reference")
    assert status == 1
    assert "FAIL nms reference" in out
    assert "AssertionError: 3 of 9 rows differ" in out
    assert out.endswith(f"{len(CHECKS) - 1} passed, 1 failed\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sort"], "unknown operator 'sort', expected one of nms, batched_nms"),
        (["nms", "--shape", "n"], "fastzoo selftest: "),
        (["nms", "--shape", "n=many"], "'n=many'"),
        (["nms", "--shape", "rows=4"], "no case takes the sizes ['rows']"),
        (["nms", "--backend", "metal"], "metal"),
    ],
)
def test_selftest_refuses_what_it_cannot_do(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    status, _, err = run(capsys, "selftest", *arguments)
    assert status == 2
    assert message in err


@pytest.mark.skipif(DEVICE == "cuda", reason="here the triton backend runs")
def test_selftest_refuses_a_backend_that_cannot_run() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fastzoo", "selftest", "nms", "--backend", "triton"],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "nms: backend 'triton' cannot run: it runs on cuda tensors, not on cpu" in done.stderr
