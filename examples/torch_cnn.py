"""Train a small PyTorch network on digits with torch.optim.SGD, then with optcore.torch.SGD.

Run ``python examples/torch_cnn.py``; it needs PyTorch and scikit-learn, which has the digits.
"""
from __future__ import annotations

import time

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

import optcore.torch

EPOCHS, BATCH = 10, 64


def train(kind: type[optcore.torch.SGD] | type[torch.optim.SGD]) -> tuple[list[float], float]:
    """Train from one and the same start; return the losses and the seconds spent in step()."""
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    y = torch.tensor(labels)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(32 * 4 * 4, 10),
    )
    opt = kind(model.parameters(), lr=0.02, momentum=0.9, nesterov=True, weight_decay=5e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(opt, EPOCHS)
    losses, seconds = [], 0.0
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(x)).split(BATCH):  # type: ignore[no-untyped-call]
            opt.zero_grad()
            loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
            loss.backward()  # type: ignore[no-untyped-call]
            start = time.perf_counter()
            opt.step()
            seconds += time.perf_counter() - start
            losses.append(loss.item())
        scheduler.step()
    accuracy = (model(x).argmax(1) == y).float().mean().item()
    print(f"{kind.__module__}.SGD: last loss {losses[-1]:.4f}, accuracy {accuracy:.1%}, "
          f"{seconds * 1e6 / len(losses):.0f} µs per step")
    return losses, accuracy


def main() -> None:
    """Train twice and compare."""
    torch.set_num_threads(1)
    (theirs, _), (ours, accuracy) = train(torch.optim.SGD), train(optcore.torch.SGD)
    difference = np.max(np.abs(np.divide(ours, theirs) - 1))
    print(f"largest relative difference of two losses: {difference:.1e}")
    assert difference < 1e-3, "the runs parted"
    assert accuracy > 0.95, "the training failed"


if __name__ == "__main__":
    main()
