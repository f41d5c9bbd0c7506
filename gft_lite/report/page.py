"""`gft-lite report`: runs and sweeps as one self-contained HTML page."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from rich.console import Console

from gft_lite.report.curves import Plot, pass_at_k_plots, step_plots, sweep_plot
from gft_lite.report.group_browser import moments, page_groups, score
from gft_lite.report.loading import Run, Sweep, all_series, read_folders
from gft_lite.report.summary import (
    cost_of,
    differing_settings,
    facts_of,
    kl_of,
    scores_of,
    seconds_of,
)
from gft_lite.utils.errors import RecipeError
from gft_lite.utils.files import write_text_atomic
from gft_lite.version import __version__

__all__ = ["write_report"]

_HERE = Path(__file__).parent


def write_report(
    folders: Sequence[str | Path],
    out: str | Path = "report.html",
    *,
    plots: str | Path | None = None,
    tokens: bool = True,
    groups: int = 8,
    console: Console | None = None,
) -> Path:
    """Write one page about runs and sweeps; returns its path.

    `plots` is a folder for every plot as SVG and PNG. `tokens` loads the policies to colour the
    tokens of the groups shown, `groups` of each step.

    Raises: RecipeError for a folder that is neither a run nor a sweep, and without matplotlib.
    """
    try:
        from gft_lite.report.plots import PALETTE, inline_svg, write_files
    except ModuleNotFoundError as error:
        rule = f"gft-lite report: needs matplotlib ({error})"
        raise RecipeError([f"{rule}. pip install 'gft-lite[report]'."]) from error
    if groups < 1:
        rule = f"--groups: must be at least 1, got {groups}"
        raise RecipeError([f"{rule}. To load no model, say --no-tokens."])
    console = console or Console(stderr=True)
    runs, sweeps = read_folders(folders)
    series = all_series(runs, sweeps)
    shown = [m for run in _browsed(runs, sweeps) for m in moments(run, groups)]
    unscored = score(shown, console) if tokens else ["left out, as --no-tokens asks"]
    curves = [*pass_at_k_plots(series), *step_plots(series)]
    of_sweeps = [sweep_plot(sweep) for sweep in sweeps]

    def drawn(plot: Plot) -> tuple[Plot, str]:
        return plot, Markup(inline_svg(plot))

    page = _render(
        title=", ".join([*(run.label for run in runs), *(sweep.label for sweep in sweeps)]),
        runs=[_run(run) for run in runs],
        longest=max((sum(seconds_of(run).values()) for run in runs), default=0.0),
        settings=differing_settings(runs),
        sweeps=[
            {**_sweep(sweep), "plot": plot and drawn(plot)}
            for sweep, plot in zip(sweeps, of_sweeps, strict=True)
        ],
        series=[(one.label, PALETTE[i % len(PALETTE)]) for i, one in enumerate(series)],
        curves=[drawn(plot) for plot in curves],
        groups=page_groups(shown),
        unscored=unscored,
    )
    write_text_atomic(Path(out), page)
    if plots is not None:
        for plot in (*curves, *filter(None, of_sweeps)):
            write_files(plot, Path(plots))
    return Path(out)


def _browsed(runs: Iterable[Run], sweeps: Iterable[Sweep]) -> list[Run]:
    """Whose groups are shown: every run's, and those of the first seed at each point."""
    firsts = [
        next((trial.run for trial in point.trials if trial.run), None)
        for sweep in sweeps
        for point in sweep.points
    ]
    return [*runs, *(run for run in firsts if run)]


def _run(run: Run) -> dict[str, Any]:
    return {
        "label": run.label,
        "facts": facts_of(run),
        "scores": scores_of(run),
        "kl": kl_of(run),
        "cost": cost_of(run),
        "seconds": seconds_of(run),
        "recipe": run.recipe.to_yaml(),
    }


def _sweep(sweep: Sweep) -> dict[str, Any]:
    return {
        "label": sweep.label,
        "interval": sweep.interval,
        "fields": ["demonstrations : self" if f == "group" else f for f in sweep.fields],
        "points": sweep.points,
        "figures": list(dict.fromkeys(n for point in sweep.points for n in point.figures)),
        "base": sweep.base,
    }


def _render(**values: Any) -> str:
    loader = FileSystemLoader(_HERE)
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"share": _share, "points": _points, "number": _number}
    script = (_HERE / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("page.html.j2").render(
        **values,
        version=__version__,
        style=Markup((_HERE / "page.css").read_text(encoding="utf-8")),
        script=Markup(script),
        # The browser itself then refuses any other script, and every request.
        policy=f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'",
    )


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}%"


def _points(value: float | None) -> str:
    """A difference of shares."""
    return "-" if value is None else f"{round(100 * value, 1) + 0.0:+.1f}"  # No -0.0.


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"
