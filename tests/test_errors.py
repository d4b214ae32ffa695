"""Every refusal: the right exception, the argument named, and not one byte changed."""
from __future__ import annotations

import contextlib
import copy
import hashlib
import pickle
import re
import warnings
from fractions import Fraction

import numpy as np
import pytest
from test_sgd import everything

import optcore
from reference import SGD_OPTIONS

N = 24


def digest(arrays):
    return [hashlib.sha256(bytes(memoryview(np.asarray(a).reshape(-1).view(np.uint8))))
            .hexdigest() for a in arrays]


def good(seed=0, shape=(4, 6), dtype=np.float32, order="C"):
    return np.array(np.random.default_rng(seed).standard_normal(shape), dtype, order=order)


def misaligned(like):
    memory = np.zeros(like.nbytes + 1, np.uint8)
    return memory[1:].view(like.dtype).reshape(like.shape)


def read_only(like):
    array = like.copy()
    array.flags.writeable = False
    return array


# (id, bad array made from a good one, exception, words of the message), for any array
ANY = [
    ("list", lambda a: a.tolist(), TypeError, "must be a NumPy array, got list"),
    ("none", lambda a: None, TypeError, "must be a NumPy array, got NoneType"),
    ("scalar", lambda a: a[0, 0], TypeError, "must be a NumPy array, got float32"),
    ("int", lambda a: a.astype(np.int32), TypeError, "bfloat16 or float16, got int32"),
    ("bits", lambda a: a.astype(np.uint16), TypeError,
     "got uint16: a.view(optcore.bfloat16) declares it as the bits of bfloat16"),
    ("complex", lambda a: a.astype(np.complex64), TypeError, "got complex64"),
    ("object", lambda a: a.astype(object), TypeError, "got object"),
    ("swapped", lambda a: a.astype(a.dtype.newbyteorder()), TypeError, "native byte order"),
    ("masked", lambda a: np.ma.masked_less(a, 0), TypeError, "got a masked array"),
    ("misaligned", misaligned, ValueError, "must be aligned"),
    ("strided", lambda a: np.repeat(a, 2, axis=1)[:, ::2], ValueError, "must be contiguous"),
    ("reversed", lambda a: a[::-1], ValueError, "must be contiguous"),
]
# for a gradient or a velocity, against its parameter
AGAINST = {
    **{row: f"has dtype {dtype}; its parameter has float32: g.astype(p.dtype) has it"
       for row, dtype in [("int", "int32"), ("complex", "complex64"), ("object", "object"),
                          ("swapped", ">f4")]},
    "bits": "has dtype uint16; its parameter has float32: g.view(optcore.bfloat16) declares it as",
    "strided": "is strided by (48, 8); its parameter is C-contiguous: np.ascontiguousarray",
    "reversed": "is strided by (-24, 4); its parameter is C-contiguous: np.ascontiguousarray",
}
LIKE = [
    ("mixed", lambda a: a.astype(np.float64), TypeError, "has dtype float64; its parameter has "),
    ("short", lambda a: a[:3].copy(), ValueError, "has shape (3, 6); its parameter has (4, 6)"),
    ("turned", lambda a: np.ones((6, 4), a.dtype), ValueError,
     "has shape (6, 4); its parameter has (4, 6): g.T has it"),
    ("flat", lambda a: a.ravel(), ValueError,
     "has shape (24,); its parameter has (4, 6): g.reshape(p.shape) has it"),
    ("fortran", np.asfortranarray, ValueError,
     "is Fortran-contiguous; its parameter is C-contiguous: np.ascontiguousarray(…) lies like it"),
]
WRITTEN = [("read-only", read_only, ValueError, "must be writeable")]

FUNCTIONS = {
    "sgd": (optcore.sgd_step, ["param", "grad"]),
    "momentum": (optcore.momentum_step, ["param", "grad", "velocity"]),
    "nesterov": (optcore.nesterov_step, ["param", "grad", "velocity"]),
}
TABLE = [
    pytest.param(rule, name, make, error,
                 words if name == "param"
                 else AGAINST.get(row, words).replace(" g.", f" {name[0]}."),
                 id=f"{rule}-{name}-{row}")
    for rule, (_, names) in FUNCTIONS.items()
    for name in names
    for row, make, error, words in ANY + (LIKE if name != "param" else [])
    + (WRITTEN if name != "grad" else [])
    if (name, row) != ("grad", "scalar")
]


def keywords(rule, **more):
    return {"lr": 0.1, **({} if rule == "sgd" else {"momentum": 0.9}), **more}


@pytest.mark.parametrize(("rule", "name", "make", "error", "words"), TABLE)
def test_functional_arrays(rule, name, make, error, words):
    step, names = FUNCTIONS[rule]
    arrays = {key: good(seed) for seed, key in enumerate(names)}
    arrays[name] = make(arrays[name])
    held = [a for a in arrays.values() if isinstance(a, np.ndarray) and a.dtype != object
            and a.base is None]
    before = digest(held)
    with pytest.raises(error) as raised:
        step(*arrays.values(), **keywords(rule))
    assert words in str(raised.value)
    assert str(raised.value).startswith(name)
    assert digest(held) == before


@pytest.mark.parametrize("shift", [0, 1, 5])
@pytest.mark.parametrize("pair", [("param", "grad"), ("param", "velocity"), ("grad", "velocity")])
def test_functional_overlap(pair, shift):
    memory = np.arange(40, dtype=np.float32)
    arrays = {"param": np.ones(30, np.float32), "grad": np.ones(30, np.float32),
              "velocity": np.ones(30, np.float32)}
    arrays[pair[0]] = memory[:30]
    arrays[pair[1]] = memory[shift : shift + 30]
    before = digest([memory, *arrays.values()])
    with pytest.raises(ValueError, match=f"{pair[1]} must not share memory with {pair[0]}"):
        optcore.momentum_step(*arrays.values(), lr=0.1, momentum=0.9)
    assert digest([memory, *arrays.values()]) == before


def test_neighbours_do_not_overlap():
    memory = np.ones(90, np.float32)
    optcore.momentum_step(memory[:30], memory[30:60], memory[60:], lr=0.1, momentum=0.9)


def test_order_of_parameter_is_matched():
    x, g = np.asfortranarray(good()), np.asfortranarray(good(1))
    expected = x - np.float32(0.1) * g
    optcore.sgd_step(x, g, lr=0.1)
    np.testing.assert_array_equal(x, expected)
    with pytest.raises(ValueError, match=r"grad is C-contiguous; .* np.asfortranarray\(…\)"):
        optcore.sgd_step(x, good(1), lr=0.1)


# Alike but for the count of axes, or one of them
SHAPES = [(), (1,), (1, 1), (1, 1, 1), (5,), (6,), (5, 1), (1, 5), (2, 5), (5, 2),
          (2, 3, 4), (3, 3, 4), (2, 2, 4), (2, 3, 5), (2, 1, 4), (1, 3, 4), (2, 3, 1), (0,), (1, 0)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_other_shape_is_refused(shape):
    """Nothing is broadcast: not a single number, not a row, not an axis of one."""
    x, g, v = (good(seed, shape) for seed in range(3))
    opt = optcore.SGD([x], lr=0.1, momentum=0.9)
    opt.step([g])
    state = opt.state_dict()
    bound = optcore.SGD([good(3, shape)], lr=0.1, grads=[g.copy()])
    before = digest([x, g, v]), everything(opt), everything(bound)
    for other in SHAPES:
        if other == shape:
            continue
        bad = good(4, other)
        words = re.escape(f"has shape {other}; its parameter has {shape}")
        with pytest.raises(ValueError, match=f"^grad {words}"):
            optcore.sgd_step(x, bad, lr=0.1)
        with pytest.raises(ValueError, match=f"^velocity {words}"):
            optcore.momentum_step(x, g, bad, lr=0.1, momentum=0.9)
        with pytest.raises(ValueError, match=rf"^grads\[0\] {words}"):
            opt.step([bad])
        with pytest.raises(ValueError, match=rf"^replica_grads\[1\]\[0\] {words}"):
            opt.step_replicas([[g], [bad]])
        with pytest.raises(ValueError, match=rf"^grads\[0\] {words}"):
            bound.accumulate([bad])
        with pytest.raises(ValueError, match=rf"^grads\[0\] {words}"):
            optcore.SGD([x], lr=0.1, grads=[bad])
        for key in ("velocity", "param"):
            spoiled = {**state, "state": {0: {**state["state"][0], key: bad}}}
            with pytest.raises(ValueError, match=words):
                opt.load_state_dict(spoiled)
    assert (digest([x, g, v]), everything(opt), everything(bound)) == before


# Numbers

NOT_NUMBERS = [True, np.True_, "0.1", None, [0.1], 0.1j, np.array([0.1, 0.2])]
NONNEGATIVE = [float("nan"), float("inf"), -float("inf"), -0.1, -1, 10**400, Fraction(-1, 3),
               np.float32("nan")]
FRACTION = [*NONNEGATIVE, 1, 1.0, 2.5]
TOO_BIG_OR_SMALL = [1e39, 1e-46]
HYPER = {
    "lr": NONNEGATIVE, "weight_decay": NONNEGATIVE, "momentum": FRACTION, "dampening": FRACTION,
    "grad_scale": [*NONNEGATIVE, 0, 0.0], "clip_value": NONNEGATIVE,
}


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [pytest.param(name, value, TypeError, id=f"{name}-{type(value).__name__}")
     for name in HYPER for value in NOT_NUMBERS if name != "clip_value" or value is not None]
    + [pytest.param(name, value, ValueError, id=f"{name}-{str(value)[:9]}")
       for name, values in HYPER.items() for value in values]
    + [pytest.param(name, value, ValueError, id=f"{name}-{value}")
       for name in HYPER for value in TOO_BIG_OR_SMALL if name not in ("momentum", "dampening")]
    + [pytest.param("momentum", 1 - 1e-12, ValueError, id="momentum-rounds-to-1"),
       pytest.param("momentum", 1e-46, ValueError, id="momentum-rounds-to-0")],
)
def test_hyper_parameters(name, value, error):
    x, g, v = good(), good(1), good(2)
    before = digest([x, g, v])
    with pytest.raises(error, match=name):
        optcore.momentum_step(x, g, v, **keywords("momentum", **{name: value}))
    assert digest([x, g, v]) == before
    if name == "grad_scale":
        opt = optcore.SGD(x, lr=0.1, momentum=0.9)
        with pytest.raises(error, match=name):
            opt.step(g, grad_scale=value)
    else:
        with pytest.raises(error, match=name):
            optcore.SGD(x, **keywords("momentum", **{name: value}))
        opt = optcore.SGD(x, lr=0.1, momentum=0.9)
        opt.param_groups[0][name] = value
        with pytest.raises(error, match=name):
            opt.step(g)
        assert opt.step_count == 0
    assert digest([x, g, v]) == before


@pytest.mark.parametrize("name", ["maximize", "decoupled_weight_decay", "lr_in_velocity",
                                  "first_step"])
@pytest.mark.parametrize("value", [1, 0.0, None, "yes"])
def test_flags(name, value):
    if name == "first_step" and value is None:      # not said
        return
    x, g, v = good(), good(1), good(2)
    with pytest.raises(TypeError, match=name):
        optcore.momentum_step(x, g, v, lr=0.1, momentum=0.9, **{name: value})


def test_numbers_that_are_welcome():
    for lr in (0, 0.1, np.float32(0.1), np.float64(0.1), np.int64(1), Fraction(1, 10)):
        x, g = good(), good(1)
        expected = x - np.float32(float(lr)) * g
        optcore.sgd_step(x, g, lr=lr)
        np.testing.assert_array_equal(x, expected)


def test_dampening_is_rounded_as_what_it_leaves():
    x, g, v = good(), good(1), good(2)
    left = np.float32(1 - 0.99999999)
    expected = np.float32(0.9) * v + left * g
    optcore.momentum_step(x, g, v, lr=0.1, momentum=0.9, dampening=0.99999999, first_step=False)
    np.testing.assert_array_equal(v, expected)


def test_float64_takes_what_float32_refuses():
    x, g = good(dtype=np.float64), good(1, dtype=np.float64)
    expected = x - 1e-46 * g
    optcore.sgd_step(x, g, lr=1e-46)
    np.testing.assert_array_equal(x, expected)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"nesterov": True, "momentum": 0.0}, "nesterov must have momentum > 0"),
        ({"nesterov": True, "dampening": 0.5}, "dampening must be 0 with nesterov"),
        ({"lr_in_velocity": True, "dampening": 0.5}, "dampening must be 0 with lr_in_velocity"),
        ({"dampening": 0.5, "momentum": 0.0}, "dampening must have momentum > 0"),
        ({"max_norm": 1.0, "clip_value": 1.0}, "clip_value and max_norm exclude each other"),
        ({"lr": 1e30, "weight_decay": 1e30, "decoupled_weight_decay": True},
         "lr \\* weight_decay must be finite"),
        ({"max_norm": -1.0}, "max_norm"),
        ({"max_norm": float("nan")}, "max_norm"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"ema_decay": 1 - 1e-12}, "ema_decay"),
    ],
)
def test_options_that_exclude_each_other(options, words):
    with pytest.raises(ValueError, match=words):
        optcore.SGD(good(), **{"lr": 0.1, "momentum": 0.9, **options})


def test_dampening_where_the_functional_api_refuses_it():
    x, g, v = good(), good(1), good(2)
    with pytest.raises(ValueError, match="dampening must be 0 with lr_in_velocity"):
        optcore.momentum_step(x, g, v, lr=0.1, momentum=0.9, dampening=0.1, first_step=False,
                              lr_in_velocity=True)
    with pytest.raises(TypeError, match="dampening"):
        optcore.nesterov_step(x, g, v, lr=0.1, momentum=0.9, dampening=0.1)


# The optimizer

def model(k=5):
    params = [good(i, (i + 1, 3)) for i in range(k)]
    grads = [good(i + 50, (i + 1, 3)) for i in range(k)]
    return params, grads


def state_digest(opt):
    state = opt.state_dict()
    arrays = [s["velocity"] for s in state["state"].values()]
    flags = [s["first_step"] for s in state["state"].values()]
    return (digest([a for a in arrays if a is not None]), flags, opt.step_count, opt.skipped)


TAKEN = ("none", "strided", "reversed", "fortran")
GRADIENTS = [(*row[:3], AGAINST.get(row[0], row[3])) for row in ANY + LIKE if row[0] not in TAKEN]


@pytest.mark.parametrize("position", range(5))
@pytest.mark.parametrize(
    ("make", "error", "words"),
    [pytest.param(*row[1:], id=row[0]) for row in GRADIENTS],
)
def test_step_refuses_whole(position, make, error, words):
    """A bad gradient at any position changes nothing anywhere."""
    params = [good(i) for i in range(5)]
    grads = [good(i + 50) for i in range(5)]
    opt = optcore.SGD(params, lr=0.1, momentum=0.9, ema_decay=0.5, max_norm=1.0)
    opt.step(grads)
    before = digest(params + grads + opt.ema), state_digest(opt)
    bad = list(grads)
    bad[position] = make(bad[position])
    with pytest.raises(error, match=f"grads\\[{position}\\]") as raised:
        opt.step(bad, zero_grad=True)
    assert words in str(raised.value)
    assert (digest(params + grads + opt.ema), state_digest(opt)) == before


@pytest.mark.parametrize(
    ("make", "error", "words"), [pytest.param(*row[1:], id=row[0]) for row in ANY + WRITTEN]
)
def test_construction_refuses(make, error, words):
    words = words.replace("got list", "got float")      # a list is a nest, of numbers here
    params = [good(i) for i in range(3)]
    params[1] = make(params[1])
    with pytest.raises(error, match=r"params\[1\]") as raised:
        optcore.SGD(params, lr=0.1)
    assert words in str(raised.value)


def test_names_in_messages():
    params = {"fc1.weight": good(), "fc2.weight": good(1, (64, 10))}
    grads = {"fc1.weight": good(2), "fc2.weight": good(3, (10, 64))}
    opt = optcore.SGD(params, lr=0.1)
    with pytest.raises(ValueError) as raised:   # noqa: PT011 - compared in full
        opt.step(grads)
    assert str(raised.value) == (
        "grads[1] ('fc2.weight') has shape (10, 64); its parameter has (64, 10): g.T has it"
    )


def test_same_parameter_twice():
    a, b = good(), good(1)
    with pytest.raises(ValueError, match=r"params\[2\] is the same array as params\[0\]"):
        optcore.SGD([a, b, a], lr=0.1)
    with pytest.raises(ValueError, match=r"params\[1\] shares memory with params\[0\]"):
        optcore.SGD([a, a[2:]], lr=0.1)
    with pytest.raises(ValueError, match=r"params\[1\] is the same array as params\[0\]"):
        optcore.SGD([{"params": [a]}, {"params": [a]}], lr=0.1)


def test_gradients_over_other_parameters():
    params, grads = model()
    opt = optcore.SGD(params, lr=0.1, momentum=0.9, ema_decay=0.9)
    for stolen in (params[2], opt.ema[2]):
        before = digest(params)
        bad = [*grads[:2], stolen, *grads[3:]]
        with pytest.raises(ValueError, match=r"grads\[2\] must not share memory with"):
            opt.step(bad)
        assert digest(params) == before
    # one gradient for two parameters is read only, unless it is to be zeroed
    shared = [good(9, (4, 3)), good(8, (4, 3))]
    opt = optcore.SGD(shared, lr=0.1)
    g = good(7, (4, 3))
    opt.step([g, g])
    with pytest.raises(ValueError, match=r"grads\[1\] must not share memory with grads\[0\]"):
        opt.step([g, g], zero_grad=True)
    with pytest.raises(ValueError, match=r"grads\[1\] must not share memory with grads\[0\]"):
        optcore.SGD(shared, lr=0.1, grads=[g, g])


@pytest.mark.parametrize(
    ("grads", "error", "words"),
    [
        ([], ValueError, "one entry for each of 2 parameters, got 0"),
        ([good()], ValueError, "one entry for each of 2 parameters, got 1"),
        ([good()] * 3, ValueError, "one entry for each of 2 parameters, got 3"),
        ([None, None], ValueError, "None for every parameter"),
        (good(), TypeError, "must be a sequence of 2 arrays, got ndarray"),
        ({"a": good(), "b": good()}, TypeError, "must be a sequence of 2 arrays, got dict"),
        (None, TypeError, "must be a sequence of 2 arrays, got NoneType"),
        ({good}, TypeError, "must be a sequence of 2 arrays, got set"),
        ("ab", TypeError, "must be a sequence of 2 arrays, got str"),
    ],
)
def test_wrong_gradient_structures(grads, error, words):
    opt = optcore.SGD([good(), good(1)], lr=0.1)
    with pytest.raises(error, match=words):
        opt.step(grads)
    assert opt.step_count == 0


@pytest.mark.parametrize(
    ("grads", "error", "words"),
    [
        ({"a": good()}, ValueError, r"none named \['b'\]"),
        ({"a": good(), "c": good()}, ValueError, r"none named \['b'\] and unknown \['c'\]"),
        ({"a": good(), "b": good(), "c": good()}, ValueError, r"unknown \['c'\]"),
        ([good(), good()], TypeError, "must be a mapping by parameter name, got list"),
    ],
)
def test_wrong_gradient_names(grads, error, words):
    opt = optcore.SGD({"a": good(), "b": good(1)}, lr=0.1)
    with pytest.raises(error, match=words):
        opt.step(grads)


def test_read_only_gradients_work_until_they_are_to_be_zeroed():
    x, g = good(), read_only(good(1))
    optcore.sgd_step(x, g, lr=0.1)
    opt = optcore.SGD(x, lr=0.1)
    opt.step(g)
    with pytest.raises(ValueError, match="grads must be writeable"):
        opt.step(g, zero_grad=True)


@pytest.mark.parametrize(
    ("params", "error", "words"),
    [
        ([], ValueError, "at least one array"),
        ({}, ValueError, "at least one array"),
        (3, TypeError, "params must be an array, a sequence or a mapping"),
        ("abc", TypeError, "params must be an array, a sequence or a mapping"),
        ([{"lr": 0.1}], ValueError, "must have a key 'params'"),
        ([{"params": good(), "learning_rate": 0.1}], TypeError, "unknown option 'learning_rate'"),
        ([{"params": {"a": good()}}, {"params": {"a": good(1)}}], ValueError, "twice"),
        ([{"params": good()}, good()], TypeError, "must be a group dictionary"),
    ],
)
def test_wrong_params(params, error, words):
    with pytest.raises(error, match=words):
        optcore.SGD(params, lr=0.1)


def test_lr_must_be_given():
    with pytest.raises(TypeError, match="lr must be given"):
        optcore.SGD(good())


def test_groups_may_not_change_shape():
    opt = optcore.SGD([{"params": good()}, {"params": good(1)}], lr=0.1, momentum=0.9)
    grads = [good(2), good(3)]
    groups = opt.param_groups
    for broken, words in [
        (groups[:1], "2 groups"),
        ([groups[0], {**groups[1], "params": (good(1),)}], "params must stay"),
        ([groups[0], {**groups[1], "lr_in_velocity": True}], "lr_in_velocity must stay"),
        ([groups[0], {k: v for k, v in groups[1].items() if k != "lr"}], "'lr' is missing"),
        ([groups[0], {**groups[1], "nesterof": True}], "unknown option 'nesterof'"),
    ]:
        opt.param_groups = broken
        with pytest.raises((ValueError, KeyError, TypeError), match=words):
            opt.step(grads)
    opt.param_groups = groups
    groups[1]["initial_lr"] = 0.1       # as schedulers do
    opt.step(grads)
    assert opt.step_count == 1


@pytest.mark.parametrize("g", [0, 1])
@pytest.mark.parametrize("key", [*SGD_OPTIONS, "params", "param_names"])
def test_a_deleted_key_is_missed(key, g):
    """Each time, until it is there again, wherever in the group it then stands."""
    params, grads = [good(), good(1)], [good(2), good(3)]
    opt = optcore.SGD([{"params": p} for p in params], lr=0.1, momentum=0.9)
    opt.step(grads)
    group = opt.param_groups[g]
    before = digest(params)
    value = group.pop(key)
    for call in (opt.step, opt.step, lambda _: opt.state_dict(),
                 lambda _: setattr(opt, "max_norm", 1.0), opt.step):
        with pytest.raises(KeyError, match=rf"param_groups\[{g}\]: option '{key}' is missing"):
            call(grads)
    assert digest(params) == before
    assert (opt.step_count, opt.max_norm) == (1, None)
    group[key] = value
    opt.step(grads)
    # the last key of all, deleted and put back by itself
    del group[key]
    with pytest.raises(KeyError, match=f"option '{key}' is missing"):
        opt.step(grads)
    group[key] = value
    group["nesterof"] = True
    for _ in range(2):
        with pytest.raises(TypeError, match="unknown option 'nesterof'"):
            opt.step(grads)
    del group["nesterof"]
    group["name"] = "a note may come and go"
    opt.step(grads)
    del group["name"]
    opt.step(grads)
    assert opt.step_count == 4


@pytest.mark.parametrize("n_groups", [1, 2])
def test_what_was_refused_is_refused_again(n_groups):
    """Edits that a step, a setter or a state refuses are not taken for read."""
    arrays = [good(k) for k in range(n_groups)]
    opt = optcore.SGD([{"params": p} for p in arrays], lr=0.1, momentum=0.9)
    grads = [good(k + 5) for k in range(n_groups)]
    opt.step(grads)
    group = opt.param_groups[-1]
    for key, bad in [("lr", -1.0), ("lr", "x"), ("momentum", 1.0), ("nesterov", 1),
                     ("maximize", None), ("dampening", -0.5), ("lr_in_velocity", True),
                     ("params", (good(9),)), ("lr", lambda step: -1.0)]:
        kept, group[key] = group[key], bad
        before = digest(arrays)
        for call in (opt.step, opt.step, lambda grads: opt.step_replicas([grads])):
            with pytest.raises((TypeError, ValueError), match=key):
                call(grads)
        if not callable(bad):
            for name, value in (("max_norm", 1.0), ("ema_decay", 0.5), ("skip_nonfinite", True),
                                ("track_grad_norm", True)):
                old = getattr(opt, name)
                for _ in range(2):
                    with pytest.raises((TypeError, ValueError), match=key):
                        setattr(opt, name, value)
                    assert getattr(opt, name) is old
        assert opt.ema is None
        assert digest(arrays) == before
        group[key] = kept
        assert opt.step(grads)


def test_an_edit_beside_a_refused_one_is_not_lost():
    """Neither is taken; once the other is taken back, this one is."""
    params, grads = [good(), good(1)], [good(2), good(3)]
    opt = optcore.SGD([{"params": p} for p in params], lr=0.1)
    opt.step(grads)
    first, second = opt.param_groups
    for lr, call in ((0.5, opt.step), (0.25, lambda _: opt.state_dict()),
                     (0.125, lambda _: setattr(opt, "max_norm", 1.0))):
        first["lr"], kept, second["lr"] = lr, second["lr"], -1.0
        before = digest(params)
        with pytest.raises(ValueError, match=r"^param_groups\[1\]: lr must be"):
            call(grads)
        assert digest(params) == before
        second["lr"] = kept
        expected = [p.copy() for p in params]
        for x, g, rate in zip(expected, grads, (lr, 0.1), strict=True):
            optcore.sgd_step(x, g, lr=rate)
        opt.step(grads)
        assert digest(params) == digest(expected)


def replaced(array):
    """Give an array other memory of the same size, as unpickling into it does."""
    array.__setstate__(array.copy().__reduce__()[2])


def read_only_now(array):
    array.flags.writeable = False


@pytest.mark.parametrize("change", [replaced, read_only_now])
@pytest.mark.parametrize("whole", [False, True], ids=["listed", "array"])
def test_parameters_are_looked_at_in_every_call(whole, change):
    base = good(shape=(10,))
    params = base[:] if whole else [good(1), base[:]]
    x = params if whole else params[1]
    label = "params" if whole else r"params\[1\]"
    grads = good(2, (10,)) if whole else [good(3), good(2, (10,))]
    opt = optcore.SGD(params, lr=0.1, momentum=0.9, max_norm=1.0,
                      grads=copy.deepcopy(grads))
    opt.step()
    state = opt.state_dict()
    opt.step(grads)
    before = everything(opt), digest([base])
    change(x)
    now = digest([x])
    for call in (opt.step, lambda: opt.step(grads), lambda: opt.step_replicas([grads, grads]),
                 lambda: setattr(opt, "ema_decay", 0.5), lambda: opt.load_state_dict(state)):
        for _ in range(2):
            with pytest.raises(ValueError, match=f"^{label} must stay in its place"):
                call()
    assert (everything(opt), digest([base]), digest([x])) == (*before, now)
    if change is read_only_now:
        x.flags.writeable = True
        opt.step()


@pytest.mark.parametrize("change", [replaced, read_only_now])
@pytest.mark.parametrize("whole", [False, True], ids=["listed", "array"])
def test_velocities_of_the_callers_are_looked_at_in_every_call(whole, change):
    base = good(shape=(10,))
    velocities = base[:] if whole else [None, base[:]]
    v = velocities if whole else velocities[1]
    label = "velocities" if whole else r"velocities\[1\]"
    params, grads = ((good(k, (10,)), good(k + 1, (10,)))[whole:] for k in (1, 3))
    if whole:
        (params,), (grads,) = params, grads
    opt = optcore.SGD(params, lr=0.1, momentum=0.9, velocities=velocities)
    opt.step(grads)
    state = opt.state_dict()
    opt.step(grads)
    before = everything(opt), digest([base, v])
    change(v)
    for call in (lambda: opt.step(grads), lambda: opt.step_replicas([grads, grads]),
                 lambda: setattr(opt, "ema_decay", 0.5), lambda: opt.load_state_dict(state)):
        for _ in range(2):
            with pytest.raises(ValueError, match=f"^{label} must stay in its place"):
                call()
    assert (everything(opt), digest([base, v])) == before
    if change is read_only_now:
        v.flags.writeable = True
        opt.step(grads)


@pytest.mark.parametrize("change", [replaced, read_only_now])
@pytest.mark.parametrize("i", [0, 1])
def test_averages_are_looked_at_in_every_call(i, change):
    """They are shown live, and a state is written into them."""
    params, grads = ([good(k, (10,)), good(k + 1, (10,))] for k in (1, 3))
    opt = optcore.SGD(params, lr=0.1, momentum=0.9, ema_decay=0.5)
    opt.step(grads)
    state = opt.state_dict()
    opt.step(grads)
    before = everything(opt)
    change(opt.ema[i])
    for call in (lambda: opt.step(grads), lambda: opt.step_replicas([grads, grads]),
                 lambda: setattr(opt, "max_norm", 1.0), lambda: opt.load_state_dict(state)):
        for _ in range(2):
            with pytest.raises(ValueError, match=rf"^ema\[{i}\] must stay in its place"):
                call()
    assert everything(opt) == before
    if change is read_only_now:
        opt.ema[i].flags.writeable = True
        opt.load_state_dict(state)


@pytest.mark.parametrize("change", [replaced, read_only_now])
@pytest.mark.parametrize("whole", [False, True], ids=["listed", "array"])
def test_bound_gradients_are_looked_at_in_every_call(whole, change):
    base = good(shape=(10,))
    grads = base[:] if whole else [good(1), base[:]]
    g = grads if whole else grads[1]
    label = "grads" if whole else r"grads\[1\]"
    params = good(2, (10,)) if whole else [good(3), good(2, (10,))]
    opt = optcore.SGD(params, lr=0.1, momentum=0.9, grads=grads)
    opt.step()
    more = copy.deepcopy(grads)
    before = everything(opt), digest([base, g])
    change(g)
    for call in (opt.step, lambda: opt.step(zero_grad=True), lambda: opt.accumulate(more),
                 opt.zero_grad):
        for _ in range(2):
            with pytest.raises(ValueError, match=f"^{label} must stay in its place"):
                call()
    assert (everything(opt), digest([base, g])) == before
    if change is read_only_now:
        g.flags.writeable = True
        opt.accumulate(more)


def test_a_read_only_gradient_is_not_bound():
    with pytest.raises(ValueError, match=r"^grads\[1\] must be writeable, got a read-only array"):
        optcore.SGD([good(), good(1)], lr=0.1, grads=[good(2), read_only(good(3))])


@pytest.mark.parametrize("bound", [False, True])
def test_memory_that_moved(bound):
    x, g = np.ones(10, np.float32), np.ones(10, np.float32)
    opt = optcore.SGD(x, lr=0.1, grads=g if bound else None)
    given = () if bound else (g,)
    opt.step(*given)
    x.resize(4000, refcheck=False)
    before = digest([x])
    with pytest.raises(ValueError, match="params must stay in its place, 10 contiguous, writeable"):
        opt.step(*given)
    assert digest([x]) == before


def test_bound_gradient_that_moved():
    x, g = np.ones(10, np.float32), np.ones(10, np.float32)
    opt = optcore.SGD(x, lr=0.1, grads=g)
    g.resize(4000, refcheck=False)
    with pytest.raises(ValueError, match="grads must stay in its place"):
        opt.step()
    x.flags.writeable = False
    with pytest.raises(ValueError, match="must stay in its place"):
        opt.step()


@pytest.mark.parametrize("dtype", ["int32", np.dtype(np.float32).newbyteorder().str])
def test_dtype_changed_in_place(dtype):
    x, g = np.ones(10, np.float32), np.ones(10, np.float32)
    opt = optcore.SGD(x, lr=0.1, grads=g)
    for array in (x, g):
        array.dtype = dtype
        with pytest.raises(ValueError, match=f"must stay in its place, .* of {dtype} with"):
            opt.step()
        array.dtype = np.float32
    opt.step()


def test_an_optimizer_never_built_is_no_crash():
    opt = optcore.SGD.__new__(optcore.SGD)
    for name in dir(opt):
        with contextlib.suppress(TypeError, AttributeError):
            getattr(opt, name)
    for call in (copy.copy, copy.deepcopy, pickle.dumps, lambda o: o.add_param_group({})):
        with pytest.raises(RuntimeError, match="never built"):
            call(opt)
    for call in (opt.step, opt.accumulate, opt.step_replicas):
        with pytest.raises(RuntimeError, match="never built"):
            call([good()])
    opt = optcore.SGD(good(), lr=0.1)
    with pytest.raises(RuntimeError, match="built once"):
        opt.__init__(good(), lr=0.1)


def test_a_forgotten_gradient_is_not_the_bound_one():
    opt = optcore.SGD(good(), lr=0.1, grads=good(1))
    with pytest.raises(ValueError, match="got None for every parameter"):
        opt.step(None)
    with pytest.raises(TypeError, match="grads must be given"):
        optcore.SGD(good(), lr=0.1).step()


def resized(array, n):
    array.resize(n, refcheck=False)


STARTS = {
    "momentum": lambda opt, state: (opt.param_groups[0].update(momentum=0.9), opt.step()),
    "ema": lambda opt, state: setattr(opt, "ema_decay", 0.5),
    "accumulate": lambda opt, state: opt.accumulate(np.ones(10, np.float32)),
    "restore": lambda opt, state: opt.load_state_dict(state),
}


@pytest.mark.parametrize("start", STARTS)
def test_nothing_is_sized_by_memory_that_moved(start):
    """A parameter made smaller is refused before arenas or sums take its size."""
    x, g = np.ones(4000, np.float32), np.ones(4000, np.float32)
    opt = optcore.SGD(x, lr=0.1, grads=g)
    state = opt.state_dict()
    resized(x, 10)
    with pytest.raises(ValueError, match="params must stay in its place"):
        STARTS[start](opt, state)
    resized(x, 4000)


def test_strides_changed_in_place():
    base = np.ones(20, np.float32)
    x = base[:10]
    opt = optcore.SGD(x, lr=0.1, grads=np.ones(10, np.float32))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        x.strides = (8,)
    with pytest.raises(ValueError, match=r"must stay in its place, .* with strides \(8,\)"):
        opt.step()
    assert (base == 1).all()


def test_impostors_are_no_arrays():
    class Impostor:
        @property
        def __class__(self):
            return np.ndarray

    with pytest.raises(TypeError, match="grad must be a NumPy array"):
        optcore.sgd_step(good(), Impostor(), lr=0.1)
    with pytest.raises(TypeError, match="params must be"):
        optcore.SGD(Impostor(), lr=0.1)

    class Liar(np.ndarray):
        nbytes = 4
        shape = (1,)

    liar = np.ones(65536, np.float32).view(Liar)
    opt = optcore.SGD([liar], lr=0.5, momentum=0.9)
    opt.step([np.ones(65536, np.float32)])
    assert (np.asarray(liar) == 0.5).all()


def test_groups_edited_by_the_numbers_they_hold():
    """A number whose conversion runs code cannot make a step of half-read groups."""
    class Meddler(float):
        def __float__(self):
            opt.param_groups.append({})
            return 0.1

    opt = optcore.SGD([{"params": good()}, {"params": good(1)}], lr=0.1)
    opt.param_groups[0]["lr"] = Meddler(0.1)
    opt.step([good(2), good(3)])
    with pytest.raises(ValueError, match="2 groups"):
        opt.step([good(2), good(3)])


def test_values_that_change_places_are_noticed():
    x, g = np.zeros(3, np.float32), np.ones(3, np.float32)
    opt = optcore.SGD(x, lr=0.5, momentum=0.25, weight_decay=0.0)
    group = opt.param_groups[0]
    opt.step(g)
    swapped = {"momentum": "weight_decay", "weight_decay": "momentum"}
    opt.param_groups[0] = {swapped.get(key, key): value for key, value in group.items()}
    opt.step(g)
    # without momentum now, and with decay 0.25
    np.testing.assert_array_equal(x, np.float32(-0.5 - 0.5 * (1 - 0.25 * 0.5)))


def test_an_optimizer_that_failed_to_build_does_not_step():
    opt = optcore.SGD.__new__(optcore.SGD)
    with pytest.raises(ValueError, match="lr"):
        opt.__init__(good(), lr=-1.0, max_norm=1.0)
    opt.param_groups[0]["lr"] = 0.1
    with pytest.raises(RuntimeError, match="never built"):
        opt.step(good())


def test_a_refused_step_does_not_start_the_velocity():
    opt = optcore.SGD([good()], lr=0.1)
    opt.param_groups[0]["momentum"] = 0.9
    with pytest.raises(TypeError):
        opt.step([1])
    assert opt.state_dict()["state"][0]["velocity"] is None


@pytest.mark.parametrize("lr", [1e39, 1e-46])
def test_schedules_are_rounded_too(lr):
    x = good()
    before = digest([x])
    with pytest.raises(ValueError, match="float32"):
        optcore.SGD(x, lr=lambda step: lr).step(good(1))
    with pytest.raises(TypeError, match="lr must be"):
        optcore.SGD(x, lr=float)
    assert digest([x]) == before


def test_rounding_of_averages_and_replicas():
    with pytest.raises(ValueError, match="ema_decay"):
        optcore.SGD(good(), lr=0.1, ema_decay=1e-46)
    optcore.SGD(good(dtype=np.float64), lr=0.1, ema_decay=1 - 1e-9)
    opt = optcore.SGD([{"params": good()}, {"params": good(9)}], lr=0.1)
    with pytest.raises(ValueError, match=r"^grad_scale must keep its kind"):
        opt.step([good(1), good(2)], grad_scale=1e-50)
    opt = optcore.SGD([good()], lr=0.1)
    with pytest.raises(ValueError, match="grad_scale"):
        opt.step_replicas([[good(k)] for k in range(1, 8)], grad_scale=2e-45)


def test_construction_and_structure_errors_change_nothing():
    a, b = good(), good(1)
    before = digest([a, b])
    for params in ([a, a], [a, a[2:]], [a, b.astype(int)], {"x": a, "y": 1}, {None: a}):
        with pytest.raises((TypeError, ValueError)):
            optcore.SGD(params, lr=0.1)
    for grads in ([], [a], None, [None, None], {"a": a}):
        with pytest.raises((TypeError, ValueError)):
            optcore.SGD([a, b], lr=0.1).step(grads)
    assert digest([a, b]) == before


def test_state_dict_of_groups_a_step_would_refuse():
    opt = optcore.SGD(good(), lr=0.1, momentum=0.9)
    opt.step(good(1))
    opt.param_groups[0]["lr_in_velocity"] = True
    with pytest.raises(ValueError, match="lr_in_velocity must stay"):
        opt.state_dict()
