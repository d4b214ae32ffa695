"""The rules: a table of what each is called and keeps, and the equations.

x is one element of a parameter, d its gradient after scale, clip and coupled decay, the others
its states (v a velocity); a rule updates x and its states. Every operation is rounded to `real`,
left to right as written: these lines are the specification of the bits. The rules' names and
those of their states stand in the list of optcore.h.

A rule may have variants: other equations under the same name, chosen by its options.
"""
from optcore.simd cimport inlined

# The arithmetic types. How arrays are stored is storage.pxd's business.
ctypedef fused real:
    float
    double

# The numbers a step needs, combined in float64; equations round each once to `real`.
# Neutral values cost nothing and change no bit.
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
    bint flushes            # states below the smallest normal number become 0
    double alpha
    double alpha_weight     # 1 - alpha
    double beta1
    double beta1_weight     # 1 - beta1
    double beta2
    double beta2_weight     # 1 - beta2
    double step_size        # lr / (1 - beta1_power)
    double unbias           # 1 / sqrt(1 - beta2_power)
    double eps_inside       # added to what a root is taken of, and to the root: one of them is 0
    double eps_outside

cdef extern from *:
    """
    #include <math.h>
    #include <optcore.h>
    #define OPTCORE_MOST_RULES 16       /* that run_rule tells apart */
    #define OPTCORE_MOST_STATES 3
    #define OPTCORE_ROW_0(rule) {#rule, 0, {0}},
    #define OPTCORE_ROW_1(rule, s) {#rule, 1, {#s}},
    #define OPTCORE_ROW_2(rule, s, t) {#rule, 2, {#s, #t}},
    #define OPTCORE_ROW_3(rule, s, t, u) {#rule, 3, {#s, #t, #u}},
    static const struct optcore_rule_row {
        const char *name;
        int n_states;
        const char *states[OPTCORE_MOST_STATES];
    } optcore_rule_rows[] = {
        OPTCORE_RULES(OPTCORE_ROW_0, OPTCORE_ROW_1, OPTCORE_ROW_2, OPTCORE_ROW_3)
    };
    typedef char optcore_rules_fit[OPTCORE_N_RULES <= OPTCORE_MOST_RULES ? 1 : -1];
    """
    enum:
        MOST_STATES "OPTCORE_MOST_STATES"
        N_RULES "OPTCORE_N_RULES"
    struct RuleRow "optcore_rule_row":
        const char *name
        int n_states
        const char **states
    const RuleRow *RULE_ROWS "optcore_rule_rows"

    # Correctly rounded, as IEEE 754 has it, on every platform
    float rootf "sqrtf"(float) noexcept nogil
    double root "sqrt"(double) noexcept nogil

ctypedef int Rule           # a place in RULE_ROWS

cdef enum Variant:
    PLAIN
    FIRST                   # the first step of a dampened momentum: the velocity starts undampened
    LR_IN_VELOCITY


# The equations

cdef extern from *:
    enum:
        SGD "OPTCORE_RULE_sgd"

cdef inline inlined sgd(real *x, real d, const Scalars *s) noexcept nogil:
    x[0] = x[0] - <real>s.lr * d


cdef extern from *:
    enum:
        MOMENTUM "OPTCORE_RULE_momentum"

cdef inline inlined momentum(
    const Variant variant, real *x, real d, real *v, const Scalars *s
) noexcept nogil:
    if variant == LR_IN_VELOCITY:
        v[0] = <real>s.momentum * v[0] - <real>s.lr * d
        x[0] = x[0] + v[0]
        return
    if variant == FIRST:
        v[0] = d
    else:                   # a factor of 1 changes no bit
        v[0] = <real>s.momentum * v[0] + <real>s.undamped * d
    x[0] = x[0] - <real>s.lr * v[0]


cdef extern from *:
    enum:
        NESTEROV "OPTCORE_RULE_nesterov"

cdef inline inlined nesterov(
    const Variant variant, real *x, real d, real *v, const Scalars *s
) noexcept nogil:
    if variant == LR_IN_VELOCITY:
        v[0] = <real>s.momentum * v[0] - <real>s.lr * d
        x[0] = x[0] + (<real>s.momentum * v[0] - <real>s.lr * d)
    else:
        v[0] = <real>s.momentum * v[0] + d
        x[0] = x[0] - <real>s.lr * (d + <real>s.momentum * v[0])


# What adaptive rules divide by
cdef inline real denominator(real square, const Scalars *s) noexcept nogil:
    cdef real of = square + <real>s.eps_inside
    cdef real taken = <real>rootf(of) if sizeof(real) == sizeof(float) else <real>root(of)
    return taken * <real>s.unbias + <real>s.eps_outside


cdef extern from *:
    enum:
        ADAGRAD "OPTCORE_RULE_adagrad"

cdef inline inlined adagrad(real *x, real d, real *square_sum, const Scalars *s) noexcept nogil:
    square_sum[0] = square_sum[0] + d * d
    x[0] = x[0] - <real>s.lr * d / denominator(square_sum[0], s)


cdef extern from *:
    enum:
        RMSPROP "OPTCORE_RULE_rmsprop"
        RMSPROP_MOMENTUM "OPTCORE_RULE_rmsprop_momentum"
        RMSPROP_NESTEROV "OPTCORE_RULE_rmsprop_nesterov"
        RMSPROP_CENTERED "OPTCORE_RULE_rmsprop_centered"
        RMSPROP_CENTERED_MOMENTUM "OPTCORE_RULE_rmsprop_centered_momentum"
        RMSPROP_CENTERED_NESTEROV "OPTCORE_RULE_rmsprop_centered_nesterov"

cdef inline real squared(real d, real *square_avg, const Scalars *s) noexcept nogil:
    square_avg[0] = <real>s.alpha * square_avg[0] + <real>s.alpha_weight * d * d
    return square_avg[0]


cdef inline real variance(
    real d, real *square_avg, real *grad_avg, const Scalars *s
) noexcept nogil:
    cdef real left
    squared(d, square_avg, s)
    grad_avg[0] = <real>s.alpha * grad_avg[0] + <real>s.alpha_weight * d
    left = square_avg[0] - grad_avg[0] * grad_avg[0]
    return 0 if left < 0 else left          # as it is by rounding; a NaN stays


cdef inline inlined rmsprop(
    const Rule rule, const Variant variant, real *x, real d, real *square_avg, real *velocity,
    real *grad_avg, const Scalars *s
) noexcept nogil:
    cdef real square
    if rule == RMSPROP or rule == RMSPROP_MOMENTUM or rule == RMSPROP_NESTEROV:
        square = squared(d, square_avg, s)
    else:
        square = variance(d, square_avg, grad_avg, s)
    if rule == RMSPROP or rule == RMSPROP_CENTERED:
        x[0] = x[0] - <real>s.lr * d / denominator(square, s)
    elif rule == RMSPROP_MOMENTUM or rule == RMSPROP_CENTERED_MOMENTUM:
        momentum(variant, x, d / denominator(square, s), velocity, s)
    else:
        nesterov(variant, x, d / denominator(square, s), velocity, s)


cdef extern from *:
    enum:
        ADAM "OPTCORE_RULE_adam"
        ADAMW "OPTCORE_RULE_adamw"      # with decoupled decay, which is not in the rule
        AMSGRAD "OPTCORE_RULE_amsgrad"

cdef inline inlined adam(
    const Rule rule, real *x, real d, real *exp_avg, real *exp_avg_sq, real *max_exp_avg_sq,
    const Scalars *s
) noexcept nogil:
    cdef real square
    exp_avg[0] = <real>s.beta1 * exp_avg[0] + <real>s.beta1_weight * d
    square = exp_avg_sq[0] = <real>s.beta2 * exp_avg_sq[0] + <real>s.beta2_weight * d * d
    if rule == AMSGRAD:     # the greater, or a NaN
        square = max_exp_avg_sq[0] if square <= max_exp_avg_sq[0] else square
        square = max_exp_avg_sq[0] if max_exp_avg_sq[0] != max_exp_avg_sq[0] else square
        max_exp_avg_sq[0] = square
    x[0] = x[0] - <real>s.step_size * exp_avg[0] / denominator(square, s)


cdef inline inlined apply_rule(
    const Rule rule, const Variant variant, real *x, real d, real *states, const Scalars *s
) noexcept nogil:
    """Apply the rule that a compile-time constant names; the other rows vanish."""
    if rule == SGD:
        sgd(x, d, s)
    elif rule == MOMENTUM:
        momentum(variant, x, d, &states[0], s)
    elif rule == NESTEROV:
        nesterov(variant, x, d, &states[0], s)
    elif rule == ADAGRAD:
        adagrad(x, d, &states[0], s)
    elif rule == RMSPROP_CENTERED:
        rmsprop(rule, variant, x, d, &states[0], NULL, &states[1], s)
    elif rule == ADAM or rule == AMSGRAD:
        adam(rule, x, d, &states[0], &states[1], &states[2], s)
    elif family_of(rule) == RMSPROP:
        rmsprop(rule, variant, x, d, &states[0], &states[1], &states[2], s)


cdef inline bint is_linear(const Rule rule) noexcept nogil:
    """Whether a step under a gradient of zero is linear in x and the rule's one state, if any."""
    return rule == SGD or rule == MOMENTUM or rule == NESTEROV


cdef inline bint has_variant(const Rule rule, const Variant variant) noexcept nogil:
    """Whether a rule's equations differ in a variant; a rule not named here has none."""
    if variant == LR_IN_VELOCITY:
        return is_nesterov(rule) or has_plain_momentum(rule)
    return variant == PLAIN or rule == MOMENTUM


# How an optimizer chooses among rules

cdef inline Rule family_of(const Rule rule) noexcept nogil:
    """The rule that an optimizer is named for which has this one by its options."""
    if rule == MOMENTUM or rule == NESTEROV:
        return SGD
    if RMSPROP <= rule <= RMSPROP_CENTERED_NESTEROV:
        return RMSPROP
    if rule == ADAMW or rule == AMSGRAD:
        return ADAM
    return rule


cdef inline bint is_still(const Rule rule) noexcept nogil:
    """Whether it is what a family with momentum has without."""
    return rule == SGD or rule == RMSPROP or rule == RMSPROP_CENTERED


cdef inline bint has_plain_momentum(const Rule rule) noexcept nogil:
    return (
        rule == MOMENTUM or rule == RMSPROP_MOMENTUM or rule == RMSPROP_CENTERED_MOMENTUM
    )


cdef inline bint is_nesterov(const Rule rule) noexcept nogil:
    return (
        rule == NESTEROV or rule == RMSPROP_NESTEROV or rule == RMSPROP_CENTERED_NESTEROV
    )


cdef inline bint corrects_bias(const Rule rule) noexcept nogil:
    """Whether a step divides averages that begin at zero by what they lack."""
    return family_of(rule) == ADAM


cdef inline bint counts_steps(const Rule rule) noexcept nogil:
    """Whether the steps of each parameter are counted."""
    return rule == ADAGRAD or family_of(rule) == RMSPROP or corrects_bias(rule)
