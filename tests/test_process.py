"""Forks, signals and threads, each in a process of its own with a time-out."""
from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest

import optcore
from reference import same_bits

posix = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and signals")

PRELUDE = """
import os, signal, sys, threading, time
import numpy as np
import optcore
from optcore.runtime import always_threaded

optcore.set_num_threads(2)
threaded = always_threaded(1000)     # as long as it is kept
threaded.__enter__()

def stepped(n=200_000, steps=3):
    x, g = np.ones(n, np.float32), np.full(n, 0.5, np.float32)
    opt = optcore.SGD(x, lr=0.1, momentum=0.9, max_norm=1e9)
    for _ in range(steps):
        opt.step(g)
    return x

expected = stepped().tobytes()

def check():
    assert stepped().tobytes() == expected

def wait(pid):
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
"""


def run(code, timeout=60, **environment):
    env = {**os.environ, **environment}
    return subprocess.run(
        [sys.executable, "-c", PRELUDE + textwrap.dedent(code)],
        capture_output=True, text=True, timeout=timeout, env=env, check=False,
    )


def succeeds(code, **environment):
    done = run(code, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@posix
def test_a_child_forked_in_the_middle_of_a_step_is_told():
    """The thread that steps is not in the child, and never ends there what it began."""
    succeeds("""
        inside, go = threading.Event(), threading.Event()
        def lr(step):
            inside.set()
            go.wait(60)
            return 0.5
        x, g = np.ones(3), np.ones(3)
        opt = optcore.SGD(x, lr=lr)
        thread = threading.Thread(target=opt.step, args=(g,))
        thread.start()
        assert inside.wait(60)
        def refusal():
            try:
                opt.step(g)
            except RuntimeError as error:
                return str(error)
        pid = os.fork()
        if not pid:
            told = refusal()
            go.set()
            y = np.ones(3)
            optcore.SGD(y, lr=0.5).step(g)
            os._exit(not ("forked while another thread" in told and (y == 0.5).all()))
        wait(pid)
        assert "in use already" in refusal()
        go.set()
        thread.join()
        assert (x == 0.5).all()
        pid = os.fork()
        if not pid:
            os._exit(not opt.step(g))
        wait(pid)
    """)


@posix
def test_fork_after_a_threaded_step():
    succeeds("""
        for _ in range(5):
            pid = os.fork()
            if pid == 0:
                check()
                os._exit(0)
            check()
            wait(pid)
        check()
    """)


@posix
def test_fork_in_grandchildren():
    succeeds("""
        pid = os.fork()
        if pid == 0:
            check()
            inner = os.fork()
            if inner == 0:
                check()
                os._exit(0)
            wait(inner)
            check()
            os._exit(0)
        wait(pid)
        check()
    """)


@posix
def test_fork_from_a_thread():
    succeeds("""
        failures = []
        def body():
            try:
                check()
                pid = os.fork()
                if pid == 0:
                    check()
                    os._exit(0)
                wait(pid)
                check()
            except BaseException as error:
                failures.append(error)
        for _ in range(3):
            thread = threading.Thread(target=body)
            thread.start()
            thread.join()
        assert not failures, failures
        check()
    """)


@posix
def test_multiprocessing_with_fork():
    succeeds("""
        import multiprocessing
        context = multiprocessing.get_context("fork")
        with context.Pool(2) as pool:
            for result in pool.starmap(stepped, [(200_000, 3)] * 6):
                assert result.tobytes() == expected
        check()
    """)


@posix
def test_a_forked_child_has_a_velocity_of_its_own():
    succeeds("""
        x, g = np.ones(1 << 20, np.float32), np.ones(1 << 20, np.float32)
        opt = optcore.SGD(x, lr=0.1, momentum=0.9)
        opt.step(g)
        velocity = opt.state_dict()["state"][0]["velocity"]
        pid = os.fork()
        if pid == 0:
            opt.step(g)
            os._exit(0)
        wait(pid)
        assert (opt.state_dict()["state"][0]["velocity"] == velocity).all()
    """)


@posix
def test_interrupt_during_a_long_step_comes_after_it():
    succeeds("""
        n = 30_000_000
        x, g = np.zeros(n, np.float32), np.ones(n, np.float32)
        opt = optcore.SGD(x, lr=1.0, momentum=0.5)
        opt.step(g)
        interrupted = 0
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        for delay in [0.001, 0.005, 0.01, 0.02] * 5:
            count, first = opt.step_count, x[0]
            try:
                signal.setitimer(signal.ITIMER_REAL, delay)
                opt.step(g)
                time.sleep(10)
            except KeyboardInterrupt:
                interrupted += 1
            assert (x == x[0]).all() and opt.step_count in (count, count + 1)
            assert (x[0] != first) == (opt.step_count == count + 1)
        assert interrupted == 20, interrupted
        opt.step(g)
    """)


def test_one_optimizer_in_two_threads():
    """The second step raises, or comes later; no half step ever."""
    x, g = np.zeros(2_000_000, np.float32), np.ones(2_000_000, np.float32)
    opt = optcore.SGD(x, lr=1.0, momentum=0.0)
    applied, refused = [], []
    start = threading.Barrier(4)

    def body():
        start.wait()
        for _ in range(50):
            try:
                opt.step(g)
                applied.append(1)
            except RuntimeError as error:
                refused.append(str(error))

    threads = [threading.Thread(target=body) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(applied) + len(refused) == 200
    assert all("one step at a time" in message for message in refused)
    assert opt.step_count == len(applied)
    assert (x == -len(applied)).all()
    opt.step(g)


def test_state_is_never_of_half_a_step():
    x, g = np.zeros(2_000_000, np.float32), np.ones(2_000_000, np.float32)
    opt = optcore.SGD(x, lr=1.0, momentum=0.5)
    done = threading.Event()

    def body():
        while not done.is_set():
            try:
                opt.step(g)
            except RuntimeError:    # the state is being read
                time.sleep(0)

    thread = threading.Thread(target=body)
    thread.start()
    for _ in range(100):
        try:
            state = opt.state_dict()
        except RuntimeError:
            continue
        velocity = state["state"][0]["velocity"]
        assert velocity is None or (velocity == velocity[0]).all()
    done.set()
    thread.join()


def test_two_optimizers_in_two_threads():
    rng = np.random.default_rng(0)
    xs = [rng.standard_normal(300_000).astype(np.float32) for _ in range(3)]
    gs = [rng.standard_normal(300_000).astype(np.float32) for _ in range(3)]
    expected = [x.copy() for x in xs]
    for x, g in zip(expected, gs, strict=True):
        opt = optcore.SGD(x, lr=0.1, momentum=0.9)
        for _ in range(20):
            opt.step(g)

    def body(x, g):
        opt = optcore.SGD(x, lr=0.1, momentum=0.9)
        for _ in range(20):
            opt.step(g)

    threads = [threading.Thread(target=body, args=pair) for pair in zip(xs, gs, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for x, y in zip(xs, expected, strict=True):
        assert same_bits(x, y)


@pytest.mark.parametrize("api", ["function", "optimizer"])
def test_the_gil_is_released_while_the_loop_runs(api):
    """Another thread sees a step that has begun and not ended."""
    x, g = np.zeros(20_000_000, np.float32), np.ones(20_000_000, np.float32)
    opt = optcore.SGD(x, lr=1.0, grads=g)
    seen = set()
    done = threading.Event()

    def watch():
        while not done.is_set():
            seen.add((float(x[0]), float(x[-1])))
            time.sleep(0)

    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in range(100):
        if api == "function":
            optcore.sgd_step(x, g, lr=1.0)
        else:
            opt.step()
        if any(first != last for first, last in seen):
            break
    done.set()
    watcher.join()
    assert any(first != last for first, last in seen)


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads in /proc")
def test_threads_are_really_started():
    if optcore.show_config("dicts")["openmp"].startswith("missing"):
        pytest.skip("built without OpenMP")
    succeeds("""
        optcore.set_num_threads(3)
        before = len(os.listdir("/proc/self/task"))
        check()
        assert len(os.listdir("/proc/self/task")) == before + 1     # there were two
    """)


# How many threads there are to use

several = pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2
    or optcore.show_config("dicts")["openmp"].startswith("missing")
    or "OMP_NUM_THREADS" in os.environ or "OPTCORE_NUM_THREADS" in os.environ,
    reason="needs OpenMP, and two CPUs on Linux that nothing but the system gives away",
)

THREADS = """
optcore.set_num_threads(None)

def started(n=1_000_000):
    \"\"\"Threads that a step uses, asked of the system in a thread whose pool is new.\"\"\"
    counts = []
    def body():
        before = set(os.listdir("/proc/self/task"))     # some of them ending
        x = np.ones(n, np.float32)
        optcore.sgd_step(x, x.copy(), lr=0.1)
        counts.append(len(set(os.listdir("/proc/self/task")) - before) + 1)
    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    return counts[0]
"""


@several
def test_affinity_is_asked_at_each_step():
    succeeds(THREADS + textwrap.dedent("""
        cpus = os.sched_getaffinity(0)
        at_first = optcore.get_num_threads()
        assert at_first >= 2 and started() == at_first
        os.sched_setaffinity(0, {min(cpus)})
        assert optcore.get_num_threads() == 1 and started() == 1
        optcore.set_num_threads(2)
        assert optcore.get_num_threads() == 2 and started() == 2
        optcore.set_num_threads(None)
        os.sched_setaffinity(0, cpus)
        assert optcore.get_num_threads() == at_first and started() == at_first
    """))


@several
def test_what_openmp_was_told_holds_against_affinity():
    code = THREADS + textwrap.dedent("""
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        print(optcore.get_num_threads(), started())
    """)
    assert succeeds(code).split() == ["1", "1"]
    assert succeeds(code, OMP_NUM_THREADS="3").split() == ["3", "3"]
    bound = succeeds(code.replace("os.sched_setaffinity", "print"), OMP_PROC_BIND="true").split()
    assert bound[-2:] == [str(len(os.sched_getaffinity(0)))] * 2     # not the caller's one place


@several
def test_quota_is_read_again(tmp_path):
    quota, period, outer = tmp_path / "cpu.cfs_quota_us", tmp_path / "period", tmp_path / "cpu.max"
    period.write_text("50000\n")
    outer.write_text("max 100000\n")
    succeeds(THREADS + textwrap.dedent(f"""
        from pathlib import Path
        from optcore.runtime import watch_cpu_quotas
        quota, outer = Path({str(quota)!r}), Path({str(outer)!r})
        files = [(quota, {str(period)!r}), (outer, None)]
        free = optcore.get_num_threads()

        def threads(inside, outside):
            quota.write_text(inside)
            outer.write_text(outside)
            watch_cpu_quotas(files)
            return optcore.get_num_threads()

        assert threads("50001\\n", "max 100000\\n") == 2      # rounded up
        assert threads("50000\\n", "max 100000\\n") == 1
        assert started() == 1
        assert threads("-1\\n", "max 100000\\n") == free
        assert threads("-1\\n", "150000 100000\\n") == 2
        assert threads("-1\\n", "20000 100000\\n") == 1
        assert threads("10\\n", "x") == 1
        assert threads("", "0 0") == free
        watch_cpu_quotas([("/nowhere", None), ("/nowhere", "/nowhere"), (quota, "/nowhere")])
        assert optcore.get_num_threads() == free
        assert threads("-1\\n", "150000 100000\\n") == 2
        outer.write_text("5000 100000\\n")
        while optcore.get_num_threads() != 1:       # within a second
            time.sleep(0.02)
        assert started() == 1
        optcore.set_num_threads(2)
        assert optcore.get_num_threads() == 2 and started() == 2
    """))


V1, V2 = "cpu.cfs_quota_us", "cpu.max"


@pytest.mark.parametrize(("cgroup", "mount", "files"), [
    pytest.param("0::/a/b", "/ {top} rw - cgroup2 none rw",
                 [f"a/b/{V2}", f"a/{V2}"], id="version 2"),
    pytest.param("3:memory:/a\n2:cpu,cpuacct:/a/b\n1:cpuset:/in\n0::/",
                 "/ {top} rw - cgroup none rw,cpuset\n"
                 "31 1 0:27 / {top} rw - cgroup none rw,cpu,cpuacct",
                 [f"a/b/{V1}", f"a/{V1}", V1], id="version 1"),
    pytest.param("2:cpu:/docker/1f/in", "/docker/1f {top} rw - cgroup none rw,cpu",
                 [f"in/{V1}", V1], id="the mount is of the container's group"),
    pytest.param("2:cpu:/docker/1f", "/elsewhere {top} rw - cgroup none rw,cpu",
                 [V1], id="the mount is of another name"),
    pytest.param("0::/../a", "/ {top} rw - cgroup2 none rw", [], id="outside the namespace"),
    pytest.param("2:memory:/a", "/ {top} rw - cgroup none rw,memory", [], id="other controllers"),
])
def test_where_the_quotas_are(tmp_path, cgroup, mount, files):
    from optcore._cgroups import cpu_quota_files

    top = tmp_path / "cgroups"
    for folder in ("a/b", "in"):
        (top / folder).mkdir(parents=True)
    for folder in ("", "a", "a/b", "in"):
        (top / folder / V1).touch()
        if folder:      # the root has none in version 2
            (top / folder / V2).touch()
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / V2).touch()       # of others
    (tmp_path / "cgroup").write_text(cgroup + "\n")
    (tmp_path / "mountinfo").write_text(
        "1 0 8:1 / / rw shared:1 - ext4 /dev/vda rw\n"
        f"30 1 0:26 {mount.format(top=top)}\n"
    )
    found = cpu_quota_files(str(tmp_path))
    assert [quota for quota, _ in found] == [top / name for name in files]
    assert all(period == (None if quota.name == V2 else quota.with_name("cpu.cfs_period_us"))
               for quota, period in found)
    assert cpu_quota_files(str(tmp_path / "nowhere")) == []


@pytest.mark.skipif(sys.platform != "linux", reason="knows Linux's limit of threads")
def test_a_limit_of_threads_is_no_end_of_the_process():
    """Under RLIMIT_NPROC, which counts all of a user's threads, and spares root."""
    if optcore.show_config("dicts")["openmp"].startswith("missing"):
        pytest.skip("built without OpenMP")
    out = succeeds("""
        import resource, warnings
        alone = os.getuid() == 0
        try:
            if alone:
                os.setuid(54321)
        except PermissionError:
            print("no other user")
            sys.exit()
        tasks = lambda: len(os.listdir("/proc/self/task"))      # no thread ends here
        hard = resource.getrlimit(resource.RLIMIT_NPROC)[1]
        limit = lambda n: resource.setrlimit(resource.RLIMIT_NPROC, (n, hard))

        optcore.set_num_threads(7)
        limit(1)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            check()
            check()
        assert [w.category for w in caught] == [RuntimeWarning], caught
        assert "no more than 2 threads for a step, the calling one included" in (
            str(caught[0].message))

        for threads in (3, 1000):
            try:
                optcore.set_num_threads(threads)
            except RuntimeError as error:
                assert str(error) == (
                    f"n is {threads}, but the system gives this process no more than 2 threads "
                    "for a step, the calling one included: raise its limit (ulimit -u, or "
                    "pids.max of the container) or ask for 2")
            else:
                raise AssertionError(threads)
            assert optcore.get_num_threads() == 7
        optcore.set_num_threads(2)
        check()

        if alone:       # the limit counts nobody else: to the last thread
            for more in (1, 3):
                before = tasks()
                limit(before + more)
                try:
                    optcore.set_num_threads(9)
                except RuntimeError as error:
                    had = int(str(error).rpartition(" ")[2])
                optcore.set_num_threads(had)
                check()
                assert tasks() == before + more
        print("done")
    """, OPENBLAS_NUM_THREADS="1")
    if "no other user" in out:
        pytest.skip("cannot become another user")
    assert out.strip() == "done"


def test_threads_that_a_build_without_openmp_has_not():
    if not optcore.show_config("dicts")["openmp"].startswith("missing"):
        pytest.skip("built with OpenMP")
    with pytest.warns(RuntimeWarning, match="n is 2, but optcore was built without OpenMP"):
        optcore.set_num_threads(2)
    assert optcore.get_num_threads() == 1
    optcore.set_num_threads(None)


# Environment and configuration

def test_simd_is_forced_from_the_environment():
    from optcore.runtime import simd_levels_available

    for level in simd_levels_available():
        out = succeeds("""
            print(optcore.show_config("dicts")["simd used"])
        """, OPTCORE_SIMD=level)
        assert out.strip() == level


def test_simd_the_cpu_lacks_is_an_error_that_lists_what_it_has():
    done = run("", OPTCORE_SIMD="avx1024")
    assert done.returncode != 0
    assert "OPTCORE_SIMD must be one of the SIMD levels this CPU and build have (baseline" in (
        done.stderr
    )


def test_threads_from_the_environment():
    code = "import optcore; print(optcore.get_num_threads())"

    def threads(**environment):
        env = {k: v for k, v in os.environ.items()
               if k not in ("OMP_NUM_THREADS", "OPTCORE_NUM_THREADS")}
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                              env={**env, **environment}, check=False)

    if optcore.show_config("dicts")["openmp"].startswith("missing"):
        pytest.skip("built without OpenMP")
    assert threads(OMP_NUM_THREADS="3").stdout.strip() == "3"
    assert threads(OMP_NUM_THREADS="3", OPTCORE_NUM_THREADS="5").stdout.strip() == "5"
    for bad in ("zero", "0", "-1", "1.5", "9999"):
        done = threads(OPTCORE_NUM_THREADS=bad)
        assert done.returncode != 0
        assert f"OPTCORE_NUM_THREADS must be a whole number in [1, 1024], got {bad!r}" in (
            done.stderr
        )


def test_threadpoolctl_is_honoured():
    threadpoolctl = pytest.importorskip("threadpoolctl")
    if optcore.show_config("dicts")["openmp"].startswith("missing"):
        pytest.skip("built without OpenMP")
    optcore.set_num_threads(None)
    with threadpoolctl.threadpool_limits(1):
        assert optcore.get_num_threads() == 1
    with threadpoolctl.threadpool_limits(2):
        assert optcore.get_num_threads() == 2


def test_set_num_threads():
    before = optcore.get_num_threads()
    if not optcore.show_config("dicts")["openmp"].startswith("missing"):
        optcore.set_num_threads(3)
        assert optcore.get_num_threads() == 3
    optcore.set_num_threads(None)
    assert optcore.get_num_threads() == before
    for bad, error in [(0, ValueError), (-1, ValueError), (2000, ValueError), (1.0, TypeError),
                       ("2", TypeError), (True, TypeError)]:
        with pytest.raises(error, match="n must"):
            optcore.set_num_threads(bad)


def test_show_config(capsys):
    assert optcore.show_config() is None
    printed = capsys.readouterr().out
    config = optcore.show_config("dicts")
    for word in ("optcore:", "compiler:", "flags:", "link flags:", "baseline:", "simd built:",
                 "simd available:", "simd used:", "threads:", "openmp:"):
        assert word in printed
    assert config["optcore"] == optcore.__version__
    done = subprocess.run([sys.executable, "-m", "optcore"], capture_output=True, text=True,
                          check=True)
    assert done.stdout == printed
    with pytest.raises(ValueError, match="mode must be 'stdout' or 'dicts', got 'json'"):
        optcore.show_config("json")


IN_A_SUBINTERPRETER = """
try:
    import optcore
    found = "imported"
except ImportError as error:
    found = f"ImportError: {error}"
with open(PATH, "w") as file:
    file.write(found)
"""


def test_a_subinterpreter_is_refused(tmp_path):
    """An ImportError, not half an engine; the first interpreter goes on."""
    found = tmp_path / "found"
    code = IN_A_SUBINTERPRETER.replace("PATH", repr(str(found)))
    succeeds(f"""
        import importlib

        for name in ("_interpreters", "_xxsubinterpreters"):
            try:
                interpreters = importlib.import_module(name)
                break
            except ModuleNotFoundError:
                continue
        interpreters.run_string(interpreters.create(), {code!r})
        x = np.ones(3)
        optcore.sgd_step(x, np.ones(3), lr=1.0)
        assert not x.any()
    """)
    assert "ImportError" in found.read_text()
    assert "interpreter" in found.read_text()
