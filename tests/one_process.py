"""Import four users of OpenMP in the order given, use all, and see that optcore minds none.

    python tests/one_process.py RUNS PACKAGE...

Each has a copy of the library of its own, or the system's; but the first one that shows its
symbols to all, as PyTorch does, serves those that come later. Steps have the right bits, the
threads that were asked for, limits that hold, and end in forked children too.

The last run is of the process that imported; those before it are of children, forked before
anything was used.
"""
from __future__ import annotations

import faulthandler
import importlib
import os
import signal
import sys
import threading
from pathlib import Path

N = 300_000
THREADS = 3


def watch(seconds):
    """Show where this process is and end it, if it hangs."""
    faulthandler.register(signal.SIGALRM, chain=True)
    signal.alarm(seconds)


def loaded():
    """Files of OpenMP's libraries in this process."""
    maps = Path("/proc/self/maps").read_text().split()
    return sorted({word for word in maps if "/" in word and "omp" in Path(word).name
                   and Path(word).name.startswith(("libgomp", "libomp", "libiomp"))})


def use_others():
    assert torch.ones(1 << 20).mul(2).sum() == 2 << 20
    x = np.repeat(np.eye(2), 2000, axis=0)
    assert sklearn.cluster.KMeans(2, n_init=1, random_state=0).fit(x).inertia_ == 0
    assert numba_prange.total(1 << 20) == 1 << 20


def expected():
    x, g, v = arrays()
    for _ in range(3):
        v = np.float32(0.9) * v + g
        x = x - np.float32(0.1) * v
    return x


def arrays():
    rng = np.random.default_rng(0)
    return rng.standard_normal(N, np.float32), rng.standard_normal(N, np.float32), np.zeros(
        N, np.float32)


def check(threads):
    """Step in a thread whose pool is new: the bits, and how many threads the system shows."""
    seen = []

    def body():
        x, g, _ = arrays()
        opt = optcore.SGD(x, lr=0.1, momentum=0.9)
        before = set(os.listdir("/proc/self/task"))
        for _ in range(3):
            opt.step(g)
        seen.append(len(set(os.listdir("/proc/self/task")) - before) + 1)
        seen.append(x.tobytes() == RIGHT)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == [threads, True], (seen, threads)


def step_here():
    x, g, _ = arrays()
    opt = optcore.SGD(x, lr=0.1, momentum=0.9)
    for _ in range(3):
        opt.step(g)
    assert x.tobytes() == RIGHT


def in_child(work):
    pid = os.fork()
    if pid == 0:
        watch(60)
        work()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def step_with_threads():
    step_here()
    check(THREADS)


def run():
    watch(100)
    use_others()
    optcore.set_num_threads(THREADS)
    in_child(step_with_threads)     # before this process has stepped: pools are the others'
    step_with_threads()
    use_others()
    step_here()
    in_child(step_with_threads)
    check(THREADS)

    optcore.set_num_threads(None)
    for limit in (1, 2):
        with threadpoolctl.threadpool_limits(limit):
            assert optcore.get_num_threads() == limit
            step_here()


if __name__ == "__main__":
    watch(100)
    runs, *packages = sys.argv[1:]
    for package in packages:
        importlib.import_module(package)

    import numba_prange
    import numpy as np
    import sklearn.cluster
    import threadpoolctl
    import torch

    import optcore
    from optcore.runtime import always_threaded

    always = always_threaded(1000)
    always.__enter__()
    RIGHT = expected().tobytes()
    for _ in range(int(runs) - 1):
        watch(200)
        in_child(run)
    run()
    print(*loaded(), sep="\n")
