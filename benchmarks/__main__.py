"""``python -m benchmarks``: measure, write the results of this machine and the report of all."""

import argparse
import importlib.util
import itertools
import sys
from collections.abc import Iterable
from pathlib import Path

from benchmarks import machine, memory, overhead, report, results
from benchmarks.results import Record
from benchmarks.rows import Row, measure_case, select
from benchmarks.workloads import MEASURED
from fastzoo.testing import SPECS
from fastzoo.testing.selftest import default_device

_ROOT = Path(__file__).parent.parent


def _progress(cases: list[list[Row]]) -> Iterable[list[Row]]:
    """A progress bar where rich is installed; the lines alone elsewhere."""
    if importlib.util.find_spec("rich") is None:
        return cases
    from rich.progress import track

    return track(cases, description="measuring")


def _line(record: Record) -> str:
    head = f"{record['op']:19} {record['case']:32} {record['implementation']:20}"
    if "seconds" not in record:
        return f"{head} {record.get('reason') or 'ERROR ' + record['error']}"
    share = "" if record["equal"] == 1 else f", {report.share_text(record['equal'])} right"
    if "deviation" in record:
        share = f", error {record['deviation']:.0e}"
    if "operators" in record:
        share += f", {record['operators']:,} operators"
    memory = report.memory_text(record["peak_bytes"])
    return f"{head} {report.time_text(record['seconds']):>9}, {memory}{share}"


def main(argv: list[str] | None = None) -> int:
    """0 if every answer of fastzoo was right."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--op", choices=MEASURED, help="one operator (default: all)")
    parser.add_argument("--case", default="", help="only cases whose name contains this")
    parser.add_argument("--peers", nargs="+", metavar="NAME", help="only these peers")
    parser.add_argument("--device", default=default_device(), choices=("cpu", "cuda"))
    parser.add_argument("--budget", type=float, default=1.0, help="seconds a row (default 1)")
    parser.add_argument(
        "--shape",
        nargs="+",
        metavar="NAME=SIZE",
        help="measure these sizes instead, e.g. n=4096 k=512 dim=32; prints, writes nothing",
    )
    parser.add_argument(
        "--machine",
        action="store_true",
        help="no case: only what torch reaches on this machine, and fastzoo's overheads",
    )
    parser.add_argument(
        "--output", type=Path, help="folder of results and report (default: this repository's)"
    )
    parser.add_argument(
        "--report-only", action="store_true", help="write the report from the results there are"
    )
    arguments = parser.parse_args(argv)
    folder = arguments.output or _ROOT / "benchmarks" / "results"
    target = (arguments.output or _ROOT / "docs") / "benchmarks.md"
    if arguments.report_only:
        return _write_report(folder, target)
    try:
        shape = {name: int(size) for name, size in (s.split("=") for s in arguments.shape or [])}
        rows = select(
            arguments.op,
            device=arguments.device,
            case=arguments.case,
            shape=shape,
            peers=arguments.peers,
        )
    except ValueError as error:
        parser.error(str(error))
    if arguments.machine:
        rows = []
    elif not rows:
        parser.error("no case has this name and takes these sizes")

    records = []
    by_case = [list(group) for _, group in itertools.groupby(rows, key=lambda row: row.problem)]
    for case_rows in _progress(by_case):
        for record in measure_case(case_rows, budget=arguments.budget):
            records.append(record)
            print(_line(record), flush=True)
    measured: Record = {"machine": machine.describe(arguments.device), "rows": records}
    for op in dict.fromkeys(record["op"] for record in records):
        print(f"{op}: {report.smallest_ratio(measured, op)}")
    if not shape:
        part = arguments.case or arguments.peers or arguments.machine
        if not part:
            measured["memory"] = {
                curve.op: memory.measure(curve, arguments.device)
                for curve in memory.CURVES
                if arguments.op in (None, curve.op)
            }
        if arguments.machine or not (part or arguments.op):
            measured.update(_of_the_machine(arguments.device, arguments.budget))
        path = results.save(folder, measured, partial=bool(part or arguments.op))
        print(f"wrote {path}")
        _write_report(folder, target)
    return int(any("error" in record and record["kind"] != "peer" for record in records))


def _of_the_machine(device: str, budget: float) -> Record:
    """What does not belong to a row."""
    return {
        "ceilings": machine.ceilings(device, budget=budget),
        "overhead": {
            "import": overhead.import_seconds(),
            "calls": [
                overhead.call_overhead(spec, device) for spec in SPECS.values() if spec.benchmarks
            ],
        },
    }


def _write_report(folder: Path, target: Path) -> int:
    if importlib.util.find_spec("matplotlib") is None:
        print(f"{target} is not written: matplotlib is not installed (--report-only writes it)")
        return 0
    report.write(folder, target)
    print(f"wrote {target}")
    if target.parent == _ROOT / "docs":
        report.write_summary(folder, _ROOT / "README.md")
        report.write_samplers(folder, target.parent / "samplers" / "index.md")
        print("wrote the tables of README.md and docs/samplers/index.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
