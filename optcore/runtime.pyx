"""CPU features, thread count, fork guard: what the process runs on."""
import os
import sys
from contextlib import contextmanager

from optcore.simd cimport X86_LEVELS

from optcore._version import __version__

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

    /* The worker threads do not exist in a forked child, but the pool that lists
       them does, and the next parallel region waits for them for ever (libgomp,
       and libomp too). Giving the forking thread's pool up before the fork cures
       it; the next region builds a new one. */
    #if defined(_OPENMP) && !defined(_WIN32) && (_OPENMP >= 201811 || __GNUC__ >= 9)
      #include <pthread.h>
      static OPTCORE_THREAD_LOCAL int optcore_threaded = 0;    /* has a pool */
      static void optcore_before_fork(void) {
        if (optcore_threaded) omp_pause_resource_all(omp_pause_soft);
      }
      static int optcore_guard_forks(void) {
        return pthread_atfork(optcore_before_fork, NULL, NULL);
      }
      #define optcore_note_threads() (optcore_threaded = 1)
    #else
      static int optcore_guard_forks(void) { return 0; }
      #define optcore_note_threads() ((void)0)
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
    void optcore_note_threads() nogil
    int omp_get_max_threads() nogil
    double omp_get_wtime() nogil
    double optcore_own_time() nogil
    int optcore_alone, optcore_penalty
    const long OPTCORE_OPENMP
    const char *OPTCORE_COMPILER
    const char *OPTCORE_BASELINE
    const char *OPTCORE_FLAGS
    const char *OPTCORE_LINK_FLAGS

# In the order of their numbers in the kernel table.
LEVELS = ("baseline", "avx2", "avx512")

cdef int _simd_level = 0
cdef int _num_threads = 0  # 0: whatever OpenMP would use
# Measured: float32 SGD gains from a second thread above 90,000 elements, momentum above 60,000.
cdef Py_ssize_t _elements_per_thread = 48 * 1024
cdef bint _backs_off = True

cdef enum:
    MOST_ALONE = 256

cdef int simd_level() noexcept nogil:
    return _simd_level


cdef int threads_for(Py_ssize_t n_elements) noexcept nogil:
    """Threads worth waking for a sweep over this many elements."""
    global optcore_alone
    cdef int most
    if n_elements < 2 * _elements_per_thread:
        return 1
    most = _num_threads if _num_threads else omp_get_max_threads()
    if most > n_elements // _elements_per_thread:
        most = <int>(n_elements // _elements_per_thread)
    if most > 1 and optcore_alone > 0 and _backs_off:
        optcore_alone -= 1
        return 1
    if most > 1:
        optcore_note_threads()
    return most


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
    return LEVELS[_simd_level]


def _set_simd(level, source="level"):
    global _simd_level
    available = simd_levels_available()
    if level not in available:
        raise ValueError(
            f"{source} must be one of the SIMD levels this CPU and build have "
            f"({', '.join(available)}), got {level!r}"
        )
    _simd_level = LEVELS.index(level)


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
    """Return how many threads a large step may use.

    The default is OpenMP's own, so ``OMP_NUM_THREADS``, CPU affinity, cgroup limits and
    threadpoolctl are honoured; ``OPTCORE_NUM_THREADS`` and `set_num_threads` override it.
    Always 1 where optcore was built without OpenMP.
    """
    if not OPTCORE_OPENMP:
        return 1
    return _num_threads if _num_threads else omp_get_max_threads()


def set_num_threads(n, *, _source="n"):
    """Set how many threads a large step may use, for the whole process.

    Results have the same bits for every number of threads. A step too small to gain from
    threads stays on the calling thread whatever is set here.

    Parameters
    ----------
    n : int or None
        At least 1; None returns to OpenMP's default.

    Raises
    ------
    TypeError
        If `n` is neither an int nor None.
    ValueError
        If `n` is less than 1 or more than 1024.
    """
    global _num_threads
    if n is None:
        _num_threads = 0
        return
    if isinstance(n, bool) or not hasattr(type(n), "__index__"):
        raise TypeError(f"{_source} must be an int or None, got {type(n).__name__}")
    n = n.__index__()
    if not 1 <= n <= 1024:
        raise ValueError(f"{_source} must lie in [1, 1024], got {n}")
    _num_threads = n


@contextmanager
def always_threaded(least=1):
    """Run the body with threads for every sweep of two times `least` elements; for tests."""
    global _elements_per_thread, _backs_off
    before = _elements_per_thread, _backs_off
    _elements_per_thread, _backs_off = least, False
    try:
        yield
    finally:
        _elements_per_thread, _backs_off = before


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
    level = os.environ.get("OPTCORE_SIMD")
    _set_simd(level or simd_levels_available()[-1], "OPTCORE_SIMD")
    threads = os.environ.get("OPTCORE_NUM_THREADS")
    if threads:
        try:
            set_num_threads(int(threads), _source="OPTCORE_NUM_THREADS")
        except ValueError:
            raise ValueError(
                f"OPTCORE_NUM_THREADS must be a whole number in [1, 1024], got {threads!r}"
            ) from None


if optcore_guard_forks():
    raise MemoryError("pthread_atfork failed")
_read_environment()
