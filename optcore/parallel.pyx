"""A sweep over many tensors, shared out to threads by elements, across tensor boundaries.

A tensor without a gradient takes no part. A share begins and ends at a CHUNK of a tensor, and
share k goes to thread k in every step, so that what a core has cached it meets again.
"""
from cython.parallel cimport prange

from optcore.runtime cimport (
    note_threads,
    own_time,
    tell_of_missing_threads,
    threads_for,
    wall_time,
)
from optcore.sweep cimport CHUNK, sweep_in_use, sweep_t

cdef extern from "<fenv.h>" nogil:
    ctypedef struct fenv_t:
        pass
    const int FE_ALL_EXCEPT
    int fegetenv(fenv_t *env)
    int fesetenv(const fenv_t *env)
    int fetestexcept(int flags)
    int feraiseexcept(int flags)

cdef enum:
    # A sweep over fewer elements than this is done before another thread could take the GIL
    # and give it back, and a waiting thread may keep it for milliseconds.
    GIL_HELD_BELOW = 8192

cdef struct Cut:
    Py_ssize_t tensor
    Py_ssize_t element


cdef Cut cut_at(const Tensor *tensors, Py_ssize_t n, Py_ssize_t position) noexcept nogil:
    """The CHUNK at a position in the concatenation of all tensors that take part."""
    cdef Cut cut
    cut.element = 0
    for cut.tensor in range(n):
        if tensors[cut.tensor].grads[0].data == NULL:
            continue
        if position < tensors[cut.tensor].size:
            cut.element = position - position % CHUNK
            return cut
        position -= tensors[cut.tensor].size
    cut.tensor = n
    return cut


cdef void sweep_between(
    Sweep what, const Tensor *tensors, Py_ssize_t n, Cut begin, Cut end
) noexcept nogil:
    cdef sweep_t sweep = sweep_in_use()
    cdef const Tensor *t
    cdef Py_ssize_t stop
    while begin.tensor < n and begin.tensor <= end.tensor:
        t = &tensors[begin.tensor]
        stop = end.element if begin.tensor == end.tensor else t.size
        if t.grads[0].data != NULL and begin.element < stop:
            sweep(what, t, begin.element, stop)
        begin.tensor += 1
        begin.element = 0


cdef void sweep_share(
    Sweep what, const Tensor *tensors, Py_ssize_t n, Py_ssize_t n_elements, int share, int shares
) noexcept nogil:
    cdef Py_ssize_t size = n_elements // shares
    cdef Cut begin, end
    begin.tensor = begin.element = end.element = 0
    end.tensor = n
    if share > 0:
        begin = cut_at(tensors, n, size * share)
    if share + 1 < shares:
        end = cut_at(tensors, n, size * (share + 1))
    sweep_between(what, tensors, n, begin, end)


# What one share of a sweep leaves behind
cdef struct Share:
    double own      # seconds
    int raised      # floating-point exception flags, the caller's earlier ones among them


cdef Share sweep_as_caller(
    const fenv_t *callers,
    Sweep what, const Tensor *tensors, Py_ssize_t n, Py_ssize_t n_elements, int share, int shares
) noexcept nogil:
    """Sweep over a share with the caller's rounding and flushing, whatever the thread's are.

    A worker has kept the floating-point environment it was born with; the caller's may have been
    set since, and others share the worker.
    """
    cdef Share done
    cdef fenv_t own
    cdef double begin = own_time()
    fegetenv(&own)
    fesetenv(callers)
    sweep_share(what, tensors, n, n_elements, share, shares)
    done.raised = fetestexcept(FE_ALL_EXCEPT)
    fesetenv(&own)
    done.own = own_time() - begin
    return done


cdef void sweep_shared(
    Sweep what, const Tensor *tensors, Py_ssize_t n, Py_ssize_t n_elements, Py_ssize_t work
) noexcept nogil:
    cdef int shares = threads_for(work)
    cdef int share, raised = 0
    cdef double begin, own = 0
    cdef fenv_t callers
    cdef Share done
    if shares == 1:
        sweep_share(what, tensors, n, n_elements, 0, 1)
        return
    begin = wall_time()
    fegetenv(&callers)
    # As many iterations as threads asked for: should fewer come, they take more than one.
    for share in prange(shares, schedule="static", chunksize=1, num_threads=shares):
        done = sweep_as_caller(&callers, what, tensors, n, n_elements, share, shares)
        own += done.own
        raised |= done.raised
    feraiseexcept(raised & ~fetestexcept(FE_ALL_EXCEPT))
    note_threads(own, wall_time() - begin)


cdef void sweep_all(
    Sweep what, const Tensor *tensors, Py_ssize_t n, Py_ssize_t n_elements, Py_ssize_t work=0
) noexcept:
    """Sweep over `n` tensors whose sizes, where they have a gradient, sum to `n_elements`.

    `work` is what it takes, in elements of whole arrays, where that is more.
    """
    work = max(work, n_elements)
    if (work + n) * tensors[0].n_grads < GIL_HELD_BELOW:
        sweep_shared(what, tensors, n, n_elements, work)
    else:
        with nogil:
            sweep_shared(what, tensors, n, n_elements, work)
        tell_of_missing_threads()
