"""The lab study as a Markdown page: the rule, verdicts, tables with intervals, plots, costs."""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import get_args

from gft_lite.experiments.lab_study import Results
from gft_lite.experiments.paper_findings import FINDINGS, RULE, Comparison, Finding, Verdict, judge
from gft_lite.report.curves import BASE, SHARE, Curve, Plot
from gft_lite.utils.files import write_text_atomic
from gft_lite.utils.statistics import t_interval
from gft_lite.utils.tables import Table

INTERPRETATION = "## What we make of it"  # From this heading on, the text is kept.


def write_page(results: Results, file: str | Path) -> Path:
    """Write the page, its plots into a folder beside it; the interpretation below is kept."""
    file = Path(file)
    folder = file.with_suffix("")
    old = file.read_text(encoding="utf-8") if file.exists() else ""
    kept = old[old.index(INTERPRETATION) :] if INTERPRETATION in old else ""
    parts = [
        _introduction(results),
        _findings(results),
        *(table.markdown() for table in _tables(results)),
        *_plot_images(results, folder),
        *(table.markdown() for table in (_tuning(results), _bases(results), _costs(results))),
        "".join(f"Failed: {line}\n" for line in results.failed),
        kept,
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomic(file, "\n".join(part for part in parts if part))
    return file


def _introduction(results: Results) -> str:
    design, recipe, evaluation = results.design, results.recipe, results.design.eval
    sets = ", ".join(f"{s['problems']} {name}" for name, s in evaluation["sets"].items())
    per_setting = len(design.bases) * design.seeds
    return f"""\
# The paper's questions on the laboratory

Made by `gft-lite lab study`; the same command makes it again, and from finished runs it takes
seconds. Nothing here is the paper's own experiment: a tiny model, a small task, minutes.

- Every setting has {per_setting} runs: {len(design.bases)} pretrained bases (the shipped one, and
  others of the same script with another seed, as they came out) with {design.seeds} seeds each.
- A run has {recipe.train.steps} steps of 128 responses whatever the method (`sft_few`: 16), LoRA
  on an unquantised base, no monitoring. PSFT makes eight updates of each step, the others one.
- Learning rates: one grid for all methods, {_rates(design.rates)}; a method whose best is the
  lowest or the highest also tries {_rates(design.beyond)} at that end. Chosen by mean pass@1 on
  the `tune` split, one run on each base with a seed that nothing else has. The ratio, tau and
  stage runs take the rates of their methods, as tuned in the main comparison.
- Evaluated on {sets} problems, {evaluation["samples"]} samples each at temperature
  {recipe.eval.temperature}. KL is KL(base || policy) in nats per token, on the base's own answers.
- E, T and S are the expert, teacher and self responses that one run was given.
- Figures are means over runs with 95% intervals (Student's t). Runs of one base are not quite
  independent of each other, and nothing corrects for the number of findings.

## The rule, written before the runs

{RULE}
"""


def _rates(rates: Iterable[float]) -> str:
    return ", ".join(f"{rate:g}" for rate in rates)


# --- tables ----------------------------------------------------------------------------------


def _findings(results: Results) -> str:
    judged = [(f, *found) for f in FINDINGS if (found := judge(f, results.runs))]
    header = ("the paper's finding", "where", "compared", "figure", "difference", "verdict")
    rows = tuple(_finding(*each) for each in judged)
    verdicts = Counter(verdict for _, verdict, _ in judged)
    counts = ", ".join(f"{verdicts[verdict]} {verdict}" for verdict in get_args(Verdict))
    return Table("Findings", header, rows, labels=4).markdown() + f"\nOf {len(rows)}: {counts}.\n"


def _finding(
    finding: Finding, verdict: Verdict, comparisons: Sequence[Comparison]
) -> tuple[str, ...]:
    compared = "<br>".join(f"{c.better} - {c.worse}" for c in comparisons)
    differences = "<br>".join(f"{c.mean:+.3f} [{c.low:+.3f}, {c.high:+.3f}]" for c in comparisons)
    return finding.claim, finding.where, compared, finding.figure, differences, f"**{verdict}**"


@dataclass(frozen=True, slots=True)
class _Section:
    """The title, with the place in the paper, and the settings of a table."""

    title: str
    settings: tuple[str, ...]


def _sections(results: Results) -> list[_Section]:
    design = results.design
    taus = sorted({*design.taus, 0.7})
    ratios = sorted({*design.ratios, "4:4"}, reverse=True)
    return [
        _Section("Methods (Tables 1 to 4, Figure 5)", ("base", *design.methods)),
        _Section("GRPO from other starts (Figure 4)",
                 ("grpo", *(f"{a} > {b}" for a, b in design.stages))),
        _Section("Demonstrations to self samples (Table 5)", tuple(f"ratio {r}" for r in ratios)),
        _Section("tau (Figure 6)", tuple(f"tau {t:g}" for t in taus)),
    ]  # fmt: skip


def _tables(results: Results) -> list[Table]:
    ks = results.design.eval["k"]
    further = list(results.design.eval["sets"])[1:]
    figures = [*(f"pass@{k}" for k in ks), *further, "kl"]
    made = []
    for number, section in enumerate(_sections(results)):
        main = number == 0  # Only these runs differ in rates and responses.
        rows = [
            (name, *(_rate_and_sources(results, name) if main else ()),
             *(_spread([run[f] for run in results.runs[name].values()]) for f in figures))
            for name in section.settings if name in results.runs
        ]  # fmt: skip
        header = ("setting", *(("rate", "E", "T", "S") if main else ()), *figures)
        if rows:
            made.append(Table(section.title, header, tuple(rows)))
    return made


def _rate_and_sources(results: Results, method: str) -> tuple[str, ...]:
    """The learning rate and the numbers of responses by source of one run."""
    sources = results.sources.get(method, {})
    counts = (f"{sources[s]:,}" if s in sources else "-" for s in ("expert", "teacher", "self"))
    return f"{results.rates[method]:g}" if method in results.rates else "-", *counts


def _spread(values: Sequence[float]) -> str:
    if len(values) < 2 or max(values) == min(values):
        return f"{fmean(values):.3f}"
    low, high = t_interval(values)
    return f"{fmean(values):.3f} [{low:.3f}, {high:.3f}]"


def _tuning(results: Results) -> Table:
    rates = sorted({rate for scores in results.tuning.values() for rate in scores})
    rows = [
        (method, *(_score(scores, rate, results.rates[method]) for rate in rates))
        for method, scores in results.tuning.items()
    ]
    title = "Learning rates: mean pass@1 on the tune split (chosen: bold)"
    return Table(title, ("method", *_rates(rates).split(", ")), tuple(rows))


def _score(scores: Mapping[float, float], rate: float, chosen: float) -> str:
    if rate not in scores:
        return "-"
    return f"**{scores[rate]:.3f}**" if rate == chosen else f"{scores[rate]:.3f}"


def _bases(results: Results) -> Table:
    """pass@1 of every base and of the policies that methods made of it."""
    names = [name for name in ("base", "sft", "gft", "grpo") if name in results.runs]
    rows = []
    for model in dict.fromkeys(model for model, _ in results.runs["base"]):
        means = [
            fmean(run["pass@1"] for (base, _), run in results.runs[name].items() if base == model)
            for name in names
        ]
        label = "shipped (seed 0)" if model == "lab" else f"seed {Path(model).name}"
        rows.append((label, *(f"{mean:.3f}" for mean in means)))
    return Table("pass@1 by base", ("base", *names), tuple(rows))


def _costs(results: Results) -> Table:
    total = {key: sum(cost[key] for cost in results.costs.values()) for key in ("cpu", "wall")}
    rows = [
        (part, f"{cost['cpu']:,.0f}", f"{cost['wall']:,.0f}")
        for part, cost in {**results.costs, "all": total}.items()
    ]
    return Table("What it took", ("part", "CPU seconds", "wall seconds"), tuple(rows))


# --- plots -----------------------------------------------------------------------------------


def _plot_images(results: Results, folder: Path) -> list[str]:
    """Write plots to `folder`; returns Markdown images, none without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        return []
    from gft_lite.report.plots import write_files

    plots = [plot for plot in (_passk_plot(results), *_line_plots(results)) if plot]
    for plot in plots:
        write_files(plot, folder)
    return [f"![{plot.title}]({folder.name}/{plot.name}.svg)\n" for plot in plots]


def _passk_plot(results: Results) -> Plot | None:
    ks = results.design.eval["k"]
    names = [name for name in ("base", "sft", "grpo", "gft") if name in results.runs]
    if len(ks) < 2:
        return None
    curves = tuple(
        _curve(name, BASE if name == "base" else place, ks,
               [_values(results, name, f"pass@{k}") for k in ks])
        for place, name in enumerate(names)
    )  # fmt: skip
    return Plot("pass-at-k", "pass@k (Table 4)", "k", "pass@k", curves, SHARE, True, True)


def _line_plots(results: Results) -> Iterable[Plot]:
    for section, kind, title, label in zip(
        _sections(results)[2:], ("ratio", "tau"),
        ("Accuracy by ratio (Table 5)", "Accuracy by tau (Figure 6)"),
        ("self samples of 8", "tau"), strict=True,
    ):  # fmt: skip
        names = [name for name in section.settings if name in results.runs]
        x = [float(name.rpartition(":")[2].removeprefix("tau ")) for name in names]
        values = [_values(results, name, "pass@1") for name in names]
        if len(names) > 1:
            curve = _curve("pass@1", 0, x, values)
            yield Plot(kind, title, label, "pass@1", (curve,), SHARE, points=True)


def _values(results: Results, name: str, figure: str) -> list[float]:
    return [run[figure] for run in results.runs[name].values()]


def _curve(label: str, colour: int, x: Sequence[float], values: Sequence[list[float]]) -> Curve:
    spreads = [t_interval(v) if len(v) > 1 else (v[0], v[0]) for v in values]
    low, high = zip(*spreads, strict=True)
    return Curve(label, colour, x, [fmean(v) for v in values], low, high)
