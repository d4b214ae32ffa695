"""The table of checked tensors that a plan steps."""
from numpy cimport ndarray

from optcore.arrays cimport Label
from optcore.groups cimport Count, Groups
from optcore.memory cimport Buffer, Span, Spans
from optcore.rows cimport History, Rows, RowTensors
from optcore.rules cimport Rule
from optcore.storage cimport Storage, Stream
from optcore.structure cimport Nest, Roots, Watch
from optcore.sweep cimport Tensor
from libc.string cimport memset

cdef tuple GRADS                # how errors name gradients that come in one set

cdef struct Slot:               # what the table alone knows of a tensor
    Py_ssize_t group
    bint first_step             # its states have not started
    bint by_rows                # its gradient is Rows
    const void *clear           # the gradient last seen to overlap nothing that is written
    Stream bound                # its bound gradient; no data: none, or one that lies otherwise

cdef struct Step:               # of a plan; one that can no longer fail
    double scale
    double ema_decay
    Py_ssize_t n_elements
    bint zeroing
    bint outer                  # from others' parameters
    bint writes_back            # into those
    double share                # of each in their mean, where they have no weights
    bint has_gradient           # not None for every parameter
    bint starts                 # a first step is among it
    bint lacks_states           # a rule has states that are not there yet
    bint scattered              # a gradient lies otherwise than its parameter
    bint has_rows               # a gradient is Rows
    const double *weights       # of several gradients; NULL: none
    const Py_ssize_t *part      # the n_part parameters that gradients come for; NULL: all
    Py_ssize_t n_part


cdef inline Step step_over(bint zeroing) noexcept:
    """A step over all parameters, gradients that are gradients, without weights."""
    cdef Step step
    memset(&step, 0, sizeof(step))
    step.scale = step.share = 1
    step.zeroing = zeroing
    return step


cdef inline bint writes_gradients(const Step *step) noexcept:
    return step.zeroing or step.writes_back


cdef inline Py_ssize_t nth(const Step *step, Py_ssize_t j) noexcept:
    """The index of the parameter for which gradients come in place j."""
    return j if step.part == NULL else step.part[j]


cdef class Table:
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
    cdef Rule _family           # of the rules that options choose from
    cdef Rule _rule_given       # of every group; negative: the one that its options choose
    cdef Buffer _counted        # scalars of each parameter, where they depend on its count of steps
    cdef readonly ndarray _count_array   # a row of numbers for each parameter, Count to C; or None
    cdef readonly tuple _count_names
    cdef bint _single, _any_float32
    cdef bint _any_draws        # noise for rounding
    cdef Nest _nest             # how gradients come; None: as one array
    cdef Roots _param_roots, _bound_roots, _velocity_roots
    cdef object _group_list     # of the dictionaries that the groups were made from, and
    cdef Watch _group_watch     # the watch over it and them
    cdef tuple _params, _keys, _bound
    cdef tuple _on_loan         # velocities of the caller's, each an array or None
    cdef set _borrowed          # states, by their places, that are others' arrays
    cdef Py_ssize_t _velocity   # their place among the states; -1: the rule has none
    cdef bint _bound_scattered
    cdef readonly tuple _state_names
    cdef readonly tuple _first_states   # of them, those of the family's plainest rule
    cdef list _states           # of each name: one array a parameter, or None before they start
    cdef Buffer _kept           # the same to C, tensor by tensor; NULL where there is none
    cdef Buffer _places         # of each rule's states, and then of the others, among the names
    cdef tuple _averages
    cdef tuple _rests           # of half parameters: low halves or float32 copies; else None
    cdef dict _buffers          # by set and parameter: where scattered gradients are put together
    cdef list _histories        # of each parameter that was stepped by rows, else None
    cdef bint _any_history
    cdef RowTensors _by_row     # the tensors of a step that has Rows
    cdef list _to_return        # scattered gradients of this step and the buffers they become

    # Laying it
    cdef list _lay(self, list groups, Nest nest, Rule family, Rule rule)
    cdef Label _label(self, const char *what, Py_ssize_t i)
    cdef Label _owner(self, Py_ssize_t owner)
    cdef int _list_written(self) except -1
    cdef int _lend(self, Roots roots, Py_ssize_t first) except -1
    cdef int _start_states(self) except -1
    cdef tuple _allocated(self, Py_ssize_t first)
    cdef Storage _param_storage(self, Py_ssize_t i) noexcept
    cdef Storage _state_storage(self, Py_ssize_t i, Py_ssize_t k) noexcept
    cdef list _state_like(self, Py_ssize_t k, list indices)
    cdef void _follow_groups(self) noexcept
    cdef object _master(self, Py_ssize_t i)
    cdef tuple _from_master(self, Py_ssize_t i, object master, bint writes)
    cdef int _install_rests(self, tuple rests) except -1
    cdef int _start_rests(self) except -1
    cdef int _install_state(self, Py_ssize_t k, tuple arrays) except -1
    cdef int _lay_states(self) except -1
    cdef void _follow_rule(self, Py_ssize_t i) noexcept
    cdef Count *_counts(self) noexcept
    cdef void _count_step(self, const Step *step) noexcept
    cdef int _install_averages(self, tuple averages, Py_ssize_t first) except -1
    cdef int _become(self, Table grown) except -1

    cdef int _adopt_groups(self, tuple checked) except -1

    # Looking again at what the user keeps
    cdef int _look_again(self) except -1
    cdef int _look_at_params(self) except -1
    cdef int _look_at_velocities(self) except -1
    cdef int _refuse_replaced(
        self, tuple now, tuple taken, const char *what, str cure
    ) except -1
    cdef int _look_at_bound(self) except -1
    cdef int _check_places(self) except -1
    cdef int _check_kept(self, Py_ssize_t i) except -1
    cdef int _refuse_moved(
        self, tuple arrays, Py_ssize_t i, const void *data, const char *what
    ) except -1

    # Taking gradients
    cdef tuple _listed(self, object given, Nest nest, str what)
    cdef int _ready(self, list sets, tuple names, Step *step, bint gathers=*) except -1
    cdef Py_ssize_t _n_in(self, const Step *step) noexcept
    cdef int _view(self, list sets, tuple names, const Step *step) except -1
    cdef int _take(self, list sets, tuple names, Step *step) except -1
    cdef int _take_one(
        self, Py_ssize_t i, Py_ssize_t k, object gradient, tuple names, Step *step, Stream *stream
    ) except -1
    cdef int _take_rows(
        self, Py_ssize_t i, Py_ssize_t k, Rows rows, tuple names, Step *step, Stream *stream
    ) except -1
    cdef int _check_rows(self, Py_ssize_t i, History history) except -1
    cdef int _refuse_rows(self, const Step *step, str what) except -1
    cdef int _lay_rows(self, list sets, tuple names, Step *step) except -1
    cdef Py_ssize_t _width_of(self, Py_ssize_t i) noexcept
    cdef bint _skips_rows(self, Py_ssize_t i) noexcept
    cdef void _catch_up(self, Py_ssize_t i) noexcept
    cdef void _catch_up_stepped(self, const Step *step) noexcept
    cdef int _gather(self, list sets, tuple names, const Step *step) except -1
    cdef Py_ssize_t _scattered_one(self) except -1
    cdef int _return_scattered(self) except -1
    cdef int _refuse_shared(self, tuple names, const Step *step) except -1
    cdef int _refuse_interwoven(self, list sets, tuple names, const Step *step) except -1
    cdef int _refuse_pair(self, tuple names, Py_ssize_t first, Py_ssize_t second) except -1
    cdef void _add_other(self, const Stream *stream, Py_ssize_t i, Py_ssize_t owner) noexcept
    cdef Span _span_like(self, const Stream *stream, Py_ssize_t i, Py_ssize_t owner) noexcept
    cdef int _bind(self, Roots roots) except -1


cdef Rule rule_named(str name) except -2
cdef tuple names_of(Rule rule)
cdef object converted(object value, ndarray like)
cdef int assign(ndarray to, object value) except -1
