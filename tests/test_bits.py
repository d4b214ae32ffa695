"""Every kernel against its reference, bit for bit, in every place an array can lie."""
from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optcore.runtime import simd, simd_levels_available
from reference import RULES, Options, nonnegative, same_bits

pytestmark = pytest.mark.apart

LENGTHS = [0, 1, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 1000, 65537]
DTYPES = ["float32", "float64"]
LINE = 64
CANARY = 0xA5

by_rule = pytest.mark.parametrize("rule", [
    pytest.param(rule, id=rule.id, marks=[pytest.mark.apart] * rule.is_adaptive) for rule in RULES])
by_rule_and_length = pytest.mark.parametrize(("rule", "n"), [
    pytest.param(rule, n, id=f"{n}-{rule.id}") for rule in RULES
    for n in (LENGTHS[::2] if rule.is_adaptive else LENGTHS)])     # those are many
by_dtype = pytest.mark.parametrize("dtype", DTYPES)


class Placed:
    """One array at every offset within a cache line, canaries around it."""

    def __init__(self, values):
        guard = 2 * LINE
        self.offsets = range(LINE // values.itemsize)
        self.memory = np.full(values.nbytes + 3 * guard, CANARY, np.uint8)
        self.before = values
        self.views = []
        for offset in self.offsets:
            start = guard - self.memory.ctypes.data % LINE + offset * values.itemsize
            self.views.append(self.memory[start : start + values.nbytes].view(values.dtype))

    def put(self, offset):
        """Return the array, placed and filled with its values."""
        view = self.views[offset]
        view.view(f"u{view.itemsize}")[...] = self.before.view(f"u{view.itemsize}")
        return view

    def take(self, offset, expected):
        """Whether the array holds the expected bits and nothing else changed; clean up."""
        view = self.views[offset].view(np.uint8)
        agrees = bool((view == expected).all())
        view[...] = CANARY
        return agrees and bool((self.memory == CANARY).all())


def compare(rule, options, placed, where, cases, **rounding):
    """Step the placed arrays at all given offsets and all levels against the reference."""
    x, g, *states = (p.before for p in placed)
    expected_x, expected_states = rule.reference(x, g, states, options, **rounding)
    expected = [a.view(np.uint8) for a in (expected_x, g, *expected_states)]
    for level in simd_levels_available():
        with simd(level):
            for offsets in where:
                arrays = [p.put(offset) for p, offset in zip(placed, offsets, strict=True)]
                rule.step(*arrays[:2], arrays[2:], options, **rounding)
                agree = [p.take(offset, bits)
                         for p, offset, bits in zip(placed, offsets, expected, strict=True)]
                cases(all(agree), lambda at=(level, offsets): (
                    f"{rule.id} {x.size} {at} {options} {rounding}"))


def each_then_all(placed, others):
    """Offsets at which each array moves over the line while the others stay, then all as one."""
    alone = [
        (*others[:moving], offset, *others[moving + 1 :])
        for moving, p in enumerate(placed) for offset in p.offsets
    ]
    return alone + list(zip(*(p.offsets for p in placed), strict=False))


def plain_options(rule, **others):
    return Options(lr=0.1, momentum=0.9 if rule.has_momentum else 0.0, **others)


def all_options(rule):
    """Every combination of the options that this rule has, but for two that take turns.

    States are flushed in about every other one; a step that is damped is a later one, or a first
    one with `dampen_first`.
    """
    decays = [(0.0, False), (0.01, False), (0.01, True)]
    if rule.decouples:
        decays = [(0.0, True), (0.01, True)]
    dampenings = [(0.0, False)]
    if rule.dampens:
        dampenings += [(0.25, False), (0.25, True)]
    turns = itertools.cycle(        # five: no other number here is, so that all pairs meet
        [(False, False), (True, True), (False, True), (True, False), (True, True)])
    adaptive = itertools.cycle([{}])
    if rule.is_adaptive:            # eleven, likewise
        adaptive = itertools.cycle([
            {"eps_in_sqrt": inside, **({"step": step} if "step" in rule.scalars else {})}
            for inside, step in [(False, 1), (True, 2), (True, 1000), (False, None), (True, 1),
                                 (False, 7), (True, None), (False, 1), (True, 3), (False, 30),
                                 (True, 30)]])
    for (decay, decoupled), maximize, scale, clip, (dampening, first) in itertools.product(
        decays, [False, True], [1.0, 0.3], [None, 0.5], dampenings
    ):
        flush, dampen_first = next(turns)
        dampen_first = dampen_first and dampening != 0 and not first
        yield plain_options(
            rule,
            weight_decay=decay,
            decoupled_weight_decay=decoupled,
            maximize=maximize,
            grad_scale=scale,
            clip_value=clip,
            dampening=dampening,
            first_step=first or dampen_first,
            dampen_first=dampen_first,
            flush_subnormals=flush and bool(rule.states),
            **next(adaptive),
        )


def draw(rule, rng, shape, dtype, order="C"):
    """Return a parameter, a gradient and the rule's states."""
    x, g, *states = [
        np.array(rng.standard_normal(shape), dtype, order=order)
        for _ in ("x", "g", *rule.states)
    ]
    return [x, g, *(np.asarray(state, order=order) for state in nonnegative(rule, states))]


def draw_tiny(rule, rng, n, dtype):
    """As `draw`, but about half of the places hold values around the smallest normal number."""
    scale = np.where(rng.random(n) < 0.5, np.finfo(dtype).tiny, 1).astype(dtype)
    return [values * scale for values in draw(rule, rng, n, dtype)]


def step_agrees(rule, x, g, states, options):
    """Step the arrays; return whether they hold the reference's bits."""
    expected_x, expected_states = rule.reference(x, g, states, options)
    rule.step(x, g, states, options)
    pairs = zip([x, *states], [expected_x, *expected_states], strict=True)
    return all(same_bits(a, b) for a, b in pairs)


def is_varied(rule):
    """Whether only momentum or decay is another than that of a rule with the same states."""
    return rule.decouples or (
        rule.is_adaptive and rule.has_momentum and rule.id != "rmsprop_centered_momentum")


def some(rule, options):
    """All options, or for adaptive rules every seventh, as long as no turn that they take."""
    return itertools.islice(options, 0, None, 7 if rule.is_adaptive else 1)


def chosen_options(rule):
    return some(rule, all_options(rule)) if is_varied(rule) else all_options(rule)


@by_dtype
@by_rule_and_length
def test_offsets(rule, dtype, n, rng, cases):
    """Parameter, gradient and state each at every offset, all products, canaries intact."""
    placed = [Placed(values) for values in draw(rule, rng, n, dtype)]
    if n > 10_000 or len(placed) > 3:   # the products would take minutes
        where = each_then_all(placed, (0,) * len(placed))
    else:
        where = list(itertools.product(*(p.offsets for p in placed)))
    compare(rule, plain_options(rule), placed, where, cases)


@by_dtype
@by_rule_and_length
def test_options(rule, dtype, n, rng, cases):
    """Every combination of options at every length and level, each array at every offset."""
    placed = [Placed(values) for values in draw_tiny(rule, rng, n, dtype)]
    for k, options in enumerate(chosen_options(rule)):
        others = tuple(k * (2 * i + 1) % len(p.offsets) for i, p in enumerate(placed))
        where = each_then_all(placed, others) if n <= 100 else [others]
        compare(rule, options, placed, where, cases)


@by_dtype
@by_rule
def test_special_values(rule, dtype, rng, cases, simd_level):
    """Every pairing of NaN, infinities, signed zeros, subnormals and extremes, with all options."""
    info = np.finfo(dtype)
    values = np.array(
        [0.0, -0.0, np.inf, -np.inf, np.nan, info.smallest_subnormal, -info.smallest_subnormal,
         info.tiny, -info.tiny, info.max, -info.max, 1.0, -1.0, 0.1], dtype
    )
    columns = np.meshgrid(*[values] * (2 + len(rule.states)))
    for options in some(rule, all_options(rule)):
        x, g, *states = (column.flatten() for column in columns)
        cases(step_agrees(rule, x, g, states, options), options)


@by_dtype
@by_rule
def test_many_steps_stay_equal(rule, dtype, rng, cases, simd_level):
    """A thousand steps, into the subnormals that a velocity decays to under zero gradients.

    A hundred of adaptive rules, which divide by what decays.
    """
    for flush in [False, True] if rule.states else [False]:
        options = plain_options(rule, flush_subnormals=flush)
        x, g, *states = draw(rule, rng, 67, dtype)
        zero = np.zeros_like(g)
        cases(all(step_agrees(rule, x, g if k < 3 else zero, states, options)
                  for k in range(100 if rule.is_adaptive else 1000)))
        if dtype == "float32" and not rule.is_adaptive:
            assert all(bool(v.any()) is not flush for v in states)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (1,), (5, 1), (1, 5), (3, 5, 7)])
@by_dtype
@by_rule
def test_shapes(rule, dtype, shape, order, rng, cases):
    x, g, *states = draw(rule, rng, shape, dtype, order)
    cases(step_agrees(rule, x, g, states, plain_options(rule)))


hyper = st.floats(0, 2, width=32).filter(lambda value: value == 0 or value > 1e-30)
fraction = st.floats(0, 0.96875, width=32).filter(lambda value: value == 0 or value > 1e-30)


@settings(max_examples=300, deadline=None)
@given(
    rule=st.sampled_from(RULES),
    dtype=st.sampled_from(DTYPES),
    level=st.sampled_from(simd_levels_available()),
    n=st.integers(0, 5000),
    starts=st.tuples(*[st.integers(0, 70)] * (2 + max(len(rule.states) for rule in RULES))),
    options=st.builds(
        Options, lr=hyper, momentum=fraction, dampening=fraction, weight_decay=hyper,
        decoupled_weight_decay=st.booleans(), maximize=st.booleans(),
        grad_scale=hyper.filter(bool), clip_value=st.none() | hyper, first_step=st.booleans(),
        dampen_first=st.booleans(), flush_subnormals=st.booleans(),
    ),
    exponents=st.just((-6, 6)) | st.just((-44, -36)),
    seed=st.integers(0, 2**32 - 1),
)
def test_anything(rule, dtype, level, n, starts, options, exponents, seed):
    options = replace(options, momentum=options.momentum or 0.5 if rule.has_momentum else 0.0)
    if not rule.dampens:
        options = replace(options, dampening=0.0, first_step=False, dampen_first=False)
    if not rule.states:
        options = replace(options, flush_subnormals=False)
    rng = np.random.default_rng(seed)
    x, g, *states = (
        (rng.standard_normal(n + start) * 10.0 ** rng.integers(*exponents)).astype(dtype)[start:]
        for start in starts[: 2 + len(rule.states)]
    )
    states = nonnegative(rule, states)
    with simd(level):
        assert step_agrees(rule, x, g, states, options)
