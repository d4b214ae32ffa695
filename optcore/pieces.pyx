"""Steps in pieces: contexts that take one step of a plan from what comes one by one.

`Stepping` steps some parameters at a time, `Accumulating` folds gradients into the velocities,
`Collecting` replicas' parameters into one buffer. Sums are formed by the loop of plain SGD, whose
"parameter" is then a velocity or the buffer: ``s - lr * d`` with lr = -1 is s + d to the last bit.

Between its first call and its last the first two leave the plan in the middle of a step, and have
it refuse every other call (`Plan._open`); a call of theirs that raises has changed nothing.
"""
from cython cimport critical_section
from libc.math cimport INFINITY, fabs, isfinite
from libc.string cimport memset
from numpy cimport import_array, ndarray

from optcore.arrays cimport spell, stream_of
from optcore.memory cimport zeroed
from optcore.norm cimport measures
from optcore.options cimport NONNEGATIVE, POSITIVE, check_rounding, number, row_named
from optcore.parallel cimport sweep_all
from optcore.rules cimport (
    FIRST,
    LR_IN_VELOCITY,
    MOMENTUM,
    MOST_STATES,
    NESTEROV,
    PLAIN,
    RULE_ROWS,
    SGD,
)
from optcore.storage cimport FLOAT32, FLOAT64, arithmetic_of, itemsize_of, stream_at
from optcore.sweep cimport STEP, one_tensor
from optcore.table cimport GRADS, step_over

from collections.abc import Mapping

import numpy as np

from optcore._arena import allocate_like
from optcore.plan import BOUND

import_array()


cdef class Piece:
    """A step that is under way, entered and left by `with`."""

    def __cinit__(self, Plan plan not None, *_):
        self._plan = plan
        self._memory, self._numbers = Buffer(), Buffer()

    def __init__(self, Plan plan not None, grad_scale, zero_grad=False):
        number(grad_scale, "grad_scale", POSITIVE)      # now: a round may take hours
        self._grad_scale, self._zero_grad = grad_scale, zero_grad

    @property
    def _name(self):
        return type(self).__name__.lower()

    @property
    def where(self):
        """Where the step is under way, as an error says it."""
        return f"inside {self._name}(): leave its with block first"

    def __enter__(self):
        if self._stage != MADE and self._stage != BROKEN:
            raise RuntimeError(f"{self._name}() is entered once: call it anew for another step")
        if self._stage == MADE:
            self._plan._exclusively(open_piece, self)
        self._stage = ENTERED
        return self

    def __exit__(self, kind, error, trace):
        self._check_entered("__exit__")
        self._stage = LEFT
        if kind is not None:
            self._leave()
            return
        try:
            self._plan._exclusively(close_piece, self)
        except BaseException:
            self._fail()
            raise

    def __reduce__(self):
        raise TypeError(f"{self._name}() cannot be copied or pickled, being in the midst of a step")

    cdef int _check_entered(self, str call) except -1:
        if self._stage != ENTERED:
            raise RuntimeError(f"{call}() must be called inside the with block of {self._name}()")
        return 0

    cdef int _open(self) except -1:
        """Check all that can be checked beforehand."""
        return 0

    cdef int _close(self) except -1:
        """End the step; what raises leaves it open."""
        return 0

    def _leave(self):
        """Leave by an exception in the block."""

    def _fail(self):
        """Leave by one that ending the step has raised."""
        self._leave()

    cdef Tensor *_room(self, Py_ssize_t n) except NULL:
        """Memory for n tensors, and for as many scalars in `_numbers`."""
        self._memory.grow(n, sizeof(Tensor))
        self._numbers.grow(n, sizeof(Scalars))
        return <Tensor *>self._memory.at

    cdef int _book(self) except -1:
        """Count the step, if anything was taken; the plan serves others again."""
        cdef Plan plan = self._plan
        with critical_section(plan):
            if any(self._taken):
                plan._step_count += 1
                plan._grad_norm = None
                plan._nonfinite = None
            plan._open = None
        return 0


cdef object open_piece(Plan plan, object piece, object _, object __):
    (<Piece>piece)._open()


cdef object close_piece(Plan plan, object piece, object _, object __):
    (<Piece>piece)._close()


cdef int begin_step(Piece self) except -1:
    """Ask the options of a step whose norm nobody can know."""
    cdef Plan plan = self._plan
    self._step = plan._asked(self._grad_scale, self._zero_grad)
    plan._look_again()
    plan._check_places()
    if measures(&plan._own):
        raise ValueError(
            f"{self._name}() needs max_norm=None, skip_nonfinite=False and track_grad_norm=False, "
            f"got {plan.max_norm!r}, {plan.skip_nonfinite!r} and {plan.track_grad_norm!r}: all "
            "gradients would have to be known before the first is used"
        )
    return 0


cdef int hold(Piece self) except -1:
    """Nothing but this piece's calls from here on."""
    cdef Plan plan = self._plan
    plan._start_states()
    self._taken = bytearray(plan._n)
    plan._groups.form_scalars(self._step.scale, self._step.ema_decay)
    plan._key_noise()
    with critical_section(plan):
        plan._open = self
    return 0


cdef int started(Plan plan, Py_ssize_t i) except -1:
    """Note that a parameter was stepped."""
    if RULE_ROWS[plan._groups.at[plan._slots[i].group].rule].n_states > 0:
        with critical_section(plan):
            plan._slots[i].first_step = False
    return 0


# Some parameters at a time

cdef class Stepping(Piece):
    """What `optcore.SGD.stepping` returns."""

    cdef int _open(self) except -1:
        begin_step(self)
        return hold(self)

    def step(self, key, grad=BOUND):
        """Step one parameter, or several.

        Parameters
        ----------
        key : name, index or mapping
            Which parameter: its name where `params` have names, or its place among all. A mapping
            from these to gradients steps them together, which shares out small ones to threads.
        grad : array, optional
            As for `optcore.SGD.step`; without it, the gradient bound to the parameter. None leaves
            it out.

        Raises
        ------
        KeyError, IndexError
            Where there is no such parameter.
        TypeError, ValueError, RuntimeError
            As `optcore.SGD.step`; ValueError also for a parameter that had its step. Nothing has
            changed then.
        """
        self._check_entered("step")
        if isinstance(key, Mapping):
            if grad is not BOUND:
                raise TypeError("grad must be left out where a mapping holds the gradients")
            pairs = list(key.items())
        else:
            pairs = [(key, grad)]
        self._plan._exclusively(step_some, self, pairs)

    cdef int _take(self, list indices, list grads) except -1:
        """Step these parameters."""
        cdef Plan plan = self._plan
        cdef Py_ssize_t j, n = len(indices)
        cdef Step step = self._step
        cdef Tensor *tensors = self._room(n)
        cdef list sets = [tuple(grads)]
        self._part = zeroed(n, sizeof(Py_ssize_t))
        step.part, step.n_part = <const Py_ssize_t *>self._part.at, n
        for j in range(n):
            (<Py_ssize_t *>self._part.at)[j] = indices[j]
        plan._ready(sets, GRADS, &step)
        if step.has_rows:
            plan._lay_rows(sets, GRADS, &step)
        # Nothing from here on can fail
        for j in range(n):
            tensors[j] = plan._tensors[step.part[j]]
        plan._sweep(tensors, n, &step)
        if plan._to_return is not None:
            plan._return_scattered()
        for j in range(n):
            self._taken[step.part[j]] = True
            started(plan, step.part[j])
        return 0

    cdef int _close(self) except -1:
        if self._plan._open is not self:        # a state was loaded
            return 0
        self._book()
        if not any(self._taken):
            raise ValueError("stepping() must be given at least one gradient by step(), got none")
        return 0

    def _leave(self):
        """What was stepped stays so, and counts."""
        if self._plan._open is self:
            self._book()


cdef object step_some(Plan plan, object piece, object pairs, object _):
    cdef Stepping self = piece
    cdef dict grads = {}
    cdef Py_ssize_t i
    if any([grad is BOUND for _, grad in pairs]):
        if plan._bound is None:
            raise TypeError("grad must be given to step() where none were bound")
        plan._look_at_bound()
    for key, grad in pairs:
        i = plan._index_of(key)
        if grad is BOUND:
            grad = plan._bound[i]
        if self._taken[i] or i in grads:
            raise ValueError(
                f"{spell(plan._label(b'params', i))} must be stepped once in a step, got it twice"
            )
        if grad is not None:
            grads[i] = grad
    if grads:
        self._take(list(grads), list(grads.values()))


# Gradients folded into the velocities

cdef class Accumulating(Piece):
    """What `optcore.SGD.accumulating` returns."""

    @property
    def where(self):
        if self._stage != BROKEN:
            return Piece.where.__get__(self)
        return (
            "for an exception has left accumulating() with gradients folded into the velocities: "
            "go on with `with opt.accumulating() as …`, which takes them over, or load a state"
        )

    @staticmethod
    def over(Plan plan not None, grad_scale):
        """What was left by an exception, to be gone on with, or a new one."""
        cdef Accumulating left
        with critical_section(plan):
            found = plan._open
        if not isinstance(found, Accumulating) or (<Accumulating>found)._stage != BROKEN:
            return Accumulating(plan, grad_scale)
        left = found
        if left._grad_scale != grad_scale:
            raise ValueError(
                f"grad_scale must be {left._grad_scale!r}, as it was for the gradients folded so "
                f"far, got {grad_scale!r}"
            )
        return left

    cdef int _open(self) except -1:
        begin_step(self)
        self._refuse_others()
        self._nothing = stream_at(NULL, FLOAT32)
        return hold(self)

    cdef int _refuse_others(self) except -1:
        """Refuse rules and options that need more of the gradient than its sum in the velocity."""
        cdef Plan plan = self._plan
        cdef Py_ssize_t g, i
        for g in range(plan._groups.n):
            group = &plan._groups.at[g]
            o = &group.options.kernel
            reason = None
            if group.rule == SGD:
                reason = "momentum > 0: without a velocity there is nothing to fold gradients into"
            elif group.rule == NESTEROV:
                reason = "nesterov=False: its step needs the whole gradient beside the velocity"
            elif group.rule != MOMENTUM:
                reason = "the rule momentum: of no other is the velocity a sum of gradients"
            elif o.weight_decay != 0 and not o.decoupled_weight_decay:
                reason = ("weight_decay=0 or decoupled_weight_decay=True: coupled decay would read "
                          "the parameters twice")
            elif o.clip_value < INFINITY:
                reason = "clip_value=None: the sum of the gradients is what would be clipped"
            elif o.flush_subnormals:
                reason = "flush_subnormals=False: velocities are sums under way"
            if reason is not None:
                raise ValueError(f"{plan._groups.prefix(g)}accumulating() needs {reason}")
        for i in range(plan._n):
            if plan._state_storage(i, plan._velocity) != arithmetic_of(
                plan._tensors[i].param.storage
            ):
                raise ValueError(
                    f"{plan._groups.prefix(plan._slots[i].group)}accumulating() needs "
                    "velocity_dtype=None: a narrow velocity would be rounded at every gradient"
                )
        return 0

    def add(self, grads=BOUND):
        """Fold the gradients of one micro-batch into the velocities.

        Parameters
        ----------
        grads : in the structure of `params`, optional
            As for `optcore.SGD.step`; without it, the bound gradients. What is None adds nothing.

        Raises
        ------
        TypeError, ValueError, RuntimeError
            As `optcore.SGD.step`. Nothing has changed then.
        """
        self._check_entered("add")
        self._plan._exclusively(add_grads, self, grads)

    cdef int _fold(self, object grads) except -1:
        cdef Plan plan = self._plan
        cdef Py_ssize_t i
        cdef int k = <int>plan._velocity
        cdef Step step = self._step
        cdef Tensor *tensors = self._room(plan._n)
        cdef Scalars *s = <Scalars *>self._numbers.at
        cdef Tensor *t
        cdef list sets = plan._given(grads)
        if sets is None:
            sets = plan._bound_sets()
        plan._look_again()
        plan._ready(sets, GRADS, &step)
        plan._check_some(&step, "grads")
        plan._refuse_rows(&step, "accumulating()")
        # Nothing from here on can fail
        plan._catch_up_stepped(&step)
        for i in range(plan._n):
            t = &plan._tensors[i]
            s[i] = plan._groups.at[plan._slots[i].group].scalars
            tensors[i] = one_tensor(t.states[k], t.size, t.grads, &s[i])
            tensors[i].rule = SGD
            if t.grads[0].data == NULL:
                continue
            s[i].lr = s[i].lr if t.variant == LR_IN_VELOCITY else (
                -1 if t.variant == FIRST else -s[i].undamped
            )
            s[i].shrink = 1 if self._taken[i] else s[i].momentum
            if t.variant == FIRST and not self._taken[i]:
                # v = d, which is -0 + d where d is -0 too
                memset(t.states[k].data, 0, t.size * itemsize_of(t.states[k].storage))
                s[i].shrink = -1
            self._taken[i] = True
        sweep_all(STEP, tensors, plan._n, step.n_elements)
        return 0

    cdef int _close(self) except -1:
        """Step the parameters by the velocities."""
        cdef Plan plan = self._plan
        cdef Py_ssize_t i, n_elements = 0
        cdef int k
        cdef Tensor *tensors = self._room(plan._n)
        cdef Scalars *s = <Scalars *>self._numbers.at
        cdef Tensor *t
        if plan._open is not self:              # a state was loaded
            return 0
        if not any(self._taken):
            raise ValueError(
                "accumulating() must be given at least one gradient by add(), got none"
            )
        plan._look_again()
        plan._check_places()
        # Nothing from here on can fail
        for i in range(plan._n):
            t = &tensors[i]
            t[0] = plan._tensors[i]
            s[i] = plan._groups.at[plan._slots[i].group].scalars
            s[i].lr = -1 if plan._groups.at[plan._slots[i].group].options.kernel.lr_in_velocity \
                else s[i].lr
            s[i].scale = 1
            t.scalars = &s[i]
            t.rule, t.variant, t.n_grads = SGD, PLAIN, 1
            t.zero_grad = t.outer = t.write_back = False
            t.grads = &self._nothing
            if self._taken[i]:
                t.grads = &plan._tensors[i].states[plan._velocity]
                n_elements += t.size
                started(plan, i)
            for k in range(MOST_STATES):
                t.states[k] = stream_at(NULL, arithmetic_of(t.param.storage))
        sweep_all(STEP, tensors, plan._n, n_elements)
        return self._book()

    def _leave(self):
        """What was folded cannot be taken back."""
        if self._plan._open is self:
            if any(self._taken):
                self._stage = BROKEN
            else:
                self._book()


cdef object add_grads(Plan plan, object piece, object grads, object _):
    (<Accumulating>piece)._fold(grads)


# Replicas' parameters that come one by one

cdef class Collecting(Piece):
    """What `optcore.SGD.collecting` returns."""

    def __init__(self, Plan plan not None, total, grad_scale):
        Piece.__init__(self, plan, grad_scale)
        self._total = 0 if total is None else number(total, "total", POSITIVE)

    @property
    def applied(self):
        """Whether the step was applied, or skipped (`skip_nonfinite`); None before it is taken."""
        return self._applied

    def add(self, params, weight=None):
        """Fold one replica's parameters in; they are not needed any more then.

        Parameters
        ----------
        params : in the structure of `params`
            As an entry of `replica_params` in `optcore.SGD.outer_step`. What is None in the first
            replica must be in all.
        weight : float >= 0, optional
            The number of its examples, say. All replicas have one, or none has.

        Raises
        ------
        TypeError, ValueError, RuntimeError
            As `optcore.SGD.outer_step`. Nothing has changed then.
        """
        self._check_entered("add")
        self._plan._exclusively(add_params, self, params, weight)

    cdef double _factor_of(self, double w, bint weighs) except? -1:
        """What multiplies the next replica."""
        if self._n > 0 and weighs != self._weighs:
            raise TypeError("weight must be given for every replica or for none")
        if self._total != 0:
            if not weighs:
                raise TypeError("weight must be given where total is")
            return w / self._total
        return 0 if w == 0 else 1 if self._first == 0 else w / self._first

    cdef int _add(self, object params, object weight) except -1:
        cdef Plan plan = self._plan
        cdef Py_ssize_t i
        cdef double w = 1 if weight is None else number(weight, "weight", NONNEGATIVE)
        cdef double factor = self._factor_of(w, weight is not None)
        cdef str what = f"replica_params[{self._n}]"
        cdef Step step = step_over(False)
        cdef list sums = self._sums
        cdef Tensor *tensors = self._room(plan._n)
        cdef Scalars *s = <Scalars *>self._numbers.at
        cdef list sets = [plan._listed(params, plan._nest, what)]
        cdef tuple names = (what.encode(),)
        if (factor == 0 and w != 0) or not isfinite(self._sum + w) or not isfinite(factor):
            raise ValueError(
                f"weight must neither vanish beside the others nor overflow, got {w!r}"
            )
        if plan._any_float32:
            check_rounding(
                row_named("grad_scale"), factor, f"weight / {self._total or self._first!r}"
            )
        plan._look_again()
        plan._ready(sets, names, &step)
        plan._check_some(&step, what)
        plan._refuse_rows(&step, what)
        if sums is None:
            sums = sums_like(plan)
            plan._ready(sets, names, &step)     # again, for allocating may run a finalizer
        self._check_pattern(sums, what)
        # Nothing from here on can fail
        memset(s, 0, sizeof(Scalars))
        s.scale, s.clip_value, s.lr = 1, INFINITY, -factor
        s.shrink = -1 if self._n == 0 else 1    # -0 + p is p, where p is -0 too
        for i in range(plan._n):
            tensors[i] = one_tensor(
                stream_of(<ndarray>sums[i]) if sums[i] is not None else stream_at(NULL, FLOAT32),
                plan._tensors[i].size, plan._tensors[i].grads, s,
            )
            tensors[i].rule = SGD
        sweep_all(STEP, tensors, plan._n, step.n_elements)
        self._sums = sums
        self._n += 1
        self._sum += w
        self._weighs = weight is not None
        if self._first == 0:
            self._first = w
        return 0

    cdef int _refuse_growth(self, str what) except -1:
        raise ValueError(
            f"{what} must have the {len(self._sums)} parameters that there were when collecting() "
            f"began, got {self._plan._n}"
        )

    cdef int _check_pattern(self, list sums, str what) except -1:
        """Refuse what has None in other places than the first replica."""
        cdef Plan plan = self._plan
        cdef Py_ssize_t i
        if len(sums) != plan._n:
            self._refuse_growth(what)
        for i in range(plan._n):
            if (sums[i] is None) != (plan._tensors[i].grads[0].data == NULL):
                raise ValueError(
                    f"{spell(plan._label(what.encode(), i))} and its counterpart in "
                    "replica_params[0] must both be None or neither"
                )
        return 0

    cdef int _close(self) except -1:
        cdef Plan plan = self._plan
        cdef Step step
        if self._n == 0:
            raise ValueError(
                "collecting() must be given at least one replica's parameters by add(), got none"
            )
        if len(self._sums) != plan._n:
            self._refuse_growth("the optimizer")
        if not self._sum > 0:
            raise ValueError(f"weights must have a finite sum > 0, got {self._sum!r}")
        if self._total != 0 and not fabs(self._sum - self._total) <= 1e-9 * self._total:
            raise ValueError(
                f"total must be the sum of all weights, {self._sum!r}, got {self._total!r}"
            )
        step = plan._asked(self._grad_scale, False, None, 1, True, True)
        step.share = 1 if self._total != 0 else self._first / self._sum
        if plan._any_float32:
            check_rounding(row_named("grad_scale"), step.share, "weight / sum of weights")
        plan._prepare([tuple(self._sums)], (b"the sum of replica_params",), &step)
        self._applied = plan._step(&step)
        self._sums = None
        return 0

    def _leave(self):
        self._sums = None

    def _fail(self):
        """Keep what came, which ``with`` can take up again."""
        if self._n > 0:
            self._stage = BROKEN


cdef object add_params(Plan plan, object piece, object params, object weight):
    (<Collecting>piece)._add(params, weight)


cdef list sums_like(Plan plan):
    """Zeros in the arithmetic type for every parameter that has something to add."""
    cdef Py_ssize_t i
    wanted = [i for i in range(plan._n) if plan._tensors[i].grads[0].data != NULL]
    sums = [None] * plan._n
    for i, array in zip(wanted, allocate_like(
        [plan._params[i] for i in wanted],
        [np.float64 if arithmetic_of(plan._tensors[i].param.storage) == FLOAT64 else np.float32
         for i in wanted],
    ), strict=True):
        sums[i] = array
    return sums
