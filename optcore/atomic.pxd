"""Numbers that several threads read and write without a lock, and the flag of a call under way."""

cdef extern from *:
    """
    #if defined(_MSC_VER) && !defined(__clang__)
      #include <intrin.h>
      #define OPTCORE_ATOMIC(type) type volatile
    #else
      #define OPTCORE_ATOMIC(type) _Atomic(type)
    #endif

    /* Set a number that is 0 to `mark`; return what it was. Under the GIL nothing intervenes. */
    static inline long optcore_seize(long *at, long mark) {
      #if !defined(Py_GIL_DISABLED)
        long found = *at;
        if (found == 0) *at = mark;
        return found;
      #elif defined(_MSC_VER) && !defined(__clang__)
        return _InterlockedCompareExchange(at, mark, 0);
      #else
        long found = 0;
        __atomic_compare_exchange_n(at, &found, mark, 0, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED);
        return found;
      #endif
    }
    static inline void optcore_release(long *at) {
      #if !defined(Py_GIL_DISABLED)
        *at = 0;
      #elif defined(_MSC_VER) && !defined(__clang__)
        _InterlockedExchange(at, 0);
      #else
        __atomic_store_n(at, 0, __ATOMIC_RELEASE);
      #endif
    }
    """
    long seize "optcore_seize"(long *at, long mark)
    void release "optcore_release"(long *at)
