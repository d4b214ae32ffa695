"""Random lives of an optimizer, all that it offers in any order, against the reference."""
from __future__ import annotations

import copy
import importlib.util
import pickle

import numpy as np
import pytest
from twin import OPTIONS, Twin, everything, leaves, like

import optcore
from reference import same_bits

SHAPES = [(), (0,), (1,), (7,), (33,), (3, 5), (5, 3), (4, 3, 2), (40, 30)]
RECORDED = [*OPTIONS, "nesterov", "lr_in_velocity"]


def halving(step):
    return 0.5 ** (1 + step % 3)


def places(nest):
    """Yield the container and key of every leaf that can be rebound."""
    if isinstance(nest, (dict, list, tuple)):
        for key, item in nest.items() if isinstance(nest, dict) else enumerate(nest):
            if isinstance(item, (dict, list, tuple)):
                yield from places(item)
            elif not isinstance(nest, tuple):
                yield nest, key


class Life:
    """An optimizer, its twin, the caller's containers, and what may be done with them.

    `trees` are parameters as they were given, `bound` and `own` gradients and velocities, each a
    list of what came at the beginning and with each group since.
    """

    def __init__(self, seed, folder):
        self.folder = folder
        self.rng = np.random.default_rng(seed)
        self.n_names = 0
        self.named = self.chance(0.7)
        self.dtype = self.one_of(np.float32, np.float64)
        self.trees = [self.new_tree() for _ in range(self.one_of(1, 1, 2))]
        groups = [{"params": tree, **(self.options() if k else {})}
                  for k, tree in enumerate(self.trees)]
        self.bound = [self.map_trees(self.gradient)] if self.chance(0.4) else []
        self.own = [self.map_trees(self.velocity)] if self.chance(0.3) else []
        self.opt = optcore.SGD(
            groups if len(groups) > 1 or self.chance() else self.trees[0],
            **{"lr": 0.1, "momentum": 0.9, **self.options()},
            ema_decay=self.one_of(None, 0.9, halving), skip_nonfinite=self.chance(),
            track_grad_norm=self.chance(), grads=self.bound[0] if self.bound else None,
            velocities=self.own[0] if self.own else None,
        )
        if all(group["clip_value"] is None for group in self.opt.param_groups):
            self.opt.max_norm = self.one_of(None, 1.0)
        self.twin = Twin(self.opt, leaves(self.own) or None)

    # Drawing

    def chance(self, p=0.5):
        return bool(self.rng.random() < p)

    def one_of(self, *things):
        return things[self.rng.integers(len(things))]

    def options(self, clip=True):
        """Options of a group that go together."""
        nesterov, right = self.chance(0.3), self.chance(0.3)
        return {
            "lr": self.one_of(0.05, halving), "momentum": self.one_of(0.9, halving),
            "weight_decay": self.one_of(0.0, 0.01, halving), "maximize": self.chance(),
            "decoupled_weight_decay": self.chance(), "flush_subnormals": self.chance(),
            "nesterov": nesterov, "lr_in_velocity": right, "dampen_first": self.chance(),
            "dampening": 0.0 if nesterov or right else self.one_of(0.0, 0.3, halving),
            "clip_value": self.one_of(None, None, 0.5, halving) if clip else None,
        }

    def array(self):
        values = self.rng.standard_normal(self.one_of(*SHAPES))
        return np.array(values, self.dtype, order=self.one_of("C", "F"))

    def new_tree(self, depth=0):
        """A nest; where parameters have no names a list, for groups then have flat gradients."""
        items = [
            self.new_tree(depth + 1) if self.named and depth < 2 and k and self.chance(0.3)
            else self.array() for k in range(self.rng.integers(depth == 0, 4))
        ]
        if self.named and (depth == 0 or self.chance()):
            self.n_names += len(items)
            return {f"p{self.n_names - k}": item for k, item in enumerate(items)}
        return items if self.chance() else tuple(items)

    def map_trees(self, make):
        """`make` of every parameter, in the structure that gradients have."""
        mapped = [like(tree, make) for tree in self.trees]
        if self.named:
            return {key: item for tree in mapped for key, item in tree.items()}
        return leaves(mapped)

    def laid(self, values, layout, order):
        """The values in an array that lies in one of the ways of NumPy's idioms."""
        if layout == "strided":
            wide = np.full((*values.shape, 2), np.nan, values.dtype)
            wide[..., 1] = values
            return wide[..., 1]
        if layout == "reversed" and values.ndim:
            return np.array(values[::-1])[::-1]
        return np.array(values, order={"C": "F", "F": "C"}[order] if layout == "other" else order)

    def gradient(self, p):
        if self.chance(0.1):
            return None
        values = self.rng.standard_normal(p.shape).astype(p.dtype)
        if values.size and self.chance(0.02):
            values[(0,) * p.ndim] = np.nan
        return self.laid(values, self.one_of("as p", "other", "strided", "reversed"),
                         "F" if p.flags.fnc else "C")

    def velocity(self, p):
        return self.one_of(None, np.zeros_like(p), np.array(p))

    def shuffled(self, nest):
        """The nest with the keys of its mappings in another order."""
        if isinstance(nest, dict):
            keys = list(nest)
            return {keys[k]: self.shuffled(nest[keys[k]]) for k in self.rng.permutation(len(keys))}
        if isinstance(nest, (list, tuple)):
            return type(nest)(map(self.shuffled, nest))
        return nest

    # What may happen

    def check(self):
        self.twin.check()
        for v, w in zip(leaves(self.own), self.twin.velocities, strict=False):
            assert v is None or same_bits(v, w)     # the caller's own are those

    def applied(self, step, grads, follow):
        """Take a step in the way given, and the twin's after it; or be refused, without any."""
        given = leaves(grads)
        kept = [None if g is None else g.copy() for g in given]
        zero, scale = self.chance(0.3), self.one_of(1.0, 0.25)
        if all(g is None for g in kept):
            self.refused(ValueError, lambda: step(grad_scale=scale, zero_grad=zero))
            return
        assert step(grad_scale=scale, zero_grad=zero) is follow(kept, scale)
        assert same_bits(np.array(self.opt.grad_norm, float), np.array(self.twin.norm, float))
        for g, before in zip(given, kept, strict=True):
            assert g is None or (not g.any() if zero else same_bits(g, before))

    def step(self):
        grads = self.map_trees(self.gradient)
        order = self.shuffled(grads)
        self.applied(lambda **more: self.opt.step(order, **more), grads, self.twin.step)

    def step_bound(self):
        """A step of bound gradients, some filled anew and some rebound."""
        for container, key in [place for part in self.bound for place in places(part)]:
            p = self.twin.params[self.index_of(container, key)]
            new, old = self.gradient(p), container[key]
            if self.chance() or old is None or new is None:
                container[key] = new
            else:
                old[...] = new
        if self.bound:
            self.applied(self.opt.step, self.bound, self.twin.step)

    def index_of(self, container, key):
        at = [(id(c), k) for part in self.bound for c, k in all_places(part)]
        return at.index((id(container), key))

    def accumulate(self):
        """Add into bound gradients that lie as their parameters do, now that they must."""
        for i, (container, key) in enumerate(p for part in self.bound for p in all_places(part)):
            if not isinstance(container, tuple):
                p = self.twin.live[i]
                container[key] = np.zeros_like(p)
        bound = leaves(self.bound)
        if not bound or any(g is None for g in bound):
            return
        grads = self.map_trees(self.gradient)
        if any(g.strides != p.strides for g, p in zip(bound, self.twin.live, strict=True)):
            return
        expected = [b if g is None else b + g for b, g in zip(bound, leaves(grads), strict=True)]
        self.opt.accumulate(self.shuffled(grads))
        assert all(map(same_bits, bound, expected))

    def step_replicas(self):
        n = self.one_of(1, 2, 3)
        weights = self.one_of(None, list(self.rng.random(n)), [1] * n)
        first = self.map_trees(self.gradient)
        replicas = [first] + [
            like(first, lambda g: None if g is None else self.laid(
                self.rng.standard_normal(g.shape).astype(g.dtype),
                self.one_of("as p", "other", "strided"), "C"))
            for _ in range(n - 1)
        ]
        m = len(self.twin.params)
        self.applied(
            lambda **more: self.opt.step_replicas(
                [self.shuffled(grads) for grads in replicas], weights=weights, **more),
            replicas,
            lambda kept, scale: self.twin.step_replicas(
                [kept[k * m : (k + 1) * m] for k in range(n)], weights, scale),
        )

    def grow(self):
        tree = self.new_tree()
        grads = like(tree, self.gradient) if self.bound else None
        own = like(tree, self.velocity) if self.own or self.chance(0.3) else None
        options = self.options(clip=self.opt.max_norm is None)
        options = {name: options[name] for name in options
                   if self.chance() or name in (
                       "momentum", "nesterov", "lr_in_velocity", "dampening")}
        self.opt.add_param_group({"params": tree, **options}, grads=grads, velocities=own)
        known = leaves(self.own) or [None] * len(self.twin.params)
        self.trees.append(tree)
        self.bound += [grads] if self.bound else []
        self.own = [*known, own if own is not None else [None] * len(leaves(tree))]
        self.twin.grow(leaves(own) if own is not None else None)

    def edit(self):
        options = self.options(clip=self.opt.max_norm is None)
        if self.chance():
            group = self.one_of(*self.opt.param_groups)
            if options["lr_in_velocity"] is group["lr_in_velocity"]:    # which must stay
                group.update(options)
        else:
            for name in ("lr", "weight_decay", "maximize", "flush_subnormals", "dampen_first"):
                setattr(self.opt, name, options[name])

    def copy(self):
        """Go on with a copy; the original stays as it was."""
        together = self.opt, self.trees, self.bound, self.own
        protocol = self.one_of(2, 3, 4, 5, None)
        copied = copy.deepcopy(together) if protocol is None else (
            pickle.loads(pickle.dumps(together, protocol)))
        self.original, self.before = self.opt, everything(*together)
        self.opt, self.trees, self.bound, self.own = copied
        self.twin = self.twin.of(self.opt)
        self.step()
        assert everything(*together) == self.before

    def load(self):
        """Go on in another optimizer, over parameters in another order where they have names."""
        state, names = self.opt.state_dict(), self.param_names()
        self.trees = copy.deepcopy(self.trees)
        groups = [
            {"params": tree, **{name: group[name] for name in RECORDED}}
            for tree, group in zip(self.trees, self.opt.param_groups, strict=True)
        ]
        if self.named:
            groups = [{**group, "params": self.shuffled(group["params"])} for group in groups[::-1]]
            self.trees = [group["params"] for group in groups]
        settings = {name: getattr(self.opt, name) for name in (
            "max_norm", "skip_nonfinite", "track_grad_norm", "ema_decay")}
        old, self.bound, self.own = self.opt, [], []
        self.opt = optcore.SGD(groups, lr=1.0, **settings)
        if self.folder and self.chance():
            old.save(self.folder / "state")
            found = self.opt.restore(self.folder / "state", by_name=self.named)
        else:
            found = self.opt.load_state_dict(state, by_name=self.named)
        assert not any(found)
        twin = self.twin.of(self.opt)
        if self.named:
            order = [names.index(name) for name in self.param_names()]
            for name in ("params", "velocities", "averages", "started"):
                setattr(twin, name, [getattr(twin, name)[i] for i in order])
        self.twin = twin

    def param_names(self):
        return [name for group in self.opt.param_groups
                for name in group["param_names"] or [None] * len(group["params"])]

    def refused(self, error, call):
        """What raises changes nothing."""
        before = everything(self.opt, self.trees, self.bound, self.own)
        for _ in range(2):
            with pytest.raises(error):
                call()
            assert everything(self.opt, self.trees, self.bound, self.own) == before

    def refuse(self):
        p = next((p for p in self.twin.live if p.size), None)
        if p is None:
            return
        wrong = self.one_of(p, p.astype(np.float16), np.zeros((*p.shape, 2), p.dtype),
                            p.tolist(), np.ma.masked_array(p, True))
        grads = self.map_trees(lambda q: wrong if q is p else np.zeros_like(q))
        self.refused((TypeError, ValueError), self.one_of(
            lambda: self.opt.step(grads),
            lambda: self.opt.step_replicas([grads]),
            lambda: self.opt.step_replicas([grads, grads], weights=[1, 2]),
            lambda: self.opt.step(self.map_trees(np.zeros_like), grad_scale=-1),
            lambda: self.opt.step_replicas([self.map_trees(np.zeros_like)], weights=[np.nan]),
            lambda: self.opt.add_param_group({"params": {"new": p}}),
            lambda: self.opt.add_param_group({"params": {"new": np.zeros(3)}, "momentum": 1}),
            lambda: self.opt.add_param_group({"params": {"new": np.zeros(3)}},
                                             velocities={"new": np.zeros(4)}),
            lambda: setattr(self.opt, "momentum", 1.0),
            lambda: self.opt.load_state_dict({**self.opt.state_dict(), "step_count": -1}),
        ))


def all_places(nest):
    """As `places`, also of tuples."""
    items = nest.items() if isinstance(nest, dict) else enumerate(nest)
    for key, item in items:
        if isinstance(item, (dict, list, tuple)):
            yield from all_places(item)
        else:
            yield nest, key


@pytest.mark.parametrize("seed", range(24))
def test_life(seed, tmp_path):
    with_files = seed % 6 == 0 and importlib.util.find_spec("safetensors")  # which are synced
    life = Life(seed, tmp_path if with_files else None)
    life.check()
    for _ in range(25):
        life.one_of(life.step, life.step, life.step_bound, life.accumulate, life.step_replicas,
                    life.grow, life.edit, life.copy, life.load, life.refuse)()
        life.check()
