"""The whole-model step: a table of checked tensors, and at most two sweeps over it.

`Plan` builds the table, takes gradients, steps and keeps state. Every public call is entered
by `_exclusively`, one at a time. A step is prepared (all that can fail; what may run code of the
user's comes first, and the one pass over the arrays last), then measured and swept, which
cannot fail (but for `_join_squares`, before anything is written), and then booked.
"""
from cpython.object cimport PyObject
from cpython.tuple cimport PyTuple_GET_ITEM, PyTuple_GET_SIZE
from libc.math cimport INFINITY
from numpy cimport PyArray_DATA, PyArray_SIZE, import_array, ndarray

from optcore.arrays cimport (
    Label,
    as_ndarray,
    check_param,
    fits,
    is_unmoved,
    refuse_misfit,
    spell,
    storage_of,
)
from optcore.groups cimport Groups
from optcore.memory cimport Buffer, Span, Spans, span_at, span_of, zeroed
from optcore.norm cimport Norm, measures
from optcore.options cimport (
    FRACTION,
    POSITIVE,
    Options,
    as_schedule,
    check_rounding,
    combine,
    default_options,
    flag,
    number,
    row_named,
    take_row,
    variant_of,
)
from optcore.parallel cimport sweep_all
from optcore.rules cimport NESTEROV, N_RULES, RULE_ROWS, SGD, Rule, Scalars
from optcore.storage cimport FLOAT32, Stream, arithmetic_of, itemsize_of
from optcore.sweep cimport STEP, ZERO, Tensor, one_tensor

from collections.abc import Iterable, Mapping

import numpy as np

from optcore._arena import allocate_like
from optcore.arrays import is_array
from optcore.options import OPTIMIZER_OPTIONS

import_array()

cdef struct Slot:               # what the plan alone knows of a tensor
    Py_ssize_t group
    bint first_step             # its states have not started
    const void *clear           # the gradient last seen to overlap nothing that is written
    const void *bound           # where its bound gradient is

cdef struct Step:               # one that can no longer fail
    double scale
    double ema_decay
    Py_ssize_t n_elements
    bint zeroing
    bint has_gradient           # not None for every parameter
    bint starts                 # a first step is among it
    bint lacks_states           # a rule has states that are not there yet

# What `_exclusively` runs
ctypedef object (*call_t)(Plan, object, object, object)


class _Bound:
    """The default of `step`: None would hide a gradient function that forgot to return."""

    def __repr__(self):
        return "<the bound gradients>"


BOUND = _Bound()
cdef object bound_grads = BOUND
cdef tuple GRADS = (b"grads",)


cdef class Plan:
    """The compiled part of `optcore.SGD`. Not for direct use."""

    cdef Buffer _table          # of tensors
    cdef Buffer _sums           # bound gradients, as parameters that accumulate() steps
    cdef Buffer _slot_memory
    cdef Buffer _streams        # gradients of this step: tensor by tensor, set by set
    cdef Buffer _apart          # where the gradients were that were last seen to lie apart
    cdef Tensor *_tensors
    cdef Slot *_slots
    cdef Py_ssize_t _n, _n_apart
    cdef Spans _written         # parameters and what the optimizer owns
    cdef Spans _others
    cdef Groups _groups
    cdef Norm _norm
    cdef Options _own           # the options that no group holds
    cdef object _ema_schedule
    cdef bint _built, _busy, _single, _by_name, _any_float32
    cdef tuple _params, _keys, _bound
    cdef readonly tuple _state_names
    cdef list _states           # of each name: one array a parameter, or None before they start
    cdef tuple _averages
    cdef object _grad_norm
    cdef list _nonfinite
    cdef readonly Py_ssize_t step_count
    cdef readonly Py_ssize_t skipped
    cdef public object param_groups
    # Where others hold the rest of the gradients: takes this plan's sum of squares and the
    # indices of its parameters that are not finite, returns everyone's.
    cdef public object _join_squares

    def __reduce__(self):
        raise TypeError(
            "an optimizer holds the addresses of its arrays and cannot be copied or pickled: "
            "build one for the copied parameters and give it this one's state_dict()"
        )

    cdef object _exclusively(self, call_t call, object a=None, object b=None, object c=None):
        """Run the one call at a time that an optimizer serves."""
        if not self._built:
            raise RuntimeError("this optimizer was never built")
        if self._busy:
            raise RuntimeError(
                "this optimizer is in use already, by another thread or by the caller of a "
                "schedule: one step at a time"
            )
        self._busy = True
        try:
            return call(self, a, b, c)
        finally:
            self._busy = False

    # Building

    def _build(self, list groups, *, bint single, bint by_name, options, grads, rule=None):
        """Check everything, lay out the tables, and open the optimizer for use.

        `groups` are complete dictionaries; "params" is a tuple, "param_names" a tuple or None.
        "params" comes to hold NumPy's views of what other libraries lent. `options` are those
        that no group holds; `rule` names that of every group, None leaves it to `momentum`
        and `nesterov`.
        """
        cdef Py_ssize_t i, g, n = 0
        cdef ndarray a
        if self._params is not None:
            raise RuntimeError("an optimizer is built once")
        arrays, keys = [], []
        for group in groups:
            arrays += group["params"]
            keys += group["param_names"] or [None] * len(group["params"])
        if not arrays:
            raise ValueError("params must hold at least one array, got none")
        self._single = single
        self._by_name = by_name
        self._keys = None if all([key is None for key in keys]) else tuple(keys)
        for i in range(len(arrays)):
            arrays[i] = check_param(arrays[i], self._label(b"params", i))
        self._params = tuple(arrays)
        self._n = len(arrays)
        self._table = zeroed(self._n, sizeof(Tensor))
        self._tensors = <Tensor *>self._table.at
        self._slot_memory = zeroed(self._n, sizeof(Slot))
        self._slots = <Slot *>self._slot_memory.at
        self._streams = zeroed(self._n, sizeof(Stream))
        self._apart = Buffer()
        self._written, self._others = Spans(), Spans()
        self._norm = Norm()
        self._own = default_options()
        self._own.ema_decay = 0
        self._state_names = states_of(rule_named(rule))
        self._states = [None] * len(self._state_names)
        for group in groups:
            g = len(group["params"])
            group["params"] = self._params[n : n + g]
            n += g
        self._groups = Groups([group["params"] for group in groups], rule_named(rule))
        i = 0
        for g, group in enumerate(groups):
            for a in group["params"]:
                self._slots[i].group = g
                self._slots[i].first_step = True
                self._tensors[i] = one_tensor(
                    PyArray_DATA(a), storage_of(a), PyArray_SIZE(a), NULL,
                    &self._groups.at[g].scalars
                )
                if arithmetic_of(storage_of(a)) == FLOAT32:
                    self._groups.at[g].has_float32 = self._any_float32 = True
                else:
                    self._groups.at[g].has_float64 = True
                i += 1
        self._list_written()
        self.param_groups = groups
        self._adopt(groups, options)
        self._start_states()
        if grads is not None:
            self._bind(grads)
        self._built = True

    cdef Label _label(self, const char *what, Py_ssize_t i):
        return Label(what, -1 if self._single else i, <PyObject *>self._keys)

    cdef int _list_written(self) except -1:
        """List the memory a step writes; two parameters in one place are an error."""
        cdef Py_ssize_t i, first, second
        cdef Span span
        self._written.clear(self._n + len(self._states) + 1)
        for i in range(self._n):
            self._written.add(span_of(<ndarray>self._params[i], i))
            self._slots[i].clear = NULL
        for arena in (*self._states, self._averages):
            if arena is not None:
                span = span_of(<ndarray>arena[0], -1)
                span.end = span_of(<ndarray>arena[self._n - 1], -1).end
                self._written.add(span)
        if not self._written.sort(&first, &second):
            same = "is the same array as" if (
                self._params[first] is self._params[second]
            ) else "shares memory with"
            raise ValueError(
                f"{spell(self._label(b'params', second))} {same} "
                f"{spell(self._label(b'params', first))}"
            )
        return 0

    cdef int _start_states(self) except -1:
        """Allocate the states of a group's rule as soon as it has some."""
        cdef Py_ssize_t g, k, n_states = 0
        for g in range(self._groups.n):
            n_states = max(n_states, RULE_ROWS[self._groups.at[g].rule].n_states)
        for k in range(n_states):
            if self._states[k] is None:
                self._install_state(k, self._allocated())
        return 0

    cdef tuple _allocated(self):
        """Zeros like the parameters, which must be what the border took."""
        self._check_places()
        return tuple(allocate_like(self._params))

    cdef int _install_state(self, Py_ssize_t k, tuple arrays) except -1:
        cdef Py_ssize_t i
        self._states[k] = arrays
        for i in range(self._n):
            self._tensors[i].states[k].data = PyArray_DATA(<ndarray>arrays[i])
        return self._list_written()

    # Options

    cdef int _adopt(self, object groups, object options) except -1:
        """Check groups and options of the whole optimizer together, then take them over."""
        cdef Options own = self._own
        cdef Py_ssize_t i
        cdef int row
        schedule, averages = self._ema_schedule, self._averages
        for name, value in options.items():
            row = row_named(name)
            if name != "ema_decay":
                take_row(&own, row, value, name)
            elif value is not None:
                schedule = as_schedule(value)
                if schedule is None:
                    own.ema_decay = self._checked_ema_decay(value, name)
                if averages is None:
                    averages = self._allocated()
            elif averages is not None:
                raise ValueError("ema_decay cannot be None once an average is kept")
        checked = self._groups.check(groups, &own)
        self._check_places()
        # Nothing from here on can fail
        self.param_groups = groups
        self._groups.adopt(checked)
        self._own = own
        self._ema_schedule = schedule
        if averages is not self._averages:
            self._averages = averages
            for i in range(self._n):
                averages[i][...] = self._params[i]
                self._tensors[i].ema = PyArray_DATA(<ndarray>averages[i])
            self._list_written()
        return 0

    cdef int _read_groups(self) except -1:
        """Take over what was edited."""
        if self._groups.changed(self.param_groups):
            self._groups.adopt(self._groups.check(self.param_groups, &self._own))
        return 0

    cdef double _checked_ema_decay(self, object value, str name) except -1:
        cdef double decay = number(value, name, FRACTION)
        if self._any_float32:
            check_rounding(row_named("ema_decay"), decay, name)
        return decay

    @property
    def max_norm(self):
        """Upper bound on the norm of all gradients together; None: no clipping."""
        return None if self._own.max_norm == INFINITY else self._own.max_norm

    @max_norm.setter
    def max_norm(self, value):
        self._exclusively(set_option, "max_norm", value)

    @property
    def skip_nonfinite(self):
        """Whether a step whose gradients hold a NaN or an infinity is skipped."""
        return bool(self._own.skip_nonfinite)

    @skip_nonfinite.setter
    def skip_nonfinite(self, value):
        self._exclusively(set_option, "skip_nonfinite", value)

    @property
    def track_grad_norm(self):
        """Whether every step measures `grad_norm`, even without `max_norm`."""
        return bool(self._own.track_grad_norm)

    @track_grad_norm.setter
    def track_grad_norm(self, value):
        self._exclusively(set_option, "track_grad_norm", value)

    @property
    def ema_decay(self):
        """Decay of the weight average, or its schedule; None: no average is kept."""
        if self._averages is None:
            return None
        return self._own.ema_decay if self._ema_schedule is None else self._ema_schedule

    @ema_decay.setter
    def ema_decay(self, value):
        self._exclusively(set_option, "ema_decay", value)

    # Gradients

    cdef tuple _listed(self, object grads, str what):
        """The gradients of all parameters in order, from the structure of `params`."""
        cdef tuple listed
        if self._single:
            return (grads,)
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

    cdef list _sets_of(self, object grads):
        """The gradients given to a step, or None for the bound ones."""
        if grads is not bound_grads:
            return [self._listed(grads, "grads")]
        if self._bound is None:
            raise TypeError("grads must be given to step() where none were bound")
        return None

    cdef int _view(self, list sets, tuple names, bint written) except -1:
        """Replace gradients of other libraries by NumPy's views, which `sets` then holds."""
        cdef Py_ssize_t i, k
        cdef tuple listed
        for k in range(PyTuple_GET_SIZE(names)):
            listed = <tuple>sets[k]
            views = None
            for i in range(self._n):
                gradient = <object>PyTuple_GET_ITEM(listed, i)
                if type(gradient) is not ndarray and gradient is not None:
                    if views is None:
                        views = list(listed)
                    views[i] = as_ndarray(
                        gradient, written, self._label(<bytes>PyTuple_GET_ITEM(names, k), i)
                    )
            if views is not None:
                sets[k] = tuple(views)
        return 0

    cdef int _take(self, list sets, tuple names, Step *step) except -1:
        """Check all memory of a step and point every tensor at its gradients.

        No `sets` means the bound gradients. Nothing here runs code of the user's, and
        nothing that does may come between this and the sweep.
        """
        cdef Py_ssize_t i, k, n_sets = PyTuple_GET_SIZE(names)
        cdef bint bound = sets is None
        cdef tuple params = self._params
        cdef Stream *grads
        cdef Slot *slot
        cdef Tensor *t
        cdef Rule rule
        cdef int n_states
        step.n_elements = 0
        step.has_gradient = step.starts = step.lacks_states = False
        self._streams.grow(self._n * n_sets, sizeof(Stream))
        grads = <Stream *>self._streams.at
        for i in range(self._n):
            t = &self._tensors[i]
            slot = &self._slots[i]
            if not is_unmoved(
                <ndarray>PyTuple_GET_ITEM(params, i), t.param.data, t.size, t.param.storage
            ):
                self._refuse_moved(params, i, t.param.data, b"params")
            t.grads = grads
            t.n_grads = <int>n_sets
            if bound:
                grads[0].data = <void *>slot.bound
                grads[0].storage = t.param.storage
                if slot.bound != NULL and not is_unmoved(
                    <ndarray>PyTuple_GET_ITEM(self._bound, i), slot.bound, t.size,
                    t.param.storage
                ):
                    self._refuse_moved(self._bound, i, slot.bound, b"grads")
            else:
                for k in range(n_sets):
                    self._take_one(
                        i, k, <object>PyTuple_GET_ITEM(<tuple>sets[k], i), names, step.zeroing,
                        &grads[k]
                    )
            if grads[0].data != NULL:
                step.has_gradient = True
                step.n_elements += t.size
                rule = self._groups.at[slot.group].rule
                t.rule = rule
                t.variant = variant_of(
                    rule, &self._groups.at[slot.group].options.kernel, slot.first_step
                )
                t.zero_grad = step.zeroing
                n_states = RULE_ROWS[rule].n_states
                if n_states > 0:
                    step.starts |= slot.first_step
                    step.lacks_states |= t.states[n_states - 1].data == NULL
            grads += n_sets
        if step.zeroing and not bound:
            self._refuse_shared(names)
        return 0

    cdef int _take_one(
        self, Py_ssize_t i, Py_ssize_t k, object gradient, tuple names, bint written,
        Stream *stream
    ) except -1:
        cdef ndarray param = <ndarray>PyTuple_GET_ITEM(self._params, i)
        cdef ndarray a
        cdef Py_ssize_t owner
        stream.data = NULL
        stream.storage = self._tensors[i].param.storage
        if gradient is not None:
            a = <ndarray>gradient
            if not fits(a, param, written):
                refuse_misfit(a, param, written, self._label(names[k], i))
            stream.data = PyArray_DATA(a)
            if stream.data != self._slots[i].clear or k > 0:
                owner = self._written.owner_over(span_of(a, 0))
                if owner >= -1:
                    what = "the optimizer's own memory" if owner < 0 else spell(
                        self._label(b"params", owner)
                    )
                    raise ValueError(
                        f"{spell(self._label(names[k], i))} must not share memory with {what}, "
                        "got overlapping arrays"
                    )
                if k == 0:
                    self._slots[i].clear = stream.data
        if k > 0 and (stream.data == NULL) != ((stream - k).data == NULL):
            raise ValueError(
                f"{spell(self._label(names[k], i))} and its counterpart in {names[0].decode()} "
                "must both be None or neither"
            )
        return 0

    cdef int _refuse_shared(self, tuple names) except -1:
        """Refuse gradients that share memory where they are written."""
        cdef Py_ssize_t i, k, first, second, n_sets = PyTuple_GET_SIZE(names)
        cdef const Stream *grads = <const Stream *>self._streams.at
        cdef const void **apart
        cdef bint seen = self._n_apart == self._n * n_sets
        self._apart.grow(self._n * n_sets, sizeof(void *))
        apart = <const void **>self._apart.at
        for i in range(self._n * n_sets):
            seen = seen and apart[i] == grads[i].data
        if seen:
            return 0
        self._n_apart = 0
        self._others.clear(self._n * n_sets)
        for i in range(self._n):
            for k in range(n_sets):
                self._add_other(grads[i * n_sets + k].data, i, k * self._n + i)
        if not self._others.sort(&first, &second):
            raise ValueError(
                f"{spell(self._label(names[second // self._n], second % self._n))} must not share "
                f"memory with {spell(self._label(names[first // self._n], first % self._n))} "
                "where gradients are written, got overlapping arrays"
            )
        for i in range(self._n * n_sets):
            apart[i] = grads[i].data
        self._n_apart = self._n * n_sets
        return 0

    cdef void _add_other(self, const void *data, Py_ssize_t i, Py_ssize_t owner) noexcept:
        """List an array as large as parameter i, where there is one."""
        if data != NULL:
            self._others.add(self._span_like(data, i, owner))

    cdef Span _span_like(self, const void *data, Py_ssize_t i, Py_ssize_t owner) noexcept:
        cdef const Tensor *t = &self._tensors[i]
        return span_at(data, t.size * itemsize_of(t.param.storage), owner)

    def _bind(self, grads):
        """Check gradients once and keep them."""
        cdef Py_ssize_t i
        cdef Step step
        cdef list sets = [self._listed(grads, "grads")]
        step.zeroing = True
        self._view(sets, GRADS, True)
        self._take(sets, GRADS, &step)
        self._sums = zeroed(self._n, sizeof(Tensor))
        for i in range(self._n):
            self._slots[i].bound = self._tensors[i].grads[0].data
        self._bound = sets[0]

    cdef int _check_places(self) except -1:
        """Refuse parameters whose memory moved, before anything is sized by them."""
        cdef Py_ssize_t i
        cdef const Tensor *t
        for i in range(self._n):
            t = &self._tensors[i]
            if not is_unmoved(
                <ndarray>PyTuple_GET_ITEM(self._params, i), t.param.data, t.size, t.param.storage
            ):
                self._refuse_moved(self._params, i, t.param.data, b"params")
        return 0

    cdef int _refuse_moved(
        self, tuple arrays, Py_ssize_t i, const void *data, const char *what
    ) except -1:
        a = arrays[i]
        raise ValueError(
            f"{spell(self._label(what, i))} must stay in its place, {self._tensors[i].size} "
            f"contiguous, writeable elements at {<size_t>data:#x}; got {a.size} of {a.dtype} with "
            f"strides {a.strides}, {'writeable' if a.flags.writeable else 'read-only'}, at "
            f"{a.ctypes.data:#x}"
        )

    # Stepping

    cdef Step _prepare(
        self, list sets, tuple names, object grad_scale, object zero_grad
    ) except *:
        """Everything of a step that can fail, in the order that its parts rely on."""
        cdef Step step
        step.zeroing = flag(zero_grad, "zero_grad")
        step.scale = number(grad_scale, "grad_scale", POSITIVE)
        step.scale /= PyTuple_GET_SIZE(names)
        self._read_groups()
        self._groups.follow(self.step_count)
        if step.scale != 1 and self._any_float32:
            check_rounding(row_named("grad_scale"), step.scale, "grad_scale")
        step.ema_decay = self._current_ema_decay()
        if sets is not None:
            self._view(sets, names, step.zeroing)
        self._take(sets, names, &step)
        if not step.has_gradient:
            raise ValueError("grads must hold at least one array, got None for every parameter")
        if step.lacks_states or (measures(&self._own) and not self._norm.is_prepared()):
            self._start_states()
            self._norm.prepare(self._tensors, self._n)
            self._take(sets, names, &step)      # again, for allocating may run a finalizer
        return step

    cdef double _current_ema_decay(self) except -1:
        if self._averages is None or self._ema_schedule is None:
            return self._own.ema_decay
        return self._checked_ema_decay(
            self._ema_schedule(self.step_count), "ema_decay(step_count)"
        )

    cdef bint _step(self, Step *step) except -1:
        """Measure, sweep, keep the books; whether the step was applied."""
        cdef Py_ssize_t i
        cdef double norm, factor
        cdef bint clips = self._own.max_norm < INFINITY
        cdef bint skips = False
        cdef object grad_norm = None
        cdef list nonfinite = None
        if measures(&self._own):
            norm = step.scale * self._norm.measure(
                self._tensors, self._n, step.n_elements, self._join_squares
            )
            nonfinite = self._norm.nonfinite
            skips = self._own.skip_nonfinite and len(nonfinite) > 0
            if clips or self._own.track_grad_norm:
                grad_norm = norm
            if clips:
                factor = self._own.max_norm / (norm + 1e-6)
                step.scale *= 1 if factor > 1 else factor       # a NaN stays
        if not skips:
            self._groups.form_scalars(step.scale, step.ema_decay)
            sweep_all(STEP, self._tensors, self._n, step.n_elements)
            if step.starts:
                for i in range(self._n):
                    if self._tensors[i].grads[0].data != NULL and (
                        RULE_ROWS[self._tensors[i].rule].n_states > 0
                    ):
                        self._slots[i].first_step = False
        elif step.zeroing:
            sweep_all(ZERO, self._tensors, self._n, step.n_elements)
        self._grad_norm = grad_norm
        self._nonfinite = nonfinite
        self.step_count += not skips
        self.skipped += skips
        return not skips

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
        return self._exclusively(take_step, grads, grad_scale, zero_grad)

    def _check_step(self, grads, grad_scale, zero_grad):
        """Check a step as `step` does and take none, for those who agree on it with others.

        Returns the gradients of all parameters in their order, the options of every group as
        numbers and flags, and the decay of the average.
        """
        return self._exclusively(check_step, grads, grad_scale, zero_grad)

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
        return self._exclusively(take_replicas, replica_grads, grad_scale, zero_grad)

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
        self._exclusively(add_up, grads)

    def zero_grad(self):
        """Set the bound gradients to zero.

        Raises
        ------
        ValueError, RuntimeError
            As `accumulate`.
        """
        self._exclusively(zero_bound)

    # State

    @property
    def _state(self):
        """For each parameter its states by name, "ema" (None where there is none), "first_step"."""
        cdef Py_ssize_t i
        arrays = dict(zip((*self._state_names, "ema"), (*self._states, self._averages)))
        return [
            {**{name: of_all and of_all[i] for name, of_all in arrays.items()},
             "first_step": bool(self._slots[i].first_step)}
            for i in range(self._n)
        ]

    def _snapshot(self, bint include_params=False):
        """Return copies of all that one moment holds: state, groups, counts and options."""
        return self._exclusively(copy_state, include_params)

    def _restore(self, list groups, list entries, dict options, counts, writes=()):
        """Take over a checked state.

        `entries` are as `_state` has them, None where an average or all that is kept stays as it
        is; states of None become zero. `options` are those of the whole optimizer to change,
        `counts` the steps applied and skipped, `writes` pairs of an array and what it becomes.
        """
        self._exclusively(take_state, groups, entries, (options, counts, writes))


# The calls that `_exclusively` runs

cdef object take_step(Plan self, object grads, object grad_scale, object zero_grad):
    cdef list sets = self._sets_of(grads)       # holds what the sweep reads
    cdef Step step = self._prepare(sets, GRADS, grad_scale, zero_grad)
    return self._step(&step)


cdef object check_step(Plan self, object grads, object grad_scale, object zero_grad):
    cdef list sets = self._sets_of(grads)
    cdef Step step = self._prepare(sets, GRADS, grad_scale, zero_grad)
    return (self._bound if sets is None else sets[0]), self._groups.values(), step.ema_decay


cdef object take_replicas(Plan self, object replica_grads, object grad_scale, object zero_grad):
    cdef Step step
    cdef Py_ssize_t k
    if not isinstance(replica_grads, (list, tuple)):
        raise TypeError(
            "replica_grads must be a list or tuple with one entry for each replica, "
            f"got {type(replica_grads).__name__}"
        )
    if not replica_grads:
        raise ValueError("replica_grads must have at least one entry, got none")
    names = [f"replica_grads[{k}]" for k in range(len(replica_grads))]
    sets = [self._listed(grads, name) for grads, name in zip(replica_grads, names, strict=True)]
    labels = tuple([name.encode() for name in names])
    step = self._prepare(sets, labels, grad_scale, zero_grad)
    return self._step(&step)


cdef object add_up(Plan self, object grads, object _, object __):
    cdef Py_ssize_t i
    cdef Step step
    cdef Scalars plus
    cdef Options o = default_options()
    cdef Tensor *sums
    cdef Tensor *t
    if self._bound is None:
        raise RuntimeError("accumulate() needs gradients bound with SGD(..., grads=...)")
    sets = [self._listed(grads, "grads")]
    step.zeroing = False
    self._view(sets, GRADS, False)
    self._take(None, GRADS, &step)
    self._take(sets, GRADS, &step)
    self._others.clear(self._n)
    for i in range(self._n):
        self._add_other(self._slots[i].bound, i, i)
    self._others.sort(&i, &i)           # they lie apart, as _bind saw
    # g + h is x - lr * d with x = g, d = h and lr = -1, to the last bit
    o.kernel.lr = -1
    plus = combine(&o.kernel)
    sums = <Tensor *>self._sums.at
    for i in range(self._n):
        t = &self._tensors[i]
        refuse_self_sum(self, i, t.grads[0].data)
        sums[i] = one_tensor(
            <void *>self._slots[i].bound, t.param.storage, t.size, t.grads, &plus
        )
        sums[i].rule = SGD
    sweep_all(STEP, sums, self._n, step.n_elements)


cdef int refuse_self_sum(Plan self, Py_ssize_t i, const void *data) except -1:
    """Refuse a gradient without a bound one to add it to, or one that overlaps those."""
    cdef Py_ssize_t owner
    if data == NULL:
        return 0
    if self._slots[i].bound == NULL:
        raise ValueError(
            f"{spell(self._label(b'grads', i))} must be None where no gradient is bound, "
            "got an array"
        )
    owner = self._others.owner_over(self._span_like(data, i, i))
    if owner >= 0:
        raise ValueError(
            f"{spell(self._label(b'grads', i))} must not share memory with the gradient bound "
            f"to {spell(self._label(b'params', owner))}, got overlapping arrays"
        )
    return 0


cdef object zero_bound(Plan self, object _, object __, object ___):
    cdef Step step
    if self._bound is None:
        raise RuntimeError("zero_grad() needs gradients bound with SGD(..., grads=...)")
    step.zeroing = True
    self._take(None, GRADS, &step)
    sweep_all(ZERO, self._tensors, self._n, step.n_elements)


cdef object set_option(Plan self, object name, object value, object _):
    self._adopt(self.param_groups, {name: value})


cdef object copy_state(Plan self, object include_params, object _, object __):
    # whole, not only what was edited: an array may hold another number than at the last step
    self._groups.adopt(self._groups.check(self.param_groups, &self._own))
    entries = self._state
    if include_params:
        entries = [{**entry, "param": param}
                   for entry, param in zip(entries, self._params, strict=True)]
    return {
        "state": [
            {key: a.copy(order="K") if isinstance(a, np.ndarray) else a for key, a in entry.items()}
            for entry in entries
        ],
        "param_groups": [dict(group) for group in self.param_groups],
        "step_count": self.step_count,
        "skipped": self.skipped,
        "options": {name: getattr(self, name) for name in OPTIMIZER_OPTIONS},
    }


cdef object take_state(Plan self, object groups, object entries, object rest):
    cdef Py_ssize_t i, k
    options, (step_count, skipped), writes = rest
    started = any([entry[name] is not None for entry in entries for name in self._state_names])
    new = {k: self._allocated() for k, arrays in enumerate(self._states)
           if started and arrays is None}
    self._adopt(groups, {name: value for name, value in options.items()
                         if name != "ema_decay" or value is not None})
    # Nothing from here on can fail
    for k, arrays in new.items():
        self._install_state(k, arrays)
    for i, entry in enumerate(entries):
        for name, arrays in zip(self._state_names, self._states, strict=True):
            if arrays is not None:
                arrays[i][...] = 0 if entry[name] is None else entry[name]
        if self._averages is not None and entry["ema"] is not None:
            self._averages[i][...] = entry["ema"]
        self._slots[i].first_step = entry["first_step"]
    for array, value in writes:
        array[...] = value
    self.step_count = step_count
    self.skipped = skipped
    self._grad_norm = None
    self._nonfinite = None


# Rules by their names

cdef Rule rule_named(object name) except -2:
    cdef Rule rule
    if name is None:
        return -1
    for rule in range(N_RULES):
        if RULE_ROWS[rule].name.decode() == name:
            return rule
    raise ValueError(f"rule must be one of optcore's, got {name!r}")


cdef tuple states_of(Rule rule):
    """The names of a rule's states; of all that momentum and nesterov choose from, the most."""
    cdef int k
    rule = NESTEROV if rule < 0 else rule
    return tuple([RULE_ROWS[rule].states[k].decode() for k in range(RULE_ROWS[rule].n_states)])
