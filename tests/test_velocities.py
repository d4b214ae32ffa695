"""Velocities of the caller's own, flushed ones, dampened first steps, weighted replicas."""
from __future__ import annotations

import itertools
from collections import UserList

import numpy as np
import pytest
from test_plan import model
from twin import Twin, everything

import optcore
from reference import LINEAR, rounded, same_bits


def ones(*shape, dtype=np.float32):
    return np.ones(shape, dtype)


# velocities=

@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_stepped_in_place(dtype, rng):
    """Those that are zero have not started; None is the optimizer's own."""
    params = [rng.standard_normal(s).astype(dtype) for s in [(3,), (2, 3), (4,), (5,), (2,)]]
    params[1] = np.asfortranarray(params[1])
    own = [np.zeros_like(params[0]), np.full_like(params[1], 0.5), None,
           np.array([0, 0, 0, 0, 1e-300], dtype), np.array([np.nan, 0], dtype)]
    for schedule in (0.5, lambda step: step % 3 / 4):
        opt = optcore.SGD(params, lr=0.1, momentum=0.9, dampening=schedule, velocities=own)
        twin = Twin(opt, own)
        for _ in range(3):
            grads = [rng.standard_normal(p.shape).astype(dtype) for p in params]
            opt.step(grads)
            twin.step(grads)
            twin.check()
            for v, w in zip(own, twin.velocities, strict=True):
                assert v is None or same_bits(v, w)
    saved = opt.state_dict()
    assert not any(np.shares_memory(e["velocity"], v) for e, v in
                   zip(saved["state"].values(), own, strict=True) if v is not None)
    opt.step(grads)
    opt.load_state_dict(saved)                          # writes into the caller's arrays
    for p, q in zip(params, twin.params, strict=True):
        p[...] = q
    twin.check()
    own[0][...] = twin.velocities[0][...] = 7           # which the caller may write, too
    opt.step(grads)
    twin.step(grads)
    twin.check()


@pytest.mark.parametrize("value", [0.0, -0.0, 0.5])
def test_narrow_ones(value):
    """Those that are -0.0 have not started either."""
    v = rounded(np.full(3, value, np.float32), "bfloat16")
    opt = optcore.SGD(ones(3), lr=0.1, momentum=0.5, dampening=0.5, velocities=v,
                      velocity_dtype="bfloat16")
    twin = Twin(opt, [v])
    opt.step(ones(3))
    twin.step([ones(3)])
    twin.check()
    assert same_bits(v, rounded(np.full(3, 0.75 if value else 1, np.float32), "bfloat16"))
    with pytest.raises(TypeError, match=r"float32, got bfloat16: np.zeros_like\(p, np.float32\)"):
        optcore.SGD(ones(3), lr=0.1, momentum=0.5, velocities=v)


X, G = ones(3), ones(3)


def read_only():
    v = np.zeros(3, np.float32)
    v.flags.writeable = False
    return v


@pytest.mark.parametrize(("own", "error", "words"), [
    ({"a": np.zeros(3), "b": None}, TypeError,
     r"\[0\] \('a'\) has dtype float64; its parameter has float32: v\.astype\(p\.dtype\) has it"),
    ({"a": ones(4), "b": None}, ValueError, r"\[0\] \('a'\) has shape \(4,\)"),
    ({"a": ones(6)[::2], "b": None}, ValueError, r"\[0\] \('a'\) .*C-contiguous"),
    ({"a": None, "b": ones(3, 2).T}, ValueError, r"\[1\] \('b'\) is Fortran-contiguous"),
    ({"a": read_only(), "b": None}, ValueError, r"\[0\] \('a'\) must be writeable"),
    ({"a": [0.0] * 3, "b": None}, TypeError, r"\[0\] \('a'\) must be a NumPy array, got list"),
    ({"a": np.float32(0), "b": None}, TypeError, r"\[0\] \('a'\) must be a NumPy array"),
    ({"a": X, "b": None}, ValueError, r"\[0\] \('a'\) shares memory with params\[0\]"),
    ({"a": None, "b": np.broadcast_to(X, (2, 3))}, ValueError, r"\[1\] \('b'\)"),
    ({"a": G, "b": None}, ValueError, r"grads\[0\] \('a'\) must not share memory with velocities"),
    ([None, None], TypeError, "must be a mapping by parameter name, got list"),
    ({"a": None}, ValueError, r"must have the names of params, got none named \['b'\]"),
    ({"a": None, "b": None, "c": None}, ValueError, r"got unknown \['c'\]"),
])
def test_checked_as_parameters_are(own, error, words):
    params, grads = {"a": X, "b": ones(2, 3)}, {"a": G, "b": ones(2, 3)}
    with pytest.raises(error, match=words):
        optcore.SGD(params, lr=0.1, momentum=0.9, grads=grads, velocities=own)


def test_one_memory_for_two():
    v = ones(6)
    params = {"a": ones(4), "b": ones(4)}
    with pytest.raises(ValueError, match=r"velocities\[1\] \('b'\) shares memory with veloc"):
        optcore.SGD(params, lr=0.1, momentum=0.9, velocities={"a": v[:4], "b": v[2:]})
    with pytest.raises(ValueError, match=r"velocities\[0\] \('a'\) shares memory with params\[1\]"):
        optcore.SGD(params, lr=0.1, momentum=0.9, velocities={"a": params["b"], "b": None})
    with pytest.raises(ValueError, match=r"velocities\[0\] \('a'\) must be None without momentum"):
        optcore.SGD(params, lr=0.1, velocities={"a": ones(4), "b": None})
    groups = [{"params": ones(4)}, {"params": ones(4), "momentum": 0.9}]
    with pytest.raises(ValueError, match=r"velocities\[0\] must be None without momentum"):
        optcore.SGD(groups, lr=0.1, velocities=[ones(4), ones(4)])
    optcore.SGD(groups, lr=0.1, velocities=[None, ones(4)])
    none = [None]
    opt = optcore.SGD([ones(4)], lr=0.1, velocities=none)
    none[0] = ones(4)
    with pytest.raises(ValueError, match=r"velocities\[0\] is another array"):
        opt.step([ones(4)])
    with pytest.raises(TypeError, match="unknown option 'velocities'"):
        optcore.SGD([{"params": params, "velocities": None}], lr=0.1, momentum=0.9)


@pytest.mark.parametrize(("spoil", "words"), [
    (lambda own: own.update(a=ones(3)), r"velocities\[0\] \('a'\) is another array.*write v\["),
    (lambda own: own.update(a=None), r"velocities\[0\] \('a'\) is another array"),
    (lambda own: own.update(b=ones(3)), r"velocities\[1\] \('b'\) is another array"),
    (lambda own: own["a"].resize(9, refcheck=False), r"velocities\[0\] \('a'\) must stay"),
    (lambda own: setattr(own["a"].flags, "writeable", False), r"velocities\[0\] \('a'\) must stay"),
    (lambda own: own.pop("b"), "velocities must"),
    (lambda own: own.update(z=None), "velocities must"),
])
def test_spoilt_later(spoil, words):
    own = {"a": ones(3), "b": None}
    params = {"a": ones(3), "b": ones(3)}
    opt = optcore.SGD(params, lr=0.1, momentum=0.9, velocities=own)
    opt.step({"a": ones(3), "b": ones(3)})
    spoil(own)
    before = [p.copy() for p in params.values()]
    for _ in range(2):
        for call in (lambda: opt.step({"a": ones(3), "b": ones(3)}),
                     lambda: opt.step_replicas([{"a": ones(3), "b": ones(3)}])):
            with pytest.raises(ValueError, match=words):
                call()
            assert all(map(same_bits, before, params.values()))
    assert opt.step_count == 1


def test_a_gradient_may_not_be_a_velocity():
    v = ones(3)
    opt = optcore.SGD([ones(3), ones(3)], lr=0.1, momentum=0.9, velocities=[None, v])
    with pytest.raises(ValueError, match=r"grads\[0\] must not share memory with velocities\[1\]"):
        opt.step([v, ones(3)])
    assert (v == 1).all()


# dampen_first

@pytest.mark.parametrize(("options", "moved"), [({}, -1.0), ({"dampen_first": True}, -0.1)])
def test_first_steps_of_class_and_function(options, moved):
    """The two mean the same by dampening; an average from zero can be had in both."""
    moved = np.float32(moved)
    x, y, v = (np.zeros((), np.float32) for _ in range(3))
    opt = optcore.SGD(x, lr=1.0, momentum=0.9, dampening=0.9, **options)
    keywords = options or {"first_step": True}
    for k in range(3):
        opt.step(np.float32(1))
        optcore.momentum_step(y, np.float32(1), v, lr=1.0, momentum=0.9, dampening=0.9, **keywords)
        assert same_bits(x, y)
        assert same_bits(opt.state_dict()["state"][0]["velocity"], v)
        keywords = options or {"first_step": False}
        if k == 0:
            assert np.isclose(x, moved, rtol=1e-6, atol=0)
    if options:
        assert np.isclose(v, 1 - 0.9**3, rtol=1e-6, atol=0)


@pytest.mark.parametrize("more", [{}, {"first_step": None}, {"dampen_first": False}])
def test_which_step_it_is_must_be_said(more):
    x, v = ones(2), np.zeros(2, np.float32)
    with pytest.raises(TypeError, match=r"first_step must be said with dampening.*dampen_first"):
        optcore.momentum_step(x, ones(2), v, lr=0.1, momentum=0.9, dampening=0.5, **more)
    assert (x == 1).all()
    assert not v.any()


# flush_subnormals

@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("rule", [r for r in LINEAR if r.states], ids=lambda rule: rule.id)
def test_flush(rule, dtype, rng, threads, cases):
    """By the optimizer, on every thread count; beside all else that a step may hold."""
    tiny = np.finfo(dtype).tiny
    params = [(p * tiny).astype(dtype) for p in model(rng)]
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, tiny, -tiny, 2 * tiny, -2 * tiny,
                        np.nextafter(2 * tiny, 0), np.finfo(dtype).smallest_subnormal], dtype)
    own = [np.resize(special, p.shape) for p in params]
    opt = rule.optimizer(params, lr=0.5, momentum=0.5, flush_subnormals=True, ema_decay=0.5,
                         velocities=own)
    twin = Twin(opt, own)
    for k in range(3):
        grads = [(g * (tiny if k else 0)).astype(dtype) for g in model(rng)]
        twin.step(grads)
        opt.step(grads, zero_grad=True)
        twin.check()
        cases(True)


def test_velocities_come_to_rest():
    """Under zero gradients they are zero in the end; without the option they never are."""
    for flush, (dtype, n) in itertools.product(
        [False, True], [(np.float32, 1000), (np.float64, 7200)]
    ):
        x, v, g = ones(4, dtype=dtype), np.array([-1, -0.5, 0.5, 1], dtype), np.zeros(4, dtype)
        opt = optcore.SGD(x, lr=0.1, momentum=0.9, flush_subnormals=flush, velocities=v, grads=g)
        for _ in range(n):
            opt.step()
        assert not v.any() if flush else v.all()
        assert not np.signbit(v).any() if flush else (np.abs(v) < np.finfo(dtype).tiny).all()


# weights=

WEIGHTS = [[3.0], (1, 3), (0.1, 0.2, 0.7), [0, 1, 2], [1e-3] * 12, np.array([5, 7, 11, 13]),
           [np.float32(0.1), np.int64(2)], [1e-38, 1.0], [1e307, 1e307], [5e-324] * 2,
           UserList([2, 1])]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_weights(dtype, rng, threads, simd_level, cases):
    """One after another, so that each finds what those before have left."""
    sizes = [1, 255, 0, 8193]
    params = model(rng, sizes, dtype)
    opt = optcore.SGD(params, lr=0.1, momentum=0.9, dampening=0.5, max_norm=1.0, ema_decay=0.9,
                      weight_decay=0.01, maximize=True)
    twin = Twin(opt)
    for k, weights in enumerate(WEIGHTS):
        replicas = [model(rng, sizes, dtype) for _ in weights]
        for grads in replicas:
            grads[k % 4] = None
        kept = [[None if g is None else g.copy() for g in grads] for grads in replicas]
        opt.step_replicas(replicas, weights=weights, grad_scale=0.25, zero_grad=k % 2 == 1)
        twin.step_replicas(kept, list(weights), 0.25)
        assert opt.grad_norm == twin.norm
        twin.check()
        cases(True)
        given = [g for grads in replicas for g in grads if g is not None]
        assert k % 2 == 0 or not any(g.any() for g in given)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_one_replica_is_not_finite(bad, rng):
    params = [ones(40), ones(3)]
    opt = optcore.SGD(params, lr=0.1, momentum=0.9, skip_nonfinite=True)
    for k, weights in itertools.product(range(3), [None, [1, 2, 3], [2, 0, 0]]):
        before = [p.copy() for p in params]
        replicas = [[ones(40), ones(3)] for _ in range(3)]
        replicas[k][0][-1] = bad
        skipped = opt.skipped
        assert opt.step_replicas(replicas, weights=weights, zero_grad=True) is False
        assert opt.skipped == skipped + 1
        assert opt.nonfinite_params == [0]
        assert not any(g.any() for grads in replicas for g in grads)
        assert all(map(same_bits, params, before))


@pytest.mark.parametrize(("weights", "error", "words"), [
    ([1], ValueError, "weights must have one entry for each of 2 replicas, got 1"),
    ([1, 2, 3], ValueError, "weights must have one entry for each of 2 replicas, got 3"),
    ([], ValueError, "weights must have one entry"),
    ([np.nan, 1], ValueError, r"weights\[0\] must be a finite number >= 0, got nan"),
    ([1, np.inf], ValueError, r"weights\[1\] must be a finite number >= 0, got inf"),
    ([1, -1], ValueError, r"weights\[1\] must be a finite number >= 0, got -1"),
    ([0, 0], ValueError, "weights must have a finite sum > 0, got 0"),
    ([1e308, 1e308], ValueError, "weights must have a finite sum > 0, got inf"),
    ([1, 10**400], ValueError, r"weights\[1\] must be a finite number"),
    ([1, 1e-60], ValueError, r"weights\[1\] / sum\(weights\) must .* float32"),
    ([1e300, 1e-300], ValueError, r"weights\[1\] / sum\(weights\) must "),
    ([True, 1], TypeError, r"weights\[0\] must be a finite number"),
    (["1", 1], TypeError, r"weights\[0\] must be a finite number"),
    ([None, 1], TypeError, r"weights\[0\] must be a finite number"),
    ([[1], [2]], TypeError, r"weights\[0\] must be a finite number"),
    ("12", TypeError, "weights must be a sequence of 2 numbers, got str"),
    (1.0, TypeError, "weights must be a sequence of 2 numbers, got float"),
    ({0: 1, 1: 3}, TypeError, "weights must be a sequence of 2 numbers, got dict"),
    ({1, 3}, TypeError, "weights must be a sequence of 2 numbers, got set"),
])
def test_weights_refused(weights, error, words):
    opt = optcore.SGD([ones(3)], lr=0.1, momentum=0.9)
    replicas = [[ones(3)], [ones(3)]]
    before = everything(opt, replicas)
    for _ in range(2):
        with pytest.raises(error, match=words):
            opt.step_replicas(replicas, weights=weights, zero_grad=True)
        assert everything(opt, replicas) == before
