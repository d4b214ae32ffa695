"""Row-sparse gradients: what users give, the tensors of a step, and what untouched rows miss."""
from libc.stdint cimport int64_t, uint32_t
from numpy cimport ndarray

from optcore.arrays cimport Label
from optcore.memory cimport Buffer
from optcore.storage cimport Stream
from optcore.sweep cimport Linear, Past, Tensor


cdef enum:
    # What it takes to come to a row anywhere in memory, in elements of an array
    ROW_COST = 192

cdef class Rows:
    cdef readonly ndarray indices, values


cdef struct Run:                # of steps that did the same
    uint32_t begin              # steps there had been before
    Py_ssize_t first_power      # of its matrix: where they begin


cdef class History:
    cdef readonly uint32_t clock        # steps since all rows were up to date
    cdef Py_ssize_t n_rows
    cdef Py_ssize_t _n_runs, _n_powers
    cdef Py_ssize_t _few                # runs after which rows are caught up in turn
    cdef Py_ssize_t _hand               # the row whose turn it is
    cdef Py_ssize_t _done               # runs that no row will need once all had their turn
    cdef ndarray _stamps                # of each row: the clock when it was last up to date
    cdef Buffer _runs                   # of Run
    cdef Buffer _powers                 # matrices to the powers 1, 2, 4, …, run by run
    cdef Buffer _products               # of runs, level by level
    cdef Past _past
    cdef Linear _high, _low             # the last power of the last run, to twice the precision
    cdef uint32_t *stamps(self) noexcept
    cdef const Past *past(self) noexcept
    cdef int prepare(self) except -1
    cdef Linear since(self, uint32_t stamp) noexcept nogil
    cdef void note(self, Linear m) noexcept
    cdef void forget(self) noexcept
    cdef void _begin_run(self, Linear m) noexcept
    cdef void _close(self, Py_ssize_t run, uint32_t end) noexcept
    cdef Linear _power(self, Py_ssize_t run, uint32_t k) noexcept nogil
    cdef Linear _product(self, Py_ssize_t begin, Py_ssize_t end) noexcept nogil
    cdef Linear *_at(self, Py_ssize_t level, Py_ssize_t i) noexcept nogil
    cdef void take_turns(self, const Tensor *t) noexcept
    cdef void _drop(self) noexcept


cdef class RowTensors:
    cdef Tensor *at
    cdef readonly Py_ssize_t n, n_elements
    cdef Py_ssize_t work        # what a sweep takes, in elements of whole arrays
    cdef Buffer _tensors, _owners                               # of each parameter
    cdef Buffer _rows, _partials, _counts, _slots               # of each row; hashed by its number
    cdef Buffer _grads, _weights, _numbers                      # of each position
    cdef Py_ssize_t _n_rows, _n_grads, _n_partials
    cdef Py_ssize_t _first, _position, _width, _mask            # of the parameter at hand
    cdef list _touched                  # (history, parameter)
    cdef int clear(
        self, Py_ssize_t n_tensors, Py_ssize_t n_positions, Py_ssize_t n_chunks
    ) except -1
    cdef Tensor *add_whole(self, const Tensor *t, Py_ssize_t i) noexcept
    cdef void begin_rows(self, Py_ssize_t n_positions, Py_ssize_t width) noexcept
    cdef int take_rows(self, Rows rows, Py_ssize_t n_rows, Label label) except -1
    cdef void end_rows(
        self, const Tensor *t, Py_ssize_t i, list sets, Py_ssize_t j, History history
    ) noexcept
    cdef void key_noise(self, const Tensor *tensors) noexcept
    cdef void note(self, const Tensor *tensors) noexcept


cdef object as_gradient(object given, bint written, Label label)
cdef bint is_rows_of(Rows rows, ndarray param) noexcept
cdef Linear matrix_of(const Tensor *t) noexcept
cdef void catch_up_between(
    const Tensor *t, History history, Py_ssize_t begin, Py_ssize_t end
) noexcept
cdef void catch_up_rows(const Tensor *t, History history, ndarray rows) noexcept
cdef ndarray rows_in(object rows, Py_ssize_t n_rows)
