"""The real network: the digits trained with the three rules. No theory here, measurements only."""
from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

import optcore
from lecture import mlp, style
from lecture.claims import Check, Picture, Story
from lecture.rules import RULES

CONFIGURATIONS = (("sgd", 0.0), ("momentum", 0.9), ("momentum", 0.99), ("nesterov", 0.9),
                  ("nesterov", 0.99))
LEARNING_RATES = (0.003, 0.03, 0.3)
SEEDS, STEPS, BATCH, EVERY = 5, 700, 64, 35
TARGET = 0.1     # training loss by which speed is compared
DASHES = {0.0: "-", 0.9: "-", 0.99: (0, (4, 1.5))}


def batches(seed: int, examples: int, steps: int) -> Iterator[np.ndarray]:
    """Yield minibatches of indices, each epoch in a new order."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(examples)
    at = 0
    for _ in range(steps):
        if at + BATCH > examples:
            order, at = rng.permutation(examples), 0
        yield order[at:at + BATCH]
        at += BATCH


def train(rule: str, lr: float, momentum: float, *, seed: int, steps: int = STEPS
          ) -> dict[str, Any]:
    """Train one network; return the training loss and the wall time every few steps.

    The clock runs while minibatches are trained on, and stops while the loss is evaluated.
    """
    images, labels = mlp.digits()
    seen, seen_labels = images[:mlp.TRAINING], labels[:mlp.TRAINING]
    network = mlp.Network(seed)
    optimizer = optcore.SGD(network.params, lr=lr, momentum=momentum, nesterov=rule == "nesterov",
                            grads=network.grads)
    losses, seconds, spent = [network.loss(seen, seen_labels)], [0.0], 0.0
    chunk: list[np.ndarray] = []
    # A run that diverges overflows; that is a result here, and drawn as one.
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        for chosen in batches(seed, len(seen), steps):
            chunk.append(chosen)
            if len(chunk) < EVERY:
                continue
            begin = time.perf_counter()
            for indices in chunk:
                network.backward(seen[indices], seen_labels[indices])
                optimizer.step()
            spent += time.perf_counter() - begin
            chunk.clear()
            losses.append(network.loss(seen, seen_labels))
            seconds.append(spent)
        accuracy = network.accuracy(images[mlp.TRAINING:], labels[mlp.TRAINING:])
    return {"loss": np.array(losses), "seconds": np.array(seconds), "accuracy": accuracy}


def measured(seeds: int = SEEDS, steps: int = STEPS, progress: Callable[[], None] = lambda: None
             ) -> dict[str, Any]:
    """Train every configuration at every learning rate from several seeds.

    Seeds are the outer loop, so that whatever else the machine does falls on all rules alike.
    """
    keys = [(lr, *configuration) for lr in LEARNING_RATES for configuration in CONFIGURATIONS]
    trained: dict[Any, list[dict[str, Any]]] = {key: [] for key in keys}
    for seed in range(seeds):
        for lr, rule, momentum in keys:
            trained[lr, rule, momentum].append(train(rule, lr, momentum, seed=seed, steps=steps))
        progress()
    return {"runs": {key: _summary(trained[key], steps) for key in keys}, "seeds": seeds,
            "steps": steps}


def _summary(trained: list[dict[str, Any]], steps: int) -> dict[str, Any]:
    losses = np.array([t["loss"] for t in trained])
    seconds = np.array([t["seconds"] for t in trained])
    reached = [np.flatnonzero(loss < TARGET) for loss in losses]
    return {
        "loss": losses,
        "seconds": seconds,
        "step": np.arange(losses.shape[1]) * EVERY,
        "final": float(np.median(losses[:, -1])),
        "accuracy": float(np.mean([t["accuracy"] for t in trained])),
        "to_target": float(np.median([EVERY * r[0] if r.size else np.inf for r in reached])),
        "microseconds": float(1e6 * np.median(seconds[:, -1]) / steps),
    }


def checks(numbers: dict[str, Any]) -> list[Check]:
    """Return nothing: there is no theory to check against."""
    return []


def table(numbers: dict[str, Any]) -> list[tuple[str, ...]]:
    """Return header and rows of what was measured."""
    rows = [("rule", "α", f"steps to loss {TARGET:g}", "final loss", "test accuracy", "µs a step")]
    for (lr, rule, momentum), run in numbers["runs"].items():
        rows.append((
            _who(rule, momentum), f"{lr:g}",
            f"{run['to_target']:.0f}" if np.isfinite(run["to_target"]) else "not reached",
            f"{run['final']:.2g}" if np.isfinite(run["final"]) else "diverged",
            f"{100 * run['accuracy']:.1f} %", f"{run['microseconds']:.0f}",
        ))
    return rows


def _who(rule: str, momentum: float) -> str:
    return RULES[rule].label + (f", ρ = {momentum}" if momentum else "")


def figures(numbers: dict[str, Any]) -> list[Picture]:
    """Draw the panel: loss over steps and over time, a figure for each learning rate."""
    return [_draw(numbers, lr, over) for lr in LEARNING_RATES for over in ("step", "seconds")]


def _draw(numbers: dict[str, Any], lr: float, over: str) -> Picture:
    unit = {"step": "step", "seconds": "wall time, ms"}[over]
    figure, ax = style.panel(f"α = {lr:g}, by {'step' if over == 'step' else 'wall time'}", unit,
                             "training loss", size=(5.4, 5.2))
    for rule, momentum in CONFIGURATIONS:
        run = numbers["runs"][lr, rule, momentum]
        at = run["step"] if over == "step" else 1e3 * np.median(run["seconds"], axis=0)
        loss = np.where(np.isfinite(run["loss"]), run["loss"], 1e6)   # off the scale
        ax.plot(at, np.median(loss, axis=0), color=style.COLOR[rule], linewidth=1.6,
                linestyle=DASHES[momentum], marker=style.MARKER[rule], markevery=7, markersize=4.5,
                label=_who(rule, momentum))
        ax.fill_between(at, loss.min(axis=0), loss.max(axis=0), color=style.COLOR[rule], alpha=0.13,
                        linewidth=0)
    ax.set(yscale="log", ylim=(5e-4, 8), xlim=(0, None))
    figure.legend(loc="outside lower center", ncols=2, fontsize=11)
    finals = {key[1:]: run["final"] for key, run in numbers["runs"].items() if key[0] == lr}
    best = min(finals, key=finals.get)
    return Picture(
        f"network-{lr:g}-{over}".replace(".", "_"), figure,
        f"Median of {numbers['seeds']} seeds, band from the lowest to the highest. Best after "
        f"{numbers['steps']} steps: {_who(*best)}, loss {finals[best]:.2g}; SGD "
        f"{finals['sgd', 0.0]:.2g}.",
        f"Training loss of five configurations over {unit} "
        f"at learning rate {lr:g}, with bands over seeds.",
    )


def story(numbers: dict[str, Any]) -> Story:
    """Tell the panel."""
    runs = numbers["runs"]
    times = [run["microseconds"] for run in runs.values()]
    low, high = LEARNING_RATES[0], LEARNING_RATES[-1]
    failed = [f"{_who(rule, momentum)} at α = {lr:g}" for (lr, rule, momentum), run in runs.items()
              if not run["final"] < 1 and lr > low]
    return Story(
        "network", "A real network, on the digits",
        "Momentum and Nesterov are what one uses in practice, with ρ = 0.9 or 0.99.",
        (
            f"A 64–64–10 network, minibatches of {BATCH}, {numbers['seeds']} seeds, every update "
            "by <code>optcore.SGD</code>. A step costs about the same under all three rules "
            f"({min(times):.0f} to {max(times):.0f} µs with the gradient), so the curves over wall "
            "time look like those over steps.",
            f"At α = {low:g} SGD crawls and momentum helps most: it comes "
            f"to {runs[low, 'momentum', 0.9]['final']:.2g} where SGD is at "
            f"{runs[low, 'sgd', 0.0]['final']:.2g}. At α = {high:g} SGD is "
            f"already fast ({runs[high, 'sgd', 0.0]['final']:.2g}), which "
            "is row 3's lesson: what counts is α/(1−ρ).",
        ),
        "More momentum is not always better. Above a median loss of 1, or not finite, at the end: "
        + ("; ".join(failed) if failed else "none") + ".",
        (
            ("In practice, ρ = 0.9 or 0.99", f"loss at α = {low:g}: SGD "
             f"{runs[low, 'sgd', 0.0]['final']:.2g}, momentum "
             f"{runs[low, 'momentum', 0.9]['final']:.2g} and "
             f"{runs[low, 'momentum', 0.99]['final']:.2g}, Nesterov "
             f"{runs[low, 'nesterov', 0.9]['final']:.2g} and "
             f"{runs[low, 'nesterov', 0.99]['final']:.2g}", "–"),
        ),
    )
