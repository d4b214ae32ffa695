"""Steps in pieces: parameter by parameter, micro-batch by micro-batch, replica by replica."""
from __future__ import annotations

import copy
import pickle
import tracemalloc

import numpy as np
import pytest
from test_outer import (
    HALVES,
    SIZES,
    made_as,
    on_some_machine,
    random_options,
    random_storage,
)
from twin import Twin, draw, everything

import optcore
from optcore import pieces
from reference import same_bits

FLOATS = ["float32", "float64"]


def gradients(rng, kind, missing=0.2):
    kinds = ["float64"] if kind == "float64" else ["float32", *HALVES]
    grads = [made_as(rng, kinds[rng.integers(len(kinds))])[i] for i in range(len(SIZES))]
    return [None if rng.random() < missing else g for g in grads]


def model(rng, *, names=False, **options):
    params = draw(rng, 300, (20, 30), 7)
    if names:
        params = dict(zip("abc", params, strict=True))
    return params, optcore.SGD(params, lr=0.1, **options)


def used(context, *calls, error=None):
    """Enter a piece, make its calls, each a method's name and arguments, and leave it."""
    with context as piece:
        for name, *arguments in calls:
            getattr(piece, name)(*arguments)
        if error is not None:
            raise error
    return piece


def interrupted(context, *calls):
    with pytest.raises(KeyboardInterrupt):
        used(context, *calls, error=KeyboardInterrupt)


# Parameter by parameter

def random_parts(rng, n):
    """All parameters in some order, in buckets of some sizes."""
    order, parts = [int(i) for i in rng.permutation(n)], []
    while order:
        k = rng.integers(1, 4)
        parts.append(order[:k])
        order = order[k:]
    return parts


@pytest.mark.parametrize("kind", [*FLOATS, *HALVES])
def test_stepping_is_a_step(kind, rng, cases, times):
    for _ in range(5 * times):
        params = made_as(rng, kind)
        options = random_options(rng, kind) | {"skip_nonfinite": False, "track_grad_norm": False}
        opt = optcore.SGD(params, **options | {"lr": lambda count: 0.1 / (1 + count)})
        twin = Twin(opt)
        with on_some_machine(rng):
            for _ in range(3):
                grads = gradients(rng, kind)
                if all(g is None for g in grads):
                    grads = made_as(rng, kind)
                with opt.stepping(grad_scale=0.5) as part:
                    for indices in random_parts(rng, len(params)):
                        if len(indices) == 1:
                            part.step(indices[0], grads[indices[0]])
                        else:
                            part.step({i: grads[i] for i in indices})
                twin.step(grads, 0.5)
                twin.check()
                cases(True, kind)


def test_names_indices_and_what_is_left_out(rng):
    _, opt = model(rng, names=True, momentum=0.9)
    twin = Twin(opt)
    a, b, c = draw(rng, 300, (20, 30), 7)
    with opt.stepping() as part:
        part.step("c", c)
        part.step(np.int64(0), a)
        part.step("b", None)
    assert twin.step([a, None, c])
    twin.check()
    with opt.stepping() as part:        # b's own first step is this
        part.step({"b": b})
    twin.step([None, b, None])
    twin.check()


def test_one_buffer_serves_all_layers(rng):
    params = draw(rng, 100, (20, 30), 600)
    opt = optcore.SGD(params, lr=0.1, momentum=0.9, nesterov=True)
    twin = Twin(opt)
    buffer = np.empty(600, np.float32)
    for _ in range(3):
        grads = []
        with opt.stepping(zero_grad=True) as part:
            for i, p in enumerate(params):
                g = buffer[: p.size].reshape(p.shape)
                g[...] = rng.standard_normal(p.shape)
                grads.append(g.copy())
                part.step(i, g)
                assert not g.any()
        twin.step(grads)
        twin.check()


def test_a_bucket_that_is_zeroed_may_not_overlap(rng):
    params, opt = model(rng)
    grad = np.ones(600, np.float32)
    with opt.stepping(zero_grad=True) as part:
        before = [p.copy() for p in params]
        with pytest.raises(ValueError, match=r"grads\[1\] must not share memory with grads\[0\]"):
            part.step({0: grad[:300], 1: grad.reshape(20, 30)})
        assert all(map(same_bits, params, before))
        part.step({0: grad[:300], 2: grad[300:307]})
        part.step({1: grad.reshape(20, 30)})
    assert opt.step_count == 1


def test_bound_gradients_and_scattered_ones(rng):
    params = draw(rng, (20, 30), 7)
    grads = [np.zeros((30, 20), np.float32).T, np.zeros(7, np.float32)]
    opt = optcore.SGD(params, lr=0.1, momentum=0.9, grads=grads)
    twin = Twin(opt)
    for _ in range(2):
        for g in grads:
            g[...] = rng.standard_normal(g.shape)
        kept = [g.copy() for g in grads]
        with opt.stepping(zero_grad=True) as part:
            part.step(1)
            part.step(0)
        assert not any(g.any() for g in grads)
        twin.step(kept)
        twin.check()


@pytest.mark.parametrize(("step", "error", "words"), [
    (lambda part, g: part.step("d", g), KeyError, r"index in \[0, 3\) or name, one of \['a', 'b'"),
    (lambda part, g: part.step(3, g), IndexError, r"key must be in \[0, 3\)"),
    (lambda part, g: part.step(-1, g), IndexError, "got -1"),
    (lambda part, g: part.step([0], g), TypeError, "name or index, got list"),
    (lambda part, g: part.step(True, g), KeyError, "got True"),
    (lambda part, g: part.step("a", g[:5]), ValueError, r"grads\[0\] \('a'\) has shape \(5,\)"),
    (lambda part, g: part.step({"c": g[:7], "a": g[:5]}), ValueError, "has shape"),
    (lambda part, g: part.step("b", g), ValueError, "('b') must be stepped once in a step"),
    (lambda part, g: part.step({"a": g, 0: g}), ValueError, "must be stepped once"),
    (lambda part, g: part.step({"a": g}, g), TypeError, "grad must be left out where a mapping"),
    (lambda part, g: part.step("a"), TypeError, "where none were bound"),
])
def test_what_stepping_refuses(step, error, words, rng):
    params, opt = model(rng, names=True, momentum=0.9)
    g = np.ones(300, np.float32)
    with opt.stepping() as part:
        part.step("b", np.ones((20, 30), np.float32))
        before = {name: p.tobytes() for name, p in params.items()}
        with pytest.raises(error, match=words.replace("('b')", r"\('b'\)")):
            step(part, g)
        assert {name: p.tobytes() for name, p in params.items()} == before
        part.step({"a": g, "c": g[:7]})
    assert opt.step_count == 1


def test_an_exception_between_two_parameters_leaves_one_stepped(rng):
    params, opt = model(rng, momentum=0.9)
    twin = Twin(opt)
    g = np.ones(300, np.float32)
    part = opt.stepping()
    interrupted(part, ("step", 0, g))
    twin.step([g, None, None])
    twin.check()
    interrupted(opt.stepping())
    twin.check()            # nothing was stepped, nothing counts
    with pytest.raises(RuntimeError, match=r"step\(\) must be called inside the with block"):
        part.step(1, params[1])
    with pytest.raises(RuntimeError, match="entered once"), part:
        pass


# What any of them says of other calls

@pytest.mark.parametrize("enter", ["stepping", "accumulating"])
def test_other_calls_are_refused_in_the_middle_of_a_step(enter, rng):
    params, opt = model(rng, momentum=0.9)
    grads = [np.ones_like(p) for p in params]
    with getattr(opt, enter)() as piece:
        if enter == "stepping":
            piece.step(0, grads[0])
        else:
            piece.add(grads)
        before = [p.tobytes() for p in params], opt.step_count
        for call in (
            lambda: opt.step(grads), lambda: opt.step_replicas([grads]), opt.state_dict,
            lambda: opt.outer_step([grads]), lambda: opt.stepping().__enter__(),
            lambda: opt.accumulating().__enter__(), lambda: setattr(opt, "lr", 0.5),
            lambda: opt.add_param_group({"params": [np.ones(2, np.float32)]}),
            lambda: copy.deepcopy(opt), lambda: setattr(opt, "max_norm", 1.0),
        ):
            with pytest.raises(RuntimeError, match=rf"under way, inside {enter}\(\): leave its"):
                call()
        with pytest.raises(TypeError, match="cannot be copied or pickled"):
            pickle.dumps(piece)
        assert ([p.tobytes() for p in params], opt.step_count) == before
    assert opt.step_count == 1
    opt.step(grads)


@pytest.mark.parametrize("enter", ["stepping", "accumulating"])
def test_in_the_middle_of_another_step(enter, rng):
    """By a schedule; and a piece's own schedule may not call either."""
    calls = []

    def lr(count):
        for call in calls:
            with pytest.raises(RuntimeError, match="in use already"):
                call()
        return 0.1

    params = draw(rng, 300, 7)
    opt = optcore.SGD(params, lr=lr, momentum=0.9)
    grads = [np.ones_like(p) for p in params]
    calls += [getattr(opt, enter)().__enter__, lambda: opt.step(grads)]
    opt.step(grads)
    with getattr(opt, enter)() as piece:
        assert piece.add(grads) is None if enter == "accumulating" else piece.step(
            dict(enumerate(grads))) is None
    assert opt.step_count == 2


@pytest.mark.parametrize("enter", ["stepping", "accumulating"])
@pytest.mark.parametrize("option", [{"max_norm": 1.0}, {"skip_nonfinite": True},
                                    {"track_grad_norm": True}])
def test_what_needs_the_norm_is_refused(enter, option, rng):
    _, opt = model(rng, momentum=0.9, **option)
    before = everything(opt)
    with pytest.raises(ValueError, match=rf"{enter}\(\) needs max_norm=None.*before the first"):
        getattr(opt, enter)().__enter__()
    assert everything(opt) == before


@pytest.mark.parametrize(("enter", "words"), [
    ("stepping", "at least one gradient by step"), ("accumulating", "at least one gradient by add"),
    ("collecting", "at least one replica's parameters by add"),
])
def test_nothing_given(enter, words, rng):
    _, opt = model(rng, momentum=0.9)
    before = everything(opt)
    with pytest.raises(ValueError, match=words), getattr(opt, enter)():
        pass
    assert everything(opt) == before
    opt.step([p.copy() for p in opt.param_groups[0]["params"]])


@pytest.mark.parametrize("kind", [pieces.Stepping, pieces.Accumulating, pieces.Collecting])
def test_made_otherwise(kind):
    for arguments in ((), (None, 1.0), ([], 1.0)):
        with pytest.raises(TypeError):
            kind.__new__(kind, *arguments)


@pytest.mark.parametrize("bad", [0, -1.0, np.nan, "1", None])
@pytest.mark.parametrize("enter", ["stepping", "accumulating", "collecting"])
def test_grad_scale_is_checked(enter, bad, rng):
    params, opt = model(rng, momentum=0.9)
    before = everything(opt)
    with pytest.raises((TypeError, ValueError), match="grad_scale must"):
        used(getattr(opt, enter)(grad_scale=bad), ("add", [p.copy() for p in params]))
    assert everything(opt) == before


def test_a_loaded_state_ends_a_step(rng):
    params, opt = model(rng, momentum=0.9)
    grads = [np.ones_like(p) for p in params]
    opt.step(grads)
    state = opt.state_dict()
    with opt.stepping() as part:
        part.step(0, grads[0])
        opt.load_state_dict(state)
    assert opt.step_count == 1
    with opt.accumulating() as micro:
        micro.add(grads)
        opt.load_state_dict(state)
    assert opt.step_count == 1
    assert same_bits(opt.state_dict()["state"][0]["velocity"], state["state"][0]["velocity"])


# Micro-batch by micro-batch

def linear_options(rng, kind):
    lr_in_velocity = bool(rng.integers(2))
    return {
        **random_storage(rng, kind),
        "velocity_dtype": None,
        "lr": float(rng.choice([1.0, 0.1])),
        "momentum": float(rng.choice([0.5, 0.9])),
        "lr_in_velocity": lr_in_velocity,
        "dampening": 0.0 if lr_in_velocity else float(rng.choice([0, 0.25])),
        "dampen_first": bool(rng.integers(2)),
        "weight_decay": float(rng.choice([0, 0.01])),
        "decoupled_weight_decay": True,
        "maximize": bool(rng.integers(2)),
        "ema_decay": [None, 0.9][rng.integers(2)],
    }


@pytest.mark.parametrize("kind", [*FLOATS, *HALVES])
def test_accumulating_follows_its_twin(kind, rng, cases, times):
    for _ in range(8 * times):
        params = made_as(rng, kind)
        opt = optcore.SGD(params, **linear_options(rng, kind))
        twin = Twin(opt)
        with on_some_machine(rng):
            for _ in range(3):
                batches = [gradients(rng, kind) for _ in range(rng.integers(1, 5))]
                batches = [g for g in batches if any(a is not None for a in g)] or [
                    made_as(rng, kind)]
                before = [p.tobytes() for p in params]
                with opt.accumulating(grad_scale=1 / len(batches)) as micro:
                    for grads in batches:
                        micro.add(grads)
                        assert [p.tobytes() for p in params] == before
                twin.accumulate(batches, 1 / len(batches))
                twin.check()
                cases(True, kind)


def test_one_batch_is_a_step(rng):
    params, opt = model(rng, momentum=0.9, dampening=0.5)
    other, plain = copy.deepcopy((params, opt))
    for _ in range(3):
        grads = draw(rng, 300, (20, 30), 7)
        grads[2][0] = -0.0
        with opt.accumulating() as micro:
            micro.add(grads)
        plain.step(grads)
        assert all(map(same_bits, params, other))
        for mine, its in zip(opt._state, plain._state, strict=True):
            assert same_bits(mine["velocity"], its["velocity"])


def test_bound_gradients_are_folded(rng):
    params, grads = draw(rng, 300, 7), draw(rng, 300, 7)
    opt = optcore.SGD(params, lr=0.1, momentum=0.9, grads=grads)
    twin = Twin(opt)
    with opt.accumulating() as micro:
        micro.add()
        micro.add()
    twin.accumulate([grads, grads])
    twin.check()


@pytest.mark.parametrize(("options", "words"), [
    ({}, "needs momentum > 0: without a velocity"),
    ({"momentum": 0.9, "nesterov": True}, "needs nesterov=False: its step needs the whole"),
    ({"momentum": 0.9, "weight_decay": 0.1}, "decoupled_weight_decay=True: coupled decay"),
    ({"momentum": 0.9, "clip_value": 1.0}, "needs clip_value=None"),
    ({"momentum": 0.9, "flush_subnormals": True}, "needs flush_subnormals=False"),
    ({"momentum": 0.9, "velocity_dtype": optcore.bfloat16}, "needs velocity_dtype=None"),
    ({"momentum": lambda count: 0.9 * (count > 5)}, "needs momentum > 0"),
])
def test_what_cannot_be_folded_is_refused(options, words, rng):
    params, opt = model(rng, **options)
    before = everything(opt)
    with pytest.raises(ValueError, match=words):
        opt.accumulating().__enter__()
    assert everything(opt) == before
    opt.step([np.ones_like(p) for p in params])


def test_a_group_that_cannot_be_folded_is_named(rng):
    a, b = draw(rng, 3, 4)
    opt = optcore.SGD([{"params": [a]}, {"params": [b], "momentum": 0}], lr=0.1, momentum=0.9)
    with pytest.raises(ValueError, match=r"param_groups\[1\]: accumulating\(\) needs momentum > 0"):
        opt.accumulating().__enter__()


def test_a_bad_batch_changes_nothing(rng):
    params, opt = model(rng, momentum=0.9)
    twin = Twin(opt)
    good = [None, *(np.ones_like(p) for p in params[1:])]
    first = np.ones_like(params[0])
    with opt.accumulating() as micro:
        micro.add(good)
        for bad, error in [(good[:2], ValueError), ([None] * 3, ValueError), (None, TypeError),
                           ([params[0], None, None], ValueError),
                           ([first.astype(np.float64), *good[1:]], TypeError),
                           ([first, first, None], ValueError)]:
            with pytest.raises(error):
                micro.add(bad)
        micro.add(good)
        with pytest.raises(ValueError, match="has shape"):
            micro.add([first, first, None])
    twin.accumulate([good, good])
    twin.check()


def test_an_interrupted_accumulation_goes_on(rng):
    params, opt = model(rng, momentum=0.9)
    twin = Twin(opt)
    batches = [draw(rng, 300, (20, 30), 7) for _ in range(3)]
    before = [p.tobytes() for p in params]
    micro = opt.accumulating(grad_scale=0.5)
    interrupted(micro, ("add", batches[0]), ("add", batches[1]))
    assert [p.tobytes() for p in params] == before
    for call in (lambda: opt.step(batches[0]), opt.state_dict, lambda: opt.stepping().__enter__()):
        with pytest.raises(RuntimeError, match=r"go on with `with opt\.accumulating"):
            call()
    with pytest.raises(RuntimeError, match="inside the with block"):
        micro.add(batches[2])
    with pytest.raises(ValueError, match=r"grad_scale must be 0\.5"):
        opt.accumulating()
    with opt.accumulating(grad_scale=0.5) as micro:
        micro.add(batches[2])
    twin.accumulate(batches, 0.5)
    twin.check()


def test_a_state_loaded_after_an_interruption(rng):
    _, opt = model(rng, momentum=0.9)
    grads = draw(rng, 300, (20, 30), 7)
    opt.step(grads)
    state, twin = opt.state_dict(), Twin(opt)
    twin.velocities = [e["velocity"].copy() for e in state["state"].values()]
    twin.started, twin.count = [True] * 3, 1
    interrupted(opt.accumulating(), ("add", grads))
    with pytest.raises(KeyError):
        opt.load_state_dict({})
    with pytest.raises(RuntimeError, match="go on with"):
        opt.step(grads)
    opt.load_state_dict(state)
    opt.step(grads)
    twin.step(grads)
    twin.check()


def test_an_interruption_before_the_first_batch_is_none(rng):
    params, opt = model(rng, momentum=0.9)
    before = everything(opt)
    interrupted(opt.accumulating())
    assert everything(opt) == before
    opt.step([np.ones_like(p) for p in params])


def test_no_array_is_made_for_the_sum(rng):
    x, g = np.ones(1_000_000, np.float32), np.ones(1_000_000, np.float32)
    opt = optcore.SGD(x, lr=0.1, momentum=0.9)
    opt.step(g)
    tracemalloc.start()
    try:
        with opt.accumulating() as micro:
            for _ in range(4):
                micro.add(g)
        with opt.stepping() as part:
            part.step(0, g)
        assert tracemalloc.get_traced_memory()[1] < 20_000
    finally:
        tracemalloc.stop()


# Replica by replica

WEIGHTS = [None, [3, 1, 2, 5], [0, 2, 0, 7], [0.1, 0.2, 0.7, 1e-3], [2, 2, 2, 2]]


@pytest.mark.parametrize("kind", [*FLOATS, *HALVES])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_collecting_follows_its_twin(kind, weights, rng, cases, times):
    kinds = ["float64"] if kind == "float64" else ["float32", *HALVES]
    for k in range(4 * times):
        params = made_as(rng, kind)
        opt = optcore.SGD(params, **random_options(rng, kind))
        twin = Twin(opt)
        total = None if weights is None or k % 2 else sum(weights)
        with on_some_machine(rng):
            for _ in range(2):
                replicas = [made_as(rng, kinds[rng.integers(len(kinds))]) for _ in range(4)]
                left_out = rng.integers(len(SIZES))
                for replica in replicas:
                    replica[left_out] = None
                if rng.integers(3) == 0 and kind in FLOATS and replicas[1][5] is not None:
                    replicas[1][5] = np.full(1000, np.nan, replicas[1][5].dtype)
                    if replicas[1][5].dtype.kind == "u":
                        replicas[1][5][...] = 0x7FC0
                with opt.collecting(total=total, grad_scale=0.5) as mean:
                    for replica, w in zip(replicas, weights or [None] * 4, strict=True):
                        mean.add([None if p is None else p.copy() for p in replica], w)
                        assert mean.applied is None
                assert mean.applied is twin.collect(replicas, weights, total, 0.5)
                twin.check()
                cases(True, (kind, weights))


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("total", [True, False])
def test_collecting_is_an_outer_step(weights, total, rng):
    x, *replicas = [rng.standard_normal(3000).astype(np.float32) for _ in range(5)]
    for array in (x, *replicas):
        array[:9] = -0.0
    y = x.copy()
    a, b = (optcore.SGD(p, lr=0.7, momentum=0.9, nesterov=True) for p in (x, y))
    total = sum(weights) if total and weights else None
    with a.collecting(total=total) as mean:
        for replica, w in zip(replicas, weights or [None] * 4, strict=True):
            mean.add(replica, w)
    if total is None and weights and len(set(weights)) == 1:
        weights = None
    b.outer_step(replicas, weights=weights)
    if total is not None or weights is None:
        assert same_bits(x, y)
    else:
        assert not same_bits(x, y) or 0 in weights
        np.testing.assert_allclose(x, y, rtol=0, atol=2e-6)


def test_a_sum_of_zeros_keeps_its_sign():
    x, y, replica = (np.full(9, -0.0, np.float32) for _ in range(3))
    used(optcore.SGD(x, lr=0.5).collecting(), ("add", replica))
    optcore.SGD(y, lr=0.5).outer_step([replica])
    assert same_bits(x, y)


def test_an_exception_leaves_all_as_it_was_and_others_may_step(rng):
    params, opt = model(rng, momentum=0.9)
    replica = [np.ones_like(p) for p in params]
    before = everything(opt)
    mean = opt.collecting()
    interrupted(mean, ("add", replica))
    assert everything(opt) == before
    with pytest.raises(RuntimeError, match="inside the with block"):
        mean.add(replica)
    twin = Twin(opt)
    with opt.collecting() as mean:
        mean.add(replica)
        opt.step(replica)           # it holds nothing of the optimizer's
        mean.add([p + 1 for p in replica])
    twin.step(replica)
    twin.outer_step([replica, [p + 1 for p in replica]])
    twin.check()


def test_a_round_that_cannot_be_ended_is_kept(rng):
    _, opt = model(rng, momentum=0.9)
    twin = Twin(opt)
    replicas = [draw(rng, 300, (20, 30), 7) for _ in range(3)]
    mean = opt.collecting()
    opt.param_groups[0]["lr"] = -1
    with pytest.raises(ValueError, match="lr must"):
        used(mean, ("add", replicas[0]), ("add", replicas[1]))
    opt.param_groups[0]["lr"] = 0.1
    used(mean, ("add", replicas[2]))
    twin.outer_step(replicas)
    twin.check()
    assert mean.applied is True
    with pytest.raises(RuntimeError, match="entered once"):
        mean.__enter__()


@pytest.mark.parametrize(("add", "error", "words"), [
    (lambda mean, r: mean.add(r, 1.0), TypeError, "for every replica or for none"),
    (lambda mean, r: mean.add(r[:2]), ValueError, "must have one entry for each of 3"),
    (lambda mean, r: mean.add([r[0], None, r[2]]), ValueError,
     r"replica_params\[1\]\[1\] and its counterpart in replica_params\[0\] must both be None"),
    (lambda mean, r: mean.add([None] * 3), ValueError, "at least one array"),
    (lambda mean, r: mean.add([r[0], r[2], r[2]]), ValueError, r"has shape \(7,\)"),
    (lambda mean, r: mean.add([p.astype(np.float64) for p in r]), TypeError, "float32"),
])
def test_what_add_refuses(add, error, words, rng):
    params, opt = model(rng, momentum=0.9)
    replica = [np.ones_like(p) for p in params]
    twin = Twin(opt)
    with opt.collecting() as mean:
        mean.add(replica)
        with pytest.raises(error, match=words):
            add(mean, replica)
        mean.add(replica)
    twin.outer_step([replica, replica])
    twin.check()


@pytest.mark.parametrize(("total", "weights", "words"), [
    (None, [0, 0], "finite sum > 0, got 0.0"),
    (4, [1, 2], "total must be the sum of all weights, 3.0, got 4.0"),
    (None, [-1], "weight must"),
    (None, [1.0, np.inf], "weight must"),
    (None, [1e-300, 1e300], "neither vanish beside the others nor overflow"),
    (None, [1e308, 1e308], "nor overflow"),
    (1e300, [1e-100], "neither vanish"),
    (0, [1], "total must"),
    (np.nan, [1], "total must"),
])
def test_weights_that_are_refused(total, weights, words, rng):
    params, opt = model(rng, momentum=0.9)
    before = everything(opt)
    replica = [np.ones_like(p) for p in params]
    with pytest.raises(ValueError, match=words):
        used(opt.collecting(total=total), *[("add", replica, w) for w in weights])
    assert everything(opt) == before


def test_total_wants_weights(rng):
    params, opt = model(rng)
    with pytest.raises(TypeError, match="weight must be given where total is"):
        used(opt.collecting(total=2), ("add", [p.copy() for p in params]))


def test_parameters_added_meanwhile_are_noticed(rng):
    params, opt = model(rng)
    replica = [np.ones_like(p) for p in params]
    more = [*replica, np.ones(2, np.float32)]
    mean = opt.collecting().__enter__()
    mean.add(replica)
    opt.add_param_group({"params": [np.ones(2, np.float32)]})
    for call in (lambda: mean.add(more), lambda: mean.__exit__(None, None, None)):
        with pytest.raises(ValueError, match=r"must have the 3 parameters that there were"):
            call()


def test_replicas_of_any_kind(rng, tmp_path):
    x = rng.standard_normal((30, 40)).astype(np.float32)
    y, replica = x.copy(), rng.standard_normal((30, 40)).astype(np.float32)
    np.save(tmp_path / "replica.npy", replica)
    mapped = np.load(tmp_path / "replica.npy", mmap_mode="r")
    a, b = optcore.SGD(x, lr=0.5), optcore.SGD(y, lr=0.5)
    with a.collecting() as mean:
        mean.add(mapped)
        mean.add(np.asfortranarray(replica))
    b.outer_step([replica, replica])
    assert same_bits(x, y)
    a.outer_step([mapped])
    b.outer_step([replica])
    assert same_bits(x, y)
    with pytest.raises(ValueError, match=r"writeable|read-only"):
        a.outer_step([mapped], write_back=True)


def test_one_buffer_serves_all_replicas(rng):
    x, replica = np.zeros(500_000, np.float32), np.ones(500_000, np.float32)
    opt = optcore.SGD(x, lr=1.0)
    tracemalloc.start()
    try:
        with opt.collecting() as mean:
            for _ in range(6):
                mean.add(replica)
        assert tracemalloc.get_traced_memory()[1] < x.nbytes + 100_000
    finally:
        tracemalloc.stop()
    assert (x == 1).all()
