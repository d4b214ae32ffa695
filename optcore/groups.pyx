"""Parameter groups: which options they hold, at which values, and whether they were edited.

The user's list of dictionaries is read when anything in it is another object than before, and
checked whole before any of it is taken over. A value that may change without that, a schedule
or an array's element, is asked anew at each step.
"""
from cpython.dict cimport PyDict_CheckExact
from cpython.list cimport PyList_CheckExact, PyList_GET_SIZE
from libc.string cimport memcpy

from optcore.kernels cimport optcore_options
from optcore.memory cimport zeroed
from optcore.options cimport (
    FLAG,
    FLOAT32_MASTER,
    SPLIT_MASTER,
    Options,
    as_schedule,
    check_options,
    combine,
    is_fixed,
    name_at,
    resolved,
    row_at,
    row_named,
    take_row,
    value_of,
)
from optcore.rules cimport (
    ADAM,
    AMSGRAD,
    MOMENTUM,
    NESTEROV,
    RMSPROP,
    RMSPROP_CENTERED,
    RMSPROP_CENTERED_MOMENTUM,
    RMSPROP_CENTERED_NESTEROV,
    RMSPROP_MOMENTUM,
    RMSPROP_NESTEROV,
    RULE_ROWS,
    SGD,
    Rule,
    corrects_bias,
)
from optcore.structure cimport same_items

from optcore.options import GROUP_OPTIONS, LASTING

OWN_KEYS = ("params", "param_names")
# Keys that schedulers and users write into groups and that no optimizer reads.
GROUP_NOTES = (
    "name", "initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr",
)


cdef Rule chosen_rule(Rule family, const Options *o) noexcept:
    """The rule that options choose of a family."""
    if family == SGD and o.kernel.momentum != 0:
        return NESTEROV if o.nesterov else MOMENTUM
    if family == RMSPROP and o.kernel.momentum == 0:
        return RMSPROP_CENTERED if o.centered else RMSPROP
    if family == RMSPROP and o.centered:
        return RMSPROP_CENTERED_NESTEROV if o.nesterov else RMSPROP_CENTERED_MOMENTUM
    if family == RMSPROP:
        return RMSPROP_NESTEROV if o.nesterov else RMSPROP_MOMENTUM
    if family == ADAM and o.amsgrad:
        return AMSGRAD
    return family


cdef class Groups:
    """The groups of one optimizer: a rule, checked options and scalars for each."""

    def __cinit__(self, list params, Rule family, Rule rule):
        self._params = params
        self._family, self._rule = family, rule
        self._options = GROUP_OPTIONS[RULE_ROWS[family].name.decode()]
        self.n = len(params)
        self._memory = zeroed(self.n, sizeof(Group))
        self.at = <Group *>self._memory.at
        self._seen = [None] * self.n
        self._varying = []

    cdef str prefix(self, Py_ssize_t g):
        return "" if self.n == 1 else f"param_groups[{g}]: "

    cdef bint changed(self, object groups) except -1:
        """Whether any group holds another object anywhere than when it was last read."""
        cdef Py_ssize_t g
        if not PyList_CheckExact(groups) or PyList_GET_SIZE(groups) != self.n:
            return True
        for g in range(self.n):
            group = (<list>groups)[g]
            if not PyDict_CheckExact(group) or not same_items(<dict>group, <tuple>self._seen[g]):
                return True
        return False

    cdef tuple check(self, object groups, const Options *own):
        """Check every group beside the optimizer's own options; return what `adopt` takes over.

        Checking runs code of the user's, a number's __float__ for one, so it works on copies.
        """
        cdef Py_ssize_t g
        cdef Group *group
        cdef Buffer memory
        cdef list copies, seen = [], varying = []
        if not isinstance(groups, list) or len(groups) != self.n:
            raise ValueError(
                f"param_groups must stay a list of {self.n} groups, got "
                + (f"{len(groups)}" if isinstance(groups, list) else type(groups).__name__)
            )
        copies = list(groups)
        for g in range(self.n):
            if not isinstance(copies[g], dict):
                raise TypeError(
                    f"param_groups[{g}] must be a dictionary, got {type(copies[g]).__name__}"
                )
            copies[g] = dict(copies[g])
        memory = zeroed(self.n, sizeof(Group))
        memcpy(memory.at, self.at, self.n * sizeof(Group))
        for g in range(self.n):
            group = <Group *>memory.at + g
            group.options = own[0]
            self._read_group(g, copies[g], group, varying)
            if self._seen[g] is not None:
                self._check_lasting(g, &group.options)
            seen.append(tuple([part for item in copies[g].items() for part in item]))
        return memory, seen, varying

    cdef int _check_lasting(self, Py_ssize_t g, const Options *now) except -1:
        """Refuse to change what the states were laid out for."""
        cdef const Options *built = &self.at[g].options
        if now.kernel.lr_in_velocity != built.kernel.lr_in_velocity:
            raise ValueError(
                f"{self.prefix(g)}lr_in_velocity must stay as the optimizer was built: "
                "load_state_dict() converts between the conventions"
            )
        for name in LASTING:
            was, value = value_of(built, row_named(name)), value_of(now, row_named(name))
            if value != was:
                raise ValueError(
                    f"{self.prefix(g)}{name} must stay as the optimizer was built, {was!r}, got "
                    f"{value!r}: build another and load_state_dict(opt.state_dict()) in it"
                )
        return 0

    cdef void adopt(self, tuple checked) noexcept:
        memcpy(self.at, (<Buffer>checked[0]).at, self.n * sizeof(Group))
        self._seen, self._varying = checked[1], checked[2]

    cdef int _read_group(self, Py_ssize_t g, dict given, Group *group, list varying) except -1:
        cdef str prefix = self.prefix(g)
        cdef int row
        for key in given:
            if key not in self._options and key not in OWN_KEYS and key not in GROUP_NOTES:
                raise TypeError(
                    f"{prefix}unknown option {key!r}; options are {', '.join(self._options)}"
                )
        for key in (*OWN_KEYS, *self._options):
            if key not in given:
                raise KeyError(f"{prefix}option {key!r} is missing")
        if given["params"] is not self._params[g]:
            raise ValueError(f"{prefix}params must stay as the optimizer was built")
        for name in self._options:
            row = row_named(name)
            value = given[name]
            if row_at(row).range >= FLAG or is_fixed(value) or name in LASTING:
                take_row(&group.options, row, value, prefix + name)
                continue
            varying.append((g, row, value))
            if as_schedule(value) is None:
                take_row(&group.options, row, value, prefix + name)
            elif name == "momentum":
                group.options.kernel.momentum = 0.5     # until a step asks: some rule has it
        return self._check_group(g, group)

    cdef int _check_group(self, Py_ssize_t g, Group *group) except -1:
        """Choose the group's rule by its options, and check them together."""
        cdef str prefix = self.prefix(g)
        group.rule = self._rule if self._rule >= 0 else chosen_rule(self._family, &group.options)
        group.rule = resolved(group.rule, &group.options.kernel)
        self._check_storage(prefix, group)
        if group.has_float32:
            check_options(group.rule, &group.options, True, prefix)
        if group.has_float64:
            check_options(group.rule, &group.options, False, prefix)
        return 0

    cdef int _check_storage(self, str prefix, const Group *group) except -1:
        """Refuse a master or a velocity that the group's parameters cannot have."""
        cdef int master = group.options.master
        if master == SPLIT_MASTER and (group.has_float16 or not group.has_bfloat16):
            raise ValueError(
                f"{prefix}master='split' must have bfloat16 parameters, got "
                + ("float16: master='float32' is for those" if group.has_float16
                   else "none: master='auto' suits every type")
            )
        if master == FLOAT32_MASTER and not (group.has_float16 or group.has_bfloat16):
            raise ValueError(
                f"{prefix}master='float32' must have bfloat16 or float16 parameters, got none: "
                "master='auto' suits every type"
            )
        for name in ("velocity_dtype", "state_dtype"):
            dtype = value_of(&group.options, row_named(name))
            if dtype is not None and group.has_float64:
                raise ValueError(
                    f"{prefix}{name} must be None for float64 parameters, got {dtype!r}"
                )
        return 0

    cdef bint follow(self, Py_ssize_t step_count) except -1:
        """Ask what varies for its number at this step, and check the groups it is in.

        Return whether anything does.
        """
        cdef Py_ssize_t g
        cdef int row
        if not self._varying:
            return False
        for g, row, value in self._varying:
            name = self.prefix(g) + name_at(row)
            if as_schedule(value) is not None:
                value, name = value(step_count), name + "(step_count)"
            take_row(&self.at[g].options, row, value, name)
        for g in sorted({g for g, _, _ in self._varying}):
            self._check_group(g, &self.at[g])
        return True

    cdef void form_scalars(self, double grad_scale, double ema_decay) noexcept:
        """Form the scalars of a step."""
        cdef Py_ssize_t g
        self._grad_scale, self._ema_decay = grad_scale, ema_decay
        for g in range(self.n):
            self.scalars_at(g, NULL, &self.at[g].scalars)

    cdef void scalars_at(self, Py_ssize_t g, const Count *count, Scalars *scalars) noexcept:
        """Form those of one group, or of a parameter of it that has had so many steps."""
        cdef const Options *own = &self.at[g].options
        cdef optcore_options o = own.kernel
        o.grad_scale = self._grad_scale
        if count != NULL:
            o.lr /= 1 + (count.step - 1) * own.lr_decay
            if corrects_bias(self.at[g].rule):
                o.beta1_power, o.beta2_power = count.beta1_power, count.beta2_power
        scalars[0] = combine(&o)
        scalars.ema_decay = self._ema_decay
        scalars.ema_weight = 1 - self._ema_decay

    def values(self):
        """Return every group's options as the numbers and flags now at work."""
        cdef Py_ssize_t g
        return [
            {name: value_of(&self.at[g].options, row_named(name)) for name in self._options}
            for g in range(self.n)
        ]
