"""Train a small PyTorch network on several processes that meet only every few steps (DiLoCo).

Each rank takes inner steps of AdamW with its share of every batch. Then gloo adds up the ranks'
parameters, and optcore takes the outer step towards their mean, Nesterov's, on the tensors' own
memory: what a rank keeps besides its model and AdamW's state is the outer x and its velocity.

Run ``python examples/diloco_torch.py --ranks 2``; it needs PyTorch and scikit-learn, which has
the digits. Between machines, run the same `train` under torchrun.
"""
from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.multiprocessing.spawn import start_processes

import optcore

BATCH = 64
OUTER = {"lr": 0.7, "momentum": 0.9, "nesterov": True}


def inner_optimizer(params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Return what each rank steps with by itself; optcore.torch.SGD is one, too."""
    return torch.optim.AdamW(params, lr=0.002)


def digits(seed: int) -> tuple[torch.Tensor, ...]:
    """Return training images and labels, test images and labels."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    x = torch.tensor(images, dtype=torch.float32)[order].reshape(-1, 1, 8, 8) / 16
    y = torch.tensor(labels)[order]
    return x[360:], y[360:], x[:360], y[:360]


def flattened(model: nn.Module) -> torch.Tensor:
    """Move a model's parameters into one tensor, which they become views of, and return it."""
    params = list(model.parameters())
    flat = torch.cat([p.detach().flatten() for p in params])
    for p, part in zip(params, torch.split(flat, [p.numel() for p in params]), strict=True):
        p.data = part.view_as(p)
    return flat


def train(
    seed: int, rounds: int, inner_steps: int, outer: dict[str, Any] | None = OUTER,
) -> tuple[torch.Tensor, float]:
    """Train on this rank's share or, without `outer`, alone; return parameters and accuracy."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if outer else (0, 1)
    x, y, x_test, y_test = digits(seed)
    torch.manual_seed(seed)                     # the same start and batches on every rank
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(32 * 4 * 4, 10),
    )
    flat = flattened(model)
    inner = inner_optimizer(model.parameters())
    slow = optcore.SGD(flat.clone(), **outer) if outer else None
    for _ in range(rounds):
        for _ in range(inner_steps):
            rows = torch.randint(len(x), (BATCH,))[rank::size]
            inner.zero_grad()
            loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
            loss.backward()  # type: ignore[no-untyped-call]
            inner.step()
        if slow is not None:
            dist.all_reduce(flat)               # all that is sent
            flat /= size
            slow.outer_step([flat], write_back=True)    # the new x, and the model's
    return flat, (model(x_test).argmax(1) == y_test).float().mean().item()


def run_rank(rank: int, store: str, args: argparse.Namespace) -> None:
    """Train as one of the ranks; rank 0 reports."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank,
                            world_size=args.ranks, timeout=timedelta(seconds=60))
    try:
        flat, accuracy = train(args.seed, args.rounds, args.inner_steps)
        first = flat.clone()
        dist.broadcast(first, 0)
    finally:
        dist.destroy_process_group()
    assert torch.equal(flat, first), "the ranks parted"
    if rank == 0:
        print(f"{args.ranks} ranks, {args.rounds} rounds of {args.inner_steps} steps: accuracy "
              f"{accuracy:.2%}; {args.rounds * flat.nbytes:,} bytes averaged, "
              f"{args.rounds * args.inner_steps * flat.nbytes:,} with a mean at each step")
    assert accuracy >= args.least_accuracy, f"{args.least_accuracy:.2%} was expected"


def main() -> None:
    """Train alone, then on several ranks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--inner-steps", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--least-accuracy", type=float, default=0.94,
                        help="fail below; one process has 94.4 to 97.5 %% by its seed")
    args = parser.parse_args()
    torch.set_num_threads(1)
    _, accuracy = train(args.seed, args.rounds, args.inner_steps, outer=None)
    print(f"one process, {args.rounds * args.inner_steps} steps: accuracy {accuracy:.2%}")
    # On loopback alone; between machines it is the interface that joins them.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    with tempfile.TemporaryDirectory() as folder:
        start_processes(  # type: ignore[no-untyped-call]
            run_rank, (f"{folder}/store", args), args.ranks,
            start_method="fork" if sys.platform == "linux" else "spawn",    # imports are slow
        )


if __name__ == "__main__":
    main()
