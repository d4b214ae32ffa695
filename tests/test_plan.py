"""The whole-model step: clipping, skipping, averaging, zeroing, replicas, threads, splits."""
from __future__ import annotations

import gc
import itertools
import math
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import optcore
from optcore.runtime import always_threaded, simd, simd_levels_available
from reference import RULES, RULES_BY_ID, Options, averaged, same_bits

CHUNK, LANES = 8192, 16
SIZES = [1, 255, 0, 8192, 8193, 40_000, 3, 16_384]


def model(rng, sizes=SIZES, dtype=np.float32):
    return [rng.standard_normal(n).astype(dtype) for n in sizes]


def squares(g):
    """Sum of squares in the documented order: lanes within a chunk, chunks in turn."""
    total = 0.0
    for start in range(0, g.size, CHUNK):
        d = g[start : start + CHUNK].astype(np.float64)
        d = np.pad(d, (0, -d.size % LANES)).reshape(-1, LANES)
        lanes = np.zeros(LANES)
        for row in d * d:
            lanes = lanes + row
        while lanes.size > 1:
            half = lanes.size // 2
            lanes = lanes[:half] + lanes[half:]
        total += float(lanes[0])
    return total


def norm(grads, scale=1.0):
    total = 0.0
    for g in grads:
        if g is not None:
            for start in range(0, g.size, CHUNK):
                total += squares(g.reshape(-1)[start : start + CHUNK])
    return scale * math.sqrt(total)


class Reference:
    """The pipeline, step by step, in NumPy."""

    def __init__(self, rule, params, options, max_norm=None, ema_decay=None):
        self.rule, self.options, self.max_norm, self.decay = rule, options, max_norm, ema_decay
        self.params = [p.copy() for p in params]
        self.states = [[np.zeros_like(p) for _ in rule.states] for p in params]
        self.averages = [p.copy() for p in params]
        self.first = [True] * len(params)

    def step(self, grads, grad_scale=1.0):
        self.grad_norm = norm(grads, grad_scale)
        if self.max_norm is not None:
            grad_scale = grad_scale * min(1.0, self.max_norm / (self.grad_norm + 1e-6))
        for i, g in enumerate(grads):
            if g is None:
                continue
            options = Options(**{**vars(self.options), "grad_scale": grad_scale,
                                 "first_step": self.first[i]})
            self.first[i] = False
            self.params[i], self.states[i] = self.rule.reference(
                self.params[i], g, self.states[i], options
            )
            if self.decay is not None:
                self.averages[i] = averaged(self.averages[i], self.params[i], self.decay)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.id)
def test_pipeline(rule, dtype, rng, threads, simd_level, cases):
    """Everything at once, on every thread count and level."""
    options = Options(
        lr=0.05, momentum=0.9 if rule.has_momentum else 0.0, weight_decay=5e-4,
        maximize=threads == 2, decoupled_weight_decay=threads == 3,
    )
    params = model(rng, dtype=dtype)
    reference = Reference(rule, params, options, max_norm=1.0, ema_decay=0.99)
    opt = rule.optimizer(
        params, lr=0.05, momentum=options.momentum, weight_decay=5e-4,
        maximize=options.maximize, decoupled_weight_decay=options.decoupled_weight_decay,
        max_norm=1.0, ema_decay=0.99,
    )
    for k in range(3):
        grads = model(rng, dtype=dtype)
        grads[k] = None
        reference.step(grads, 0.5)
        assert opt.step(grads, grad_scale=0.5, zero_grad=True)
        assert opt.grad_norm == reference.grad_norm
        for p, q in zip(params + opt.ema, reference.params + reference.averages, strict=True):
            cases(same_bits(p, q))
        assert all(g is None or not g.any() for g in grads)


def test_stages_alone_and_together(rng, simd_level, cases):
    """Each subset of the options that take a stage of their own."""
    rule = RULES_BY_ID["momentum"]
    for clip, decay, zero, coupled in itertools.product([None, 0.5], [None, 0.9], [False, True],
                                                        [0.0, 0.1]):
        options = Options(momentum=0.9, clip_value=clip, weight_decay=coupled)
        params = model(rng)
        reference = Reference(rule, params, options, ema_decay=decay)
        opt = optcore.SGD(params, lr=0.1, momentum=0.9, clip_value=clip, ema_decay=decay,
                          weight_decay=coupled)
        for _ in range(2):
            grads = model(rng)
            reference.step(grads)
            kept = [g.copy() for g in grads]
            opt.step(grads, zero_grad=zero)
            for p, q in zip(params, reference.params, strict=True):
                cases(same_bits(p, q))
            for g, k in zip(grads, kept, strict=True):
                cases(same_bits(g, k * 0 if zero else k) or (zero and not g.any()))
            if decay is not None:
                for p, q in zip(opt.ema, reference.averages, strict=True):
                    cases(same_bits(p, q))


@settings(max_examples=60, deadline=None)
@given(
    cuts=st.lists(st.integers(0, 100_000), max_size=12),
    threads=st.sampled_from([1, 2, 3, 7]),
    level=st.sampled_from(simd_levels_available()),
    rule=st.sampled_from(RULES),
)
def test_any_split_gives_the_same_bits(cuts, threads, level, rule):
    """One flat array, and the same memory as many tensors."""
    rng = np.random.default_rng(len(cuts))
    flat, grad = (rng.standard_normal(100_000).astype(np.float32) for _ in range(2))
    other = flat.copy()
    bounds = [0, *sorted(cuts), flat.size]
    parts = [slice(a, b) for a, b in itertools.pairwise(bounds)]
    options = {"lr": 0.1, "momentum": 0.9 if rule.has_momentum else 0.0, "ema_decay": 0.9}
    whole = rule.optimizer(flat, **options)
    split = rule.optimizer([other[part] for part in parts], **options)
    optcore.set_num_threads(threads)
    try:
        with simd(level), always_threaded():
            for _ in range(2):
                split.step([grad[part] for part in parts])
        optcore.set_num_threads(1)
        for _ in range(2):
            whole.step(grad)
    finally:
        optcore.set_num_threads(None)
    assert same_bits(flat, other)
    assert same_bits(whole.ema, np.concatenate(split.ema))


# The norm

@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_norm_has_the_same_bits_everywhere(dtype, rng, cases):
    try:
        grads = model(rng, dtype=dtype)
        expected = norm(grads)
        for level, threads, offset in itertools.product(
            simd_levels_available(), [1, 2, 3, 7], range(0, 64, grads[0].itemsize)
        ):
            optcore.set_num_threads(threads)
            placed = []
            for g in grads:
                memory = np.empty(g.nbytes + 128, np.uint8)
                start = -memory.ctypes.data % 64 + offset
                placed.append(memory[start : start + g.nbytes].view(dtype))
                placed[-1][:] = g
            opt = optcore.SGD([g.copy() for g in grads], lr=0.1, track_grad_norm=True)
            with simd(level), always_threaded():
                opt.step(placed)
            cases(opt.grad_norm == expected, f"{level} {threads} {offset}")
    finally:
        optcore.set_num_threads(None)


def test_norm_is_close_to_the_exact_one(rng):
    g = rng.standard_normal(100_001)
    opt = optcore.SGD(np.zeros_like(g), lr=0.1, track_grad_norm=True)
    opt.step(g)
    assert opt.grad_norm == pytest.approx(math.sqrt(math.fsum(g * g)), rel=1e-14)


@pytest.mark.parametrize("size", [1e-320, 1e-200, 1e-160, 1e160, 1e200, 1e300])
def test_norm_beyond_the_range_of_squares(size):
    g = np.full(10_000, size)
    opt = optcore.SGD(np.zeros_like(g), lr=0.1, max_norm=1.0)
    opt.step(g)
    assert opt.grad_norm == pytest.approx(100 * size, rel=1e-12 if size > 1e-300 else 1e-2)


def test_clipping_follows_the_formula(rng):
    for bound, scale in itertools.product([0.0, 0.1, 1.0, 1e9], [1.0, 0.125]):
        x, g = (rng.standard_normal(1000).astype(np.float32) for _ in range(2))
        n = norm([g], scale)
        expected = x - np.float32(0.1) * (
            np.float32(scale * min(1.0, bound / (n + 1e-6))) * g
        )
        opt = optcore.SGD(x, lr=0.1, max_norm=bound)
        opt.step(g, grad_scale=scale)
        assert same_bits(x, expected)
        assert opt.grad_norm == n


def test_norm_is_taken_only_when_asked_for(rng):
    x, g = np.ones(5, np.float32), np.ones(5, np.float32)
    opt = optcore.SGD(x, lr=0.1)
    opt.step(g)
    assert opt.grad_norm is None
    opt.track_grad_norm = True
    opt.step(g)
    assert opt.grad_norm == math.sqrt(5)
    opt.track_grad_norm = False
    opt.max_norm = 0.5
    opt.step(g)
    assert opt.grad_norm == math.sqrt(5)
    opt.max_norm = None
    opt.step(g)
    assert opt.grad_norm is None
    opt.param_groups[0]["clip_value"] = 1.0
    with pytest.raises(ValueError, match="exclude each other"):
        opt.max_norm = 1.0
    assert opt.max_norm is None


# Skipping

@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("position", [i for i, n in enumerate(SIZES) if n])
@pytest.mark.parametrize("bound", [False, True])
def test_skipped_step_changes_nothing(bad, position, bound, rng, threads):
    params, grads = model(rng), model(rng)
    opt = optcore.SGD(params, lr=0.1, momentum=0.9, dampening=0.5, skip_nonfinite=True,
                      ema_decay=0.9, grads=grads if bound else None)
    given = () if bound else (grads,)
    for round_ in range(2):                     # the first step, and a later one
        kept = grads[position][-1]
        before = [a.copy() for a in params + opt.ema]
        state = opt.state_dict()
        grads[position][-1] = bad
        assert opt.step(*given) is False
        assert opt.skipped == round_ * 2 + 1
        assert opt.nonfinite_params == [position]
        assert opt.step_count == round_
        assert not opt.step(*given, zero_grad=True)
        assert not any(g.any() for g in grads)      # NaN included
        after = opt.state_dict()
        for a, b in zip(before, params + opt.ema, strict=True):
            assert same_bits(a, b)
        for i in range(len(params)):
            assert same_bits(state["state"][i]["velocity"], after["state"][i]["velocity"])
            assert state["state"][i]["first_step"] == after["state"][i]["first_step"]
        grads[position][-1] = kept
        assert opt.step(*given) is True
        assert opt.nonfinite_params == []


def test_names_of_nonfinite_gradients():
    params = {name: np.ones(3, np.float32) for name in "abc"}
    grads = {name: np.ones(3, np.float32) for name in "abc"}
    grads["a"][0] = np.nan
    grads["c"][2] = np.inf
    opt = optcore.SGD(params, lr=0.1, skip_nonfinite=True)
    assert not opt.step(grads)
    assert opt.nonfinite_params == ["a", "c"]


def test_finite_gradients_of_any_size_are_not_skipped():
    x = np.zeros(100)
    opt = optcore.SGD(x, lr=0.1, skip_nonfinite=True)
    assert opt.step(np.full(100, 1e300))
    assert opt.step(np.full(100, np.finfo(float).max))


def test_nan_without_skipping_propagates():
    x, g = np.ones(3, np.float32), np.array([1, np.nan, 1], np.float32)
    opt = optcore.SGD(x, lr=0.1, max_norm=1.0)
    assert opt.step(g)
    assert np.isnan(opt.grad_norm)
    assert opt.nonfinite_params == [0]
    assert np.isnan(x).all()


# Averages

def test_ema_schedule(rng):
    x = rng.standard_normal(100)
    counts = []

    def decay(step):
        counts.append(step)
        return min(0.9, (1 + step) / (10 + step))

    opt = optcore.SGD(x, lr=0.1, ema_decay=decay)
    expected = x.copy()
    for k in range(5):
        opt.step(rng.standard_normal(100))
        expected = averaged(expected, x, min(0.9, (1 + k) / (10 + k)))
        assert same_bits(opt.ema, expected)
    assert counts == list(range(5))
    opt.ema_decay = lambda step: 1.5
    with pytest.raises(ValueError, match=r"ema_decay\(step_count\) must be"):
        opt.step(np.ones(100))


def test_no_average_without_decay():
    assert optcore.SGD(np.ones(3), lr=0.1).ema is None


# Accumulation and replicas

def test_accumulate(rng, threads, cases):
    params, grads = model(rng), model(rng)
    for g in grads:
        g[...] = 0
    reference = [p.copy() for p in params]
    opt = optcore.SGD(params, lr=0.1, grads=grads)
    sums = [np.zeros_like(g) for g in grads]
    for k in range(4):
        more = model(rng)
        more[k] = None
        opt.accumulate(more)
        sums = [s if m is None else s + m for s, m in zip(sums, more, strict=True)]
        for g, s in zip(grads, sums, strict=True):
            cases(same_bits(g, s))
    assert opt.step_count == 0
    opt.step(grad_scale=1 / 4, zero_grad=True)
    for p, q, s in zip(params, reference, sums, strict=True):
        cases(same_bits(p, q - np.float32(0.1) * (np.float32(0.25) * s)))
    assert not any(g.any() for g in grads)


def test_accumulate_of_nothing_adds_nothing(rng):
    params, grads = model(rng), model(rng)
    kept = [g.copy() for g in grads]
    opt = optcore.SGD(params, lr=0.1, grads=grads)
    opt.accumulate([None] * len(grads))
    assert all(map(same_bits, grads, kept))
    opt = optcore.SGD(params, lr=0.1, grads=[None] * len(grads))
    opt.zero_grad()
    with pytest.raises(ValueError, match="got None for every parameter"):
        opt.step()


def test_an_error_while_others_add_their_squares_is_raised():
    x, g = np.ones(3, np.float32), np.ones(3, np.float32)
    opt = optcore.SGD(x, lr=0.1, max_norm=1.0)

    def fail(total, found):
        raise KeyboardInterrupt

    opt._join_squares = fail
    with pytest.raises(KeyboardInterrupt):
        opt.step(g)
    assert (x == 1).all()
    assert (opt.step_count, opt.skipped, opt.grad_norm) == (0, 0, None)
    opt._join_squares = None
    opt.step(g)


def test_accumulate_refuses(rng):
    params, grads = model(rng), model(rng)
    with pytest.raises(RuntimeError, match="needs gradients bound"):
        optcore.SGD(params, lr=0.1).accumulate(grads)
    grads[1] = None
    opt = optcore.SGD(params, lr=0.1, grads=grads)
    with pytest.raises(ValueError, match=r"grads\[1\] must be None where no gradient is bound"):
        opt.accumulate(model(rng))
    before = [g.copy() for g in grads if g is not None]
    more = model(rng)
    more[1] = None
    more[5] = grads[5]
    with pytest.raises(ValueError, match=r"grads\[5\] must not share memory with the gradient"):
        opt.accumulate(more)
    assert all(same_bits(a, b) for a, b in
               zip(before, [g for g in grads if g is not None], strict=True))


@pytest.mark.parametrize("workers", [1, 2, 3, 5])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_replicas(workers, dtype, rng, threads, simd_level, cases):
    """The mean in the order given, clipped by its norm, without a copy of it."""
    rule, options = RULES_BY_ID["nesterov"], Options(lr=0.1, momentum=0.9)
    params = model(rng, dtype=dtype)
    reference = Reference(rule, params, options, max_norm=1.0)
    opt = optcore.SGD(params, lr=0.1, momentum=0.9, nesterov=True, max_norm=1.0)
    for _ in range(2):
        replicas = [model(rng, dtype=dtype) for _ in range(workers)]
        sums = list(replicas[0])
        for grads in replicas[1:]:
            sums = [s + g for s, g in zip(sums, grads, strict=True)]
        reference.step(sums, 1 / workers)
        opt.step_replicas(replicas)
        assert opt.grad_norm == reference.grad_norm
        for p, q in zip(params, reference.params, strict=True):
            cases(same_bits(p, q))


@pytest.mark.parametrize("decoupled", [False, True])
def test_replicas_with_options(decoupled, rng, simd_level, cases):
    """Clipping by value, maximize and decay act on the mean."""
    rule = RULES_BY_ID["momentum"]
    options = Options(lr=0.1, momentum=0.9, clip_value=0.2, maximize=True, weight_decay=0.1,
                      decoupled_weight_decay=decoupled)
    params = model(rng)
    reference = Reference(rule, params, options, ema_decay=0.5)
    opt = optcore.SGD(params, lr=0.1, momentum=0.9, clip_value=0.2, maximize=True,
                      weight_decay=0.1, decoupled_weight_decay=decoupled, ema_decay=0.5)
    for _ in range(2):
        a, b, c = model(rng), model(rng), model(rng)
        reference.step([(p + q) + r for p, q, r in zip(a, b, c, strict=True)], 0.5 / 3)
        opt.step_replicas([a, b, c], grad_scale=0.5, zero_grad=True)
        for p, q in zip(params + opt.ema, reference.params + reference.averages, strict=True):
            cases(same_bits(p, q))
        assert not any(g.any() for g in a + b + c)


def test_replicas_refused(rng):
    params = model(rng)
    opt = optcore.SGD(params, lr=0.1)
    a, b = model(rng), model(rng)
    for bad, error, words in [
        ([], ValueError, "at least one entry"),
        (a[0], TypeError, "must be a list or tuple"),
        ([a, b[:3]], ValueError, r"replica_grads\[1\] must have one entry for each"),
        ([a, [None, *b[1:]]], ValueError, r"replica_grads\[1\]\[0\] and its counterpart"),
        ([a, [b[0][:0], *b[1:]]], ValueError, r"replica_grads\[1\]\[0\] has shape"),
        ([a, [params[0], *b[1:]]], ValueError, r"replica_grads\[1\]\[0\] must not share"),
    ]:
        before = [p.copy() for p in params]
        with pytest.raises(error, match=words):
            opt.step_replicas(bad)
        assert all(same_bits(p, q) for p, q in zip(params, before, strict=True))
    with pytest.raises(ValueError, match=r"replica_grads\[1\]\[\d\] must not share memory with "):
        opt.step_replicas([a, a], zero_grad=True)
    opt.step_replicas([a, b], zero_grad=True)
    assert not any(g.any() for g in a + b)
    opt.step_replicas([[None, *a[1:]], [None, *b[1:]]])


# Memory

def test_arena_lies_as_its_parameters_do(rng):
    params = [np.ones(n, np.float32)[k:] for k, n in enumerate([100, 33, 5, 1 << 20])]
    opt = optcore.SGD(params, lr=0.1, momentum=0.9, ema_decay=0.9)
    for p, entry in zip(params, opt._state, strict=True):
        for own in (entry["velocity"], entry["ema"]):
            assert (own.ctypes.data - p.ctypes.data) % 64 == 0
    starts = [entry["velocity"].ctypes.data for entry in opt._state]
    assert starts == sorted(starts)


def test_a_million_small_steps_leave_no_trace():
    """Flat memory, references and objects over a million steps."""
    resource = pytest.importorskip("resource")
    x, g = np.ones(3, np.float32), np.zeros(3, np.float32)
    bound = optcore.SGD(x, lr=0.1, momentum=0.9, grads=g, max_norm=1.0, ema_decay=0.9)
    listed = optcore.SGD([np.ones(3, np.float32)], lr=lambda step: 0.1)
    grads = [g]

    def run(n):
        for _ in range(n):
            bound.step()
            listed.step(grads)

    def references():
        return [sys.getrefcount(thing) for thing in (x, g, grads)]

    run(1000)
    gc.collect()
    before, objects = references(), len(gc.get_objects())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run(500_000)
    gc.collect()
    assert references() == before
    assert len(gc.get_objects()) - objects < 100
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 4096    # KiB
