"""What an outer step takes of memory beyond its arrays, each contender in a fresh process."""
from __future__ import annotations

import ctypes
import gc
import multiprocessing
import re
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import peers
from cases import OUTER, OUTERS, Arrays, Case, Run
from contenders import NUMPY_OUTER
from contenders import OUTERS as OPTCORE_OUTERS
from machine import cores

WORKLOAD = "2.5e7"
QUICK_WORKLOAD = "1e6"
# Of the step that goes before: it imports, starts threads and fills what is kept for good
SMALL = "1e5"
STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")
RESET_PEAK = "5"


def measured(*, quick: bool) -> list[dict[str, Any]]:
    """Return a row for each contender and number of replicas; none where Linux is not beneath."""
    if not CLEAR.exists():
        return []
    workload = QUICK_WORKLOAD if quick else WORKLOAD
    # As many threads as every library takes by itself
    cases = [Case(OUTER, workload, threads=cores(), outer=replicas) for replicas in OUTERS]
    return [
        {"workload": workload, "outer": case.outer, "contender": contender.name,
         "mb": round(apart(case, contender.build) / 1e6, 2)}
        for case in cases
        for contender in [*OPTCORE_OUTERS, *peers.with_torch(peers.OUTERS), NUMPY_OUTER]
    ]


def apart(case: Case, build: Callable[[Case, Arrays], Run]) -> int:
    """Return what `beyond` does in a process of its own."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as process:
        return process.submit(beyond, case, build).result()


def beyond(case: Case, build: Callable[[Case, Arrays], Run]) -> int:
    """Return the bytes by which the peak of two steps exceeds parameters, replicas and velocity."""
    step_twice(replace(case, workload=SMALL), build)
    return step_twice(case, build)


def step_twice(case: Case, build: Callable[[Case, Arrays], Run]) -> int:
    arrays = Arrays(case)
    run = build(case, arrays)
    arrays.reset()
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)      # glibc's: what is free may be had
    if trim:
        trim(0)
    CLEAR.write_text(RESET_PEAK)
    before = resident("VmRSS")
    run.step()
    run.step()
    return resident("VmHWM") - before - case.n_states * sum(x.nbytes for x in arrays.x)


def resident(what: str) -> int:
    """Return a line of the process's status in bytes."""
    return 1024 * int(re.search(rf"^{what}:\s*(\d+) kB$", STATUS.read_text(), re.M).group(1))
