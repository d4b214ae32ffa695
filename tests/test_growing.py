"""`add_param_group`, and options of groups as attributes of the optimizer."""
from __future__ import annotations

import numpy as np
import pytest
from twin import Twin, everything

import optcore
from reference import SGD_OPTIONS


def ones(*shape):
    return np.ones(shape, np.float32)


def halving(step):
    return 0.5 ** (1 + step)


def grads_of(opt, rng):
    """Gradients of all its parameters, in their order."""
    return [rng.standard_normal(p.shape).astype(p.dtype)
            for group in opt.param_groups for p in group["params"]]


def test_structures(rng):
    """From one array to many; gradients are one sequence then, where not all have names.

    What becomes of options, first steps, velocities and averages is in fuzz.py.
    """
    opt = optcore.SGD(ones(3), lr=0.1, momentum=0.9, ema_decay=0.5)
    twin = Twin(opt)
    for group in ({"params": ones(2)}, {"params": [ones(1), ones()]}, {"params": (ones(4),)},
                  {"params": (p for p in [ones(2), ones(3)])}, {"params": {"w": ones(2)}}):
        opt.add_param_group(group)
        twin.grow()
        grads = grads_of(opt, rng)
        opt.step(grads)
        twin.step(grads)
        twin.check()
    assert [p.shape for p in opt.ema] == [p.shape for p in twin.params]
    nests = {"n": {"w": ones(1)}}
    opt = optcore.SGD(nests, lr=0.1, ema_decay=0.5)
    opt.add_param_group({"params": {"n": {"b": ones(2)}, "m": [ones(3)]}})
    assert {name: sorted(part) if name == "n" else len(part) for name, part in opt.ema.items()} == {
        "n": ["b", "w"], "m": 1}
    opt.step({"m": [ones(3)], "n": {"b": ones(2), "w": ones(1)}})
    nests["n"]["w"] = ones(1)                           # all containers are looked at again
    with pytest.raises(ValueError, match=r"params\[0\] \('n.w'\) is another array"):
        opt.step({"m": [ones(3)], "n": {"b": ones(2), "w": ones(1)}})


A = ones(3)
A_GRAD = ones(3)


@pytest.mark.parametrize(("group", "more", "error", "words"), [
    (ones(1), {}, TypeError, "^param_group must be a group dictionary, got ndarray"),
    ([{"params": ones(1)}], {}, TypeError, "^param_group must be a group dictionary, got list"),
    ({"lr": 0.1}, {}, ValueError, "^param_group must have a key 'params'"),
    ({"params": {"c": ones(1)}, "lrr": 0.1}, {}, TypeError, "unknown option 'lrr'"),
    ({"params": {"c": ones(1)}, "max_norm": 0.1}, {}, TypeError, "unknown option 'max_norm'"),
    ({"params": {"c": ones(1)}, "lr": -1}, {}, ValueError, "lr must be a finite number >= 0"),
    ({"params": {"c": ones(1)}, "momentum": 0.0, "nesterov": True}, {}, ValueError, "nesterov"),
    ({"params": {"c": ones(1)}, "clip_value": 0.1}, {}, ValueError, "exclude each other"),
    ({"params": {"c": A}}, {}, ValueError, r"is the same array as params\[0\] \('a'\)"),
    ({"params": {"c": A[1:]}}, {}, ValueError, "shares memory with"),
    ({"params": {"c": A_GRAD}}, {}, ValueError, "share memory with"),
    ({"params": {"a": ones(1)}}, {}, ValueError, r"names of their own, got \['a'\] twice"),
    ({"params": {"a": {"b": ones(1)}}}, {}, ValueError, "'a'"),
    ({"params": {"c": ones(1).astype(int)}}, {}, TypeError, "bfloat16 or float16, got int64"),
    ({"params": {"c": ones(1)}}, {"grads": None}, ValueError, "grads must be given"),
    ({"params": {"c": ones(1)}}, {"grads": {"c": ones(2)}}, ValueError, r"has shape \(2,\)"),
    ({"params": {"c": ones(1)}}, {"grads": {"d": ones(1)}}, ValueError, "must have the names"),
    ({"params": {"c": ones(3)}}, {"grads": {"c": A}}, ValueError, "must not share memory"),
    ({"params": {"c": ones(1)}}, {"velocities": {"c": ones(2)}}, ValueError, r"has shape \(2,\)"),
    ({"params": {"c": ones(3)}}, {"velocities": {"c": A}}, ValueError, "shares memory"),
    ({"params": {"c": ones(3)}}, {"velocities": {"c": A_GRAD}}, ValueError, "share memory with"),
    ({"params": {"c": ones(1)}}, {"velocities": [ones(1)]}, TypeError, "must be a mapping"),
])
def test_refusals(group, more, error, words, rng):
    params, grads = {"a": A, "b": ones(2)}, {"a": A_GRAD, "b": ones(2)}
    opt = optcore.SGD(params, lr=0.1, momentum=0.9, max_norm=1.0, ema_decay=0.5, grads=grads)
    opt.step()
    new = group["params"] if isinstance(group, dict) and "params" in group else {}
    more = {"grads": {name: ones(*np.shape(p)) for name, p in new.items()}, **more}
    before = everything(opt, params, grads)
    for _ in range(2):
        with pytest.raises(error, match=words):
            opt.add_param_group(group, **more)
        assert everything(opt, params, grads) == before
    opt.step()
    opt.add_param_group({"params": {"c": ones(1)}}, grads={"c": ones(1)})
    opt.step()
    assert opt.step_count == 3


def test_gradients_where_none_are_bound():
    opt = optcore.SGD({"a": ones(1)}, lr=0.1)
    with pytest.raises(ValueError, match="grads must be left out where none were bound"):
        opt.add_param_group({"params": {"c": ones(1)}}, grads={"c": ones(1)})
    assert len(opt.param_groups) == 1


def test_the_first_float32():
    """It is asked whether the decay of the averages can be rounded, as at the beginning."""
    opt = optcore.SGD({"a": np.ones(2)}, lr=0.1, ema_decay=1e-50)
    before = everything(opt)
    with pytest.raises(ValueError, match="ema_decay must keep its kind when rounded to float32"):
        opt.add_param_group({"params": {"b": ones(2)}})
    assert everything(opt) == before
    opt.ema_decay = halving     # whose numbers are asked for
    opt.add_param_group({"params": {"b": ones(2)}})
    assert opt.step({"a": np.ones(2), "b": ones(2)})


# Options as attributes

VALUES = {
    "lr": (0.5, halving, -1), "momentum": (0.5, halving, 1.0), "dampening": (0.25, halving, -0.1),
    "weight_decay": (0.5, halving, np.nan), "clip_value": (0.5, None, -1),
    "maximize": (True, False, 1), "decoupled_weight_decay": (True, False, None),
    "flush_subnormals": (True, False, "yes"), "dampen_first": (True, False, 0),
    "nesterov": (True, False, 2), "lr_in_velocity": (False, False, True),   # which must stay
    "master": ("auto", "auto", None), "velocity_dtype": (None, None, "bfloat16"),   # so must these
    "rounding": ("nearest", "stochastic", "up"),
    "lazy": ("rows", "exact", "most"),
}


def test_every_option_is_an_attribute():
    assert VALUES.keys() == set(SGD_OPTIONS)


@pytest.mark.parametrize("name", VALUES)
def test_attributes(name, rng):
    opt = optcore.SGD([{"params": ones(3)}, {"params": ones(2), "lr": 0.3}], lr=0.1, momentum=0.9)
    twin, groups = Twin(opt), opt.param_groups
    *good, bad = VALUES[name]
    for value in good:
        setattr(opt, name, value)
        assert getattr(opt, name) is value
        assert [group[name] for group in opt.param_groups] == [value] * 2
        grads = grads_of(opt, rng)
        opt.step(grads)
        twin.step(grads)
        twin.check()
    before = everything(opt)
    for _ in range(2):
        with pytest.raises((TypeError, ValueError), match=name):
            setattr(opt, name, bad)
        assert everything(opt) == before
    assert opt.param_groups is groups
    with pytest.raises(AttributeError):
        delattr(opt, name)
    if good[0] is not good[1]:
        groups[1][name] = good[0] if groups[0][name] is not good[0] else good[1]
        with pytest.raises(ValueError, match=rf"{name} is not the same in all .*param_groups"):
            getattr(opt, name)
        setattr(opt, name, good[0])
        assert getattr(opt, name) is good[0]


@pytest.mark.parametrize(("name", "value", "group", "words"), [
    ("nesterov", True, {"dampening": 0.5}, r"param_groups\[1\]: dampening must be 0 with nesterov"),
    ("nesterov", True, {"momentum": 0.0}, r"param_groups\[1\]: nesterov must have momentum > 0"),
    ("dampening", 0.5, {"nesterov": True}, r"param_groups\[1\]: dampening must be 0 with nesterov"),
    ("momentum", 0.0, {"nesterov": True}, r"param_groups\[1\]: nesterov must have momentum > 0"),
    ("clip_value", 0.5, {}, "exclude each other"),
])
def test_what_one_group_refuses_is_set_in_none(name, value, group, words):
    opt = optcore.SGD([{"params": ones(3)}, {"params": ones(2), **group}], lr=0.1, momentum=0.9,
                      max_norm=1.0)
    before = everything(opt)
    with pytest.raises(ValueError, match=words):
        setattr(opt, name, value)
    assert everything(opt) == before


@pytest.mark.parametrize("name", ["learning_rate", "lrs", "grads", "velocities", "state", "foo",
                                  "step_count", "skipped", "ema", "grad_norm", "nonfinite_params"])
def test_attributes_that_nobody_reads(name):
    opt = optcore.SGD(ones(3), lr=0.1)
    with pytest.raises(AttributeError, match=name):
        setattr(opt, name, 1)

    class Own(optcore.SGD):
        pass

    own = Own(ones(3), lr=0.1)
    own.note, own.lr = [1], 0.5                         # a subclass has attributes of its own
    assert (own.note, own.lr, own.param_groups[0]["lr"]) == ([1], 0.5, 0.5)


def test_an_option_that_was_deleted():
    opt = optcore.SGD([{"params": [ones(1)]}, {"params": [ones(1)]}], lr=0.1)
    del opt.param_groups[1]["lr"]
    with pytest.raises(KeyError, match=r"param_groups\[1\]: option 'lr' is missing"):
        print(opt.lr)
    opt.lr = 0.5
    assert [group["lr"] for group in opt.param_groups] == [0.5, 0.5]


def test_a_copy_between_a_group_and_its_books_is_refused():
    """It would have the arrays of one moment and the groups of another."""
    class Copied(optcore.SGD):
        def _note_group(self, *group):
            with pytest.raises(RuntimeError, match="in use already"):
                self.__reduce__()
            super()._note_group(*group)

    opt = Copied(np.zeros(3), lr=0.5)
    opt.add_param_group({"params": [np.zeros(2)]})
    other = optcore.SGD.__new__(optcore.SGD)
    other.__setstate__(opt.__reduce__()[2])
    assert len(other.param_groups) == 2
