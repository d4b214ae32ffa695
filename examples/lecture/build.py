"""Build the gallery: every figure, the animation, the numbers and the page, into one folder."""
from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from threadpoolctl import threadpool_limits

if __package__ in (None, ""):   # run as a script: the package is the folder this file is in
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import optcore
from lecture import (
    adaptive,
    comparison,
    conditioning,
    fewer_bytes,
    momentum,
    nesterov,
    network,
    noise,
    page,
    saddles,
    style,
)
from lecture.claims import Check, Picture, Story

ROWS = (conditioning, saddles, noise, momentum, nesterov, comparison, adaptive)
DOCS = Path(__file__).resolve().parents[2] / "docs" / "lecture.md"
BEGIN, END = "<!-- glance: written by build.py --docs -->", "<!-- end of glance -->"


def build(out: Path, *, seeds: int = network.SEEDS, console: Console | None = None
          ) -> tuple[list[Story], list[Check]]:
    """Build everything into a folder.

    Parameters
    ----------
    out : Path
        The folder; `index.html` is the page.
    seeds : int
        Of the network's runs; twice as many where it is stored in fewer bytes.
    console : rich.console.Console, optional
        Where the progress bar goes.

    Returns
    -------
    stories, checks : lists
        The words of all rows, and all claims.
    """
    out.mkdir(parents=True, exist_ok=True)
    stories: list[Story] = []
    sections: list[str] = []
    checks: list[Check] = []
    bar = Progress(TextColumn("{task.description:<34}"), BarColumn(), MofNCompleteColumn(),
                   TimeElapsedColumn(), console=console)
    # Arrays this small gain nothing from more threads of BLAS, and lose much where cores are few.
    with bar, threadpool_limits(1):
        task = bar.add_task("", total=2 * len(ROWS) + 1 + (seeds + 1) + (3 + 1) + 1)

        def begin(what: str) -> None:
            bar.update(task, description=what)

        def add(row: ModuleType, numbers: dict[str, Any], extra: str = "") -> list[Picture]:
            pictures = row.figures(numbers)
            claims = row.checks(numbers)
            begin(f"Drawing {pictures[0].name.partition('-')[0]}")
            for picture in pictures:
                save(picture, out)
            stories.append(row.story(numbers))
            checks.extend(claims)
            sections.append(page.section(stories[-1], pictures, claims, extra))
            bar.advance(task)
            return pictures

        for row in ROWS:
            begin(f"Measuring {row.__name__.rpartition('.')[2]}")
            numbers = row.measured()
            bar.advance(task)
            pictures = add(row, numbers)
            if row is comparison:
                hero = pictures[0]
                begin("Animating the comparison")
                comparison.animate(numbers, out / f"{hero.name}.gif")
                bar.advance(task)
        for row, what, count in ((network, "Training the network", seeds),
                                 (fewer_bytes, "Training with fewer bytes", 2 * seeds)):
            begin(what)
            numbers = row.measured(seeds=count, progress=lambda: bar.advance(task))
            head, *rows = row.table(numbers)
            add(row, numbers, page.table(head, rows))
        begin("Writing the page")
        html = page.page(stories, sections, checks, hero=page.animation(hero),
                         version=optcore.__version__)
        (out / "index.html").write_text(html, encoding="utf-8")
        results = [{**asdict(check), "holds": check.holds} for check in checks]
        (out / "numbers.json").write_text(
            json.dumps(results, indent=1, ensure_ascii=False), encoding="utf-8")
        bar.advance(task)
        begin("Done")
    return stories, checks


def save(picture: Picture, out: Path) -> None:
    """Write a figure as SVG for the page and as PNG for everywhere else."""
    style.freeze(picture.figure)
    picture.figure.savefig(out / f"{picture.name}.svg", metadata={"Date": None})
    picture.figure.savefig(out / f"{picture.name}.png")


def glance(stories: list[Story]) -> str:
    """Return the table of the documentation, in Markdown."""
    lines = ["| the lecture says | what we measured | what theory says |", "|---|---|---|"]
    lines += [f"| {' | '.join(line)} |" for story in stories for line in story.glance]
    return "\n".join(lines)


def write_docs(stories: list[Story]) -> None:
    """Put the table into the documentation, between its marks."""
    before, _, rest = DOCS.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    DOCS.write_text(f"{before}{BEGIN}\n{glance(stories)}\n{END}{after}", encoding="utf-8")


def main() -> int:
    """Build from the command line; 1 if a claim does not hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/gallery"),
                        help="the folder to build into (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=network.SEEDS,
                        help="seeds of the network's runs (default: %(default)s)")
    parser.add_argument("--docs", action="store_true",
                        help="write the table of docs/lecture.md as well")
    arguments = parser.parse_args()
    console = Console()
    begin = time.perf_counter()
    stories, checks = build(arguments.out, seeds=arguments.seeds, console=console)
    if arguments.docs:
        write_docs(stories)
    failing = [check for check in checks if not check.holds]
    console.print(f"{len(checks) - len(failing)} of {len(checks)} claims hold. "
                  f"{arguments.out / 'index.html'} in {time.perf_counter() - begin:.0f} s.")
    for check in failing:
        console.print(f"  fails: {check.group}: {check.claim}: measured {check.measured:g}, "
                      f"theory {check.theory:g} ({check.stated})", style="red")
    return bool(failing)


if __name__ == "__main__":
    sys.exit(main())
