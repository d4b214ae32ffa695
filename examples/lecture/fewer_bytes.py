"""Fewer bytes: what half types do to training, and what theory says of their rounding."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

import optcore
from lecture import measure, mlp, network, style, theory
from lecture.claims import Check, Picture, Story, absolute, at_most, number, within_errors

TYPES = {"float32": np.dtype(np.float32), "bfloat16": optcore.bfloat16,
         "float16": np.dtype(np.float16)}
# Ways of keeping x of the quadratic: type, master, and the unit in [1, 2); float32's is nil.
KEPT = {
    "float32": ("float32", None, 0.0), "bfloat16": ("bfloat16", None, 2.0**-7),
    "bfloat16, split master": ("bfloat16", "split", 0.0), "float16": ("float16", None, 2.0**-10),
}
LOSS_SCALE = {"float32": 1.0, "bfloat16": 1.0, "float16": 1024.0}   # float16's range is small


@dataclass(frozen=True)
class Mode:
    """How a network is stored; `recommended` where its results must be float32's."""

    label: str
    param: str = "bfloat16"
    grad: str = "bfloat16"
    velocity: str = "float32"
    master: str | None = None
    rounding: str = "stochastic"
    recommended: bool = True

    @property
    def bytes_moved(self) -> int:
        """Bytes a parameter and step: parameter, master and velocity both ways, the gradient."""
        rest = {"split": 2, "float32": 4, None: 0}[self.master]
        return 2 * (_size(self.param) + rest + _size(self.velocity)) + _size(self.grad)


def _size(name: str) -> int:
    return TYPES[name].itemsize


MODES = {
    "plain": Mode("float32", "float32", "float32"),
    "velocity": Mode("float32, velocity bfloat16", "float32", "float32", "bfloat16"),
    "grads": Mode("float32, gradient and velocity bfloat16", "float32", "bfloat16", "bfloat16"),
    "split": Mode("bfloat16, split master", master="split"),
    "split velocity": Mode("bfloat16, split master, velocity too", velocity="bfloat16",
                           master="split"),
    "copy": Mode("bfloat16, float32 master", master="float32"),
    "stochastic": Mode("bfloat16, no master, stochastic"),
    "all": Mode("bfloat16, no master, stochastic, velocity too", velocity="bfloat16"),
    "nearest": Mode("bfloat16, no master, nearest", rounding="nearest", recommended=False),
    "copy16": Mode("float16, float32 master", "float16", "float16", master="float32"),
    "stochastic16": Mode("float16, no master, stochastic", "float16", "float16"),
    "nearest16": Mode("float16, no master, nearest", "float16", "float16", rounding="nearest",
                      recommended=False),
}
USUAL, SMALL = 0.03, 0.003      # learning rates of the network, with a momentum of 0.9
RUNS = {
    USUAL: tuple(MODES),
    SMALL: ("plain", "split velocity", "stochastic", "all", "nearest", "stochastic16", "nearest16"),
}
SEEDS, STEPS, EVERY = 10, 400, 50
CURVATURE, NOISE, MINIMUM = 1.0, 0.1, 1.5   # of the quadratic; the unit is the same all around
CHAINS = 10_000
RATES = (0.003, 0.01, 0.03, 0.1, 0.3)
STALLS = (0.011, 0.03, 0.07, 0.15, 0.3)
MOMENTUM, DECAYED = 0.999, (1000, 2000, 3000)
VARIANCE, MEAN, STALL, DECAY, BAND = (
    "Stationary variance of a rounded x", "Its mean", "Where rounding to the nearest stops",
    "Decay of a bfloat16 velocity", "The digits: within the band of float32's seeds",
)


def convert(values: np.ndarray, into: np.ndarray) -> None:
    """Write values in another type, exactly or rounded to the nearest, by a step from zero."""
    into.view(f"u{into.itemsize}")[...] = 0
    optcore.sgd_step(into, values, lr=1.0, maximize=True, rounding="nearest")


def converted(values: np.ndarray, name: str) -> np.ndarray:
    """Return values in a type of `TYPES`."""
    result = np.zeros(values.shape, TYPES[name])
    convert(values, result)
    return result


# The quadratic

def _steps(lr: float) -> int:
    """Return the steps until e⁻⁵ of a distance is left, e⁻¹⁰ of a variance missing."""
    return int(np.ceil(5 / -np.log(1 - lr * CURVATURE)))


def _descend(names: tuple[str, ...], start: float, lr: float, *, rounding: str, noise: float,
             seed: int) -> dict[str, np.ndarray]:
    """Run chains on ½·CURVATURE·(x − MINIMUM)², in each way of `KEPT` with the same noise.

    The gradient sees what is shown; what is returned is what is stepped.
    """
    rng = np.random.default_rng(seed)
    stored = {name: converted(np.full(CHAINS, start, np.float32), KEPT[name][0])
              for name in names}
    optimizers = {name: optcore.SGD(x, lr=lr, master=KEPT[name][1], rounding=rounding, seed=seed)
                  for name, x in stored.items()}
    x, noisy = np.zeros((2, CHAINS), np.float32)
    for _ in range(_steps(lr)):
        if noise:
            rng.standard_normal(out=noisy, dtype=np.float32)
            noisy *= np.float32(noise)
        for name in names:
            convert(stored[name], x)
            optimizers[name].step(np.float32(CURVATURE) * (x - np.float32(MINIMUM)) + noisy)
    masters = {name: optimizer.state_dict()["state"][0]["master"]
               for name, optimizer in optimizers.items() if KEPT[name][1]}
    return {name: converted(each, "float32").astype(float)
            for name, each in {**stored, **masters}.items()}


def _mean(samples: np.ndarray) -> tuple[float, float]:
    """Return the mean of independent samples and its standard error."""
    return float(samples.mean()), float(samples.std() / np.sqrt(samples.size))


def _variances(rounding: str) -> list[dict[str, Any]]:
    rows = []
    for i, lr in enumerate(RATES):
        ends = _descend(tuple(KEPT), MINIMUM, lr, rounding=rounding, noise=NOISE, seed=500 + i)
        for name, x in ends.items():
            rows.append({
                "type": name, "lr": lr, "measured": measure.variance(x), "mean": _mean(x),
                "theory": theory.rounded_variance(lr, CURVATURE, NOISE, KEPT[name][2]),
            })
    return rows


def _stalls(rounding: str) -> list[dict[str, Any]]:
    rows = []
    for i, lr in enumerate(STALLS):
        nearest, stochastic = (
            MINIMUM - _descend(("bfloat16",), 1.0, lr, rounding=how, noise=0.0,
                               seed=600 + i)["bfloat16"]
            for how in ("nearest", rounding)
        )
        rows.append({
            "lr": lr, "nearest": float(nearest[0]), "stochastic": _mean(stochastic),
            "theory": theory.stall(lr, CURVATURE, KEPT["bfloat16"][2]),
            "exact": (MINIMUM - 1.0) * (1 - lr * CURVATURE) ** _steps(lr),
        })
    return rows


def _decay(rounding: str, every: int = 100) -> dict[str, np.ndarray]:
    """Let a bfloat16 velocity of 1 decay under gradients of zero."""
    x, g = np.zeros((2, CHAINS), np.float32)
    velocities = {how: converted(np.ones(CHAINS, np.float32), "bfloat16")
                  for how in ("nearest", rounding)}
    steps = np.arange(0, max(DECAYED) + 1, every)
    means = {how: [(1.0, 0.0)] for how in velocities}
    for step in range(max(DECAYED)):
        for how, v in velocities.items():
            noise = {"noise_key": optcore.noise_key(0, step)} if how == "stochastic" else {}
            optcore.momentum_step(x, g, v, lr=0.0, momentum=MOMENTUM, rounding=how, **noise)
            if (step + 1) % every == 0:
                means[how].append(_mean(converted(v, "float32").astype(float)))
    return {"step": steps, "nearest": np.array(means["nearest"]),
            "stochastic": np.array(means[rounding])}


def noise_measured(rounding: str = "stochastic") -> dict[str, Any]:
    """Return the numbers that theory has; another rounding makes their claims fail."""
    return {"variances": _variances(rounding), "stalls": _stalls(rounding),
            "decay": _decay(rounding)}


# The digits

def train(mode: Mode, lr: float, *, seeds: int, steps: int = STEPS) -> dict[str, np.ndarray]:
    """Train networks of so many seeds in one; return their losses every few steps, and accuracy.

    The forward pass sees the parameters as they are stored, and its gradients are rounded to the
    type in which the optimizer gets them.
    """
    images, labels = mlp.digits()
    seen, seen_labels = images[:mlp.TRAINING], labels[:mlp.TRAINING]
    net = mlp.Network(range(seeds))
    params = {name: converted(param, mode.param) for name, param in net.params.items()}
    grads = {name: converted(grad, mode.grad) for name, grad in net.grads.items()}
    scale = LOSS_SCALE[mode.grad]
    optimizer = optcore.SGD(
        params, lr=lr, momentum=0.9, grads=grads, master=mode.master, rounding=mode.rounding,
        velocity_dtype=mode.velocity,
    )
    chosen = zip(*(network.batches(seed, len(seen), steps) for seed in range(seeds)), strict=True)
    losses = [net.loss(seen[None], seen_labels[None])]
    for step, indices in enumerate(map(np.stack, chosen), 1):
        for name, param in params.items():
            convert(param, net.params[name])
        net.backward(seen[indices], seen_labels[indices])
        for name, grad in net.grads.items():
            grad *= np.float32(scale)
            convert(grad, grads[name])
        optimizer.step(grad_scale=1 / scale)
        if step % EVERY == 0:
            for name, param in params.items():
                convert(param, net.params[name])
            losses.append(net.loss(seen[None], seen_labels[None]))
    accuracy = net.accuracy(images[None, mlp.TRAINING:], labels[None, mlp.TRAINING:])
    return {"loss": np.array(losses), "accuracy": accuracy}


def measured(seeds: int = SEEDS, progress: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Return every number of this row."""
    numbers = noise_measured()
    progress()
    runs = {}
    for lr, keys in RUNS.items():
        for key in keys:
            runs[lr, key] = train(MODES[key], lr, seeds=seeds)
        progress()
    return {**numbers, "runs": runs, "seeds": seeds}


# What is claimed, drawn and told

def noise_checks(numbers: dict[str, Any]) -> list[Check]:
    """Return the claims that theory has."""
    claims = [within_errors(VARIANCE, f"{row['type']}, α = {row['lr']:g}", row["measured"][0],
                            row["theory"], row["measured"][1]) for row in numbers["variances"]]
    claims += [within_errors(MEAN, f"{row['type']}, α = {row['lr']:g}", row["mean"][0], MINIMUM,
                             row["mean"][1]) for row in numbers["variances"]]
    for row in numbers["stalls"]:
        claims += [
            absolute(STALL, f"Distance from the minimum, nearest, α = {row['lr']:g}",
                     row["nearest"], row["theory"], 0.0),
            within_errors(STALL, f"– stochastic, on average, α = {row['lr']:g}",
                          row["stochastic"][0], row["exact"], row["stochastic"][1]),
        ]
    decay = numbers["decay"]
    for step in DECAYED:
        at = int(np.flatnonzero(decay["step"] == step)[0])
        mean, error = decay["stochastic"][at]
        claims.append(within_errors(DECAY, f"Mean after {step} steps, ρ = {MOMENTUM}, stochastic",
                                    mean, MOMENTUM**step, error))
    claims.append(absolute(DECAY, f"– nearest, after {DECAYED[-1]} steps",
                           decay["nearest"][-1, 0], 1.0, 0.0))
    return claims


def _band(numbers: dict[str, Any], lr: float, of: str) -> tuple[float, float]:
    """Return float32's lowest and highest result over the seeds."""
    values = _final(numbers["runs"][lr, "plain"], of)
    return float(values.min()), float(values.max())


def _final(run: dict[str, np.ndarray], of: str) -> np.ndarray:
    return run["loss"][-1] if of == "loss" else run[of]


def checks(numbers: dict[str, Any]) -> list[Check]:
    """Return this row's claims."""
    claims = noise_checks(numbers)
    for (lr, key), run in numbers["runs"].items():
        mode = MODES[key]
        if key == "plain":
            continue
        for of in ("loss", "accuracy"):
            low, high = _band(numbers, lr, of)
            if mode.recommended:
                claims.append(absolute(BAND, f"{mode.label}: mean {of}, α = {lr:g}",
                                       _final(run, of).mean(), (low + high) / 2, (high - low) / 2))
        if key == "nearest":
            claims.append(at_most(BAND, f"{mode.label}: float32's highest loss against its "
                                  f"lowest, α = {lr:g}", _band(numbers, lr, "loss")[1],
                                  _final(run, "loss").min()))
    return claims


def table(numbers: dict[str, Any]) -> list[tuple[str, ...]]:
    """Return header and rows of what the networks came to."""
    rows = [("storage", "bytes moved", *(f"{of}, α = {lr:g}" for lr in RUNS
                                         for of in ("loss", "accuracy")))]
    for key, mode in MODES.items():
        cells = []
        for lr in RUNS:
            run = numbers["runs"].get((lr, key))
            cells += ["", ""] if run is None else [
                _range(run["loss"][-1], ".4f"), _range(100 * run["accuracy"], ".1f") + " %"]
        rows.append((mode.label, f"{mode.bytes_moved}", *cells))
    return rows


def _range(values: np.ndarray, form: str) -> str:
    return f"{values.mean():{form}} ({values.min():{form}} to {values.max():{form}})"


def figures(numbers: dict[str, Any]) -> list[Picture]:
    """Draw this row."""
    return [_draw_losses(numbers), _draw_variance(numbers), _draw_stall(numbers),
            _draw_decay(numbers)]


def _draw_losses(numbers: dict[str, Any]) -> Picture:
    figure, ax = style.panel(f"The digits, α = {SMALL:g}", "step", "training loss",
                             size=(5.4, 5.2))
    step = EVERY * np.arange(STEPS // EVERY + 1)
    for key, color, dashes, marker in (
        ("plain", style.COLOR["sgd"], "-", ""), ("all", style.ACCENT, (0, (5, 1.6)), "s"),
        ("nearest16", style.COLOR["momentum"], (0, (2, 1.5)), "^"),
        ("nearest", style.GRADIENT, "-", "o"),
    ):
        loss = numbers["runs"][SMALL, key]["loss"]
        ax.plot(step, loss.mean(axis=1), color=color, linestyle=dashes, marker=marker,
                linewidth=1.6, label=MODES[key].label)
        ax.fill_between(step, loss.min(axis=1), loss.max(axis=1), color=color, alpha=0.13,
                        linewidth=0)
    ax.set(ylim=(0, None), xlim=(0, None))
    figure.legend(loc="outside lower center", fontsize=11)
    finals = {key: numbers["runs"][SMALL, key]["loss"][-1].mean()
              for key in ("plain", "all", "nearest")}
    return Picture(
        "fewer-bytes-loss", figure,
        f"Mean of {numbers['seeds']} seeds, band from the lowest to the highest. After {STEPS} "
        f"steps: float32 {finals['plain']:.3f}, all bfloat16 with stochastic rounding "
        f"{finals['all']:.3f}, to the nearest {finals['nearest']:.3f}.",
        "Training loss of four ways of storing over steps at a small learning rate: stochastic "
        "rounding lies on float32, rounding to the nearest far above.",
    )


def _draw_variance(numbers: dict[str, Any]) -> Picture:
    figure, ax = style.panel("What stochastic rounding adds", "learning rate α",
                             "stationary variance of x")
    lr = np.geomspace(0.8 * RATES[0], 1.25 * RATES[-1], 60)
    for name, color, marker in (
        ("float32", style.COLOR["sgd"], "o"),
        ("bfloat16, split master", style.COLOR["nesterov"], "v"),
        ("float16", style.COLOR["momentum"], "s"), ("bfloat16", style.ACCENT, "^"),
    ):
        unit = KEPT[name][2]
        ax.plot(lr, [theory.rounded_variance(a, CURVATURE, NOISE, unit) for a in lr], color=color,
                linewidth=1.5)
        rows = [row for row in numbers["variances"] if row["type"] == name]
        ax.errorbar([row["lr"] for row in rows], [row["measured"][0] for row in rows],
                    yerr=[3 * row["measured"][1] for row in rows], ecolor=color,
                    **style.dots("sgd", color=color, marker=marker, label=name))
        if unit:
            ax.axhline(theory.rounding_floor(CURVATURE, NOISE, unit), color=color, linewidth=1,
                       linestyle=":")
    ax.set(xscale="log", yscale="log")
    ax.legend(loc="upper left")
    return Picture(
        "fewer-bytes-variance", figure,
        f"SGD on a quadratic with noise of σ = {NOISE:g}, {CHAINS:,} chains. Lines: closed form. "
        "Markers: measured, ±3 s.e. Dotted: the floor u·σ/(λ√(2π)), below which no learning rate "
        "brings an x without a master.",
        "Log-log plot of the stationary variance over the learning rate: float32 falls in "
        "proportion, and a split master with it, float16 and bfloat16 level off at their floors; "
        "markers lie on the lines.",
    )


def _draw_stall(numbers: dict[str, Any]) -> Picture:
    figure, ax = style.panel("Where the nearest stops", "learning rate α",
                             "distance from the minimum")
    lr = np.linspace(0.9 * STALLS[0], 1.05 * STALLS[-1], 800)
    ax.plot(lr, [theory.stall(a, CURVATURE, KEPT["bfloat16"][2]) for a in lr],
            color=style.GRADIENT, linewidth=1.5)
    rows = numbers["stalls"]
    ax.plot(STALLS, [row["nearest"] for row in rows],
            **style.dots("sgd", color=style.GRADIENT, label="nearest"))
    ax.errorbar(STALLS, [row["stochastic"][0] for row in rows],
                yerr=[3 * row["stochastic"][1] for row in rows], ecolor=style.ACCENT,
                **style.dots("sgd", color=style.ACCENT, marker="^", label="stochastic, mean"))
    ax.legend(loc="upper right")
    return Picture(
        "fewer-bytes-stall", figure,
        f"bfloat16, no noise, from a distance of {MINIMUM - 1:g} until e⁻⁵ of it should be left. "
        "Line: theory, the last place on the grid where α·λ·|x| is below half a unit.",
        "Final distance from the minimum over the learning rate: rounding to the nearest stops on "
        "a staircase that rises as one over the learning rate, stochastic rounding near zero.",
    )


def _draw_decay(numbers: dict[str, Any]) -> Picture:
    figure, ax = style.panel("A velocity that should decay", "step", "velocity, bfloat16")
    decay = numbers["decay"]
    ax.plot(decay["step"], MOMENTUM ** decay["step"], color=style.COLOR["sgd"], linewidth=1.5,
            label="theory ρᵏ")
    ax.plot(decay["step"][::3], decay["stochastic"][::3, 0],
            **style.dots("sgd", color=style.ACCENT, marker="^", label="stochastic, mean"))
    ax.plot(decay["step"][::3], decay["nearest"][::3, 0],
            **style.dots("sgd", color=style.GRADIENT, label="nearest"))
    ax.set_ylim(0, None)
    ax.legend(loc="center right")
    return Picture(
        "fewer-bytes-velocity", figure,
        f"Gradients of zero, ρ = {MOMENTUM}. To the nearest the velocity stays what it was: "
        "(1−ρ)·v is less than half a unit in the last place.",
        "A velocity over steps: the mean under stochastic rounding falls on the exponential, "
        "rounding to the nearest stays at one.",
    )


def story(numbers: dict[str, Any]) -> Story:
    """Tell this row."""
    of = {(row["type"], row["lr"]): row for row in numbers["variances"]}
    low, high = of["bfloat16", RATES[0]], of["bfloat16", RATES[-1]]
    plain, split = of["float32", RATES[0]], of["bfloat16, split master", RATES[0]]
    stalled = numbers["stalls"][1]
    runs = numbers["runs"]
    finals = {key: runs[SMALL, key]["loss"][-1].mean() for key in ("plain", "all", "nearest")}
    floor = theory.rounding_floor(CURVATURE, NOISE, KEPT["bfloat16"][2])
    mean, _ = numbers["decay"]["stochastic"][-1]
    innermost = max(abs(claim.measured - claim.theory) / claim.tolerance
                    for claim in checks(numbers) if claim.group == BAND and claim.tolerance)
    return Story(
        "fewer-bytes", "Fewer bytes: the same results from half types",
        "Nothing of this: its x − α·g is exact. A step waits for memory, and half types halve it; "
        "what must not get lost is the small step.",
        (
            "A bfloat16 has 8 bits of precision. A step of less than half a unit in its last place "
            "is <em>lost</em> when it is rounded to the nearest, every time: on a quadratic SGD "
            f"with α = {stalled['lr']:g} stops {stalled['nearest']:.3f} from the minimum, on the "
            f"digits with α = {SMALL:g} it is at a loss of {finals['nearest']:.2f} where float32 "
            f"is at {finals['plain']:.2f}.",
            "Two cures. A master (<code>master=\"split\"</code>) keeps the bits that the parameter "
            "cannot hold, and the steps are float32's. Stochastic rounding keeps nothing and "
            "rounds up with the probability of what is cut off: steps are right on average. With "
            f"parameters, gradients and velocities in bfloat16 the loss is {finals['all']:.2f}, "
            "within the band of float32's seeds, as it is for every way of storing in the table "
            "but rounding to the nearest.",
        ),
        "Right on average is not right each time. With a large α the noise of rounding drowns in "
        f"the gradient's ({high['measured'][0] / of['float32', RATES[-1]]['measured'][0]:.2f} "
        f"times float32's variance at α = {RATES[-1]:g}). But it has a floor, u·σ/(λ√(2π)), that "
        f"no smaller α goes below: at α = {RATES[0]:g} the variance is "
        f"{low['measured'][0] / plain['measured'][0]:.0f} times float32's, a split "
        f"master's {split['measured'][0] / plain['measured'][0]:.2f} times. Who anneals α to "
        "nothing should keep a master.",
        (
            ("Not in it: small steps arrive in half types", "mean loss and accuracy of every "
             f"cure in the inner {100 * innermost:.0f} % of the band of float32's seeds", "100 %"),
            ("– but to the nearest they get lost",
             f"SGD with α = {stalled['lr']:g} stops {stalled['nearest']:g} from the minimum",
             f"{stalled['theory']:g}"),
            ("– and stochastic rounding adds noise",
             f"stationary variance at α = {RATES[0]:g}: {number(low['measured'][0], 3)}",
             f"{number(low['theory'], 3)}, never below {number(floor, 3)}"),
            ("– a bfloat16 velocity decays", f"mean after {DECAYED[-1]} steps of ρ = {MOMENTUM}: "
             f"{mean:.4f}; to the nearest 1", f"{MOMENTUM**DECAYED[-1]:.4f}"),
        ),
    )
