"""The random bits of stochastic rounding: a function of the seed, the step, the parameter and the
element, and of nothing else.

Each run of GRID elements has a start and an odd factor, hashed from the key and the run's number
by SplitMix64 (Steele, Lea and Flood 2014); within it, element i takes
``z = start + i * 0x9E3779B9``, ``z ^= z >> 16``, ``z *= factor``, ``z ^= z >> 15``: one
multiplication for two roundings, each of which takes 16 bits. tests/reference.py says the same.
"""
from libc.stdint cimport uint32_t, uint64_t
from optcore.simd cimport inlined

cdef enum:
    GRID = 256          # a divisor of CHUNK

cdef extern from *:
    "#define OPTCORE_NEXT 0x9E3779B9u"
    const uint32_t NEXT "OPTCORE_NEXT"      # from the `at` of an element to that of the next


cdef inline uint64_t hashed(uint64_t z) noexcept nogil:
    z += <uint64_t>0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * <uint64_t>0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * <uint64_t>0x94D049BB133111EB
    return z ^ (z >> 31)


cdef inline uint64_t key_of(uint64_t seed, uint64_t step, uint64_t parameter) noexcept nogil:
    return hashed(hashed(hashed(seed) + step) + parameter)


cdef struct Noise:          # of one run, from one of its elements on
    uint32_t at
    uint32_t factor


cdef inline Noise noise_from(uint64_t key, Py_ssize_t begin) noexcept nogil:
    cdef uint64_t run = hashed(key + <uint64_t>(begin // GRID) * <uint64_t>0x9E3779B97F4A7C15)
    return Noise(<uint32_t>run + <uint32_t>(begin % GRID) * NEXT, <uint32_t>(run >> 32) | 1)


cdef inline uint32_t drawn(uint32_t at, uint32_t factor) noexcept nogil:
    """32 bits for an element. Loops add NEXT to `at`: a product with i would be of 64 bits."""
    at ^= at >> 16
    at *= factor
    return at ^ (at >> 15)


cdef inline inlined draw(
    uint32_t *restrict noise, uint64_t key, Py_ssize_t begin, Py_ssize_t n
) noexcept nogil:
    """Draw for the elements [begin, begin + n) of one run."""
    cdef Noise run = noise_from(key, begin)
    cdef uint32_t at = run.at, factor = run.factor
    cdef Py_ssize_t i
    for i in range(n):
        noise[i] = drawn(at, factor)
        at += NEXT
