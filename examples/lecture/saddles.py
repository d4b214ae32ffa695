"""Row 2, local minima and saddle points: where SGD stops or dawdles, and velocity rolls on."""
from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from lecture import measure, style, theory
from lecture.claims import Check, Picture, Story, absolute, number, relative, within_errors
from lecture.rules import RULES, Rules

# The saddle: ½x² - ½·0.1·y² + ¼y⁴, with minima at y = ±√0.1.
FALL = 0.1
SADDLE_LR, SADDLE_MOMENTUM = 0.1, 0.9
STARTS = np.geomspace(1e-6, 1e-3, 7)
PICTURE_START = np.array([0.55, 0.012])
LEFT = 0.02            # where the saddle counts as left: y²/FALL, what linearising drops, is 0.4 %

# The double well: ¼x⁴ - ½x² - 0.15x, local minimum on the left, global on the right.
TILT = 0.15
WELL_START = -1.8
WELL_LR, WELL_MOMENTUM = 0.03, 0.9
FRICTION_LR = 1e-4     # small, so that the equivalent ball's error of order α stays below 0.1 %

ESCAPE, WELL, SHARE = "Escape from the saddle", "Double well", "Saddles among critical points"


def saddle_loss(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the loss around the saddle."""
    return x**2 / 2 - FALL * y**2 / 2 + y**4 / 4


def saddle_gradient(point: np.ndarray) -> np.ndarray:
    """Return its gradient; the first axis of `point` is (x, y)."""
    x, y = point
    return np.stack([x, y**3 - FALL * y])


def well_loss(x: np.ndarray) -> np.ndarray:
    """Return the loss of the double well."""
    return x**4 / 4 - x**2 / 2 - TILT * x


def well_gradient(x: np.ndarray) -> np.ndarray:
    """Return its gradient."""
    return x**3 - x - TILT


def well_points() -> dict[str, float]:
    """Return the three critical points of the double well."""
    local, barrier, deep = np.sort(np.roots([1, 0, -1, -TILT]).real)
    return {"local": float(local), "barrier": float(barrier), "global": float(deep)}


def _crossing(path: np.ndarray, threshold: float) -> np.ndarray:
    """Return when each column of `path` first reaches a threshold, between steps too."""
    at = np.argmax(path >= threshold, axis=0)
    column = np.arange(path.shape[1])
    before, after = np.log(path[at - 1, column]), np.log(path[at, column])
    return at - 1 + (np.log(threshold) - before) / (after - before)


def _escapes(rules: Rules) -> dict[str, dict[str, np.ndarray]]:
    found = {}
    for name, rule in rules.items():
        start = np.stack([np.ones_like(STARTS), STARTS])
        path = measure.trajectory(rule, saddle_gradient, start, lr=SADDLE_LR,
                                  momentum=SADDLE_MOMENTUM, steps=1300)
        found[name] = {
            "measured": _crossing(path[:, 1], LEFT),
            "theory": theory.escape_time(name, SADDLE_LR, SADDLE_MOMENTUM, -FALL, STARTS, LEFT),
            "path": path[:, :, -1],
            "picture": measure.trajectory(rule, saddle_gradient, PICTURE_START, lr=SADDLE_LR,
                                          momentum=SADDLE_MOMENTUM, steps=800),
        }
    return found


@cache   # an integration, without a rule
def _critical_friction() -> float:
    return theory.critical_friction(lambda x: -well_gradient(x), WELL_START,
                                    well_points()["barrier"], highest=2.0)


def _critical_momentum(rules: Rules) -> float:
    """Bisect for the smallest ρ that carries the ball over the barrier."""
    barrier = well_points()["barrier"]
    low, high = 0.9, 0.9999
    while high - low > 1e-6:
        middle = (low + high) / 2
        path = measure.trajectory(rules["momentum"], well_gradient, np.array([WELL_START]),
                                  lr=FRICTION_LR, momentum=middle, steps=1500)
        low, high = (low, middle) if path.max() > barrier else (middle, high)
    return (low + high) / 2


@cache   # no rule takes part
def _saddle_shares(seed: int = 7, draws: int = 150_000) -> list[dict[str, float]]:
    """Sample Hessians at the critical points of an isotropic Gaussian random function.

    There the Hessian is a Gaussian symmetric matrix with E[HᵢⱼHₖₗ] = δᵢⱼδₖₗ + δᵢₖδⱼₗ + δᵢₗδⱼₖ. A
    point of the plane is critical with a density proportional to |det H| (Kac and Rice), so each
    sample counts with that weight; the error is that of a ratio of means.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for d in (1, 2, 3, 4, 5, 6, 7, 8):
        a = rng.standard_normal((draws, d, d))
        hessian = (a + a.transpose(0, 2, 1)) / np.sqrt(2)
        hessian += rng.standard_normal((draws, 1, 1)) * np.eye(d)
        eigenvalues = np.linalg.eigvalsh(hessian)
        weight = np.abs(eigenvalues.prod(axis=1))
        weight /= weight.mean()
        saddle = (eigenvalues[:, 0] < 0) & (eigenvalues[:, -1] > 0)
        share = np.mean(weight * saddle)
        error = np.std(weight * (saddle - share)) / np.sqrt(draws)
        rows.append({"d": d, "saddle": float(share), "error": float(error)})
    return rows


def measured(rules: Rules = RULES) -> dict[str, Any]:
    """Return every number of this row."""
    points = well_points()
    wells = {
        name: measure.trajectory(rule, well_gradient, np.array([WELL_START]), lr=WELL_LR,
                                 momentum=WELL_MOMENTUM, steps=2500)[:, 0]
        for name, rule in rules.items()
    }
    return {
        "escape": _escapes(rules),
        "well": wells,
        "points": points,
        "friction": {
            "measured": theory.equivalent_friction(FRICTION_LR, _critical_momentum(rules)),
            "theory": _critical_friction(),
        },
        "shares": _saddle_shares(),
    }


def checks(numbers: dict[str, Any]) -> list[Check]:
    """Return this row's claims."""
    claims = [
        relative(ESCAPE, f"{RULES[name].label}: steps to leave from 10{power}",
                 found["measured"][i], found["theory"][i], 0.01, rests_on_momentum=name != "sgd")
        for name, found in numbers["escape"].items()
        for i, power in ((0, "⁻⁶"), (-1, "⁻³"))
    ]
    ends = {"sgd": "local", "momentum": "global", "nesterov": "global"}
    claims += [
        absolute(WELL, f"{RULES[name].label}, ρ = {WELL_MOMENTUM}: ends in the {end} minimum"
                 if name != "sgd" else "SGD: ends in the local minimum",
                 numbers["well"][name][-1], numbers["points"][end], 1e-6)
        for name, end in ends.items()
    ]
    friction = numbers["friction"]
    claims.append(relative(WELL, "Largest friction (1−ρ)·√(2/(α(1+ρ))) that passes the barrier",
                           friction["measured"], friction["theory"], 0.01, rests_on_momentum=True))
    claims += [
        within_errors(SHARE, f"Share of saddles in {row['d']} dimension{'s' * (row['d'] > 1)}",
                      row["saddle"], theory.SADDLE_SHARE[row["d"]], row["error"])
        for row in numbers["shares"] if row["d"] in theory.SADDLE_SHARE
    ]
    return claims


def figures(numbers: dict[str, Any]) -> list[Picture]:
    """Draw this row."""
    return [_draw_saddle(numbers), _draw_plateau(numbers), _draw_escape(numbers),
            _draw_well(numbers), _draw_shares(numbers)]


def _draw_saddle(numbers: dict[str, Any]) -> Picture:
    figure, ax = style.panel("Around a saddle point", "x, the way in", "y, the way out")
    x, y = np.meshgrid(np.linspace(-0.4, 0.6, 200), np.linspace(-0.1, 0.46, 200))
    loss = saddle_loss(x, y)
    below, above = loss.min(), loss.max()
    levels = [*(below * np.array([0.9, 0.6, 0.3, 0.08])), 0, *(above * np.linspace(0.06, 1, 12)**2)]
    ax.contourf(x, y, loss, levels=levels, cmap="Greys", alpha=0.22, extend="min")
    ax.contour(x, y, loss, levels=levels, colors="#a8a8a8", linewidths=0.7)
    ax.grid(visible=False)
    for name, found in numbers["escape"].items():
        style.path(ax, name, RULES[name].label, found["picture"], markevery=4)
    ax.plot(0, 0, "X", color=style.GRADIENT, markersize=11, markeredgecolor="white", zorder=5,
            label="saddle")
    ax.plot(0, np.sqrt(FALL), "*", color=style.GRADIENT, markersize=15, markeredgecolor="white",
            zorder=5, label="minimum")
    ax.set(xlim=(-0.4, 0.6), ylim=(-0.1, 0.46))
    ax.legend(loc="upper right")
    return Picture(
        "row2-saddle", figure,
        "All three start on the right, just off the ridge, and end in the same minimum. A marker "
        "stands for four steps: SGD's crowd where the gradient is small.",
        "Contours of a saddle. Three paths run from the right to the saddle and turn upwards to a "
        "minimum; momentum and Nesterov swing past the saddle first.",
    )


def _draw_plateau(numbers: dict[str, Any]) -> Picture:
    figure, ax = style.panel("The plateau", "step", "loss above the minimum")
    floor = float(saddle_loss(np.array(0.0), np.array(np.sqrt(FALL))))
    for name, found in numbers["escape"].items():
        x, y = found["path"].T
        ax.plot(np.maximum(saddle_loss(x, y) - floor, 1e-12),
                **style.line(name, linewidth=1.5, label=RULES[name].label))
    ax.axhline(-floor, color=style.GREY, linewidth=1, linestyle=":")
    ax.text(1000, -floor * 1.25, "the saddle's level", color="#555555", fontsize=10.5, ha="right")
    ax.set(yscale="log", ylim=(1e-6, 1), xlim=(0, 1000))
    ax.legend(loc="lower right")
    half = {name: int(np.argmax(saddle_loss(*found["path"].T) - floor < -floor / 2))
            for name, found in numbers["escape"].items()}
    return Picture(
        "row2-plateau", figure,
        "The loss of runs that start a thousandth off the ridge. On a training curve a saddle "
        f"looks like the end. Half of the way down from it is done after {half['sgd']} steps of "
        f"SGD, {half['momentum']} of momentum, {half['nesterov']} of Nesterov.",
        "Loss over steps on a log scale: every curve falls to the level of the saddle, waits "
        "there, and falls on. SGD waits several times as long as the others.",
    )


def _draw_escape(numbers: dict[str, Any]) -> Picture:
    figure, ax = style.panel("Steps to leave the saddle", "distance from the ridge at the start",
                             f"steps until it is {LEFT}")
    for name, found in numbers["escape"].items():
        style.compare(ax, name, RULES[name].label, (STARTS, found["theory"]),
                      (STARTS, found["measured"]))
    ax.set(xscale="log", ylim=(0, None))
    ax.legend(loc="upper right")
    worst = max(np.abs(f["measured"] / f["theory"] - 1).max() for f in numbers["escape"].values())
    ratio = numbers["escape"]["sgd"]["measured"] / numbers["escape"]["momentum"]["measured"]
    return Picture(
        "row2-escape", figure,
        "Lines: the growing eigenvalue of the linearised step. "
        f"Markers: measured, at most {100 * worst:.2f} % off. Momentum "
        f"leaves {ratio.min():.1f} to {ratio.max():.1f} times as fast.",
        "Escape time over initial distance, log axis: straight falling lines, SGD far above "
        "momentum and Nesterov, markers on the lines.",
    )


def _draw_well(numbers: dict[str, Any]) -> Picture:
    figure, ax = style.panel("A local minimum", "parameter x", "loss")
    x = np.linspace(-1.95, 1.75, 400)
    ax.plot(x, well_loss(x), color="#a8a8a8", linewidth=2.5, zorder=1)
    for name, lift in (("momentum", 0.09), ("sgd", 0.0)):
        path = numbers["well"][name][:400]
        ax.plot(path, well_loss(path) + lift, **style.line(
            name, linewidth=1.0, marker=style.MARKER[name], markersize=3.4, markevery=2,
            label=RULES[name].label))
        ax.plot(path[-1], well_loss(path[-1]) + lift, **style.dots(name, markersize=11))
    ax.set_ylim(-0.62, 1.5)
    ax.legend(loc="upper center")
    low, deep = (float(well_loss(np.array(numbers["well"][n][-1]))) for n in ("sgd", "momentum"))
    return Picture(
        "row2-well", figure,
        f"Both are let go at x = {number(WELL_START)}. SGD stops in the first dip, at a loss of "
        f"{number(low, 3)}; momentum with ρ = {WELL_MOMENTUM} rolls through and stops at "
        f"{number(deep, 3)}. (Momentum's path is lifted a little.)",
        "A curve with two dips. Black markers of SGD end in the left, higher dip; blue markers of "
        "momentum run through it, over the barrier, and end in the right, deeper dip.",
    )


def _draw_shares(numbers: dict[str, Any]) -> Picture:
    figure, ax = style.panel("Almost all are saddles", "dimension", "share of critical points")
    d = np.array([row["d"] for row in numbers["shares"]])
    share = np.array([row["saddle"] for row in numbers["shares"]])
    error = np.array([row["error"] for row in numbers["shares"]])
    for label, color, marker, mean, spread in (
        ("saddles", style.GRADIENT, "o", share, error),
        ("minima", style.GREY, "D", (1 - share) / 2, error / 2),   # as many as maxima
    ):
        ax.errorbar(d, mean, yerr=2 * spread, color=color, marker=marker, linewidth=1.2,
                    capsize=3, label=label)
    ax.plot(list(theory.SADDLE_SHARE), list(theory.SADDLE_SHARE.values()), "o", markersize=12,
            markerfacecolor="none", markeredgecolor="black", markeredgewidth=1.3, linestyle="none",
            label="exact, saddles")
    ax.set(ylim=(-0.03, 1.05), xticks=d)
    ax.legend(loc="center right")
    last = numbers["shares"][-1]
    return Picture(
        "row2-shares", figure,
        f"Critical points of a random function, sampled by their Hessians, ±2 s.e. In "
        f"{last['d']} dimensions {100 * last['saddle']:.1f} ± {200 * last['error']:.1f} % are "
        "saddles. What is left is halved between minima and maxima.",
        "Share of saddles over dimension: zero in one dimension, one half in two, three quarters "
        "in three, near one at eight. The share of minima falls towards zero.",
    )


def story(numbers: dict[str, Any]) -> Story:
    """Tell this row."""
    friction = numbers["friction"]
    escape = numbers["escape"]
    last = numbers["shares"][-1]
    share = {row["d"]: row["saddle"] for row in numbers["shares"]}
    return Story(
        "row-2", "Local minima and saddle points: where the gradient vanishes",
        "At a local minimum or a saddle point the gradient is zero and gradient descent gets "
        "stuck. Saddle points are much more common in high dimension. With velocity, like a ball "
        "rolling down, the point rolls past the saddle and out of the local minimum.",
        (
            "At a saddle one direction still leads down, so SGD is not stuck for ever: unless it "
            "sits exactly on the ridge it leaves, but by a factor of 1 + α·b a step, with b the "
            "downward curvature. Momentum compounds faster. The linearised step says how many "
            "steps it takes, and the engine takes that many.",
            "Through a local minimum it is the store of speed that counts. For small α momentum is "
            "a ball with friction, and a separate integration of that ball's equation of motion "
            f"says it tops the barrier up to a friction of {friction['theory']:.4f}. The engine, "
            f"bisected over ρ, gives {friction['measured']:.4f}.",
            "And saddles are what one meets: among the critical points of a random function in "
            f"{last['d']} dimensions all but {100 * (1 - last['saddle']):.1f} % are saddles.",
        ),
        "Velocity is a chance, not a guarantee. With more friction than "
        "that the ball stays in the local minimum as SGD does, and row 5 "
        "has starts from which velocity carries it out of the better one.",
        (
            ("SGD is slow at a saddle",
             f"{escape['sgd']['measured'][0]:.1f} steps to leave from 10⁻⁶",
             f"{escape['sgd']['theory'][0]:.1f}"),
            ("Velocity rolls past it", f"{escape['momentum']['measured'][0]:.1f} steps (Nesterov "
             f"{escape['nesterov']['measured'][0]:.1f})",
             f"{escape['momentum']['theory'][0]:.1f} ({escape['nesterov']['theory'][0]:.1f})"),
            ("Velocity rolls through a local minimum",
             f"up to a friction of {friction['measured']:.4f}", f"{friction['theory']:.4f}"),
            ("Saddles are nearly everywhere in high dimension",
             "shares in 2, 3 and 8 dimensions: " + ", ".join(
                 f"{share[d]:.3f}" for d in (2, 3, 8)),
             f"{theory.SADDLE_SHARE[2]:.3f}, {theory.SADDLE_SHARE[3]:.3f}, –"),
        ),
    )
