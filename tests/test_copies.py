"""Optimizers copied by pickle and copy, and states that are matched by name."""
from __future__ import annotations

import copy
import operator
import pickle
from collections import UserDict

import numpy as np
import pytest
from twin import Twin, everything, leaves, like

import optcore
from optcore.checkpoint import CheckpointError
from reference import same_bits

PROTOCOLS = range(2, pickle.HIGHEST_PROTOCOL + 1)


def ones(*shape, dtype=np.float32):
    return np.ones(shape, dtype)


def halving(step):
    return 0.5 ** (1 + step)


class Own(optcore.SGD):
    pass


class Slotted(optcore.SGD):
    __slots__ = ("note",)


class Fixed(optcore.SGD):
    def __init__(self, params):
        super().__init__(params, lr=0.1, momentum=0.9)
        self.losses = []


class Trainer:
    """Holds parameters, and an optimizer that asks it for the rate."""

    def __init__(self):
        self.params = {"w": ones(3)}
        self.opt = Own(self.params, lr=self.rate, momentum=0.9)
        self.opt.trainer = self

    def rate(self, step):
        return 0.1


WAYS = {**{f"protocol {n}": lambda thing, n=n: pickle.loads(pickle.dumps(thing, n))
           for n in PROTOCOLS}, "deepcopy": copy.deepcopy}
by_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


def nest():
    return {"layers": [{"w": np.asfortranarray(ones(3, 4)), "b": ones(4)}],
            "pair": (ones(), [ones(2)])}


def drawn(params, rng):
    return like(params, lambda p: rng.standard_normal(p.shape).astype(p.dtype))


def stepped(rng, params=None, steps=2, **more):
    """An optimizer with something to copy, and its twin."""
    params = nest() if params is None else params
    opt = Own(params, **{"lr": halving, "momentum": 0.9, "dampening": 0.5, "max_norm": 1.0,
                         "ema_decay": halving, "skip_nonfinite": True, **more})
    twin = Twin(opt)
    for _ in range(steps):
        both(opt, twin, drawn(params, rng))
    return opt, twin, params


def both(opt, twin, grads):
    opt.step(grads)
    twin.step(leaves(grads))
    twin.check()


@by_way
def test_alone(way, rng):
    """The copy has arrays of its own, and neither moves the other."""
    opt, twin, params = stepped(rng)
    before = everything(opt, params)
    copied = way(opt)
    follower = twin.of(copied)
    follower.check()
    assert type(copied) is Own
    assert copied.ema["layers"][0].keys() == {"w", "b"}
    for name in ("max_norm", "skip_nonfinite", "track_grad_norm", "ema_decay", "lr"):
        assert getattr(copied, name) == getattr(opt, name)
    for _ in range(2):
        both(copied, follower, drawn(params, rng))
    assert everything(opt, params) == before
    before = everything(copied)
    both(opt, twin, drawn(params, rng))
    assert everything(copied) == before
    again = way(way(copied))
    both(again, follower.of(again), drawn(params, rng))


@by_way
def test_together(way):
    """In one copy with what it steps, it looks at the copied containers; see fuzz.py, too."""
    params, grads = nest(), nest()
    for given in (params, [{"params": params}]):
        copied, p, g = way((optcore.SGD(given, lr=0.5, grads=grads), params, grads))
        assert all(map(operator.is_, leaves(p), copied.param_groups[0]["params"]))
        g["layers"][0]["b"] = 2 * g["layers"][0]["b"]
        copied.step()
        assert not p["layers"][0]["b"].any()
        assert (p["pair"][0], params["pair"][0]) == (0.5, 1)
        p["layers"][0]["w"] = p["layers"][0]["w"].copy()
        with pytest.raises(ValueError, match=r"params\[0\] \('layers.0.w'\) is another array"):
            copied.step()


@by_way
def test_velocities_that_lie_idle(way):
    """Momentum may be 0 by now, with which no optimizer is given velocities."""
    p, q, v, w = ones(3), ones(2), ones(3), ones(2)
    opt = optcore.SGD({"p": p}, lr=0.5, momentum=0.9, velocities={"p": v})
    opt.add_param_group({"params": {"q": q}}, velocities={"q": w})
    opt.momentum = 0
    copied, (x, y, u) = way((opt, (p, q, v)))
    assert copied.momentum == 0
    assert copied.step({"p": ones(3), "q": ones(2)})
    for array, expected in ((x, ones(3) / 2), (y, ones(2) / 2), (u, v)):
        assert same_bits(array, expected)
    copied.momentum = 0.5
    copied.step({"p": ones(3), "q": ones(2)})
    assert same_bits(u, 1.5 * v)


@by_way
def test_skipped_steps_are_counted_on(way):
    opt = optcore.SGD({"w": ones(3)}, lr=0.5, skip_nonfinite=True)
    assert not opt.step({"w": np.full(3, np.nan, np.float32)})
    assert opt.step({"w": ones(3)})
    copied = way(opt)
    assert (copied.step_count, copied.skipped) == (1, 1)


@by_way
def test_options_that_took_turns(way):
    """What it was built with and what it has now exclude each other."""
    opt = optcore.SGD({"w": ones(3)}, lr=0.5, clip_value=0.5)
    opt.clip_value = None
    opt.max_norm = 0.25
    copied = way(opt)
    assert (copied.clip_value, copied.max_norm) == (None, 0.25)
    opt.step({"w": ones(3)})
    copied.step({"w": ones(3)})
    assert copied.state_dict()["param_groups"] == opt.state_dict()["param_groups"]
    assert copied.grad_norm == opt.grad_norm


def test_shallow(rng):
    """copy.copy: the same parameters, velocities of its own."""
    opt, twin, params = stepped(rng)
    copied = copy.copy(opt)
    assert all(map(operator.is_, leaves(params), copied.param_groups[0]["params"]))
    before, other = opt.state_dict(), copied.param_groups[0]
    other["lr"] = 0.5
    assert opt.lr is halving
    both(copied, twin.of(copied), drawn(params, rng))
    after = opt.state_dict()
    for i in range(len(twin.params)):
        assert same_bits(before["state"][i]["velocity"], after["state"][i]["velocity"])
    assert after["step_count"] == 2


@by_way
def test_what_subclasses_add(way, rng):
    for kind in (Own, Slotted):
        opt = kind({"w": ones(3)}, lr=0.1)
        opt.note = [1]
        copied = way(opt)
        assert type(copied) is kind
        assert copied.note == [1]
        assert copied.note is not opt.note
    opt = Fixed({"w": ones(3)})
    opt.losses.append(0.5)
    copied = way(opt)
    assert copied.losses == [0.5]
    copied.step({"w": ones(3)})
    trainer = way(Trainer())
    assert trainer.opt.trainer is trainer
    assert trainer.opt.lr.__self__ is trainer
    trainer.opt.step({"w": ones(3)})
    assert (trainer.params["w"] == np.float32(0.9)).all()


class Model(dict):
    """Parameters that keep their optimizer."""


@by_way
@pytest.mark.parametrize("kind", [
    "values", "items", "generator", "user's", "kept in its own parameters", "views of one array",
    "torch", "torch, together",
])
def test_ways_to_give_parameters(kind, way, rng):
    if kind.startswith("kept") and way is copy.deepcopy:
        pytest.skip("deepcopy fills a subclass of dict after its attributes")
    base = np.arange(6, dtype=np.float32)
    params = {"a": base[:2], "b": base[2:]} if "views" in kind else {"a": ones(2), "b": ones(4)}
    given = {"values": params.values(), "generator": (p for p in params.values()),
             "user's": UserDict(params), "items": list(params.values())}.get(kind, params)
    together = ()
    if kind.startswith("torch"):
        torch = pytest.importorskip("torch", reason="torch is missing")
        given = {name: torch.from_numpy(p) for name, p in params.items()}
    elif kind.startswith("kept"):
        given = Model(params)
    opt = optcore.SGD(given, lr=0.1, momentum=0.9)
    twin = Twin(opt)
    grads = [np.array(rng.standard_normal(p.shape), np.float32) for p in params.values()]
    named = dict(zip(params, grads, strict=True)) if kind not in (
        "values", "generator", "items") else grads
    opt.step(named)
    twin.step(grads)
    if kind.startswith("kept"):
        given.opt = opt
        copied = way(given).opt
    elif kind == "torch, together":
        copied, together = way((opt, given))
    else:
        copied = way(opt)
    before = everything(opt)
    follower = twin.of(copied)
    copied.step(named)
    follower.step(grads)
    follower.check()
    for p, q in zip(together and together.values(), follower.params, strict=False):
        assert same_bits(p.numpy(), q)
    assert everything(opt) == before


def test_buffers_out_of_band(rng):
    opt, twin, params = stepped(rng)
    buffers = []
    data = pickle.dumps(opt, 5, buffer_callback=buffers.append)
    copied = pickle.loads(data, buffers=[bytearray(b.raw()) for b in buffers])
    both(copied, twin.of(copied), drawn(params, rng))
    buffers = [b.raw().toreadonly() for b in buffers]
    if buffers:                         # as a file mapped to read gives them
        with pytest.raises(ValueError, match="must be writeable"):
            pickle.loads(data, buffers=buffers)


@pytest.mark.parametrize("way", [
    lambda opt, path: copy.copy(opt), lambda opt, path: copy.deepcopy(opt),
    lambda opt, path: pickle.dumps(opt), lambda opt, path: opt.save(path, include_params=True),
    lambda opt, path: opt.restore(path),
])
@pytest.mark.parametrize(("spoil", "words"), [
    (lambda params, own, group: params.update(w=ones(3)), r"params\[0\] \('w'\) is another array"),
    (lambda params, own, group: params.update(z=ones(3)), "params must stay"),
    (lambda params, own, group: params.pop("b"), "params must stay"),
    (lambda params, own, group: params["w"].resize(5, refcheck=False),
     r"params\[0\] \('w'\) must stay in its place|has shape \(3,\); its parameter has \(5,\)"),
    (lambda params, own, group: own.update(w=ones(3)), r"velocities\[0\] \('w'\) is another"),
    (lambda params, own, group: group.update(lr=0.5), "edit opt.param_groups"),
])
def test_what_went_stale_is_refused(spoil, words, way, tmp_path):
    """By whatever would take it over, save what is no longer used, or write where nobody looks."""
    params, own = {"w": ones(3), "b": ones(2)}, {"w": ones(3), "b": None}
    groups, path = [{"params": params}], tmp_path / "state"
    opt = optcore.SGD(groups, lr=0.1, momentum=0.9, velocities=own)
    opt.step({"w": ones(3), "b": ones(2)})
    opt.save(path, include_params=True)
    saved = path.read_bytes()
    spoil(params, own, groups[0])
    for call in (lambda: opt.step({"w": ones(3), "b": ones(2)}), lambda: way(opt, path)):
        with pytest.raises(ValueError, match=words):
            call()
    assert opt.step_count == 1
    assert path.read_bytes() == saved


def test_what_cannot_be_copied(rng):
    """Says so, and leaves the optimizer as it was."""
    opt = optcore.SGD(ones(3), lr=lambda step: 0.1)
    with pytest.raises((AttributeError, pickle.PicklingError), match="lambda"):
        pickle.dumps(opt)
    opt.step(ones(3))
    assert copy.deepcopy(opt).step(ones(3))
    with pytest.raises(RuntimeError, match="never built"):
        pickle.dumps(Own.__new__(Own))
    seen = []

    def lr(step):
        for way in WAYS.values():
            with pytest.raises(RuntimeError, match="in use already"):
                way(opt)
        seen.append(step)
        return 0.1

    opt.lr = lr
    opt.step(ones(3))
    assert seen == [1]


# By name

def saved(groups=({"params": {"a": (3,), "b": (2, 3), "c": (4,)}},), dtype=np.float32, **more):
    """The state of an optimizer whose velocities tell parameters apart, and what it should be."""
    groups = [{**g, "params": {k: ones(*s, dtype=dtype) for k, s in g["params"].items()}}
              for g in groups]
    opt = optcore.SGD(groups, **{"lr": 0.1, "momentum": 0.9, "ema_decay": 0.5, **more})
    names = [name for g in opt.param_groups for name in g["param_names"]]
    for k in range(2):
        opt.step({name: np.full_like(p, 1 + i + k) if i or k else None
                  for i, (name, p) in enumerate(zip(names, [
                      p for g in opt.param_groups for p in g["params"]], strict=True))})
    return opt, dict(zip(names, opt.state_dict()["state"].values(), strict=True))


TWO = ({"params": {"a": (3,), "b": (2, 3)}, "lr": 0.2}, {"params": {"c": (4,)}, "lr": 0.3})


@pytest.mark.parametrize("door", ["state_dict", "file"])
@pytest.mark.parametrize(("source", "target", "missing", "unexpected", "stay", "rates"), [
    (None, [["c", "a", "b"]], [], [], [], [0.1]),
    (None, [["c"], ["b", "a"]], [], [], [], [0.1, 0.1]),
    (None, [["c", "z"]], ["z"], ["a", "b"], [], [0.1]),
    (None, [["c"], ["z"]], ["z"], ["a", "b"], [1], [0.1, 0.7]),
    (TWO, [["c"], ["b", "a"]], [], [], [], [0.3, 0.2]),
    (TWO, [["c", "a"], ["b"]], [], [], [0], [0.7, 0.2]),
    (TWO, [["b", "a", "c"]], [], [], [0], [0.7]),
    (TWO, [["b", "x"], ["y", "c"], ["z"]], ["x", "y", "z"], ["a"], [2], [0.2, 0.3, 0.7]),
])
def test_by_name(source, target, missing, unexpected, stay, rates, door, tmp_path):
    shapes = {"a": (3,), "b": (2, 3), "c": (4,)}
    old, entries = saved(source) if source else saved()
    opt = optcore.SGD([{"params": {name: ones(*shapes.get(name, (2,))) for name in names}}
                       for names in target], lr=0.7, momentum=0.5, ema_decay=0.5)
    if door == "state_dict":
        report = opt.load_state_dict(old.state_dict(), by_name=True)
    else:
        old.save(tmp_path / "state")
        report = opt.restore(tmp_path / "state", by_name=True)
    assert (report.missing, report.unexpected, report.groups) == (missing, unexpected, stay)
    assert [group["lr"] for group in opt.param_groups] == rates
    assert [group["momentum"] for group in opt.param_groups] == [
        0.5 if k in stay else 0.9 for k in range(len(target))]
    assert opt.step_count == 2
    for name, entry in zip([n for names in target for n in names],
                           opt.state_dict()["state"].values(), strict=True):
        wanted = entries.get(name, {"first_step": True, "velocity": np.zeros(2, np.float32),
                                    "ema": ones(2)})
        assert entry["first_step"] is wanted["first_step"]
        assert same_bits(entry["velocity"], wanted["velocity"])
        assert same_bits(entry["ema"], wanted["ema"])


@pytest.mark.parametrize("to_right", [False, True])
def test_by_name_into_the_other_convention(to_right):
    """By the rate of the group that each parameter comes from."""
    old, entries = saved(TWO, lr_in_velocity=not to_right)
    opt = optcore.SGD([{"params": {"c": ones(4), "z": ones(2)}}, {"params": {"b": ones(2, 3)}}],
                      lr=0.7, momentum=0.5, ema_decay=0.5, lr_in_velocity=to_right)
    opt.load_state_dict(old.state_dict(), by_name=True)
    for i, (name, lr) in {0: ("c", 0.3), 2: ("b", 0.2)}.items():
        factor = np.float32(-lr if to_right else -1 / lr)
        found = opt.state_dict()["state"][i]["velocity"]
        assert same_bits(found, factor * entries[name]["velocity"])


def renamed(state, names):
    state["param_groups"][0]["param_names"] = names
    return state


@pytest.mark.parametrize(("params", "spoil", "error", "words"), [
    ({"z": ones(3)}, lambda s: s, ValueError, r"some of the parameters \['z'\], got \['a', 'b'"),
    ([ones(3)], lambda s: s, ValueError, "by_name needs parameters with names"),
    ({"a": ones(4)}, lambda s: s, ValueError, r"has shape \(3,\); its parameter has \(4,\)"),
    ({"a": ones(3, dtype=float)}, lambda s: s, TypeError, "has dtype float32"),
    ({"a": ones(3)}, lambda s: renamed(s, None), ValueError, "must name its parameters"),
    ({"a": ones(3)}, lambda s: renamed(s, ["a", "b"]), ValueError, "must name its parameters"),
    ({"a": ones(4)}, lambda s: renamed(s, ["a", "b", "a"]), ValueError, "'a'.* twice"),
    ({"a": ones(3)}, lambda s: renamed(s, [["a"], "b", "c"]), (TypeError, ValueError),
     r"state_dict\['param_groups'\]\[0\]"),
])
def test_by_name_refused(params, spoil, error, words, tmp_path):
    old = saved()[0]
    opt = optcore.SGD(params, lr=0.7, momentum=0.5, ema_decay=0.5)
    opt.step([ones(*p.shape, dtype=p.dtype) for p in opt.param_groups[0]["params"]]
             if isinstance(params, list) else like(params, np.ones_like))
    state = spoil(old.state_dict())
    before = everything(opt, params)
    for _ in range(2):
        with pytest.raises(error, match=words):
            opt.load_state_dict(state, by_name=True)
        assert everything(opt, params) == before
    if state["param_groups"][0]["param_names"] == ["a", "b", "c"]:
        old.save(tmp_path / "state", include_params=True)
        with pytest.raises(CheckpointError):
            opt.restore(tmp_path / "state", by_name=True)
        assert everything(opt, params) == before


def test_nothing_is_missed_without_by_name():
    old = saved()[0]
    report = old.load_state_dict(old.state_dict())
    assert (report.missing, report.unexpected, report.groups) == ([], [], [])
    with pytest.raises(TypeError, match="by_name must be True or False"):
        old.load_state_dict(old.state_dict(), by_name=1)
