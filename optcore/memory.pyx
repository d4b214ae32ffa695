"""Memory: buffers that free themselves, spans, and which memory may not overlap which.

Whoever needs C memory holds a `Buffer` and never frees. Whoever writes arrays lists them in
`Spans` and asks it what shares memory with them.
"""
from libc.stdlib cimport free, qsort, realloc
from libc.string cimport memset

cdef enum:
    NOBODY = -2


cdef class Buffer:
    """Memory of C's, freed with this object."""

    def __dealloc__(self):
        free(self.at)

    cdef int grow(self, Py_ssize_t n, size_t itemsize) except -1:
        """Make room for n items, the new ones zero; where that fails, all stays as it was."""
        cdef Py_ssize_t n_bytes = max(n, 1) * itemsize
        cdef void *at
        if n_bytes > self.n_bytes:
            at = realloc(self.at, n_bytes)
            if at == NULL:
                raise MemoryError
            memset(<char *>at + self.n_bytes, 0, n_bytes - self.n_bytes)
            self.at = at
            self.n_bytes = n_bytes
        return 0


cdef Buffer zeroed(Py_ssize_t n, size_t itemsize):
    cdef Buffer buffer = Buffer()
    buffer.grow(n, itemsize)
    return buffer


cdef int compare(const void *a, const void *b) noexcept nogil:
    cdef const Span *p = <const Span *>a
    cdef const Span *q = <const Span *>b
    if p.begin != q.begin:
        return 1 if p.begin > q.begin else -1
    return (p.end > q.end) - (p.end < q.end)


cdef class Spans:
    """Pieces of memory that must not overlap, in the order of their addresses once sorted."""

    def __cinit__(self):
        self._memory = Buffer()

    cdef int clear(self, Py_ssize_t most) except -1:
        """Begin anew, with room for so many."""
        self._memory.grow(most, sizeof(Span))
        self.n = 0
        return 0

    cdef void add(self, Span span) noexcept:
        if span.begin < span.end:
            (<Span *>self._memory.at)[self.n] = span
            self.n += 1

    cdef bint sort(self, Py_ssize_t *first, Py_ssize_t *second) noexcept:
        """Sort what was added; whether all lie apart, and if not, the owners of two that do not."""
        cdef Span *spans = <Span *>self._memory.at
        cdef Py_ssize_t i
        qsort(spans, self.n, sizeof(Span), compare)
        for i in range(1, self.n):
            if spans[i].begin < spans[i - 1].end:
                first[0] = min(spans[i - 1].owner, spans[i].owner)
                second[0] = max(spans[i - 1].owner, spans[i].owner)
                return False
        return True

    cdef Py_ssize_t owner_over(self, Span span) noexcept:
        """The owner of a span that this one overlaps; NOBODY, which is less than -1, for none."""
        cdef const Span *spans = <const Span *>self._memory.at
        cdef Py_ssize_t low = 0, high = self.n, middle
        if span.begin == span.end:
            return NOBODY
        while low < high:               # the first that ends after span begins
            middle = (low + high) // 2
            if spans[middle].end > span.begin:
                high = middle
            else:
                low = middle + 1
        return spans[low].owner if low < self.n and spans[low].begin < span.end else NOBODY
