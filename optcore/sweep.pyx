"""The loops: one for each rule, compiled for each arithmetic type and SIMD level.

`sweep_in_use` gives the function that runs one kind of sweep over a range of one tensor, or over
those of its rows that begin there, at the SIMD level in use. Beneath it everything is inlined into
one function per level, so that each level's compiler flags reach every loop and each constant
argument becomes code.

Options come in three places. What is neutral for free (scale, maximize, decoupled decay,
dampening) is always in the rule's loop; coupled decay has a loop of its own, for no value of
λ leaves every bit as it was, and so has flushing; the rest (several gradients, clipping by value,
averaging, zeroing) are stages around the rule's loop, run block by block while the block is in
L1. So is the opening of arrays that are stored in another type than they are stepped in. The
replicas of an outer step, or the last few of them, are added in the rule's loop itself. That is so
of linear rules, whose loops wait for memory alone; for others decay and flushing are stages, and
replicas are added before the rule.
"""
from libc.float cimport DBL_MIN, FLT_MIN
from libc.math cimport INFINITY, NAN, isfinite
from libc.stdint cimport uint16_t, uint32_t, uintptr_t
from libc.string cimport memcpy, memset

from optcore.halves cimport from_bfloat16, high_of, joined, low_of, to_bfloat16
from optcore.noise cimport GRID, NEXT, Noise, draw, drawn, key_of, noise_from
from optcore.rules cimport (
    FIRST,
    LR_IN_VELOCITY,
    N_RULES,
    PLAIN,
    RULE_ROWS,
    apply_rule,
    has_variant,
    is_linear,
    real,
)
from optcore.runtime cimport N_SIMD_LEVELS, simd_level
from optcore.simd cimport avx2, avx512, baseline, inlined, prefetch
from optcore.storage cimport (
    BFLOAT16,
    FLOAT32,
    FLOAT64,
    SPLIT_BFLOAT16,
    Level,
    Storage,
    arithmetic_of,
    closed,
    fetch,
    holds,
    itemsize_of,
    load,
    load_t,
    opened,
    plain,
    put,
    store,
    store_t,
)

cdef enum:
    # Elements that a stage hands to the next: 1 to 2 KiB an array. Measured: with 4 KiB the
    # four streams of a pipeline reach memory in bursts, and it takes an eighth longer.
    BLOCK = GRID
    # Of several gradients AT_ONCE are added in one loop; one takes twice the time of four, for then
    # a core waits for one stream alone. All but the last few are added over a LONG_BLOCK: with ten
    # in memory shorter ones take a quarter longer. But where they are written back, over no more
    # than stays in L1: a BACK_BLOCK. The last few, where the rule's loop does not add them itself,
    # in a SHORT_BLOCK.
    LONG_BLOCK = 4096
    BACK_BLOCK = 128
    SHORT_BLOCK = 64
    AT_ONCE = 4
    LINE = 64           # bytes of a cache line
    AHEAD = 4           # rows
    GROUP = 16          # of them
    MOST_AHEAD = 512    # bytes of a row
    LANES = 16          # of the norm: one AVX-512 load of float32


cdef struct Several:
    # AT_ONCE gradient arrays, stored as the arithmetic type, and what each is multiplied by
    const void *grads[AT_ONCE]
    double weights[AT_ONCE]
    double share
    bint is_one                 # and neither has a factor: d is x less that


# The rule's loop

cdef inline real flushed(real v) noexcept nogil:
    """0 for what is below the smallest normal number; a NaN is not."""
    cdef real least = <real>FLT_MIN if sizeof(real) == sizeof(float) else <real>DBL_MIN
    return 0 if -least < v < least else v


cdef inline inlined step_element(
    const Rule rule, const Variant variant, const bint decay, const bint flushes,
    real *x, real d, real *states, real scale, const Scalars *s,
) noexcept nogil:
    cdef int k
    d = scale * d
    if decay:
        d = d + <real>s.weight_decay * x[0]
    x[0] = x[0] * <real>s.shrink
    apply_rule(rule, variant, x, d, states, s)
    if flushes:
        for k in range(RULE_ROWS[rule].n_states):
            states[k] = flushed(states[k])


cdef inline inlined rule_loop(
    const Rule rule,
    const Variant variant,
    const bint decay,
    const bint flushes,
    const bint outer,
    const bint of_one,
    real *restrict x,
    const real *restrict d,
    real *restrict u,
    real *restrict v,
    real *restrict w,
    Py_ssize_t n,
    real scale,
    const Scalars *s,
    const Several *last,
) noexcept nogil:
    """`outer`: d is the sum of an outer step's replicas but for the last, which this adds;
    `of_one`: d is the only one."""
    cdef real xi, di
    cdef real[MOST_STATES] states
    cdef const real *restrict g0 = <const real *>last.grads[0] if outer else NULL
    cdef const real *restrict g1 = <const real *>last.grads[1] if outer else NULL
    cdef const real *restrict g2 = <const real *>last.grads[2] if outer else NULL
    cdef const real *restrict g3 = <const real *>last.grads[3] if outer else NULL
    cdef real w0 = <real>last.weights[0] if outer else 0
    cdef real w1 = <real>last.weights[1] if outer else 0
    cdef real w2 = <real>last.weights[2] if outer else 0
    cdef real w3 = <real>last.weights[3] if outer else 0
    cdef real share = <real>last.share if outer else 0
    cdef Py_ssize_t i
    for i in range(n):
        xi = x[i]
        di = d[i]
        if of_one:
            di = xi - di
        elif outer:
            di = xi - share * (di + w0 * g0[i] + w1 * g1[i] + w2 * g2[i] + w3 * g3[i])
        if RULE_ROWS[rule].n_states > 0:
            states[0] = u[i]
        if RULE_ROWS[rule].n_states > 1:
            states[1] = v[i]
        if RULE_ROWS[rule].n_states > 2:
            states[2] = w[i]
        step_element(rule, variant, decay, flushes, &xi, di, states, scale, s)
        if RULE_ROWS[rule].n_states > 0:
            u[i] = states[0]
        if RULE_ROWS[rule].n_states > 1:
            v[i] = states[1]
        if RULE_ROWS[rule].n_states > 2:
            w[i] = states[2]
        x[i] = xi


cdef inline inlined run_decay(
    const Rule rule, const Variant variant, const bint flushes, real *x, const real *d,
    real **states, Py_ssize_t at, Py_ssize_t n, real scale, const Scalars *s,
    const Several *last,
) noexcept nogil:
    """Run over n elements of x and d, and those of the rule's states from `at` on."""
    cdef real *u = NULL
    cdef real *v = NULL
    cdef real *w = NULL
    if RULE_ROWS[rule].n_states > 0:
        u = states[0] + at
    if RULE_ROWS[rule].n_states > 1:
        v = states[1] + at
    if RULE_ROWS[rule].n_states > 2:
        w = states[2] + at
    if not is_linear(rule):
        rule_loop(rule, variant, False, False, False, False, x, d, u, v, w, n, scale, s, NULL)
    elif not flushes and last != NULL and last.is_one:
        rule_loop(rule, variant, False, False, False, True, x, d, u, v, w, n, scale, s, NULL)
    elif not flushes and last != NULL:
        rule_loop(rule, variant, False, False, True, False, x, d, u, v, w, n, scale, s, last)
    elif s.weight_decay != 0:
        rule_loop(rule, variant, True, flushes, False, False, x, d, u, v, w, n, scale, s, NULL)
    else:
        rule_loop(rule, variant, False, flushes, False, False, x, d, u, v, w, n, scale, s, NULL)


cdef inline inlined run_flushing(
    const Rule rule, const Variant variant, real *x, const real *d, real **states, Py_ssize_t at,
    Py_ssize_t n, real scale, const Scalars *s, const Several *last,
) noexcept nogil:
    if is_linear(rule) and RULE_ROWS[rule].n_states > 0 and s.flushes:
        run_decay(rule, variant, True, x, d, states, at, n, scale, s, last)
    else:
        run_decay(rule, variant, False, x, d, states, at, n, scale, s, last)


cdef inline inlined run_variant(
    const bint linear, const Rule rule, Variant variant, real *x, const real *d, real **states,
    Py_ssize_t at, Py_ssize_t n, real scale, const Scalars *s, const Several *last,
) noexcept nogil:
    if rule >= N_RULES or is_linear(rule) != linear:
        return
    if has_variant(rule, LR_IN_VELOCITY) and variant == LR_IN_VELOCITY:
        run_flushing(rule, LR_IN_VELOCITY, x, d, states, at, n, scale, s, last)
    elif has_variant(rule, FIRST) and variant == FIRST:
        run_flushing(rule, FIRST, x, d, states, at, n, scale, s, last)
    else:
        run_flushing(rule, PLAIN, x, d, states, at, n, scale, s, last)


cdef inline inlined run_rules(
    const bint linear, Rule rule, Variant variant, real *x, const real *d, real **states,
    Py_ssize_t at, Py_ssize_t n, real scale, const Scalars *s, const Several *last,
) noexcept nogil:
    """Turn the number of a rule, linear or not, into a constant; others compile to nothing."""
    if rule == 0:
        run_variant(linear, 0, variant, x, d, states, at, n, scale, s, last)
    elif rule == 1:
        run_variant(linear, 1, variant, x, d, states, at, n, scale, s, last)
    elif rule == 2:
        run_variant(linear, 2, variant, x, d, states, at, n, scale, s, last)
    elif rule == 3:
        run_variant(linear, 3, variant, x, d, states, at, n, scale, s, last)
    elif rule == 4:
        run_variant(linear, 4, variant, x, d, states, at, n, scale, s, last)
    elif rule == 5:
        run_variant(linear, 5, variant, x, d, states, at, n, scale, s, last)
    elif rule == 6:
        run_variant(linear, 6, variant, x, d, states, at, n, scale, s, last)
    elif rule == 7:
        run_variant(linear, 7, variant, x, d, states, at, n, scale, s, last)
    elif rule == 8:
        run_variant(linear, 8, variant, x, d, states, at, n, scale, s, last)
    elif rule == 9:
        run_variant(linear, 9, variant, x, d, states, at, n, scale, s, last)
    elif rule == 10:
        run_variant(linear, 10, variant, x, d, states, at, n, scale, s, last)
    elif rule == 11:
        run_variant(linear, 11, variant, x, d, states, at, n, scale, s, last)
    elif rule == 12:
        run_variant(linear, 12, variant, x, d, states, at, n, scale, s, last)
    elif rule == 13:
        run_variant(linear, 13, variant, x, d, states, at, n, scale, s, last)
    elif rule == 14:
        run_variant(linear, 14, variant, x, d, states, at, n, scale, s, last)
    elif rule == 15:
        run_variant(linear, 15, variant, x, d, states, at, n, scale, s, last)


# Rules that are not linear have a function of their own for each level, lest their number of loops
# weigh on the others.
ctypedef void (*adaptive_t)(
    const Tensor *, void *x, const void *d, void **states, Py_ssize_t at, Py_ssize_t n,
    double scale,
) noexcept nogil


cdef inline inlined run_adaptive(
    const Tensor *t, void *x, const void *d, void **states, Py_ssize_t at, Py_ssize_t n,
    double scale,
) noexcept nogil:
    if arithmetic_of(t.param.storage) == FLOAT64:
        run_rules(
            False, t.rule, t.variant, <double *>x, <const double *>d, <double **>states, at, n,
            scale, t.scalars, NULL,
        )
    else:
        run_rules(
            False, t.rule, t.variant, <float *>x, <const float *>d, <float **>states, at, n,
            <float>scale, t.scalars, NULL,
        )


cdef inline inlined run_rule(
    const Tensor *t, real *x, const real *d, real **states, Py_ssize_t at, Py_ssize_t n,
    real scale, const Several *last, const Level *c,
) noexcept nogil:
    if is_linear(t.rule):
        run_rules(True, t.rule, t.variant, x, d, states, at, n, scale, t.scalars, last)
    else:
        (<adaptive_t>c.adaptive)(t, x, d, <void **>states, at, n, scale)


# The same on bfloat16 where it lies, for what is stepped most: the plain rule of one gradient, what
# is rounded by noise. Beside stages it takes about half the time in the caches.

cdef inline inlined packed_loop(
    const Rule rule,
    const bint decay,
    const Storage of_x,
    const Storage of_d,
    const Storage of_u,
    float *restrict x,
    uint16_t *restrict hx,
    uint16_t *restrict low,
    const float *restrict d,
    const uint16_t *restrict hd,
    float *restrict u,
    uint16_t *restrict hu,
    Py_ssize_t n,
    Noise noise,
    const Scalars *s,
) noexcept nogil:
    cdef uint32_t at = noise.at, factor = noise.factor
    cdef float scale = <float>s.scale
    cdef float xi, di
    cdef float[MOST_STATES] states
    cdef uint32_t bits
    cdef Py_ssize_t i
    for i in range(n):
        if of_x == SPLIT_BFLOAT16:
            xi = joined(hx[i], low[i])
        else:
            xi = from_bfloat16(hx[i]) if of_x == BFLOAT16 else x[i]
        di = from_bfloat16(hd[i]) if of_d == BFLOAT16 else d[i]
        if RULE_ROWS[rule].n_states > 0:
            states[0] = from_bfloat16(hu[i]) if of_u == BFLOAT16 else u[i]
        step_element(rule, PLAIN, decay, False, &xi, di, states, scale, s)
        bits = drawn(at, factor)
        at += NEXT
        if RULE_ROWS[rule].n_states > 0:
            if of_u == BFLOAT16:
                hu[i] = to_bfloat16(states[0], True, bits >> 16)
            else:
                u[i] = states[0]
        if of_x == SPLIT_BFLOAT16:
            hx[i] = high_of(xi)
            low[i] = low_of(xi)
        elif of_x == BFLOAT16:
            hx[i] = to_bfloat16(xi, True, bits & 0xFFFF)
        else:
            x[i] = xi


cdef inline inlined packed_decay(
    const Rule rule, const Storage of_x, const Storage of_d, const Storage of_u, const Tensor *t,
    Py_ssize_t at, Py_ssize_t n,
) noexcept nogil:
    """Run over the n elements from `at` on, of one run of noise."""
    cdef float *x = <float *>t.param.data + at
    cdef uint16_t *hx = <uint16_t *>t.param.data + at
    cdef uint16_t *low = <uint16_t *>t.param.rest + at
    cdef const float *d = <const float *>t.grads[0].data + at
    cdef const uint16_t *hd = <const uint16_t *>t.grads[0].data + at
    cdef float *u = <float *>t.states[0].data + at
    cdef uint16_t *hu = <uint16_t *>t.states[0].data + at
    cdef Noise noise = noise_from(t.key, t.first + at)
    if rule >= N_RULES or not is_linear(rule):
        return
    if RULE_ROWS[rule].n_states == 0 and of_u != FLOAT32:
        return
    if t.scalars.weight_decay != 0:
        packed_loop(
            rule, True, of_x, of_d, of_u, x, hx, low, d, hd, u, hu, n, noise, t.scalars
        )
    else:
        packed_loop(
            rule, False, of_x, of_d, of_u, x, hx, low, d, hd, u, hu, n, noise, t.scalars
        )


cdef inline inlined packed_rule(
    const Storage of_x, const Storage of_d, const Storage of_u, const Tensor *t,
    Py_ssize_t at, Py_ssize_t n,
) noexcept nogil:
    if t.rule == 0:
        packed_decay(0, of_x, of_d, of_u, t, at, n)
    elif t.rule == 1:
        packed_decay(1, of_x, of_d, of_u, t, at, n)
    elif t.rule == 2:
        packed_decay(2, of_x, of_d, of_u, t, at, n)
    elif t.rule == 3:
        packed_decay(3, of_x, of_d, of_u, t, at, n)
    elif t.rule == 4:
        packed_decay(4, of_x, of_d, of_u, t, at, n)
    elif t.rule == 5:
        packed_decay(5, of_x, of_d, of_u, t, at, n)
    elif t.rule == 6:
        packed_decay(6, of_x, of_d, of_u, t, at, n)
    elif t.rule == 7:
        packed_decay(7, of_x, of_d, of_u, t, at, n)
    elif t.rule == 8:
        packed_decay(8, of_x, of_d, of_u, t, at, n)
    elif t.rule == 9:
        packed_decay(9, of_x, of_d, of_u, t, at, n)
    elif t.rule == 10:
        packed_decay(10, of_x, of_d, of_u, t, at, n)
    elif t.rule == 11:
        packed_decay(11, of_x, of_d, of_u, t, at, n)
    elif t.rule == 12:
        packed_decay(12, of_x, of_d, of_u, t, at, n)
    elif t.rule == 13:
        packed_decay(13, of_x, of_d, of_u, t, at, n)
    elif t.rule == 14:
        packed_decay(14, of_x, of_d, of_u, t, at, n)
    elif t.rule == 15:
        packed_decay(15, of_x, of_d, of_u, t, at, n)


cdef inline bint adds(const Tensor *t) noexcept nogil:
    """Whether what takes the gradient's place is to be formed first."""
    return t.n_grads > 1 or t.outer or t.weights != NULL


cdef inline bint has_stages(const Tensor *t) noexcept nogil:
    """Whether there is more to a step than its rule's loop, and zeroing."""
    return adds(t) or t.scalars.clip_value < INFINITY or t.ema != NULL or (
        not is_linear(t.rule) and (t.scalars.weight_decay != 0 or t.scalars.flushes)
    )


cdef inline Storage stepped_state(const Tensor *t) noexcept nogil:
    """How its state is stored; a rule without one may find one there, which stays as it is."""
    return t.states[0].storage if RULE_ROWS[t.rule].n_states > 0 else FLOAT32


cdef inline inlined packed_storage(
    const Storage of_x, const Storage of_d, const Tensor *t, Py_ssize_t at, Py_ssize_t n
) noexcept nogil:
    if stepped_state(t) == BFLOAT16:
        packed_rule(of_x, of_d, BFLOAT16, t, at, n)
    else:
        packed_rule(of_x, of_d, FLOAT32, t, at, n)


cdef inline bint is_packed(const Tensor *t) noexcept nogil:
    """Whether there is such a loop for it."""
    cdef Storage of_x = t.param.storage, of_d = t.grads[0].storage, of_u = stepped_state(t)
    cdef bint it = is_linear(t.rule) and t.variant == PLAIN
    it &= not has_stages(t) and not t.scalars.flushes
    it &= of_d == BFLOAT16 or (of_d == FLOAT32 and of_x == FLOAT32)
    it &= of_x == FLOAT32 or of_x == SPLIT_BFLOAT16 or (of_x == BFLOAT16 and t.param.stochastic)
    it &= of_u == FLOAT32 or (of_u == BFLOAT16 and t.states[0].stochastic)
    return it


cdef inline inlined step_packed(const Tensor *t, Py_ssize_t begin, Py_ssize_t end) noexcept nogil:
    """Step x[begin:end], run of noise by run of noise; `begin` is a multiple of CHUNK."""
    cdef Py_ssize_t n
    while begin < end:
        n = min(GRID, end - begin)
        if t.param.storage == SPLIT_BFLOAT16:
            packed_storage(SPLIT_BFLOAT16, BFLOAT16, t, begin, n)
        elif t.param.storage == BFLOAT16:
            packed_storage(BFLOAT16, BFLOAT16, t, begin, n)
        elif t.grads[0].storage == BFLOAT16:
            packed_storage(FLOAT32, BFLOAT16, t, begin, n)
        else:
            packed_storage(FLOAT32, FLOAT32, t, begin, n)
        if t.zero_grad:
            zero_gradients(t, begin, n)
        begin += n


# The stages around it, each over at most BLOCK elements but where it says so

cdef inline inlined open_several(
    Several *several, const Tensor *t, int k, const int count, Py_ssize_t begin, Py_ssize_t n,
    real (*scratch)[BLOCK], real *nothing, const Level *c,
) noexcept nogil:
    """Open so many gradients from k on; `nothing` stands for those that lack, or is NULL.

    It is -0, adding which leaves every bit as it was.
    """
    cdef real *g
    cdef int j
    for j in range(count):
        several.weights[j] = 1
        if nothing != NULL and k + j >= t.n_grads:
            several.grads[j] = nothing
            continue
        opened(&g, &t.grads[k + j], begin, n, scratch[j], c)
        several.grads[j] = g
        if t.weights != NULL:
            several.weights[j] = t.weights[k + j]


cdef inline inlined add_several(
    real *restrict d, const Several *several, const int count, const bint first, Py_ssize_t n
) noexcept nogil:
    """Add so many to d from left to right, each times its weight; `first`: d holds nothing yet."""
    cdef const real *restrict g0 = <const real *>several.grads[0]
    cdef const real *restrict g1 = <const real *>several.grads[1]
    cdef const real *restrict g2 = <const real *>several.grads[2]
    cdef const real *restrict g3 = <const real *>several.grads[3]
    cdef real w0 = <real>several.weights[0], w1 = <real>several.weights[1]
    cdef real w2 = <real>several.weights[2], w3 = <real>several.weights[3]
    cdef real sum
    cdef Py_ssize_t i
    for i in range(n):
        sum = w0 * g0[i] if first else d[i] + w0 * g0[i]
        if count > 1:
            sum = sum + w1 * g1[i]
        if count > 2:
            sum = sum + w2 * g2[i]
        if count > 3:
            sum = sum + w3 * g3[i]
        d[i] = sum


cdef inline int n_before_last(const Tensor *t) noexcept nogil:
    """Gradients before the last few."""
    return max(t.n_grads - AT_ONCE, 0)


cdef inline bint grads_lie_open(const Tensor *t, real arithmetic) noexcept nogil:
    cdef int k
    for k in range(t.n_grads):
        if not holds(t.grads[k].storage, arithmetic):
            return False
    return True


cdef inline Py_ssize_t most_at_once(const Tensor *t, real arithmetic) noexcept nogil:
    """Elements over which the gradients before the last few are added."""
    if grads_lie_open(t, arithmetic):
        return LONG_BLOCK * sizeof(float) // sizeof(arithmetic)
    return BLOCK


cdef inline inlined add_group(
    real *restrict d, const Tensor *t, int k, const int count, const bint first, Py_ssize_t begin,
    Py_ssize_t n, real *nothing, const Level *c,
) noexcept nogil:
    cdef real[AT_ONCE][BLOCK] scratch
    cdef Several several
    open_several(&several, t, k, count, begin, n, scratch, nothing, c)
    add_several(d, &several, count, first, n)


cdef inline inlined add_before_last(
    real *restrict d, const Tensor *t, Py_ssize_t begin, Py_ssize_t n, const Level *c
) noexcept nogil:
    """d = ((w0 * g0 + w1 * g1) + w2 * g2) + … before the last few; w is 1 without weights.

    The first group is the short one, if any is.
    """
    cdef int n_before = n_before_last(t)
    cdef int k = n_before % AT_ONCE
    if k == 1:
        add_group(d, t, 0, 1, True, begin, n, <real *>NULL, c)
    elif k == 2:
        add_group(d, t, 0, 2, True, begin, n, <real *>NULL, c)
    elif k == 3:
        add_group(d, t, 0, 3, True, begin, n, <real *>NULL, c)
    elif n_before > 0:
        add_group(d, t, 0, 4, True, begin, n, <real *>NULL, c)
        k = AT_ONCE
    while k < n_before:
        add_group(d, t, k, 4, False, begin, n, <real *>NULL, c)
        k += AT_ONCE


cdef inline inlined before_last(
    real **d, real *sums, Py_ssize_t *first, Py_ssize_t *end, const Tensor *t, Py_ssize_t at,
    Py_ssize_t n, const Level *c,
) noexcept nogil:
    """Point at what comes before the last few from `at` on, in the sums of elements [first, end).

    Where they end those of the next n are formed.
    """
    if at == end[0]:
        first[0] = at
        end[0] += n
        add_before_last(sums, t, at, n, c)
    d[0] = sums + at - first[0]


cdef inline inlined fill_nothing(real *nothing, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(n):
        nothing[i] = -0.0


cdef inline inlined less_mean(
    real *restrict d, const real *restrict x, real share, Py_ssize_t n
) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(n):
        d[i] = x[i] - share * d[i]


cdef inline inlined add_last(
    real *restrict d, const Tensor *t, const real *restrict x, Py_ssize_t begin, Py_ssize_t n,
    real *nothing, const Level *c,
) noexcept nogil:
    """What takes the gradient's place: the sum, or of an outer step d = x - share * sum."""
    if t.n_grads > AT_ONCE:
        add_group(d, t, t.n_grads - AT_ONCE, 4, False, begin, n, <real *>NULL, c)
    else:
        add_group(d, t, 0, 4, True, begin, n, nothing, c)
    if t.outer:
        less_mean(d, x, <real>t.share, n)


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


cdef inline inlined add_decay(
    real *restrict d, const real *restrict x, Py_ssize_t n, real scale, real decay
) noexcept nogil:
    """d = scale * d + decay * x."""
    cdef Py_ssize_t i
    for i in range(n):
        d[i] = scale * d[i] + decay * x[i]


cdef inline inlined flush(real *restrict v, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(n):
        v[i] = flushed(v[i])


cdef inline inlined average(
    real *restrict e, const real *restrict x, Py_ssize_t n, const Scalars *s
) noexcept nogil:
    """e = decay * e + (1 - decay) * x."""
    cdef real decay = <real>s.ema_decay
    cdef real weight = <real>s.ema_weight
    cdef Py_ssize_t i
    for i in range(n):
        e[i] = decay * e[i] + weight * x[i]


cdef inline inlined zero_gradients(const Tensor *t, Py_ssize_t begin, Py_ssize_t n) noexcept nogil:
    cdef size_t itemsize
    cdef int k
    for k in range(t.n_grads):
        itemsize = itemsize_of(t.grads[k].storage)
        memset(<char *>t.grads[k].data + begin * itemsize, 0, n * itemsize)


cdef inline inlined give(
    const real *restrict x, const Tensor *t, int k, const int count, Py_ssize_t begin, Py_ssize_t n
) noexcept nogil:
    """Copy x to so many gradient arrays from k on, which are stored as it is."""
    cdef real *restrict a = <real *>t.grads[k].data + begin
    cdef real *restrict b = <real *>t.grads[k + 1].data + begin if count > 1 else NULL
    cdef real *restrict c = <real *>t.grads[k + 2].data + begin if count > 2 else NULL
    cdef real *restrict d = <real *>t.grads[k + 3].data + begin if count > 3 else NULL
    cdef Py_ssize_t i
    for i in range(n):
        a[i] = x[i]
        if count > 1:
            b[i] = x[i]
        if count > 2:
            c[i] = x[i]
        if count > 3:
            d[i] = x[i]


cdef inline inlined give_all(
    const real *x, const Tensor *t, Py_ssize_t begin, Py_ssize_t n
) noexcept nogil:
    cdef int k = 0
    while k + AT_ONCE <= t.n_grads:
        give(x, t, k, 4, begin, n)
        k += AT_ONCE
    if t.n_grads - k == 1:
        give(x, t, k, 1, begin, n)
    elif t.n_grads - k == 2:
        give(x, t, k, 2, begin, n)
    elif t.n_grads - k == 3:
        give(x, t, k, 3, begin, n)


cdef inline inlined write_back(
    const Tensor *t, Py_ssize_t begin, Py_ssize_t n, bint all_open, real arithmetic,
    const Level *c,
) noexcept nogil:
    """Give every gradient array the parameter as it is now."""
    cdef real[BLOCK] x
    cdef size_t itemsize = itemsize_of(t.param.storage)
    cdef int k
    if all_open:
        give_all(<const real *>t.param.data + begin, t, begin, n)
        return
    for k in range(t.n_grads):
        if t.grads[k].storage == plain(t.param.storage):
            memcpy(<char *>t.grads[k].data + begin * itemsize,
                   <const char *>t.param.data + begin * itemsize, n * itemsize)
        else:
            fetch(x, &t.param, begin, n, c)
            put(x, &t.grads[k], begin, n, NULL, 0, c)


cdef inline inlined shrink(real *restrict x, Py_ssize_t n, double factor) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(n):
        x[i] = <real>(factor * <double>x[i])


cdef inline inlined apply_behind(
    real *restrict x, real *restrict v, Py_ssize_t n, const Linear *behind, bint flushes
) noexcept nogil:
    """In float64, each rounded once; but where nothing decays x, as every scalar of a step.

    1 less a small decay would be 1 in float32, and what is infinite times a factor too small for
    it not a number.
    """
    cdef Linear m = behind[0]
    cdef real least = <real>FLT_MIN if sizeof(real) == sizeof(float) else <real>DBL_MIN
    cdef real xv = <real>m.xv, vv = <real>m.vv, vi
    cdef double a, b
    cdef Py_ssize_t i
    if m.xx == 1 and m.vx == 0 and vv >= least:
        for i in range(n):
            vi = v[i]
            x[i] = x[i] + xv * vi
            v[i] = vv * vi
    else:
        for i in range(n):
            a, b = <double>x[i], <double>v[i]
            x[i] = <real>(m.xx * a + m.xv * b)
            # an infinite x makes a NaN of 0 * x
            v[i] = <real>(m.vx * a + m.vv * b if m.vx != 0 else m.vv * b)
    if flushes:
        flush(v, n)


# The sweeps

cdef inline bint lies_open(const Tensor *t, real arithmetic) noexcept nogil:
    """Whether the arrays of a rule's loop are stored as `real`, and states it has no use for."""
    cdef bint opens = not holds(t.param.storage, arithmetic)
    cdef int k
    opens |= not holds(t.grads[0].storage, arithmetic)
    for k in range(MOST_STATES):
        opens |= not holds(t.states[k].storage, arithmetic)
    return not opens


cdef inline Py_ssize_t up_to_line(const void *data, Py_ssize_t n, real arithmetic) noexcept nogil:
    """How many of n elements lie before a cache line, where they are more than a few lines.

    No load or store after them splits a line; NumPy's own arrays lie 16 bytes past one.
    """
    if n <= BLOCK:
        return 0
    return -<uintptr_t>data % LINE // sizeof(arithmetic)


cdef inline bint is_plain(const Tensor *t) noexcept nogil:
    """Whether its rule's loop is all that is to be done."""
    if has_stages(t) or t.zero_grad:
        return False
    if arithmetic_of(t.param.storage) == FLOAT64:
        return lies_open(t, <double>0)
    return lies_open(t, <float>0)


cdef inline inlined step_plain(
    const Tensor *t, const real *d, Py_ssize_t begin, Py_ssize_t end, const Level *c
) noexcept nogil:
    """Step x[begin:end], whose gradient is d."""
    cdef real *x = <real *>t.param.data + begin
    cdef real *states[MOST_STATES]
    cdef Py_ssize_t n = up_to_line(x, end - begin, <real>0)
    cdef int k
    for k in range(MOST_STATES):
        states[k] = <real *>t.states[k].data
    if n == 0:
        n = end - begin
    while begin < end:
        run_rule(t, x, d, states, begin, n, <real>t.scalars.scale, <const Several *>NULL, c)
        x += n
        d += n
        begin += n
        n = end - begin


ctypedef void (*plain_t)(const Tensor *, const void *, Py_ssize_t, Py_ssize_t) noexcept nogil


cdef inline inlined run_plain(
    const Tensor *t, const void *d, Py_ssize_t begin, Py_ssize_t end, const Level *c
) noexcept nogil:
    if arithmetic_of(t.param.storage) == FLOAT64:
        step_plain(t, <const double *>d, begin, end, c)
    else:
        step_plain(t, <const float *>d, begin, end, c)


cdef inline inlined step_blocks(
    const Tensor *t, Py_ssize_t begin, Py_ssize_t end, bint is_open, real arithmetic,
    const Level *c,
) noexcept nogil:
    """Step x[begin:end]; `arithmetic` only names its type, as a template's argument would.

    Where all lies open, and is more than a block, the first ends at a cache line. Else blocks are
    the runs on which the noise is laid, or quarters of them; `begin` is a multiple of CHUNK.
    """
    cdef uint32_t noise[2][BLOCK]
    cdef real scratch_x[BLOCK]
    cdef real scratch_d[LONG_BLOCK]
    cdef real scratch[MOST_STATES][BLOCK]
    cdef real *x
    cdef real *d
    cdef real *states[MOST_STATES]
    cdef const Scalars *s = t.scalars
    cdef real bound = <real>s.clip_value
    cdef bint clips = bound < INFINITY
    # In the loops of linear rules already
    cdef bint decays = not is_linear(t.rule) and s.weight_decay != 0
    cdef bint flushes = not is_linear(t.rule) and s.flushes
    cdef real scale = 1 if clips or decays else <real>s.scale
    cdef Py_ssize_t block = BLOCK
    cdef Py_ssize_t n = 0
    cdef bint trailed = t.ema != NULL or t.zero_grad
    cdef bint all_open = t.write_back and is_open and grads_lie_open(t, arithmetic)
    # Whether the rule's own loop adds the last replicas; there is one for the commonest options
    cdef bint fuses = is_open and t.outer and not clips and s.weight_decay == 0
    cdef real nothing[BLOCK]
    cdef real replicas[AT_ONCE][BLOCK]
    cdef Several last
    # Gradients before the last few, and the elements of which they are added by now
    cdef int n_before = n_before_last(t) if adds(t) else 0
    cdef Py_ssize_t added_from = begin, added = begin, most = BLOCK
    cdef int k
    fuses = fuses and is_linear(t.rule) and not (s.flushes and RULE_ROWS[t.rule].n_states > 0)
    if adds(t):
        last.share = t.share
        last.is_one = t.n_grads == 1 and t.weights == NULL and t.share == 1
        if n_before > 0 and t.write_back:
            most = BACK_BLOCK
        elif n_before > 0:
            most = most_at_once(t, arithmetic)
        block = min(most, <Py_ssize_t>(BLOCK if fuses else SHORT_BLOCK))
        fill_nothing(nothing, min(block, end - begin))
    if is_open:
        n = up_to_line(<real *>t.param.data + begin, end - begin, arithmetic)
    if n == 0:
        n = block
    while begin < end:
        n = min(n, end - begin)
        opened(&x, &t.param, begin, n, scratch_x, c)
        d = scratch_d
        if n_before > 0:
            before_last(
                &d, scratch_d, &added_from, &added, t, begin,
                min(most if n == block else n, end - begin), c,
            )
        if fuses and last.is_one:
            opened(&d, t.grads, begin, n, scratch_d, c)
        elif fuses and n_before > 0:
            open_several(&last, t, n_before, AT_ONCE, begin, n, replicas, <real *>NULL, c)
        elif fuses:
            d = nothing
            open_several(&last, t, 0, AT_ONCE, begin, n, replicas, nothing, c)
        elif adds(t):
            add_last(d, t, x, begin, n, nothing, c)
        elif clips or decays:
            fetch(d, t.grads, begin, n, c)
        else:
            opened(&d, t.grads, begin, n, scratch_d, c)
        if clips:
            scale_and_clip(d, n, <real>s.scale, bound)
        if decays:
            add_decay(d, x, n, 1 if clips else <real>s.scale, <real>s.weight_decay)
        for k in range(RULE_ROWS[t.rule].n_states):
            opened(&states[k], &t.states[k], begin, n, scratch[k], c)
        run_rule(t, x, d, states, 0, n, scale, &last if fuses else NULL, c)
        if flushes:
            for k in range(RULE_ROWS[t.rule].n_states):
                flush(states[k], n)
        if trailed:
            if t.ema:
                average(<real *>t.ema + begin, x, n, s)
            if t.zero_grad:
                zero_gradients(t, begin, n)
        if not is_open:
            if t.draws:
                draw(noise[0], t.key, t.first + begin, n)
                if RULE_ROWS[t.rule].n_states > 1:
                    draw(noise[1], ~t.key, t.first + begin, n)
            for k in range(RULE_ROWS[t.rule].n_states):
                closed(
                    states[k], &t.states[k], begin, n, noise[(k + 1) // 2], 16 * ((k + 1) % 2), c
                )
            closed(x, &t.param, begin, n, noise[0], 0, c)
        if t.write_back:
            write_back(t, begin, n, all_open, arithmetic, c)
        begin += n
        n = block


cdef inline inlined catch_up(
    const Tensor *t, const Linear *behind, Py_ssize_t begin, Py_ssize_t end, real arithmetic,
    const Level *c,
) noexcept nogil:
    """Apply `behind` to x[begin:end] and its velocity."""
    cdef real[BLOCK] scratch_x
    cdef real[BLOCK] scratch_v
    cdef real *x
    cdef real *v
    cdef Py_ssize_t n
    while begin < end:
        n = min(BLOCK, end - begin)
        opened(&x, &t.param, begin, n, scratch_x, c)
        if t.states[0].data == NULL:
            shrink(x, n, behind.xx)
        else:
            opened(&v, &t.states[0], begin, n, scratch_v, c)
            apply_behind(x, v, n, behind, t.scalars.flushes)
            closed(v, &t.states[0], begin, n, NULL, 0, c)
        closed(x, &t.param, begin, n, NULL, 0, c)
        begin += n


cdef inline inlined step(
    const Tensor *t, const real *d, Py_ssize_t begin, Py_ssize_t end, real arithmetic,
    const Level *c,
) noexcept nogil:
    """Where the step is plain d is the gradient of x[begin:end], else NULL."""
    cdef bint is_open
    if d != NULL:
        (<plain_t>c.plain)(t, d, begin, end)
        return
    is_open = lies_open(t, arithmetic)
    if not is_open and sizeof(real) == sizeof(float) and is_packed(t):
        step_packed(t, begin, end)
    else:
        step_blocks(t, begin, end, is_open, arithmetic, c)


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
    const Tensor *t, Py_ssize_t begin, Py_ssize_t end, real arithmetic, const Level *c
) noexcept nogil:
    """Count the non-finite sums of gradients; runs only where a sum of squares was not finite."""
    cdef real d, scratch
    cdef real nothing = -0.0
    cdef real *x
    cdef Py_ssize_t i, count = 0
    for i in range(begin, end):
        opened(&x, &t.param, i, 1, &scratch, c)
        add_before_last(&d, t, i, 1, c)
        add_last(&d, t, x, i, 1, &nothing, c)
        count += not isfinite(<double>d)
    return count


cdef inline inlined squares(
    const Tensor *t, Py_ssize_t begin, Py_ssize_t end, real arithmetic, const Level *c
) noexcept nogil:
    """Fill the partials of the chunks in [begin, end); `begin` is a multiple of CHUNK."""
    cdef double lanes[LANES]
    cdef real[LONG_BLOCK] scratch
    cdef real[BLOCK] scratch_x
    cdef real[SHORT_BLOCK] nothing
    cdef real *d
    cdef real *x = NULL
    cdef Py_ssize_t most = CHUNK
    cdef Py_ssize_t i, n, added_from, added, stop
    cdef Partial *partial
    if adds(t):
        most = most_at_once(t, arithmetic)
        fill_nothing(nothing, SHORT_BLOCK)
    elif not holds(t.grads[0].storage, arithmetic):
        most = BLOCK
    while begin < end:
        stop = min(begin + CHUNK, end)
        partial = &t.partials[begin // CHUNK]
        memset(lanes, 0, sizeof(lanes))
        added_from = added = i = begin
        while i < stop:
            if adds(t):
                before_last(
                    &d, scratch, &added_from, &added, t, i, min(most, stop - i), c
                )
                n = min(SHORT_BLOCK, added - i)
                if t.outer:
                    opened(&x, &t.param, i, n, scratch_x, c)
                add_last(d, t, x, i, n, nothing, c)
            else:
                n = min(most, stop - i)
                opened(&d, t.grads, i, n, scratch, c)
            add_squares(lanes, d, n, t.unit)
            i += n
        fold(lanes, LANES // 2)
        fold(lanes, LANES // 4)
        fold(lanes, LANES // 8)
        fold(lanes, LANES // 16)
        partial.squares = lanes[0]
        partial.nonfinite = 0
        if not isfinite(lanes[0]):
            partial.nonfinite = count_nonfinite(t, begin, stop, arithmetic, c)
        begin = stop


cdef inline inlined copy(
    const Tensor *t, Py_ssize_t begin, Py_ssize_t end, real arithmetic, const Level *c
) noexcept nogil:
    cdef real[BLOCK] d
    cdef Py_ssize_t i, n
    while begin < end:
        n = min(BLOCK, end - begin)
        fetch(d, t.grads, begin, n, c)
        for i in range(n):
            d[i] = d[i] if d[i] == d[i] else <real>NAN      # a quiet one
        put(d, &t.param, begin, n, NULL, 0, c)
        begin += n


# Rows lie anywhere in memory, and are asked for before they are stepped: first of a group of them
# one line each, so that their pages are looked up side by side, then of each the rest. Measured: by
# rows alone, with as much of other work between them, each page is waited for.

cdef inline inlined ask_for_lines(
    const Stream *stream, Py_ssize_t number, Py_ssize_t width
) noexcept nogil:
    """Ask for a row of an array but its first line, or for the beginning of a long one."""
    cdef Py_ssize_t n_bytes = width * itemsize_of(stream.storage)
    cdef const char *at = <const char *>stream.data + number * n_bytes
    cdef const char *end = at + min(n_bytes, <Py_ssize_t>MOST_AHEAD)
    at += LINE - <uintptr_t>at % LINE
    while at < end:
        prefetch(at)
        at += LINE


cdef inline inlined ask_for_group(const Tensor *t, Py_ssize_t k, Py_ssize_t stop) noexcept nogil:
    """Ask for the stamps of rows [k, stop), and for the first lines."""
    cdef const Stream *v = &t.states[0]
    cdef Py_ssize_t n_bytes = t.width * itemsize_of(t.param.storage), n_bytes_v
    if v.data == NULL:
        v = &t.param
    n_bytes_v = t.width * itemsize_of(v.storage)
    while k < stop:
        if t.past != NULL:
            prefetch(&t.past.stamps[t.rows[k].number])
        prefetch(<const char *>t.param.data + t.rows[k].number * n_bytes)
        prefetch(<const char *>v.data + t.rows[k].number * n_bytes_v)
        k += 1


cdef inline inlined ask_for_rows(
    const Tensor *t, Py_ssize_t k, Py_ssize_t begin, Py_ssize_t stop
) noexcept nogil:
    """Ask for what comes after row k of those in [begin, stop)."""
    if k == begin:
        ask_for_group(t, k, min(k + GROUP, stop))
    if (k - begin) % GROUP == 0:
        ask_for_group(t, k + GROUP, min(k + 2 * GROUP, stop))
    if k + AHEAD < stop:
        ask_for_lines(&t.param, t.rows[k + AHEAD].number, t.width)
        if t.states[0].data != NULL:
            ask_for_lines(&t.states[0], t.rows[k + AHEAD].number, t.width)


cdef inline inlined point_at_row(Tensor *one, const Tensor *t, Py_ssize_t k) noexcept nogil:
    cdef const Row *row = &t.rows[k]
    point_at(one, t, row.number * t.width)
    one.grads, one.n_grads, one.weights = row.grads, row.n_grads, row.weights
    one.partials = t.partials + k * n_chunks(t.width)
    if t.draws:
        one.key = key_of(t.key, row.number, 0)


cdef inline const Linear *take_behind(
    const Past *past, Py_ssize_t number, Answer *answers
) noexcept nogil:
    """What a row has missed; with the step that comes now it is up to date."""
    cdef uint32_t *stamp = &past.stamps[number]
    cdef const Linear *behind = behind_by(past, stamp[0], answers)
    stamp[0] = past.clock + 1
    return behind


cdef inline inlined run(
    Sweep what, const Tensor *t, Py_ssize_t begin, Py_ssize_t end, real arithmetic,
    const Level *c,
) noexcept nogil:
    """One kind of sweep over [begin, end), or over the rows whose first elements, one row after
    another, lie in it."""
    cdef Tensor one
    cdef Answer answers[N_ANSWERS]
    cdef const Tensor *part = t
    cdef const Linear *behind = t.behind if what == CATCH_UP else NULL
    cdef const real *d = NULL
    cdef bint by_rows = t.rows != NULL
    cdef bint rule_alone = by_rows and what == STEP and is_plain(t)
    cdef Py_ssize_t k = 0, first = 0, stop = 1
    if by_rows:
        k = first = (begin + t.width - 1) // t.width
        stop = (end + t.width - 1) // t.width
        one = t[0]
        one.rows = NULL
        one.first = 0
        one.size = t.width
        if t.past != NULL and what == STEP:
            memset(answers, 0, sizeof(answers))
    while k < stop:
        if by_rows:
            if what == STEP:
                ask_for_rows(t, k, first, stop)
                if t.past != NULL:
                    behind = take_behind(t.past, t.rows[k].number, answers)
            if rule_alone and t.rows[k].n_grads == 1:
                part, begin = t, t.rows[k].number * t.width
                d = <const real *>t.rows[k].grads[0].data
            else:
                point_at_row(&one, t, k)
                part, begin, d = &one, 0, NULL
            end = begin + t.width
        if behind != NULL:
            catch_up(part, behind, begin, end, arithmetic, c)
        if what == STEP:
            step(part, d, begin, end, arithmetic, c)
        elif what == SQUARES:
            squares(part, begin, end, arithmetic, c)
        elif what == ZERO:
            zero_gradients(part, begin, end - begin)
        elif what == COPY:
            copy(part, begin, end, arithmetic, c)
        k += 1


cdef inline const void *grad_at(const Tensor *t, Py_ssize_t i) noexcept nogil:
    return <const char *>t.grads[0].data + i * itemsize_of(t.grads[0].storage)


cdef inline inlined run_arithmetic(
    Sweep what, const Tensor *t, Py_ssize_t begin, Py_ssize_t end, const Level *c
) noexcept nogil:
    if arithmetic_of(t.param.storage) == FLOAT64:
        run(what, t, begin, end, <double>0, c)
    else:
        run(what, t, begin, end, <float>0, c)


# For each SIMD level its functions

cdef Level[N_SIMD_LEVELS] LEVELS = [
    Level(
        <load_t>load_baseline, <store_t>store_baseline,
        <void *>plain_baseline, <void *>adaptive_baseline,
    ),
    Level(
        <load_t>load_avx2, <store_t>store_avx2,
        <void *>plain_avx2, <void *>adaptive_avx2,
    ),
    Level(
        <load_t>load_avx512, <store_t>store_avx512,
        <void *>plain_avx512, <void *>adaptive_avx512,
    ),
]


cdef baseline load_baseline(
    float *block, const Stream *stream, Py_ssize_t begin, Py_ssize_t n
) noexcept nogil:
    load(block, stream, begin, n)


cdef baseline store_baseline(
    const float *block, const Stream *stream, Py_ssize_t begin, Py_ssize_t n,
    const uint32_t *noise, int shift,
) noexcept nogil:
    store(block, stream, begin, n, noise, shift)


cdef baseline adaptive_baseline(
    const Tensor *t, void *x, const void *d, void **states, Py_ssize_t at, Py_ssize_t n,
    double scale,
) noexcept nogil:
    run_adaptive(t, x, d, states, at, n, scale)


cdef baseline plain_baseline(
    const Tensor *t, const void *d, Py_ssize_t begin, Py_ssize_t end
) noexcept nogil:
    run_plain(t, d, begin, end, &LEVELS[0])


cdef baseline others_baseline(
    Sweep what, const Tensor *t, Py_ssize_t begin, Py_ssize_t end
) noexcept nogil:
    run_arithmetic(what, t, begin, end, &LEVELS[0])


cdef baseline sweep_baseline(
    Sweep what, const Tensor *t, Py_ssize_t begin, Py_ssize_t end
) noexcept nogil:
    if what == STEP and t.rows == NULL and is_plain(t):
        plain_baseline(t, grad_at(t, begin), begin, end)
    else:
        others_baseline(what, t, begin, end)


cdef avx2 load_avx2(
    float *block, const Stream *stream, Py_ssize_t begin, Py_ssize_t n
) noexcept nogil:
    load(block, stream, begin, n)


cdef avx2 store_avx2(
    const float *block, const Stream *stream, Py_ssize_t begin, Py_ssize_t n,
    const uint32_t *noise, int shift,
) noexcept nogil:
    store(block, stream, begin, n, noise, shift)


cdef avx2 adaptive_avx2(
    const Tensor *t, void *x, const void *d, void **states, Py_ssize_t at, Py_ssize_t n,
    double scale,
) noexcept nogil:
    run_adaptive(t, x, d, states, at, n, scale)


cdef avx2 plain_avx2(
    const Tensor *t, const void *d, Py_ssize_t begin, Py_ssize_t end
) noexcept nogil:
    run_plain(t, d, begin, end, &LEVELS[1])


cdef avx2 others_avx2(
    Sweep what, const Tensor *t, Py_ssize_t begin, Py_ssize_t end
) noexcept nogil:
    run_arithmetic(what, t, begin, end, &LEVELS[1])


cdef avx2 sweep_avx2(
    Sweep what, const Tensor *t, Py_ssize_t begin, Py_ssize_t end
) noexcept nogil:
    if what == STEP and t.rows == NULL and is_plain(t):
        plain_avx2(t, grad_at(t, begin), begin, end)
    else:
        others_avx2(what, t, begin, end)


cdef avx512 load_avx512(
    float *block, const Stream *stream, Py_ssize_t begin, Py_ssize_t n
) noexcept nogil:
    load(block, stream, begin, n)


cdef avx512 store_avx512(
    const float *block, const Stream *stream, Py_ssize_t begin, Py_ssize_t n,
    const uint32_t *noise, int shift,
) noexcept nogil:
    store(block, stream, begin, n, noise, shift)


cdef avx512 adaptive_avx512(
    const Tensor *t, void *x, const void *d, void **states, Py_ssize_t at, Py_ssize_t n,
    double scale,
) noexcept nogil:
    run_adaptive(t, x, d, states, at, n, scale)


cdef avx512 plain_avx512(
    const Tensor *t, const void *d, Py_ssize_t begin, Py_ssize_t end
) noexcept nogil:
    run_plain(t, d, begin, end, &LEVELS[2])


cdef avx512 others_avx512(
    Sweep what, const Tensor *t, Py_ssize_t begin, Py_ssize_t end
) noexcept nogil:
    run_arithmetic(what, t, begin, end, &LEVELS[2])


cdef avx512 sweep_avx512(
    Sweep what, const Tensor *t, Py_ssize_t begin, Py_ssize_t end
) noexcept nogil:
    if what == STEP and t.rows == NULL and is_plain(t):
        plain_avx512(t, grad_at(t, begin), begin, end)
    else:
        others_avx512(what, t, begin, end)


cdef sweep_t[N_SIMD_LEVELS] SWEEPS = [
    <sweep_t>sweep_baseline, <sweep_t>sweep_avx2, <sweep_t>sweep_avx512
]


cdef sweep_t sweep_in_use() noexcept nogil:
    """The sweep at the SIMD level in use."""
    return SWEEPS[simd_level()]
