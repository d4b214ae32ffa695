"""Gradients of some rows: steps of those alone, and exact ones that the others catch up with."""
from __future__ import annotations

import array
import copy
import decimal
import functools
import itertools
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from test_outer import HALVES, on_some_machine, random_options
from test_precision import made
from twin import Twin, draw, everything, frozen

import optcore
from optcore import Rows
from optcore.runtime import always_threaded, simd, simd_levels_available
from reference import LINEAR, same_bits, type_name

KINDS = ["float32", "float64", *HALVES]
by_lazy = pytest.mark.parametrize("lazy", ["exact", "rows"])
U = 2.0**-24                # of float32
TINY, TINY_SINGLE = (float(np.finfo(dtype).tiny) for dtype in (np.float64, np.float32))


def drawn(rng, shape, kind):
    return (rng.standard_normal(shape) if kind == "float64"
            else made(rng.standard_normal(shape), kind))


def rows_of(rng, shape, kind="float32", k=None):
    """Rows of a table of that shape, so many or up to twice as many as it has."""
    k = rng.integers(2 * shape[0] + 1) if k is None else k
    indices = rng.integers(0, max(shape[0], 1), k if shape[0] else 0)
    return Rows(indices.astype(rng.choice([np.int32, np.int64])),
                drawn(rng, (len(indices), *shape[1:]), kind))


def table(rng, *shape, dtype=np.float32, **options):
    x, = draw(rng, shape or (9, 4), dtype=dtype)
    return x, optcore.SGD({"emb": x}, **{"lr": 0.1, "momentum": 0.9} | options)


def held(opt):
    """All that an optimizer holds once every row is up to date."""
    state = opt.state_dict()
    return frozen([state, [group["params"] for group in opt.param_groups]])


# Exact steps against dense ones

N_ROWS, WIDTH, N_STEPS = 40, 3, 10_000
LR, RHO, DECAY = (float(np.float32(number)) for number in (0.05, 0.9, 0.01))


def looked_up(numbers):
    """A schedule of numbers that float32 has."""
    return np.asarray(numbers, np.float32).astype(np.float64).tolist().__getitem__


def schedules_for(rule):
    """What the options that a rule has may do in the course of the steps."""
    step = np.arange(N_STEPS)
    falling = looked_up(LR * (1 + np.cos(step * np.pi / N_STEPS)) / 2)
    found = [{"lr": LR}, {"lr": falling}, {"lr": looked_up(LR * 0.5 ** (step // 3000))}]
    if not rule.has_momentum:
        return found
    for options in found:
        options["momentum"] = RHO
    found[2]["momentum"] = looked_up(np.where(step < 5000, RHO, 0.95))
    through_zero = (step % 8 if rule.name == "momentum" else step % 7 + 1) / 8
    return [*found, {"lr": LR, "momentum": looked_up(through_zero)}]


def groups_of_every_kind():
    decays = [{}, {"weight_decay": DECAY},
              {"weight_decay": DECAY, "decoupled_weight_decay": True}]
    dampenings = itertools.cycle([(0.0, False), (0.25, False), (0.0, True), (0.25, True)])
    for rule in LINEAR:
        if rule.sgd_options is None:
            continue
        for options, decay in itertools.product(schedules_for(rule), decays):
            dampening, dampen_first = next(dampenings)
            rho = options.get("momentum")
            if rule.dampens and callable(rho):
                dampening = looked_up([dampening * (rho(step) > 0) for step in range(N_STEPS)])
            yield {**rule.sgd_options, **options, **decay, "dampen_first": dampen_first,
                   "dampening": dampening if rule.dampens else 0.0}


def built(groups, x, dtype):
    """An optimizer of one table a group, which all begin as x, and the tables and velocities."""
    x = np.repeat(x[None].astype(dtype), len(groups), 0)
    v = np.zeros_like(x)
    opt = optcore.SGD([{"params": [p], **group} for p, group in zip(x, groups, strict=True)],
                      velocities=[w if "momentum" in g else None
                                  for w, g in zip(v, groups, strict=True)])
    return opt, x, v


def test_exact_is_dense(rng):
    """All rules, conventions, decays and schedules, one table each, over one stream of gradients.

    These have one sign, so that no parameter comes near 0: it has to agree to 1e-12 of itself.
    A velocity has to agree to 1e-12 of |v| + a·λ·|x| / (1 - ρ), with the a of below, for coupled
    decay leads it through 0; and below the smallest normal number, where the dense one gets stuck,
    it is not looked at.

    float32 is compared with the dense float64 too, and every number in the options is float32's. A
    row is rounded in the steps that touch it and when it is caught up: before each of these, at the
    end, and in its turns, fewer than one in a hundred steps. Let E be the number of all those and
    X, V, D the largest |x|, |v| and |d| on the way, d with the sum of its terms' sizes; a = 1 and
    b = α where the velocity is without the learning rate, else a = α and b = 1. To first order in
    u = 2**-24, a step gives v an error of at most δv = 8u·(V + a·D), from 3 additions of up
    to 4 values, decay, dampening, lr, ρ·v and the sum, and x one of δx = 4u·(X + b·(V + D)). Later
    steps multiply errors by products of their matrices, whose entries are at most 1, but
    b / (1 - ρ) from v to x and a·λ / (1 - ρ) from x to v, for no row oscillates here. A catch-up
    rounds such a product, or its factors of v and then that: 3u of it are within a step's error and
    what comes of it later. So
    |Δx| <= E·(δx + b / (1 - ρ)·δv) and |Δv| <= E·(δv + a·λ / (1 - ρ)·δx).
    """
    groups = list(groups_of_every_kind())
    x = 1 + rng.random((N_ROWS, WIDTH))
    dense, dense_x, dense_v = built(groups, x, np.float64)
    exact, exact_x, exact_v = built(groups, x, np.float64)
    single, single_x, single_v = built(groups, x, np.float32)
    dense_x[...] = exact_x[...] = single_x
    g, n = np.zeros((N_ROWS, WIDTH)), len(groups)
    most_x, most_v, most_g = np.abs(dense_x), np.zeros_like(dense_x), np.zeros_like(g)
    touched = np.zeros(N_ROWS)
    for k in rng.integers(0, 5, N_STEPS):       # the last row is never touched, others seldom
        indices = ((N_ROWS - 1) * rng.random(k) ** 8).astype(np.int64)
        values = (-0.5 - rng.random((k, WIDTH))).astype(np.float32)
        g[...] = 0
        np.add.at(g, indices, values.astype(np.float64))
        dense.step([g] * n)
        exact.step([Rows(indices, values.astype(np.float64))] * n)
        single.step([Rows(indices.astype(np.int32), values)] * n)
        touched[indices] += 1
        for most, now in (most_x, dense_x), (most_v, dense_v), (most_g, g):
            np.maximum(most, np.abs(now), out=most)
    assert sum(touched == 0) == 1
    assert sum(touched < 200) > 3
    assert touched.max() > N_STEPS / 2
    exact.catch_up()
    single.catch_up()
    events = (2 * touched + 1 + N_STEPS / 100)[:, None]
    for i, group in enumerate(groups):
        lr, rho = (max(map(value, range(N_STEPS))) if callable(value) else value
                   for value in (group["lr"], group.get("momentum", 0.0)))
        run = 1 / (1 - rho)
        a, b = (lr, 1) if group.get("lr_in_velocity") else (1, lr)
        coupled = 0 if group.get("decoupled_weight_decay") else group.get("weight_decay", 0)
        size = np.abs(dense_v[i]) + a * coupled * run * np.abs(dense_x[i])
        assert (np.abs(exact_x[i] - dense_x[i]) <= 1e-12 * np.abs(dense_x[i])).all(), group
        assert (np.abs(exact_v[i] - dense_v[i]) <= 1e-12 * size + TINY).all(), group
        d = most_g + coupled * most_x[i]
        error_v = 8 * U * (most_v[i] + a * d)
        error_x = 4 * U * (most_x[i] + b * (most_v[i] + d))
        bound_x = events * (error_x + b * run * error_v)
        bound_v = events * (error_v + a * coupled * run * error_x) + TINY_SINGLE
        assert (np.abs(single_x[i] - dense_x[i]) <= bound_x).all(), group
        assert (np.abs(single_v[i] - dense_v[i]) <= bound_v).all(), group


def random_lazy(rng, kind, lazy):
    """Options that go with rows: of "exact" all but those that it refuses."""
    options = random_options(rng, kind)
    options |= {
        "lazy": lazy,
        "decoupled_weight_decay": bool(rng.integers(2)),
        "maximize": bool(rng.integers(2)),
        "flush_subnormals": bool(rng.integers(2)),
        "max_norm": None if options["clip_value"] else [None, 2.0][rng.integers(2)],
    }
    if options["momentum"] and not options["nesterov"] and not options["lr_in_velocity"]:
        options |= {"dampening": [0.0, 0.25][rng.integers(2)],
                    "dampen_first": bool(rng.integers(2))}
    if lazy == "exact":
        options |= {"ema_decay": None, "velocity_dtype": None, "master": "auto"}
    return options


SHAPES = [(40, 3), (7,), (1, 5), (30, 17), (9, 2, 3), (6, 300), (2, 9000), (0, 4), (3, 0)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lazy", ["rows", "exact"])
def test_follows_its_twin(lazy, kind, rng, cases, times):
    """Rows alone; exact steps that touch every row; dense gradients and None between them."""
    kinds = ["float64"] if kind == "float64" else ["float32", *HALVES]

    def gradients(whole):
        grads = []
        for shape, sort in zip(SHAPES, whole, strict=True):
            kind = kinds[rng.integers(len(kinds))]
            if sort == "rows":
                rows = rows_of(rng, shape, kind)
                if lazy == "exact":
                    order = rng.permutation(shape[0])
                    rows = Rows.concatenate([Rows(order, drawn(rng, shape, kind)), rows])
                grads.append(rows)
            else:
                grads.append(drawn(rng, shape, kind) if sort == "dense" else None)
        return grads

    for _ in range(6 * times):
        opt = optcore.SGD([drawn(rng, shape, kind) for shape in SHAPES],
                          **random_lazy(rng, kind, lazy) | {"lr": lambda count: 0.1 / (1 + count)})
        twin = Twin(opt)
        with on_some_machine(rng):
            for _ in range(3):
                sorts = ["rows", "rows", "dense", "none"]
                sorts = ["rows", *rng.choice(sorts, len(SHAPES) - 1)]
                replicas = [gradients(sorts) for _ in range(rng.integers(1, 4))]
                if rng.integers(4) == 0 and len(replicas[-1][0]):
                    bad = replicas[-1][0].values
                    bad.flat[-1] = 0x7FC0 if type_name(bad) == "bfloat16" else np.nan
                weights = [None, rng.integers(1, 9, len(replicas))][rng.integers(2)]
                if len(replicas) == 1 and weights is None:
                    applied = opt.step(replicas[0], grad_scale=0.5)
                    assert applied is twin.step(replicas[0], 0.5)
                else:
                    applied = opt.step_replicas(replicas, weights=weights, grad_scale=0.5)
                    assert applied is twin.step_replicas(replicas, weights, 0.5)
                twin.check()
                cases(opt.grad_norm == twin.norm or np.isnan(twin.norm), kind)


@pytest.mark.parametrize("kind", KINDS)
def test_exact_bits_are_those_of_any_machine(kind, rng, cases):
    """Threads and SIMD levels share out what is caught up, too."""
    streams = [[rows_of(rng, shape, kind, k=5) for shape in SHAPES] for _ in range(20)]
    params = [drawn(rng, shape, kind) for shape in SHAPES]
    ends = []
    for level, n_threads in itertools.product(simd_levels_available(), [1, 3]):
        opt = optcore.SGD(copy.deepcopy(params), lr=lambda count: 0.1 / (1 + count), momentum=0.9,
                          nesterov=True, weight_decay=0.01, max_norm=30.0)
        optcore.set_num_threads(n_threads)
        try:
            with simd(level), always_threaded():
                for count, grads in enumerate(streams):
                    opt.step(grads)
                    if count == 9:
                        opt.catch_up(0, range(20))
                ends.append(held(opt))
        finally:
            optcore.set_num_threads(None)
        cases(ends[-1] == ends[0], (level, n_threads))


# What is caught up, and when

def test_catch_up(rng):
    """Some rows, in whatever way they are named; and the others stay as they are."""
    x, opt = table(rng, 12, 4, dtype=np.float64)
    y, dense = table(rng, 12, 4, dtype=np.float64)
    y[...] = x
    opt.catch_up()                                  # before the first step
    g = rng.standard_normal((12, 4))
    for _ in range(5):
        opt.step({"emb": Rows([0, *range(12)][1:], g)})
        dense.step({"emb": g})
    assert same_bits(x, y)
    for _ in range(50):
        opt.step({"emb": Rows([11], g[:1])})
        dense.step({"emb": np.concatenate([0 * g[1:], g[:1]])})
    ways = [[1], np.array([[2, 3], [3, 2]]), np.int32([4]), (5, 6), np.array([7], np.uint8),
            range(8, 9), [], np.zeros((0, 2), np.int64)]
    before, done = x.copy(), [11]
    assert not np.isclose(x[:11], y[:11], rtol=1e-4, atol=0).any()
    for key, rows in zip(["emb", 0] * len(ways), ways, strict=False):
        opt.catch_up(key, rows)
        done += np.ravel(rows).astype(int).tolist()
        assert np.allclose(x[done], y[done], rtol=1e-12, atol=0)
        rest = [row for row in range(12) if row not in done]
        assert same_bits(x[rest], before[rest])
    caught = x.copy()
    opt.catch_up("emb", done)
    assert same_bits(x, caught)
    opt.catch_up("emb")
    assert np.allclose(x, y, rtol=1e-12, atol=0)
    assert same_bits(x[done], caught[done])
    caught = x.copy()
    opt.catch_up()
    assert same_bits(x, caught)
    assert opt.step_count == 55


@pytest.mark.parametrize(("arguments", "error", "words"), [
    (("bias",), KeyError, r"name, one of \['emb', 'scale'\], got 'bias'"),
    ((2,), IndexError, r"key must be in \[0, 2\)"),
    ((None, [0]), TypeError, "key must say whose rows"),
    (("emb", [0, 1, -1]), IndexError, r"rows must be in \[0, 9\).* got -1 at position 2"),
    (("emb", [[0, 9], [1, 2]]), IndexError, "got 9 at position 1"),
    (("emb", np.array([2**64 - 1], np.uint64)), IndexError, "got 18446744073709551615 at pos"),
    (("emb", [0.5]), TypeError, "rows must be integers, got float64"),
    (("emb", [True]), TypeError, "rows must be integers, got bool"),
    (("scale", [0]), ValueError, r"rows must be None for params\[1\] \('scale'\), which has none"),
])
def test_what_catch_up_refuses(arguments, error, words, rng):
    params = {"emb": np.ones((9, 4)), "scale": np.array(1.0)}
    opt = optcore.SGD(params, lr=0.1, momentum=0.9)
    for row in (3, 4):
        opt.step({"emb": Rows([row], np.ones((1, 4))), "scale": None})
    before = params["emb"].copy()
    with pytest.raises(error, match=words):
        opt.catch_up(*arguments)
    assert same_bits(params["emb"], before)
    opt.catch_up()
    assert not same_bits(params["emb"], before)


def in_two_ways(rng, first, second, **options):
    """Whether two optimizers hold the same bits that were stepped a little in these ways."""
    x, a = table(rng, **options)
    y, b = table(rng, **options)
    y[...] = x
    for _ in range(3):
        for way, opt in (first, a), (second, b):
            for seed in range(6):       # which leaves rows behind
                opt.step({"emb": rows_of(np.random.default_rng(seed), (9, 4), k=2)})
            way(opt)
    return held(a) == held(b)


WHOLE = {"emb": np.linspace(-1, 1, 36, dtype=np.float32).reshape(9, 4)}
SOME = {"emb": Rows([2, 2, 7], np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4))}


def caught_up(opt):
    opt.catch_up()


def in_turn(*ways):
    def way(opt):
        for do in ways:
            do(opt)
    return way


def edited(**options):
    return lambda opt: opt.param_groups[0].update(options)


def stepped(grads):
    return lambda opt: opt.step(grads)


def stepped_in_parts(opt):
    with opt.stepping() as part:
        part.step("emb", SOME["emb"])


def accumulated(opt):
    with opt.accumulating() as micro:
        micro.add(WHOLE)


def collected(opt):
    with opt.collecting() as mean:
        mean.add(WHOLE)


@pytest.mark.parametrize(("first", "second"), [
    (stepped(WHOLE), in_turn(caught_up, stepped(WHOLE))),
    (stepped(WHOLE), in_turn(caught_up, stepped({"emb": Rows([*range(9)], WHOLE["emb"])}))),
    (lambda opt: opt.step_replicas([WHOLE, WHOLE]), in_turn(caught_up, stepped(WHOLE))),
    (lambda opt: opt.state_dict(), caught_up),
    (lambda opt: copy.deepcopy(opt), lambda opt: None),
    (lambda opt: pickle.dumps(opt), lambda opt: None),
    (lambda opt: opt.load_state_dict(opt.state_dict()), caught_up),
    (accumulated, in_turn(caught_up, accumulated)),
    (collected, in_turn(caught_up, collected)),
    (lambda opt: opt.outer_step([WHOLE]), in_turn(caught_up, lambda opt: opt.outer_step([WHOLE]))),
    (stepped_in_parts, stepped(SOME)),
    (in_turn(edited(lazy="rows"), stepped(SOME), edited(lazy="exact")),
     in_turn(caught_up, edited(lazy="rows"), stepped(SOME), edited(lazy="exact"))),
    (lambda opt: opt.step_replicas([SOME, SOME], weights=[1, 3]),
     lambda opt: opt.step_replicas([SOME, SOME], weights=[0.25, 0.75])),
])
def test_is_the_same_as(first, second, rng):
    assert in_two_ways(rng, first, second, weight_decay=0.01, decoupled_weight_decay=True)


def close(opt, twin):
    """Whether a float64 optimizer has what its twin has, but for what rows were rounded."""
    state = opt.state_dict()["state"]
    pairs = [*zip(twin.live, twin.params, strict=True), *(
        (entry["velocity"], v) for entry, v in zip(state.values(), twin.velocities, strict=True)
        if entry["velocity"] is not None)]
    return all(np.allclose(a, b, rtol=1e-12, atol=1e-13) for a, b in pairs)


@pytest.mark.parametrize("seed", range(6))
def test_follows_dense_steps_through_anything(seed):
    """Rows, whole gradients, None, no rows, edits of every option, and rows that are read."""
    rng = np.random.default_rng(seed)
    shapes = [(40, 2), (9, 3), (7,), (2, 3)]
    params = draw(rng, *shapes, dtype=np.float64)
    opt = optcore.SGD([{"params": params[:2], "nesterov": seed % 2 == 1},
                       {"params": params[2:], "lr_in_velocity": seed % 3 == 1}],
                      lr=0.1, momentum=0.9, max_norm=[None, 3.0][seed // 3])
    twin = Twin(opt)
    for _ in range(300):
        group = opt.param_groups[rng.integers(2)]
        momenta = [0.5, 0.9, 0.96875] if group["nesterov"] else [0, 0.5, 0.9]
        edits = [("lr", rng.choice([0, 0.01, 0.1])), ("momentum", rng.choice(momenta)),
                 ("weight_decay", rng.choice([0, 0.01])), ("maximize", bool(rng.integers(2))),
                 ("decoupled_weight_decay", bool(rng.integers(2))),
                 ("lazy", str(rng.choice(["exact", "exact", "rows"]))),
                 ("flush_subnormals", bool(rng.integers(2)))]
        if opt.max_norm is None:
            edits.append(("clip_value", [None, 0.5][rng.integers(2)]))
        if not group["nesterov"] and not group["lr_in_velocity"]:
            edits.append(("dampening", rng.choice([0, 0.25])))
        if rng.integers(10) == 0:
            group.update([edits[rng.integers(len(edits))]])
            if group["momentum"] == 0:
                group["dampening"] = 0.0
        if rng.integers(20) == 0:
            opt.catch_up(0, rng.integers(0, 40, 3))
        grads = [rows_of(rng, shape, "float64", k=rng.integers(3)) for shape in shapes]
        for i, shape in enumerate(shapes):
            if rng.integers(8) == 0:
                grads[i] = [None, rng.standard_normal(shape)][rng.integers(2)]
        if any(g is not None for g in grads):
            assert opt.step(grads)
            twin.step(grads)
    assert close(opt, twin)


def test_powers_are_not_rounded_with_every_step():
    """A factor to the power k, by squaring, would else have k / 2 times its square's error."""
    for decay, k in itertools.product([0.01, 0.003, 0.0001], [1023, 12345, 16384]):
        x = np.ones((2, 1))
        opt = optcore.SGD(x, lr=0.1, weight_decay=decay, decoupled_weight_decay=True)
        rows = Rows([0], np.zeros((1, 1)))
        for _ in range(k):
            opt.step(rows)
        opt.catch_up()
        power = decimal.Decimal(1 - 0.1 * decay) ** k
        error = abs(decimal.Decimal(x[1, 0]) / power - 1)
        assert error < 2 * k.bit_length() * 2.0**-53


def held_rate(hold, count):
    """Another learning rate after so many steps."""
    return 0.05 + 0.05 * np.cos(count // hold)


@pytest.mark.parametrize(("n_rows", "hold"), [(50_000, 1), (300, 1), (300, 4), (9, 3)])
def test_all_rows_take_turns(n_rows, hold, rng):
    """Of tables with more rows or fewer than the steps whose matrices are kept.

    What is kept of a step depends on those before it: at first each is another one, then several
    are the same.
    """
    options = {"lr": lambda count: held_rate(1 if count < 900 else hold, count),
               "weight_decay": 0.01, "decoupled_weight_decay": True}
    x, exact = table(rng, n_rows, 1, dtype=np.float64, **options)
    y, dense = table(rng, n_rows, 1, dtype=np.float64, **options)
    y[...] = x
    g = rng.standard_normal((n_rows, 1))
    exact.step({"emb": g})
    dense.step({"emb": g})
    for count in range(5000):
        g[...] = 0
        g[count % 100 % n_rows] = 1.0
        exact.step({"emb": Rows([count % 100 % n_rows], np.ones((1, 1)))})
        dense.step({"emb": g})
    exact.catch_up()
    assert np.allclose(x, y, rtol=1e-12, atol=1e-13)


@by_lazy
def test_many_rows(lazy, rng, threads):
    """Sums in the order of NumPy's, which begin with 0; rows that a hash may throw together."""
    for stride in (1, 64, 4096):
        x = rng.standard_normal((200_000, 1)).astype(np.float32)
        indices = rng.integers(0, 200_000 // stride, 20_000) * stride
        values = rng.standard_normal((20_000, 1)).astype(np.float32)
        g = np.zeros_like(x)
        np.add.at(g, indices, values)
        expected = x - np.float32(0.1) * g
        optcore.SGD(x, lr=0.1, lazy=lazy).step(Rows(indices, values))
        assert same_bits(x, expected)


def test_threads_catch_up_rows_of_every_age(rng):
    """In one step, many of them as old as others are but for a multiple of what is remembered."""
    n, every = 3000, 700
    gradients = [
        Rows(rng.permutation(n)[: n if k % every == every - 1 else 5],
             rng.standard_normal((n, 32), np.float32)[: n if k % every == every - 1 else 5])
        for k in range(2 * every)
    ]
    start = rng.standard_normal((n, 32), np.float32)
    ends = []
    for n_threads in 1, 3:
        x = start.copy()
        opt = optcore.SGD({"emb": x}, lr=0.1, momentum=0.99, weight_decay=0.001)
        optcore.set_num_threads(n_threads)
        try:
            with always_threaded():
                for rows in gradients:
                    opt.step({"emb": rows})
        finally:
            optcore.set_num_threads(None)
        opt.catch_up()
        ends.append(x)
    dense, d = start.astype(np.float64), np.empty((n, 32))
    opt = optcore.SGD({"emb": dense}, lr=0.1, momentum=0.99, weight_decay=0.001)
    for rows in gradients:
        d[...] = 0
        d[rows.indices] = rows.values
        opt.step({"emb": d})
    assert same_bits(*ends)
    np.testing.assert_allclose(ends[0], dense, rtol=1e-4, atol=1e-4)


def test_the_clock_begins_anew_where_it_ends(rng):
    """It counts 2**32 - 1 steps; those before the last few are skipped here."""
    (x, opt), (y, other) = (table(rng, 9, 4, dtype=np.float64, momentum=0.5) for _ in range(2))
    y[...] = x
    rows = [rows_of(rng, (9, 4), "float64", k=2) for _ in range(20)]
    for now in rows[:8]:
        opt.step({"emb": now})
        other.step({"emb": now})
    (history,) = opt._copy_histories()
    make, (n_rows, clock, stamps, runs, *rest) = history.__reduce__()
    most = 2**32 - 1
    by = most - 5 - clock
    opt._take_histories([
        make(n_rows, clock + by, stamps + np.uint32(by), [(at + by, k) for at, k in runs], *rest)
    ])
    for count, now in enumerate(rows[8:]):
        (history,) = opt._copy_histories() or [None]
        assert (history.clock if history else 0) == (most - 5 + count if count < 5 else count - 5)
        opt.step({"emb": now})
        other.step({"emb": now})
    opt.catch_up()
    other.catch_up()
    np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-12)


@by_lazy
def test_a_step_that_is_skipped_leaves_clocks_alone(lazy, rng):
    (x, a), (y, b) = (table(rng, lazy=lazy, skip_nonfinite=True) for _ in range(2))
    y[...] = x
    for count in range(20):
        rows = rows_of(rng, (9, 4), k=2)
        assert a.step({"emb": rows})
        assert b.step({"emb": rows})
        if count % 3 == 0:
            assert not a.step({"emb": Rows([1, 2], np.float32([[1, 2, 3, 4], [0, 0, 0, np.nan]]))})
    assert (a.skipped, b.skipped) == (7, 0)
    assert a.step_count == b.step_count
    a.catch_up()
    b.catch_up()
    assert same_bits(x, y)
    assert frozen(a.state_dict()["state"]) == frozen(b.state_dict()["state"])


def test_the_norm_is_that_of_sums(rng):
    _, opt = table(rng, 9, 4, track_grad_norm=True, weight_decay=0.1)
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    opt.step({"emb": Rows([3, 5, 3], values)})
    assert opt.grad_norm == np.sqrt(np.sum((values[0] + values[2]) ** 2) + np.sum(values[1] ** 2))
    opt.step({"emb": Rows([], values[:0])})
    assert opt.grad_norm == 0
    bad = values.copy()
    bad[1] = np.inf
    opt.step({"emb": Rows([3, 5, 3], bad)})
    assert opt.nonfinite_params == ["emb"]


def test_the_first_step_is_that_of_all_rows(rng):
    """One without rows, too: the others' velocities begin with it."""
    g = np.ones((1, 4))
    for lazy, first in itertools.product(["exact", "rows"], [Rows([], g[:0]), Rows([0], g)]):
        _, opt = table(rng, dtype=np.float64, dampening=0.5, lazy=lazy)
        opt.step({"emb": first})
        opt.step({"emb": Rows([1], g)})
        v = opt.state_dict()["state"][0]["velocity"]
        assert v[1].tolist() == [0.5] * 4
        assert v[0].tolist() == [0.9 * len(first) if lazy == "exact" else len(first)] * 4


# Copies and checkpoints in the middle of a run

def by_state(opt, x, folder):
    y = x.copy()
    state = opt.state_dict()
    y[...] = x                      # which is up to date only now
    new = optcore.SGD({"emb": y}, lr=0.1, momentum=0.9)
    new.load_state_dict(state)
    return new, y


def by_file(opt, x, folder):
    opt.save(folder / "it", include_params=True)
    y = np.zeros_like(x)
    return optcore.SGD.load(folder / "it", {"emb": y}), y


def by_going_back(opt, x, folder):
    """What the restored optimizer's rows have missed since is not theirs any more."""
    opt.save(folder / "it", include_params=True)
    y = np.zeros_like(x)
    new = optcore.SGD({"emb": y}, lr=0.3, momentum=0.5)
    for row in range(9):
        new.step({"emb": Rows([row], np.ones((1, 4), x.dtype))})
    new.restore(folder / "it")
    return new, y


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", [
    by_state, by_file, by_going_back,
    lambda opt, x, folder: copy.deepcopy((opt, x)),
    lambda opt, x, folder: pickle.loads(pickle.dumps((opt, x))),
    lambda opt, x, folder: (lambda new: (new, new.param_groups[0]["params"][0]))(
        copy.deepcopy(opt)),
], ids=["state_dict", "load", "restore", "deepcopy", "pickle", "alone"])
@by_lazy
def test_goes_on_with_the_same_bits(lazy, way, kind, rng, tmp_path):
    x = drawn(rng, (9, 4), kind)
    opt = optcore.SGD({"emb": x}, lr=0.1, momentum=0.9, weight_decay=0.01, lazy=lazy)
    streams = [rows_of(rng, (9, 4), kind, k=2) for _ in range(20)]
    for rows in streams:
        opt.step({"emb": rows})
    new, y = way(opt, x, tmp_path)
    assert y is not x
    if way is by_state and x.dtype.itemsize == 2:
        assert new.state_dict()["state"][0]["master"] is not None
    for rows in streams:
        assert opt.step({"emb": rows})
        assert new.step({"emb": rows})
    held_both = held(opt), held(new)
    assert held_both[0] == held_both[1]
    assert same_bits(x, y)


@pytest.mark.parametrize("hold", [1, 3, 10_000])
def test_copies_know_what_their_rows_have_missed(hold, rng):
    """In the middle of anything: of runs of steps, and of the turns that rows take."""
    x, opt = table(rng, 90, 2, weight_decay=0.01,
                   lr=functools.partial(held_rate, hold))
    copies = []
    for count in range(2000):
        if count in (0, 1, 5, 500, 530, 1100, 1900):
            copies.append(copy.deepcopy((opt, x)) if count % 2 else
                          pickle.loads(pickle.dumps((opt, x))))
        rows = Rows([count % 7], np.ones((1, 2), np.float32))
        for each, _ in [(opt, x), *copies]:
            each.step({"emb": rows})
    before = x.copy()
    for each, y in copies:
        assert same_bits(y, before)
        assert held(each) == held(copies[0][0])
    assert held(opt) == held(copies[0][0])
    assert not same_bits(x, before)


# What is refused, and changes nothing

class Watched:
    """Two tables in the middle of a run, and the same run that nobody disturbs."""

    def __init__(self, rng, lazy):
        self.params = {"bias": np.ones(3, np.float32), **dict(zip(
            ["emb", "out"], draw(rng, (9, 4), (6, 2)), strict=True))}
        self.velocities = {name: np.zeros_like(p) for name, p in self.params.items()}
        self.calm = copy.deepcopy(self.params)
        self.options = {"lr": 0.1, "momentum": 0.9, "lazy": lazy, "track_grad_norm": True}
        self.opt = optcore.SGD(self.params, velocities=self.velocities, **self.options)
        self.other = optcore.SGD(self.calm, **self.options)
        self.streams = [{"bias": None, "emb": rows_of(rng, (9, 4), k=1),
                         "out": rows_of(rng, (6, 2), k=1)} for _ in range(5)]
        self.go_on()

    def go_on(self):
        for grads in self.streams:
            self.opt.step(grads)
            self.other.step(grads)

    def refuses(self, call, error, words):
        before = frozen([self.params, self.velocities])
        seen = self.opt.grad_norm, self.opt.step_count
        with pytest.raises(error, match=words):
            call(self.opt)
        assert frozen([self.params, self.velocities]) == before
        assert (self.opt.grad_norm, self.opt.step_count) == seen

    def went_on(self):
        self.go_on()
        return held(self.opt) == held(self.other)


@by_lazy
@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_bad_indices(dtype, lazy, rng):
    """At every position: the message has it, and the number that stands there."""
    watched = Watched(rng, lazy)
    good = watched.streams[0] | {"bias": np.ones(3, np.float32)}
    ends = np.iinfo(dtype)
    bad = [-1, 9, 10, -9, 2**31 - 1, -2**31, ends.min, ends.max]
    for position, value in itertools.product([0, 2, 4], bad):
        indices = np.array([8, 0, 8, 1, 3], dtype)
        indices[position] = value
        grads = good | {"emb": Rows(indices, np.ones((5, 4), np.float32))}
        words = (r"\[1\] \('emb'\) must have indices in \[0, 9\), the parameter's rows, got "
                 rf"{value} at position {position}$")
        watched.refuses(lambda opt: opt.step(grads), IndexError, "grads" + words)  # noqa: B023
        watched.refuses(lambda opt: opt.step_replicas([good, grads]),              # noqa: B023
                        IndexError, r"replica_grads\[1\]" + words)
    assert watched.went_on()


@pytest.mark.parametrize("value", [2**63, -2**63 - 1, 2**64, 10**30])
@pytest.mark.parametrize("position", [0, 1, 2])
def test_indices_beyond_64_bits(position, value):
    indices = [0, 1, 2]
    indices[position] = value
    with pytest.raises((TypeError, OverflowError)):
        Rows(indices, np.ones((3, 4)))


VALUES = np.ones((2, 4), np.float32)


@pytest.mark.parametrize(("indices", "values", "error", "words"), [
    (np.ones(2), VALUES, TypeError, "indices must have dtype int32 or int64, got float64"),
    (np.ones(2, bool), VALUES, TypeError, "got bool"),
    (np.ones(2, np.uint32), VALUES, TypeError, "got uint32"),
    (np.ones(2, np.int16), VALUES, TypeError, r"got int16: indices\.astype\(np\.int64\) has it"),
    (np.ones(2, ">i4"), VALUES, TypeError, "indices must have dtype"),
    ([0.5, 1], VALUES, TypeError, "got float64"),
    ([True, False], VALUES, TypeError, "got bool"),
    (["a", "b"], VALUES, TypeError, "indices"),
    (None, VALUES, TypeError, "indices"),
    (1, VALUES, TypeError, "indices"),
    (np.int64(1), VALUES, (TypeError, ValueError), "indices"),
    (np.ones((2, 1), int), VALUES, ValueError, r"one dimension, got shape \(2, 1\)"),
    ([[0, 1]], VALUES, ValueError, r"got shape \(1, 2\)"),
    ([0], VALUES, ValueError, r"one row for each of 1 indices, got shape \(2, 4\)"),
    ([0, 1, 2], VALUES, ValueError, r"each of 3 indices, got shape \(2, 4\)"),
    ([0, 1], np.float32(1), (TypeError, ValueError), "values"),
    ([0, 1], [[1.0], [2.0]], TypeError, "values must be a NumPy array, got list"),
    ([0, 1], None, TypeError, "values must be"),
])
def test_what_rows_refuse(indices, values, error, words):
    with pytest.raises(error, match=words):
        Rows(indices, values)


SOME_ROWS = Rows([1, 2], VALUES)


def only(emb, bias=None):
    return {"bias": bias, "emb": emb, "out": None}


def changed_since():
    rows = Rows(np.zeros(2, np.int64), np.ones((2, 4), np.float32))
    rows.values.shape = 4, 2
    return rows


@by_lazy
@pytest.mark.parametrize(("call", "error", "words"), [
    (lambda opt: opt.step(only(Rows([1, 2], VALUES[:, :3]))), ValueError,
     r"grads\[1\] \('emb'\) must have values of shape \(2, 4\), got \(2, 3\)"),
    (lambda opt: opt.step(only(Rows([1, 2], VALUES[..., None]))), ValueError,
     r"must have values of shape \(2, 4\), got \(2, 4, 1\)"),
    (lambda opt: opt.step(only(None, Rows([1, 2], VALUES))), ValueError,
     r"grads\[0\] \('bias'\) must have values of shape \(2,\), got \(2, 4\)"),
    (lambda opt: opt.step(only(Rows([1, 2], np.ones((2, 4))))), TypeError,
     r"grads\[1\] \('emb'\) has dtype float64"),
    (lambda opt: opt.step(only(Rows([1, 2], np.ones((2, 4), int)))), TypeError,
     r"grads\[1\] \('emb'\) has dtype int64"),
    (lambda opt: opt.step(only(changed_since())), ValueError, r"grads\[1\] \('emb'\)"),
    (lambda opt: opt.step(only(SOME_ROWS), zero_grad=True), TypeError,
     r"grads\[1\] \('emb'\) must be an array where gradients are zeroed or bound, got Rows"),
    (lambda opt: opt.step_replicas([only(SOME_ROWS)], zero_grad=True), TypeError,
     "must be an array where gradients are zeroed"),
    (lambda opt: opt.step_replicas([only(SOME_ROWS), only(WHOLE["emb"])]),
     TypeError, "must both be Rows or neither"),
    (lambda opt: opt.step_replicas([only(WHOLE["emb"]), only(SOME_ROWS)]),
     TypeError, "must both be Rows or neither"),
    (lambda opt: opt.step_replicas([only(None), only(SOME_ROWS)]),
     ValueError, "None"),
    (lambda opt: opt.outer_step([only(SOME_ROWS)]), TypeError,
     "must be an array where parameters are given, got Rows"),
])
def test_what_a_step_refuses(call, error, words, lazy, rng):
    watched = Watched(rng, lazy)
    watched.refuses(call, error, words)
    assert watched.went_on()


@by_lazy
@pytest.mark.parametrize(("words", "indices", "values"), [
    (r"params\[1\] \('emb'\)", lambda w: [1, 2], lambda w: w.params["emb"][4:6]),
    (r"params\[2\] \('out'\)", lambda w: [1, 2], lambda w: w.params["out"].reshape(3, 4)[1:]),
    (r"the velocity of params\[1\]|velocities\[1\] \('emb'\)",
     lambda w: [1, 2], lambda w: w.velocities["emb"][:2]),
    (r"params\[0\] \('bias'\)", lambda w: w.params["bias"].view(np.int32)[:2], lambda w: VALUES),
    (r"velocities\[0\] \('bias'\)",
     lambda w: w.velocities["bias"].view(np.int32)[1:], lambda w: VALUES),
])
def test_what_a_step_writes_is_not_read(words, indices, values, lazy, rng):
    watched = Watched(rng, lazy)
    rows = Rows(indices(watched), values(watched))
    watched.refuses(lambda opt: opt.step(only(rows)), ValueError,
                    r"grads\[1\] \('emb'\) must not share memory with (" + words + ")")
    assert watched.went_on()


def fortran(rng):
    return np.asfortranarray(rng.standard_normal((9, 4)))


@pytest.mark.parametrize(("param", "options", "words"), [
    (lambda rng: rng.standard_normal((9, 4)), {"ema_decay": 0.9}, "needs ema_decay=None: "),
    (lambda rng: drawn(rng, (9, 4), "bfloat16"), {"master": None}, "needs a master"),
    (lambda rng: drawn(rng, (9, 4), "float16"), {"master": None, "momentum": 0}, "needs a master"),
    (lambda rng: drawn(rng, (9, 4), "float32"), {"velocity_dtype": "bfloat16"},
     "velocity_dtype other than bfloat16"),
])
def test_what_exact_steps_cannot_do(param, options, words, rng):
    """The same is stepped with `lazy="rows"`."""
    x = param(rng)
    opt = optcore.SGD({"emb": x}, lr=0.1, **{"momentum": 0.9} | options)
    rows = rows_of(rng, (9, 4), "float64" if x.dtype == np.float64 else "float32", k=3)
    before = everything(opt, x)
    with pytest.raises(ValueError, match=r"grads\[0\] \('emb'\): Rows with lazy='exact' needs "
                       rf".*{words.removeprefix('needs ')}.*lazy='rows' leaves rows without"):
        opt.step({"emb": rows})
    assert everything(opt, x) == before
    opt.lazy = "rows"
    opt.step({"emb": rows})
    assert opt.step_count == 1


@by_lazy
@pytest.mark.parametrize("param", [fortran, lambda rng: np.array(1.0)], ids=["F", "0-d"])
def test_parameters_without_rows(param, lazy, rng):
    x = param(rng)
    opt = optcore.SGD(x, lr=0.1, lazy=lazy)
    before = everything(opt, x)
    for rows in Rows([0], np.ones((1, 4))), Rows([], np.ones((0, 4))), Rows([0], np.ones(1)):
        with pytest.raises(ValueError, match="got Rows: its parameter has no rows one after anoth"):
            opt.step(rows)
    assert everything(opt, x) == before


@pytest.mark.parametrize("lazy", ["Exact", None, 1, "", "row", b"rows"])
def test_no_other_way(lazy, rng):
    with pytest.raises((TypeError, ValueError), match="lazy must be"):
        table(rng, lazy=lazy)
    _, opt = table(rng)
    with pytest.raises((TypeError, ValueError), match="lazy must be"):
        opt.lazy = lazy
    assert opt.lazy == "exact"


def test_bound_and_folded_gradients_are_whole(rng):
    x = np.ones((9, 4), np.float32)
    with pytest.raises(TypeError, match="Rows"):
        optcore.SGD(x, lr=0.1, grads=SOME_ROWS)
    opt = optcore.SGD(x, lr=0.1, momentum=0.9, lr_in_velocity=True)
    opt.step(SOME_ROWS)
    before = x.copy()
    with opt.accumulating() as micro:
        with pytest.raises(TypeError, match=r"accumulating\(\) takes whole arrays, got Rows"):
            micro.add(SOME_ROWS)
        assert same_bits(x, before)
        micro.add(WHOLE["emb"])
    with opt.collecting() as mean:
        with pytest.raises(TypeError, match=r"replica_params\[0\] takes whole arrays, got Rows"):
            mean.add(SOME_ROWS)
        mean.add(WHOLE["emb"])
    grads = np.zeros_like(x)
    opt = optcore.SGD(x, lr=0.1, momentum=0.9, grads=grads)
    with pytest.raises(TypeError, match=r"accumulate\(\) takes whole arrays, got Rows"):
        opt.accumulate(SOME_ROWS)
    assert not grads.any()


def test_rows_in_parts(rng):
    params = draw(rng, (9, 4), 3)
    opt, twin = (optcore.SGD(copy.deepcopy(params), lr=0.1, momentum=0.9) for _ in range(2))
    for _ in range(4):
        rows, g = rows_of(rng, (9, 4), k=3), np.ones(3, np.float32)
        with opt.stepping() as part:
            with pytest.raises(IndexError, match=r"grads\[0\] must have.* got 9 at position 1"):
                part.step(0, Rows([0, 9], VALUES))
            part.step(1, g)
            part.step(0, rows)
        twin.step([rows, g])
    assert held(opt) == held(twin)


# What a user makes of it

def test_one_group_more_in_the_middle(rng):
    (x, a), (y, b), w = table(rng), table(rng), np.zeros((2, 3), np.float32)
    y[...] = x
    for count in range(20):
        if count == 10:
            a.add_param_group({"params": {"w": w}, "lr": 0.5})
            b.catch_up()
        grads = {"emb": rows_of(rng, (9, 4), k=2)}
        b.step(grads)
        a.step(grads | ({"w": Rows([1], np.ones((1, 3), np.float32))} if count >= 10 else {}))
    assert held(b)[0]["state"][0] == held(a)[0]["state"][0]
    assert same_bits(x, y)
    assert w.tolist()[0] == [0, 0, 0] != w.tolist()[1]


def test_nobody_else_catches_up_meanwhile(rng):
    x = np.ones((9, 4), np.float32)

    def lr(count):
        with pytest.raises(RuntimeError, match="in use already"):
            opt.catch_up()
        return 0.1

    opt = optcore.SGD(x, lr=lr, momentum=0.9)
    opt.step(SOME_ROWS)
    with opt.stepping() as part:
        with pytest.raises(RuntimeError, match=r"under way, inside stepping\(\)"):
            opt.catch_up()
        part.step(0, SOME_ROWS)
    assert opt.step_count == 2


def test_rows_are_what_was_given(rng):
    indices, values = np.array([3, 1, 3], np.int32), rng.standard_normal((3, 4))
    rows = Rows(indices, values)
    assert rows.indices is indices
    assert rows.values is values
    assert len(rows) == 3
    assert repr(rows) == "Rows(3 rows of float64 (4,))"
    with pytest.raises(AttributeError):
        rows.indices = indices
    again = pickle.loads(pickle.dumps(rows))
    assert same_bits(again.indices, indices)
    assert same_bits(again.values, values)
    values.flags.writeable = indices.flags.writeable = False
    optcore.SGD(np.ones((4, 4)), lr=0.1).step(Rows(indices, values))
    scattered = Rows(np.arange(6)[::2], rng.standard_normal((4, 3)).T)
    assert scattered.values.flags.c_contiguous
    assert scattered.indices.tolist() == [0, 2, 4]


@by_lazy
def test_whatever_says_the_same(lazy, rng, cases):
    """Kinds of indices, order of rows, and sums: only the order of duplicates counts."""
    values = rng.standard_normal((4, 5)).astype(np.float32)
    ways = [
        Rows([7, 2, 7, 0], values), Rows(np.array([7, 2, 7, 0], np.int32), values),
        Rows([2, 7, 0, 7], values[[1, 0, 3, 2]]), Rows((7, 2, 7, 0), np.asfortranarray(values)),
        Rows.concatenate([Rows(np.int32([7]), values[:1]), Rows([2, 7, 0], values[1:])]),
        Rows([7, 2, 0], np.stack([values[0] + values[2], values[1], values[3]])),
        Rows(array_of([7, 2, 7, 0]), values),
    ]
    x, ends = rng.standard_normal((9, 5)).astype(np.float32), []
    for rows in ways:
        y = x.copy()
        opt = optcore.SGD(y, lr=0.1, momentum=0.9, weight_decay=0.1, lazy=lazy)
        opt.step(rows)
        opt.step(rows)
        ends.append(held(opt))
        cases(ends[-1] == ends[0], rows)


def array_of(numbers):
    return array.array("q", numbers)


def test_rows_of_tensors(rng):
    torch = pytest.importorskip("torch", reason="torch is missing")
    x, y = np.ones((9, 4), np.float32), torch.ones(9, 4)
    indices, values = torch.tensor([3, 3, 1]), torch.arange(12.0).reshape(3, 4)
    a, b = (optcore.SGD(p, lr=0.1, momentum=0.9) for p in (x, y))
    for sparse in (Rows(indices, values),
                   torch.sparse_coo_tensor(indices[None], values, (9, 4), check_invariants=True)):
        a.step(Rows([3, 3, 1], values.numpy()))
        b.step(sparse)
        assert same_bits(x, y.numpy())


# Histories stay bounded

@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux says it")
def test_histories_stay_bounded(tmp_path, times):
    """Each step is another matrix to one table and the same to another, whose last row sleeps.

    Memory is flat after the first tenth. The sleeper is what the product of its steps' factors
    says, each of which has been rounded, to 2**-53.
    """
    script = tmp_path / "sleep.py"
    script.write_text(textwrap.dedent("""
        import math
        import sys
        from pathlib import Path
        import numpy as np
        import optcore

        def resident():
            line, = (line for line in Path("/proc/self/status").read_text().splitlines()
                     if line.startswith("VmRSS"))
            return int(line.split()[1]) * 1024

        STEPS, DECAY = int(sys.argv[1]), 1e-5
        lr = (0.1 / (1 + np.arange(STEPS) / 1e5)).tolist()
        tables = [np.full((3, 1), 2.0) for _ in range(2)]
        own = [np.full((3, 1), 3.0) for _ in range(2)]
        opt = optcore.SGD(
            [{"params": [tables[0]], "lr": lr.__getitem__}, {"params": [tables[1]], "lr": 0.1}],
            momentum=0.9, weight_decay=DECAY, decoupled_weight_decay=True, velocities=own)
        rows = [optcore.Rows([0], np.ones((1, 1)))] * 2
        for _ in range(STEPS // 10):
            opt.step(rows)
        before = resident()
        for _ in range(STEPS - STEPS // 10):
            opt.step(rows)
        grown = resident() - before
        opt.catch_up(0, [2])
        opt.catch_up(1, [2])
        for (x, v), rates in zip(zip(tables, own), (lr, [0.1] * STEPS)):
            moved, velocity = 2.0, 3.0
            for a in rates[:2000]:          # after which the velocity is nothing beside it
                velocity *= 0.9
                moved = moved * (1 - a * DECAY) - a * velocity
            rest = math.fsum(math.log1p(-a * DECAY) for a in rates[2000:])
            print(abs(x[2, 0] / (moved * math.exp(rest)) - 1), v[2, 0])
        print(grown)
    """))
    n_steps = 200_000 * times
    done = subprocess.run([sys.executable, str(script), str(n_steps)], capture_output=True,
                          text=True, check=True)
    *sleepers, grown = done.stdout.split()
    assert int(grown) < 1 << 18
    assert max(map(float, sleepers[::2])) < n_steps * 2.0**-53
    assert max(map(float, sleepers[1::2])) < 1e-300


# Where rows are behind, what else happens

def lagging(lazy, **options):
    """Four rows, three of which have three steps to catch up, or the same by dense steps."""
    x = np.ones((4, 2))
    opt = optcore.SGD([x], lr=0.1, momentum=0.9, **options)
    opt.step([Rows([0, 1, 2, 3], np.ones((4, 2)))])
    for _ in range(3):
        opt.step([Rows([0], np.ones((1, 2)))] if lazy else [np.eye(4)[:, :1] * np.ones(2)])
    return x, opt


@pytest.mark.parametrize("call", [
    lambda opt: setattr(opt, "ema_decay", 0.5),
    lambda opt: opt.outer_step([[np.zeros((4, 2))]]),
    lambda opt: opt.add_param_group({"params": [np.ones(3)]}),
    lambda opt: opt.save("rows.safetensors"),
], ids=["average", "outer_step", "growth", "save"])
def test_what_reads_all_rows_reads_them_up_to_date(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = []
    for lazy in (True, False):
        x, opt = lagging(lazy, track_grad_norm=True)
        call(opt)
        found.append((x, opt.grad_norm, *(entry["ema"] for entry in opt._state)))
    for late, dense in zip(*found, strict=True):
        assert late is dense is None or np.allclose(late, dense, rtol=1e-14, atol=0)


@pytest.mark.parametrize("call", [
    lambda opt: opt.add_param_group({"params": [np.ones(3)]}, velocities=[np.ones(4)]),
    lambda opt: opt.add_param_group({"params": [np.ones(3)], "lr": -1}),
    lambda opt: [opt.param_groups[0].update(lr=-1), opt.state_dict()],
    lambda opt: opt.step([Rows([4], np.ones((1, 2)))]),
    lambda opt: opt.catch_up(0, [0, 4]),
], ids=["velocities", "group", "edited", "step", "catch_up"])
def test_refused_calls_bring_no_row_up_to_date(call):
    x, opt = lagging(True)
    before = x.copy()
    with pytest.raises((IndexError, ValueError)):
        call(opt)
    assert same_bits(x, before)


def test_refused_rows_start_no_velocities():
    x = np.ones((4, 2))
    opt = optcore.SGD([x], lr=0.1)
    opt.momentum = 0.9
    with pytest.raises(IndexError):
        opt.step([Rows([4], np.ones((1, 2)))])
    assert opt._state[0]["velocity"] is None


def test_rows_beside_a_strided_gradient():
    a, b = np.zeros((4, 2)), np.zeros(6)
    optcore.SGD([a, b], lr=1).step([Rows([1], np.ones((1, 2))), np.ones(12)[::2]])
    assert a.sum() == a[1].sum() == -2
    assert (b == -1).all()


@pytest.mark.parametrize("call", [
    lambda opt, n: opt.step([Rows(np.arange(n), np.ones((n, 1)))]),
    lambda opt, n: opt.catch_up(0, np.arange(n)),
], ids=["step", "catch_up"])
def test_a_parameter_reshaped_in_its_place(call):
    x = np.zeros((100, 64))
    opt = optcore.SGD([x], lr=0.1, momentum=0.9)
    opt.step([Rows([0], np.ones((1, 64)))])
    opt.step([Rows([1], np.ones((1, 64)))])
    before = x.copy()
    x.shape = (6400, 1)
    with pytest.raises(ValueError, match=r"params\[0\] must keep its shape"):
        call(opt, 6400)
    assert same_bits(x, before.reshape(x.shape))
    opt.catch_up()
    call(opt, 6400)


def test_a_read_only_parameter_is_saved_where_no_row_is_behind():
    x, opt = lagging(True)
    opt.catch_up()
    x.flags.writeable = False
    assert opt.state_dict()["step_count"] == 4


def test_misaligned_arrays_are_copied():
    memory = np.zeros(25, np.uint8)
    indices = np.ndarray((3,), np.int64, buffer=memory, offset=1)
    rows = Rows(indices, np.ndarray((3, 1), np.float64, buffer=memory, offset=1))
    assert rows.indices.flags.aligned
    assert rows.values.flags.aligned


def test_an_infinite_row_keeps_its_velocity():
    """0 * x in the matrix's product would make a NaN of it."""
    x = np.ones((2, 1))
    opt = optcore.SGD([x], lr=0.1, momentum=0.5)
    opt.step([Rows([0], np.ones((1, 1)))])
    x[0] = np.inf
    opt.step([Rows([1], np.ones((1, 1)))])
    opt.catch_up()
    assert opt._state[0]["velocity"].tolist() == [[0.5], [1.0]]
