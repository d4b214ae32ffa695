"""The loops: one for each rule, compiled for each dtype and SIMD level.

`sweep_in_use` gives the function that runs one kind of sweep over a range of one tensor, at the
SIMD level in use. Beneath it everything is inlined into one function per level, so that each
level's compiler flags reach every loop and each constant argument becomes code.

Options come in three places. What is neutral for free (scale, maximize, decoupled decay,
dampening) is always in the rule's loop; coupled decay has a loop of its own, for no value of
λ leaves every bit as it was; the rest (several gradients, clipping by value, averaging,
zeroing) are stages around the rule's loop, run block by block while the block is in L1.
"""
from libc.math cimport INFINITY, isfinite
from libc.stdint cimport uintptr_t
from libc.string cimport memset

from optcore.rules cimport (
    MOMENTUM,
    MOMENTUM_FIRST,
    MOMENTUM_LR_IN_VELOCITY,
    NESTEROV,
    NESTEROV_LR_IN_VELOCITY,
    SGD,
    Rule,
    apply_rule,
    real,
)
from optcore.runtime cimport N_SIMD_LEVELS, simd_level
from optcore.simd cimport avx2, avx512, baseline, inlined

cdef enum:
    # Elements that a stage hands to the next: 1 to 2 KiB an array. Measured: with 4 KiB the
    # four streams of a pipeline reach memory in bursts, and it takes an eighth longer.
    BLOCK = 256
    LINE = 64           # bytes of a cache line
    LANES = 16          # of the norm: one AVX-512 load of float32

# What arrays are stored in. Arithmetic is done in `real`; a storage type narrower than its
# arithmetic type joins here, and its gradients always pass through the scratch block.
ctypedef fused storage:
    float
    double


# The rule's loop

cdef inline inlined rule_loop(
    const Rule rule,
    const bint decay,
    storage *restrict x,
    const real *restrict d,
    real *restrict v,
    Py_ssize_t n,
    real scale,
    const Scalars *s,
) noexcept nogil:
    cdef real lr = <real>s.lr
    cdef real rho = <real>s.momentum
    cdef real undamped = <real>s.undamped
    cdef real weight_decay = <real>s.weight_decay
    cdef real shrink = <real>s.shrink
    cdef real xi, di, vi
    cdef Py_ssize_t i
    for i in range(n):
        xi = <real>x[i]
        di = scale * d[i]
        if decay:
            di = di + weight_decay * xi
        xi = xi * shrink
        if rule == SGD:
            apply_rule(rule, &xi, di, NULL, lr, rho, undamped)
        else:
            vi = v[i]
            apply_rule(rule, &xi, di, &vi, lr, rho, undamped)
            v[i] = vi
        x[i] = <storage>xi


cdef inline inlined rule_loops(
    const Rule rule,
    storage *x,
    const real *d,
    real *v,
    Py_ssize_t n,
    real scale,
    const Scalars *s,
) noexcept nogil:
    if s.weight_decay != 0:
        rule_loop(rule, True, x, d, v, n, scale, s)
    else:
        rule_loop(rule, False, x, d, v, n, scale, s)


cdef inline inlined run_rule(
    Rule rule, storage *x, const real *d, real *v, Py_ssize_t n, real scale, const Scalars *s
) noexcept nogil:
    """Turn the rule's number into a constant: one row, one pair of loops."""
    if rule == SGD:
        rule_loops(SGD, x, d, v, n, scale, s)
    elif rule == MOMENTUM:
        rule_loops(MOMENTUM, x, d, v, n, scale, s)
    elif rule == MOMENTUM_FIRST:
        rule_loops(MOMENTUM_FIRST, x, d, v, n, scale, s)
    elif rule == MOMENTUM_LR_IN_VELOCITY:
        rule_loops(MOMENTUM_LR_IN_VELOCITY, x, d, v, n, scale, s)
    elif rule == NESTEROV:
        rule_loops(NESTEROV, x, d, v, n, scale, s)
    elif rule == NESTEROV_LR_IN_VELOCITY:
        rule_loops(NESTEROV_LR_IN_VELOCITY, x, d, v, n, scale, s)


# The stages around it, each over at most BLOCK elements

cdef inline inlined add_gradients(
    real *restrict d, void **grads, int n_grads, Py_ssize_t begin, Py_ssize_t n, storage tag
) noexcept nogil:
    """d = ((g0 + g1) + g2) + …, in the arithmetic type; `tag` names the storage type."""
    cdef const storage *g = <const storage *>grads[0] + begin
    cdef Py_ssize_t i
    cdef int k
    for i in range(n):
        d[i] = <real>g[i]
    for k in range(1, n_grads):
        g = <const storage *>grads[k] + begin
        for i in range(n):
            d[i] = d[i] + <real>g[i]


cdef inline inlined scale_and_clip(
    real *restrict d, Py_ssize_t n, real scale, real bound
) noexcept nogil:
    """d = min(max(scale * d, -bound), bound); a NaN fails both tests and stays."""
    cdef Py_ssize_t i
    cdef real di
    for i in range(n):
        di = scale * d[i]
        di = -bound if di < -bound else di
        d[i] = bound if di > bound else di


cdef inline inlined average(
    real *restrict e, const storage *restrict x, Py_ssize_t n, const Scalars *s
) noexcept nogil:
    """e = decay * e + (1 - decay) * x."""
    cdef real decay = <real>s.ema_decay
    cdef real weight = <real>s.ema_weight
    cdef Py_ssize_t i
    for i in range(n):
        e[i] = decay * e[i] + weight * <real>x[i]


cdef inline inlined zero_gradients(
    const Tensor *t, Py_ssize_t begin, Py_ssize_t n, size_t itemsize
) noexcept nogil:
    cdef int k
    for k in range(t.n_grads):
        memset(<char *>t.grads[k] + begin * itemsize, 0, n * itemsize)


# The sweeps

cdef inline inlined step(
    const Tensor *t, Py_ssize_t begin, Py_ssize_t end, storage tag, real arithmetic
) noexcept nogil:
    """Step x[begin:end]; the last two arguments only name their types, as a template's would.

    The first block ends where the parameter reaches a cache line, so that no later load or
    store of it splits one; NumPy's own arrays lie 16 bytes past a line.
    """
    cdef storage *x = <storage *>t.param + begin
    cdef real *v = NULL
    cdef real *e = NULL
    cdef const real *d
    cdef real scratch[BLOCK]
    cdef real scale = <real>t.scalars.scale
    cdef real bound = <real>t.scalars.clip_value
    cdef bint staged = (
        t.n_grads > 1 or bound < INFINITY or sizeof(storage) != sizeof(real)
    )
    cdef Py_ssize_t block = end - begin
    cdef Py_ssize_t n = <Py_ssize_t>(-<uintptr_t>x % LINE // sizeof(storage))
    if staged or t.ema or t.zero_grad:
        block = BLOCK
    if t.velocity:
        v = <real *>t.velocity + begin
    if t.ema:
        e = <real *>t.ema + begin
    if n == 0:
        n = block
    while begin < end:
        n = min(n, end - begin)
        if staged:
            add_gradients(scratch, t.grads, t.n_grads, begin, n, tag)
            scale_and_clip(scratch, n, scale, bound)
            run_rule(t.rule, x, <const real *>scratch, v, n, <real>1, t.scalars)
        else:
            d = <const real *>t.grads[0] + begin
            run_rule(t.rule, x, d, v, n, scale, t.scalars)
        if e:
            average(e, x, n, t.scalars)
            e += n
        if t.zero_grad:
            zero_gradients(t, begin, n, sizeof(storage))
        x += n
        if v:
            v += n
        begin += n
        n = block


cdef inline inlined add_squares(
    double *restrict lanes, const real *restrict d, Py_ssize_t n, double unit
) noexcept nogil:
    """Lane i takes every LANES-th square from d[i] on: one order for every vector width."""
    cdef double acc[LANES]
    cdef double di
    cdef Py_ssize_t row
    cdef int lane
    for lane in range(LANES):
        acc[lane] = lanes[lane]
    for row in range(n // LANES):
        for lane in range(LANES):
            di = unit * <double>d[row * LANES + lane]
            acc[lane] += di * di
    for lane in range(<int>(n % LANES)):
        di = unit * <double>d[n - n % LANES + lane]
        acc[lane] += di * di
    for lane in range(LANES):
        lanes[lane] = acc[lane]


cdef inline inlined fold(double *lanes, const int half) noexcept nogil:
    """Add the upper half of the lanes to the lower; a constant `half` leaves no loop."""
    cdef int lane
    for lane in range(half):
        lanes[lane] += lanes[lane + half]


cdef inline Py_ssize_t count_nonfinite(
    const Tensor *t, Py_ssize_t begin, Py_ssize_t end, storage tag, real arithmetic
) noexcept nogil:
    """Count the non-finite sums of gradients; runs only where a sum of squares was not finite."""
    cdef real d
    cdef Py_ssize_t i, count = 0
    for i in range(begin, end):
        add_gradients(&d, t.grads, t.n_grads, i, 1, tag)
        count += not isfinite(<double>d)
    return count


cdef inline inlined squares(
    const Tensor *t, Py_ssize_t begin, Py_ssize_t end, storage tag, real arithmetic
) noexcept nogil:
    """Fill the partials of the chunks in [begin, end); `begin` is a multiple of CHUNK."""
    cdef double lanes[LANES]
    cdef real scratch[BLOCK]
    cdef bint staged = t.n_grads > 1 or sizeof(storage) != sizeof(real)
    cdef Py_ssize_t block = BLOCK if staged else CHUNK
    cdef Py_ssize_t i, n, stop
    cdef Partial *partial
    while begin < end:
        stop = min(begin + CHUNK, end)
        partial = &t.partials[begin // CHUNK]
        memset(lanes, 0, sizeof(lanes))
        i = begin
        while i < stop:
            n = min(block, stop - i)
            if staged:
                add_gradients(scratch, t.grads, t.n_grads, i, n, tag)
                add_squares(lanes, <const real *>scratch, n, t.unit)
            else:
                add_squares(lanes, <const real *>t.grads[0] + i, n, t.unit)
            i += n
        fold(lanes, LANES // 2)
        fold(lanes, LANES // 4)
        fold(lanes, LANES // 8)
        fold(lanes, LANES // 16)
        partial.squares = lanes[0]
        partial.nonfinite = 0
        if not isfinite(lanes[0]):
            partial.nonfinite = count_nonfinite(t, begin, stop, tag, arithmetic)
        begin = stop


cdef inline inlined run(
    Sweep what, const Tensor *t, Py_ssize_t begin, Py_ssize_t end, storage tag, real arithmetic
) noexcept nogil:
    if what == STEP:
        step(t, begin, end, tag, arithmetic)
    elif what == SQUARES:
        squares(t, begin, end, tag, arithmetic)
    elif what == ZERO:
        zero_gradients(t, begin, end - begin, sizeof(storage))


cdef inline inlined run_dtype(
    Sweep what, const Tensor *t, Py_ssize_t begin, Py_ssize_t end
) noexcept nogil:
    """The table of dtypes: how each is stored, and what its arithmetic is done in."""
    if t.dtype == FLOAT32:
        run(what, t, begin, end, <float>0, <float>0)
    elif t.dtype == FLOAT64:
        run(what, t, begin, end, <double>0, <double>0)


# One function for each SIMD level

cdef baseline sweep_baseline(
    Sweep what, const Tensor *t, Py_ssize_t begin, Py_ssize_t end
) noexcept nogil:
    run_dtype(what, t, begin, end)


cdef avx2 sweep_avx2(
    Sweep what, const Tensor *t, Py_ssize_t begin, Py_ssize_t end
) noexcept nogil:
    run_dtype(what, t, begin, end)


cdef avx512 sweep_avx512(
    Sweep what, const Tensor *t, Py_ssize_t begin, Py_ssize_t end
) noexcept nogil:
    run_dtype(what, t, begin, end)


cdef sweep_t[N_SIMD_LEVELS] SWEEPS = [
    <sweep_t>sweep_baseline, <sweep_t>sweep_avx2, <sweep_t>sweep_avx512
]


cdef sweep_t sweep_in_use() noexcept nogil:
    """The sweep at the SIMD level in use."""
    return SWEEPS[simd_level()]
