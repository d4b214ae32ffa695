"""A parallel loop of Numba's on OpenMP; a file of its own, for that is what Numba caches by."""
import numba

numba.config.THREADING_LAYER = "omp"


@numba.njit(parallel=True, cache=True)
def total(n):
    found = 0
    for _ in numba.prange(n):
        found += 1
    return found
