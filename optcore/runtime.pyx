"""CPU features, thread count, fork guard: what the process runs on."""
import os
import sys
import warnings
from contextlib import contextmanager

from cython cimport critical_section
from libc.math cimport INFINITY, ceil
from libc.stdio cimport FILE, fclose, fopen, fscanf
from optcore.atomic cimport seize
from optcore.simd cimport X86_LEVELS

from optcore._cgroups import cpu_quota_files
from optcore._version import __version__

cdef enum:
    MOST_QUOTAS = 32

cdef extern from *:
    """
    #if OPTCORE_X86_LEVELS
      /* __builtin_cpu_supports asks the operating system too (XGETBV). */
      static int optcore_cpu_level(void) {
        __builtin_cpu_init();
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
          return 2;
        return __builtin_cpu_supports("avx2") ? 1 : 0;
      }
    #else
      static int optcore_cpu_level(void) { return 0; }
    #endif

    #if defined(_OPENMP)
      #include <omp.h>
      #define OPTCORE_OPENMP _OPENMP
    #else
      #define OPTCORE_OPENMP 0
      static int omp_get_max_threads(void) { return 1; }
      static double omp_get_wtime(void) { return 0; }
    #endif

    #include <time.h>
    #if defined(CLOCK_THREAD_CPUTIME_ID)
      static double optcore_own_time(void) {
        struct timespec t;
        clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
        return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
      }
    #else
      #define optcore_own_time omp_get_wtime
    #endif

    #if defined(_MSC_VER)
      #define OPTCORE_THREAD_LOCAL __declspec(thread)
    #else
      #define OPTCORE_THREAD_LOCAL __thread
    #endif
    /* Of the calling thread: sweeps left to do alone, and how many the last loss cost. */
    static OPTCORE_THREAD_LOCAL int optcore_alone = 0;
    static OPTCORE_THREAD_LOCAL int optcore_penalty = 0;
    /* Of the calling thread: how many threads its pool has, itself included; since when is
       known what follows: how many threads could be had, whether no more could, and how many
       CPUs the quota is worth. */
    static OPTCORE_THREAD_LOCAL int optcore_pool = 1;
    static OPTCORE_THREAD_LOCAL double optcore_looked = -1e9;
    static OPTCORE_THREAD_LOCAL int optcore_had = 0;
    static OPTCORE_THREAD_LOCAL int optcore_refused = 0;
    static OPTCORE_THREAD_LOCAL int optcore_quota = 0;
    static long optcore_forks = 0;

    /* Of the process; set by any thread and read by others in the middle of their steps. */
    static OPTCORE_ATOMIC(int) optcore_level = 0;
    static OPTCORE_ATOMIC(int) optcore_threads_set = 0;     /* 0: the default of get_num_threads */
    /* What OpenMP counted for itself; 0: it was told. Any other number it is found with, it was
       told. */
    static OPTCORE_ATOMIC(int) optcore_counted = 0;
    /* Measured: float32 SGD gains from a second thread above 90,000 elements, momentum above
       60,000. */
    static OPTCORE_ATOMIC(Py_ssize_t) optcore_elements_per_thread = 48 * 1024;
    static OPTCORE_ATOMIC(int) optcore_backs_off = 1;
    static long optcore_told_of_missing = 0;
    /* Of each cgroup with a CPU quota: its file, and that of the period where it has one. */
    static OPTCORE_ATOMIC(int) optcore_n_quotas = 0;
    static OPTCORE_ATOMIC(const char *) optcore_quotas[32][2];

    #if !defined(_WIN32)
      #include <pthread.h>
      #include <sched.h>
      #include <stdlib.h>
      #include <unistd.h>
      #if defined(__linux__)
        #include <sys/syscall.h>
      #endif

      /* The worker threads do not exist in a forked child, but the pool that lists
         them does, and the next parallel region waits for them for ever (libgomp,
         and libomp too). Giving the forking thread's pool up before the fork cures
         it; the next region builds a new one. Not only a pool of ours: the library may
         be another's too, which built one (PyTorch lends its own to whoever comes later). */
      static void optcore_before_fork(void) {
        #if defined(_OPENMP) && (_OPENMP >= 201811 || __GNUC__ >= 9)
          omp_pause_resource_all(omp_pause_soft);
        #endif
        optcore_pool = 1;
      }
      static void optcore_in_child(void) {
        optcore_forks++;
        optcore_looked = -1e9;
      }
      static int optcore_guard_forks(void) {
        return pthread_atfork(optcore_before_fork, NULL, optcore_in_child);
      }

      /* OpenMP ends the process when it cannot start a thread (RLIMIT_NPROC, pids.max, no room
         for a stack). Only starting them tells how many can be had, all at once; they end when
         the last is there. */
      typedef struct { pthread_mutex_t *gate; pthread_t thread; long id; } optcore_trial;
      static void *optcore_pass(void *trial_) {
        optcore_trial *trial = (optcore_trial *)trial_;
        #if defined(__linux__)
          trial->id = syscall(SYS_gettid);
        #endif
        pthread_mutex_lock(trial->gate);
        pthread_mutex_unlock(trial->gate);
        return NULL;
      }
      static int optcore_startable(int wanted) {
        pthread_mutex_t gate = PTHREAD_MUTEX_INITIALIZER;
        optcore_trial *trials = (optcore_trial *)malloc(wanted * sizeof(optcore_trial));
        int i, n = 0;
        if (trials == NULL) return 0;
        pthread_mutex_lock(&gate);
        for (; n < wanted; n++) {
          trials[n].gate = &gate;
          if (pthread_create(&trials[n].thread, NULL, optcore_pass, &trials[n])) break;
        }
        pthread_mutex_unlock(&gate);
        for (i = 0; i < n; i++) {
          pthread_join(trials[i].thread, NULL);
          #if defined(__linux__)
            /* One that was joined may count against the limits for a moment more. */
            for (int k = 0; k < 10000; k++) {
              if (syscall(SYS_tgkill, getpid(), trials[i].id, 0)) break;
              sched_yield();
            }
          #endif
        }
        free(trials);
        return n;
      }
    #else
      static int optcore_guard_forks(void) { return 0; }
      static int optcore_startable(int wanted) { return wanted; }
    #endif

    /* CPUs the calling thread may run on, now. Where OpenMP binds threads, each to its own, it
       alone knows; elsewhere it may have counted long ago. */
    #if defined(_OPENMP)
      static int optcore_cpus(void) {
        #if defined(__linux__) && defined(CPU_COUNT)
          cpu_set_t set;
          if (omp_get_proc_bind() == omp_proc_bind_false &&
              sched_getaffinity(0, sizeof set, &set) == 0)
            return CPU_COUNT(&set);
        #endif
        return omp_get_num_procs();
      }
    #else
      static int optcore_cpus(void) { return 1; }
    #endif

    #if defined(__clang__)
      #define OPTCORE_COMPILER "clang " __clang_version__
    #elif defined(__GNUC__)
      #define OPTCORE_COMPILER "GCC " __VERSION__
    #elif defined(_MSC_VER)
      #define OPTCORE_STRING_(x) #x
      #define OPTCORE_STRING(x) OPTCORE_STRING_(x)
      #define OPTCORE_COMPILER "MSVC " OPTCORE_STRING(_MSC_VER)
    #else
      #define OPTCORE_COMPILER "unknown"
    #endif
    /* What the narrowest loops may use: the compiler's word, whatever flags or wrapper said it. */
    static const char *OPTCORE_BASELINE = ""
    #if defined(__x86_64__) || defined(_M_X64)
      "x86-64"
    #elif defined(__aarch64__) || defined(_M_ARM64)
      "aarch64"
    #else
      "generic"
    #endif
    #if defined(__SSE4_2__)
      " sse4.2"
    #endif
    #if defined(__AVX__)
      " avx"
    #endif
    #if defined(__AVX2__)
      " avx2"
    #endif
    #if defined(__AVX512F__)
      " avx512"
    #endif
    #if defined(__ARM_FEATURE_SVE)
      " sve"
    #endif
    ;
    #ifndef OPTCORE_FLAGS
      #define OPTCORE_FLAGS "unknown"
      #define OPTCORE_LINK_FLAGS "unknown"
    #endif
    """
    int optcore_cpu_level() nogil
    int optcore_guard_forks() nogil
    int optcore_startable(int wanted) nogil
    int optcore_cpus() nogil
    int omp_get_max_threads() nogil
    double omp_get_wtime() nogil
    double optcore_own_time() nogil
    int optcore_alone, optcore_penalty
    int optcore_pool, optcore_had, optcore_refused, optcore_quota
    double optcore_looked
    long optcore_forks
    int optcore_level, optcore_threads_set, optcore_counted
    int optcore_backs_off, optcore_n_quotas
    long optcore_told_of_missing
    Py_ssize_t optcore_elements_per_thread
    const char *optcore_quotas[MOST_QUOTAS][2]
    const long OPTCORE_OPENMP
    const char *OPTCORE_COMPILER
    const char *OPTCORE_BASELINE
    const char *OPTCORE_FLAGS
    const char *OPTCORE_LINK_FLAGS

# In the order of their numbers in the kernel table.
LEVELS = ("baseline", "avx2", "avx512")

cdef enum:
    MOST_ALONE = 256
    MOST_THREADS = 1024

_quota_paths = []       # every name they ever had: another thread may be reading its file

cdef int simd_level() noexcept nogil:
    return optcore_level


cdef double cpus_of(const char *quota_file, const char *period_file) noexcept nogil:
    """CPUs that a cgroup's quota is worth; infinite without one."""
    cdef long long quota = -1, period = 100000
    cdef FILE *file = fopen(quota_file, "re")
    if file == NULL:
        return INFINITY
    if fscanf(file, "%lld %lld", &quota, &period) < 1:      # "max", no number
        quota = -1
    fclose(file)
    if period_file != NULL:
        file = fopen(period_file, "re")
        if file == NULL:
            return INFINITY
        if fscanf(file, "%lld", &period) < 1:
            quota = -1
        fclose(file)
    return <double>quota / period if quota > 0 and period > 0 else INFINITY


cdef void look_again() noexcept nogil:
    """Forget what may have changed outside, and read the quotas, once a second."""
    global optcore_looked, optcore_had, optcore_refused, optcore_quota
    cdef double now = omp_get_wtime()
    cdef double cpus = MOST_THREADS
    cdef int i
    if now - optcore_looked < 1:
        return
    optcore_looked = now
    optcore_had = optcore_refused = 0
    for i in range(optcore_n_quotas):
        cpus = min(cpus, ceil(cpus_of(optcore_quotas[i][0], optcore_quotas[i][1])))
    optcore_quota = <int>cpus


cdef int threads_wanted() noexcept nogil:
    cdef int told = optcore_threads_set
    if not OPTCORE_OPENMP:
        return 1
    look_again()
    if told:
        return told
    told = min(omp_get_max_threads(), MOST_THREADS)
    if told != optcore_counted:
        return told
    return min(told, optcore_cpus(), optcore_quota)


cdef int threads_to_be_had(int most) noexcept nogil:
    """As many of `most` threads as the calling one's next parallel region can have.

    Another user of OpenMP may have shrunk the pool, and another process may take what was
    found free: this is as far as it can be known.
    """
    global optcore_had, optcore_refused
    if most > optcore_pool and most > optcore_had and not optcore_refused:
        optcore_had = optcore_pool + optcore_startable(most - optcore_pool)
        optcore_refused = optcore_had < most
    return min(most, max(optcore_pool, optcore_had))


cdef int threads_for(Py_ssize_t n_elements) noexcept nogil:
    """Threads worth waking for a sweep over this many elements."""
    global optcore_alone, optcore_pool
    cdef Py_ssize_t least = optcore_elements_per_thread
    cdef int most
    if n_elements < 2 * least:
        return 1
    most = threads_wanted()
    if most > n_elements // least:
        most = <int>(n_elements // least)
    if most > 1 and optcore_alone > 0 and optcore_backs_off:
        optcore_alone -= 1
        return 1
    if most > 1:
        most = threads_to_be_had(most)
    if most > 1:
        optcore_pool = most     # libgomp ends those that a smaller region leaves over
    return most


cdef long forks() noexcept nogil:
    """How many forks lie between the first process that imported this and the present one."""
    return optcore_forks


cdef double wall_time() noexcept nogil:
    return omp_get_wtime()


cdef double own_time() noexcept nogil:
    """Time this thread has had a core for."""
    return optcore_own_time()


cdef void note_threads(double own, double total) noexcept nogil:
    """Learn from a threaded sweep: `total` seconds for `own` seconds of all threads' work.

    Threads that find their cores taken, by a BLAS whose workers spin after every product for
    one, arrive milliseconds late, and the sweep has to wait for them. One that would have been
    done sooner alone makes the next ones go alone: 1, then 2, 4, 8, …; one that gained halves
    that again. The bits are the same either way.
    """
    global optcore_alone, optcore_penalty
    if total > own:
        optcore_penalty = min(2 * optcore_penalty, MOST_ALONE) if optcore_penalty else 1
    else:
        optcore_penalty //= 2
    optcore_alone = optcore_penalty


def simd_levels_built():
    """Names of the SIMD levels this build carries, narrowest first."""
    return LEVELS if X86_LEVELS else LEVELS[:1]


def simd_levels_available():
    """Names of the SIMD levels that this build carries and this CPU runs, narrowest first."""
    return LEVELS[: optcore_cpu_level() + 1]


def simd_level_used():
    """Name of the SIMD level in use."""
    return LEVELS[optcore_level]


def _set_simd(level, source="level"):
    global optcore_level
    available = simd_levels_available()
    if level not in available:
        raise ValueError(
            f"{source} must be one of the SIMD levels this CPU and build have "
            f"({', '.join(available)}), got {level!r}"
        )
    optcore_level = LEVELS.index(level)


@contextmanager
def simd(level):
    """Run the body at one SIMD level; for tests and benchmarks, in one thread.

    Parameters
    ----------
    level : str
        One of `simd_levels_available()`.

    Raises
    ------
    ValueError
        If this CPU or build lacks the level.
    """
    before = simd_level_used()
    _set_simd(level)
    try:
        yield
    finally:
        _set_simd(before)


def get_num_threads():
    """Return how many threads a large step may use now.

    The first of these that was given holds, however many CPUs there are:

    1. `set_num_threads`, or ``OPTCORE_NUM_THREADS``;
    2. what OpenMP was told: ``OMP_NUM_THREADS``, ``omp_set_num_threads`` or threadpoolctl.

    Without them it is the least of three numbers: the CPUs that OpenMP counted when the process
    started; those that the calling thread may run on (``sched_getaffinity``, asked at each large
    step); and, rounded up, those that the CPU quota of the process's cgroup is worth, or that of
    a group around it (version 1 or 2; the groups are found at import and again by
    ``set_num_threads(None)``, their quotas read once a second). Affinity and quota are known on
    Linux alone.

    Always 1 where optcore was built without OpenMP.

    See Also
    --------
    set_num_threads : Set it, and what happens where the system has fewer threads to give.
    """
    return threads_wanted()


def set_num_threads(n, *, _source="n"):
    """Set how many threads a large step may use, for the whole process.

    Results have the same bits for every number of threads. A step too small to gain from
    threads stays on the calling thread whatever is set here.

    A step that the system will not give so many threads (``RLIMIT_NPROC``, a container's
    ``pids.max``) takes those it can have, and warns the first time. OpenMP would end the process;
    so the threads are tried before it starts them.

    Parameters
    ----------
    n : int or None
        At least 1; None returns to the default of `get_num_threads`.

    Raises
    ------
    TypeError
        If `n` is neither an int nor None.
    ValueError
        If `n` is less than 1 or more than 1024.
    RuntimeError
        If the system will not give this process so many threads now.

    Warns
    -----
    RuntimeWarning
        If `n` is more than 1 and optcore was built without OpenMP: steps then run on one thread.
    """
    global optcore_threads_set, optcore_looked
    if n is None:
        optcore_threads_set = 0
        watch_cpu_quotas(cpu_quota_files())
        return
    if isinstance(n, bool) or not hasattr(type(n), "__index__"):
        raise TypeError(f"{_source} must be an int or None, got {type(n).__name__}")
    n = n.__index__()
    if not 1 <= n <= MOST_THREADS:
        raise ValueError(f"{_source} must lie in [1, {MOST_THREADS}], got {n}")
    if n > 1 and not OPTCORE_OPENMP:
        warnings.warn(
            f"{_source} is {n}, but optcore was built without OpenMP: steps run on one thread",
            RuntimeWarning, stacklevel=2,
        )
    elif n > 1:
        optcore_looked = -1e9
        look_again()
        had = threads_to_be_had(n)
        optcore_looked = -1e9       # a step tries for itself
        if had < n:
            raise RuntimeError(f"{_source} is {n}, but {no_more_threads(had)} or ask for {had}")
    optcore_threads_set = n


def no_more_threads(had):
    return (
        f"the system gives this process no more than {had} threads for a step, the calling one "
        "included: raise its limit (ulimit -u, or pids.max of the container)"
    )


cdef void tell_of_missing_threads() noexcept:
    """Warn, once, if the calling thread's last step had fewer threads than it wanted."""
    if optcore_refused and seize(&optcore_told_of_missing, 1) == 0:
        warnings.warn(
            f"steps use fewer threads than they should: {no_more_threads(optcore_had)} or ask "
            "for fewer with optcore.set_num_threads", RuntimeWarning, stacklevel=1,
        )


def watch_cpu_quotas(files):
    """Take the quotas in these pairs of files, (quota, period or None), in place of others."""
    global optcore_n_quotas, optcore_looked
    cdef int i
    paths = [
        [None if name is None else os.fsencode(name) for name in pair] for pair in files
    ][:MOST_QUOTAS]
    with critical_section(set_num_threads):     # one thread at a time
        optcore_looked = -1e9
        if _quota_paths and paths == _quota_paths[-1]:
            return
        _quota_paths.append(paths)
        optcore_n_quotas = 0
        for i, (quota, period) in enumerate(paths):
            optcore_quotas[i][0] = <bytes>quota
            optcore_quotas[i][1] = NULL
            if period is not None:
                optcore_quotas[i][1] = <bytes>period
        optcore_n_quotas = len(paths)


@contextmanager
def always_threaded(least=1):
    """Run the body with threads for every sweep of two times `least` elements; for tests."""
    global optcore_elements_per_thread, optcore_backs_off
    before = optcore_elements_per_thread, optcore_backs_off
    optcore_elements_per_thread, optcore_backs_off = least, False
    try:
        yield
    finally:
        optcore_elements_per_thread, optcore_backs_off = before


def config():
    """Return what `optcore.show_config` prints, as a dictionary."""
    return {
        "optcore": __version__,
        "python": sys.version.split()[0],
        "compiler": OPTCORE_COMPILER.decode().strip(),
        "flags": OPTCORE_FLAGS.decode(),
        "link flags": OPTCORE_LINK_FLAGS.decode(),
        "openmp": str(OPTCORE_OPENMP) if OPTCORE_OPENMP else (
            "missing: every step runs on one thread (build optcore with a compiler that has OpenMP)"
        ),
        "baseline": OPTCORE_BASELINE.decode(),
        "simd built": " ".join(simd_levels_built()),
        "simd available": " ".join(simd_levels_available()),
        "simd used": simd_level_used(),
        "threads": get_num_threads(),
    }


def _read_environment():
    global optcore_counted, optcore_threads_set
    level = os.environ.get("OPTCORE_SIMD")
    _set_simd(level or simd_levels_available()[-1], "OPTCORE_SIMD")
    watch_cpu_quotas(cpu_quota_files())
    told = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    optcore_counted = 0 if told == str(omp_get_max_threads()) else omp_get_max_threads()
    threads = os.environ.get("OPTCORE_NUM_THREADS")
    if threads:
        try:
            set_num_threads(int(threads), _source="OPTCORE_NUM_THREADS")
        except ValueError:
            raise ValueError(
                f"OPTCORE_NUM_THREADS must be a whole number in [1, 1024], got {threads!r}"
            ) from None
        except RuntimeError as error:       # steps will use what they can have
            warnings.warn(str(error), RuntimeWarning, stacklevel=1)
            optcore_threads_set = int(threads)


if optcore_guard_forks():
    raise MemoryError("pthread_atfork failed")
_read_environment()
