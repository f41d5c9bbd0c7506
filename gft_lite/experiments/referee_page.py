"""The page of a comparison: verdicts, quality and cost, plots, tuning, failures, rules, runs."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

from gft_lite.experiments.outcomes import Comparison
from gft_lite.experiments.referee_plots import quality_plots, tuning_plots
from gft_lite.experiments.referee_tables import (
    BASE,
    Summary,
    base_scores,
    edges,
    set_means,
    settings_text,
    summaries,
    tuning_curves,
)
from gft_lite.experiments.verdict import (
    KL,
    Verdict,
    figure_text,
    headline_sentences,
    p_text,
    rules,
)
from gft_lite.report.curves import Plot
from gft_lite.report.rendering import render_page
from gft_lite.report.summary import PHASES

_MOODS = {"better": "good", "worse": "poor", "lower": "good", "higher": "poor",
          "not separable": "unsure", "not compared": "unsure"}  # fmt: skip
Cell = dict[str, Any]  # `text`, `small` beside it, and the `value` to sort by.


def referee_page(
    comparison: Comparison, found: Mapping[str, Sequence[Verdict]], folder: Path
) -> str:
    """The page as HTML, with links to the runs that are in its folder.

    Without matplotlib it has no plots and says so.
    """
    drawn: list[list[tuple[Plot, str]]] = [[], []]
    colors = dict.fromkeys(comparison.methods, "")
    palette: Sequence[str] = ()
    no_plots = "Plots need matplotlib: pip install 'gft-lite[report]'."
    if importlib.util.find_spec("matplotlib") is not None:
        from gft_lite.report.plots import PALETTE, color_of, inline_svg

        no_plots, palette = "", PALETTE
        colors = {method: color_of(i) for i, method in enumerate(comparison.methods)}
        plots = quality_plots(comparison), tuning_plots(comparison)
        drawn = [[(plot, Markup(inline_svg(plot))) for plot in some] for some in plots]
    sets = (comparison.headline, *comparison.retention)
    by_method = summaries(comparison)
    return render_page(
        "referee.html.j2", [plot for some in drawn for plot, _ in some],
        title=comparison.name,
        against=comparison.against,
        headline=comparison.headline,
        margin=f"{100 * comparison.margin:g}",
        answer=headline_sentences(comparison, found[comparison.headline]) or [comparison.name],
        edges=edges(comparison),
        palette=palette,
        series_runs=[],
        colors={method: color for method, color in colors.items() if color},
        measures=[_measure(name, rows, comparison) for name, rows in found.items() if rows],
        columns=["method", *(f"{name}, %" for name in sets), "KL", "trained tokens",
                 "rollout tokens", "seconds", "peak memory, GiB", "runs"],
        methods=[*(_method(s, sets) for s in by_method.values()), _before(comparison, sets)],
        seconds=_seconds(by_method.values()),
        plots=drawn[0],
        no_plots=no_plots,
        tuning_plots=drawn[1],
        tuning=_tuning(comparison),
        failures=[(failure, _link(folder, failure.run)) for failure in comparison.failures],
        rules=rules(comparison),
        runs=_runs(comparison, folder),
        recipes=comparison.recipes,
        design=comparison.design,
    )  # fmt: skip


def _cell(value: float | None, text: str = "-", small: str = "") -> Cell:
    return {"text": "-" if value is None else text, "small": small,
            "value": "" if value is None else value}  # fmt: skip


def _number(value: float | None, form: str = ",.0f") -> Cell:
    return _cell(value, "" if value is None else f"{value:{form}}")


# --- verdicts --------------------------------------------------------------------------------


def _measure(name: str, verdicts: Sequence[Verdict], comparison: Comparison) -> dict[str, Any]:
    """A table of verdicts; its intervals are drawn on one scale with 0 in the middle."""
    ends = [abs(e) for v in verdicts for e in (v.low, v.high) if e is not None]
    margin = 0.0 if name == KL else comparison.margin
    scale = 1.05 * max([*ends, margin]) or 1.0
    titles = {comparison.headline: f"{name}: the headline", KL: "KL to the base"}
    return {
        "title": titles.get(name, f"{name}: kept from before"),
        "unit": "nats per token" if name == KL else "points",
        "rows": [_row(verdict, scale) for verdict in verdicts],
        "margin": _span(-margin, margin, scale),
    }


def _row(verdict: Verdict, scale: float) -> dict[str, Any]:
    of_kl = verdict.measure == KL

    def cell(value: float | None, *, signed: bool = True) -> Cell:
        return _cell(value, figure_text(value, of_kl=of_kl, signed=signed))

    bar, interval = None, verdict.reason
    if verdict.low is not None and verdict.high is not None and verdict.difference is not None:
        bar = _span(verdict.low, verdict.high, scale)
        bar["point"] = _percent(verdict.difference, scale)
        low, high = (figure_text(v, of_kl=of_kl) for v in (verdict.low, verdict.high))
        interval = f"{low} to {high}"
    return {
        "method": verdict.method, "word": verdict.word, "mood": _MOODS.get(verdict.word, ""),
        "difference": cell(verdict.difference), "bar": bar, "interval": interval,
        "p": _cell(verdict.p, p_text(verdict.p)),
        "detectable": cell(verdict.detectable, signed=False),
        "runs": verdict.runs, "problems": "-" if of_kl else verdict.problems,
        "over": verdict.over or "-",
    }  # fmt: skip


def _span(low: float, high: float, scale: float) -> dict[str, float]:
    left, right = _percent(low, scale), _percent(high, scale)
    return {"left": left, "width": round(right - left, 2)}


def _percent(value: float, scale: float) -> float:
    """The place of a difference on a scale from -`scale` to `scale`, in percent."""
    return round(50 + 50 * value / scale, 2)


# --- quality and cost ------------------------------------------------------------------------


def _method(summary: Summary, sets: Sequence[str]) -> dict[str, Any]:
    return {
        "method": summary.method,
        "base": False,
        "cells": [
            *(_score(summary, name) for name in sets),
            _number(summary.kl, ".3g"),
            _number(summary.trained_tokens),
            _number(summary.rollout_tokens),
            _number(summary.seconds.get("total")),
            _number(summary.peak_memory, ".2f"),
            _number(summary.runs) if summary.runs else _cell(0, "failed"),
        ],
    }


def _score(summary: Summary, name: str) -> Cell:
    mean = summary.scores.get(name)
    small = ""
    if mean is not None and summary.runs > 1:
        small = f"{100 * summary.lowest[name]:.1f} to {100 * summary.highest[name]:.1f}"
    return _cell(mean, f"{100 * (mean or 0):.1f}", small)


def _before(comparison: Comparison, sets: Sequence[str]) -> dict[str, Any]:
    scores = base_scores(comparison)
    means = [scores.get(name) for name in sets]
    cells = [_cell(mean, f"{100 * (mean or 0):.1f}") for mean in means]
    return {"method": BASE, "base": True, "cells": cells + [_cell(None)] * 6}


def _seconds(by_method: Iterable[Summary]) -> list[dict[str, Any]]:
    """The phases of each method; the rest fills its bar up to the longest one."""
    by_phase = {}
    for summary in by_method:
        phases = {phase: s for phase, s in summary.seconds.items() if phase != "total" and s > 0}
        other = summary.seconds.get("total", 0.0) - sum(phases.values())
        if other > 0:
            phases["other"] = phases.get("other", 0.0) + other
        by_phase[summary.method] = phases
    longest = max((sum(phases.values()) for phases in by_phase.values()), default=0.0)
    return [
        {
            "method": method,
            "rest": longest - sum(phases.values()),
            "parts": [
                {"name": phase, "seconds": s, "style": phase if phase in PHASES else "other"}
                for phase, s in phases.items()
            ],
        }
        for method, phases in by_phase.items()
        if phases
    ]


# --- tuning and runs -------------------------------------------------------------------------


def _tuning(comparison: Comparison) -> list[dict[str, Any]]:
    rows = []
    for (method, field), curve in tuning_curves(comparison).items():
        for point in curve:
            value = point.settings.get(field)
            score = point.score
            rows.append({
                "method": method, "field": field,
                "setting": {"text": str(value), "small": "", "value": value},
                "score": _cell(score, f"{100 * (score or 0):.1f}")
                if score is not None else {**_cell(None), "text": "failed"},
                "chosen": "chosen" if point.chosen else "",
            })  # fmt: skip
    return rows


def _runs(comparison: Comparison, folder: Path) -> list[dict[str, Any]]:
    rows = []
    for outcome in comparison.outcomes:
        mean = set_means(outcome.scores).get(comparison.headline)
        rows.append({
            "method": outcome.method, "base": outcome.base, "seed": outcome.seed,
            "settings": settings_text(outcome.settings),
            "score": _cell(mean, f"{100 * (mean or 0):.1f}"), "kl": _number(outcome.kl, ".3g"),
            "folder": outcome.folder, "link": _link(folder, outcome.folder),
        })  # fmt: skip
    return rows


def _link(folder: Path, run: str) -> str:
    """A relative link to a run below the folder of the comparison; empty for any other path."""
    path = PurePosixPath(run)
    if not path.parts or path.is_absolute() or ".." in path.parts or not (folder / path).is_dir():
        return ""
    return f"./{quote(str(path))}/"
