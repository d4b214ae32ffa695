"""Row 3, noisy gradients: what minibatches do to the path, and what momentum averages out."""
from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from lecture import measure, mlp, style, theory
from lecture.claims import Check, Picture, Story, absolute, number, within_errors
from lecture.rules import RULES, Rule, Rules

CURVATURE, NOISE = 1.0, 1.0
CHAINS = 40_000                  # independent, so the standard error is what it says
MOMENTA = (0.5, 0.9, 0.99)
LR = 0.02                        # of all rules, in the comparison at equal α
EFFECTIVE = 0.5                  # α/(1-ρ) of all rules, in the comparison at equal effective step
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
DRAWS = 400
BOWL = np.array([1.0, 0.08])
STATIONARY, EQUAL, DIRECTION, BATCH = (
    "Stationary variance, equal α", "Stationary variance, equal effective step α/(1−ρ)",
    "Noise of the direction", "Minibatch gradient",
)


def stationary(rule: Rule, *, lr: float, momentum: float, seed: int) -> tuple[float, float]:
    """Measure the stationary variance of x and its standard error, over independent chains.

    The chains start at rest at the minimum and run until what is missing from the stationary
    variance is far below its standard error.
    """
    rng = np.random.default_rng(seed)
    slowest = float(theory.contraction(rule.name, lr, momentum, CURVATURE))
    x, v, g = np.zeros(CHAINS), np.zeros(CHAINS), np.empty(CHAINS)
    for _ in range(int(np.ceil(5 / -np.log(slowest)))):   # e⁻¹⁰ of the variance is missing
        rng.standard_normal(out=g)
        g *= NOISE
        g += CURVATURE * x
        rule.step(x, g, v, lr, momentum)
    return measure.variance(x)


def _variances(rules: Rules, cases: list[tuple[str, float, float]], seed: int
               ) -> list[dict[str, Any]]:
    rows = []
    for i, (name, lr, momentum) in enumerate(cases):
        variance, error = stationary(rules[name], lr=lr, momentum=momentum, seed=seed + i)
        rows.append({
            "rule": name, "lr": lr, "momentum": momentum, "measured": variance, "error": error,
            "theory": theory.stationary_variance(name, lr, momentum, CURVATURE, NOISE),
        })
    return rows


def _direction(rules: Rules, momentum: float, seed: int) -> dict[str, float]:
    """Measure the variance of (1-ρ)·v under a constant gradient of 1 with noise."""
    rng = np.random.default_rng(seed)
    x, v = np.zeros(CHAINS), np.zeros(CHAINS)
    for _ in range(int(np.ceil(6 / -np.log(momentum)))):
        rules["momentum"].step(x, 1 + NOISE * rng.standard_normal(CHAINS), v, 0.0, momentum)
    variance, error = measure.variance((1 - momentum) * v)
    return {"momentum": momentum, "measured": variance, "error": error,
            "theory": NOISE**2 * (1 - momentum) / (1 + momentum)}


@cache   # no rule takes part
def _batches(seed: int = 11) -> dict[str, np.ndarray | float]:
    """Measure E‖g_B - g‖² of real minibatch gradients, drawn with replacement.

    With replacement it is exactly that of single examples over B; without, as in an epoch, it is
    smaller still by (N-B)/(N-1).
    """
    rng = np.random.default_rng(seed)
    images, labels = mlp.digits("float64")
    network = mlp.Network(seed=0, hidden=32, dtype="float64")

    def gradient(chosen: np.ndarray) -> np.ndarray:
        network.backward(images[chosen], labels[chosen])
        return network.flat_gradient()

    everything = np.arange(len(labels))
    full = gradient(everything)
    one = np.mean([np.sum((gradient(everything[i:i + 1]) - full) ** 2) for i in everything])
    distances = np.array([
        [np.sum((gradient(rng.integers(len(labels), size=size)) - full) ** 2)
         for _ in range(DRAWS)]
        for size in BATCHES
    ])
    mean = distances.mean(axis=1)
    return {
        "size": np.array(BATCHES), "measured": mean,
        "error": distances.std(axis=1) / np.sqrt(DRAWS), "theory": one / np.array(BATCHES),
        "exponent": measure.exponent(np.array(BATCHES), mean),
    }


def _walks(rules: Rules, seed: int = 5, steps: int = 120) -> dict[str, np.ndarray]:
    """Walk down a bowl with the same noise, at the same effective step."""
    noise = 0.4 * np.random.default_rng(seed).standard_normal((steps, 2))
    paths = {}
    for name, lr, momentum in (("sgd", 0.9, 0.0), ("momentum", 0.09, 0.9)):
        at = iter(noise)
        paths[name] = measure.trajectory(
            rules[name], lambda x, at=at: BOWL * x + next(at), np.array([0.8, -8.0]), lr=lr,
            momentum=momentum, steps=steps,
        )
    return paths


def measured(rules: Rules = RULES) -> dict[str, Any]:
    """Return every number of this row."""
    pairs = [("sgd", 0.0), *((name, rho) for name in ("momentum", "nesterov") for rho in MOMENTA)]
    walks = _walks(rules)
    return {
        "equal_lr": _variances(rules, [(name, LR, rho) for name, rho in pairs], seed=100),
        "equal_step": _variances(
            rules, [(name, EFFECTIVE * (1 - rho), rho) for name, rho in pairs], seed=200),
        "direction": [_direction(rules, rho, seed=300 + i) for i, rho in enumerate(MOMENTA)],
        "batches": _batches(),
        "walks": walks,
        "walked": {name: float(np.linalg.norm(np.diff(path, axis=0), axis=1).sum())
                   for name, path in walks.items()},
    }


def _who(row: dict[str, Any]) -> str:
    return RULES[row["rule"]].label + (f", ρ = {row['momentum']}" if row["momentum"] else "")


def checks(numbers: dict[str, Any]) -> list[Check]:
    """Return this row's claims."""
    claims = [
        within_errors(group, f"{_who(row)}, α = {row['lr']:g}", row["measured"], row["theory"],
                      row["error"], rests_on_momentum=row["momentum"] >= 0.9)
        for group, key in ((STATIONARY, "equal_lr"), (EQUAL, "equal_step"))
        for row in numbers[key]
    ]
    claims += [
        within_errors(DIRECTION, f"Variance of (1−ρ)·v over a gradient's, ρ = {row['momentum']}",
                      row["measured"], row["theory"], row["error"],
                      rests_on_momentum=row["momentum"] >= 0.9)
        for row in numbers["direction"]
    ]
    batches = numbers["batches"]
    claims.append(absolute(BATCH, "Exponent of the batch size in E‖g_B − g‖²",
                           batches["exponent"], -1.0, 0.02))
    claims += [
        within_errors(BATCH, f"E‖g_B − g‖², B = {size}", *values)
        for size, *values in zip(batches["size"], batches["measured"], batches["theory"],
                                 batches["error"], strict=True)
    ]
    return claims


def figures(numbers: dict[str, Any]) -> list[Picture]:
    """Draw this row."""
    return [
        _draw_walks(numbers), _draw_direction(numbers),
        _draw_variance(
            numbers["equal_lr"], lambda rho: LR, "row3-equal-lr", "Same α: momentum is noisier",
            f"α = {LR} for all. At the same α momentum takes steps 1/(1−ρ) times as long, and its "
            "stationary variance is larger by about as much: {0:.1f} times SGD's at ρ = 0.9, "
            "{1:.0f} times at 0.99.",
        ),
        _draw_variance(
            numbers["equal_step"], lambda rho: EFFECTIVE * (1 - rho), "row3-equal-step",
            "Same effective step: quieter",
            f"α/(1−ρ) = {EFFECTIVE} for all. Now the noise does average out: momentum's variance "
            "is {0:.2f} of SGD's at ρ = 0.9, {1:.2f} at 0.99.",
        ),
        _draw_batches(numbers),
    ]


def _draw_walks(numbers: dict[str, Any]) -> Picture:
    figure, ax = style.panel("Downhill through noise", "shallow direction", "steep direction")
    points = np.concatenate(list(numbers["walks"].values()))
    low, high = points.min(axis=0) - 0.5, points.max(axis=0) + 0.5
    x, y = np.meshgrid(np.linspace(low[1], high[1], 150), np.linspace(low[0], high[0], 150))
    style.contours(ax, x, y, BOWL[0] * y**2 / 2 + BOWL[1] * x**2 / 2)
    for name, path in numbers["walks"].items():
        style.path(ax, name, RULES[name].label, path[:, ::-1], linewidth=1.1, markersize=2.4)
    ax.plot(0, 0, "*", color=style.GRADIENT, markersize=15, markeredgecolor="white", zorder=5)
    ax.legend(loc="upper left", frameon=True, framealpha=0.85, edgecolor="none")
    walked = numbers["walked"]
    return Picture(
        "row3-walk", figure,
        "The same noise, the same effective step. In "
        f"{len(points) // 2 - 1} steps SGD walks {walked['sgd']:.0f} units "
        f"of length, momentum {walked['momentum']:.0f}, to the same place.",
        "Contours of a bowl with two noisy paths to its minimum: SGD's jitters from wall to wall, "
        "momentum's is a smooth curve.",
    )


def _draw_direction(numbers: dict[str, Any]) -> Picture:
    figure, ax = style.panel("Velocity averages gradients", "momentum ρ",
                             "variance of (1−ρ)·v / of a gradient")
    rho = np.linspace(0, 0.995, 300)
    ax.plot(rho, (1 - rho) / (1 + rho), **style.line("momentum", linewidth=1.5,
                                                     label="theory (1−ρ)/(1+ρ)"))
    rows = numbers["direction"]
    ax.plot([r["momentum"] for r in rows], [r["measured"] for r in rows],
            **style.dots("momentum", label="measured"))
    ax.set(yscale="log", ylim=(2e-3, 1.3))
    ax.legend(loc="lower left")
    error = max(r["error"] / r["measured"] for r in rows)
    return Picture(
        "row3-direction", figure,
        "The direction of a step is a mean over about 1/(1−ρ) gradients. Its variance falls to "
        + ", ".join(f"{r['measured']:.4f} (ρ = {r['momentum']})" for r in rows)
        + f" of a single gradient's. Standard error {100 * error:.1f} %.",
        "Variance of the velocity relative to that of a gradient over momentum, falling from one "
        "to below a hundredth; measured markers on the theory line.",
    )


def _draw_variance(rows: list[dict[str, Any]], lr: Callable[[float], float], name: str,
                   title: str, caption: str) -> Picture:
    """Draw variances over ρ; the caption takes momentum's over SGD's at ρ = 0.9 and 0.99."""
    figure, ax = style.panel(title, "momentum ρ", "stationary variance of x")
    rho = np.linspace(0, 0.993, 120)
    for rule in ("momentum", "nesterov"):
        ax.plot(rho, [theory.stationary_variance(rule, lr(r), r, CURVATURE, NOISE) for r in rho],
                **style.line(rule, linewidth=1.5))
    for rule in RULES:
        mine = [r for r in rows if r["rule"] == rule]
        ax.errorbar([r["momentum"] for r in mine], [r["measured"] for r in mine],
                    yerr=[3 * r["error"] for r in mine], ecolor=style.COLOR[rule],
                    **style.dots(rule, label=RULES[rule].label))
    if name == "row3-equal-lr":
        ax.set_yscale("log")
    else:
        ax.set_ylim(0, None)
    ax.legend(loc="best")
    of = {(r["rule"], r["momentum"]): r["measured"] for r in rows}
    return Picture(
        name, figure,
        caption.format(*(of["momentum", rho] / of["sgd", 0.0] for rho in (0.9, 0.99)))
        + " Lines: closed form. Markers: measured, ±3 s.e.",
        "Stationary variance over momentum: lines of theory for momentum and Nesterov, measured "
        "markers with error bars on them.",
    )


def _draw_batches(numbers: dict[str, Any]) -> Picture:
    batches = numbers["batches"]
    figure, ax = style.panel("Minibatches of the digits", "batch size B", "E‖g_B − g‖²")
    ax.plot(batches["size"], batches["theory"], color=style.GREY, linewidth=1.5,
            label="theory, ∝ 1/B")
    ax.errorbar(batches["size"], batches["measured"], yerr=3 * batches["error"],
                ecolor=style.GRADIENT, **style.dots("sgd", color=style.GRADIENT,
                                                    label="measured, ±3 s.e."))
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.legend(loc="upper right")
    return Picture(
        "row3-batches", figure,
        f"Variance of the gradient of a 64–32–10 network, {DRAWS} minibatches "
        f"a point. Fitted exponent {number(batches['exponent'], 4)}; theory: "
        "−1, and the level from single examples.",
        "Log-log plot of the minibatch gradient's variance over the batch size: a straight line of "
        "slope minus one with markers on it.",
    )


def story(numbers: dict[str, Any]) -> Story:
    """Tell this row."""
    of = {key: {(r["rule"], r["momentum"]): r["measured"] for r in numbers[key]}
          for key in ("equal_lr", "equal_step")}
    expected = {}
    for key in of:
        exact = {(r["rule"], r["momentum"]): r["theory"] for r in numbers[key]}
        expected[key] = exact["momentum", 0.9] / exact["sgd", 0.0]
    direction = numbers["direction"][1]
    louder = of["equal_lr"]["momentum", 0.9] / of["equal_lr"]["sgd", 0.0]
    quieter = of["equal_step"]["momentum", 0.9] / of["equal_step"]["sgd", 0.0]
    return Story(
        "row-3", "Noise: gradients come from minibatches",
        "L(W) = (1/N) Σ Lᵢ: the gradient of a minibatch is a noisy estimate. With noise SGD "
        "meanders around the space and takes longer to arrive. Momentum averages the noise out.",
        (
            "The noise is real: on the digits its variance falls as one over the batch size, so a "
            "batch four times as large is only half as noisy.",
            "Does momentum average it out? The <em>direction</em> it does: (1−ρ)·v has "
            f"{direction['measured']:.3f} of a gradient's variance at ρ = 0.9. And at the same "
            f"<em>effective</em> step α/(1−ρ) = {EFFECTIVE} its iterates lie closer to the "
            f"minimum, with {quieter:.2f} of SGD's variance.",
        ),
        "It depends on what one holds equal. At the <em>same α</em> momentum "
        f"takes steps ten times as long at ρ = 0.9, and is {louder:.1f} times "
        "as noisy around the minimum. And the gain at equal effective step "
        "vanishes for small steps, where SGD, too, averages over many gradients.",
        (
            ("Minibatch gradients are noisy", "variance falls as the batch size to the power "
             f"{numbers['batches']['exponent']:.3f}".replace("-", "−"), "−1"),
            ("Momentum averages the noise out",
             f"variance of the direction at ρ = 0.9: {direction['measured']:.4f} of a gradient's",
             f"{direction['theory']:.4f}"),
            ("– at equal effective step", f"{quieter:.3f} of SGD's stationary variance",
             f"{expected['equal_step']:.3f}"),
            ("– but not at equal α", f"{louder:.2f} times SGD's", f"{expected['equal_lr']:.2f}"),
        ),
    )
