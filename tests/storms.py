"""Storms of calls from eight threads, which nothing but refusals may come of.

``python tests/storms.py [SECONDS]`` runs each for so long, under ThreadSanitizer for one;
`test_storms.py` runs them for a moment.
"""
from __future__ import annotations

import copy
import random
import sys
import tempfile
from pathlib import Path

import numpy as np
from test_exclusive import Shared, after, alternating, at_once, meddlers

import optcore

THREADS = 8


def own_optimizers(seconds):
    """Each thread has its own arrays and steps them in every way; all have the same bits."""
    def work(n_steps):
        rng = np.random.default_rng(1)

        def draw():
            return [rng.standard_normal(n).astype(np.float32) for n in (1, 300, 9000)]

        params, velocity = draw(), np.zeros(300, np.float32)
        opt = optcore.SGD(params, lr=lambda step: 0.1, momentum=0.9, nesterov=True, max_norm=1.0,
                          ema_decay=0.9, skip_nonfinite=True, grads=draw())
        others = draw()
        pieces = optcore.SGD(others, lr=0.1, momentum=0.9)
        for _ in range(n_steps):
            opt.accumulate(draw())
            opt.step(grad_scale=0.5, zero_grad=True)
            opt.step_replicas([draw(), draw()], weights=[1, 2])
            opt.step([None, *draw()[1:]])
            optcore.momentum_step(params[1], draw()[1], velocity, lr=0.1, momentum=0.9)
            opt.outer_step([draw(), draw()], weights=[1, 2])
            with opt.collecting() as mean:
                mean.add(draw(), 3)
                mean.add(draw(), 1)
            with pieces.accumulating() as micro:
                micro.add(draw())
                micro.add(draw())
            with pieces.stepping() as part:
                part.step(1, draw()[1])
                part.step({0: draw()[0], 2: draw()[2]})
        return b"".join(a.tobytes() for a in (*params, *opt.ema, velocity, *others))

    expected = work(5)

    def body():
        assert work(5) == expected

    return at_once(*[body] * THREADS, until=after(seconds))


def one_optimizer(seconds):
    """All threads call one optimizer in every way; each array is what NumPy has after its steps."""
    shared = Shared(1 << 13, track_grad_norm=True, skip_nonfinite=True)
    with tempfile.TemporaryDirectory() as folder:
        calls = meddlers(shared, Path(folder))
        errors = at_once(*[shared.step, shared.step_replicas] * 4, *calls.values(),
                         *[lambda: look(shared.opt)] * 2, until=after(seconds))
    shared.check()
    return errors


def look(opt):
    """Read what may be read in the middle of a step."""
    assert opt.step_count >= 0
    assert opt.skipped == 0
    grad_norm = opt.grad_norm       # once: a load may come between two
    assert grad_norm is None or grad_norm >= 0
    assert opt.nonfinite_params == []
    assert len(opt.ema) == sum(len(group["params"]) for group in opt.param_groups)
    assert repr(opt).count("group ") == len(opt.param_groups)


def settings(seconds):
    """The process's settings change beside steps; the bits do not."""
    x, g = np.zeros(1 << 17, np.float32), np.ones(1 << 17, np.float32)
    opt = optcore.SGD(x, lr=1.0)

    def step():
        opt.step(g)

    def step_alone():
        y = np.zeros(100, np.float32)
        optcore.sgd_step(y, g[:100], lr=0.5)
        assert (y == -0.5).all()

    def set_threads():
        optcore.set_num_threads(random.choice([1, 2, 3, None]))
        assert optcore.get_num_threads() > 0

    def show():
        assert optcore.show_config("dicts")["simd used"]

    errors = at_once(step, step, step_alone, step_alone, set_threads, set_threads, show, show,
                     until=after(seconds))
    optcore.set_num_threads(None)
    assert (x == -opt.step_count).all()
    return errors


def edited_groups(seconds):
    """Group dictionaries, and containers of gradients, that other threads edit."""
    n = 1 << 12
    x, grads = np.zeros(n, np.float32), {"w": np.ones(n, np.float32)}
    opt = optcore.SGD({"w": x}, lr=1.0, grads=grads)
    others = [np.ones(n, np.float32), grads["w"]]
    group = opt.param_groups[0]

    def note():
        group["name"] = f"name {random.randrange(100)}"
        group.pop("initial_lr", None)
        group["initial_lr"] = 1.0

    def rebind():
        grads["w"] = random.choice(others)

    errors = at_once(opt.step, opt.step, opt.step, note, note, rebind,
                     alternating(opt, "lr", 1.0, np.float64(1)),
                     alternating(opt, "clip_value", None, 5.0), until=after(seconds))
    assert (x == -opt.step_count).all()
    return errors


def growing(seconds):
    """Groups are added beside steps, and every parameter takes all steps from then on."""
    params = [np.zeros(100, np.float32)]
    opt = optcore.SGD(params[:1], lr=1.0, momentum=0.0, grads=[np.ones(100, np.float32)])
    taken = []

    def grow():
        if len(taken) < 30:
            param = np.zeros(100, np.float32)
            opt.add_param_group({"params": [param]}, grads=[np.ones(100, np.float32)])
            taken.append(param)

    def copy():
        """What a copy is made from is of one moment; the arrays are copied where none steps."""
        state = opt.__reduce__()[2]
        assert len(state["given"]) == len(state["groups"])

    errors = at_once(opt.step, opt.step, opt.step, grow, grow, opt.state_dict, copy,
                     lambda: opt.grad_norm, lambda: opt.ema, until=after(seconds))
    counts = [-param[0] for param in (*params, *taken)]
    assert counts[0] == opt.step_count
    assert all((param == param[0]).all() for param in taken)
    assert len(opt.param_groups) == 1 + len(taken)
    return errors


def rows(seconds):
    """Steps of the same rows, and of none, while others bring all up to date."""
    def model():
        params = [np.ones((300, 5)), np.ones(700)]
        opt = optcore.SGD(params, lr=lambda step: 0.1 / (1 + step // 8), momentum=0.5)
        opt.step([np.ones_like(p) for p in params])
        return params, opt

    params, opt = model()
    touched = optcore.Rows([299, 0, 0], np.ones((3, 5))), optcore.Rows([1, 698], np.ones(2))

    def step():
        opt.step(touched)

    def step_in_pieces():
        with opt.stepping() as part:
            part.step({0: touched[0], 1: touched[1]})

    errors = at_once(
        step, step, step, step_in_pieces, opt.catch_up, opt.state_dict,
        lambda: opt.catch_up(0, [[1, 2], [299, 5]]), lambda: copy.deepcopy(opt),
        until=after(seconds))
    opt.catch_up()
    others, twin = model()
    dense = [np.zeros_like(p) for p in params]
    for g, r in zip(dense, touched, strict=True):
        np.add.at(g, r.indices, r.values)
    while twin.step_count < opt.step_count:
        twin.step(dense)
    for p, q, r in zip(params, others, touched, strict=True):
        assert (p[r.indices] == q[r.indices]).all()
        assert np.allclose(p, q, rtol=1e-12, atol=0)
    return errors


STORMS = [own_optimizers, one_optimizer, settings, edited_groups, growing, rows]


if __name__ == "__main__":
    for storm in STORMS:
        errors = storm(float(sys.argv[1]) if len(sys.argv) > 1 else 5)
        assert not errors, (storm.__name__, errors)
        print("storm passed:", storm.__name__, flush=True)
