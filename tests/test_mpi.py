"""optcore.mpi on 1 to 4 ranks.

The scenarios are functions of the communicator, run by this file as a program on every rank, all
in one launch for each number of ranks; the tests look up how they went. Gradients are small
multiples of a power of two, whose sums are exact in any order, so that the bits of a step can
be compared with those of one process whatever order MPI adds in.
"""
from __future__ import annotations

import copy
import errno
import faulthandler
import functools
import hashlib
import importlib.util
import itertools
import json
import os
import pickle
import re
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

import numpy as np
import pytest

import optcore
from mpiexec import find_mpiexec, run_ranks
from optcore.arrays import widen
from reference import RULES, rounded, same_bits

RANKS = [1, 2, 3, 4]
SHAPES = [(33, 5), (), (7,), (0,), (300, 3)]
CLASSES = ["DataParallelSGD", "ShardedSGD"]
SCENARIOS = {}


def scenario(function):
    SCENARIOS[function.__name__] = function
    return function


def classes():
    from optcore import mpi

    return [getattr(mpi, name) for name in CLASSES]


def model(seed=0):
    """Parameters of both dtypes and orders, 0-d and empty ones among them."""
    rng = np.random.default_rng(seed)
    params = [np.array(rng.standard_normal(shape), dtype)
              for dtype in (np.float32, np.float64) for shape in SHAPES]
    return [*params, np.asfortranarray(rng.standard_normal((4, 6)))]


def gradients(step, rank, exact=True):
    rng = np.random.default_rng((step, rank))
    made = model()
    for g in made:
        g[...] = rng.integers(-64, 65, g.shape) / 64 if exact else rng.standard_normal(g.shape)
    return made


def copies(arrays):
    return [a.copy(order="K") for a in arrays]


def digest(arrays):
    total = hashlib.sha256()
    for a in arrays:
        total.update(np.ascontiguousarray(a).tobytes())
    return total.hexdigest()


def assert_ranks_agree(comm, arrays):
    assert len(set(comm.allgather(digest(arrays)))) == 1, "ranks differ"


def assert_same(arrays, others):
    for a, b in zip(arrays, others, strict=True):
        assert same_bits(a, b)


def assert_all_raise(comm, error, words, call, *arguments, **options):
    """The call raises on every rank; return this rank's message."""
    try:
        call(*arguments, **options)
    except error as raised:
        message = str(raised)
    else:
        message = ""
    messages = comm.allgather(message)
    assert all(words in each for each in messages), messages
    return message


def grouped(params, **options):
    """Two groups with names, whose options differ."""
    half = len(params) // 2
    names = [f"p{i}" for i in range(len(params))]
    return [
        {"params": dict(zip(names[:half], params[:half], strict=True)), **options},
        {"params": dict(zip(names[half:], params[half:], strict=True)), **options,
         "weight_decay": 0.125, "maximize": True},
    ]


def named(arrays):
    return {f"p{i}": a for i, a in enumerate(arrays)}


# Of each adaptive optimizer the rule with the most states
OF_EACH_KIND = ["adagrad", "rmsprop_centered_momentum", "amsgrad", "adamw"]
OPTION_SETS = [
    {},
    {"max_norm": 0.5, "track_grad_norm": True},
    {"clip_value": 0.25, "skip_nonfinite": True, "dampen_first": True, "flush_subnormals": True},
    {"ema_decay": 0.75, "weight_decay": 0.1, "decoupled_weight_decay": True},
]


@scenario
def same_bits_as_one_process(comm):
    """Every rule, convention and option; groups, names, late first steps."""
    named_for = [rule for rule in RULES if not rule.is_adaptive or rule.id in OF_EACH_KIND]
    for cls, rule, options in itertools.product(classes(), named_for, OPTION_SETS):
        if rule.is_adaptive and options in OPTION_SETS[1:3]:
            continue
        options = {**options, "lr": 0.1, "momentum": 0.9 if rule.has_momentum else 0.0,
                   "dampening": 0.25 if rule.dampens else 0.0}
        ours, theirs = model(), model()
        base = getattr(optcore.mpi, cls.__name__.replace("SGD", rule.kind))
        opt = rule.optimizer(grouped(ours), comm, base=base, **options)
        one = rule.optimizer(grouped(theirs), **options)
        for k in range(3):
            sets = [named(gradients(k, rank)) for rank in range(comm.size)]
            for grads in sets:
                grads[f"p{k}"] = None
            mine = sets[comm.rank]
            kept = copy.deepcopy(sets)
            assert opt.step(mine, grad_scale=0.5, zero_grad=True)
            assert not any(g.any() for g in mine.values() if g is not None)
            one.step_replicas(kept, grad_scale=0.5)
            assert opt.grad_norm == one.grad_norm
            assert_ranks_agree(comm, ours)
            assert_same(ours, theirs)
        if "ema_decay" in options:
            assert_same(opt.ema.values(), one.ema.values())
        state, other = opt.state_dict(), one.state_dict()
        for a, b in zip(state.pop("state").values(), other.pop("state").values(), strict=True):
            for key in a.keys() | b.keys():
                assert (a[key] is None) == (b[key] is None)
                assert a[key] is None or same_bits(a[key], b[key])
        assert state == other


def halves(name, seed=0):
    """Parameters of a type, also in Fortran order, most of which shards cut."""
    rng = np.random.default_rng(seed)
    shapes = [(33, 5), (), (0,), (300, 3), (2500,), (40, 50)]
    params = [np.array(rounded(np.float32(rng.standard_normal(shape)), name)) for shape in shapes]
    return [*params[:-1], params[-1].copy(order="F")]


def half_gradients(step, rank):
    """Of several types; sums of them are exact."""
    rng = np.random.default_rng((step, rank))
    return [np.array(rounded(rng.integers(-64, 65, p.shape).astype(np.float32) / 64,
                    ["float32", "bfloat16", "float16"][(step + rank + i) % 3]))
            for i, p in enumerate(halves("float32"))]


HALF_OPTIONS = [
    ("bfloat16", {"dampening": 0.25}), ("float16", {"velocity_dtype": "bfloat16"}),
    ("bfloat16", {"master": None, "velocity_dtype": "bfloat16", "seed": 7, "max_norm": 0.5}),
    ("float16", {"master": None, "nesterov": True, "weight_decay": 0.1}),
    ("float32", {"velocity_dtype": "bfloat16"}),
]


def half_optimizer(base, params, *comm, **options):
    return base(named(params), *comm, **{"lr": 0.1, "momentum": 0.9, "ema_decay": 0.75,
                                         "skip_nonfinite": True, **options})


def assert_same_states(opt, one):
    state, other = opt.state_dict(), one.state_dict()
    for a, b in zip(state.pop("state").values(), other.pop("state").values(), strict=True):
        assert a.keys() == b.keys()
        for key, value in a.items():
            assert value is b[key] or same_bits(value, b[key]), key     # None or an array
    assert state == other


@scenario
def half_types_have_the_bits_of_one_process(comm):
    """Every master, rounding and velocity: noise is that of the whole parameter."""
    if comm.size not in (2, 3):     # one sends nothing, three cut as four do
        return
    for cls, (name, options) in itertools.product(classes(), HALF_OPTIONS):
        ours, theirs = halves(name, seed=comm.rank), halves(name)
        opt = half_optimizer(cls, ours, comm, **options)
        one = half_optimizer(optcore.SGD, theirs, **options)
        for k in range(3):
            sets = [half_gradients(k, rank) for rank in range(comm.size)]
            if k == 1:
                sets[-1][5][0, 0] = 0x7FC0 if sets[-1][5].dtype == np.uint16 else np.nan
            assert one.step_replicas([named(g) for g in copy.deepcopy(sets)]) is (k != 1)
            mine = sets[comm.rank]
            assert opt.step(named(mine), zero_grad=True) is (k != 1)
            assert not any(g.any() for g in mine)
            assert_same(ours, theirs)
        assert_same(opt.ema.values(), one.ema.values())
        assert_same_states(opt, one)


@scenario
def half_types_are_saved_and_loaded(comm):
    """Between the classes, and from float32 and back, whatever is kept of a parameter."""
    folder = Path(comm.bcast(os.environ["OPTCORE_TEST_FOLDER"]))
    plain = optcore.SGD

    def grads(k):
        return named(half_gradients(k, 0))

    def build(base, params, **options):
        return half_optimizer(base, params, *([] if base is plain else [comm]), **options)

    if comm.size != 3:
        return
    for cls, (name, options) in itertools.product(classes(), HALF_OPTIONS[1:3]):
        path = folder / "half"
        for saver, loader in [(cls, plain), (plain, cls)]:
            opt = build(saver, halves(name), **options)
            for k in range(2):
                opt.step(grads(k))
            comm.Barrier()
            if saver is not plain or comm.rank == 0:
                opt.save(path, include_params=True)
            comm.Barrier()
            ours = named(halves(name, seed=1))
            again = loader.load(path, ours, **({} if loader is plain else {"comm": comm}))
            assert_same_states(again, opt)
            loaded = build(loader, copies(opt._whole_params), **options)
            loaded.load_state_dict(opt.state_dict())
            assert_same_states(loaded, opt)
            again.step(grads(2))
            opt.step(grads(2))
            assert_same(ours.values(), opt._whole_params)
    for cls, (name, master) in itertools.product(
        classes(), [("bfloat16", "split"), ("bfloat16", "float32"), ("float16", "float32")]
    ):
        wide = half_optimizer(plain, halves("float32"))
        wide.step(grads(0))
        ours = halves(name, seed=1)
        opt = half_optimizer(cls, ours, comm, master=master)
        opt.load_state_dict(wide._contents(True))
        assert_ranks_agree(comm, ours)
        state = opt._contents(True)
        for entry, p in zip(state["state"].values(), wide.param_groups[0]["params"], strict=True):
            assert same_bits(entry["master"], p)
        other = [np.zeros_like(p) for p in halves("float32")]
        back = half_optimizer(plain, other)
        back.load_state_dict(state)
        assert_same(other, wide.param_groups[0]["params"])


@scenario
def any_gradients_are_close_and_alike(comm):
    for cls in classes():
        ours, theirs = model(), model()
        opt = cls(ours, comm, lr=0.1, momentum=0.9, nesterov=True, max_norm=1.0)
        one = optcore.SGD(theirs, lr=0.1, momentum=0.9, nesterov=True, max_norm=1.0)
        for k in range(5):
            opt.step(gradients(k, comm.rank, exact=False))
            one.step_replicas([gradients(k, rank, exact=False) for rank in range(comm.size)])
            assert_ranks_agree(comm, [*ours, np.float64(opt.grad_norm)])
            if comm.size <= 2 and cls.__name__ == "DataParallelSGD":
                assert_same(ours, theirs)
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@scenario
def structures(comm):
    x = np.arange(100, dtype=np.float32)
    for cls in classes():
        single, mapped = x.copy(), {"w": x.copy()}
        one = cls(single, comm, lr=0.5, momentum=0.5, ema_decay=0.5)
        two = cls(mapped, comm, lr=0.5, momentum=0.5, ema_decay=0.5)
        one.step(np.ones_like(x))
        two.step({"w": np.ones_like(x)})
        assert same_bits(single, x - np.float32(0.5))
        assert same_bits(mapped["w"], single)
        assert same_bits(one.ema, two.ema["w"])


def nested(arrays):
    """Two layers and what is left, as a model's functions hold them."""
    return {"layers": [{"w": arrays[0], "b": arrays[2]}, {"w": arrays[4], "b": arrays[5]}],
            "rest": (arrays[1], arrays[3], *arrays[6:])}


@scenario
def gradients_as_they_come(comm):
    """Nested, transposed and strided, bound and bound anew; zeroed where the caller has them."""
    for cls in classes():
        ours, theirs = model(), model()
        bound = nested(gradients(9, comm.rank))
        opt = cls(nested(ours), comm, lr=0.1, momentum=0.9, ema_decay=0.5, grads=bound)
        one = optcore.SGD(nested(theirs), lr=0.1, momentum=0.9, ema_decay=0.5)
        for k in range(3):
            sets = [gradients(k, rank) for rank in range(comm.size)]
            one.step_replicas([nested(grads) for grads in copy.deepcopy(sets)])
            mine = sets[comm.rank]
            mine[0] = np.asfortranarray(mine[0])
            mine[4] = np.repeat(mine[4], 2, axis=0)[::2]
            mine[2] = mine[2][::-1].copy()[::-1]
            if k == 0:
                bound.update(nested(mine))
                bound["layers"][1]["w"] = mine[4]
                opt.step(zero_grad=True)
            else:
                opt.step(nested(mine), zero_grad=True)
            assert not any(g.any() for g in mine)
            assert_same(ours, theirs)
        for a, b in zip(opt.ema["layers"], one.ema["layers"], strict=True):
            assert_same(a.values(), b.values())
        assert_same(opt.ema["rest"], one.ema["rest"])
        wrong = nested(gradients(0, comm.rank))
        if comm.rank == comm.size - 1:
            wrong["layers"][1]["w"] = np.ones((300, 4), np.float32)
        assert_all_raise(comm, ValueError, "layers.1.w", opt.step, wrong)


@scenario
def schedules_are_asked_once_a_step(comm):
    """And the step takes the numbers that the ranks agreed on, whatever a schedule says later."""
    for cls in classes():
        asked = []
        rates = iter([0.5, 0.25, 0.125])

        def lr(step):
            asked.append(("lr", step))      # noqa: B023
            return next(rates)              # noqa: B023

        def decay(step):
            asked.append(("ema", step))     # noqa: B023
            return 0.5

        ours, theirs = model(), model()
        opt = cls(ours, comm, lr=lr, momentum=0.9, ema_decay=decay)
        one = optcore.SGD(theirs, lr=lambda step: 0.5 / 2 ** step, momentum=0.9, ema_decay=0.5)
        for k in range(3):
            opt.step(gradients(k, comm.rank))
            one.step_replicas([gradients(k, rank) for rank in range(comm.size)])
        assert asked == [(what, k) for k in range(3) for what in ("lr", "ema")]
        assert_same([*ours, *opt.ema], [*theirs, *one.ema])


@scenario
def a_subclass_keeps_more(comm):
    """What its `state_dict` has besides is saved and restored on all ranks."""
    from optcore import mpi

    for base in (mpi.DataParallelSGD, mpi.ShardedSGD):
        class More(base):
            epoch = 7

            def state_dict(self):
                return {**super().state_dict(), "epoch": self.epoch}

            def load_state_dict(self, state_dict, **more):
                self.epoch = state_dict["epoch"]
                return super().load_state_dict(state_dict, **more)

        opt = More(model(), comm, lr=0.1)
        path = comm.bcast(str(Path(tempfile.mkdtemp()) / "c"))
        opt.save(path)
        opt.epoch = 0
        opt.restore(path)
        assert opt.epoch == 7


@scenario
def velocities_of_the_callers(comm):
    """They take rank 0's values, and have started where those have."""
    from optcore.mpi import DataParallelSGD, ShardedSGD

    options = {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}
    halved = halves("bfloat16", seed=comm.rank)
    half = half_optimizer(DataParallelSGD, halves("float32"), comm, velocities=named(halved),
                          velocity_dtype="bfloat16")
    assert_same(halved, halves("bfloat16"))
    half.step(named(half_gradients(0, comm.rank)))
    assert_ranks_agree(comm, halved)
    velocities = model(seed=comm.rank + 7)
    velocities[0][...] = comm.rank          # started on others than rank 0 only,
    velocities[4][...] = comm.rank == 0     # and here on rank 0 only
    velocities[5] = None
    ours, theirs, own = model(), model(), model(seed=7)
    own[0][...], own[4][...], own[5] = 0, 1, None
    opt = DataParallelSGD(ours, comm, velocities=velocities, **options)
    one = optcore.SGD(theirs, velocities=own, **options)
    for k in range(2):
        opt.step(gradients(k, comm.rank))
        one.step_replicas([gradients(k, rank) for rank in range(comm.size)])
        assert_same(ours, theirs)
        del velocities[5:6], own[5:6]
        assert_same(velocities, own)
        velocities.insert(5, None)
        own.insert(5, None)
    assert_all_raise(comm, TypeError, "load_state_dict() of a state", ShardedSGD, model(), comm,
                     velocities=model(), **options)
    if comm.size > 1:
        some = [v if comm.rank != 1 else None for v in model()]
        some[0] = model()[0]
        assert_all_raise(comm, ValueError, "with a velocity on rank 0 and params[1]",
                         DataParallelSGD, model(), comm, velocities=some, **options)


@scenario
def groups_are_added(comm):
    from optcore.mpi import DataParallelSGD, ShardedSGD

    options = {"lr": 0.1, "momentum": 0.9, "dampening": 0.25, "ema_decay": 0.5, "max_norm": 0.5}
    ours, theirs = named(model(seed=comm.rank)), named(model())
    more, others = ([{"params": {"u": p["p4"][:, 1].copy(), "v": p["p9"].copy()}, "lr": 0.5},
                     {"params": {"t": p["p10"].copy(order="K")}}] for p in (ours, theirs))
    grads = [{**named(gradients(k, rank)), "u": gradients(k, rank)[4][:, 2],
              "v": gradients(k + 5, rank)[9], "t": gradients(k + 5, rank)[10]}
             for k in range(4) for rank in [comm.rank]]
    opt = DataParallelSGD([{"params": ours}], comm, **options)
    one = optcore.SGD([{"params": theirs}], **options)
    for k in range(4):
        known = [key for group in opt.param_groups for key in group["param_names"]]
        mine = {key: grads[k][key] for key in known}
        everyone = comm.allgather(mine)
        opt.step(mine)
        one.step_replicas(everyone)
        for p, q in zip([*opt.param_groups], [*one.param_groups], strict=True):
            assert_same(p["params"], q["params"])
        assert_same(opt.ema.values(), one.ema.values())
        if k < 2:
            before = copies(ours.values())
            if comm.size > 1:
                odd = comm.rank == 1
                x = np.ones((300, 3), np.float32)
                for wrong, error, words in [
                    ({"params": {"x": ours["p4"] if odd else x}}, ValueError, "('x') is the same"),
                    ({"params": {"y" if odd else "x": x}}, ValueError, "('y') of float32"),
                    ({"params": {"x": x}, "lr": 0.5 + odd}, ValueError, "lr=0.5 on rank 0"),
                    ({"params": {"x": x}, **({"rate": 1} if odd else {})}, TypeError, "rate"),
                ]:
                    assert_all_raise(comm, error, words, opt.add_param_group, wrong)
                assert len(opt.param_groups) == k + 1
                assert_same(ours.values(), before)
            opt.add_param_group(more[k])
            one.add_param_group(others[k])
            assert_ranks_agree(comm, [*more[k]["params"].values(), *opt.ema.values()])
    with pytest.raises(NotImplementedError, match="by_name=True"):
        ShardedSGD(model(), comm, lr=0.1).add_param_group({"params": [np.ones(3)]})


@scenario
def states_are_matched_by_names(comm):
    for cls in classes():
        state = trained(cls, comm, 2, model()).state_dict()
        fewer = named(model(seed=2))
        del fewer["p3"]
        fewer = {"new": np.ones(5), **dict(reversed(fewer.items()))}
        opt = cls(fewer, comm, lr=0.3, momentum=0.9, ema_decay=0.5)
        one = optcore.SGD(copy.deepcopy(fewer), lr=0.3, momentum=0.9, ema_decay=0.5)
        found = opt.load_state_dict(state, by_name=True)
        assert found == one.load_state_dict(state, by_name=True)
        assert found.missing == ["new"]
        assert found.unexpected == ["p3"]
        for a, b in zip(opt.state_dict()["state"].values(), one.state_dict()["state"].values(),
                        strict=True):
            assert_same([a["velocity"], a["ema"]], [b["velocity"], b["ema"]])
            assert a["first_step"] == b["first_step"]
        assert (opt.step_count, opt.param_groups[0]["lr"]) == (2, 0.3)
        again = cls(grouped(model()), comm, lr=0.1, ema_decay=0.5)
        if comm.size > 1:
            assert_all_raise(comm, ValueError, "by_name=True on rank 1", again.load_state_dict,
                             state, by_name=comm.rank == 1)
        assert again.load_state_dict(state) == ([], [], [])


@scenario
def what_nothing_reads_is_refused(comm):
    for cls in classes():
        opt = cls(named(model()), comm, lr=0.1)
        for name in ("rate", "_rate", "velocity", "comm"):
            with pytest.raises(AttributeError, match=name):
                setattr(opt, name, comm)
        assert_all_raise(comm, TypeError, "rate", cls, model(), comm, lr=0.1, rate=0.1)
        for make in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match=f"{cls.__name__} holds a communicator.*state_dict"):
                make(opt)
        opt.lr = 0.5        # of all groups
        assert [group["lr"] for group in opt.param_groups] == [0.5]
        params = model()
        opt = cls(grouped(params), comm, lr=0.1)
        opt.weight_decay = 0.25
        opt.lr = 0.5 + comm.rank
        if comm.size > 1:
            assert_all_raise(comm, ValueError, "lr=1.5 on rank 1", opt.step,
                             named(gradients(0, comm.rank)))
        assert_same(params, model())


@scenario
def parameters_start_as_on_rank_0(comm):
    for cls in classes():
        params = model(seed=comm.rank)
        opt = cls(params, comm, lr=0.1, ema_decay=0.5)
        assert_same(params, model(seed=0))
        assert_same(opt.ema, params)


@scenario
def a_step_is_skipped_by_all(comm):
    for cls in classes():
        params = model()
        opt = cls(named(params), comm, lr=0.1, momentum=0.9, skip_nonfinite=True)
        grads = named(gradients(0, comm.rank))
        assert opt.step(grads)
        before, state = copies(params), opt.state_dict()
        if comm.rank == comm.size - 1:
            grads["p4"][-1, 0] = np.nan
            grads["p10"][0, 0] = np.inf
        assert opt.step(grads, zero_grad=True) is False
        assert not any(g.any() for g in grads.values())
        assert opt.nonfinite_params == ["p4", "p10"]
        assert (opt.step_count, opt.skipped) == (1, 1)
        assert_same(params, before)
        for a, b in zip(opt.state_dict()["state"].values(), state["state"].values(), strict=True):
            assert same_bits(a["velocity"], b["velocity"])
        assert opt.step(named(gradients(1, comm.rank)))
        assert_ranks_agree(comm, params)


def with_small_counts(comm, limit):
    """The communicator, refusing counts above `limit` as MPI refuses those above a C int."""
    import mpi4py.MPI as MPI

    def small(name, count):
        def call(self, *buffers, **options):
            arrays = [b[0] if isinstance(b, tuple) else b for b in buffers]
            if count([a for a in arrays if isinstance(a, np.ndarray)]) > limit:
                raise MPI.Exception(MPI.ERR_ARG)
            return getattr(MPI.Intracomm, name)(self, *buffers, **options)
        return call

    def small_pickle(name):
        def call(self, value, *arguments):
            longest = comm.allreduce(len(pickle.dumps(value)), MPI.MAX)
            if longest > 20 * limit:
                raise MPI.Exception(MPI.ERR_ARG)
            return getattr(MPI.Intracomm, name)(self, value, *arguments)
        return call

    methods = {name: small(name, count) for name, count in {
        "Bcast": lambda arrays: arrays[0].size,
        "Reduce": lambda arrays: arrays[0].size,
        "Allreduce": lambda arrays: arrays[0].size,
        "Reduce_scatter_block": lambda arrays: arrays[1].size,
        "Allgather": lambda arrays: arrays[0].size // comm.size,
        "Allgatherv": lambda arrays: arrays[0].size,
    }.items()} | {name: small_pickle(name) for name in ("bcast", "allgather")}
    return type("SmallCounts", (MPI.Intracomm,), methods)(comm)


@scenario
def more_elements_than_one_call_takes(comm):
    """The same bits in many calls as in one, from building to loading."""
    from optcore import mpi

    def made(seed):
        return [*model(seed=seed), halves("bfloat16", seed=seed)[0]]

    def given(k, exact=True):
        return [*gradients(k, comm.rank, exact=exact), half_gradients(k, comm.rank)[0]]

    whole = mpi.MAX_COUNT
    folder = Path(comm.bcast(os.environ["OPTCORE_TEST_FOLDER"]))
    options = {"lr": 0.1, "momentum": 0.9, "max_norm": 0.5, "ema_decay": 0.75}
    for cls in classes():
        results = []
        for limit in (whole, 50):
            path = folder / f"{cls.__name__}-{limit}"
            mpi.MAX_COUNT = limit
            try:
                link = comm if limit == whole else with_small_counts(comm, limit)
                params = made(comm.rank)
                opt = cls(params, link, **options)
                for k in range(3):
                    # sums of three and more that round may depend on their order, which MPI chooses
                    opt.step(given(k, exact=comm.size > 2))
                if comm.size > 1:
                    opt.param_groups[0]["lr"] = 0.2 if comm.rank == 1 else 0.1
                    assert_all_raise(comm, ValueError, "lr=0.2 on rank 1", opt.step, given(3))
                    opt.param_groups[0]["lr"] = 0.1
                arrays = [*params, *opt.ema,
                          *(entry["velocity"] for entry in opt.state_dict()["state"].values())]
                if importlib.util.find_spec("safetensors"):
                    opt.save(path, include_params=True)
                    loaded = made(5)
                    again = cls.load(path, loaded, comm=link)
                    assert again.step_count == 3
                    arrays += [*loaded, *again.ema]
                assert_ranks_agree(comm, arrays)
                results.append(arrays)
            finally:
                mpi.MAX_COUNT = whole
        assert_same(*results)


@scenario
def norm_beyond_the_range_of_squares(comm):
    for cls, size in itertools.product(classes(), [1e-200, 1e200]):
        x = np.zeros(10_000)
        opt = cls(x, comm, lr=0.1, max_norm=1.0)
        opt.step(np.full_like(x, size))
        np.testing.assert_allclose(opt.grad_norm, 100 * size, rtol=1e-12)


@scenario
def refusals_of_one_rank_reach_all(comm):
    """One rank's gradients, scale or schedule is refused: all raise, nothing changes."""
    last = comm.rank == comm.size - 1

    def lr(step):
        return -1.0 if last and step else 0.1

    for cls in classes():
        params = model()
        opt = cls(params, comm, lr=0.1, momentum=0.9)
        opt.step(gradients(0, comm.rank))
        before = copies(params)
        wrong = gradients(1, comm.rank)
        if last:
            wrong[2] = np.ones(8, np.float32)
        message = assert_all_raise(comm, ValueError, "grads[2] has shape (8,)", opt.step, wrong)
        assert last or f"refused on rank {comm.size - 1}: " in message
        wrong[2] = np.ones(7, np.float64 if last else np.float32)
        assert_all_raise(comm, TypeError, "grads[2] has dtype float64", opt.step, wrong)
        assert_all_raise(comm, TypeError, "grads must be given", opt.step,
                         *(() if last else (gradients(1, comm.rank),)))
        assert_all_raise(comm, ValueError, "grad_scale must be", opt.step,
                         gradients(1, comm.rank), grad_scale=-1.0 if last else 1.0)
        assert_same(params, before)
        assert opt.step_count == 1
        opt.step(gradients(1, comm.rank))
        assert_ranks_agree(comm, params)
        scheduled = cls(model(), comm, lr=lr)
        scheduled.step(gradients(0, comm.rank))
        assert_all_raise(comm, ValueError, "lr(step_count) must be", scheduled.step,
                         gradients(0, comm.rank))


@scenario
def disagreements_raise_on_all(comm):
    if comm.size == 1:
        return
    odd = comm.rank == 1
    for cls in classes():
        params = model()
        opt = cls(params, comm, lr=0.1, momentum=0.9)
        before = copies(params)
        grads = gradients(0, comm.rank)
        some = [None if odd and i == 3 else g for i, g in enumerate(grads)]
        assert_all_raise(comm, ValueError, "grads that are None at [3] on rank 1", opt.step, some)
        assert_all_raise(comm, ValueError, "grad_scale=2.0 on rank 1", opt.step, grads,
                         grad_scale=2.0 if odd else 1.0)
        opt.param_groups[0]["lr"] = 0.2 if odd else 0.1
        assert_all_raise(comm, ValueError, "lr=0.2 on rank 1", opt.step, grads)
        opt.param_groups[0]["lr"] = 0.1
        opt.max_norm = 1.0 if odd else None
        assert_all_raise(comm, ValueError, "max_norm=1.0 on rank 1", opt.step, grads)
        opt.max_norm = None
        state = opt.state_dict()
        ahead = {**state, "step_count": int(odd)}
        assert_all_raise(comm, ValueError, "ranks must agree", opt.load_state_dict, ahead)
        # A rank that was loaded behind the others' backs counts other steps than they do.
        optcore.SGD.load_state_dict(opt, ahead)
        assert_all_raise(comm, ValueError, "got step 0 on rank 0 and step 1 on rank 1",
                         opt.step, grads)
        if cls.__name__ == "ShardedSGD":
            assert_all_raise(comm, ValueError, "got step 0 on rank 0 and step 1 on rank 1",
                             opt.state_dict)
        optcore.SGD.load_state_dict(opt, state)
        assert_same(params, before)
        assert opt.step_count == 0
        opt.step(grads)
        assert_ranks_agree(comm, params)


@scenario
def builds_that_differ_raise_on_all(comm):
    if comm.size == 1:
        return
    odd = comm.rank == comm.size - 1
    x = np.ones((3, 4), np.float32)
    cases = [
        ({"w": np.ones((4, 4), np.float32)}, {}, ValueError, "params[0] ('w') of float32 (4, 4)"),
        ({"w": np.ones((3, 4))}, {}, ValueError, "params[0] ('w') of float64"),
        ({"w": rounded(x, "bfloat16")}, {}, ValueError, "params[0] ('w') of bfloat16"),
        ({"w": x.copy()}, {"velocity_dtype": "bfloat16"}, ValueError, "velocity_dtype='bfloat16'"),
        ({"w": x.copy()}, {"seed": 1}, ValueError, "seed=1"),
        ({"w": np.asfortranarray(x)}, {}, ValueError, "Fortran order"),
        ({"v": x.copy()}, {}, ValueError, "params[0] ('v')"),
        ({"w": x.copy(), "b": x.copy()}, {}, ValueError, "params[1] ('b')"),
        ({"w": x.copy()}, {"lr": 0.2}, ValueError, "lr=0.2"),
        ({"w": x.copy()}, {"lr": lambda step: 0.1}, ValueError, "a schedule"),
        ({"w": x.copy()}, {"skip_nonfinite": True}, ValueError, "skip_nonfinite=True"),
        ({"w": x.copy()}, {"momentum": 2.0}, ValueError, "momentum must be"),
        ({"w": x[:, ::2]}, {}, ValueError, "params[0] ('w')"),
        ({"w": x.astype(int)}, {}, TypeError, "params[0] ('w')"),
    ]
    for cls, (params, options, error, words) in itertools.product(classes(), cases):
        given = params if odd else {"w": x.copy()}
        before = copies(given.values())
        assert_all_raise(comm, error, words, cls, given, comm,
                         **{"lr": 0.1, **(options if odd else {})})
        assert_same(given.values(), before)


@scenario
def gradients_are_accumulated_where_they_are_bound(comm):
    for cls in classes():
        ours, theirs = model(), model()
        grads = gradients(0, comm.rank)
        opt = cls(ours, comm, lr=0.1, momentum=0.9, grads=grads)
        opt.accumulate(gradients(1, comm.rank))
        opt.step(grad_scale=0.5, zero_grad=True)
        assert not any(g.any() for g in grads)
        one = optcore.SGD(theirs, lr=0.1, momentum=0.9)
        sets = [[a + b for a, b in zip(gradients(0, rank), gradients(1, rank), strict=True)]
                for rank in range(comm.size)]
        one.step_replicas([[np.asarray(g, order="F" if p.flags.fnc else "C")
                            for g, p in zip(each, theirs, strict=True)] for each in sets],
                          grad_scale=0.5)
        assert_same(ours, theirs)


@scenario
def schedules_and_options_edited_between_steps(comm):
    for cls in classes():
        ours, theirs = model(), model()
        options = {"lr": lambda step: 0.5 / (1 + step), "ema_decay": lambda step: 0.5}
        opt = cls(ours, comm, **options)
        one = optcore.SGD(theirs, **options)
        for k, edit in enumerate([{}, {"momentum": 0.5}, {"lr": 0.25}, {"weight_decay": 0.5}]):
            for each in (opt, one):
                each.param_groups[0].update(edit)
            opt.step(gradients(k, comm.rank))
            one.step_replicas([gradients(k, rank) for rank in range(comm.size)])
            assert_same(ours, theirs)
        assert_same(opt.ema, one.ema)


def tables(seed=0):
    """Of all types and of one to three dimensions, and a parameter that gets whole gradients."""
    rng = np.random.default_rng(seed)
    return {
        "t": rng.standard_normal((40, 3)).astype(np.float32), "d": rng.standard_normal(25),
        "w": rng.standard_normal((7, 2)).astype(np.float32),
        "h": rounded(rng.standard_normal((30, 2, 2)).astype(np.float32), "bfloat16"),
        "e": np.zeros((9, 0), np.float32), "u": rng.standard_normal((20, 5)).astype(np.float32),
    }


def wide(rows, dtype):
    """The same rows in the type that they are added in."""
    values = np.empty(rows.values.shape, dtype)
    widen(rows.values, values)
    return optcore.Rows(rows.indices, values)


def row_gradients(step, rank):
    """Rows whose numbers and types differ from rank to rank, some of none; a whole gradient."""
    rng = np.random.default_rng((step, rank))
    grads = {"w": rng.integers(-64, 65, (7, 2)).astype(np.float32) / 64}
    for i, (key, param) in enumerate(tables().items()):
        if key not in grads:
            n = [3, 0, 12, 1][(step + rank + i) % 4]
            values = rng.standard_normal((n, *param.shape[1:]))
            if key != "d":
                name = ["float32", "bfloat16", "float16"][(step + rank + i) % 3]
                values = np.array(rounded(values.astype(np.float32), name))
            indices = rng.integers(0, len(param), n)
            grads[key] = optcore.Rows(indices.astype([np.int32, np.int64][rank % 2]), values)
    return {**grads, "u": None} if step % 3 == 1 else grads


def joined(sets):
    """What one process steps with in the place of all these."""
    grads = {}
    for key in sets[0]:
        of_all = [each[key] for each in sets]
        if isinstance(of_all[0], optcore.Rows):
            dtype = np.float64 if key == "d" else np.float32
            grads[key] = optcore.Rows.concatenate([wide(rows, dtype) for rows in of_all])
        else:
            grads[key] = None if of_all[0] is None else sum(of_all)
    return grads


ROW_OPTIONS = [
    {"momentum": 0.9, "dampening": 0.25, "weight_decay": 0.1, "track_grad_norm": True},
    {"momentum": 0.9, "nesterov": True, "max_norm": 0.5, "lr": lambda step: 0.1 / (1 + step)},
    {"momentum": 0.9, "lr_in_velocity": True, "clip_value": 0.25, "skip_nonfinite": True},
    {"momentum": 0.9, "lazy": "rows", "ema_decay": 0.75, "master": None, "seed": 7},
    {"weight_decay": 0.1, "decoupled_weight_decay": True},
]


def row_optimizer(params, *comm, **options):
    from optcore.mpi import DataParallelSGD

    return (DataParallelSGD if comm else optcore.SGD)(params, *comm, **{"lr": 0.1, **options})


@scenario
def rows_have_the_bits_of_one_process(comm):
    """That steps the rows of all ranks, one rank's after the other's, whatever they are."""
    for options in ROW_OPTIONS:
        ours, theirs = tables(comm.rank), tables()
        opt, one = row_optimizer(ours, comm, **options), row_optimizer(theirs, **options)
        for k in range(9):
            sets = [row_gradients(k, rank) for rank in range(comm.size)]
            assert opt.step(sets[comm.rank], grad_scale=0.5)
            if k % 2:
                one.step_replicas(sets, grad_scale=0.5)
            else:
                one.step(joined(sets), grad_scale=0.5 / comm.size)
            assert opt.grad_norm == one.grad_norm
            assert_ranks_agree(comm, ours.values())     # also in rows that are behind
            assert_same(ours.values(), theirs.values())
            if k in (3, 6):     # each rank reads rows of its own, which all bring up to date
                reads = [np.arange(rank, 20, 2) for rank in range(comm.size)]
                opt.catch_up("t", reads[comm.rank])
                one.catch_up("t", np.concatenate(reads))
                opt.catch_up(5, [] if comm.rank else [[1, 2], [19, 1]])
                one.catch_up(5, [1, 2, 19])
                assert_ranks_agree(comm, ours.values())
            if k == 5:
                opt.catch_up("h", comm.rank)
                one.catch_up("h", range(comm.size))
                opt.catch_up("d")
                one.catch_up("d")
                assert_same(ours.values(), theirs.values())
        assert_same_states(opt, one)
        assert_same(ours.values(), theirs.values())


@scenario
def rows_are_gathered_and_no_table_is_sent(comm):
    """In pieces of any size, with the same bits."""
    from mpi4py import MPI

    from optcore import mpi

    calls = []

    class Noted(MPI.Intracomm):
        def Allreduce(self, *buffers):      # noqa: N802
            calls.append(buffers[1].size if buffers[0] is MPI.IN_PLACE else buffers[0].size)
            return MPI.Intracomm.Allreduce(self, *buffers)

    whole, results = mpi.MAX_COUNT, []
    for limit in (whole, 5):
        mpi.MAX_COUNT = limit
        try:
            params = tables()
            opt = row_optimizer(params, Noted(comm) if limit == whole else
                                with_small_counts(comm, limit), momentum=0.9)
            for k in range(3):
                calls.clear()
                opt.step(row_gradients(k, comm.rank))
                assert limit < whole or calls == [3, 256]       # the votes, w and its padding
            opt.catch_up("t", np.arange(comm.rank, 20))
            results.append(params.values())
        finally:
            mpi.MAX_COUNT = whole
    assert_same(*results)


@scenario
def rows_that_are_behind_are_saved_and_loaded(comm):
    """All ranks bring them up to date before one of them reads a state, or none does."""
    folder = Path(comm.bcast(os.environ["OPTCORE_TEST_FOLDER"]))
    ours, theirs = tables(), tables()
    opt, one = (row_optimizer(p, *link, momentum=0.9) for p, link in ((ours, [comm]), (theirs, [])))

    def step(k):
        sets = [row_gradients(k, rank) for rank in range(comm.size)]
        opt.step(sets[comm.rank])
        one.step(joined(sets), grad_scale=1 / comm.size)

    for k in range(5):
        step(k)
    opt.save(folder / "rows", include_params=True)
    assert_same_states(opt, one)
    for base, link in ((optcore.SGD, {}), (type(opt), {"comm": comm})):
        loaded = tables(1)
        again = base.load(folder / "rows", loaded, **link)
        assert_same_states(again, opt)
        assert_same(loaded.values(), ours.values())
    step(5)
    opt.restore(folder / "rows")        # what was missed since is of no more interest
    again.step(row_gradients(0, comm.rank))
    opt.step(row_gradients(0, comm.rank))
    assert_same_states(again, opt)
    assert_same(loaded.values(), ours.values())
    opt.step(row_gradients(6, comm.rank))
    opt.catch_up()
    if comm.rank == 0:
        opt.state_dict()                # sends nothing then
    opt.step(row_gradients(7, comm.rank))
    # What one rank refuses moves no row on the others, whose bits would part from its own.
    last = comm.rank == comm.size - 1
    new = {"params": {"new": np.ones(3)}}
    assert_all_raise(comm, TypeError, "param_group must be", opt.add_param_group,
                     [new] if last else new)
    opt.step(row_gradients(8, comm.rank))
    opt.param_groups[0]["lr"] = -1.0 if last else 0.1
    assert_all_raise(comm, ValueError, "lr must be", opt.save, folder / "none")
    opt.param_groups[0]["lr"] = 0.1
    opt.add_param_group(new)
    opt.step({**row_gradients(9, comm.rank), "new": np.ones(3)})
    opt.catch_up()
    assert_ranks_agree(comm, ours.values())


@scenario
def rows_that_are_refused(comm):
    """On one rank, or by a class: all raise, and nothing has changed."""
    from optcore.mpi import ShardedSGD

    last = comm.rank == comm.size - 1
    params = tables()
    opt = row_optimizer(params, comm, momentum=0.9, skip_nonfinite=True)
    opt.step(row_gradients(0, comm.rank))
    before = copies(params.values())
    grads = row_gradients(2, comm.rank)
    for rows, error, words in [
        (optcore.Rows([3, 40], np.zeros((2, 3), np.float32)), IndexError, "got 40 at position 1"),
        (optcore.Rows([3, -1], np.zeros((2, 3), np.float32)), IndexError, "got -1 at position 1"),
        (optcore.Rows([3], np.zeros((1, 2), np.float32)), ValueError, "('t') must have values of"),
        (optcore.Rows([3], np.zeros((1, 3))), TypeError, "('t') has dtype float64"),
    ]:
        given = {**grads, "t": rows} if last else grads
        assert_all_raise(comm, error, words, opt.step, given)
    assert_all_raise(comm, TypeError, "zeroed", opt.step, grads, zero_grad=True)
    if comm.size > 1:
        for other, words in [(np.zeros_like(params["t"]), "grads that are Rows at [1, 3, 4, 5]"),
                             (None, "grads that are None at [0]")]:
            given = {**grads, "t": other} if last else grads
            assert_all_raise(comm, ValueError, words, opt.step, given)
        for key, rows in [("d" if last else "t", [1]), ("t", None if last else [1])]:
            assert_all_raise(comm, ValueError, "ranks must agree, got catch_up(", opt.catch_up,
                             key, rows)
        alone = opt.state_dict if comm.rank == 0 else functools.partial(opt.step, grads)
        assert_all_raise(comm, ValueError, "got catch_up(None) of all rows on rank 0", alone)
    for key, rows, error, words in [
        ("t", [1, 40], IndexError, "got 40 at position"), ("t", [0.5], TypeError, "integers"),
        ("t", [True], TypeError, "integers"), ("no", [1], KeyError, "got 'no'"),
        (None, [1], TypeError, "key must say whose"), (9, None, IndexError, "got 9"),
    ]:
        given = (key, rows) if last or key != "t" else ("t", [1])
        assert_all_raise(comm, error, words, opt.catch_up, *given)
    held = params["u"]
    params["u"] = held.copy() if last else held
    assert_all_raise(comm, ValueError, "('u') is another array", opt.catch_up)
    params["u"] = held
    assert_same(params.values(), before)
    assert opt.step_count == 1
    if last:
        grads["d"] = optcore.Rows([2, 2], np.array([np.inf, 0]))
    assert opt.step(grads) is False
    assert opt.nonfinite_params == ["d"]
    assert_same(params.values(), before)
    opt.step(row_gradients(3, comm.rank))
    opt.catch_up()
    assert_ranks_agree(comm, params.values())

    sharded = ShardedSGD(params, comm, lr=0.1, momentum=0.9, ema_decay=0.5)
    before = copies(params.values())
    whole = {key: np.zeros_like(p) for key, p in params.items()}
    for given in (row_gradients(0, comm.rank), row_gradients(0, comm.rank) if last else whole):
        assert_all_raise(comm, TypeError, "got Rows at [0, 1, 3, 4, 5]: ShardedSGD", sharded.step,
                         given)
    assert sharded.step_count == 0
    assert_same(params.values(), before)


@scenario
def local_steps_take_rows(comm):
    """Which inner catches up before parameters are averaged, or written over."""
    from optcore.mpi import LocalSGD

    inner = {"lr": 0.05, "momentum": 0.9}
    outer = {"lr": 0.7, "momentum": 0.5}
    ours = list(tables().values())
    opt = LocalSGD(ours, comm, inner=optcore.SGD(ours, **inner), sync_every=3, **outer)
    one = Alone(list(tables().values()), comm.size, inner, outer)
    keys = list(tables())

    def step(k):
        sets = [[row_gradients(k, rank)[key] for key in keys] for rank in range(comm.size)]
        one.step(sets)
        opt.step(sets[comm.rank])

    for k in range(9):
        step(k)
        if k % 3 == 2:
            one.sync()
            assert_ranks_agree(comm, ours)
        if comm.size <= 2:
            assert_same(ours, one.replicas[comm.rank])
    for begin in (lambda: opt.load_state_dict(opt.state_dict()),
                  lambda: LocalSGD(ours, comm, inner=opt.inner, sync_every=3, **outer)):
        for k in (0, 3):
            opt.inner.step([row_gradients(k, comm.rank)[key] for key in keys])
        expected, inner = copy.deepcopy((ours, opt.inner))
        inner.catch_up()
        assert not same_bits(expected[0], ours[0])
        begin()
        assert_same(ours, comm.bcast(expected))
        opt.inner.catch_up()
        assert_same(ours, comm.bcast(expected))


@scenario
def memory_is_shared_out(comm):
    x = np.zeros(10_000, np.float32)
    whole = 2 * x.nbytes
    sizes = {}
    for cls in classes():
        opt = cls(x.copy(), comm, lr=0.1, momentum=0.9, ema_decay=0.9)
        sizes[cls.__name__] = comm.allgather(opt.state_nbytes)
    assert sizes["DataParallelSGD"] == [whole] * comm.size
    assert sum(sizes["ShardedSGD"]) == whole
    assert max(sizes["ShardedSGD"]) <= whole / comm.size + 2 * 4 * 256
    for master, kept in [("split", 2), ("float32", 4), (None, 0)]:
        half = rounded(x, "bfloat16")
        opt = classes()[1](half, comm, lr=0.1, momentum=0.9, master=master)
        assert sum(comm.allgather(opt.state_nbytes)) == x.size * (4 + kept)


@scenario
def what_has_no_meaning_is_refused(comm):
    """By one rank alone, for nothing is sent; with what to call instead."""
    from optcore.mpi import LocalSGD

    everywhere = {"step_replicas": "the ranks are the replicas", "stepping": "a whole step",
                  "outer_step": "LocalSGD(params, comm, ...).sync()", "accumulating": "the mean",
                  "collecting": "LocalSGD(params, comm, ...).sync()"}
    sharded = {**everywhere, "add_param_group": "by_name=True", "catch_up": "within rows"}
    inner = ("step_replicas", "stepping", "accumulating", "accumulate", "zero_grad", "catch_up")
    local = {**sharded, **{name: f"call opt.inner.{name}()" for name in inner}}
    for cls, refused in zip((*classes(), LocalSGD), (everywhere, sharded, local), strict=True):
        opt = cls(model(), comm, lr=0.1)
        for name, words in refused.items():
            start = f"{cls.__name__} has no {name}(): "
            if comm.rank == 0:
                with pytest.raises(NotImplementedError, match=re.escape(start)) as raised:
                    getattr(opt, name)([model()], grad_scale=0.5)
                assert words in str(raised.value)
                assert getattr(cls, name).__doc__ == f"Refuse: {str(raised.value)[len(start):]}."
        for call in (lambda: cls(model(), None, lr=0.1),    # noqa: B023
                     lambda: cls.load("none", model())):    # noqa: B023
            with pytest.raises(TypeError):
                call()


@scenario
def other_arrays_are_refused(comm):
    """In the place of a parameter, on one rank: all raise, and nobody steps what nobody sees."""
    from optcore.mpi import LocalSGD

    last = comm.rank == comm.size - 1
    for cls in (*classes(), LocalSGD):
        params = named(model())
        opt = cls(params, comm, lr=0.5)
        kept, state = copies(params.values()), opt.state_dict()
        calls = [functools.partial(opt.load_state_dict, state),
                 opt.sync if cls is LocalSGD else
                 functools.partial(opt.step, named(gradients(0, comm.rank)))]
        held = params["p4"]
        for call in calls:
            if last:
                params["p4"] = held.copy()
            assert_all_raise(comm, ValueError, "('p4') is another array", call)
            params["p4"] = held
            held.flags.writeable = not last
            assert_all_raise(comm, ValueError, "('p4') must stay in its place", call)
            held.flags.writeable = True
        assert_same(params.values(), kept)
        assert opt.step_count == 0
        for call in calls:
            call()
        assert_ranks_agree(comm, params.values())


@scenario
def checkpoints_fail_on_all(comm):
    """With one class, and what it carries, on every rank; rank 0 alone touches the file."""
    folder = Path(comm.bcast(os.environ["OPTCORE_TEST_FOLDER"]))
    damaged, none = folder / "damaged", folder / "none"
    for cls in classes():
        opt = cls(model(), comm, lr=0.1)
        damaged.write_text("damaged")
        comm.Barrier()
        assert_all_raise(comm, optcore.CheckpointError, "not a whole", opt.restore, damaged)
        assert_all_raise(comm, optcore.CheckpointError, "is not a file", opt.restore, folder)
        for call, path, number in [
            (opt.restore, none, errno.ENOENT), (opt.save, none / "path", errno.ENOENT),
            (opt.save, damaged / "path", errno.ENOTDIR), (opt.save, folder, errno.EISDIR),
            (opt.save, folder / ("x" * 300), errno.ENAMETOOLONG),
        ]:
            try:
                call(path)
                raised = None
            except OSError as error:
                raised = type(error), error.errno, error.filename
            assert set(comm.allgather(raised)) == {(type(OSError(number, "")), number, str(path))}
        assert_all_raise(comm, TypeError, "path must be", opt.save, 1)
        odd = cls({("a", 1): np.ones(3)}, comm, lr=0.1)
        assert_all_raise(comm, TypeError, "plain numbers and strings", odd.save, folder / "new")
        comm.Barrier()
        assert not (folder / "new").exists()


@scenario
def a_save_that_one_rank_refuses(comm):
    """Nobody waits for it, and nothing is written."""
    path = Path(comm.bcast(os.environ["OPTCORE_TEST_FOLDER"]), "refused")
    for cls, bad in itertools.product(classes(), range(comm.size)):
        opt = cls(model(), comm, lr=0.1)
        if comm.rank == bad:
            opt.param_groups[0]["lr"] = -1.0
        assert_all_raise(comm, ValueError, "lr must be", opt.save, path)
        opt.param_groups[0]["lr"] = 0.1
        state = {**opt.state_dict(), "step_count": int(comm.rank == bad)}
        optcore.SGD.load_state_dict(opt, state)     # this rank's alone
        if comm.size > 1:
            assert_all_raise(comm, ValueError, "agree, got step", opt.save, path)
        comm.Barrier()
        assert not path.exists()


@scenario
def errors_are_of_one_class_on_all(comm):
    """Or of the nearest that a message makes, where only its own rank can make the error."""
    from optcore import mpi

    class Own(Exception):   # noqa: N818
        pass

    def own():
        raise Own("whole")

    for call, classes_there, words in [
        (lambda: np.empty(1 << 62, np.uint8), MemoryError, "Unable to allocate"),
        (lambda: open("/there/is/none"), FileNotFoundError, "/there/is/none"),  # noqa: SIM115
        (lambda: b"\xff".decode(), UnicodeError, "invalid start byte"),
        (lambda: {}["w"], KeyError, "w"), (lambda: [][0], IndexError, "out of range"),
        (lambda: sys.exit("enough"), SystemExit, "enough"), (own, (Own, RuntimeError), "whole"),
    ]:
        for bad in range(comm.size):
            message = assert_all_raise(
                comm, classes_there, words, mpi._agree, comm,
                lambda: (call() if comm.rank == bad else None, []),     # noqa: B023
            )
            assert (f"refused on rank {bad}: " in message) == (comm.rank != bad)


OUTER_OPTIONS = [
    {"lr": 1.0},
    {"lr": 0.5, "momentum": 0.5, "max_norm": 0.5},
    {"lr": 0.7, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    {"lr": 0.5, "momentum": 0.5, "lr_in_velocity": True, "ema_decay": 0.75, "clip_value": 0.1},
]
# outer options of halves whose parameters and masters are not float32
OUTER_HALVES = [(name, {"lr": 0.7, "momentum": 0.5, **options}) for name, options in HALF_OPTIONS]


class Alone:
    """What LocalSGD does, by one process that has all ranks' arrays."""

    def __init__(self, params, n, inner, outer):
        self.params = params
        self.replicas = [copies(params) for _ in range(n)]
        self.inner = [optcore.SGD(replica, **inner) for replica in self.replicas]
        self.outer = optcore.SGD(params, **outer)

    def step(self, sets):
        for opt, grads in zip(self.inner, sets, strict=True):
            opt.step(grads)

    def sync(self):
        for opt in self.inner:
            opt.catch_up()
        return self.outer.outer_step(self.replicas, write_back=True)


@scenario
def local_steps_have_the_bits_of_one_process(comm):
    from optcore.mpi import LocalSGD

    def of_type(name, seed):
        return model(seed) if name is None else halves(name, seed)

    def grads(name, k, rank):
        return gradients(k, rank, exact=False) if name is None else half_gradients(k, rank)

    inner = {"lr": 0.05, "momentum": 0.9}
    for name, outer in [*((None, options) for options in OUTER_OPTIONS), *OUTER_HALVES]:
        if name is not None and comm.size > 2:      # sums that round depend on their order
            continue
        ours = of_type(name, comm.rank)
        opt = LocalSGD(ours, comm, inner=optcore.SGD(ours, **inner), sync_every=3, **outer)
        one = Alone(of_type(name, 0), comm.size, inner, outer)
        alike = comm.size == 1 or (comm.size == 2 and "max_norm" not in outer)
        for k in range(9):
            sets = [grads(name, k, rank) for rank in range(comm.size)]
            one.step(copy.deepcopy(sets))
            if k % 3 == 2:
                assert one.sync()
            mine = sets[comm.rank]
            assert opt.step(mine, zero_grad=True)
            assert not any(g.any() for g in mine)
            assert (opt.step_count, opt.inner_steps) == ((k + 1) // 3, (k + 1) % 3)
            if alike:
                assert_same(ours, one.replicas[comm.rank])
            if opt.inner_steps == 0:
                assert_ranks_agree(comm, ours)
            if "max_norm" in outer and opt.step_count:
                assert opt.grad_norm > 0.5      # it acts
                np.testing.assert_allclose(opt.grad_norm, one.outer.grad_norm, rtol=1e-5)
        if alike:
            assert_same_states(opt, one.outer)
        for a, b in zip(ours, one.params, strict=True):
            if name is None:
                np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
        if "ema_decay" in outer and alike:
            assert_same(opt.ema, one.outer.ema)


@scenario
def nothing_is_sent_between_outer_steps(comm):
    from mpi4py import MPI

    from optcore.mpi import LocalSGD

    calls = []

    def noted(name):
        def call(self, *arguments, **options):
            calls.append(name)
            return getattr(MPI.Intracomm, name)(self, *arguments, **options)
        return call

    names = ["Allreduce", "Reduce_scatter_block", "Allgather", "Bcast", "allgather", "bcast"]
    link = type("Noted", (MPI.Intracomm,), {name: noted(name) for name in names})(comm)
    params = [np.ones(3000, np.float32), np.ones(5, np.float32)]
    asked = []

    def lr(step):
        asked.append(step)
        return 0.5

    opt = LocalSGD(params, link, inner=optcore.SGD(params, lr=lr), sync_every=3, lr=lr)
    calls.clear()
    for k in range(6):
        opt.step([np.ones_like(p) for p in params])
        sent = ["Allreduce", "Reduce_scatter_block", "Allgather"] if k % 3 == 2 else []
        assert calls == sent
        calls.clear()
    assert asked == [0, 1, 2, 0, 3, 4, 5, 1]    # once a step, inner and outer


@scenario
def parameters_are_stepped_by_others(comm):
    """Without an inner optimizer, as often as each rank likes; in groups, nests and slices."""
    from optcore.mpi import LocalSGD

    ours = model()
    opt = LocalSGD(grouped(ours, momentum=0.5), comm, lr=1.0)
    one = optcore.SGD(grouped(model(), momentum=0.5), lr=1.0)
    for k in range(2):
        replicas = [copies(one._whole_params) for _ in range(comm.size)]
        for rank, replica in enumerate(replicas):
            for p, g in zip(replica, gradients(k, rank, exact=False), strict=True):
                p -= rank * g
        for p, q in zip(ours, replicas[comm.rank], strict=True):
            p[...] = q
        one.outer_step([named(replica) for replica in replicas])
        assert opt.sync()
        assert_ranks_agree(comm, ours)
        for a, b in zip(ours, one._whole_params, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
        if comm.size <= 2:
            assert_same(ours, one._whole_params)
        else:
            for a, b in zip(one._whole_params, ours, strict=True):
                a[...] = b
    assert_all_raise(comm, RuntimeError, "call sync()", opt.step, named(gradients(0, 0)))
    whole = sum(p.nbytes for p in ours)
    assert sum(comm.allgather(opt.state_nbytes)) == whole


@scenario
def a_skipped_outer_step_forgets_the_round(comm):
    from optcore.mpi import LocalSGD

    ours = model()
    opt = LocalSGD(named(ours), comm, inner=optcore.SGD(named(ours), lr=0.5), sync_every=2,
                   lr=0.5, momentum=0.5, skip_nonfinite=True)
    for k in range(2):
        opt.step(named(gradients(k, comm.rank)))
    before = copies(ours)
    opt.step(named(gradients(2, comm.rank)))
    if comm.rank == comm.size - 1:
        ours[4][-1, 0] = np.nan
    assert opt.step(named(gradients(3, comm.rank)))     # the inner one was applied
    assert_same(ours, before)
    assert (opt.step_count, opt.skipped, opt.inner_steps) == (1, 1, 0)
    assert opt.nonfinite_params == ["p4"]


@scenario
def local_refusals(comm):
    from optcore.mpi import DataParallelSGD, LocalSGD

    last = comm.rank == comm.size - 1
    ours = model()
    inner = optcore.SGD(ours, lr=0.5, momentum=0.5)
    opt = LocalSGD(ours, comm, inner=inner, sync_every=2, lr=0.5, momentum=0.5)
    grads = gradients(0, comm.rank)
    wrong = [np.ones(8, np.float32) if i == 2 and last else g for i, g in enumerate(grads)]
    if last:
        with pytest.raises(ValueError, match=r"grads\[2\] has shape"):
            opt.step(wrong)     # alone, and has it still to take
        assert opt.inner_steps == 0
    opt.step(grads)
    before = copies(ours)
    assert_all_raise(comm, ValueError, "grads[2] has shape (8,)", opt.step, wrong)
    opt.lr = 0.25 if last else 0.5
    if comm.size > 1:
        for call in (functools.partial(opt.step, grads), opt.sync):
            assert_all_raise(comm, ValueError, f"lr=0.25 on rank {comm.size - 1}", call)
    opt.param_groups[0]["lr"] = -1.0 if last else 0.5
    assert_all_raise(comm, ValueError, "lr must be", opt.step, grads)
    opt.lr = 0.5
    assert_same(ours, before)
    assert (inner.step_count, opt.step_count, opt.inner_steps) == (1, 0, 1)
    opt.step(grads)
    assert_ranks_agree(comm, ours)
    for options, error, words in [
        ({"inner": optcore.SGD(model(), lr=0.5)}, ValueError, "inner must step the arrays"),
        ({"inner": DataParallelSGD(ours, comm, lr=0.5)}, TypeError, "got DataParallelSGD"),
        ({"inner": inner, "sync_every": 0}, ValueError, "sync_every must be a whole number >= 1"),
        ({"inner": inner, "sync_every": True}, ValueError, "got True"),
        ({"inner": None}, ValueError, "left out without inner"),
        ({"grads": model()}, TypeError, "grads must be left out"),
        ({"velocities": model()}, TypeError, "velocities must be left out"),
    ]:
        given = {"inner": inner, "sync_every": 2, **(options if last else {})}
        assert_all_raise(comm, error, words, LocalSGD, ours, comm, lr=0.5, **given)
    if comm.size > 1:
        assert_all_raise(comm, ValueError, f"sync_every=3 on rank {comm.size - 1}", LocalSGD, ours,
                         comm, lr=0.5, inner=inner, sync_every=3 if last else 2)
    assert opt.step(grads)
    # What inner steps besides would part from rank to rank.
    inner.add_param_group({"params": [np.ones(3)]})
    grads = [*grads, np.ones(3)]
    taken = inner.step_count, opt.step_count, copies(ours)
    for call in (functools.partial(opt.step, grads), opt.sync):
        assert_all_raise(comm, ValueError, "inner must step the arrays that are in params", call)
    assert (inner.step_count, opt.step_count) == taken[:2]
    assert_same(ours, taken[2])
    # No outer step in the middle of one of inner.
    inner = optcore.SGD(ours, lr=lambda step: opt.sync())
    opt = LocalSGD(ours, comm, inner=inner, sync_every=2, lr=0.5)
    assert_all_raise(comm, RuntimeError, "in use already", opt.step, gradients(0, comm.rank))
    assert (opt.step_count, opt.inner_steps) == (0, 0)
    inner = optcore.SGD(ours, lr=0.5)
    opt = LocalSGD(ours, comm, inner=inner, sync_every=2, lr=0.5)
    with inner.stepping() as part:
        part.step(0, gradients(0, comm.rank)[0])
        assert_all_raise(comm, RuntimeError, "a step of this optimizer is under way", opt.sync)
    assert opt.sync()
    assert_ranks_agree(comm, ours)


@scenario
def masters_are_taken_where_parameters_are_set_by_hand(comm):
    """After building; the state holds none, and rank 0's count."""
    from optcore.mpi import LocalSGD

    for name in ("bfloat16", "float16"):
        whole = named(halves(name))
        one = optcore.SGD(whole, lr=0.01, momentum=0.5)
        one.step(named(half_gradients(0, 0)))
        ours = named(halves(name, seed=3))
        opt = LocalSGD(ours, comm, lr=0.5, momentum=0.5)
        for p, q in zip(ours.values(), whole.values(), strict=True):
            p.view(np.uint16)[...] = q.view(np.uint16) if comm.rank == 0 else 0
        opt.load_state_dict(one.state_dict())
        assert_same(ours.values(), whole.values())
        assert_same_states(opt, one)


@scenario
def local_steps_go_on_from_a_checkpoint(comm):
    """Of a round's end, as if never stopped, where each rank keeps its inner state."""
    from optcore.mpi import LocalSGD

    if comm.size != 3:
        return
    path = Path(comm.bcast(os.environ["OPTCORE_TEST_FOLDER"]), "local")
    for name, master in [("float32", "auto"), ("bfloat16", "split"), ("float16", "float32")]:
        def build(seed):
            params = [*halves(name, seed), *model(seed)[3:6]]   # noqa: B023
            inner = optcore.SGD(params, lr=0.05, momentum=0.9, master=master)   # noqa: B023
            return params, inner, LocalSGD(params, comm, inner=inner, sync_every=2, lr=0.7,
                                           momentum=0.9, master=master)         # noqa: B023

        def go_on(opt, n):
            for k in range(n):
                opt.step([*half_gradients(k, comm.rank), *gradients(k, comm.rank)[3:6]])

        params, inner, opt = build(0)
        go_on(opt, 4)
        opt.save(path, include_params=True)
        own = inner.state_dict()
        kept = copies(params)
        go_on(opt, 1)       # what is saved now is still the round before
        opt.save(f"{path}-later", include_params=True)
        go_on(opt, 3)
        for file in (path, f"{path}-later"):
            again, other, resumed = build(1)
            go_on(resumed, 1)
            resumed.restore(file)
            other.load_state_dict(own)
            assert_same(again, kept)
            assert (resumed.step_count, resumed.inner_steps) == (2, 0)
            go_on(resumed, 1)
            go_on(resumed, 3)
            assert_same(again, params)
        go_on(opt, 1)
        first = comm.bcast(params)
        opt.load_state_dict(opt.state_dict())       # without parameters: as rank 0 has them
        assert_same(params, first)
        assert opt.inner_steps == 0
        opt.sync()
        assert_ranks_agree(comm, params)


def trained(cls, comm, n_steps, params, opt=None):
    if opt is None:
        opt = cls(grouped(params, momentum=0.9, dampening=0.25), comm, lr=0.1, max_norm=0.5,
                  ema_decay=0.75)
    for k in range(opt.step_count, n_steps):
        # rank 0's gradients alone, scaled so that the mean has their bits for any number of ranks
        grads = gradients(k, 0)
        for g in grads:
            g *= comm.rank == 0
        opt.step({**named(grads), **({"p4": None} if k < 2 else {})}, grad_scale=comm.size)
    return opt


def save_for_others(comm, folder):
    for cls in classes():
        trained(cls, comm, 3, model()).save(Path(folder, cls.__name__), include_params=True)
    trained_locally(comm, 4, model()).save(Path(folder, "LocalSGD"), include_params=True)


def trained_locally(comm, n_steps, params, path=None):
    """With rank 0's gradients on all, whose mean has their bits but for a third's rounding."""
    from optcore.mpi import LocalSGD

    more = {"inner": optcore.SGD(named(params), lr=0.05), "sync_every": 2}
    if path is None:
        opt = LocalSGD(named(params), comm, lr=0.7, momentum=0.9, nesterov=True, **more)
    else:
        opt = LocalSGD.load(path, named(params), comm=comm, **more)
    for k in range(2 * opt.step_count, n_steps):
        opt.step(named(gradients(k, 0)))
    return opt


def resume(comm, folder):
    """Go on from either class's checkpoint in either class, as a run that never stopped."""
    expected = model()
    reference = trained(classes()[0], comm, 6, expected)
    for saved, cls in itertools.product(CLASSES, classes()):
        params = model(seed=1)
        path = Path(folder, saved)
        opt = cls.load(path, grouped(params), comm=comm)
        assert opt.step_count == 3
        trained(cls, comm, 6, params, opt)
        assert_ranks_agree(comm, params)
        assert_same(params, expected)
        assert_same(opt.ema.values(), reference.ema.values())
        restored = model(seed=2)
        opt = trained(cls, comm, 1, restored)
        opt.restore(path)
        trained(cls, comm, 6, restored, opt)
        assert_same(restored, expected)
    unstopped, params = model(), model(seed=1)
    trained_locally(comm, 8, unstopped)
    opt = trained_locally(comm, 8, params, Path(folder, "LocalSGD"))
    assert opt.step_count == 4
    assert_ranks_agree(comm, params)
    for a, b in zip(params, unstopped, strict=True):
        assert comm.size == 3 or same_bits(a, b)
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    if comm.rank == 0:
        params = model(seed=1)
        opt = optcore.SGD.load(Path(folder, "ShardedSGD"), grouped(params))
        for k in range(3, 6):
            opt.step(named(gradients(k, 0)))
        assert_same(params, expected)


def main(arguments):
    from mpi4py import MPI

    faulthandler.dump_traceback_later(100, exit=True)    # a rank left behind would wait for ever
    comm = MPI.COMM_WORLD
    optcore.set_num_threads(1)
    if arguments:
        {"save": save_for_others, "resume": resume}[arguments[0]](comm, arguments[1])
        return
    for name, function in SCENARIOS.items():
        try:
            function(comm)
            failure = None
        except Exception:
            failure = traceback.format_exc()
        failures = [f"rank {rank}: {text}" for rank, text in enumerate(comm.gather(failure) or ())
                    if text]
        if comm.rank == 0:
            print(json.dumps([name, failures]), flush=True)


# The tests

def require_mpi():
    missing = [name for name, there in [
        ("mpi4py", importlib.util.find_spec("mpi4py")), ("mpiexec", find_mpiexec()),
    ] if not there]
    if missing and os.environ.get("OPTCORE_REQUIRE_MPI") == "1":
        pytest.fail(f"OPTCORE_REQUIRE_MPI=1, but there is no {' and no '.join(missing)}")
    if missing:
        pytest.skip(f"needs {' and '.join(missing)}")


@functools.cache
def launched(n, folder):
    """Run all scenarios on `n` ranks; return each one's failures, and what was printed."""
    os.environ["OPTCORE_TEST_FOLDER"] = str(folder)
    try:
        done = run_ranks(n, __file__, timeout=120)
        output, errors = done.stdout, done.stderr
    except subprocess.TimeoutExpired as late:
        output, errors = (part.decode() if isinstance(part, bytes) else part or ""
                          for part in (late.stdout, late.stderr))
    lines = [json.loads(line) for line in output.splitlines() if line.startswith("[")]
    return dict(lines), output + errors


@pytest.fixture(scope="session")
def mpi_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("mpi")


@pytest.mark.parametrize("name", SCENARIOS)
@pytest.mark.parametrize("n", RANKS)
def test_scenario(n, name, mpi_folder):
    require_mpi()
    results, output = launched(n, mpi_folder)
    assert name in results, f"never finished:\n{output}"
    assert not results[name], "\n".join(results[name])


def test_a_checkpoint_of_four_ranks_goes_on_with_others(tmp_path):
    require_mpi()
    for n, what in [(4, "save"), (2, "resume"), (1, "resume"), (3, "resume")]:
        done = run_ranks(n, __file__, what, tmp_path, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr


def test_a_rank_that_raises_ends_the_others(tmp_path):
    """As docs/mpi.md says of programs run by ``python -m mpi4py``; without, rank 0 would wait."""
    require_mpi()
    program = tmp_path / "train.py"
    program.write_text(
        "import numpy as np\n"
        "from mpi4py import MPI\n"
        "from optcore.mpi import DataParallelSGD\n"
        "opt = DataParallelSGD(np.ones(3), MPI.COMM_WORLD, lr=0.1)\n"
        "if MPI.COMM_WORLD.rank == 1:\n"
        "    raise OSError('no such batch')\n"
        "opt.step(np.ones(3))\n"
    )
    done = run_ranks(2, program, timeout=60)
    assert done.returncode
    assert "OSError: no such batch" in done.stderr


def test_documented_commands_end_all_ranks_together():
    root = Path(__file__).parents[1]
    pages = [root / "README.md", *root.glob("docs/*.md"), *root.glob("examples/*.py")]
    commands = [command for page in pages
                for command in re.findall(r"mpiexec -n .*?\.py", page.read_text(encoding="utf-8"))]
    assert len(commands) >= 2
    assert [c for c in commands if " python -m mpi4py " not in c] == []


def test_missing_mpi4py_is_named():
    code = "import sys; sys.modules['mpi4py'] = None; import optcore.mpi"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          check=False)
    assert "ImportError: optcore.mpi needs mpi4py" in done.stderr
    assert "pip install 'optcore[mpi]'" in done.stderr


@pytest.mark.parametrize("n", [2, 4])
def test_example_trains_as_one_process_does(n):
    require_mpi()
    for module in ("matplotlib", "rich"):
        pytest.importorskip(module)
    example = Path(__file__).parents[1] / "examples" / "digits_mpi.py"
    done = run_ranks(n, example, "--epochs", 3, "--hidden", 64, "--least-accuracy", 0.8,
                     timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


if __name__ == "__main__":
    main(sys.argv[1:])
