"""The data of the page's interactive charts, and the axes that they share with the drawn plots."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from gft_lite.report.curves import BASE, SHARE, Curve, Plot

_LEAST_SHARE, _LEAST_NUMBER = 0.1, 1e-3  # Least spans, so that noise does not look like a trend.
_SPACE = 0.05  # Above and below the values, as a part of their span.


def value_range(
    curves: Sequence[Curve], unit: str, *, from_zero: bool = False
) -> tuple[float, float]:
    """The lower and upper end of the vertical axis.

    Shares stay within [0, 1] and span at least ten points; the axis of numbers contains 0.
    """
    sides = (side or () for curve in curves for side in (curve.y, curve.low, curve.high))
    values = [v for side in sides for v in side if v is not None and math.isfinite(v)]
    if unit == SHARE:
        values = [min(max(v, 0.0), 1.0) for v in values]
    if unit != SHARE or from_zero or not values:
        values.append(0.0)
    low, high = min(values), max(values)
    space = _SPACE * (high - low)
    low, high = low - space * (low != 0), high + space * (high != 0)
    if unit != SHARE:
        return low, max(high, low + _LEAST_NUMBER)
    span = min(max(high - low, _LEAST_SHARE), 1.0)
    low = min(max((low + high - span) / 2, 0.0), 1 - span)
    return low, low + span


def chart_of(plot: Plot) -> dict[str, Any] | None:
    """A plot as JSON for the page's script; None for a scatter, which stays a drawing."""
    if plot.scatter:
        return None
    second = plot.second
    return {
        "x": plot.x_label,
        "y": plot.y_label,
        "unit": plot.unit,
        "points": plot.points,
        "log": plot.log_x,
        "bySeries": plot.by_series,
        "range": value_range(plot.curves, plot.unit),
        "curves": [_curve(curve) for curve in plot.curves],
        "second": second and {
            **_curve(second), "range": value_range([second], SHARE, from_zero=True)
        },
    }  # fmt: skip


def _curve(curve: Curve) -> dict[str, Any]:
    return {
        "label": curve.label,
        "color": curve.color if curve.color != BASE else None,
        "dash": curve.dash,
        "x": list(curve.x),
        "y": _rounded(curve.y),
        "low": _rounded(curve.low),
        "high": _rounded(curve.high),
        "rings": list(curve.rings),
    }


def _rounded(values: Sequence[float | None] | None) -> list[float | None] | None:
    """Values with six digits; JSON has neither NaN nor infinity."""
    if values is None:
        return None
    return [None if v is None or not math.isfinite(v) else float(f"{v:.6g}") for v in values]
