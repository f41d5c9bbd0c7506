"""Plots drawn with matplotlib: inline SVG in the page's colors, SVG and PNG files."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, NullLocator

from gft_lite.report.charts import value_range
from gft_lite.report.curves import BASE, SHARE, Curve, Plot

# Of medium lightness, for contrast with white and with black.
PALETTE = ("#2f7fd1", "#e0722b", "#2e9d63", "#c7457e", "#8a67d6", "#b08a1c", "#1fa0a8", "#8a6a55")
_DASHES = ("-", "--", ":", "-.")
# In the page these are variables, with other values in the dark color scheme.
_INK, _FAINT, _RULE, _BASE = "#1d2430", "#5b6675", "#d9dee5", "#7d8794"
_VARIABLES = {_INK: "var(--ink)", _FAINT: "var(--faint)", _RULE: "var(--rule)"}
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "gft-lite",
    "text.parse_math": False,  # Names of runs may contain dollar signs.
    "font.size": 9.5,
    "text.color": _INK,
    "axes.labelcolor": _FAINT,
    "axes.edgecolor": _RULE,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": _RULE,
    "grid.linewidth": 0.7,
    "xtick.color": _RULE,
    "ytick.color": _RULE,
    "xtick.labelcolor": _FAINT,
    "ytick.labelcolor": _FAINT,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}


def color_of(index: int) -> str:
    """The color of a curve."""
    return _BASE if index == BASE else PALETTE[index % len(PALETTE)]


def inline_svg(plot: Plot) -> str:
    """The plot as an `<svg>` element; the class `curve-N` of a curve has its color index N."""
    with _figure(plot, legend=not plot.by_series) as figure:
        text = svg_text(figure)
    for fixed, variable in _VARIABLES.items():
        text = text.replace(fixed, variable)
    text = re.sub(r'id="(curve-\d+)(?:_\d+)?"', r'class="\1"', text[text.index("<svg") :])
    return text.replace("<svg ", f'<svg role="img" data-plot="{plot.name}" ', 1)


def write_files(plot: Plot, folder: Path) -> None:
    """Write `NAME.svg` and `NAME.png`, with title and legend, for papers and slides."""
    folder.mkdir(parents=True, exist_ok=True)
    with _figure(plot, legend=True) as figure:
        figure.axes[0].set_title(plot.title, loc="left", fontsize=11)
        figure.set_facecolor("white")
        (folder / f"{plot.name}.svg").write_text(svg_text(figure), encoding="utf-8")
        figure.savefig(folder / f"{plot.name}.png", dpi=160)


def svg_text(figure: Figure) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


@contextmanager
def _figure(plot: Plot, *, legend: bool) -> Iterator[Figure]:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.2, 2.9), layout="constrained")
        axes = figure.add_subplot()
        draw = _scatter if plot.scatter else _draw
        lines = [draw(axes, curve, plot.points) for curve in plot.curves]
        labels = [curve.label for curve in plot.curves]
        axes.set_xlabel(plot.x_label)
        axes.set_ylabel(plot.y_label)
        _scale(axes, plot)
        if plot.second:
            lines.append(_second_axis(axes, plot.second))
            labels.append(plot.second.label)
        if legend and len(lines) > 1:
            figure.legend(lines, labels, loc="outside lower center", ncols=3, fontsize=8.5)
        yield figure


def _draw(axes: Axes, curve: Curve, points: bool) -> Any:
    """Draw a curve and its range with the id by which the page hides both; returns the line."""
    look: Any = {"color": color_of(curve.color), "gid": f"curve-{curve.color}"}
    y = _gaps(curve.y)
    low, high = (_gaps(curve.y if side is None else side) for side in (curve.low, curve.high))
    # A value between two gaps is a line without length.
    marked = None if points else _isolated(y)
    style = curve.dash or curve.color // len(PALETTE)
    dash = _DASHES[style % len(_DASHES)] if curve.color != BASE else "--"
    [line] = axes.plot(curve.x, y, dash, marker="o", markevery=marked, markersize=4, **look)
    _rings(axes, curve, look)
    if points and curve.low is not None:
        axes.vlines(curve.x, low, high, linewidth=1.2, **look)
    elif curve.low is not None:
        axes.fill_between(curve.x, low, high, alpha=0.15, linewidth=0, **look)
    return line


def _isolated(values: Sequence[float]) -> list[int]:
    """The places of values between two gaps or ends."""
    known = [False, *map(math.isfinite, values), False]
    return [i for i in range(len(values)) if known[i + 1] and not known[i] and not known[i + 2]]


def _rings(axes: Axes, curve: Curve, look: dict[str, Any]) -> None:
    places = [(curve.x[i], curve.y[i]) for i in curve.rings]
    if places:
        x, y = zip(*places, strict=True)
        axes.plot(x, y, "o", markersize=10, fillstyle="none", markeredgewidth=1.4, **look)


def _scatter(axes: Axes, curve: Curve, points: bool) -> Any:
    """Draw a labelled mean, large, and what it is the mean of, small."""
    look: Any = {"color": color_of(curve.color), "gid": f"curve-{curve.color}"}
    y = _gaps(curve.y)
    axes.plot(curve.x[1:], y[1:], "o", markersize=3, alpha=0.5, linewidth=0, **look)
    [line] = axes.plot(curve.x[:1], y[:1], "o", markersize=6.5, **look)
    _rings(axes, curve, look)
    label = curve.label if len(curve.label) <= 18 else f"{curve.label[:17]}..."
    axes.annotate(label, (curve.x[0], y[0]), (7, 6), textcoords="offset points", fontsize=8.5,
                  **look)  # fmt: skip
    return line


def _gaps(values: Sequence[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]


def _scale(axes: Axes, plot: Plot) -> None:
    if plot.log_x:
        axes.set_xscale("log")
    if plot.front:
        x, y = zip(*plot.front, strict=True)
        axes.plot(x, y, "--", color=_BASE, linewidth=1, zorder=0)
    if plot.scatter:
        axes.margins(0.14, 0.16)  # Space for the labels.
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(_short)
    elif plot.points:
        ticks = list(dict.fromkeys(x for curve in plot.curves for x in curve.x))
        axes.set_xticks(ticks, _labels_apart(ticks, log=plot.log_x))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    if plot.unit == SHARE:
        axes.yaxis.set_major_formatter(_percent)
    if not plot.scatter:
        axes.set_ylim(*value_range(plot.curves, plot.unit))
    elif plot.unit == SHARE:
        # Intervals of few seeds can exceed the range of a share.
        low, high = axes.get_ylim()
        axes.set_ylim(max(low, -0.03), min(high, 1.03))


def _labels_apart(ticks: Sequence[float], *, log: bool) -> list[str]:
    """The ticks' labels; one that would touch the one to its left is empty."""
    at = [math.log(x) if log else x for x in ticks]
    span = max(at) - min(at) or 1.0
    labels, end = dict.fromkeys(ticks, ""), -math.inf
    for place, x in sorted(zip(at, ticks, strict=True)):
        half = 0.009 * len(f"{x:g}")  # As a share of the axis; so is the space between labels.
        if (place - min(at)) / span - half >= end + 0.015:
            labels[x], end = f"{x:g}", (place - min(at)) / span + half
    return list(labels.values())


def _short(value: float, _: object) -> str:
    return EngFormatter(sep="")(value) if abs(value) >= 1000 else f"{value:g}"


def _percent(share: float, _: object) -> str:
    return f"{100 * share:.3g}%"


def _second_axis(axes: Axes, curve: Curve) -> Any:
    right = axes.twinx()
    [line] = right.plot(curve.x, _gaps(curve.y), ":", marker="s", markersize=3.5,
                        color=color_of(curve.color), gid=f"curve-{curve.color}")  # fmt: skip
    right.set_ylabel(curve.label)
    right.set_ylim(*value_range([curve], SHARE, from_zero=True))
    right.grid(False)
    right.yaxis.set_major_locator(MaxNLocator(5))
    right.yaxis.set_major_formatter(_percent)
    return line
