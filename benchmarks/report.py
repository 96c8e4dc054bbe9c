"""docs/benchmarks.md: tables and plots of all results; and the table of README.md."""

from collections.abc import Callable
from pathlib import Path

from benchmarks.results import Record, cases, default_row, load, ratios, row_of

_NOTHING = "-"
_SUMMARY_BEGIN = "<!-- measured: written by python -m benchmarks -->"
_SUMMARY_END = "<!-- /measured -->"

_HEAD = """# Benchmarks

Written by `python -m benchmarks` from `benchmarks/results/*.json`; do not edit.

Every row runs in one process, on the same inputs and threads; the rows of a case take turns. An
answer is checked before it is timed. Where it is made of indices, fastzoo's must equal the
definition's bit for bit, lowered scores included, or there is no time and no ratio; of a peer, the
share of right answers is shown, and one below 99 % is not timed. Overlaps must come as near to
their float64 values as rounding explains. A loss is timed forward and backward, together with the
gradients that belong to it, and all of these must come as near; so is a quantiser with the gradient
that a decoder sends back, and a step of a module with the state that it leaves: every call of it
starts from the same state, and copies that in. Of a lookup in fast precision each code must be as
near to the best as its documentation says. A peer's neighbour is right where it is as near as the
right one, or inside the ball, and its voxels may be numbered in another way. Of k-means the inertia
of the centroids, of the same initial ones after the same rounds, must be within a thousandth of
that in float64. A step of a flow ends with its optimizer, whose learning rate is 0: it does the
same work, and every step starts alike. Times are medians; what a user of a peer does once (building
an index, converting boxes, compiling) is not counted; a tree over points is built in every call, as
fastzoo's is. A ratio is a peer's time over fastzoo's: above 1, fastzoo is faster. Memory is the
peak beyond the inputs and the gradients; on a CPU it is seen every 0.2 ms, so a short call shows
none. `floor` is the share of the least possible time: the case's operations (of a loss of scores
four matrix products, the least there is without the logits in memory) at the fastest matrix product
that torch reaches on the machine, or its bytes at the speed of a copy.

Measure your own machine with `make bench`, or `python -m fastzoo selftest --bench` where only the
package is installed.
"""


def write(folder: Path, target: Path) -> None:
    """Regenerate ``target`` and the plots beside it from every report in ``folder``."""
    reports = [load(path) for path in sorted(folder.glob("*.json"))]
    # CPU first: everybody has one.
    reports.sort(key=lambda report: report["machine"]["kind"] != "cpu")
    target.parent.mkdir(parents=True, exist_ok=True)
    sections = [section for report in reports for section in _sections(report, target.parent)]
    target.write_text("\n".join([_HEAD, *sections]))


def write_summary(folder: Path, readme: Path) -> None:
    """Rewrite the table between README's markers: every case, smallest ratio first."""
    parts = []
    for path in sorted(folder.glob("*.json")):
        report = load(path)
        machine = report["machine"]
        found = []
        for op in dict.fromkeys(row["op"] for row in report["rows"]):
            for case in cases(report, op):
                best = next(iter(ratios(report, op, case).items()), None)
                row = default_row(report, op, case)
                if best and row:
                    found.append((best[1], op, case, row["seconds"], best[0]))
        rows = [
            [f"`{op}` {case}", time_text(seconds), peer, f"**{ratio_text(ratio)}**"]
            for ratio, op, case, seconds, peer in sorted(found)
        ]
        table = _table(["case", "fastzoo", "best peer", "its time over fastzoo's"], rows)
        parts.append(
            f"{machine['device']}, {machine['threads']} threads, smallest first:\n\n{table}"
        )
    _write_between_marks(readme, "\n".join(parts))


def _write_between_marks(page: Path, body: str) -> None:
    before, _, rest = page.read_text().partition(_SUMMARY_BEGIN)
    _, _, after = rest.partition(_SUMMARY_END)
    page.write_text(f"{before}{_SUMMARY_BEGIN}\n\n{body}\n{_SUMMARY_END}{after}")


# What a step of sampling takes with a model of some hundred million weights, on a GPU and without.
_MODEL_SECONDS = (0.05, 0.5)


def write_samplers(folder: Path, page: Path) -> None:
    """Rewrite the tables of docs/samplers/index.md: of a scheduler's step also what it saves of a
    step with a model; and whole runs."""
    parts = []
    for path in sorted(folder.glob("*.json")):
        report = load(path)
        steps = [
            [
                case,
                *_beside(own, peer),
                *(f"{_saved(own, peer, model):.2%}" for model in _MODEL_SECONDS),
            ]
            for case, own, peer in _pairs(report, "scheduler_step", "diffusers")
        ]
        runs = [
            [f"`{op}` {case}", *_beside(own, peer)]
            for op, name in (
                ("guided_step", "eager"),
                ("sample", "k-diffusion"),
                ("odeint", "torchdiffeq"),
                ("denoising_step", "diffusers"),
            )
            for case, own, peer in _pairs(report, op, name)
        ]
        if not steps:
            continue
        machine = report["machine"]
        head = ["a step of", "fastzoo", "diffusers", "ratio"]
        head += [f"saved of a step with a model of {time_text(model)}" for model in _MODEL_SECONDS]
        parts.append(
            f"{machine['device']}, {machine['threads']} threads, 8 x 4 x 128 x 128 float32:\n\n"
            f"{_table(head, steps)}\n{_table(['', 'fastzoo', 'peer', 'ratio'], runs)}"
        )
    _write_between_marks(page, "\n".join(parts))


def _pairs(report: Record, op: str, peer: str) -> list[tuple[str, Record, Record]]:
    """Cases with checked times of fastzoo's default and of a peer."""
    found = (
        (case, default_row(report, op, case), row_of(report, op, case, peer))
        for case in cases(report, op)
    )
    return [(case, own, row) for case, own, row in found if own and row and "seconds" in row]


def _beside(own: Record, peer: Record) -> list[str]:
    theirs = time_text(peer["seconds"])
    if peer["op"] != "scheduler_step":
        theirs = f"{theirs} ({peer['implementation']})"
    return [time_text(own["seconds"]), theirs, ratio_text(peer["seconds"] / own["seconds"])]


def _saved(own: Record, peer: Record, model: float) -> float:
    """The share of a step, model and scheduler, that fastzoo takes less."""
    return float((peer["seconds"] - own["seconds"]) / (peer["seconds"] + model))


def _sections(report: Record, folder: Path) -> list[str]:
    machine = report["machine"]
    sections = [f"## {machine['device']}\n\n{_machine_text(report)}\n"]
    for op in dict.fromkeys(row["op"] for row in report["rows"]):
        sections.append(_operator_text(report, op))
        image = Path("images") / f"benchmarks-{machine['slug']}-{op}.png"
        if plot(report, op, folder / image):
            sections.append(f"![{op}: peers' times over fastzoo's]({image.as_posix()})\n")
        curve = report.get("memory", {}).get(op)
        if curve:
            image = Path("images") / f"memory-{machine['slug']}-{op}.png"
            plot_memory(report, op, folder / image)
            sections.append(f"{_curve_text(curve)}\n![{op}: memory]({image.as_posix()})\n")
    if "overhead" in report:
        sections.append(_overhead_text(report))
    return sections


def _machine_text(report: Record) -> str:
    machine = report["machine"]
    versions = {"Python": machine["python"], "torch": machine["torch"], **machine["packages"]}
    listed = ", ".join(f"{name} {value}" for name, value in versions.items() if value)
    commits = dict.fromkeys(row["commit"] or "unknown" for row in report["rows"])
    lines = [
        f"{machine['threads']} threads, CPU kernels on {machine['cpu_capability']}; {listed}; "
        f"{machine['date'][:10]}, fastzoo {machine['fastzoo']} at {', '.join(commits)}."
    ]
    if "ceilings" in report:
        ceilings = report["ceilings"]
        lines.append(
            f"torch's matrix product reaches {ceilings['matmul_float32']:,.0f} GFLOP/s in float32 "
            f"and {ceilings['matmul_bfloat16']:,.0f} in bfloat16, a copy "
            f"{ceilings['copy']:,.0f} GB/s."
        )
    return "\n".join(lines)


def _operator_text(report: Record, op: str) -> str:
    names = _implementations(report, op)
    times = _cells(report, op, names, lambda row: _time_cell(report, row), _best_cell)
    memory = _cells(report, op, names, lambda row: memory_text(row["peak_bytes"]))
    work = _table(
        ["case", "GFLOP/s", "GB/s", "floor"],
        [[case, *_work_cells(report, op, case)] for case in cases(report, op)],
    )
    parts = [
        f"### {op}\n",
        f"{smallest_ratio(report, op)}\n",
        times,
        "Peak memory:\n",
        memory,
        _answers_text(report, op, names),
        *_operators(report, op, names),
        "What fastzoo reaches:\n",
        work,
        *_notes(report, op),
    ]
    return "\n".join(parts)


def _implementations(report: Record, op: str) -> list[str]:
    """fastzoo's default first; only what gave at least one time."""
    kinds = ("auto", "backend", "peer")
    rows = [row for row in report["rows"] if row["op"] == op]
    rows.sort(key=lambda row: kinds.index(row["kind"]))
    timed = {row["implementation"] for row in rows if "seconds" in row}
    return list(dict.fromkeys(r["implementation"] for r in rows if r["implementation"] in timed))


def smallest_ratio(report: Record, op: str) -> str:
    """The sentence that stands first: where fastzoo gains least."""
    found = [
        (ratio, name, case)
        for case in cases(report, op)
        for name, ratio in list(ratios(report, op, case).items())[:1]
    ]
    if not found:
        return "No ratio: there is no checked time of both fastzoo and a peer."
    ratio, name, case = min(found)
    return f"Smallest ratio: **{ratio_text(ratio)}** ({case}, {name})."


def _cells(
    report: Record,
    op: str,
    names: list[str],
    show: Callable[[Record], str],
    last: Callable[[Record, str, str], str] | None = None,
) -> str:
    """A row a case, a column an implementation: ``show`` of what was timed."""
    rows = []
    for case in cases(report, op):
        found = [row_of(report, op, case, name) for name in names]
        cells = [show(row) if row and "seconds" in row else _NOTHING for row in found]
        rows.append([case, *cells, *([last(report, op, case)] if last else [])])
    return _table(["case", *names, *(["best peer / fastzoo"] if last else [])], rows)


def _time_cell(report: Record, row: Record) -> str:
    ratio = ratios(report, row["op"], row["case"]).get(row["implementation"])
    text = time_text(row["seconds"])
    return text if ratio is None else f"{text} ({ratio_text(ratio)})"


def _best_cell(report: Record, op: str, case: str) -> str:
    found = list(ratios(report, op, case).values())
    return f"**{ratio_text(found[0])}**" if found else _NOTHING


def _work_cells(report: Record, op: str, case: str) -> list[str]:
    row = default_row(report, op, case)
    if row is None:
        return [_NOTHING] * 3
    flops = f"{row['gflops']:,.1f}" if row["gflops"] else _NOTHING
    return [flops, f"{row['gbps']:,.2f}", _floor_share(report, row)]


def _floor_share(report: Record, row: Record) -> str:
    if "ceilings" not in report:
        return _NOTHING
    ceilings = report["ceilings"]
    matmul = max(rate for name, rate in ceilings.items() if name.startswith("matmul"))
    return f"{max(row['gflops'] / matmul, row['gbps'] / ceilings['copy']):.1%}"


def _notes(report: Record, op: str) -> list[str]:
    """What an implementation is, where its name does not say it, and why a time is missing."""
    remarks = {
        row["implementation"]: row["note"]
        for row in report["rows"]
        if row["op"] == op and "note" in row and "seconds" in row
    }
    notes = [f"- {name}: {note}" for name, note in remarks.items()]
    notes = ["Of the peers:\n", *notes, ""] if notes else []
    by_reason: dict[tuple[str, str], list[str]] = {}
    for row in report["rows"]:
        why = row.get("reason") or row.get("error")
        if row["op"] == op and why:
            by_reason.setdefault((row["implementation"], why), []).append(row["case"])
    everywhere = len(cases(report, op))
    lines = [
        f"- {name}{'' if len(where) == everywhere else ' at ' + ', '.join(where)}: {why}"
        for (name, why), where in by_reason.items()
    ]
    return notes + (["Not timed:\n", *lines, ""] if lines else [])


def _curve_text(curve: Record) -> str:
    """The table of a memory curve: a row an implementation, a column a size."""
    sizes = list(dict.fromkeys(point["size"] for point in curve["points"]))
    rows = []
    for name in dict.fromkeys(point["implementation"] for point in curve["points"]):
        found = {p["size"]: p for p in curve["points"] if p["implementation"] == name}
        cells = [found.get(size, {}) for size in sizes]
        rows.append(
            [
                name,
                *(
                    memory_text(cell["peak_bytes"]) if "peak_bytes" in cell else _NOTHING
                    for cell in cells
                ),
            ]
        )
    fixed = ", ".join(f"{key} = {value:,}" for key, value in curve["fixed"].items())
    table = _table([curve["size_name"], *(f"{size:,}" for size in sizes)], rows)
    return f"Peak memory beyond inputs and gradients, {fixed}:\n\n{table}"


def _overhead_text(report: Record) -> str:
    overhead = report["overhead"]
    rows = [
        [
            call["op"],
            call["case"],
            time_text(call["bare"]),
            time_text(call["public"]),
            time_text(call["public"] - call["bare"]),
        ]
        for call in overhead["calls"]
    ]
    table = _table(["operator", "case", "native operator", "public function", "difference"], rows)
    return (
        f"### Overhead\n\n`import fastzoo` takes {time_text(overhead['import'])} beyond "
        f"`import torch`.\n\n{table}"
    )


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def time_text(seconds: float) -> str:
    for scale, unit in ((1.0, "s"), (1e3, "ms"), (1e6, "µs")):
        if seconds * scale >= 1 or unit == "µs":
            return f"{_three_digits(seconds * scale)} {unit}"
    raise AssertionError


def _three_digits(value: float) -> str:
    return f"{value:,.{2 if value < 10 else 1 if value < 100 else 0}f}"


def ratio_text(ratio: float) -> str:
    return f"{_three_digits(ratio)}x"


def memory_text(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB" if size >= 1 << 16 else "< 0.1 MiB"


def _operators(report: Record, op: str, names: list[str]) -> list[str]:
    """How many operators a step dispatches, where they were counted."""
    if not any("operators" in row for row in report["rows"] if row["op"] == op):
        return []
    return [
        "Operators dispatched in a step, kernels that torch.compile wrote among them:\n",
        _cells(report, op, names, lambda row: f"{row['operators']:,}"),
    ]


def _answers_text(report: Record, op: str, names: list[str]) -> str:
    timed = [row for row in report["rows"] if row["op"] == op and "seconds" in row]
    if any("deviation" in row for row in timed):
        return "Largest relative error of the results and their gradients:\n\n" + _cells(
            report, op, names, _error_text
        )
    if all(row["equal"] == 1 for row in timed):
        return "Every answer that was timed is right in full.\n"
    return "Right answers:\n\n" + _cells(report, op, names, lambda row: share_text(row["equal"]))


def _error_text(row: Record) -> str:
    """Of a case without gradients, whose answers are right or wrong, the share that is right."""
    return f"{row['deviation']:.0e}" if "deviation" in row else share_text(row["equal"])


def share_text(share: float) -> str:
    # Never round a miss away.
    return "all" if share == 1 else f"{min(share, 0.99999):.3%}"


def plot(report: Record, op: str, path: Path) -> bool:
    """Bars of every peer's ratio, a group a case; False where there is no ratio to show."""
    found = {case: ratios(report, op, case) for case in cases(report, op)}
    found = {case: by_peer for case, by_peer in found.items() if by_peer}
    if not found:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import patches, pyplot

    peers = [n for n in _implementations(report, op) if any(n in row for row in found.values())]
    colours = {name: f"C{number}" for number, name in enumerate(peers)}
    count = sum(len(by_peer) for by_peer in found.values())
    figure, axes = pyplot.subplots(figsize=(9, 0.9 + 0.24 * count + 0.2 * len(found)))
    position, ticks = 0.0, []
    largest = max(ratio for by_peer in found.values() for ratio in by_peer.values())
    for by_peer in found.values():
        first = position
        for name, ratio in by_peer.items():
            axes.barh(position, ratio - 1, left=1, height=0.82, color=colours[name])
            axes.text(max(ratio, 1) * 1.04, position, ratio_text(ratio), va="center", fontsize=8)
            position += 1
        ticks.append((first + position - 1) / 2)
        position += 0.8
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlim(right=max(largest, 1) * 2)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(ticks, list(found))
    axes.invert_yaxis()
    axes.set_xlabel("times as long as fastzoo")
    axes.set_title(f"{op}, {report['machine']['device']}", loc="left")
    handles = [patches.Patch(color=colours[name], label=name) for name in peers]
    axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, bbox_inches="tight", metadata={"Software": None})
    pyplot.close(figure)
    return True


def plot_memory(report: Record, op: str, path: Path) -> None:
    """A line an implementation; where one would need too much memory its line ends."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    curve = report["memory"][op]
    figure, axes = pyplot.subplots(figsize=(7, 4))
    for number, name in enumerate(dict.fromkeys(p["implementation"] for p in curve["points"])):
        points = [p for p in curve["points"] if p["implementation"] == name and "peak_bytes" in p]
        sizes = [point["size"] for point in points]
        # What the sampling does not see is drawn at the least it can.
        extra = [max(point["peak_bytes"], 1 << 16) / 2**20 for point in points]
        colour = "black" if number == 0 else f"C{number - 1}"
        axes.plot(sizes, extra, marker="o", color=colour, label=name)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:,g}")
    sizes = list(dict.fromkeys(point["size"] for point in curve["points"]))
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.minorticks_off()
    axes.set_xlabel(curve["size_name"])
    axes.set_ylabel("MiB beyond inputs and gradients")
    fixed = ", ".join(f"{key} = {value:,}" for key, value in curve["fixed"].items())
    axes.set_title(f"{op}, {fixed}, {report['machine']['device']}", loc="left")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, bbox_inches="tight", metadata={"Software": None})
    pyplot.close(figure)
