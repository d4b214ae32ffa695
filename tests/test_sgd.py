"""optcore.SGD: structures, groups, schedules and state."""
from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest

import optcore
from reference import RULES, RULES_BY_ID, Options, same_bits

SHAPES = [(), (7,), (0,), (3, 5), (33, 4, 2), (1000,)]


def arrays(rng, dtype=np.float32, shapes=SHAPES):
    return [np.array(rng.standard_normal(shape), dtype) for shape in shapes]


class Model:
    """A list of parameters stepped by the reference."""

    def __init__(self, rule, params, options):
        self.rule, self.options = rule, options
        self.params = [p.copy() for p in params]
        self.states = [[np.zeros_like(p) for _ in rule.states] for p in params]
        self.started = [False] * len(params)

    def step(self, grads, **changes):
        for i, g in enumerate(grads):
            if g is None:
                continue
            options = Options(**{**vars(self.options), **changes,
                                 "first_step": not self.started[i]})
            self.params[i], self.states[i] = self.rule.reference(
                self.params[i], g, self.states[i], options)
            self.started[i] = True


def assert_same(params, model):
    for p, q in zip(params, model.params, strict=True):
        assert same_bits(p, q)


def sgd(params, rule, options, **more):
    keywords = {k: v for k, v in vars(options).items() if k not in ("grad_scale", "first_step")}
    return rule.optimizer(params, **keywords, **more)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.id)
def test_steps_with_every_option(rule, dtype, rng, simd_level, cases):
    for decay, decoupled, maximize, clip, dampening in itertools.product(
        [0.0, 0.01], [False, True], [False, True], [None, 0.5],
        [0.0, 0.3] if rule.dampens else [0.0],
    ):
        options = Options(
            lr=0.1, momentum=0.9 if rule.has_momentum else 0.0, dampening=dampening,
            weight_decay=decay, decoupled_weight_decay=decoupled, maximize=maximize,
            clip_value=clip,
        )
        params = arrays(rng, dtype)
        model = Model(rule, params, options)
        opt = sgd(params, rule, options)
        for k in range(4):
            grads = arrays(rng, dtype)
            grads[k] = None     # each misses another step, so first steps differ
            scale = [1.0, 0.25][k % 2]
            assert opt.step(grads, grad_scale=scale) is True
            model.step(grads, grad_scale=scale)
            for p, q in zip(params, model.params, strict=True):
                cases(same_bits(p, q), options)


@pytest.mark.parametrize("kind", ["array", "list", "tuple", "mapping", "generator", "groups",
                                  "named groups"])
def test_structures(kind, rng):
    rule, options = RULES_BY_ID["momentum"], Options(momentum=0.9)
    flat = arrays(rng)[-1:] if kind == "array" else arrays(rng)
    names = [f"p{i}" for i in range(len(flat))]
    model = Model(rule, flat, options)
    grads = [np.array(rng.standard_normal(p.shape), p.dtype) for p in flat]
    model.step(grads)
    given = {
        "array": lambda: flat[0],
        "list": lambda: flat,
        "tuple": lambda: tuple(flat),
        "mapping": lambda: dict(zip(names, flat, strict=True)),
        "generator": lambda: (p for p in flat),
        "groups": lambda: [{"params": flat[:2]}, {"params": flat[2]},
                           {"params": tuple(flat[3:])}],
        "named groups": lambda: [{"params": dict(zip(names[:2], flat[:2], strict=True))},
                                 {"params": dict(zip(names[2:], flat[2:], strict=True))}],
    }[kind]()
    by_name = kind in ("mapping", "named groups")
    gradients = grads[0] if kind == "array" else (
        dict(reversed(list(zip(names, grads, strict=True)))) if by_name else grads
    )
    opt = sgd(given, rule, options, ema_decay=0.5)
    opt.step(gradients)
    assert_same(flat, model)
    assert type(opt.ema) is {"array": np.ndarray, "tuple": tuple}.get(
        kind, dict if by_name else list
    )
    if by_name:
        assert list(opt.ema) == names


def test_groups_have_options_of_their_own(rng):
    params = arrays(rng)
    copies = [p.copy() for p in params]
    grads = arrays(rng)
    opt = optcore.SGD(
        [{"params": params[:3], "lr": 0.5}, {"params": params[3:], "momentum": 0.5,
                                            "nesterov": True, "weight_decay": 0.1}],
        lr=0.1,
    )
    assert [group["lr"] for group in opt.param_groups] == [0.5, 0.1]
    opt.step(grads)
    for p, q, g in zip(params[:3], copies[:3], grads[:3], strict=True):
        optcore.sgd_step(q, g, lr=0.5)
        assert same_bits(p, q)
    for p, q, g in zip(params[3:], copies[3:], grads[3:], strict=True):
        optcore.nesterov_step(q, g, np.zeros_like(q), lr=0.1, momentum=0.5, weight_decay=0.1)
        assert same_bits(p, q)


def test_groups_edited_between_steps(rng):
    rule, options = RULES_BY_ID["momentum"], Options(momentum=0.9)
    params = arrays(rng)
    model = Model(rule, params, options)
    opt = sgd(params, rule, options)
    for changes in [{}, {"lr": 0.01}, {"momentum": 0.5}, {"weight_decay": 0.1},
                    {"dampening": 0.2}, {"maximize": True}, {"clip_value": 0.1},
                    {"decoupled_weight_decay": True}]:
        opt.param_groups[0].update(changes)
        options = Options(**{**vars(options), **changes})
        model.options = options
        grads = arrays(rng)
        opt.step(grads)
        model.step(grads)
        assert_same(params, model)


def test_momentum_switched_on_later(rng):
    x, g = (np.array(rng.standard_normal(50), np.float32) for _ in range(2))
    y, v = x.copy(), np.zeros_like(x)
    opt = optcore.SGD(x, lr=0.1)
    opt.step(g)
    optcore.sgd_step(y, g, lr=0.1)
    opt.param_groups[0].update(momentum=0.9, dampening=0.5)
    opt.step(g)
    optcore.momentum_step(y, g, v, lr=0.1, momentum=0.9, dampening=0.5, first_step=True)
    assert same_bits(x, y)


def test_schedule_is_given_the_step_count(rng):
    x, g = (np.array(rng.standard_normal(50), np.float32) for _ in range(2))
    y = x.copy()
    counts = []

    def lr(step):
        counts.append(step)
        return 0.1 / (1 + step)

    opt = optcore.SGD(x, lr=lr, skip_nonfinite=True)
    for k in range(3):
        opt.step(g)
        optcore.sgd_step(y, g, lr=0.1 / (1 + k))
    assert not opt.step(np.full_like(g, np.nan))
    opt.step(g)
    assert counts == [0, 1, 2, 3, 3]
    optcore.sgd_step(y, g, lr=0.1 / 4)
    assert same_bits(x, y)


@pytest.mark.parametrize("bad", [float("nan"), -1.0, True, "x"])
def test_schedule_that_returns_nonsense(bad, rng):
    x = np.ones(5, np.float32)
    opt = optcore.SGD(x, lr=lambda step: bad if step else 0.5)
    opt.step(np.ones_like(x))
    with pytest.raises((TypeError, ValueError), match=r"lr\(step_count\) must be"):
        opt.step(np.ones_like(x))
    assert opt.step_count == 1
    assert (x == 0.5).all()


def test_schedule_that_steps_is_refused():
    x = np.ones(5, np.float32)
    opt = optcore.SGD(x, lr=lambda step: opt.step(np.ones_like(x)))
    with pytest.raises(RuntimeError, match="one step at a time"):
        opt.step(np.ones_like(x))
    assert (x == 1).all()


def test_bound_gradients(rng):
    rule, options = RULES_BY_ID["nesterov"], Options(momentum=0.9)
    params, grads = arrays(rng), arrays(rng)
    grads[1] = None
    model = Model(rule, params, options)
    opt = sgd(params, rule, options, grads=grads)
    for _ in range(3):
        for g in grads:
            if g is not None:
                g[...] = rng.standard_normal(g.shape)
        opt.step()
        model.step(grads)
        assert_same(params, model)
    others = arrays(rng)
    opt.step(others)
    model.step(others)
    opt.step()
    model.step(grads)
    assert_same(params, model)


def test_array_kinds_that_work(tmp_path, rng):
    class Sub(np.ndarray):
        pass

    mapped = np.memmap(tmp_path / "x", np.float32, "w+", shape=(100,))
    mapped[:] = 1
    mapped.flush()
    mapped = np.memmap(tmp_path / "x", np.float32, "r+", shape=(100,))
    sub = np.ones(100, np.float32).view(Sub)
    params = [mapped, sub, np.ones((), np.float64), np.ones((0, 2), np.float32),
              np.asfortranarray(np.ones((3, 4), np.float32))]
    grads = [np.ones_like(p, subok=False) for p in params]
    opt = optcore.SGD(params, lr=0.5, momentum=0.9)
    opt.step(grads)
    for p in params:
        assert (np.asarray(p) == 0.5).all()
    optcore.sgd_step(params[1], grads[1], lr=0.5)
    assert (np.asarray(params[1]) == 0).all()
    mapped.flush()
    assert (np.fromfile(tmp_path / "x", np.float32) == 0.5).all()


# State

@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.id)
def test_state_dict_goes_on_with_the_same_bits(rule, rng):
    options = Options(momentum=0.9 if rule.has_momentum else 0.0,
                      dampening=0.5 if rule.dampens else 0.0)
    params = arrays(rng) + arrays(rng, np.float64)
    script = [arrays(rng) + arrays(rng, np.float64) for _ in range(6)]
    for grads in script[:4]:
        grads[1] = None                         # starts late
    opt = sgd(params, rule, options, ema_decay=0.9)
    for grads in script[:3]:
        opt.step(grads)
    copies = [p.copy() for p in params]
    saved = copy.deepcopy(opt.state_dict())
    for entry, p in zip(saved["state"].values(), params, strict=True):
        assert all(a.dtype == p.dtype for a in entry.values() if isinstance(a, np.ndarray))
    resumed = rule.optimizer(
        copies, lr=7.0, ema_decay=0.5, momentum=0.1 if rule.has_momentum else 0.0)
    resumed.load_state_dict(saved)
    resumed.ema_decay = 0.9                     # the optimizer's own, not a group's
    assert resumed.step_count == 3
    for grads in script[3:]:
        opt.step(grads)
        resumed.step(grads)
    for p, q in zip(params, copies, strict=True):
        assert same_bits(p, q)
    for p, q in zip(opt.ema, resumed.ema, strict=True):
        assert same_bits(p, q)


def test_state_dict_is_a_snapshot_of_plain_things(rng):
    x, g = np.ones(5, np.float32), np.ones(5, np.float32)
    opt = optcore.SGD({"w": x}, lr=0.1, momentum=0.9)
    opt.step({"w": g})
    state = opt.state_dict()
    kept = state["state"][0]["velocity"].copy()
    opt.step({"w": g})
    assert same_bits(state["state"][0]["velocity"], kept)

    def walk(value):
        if isinstance(value, dict):
            for key, item in value.items():
                assert type(key) in (str, int)
                walk(item)
        elif isinstance(value, list):
            for item in value:
                walk(item)
        else:
            assert value is None or type(value) in (int, float, bool, str, np.ndarray)

    walk(state)


@pytest.mark.parametrize("to_right", [True, False])
@pytest.mark.parametrize("nesterov", [False, True])
def test_velocity_convention_is_converted(nesterov, to_right, rng):
    lr = 0.25                                   # a power of two: the conversion is exact
    x = np.array(rng.standard_normal(64), np.float64)
    grads = [np.array(rng.standard_normal(64)) for _ in range(20)]
    options = {"lr": lr, "momentum": 0.5, "nesterov": nesterov}
    opt = optcore.SGD(x, **options, lr_in_velocity=not to_right)
    for g in grads[:10]:
        opt.step(g)
    y = x.copy()
    other = optcore.SGD(y, **options, lr_in_velocity=to_right)
    other.load_state_dict(opt.state_dict())
    v, w = (o.state_dict()["state"][0]["velocity"] for o in (opt, other))
    assert same_bits(w, v * -lr if to_right else v / -lr)
    assert other.param_groups[0]["lr_in_velocity"] is to_right
    for g in grads[10:]:
        opt.step(g)
        other.step(g)
    np.testing.assert_allclose(y, x, rtol=1e-12, atol=1e-13)


def test_velocity_conversion_that_cannot_be(rng):
    x, g = np.ones(5, np.float32), np.full(5, 1e30, np.float32)
    opt = optcore.SGD(x, lr=0.0, momentum=0.9)
    opt.step(g)
    other = optcore.SGD(x.copy(), lr=0.1, momentum=0.9, lr_in_velocity=True)
    with pytest.raises(ValueError, match="lr=0: its velocities cannot be converted"):
        other.load_state_dict(opt.state_dict())
    opt.param_groups[0]["lr"] = 1e20
    opt.step(np.zeros_like(g))
    with pytest.raises(ValueError, match="overflows or vanishes when converted"):
        other.load_state_dict(opt.state_dict())
    assert other.step_count == 0
    assert other.param_groups[0]["lr"] == 0.1


def test_notes_of_any_kind_are_no_numbers(rng):
    class Loud(float):
        def __call__(self, step):
            return 7.0

    group = {"params": np.ones(3), "name": np.ones(3), "initial_lr": np.float64(0.5)}
    opt = optcore.SGD([group], lr=Loud(0.5))    # a number, though it can be called
    saved = opt.state_dict()["param_groups"][0]
    assert saved["name"] is group["name"]
    assert type(saved["initial_lr"]) is type(saved["lr"]) is float
    assert (saved["lr"], saved["schedules"]) == (0.5, [])


def test_schedules_and_state(rng):
    x, g = np.ones(5, np.float32), np.ones(5, np.float32)
    opt = optcore.SGD(x, lr=lambda step: 0.1, momentum=0.9)
    opt.step(g)
    state = opt.state_dict()
    assert state["param_groups"][0]["lr"] is None
    with pytest.raises(ValueError, match="callable lr"):
        optcore.SGD(x.copy(), lr=0.1, momentum=0.9).load_state_dict(state)

    def own(step):
        return 0.5

    other = optcore.SGD(x.copy(), lr=own, momentum=0.9)
    other.load_state_dict(state)
    assert other.param_groups[0]["lr"] is own
    assert other.step_count == 1


def broken_states():
    yield "not a mapping", lambda s: [], TypeError
    for key in ("version", "step_count", "param_groups", "state"):
        yield f"no {key}", lambda s, key=key: {k: v for k, v in s.items() if k != key}, KeyError
    yield "version", lambda s: {**s, "version": 99}, ValueError
    yield "count", lambda s: {**s, "step_count": -1}, ValueError
    yield "huge count", lambda s: {**s, "step_count": 2**70}, ValueError
    yield "huge skipped", lambda s: {**s, "skipped": 2**70}, ValueError
    yield "groups", lambda s: {**s, "param_groups": []}, ValueError
    yield "no list", lambda s: {**s, "param_groups": 3}, TypeError
    yield "no group", lambda s: {**s, "param_groups": [3]}, TypeError
    yield "json keys", lambda s: {**s, "state": {str(k): v for k, v in s["state"].items()}}, (
        KeyError)

    def entry(i, **changes):
        return lambda s: {**s, "state": {**s["state"], i: {**s["state"][i], **changes}}}

    yield "shape", entry(1, velocity=np.ones(3, np.float32)), ValueError
    yield "dtype", entry(1, velocity=np.ones(7, np.float64)), TypeError
    yield "kind", entry(1, velocity=[1.0] * 7), TypeError
    yield "flag", entry(1, first_step=2), TypeError
    yield "ema", entry(1, ema=np.ones(7, np.float32)), ValueError
    yield "unknown", entry(0) and (lambda s: {**s, "state": {**s["state"], 9: s["state"][0]}}), (
        ValueError)
    yield "missing", lambda s: {**s, "state": {0: s["state"][0]}}, KeyError

    def group(**changes):
        return lambda s: {**s, "param_groups": [{**s["param_groups"][0], **changes}]}

    yield "option", group(momentum=2.0), ValueError
    yield "unknown option", lambda s: {**s, "options": {"lr": 3.0}}, ValueError
    yield "bool", group(lr=True), TypeError
    yield "too few", group(params=[0]), ValueError
    yield "order", group(params=[1, 0]), ValueError
    yield "lr to convert by", group(lr="a", lr_in_velocity=True), TypeError


@pytest.mark.parametrize(
    ("spoil", "error"), [pytest.param(*row[1:], id=row[0]) for row in broken_states()]
)
def test_broken_state_changes_nothing(spoil, error, rng):
    params = [np.ones(4, np.float32), np.ones(7, np.float32)]
    grads = [np.ones(4, np.float32), np.ones(7, np.float32)]
    opt = optcore.SGD(params, lr=0.1, momentum=0.9)
    opt.step(grads)
    state = opt.state_dict()
    opt.step(grads)
    copies = [p.copy() for p in params]
    before = opt.state_dict()
    with pytest.raises(error):
        opt.load_state_dict(spoil(state))
    after = opt.state_dict()
    assert before["param_groups"] == after["param_groups"]
    assert after["step_count"] == 2
    for i in range(2):
        assert same_bits(before["state"][i]["velocity"], after["state"][i]["velocity"])
        assert same_bits(params[i], copies[i])
    opt.step(grads)


def test_repr_names_the_options():
    text = repr(optcore.SGD([np.ones(3, np.float32)], lr=0.1, nesterov=True, momentum=0.9))
    assert "lr=0.1" in text
    assert "nesterov=True" in text
    assert "1 arrays, 3 elements" in text


def test_skipped_steps_and_kinds_of_numbers_in_the_state():
    x, g = np.ones(3, np.float32), np.full(3, np.nan, np.float32)
    opt = optcore.SGD(x, lr=np.float32(0.5), skip_nonfinite=True)
    opt.step(g)
    state = opt.state_dict()
    assert type(state["param_groups"][0]["lr"]) is float
    other = optcore.SGD(x.copy(), lr=0.1, skip_nonfinite=True)
    other.load_state_dict(state)
    assert (other.skipped, other.step_count) == (1, 0)
    assert other.nonfinite_params == []


def test_views_of_dictionaries_and_generators_of_groups():
    params = {"a": np.ones(3, np.float32), "b": np.ones(2, np.float32)}
    grads = {name: np.ones_like(p) for name, p in params.items()}
    optcore.SGD(params.values(), lr=0.5).step(grads.values())
    optcore.SGD(({"params": [p]} for p in params.values()), lr=0.25).step(
        g for g in grads.values()
    )
    assert all((p == 0.25).all() for p in params.values())


def test_zero_grad():
    x, g = np.ones(3, np.float32), np.full(3, np.nan, np.float32)
    opt = optcore.SGD(x, lr=0.5, grads=g)
    opt.zero_grad()
    assert not g.any()
    with pytest.raises(RuntimeError, match="needs gradients bound"):
        optcore.SGD(x, lr=0.5).zero_grad()
