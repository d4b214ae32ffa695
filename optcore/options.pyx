"""Hyper-parameters: the table of options, and a Python object becomes a checked number or flag.

`OPTIONS` is the only list of them. Groups, functions, adapters and `make_options` read it, and
tests hold the C struct, the signatures and the stubs to it.
"""
from cpython.float cimport PyFloat_AS_DOUBLE, PyFloat_CheckExact
from libc.math cimport INFINITY, isfinite, isinf
from libc.string cimport memset

from optcore.rules cimport N_RULES, RULE_ROWS, corrects_bias, family_of, is_nesterov, is_still

import operator
from collections import namedtuple
from numbers import Real

import numpy as np

RANGES = {
    NONNEGATIVE: "a finite number >= 0",
    POSITIVE: "a finite number > 0",
    PORTION: "a number in [0, 1)",
    POWER: "a number in [0, 1)",
    FRACTION: "a number in [0, 1)",
    FLAG: "True or False",
    INTEGER: "an integer in [0, 2**64)",
}
# The first is the default.
CHOICES = {
    "master": ("auto", None, "split", "float32"),
    "rounding": ("stochastic", "nearest"),
    "velocity_dtype": (None, "float32", "bfloat16"),
    "state_dtype": (None, "float32", "bfloat16"),
    "lazy": ("exact", "rows"),
}

# What an option may be refused with, and how that is said
cdef enum Condition:
    NO_MOMENTUM = 1
    NOT_DAMPED = 2          # a rule without dampening
    VELOCITY_HAS_LR = 4
    VELOCITY_LACKS_LR = 8   # a rule without that convention
    OTHER_RULE = 16         # than the option chooses
    NORM_CLIPPED = 32
REFUSALS = {
    NO_MOMENTUM: "{name} must have momentum > 0, got momentum=0",
    NOT_DAMPED: "{name} must be 0 with {rule}, got {value!r}",
    VELOCITY_HAS_LR: "{name} must be 0 with lr_in_velocity=True, got {value!r}",
    VELOCITY_LACKS_LR: "{name} must be False with {rule}, got {value!r}",
    OTHER_RULE: "{name} must be False with {rule}, got {value!r}",
    NORM_CLIPPED: "{name} and max_norm exclude each other",
}

# Who holds an option: a key of param_groups, an argument of one step, an attribute
GROUP, CALL, OPTIMIZER = "group", "call", "optimizer"
# Optimizers by the rule that they are named for; `families` are those that have an option.
FAMILIES = tuple(dict.fromkeys([RULE_ROWS[family_of(rule)].name.decode()
                                for rule in range(N_RULES)]))
Option = namedtuple("Option", ["name", "range", "default", "holder", "refused", "offset",
                               "families"], defaults=[FAMILIES])

MOVING = ("sgd", "rmsprop")       # with rules that have momentum
ADAPTIVE = ("adagrad", "rmsprop", "adam")

cdef Options sample
cdef const char *start = <const char *>&sample
# In the order of their fields. A default of None in a range of numbers means none, and infinity
# to the kernels; lr has no default.
OPTIONS = {row.name: row for row in [Option(*row) for row in (
    ("lr", NONNEGATIVE, None, GROUP, 0, <char *>&sample.kernel.lr - start),
    ("momentum", FRACTION, 0.0, GROUP, 0, <char *>&sample.kernel.momentum - start, MOVING),
    ("dampening", PORTION, 0.0, GROUP, NO_MOMENTUM | NOT_DAMPED | VELOCITY_HAS_LR,
     <char *>&sample.kernel.dampening - start, ("sgd",)),
    ("weight_decay", NONNEGATIVE, 0.0, GROUP, 0, <char *>&sample.kernel.weight_decay - start),
    ("grad_scale", POSITIVE, 1.0, CALL, 0, <char *>&sample.kernel.grad_scale - start),
    ("clip_value", NONNEGATIVE, None, GROUP, NORM_CLIPPED,
     <char *>&sample.kernel.clip_value - start),
    ("maximize", FLAG, False, GROUP, 0, <char *>&sample.kernel.maximize - start),
    ("decoupled_weight_decay", FLAG, False, GROUP, 0,
     <char *>&sample.kernel.decoupled_weight_decay - start),
    ("lr_in_velocity", FLAG, False, GROUP, VELOCITY_LACKS_LR,
     <char *>&sample.kernel.lr_in_velocity - start, MOVING),
    ("first_step", FLAG, False, CALL, 0, <char *>&sample.kernel.first_step - start),
    ("flush_subnormals", FLAG, False, GROUP, 0, <char *>&sample.kernel.flush_subnormals - start),
    ("noise_key", INTEGER, 0, CALL, 0, <char *>&sample.kernel.noise_key - start),
    ("first_element", INTEGER, 0, CALL, 0, <char *>&sample.kernel.first_element - start),
    ("stochastic", FLAG, False, CALL, 0, <char *>&sample.kernel.stochastic - start),
    ("alpha", FRACTION, 0.99, GROUP, 0, <char *>&sample.kernel.alpha - start, ("rmsprop",)),
    ("beta1", FRACTION, 0.9, GROUP, 0, <char *>&sample.kernel.beta1 - start, ("adam",)),
    ("beta2", FRACTION, 0.999, GROUP, 0, <char *>&sample.kernel.beta2 - start, ("adam",)),
    ("eps", NONNEGATIVE, 1e-8, GROUP, 0, <char *>&sample.kernel.eps - start, ADAPTIVE),
    ("beta1_power", POWER, 0.0, CALL, 0, <char *>&sample.kernel.beta1_power - start, ("adam",)),
    ("beta2_power", POWER, 0.0, CALL, 0, <char *>&sample.kernel.beta2_power - start, ("adam",)),
    ("eps_in_sqrt", FLAG, False, GROUP, 0, <char *>&sample.kernel.eps_in_sqrt - start, ADAPTIVE),
    ("max_norm", NONNEGATIVE, None, OPTIMIZER, 0, <char *>&sample.max_norm - start),
    ("ema_decay", FRACTION, None, OPTIMIZER, 0, <char *>&sample.ema_decay - start),
    ("nesterov", FLAG, False, GROUP, NO_MOMENTUM | OTHER_RULE,
     <char *>&sample.nesterov - start, MOVING),
    ("dampen_first", FLAG, False, GROUP, 0, <char *>&sample.dampen_first - start, ("sgd",)),
    ("skip_nonfinite", FLAG, False, OPTIMIZER, 0, <char *>&sample.skip_nonfinite - start),
    ("track_grad_norm", FLAG, False, OPTIMIZER, 0, <char *>&sample.track_grad_norm - start),
    ("master", CHOICE, "auto", GROUP, 0, <char *>&sample.master - start),
    ("rounding", CHOICE, "stochastic", GROUP, 0, <char *>&sample.rounding - start),
    ("velocity_dtype", CHOICE, None, GROUP, 0,
     <char *>&sample.velocity_dtype - start, ("sgd",)),
    ("lazy", CHOICE, "exact", GROUP, 0, <char *>&sample.lazy - start),
    ("state_dtype", CHOICE, None, GROUP, 0, <char *>&sample.state_dtype - start, ADAPTIVE),
    ("centered", FLAG, False, GROUP, 0, <char *>&sample.centered - start, ("rmsprop",)),
    ("amsgrad", FLAG, False, GROUP, 0, <char *>&sample.amsgrad - start, ("adam",)),
    ("lr_decay", NONNEGATIVE, 0.0, GROUP, 0, <char *>&sample.lr_decay - start, ("adagrad",)),
    ("initial_accumulator_value", NONNEGATIVE, 0.0, GROUP, 0,
     <char *>&sample.initial_accumulator_value - start, ("adagrad",)),
    ("seed", INTEGER, 0, OPTIMIZER, 0, <char *>&sample.seed - start),
)]}


def defaults_of(holder, family):
    """Return the options of one holder by name, each with its default, lr first."""
    return {row.name: row.default for row in OPTIONS.values()
            if row.holder == holder and family in row.families}


# How states are stored; what stays as an optimizer was built, and is read but once
STORAGE = ("master", "velocity_dtype", "state_dtype")
LASTING = ("lr_in_velocity", "initial_accumulator_value", *STORAGE)
GROUP_OPTIONS = {family: defaults_of(GROUP, family) for family in FAMILIES}
OPTIMIZER_OPTIONS = defaults_of(OPTIMIZER, "sgd")       # which all have
# The fields of optcore_options
KERNEL_OPTIONS = {name: row for name, row in OPTIONS.items()
                  if row.offset < <Py_ssize_t>sizeof(optcore_options)}

cdef enum:
    MOST_OPTIONS = 64

cdef tuple names = tuple(OPTIONS)
cdef Row[MOST_OPTIONS] rows
cdef int[2 * MOST_OPTIONS] rows_by_field    # by the field's place in Options, in units of an int
cdef int[MOST_OPTIONS] rounded, refusable   # rows of what kernels round, of what may be refused
cdef int n_rounded = 0, n_refusable = 0
cdef Options defaults


cdef inline bint is_number(Range range) noexcept:
    return range <= FRACTION


cdef int lay_rows() except -1:
    """Put the table, and the options it gives, where C reads them."""
    global n_rounded, n_refusable
    if len(OPTIONS) > MOST_OPTIONS or sizeof(defaults) > sizeof(rows_by_field):
        raise SystemError("more options than there is room for")
    cdef int i
    cdef char *field
    memset(&defaults, 0, sizeof(defaults))
    defaults.kernel.size = sizeof(optcore_options)
    for i, (name, range, default, _, refused, offset, _) in enumerate(OPTIONS.values()):
        rows[i].range = range
        rows[i].optional = is_number(range) and default is None and name != "lr"
        rows[i].refused = refused
        rows[i].offset = offset
        if is_number(range) and range != POWER and (
            name in KERNEL_OPTIONS or name in LASTING
        ):
            rounded[n_rounded] = i
            n_rounded += 1
        if refused:
            refusable[n_refusable] = i
            n_refusable += 1
        rows_by_field[rows[i].offset // <Py_ssize_t>sizeof(int)] = i
        field = <char *>&defaults + rows[i].offset
        if is_number(range):
            (<double *>field)[0] = INFINITY if rows[i].optional else default or 0
    return 0


lay_rows()


cdef Options default_options() noexcept nogil:
    return defaults


cdef const Row *row_at(int i) noexcept:
    return &rows[i]


cdef str name_at(int i):
    return names[i]


cdef int row_named(str name) except -1:
    return names.index(name)


# From an object to a number

cdef inline bint is_within(double x, Range allowed) noexcept:
    return (
        isfinite(x)
        and (x > 0 or (x == 0 and allowed != POSITIVE))
        and (x < 1 or allowed < PORTION)
    )


cdef double number(object value, str name, Range allowed) except? -1:
    """Return `value` as a float64 in the allowed range.

    A number is a real one of Python's or NumPy's, and whatever has `__float__` and one element:
    a 0-d array, a tensor. Raises TypeError for anything else (bool, too, is refused: a flag
    passed as a number is a mistake) and ValueError outside the range.
    """
    cdef double x
    if PyFloat_CheckExact(value):
        x = PyFloat_AS_DOUBLE(value)
    else:
        try:
            plain = plain_number(value)
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"{name} must be {RANGES[allowed]}, got {value!r} of type "
                f"{type(value).__name__}: {error}"
            ) from error
        if plain is None:
            raise TypeError(
                f"{name} must be {RANGES[allowed]}, got {value!r} of type {type(value).__name__}"
            )
        x = plain
    if is_within(x, allowed):
        return x
    raise ValueError(f"{name} must be {RANGES[allowed]}, got {value!r}")


def plain_number(value):
    """Return what a number of any library is as a float; None for what is none."""
    if getattr(getattr(value, "dtype", None), "kind", None) in ("m", "M"):
        return None             # NumPy counts a timedelta64 among the integers
    if not isinstance(value, Real) and hasattr(type(value), "item"):
        if np.prod(getattr(value, "shape", ())) != 1:
            return None
        if isinstance(value, np.ma.MaskedArray):
            return None
        value = value.item()
    if (
        isinstance(value, (bool, np.bool_, str, bytes))
        or isinstance(value, type)
        or not hasattr(type(value), "__float__")
    ):
        return None
    try:
        return float(value)
    except OverflowError:
        return INFINITY


cdef bint flag(object value, str name) except -1:
    if value is False:
        return False
    if value is True:
        return True
    if isinstance(value, np.bool_):
        return bool(value)
    raise TypeError(f"{name} must be True or False, got {value!r} of type {type(value).__name__}")


cdef uint64_t integer(object value, str name) except? 1:
    if not isinstance(value, (bool, np.bool_)) and hasattr(type(value), "__index__"):
        try:
            whole = operator.index(value)
        except TypeError as error:      # an array's, of one element even
            raise TypeError(
                f"{name} must be {RANGES[INTEGER]}, got {value!r}: {error}"
            ) from error
        if not 0 <= whole < 2**64:
            raise ValueError(f"{name} must be {RANGES[INTEGER]}, got {value!r}")
        return whole
    raise TypeError(
        f"{name} must be {RANGES[INTEGER]}, got {value!r} of type {type(value).__name__}"
    )


cdef int choice(object value, str name, tuple values) except -1:
    """The place of a value among those there are; a dtype, of any library, counts by its name."""
    named = value
    if isinstance(value, np.dtype) and value.metadata is not None:
        named = value.metadata.get("optcore")
    elif value is not None and not isinstance(value, str):
        named = str(getattr(value, "__name__", value)).rpartition(".")[2]
    if named in values:
        return values.index(named)
    error = ValueError if isinstance(value, str) else TypeError
    raise error(
        f"{name} must be {', '.join(map(repr, values[:-1]))} or {values[-1]!r}, got {value!r}"
    )


def checked(option, value, name):
    """Return a number as an option takes it, a float, or its choice; errors call it by `name`."""
    if option in CHOICES:
        return CHOICES[option][choice(value, name, CHOICES[option])]
    return number(value, name, OPTIONS[option].range)


cdef object as_schedule(object value):
    """Return a value that is to be called with the count of steps; None for any other."""
    return value if callable(value) and not isinstance(value, (type, Real)) else None


def is_schedule(value):
    """Return whether an option's value is to be called with the count of steps."""
    return as_schedule(value) is not None


cdef bint is_fixed(object value):
    """Whether a value stays what it is while its object does; an array's element may not."""
    return value is None or isinstance(value, (Real, np.generic, str))


cdef double product_of(double beta, uint64_t n, double least=0) noexcept nogil:
    """The product of n times beta from left to right, as an optimizer forms it step by step.

    Or the first on the way that is less than `least`.
    """
    cdef double product = 1
    while n > 0 and product >= least and product * beta != product:
        product *= beta
        n -= 1
    return product


def running_power(double beta, uint64_t n):
    """Return the product of n times beta as an optimizer forms it, step by step."""
    return product_of(beta, n)


# Into the struct

cdef int take_row(Options *o, int i, object value, str name) except -1:
    cdef void *field = <char *>o + rows[i].offset
    if rows[i].range == FLAG:
        (<int *>field)[0] = flag(value, name)
    elif rows[i].range == INTEGER:
        (<uint64_t *>field)[0] = integer(value, name)
    elif rows[i].range == CHOICE:
        (<int *>field)[0] = choice(value, name, CHOICES[names[i]])
    elif value is None and rows[i].optional:
        (<double *>field)[0] = INFINITY
    else:
        (<double *>field)[0] = number(value, name, rows[i].range)
    return 0


cdef int take(Options *o, const void *field, object value) except -1:
    """Set the field, still a default, that is pointed at, under the name its row has."""
    cdef int i = rows_by_field[(<const char *>field - <const char *>o) // sizeof(int)]
    if PyFloat_CheckExact(value):
        if is_number(rows[i].range) and is_within(PyFloat_AS_DOUBLE(value), rows[i].range):
            (<double *>field)[0] = PyFloat_AS_DOUBLE(value)
            return 0
    elif value is False and rows[i].range == FLAG:
        return 0                    # as `o` was made
    return take_row(o, i, value, name_at(i))


cdef inline double number_at(const Options *o, int i) noexcept:
    return (<const double *>(<const char *>o + rows[i].offset))[0]


cdef inline int int_at(const Options *o, int i) noexcept:
    return (<const int *>(<const char *>o + rows[i].offset))[0]


cdef object value_of(const Options *o, int i):
    """Return an option as a Python object, none where there is none."""
    if rows[i].range == FLAG:
        return bool(int_at(o, i))
    if rows[i].range == INTEGER:
        return (<const uint64_t *>(<const char *>o + rows[i].offset))[0]
    if rows[i].range == CHOICE:
        return CHOICES[names[i]][int_at(o, i)]
    x = number_at(o, i)
    return None if rows[i].optional and x == INFINITY else x


# What depends on the arithmetic type, or on several options

cdef inline bint keeps_kind(const Row *row, double x) noexcept:
    """Whether float32 arithmetic leaves a number finite, not zero, and in [0, 1) if it was."""
    cdef float as_float
    if x == 0 or 1e-37 < x < 0.999999:      # as nearly all are
        return True
    as_float = <float>x
    return (
        (not isinf(as_float) or isinf(x))
        and (as_float != 0 or x == 0)
        and (as_float < 1 or row.range != FRACTION or isinf(x))
    )


cdef int check_rounding(int i, double x, str name) except -1:
    """Refuse a number that float32 arithmetic would turn into another kind of number."""
    if keeps_kind(&rows[i], x):
        return 0
    if <float>x == 1:
        raise ValueError(f"{name} must lie in [0, 1) when rounded to float32, got {x!r}")
    raise ValueError(
        f"{name} must keep its kind when rounded to float32, got {x!r}, which becomes "
        f"{<float>x!r}"
    )


cdef int conditions_of(Rule rule, const Options *o) noexcept:
    return (
        (NO_MOMENTUM if is_still(rule) else 0)
        | (0 if has_variant(rule, FIRST) else NOT_DAMPED)
        | (VELOCITY_HAS_LR if o.kernel.lr_in_velocity else 0)
        | (0 if has_variant(rule, LR_IN_VELOCITY) or is_still(rule) else VELOCITY_LACKS_LR)
        | (0 if is_nesterov(rule) else OTHER_RULE)
        | (NORM_CLIPPED if o.max_norm < INFINITY else 0)
    )


cdef inline bint is_default(const Options *o, int i) noexcept:
    if rows[i].range == FLAG:
        return not int_at(o, i)
    return number_at(o, i) == number_at(&defaults, i)


cdef int check_options(Rule rule, const Options *o, bint as_float32, str prefix="") except -1:
    """Check options together, as a rule takes them; those out of use have their defaults."""
    cdef double shrink
    cdef int i, k, refused, conditions = conditions_of(rule, o)
    if as_float32:
        for k in range(n_rounded):
            i = rounded[k]
            if not keeps_kind(&rows[i], number_at(o, i)):
                check_rounding(i, number_at(o, i), prefix + name_at(i))
    for k in range(n_refusable):
        i = refusable[k]
        refused = rows[i].refused & conditions
        if refused and not is_default(o, i):
            raise ValueError(prefix + REFUSALS[refused & -refused].format(
                name=name_at(i), rule=RULE_ROWS[rule].name.decode(), value=value_of(o, i)
            ))
    if as_float32 and corrects_bias(rule):
        # most at the first step
        if isinf(<float>(o.kernel.lr / (1 - o.kernel.beta1))):
            raise ValueError(
                f"{prefix}lr / (1 - beta1) must be finite in float32, "
                f"got {o.kernel.lr!r} / (1 - {o.kernel.beta1!r})"
            )
        if o.kernel.eps_in_sqrt and o.kernel.eps != 0 and (
            <float>(o.kernel.eps * (1 - o.kernel.beta2)) == 0
        ):
            raise ValueError(
                f"{prefix}eps * (1 - beta2) must not vanish in float32 with eps_in_sqrt=True, "
                f"got {o.kernel.eps!r} * (1 - {o.kernel.beta2!r})"
            )
    if o.kernel.decoupled_weight_decay:
        shrink = 1 - o.kernel.lr * o.kernel.weight_decay
        if not isfinite(shrink) or (as_float32 and isinf(<float>shrink)):
            raise ValueError(
                f"{prefix}lr * weight_decay must be finite, "
                f"got {o.kernel.lr!r} * {o.kernel.weight_decay!r}"
            )
    return 0
