"""One sweep over one tensor: the tables it reads and the one door to every loop."""
from optcore.rules cimport MOST_STATES, Rule, Scalars, Variant
from optcore.storage cimport Storage, Stream

cdef enum:
    # Elements between two points where a sweep may be cut for another thread, and the unit
    # of the norm's fixed order: changing it changes the norm's bits.
    CHUNK = 8192

cdef enum Sweep:
    STEP         # gradient options, rule, average, zeroing: everything that writes
    SQUARES      # read-only: sum of squares and count of non-finite gradients
    ZERO         # gradients become zero, NaN included

cdef struct Partial:        # one CHUNK's share of the norm
    double squares
    Py_ssize_t nonfinite

# One parameter and all that is stepped with it; every pointer checked at the border.
cdef struct Tensor:
    Stream param                    # INOUT
    const Stream *grads             # IN, or OUT where zeroed: n_grads of them, added in this order
    Stream states[MOST_STATES]      # INOUT, as many as the rule has
    void *ema                       # INOUT, arithmetic type; NULL: no average is kept
    Partial *partials               # OUT of SQUARES, one for each CHUNK
    const Scalars *scalars          # IN
    const double *weights           # IN: of the gradients, whose sum is 1; NULL: plainly added
    double unit                     # SQUARES: a power of two that multiplies gradients first
    Py_ssize_t size
    int n_grads
    Rule rule
    Variant variant
    bint zero_grad


cdef inline Tensor one_tensor(
    void *param, Storage storage, Py_ssize_t size, const Stream *grad, const Scalars *scalars
) noexcept nogil:
    """A tensor with one gradient, states that are stored alike but not there yet, no extras."""
    cdef Tensor t
    cdef int k
    t.param.data = param
    t.param.storage = storage
    t.grads = grad
    for k in range(MOST_STATES):
        t.states[k].data = NULL
        t.states[k].storage = storage
    t.ema = NULL
    t.partials = NULL
    t.scalars = scalars
    t.weights = NULL
    t.unit = 1
    t.size = size
    t.n_grads = 1
    t.rule = 0
    t.variant = <Variant>0
    t.zero_grad = False
    return t


# One kind of sweep over a range of one tensor
ctypedef void (*sweep_t)(Sweep, const Tensor *, Py_ssize_t, Py_ssize_t) noexcept nogil

cdef sweep_t sweep_in_use() noexcept nogil
