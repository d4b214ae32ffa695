"""optcore.SGD: structures, groups, schedules and state."""
from __future__ import annotations

import copy
import itertools
import sys

import numpy as np
import pytest

import optcore
from reference import GROUP_OPTIONS, RULES_BY_ID, Options, same_bits
from test_bits import by_rule

SHAPES = [(), (7,), (0,), (3, 5), (33, 4, 2), (1000,)]


def arrays(rng, dtype=np.float32, shapes=SHAPES):
    return [np.array(rng.standard_normal(shape), dtype) for shape in shapes]


class Model:
    """A list of parameters stepped by the reference."""

    def __init__(self, rule, params, options):
        self.rule, self.options = rule, options
        self.params = [p.copy() for p in params]
        self.states = [[np.zeros_like(p) for _ in rule.states] for p in params]
        self.steps = [0] * len(params)

    def step(self, grads, **changes):
        for i, g in enumerate(grads):
            if g is None:
                continue
            self.steps[i] += 1
            options = Options(**{**vars(self.options), **changes, "step": self.steps[i],
                                 "first_step": self.steps[i] == 1})
            self.params[i], self.states[i] = self.rule.reference(
                self.params[i], g, self.states[i], options)


def assert_same(params, model):
    for p, q in zip(params, model.params, strict=True):
        assert same_bits(p, q)


def everything(opt):
    """Return all that an optimizer holds and says, as something to compare."""
    state = opt.state_dict()
    return {
        **{(i, key): value if value is None or isinstance(value, bool) else (
            value.dtype.str, value.shape, value.tobytes())
           for i, entry in state.pop("state").items() for key, value in entry.items()},
        **state,
        "params": [p.tobytes() for group in opt.param_groups for p in group["params"]],
        **{name: repr(getattr(opt, name)) for name in (
            "max_norm", "skip_nonfinite", "track_grad_norm", "ema_decay", "grad_norm",
            "nonfinite_params")},
    }


def sgd(params, rule, options, **more):
    own = GROUP_OPTIONS[getattr(optcore, rule.kind)._family]
    keywords = {k: v for k, v in vars(options).items() if k in own}
    return rule.optimizer(params, **keywords, **more)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@by_rule
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


@pytest.mark.parametrize("lr_in_velocity", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_first_step_is_another_only_where_it_is_dampened(dtype, lr_in_velocity, rng):
    """Without dampening a velocity that is there is used, by the functions and the class."""
    x, g, v = (np.array(rng.standard_normal(9), dtype) for _ in range(3))
    real, options = x.dtype.type, {"lr": 0.1, "momentum": 0.9, "lr_in_velocity": lr_in_velocity}
    expected = real(0.9) * v - real(0.1) * g if lr_in_velocity else real(0.9) * v + g
    y, w = x.copy(), v.copy()
    optcore.momentum_step(y, g, w, first_step=True, **options)
    assert same_bits(w, expected)
    opt = optcore.SGD(x, **options)
    state = opt.state_dict()
    assert state["state"][0]["first_step"] is True
    state["state"][0]["velocity"] = v
    opt.load_state_dict(state)
    opt.step(g)
    entry = opt.state_dict()["state"][0]
    assert same_bits(entry["velocity"], expected)
    assert entry["first_step"] is False
    assert same_bits(x, y)


@by_rule
def test_signed_zeros_at_the_first_steps(rule):
    """0.9 * 0 + -0 is 0, and -0 - 0 is not -0 - -0."""
    options = Options(momentum=0.9 if rule.has_momentum else 0.0)
    params = [np.array([0.0, -0.0, 0.0, -0.0], dtype) for dtype in ("float32", "float64")]
    grads = [np.array([0.0, 0.0, -0.0, -0.0], p.dtype) for p in params]
    model = Model(rule, params, options)
    opt = sgd(params, rule, options)
    for _ in range(2):
        opt.step(grads)
        model.step(grads)
        assert_same(params, model)
        for entry, states in zip(opt.state_dict()["state"].values(), model.states, strict=True):
            for name, state in zip(rule.states, states, strict=True):
                assert same_bits(entry[name], state)


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

@by_rule
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


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("to_right", [True, False])
def test_velocity_conversion_is_rounded_once(to_right, dtype, rng):
    x = np.array(rng.standard_normal(500), dtype)
    opt = optcore.SGD(x, lr=0.1, momentum=0.9, lr_in_velocity=not to_right)
    opt.step(np.array(rng.standard_normal(500), dtype))
    other = optcore.SGD(x.copy(), lr=7.0, momentum=0.9, lr_in_velocity=to_right)
    other.load_state_dict(opt.state_dict())
    v, w = (o.state_dict()["state"][0]["velocity"] for o in (opt, other))
    factor = x.dtype.type(-0.1)
    assert same_bits(w, v * factor if to_right else v / factor)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("to_right", [True, False])
def test_velocity_conversion_at_the_ends_of_the_range(to_right, dtype):
    """No normal number vanishes, none becomes infinite; the others may as they are."""
    info = np.finfo(dtype)
    real = np.dtype(dtype).type
    tiny, least, far = info.tiny, info.smallest_subnormal, real(2) ** (info.nmant + 2)

    def converts(factor, values):
        """Whether a state with these velocities, to be multiplied by -factor, is taken."""
        lr = float(factor if to_right else 1 / factor)
        x, v = np.ones(5, dtype), np.array(values, dtype)
        opt = optcore.SGD(x, lr=lr, momentum=0.5, lr_in_velocity=not to_right)
        opt.step(np.zeros_like(x))
        state = opt.state_dict()
        state["state"][0]["velocity"] = v
        y = np.full_like(x, 3)
        other = optcore.SGD(y, lr=0.25, momentum=0.5, lr_in_velocity=to_right)
        other.step(np.ones_like(x))
        before = everything(other)
        with np.errstate(all="ignore"):
            expected = v * -real(factor)
        try:
            other.load_state_dict(state)
        except ValueError:
            with pytest.raises(ValueError, match="overflows or vanishes when converted"):
                other.load_state_dict(state)
            assert everything(other) == before
            return False
        assert same_bits(other.state_dict()["state"][0]["velocity"], expected)
        return True

    for sign in (1, -1):
        # towards zero: `tiny` is the smallest normal number
        assert not converts(1 / far, [1, 2, sign * tiny, 3, 4])
        assert not converts(1 / far, [1, 2, sign * tiny * 2, 3, 4])
        assert converts(1 / far, [1, 2, sign * tiny * far, 3, 4])
        assert converts(1 / far, [1, 2, sign * (tiny - least), least, 0.0])
        # away from it
        assert not converts(far, [1, 2, sign * info.max, 3, 4])
        assert not converts(far, [1, 2, sign * (info.max / far) * 2, 3, 4])
        assert converts(far, [1, 2, sign * (info.max / far), 3, 4])
        for factor in (far, 1 / far):
            assert converts(factor, [sign * np.inf, np.nan, 0.0, -0.0, 1])
            assert not converts(factor, [np.inf, np.nan, info.max, tiny, 1])


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


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_state_without_velocities_ends_the_live_ones(momentum, rng):
    """They become zero, and the steps that follow are the first again, undampened."""
    params = arrays(rng)
    fresh = optcore.SGD(params, lr=0.25, momentum=momentum, dampening=0.5 if momentum else 0.0)
    state = copy.deepcopy(fresh.state_dict())
    for entry in state["state"].values():
        entry["velocity"] = None
        assert entry["first_step"] is True
    opt = optcore.SGD(params, lr=0.5, momentum=0.5)
    for _ in range(3):
        opt.step(arrays(rng))
    twins = [p.copy() for p in params]
    twin = optcore.SGD(twins, lr=0.25, momentum=0.9, dampening=0.5)
    opt.load_state_dict(state)
    assert opt.step_count == 0
    for entry in opt.state_dict()["state"].values():
        assert entry["velocity"] is None or not entry["velocity"].any()
        assert entry["first_step"] is True
    opt.param_groups[0].update(momentum=0.9, dampening=0.5)
    for _ in range(2):
        grads = arrays(rng)
        opt.step(grads)
        twin.step(grads)
        for p, q in zip(params, twins, strict=True):
            assert same_bits(p, q)


@pytest.mark.parametrize("first_step", [False, True])
@pytest.mark.parametrize("started", [False, True])
def test_a_state_with_some_velocities(started, first_step, rng):
    """None is zero, whether velocities are there yet or not, and the flags are the state's."""
    params = [np.array(rng.standard_normal(5)) for _ in range(3)]
    options = {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}
    opt = optcore.SGD([p.copy() for p in params], **options)
    opt.step([np.array(rng.standard_normal(5)) for _ in range(3)])
    state = opt.state_dict()
    state["state"][1].update(velocity=None, first_step=first_step)
    state["state"][2]["first_step"] = first_step
    other = optcore.SGD(params, lr=0.1)
    if started:
        other.param_groups[0]["momentum"] = 0.5
        other.step([np.array(rng.standard_normal(5)) for _ in range(3)])
    other.load_state_dict(state)
    loaded = other.state_dict()["state"]
    velocities = [state["state"][0]["velocity"], np.zeros(5), state["state"][2]["velocity"]]
    flags = [False, first_step, first_step]
    for i, (v, first) in enumerate(zip(velocities, flags, strict=True)):
        assert same_bits(loaded[i]["velocity"], v)
        assert loaded[i]["first_step"] is first
    expected = [p.copy() for p in params]
    grads = [np.array(rng.standard_normal(5)) for _ in range(3)]
    other.step(grads)
    for p, q, g, v, first in zip(params, expected, grads, velocities, flags, strict=True):
        optcore.momentum_step(q, g, v, first_step=first, **options)
        assert same_bits(p, q)


# What a checkpoint holds, made such that only the last of all checks refuses it
LATE_REFUSALS = {
    "clip_value beside max_norm": lambda s: s["param_groups"][1].update(clip_value=1.0),
    "nesterov without momentum": lambda s: s["param_groups"][1].update(
        nesterov=True, momentum=0.0),
    "lr": lambda s: s["param_groups"][1].update(lr=-1.0),
    "lr in float32": lambda s: s["param_groups"][1].update(lr=1e39),
    "flag": lambda s: s["param_groups"][1].update(maximize=1),
    "max_norm": lambda s: s["options"].update(max_norm=-1.0),
    "skip_nonfinite": lambda s: s["options"].update(skip_nonfinite="yes"),
    "track_grad_norm": lambda s: s["options"].update(track_grad_norm=None),
    "ema_decay": lambda s: s["options"].update(ema_decay=1.0),
    "param": lambda s: s["state"][3].update(param=np.ones(6, np.float32)),
    "dtype of param": lambda s: s["state"][3].update(param=np.ones(5)),
    "ema": lambda s: s["state"][3].update(ema=np.ones(6, np.float32)),
}


@pytest.mark.parametrize("spoil", LATE_REFUSALS.values(), ids=LATE_REFUSALS)
def test_a_refused_restore_leaves_everything(spoil, rng):
    """Parameters, velocities, averages, counts, groups and the optimizer's own options."""
    def build(momentum, **options):
        params = [np.array(rng.standard_normal(5), np.float32) for _ in range(4)]
        opt = optcore.SGD([{"params": params[:2], "lr": 0.5}, {"params": params[2:]}], lr=0.25,
                          momentum=momentum, **options)
        for _ in range(3):
            grads = [np.array(rng.standard_normal(5), np.float32) for _ in range(4)]
            grads[0][0] = np.nan
            opt.step(grads)
        return opt

    donor = build(0.5, ema_decay=0.5, max_norm=2.0, track_grad_norm=True)
    opt = build(0.0, ema_decay=0.25, max_norm=1.0, skip_nonfinite=True)
    contents = donor._contents(include_params=True)
    spoil(contents)
    before = everything(opt)
    assert opt.max_norm == 1.0
    for _ in range(2):
        with pytest.raises((TypeError, ValueError)):
            opt.load_state_dict(contents)
        assert everything(opt) == before
    opt.load_state_dict(donor._contents(include_params=True))   # and what is whole is taken
    after, expected = everything(opt), everything(donor)
    for said in ("grad_norm", "nonfinite_params"):              # of the last step
        del after[said], expected[said]
    assert after == expected
    assert opt.max_norm == 2.0


@pytest.mark.parametrize("reshaped", ["params", "velocities", "averages"])
@pytest.mark.parametrize("i", [0, 2])
def test_a_state_is_taken_whole_where_arrays_were_reshaped(i, reshaped, rng):
    """Their elements are where they were, but NumPy would stop in the middle."""
    def build():
        arrays = [[rng.standard_normal(4) for _ in range(3)] for _ in range(2)]
        opt = optcore.SGD(arrays[0], lr=0.1, momentum=0.9, ema_decay=0.5, velocities=arrays[1])
        opt.step([rng.standard_normal(4) for _ in range(3)])
        return opt, {"params": arrays[0], "velocities": arrays[1], "averages": opt.ema}

    opt, arrays = build()
    donor, others = build()
    arrays[reshaped][i].shape = (2, 2)
    if reshaped == "params":        # a state that fits it
        for each in others.values():
            each[i].shape = (2, 2)
    contents = copy.deepcopy(donor._contents(include_params=True))
    before = everything(opt)
    assert before != everything(donor)
    try:
        opt.load_state_dict(contents)
    except ValueError:
        assert everything(opt) == before
    else:
        assert [a.tobytes() for each in arrays.values() for a in each] == [
            a.tobytes() for each in others.values() for a in each]


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
    yield "masked", entry(1, velocity=np.ma.ones(7, np.float32)), TypeError
    yield "foreign", entry(1, exp_avg=np.ones(7, np.float32)), ValueError
    yield "no entry", lambda s: {**s, "state": {**s["state"], 1: 3}}, TypeError
    yield "flag", entry(1, first_step=2), TypeError
    yield "ema", entry(1, ema=np.ones(7, np.float32)), ValueError
    yield "unknown", entry(0) and (lambda s: {**s, "state": {**s["state"], 9: s["state"][0]}}), (
        ValueError)
    yield "missing", lambda s: {**s, "state": {0: s["state"][0]}}, KeyError

    def group(**changes):
        return lambda s: {**s, "param_groups": [{**s["param_groups"][0], **changes}]}

    yield "option", group(momentum=2.0), ValueError
    for key in ("lr", "dampen_first", "flush_subnormals"):     # the last two are new in version 3
        yield f"no {key}", lambda s, key=key: {**s, "param_groups": [
            {k: v for k, v in s["param_groups"][0].items() if k != key}]}, KeyError
    yield "unknown option", lambda s: {**s, "options": {"lr": 3.0}}, ValueError
    yield "bool", group(lr=True), TypeError
    yield "too few", group(params=[0]), ValueError
    yield "order", group(params=[1, 0]), ValueError
    for value in ("no", 2, 0.0, None):
        yield f"convention {value}", group(lr_in_velocity=value), (TypeError, ValueError)
    yield "names", group(param_names=5), (TypeError, ValueError)
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


@pytest.mark.parametrize("averaged", [False, True])
def test_a_state_with_an_average_needs_one_to_go_on_with(averaged):
    """Nothing is dropped, and nothing begins in the middle."""
    opt, other = (optcore.SGD([np.ones(3), np.ones(2)], lr=0.1, ema_decay=decay)
                  for decay in ((0.5, None) if averaged else (None, 0.5)))
    opt.step([np.ones(3), np.ones(2)])
    before = everything(other)
    words = f"build the optimizer {'with' if averaged else 'without'} ema_decay"
    with pytest.raises(ValueError, match=words):
        other.load_state_dict(opt.state_dict())
    state = opt.state_dict()
    state["state"][0]["ema"] = None if not averaged else state["state"][1]["ema"][[0, 0, 0]]
    state["state"][1]["ema"] = np.ones(2) if not averaged else None
    for target in (opt, other):         # one parameter has an average, one has none
        with pytest.raises(ValueError, match=r"\['ema'\] must be"):
            target.load_state_dict(state)
    assert everything(other) == before


def test_names_of_a_state_are_the_optimizers_own():
    """In its order, where both have names; an optimizer keeps those that it has."""
    def build(names):
        arrays = [np.ones(2), np.ones(2)]
        return optcore.SGD(dict(zip(names, arrays, strict=True)) if names else arrays, lr=0.1)

    state = build("ab").state_dict()
    for names in ("ba", "ac", "bc"):
        other = build(names)
        with pytest.raises(ValueError, match=r"\['param_names'\] must be"):
            other.load_state_dict(state)
        assert other.param_groups[0]["param_names"] == tuple(names)
    for saved, own in (("ab", "ab"), ("ab", ""), ("", "ab")):
        other = build(own)
        other.load_state_dict(build(saved).state_dict())
        assert other.param_groups[0]["param_names"] == (tuple(own) if own else None)
        other.step(dict.fromkeys(own, np.ones(2)) if own else [np.ones(2)] * 2)


def test_states_of_several_groups_are_numbered_through():
    def build():
        return optcore.SGD([{"params": [np.ones(n) for n in sizes], "name": str(sizes)}
                            for sizes in ((2, 3), (4,), (5, 6))], lr=0.1, momentum=0.5)

    opt, other = build(), build()
    opt.step([np.full(n, n, float) for n in (2, 3, 4, 5, 6)])
    state = opt.state_dict()
    assert [group["params"] for group in state["param_groups"]] == [[0, 1], [2], [3, 4]]
    other.load_state_dict(state)
    assert everything(other) != everything(build())
    for i, n in enumerate((2, 3, 4, 5, 6)):
        assert same_bits(other.state_dict()["state"][i]["velocity"], np.full(n, n, float))
    assert [group["name"] for group in other.param_groups] == ["(2, 3)", "(4,)", "(5, 6)"]


@pytest.mark.parametrize("key", ["step_count", "skipped"])
def test_counts_of_a_state_are_whole_numbers(key):
    opt = optcore.SGD(np.ones(3), lr=0.1)
    state = opt.state_dict()
    for bad in (True, False, 1.0, "1", None, -1, sys.maxsize, np.float64(1)):
        with pytest.raises(ValueError, match=rf"\['{key}'\] must be a whole number"):
            opt.load_state_dict({**state, key: bad})
    for good in (0, 7, np.int64(7), np.uint8(7), sys.maxsize - 1):
        opt.load_state_dict({**state, key: good})
        assert (type(getattr(opt, key)), getattr(opt, key)) == (int, int(good))
    for bad in (True, np.int64(1), 1.0):
        with pytest.raises(ValueError, match=r"\['version'\] must be"):
            opt.load_state_dict({**state, "version": bad})


def test_flags_of_numpy_are_flags():
    opt = optcore.SGD(np.ones(3), lr=0.1, momentum=0.5, maximize=np.True_)
    state = opt.state_dict()
    assert state["param_groups"][0]["maximize"] is True
    state["state"][0]["first_step"] = np.False_
    opt.load_state_dict(state)
    assert opt.state_dict()["state"][0]["first_step"] is False
    assert opt.state_dict()["param_groups"][0]["maximize"] is True


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
    with pytest.raises(RuntimeError, match="needs gradients that were bound"):
        optcore.SGD(x, lr=0.5).zero_grad()
