"""Threaded steps of every kind, for sanitize.sh to watch."""
from __future__ import annotations

import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

import optcore
from optcore.runtime import always_threaded

SIZES = [1, 255, 40_000, 8193, 3, 16_384]


def work(seed):
    """Step, accumulate and average in every way there is."""
    rng = np.random.default_rng(seed)

    def draw():
        return [rng.standard_normal(n).astype(np.float32) for n in SIZES]

    opt = optcore.SGD(draw(), lr=0.1, momentum=0.9, nesterov=True, max_norm=1.0, ema_decay=0.9,
                      skip_nonfinite=True, grads=draw())
    doubles = optcore.SGD({str(n): rng.standard_normal(n) for n in SIZES}, lr=0.1, momentum=0.9,
                          dampening=0.5, weight_decay=0.01, clip_value=1.0, flush_subnormals=True)
    others = optcore.SGD([
        {"params": draw(), "lr_in_velocity": True, "momentum": 0.5},
        {"params": draw(), "weight_decay": 0.1, "decoupled_weight_decay": True, "maximize": True},
    ], lr=0.1)
    halves = [
        optcore.SGD([a.astype(np.float16) for a in draw()], lr=0.1, master=master, momentum=0.9,
                    velocity_dtype="bfloat16", max_norm=1.0, ema_decay=0.9)
        for master in (None, "float32")
    ] + [
        optcore.SGD([a.view(np.uint16)[::2].copy().view(optcore.bfloat16) for a in draw()], lr=0.1)
    ]
    for _ in range(10):
        for half in halves:
            half.step_replicas([draw(), [a.astype(np.float16) for a in draw()]])
        doubles.step({str(n): rng.standard_normal(n) for n in SIZES})
        others.step(draw() + draw())
        opt.accumulate(draw())
        opt.step(grad_scale=0.5, zero_grad=True)
        opt.step_replicas([draw(), draw(), draw()])
        opt.step([*draw()[:2], None, *draw()[3:]])
        bad = draw()
        bad[2][5] = np.nan
        opt.step(bad, zero_grad=True)
        x = rng.standard_normal(100_000).astype(np.float32)
        optcore.momentum_step(x, x.copy(), x.copy(), lr=0.1, momentum=0.9)
        optcore.nesterov_step(x, x.copy(), x.copy(), lr=0.1, momentum=0.9)
        optcore.sgd_step(x, x.copy(), lr=0.1, weight_decay=0.1)
    with tempfile.TemporaryDirectory() as folder:
        for k, saved in enumerate((opt, doubles, others, *halves)):
            saved.save(Path(folder, str(k)), include_params=True)
            saved.restore(Path(folder, str(k)))


optcore.set_num_threads(3)
with always_threaded(), ThreadPoolExecutor(2) as pool:
    list(pool.map(work, range(2)))      # raises what they have raised
print("all steps done, OpenMP", optcore.show_config("dicts")["openmp"])
