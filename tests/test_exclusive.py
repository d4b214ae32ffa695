"""One call at a time: what comes in the middle of another call is refused, or seen by the next.

Two ways lead into the middle: code of the user's that a call runs (a schedule, a number's
`__float__`, what lends a gradient), and another thread while a sweep lets the GIL go.
"""
from __future__ import annotations

import itertools
import sys
import threading
import time
from collections.abc import Mapping
from fractions import Fraction

import numpy as np
import pytest
from test_process import succeeds

import optcore
from optcore import checkpoint
from reference import same_bits

N = 24
NAMES = ("a", "b")
REFUSAL = "one step at a time"
GROWN = "another thread has added a group"


# What runs code of the user's in the middle of a call

class Trap:
    """Runs what it is armed with, once: a call that it makes may come back to it."""

    call = None

    def spring(self):
        call, self.call = self.call, None
        if call is not None:
            call()


class Schedule:
    def __init__(self, value, trap):
        self.value, self.trap = value, trap

    def __call__(self, step):
        self.trap.spring()
        return self.value


class Number:
    """Read anew at each step, for it may change in its place."""

    def __init__(self, value, trap):
        self.value, self.trap = value, trap

    def __float__(self):
        self.trap.spring()
        return self.value


class Exact(Fraction):
    """Read when it comes into a group, for a number of Python's stays what it is."""

    trap = Trap()

    def __float__(self):
        self.trap.spring()
        return super().__float__()


class Items(Mapping):
    def __init__(self, items, trap):
        self.items_, self.trap = dict(items), trap

    def __getitem__(self, key):
        self.trap.spring()
        return self.items_[key]

    def __iter__(self):
        return iter(self.items_)

    def __len__(self):
        return len(self.items_)


class Lender:
    def __init__(self, values, trap):
        self.values, self.trap = values, trap

    def __dlpack__(self, **keywords):
        self.trap.spring()
        return self.values.__dlpack__(**keywords)

    def __dlpack_device__(self):
        return (1, 0)


def produce(grads, trap):
    trap.spring()
    yield from grads


def exact(value, trap):
    number = Exact(value)
    number.trap = trap
    return number


SCHEDULED = {"lr": 0.25, "momentum": 0.5, "dampening": 0.5, "weight_decay": 0.125,
             "clip_value": 4.0, "ema_decay": 0.5}
# Before 2.1 NumPy could not tell that what DLPack lends may be written.
new_numpy = pytest.mark.skipif(
    np.lib.NumpyVersion(np.__version__) < "2.1.0", reason="DLPack is read-only before NumPy 2.1")
PLACES = [*SCHEDULED, "number", "exact", "grad_scale", "generator", "mapping",
          pytest.param("dlpack", marks=new_numpy)]


# Where any error is one of viewing an array, which names it
READ = ("dlpack",)


class Model:
    """Two parameters with bound gradients, and a step that springs the trap at `place`."""

    def __init__(self, place):
        self.place, self.trap = place, Trap()
        self.params = [np.full(N, k, np.float32) for k in (1, 2)]
        self.grads = [np.full(N, k, np.float32) for k in (3, 4)]
        self.bound = [np.full(N, k, np.float32) for k in (5, 6)]
        options = {"lr": 0.25, "momentum": 0.5, "ema_decay": 0.5}
        if place == "ema_decay":        # asked after lr was
            options["lr"] = lambda step: 0.25
        if place in SCHEDULED:
            options[place] = Schedule(SCHEDULED[place], self.trap)
        elif place == "number":
            options["lr"] = Number(0.25, self.trap)
        self.opt = optcore.SGD(self.give(self.params), grads=self.give(self.bound), **options)
        self.step()

    def give(self, arrays):
        return dict(zip(NAMES, arrays, strict=True)) if self.place == "mapping" else list(arrays)

    def step(self):
        grads, more = self.give(self.grads), {}
        if self.place == "exact":
            self.opt.param_groups[0]["lr"] = exact(0.25, self.trap)
        elif self.place == "grad_scale":
            more["grad_scale"] = exact(1, self.trap)
        elif self.place == "generator":
            grads = produce(grads, self.trap)
        elif self.place == "mapping":
            grads = Items(grads, self.trap)
        elif self.place == "dlpack":
            grads[1] = Lender(grads[1], self.trap)
        return self.opt.step(grads, **more)

    def contents(self):
        """Return all that a call may change, as bytes and plain values."""
        assert self.trap.call is None
        opt, state = self.opt, self.opt.state_dict()
        return (
            [a.tobytes() for a in (*self.params, *self.grads, *self.bound)],
            [{key: a.tobytes() if isinstance(a, np.ndarray) else a for key, a in entry.items()}
             for entry in state["state"].values()],
            state["param_groups"], opt.step_count, opt.skipped, opt.grad_norm,
            opt.nonfinite_params, opt.max_norm, opt.skip_nonfinite, opt.track_grad_norm,
        )


def setter(name, value):
    return lambda model, _: setattr(model.opt, name, value)


# Every public call that changes something or reads several things, as one with other arguments
# than the step it is to come into the middle of
CALLS = {
    "step": lambda model, _: model.opt.step(),
    "step_replicas": lambda model, _: model.opt.step_replicas([model.give(model.grads)] * 2),
    "outer_step": lambda model, _: model.opt.outer_step([model.give(model.grads)] * 2),
    "collecting": lambda model, _: model.opt.collecting().__enter__().add(model.give(model.grads)),
    "accumulate": lambda model, _: model.opt.accumulate(model.give(model.grads)),
    "zero_grad": lambda model, _: model.opt.zero_grad(),
    "max_norm": setter("max_norm", 1.0),
    "skip_nonfinite": setter("skip_nonfinite", True),
    "track_grad_norm": setter("track_grad_norm", True),
    "ema_decay": setter("ema_decay", 0.25),
    "state_dict": lambda model, _: model.opt.state_dict(),
    "load_state_dict": lambda model, saved: model.opt.load_state_dict(saved.state),
    "save": lambda model, saved: model.opt.save(saved.path),
    "save_params": lambda model, saved: model.opt.save(saved.path, include_params=True),
    "restore": lambda model, saved: model.opt.restore(saved.path),
}


class Saved:
    """An earlier state of a model, to load from, and the file with it."""

    def __init__(self, model, name, folder):
        self.state = model.opt.state_dict()
        self.path = folder / "a.safetensors"
        if "save" in name or name == "restore":
            model.opt.save(self.path)
            self.content = self.path.read_bytes()

    def is_as_it_was(self):
        if not self.path.exists():
            return True
        return list(self.path.parent.iterdir()) == [self.path] and (
            self.path.read_bytes() == self.content
        )


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", CALLS)
def test_a_call_in_the_middle_of_a_step(name, place, tmp_path):
    """The call is refused; so is the step it came into, which has changed nothing."""
    model, twin = Model(place), Model(place)
    saved = Saved(model, name, tmp_path)
    for each in (model, twin):
        each.step()
    before = model.contents()
    model.trap.call = lambda: CALLS[name](model, saved)
    with pytest.raises((RuntimeError, TypeError), match=REFUSAL) as raised:
        model.step()
    assert RuntimeError in (type(raised.value), type(raised.value.__cause__))
    assert model.contents() == before
    assert saved.is_as_it_was()
    for each in (model, twin):
        each.step()
    assert model.contents() == twin.contents()
    CALLS[name](model, saved)


@pytest.mark.parametrize(
    ("name", "place"),
    [(name, "lr") for name in CALLS]
    + [pytest.param("max_norm", *p.values, marks=p.marks) if hasattr(p, "marks") else
       ("max_norm", p) for p in PLACES[1:]],
)
def test_a_step_whose_schedule_swallows_the_refusal(name, place, tmp_path):
    """The step is applied as if nobody had called."""
    model, twin = Model(place), Model(place)
    saved = Saved(model, name, tmp_path)
    for each in (model, twin):
        each.step()
    refusals = []

    def call():
        with pytest.raises(RuntimeError, match=REFUSAL) as raised:
            CALLS[name](model, saved)
        refusals.append(raised.value)

    model.trap.call = call
    assert model.step()
    assert len(refusals) == 1
    twin.step()
    assert model.contents() == twin.contents()
    assert saved.is_as_it_was()


@pytest.mark.parametrize("place", PLACES)
def test_the_refusal_comes_out_of_the_step_as_it_is(place):
    """A `RuntimeError`, as the docstrings have it, or named as what a lender said."""
    model = Model(place)
    model.trap.call = model.opt.zero_grad
    with pytest.raises(TypeError if place in READ else RuntimeError, match=REFUSAL):
        model.step()


def test_a_setting_does_not_come_between_lr_and_the_sweep():
    """As the groups are read again, a scheduled lr is none until it is asked."""
    x, g = np.ones(N, np.float32), np.ones(N, np.float32)

    def decay(step):
        opt.max_norm = 1e9
        return 0.5

    opt = optcore.SGD([x], lr=lambda step: 0.25, ema_decay=decay)
    with pytest.raises(RuntimeError, match=REFUSAL):
        opt.step([g])
    assert (x == 1).all()
    assert (opt.ema[0] == 1).all()
    assert (opt.step_count, opt.max_norm) == (0, None)
    opt.ema_decay = 0.5
    opt.step([g])
    assert (x == 0.75).all()
    assert (opt.ema[0] == 0.875).all()


@pytest.mark.parametrize("place", PLACES)
def test_single_values_are_there_in_the_middle_of_a_step(place):
    model = Model(place)
    seen = []

    def call():
        opt = model.opt
        seen.append((opt.step_count, opt.skipped, opt.max_norm, opt.skip_nonfinite,
                     opt.track_grad_norm, opt.grad_norm, opt.nonfinite_params))
        assert opt.ema_decay is not None
        assert len(opt.ema) == 2
        assert "2 arrays" in repr(opt)

    model.trap.call = call
    model.step()
    assert seen == [(1, 0, None, False, False, None, [])]


# Every other call that may run code of the user's
ENTRIES = {
    "step_replicas": lambda model: model.opt.step_replicas([produce(model.grads, model.trap)]),
    "outer_step": lambda model: model.opt.outer_step([produce(model.grads, model.trap)]),
    "collecting": lambda model: collect(model),
    "accumulate": lambda model: model.opt.accumulate(produce(model.grads, model.trap)),
    "max_norm": lambda model: setattr(model.opt, "max_norm", exact(1, model.trap)),
    "ema_decay": lambda model: setattr(model.opt, "ema_decay", exact(0.25, model.trap)),
    "state_dict": lambda model: (edit(model), model.opt.state_dict()),
    "skip_nonfinite": lambda model: (edit(model), setattr(model.opt, "skip_nonfinite", True)),
    "track_grad_norm": lambda model: (edit(model), setattr(model.opt, "track_grad_norm", True)),
    "load_state_dict": lambda model: load_edited(model),
    "save": lambda model: (edit(model), save(model)),
}


def collect(model):
    with model.opt.collecting() as mean:
        mean.add(produce(model.grads, model.trap), exact(1, model.trap))


def edit(model):
    model.opt.param_groups[0]["lr"] = exact(0.25, model.trap)


def load_edited(model):
    call, model.trap.call = model.trap.call, None
    state = model.opt.state_dict()
    model.trap.call = call
    state["param_groups"][0]["lr"] = exact(0.25, model.trap)
    model.opt.load_state_dict(state)


def save(model):
    model.opt.save("/there/is/no/such/folder")


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_step_in_the_middle_of_another_call(entry):
    model = Model("grad_scale")
    before = model.contents()
    refusals = []

    def call():
        with pytest.raises(RuntimeError, match=REFUSAL) as raised:
            model.opt.step()
        refusals.append(raised.value)
        raise KeyboardInterrupt

    model.trap.call = call
    with pytest.raises(KeyboardInterrupt):
        ENTRIES[entry](model)
    assert len(refusals) == 1
    assert model.trap.call is None
    model.opt.param_groups[0]["lr"] = 0.25
    after = model.contents()
    assert (after[:2], after[3:]) == (before[:2], before[3:])
    assert model.step()


# Exceptions in the middle

class OwnError(Exception):
    pass


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit, OwnError])
@pytest.mark.parametrize("place", PLACES)
def test_an_exception_in_the_middle_of_a_step(place, error):
    """Nothing has changed, and the optimizer serves the next call."""
    model, twin = Model(place), Model(place)
    before = model.contents()

    def call():
        raise error("enough")

    model.trap.call = call
    # What cannot be read as a number or viewed as an array is a TypeError that names it
    wrapped = error is OwnError and place in READ
    with pytest.raises(TypeError if wrapped else error, match="enough"):
        model.step()
    assert model.contents() == before
    for each in (model, twin):
        each.step()
    assert model.contents() == twin.contents()


def test_an_exception_in_a_thread_leaves_the_optimizer_to_others():
    model = Model("lr")
    errors = []

    def call():
        raise OwnError

    def body():
        try:
            model.step()
        except OwnError as error:
            errors.append(error)

    model.trap.call = call
    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert len(errors) == 1
    assert model.step()


# Edits of the groups in the middle: the step under way keeps the options it read, and the next
# one reads the edited. Only what comes before the groups are read is seen at once.

LATE = ["momentum", "dampening", "weight_decay", "clip_value", "ema_decay", "number", "exact",
        pytest.param("dlpack", marks=new_numpy)]


def edited(model, how):
    """Return what gives the group another lr."""
    def call():
        groups = model.opt.param_groups
        if how == "in place":
            groups[0]["lr"] = 0.5
        elif how == "key by key":       # each edit alone would be seen as one
            del groups[0]["lr"]
            groups[0]["lr"] = 0.5
        else:
            model.opt.param_groups = [{**groups[0], "lr": 0.5}]
    return call


@pytest.mark.parametrize("how", ["in place", "key by key", "new list"])
@pytest.mark.parametrize("place", ["lr", *LATE])
def test_an_edit_in_the_middle_is_of_the_next_step(place, how):
    model, twin = Model(place), Model(place)
    model.trap.call = edited(model, how)
    for each in (model, twin):
        each.step()
    assert model.opt.param_groups[0]["lr"] == 0.5
    for p, q in zip(model.params + model.opt.ema, twin.params + twin.opt.ema, strict=True):
        assert same_bits(p, q)
    edited(twin, how)()
    for each in (model, twin):
        each.opt.step()
    assert model.contents() == twin.contents()


@pytest.mark.parametrize("place", ["grad_scale", "generator", "mapping"])
def test_an_edit_before_the_groups_are_read_is_of_this_step(place):
    model, twin = Model(place), Model(place)
    model.trap.call = edited(model, "in place")
    edited(twin, "in place")()
    for each in (model, twin):
        each.step()
    assert model.contents() == twin.contents()


@pytest.mark.parametrize(
    ("edit", "error", "words"),
    [
        (lambda opt: opt.param_groups[0].update(params=()), ValueError, "params must stay"),
        (lambda opt: opt.param_groups[0].update(params=tuple(opt.param_groups[0]["params"][::-1])),
         ValueError, "params must stay"),
        (lambda opt: opt.param_groups[0].pop("lr"), KeyError, "'lr' is missing"),
        (lambda opt: opt.param_groups.clear(), ValueError, "must stay a list of 1 groups"),
        (lambda opt: setattr(opt, "param_groups", None), ValueError, "must stay a list"),
        (lambda opt: opt.param_groups[0].update(lr=-1.0), ValueError, "lr must be"),
    ],
    ids=["no params", "turned params", "no lr", "no groups", "no list", "negative"],
)
@pytest.mark.parametrize("place", ["lr", *LATE])
def test_a_bad_edit_in_the_middle_is_refused_by_the_next_step(place, edit, error, words):
    model, twin = Model(place), Model(place)
    model.trap.call = lambda: edit(model.opt)
    for each in (model, twin):
        each.step()
    for p, q in zip(model.params, twin.params, strict=True):
        assert same_bits(p, q)
    kept = [p.copy() for p in model.params]
    with pytest.raises(error, match=words):
        model.opt.step()
    assert model.opt.step_count == 2
    for p, q in zip(model.params, kept, strict=True):
        assert same_bits(p, q)


def test_schedules_of_two_groups_that_edit_each_other():
    """Each step takes one set of options: those of the groups as they were when it began."""
    params = [np.full(N, k, np.float32) for k in (1, 2)]
    expected = [p.copy() for p in params]
    g = np.ones(N, np.float32)

    def edits(other):
        def lr(step):
            group = opt.param_groups[other]
            group["weight_decay"] = 2.0 ** -(step + 2)
            return 0.5
        return lr

    opt = optcore.SGD([{"params": [p], "lr": edits(1 - k)} for k, p in enumerate(params)], lr=0.1)
    decay = 0.0
    for k in range(4):
        opt.step([g, g])
        for x in expected:
            x -= np.float32(0.5) * (g + np.float32(decay) * x)
        for p, q in zip(params, expected, strict=True):
            assert same_bits(p, q)
        decay = 2.0 ** -(k + 2)


def test_a_schedule_that_replaces_itself():
    x, g = np.zeros(N, np.float32), np.ones(N, np.float32)

    def first(step):
        opt.param_groups[0]["lr"] = lambda step: 0.25
        return 0.5

    opt = optcore.SGD([x], lr=first)
    opt.step([g])
    assert (x == -0.5).all()
    opt.step([g])
    assert (x == -0.75).all()


# Memory that moves in the middle

RESIZES = """
    import itertools

    class Lender:
        def __init__(self, values, call):
            self.values, self.call = values, call
        def __dlpack__(self, **keywords):
            self.call()
            return self.values.__dlpack__(**keywords)
        def __dlpack_device__(self):
            return (1, 0)

    class Number:
        def __init__(self, value, call):
            self.value, self.call = value, call
        def __float__(self):
            self.call()
            return self.value

    def attempt(place, what, n, m):
        params = [np.full(n, k, np.float32) for k in (1, 2)]
        grads = [np.full(n, k, np.float32) for k in (3, 4)]
        bound = [np.full(n, k, np.float32) for k in (5, 6)]
        lying = []      # where the memory was that the resize let go, if malloc gives it again
        armed = False

        def resize():
            nonlocal armed
            if armed:
                armed = False
                for array in {"param": [params[0]], "param and grad": [params[0], grads[0]],
                              "param beside bound": [params[0]], "grad": [grads[0]],
                              "bound": [bound[0]]}[what]:
                    array.resize(m, refcheck=False)
                lying.extend(np.full(n, 7, np.float32) for _ in range(8))

        def schedule(value):
            return lambda step: (resize(), value)[1]

        def produce():
            yield grads[0]
            resize()
            yield grads[1]

        options = {"lr": 0.5, "momentum": 0.5, "ema_decay": 0.5}
        if place in options:
            options[place] = schedule(0.5)
        elif place == "number":
            options["weight_decay"] = Number(0.5, resize)
        opt = optcore.SGD(params, grads=bound, **options)
        given = {
            "generator": produce(), "dlpack": [grads[0], Lender(grads[1], resize)],
        }.get(place, grads)
        armed = True
        try:
            if "bound" not in what:
                opt.step(given)
            elif given is grads:
                opt.step()
            else:
                opt.accumulate(given)
        except ValueError as error:
            words = "grads[0] has shape" if what == "grad" else "[0] must stay in its place"
            assert words in str(error), error
        else:
            raise AssertionError("not refused")
        assert not armed
        assert all((a == 7).all() for a in lying), "memory that was let go is written"
        for k, a in enumerate(params + grads + bound, 1):
            kept = min(n, a.size)
            assert (a[:kept] == k).all() and not a[kept:].any(), "an array changed"
        assert opt.step_count == 0
        assert all((e == k).all() for k, e in enumerate(opt.ema, 1))
        if what == "grad":
            assert opt.step([np.ones(n, np.float32), grads[1]])
        if what == "bound":
            assert opt.step([grads[0], grads[1]])

    faults = []
    for place, n, larger in itertools.product(PLACES, [24, 3000, 1 << 18], [True, False]):
        m = 4 * n if larger else n // 4
        print("tried last:", place, n, m, flush=True)   # for when it is the end of the process
        try:
            attempt(place, WHAT, n, m)
        except Exception as error:
            faults.append(f"{place} from {n} to {m}: {type(error).__name__}: {error}")
    assert not faults, faults
"""


@pytest.mark.parametrize("what", ["param", "param and grad", "param beside bound", "grad", "bound"])
def test_an_array_resized_in_the_middle_of_a_step(what):
    """The step is refused; nothing of the array is read or written where it was."""
    places = ["lr", "ema_decay", "momentum", "number", "generator", "dlpack"]
    if new_numpy.args[0]:
        places.remove("dlpack")
    succeeds(f"\n    WHAT, PLACES = {what!r}, {places!r}\n{RESIZES}")


@pytest.mark.parametrize("size", [4 * N, N // 4, 1])
@pytest.mark.parametrize("call", ["ema_decay", "load_state_dict"])
def test_a_parameter_resized_in_the_middle_of_another_call(call, size):
    """By a number of a group, as the groups are read: nothing of the call is taken over."""
    x, g = np.ones(N, np.float32), np.ones(N, np.float32)
    opt = optcore.SGD([x], lr=0.25, momentum=0.5)
    opt.step([g])
    before = opt.state_dict()["state"][0]["velocity"]
    trap = Trap()
    trap.call = lambda: x.resize(size, refcheck=False)
    if call == "ema_decay":
        opt.param_groups[0]["lr"] = exact(0.25, trap)
        with pytest.raises(ValueError, match="must stay in its place"):
            opt.ema_decay = 0.5
        assert opt.ema_decay is None
        assert opt.ema is None
    else:
        state = opt.state_dict()
        state["param_groups"][0]["lr"] = exact(0.25, trap)
        state["state"][0]["velocity"][...] = 9
        state["state"][0]["param"] = np.zeros(N, np.float32)
        state["step_count"] = 7
        with pytest.raises(ValueError, match="must stay in its place"):
            opt.load_state_dict(state)
    assert opt.step_count == 1
    assert same_bits(opt.state_dict()["state"][0]["velocity"], before)
    with pytest.raises(ValueError, match="must stay in its place"):
        opt.step([g])


# Threads

LRS = (0.5, 0.25, 0.125)
SECONDS = 0.1


def lr_at(step):
    """Keep the velocity moving, so that no two steps that follow each other have the same."""
    return LRS[step % len(LRS)]


class Reference:
    """Parameter, velocity and average after so many steps with gradients of ones."""

    def __init__(self):
        self.at = [tuple(np.zeros(1, np.float32) for _ in range(3))]

    def __getitem__(self, count):
        half = np.float32(0.5)
        while len(self.at) <= count:
            x, v, e = self.at[-1]
            v = half * v - np.float32(lr_at(len(self.at) - 1)) * np.float32(1)
            x = x + v
            self.at.append((x, v, half * e + half * x))
        return self.at[count]


AFTER = Reference()


class Shared:
    """An optimizer for many threads: all arrays are constant, whatever the step."""

    def __init__(self, n=1 << 17, k=2, **options):
        self.params = [np.zeros(n, np.float32) for _ in range(k)]
        self.grads = [np.ones(n, np.float32) for _ in range(k)]
        self.sums = [np.zeros(n, np.float32) for _ in range(k)]
        self.opt = optcore.SGD(
            [{"params": [param]} for param in self.params], lr=lr_at, momentum=0.5,
            lr_in_velocity=True, ema_decay=0.5, grads=self.sums, **options
        )
        self.opt.step(self.grads)
        self.applied, self.added = [True], []   # lists, for `+=` is no single act of a thread's

    def step(self):
        self.applied.append(self.opt.step(self.grads))

    def step_replicas(self):
        self.applied.append(self.opt.step_replicas([self.grads, self.grads]))

    def accumulate(self):
        self.opt.accumulate(self.grads)
        self.added.append(True)

    def check(self, state=None):
        """Compare with NumPy every array, of a state or as they are now."""
        state = self.opt.state_dict() if state is None else state
        for i, param in enumerate(self.params):
            entry = {"param": param, **state["state"][i]}
            for name, value in zip(("param", "velocity", "ema"), AFTER[state["step_count"]],
                                   strict=True):
                assert (entry[name] == value).all(), (name, state["step_count"])


@pytest.fixture
def eager():
    """Let threads take turns more often than they would."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


def at_once(*bodies, until):
    """Run each in a thread of its own, again and again; return every error but refusals."""
    errors = []
    done = threading.Event()

    def run(body):
        try:
            while not done.is_set():
                try:
                    body()
                except RuntimeError as error:
                    if REFUSAL not in str(error) and GROWN not in str(error):
                        raise
                time.sleep(0)
        except BaseException as error:
            errors.append(error)
            done.set()

    threads = [threading.Thread(target=run, args=[body]) for body in bodies]
    for thread in threads:
        thread.start()
    while not done.is_set() and not until():
        time.sleep(0.001)
    done.set()
    for thread in threads:
        thread.join()
    return errors


def after(limit):
    end = time.monotonic() + limit
    return lambda: time.monotonic() > end


def alternating(opt, name, *values):
    turns = itertools.cycle(values)
    return lambda: setattr(opt, name, next(turns))


def meddlers(shared, folder):
    """Return calls that leave the numbers of a step as they are."""
    opt = shared.opt
    first = opt.state_dict()
    for i, param in enumerate(shared.params):
        first["state"][i]["param"] = param.copy()
    calls = {
        "max_norm": alternating(opt, "max_norm", 1e30, None),
        "skip_nonfinite": alternating(opt, "skip_nonfinite", False, True),
        "track_grad_norm": alternating(opt, "track_grad_norm", False, True),
        "ema_decay": alternating(opt, "ema_decay", 0.5, lambda step: 0.5),
        "accumulate": shared.accumulate,
        "state_dict": lambda: shared.check(strip(opt.state_dict(), shared)),
        "load_state_dict": lambda: opt.load_state_dict(first),
    }
    try:
        import safetensors  # noqa: F401
    except ImportError:
        return calls
    opt.save(folder / "first", include_params=True)

    def save():
        opt.save(folder / "now", include_params=True)
        shared.check(checkpoint.read(folder / "now"))

    return {**calls, "save": save, "restore": lambda: opt.restore(folder / "first")}


def strip(state, shared):
    """Give a state the parameters that it should have had, for it holds none."""
    for i in range(len(shared.params)):
        state["state"][i]["param"] = AFTER[state["step_count"]][0]
    return state


ALL = ["max_norm", "skip_nonfinite", "track_grad_norm", "ema_decay", "accumulate", "state_dict",
       "load_state_dict", "save", "restore"]


@pytest.mark.parametrize(
    ("names", "measured"),
    [([name], True) for name in ALL] + [(ALL[:4], True), (ALL, True), (ALL, False)],
    ids=[*ALL, "settings", "all", "all-unmeasured"],
)
def test_threads_beside_steps(names, measured, tmp_path, eager):
    """Whatever is served, every array is what NumPy has after so many steps."""
    shared = Shared(track_grad_norm=measured, skip_nonfinite=measured)
    calls = meddlers(shared, tmp_path)
    bodies = [calls[name] for name in names if name in calls]
    if not bodies:
        pytest.skip("needs safetensors")
    errors = at_once(
        shared.step, shared.step_replicas, *bodies,
        until=after(SECONDS if len(bodies) == 1 else 4 * SECONDS),
    )
    assert not errors, errors
    assert all(shared.applied)
    shared.check()
    for total in shared.sums:
        assert (total == len(shared.added)).all()
    if not {"load_state_dict", "restore"} & set(names):
        assert shared.opt.step_count == len(shared.applied)
    shared.step()
    shared.check()


def test_accumulation_and_zeroing_in_threads(eager):
    """Bound gradients hold whole sums, whoever was refused."""
    shared = Shared()
    errors = at_once(shared.accumulate, shared.accumulate, shared.opt.zero_grad, shared.step,
                     until=after(SECONDS))
    assert not errors, errors
    for total in shared.sums:
        assert (total == shared.sums[0][0]).all()
    shared.check()


@pytest.mark.parametrize("what", ["state_dict", "save", "save_params"])
def test_a_state_is_of_one_step(what, tmp_path, eager):
    """Parameters, velocity, average and count, while another thread steps."""
    shared = Shared(1 << 15, 32)    # 4 MiB in many copies, each of which lets the GIL go
    path = tmp_path / "now"
    taken = []

    def step():
        shared.step()
        time.sleep(1e-4)            # leave others room

    def take():
        if what == "state_dict":
            state = shared.opt.state_dict()
        else:
            shared.opt.save(path, include_params=what == "save_params")
            state = checkpoint.read(path)
        taken.append(state["step_count"])
        if what != "save_params":
            strip(state, shared)
        shared.check(state)

    limit = after(0.7)
    errors = at_once(step, take, until=lambda: len(taken) >= 200 or (limit() and taken))
    assert not errors, errors
    assert shared.opt.step_count == len(shared.applied)
    shared.check()


def test_a_norm_asked_for_in_the_middle_of_a_step():
    """The room for its partial sums is made before a step that measures, and by it alone."""
    succeeds("""
        REFUSAL = "one step at a time"
        sys.setswitchinterval(1e-6)
        n, refused, done = 1 << 18, [0], False
        opt = None

        def body():
            while not done:
                now = opt
                if now is not None:
                    try:
                        now.track_grad_norm = True
                    except RuntimeError as error:
                        assert REFUSAL in str(error)
                        refused[0] += 1

        grads = [np.ones(n, np.float32) for _ in range(4)]
        thread = threading.Thread(target=body)
        thread.start()
        end = time.monotonic() + 0.5
        try:
            while time.monotonic() < end:
                params = [np.ones(n, np.float32) for _ in range(4)]
                fresh = optcore.SGD(params, lr=lambda step: 0.5)
                fresh.param_groups[0]["momentum"] = 0.5
                opt = fresh
                while True:
                    try:
                        assert fresh.step(grads)
                        break
                    except RuntimeError as error:
                        assert REFUSAL in str(error)
                for param in params:
                    assert (param == 0.5).all()
                opt = None
        finally:
            done = True
            thread.join()
        print(refused[0])
    """)


def test_a_norm_asked_for_while_states_are_allocated():
    """The same, where it is sure to come: whatever runs in the midst of allocating."""
    succeeds("""
        refusals = []

        def meddle(frame, event, _):
            if event == "call" and frame.f_code.co_name == "allocate_like":
                sys.setprofile(None)
                try:
                    opt.track_grad_norm = True
                except RuntimeError as error:
                    refusals.append(str(error))

        x, g = np.ones(1000, np.float32), np.ones(1000, np.float32)
        opt = optcore.SGD([x], lr=0.5)
        opt.param_groups[0]["momentum"] = 0.5
        sys.setprofile(meddle)
        assert opt.step([g])
        sys.setprofile(None)
        assert (x == 0.5).all()
        assert opt.grad_norm is None
        assert len(refusals) == 1 and "one step at a time" in refusals[0], refusals
        opt.track_grad_norm = True
        assert opt.step([g]) and opt.grad_norm > 0
    """)


@pytest.mark.parametrize("option", ["lr", "ema_decay"])
@pytest.mark.parametrize("bound", [True, False])
def test_a_schedule_that_rebinds_what_is_stepped(option, bound):
    """In the middle of a step: a parameter is refused, a bound gradient taken over.

    Gradients that were given are those of the call.
    """
    params, grads = {"w": np.ones(3)}, {"w": np.ones(3)}
    old = params["w"]
    now = None

    def schedule(_):
        if now is not None:
            now[0]["w"] = now[1]
        return 0.5

    opt = optcore.SGD(params, **{"lr": 0.5, option: schedule}, grads=grads if bound else None)
    now = grads, np.full(3, 4.0)
    opt.step(*[grads] * (not bound))
    np.testing.assert_array_equal(old, -1 if bound else 0.5)
    now = params, np.full(3, 9.0)
    with pytest.raises(ValueError, match="is another array than the optimizer was built with"):
        opt.step(*[grads] * (not bound))
    np.testing.assert_array_equal(old, -1 if bound else 0.5)
    np.testing.assert_array_equal(params["w"], 9)
