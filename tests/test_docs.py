"""Every snippet of the README and the documentation runs, in the order in which it is read.

In the Markdown, an HTML comment on the line before a fence says what a reader need not see:

    <!-- no-run: why -->    the snippet is not run
    <!-- needs: torch -->   it is skipped where a package is missing
    <!-- file: steps.c -->  its text is written to that file, for snippets after it
    <!-- run -->            a console snippet: its lines `$ python …` are run

and ``<!-- setup … -->`` holds Python that runs where it stands. Snippets of one page share a
namespace and a folder, which is where they run.
"""
from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from reference import same_bits

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]

PIECE = re.compile(
    r"^<!-- setup\n(?P<setup>.*?)^-->$"
    r"|(?:^<!-- (?P<mark>no-run|needs|file|run)(?:: (?P<value>.*?))? -->\n)?"
    r"^```(?P<language>\w*)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Piece:
    """One snippet, or one hidden setup, of a page."""

    page: Path
    line: int
    language: str
    code: str
    mark: str | None
    value: str | None

    @property
    def id(self):
        return f"{self.page.relative_to(ROOT).as_posix()}:{self.line}"

    @property
    def runs(self):
        if self.mark in ("file", "run"):
            return True
        return self.language == "python" and self.mark != "no-run"

    @property
    def missing(self):
        """The package this needs and that is not here."""
        if self.mark == "needs" and importlib.util.find_spec(self.value) is None:
            return self.value
        return None

    def run(self, folder, namespace):
        if self.mark == "file":
            (folder / self.value).write_text(self.code, encoding="utf-8")
        elif self.mark == "run":
            for line in self.code.splitlines():
                if line.startswith("$ python "):
                    command = [sys.executable, *shlex.split(line)[2:]]
                    done = subprocess.run(command, cwd=folder, capture_output=True, text=True,
                                          check=False)
                    assert done.returncode == 0, done.stdout + done.stderr
        else:
            # Empty lines before it give tracebacks the page's own line numbers.
            code = "\n" * (self.line - 1) + self.code
            exec(compile(code, str(self.page), "exec"), namespace)


def pieces(page):
    text = page.read_text(encoding="utf-8")
    for match in PIECE.finditer(text):
        kind = "setup" if match["setup"] is not None else "code"
        yield Piece(
            page,
            text.count("\n", 0, match.start(kind)) + 1,
            "python" if kind == "setup" else match["language"],
            match[kind],
            match["mark"],
            match["value"],
        )


class Reader:
    """Run a page's pieces up to a given one, each once, whichever tests are selected."""

    def __init__(self, page, folder):
        self.todo = [piece for piece in pieces(page) if piece.runs and not piece.missing]
        self.folder = folder
        self.namespace = {"__name__": "__main__"}

    def read_to(self, piece):
        path = list(sys.path)
        sys.path.insert(0, str(self.folder))
        try:
            with working_in(self.folder):
                while self.todo and self.todo[0].line <= piece.line:
                    self.todo.pop(0).run(self.folder, self.namespace)
        finally:
            sys.path[:] = path
            # Another page may build a module of the same name.
            for name, module in list(sys.modules.items()):
                if str(self.folder) in (getattr(module, "__file__", None) or ""):
                    del sys.modules[name]


@contextlib.contextmanager
def working_in(folder):
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@pytest.fixture(scope="module")
def readers(tmp_path_factory):
    return {page: Reader(page, tmp_path_factory.mktemp(page.stem)) for page in PAGES}


@pytest.mark.parametrize(
    "piece",
    [piece for page in PAGES for piece in pieces(page) if piece.runs],
    ids=lambda piece: piece.id,
)
def test_snippet(piece, readers):
    if piece.missing:
        pytest.skip(f"{piece.id} needs {piece.missing}, which is missing")
    readers[piece.page].read_to(piece)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_mark_is_understood(page):
    """A misspelt mark would silently leave its snippet out, or run it."""
    text = page.read_text(encoding="utf-8")
    found = list(PIECE.finditer(text))
    assert len(re.findall("^```", text, re.MULTILINE)) == (
        2 * sum(match["code"] is not None for match in found)
    )
    assert len(re.findall(r"^<!-- (?:no-run|needs|file|run|setup)\b", text, re.MULTILINE)) == (
        sum(bool(match["mark"]) or match["setup"] is not None for match in found)
    )


README_CODE = [piece.code for piece in pieces(ROOT / "README.md") if piece.language == "python"]


def run_changed(code, *changes):
    """Run a snippet with some of its text replaced, and return its names."""
    for old, new in changes:
        assert code.count(old) == 1, old
        code = code.replace(old, new)
    namespace = {}
    exec(code, namespace)
    return namespace


def test_the_readme_hides_nothing():
    assert all(piece.mark is None for piece in pieces(ROOT / "README.md"))
    assert "<!-- setup" not in (ROOT / "README.md").read_text(encoding="utf-8")
    found = run_changed("\n".join(README_CODE))["found"]
    assert (found.missing, found.unexpected) == ([], ["head"])


def test_the_first_example_learns(capsys):
    run_changed(README_CODE[0])
    losses = [float(line.split()[1]) for line in capsys.readouterr().out.splitlines()]
    assert len(losses) == 4
    assert 1 < losses[0] < 1.2
    assert losses[-1] < 0.03


def test_the_first_example_learns_alike_with_gradients_that_are_bound_and_rebound():
    """Every backward pass in NumPy makes new arrays, and many put them where the old ones were."""
    trained = run_changed(README_CODE[0])
    grads = "{name: np.zeros_like(p) for name, p in params.items()}"
    rebound = run_changed(
        README_CODE[0],
        ("momentum=0.9)", f"momentum=0.9, grads=(grads := {grads}))"),
        ("    grads = {", "    new = {"),
        ("    opt.step(grads)", "    for name in new: grads[name] = new[name]\n    opt.step()"),
    )
    for name, p in trained["params"].items():
        assert same_bits(p, rebound["params"][name])


def test_the_second_example_learns_as_the_first():
    first = run_changed(README_CODE[0], ("range(301)", "range(100)"))
    second = run_changed(README_CODE[0] + README_CODE[1], ("range(301)", "range(0)"))
    for name, p in first["params"].items():
        assert same_bits(p, second["params"][name])


def test_the_demo_reports_every_epoch_where_output_is_no_terminal(tmp_path):
    for package in ("matplotlib", "rich", "sklearn"):
        pytest.importorskip(package, reason=f"the demo needs {package}")
    command = [sys.executable, ROOT / "examples/digits.py", "--epochs", "2", "--hidden", "8",
               "--batch", "512",
               "--least-accuracy", "0", "--out", tmp_path / "digits.png"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for rule in ("sgd", "momentum", "nesterov"):
        for epoch in (1, 2):
            assert f"{rule}, epoch {epoch} of 2: loss" in done.stdout
    for heading in ("step, µs", "epoch, ms"):
        assert heading in done.stdout
