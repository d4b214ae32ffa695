"""The whole-model step: clipping, skipping, averaging, zeroing, replicas, threads, splits."""
from __future__ import annotations

import gc
import itertools
import math
import re
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sgd import everything

import optcore
from optcore.runtime import always_threaded, simd, simd_levels_available
from reference import RULES, RULES_BY_ID, Options, averaged, same_bits
from test_bits import by_rule

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
    """The norm of all gradients, taken in a unit that keeps their squares within float64."""
    grads = [g.ravel("K").astype(np.float64) for g in grads if g is not None]

    def total(unit):
        added = 0.0             # not by sum(), which compensates from Python 3.12 on
        for g in grads:
            for start in range(0, g.size, CHUNK):
                added += squares(unit * g[start : start + CHUNK])
        return added

    unit, squared = 1.0, total(1.0)
    if not 2.0**-900 <= squared < math.inf and all(np.isfinite(g).all() for g in grads):
        unit = 2.0 ** (600 if squared < 1 else -600)
        squared = total(unit)
    return scale * (math.sqrt(squared) / unit)


class Reference:
    """The pipeline, step by step, in NumPy."""

    def __init__(self, rule, params, options, max_norm=None, ema_decay=None):
        self.rule, self.options, self.max_norm, self.decay = rule, options, max_norm, ema_decay
        self.params = [p.copy() for p in params]
        self.states = [[np.zeros_like(p) for _ in rule.states] for p in params]
        self.averages = [p.copy() for p in params]
        self.steps = [0] * len(params)

    def step(self, grads, grad_scale=1.0):
        self.grad_norm = norm(grads, grad_scale)
        if self.max_norm is not None:
            grad_scale = grad_scale * min(1.0, self.max_norm / (self.grad_norm + 1e-6))
        for i, g in enumerate(grads):
            if g is None:
                continue
            self.steps[i] += 1
            options = Options(**{**vars(self.options), "grad_scale": grad_scale,
                                 "first_step": self.steps[i] == 1, "step": self.steps[i]})
            self.params[i], self.states[i] = self.rule.reference(
                self.params[i], g, self.states[i], options
            )
            if self.decay is not None:
                self.averages[i] = averaged(self.averages[i], self.params[i], self.decay)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@by_rule
def test_pipeline(rule, dtype, rng, threads, simd_level, cases):
    """Everything at once, on every thread count and level."""
    options = Options(
        lr=0.05, momentum=0.9 if rule.has_momentum else 0.0, weight_decay=5e-4,
        maximize=threads == 2, decoupled_weight_decay=threads == 3,
    )
    if rule.is_adaptive:
        options = replace(options, eps_in_sqrt=threads == 7)
    params = model(rng, dtype=dtype)
    reference = Reference(rule, params, options, max_norm=1.0, ema_decay=0.99)
    own = {"eps": 1e-8, "eps_in_sqrt": options.eps_in_sqrt} if rule.is_adaptive else {}
    opt = rule.optimizer(
        params, **own, lr=0.05, momentum=options.momentum, weight_decay=5e-4,
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
    assert opt.grad_norm == pytest.approx(math.sqrt(math.fsum(g * g)), rel=1e-14, abs=0)


@pytest.mark.parametrize("size", [1e-320, 1e-200, 1e-162, 1e-160, 1e160, 1e200, 1e300])
def test_norm_beyond_the_range_of_squares(size):
    g = np.full(10_000, size)
    opt = optcore.SGD(np.zeros_like(g), lr=0.1, max_norm=1.0)
    opt.step(g)
    # abs=0: any small number is near another by default
    assert opt.grad_norm == pytest.approx(100 * size, rel=1e-12 if size > 1e-300 else 1e-2, abs=0)


@pytest.mark.parametrize("exponent", [-1000, -600, -540, -515, -460, 440, 500, 512, 1000])
def test_norm_of_powers_of_two_times_as_much(exponent, rng):
    """Squares beyond the range of float64 cost no bit, in whichever arrays they are."""
    grads = [rng.uniform(0.5, 2, n) for n in (300, 20_000, 5)]
    scaled = [np.ldexp(g, exponent) for g in grads]
    few = np.zeros(7, np.float32)
    for arrays, bare in ((scaled, grads), ([few, *scaled], grads), ([*scaled, few], grads),
                         ([scaled[0]], [grads[0]]), ([None, few, scaled[1]], [grads[1]])):
        opt = optcore.SGD([np.zeros(1) if g is None else np.zeros_like(g) for g in arrays],
                          lr=0.1, track_grad_norm=True)
        opt.step(arrays)
        assert opt.grad_norm == math.ldexp(norm(bare), exponent)
        twice = [None if g is None else g * 2 for g in arrays]
        opt.step_replicas([arrays, arrays, twice])
        assert opt.grad_norm == 1 / 3 * math.ldexp(norm(bare), exponent + 2)
        assert opt.nonfinite_params == []
        opt.step(arrays, grad_scale=0.125)
        assert opt.grad_norm == math.ldexp(norm(bare), exponent - 3)


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


@pytest.mark.parametrize(("option", "on", "off"), [
    ("max_norm", 1.0, None), ("track_grad_norm", True, False), ("skip_nonfinite", True, False),
])
def test_what_is_no_longer_measured_is_no_longer_said(option, on, off):
    """Neither norm nor names outlive the measuring, or the run that they are of."""
    params = {name: np.ones(3, np.float32) for name in "ab"}
    grads = {name: np.ones(3, np.float32) for name in "ab"}
    bad = {**grads, "b": np.array([1, np.nan, 1], np.float32)}
    opt = optcore.SGD(params, lr=0.1)

    def said():
        return repr(opt.grad_norm), opt.nonfinite_params

    shown = "None" if option == "skip_nonfinite" else "nan"
    state = opt.state_dict()
    assert said() == ("None", [])
    for _ in range(2):
        setattr(opt, option, on)
        opt.step(bad)
        assert said() == (shown, ["b"])
        with pytest.raises(ValueError, match="has shape"):      # what was not taken says nothing
            opt.step({**grads, "b": np.ones(4, np.float32)})
        with pytest.raises(KeyError):
            opt.load_state_dict({})
        assert said() == (shown, ["b"])
        setattr(opt, option, off)
        assert said() == (shown, ["b"])
        opt.step(bad)
        assert said() == ("None", [])
        setattr(opt, option, on)
        opt.step(bad)
        opt.load_state_dict(state)
        assert said() == ("None", [])
        for p in params.values():
            p[...] = 1
        opt.step(grads)
        assert said() == ("None" if option == "skip_nonfinite" else repr(math.sqrt(6)), [])


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


def test_a_parameter_without_a_name_is_told_by_its_index():
    opt = optcore.SGD([{"params": {"a": np.ones(3)}}, {"params": [np.ones(2), np.ones(1)]}],
                      lr=0.1, skip_nonfinite=True)
    assert not opt.step([np.full(3, np.nan), np.ones(2), np.full(1, np.inf)])
    assert opt.nonfinite_params == ["a", 2]


@pytest.mark.parametrize(("worker", "bad"), [(0, np.inf), (1, np.nan), (1, -np.inf), (2, np.inf)])
def test_a_replica_that_is_not_finite(worker, bad, rng, threads):
    """Whichever worker has it, nothing is stepped and the parameter is named."""
    params, replicas = model(rng), [model(rng) for _ in range(3)]
    opt = optcore.SGD(params, lr=0.1, momentum=0.9, skip_nonfinite=True)
    filled = [i for i, n in enumerate(SIZES) if n]
    assert opt.step_replicas(replicas)
    before = {**everything(opt), "skipped": None, "nonfinite_params": None}
    for spoiled in [*[[i] for i in filled], filled[1:3]]:
        kept = [replicas[worker][i].copy() for i in spoiled]
        for i in spoiled:
            replicas[worker][i][-1] = bad
        assert opt.step_replicas(replicas) is False
        assert opt.nonfinite_params == spoiled
        for i, g in zip(spoiled, kept, strict=True):
            replicas[worker][i][...] = g
    assert opt.skipped == len(filled) + 1
    assert {**everything(opt), "skipped": None, "nonfinite_params": None} == before
    assert opt.step_replicas(replicas) is True
    assert opt.nonfinite_params == []
    opt.skip_nonfinite, opt.max_norm = False, 1.0           # named also where it is stepped with
    replicas[worker][3][8] = bad
    assert opt.step_replicas(replicas) is True
    assert opt.nonfinite_params == [3]
    assert not np.isfinite(opt.grad_norm)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("weights", [[1, 2, 3], [0, 1, 1], [1, 0, 0]])
def test_a_weighted_replica_that_is_not_finite(weights, bad, rng):
    """A weight of 0 does not hide it, for 0 times an infinity is no number."""
    x, replicas = rng.standard_normal(20), [rng.standard_normal(20) for _ in range(3)]
    opt = optcore.SGD(x, lr=0.1, skip_nonfinite=True)
    for worker in range(3):
        before, kept = x.copy(), replicas[worker][13]
        replicas[worker][13] = bad
        assert opt.step_replicas(replicas, weights=weights) is False
        assert opt.nonfinite_params == [0]
        assert same_bits(x, before)
        replicas[worker][13] = kept
    assert opt.step_replicas(replicas, weights=weights)
    assert opt.nonfinite_params == []


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_it_is_the_sum_of_replicas_that_is_finite_or_not(dtype):
    x, most = np.ones(40, dtype), np.finfo(dtype).max
    opt = optcore.SGD(x, lr=0.1, skip_nonfinite=True)
    for values in ([np.inf, -np.inf], [most, most], [-most, -most], [1, most, most]):
        replicas = [np.ones(40, dtype) for _ in values]
        for g, value in zip(replicas, values, strict=True):
            g[17] = value
        assert opt.step_replicas(replicas) is False
        assert opt.nonfinite_params == [0]
    assert (x == 1).all()
    assert opt.step_replicas([np.full(40, value, dtype) for value in (most, -most)])
    assert (x == 1).all()


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


def test_the_decay_of_an_average_is_set_again(rng):
    """The average goes on; a number ends a schedule, and a schedule a number."""
    x = rng.standard_normal(20)
    opt = optcore.SGD(x, lr=0.1, ema_decay=lambda step: 0.5)
    average = x.copy()
    for new, decay in [(None, 0.5), (0.25, 0.25), (lambda step: 0.75, 0.75), (0.9, 0.9)]:
        if new is not None:
            opt.ema_decay = new
            assert opt.ema_decay == new
        assert same_bits(opt.ema, average)
        opt.step(rng.standard_normal(20))
        average = averaged(average, x, decay)
        assert same_bits(opt.ema, average)


def test_averages_of_every_group(rng):
    """One decay for all, whatever the rule and the type of each."""
    params = [rng.standard_normal(6), rng.standard_normal(5).astype(np.float32),
              rng.standard_normal(4)]
    averages = [p.copy() for p in params]
    decays = [0.5, 0.25, 0.75]
    opt = optcore.SGD([{"params": params[0]}, {"params": params[1], "lr": 0.5, "momentum": 0.9},
                       {"params": params[2], "momentum": 0.5, "nesterov": True}],
                      lr=0.1, ema_decay=lambda step: decays[step])
    for decay in decays:
        opt.step([np.asarray(rng.standard_normal(p.shape), p.dtype) for p in params])
        averages = [averaged(e, p, decay) for e, p in zip(averages, params, strict=True)]
        assert all(map(same_bits, opt.ema, averages))


def test_averages_lie_as_their_parameters_do(rng):
    """A Fortran-ordered parameter has such an average and such a velocity."""
    params = [np.asfortranarray(rng.standard_normal((3, 5))), rng.standard_normal((3, 5))]
    opt = optcore.SGD(params, lr=0.1, momentum=0.9, ema_decay=0.5)
    averages = [p.copy() for p in params]
    velocities = [np.zeros_like(p) for p in params]
    for _ in range(2):
        grads = [np.array(rng.standard_normal((3, 5)), order=order) for order in "FC"]
        opt.step(grads)
        averages = [averaged(e, p, 0.5) for e, p in zip(averages, params, strict=True)]
        velocities = [0.9 * v + g for v, g in zip(velocities, grads, strict=True)]
    for e, expected, p in zip(opt.ema, averages, params, strict=True):
        assert same_bits(e, expected)
        assert e.strides == p.strides
    for entry, expected in zip(opt.state_dict()["state"].values(), velocities, strict=True):
        assert same_bits(entry["velocity"], expected)


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
    with pytest.raises(RuntimeError, match="needs gradients that were bound"):
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

def piece(memory, start, n):
    """Return n elements of an array; NumPy's slices, where empty, lie at its beginning."""
    return np.ndarray((n,), memory.dtype, buffer=memory, offset=start * memory.itemsize)


@pytest.mark.parametrize("order", [1, -1])
def test_gradients_anywhere_in_the_memory_of_parameters(order, rng):
    """Refused just where they share memory with one, each time; an empty one shares none."""
    memory = rng.standard_normal(44)
    # neighbours, gaps, and empty ones within another, at both its ends and apart
    places = [(2, 4), (6, 4), (12, 6), (22, 1), (30, 8), (14, 0), (12, 0), (18, 0), (33, 0)]
    places = places[::order]
    params = [piece(memory, *place) for place in places]
    opt = optcore.SGD(params, lr=0.125)
    for i, p in enumerate(params):
        for start in range(memory.size - p.size + 1):
            g = piece(memory, start, p.size)
            grads = [None] * len(params)
            grads[i] = g
            met = {k for k, q in enumerate(params) if np.shares_memory(g, q)}
            expected = memory.copy()
            for _ in range(2):
                if met:
                    with pytest.raises(ValueError, match="must not share memory") as raised:
                        opt.step(grads)
                    found = re.match(r"grads\[(\d+)\] must .* with params\[(\d+)\]",
                                     str(raised.value))
                    assert int(found[1]) == i
                    assert int(found[2]) in met
                else:
                    begin = places[i][0]
                    expected[begin : begin + p.size] -= 0.125 * g
                    assert opt.step(grads)
                assert same_bits(memory, expected)


STRIDED = {
    "backwards": lambda memory, start, n: memory[start : start + n][::-1],
    "every other": lambda memory, start, n: memory[start : start + 2 * n : 2],
    "every other backwards": lambda memory, start, n: memory[start : start + 2 * n : 2][::-1],
}


@pytest.mark.parametrize("kind", STRIDED)
def test_strided_gradients_anywhere_in_the_memory_of_parameters(kind, rng):
    """Refused where they reach over one, also where a contiguous one began there before."""
    memory = rng.standard_normal(60)
    places = [(4, 4), (8, 3), (20, 5), (22, 0), (31, 2), (40, 6)]
    params = [piece(memory, *place) for place in places]
    opt = optcore.SGD(params, lr=0.125)
    taken, refused = 0, 0
    for i, (begin, n) in enumerate(places):
        for start in range(memory.size - max(2 * n, 1)):
            g = STRIDED[kind](memory, start, n)
            whole = piece(memory, (g.ctypes.data - memory.ctypes.data) // memory.itemsize, n) if (
                n > 0 and g.ctypes.data + g.nbytes <= memory.ctypes.data + memory.nbytes
            ) else None
            for gradient in (whole, g, whole, g):
                if gradient is None:
                    continue
                expected = memory.copy()
                grads = [None] * len(params)
                grads[i] = gradient
                if any(np.may_share_memory(gradient, p) for p in params):   # their spans meet
                    with pytest.raises(ValueError, match=rf"^grads\[{i}\] must not share memory"):
                        opt.step(grads)
                    refused += 1
                else:
                    opt.step(grads)
                    expected[begin : begin + n] -= 0.125 * gradient
                    taken += 1
                assert same_bits(memory, expected)
    assert taken > 100
    assert refused > 100


@pytest.mark.parametrize("bad", [False, True])
def test_strided_replicas(bad, rng):
    """Each from a buffer of its own, and zeroed where it lies, also where the step is skipped."""
    shapes = [(3, 5), (6,), (2, 3, 4), (7, 1)]

    def strided(a):
        return np.repeat(a, 2, axis=-1)[..., ::2] if a.ndim == 1 else np.asfortranarray(a)

    params = [rng.standard_normal(shape) for shape in shapes]
    twins = [p.copy() for p in params]
    opt, twin = (optcore.SGD(each, lr=0.1, momentum=0.9, skip_nonfinite=True, track_grad_norm=True)
                 for each in (params, twins))
    for step in range(3):
        contiguous = [[rng.standard_normal(shape) for shape in shapes] for _ in range(3)]
        if bad and step:
            contiguous[step][2][1, 2, 3] = np.nan
        lying = [[strided(g) if (i + k + step) % 3 else g.copy() for i, g in enumerate(grads)]
                 for k, grads in enumerate(contiguous)]
        kept = [[g.copy() for g in grads] for grads in lying]
        assert twin.step_replicas(contiguous) is not (bad and step > 0)
        assert opt.step_replicas(lying, zero_grad=step < 2) is not (bad and step > 0)
        assert repr(opt.grad_norm) == repr(twin.grad_norm)
        assert opt.nonfinite_params == twin.nonfinite_params
        assert all(map(same_bits, params, twins))
        for g, h in zip(itertools.chain(*lying), itertools.chain(*kept), strict=True):
            assert not g.any() if step < 2 else same_bits(g, h)


def test_what_was_a_gradient_may_become_a_parameter(rng):
    """And is no gradient from then on."""
    x, g, h = (rng.standard_normal(4) for _ in range(3))
    opt = optcore.SGD([x], lr=0.1)
    opt.step([g])
    opt.add_param_group({"params": [g]})
    before = [a.copy() for a in (x, g)]
    for _ in range(2):
        with pytest.raises(ValueError, match=r"grads\[0\] must not share memory with params\[1\]"):
            opt.step([g, h])
        assert all(map(same_bits, (x, g), before))
    opt.step([h, h])


def test_parameters_anywhere_in_one_memory(rng):
    for _ in range(300):
        memory, sizes = np.ones(30), rng.integers(0, 5, 5)
        params = [piece(memory, rng.integers(31 - n), n) for n in sizes]
        pairs = [(a, b) for a, b in itertools.combinations(range(5), 2)
                 if np.shares_memory(params[a], params[b])]
        if not pairs:
            optcore.SGD(params, lr=0.1)
            continue
        with pytest.raises(ValueError, match="shares memory with") as raised:
            optcore.SGD(params, lr=0.1)
        found = re.match(r"params\[(\d)\] .* params\[(\d)\]", str(raised.value))
        assert (int(found[2]), int(found[1])) in pairs


WRITING = {
    "read": lambda opt, sets: opt.step(sets[0]),
    "zeroed": lambda opt, sets: opt.step(sets[0], zero_grad=True),
    "replicas": lambda opt, sets: opt.step_replicas(sets, zero_grad=True),
    "bound": lambda opt, sets: optcore.SGD(
        opt.param_groups[0]["params"], lr=0.5, grads=sets[0]),
    "accumulated": lambda opt, sets: opt.accumulate(sets[0]),
}


@pytest.mark.parametrize("way", WRITING)
def test_gradients_anywhere_in_one_memory(way, rng):
    """Where they are written they share nothing. One optimizer sees them all, each twice."""
    sizes = [3, 0, 5, 1, 2, 0]
    memory, refused, taken = np.zeros(200), 0, 0
    params = [rng.standard_normal(n) for n in sizes]
    places = rng.integers(0, 60 if way != "replicas" else 190, 14)    # so few that all come again
    held = [piece(memory, start, n) for start, n in zip((10, 12, 13, 20, 30, 31), sizes,
                                                        strict=True)]
    opt = optcore.SGD(params, lr=0.5, grads=held if way == "accumulated" else None)
    for round_ in range(300):
        n_sets = 1 + round_ % 3 if way == "replicas" else 1
        sets = [[piece(memory, start, n) for start, n in
                 zip(rng.choice(places, len(sizes)), sizes, strict=True)] for _ in range(n_sets)]
        missing = rng.integers(len(sizes))
        for grads in sets:
            grads[missing] = None
        arrays = [g for grads in sets for g in grads if g is not None]
        wrong = any(np.shares_memory(a, b) for a, b in itertools.combinations(arrays, 2))
        if way == "read":
            wrong = False
        elif way == "accumulated":
            wrong = any(np.shares_memory(g, h) for g in arrays for h in held)
        for _ in range(2):
            memory[...] = rng.standard_normal(memory.size)
            before, kept = memory.copy(), [p.copy() for p in params]
            sums = [p * 0 if grads[0] is None else sum(grads[1:], grads[0].copy())
                    for p, grads in zip(params, zip(*sets, strict=True), strict=True)]
            if wrong:
                refused += 1
                with pytest.raises(ValueError, match="must not share memory"):
                    WRITING[way](opt, sets)
                assert same_bits(memory, before)
                assert all(map(same_bits, params, kept))
                continue
            taken += 1
            WRITING[way](opt, sets)
            if way == "accumulated":
                for h, s in zip(held, sums, strict=True):
                    first = (h.ctypes.data - memory.ctypes.data) // memory.itemsize
                    before[first : first + h.size] += s
                assert same_bits(memory, before)
            elif way != "bound":
                assert all(same_bits(p, q - 0.5 * (1 / n_sets * s))
                           for p, q, s in zip(params, kept, sums, strict=True))
                assert way == "read" or not any(g.any() for g in arrays)
    assert taken > 50
    assert refused > 50 or way == "read"


def test_what_lay_apart_in_replicas_may_meet_in_a_step():
    """As long an array from the same place, and one that only then reaches another."""
    memory = np.ones(40)
    opt = optcore.SGD([np.ones(2), np.ones(8)], lr=0.1)
    a, b = piece(memory, 2, 2), piece(memory, 0, 2)
    opt.step_replicas([[a, piece(memory, 10, 8)], [b, piece(memory, 20, 8)]], zero_grad=True)
    memory[...] = 1
    for _ in range(2):
        with pytest.raises(ValueError, match=r"grads\[1\] must not share memory with grads\[0\]"):
            opt.step([a, piece(memory, 0, 8)], zero_grad=True)
        assert (memory == 1).all()


def test_the_optimizers_own_memory_is_never_a_gradient(rng):
    """Velocities and averages, of every parameter, also those that start late."""
    params, grads = model(rng, [6] * 4), model(rng, [6] * 4)
    opt = optcore.SGD(params, lr=0.1)
    opt.step(grads)
    opt.ema_decay = 0.5
    opt.step(grads)
    averages = list(opt.ema)
    for late in (False, True):
        if late:
            opt.param_groups[0]["momentum"] = 0.9
            opt.step(grads)
            averages += [entry["velocity"] for entry in opt._state]
        before = everything(opt), [a.copy() for a in averages]
        for own, i in itertools.product(averages, range(4)):
            for call in (opt.step, lambda given: opt.step_replicas([grads, grads, given])):
                with pytest.raises(ValueError, match=r"\[\d\] must not share memory with the opt"):
                    call([own if k == i else g for k, g in enumerate(grads)])
        assert everything(opt) == before[0]
        assert all(map(same_bits, averages, before[1]))


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
