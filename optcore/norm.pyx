"""The norm of all gradients together: partial sums, and their sum in its fixed order.

A step asks `measures` whether to sweep over the gradients first, calls `prepare` while it may
still fail and `measure` when it may not. Each CHUNK of a tensor has its partial sum, whichever
thread forms it, and the partial sums are added in the order of the chunks.
"""
from libc.math cimport isfinite, ldexp, sqrt

from optcore.memory cimport zeroed
from optcore.parallel cimport sweep_all
from optcore.storage cimport FLOAT64, arithmetic_of
from optcore.sweep cimport SQUARES, Partial, n_partials

# Squares of float64 gradients leave the range of float64 beyond 2**±512.
cdef enum:
    RESCALE = 600
cdef double TINY_SQUARES = ldexp(1, -900)


cdef class Norm:
    """What is measured of the gradients before a step."""

    def __cinit__(self):
        self.nonfinite = []

    cdef int prepare(self, Tensor *tensors, Py_ssize_t n) except -1:
        """Give every tensor the room for its partial sums, once."""
        cdef Py_ssize_t i, total = 0
        cdef Partial *partials
        if self._partials is not None:
            return 0
        for i in range(n):
            total += n_partials(&tensors[i])
        self._partials = zeroed(total, sizeof(Partial))
        partials = <Partial *>self._partials.at
        for i in range(n):
            tensors[i].partials = partials
            partials += n_partials(&tensors[i])
        return 0

    cdef double measure(
        self, Tensor *tensors, Py_ssize_t n, Py_ssize_t n_elements, object join
    ) except? -1:
        """Sweep once over the gradients; return their norm and note which are not finite.

        `join`, where others hold the rest of the gradients, makes this sum everyone's.
        """
        cdef double unit = 1, total = self._sum(tensors, n, n_elements, 1, join)
        cdef Py_ssize_t i
        if total < TINY_SQUARES or not isfinite(total):
            for i in range(n):
                if arithmetic_of(tensors[i].param.storage) == FLOAT64 and not self.nonfinite:
                    # Squares left the range of float64: again, in a unit that keeps them inside.
                    unit = ldexp(1, RESCALE if total < 1 else -RESCALE)
                    total = self._sum(tensors, n, n_elements, unit, join)
                    break
        return sqrt(total) / unit

    cdef double _sum(
        self, Tensor *tensors, Py_ssize_t n, Py_ssize_t n_elements, double unit, object join
    ) except? -1:
        """Add up the chunks in their order."""
        cdef Py_ssize_t i, chunk, count
        cdef double total = 0
        cdef Tensor *t
        self.nonfinite = []
        for i in range(n):
            tensors[i].unit = unit
        sweep_all(SQUARES, tensors, n, n_elements)
        for i in range(n):
            t = &tensors[i]
            if t.grads[0].data == NULL:
                continue
            count = 0
            for chunk in range(n_partials(t)):
                total += t.partials[chunk].squares
                count += t.partials[chunk].nonfinite
            if count:
                self.nonfinite.append(i)
        if join is not None:
            total, self.nonfinite = join(total, self.nonfinite)
        return total
