"""Mutation testing: break optcore in one place at a time, and see that a test goes red.

The mutants and the tests that run against each file's are in `mutants.py`. A copy of the sources
is compiled once, with little optimization; for each mutant the one module is compiled anew (for a
`.pxd` those that it names), the tests run until one fails, and the copy is put back. Results are
kept beside the copy, in ``build/mutate``: a second run goes on where the first ended, and does
again only what was changed.

    python tests/mutate.py [--only EXPRESSION] [--jobs 1] [--most N] [--again] [--lived] [--list]

It runs in an environment that has what all tests need (``make test TEST_ENV=ci`` makes one) and
fails where a mutant lives that is not explained, or dies though it is.
"""
from __future__ import annotations

import argparse
import collections
import hashlib
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from mutants import MUTANTS, TESTS, Only

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build" / "mutate"
FIRST = "fuzz"          # whose round finds many of them in seconds
SLOW = [                # and of little use here
    "--deselect=tests/test_plan.py::test_a_million_small_steps_leave_no_trace",
    "--deselect=tests/test_checkpoint.py::test_killed_saves_lose_nothing",
    "--deselect=tests/test_torch.py::test_losses_equal_those_of_torch",
    "--deselect=tests/test_mpi.py::test_a_checkpoint_of_four_ranks_goes_on_with_others",
]
NOT_COPIED = [".git", "build", "*.so", "__pycache__", ".*_cache"]
LONGEST = 900                       # seconds for the tests of one; a mutant may hang

BUILD = """
import sys
import setup
setup.MODULES = {modules!r}
sys.argv = ["setup.py", "build_ext", "--inplace", "--force"]
setup.main()
"""


@dataclass(frozen=True)
class Mutant:
    path: str
    old: str
    new: str
    lives: str | None       # why
    modules: list[str]      # to compile

    @property
    def key(self):
        """Its name in the results, another one where the file was changed."""
        text = "\0".join([self.path, self.old, self.new, (ROOT / self.path).read_text()])
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def __str__(self):
        old, new = (abridged(text) for text in differing(self.old, self.new))
        return f"{self.path}: {old!r} -> {new!r}"


def abridged(text):
    text = " ".join(text.split())
    return text if len(text) <= 60 else text[:57] + "..."


def differing(old, new):
    """The two texts, without most of what begins and ends both."""
    pairs = zip(old, new, strict=False)
    begin = next((k for k, (a, b) in enumerate(pairs) if a != b), min(len(old), len(new)))
    begin = max(old.rfind("\n", 0, begin) + 1, begin - 24, 0)
    return old[begin:], new[begin:]


def all_mutants():
    """Every mutant, file by file; a pair whose text does not stand there once is an error."""
    found = {}
    for path, rows in MUTANTS.items():
        text = (ROOT / path).read_text()
        modules = [Path(path).stem] if path.endswith(".pyx") else []
        found[path] = mutants = []
        for row in rows:
            if isinstance(row, Only):
                modules = list(row)
                continue
            old, new, *lives = row
            if text.count(old) != 1 or old == new:
                raise SystemExit(f"mutants.py: {path} must have {old!r} once")
            mutants.append(Mutant(path, old, new, *(lives or [None]), modules))
    return found


def in_turn(lists):
    """One of each list, and again: what is run first is spread over all files."""
    lists = [list(each) for each in lists]
    while any(lists):
        yield from (each.pop(0) for each in lists if each)


def sources():
    """What the copies are of."""
    return [path for folder in ("optcore", "python", "tests") for path in sorted(
        (ROOT / folder).rglob("*")) if path.suffix in (".py", ".pyx", ".pxd", ".pyi", ".h")
        and path.stem not in ("mutate", "mutants")]


class Copy:
    """A compiled copy of the sources, one mutant at a time in it."""

    def __init__(self, number, level):
        self.folder = FOLDER / f"copy{number}"
        self.level = level
        self.made = self.folder / ".made"       # of what, while no mutant is in it

    def make(self):
        """Make it, unless it is there, whole and of the sources as they are."""
        text = "".join(hashlib.sha256(path.read_bytes()).hexdigest() for path in sources())
        made = f"{self.level} {hashlib.sha256(text.encode()).hexdigest()}"
        if self.made.exists() and self.made.read_text() == made:
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(ROOT, self.folder, ignore=shutil.ignore_patterns(*NOT_COPIED))
        sys.path.insert(0, str(ROOT))
        import setup

        said = self.compile(setup.MODULES)
        if said is not None:
            raise SystemExit(f"the copy does not build:\n{said}")
        self.made.write_text(made)

    def compile(self, modules):
        """Compile some modules in their place; return what the compiler said where it failed."""
        done = subprocess.run(
            [sys.executable, "-c", BUILD.format(modules=modules)], cwd=self.folder, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
            env={**os.environ, "CFLAGS": f"{os.environ.get('CFLAGS', '')} {self.level}"},
        )
        return done.stdout[-3000:] if done.returncode else None

    def test(self, arguments):
        """Run pytest; return its exit status and what it printed, or None for a run that hung."""
        for folder in (self.folder / "python" / "optcore", self.folder / "tests"):
            shutil.rmtree(folder / "__pycache__", ignore_errors=True)
        process = subprocess.Popen(
            [sys.executable, "-B", "-m", "pytest", "-q", "--no-header", "--tb=line",
             "-p", "no:cacheprovider", "--assert=plain",    # rewriting them takes the longest
             *arguments],
            cwd=self.folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            start_new_session=True,         # so that whatever the tests started can be ended
            env={**os.environ, "PYTHONPATH": str(self.folder / "python")},
        )
        try:
            output = process.communicate(timeout=LONGEST)[0]
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return None, process.communicate()[0]
        return process.returncode, output

    def killer(self, selection, before):
        """Return what goes wrong first in the tests that the words select; None if nothing does.

        The test that killed the same mutant of an earlier text, if any, runs first of all.
        """
        if before.startswith("tests/") and self.test(["-x", before])[0] == 1:
            return before
        status, output = self.test(["-x", *SLOW, *(
            word if word.startswith("-") else f"tests/test_{word}.py"
            for word in selection.split())])
        if status == 0:
            return None
        if status is None:
            return f"ended after {LONGEST} s"
        if status < 0 or status > 128:
            return f"a crash, status {status}"
        failed = re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", output, re.M)
        if failed:
            return failed[0]
        if "ImportError while loading conftest" in output:
            return "optcore cannot be imported"
        raise SystemExit(f"pytest ended with {status}:\n{output[-3000:]}")

    def try_one(self, mutant, before):
        source = self.folder / mutant.path
        text = source.read_text()
        built = [path for module in mutant.modules
                 for path in (self.folder / "python" / "optcore").glob(f"{module}.*.so")]
        kept, made = {path: path.read_bytes() for path in built}, self.made.read_text()
        self.made.unlink()
        try:
            source.write_text(text.replace(mutant.old, mutant.new))
            said = self.compile(mutant.modules) if mutant.modules else None
            if said is not None:
                raise SystemExit(f"{mutant} does not compile:\n{said}")
            selection = f"{FIRST} {TESTS[mutant.path]}"
            by = self.killer(selection, before)
        finally:
            source.write_text(text)
            for path, content in kept.items():
                path.unlink()               # a new file, for the old one may be mapped
                path.write_bytes(content)
            self.made.write_text(made)
        # a machine that is slow or short of memory ends tests, too
        if by and not by.startswith("tests/") and (said := self.killer(selection, "")):
            raise SystemExit(f"without {mutant}, which {by}, the tests end alike: {said}")
        return ("killed", by) if by else ("lives", "")


class Results:
    """What came of each mutant, kept in a file of lines."""

    def __init__(self, again):
        self.path = FOLDER / "results.jsonl"
        FOLDER.mkdir(parents=True, exist_ok=True)
        self.lock = threading.Lock()
        if again:
            self.path.unlink(missing_ok=True)
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        rows = [json.loads(line) for line in lines]
        self.rows = {row["key"]: row for row in rows if "key" in row}
        self.killers = {row["mutant"]: row["by"] for row in rows if "key" in row}
        self.confirmed = {name for row in rows for name in row.get("confirmed", ())}

    def status(self, mutant):
        return self.rows.get(mutant.key, {}).get("status")

    def confirm(self, killers):
        self.confirmed.update(killers)
        with self.path.open("a") as file:
            file.write(json.dumps({"confirmed": killers}) + "\n")

    def add(self, mutant, status, by, seconds):
        row = {"key": mutant.key, "mutant": str(mutant), "status": status, "by": by,
               "seconds": round(seconds, 1)}
        with self.lock:
            self.rows[mutant.key] = row
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{status:6}  {seconds:5.1f} s  {mutant}  {by}", flush=True)


def confirm(copy, results):
    """See that the tests that killed mutants pass without one, else they tell nothing."""
    killers = sorted({row["by"] for row in results.rows.values()
                      if row["by"].startswith("tests/")} - results.confirmed)
    if not killers:
        return
    status, output = copy.test(killers)
    if status != 0:
        raise SystemExit(f"without a mutant there should be no failure:\n{output[-3000:]}")
    results.confirm(killers)
    print(f"without a mutant the {len(results.confirmed)} tests that killed one pass")


def run(mutants, copies, results):
    """Try the mutants, each copy on a thread of its own."""
    waiting = queue.SimpleQueue()
    for mutant in mutants:
        waiting.put(mutant)
    failures = []

    def work(copy):
        try:
            while not failures:
                mutant = waiting.get_nowait()
                begin = time.monotonic()
                status, by = copy.try_one(mutant, results.killers.get(str(mutant), ""))
                results.add(mutant, status, by, time.monotonic() - begin)
        except queue.Empty:
            pass
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(copy,)) for copy in copies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for failure in failures:
        raise failure


def report(found, results):
    """Print what came of all mutants; return how many are not as they are said to be."""
    n_wrong = 0
    total = collections.Counter()
    print(f"\n{'file':32} {'mutants':>7} {'killed':>7} {'live':>7} {'untried':>7}")
    for path, mutants in found.items():
        count = collections.Counter(results.status(mutant) or "untried" for mutant in mutants)
        total += count
        print(f"{path:32} {len(mutants):7} {count['killed']:7} {count['lives']:7} "
              f"{count['untried']:7}")
    print(f"{'all':32} {sum(total.values()):7} {total['killed']:7} {total['lives']:7} "
          f"{total['untried']:7}\n")
    for mutant in (mutant for mutants in found.values() for mutant in mutants):
        status = results.status(mutant)
        if status == "lives":
            n_wrong += mutant.lives is None
            print(f"lives, {mutant.lives or 'UNEXPLAINED'}\n    {mutant}")
        elif status == "killed" and mutant.lives is not None:
            n_wrong += 1
            print(f"was killed, though it is said to live\n    {mutant}")
    return n_wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="mutants that this expression finds")
    parser.add_argument("--jobs", type=int, default=1, help="copies that are tried at a time")
    parser.add_argument("--most", type=int, help="end after so many")
    parser.add_argument("--again", action="store_true", help="forget what has been found")
    parser.add_argument("--lived", action="store_true", help="try again what has lived")
    parser.add_argument("--list", action="store_true", help="only print what is known")
    parser.add_argument("--level", default="-O1", help="the compiler's optimization, -O1")
    asked = parser.parse_args()
    found = {path: [mutant for mutant in mutants if re.search(asked.only, str(mutant))]
             for path, mutants in all_mutants().items()}
    results = Results(asked.again)
    if not asked.list:
        left = [mutant for mutant in in_turn(found.values())
                if results.status(mutant) == ("lives" if asked.lived else None)]
        left = left[: asked.most]
        copies = [Copy(k, asked.level) for k in range(asked.jobs)]
        for copy in copies if left else []:
            copy.make()
        run(left, copies, results)
        if left:
            confirm(copies[0], results)
    sys.exit(report(found, results) != 0)


if __name__ == "__main__":
    main()
