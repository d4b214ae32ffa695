"""Row 1, ill-conditioning: why SGD zigzags and crawls, and what momentum does about it."""
from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from lecture import measure, style, theory
from lecture.claims import Check, Picture, Story, absolute, at_most, number, relative, within_errors
from lecture.rules import RULES, Rule, Rules

KAPPAS = tuple(10.0**e for e in range(1, 7))
ACCURACY = 1e-6
SHELL = np.array([1.0, 0.02])        # curvatures of the taco shell: steep, shallow
SHELL_MOMENTUM = 0.8
SHELL_START = np.array([0.55, -1.0])
STEEP_LR = 1.8                       # times the steep curvature: inside SGD's edge at 2
EDGE_CURVATURE = 4.0
ASYMPTOTIC = 40   # parameters from which a theorem for large n is compared
RATES, COUNTS = "Contraction per step, as rate −ln r", "Steps to a fixed accuracy"
EDGES, ZIGZAG, SIZE = "Edge of stability", "Zigzag", "Imbalance grows with size"


def settings(rule: str, kappa: float) -> dict[str, tuple[float, float]]:
    """Return the (lr, momentum) under test for eigenvalues in [1/kappa, 1], by name."""
    chosen = {"textbook": theory.textbook(rule, kappa)}
    if rule == "sgd":
        return {**chosen, "α = 0.1": (0.1, 0.0)}
    if rule == "nesterov":
        chosen["best on quadratics"] = theory.nesterov_on_quadratics(kappa)
    return {**chosen, "α = 0.1, ρ = 0.9": (0.1, 0.9), "α = 0.1, ρ = 0.99": (0.1, 0.99)}


def _rates(rules: Rules) -> list[dict[str, Any]]:
    """Measure every rule, condition number and setting; the slowest eigenvalue sets the rate."""
    rows = []
    for name, rule in rules.items():
        for kappa in KAPPAS:
            spectrum = measure.spectrum(kappa)
            for setting, (lr, momentum) in settings(name, kappa).items():
                slowest = measure.contraction(rule, spectrum, lr=lr, momentum=momentum).max()
                predicted = theory.contraction(name, lr, momentum, spectrum).max()
                rows.append({"rule": name, "kappa": kappa, "setting": setting,
                             "measured": -np.log(slowest), "theory": -np.log(predicted)})
    return rows


def _counts(rules: Rules) -> dict[str, dict[str, Any]]:
    """Count steps to a fixed accuracy. SGD stops at κ = 1e5, where it takes 700 000 of them."""
    counts = {}
    for name, rule in rules.items():
        kappas = np.array([k for k in KAPPAS if 100 <= k <= (1e5 if name == "sgd" else 1e6)])
        steps = []
        for kappa in kappas:
            lr, momentum = theory.textbook(name, kappa)
            steps.append(measure.steps_to(rule, measure.spectrum(kappa), lr=lr, momentum=momentum,
                                          accuracy=ACCURACY))
        counts[name] = {"kappa": kappas, "steps": np.array(steps),
                        "exponent": measure.exponent(kappas, steps)}
    return counts


def _edges(rules: Rules) -> list[dict[str, Any]]:
    cases = [("sgd", 0.0)]
    cases += [(name, rho) for name in ("momentum", "nesterov") for rho in (0.5, 0.9, 0.99)]
    return [
        {"rule": name, "momentum": rho,
         "measured": measure.stability_edge(rules[name], EDGE_CURVATURE, momentum=rho),
         "theory": theory.stability_edge(name, rho, EDGE_CURVATURE)}
        for name, rho in cases
    ]


def _zigzag(rules: Rules) -> dict[str, dict[str, Any]]:
    """Measure sign changes over α·L at ρ = 0.9: a unit step on a row of curvatures."""
    curves = {}
    for name, rule in rules.items():
        edge = theory.stability_edge(name, 0.9, 1.0)
        at = np.append(np.arange(0.05, min(edge, 2.0), 0.1), STEEP_LR)
        at = np.unique(at.round(6))
        curves[name] = {
            "lr": at,
            "measured": measure.sign_changes(rule, at, lr=1.0, momentum=0.9),
            "theory": theory.sign_changes(name, 1.0, 0.9, at),
        }
    return curves


@cache   # no rule takes part
def _sizes(seed: int = 3) -> list[dict[str, Any]]:
    """Sample condition numbers of n x n Gaussian matrices, whose squares are Hessians.

    The loss is least squares with as many random examples as parameters.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for n, draws in ((10, 800), (20, 800), (40, 1500), (80, 800), (160, 200)):
        logs = np.log(np.linalg.cond(rng.standard_normal((draws, n, n))))
        rows.append({"n": n, "measured": logs.mean(), "error": logs.std() / np.sqrt(draws),
                     "theory": theory.mean_log_condition(n)})
    return rows


def _shell(rule: Rule, momentum: float, steps: int = 60) -> np.ndarray:
    return measure.trajectory(rule, lambda x: SHELL * x, SHELL_START, lr=STEEP_LR,
                              momentum=momentum, steps=steps)


def measured(rules: Rules = RULES) -> dict[str, Any]:
    """Return every number of this row."""
    kappa = 1e4
    spectrum = measure.spectrum(kappa, 41)
    return {
        "rates": _rates(rules),
        "counts": _counts(rules),
        "edges": _edges(rules),
        "zigzag": _zigzag(rules),
        "sizes": _sizes(),
        "shell": {name: _shell(rules[name], SHELL_MOMENTUM) for name in ("sgd", "momentum")},
        "per_eigenvalue": {
            "kappa": kappa,
            "curvature": spectrum,
            **{name: measure.contraction(rule, spectrum, lr=lr, momentum=rho)
               for name, rule in rules.items()
               for lr, rho in [theory.textbook(name, kappa)]},
        },
    }


def _at_steep(numbers: dict[str, Any], rule: str) -> dict[str, float]:
    curve = numbers["zigzag"][rule]
    at = int(np.argmin(np.abs(curve["lr"] - STEEP_LR)))
    return {"measured": curve["measured"][at], "theory": curve["theory"][at]}


def checks(numbers: dict[str, Any]) -> list[Check]:
    """Return this row's claims."""
    claims = [
        relative(RATES, f"{RULES[r['rule']].label}, κ = 10{_power(r['kappa'])}, {r['setting']}",
                 r["measured"], r["theory"], 0.01, rests_on_momentum=r["rule"] != "sgd")
        for r in numbers["rates"]
    ]
    claims += [
        absolute(COUNTS, f"{RULES[name].label}: exponent of κ", count["exponent"],
                 1.0 if name == "sgd" else 0.5, 0.05, rests_on_momentum=name != "sgd")
        for name, count in numbers["counts"].items()
    ]
    claims += [
        relative(EDGES, RULES[e["rule"]].label + (f", ρ = {e['momentum']}" if e["momentum"] else "")
                 + f": largest α at L = {EDGE_CURVATURE:g}", e["measured"], e["theory"], 1e-3,
                 rests_on_momentum=e["rule"] != "sgd")
        for e in numbers["edges"]
    ]
    steep = {name: _at_steep(numbers, name) for name in ("sgd", "momentum")}
    claims += [
        relative(ZIGZAG, f"{RULES[name].label}: sign changes per step at α·L = {STEEP_LR}",
                 found["measured"], found["theory"], 1e-3, rests_on_momentum=name == "momentum")
        for name, found in steep.items()
    ]
    claims += [
        at_most(ZIGZAG, f"{RULES[name].label}: largest deviation over all α·L",
                np.abs(curve["measured"] - curve["theory"]).max(), 2e-3)
        for name, curve in numbers["zigzag"].items()
    ]
    claims.append(at_most(ZIGZAG, "Momentum's sign changes as a share of SGD's",
                          steep["momentum"]["measured"] / steep["sgd"]["measured"], 0.5))
    claims += [
        within_errors(SIZE, f"Mean ln κ(A), A random {s['n']} × {s['n']}", s["measured"],
                      s["theory"], s["error"])
        for s in numbers["sizes"] if s["n"] >= ASYMPTOTIC
    ]
    growth, error = _growth(numbers)
    claims.append(within_errors(SIZE, "Exponent of n in the Hessian's condition number", growth,
                                2.0, error))
    return claims


def _growth(numbers: dict[str, Any]) -> tuple[float, float]:
    """Return the exponent of n in the Hessian's condition number, κ(A)², and its error."""
    large = [s for s in numbers["sizes"] if s["n"] >= ASYMPTOTIC]
    (slope, _), covariance = np.polyfit(
        np.log([s["n"] for s in large]), [2 * s["measured"] for s in large], 1,
        w=[1 / (2 * s["error"]) for s in large], cov="unscaled")
    return float(slope), float(np.sqrt(covariance[0, 0]))


def _power(kappa: float) -> str:
    return str(round(np.log10(kappa))).translate(str.maketrans("123456", "¹²³⁴⁵⁶"))


def figures(numbers: dict[str, Any]) -> list[Picture]:
    """Draw this row."""
    return [_draw_shell(numbers), _draw_zigzag(numbers), _draw_eigenvalues(numbers),
            _draw_counts(numbers), _draw_edges(numbers), _draw_sizes(numbers)]


def _draw_shell(numbers: dict[str, Any]) -> Picture:
    figure, ax = style.panel("A taco shell, seen from above", "shallow direction",
                             "steep direction")
    x, y = np.meshgrid(np.linspace(-1.15, 0.75, 200), np.linspace(-0.62, 0.72, 200))
    style.contours(ax, x, y, SHELL[0] * y**2 / 2 + SHELL[1] * x**2 / 2, levels=9)
    for name, points in numbers["shell"].items():
        style.path(ax, name, RULES[name].label, points[:, ::-1])
    ax.plot(*SHELL_START[::-1], "o", color=style.GREY, markersize=9, markerfacecolor="white",
            zorder=4)
    ax.plot(0, 0, "*", color=style.GRADIENT, markersize=15, markeredgecolor="white", zorder=5,
            label="minimum")
    ax.set(xlim=(-1.15, 0.75), ylim=(-0.62, 0.72))
    ax.legend(loc="upper right", ncols=3, columnspacing=1.0, handlelength=1.6)
    left = {name: np.linalg.norm(points[-1]) / np.linalg.norm(points[0])
            for name, points in numbers["shell"].items()}
    kappa = SHELL[0] / SHELL[1]
    return Picture(
        "row1-shell", figure,
        f"κ = {kappa:.0f}, the same α for both, {len(numbers['shell']['sgd']) - 1} steps. SGD "
        f"jumps from wall to wall and still has {100 * left['sgd']:.0f} % of its way to go; "
        f"momentum (ρ = {SHELL_MOMENTUM}) has {100 * left['momentum']:.1f} %.",
        "Contour lines of a long narrow valley. The black path of SGD "
        "zigzags between the walls and creeps along the valley; the blue "
        "path of momentum swings a few times and reaches the minimum.",
    )


def _draw_zigzag(numbers: dict[str, Any]) -> Picture:
    figure, ax = style.panel("Zigzags, steep axis, ρ = 0.9", "α·L, the step in units of 1/L",
                             "sign changes per step")
    for name, curve in numbers["zigzag"].items():
        at = np.linspace(0.02, curve["lr"].max(), 600)
        style.compare(ax, name, RULES[name].label,
                      (at, theory.sign_changes(name, 1.0, 0.9, at)),
                      (curve["lr"], curve["measured"]))
    ax.set_ylim(-0.05, 1.12)
    ax.legend(loc="upper left", bbox_to_anchor=(0, 0.93))
    steep = {name: _at_steep(numbers, name)["measured"] for name in ("sgd", "momentum")}
    return Picture(
        "row1-zigzag", figure,
        f"Lines: theory. Markers: measured. At α·L = {STEEP_LR} SGD changes sign "
        f"{steep['sgd']:.2f} times a step, momentum {steep['momentum']:.2f}. Below α·L = 1 SGD "
        "does not zigzag at all, and momentum swings instead; Nesterov zigzags as SGD does beyond "
        "1, and ends early, at its edge of stability.",
        "Sign changes per step over the learning rate. SGD jumps from "
        "0 to 1 at α·L = 1, momentum rises smoothly to about one half, "
        "Nesterov lies below momentum until 1 and then jumps to 1.",
    )


def _draw_eigenvalues(numbers: dict[str, Any]) -> Picture:
    found = numbers["per_eigenvalue"]
    figure, ax = style.panel("Progress in every direction", "eigenvalue λ / L",
                             "rate per step, −ln r(λ)")
    fine = measure.spectrum(found["kappa"], 600)
    for name in RULES:
        lr, momentum = theory.textbook(name, found["kappa"])
        with np.errstate(divide="ignore"):
            style.compare(ax, name, RULES[name].label,
                          (fine, -np.log(theory.contraction(name, lr, momentum, fine))),
                          (found["curvature"][::2], -np.log(found[name][::2])))
    ax.set(xscale="log", yscale="log", ylim=(1e-4, 30))
    ax.legend(loc="upper left")
    rate = {name: number(-np.log(found[name].max()), 2) for name in RULES}
    return Picture(
        "row1-eigenvalues", figure,
        f"κ = 10{_power(found['kappa'])}, textbook-optimal α and ρ; the lowest point of a curve is "
        f"what counts. SGD: {rate['sgd']} a step, momentum {rate['momentum']}, Nesterov "
        f"{rate['nesterov']}. Momentum spends the same on every direction.",
        "Log-log plot of the rate over the eigenvalue. SGD's rate falls in proportion to the "
        "eigenvalue, momentum's is flat and a hundred times higher at the shallow end, Nesterov's "
        "is between. Markers lie on the theory lines.",
    )


def _draw_counts(numbers: dict[str, Any]) -> Picture:
    figure, ax = style.panel("Steps it takes", "condition number κ",
                             "steps to a millionth of the error")
    for name, count in numbers["counts"].items():
        slope, level = np.polyfit(np.log(count["kappa"]), np.log(count["steps"]), 1)
        style.compare(ax, name, f"{RULES[name].label}: κ^{count['exponent']:.3f}",
                      (count["kappa"], np.exp(level) * count["kappa"]**slope),
                      (count["kappa"], count["steps"]))
    ax.set(xscale="log", yscale="log")
    ax.legend(loc="upper left")
    at = {name: f"{count['steps'][np.flatnonzero(count['kappa'] == 1e5)[0]]:.0f}"
          for name, count in numbers["counts"].items()}
    return Picture(
        "row1-steps", figure,
        f"At κ = 10⁵ SGD takes {at['sgd']} steps, Nesterov {at['nesterov']} and momentum "
        f"{at['momentum']}, each at its textbook optimum. The exponents are fitted.",
        "Log-log plot of steps over condition number: three straight lines, SGD with slope one, "
        "momentum and Nesterov with slope one half.",
    )


def _draw_edges(numbers: dict[str, Any]) -> Picture:
    figure, ax = style.panel("The edge of stability", "momentum ρ", "largest stable α·L")
    rho = np.linspace(0, 0.999, 300)
    for name in RULES:
        found = [e for e in numbers["edges"] if e["rule"] == name]
        style.compare(ax, name, RULES[name].label,
                      (rho, [theory.stability_edge(name, r, 1.0) for r in rho]),
                      ([e["momentum"] for e in found],
                       [e["measured"] * EDGE_CURVATURE for e in found]))
    ax.set_ylim(0, 4.4)
    ax.legend(loc="upper left")
    worst = max(abs(e["measured"] / e["theory"] - 1) for e in numbers["edges"])
    return Picture(
        "row1-edge", figure,
        f"Lines: 2, 2(1+ρ) and 2(1+ρ)/(1+2ρ). Markers: bisected, at most {100 * worst:.3f} % off. "
        "Momentum tolerates larger steps than SGD, Nesterov smaller ones.",
        "Largest stable learning rate over momentum: SGD at 2, momentum rising from 2 to 4, "
        "Nesterov falling from 2 to 4/3, with measured markers on the lines.",
    )


def _draw_sizes(numbers: dict[str, Any]) -> Picture:
    figure, ax = style.panel("More parameters, worse balance", "parameters n",
                             "condition number of the Hessian")
    n = np.array([s["n"] for s in numbers["sizes"]])
    middle = np.array([s["measured"] for s in numbers["sizes"]])
    error = 2 * np.array([s["error"] for s in numbers["sizes"]])
    ax.plot(n, [np.exp(2 * theory.mean_log_condition(m)) for m in n], color=style.GREY,
            label="theory for large n, (4.65 n)²")
    ax.errorbar(n, np.exp(2 * middle),
                yerr=[np.exp(2 * middle) - np.exp(2 * (middle - error)),
                      np.exp(2 * (middle + error)) - np.exp(2 * middle)],
                **style.dots("sgd", label="sampled, ±2 s.e.", color=style.GRADIENT), elinewidth=1.5,
                ecolor=style.GRADIENT)
    ax.set(xscale="log", yscale="log")
    ax.legend(loc="upper left")
    return Picture(
        "row1-size", figure,
        f"Least squares on random data: the typical condition number goes from "
        f"{np.exp(2 * middle[0]):.0f} at {n[0]} parameters to {np.exp(2 * middle[-1]):.0f} at "
        f"{n[-1]}. It grows as n².",
        "Log-log plot: the condition number of sampled Hessians grows as the square of the number "
        "of parameters, on the theory line.",
    )


def story(numbers: dict[str, Any]) -> Story:
    """Tell this row."""
    rates = [abs(r["measured"] / r["theory"] - 1) for r in numbers["rates"]]
    exponents = {name: c["exponent"] for name, c in numbers["counts"].items()}
    steep = {name: _at_steep(numbers, name) for name in ("sgd", "momentum")}
    growth, error = _growth(numbers)
    return Story(
        "row-1", "Ill-conditioning: steep one way, shallow the other",
        "The loss changes quickly in one direction and slowly in another. SGD makes very slow "
        "progress along the shallow direction and jitters along the steep one. With hundreds of "
        "millions of parameters the imbalance is worse. Momentum cancels the zigzag and "
        "accelerates along the shallow direction.",
        (
            "One learning rate has to serve all directions. The steepest one limits it (beyond "
            "2/L the walls throw SGD out), and the shallowest one then takes κ times as long as "
            "it would need to.",
            "On a quadratic nothing of this is a matter of opinion. Each eigenvalue of the Hessian "
            "has a 2×2 matrix that maps position and velocity to the next, and its spectral radius "
            "is the factor by which the error shrinks. We ran the engine on condition numbers from "
            f"10 to 10⁶ and measured that factor {len(rates)} times. We compare the rate −ln r, "
            "which is far stricter than r itself: at κ = 10⁶ a wrong r of 1 would still be within "
            f"1 %. The worst of the rates is off by {number(100 * max(rates), 2)} %.",
            f"So SGD needs a number of steps that grows as κ to the power {exponents['sgd']:.3f}, "
            f"momentum {exponents['momentum']:.3f}, Nesterov {exponents['nesterov']:.3f}: κ "
            "against √κ, a hundredfold difference at κ = 10⁴.",
        ),
        "Below α·L = 1 plain SGD does not zigzag at all; there it is momentum that swings. And it "
        "is momentum alone that calms the zigzag: beyond α·L = 1 Nesterov changes sign at every "
        "step, as SGD does, and its edge of stability comes sooner.",
        (
            ("SGD crawls along the shallow direction", f"steps grow as κ^{exponents['sgd']:.3f}",
             "κ^1"),
            ("Momentum accelerates it", f"steps grow as κ^{exponents['momentum']:.3f} (Nesterov "
             f"κ^{exponents['nesterov']:.3f})", "κ^0.5"),
            ("SGD zigzags, momentum cancels it",
             f"sign changes per step at α·L = {STEEP_LR}: {steep['sgd']['measured']:.3f} and "
             f"{steep['momentum']['measured']:.3f}",
             f"{steep['sgd']['theory']:.3f} and {steep['momentum']['theory']:.3f}"),
            ("The imbalance is worse with many parameters",
             f"κ grows as n^{growth:.2f} ± {error:.2f}", "n^2 (random least squares)"),
        ),
    )
