"""One sweep over one tensor: the tables it reads and the one door to every loop."""
from optcore.rules cimport Rule

cdef enum:
    # Elements between two points where a sweep may be cut for another thread, and the unit
    # of the norm's fixed order: changing it changes the norm's bits.
    CHUNK = 8192

cdef enum Dtype:
    FLOAT32
    FLOAT64

cdef enum Sweep:
    STEP         # gradient options, rule, average, zeroing: everything that writes
    SQUARES      # read-only: sum of squares and count of non-finite gradients
    ZERO         # gradients become zero, NaN included

# The numbers a step needs, combined in float64; the kernels round each once to their
# arithmetic type. Neutral values cost nothing and change no bit.
cdef struct Scalars:
    double lr
    double momentum
    double undamped         # 1 - dampening
    double weight_decay     # coupled; 0: none
    double shrink           # 1 - lr * weight_decay where decay is decoupled, else 1
    double scale            # grad_scale * clipping / number of gradients, negative to maximize
    double clip_value       # infinity: none
    double ema_decay
    double ema_weight       # 1 - ema_decay

cdef struct Partial:        # one CHUNK's share of the norm
    double squares
    Py_ssize_t nonfinite

# One parameter and all that is stepped with it; every pointer checked at the border.
cdef struct Tensor:
    void *param             # INOUT
    void **grads            # IN, or OUT where zeroed: n_grads arrays, averaged in this order
    void *velocity          # INOUT, arithmetic type; NULL: the rule has none
    void *ema               # INOUT, arithmetic type; NULL: no average is kept
    Partial *partials       # OUT of SQUARES, one for each CHUNK
    const Scalars *scalars  # IN
    double unit             # SQUARES: a power of two by which gradients are multiplied first
    Py_ssize_t size
    int n_grads
    Dtype dtype
    Rule rule
    bint zero_grad


cdef inline Tensor one_tensor(
    void *param, void **grads, void *velocity, Py_ssize_t size, Dtype dtype, Rule rule,
    const Scalars *scalars
) noexcept nogil:
    """A tensor with one gradient and no extras."""
    cdef Tensor t
    t.param = param
    t.grads = grads
    t.velocity = velocity
    t.ema = NULL
    t.partials = NULL
    t.scalars = scalars
    t.unit = 1
    t.size = size
    t.n_grads = 1
    t.dtype = dtype
    t.rule = rule
    t.zero_grad = False
    return t


# One kind of sweep over a range of one tensor
ctypedef void (*sweep_t)(Sweep, const Tensor *, Py_ssize_t, Py_ssize_t) noexcept nogil

cdef sweep_t sweep_in_use() noexcept nogil
