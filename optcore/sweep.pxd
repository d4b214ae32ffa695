"""One sweep over one tensor: the tables it reads and the one door to every loop."""
from libc.stdint cimport uint32_t, uint64_t

from optcore.rules cimport MOST_STATES, Rule, Scalars, Variant
from optcore.simd cimport inlined
from optcore.storage cimport (
    Stream,
    arithmetic_of,
    is_rounded,
    itemsize_of,
    stream_at,
    stream_from,
)

cdef enum:
    # Elements between two points where a sweep may be cut for another thread, and the unit
    # of the norm's fixed order: changing it changes the norm's bits.
    CHUNK = 8192

cdef enum Sweep:
    STEP         # what rows have missed, gradient options, rule, average, zeroing
    SQUARES      # read-only: sum of squares and count of non-finite gradients
    ZERO         # gradients become zero, NaN included
    CATCH_UP     # what `behind` says, and nothing else
    COPY         # the parameter becomes the gradient, rounded to the nearest

cdef struct Partial:        # one CHUNK's share of the norm
    double squares
    Py_ssize_t nonfinite

# What steps under a gradient of zero, however many, make of x and its velocity v
cdef struct Linear:
    double xx, xv               # x = xx * x + xv * v
    double vx, vv               # v = vx * x + vv * v

ctypedef Linear (*missed_t)(const void *history, uint32_t stamp) noexcept nogil

# The steps that rows of a parameter have missed
cdef struct Past:
    uint32_t *stamps            # INOUT of STEP, of each row: the clock when it was up to date
    uint32_t clock              # before this step
    missed_t missed             # what rows of a stamp have
    const void *history

# A row that a step touches
cdef struct Row:
    Py_ssize_t number           # in the parameter
    const Stream *grads         # n_grads of them
    const double *weights       # of the gradients, or NULL
    int n_grads

# One parameter and all that is stepped with it; every pointer checked at the border.
cdef struct Tensor:
    Stream param                    # INOUT
    const Stream *grads             # IN, or OUT where zeroed: n_grads of them, added in this order
    Stream states[MOST_STATES]      # INOUT, as many as the rule has
    void *ema                       # INOUT, arithmetic type; NULL: no average is kept
    Partial *partials               # OUT of SQUARES, one for each CHUNK
    const Scalars *scalars          # IN
    const double *weights           # IN: of the gradients, whose sum is 1; NULL: plainly added
    const Linear *behind            # IN: what CATCH_UP applies
    const Past *past                # of `rows`, which catch up before they are stepped; NULL: none
    const Row *rows                 # what a sweep is over, `size` being theirs; NULL: the whole
    Py_ssize_t width                # elements of a row
    double unit                     # SQUARES: a power of two that multiplies gradients first
    double share                    # of `outer`: multiplies the sum of the parameters
    uint64_t key                    # of this step's noise, where `draws`
    Py_ssize_t first                # the place of its first element in a whole; a multiple of GRID
    Py_ssize_t size
    int n_grads
    Rule rule
    Variant variant
    bint zero_grad
    bint outer                      # "gradients" are others' parameters: d is x less their mean
    bint write_back                 # which become the new x
    bint draws                      # a stream is rounded stochastically


cdef inline Tensor one_tensor(
    Stream param, Py_ssize_t size, const Stream *grad, const Scalars *scalars
) noexcept nogil:
    """A tensor with one gradient, states in the arithmetic type but not there yet, no extras."""
    cdef Tensor t
    cdef int k
    t.param = param
    t.grads = grad
    for k in range(MOST_STATES):
        t.states[k] = stream_at(NULL, arithmetic_of(param.storage))
    t.ema = NULL
    t.partials = NULL
    t.scalars = scalars
    t.weights = NULL
    t.behind = NULL
    t.past = NULL
    t.rows = NULL
    t.width = 0
    t.unit = 1
    t.key = 0
    t.first = 0
    t.size = size
    t.n_grads = 1
    t.rule = 0
    t.variant = <Variant>0
    t.zero_grad = False
    t.share = 1
    t.outer = False
    t.write_back = False
    t.draws = False
    return t


cdef enum:
    N_ANSWERS = 256

# What has been worked out of a past
cdef struct Answer:
    Linear m
    uint32_t stamp
    bint is_known
    bint acts                   # the identity does not


cdef inline bint is_identity(const Linear *m) noexcept nogil:
    return m.xx == 1 and m.xv == 0 and m.vx == 0 and m.vv == 1


cdef inline const Linear *behind_by(
    const Past *past, uint32_t stamp, Answer *answers
) noexcept nogil:
    """What rows of a stamp have missed, there until the next call; NULL where it does nothing."""
    cdef Answer *answer = &answers[stamp % N_ANSWERS]
    if not answer.is_known or answer.stamp != stamp:
        answer.m = past.missed(past.history, stamp)
        answer.stamp, answer.is_known = stamp, True
        answer.acts = not is_identity(&answer.m)
    return &answer.m if answer.acts else NULL


cdef inline Py_ssize_t n_chunks(Py_ssize_t size) noexcept nogil:
    return (size + CHUNK - 1) // CHUNK


cdef inline Py_ssize_t n_partials(const Tensor *t) noexcept nogil:
    """Of chunks; each row has its own."""
    if t.rows == NULL:
        return n_chunks(t.size)
    return n_chunks(t.width) * (t.size // t.width) if t.width > 0 else 0


cdef inline inlined point_at(Tensor *part, const Tensor *t, Py_ssize_t first) noexcept nogil:
    """Point a copy of a tensor at the elements from `first` on."""
    cdef int k
    part.param = stream_from(&t.param, first)
    for k in range(MOST_STATES):
        if t.states[k].data != NULL:
            part.states[k] = stream_from(&t.states[k], first)
    if t.ema != NULL:
        part.ema = <char *>t.ema + first * itemsize_of(arithmetic_of(t.param.storage))


cdef inline void round_streams(Tensor *t, bint stochastic) noexcept nogil:
    """Round what keeps less than was computed, stochastically or to the nearest."""
    cdef int k
    t.param.stochastic = stochastic and is_rounded(t.param.storage)
    t.draws = t.param.stochastic
    for k in range(MOST_STATES):
        t.states[k].stochastic = stochastic and is_rounded(t.states[k].storage)
        t.draws |= t.states[k].stochastic


# One kind of sweep over a range of one tensor, or over the rows that begin there
ctypedef void (*sweep_t)(Sweep, const Tensor *, Py_ssize_t, Py_ssize_t) noexcept nogil

cdef sweep_t sweep_in_use() noexcept nogil
