"""Plots by matplotlib: entropy of attention by layer and head, and curves of a training run.

Figures are made without pyplot, which needs neither a display nor global state.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

COLORS = ("#2563a8", "#d65a28", "#3c8d40", "#8a4fa3", "#b8860b", "#5b7083", "#c2417c", "#1a9e9a")
DASHES = ("solid", "dashed", "dotted", "dashdot")  # in this order where there are more curves than colors
STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.limits": (-3, 5),  # scientific notation below 0.001
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
    "svg.fonttype": "none",  # text as text
    "svg.hashsalt": "esvit",  # reproducible files
}
LEGEND_LETTERS = 48  # that fit below a plot

Points = Sequence[tuple[float, float]]  # x and y


def entropy_plot(values: Sequence[Sequence[float]], uniform: Sequence[float], depths: Sequence[int]) -> Figure:
    """Plot the entropy of attention in bits: a dot for each head, a line through the means of the layers.

    Args:
        values: entropies of the heads of each layer.
        uniform: entropy of uniform attention in each layer; a dashed line.
        depths: layers of each stage; stages are shaded alternately.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        axes = figure.subplots()
        layers = range(len(values))
        at = [(layer, bits) for layer, heads in enumerate(values) for bits in heads]
        axes.plot(*zip(*at), "o", color=COLORS[0], alpha=0.65, markersize=6, markeredgecolor="white", label="head")
        means = [sum(heads) / len(heads) for heads in values]
        axes.plot(layers, means, color=COLORS[1], linewidth=2, label="mean of the heads")
        axes.hlines(uniform, [x - 0.5 for x in layers], [x + 0.5 for x in layers], colors="#444444", linestyles="dashed",
                    linewidth=1, label="uniform attention")  # fmt: skip
        start = 0.0
        for stage, depth in enumerate(depths if len(depths) > 1 else ()):
            middle = start + (depth - 1) / 2
            if stage % 2 == 0:
                axes.axvspan(start - 0.5, start + depth - 0.5, color="#f4f4f4", zorder=0)
            axes.annotate(
                f"stage {stage + 1}", (middle, 0.02), xycoords=("data", "axes fraction"), ha="center", color="#666666"
            )
            start += depth
        axes.set(xlim=(-0.5, len(values) - 0.5), ylim=(0, 1.08 * max(*uniform, *(bits for _, bits in at), 1e-3)))
        axes.set(title="Entropy of attention", xlabel="layer", ylabel="bits")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=16, integer=True))
        axes.grid(visible=False, axis="x")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def curve_plot(
    title: str, series: Mapping[str, Points], marks: Sequence[float] = (), levels: Mapping[str, float] | None = None
) -> Figure:
    """Plot curves over epochs, with a legend for more than one.

    Args:
        marks: epochs with a vertical line: here the run was resumed.
        levels: values with a horizontal line, by their name.
    """
    with matplotlib.rc_context(STYLE):
        named = [*series, *(levels or {})]
        columns = len(named) if sum(map(len, named)) < LEGEND_LETTERS - 4 * len(named) else 2
        rows = -(-len(named) // columns) if len(named) > 1 else 0
        figure = Figure(figsize=(4.1, 2.6 + 0.2 * rows), layout="constrained")
        axes = figure.subplots()
        for color, (name, points) in zip(cycle(COLORS), series.items()):
            marker = "o" if len(points) <= 25 else ""
            axes.plot(*zip(*points), color=color, marker=marker, markersize=4, linewidth=1.8, label=name)
        for name, value in (levels or {}).items():
            axes.axhline(value, color="#444444", linestyle="dashed", linewidth=1, label=name)
        for mark in marks:
            axes.axvline(mark, color="#444444", linestyle="dotted", linewidth=1.2)
        axes.set(title=title, xlabel="epoch")
        axes.margins(x=0.03, y=0.08)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
        if rows:
            figure.legend(loc="outside lower center", ncols=columns)
    return figure


def confusion_plot(true: Sequence[str], predicted: Sequence[str], counts: Sequence[Sequence[int]]) -> Figure:
    """Plot a confusion matrix: colors are shares of the images of a class, numbers are images."""
    images = np.asarray(counts)
    share = images / images.sum(axis=1, keepdims=True)
    cell = max(0.2, min(0.45, 5.2 / len(predicted)))  # inches
    longest = max(map(len, [*true, *predicted])) * 0.075 + 0.4
    with matplotlib.rc_context(STYLE | {"axes.grid": False}):
        width = max(len(predicted) * cell + longest + 0.5, 3.2)  # of the title
        figure = Figure(figsize=(width, len(true) * cell + longest + 0.4))
        figure.set_layout_engine("constrained")
        axes = figure.subplots()
        axes.imshow(share, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
        axes.set(ylabel="class", xlabel="classified as")
        figure.suptitle("Confusion matrix, images", fontsize=STYLE["axes.titlesize"])
        axes.set_xticks(range(len(predicted)), [name or "none" for name in predicted], rotation=90)
        axes.set_yticks(range(len(true)), true)
        axes.tick_params(length=0)
        axes.spines[["left", "bottom"]].set_visible(False)
        for row, column in zip(*images.nonzero()):
            color = "white" if share[row, column] > 0.55 else "#1e1e1e"
            axes.text(column, row, str(images[row, column]), ha="center", va="center", color=color, fontsize=8)
    return figure


def as_svg(figure: Figure) -> bytes:
    """Return a plot as SVG without metadata."""
    with matplotlib.rc_context(STYLE):
        stream = io.BytesIO()
        figure.savefig(stream, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return stream.getvalue()


def as_png(figure: Figure) -> bytes:
    """Return a plot as PNG."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=160)
    return stream.getvalue()


def curve_grid(plots: Mapping[str, Mapping[str, Points]], columns: int = 3) -> Figure:
    """Plot curves over epochs, one plot for each title, with one legend for all: a curve of a name looks the same in each.

    Args:
        plots: curves by the title of their plot and by their name.
    """
    names = list(dict.fromkeys(name for series in plots.values() for name in series))
    looks = {
        name: {"color": COLORS[i % len(COLORS)], "linestyle": DASHES[i // len(COLORS) % len(DASHES)]}
        for i, name in enumerate(names)
    }
    rows = -(-len(plots) // columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(12.9, 2.6 * rows + 0.5), layout="constrained")
        for number, (title, series) in enumerate(plots.items(), 1):
            axes = figure.add_subplot(rows, columns, number)
            for name, points in series.items():
                marker = "o" if len(points) <= 25 else ""
                axes.plot(*zip(*points), **looks[name], marker=marker, markersize=4, linewidth=1.6)  # type: ignore[arg-type]
            axes.set(title=title, xlabel="epoch")
            axes.margins(x=0.03, y=0.08)
            axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
        lines = [Line2D([], [], linewidth=2, **look) for look in looks.values()]  # type: ignore[arg-type]
        figure.legend(lines, names, loc="outside upper left", ncols=min(len(names), 6))
    return figure
