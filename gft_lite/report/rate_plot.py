"""The plot of a learning-rate range test: each figure over the rate."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from gft_lite.report.plots import PALETTE, STYLE, svg_text


def write_rate_plot(
    folder: Path, rates: Sequence[float], figures: Mapping[str, Sequence[float | None]],
    advised: float | None, title: str,
) -> None:  # fmt: skip
    """Write `lr-range.svg` and `lr-range.png` with a panel for each figure.

    `advised` is the rate of the vertical line.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        figure = Figure((7.5, 1.9 * len(figures)), layout="constrained", facecolor="white")
        panels = figure.subplots(len(figures), sharex=True, squeeze=False)[:, 0]
        for color, axes, (name, values) in zip(PALETTE, panels, figures.items(), strict=False):
            y = [math.nan if value is None else value for value in values]
            axes.plot(rates, y, marker="o", markersize=3, color=color)
            axes.set_ylabel(name)
            if advised:
                axes.axvline(advised, color=STYLE["text.color"], linewidth=1, linestyle="--")
        panels[-1].set_xscale("log")
        panels[-1].xaxis.set_major_formatter(lambda rate, _: f"{rate:.0e}")
        panels[-1].set_xlabel("learning rate")
        panels[0].set_title(title, loc="left", fontsize=11)
        (folder / "lr-range.svg").write_text(svg_text(figure), encoding="utf-8")
        figure.savefig(folder / "lr-range.png", dpi=160)
