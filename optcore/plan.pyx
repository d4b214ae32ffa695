"""The whole-model step: a table of checked tensors, and two sweeps over it.

A step first checks everything and writes nothing: groups that changed, schedules, gradients,
memory that moved. Then come the sweeps, which cannot fail, and last the bookkeeping.
"""
from cpython.dict cimport PyDict_CheckExact, PyDict_Next
from cpython.list cimport PyList_CheckExact, PyList_GET_ITEM, PyList_GET_SIZE
from cpython.object cimport PyObject
from cpython.tuple cimport PyTuple_GET_ITEM, PyTuple_GET_SIZE
from libc.math cimport INFINITY, isfinite, ldexp, sqrt
from libc.stdlib cimport calloc, free, realloc
from libc.string cimport memcmp, memcpy
from numpy cimport (
    PyArray_DATA,
    PyArray_SIZE,
    import_array,
    ndarray,
)

from optcore.arrays cimport (
    Label,
    Span,
    check_like,
    check_param,
    dtype_of,
    first_overlap,
    is_unmoved,
    overlapped_by,
    sort_spans,
    span_of,
    spell,
)
from optcore.kernels cimport optcore_options
from optcore.options cimport (
    FAMILY_MOMENTUM,
    FAMILY_NESTEROV,
    FAMILY_SGD,
    FRACTION,
    NONNEGATIVE,
    POSITIVE,
    Family,
    check_options,
    check_rounding,
    choose_rule,
    combine,
    default_options,
    flag,
    number,
)
from optcore.parallel cimport GIL_HELD_BELOW, sweep_all
from optcore.rules cimport SGD as SGD_RULE
from optcore.sweep cimport (
    CHUNK,
    FLOAT32,
    FLOAT64,
    SQUARES,
    STEP,
    ZERO,
    Partial,
    Scalars,
    Sweep,
    Tensor,
    one_tensor,
)

from collections.abc import Iterable, Mapping

import numpy as np

from optcore._arena import allocate_like
from optcore.arrays import is_array

import_array()

# What a parameter group holds, with defaults where there are any.
GROUP_OPTIONS = {
    "momentum": 0.0,
    "dampening": 0.0,
    "weight_decay": 0.0,
    "nesterov": False,
    "maximize": False,
    "decoupled_weight_decay": False,
    "lr_in_velocity": False,
    "clip_value": None,
}
GROUP_KEYS = ("params", "param_names", "lr", *GROUP_OPTIONS)
# Keys that schedulers and users write into groups and that no optimizer reads.
GROUP_NOTES = (
    "name", "initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr",
)
# Squares of float64 gradients leave the range of float64 beyond 2**±512.
cdef enum:
    RESCALE = 600
cdef double TINY_SQUARES = ldexp(1, -900)

cdef struct Group:
    optcore_options options
    Family family
    bint has_float32
    bint has_float64

cdef struct Slot:               # what the plan alone knows of a tensor
    Py_ssize_t group
    bint first_step             # its velocity has not started
    const void *clear           # the gradient last seen to overlap nothing that is written
    const void *bound           # where its bound gradient is


class _Bound:
    """The default of `step`: None would hide a gradient function that forgot to return."""

    def __repr__(self):
        return "<the bound gradients>"


BOUND = _Bound()


cdef class Plan:
    """The compiled part of `optcore.SGD`. Not for direct use."""

    cdef Tensor *_tensors
    cdef Tensor *_sums          # bound gradients, as parameters that accumulate() steps
    cdef Slot *_slots
    cdef Group *_groups
    cdef Scalars *_scalars
    cdef Span *_written         # sorted: parameters and arenas
    cdef Partial *_partials
    cdef void **_pointers       # gradients of this step: tensor by tensor, set by set
    cdef void **_apart          # those last seen to share no memory
    cdef Span *_spans           # room to sort them
    cdef Py_ssize_t _n, _n_groups, _n_written, _n_pointers, _n_apart
    cdef bint _built, _busy, _single, _any_float32, _any_float64
    cdef tuple _params, _keys, _bound, _velocities, _averages
    cdef list _seen             # the keys and values of each group when it was last read
    cdef list _group_params
    cdef list _schedules        # for each group a callable or None
    cdef bint _scheduled
    cdef bint _by_name
    cdef double _max_norm       # infinity: none
    cdef double _ema_decay
    cdef object _ema_schedule
    cdef bint _skip_nonfinite, _track_grad_norm
    cdef object _grad_norm
    cdef tuple _nonfinite
    cdef readonly Py_ssize_t step_count
    cdef readonly Py_ssize_t skipped
    cdef public object param_groups
    # Where others hold the rest of the gradients: takes this plan's sum of squares and the
    # indices of its parameters that are not finite, returns everyone's.
    cdef public object _join_squares

    def __dealloc__(self):
        free(self._tensors)
        free(self._sums)
        free(self._slots)
        free(self._groups)
        free(self._scalars)
        free(self._written)
        free(self._partials)
        free(self._pointers)
        free(self._apart)
        free(self._spans)

    def __reduce__(self):
        raise TypeError(
            "an optimizer holds the addresses of its arrays and cannot be copied or pickled: "
            "build one for the copied parameters and give it this one's state_dict()"
        )

    # Building

    def _build(
        self, list groups, *, bint single, bint by_name, max_norm, skip_nonfinite,
        track_grad_norm, ema_decay, grads
    ):
        """Check everything, lay out the tables, and open the optimizer for use.

        `groups` are complete dictionaries; "params" is a tuple, "param_names" a tuple or None.
        "params" comes to hold NumPy's views of what other libraries lent.
        """
        cdef Py_ssize_t i, g, n
        cdef ndarray a
        if self._tensors != NULL:
            raise RuntimeError("an optimizer is built once")
        arrays, keys, group_of = [], [], []
        for g, group in enumerate(groups):
            arrays += group["params"]
            keys += group["param_names"] or [None] * len(group["params"])
            group_of += [g] * len(group["params"])
        if not arrays:
            raise ValueError("params must hold at least one array, got none")
        n = len(arrays)
        self._single = single
        self._by_name = by_name
        self._keys = None if all([key is None for key in keys]) else tuple(keys)
        for i in range(n):
            arrays[i] = check_param(arrays[i], self._label(b"params", i), self._keys)
        self._tensors = <Tensor *>allocate(n, sizeof(Tensor))
        self._slots = <Slot *>allocate(n, sizeof(Slot))
        self._groups = <Group *>allocate(len(groups), sizeof(Group))
        self._scalars = <Scalars *>allocate(len(groups), sizeof(Scalars))
        self._written = <Span *>allocate(n + 2, sizeof(Span))
        self._params = tuple(arrays)
        self._n = n
        self._n_groups = len(groups)
        self._max_norm = INFINITY
        for i in range(n):
            a = arrays[i]
            g = group_of[i]
            self._slots[i].group = g
            self._slots[i].first_step = True
            self._tensors[i] = one_tensor(
                PyArray_DATA(a), NULL, NULL, PyArray_SIZE(a), dtype_of(a), SGD_RULE,
                &self._scalars[g]
            )
            if self._tensors[i].dtype == FLOAT64:
                self._groups[g].has_float64 = self._any_float64 = True
            else:
                self._groups[g].has_float32 = self._any_float32 = True
        self._list_written()
        self._seen = [None] * len(groups)
        i = 0
        for group in groups:
            n = len(group["params"])
            group["params"] = self._params[i : i + n]
            i += n
        self._group_params = [group["params"] for group in groups]
        self._schedules = [None] * len(groups)
        self.param_groups = groups
        self._read_groups()
        self.max_norm = max_norm
        self.skip_nonfinite = skip_nonfinite
        self.track_grad_norm = track_grad_norm
        self._start_velocities()
        if ema_decay is not None:
            self._set_ema_decay(ema_decay)
        if grads is not None:
            self._bind(grads)
        self._built = True

    cdef Label _label(self, const char *what, Py_ssize_t i):
        return Label(what, -1 if self._single else i)

    cdef int _list_written(self) except -1:
        """Sort the memory a step writes; two parameters in one place are an error."""
        cdef Py_ssize_t i, at, n = 0
        cdef Span span
        for i in range(self._n):
            span = span_of(<ndarray>self._params[i], i)
            if span.begin < span.end:
                self._written[n] = span
                n += 1
        for arena in (self._velocities, self._averages):
            if arena is not None:
                span = span_of(<ndarray>arena[0], -1)
                span.end = span_of(<ndarray>arena[self._n - 1], -1).end
                if span.begin < span.end:
                    self._written[n] = span
                    n += 1
        sort_spans(self._written, n)
        at = first_overlap(self._written, n)
        if at > 0:
            first, second = sorted([self._written[at - 1].owner, self._written[at].owner])
            same = "is the same array as" if (
                self._params[first] is self._params[second]
            ) else "shares memory with"
            raise ValueError(
                f"{self._spell(b'params', second)} {same} {self._spell(b'params', first)}"
            )
        self._n_written = n
        for i in range(self._n):
            self._slots[i].clear = NULL
        return 0

    cdef str _spell(self, const char *what, Py_ssize_t i):
        return spell(self._label(what, i), self._keys)

    cdef int _start_velocities(self) except -1:
        """Allocate the velocities as soon as a group's rule has one."""
        cdef Py_ssize_t g
        if self._velocities is None:
            for g in range(self._n_groups):
                if self._groups[g].family != FAMILY_SGD:
                    return self._allocate_velocities()
        return 0

    cdef int _allocate_velocities(self) except -1:
        cdef Py_ssize_t i
        self._velocities = tuple(allocate_like(self._params))
        for i in range(self._n):
            self._tensors[i].velocity = PyArray_DATA(<ndarray>self._velocities[i])
        self._list_written()
        return 0

    cdef int _allocate_averages(self) except -1:
        cdef Py_ssize_t i
        self._averages = tuple(allocate_like(self._params))
        for i in range(self._n):
            self._averages[i][...] = self._params[i]
            self._tensors[i].ema = PyArray_DATA(<ndarray>self._averages[i])
        self._list_written()
        return 0

    # Options

    cdef bint _groups_changed(self) except -1:
        """Whether any group holds another object anywhere than when it was last read."""
        cdef Py_ssize_t g, k, n, position
        cdef PyObject *key
        cdef PyObject *value
        cdef tuple seen
        groups = self.param_groups
        if not PyList_CheckExact(groups) or PyList_GET_SIZE(groups) != self._n_groups:
            return True
        for g in range(self._n_groups):
            group = (<list>groups)[g]
            seen = <tuple>self._seen[g]
            if not PyDict_CheckExact(group):
                return True
            n = PyTuple_GET_SIZE(seen)
            k = position = 0
            while PyDict_Next(group, &position, &key, &value):
                if (
                    k >= n
                    or <PyObject *>PyTuple_GET_ITEM(seen, k) != key
                    or <PyObject *>PyTuple_GET_ITEM(seen, k + 1) != value
                ):
                    return True
                k += 2
            if k != n:
                return True
        return False

    cdef int _read_groups(self) except -1:
        """Check every group, then take them all over.

        Checking runs code of the user's, a number's __float__ for one, so it works on copies.
        """
        cdef Py_ssize_t g
        cdef Group *read
        cdef list groups, schedules = [], seen = []
        if not isinstance(self.param_groups, list) or len(self.param_groups) != self._n_groups:
            raise ValueError(
                f"param_groups must stay a list of {self._n_groups} groups, got "
                + (f"{len(self.param_groups)}" if isinstance(self.param_groups, list)
                   else type(self.param_groups).__name__)
            )
        groups = list(self.param_groups)
        for g in range(self._n_groups):
            if not isinstance(groups[g], dict):
                raise TypeError(
                    f"param_groups[{g}] must be a dictionary, got {type(groups[g]).__name__}"
                )
            groups[g] = dict(groups[g])
        read = <Group *>allocate(self._n_groups, sizeof(Group))
        try:
            for g in range(self._n_groups):
                prefix = "" if self._n_groups == 1 else f"param_groups[{g}]: "
                read[g] = self._groups[g]
                schedules.append(self._read_group(groups[g], &read[g], prefix))
                if (
                    self._seen[g] is not None
                    and read[g].options.lr_in_velocity != self._groups[g].options.lr_in_velocity
                ):
                    raise ValueError(
                        f"{prefix}lr_in_velocity must stay as the optimizer was built: "
                        "load_state_dict() converts between the conventions"
                    )
                if groups[g]["params"] is not self._group_params[g]:
                    raise ValueError(f"{prefix}params must stay as the optimizer was built")
                seen.append(tuple([part for item in groups[g].items() for part in item]))
            for g in range(self._n_groups):
                self._groups[g] = read[g]
        finally:
            free(read)
        self._schedules = schedules
        self._scheduled = any([schedule is not None for schedule in schedules])
        self._seen = seen
        return 0

    cdef object _read_group(self, dict group, Group *read, str prefix):
        """Read one group's options; return its schedule, if it has one."""
        cdef optcore_options *o = &read.options
        for key in group:
            if key not in GROUP_KEYS and key not in GROUP_NOTES:
                raise TypeError(
                    f"{prefix}unknown option {key!r}; options are lr, {', '.join(GROUP_OPTIONS)}"
                )
        for key in GROUP_KEYS:
            if key not in group:
                raise KeyError(f"{prefix}option {key!r} is missing")
        o[0] = default_options()
        lr = group["lr"]
        schedule = lr if callable(lr) and not isinstance(lr, type) else None
        if schedule is None:
            o.lr = number(lr, prefix + "lr", NONNEGATIVE)
        o.momentum = number(group["momentum"], prefix + "momentum", FRACTION)
        o.dampening = number(group["dampening"], prefix + "dampening", FRACTION)
        o.weight_decay = number(group["weight_decay"], prefix + "weight_decay", NONNEGATIVE)
        o.maximize = flag(group["maximize"], prefix + "maximize")
        o.decoupled_weight_decay = flag(
            group["decoupled_weight_decay"], prefix + "decoupled_weight_decay"
        )
        o.lr_in_velocity = flag(group["lr_in_velocity"], prefix + "lr_in_velocity")
        if group["clip_value"] is not None:
            o.clip_value = number(group["clip_value"], prefix + "clip_value", NONNEGATIVE)
            if self._max_norm < INFINITY:
                raise ValueError(f"{prefix}clip_value and max_norm exclude each other")
        nesterov = flag(group["nesterov"], prefix + "nesterov")
        if nesterov and o.momentum == 0:
            raise ValueError(f"{prefix}nesterov must have momentum > 0, got momentum=0")
        if o.dampening != 0 and o.momentum == 0:
            raise ValueError(f"{prefix}dampening must have momentum > 0, got momentum=0")
        if nesterov:
            read.family = FAMILY_NESTEROV
        else:
            read.family = FAMILY_MOMENTUM if o.momentum != 0 else FAMILY_SGD
        self._check_group(read, prefix)
        return schedule

    cdef int _check_group(self, const Group *group, str prefix) except -1:
        if group.has_float32:
            check_options(group.family, &group.options, FLOAT32, prefix)
        if group.has_float64:
            check_options(group.family, &group.options, FLOAT64, prefix)
        return 0

    cdef int _follow_schedules(self) except -1:
        cdef Py_ssize_t g
        for g in range(self._n_groups):
            schedule = self._schedules[g]
            if schedule is not None:
                prefix = "" if self._n_groups == 1 else f"param_groups[{g}]: "
                self._groups[g].options.lr = number(
                    schedule(self.step_count), prefix + "lr(step_count)", NONNEGATIVE
                )
                self._check_group(&self._groups[g], prefix)
        return 0

    cdef void _combine(self, double grad_scale, double ema_decay) noexcept:
        cdef Py_ssize_t g
        cdef optcore_options o
        for g in range(self._n_groups):
            o = self._groups[g].options
            o.grad_scale = grad_scale
            self._scalars[g] = combine(&o)
            self._scalars[g].ema_decay = ema_decay
            self._scalars[g].ema_weight = 1 - ema_decay

    cdef double _read_ema_decay(self, object value, str name) except -1:
        cdef double decay = number(value, name, FRACTION)
        if self._any_float32:
            check_rounding(name, decay)
            if <float>decay == 1:
                raise ValueError(
                    f"{name} must lie in [0, 1) when rounded to float32, got {decay!r}"
                )
        return decay

    cdef double _current_ema_decay(self) except -1:
        if self._averages is None:
            return 0
        if self._ema_schedule is None:
            return self._ema_decay
        return self._read_ema_decay(
            self._ema_schedule(self.step_count), "ema_decay(step_count)"
        )

    cdef int _set_ema_decay(self, object value) except -1:
        cdef double decay = 0
        schedule = value if callable(value) and not isinstance(value, type) else None
        if schedule is None:
            decay = self._read_ema_decay(value, "ema_decay")
        if self._averages is None:
            self._check_places()
            self._allocate_averages()
        self._ema_decay = decay
        self._ema_schedule = schedule
        return 0

    @property
    def max_norm(self):
        """Upper bound on the norm of all gradients together; None: no clipping."""
        return None if self._max_norm == INFINITY else self._max_norm

    @max_norm.setter
    def max_norm(self, value):
        cdef double before = self._max_norm
        self._max_norm = INFINITY if value is None else number(value, "max_norm", NONNEGATIVE)
        try:
            self._read_groups()         # for clip_value, which excludes it
        except BaseException:
            self._max_norm = before
            raise

    @property
    def skip_nonfinite(self):
        """Whether a step whose gradients hold a NaN or an infinity is skipped."""
        return self._skip_nonfinite

    @skip_nonfinite.setter
    def skip_nonfinite(self, value):
        self._skip_nonfinite = flag(value, "skip_nonfinite")

    @property
    def track_grad_norm(self):
        """Whether every step measures `grad_norm`, even without `max_norm`."""
        return self._track_grad_norm

    @track_grad_norm.setter
    def track_grad_norm(self, value):
        self._track_grad_norm = flag(value, "track_grad_norm")

    @property
    def ema_decay(self):
        """Decay of the weight average, or its schedule; None: no average is kept."""
        if self._averages is None:
            return None
        return self._ema_decay if self._ema_schedule is None else self._ema_schedule

    @ema_decay.setter
    def ema_decay(self, value):
        self._begin()
        try:
            if value is None and self._averages is not None:
                raise ValueError("ema_decay cannot be None once an average is kept")
            if value is not None:
                self._set_ema_decay(value)
        finally:
            self._busy = False

    # Gradients

    cdef tuple _listed(self, object grads, str what):
        """The gradients of all parameters in order, from the structure of `params`."""
        cdef tuple listed
        if self._single:
            return (grads,)
        if isinstance(grads, (list, tuple)) and not self._by_name and len(grads) == self._n:
            return tuple(grads)
        if self._by_name:
            if not isinstance(grads, Mapping):
                raise TypeError(
                    f"{what} must be a mapping by parameter name, got {type(grads).__name__}"
                )
            missing = [key for key in self._keys if key not in grads]
            if missing or len(grads) != self._n:
                unknown = [key for key in grads if key not in self._keys]
                raise ValueError(
                    f"{what} must have the names of params, got "
                    + " and ".join(
                        [f"none named {missing!r}"] * bool(missing)
                        + [f"unknown {unknown!r}"] * bool(unknown)
                    )
                )
            return tuple([grads[key] for key in self._keys])
        if not isinstance(grads, (list, tuple)) and (
            isinstance(grads, (str, set, frozenset, Mapping))
            or is_array(grads)
            or not isinstance(grads, Iterable)
        ):
            raise TypeError(
                f"{what} must be a sequence of {self._n} arrays, got {type(grads).__name__}"
            )
        listed = tuple(grads)
        if PyTuple_GET_SIZE(listed) != self._n:
            raise ValueError(
                f"{what} must have one entry for each of {self._n} parameters, "
                f"got {PyTuple_GET_SIZE(listed)}"
            )
        return listed

    cdef Py_ssize_t _take(self, list sets, tuple names, bint written) except -1:
        """Check sets of gradients, point every tensor at its own; return how many elements.

        A set with gradients of other libraries is replaced in `sets` by one of NumPy's views of
        them, which the caller holds for as long as the pointers are used.
        """
        cdef Py_ssize_t i, k, n_elements = 0, n_sets = PyList_GET_SIZE(sets)
        cdef Py_ssize_t n_pointers = self._n * n_sets
        cdef tuple listed
        cdef list views
        cdef ndarray a
        cdef Label label
        cdef void *data
        if n_pointers > self._n_pointers:
            self._pointers = <void **>reallocate(self._pointers, n_pointers, sizeof(void *))
            self._n_pointers = n_pointers
        for k in range(n_sets):
            listed = <tuple>PyList_GET_ITEM(sets, k)
            views = None
            for i in range(self._n):
                gradient = <object>PyTuple_GET_ITEM(listed, i)
                label = self._label(<bytes>PyTuple_GET_ITEM(names, k), i)
                data = NULL
                if gradient is not None:
                    a = check_like(
                        gradient, <ndarray>PyTuple_GET_ITEM(self._params, i), written, label,
                        self._keys
                    )
                    if <PyObject *>a != <PyObject *>gradient:
                        if views is None:
                            views = list(listed)
                        views[i] = a
                    data = PyArray_DATA(a)
                    if data != self._slots[i].clear or k > 0:
                        self._refuse_written(a, label)
                        if k == 0:
                            self._slots[i].clear = data
                if k > 0 and (data == NULL) != (self._pointers[i * n_sets] == NULL):
                    raise ValueError(
                        f"{spell(label, self._keys)} and its counterpart in {names[0].decode()} "
                        "must both be None or neither"
                    )
                self._pointers[i * n_sets + k] = data
            if views is not None:
                sets[k] = tuple(views)
        for i in range(self._n):
            self._tensors[i].grads = &self._pointers[i * n_sets]
            self._tensors[i].n_grads = <int>n_sets
            if self._pointers[i * n_sets] != NULL:
                n_elements += self._tensors[i].size
        if written:
            self._refuse_shared(names)
        return n_elements

    cdef int _refuse_written(self, ndarray gradient, Label label) except -1:
        cdef Py_ssize_t at = overlapped_by(
            self._written, self._n_written, span_of(gradient, 0)
        )
        if at >= 0:
            at = self._written[at].owner
            owner = "the optimizer's own memory" if at < 0 else self._spell(b"params", at)
            raise ValueError(
                f"{spell(label, self._keys)} must not share memory with {owner}, "
                "got overlapping arrays"
            )
        return 0

    cdef int _refuse_shared(self, tuple names) except -1:
        """Refuse gradients that share memory where they are written."""
        cdef Py_ssize_t i, k, at, n = 0, n_sets = PyTuple_GET_SIZE(names)
        cdef Py_ssize_t n_pointers = self._n * n_sets
        if (
            n_pointers == self._n_apart
            and memcmp(self._apart, self._pointers, n_pointers * sizeof(void *)) == 0
        ):
            return 0
        self._n_apart = 0
        self._apart = <void **>reallocate(self._apart, n_pointers, sizeof(void *))
        self._spans = <Span *>reallocate(self._spans, n_pointers, sizeof(Span))
        for i in range(self._n):
            for k in range(n_sets):
                if self._pointers[i * n_sets + k] != NULL and self._tensors[i].size:
                    self._spans[n] = self._span_at(
                        self._pointers[i * n_sets + k], i, k * self._n + i
                    )
                    n += 1
        sort_spans(self._spans, n)
        at = first_overlap(self._spans, n)
        if at > 0:
            first, second = [
                self._spell(names[owner // self._n], owner % self._n)
                for owner in sorted([self._spans[at - 1].owner, self._spans[at].owner])
            ]
            raise ValueError(
                f"{second} must not share memory with {first} where gradients are written, "
                "got overlapping arrays"
            )
        memcpy(self._apart, self._pointers, n_pointers * sizeof(void *))
        self._n_apart = n_pointers
        return 0

    cdef Span _span_at(self, const void *data, Py_ssize_t i, Py_ssize_t owner) noexcept:
        """The memory of an array as large as parameter i."""
        cdef Span span
        span.begin = <const char *>data
        span.end = span.begin + self._tensors[i].size * (
            sizeof(float) if self._tensors[i].dtype == FLOAT32 else sizeof(double)
        )
        span.owner = owner
        return span

    def _bind(self, grads):
        """Check gradients once and keep them."""
        cdef Py_ssize_t i
        cdef list sets = [self._listed(grads, "grads")]
        self._take(sets, (b"grads",), True)
        self._sums = <Tensor *>allocate(self._n, sizeof(Tensor))
        for i in range(self._n):
            self._slots[i].bound = self._pointers[i]
        self._bound = sets[0]

    cdef Py_ssize_t _take_bound(self) except -1:
        """Point every tensor at its bound gradient."""
        cdef Py_ssize_t i, n_elements = 0
        cdef const void *data
        cdef Tensor *t
        for i in range(self._n):
            t = &self._tensors[i]
            data = self._slots[i].bound
            self._pointers[i] = <void *>data
            t.grads = &self._pointers[i]
            t.n_grads = 1
            if data != NULL:
                if not is_unmoved(
                    <ndarray>PyTuple_GET_ITEM(self._bound, i), data, t.size, t.dtype
                ):
                    self._refuse_moved(self._bound, i, data, b"grads")
                n_elements += t.size
        return n_elements

    cdef int _check_places(self) except -1:
        """Refuse parameters whose memory moved, before anything is sized or stepped by them."""
        cdef Py_ssize_t i
        cdef Tensor *t
        for i in range(self._n):
            t = &self._tensors[i]
            if not is_unmoved(
                <ndarray>PyTuple_GET_ITEM(self._params, i), t.param, t.size, t.dtype
            ):
                self._refuse_moved(self._params, i, t.param, b"params")
        return 0

    cdef int _refuse_moved(
        self, tuple arrays, Py_ssize_t i, const void *data, const char *what
    ) except -1:
        a = arrays[i]
        raise ValueError(
            f"{self._spell(what, i)} must stay in its place, {self._tensors[i].size} contiguous, "
            f"writeable elements at {<size_t>data:#x}; got {a.size} of {a.dtype} with "
            f"strides {a.strides}, {'writeable' if a.flags.writeable else 'read-only'}, at "
            f"{a.ctypes.data:#x}"
        )

    # Stepping

    cdef int _begin(self) except -1:
        """Enter the one call at a time that an optimizer serves."""
        if not self._built:
            raise RuntimeError("this optimizer was never built")
        if self._busy:
            raise RuntimeError(
                "this optimizer is stepping already, in another thread or in the caller of a "
                "schedule: one step at a time"
            )
        self._busy = True
        return 0

    cdef void _sweep(self, Sweep what, const Tensor *tensors, Py_ssize_t n_elements) noexcept:
        if (n_elements + self._n) * tensors[0].n_grads < GIL_HELD_BELOW:
            sweep_all(what, tensors, self._n, n_elements)
        else:
            with nogil:
                sweep_all(what, tensors, self._n, n_elements)

    def step(self, grads=BOUND, *, grad_scale=1.0, zero_grad=False):
        """Take one step over all parameters.

        Parameters
        ----------
        grads : array, sequence or mapping, in the structure of `params`, optional
            A parameter whose gradient is None is left out entirely. Without it, the gradients
            bound at construction.
        grad_scale : float, > 0, default 1
            Multiplies every gradient first: 1 / loss scale, or 1 / number of accumulations.
        zero_grad : bool, default False
            Set the gradients to zero in the same sweep, also where the step is skipped.

        Returns
        -------
        bool
            True when the step was applied, False when it was skipped (`skip_nonfinite`).

        Raises
        ------
        TypeError, ValueError
            For gradients and hyper-parameters that are not as they must be; RuntimeError
            where a step of this optimizer is under way. Nothing has changed then.
        """
        self._begin()
        try:
            return self._step(self._one_set(grads), (b"grads",), grad_scale, zero_grad)
        finally:
            self._busy = False

    cdef list _one_set(self, object grads):
        """The gradients given to a step, or nothing for the bound ones."""
        if grads is not BOUND:
            return [self._listed(grads, "grads")]
        if self._bound is None:
            raise TypeError("grads must be given to step() where none were bound")
        return []

    def _check_step(self, grads, grad_scale, zero_grad):
        """Check a step as `step` does and take none, for those who agree on it with others.

        Returns the gradients of all parameters in their order, the lr of every group and the
        decay of the average.
        """
        cdef double scale = number(grad_scale, "grad_scale", POSITIVE), ema_decay
        cdef Py_ssize_t g
        self._begin()
        try:
            sets = self._one_set(grads)
            self._prepare(sets, (b"grads",), &scale, flag(zero_grad, "zero_grad"), &ema_decay)
            lrs = [self._groups[g].options.lr for g in range(self._n_groups)]
            return (sets[0] if sets else self._bound), lrs, ema_decay
        finally:
            self._busy = False

    def step_replicas(self, replica_grads, *, grad_scale=1.0, zero_grad=False):
        """Take one step with the mean of several workers' gradients.

        The mean is formed inside the sweep: gradients are added in the order given, in the
        parameter's arithmetic type, and their sum is multiplied by grad_scale / len(replica_grads),
        combined in float64. No averaged copy is written.

        Parameters
        ----------
        replica_grads : sequence
            One entry for each worker (replica, federated client), each in the structure of
            `params`. A parameter is left out where its gradient is None in every entry.
        grad_scale, zero_grad
            As in `step`; every replica's gradients are zeroed.

        Returns
        -------
        bool
            As `step`.

        Raises
        ------
        TypeError, ValueError, RuntimeError
            As `step`; ValueError also for no replica at all and for a gradient that is None in
            some replicas only.
        """
        cdef Py_ssize_t k
        self._begin()
        try:
            if not isinstance(replica_grads, (list, tuple)):
                raise TypeError(
                    "replica_grads must be a list or tuple with one entry for each replica, "
                    f"got {type(replica_grads).__name__}"
                )
            if not replica_grads:
                raise ValueError("replica_grads must have at least one entry, got none")
            names = [f"replica_grads[{k}]" for k in range(len(replica_grads))]
            sets = [self._listed(grads, name)
                    for grads, name in zip(replica_grads, names, strict=True)]
            return self._step(sets, tuple([name.encode() for name in names]), grad_scale, zero_grad)
        finally:
            self._busy = False

    cdef bint _step(self, list sets, tuple names, object grad_scale, object zero_grad) except -1:
        """Check, sweep, keep the books; no `sets` at all means the bound gradients."""
        cdef Py_ssize_t i, n_elements
        cdef bint zeroing = flag(zero_grad, "zero_grad"), clips = self._max_norm < INFINITY
        cdef double scale = number(grad_scale, "grad_scale", POSITIVE)
        cdef double ema_decay, norm
        cdef Slot *slot
        cdef Tensor *t
        n_elements = self._prepare(sets, names, &scale, zeroing, &ema_decay)
        # Nothing from here on can fail
        self._grad_norm = None
        self._nonfinite = ()
        if self._measures():
            norm = scale * self._measure(n_elements)
            if clips or self._track_grad_norm:
                self._grad_norm = norm
            if self._skip_nonfinite and self._nonfinite:
                if zeroing:
                    self._sweep(ZERO, self._tensors, n_elements)
                self.skipped += 1
                return False
            if clips:
                norm = self._max_norm / (norm + 1e-6)
                scale *= 1 if norm > 1 else norm        # a NaN stays
        self._combine(scale, ema_decay)
        for i in range(self._n):
            t = &self._tensors[i]
            slot = &self._slots[i]
            t.zero_grad = zeroing
            t.rule = choose_rule(
                self._groups[slot.group].family, &self._groups[slot.group].options, slot.first_step
            )
            if t.grads[0] != NULL and self._groups[slot.group].family != FAMILY_SGD:
                slot.first_step = False
        self._sweep(STEP, self._tensors, n_elements)
        self.step_count += 1
        return True

    cdef Py_ssize_t _prepare(
        self, list sets, tuple names, double *scale, bint zeroing, double *ema_decay
    ) except -1:
        """Everything of a step that can fail; return how many elements it steps."""
        cdef Py_ssize_t n_elements
        self._check_places()
        if self._groups_changed():
            self._read_groups()
        if self._scheduled:
            self._follow_schedules()
        ema_decay[0] = self._current_ema_decay()
        if sets:
            scale[0] /= PyList_GET_SIZE(sets)
        if scale[0] != 1:
            self._check_grad_scale(scale[0])
        if sets:
            n_elements = self._take(sets, names, zeroing)
        else:
            n_elements = self._take_bound()
        if not self._any_gradient():
            raise ValueError("grads must hold at least one array, got None for every parameter")
        if self._measures():
            self._allocate_partials()
        self._start_velocities()
        return n_elements

    cdef bint _measures(self) noexcept:
        """Whether a step sweeps over the gradients first."""
        return self._max_norm < INFINITY or self._track_grad_norm or self._skip_nonfinite

    cdef bint _any_gradient(self) noexcept:
        cdef Py_ssize_t i
        for i in range(self._n):
            if self._tensors[i].grads[0] != NULL:
                return True
        return False

    cdef int _check_grad_scale(self, double scale) except -1:
        cdef Py_ssize_t g
        cdef Group group
        for g in range(self._n_groups):
            group = self._groups[g]
            group.options.grad_scale = scale
            self._check_group(&group, "")
        return 0

    cdef int _allocate_partials(self) except -1:
        cdef Py_ssize_t i, n = 0
        if self._partials != NULL:
            return 0
        for i in range(self._n):
            n += (self._tensors[i].size + CHUNK - 1) // CHUNK
        self._partials = <Partial *>allocate(n, sizeof(Partial))
        n = 0
        for i in range(self._n):
            self._tensors[i].partials = self._partials + n
            n += (self._tensors[i].size + CHUNK - 1) // CHUNK
        return 0

    cdef double _measure(self, Py_ssize_t n_elements):
        """Sweep once over the gradients: their norm, and which are not finite."""
        cdef Py_ssize_t nonfinite
        cdef double total = self._sum_squares(n_elements, 1, &nonfinite)
        cdef double unit = 1
        if self._any_float64 and not nonfinite and (total < TINY_SQUARES or not isfinite(total)):
            # Squares left the range of float64: again, in a unit that keeps them inside.
            unit = ldexp(1, RESCALE if total < 1 else -RESCALE)
            total = self._sum_squares(n_elements, unit, &nonfinite)
        return sqrt(total) / unit

    cdef double _sum_squares(self, Py_ssize_t n_elements, double unit, Py_ssize_t *nonfinite):
        """Add up the chunks in their order, whichever thread did them."""
        cdef Py_ssize_t i, chunk, count
        cdef double total = 0
        cdef Tensor *t
        cdef list found = []
        for i in range(self._n):
            self._tensors[i].unit = unit
        self._sweep(SQUARES, self._tensors, n_elements)
        for i in range(self._n):
            t = &self._tensors[i]
            if t.grads[0] == NULL:
                continue
            count = 0
            for chunk in range((t.size + CHUNK - 1) // CHUNK):
                total += t.partials[chunk].squares
                count += t.partials[chunk].nonfinite
            if count:
                found.append(i)
        if self._join_squares is not None:
            total, found = self._join_squares(total, found)
        nonfinite[0] = len(found)
        self._nonfinite = tuple(found)
        return total

    @property
    def grad_norm(self):
        """Norm of all gradients in the last step, before clipping; None where none was taken.

        It is the Euclidean norm of the scaled gradients, summed in float64 in an order that
        depends on nothing but the shapes.
        """
        return self._grad_norm

    @property
    def nonfinite_params(self):
        """Names, or indices, of the parameters with a non-finite gradient in the last step.

        Empty where the step did not look: it looks with `skip_nonfinite`, `max_norm` or
        `track_grad_norm`.
        """
        return [i if self._keys is None or self._keys[i] is None else self._keys[i]
                for i in self._nonfinite or ()]

    def accumulate(self, grads):
        """Add gradients into the bound ones, in place, with the threads of a step.

        Follow n calls by ``step(grad_scale=1 / n, zero_grad=True)``.

        Parameters
        ----------
        grads : array, sequence or mapping, in the structure of `params`
            None adds nothing to its parameter's gradient.

        Raises
        ------
        TypeError, ValueError, RuntimeError
            As `step`; RuntimeError also where no gradients are bound.
        """
        cdef Py_ssize_t i, n_elements
        cdef list sets
        cdef Scalars plus
        cdef optcore_options o = default_options()
        self._begin()
        try:
            if self._bound is None:
                raise RuntimeError("accumulate() needs gradients bound with SGD(..., grads=...)")
            sets = [self._listed(grads, "grads")]
            self._check_places()
            self._take_bound()
            n_elements = self._take(sets, (b"grads",), False)
            for i in range(self._n):
                if self._pointers[i] != NULL and self._slots[i].bound == NULL:
                    raise ValueError(
                        f"{self._spell(b'grads', i)} must be None where no gradient is bound, "
                        "got an array"
                    )
            self._refuse_self_sum()
            # g + h is x - lr * d with x = g, d = h and lr = -1, to the last bit
            o.lr = -1
            plus = combine(&o)
            for i in range(self._n):
                self._sums[i] = one_tensor(
                    <void *>self._slots[i].bound, self._tensors[i].grads, NULL,
                    self._tensors[i].size, self._tensors[i].dtype, SGD_RULE, &plus
                )
            self._sweep(STEP, self._sums, n_elements)
        finally:
            self._busy = False

    cdef int _refuse_self_sum(self) except -1:
        """Refuse gradients that overlap the bound ones they are to be added to."""
        cdef Py_ssize_t i, at, n = 0
        self._spans = <Span *>reallocate(self._spans, self._n, sizeof(Span))
        for i in range(self._n):
            if self._slots[i].bound != NULL and self._tensors[i].size:
                self._spans[n] = self._span_at(self._slots[i].bound, i, i)
                n += 1
        sort_spans(self._spans, n)
        for i in range(self._n):
            if self._pointers[i] != NULL:
                at = overlapped_by(self._spans, n, self._span_at(self._pointers[i], i, i))
                if at >= 0:
                    raise ValueError(
                        f"{self._spell(b'grads', i)} must not share memory with the "
                        f"gradient bound to {self._spell(b'params', self._spans[at].owner)}, "
                        "got overlapping arrays"
                    )
        return 0

    def zero_grad(self):
        """Set the bound gradients to zero.

        Raises
        ------
        ValueError, RuntimeError
            As `accumulate`.
        """
        self._begin()
        try:
            if self._bound is None:
                raise RuntimeError("zero_grad() needs gradients bound with SGD(..., grads=...)")
            self._sweep(ZERO, self._tensors, self._take_bound())
        finally:
            self._busy = False

    # State

    @property
    def _state(self):
        """For each parameter its velocity, average (or None) and first-step flag."""
        cdef Py_ssize_t i
        nothing = (None,) * self._n
        return [
            (velocity, average, bool(self._slots[i].first_step))
            for i, (velocity, average) in enumerate(
                zip(self._velocities or nothing, self._averages or nothing, strict=True)
            )
        ]

    def _snapshot(self):
        """Copies of what `_state` gives, of one step and not of two, under checked groups."""
        self._begin()
        try:
            if self._groups_changed():
                self._read_groups()
            return [
                tuple([a.copy(order="K") if isinstance(a, np.ndarray) else a for a in state])
                for state in self._state
            ]
        finally:
            self._busy = False

    def _restore(
        self, list groups, velocities, averages, first_steps, Py_ssize_t step_count,
        Py_ssize_t skipped, dict options=None
    ):
        """Take over a checked state; None where a velocity, average or the options stay."""
        cdef Py_ssize_t i
        self._begin()
        try:
            self._check_places()
            before = (
                self.param_groups, self._max_norm, self._skip_nonfinite, self._track_grad_norm,
                self._ema_decay, self._ema_schedule,
            )
            self.param_groups = groups
            try:
                if options is None:
                    self._read_groups()
                else:
                    self.max_norm = options["max_norm"]     # reads the groups
                    self.skip_nonfinite = options["skip_nonfinite"]
                    self.track_grad_norm = options["track_grad_norm"]
                    if options["ema_decay"] is not None:
                        self._set_ema_decay(options["ema_decay"])
                if any([v is not None for v in velocities]) and self._velocities is None:
                    self._allocate_velocities()
                self._start_velocities()
            except BaseException:
                (
                    self.param_groups, self._max_norm, self._skip_nonfinite,
                    self._track_grad_norm, self._ema_decay, self._ema_schedule,
                ) = before
                raise
            for i in range(self._n):
                if self._velocities is not None:
                    self._velocities[i][...] = 0 if velocities[i] is None else velocities[i]
                if self._averages is not None and averages[i] is not None:
                    self._averages[i][...] = averages[i]
                self._slots[i].first_step = first_steps[i]
            self.step_count = step_count
            self.skipped = skipped
            self._grad_norm = None
            self._nonfinite = ()
        finally:
            self._busy = False


def checked_lr(value, name):
    """Return a learning rate as a checked float."""
    return number(value, name, NONNEGATIVE)


cdef void *allocate(Py_ssize_t n, size_t itemsize) except NULL:
    cdef void *memory = calloc(max(n, 1), itemsize)
    if memory == NULL:
        raise MemoryError
    return memory


cdef void *reallocate(void *memory, Py_ssize_t n, size_t itemsize) except NULL:
    """Grow or shrink; where that fails, the old memory stays as it was."""
    memory = realloc(memory, max(n, 1) * itemsize)
    if memory == NULL:
        raise MemoryError
    return memory
