"""The sweep on arrays that are stored in another type than they are stepped in.

Built against the private declarations: nothing public lets float32 and float64 meet.
"""
from libc.stdint cimport uintptr_t

from optcore.rules cimport Scalars
from optcore.storage cimport FLOAT32, FLOAT64, Stream, stream_at
from optcore.sweep cimport SQUARES, STEP, Partial, Tensor, one_tensor, sweep_in_use


cdef Stream stream_of(object array):
    cdef uintptr_t at = array.ctypes.data
    return stream_at(<void *>at, FLOAT64 if array.dtype.itemsize == 8 else FLOAT32)


cdef Tensor tensor_of(object x, list grads, Stream *streams, const Scalars *scalars):
    cdef Tensor t
    for k, g in enumerate(grads):
        streams[k] = stream_of(g)
    t = one_tensor(stream_of(x), x.size, streams, scalars)
    t.n_grads = len(grads)
    return t


def step(int rule, x, list grads, list states, dict scalars, ema, bint zero_grad, Py_ssize_t begin):
    """Step x[begin:]."""
    cdef Scalars s = scalars
    cdef Stream[8] streams
    cdef Tensor t = tensor_of(x, grads, streams, &s)
    for k, state in enumerate(states):
        t.states[k] = stream_of(state)
    if ema is not None:
        t.ema = <void *><uintptr_t>ema.ctypes.data
    t.rule = rule
    t.zero_grad = zero_grad
    sweep_in_use()(STEP, &t, begin, t.size)


def squares(x, list grads):
    """Return the sum of squares of at most one chunk, and how many are not finite."""
    cdef Scalars s
    cdef Stream[8] streams
    cdef Tensor t = tensor_of(x, grads, streams, &s)
    cdef Partial partial
    t.partials = &partial
    sweep_in_use()(SQUARES, &t, 0, t.size)
    return partial.squares, partial.nonfinite
