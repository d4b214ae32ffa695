"""The table of checked tensors that a plan steps, and the gradients of one step.

`Table` is laid once from the user's arrays and owns what they need: states, averages, buffers, and
the list of all memory that a step writes. It looks again at the containers and the places of
arrays, which may have changed since, and points every tensor at its gradients. `Plan` alone
uses it.
"""
from cython cimport critical_section
from cpython.object cimport PyObject
from cpython.tuple cimport PyTuple_GET_ITEM, PyTuple_GET_SIZE
from numpy cimport (
    PyArray_CopyInto,
    PyArray_DATA,
    PyArray_DIM,
    PyArray_IS_C_CONTIGUOUS,
    PyArray_NDIM,
    PyArray_SIZE,
    import_array,
)

from optcore.arrays cimport (
    as_ndarray,
    check_but_layout,
    check_param,
    fits,
    is_unmoved,
    refuse_misfit,
    spell,
    storage_of,
    stream_of,
)
from optcore.groups cimport Count, Group
from optcore.memory cimport span_at, span_of, span_over, zeroed
from optcore.options cimport (
    EXACT_ROWS,
    FLOAT32_MASTER,
    MASTER_BY_DTYPE,
    Options,
    SPLIT_MASTER,
    STATE_BFLOAT16,
    STOCHASTIC,
    variant_of,
)
from optcore.rows cimport as_gradient, catch_up_between, is_rows_of
from optcore.rules cimport (
    MOST_STATES,
    N_RULES,
    RULE_ROWS,
    SGD,
    Scalars,
    corrects_bias,
    counts_steps,
    family_of,
    is_linear,
)
from optcore.parallel cimport sweep_all
from optcore.storage cimport (
    BFLOAT16,
    COPIED_BFLOAT16,
    COPIED_FLOAT16,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    SPLIT_BFLOAT16,
    arithmetic_of,
    is_rounded,
    itemsize_of,
    plain,
    stream_at,
)
from optcore.sweep cimport COPY, n_chunks, one_tensor, round_streams

from itertools import combinations

import numpy as np

from optcore._arena import allocate_like
from optcore.arrays import bfloat16, has_nonzero, in_one_place, is_array, name_of_dtype

import_array()

cdef tuple GRADS = (b"grads",)
# Of what the optimizer allocates
cdef dict DTYPES = {FLOAT32: np.float32, FLOAT64: np.float64, BFLOAT16: bfloat16}
cdef dict NAMES = {FLOAT32: "float32", FLOAT64: "float64", BFLOAT16: "bfloat16"}


cdef int copy_stream(Stream to, Stream source, Py_ssize_t size) except -1:
    """Copy elements from one storage to another, rounded to the nearest."""
    cdef Tensor t = one_tensor(to, size, &source, NULL)
    if size > 0:
        sweep_all(COPY, &t, 1, size)
    return 0


cdef object converted(object value, ndarray like):
    """Return a saved array in the dtype of another and, where that is not its own, laid out so."""
    cdef ndarray a, result
    if value is None or storage_of(<ndarray>value) == storage_of(like):
        return value
    a, result = allocate_like((like, like), (value.dtype, like.dtype))
    PyArray_CopyInto(a, <ndarray>value)
    copy_stream(stream_of(result), stream_of(a), PyArray_SIZE(a))
    return result


cdef int assign(ndarray to, object value) except -1:
    """Give an array other values; they have its storage already, though maybe another dtype."""
    if value is None:
        np.ndarray.fill(to, 0)
    elif storage_of(to) == BFLOAT16:
        to.view(np.uint16)[...] = value.view(np.uint16)
    else:
        PyArray_CopyInto(to, <ndarray>value)
    return 0


cdef class Table:
    """Parameters and all that is stepped with them."""

    # Laying it

    cdef list _lay(self, list groups, Nest nest, Rule family, Rule rule):
        """Check the parameters, lay out the tables for them; return the groups' dictionaries."""
        cdef Py_ssize_t i, g, n = 0
        cdef ndarray a
        cdef Storage storage
        cdef Watch watch = Watch()
        arrays, keys, each = [], [], []
        self._param_roots, self._velocity_roots = Roots("params"), Roots("velocities")
        self._group_watch = Watch()
        if self._group_list is not None:
            self._group_watch.note(self._group_list)
        for group in groups:
            each.append(group.options)
            if group.params is not None:
                self._param_roots = self._param_roots.grown(group.params, group.nest, len(arrays))
            if group.given is not None:
                self._group_watch.note(group.given)
            arrays += group.options["params"]
            keys += group.options["param_names"] or [None] * len(group.options["params"])
        if not arrays:
            raise ValueError("params must hold at least one array, got none")
        self._single = nest is None
        self._nest = nest
        self._keys = None if all([key is None for key in keys]) else tuple(keys)
        self._param_roots.read(len(arrays), watch)
        self._param_roots.watch = watch
        self._params = tuple([
            check_param(arrays[i], self._label(b"params", i)) for i in range(len(arrays))
        ])
        self._n = len(arrays)
        self._table = zeroed(self._n, sizeof(Tensor))
        self._tensors = <Tensor *>self._table.at
        self._slot_memory = zeroed(self._n, sizeof(Slot))
        self._slots = <Slot *>self._slot_memory.at
        self._histories = [None] * self._n
        self._by_row = RowTensors()
        self._streams = zeroed(self._n, sizeof(Stream))
        self._apart = Buffer()
        self._buffers = {}
        self._written, self._others = Spans(), Spans()
        self._family, self._rule_given = family, rule
        self._state_names = states_of(family, rule)
        self._first_states = names_of(family if rule < 0 else rule)
        self._count_names = counts_of(family if rule < 0 else rule)
        self._states = [None] * len(self._state_names)
        self._lay_states()
        self._rests = (None,) * self._n
        self._borrowed = set()
        self._velocity = -1
        if "velocity" in self._state_names:
            self._velocity = self._state_names.index("velocity")
        for group in each:
            g = len(group["params"])
            if any([one is not other for one, other
                    in zip(group["params"], self._params[n : n + g], strict=True)]):
                group["params"] = self._params[n : n + g]
            n += g
        self._groups = Groups([group["params"] for group in each], family, rule)
        i = 0
        for g, group in enumerate(each):
            for a in group["params"]:
                self._slots[i].group = g
                self._slots[i].first_step = True
                storage = <Storage>storage_of(a)
                self._tensors[i] = one_tensor(
                    stream_of(a), PyArray_SIZE(a), NULL,
                    &self._groups.at[g].scalars
                )
                if arithmetic_of(storage) == FLOAT32:
                    self._groups.at[g].has_float32 = self._any_float32 = True
                else:
                    self._groups.at[g].has_float64 = True
                self._groups.at[g].has_bfloat16 |= storage == BFLOAT16
                self._groups.at[g].has_float16 |= storage == FLOAT16
                i += 1
        if self._count_names:
            self._counted = zeroed(self._n, sizeof(Scalars))
            self._count_array = np.tile([0.0, 1.0, 1.0], (self._n, 1))
            for i in range(self._n):
                self._tensors[i].scalars = <Scalars *>self._counted.at + i
        self._list_written()
        return each

    cdef Label _label(self, const char *what, Py_ssize_t i):
        return Label(what, -1 if self._single else i, <PyObject *>self._keys)

    cdef Label _owner(self, Py_ssize_t owner):
        """The name of memory that a step writes, by its number in `_written`."""
        if owner < 0:
            return Label(b"the optimizer's own memory", -1, NULL)
        if owner < self._n:
            return self._label(b"params", owner)
        return self._label(b"velocities" if owner < 2 * self._n else b"state", owner % self._n)

    cdef int _list_written(self) except -1:
        """List the memory a step writes; two arrays in one place are an error."""
        cdef Py_ssize_t i, k, owner, first, second
        cdef bint lent
        self._written.clear(self._n * (len(self._states) + 3))
        for i in range(self._n):
            self._written.add(span_of(<ndarray>self._params[i], i))
            self._slots[i].clear = NULL
        for k, arrays in enumerate((*self._states, self._averages)):
            if arrays is not None:
                lent = self._on_loan is not None and k == self._velocity
                for i in range(self._n):
                    owner = self._n + i if lent and self._on_loan[i] is not None else -1
                    if k in self._borrowed:
                        owner = 2 * self._n + i
                    self._written.add(span_of(<ndarray>arrays[i], owner))
        for rest in self._rests:
            if rest is not None:
                self._written.add(span_of(<ndarray>rest, -1))
        if not self._written.sort(&first, &second):
            same = "is the same array as" if 0 <= first and 0 <= second < self._n and (
                self._params[first] is self._params[second]
            ) else "shares memory with"
            raise ValueError(f"{spell(self._owner(second))} {same} {spell(self._owner(first))}")
        return 0

    cdef int _lend(self, Roots roots, Py_ssize_t first) except -1:
        """Step the caller's velocities, new ones those of the parameters from `first` on."""
        cdef Py_ssize_t i
        cdef ndarray a
        cdef Watch watch = Watch()
        cdef tuple given
        if self._family != SGD:
            raise TypeError(
                "velocities must be left out: load_state_dict() of a state that has them"
            )
        given = roots.read(self._n, watch)
        lent = list(self._on_loan or (None,) * self._n)
        for i in range(first, self._n):
            if given[i] is None:
                continue
            a = as_ndarray(given[i], True, self._label(b"velocities", i))
            if not fits(a, <ndarray>self._params[i], True):
                refuse_misfit(a, <ndarray>self._params[i], True, self._label(b"velocities", i))
            if self._velocity >= 0 and storage_of(a) != self._state_storage(i, self._velocity):
                wanted = NAMES[self._state_storage(i, self._velocity)]
                raise TypeError(
                    f"{spell(self._label(b'velocities', i))} must have the dtype that "
                    f"velocity_dtype says, {wanted}, got {name_of_dtype(a)}: np.zeros_like(p, "
                    f"{'optcore.bfloat16' if wanted == 'bfloat16' else 'np.' + wanted}) has it"
                )
            if RULE_ROWS[self._groups.at[self._slots[i].group].rule].n_states == 0:
                raise ValueError(
                    f"{spell(self._label(b'velocities', i))} must be None without momentum, "
                    "got an array"
                )
            lent[i] = a
        self._velocity_roots = roots
        roots.watch = watch
        self._on_loan = tuple(lent)
        if self._velocity < 0:
            return 0
        arrays = self._states[self._velocity] or (None,) * self._n
        own = iter(self._state_like(
            self._velocity, [i for i in range(self._n) if lent[i] is None and arrays[i] is None]
        ))
        self._install_state(self._velocity, tuple([
            lent[i] if lent[i] is not None else arrays[i] if arrays[i] is not None else next(own)
            for i in range(self._n)
        ]))
        for i in range(first, self._n):
            # one that is zero throughout has not started
            self._slots[i].first_step = lent[i] is None or not has_nonzero(lent[i])
        return 0

    cdef int _start_states(self) except -1:
        """Allocate the states of a group's rule as soon as it has some."""
        cdef Py_ssize_t g, k
        for g in range(self._groups.n):
            for name in names_of(self._groups.at[g].rule):
                k = self._state_names.index(name)
                if self._states[k] is None:
                    self._check_places()
                    self._install_state(k, tuple(self._state_like(k, list(range(self._n)))))
        return 0

    cdef tuple _allocated(self, Py_ssize_t first):
        """Zeros for averages of the parameters from `first` on, which must be what was taken."""
        self._check_places()
        return tuple(allocate_like(self._params[first:], [
            DTYPES[arithmetic_of(self._tensors[i].param.storage)] for i in range(first, self._n)
        ]))

    # How things are stored

    cdef Storage _param_storage(self, Py_ssize_t i) noexcept:
        """How a parameter is stored, with the master that its group's options give it."""
        cdef Storage storage = plain(self._tensors[i].param.storage)
        cdef int master = self._groups.at[self._slots[i].group].options.master
        if storage == BFLOAT16 and (master == MASTER_BY_DTYPE or master == SPLIT_MASTER):
            return SPLIT_BFLOAT16
        if storage == BFLOAT16 and master == FLOAT32_MASTER:
            return COPIED_BFLOAT16
        if storage == FLOAT16 and (master == MASTER_BY_DTYPE or master == FLOAT32_MASTER):
            return COPIED_FLOAT16
        return storage

    cdef Storage _state_storage(self, Py_ssize_t i, Py_ssize_t k) noexcept:
        """How a state of a parameter is stored."""
        cdef const Options *o = &self._groups.at[self._slots[i].group].options
        if o.state_dtype == STATE_BFLOAT16 or (
            k == self._velocity and o.velocity_dtype == STATE_BFLOAT16
        ):
            return BFLOAT16
        return arithmetic_of(self._tensors[i].param.storage)

    cdef list _state_like(self, Py_ssize_t k, list indices):
        """Where a state of some parameters begins: zeros, but for a sum of squares."""
        cdef double initial
        states = allocate_like([self._params[i] for i in indices],
                               [DTYPES[self._state_storage(i, k)] for i in indices])
        for i, state in zip(indices, states, strict=True):
            initial = self._groups.at[self._slots[<Py_ssize_t>i].group].options \
                .initial_accumulator_value
            if initial != 0 and self._state_names[k] == "square_sum":
                wide = np.float64 if state.dtype == np.float64 else np.float32
                assign(state, converted(np.full(state.shape, initial, wide), state))
        return states

    cdef int _start_rests(self) except -1:
        """Give half parameters what their masters need; zeros, which loading takes for none."""
        cdef Py_ssize_t i
        wanted = [i for i in range(self._n) if self._rests[i] is None
                  and self._param_storage(i) != plain(self._param_storage(i))]
        if not wanted:
            return 0
        self._check_places()
        rests = list(self._rests)
        new = allocate_like([self._params[i] for i in wanted], [
            np.uint16 if self._param_storage(i) == SPLIT_BFLOAT16 else np.float32 for i in wanted
        ])
        for i, rest in zip(wanted, new, strict=True):
            rests[i] = rest
        return self._install_rests(tuple(rests))

    cdef int _adopt_groups(self, tuple checked) except -1:
        self._groups.adopt(checked)
        self._follow_groups()
        return 0

    cdef void _follow_groups(self) noexcept:
        """Have the states of the rule, and round, as the groups' options say now."""
        cdef Py_ssize_t i
        self._any_draws = False
        for i in range(self._n):
            self._follow_rule(i)
            self._any_draws |= self._tensors[i].draws

    cdef object _master(self, Py_ssize_t i):
        """A copy of what is stepped where that is more than the parameter shows; else None."""
        cdef ndarray master
        if self._rests[i] is None:
            return None
        master, = allocate_like((self._params[i],), (np.float32,))
        copy_stream(stream_of(master), self._tensors[i].param, self._tensors[i].size)
        return master

    cdef tuple _from_master(self, Py_ssize_t i, object master, bint writes):
        """What the parameter shows of a master, whatever its type, and what is kept beside it.

        Unless it `writes`, nothing is where the parameter is another than that.
        """
        cdef ndarray param = self._params[i]
        cdef ndarray values, shown, rest
        cdef Stream stream = self._tensors[i].param
        values, shown, rest = allocate_like(
            (param,) * 3, (master.dtype, np.uint16, self._rests[i].dtype)
        )
        PyArray_CopyInto(values, <ndarray>master)
        stream.data, stream.rest = PyArray_DATA(shown), PyArray_DATA(rest)
        copy_stream(stream, stream_of(values), self._tensors[i].size)
        if not writes:
            rest[np.ndarray.view(param, np.uint16) != shown] = 0
        return shown, rest

    cdef int _install_rests(self, tuple rests) except -1:
        cdef Py_ssize_t i
        with critical_section(self):
            self._rests = rests
        for i in range(self._n):
            if rests[i] is not None:
                self._tensors[i].param.storage = self._param_storage(i)
                self._tensors[i].param.rest = PyArray_DATA(<ndarray>rests[i])
        self._follow_groups()
        return self._list_written()

    cdef int _install_state(self, Py_ssize_t k, tuple arrays) except -1:
        cdef Py_ssize_t i
        states = [*self._states]
        states[k] = arrays
        with critical_section(self):
            self._states = states
        for i in range(self._n):
            (<Stream *>self._kept.at)[i * len(states) + k] = stream_at(
                PyArray_DATA(<ndarray>arrays[i]), self._state_storage(i, k)
            )
        self._follow_groups()
        return self._list_written()

    cdef int _lay_states(self) except -1:
        """Note where each rule finds its states among the names, -1 for nowhere."""
        cdef Rule rule
        cdef int j
        cdef int *places
        self._kept = zeroed(self._n * len(self._state_names), sizeof(Stream))
        self._places = zeroed(N_RULES * MOST_STATES, sizeof(int))
        places = <int *>self._places.at
        for rule in range(N_RULES):
            names = names_of(rule)
            names += tuple([name for name in self._state_names if name not in names])
            for j in range(MOST_STATES):
                places[rule * MOST_STATES + j] = -1
                if j < len(names) and names[j] in self._state_names:
                    places[rule * MOST_STATES + j] = self._state_names.index(names[j])
        return 0

    cdef void _follow_rule(self, Py_ssize_t i) noexcept:
        """Have a tensor the rule of its group, that rule's states and its rounding."""
        cdef Tensor *t = &self._tensors[i]
        cdef const Group *group = &self._groups.at[self._slots[i].group]
        cdef const Stream *kept = <const Stream *>self._kept.at + i * len(self._states)
        cdef const int *places = <const int *>self._places.at + group.rule * MOST_STATES
        cdef int j
        t.rule = group.rule
        for j in range(MOST_STATES):
            t.states[j] = stream_at(NULL, arithmetic_of(t.param.storage))
            if places[j] >= 0 and kept[places[j]].data != NULL:
                t.states[j] = kept[places[j]]
        round_streams(t, group.options.rounding == STOCHASTIC)

    cdef Count *_counts(self) noexcept:
        return <Count *>PyArray_DATA(self._count_array)

    cdef void _count_step(self, const Step *step) noexcept:
        """Count the step for the parameters that have it, and form their scalars."""
        cdef Py_ssize_t i, j
        cdef Count *count
        cdef const Group *group
        for j in range(self._n_in(step)):
            i = nth(step, j)
            if self._tensors[i].grads[0].data != NULL:
                group = &self._groups.at[self._slots[i].group]
                count = self._counts() + i
                count.step += 1
                count.beta1_power *= group.options.kernel.beta1
                count.beta2_power *= group.options.kernel.beta2
                self._groups.scalars_at(
                    self._slots[i].group, count, <Scalars *>self._counted.at + i
                )

    cdef int _install_averages(self, tuple averages, Py_ssize_t first) except -1:
        """Average into these arrays; those from `first` on start at the parameters."""
        cdef Py_ssize_t i
        for i in range(first, self._n):
            copy_stream(
                stream_at(PyArray_DATA(<ndarray>averages[i]),
                          arithmetic_of(self._tensors[i].param.storage)),
                self._tensors[i].param, self._tensors[i].size,
            )
        with critical_section(self):
            self._averages = averages
        for i in range(self._n):
            self._tensors[i].ema = PyArray_DATA(<ndarray>averages[i])
        return self._list_written()

    cdef int _become(self, Table grown) except -1:
        """Take over the tables of a plan with more parameters; all else stays."""
        with critical_section(self):
            self._table, self._slot_memory = grown._table, grown._slot_memory
            self._tensors, self._slots = grown._tensors, grown._slots
            self._streams, self._apart = grown._streams, grown._apart
            self._sums, self._n, self._n_apart = grown._sums, grown._n, 0
            self._written, self._others = grown._written, grown._others
            self._groups = grown._groups
            self._any_float32, self._single = grown._any_float32, grown._single
            self._any_draws = grown._any_draws
            self._nest = grown._nest
            self._param_roots, self._bound_roots = grown._param_roots, grown._bound_roots
            self._velocity_roots, self._group_watch = grown._velocity_roots, grown._group_watch
            self._params, self._keys = grown._params, grown._keys
            self._bound, self._bound_scattered = grown._bound, grown._bound_scattered
            self._on_loan, self._states = grown._on_loan, grown._states
            self._kept = grown._kept
            self._averages, self._rests = grown._averages, grown._rests
            self._buffers, self._histories = grown._buffers, grown._histories
            self._counted, self._count_array = grown._counted, grown._count_array
        return 0

    @property
    def _lent(self):
        """Velocities of the caller's, each an array or None; None where none were given."""
        with critical_section(self):
            return self._on_loan

    # Looking again at what the user keeps

    cdef int _look_at_bound(self) except -1:
        """Bind what the user's containers hold now, where that is another array."""
        if self._bound_roots.changed():
            self._bind(self._bound_roots)
        return 0

    cdef int _look_again(self) except -1:
        self._look_at_params()
        if self._on_loan is not None:
            self._look_at_velocities()
        return 0

    cdef int _look_at_params(self) except -1:
        """Refuse another array in the place of a parameter, which nobody would step."""
        cdef Watch watch
        if self._group_watch.changed():
            raise ValueError(
                "params: the list of group dictionaries that the optimizer was built from was "
                "edited, which nothing reads: edit opt.param_groups, or call add_param_group()"
            )
        if not self._param_roots.changed():
            return 0
        watch = Watch()
        try:
            now = self._param_roots.read(self._n, watch)
        except (TypeError, ValueError) as error:
            raise ValueError(
                "params must stay as the optimizer was built, which add_param_group() changes: "
                f"{error}"
            ) from error
        self._refuse_replaced(
            now, self._params, b"params", ", and steps would be lost on it: write p[...] = new, "
            "not p = new, to give a parameter other values"
        )
        self._param_roots.watch = watch
        return 0

    cdef int _look_at_velocities(self) except -1:
        """Refuse another array in the place of a velocity of the caller's."""
        cdef Watch watch
        if not self._velocity_roots.changed():
            return 0
        watch = Watch()
        now = self._velocity_roots.read(self._n, watch)
        self._refuse_replaced(
            now, self._on_loan, b"velocities",
            ": write v[...] = new to give a velocity other values"
        )
        self._velocity_roots.watch = watch
        return 0

    cdef int _refuse_replaced(
        self, tuple now, tuple taken, const char *what, str cure
    ) except -1:
        """Refuse an array that is not a view of the memory that was taken in its place."""
        cdef Py_ssize_t i
        for i in range(self._n):
            if now[i] is not taken[i] and (
                now[i] is None or taken[i] is None or not is_array(now[i])
                or not in_one_place(now[i], taken[i])
            ):
                raise ValueError(
                    f"{spell(self._label(what, i))} is another array than the optimizer was built "
                    f"with{cure}"
                )
        return 0

    cdef int _check_kept(self, Py_ssize_t i) except -1:
        """Refuse a velocity of the caller's, or an average, that moved or was made read-only."""
        cdef const Tensor *t = &self._tensors[i]
        cdef const void *velocity
        if self._on_loan is not None and <object>PyTuple_GET_ITEM(self._on_loan, i) is not None:
            velocity = t.states[self._velocity].data
            if not is_unmoved(
                <ndarray>PyTuple_GET_ITEM(self._on_loan, i), velocity, t.size,
                t.states[self._velocity].storage
            ):
                self._refuse_moved(self._on_loan, i, velocity, b"velocities")
        if self._averages is not None and not is_unmoved(
            <ndarray>PyTuple_GET_ITEM(self._averages, i), t.ema, t.size,
            arithmetic_of(t.param.storage)
        ):
            self._refuse_moved(self._averages, i, t.ema, b"ema")
        return 0

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
            self._check_kept(i)
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

    # Taking gradients

    cdef tuple _listed(self, object given, Nest nest, str what):
        """What comes in the structure of `params`, in the order of the parameters."""
        return (given,) if nest is None else nest.listed(given, what, self._n)

    cdef int _ready(self, list sets, tuple names, Step *step, bint gathers=True) except -1:
        """Point every tensor at its gradients, which lie as they must then if this gathers them."""
        self._to_return = None
        if sets is not None:
            self._view(sets, names, step)
        self._take(sets, names, step)
        if step.scattered and gathers:
            self._gather(sets, names, step)
            self._take(sets, names, step)       # again, for copying may let others run
        return 0

    cdef Py_ssize_t _n_in(self, const Step *step) noexcept:
        """The number of parameters that gradients come for, in the order of `nth`."""
        return self._n if step.part == NULL else step.n_part

    cdef int _view(self, list sets, tuple names, const Step *step) except -1:
        """Replace gradients of other libraries by NumPy's views, which `sets` then holds."""
        cdef Py_ssize_t j, k
        cdef tuple listed
        cdef bint written = writes_gradients(step)
        for k in range(PyTuple_GET_SIZE(names)):
            listed = <tuple>sets[k]
            views = None
            for j in range(self._n_in(step)):
                gradient = <object>PyTuple_GET_ITEM(listed, j)
                if type(gradient) is not ndarray and gradient is not None and (
                    type(gradient) is not Rows
                ):
                    if views is None:
                        views = list(listed)
                    views[j] = as_gradient(
                        gradient, written,
                        self._label(<bytes>PyTuple_GET_ITEM(names, k), nth(step, j)),
                    )
            if views is not None:
                sets[k] = tuple(views)
        return 0

    cdef int _take(self, list sets, tuple names, Step *step) except -1:
        """Check all memory of a step and point every tensor at its gradients.

        No `sets` means the bound gradients. Nothing here runs code of the user's, and
        nothing that does may come between this and the sweep.
        """
        cdef Py_ssize_t i, j, k, n = self._n_in(step), n_sets = PyTuple_GET_SIZE(names)
        cdef bint bound = sets is None
        cdef bint kept = self._on_loan is not None or self._averages is not None
        cdef bint has_gradient = False, starts = False, lacks_states = False
        cdef Py_ssize_t n_elements = 0
        cdef const double *weights = step.weights
        cdef bint zeroing = step.zeroing
        cdef tuple params = self._params
        cdef Stream *grads
        cdef Slot *slot
        cdef Tensor *t
        cdef Rule rule
        cdef int n_states
        step.scattered = step.has_rows = False
        self._streams.grow(n * n_sets, sizeof(Stream))
        grads = <Stream *>self._streams.at
        for j in range(n):
            i = nth(step, j)
            t = &self._tensors[i]
            slot = &self._slots[i]
            if not is_unmoved(
                <ndarray>PyTuple_GET_ITEM(params, i), t.param.data, t.size, t.param.storage
            ):
                self._refuse_moved(params, i, t.param.data, b"params")
            if kept:
                self._check_kept(i)
            t.grads = grads
            t.n_grads = <int>n_sets
            t.weights = weights
            slot.by_rows = False
            if bound:
                grads[0] = slot.bound
                if slot.bound.data != NULL and not is_unmoved(
                    <ndarray>PyTuple_GET_ITEM(self._bound, i), slot.bound.data, t.size,
                    slot.bound.storage
                ):
                    self._refuse_moved(self._bound, i, slot.bound.data, b"grads")
            else:
                for k in range(n_sets):
                    self._take_one(
                        i, k, <object>PyTuple_GET_ITEM(<tuple>sets[k], j), names, step, &grads[k]
                    )
            if grads[0].data != NULL:
                has_gradient = True
                n_elements += t.size
                rule = self._groups.at[slot.group].rule
                if t.rule != rule:      # options that were refused since may have changed it
                    self._follow_rule(i)
                t.variant = variant_of(
                    rule, &self._groups.at[slot.group].options.kernel,
                    slot.first_step and not self._groups.at[slot.group].options.dampen_first
                )
                t.zero_grad = zeroing
                t.outer, t.write_back, t.share = step.outer, step.writes_back, step.share
                n_states = RULE_ROWS[rule].n_states
                if n_states > 0:
                    starts |= slot.first_step
                    for k in range(n_states):
                        lacks_states |= t.states[k].data == NULL
            grads += n_sets
        step.n_elements, step.has_gradient = n_elements, has_gradient
        step.starts, step.lacks_states = starts, lacks_states
        if writes_gradients(step) and not bound and not step.scattered:
            self._refuse_shared(names, step)
        return 0

    cdef int _take_one(
        self, Py_ssize_t i, Py_ssize_t k, object gradient, tuple names, Step *step,
        Stream *stream
    ) except -1:
        cdef ndarray param = <ndarray>PyTuple_GET_ITEM(self._params, i)
        cdef ndarray a
        cdef Py_ssize_t owner
        cdef Span span
        cdef bint written = writes_gradients(step)
        stream[0] = stream_at(NULL, FLOAT32)
        if type(gradient) is Rows:
            self._take_rows(i, k, <Rows>gradient, names, step, stream)
        elif gradient is not None:
            a = <ndarray>gradient
            span = span_of(a, 0)
            if not fits(a, param, written):
                check_but_layout(a, param, written, self._label(names[k], i))
                step.scattered = True
                span = span_over(a, 0)
            stream[0] = stream_of(a)
            if stream.data != self._slots[i].clear or k > 0 or step.scattered:
                owner = self._written.owner_over(span)
                if owner >= -1:
                    raise ValueError(
                        f"{spell(self._label(names[k], i))} must not share memory with "
                        f"{spell(self._owner(owner))}, got overlapping arrays"
                    )
                self._slots[i].clear = NULL if k > 0 or step.scattered else stream.data
        if k > 0 and (stream.data == NULL) != ((stream - k).data == NULL):
            raise ValueError(
                f"{spell(self._label(names[k], i))} and its counterpart in {names[0].decode()} "
                "must both be None or neither"
            )
        return 0

    cdef int _take_rows(
        self, Py_ssize_t i, Py_ssize_t k, Rows rows, tuple names, Step *step, Stream *stream
    ) except -1:
        """Check all of Rows but the numbers in them."""
        cdef ndarray param = <ndarray>PyTuple_GET_ITEM(self._params, i)
        cdef Label label = self._label(names[k], i)
        cdef Slot *slot = &self._slots[i]
        if step.outer or writes_gradients(step):
            raise TypeError(
                f"{spell(label)} must be an array where "
                + ("parameters are given" if step.outer else "gradients are zeroed or bound")
                + ", got Rows"
            )
        if not PyArray_IS_C_CONTIGUOUS(param) or PyArray_NDIM(param) == 0:
            raise ValueError(
                f"{spell(label)} must be an array, got Rows: its parameter has no rows one after "
                "another, which a C-contiguous array of one dimension or more has"
            )
        if not is_rows_of(rows, param):
            wanted = (len(rows), *(<object>param).shape[1:])
            if (<object>rows.values).shape != wanted:
                raise ValueError(
                    f"{spell(label)} must have values of shape {wanted}, got "
                    f"{(<object>rows.values).shape}"
                )
            check_but_layout(rows.values[:0], (<object>param)[:0], False, label)
            raise ValueError(f"{spell(label)}: its arrays were changed since Rows() took them")
        for a in (rows.indices, rows.values):
            owner = self._written.owner_over(span_of(<ndarray>a, 0))
            if owner >= -1:
                raise ValueError(
                    f"{spell(label)} must not share memory with {spell(self._owner(owner))}, "
                    "got overlapping arrays"
                )
        if not self._skips_rows(i):
            rule = self._groups.at[slot.group].rule
            reason = None
            if not is_linear(rule):
                reason = "the rule sgd, momentum or nesterov: of no other can steps be multiplied"
            elif self._averages is not None:
                reason = "ema_decay=None: what a row was between its steps is nowhere to average"
            elif is_rounded(self._tensors[i].param.storage) or (
                self._velocity >= 0 and is_rounded(self._state_storage(i, self._velocity))
            ):
                reason = (
                    "a master, and velocity_dtype other than bfloat16: what each step had rounded "
                    "off cannot be known afterwards"
                )
            if reason is not None:
                raise ValueError(
                    f"{spell(label)}: Rows with lazy='exact' needs {reason}; lazy='rows' leaves "
                    "rows without a gradient where they are"
                )
        stream[0] = stream_of(rows.values)
        if stream.data == NULL or len(rows) == 0:
            stream.data = self._tensors[i].param.data       # there is a gradient, if an empty one
        slot.by_rows = step.has_rows = True
        return 0

    cdef Py_ssize_t _width_of(self, Py_ssize_t i) noexcept:
        """The elements of a row of a parameter."""
        cdef ndarray param = <ndarray>PyTuple_GET_ITEM(self._params, i)
        cdef Py_ssize_t width = 1
        cdef int axis
        for axis in range(1, PyArray_NDIM(param)):
            width *= PyArray_DIM(param, axis)
        return width

    cdef bint _skips_rows(self, Py_ssize_t i) noexcept:
        """Whether rows without a gradient stay where they are."""
        return self._groups.at[self._slots[i].group].options.lazy != EXACT_ROWS

    cdef int _check_rows(self, Py_ssize_t i, History history) except -1:
        """Refuse a parameter that was reshaped in its place while rows of it were behind."""
        if history.n_rows != PyArray_DIM(<ndarray>self._params[i], 0):
            raise ValueError(
                f"{spell(self._label(b'params', i))} must keep its shape, for rows of it are not "
                "up to date: call catch_up() before it is given another"
            )
        return 0

    cdef int _refuse_rows(self, const Step *step, str what) except -1:
        if step.has_rows:
            raise TypeError(f"{what} takes whole arrays, got Rows")
        return 0

    cdef int _lay_rows(self, list sets, tuple names, Step *step) except -1:
        """Make the tensors of a step that has Rows, which say over which rows they are."""
        cdef Py_ssize_t i, j, k, n_rows, n_positions = 0, n_partials = 0
        cdef Tensor *t
        cdef History history
        cdef list lengths = [0] * self._n_in(step)
        for j in range(self._n_in(step)):
            i = nth(step, j)
            for k in range(len(sets)):
                gradient = (<tuple>sets[k])[j]
                if (type(gradient) is Rows) != (type((<tuple>sets[0])[j]) is Rows):
                    raise TypeError(
                        f"{spell(self._label(names[k], i))} and its counterpart in "
                        f"{names[0].decode()} must both be Rows or neither"
                    )
                if type(gradient) is Rows:
                    lengths[j] += len(<Rows>gradient)
            n_positions += <Py_ssize_t>lengths[j]
            n_partials += <Py_ssize_t>lengths[j] * n_chunks(self._width_of(i))
        self._by_row.clear(self._n_in(step), n_positions, n_partials)
        for j in range(self._n_in(step)):
            i = nth(step, j)
            t = &self._tensors[i]
            if not self._slots[i].by_rows:
                self._by_row.add_whole(t, i)
                continue
            n_rows = PyArray_DIM(<ndarray>self._params[i], 0)
            history = None
            if not self._skips_rows(i):
                history = self._histories[i]
                if history is not None and history.clock > 0:
                    self._check_rows(i, history)
                elif history is None or history.n_rows != n_rows:
                    self._histories[i] = History(n_rows)
                    self._any_history = True
                history = self._histories[i]
                history.prepare()
            self._by_row.begin_rows(lengths[j], self._width_of(i))
            for k in range(len(sets)):
                self._by_row.take_rows(
                    <Rows>(<tuple>sets[k])[j], n_rows, self._label(names[k], i)
                )
            self._by_row.end_rows(t, i, sets, j, history)
        step.n_elements = self._by_row.n_elements
        return 0

    cdef void _catch_up(self, Py_ssize_t i) noexcept:
        """Bring all rows of a parameter up to date."""
        cdef History history = self._histories[i]
        if history is not None and history.clock > 0:
            catch_up_between(&self._tensors[i], history, 0, history.n_rows)
            history.forget()

    cdef void _catch_up_stepped(self, const Step *step) noexcept:
        """Bring those up to date that a step is over as a whole, or in the other way."""
        cdef Py_ssize_t i, j
        if not self._any_history:
            return
        for j in range(self._n_in(step)):
            i = nth(step, j)
            if self._tensors[i].grads[0].data != NULL and (
                not self._slots[i].by_rows or self._skips_rows(i)
            ):
                self._catch_up(i)

    cdef int _refuse_shared(self, tuple names, const Step *step) except -1:
        """Refuse gradients that share memory where they are written."""
        cdef Py_ssize_t j, k, first, second, n_sets = PyTuple_GET_SIZE(names)
        cdef Py_ssize_t n = self._n_in(step) * n_sets
        cdef const Stream *grads = <const Stream *>self._streams.at
        cdef const void **apart
        cdef bint seen = self._n_apart == n and step.part == NULL
        self._apart.grow(n, sizeof(void *))
        apart = <const void **>self._apart.at
        for j in range(n):
            seen = seen and apart[j] == grads[j].data
        if seen:
            return 0
        self._n_apart = 0
        self._others.clear(n)
        for j in range(self._n_in(step)):
            for k in range(n_sets):
                self._add_other(&grads[j * n_sets + k], nth(step, j), k * self._n + nth(step, j))
        if not self._others.sort(&first, &second):
            self._refuse_pair(names, first, second)
        for j in range(n):
            apart[j] = grads[j].data
        self._n_apart = n if step.part == NULL else 0
        return 0

    cdef int _refuse_pair(self, tuple names, Py_ssize_t first, Py_ssize_t second) except -1:
        """Name two gradients by the numbers of their sets times the parameters, plus their own."""
        raise ValueError(
            f"{spell(self._label(names[second // self._n], second % self._n))} must not share "
            f"memory with {spell(self._label(names[first // self._n], first % self._n))} "
            "where gradients are written, got overlapping arrays"
        )

    cdef int _refuse_interwoven(self, list sets, tuple names, const Step *step) except -1:
        """The same of arrays that lie in any way: what is written back would be lost in one."""
        cdef Py_ssize_t j, k, first, second
        given = {k * self._n + nth(step, j): gradient for k in range(len(sets))
                 for j, gradient in enumerate(sets[k]) if gradient is not None}
        self._others.clear(len(given))
        for owner, gradient in given.items():
            self._others.add(span_over(<ndarray>gradient, owner))
        if self._others.sort(&first, &second):
            return 0
        for first, second in combinations(given, 2):    # one may lie between another's elements
            if np.shares_memory(given[first], given[second]):
                self._refuse_pair(names, first, second)
        return 0

    cdef void _add_other(self, const Stream *stream, Py_ssize_t i, Py_ssize_t owner) noexcept:
        """List an array as large as parameter i, where there is one."""
        if stream.data != NULL:
            self._others.add(self._span_like(stream, i, owner))

    cdef Span _span_like(self, const Stream *stream, Py_ssize_t i, Py_ssize_t owner) noexcept:
        return span_at(stream.data, self._tensors[i].size * itemsize_of(stream.storage), owner)

    cdef int _gather(self, list sets, tuple names, const Step *step) except -1:
        """Copy gradients that lie otherwise than their parameters into buffers kept for them."""
        cdef Py_ssize_t i, j, k
        cdef ndarray param
        cdef bint written = writes_gradients(step)
        if step.writes_back:
            self._refuse_interwoven(sets, names, step)
        self._to_return = []
        for k in range(len(sets)):
            gathered = list(sets[k])
            for j in range(len(gathered)):
                i = nth(step, j)
                gradient, param = gathered[j], <ndarray>self._params[i]
                if gradient is None or type(gradient) is Rows or (
                    fits(<ndarray>gradient, param, written)
                ):
                    continue
                check_but_layout(<ndarray>gradient, param, written, self._label(names[k], i))
                buffer = self._buffers.get((k, i))
                if buffer is None or buffer.dtype != gradient.dtype:
                    self._buffers[k, i], = allocate_like((param,), (gradient.dtype,))
                gathered[j] = self._buffers[k, i]
                PyArray_CopyInto(<ndarray>gathered[j], <ndarray>gradient)
                if written:
                    self._to_return.append((gradient, gathered[j]))
            sets[k] = tuple(gathered)
        return 0

    cdef Py_ssize_t _scattered_one(self) except -1:
        """The first of the bound gradients that is not where a sweep can write it."""
        cdef Py_ssize_t i
        for i in range(self._n):
            if self._bound[i] is not None and self._slots[i].bound.data == NULL:
                return i
        return 0

    cdef int _return_scattered(self) except -1:
        """Give gradients that a sweep has read from buffers what it wrote into those."""
        cdef list pairs = self._to_return
        self._to_return = None
        for array, buffer in pairs:
            PyArray_CopyInto(<ndarray>array, <ndarray>buffer)
        return 0

    cdef int _bind(self, Roots roots) except -1:
        """Check the gradients that are in the user's containers and keep them."""
        cdef Py_ssize_t i
        cdef Step step
        cdef Watch watch = Watch()
        cdef list sets = [roots.read(self._n, watch)]
        cdef dict scalars = {i: as_ndarray(gradient, False, self._label(b"grads", i))
                             for i, gradient in enumerate(sets[0])
                             if isinstance(gradient, np.generic)}
        for i, scalar in scalars.items():       # which can be read, but not written
            if not fits(<ndarray>scalar, <ndarray>self._params[i], False):
                refuse_misfit(<ndarray>scalar, <ndarray>self._params[i], False,
                              self._label(b"grads", i))
        sets[0] = tuple([None if i in scalars else gradient for i, gradient in enumerate(sets[0])])
        step = step_over(True)
        self._view(sets, GRADS, &step)
        self._take(sets, GRADS, &step)
        sums = zeroed(self._n, sizeof(Tensor))
        bound = tuple([scalars.get(i, gradient) for i, gradient in enumerate(sets[0])])
        # Nothing from here on can fail
        self._sums = sums
        self._bound = bound
        self._bound_scattered = step.scattered or len(scalars) > 0
        for i in range(self._n):
            self._slots[i].bound = stream_at(NULL, FLOAT32)
            if self._bound[i] is not None and fits(
                <ndarray>self._bound[i], <ndarray>self._params[i], True
            ):
                self._slots[i].bound = stream_of(<ndarray>self._bound[i])
        self._bound_roots = roots
        roots.watch = watch
        return 0


# Rules by their names

cdef Rule rule_named(str name) except -2:
    cdef Rule rule
    if name is None:
        return -1
    for rule in range(N_RULES):
        if RULE_ROWS[rule].name.decode() == name:
            return rule
    raise ValueError(f"rule must be one of optcore's, got {name!r}")


cdef tuple names_of(Rule rule):
    """The names of a rule's states."""
    cdef int k
    return tuple([RULE_ROWS[rule].states[k].decode() for k in range(RULE_ROWS[rule].n_states)])


cdef tuple states_of(Rule family, Rule rule):
    """The names of a rule's states; of a negative one, those of all in its family."""
    cdef Rule other
    if rule >= 0:
        return names_of(rule)
    return tuple(dict.fromkeys([name for other in range(N_RULES) if family_of(other) == family
                                for name in names_of(other)]))


cdef tuple counts_of(Rule rule):
    """The names of the numbers that are kept of each parameter's steps."""
    if corrects_bias(rule):
        return "step", "beta1_power", "beta2_power"
    return ("step",) if counts_steps(rule) else ()
