"""Other optimizers, each the fastest way its documentation offers; absent ones say so."""
from __future__ import annotations

import importlib
import importlib.metadata
import os
import shutil
from collections.abc import Callable
from functools import cache, partial
from itertools import count, cycle
from typing import Any

import numpy as np
from apart import build_apart
from cases import (
    BETA1,
    BETA2,
    EMA_DECAY,
    EPS,
    HALF,
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
    kept_in,
)
from contenders import LIMIT, Contender, build_dense
from limit import NoCompilerError, compiler
from tables import WITH_DENSE, Table

import reference

# Modules a peer needs, and the distributions whose versions a report gives.
MODULES = {
    "PyTorch": ["torch"], "Numba": ["numba"], "JAX": ["jax", "optax"], "BLAS": ["scipy"],
    "DeepSpeed": ["deepspeed"],
}
# What those step that are written here for several rules
JOBS = ("sgd", "momentum", "nesterov", "adam", PIPELINE)


def missing(modules: list[str]) -> list[str]:
    """Return those that cannot be imported."""
    absent = []
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError:
            absent.append(module)
    return absent


def measured_in(suite: str) -> list[str]:
    """Return the peers of a suite, and what has to be compiled for it."""
    few = suite in ("storage", "outer", "rows")
    return ["PyTorch", LIMIT] if few else [*MODULES, LIMIT, COMPILED]


def versions(suite: str = "peers") -> dict[str, str]:
    """Return the version of the distribution of every peer of a suite, or "absent"."""
    found = {}
    for module in sorted({m for name in measured_in(suite) for m in MODULES.get(name, ())}):
        try:
            found[module] = importlib.metadata.version(module)
        except importlib.metadata.PackageNotFoundError:
            found[module] = "absent"
    return found


# PyTorch

def _tensor(a: np.ndarray) -> Any:
    import torch

    if reference.type_name(a) == "bfloat16":
        return torch.from_numpy(a.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(a)


def rounded_in_each(case: Case, x: np.ndarray, g: np.ndarray) -> np.ndarray:
    """Return the parameters of half types after two steps whose every operation is rounded.

    PyTorch rounds also the learning rate, and foreach the momentum: some results are the next.
    """
    def near(values: np.ndarray) -> np.ndarray:
        return reference.widened(kept_in(case.stored.same, values))

    o = case.options
    x, g = reference.widened(x), reference.widened(g)
    v = g
    for step in range(2):
        if case.rule.has_momentum and step:
            v = near(near(np.float32(o.momentum) * v) + g)
        x = near(x - np.float32(o.lr) * v)
    return kept_in(case.stored.same, x)


def torch_params(arrays: Arrays) -> list[Any]:
    """Return parameters with their gradients, on the arrays' memory."""
    params = [_tensor(x).requires_grad_() for x in arrays.x]
    for param, g in zip(params, arrays.g, strict=True):
        param.grad = _tensor(g)
    return params


# Of those that are called as torch.optim.Adam is
ADAM_OPTIONS = {"lr": LR, "betas": (BETA1, BETA2), "eps": EPS}


def torch_optimizer(case: Case, params: list[Any], implementation: str | None) -> Any:
    import torch

    how = {
        "foreach": implementation in ("foreach", "compiled"), "fused": implementation == "fused"
    }
    if case.job == "adam":
        return torch.optim.Adam(params, **ADAM_OPTIONS, **how)
    return torch.optim.SGD(
        params, lr=LR, momentum=MOMENTUM if case.rule.has_momentum else 0,
        nesterov=case.rule.name == "nesterov",
        weight_decay=WEIGHT_DECAY if case.pipeline else 0, **how,
    )


def build_torch(case: Case, arrays: Arrays, *, implementation: str | None) -> Run:
    import torch
    from torch.optim.swa_utils import get_ema_multi_avg_fn

    params = torch_params(arrays)
    opt = torch_optimizer(case, params, implementation)
    if implementation == "compiled":
        torch.set_num_threads(case.threads)
        for param in params if case.rule.has_momentum else ():
            # The first step, which makes it, would be compiled apart
            opt.state[param]["momentum_buffer"] = torch.zeros_like(param)
        return Run(torch.compile(opt.step), lambda: arrays.x)
    if not case.pipeline:
        expected = None
        if case.stored.same in reference.FRACTION_BITS:
            expected = rounded_in_each(case, **arrays.pattern)
        return Run(opt.step, lambda: arrays.x, expected=expected)
    averages = [param.detach().clone() for param in params]
    average = get_ema_multi_avg_fn(EMA_DECAY)
    clip = partial(
        torch.nn.utils.clip_grad_norm_, params, MAX_NORM, foreach=implementation is not None
    )

    def step() -> None:
        clip()
        opt.step()
        average(averages, params, None)
        opt.zero_grad(set_to_none=False)

    return Run(step, lambda: arrays.x, lambda: [e.numpy() for e in averages])


def build_torch_outer(case: Case, arrays: Arrays, *, stacked: bool) -> Run:
    """Average, subtract, step and copy back; the fused step, and as few passes as PyTorch needs."""
    import torch

    params = [_tensor(x).requires_grad_() for x in arrays.x]
    replicas = [[_tensor(p) for p in replica] for replica in arrays.sets]
    for param in params:
        param.grad = torch.empty_like(param)
    opt = torch.optim.SGD(params, lr=OUTER_LR, momentum=MOMENTUM, nesterov=True, fused=True)

    @torch.no_grad()
    def step() -> None:
        for param, *theirs in zip(params, *replicas, strict=True):
            d = param.grad
            if stacked:
                torch.sub(param, torch.stack(theirs).mean(0), out=d)
                continue
            d.copy_(theirs[0])
            for p in theirs[1:]:
                d.add_(p)
            torch.sub(param, d, alpha=1 / len(theirs), out=d)
        opt.step()
        if case.replicas.write_back:
            for replica in replicas:
                for p, param in zip(replica, params, strict=True):
                    p.copy_(param)

    return Run(step, lambda: arrays.x)


def build_torch_sparse(case: Case, table: Table) -> Run:
    """Step sparse gradients, made of their parts each time as the backward pass makes them."""
    import torch

    (param,) = params = [_tensor(x).requires_grad_() for x in table.x]
    opt = torch.optim.SGD(params, lr=LR)
    values = _tensor(table.values)
    sets = cycle([_tensor(indices)[None] for indices in table.indices])

    def step() -> None:
        param.grad = torch.sparse_coo_tensor(
            next(sets), values, param.shape, check_invariants=False
        )
        opt.step()

    return Run(
        step, lambda: table.x, expected=table.after_two("sgd"), warm_up=len(table.indices)
    )


# torch.compile recompiles for each optimizer, and after eight goes on without: a process each.
# That takes ten seconds for a vector, half a minute for ResNet-50 and minutes for 1000 tensors, so
# that few cases have it.

COMPILED = "PyTorch, compiled"
COMPILED_FOR = ("1e6", "5e7", "ResNet-50")


def cxx() -> str:
    """Return the name of the C++ compiler that torch.compile takes, or raise `NoCompilerError`."""
    name = os.environ.get("CXX", "g++")
    if shutil.which(name) is None:
        raise NoCompilerError(f"no C++ compiler named {name} for torch.compile")
    return name


def build_compiled(case: Case, arrays: Arrays) -> Run:
    cxx()
    return build_apart(case, arrays, build=_compiled)


_compiled = partial(build_torch, implementation="compiled")


# Numba: one fused loop a tensor, as one writes it by hand; the threaded form where it pays.

NUMBA_THREADED_FROM = 100_000


@cache
def numba_loops(*, parallel: bool) -> dict[str, Callable[..., object]]:
    from numba import njit, prange

    # By Python's error model a division asks for zero first, and its loop is not vectorized.
    compiled = njit(fastmath=True, parallel=parallel, nogil=True, error_model="numpy")

    @compiled
    def sgd(x, g, lr):
        for i in prange(x.size):
            x[i] -= lr * g[i]

    @compiled
    def momentum(x, g, v, lr, rho):
        for i in prange(x.size):
            v[i] = rho * v[i] + g[i]
            x[i] -= lr * v[i]

    @compiled
    def nesterov(x, g, v, lr, rho):
        for i in prange(x.size):
            v[i] = rho * v[i] + g[i]
            x[i] -= lr * (g[i] + rho * v[i])

    @compiled
    def adam(x, g, m, v, beta1, keep1, beta2, keep2, eps, rate, root):
        for i in prange(x.size):
            m[i] = beta1 * m[i] + keep1 * g[i]
            v[i] = beta2 * v[i] + keep2 * g[i] * g[i]
            x[i] -= rate * m[i] / (root * np.sqrt(v[i]) + eps)

    @compiled
    def squares(g):
        total = 0.0
        for i in prange(g.size):
            total += g[i] * g[i]
        return total

    @compiled
    def pipeline(x, g, v, e, lr, rho, scale, decay, keep, blend):
        for i in prange(x.size):
            d = scale * g[i] + decay * x[i]
            v[i] = rho * v[i] + d
            x[i] -= lr * (d + rho * v[i])
            e[i] = keep * e[i] + blend * x[i]
            g[i] = 0

    return {f.__name__: f for f in (sgd, momentum, nesterov, adam, squares, pipeline)}


def build_numba(case: Case, arrays: Arrays) -> Run:
    number = np.dtype(case.dtype).type
    averages = [arrays.copies()] if case.pipeline else []
    loops, rows = [], []
    for tensor in zip(arrays.x, arrays.g, *arrays.states(), *averages, strict=True):
        loops.append(numba_loops(
            parallel=case.threads > 1 and tensor[0].size >= NUMBA_THREADED_FROM
        ))
        rows.append([a.reshape(-1) for a in tensor])
    scalars = [number(LR)] + [number(MOMENTUM)] * case.rule.has_momentum
    calls = [
        (loop["pipeline" if case.pipeline else case.rule.name], row)
        for loop, row in zip(loops, rows, strict=True)
    ]
    if case.job == "adam":
        scalars = [number(o) for o in (BETA1, 1 - BETA1, BETA2, 1 - BETA2, EPS)]
        steps = count(1)

        def step() -> None:
            t = next(steps)
            rate, root = number(LR / (1 - BETA1**t)), number((1 - BETA2**t) ** -0.5)
            for loop, row in calls:
                loop(*row, *scalars, rate, root)

        return Run(step, lambda: arrays.x)
    if not case.pipeline:
        def step() -> None:
            for loop, row in calls:
                loop(*row, *scalars)

        return Run(step, lambda: arrays.x)

    norms = [(loop["squares"], row[1]) for loop, row in zip(loops, rows, strict=True)]
    blend = [number(WEIGHT_DECAY), number(EMA_DECAY), number(1 - EMA_DECAY)]

    def step() -> None:
        norm = np.sqrt(sum([loop(g) for loop, g in norms]))
        scale = number(min(1.0, MAX_NORM / (norm + 1e-6)))
        for loop, row in calls:
            loop(*row, *scalars, scale, *blend)

    return Run(step, lambda: arrays.x, lambda: averages[0])


# JAX and optax: donated arrays, so that XLA may update them in place. They are JAX's own.

@cache
def jax_step(job: str) -> tuple[Callable[..., object], Callable[..., object]]:
    import jax
    import jax.numpy as jnp
    import optax

    case = Case(job, "1")
    rule = optax.adam(LR, b1=BETA1, b2=BETA2, eps=EPS) if job == "adam" else optax.sgd(
        LR, momentum=MOMENTUM if case.rule.has_momentum else None,
        nesterov=case.rule.name == "nesterov",
    )
    if case.pipeline:
        rule = optax.chain(
            optax.clip_by_global_norm(MAX_NORM), optax.add_decayed_weights(WEIGHT_DECAY), rule
        )

    def step(params, grads, state, averages):
        updates, state = rule.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        if case.pipeline:
            averages = optax.incremental_update(params, averages, 1 - EMA_DECAY)
            grads = jax.tree.map(jnp.zeros_like, grads)
        return params, grads, state, averages

    return rule.init, jax.jit(step, donate_argnums=(0, 1, 2, 3))


def build_jax(case: Case, arrays: Arrays) -> Run:
    import jax
    import jax.numpy as jnp

    init, step = jax_step(case.job)
    copies = [[jnp.array(a) for a in arrays_] for arrays_ in (arrays.x, arrays.g)]
    averages = [jnp.array(a) for a in arrays.x] if case.pipeline else []
    held = [*copies, init(copies[0]), averages]

    def run() -> None:
        held[:] = step(*held)
        jax.block_until_ready(held)

    return Run(run, lambda: held[0], lambda: held[3])


# BLAS

def build_axpy(case: Case, arrays: Arrays) -> Run:
    from scipy.linalg.blas import saxpy

    pairs = [(g.reshape(-1), x.reshape(-1)) for g, x in zip(arrays.g, arrays.x, strict=True)]

    def step() -> None:
        for g, x in pairs:
            saxpy(g, x, a=-LR)

    return Run(step, lambda: arrays.x)


# DeepSpeed: its Adam for parameters offloaded to the CPU, which it compiles here.

DEEPSPEED = "DeepSpeed, CPU Adam"


@cache
def unbuilt() -> list[str]:
    """Return what DeepSpeed lacks to step on the CPU, having built it."""
    from deepspeed.ops.op_builder import CPUAdamBuilder

    try:
        CPUAdamBuilder().load()
    except Exception:       # whatever its builder, PyTorch's or a compiler says
        return ["a build of its CPU Adam"]
    return []


def build_deepspeed(case: Case, arrays: Arrays) -> Run:
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    opt = DeepSpeedCPUAdam(torch_params(arrays), **ADAM_OPTIONS, adamw_mode=False)
    return Run(opt.step, lambda: arrays.x)


# Which of PyTorch's steps of half types are measured, if they are right
HALVES = ("PyTorch, for-loop", "PyTorch, foreach", "PyTorch, fused")

_CANDIDATES = {
    "PyTorch": [
        *[
            Contender(
                f"PyTorch, {name or 'for-loop'}", partial(build_torch, implementation=name),
                jobs=JOBS, threaded=True,
            )
            for name in (None, "foreach", "fused")
        ],
        Contender(
            COMPILED, build_compiled, jobs=("sgd", "momentum"), threaded=True,
            workloads=COMPILED_FOR.__contains__, checked=False,
        ),
    ],
    "Numba": [Contender("Numba, fastmath", build_numba, jobs=JOBS, threaded=True)],
    "JAX": [Contender("JAX + optax, donated", build_jax, jobs=JOBS, threaded=True)],
    "BLAS": [Contender("BLAS saxpy", build_axpy, jobs=("sgd",), threaded=True)],
    "DeepSpeed": [Contender(DEEPSPEED, build_deepspeed, jobs=("adam",), threaded=True)],
}
NAMES = [contender.name for group in _CANDIDATES.values() for contender in group]
OUTERS = [
    Contender(
        f"PyTorch, {name}", partial(build_torch_outer, stacked=name == "stacked"), jobs=(OUTER,),
        threaded=True,
    )
    for name in ("stacked", "in place")
]
IN_ROWS = [
    Contender(
        "PyTorch, sparse, no momentum", build_torch_sparse, jobs=(ROWS,), threaded=True
    ),
    Contender(
        "PyTorch, dense",
        partial(build_dense, build=partial(build_torch, implementation="fused")), jobs=(ROWS,),
        workloads=WITH_DENSE.__contains__, threaded=True,
    ),
]


def lacking(peer: str) -> list[str]:
    """Return the modules that a peer needs and are not here, or else what did not build."""
    return missing(MODULES[peer]) or (unbuilt() if peer == "DeepSpeed" else [])


def with_torch(contenders: list[Contender]) -> list[Contender]:
    """Return peers that are all PyTorch's where it can be measured here, and else none."""
    return [] if missing(MODULES["PyTorch"]) else contenders


def installed() -> list[Contender]:
    """Return the peers that can be measured here."""
    return [
        contender
        for peer, contenders in _CANDIDATES.items() if not lacking(peer)
        for contender in contenders
    ]


def wrong() -> list[str]:
    """Return which steps of bfloat16 are not what their roundings make of them."""
    case = Case("momentum", "1e4", storage=HALF)
    found = []
    for contender in installed():
        if contender.name in HALVES:
            arrays = Arrays(case)
            arrays.reset()
            try:
                arrays.check(contender.build(case, arrays), exact=False)
            except AssertionError:
                found.append(contender.name)
    return found


def absent(suite: str = "peers") -> dict[str, list[str]]:
    """Return what of a suite cannot be measured, and what each lacks."""
    names = measured_in(suite)
    lacks = {peer: lacking(peer) for peer in MODULES if peer in names}
    for name, language, find in [(LIMIT, "C", compiler), (COMPILED, "C++", cxx)]:
        try:
            find()
        except NoCompilerError:
            lacks[name] = [f"a {language} compiler"]
    return {name: things for name, things in lacks.items() if things and name in names}


def set_threads(n: int) -> None:
    """Give every peer that can be told `n` threads.

    JAX and DeepSpeed's OpenMP are told before they start, by run.py.
    """
    if not missing(["torch"]):
        import torch

        torch.set_num_threads(n)
    if not missing(["numba"]):
        import numba

        numba.set_num_threads(min(n, numba.config.NUMBA_NUM_THREADS))
    if not missing(["scipy", "threadpoolctl"]):
        import scipy.linalg.blas  # noqa: F401  loads the BLAS that is to be limited
        import threadpoolctl

        threadpoolctl.threadpool_limits(n, user_api="blas")
