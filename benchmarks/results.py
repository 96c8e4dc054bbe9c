"""The measured records of one machine, in ``results/<machine>.json``."""

import json
from pathlib import Path
from typing import Any

Record = dict[str, Any]

# A machine block that differs in one of these makes another machine.
_SAME = ("device", "threads", "cpu_capability", "torch", "fastzoo", "python", "packages")


def load(path: Path) -> Record:
    report: Record = json.loads(path.read_text())
    return report


def save(folder: Path, report: Record, *, partial: bool) -> Path:
    """Write a report; a partial one replaces its own rows in the file of the same machine.

    The machine block of the file is the newest one, and every row keeps its own commit.
    """
    path = folder / f"{report['machine']['slug']}.json"
    rows = [{**row, "commit": report["machine"]["commit"]} for row in report["rows"]]
    report = {**report, "rows": rows}
    if partial and path.exists():
        before = load(path)
        if all(before["machine"].get(key) == report["machine"].get(key) for key in _SAME):
            report = _merged(before, report)
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    return path


def _key(row: Record) -> tuple[str, str, str]:
    return row["op"], row["case"], row["implementation"]


def _merged(before: Record, after: Record) -> Record:
    rows = {_key(row): row for row in before["rows"]}
    rows.update({_key(row): row for row in after["rows"]})
    merged = {**before, **after, "rows": list(rows.values())}
    if "memory" in before and "memory" in after:
        merged["memory"] = {**before["memory"], **after["memory"]}
    return merged


def cases(report: Record, op: str) -> list[str]:
    return list(dict.fromkeys(row["case"] for row in report["rows"] if row["op"] == op))


def row_of(report: Record, op: str, case: str, implementation: str) -> Record | None:
    key = (op, case, implementation)
    return next((row for row in report["rows"] if _key(row) == key), None)


def default_row(report: Record, op: str, case: str) -> Record | None:
    """What fastzoo runs by default, if it was timed: no time is kept of a wrong answer."""
    for row in report["rows"]:
        if (row["op"], row["case"], row["kind"]) == (op, case, "auto"):
            return row if "seconds" in row else None
    return None


def ratios(report: Record, op: str, case: str) -> dict[str, float]:
    """How many times as long each peer takes, the smallest first; empty without a checked time."""
    own = default_row(report, op, case)
    if own is None:
        return {}
    found = {
        row["implementation"]: row["seconds"] / own["seconds"]
        for row in report["rows"]
        if (row["op"], row["case"], row["kind"]) == (op, case, "peer") and "seconds" in row
    }
    return dict(sorted(found.items(), key=lambda item: item[1]))
