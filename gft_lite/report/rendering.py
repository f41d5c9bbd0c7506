"""Pages from templates: one file each, with its style, its scripts and a strict policy."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from gft_lite.report.charts import chart_of
from gft_lite.report.curves import SHARE, Plot
from gft_lite.utils.progress import format_duration
from gft_lite.version import __version__

_HERE = Path(__file__).parent


_UPLOT = "vendor/uplot"
_SCRIPTS = ("series.js", f"{_UPLOT}/uPlot.iife.min.js", "charts.js", "tables.js")


def render_page(template: str, drawn: Sequence[Plot], /, *scripts: str, **values: Any) -> str:
    """A page of one of the templates beside this file, with the style and the scripts of all.

    `drawn` are the plots of the page in its order, for charts in place of the drawings. The browser
    blocks every other script and every request.
    """
    loader = FileSystemLoader(_HERE)
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {
        "figure": _figure,
        "difference": _difference,
        "number": _number,
        "cosine": _cosine,
        "duration": format_duration,
    }
    script = "\n".join(map(_text, (*_SCRIPTS, *scripts)))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template(template).render(
        **values,
        version=__version__,
        style=Markup(_text(f"{_UPLOT}/uPlot.min.css") + _text("page.css")),
        licence=Markup(_text(f"{_UPLOT}/LICENSE")),
        charts=[chart_of(plot) for plot in drawn],
        script=Markup(script),
        policy=f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'",
    )


def _text(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")


def _figure(value: float | None, unit: str) -> str:
    if value is None or unit != SHARE:
        return _number(value)
    return f"{100 * value:.1f}%"


def _difference(value: float, unit: str) -> str:
    """A difference of shares in percentage points, or of other figures."""
    return f"{round(100 * value, 1) + 0.0:+.1f}" if unit == SHARE else f"{value + 0.0:+.3g}"


def _cosine(value: float | None) -> str:
    return "-" if value is None else f"{value + 0.0:+.2f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"
