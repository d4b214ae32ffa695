"""Who is measured in every suite: NumPy as it is written by hand, and optcore."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import count, cycle

import numpy as np
from cases import (
    ALPHA,
    BETA1,
    BETA2,
    EMA_DECAY,
    EPS,
    LR,
    MAX_NORM,
    MOMENTUM,
    OUTER,
    OUTER_LR,
    PIPELINE,
    ROWS,
    WEIGHT_DECAY,
    Arrays,
    Case,
    Run,
    fresh_empty,
)
from shapes import MODELS
from tables import SMALL, WITH_DENSE, Table

import optcore
from optcore.runtime import simd, simd_levels_available

LITERAL = "NumPy, literal"
OUT = "NumPy, out="
FUNCTION = "optcore, function"
STEP = "optcore, step()"
STEP_LIST = "optcore, step(list)"
ALONE = "optcore, step(), one thread"
WIDE = "optcore, step(), float32"
OUTER_STEP = "optcore, outer_step()"
OUTER_WEIGHTED = "optcore, outer_step(weights)"
FLOWER = "NumPy, as Flower"
ROWS_EXACT = "optcore, exact"
ROWS_LAZY = 'optcore, lazy="rows"'
ROWS_SMALL = "optcore, exact, 100,000 rows"
ROWS_DENSE = "optcore, dense"
LIMIT = "memory limit"


@dataclass(frozen=True)
class Contender:
    """An implementation: how to set it up, and what it can do."""

    name: str
    build: Callable[[Case, Arrays], Run]
    jobs: tuple[str, ...] | None = None         # None: all
    workloads: Callable[[str], bool] = bool     # which it is measured on; bool: all
    exact: bool = False                         # the reference's bits, not merely its values
    checked: bool = True                        # compared with the reference before it is timed
    threaded: bool = False                      # worth measuring with all threads
    level: str | None = None                    # SIMD level to run at

    def takes(self, case: Case) -> bool:
        """Return whether it can step the case, and would not repeat a one-thread run.

        In a training others than the step are threaded, so that it is no repetition.
        """
        return (
            (self.jobs is None or case.job in self.jobs)
            and (self.threaded or case.threads == 1 or case.training)
            and self.workloads(case.workload)
        )

    @contextmanager
    def at_level(self) -> Iterator[None]:
        """Run the body at this contender's SIMD level."""
        if self.level is None:
            yield
        else:
            with simd(self.level):
                yield


def is_vector(workload: str) -> bool:
    """Return whether a workload is a single vector."""
    return workload not in MODELS


# NumPy as the lecture writes it. Lists stand for a model's arrays; Python floats are what a
# user writes. A state is a new array each time, as `v = …` makes it. `steps` counts from 1.

def literal_sgd(x, g):
    for i in range(len(x)):
        x[i] -= LR * g[i]


def literal_momentum(x, g, v):
    for i in range(len(x)):
        v[i] = MOMENTUM * v[i] + g[i]
        x[i] -= LR * v[i]


def literal_momentum_lr_in_velocity(x, g, v):
    for i in range(len(x)):
        v[i] = MOMENTUM * v[i] - LR * g[i]
        x[i] += v[i]


def literal_nesterov(x, g, v):
    for i in range(len(x)):
        old = v[i]
        v[i] = MOMENTUM * v[i] - LR * g[i]
        x[i] += -MOMENTUM * old + (1 + MOMENTUM) * v[i]


def literal_adagrad(x, g, v):
    for i in range(len(x)):
        v[i] += g[i] * g[i]
        x[i] -= LR * g[i] / (np.sqrt(v[i]) + EPS)


def literal_rmsprop(x, g, v):
    for i in range(len(x)):
        v[i] = ALPHA * v[i] + (1 - ALPHA) * g[i] * g[i]
        x[i] -= LR * g[i] / (np.sqrt(v[i]) + EPS)


def literal_adam(x, g, m, v, steps):
    t = next(steps)
    for i in range(len(x)):
        m[i] = BETA1 * m[i] + (1 - BETA1) * g[i]
        v[i] = BETA2 * v[i] + (1 - BETA2) * g[i] * g[i]
        m_hat = m[i] / (1 - BETA1**t)
        v_hat = v[i] / (1 - BETA2**t)
        x[i] -= LR * m_hat / (np.sqrt(v_hat) + EPS)


def literal_adamw(x, g, m, v, steps):
    for i in range(len(x)):
        x[i] -= LR * WEIGHT_DECAY * x[i]
    literal_adam(x, g, m, v, steps)


def literal_pipeline(x, g, v, e):
    norm = np.sqrt(sum(float(np.vdot(gi, gi)) for gi in g))
    scale = min(1.0, MAX_NORM / (float(norm) + 1e-6))
    for i in range(len(x)):
        d = scale * g[i] + WEIGHT_DECAY * x[i]
        v[i] = MOMENTUM * v[i] + d
        x[i] -= LR * (d + MOMENTUM * v[i])
        e[i] = EMA_DECAY * e[i] + (1 - EMA_DECAY) * x[i]
        g[i][...] = 0


# NumPy without allocation, one tensor: every intermediate goes to an array that exists. `s` is
# scratch in the shape of the parameter, and all of a model's are views of one.

def out_sgd(x, g, s):
    np.multiply(g, LR, out=s)
    np.subtract(x, s, out=x)


def out_momentum(x, g, v, s):
    np.multiply(v, MOMENTUM, out=v)
    np.add(v, g, out=v)
    np.multiply(v, LR, out=s)
    np.subtract(x, s, out=x)


def out_momentum_lr_in_velocity(x, g, v, s):
    np.multiply(g, LR, out=s)
    np.multiply(v, MOMENTUM, out=v)
    np.subtract(v, s, out=v)
    np.add(x, v, out=x)


def out_nesterov(x, g, v, s):
    np.multiply(v, MOMENTUM, out=v)
    np.add(v, g, out=v)
    np.multiply(v, MOMENTUM, out=s)
    np.add(g, s, out=s)
    np.multiply(s, LR, out=s)
    np.subtract(x, s, out=x)


def out_nesterov_lr_in_velocity(x, g, v, s):
    # The lecture's form, for ρ·v − α·g would need α·g a second time, or a second scratch array.
    np.multiply(v, MOMENTUM, out=s)
    np.subtract(x, s, out=x)
    np.multiply(g, LR, out=v)
    np.subtract(s, v, out=v)
    np.multiply(v, 1 + MOMENTUM, out=s)
    np.add(x, s, out=x)


def out_divided(x, g, v, s):
    np.sqrt(v, out=s)
    np.add(s, EPS, out=s)
    np.divide(g, s, out=s)
    np.multiply(s, LR, out=s)
    np.subtract(x, s, out=x)


def out_adagrad(x, g, v, s):
    np.multiply(g, g, out=s)
    np.add(v, s, out=v)
    out_divided(x, g, v, s)


def out_rmsprop(x, g, v, s):
    np.multiply(v, ALPHA, out=v)
    np.multiply(g, g, out=s)
    np.multiply(s, 1 - ALPHA, out=s)
    np.add(v, s, out=v)
    out_divided(x, g, v, s)


def out_adam(x, g, m, v, s, steps):
    # Both corrections in the rate and ε, as Kingma and Ba advise: two passes less.
    t = next(steps)
    root = np.sqrt(1 - BETA2**t)
    np.multiply(m, BETA1, out=m)
    np.multiply(g, 1 - BETA1, out=s)
    np.add(m, s, out=m)
    np.multiply(v, BETA2, out=v)
    np.multiply(g, g, out=s)
    np.multiply(s, 1 - BETA2, out=s)
    np.add(v, s, out=v)
    np.sqrt(v, out=s)
    np.add(s, float(EPS * root), out=s)
    np.divide(m, s, out=s)
    np.multiply(s, float(LR * root / (1 - BETA1**t)), out=s)
    np.subtract(x, s, out=x)


def out_adamw(x, g, m, v, s, steps):
    np.multiply(x, 1 - LR * WEIGHT_DECAY, out=x)
    out_adam(x, g, m, v, s, steps)


def out_pipeline(tensors):
    norm = np.sqrt(sum([float(np.vdot(g, g)) for _, g, *_ in tensors]))
    scale = min(1.0, MAX_NORM / (float(norm) + 1e-6))
    for x, g, v, s, e in tensors:
        np.multiply(g, scale, out=g)
        np.multiply(x, WEIGHT_DECAY, out=s)
        np.add(g, s, out=g)
        out_nesterov(x, g, v, s)
        np.multiply(e, EMA_DECAY, out=e)
        np.multiply(x, 1 - EMA_DECAY, out=s)
        np.add(e, s, out=e)
        g.fill(0)


LITERALS = {
    "sgd": literal_sgd,
    "momentum": literal_momentum,
    "momentum_lr_in_velocity": literal_momentum_lr_in_velocity,
    "nesterov": literal_nesterov,
    "nesterov_lr_in_velocity": literal_nesterov,
    "adagrad": literal_adagrad,
    "rmsprop": literal_rmsprop,
    "adam": literal_adam,
    "adamw": literal_adamw,
    PIPELINE: literal_pipeline,
}
OUTS = {
    "sgd": out_sgd,
    "momentum": out_momentum,
    "momentum_lr_in_velocity": out_momentum_lr_in_velocity,
    "nesterov": out_nesterov,
    "nesterov_lr_in_velocity": out_nesterov_lr_in_velocity,
    "adagrad": out_adagrad,
    "rmsprop": out_rmsprop,
    "adam": out_adam,
    "adamw": out_adamw,
}


def literal_reference(rule, options, x, g, *states):
    for i in range(len(x)):
        x[i][...], new = rule.reference(x[i], g[i], [s[i] for s in states], options)
        for s, value in zip(states, new, strict=True):
            s[i] = value


def build_literal(case: Case, arrays: Arrays) -> Run:
    averages = [arrays.copies()] if case.pipeline else []
    literal = LITERALS.get(case.job) or partial(literal_reference, case.rule, case.options)
    steps = [count(1)] * case.counted
    step = partial(literal, arrays.x, arrays.g, *arrays.states(), *averages, *steps)
    return Run(step, lambda: arrays.x, lambda: averages[0] if averages else ())


def build_out(case: Case, arrays: Arrays) -> Run:
    scratch = fresh_empty((max(x.size for x in arrays.x),), case.dtype)
    columns = [arrays.x, arrays.g, *arrays.states()]
    columns.append([scratch[: x.size].reshape(x.shape) for x in arrays.x])
    if case.pipeline:
        averages = arrays.copies()
        tensors = list(zip(*columns, averages, strict=True))
        return Run(partial(out_pipeline, tensors), lambda: arrays.x, lambda: averages)
    if case.counted:
        columns.append([count(1) for _ in arrays.x])
    tensors = list(zip(*columns, strict=True))
    one = OUTS[case.job]
    if len(tensors) == 1:
        return Run(partial(one, *tensors[0]), lambda: arrays.x)

    def step() -> None:
        for tensor in tensors:
            one(*tensor)

    return Run(step, lambda: arrays.x)


def build_function(case: Case, arrays: Arrays) -> Run:
    """Call the functional API on one array, with the keywords a user would write."""
    tensors = [tensor for (tensor,) in (arrays.x, arrays.g, *arrays.states())]
    step = partial(case.rule.entry, *tensors, **case.rule.keywords(case.options))
    steps = count(1)
    return Run((lambda: step(step=next(steps))) if case.counted else step, lambda: arrays.x)


def build_step(case: Case, arrays: Arrays) -> Run:
    """Step with gradients bound at construction."""
    opt = case.optimizer(arrays.x, grads=arrays.g)
    step = partial(opt.step, zero_grad=True) if case.pipeline else opt.step
    return Run(step, lambda: arrays.x, lambda: opt.ema or ())


def build_step_list(case: Case, arrays: Arrays) -> Run:
    """Step with gradients handed over in a list each time."""
    opt = case.optimizer(arrays.x)
    zero = {"zero_grad": True} if case.pipeline else {}
    return Run(
        partial(opt.step, arrays.g, **zero), lambda: arrays.x, lambda: opt.ema or ()
    )


def build_alone(case: Case, arrays: Arrays) -> Run:
    """Step on one thread where all others use many: what threads gain, in the same minute."""
    optcore.set_num_threads(1)
    return build_step(case, arrays)


def build_wide(case: Case, arrays: Arrays) -> Run:
    """Step arrays of float32 where the case has others: what narrow ones gain, likewise."""
    wide = Arrays(replace(case, storage=None))
    wide.reset()
    return build_step(wide.case, wide)


def build_outer(case: Case, arrays: Arrays, *, weights: list[int] | None = None) -> Run:
    opt = case.optimizer(arrays.x)
    step = partial(
        opt.outer_step, arrays.sets, weights=weights, write_back=case.replicas.write_back
    )
    return Run(step, lambda: arrays.x, expected=arrays.expected_from(0, weights=weights)[0])


def build_outer_weighted(case: Case, arrays: Arrays) -> Run:
    return build_outer(case, arrays, weights=case.replicas.examples)


def build_flower(case: Case, arrays: Arrays) -> Run:
    """Take a round of a Flower server, and Nesterov's step, which it lacks, in the same style.

    Flower 1.42, `serverapp/strategy`: `aggregate_arrayrecords` and `FedAvgM.aggregate_train`, on
    lists of arrays in place of records. The new parameters are new arrays there.
    """
    examples = case.replicas.examples
    params, momentum_vector = arrays.x, None

    def step() -> None:
        nonlocal params, momentum_vector
        total = sum(examples)
        aggregated = []
        for replica, factor in zip(arrays.sets, [n / total for n in examples], strict=True):
            if not aggregated:
                aggregated = [value * factor for value in replica]
                continue
            for i, value in enumerate(replica):
                aggregated[i] += value * factor
        pseudo_gradient = [old - new for new, old in zip(aggregated, params, strict=True)]
        if momentum_vector is None:
            momentum_vector = pseudo_gradient
        else:
            momentum_vector = [
                MOMENTUM * mv + pg
                for mv, pg in zip(momentum_vector, pseudo_gradient, strict=True)
            ]
        pseudo_gradient = [
            pg + MOMENTUM * mv for mv, pg in zip(momentum_vector, pseudo_gradient, strict=True)
        ]
        params = [
            old - OUTER_LR * pg for old, pg in zip(params, pseudo_gradient, strict=True)
        ]
        if case.replicas.write_back:
            for replica in arrays.sets:
                for value, new in zip(replica, params, strict=True):
                    value[...] = new

    return Run(step, lambda: params, expected=arrays.expected_from(0, weights=examples)[0])


def build_rows(case: Case, table: Table, *, lazy: str = "exact") -> Run:
    """Step rows as a trainer has them: their numbers as they came, some of them several times."""
    opt = case.optimizer(table.x, velocities=table.states()[0], lazy=lazy)
    sets, values = cycle(table.indices), table.values

    def params() -> list[np.ndarray]:
        opt.catch_up(0, table.compared)
        return table.x

    return Run(
        lambda: opt.step([optcore.Rows(next(sets), values)]), params,
        expected=table.after_two(lazy=lazy == "rows"), warm_up=len(table.indices),
    )


def build_rows_small(case: Case, table: Table) -> Run:
    """Step rows of a small table where the case's is large: what its size costs."""
    small = Table(replace(case, workload=SMALL))
    small.reset()
    return build_rows(small.case, small)


def build_dense(
    case: Case, table: Table, *, build: Callable[[Case, Arrays], Run] = build_step
) -> Run:
    """Step a gradient of the whole table, written row by row: not zeroed, no row twice."""
    (g,) = table.g = [np.zeros_like(table.x[0])]
    gradients = cycle(table.gradients)
    last = []
    run = build(case, table)

    def step() -> None:
        nonlocal last
        g[last] = 0
        last, values = next(gradients)
        g[last] = values
        run.step()

    return Run(step, lambda: table.x, close=table.g.clear)


def subtract_at(x: np.ndarray, indices: np.ndarray, values: np.ndarray) -> None:
    np.subtract.at(x, indices, LR * values)


def subtract_sorted(x: np.ndarray, indices: np.ndarray, values: np.ndarray) -> None:
    order = np.argsort(indices, kind="stable")
    ordered = indices[order]
    starts = np.flatnonzero(np.diff(ordered, prepend=-1))
    x[ordered[starts]] -= LR * np.add.reduceat(values[order], starts)


def build_scatter(case: Case, table: Table, *, scatter: Callable[..., None]) -> Run:
    """Take steps of SGD: nobody's NumPy has momentum row by row."""
    sets = cycle(table.indices)
    return Run(
        lambda: scatter(table.x[0], next(sets), table.values), lambda: table.x,
        expected=table.after_two("sgd"), warm_up=len(table.indices),
    )


NUMPY = [Contender(LITERAL, build_literal), Contender(OUT, build_out, jobs=(*OUTS, PIPELINE))]

# The best level's name is that of the API alone, so that both suites and the targets share it.
ENGINE = NUMPY + [
    Contender(
        name + (f", {level}" if level != simd_levels_available()[-1] else ""),
        build, exact=True, level=level,
    )
    for level in simd_levels_available()
    for name, build in [(FUNCTION, build_function), (STEP, build_step)]
]

OPTCORE = [
    Contender(STEP, build_step, exact=True, threaded=True),
    Contender(STEP_LIST, build_step_list, exact=True, threaded=True),
    Contender(FUNCTION, build_function, workloads=is_vector, exact=True, threaded=True),
]
OPTCORE_ALONE = Contender(ALONE, build_alone, exact=True, threaded=True)
# Checked where it is the case: here its results are not the case's.
OPTCORE_WIDE = Contender(WIDE, build_wide, threaded=True, checked=False)

OUTERS = [
    Contender(OUTER_STEP, build_outer, jobs=(OUTER,), exact=True, threaded=True),
    Contender(OUTER_WEIGHTED, build_outer_weighted, jobs=(OUTER,), exact=True, threaded=True),
]
# On one thread also where others use all: a round of a server is what it is, and this its cost
NUMPY_OUTER = Contender(FLOWER, build_flower, jobs=(OUTER,), threaded=True)

OPTCORE_ROWS = [
    Contender(ROWS_EXACT, build_rows, jobs=(ROWS,), threaded=True),
    Contender(
        ROWS_LAZY, partial(build_rows, lazy="rows"), jobs=(ROWS,), exact=True, threaded=True
    ),
    Contender(
        ROWS_SMALL, build_rows_small, jobs=(ROWS,), workloads=lambda name: name != SMALL,
        threaded=True, checked=False,
    ),
]
OPTCORE_DENSE = Contender(
    ROWS_DENSE, build_dense, jobs=(ROWS,), workloads=WITH_DENSE.__contains__, exact=True,
    threaded=True,
)
NUMPY_ROWS = [
    Contender(f"NumPy, {name}, no momentum", partial(build_scatter, scatter=scatter), (ROWS,))
    for name, scatter in [("subtract.at", subtract_at), ("sorted", subtract_sorted)]
]
