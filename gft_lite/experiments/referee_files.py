"""The files of a comparison: referee.json, .csv, .md, .tex and .html."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from gft_lite.experiments.outcomes import Comparison, Outcome
from gft_lite.experiments.referee_page import referee_page
from gft_lite.experiments.referee_tables import (
    base_scores,
    edges,
    main_table,
    set_means,
    settings_text,
    summaries,
    tables,
)
from gft_lite.experiments.verdict import Verdict, headline_sentences, judge, rules
from gft_lite.utils.files import write_text_atomic
from gft_lite.utils.paired_difference import LEVEL
from gft_lite.utils.tables import Table, csv_text, flatten
from gft_lite.version import __version__


def write_referee(comparison: Comparison, folder: str | Path) -> dict[str, tuple[Verdict, ...]]:
    """Write all files of a comparison to its folder; returns the verdicts by evaluation set.

    Each file is written atomically, and the files of unfinished comparisons say what is missing.
    """
    folder, found = Path(folder), judge(comparison)
    made = tables(comparison, found)
    tex = [main_table(comparison, found), *made]
    for name, text in {
        "referee.json": json.dumps(_finite(_json(comparison, found)), indent=1, allow_nan=False),
        "referee.csv": csv_text([_csv_row(outcome) for outcome in comparison.outcomes]),
        "referee.md": _markdown(comparison, found, made),
        "referee.tex": "\n".join(_latin(table).latex() for table in tex),
        "referee.html": referee_page(comparison, found, folder),
    }.items():
        write_text_atomic(folder / name, text)
    return found


def _json(comparison: Comparison, found: Mapping[str, Sequence[Verdict]]) -> dict[str, Any]:
    """Everything that the page shows, and each run's scores by problem."""
    return {
        "version": __version__,
        "level": LEVEL,
        "rules": rules(comparison),
        "answer": headline_sentences(comparison, found[comparison.headline]),
        "verdicts": {name: [asdict(v) for v in verdicts] for name, verdicts in found.items()},
        "methods": {method: asdict(s) for method, s in summaries(comparison).items()},
        "before_training": base_scores(comparison),
        "tuning_edges": edges(comparison),
        **asdict(comparison),
    }


def _finite(value: Any) -> Any:
    """The same tree with None for figures that are not finite, which JSON does not know."""
    if isinstance(value, Mapping):
        return {str(key): _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _csv_row(outcome: Outcome) -> dict[str, Any]:
    """A run as a line: names, settings, scores after and before training, cost."""
    own = asdict(replace(outcome, scores={}, base_scores={}))
    del own["scores"], own["base_scores"]
    return {
        "method": own.pop("method"), "base": own.pop("base"), "seed": own.pop("seed"),
        **{f"scores/{name}": mean for name, mean in set_means(outcome.scores).items()},
        **{f"base_scores/{name}": mean for name, mean in set_means(outcome.base_scores).items()},
        **{name: "" if value == "None" else value for name, value in flatten(own).items()},
    }  # fmt: skip


def _markdown(
    comparison: Comparison, found: Mapping[str, Sequence[Verdict]], made: Sequence[Table]
) -> str:
    answer, *others = headline_sentences(comparison, found[comparison.headline]) or ["-"]
    design = Table("Design", ("", ""), tuple(comparison.design.items()), labels=2)
    runs = Table(
        "Runs", ("method", "base", "seed", "settings", "folder"),
        tuple(
            (o.method, o.base, str(o.seed), settings_text(o.settings), o.folder)
            for o in comparison.outcomes
        ), labels=5,
    )  # fmt: skip
    parts = [
        f"# {_plain(comparison.name)}",
        f"**{_plain(answer)}**",
        *(_plain(sentence) for sentence in others),
        *(_plain(sentence) for sentence in edges(comparison)),
        *(_safe(table).markdown().rstrip() for table in (*made, design, runs)),
        "## Rules, fixed before the runs",
        "\n".join(f"- {_plain(rule)}" for rule in rules(comparison)),
    ]
    return "\n\n".join(parts) + "\n"


def _safe(table: Table) -> Table:
    return _mapped(table, _plain)


def _plain(text: str) -> str:
    """Text on one line of Markdown without HTML."""
    return _line(text).replace("&", "&amp;").replace("<", "&lt;")


def _latin(table: Table) -> Table:
    """The table in characters that LaTeX's default fonts have."""
    return _mapped(table, lambda text: _line(text.encode("latin-1", "replace").decode("latin-1")))


def _line(text: str) -> str:
    return " ".join(text.split())


def _mapped(table: Table, change: Callable[[str], str]) -> Table:
    rows = tuple(tuple(map(change, row)) for row in table.rows)
    return Table(change(table.title), tuple(map(change, table.header)), rows, table.labels)
