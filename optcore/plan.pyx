"""The whole-model step: at most two sweeps over a table of checked tensors.

`Plan` steps its table, keeps the options and the state. Every public call is entered by
`_exclusively`, one at a time. A step is prepared (all that can fail; what may run code of the
user's comes first, and the one pass over the arrays last), then measured and swept, which
cannot fail (but for `_join_squares`, before anything is written), and then booked.
"""
from cython cimport critical_section
from libc.math cimport INFINITY, isfinite
from libc.stdint cimport int64_t
from numpy cimport import_array, ndarray

from optcore.arrays cimport lies_at, lies_like, spell, storage_of
from optcore.atomic cimport release, seize
from optcore.groups cimport Count
from optcore.memory cimport zeroed
from optcore.noise cimport GRID, key_of
from optcore.norm cimport Norm, measures
from optcore.options cimport (
    FRACTION,
    NONNEGATIVE,
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
)
from optcore.parallel cimport sweep_all
from optcore.rows cimport History, catch_up_rows, rows_in
from optcore.rules cimport RULE_ROWS, SGD, Scalars
from optcore.runtime cimport forks
from optcore.storage cimport Stream
from optcore.structure cimport Nest, Roots
from optcore.sweep cimport STEP, ZERO, Tensor, one_tensor
from optcore.table cimport GRADS, Step, Table, assign, converted, names_of, rule_named, step_over

from collections.abc import Iterable, Mapping, Set
from copy import copy

import numpy as np

from optcore.arrays import check_saved
from optcore.options import OPTIMIZER_OPTIONS
from optcore.structure import abridged

import_array()


class _Bound:
    """The default of `step`: None would hide a gradient function that forgot to return."""

    def __repr__(self):
        return "<the bound gradients>"


BOUND = _Bound()
# Where a parameter may be cut into parts that are stepped apart: each of whole runs of noise
RUN = GRID
cdef object bound_grads = BOUND


cdef class Plan(Table):
    """The compiled part of `optcore.SGD`. Not for direct use."""

    cdef object _exclusively(self, call_t call, object a=None, object b=None, object c=None):
        """Run the one call at a time that an optimizer serves."""
        self._refuse_inside(call, a)        # first, so as not to be in the way of what is open
        self._seize()
        try:
            if not self._is_built:
                raise RuntimeError("this optimizer was never built")
            self._refuse_inside(call, a)
            return call(self, a, b, c)
        finally:
            release(&self._in_use)

    cdef int _refuse_inside(self, call_t call, object a) except -1:
        """Refuse other calls than its own, and than a load that ends it, in a step in pieces."""
        with critical_section(self):
            piece = self._open
        if piece is not None and piece is not a and call != <call_t>take_state:
            raise RuntimeError(f"a step of this optimizer is under way, {piece.where}")
        return 0

    cdef int _seize(self) except -1:
        """Become the one call that uses this optimizer, in any thread."""
        cdef long found = seize(&self._in_use, 1 + forks())
        if found != 0:
            raise RuntimeError(
                "this optimizer is in use already, by another thread or by the caller of a "
                "schedule: one step at a time"
                if found == 1 + forks() else
                "this process was forked while another thread used this optimizer, which may be "
                "half-stepped here and stays so: build a new one over the parameters, or fork "
                "where no step is under way"
            )
        return 0

    # Building

    def _build(
        self, list groups, Nest nest, *, options, grads=None, velocities=None, str family="sgd",
        str rule=None, given=None, firsts=None,
    ):
        """Check everything, lay out the tables, and open the optimizer for use.

        `groups` are those of `_structure.read_groups`, and `nest` is how gradients come. `options`
        are those that no group holds; `rule` names that of every group, None leaves it to the
        options to choose one of the `family`. `given` is the user's list of group dictionaries, if
        any. Where others step the rest of each parameter, `firsts` are the places of the first
        elements, which are multiples of `RUN`.
        """
        cdef Py_ssize_t i
        self._seize()
        try:
            if self._params is not None:
                raise RuntimeError("an optimizer is built once")
            self._own = default_options()
            self._own.ema_decay = 0
            self._norm = Norm()
            self._group_list = given
            self._param_groups = self._lay(groups, nest, rule_named(family), rule_named(rule))
            for i, first in enumerate(firsts or ()):
                self._tensors[i].first = first
            self._adopt(self._param_groups, options)
            self._start_rests()
            if velocities is not None:
                self._lend(self._velocity_roots.grown(velocities, nest, 0), 0)
            self._start_states()
            if grads is not None:
                self._bind(Roots("grads").grown(grads, nest, 0))
            with critical_section(self):
                self._is_built = True
        finally:
            release(&self._in_use)

    # Options

    cdef int _adopt(self, object groups, object options) except -1:
        """Check groups and options of the whole optimizer together, then take them over."""
        cdef Options own = self._own
        cdef int row
        cdef Py_ssize_t i
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
                    averages = self._allocated(0)
            elif averages is not None:
                raise ValueError("ema_decay cannot be None once an average is kept")
        checked = self._groups.check(groups, &own)
        self._check_places()
        # Nothing from here on can fail
        if averages is not self._averages:
            for i in range(self._n):
                self._catch_up(i)
        if groups is not self._param_groups:
            self._replace_groups(groups)
        self._adopt_groups(checked)
        with critical_section(self):
            self._own = own
            self._ema_schedule = schedule
        if averages is not self._averages:
            self._install_averages(averages, 0)
        return 0

    cdef int _replace_groups(self, list groups) except -1:
        """Put other values into the dictionaries that there are, for others may hold them."""
        held = self.param_groups
        if type(held) is list and [type(group) for group in held] == [dict] * len(groups):
            for group, other in zip(held, [dict(group) for group in groups], strict=True):
                group.update(other)         # first: another thread may be reading it
                for key in [key for key in group if key not in other]:
                    del group[key]
        else:
            self.param_groups = groups
        return 0

    cdef int _read_groups(self) except -1:
        """Take over what was edited."""
        if self._groups.changed(self.param_groups):
            self._adopt_groups(self._groups.check(self.param_groups, &self._own))
        return 0

    cdef double _checked_ema_decay(self, object value, str name) except -1:
        cdef double decay = number(value, name, FRACTION)
        if self._any_float32:
            check_rounding(row_named("ema_decay"), decay, name)
        return decay

    # Getters of one thing may be called in the middle of a step, by a schedule or another thread.

    @property
    def _built(self):
        with critical_section(self):
            return self._is_built

    @property
    def param_groups(self):
        """One dictionary of options a group."""
        with critical_section(self):
            return self._param_groups

    @param_groups.setter
    def param_groups(self, groups):
        with critical_section(self):
            self._param_groups = groups

    @property
    def seed(self):
        """Seed of the noise that stochastic rounding takes; an integer in [0, 2**64)."""
        with critical_section(self):
            return self._own.seed

    @seed.setter
    def seed(self, value):
        self._exclusively(set_option, "seed", value)

    @property
    def max_norm(self):
        """Upper bound on the norm of all gradients together; None: no clipping."""
        cdef double max_norm
        with critical_section(self):
            max_norm = self._own.max_norm
        return None if max_norm == INFINITY else max_norm

    @max_norm.setter
    def max_norm(self, value):
        self._exclusively(set_option, "max_norm", value)

    @property
    def skip_nonfinite(self):
        """Whether a step whose gradients hold a NaN or an infinity is skipped."""
        with critical_section(self):
            return bool(self._own.skip_nonfinite)

    @skip_nonfinite.setter
    def skip_nonfinite(self, value):
        self._exclusively(set_option, "skip_nonfinite", value)

    @property
    def track_grad_norm(self):
        """Whether every step measures `grad_norm`, even without `max_norm`."""
        with critical_section(self):
            return bool(self._own.track_grad_norm)

    @track_grad_norm.setter
    def track_grad_norm(self, value):
        self._exclusively(set_option, "track_grad_norm", value)

    @property
    def ema_decay(self):
        """Decay of the weight average, or its schedule; None: no average is kept."""
        with critical_section(self):
            if self._averages is None:
                return None
            return self._own.ema_decay if self._ema_schedule is None else self._ema_schedule

    @ema_decay.setter
    def ema_decay(self, value):
        self._exclusively(set_option, "ema_decay", value)

    # Stepping

    cdef list _given(self, object grads):
        """The gradients given to a step, or None for the bound ones."""
        if grads is not bound_grads:
            return [self._listed(grads, self._nest, "grads")]
        if self._bound is None:
            raise TypeError("grads must be given to step() where none were bound")
        return None

    cdef list _bound_sets(self):
        """The gradients that are bound now, or None where they lie as they must."""
        self._look_at_bound()
        return [self._bound] if self._bound_scattered else None

    cdef Step _asked(
        self, object grad_scale, object zero_grad, object weights=None, Py_ssize_t n_sets=1,
        bint asks=True, bint outer=False,
    ) except *:
        """Check a step's arguments, and ask schedules, which may change what it reads after them.

        Where it does not ask, options stay at the numbers of the last time it did.
        """
        cdef Step step = step_over(flag(zero_grad, "zero_grad"))
        step.scale = number(grad_scale, "grad_scale", POSITIVE)
        step.outer = outer
        if weights is None and outer:
            step.share = 1.0 / n_sets
        elif weights is None:
            step.scale /= n_sets
        else:
            step.weights = self._weights_of(weights, n_sets)
        if step.scale != 1 and self._any_float32:
            check_rounding(row_named("grad_scale"), step.scale, "grad_scale")
        step.ema_decay = self._own.ema_decay
        if asks:
            self._read_groups()
            if self._groups.follow(self._step_count):
                self._follow_groups()
            step.ema_decay = self._current_ema_decay()
        return step

    cdef int _check_some(self, const Step *step, str what) except -1:
        """Refuse a step that has nothing for any parameter."""
        if not step.has_gradient:
            raise ValueError(f"{what} must hold at least one array, got None for every parameter")
        return 0

    cdef list _prepare(self, list sets, tuple names, Step *step, bint gathers=True):
        """All else of a step that can fail; returns what holds the gradients for the sweep."""
        if sets is None:
            sets = self._bound_sets()
        self._look_again()
        self._ready(sets, names, step, gathers)
        self._check_some(step, "grads")
        if step.has_rows:
            self._lay_rows(sets, names, step)
        if step.lacks_states or (measures(&self._own) and not self._norm.is_prepared()):
            self._start_states()
            self._norm.prepare(self._tensors, self._n)
            self._take(sets, names, step)       # again, for allocating may run a finalizer
            if step.has_rows:
                self._lay_rows(sets, names, step)
        return sets

    cdef const double *_weights_of(self, object weights, Py_ssize_t n) except? NULL:
        """The replicas' weights, divided by their sum in float64; NULL for one replica."""
        cdef Py_ssize_t k
        cdef double total = 0
        cdef double *at
        if isinstance(weights, (str, bytes, Mapping, Set)) or not isinstance(weights, Iterable):
            raise TypeError(
                f"weights must be a sequence of {n} numbers, got {type(weights).__name__}"
            )
        given = [number(weight, f"weights[{k}]", NONNEGATIVE) for k, weight in enumerate(weights)]
        if len(given) != n:
            raise ValueError(
                f"weights must have one entry for each of {n} replicas, got {len(given)}"
            )
        for k in range(n):
            total += <double>given[k]
        if not 0 < total or not isfinite(total):
            raise ValueError(f"weights must have a finite sum > 0, got {total!r}")
        self._weights = zeroed(n, sizeof(double))
        at = <double *>self._weights.at
        for k in range(n):
            at[k] = <double>given[k] / total
            if at[k] == 0 and <double>given[k] != 0:
                raise ValueError(
                    f"weights[{k}] / sum(weights) must not vanish, got {given[k]!r} / {total!r}"
                )
            if self._any_float32:
                check_rounding(row_named("grad_scale"), at[k], f"weights[{k}] / sum(weights)")
        return at if n > 1 else NULL

    cdef double _current_ema_decay(self) except -1:
        if self._averages is None or self._ema_schedule is None:
            return self._own.ema_decay
        return self._checked_ema_decay(
            self._ema_schedule(self._step_count), "ema_decay(step_count)"
        )

    cdef void _key_noise(self) noexcept:
        """Give every tensor the key of its noise in this step."""
        cdef Py_ssize_t i
        if self._any_draws:
            for i in range(self._n):
                self._tensors[i].key = key_of(self._own.seed, self._step_count, i)

    cdef void _sweep(self, const Tensor *tensors, Py_ssize_t n, const Step *step) noexcept:
        """Step these tensors or, where the step has Rows, those that were laid for it."""
        self._catch_up_stepped(step)
        if self._count_array is not None:
            with critical_section(self):
                self._count_step(step)
        if step.has_rows:
            self._by_row.key_noise(self._tensors)
            tensors, n = self._by_row.at, self._by_row.n
        sweep_all(STEP, tensors, n, step.n_elements, self._by_row.work if step.has_rows else 0)
        if step.has_rows:
            self._by_row.note(self._tensors)

    cdef bint _step(self, Step *step) except -1:
        """Measure, sweep, keep the books; whether the step was applied."""
        cdef Py_ssize_t i, n = self._n
        cdef Tensor *tensors = self._tensors
        cdef double norm, factor
        cdef bint clips = self._own.max_norm < INFINITY
        cdef bint skips = False
        cdef object grad_norm = None
        cdef list nonfinite = None
        if step.has_rows:
            tensors, n = self._by_row.at, self._by_row.n
        if step.outer:
            self._catch_up_stepped(step)        # for it measures the parameters
        if measures(&self._own):
            norm = step.scale * self._norm.measure(
                tensors, n, step.n_elements, self._join_squares
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
            self._key_noise()
            self._sweep(tensors, n, step)
            if step.starts:
                with critical_section(self):
                    for i in range(self._n):
                        if self._tensors[i].grads[0].data != NULL and (
                            RULE_ROWS[self._tensors[i].rule].n_states > 0
                        ):
                            self._slots[i].first_step = False
        elif step.zeroing:
            sweep_all(ZERO, self._tensors, self._n, step.n_elements)
        if self._to_return is not None:
            self._return_scattered()
        with critical_section(self):
            self._grad_norm = grad_norm
            self._nonfinite = nonfinite
            self._step_count += not skips
            self._skipped += skips
        return not skips

    def step(self, grads=BOUND, *, grad_scale=1.0, zero_grad=False):
        """Take one step over all parameters.

        Parameters
        ----------
        grads : array, sequence, mapping or nest of them, in the structure of `params`, optional
            Each float64 where its parameter is, else float32, bfloat16 or float16; or `Rows`, where
            it is zero but for some rows.
            A parameter whose gradient is None is left out entirely, and so are all of a container
            that is None. Gradients may lie otherwise than their parameters (transposed, strided):
            they are copied then, into a buffer that is kept for the next step. Without `grads`,
            the gradients bound at construction.
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
            For gradients and hyper-parameters that are not as they must be; IndexError for `Rows`
            with numbers of rows that there are not; RuntimeError where a step of this optimizer is
            under way. Nothing has changed then.
        """
        return self._exclusively(take_step, grads, grad_scale, zero_grad)

    def _check_step(self, grads, grad_scale, zero_grad):
        """Check a step as `step` does and take none, for those who agree on it with others.

        Returns the gradients of all parameters in their order, the options of every group as
        numbers and flags, and the decay of the average.
        """
        return self._exclusively(check_step, grads, grad_scale, zero_grad)

    def _step_as_checked(self, grads, grad_scale, double ema_decay, share=None):
        """Take the step that `_check_step` checked, with its numbers: no schedule is asked.

        With `share` an outer step: the "gradients" are sums of parameters, and d = x - share * sum.
        """
        return self._exclusively(take_checked, grads, grad_scale, (ema_decay, share))

    def step_replicas(self, replica_grads, *, weights=None, grad_scale=1.0, zero_grad=False):
        """Take one step with the mean of several workers' gradients.

        The mean is formed inside the sweep: gradients are added in the order given, in the
        parameter's arithmetic type, and their sum is multiplied by grad_scale / len(replica_grads),
        combined in float64. No averaged copy is written.

        Parameters
        ----------
        replica_grads : sequence
            One entry for each worker (replica, federated client), each in the structure of
            `params`. A parameter is left out where its gradient is None in every entry.
        weights : sequence of floats >= 0, optional
            One for each replica, the number of its examples say. The weighted mean is formed as
            ``s = w[0] * g[0]; s = s + w[k] * g[k]``, each weight divided by their sum in float64
            and then rounded once to the parameter's arithmetic type; `grad_scale` follows.
        grad_scale, zero_grad
            As in `step`; every replica's gradients are zeroed.

        Returns
        -------
        bool
            As `step`.

        Raises
        ------
        TypeError, ValueError, RuntimeError
            As `step`; ValueError also for no replica at all, for a gradient that is None in
            some replicas only, and for weights that are all zero.
        """
        return self._exclusively(take_replicas, replica_grads, (weights, grad_scale), zero_grad)

    def outer_step(self, replica_params, *, weights=None, grad_scale=1.0, write_back=False):
        """Take one step towards the mean of several replicas' parameters.

        The difference ``d = x - mean`` takes the place of the gradient, formed inside the sweep
        in the parameter's arithmetic type; then comes the rule with all its options. With
        ``lr=1`` and no momentum the parameters become that mean (FedAvg); momentum makes it FedAvgM
        and, with `nesterov`, the outer step of DiLoCo.

        Parameters
        ----------
        replica_params : sequence
            One entry for each replica (worker, federated client), each in the structure of `params`
            and of any dtype that a gradient may have. A parameter is left out where it is None in
            every entry.
        weights : sequence of floats >= 0, optional
            Of the mean, formed as in `step_replicas`; without weights it is
            ``(p[0] + p[1] + …) * (1 / n)``.
        grad_scale : float, > 0, default 1
            Multiplies the difference.
        write_back : bool, default False
            Write the new parameters into every replica's in the same sweep, which must not overlap
            then. A step that is skipped writes none.

        Returns
        -------
        bool
            As `step`.

        Raises
        ------
        TypeError, ValueError, RuntimeError
            As `step_replicas`. Nothing has changed then.

        Notes
        -----
        McMahan et al. 2017 (FedAvg), Hsu, Qi and Brown 2019 (FedAvgM), Douillard et al. 2023
        (DiLoCo).
        """
        return self._exclusively(take_outer, replica_params, (weights, grad_scale), write_back)

    @property
    def step_count(self):
        """Steps applied."""
        with critical_section(self):
            return self._step_count

    @property
    def skipped(self):
        """Steps skipped."""
        with critical_section(self):
            return self._skipped

    @property
    def grad_norm(self):
        """Norm of all gradients in the last step, before clipping; None where none was taken.

        It is the Euclidean norm of the scaled gradients, summed in float64 in an order that
        depends on nothing but the shapes.
        """
        with critical_section(self):
            return self._grad_norm

    @property
    def nonfinite_params(self):
        """Names, or indices, of the parameters with a non-finite gradient in the last step.

        Empty where the step did not look: it looks with `skip_nonfinite`, `max_norm` or
        `track_grad_norm`.
        """
        with critical_section(self):
            keys, nonfinite = self._keys, self._nonfinite
        return [i if keys is None or keys[i] is None else keys[i] for i in nonfinite or ()]

    def accumulate(self, grads):
        """Add gradients into the bound ones, in place, with the threads of a step.

        Follow n calls by ``step(grad_scale=1 / n, zero_grad=True)``. Sums in half types are rounded
        to the nearest at each call, which loses what is small beside them: bind float32 arrays.

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

    def catch_up(self, key=None, rows=None):
        """Bring rows up to date that steps have not touched, before they are read.

        With ``lazy="exact"`` the rows of a parameter that `Rows` step are brought up to date when
        they are next touched. Until then they are as they were; this makes them what a gradient
        of zero in every step since would have made them. State dictionaries and
        checkpoints do it by themselves, and so does a step with a whole gradient.

        Parameters
        ----------
        key : name or index, optional
            Which parameter: its name where `params` have names, or its place among all. Without
            it, all.
        rows : array of integers of any shape, or sequence, optional
            Which of its rows; without it, all. Numbers in [0, len(param)), in any order, several
            times or not.

        Raises
        ------
        KeyError, IndexError
            Where there is no such parameter or row; nothing has changed then.
        TypeError, ValueError, RuntimeError
            As `step`.
        """
        self._exclusively(catch_up_some, key, rows)

    cdef Py_ssize_t _index_of(self, object key) except -1:
        """The parameter that a name or a number means; names come first."""
        if self._indexed is not self._keys or self._indices is None:
            self._indices = {name: i for i, name in enumerate(self._keys or ()) if name is not None}
            self._indexed = self._keys
        try:
            if key in self._indices:
                return self._indices[key]
        except TypeError:
            raise TypeError(
                f"key must be a parameter's name or index, got {type(key).__name__}"
            ) from None
        if isinstance(key, (int, np.integer)) and not isinstance(key, bool):
            if not 0 <= key < self._n:
                raise IndexError(f"key must be in [0, {self._n}), the parameters' range, got {key}")
            return key
        raise KeyError(
            f"key must be a parameter's index in [0, {self._n})"
            + (f" or name, one of {abridged(self._indices)}" if self._indices else "")
            + f", got {key!r}"
        )

    # State

    @property
    def _has_master(self):
        """Of each parameter, whether a master is kept of it."""
        with critical_section(self):
            return [rest is not None for rest in self._rests]

    @property
    def _states_in_use(self):
        """Of each parameter, the names of the states that its rule has."""
        cdef Py_ssize_t i
        with critical_section(self):
            return [names_of(self._groups.at[self._slots[i].group].rule) for i in range(self._n)]

    @property
    def _masters(self):
        """What stands beside each parameter: uint16 low halves, a float32 copy, or None."""
        with critical_section(self):
            return self._rests

    def _lend_states(self, name, arrays):
        """Keep the states of a name in these arrays, each like the one there; None: as it is."""
        self._exclusively(lend_states, name, arrays)

    def _lend_masters(self, masters):
        """Keep in these arrays what `_masters` shows, each like the one there; None: as it is."""
        self._exclusively(lend_masters, masters)

    @property
    def _state(self):
        """Of each parameter its states by name, "ema" (None where there is none), "first_step" and,
        where its rule counts steps, their numbers.
        """
        cdef Py_ssize_t i
        cdef list others = []
        with critical_section(self):
            states, averages = self._states, self._averages
            for i in range(self._n):
                others.append({"first_step": bool(self._slots[i].first_step)})
                if self._count_names:
                    others[i].update(zip(self._count_names, count_of(&self._counts()[i])))
        arrays = dict(zip((*self._state_names, "ema"), (*states, averages)))
        return [
            {**{name: of_all and of_all[i] for name, of_all in arrays.items()}, **other}
            for i, other in enumerate(others)
        ]

    def _grow(self, list groups, nests, grads, velocities, note):
        """Take one group more, the last of `groups`; `nests` are of all together and of its own.

        `note`, which cannot fail, is called before another thread can see the new group.
        """
        self._exclusively(grow, groups, nests, (grads, velocities, note))

    def _grown(self, list groups, nests, grads, velocities):
        """Check `_grow` and return what `_take_grown` takes over, for those who agree on it."""
        return self._exclusively(grown_by, groups, nests, (grads, velocities))

    def _take_grown(self, Plan grown, note):
        self._exclusively(take_grown, grown, note)

    def _set_in_groups(self, name, value):
        """Set an option in every group, checked as one."""
        self._exclusively(set_in_groups, name, value)

    def _check_current(self):
        """Refuse arrays that are not those the user's containers hold, or that moved."""
        self._exclusively(look_again)

    def _snapshot(self, bint include_params=False, bint copies=False):
        """Return copies of all that one moment holds: state, groups, counts and options.

        And, not copied, what the optimizer was built from. For a state dictionary all rows are
        brought up to date; what `copies` the optimizer has them as they are and their "histories".
        """
        return self._exclusively(copy_state, include_params, copies)

    @property
    def _has_histories(self):
        """Whether rows may be behind: a parameter was stepped by some of its rows."""
        with critical_section(self):
            return bool(self._any_history)

    def _copy_histories(self):
        return self._exclusively(copy_histories)

    def _take_histories(self, histories):
        """Go on from what a snapshot has of rows that are not up to date."""
        self._exclusively(take_histories, histories)

    def _restore(self, list groups, list entries, dict options, counts, writes=()):
        """Take over a checked state.

        `entries` are as `_state` has them; states of None become zero, what is left out stays, and
        an average of None does. A "master" is taken where the parameter shows it, or with
        "writes_master" becomes the parameter. `options` are those of the whole optimizer to change,
        `counts` the steps applied and skipped, `writes` pairs of an array and what it becomes.
        """
        self._exclusively(take_state, groups, entries, (options, counts, writes))


cdef tuple count_of(const Count *count):
    return <int64_t>count.step, count.beta1_power, count.beta2_power


# The calls that `_exclusively` runs

cdef object take_step(Plan self, object grads, object grad_scale, object zero_grad):
    cdef list sets = self._given(grads)
    cdef Step step = self._asked(grad_scale, zero_grad)
    sets = self._prepare(sets, GRADS, &step)
    return self._step(&step)


cdef object check_step(Plan self, object grads, object grad_scale, object zero_grad):
    cdef list sets = self._given(grads)
    cdef Step step = self._asked(grad_scale, zero_grad)
    sets = self._prepare(sets, GRADS, &step, False)
    return (self._bound if sets is None else sets[0]), self._groups.values(), step.ema_decay


cdef object take_checked(Plan self, object grads, object grad_scale, object agreed):
    cdef list sets = self._given(grads)
    cdef Step step
    ema_decay, share = agreed
    step = self._asked(grad_scale, False, None, 1, False, share is not None)
    step.ema_decay = ema_decay
    if share is not None:
        step.share = share
    sets = self._prepare(sets, GRADS, &step)
    return self._step(&step)


cdef list replicas_of(Plan self, object given, str what):
    """What replicas give, each in the order of the parameters."""
    if not isinstance(given, (list, tuple)):
        raise TypeError(
            f"{what} must be a list or tuple with one entry for each replica, "
            f"got {type(given).__name__}"
        )
    if not given:
        raise ValueError(f"{what} must have at least one entry, got none")
    return [self._listed(one, self._nest, f"{what}[{k}]") for k, one in enumerate(given)]


cdef tuple labels_of(list sets, str what):
    cdef Py_ssize_t k
    return tuple([f"{what}[{k}]".encode() for k in range(len(sets))])


cdef object take_replicas(Plan self, object replica_grads, object scaling, object zero_grad):
    cdef Step step
    cdef list sets = replicas_of(self, replica_grads, "replica_grads")
    weights, grad_scale = scaling
    step = self._asked(grad_scale, zero_grad, weights, len(sets))
    sets = self._prepare(sets, labels_of(sets, "replica_grads"), &step)
    return self._step(&step)


cdef object take_outer(Plan self, object replica_params, object scaling, object write_back):
    cdef Step step
    cdef list sets = replicas_of(self, replica_params, "replica_params")
    weights, grad_scale = scaling
    step = self._asked(grad_scale, False, weights, len(sets), True, True)
    step.writes_back = flag(write_back, "write_back")
    sets = self._prepare(sets, labels_of(sets, "replica_params"), &step)
    return self._step(&step)


cdef object add_up(Plan self, object grads, object _, object __):
    cdef Py_ssize_t i
    cdef Step step
    cdef Scalars plus
    cdef Options o = default_options()
    cdef Tensor *sums
    cdef Tensor *t
    if self._bound is None:
        raise RuntimeError("accumulate() needs gradients that were bound at construction, grads=…")
    self._look_at_bound()
    if self._bound_scattered:
        raise ValueError(
            f"{spell(self._label(b'grads', self._scattered_one()))} must be an array that lies as "
            "its parameter does where accumulate() adds to it: bind np.zeros_like(p)"
        )
    sets = [self._listed(grads, self._nest, "grads")]
    step = step_over(False)
    self._look_again()
    self._ready(sets, GRADS, &step)
    self._refuse_rows(&step, "accumulate()")
    self._take(None, GRADS, &step)
    self._take(sets, GRADS, &step)
    self._others.clear(self._n)
    for i in range(self._n):
        self._add_other(&self._slots[i].bound, i, i)
    self._others.sort(&i, &i)           # they lie apart, as _bind saw
    # g + h is x - lr * d with x = g, d = h and lr = -1, to the last bit
    o.kernel.lr = -1
    plus = combine(&o.kernel)
    sums = <Tensor *>self._sums.at
    for i in range(self._n):
        t = &self._tensors[i]
        refuse_self_sum(self, i, t.grads)
        sums[i] = one_tensor(
            self._slots[i].bound, t.size, t.grads, &plus
        )
        sums[i].rule = SGD
    sweep_all(STEP, sums, self._n, step.n_elements)


cdef int refuse_self_sum(Plan self, Py_ssize_t i, const Stream *gradient) except -1:
    """Refuse a gradient without a bound one to add it to, or one that overlaps those."""
    cdef Py_ssize_t owner
    if gradient.data == NULL:
        return 0
    if self._slots[i].bound.data == NULL:
        raise ValueError(
            f"{spell(self._label(b'grads', i))} must be None where no gradient is bound, "
            "got an array"
        )
    owner = self._others.owner_over(self._span_like(gradient, i, i))
    if owner >= 0:
        raise ValueError(
            f"{spell(self._label(b'grads', i))} must not share memory with the gradient bound "
            f"to {spell(self._label(b'params', owner))}, got overlapping arrays"
        )
    return 0


cdef object zero_bound(Plan self, object _, object __, object ___):
    cdef Step step
    cdef list sets
    if self._bound is None:
        raise RuntimeError("zero_grad() needs gradients that were bound at construction, grads=…")
    sets = self._bound_sets()
    step = step_over(True)
    self._look_again()
    self._ready(sets, GRADS, &step)
    sweep_all(ZERO, self._tensors, self._n, step.n_elements)
    if self._to_return is not None:
        self._return_scattered()


cdef object catch_up_some(Plan self, object key, object rows, object _):
    cdef Py_ssize_t i
    cdef History history
    if key is None and rows is not None:
        raise TypeError("key must say whose rows they are, got None")
    i = -1 if key is None else self._index_of(key)
    if rows is not None:
        if self._params[i].ndim == 0:
            raise ValueError(
                f"rows must be None for {spell(self._label(b'params', i))}, which has none"
            )
        rows = rows_in(rows, len(self._params[i]))
    self._look_again()
    self._check_places()
    if i < 0:
        for i in range(self._n):
            self._catch_up(i)
        return
    history = self._histories[i]
    if rows is None:
        self._catch_up(i)
    elif history is not None and history.clock > 0:
        self._check_rows(i, history)
        catch_up_rows(&self._tensors[i], history, rows)


cdef object set_option(Plan self, object name, object value, object _):
    self._adopt(self.param_groups, {name: value})


cdef object set_in_groups(Plan self, object name, object value, object _):
    groups = self.param_groups
    if isinstance(groups, list):
        groups = [{**group, name: value} if isinstance(group, dict) else group for group in groups]
    checked = self._groups.check(groups, &self._own)
    for group in self.param_groups:
        group[name] = value
    self._adopt_groups(checked)


cdef object grow(Plan self, object groups, object nests, object rest):
    grads, velocities, note = rest
    take_grown(self, grown_by(self, groups, nests, (grads, velocities)), note, None)


cdef object grown_by(Plan self, object groups, object nests, object rest):
    """Build anew with another group, keeping what has been."""
    cdef Py_ssize_t i, k, n = self._n
    cdef Nest nest, own
    cdef Plan grown
    nest, own = nests
    grads, velocities = rest
    if len(groups) != self._groups.n + 1:
        raise RuntimeError("another thread has added a group to this optimizer meanwhile")
    if (grads is None) != (self._bound is None):
        raise ValueError(
            "grads must be given for the new parameters where gradients are bound, got none"
            if grads is None else "grads must be left out where none were bound, got some"
        )
    self._look_again()
    self._read_groups()
    self._check_places()
    grown = Plan.__new__(Plan)
    grown._own, grown._ema_schedule = self._own, self._ema_schedule
    grown._norm = Norm()
    grown._group_list = self._group_list
    grown._param_groups = grown._lay(groups, nest, self._family, self._rule_given)
    grown._adopt_groups(grown._groups.check(grown._param_groups, &grown._own))
    added = list(range(n, grown._n))
    states = [None if arrays is None else arrays + tuple(grown._state_like(k, added))
              for k, arrays in enumerate(self._states)]
    averages = None if self._averages is None else self._averages + grown._allocated(n)
    grown._on_loan = None if self._on_loan is None else self._on_loan + (None,) * (grown._n - n)
    grown._velocity_roots = self._velocity_roots
    for i in range(n):
        grown._slots[i].first_step = self._slots[i].first_step
    if self._count_array is not None:
        grown._count_array[:n] = self._count_array
    for k, arrays in enumerate(states):
        if arrays is not None:
            grown._install_state(k, arrays)
    grown._install_rests(self._rests + (None,) * len(added))
    grown._start_rests()
    if averages is not None:
        grown._install_averages(averages, n)
        if self._ema_schedule is None:      # float32 may be new
            grown._checked_ema_decay(self._own.ema_decay, "ema_decay")
    grown._adopt(grown._param_groups, {})
    if velocities is not None:
        grown._lend(self._velocity_roots.grown(velocities, own, n), n)
    grown._start_states()
    if grads is not None:
        grown._bind(self._bound_roots.grown(grads, own, n))
    return grown


cdef object take_grown(Plan self, object grown, object note, object _):
    """Take over what was built, which cannot fail."""
    cdef Py_ssize_t i
    for i in range(self._n):
        self._catch_up(i)
    self._become(grown)
    self._norm = (<Plan>grown)._norm
    self.param_groups.append((<Plan>grown)._param_groups[-1])
    note()


cdef object look_again(Plan self, object _, object __, object ___):
    self._look_again()
    self._check_places()


cdef object lend_states(Plan self, object name, object arrays, object _):
    cdef Py_ssize_t i, k = self._state_names.index(name)
    self._check_places()
    states = list(self._states[k])
    for i, array in enumerate(arrays):
        if array is None:
            continue
        if not lies_like(<ndarray>array, <ndarray>self._params[i], True) or (
            storage_of(<ndarray>array) != self._state_storage(i, k)
        ):
            raise ValueError(
                f"{spell(self._label(b'states', i))} must lie as its parameter does"
            )
        states[i] = array
    self._borrowed.add(k)
    self._install_state(k, tuple(states))


cdef object lend_masters(Plan self, object masters, object _, object __):
    cdef Py_ssize_t i
    self._check_places()
    rests = list(self._rests)
    for i, master in enumerate(masters):
        if master is None:
            continue
        if rests[i] is None or master.dtype != rests[i].dtype or not lies_like(
            <ndarray>master, <ndarray>self._params[i], True
        ):
            raise ValueError(f"{spell(self._label(b'masters', i))} must lie as its parameter does")
        rests[i] = master
    self._install_rests(tuple(rests))


cdef bint is_behind(Plan self):
    """Whether rows are not up to date."""
    return any([history is not None and (<History>history).clock > 0
                for history in self._histories])


cdef object copy_histories(Plan self, object _, object __, object ___):
    """Return what there is of rows that are not up to date, or None."""
    if not is_behind(self):
        return None
    return [copy(history) for history in self._histories]


cdef object take_histories(Plan self, object histories, object _, object __):
    self._histories = list(histories)
    self._any_history = True


cdef object copy_state(Plan self, object include_params, object copies, object _):
    cdef Py_ssize_t i
    if include_params:
        self._look_again()
        for i in range(self._n):        # one that was made read-only may be saved
            if not lies_at(
                <ndarray>self._params[i], self._tensors[i].param.data, self._tensors[i].size
            ):
                self._refuse_moved(self._params, i, self._tensors[i].param.data, b"params")
    # whole, not only what was edited: an array may hold another number than at the last step
    self._adopt_groups(self._groups.check(self.param_groups, &self._own))
    if not copies and is_behind(self):
        catch_up_some(self, None, None, None)
    entries = self._state
    if include_params:
        entries = [{**entry, "param": param}
                   for entry, param in zip(entries, self._params, strict=True)]
    state = [
        {key: a.copy(order="K") if isinstance(a, np.ndarray) else a for key, a in entry.items()}
        for entry in entries
    ]
    for i, entry in enumerate(state):
        if self._rests[i] is not None:
            entry["master"] = self._master(i)
    return {
        "state": state,
        "param_groups": [dict(group) for group in self.param_groups],
        "step_count": self._step_count,
        "skipped": self._skipped,
        "options": {name: getattr(self, name) for name in OPTIMIZER_OPTIONS},
        "given": getattr(self, "_given", None),
        "histories": copy_histories(self, None, None, None),
    }


cdef object take_state(Plan self, object groups, object entries, object rest):
    cdef Py_ssize_t i, k
    self._look_again()
    options, (step_count, skipped), writes = rest
    for i, entry in enumerate(entries):     # an array may have been reshaped in its place
        for name, arrays in zip((*self._state_names, "ema"), (*self._states, self._averages)):
            if arrays is not None:
                check_saved(entry.get(name), arrays[i], f"state[{i}][{name!r}]")
    new = {k: tuple(self._state_like(k, list(range(self._n))))
           for k, (name, arrays) in enumerate(zip(self._state_names, self._states))
           if arrays is None and any([entry.get(name) is not None for entry in entries])}
    own = dict(zip((*self._state_names, "ema"), (*self._states, self._averages)))
    own.update({self._state_names[k]: arrays for k, arrays in new.items()})
    entries = [{key: converted(value, <ndarray>own[key][i]) if own.get(key) is not None else value
                for key, value in entry.items()} for i, entry in enumerate(entries)]
    writes = [(array, converted(value, array)) for array, value in writes]
    masters = {}
    for i, entry in enumerate(entries):
        if self._rests[i] is not None and entry.get("master") is not None:
            masters[i] = self._from_master(i, entry["master"], entry.get("writes_master", False))
    self._adopt(groups, {name: value for name, value in options.items()
                         if name != "ema_decay" or value is not None})
    # Nothing from here on can fail
    for i, entry in enumerate(entries):     # a state is saved with all rows up to date
        if entry and self._histories[i] is not None:
            (<History>self._histories[i]).forget()
    for k, arrays in new.items():
        self._install_state(k, arrays)
    for i, entry in enumerate(entries):
        for name, arrays in zip((*self._state_names, "ema"), (*self._states, self._averages)):
            if arrays is not None and name in entry and (name != "ema" or entry[name] is not None):
                assign(<ndarray>arrays[i], entry[name])
    first_steps = [entry.get("first_step", bool(self._slots[i].first_step))
                   for i, entry in enumerate(entries)]
    for array, value in writes:
        assign(array, value)
    for i, entry in enumerate(entries):
        if self._rests[i] is not None and "master" in entry:
            shown, rest = masters.get(i, (None, None))
            assign(self._rests[i], rest)
            if entry.get("writes_master", False):
                np.ndarray.view(self._params[i], np.uint16)[...] = shown
    with critical_section(self):
        for i, first_step in enumerate(first_steps):
            self._slots[i].first_step = first_step
            if self._count_names:
                for k, name in enumerate(self._count_names):
                    self._count_array[i, k] = entries[i].get(name, self._count_array[i, k])
        self._step_count = step_count
        self._skipped = skipped
        self._grad_norm = None
        self._nonfinite = None
        self._open = None
