"""Time the optimizer part of scikit-learn's perceptron: its own update against optcore's.

    python bench/sklearn_step.py [--threads N]

The layers hold a million parameters. Equality is asserted before anything is timed.
"""
from __future__ import annotations

import argparse
import timeit

import numpy as np
from samples import Sample, figure
from sklearn.neural_network import _stochastic_optimizers

import optcore
import optcore.sklearn

SHAPES = [(784, 800), (800, 450), (450, 10), (800,), (450,), (10,)]
TARGET = 2.0


def run(kind, start, grads, nesterov):
    params = [p.copy() for p in start]
    optimizer = kind(params, 0.001, nesterov=nesterov)
    for _ in range(3):
        optimizer.update_params(params, grads)
    seconds = timeit.repeat(lambda: optimizer.update_params(params, grads), number=5, repeat=30)
    return params, Sample.of(s / 5 * 1e6 for s in seconds)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    optcore.set_num_threads(parser.parse_args().threads)
    rng = np.random.default_rng(0)
    size = sum(int(np.prod(shape)) for shape in SHAPES)
    print(f"{size} parameters, {optcore.get_num_threads()} thread(s), µs per update")
    for dtype in ("float32", "float64"):
        start, grads = (
            [np.asarray(rng.standard_normal(shape), dtype) for shape in SHAPES] for _ in range(2)
        )
        for nesterov in (False, True):
            (a, theirs), (b, ours) = (
                run(kind, start, grads, nesterov)
                for kind in (_stochastic_optimizers.SGDOptimizer, optcore.sklearn.SGDOptimizer)
            )
            assert all(p.tobytes() == q.tobytes() for p, q in zip(a, b, strict=True))
            ratio = theirs.median / ours.median
            print(
                f"{dtype} {'nesterov' if nesterov else 'momentum'}: scikit-learn {figure(theirs)}, "
                f"optcore {figure(ours)}, {ratio:.1f}x"
                + ("" if ratio >= TARGET else f", target {TARGET:.0f}x missed")
            )


if __name__ == "__main__":
    main()
