"""`gft-lite report`: runs and sweeps as one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup
from rich.console import Console

from gft_lite.report.curves import (
    Plot,
    evaluation_plots,
    pass_at_k_plots,
    step_plots,
    sweep_plot,
    sweep_units,
)
from gft_lite.report.group_browser import (
    StepGroups,
    other_steps,
    page_groups,
    score_tokens,
    select_steps,
)
from gft_lite.report.headline import (
    best_of_sweep,
    best_scores,
    best_step_of,
    changed_settings,
    tokens_of,
    total_seconds,
)
from gft_lite.report.ledger import gradients_by_source
from gft_lite.report.loading import Run, Series, Sweep, all_series, read_folders
from gft_lite.report.rendering import render_page
from gft_lite.report.summary import (
    cost_of,
    differing_settings,
    facts_of,
    kl_of,
    scores_of,
    seconds_of,
)
from gft_lite.utils.errors import UserError
from gft_lite.utils.files import check_output_path, write_text_atomic
from gft_lite.utils.progress import stderr_console

__all__ = ["write_report"]


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

    `plots` is a folder for every plot as SVG and PNG. With `tokens`, the policies are loaded to
    color the tokens of the shown groups, `groups` of each step.

    Raises: UserError for a folder that is neither a run nor a sweep, for an output path that cannot
    be written to, and without matplotlib.
    """
    try:
        from gft_lite.report.plots import PALETTE, inline_svg, write_files
    except ModuleNotFoundError as error:
        rule = f"report: matplotlib must be installed, got {error}"
        raise UserError([f"{rule}. pip install 'gft-lite[report]'."]) from error
    _check_arguments(out, plots, groups)
    runs, sweeps = read_folders(folders)
    series = all_series(runs, sweeps)
    with_groups = _runs_with_groups(runs, sweeps)
    shown = [step for run in with_groups for step in select_steps(run, groups)]
    unscored = score_tokens(shown, console or stderr_console()) if tokens else ["--no-tokens"]
    curves = [*evaluation_plots(series), *pass_at_k_plots(series), *step_plots(series)]
    of_sweeps = [sweep_plot(sweep) for sweep in sweeps]

    def drawn(plot: Plot) -> tuple[Plot, str]:
        return plot, Markup(inline_svg(plot))

    described = [_run(run) for run in runs]
    page = render_page(
        "page.html.j2",
        [*filter(None, of_sweeps), *curves],
        "page.js",
        title=", ".join([*(run.label for run in runs), *(sweep.label for sweep in sweeps)]),
        runs=described,
        best=best_scores(run["scores"] for run in described),
        changes={name: s.change for run in described for name, s in run["scores"].items()},
        longest=max(map(total_seconds, runs), default=0.0),
        settings=differing_settings(runs),
        sweeps=[_sweep(s, drawn(p) if p else None) for s, p in zip(sweeps, of_sweeps, strict=True)],
        **_series(series, PALETTE),
        curves=[drawn(plot) for plot in curves],
        groups=page_groups(_all_steps(shown, with_groups, groups)),
        gradients=gradients_by_source(with_groups),
        unscored=unscored,
    )
    write_text_atomic(Path(out), page)
    if plots is not None:
        for plot in (*curves, *filter(None, of_sweeps)):
            write_files(plot, Path(plots))
    return Path(out)


def _check_arguments(out: str | Path, plots: str | Path | None, groups: int) -> None:
    if groups < 1:
        rule = f"--groups: must be at least 1, got {groups}"
        raise UserError([f"{rule}. Use --no-tokens to load no model."])
    check_output_path(out, kind="file")
    if plots is not None:
        check_output_path(plots, "--plots")


def _runs_with_groups(runs: Iterable[Run], sweeps: Iterable[Sweep]) -> list[Run]:
    """The runs whose groups are shown: all runs, and the first seed at each point of a sweep."""
    firsts = [
        next((trial.run for trial in point.trials if trial.run), None)
        for sweep in sweeps
        for point in sweep.points
    ]
    return [*runs, *(run for run in firsts if run)]


def _all_steps(shown: Sequence[StepGroups], runs: Sequence[Run], groups: int) -> list[StepGroups]:
    """The steps with p of their tokens and the others, in order."""
    steps: list[StepGroups] = []
    for run in runs:
        own = [step for step in shown if step.run is run]
        steps += sorted([*own, *other_steps(run, own, groups, len(runs))], key=lambda s: s.step)
    return steps


def _series(series: Sequence[Series], palette: Sequence[str]) -> dict[str, Any]:
    return {
        "palette": palette,
        "series": [(one.label, palette[i % len(palette)]) for i, one in enumerate(series)],
        "series_runs": [[run.label for run in one.runs] for one in series],
    }


def _run(run: Run) -> dict[str, Any]:
    return {
        "label": run.label,
        "facts": facts_of(run),
        "scores": scores_of(run),
        "kl": kl_of(run),
        "cost": cost_of(run),
        "seconds": seconds_of(run),
        "time": total_seconds(run),
        "tokens": tokens_of(run),
        "best_step": best_step_of(run),
        "changed": changed_settings(run),
        "recipe": run.recipe.to_yaml(),
    }


def _sweep(sweep: Sweep, plot: tuple[Plot, str] | None) -> dict[str, Any]:
    return {
        "plot": plot,
        "label": sweep.label,
        "interval": sweep.interval,
        "fields": ["demonstrations : self" if f == "group" else f for f in sweep.fields],
        "points": sweep.points,
        "units": sweep_units(sweep),
        "base": sweep.base,
        "best": best_of_sweep(sweep),
    }
