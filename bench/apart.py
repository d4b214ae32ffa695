"""A contender in a process of its own, for one case, and stepped from here."""
from __future__ import annotations

import gc
import multiprocessing
import time
import traceback
from collections.abc import Callable
from functools import lru_cache
from multiprocessing.connection import Connection

from cases import Arrays, Case, Run

# One request takes at least this long: the way there and back costs some 50 µs.
REQUEST_SECONDS = 10e-3
WARM_UP_SECONDS = 50e-3
Build = Callable[[Case, Arrays], Run]


class Apart:
    """A process that builds a run, checks it and steps it on request.

    Raises
    ------
    AssertionError
        Where what it steps is not the reference.
    RuntimeError
        With what else was raised there.
    """

    def __init__(self, case: Case, build: Build) -> None:
        context = multiprocessing.get_context("spawn")      # no threads and no state from here
        self._pipe, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there, case, build), daemon=True)
        self._process.start()
        there.close()
        self.calls = self._answer()

    def step(self) -> None:
        """Take `calls` steps there."""
        self._pipe.send(self.calls)
        self._answer()

    def _answer(self) -> int:
        answer = self._pipe.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer


@lru_cache(maxsize=1)
def apart(case: Case, build: Build) -> Apart:
    """Return the process for a case; that of the last one ends as nobody holds its pipe."""
    return Apart(case, build)


def build_apart(case: Case, arrays: Arrays, *, build: Build) -> Run:
    """Build in another process; what is there is checked there, and its arrays are its own."""
    there = apart(case, build)
    return Run(there.step, tuple, calls=there.calls)


def _serve(pipe: Connection, case: Case, build: Build) -> None:
    gc.disable()            # as pytest-benchmark has it for all others
    try:
        arrays = Arrays(case)
        arrays.reset()
        run = build(case, arrays)
        arrays.check(run, exact=False)
        pipe.send(_calls(run))
    except Exception as error:
        told = isinstance(error, AssertionError)
        pipe.send(error if told else RuntimeError(traceback.format_exc()))
        return
    try:
        while True:
            for _ in range(pipe.recv()):
                run.step()
            pipe.send(0)
    except EOFError:        # nobody asks any more
        return


def _calls(run: Run) -> int:
    """Warm up, and return the steps of a request."""
    steps, begin = 0, time.perf_counter()
    while (spent := time.perf_counter() - begin) < WARM_UP_SECONDS or not steps:
        run.step()
        steps += 1
    return max(1, round(steps * REQUEST_SECONDS / spent))
