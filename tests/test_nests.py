"""Parameters in nests of any depth; containers of the caller's, looked at again at each step."""
from __future__ import annotations

import collections
import io
import weakref
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from twin import Twin, everything, leaves, like

import optcore
from reference import same_bits


def ones(*shape):
    return np.ones(shape, np.float32)


def nest():
    return {"layers": [{"w": ones(3, 4), "b": ones(4)}, {"w": ones(4, 2)}],
            "pair": (ones(), [ones(2)]), "empty": {}}


NAMES = ["layers.0.w", "layers.0.b", "layers.1.w", "pair.0", "pair.1.0"]


class OwnSequence(Sequence):
    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, key):
        return self.items[key]

    def __setitem__(self, key, value):
        self.items[key] = value


class OwnMapping(Mapping):
    def __init__(self, items):
        self.items_ = dict(items)

    def __len__(self):
        return len(self.items_)

    def __iter__(self):
        return iter(self.items_)

    def __getitem__(self, key):
        return self.items_[key]

    def __setitem__(self, key, value):
        self.items_[key] = value

    def __delitem__(self, key):
        del self.items_[key]


class Anew(OwnMapping):
    """Makes its arrays anew at each access, as a file does."""

    def __getitem__(self, key):
        return self.items_[key].copy()


def file():
    where = io.BytesIO()
    np.savez(where, w=ones(2))
    where.seek(0)
    return np.load(where)


def names_of(opt):
    return [name for group in opt.param_groups for name in group["param_names"] or [None]]


Pair = collections.namedtuple("Pair", "w b")


@pytest.mark.parametrize(("params", "names"), [
    (nest(), NAMES),
    ([[ones(1), ones(2)], [ones(3)]], ["0.0", "0.1", "1.0"]),
    ([{"w": ones(1)}, {"w": ones(2)}], ["0.w", "1.w"]),
    ({"a": Pair(ones(1), ones(2))}, ["a.0", "a.1"]),
    ({"params": {"w": ones(1)}}, ["params.w"]),
    ({"params": ones(1), "lr": ones(2)}, ["params", "lr"]),
    ({"a": collections.OrderedDict(x=ones(1)), "b": collections.UserList([ones(2)]),
      "c": OwnMapping({"y": ones(3)}), "d": OwnSequence([ones(4)])}, ["a.x", "b.0", "c.y", "d.0"]),
    ([{"params": {"n": {"w": ones(1)}}}, {"params": {"n": {"b": ones(2)}, "m": [ones(3)]}}],
     ["n.w", "n.b", "m.0"]),
    ([{"params": nest()}], NAMES),
])
def test_names(params, names, rng):
    """Joined by dots, from left to right; averages have the structure, as gradients must."""
    opt = optcore.SGD(params, lr=0.1, momentum=0.9, skip_nonfinite=True, ema_decay=0.5)
    assert names_of(opt) == names
    assert [name for group in opt.state_dict()["param_groups"]
            for name in group["param_names"]] == names
    grads = like(opt.ema, lambda p: np.full_like(p, np.nan))
    assert opt.step(grads) is False
    assert opt.nonfinite_params == names
    twin = Twin(opt)
    twin.skipped = 1
    grads = like(opt.ema, lambda p: rng.standard_normal(p.shape).astype(p.dtype))
    opt.step(grads)
    twin.step(leaves(grads))
    twin.check()


@pytest.mark.parametrize("bound", [False, True])
@pytest.mark.parametrize("left_out", [
    ["layers"], ["pair"], ["empty"], ["layers", 0], ["layers", 1, "w"], ["pair", 1], ["pair", 0],
])
def test_none_leaves_out_what_it_stands_for(left_out, bound, rng):
    params, grads = nest(), like(nest(), lambda p: rng.standard_normal(p.shape).astype(p.dtype))
    grads["pair"] = list(grads["pair"])
    names = [name for name in NAMES if not (name + ".").startswith(
        ".".join(map(str, left_out)) + ".")]
    expected = [g if name in names else None
                for name, g in zip(NAMES, leaves(grads), strict=True)]
    inner = grads
    for key in left_out[:-1]:
        inner = inner[key]
    inner[left_out[-1]] = None
    opt = optcore.SGD(params, lr=0.1, momentum=0.9, dampening=0.5,
                      grads=grads if bound else None)
    twin = Twin(opt)
    opt.step() if bound else opt.step(grads)
    twin.step(expected)
    twin.check()


def deleted(g, *keys):
    for key in keys[:-1]:
        g = g[key]
    del g[keys[-1]]


def put(g, value, *keys):
    for key in keys[:-1]:
        g = g[key]
    g[keys[-1]] = value


@pytest.mark.parametrize(("spoil", "error", "words"), [
    (lambda g: deleted(g, "layers"), ValueError, r" must have the names of params.*\['layers'\]"),
    (lambda g: deleted(g, "layers", 0, "b"), ValueError,
     r"\['layers'\]\[0\] must have the names of params, got none named \['b'\]"),
    (lambda g: put(g, ones(1), "layers", 0, "z"), ValueError,
     r"\['layers'\]\[0\] must have the names of params, got unknown \['z'\]"),
    (lambda g: deleted(g, "layers", 1), ValueError, r"\['layers'\] must have 2 entries.* got 1"),
    (lambda g: g["layers"].append(ones(1)), ValueError,
     r"\['layers'\] must have 2 entries.* got 3"),
    (lambda g: put(g, [ones(3, 4), ones(4)], "layers", 0), TypeError,
     r"\['layers'\]\[0\] must be a mapping .* got list"),
    (lambda g: put(g, dict(enumerate(g["layers"])), "layers"), TypeError,
     r"\['layers'\] must be a sequence of 2, got dict"),
    (lambda g: put(g, ones(2), "layers"), TypeError, r"\['layers'\] must be .* got ndarray"),
    (lambda g: put(g, "ab", "layers"), TypeError, r"\['layers'\] must be a sequence .* got str"),
    (lambda g: put(g, {1, 2}, "layers"), TypeError, r"\['layers'\] must be a sequence .* got set"),
    (lambda g: put(g, {"w": ones(4, 2)}, "layers", 1, "w"), TypeError,
     r"\[2\] \('layers.1.w'\) must be a NumPy array, got dict"),
    (lambda g: put(g, ones(2, 4), "layers", 1, "w"), ValueError,
     r"\[2\] \('layers.1.w'\) has shape \(2, 4\); its parameter has \(4, 2\)"),
    (lambda g: put(g, ones(4, 2).astype(float), "layers", 1, "w"), TypeError,
     r"\[2\] \('layers.1.w'\) has dtype float64; its parameter has float32"),
    (lambda g: [*leaves(g)], TypeError, " must be a mapping by parameter name, got list"),
    (lambda g: dict(zip(NAMES, leaves(g), strict=True)), ValueError, " must have the names"),
])
def test_wrong_nests(spoil, error, words):
    """Refused at every door, naming the place."""
    params, bound = nest(), nest()
    opt = optcore.SGD(params, lr=0.1, momentum=0.9, grads=bound)
    wrong = nest()
    wrong = spoil(wrong) or wrong
    good = like(nest(), np.copy)
    before = everything(opt, params, bound)
    for name, door in [
        ("grads", lambda: opt.step(wrong)),
        (r"replica_grads\[1\]", lambda: opt.step_replicas([good, wrong])),
        ("grads", lambda: opt.accumulate(wrong)),
        ("grads", lambda: optcore.SGD(params, lr=0.1, grads=wrong)),
        ("velocities", lambda: optcore.SGD(params, lr=0.1, momentum=0.9, velocities=wrong)),
    ]:
        for _ in range(2):
            with pytest.raises(error, match="^" + name + words):
                door()
            assert everything(opt, params, bound) == before


def cyclic():
    inner = [ones(1)]
    inner.append({"again": inner})
    return inner


def twice():
    layer = {"w": ones(1)}
    return [layer, layer]


@pytest.mark.parametrize(("params", "error", "words"), [
    ({"a": {"b": ones(1)}, "a.b": ones(2)}, ValueError, r"names of their own, got \['a.b'\] twice"),
    ({"a": [ones(1)], "a.0": ones(2)}, ValueError, r"names of their own, got \['a.0'\] twice"),
    ([{"params": {"a": ones(1)}}, {"params": {"a": ones(1)}}], ValueError, r"\['a'\] twice"),
    ([{"params": {"a": {"b": ones(1)}}}, {"params": {"a": {"b": ones(1)}}}], ValueError,
     r"\['a.b'\] twice"),
    ([{"params": {"a": {"b": ones(1)}}}, {"params": {"a": [ones(1)]}}], ValueError,
     r"params\['a'\] must be a mapping in every group that has it"),
    ({"params": [ones(1)], "lr": 0.1}, TypeError, r"groups come in a list, \[{'params'"),
    ({"params": {"w": ones(1)}, "weight_decay": 0.0}, TypeError, "groups come in a list"),
    ([{"params": ones(1)}, {"w": ones(1)}], ValueError, r"params\[1\] must have a key 'params'"),
    ([{"params": {"a": ones(1)}, "param_names": ["b"]}], ValueError, "param_names"),
    ([], ValueError, "at least one array"),
    ({"a": [], "b": {}}, ValueError, "at least one array"),
    ({"a": None}, TypeError, r"params\[0\] \('a'\) must be a NumPy array, got NoneType"),
    ({"a": [1.0]}, TypeError, r"params\[0\] \('a.0'\) must be a NumPy array, got float"),
    ({"a": "abc"}, TypeError, r"params\[0\] \('a'\) must be a NumPy array, got str"),
    ({"a": (ones(1) for _ in range(2))}, TypeError, "'a'.* got generator"),
    (twice(), ValueError, r"params\[1\] \('1.w'\) is the same array as params\[0\] \('0.w'\)"),
    (cyclic(), ValueError, "itself"),
    (file(), ValueError, r"params must give the same array at each access, got NpzFile"),
    ({"a": file()}, ValueError, r"params\['a'\] must give the same array.*dict\(params\['a'\]\)"),
    ([{"params": file()}], ValueError, r"param_groups\[0\]\['params'\] must give the same array"),
    (Anew({"w": ones(1)}), ValueError, "same array at each access, got Anew"),
    ([Anew({"w": ones(1)})], ValueError, r"params\[0\] must give the same array"),
    ([{"params": [ones(1), ones(2)], "param_names": ["a"]}], ValueError, "must name 2 .* got 1"),
    ([{"params": ones(1), "param_names": "ab"}], TypeError, "a sequence of names, got str"),
    ([{"params": ones(1), "param_names": [None]}], ValueError, "of their own, got None"),
])
def test_params_refused(params, error, words):
    with pytest.raises(error, match=words):
        optcore.SGD(params, lr=0.1)


def test_arrays_made_anew():
    """Fine as gradients, which are read once; what is added to them or kept in them is lost."""
    params = {"w": ones(1)}
    optcore.SGD(params, lr=0.25).step(Anew(params))
    assert params["w"] == 0.75
    with pytest.raises(ValueError, match=r"^grads must give the same array at each access"):
        optcore.SGD(params, lr=0.1, grads=Anew({"w": ones(1)}))
    with pytest.raises(ValueError, match=r"^velocities must give the same array at each access"):
        optcore.SGD(params, lr=0.1, momentum=0.9, velocities=Anew({"w": ones(1)}))


def test_deep_nests():
    x = ones(2)
    params, grads = x, ones(2)
    for _ in range(100):
        params, grads = {"a": [params]}, {"a": [grads]}
    optcore.SGD(params, lr=0.25).step(grads)
    assert (x == 0.75).all()


# Looked at again

KINDS = {
    "dict": (dict, "w", "b"), "ordered": (collections.OrderedDict, "w", "b"),
    "user's": (collections.UserDict, "w", "b"), "mapping": (OwnMapping, "w", "b"),
    "list": (lambda d: list(d.values()), 0, 1),
    "user's list": (lambda d: collections.UserList(d.values()), 0, 1),
    "deque": (lambda d: collections.deque(d.values()), 0, 1),
    "sequence": (lambda d: OwnSequence(list(d.values())), 0, 1),
}
by_kind = pytest.mark.parametrize("kind", KINDS)


def contained(kind, nested, rng):
    """Return the container of a kind, what holds it, and keys of its two arrays."""
    make, *keys = KINDS[kind]
    values = {"w": rng.standard_normal((3, 4)), "b": rng.standard_normal(())}
    container = make({name: np.array(v, np.float32) for name, v in values.items()})
    return container, {"n": [container]} if nested else container, keys


@pytest.mark.parametrize("nested", [False, True])
@by_kind
def test_rebound_gradients(kind, nested, rng):
    """Checked and taken over; one that is refused stays out, and so do all, until it is cured."""
    params = contained(kind, nested, rng)[1]
    inner, grads, (w, b) = contained(kind, nested, rng)
    opt = optcore.SGD(params, lr=0.1, momentum=0.9, dampening=0.5, grads=grads)
    twin = Twin(opt)

    def step(**more):
        kept = [np.array(inner[w]), None if inner[b] is None else np.array(inner[b])]
        assert opt.step(**more)
        twin.step(kept)
        twin.check()

    step()
    old, was = weakref.ref(inner[w]), inner[w].copy()
    inner[w] = 2 * inner[w]
    inner[b] = None
    step()
    assert old() is None                                # nobody holds what is bound no more
    inner[b] = np.array(3, np.float32)
    step(zero_grad=True)
    assert not inner[w].any()
    assert inner[b] == 0
    inner[w] = np.asfortranarray(was)                   # as X.T @ d may be
    step(zero_grad=True)
    assert not inner[w].any()
    live, good = twin.live, contained(kind, nested, rng)[1]
    inner_of(good, nested)[w][...] = was
    for wrong, words in [(was[:2], r"has shape \(2, 4\)"), (was.astype(float), "has dtype float64"),
                         (live[0], "must not share memory"), ("w", "must be a NumPy array")]:
        kept, inner[w] = inner[w], wrong
        inner[b] = np.array(7, np.float32)
        before = everything(opt, grads)
        for call in (opt.step, opt.step, opt.zero_grad, lambda: opt.accumulate(good)):
            with pytest.raises((TypeError, ValueError), match=words):
                call()
            assert everything(opt, grads) == before
        inner[w] = kept
        step()
    inner[w] = np.ones((3, 4), np.float32)
    opt.accumulate(good)
    assert same_bits(inner[w], 1 + was)
    opt.zero_grad()
    assert not inner[w].any()


def test_a_rebound_scalar():
    """What d.sum() is: taken for a 0-d parameter, but cannot be set to zero."""
    b, grads = ones(), {"b": ones()}
    opt = optcore.SGD({"b": b}, lr=0.25, grads=grads)
    for scalar in (np.float32(2), np.float32(1)):
        grads["b"] = scalar
        opt.step()
    assert b == 0.25
    for call in (lambda: opt.step(zero_grad=True), opt.zero_grad, lambda: opt.accumulate(grads)):
        with pytest.raises((TypeError, ValueError), match=r"grads\[0\] \('b'\) must be"):
            call()
    assert b == 0.25
    assert opt.step_count == 2


@pytest.mark.parametrize("bound", [False, True])
@by_kind
def test_gradients_more_and_fewer(kind, bound, rng):
    params, (container, grads, keys) = contained(kind, False, rng)[1], contained(kind, False, rng)
    opt = optcore.SGD(params, lr=0.1, momentum=0.9, grads=grads if bound else None)
    changes = [lambda: container.__setitem__("z", ones(1))] if keys[0] == "w" else []
    if hasattr(container, "append"):
        changes += [lambda: container.append(ones(1)), container.pop, container.pop]
    elif keys[0] == "w":
        changes += [lambda: container.__delitem__("z"), lambda: container.__delitem__("b")]
    step = opt.step if bound else lambda: opt.step(grads)
    step()
    for k, change in enumerate(changes):
        change()
        before = everything(opt)
        for _ in range(2 if k != 1 else 0):             # the second change undoes the first
            with pytest.raises(ValueError, match="grads must have"):
                step()
        assert everything(opt) == before


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("group", [False, True])
@by_kind
def test_rebound_parameters(kind, nested, group, rng):
    """Refused with what to write instead, until they are as they were."""
    inner, params, (w, b) = contained(kind, nested, rng)
    grads, good = (contained(kind, nested, rng)[1] for _ in range(2))
    bound = optcore.SGD([{"params": params}] if group else params, lr=0.1, grads=grads)
    opt = optcore.SGD([{"params": params}] if group else params, lr=0.1, momentum=0.9)
    twin = Twin(opt)
    x, y = inner[w], inner[b]
    rows = [(w, x - 1, r"write .*\[\.\.\.\] = "), (w, x.copy(), r"write .*\[\.\.\.\] = "),
            (w, x[::-1], r"write .*\[\.\.\.\] = "), (w, x.reshape(4, 3), r"\[\.\.\.\] = "),
            (b, None, "params"), (w, 3.0, "params")]
    for key, new, words in rows:
        old, inner[key] = inner[key], new
        before = everything(opt, x, y)
        for call in (lambda: opt.step(grads), lambda: opt.step(grads), bound.step,
                     lambda: opt.step_replicas([grads]), lambda: bound.accumulate(good)):
            with pytest.raises((TypeError, ValueError), match=words):
                call()
            assert everything(opt, x, y) == before
        inner[key] = old
    inner[w], inner[b] = x[...], y[...]                 # other views of the same memory
    kept = [inner_of(grads, nested)[key].copy() for key in (w, b)]
    opt.step(grads)
    twin.step(kept)
    twin.check()
    if kind == "list":
        inner.append(ones(1))
        change = "add_param_group"
    elif hasattr(inner, "pop"):
        inner.pop(b) if w == "w" else inner.pop()
        change = "params"
    else:
        return
    before = everything(opt)
    for _ in range(2):
        with pytest.raises(ValueError, match=change):
            opt.step(grads)
    assert everything(opt) == before


def inner_of(container, nested):
    return container["n"][0] if nested else container


def test_order_of_names_does_not_matter(rng):
    params, grads = {"a": ones(2), "b": ones(2)}, {"a": 1 * ones(2), "b": 2 * ones(2)}
    opt = optcore.SGD(params, lr=0.25, grads=grads)
    params["a"] = params.pop("a")
    grads["a"] = grads.pop("a")
    opt.step()
    assert (params["a"] == 0.75).all()
    assert (params["b"] == 0.5).all()
    params["a"], params["b"] = params["b"], params["a"]
    with pytest.raises(ValueError, match=r"params\[0\] \('a'\) is another array"):
        opt.step()


@pytest.mark.parametrize("edit", [
    lambda groups: groups[0].update(lr=0.5), lambda groups: groups[1].update(lr=0.5),
    lambda groups: groups[1].pop("momentum"), lambda groups: groups[0].update(params=[ones(1)]),
    lambda groups: groups.append({"params": ones(1)}), lambda groups: groups.pop(),
])
def test_group_dictionaries_of_the_callers(edit):
    """The optimizer has its own; an edit of those it was built from would be ignored."""
    groups = [{"params": [ones(1)]}, {"params": [ones(1)], "momentum": 0.5}]
    opt = optcore.SGD(groups, lr=0.1)
    edit(groups)
    before = everything(opt)
    for _ in range(2):
        with pytest.raises(ValueError, match="param_groups"):
            opt.step([ones(1), ones(1)])
    assert everything(opt) == before


class Hooked(OwnMapping):
    hook = None

    def __getitem__(self, key):
        if self.hook:
            self.hook()
        return self.items_[key]


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize(("act", "error"), [
    (lambda opt, params: opt.step(params), RuntimeError),
    (lambda opt, params: opt.add_param_group({"params": {"z": ones(1)}}), RuntimeError),
    (lambda opt, params: setattr(opt, "lr", 0.5), RuntimeError),
    (lambda opt, params: params.items_["w"].resize(10_000, refcheck=False), ValueError),
])
def test_a_container_that_runs_code_in_a_step(which, act, error):
    """Cannot start another, and is read before places are checked."""
    params, grads = Hooked({"w": ones(4)}), Hooked({"w": ones(4)})
    opt = optcore.SGD(params, lr=0.1)
    (params, grads)[which].hook = lambda: act(opt, params)
    with pytest.raises(error):
        opt.step(grads)
    assert opt.step_count == 0
    assert opt.lr == 0.1


@pytest.mark.parametrize("made", [lambda: [[ones(1)], [ones(2)]], lambda: (ones(1), ones(2))],
                         ids=["nested", "tuple"])
def test_one_group_is_as_flat_as_several(made):
    opt = optcore.SGD([{"params": made()}], lr=1.0, ema_decay=0.0)
    assert opt.step([ones(1), ones(2)])
    assert type(opt.ema) is list
    assert all(map(same_bits, opt.ema, [0 * ones(1), 0 * ones(2)]))
    one = optcore.SGD([{"params": ones(2)}], lr=1.0)
    assert one.step([ones(2)])
    with pytest.raises(TypeError, match="sequence of 1 arrays, got ndarray"):
        one.step(ones(2))
