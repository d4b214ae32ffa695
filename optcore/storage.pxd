"""How arrays are stored, and how a block of each type becomes `real` and goes back.

The sweep opens and closes streams; nothing else reads or writes an array's elements. A new
storage is a number, its size, its arithmetic type, a line in `load` and one in `store`.

Half types are stepped in float32. A parameter's may have the rest of a float32 beside it: its low
16 bits, or a copy, which is what is stepped then, unless the half was set to another value since.
"""
from libc.stdint cimport uint16_t, uint32_t

from optcore.halves cimport (
    bits_of,
    either,
    from_bfloat16,
    from_float16,
    high_of,
    joined,
    low_of,
    float_of,
    to_bfloat16,
    to_float16,
)
from optcore.rules cimport real
from optcore.simd cimport inlined

cdef extern from "optcore.h":
    cdef enum Storage "optcore_storage":
        FLOAT32 "OPTCORE_FLOAT32"
        FLOAT64 "OPTCORE_FLOAT64"
        BFLOAT16 "OPTCORE_BFLOAT16"
        FLOAT16 "OPTCORE_FLOAT16"
        SPLIT_BFLOAT16 "OPTCORE_SPLIT_BFLOAT16"         # `rest`: the low halves
        COPIED_BFLOAT16 "OPTCORE_COPIED_BFLOAT16"       # `rest`: the float32 that is stepped
        COPIED_FLOAT16 "OPTCORE_COPIED_FLOAT16"

# One array, as the border checked it
cdef struct Stream:
    void *data
    void *rest
    Storage storage
    bint stochastic     # how what does not fit is rounded; else to the nearest


cdef inline Stream stream_at(void *data, Storage storage) noexcept nogil:
    return Stream(data, NULL, storage, False)


cdef inline size_t itemsize_beside(Storage storage) noexcept nogil:
    """Of what `rest` points at."""
    return sizeof(uint16_t) if storage == SPLIT_BFLOAT16 else sizeof(float)


cdef inline size_t itemsize_of(Storage storage) noexcept nogil:
    if storage == FLOAT64:
        return sizeof(double)
    if storage == FLOAT32:
        return sizeof(float)
    return sizeof(uint16_t)


cdef inline Stream stream_from(const Stream *stream, Py_ssize_t first) noexcept nogil:
    """The same array from one of its elements on."""
    cdef Stream s = stream[0]
    if s.data != NULL:
        s.data = <char *>s.data + first * itemsize_of(s.storage)
    if s.rest != NULL:
        s.rest = <char *>s.rest + first * itemsize_beside(s.storage)
    return s


cdef inline Storage arithmetic_of(Storage storage) noexcept nogil:
    """The type in which a parameter stored so is stepped."""
    return FLOAT64 if storage == FLOAT64 else FLOAT32


cdef inline bint is_rounded(Storage storage) noexcept nogil:
    """Whether less is kept than was computed."""
    return storage == BFLOAT16 or storage == FLOAT16


cdef inline Storage plain(Storage storage) noexcept nogil:
    """What an array is stored as by itself, without what may lie beside it."""
    if storage == SPLIT_BFLOAT16 or storage == COPIED_BFLOAT16:
        return BFLOAT16
    return FLOAT16 if storage == COPIED_FLOAT16 else storage


cdef inline bint holds(Storage storage, real arithmetic) noexcept nogil:
    """Whether its elements are `real` themselves; the last argument only names the type."""
    return storage == (FLOAT32 if sizeof(real) == sizeof(float) else FLOAT64)


cdef inline inlined load(
    real *restrict block, const Stream *stream, Py_ssize_t begin, Py_ssize_t n
) noexcept nogil:
    cdef const float *f = <const float *>stream.data + begin
    cdef const double *g = <const double *>stream.data + begin
    cdef const uint16_t *h = <const uint16_t *>stream.data + begin
    cdef const uint16_t *low = <const uint16_t *>stream.rest + begin
    cdef const float *copy = <const float *>stream.rest + begin
    cdef Py_ssize_t i
    if stream.storage == FLOAT32:
        for i in range(n):
            block[i] = <real>f[i]
    elif stream.storage == FLOAT64:
        for i in range(n):
            block[i] = <real>g[i]
    elif sizeof(real) == sizeof(double):
        pass                    # float64 stays with float64
    elif stream.storage == BFLOAT16:
        for i in range(n):
            block[i] = from_bfloat16(h[i])
    elif stream.storage == FLOAT16:
        for i in range(n):
            block[i] = from_float16(h[i])
    elif stream.storage == SPLIT_BFLOAT16:
        for i in range(n):
            block[i] = joined(h[i], low[i])
    elif stream.storage == COPIED_BFLOAT16:
        for i in range(n):
            block[i] = float_of(either(
                h[i] == to_bfloat16(copy[i], False, 0),
                bits_of(copy[i]), bits_of(from_bfloat16(h[i])),
            ))
    elif stream.storage == COPIED_FLOAT16:
        for i in range(n):
            block[i] = float_of(either(
                h[i] == to_float16(copy[i], False, 0),
                bits_of(copy[i]), bits_of(from_float16(h[i])),
            ))


cdef inline inlined store(
    const real *restrict block, const Stream *stream, Py_ssize_t begin, Py_ssize_t n,
    const uint32_t *restrict noise, int shift,
) noexcept nogil:
    """Round stochastically, where the stream is, by the 16 bits of noise from `shift` on."""
    cdef float *f = <float *>stream.data + begin
    cdef double *g = <double *>stream.data + begin
    cdef uint16_t *h = <uint16_t *>stream.data + begin
    cdef uint16_t *low = <uint16_t *>stream.rest + begin
    cdef float *copy = <float *>stream.rest + begin
    cdef Py_ssize_t i
    if stream.storage == FLOAT32:
        for i in range(n):
            f[i] = <float>block[i]
    elif stream.storage == FLOAT64:
        for i in range(n):
            g[i] = <double>block[i]
    elif sizeof(real) == sizeof(double):
        pass
    elif stream.storage == BFLOAT16 and stream.stochastic:
        for i in range(n):
            h[i] = to_bfloat16(<float>block[i], True, noise[i] >> shift & 0xFFFF)
    elif stream.storage == BFLOAT16:
        for i in range(n):
            h[i] = to_bfloat16(<float>block[i], False, 0)
    elif stream.storage == FLOAT16 and stream.stochastic:
        for i in range(n):
            h[i] = to_float16(<float>block[i], True, noise[i] >> shift & 0xFFFF)
    elif stream.storage == FLOAT16:
        for i in range(n):
            h[i] = to_float16(<float>block[i], False, 0)
    elif stream.storage == SPLIT_BFLOAT16:
        for i in range(n):
            h[i] = high_of(<float>block[i])
            low[i] = low_of(<float>block[i])
    elif stream.storage == COPIED_BFLOAT16:
        for i in range(n):
            copy[i] = <float>block[i]
            h[i] = to_bfloat16(<float>block[i], False, 0)
    elif stream.storage == COPIED_FLOAT16:
        for i in range(n):
            copy[i] = <float>block[i]
            h[i] = to_float16(<float>block[i], False, 0)


# `load` and `store` of float32, compiled once for each SIMD level: too much to stand in each place

ctypedef void (*load_t)(float *, const Stream *, Py_ssize_t, Py_ssize_t) noexcept nogil
ctypedef void (*store_t)(
    const float *, const Stream *, Py_ssize_t, Py_ssize_t, const uint32_t *, int
) noexcept nogil

# What a SIMD level has compiled apart, to be called
cdef struct Level:
    load_t load
    store_t store
    void *plain             # functions of sweep.pyx
    void *adaptive


cdef inline inlined fetch(
    real *block, const Stream *stream, Py_ssize_t begin, Py_ssize_t n, const Level *c
) noexcept nogil:
    if sizeof(real) == sizeof(float):
        c.load(<float *>block, stream, begin, n)
    else:
        load(block, stream, begin, n)


cdef inline inlined put(
    const real *block, const Stream *stream, Py_ssize_t begin, Py_ssize_t n,
    const uint32_t *noise, int shift, const Level *c,
) noexcept nogil:
    if sizeof(real) == sizeof(float):
        c.store(<const float *>block, stream, begin, n, noise, shift)
    else:
        store(block, stream, begin, n, noise, shift)


cdef inline inlined opened(
    real **block, const Stream *stream, Py_ssize_t begin, Py_ssize_t n, real *scratch,
    const Level *c,
) noexcept nogil:
    """Point at n elements as `real`: where they lie, or loaded into scratch."""
    if holds(stream.storage, scratch[0]):
        block[0] = <real *>stream.data + begin
    else:
        fetch(scratch, stream, begin, n, c)
        block[0] = scratch


cdef inline inlined closed(
    const real *block, const Stream *stream, Py_ssize_t begin, Py_ssize_t n,
    const uint32_t *noise, int shift, const Level *c,
) noexcept nogil:
    """Bring back what was opened and then written."""
    if not holds(stream.storage, block[0]):
        put(block, stream, begin, n, noise, shift, c)
