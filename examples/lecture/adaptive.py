"""Row 7, adaptive rules: each coordinate's step divided by what its gradients were."""
from __future__ import annotations

from typing import Any

import numpy as np

from lecture import comparison, measure, style, theory
from lecture.claims import Check, Picture, Story, absolute, at_most, number, relative
from lecture.rules import ADAPTIVE, RULES, Adaptive, Adaptives, Constants, Rules

LABEL = {name: rule.label for table in (RULES, ADAPTIVE) for name, rule in table.items()}
# ε scales with nothing, so that it has to be 0 where scales are compared.
FREE = {"adagrad": Constants(0.5, eps=0.0), "rmsprop": Constants(0.01, eps=0.0),
        "adam": Constants(0.01, eps=0.0)}
ACCURACY = 0.1                         # of the distance at the start; α is constant
ALIGNED, TILTED = "along the axes", "tilted by 45°"
KAPPAS, FEWER = 10.0 ** np.arange(7), 10.0 ** np.arange(1, 5)   # fewer where steps grow with κ
ASYMPTOTIC = 100                       # κ from which exponents are fitted to what grows
POWERS = 2.0 ** -np.arange(21)
GRADIENTS = np.array([1e-7, 1e-3, 1e3])   # the first is the lecture's ε
LR, STEPS = 0.01, 10_000               # under constant gradients
CONSTANT = {                           # what runs under them: rule, constants, name
    "adagrad": ("adagrad", Constants(LR), "AdaGrad, α/(√t + ε/|g|)"),
    "rmsprop": ("rmsprop", Constants(LR), "RMSProp, ρ = 0.9, α/(√(1−ρᵗ) + ε/|g|)"),
    "rmsprop99": ("rmsprop", Constants(LR, decay=0.99), "RMSProp, ρ = 0.99, the same"),
    "adam": ("adam", Constants(LR), "Adam, α/(1 + ε/|g|)"),
    "plain": ("adam", Constants(LR, corrected=False),
              "Adam without correction, α(1−β₁ᵗ)/(√(1−β₂ᵗ) + ε/|g|)"),
}
RACE = {"adagrad": Constants(1.0), "rmsprop": Constants(0.1), "adam": Constants(0.3)}
ROUNDED = ("nesterov", "adam")         # whose lines the engine combines otherwise
BITS, GROWTH, END, STEP, WAY, FIRST, LINES = (
    "Paths on curvatures 2⁰ to 2⁻²⁰", "Steps to a tenth of the distance", "RMSProp's end",
    "Steps under constant gradients", "Dying steps", "Adam's first steps",
    "The engine against the lecture's lines")


def _taking(rule: Adaptive, constants: Constants, shape: tuple[int, ...]) -> measure.Step:
    states = np.zeros((2, *shape))
    return lambda x, g, t: rule.step(x, g, states, t, constants)


def _count(step: measure.Step, angle: float, kappas: np.ndarray) -> dict[str, Any]:
    """Count the steps in all valleys, and fit the exponent with which they grow."""
    steps = measure.valley_steps(step, *measure.valleys(angle, kappas), accuracy=ACCURACY)
    grown = (kappas >= ASYMPTOTIC) | (np.ptp(steps) == 0)
    return {"kappa": kappas, "steps": steps,
            "exponent": measure.exponent(kappas[grown], steps[grown])}


def _counts(rules: Rules, adaptive: Adaptives) -> dict[tuple[str, str], dict[str, Any]]:
    counts = {}
    for where, angle in ((ALIGNED, 0.0), (TILTED, np.pi / 4)):
        counts["sgd", where] = _count(   # α = 1/L
            lambda x, g, t: rules["sgd"].step(x, g, g, 1.0, 0.0), angle, FEWER)
        for name, rule in adaptive.items():
            kappas = KAPPAS if where == ALIGNED else FEWER
            counts[name, where] = _count(
                _taking(rule, FREE[name], (kappas.size, 2)), angle, kappas)
    return counts


def _end(rule: Adaptive, kappa: float = 1e4, steps: int = 6000) -> dict[str, Any]:
    """Measure how RMSProp ends: along the axes in a cycle, tilted still on its way."""
    c = FREE["rmsprop"]
    aligned = measure.adaptive_trajectory(rule, lambda x: x / KAPPAS, np.ones(KAPPAS.size), c,
                                          steps=2000)
    (hessian,), start = measure.valleys(np.pi / 4, np.array([kappa]))
    path = measure.adaptive_trajectory(rule, lambda x: hessian @ x, start, c, steps=steps)
    along, half = path @ [1, 1], steps // 2
    return {"cycle": np.abs(aligned[-1]) / c.lr,
            "rate": kappa * np.log(along[half] / along[-1]) / (steps - half),
            "rate_theory": kappa * theory.tilted_rmsprop_rate(c.decay, kappa)}


def _expected(name: str) -> np.ndarray:
    """Return the steps 1..STEPS under the constant gradients, over α."""
    rule, constants, _ = CONSTANT[name]
    return theory.steady_steps(rule, np.arange(1, STEPS + 1)[:, None], GRADIENTS, constants)


def _written(name: str) -> np.ndarray:
    """Return the race as NumPy runs it from the lecture's lines."""
    c, rho, lr = RACE.get(name), comparison.MOMENTUM, comparison.LR
    x, a, b, path = comparison.START, np.zeros(2), np.zeros(2), [comparison.START]
    for t in range(1, comparison.STEPS + 1):
        dx = comparison.HESSIAN @ x
        if name == "sgd":
            x = x - lr * dx
        elif name == "momentum":
            a = rho * a + dx
            x = x - lr * a
        elif name == "nesterov":
            old, a = a, rho * a - lr * dx
            x = x + (-rho * old + (1 + rho) * a)
        elif name == "adagrad":
            a = a + dx * dx
            x = x - c.lr * dx / (np.sqrt(a) + 1e-7)
        elif name == "rmsprop":
            a = c.decay * a + (1 - c.decay) * dx * dx
            x = x - c.lr * dx / (np.sqrt(a) + 1e-7)
        else:
            a = c.beta1 * a + (1 - c.beta1) * dx
            b = c.beta2 * b + (1 - c.beta2) * dx * dx
            first, second = a / (1 - c.beta1**t), b / (1 - c.beta2**t)
            x = x - c.lr * first / (np.sqrt(second) + 1e-7)
        path.append(x)
    return np.array(path)


def measured(rules: Rules = RULES, adaptive: Adaptives = ADAPTIVE) -> dict[str, Any]:
    """Return every number of this row."""
    def gradient(x: np.ndarray) -> np.ndarray:
        return comparison.HESSIAN @ x

    race = {name: measure.trajectory(rule, gradient, comparison.START, lr=comparison.LR,
                                     momentum=comparison.MOMENTUM, steps=comparison.STEPS)
            for name, rule in rules.items()}
    apart, constant = {}, {}
    for name, rule in adaptive.items():
        race[name] = measure.adaptive_trajectory(rule, gradient, comparison.START, RACE[name],
                                                 steps=comparison.STEPS)
        path = measure.adaptive_trajectory(rule, lambda x: POWERS * x, np.ones(POWERS.size),
                                           FREE[name], steps=300)
        apart[name] = np.abs(path - path[:, :1]).max()
    for name, (rule, constants, _) in CONSTANT.items():
        path = measure.adaptive_trajectory(adaptive[rule], lambda x: GRADIENTS,
                                           np.zeros(GRADIENTS.size), constants, steps=STEPS)
        constant[name] = -np.diff(path, axis=0) / LR
    return {
        "race": race, "apart": apart, "constant": constant,
        "loss": {name: comparison.loss(*path[-1]) for name, path in race.items()},
        "lines": {name: np.abs(path - _written(name)).max() for name, path in race.items()},
        "counts": _counts(rules, adaptive), "end": _end(adaptive["rmsprop"]),
    }


def _first(numbers: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Return what there is to say of Adam's steps without correction: measured, theory."""
    c, steps = CONSTANT["plain"][1], numbers["constant"]["plain"][:, -1]
    at, height = theory.uncorrected_peak(c.beta1, c.beta2)
    return {"first": (steps[0], (1 - c.beta1) / np.sqrt(1 - c.beta2)),
            "at": (int(np.argmax(steps)) + 1, at), "height": (steps.max(), height)}


def _ways(numbers: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Return the distances walked under a constant gradient, over α: measured, theory."""
    of = {name: numbers["constant"][name][:, -1].sum() for name in ("adagrad", "rmsprop")}
    return {"adagrad": (of["adagrad"], theory.adagrad_distance(STEPS)),
            "rmsprop": (of["rmsprop"], _expected("rmsprop")[:, -1].sum())}


def _slope(numbers: dict[str, Any]) -> float:
    return measure.exponent(np.arange(1, STEPS + 1), numbers["constant"]["adagrad"][:, -1])


def checks(numbers: dict[str, Any]) -> list[Check]:
    """Return this row's claims."""
    counts, end = numbers["counts"], numbers["end"]
    first, ways = _first(numbers), _ways(numbers)
    claims = [absolute(BITS, f"{LABEL[name]}: largest difference from curvature 1, ε = 0", apart,
                       0.0, 0.0) for name, apart in numbers["apart"].items()]
    for name in ("sgd", *ADAPTIVE):
        grows = name == "sgd"
        claims.append(absolute(GROWTH, f"{LABEL[name]}, {ALIGNED}: exponent of κ",
                               counts[name, ALIGNED]["exponent"], float(grows),
                               0.05 if grows else 1e-9))
    claims += [absolute(GROWTH, f"{LABEL[name]}, {TILTED}: exponent of κ",
                        counts[name, TILTED]["exponent"], 1.0, 0.05) for name in ("sgd", "adagrad")]
    claims += [at_most(GROWTH, f"{LABEL[name]}: most steps {ALIGNED} over those {TILTED}",
                       counts[name, ALIGNED]["steps"].max() / counts[name, TILTED]["steps"].max(),
                       0.1) for name in ADAPTIVE]
    claims += [
        relative(END, f"Rate {TILTED} times κ, 4ρ/(1+ρ), κ = 10⁴", end["rate"],
                 end["rate_theory"], 1e-3),
        relative(END, f"Distance {ALIGNED} over α, of {KAPPAS.size} curvatures the least",
                 end["cycle"].min(), 0.5, 1e-3),
        relative(END, f"Distance {ALIGNED} over α, the greatest", end["cycle"].max(), 0.5, 1e-3),
    ]
    claims += [at_most(STEP, f"{what}: relative difference",
                       np.abs(numbers["constant"][name] / _expected(name) - 1).max(), 1e-10)
               for name, (_, _, what) in CONSTANT.items()]
    claims += [
        absolute(WAY, "AdaGrad: exponent of t in the t-th step", _slope(numbers), -0.5, 1e-6),
        relative(WAY, f"AdaGrad: distance over α after {STEPS} steps, 2√T + ζ(½) + …",
                 *ways["adagrad"], 1e-6),
        relative(WAY, f"RMSProp, ρ = 0.9: distance over α after {STEPS} steps", *ways["rmsprop"],
                 1e-6),
        relative(FIRST, "Without correction: first step over α, (1−β₁)/√(1−β₂)", *first["first"],
                 1e-6),
        absolute(FIRST, "Without correction: the largest is the t-th", *first["at"], 0.5),
        relative(FIRST, "Without correction: the largest over α", *first["height"], 1e-3),
    ]
    return claims + [
        at_most(LINES, f"{LABEL[name]}: largest difference in {comparison.STEPS} steps",
                difference, 1e-13 if name in ROUNDED else 0.0,
                rests_on_momentum=name in ("momentum", "nesterov"))
        for name, difference in numbers["lines"].items()
    ]


def figures(numbers: dict[str, Any]) -> list[Picture]:
    """Draw this row."""
    return [_draw_race(numbers), _draw_counts(numbers), _draw_dying(numbers), _draw_first(numbers)]


def _draw_race(numbers: dict[str, Any]) -> Picture:
    figure, ax = comparison.stage("All six rules")
    for name, path in numbers["race"].items():
        style.path(ax, name, LABEL[name], path, markersize=3, linewidth=1.2,
                   zorder=2 + (name in RULES))   # AdaGrad and RMSProp hide SGD otherwise
    ax.legend(loc="upper left", ncols=2, columnspacing=1.0, handlelength=1.8)
    lrs = ", ".join(f"{LABEL[name]} {c.lr:g}" for name, c in RACE.items())
    return Picture(
        "row7-race", figure,
        f"Row 6's bowl. α = {comparison.LR} for SGD, momentum and Nesterov, ρ = "
        f"{comparison.MOMENTUM}; {lrs}; ρ = {RACE['rmsprop'].decay} in RMSProp, β = "
        f"{RACE['adam'].beta1} and {RACE['adam'].beta2} in Adam. Loss after {comparison.STEPS} "
        f"steps: {_losses(numbers)}.",
        "Six paths on the contours of a tilted bowl. SGD, AdaGrad and RMSProp drop to the floor of "
        "the valley and follow it; momentum, Nesterov and Adam swing beyond it.",
    )


def _losses(numbers: dict[str, Any]) -> str:
    return ", ".join(f"{LABEL[name]} {number(loss, 2)}" for name, loss in numbers["loss"].items())


def _draw_counts(numbers: dict[str, Any]) -> Picture:
    figure, ax = style.panel("Steps it takes, and tilted", "condition number κ",
                             "steps to a tenth of the distance")
    for (name, where), count in numbers["counts"].items():
        look = {"label": LABEL[name], "linestyle": "-"} if where == ALIGNED else {
            "linestyle": ":", "markerfacecolor": "white", "markeredgecolor": style.COLOR[name]}
        ax.plot(count["kappa"], count["steps"], **style.dots(name, **look))
    ax.set(xscale="log", yscale="log")
    ax.legend(loc="upper right", bbox_to_anchor=(1, 0.9))
    lrs = ", ".join(f"{LABEL[name]} {c.lr:g}" for name, c in FREE.items())
    ends = ", ".join(f"{LABEL[name]} {numbers['counts'][name, TILTED]['steps'][-1]:.0f}"
                     for name in ADAPTIVE)
    return Picture(
        "row7-steps", figure,
        f"Filled: valley along an axis; hollow: tilted by 45°, where SGD is the same. α = 1/L for "
        f"SGD, {lrs}; ε = 0. Tilted, κ = 10⁴: {ends}.",
        "Log-log plot of steps over condition number. Along the axes AdaGrad, RMSProp and Adam are "
        "flat and SGD rises with slope one; tilted, all of them rise.",
    )


def _draw_steady(ax: Any, numbers: dict[str, Any], shown: dict[str, dict[str, Any]]) -> None:
    at = np.unique(np.geomspace(1, STEPS, 30).astype(int)) - 1
    for name, look in shown.items():
        dots = style.dots(CONSTANT[name][0], **look)
        ax.plot(np.arange(1, STEPS + 1), _expected(name)[:, -1], color=dots["color"], linewidth=1.5)
        ax.plot(at + 1, numbers["constant"][name][at, -1], **dots)


def _draw_dying(numbers: dict[str, Any]) -> Picture:
    figure, ax = style.panel("AdaGrad's steps die", "step t", "length of the step over α")
    _draw_steady(ax, numbers, {name: {"label": LABEL[name]} for name in ("adagrad", "rmsprop")})
    ax.set(xscale="log", yscale="log")
    ax.legend(loc="lower left")
    ways = _ways(numbers)
    return Picture(
        "row7-dying", figure,
        f"A constant gradient. AdaGrad's t-th step is α/√t, RMSProp's α/√(1−ρᵗ), ρ = 0.9. After "
        f"{STEPS} steps AdaGrad has walked {ways['adagrad'][0]:.1f} α, RMSProp "
        f"{ways['rmsprop'][0]:.0f} α. Lines: theory. Markers: measured.",
        "Log-log plot of the length of a step: AdaGrad's falls with slope minus one half, "
        "RMSProp's begins above one and stays at one. Markers lie on the lines of theory.",
    )


def _draw_first(numbers: dict[str, Any]) -> Picture:
    figure, ax = style.panel("Adam's first steps", "step t", "length of the step over α")
    _draw_steady(ax, numbers, {"plain": {"color": style.GREY, "label": "without correction"},
                               "adam": {"label": "with it"}})
    ax.set(xscale="log", ylim=(0, 7.2))
    ax.legend(loc="upper right")
    return Picture(
        "row7-first", figure,
        f"A constant gradient, β₁ = 0.9, β₂ = 0.999. Without correction the first step is "
        f"{_peak(numbers)}. Lines: theory. Markers: measured.",
        "Length of Adam's step over its number: constant with bias correction; without it a hump "
        "to six and a half times that at the twelfth step, which takes thousands to come down.",
    )


def _peak(numbers: dict[str, Any]) -> str:
    first, at, height = (found for found, _ in _first(numbers).values())
    return f"{first:.2f} α and the {at}th, the largest, {height:.2f} α"


def story(numbers: dict[str, Any]) -> Story:
    """Tell this row."""
    end, ways = numbers["end"], _ways(numbers)
    exponent = {key: f"κ^{abs(count['exponent']):.3f}" for key, count in numbers["counts"].items()}
    flat = ", ".join(exponent[name, ALIGNED] for name in ADAPTIVE)
    rate, rate_theory = (f"{end[key]:.3f}/κ" for key in ("rate", "rate_theory"))
    begins = [numbers["constant"][name][0, -1] for name in ("rmsprop", "rmsprop99")]
    peaks = [f"{first:.3f} α, largest at t = {at:.4g}: {height:.3f} α"
             for first, at, height in zip(*_first(numbers).values(), strict=True)]
    return Story(
        "row-7", "Adaptive rules: AdaGrad, RMSProp, Adam",
        "Divide each coordinate's step by the root of its squared gradients: progress along steep "
        "directions is damped, along flat ones accelerated. AdaGrad adds the squares up, so its "
        "steps decay to zero; RMSProp lets the sum leak. Adam adds momentum, and corrects its two "
        "averages for beginning at zero, since otherwise the first steps would be very large.",
        (
            "Scaling a gradient scales its root with it, and the quotient is the same. On "
            f"{POWERS.size} curvatures from 1 down to 2⁻²⁰ all three rules take the same path to "
            "the last bit (with ε = 0; powers of two scale without rounding). So their steps do "
            f"not grow with κ, where SGD's grow as {exponent['sgd', ALIGNED]}.",
            "Under a constant gradient AdaGrad's t-th step is α/√t, and its way only 2α√T: "
            f"{ways['adagrad'][0]:.1f} α after {STEPS} steps, where RMSProp walks "
            f"{ways['rmsprop'][0]:.0f} α. Each of Adam's steps is α. Without the correction the "
            f"first is {_peak(numbers)}.",
        ),
        "Only along the axes. In a valley tilted by 45° every coordinate sees both curvatures, and "
        f"AdaGrad's steps grow as {exponent['adagrad', TILTED]} again; RMSProp ends up jittering "
        f"across the valley and comes down it at a rate of {rate}, less than the 2/κ of gradient "
        "descent at the edge of stability. Nor does it arrive at constant α: along an axis, of "
        f"whatever curvature, it ends in jumps between ±{end['cycle'].max():.3f} α. RMSProp has no "
        f"correction and begins with steps of {begins[0]:.2f} α (ρ = 0.9) or {begins[1]:.0f} α "
        "(0.99). And where a gradient is as small as ε, Adam's steps are half as long.",
        (
            ("Adaptive rules scale each coordinate", "paths on curvatures from 1 to 2⁻²⁰ differ by "
             f"{max(numbers['apart'].values()):g}", "0, with ε = 0"),
            ("– so that their steps do not grow with κ",
             f"{flat}; SGD's as {exponent['sgd', ALIGNED]}", "κ^0; κ^1"),
            ("– but only along the axes",
             f"tilted by 45°: AdaGrad's as {exponent['adagrad', TILTED]}, RMSProp's rate {rate}",
             f"κ^1, {rate_theory}"),
            ("AdaGrad's steps decay to zero", f"as t^−{abs(_slope(numbers)):.3f}; "
             f"{ways['adagrad'][0]:.2f} α in {STEPS} steps",
             f"t^−0.5; {ways['adagrad'][1]:.2f} α"),
            ("RMSProp's do not", *(f"{way:.0f} α in as many" for way in ways["rmsprop"])),
            ("– but at constant α it does not arrive",
             f"ends in jumps between ±{end['cycle'].max():.4f} α", "±0.5 α"),
            ("Without correction Adam's first steps are very large", *peaks),
            ("All six on one bowl", f"loss after {comparison.STEPS} steps: "
             + _losses(numbers), "–"),
        ),
    )
