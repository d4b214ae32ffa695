"""AdaGrad, RMSProp, Adam and AdamW: what their optimizers have besides those of SGD."""
from __future__ import annotations

import ast
import copy
import inspect
import itertools
import math
import pickle
import re

import numpy as np
import pytest
from test_options import documented_options, same_value, stub, stubbed_options

import optcore
from optcore.options import GROUP_OPTIONS, OPTIMIZER_OPTIONS, OPTIONS, running_power
from optcore.runtime import always_threaded
from reference import RULES, RULES_BY_ID, Options, averaged, product, rounded, same_bits, widened

KINDS = {"AdaGrad": "adagrad", "RMSProp": "rmsprop", "Adam": "adam", "AdamW": "adam"}
# What a class or a function has other defaults for than the table
DEFAULTS = {
    "AdaGrad": {"lr": 1e-2, "eps": 1e-10}, "RMSProp": {"lr": 1e-2}, "Adam": {"lr": 1e-3},
    "AdamW": {"lr": 1e-3, "weight_decay": 1e-2, "decoupled_weight_decay": True},
    "adagrad": {"eps": 1e-10}, "adamw": {"weight_decay": 1e-2},
}
EVERY = ["lr", "weight_decay", "decoupled_weight_decay", "maximize", "grad_scale", "clip_value",
         "rounding", "noise_key", "eps", "eps_in_sqrt", "flush_subnormals"]
FUNCTIONS = {
    "adagrad": EVERY, "adam": [*EVERY, "beta1", "beta2"],
    "rmsprop": [*EVERY, "alpha", "momentum", "nesterov", "lr_in_velocity"],
    "adamw": [*(name for name in EVERY if name != "decoupled_weight_decay"), "beta1", "beta2"],
}
ADAPTIVE = [rule for rule in RULES if rule.is_adaptive]
by_kind = pytest.mark.parametrize("kind", KINDS)
by_rule = pytest.mark.parametrize("rule", ADAPTIVE, ids=lambda rule: rule.id)


def kind_of(name):
    return getattr(optcore, name)


def ones(n=3, dtype=np.float32):
    return np.ones(n, dtype)


def contents(opt):
    return optcore.checkpoint.digest(
        *optcore.checkpoint.split(opt._contents(include_params=True)))


# The table is the only list

@by_kind
def test_signatures(kind):
    own = DEFAULTS[kind]
    options = [*GROUP_OPTIONS[KINDS[kind]], *OPTIMIZER_OPTIONS]
    parameters = inspect.signature(kind_of(kind).__init__).parameters
    taken = {name: p.default for name, p in parameters.items() if name in OPTIONS}
    assert sorted(taken) == sorted(options)
    for name, default in taken.items():
        assert same_value(default, own.get(name, OPTIONS[name].default)), name
    found = documented_options(kind_of(kind), OPTIONS)
    assert sorted(found) == sorted(options)
    for name, text in found.items():
        stated = re.search(r"default ([\w\".-]+)$", text)
        if stated:
            assert same_value(float(stated[1]) if stated[1][0].isdigit() else
                              ast.literal_eval(stated[1]), float(taken[name]) if isinstance(
                                  taken[name], float) else taken[name]), name
    assert "{common}" not in inspect.getdoc(kind_of(kind))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name):
    function = getattr(optcore, f"{name}_step")
    own = DEFAULTS.get(name, {})
    parameters = inspect.signature(function).parameters
    taken = {key: p.default for key, p in parameters.items() if key in OPTIONS}
    assert sorted(taken) == sorted(FUNCTIONS[name])
    for key, default in taken.items():
        expected = None if key in ("rounding", "noise_key") else own.get(key, OPTIONS[key].default)
        assert default is inspect.Parameter.empty or same_value(default, expected), key
    assert sorted(documented_options(function, OPTIONS)) == sorted(taken)
    required = [key for key, p in parameters.items() if p.default is p.empty]
    assert required[3:] == [*(["exp_avg_sq"] if "adam" in name else []), "lr",
                            *(["step"] if "adam" in name else [])]
    stubbed = stubbed_options(stub("functional.pyi")[f"{name}_step"])
    assert list(stubbed) == [key for key, p in parameters.items() if p.kind is p.KEYWORD_ONLY]
    for key, default in stubbed.items():
        if default is not None:
            assert same_value(ast.literal_eval(default), parameters[key].default), key


@by_kind
def test_options_are_attributes_and_stay_checked(kind):
    opt = kind_of(kind)(ones())
    for name, default in GROUP_OPTIONS[KINDS[kind]].items():
        value = getattr(opt, name)
        assert same_value(value, DEFAULTS[kind].get(name, default))
        setattr(opt, name, value)
        assert opt.param_groups[0][name] == value
    for name in {*GROUP_OPTIONS["sgd"]} - {*GROUP_OPTIONS[KINDS[kind]]}:
        with pytest.raises(AttributeError):
            setattr(opt, name, 0.5)
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
            kind_of(kind)(ones(), **{name: 0.5})
        with pytest.raises(TypeError, match=f"unknown option '{name}'.*options are lr"):
            kind_of(kind)([{"params": ones(), name: 0.5}])
    for name in ("alpha", "eps", "beta1", "amsgrad"):
        with pytest.raises(TypeError, match=f"unknown option '{name}'"):
            optcore.SGD([{"params": ones(), name: 0.5}], lr=0.1)


@pytest.mark.parametrize(("kind", "name", "bad"), [
    *[(kind, "eps", bad) for kind in KINDS for bad in (-1e-8, math.nan, math.inf, "1", True)],
    *[(kind, "eps_in_sqrt", 1) for kind in KINDS],
    *[(kind, "state_dtype", "float16") for kind in KINDS],
    *[("Adam", name, bad) for name in ("beta1", "beta2") for bad in (1.0, -0.1, None, 1 - 1e-9)],
    *[("RMSProp", "alpha", bad) for bad in (1.0, -0.1)], ("RMSProp", "centered", 0),
    ("RMSProp", "nesterov", True), ("Adam", "amsgrad", 1), ("Adam", "lr", None),
    ("AdaGrad", "lr_decay", -1.0), ("AdaGrad", "initial_accumulator_value", -1.0),
    ("AdaGrad", "initial_accumulator_value", 1e300),
])
def test_bad_values_are_refused(kind, name, bad):
    with pytest.raises((TypeError, ValueError), match=name):
        kind_of(kind)(ones(), **{name: bad})
    opt = kind_of(kind)(ones())
    before = contents(opt)
    with pytest.raises((TypeError, ValueError), match=name):
        setattr(opt, name, bad)
    opt.param_groups[0][name], good = bad, opt.param_groups[0][name]
    with pytest.raises((TypeError, ValueError), match=name):
        opt.step(ones())
    opt.param_groups[0][name] = good
    assert contents(opt) == before


@pytest.mark.parametrize(("kind", "name", "value"), [
    *[(kind, "state_dtype", "bfloat16") for kind in KINDS],
    ("AdaGrad", "initial_accumulator_value", 0.5),
    ("RMSProp", "lr_in_velocity", True), ("Adam", "master", None),
])
def test_what_states_were_laid_out_for_stays(kind, name, value):
    opt = kind_of(kind)(ones())
    opt.param_groups[0][name] = value
    with pytest.raises(ValueError, match=f"{name} must stay as the optimizer was built"):
        opt.step(ones())


# Steps

class Follower:
    """One parameter stepped by the reference, counting its steps."""

    def __init__(self, rule, x, **options):
        self.rule, self.options, self.x = rule, options, x.copy()
        self.states, self.count = [np.zeros_like(x) for _ in rule.states], 0

    def step(self, g, **changes):
        self.count += 1
        self.x, self.states = self.rule.reference(
            self.x, g, self.states, Options(**{**self.options, **changes}, step=self.count))


@by_rule
def test_each_parameter_counts_for_itself(rule, rng, cases):
    """Late ones, those that miss steps, and steps that are skipped; bits of the reference."""
    sizes = [7, 300, 1]
    params = [rng.standard_normal(n).astype(np.float32) for n in sizes]
    options = {"lr": 0.1, "eps": 1e-8, "momentum": 0.9 if rule.has_momentum else 0.0}
    opt = rule.optimizer(params, **options, weight_decay=0.01, skip_nonfinite=True)
    followers = [Follower(rule, p, **options, weight_decay=0.01) for p in params]
    for k in range(8):
        grads = [rng.standard_normal(n).astype(np.float32) for n in sizes]
        if k % 3 == 1:
            grads[0] = None
        if k < 5:
            grads[1] = None
        if k == 6:
            grads[2][0] = np.nan
        assert opt.step(grads) is (k != 6)
        for follower, g in zip(followers, grads, strict=True):
            if k != 6 and g is not None:
                follower.step(g)
        for p, follower in zip(params, followers, strict=True):
            cases(same_bits(p, follower.x))
    for entry, follower in zip(opt.state_dict()["state"].values(), followers, strict=True):
        assert entry["step"] == follower.count
        assert type(entry["step"]) is int
        for name, state in zip(rule.states, follower.states, strict=True):
            assert same_bits(entry[name], state)
        if "step" in rule.scalars:
            assert entry["beta1_power"] == product(0.9, follower.count)
            assert entry["beta2_power"] == product(0.999, follower.count)


def test_powers_are_products_of_what_the_betas_were():
    x, y = ones(dtype=np.float64), ones(dtype=np.float64)
    betas = [0.5, 0.75, 0.875]
    opt = optcore.Adam(x, lr=0.1, beta1=lambda step: betas[step], beta2=0.5, eps=0.0)
    m, v, powers = np.zeros(3), np.zeros(3), [1.0, 1.0]
    for k, beta in enumerate(betas):
        g = np.full(3, k + 1.0)
        opt.step(g)
        powers = [powers[0] * beta, powers[1] * 0.5]
        m = beta * m + (1 - beta) * g
        v = 0.5 * v + 0.5 * g * g
        y = y - (0.1 / (1 - powers[0])) * m / (np.sqrt(v) * (1 / math.sqrt(1 - powers[1])) + 0.0)
    assert same_bits(x, y)
    entry = opt.state_dict()["state"][0]
    assert (entry["beta1_power"], entry["beta2_power"]) == tuple(powers)


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.999])
def test_running_power(beta):
    for n in (0, 1, 2, 100, 5000):
        assert running_power(beta, n) == product(beta, n)
    assert running_power(0.9, 2**62) == product(0.9, 10_000)     # where it no longer changes


def test_lr_decay(rng):
    """Of each parameter by its own count, decoupled decay with it."""
    params = [rng.standard_normal(5) for _ in range(2)]
    opt = optcore.AdaGrad(params, lr=0.5, lr_decay=0.25, weight_decay=0.1,
                          decoupled_weight_decay=True)
    followers = [Follower(RULES_BY_ID["adagrad"], p, eps=1e-10, weight_decay=0.1,
                          decoupled_weight_decay=True) for p in params]
    for k in range(6):
        grads = [rng.standard_normal(5), None if k < 3 else rng.standard_normal(5)]
        opt.step(grads)
        for p, g, follower in zip(params, grads, followers, strict=True):
            if g is not None:
                follower.step(g, lr=0.5 / (1 + follower.count * 0.25))
            assert same_bits(p, follower.x)


@pytest.mark.parametrize("state_dtype", [None, "bfloat16"])
def test_initial_accumulator_value(state_dtype):
    params = {"a": ones(2), "b": np.ones((2, 3), np.float32, order="F"), "c": ones(0)}
    opt = optcore.AdaGrad([{"params": params}, {"params": {"d": ones(2)},
                                               "initial_accumulator_value": 0.0}],
                          initial_accumulator_value=0.1, state_dtype=state_dtype)
    opt.add_param_group({"params": {"e": ones(3)}})
    stored = rounded(np.full(1, 0.1, np.float32), state_dtype or "float32")
    for i, entry in opt.state_dict()["state"].items():
        assert np.all(widened(entry["square_sum"]) == (0 if i == 3 else widened(stored)))
    doubles = optcore.AdaGrad(ones(2, np.float64), initial_accumulator_value=0.1)
    assert (doubles.state_dict()["state"][0]["square_sum"] == 0.1).all()


def test_a_variance_below_zero_is_none():
    """Where gradients stay the same rounding makes it negative, whose root would be NaN."""
    x = np.zeros(1000, np.float32)
    g = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    opt = optcore.RMSProp(x, lr=1e-3, centered=True, alpha=0.5, eps=1e-3)
    negative = False
    for _ in range(60):
        opt.step(g)
        entry = opt.state_dict()["state"][0]
        negative |= bool((entry["square_avg"] < entry["grad_avg"] * entry["grad_avg"]).any())
    assert negative
    assert np.isfinite(x).all()


# The field's conventions, written as their authors do

def test_the_lecture(rng):
    x, g = rng.standard_normal(50), rng.standard_normal((4, 50))
    a, r, m = x.copy(), x.copy(), x.copy()
    opts = [optcore.AdaGrad(a, lr=0.1, eps=1e-7), optcore.RMSProp(r, lr=0.1, alpha=0.9, eps=1e-7),
            optcore.Adam(m, lr=0.1, eps=1e-7)]
    xa, xr, xm = x.copy(), x.copy(), x.copy()
    squared = averaged_square = first = second = 0
    for t, dx in enumerate(g, 1):
        for opt in opts:
            opt.step(dx)
        squared += dx * dx
        xa -= 0.1 * dx / (np.sqrt(squared) + 1e-7)
        averaged_square = 0.9 * averaged_square + (1 - 0.9) * dx * dx
        xr -= 0.1 * dx / (np.sqrt(averaged_square) + 1e-7)
        first = 0.9 * first + (1 - 0.9) * dx
        second = 0.999 * second + (1 - 0.999) * dx * dx
        xm -= 0.1 * (first / (1 - 0.9**t)) / (np.sqrt(second / (1 - 0.999**t)) + 1e-7)
    assert same_bits(a, xa)
    assert same_bits(r, xr)
    np.testing.assert_allclose(m, xm, rtol=1e-12, atol=0)


@pytest.mark.parametrize("centered", [False, True])
def test_keras_rmsprop(centered, rng):
    """ε in the root, α in the velocity."""
    x, g = rng.standard_normal(50), rng.standard_normal((5, 50))
    y, s, m, v = x.copy(), 0, 0, 0
    opt = optcore.RMSProp(x, lr=0.01, alpha=0.9, eps=1e-7, momentum=0.5, centered=centered,
                          eps_in_sqrt=True, lr_in_velocity=True)
    for d in g:
        opt.step(d)
        s = 0.9 * s + 0.1 * d * d
        m = 0.9 * m + 0.1 * d if centered else 0
        v = 0.5 * v + 0.01 * d / np.sqrt(s - m * m + 1e-7)
        y = y - v
    np.testing.assert_allclose(x, y, rtol=1e-12, atol=0)


def test_eps_root_of_optax(rng):
    """Adam's ε under the root of the corrected average."""
    x, g = rng.standard_normal(50), rng.standard_normal((5, 50))
    y, m, v = x.copy(), 0, 0
    opt = optcore.Adam(x, lr=0.01, eps=1e-3, eps_in_sqrt=True)
    for t, d in enumerate(g, 1):
        opt.step(d)
        m, v = 0.9 * m + 0.1 * d, 0.999 * v + 0.001 * d * d
        y = y - 0.01 * (m / (1 - 0.9**t)) / np.sqrt(v / (1 - 0.999**t) + 1e-3)
    np.testing.assert_allclose(x, y, rtol=1e-11, atol=0)


def test_keras_adagrad(rng):
    x, g = rng.standard_normal(50), rng.standard_normal((5, 50))
    y, s = x.copy(), 0.1
    opt = optcore.AdaGrad(x, lr=0.1, eps=1e-7, eps_in_sqrt=True, initial_accumulator_value=0.1)
    for d in g:
        opt.step(d)
        s = s + d * d
        y = y - 0.1 * d / np.sqrt(s + 1e-7)
    np.testing.assert_allclose(x, y, rtol=1e-12, atol=0)


def test_coupled_and_decoupled_decay_differ():
    """Adam normalizes what is coupled: the first step does not depend on λ."""
    steps = {}
    for decoupled in (False, True):
        x = np.full(3, 2.0)
        optcore.Adam(x, lr=0.5, weight_decay=0.1, decoupled_weight_decay=decoupled).step(ones(
            dtype=np.float64))
        steps[decoupled] = float(x[0])
    assert steps[False] == pytest.approx(1.5, rel=1e-7, abs=0)
    assert steps[True] == pytest.approx(2.0 * 0.95 - 0.5, rel=1e-7, abs=0)
    x, y = np.full(3, 2.0), np.full(3, 2.0)
    optcore.AdamW(x, lr=0.5, weight_decay=0.1).step(ones(dtype=np.float64))
    optcore.Adam(y, lr=0.5, weight_decay=0.1, decoupled_weight_decay=True).step(
        ones(dtype=np.float64))
    assert same_bits(x, y)


# With all else that an engine's step has

@by_rule
@pytest.mark.parametrize("threads", [1, 3])
def test_replicas_and_outer_steps(rule, threads, rng, cases):
    """Weighted means of gradients and of parameters, written back, with an average and the norm."""
    sizes = [300, 9000, 1]
    options = {"lr": 0.1, "eps": 1e-3, "weight_decay": 0.1,
               "momentum": 0.9 if rule.has_momentum else 0.0}
    params = [rng.standard_normal(n).astype(np.float32) for n in sizes]
    opt = rule.optimizer(params, **options, ema_decay=0.9, track_grad_norm=True)
    followers = [Follower(rule, p, **options) for p in params]
    averages = [p.copy() for p in params]
    optcore.set_num_threads(threads)
    try:
        with always_threaded():
            for outer, n in [(False, 3), (True, 1), (True, 6), (False, 5)]:
                sets = [[rng.standard_normal(k).astype(np.float32) for k in sizes]
                        for _ in range(n)]
                weights = [float(k + 1) for k in range(n)]
                kept = [[a.copy() for a in each] for each in sets]
                if outer:
                    opt.outer_step(sets, weights=weights, write_back=True)
                else:
                    opt.step_replicas(sets, weights=weights)
                for i, follower in enumerate(followers):
                    total = sum(weights)
                    d = np.float32(weights[0] / total) * kept[0][i]
                    for k in range(1, n):
                        d = d + np.float32(weights[k] / total) * kept[k][i]
                    follower.step(follower.x - d if outer else d)
                    averages[i] = averaged(averages[i], follower.x, 0.9)
                    cases(same_bits(params[i], follower.x), (outer, n, i))
                    cases(same_bits(opt.ema[i], averages[i]))
                    assert not outer or all(same_bits(each[i], params[i]) for each in sets)
    finally:
        optcore.set_num_threads(None)


@by_rule
def test_pieces(rule, rng):
    """Parameter by parameter a step is the same; gradients cannot be folded into these states."""
    options = {"lr": 0.1, "momentum": 0.9 if rule.has_momentum else 0.0}
    first = [rng.standard_normal(n).astype(np.float32) for n in (5, 700)]
    second = [p.copy() for p in first]
    whole, parts = (rule.optimizer(p, **options) for p in (first, second))
    for _ in range(3):
        grads = [rng.standard_normal(p.shape).astype(np.float32) for p in first]
        whole.step(grads)
        with parts.stepping() as part:
            for i in (1, 0):
                part.step(i, grads[i])
    assert contents(whole) == contents(parts)
    with pytest.raises(ValueError, match=r"accumulating\(\) needs the rule momentum"):
        parts.accumulating().__enter__()


@by_rule
def test_rows(rule, rng, cases):
    """lazy="rows" steps those that are given; exact steps are refused with the cure."""
    options = {"lr": 0.1, "eps": 1e-8, "weight_decay": 0.1,
               "momentum": 0.9 if rule.has_momentum else 0.0}
    x = rng.standard_normal((9, 4)).astype(np.float32)
    y, states = x.copy(), [np.zeros_like(x) for _ in rule.states]
    opt = rule.optimizer(x, **options, lazy="rows")
    for k in range(1, 5):
        rows = rng.choice(9, 3, replace=False)
        values = rng.standard_normal((3, 4)).astype(np.float32)
        opt.step(optcore.Rows(rows, values))
        g = np.zeros_like(x)
        g[rows] = values
        y, states = rule.rows_reference(rows, y, g, states, Options(**options, step=k))
        cases(same_bits(x, y))
    exact = rule.optimizer(x, **options)
    with pytest.raises(ValueError, match=r"lazy='exact' needs the rule sgd.*lazy='rows'"):
        exact.step(optcore.Rows([1], np.ones((1, 4), np.float32)))
    assert exact.step_count == 0
    assert exact.state_dict()["state"][0]["step"] == 0


@by_kind
@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("master", ["auto", None])
def test_storages(kind, name, master, rng, cases):
    """Half parameters and bfloat16 states, by noise as the functions draw it."""
    rule = RULES_BY_ID[kind.lower()]
    x = rounded(rng.standard_normal(600).astype(np.float32), name)
    options = {"lr": 0.01, "master": master, "state_dtype": "bfloat16", "seed": 5}
    opt = kind_of(kind)(x, **options)
    kept = widened(x).copy() if master and name != "float32" else x.copy()
    states = [rounded(np.zeros(600, np.float32), "bfloat16") for _ in rule.states]
    for k in range(3):
        g = rounded(rng.standard_normal(600).astype(np.float32), name)
        opt.step(g)
        o = Options(lr=0.01, step=k + 1, eps=opt.eps, weight_decay=opt.weight_decay)
        kept, states = rule.reference(kept, g, states, o, "stochastic",
                                      optcore.noise_key(5, k, 0))
    entry = opt.state_dict()["state"][0]
    for key, state in zip(rule.states, states, strict=True):
        cases(same_bits(entry[key].view(np.uint16), state.view(np.uint16)), key)
    cases(same_bits(entry.get("master", x) if name != "bfloat16" or "master" in entry
                    else x.view(np.uint16), kept if name != "bfloat16" or "master" in entry
                    else kept.view(np.uint16)))


# Rules that options choose

def test_switches_may_be_set_while_training(rng):
    """Momentum, centering and the maximum begin where they are switched on, from zeros."""
    x = rng.standard_normal(40)
    opt = optcore.RMSProp(x, lr=0.1, momentum=lambda step: 0.0 if step < 2 else 0.5)
    names = ["rmsprop", "rmsprop", "rmsprop_momentum", "rmsprop_centered_momentum",
             "rmsprop_centered_nesterov", "rmsprop_centered"]
    states = {name: np.zeros(40) for name in ("square_avg", "velocity", "grad_avg")}
    y = x.copy()
    for k, name in enumerate(names):
        if k == 3:
            opt.centered = True
        if k == 4:
            opt.nesterov = True
        if k == 5:
            opt.nesterov, opt.momentum = False, 0.0
        g, rule = rng.standard_normal(40), RULES_BY_ID[name]
        opt.step(g)
        y, new = rule.reference(y, g, [states[s] for s in rule.states], Options(
            lr=0.1, momentum=0.5 if rule.has_momentum else 0.0))
        states.update(zip(rule.states, new, strict=True))
        assert same_bits(x, y), name
    entry = opt.state_dict()["state"][0]
    assert all(same_bits(entry[name], state) for name, state in states.items())
    x = np.ones(3)
    adam = optcore.Adam(x)
    adam.step(np.ones(3))
    assert adam.state_dict()["state"][0]["max_exp_avg_sq"] is None
    adam.amsgrad = True
    adam.step(np.ones(3))
    entry = adam.state_dict()["state"][0]
    assert same_bits(entry["max_exp_avg_sq"], entry["exp_avg_sq"])


SWITCHES = {
    "rmsprop": {}, "rmsprop_momentum": {"momentum": 0.5}, "rmsprop_centered": {"centered": True},
    "rmsprop_nesterov": {"momentum": 0.5, "nesterov": True},
    "rmsprop_centered_momentum": {"momentum": 0.5, "centered": True},
    "rmsprop_centered_nesterov": {"momentum": 0.5, "centered": True, "nesterov": True},
}


@pytest.mark.parametrize("names", list(itertools.permutations(SWITCHES, 2)), ids=" to ".join)
def test_any_rule_of_a_family_may_follow_another(names, rng):
    """Each keeps its states apart, wherever those of the other lie, and begins with zeros."""
    x = rng.standard_normal(40).astype(np.float32)
    opt, y, states = optcore.RMSProp(x, lr=0.1), x.copy(), {}
    for name in (*names, *names):
        rule = RULES_BY_ID[name]
        opt.param_groups[0].update({"momentum": 0.0, "centered": False, "nesterov": False,
                                    **SWITCHES[name]})
        for _ in range(2):
            g = rng.standard_normal(40).astype(np.float32)
            opt.step(g)
            y, new = rule.reference(
                y, g, [states.get(state, np.zeros_like(x)) for state in rule.states],
                Options(lr=0.1, momentum=0.5 if rule.has_momentum else 0.0))
            states.update(zip(rule.states, new, strict=True))
            assert same_bits(x, y)
    entry = opt.state_dict()["state"][0]
    for state in ("square_avg", "velocity", "grad_avg"):
        assert (entry[state] is None) is (state not in states)
        assert entry[state] is None or same_bits(entry[state], states[state])


def test_a_refused_schedule_leaves_states_where_they_are():
    """The first group has another rule by then, and a call between steps meets it."""
    rho = [0.9, 0.0]
    params, grads = [np.ones(4), np.ones(4)], [np.ones(4), np.ones(4)]
    opt = optcore.RMSProp(
        [{"params": [params[0]], "momentum": lambda step: rho[step > 2]},
         {"params": [params[1]], "momentum": lambda step: rho[step > 2], "nesterov": True}],
        lr=0.01, centered=True, grads=grads)
    for _ in range(3):
        opt.step()
    velocity = opt.state_dict()["state"][0]["velocity"]
    with pytest.raises(ValueError, match="nesterov must have momentum > 0"):
        opt.step()
    opt.zero_grad()
    opt.param_groups[1]["nesterov"] = False
    before = opt.state_dict()["state"][0]["grad_avg"]
    for g in grads:
        g[:] = 1
    opt.step()
    entry = opt.state_dict()["state"][0]
    assert same_bits(entry["velocity"], velocity)
    assert same_bits(entry["grad_avg"], 0.99 * before + (1 - 0.99) * np.ones(4))


@by_kind
def test_velocities_of_the_callers_are_sgds(kind):
    x = ones()
    with pytest.raises(TypeError, match="velocities"):
        kind_of(kind)(x, velocities=ones())
    opt = kind_of(kind)(x)
    opt.step(ones())
    before = contents(opt)
    with pytest.raises(TypeError, match="velocities must be left out"):
        opt.add_param_group({"params": ones()}, velocities=np.zeros(3, np.float32))
    assert contents(opt) == before
    opt.step(ones())


@by_kind
def test_states_are_brought_to_another_dtype(kind, tmp_path):
    narrow = kind_of(kind)(ones(300), state_dtype="bfloat16")
    for _ in range(3):
        narrow.step(np.linspace(0.1, 1, 300, dtype=np.float32))
    wide = kind_of(kind)(ones(300))
    wide.load_state_dict(narrow.state_dict())
    assert wide.state_dtype is None
    narrow.save(tmp_path / "file")
    loaded = kind_of(kind).load(tmp_path / "file", ones(300), state_dtype=None)
    for opt in (wide, loaded):
        for name in opt._state_names:
            a, b = (each.state_dict()["state"][0][name] for each in (opt, narrow))
            assert a is b is None or same_bits(a, widened(b))
    narrow.load_state_dict(wide.state_dict())
    assert narrow.state_dtype == "bfloat16"


def test_the_accumulators_begin_stays_the_optimizers():
    saved = optcore.AdaGrad(ones(), initial_accumulator_value=0.5)
    other = optcore.AdaGrad(ones())
    other.load_state_dict(saved.state_dict())
    assert other.initial_accumulator_value == 0.0
    assert (other.state_dict()["state"][0]["square_sum"] == 0.5).all()


@pytest.mark.parametrize(("options", "words"), [
    ({"lr": 1e38}, r"lr / \(1 - beta1\) must be finite"),
    ({"eps": 1e-43, "eps_in_sqrt": True}, r"eps \* \(1 - beta2\) must not vanish"),
])
def test_what_float32_cannot_hold_of_a_combination_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        optcore.Adam(ones(), **options)
    optcore.Adam(ones(dtype=np.float64), **options)


@pytest.mark.parametrize("options", [
    {}, {"momentum": 0.5}, {"centered": True}, {"momentum": 0.5, "centered": True},
    {"momentum": 0.5, "nesterov": True, "lr_in_velocity": True},
])
def test_states_that_a_rule_leaves_out_are_not_there(options):
    opt = optcore.RMSProp([ones(), ones(2)], **options)
    opt.step([ones(), ones(2)])
    for entry in opt.state_dict()["state"].values():
        assert (entry["velocity"] is None) == ("momentum" not in options)
        assert (entry["grad_avg"] is None) == ("centered" not in options)


def test_the_velocity_is_converted_between_conventions():
    params = [np.ones(3), np.ones(3)]
    left, right = (optcore.RMSProp(p, lr=0.5, momentum=0.5, lr_in_velocity=flag)
                   for p, flag in zip(params, (False, True), strict=True))
    left.step(np.full(3, 2.0))
    right.load_state_dict(left.state_dict())
    v, w = (opt.state_dict()["state"][0]["velocity"] for opt in (left, right))
    assert same_bits(w, -0.5 * v)
    assert right.lr_in_velocity is True


# State

@by_kind
def test_copies_pickles_and_files(kind, rng, tmp_path):
    params = {"a": rng.standard_normal((3, 4)).astype(np.float32), "b": rng.standard_normal(5)}
    opt = kind_of(kind)(params, lr=lambda step: 0.1 / (1 + step), ema_decay=0.9)
    grads = [{name: rng.standard_normal(p.shape).astype(p.dtype) for name, p in params.items()}
             for _ in range(5)]
    for k in range(3):
        opt.step({**grads[k], "b": None} if k < 2 else grads[k])
    opt.save(tmp_path / "file", include_params=True)
    fresh = {name: np.zeros_like(p) for name, p in params.items()}
    loaded = kind_of(kind).load(tmp_path / "file", fresh, lr=opt.lr)
    copied = copy.deepcopy({"params": params, "opt": opt})
    others = [loaded, copied["opt"]]
    for other in others:
        assert contents(other) == contents(opt)
    for k in (3, 4):
        for each in (opt, *others):
            each.step(grads[k])
    for other in others:
        assert contents(other) == contents(opt)
    plain = kind_of(kind)(params)
    plain.step(grads[0])
    assert contents(pickle.loads(pickle.dumps(plain))) == contents(plain)


@by_kind
@pytest.mark.parametrize(("key", "bad", "error"), [
    ("step", -1, ValueError), ("step", 1.5, ValueError), ("step", None, ValueError),
    ("step", True, ValueError), ("beta1_power", 2.0, ValueError), ("beta2_power", None, ValueError),
    ("beta1_power", math.nan, ValueError), ("step", 2**53 + 1, ValueError),
])
def test_bad_counts_are_refused(kind, key, bad, error):
    opt = kind_of(kind)(ones())
    opt.step(ones())
    state, before = opt.state_dict(), contents(opt)
    if key not in state["state"][0]:
        state["state"][0][key] = 0.5
        with pytest.raises(ValueError, match=f"got unknown.*{key}"):
            opt.load_state_dict(state)
        return
    state["state"][0][key] = bad
    with pytest.raises(error, match=rf"state_dict\['state'\]\[0\]\['{key}'\] must be"):
        opt.load_state_dict(state)
    del state["state"][0][key]
    with pytest.raises(KeyError, match=key):
        opt.load_state_dict(state)
    assert contents(opt) == before


@pytest.mark.parametrize(("kind", "changes"), [
    *[(kind, changes) for kind in ("Adam", "AdamW") for changes in (
        {"step": 0}, {"beta1_power": 1.0}, {"exp_avg": None}, {"exp_avg_sq": None})],
    ("RMSProp", {"square_avg": None}), ("AdaGrad", {"square_sum": None}),
])
def test_what_contradicts_itself_is_refused(kind, changes):
    opt = kind_of(kind)(ones())
    opt.step(ones())
    state, before = opt.state_dict(), contents(opt)
    state["state"][0].update(changes)
    with pytest.raises(ValueError, match=r"\['state'\]\[0\]"):
        opt.load_state_dict(state)
    assert contents(opt) == before


def test_what_begins_once_is_no_schedule():
    for given in ({"initial_accumulator_value": lambda step: 1.0},):
        with pytest.raises(TypeError, match="initial_accumulator_value must be a finite number"):
            optcore.AdaGrad(ones(), **given)
        with pytest.raises(TypeError, match="initial_accumulator_value must be a finite number"):
            optcore.AdaGrad([{"params": ones(), **given}])


def test_adamw_stays_decoupled(tmp_path):
    adam = optcore.Adam(ones(), weight_decay=0.25)
    adam.step(ones())
    adam.save(tmp_path / "file")
    opt = optcore.AdamW(ones())
    opt.load_state_dict(adam.state_dict())
    loaded = optcore.AdamW.load(tmp_path / "file", ones())
    for each in (opt, loaded):
        assert each.decoupled_weight_decay is True
        assert each.weight_decay == 0.25
    with pytest.raises(optcore.CheckpointError, match=r"no option 'eps_in_sqrt'|no option 'lr_d"):
        optcore.AdaGrad.load(tmp_path / "file", ones())


@by_kind
def test_states_of_other_rules_are_refused(kind):
    own = kind_of(kind)(ones())
    before = contents(own)
    for other in [*KINDS, "SGD"]:
        if KINDS.get(other) != KINDS[kind]:
            with pytest.raises((KeyError, ValueError)):
                own.load_state_dict(kind_of(other)(ones(), lr=0.1).state_dict())
    assert contents(own) == before


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_step_of_the_function(name):
    function = getattr(optcore, f"{name}_step")
    arrays = [ones(), ones(), np.zeros(3, np.float32), np.zeros(3, np.float32)]
    before = [a.copy() for a in arrays]
    for step, error in [(0, ValueError), (-1, ValueError), (1.0, TypeError), (True, TypeError)]:
        with pytest.raises(error, match="step must be"):
            function(*arrays, lr=0.1, step=step)
    with pytest.raises(TypeError, match="step"):
        function(*arrays, lr=0.1)
    with pytest.raises(ValueError, match="max_exp_avg_sq must not share memory with exp_avg"):
        function(*arrays, arrays[2], lr=0.1, step=1)
    with pytest.raises(TypeError, match="exp_avg_sq has dtype int64"):
        function(*arrays[:3], arrays[3].astype(int), lr=0.1, step=1)
    assert all(map(same_bits, arrays, before))


def test_arrays_choose_the_rule_of_rmsprop():
    arrays = [ones() for _ in range(5)]
    for given, options in [((0, 1, 2, 3), {}), ((0, 1, 2), {"momentum": 0.5})]:
        with pytest.raises(ValueError, match="velocity must be given with momentum > 0"):
            optcore.rmsprop_step(*[arrays[i] for i in given], lr=0.1, **options)
    with pytest.raises(ValueError, match="nesterov must have momentum > 0"):
        optcore.rmsprop_step(*arrays[:3], lr=0.1, nesterov=True)
    with pytest.raises(ValueError, match="grad_avg must not share memory with velocity"):
        optcore.rmsprop_step(*arrays[:4], arrays[3], lr=0.1, momentum=0.5)


def test_an_optimizer_of_one_rule():
    """A subclass may fix the rule, as adamw, whose decay is decoupled whatever is said."""
    class Fixed(optcore.Adam):
        _rule = "adamw"

    x, y = np.full(3, 2.0), np.full(3, 2.0)
    Fixed(x, weight_decay=0.1).step(ones(dtype=np.float64))
    optcore.AdamW(y, weight_decay=0.1).step(ones(dtype=np.float64))
    assert same_bits(x, y)
