"""Train a NumPy network on handwritten digits: SGD, momentum and Nesterov, two backends each.

A multilayer perceptron of 1.1 million parameters, forward and backward by hand, learns the
digits that scikit-learn ships. Each rule trains it twice from the same seed, once with the plain
NumPy update and once with optcore; the loss histories must be equal to the last bit.

Run ``make demo``, or ``python examples/digits.py --help``.
"""
from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

import optcore

MOMENTUM = 0.9
# learning rate and colour of each rule; the colours are the lecture's
RULES = {"sgd": (0.1, "black"), "momentum": (0.02, "tab:blue"), "nesterov": (0.02, "tab:green")}


class MLP:
    """A perceptron with ReLU layers and softmax cross-entropy.

    Parameters
    ----------
    sizes : sequence of int
        Width of each layer, the input's and the classes' included.
    rng : numpy.random.Generator
        Draws the initial weights (He).
    """

    def __init__(self, sizes: list[int], rng: np.random.Generator) -> None:
        self.params: list[np.ndarray] = []
        for n_in, n_out in itertools.pairwise(sizes):
            weights = rng.standard_normal((n_in, n_out)) * np.sqrt(2 / n_in)
            self.params += [weights.astype(np.float32), np.zeros(n_out, np.float32)]
        self.grads = [np.zeros_like(p) for p in self.params]

    @property
    def size(self) -> int:
        """Number of parameters."""
        return sum(p.size for p in self.params)

    def forward(self, x: np.ndarray) -> list[np.ndarray]:
        """Return the input of every layer, then the logits."""
        layers = [x]
        for weights, bias in zip(self.params[::2], self.params[1::2], strict=True):
            z = layers[-1] @ weights + bias
            layers.append(z)
            if weights is not self.params[-2]:
                np.maximum(z, 0, out=z)
        return layers

    def backward(self, x: np.ndarray, labels: np.ndarray) -> float:
        """Fill `grads` with the gradient of the mean cross-entropy; return the latter."""
        *layers, logits = self.forward(x)
        logits = logits - logits.max(axis=1, keepdims=True)
        p = np.exp(logits)
        p /= p.sum(axis=1, keepdims=True)
        rows = np.arange(len(labels))
        loss = float(-np.log(p[rows, labels]).mean())
        delta = p
        delta[rows, labels] -= 1
        delta /= np.float32(len(labels))
        for k in range(len(layers) - 1, -1, -1):
            np.matmul(layers[k].T, delta, out=self.grads[2 * k])
            delta.sum(axis=0, out=self.grads[2 * k + 1])
            if k:
                delta = (delta @ self.params[2 * k].T) * (layers[k] > 0)
        return loss

    def accuracy(self, x: np.ndarray, labels: np.ndarray) -> float:
        """Return the share of right answers."""
        return float((self.forward(x)[-1].argmax(axis=1) == labels).mean())


class PlainNumPy:
    """The update as one writes it in NumPy."""

    def __init__(self, model: MLP, rule: str, lr: float) -> None:
        self.model, self.rule, self.lr = model, rule, lr
        self.velocities = [np.zeros_like(p) for p in model.params]

    def step(self) -> None:
        """Update every parameter by the rule."""
        lr, rho = self.lr, MOMENTUM
        for x, g, v in zip(self.model.params, self.model.grads, self.velocities, strict=True):
            if self.rule == "sgd":
                x -= lr * g
                continue
            v *= rho
            v += g
            if self.rule == "momentum":
                x -= lr * v
            else:
                x -= lr * (g + rho * v)


def with_optcore(model: MLP, rule: str, lr: float) -> optcore.SGD:
    """Return an optimizer whose gradients are the model's own buffers."""
    return optcore.SGD(
        model.params,
        lr=lr,
        momentum=0.0 if rule == "sgd" else MOMENTUM,
        nesterov=rule == "nesterov",
        grads=model.grads,
    )


BACKENDS: dict[str, Callable[[MLP, str, float], PlainNumPy | optcore.SGD]] = {
    "NumPy": PlainNumPy, "optcore": with_optcore,
}
# training images and labels, test images and labels
Data = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


@dataclass
class Run:
    """What one training run left behind."""

    losses: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    epoch_seconds: list[float] = field(default_factory=list)
    accuracy: float = 0.0

    @property
    def step_us(self) -> float:
        """Median time of the optimizer's part of a step."""
        return 1e6 * float(np.median(self.step_seconds))

    @property
    def epoch_ms(self) -> float:
        """Median time of a whole epoch."""
        return 1e3 * float(np.median(self.epoch_seconds))

    @property
    def step_share(self) -> float:
        """Share of an epoch that the optimizer's steps take, by the two medians."""
        steps_per_epoch = len(self.step_seconds) / len(self.epoch_seconds)
        return self.step_us * steps_per_epoch / (1e3 * self.epoch_ms)


class Training:
    """One network in training; networks of one seed see the same batches."""

    def __init__(
        self, backend: str, rule: str, lr: float, data: Data, *, batch: int, hidden: list[int],
        seed: int,
    ) -> None:
        self.data, self.batch = data, batch
        self.rng = np.random.default_rng(seed)
        self.model = MLP([data[0].shape[1], *hidden, 10], self.rng)
        self.optimizer = BACKENDS[backend](self.model, rule, lr)
        self.run = Run()

    def epoch(self) -> None:
        """See every training image once."""
        x, labels, *_ = self.data
        start_of_epoch = time.perf_counter()
        order = self.rng.permutation(len(x))
        for start in range(0, len(x), self.batch):
            rows = order[start : start + self.batch]
            self.run.losses.append(self.model.backward(x[rows], labels[rows]))
            begin = time.perf_counter()
            self.optimizer.step()
            self.run.step_seconds.append(time.perf_counter() - begin)
        self.run.epoch_seconds.append(time.perf_counter() - start_of_epoch)

    def finish(self) -> Run:
        """Test the network and return its run."""
        _, _, x_test, labels_test = self.data
        self.run.accuracy = self.model.accuracy(x_test, labels_test)
        return self.run


def digits(seed: int, test_share: float = 0.2) -> Data:
    """Return training and test images in [0, 1] with their labels, shuffled."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(seed).permutation(len(data.target))
    x = (data.data / 16).astype(np.float32)[order]
    labels = data.target[order]
    n_test = int(test_share * len(x))
    return x[n_test:], labels[n_test:], x[:n_test], labels[:n_test]


def draw(runs: dict[tuple[str, str], Run], steps_per_epoch: int, path: Path) -> None:
    """Draw the loss of every rule, averaged over an epoch's steps."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for rule, (lr, colour) in RULES.items():
        losses = np.reshape(runs[rule, "optcore"].losses, (-1, steps_per_epoch)).mean(axis=1)
        axes.semilogy(np.arange(1, len(losses) + 1), losses, color=colour, lw=2,
                      label=f"{rule}, lr {lr:g}")
    axes.set(xlabel="epoch", ylabel="training loss (mean of the epoch)",
             title="Digits, optcore and NumPy alike: the same bits")
    axes.grid(True, which="major", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> int:
    """Run the demo; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--hidden", type=int, nargs="+", default=[1024, 1024])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--least-accuracy", type=float, default=0.97,
                        help="fail where momentum's test accuracy is below")
    parser.add_argument("--out", type=Path, default=Path("build/demo/digits.png"))
    args = parser.parse_args()

    try:        # here, for others import the network alone
        import matplotlib
        from rich import box
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
        from rich.table import Table

        data = digits(args.seed)
    except ImportError as error:
        sys.exit(f"digits: {error.name} is missing; pip install 'optcore[demo]', or run make demo")

    matplotlib.use("Agg")
    console = Console(highlight=False)
    steps_per_epoch = -(-len(data[0]) // args.batch)
    size = MLP([64, *args.hidden, 10], np.random.default_rng(0)).size
    console.print(
        f"{size:,} parameters, {len(data[0])} training and {len(data[2])} test images,\n"
        f"{args.epochs} epochs of {steps_per_epoch} steps, {optcore.get_num_threads()} threads"
    )
    runs: dict[tuple[str, str], Run] = {}
    columns = TextColumn("{task.description:24}"), BarColumn(), TimeRemainingColumn()
    # A bar is drawn over itself; where that cannot be, each epoch has a line instead.
    draws = sys.stdout.isatty() and not console.is_dumb_terminal
    with Progress(*columns, console=console, disable=not draws) as progress:
        task = progress.add_task("", total=len(RULES) * len(BACKENDS) * args.epochs)
        for rule, (lr, _) in RULES.items():
            progress.update(task, description=rule)
            trainings = {
                backend: Training(
                    backend, rule, lr, data, batch=args.batch, hidden=args.hidden, seed=args.seed
                )
                for backend in BACKENDS
            }
            # In turn, so that both meet whatever else the machine does in these seconds
            for epoch in range(1, args.epochs + 1):
                for training in trainings.values():
                    training.epoch()
                    progress.advance(task)
                if not draws:
                    loss = np.mean(training.run.losses[-steps_per_epoch:])
                    console.print(f"{rule}, epoch {epoch} of {args.epochs}: loss {loss:.2e}")
            for backend, training in trainings.items():
                runs[rule, backend] = training.finish()

    table = Table(title="Medians; an epoch is all of the training, the share is its steps'",
                  box=box.SIMPLE)
    for heading in ("rule", "update", "step, µs", "epoch, ms", "share", "test", "loss"):
        table.add_column(heading, justify="left" if heading in ("rule", "update") else "right")
    differing = []
    for rule in RULES:
        plain, ours = runs[rule, "NumPy"], runs[rule, "optcore"]
        equal = plain.losses == ours.losses and plain.accuracy == ours.accuracy
        if not equal:
            differing.append(rule)
        table.add_row(
            rule, "NumPy", f"{plain.step_us:.0f}", f"{plain.epoch_ms:.0f}",
            f"{plain.step_share:.0%}", f"{plain.accuracy:.2%}", f"{plain.losses[-1]:.1e}",
        )
        table.add_row(
            "", "optcore", f"{ours.step_us:.0f} ({plain.step_us / ours.step_us:.1f}×)",
            f"{ours.epoch_ms:.0f} ({plain.epoch_ms / ours.epoch_ms:.2f}×)",
            f"{ours.step_share:.0%}", f"{ours.accuracy:.2%}",
            "same bits" if equal else "[bold red]differ[/]",
        )
    console.print(table)
    draw(runs, steps_per_epoch, args.out)
    console.print(f"Loss curves: {args.out}")
    if differing:
        console.print(f"[bold red]The two backends differ for {', '.join(differing)}.")
        return 1
    accuracy = runs["momentum", "optcore"].accuracy
    if accuracy < args.least_accuracy:
        console.print(f"[bold red]Momentum reached {accuracy:.2%}; "
                      f"{args.least_accuracy:.0%} was expected.")
        return 1
    console.print("The loss histories of NumPy and optcore are equal to the last bit.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
