"""Row 5, Nesterov momentum: look ahead, change variables; what convexity buys, and what not."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

import optcore
from lecture import measure, saddles, style, theory
from lecture.claims import Check, Picture, Story, absolute, at_most, number, relative
from lecture.momentum import (
    ARROWS_LR,
    ARROWS_MOMENTUM,
    arrows_state,
    bowl_gradient,
    draw_ground,
)
from lecture.rules import RULES, Rule, Rules

FORMS, ARROWS = "Four ways to write one method", "The arrows"
CONVEX, CYCLE, WELLS = "Guarantee on convex losses", "Convex, and momentum fails", "Not convex"

WORST_SIZE = 2001      # twice the steps: information travels one coordinate a step
WORST_STEPS = 1000
CYCLE_L, CYCLE_START = 25.0, 3.3
WELL_STARTS = np.linspace(-2.2, 2.2, 881)


def look_ahead(rule: Rule, gradient: measure.Gradient, start: np.ndarray, *, lr: float,
               momentum: Callable[[int], float], steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Run the classical form: momentum, with the gradient taken where the velocity leads.

    Parameters
    ----------
    rule : Rule
        Momentum; the look-ahead is in the gradient's argument alone.
    gradient : callable
    start : array (n,)
    lr : float
    momentum : callable of the step count
        ρ, which the convex guarantee needs to grow.
    steps : int

    Returns
    -------
    points, looked_at : arrays (steps + 1, n)
        The iterates x, and the points x - α·ρ·v where the gradients were taken.
    """
    x = np.array(start, dtype=float)
    v = np.zeros_like(x)
    points, looked_at = [], []
    for k in range(steps + 1):
        ahead = x - lr * momentum(k) * v
        points.append(x.copy())
        looked_at.append(ahead)
        rule.step(x, gradient(ahead), v, lr, momentum(k))
    return np.array(points), np.array(looked_at)


def _forms(rules: Rules, lr: float = 0.05, rho: float = 0.9, steps: int = 400, seed: int = 2
           ) -> dict[str, np.ndarray]:
    """Run one smooth convex problem in every form; compare where the gradients are taken."""
    rng = np.random.default_rng(seed)
    matrix, shift = rng.standard_normal((40, 20)) / np.sqrt(40), rng.standard_normal(40)
    start = 3 * rng.standard_normal(20)

    def gradient(x: np.ndarray) -> np.ndarray:   # of Σ ln cosh(Ax - b)
        return np.tanh(matrix @ x - shift) @ matrix

    _, reference = look_ahead(rules["momentum"], gradient, start, lr=lr, momentum=lambda k: rho,
                              steps=steps)
    left = measure.trajectory(rules["nesterov"], gradient, start, lr=lr, momentum=rho, steps=steps)

    right, x, v = [start], start.copy(), np.zeros(20)
    literal, y, u = [start], start.copy(), np.zeros(20)
    for _ in range(steps):
        optcore.nesterov_step(x, gradient(x), v, lr=lr, momentum=rho, lr_in_velocity=True)
        right.append(x.copy())
        old = u
        u = rho * u - lr * gradient(y)
        y = y - rho * old + (1 + rho) * u   # as on the slide: the reference, not the engine
        literal.append(y)
    scale = np.abs(reference).max()
    return {
        name: np.abs(np.array(path) - reference).max(axis=1) / scale
        for name, path in (("α outside v (PyTorch)", left), ("α inside v (Keras)", right),
                           ("the lecture's line", literal))
    }


def _arrows(rules: Rules) -> dict[str, np.ndarray]:
    """Take both steps from the state of row 4's picture."""
    lr, rho = ARROWS_LR, ARROWS_MOMENTUM
    x, v = arrows_state(rules)
    ahead = x - lr * rho * v
    ends = {}
    for name, at in (("momentum", x), ("nesterov", ahead)):
        end, velocity = x.copy(), v.copy()
        rules["momentum"].step(end, bowl_gradient(at), velocity, lr, rho)
        ends[name] = end
    # The same step in the variables of the engine's Nesterov, where x̃ is the look-ahead point.
    shifted, velocity = ahead.copy(), v.copy()
    rules["nesterov"].step(shifted, bowl_gradient(ahead), velocity, lr, rho)
    return {"at": x, "velocity": ahead - x, "gradient": -lr * bowl_gradient(ahead),
            "momentum": ends["momentum"] - x, "step": ends["nesterov"] - x,
            "shifted_back": shifted + lr * rho * velocity - x}


def _worst(rules: Rules) -> dict[str, Any]:
    """Run Nesterov's worst function in the world against the bounds that are proven for it."""
    target = 1 - np.arange(1, WORST_SIZE + 1) / (WORST_SIZE + 1)
    distance = float(target @ target)

    def gradient(x: np.ndarray) -> np.ndarray:   # of ⅛(xᵀTx - 2x₁), T tridiagonal, so that L = 1
        g = 2 * x
        g[1:] -= x[:-1]
        g[:-1] -= x[1:]
        g[0] -= 1
        return g / 4

    def excess(points: np.ndarray) -> np.ndarray:
        e = points - target
        return (np.sum(np.diff(e, axis=1)**2, axis=1) + e[:, 0]**2 + e[:, -1]**2) / 8

    start = np.zeros(WORST_SIZE)
    sgd = measure.trajectory(rules["sgd"], gradient, start, lr=1.0, momentum=0.0, steps=WORST_STEPS)
    # ρ of step k -> k+1 is (k-1)/(k+2), with k counted from 1; below 0 is no momentum.
    nesterov, _ = look_ahead(rules["momentum"], gradient, start, lr=1.0,
                             momentum=lambda k: max(k - 1, 0) / (k + 2), steps=WORST_STEPS)
    k = np.arange(1, WORST_STEPS + 1)
    return {
        "step": k,
        "sgd": excess(sgd)[1:], "nesterov": excess(nesterov)[1:],
        "sgd_bound": distance / (2 * k), "nesterov_bound": 2 * distance / (k + 1)**2,
        # k steps reach k coordinates, and this is the best that those can do.
        "lower_bound": (1 / (k + 1) - 1 / (WORST_SIZE + 1)) / 8,
    }


def _kinked_gradient(x: np.ndarray) -> np.ndarray:
    """Return the gradient of the convex loss on which textbook momentum circles."""
    return np.where(x < 1, 25 * x, np.where(x < 2, x + 24, 25 * x - 24))


def _cycle(rules: Rules) -> dict[str, np.ndarray]:
    paths = {}
    for name, rule in rules.items():
        lr, rho = theory.textbook(name, CYCLE_L)
        paths[name] = measure.trajectory(rule, _kinked_gradient, np.array([CYCLE_START]),
                                         lr=lr / CYCLE_L, momentum=rho, steps=600)[:, 0]
    return paths


def _wells(rules: Rules) -> dict[str, Any]:
    """Let every rule go from many starts in row 2's double well."""
    points = saddles.well_points()
    ends = {
        name: measure.trajectory(rule, saddles.well_gradient, WELL_STARTS, lr=saddles.WELL_LR,
                                 momentum=saddles.WELL_MOMENTUM, steps=2500)[-1]
        for name, rule in rules.items()
    }
    inside = points["barrier"] < WELL_STARTS
    return {
        "ends": ends,
        "left": {name: float(np.mean(end[inside] < points["barrier"]))
                 for name, end in ends.items()},
        "found": {name: float(np.mean(end[~inside] > points["barrier"]))
                  for name, end in ends.items()},
    }


def measured(rules: Rules = RULES) -> dict[str, Any]:
    """Return every number of this row."""
    return {"forms": _forms(rules), "arrows": _arrows(rules), "worst": _worst(rules),
            "cycle": _cycle(rules), "wells": _wells(rules)}


def checks(numbers: dict[str, Any]) -> list[Check]:
    """Return this row's claims."""
    claims = [
        at_most(FORMS, f"Look-ahead form against {name}: largest relative difference",
                difference.max(), 1e-13, rests_on_momentum=True)
        for name, difference in numbers["forms"].items()
    ]
    a = numbers["arrows"]
    claims += [
        at_most(ARROWS, "Velocity + gradient ahead − actual step",
                np.abs(a["velocity"] + a["gradient"] - a["step"]).max(), 1e-14,
                rests_on_momentum=True),
        at_most(ARROWS, "The engine's step, variables changed back − actual step",
                np.abs(a["shifted_back"] - a["step"]).max(), 1e-14, rests_on_momentum=True),
    ]
    w = numbers["worst"]
    claims += [
        at_most(CONVEX, f"{RULES[name].label}: largest excess over its bound {bound}",
                (w[name] / w[f"{name}_bound"]).max(), 1.0)
        for name, bound in (("sgd", "LR²/2k"), ("nesterov", "2LR²/(k+1)²"))
    ]
    claims.append(at_most(CONVEX, "Bound below every gradient method over Nesterov's excess",
                          (w["lower_bound"] / w["nesterov"]).max(), 1.0))
    for found, expected in zip(np.sort(numbers["cycle"]["momentum"][-3:]),
                               np.sort(theory.heavy_ball_cycle()), strict=True):
        claims.append(relative(CYCLE, "Momentum circles through x =", found, expected, 1e-3,
                               rests_on_momentum=True))
    claims += [
        absolute(CYCLE, f"{RULES[name].label} arrives at x =", numbers["cycle"][name][-1], 0, 1e-6)
        for name in ("sgd", "nesterov")
    ]
    claims.append(absolute(WELLS, "SGD: share of starts in the global basin that leave it",
                           numbers["wells"]["left"]["sgd"], 0.0, 0.0))
    return claims


def figures(numbers: dict[str, Any]) -> list[Picture]:
    """Draw this row."""
    return [_draw_arrows(numbers), _draw_forms(numbers), _draw_worst(numbers),
            _draw_cycle(numbers), _draw_wells(numbers)]


def _draw_arrows(numbers: dict[str, Any]) -> Picture:
    figure, ax = style.panel("The Nesterov step", "", "")
    a = numbers["arrows"]
    draw_ground(ax, a["at"])
    ahead = a["at"] + a["velocity"]
    style.arrow(ax, a["at"], a["momentum"], style.GREY, linewidth=1.2, linestyle=":")
    style.arrow(ax, a["at"], a["velocity"], style.COLOR["nesterov"])
    style.arrow(ax, ahead, a["gradient"], style.GRADIENT)
    style.arrow(ax, a["at"], a["step"], style.COLOR["momentum"])
    ax.plot(*a["at"], "o", color="black", markersize=8, zorder=6)
    style.tag(ax, ahead, "velocity −αρv", style.COLOR["nesterov"], (-4, -16))
    style.tag(ax, ahead + a["gradient"] / 2, "gradient, taken ahead", style.GRADIENT, (14, -24),
              "left")
    style.tag(ax, a["at"] + a["step"], "actual step", style.COLOR["momentum"], (8, 4), "left")
    return Picture(
        "row5-arrows", figure,
        "The same point and velocity as in row 4. The gradient is taken where the velocity leads; "
        "the dotted arrow is momentum's step.",
        "Arrows on a contour map: green velocity, a vermilion gradient that starts at its tip, and "
        "the blue actual step to the gradient's tip.",
    )


def _draw_forms(numbers: dict[str, Any]) -> Picture:
    figure, ax = style.panel("Four forms, one sequence", "step", "difference / 2⁻⁵²")
    colors = (style.COLOR["nesterov"], style.COLOR["momentum"], style.GRADIENT)
    for (name, difference), color, dash in zip(numbers["forms"].items(), colors, ("-", "--", ":"),
                                               strict=True):
        ax.plot(difference / np.finfo(float).eps, color=color, linestyle=dash, linewidth=1.3,
                label=name)
    ax.set_ylim(0, None)
    ax.legend(loc="upper right")
    worst = max(d.max() for d in numbers["forms"].values()) / np.finfo(float).eps
    return Picture(
        "row5-forms", figure,
        "Differences from the look-ahead form, relative to the largest coordinate: at most "
        f"{worst:.1f} units of rounding (2⁻⁵²) in {len(difference) - 1} steps. "
        "The lecture's line is run as it stands on the slide, in NumPy; the rest is the engine.",
        "Differences between the forms over steps: a few units of rounding, not growing.",
    )


def _draw_worst(numbers: dict[str, Any]) -> Picture:
    figure, ax = style.panel("The worst convex function", "step k", "f(x) − f(x*)")
    w = numbers["worst"]
    for name in ("sgd", "nesterov"):
        ax.plot(w["step"], w[name], **style.line(name, label=RULES[name].label))
        ax.plot(w["step"], w[f"{name}_bound"], color=style.COLOR[name], linewidth=1, linestyle=":",
                label={"sgd": "its bound, LR²/2k", "nesterov": "its bound, 2LR²/(k+1)²"}[name])
    ax.fill_between(w["step"], w["lower_bound"], 1e-9, color="#dddddd", linewidth=0,
                    label="beyond any gradient method")
    ax.set(xscale="log", yscale="log", xlim=(1, WORST_STEPS), ylim=(2e-5, 5e5))
    ax.legend(loc="upper right", fontsize=10.5)
    return Picture(
        "row5-convex", figure,
        f"{WORST_SIZE} parameters, α = 1/L, ρ growing as (k−1)/(k+2). After {WORST_STEPS} steps "
        f"SGD is at {number(w['sgd'][-1], 2)}, Nesterov at {number(w['nesterov'][-1], 2)}; no "
        "method that adds up gradients can be in the grey.",
        "Log-log plot of the loss over steps. SGD and Nesterov stay below their dotted bounds; "
        "Nesterov comes close to the grey area that no gradient method can reach.",
    )


def _draw_cycle(numbers: dict[str, Any]) -> Picture:
    figure, ax = style.panel("Convex, and momentum never arrives", "step", "x (the minimum is 0)")
    for name in ("momentum", "sgd", "nesterov"):
        ax.plot(numbers["cycle"][name][:41], **style.line(
            name, linewidth=1.3, marker=style.MARKER[name], markersize=4, label=RULES[name].label))
    for x in theory.heavy_ball_cycle():
        ax.axhline(x, color=style.COLOR["momentum"], linewidth=0.8, linestyle=":")
    ax.set_ylim(-4.9, 4.6)
    ax.legend(loc="upper right", ncols=3, columnspacing=1.0, handlelength=1.6)
    points = ", ".join(number(x, 4) for x in numbers["cycle"]["momentum"][-3:])
    return Picture(
        "row5-cycle", figure,
        f"A convex loss with curvatures from 1 to 25; each rule at its textbook optimum. "
        f"Momentum circles through {points} for ever (dotted: theory). Nesterov, whose guarantee "
        "covers every convex loss, arrives.",
        "x over steps: momentum jumps between three "
        "values for ever; SGD and Nesterov settle at zero.",
    )


def _draw_wells(numbers: dict[str, Any]) -> Picture:
    figure, ax = style.panel("Not convex: no promise", "start", "end")
    points = saddles.well_points()
    ax.axvline(points["barrier"], color=style.GREY, linewidth=1, linestyle=":")
    for row, name in enumerate(RULES):
        good = numbers["wells"]["ends"][name] > points["barrier"]
        ax.scatter(WELL_STARTS, np.where(good, 1, 0) + 0.16 * (1 - row), s=9, linewidths=0,
                   color=style.COLOR[name], marker=style.MARKER[name], label=RULES[name].label)
    ax.set(yticks=[0, 1], yticklabels=["local\nminimum", "global\nminimum"], ylim=(-0.5, 1.75))
    ax.text(points["barrier"], -0.42, " barrier", color="#555555", fontsize=10.5)
    ax.legend(loc="upper left", ncols=3, columnspacing=1.0, handletextpad=0.2, markerscale=2.2)
    wells = numbers["wells"]
    return Picture(
        "row5-wells", figure,
        f"Row 2's double well from {WELL_STARTS.size} starts, α = {saddles.WELL_LR}, ρ = "
        f"{saddles.WELL_MOMENTUM}. Of the starts in the better basin SGD leaves "
        f"{100 * wells['left']['sgd']:.0f} %, momentum {100 * wells['left']['momentum']:.0f} %, "
        f"Nesterov {100 * wells['left']['nesterov']:.0f} %; of those in the worse, they find out "
        f"in {100 * wells['found']['sgd']:.0f} %, {100 * wells['found']['momentum']:.0f} % and "
        f"{100 * wells['found']['nesterov']:.0f} %.",
        "For each start, whether a rule ends in the local or in the global "
        "minimum. SGD's answer is the basin it starts in; momentum's and "
        "Nesterov's alternate with the speed they arrive at.",
    )


def story(numbers: dict[str, Any]) -> Story:
    """Tell this row."""
    wells = numbers["wells"]
    forms = max(difference.max() for difference in numbers["forms"].values())
    worst = (numbers["worst"]["nesterov"] / numbers["worst"]["nesterov_bound"]).max()
    return Story(
        "row-5", "Nesterov: look ahead along the velocity",
        "Instead of the gradient at the current point, take it at the point "
        "where the velocity would lead, then combine. A change of variables "
        "x̃ = x + ρ·v lets one evaluate loss and gradient at the same point. "
        "Excellent for convex problems; no guarantee for non-convex ones.",
        (
            "If the velocity is about to carry the ball too far, the gradient out there "
            "already points back. Classically the gradient is taken at x + ρ·v, which is "
            "awkward where loss and gradient come together. In x̃ it is <code>v = ρ·v − "
            "α·g; x̃ = x̃ + ρ·v − α·g</code>, which is the lecture's <code>−ρ·v_old + "
            "(1+ρ)·v</code> rearranged. All forms give the same points to rounding.",
            "For convex losses there is a theorem, 2LR²/(k+1)², and no method "
            "that uses gradients alone can do better than a constant below it. "
            "Plain momentum has no such theorem: on a convex loss with two "
            "kinks in its gradient, textbook-optimal momentum circles for ever.",
        ),
        "Where the loss is not convex Nesterov promises nothing, as the lecture warns: in the "
        f"double well it carries {100 * wells['left']['nesterov']:.0f} % of the starts out of the "
        f"better minimum, momentum {100 * wells['left']['momentum']:.0f} %, "
        f"SGD {100 * wells['left']['sgd']:.0f} %.",
        (
            ("The change of variables gives the same method",
             f"forms differ by at most {number(forms, 1)}", "0, up to rounding"),
            ("Excellent for convex problems",
             f"at most {worst:.3f} of the bound 2LR²/(k+1)²", "at most 1"),
            ("– where momentum can fail", "momentum circles through " + ", ".join(
                number(x, 4) for x in np.sort(numbers["cycle"]["momentum"][-3:])),
             ", ".join(number(x, 4) for x in np.sort(theory.heavy_ball_cycle()))),
            ("No guarantee for non-convex ones",
             f"{100 * wells['left']['nesterov']:.0f} % of starts leave the better minimum", "–"),
        ),
    )
