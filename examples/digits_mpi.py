"""Train the digits network on several MPI ranks, state whole or sharded, and compare.

Every rank takes its share of each batch of examples/digits.py, the optimizer averages the
gradients, and one process takes the joined batch: all of them must reach the same accuracy, and
the ranks the same bits. The velocity that each rank keeps is measured and printed. Then every rank
takes H steps alone between averages of the parameters, and the bytes that this saves are counted.
Its accuracy, a mean over several seeds, must be in the band that those make of one process.

Run ``mpiexec -n 2 python -m mpi4py examples/digits_mpi.py`` after
``pip install 'optcore[demo,mpi]'``: so a rank that raises ends the others, too.
"""
from __future__ import annotations

import argparse
import functools
import hashlib
import sys
from collections.abc import Collection
from statistics import mean
from typing import Any

import numpy as np
from digits import MLP, MOMENTUM, RULES, digits

import optcore

try:
    from mpi4py import MPI

    from optcore.mpi import DataParallelSGD, LocalSGD, ShardedSGD
except ImportError as error:
    sys.exit(f"digits_mpi: {error}")

LR = RULES["momentum"][0]
BATCH = 64
# Steps of each rank to an outer step, and the options of that: the mean as it is, or with momentum.
LOCAL = {
    1: {"lr": 1.0},
    10: {"lr": 0.7, "momentum": 0.5, "nesterov": True},
    50: {"lr": 0.7, "momentum": 0.5, "nesterov": True},
}
# How often a buffer leaves a rank, but for its own share: Allreduce sends sums, then results.
PASSES = {"Allreduce": 2, "Reduce_scatter_block": 1, "Allgather": 1}


class Counted(MPI.Intracomm):
    """A communicator that counts what each rank has to send at least."""

    sent = 0

    def count(self, name: str, *buffers: Any) -> None:
        """Count one call, whose larger buffer is the whole; then make it."""
        whole = max(b.nbytes for b in buffers if isinstance(b, np.ndarray))
        self.sent += PASSES[name] * whole * (self.size - 1) // self.size
        getattr(MPI.Intracomm, name)(self, *buffers)


for _name in PASSES:
    setattr(Counted, _name, functools.partialmethod(Counted.count, _name))


def train(
    model: MLP, optimizer: optcore.SGD, data: tuple[np.ndarray, ...], epochs: int,
    seed: int, rank: int, size: int,
) -> float:
    """Train on this rank's share of every batch; return the test accuracy."""
    x, labels, x_test, labels_test = data
    rng = np.random.default_rng((1, seed))      # the same order on every rank
    for _ in range(epochs):
        order = rng.permutation(len(x))
        for start in range(0, len(x) - BATCH + 1, BATCH):
            rows = order[start + rank : start + BATCH : size]
            model.backward(x[rows], labels[rows])
            # a mean over ranks of means over their rows, which may not be equally many
            optimizer.step(weighted(model.grads, len(rows) * size / BATCH))
    if isinstance(optimizer, LocalSGD) and optimizer.inner_steps:
        optimizer.sync()
    return model.accuracy(x_test, labels_test)


def weighted(grads: list[np.ndarray], weight: float) -> list[np.ndarray]:
    """Return gradients of a share of the batch with the weight of that share."""
    if weight != 1:
        for g in grads:
            g *= np.float32(weight)
    return grads


def main() -> int:
    """Run the example on this rank; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--hidden", type=int, nargs="+", default=[256])
    parser.add_argument("--least-accuracy", type=float, default=0.96)
    parser.add_argument("--seeds", type=int, default=5, help="of weights and orders")
    args = parser.parse_args()
    comm = Counted(MPI.COMM_WORLD)
    data = digits(seed=0)

    def trained(kind: type[optcore.SGD], every: int, seed: int) -> tuple[float, Any, MLP]:
        model = MLP([64, *args.hidden, 10], np.random.default_rng((0, seed)))
        ranks: tuple[Any, ...] = (comm,)
        options: dict[str, Any] = {"lr": LR, "momentum": MOMENTUM}
        if kind is optcore.SGD:     # one process, with the whole batch
            ranks = ()
        elif kind is LocalSGD:
            inner = optcore.SGD(model.params, **options)
            options = {**LOCAL[every], "inner": inner, "sync_every": every}
        optimizer = kind(model.params, *ranks, **options)
        place = (comm.rank, comm.size) if ranks else (0, 1)
        return train(model, optimizer, data, args.epochs, seed, *place), optimizer, model

    mine = {seed: trained(optcore.SGD, 0, seed)[0]
            for seed in range(comm.rank, args.seeds, comm.size)}
    single = {seed: accuracy for part in comm.allgather(mine) for seed, accuracy in part.items()}
    if comm.rank == 0:
        print(f"one process: accuracy {said(single.values())}", flush=True)
    failed = min(single.values()) < args.least_accuracy
    for kind, every in [(DataParallelSGD, 0), (ShardedSGD, 0), *((LocalSGD, h) for h in LOCAL)]:
        accuracies, alike = {}, True
        for seed in single if every > 1 else [0]:
            comm.sent = 0
            accuracies[seed], optimizer, model = trained(kind, every, seed)
            sent = comm.sent
            bits = hashlib.sha256(b"".join(p.tobytes() for p in model.params)).hexdigest()
            alike &= len(set(comm.allgather(bits))) == 1
        image = 1 / len(data[2])
        if every > 1:
            close = mean(accuracies.values()) > min(single.values()) - 0.5 * image
        else:       # the same mathematics; an image may fall the other way, for sums round
            close = abs(accuracies[0] - single[0]) < 1.5 * image
        failed |= not (alike and close)
        velocities = comm.allgather(optimizer.state_nbytes)
        whole = sum(p.nbytes for p in model.params)
        if comm.rank == 0:
            print(
                f"{kind.__name__}{f' every {every} steps' * bool(every)} on {comm.size} ranks: "
                f"accuracy {said(accuracies.values())}{'' if close else ', OUT OF THE BAND'}, "
                "velocity " + ", ".join(f"{v:,} ({v / whole:.1%})" for v in velocities)
                + f" bytes a rank, {'the same bits' if alike else 'OTHER BITS'} on all, "
                f"{sent:,} bytes sent by each",
                flush=True,
            )
    return int(failed)


def said(accuracies: Collection[float]) -> str:
    """Return accuracies over seeds in words."""
    low, high = min(accuracies), max(accuracies)
    return f"{mean(accuracies):.2%}" + (f" ({low:.2%} to {high:.2%})" if low < high else "")


if __name__ == "__main__":
    sys.exit(main())
