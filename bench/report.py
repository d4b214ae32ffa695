"""From measurements to tables and pictures.

A row is one measurement: a contender in one repeat of a case. The time of a contender is the
median over its repeats; a ratio is taken repeat by repeat, between contenders that ran side by
side, and then its median.
"""
from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any

from cases import SHOWN, Case
from contenders import FUNCTION, LIMIT, LITERAL, OUT, STEP
from shapes import MODELS
from targets import FUSED, TARGETS, Target

Row = dict[str, Any]
Key = tuple[str, str, str, int]     # job, workload, dtype, threads

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"


def rows_of(benchmark: dict[str, Any]) -> list[Row]:
    """Reduce pytest-benchmark's JSON to one row a measurement, without its rounds.

    Parameters
    ----------
    benchmark : dict
        As ``--benchmark-json`` writes it, with the `extra_info` that the suites give.

    Returns
    -------
    list of dict
        The case, ``"contender"``, ``"repeat"``, ``"n_bytes"`` and ``"us"``, the median time of
        one step in microseconds.
    """
    rows = []
    for result in benchmark["benchmarks"]:
        row = dict(result["extra_info"])
        calls = row.pop("calls")
        row["us"] = float(f"{result['stats']['median'] / calls * 1e6:.5g}")
        rows.append(row)
    return rows


def to_json(summary: dict[str, Any]) -> str:
    """Return a summary as JSON with a line for each measurement, so that differences read."""
    head = {key: value for key, value in summary.items() if key != "rows"}
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in summary["rows"])
    text = json.dumps(head, indent=1, ensure_ascii=False).removesuffix("\n}")
    return f'{text},\n "rows": [\n{lines}\n]}}\n'


class Results:
    """The measurements of a suite, by case and contender."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.cases: dict[Key, dict[str, dict[int, float]]] = {}
        self.n_bytes: dict[Key, int] = {}
        for row in rows:
            key = (row["job"], row["workload"], row["dtype"], row["threads"])
            times = self.cases.setdefault(key, {}).setdefault(row["contender"], {})
            times[row["repeat"]] = row["us"]
            self.n_bytes[key] = row["n_bytes"]

    @property
    def most_threads(self) -> int:
        """The widest run's threads."""
        return max(threads for *_, threads in self.cases)

    def time(self, key: Key, name: str) -> float | None:
        """Return the microseconds of a step, or None where it was not measured."""
        times = self.cases.get(key, {}).get(name)
        return median(times.values()) if times else None

    def bandwidth(self, key: Key, name: str) -> float | None:
        """Return the GB/s that a step must move at the least, by its time."""
        us = self.time(key, name)
        return None if us is None else self.n_bytes[key] / us / 1e3

    def speedup(self, key: Key, name: str, over: str) -> float | None:
        """Return how many times as fast `name` is as `over`."""
        case = self.cases.get(key, {})
        if name not in case or over not in case:
            return None
        return median(
            case[over][repeat] / us for repeat, us in case[name].items() if repeat in case[over]
        )

    def judge(self, target: Target) -> tuple[float, str] | None:
        """Return the figure a target is about and the opponent it was closest with."""
        threads = self.most_threads if target.threads == "all" else target.threads
        if target.threads == "all" and threads == 1:
            return None
        key = (target.job, target.workload, "float32", threads)
        figures = [
            (figure, name) for name in target.than
            if (figure := self.speedup(key, target.who, name)) is not None
        ]
        return min(figures, default=None)


# Tables

Column = Callable[[Results, Key, str], str]


def table(head: list[str], rows: Iterable[list[str]]) -> str:
    """Return a Markdown table, its first column to the left and the others to the right."""
    lines = [head, ["---"] + ["--:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def number(value: float | None, *, times: bool = False) -> str:
    """Return three significant digits without an exponent; an en dash for nothing."""
    if value is None:
        return "–"
    digits = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:,.{digits}f}" + ("×" if times else "")


def title(job: str, workload: str) -> str:
    size = workload if workload in MODELS else f"{int(float(workload)):,}"
    return f"{Case(job, workload).label}, {size}"


def case_title(key: Key) -> str:
    job, workload, dtype, threads = key
    return f"{title(job, workload)}, {dtype}, {threads} thread{'s' if threads > 1 else ''}"


def machine_table(machine: dict[str, Any]) -> str:
    return table(["machine", ""], [[key, str(value)] for key, value in machine.items()])


def target_table(results: Results, suite: str) -> str:
    """Return every target of a suite, what was measured, and whether it held."""
    rows = []
    for target in TARGETS:
        if target.suite != suite:
            continue
        judged = results.judge(target)
        threads = target.threads if target.threads == "all" else str(target.threads)
        row = [
            title(target.job, target.workload), threads, target.who, target.opponents,
            number(target.at_least, times=True),
        ]
        if judged is None:
            rows.append([*row, "–", "not measured"])
            continue
        figure, opponent = judged
        against = "" if len(target.than) == 1 else f" ({opponent})"
        verdict = "held" if figure >= target.at_least else "**missed**"
        rows.append([*row, number(figure, times=True) + against, verdict])
    return table(["target", "threads", "who", "against", "at least", "measured", ""], rows)


def ratio_over(over: str) -> Column:
    """Return how many times as fast as `over` each implementation is."""
    return lambda results, key, name: number(results.speedup(key, name, over), times=True)


TIME_COLUMNS: dict[str, Column] = {
    "µs": lambda results, key, name: number(results.time(key, name)),
    "GB/s": lambda results, key, name: number(results.bandwidth(key, name)),
}
COLUMNS: dict[str, dict[str, Column]] = {
    "engine": TIME_COLUMNS | {
        "against NumPy out=": ratio_over(OUT),
        "against NumPy literal": ratio_over(LITERAL),
    },
    "peers": TIME_COLUMNS | {
        "of the limit": lambda results, key, name: number(results.speedup(key, name, LIMIT)),
        "optcore, step() is": lambda results, key, name: number(
            results.speedup(key, STEP, name), times=True
        ),
    },
}


def all_tables(results: Results, suite: str) -> str:
    """Return a table for each case: every implementation, the limit first, then by time."""
    columns = COLUMNS[suite]
    parts = []
    for key, case in results.cases.items():
        names = sorted(case, key=lambda name: (name != LIMIT, results.time(key, name)))
        parts.append(f"**{case_title(key)}**\n")
        parts.append(table(
            ["implementation", *columns],
            [[name, *[cell(results, key, name) for cell in columns.values()]] for name in names],
        ))
    return "\n".join(parts)


def wins_of_peers(results: Results) -> str:
    """Return where something other than optcore is fastest; an empty table is not hidden."""
    rows = []
    for key, case in results.cases.items():
        others = [name for name in case if name != LIMIT and not name.startswith("optcore")]
        figure, name = min(
            ((results.speedup(key, STEP, name), name) for name in others), default=(2.0, "")
        )
        if figure < 1:
            rows.append([case_title(key), name, number(1 / figure, times=True)])
    return table(["case", "fastest", "faster than optcore, step()"], rows) if rows else (
        "Nowhere in this run.\n"
    )


def summary_table(results: Results) -> str:
    """Return the short table: float32, one thread, the best SIMD level."""
    rows = []
    for workload in ("1e6", "5e7"):
        for job in SHOWN:
            key = (job, workload, "float32", 1)
            if key not in results.cases:
                continue
            rows.append([
                title(job, workload),
                *[number(results.time(key, name)) for name in (LITERAL, OUT, FUNCTION, STEP)],
                *[number(results.speedup(key, STEP, name), times=True) for name in (LITERAL, OUT)],
                number(results.bandwidth(key, STEP)),
            ])
    return table(
        [
            "µs per step, one thread", "NumPy as written", "NumPy `out=`", "optcore function",
            "optcore `step()`", "against written", "against `out=`", "GB/s",
        ],
        rows,
    )


def model_table(results: Results) -> str:
    """Return whole models: optcore and PyTorch's fastest, by threads."""
    rows = []
    for key in results.cases:
        if key[1] not in MODELS:
            continue
        rows.append([
            case_title(key), number(results.time(key, STEP)), number(results.time(key, FUSED)),
            number(results.speedup(key, STEP, FUSED), times=True),
            number(results.speedup(key, STEP, LIMIT)),
        ])
    return table(["µs per step", STEP, FUSED, "ratio", "of the limit"], rows)


# Documents

def between_markers(text: str, begin: str, end: str, content: str) -> str:
    """Return a text with everything between two markers replaced.

    Raises
    ------
    ValueError
        Where the markers are not there once each and in their order.
    """
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"markers {begin} and {end} must stand once each, in this order")
    before, rest = text.split(begin)
    after = rest.split(end)[1]
    return f"{before}{begin}\n{content.strip()}\n{end}{after}"


def embed(path: Path, begin: str, end: str, content: str) -> None:
    path.write_text(between_markers(path.read_text(), begin, end, content))


def footnote(summary: dict[str, Any]) -> str:
    machine = summary["machine"]
    return (
        f"*{machine['CPU']}, {machine['cores']} cores, {machine['caches']}; "
        f"NumPy {machine['NumPy']}, optcore {machine['optcore']}; {machine['date']}; "
        "medians, float32.*\n"
    )


def document(summary: dict[str, Any], results: Results) -> str:
    """Return the whole report of a suite."""
    suite = summary["suite"]
    parts = [machine_table(summary["machine"])]
    if suite == "peers":
        versions = ", ".join(f"{name} {version}" for name, version in summary["peers"].items())
        parts.append(f"Peers: {versions}.\n")
        parts += [
            f"Absent: {peer}, for want of {' and '.join(modules)}.\n"
            for peer, modules in summary["absent"].items()
        ]
        if not any(LIMIT in case for case in results.cases.values()):
            parts.append("Absent: the memory limit, for want of a C compiler.\n")
    if summary["quick"]:
        parts.append("A quick run: few sizes and repeats, figures to be taken as hints.\n")
    parts += ["### Targets\n", target_table(results, suite)]
    if suite == "engine":
        parts += ["### In short\n", summary_table(results)]
    else:
        parts += ["### Whole models\n", model_table(results)]
        parts += ["### Where a peer wins\n", wins_of_peers(results)]
    parts += ["### All results\n", all_tables(results, suite)]
    return "\n".join(parts)


def write(
    summary: dict[str, Any], out: Path, readme: Path | None = None, docs: Path | None = None
) -> None:
    """Write the Markdown report and the picture into a folder, and into documents' markers.

    Parameters
    ----------
    summary : dict
        ``"suite"``, ``"quick"``, ``"machine"``, ``"rows"``; of the peers suite also ``"peers"``
        and ``"absent"``.
    out : pathlib.Path
        A folder that exists.
    readme : pathlib.Path, optional
        Where the short table goes, between ``<!-- bench:begin -->`` and ``<!-- bench:end -->``
        for the engine, ``<!-- bench-peers:begin -->`` and ``<!-- bench-peers:end -->`` for peers.
    docs : pathlib.Path, optional
        Where the full report goes, between ``<!-- engine:begin -->`` or ``<!-- peers:begin -->``
        and their ends.
    """
    from figures import engine_figure, roofline_figure

    suite = summary["suite"]
    results = Results(summary["rows"])
    text = document(summary, results)
    (out / f"{suite}.md").write_text(text)
    if suite == "engine":
        engine_figure(results, summary["machine"], out / "engine.png")
        short, begin, end = summary_table(results), BEGIN, END
    else:
        roofline_figure(results, summary["machine"], out / "roofline.png")
        short = model_table(results)
        begin, end = BEGIN.replace("bench", "bench-peers"), END.replace("bench", "bench-peers")
    if readme:
        embed(readme, begin, end, f"{short}\n{footnote(summary)}")
    if docs:
        embed(docs, f"<!-- {suite}:begin -->", f"<!-- {suite}:end -->", text)
    print(text.split("### All results")[0])
