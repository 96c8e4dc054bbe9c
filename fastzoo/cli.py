"""``fastzoo`` and ``python -m fastzoo``."""

import argparse
import json
import sys
from pathlib import Path

import fastzoo
from fastzoo import backends


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="fastzoo", description=fastzoo.__doc__)
    parser.add_argument("--version", action="version", version=f"fastzoo {fastzoo.__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="what this build can run here, and why not the rest")

    selftest = commands.add_parser(
        "selftest", help="prove parity and speed of the installed build on this machine"
    )
    selftest.add_argument("op", nargs="?", help="one operator (default: all)")
    selftest.add_argument(
        "--backend", choices=backends.NAMES, help="one backend (default: each that can run here)"
    )
    selftest.add_argument(
        "--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU"
    )
    selftest.add_argument("--bench", action="store_true", help="measure instead of checking")
    selftest.add_argument(
        "--shape",
        nargs="+",
        default=[],
        type=_size,
        metavar="NAME=SIZE",
        help="measure this shape, e.g. n=4096 k=8192 dim=256, or n=20000",
    )
    selftest.add_argument("--json", type=Path, help="also write the records to this file")

    arguments = parser.parse_args(argv)
    if arguments.command == "info":
        print(fastzoo.info())
    else:
        sys.exit(_selftest(arguments))


def _size(text: str) -> tuple[str, int]:
    name, _, size = text.partition("=")
    if not name.isidentifier() or not size.isdecimal():
        raise argparse.ArgumentTypeError(f"expected NAME=SIZE, e.g. n=4096, got {text!r}")
    return name, int(size)


def _selftest(arguments: argparse.Namespace) -> int:
    from fastzoo.testing import selftest

    try:
        specs = selftest.select(arguments.op)
        shape = dict(arguments.shape)
    except ValueError as error:
        print(f"fastzoo selftest: {error}", file=sys.stderr)
        return 2
    device = arguments.device or selftest.default_device()
    records = []
    failed = 0
    try:
        if arguments.bench or shape:
            for record in selftest.run_benchmarks(specs, arguments.backend, device, shape):
                records.append(record)
                failed += "error" in record
                print(_benchmark_line(record), flush=True)
            if not records:
                print(f"fastzoo selftest: no case takes the sizes {list(shape)}", file=sys.stderr)
                return 2
        else:
            for record in selftest.run_checks(specs, arguments.backend, device):
                records.append(record)
                failed += not record["passed"]
                print(_check_line(record), flush=True)
    except RuntimeError as error:
        print(f"fastzoo selftest: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        report = {"machine": selftest.machine(device), "records": records}
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    print(f"{len(records) - failed} passed, {failed} failed")
    return 1 if failed else 0


def _check_line(record: dict[str, object]) -> str:
    mark = "ok  " if record["passed"] else "FAIL"
    line = f"{mark} {record['op']} {record['backend']} {record['check']} ({record['seconds']} s)"
    return line if record["passed"] else f"{line}\n     {record['error']}"


def _benchmark_line(record: dict[str, object]) -> str:
    head = f"{record['op']} [{record['backend']}] {record['case']} {record['shape']}"
    if "error" in record:
        return f"FAIL {head}: {record['error']}"
    if "skipped" in record:
        return f"{head}: not measured, {record['skipped']}"
    same = "equal" if record["equal"] else "not equal"
    return (
        f"{head}: {_milliseconds(record['seconds'])}, eager "
        f"{_milliseconds(record['eager_seconds'])}, {record['speedup']:.1f}x, "
        f"{same} to {record['checked_against']}"
    )


def _milliseconds(seconds: object) -> str:
    assert isinstance(seconds, float)
    return f"{seconds * 1e3:.3f} ms"
