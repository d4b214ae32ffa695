"""How arrays are stored, and how a block of each type becomes `real` and goes back.

The sweep opens and closes streams; nothing else reads or writes an array's elements. A new
storage is a number, its size, its arithmetic type, a line in `load` and one in `store`.
"""
from optcore.rules cimport real
from optcore.simd cimport inlined

cdef enum Storage:
    FLOAT32
    FLOAT64

# One array, as the border checked it
cdef struct Stream:
    void *data
    Storage storage


cdef inline size_t itemsize_of(Storage storage) noexcept nogil:
    return sizeof(double) if storage == FLOAT64 else sizeof(float)


cdef inline Storage arithmetic_of(Storage storage) noexcept nogil:
    """The type in which a parameter stored so is stepped."""
    return FLOAT64 if storage == FLOAT64 else FLOAT32


cdef inline bint holds(Storage storage, real arithmetic) noexcept nogil:
    """Whether its elements are `real` themselves; the last argument only names the type."""
    return storage == (FLOAT32 if sizeof(real) == sizeof(float) else FLOAT64)


cdef inline inlined load(
    real *restrict block, const Stream *stream, Py_ssize_t begin, Py_ssize_t n
) noexcept nogil:
    cdef const float *f = <const float *>stream.data + begin
    cdef const double *g = <const double *>stream.data + begin
    cdef Py_ssize_t i
    if stream.storage == FLOAT32:
        for i in range(n):
            block[i] = <real>f[i]
    elif stream.storage == FLOAT64:
        for i in range(n):
            block[i] = <real>g[i]


cdef inline inlined store(
    const real *restrict block, const Stream *stream, Py_ssize_t begin, Py_ssize_t n
) noexcept nogil:
    cdef float *f = <float *>stream.data + begin
    cdef double *g = <double *>stream.data + begin
    cdef Py_ssize_t i
    if stream.storage == FLOAT32:
        for i in range(n):
            f[i] = <float>block[i]
    elif stream.storage == FLOAT64:
        for i in range(n):
            g[i] = <double>block[i]


cdef inline inlined opened(
    real **block, const Stream *stream, Py_ssize_t begin, Py_ssize_t n, real *scratch,
    const bint is_open,
) noexcept nogil:
    """Point at n elements as `real`: where they lie, or loaded into scratch.

    A constant `is_open` tells the compiler what is known already: that they are stored so.
    """
    if is_open or holds(stream.storage, scratch[0]):
        block[0] = <real *>stream.data + begin
    else:
        load(scratch, stream, begin, n)
        block[0] = scratch


cdef inline inlined closed(
    const real *block, const Stream *stream, Py_ssize_t begin, Py_ssize_t n
) noexcept nogil:
    """Bring back what was opened and then written."""
    if not holds(stream.storage, block[0]):
        store(block, stream, begin, n)
