"""Train the digits network on several MPI ranks, state whole or sharded, and compare.

Every rank takes its share of each batch of examples/digits.py, the optimizer averages the
gradients, and one process takes the joined batch: all of them must reach the same accuracy, and
the ranks the same bits. The velocity that each rank keeps is measured and printed.

Run ``mpiexec -n 2 python -m mpi4py examples/digits_mpi.py`` after
``pip install 'optcore[demo,mpi]'``: so a rank that raises ends the others, too.
"""
from __future__ import annotations

import argparse
import hashlib
import sys

import numpy as np
from digits import MLP, MOMENTUM, RULES, digits

import optcore

try:
    from mpi4py import MPI

    from optcore.mpi import DataParallelSGD, ShardedSGD
except ImportError as error:
    sys.exit(f"digits_mpi: {error}")

LR = RULES["momentum"][0]
BATCH = 64


def train(
    model: MLP, optimizer: optcore.SGD, data: tuple[np.ndarray, ...], epochs: int,
    rank: int, size: int,
) -> float:
    """Train on this rank's share of every batch; return the test accuracy."""
    x, labels, x_test, labels_test = data
    rng = np.random.default_rng(1)              # the same order on every rank
    for _ in range(epochs):
        order = rng.permutation(len(x))
        for start in range(0, len(x) - BATCH + 1, BATCH):
            rows = order[start + rank : start + BATCH : size]
            model.backward(x[rows], labels[rows])
            # a mean over ranks of means over their rows, which may not be equally many
            optimizer.step(weighted(model.grads, len(rows) * size / BATCH))
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
    args = parser.parse_args()
    comm = MPI.COMM_WORLD
    data = digits(seed=0)

    def network() -> MLP:
        return MLP([64, *args.hidden, 10], np.random.default_rng(0))

    model = network()
    single = train(model, optcore.SGD(model.params, lr=LR, momentum=MOMENTUM),
                   data, args.epochs, 0, 1)
    whole = sum(p.nbytes for p in model.params)
    if comm.rank == 0:
        print(f"one process: accuracy {single:.2%}, velocity {whole:,} bytes", flush=True)
    failed = single < args.least_accuracy
    for kind in (DataParallelSGD, ShardedSGD):
        model = network()
        optimizer = kind(model.params, comm, lr=LR, momentum=MOMENTUM)
        accuracy = train(model, optimizer, data, args.epochs, comm.rank, comm.size)
        bits = hashlib.sha256(b"".join(p.tobytes() for p in model.params)).hexdigest()
        alike = len(set(comm.allgather(bits))) == 1
        velocities = comm.allgather(optimizer.state_nbytes)
        # one test image may fall the other way where sums were taken in another order
        failed |= not alike or abs(accuracy - single) > 1.5 / len(data[2])
        if comm.rank == 0:
            print(
                f"{kind.__name__} on {comm.size} ranks: accuracy {accuracy:.2%}, velocity "
                + ", ".join(f"{v:,} ({v / whole:.1%})" for v in velocities)
                + f" bytes a rank, {'the same bits' if alike else 'OTHER BITS'} on all",
                flush=True,
            )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
