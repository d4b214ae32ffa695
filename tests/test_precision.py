"""Half types: conversions, masters, narrow velocities and the noise of stochastic rounding."""
from __future__ import annotations

import array
import itertools
import math

import numpy as np
import pytest
from twin import Twin, everything

import optcore
from optcore.runtime import simd, simd_levels_available
from reference import (
    BFLOAT16,
    RULES,
    noise,
    noise_key,
    nonnegative,
    rounded,
    same_bits,
    split,
    type_name,
    widened,
)
from test_bits import LENGTHS, Placed, all_options, compare, each_then_all

HALVES = ["bfloat16", "float16"]
PATTERNS = np.arange(2**16, dtype=np.uint16)
DTYPES = {"bfloat16": BFLOAT16, "float16": np.dtype(np.float16), "float32": np.dtype(np.float32)}
by_half = pytest.mark.parametrize("name", HALVES)
NEAREST = {"rounding": "nearest"}


def made(values, name):
    with np.errstate(all="ignore"):
        return rounded(np.asarray(values, np.float32), name)


def negative_zeros(n, name):
    return made(np.full(n, -0.0), name)     # x - lr * d is then -lr * d to the last bit


def dtype_of_others(name):
    """Of NumPy's or of ml_dtypes'; what is compared with those comes last in a test."""
    return np.float16 if name == "float16" else pytest.importorskip("ml_dtypes").bfloat16


def of_others(x, name):
    """The same rounded to the nearest by NumPy or ml_dtypes."""
    with np.errstate(all="ignore"):
        half = x.astype(dtype_of_others(name))
    return half.view(BFLOAT16) if name == "bfloat16" else half


@pytest.fixture(scope="module")
def hard_numbers():
    """float32 around everything that rounding to a half type may do, and at random."""
    top = PATTERNS.astype(np.uint32) << 16
    around = [top + k for k in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)]      # bfloat16's ties
    around += [top + k for k in range(0, 0x10000, 0x1000)]                  # float16's
    around += [np.arange(0x33000000 - 64, 0x33000000 + 64, dtype=np.uint32)]    # 2**-25
    bits = np.random.default_rng(0).integers(0, 2**32, 2**19, dtype=np.uint64)
    return np.concatenate([*around, bits.astype(np.uint32)]).view(np.float32)


@by_half
def test_every_pattern_is_widened(name, simd_level, cases):
    x, half = negative_zeros(2**16, "float32"), PATTERNS.view(DTYPES[name])
    optcore.sgd_step(x, half, lr=1.0, maximize=True)
    cases(same_bits(x, widened(half)))
    with np.errstate(all="ignore"):
        cases(same_bits(x, half.view(dtype_of_others(name)).astype(np.float32)))


@by_half
def test_numbers_are_rounded_to_the_nearest(name, hard_numbers, simd_level, cases):
    x = negative_zeros(hard_numbers.size, name)
    optcore.sgd_step(x, hard_numbers, lr=1.0, maximize=True, rounding="nearest")
    cases(same_bits(x, rounded(hard_numbers, name)))
    cases(same_bits(x, of_others(hard_numbers, name)))


@by_half
def test_numbers_are_rounded_by_noise(name, hard_numbers, simd_level, cases):
    x = negative_zeros(hard_numbers.size, name)
    optcore.sgd_step(x, hard_numbers, lr=1.0, maximize=True, rounding="stochastic", noise_key=3)
    cases(same_bits(x, rounded(hard_numbers, name, noise(3, x, 1)[0])))


def test_split_masters_lose_nothing(hard_numbers, simd_level, cases):
    x = negative_zeros(hard_numbers.size, "bfloat16")
    opt = optcore.SGD(x, lr=1.0, maximize=True)
    opt.step(hard_numbers)
    cases(same_bits(opt.state_dict()["state"][0]["master"], hard_numbers))
    cases(same_bits(x, split(hard_numbers)[0]))
    nearest, shown = of_others(hard_numbers, "bfloat16"), x
    tie = hard_numbers.view(np.uint32) & 0xFFFF == 0x8000
    assert same_bits(nearest[~tie], shown[~tie])


STORAGES = [kinds for kinds in itertools.product(["float32", *HALVES], repeat=3)
            if kinds != ("float32",) * 3]


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("kinds", STORAGES, ids="-".join)
def test_storages(kinds, rounding, rng, cases, times):
    """Every rule with parameter, gradient and states of every type, at all offsets in turn."""
    how = {"rounding": rounding}
    for rule, n, _ in itertools.product(RULES, LENGTHS, range(times)):
        if rule.is_adaptive and rng.integers(5):        # which are many, and open arrays alike
            continue
        options = list(all_options(rule))
        if rounding == "stochastic":
            how["noise_key"] = int(rng.integers(2**63))
        names = [*kinds[:2], *[kinds[2]] * len(rule.states)]
        x, g, *states = (rng.standard_normal(n) for _ in names)
        drawn = x, g, *nonnegative(rule, states)
        placed = [Placed(made(values, name)) for values, name in zip(drawn, names, strict=True)]
        where = each_then_all(placed, (0,) * len(placed))[rng.integers(9) :: 9]
        compare(rule, options[rng.integers(len(options))], placed, where, cases, **how)


def random_options(rng, name):
    masters = ["auto", None, "float32"] + ["split"] * (name == "bfloat16")
    momentum = float(rng.choice([0, 0.5, 0.96875]))
    return {
        "lr": float(rng.choice([0.1, 0.001])),
        "momentum": momentum,
        "nesterov": bool(rng.integers(2)) and momentum > 0,
        "lr_in_velocity": bool(rng.integers(2)),
        "weight_decay": float(rng.choice([0, 0.01])),
        "decoupled_weight_decay": bool(rng.integers(2)),
        "maximize": bool(rng.integers(2)),
        "flush_subnormals": bool(rng.integers(2)),
        "max_norm": [None, 1.0][rng.integers(2)],
        "ema_decay": [None, 0.9][rng.integers(2)],
        "skip_nonfinite": bool(rng.integers(2)),
        "master": masters[rng.integers(len(masters))],
        "rounding": ["stochastic", "nearest"][rng.integers(2)],
        "velocity_dtype": [None, "float32", "bfloat16"][rng.integers(3)],
        "seed": int(rng.integers(2**63)),
    }


SIZES = [0, 1, 3, 255, 256, 257, 1000, (3, 5), 9000]


def half_model(rng, name):
    return [made(rng.standard_normal(size), name) for size in SIZES]


def half_grads(rng, params):
    kinds = ["float32", *HALVES]
    return [made(rng.standard_normal(p.shape) * 10.0 ** rng.integers(-8, 2), kinds[rng.integers(3)])
            for p in params]


@pytest.mark.parametrize("seed", range(40))
def test_optimizers_follow_their_twin(seed, cases, times):
    """Every master, rounding and velocity at random, with the other options."""
    for rng in map(np.random.default_rng, range(seed, 40 * times, 40)):
        follow_a_twin(rng, HALVES[seed % 2], cases)


def follow_a_twin(rng, name, cases):
    params = half_model(rng, name)
    opt = optcore.SGD(params, **random_options(rng, name))
    twin = Twin(opt)
    levels = simd_levels_available()
    for _ in range(5):
        grads = half_grads(rng, params)
        if rng.integers(4) == 0:
            grads[6].flat[7] = np.nan if type_name(grads[6]) != "bfloat16" else 0x7FC0
        with simd(levels[rng.integers(len(levels))]):
            opt.step(grads)
        twin.step(grads)
        twin.check()
        for _ in params:
            cases(True)


@by_half
def test_threads_and_replicas(name, threads, rng):
    params = [made(rng.standard_normal(n), name) for n in (30_001, 5, 100_000)]
    opt = optcore.SGD(params, lr=0.1, momentum=0.9, master=None, velocity_dtype="bfloat16")
    twin = Twin(opt)
    for _ in range(3):
        replicas = [half_grads(rng, params) for _ in range(3)]
        opt.step_replicas(replicas, weights=[1, 2, 3])
        twin.step_replicas(replicas, weights=[1, 2, 3])
        twin.check()


# Masters

def in_float32(values, **options):
    return optcore.SGD([np.array(widened(v)) for v in values], **options)


@pytest.mark.parametrize(("name", "master"), [
    ("bfloat16", "split"), ("bfloat16", "float32"), ("float16", "float32")])
def test_masters_take_the_steps_of_float32(name, master, rng, cases, times):
    for _ in range(10 * times):
        params = half_model(rng, name)
        options = {**random_options(rng, name), "master": "auto"}
        plain = in_float32(params, **options)
        opt = optcore.SGD(params, **{**options, "master": master})
        for _ in range(10):
            grads = half_grads(rng, params)
            opt.step(grads)
            plain.step([np.array(widened(g)) for g in grads])
            state = opt.state_dict()["state"]
            for i, p in enumerate(plain.param_groups[0]["params"]):
                shown = split(p)[0] if master == "split" else rounded(p, name)
                cases(same_bits(state[i]["master"], p) and same_bits(params[i], shown))


@pytest.mark.parametrize(("name", "master"), [
    ("bfloat16", "split"), ("bfloat16", "float32"), ("float16", "float32")])
@pytest.mark.parametrize("value", [0.0, -0.0, 2.0**14, -3e-5, math.nan])
def test_a_parameter_given_another_value_is_stepped_from_it(name, master, value, rng):
    x = made(rng.standard_normal(1000), name)
    opt = optcore.SGD(x, lr=0.1, master=master)
    opt.step(made(rng.standard_normal(1000), name))
    new = made([value], name)
    x.view(np.uint16)[::2] = new.view(np.uint16)
    shown = x.copy()
    opt.step(np.zeros(1000, np.float32))
    state = opt.state_dict()["state"][0]["master"]
    assert same_bits(x, shown)
    if master == "float32":
        assert same_bits(state[::2], np.full(500, widened(new)[0]))
    else:                       # the low half stays, and does not show
        assert same_bits(split(state)[0], shown)


@pytest.mark.parametrize("kind", ["float32", *HALVES])
def test_a_rule_without_a_state_leaves_the_narrow_one_there(kind, rng):
    params = [made(rng.standard_normal(n), kind) for n in (300, 5)]
    opt = optcore.SGD(params, lr=0.1, momentum=0.9, velocity_dtype="bfloat16")
    twin = Twin(opt)
    for momentum in (0.9, 0.0, 0.9):
        opt.momentum = momentum
        for _ in range(2):
            grads = [made(rng.standard_normal(p.shape), "bfloat16") for p in params]
            opt.step(grads)
            twin.step(grads)
            twin.check()


def test_states_go_to_float32_and_back(rng):
    params = half_model(rng, "bfloat16")
    options = {"lr": 0.1, "momentum": 0.9}
    opt, plain = optcore.SGD(params, **options), in_float32(params, **options)
    grads = [half_grads(rng, params) for _ in range(4)]
    for g in grads[:2]:
        plain.step([np.array(widened(a)) for a in g])
    opt.load_state_dict(plain._contents(True))
    for p, q in zip(params, plain.param_groups[0]["params"], strict=True):
        assert same_bits(p, split(q)[0])
    for g in grads[2:]:
        opt.step(g)
        plain.step([np.array(widened(a)) for a in g])
    back = in_float32(params, **options)
    back.load_state_dict(opt._contents(True))
    for p, q in zip(back.param_groups[0]["params"], plain.param_groups[0]["params"], strict=True):
        assert same_bits(p, q)


def test_a_signalling_nan_stays_one_where_nothing_is_computed():
    """Only its low bits tell it from infinity."""
    x = np.zeros(3, np.float32)
    bits = np.array([0x7F80_0001, 0xFF80_0001, 0x7F80_0000], np.uint32)
    opt = optcore.SGD(x, lr=0.1, momentum=0.9, velocity_dtype="bfloat16")
    state = opt.state_dict()
    state["state"][0]["velocity"] = bits.view(np.float32)
    opt.load_state_dict(state)
    assert same_bits(widened(opt.state_dict()["state"][0]["velocity"]), bits.view(np.float32))


@pytest.mark.parametrize("name", HALVES)
@pytest.mark.parametrize("master", ["auto", None, "float32"])
def test_checkpoints_keep_types_and_masters(name, master, rng, tmp_path):
    params = half_model(rng, name)
    options = {"lr": 0.1, "momentum": 0.9, "master": master, "velocity_dtype": "bfloat16",
               "seed": 7}
    opt = optcore.SGD(params, **options)
    grads = [half_grads(rng, params) for _ in range(4)]
    for g in grads[:2]:
        opt.step(g)
    opt.save(tmp_path / "c", include_params=True)
    others = [p.copy() for p in params]
    for p in others:
        p.view(np.uint16)[...] = 0
    other = optcore.SGD(others, **options)
    other.restore(tmp_path / "c")
    for g in grads[2:]:
        opt.step(g)
        other.step(g)
    assert all(same_bits(p, q) for p, q in zip(params, others, strict=True))
    a, b = everything(opt), everything(other)
    a[1] = b[1] = None          # groups hold the arrays
    assert a == b


# Noise

def test_the_key_is_the_optimizers(rng):
    """The function with the optimizer's key takes the optimizer's step."""
    for seed, count in [(0, 0), (2**64 - 1, 3)]:
        params = [made(rng.standard_normal(n), "bfloat16") for n in (700, 10)]
        copies = [p.copy() for p in params]
        opt = optcore.SGD(params, lr=0.1, master=None, seed=seed)
        for step in range(count + 1):
            grads = half_grads_like(rng, params)
            opt.step(grads)
            for i, (p, g) in enumerate(zip(copies, grads, strict=True)):
                key = optcore.noise_key(seed, step, i)
                assert key == noise_key(seed, step, i)
                optcore.sgd_step(p, g, lr=0.1, rounding="stochastic", noise_key=key)
        assert all(same_bits(p, q) for p, q in zip(params, copies, strict=True))


def test_a_group_that_is_added_draws_noise():
    """As if it had been there from the beginning."""
    x, g = made(np.ones(1000), "bfloat16"), np.full(1000, 0.001, np.float32)
    plain, added = np.ones(3, np.float32), x.copy()
    groups = [{"params": [plain]}, {"params": [x], "master": None}]
    opt, grown = optcore.SGD(groups, lr=1.0), optcore.SGD([{"params": [plain.copy()]}], lr=1.0)
    grown.add_param_group({"params": [added], "master": None})
    for _ in range(3):
        opt.step([g[:3], g])
        grown.step([g[:3], g])
    assert same_bits(x, added)


def half_grads_like(rng, params):
    return [made(rng.standard_normal(p.shape), "bfloat16") for p in params]


def within(values, expected, variance):
    """Whether a mean of independent values is within four standard errors of what is expected."""
    return abs(np.mean(values) - expected) <= 4 * math.sqrt(variance / np.size(values))


def test_noise_is_uniform_and_uncorrelated():
    a = np.empty(2**20)
    streams = [noise(noise_key(*key), a, 2) for key in [(0, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 0)]]
    streams = [(half / 2**16 - 0.5 + 2**-17) * math.sqrt(12) for pair in streams for half in pair]
    for k, u in enumerate(streams):
        assert within(u, 0, 1)
        assert within(u**2, 1, 0.8)
        for lag in (1, 2, 3, 7, 8, 16, 64, 255, 256, 257):
            assert within(u[:-lag] * u[lag:], 0, 1), lag
        for other in streams[:k]:
            assert within(u * other, 0, 1)
    for u in streams:           # no place in a run is favoured
        means = u.reshape(-1, 256).mean(axis=0) * math.sqrt(2**20 / 256)
        assert abs(np.sum(means**2) - 256) < 4 * math.sqrt(2 * 256)


@by_half
def test_rounding_is_unbiased(name, rng):
    x = rng.standard_normal(2**20).astype(np.float32)
    half = negative_zeros(x.size, name)
    optcore.sgd_step(half, x, lr=1.0, maximize=True, rounding="stochastic", noise_key=1)
    below = rounded(x, name, np.zeros(x.size, np.int64))
    unit = widened(rounded(x, name, np.full(x.size, 65535))).astype(np.float64) - widened(below)
    odds = (x.astype(np.float64) - widened(below)) / np.where(unit == 0, 1, unit)
    up = same_patterns(half, below) ^ True
    assert abs(np.sum(up - odds)) <= 4 * math.sqrt(np.sum(odds * (1 - odds)))


def same_patterns(a, b):
    return a.view(np.uint16) == b.view(np.uint16)


def follows(half, expected):
    """Whether the mean of half numbers is what is expected, within four standard errors."""
    values = widened(half).astype(np.float64)
    return abs(values.mean() - expected) <= 4 * values.std() / math.sqrt(values.size)


def test_small_updates_are_not_lost():
    """1 + 0.001 stays 1 to the nearest; on average it follows by noise, through three binades."""
    n, steps = 4096, 10_000
    grads = np.full(n, 0.001, np.float32)
    nearest, stochastic = made(np.ones(n), "bfloat16"), made(np.ones(n), "bfloat16")
    options = {"lr": 1.0, "maximize": True, "master": None}
    opt = optcore.SGD(nearest, rounding="nearest", **options)
    other = optcore.SGD(stochastic, **options)
    plain = np.ones(1, np.float32)
    for step in range(1, steps + 1):
        opt.step(grads)
        other.step(grads)
        optcore.sgd_step(plain, grads[:1], lr=1.0, maximize=True)
        if step in (100, 1000, 3000, steps):
            assert follows(stochastic, plain[0]), step
    assert plain[0] > 10
    assert (widened(nearest) == 1).all()


def test_a_narrow_velocity_decays():
    """As rho**k on average by noise; to the nearest not at all."""
    n = 4096
    x, g = np.zeros((2, n), np.float32)
    options = {"lr": 0.0, "momentum": 0.999, "velocity_dtype": "bfloat16"}
    nearest, stochastic = made(np.ones(n), "bfloat16"), made(np.ones(n), "bfloat16")
    opt = optcore.SGD(x, velocities=stochastic, **options)
    other = optcore.SGD(x, velocities=nearest, rounding="nearest", **options)
    for step in range(1, 5001):
        opt.step(g)
        other.step(g)
        if step in (100, 1000, 3000, 5000):
            assert follows(stochastic, 0.999**step), step
    assert widened(stochastic).std() < 0.01
    assert (widened(nearest) == 1).all()


# Refusals

@pytest.mark.parametrize(("options", "error", "message"), [
    ({"master": "split"}, ValueError,
     r"master='split' must have bfloat16 parameters, got float16: master='float32'"),
    ({"master": "half"}, ValueError,
     r"master must be 'auto', None, 'split' or 'float32', got 'half'"),
    ({"rounding": "down"}, ValueError,
     r"rounding must be 'stochastic' or 'nearest', got 'down'"),
    ({"rounding": None}, TypeError, r"rounding must be 'stochastic' or 'nearest', got None"),
    ({"velocity_dtype": "int4"}, ValueError, r"velocity_dtype must be None, 'float32' or"),
    ({"seed": -1}, ValueError, r"seed must be an integer in \[0, 2\*\*64\), got -1"),
    ({"seed": 1.5}, TypeError, r"seed must be an integer in \[0, 2\*\*64\), got 1.5 of type"),
])
def test_refused_options(options, error, message):
    with pytest.raises(error, match=message):
        optcore.SGD(np.ones(3, np.float16), lr=0.1, **options)


@pytest.mark.parametrize(("dtype", "message"), [
    (np.uint16, r"dtype float32, float64, bfloat16 or float16, got uint16: a.view\(optcore"),
    (np.int32, r"got int32$"),
    (np.complex64, r"got complex64$"),
    (np.longdouble, r"got float128$"),
])
def test_refused_types(dtype, message):
    if np.dtype(dtype).name == "float64":
        pytest.skip("long double is double here")
    with pytest.raises(TypeError, match=message):
        optcore.SGD(np.ones(3, dtype), lr=0.1)


def test_bits_of_other_libraries_are_declared_as_the_error_says():
    a = array.array("H", [0x3F80] * 3)
    with pytest.raises(TypeError, match=r"uint16: np.asarray\(a\).view\(optcore.bfloat16\) decl"):
        optcore.SGD(a, lr=0.5)
    optcore.SGD(np.asarray(a).view(optcore.bfloat16), lr=0.5).step(np.ones(3, np.float32))
    assert a == array.array("H", [0x3F00] * 3)


def test_masters_stay_as_they_were_built():
    x = made(np.ones(3), "bfloat16")
    opt = optcore.SGD(x, lr=0.1, momentum=0.9)
    g = made(np.ones(3), "bfloat16")
    opt.step(g)
    before = everything(opt, x)
    for name, value in [("master", None), ("velocity_dtype", "bfloat16")]:
        with pytest.raises(ValueError, match=f"{name} must stay as the optimizer was built"):
            setattr(opt, name, value)
        opt.param_groups[0][name] = value
        with pytest.raises(ValueError, match=f"{name} must stay as the optimizer was built"):
            opt.step(g)
        opt.param_groups[0][name] = {"master": "auto", "velocity_dtype": None}[name]
        assert everything(opt, x) == before
    opt.rounding = "nearest"
    opt.step(g)


def test_float64_stays_with_float64():
    for param, grad, cure in [
        (np.float64, np.float16, r"float64: g.astype\(p.dtype\) has it"),
        (np.float64, BFLOAT16, r"float64: g.view\(ml_dtypes.bfloat16\).astype\(p.dtype\) has it"),
        (np.float16, np.float64, r"float16: g.astype\(np.float32\) can be stepped with it"),
        (BFLOAT16, np.float64, r"bfloat16: g.astype\(np.float32\) can be stepped with it"),
    ]:
        with pytest.raises(TypeError, match=f"has dtype b?float.*{cure}"):
            optcore.sgd_step(np.ones(3, param), np.ones(3, grad), lr=0.1, rounding="nearest")
    with pytest.raises(ValueError, match="velocity_dtype must be None for float64"):
        optcore.SGD(np.ones(3), lr=0.1, velocity_dtype="bfloat16")


def test_functions_want_the_rounding_said():
    x, g = np.ones(3, np.float16), np.ones(3, np.float16)
    with pytest.raises(TypeError, match="rounding must be given where a half type is written"):
        optcore.sgd_step(x, g, lr=0.1)
    with pytest.raises(TypeError, match="noise_key must be given with rounding='stochastic'"):
        optcore.sgd_step(x, g, lr=0.1, rounding="stochastic")
    with pytest.raises(TypeError, match="noise_key must be left out without rounding='stochastic'"):
        optcore.sgd_step(x, g, lr=0.1, rounding="nearest", noise_key=0)
    assert (x == 1).all()
    optcore.sgd_step(np.ones(3, np.float32), g, lr=0.1)     # nothing is rounded there


def test_arrays_of_ml_dtypes_and_of_bits_are_the_same(rng):
    x = made(rng.standard_normal(100), "bfloat16")
    y = x.copy().view(dtype_of_others("bfloat16"))
    g = made(rng.standard_normal(100), "bfloat16").view(y.dtype)
    for p in (x, y):
        optcore.SGD(p, lr=0.1, momentum=0.9).step(g)
    assert same_bits(x, y.view(BFLOAT16))
