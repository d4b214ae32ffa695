"""The memory limit as a contender, and the C code of this folder: compiled here, by ctypes."""
from __future__ import annotations

import ctypes
import mmap
import os
import shutil
import subprocess
import sysconfig
from functools import cache
from itertools import cycle
from pathlib import Path

import numpy as np
from cases import (
    OUTER,
    PIPELINE,
    ROWS,
    RULES,
    TOUCHED,
    Arrays,
    Case,
    Run,
    count_of,
    dtype_of,
    kept_in,
)
from contenders import LIMIT, Contender
from tables import Table

HUGE_PAGE = 2 << 20
# Columns begin so far apart within a page: a dozen at the same place of it would share a cache set
APART = 320
# Not -ffast-math: linked into a library, it turns subnormals off for the whole process.
FLAGS = [
    "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros",
    "-fassociative-math", "-shared", "-fPIC", "-pthread",
]
# The first that the compiler takes. GCC prefers 32-byte vectors on CPUs it does not know.
EXTRAS = [["-fopenmp", "-mprefer-vector-width=512"], ["-fopenmp"], []]
# A parallel region costs a microsecond or two: below this many elements one thread is faster.
THREADED_FROM = 100_000
# Rows at random take longer: 64 elements a tenth of a microsecond and more
THREADED_FROM_ROWS = 100
# A call of the limit on rows takes as many steps as have so many rows.
ROWS_A_CALL = 10_000


class NoCompilerError(RuntimeError):
    """There is no compiler to build with what is to be measured."""


def compiler() -> str:
    """Return the name of the C compiler, or raise `NoCompilerError`."""
    name = os.environ.get("CC") or (sysconfig.get_config_var("CC") or "cc").split()[0]
    if shutil.which(name) is None:
        raise NoCompilerError(f"no C compiler named {name}")
    return name


@cache
def library(source: str, folder: Path) -> ctypes.CDLL:
    """Compile a file of this folder, with OpenMP and the widest vectors it takes."""
    folder.mkdir(parents=True, exist_ok=True)
    path = Path(__file__).with_name(source)
    built = folder / f"{path.stem}-{os.getpid()}.so"
    for extra in EXTRAS:
        done = subprocess.run(
            [compiler(), *FLAGS, *extra, str(path), "-o", str(built)],
            capture_output=True, text=True, check=False,
        )
        if done.returncode == 0:
            return ctypes.CDLL(str(built))
    raise NoCompilerError(done.stderr.strip().splitlines()[-1])


def _columns(dtypes: list[str], n: int) -> tuple[list[np.ndarray], mmap.mmap]:
    """Return arrays of 0.5, on cache lines of memory with huge pages advised."""
    sizes = [
        -(-n * dtype_of(dtype).itemsize // HUGE_PAGE) * HUGE_PAGE + APART for dtype in dtypes
    ]
    memory = mmap.mmap(-1, sum(sizes) + HUGE_PAGE)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    base = np.frombuffer(memory, np.uint8)
    start = -base.ctypes.data % HUGE_PAGE
    columns = []
    for dtype, size in zip(dtypes, sizes, strict=True):
        columns.append(np.frombuffer(memory, dtype_of(dtype), count=n, offset=start))
        columns[-1][...] = kept_in(dtype, np.full(1, 0.5))
        start += size
    return columns, memory


def _kernels(case: Case) -> list[str | None]:
    """Return what limit.c calls the pass before a step, if any, and the step."""
    if case.pipeline:
        return [f"norm_{case.dtype}", f"pipeline_{case.dtype}"]
    if case.outer:
        return [None, f"outer_{case.replicas.n}_{case.replicas.write_back:d}"]
    if case.job == "adam":
        return [None, f"adam_{case.dtype}"]
    stored = case.stored
    types = [stored.param, stored.master or "none", stored.grad, stored.velocity]
    return [None, "_".join(["momentum" if case.n_states else "sgd", *types])]


def limit_contender(folder: Path) -> Contender:
    """Return the limit as one more implementation, measured next to the others."""

    def build(case: Case, arrays: Arrays) -> Run:
        compiled = library("limit.c", folder)
        kernels = [name and getattr(compiled, name) for name in _kernels(case)]
        n = count_of(case.workload)
        stored = case.stored
        beside = case.pipeline or case.n_states == 2        # an average or a second state
        fourth = stored.param if beside else stored.master_dtype
        replicas = [stored.param] * case.replicas.n
        grad = None if case.outer else stored.grad
        dtypes = [stored.param, grad, stored.velocity if case.n_states else None, fourth]
        columns, memory = _columns([dtype for dtype in [*dtypes, *replicas] if dtype], n)
        threads = case.threads if n >= THREADED_FROM else 1
        sums = np.zeros(64 * threads, case.dtype)       # each thread's on lines of its own
        places = iter(columns)
        at = [next(places).ctypes.data if dtype else None for dtype in dtypes]
        at += [place.ctypes.data for place in (sums, *places)]
        pointers = (ctypes.c_void_p * len(at))(*at)
        calls = max(1, min(1000, 1_000_000 // n))

        def step() -> None:
            compiled.limit(
                *kernels, pointers, ctypes.c_size_t(n), ctypes.c_int(threads),
                ctypes.c_int(calls),
            )

        return Run(step, lambda: columns[:1], calls=calls, close=lambda: (memory, sums))

    # limit.c has a loop without a state and one with one, and Adam's
    jobs = [job for job, rule in RULES.items() if not rule.is_adaptive]
    return Contender(
        LIMIT, build, jobs=(*jobs, "adam", PIPELINE, OUTER), threaded=True, checked=False
    )


def rows_limit_contender(folder: Path) -> Contender:
    """Return the limit of exact steps on rows: the same in the same order, but each once."""

    def build(case: Case, table: Table) -> Run:
        compiled = library("limit.c", folder)
        shape = table.x[0].shape
        columns, memory = _columns([case.dtype] * 2, table.x[0].size)
        (stamps,), beside = _columns(["float32"], len(table.x[0]) + 1)     # the clock is the last
        stamps[...] = 0                                                     # as uint32 too
        k = TOUCHED[case.touched].n
        threads = case.threads if k >= THREADED_FROM_ROWS else 1
        calls = max(1, ROWS_A_CALL // k)
        once = [
            indices[np.sort(np.unique(indices, return_index=True)[1])] for indices in table.indices
        ]
        rows, begins = np.concatenate(once), np.cumsum([0, *map(len, once)])
        arrays = [
            ctypes.c_void_p(a.ctypes.data)
            for a in (*columns, table.values, stamps, stamps[-1:], rows)
        ]
        counts = ctypes.c_int(threads), ctypes.c_int(calls)
        # After the last set comes the first: a call's steps divide them evenly.
        places = cycle([ctypes.c_void_p(a.ctypes.data) for a in begins[:-1].reshape(-1, calls)])

        def step() -> None:
            compiled.limit_rows(*arrays, next(places), *counts)

        return Run(
            step, lambda: [columns[0].reshape(shape)], calls=calls,
            warm_up=len(once) // calls, close=lambda: (memory, beside, rows, begins),
        )

    return Contender(LIMIT, build, jobs=(ROWS,), threaded=True, checked=False)
