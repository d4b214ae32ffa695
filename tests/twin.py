"""An optimizer followed in NumPy, with all that a step may hold; what a refusal may not touch."""
from __future__ import annotations

import copy
import functools

import numpy as np
from test_plan import norm

import optcore
from reference import (
    FRACTION_BITS,
    RULES_BY_ID,
    SGD_OPTIONS,
    Options,
    accumulated,
    added,
    averaged,
    joined,
    master_of,
    noise_key,
    rounded,
    same_bits,
    shares,
    split,
    summed_rows,
    type_name,
    widened,
)

OPTIONS = [name for name in vars(Options()) if name in SGD_OPTIONS]


def draw(rng, *shapes, dtype=np.float32, order="C"):
    return [np.array(rng.standard_normal(shape), dtype, order=order) for shape in shapes]


def leaves(nest):
    """The arrays of a nest, and its Nones, from left to right; mappings in their order."""
    if isinstance(nest, (dict, list, tuple)):
        items = nest.values() if isinstance(nest, dict) else nest
        return [leaf for item in items for leaf in leaves(item)]
    return [nest]


def like(nest, make):
    """The nest with `make` of each of its arrays."""
    if isinstance(nest, dict):
        return {key: like(item, make) for key, item in nest.items()}
    if isinstance(nest, (list, tuple)):
        return type(nest)(like(item, make) for item in nest)
    return make(nest)


def alike(a, b):
    """`same_bits`, soon done where no NaN makes it ask twice."""
    return (a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
            ) or same_bits(a, b)


def number_now(value, count):
    """An option's value as a step of that count has it: None, a flag or a float."""
    if callable(value):
        value = value(count)
    return value if value is None or isinstance(value, (bool, np.bool_)) else float(value)


def rule_of(options):
    if options["momentum"] == 0:
        return RULES_BY_ID["sgd"]
    name = "nesterov" if options["nesterov"] else "momentum"
    return RULES_BY_ID[name + ("_lr_in_velocity" if options["lr_in_velocity"] else "")]


class Late:
    """The rows of a parameter that exact steps have not all touched, from the first of those on.

    Dense steps round each time, and the scalars too; what rows have missed is applied to them in
    float64. Either is within a few roundings a step, of numbers no larger than have been, which
    momentum adds up: at most 1 / (1 - 0.9) times, once for v and once for x.
    """

    def __init__(self, n_rows):
        self.never = np.ones(n_rows, bool)      # late: their bits are those of dense steps
        self.n_steps = self.most = 0

    def touched(self, rows):
        others = np.ones(len(self.never), bool)
        others[rows] = False
        self.never = self.never & ~others

    def see(self, x, v):
        self.n_steps += 1
        self.most = max(self.most, np.abs(x).max(initial=0), np.abs(v).max(initial=0))

    def check(self, expected, found):
        """Compare with what is found, once all rows are up to date."""
        bound = 100 * 4 * (self.n_steps + 1) * np.finfo(found.dtype).eps * self.most
        assert (np.abs(expected - found) <= bound).all(), np.abs(expected - found).max() / bound


class Twin:
    """What `opt` must hold: built before its first step, stepped beside it, compared by `check`.

    With Rows and `lazy="exact"` it is a dense step, whose bits are those of rows that miss none.

    Options are those of `opt`, as its groups and attributes have them when the twin steps.
    `velocities` are leaves, those that the caller has given, or None.
    """

    def __init__(self, opt, velocities=None):
        self.opt = opt
        self.params, self.velocities, self.averages, self.started = [], [], [], []
        self.types, self.masters = [], []       # of the parameters, and what is kept of them
        self.before = {}        # float32 of parameters that were given other values since
        self.late = {}          # of parameters that Rows have stepped: `Late`
        self.count = self.skipped = 0
        self.grow(velocities)

    def grow(self, velocities=None):
        """Follow the parameters that `opt` has more."""
        more = self.live[len(self.params) :]
        groups = [group for group in self.opt.param_groups for _ in group["params"]]
        groups = groups[len(self.params) :]
        for p, v, group in zip(more, velocities or [None] * len(more), groups, strict=True):
            value = np.array(widened(p))
            self.params.append(value)
            self.averages.append(value.copy())
            self.types.append(type_name(p))
            self.masters.append(master_of(type_name(p), group["master"]))
            zeros = np.zeros_like(value)
            if group["velocity_dtype"] == "bfloat16":
                zeros = rounded(zeros, "bfloat16")
            self.velocities.append(zeros if v is None else v.copy())
            self.started.append(v is not None and bool(widened(v).any()))

    def of(self, opt):
        """Return a twin of a copy of the optimizer."""
        twin = copy.copy(self)
        twin.opt, twin.before, twin.late = opt, {}, copy.deepcopy(self.late)
        for name in ("params", "velocities", "averages", "started", "types", "masters"):
            setattr(twin, name, list(getattr(self, name)))
        return twin

    @property
    def live(self):
        return [p for group in self.opt.param_groups for p in group["params"]]

    def step(self, grads, grad_scale=1.0, rule_of=rule_of):
        """`grads` are leaves: one for each parameter, or None. Return whether it was applied."""
        opt, given, rows = self.opt, grads, {}
        grads, measured = [], []
        for i, (g, p) in enumerate(zip(given, self.live, strict=True)):
            if isinstance(g, optcore.Rows):
                rows[i], sums = summed_rows(g.indices, widened(g.values))
                grads.append(np.zeros(p.shape, sums.dtype))
                grads[i][rows[i]] = sums
                measured += [*sums]
                continue
            grads.append(None if g is None else widened(
                np.array(g, order="F" if p.flags.fnc else "C")))
            measured.append(grads[i])
        self.norm = norm(measured, grad_scale) if (
            opt.track_grad_norm or opt.max_norm is not None) else None
        self.nonfinite = []
        if opt.skip_nonfinite or self.norm is not None:
            self.nonfinite = [i for i, g in enumerate(grads)
                              if g is not None and not np.isfinite(g).all()]
        if opt.skip_nonfinite and self.nonfinite:
            self.skipped += 1
            return False
        if opt.max_norm is not None:
            bound = opt.max_norm / (self.norm + 1e-6)
            grad_scale = grad_scale * float(np.minimum(1.0, bound))     # NaN stays NaN
        groups = []
        for group in opt.param_groups:
            numbers = {name: number_now(group[name], self.count)
                       for name in [*OPTIONS, "nesterov", "lr_in_velocity"]}
            numbers.update(rounding=group["rounding"], lazy=group["lazy"])
            groups += [numbers] * len(group["params"])
        for i, (g, group) in enumerate(zip(grads, groups, strict=True)):
            if g is None:
                continue
            rule = rule_of(group)
            options = Options(**{name: group[name] for name in OPTIONS}, grad_scale=grad_scale,
                              first_step=not self.started[i])
            order = "F" if self.live[i].flags.fnc else "C"      # by which noise goes
            x = np.array(self.params[i], order=order)
            halved = self.types[i] in FRACTION_BITS and self.masters[i] is None
            how = {"rounding": group["rounding"],
                   "noise_key": noise_key(opt.seed, self.count, i)}
            reference, there = rule.reference, ...
            if i in rows and group["lazy"] == "rows":
                there = rows[i]
                reference = functools.partial(rule.rows_reference, there)
            exact, _ = reference(
                x, g, [widened(self.velocities[i])] if rule.states else [], options)
            x, states = reference(
                np.array(rounded(x, self.types[i]), order=order) if halved else x, g,
                [self.velocities[i]] if rule.states else [], options, **how)
            if opt.ema_decay is not None:
                average = np.array(self.averages[i])
                average[there] = np.asarray(averaged(
                    average, exact, number_now(opt.ema_decay, self.count)))[there]
                self.averages[i] = average
            self.params[i] = widened(x)
            self.before.pop(i, None)
            if states:
                self.velocities[i], self.started[i] = states[0], True
            if i in rows and group["lazy"] == "exact":
                self.late.setdefault(i, Late(len(x))).touched(rows[i])
            if i in self.late:
                self.late[i].see(x=self.params[i], v=widened(self.velocities[i]))
        self.count += 1
        return True

    def shown(self, i, value=None):
        """What a parameter shows, of this value or of that which it has."""
        value = self.params[i] if value is None else value
        return split(value)[0] if self.masters[i] == "split" else rounded(value, self.types[i])

    def shows(self, i, value):
        """Where a half parameter is what it shows of a value."""
        return self.shown(i, value).view(np.uint16) == self.live[i].view(np.uint16)

    def set_shown(self, i):
        """Follow a parameter that was given other values."""
        before = self.before.setdefault(i, self.params[i])      # what is kept stays until a step
        value = np.array(widened(self.live[i]))
        if self.masters[i] == "split":
            value = joined(self.live[i], split(before)[1])
        elif self.masters[i]:
            value = np.where(self.shows(i, before), before, value)
        self.params[i] = value

    def take_master(self, i, master):
        """Follow the load of a master, or of None, that left the parameter as it was."""
        if self.masters[i]:
            self.before.pop(i, None)
            self.params[i] = np.array(widened(self.live[i]))
            if master is not None:
                self.params[i] = np.where(self.shows(i, master), master, self.params[i])

    def step_replicas(self, replicas, weights=None, grad_scale=1.0):
        """`replicas` are lists of leaves."""
        with np.errstate(all="ignore"):
            sums = [summed(gs, weights) for gs in zip(*replicas, strict=True)]
        return self.step(sums, grad_scale if weights is not None else grad_scale / len(replicas))

    def outer_step(self, replicas, weights=None, grad_scale=1.0):
        """`replicas` are lists of leaves."""
        with np.errstate(all="ignore"):
            sums = [summed(ps, weights) for ps in zip(*replicas, strict=True)]
        return self._step_towards(sums, 1 if weights is not None else 1 / len(replicas), grad_scale)

    def collect(self, replicas, weights=None, total=None, grad_scale=1.0):
        """`replicas` are lists of leaves in the order of their arrival."""
        if weights is None or total is not None:
            return self.outer_step(replicas, weights, grad_scale)
        whole = 0.0
        for w in weights:
            whole = whole + float(w)
        first = next(float(w) for w in weights if w)
        with np.errstate(all="ignore"):
            sums = [None if ps[0] is None else
                    added([widened(p) for p in ps], [float(w) / first for w in weights])
                    for ps in zip(*replicas, strict=True)]
        return self._step_towards(sums, first / whole, grad_scale)

    def _step_towards(self, sums, share, grad_scale):
        with np.errstate(all="ignore"):
            differences = [None if s is None else x - x.dtype.type(share) * s
                           for x, s in zip(self.params, sums, strict=True)]
        return self.step(differences, grad_scale)

    def accumulate(self, batches, grad_scale=1.0):
        """`batches` are lists of leaves: the gradients that are folded into the velocities."""
        stacks = []
        for x, grads in zip(self.params, zip(*batches, strict=True), strict=True):
            grads = [widened(g).astype(x.dtype) for g in grads if g is not None]
            stacks.append(np.stack(grads) if grads else None)
        return self.step(stacks, grad_scale, lambda options: accumulated(rule_of(options)))

    def settle(self, strictly=True):
        """Bring all rows up to date, see that they are near, and go on from where they are."""
        if not self.late:
            return
        self.opt.catch_up()
        entries = self.opt.state_dict()["state"]
        for i, late in self.late.items():
            x, v, average = self.entry(i, entries[i])
            if strictly:
                late.check(self.params[i], x)
                late.check(self.averages[i], self.averages[i] if average is None else average)
                late.check(widened(self.velocities[i]), widened(v))
            self.params[i], self.velocities[i] = x, v
            self.averages[i] = x if average is None else average
        self.late = {}

    def leave_late(self):
        """Follow the load of a state, which all rows of the parameters are taken to belong to."""
        for i in self.late:
            if not self.masters[i]:
                self.params[i] = np.array(widened(self.live[i]))
        self.late = {}

    def entry(self, i, entry):
        """What an entry of a state has: the parameter as it is stepped, velocity and average."""
        v = entry["velocity"]
        x = entry["master"] if self.masters[i] else np.array(widened(self.live[i]))
        return x, self.velocities[i] if v is None else v, entry["ema"]

    def promised(self, i):
        """The rows of a parameter whose bits are promised; those of the others come near."""
        return self.late[i].never if i in self.late else ...

    def check(self, entries=None):
        """Compare with what a state dictionary holds, or with the entries given."""
        assert (self.opt.step_count, self.opt.skipped) == (self.count, self.skipped)
        if entries is None:
            state = self.opt.state_dict()
            assert (state["step_count"], state["skipped"]) == (self.count, self.skipped)
            entries = state["state"].values()
        for i, (p, entry) in enumerate(zip(self.live, entries, strict=True)):
            there = self.promised(i)
            assert alike(p[there], self.shown(i)[there]), i
            if self.masters[i] and "master" in entry:
                assert alike(entry["master"][there], self.params[i][there]), i
            v, average = entry["velocity"], entry["ema"]
            assert not self.velocities[i].any() if v is None else (
                alike(v[there], self.velocities[i][there])), i
            assert (average is None) is (self.opt.ema_decay is None)
            assert average is None or alike(average[there], self.averages[i][there]), i
            assert entry["first_step"] is not self.started[i], i


def summed(arrays, weights):
    """What a step adds up of one parameter's gradients, one of each replica."""
    if arrays[0] is None:
        return None
    factors = [1.0] * len(arrays) if weights is None else shares(weights)
    if isinstance(arrays[0], optcore.Rows):
        indices, values = [rows.indices for rows in arrays], [widened(r.values) for r in arrays]
        values = [v.dtype.type(factor) * v for v, factor in zip(values, factors, strict=True)]
        return optcore.Rows(*summed_rows(np.concatenate(indices), np.concatenate(values)))
    return added([widened(a) for a in arrays], factors)


def frozen(thing):
    """The thing as something to compare: arrays by their bytes, functions by identity."""
    if isinstance(thing, np.ndarray):
        return str(thing.dtype), thing.shape, thing.tobytes()
    if isinstance(thing, dict):
        return {key: frozen(item) for key, item in thing.items()}
    if isinstance(thing, (list, tuple)):
        return [frozen(item) for item in thing]
    return repr(thing)


def everything(opt, *more):
    """All that a call that raises may not change, with `more` arrays or nests of the caller's."""
    return [frozen(thing) for thing in (
        opt.state_dict(), opt.param_groups, opt.ema, opt.max_norm, opt.skip_nonfinite,
        opt.track_grad_norm, opt.ema_decay, opt.grad_norm, opt.nonfinite_params, more)]
