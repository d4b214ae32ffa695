"""Run a suite and write its report: ``python bench/run.py engine --out bench/results``."""
from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent / "tests"))     # the reference; under pytest, pytest.ini says so

import report  # noqa: E402
from machine import cores, describe  # noqa: E402


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("suite", choices=["engine", "peers", "storage", "outer", "rows"])
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--quick", action="store_true", help="fewer sizes, models and repeats")
    parser.add_argument("--repeats", type=int, help="times that each case is measured")
    parser.add_argument("--only", metavar="EXPRESSION", help="a selection, as pytest's -k")
    parser.add_argument("--readme", type=Path, help="file with markers for the short table")
    parser.add_argument("--docs", type=Path, help="file with markers for the full tables")
    parser.add_argument(
        "--report-only", action="store_true", help="write the report again from the results"
    )
    return parser.parse_args()


def environment(threads: int, folder: str) -> dict[str, str]:
    """Return the environment of a run: JAX and OpenMP read their thread counts as they start."""
    names = ("PJRT_NPROC", "NPROC", "OMP_NUM_THREADS") if threads < cores() else ()
    limits = dict.fromkeys(names, str(threads))
    return {"TORCHINDUCTOR_CACHE_DIR": folder, **os.environ, **limits}


def measure(
    suite: str, threads: int, arguments: argparse.Namespace
) -> tuple[list[report.Row], bool]:
    """Run a suite under pytest-benchmark.

    Returns
    -------
    rows : list of dict
        One for each measurement; what disagreed with the reference has none.
    agreed : bool
        Whether all agreed.
    """
    quick = arguments.quick
    repeats = arguments.repeats or (2 if quick else 5 if suite == "engine" else 3)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "benchmark.json")
        command = [
            sys.executable, "-m", "pytest", "-q", str(HERE / f"bench_{suite}.py"),
            f"--repeats={repeats}", f"--threads={threads}", f"--build-folder={folder}",
            f"--benchmark-json={output}", "--benchmark-min-rounds=3",
            f"--benchmark-max-time={0.02 if quick else 0.05}",
        ]
        command += ["--quick"] * quick + (["-k", arguments.only] if arguments.only else [])
        done = subprocess.run(command, env=environment(threads, folder), check=False)
        if done.returncode not in (0, 1) or not output.exists():
            sys.exit(f"the {suite} suite could not run; nothing was written")
        return report.rows_of(json.loads(output.read_text())), done.returncode == 0


def main() -> None:
    agreed = True
    arguments = parsed()
    suite, out = arguments.suite, arguments.out
    out.mkdir(parents=True, exist_ok=True)
    results = out / f"{suite}.json"
    if not arguments.report_only:
        machine = describe()            # before the run adds to the load
        counts = [1] if suite == "engine" else sorted({1, cores()})
        runs = [measure(suite, threads, arguments) for threads in counts]
        rows = [row for some, _ in runs for row in some]
        agreed = all(agreed for _, agreed in runs)
        summary = {"suite": suite, "quick": arguments.quick, "machine": machine, "rows": rows}
        if suite != "engine":
            import peers

            summary["peers"] = peers.versions(suite)
            summary["absent"] = peers.absent(suite)
        if suite == "storage":
            summary["wrong"] = peers.wrong()
        if suite == "outer":
            import resident

            summary["resident"] = resident.measured(quick=arguments.quick)
        results.write_text(report.to_json(summary))
    report.write(json.loads(results.read_text()), out, arguments.readme, arguments.docs)
    if not agreed:
        sys.exit("some implementations differed from the reference and were not timed: see above")


if __name__ == "__main__":
    main()
