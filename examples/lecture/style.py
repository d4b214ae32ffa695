"""One look for all figures: the lecture's black, blue and green, told apart without colour too.

All colours are those of Okabe and Ito, which stay apart under every common colour blindness;
line style and marker repeat what the colour says. Every picture is a single panel that a phone can
show at its full width, so that the page may stack them.
"""
from __future__ import annotations

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

COLOR = {"sgd": "#000000", "momentum": "#0072B2", "nesterov": "#009E73", "adagrad": "#E69F00",
         "rmsprop": "#D55E00", "adam": "#CC79A7"}
DASHES = {"sgd": "-", "momentum": "-", "nesterov": (0, (5, 1.6)), "adagrad": (0, (1, 1)),
          "rmsprop": "-", "adam": (0, (5, 1.6))}
MARKER = {"sgd": "o", "momentum": "s", "nesterov": "^", "adagrad": "D", "rmsprop": "v", "adam": "P"}
GRADIENT = "#D55E00"   # the lecture's red arrow, in the vermilion of the same palette
ACCENT = "#CC79A7"
GREY = "#767676"

_RC = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#555555",
    "axes.grid": True,
    "axes.labelsize": 12.5,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 13.5,
    "axes.titleweight": "bold",
    "axes.titlepad": 10,
    "figure.constrained_layout.use": True,
    "figure.dpi": 100,
    "figure.facecolor": "white",
    "font.family": "DejaVu Sans",
    "font.size": 12,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.8,
    "legend.fontsize": 11.5,
    "legend.frameon": False,
    "lines.linewidth": 2.0,
    "lines.markersize": 5.5,
    "mathtext.fontset": "dejavusans",
    "savefig.dpi": 160,
    "svg.hashsalt": "lecture",   # the same figure gives the same file
    "xtick.color": "#333333",
    "xtick.labelsize": 11.5,
    "ytick.color": "#333333",
    "ytick.labelsize": 11.5,
}


def panel(title: str, xlabel: str, ylabel: str, *, size: tuple[float, float] = (5.4, 4.3)
          ) -> tuple[Figure, Axes]:
    """Return a figure of one panel in the gallery's style."""
    mpl.rcParams.update(_RC)
    figure = Figure(figsize=size)
    ax = figure.add_subplot()
    ax.set(title=title, xlabel=xlabel, ylabel=ylabel)
    return figure, ax


def freeze(figure: Figure) -> None:
    """Lay a figure out once and for all: what costs most of the time, were each draw to do it."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")


def line(rule: str, **more: object) -> dict[str, object]:
    """Return the keywords that draw a rule's curve."""
    return {"color": COLOR[rule], "linestyle": DASHES[rule], **more}


def dots(rule: str, **more: object) -> dict[str, object]:
    """Return the keywords that draw a rule's measurements: markers without a line."""
    return {"color": COLOR[rule], "linestyle": "none", "marker": MARKER[rule],
            "markeredgecolor": "white", "markeredgewidth": 0.7, "markersize": 7, **more}


def compare(ax: Axes, rule: str, label: str, theory: tuple[object, object],
            measured: tuple[object, object]) -> None:
    """Draw what theory says as a rule's line, and what was measured as its markers."""
    ax.plot(*theory, **line(rule, linewidth=1.5))
    ax.plot(*measured, **dots(rule, label=label))


def path(ax: Axes, rule: str, label: str, points: np.ndarray, **more: object) -> None:
    """Draw a trajectory ``(steps, 2)``: the line, every iterate, and the start."""
    ax.plot(*points.T, **{**line(rule, linewidth=1.5, label=label, marker=MARKER[rule],
                                 markersize=3.6), **more})


def contours(ax: Axes, x: np.ndarray, y: np.ndarray, loss: np.ndarray, levels: int = 12) -> None:
    """Draw a loss over the plane: levels even in √loss, so that a bowl has evenly spaced rings."""
    low, high = loss.min(), loss.max()
    rings = low + (high - low) * np.linspace(0, 1, levels + 2)[1:-1] ** 2
    ax.contourf(x, y, loss, levels=[low, *rings, high], cmap="Greys", alpha=0.22)
    ax.contour(x, y, loss, levels=rings, colors="#a8a8a8", linewidths=0.7)
    ax.grid(visible=False)


def arrow(ax: Axes, tail: np.ndarray, vector: np.ndarray, color: str, **more: object) -> None:
    """Draw a vector where it acts."""
    ax.annotate("", xy=tail + vector, xytext=tail,
                arrowprops={"arrowstyle": "-|>,head_width=.35,head_length=.7", "color": color,
                            "linewidth": 2.6, "shrinkA": 0, "shrinkB": 0, **more})


def tag(ax: Axes, at: np.ndarray, text: str, color: str, offset: tuple[float, float],
        align: str = "center") -> None:
    """Write a label beside a point, on a halo that keeps contour lines off it."""
    label = ax.annotate(text, xy=at, xytext=offset, textcoords="offset points", color=color,
                        fontsize=11.5, fontweight="bold", ha=align)
    label.set_path_effects([withStroke(linewidth=3.5, foreground="white")])


def between(low: str, high: str) -> LinearSegmentedColormap:
    """Return a colour map from one rule's colour over white to another's."""
    return LinearSegmentedColormap.from_list("between", [low, "white", high])
