"""Hyper-parameters: the one table of options, and the way of their values into the kernels."""
from libc.math cimport sqrt
from libc.stdint cimport uint64_t

from optcore.kernels cimport optcore_options
from optcore.rules cimport (
    ADAM,
    ADAMW,
    FIRST,
    LR_IN_VELOCITY,
    PLAIN,
    Rule,
    Scalars,
    Variant,
    has_variant,
)

cdef enum Range:
    NONNEGATIVE     # finite, >= 0
    POSITIVE        # finite, > 0
    PORTION         # in [0, 1)
    POWER           # in [0, 1), and never rounded itself
    FRACTION        # in [0, 1), and when rounded to float32 too
    FLAG            # True or False
    INTEGER         # in [0, 2**64)
    CHOICE          # one of a few values, by its place among them

# The values of the choices, in the order of CHOICES
cdef enum Master:
    MASTER_BY_DTYPE
    NO_MASTER
    SPLIT_MASTER
    FLOAT32_MASTER

cdef enum Rounding:
    STOCHASTIC
    NEAREST

cdef enum StateType:
    STATE_AS_STEPPED
    STATE_FLOAT32
    STATE_BFLOAT16

cdef enum Lazy:
    EXACT_ROWS
    TOUCHED_ROWS

# Every option there is, those that a kernel takes first.
cdef struct Options:
    optcore_options kernel
    double max_norm         # infinity: none
    double ema_decay
    int nesterov
    int dampen_first
    int skip_nonfinite
    int track_grad_norm
    int master
    int rounding
    int velocity_dtype
    int lazy
    int state_dtype
    int centered
    int amsgrad
    double lr_decay
    double initial_accumulator_value
    uint64_t seed

cdef struct Row:            # of the table, as C reads it
    Range range
    bint optional           # None is infinity
    int refused             # by which of the conditions
    Py_ssize_t offset       # in Options

cdef Options default_options() noexcept nogil
cdef const Row *row_at(int i) noexcept
cdef str name_at(int i)
cdef int row_named(str name) except -1

cdef double number(object value, str name, Range allowed) except? -1
cdef bint flag(object value, str name) except -1
cdef uint64_t integer(object value, str name) except? 1
cdef object as_schedule(object value)
cdef bint is_fixed(object value)
cdef int take_row(Options *o, int i, object value, str name) except -1
cdef int take(Options *o, const void *field, object value) except -1
cdef object value_of(const Options *o, int i)
cdef double product_of(double beta, uint64_t n, double least=*) noexcept nogil
cdef int check_rounding(int i, double x, str name) except -1
cdef int check_options(
    Rule rule, const Options *o, bint as_float32, str prefix=*
) except -1


cdef inline Variant variant_of(Rule rule, const optcore_options *o, bint starts) noexcept nogil:
    """Which of a rule's equations its options choose; `starts`: with an undampened step."""
    if o.lr_in_velocity and has_variant(rule, LR_IN_VELOCITY):
        return LR_IN_VELOCITY
    return FIRST if starts and o.dampening != 0 and has_variant(rule, FIRST) else PLAIN


cdef inline Rule resolved(Rule rule, optcore_options *o) noexcept nogil:
    """The rule whose loops a rule has; adamw is adam with decoupled decay."""
    if rule != ADAMW:
        return rule
    o.decoupled_weight_decay = True
    return ADAM


cdef inline Scalars combine(const optcore_options *o) noexcept nogil:
    """Combine the options in float64, once, for every kernel."""
    cdef Scalars s
    s.lr = o.lr
    s.momentum = o.momentum
    s.undamped = 1 - o.dampening
    s.weight_decay = 0 if o.decoupled_weight_decay else o.weight_decay
    s.shrink = 1 - o.lr * o.weight_decay if o.decoupled_weight_decay else 1
    s.scale = -o.grad_scale if o.maximize else o.grad_scale
    s.clip_value = o.clip_value
    s.ema_decay = 0
    s.ema_weight = 1
    s.flushes = o.flush_subnormals
    s.alpha = o.alpha
    s.alpha_weight = 1 - o.alpha
    s.beta1 = o.beta1
    s.beta1_weight = 1 - o.beta1
    s.beta2 = o.beta2
    s.beta2_weight = 1 - o.beta2
    s.step_size = o.lr / (1 - o.beta1_power)
    s.unbias = 1 / sqrt(1 - o.beta2_power)
    # of what is corrected: sqrt(s / c + eps) is sqrt(s + c * eps) / sqrt(c)
    s.eps_inside = o.eps * (1 - o.beta2_power) if o.eps_in_sqrt else 0
    s.eps_outside = 0 if o.eps_in_sqrt else o.eps
    return s
