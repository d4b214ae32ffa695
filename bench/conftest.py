"""How a case is measured: its implementations in turn, several times over, checked first."""
from __future__ import annotations

import gc
import time
from functools import lru_cache
from pathlib import Path

import pytest
from cases import Arrays
from contenders import NUMPY
from limit import NoCompilerError
from tables import Table
from training import TIMED_STEPS, WARM_UP_STEPS, Training, round_trip

import optcore

# One round of a fast step lasts at least this long; the clock and the loop around it cost
# some 50 ns a round and a call.
ROUND_SECONDS = 200e-6
# A new array's pages arrive with its first step, which takes many times as long as the others.
WARM_UP_SECONDS = 20e-3


def pytest_addoption(parser):
    group = parser.getgroup("optcore")
    group.addoption("--quick", action="store_true", help="fewer sizes and models")
    group.addoption("--repeats", type=int, default=3, help="times that each case is measured")
    group.addoption("--threads", type=int, default=1, help="threads of this run")
    group.addoption(
        "--build-folder", type=Path, default=Path("build/bench"), help="where C code is built"
    )


@lru_cache(maxsize=1)
def arrays_of(case):
    """Return the arrays of the case being measured; those of the last one are freed."""
    return (Table if case.touched else Training if case.training else Arrays)(case)


@lru_cache(maxsize=1)
def checked(case):
    """Return the names of a case's contenders that have proved equal to the reference."""
    return set()


def warm_up(it):
    """Step until memory is there and caches hold what they can: a trainer's step is never cold."""
    end = time.perf_counter() + WARM_UP_SECONDS
    for _ in range(it.warm_up):
        it.step()
    while time.perf_counter() < end:
        it.step()


@pytest.fixture
def measure(benchmark, request):
    """Check a contender against the reference, and time it: ``measure(case, repeat, it)``."""
    folder = request.config.getoption("--build-folder")

    def time_alone(case, contender, arrays, it):
        if contender.checked and contender.name not in checked(case):
            arrays.check(it, exact=contender.exact)
            checked(case).add(contender.name)
        warm_up(it)
        benchmark(it.step)

    def distance():
        try:
            return round_trip(folder)
        except NoCompilerError:
            return None             # the figures can be had without; the report shows a dash

    def time_in_training(contender, arrays, it):
        trips = [distance()]
        benchmark.pedantic(
            it.step, setup=arrays.backward, rounds=TIMED_STEPS, warmup_rounds=WARM_UP_STEPS
        )
        trips.append(distance())
        if None not in trips:
            benchmark.extra_info["round_trip"] = round(max(trips))
        # NumPy's own steps of these rules are the reference's, written otherwise
        arrays.check_trained(exact=contender.exact or contender in NUMPY)

    def run(case, repeat, contender):
        arrays = arrays_of(case)
        benchmark.group = f"{case.job} {case.workload} {case.variant} {case.threads}"
        optcore.set_num_threads(case.threads)
        arrays.reset()
        with contender.at_level():
            it = contender.build(case, arrays)
            if case.training:
                time_in_training(contender, arrays, it)
            else:
                time_alone(case, contender, arrays, it)
        benchmark.extra_info.update(
            vars(case), repeat=repeat, contender=contender.name, calls=it.calls,
            n_bytes=case.n_bytes,
        )
        it.close()
        del it
        gc.collect()        # before the next contender allocates: some own cycles of tensors

    return run


def pytest_configure(config):
    config.option.benchmark_disable_gc = True
    config.option.benchmark_min_time = ROUND_SECONDS
    config.option.benchmark_quiet = True


def pytest_collection_finish(session):
    """Keep what the imports left out of every later collection: it is most of the heap."""
    gc.collect()
    gc.freeze()


def pytest_benchmark_update_machine_info(config, machine_info):
    """Leave out who owns the machine and what it is called."""
    machine_info.clear()
