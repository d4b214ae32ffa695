"""Steps row by row: what a step touches, and what it does to the rows that it does not.

Under a gradient of zero a step of these rules is linear: (x, v) becomes M (x, v), M a matrix of the
group's scalars, the same for all rows. `History` keeps the product of the matrices of the
steps that a row has missed, so that the row is brought up to date when it is next needed. M itself
is what the sweep makes of (1, 0) and (0, 1): the equations stand in rules.pxd and nowhere else.

`RowTensors` lists the rows that a step touches, the values given for a row being its gradients.
Sweeps go over these rows where they lie; from there on it is a step like any other.
"""
cimport cython
from libc.math cimport isfinite
from libc.string cimport memcmp, memcpy, memmove, memset
from libc.stdint cimport int32_t, uint64_t
from numpy cimport PyArray_DATA, PyArray_DIM, PyArray_ITEMSIZE, PyArray_NDIM, import_array

from optcore.arrays cimport as_ndarray, fits, is_tensor, may_meet, spell, stream_of
from optcore.parallel cimport sweep_all
from optcore.storage cimport FLOAT64, stream_at, stream_from
from optcore.sweep cimport (
    CATCH_UP,
    N_ANSWERS,
    STEP,
    Answer,
    Partial,
    Row,
    behind_by,
    n_partials,
    one_tensor,
    point_at,
    sweep_in_use,
)

import numpy as np

from optcore._arena import allocate_like
from optcore.arrays import name_of_dtype

import_array()

cdef enum:
    BATCH = 128             # pieces of a table that one sweep catches up
    FEWEST_RUNS = 1024
    MOST_RUNS = 1 << 18
    ROWS_A_RUN = 64         # of a table, at least: histories take 3 bytes a row at most

cdef uint32_t MOST_STEPS = 0xFFFFFFFF       # that a stamp can count
cdef Linear IDENTITY = Linear(1, 0, 0, 1)


@cython.final
cdef class Rows:
    """The gradient of a parameter that is zero but for some rows.

    Parameters
    ----------
    indices : array of int32 or int64, or list of ints, of shape (k,)
        Numbers of rows in [0, len(param)), in any order. Where one comes several times, its values
        are added in their order.
    values : array, of shape (k, \\*param.shape[1:])
        One row of the gradient for each index, of any dtype that a gradient may have.
        Arrays that are not C-contiguous and aligned are copied, now.

    Raises
    ------
    TypeError, ValueError
        For arrays that are not as they must be.

    Attributes
    ----------
    indices, values : numpy.ndarray
        The arrays, or views of other libraries'.

    Notes
    -----
    `SGD.step` takes it wherever it takes a gradient, and the option ``lazy`` of `SGD` says what
    becomes of the other rows.
    """

    def __init__(self, indices, values):
        if isinstance(indices, (list, tuple, range)):
            indices = np.asarray(indices, None if len(indices) > 0 else np.int64)
        indices = as_ndarray(indices, False, Label(b"indices", -1, NULL))
        values = as_ndarray(values, False, Label(b"values", -1, NULL))
        if indices.dtype not in (np.int32, np.int64) or not indices.dtype.isnative:
            raise TypeError(
                f"indices must have dtype int32 or int64, got {indices.dtype}: "
                "indices.astype(np.int64) has it"
            )
        if indices.ndim != 1:
            raise ValueError(
                f"indices must have one dimension, got shape {indices.shape}: "
                "indices.ravel(), and values.reshape(-1, *param.shape[1:]), have it"
            )
        if values.ndim < 1 or values.shape[0] != indices.shape[0]:
            raise ValueError(
                f"values must have one row for each of {indices.shape[0]} indices, "
                f"got shape {values.shape}"
            )
        self.indices = np.require(indices, requirements="CA")
        self.values = np.require(values, requirements="CA")

    @staticmethod
    def concatenate(rows):
        """Return the sum of several: their indices and values one after another.

        Parameters
        ----------
        rows : sequence of Rows
            Of one parameter and dtype, at least one: the gradients of micro-batches, say.

        Returns
        -------
        Rows

        Raises
        ------
        TypeError, ValueError
            For values of several dtypes or shapes, and for no rows at all.
        """
        rows = list(rows)
        dtypes = {name_of_dtype(one.values) for one in rows}
        if len(dtypes) > 1:
            raise TypeError(f"rows must have values of one dtype, got {', '.join(sorted(dtypes))}")
        values = np.concatenate([one.values for one in rows])
        return Rows(        # NumPy drops what an array declares of its bits
            np.concatenate([one.indices for one in rows]), values.view(rows[0].values.dtype)
        )

    def __len__(self):
        return len(self.indices)

    def __repr__(self):
        values = <object>self.values
        return f"Rows({len(self)} rows of {values.dtype} {values.shape[1:]})"

    def __reduce__(self):
        return Rows, (self.indices, self.values)


cdef object as_gradient(object given, bint written, Label label):
    """What a step takes another library's gradient as: a NumPy array over its memory, or Rows."""
    if is_tensor(given) and given.is_sparse:
        if given.sparse_dim() != 1:
            raise TypeError(
                f"{spell(label)} must be sparse in its first dimension alone, got sparse_dim() = "
                f"{given.sparse_dim()}"
            )
        return Rows(given._indices()[0], given._values().detach())
    return as_ndarray(given, written, label)


cdef bint is_rows_of(Rows rows, ndarray param) noexcept:
    """Whether they are yet what their making checked, and what the parameter's rows are."""
    cdef int axis
    cdef ndarray indices = rows.indices, values = rows.values
    if indices is None or values is None:
        return False
    if PyArray_NDIM(values) != PyArray_NDIM(param) or PyArray_NDIM(indices) != 1 or (
        PyArray_DIM(values, 0) != PyArray_DIM(indices, 0)
    ):
        return False
    for axis in range(1, PyArray_NDIM(param)):
        if PyArray_DIM(values, axis) != PyArray_DIM(param, axis):
            return False
    return may_meet(values, param) and fits(values, values, False) and (
        (<object>indices).flags.c_contiguous and (<object>values).flags.c_contiguous
        and (<object>indices).dtype in (np.int32, np.int64)
    )


# Matrices

cdef inline Linear product(const Linear *b, const Linear *a) noexcept nogil:
    """First a, then b."""
    return Linear(
        b.xx * a.xx + b.xv * a.vx, b.xx * a.xv + b.xv * a.vv,
        b.vx * a.xx + b.vv * a.vx, b.vx * a.xv + b.vv * a.vv,
    )


# Numbers to twice the precision of float64, high + low (Dekker 1971): a power by repeated squaring
# would else carry the rounding of its first square k / 2 times.

cdef struct Wide:
    double high
    double low


cdef inline Wide two_sum(double a, double b) noexcept nogil:
    cdef double s = a + b
    cdef double t = s - a
    return Wide(s, (a - (s - t)) + (b - t))


cdef inline Wide two_product(double a, double b) noexcept nogil:
    cdef double p = a * b
    cdef double ta = 134217729.0 * a, tb = 134217729.0 * b      # 2**27 + 1
    cdef double ha = ta - (ta - a), hb = tb - (tb - b)
    cdef double la = a - ha, lb = b - hb
    return Wide(p, ((ha * hb - p) + ha * lb + la * hb) + la * lb)


cdef inline Wide wide_product(Wide a, Wide b) noexcept nogil:
    cdef Wide p = two_product(a.high, b.high)
    return two_sum(p.high, p.low + (a.high * b.low + a.low * b.high))


cdef inline Wide wide_sum(Wide a, Wide b) noexcept nogil:
    cdef Wide s = two_sum(a.high, b.high)
    s = two_sum(s.high, s.low + (a.low + b.low))
    return s


cdef void square(Linear *high, Linear *low) noexcept nogil:
    cdef Linear whole = high[0]
    cdef Wide xx = Wide(high.xx, low.xx), xv = Wide(high.xv, low.xv)
    cdef Wide vx = Wide(high.vx, low.vx), vv = Wide(high.vv, low.vv)
    cdef Wide a = wide_sum(wide_product(xx, xx), wide_product(xv, vx))
    cdef Wide b = wide_sum(wide_product(xx, xv), wide_product(xv, vv))
    cdef Wide c = wide_sum(wide_product(vx, xx), wide_product(vv, vx))
    cdef Wide d = wide_sum(wide_product(vx, xv), wide_product(vv, vv))
    high[0] = Linear(a.high, b.high, c.high, d.high)
    low[0] = Linear(a.low, b.low, c.low, d.low)
    if not isfinite(a.high + b.high + c.high + d.high):     # of numbers too large to be split
        high[0] = product(&whole, &whole)
        low[0] = Linear(0, 0, 0, 0)


cdef Linear matrix_of(const Tensor *t) noexcept:
    """What this step makes of x and v where the gradient is zero."""
    cdef double[2] x = [1, 0]
    cdef double[2] v = [0, 1]
    cdef double[2] d = [0, 0]
    cdef Stream grad = stream_at(d, FLOAT64)
    cdef Tensor probe = one_tensor(stream_at(x, FLOAT64), 2, &grad, t.scalars)
    probe.states[0] = stream_at(v, FLOAT64)
    probe.rule, probe.variant = t.rule, t.variant
    sweep_in_use()(STEP, &probe, 0, 2)
    return Linear(x[0], x[1], v[0], v[1])


# What rows have missed

cdef Linear missed(const void *history, uint32_t stamp) noexcept nogil:
    return (<History>history).since(stamp)


@cython.final
cdef class History:
    """The steps of one parameter since all its rows were up to date.

    Steps that do the same are one run, and the powers of its matrix are kept; runs are multiplied
    by twos, fours and so on, so that the product of any of them takes few multiplications. Where
    there are many runs, a schedule's say, a few rows are caught up at each step in turn, and runs
    that no row needs any more are dropped.
    """

    def __cinit__(self, Py_ssize_t n_rows):
        cdef Py_ssize_t most = FEWEST_RUNS
        while most < MOST_RUNS and 2 * most * ROWS_A_RUN <= n_rows:
            most *= 2
        self.n_rows = n_rows
        self._few = most // 2 - 2
        # on huge pages: rows are looked up anywhere
        self._stamps, = allocate_like([np.broadcast_to(np.uint32(0), n_rows)])
        self._runs, self._powers, self._products = Buffer(), Buffer(), Buffer()

    def __reduce__(self):
        """Copy all but what can be formed again."""
        cdef Py_ssize_t i
        cdef const Run *runs = <const Run *>self._runs.at
        cdef Linear[2] wide = [self._high, self._low]
        return _restored, (
            self.n_rows, self.clock, self._stamps,
            [(runs[i].begin, runs[i].first_power) for i in range(self._n_runs)],
            (<char *>self._powers.at)[:self._n_powers * sizeof(Linear)],
            (<char *>wide)[:sizeof(wide)], self._hand, self._done,
        )

    cdef uint32_t *stamps(self) noexcept:
        return <uint32_t *>PyArray_DATA(self._stamps)

    cdef const Past *past(self) noexcept:
        """What a sweep needs of it, as long as its clock stands."""
        self._past = Past(self.stamps(), self.clock, missed, <const void *>self)
        return &self._past

    cdef int prepare(self) except -1:
        """Make room for one step more."""
        if (self._n_runs + 1) * <Py_ssize_t>sizeof(Run) > self._runs.n_bytes:
            self._runs.grow(2 * self._n_runs + 1, sizeof(Run))
        if (self._n_powers + 1) * <Py_ssize_t>sizeof(Linear) > self._powers.n_bytes:
            self._powers.grow(2 * self._n_powers + 1, sizeof(Linear))
        if self._n_runs > 0:
            self._products.grow(4 * (self._few + 2), sizeof(Linear))
        return 0

    cdef void note(self, Linear m) noexcept:
        """One step more, which did this."""
        cdef const Run *run = <const Run *>self._runs.at + self._n_runs - 1
        cdef Linear *powers = <Linear *>self._powers.at
        cdef uint32_t k
        if self._n_runs == 0 or memcmp(&powers[run.first_power], &m, sizeof(Linear)) != 0:
            if self._n_runs > 0:
                self._close(self._n_runs - 1, self.clock)
            self._begin_run(m)
            self.clock += 1
            return
        self.clock += 1
        k = self.clock - run.begin
        if k & (k - 1) == 0:
            square(&self._high, &self._low)
            powers[self._n_powers] = self._high
            self._n_powers += 1

    cdef void _begin_run(self, Linear m) noexcept:
        cdef Run *run = <Run *>self._runs.at + self._n_runs
        run.begin, run.first_power = self.clock, self._n_powers
        (<Linear *>self._powers.at)[self._n_powers] = self._high = m
        self._low = Linear(0, 0, 0, 0)
        self._n_runs += 1
        self._n_powers += 1
        if self._n_runs == self._few + 1:
            self._hand, self._done = 0, self._n_runs - 1

    cdef void _close(self, Py_ssize_t run, uint32_t end) noexcept:
        """Multiply a run that has ended into the products."""
        cdef Py_ssize_t i = run, level = 0
        self._at(0, run)[0] = self._power(run, end - (<Run *>self._runs.at)[run].begin)
        while i % 2 == 1:
            self._at(level + 1, i // 2)[0] = product(self._at(level, i), self._at(level, i - 1))
            i //= 2
            level += 1

    cdef Linear *_at(self, Py_ssize_t level, Py_ssize_t i) noexcept nogil:
        """The product of the runs [i * 2**level, (i + 1) * 2**level)."""
        cdef Py_ssize_t all = 4 * (self._few + 2)
        return <Linear *>self._products.at + all - (all >> level) + i

    cdef Linear _product(self, Py_ssize_t begin, Py_ssize_t end) noexcept nogil:
        cdef Linear m = IDENTITY
        cdef Py_ssize_t level
        while begin < end:
            level = 0
            while begin >> level & 1 == 0 and begin + (<Py_ssize_t>2 << level) <= end:
                level += 1
            m = product(self._at(level, begin >> level), &m)
            begin += <Py_ssize_t>1 << level
        return m

    cdef Linear _power(self, Py_ssize_t run, uint32_t k) noexcept nogil:
        """k steps of a run."""
        cdef const Linear *power = <const Linear *>self._powers.at
        cdef Linear m = IDENTITY
        power += (<const Run *>self._runs.at)[run].first_power
        while k:
            if k & 1:
                m = product(power, &m)
            power += 1
            k >>= 1
        return m

    cdef Linear since(self, uint32_t stamp) noexcept nogil:
        """All steps after the one that a row was last up to date at."""
        cdef const Run *runs = <const Run *>self._runs.at
        cdef Py_ssize_t low = 0, last = self._n_runs - 1, high = last, middle
        cdef Linear m, some
        if stamp == self.clock:
            return IDENTITY
        if runs[last].begin <= stamp:
            m = self._power(last, self.clock - stamp)
        else:
            while low < high:               # the last run that begins at or before the stamp
                middle = (low + high + 1) // 2
                if runs[middle].begin <= stamp:
                    low = middle
                else:
                    high = middle - 1
            m = self._power(low, runs[low + 1].begin - stamp)
            some = self._product(low + 1, last)
            m = product(&some, &m)
            some = self._power(last, self.clock - runs[last].begin)
            m = product(&some, &m)
        return m

    cdef void forget(self) noexcept:
        """All rows are up to date."""
        memset(self.stamps(), 0, self.n_rows * sizeof(uint32_t))
        self.clock = 0
        self._n_runs = self._n_powers = 0

    cdef void take_turns(self, const Tensor *t) noexcept:
        """Catch up some rows of the parameter, where there are many runs."""
        cdef Py_ssize_t end
        if self._n_runs <= self._few:
            return
        end = min(self.n_rows, self._hand + (self.n_rows + self._few - 1) // self._few)
        catch_up_between(t, self, self._hand, end)
        self._hand = end
        if end == self.n_rows:
            self._drop()

    cdef void _drop(self) noexcept:
        """Drop the runs that no row needs, all having had their turn."""
        cdef Run *runs = <Run *>self._runs.at
        cdef Linear *powers = <Linear *>self._powers.at
        cdef Py_ssize_t i, first = runs[self._done].first_power
        self._n_runs -= self._done
        self._n_powers -= first
        memmove(runs, runs + self._done, self._n_runs * sizeof(Run))
        memmove(powers, powers + first, self._n_powers * sizeof(Linear))
        for i in range(self._n_runs):
            runs[i].first_power -= first
        for i in range(self._n_runs - 1):
            self._close(i, runs[i + 1].begin)
        self._hand, self._done = 0, self._n_runs - 1


cdef struct Batch:
    Tensor[BATCH] tensors
    Linear[BATCH] behind
    Answer[N_ANSWERS] answers
    Py_ssize_t n
    Py_ssize_t n_elements


cdef void begin_batches(Batch *batch) noexcept:
    batch.n = batch.n_elements = 0
    memset(batch.answers, 0, sizeof(batch.answers))


cdef void sweep_batch(Batch *batch) noexcept:
    if batch.n > 0:
        sweep_all(
            CATCH_UP, batch.tensors, batch.n, batch.n_elements,
            batch.n_elements + ROW_COST * batch.n,
        )
    batch.n = batch.n_elements = 0


cdef void add_to_batch(
    Batch *batch, const Tensor *t, History history, Py_ssize_t begin, Py_ssize_t end
) noexcept:
    """Bring rows [begin, end), all of one age, up to date; note that they are."""
    cdef uint32_t *stamps = history.stamps()
    cdef const Linear *behind = behind_by(history.past(), stamps[begin], batch.answers)
    cdef Py_ssize_t k, n = batch.n
    for k in range(begin, end):
        stamps[k] = history.clock
    if behind != NULL:
        batch.behind[n] = behind[0]
        k = t.size // history.n_rows
        batch.tensors[n] = t[0]
        point_at(&batch.tensors[n], t, begin * k)
        batch.tensors[n].size = (end - begin) * k
        batch.tensors[n].grads = &t.param       # some, or it would take no part
        batch.tensors[n].behind = &batch.behind[n]
        batch.n_elements += batch.tensors[n].size
        batch.n += 1
        if batch.n == BATCH:
            sweep_batch(batch)


cdef void catch_up_between(
    const Tensor *t, History history, Py_ssize_t begin, Py_ssize_t end
) noexcept:
    """Bring rows [begin, end) of a parameter up to date, neighbours of one age together."""
    cdef const uint32_t *stamps = history.stamps()
    cdef Batch batch
    cdef Py_ssize_t first
    begin_batches(&batch)
    while begin < end:
        first = begin
        while begin < end and stamps[begin] == stamps[first]:
            begin += 1
        add_to_batch(&batch, t, history, first, begin)
    sweep_batch(&batch)


cdef ndarray rows_in(object rows, Py_ssize_t n_rows):
    """Return numbers of rows as int64, checked."""
    rows = np.asarray(rows)
    if rows.size == 0:
        return np.empty(0, np.int64)
    if rows.dtype.kind not in "iu":
        raise TypeError(f"rows must be integers, got {rows.dtype}")
    rows = rows.ravel()
    bad = np.flatnonzero((rows < 0) | (rows >= n_rows))
    if bad.size:
        raise IndexError(
            f"rows must be in [0, {n_rows}), the parameter's, got {rows[bad[0]]} at position "
            f"{bad[0]}"
        )
    return np.ascontiguousarray(rows, np.int64)


cdef void catch_up_rows(const Tensor *t, History history, ndarray rows) noexcept:
    """Bring some rows of a parameter up to date."""
    cdef const int64_t *row = <const int64_t *>PyArray_DATA(rows)
    cdef Batch batch
    cdef Py_ssize_t k
    begin_batches(&batch)
    for k in range(PyArray_DIM(rows, 0)):
        add_to_batch(&batch, t, history, row[k], row[k] + 1)
    sweep_batch(&batch)


def _restored(n_rows, clock, ndarray stamps, list runs, bytes powers, bytes wide, hand, done):
    """Return the history that `History.__reduce__` has taken apart."""
    cdef History history = History(n_rows)
    cdef Py_ssize_t i
    cdef Run *run
    history._runs.grow(len(runs), sizeof(Run))
    history._powers.grow(len(powers) // sizeof(Linear), sizeof(Linear))
    history._n_runs = 1
    history.prepare()
    memcpy(history.stamps(), PyArray_DATA(stamps), history.n_rows * sizeof(uint32_t))
    memcpy(history._powers.at, <const char *>powers, len(powers))
    history._high = (<const Linear *><const char *>wide)[0]
    history._low = (<const Linear *><const char *>wide)[1]
    run = <Run *>history._runs.at
    for i in range(len(runs)):
        run[i].begin, run[i].first_power = runs[i]
    for i in range(len(runs) - 1):
        history._close(i, run[i + 1].begin)
    history._n_runs, history._n_powers = len(runs), len(powers) // sizeof(Linear)
    history.clock, history._hand, history._done = clock, hand, done
    return history


# The tensors of a step

@cython.final
cdef class RowTensors:
    """The tensors of a step of which some are swept over by rows."""

    def __cinit__(self):
        self._tensors, self._owners, self._rows = Buffer(), Buffer(), Buffer()
        self._grads, self._weights, self._numbers = Buffer(), Buffer(), Buffer()
        self._partials, self._counts, self._slots = Buffer(), Buffer(), Buffer()

    cdef int clear(
        self, Py_ssize_t n_tensors, Py_ssize_t n_positions, Py_ssize_t n_chunks
    ) except -1:
        """Begin anew, with room for so many."""
        self._tensors.grow(n_tensors, sizeof(Tensor))
        self._owners.grow(n_tensors, sizeof(Py_ssize_t))
        self._rows.grow(n_positions, sizeof(Row))
        self._grads.grow(n_positions, sizeof(Stream))
        self._weights.grow(n_positions, sizeof(double))
        self._numbers.grow(n_positions, sizeof(Py_ssize_t))
        self._counts.grow(n_positions, sizeof(Py_ssize_t))
        self._slots.grow(4 * n_positions, sizeof(Py_ssize_t))
        self._partials.grow(n_chunks, sizeof(Partial))
        self.at = <Tensor *>self._tensors.at
        self.n = self.n_elements = self.work = self._n_rows = self._n_grads = self._n_partials = 0
        self._touched = []
        return 0

    cdef Tensor *add_whole(self, const Tensor *t, Py_ssize_t i) noexcept:
        """Add parameter i as it is."""
        cdef Tensor *added = &self.at[self.n]
        added[0] = t[0]
        (<Py_ssize_t *>self._owners.at)[self.n] = i
        self.n += 1
        if t.grads[0].data != NULL:
            self.n_elements += t.size
            self.work += t.size
        return added

    cdef void begin_rows(self, Py_ssize_t n_positions, Py_ssize_t width) noexcept:
        """Begin with the rows of a parameter for which gradients come in so many positions."""
        self._mask = 1
        while self._mask < 2 * n_positions:
            self._mask *= 2
        self._mask -= 1
        memset(self._slots.at, 0, (self._mask + 1) * sizeof(Py_ssize_t))
        self._first, self._position, self._width = self._n_rows, 0, width

    cdef int take_rows(self, Rows rows, Py_ssize_t n_rows, Label label) except -1:
        """Number the rows of one set of gradients, in the order in which they first come."""
        cdef const void *data = PyArray_DATA(rows.indices)
        cdef bint is_long = PyArray_ITEMSIZE(rows.indices) == sizeof(int64_t)
        cdef Py_ssize_t *slots = <Py_ssize_t *>self._slots.at
        cdef Py_ssize_t *numbers = <Py_ssize_t *>self._numbers.at + self._position
        cdef Row *taken = <Row *>self._rows.at + self._first
        cdef Py_ssize_t j, k, slot, n = self._n_rows - self._first, mask = self._mask
        cdef int64_t r
        for j in range(PyArray_DIM(rows.indices, 0)):
            r = (<const int64_t *>data)[j] if is_long else (<const int32_t *>data)[j]
            if not 0 <= r < n_rows:
                raise IndexError(
                    f"{spell(label)} must have indices in [0, {n_rows}), the parameter's rows, got "
                    f"{r} at position {j}"
                )
            slot = (<uint64_t>r * <uint64_t>0x9E3779B97F4A7C15 >> 20) & mask
            while slots[slot] != 0 and taken[slots[slot] - 1].number != r:
                slot = (slot + 1) & mask
            k = slots[slot] - 1
            if k < 0:
                k = n
                n += 1
                slots[slot] = n
                taken[k].number = r
                taken[k].n_grads = 0
            taken[k].n_grads += 1
            numbers[j] = k
        self._position += PyArray_DIM(rows.indices, 0)
        self._n_rows = self._first + n
        return 0

    cdef void end_rows(
        self, const Tensor *t, Py_ssize_t i, list sets, Py_ssize_t j, History history
    ) noexcept:
        """Add parameter i by its rows, gradients for which are sets[…][j]."""
        cdef const Py_ssize_t *numbers = <const Py_ssize_t *>self._numbers.at
        cdef Py_ssize_t *ends = <Py_ssize_t *>self._counts.at
        cdef Row *taken = <Row *>self._rows.at + self._first
        cdef Stream *grads = <Stream *>self._grads.at
        cdef double *weights = <double *>self._weights.at
        cdef Py_ssize_t k, s, at, n = self._n_rows - self._first, n_grads = self._n_grads
        cdef Tensor *added
        cdef Rows rows
        cdef Stream values
        for k in range(n):
            taken[k].grads = &grads[n_grads]
            taken[k].weights = &weights[n_grads] if t.weights != NULL else NULL
            ends[k] = n_grads
            n_grads += taken[k].n_grads
        self._n_grads = n_grads
        for s in range(len(sets)):
            rows = <Rows>(<tuple>sets[s])[j]
            values = stream_of(rows.values)
            for k in range(PyArray_DIM(rows.indices, 0)):
                at = ends[numbers[k]]
                ends[numbers[k]] += 1
                grads[at] = values
                values = stream_from(&values, self._width)
                if t.weights != NULL:
                    weights[at] = t.weights[s]
            numbers += PyArray_DIM(rows.indices, 0)
        self.n_elements += n * self._width - t.size
        self.work += n * (self._width + ROW_COST) - t.size
        added = self.add_whole(t, i)
        added.rows, added.width, added.size = taken, self._width, n * self._width
        added.partials = <Partial *>self._partials.at + self._n_partials
        self._n_partials += n_partials(added)
        if history is not None:
            added.past = history.past()
            self._touched.append((history, i))

    cdef void key_noise(self, const Tensor *tensors) noexcept:
        """Take over the keys of this step's noise."""
        cdef Py_ssize_t k
        for k in range(self.n):
            self.at[k].key = tensors[(<const Py_ssize_t *>self._owners.at)[k]].key

    cdef void note(self, const Tensor *tensors) noexcept:
        """Note that the step was taken."""
        cdef Py_ssize_t i
        cdef History history
        for history, i in self._touched:
            history.note(matrix_of(&tensors[i]))
            if history.clock == MOST_STEPS:
                catch_up_between(&tensors[i], history, 0, history.n_rows)
                history.forget()
            else:
                history.take_turns(&tensors[i])
        self._touched = None
