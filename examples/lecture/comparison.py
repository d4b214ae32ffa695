"""Row 6, the comparison picture: three rules race, two overshoot, one less than the other."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from lecture import measure, style, theory
from lecture.claims import Check, Picture, Story, at_most, number, relative
from lecture.rules import RULES, Rules

ANGLE = np.deg2rad(28)
CURVATURES = np.array([0.1, 1.0])
LR, MOMENTUM, STEPS = 0.4, 0.9, 70
GRID_LR = (0.01, 0.03, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3)   # times 1/L
GRID_MOMENTUM = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99)
GRID_KAPPA = np.array([1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0])
ACROSS, UP = (-5.1, 3.3), (-3.3, 2.6)   # of the picture
OVERSHOOT, CLAIM = "First overshoot, as a share of the start", "Nesterov overshoots less"

_TURN = np.array([[np.cos(ANGLE), -np.sin(ANGLE)], [np.sin(ANGLE), np.cos(ANGLE)]])
START = _TURN @ [-4.4, 1.5]
HESSIAN = _TURN @ np.diag(CURVATURES) @ _TURN.T


def loss(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the tilted bowl's loss."""
    points = np.stack([x, y], axis=-1)
    return np.einsum("...i,ij,...j->...", points, HESSIAN, points) / 2


def _overshoots(rules: Rules) -> dict[str, np.ndarray]:
    """Measure the first overshoot of an eigen-direction of curvature 1/κ, over α, ρ and κ.

    κ = 1 is the steep direction itself. A rule starts at 1, at rest, so where the gradient is taken
    is where the ball is: x̃ and x agree there.
    """
    shape = (len(GRID_LR), len(GRID_MOMENTUM), GRID_KAPPA.size)
    found = {name: np.zeros(shape) for name in ("momentum", "nesterov", "nesterov_ball")}
    for i, lr in enumerate(GRID_LR):
        for j, rho in enumerate(GRID_MOMENTUM):
            for name in ("momentum", "nesterov"):
                path = measure.trajectory(rules[name], lambda x: x / GRID_KAPPA,
                                          np.ones(GRID_KAPPA.size), lr=lr, momentum=rho,
                                          steps=_grid_steps(lr))
                found[name][i, j] = measure.first_overshoot(path)
                if name == "nesterov":
                    found["nesterov_ball"][i, j] = measure.first_overshoot(_ball(path, lr))
    return found


def _grid_steps(lr: float) -> int:
    """Return more steps than half a swing takes in the shallowest direction, π/√(αλ)."""
    return int(8 / np.sqrt(lr / GRID_KAPPA[-1]))


def _ball(path: np.ndarray, lr: float) -> np.ndarray:
    """Return the classical iterates x of a Nesterov run in x̃: a plain gradient step from each.

    x_{k+1} = x̃_k - α·f'(x̃_k), which is what the look-ahead form's step amounts to.
    """
    return path * (1 - lr / GRID_KAPPA)


def _map(rules: Rules) -> dict[str, np.ndarray]:
    """Measure the overshoots over αλ and ρ, which is all that a quadratic depends on."""
    product = np.concatenate([np.geomspace(0.003, 0.5, 40), np.linspace(0.52, 1.3, 40)])
    momenta = np.linspace(0.3, 0.98, 35)
    found = {name: np.empty((momenta.size, product.size)) for name in ("momentum", "nesterov")}
    for j, rho in enumerate(momenta):
        for name, overshoot in found.items():
            path = measure.trajectory(rules[name], lambda x: product * x, np.ones(product.size),
                                      lr=1.0, momentum=rho, steps=120)
            overshoot[j] = measure.first_overshoot(path)
    return {"product": product, "momenta": momenta, **found}


def _racing(rules: Rules) -> dict[str, dict[str, Any]]:
    race = {}
    for name, rule in rules.items():
        path = measure.trajectory(rule, lambda x: HESSIAN @ x, START, lr=LR, momentum=MOMENTUM,
                                  steps=STEPS)
        along = path @ _TURN / (START @ _TURN)   # in eigen-directions, as shares of the start
        race[name] = {
            "path": path,
            "loss": loss(*path.T),
            "overshoot": measure.first_overshoot(along),
            "theory": measure.first_overshoot(
                theory.modes(name, LR, MOMENTUM, CURVATURES, STEPS)),
        }
    return race


def measured(rules: Rules = RULES) -> dict[str, Any]:
    """Return every number of this row."""
    grid = _overshoots(rules)
    larger = grid["nesterov"] > grid["momentum"] * (1 + 1e-9)
    at = np.broadcast_to(np.array(GRID_LR)[:, None, None], larger.shape)
    product = at / GRID_KAPPA
    where = {
        "points": larger.size,
        "larger": int(larger.sum()),
        "beyond": int((product > 1).sum()),
        "larger_beyond": int(larger[product > 1].sum()),
        "worst": float(np.max(grid["nesterov"] - grid["momentum"])),
        "within": int((product <= 1).sum()),
        "larger_within": int(larger[product <= 1].sum()),
        "ball_larger": int((grid["nesterov_ball"] > grid["momentum"] * (1 + 1e-9)).sum()),
    }
    return {"race": _racing(rules), "grid": grid, "where": where, "map": _map(rules)}


def checks(numbers: dict[str, Any]) -> list[Check]:
    """Return this row's claims."""
    claims = []
    for name in ("momentum", "nesterov"):
        race = numbers["race"][name]
        claims += [
            relative(OVERSHOOT, f"{RULES[name].label}, along the {axis} axis",
                     race["overshoot"][i], race["theory"][i], 0.01, rests_on_momentum=True)
            for i, axis in ((0, "shallow"), (1, "steep"))
        ]
    claims += _grid_checks(numbers["grid"])
    slow = numbers["race"]
    claims += [
        at_most(CLAIM, "In the picture: Nesterov's overshoot over momentum's, shallow axis",
                slow["nesterov"]["overshoot"][0] / slow["momentum"]["overshoot"][0], 1.0),
        at_most(CLAIM, "Grid points with α·λ ≤ 1 where Nesterov's is larger, of "
                f"{numbers['where']['within']}", numbers["where"]["larger_within"], 0),
        at_most(CLAIM, "Grid points, any α, where the look-ahead form's x overshoots more than "
                f"momentum's, of {numbers['where']['points']}", numbers["where"]["ball_larger"], 0),
    ]
    return claims


def _grid_checks(grid: dict[str, np.ndarray]) -> list[Check]:
    """Compare the whole grid with the characteristic recursion, by the worst deviation."""
    claims = []
    for name in ("momentum", "nesterov"):
        worst = 0.0
        for i, lr in enumerate(GRID_LR):
            for j, rho in enumerate(GRID_MOMENTUM):
                expected = measure.first_overshoot(
                    theory.modes(name, lr, rho, 1 / GRID_KAPPA, _grid_steps(lr)))
                worst = max(worst, float(np.abs(grid[name][i, j] - expected).max()))
        claims.append(at_most(OVERSHOOT, f"{RULES[name].label}: largest deviation on the grid of "
                              f"{grid[name].size} points", worst, 1e-9, rests_on_momentum=True))
    return claims


def figures(numbers: dict[str, Any]) -> list[Picture]:
    """Draw this row."""
    return [_draw_race(numbers), _draw_loss(numbers), _draw_map(numbers)]


def stage(title: str) -> tuple[Any, Any]:
    """Return a figure of the bowl, on which this row's race and the next one's are run."""
    figure, ax = style.panel(title, "", "")
    x, y = np.meshgrid(np.linspace(*ACROSS, 240), np.linspace(*UP, 240))
    style.contours(ax, x, y, loss(x, y), levels=13)
    ax.plot(0, 0, "*", color=style.GRADIENT, markersize=16, markeredgecolor="white", zorder=5)
    ax.set(xlim=ACROSS, ylim=UP, xticks=[], yticks=[])
    for spine in ax.spines.values():
        spine.set_visible(False)
    return figure, ax


def _draw_race(numbers: dict[str, Any]) -> Picture:
    figure, ax = stage("SGD, momentum, Nesterov")
    for name, race in numbers["race"].items():
        style.path(ax, name, RULES[name].label, race["path"])
    ax.legend(loc="upper left")
    share = {name: 100 * race["overshoot"][0] for name, race in numbers["race"].items()}
    return Picture(
        "row6-race", figure,
        f"α = {LR}/L, ρ = {MOMENTUM}, κ = {CURVATURES[1] / CURVATURES[0]:.0f}, {STEPS} steps. "
        f"Along the valley momentum overshoots by {share['momentum']:.0f} % of its way, Nesterov "
        f"by {share['nesterov']:.0f} %, SGD by {share['sgd']:.0f} %.",
        "The lecture's picture: on a tilted bowl the black path of "
        "SGD is slow, the blue of momentum and the green of Nesterov "
        "overshoot the minimum and come back, Nesterov's less far.",
        animated=True,
    )


def _draw_loss(numbers: dict[str, Any]) -> Picture:
    figure, ax = style.panel("The same race, by its loss", "step", "loss")
    for name, race in numbers["race"].items():
        ax.plot(race["loss"], **style.line(name, label=RULES[name].label))
    ax.set(yscale="log", xlim=(0, STEPS))
    ax.legend(loc="lower left")
    ends = ", ".join(f"{RULES[name].label} {number(race['loss'][-1], 2)}"
                     for name, race in numbers["race"].items())
    return Picture(
        "row6-loss", figure,
        f"After {STEPS} steps: {ends}. Overshooting costs less than crawling.",
        "Loss over steps on a log scale: SGD falls slowly and smoothly; momentum and Nesterov fall "
        "in waves, Nesterov fastest.",
    )


def _draw_map(numbers: dict[str, Any]) -> Picture:
    figure, ax = style.panel("Who overshoots less?", "α·λ = α·L/κ in that direction", "momentum ρ")
    m, where = numbers["map"], numbers["where"]
    difference = m["momentum"] - m["nesterov"]
    limit = np.abs(difference).max()
    # Green where Nesterov overshoots less, blue where momentum does: the winner's own colour.
    colors = style.between(style.COLOR["momentum"], style.COLOR["nesterov"])
    mesh = ax.pcolormesh(m["product"], m["momenta"], difference, cmap=colors, vmin=-limit,
                         vmax=limit, shading="gouraud", rasterized=True)
    ax.contour(m["product"], m["momenta"], difference, levels=[-1e-9], colors="black",
               linewidths=1.2)
    ax.set_xscale("log")
    ax.grid(visible=False)
    bar = figure.colorbar(mesh, ax=ax, pad=0.02, aspect=30)
    bar.set_label("momentum's − Nesterov's overshoot", fontsize=11)
    bar.outline.set_visible(False)
    return Picture(
        "row6-map", figure,
        f"Green: Nesterov overshoots less; blue, right of the line: more. On the grid of "
        f"{where['points']} combinations of α, ρ and κ it overshoots more in {where['larger']}, "
        f"{where['larger_beyond']} of them with α·λ > 1 (of {where['beyond']} such), by up to "
        f"{where['worst']:.2f} of the start.",
        "Map over learning rate and momentum: green nearly everywhere, where Nesterov overshoots "
        "less; a blue region at the right edge, close to Nesterov's edge of stability, where it "
        "overshoots more.",
    )


def animate(numbers: dict[str, Any], file: Path, frames_per_second: int = 18) -> None:
    """Write the race as an endless GIF: every frame a step, and a pause at the end."""
    from matplotlib.animation import FuncAnimation, PillowWriter
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure, ax = stage("SGD, momentum, Nesterov")
    FigureCanvasAgg(figure)
    lines, heads = {}, {}
    for name in numbers["race"]:
        (lines[name],) = ax.plot([], [], **style.line(name, linewidth=1.6,
                                                      label=RULES[name].label))
        (heads[name],) = ax.plot([], [], **style.dots(name, markersize=10, zorder=6))
    step = ax.text(0.97, 0.03, "", transform=ax.transAxes, color="#444444",
                   ha="right")
    ax.legend(loc="upper left")

    def draw(k: int) -> list[Any]:
        for name, race in numbers["race"].items():
            lines[name].set_data(*race["path"][:k + 1].T)
            heads[name].set_data(*race["path"][[k]].T)
        step.set_text(f"step {k}")
        return [*lines.values(), *heads.values(), step]

    draw(STEPS)
    style.freeze(figure)
    frames = [*range(STEPS + 1), *[STEPS] * frames_per_second]
    animation = FuncAnimation(figure, draw, frames=frames, blit=False)
    animation.save(file, writer=PillowWriter(fps=frames_per_second), dpi=110)


def story(numbers: dict[str, Any]) -> Story:
    """Tell this row."""
    race, where = numbers["race"], numbers["where"]
    ends = {name: number(run["loss"][-1], 2) for name, run in race.items()}
    return Story(
        "row-6", "The picture: slow, overshoot, overshoot less",
        "SGD is slow. Momentum and Nesterov overshoot the minimum because of the velocity they "
        "have built up, then correct and converge faster. Nesterov overshoots less.",
        (
            "All three take the same α from the same start. On this bowl the "
            "lecture's picture comes out as drawn: momentum swings "
            f"{100 * race['momentum']['overshoot'][0]:.0f} % of its way past the "
            f"minimum, Nesterov {100 * race['nesterov']['overshoot'][0]:.0f} %.",
            "Is that so in general? On a quadratic the overshoot depends on α·λ and ρ alone, so "
            "one map holds every case. As long as α·λ ≤ 1, Nesterov's first overshoot is larger in "
            f"{where['larger_within']} of the {where['within']} combinations on our grid.",
        ),
        f"Nearly always, not always. In {where['larger']} of {where['points']} combinations "
        f"Nesterov overshoots more, by up to {where['worst']:.2f} of the start, "
        f"{where['larger_beyond']} of those where α·λ > 1: its first step is 1+ρ times SGD's and "
        "jumps across a steep valley. That is true of x̃, where the gradients are taken and a "
        "network's loss is read. The classical x "
        f"overshoots more than momentum in {where['ball_larger']} combinations.",
        (
            ("SGD is slow", f"loss after {STEPS} steps {ends['sgd']}, momentum "
             f"{ends['momentum']}, Nesterov {ends['nesterov']}",
             "–"),
            ("Momentum overshoots", f"{race['momentum']['overshoot'][0]:.4f} of its way",
             f"{race['momentum']['theory'][0]:.4f}"),
            ("Nesterov overshoots less", f"{race['nesterov']['overshoot'][0]:.4f}; more in "
             f"{where['larger']} of {where['points']} combinations, those with α·λ > 1",
             f"{race['nesterov']['theory'][0]:.4f}"),
        ),
    )
