"""Threaded steps of every kind, for sanitize.sh to watch."""
from __future__ import annotations

import threading

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
    for _ in range(10):
        opt.accumulate(draw())
        opt.step(grad_scale=0.5, zero_grad=True)
        opt.step_replicas([draw(), draw(), draw()])
        opt.step([*draw()[:2], None, *draw()[3:]])
        bad = draw()
        bad[2][5] = np.nan
        opt.step(bad, zero_grad=True)
        x = rng.standard_normal(100_000).astype(np.float32)
        optcore.momentum_step(x, x.copy(), x.copy(), lr=0.1, momentum=0.9)


optcore.set_num_threads(3)
with always_threaded():
    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
print("all steps done, OpenMP", optcore.show_config("dicts")["openmp"])
