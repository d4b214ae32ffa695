"""From measurements to tables and pictures.

A row is one measurement: a contender in one repeat of a case, with some of its rounds. A figure
is a sample: of times, those of all its repeats; of ratios, those of every round of one contender
to every round of the other within a repeat, where the two ran side by side.
"""
from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from cases import OUTERS, PIPELINE, ROWS, STORAGES, TOUCHED, WIDTH, Case
from contenders import (
    ALONE,
    FLOWER,
    LIMIT,
    LITERAL,
    NUMPY_ROWS,
    OUT,
    OUTER_STEP,
    OUTER_WEIGHTED,
    ROWS_DENSE,
    ROWS_EXACT,
    ROWS_LAZY,
    ROWS_SMALL,
    STEP,
    WIDE,
)
from peers import IN_ROWS
from peers import OUTERS as PEERS_OUTER
from samples import TWO_MODES, Sample, figure, number, thinned
from shapes import MODELS, TRAININGS
from targets import FAR, FAR_NS, FUSED, RESIDENT_MB, TARGETS, Target

Row = dict[str, Any]
Key = tuple[str, str, str, int]     # job, workload, dtype or storage or replicas or rows, threads

READING = (
    f"Medians with quartiles; {TWO_MODES} where the values fall into two groups with a gap, so "
    "that the median speaks for one of them."
)
# What the README shows: job, workload, threads
SHORT = [
    ("sgd", "1e6", 1), ("momentum", "1e6", 1), ("nesterov", "1e6", 1), ("adam", "1e6", 1),
    ("momentum", "1000 × 256", 1), ("momentum", "ResNet-50", 1), (PIPELINE, "ResNet-50", 1),
    (PIPELINE, "GPT-2 small", "all"), ("adam", "GPT-2 small", "all"),
    ("momentum", "digits net in training", "all"),
]


def rows_of(benchmark: dict[str, Any]) -> list[Row]:
    """Reduce pytest-benchmark's JSON to one row a measurement, with a few of its rounds.

    Parameters
    ----------
    benchmark : dict
        As ``--benchmark-json`` writes it, with the `extra_info` that the suites give.

    Returns
    -------
    list of dict
        The case, ``"contender"``, ``"repeat"``, ``"n_bytes"`` and ``"us"``, times of one step
        in microseconds; of a training also ``"round_trip"``, a cache line's in nanoseconds.
    """
    rows = []
    for result in benchmark["benchmarks"]:
        row = dict(result["extra_info"])
        if "contender" not in row:
            continue            # it was timed, and then its results were wrong
        calls = row.pop("calls")
        row["us"] = [
            float(f"{seconds / calls * 1e6:.5g}") for seconds in thinned(result["stats"]["data"])
        ]
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
        self.cases: dict[Key, dict[str, dict[int, list[float]]]] = {}
        self.n_bytes: dict[Key, int] = {}
        self._round_trips: dict[tuple[Key, str], list[int]] = {}
        for row in rows:
            named = (row.get(field) for field in ("touched", "outer", "storage"))
            variant = next(filter(None, named), row["dtype"])
            key = (row["job"], row["workload"], variant, row["threads"])
            name = row["contender"]
            if (trip := row.get("round_trip")) is not None:
                far = FAR if trip >= FAR_NS else ""
                name += far
                self._round_trips.setdefault((key, far), []).append(trip)
            self.cases.setdefault(key, {}).setdefault(name, {})[row["repeat"]] = row["us"]
            self.n_bytes[key] = row["n_bytes"]

    @property
    def most_threads(self) -> int:
        """The widest run's threads."""
        return max(threads for *_, threads in self.cases)

    def time(self, key: Key, name: str) -> Sample | None:
        """Return the microseconds of a step, or None where it was not measured."""
        times = self.cases.get(key, {}).get(name)
        return Sample.of(us for repeat in times.values() for us in repeat) if times else None

    def round_trip(self, key: Key, far: str) -> Sample | None:
        """Return the nanoseconds of a cache line's round trip, of near cores or of `FAR` ones."""
        trips = self._round_trips.get((key, far))
        return Sample.of(trips) if trips else None

    def bandwidth(self, key: Key, name: str) -> Sample | None:
        """Return the GB/s that a step must move at the least, by its time."""
        time = self.time(key, name)
        return time and Sample.of(self.n_bytes[key] / us / 1e3 for us in time.values)

    def speedup(self, key: Key, name: str, over: str) -> Sample | None:
        """Return how many times as fast `name` is as `over`.

        The same contender on near and on far cores is compared over all repeats: no repeat has
        both.
        """
        case = self.cases.get(key, {})
        ours, theirs = case.get(name, {}), case.get(over, {})
        pairs = [(repeat, repeat) for repeat in ours if repeat in theirs]
        if name != over and name.removesuffix(FAR) == over.removesuffix(FAR):
            pairs = list(product(ours, theirs))
        return Sample.of(
            b / a for mine, other in pairs for a, b in product(ours[mine], theirs[other])
        ) if pairs else None

    def judge(self, target: Target) -> tuple[Sample, str] | None:
        """Return the ratio a target is about and the opponent it was closest with."""
        threads = self.most_threads if target.threads == "all" else target.threads
        if target.threads == "all" and threads == 1:
            return None
        key = (target.job, target.workload, target.variant, threads)
        ratios = [
            (ratio, name) for name in target.than
            if (ratio := self.speedup(key, target.who, name)) is not None
        ]
        return min(ratios, key=lambda judged: target.figure(judged[0]), default=None)


# Tables

Column = Callable[[Results, Key, str], str]


def table(head: list[str], rows: Iterable[list[str]]) -> str:
    """Return a Markdown table, its first column to the left and the others to the right."""
    lines = [head, ["---"] + ["--:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def plural(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"


def title(job: str, workload: str) -> str:
    size = workload if workload in MODELS else f"{int(float(workload)):,}"
    size += f" × {WIDTH}" * (job == ROWS)
    return f"{Case(job, workload).label}, {size}"


def case_title(key: Key) -> str:
    job, workload, variant, threads = key
    return f"{title(job, workload)}, {variant}, {plural(threads, 'thread')}"


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
        at_least = number(target.at_least, times=True)
        row = [
            title(target.job, target.workload)
            + (f", {target.variant}" if target.suite in VARIANTS else ""),
            threads, target.who, target.opponents,
            f"{at_least} within the spread" if target.within_spread else at_least,
        ]
        if judged is None:
            rows.append([*row, "–", "not measured"])
            continue
        ratio, opponent = judged
        against = "" if len(target.than) == 1 else f", {opponent}"
        verdict = "held" if target.figure(ratio) >= target.at_least else "**missed**"
        rows.append([*row, figure(ratio, times=True) + against, verdict])
    return table(["target", "threads", "who", "against", "at least", "measured", ""], rows)


def distance(name: str) -> str:
    """Return what says, in the name of something measured, how far apart the cores were."""
    return FAR if name.endswith(FAR) else ""


def ratio_over(over: str) -> Column:
    """Return how many times as fast as `over` each implementation is."""
    return lambda results, key, name: figure(results.speedup(key, name, over), times=True)


TIME_COLUMNS: dict[str, Column] = {
    "µs": lambda results, key, name: figure(results.time(key, name)),
    "GB/s": lambda results, key, name: figure(results.bandwidth(key, name)),
}


def against_others(ours: str) -> dict[str, Column]:
    """Return columns that compare with the limit, and one of optcore's with everyone."""
    return TIME_COLUMNS | {
        "of the limit": lambda results, key, name: figure(results.speedup(key, name, LIMIT)),
        f"{ours} is": lambda results, key, name: figure(
            results.speedup(key, ours + distance(name), name), times=True
        ),
    }


def bytes_each(field: str) -> tuple[str, Column]:
    """Return the column of the bytes that a variant moves for each parameter."""
    return "bytes", lambda results, key, name: str(
        Case(key[0], key[1], **{field: key[2]}).bytes_each
    )


def ns_a_row(results: Results, key: Key, name: str) -> str:
    """Return the nanoseconds of a step over the rows it is given."""
    time = results.time(key, name)
    return figure(time and Sample.of(us * 1e3 / TOUCHED[key[2]].n for us in time.values))


COLUMNS: dict[str, dict[str, Column]] = {
    "engine": TIME_COLUMNS | {
        "against NumPy out=": ratio_over(OUT),
        "against NumPy literal": ratio_over(LITERAL),
    },
    "peers": against_others(STEP),
    "storage": against_others(STEP),
    "outer": against_others(OUTER_STEP),
    "rows": {"ns a row": ns_a_row, **against_others(ROWS_EXACT)},
}


@dataclass(frozen=True)
class Variants:
    """What tells the cases of a suite apart besides job, workload and threads."""

    heading: str
    names: Iterable[str]
    ours: str
    column: tuple[str, Column]          # what is said of a variant besides the time
    ratios: dict[str, tuple[str, str]]  # heading: who, over whom


VARIANTS = {
    "storage": Variants(
        "stored as", STORAGES, STEP, bytes_each("storage"), {"against float32": (STEP, WIDE)}
    ),
    "outer": Variants("replicas", OUTERS, OUTER_STEP, bytes_each("outer"), {
        f"against {FLOWER}, weighted": (OUTER_WEIGHTED, FLOWER),
        **{f"against {peer.name}": (OUTER_STEP, peer.name) for peer in PEERS_OUTER},
    }),
    "rows": Variants("a step", TOUCHED, ROWS_EXACT, ("ns a row", ns_a_row), {
        f"against {name}": (ROWS_EXACT, name)
        for name in [
            ROWS_SMALL, ROWS_LAZY, ROWS_DENSE, *[c.name for c in [*IN_ROWS, *NUMPY_ROWS]],
        ]
    }),
}


def all_tables(results: Results, suite: str) -> str:
    """Return a table for each case: every implementation, the limit first, then by time."""
    columns = COLUMNS[suite]
    parts = []
    for key, case in results.cases.items():
        names = sorted(case, key=lambda name: (name != LIMIT, results.time(key, name).median))
        parts.append(f"**{case_title(key)}**\n")
        parts.append(table(
            ["implementation", *columns],
            [[name, *[cell(results, key, name) for cell in columns.values()]] for name in names],
        ))
    return "\n".join(parts)


def wins_of_peers(results: Results, ours: str = STEP) -> str:
    """Return where something other than optcore is fastest; an empty table is not hidden."""
    rows = []
    for key, case in results.cases.items():
        others = [
            (ratio, name) for name in case
            if name != LIMIT and not name.startswith("optcore")
            and (ratio := results.speedup(key, name, ours + distance(name))) is not None
        ]
        ratio, name = max(others, key=lambda win: win[0].median, default=(None, ""))
        if ratio is not None and ratio.median > 1:
            rows.append([case_title(key), name, figure(ratio, times=True)])
    return table(["case", "fastest", f"faster than {ours}"], rows) if rows else (
        "Nowhere in this run.\n"
    )


def training_table(results: Results) -> str:
    """Return steps within a training, by how far apart the cores were."""
    names = (LITERAL, OUT, FUSED, ALONE, STEP)
    rows = []
    for key in results.cases:
        for far in ("", FAR):
            times = [results.time(key, name + far) for name in names]
            if key[1] in TRAININGS and any(times):
                trip = figure(results.round_trip(key, far))
                rows.append([title(*key[:2]), trip, *[figure(time) for time in times]])
    head = ["µs per step, float32", "round trip, ns", *names]
    return table(head, rows) if rows else "Not measured in this run.\n"


def variant_tables(results: Results, of: Variants) -> str:
    """Return a table for each rule, length and number of threads, a row a variant."""
    parts = []
    for job, workload, threads in dict.fromkeys((key[0], key[1], key[3]) for key in results.cases):
        rows = []
        for name in of.names:
            key = (job, workload, name, threads)
            if (time := results.time(key, of.ours)) is None:
                continue
            rows.append([
                name, of.column[1](results, key, of.ours), figure(time),
                figure(results.speedup(key, of.ours, LIMIT)),
                *[figure(results.speedup(key, *pair), times=True) for pair in of.ratios.values()],
            ])
        head = [of.heading, of.column[0], "µs", "of its limit", *of.ratios]
        parts += [f"**{title(job, workload)}, {plural(threads, 'thread')}**\n", table(head, rows)]
    return "\n".join(parts)


def resident_table(rows: Iterable[Row]) -> str:
    """Return the memory that an outer step takes beyond its arrays, by replicas and contender."""
    found = {(row["workload"], row["outer"], row["contender"]): row["mb"] for row in rows}
    if not found:
        return "Not measured in this run.\n"
    names = list(dict.fromkeys(name for *_, name in found))
    lines = [
        [f"{int(float(workload)):,}, {outer}",
         *[number(found.get((workload, outer, name))) for name in names]]
        for workload, outer in dict.fromkeys(key[:2] for key in found)
    ]
    most = max(mb for (*_, name), mb in found.items() if name.startswith("optcore"))
    return "\n".join([
        table(["MB beyond the arrays", *names], lines),
        f"optcore's shall be below {number(RESIDENT_MB)} and is at most {number(most)}: "
        f"{'held' if most < RESIDENT_MB else '**missed**'}.\n",
    ])


def short_table(results: Results) -> str:
    """Return the README's table."""
    rows = []
    for job, workload, threads in SHORT:
        n = results.most_threads if threads == "all" else threads
        key = (job, workload, "float32", n)
        far = "" if results.time(key, STEP) else FAR
        if results.time(key, STEP + far) is None:
            continue
        trip = results.round_trip(key, far)
        rows.append([
            title(job, workload) + (f", {n} threads" if n > 1 else "")
            + (f", a cache line's round trip {number(trip.median)} ns" if trip else ""),
            *[figure(results.time(key, name + far)) for name in (LITERAL, FUSED, STEP)],
            *[
                figure(results.speedup(key, STEP + far, name + far), times=True)
                for name in (LITERAL, FUSED)
            ],
            figure(results.speedup(key, STEP, LIMIT)),
        ])
    head = [
        "µs per step, float32, one thread unless said", "NumPy as written", "PyTorch, fused",
        "optcore", "against NumPy", "against PyTorch", "of the limit",
    ]
    return table(head, rows)


# Documents

def between_markers(text: str, mark: str, content: str) -> str:
    """Return a text with everything from ``<!-- mark:begin -->`` to its end replaced.

    Raises
    ------
    ValueError
        Where the markers are not there once each and in their order.
    """
    begin, end = f"<!-- {mark}:begin -->", f"<!-- {mark}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"markers {begin} and {end} must stand once each, in this order")
    before, rest = text.split(begin)
    after = rest.split(end)[1]
    return f"{before}{begin}\n{content.strip()}\n{end}{after}"


def embed(path: Path, mark: str, content: str) -> None:
    path.write_text(between_markers(path.read_text(), mark, content))


def footnote(summary: dict[str, Any]) -> str:
    machine = summary["machine"]
    return (
        f"*{machine['CPU']}, {machine['cores']} cores, {machine['caches']}; "
        f"NumPy {machine['NumPy']}, optcore {machine['optcore']}; {machine['date']}. {READING}*\n"
    )


def outline(summary: dict[str, Any], results: Results) -> str:
    """Return what a run comes to: who was there, the targets, where others win."""
    suite = summary["suite"]
    parts = []
    if "peers" in summary:
        versions = ", ".join(f"{name} {version}" for name, version in summary["peers"].items())
        parts.append(f"Peers: {versions}.\n")
        parts += [
            f"Absent: {name}, for want of {' and '.join(things)}.\n"
            for name, things in summary["absent"].items()
        ]
        parts += [
            f"Not measured: {name}, whose steps of bfloat16 are wrong.\n"
            for name in summary.get("wrong", ())
        ]
    if summary["quick"]:
        parts.append("A quick run: few sizes and repeats, figures to be taken as hints.\n")
    parts += ["### Targets\n", target_table(results, suite)]
    if suite == "peers":
        parts += ["### In training\n", training_table(results)]
    if suite == "storage":
        parts += ["### Storages\n", variant_tables(results, VARIANTS[suite])]
    if suite == "outer":
        parts += [
            "### Replicas\n", variant_tables(results, VARIANTS[suite]),
            "### Memory\n", resident_table(summary["resident"]),
        ]
    if suite == "rows":
        parts += ["### Rows\n", variant_tables(results, VARIANTS[suite])]
    if suite != "engine":
        ours = VARIANTS[suite].ours if suite in VARIANTS else STEP
        parts += ["### Where a peer wins\n", wins_of_peers(results, ours)]
    return "\n".join(parts)


def document(summary: dict[str, Any], results: Results) -> str:
    """Return the whole report of a suite."""
    return "\n".join([
        machine_table(summary["machine"]), READING + "\n", outline(summary, results),
        "### All results\n", all_tables(results, summary["suite"]),
    ])


def write(
    summary: dict[str, Any], out: Path, readme: Path | None = None, docs: Path | None = None
) -> None:
    """Write the Markdown report and any picture into a folder, and into documents' markers.

    Parameters
    ----------
    summary : dict
        ``"suite"``, ``"quick"``, ``"machine"``, ``"rows"``; where peers were measured also
        ``"peers"`` and ``"absent"``, ``"wrong"`` of the storage suite, and ``"resident"`` of
        the outer one.
    out : pathlib.Path
        A folder that exists.
    readme : pathlib.Path, optional
        Where the short table of the peers suite goes, between ``<!-- bench:begin -->`` and
        ``<!-- bench:end -->``.
    docs : pathlib.Path, optional
        Where targets and the cases that others win go, between ``<!-- engine:begin -->``,
        ``<!-- peers:begin -->``, ``<!-- storage:begin -->``, ``<!-- outer:begin -->`` or
        ``<!-- rows:begin -->`` and their ends. The tables of all results are in the folder.
    """
    from figures import engine_figure, roofline_figure

    suite = summary["suite"]
    results = Results(summary["rows"])
    (out / f"{suite}.md").write_text(document(summary, results))
    if suite == "engine":
        engine_figure(results, summary["machine"], out / "engine.png")
    elif suite == "peers":
        roofline_figure(results, summary["machine"], out / "roofline.png")
        if readme:
            embed(readme, "bench", f"{short_table(results)}\n{footnote(summary)}")
    text = outline(summary, results)
    if docs:
        embed(docs, suite, f"{footnote(summary)}\n{text}")
    print(f"{text}\n{READING}")
