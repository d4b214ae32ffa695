"""The pictures: colours that the colour-blind tell apart, and a marker for each line besides."""
from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from cases import RULES, SHOWN
from contenders import FUNCTION, LIMIT, LITERAL, OUT, STEP
from matplotlib.figure import Figure
from shapes import MODELS

if TYPE_CHECKING:
    from report import Key, Results

COLUMNS = 4         # panels side by side

# Okabe and Ito's palette: https://jfly.uni-koeln.de/color/
ORANGE, SKY, GREEN, BLUE, RED, PINK = (
    "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7"
)
INK, FAINT = "#222222", "#8A8A8A"

# optcore is drawn over all others; what belongs together shares a colour.
STYLES = {
    LITERAL: (FAINT, "v", "--"),
    OUT: (FAINT, "o", "-"),
    "PyTorch, for-loop": (ORANGE, "v", ":"),
    "PyTorch, foreach": (ORANGE, "s", "--"),
    "PyTorch, fused": (ORANGE, "o", "-"),
    "PyTorch, compiled": (ORANGE, "^", "-."),
    "Numba, fastmath": (GREEN, "D", "-"),
    "JAX + optax, donated": (PINK, "P", "-"),
    "BLAS saxpy": (SKY, "X", "-"),
    "DeepSpeed, CPU Adam": (SKY, "s", "--"),
    FUNCTION: (RED, "s", "--"),
    STEP: (BLUE, "o", "-"),
}
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
}


def _caption(machine: dict[str, Any]) -> str:
    return f"{machine['CPU']}, {machine['caches']}; optcore {machine['optcore']}; {machine['date']}"


def _points(results: Results, keys: list[Key], name: str) -> tuple[list[int], np.ndarray]:
    """Return lengths, and for each the lower quartile, median and upper quartile of GB/s."""
    found = sorted(
        (int(float(key[1])), value.quartiles) for key in keys
        if (value := results.bandwidth(key, name)) is not None
    )
    return [x for x, _ in found], np.array([y for _, y in found]).reshape(-1, 3)


def _vectors(results: Results, job: str, dtype: str, threads: int) -> list[Key]:
    return [
        key for key in results.cases
        if key[0] == job and key[2:] == (dtype, threads) and key[1] not in MODELS
    ]


def _panels(results: Results, machine: dict[str, Any], rows: list[tuple[str, int]], title: str,
            path: Path) -> None:
    """Draw GB/s over length: a panel for each rule, lines of them for each (dtype, threads)."""
    jobs = [job for job in SHOWN if any(key[0] == job for key in results.cases)]
    width = min(len(jobs), COLUMNS)
    parts = [jobs[i : i + width] for i in range(0, len(jobs), width)]
    with mpl.rc_context(STYLE):
        lines = list(product(rows, parts))
        size = 11 / 3 * max(width, 3), 1.5 + 2.7 * len(lines)
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(len(lines), width, sharex=True, sharey="row", squeeze=False)
        handles = {}
        lowest = {}
        for line, ((dtype, threads), part) in zip(grid, lines, strict=True):
            lowest |= enumerate(line[: len(part)])
            for axes in line[len(part) :]:
                axes.set_visible(False)
            for axes, job in zip(line, part, strict=False):
                keys = _vectors(results, job, dtype, threads)
                plural = "s" if threads > 1 else ""
                axes.set_title(f"{RULES[job].label}, {dtype}, {threads} thread{plural}")
                axes.set_xscale("log")
                axes.set_yscale("log")
                axes.grid(visible=True, color="#E6E6E6", linewidth=0.6)
                axes.set_axisbelow(True)
                x, y = _points(results, keys, LIMIT)
                if x:
                    limit = y[:, 1]
                    handles[LIMIT], = axes.plot(x, limit, color=INK, linewidth=1.2, label=LIMIT)
                    axes.fill_between(x, limit, max(limit) * 3, color="#F1F1F1", zorder=0)
                for name, (color, marker, dashes) in STYLES.items():
                    x, y = _points(results, keys, name)
                    if x:
                        ours = name == STEP
                        axes.vlines(x, y[:, 0], y[:, 2], color=color, linewidth=3, alpha=0.35)
                        handles[name], = axes.plot(
                            x, y[:, 1], dashes, color=color, marker=marker, label=name,
                            markersize=5 if ours else 4, linewidth=2 if ours else 1.1,
                            zorder=3 if ours else 2,
                        )
            line[0].set_ylabel("GB/s of the least traffic")
        for axes in lowest.values():
            axes.set_xlabel("parameters")
            axes.tick_params(labelbottom=True)
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold", color=INK)
        figure.legend(
            list(handles.values()), list(handles), loc="outside lower center",
            ncols=min(len(handles), 6),
        )
        figure.text(0.99, 0.985, _caption(machine), ha="right", va="top", color=FAINT, fontsize=7)
        figure.savefig(path, dpi=130)


def engine_figure(results: Results, machine: dict[str, Any], path: Path) -> None:
    """Draw optcore at its best SIMD level against NumPy."""
    dtypes = sorted({key[2] for key in results.cases})
    _panels(results, machine, [(dtype, 1) for dtype in dtypes], "One step, one thread", path)


def roofline_figure(results: Results, machine: dict[str, Any], path: Path) -> None:
    """Draw every implementation under the memory limit."""
    threads = sorted({key[3] for key in results.cases})
    _panels(
        results, machine, [("float32", n) for n in threads], "One step under the memory limit", path
    )
