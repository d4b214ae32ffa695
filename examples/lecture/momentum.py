"""Row 4, SGD with momentum: velocity as a running mean of gradients, ρ as friction."""
from __future__ import annotations

from typing import Any

import numpy as np

from lecture import style
from lecture.claims import Check, Picture, Story, at_most, number, relative
from lecture.rules import RULES, Rules

MOMENTA = (0.5, 0.9, 0.99)
BOWL = np.array([0.15, 1.0])          # curvatures of the arrows' loss
ARROWS_AT, ARROWS_LR, ARROWS_MOMENTUM = 3, 0.35, 0.8
MEAN, FRICTION, VECTORS = "A running mean", "Friction", "The three arrows"


def bowl_gradient(x: np.ndarray) -> np.ndarray:
    """Return the gradient of the arrows' loss."""
    return BOWL * x


def arrows_state(rules: Rules) -> tuple[np.ndarray, np.ndarray]:
    """Return (x, v) a few steps into a run: where both arrow pictures, rows 4 and 5, are drawn."""
    x, v = np.array([-3.0, 1.15]), np.zeros(2)
    for _ in range(ARROWS_AT):
        rules["momentum"].step(x, bowl_gradient(x), v, ARROWS_LR, ARROWS_MOMENTUM)
    return x, v


def _arrows(rules: Rules) -> dict[str, np.ndarray]:
    """Take one step from there and return the vectors that went into it."""
    x, v = arrows_state(rules)
    before, g = x.copy(), bowl_gradient(x)
    arrows = {"at": before, "velocity": -ARROWS_LR * ARROWS_MOMENTUM * v,
              "gradient": -ARROWS_LR * g}
    rules["momentum"].step(x, g, v, ARROWS_LR, ARROWS_MOMENTUM)
    return {**arrows, "step": x - before}


def _unrolled(rules: Rules, momentum: float, steps: int = 300, seed: int = 1) -> float:
    """Compare the velocity with Σ ρⁱ·g_{k-i}, written out; the largest relative difference."""
    gradients = np.random.default_rng(seed).standard_normal((steps, 50))
    x, v = np.zeros(50), np.zeros(50)
    for g in gradients:
        rules["momentum"].step(x, g, v, 0.1, momentum)
    written_out = momentum ** np.arange(steps)[::-1] @ gradients
    return float(np.abs(v - written_out).max() / np.abs(written_out).max())


def _speeds(rules: Rules, momentum: float, push: int = 2000) -> dict[str, Any]:
    """Push with a gradient of 1 until the speed is terminal, then let the ball coast."""
    x, v = np.zeros(1), np.zeros(1)
    speed = []
    for k in range(2 * push):
        before = x[0]
        rules["momentum"].step(x, np.array([1.0 if k < push else 0.0]), v, 1.0, momentum)
        speed.append(before - x[0])
    speed = np.array(speed)
    coasting = speed[push - 1:]
    half = int(np.argmax(coasting < coasting[0] / 2))
    between = np.log(coasting[half - 1] / (coasting[0] / 2)) / np.log(
        coasting[half - 1] / coasting[half])
    return {"momentum": momentum, "speed": speed, "push": push, "terminal": speed[push - 1],
            "terminal_theory": 1 / (1 - momentum), "half": half - 1 + between,
            "half_theory": np.log(0.5) / np.log(momentum)}


def _weights(rules: Rules, momentum: float, steps: int = 60) -> np.ndarray:
    """Return what is left of one gradient of 1 in the velocity, step by step."""
    x, v = np.zeros(1), np.zeros(1)
    left = []
    for k in range(steps):
        rules["momentum"].step(x, np.array([float(k == 0)]), v, 1.0, momentum)
        left.append(v[0])
    return np.array(left)


def measured(rules: Rules = RULES) -> dict[str, Any]:
    """Return every number of this row."""
    return {
        "arrows": _arrows(rules),
        "unrolled": {rho: _unrolled(rules, rho) for rho in MOMENTA},
        "speeds": [_speeds(rules, rho) for rho in MOMENTA],
        "weights": {rho: _weights(rules, rho) for rho in MOMENTA},
    }


def checks(numbers: dict[str, Any]) -> list[Check]:
    """Return this row's claims."""
    arrows = numbers["arrows"]
    gap = np.abs(arrows["velocity"] + arrows["gradient"] - arrows["step"]).max()
    claims = [
        at_most(MEAN, f"v against Σ ρⁱ·g, relative difference, ρ = {rho}", difference, 1e-13,
                rests_on_momentum=True)
        for rho, difference in numbers["unrolled"].items()
    ]
    for s in numbers["speeds"]:
        claims += [
            relative(FRICTION, f"Terminal speed over α·g, 1/(1−ρ), ρ = {s['momentum']}",
                     s["terminal"], s["terminal_theory"], 1e-3, rests_on_momentum=True),
            relative(FRICTION, f"Half-life of the speed, ln ½ / ln ρ, ρ = {s['momentum']}",
                     s["half"], s["half_theory"], 1e-3, rests_on_momentum=True),
        ]
    claims.append(at_most(VECTORS, "Gradient + velocity − actual step", gap, 1e-14,
                          rests_on_momentum=True))
    return claims


def draw_ground(ax: Any, at: np.ndarray) -> None:
    """Draw the contours that both arrow pictures stand on, around a point."""
    x = at[0] + 0.25 + np.linspace(-0.62, 0.62, 160)
    y = at[1] - 0.15 + np.linspace(-0.42, 0.42, 160)
    gx, gy = np.meshgrid(x, y)
    style.contours(ax, gx, gy, (BOWL[0] * gx**2 + BOWL[1] * gy**2) / 2, levels=14)
    # Equal aspect, so that gradients stand upright on contour lines.
    ax.set(xlim=x[[0, -1]], ylim=y[[0, -1]], aspect="equal", xticks=[], yticks=[])


def figures(numbers: dict[str, Any]) -> list[Picture]:
    """Draw this row."""
    return [_draw_arrows(numbers), _draw_weights(numbers), _draw_speed(numbers)]


def _draw_arrows(numbers: dict[str, Any]) -> Picture:
    figure, ax = style.panel("The momentum step", "", "")
    a = numbers["arrows"]
    draw_ground(ax, a["at"])
    style.arrow(ax, a["at"], a["velocity"], style.COLOR["nesterov"])
    style.arrow(ax, a["at"], a["gradient"], style.GRADIENT)
    style.arrow(ax, a["at"], a["step"], style.COLOR["momentum"])
    for part in ("velocity", "gradient"):
        other = a["gradient" if part == "velocity" else "velocity"]
        ax.plot(*np.stack([a["at"] + a[part], a["at"] + a[part] + other]).T, color=style.GREY,
                linewidth=1, linestyle=":")
    ax.plot(*a["at"], "o", color="black", markersize=8, zorder=6)
    style.tag(ax, a["at"] + a["velocity"], "velocity −αρv", style.COLOR["nesterov"], (0, -16))
    style.tag(ax, a["at"] + a["gradient"], "gradient −αg", style.GRADIENT, (0, 8))
    style.tag(ax, a["at"] + a["step"], "actual step", style.COLOR["momentum"], (8, -4), "left")
    return Picture(
        "row4-arrows", figure,
        f"Step {ARROWS_AT + 1} of a run, α = {ARROWS_LR}, ρ = {ARROWS_MOMENTUM}. The blue arrow is "
        "what the engine did; it is the sum of the other two.",
        "Three arrows from one point on a contour map: green velocity, vermilion gradient, and "
        "blue actual step as the diagonal of their parallelogram.",
    )


def _draw_weights(numbers: dict[str, Any]) -> Picture:
    figure, ax = style.panel("What is left of a gradient", "steps ago", "weight in the velocity")
    for (rho, left), alpha in zip(numbers["weights"].items(), (0.4, 1.0, 0.7), strict=True):
        ax.plot(left, color=style.COLOR["momentum"], alpha=alpha,
                marker={0.5: "v", 0.9: "s", 0.99: "D"}[rho], markersize=4, linewidth=1.2,
                markevery=2, label=f"ρ = {rho}")
    ax.set_ylim(0, 1.05)
    ax.legend(loc="upper right", bbox_to_anchor=(1, 0.5))
    left = numbers["weights"]
    return Picture(
        "row4-weights", figure,
        "A single gradient of 1, then none. After ten steps "
        + ", ".join(f"{left[rho][10]:.3g} (ρ = {rho})" for rho in left) + " of it is left.",
        "Weight of a gradient in the velocity over its age: exponential decay, gone within a few "
        "steps at ρ = 0.5, within forty at 0.9, hardly begun at 0.99.",
    )


def _draw_speed(numbers: dict[str, Any]) -> Picture:
    figure, ax = style.panel("Pushed, then let go", "step", "speed, in units of α·g")
    before, after = 150, 350
    for s, alpha in zip(numbers["speeds"], (0.4, 1.0, 0.7), strict=True):
        run = np.concatenate([s["speed"][:before + 350], s["speed"][s["push"]:s["push"] + after]])
        ax.plot(run, color=style.COLOR["momentum"], alpha=alpha,
                linestyle={0.5: ":", 0.9: "-", 0.99: "-."}[s["momentum"]],
                label=f"ρ = {s['momentum']}: {s['terminal']:.4g}×, half-life {s['half']:.3g}")
    ax.set(yscale="log", ylim=(0.5, 4000), yticks=[1, 10, 100],
           yticklabels=["1", "10", "100"])
    ax.legend(loc="upper left", title="terminal speed and half-life", alignment="left")
    return Picture(
        "row4-speed", figure,
        f"A constant gradient for {before + 350} steps, then none. ρ = 0.9 reaches ten times SGD's "
        "step, 0.99 a hundred times; with friction 1−ρ the speed then dies away.",
        "Speed over steps on a log scale: curves rise to "
        "2, 10 and 100 and decay after the push ends.",
    )


def story(numbers: dict[str, Any]) -> Story:
    """Tell this row."""
    speeds = {s["momentum"]: s for s in numbers["speeds"]}
    return Story(
        "row-4", "SGD with momentum: build up velocity",
        "Velocity is a running mean of gradients; ρ gives friction, typically 0.9 or 0.99. We step "
        "in the direction of the velocity, not of the raw gradient: the actual step is a weighted "
        "sum of the gradient and velocity vectors.",
        (
            "<code>v = ρ·v + g; x = x − α·v</code>. Written out, v is Σ ρⁱ·g₋ᵢ: every "
            "gradient counts, older ones less. It is a running <em>sum</em> rather than a "
            f"mean, which is why a steady gradient is amplified {speeds[0.9]['terminal']:.0f} "
            f"times at ρ = 0.9 and {speeds[0.99]['terminal']:.0f} times at 0.99. When tuning, "
            "lower α along with 1−ρ.",
            "1−ρ is the share of the speed that friction takes at each step. Without a gradient "
            f"the speed halves in {speeds[0.9]['half']:.1f} steps at ρ = 0.9, in "
            f"{speeds[0.99]['half']:.0f} at 0.99.",
        ),
        "",
        (
            ("Velocity is a running mean of gradients",
             f"differs from Σ ρⁱ·g by at most {number(max(numbers['unrolled'].values()), 1)}",
             "0, up to rounding"),
            ("ρ is friction", "speed halves in "
             f"{speeds[0.9]['half']:.3f} steps at ρ = 0.9, {speeds[0.99]['half']:.2f} at 0.99",
             f"{speeds[0.9]['half_theory']:.3f}, {speeds[0.99]['half_theory']:.2f}"),
            ("The step is the sum of gradient and velocity", "arrows of the engine's own step add "
             "up to rounding", "exactly"),
        ),
    )
